# SPDX-License-Identifier: Apache-2.0
"""Retrofit: teach the gates by distillation from the same model with eviction off."""

from modelopt_dms.train.loop import PreparedRun, RetrofitResult, prepare, retrofit

__all__ = ["PreparedRun", "RetrofitResult", "prepare", "retrofit"]
