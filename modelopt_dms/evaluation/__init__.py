# SPDX-License-Identifier: Apache-2.0
"""Measuring what a compressed model can still do."""
