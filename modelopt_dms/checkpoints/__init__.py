# SPDX-License-Identifier: Apache-2.0
"""From a name, a directory or a GGUF file to a plain causal LM."""
