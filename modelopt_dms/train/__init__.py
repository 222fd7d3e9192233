# SPDX-License-Identifier: Apache-2.0
"""Retrofit: teach the gates by distillation from the same model with eviction off; and the data that feed it."""

from modelopt_dms.train.calibration import calibration_batches
from modelopt_dms.train.loop import PreparedRun, RetrofitResult, prepare, retrofit

__all__ = ["PreparedRun", "RetrofitResult", "calibration_batches", "prepare", "retrofit"]
