# SPDX-License-Identifier: Apache-2.0
"""Train the small causal LM that the project carries, from nothing but this machine's Python.

    python examples/make_embedded_model.py --output examples/embedded_model --minutes 40

Trains a byte-level BPE tokenizer and a four-layer Qwen3 on the tasks of
`modelopt_dms.evaluation.tasks` and on Python source, and writes a standard Hugging Face directory.
Interrupted runs continue from `--state`. One CPU core is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from modelopt_dms.evaluation import tasks
from modelopt_dms.evaluation.text import text_lines
from modelopt_dms.evaluation.words import DIGITS, KEYS, MARKERS, VALUES

# Newlines and digits stand alone, so that a line encodes the same alone and inside a text.
_PIECES = r"\n| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z_0-9]+|[^\S\n]+(?!\S)|[^\S\n]+"
_ROLE_WEIGHT = {"text": 1.0, "record": 0.1, "prompt": 0.1, "answer": 4.0}
_SUM_WEIGHT = 20.0
_ROPE_THETA = 1_000_000.0
_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class Phase:
    """One part of the curriculum, up to `until` (share of the whole run)."""

    until: float
    length: int  # tokens per sequence
    text_share: float  # of the documents
    fact_share: float  # of a task document's tokens, at most


_CURRICULUM = (
    Phase(0.10, 128, 0.05, 0.45),
    Phase(0.20, 256, 0.2, 0.30),
    Phase(0.35, 512, 0.3, 0.25),
    Phase(0.60, 1024, 0.4, 0.20),
    Phase(1.00, 2048, 0.5, 0.20),
)
# Every fourth step stays short: dense in answers, and short contexts must not be forgotten.
_SHORT = Phase(1.00, 256, 0.0, 0.30)


def train_tokenizer(vocab_size: int, lines: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over Python source in which every word of the tasks is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    words = [f" {word}" for word in KEYS + VALUES + DIGITS] + list(MARKERS)

    def corpus() -> Iterator[str]:
        stream = text_lines("train", random.Random(0))
        yield from (next(stream) for _ in range(lines))
        # Repeated often enough that their merges come before the rarer merges of the source.
        yield from (f"{word}\n" * (lines // 40) for word in words)

    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    split = [
        word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) > 1
    ]
    if split:
        raise RuntimeError(f"these task words are not single tokens: {split}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=4096,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 with grouped queries (two query heads per KV head) and tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        # Normalised queries and keys bound every score; at 1.0 the bound is too low to single out
        # one token among 2,048.
        layer.self_attn.q_norm.weight.data.fill_(1.5)
        layer.self_attn.k_norm.weight.data.fill_(1.5)
    start_with_lookup(model)
    return model


@torch.no_grad()
def start_with_lookup(model: Qwen3ForCausalLM) -> None:
    """Lay the look-up "find my token's earlier occurrence, read what followed" into layers 0 and 1.

    Random weights find that induction circuit too, but the search would be most of the training on
    one core. Layer 0: the two query heads of the first KV head look one and two tokens back; they
    need a direction that all tokens share, which is the same offset in every embedding (it leaves
    the order of the logits alone). Layer 1: the first query head compares its own token with what
    layer 0 wrote about each previous token, and copies the match. All weights are then trained.
    """
    size, theta = model.config.head_dim, _ROPE_THETA
    half = size // 2
    first, second = (layer.self_attn for layer in model.model.layers[:2])

    model.model.embed_tokens.weight[:, 0] = 0.1
    fast = torch.arange(4)  # the rotations that tell neighbours apart
    angles = theta ** (-2 * fast / size)
    for head in range(2):
        # A key `n` tokens back is rotated by n * angle less than the query: undo that.
        rows = first.q_proj.weight[head * size : (head + 1) * size]
        rows[fast, 0] = torch.cos((head + 1) * angles)
        rows[fast + half, 0] = -torch.sin((head + 1) * angles)
    first.k_proj.weight[fast, 0] = 1.0

    # Orthogonal directions, without the shared one: what a token is, what stood one and two before.
    directions = torch.randn(model.config.hidden_size, 3 * size)
    directions[0] = 0.0
    own, previous, before = torch.linalg.qr(directions)[0].T.split(size)
    first.v_proj.weight[:size] = own / 2
    first.o_proj.weight[:, : 2 * size] = torch.cat([previous, before]).T / 10

    slow = torch.arange(half // 2, half)  # the rotations that hardly turn within the context
    slow = torch.cat([slow, slow + half])
    second.q_proj.weight[slow] = own[slow]
    second.k_proj.weight[slow] = previous[slow]
    second.q_norm.weight.fill_(2.0)
    second.k_norm.weight.fill_(2.0)
    second.v_proj.weight[:size] = own / 2
    second.o_proj.weight[:, :size] = own.T / 2


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def batch(
    tokenizer: PreTrainedTokenizerFast, phase: Phase, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and the loss weight of each as a target [B, T]; B * T is about `tokens`."""
    documents = list(
        tasks.training_documents(
            tokenizer,
            max(1, tokens // phase.length),
            phase.length,
            seed,
            text_share=phase.text_share,
            fact_share=phase.fact_share,
        )
    )
    ids = torch.tensor([document.ids for document in documents])
    weights = torch.tensor([[_ROLE_WEIGHT[r] for r in document.roles] for document in documents])
    # Sums are the only tokens that must be computed, and few: one in 200.
    (equals,) = tokenizer(" =", add_special_tokens=False)["input_ids"]
    sums = (ids[:, :-1] == equals) & (weights[:, 1:] == _ROLE_WEIGHT["answer"])
    weights[:, 1:][sums] = _SUM_WEIGHT
    return ids, weights


def weighted_loss(
    model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Weighted mean cross-entropy; and the plain means over text, answer and sum tokens."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T - 1, vocabulary]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    shown = (_ROLE_WEIGHT["text"], _ROLE_WEIGHT["answer"], _SUM_WEIGHT)
    means = [float(losses.detach()[flat == weight].mean()) for weight in shown]  # NaN where none
    return (losses * flat).sum() / flat.sum(), means


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: tasks.Task,
    length: int,
    count: int,
    seed: int,
) -> tuple[float, int]:
    """Share of questions whose every answer token is the argmax, and the number of questions."""
    right, total = 0, 0
    for episode in tasks.make_episodes(task, tokenizer, length, count, seed):
        ids, spans = list(episode.context_ids), []
        for question in episode.questions:
            ids += question.prompt_ids
            spans.append((len(ids), len(ids) + len(question.answer_ids)))
            ids += question.answer_ids
        predicted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
        for start, end in spans:
            right += predicted[start - 1 : end - 1].tolist() == ids[start:end]
            total += 1
    return right / total, total


@torch.no_grad()
def perplexity(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int, count: int
) -> float:
    """Per token, on Python source that was never trained on."""
    ids = torch.tensor(tasks.held_out_text(tokenizer, length, count, seed=1))
    losses = [
        F.cross_entropy(model(input_ids=row[None, :-1], use_cache=False).logits[0], row[1:])
        for row in ids
    ]
    return math.exp(float(torch.stack(losses).mean()))


def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lengths: tuple[int, ...],
    count: int,
) -> dict[str, Any]:
    """Accuracy per task and length, and held-out perplexity."""
    model.eval()
    result: dict[str, Any] = {}
    for task in tasks.TASKS:
        scores = {n: accuracy(model, tokenizer, task, n, count, seed=12345) for n in lengths}
        result[task] = {str(n): round(score, 4) for n, (score, _) in scores.items()}
        result[f"{task}_questions"] = {str(n): total for n, (_, total) in scores.items()}
    result["perplexity"] = {
        str(n): round(perplexity(model, tokenizer, n, max(2, count // 2)), 3) for n in lengths
    }
    model.train()
    return result


def schedule(progress: float) -> float:
    """Learning-rate factor: short warm-up, flat, then linear to zero."""
    return min(1.0, progress / 0.01 + 0.02, (1 - progress) / 0.5 + 0.002)


def write(
    directory: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    log: dict[str, Any],
) -> None:
    """Write the Hugging Face directory next to its place, then swap it in."""
    directory = directory.resolve()
    temporary = directory.with_name(directory.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (temporary / "README.md").write_text(model_card(model, log))
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def model_card(model: Qwen3ForCausalLM, log: dict[str, Any]) -> str:
    """README.md of the model directory."""
    final = log["evaluations"][-1]
    lengths = list(final["perplexity"])
    rows = [
        f"| {task} | " + " | ".join(f"{100 * final[task][n]:.1f} %" for n in lengths) + " |"
        for task in tasks.TASKS
    ]
    rows.append(
        "| perplexity, held-out Python | "
        + " | ".join(f"{final['perplexity'][n]:.2f}" for n in lengths)
        + " |"
    )
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            "---",
            "",
            "# The embedded model",
            "",
            "A small Qwen3 whose tasks need its whole context, made to show on any machine what KV",
            "cache eviction keeps and what it loses. It answers questions about facts scattered",
            "among Python source (`modelopt_dms.evaluation.tasks`); it is no general assistant.",
            "",
            f"* {model.num_parameters():,} parameters, vocabulary {model.config.vocab_size};",
            "  trained by `python examples/make_embedded_model.py`. Weights start random, except",
            "  for a look-up laid by hand into layers 0 and 1: see `start_with_lookup` there.",
            f"* {log['tokens']:,} tokens, {log['steps']:,} steps, seed {log['seed']};"
            f" {log['seconds']:,.0f} s on {log['threads']} CPU thread(s).",
            f"* Text: the standard library of Python {log['python']}; one file in ten, chosen by"
            " hash, is held out.",
            "* Curve: `training_log.json` (step, length, loss on text, answers, sums).",
            *(f"* {note}" for note in log.get("notes", [])),
            "",
            "Full cache, held-out seeds and files. Columns: context length in tokens. Rows:",
            "questions answered exactly, token by token; perplexity per token.",
            "",
            "| | " + " | ".join(lengths) + " |",
            "|---" * (len(lengths) + 1) + "|",
            *rows,
            "",
        ]
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--state", type=Path, help="resume file (default: OUTPUT.state.pt)")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time, in total")
    parser.add_argument("--steps", type=int, help="train this many steps instead of --minutes")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--episodes", type=int, default=40, help="per task, final evaluation")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: proves it runs")
    arguments = parser.parse_args(argv)
    arguments.state = arguments.state or arguments.output.with_name(
        arguments.output.name + ".state.pt"
    )
    if arguments.smoke:
        arguments.steps, arguments.tokens, arguments.episodes = 4, 512, 1
    return arguments


def save_state(
    path: Path,
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    log: dict[str, Any],
) -> None:
    """Write what an interrupted run needs to continue."""
    temporary = path.with_suffix(".tmp")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "log": log}, temporary)
    temporary.rename(path)


