# SPDX-License-Identifier: Apache-2.0
"""GPUs by name, with their published figures."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from modelopt_dms.config.bundled import suggestion
from modelopt_dms.serving.planner.model_shape import PlanError

# Assumed shares of the published figures that large copies and large products reach.
BANDWIDTH_EFFICIENCY = 0.9
FLOPS_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        title: its name in full.
        memory: GB (10^9 bytes).
        bandwidth: GB/s.
        tflops: dense TFLOP/s in tensor cores, by number format.
        capability: compute capability times ten.
        source: where the figures come from.
    """

    title: str
    memory: float
    bandwidth: float
    tflops: dict[str, float]
    capability: int
    source: str

    @property
    def bytes_per_second(self) -> float:
        """What kernels can be expected to move at best."""
        return self.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY

    def flops_per_second(self, number: str) -> float:
        """What large products of this number format can be expected to reach; of bf16 where there are no such cores."""
        return self.tflops.get(number, self.tflops["bf16"]) * 1e12 * FLOPS_EFFICIENCY


def gpus() -> dict[str, Gpu]:
    """The table."""
    text = (Path(__file__).parent / "gpus.yaml").read_text(encoding="utf-8")
    return {name: Gpu(**fields) for name, fields in yaml.safe_load(text).items()}


def gpu_of(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        PlanError: it is not there.
    """
    table = gpus()
    if name.lower() not in table:
        near = suggestion(name.lower(), list(table))
        raise PlanError(f"--gpu {name!r} is not known{near}; accepted: {', '.join(table)}")
    return table[name.lower()]
