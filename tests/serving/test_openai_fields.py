# SPDX-License-Identifier: Apache-2.0
"""Fields of requests do what OpenAI says they do, or are refused by name in OpenAI's form of an error."""

import json
import logging
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from http_server import NAME, Served, serving

from modelopt_dms.serving.http.decoding import StopCut, StopInAnswer

PROMPT = "def add(a, b):\n    return"


def complete(served: Served, tokens: int = 24, prompt: str = PROMPT, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": tokens, **fields}
    return served.client.completions.create(model=NAME, prompt=prompt, **fields)


def ids_with_penalties(parts: Any, tokens: int, presence: float, frequency: float) -> list[int]:
    """Greedy decoding by OpenAI's formula, written out with dense forwards of the same model."""
    model, tokenizer = parts
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    answer: list[int] = []
    for _ in range(tokens):
        whole = torch.cat([ids, torch.tensor([answer], dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(whole).logits[0, -1].double()
        for token in {*answer}:
            logits[token] -= frequency * answer.count(token) + presence
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.9), (-0.5, 1.2)])
def test_penalties_are_taken_from_logits_by_counts_in_the_answer(
    presence: float, frequency: float, served: Served, parts: tuple[Any, Any]
) -> None:
    fields = {"presence_penalty": presence, "frequency_penalty": frequency}
    expected = parts[1].decode(ids_with_penalties(parts, 24, presence, frequency))
    assert complete(served, **fields).choices[0].text == expected
    assert complete(served).choices[0].text != expected
    streamed = "".join(x.choices[0].text for x in complete(served, stream=True, **fields))
    assert streamed == expected


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(served: Served) -> None:
    text = complete(served).choices[0].text
    stop = text[9:12]
    assert text.find(stop) > 0
    for fields in ({"stop": stop}, {"stop": ["never said", stop]}):
        answer = complete(served, **fields)
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(complete(served, stream=True, **fields))
        assert "".join(x.choices[0].text for x in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 24
    said = (
        served.client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x"}], temperature=0, max_tokens=24
        )
        .choices[0]
        .message.content
    )
    cut = (
        served.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "x"}],
            temperature=0,
            max_tokens=24,
            stop=[said[6:8]],
        )
        .choices[0]
        .message.content
    )
    assert cut == said[: said.index(said[6:8])]


def test_an_answer_that_ends_at_its_last_token_says_stop(served: Served, parts: Any) -> None:
    text = complete(served).choices[0].text
    tokens = complete(served, stop=text[9:12]).usage.completion_tokens
    whole = complete(served, tokens, stop=text[9:12])
    assert whole.usage.completion_tokens == tokens and whole.choices[0].finish_reason == "stop"
    assert complete(served, tokens).choices[0].finish_reason == "length"
    last = list(complete(served, tokens, stop=text[9:12], stream=True))[-1]
    assert last.choices[0].finish_reason == "stop"


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_an_answer(parts: Any) -> None:
    ids = parts[1](PROMPT, return_tensors="pt")["input_ids"]
    last_two = (parts[1].decode(ids[0, -2:]),)
    # The last token is the answer's, the one before it the prompt's.
    assert not StopInAnswer(parts[1], ids.shape[1] - 1, last_two)(ids, None).item()
    assert StopInAnswer(parts[1], ids.shape[1] - 2, last_two)(ids, None).item()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("stop", [("<end>",), ("ab", "bcd"), ("zz",), ("e",)])
def test_a_text_cut_piece_by_piece_is_the_text_cut_at_once(size: int, stop: Any) -> None:
    text = "some <en <e <end> abcd"
    cut = StopCut(stop)
    shown = [cut.feed(text[i : i + size]) for i in range(0, len(text), size)]
    first = min((at for x in stop if (at := text.find(x)) >= 0), default=len(text))
    assert "".join(shown) + cut.rest() == text[:first]


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(served: Served) -> None:
    assert not any(x.usage for x in complete(served, stream=True))
    *chunks, last = complete(served, stream=True, stream_options={"include_usage": True})
    assert not any(x.usage for x in chunks) and last.choices == []
    assert last.usage == complete(served).usage


