# SPDX-License-Identifier: Apache-2.0
"""The directory of an ONNX export: two graphs, their weights once, a manifest, and what a tokenizer needs."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.config import progress
from modelopt_dms.config.output_dir import atomic_dir, check_output
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.hf import write_companions
from modelopt_dms.exporters.onnx.describe import model_of
from modelopt_dms.exporters.onnx.graphs import Sizes, scoring_of, trace
from modelopt_dms.exporters.onnx.weights import FILE as WEIGHTS
from modelopt_dms.exporters.onnx.weights import WeightsFile
from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.runtime.manifest import PHASES, Kernel, Manifest, Model, Phase, sha256

CHUNK = 256
MAX_LENGTH = 4096


def sizes_of(model: PreTrainedModel, chunk: int, max_length: int | None, programs: int) -> Sizes:
    """What is fixed in graphs.

    Raises:
        ExportError: a size that no graph can have.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(MAX_LENGTH, longest or MAX_LENGTH) if max_length is None else max_length
    if chunk < 16 or chunk % 16:
        raise ExportError(f"chunk={chunk} must be a multiple of 16 tokens")
    if length < PAGE:
        raise ExportError(f"max_length={length} must be at least a page of {PAGE} tokens")
    return Sizes(chunk, -(-length // PAGE), programs)


def export_onnx(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | None = None,
    chunk: int = CHUNK,
    max_length: int | None = None,
) -> Path:
    """Write a decode step and a prefill chunk of a DMS model as ONNX graphs, with the KV cache as inputs and outputs.

    Our ops carry reference bodies, so that onnxruntime runs the files as they are: `modelopt-dms engine run`.

    Args:
        model: compressed; not changed.
        output_dir: new or empty.
        tokenizer: written along with the model.
        recipe: written along with the model.
        chunk: tokens of a prefill chunk.
        max_length: tokens that every list has room for; 4096 or what the model can, unless given.

    Raises:
        ExportError: a model or a size that no graph can have.
        OutputError: the directory cannot be written to without losing something.
    """
    description = model_of(model)
    sizes = sizes_of(model, chunk, max_length, programs=1)
    target = check_output(output_dir)
    with atomic_dir(target) as place:
        written = write_graphs(model, place, description, sizes)
        write_companions(place, tokenizer, recipe)
        manifest_of(description, sizes, place, written.phases).save(place)
    return target


@dataclass(frozen=True)
class Written:
    """What `write_graphs` wrote.

    Attributes:
        phases: for the manifest.
        scoring: of all attention; None where nobody asks.
    """

    phases: dict[str, Phase]
    scoring: Scoring | None


def write_graphs(
    model: PreTrainedModel,
    place: Path,
    description: Model,
    sizes: Sizes,
    *,
    plugin_free: bool = False,
) -> Written:
    """Write both graphs and their weights into an empty directory.

    Args:
        model: a DMS model.
        place: the directory.
        description: of the model, see `describe.model_of`.
        sizes: what is fixed in the graphs.
        plugin_free: standard ops only; else ours, with bodies.
    """
    weights = WeightsFile(place)
    phases, scoring = {}, None
    for phase in PHASES:
        with progress.phase(f"trace the {phase} graph ({description.layers} layers)"):
            graph = trace(model, description, sizes, phase, plugin_free)
        if phase == "decode" and not plugin_free:
            scoring = scoring_of(graph.model)
        file = f"{phase}.onnx"
        with progress.phase(f"write the {phase} graph"):
            weights.take(graph.model)
            ir.save(graph.model, place / file)
        outputs = graph.outputs
        if plugin_free:  # nothing is changed in place
            outputs = tuple(replace(x, aliases=None) for x in outputs)
        phases[phase] = Phase(file, graph.inputs, outputs)
    return Written(phases, scoring)


def manifest_of(
    description: Model,
    sizes: Sizes,
    place: Path,
    phases: dict[str, Phase],
    kernels: tuple[Kernel, ...] = (),
    plugin_free: bool = False,
) -> Manifest:
    """The manifest of the directory that `write_graphs` has written."""
    written = [WEIGHTS, *(x.graph for x in phases.values())]
    return Manifest(
        description,
        PAGE,
        sizes.pages_per_list,
        sizes.chunk,
        sizes.programs,
        phases,
        kernels,
        plugin_free,
        made_by={x: version(x) for x in ("modelopt-dms", "torch", "transformers", "onnx")},
        files={x: sha256(place / x) for x in written},
    )
