# SPDX-License-Identifier: Apache-2.0
"""The OpenAI client asks a running server of a DMS model: one at a time, all at once, and leaving in between."""

import asyncio
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from http_server import NAME, Served, serving

from modelopt_dms.serving.http.gateway import Gateway
from modelopt_dms.serving.http.generation import Limits, OneAtATime
from modelopt_dms.serving.http.listening import ServeError, is_loopback, listen
from modelopt_dms.serving.http.metrics import Metrics
from modelopt_dms.serving.http.server import Options, serve

QUESTIONS = ["def add(a, b):", "x = [1, 2]\n" * 20, "import os", "class A:\n    pass\n" * 8]
# Bytes of a page of every list: 4 layers of 2 KV heads, 64 keys and values of 32 numbers in float32.
PAGE_OF_ALL = 4 * 2 * 64 * 2 * 32 * 4


def chat(served: Served, text: str, tokens: int = 24, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    fields = {"temperature": 0, "max_tokens": tokens, **fields}
    return served.client.chat.completions.create(model=NAME, messages=messages, **fields)


def streamed(served: Served, text: str, tokens: int = 24, **fields: Any) -> str:
    fields["stream_options"] = {"include_usage": True}
    *chunks, last = chat(served, text, tokens, stream=True, **fields)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == tokens
    return "".join(x.choices[0].delta.content or "" for x in chunks)


def expected(parts: tuple[Any, Any], text: str, tokens: int = 24) -> str:
    """What generate answers, without a server."""
    model, tokenizer = parts
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_client_gets_what_generate_gives(served: Served, parts: tuple[Any, Any]) -> None:
    for text in QUESTIONS:
        answer = chat(served, text)
        assert answer.choices[0].message.content == expected(parts, text)
        assert answer.usage.completion_tokens == 24
        assert streamed(served, text) == answer.choices[0].message.content
    done = served.client.completions.create(
        model=NAME, prompt="def f(", max_tokens=8, temperature=0
    )
    model, tokenizer = parts
    ids = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=8)
    assert done.choices[0].text == tokenizer.decode(ids[0, -8:])


def test_chats_at_once_get_the_answers_that_they_get_alone(served: Served) -> None:
    alone = [streamed(served, x, 40) for x in QUESTIONS]
    assert len(set(alone)) == len(alone)
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert list(pool.map(lambda x: streamed(served, x, 40), QUESTIONS)) == alone


