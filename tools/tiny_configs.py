# SPDX-License-Identifier: Apache-2.0
"""Any architecture of transformers, with random weights and a few thousand parameters. Knows nothing about DMS.

The default config of an architecture is shrunk by the names of its fields: sizes become small, lists with an entry a
layer keep one layer of every kind. What that does not make consistent stands in FIXES.
"""

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# Ids from here on are special tokens: images, videos, their borders.
TEXT_VOCABULARY = 64
VOCABULARY = 128
HIDDEN = 32
# More kinds of layers than this are not all kept.
MOST_LAYERS = 4

# By the name that transformers' attribute_map gives a field; the first that matches. None: leave it.
RULES: list[tuple[str, int | float | None]] = [
    (r"chunk_size_(feed_forward|lm_head)|pretraining_tp|seed|num_channels|in_channels", None),
    (r".*vocab_size(_per_layer_input)?|.*_vocab|num_embeddings|codebook_size", VOCABULARY),
    (r"num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(attn|expert|global_attn|full_attention|full_attn).*(period|every_n_layers|interval)", 2),
    (r"_?sliding_window_pattern|interleave_moe_layer_step", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"num_nextn_predict_layers|num_mtp_layers|aligner_num_add_layers", 0),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|global_|residual_)?(n_)?layers?(_per_stack)?", 2),
    (r"depth|resampler_depth|num_blocks|n_layer", 2),
    (r".*(num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups)", 2),
    (r"index_n_heads|.*linear_num_key_heads", 2),
    (r".*(_heads?|n_heads?|heads)", 4),
    (r"qk_nope_head_dim|v_head_dim|nope_head_dim", 8),
    (r"qk_rope_head_dim|rope_head_dim", 4),
    (r"qk_head_dim", 12),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r".*(head_dim|d_head|dim_head|head_size|d_kv|kv_channels|key_dim)", 8),
    (r"rotary_dim", 8),
    (r".*lora_rank|.*lowrank|router_hidden_size|adapter_rank|d_rel", 16),
    (r"n_group|topk_group|num_expert_group|.*n_groups|mamba_ngroups|o_groups", 1),
    (r".*(per_tok|per_token|top_k|topk|top_k_experts|moe_k)", 2),
    (r"index_topk", 8),
    (r"(num|n|moe_num)_(routed_|local_)?experts", 4),
    (r".*(state_size|d_state)", 8),
    (r"mamba_d_ssm|d_ssm", 64),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r".*chunk_size|block_size|index_block_size", 8),
    (r"index_(topk|local)_blocks", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size", 6),
    (r"(moe|shared|expert).*(intermediate_size|ffn_hidden_size|_dim)", 16),
    (
        r".*(intermediate|inner|ffn|d_ff|mlp|feed_forward|projection|projector|dff).*(size|dim)?",
        HIDDEN,
    ),
    (
        r".*(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_length)",
        256,
    ),
    (r"(context|position_embedding|original_max_position).*", 256),
    (r"query_pre_attn_scalar", 8),
    (r"image_size|crop_size|resolution", 16),
    (r"(spatial_|temporal_)?patch_size", 4),
    (
        r".*(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_dim|embedding_size|emb_dim|lru_width)",
        HIDDEN,
    ),
    (r"hidden_size_.*|.*_hidden_size|output_dim|width|dim", HIDDEN),
    (r"initializer_range", 0.1),
    (r".*dropout.*|.*pdrop", 0.0),
]
TOKEN_ID = re.compile(
    r".*(token|patch|im_start|im_end|im_newline)_?(id|ids|index|indices)|im_\w+_id"
)
LAYER_INDICES = re.compile(
    r".*(indexes|indices|idxs|layer_ids|_layers|layer_idx|attn_layer_indices|insert_layer_id)"
)

# Fields that have no default in some architectures.
UNSET = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_GLM_V = {"text_config.rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}}

# What the rules leave inconsistent: fields by dotted name.
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    # As its checkpoints since version 0.2: no window.
    "mistral": {"sliding_window": None},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"]},
    # A window that holds the longest sequence, as in Phi-4-mini.
    "phi3": {"sliding_window": 512},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2},
    "nemotron_h_omni": {
        "video_temporal_patch_size": 2,
        "vision_config.video_temporal_patch_size": 2,
    },
    "step3p7": {"text_config.sliding_window": 6},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _MROPE},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "glm46v": _GLM_V,
    "glm4v": _GLM_V,
    "glm4v_moe": _GLM_V,
    "glm_ocr": _GLM_V,
    "glmga": _GLM_V,
    "glm5_next": {"text_config.index_topk": 16, "text_config.index_kpool": 4},
    "mistral4": {"text_config.qk_rope_head_dim": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "gemma3n_text": {"hidden_size_per_layer_input": 8},
}


def architectures() -> dict[str, str]:
    """Class of every architecture that generates text, by model type; multimodal ones are marked ":image"."""
    causal = {
        name: cls if isinstance(cls, str) else cls[0]
        for name, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }
    wrappers = {
        f"{name}:image": cls if isinstance(cls, str) else cls[0]
        for name, cls in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    }
    known = set(causal.values())
    return causal | {name: cls for name, cls in wrappers.items() if cls not in known}


