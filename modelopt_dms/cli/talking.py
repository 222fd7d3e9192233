# SPDX-License-Identifier: Apache-2.0
"""Asking a loaded model one thing, or many in turn; what its KV cache held then."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelopt_dms.cli.options import err

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAVE = ("/exit", "/quit")
_HELP = "/exit leaves, /new forgets the conversation"


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class Talk:
    """A conversation with one model, whose KV cache stays from turn to turn.

    Attributes:
        model: any causal LM.
        tokenizer: its own.
        decoding: of every turn.
        raw: continue texts as they are, without the chat template.
        messages: of the conversation so far.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    decoding: Decoding
    raw: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: Any = None
    # Token ids [1, T] that the cache has seen, its own answer included.
    seen: "Tensor | None" = None

    def ask(self, text: str, *, stream: bool = True) -> str:
        """What the model answers; printed as it comes, if it is streamed."""
        self.messages.append({"role": "user", "content": text})
        ids = self._ids(text)
        new = self._generate(ids, stream)
        answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages, self.cache, self.seen = [], None, None

    def _ids(self, text: str) -> "Tensor":
        """The whole conversation as token ids [1, T], up to where the answer begins."""
        import torch

        found = encode(self.tokenizer, text if self.raw else self.messages, self.raw)
        return torch.tensor([found], device=self.model.device)

    def _generate(self, ids: "Tensor", stream: bool) -> list[int]:
        import torch
        from transformers import TextStreamer, set_seed

        from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of
        from modelopt_dms.modeling.convert import is_converted
        from modelopt_dms.modeling.generation import graphed

        if self.seen is not None and not _begins_with(ids, self.seen):
            # A template that changes earlier turns (drops thoughts) makes another text: it is read anew.
            self.cache = None
        arguments: dict[str, Any] = {"do_sample": self.decoding.temperature > 0}
        if self.decoding.temperature > 0:
            set_seed(self.decoding.seed)
            arguments["temperature"] = self.decoding.temperature
        streamer = None
        if stream:
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.model.device.type == "cuda" and is_converted(self.model) and self.cache is None:
            arguments |= {"custom_generate": graphed, "stream_to": streamer}
        else:
            arguments["streamer"] = streamer
        found = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(self.model.forward, self.cache),
            max_new_tokens=self.decoding.max_new_tokens,
            return_dict_in_generate=True,
            **arguments,
        )
        self.cache = cache_of(found)
        # Of the last token nothing is in the cache yet.
        self.seen = found.sequences[:, :-1]
        return list(found.sequences[0, ids.shape[1] :].tolist())


def encode(
    tokenizer: "PreTrainedTokenizerBase", said: str | list[dict[str, str]], raw: bool
) -> list[int]:
    """Token ids of a conversation, or of one thing that is said, up to where the answer begins.

    Texts are continued as they are if they shall be, or if the tokenizer has no chat template.

    Raises:
        ValueError: there is nothing to continue.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(said, str) and (raw or not template):
        ids = list(tokenizer(said)["input_ids"])
    else:
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError("the tokenizer makes no token of the prompt; expected some text")
    return ids


def _begins_with(ids: "Tensor", start: "Tensor") -> bool:
    length = start.shape[1]
    return ids.shape[1] > length and bool((ids[:, :length] == start).all())


def converse(talk: Talk) -> None:
    """Answer lines of standard input until it ends; after every turn, a line of what the cache holds."""
    import readline  # noqa: F401

    interactive = sys.stdin.isatty()
    if interactive:
        err.print(_HELP, markup=False, highlight=False)
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            return
        if text.strip() in LEAVE:
            return
        if text.strip() == "/new":
            talk.forget()
        elif text.strip():
            talk.ask(text)
            if talk.cache is not None:
                err.print(held_in_a_line(talk), style="dim", highlight=False)


def held_in_a_line(talk: Talk) -> str:
    """Tokens and bytes of the cache after a turn."""
    from modelopt_dms.kvcache.hf_cache import kv_stats
    from modelopt_dms.modeling.convert import is_converted

    if not is_converted(talk.model):
        held = dense_figures(talk)
        return f"[{held['context_tokens']} tokens, all resident; KV cache {size(held['kv_bytes'])}]"
    found = kv_stats(talk.cache)
    return (
        f"[{found.resident_tokens:,.0f} of {found.context_tokens:,.0f} tokens resident, "
        f"{found.compression_ratio:.2f}x; KV cache {size(found.kv_bytes)}]"
    )


def dense_figures(talk: Talk) -> dict[str, Any]:
    """What a cache that keeps every token holds: the baseline."""
    layers = [x for x in talk.cache.layers if getattr(x, "keys", None) is not None]
    held = sum(x.keys.nbytes + x.values.nbytes for x in layers)
    tokens = int(talk.cache.get_seq_length())
    return {
        "resident_tokens": tokens,
        "context_tokens": tokens,
        "compression_ratio": 1.0,
        "kv_bytes": held,
        "dtype": str(talk.model.dtype).removeprefix("torch."),
    }


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def dense_line(talk: Talk) -> str:
    """The baseline of a plain model."""
    held = dense_figures(talk)
    return (
        f"no gates: all {held['context_tokens']} tokens resident, KV cache {size(held['kv_bytes'])} in "
        f"{held['dtype']}; `modelopt-dms compress` makes a model to compare it with"
    )
