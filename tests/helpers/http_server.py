# SPDX-License-Identifier: Apache-2.0
"""A server of the embedded model, with gates that evict, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn
from families import open_gates

import modelopt_dms as dms
from modelopt_dms.serving.http.gateway import Gateway
from modelopt_dms.serving.http.generation import Limits, OneAtATime
from modelopt_dms.serving.http.listening import listen
from modelopt_dms.serving.http.metrics import Metrics
from modelopt_dms.serving.http.server import _Server, build_app

NAME = "embedded-dms"
WINDOW = 16
# As Qwen3's, in short: the thinking of earlier answers is rendered, and thinking can be switched on.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


@dataclass
class Served:
    """A running server, what is behind it, and a client."""

    url: str
    client: openai.OpenAI
    manager: OneAtATime
    server: Any

    def metric(self, line: str) -> float:
        """The number on a line of /metrics."""
        text = self.manager.metrics.text().decode()
        return next(float(x.split()[-1]) for x in text.splitlines() if x.startswith(f"{line} "))

    def wait_until_idle(self) -> None:
        """Return when nothing runs or waits; a client that has left is noticed a moment later."""
        for _ in range(600):
            if not self.manager._unfinished:
                return
            time.sleep(0.05)
        raise AssertionError("requests did not end")


def model_and_tokenizer() -> tuple[Any, Any]:
    """The embedded model with gates that mark half of the tokens, and a chat template."""
    model, tokenizer = dms.load_base("embedded")
    dms.apply_dms(model, {"window": WINDOW, "scale": 10.0})
    open_gates(model, fraction=0.5)
    tokenizer.chat_template = TEMPLATE
    # Answers as long as they are asked for.
    model.generation_config.eos_token_id = None
    return model, tokenizer


@contextmanager
def serving(
    model: Any,
    tokenizer: Any,
    limits: Limits | None = None,
    api_key: str | None = None,
    grace: int = 5,
) -> Iterator[Served]:
    """A server on a free port, until the block ends."""
    limits = limits or Limits()
    manager = OneAtATime(model, tokenizer, limits, Metrics(limits.max_cache_bytes))
    manager.warm_up()
    listening = listen("127.0.0.1", 0)
    app = Gateway(build_app(NAME, manager), api_key)
    server = _Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=grace))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
    try:
        yield Served(url, client, manager, server)
    finally:
        client.close()
        server.should_exit = True
        thread.join()
        assert manager.stop()
