# SPDX-License-Identifier: Apache-2.0
"""Streaming chats of ragged length on vLLM for CPUs, over loopback: dense and DMS in pools of the same bytes.

    make test-vllm    # sets up .venv-vllm
    python benchmarks/serving.py --model smollm2-cr4 --output benchmarks/results/vllm_chats.json

Both serve the same weights: the dense model is the DMS model without its gates. Every prompt is sent twice, by two
clients at a time, so that answers that were mixed up would differ. One client more leaves in the middle of its answer.
All requests are bounded in number and time; nothing but 127.0.0.1 is spoken to. Counts hold on any machine; seconds are
those of the machine, and of what else ran on it.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine, write
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 64
MINUTES = 20  # of one server
FIELDS = ("dms_config", "dms_curve", "fusion_config", "quantization_config")


def dense_twin(model: Path, place: Path) -> Path:
    """The model without its gates, as any engine reads it."""
    place.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, place)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in FIELDS}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(model / "model.safetensors")
    weights = {name: x for name, x in weights.items() if ".dms_gate." not in name}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def prompts(count: int) -> list[str]:
    """Parts of this repository's documentation, of 250 to 900 tokens or so."""
    text = "\n".join(x.read_text(encoding="utf-8") for x in sorted((ROOT / "docs").glob("*.md")))
    parts, at = [], 0
    for i in range(count):
        length = 900 + 1500 * (i * 7 % count) // count
        parts.append("Summarize this:\n" + text[at : at + length])
        at = (at + length) % (len(text) - 4000)
    return parts


@dataclass
class Chat:
    """A client, and what it was sent."""

    port: int
    prompt: str
    tokens: int
    leaves_after: int | None = None
    pieces: list[str] = field(default_factory=list)
    seconds: float = 0.0
    status: str = "not started"

    def run(self) -> None:
        """Stream one answer."""
        start = time.perf_counter()
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=MINUTES * 60)
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
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
            delta = json.loads(line[6:])["choices"][0]["delta"]
            self.pieces.append(delta.get("content") or "")
            if self.leaves_after is not None and len(self.pieces) >= self.leaves_after:
                self.status = "left"
                break
        link.close()
        self.seconds = time.perf_counter() - start

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
        self.running = self.usage = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        """Remember the most of each."""
        while not self.over.wait(0.3):
            now = metrics(self.port)
            self.running = max(self.running, now["vllm:num_requests_running"])
            self.usage = max(self.usage, now["vllm:kv_cache_usage_perc"])


@contextmanager
def server(python: str, model: Path, blocks: int, log: Path) -> Iterator[int]:
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
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)]
    command += ["--num-gpu-blocks-override", str(blocks), "--no-enable-prefix-caching"]
    command += [
        "--max-num-batched-tokens",
        "512",
        "--max-num-seqs",
        "40",
        "--max-model-len",
        "1536",
    ]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            wait_for(process, port, log)
            yield port
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


def load(port: int, texts: list[str], tokens: int) -> dict[str, Any]:
    """All chats at once, each text twice, and one that leaves."""
    chats = [Chat(port, x, tokens) for x in (*texts, *texts)]
    leaver = Chat(port, texts[0], 10 * tokens, leaves_after=3)
    watch = Watch(port)
    watch.start()
    start = time.perf_counter()
    threads = [threading.Thread(target=x.run, daemon=True) for x in (*chats, leaver)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MINUTES * 60)
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    until = time.monotonic() + 30
    while metrics(port)["vllm:kv_cache_usage_perc"] and time.monotonic() < until:
        time.sleep(0.5)
    after = metrics(port)
    pairs = zip(chats[: len(texts)], chats[len(texts) :], strict=True)
    return {
        "chats": len(chats),
        "finished": sum(x.status == "finished" for x in chats),
        "same_answer_twice": sum(a.text == b.text for a, b in pairs),
        "others": sorted({x.status for x in chats} - {"finished"}),
        "left": leaver.status == "left",
        "blocks_in_use_after": after["vllm:kv_cache_usage_perc"],
        "most_running": int(watch.running),
        "peak_usage": round(watch.usage, 3),
        "preemptions": int(after["vllm:num_preemptions_total"]),
        "prompt_tokens": int(after["vllm:prompt_tokens_total"]),
        "tokens": len(chats) * tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(len(chats) * tokens / seconds, 2),
    }


def main() -> None:
    """Both servers, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"))
    parser.add_argument("--model", type=Path, required=True, help="a DMS directory")
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--blocks", type=int, default=65, help=f"of {BLOCK} tokens, one unused")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.chats < 2 or options.chats % 2:
        parser.error(f"--chats {options.chats} must be even: every text is sent twice")
    texts = prompts(options.chats // 2)
    content: dict[str, Any] = {"machine": {**machine(), "note": options.note}}
    content["settings"] = {"blocks": options.blocks, "block_tokens": BLOCK, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = {"dms": options.model, "dense": dense_twin(options.model, place / "dense")}
        for name, model in models.items():
            with server(options.python, model, options.blocks, place / f"{name}.log") as port:
                content[name] = load(port, texts, options.tokens)
            print(name, content[name], flush=True)
            write(options.output, content)


if __name__ == "__main__":
    main()
