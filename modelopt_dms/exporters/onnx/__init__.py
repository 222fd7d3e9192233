# SPDX-License-Identifier: Apache-2.0
"""A DMS model as ONNX graphs: a decode step and a prefill chunk, with the KV cache as their inputs and outputs."""
