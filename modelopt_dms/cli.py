# SPDX-License-Identifier: Apache-2.0
"""The command line, one function a command. Heavy imports only when needed."""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modelopt_dms import processes
from modelopt_dms.shelf import embedded_model_dir, list_recipes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
DEBUG = "MODELOPT_DMS_TRACEBACK"

app = typer.Typer(
    help="Teach a causal LM what its KV cache may forget (Dynamic Memory Sparsification).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List the shipped recipes, or show one in full.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)
out, err = Console(), Console(stderr=True)


class Dtype(str, Enum):
    """Dtypes a base model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArg = Annotated[
    str, typer.Argument(help=f"Directory, hub id, or '{EMBEDDED}' for the carried model.")
]
DirArg = Annotated[
    Path, typer.Argument(help="Directory of a model; a compressed one, or any causal LM.")
]
DataOpt = Annotated[
    list[Path] | None,
    typer.Option("--data", help=".jsonl, .txt or .parquet file; may be repeated."),
]
BlendOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help=".jsonl, .txt or .parquet file; may be repeated. FILE:0.7 gives it 70 % of the tokens.",
    ),
]
ChangesOpt = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the recipe, e.g. dms.window=512; may be repeated."),
]
DtypeOpt = Annotated[Dtype, typer.Option(help="Dtype of the base model.")]
DeviceOpt = Annotated[
    str | None, typer.Option(help="Device or device_map, for example 'cuda' or 'auto'.")
]
RatioOpt = Annotated[
    float | None,
    typer.Option("--cr", help="Compression ratio to run at, on the curve that the model carries."),
]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]


@app.command()
def compress(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file.")] = "dms_cr4",
    data: BlendOpt = None,
    changes: ChangesOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted run in OUTPUT.")] = True,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Retrofit MODEL so that its KV cache forgets, and save it to OUTPUT."""
    from modelopt_dms.flow import OURS, SUMMARY_FILE
    from modelopt_dms.flow import compress as run
    from modelopt_dms.output import check_output
    from modelopt_dms.recipe import load_recipe
    from modelopt_dms.report import data_table

    chosen = load_recipe(recipe, changes or [])
    check_output(output, OURS)
    if data is None and model != EMBEDDED:
        raise ValueError(
            "--data is missing: a .jsonl, .txt or .parquet file with text like the model will serve"
        )
    given = _data(data)
    network, tokenizer = _load_base(model, dtype, device, trust_remote_code)
    run(
        network,
        chosen,
        tokenizer=tokenizer,
        data=given or _embedded_documents(tokenizer, chosen),
        output_dir=output,
        resume=resume,
        on_data=(lambda preview: out.print(data_table(preview))) if given else None,
    )
    if not processes.is_main():
        return
    out.print(f"saved to {escape(str(output))}", highlight=False)
    for stage, summary in json.loads((output / SUMMARY_FILE).read_text()).items():
        out.print(
            "{stage}, on held-out samples of {sequence_length} tokens: compression ratio {compression_ratio:.2f} "
            "(recipe: {target_cr:g}), KL from the full cache {kl:.4f} nats a token; {seconds:.0f} s".format(
                stage=stage, **summary
            ),
            highlight=False,
        )


@app.command()
def preview(
    tokenizer: Annotated[
        str,
        typer.Option(
            help=f"Directory or hub id of a tokenizer, or of its model; '{EMBEDDED}' for the carried one's."
        ),
    ],
    data: BlendOpt = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file.")] = "dms_cr4",
    changes: ChangesOpt = None,
    count_all: Annotated[
        bool, typer.Option("--all", help="Count all documents, not only those that a run reads.")
    ] = False,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Count what a retrofit would read and visit, and show how its data begin."""
    from modelopt_dms.previews import preview as count
    from modelopt_dms.recipe import load_recipe
    from modelopt_dms.report import data_table, printable

    chosen = load_recipe(recipe, changes or [])
    given = _data(data)
    if not given:
        raise ValueError("--data is missing: the .jsonl, .txt or .parquet files to count")
    words = _load_tokenizer(tokenizer, trust_remote_code)
    found = count(given, chosen, tokenizer=words, count_all=count_all)
    out.print(data_table(found))
    for source in found.sources:
        out.print(f"\n[bold]{escape(printable(source.name))}[/bold] begins:", highlight=False)
        out.print(printable(source.excerpt), markup=False, highlight=False)


@app.command()
def traces(
    model: ModelArg,
    prompts: Annotated[
        list[Path],
        typer.Option("--prompts", help=".jsonl, .txt or .parquet file; may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl file for the result.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of traces; by default one a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a trace, at most.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[
        float, typer.Option(help="Sample from tokens that hold this probability.")
    ] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts continued together.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Have MODEL itself, with eviction off, continue prompts: data for a retrofit. Goes on if interrupted."""
    from modelopt_dms.data import tokenize_prompts
    from modelopt_dms.traces import Sampling, check_traces_output, generate_traces

    sampling = Sampling(max_new_tokens, temperature, top_p, batch_size, seed)
    check_traces_output(output)
    _check_files(prompts, "--prompts")
    # Of the model nothing but its tokenizer is loaded before the prompts are known to be usable.
    starts = tokenize_prompts(prompts, _load_tokenizer(model, trust_remote_code), count)
    network, tokenizer = _load_any(Path(model), dtype, device, trust_remote_code)
    generate_traces(network, starts, tokenizer, output, sampling=sampling)
    out.print(f"saved to {escape(str(output))}", highlight=False)


@app.command()
def generate(
    model: DirArg,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show what the KV cache held at the end.")
    ] = False,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Continue a prompt, streaming."""
    from transformers import TextStreamer, set_seed

    from modelopt_dms.cache import kv_stats

    network, tokenizer = _load_any(model, dtype, device, trust_remote_code)
    _set_ratio(network, cr)
    text = sys.stdin.read() if prompt == "-" else prompt
    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        set_seed(seed)
        sampling["temperature"] = temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    if stats:
        out.print(str(kv_stats(network)), highlight=False)


@app.command("eval")
def evaluate(
    model: DirArg,
    data: DataOpt = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="recall, tracking, arithmetic, text; comma-separated. All, unless --data is given."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = "512,1024,2048",
    count: Annotated[int, typer.Option(min=1, help="Samples per task and length.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows here.")
    ] = None,
    cr: RatioOpt = None,
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Score a model through its physical KV cache: long-memory tasks, and perplexity on text."""
    from modelopt_dms.evaluation import score
    from modelopt_dms.evaluation.files import score_files
    from modelopt_dms.report import results_table, write_json

    _check_files(data or [])
    sizes = [_length(x) for x in lengths.split(",")]
    network, tokenizer = _load_any(model, dtype, device, trust_remote_code)
    _set_ratio(network, cr)
    rows: list[dict[str, Any]] = []
    if data:
        rows += score_files(network, tokenizer, data, sizes, count)
    if tasks is not None or not data:
        names = tasks.split(",") if tasks else score.EVALUATIONS
        rows += score.evaluate(network, tokenizer, names, sizes, count, seed)
    if json_file is not None:
        write_json(json_file, rows)
    out.print(results_table(rows))


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed model.")],
    max_loss: Annotated[
        float,
        typer.Option(min=0.0, help="Percent by which perplexity may rise above the full cache's."),
    ] = 0.5,
    data: BlendOpt = None,
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
    from modelopt_dms.compression import curve_of
    from modelopt_dms.evaluation.tasks import held_out_text
    from modelopt_dms.evaluation.tuning import tune as run
    from modelopt_dms.exporters.tuned import save_tuned
    from modelopt_dms.output import check_output

    given = _data(data)
    if output is not None:
        check_output(output)
    network, tokenizer = _load_any(model, dtype, device, trust_remote_code)
    size = curve_of(network).length if length is None else length
    texts = given or held_out_text(tokenizer, size, count, 0)
    found = run(
        network, data=texts, tokenizer=tokenizer, max_loss=max_loss, length=size, count=count
    )
    table = Table(
        "compression ratio", "perplexity", "loss", title=f"{found.samples} samples of {size} tokens"
    )
    table.add_row("1.00", f"{found.full_perplexity:.3f}", "")
    for trial in sorted(found.trials, key=lambda x: x.compression_ratio):
        mark = "  <- chosen" if trial == found.chosen else ""
        table.add_row(
            f"{trial.compression_ratio:.2f}", f"{trial.perplexity:.3f}", f"{trial.loss:.2f} %{mark}"
        )
    out.print(table)
    if output is not None:
        save_tuned(network, model, output)
        out.print(f"saved to {escape(str(output))}", highlight=False)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed, quantized model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    format: Annotated[str, typer.Option(help="hf: ModelOpt's unified checkpoint.")] = "hf",
    dtype: DtypeOpt = Dtype.auto,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Write a quantized model for serving, weights packed."""
    from transformers import AutoTokenizer

    from modelopt_dms.exporters import RECIPE_FILE
    from modelopt_dms.exporters import export as write
    from modelopt_dms.loading import load
    from modelopt_dms.output import check_output
    from modelopt_dms.recipe import load_recipe

    _quiet_loading()
    check_output(output)
    network = load(model, dtype=dtype.value, device_map=device, trust_remote_code=trust_remote_code)
    recipe = load_recipe(model / RECIPE_FILE) if (model / RECIPE_FILE).is_file() else None
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    write(network, output, format, tokenizer=tokenizer, recipe=recipe)
    out.print(f"saved to {escape(str(output))}", highlight=False)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        table = Table("recipe", "what you get")
        for name, description in list_recipes().items():
            table.add_row(name, description)
        out.print(table)
        out.print(
            "ModelOpt's own PTQ recipes work, too: general/ptq/fp8_default-kv_fp8 and others. "
            "`recipes show NAME` prints one in full.",
            highlight=False,
        )


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change it, e.g. dms.window=512.")
    ] = None,
) -> None:
    """Print a recipe in full, imports and defaults resolved."""
    from modelopt_dms.recipe import load_recipe, recipe_to_yaml

    out.print(
        recipe_to_yaml(load_recipe(name, changes or [])), end="", highlight=False, markup=False
    )


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for an editor."""
    from modelopt_dms.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


def _load_base(
    name: str, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet_loading()
    path = str(embedded_model_dir()) if name == EMBEDDED else name
    _check_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype.value, device_map=device, trust_remote_code=trust
    )
    return model.eval(), tokenizer


def _load_tokenizer(name: str, trust: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    _quiet_loading()
    path = str(embedded_model_dir()) if name == EMBEDDED else name
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, trust_remote_code=trust
    )
    return tokenizer


def _load_any(
    path: Path, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A compressed model, or a plain one to compare it with."""
    _quiet_loading()
    from transformers import AutoConfig, AutoTokenizer

    from modelopt_dms.loading import load

    name = str(embedded_model_dir()) if str(path) == EMBEDDED else str(path)
    _check_model_dir(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    if not any(hasattr(config, x) for x in ("dms_config", "dms_quantization", "dms_window_size")):
        return _load_base(name, dtype, device, trust)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    return load(name, dtype=dtype.value, device_map=device, trust_remote_code=trust), tokenizer


def _set_ratio(model: "PreTrainedModel", cr: float | None) -> None:
    if cr is not None:
        from modelopt_dms.compression import set_compression

        set_compression(model, cr)


def _quiet_loading() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _embedded_documents(tokenizer: "PreTrainedTokenizerBase", recipe: Any) -> list[list[int]]:
    """The embedded model's own kind of text, enough for the recipe."""
    from modelopt_dms.evaluation.tasks import training_documents

    retrofit, calibrate, quantize = recipe.retrofit, recipe.calibrate, recipe.quantize
    counts, lengths = [0], [8]
    if retrofit is not None:
        micro_steps = retrofit.steps * retrofit.gradient_accumulation_steps
        visits = micro_steps * retrofit.batch_size * processes.count()
        counts.append(min(visits, 2048) + 32)
        lengths.append(retrofit.sequence_length)
    if calibrate is not None:
        counts.append(calibrate.samples + calibrate.held_out)
        lengths.append(calibrate.sample_length)
    if quantize is not None:
        counts.append(quantize.samples)
        lengths.append(quantize.sample_length)
    seed = 0 if retrofit is None else retrofit.seed
    return [x.ids for x in training_documents(tokenizer, max(counts), max(lengths), seed)]


def _check_model_dir(path: str) -> None:
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json; expected the directory of a Hugging Face model"
        )


def _data(arguments: list[str] | None) -> Any:
    """What --data name, checked as far as names go; None if there are none."""
    from modelopt_dms.data import Blend, parse_data

    found = parse_data(arguments or [])
    sources = [source for source, _ in found.parts] if isinstance(found, Blend) else [found]
    for source in sources:
        _check_files([source] if isinstance(source, Path) else source)
    return found or None


def _check_files(paths: list[Path], option: str = "--data") -> None:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{option} {path} does not exist or is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"{option} {path} is empty")


def _length(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 64:
        raise ValueError(f"--lengths: {text!r} must be a whole number of at least 64 tokens")
    return int(text)


def main() -> None:
    """Run the command line; an expected error is one line, not a traceback."""
    import warnings

    # We test this combination ourselves; ModelOpt's own list of versions is older.
    warnings.filterwarnings(
        "ignore", message="transformers .* is not tested with current version of modelopt"
    )
    try:
        app()
    except KeyboardInterrupt:
        err.print("[red]interrupted[/red]; the same command goes on from the newest checkpoint")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get(DEBUG):
            raise
        err.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
