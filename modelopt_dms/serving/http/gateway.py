# SPDX-License-Identifier: Apache-2.0
"""What every request passes first: the key, the size of its body, and the end of its work when the client leaves."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextvars import ContextVar
from typing import Any

from modelopt_dms.serving.http.refusals import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Coroutine[Any, Any, None]]

MOST_BYTES = 16 << 20
# What a load balancer asks without a key.
_OPEN = ("/health",)
_STOPPING = "the server is stopping, and this request was not done in time"
# What ends the work of the request that is handled.
_ENDS: ContextVar[list[Callable[[], None]] | None] = ContextVar("ends", default=None)


def when_gone(end: Callable[[], None]) -> None:
    """Have something called once the request that is handled is over, answered or left by its client."""
    ends = _ENDS.get()
    if ends is not None:
        ends.append(end)


class Gateway:
    """An ASGI application around another one."""

    def __init__(self, app: App, api_key: str | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.app, self.api_key, self.most_bytes = app, api_key, most_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on, if it may pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._may_pass(scope):
            await refuse(send, 401, "a valid key is needed: Authorization: Bearer KEY")
            return
        body = bytearray()
        more = True
        while more:
            try:
                message = await receive()
            except asyncio.CancelledError:
                await refuse(send, 503, _STOPPING)
                return
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_bytes:
                await refuse(send, 413, f"a request may have {self.most_bytes} bytes")
                return
        await self._run(scope, bytes(body), receive, send)

    async def _run(self, scope: Any, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application on a body until it is done or the client has left, which ends it."""
        given = False
        never = asyncio.Event()

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await never.wait()
            return {"type": "http.disconnect"}

        ends: list[Callable[[], None]] = []
        _ENDS.set(ends)
        answer = _Answer(send)
        work = asyncio.create_task(self.app(scope, replay, answer.send))
        left = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            gone = left.done()
        except asyncio.CancelledError:
            # The server stops, and has waited as long as it may. uvicorn would log this as an error of ours.
            gone = True
            await answer.break_off()
        finally:
            left.cancel()
            work.cancel()
            for end in ends:
                end()
        if not gone:
            work.result()
            return
        # However the work ends now, nobody waits for it; an error that is not looked at would be logged.
        work.add_done_callback(lambda x: x.cancelled() or x.exception())
        # A server that stops cancels all tasks that are left, and uvicorn would log that too.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})

    def _may_pass(self, scope: Any) -> bool:
        if self.api_key is None or scope["path"] in _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.api_key}".encode())


class _Answer:
    """What is sent to a client, and how it is told that no more will come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = self._streams = self._ended = False

    async def send(self, message: Message) -> None:
        """Pass a message on; nothing follows an answer that was broken off."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._streams = b"text/event-stream" in dict(message["headers"]).get(
                b"content-type", b""
            )
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def break_off(self) -> None:
        """Status 503, or an error as the last event of a stream."""
        if self._ended:
            return
        self._ended = True
        if not self._started:
            await refuse(self._send, 503, _STOPPING)
        elif self._streams:
            event = f"data: {json.dumps(error_body(503, _STOPPING))}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error as OpenAI's server writes it."""
    content = json.dumps(error_body(status, message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
