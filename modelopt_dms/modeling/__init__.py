# SPDX-License-Identifier: Apache-2.0
"""What touches a transformers model: gates put on, attention, the cache in `generate`, the decode loop."""
