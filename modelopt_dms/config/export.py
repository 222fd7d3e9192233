# SPDX-License-Identifier: Apache-2.0
"""The section `export`: what to write besides the compressed model."""

from typing import Literal

from pydantic import Field

from modelopt_dms.config.section import Section


class ExportConfig(Section):
    """What `compress` writes besides the model itself."""

    format: Literal["hf", "onnx", "tensorrt", "trtllm"] = Field(default="hf", title="Export format")
    """'hf': ModelOpt's unified Hugging Face checkpoint, weights packed, for serving engines. 'trtllm': the same, with
    what makes TensorRT-LLM's AutoDeploy serve it. 'onnx': graphs of a decode step and a prefill chunk. 'tensorrt':
    those, and the kernels that TensorRT engines embed.
    """
