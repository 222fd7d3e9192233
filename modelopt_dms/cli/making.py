# SPDX-License-Identifier: Apache-2.0
"""Commands that make a model of another one: compress, tune, export."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelopt_dms.checkpoints.base import EMBEDDED
from modelopt_dms.cli.interrupting import when_interrupted
from modelopt_dms.cli.opening import (
    beyond_model,
    check_compressed,
    check_curve,
    check_device,
    check_model,
    check_original,
    embedded_documents,
    load_any,
    load_base,
    load_tokenizer,
    longest_context,
    open_data,
    stored_dtype,
)
from modelopt_dms.cli.options import (
    STDOUT,
    BlendOpt,
    ChangesOpt,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    FormatOpt,
    JsonOpt,
    ModelArg,
    TrustOpt,
    check_json,
    out,
    say,
    show,
    warn,
)
from modelopt_dms.cli.reporting import report_after_compress
from modelopt_dms.cli.tables import print_table
from modelopt_dms.config import distributed
from modelopt_dms.config.bundled import DEFAULT_RECIPE, DEFAULT_SHORT_RECIPE, list_recipes
from modelopt_dms.config.compression_ratio import is_reachable
from modelopt_dms.config.in_use import in_use
from modelopt_dms.config.output_dir import CALIBRATION_DIR, RETROFIT_DIR, check_output
from modelopt_dms.config.progress import phase
from modelopt_dms.config.recipe_file import check_recipe
from modelopt_dms.config.reporting import check_installed
from modelopt_dms.config.section import LONGEST
from modelopt_dms.exporters import check_format, check_number_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modelopt_dms.config.sections import Sections
    from modelopt_dms.data.dry_run import Preview


def compress(
    model: ModelArg,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for the result. [default: MODEL-RECIPE]"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help=f"Name or YAML file. [default: {DEFAULT_RECIPE}; {DEFAULT_SHORT_RECIPE} for models of short contexts]",
        ),
    ] = None,
    data: BlendOpt = None,
    data_format: FormatOpt = None,
    changes: ChangesOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted run in OUTPUT.")] = True,
    json_file: JsonOpt = None,
    report: Annotated[
        bool, typer.Option(help="Write report.html beside the model: what it forgets of a text.")
    ] = True,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Make of MODEL one whose KV cache forgets, and save it to OUTPUT.

    Without --data it is fitted to the built-in mix of chats, prose and code. Interrupted, the same command goes on.
    """
    place = check_model(model)
    name = recipe or _default_recipe(place)
    sections = check_recipe(name, changes or [])
    check_original(place, sections)
    target = output or Path(f"{Path(model).name.removesuffix('.gguf')}-{Path(name).stem}")
    check_output(target, (CALIBRATION_DIR, RETROFIT_DIR))
    with in_use(target):
        pass  # it is taken when the work begins; whoever has it now is named at once
    check_device(device)
    check_json(json_file)
    if sections.retrofit is not None:
        check_installed(sections.retrofit.report_to)
    if sections.export is not None:
        check_format(sections.export.format, {})
        check_number_format(sections.export.format, stored_dtype(place, dtype))
    given = open_data(data, data_format)
    if distributed.is_main() and json_file != STDOUT:
        for line in (
            *_plan(model, name, sections, target),
            *(_other_recipes(name) if recipe is None else ()),
            *_without_data(model, sections, bool(given)),
        ):
            say(line)
    when_interrupted(lambda: _how_to_go_on(target, resume))
    with phase("start"):
        from modelopt_dms.config.recipe import load_recipe
        from modelopt_dms.pipeline import SUMMARY_FILE
        from modelopt_dms.pipeline import compress as run

    chosen = load_recipe(name, changes or [])
    network, tokenizer = load_base(place, dtype, device, trust_remote_code)
    texts = given or (embedded_documents(tokenizer, chosen) if model == EMBEDDED else None)
    counts = given and distributed.is_main() and json_file != STDOUT
    run(
        network,
        chosen,
        tokenizer=tokenizer,
        data=texts,
        output_dir=target,
        resume=resume,
        on_data=_print_counts if counts else None,
    )
    if distributed.is_main():
        stages = json.loads((target / SUMMARY_FILE).read_text())
        lines = [f"saved to {target}", *_results(network, stages)]
        show({"output": str(target), "recipe": name, "stages": stages}, json_file, *lines)
        _warn_of(network, stages)
        wanted = report and stages and chosen.dms is not None and distributed.count() == 1
        written = report_after_compress(network, tokenizer, target) if wanted else None
        if written is not None and json_file != STDOUT:
            say(written)


