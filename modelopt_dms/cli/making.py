# SPDX-License-Identifier: Apache-2.0
"""Commands that make a model of another one: compress, tune, export."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from modelopt_dms.cli.opening import (
    check_compressed,
    check_model,
    embedded_documents,
    load_any,
    load_base,
    load_tokenizer,
    open_data,
)
from modelopt_dms.cli.options import (
    EMBEDDED,
    BlendOpt,
    ChangesOpt,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    FormatOpt,
    ModelArg,
    TrustOpt,
    out,
    warn,
)
from modelopt_dms.cli.reporting import report_after_compress
from modelopt_dms.config import distributed

if TYPE_CHECKING:
    from modelopt_dms.data.dry_run import Preview


def compress(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file.")] = "dms_cr4",
    data: BlendOpt = None,
    data_format: FormatOpt = None,
    changes: ChangesOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted run in OUTPUT.")] = True,
    report: Annotated[
        bool, typer.Option(help="Write report.html beside the model: what it forgets of a text.")
    ] = True,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Retrofit MODEL so that its KV cache forgets, and save it to OUTPUT."""
    place = check_model(model)
    given = open_data(data, data_format)
    from modelopt_dms.config.output_dir import check_output
    from modelopt_dms.config.recipe import load_recipe
    from modelopt_dms.gates.thresholds import expected_ratios, missed_ratio
    from modelopt_dms.pipeline import OURS, SUMMARY_FILE
    from modelopt_dms.pipeline import compress as run

    chosen = load_recipe(recipe, changes or [])
    check_output(output, OURS)
    network, tokenizer = load_base(place, dtype, device, trust_remote_code)
    texts = given or (embedded_documents(tokenizer, chosen) if model == EMBEDDED else None)
    if texts is None and (chosen.calibrate or chosen.retrofit) and distributed.is_main():
        out.print("no --data: calibrating on the built-in mix of chats, prose and code")
    run(
        network,
        chosen,
        tokenizer=tokenizer,
        data=texts,
        output_dir=output,
        resume=resume,
        on_data=_print_counts if given and distributed.is_main() else None,
    )
    if not distributed.is_main():
        return
    out.print(f"saved to {escape(str(output))}", highlight=False)
    stages = json.loads((output / SUMMARY_FILE).read_text())
    for stage, summary in stages.items():
        out.print(
            "{stage}, on held-out samples of {sequence_length} tokens: compression ratio {compression_ratio:.2f} "
            "(recipe: {target_cr:g}), KL from the full cache {kl:.4f} nats a token; {seconds:.0f} s".format(
                stage=stage, **summary
            ),
            highlight=False,
        )
    if chosen.dms is not None and not stages and chosen.dms.evict:
        warn(
            "the gates have learnt nothing yet, so the model evicts nothing; a recipe with calibrate or retrofit does"
        )
    if stages:
        # What the last stage left is what the model does.
        last = [*stages.values()][-1]
        warn(missed_ratio(last["target_cr"], last["compression_ratio"], last["sequence_length"]))
    curve = getattr(network.config, "dms_curve", None)
    if curve is not None and (expected := expected_ratios(network, curve["length"])) is not None:
        out.print(
            "expect {:.2f} to {:.2f} of other texts of {} tokens".format(
                *expected, curve["length"]
            ),
            highlight=False,
        )
    if report and stages and chosen.dms is not None and distributed.count() == 1:
        report_after_compress(network, tokenizer, output)


def tune(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed model.")],
    max_loss: Annotated[
        float,
        typer.Option(min=0.0, help="Percent by which perplexity may rise above the full cache's."),
    ] = 0.5,
    data: BlendOpt = None,
    data_format: FormatOpt = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a copy that is set to what was found."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=64, help="Tokens of a sample; by default those of the model's curve."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 16,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Find the largest compression ratio within a quality budget on your data."""
    place = check_compressed(model)
    given = open_data(data, data_format)
    from modelopt_dms.config.output_dir import check_output
    from modelopt_dms.evaluation.report import trials_table
    from modelopt_dms.evaluation.tasks import held_out_text
    from modelopt_dms.evaluation.tuning import tune as run
    from modelopt_dms.exporters.tuned import save_tuned
    from modelopt_dms.gates.thresholds import curve_of

    if output is not None:
        check_output(output)
    network, tokenizer = load_any(str(place), dtype, device, trust_remote_code)
    size = curve_of(network).length if length is None else length
    texts = given or held_out_text(tokenizer, size, count, 0)
    found = run(
        network, data=texts, tokenizer=tokenizer, max_loss=max_loss, length=size, count=count
    )
    out.print(trials_table(found))
    if output is not None:
        save_tuned(network, place, output)
        out.print(f"saved to {escape(str(output))}", highlight=False)


def export(
    model: Annotated[
        Path,
        typer.Argument(help="Directory of a compressed model; for the format hf, a quantized one."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    format: Annotated[
        str,
        typer.Option(
            help="hf: ModelOpt's unified checkpoint. trtllm: that, for TensorRT-LLM's AutoDeploy. onnx: graphs of a "
            "decode step and a prefill chunk. tensorrt: those, and the kernels that `engine build` embeds."
        ),
    ] = "hf",
    chunk: Annotated[
        int | None, typer.Option(help="onnx, tensorrt: tokens of a prefill chunk. [default: 256]")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="onnx, tensorrt: tokens that a list has room for. [default: 4096]"),
    ] = None,
    plugin_free: Annotated[
        bool | None,
        typer.Option("--plugin-free", help="tensorrt: standard ops only, for any GPU."),
    ] = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Write a model for serving; weights of a quantized one are packed."""
    place = check_compressed(model)
    from modelopt_dms.checkpoints.load import load
    from modelopt_dms.config.output_dir import check_output
    from modelopt_dms.config.recipe import load_recipe
    from modelopt_dms.exporters import RECIPE_FILE, check_format
    from modelopt_dms.exporters import export as write

    given = {"chunk": chunk, "max_length": max_length, "plugin_free": plugin_free}
    options = {name: value for name, value in given.items() if value is not None}
    check_format(format, options)
    check_output(output)
    tokenizer = load_tokenizer(str(place), trust_remote_code)
    network = load(place, dtype=dtype.value, device_map=device, trust_remote_code=trust_remote_code)
    recipe = load_recipe(place / RECIPE_FILE) if (place / RECIPE_FILE).is_file() else None
    write(network, output, format, tokenizer=tokenizer, recipe=recipe, **options)
    out.print(f"saved to {escape(str(output))}", highlight=False)
    if format == "tensorrt":
        out.print(f"on the GPU that will run it: modelopt-dms engine build {escape(str(output))}")


def _print_counts(preview: "Preview") -> None:
    from modelopt_dms.evaluation.report import data_table

    out.print(data_table(preview))
