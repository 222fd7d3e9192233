# SPDX-License-Identifier: Apache-2.0
"""Retrofit: teach the gates by distillation from the same model with eviction off."""
