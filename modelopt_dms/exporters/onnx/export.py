# SPDX-License-Identifier: Apache-2.0
"""The directory of an ONNX export: two graphs, their weights once, a manifest, and what a tokenizer needs."""

from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.engine.manifest import PHASES, Kernel, Manifest, Phase
from modelopt_dms.exporters.errors import ExportError
from modelopt_dms.exporters.onnx.facts import model_of
from modelopt_dms.exporters.onnx.graphs import Sizes, trace
from modelopt_dms.exporters.onnx.weights import WeightsFile
from modelopt_dms.ops.paged import PAGE

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


def write_graphs(
    model: PreTrainedModel,
    place: Path,
    sizes: Sizes,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kernels: tuple[Kernel, ...] = (),
) -> Manifest:
    """Write all into an empty directory.

    Args:
        model: a DMS model.
        place: the directory.
        sizes: what is fixed in the graphs.
        tokenizer: written along.
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
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
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
