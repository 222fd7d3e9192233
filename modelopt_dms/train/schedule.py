# SPDX-License-Identifier: Apache-2.0
"""Which compression ratio a training step asks for. Knows numbers only."""

import math

import numpy as np


def scheduled_cr(step: int, steps: int, target_cr: float, ramp_fraction: float) -> float:
    """Compression ratio asked for at a step: from 1 at step 0 linearly to `target_cr`, then constant.

    Args:
        step: optimizer steps already taken, 0-based.
        steps: optimizer steps of the whole retrofit.
        target_cr: final compression ratio, >= 1.
        ramp_fraction: share of `steps` over which the ratio rises; 0 asks for all of it at once.
    """
    progress = 1.0 if ramp_fraction == 0.0 else min(1.0, step / (ramp_fraction * steps))
    return 1.0 + (target_cr - 1.0) * progress


def drawn_cr(step: int, lowest: float, highest: float, seed: int) -> float:
    """Compression ratio drawn for a step, uniform in its logarithm: the same on every process and after a resume."""
    part = np.random.default_rng([seed, 3, step]).random()
    return math.exp(math.log(lowest) + part * math.log(highest / lowest))
