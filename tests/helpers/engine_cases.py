# SPDX-License-Identifier: Apache-2.0
"""Models whose engine kernels the tests look at, their manifests, and shapes of their ops' tensors.

`python tests/helpers/engine_cases.py DIRECTORY NAME ...` compiles: the tests' own process interprets kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

from modelopt_dms.runtime.manifest import Manifest, Model
from modelopt_dms.runtime.operators import OPERATORS, Argument

CHUNK, PAGES, LIST_PAGES, PROGRAMS = 128, 40, 4, 6


def model(dtype: str, number: str, heads: int, group: int, dim: int, shift: int = 0) -> Model:
    return Model(
        architecture="LlamaForCausalLM",
        layers=2,
        kv_heads=heads,
        heads=heads * group,
        key_dim=dim,
        value_dim=dim,
        vocabulary=64,
        dtype=dtype,
        window=20,
        shift=shift,
        key_number=number,
        value_number=number,
        eos=(2,),
    )


MODELS = {
    "bf16": model("bfloat16", "plain", 2, 4, 128),
    "fp16": model("float16", "plain", 2, 4, 64, shift=1),
    "fp8": model("bfloat16", "fp8", 2, 4, 64),
}


def attributes(made: Model) -> dict[str, object]:
    """Values of all attributes of all ops."""
    return {
        "window": made.window,
        "shift": made.shift,
        "key_number": made.key_number,
        "value_number": made.value_number,
        "scale": made.key_dim**-0.5,
        "softcap": 0.0,
        "programs": PROGRAMS,
        "rows": made.heads // made.kv_heads,
        "value_dim": made.value_dim,
    }


def sizes(made: Model, batch: int, tokens: int = CHUNK) -> dict[str, int]:
    """What dims of the ops' tensors are."""
    return {
        "B": batch,
        "K": made.kv_heads,
        "H": made.heads,
        "D": made.key_dim,
        "DV": made.value_dim,
        "KC": made.key_dim,
        "VC": made.value_dim,
        "N": PAGES,
        "S": 64,
        "P": LIST_PAGES,
        "E": 64 * LIST_PAGES,
        "R": made.window + 1,
        "T": tokens,
        "TP": -(-tokens // 128) * 128 + 128,
        "programs": PROGRAMS,
        "rows": made.heads // made.kv_heads,
        "value_dim": made.value_dim,
    }


def shape(argument: Argument, known: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(x) if x.isdigit() else known[x] for x in argument.shape)


def kind(argument: Argument, made: Model) -> str:
    """The dtype of a tensor, of torch, without the prefix."""
    if argument.kind in ("model", "keys", "values"):
        number = {"keys": made.key_number, "values": made.value_number}.get(argument.kind, "plain")
        return made.dtype if number == "plain" else "int8"
    return argument.kind


def compile_elsewhere(directory: Path, *names: str) -> dict[str, Path]:
    """Compile the kernels of these models in a process where Triton does not interpret; a directory for each."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(directory), *names]
    found = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return {name: directory / name for name in names}


def main(directory: Path, names: list[str]) -> None:
    from modelopt_dms.exporters.tensorrt.kernels import compile_kernels, write_kernels
    from modelopt_dms.kernels.reference import Scoring

    for name in names:
        made = MODELS[name]
        compiled = compile_kernels(
            made, Scoring(made.key_dim**-0.5), chunk=CHUNK, programs=PROGRAMS, batch=4
        )
        assert {x.operator for x, _ in compiled} == set(OPERATORS)
        kernels = write_kernels(directory / name, compiled)
        Manifest(made, 64, LIST_PAGES, CHUNK, PROGRAMS, {}, kernels).save(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
