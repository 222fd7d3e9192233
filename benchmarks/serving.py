# SPDX-License-Identifier: Apache-2.0
r"""Streaming chats of ragged length on vLLM for CPUs, over loopback: dense and DMS in pools of the same bytes.

    make test-vllm    # sets up .venv-vllm
    python benchmarks/serving.py --models dms=smollm2-cr4 --output benchmarks/results/vllm_chats.json
    python benchmarks/serving.py --models cr4=smollm2-cr4 cr8=smollm2-cr8 --chats 26 --tokens 96 --blocks 113 \
        --chunk 256 --characters 3000 8700 --output benchmarks/results/vllm_long_chats.json
    python benchmarks/serving.py --models dms=smollm2-cr4 --no-dense --rounds 6 --characters 300 900 --tokens 16 \
        --leavers 8 --output benchmarks/results/vllm_memory.json

All serve the same weights: the dense model is the first DMS model without its gates. Every prompt is sent twice, by two
clients at a time, so that answers that were mixed up would differ. More clients leave in the middle of their answer.
With --rounds, all of them come again, and memory is looked at after each round. All requests are bounded in number and
time; nothing but 127.0.0.1 is spoken to. Counts hold on any machine; seconds are those of the machine, and of what else
ran on it.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import machine, write
from safetensors.torch import load_file, save_file
from vllm_server import BLOCK, MINUTES, Chat, Settings, Watch, metrics, resident_megabytes, server

ROOT = Path(__file__).resolve().parents[1]
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


def prompts(count: int, shortest: int, longest: int) -> list[str]:
    """Parts of this repository's documentation, of so many characters; a token has about three."""
    text = "\n".join(x.read_text(encoding="utf-8") for x in sorted((ROOT / "docs").glob("*.md")))
    parts, at = [], 0
    for i in range(count):
        length = shortest + (longest - shortest) * (i * 7 % count) // max(count - 1, 1)
        parts.append("Summarize this:\n" + text[at : at + length])
        at = (at + length) % (len(text) - longest)
    return parts


def load(port: int, texts: list[str], tokens: int, leavers: int) -> dict[str, Any]:
    """All chats at once, each text twice, and some that leave."""
    before = metrics(port)
    chats = [Chat(port, x, tokens) for x in (*texts, *texts)]
    gone = [Chat(port, texts[i % len(texts)], 10 * tokens, leaves_after=3) for i in range(leavers)]
    watch = Watch(port)
    watch.start()
    start = time.perf_counter()
    threads = [threading.Thread(target=x.run, daemon=True) for x in (*chats, *gone)]
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
    counted = {x: int(after[f"vllm:{x}_total"] - before[f"vllm:{x}_total"]) for x in COUNTERS}
    pairs = zip(chats[: len(texts)], chats[len(texts) :], strict=True)
    waited = watch.while_others_wait
    return {
        "chats": len(chats),
        "finished": sum(x.status == "finished" for x in chats),
        "same_answer_twice": sum(a.text == b.text for a, b in pairs),
        "others": sorted({x.status for x in chats} - {"finished"}),
        "left": sum(x.status == "left" for x in gone),
        "blocks_in_use_after": after["vllm:kv_cache_usage_perc"],
        "most_running": max(watch.running),
        "median_running_while_others_wait": statistics.median(waited) if waited else None,
        "peak_usage": round(watch.usage, 3),
        "prompt_tokens_of_a_chat": [
            min(x.prompt_tokens for x in chats),
            max(x.prompt_tokens for x in chats),
        ],
        **counted,
        "tokens": len(chats) * tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(len(chats) * tokens / seconds, 2),
    }


COUNTERS = ("num_preemptions", "prompt_tokens")


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"))
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="of DMS")
    parser.add_argument("--no-dense", action="store_true", help="leave out the model without gates")
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--leavers", type=int, default=1, help="clients that leave in between")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--characters", type=int, nargs=2, default=(900, 2400), help="of a prompt")
    parser.add_argument("--blocks", type=int, default=65, help=f"of {BLOCK} tokens, one unused")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--length", type=int, default=4096, help="longest request in tokens")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.chats < 2 or options.chats % 2:
        parser.error(f"--chats {options.chats} must be even: every text is sent twice")
    if any("=" not in x for x in options.models):
        parser.error(f"--models {options.models}: accepted: NAME=DIR, as in cr4=smollm2-cr4")
    return options


def main() -> None:
    """One server after the other."""
    options = parsed()
    texts = prompts(options.chats // 2, *options.characters)
    models = {name: Path(place) for name, place in (x.split("=", 1) for x in options.models)}
    settings = Settings(options.python, options.blocks, options.chunk, options.length)
    content: dict[str, Any] = {"machine": {**machine(), "note": options.note}}
    content["settings"] = {
        "blocks": options.blocks,
        "block_tokens": BLOCK,
        "chunk": options.chunk,
        "dtype": "float32",
        "characters": list(options.characters),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if not options.no_dense:
            models["dense"] = dense_twin(next(iter(models.values())), place / "dense")
        for name, model in models.items():
            rounds: list[dict[str, Any]] = []
            with server(settings, model, place / f"{name}.log") as (port, process):
                start = resident_megabytes(process)
                for _ in range(options.rounds):
                    found = load(port, texts, options.tokens, options.leavers)
                    rounds.append({**found, "resident_mb": resident_megabytes(process)})
                    content[name] = rounds[0] if options.rounds == 1 else rounds
                    print(name, rounds[-1], flush=True)
                    write(options.output, content)
            content.setdefault("resident_mb_at_start", {})[name] = start
            write(options.output, content)


if __name__ == "__main__":
    main()
