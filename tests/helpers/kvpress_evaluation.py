# SPDX-License-Identifier: Apache-2.0
"""What kvpress' own evaluation says of a folder of results, as JSON. Runs in its virtual environment; nothing of ours.

VENV/bin/python tests/helpers/kvpress_evaluation.py EVALUATION FOLDER PRESS
"""

import ast
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

evaluation, folder, press = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.path.insert(0, str(evaluation))
from benchmarks.ruler.calculate_metrics import calculate_metrics  # type: ignore[import-not-found] # noqa: E402

# Its registry imports packages of all benchmarks, and `fire` is for its command line: neither is asked anything here.
registry: Any = ModuleType("evaluate_registry")
registry.DATASET_REGISTRY = registry.SCORER_REGISTRY = {"ruler": "", "modelopt_dms-ruler": ""}
registry.PRESS_REGISTRY = {press: None}
fire: Any = ModuleType("fire")
fire.Fire = None
sys.modules |= {"evaluate_registry": registry, "fire": fire}
import datasets  # type: ignore[import-untyped] # noqa: E402
import pandas as pd  # type: ignore[import-untyped] # noqa: E402
import yaml  # noqa: E402
from evaluate import EvaluationConfig, EvaluationRunner  # type: ignore[import-not-found] # noqa: E402

config = EvaluationConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
with tempfile.TemporaryDirectory() as place:
    name = config.get_results_dir(Path(place)).name
    config.save_config(Path(place) / "config.yaml")
    saved = (Path(place) / "config.yaml").read_text()

    ours = pd.read_csv(folder / "predictions.csv", keep_default_na=False)
    rows = ours.to_dict("records")
    for row in rows:
        row["answer"] = ast.literal_eval(row["answer"].replace("' '", "', '"))
    # As it loads its data sets, answers and saves.
    columns = ("question", "answer_prefix", "answer", "task", "max_new_tokens")
    frame = datasets.Dataset.from_list([{x: row[x] for x in columns} for row in rows]).to_pandas()
    frame["predicted_answer"] = [row["predicted_answer"] for row in rows]
    frame["compression_ratio"] = [row["compression_ratio"] for row in rows]
    runner = EvaluationRunner.__new__(EvaluationRunner)
    runner.df = frame.assign(context="")
    runner._save_results(Path(place) / "predictions.csv")
    written = pd.read_csv(Path(place) / "predictions.csv", dtype=str, keep_default_na=False)
mine = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
found = {
    "name": name,
    "config": saved,
    "settings": asdict(config),
    "columns": sorted(written.columns),
    "same_rows": written[sorted(written.columns)].equals(mine[sorted(mine.columns)]),
    "metrics": json.dumps(calculate_metrics(frame), indent=4),
}
print(json.dumps(found))
