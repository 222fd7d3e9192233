# SPDX-License-Identifier: Apache-2.0
"""Commands about exported graphs and engines: build, run, bench, inspect."""

import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from modelopt_dms.cli.opening import check_temperature
from modelopt_dms.cli.options import (
    STDOUT,
    JsonOpt,
    NewTokensOpt,
    RawOpt,
    SeedOpt,
    TemperatureOpt,
    check_json,
    err,
    out,
    show,
)
from modelopt_dms.cli.tables import print_table
from modelopt_dms.config.output_dir import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modelopt_dms.runtime.manifest import Manifest
    from modelopt_dms.runtime.session import Session

engine_app = typer.Typer(
    help="Build, run and look at the engines of an exported directory.", no_args_is_help=True
)


class BackendChoice(str, Enum):
    """What runs the graphs."""

    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_eager = "tensorrt-eager"
    onnxruntime = "onnxruntime"


EngineDir = Annotated[
    Path, typer.Argument(help="Directory that `export --format onnx` or `tensorrt` wrote.")
]
BackendOpt = Annotated[
    BackendChoice,
    typer.Option(
        help="auto: TensorRT if engines were built, else onnxruntime on the CPU; tensorrt-eager: without a CUDA graph."
    ),
]
PagesOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pages of 64 slots of each layer's KV cache. [default: all that may be used]",
    ),
]


@engine_app.command()
def build(
    directory: EngineDir,
    batch: Annotated[int, typer.Option(min=1, help="Batch slots of the decode step.")] = 8,
    pages: PagesOpt = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="MiB of scratch that TensorRT may use.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel times; makes the next build quick.")
    ] = None,
) -> None:
    """Build TensorRT engines, on the GPU that will run them."""
    from modelopt_dms.runtime.manifest import Manifest

    Manifest.load(directory)
    if timing_cache is not None:
        check_writable(timing_cache)
    from modelopt_dms.exporters.tensorrt.build import BuildOptions
    from modelopt_dms.exporters.tensorrt.build import build as build_engines

    scratch = None if workspace is None else workspace << 20
    options = BuildOptions(batch, pages, scratch, timing_cache)
    manifest = build_engines(
        directory, options, on_progress=lambda x: err.print(x, highlight=False)
    )
    assert manifest.build is not None
    out.print(f"built in {manifest.build['seconds']} s: {directory}", highlight=False)


@engine_app.command()
def run(
    directory: EngineDir,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")
    ],
    raw: RawOpt = False,
    max_new_tokens: NewTokensOpt = 128,
    temperature: TemperatureOpt = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the most probable tokens only.")
    ] = 1.0,
    seed: SeedOpt = 0,
    backend: BackendOpt = BackendChoice.auto,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show times, and what the KV cache held at the end.")
    ] = False,
    json_file: JsonOpt = None,
) -> None:
    """Answer a prompt as `generate` does: by the tokenizer's chat template if it has one."""
    from modelopt_dms.runtime.manifest import Manifest

    Manifest.load(directory)
    check_temperature(temperature)
    check_json(json_file)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("--prompt is empty; expected text")
    import torch

    from modelopt_dms.cli.talking import encode
    from modelopt_dms.runtime.session import open_session

    tokenizer = _tokenizer(directory)
    session = open_session(directory, backend.value)

    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    [tokens] = session.generate(
        [encode(tokenizer, text, raw)],
        max_new_tokens,
        temperature,
        top_p,
        seed,
        on_token=None
        if json_file == STDOUT
        else lambda row, token: streamer.put(torch.tensor([token])),
    )
    streamer.end()
    if stats or json_file is not None:
        figures = {"answer": tokenizer.decode(tokens, skip_special_tokens=True)}
        figures |= asdict(session.stats)
        show(figures, json_file, _summary(session, tokens[-1]))


