# SPDX-License-Identifier: Apache-2.0
"""The directory that TensorRT engines are built from: graphs, and the kernels of their plugins. Needs no TensorRT."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.config.output_dir import atomic_dir, check_output
from modelopt_dms.config.progress import phase
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.exporters.hf import write_companions
from modelopt_dms.exporters.onnx.describe import model_of
from modelopt_dms.exporters.onnx.export import CHUNK, manifest_of, sizes_of, write_graphs
from modelopt_dms.exporters.tensorrt.kernels import (
    compile_kernels,
    decode_programs,
    layer_shape,
    write_kernels,
)
from modelopt_dms.runtime.manifest import Kernel


def export_tensorrt(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | None = None,
    chunk: int = CHUNK,
    max_length: int | None = None,
    plugin_free: bool = False,
) -> Path:
    """Write what TensorRT engines of a DMS model are built from; `modelopt-dms engine build` builds them on the GPU.

    The graphs are those of `export_onnx`, and onnxruntime runs them as well.

    Args:
        model: compressed, in float16 or bfloat16 unless `plugin_free`; not changed.
        output_dir: new or empty.
        tokenizer: written along with the model.
        recipe: written along with the model.
        chunk: tokens of a prefill chunk.
        max_length: tokens that every list has room for; 4096 or what the model can, unless given.
        plugin_free: standard ops only, for any GPU that TensorRT knows: attention reads all slots that lists can have.

    Raises:
        ExportError: a model or a size that no graph can have, or that there are no kernels for.
        OutputError: the directory cannot be written to without losing something.
    """
    description = model_of(model)
    if not plugin_free:
        layer_shape(description)
    sizes = sizes_of(model, chunk, max_length, 1 if plugin_free else decode_programs(description))
    target = check_output(output_dir)
    with atomic_dir(target) as place:
        written = write_graphs(model, place, description, sizes, plugin_free=plugin_free)
        kernels: tuple[Kernel, ...] = ()
        if written.scoring is not None:
            with phase("compile kernels"):
                made = compile_kernels(
                    description, written.scoring, chunk=chunk, programs=sizes.programs
                )
            kernels = write_kernels(place, made)
        write_companions(place, tokenizer, recipe)
        manifest_of(description, sizes, place, written.phases, kernels, plugin_free).save(place)
    return target
