# SPDX-License-Identifier: Apache-2.0
"""transformers' OpenAI-compatible server around one DMS model: requests one after the other, on one machine."""
