# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face cache layer of a DMS model: its length in context and in resident tokens, and what it costs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from modelopt_dms.kernels.gating import GateInput
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.rollback import ROLLBACK
from modelopt_dms.kvcache.head_caches import Bucket, HeadCaches
from modelopt_dms.kvcache.layer_cache import LayerCache
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.kvcache.usage import Usage

Formats = tuple[RowFormat | None, RowFormat | None]


class DMSLayer(CacheLayerMixin):
    """Stands where `DynamicLayer` stood in a DynamicCache; holds only what the gate lets live.

    `update` hands the new rows through: the attention function has them appended, together with their decisions.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        slots: LayerCache,
        formats: Formats = (None, None),
        depth: int | None = None,
    ) -> None:
        """Make a layer.

        Args:
            slots: empty; lists of their own on a CPU, pages of a shared pool on a CUDA device.
            formats: number formats of the stored keys and values; None is the model's own dtype.
            depth: layers of the model that it is for, if known.
        """
        super().__init__()
        self.depth = depth
        # A gate is about to decide about the rows of the next `update`.
        self.expected = False
        self._dims: tuple[int, int, int] | None = None
        self.slots = slots
        self.formats = formats
        # Which of the first tokens [B, N] were taken in, padding was not; None if all were.
        self.held: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Not there: every head holds rows of its own tokens.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            "a DMS cache layer has no keys and values of shape [B, K, T, D]: every head keeps tokens of its own; "
            "modelopt_dms.kv_stats(cache) says how many, layer.rows(b * K + k) gives one head's rows on a CPU"
        )

    @keys.setter
    def keys(self, value: None) -> None:
        """The base class of transformers sets it to None."""

    values = keys

    @property
    def heads(self) -> int:
        """KV heads of the rows given to the last `update`."""
        return self._incoming[0].shape[1]

    def append(self, rows: tuple[Tensor, ...], evict: Tensor, valid: Tensor | None) -> None:
        """Take in rows of those given to the last `update`; see `LayerCache.append`."""
        k, v = rows
        self.slots.append(k, v, evict, valid)
        self.slots.usage.row_values = sum(self._row_dims)

    def take_incoming(self) -> tuple[Tensor, Tensor]:
        """The rows given to the last `update`, as `slots` stores them; they are not held any longer."""
        rows = self._incoming
        # A long prompt's rows would otherwise outlive it until the next token.
        del self._incoming
        return rows

    def check_rows(self, name: str, tokens: int) -> None:
        """Raise ValueError unless the attention module `name` has given the rows of its new tokens to `update`."""
        rows = self.__dict__.get("_incoming")
        if rows is None or self._incoming_tokens != tokens:
            given = "none" if rows is None else self._incoming_tokens
            raise ValueError(
                f"{name} attends from {tokens} new tokens, but gave its cache {given}; DMS needs a layer that caches "
                "the tokens it attends from"
            )

    def hold(self, valid: Tensor, past: int) -> None:
        """Note which of the tokens [B, T] from position `past` on were taken in."""
        if self.held is None:
            self.held = valid.new_ones(len(valid), past)
        elif self.held.shape[1] < past:
            self.held = F.pad(self.held, (0, past - self.held.shape[1]), value=True)
        self.held = torch.cat([self.held[:, :past], valid], dim=1)

    def expect_draft(self, tokens: int) -> None:
        """From now on, keep what it takes to take back so many tokens."""
        self.slots.rollback = max(self.slots.rollback, tokens)

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Live keys [L, Dk] and values [L, Dv] of list `index` = b * K + k."""
        return self._decoded(self.slots.rows(index), index % self.slots.K)

    def read(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Keys [N, C, Dk] and values [N, C, Dv] of a bucket."""
        heads = bucket.lists[:, None, None] % self.slots.K
        k, v = self._decoded((bucket.keys, bucket.values), heads)
        if self.formats == (None, None):
            return k, v
        # A row that nobody wrote has a scale of 0, and decodes to NaN.
        nothing = (bucket.bias != 0)[..., None]
        return k.masked_fill(nothing, 0.0), v.masked_fill(nothing, 0.0)

    def _decoded(self, stored: tuple[Tensor, Tensor], head: int | Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            x if form is None else form.decode(x, dim, self.dtype, head)
            for x, form, dim in zip(stored, self.formats, self._row_dims, strict=True)
        )
        return k, v

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the decisions are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand the new rows [B, K, T, .] on, as they will be read from now on, to the attention function.

        Raises:
            ValueError: they come from a layer without a gate, or are of other sizes than what is held.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_sender(key_states, value_states)
        self._incoming_tokens = key_states.shape[2]
        paged = isinstance(self.slots, PagedHeadCaches)
        if paged and key_states.shape[2] == 1:
            # The kernel that stores a single token encodes it, and attention reads it from its page.
            self._incoming = (key_states, value_states)
            return key_states, value_states
        k_format, v_format = self.formats
        k, read_keys = _through(k_format, key_states)
        v, read_values = _through(v_format, value_states)
        self._incoming = (key_states, value_states) if paged else (k, v)
        return read_keys, read_values

    @property
    def _row_dims(self) -> tuple[int, int]:
        assert self._dims is not None
        return self._dims[1:]

    def _check_sender(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.expected:
            raise ValueError(
                "a layer without a gate gave its tokens to a DMS cache layer, from which it would read none back; use "
                "the cache only with the model that returned it"
            )
        self.expected = False
        dims = (key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        if self.slots.seen and self._dims not in (None, dims):
            raise ValueError(
                f"the cache holds {_sizes(self._dims)} a token, and the model gives it {_sizes(dims)}: it is another "
                "model's cache; leave past_key_values unset, or pass one that this model returned"
            )
        self._dims = dims

    def get_seq_length(self) -> int:
        """Positions seen, evicted ones included: the next token's position."""
        return self.slots.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask that the model prepares."""
        return self.slots.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.slots = self.slots.emptied()
        self.is_initialized = False
        self.held = None

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back: a negative count of tokens to remove; everything, if there are no more.

        Raises:
            ValueError: a positive count, or the rows needed for going back that far are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) must be a negative number of tokens to remove"
            )
        if -tokens_to_remove >= self.slots.seen:
            self.reset()
            return
        self.slots.crop(-tokens_to_remove)
        if self.held is not None:
            self.held = self.held[:, : self.slots.seen]

    def activate_past_recording(self) -> None:
        """From now on, keep what a rollback within the whole delay window needs."""
        self.slots.rollback = max(self.slots.rollback, self.slots.window)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams [B]."""
        if self.slots.seen:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.slots.seen:
            index = torch.arange(self.slots.B, device=indices.device)
            self._select(index[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.slots.seen:
            self._select(torch.arange(self.slots.B).repeat_interleave(repeats))

    def _select(self, sequences: Tensor) -> None:
        self.slots.select(sequences)
        if self.held is not None:
            self.held = self.held[sequences.to(self.held.device)]

    def offload(self) -> None:
        """Refuse: see `adopt`."""
        raise ValueError(
            "an offloaded cache cannot hold a DMS layer; use the default dynamic cache"
        )

    prefetch = offload


def _sizes(dims: tuple[int, int, int] | None) -> str:
    heads, keys, values = dims or (0, 0, 0)
    return f"{heads} KV heads of {keys} (keys) and {values} (values) numbers"


def _through(form: RowFormat | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, K, T, D] as they are stored, and as they will be read."""
    if form is None:
        return x, x
    stored = form.encode(x)
    return stored, form.decode(stored, x.shape[-1], x.dtype)


@dataclass
class LayerStep:
    """The one hand-over from a layer's pre-forward hook to its attention function.

    Attributes:
        layer: the cache layer of this forward, or None without a cache.
        log_keep: log(1 - alpha) [B, K, T] float32 of the tokens that the decisions govern, where there is no cache.
            None if nothing is decided yet.
        evict: hard decisions [B, K, T] as made, for the cache; None while training, and if they are not made yet.
        undecided: what decides about a single token when it is stored in a page.
        used: set by the attention function; tells a forward that went past it.
        cache: that the layer belongs to.
    """

    layer: DMSLayer | None
    log_keep: Tensor | None
    evict: Tensor | None
    undecided: GateInput | None = None
    used: bool = False
    cache: Cache | None = None


# What transformers calls a cache, before 5.24 and since.
CACHE_NAMES = ("past_key_values", "cache")


def cache_argument(function: Callable[..., Any], cache: Cache | None) -> dict[str, Cache | None]:
    """A cache as the keyword argument that a model's forward, or a class of outputs, takes."""
    before, since = CACHE_NAMES
    return {since if since in inspect.signature(function).parameters else before: cache}


def cache_of(output: Any) -> Cache:
    """The cache in what a model, or `generate`, returned."""
    before, since = CACHE_NAMES
    return getattr(output, since if hasattr(output, since) else before)


def adopt(
    cache: Cache,
    layer_idx: int,
    window: int,
    shift: int,
    formats: Callable[[], Formats],
    device: torch.device,
    depth: int | None = None,
) -> DMSLayer:
    """The DMS layer at `layer_idx` of a cache, put there in place of an untouched DynamicLayer.

    Args:
        cache: a DynamicCache.
        layer_idx: which layer.
        window: tokens a marked token stays readable.
        shift: 1 if a token's logit governs the token before it, else 0.
        formats: gives the number formats of the stored keys and values.
        device: where the layer computes: rows are in lists of their own on a CPU, and paged elsewhere.
        depth: layers of the model, if known.

    Raises:
        ValueError: it is another model's cache, it stores keys and values in a way that cannot forget (static,
            quantized, offloaded), or was filled by a model that was not converted.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, DMSLayer):
        _check_own(layer, layer_idx, window, shift, depth)
        return layer
    name = f"{type(cache).__name__} with {type(layer).__name__} at layer {layer_idx}"
    if type(layer) is not DynamicLayer or getattr(cache, "offloading", False):
        raise ValueError(
            f"{name}{' (offloaded)' if getattr(cache, 'offloading', False) else ''} cannot evict; a DMS model accepts "
            "a DynamicCache (the default of generate: leave past_key_values and cache_implementation unset)"
        )
    if layer.get_seq_length():
        raise ValueError(
            f"{name} already holds {layer.get_seq_length()} tokens about which no gate has decided; start from an "
            "empty DynamicCache or one that this model returned"
        )
    found = formats()
    slots: LayerCache
    if uses_pages(device):
        slots = PagedHeadCaches(window, shift, _pool_of(cache, device, found), found, ROLLBACK)
    else:
        slots = HeadCaches(window, shift)
    cache.layers[layer_idx] = adopted = DMSLayer(slots, found, depth)
    return adopted


def _check_own(layer: DMSLayer, index: int, window: int, shift: int, depth: int | None) -> None:
    """Refuse a layer that another model's gates have made their decisions about, as far as it shows."""
    held = getattr(layer.slots, "window", window)  # a graph that is exported has none
    if held != window:
        what = f"layer {index} of the cache has a delay window of {held} tokens, and the model's is {window}"
    elif (given := getattr(layer.slots, "shift", shift)) != shift:
        what = f"layer {index} of the cache has decision_shift={given}, and the model's is {shift}"
    elif None not in (layer.depth, depth) and layer.depth != depth:
        what = f"the cache is of a model with {layer.depth} layers, and this one has {depth}"
    else:
        return
    raise ValueError(
        f"{what}: it is another model's cache; leave past_key_values unset, or pass one that this model returned"
    )


def uses_pages(device: torch.device) -> bool:
    """Whether layers on this device keep their rows in pages, for the kernels, or in lists of their own."""
    return device.type != "cpu"


def rows_alike(formats: Formats) -> tuple[Any, ...]:
    """Equal for layers that can share pages, if their dims are equal."""
    return tuple(None if x is None else (x.name, x.amax is None) for x in formats)


def _pool_of(cache: Cache, device: torch.device, formats: Formats) -> SharedPool:
    """The pool of the layers on this device that store rows alike, or a new one."""
    for layer in cache.layers:
        if isinstance(layer, DMSLayer) and isinstance(layer.slots, PagedHeadCaches):
            alike = rows_alike(layer.formats) == rows_alike(formats)
            if alike and layer.slots.shared.device == device:
                return layer.slots.shared
    return SharedPool(device, layers=len(cache.layers))


@dataclass(frozen=True)
class LayerStats:
    """One layer's cache.

    Attributes:
        layer_idx: index of the layer in the model.
        resident: tokens held [B, K], of the sequences that hold any.
        context: tokens seen [B], likewise.
        kv_bytes: bytes allocated for keys and values, scales included.
        resident_bytes: of them, those of tokens that are held.
        dense_bytes: bytes that the same tokens need without eviction, in the same number format.
        bf16_bytes: bytes that the same tokens need without eviction, in bfloat16.
    """

    layer_idx: int
    resident: Tensor
    context: Tensor
    kv_bytes: int
    resident_bytes: int
    dense_bytes: int
    bf16_bytes: int


@dataclass(frozen=True)
class KVStats:
    """What the DMS layers of a cache hold. Layers with sliding-window attention are not counted.

    Attributes:
        layers: one by one.
        free_bytes: of pages that no layer owns.
        dtype: of the model that made keys and values, if it is known.
    """

    layers: list[LayerStats]
    free_bytes: int
    dtype: torch.dtype | None = None

    @property
    def resident_tokens(self) -> float:
        """Mean resident tokens of a KV head."""
        return sum(x.resident.sum().item() for x in self.layers) / sum(
            x.resident.numel() for x in self.layers
        )

    @property
    def context_tokens(self) -> float:
        """Mean tokens seen by a sequence."""
        return self.layers[0].context.double().mean().item()

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, scales included."""
        return sum(x.kv_bytes for x in self.layers)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the cache has taken, free pages included."""
        return self.kv_bytes + self.free_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of tokens that are held; the rest of `kv_bytes` is slack, and rows held for a rollback."""
        return sum(x.resident_bytes for x in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same tokens need without eviction."""
        return sum(x.dense_bytes for x in self.layers)

    @property
    def bf16_bytes(self) -> int:
        """Bytes that the same tokens need without eviction, in bfloat16."""
        return sum(x.bf16_bytes for x in self.layers)

    @property
    def memory_reduction(self) -> float:
        """How many times smaller the cache is than one that keeps every token in bfloat16, by bytes allocated."""
        return self.bf16_bytes / self.kv_bytes

    @property
    def compression_ratio(self) -> float:
        """Context over resident tokens, averaged over layers and heads by bytes."""
        rows = [(x.dense_bytes, x.resident, x.context) for x in self.layers]
        live = sum(
            dense * (held.sum() / (seen.sum() * held.shape[1])).item() for dense, held, seen in rows
        )
        return self.dense_bytes / live

    def __str__(self) -> str:
        """A table, one line a layer."""
        lines = ["layer  context  resident (min / mean / max of heads)    bytes  compression"]
        for x in self.layers:
            held, seen = x.resident.double(), x.context.double().mean().item()
            lines.append(
                f"{x.layer_idx:5d} {seen:8.0f}  {held.min():8.0f} / {held.mean():8.1f} / {held.max():8.0f}"
                f" {x.kv_bytes:12d} {x.context.double().mean() / held.mean():11.2f}x"
            )
        lines.append(
            f"total {self.context_tokens:8.0f}  {self.resident_tokens:8.1f} resident on average {'':12s}"
            f" {self.kv_bytes:12d} {self.compression_ratio:11.2f}x"
        )
        lines.append(f"{self.kv_bytes} bytes of KV cache: {'; '.join(self._compared())}")
        if self.free_bytes:
            lines.append(
                f"{self.reserved_bytes} bytes reserved, {self.resident_bytes} resident, {self.free_bytes} free"
            )
        return "\n".join(lines)

    def _compared(self) -> list[str]:
        """Against a cache that keeps every token, in the model's own dtype and in bfloat16."""
        sizes = {torch.bfloat16: self.bf16_bytes}
        if self.dtype is not None and self.dtype.itemsize != 2:
            sizes = {self.dtype: self.bf16_bytes * self.dtype.itemsize // 2, **sizes}
        elif self.dtype is not None:
            sizes = {self.dtype: self.bf16_bytes}
        return [
            (
                f"{dense / self.kv_bytes:.2f}x smaller than keeping every token in {_name(dtype)} ({dense} bytes)"
                if dense >= self.kv_bytes
                else f"{self.kv_bytes / dense:.2f}x larger than keeping every token in {_name(dtype)} ({dense} bytes), "
                f"as room is allocated in steps ({self.resident_bytes} bytes are resident)"
            )
            for dtype, dense in sizes.items()
        ]

    def summary(self) -> dict[str, Any]:
        """The figures of all layers together, as JSON."""
        dtype = None if self.dtype is None else _name(self.dtype)
        own = None if self.dtype is None else self.bf16_bytes * self.dtype.itemsize // 2
        return {
            "context_tokens": self.context_tokens,
            "resident_tokens": self.resident_tokens,
            "compression_ratio": self.compression_ratio,
            "kv_bytes": self.kv_bytes,
            "resident_bytes": self.resident_bytes,
            "reserved_bytes": self.reserved_bytes,
            "dtype": dtype,
            "dense_bytes": own,
            "bf16_bytes": self.bf16_bytes,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kv_stats(source: nn.Module | Cache) -> KVStats:
    """Resident and context tokens and bytes of a cache, or of the last cache that a model used.

    Args:
        source: a converted model after a forward or `generate`, or the cache it returned.

    Raises:
        ValueError: no DMS layer has been used yet.
    """
    if isinstance(source, Cache):
        used = [
            (i, x.slots.usage)
            for i, x in enumerate(source.layers)
            if isinstance(x, DMSLayer) and x.slots.seen
        ]
    else:
        layers: list[Any] = list(source.modules())
        caches = [x.dms_usages for x in layers if getattr(x, "dms_usages", None)]
        # Of a cache that the last layer has seen, all layers have.
        used = sorted(caches[-1].items()) if caches else []
    if not used:
        raise ValueError(
            "no KV cache with DMS layers has been used yet: run generate() or a forward with a cache first"
        )
    found = [(index, usage.synchronized()) for index, usage in used]
    dtype = getattr(source, "dtype", None)
    return KVStats([_layer_stats(*x) for x in found], _free_bytes([x for _, x in found]), dtype)


def _free_bytes(usages: list[Usage]) -> int:
    """Bytes of the pools' pages that none of these layers, which are all of them, owns."""
    paged = [x for x in usages if x.pool is not None]
    pools = {x.pool for x in paged}
    return sum(x.bytes for x in pools if x is not None) - sum(
        x.kv_bytes - x.log_bytes for x in paged
    )


def _layer_stats(index: int, usage: Usage) -> LayerStats:
    held = usage.tokens > 0  # a sequence that has given its pages back holds nothing
    return LayerStats(
        index,
        usage.live[held],
        usage.tokens[held],
        usage.kv_bytes,
        usage.resident_bytes,
        usage.dense_bytes,
        usage.bf16_bytes,
    )
