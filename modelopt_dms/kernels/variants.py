# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for Hopper without a GPU, in a process where Triton is not interpreting."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What runs on H100 and H200; PTX 8.7 is what drivers of CUDA 12.8 and later take.
ARCH = 90
PTX_VERSION = 87
# What Triton calls torch's dtypes.
TYPE_NAMES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.uint8": "u8",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        name: unique.
        kernel: the `@triton.jit` function.
        signature: Triton types of its runtime parameters by name, such as "*bf16" or "i32".
        constexprs: its constexpr parameters by name.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


def pointer(dtype: Any) -> str:
    """Triton's type of a pointer to elements of this torch dtype."""
    return f"*{TYPE_NAMES[str(dtype)]}"


@dataclass(frozen=True)
class Compiled:
    """What a variant became.

    Attributes:
        ptx: PTX text.
        cubin: machine code.
        shared: bytes of shared memory of a program.
    """

    ptx: str
    cubin: bytes
    shared: int


def compile_variant(variant: Variant) -> Compiled:
    """Compile for sm_90a.

    Raises:
        RuntimeError: Triton is interpreting in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError(
            f"{variant.name}: Triton is interpreting; unset TRITON_INTERPRET to compile"
        )
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    missing = [x for x in names if x not in variant.signature and x not in variant.constexprs]
    if missing:
        raise RuntimeError(f"{variant.name}: no type and no value for {', '.join(missing)}")
    # Addresses of whole tensors are multiples of 16; the launcher sees to it, and vectorised loads need to know.
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", ARCH, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "ptx_version": PTX_VERSION,
        },
    )
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], int(compiled.metadata.shared))


def assemble(ptx: str, arch: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, of PTX text with one entry.

    Raises:
        RuntimeError: the assembler refused.
    """
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [
            nvidia_tools() / "ptxas",
            "-v",
            f"--gpu-name={arch}",
            source,
            "-o",
            f"{source}.cubin",
        ]
        made = subprocess.run(
            [str(x) for x in command], capture_output=True, text=True, check=False
        )
    if made.returncode:
        raise RuntimeError(f"ptxas refused a kernel: {made.stderr.strip()[-2000:]}")
    spills = [int(x) for x in re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", made.stderr)]
    registers = re.search(r"Used (\d+) registers", made.stderr)
    assert registers is not None, made.stderr
    return int(registers[1]), max(spills)


def nvidia_tools() -> Path:
    """Where Triton keeps NVIDIA's assembler and disassembler."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
