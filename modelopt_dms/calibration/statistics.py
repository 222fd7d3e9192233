# SPDX-License-Identifier: Apache-2.0
"""Ridge regression from running sums: a gate's rows in closed form, however long the stream."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Regression:
    """Sums over tokens of one layer, float64; a last feature of 1 stands for the bias.

    Attributes:
        gram: features times features [C + 1, C + 1].
        cross: features times targets [C + 1, R].
        square: targets squared [R].
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    @classmethod
    def empty(cls, width: int, rows: int, device: torch.device) -> "Regression":
        """Sums over nothing, for C = `width` features and R = `rows` targets."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(width + 1, width + 1), zeros(width + 1, rows), zeros(rows))

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in some tokens: features [N, C], targets [N, R], both float32."""
        ones = features.new_ones(len(features), 1)
        x = torch.cat([features, ones], dim=1)
        self.gram += (x.T @ x).double()
        self.cross += (x.T @ targets).double()
        self.square += targets.double().square().sum(0)

    def solve(self, ridge: float) -> "Fit":
        """The least-squares rows, penalised by `ridge` times the mean square of a feature; the bias is free."""
        count = self.gram[-1, -1]
        penalty = self.square.new_zeros(len(self.gram))
        penalty[:-1] = ridge * self.gram.diagonal()[:-1].mean()
        solution = torch.linalg.solve(self.gram + penalty.diag(), self.cross)  # [C + 1, R]
        predicted_square = (solution * (self.gram @ solution)).sum(0)
        predicted_mean = (self.gram[-1] @ solution) / count
        residual = self.square - 2 * (solution * self.cross).sum(0) + predicted_square
        total = self.square - self.cross[-1].square() / count
        return Fit(
            weight=solution[:-1].T.contiguous(),
            bias=solution[-1],
            variance=predicted_square / count - predicted_mean.square(),
            explained=1.0 - residual / total.clamp(min=torch.finfo(torch.float64).tiny),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {x.name: getattr(self, x.name) for x in fields(self)}


@dataclass(frozen=True)
class Fit:
    """Rows that predict targets [R] from features [C], float64.

    Attributes:
        weight: [R, C].
        bias: [R].
        variance: of what they predict [R].
        explained: share of the targets' variance that they explain [R].
    """

    weight: Tensor
    bias: Tensor
    variance: Tensor
    explained: Tensor
