# SPDX-License-Identifier: Apache-2.0
"""A directory that TensorRT-LLM's AutoDeploy serves: checkpoint, DMS config, its configuration, and how to start it."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.checkpoints.unified_hf import PACKED_FILE
from modelopt_dms.checkpoints.written import check_written
from modelopt_dms.config.output_dir import atomic_dir, check_output
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.exporters.hf import ExportError, mark_for_engines, write_companions, write_packed
from modelopt_dms.exporters.trtllm.backend import ACCEPTED, FACTORY, NAME, TRANSFORMERS
from modelopt_dms.exporters.trtllm.graph import RATIO_FIELD, check_servable
from modelopt_dms.kvcache.kv_format import kv_formats
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.quantization.apply import quantizes

CONFIG_FILE = "dms_autodeploy.yaml"
PLUGIN = "modelopt_dms_plugin"
WEIGHTS = ("FP8", "NVFP4", None)  # what AutoDeploy reads of what ModelOpt packs
BATCH = 8
LONGEST = 8192

_PLUGIN = '''"""Imported by trtllm-serve (--custom_module_dirs): tells AutoDeploy about DMS."""

from modelopt_dms.exporters.trtllm import register

register()
'''

_README = """\
# A DMS model for TensorRT-LLM

Written by `modelopt-dms export --format trtllm`. Needs TensorRT-LLM {accepted}, modelopt_dms and transformers
{transformers} in one environment, and one GPU. **This path has never run on a real TensorRT-LLM**; modelopt_dms'
docs/trtllm.md says what was checked instead. Versions that do not fit are refused with a message.

    TLLM_WORKER_USE_SINGLE_PROCESS=1 trtllm-serve {place} --backend _autodeploy \\
        --config {place}/{config} --custom_module_dirs {place}/{plugin}

`{place}` is this directory. The environment variable keeps the worker in the process that has imported the plugin.

* `max_batch_size` and `max_seq_len` in `{config}` decide how much memory the KV cache gets when the server starts.
* `{ratio}` (under `model_kwargs`) makes it that many times smaller. At 1.0 pages cannot run out. Up to the compression
  ratio that your texts reach, the saving is yours; where texts evict less, pages run out, which is an error.
* Other serving engines, and `modelopt_dms.load`, read this directory as an ordinary {kind} checkpoint.
"""


def export_trtllm(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Write a model for TensorRT-LLM's AutoDeploy; `modelopt_dms.load` reads it back.

    Args:
        model: compressed; quantized (FP8 or NVFP4 weights, FP8 KV cache) or not. It is not changed.
        output_dir: new or empty.
        tokenizer: written along with the model.
        recipe: written along with the model.

    Raises:
        ExportError: a model that the backend cannot serve.
        OutputError: the directory cannot be written to without losing something.
    """
    check_servable(model)
    _check_cache(model)
    target = check_output(output_dir)
    packed = quantizes(model)
    with atomic_dir(target) as place:
        if packed:
            write_packed(model, place)
            _finish_quantization(place / PACKED_FILE)
        else:
            model.save_pretrained(place)
            check_written(place, model)
            mark_for_engines(place)
        write_companions(place, tokenizer, recipe)
        _change(place / "config.json", **{RATIO_FIELD: 1.0})
        _write_serving(place, model, "unified" if packed else "Hugging Face")
    return target


def _check_cache(model: PreTrainedModel) -> None:
    for name, module in dms_modules(model).items():
        for kind, form in zip(("keys", "values"), kv_formats(module), strict=True):
            if form is not None and (form.name != "fp8" or form.amax is None or len(form.amax) > 1):
                scale = "no" if form.amax is None else len(form.amax)
                raise ExportError(
                    f"{name} stores {kind} as {form.name} with {scale} calibrated scales; format='trtllm' takes FP8 "
                    "with one, or the model's own dtype"
                )


def _finish_quantization(path: Path) -> None:
    """Leave the gates out by name, and refuse weights that AutoDeploy cannot read."""
    section = json.loads(path.read_text(encoding="utf-8"))["quantization"]
    if section.get("quant_algo") not in WEIGHTS:
        raise ExportError(
            f"quant_algo={section['quant_algo']!r} cannot be served by format='trtllm'; accepted: "
            f"{', '.join(str(x) for x in WEIGHTS)} (None: not quantized)"
        )
    section["exclude_modules"] = [*section.get("exclude_modules", ()), "*.dms_gate*"]
    section.setdefault("group_size", None)
    _change(path, quantization=section)


def _change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _write_serving(place: Path, model: PreTrainedModel, kind: str) -> None:
    longest = min(getattr(model.config, "max_position_embeddings", LONGEST), LONGEST)
    config = {
        "model_factory": FACTORY,
        "attn_backend": NAME,
        # Capture in CUDA graphs has not been tried.
        "compile_backend": "torch-simple",
        "disable_overlap_scheduler": True,
        "world_size": 1,
        "max_batch_size": BATCH,
        "max_seq_len": longest,
        "max_num_tokens": max(longest, BATCH),
        # No layer uses the engine's own cache; its size only says how many tokens may be let in.
        "kv_cache_config": {"enable_block_reuse": False, "max_tokens": BATCH * longest},
        "model_kwargs": {RATIO_FIELD: 1.0},
    }
    (place / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (place / PLUGIN).mkdir()
    (place / PLUGIN / "__init__.py").write_text(_PLUGIN, encoding="utf-8")
    text = _README.format(
        accepted=ACCEPTED,
        transformers=TRANSFORMERS,
        place="DIR",
        config=CONFIG_FILE,
        plugin=PLUGIN,
        ratio=RATIO_FIELD,
        kind=kind,
    )
    (place / "README.md").write_text(text, encoding="utf-8")
