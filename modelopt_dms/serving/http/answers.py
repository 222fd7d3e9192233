# SPDX-License-Identifier: Apache-2.0
"""Answers of transformers' handlers -> OpenAI's: without stop strings, with usage where it was asked for."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from modelopt_dms.serving.http.decoding import Asked, StopCut
from modelopt_dms.serving.http.refusals import error_body


def whole_answer(body: bytes, asked: Asked) -> dict[str, Any]:
    """The JSON of an answer that is sent as a whole."""
    found: dict[str, Any] = json.loads(body)
    for choice in found["choices"]:
        place, key = _text_of(choice)
        if isinstance(place.get(key), str):
            cut = StopCut(asked.stop)
            place[key] = cut.feed(place[key]) + cut.rest()
    return found


async def streamed_answer(chunks: AsyncIterator[Any], asked: Asked) -> AsyncIterator[str]:
    """A stream of server-sent events, each whole, with errors and an end as OpenAI's server writes them."""
    cut = StopCut(asked.stop)
    async for chunk in chunks:
        events = [x.removeprefix("data: ") for x in str(chunk).split("\n\n") if x]
        lines = [json.dumps(x) for event in events for x in _events(json.loads(event), cut, asked)]
        if lines:
            yield "".join(f"data: {x}\n\n" for x in lines)
    yield "data: [DONE]\n\n"


def _events(event: dict[str, Any], cut: StopCut, asked: Asked) -> Iterator[dict[str, Any]]:
    """What becomes of one event."""
    if "error" in event:  # transformers' is bare text
        yield error_body(500, event["error"])
        return
    usage = event.pop("usage", None)
    choice = event["choices"][0]
    place, key = _text_of(choice)
    ends = choice.get("finish_reason") is not None
    if isinstance(piece := place.get(key), str):
        place[key] = cut.feed(piece) + (cut.rest() if ends else "")
    elif ends and (held := cut.rest()):
        place[key] = held
    held_back = place.get(key) == "" and (place is choice or len(place) == 1)
    if ends or not held_back:
        yield event
    if usage is not None and asked.include_usage:
        yield {**event, "choices": [], "usage": usage}


def _text_of(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where the text of a choice is: of a chat, of a chunk of one, of a completion."""
    for name in ("delta", "message"):
        if name in choice:
            return choice[name], "content"
    return choice, "text"
