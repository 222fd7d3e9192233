# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM: a checkpoint that its AutoDeploy serves, and the attention backend that it needs for that."""

__all__ = ["register"]


def register() -> None:
    """Tell the TensorRT-LLM that is installed about DMS; see `backend.register`."""
    from modelopt_dms.exporters.trtllm import backend

    backend.register()
