# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile input: recipes, model directories, data files, manifests. Each is read, or refused in one error.

    python tools/fuzz.py --cases 20000 --kinds recipe config data manifest --seed 0

A case is a valid file with a few random changes. It passes if reading it succeeds, or raises an error that the command
line shows as one line; anything else (another exception, more than 10 seconds, a process that dies) is printed with the
seed that makes it again.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from modelopt_dms.cli import is_expected
from modelopt_dms.config.bundled import embedded_model_dir, list_recipes, recipes_dir

SECONDS = 10
NUMBERS = [0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")]
TEXTS = [
    "",
    " ",
    "\x00",
    "\ud83d",
    "x" * 5000,
    "../../etc/passwd",
    "{{ 7*7 }}",
    "*",
    "é\u202e",
    "null",
    "$import",
]
VALUES: list[Any] = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"a": {}}, {"": 1}]


def changed(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A copy of plain JSON with something in it put out of order."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        copy, key = dict(value), rng.choice(list(value))
        action = rng.random()
        if action < 0.15:
            del copy[key]
        elif action < 0.25:
            copy[rng.choice([f"{key}x", *[x for x in TEXTS if x]])] = copy.pop(key)
        elif action < 0.3:
            copy[rng.choice(["extra", "$import", "__class__"])] = rng.choice(VALUES)
        else:
            copy[key] = changed(copy[key], rng, depth + 1)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.8:
        copy_of, index = list(value), rng.randrange(len(value))
        action = rng.random()
        if action < 0.2:
            del copy_of[index]
        elif action < 0.4:
            copy_of.insert(index, rng.choice([copy_of[index], *VALUES]))
        else:
            copy_of[index] = changed(copy_of[index], rng, depth + 1)
        return copy_of
    return rng.choice(VALUES)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        action = rng.random()
        if action < 0.4 and place < len(data):
            data[place] = rng.randrange(256)
        elif action < 0.6:
            del data[place : place + rng.randint(1, 50)]
        elif action < 0.8:
            data[place:place] = rng.choice(
                [b"[" * 5000, b"\xff\xfe", b"\0" * 9, b"&a [*a]", b"- " * 99, b"{" * 99]
            )
        else:
            data[place:place] = data[max(0, place - rng.randint(1, 80)) : place]
    return bytes(data)


class Recipes:
    """Shipped recipes with changed values or bytes, and changes given as --set."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files = [recipes_dir() / f"{name}.yaml" for name in list_recipes()]

    def run(self, rng: random.Random) -> None:
        """One case."""
        from modelopt_dms.config.recipe import load_recipe
        from modelopt_dms.config.recipe_file import check_recipe

        content = rng.choice(self.files).read_bytes()
        sets = []
        if rng.random() < 0.5:
            content = yaml.safe_dump(
                changed(yaml.safe_load(content), rng), allow_unicode=True
            ).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.7:
            content = damaged(content, rng)
        else:
            key = rng.choice(
                ["dms.window", "calibrate.curve", "retrofit.steps", "quantize", "dms", "a.b.c", ""]
            )
            sets = [f"{key}={rng.choice(VALUES)}"]
        file = self.place / "recipe.yaml"
        file.write_bytes(content)
        check_recipe(file, sets)
        load_recipe(file, sets)


class Configs:
    """Directories of a compressed model with changed JSON files, or damaged ones of any kind."""

    def __init__(self, place: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import modelopt_dms as dms

        self.good, self.place = place / "good", place / "case"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
        tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
        changes = {
            "dms.window": 16,
            "calibrate.samples": 2,
            "calibrate.sample_length": 256,
            "calibrate.held_out": 1,
            "calibrate.curve": [2, 4],
        }
        texts = [f"{i} is a number of a list\n" * 90 for i in range(9)]
        dms.compress(
            model,
            "calibrated_cr4",
            tokenizer=tokenizer,
            data=texts,
            overrides=changes,
            output_dir=self.good,
            progress=False,
        )
        self.files = sorted(
            x.name for x in self.good.iterdir() if x.suffix in (".json", ".safetensors")
        )

    def run(self, rng: random.Random) -> None:
        """One case."""
        from modelopt_dms.checkpoints.load import load
        from modelopt_dms.cli.opening import check_compressed, check_ratio, stored_dtype
        from modelopt_dms.cli.options import Dtype

        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        name = rng.choice([*self.files, *["config.json"] * 6])
        for file in self.good.iterdir():
            if file.name != name and file.is_file():
                (self.place / file.name).symlink_to(file)
        content = (self.good / name).read_bytes()
        if name.endswith(".json") and rng.random() < 0.8:
            content = json.dumps(self._changed(json.loads(content), rng)).encode(
                "utf-8", "surrogatepass"
            )
        else:
            content = damaged(content, rng)
        if rng.random() < 0.97:
            (self.place / name).write_bytes(content)
        check_compressed(self.place)
        check_ratio(self.place, 2.0)
        stored_dtype(str(self.place), Dtype.auto)
        load(self.place)

    def _changed(self, content: Any, rng: random.Random) -> Any:
        """Half of the changes are in what DMS adds to the config."""
        ours = [
            x for x in ("dms_config", "dms_curve") if isinstance(content, dict) and x in content
        ]
        if ours and rng.random() < 0.5:
            name = rng.choice(ours)
            return {**content, name: changed(content[name], rng)}
        return changed(content, rng)


class Data:
    """Files of texts, chats and ids with changed records or bytes."""

    RECORDS: tuple[dict[str, Any], ...] = (
        {"text": "a b c"},
        {"input_ids": [1, 2, 3, 4], "attention_mask": [0, 1, 1, 1], "position_ids": [0, 0, 1, 2]},
        {"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 2]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "content": "a",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                    ],
                },
                {"role": "tool", "content": "4"},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
            ],
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "i", "output": "a"},
        {"prompt": "q", "completion": "a"},
    )
    TEMPLATE = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}{% if enable_thinking %}!{% endif %}"
    )

    def __init__(self, place: Path) -> None:
        from transformers import AutoTokenizer

        self.place = place
        self.tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
        self.tokenizer.chat_template = self.TEMPLATE

    def run(self, rng: random.Random) -> None:
        """One case."""
        from modelopt_dms.data.documents import open_documents, tokenize_prompts
        from modelopt_dms.data.files import check_start
        from modelopt_dms.data.formats import FORMATS
        from modelopt_dms.data.inputs import Formatted

        rows = [rng.choice(self.RECORDS) for _ in range(rng.randint(1, 3))]
        rows[0] = changed(rows[0], rng)
        name = rng.choice([None, None, *FORMATS])
        content = "\n".join(json.dumps(x) for x in rows).encode("utf-8", "surrogatepass")
        file = self.place / rng.choice(["d.jsonl", "d.jsonl", "d.jsonl", "d.txt", "d.parquet"])
        if file.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                pq.write_table(pa.Table.from_pylist(rows), file)
            except (pa.ArrowException, TypeError, UnicodeError, OverflowError, AttributeError):
                return  # nothing that a parquet file can hold
            content = file.read_bytes()
        if rng.random() < 0.4:
            content = damaged(content, rng)
        file.write_bytes(content)
        check_start(file, name)
        data = file if name is None else Formatted(file, name)
        list(open_documents(data, self.tokenizer, None))
        tokenize_prompts(data, self.tokenizer, 2)


class Manifests:
    """Manifests of exported graphs with changed values or bytes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        from modelopt_dms.runtime.manifest import FILE, Kernel, Manifest, Model, Phase, Port, sha256

        for name in ("decode.onnx", "prefill.onnx", "append.ptx"):
            (place / name).write_text(name)
        ports = (
            Port("input_ids", "int64", ("batch", 1)),
            Port("keys.0", "float32", ("pages", 64, 32)),
        )
        state = (
            Port("logits", "float32", ("batch", 9)),
            Port("new_keys.0", "float32", ("pages", 64, 32), "keys.0"),
        )
        hashes = {x: sha256(place / x) for x in ("decode.onnx", "prefill.onnx", "append.ptx")}
        kernel = Kernel(
            "append",
            "append.ptx",
            "append",
            hashes["append.ptx"],
            "sm_90a",
            128,
            0,
            ("B * K", "1", "1"),
            ("T",),
        )
        Manifest(
            Model("LlamaForCausalLM", 1, 2, 4, 32, 32, 9, "float32", 16, 0, "plain", "plain", (1,)),
            64,
            2,
            32,
            1,
            {x: Phase(f"{x}.onnx", ports, state) for x in ("decode", "prefill")},
            (kernel,),
            files=hashes,
        ).save(place)
        self.good = json.loads((place / FILE).read_text("utf-8"))

    def run(self, rng: random.Random) -> None:
        """One case."""
        from modelopt_dms.runtime.checks import check_files, check_pages
        from modelopt_dms.runtime.manifest import FILE, Manifest

        content = json.dumps(changed(self.good, rng)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.3:
            content = damaged(content, rng)
        (self.place / FILE).write_bytes(content)
        manifest = Manifest.load(self.place)
        check_pages(manifest.all_pages(1), manifest)
        check_files(manifest, self.place)


KINDS: dict[str, Callable[[Path], Any]] = {
    "recipe": Recipes,
    "config": Configs,
    "data": Data,
    "manifest": Manifests,
}


class TooLongError(BaseException):
    """A case that took more than its seconds."""


def _too_long(*_: Any) -> None:
    raise TooLongError


def run(
    kind: str, cases: int, seed: int, place: Path, report: Callable[[str], None]
) -> Counter[str]:
    """Run cases of a kind; how many were read, refused, and faults, each of which is reported in a line."""
    maker = KINDS[kind](place)
    found: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _too_long)
    # What the first case imports takes longer than any case may.
    with contextlib.suppress(Exception):
        maker.run(random.Random(f"{kind} {seed} 0"))
    for case in range(cases):
        signal.alarm(SECONDS)
        try:
            maker.run(random.Random(f"{kind} {seed} {case}"))
            found["read"] += 1
        except (Exception, TooLongError) as error:
            signal.alarm(0)
            if isinstance(error, Exception) and is_expected(error) and str(error).strip():
                found["refused"] += 1
            else:
                found["fault"] += 1
                line = " ".join(str(error).split())[:150]
                report(f"{kind} case {case} of seed {seed}: {type(error).__name__}: {line}")
        finally:
            signal.alarm(0)
    return found


def main() -> None:
    """Run all kinds that were asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    faults = 0
    for kind in options.kinds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            found = run(
                kind, options.cases, options.seed, Path(place), lambda x: print(x, flush=True)
            )
        seconds = time.perf_counter() - start
        faults += found["fault"]
        print(f"{kind}: {options.cases} cases, {dict(found)}, {seconds:.0f} s", flush=True)
    sys.exit(min(faults, 1))


if __name__ == "__main__":
    main()
