# SPDX-License-Identifier: Apache-2.0
"""vLLM's server in a process of its own on 127.0.0.1, clients that stream answers from it, and its counters."""

import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 64
MINUTES = 40  # of one server


@dataclass
class Chat:
    """A client, and what it was sent."""

    port: int
    prompt: str
    tokens: int
    leaves_after: int | None = None
    pieces: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    status: str = "not started"

    def run(self) -> None:
        """Stream one answer."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=MINUTES * 60)
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        link.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = link.getresponse()
        self.status = "cut off" if answer.status == 200 else f"refused: {answer.status}"
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                self.status = "finished"
                break
            event = json.loads(line[6:])
            if not event["choices"]:  # the last one
                self.prompt_tokens = event["usage"]["prompt_tokens"]
                continue
            self.pieces.append(event["choices"][0]["delta"].get("content") or "")
            if self.leaves_after is not None and len(self.pieces) >= self.leaves_after:
                self.status = "left"
                break
        link.close()

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)


def metrics(port: int) -> dict[str, float]:
    """VLLM's own counters, summed over labels."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request("GET", "/metrics")
    found: dict[str, float] = {}
    for line in link.getresponse().read().decode().splitlines():
        if line.startswith("vllm:"):
            name = line.split("{")[0].split(" ")[0]
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    link.close()
    return found


class Watch(threading.Thread):
    """Looks at a server's counters until it is stopped."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.usage = 0.0
        self.running: list[int] = []
        self.while_others_wait: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Remember what runs, and the most blocks in use."""
        while not self.over.wait(0.3):
            now = metrics(self.port)
            running = int(now["vllm:num_requests_running"])
            self.running.append(running)
            if now["vllm:num_requests_waiting"]:
                self.while_others_wait.append(running)
            self.usage = max(self.usage, now["vllm:kv_cache_usage_perc"])


def resident_megabytes(root: int) -> float:
    """Of a process and all its descendants, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(stat.parent.name)] = int(after_name[1])
    family: set[int] = set()
    found = {root}
    while found:
        family |= found
        found = {child for child, parent in parents.items() if parent in family} - family
    pages = 0
    for process in family:
        with suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


@dataclass(frozen=True)
class Settings:
    """How a server is started.

    Attributes:
        python: vLLM's interpreter.
        blocks: of the pool, one of them unused.
        chunk: tokens of a step at the most.
        length: of a request at the most.
        extra: more options of vLLM.
    """

    python: str
    blocks: int
    chunk: int
    length: int
    extra: tuple[str, ...] = ()


@contextmanager
def server(settings: Settings, model: Path, log: Path) -> Iterator[tuple[int, int]]:
    """VLLM's server on a free port; its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    options = {
        "model": model,
        "served-model-name": "model",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "block-size": BLOCK,
        "num-gpu-blocks-override": settings.blocks,
        "max-num-batched-tokens": settings.chunk,
        "max-num-seqs": 40,
        "max-model-len": settings.length,
    }
    command = [settings.python, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--enforce-eager", "--no-enable-prefix-caching", *settings.extra]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            wait_for(process, port, log)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(timeout=120)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: it ended, or does not start.
    """
    until = time.monotonic() + MINUTES * 60
    while process.poll() is None and time.monotonic() < until:
        try:
            metrics(port)
            return
        except OSError:
            time.sleep(2)
    raise RuntimeError(f"vLLM did not start: {log.read_text(encoding='utf-8')[-2000:]}")
