# SPDX-License-Identifier: Apache-2.0
"""Decoding without asking the host: one step of fixed shapes, captured in a CUDA graph, and the loop around it.

    model.generate(**inputs, custom_generate=dms.graphed)

Between two checks the host only queues work. At a check it asks whether sequences have finished (their pages go back to
the pool) and whether the pool will last until the next one.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modelopt_dms.gates.thresholds import expected_evicted_share
from modelopt_dms.kvcache.forced_eviction import LOOKAHEAD
from modelopt_dms.kvcache.hf_cache import CACHE_NAMES, cache_argument
from modelopt_dms.kvcache.page_pool import OnFull
from modelopt_dms.modeling.dms_cache import DMSCache

# Steps between two checks; at most PAGE, so that a list takes at most one page between them.
CHECK_EVERY = LOOKAHEAD
# torch.compile makes its second version when the cache's length has changed, and that one stays.
_COMPILED_RUNS = 3
# Rotary embeddings that look at the positions' values: a graph cannot.
_LOOKING_ROPE = ("dynamic", "longrope")


class GenerationError(ValueError):
    """What was asked of `generate` cannot be done by the graphed loop; the message says what can."""


@dataclass
class DecodeStep:
    """One forward of one token a sequence, on buffers that stay where they are.

    Attributes:
        model: a DMS model.
        cache: its cache, after the prompt.
        token: next tokens [B, 1].
        position: their positions [B, 1].
        logits: of the last run [B, V].
        compiled: whether torch.compile fuses what lies between our kernels.
    """

    model: PreTrainedModel
    cache: DMSCache
    token: Tensor
    position: Tensor
    logits: Tensor | None = None
    compiled: bool = False
    _forward_model: Any = field(default=None, repr=False)
    _graph: Any = field(default=None, repr=False)
    _warm: int = 0

    def __post_init__(self) -> None:
        self._forward_model = torch.compile(self.model) if self.compiled else self.model

    def __call__(self) -> Tensor:
        """Run it, as a graph if there is one: logits [B, V], valid until the next run."""
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()
            self.cache.advance(1)
        assert self.logits is not None
        return self.logits

    @property
    def can_capture(self) -> bool:
        """Whether runs at today's addresses have loaded and compiled all kernels: a capture allows neither."""
        return self._graph is None and self._warm >= (_COMPILED_RUNS if self.compiled else 1)

    def capture(self) -> None:
        """Record a run in a CUDA graph, which later runs replay. Nothing is computed now.

        Raises:
            GenerationError: the model does something that a graph cannot.
        """
        graph = torch.cuda.CUDAGraph()
        seen = self.cache.get_seq_length()
        try:
            with torch.cuda.graph(graph):
                self._forward()
        except RuntimeError as error:
            raise GenerationError(
                f"{type(self.model).__name__} cannot be captured in a CUDA graph ({str(error).splitlines()[0]})"
            ) from error
        finally:
            self.cache.advance(seen - self.cache.get_seq_length())
        self._graph = graph

    def release(self) -> None:
        """Forget the graph: addresses have changed."""
        self._graph, self._warm = None, 0

    def _forward(self) -> None:
        outputs = self._forward_model(
            input_ids=self.token,
            position_ids=self.position,
            use_cache=True,
            **cache_argument(type(self.model).forward, self.cache),
        )
        self.logits = outputs.logits[:, -1]
        self.position += 1
        self._warm += 1


def can_be_captured(model: PreTrainedModel, cache: DMSCache) -> bool:
    """Whether a decode step is the same work at the same addresses every time."""
    one_device = len({pool.device for pool in cache.pools}) == 1
    return cache.is_all_paged and one_device and looking_rope(model) is None


