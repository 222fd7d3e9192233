# SPDX-License-Identifier: Apache-2.0
"""The tensors that live between two runs of the graphs: KV pages, tables, lengths, rings.

Shapes: L layers, B batch slots, K KV heads, P pages a list can own, N pages.
"""

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_dms.runtime.manifest import Manifest, ManifestError, Phase, Port

ALIGNMENT = 256  # bytes
POOLS = ("keys", "values")
EMPTY = {"ring_slot": -1}  # 0 where nothing is said
SMALL = ("table", "live", "seen", "ring_slot", "ring_evict")


def dtype_of(port: Port) -> torch.dtype:
    """The dtype of a port's tensor."""
    return getattr(torch, port.dtype)


def shape_of(port: Port, batch: int, pages: int) -> tuple[int, ...]:
    """A port's shape with its names replaced; `pages` counts page 0 too."""
    names = {"batch": batch, "pages": pages}
    return tuple(names[x] if isinstance(x, str) else x for x in port.shape)


def stack(
    layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Zeros [layers, *shape]; each layer's part is contiguous and aligned as TensorRT wants addresses to be."""
    size = math.prod(shape)
    stride = -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
    return torch.zeros(layers, stride, dtype=dtype, device=device)[:, :size].unflatten(1, shape)


class State:
    """State of B batch slots, laid out so that the host reads and writes each kind for all layers at once.

    Attributes:
        batch: B.
        pages: of each layer that can be given out.
        stacks: by kind, "table" [L, B, K, P], "live" [L, B, K], ...; "keys" [L, N, 64, KC].
    """

    def __init__(
        self,
        manifest: Manifest,
        batch: int,
        pages: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate it.

        Args:
            manifest: of the graphs.
            batch: B.
            pages: of each layer that can be given out; one more is allocated, which is nobody's.
            device: where.
        """
        self.batch = batch
        self.pages = pages
        self.layers = manifest.model.layers
        self.stacks: dict[str, Tensor] = {}
        ports = {x.name: x for x in manifest.phases["decode"].inputs}
        for kind in (*POOLS, *SMALL):
            for layer in range(self.layers):
                if f"{kind}.{layer}" not in ports:
                    raise ManifestError(
                        f"the decode graph has no input {kind}.{layer}; export again"
                    )
            port = ports[f"{kind}.0"]
            shape = shape_of(port, batch, pages + 1)
            # Zeros, not empty: rows behind a list's end are read and masked, and 0 * NaN is NaN.
            made = stack(self.layers, shape, dtype_of(port), device)
            self.stacks[kind] = made.fill_(EMPTY.get(kind, 0))

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The state tensor of a port, of these batch slots; contiguous, and of the same address each time."""
        kind, _, layer = name.partition(".")
        return self.stacks[kind][int(layer), slice(None) if kind in POOLS else rows]

    def staging(self, batch: int) -> "State":
        """State of other batch slots over the same pages."""
        other = copy.copy(self)
        other.batch = batch
        other.stacks = dict(self.stacks)
        for kind in SMALL:
            old = self.stacks[kind]
            other.stacks[kind] = stack(
                self.layers, (batch, *old.shape[2:]), old.dtype, old.device
            ).copy_(old[:, :1].expand(-1, batch, *old.shape[2:]))
        return other

    def copy_small(self, source: "State", taken: slice, given: slice) -> None:
        """Copy everything but pages from batch slots of another state to batch slots of this."""
        for kind in SMALL:
            self.stacks[kind][:, given].copy_(source.stacks[kind][:, taken])

    def has(self, name: str) -> bool:
        """Whether a port is state."""
        return name.partition(".")[0] in self.stacks

    def start(self, table: NDArray[np.int32]) -> None:
        """Make all batch slots empty, with these page tables [B, K, P] in every layer."""
        for kind in SMALL:
            self.stacks[kind].fill_(EMPTY.get(kind, 0))
        self.stacks["table"].copy_(torch.from_numpy(table))

    def read_live(self) -> NDArray[np.int32]:
        """Live slots [L, B, K]; waits for the device."""
        return self.stacks["live"].cpu().numpy().copy()


def check_feeds(phase: Phase, feeds: dict[str, Tensor], batch: int) -> None:
    """That the feeds are those that a phase wants beside its state.

    Raises:
        ManifestError: one is missing, of another dtype or of another shape.
    """
    for port in phase.inputs:
        if "." in port.name:
            continue
        if port.name not in feeds:
            raise ManifestError(f"the input {port.name} is missing; got {sorted(feeds)}")
        found = feeds[port.name]
        shape = shape_of(port, batch, 0)
        if found.dtype != dtype_of(port) or tuple(found.shape) != shape:
            raise ManifestError(
                f"the input {port.name} must be {port.dtype} {list(shape)}, "
                f"got {str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            )