@engine_app.command()
def bench(
    directory: EngineDir,
    batch: Annotated[
        int | None, typer.Option(min=1, help="onnxruntime: batch slots. [default: 1]")
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each.")] = 64,
    backend: BackendOpt = BackendChoice.auto,
    pages: PagesOpt = None,
    json_file: JsonOpt = None,
) -> None:
    """Time prefill and decode on random prompts."""
    from modelopt_dms.runtime.manifest import Manifest

    Manifest.load(directory)
    check_json(json_file)
    from modelopt_dms.runtime.bench import bench as measure
    from modelopt_dms.runtime.session import open_session

    session = open_session(directory, backend.value, batch=batch, pages=pages)
    figures = asdict(measure(session, prompt_length, new_tokens))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if value % 1 else f"{value:,.0f}")
    show(figures, json_file, table)


@engine_app.command()
def inspect(directory: EngineDir, json_file: JsonOpt = None) -> None:
    """Show the model, what goes in and out, kernels, and what engines were built for."""
    from modelopt_dms.runtime.manifest import Manifest

    manifest = Manifest.load(directory)
    check_json(json_file)
    if json_file is not None:
        show(asdict(manifest), json_file)
        return
    table = Table("model", "", title=str(directory))
    for name, value in asdict(manifest.model).items():
        table.add_row(name, str(value))
    for name in ("page", "pages_per_list", "max_length", "chunk", "programs", "plugin_free"):
        table.add_row(name, str(getattr(manifest, name)))
    for name, version in manifest.made_by.items():
        table.add_row(f"made by {name}", version)
    print_table(out, table)
    for name in manifest.phases:
        print_table(out, _ports(manifest, name))
    for x in manifest.kernels:
        out.print(
            f"{x.operator}: {x.file}, {x.arch}, {x.threads} threads, {x.shared} bytes shared, "
            f"grid ({', '.join(x.grid)}), integers ({', '.join(x.integers)}), sha256 {x.sha256[:12]}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    built = Table("build", "")
    for name, value in (manifest.build or {"engines": "not built yet"}).items():
        if name != "kernels":
            built.add_row(name, str(value))
    print_table(out, built)


def _tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The one beside the graphs.

    Raises:
        ManifestError: it is not an exported directory.
        EngineError: it holds no tokenizer.
    """
    from modelopt_dms.cli.opening import load_tokenizer
    from modelopt_dms.runtime.manifest import EngineError, Manifest

    Manifest.load(directory)
    try:
        return load_tokenizer(str(directory), trust=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{directory} holds no tokenizer that can be read; export the model again with its tokenizer, or copy "
            "tokenizer.json and tokenizer_config.json there"
        ) from error


def _ports(manifest: "Manifest", name: str) -> Table:
    """Inputs and outputs of a phase; of layers, the first one's."""
    phase = manifest.phases[name]
    layers = manifest.model.layers
    engine = phase.engine or "no engine yet"
    table = Table(
        "", "name", "dtype", "shape", "same memory as", title=f"{name}: {phase.graph}, {engine}"
    )
    for side, ports in (("in", phase.inputs), ("out", phase.outputs)):
        for port in ports:
            kind, dot, layer = port.name.partition(".")
            if dot and layer != "0":
                continue
            shown = f"{kind}.0 .. {kind}.{layers - 1}" if dot and layers > 1 else port.name
            shape = " x ".join(str(x) for x in port.shape)
            table.add_row(side, shown, port.dtype, shape, port.aliases or "")
    return table


def _summary(session: "Session", last: int) -> str:
    """Times, and what the KV cache held."""
    stats, model = session.stats, session.manifest.model
    decode = 1000 * stats.decode_seconds / max(stats.decode_steps, 1)
    size = stats.pages * model.page_bytes / 2**20
    end = "eos" if last in model.eos else "length"
    return (
        f"{stats.seen[0]} tokens, {stats.live[0]:.1f} resident on average; {stats.pages} pages of all layers "
        f"({size:.2f} MiB)\nprefill {1000 * stats.prefill_seconds:.1f} ms, decode {decode:.2f} ms a step, "
        f"{stats.decode_steps} steps; ended by {end}"
    )
