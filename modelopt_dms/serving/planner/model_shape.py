# SPDX-License-Identifier: Apache-2.0
"""A config.json -> the numbers that memory and speed depend on. Reads no weights, imports no torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from modelopt_dms.checkpoints.base import EMBEDDED, locate
from modelopt_dms.checkpoints.fetch import KNOWN
from modelopt_dms.checkpoints.gguf import gguf_file
from modelopt_dms.config.bundled import suggestion
from modelopt_dms.serving.planner.gguf_config import config_of_gguf
from modelopt_dms.serving.planner.saved_shift import saved_shift

# Decoders of this build: q, k, v, o, a gated MLP or experts of it, two norms a layer.
_DENSE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_EXPERTS = ("qwen3_moe", "mixtral")
SUPPORTED = _DENSE + _EXPERTS
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class PlanError(ValueError):
    """A plan that cannot be made; the message names what was given and what is accepted."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers.

    Attributes:
        name: as a reader knows it.
        layers: with full attention, which DMS converts.
        sliding: windows in tokens of the other attention layers.
        query_heads: H.
        kv_heads: K.
        head_dim: D, of keys and of values.
        linears: parameters of each kind of linear layer that every token passes, all layers together, by module name.
        experts: likewise, of the routed experts.
        experts_total: routed experts a layer; 1 without.
        experts_active: of them, those that a token passes.
        embedding: parameters of the embedding table.
        head: parameters of the output layer; as many as the embedding's if it is the same tensor.
        tied: whether it is.
        others: parameters of norms, biases and routers.
        itemsize: bytes of a number in the model's own dtype.
        max_length: tokens that it was made for, if known.
        dms: the fields of config.json that a DMS model has: dms_config, dms_curve, dms_quantization.
        shift: how far the gates of a DMS model are set from their curve's shift 0 (see `saved_shift`).
    """

    name: str
    layers: int
    sliding: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    linears: dict[str, int]
    experts: dict[str, int]
    experts_total: int
    experts_active: int
    embedding: int
    head: int
    tied: bool
    others: int
    itemsize: int
    max_length: int | None
    dms: dict[str, Any]
    shift: float = 0.0

    @property
    def parameters(self) -> int:
        """All of them."""
        matrices = sum(self.linears.values()) + sum(self.experts.values())
        return matrices + self.embedding + (0 if self.tied else self.head) + self.others


def shipped_models() -> dict[str, dict[str, Any]]:
    """The table of common models: fields of their config.json by name."""
    text = (Path(__file__).parent / "models.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def shape_of(model: str) -> ModelShape:
    """The shape of a model.

    Args:
        model: a config.json, a directory that holds one, a .gguf file, "embedded", a fetched model ("smollm2"), a name
            of the table (`shipped_models`, with or without its owner), or a hub id whose config is in the local cache.

    Raises:
        PlanError: none of these, or a build that the plan does not know.
        ValueError: a known model that is not fetched yet, or a GGUF file that cannot be read.
    """
    name, config = _config(model)
    try:
        found = _shape(name, config)
    except KeyError as error:
        raise PlanError(f"{model}: its config has no {error.args[0]}") from None
    if found.dms.get("dms_curve") and Path(model).is_dir():
        return replace(found, shift=saved_shift(Path(model), found.dms["dms_curve"]))
    return found


def _config(model: str) -> tuple[str, dict[str, Any]]:
    path = Path(locate(model))
    if (file := gguf_file(path)) is not None:
        return (model if model in KNOWN else file.stem), config_of_gguf(file)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise PlanError(
                f"{model} has no config.json; expected a model's directory, its config, or a .gguf file"
            )
    if path.is_file():
        return (path.parent.name if path.name == "config.json" else path.stem), _read(path)
    table = shipped_models()
    known = {x.lower(): x for x in table}
    short = known.get(model.rsplit("/", 1)[-1].lower())
    if short is not None:
        return short, table[short]
    if (cached := _hub_config(model)) is not None:
        return model, _read(cached)
    raise PlanError(
        f"MODEL={model!r} is no config.json, no directory with one, no .gguf file, and no hub id whose config is in "
        f"the local cache{suggestion(model, [*table, EMBEDDED, *KNOWN])}; shipped: {', '.join([*table, EMBEDDED])}; "
        f"known to `fetch`: {', '.join(KNOWN)}"
    )


def _hub_config(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _shape(name: str, config: dict[str, Any]) -> ModelShape:
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise PlanError(
            f"{name}: model_type={kind!r} is not planned for; accepted: {', '.join(SUPPORTED)}"
        )
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    H = config["num_attention_heads"]
    K = config.get("num_key_value_heads") or H
    D = config.get("head_dim") or hidden // H
    attention = {"q_proj": H * D, "k_proj": K * D, "v_proj": K * D, "o_proj": H * D}
    linears = {f"self_attn.{x}": layers * hidden * n for x, n in attention.items()}
    biases = (H + 2 * K) * D if kind == "qwen2" or config.get("attention_bias") else 0
    if config.get("attention_bias"):
        biases += hidden
    norms = 2 * hidden + (2 * D if kind in ("qwen3", "qwen3_moe") else 0)
    others = layers * (biases + norms) + hidden
    if config.get("mlp_bias"):
        others += layers * (2 * config["intermediate_size"] + hidden)
    experts, total, active = {}, 1, 1
    if kind in _EXPERTS:
        total = config.get("num_experts") or config["num_local_experts"]
        active = config["num_experts_per_tok"]
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        experts = {
            f"mlp.experts.{x}_proj": layers * total * hidden * width for x in ("gate", "up", "down")
        }
        others += layers * hidden * total
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise PlanError(
                f"{name}: layers without experts between layers with experts are not planned for"
            )
    else:
        width = config["intermediate_size"]
        linears |= {f"mlp.{x}_proj": layers * hidden * width for x in ("gate", "up", "down")}
    sliding = _sliding(config, layers)
    tied = bool(config.get("tie_word_embeddings", kind == "smollm3"))
    return ModelShape(
        name=name,
        layers=layers - len(sliding),
        sliding=sliding,
        query_heads=H,
        kv_heads=K,
        head_dim=D,
        linears=linears,
        experts=experts,
        experts_total=total,
        experts_active=active,
        embedding=config["vocab_size"] * hidden,
        head=config["vocab_size"] * hidden,
        tied=tied,
        others=others,
        itemsize=_ITEMSIZE.get(str(config.get("dtype") or config.get("torch_dtype")), 2),
        max_length=config.get("max_position_embeddings"),
        dms={
            x: config[x] for x in ("dms_config", "dms_curve", "dms_quantization") if config.get(x)
        },
    )


def _sliding(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The windows of layers that do not attend to everything."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        # Of these, Qwen says which layers have one; Mistral's have all.
        kinds = ["full_attention"] * min(layers, config.get("max_window_layers", 0))
        kinds += ["sliding_attention"] * (layers - len(kinds))
    return (window,) * sum(x != "full_attention" for x in kinds)