def load_state(
    path: Path, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Continue from a saved state; returns its log."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resumed at step {state['log']['steps']}", flush=True)
    return dict(state["log"])


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    log: dict[str, Any],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Follow the curriculum to its end, adding to `log`."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["peak_lr"] = group.get("peak_lr", group["lr"])

    def progress() -> float:
        if args.steps is not None:
            return float(log["steps"] / args.steps)
        return float(log["seconds"] / (60 * args.minutes))

    model.train()
    recent: list[list[float]] = []
    while (now := progress()) < 1:
        begin = time.perf_counter()
        phase = next(p for p in _CURRICULUM if now < p.until)
        if args.smoke or (log["steps"] % 4 == 2 and phase.length > _SHORT.length):
            phase = _SHORT
        ids, weights = batch(tokenizer, phase, args.tokens, seed=args.seed * 10**6 + log["steps"])
        loss, means = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in groups:
            group["lr"] = group["peak_lr"] * schedule(now)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log["steps"] += 1
        log["tokens"] += ids.numel()
        log["seconds"] += time.perf_counter() - begin
        recent.append(means)
        if log["steps"] % 20 == 0:
            losses = [round(value, 4) for value in torch.tensor(recent).nanmean(0).tolist()]
            log["loss"].append([log["steps"], phase.length, *losses])
            print(*log["loss"][-1], f"{log['tokens'] / log['seconds']:.0f} tokens/s", flush=True)
            recent = []
        if log["steps"] % args.evaluate_every == 0:
            found = evaluate(model, tokenizer, _LENGTHS[:2], count=6)
            log["evaluations"].append({"step": log["steps"], **found})
            print(json.dumps(log["evaluations"][-1]), flush=True)
            save_state(args.state, model, optimizers, log)


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, write."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.smoke:
        tokenizer = train_tokenizer(vocab_size=1024, lines=400)
        model = build_model(tokenizer, width=128, layers=2)
    else:
        tokenizer = train_tokenizer(vocab_size=1536, lines=150_000)
        model = build_model(tokenizer, width=128, layers=4)
    print(f"{model.num_parameters():,} parameters", flush=True)
    log: dict[str, Any] = {
        "seed": args.seed,
        "threads": args.threads,
        "python": platform.python_version(),
        "steps": 0,
        "tokens": 0,
        "seconds": 0.0,
        "loss": [],  # [step, tokens per sequence, mean loss on text, answers, sums]
        "evaluations": [],
    }
    optimizers = build_optimizers(model)
    if args.state.exists():
        log = load_state(args.state, model, optimizers)
    train(model, tokenizer, args, log, optimizers)
    final = evaluate(model, tokenizer, (128,) if args.smoke else _LENGTHS, args.episodes)
    log["evaluations"].append({"step": log["steps"], **final})
    log["seconds"] = round(log["seconds"], 1)
    write(args.output, model, tokenizer, log)
    args.state.unlink(missing_ok=True)
    print(json.dumps(final, indent=1))


if __name__ == "__main__":
    main()
