# SPDX-License-Identifier: Apache-2.0
"""transformers' handlers of chats and completions, with one model, and without the fields that they would ignore."""

import json
import math
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality

from modelopt_dms.serving.http.answers import streamed_answer, whole_answer
from modelopt_dms.serving.http.decoding import Asked
from modelopt_dms.serving.http.generation import OneAtATime
from modelopt_dms.serving.http.refusals import Refusal

# Fields that are not acted on, and the values of them that ask for nothing: others are refused, not forgotten. What
# only tells OpenAI who asks (user, metadata, ...) may have any.
_INERT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "functions": (),
    "function_call": (),
    "echo": (False,),
    "suffix": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    # transformers': settings of its own in place of the request's.
    "generation_config": (),
}
# What a field must be, in words and as a check; a value that is no such thing would be read as another, or fail late.
_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0 to 100", lambda x: _number(x) and 0 <= x <= 100),
    "top_p": ("a number above 0 and up to 1", lambda x: _number(x) and 0 < x <= 1),
    "frequency_penalty": ("a number from -2 to 2", lambda x: _number(x) and -2 <= x <= 2),
    "presence_penalty": ("a number from -2 to 2", lambda x: _number(x) and -2 <= x <= 2),
    "max_tokens": ("a whole number from 1 on", lambda x: _whole(x) and x >= 1),
    "max_completion_tokens": ("a whole number from 1 on", lambda x: _whole(x) and x >= 1),
    "seed": ("a whole number of 64 bits", lambda x: _whole(x) and -(2**63) <= x < 2**63),
    "stream": ("true or false", lambda x: isinstance(x, bool)),
    "stream_options": (
        "an object with include_usage, true or false",
        lambda x: isinstance(x, dict) and {*x} <= {"include_usage"} and _flags(x.values()),
    ),
    "stop": ("a string or a list of strings, none of them empty", lambda x: _strings(x)),
    "logit_bias": ("an object of token ids and numbers", lambda x: _biases(x)),
    "prompt": ("a string", lambda x: isinstance(x, str)),
    "tools": ("a list of objects", lambda x: isinstance(x, list) and _objects(x)),
    "chat_template_kwargs": ("an object", lambda x: isinstance(x, dict)),
}
_PENALTIES = ("presence_penalty", "frequency_penalty")
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
        response.body_iterator = streamed_answer(response.body_iterator, _asked(args))
        return response

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response: JSONResponse = await super()._non_streaming(*args, **kwargs)  # type: ignore[misc]
        return JSONResponse(whole_answer(bytes(response.body), _asked(args)))

    def _resolve_model(
        self, body: dict[str, Any]
    ) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
        served: ServedModel = self.model_manager
        if (asked := body.get("model")) not in (None, served.name):
            raise Refusal(
                404,
                f"model {asked!r} is not served here; served: {served.name!r}",
                "model",
                "model_not_found",
            )
        return served.name, served.manager.model, served.manager.tokenizer

    def _validate_request(self, body: dict[str, Any]) -> None:
        known: frozenset[str] = self._valid_params_class.__mutable_keys__  # type: ignore[attr-defined]
        if unknown := sorted({*body} - known):
            field = unknown[0]
            raise Refusal(400, f"{field} is no field of this route", field, "unknown_parameter")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refusal(
                400, "the body holds half of a surrogate pair, which is no text"
            ) from None
        for field, (words, fits) in _WANTED.items():
            if (given := body.get(field)) is not None and not fits(given):
                raise Refusal(400, f"{field}={given!r:.100} must be {words}", field)
        for field, accepted in _INERT.items():
            if (given := body.get(field)) is not None and given not in accepted:
                words = f"; accepted: {', '.join(map(repr, accepted))}" if accepted else ""
                raise Refusal(
                    400,
                    f"{field}={given!r:.100} is not supported{words}",
                    field,
                    "unsupported_parameter",
                )
        if body.get("stream_options") is not None and not body.get("stream"):
            raise Refusal(400, "stream_options is only for stream=true", "stream_options")
        size = self.model_manager.manager.model.get_input_embeddings().num_embeddings
        if missing := [x for x in body.get("logit_bias") or {} if int(x) >= size]:
            message = f"logit_bias: the model has no token {missing[0]}, only {size}"
            raise Refusal(400, message, "logit_bias")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # transformers sets seeds while another request runs, ends at stop strings of the prompt, multiplies logits by
        # its penalty, and reads biases of chats only.
        ours = {x: body.pop(x, None) for x in ("seed", "stop", "logit_bias", *_PENALTIES)}
        config: GenerationConfig = super()._build_generation_config(  # type: ignore[misc]
            body, model_generation_config, use_cb=use_cb
        )
        stop = ours["stop"] or ()
        config.asked = Asked(
            seed=ours["seed"],
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            **{x: float(ours[x] or 0.0) for x in _PENALTIES},
        )
        if biases := ours["logit_bias"]:
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
            raise Refusal(400, "messages must be a list of at least one message", "messages")
        for message in messages:
            _check_message(message)
        template = self.model_manager.manager.tokenizer.chat_template
        if not template:
            raise Refusal(400, "this model has no chat template; use /v1/completions", "messages")
        if body.get("tools") and "tools" not in str(template):
            message = "tools: the model's chat template does not render them"
            raise Refusal(400, message, "tools", "unsupported_parameter")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """As transformers', with the thinking of earlier answers, which chat templates may render."""
        found = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        for message, parsed in zip(messages, found, strict=True):
            thinking = next((message[x] for x in _REASONING if message.get(x)), None)
            if thinking is not None:
                parsed["reasoning_content"] = thinking
            if message.get("name") is not None:
                parsed["name"] = message["name"]
        return found


class Completions(_OneModel, CompletionHandler):
    """`/v1/completions`."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        if body.get("prompt") is None:
            raise Refusal(400, "prompt is missing; expected a string", "prompt")
        if body.get("logprobs") is not None:  # 0 asks for those of the tokens themselves
            message = f"logprobs={body['logprobs']!r} is not supported"
            raise Refusal(400, message, "logprobs", "unsupported_parameter")


def _asked(args: tuple[Any, ...]) -> Asked:
    """What a request asked for, of the arguments that transformers' handlers answer it with."""
    return next(x for x in args if isinstance(x, GenerationConfig)).asked


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _flags(values: Any) -> bool:
    return all(isinstance(x, bool) for x in values)


def _objects(values: Any) -> bool:
    return all(isinstance(x, dict) for x in values)


def _strings(x: Any) -> bool:
    found = x if isinstance(x, list) else [x]
    return all(isinstance(y, str) and y for y in found)


def _biases(x: Any) -> bool:
    return isinstance(x, dict) and all(str(y).isdecimal() and _number(z) for y, z in x.items())


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(
            400, f"messages: every message needs a role, got {message!r:.100}", "messages"
        )
    calls = message.get("tool_calls")
    if calls is None:
        message.pop(
            "tool_calls", None
        )  # transformers drops the content of messages that have the key
    elif not isinstance(calls, list) or not all(_is_call(x) for x in calls):
        what = "messages: tool_calls must be a list of {function: {name, arguments}}"
        raise Refusal(400, f"{what}, got {calls!r:.100}", "messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            message = f"messages: content of type {kind!r} is not supported; accepted: text"
            raise Refusal(400, message, "messages")


def _is_call(x: Any) -> bool:
    """Whether it is a tool call, as answers have them and as transformers reads them."""
    call = x.get("function", x) if isinstance(x, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return False
    return isinstance(call.get("arguments"), str | dict)