def test_seeds_are_those_of_their_own_request(served: Served) -> None:
    def ask(seed: int) -> str:
        return streamed(served, QUESTIONS[seed % 2], temperature=1.0, seed=seed)

    alone = [ask(x) for x in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def leave_while_streaming(served: Served) -> None:
    stream = chat(served, QUESTIONS[0], 3000, stream=True)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()


def leave_while_waiting_for_a_whole_answer(served: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        chat(served, QUESTIONS[0], 3000, timeout=0.5)


def leave_while_others_are_answered(served: Served) -> None:
    first = chat(served, QUESTIONS[0], 3000, stream=True)
    next(first)
    with pytest.raises(openai.APITimeoutError):
        chat(served, QUESTIONS[1], 3000, timeout=0.3)
    first.close()


@pytest.mark.parametrize(
    "leave",
    [
        leave_while_streaming,
        leave_while_waiting_for_a_whole_answer,
        leave_while_others_are_answered,
    ],
)
def test_a_client_that_leaves_neither_blocks_nor_changes_the_next_answer(
    leave: Any, served: Served
) -> None:
    before = streamed(served, QUESTIONS[2])
    tokens = served.metric("modelopt_dms_generated_tokens_total")
    cancelled = served.metric('modelopt_dms_requests_total{outcome="cancelled"}')
    leave(served)
    assert streamed(served, QUESTIONS[2]) == before
    served.wait_until_idle()
    assert served.metric('modelopt_dms_requests_total{outcome="cancelled"}') > cancelled
    assert served.metric("modelopt_dms_generated_tokens_total") - tokens < 2500
    assert served.metric("modelopt_dms_requests_running") == 0
    assert served.metric("modelopt_dms_kv_bytes") == 0


def test_thinking_arrives_as_thinking_and_comes_back(
    served: Served, parts: tuple[Any, Any]
) -> None:
    on = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    whole = chat(served, QUESTIONS[0], **on).choices[0].message
    chunks = [x.choices[0].delta for x in chat(served, QUESTIONS[0], stream=True, **on)]
    thought = "".join(getattr(x, "reasoning_content", None) or "" for x in chunks)
    # Of a whole answer, transformers strips the space around it.
    assert thought.strip() == whole.reasoning_content and not whole.content
    assert not any(x.content for x in chunks)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because of c"},
        {"role": "user", "content": "d"},
    ]
    answer = served.client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    ids = parts[1].apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(ids)


def test_metrics_show_the_cache_of_the_running_request(served: Served) -> None:
    stream = chat(served, "x = 1\n" * 60, 3000, stream=True)
    for _ in range(40):
        next(stream)
    text = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
    found = dict(x.rsplit(" ", 1) for x in text.splitlines() if not x.startswith("#"))
    stream.close()
    served.wait_until_idle()
    assert float(found["modelopt_dms_requests_running"]) == 1
    context = float(found["modelopt_dms_kv_context_tokens"])
    resident = float(found["modelopt_dms_kv_resident_tokens"])
    assert context > 100 and 16 < resident < 0.9 * context
    # Keys and values of 32 numbers in float32, in 4 layers of 2 KV heads, at the least.
    assert float(found["modelopt_dms_kv_bytes"]) >= resident * 4 * 2 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "gpt-4"}, "model 'gpt-4' is not served here; served: 'embedded-dms'"),
        ({"n": 2}, "n=2 is not supported; accepted: 1"),
        ({"logprobs": True}, "logprobs=True is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number from 1 on"),
        ({"max_tokens": 2.7}, "max_tokens=2.7 must be a whole number"),
        ({"top_p": 5}, "top_p=5 must be a number above 0 and up to 1"),
        ({"temperature": -1}, "temperature=-1 must be a number from 0"),
        ({"frequency_penalty": 3}, "frequency_penalty=3 must be a number from -2 to 2"),
        ({"presence_penalty": "x"}, "presence_penalty='x' must be a number from -2 to 2"),
        ({"stop": 7}, "stop=7 must be a string or a list of strings"),
        ({"logit_bias": {"x": 1}}, "logit_bias={'x': 1} must be an object of token ids"),
        ({"logit_bias": {"999999": 1}}, "logit_bias: the model has no token 999999"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": [{"content": "x"}]}, "messages: every message needs a role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "content of type 'image_url' is not supported; accepted: text",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            "and this model reads and writes 4096 in all",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    fields: dict[str, Any], message: str, served: Served
) -> None:
    words = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    with pytest.raises(openai.APIStatusError) as refused:
        served.client.chat.completions.create(**{**words, **fields})
    assert refused.value.status_code in (400, 404)
    assert message in str(refused.value.body["message"])


def test_a_bias_moves_chats_and_completions_alike(served: Served) -> None:
    forced = {"logit_bias": {"77": 100}, "max_tokens": 3, "temperature": 0}
    text = served.manager.tokenizer.decode([77] * 3)
    said = served.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], **forced
    )
    assert said.choices[0].message.content == text
    assert (
        served.client.completions.create(model=NAME, prompt="x", **forced).choices[0].text == text
    )


def test_an_answer_ends_where_the_model_does(served: Served) -> None:
    served.manager.max_length, before = 64, served.manager.max_length
    try:
        answer = chat(served, "x", 500)
    finally:
        served.manager.max_length = before
    assert answer.usage.total_tokens == 64 and answer.choices[0].finish_reason == "length"


