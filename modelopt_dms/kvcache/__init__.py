# SPDX-License-Identifier: Apache-2.0
"""What a layer's cache holds: slot lists on CPUs, pages on devices, and the Hugging Face cache around them."""
