# SPDX-License-Identifier: Apache-2.0
"""The mathematics of DMS on plain tensors. Empty: `row_bytes` is read without torch."""