def _default_recipe(place: str) -> str:
    """What suits a model that nobody has said a recipe for: calibrated, at contexts that it can read."""
    longest = longest_context(place)
    if longest is None:
        return DEFAULT_RECIPE
    calibrate = check_recipe(DEFAULT_RECIPE).calibrate
    assert calibrate is not None
    return DEFAULT_RECIPE if longest >= calibrate.sample_length else DEFAULT_SHORT_RECIPE


def _other_recipes(name: str) -> list[str]:
    """What else there is, in a line each."""
    shipped = list_recipes()
    shown = (DEFAULT_RECIPE, DEFAULT_SHORT_RECIPE, "calibrated_cr8", "dms_cr8")
    others = [f"  --recipe {x}: {shipped[x]}" for x in shown if x != name]
    return [f"no --recipe: {name}; others (`modelopt-dms recipes` lists all):", *others]


def _plan(model: str, name: str, sections: "Sections", target: Path) -> list[str]:
    """What a run will do, before it starts."""
    steps = ["load the model"]
    if sections.quantize and sections.quantize.order == "before_retrofit":
        steps.append("quantize")
    if (how := sections.calibrate) is not None:
        steps.append(
            f"calibrate gates on {how.samples} samples of {how.sample_length:,} tokens, set thresholds and measure "
            f"{_ratios(sections)} on {how.held_out} others"
        )
    if (train := sections.retrofit) is not None:
        steps.append(
            f"retrofit ({train.train}): {train.steps} steps of "
            f"{train.visits(distributed.count()) // train.steps} samples of {train.sequence_length:,} tokens"
        )
    if sections.quantize and sections.quantize.order == "after_retrofit":
        steps.append("quantize")
    if sections.export is not None:
        steps.append(f"export ({sections.export.format})")
    numbered = [
        f"  {number}. {step}" for number, step in enumerate([*steps, f"save to {target}"], 1)
    ]
    return [f"{model} by {name}: {sections.metadata.description}", *numbered]


def _ratios(sections: "Sections") -> str:
    """How many ratios a calibration measures, and which of its curve are out of reach at the length of its samples."""
    how, dms = sections.calibrate, sections.dms
    assert how is not None and dms is not None
    asked = sorted({*how.curve, dms.target_cr} - {1.0})
    always = (dms.window, how.sample_length, dms.protect_first)
    missed = [f"{x:g}" for x in asked if not is_reachable(x, *always)]
    count = len(asked) - len(missed)
    found = f"{count} ratio{'s' if count != 1 else ''}"
    if not missed:
        return found
    held = dms.window + 1 + dms.protect_first
    return f"{found} (not {', '.join(missed)}: {held} tokens are always held)"


def _without_data(model: str, sections: "Sections", given: bool) -> list[str]:
    """What a model is fitted to that came without data."""
    if given or not (sections.calibrate or sections.retrofit):
        return []
    if model == EMBEDDED:
        return ["no --data: it is fitted to text of its own kind, which is made here"]
    return ["no --data: it is fitted to the built-in mix of chats, prose and code"]


def _how_to_go_on(target: Path, resume: bool) -> str:
    work = [target / CALIBRATION_DIR, target / RETROFIT_DIR]
    if any(x.suffix == ".safetensors" for place in work for x in place.glob("**/*")):
        word = "" if resume else ", without --no-resume,"
        return f"the same command{word} goes on from the newest checkpoint in {target}"
    return "there is no checkpoint yet: the same command starts over"