def test_the_newer_name_of_max_tokens_is_known(served: Served) -> None:
    words = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    answer = served.client.chat.completions.create(**words, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({**CHAT, "n": 2}, "n", "unsupported_parameter"),
        ({**CHAT, "logprobs": True}, "logprobs", "unsupported_parameter"),
        ({**CHAT, "top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({**CHAT, "tools": "x"}, "tools", None),
        ({**CHAT, "tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({**CHAT, "reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({**CHAT, "generation_config": "{}"}, "generation_config", "unsupported_parameter"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options", None),
        ({**CHAT, "stop": ["a", ""]}, "stop", None),
        ({**CHAT, "seed": 2**64}, "seed", None),
        ({**CHAT, "top_k": 5}, "top_k", "unknown_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "messages", None),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": ["a", "b"]}, "prompt", None),
        ({"prompt": "a\ud800"}, None, None),
        ({}, "prompt", None),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_and_the_field_is_named(
    fields: dict[str, Any], param: str | None, code: str | None, served: Served
) -> None:
    route = "chat/completions" if "messages" in fields else "completions"
    body = json.dumps({"model": NAME, "max_tokens": 2, **fields}).encode()
    status, error = post(served, f"/v1/{route}", body)
    assert status == 400 and (error["param"], error["code"]) == (param, code)
    assert param is None or param in error["message"]


def post(served: Served, path: str, body: bytes, kind: str = "application/json") -> Any:
    """Status and error of a request that no client would send."""
    request = urllib.request.Request(served.url + path, body, {"content-type": kind})
    with pytest.raises(urllib.error.HTTPError) as failed:
        urllib.request.urlopen(request)
    error = json.loads(failed.value.read())["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert error["type"] == (
        "server_error" if failed.value.code >= 500 else "invalid_request_error"
    )
    return failed.value.code, error


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        ("/v1/completions", b"{bad", "application/json", 400, "at character 1"),
        ("/v1/completions", b"\xff\xfe", "application/json", 400, "must be a JSON object"),
        ("/v1/completions", b"[1]", "application/json", 400, "got [1]"),
        ("/v1/completions", b"", "application/json", 400, "it is empty"),
        ("/v1/completions", b"{}", "text/plain", 400, "Content-Type must be application/json"),
        ("/v1/nothing", b"{}", "application/json", 404, "Not Found"),
        ("/health", b"{}", "application/json", 405, "Method Not Allowed"),
    ],
)
def test_every_error_has_the_form_of_openai(
    path: str, body: bytes, kind: str, status: int, message: str, served: Served
) -> None:
    found, error = post(served, path, body, kind)
    assert found == status and message in error["message"]


def test_an_error_that_nobody_foresaw_has_it_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(served.manager, "_admit", fail)
    body = json.dumps({"model": NAME, "prompt": "x"}).encode()
    assert post(served, "/v1/completions", body) == (
        500,
        {"message": "KeyError: 'surprise'", "type": "server_error", "param": None, "code": None},
    )


def test_a_chat_template_that_refuses_is_a_mistake_of_the_request(served: Served) -> None:
    tokenizer = served.manager.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        body = json.dumps({"model": NAME, **CHAT}).encode()
        status, error = post(served, "/v1/chat/completions", body)
    finally:
        tokenizer.chat_template = before
    assert status == 400 and "refuses these messages: roles must alternate" in error["message"]


def test_requests_that_do_not_end_before_the_server_are_told_so(
    parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(*parts, grace=1) as served, ThreadPoolExecutor(1) as pool:
        stream = complete(served, 3900, stream=True)
        next(iter(stream))
        waits = pool.submit(complete, served, 3900)
        while served.metric("modelopt_dms_requests_waiting") < 1:
            time.sleep(0.05)
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            waits.result()
    assert not [x for x in caplog.records if "Exception in ASGI" in x.getMessage()]


def test_clients_that_leave_log_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            stream = complete(served, 3000, stream=True)
            next(iter(stream))
            stream.close()
            with pytest.raises(openai.APITimeoutError):
                complete(served, 3000, timeout=0.3)
        served.wait_until_idle()
        time.sleep(0.2)
    assert not [x for x in caplog.records if x.name in ("asyncio", "uvicorn.error")]
