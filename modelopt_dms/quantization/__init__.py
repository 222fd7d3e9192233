# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantization of a model with gates."""