def tiny_config(name: str) -> PreTrainedConfig:
    """The shrunk config of an architecture of `architectures()`."""
    model_type = name.removesuffix(":image")
    default = CONFIG_MAPPING[model_type]()
    fixes = FIXES.get(model_type, {})
    config = _shrunk(default, fixes, _Ids())
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of an architecture of `architectures()` in float32, biases and norms random too."""
    torch.manual_seed(seed)
    cls = getattr(transformers, architectures()[name])
    config = tiny_config(name)
    if not isinstance(config, cls.config_class):
        config = config.get_text_config(decoder=True)  # AutoModelForCausalLM does so too
    model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model.generation_config.update(**special, do_sample=False)
    return model.eval()


class _Ids:
    """Gives every special token an id of its own, the same to fields of the same name."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {"pad": 0, "bos": 1, "_pad": 0}

    def __call__(self, name: str) -> int:
        key = re.sub(r"_(token)?_?(id|index|ids)$", "", name)
        return self.by_name.setdefault(key, TEXT_VOCABULARY + len(self.by_name))


def _shrunk(config: PreTrainedConfig, fixes: dict[str, Any], ids: _Ids) -> PreTrainedConfig:
    data = config.to_dict()
    by_layer = data.pop("per_layer_config", {})
    canonical = {theirs: ours for ours, theirs in getattr(config, "attribute_map", {}).items()}
    kept = _kept_layers(config, data)
    changed: dict[str, Any] = {}
    for key, value in data.items():
        sub = vars(config).get(key)
        if isinstance(sub, PreTrainedConfig):
            prefix = f"{key}."
            inner = {k.removeprefix(prefix): x for k, x in fixes.items() if k.startswith(prefix)}
            changed[key] = _shrunk(sub, inner, ids)
            continue
        new = _small(canonical.get(key, key), value, kept, data, ids)
        if new != value:
            changed[key] = new
    if by_layer:
        own = {index: by_layer.get(f"{i:02d}", {}) for index, i in enumerate(kept)}
        changed["per_layer_config"] = {
            index: {
                key: _small(key, x, kept, {}, ids) * (2 if key == "head_dim" else 1)
                for key, x in fields.items()
            }
            for index, fields in own.items()
            if fields
        }
    changed |= {key: value for key, value in fixes.items() if "." not in key}
    return type(config)(**changed)


def _kept_layers(config: PreTrainedConfig, data: dict[str, Any]) -> list[int]:
    """Indices of the layers to keep: one of every kind, by all lists with an entry a layer."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return [0, 1]
    lists = [x for x in data.values() if isinstance(x, list) and len(x) == count > 2]
    first: dict[str, int] = {}
    for index in range(count if lists else 0):
        first.setdefault(str([x[index] for x in lists]), index)
    kept = list(first.values())[:MOST_LAYERS]
    return sorted(kept + [x for x in range(count) if x not in kept][: 2 - len(kept)])


def _small(name: str, value: Any, kept: list[int], data: dict[str, Any], ids: _Ids) -> Any:
    """The value of a field in the tiny config."""
    if value is None and name in UNSET:
        return UNSET[name]
    if isinstance(value, bool) or value is None:
        return value
    if name.startswith("eos_token"):
        return None
    if TOKEN_ID.fullmatch(name):
        return (
            [ids(f"{name}{i}") for i in range(len(value))] if isinstance(value, list) else ids(name)
        )
    count = next((data[x] for x in ("num_hidden_layers", "n_layer", "num_layers") if x in data), 0)
    if isinstance(value, list):
        if len(value) == count and count > 2:
            return [value[i] for i in kept]
        if LAYER_INDICES.fullmatch(name) and value and all(isinstance(x, int) for x in value):
            return [1]
        return value
    if isinstance(value, dict):
        return _rope(value)
    if not isinstance(value, (int, float)):
        return value
    if LAYER_INDICES.fullmatch(name) and name.endswith("id"):
        return 1
    if name in ("num_hidden_layers", "n_layer", "num_layers"):
        return len(kept)
    if name == "head_dim" and "kv_lora_rank" in data:
        return 4  # transformers: the part of a head that is rotated
    if name == "num_key_value_heads" and "kv_lora_rank" in data:
        return 4
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            fits = size is not None and value not in (0, -1) and type(size) is type(value)
            return size if fits else value
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections of a multimodal rotary embedding must fill half of a head of 8, or of the part that is rotated."""
    if any(isinstance(x, dict) for x in value.values()):
        return {key: _rope(x) if isinstance(x, dict) else x for key, x in value.items()}
    if "mrope_section" not in value:
        return value
    half = int(8 * value.get("partial_rotary_factor", 1.0)) // 2
    count = len(value["mrope_section"])
    return value | {"mrope_section": [half // count + (i < half % count) for i in range(count)]}
