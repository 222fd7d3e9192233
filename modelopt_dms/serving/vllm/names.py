# SPDX-License-Identifier: Apache-2.0
"""Names and numbers that several parts of the plug-in share. Imports nothing."""

# Of our logger: vLLM shows what is below its own name.
LOG = "vllm.modelopt_dms"
# Of vLLM. The hooks are young: `tests/helpers/vllm_surface.py` looks whether they are as expected.
OLDEST, TOO_NEW = "0.32", "0.34"
DENSE = "ModelOptDMSForCausalLM"
MIXTURE = "ModelOptDMSMoEForCausalLM"
# What a DMS directory's architecture is for vLLM, and our class for it.
ARCHITECTURES = {DENSE: "DMSForCausalLM", MIXTURE: "DMSMoEForCausalLM"}
ATTENTION = "modelopt_dms_vllm"  # transformers' attention function
ATTENTION_OP = "vllm::modelopt_dms_attention"  # what graphs are cut at
CONNECTOR = "DMSConnector"
# Key of vLLM's --additional-config, and what may stand below it.
OPTIONS = "modelopt_dms"
# Of vLLM's --kv-cache-dtype: e4m3 without a scale.
FP8_CACHES = ("fp8", "fp8_e4m3")