def looking_rope(model: PreTrainedModel) -> str | None:
    """The kind of a rotary embedding that looks at the values of positions, which no graph can; None without one."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # Models with several kinds of layers have parameters for each.
    kinds = [x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)]
    return next((x for x in kinds if x in _LOOKING_ROPE), None)


@torch.no_grad()
def graphed(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    stream_to: BaseStreamer | None = None,
    max_cache_bytes: int | str | None = None,
    on_full: OnFull = "error",
    graph: bool = True,
    compile: bool = False,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop for `generate(custom_generate=graphed)`: greedy or sampling, hundreds of ragged sequences.

    On CUDA, decode steps are replays of one CUDA graph, where the model allows (all of its attention layers are DMS
    layers on one device, and its rotary embedding does not look at positions; a warning says where it
    did something else that no graph can); elsewhere the same steps run one by one.

    Args:
        model: a DMS model.
        input_ids: prompts [B, T].
        logits_processor: prepared by `generate`.
        stopping_criteria: prepared by `generate`.
        generation_config: prepared by `generate`.
        synced_gpus: refused.
        stream_to: a streamer that gets every token as it comes, which makes the host wait for each. (transformers hands
            its own argument `streamer` to its own loops only.)
        max_cache_bytes: of the KV cache's pages, taken at the first forward; see `DMSCache`. By default, what sequences
            of max_length should need by the model's compression ratio; it grows where that was wrong.
        on_full: "evict" evicts more than the gates do instead of an OutOfPagesError; see `DMSCache`.
        graph: False runs step by step on CUDA, too.
        compile: fuse what lies between our kernels with torch.compile; takes a minute or more before the first token.
        **model_kwargs: attention_mask and past_key_values; other inputs are refused.

    Returns:
        Prompts and continuations [B, T + new], padded; or with `return_dict_in_generate` an object with the cache.

    Raises:
        GenerationError: beams, scores or other inputs were asked for.
        OutOfPagesError: the cache outgrew max_cache_bytes.
    """
    _check(generation_config, synced_gpus, model_kwargs)
    cache = _cache(model, input_ids, generation_config, max_cache_bytes, on_full, model_kwargs)
    cache.reserve(generation_config.max_length, expected_evicted_share(model))
    mask = model_kwargs.get("attention_mask")
    run = _Run(model, input_ids, logits_processor, stopping_criteria, generation_config, stream_to)
    step = run.prefill(cache, mask, compile)
    capture = graph and input_ids.device.type == "cuda" and can_be_captured(model, cache)
    steps = 0
    while not run.finished:
        if capture and step.can_capture:
            capture = _captured(step)
        run.choose(step(), step)
        steps += 1
        if run.full or steps % CHECK_EVERY == 0 or stream_to is not None:
            run.check(cache, step)
    if stream_to is not None:
        stream_to.end()
    sequences = run.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    given = cache_argument(GenerateDecoderOnlyOutput, cache)
    return GenerateDecoderOnlyOutput(sequences=sequences, **given)


def _captured(step: DecodeStep) -> bool:
    """Capture a step; False, with a warning, where the model does something that a graph cannot."""
    try:
        # A capture that fails may leave its own stream behind.
        with torch.cuda.stream(torch.cuda.current_stream(step.token.device)):
            step.capture()
    except GenerationError as error:
        warnings.warn(f"{error}; decoding goes on step by step", stacklevel=3)
        return False
    return True


