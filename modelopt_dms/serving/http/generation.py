# SPDX-License-Identifier: Apache-2.0
"""Generations one after the other on one thread, each with a KV cache of its own."""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    GenerationState,
    InferenceThread,
    _GenerationCancelled,
    _StreamError,
)

from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.kvcache.page_pool import OnFull
from modelopt_dms.modeling.convert import is_converted
from modelopt_dms.modeling.generation import graphed
from modelopt_dms.serving.http.decoding import Asked, CountPenalties, StopInAnswer
from modelopt_dms.serving.http.gateway import when_gone
from modelopt_dms.serving.http.listening import ServeError
from modelopt_dms.serving.http.metrics import Metrics
from modelopt_dms.serving.http.refusals import Refusal

# Tokens between two looks at the cache for /metrics; on a GPU, a look waits for the device.
_LOOK_EVERY = 32


@dataclass(frozen=True)
class Limits:
    """What a server gives a request.

    Attributes:
        max_cache_bytes: of the KV cache; None is no limit.
        on_full: what happens there, see `DMSCache`.
        max_waiting: requests that may wait for their turn.
    """

    max_cache_bytes: int | None = None
    on_full: OnFull = "error"
    max_waiting: int = 64


class _Unread:
    """A streamer of an answer that is sent as a whole: only its end can be asked for."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self._cancelled.is_set():
            raise _GenerationCancelled()

    def end(self) -> None:
        """Nothing is left to be sent."""

    def cancel(self) -> None:
        """The next token ends it."""
        self._cancelled.set()


class _Counted:
    """Counts what passes on its way to a streamer, and says before the end what the last token was."""

    def __init__(self, manager: "OneAtATime", streamer: Any, on_end: Callable[[int], None]) -> None:
        self._manager, self._streamer, self._on_end = manager, streamer, on_end
        self._seen = -1  # the first call brings the prompt
        self._last = -1

    def put(self, value: torch.Tensor) -> None:
        self._streamer.put(value)
        self._seen += 1
        self._last = int(value.flatten()[-1])
        if self._seen:
            self._manager.metrics.generated_tokens.inc()
        if self._seen % _LOOK_EVERY == 1:
            self._manager.look()

    def end(self) -> None:
        self._on_end(self._last)
        self._streamer.end()


class OneAtATime(BaseGenerateManager):
    """The queue in front of one model. All of its methods but `look` run on the event loop's thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        """Make an empty queue.

        Raises:
            ServeError: the model cannot be served so.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ServeError(
                f"{type(tokenizer).__name__} is a slow tokenizer; streaming needs a fast one (tokenizer.json)"
            )
        self._converted = is_converted(model)
        if limits.max_cache_bytes is not None and not self._converted:
            raise ServeError(
                "--max-cache-bytes limits the cache of a DMS model, and this one has no gates; leave it out"
            )
        self.model, self.tokenizer = model, tokenizer
        self.limits, self.metrics = limits, metrics
        self._thread = InferenceThread()
        self._unfinished: set[Any] = set()
        self._last: Any = None
        text = model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)

    def warm_up(self) -> None:
        """Generate two tokens, so that what cannot work fails before a client has asked.

        Raises:
            ValueError: for example, max_cache_bytes is too small for any sequence.
        """
        ids = torch.tensor([[0]], device=self.model.device)
        config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._thread.submit(self._call, inputs, config, _Unread(), Asked()).result()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """Queue a generation: what its text arrives in, and what ends it."""
        self._admit(inputs, gen_config)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        streamer = DirectStreamer(self.tokenizer._tokenizer, loop, queue, response_parser)

        def run() -> None:
            try:
                self._generate(inputs, gen_config, streamer)
            except _GenerationCancelled:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:
                # transformers puts the text between quotes, into JSON.
                text = json.dumps(str(error) or type(error).__name__)[1:-1]
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(text))

        self._submit(streamer, run)
        return queue, streamer

    async def generate_non_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, torch.Tensor]:
        """Queue a generation and wait for it: its text, the prompt's length, and its tokens [N]."""
        self._admit(inputs, gen_config)
        streamer = _Unread()
        future = self._submit(streamer, self._generate, inputs, gen_config, streamer)
        done = asyncio.wrap_future(future)
        # Nobody may be left to look at an error, which would then be logged.
        done.add_done_callback(lambda x: x.cancelled() or x.exception())
        try:
            # Not cancelled itself: the thread would fail to set its result, and end.
            await asyncio.wait({done})
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        sequences = done.result()
        length = inputs["input_ids"].shape[-1]
        tokens = sequences[0, length:]
        return self.tokenizer.decode(tokens, skip_special_tokens=True), length, tokens

    @property
    def is_alive(self) -> bool:
        """Whether the thread that generates still does."""
        return self._thread._thread.is_alive()

    def stop(self, seconds: float = 10.0) -> bool:
        """End all generations at their next token; whether they did in time."""
        for streamer in list(self._unfinished):
            streamer.cancel()
        ended = self._thread.submit(lambda: None)
        try:
            ended.result(timeout=seconds)
        except TimeoutError:
            return False
        return True

    def look(self) -> None:
        """Tell the metrics what the running request's cache holds; on the thread that generates."""
        if self._converted:
            try:
                self.metrics.saw(kv_stats(self.model))
            except ValueError:
                return  # no cache has been used yet

    def _admit(self, inputs: Any, config: GenerationConfig) -> None:
        """Refuse what cannot be answered; a length that was not asked for ends where the model does."""
        asked, prompt = config.max_new_tokens, inputs["input_ids"].shape[-1]
        try:
            if prompt == 0:
                raise Refusal(400, "the prompt has no tokens")
            if asked is not None and asked < 1:
                raise Refusal(400, f"max_tokens={asked} must be at least 1", "max_tokens")
            if self.max_length is not None and prompt >= self.max_length:
                raise Refusal(
                    400,
                    f"the prompt has {prompt} tokens, and this model reads and writes {self.max_length} in all",
                    code="context_length_exceeded",
                )
            if len(self._unfinished) > self.limits.max_waiting:
                raise Refusal(
                    429, f"{self.limits.max_waiting} requests wait already; try again later"
                )
        except Refusal:
            self.metrics.requests.labels("refused").inc()
            raise
        if self.max_length is not None and asked is not None:
            config.max_new_tokens = min(asked, self.max_length - prompt)

    def _submit(self, streamer: Any, function: Any, *arguments: Any) -> Future:
        self.metrics.waiting.inc()
        self._unfinished.add(streamer)
        when_gone(streamer.cancel)
        future = self._thread.submit(function, *arguments)
        future.add_done_callback(lambda _: self._unfinished.discard(streamer))
        return future

    def _generate(self, inputs: Any, config: GenerationConfig, streamer: Any) -> torch.Tensor:
        """On the thread: one generation, counted."""
        self.metrics.waiting.dec()
        outcome = "failed"
        self.metrics.running.set(1)
        try:
            if streamer._cancelled.is_set():
                raise _GenerationCancelled()
            asked: Asked = config.asked
            if asked.seed is not None:
                torch.manual_seed(asked.seed)
            self.metrics.prompt_tokens.inc(inputs["input_ids"].shape[-1])
            sequences = self._call(inputs, config, streamer, asked)
            outcome = "finished"
            self.look()
            return sequences
        except _GenerationCancelled:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.running.set(0)
            self.metrics.cleared()
            self.metrics.requests.labels(outcome).inc()

    def _call(
        self, inputs: Any, config: GenerationConfig, streamer: Any, asked: Asked
    ) -> torch.Tensor:
        limit, prompt = self.limits.max_cache_bytes, inputs["input_ids"].shape[-1]
        stop = StopInAnswer(self.tokenizer, prompt, asked.stop) if asked.stop else None
        ends = (
            {config.eos_token_id}
            if isinstance(config.eos_token_id, int)
            else {*(config.eos_token_id or ())}
        )

        def on_end(last: int) -> None:
            # transformers reports "length" of every answer of so many tokens, also of one that came to its end there.
            if last in ends or (stop is not None and stop.hit):
                config.max_new_tokens = None

        counted = _Counted(self, streamer, on_end)
        options: dict[str, Any] = {"streamer": counted}
        if self._converted and (limit is not None or self.model.device.type == "cuda"):
            options = {"custom_generate": graphed, "stream_to": counted}
            options |= {"max_cache_bytes": limit, "on_full": self.limits.on_full}
        if stop is not None:
            options["stopping_criteria"] = StoppingCriteriaList([stop])
        if asked.presence_penalty or asked.frequency_penalty:
            options["logits_processor"] = LogitsProcessorList([CountPenalties(prompt, asked)])
        sequences: torch.Tensor = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            **options,
        )
        return sequences


class OneModel(GenerationState):
    """Gives transformers' handlers the one queue."""

    def __init__(self, manager: OneAtATime) -> None:
        super().__init__()
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """The queue, whatever is asked for."""
        return self.manager