def test_requests_that_find_no_place_to_wait_are_told_so(parts: tuple[Any, Any]) -> None:
    with serving(*parts, Limits(max_waiting=1)) as served:
        streams = [chat(served, "x", 2000, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
            chat(served, "x")
        for x in streams:
            x.close()
        served.wait_until_idle()
        assert chat(served, "x", 4).usage.completion_tokens == 4


def test_a_key_is_asked_for_everywhere_but_at_health(parts: tuple[Any, Any]) -> None:
    with serving(*parts, api_key="secret") as served:
        assert chat(served, "x", 2).usage.completion_tokens == 2
        wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="other", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
            wrong.models.list()
        wrong.close()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{served.url}/metrics")
        assert urllib.request.urlopen(f"{served.url}/health").status == 200


def test_a_request_that_is_too_large_is_not_read() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was read")

    sent: list[Any] = []
    parts = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 3

    async def receive() -> Any:
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "headers": []}
    asyncio.run(Gateway(application, most_bytes=100)(scope, receive, send))
    assert len(parts) == 1 and sent[0]["status"] == 413


def test_a_cache_that_is_full_ends_its_request_and_no_other(parts: tuple[Any, Any]) -> None:
    long = "x = 1\n" * 90
    with serving(*parts, Limits(max_cache_bytes=2 * PAGE_OF_ALL)) as served:
        before = streamed(served, QUESTIONS[0])
        assert before == expected(parts, QUESTIONS[0])
        with pytest.raises(openai.APIStatusError, match="ran out of pages") as full:
            chat(served, long)
        assert full.value.status_code == 507
        with pytest.raises(openai.APIError, match="ran out of pages"):
            streamed(served, long)
        assert streamed(served, QUESTIONS[0]) == before
        assert served.metric('modelopt_dms_requests_total{outcome="failed"}') == 2
        assert served.metric("modelopt_dms_kv_bytes_peak") == 2 * PAGE_OF_ALL


def test_a_cache_that_may_evict_answers_within_its_bytes(parts: tuple[Any, Any]) -> None:
    limits = Limits(max_cache_bytes=3 * PAGE_OF_ALL, on_full="evict")
    with serving(*parts, limits) as served:
        assert streamed(served, QUESTIONS[0]) == expected(parts, QUESTIONS[0])
        assert chat(served, "x = 1\n" * 90).usage.completion_tokens == 24
        assert served.metric("modelopt_dms_kv_bytes_peak") == 3 * PAGE_OF_ALL


def test_a_cache_too_small_for_anything_is_refused_before_serving(parts: tuple[Any, Any]) -> None:
    limits = Limits(max_cache_bytes=1000)
    with pytest.raises(ValueError, match="max_cache_bytes=1000 is 0 pages"):
        serve(*parts, listen("127.0.0.1", 0), Options(NAME, limits))


def test_a_plain_model_has_no_cache_to_limit(parts: tuple[Any, Any]) -> None:
    plain = type(parts[0])(parts[0].config)
    with pytest.raises(ServeError, match="this one has no gates"):
        OneAtATime(plain, parts[1], Limits(max_cache_bytes=1 << 20), Metrics(1 << 20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(
    number: int, parts: tuple[Any, Any], served: Served
) -> None:
    """The server has the main thread, as in the command."""
    alone = streamed(served, QUESTIONS[0], 64)
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    answers: list[str] = []

    def client() -> None:
        asks = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": 64, "stream": True}
        text = ""
        for i, x in enumerate(
            asks.chat.completions.create(model=NAME, messages=messages, **fields)
        ):
            if i == 3:
                os.kill(os.getpid(), number)
            text += x.choices[0].delta.content or ""
        answers.append(text)
        asks.close()

    thread = threading.Thread(target=client)
    assert serve(*parts, listening, Options(NAME), on_ready=thread.start)
    thread.join()
    assert answers == [alone]
    with pytest.raises(OSError):
        socket.create_connection(listening.getsockname(), timeout=1)


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        assert is_loopback(first)
        port = first.getsockname()[1]
        with pytest.raises(ServeError, match=f"127.0.0.1:{port} is taken by another program"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port):
        pass
    with pytest.raises(ServeError, match="must be 0"):
        listen("127.0.0.1", 70000)
    with pytest.raises(ServeError, match="cannot be resolved"):
        listen("no.such.host.invalid", 0)
    with listen("0.0.0.0", 0) as everywhere:
        assert not is_loopback(everywhere)
