# SPDX-License-Identifier: Apache-2.0
"""A DMS directory -> vLLM's settings, or an error that names what is not supported."""

from dataclasses import dataclass
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils import config as vllm_parsers

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.modeling.config_marks import unmark
from modelopt_dms.serving.vllm.names import (
    ARCHITECTURES,
    CONNECTOR,
    DENSE,
    FP8_CACHES,
    LOG,
    MIXTURE,
    OPTIONS,
)
from modelopt_dms.serving.vllm.platform import settle_platform

logger = init_logger(LOG)


@dataclass(frozen=True)
class ModelRules:
    """What `dms_config` of a directory says, as far as serving needs it.

    Attributes:
        gate: "adapter" or "residual".
        rows: "head" or "layer": who shares a decision.
        window: delay window.
        shift: 1 if a token's decision governs the token before it, else 0.
        protect_first: tokens at the start that are never evicted.
        scale: of the logits.
        offset: of the logits.
        evict: False: the gates are there, and nothing is evicted.
        target_cr: compression ratio that the model was made for.
    """

    gate: str
    rows: str
    window: int
    shift: int
    protect_first: int
    scale: float
    offset: float
    evict: bool
    target_cr: float

    @staticmethod
    def of(hf_config: Any) -> "ModelRules":
        """From a model's config; the fields were checked when it was made.

        Raises:
            ValueError: something that is not served here.
        """
        fields = hf_config.dms_config
        if fields["gate"] not in ("adapter", "residual"):
            raise ValueError(
                f"dms_config.gate={fields['gate']!r} is not served on vLLM, which fuses the query projection; accepted "
                "here: 'adapter', 'residual'"
            )
        return ModelRules(
            fields["gate"],
            fields["granularity"],
            fields["window"],
            int(fields["decision_shift"]),
            fields["protect_first"],
            fields["scale"],
            fields["offset"],
            fields["evict"],
            fields["target_cr"],
        )

    @property
    def evicted_share(self) -> float:
        """Share of the evictable tokens that was to be evicted."""
        return 1.0 - 1.0 / self.target_cr if self.evict else 0.0


class DMSConfigParser(vllm_parsers.HFConfigParser):
    """As vLLM's; of a DMS directory, the architecture is ours."""

    def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The dict and the config of a model."""
        fields, config = super().parse(*args, **kwargs)
        if "dms_config" not in fields:
            return fields, config
        if "dms_quantization" in fields:
            raise ValueError(
                "this DMS model is quantized (dms_quantization in its config.json), which the vLLM plug-in does not "
                "read yet; serve the model that `compress` writes without a quantize section"
            )
        unmark(config)
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        mixture = any(getattr(config.get_text_config(), x, 0) for x in experts)
        config.dms_architectures = config.architectures
        config.architectures = [MIXTURE if mixture else DENSE]
        # vLLM would look for the quantization that guards the directory elsewhere.
        return {k: v for k, v in fields.items() if k != "quantization_config"}, config


class DMSSettings(VerifyAndUpdateConfig):
    """What vLLM must be set to for a DMS model."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what does not work, and set the rest.

        Raises:
            ValueError: a setting that does not work, with the ones that do.
        """
        rules = ModelRules.of(vllm_config.model_config.hf_config)
        settle_platform(vllm_config)
        _refuse(vllm_config)
        options_of(vllm_config)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            logger.info(
                "Prefix caching is off: what a DMS model evicts depends on all tokens of a request, and blocks are "
                "not shared."
            )
            cache.enable_prefix_caching = False
        cache.block_size, cache.user_specified_block_size = PAGE, True
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path="modelopt_dms.serving.vllm.connector",
            kv_role="kv_both",
        )
        logger.info("Serving a DMS model: %s", rules)


def options_of(vllm_config: VllmConfig) -> dict[str, int]:
    """What stands below `modelopt_dms` in --additional-config.

    Raises:
        ValueError: an unknown key, or a value that is none.
    """
    given = vllm_config.additional_config
    found = given.get(OPTIONS, {}) if isinstance(given, dict) else {}
    unknown = set(found) - {"max_request_blocks"}
    if unknown:
        raise ValueError(
            f"additional_config.{OPTIONS} has {sorted(unknown)}; accepted: 'max_request_blocks' (blocks of {PAGE} "
            "tokens that one request may hold before its oldest tokens are evicted by force)"
        )
    blocks = found.get("max_request_blocks")
    if blocks is not None and (
        not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1
    ):
        raise ValueError(
            f"additional_config.{OPTIONS}.max_request_blocks={blocks!r} must be a whole number of at least 1"
        )
    return dict(found)


def _refuse(vllm_config: VllmConfig) -> None:
    """Raise ValueError where something is asked for that would compute something else, or break."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if cache.user_specified_block_size and cache.block_size != PAGE:
        raise ValueError(f"block_size={cache.block_size}: DMS models have blocks of {PAGE} tokens")
    if cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32", *FP8_CACHES):
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r}: the KV cache of a DMS model has the model's dtype here, or FP8 "
            "(e4m3) without a scale; accepted: 'auto', 'fp8', 'fp8_e4m3'"
        )
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            f"kv_transfer_config names {vllm_config.kv_transfer_config.kv_connector!r}: a DMS model needs the KV "
            "connector for itself, and its blocks mean nothing to another engine"
        )
    if cache.kv_offloading_size is not None:
        raise ValueError(
            f"kv_offloading_size={cache.kv_offloading_size} is not supported for DMS models, whose blocks mean nothing "
            "without their slabs; leave it out"
        )
    if parallel.use_ubatching:
        raise ValueError(
            "dual batch overlap (enable_dbo, ubatch_size) is not supported for DMS models; leave it out"
        )
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method != "ngram":
        raise ValueError(
            f"speculative_config.method={speculation.method!r} is not supported with a DMS model: a draft model would "
            "need a KV cache of its own; accepted: 'ngram'"
        )
    if vllm_config.num_speculative_tokens >= PAGE:
        raise ValueError(
            f"speculative_config.num_speculative_tokens={vllm_config.num_speculative_tokens} must be below {PAGE} with "
            "a DMS model, the tokens that even a request at its limit of blocks has room for"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "context parallelism is not supported for DMS models; use tensor or pipeline parallelism"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "LoRA adapters are not supported for DMS models: the gates were trained without them"
        )


def register_configs() -> None:
    """Tell vLLM about the parser and the settings."""
    # The public way of registering warns that "hf" is there already; it is, and ours extends it.
    vllm_parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = DMSConfigParser
    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = DMSSettings
