# SPDX-License-Identifier: Apache-2.0
"""Gates fitted in closed form to what future queries attend to, and the curve from thresholds to quality."""

from modelopt_dms.calibration.measuring import HeldOut, trace_curve
from modelopt_dms.calibration.run import (
    CalibrationResult,
    PreparedCalibration,
    calibrate,
    prepare_calibration,
)

__all__ = [
    "HeldOut",
    "CalibrationResult",
    "PreparedCalibration",
    "calibrate",
    "prepare_calibration",
    "trace_curve",
]
