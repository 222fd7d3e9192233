# SPDX-License-Identifier: Apache-2.0
"""transformers' handlers of chats and completions, with one model, and without the fields that they would ignore."""

import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality

from modelopt_dms.serving.http.gateway import error_body
from modelopt_dms.serving.http.generation import OneAtATime

# What transformers ignores, and what of it changes nothing: other values are refused, not forgotten.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "tool_choice": ("auto",),
    "functions": (),
    "function_call": (),
    "echo": (False,),
}
# What a field must be, in words and as a check; a value that is no such thing would be read as another, or fail late.
_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0 to 100", lambda x: _number(x) and 0 <= x <= 100),
    "top_p": ("a number above 0 and up to 1", lambda x: _number(x) and 0 < x <= 1),
    "frequency_penalty": ("a number above -1", lambda x: _number(x) and x > -1),
    "max_tokens": ("a whole number from 1 on", lambda x: _whole(x) and x >= 1),
    "max_completion_tokens": ("a whole number from 1 on", lambda x: _whole(x) and x >= 1),
    "seed": ("a whole number", lambda x: _whole(x)),
    "stream": ("true or false", lambda x: isinstance(x, bool)),
    "stop": ("a string or a list of strings", lambda x: _strings(x)),
    "logit_bias": ("an object of token ids and numbers", lambda x: _biases(x)),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")


class ServedModel:
    """Stands where transformers' ModelManager stood: holds one model, and neither loads nor drops any."""

    def __init__(self, name: str, manager: OneAtATime) -> None:
        self.name, self.manager = name, manager
        self.force_model = name

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        """Text."""
        return Modality.LLM

    def shutdown(self) -> None:
        """Called by transformers when the server stops; the model stays until the process ends."""


class _OneModel:
    """What both handlers change."""

    model_manager: Any

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response: StreamingResponse = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _as_openai(response.body_iterator)
        return response

    def _resolve_model(
        self, body: dict[str, Any]
    ) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
        served: ServedModel = self.model_manager
        if (asked := body.get("model")) not in (None, served.name):
            raise HTTPException(404, f"model {asked!r} is not served here; served: {served.name!r}")
        return served.name, served.manager.model, served.manager.tokenizer

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)  # type: ignore[misc]
        for field, (words, fits) in _WANTED.items():
            if (given := body.get(field)) is not None and not fits(given):
                raise HTTPException(400, f"{field}={given!r:.100} must be {words}")
        size = self.model_manager.manager.model.get_input_embeddings().num_embeddings
        if unknown := [x for x in body.get("logit_bias") or {} if int(x) >= size]:
            raise HTTPException(
                400, f"logit_bias: the model has no token {unknown[0]}, only {size}"
            )
        for field, accepted in _IGNORED.items():
            if (given := body.get(field)) is not None and given not in accepted:
                words = f"; accepted: {', '.join(map(repr, accepted))}" if accepted else ""
                raise HTTPException(400, f"{field}={given!r} is not supported{words}")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # Seeds are set where a request runs, not while another one does.
        seed = body.pop("seed", None)
        # transformers reads biases of chats only, and refuses whole numbers.
        biases = body.pop("logit_bias", None)
        config: GenerationConfig = super()._build_generation_config(  # type: ignore[misc]
            body, model_generation_config, use_cb=use_cb
        )
        config.request_seed = seed
        if biases:
            config.sequence_bias = {(int(x),): float(bias) for x, bias in biases.items()}
        temperature, top_p = body.get("temperature"), body.get("top_p")
        # transformers leaves sampling off where the model's own settings do not sample.
        if (temperature or 0) > 0 or (temperature is None and top_p is not None):
            config.do_sample = True
        config.num_beams = 1
        return config


class Chats(_OneModel, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, "messages must be a list of at least one message")
        for message in messages:
            _check_message(message)
        template = str(self.model_manager.manager.tokenizer.chat_template)
        if body.get("tools") and "tools" not in template:
            raise HTTPException(400, "tools: the model's chat template does not render them")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """As transformers', with the thinking of earlier answers, which chat templates may render."""
        found = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        for message, parsed in zip(messages, found, strict=True):
            thinking = next((message[x] for x in _REASONING if message.get(x)), None)
            if thinking is not None:
                parsed["reasoning_content"] = thinking
        return found


class Completions(_OneModel, CompletionHandler):
    """`/v1/completions`."""


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _strings(x: Any) -> bool:
    return isinstance(x, str) or (isinstance(x, list) and all(isinstance(y, str) for y in x))


def _biases(x: Any) -> bool:
    return isinstance(x, dict) and all(str(y).isdecimal() and _number(z) for y, z in x.items())


async def _as_openai(chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
    """A stream of events with errors and an end as OpenAI's server writes them; transformers' error is bare text."""
    async for chunk in chunks:
        events = [x for x in str(chunk).split("\n\n") if x]
        yield "".join(f"{_event(x)}\n\n" for x in events)
    yield "data: [DONE]\n\n"


def _event(event: str) -> str:
    if not event.startswith('data: {"error":'):
        return event
    return f"data: {json.dumps(error_body(500, json.loads(event[6:])['error']))}"


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HTTPException(400, f"every message needs a role, got {message!r:.100}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            raise HTTPException(400, f"content of type {kind!r} is not supported; accepted: text")
