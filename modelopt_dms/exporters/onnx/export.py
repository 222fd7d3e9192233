# SPDX-License-Identifier: Apache-2.0
"""The directory of an ONNX export: two graphs, their weights once, a manifest, and what a tokenizer needs."""

from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.engine.manifest import PHASES, Kernel, Manifest, Phase
from modelopt_dms.exporters.errors import ExportError
from modelopt_dms.exporters.hf import write_companions
from modelopt_dms.exporters.onnx.facts import model_of
from modelopt_dms.exporters.onnx.graphs import Sizes, trace
from modelopt_dms.exporters.onnx.weights import WeightsFile
from modelopt_dms.ops.paged import PAGE
from modelopt_dms.output import check_output, staged
from modelopt_dms.recipe import Recipe

CHUNK = 256
MAX_LENGTH = 4096


def sizes_of(model: PreTrainedModel, chunk: int, max_length: int | None, programs: int) -> Sizes:
    """What is fixed in graphs.

    Raises:
        ExportError: a size that no graph can have.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = max_length or min(MAX_LENGTH, longest or MAX_LENGTH)
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
    model_of(model)
    sizes = sizes_of(model, chunk, max_length, programs=1)
    target = check_output(output_dir)
    with staged(target) as place:
        write_graphs(model, place, sizes)
        write_companions(place, tokenizer, recipe)
    return target


def write_graphs(
    model: PreTrainedModel,
    place: Path,
    sizes: Sizes,
    kernels: tuple[Kernel, ...] = (),
) -> Manifest:
    """Write all into an empty directory.

    Args:
        model: a DMS model.
        place: the directory.
        sizes: what is fixed in the graphs.
        kernels: for the manifest.

    Raises:
        ExportError: a graph cannot hold the model.
    """
    facts = model_of(model)
    weights = WeightsFile(place)
    phases = {}
    for phase in PHASES:
        graph = trace(model, facts, sizes, phase)
        weights.take(graph.model)
        file = f"{phase}.onnx"
        ir.save(graph.model, place / file)
        phases[phase] = Phase(file, graph.inputs, graph.outputs)
    manifest = Manifest(
        facts,
        PAGE,
        sizes.pages_per_list,
        sizes.chunk,
        sizes.programs,
        phases,
        kernels,
        made_by={x: version(x) for x in ("modelopt-dms", "torch", "transformers", "onnx")},
    )
    manifest.save(place)
    return manifest