def _results(network: "PreTrainedModel", stages: dict[str, dict[str, float]]) -> list[str]:
    from modelopt_dms.gates.thresholds import expected_ratios

    lines = [
        "{stage}, on held-out samples of {sequence_length} tokens: compression ratio {compression_ratio:.2f} "
        "(recipe: {target_cr:g}), KL from the full cache {kl:.4f} nats a token; {seconds:.0f} s".format(
            stage=stage, **summary
        )
        for stage, summary in stages.items()
    ]
    curve = getattr(network.config, "dms_curve", None)
    if curve is not None and (expected := expected_ratios(network, curve["length"])) is not None:
        low, high = expected
        lines.append(f"expect {low:.2f} to {high:.2f} of other texts of {curve['length']} tokens")
    return lines


def _warn_of(network: "PreTrainedModel", stages: dict[str, dict[str, float]]) -> None:
    from modelopt_dms.gates.thresholds import missed_ratio

    dms_config = getattr(network.config, "dms_config", None)
    if dms_config is not None and not stages and dms_config["evict"]:
        warn(
            "the gates have learnt nothing yet, so the model evicts nothing; a recipe with calibrate or retrofit does"
        )
    if stages:
        # What the last stage left is what the model does.
        last = [*stages.values()][-1]
        length = int(last["sequence_length"])
        warn(missed_ratio(last["target_cr"], last["compression_ratio"], length))


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
        typer.Option(
            min=64, max=LONGEST, help="Tokens of a sample; by default those of the model's curve."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=LONGEST, help="Samples.")] = 16,
    json_file: JsonOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Find the largest compression ratio within a quality budget on your data."""
    place = check_compressed(model)
    check_curve(place)
    check_device(device)
    check_json(json_file)
    if output is not None:
        check_output(output)
    given = open_data(data, data_format)
    if json_file != STDOUT:
        say(f"{model}: load the model, measure perplexity with the full cache and at 2 to 8 ratios")
    with phase("start"):
        from modelopt_dms.evaluation.report import trials_table
        from modelopt_dms.evaluation.tasks import held_out_text
        from modelopt_dms.evaluation.tuning import tune as run
        from modelopt_dms.exporters.tuned import save_tuned
        from modelopt_dms.gates.thresholds import curve_of

    network, tokenizer = load_any(str(place), dtype, device, trust_remote_code)
    size = curve_of(network).length if length is None else length
    warn(beyond_model(str(place), size, "--length"))
    texts = given or held_out_text(tokenizer, size, count, 0)
    with phase("tune"):
        found = run(
            network, data=texts, tokenizer=tokenizer, max_loss=max_loss, length=size, count=count
        )
    if output is not None:
        save_tuned(network, place, output)
    if found.samples < count:
        warn(
            f"{found.samples} samples of {size} tokens, as there is no more text; {count} were asked for"
        )
    saved = [] if output is None else [f"saved to {output}"]
    show(found.summary(), json_file, trials_table(found), *saved)


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
        int | None,
        typer.Option(
            min=16, max=LONGEST, help="onnx, tensorrt: tokens of a prefill chunk. [default: 256]"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=64,
            max=LONGEST,
            help="onnx, tensorrt: tokens that a list has room for. [default: 4096]",
        ),
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
    given = {"chunk": chunk, "max_length": max_length, "plugin_free": plugin_free}
    options = {name: value for name, value in given.items() if value is not None}
    check_format(format, options)
    check_number_format(format, stored_dtype(str(place), dtype))
    check_output(output)
    check_device(device)
    say(f"{model} -> {output}: load the model, write it as {format}")
    with phase("start"):
        from modelopt_dms.checkpoints.load import load
        from modelopt_dms.config.recipe import load_recipe
        from modelopt_dms.exporters import RECIPE_FILE
        from modelopt_dms.exporters import export as write

    with phase("load"):
        tokenizer = load_tokenizer(str(place), trust_remote_code)
        network = load(
            place, dtype=dtype.value, device_map=device, trust_remote_code=trust_remote_code
        )
    recipe = load_recipe(place / RECIPE_FILE) if (place / RECIPE_FILE).is_file() else None
    write(network, output, format, tokenizer=tokenizer, recipe=recipe, **options)
    say(f"saved to {output}")
    if format == "tensorrt":
        say(f"on the GPU that will run it: modelopt-dms engine build {output}")


def _print_counts(preview: "Preview") -> None:
    from modelopt_dms.evaluation.report import data_table

    print_table(out, data_table(preview))
