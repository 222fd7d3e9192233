# SPDX-License-Identifier: Apache-2.0
"""transformers' server with one model, put together and run until a signal ends it."""

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.server import build_server
from transformers.utils import logging

from modelopt_dms.serving.http.gateway import Gateway
from modelopt_dms.serving.http.generation import Limits, OneAtATime, OneModel
from modelopt_dms.serving.http.handlers import Chats, Completions, ServedModel
from modelopt_dms.serving.http.metrics import Metrics
from modelopt_dms.serving.http.refusals import answer_errors

# Of transformers' routes, those that are about a model that is here. Others load or drop models.
_KEPT = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Options:
    """How a server is run.

    Attributes:
        name: of the model, as clients ask for it.
        limits: of requests.
        api_key: that clients must give; None is none.
        grace: seconds that requests have to finish once a signal has come.
    """

    name: str
    limits: Limits = Limits()
    api_key: str | None = None
    grace: int = 30


# For requests that are cut to answer that they were.
_CUT_SECONDS = 5.0


class _Server(uvicorn.Server):
    """Ends when a signal has come, as everybody expects, without raising the signal once more."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; requests that are cut answer, and the application ends, before the loop does.

        uvicorn leaves both to the end of the loop, which cancels them again and in the middle: tracebacks. A second
        Ctrl-C cuts the requests at once.
        """
        await super().shutdown(sockets)
        left = set(self.server_state.tasks)
        if self.force_exit:
            for task in left:
                task.cancel()
        if left:
            await asyncio.wait(left, timeout=_CUT_SECONDS)
        if self.force_exit:
            await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {x: signal.signal(x, self.handle_exit) for x in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    listening: socket.socket,
    options: Options,
    on_ready: Any = lambda: None,
) -> bool:
    """Answer requests until SIGINT or SIGTERM; whether all that ran then came to an end.

    Args:
        model: in eval mode.
        tokenizer: its own, a fast one.
        listening: see `listening.listen`.
        options: see there.
        on_ready: called once the first request could be answered.

    Raises:
        ServeError: the model cannot be served so.
        ValueError: the limits let no request through.
    """
    logging.set_verbosity_error()
    manager = OneAtATime(model, tokenizer, options.limits, Metrics(options.limits.max_cache_bytes))
    manager.warm_up()
    app = Gateway(build_app(options.name, manager), options.api_key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=options.grace
    )
    on_ready()
    _Server(config).run(sockets=[listening])
    return manager.stop()


def build_app(name: str, manager: OneAtATime) -> FastAPI:
    """Transformers' application, with our handlers, `/health`, `/metrics`, and the list of one model."""
    served, state = ServedModel(name, manager), OneModel(manager)
    chats = Chats(model_manager=served, generation_state=state)
    completions = Completions(model_manager=served, generation_state=state)
    others: Any = None
    app = build_server(
        served,
        chats,
        completion_handler=completions,
        response_handler=others,
        transcription_handler=others,
        systemone_handler=others,
        generation_state=state,
    )
    app.router.routes[:] = [x for x in app.router.routes if getattr(x, "path", "") in _KEPT]

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "modelopt_dms"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    def health() -> JSONResponse:
        alive = manager.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(
            manager.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    answer_errors(app)
    return app