class _Run:
    """The sequences of one `generate`: what was written, and which have finished. Asks the device only in `check`."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        B, self.length = input_ids.shape
        device = input_ids.device
        self.model, self.streamer = model, streamer
        self.processor, self.criteria = logits_processor, stopping_criteria
        self.samples = generation_config.do_sample
        pad = generation_config._pad_token_tensor
        self.pad = (
            torch.zeros((), dtype=torch.long, device=device) if pad is None else pad.to(device)
        )
        self.ids = input_ids.new_zeros(B, generation_config.max_length)
        self.ids[:, : self.length] = input_ids
        self.unfinished = torch.ones(B, dtype=torch.bool, device=device)
        self.ended = torch.zeros(B, dtype=torch.long, device=device)
        self.finished = False
        if streamer is not None:
            streamer.put(input_ids.cpu())

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return self.length >= self.ids.shape[1]

    def prefill(self, cache: DMSCache, mask: Tensor | None, compiled: bool) -> DecodeStep:
        """Read the prompts, choose their first tokens, and prepare the step for the next ones."""
        past = cache.get_seq_length()
        positions = torch.arange(self.length, device=self.ids.device)[None]
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=self.ids[:, past : self.length],
            attention_mask=mask,
            position_ids=positions[:, past:],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(type(self.model).forward, cache),
        )
        B = len(self.ids)
        position = (positions[:, -1:] + 1).expand(B, 1).clone()
        token = self.ids.new_zeros(B, 1)
        step = DecodeStep(self.model, cache, token, position, compiled=compiled)
        self.choose(outputs.logits[:, -1], step)
        self.check(cache, step)
        return step

    def choose(self, logits: Tensor, step: DecodeStep) -> None:
        """The next token of every sequence, from logits [B, V]."""
        written = self.ids[:, : self.length]
        scores = self.processor(written, logits.to(torch.float32, copy=True))
        drawn = scores.softmax(-1).multinomial(1)[:, 0] if self.samples else scores.argmax(-1)
        tokens = torch.where(self.unfinished, drawn, self.pad)
        self.ids[:, self.length] = tokens
        self.length += 1
        ends = self.criteria(self.ids[:, : self.length], None) & self.unfinished
        self.ended = torch.where(ends, self.length, self.ended)
        self.unfinished &= ~ends
        step.token.copy_(tokens[:, None])
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def check(self, cache: DMSCache, step: DecodeStep) -> None:
        """Ask the device: who has finished, and will the pages last?"""
        gone = ~self.unfinished & cache.active
        some_left, some_gone = torch.stack([self.unfinished.any(), gone.any()]).tolist()
        self.finished = not some_left or self.full
        if some_gone and not self.finished:
            cache.release(~self.unfinished)
        # At the end the cache stays as it is, for who wants to go on with it.
        tokens = min(CHECK_EVERY, self.ids.shape[1] - self.length)
        if not self.finished and cache.make_room(tokens):
            step.release()

    def sequences(self) -> Tensor:
        """Prompts and continuations, as long as the longest."""
        longest = int(torch.where(self.unfinished, self.length, self.ended).max())
        return self.ids[:, :longest]


def _check(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams > 1:
        raise GenerationError(
            f"num_beams={config.num_beams}: the graphed loop decodes greedily or samples; leave custom_generate unset"
        )
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    wanted = [name for name in asked if getattr(config, name)]
    if synced_gpus:
        wanted.append("synced_gpus")
    known = {"attention_mask", *CACHE_NAMES, "use_cache", "logits_to_keep", "position_ids"}
    wanted += [
        name for name in model_kwargs if name not in known and model_kwargs[name] is not None
    ]
    if wanted:
        raise GenerationError(
            f"the graphed loop does not do {', '.join(wanted)}; leave custom_generate unset, or leave them out"
        )


def _cache(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    max_cache_bytes: int | str | None,
    on_full: OnFull,
    model_kwargs: dict[str, Any],
) -> DMSCache:
    given = next((x for name in CACHE_NAMES if (x := model_kwargs.get(name)) is not None), None)
    B, length = len(input_ids), config.max_length
    if isinstance(given, DMSCache):
        if max_cache_bytes is not None or on_full != "error":
            raise GenerationError(
                "max_cache_bytes and on_full are for the cache made here; give them to DMSCache"
            )
        given.check_room(B, length)
        return given
    if given is not None and given.get_seq_length():
        raise GenerationError(
            f"past_key_values is a {type(given).__name__} with {given.get_seq_length()} tokens; the graphed loop goes "
            "on only from a DMSCache"
        )
    return DMSCache(
        model, batch_size=B, max_length=length, max_cache_bytes=max_cache_bytes, on_full=on_full
    )
