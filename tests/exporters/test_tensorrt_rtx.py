# SPDX-License-Identifier: Apache-2.0
"""The embedded model, exported: TensorRT-RTX builds engines of its graphs, and onnxruntime writes PyTorch's text.

MODELOPT_DMS_TENSORRT_PYTHON names an interpreter with tensorrt-rtx; `make test-tensorrt` sets it.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from families import open_gates
from paths import HELPERS, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.evaluation.tasks import training_documents
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.runtime.session import open_session

PYTHON = os.environ.get("MODELOPT_DMS_TENSORRT_PYTHON")
SCRIPT = HELPERS / "rtx_engines.py"
CAPABILITIES = ("SM80", "SM89", "SM120")
CHUNK, LENGTH, NEW, LAYERS = 64, 256, 40, 4
# name -> (dtype, format, its options); with function bodies, and with ONNX's own attention
EXPORTS: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "float32": (torch.float32, "onnx", {}),
    "float16": (torch.float16, "onnx", {}),
    "plugin_free": (torch.float16, "tensorrt", {"plugin_free": True}),
}

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]
needs_tensorrt = pytest.mark.skipif(PYTHON is None, reason="needs TensorRT: make test-tensorrt")


def embedded(dtype: torch.dtype) -> Any:
    """The embedded model, with gates that mark half of the tokens."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=dtype).eval()
    apply_dms(model, {"window": 16, "scale": 10.0})
    return open_gates(model)


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, model and directory."""
    dtype, form, options = EXPORTS[request.param]
    model = embedded(dtype)
    directory = tmp_path_factory.mktemp(request.param) / "export"
    dms.export(model, directory, form, chunk=CHUNK, max_length=LENGTH, **options)
    return request.param, model, directory


def run(directory: Path, output: Path) -> Any:
    output.mkdir()
    command = [str(PYTHON), str(SCRIPT), str(directory), str(output), *CAPABILITIES]
    clean = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@needs_tensorrt
@pytest.mark.parametrize("exported", EXPORTS, indirect=True)
def test_tensorrt_rtx_builds_engines_for_gpus_that_are_not_here(
    exported: Any, tmp_path: Path
) -> None:
    name, model, directory = exported
    output = tmp_path / "engines"
    said = run(directory, output)  # it compares what goes in and out with the manifest
    assert said["version"].startswith("1.7.")
    assert said["imported"] == []
    built = {(x["phase"], x["name"]): x for x in said["engines"]}
    assert set(built) == {(x, y) for x in ("decode", "prefill") for y in CAPABILITIES}
    held = sum(x.numel() * x.element_size() for x in model.parameters())
    for engine in built.values():
        assert (output / engine["file"]).stat().st_size == engine["bytes"] > held
        assert engine["attention"] == (LAYERS if name == "plugin_free" else 0)
        print(f"{name} {engine['file']}: {engine['bytes']:,} bytes in {engine['seconds']} s")
    # Half a file and missing weights are errors of the parser, not engines.
    assert said["truncated"] and said["no weights"]


@pytest.mark.parametrize("exported", ["float32"], indirect=True)
def test_onnxruntime_writes_the_text_of_the_model(exported: Any) -> None:
    """In float32: half precision rounds in another order than PyTorch, and tokens may differ."""
    _, model, directory = exported
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    lengths = (9, CHUNK, 150)  # the last one is longer than a chunk, and no multiple of it
    documents = training_documents(tokenizer, len(lengths), 200, seed=3)
    prompts = [list(x.ids[:y]) for x, y in zip(documents, lengths, strict=True)]
    session = open_session(directory, "onnxruntime", batch=3)
    written = session.generate(prompts, NEW)
    for prompt, tokens in zip(prompts, written, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert tokens == whole[0, len(prompt) :].tolist()
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        assert said == tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True) != ""
    assert session.stats.live[-1] < 0.9 * session.stats.seen[-1]  # tokens were evicted
    assert open_session(directory, "onnxruntime").generate(prompts[:1], NEW) == written[:1]
