# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on a DMS model, and what the KV cache held meanwhile. Needs lm_eval.

Importing this registers the model type "dms" there: its "hf" and the numbers, `cr` to choose a ratio, and `resume`.

    lm_eval.simple_evaluate(model="dms", model_args="pretrained=DIR,cr=4,resume=answers.jsonl", tasks=[...])

Tasks that generate run on the physical cache. Tasks that score a given continuation (multiple choice, perplexity) run
one forward over it, under the mask of the same decisions, and keep no cache between requests.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from modelopt_dms.evaluation.answer_journal import AnswerJournal, Entry, Figures, answer_rest
from modelopt_dms.evaluation.answer_lengths import AnswerLengths
from modelopt_dms.evaluation.resume import identity
from modelopt_dms.gates.gate import AlphaRecord, eviction_off, gates, record_alpha
from modelopt_dms.gates.thresholds import set_compression
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.kvcache.hf_cache import DMSLayer, KVStats, cache_of, kv_stats
from modelopt_dms.modeling.convert import is_converted

TESTED = "0.4.13"
_log = logging.getLogger(__name__)
GENERATE, SCORE = "generate_until", "loglikelihood"
IN_FULL = "generate_until by the full cache"


@dataclass
class Held:
    """What sequences left in the KV cache: sums over sequences.

    Attributes:
        sequences: run by the model; requests with the same input are run once.
        context: tokens seen.
        resident: tokens held, mean over layers and KV heads.
        kv_bytes: bytes allocated for keys and values; None where no cache was kept.
        dense: size of a cache that keeps every token, in bytes, or in tokens where no cache was kept.
        kept: what of it was kept, in the same unit.
    """

    kv_bytes: float | None
    sequences: int = 0
    context: float = 0.0
    resident: float = 0.0
    dense: float = 0.0
    kept: float = 0.0

    def add(self, figures: dict[str, float]) -> None:
        """Count one sequence; see `of_cache` and `of_forward`."""
        self.sequences += 1
        self.context += figures["context"]
        self.resident += figures["resident"]
        self.dense += figures["dense"]
        self.kept += figures["kept"]
        if "kv_bytes" in figures:
            self.kv_bytes = (self.kv_bytes or 0) + figures["kv_bytes"]

    def row(self) -> dict[str, Any]:
        """Means over sequences, and the ratio of the sums, for a JSON file."""
        n = self.sequences
        return {
            "sequences": n,
            "compression_ratio": self.dense / self.kept,
            "context_tokens": self.context / n,
            "resident_tokens": self.resident / n,
            "kv_bytes": None if self.kv_bytes is None else self.kv_bytes / n,
        }


def of_cache(stats: KVStats) -> list[dict[str, float]]:
    """Figures of the sequences of a cache when its batch was done: of each the mean, so that sums are the cache's."""
    count = len(stats.layers[0].context)
    mean = {
        "context": stats.context_tokens,
        "resident": stats.resident_tokens,
        "kv_bytes": stats.kv_bytes / count,
        "dense": stats.dense_bytes / count,
        "kept": stats.dense_bytes / stats.compression_ratio / count,
    }
    return [mean] * count


def of_forward(length: int, resident: float) -> dict[str, float]:
    """Figures of a sequence of `length` tokens that was run without a cache."""
    return {"context": length, "resident": resident, "dense": length, "kept": resident}


@register_model("dms")
class DMSLM(HFLM):
    """lm-eval's Hugging Face model, which also counts what a DMS model keeps. A plain model runs as under "hf".

    Attributes:
        held: what was counted, by kind of request.
    """

    def __init__(
        self,
        *args: Any,
        cr: float | None = None,
        answer_lengths: bool = False,
        resume: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model, or take a live one.

        Args:
            *args: of HFLM: `pretrained`, a directory or a model (with `tokenizer`).
            cr: compression ratio to run at, on the curve that the model carries.
            answer_lengths: answer requests that generate a second time, with the full cache, and compare the lengths.
            resume: file that keeps every answer as soon as it is there; with the same arguments again, a run that was
                stopped goes on behind them. Not for whole texts (`loglikelihood_rolling`).
            **kwargs: of HFLM.

        Raises:
            ValueError: the model has no gates, or no curve that reaches `cr`.
            OutputError: `resume` is of other arguments, or is something else.
        """
        super().__init__(*args, **kwargs)
        self._counting = True
        self._figures: list[dict[str, float]] = []  # of sequences whose answers follow
        self.set_cache_hook(self.cache_hook)
        if not isinstance(answer_lengths, bool):
            raise ValueError(f"model_args answer_lengths={answer_lengths!r} must be True or False")
        self.lengths = AnswerLengths() if answer_lengths else None
        self.held = {GENERATE: Held(kv_bytes=0), SCORE: Held(kv_bytes=None)}
        self.is_dms = is_converted(self.model)
        self._marks: Tensor | None = None
        self._row = 0
        if cr is not None:
            if not self.is_dms or isinstance(cr, bool) or not isinstance(cr, (int, float)):
                wanted = "a number" if self.is_dms else "left out: this model has no gates"
                raise ValueError(f"model_args cr={cr!r} must be {wanted}")
            set_compression(self.model, cr)
        if answer_lengths and not self.is_dms:
            raise ValueError(
                "model_args answer_lengths=True must be left out: this model has no gates, so its answers are those of "
                "the full cache"
            )
        self.journal = None
        if resume is not None:
            settings: dict[str, Any] = {"pretrained": self._identity(), "cr": cr}
            settings |= {"answer_lengths": answer_lengths, "dtype": str(self.model.dtype)}
            part = f"{resume}.rank{self.rank}" if self.world_size > 1 else str(resume)
            self.journal = AnswerJournal(Path(part), settings)
            if known := len(self.journal.entries):
                _log.info("resume=%s: %d answers are there already", part, known)
        if (made := _made.get()) is not None:
            made.append(self)

    def _identity(self) -> dict[str, Any]:
        if not isinstance(self.pretrained, str):
            raise ValueError("resume needs a model by its name or directory, got a live one")
        return identity(self.pretrained)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Be told of every answer, and pass it on to lm-eval's own cache of answers."""
        self.cache_hook: Any = _Answers(self, cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes under "config" into its results, with our numbers as "modelopt_dms"."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"modelopt_dms": self.summary()} if self.is_dms else info

    def summary(self) -> dict[str, Any]:
        """Numbers of this process by kind of request, for the kinds that were run; see `Held.row`."""
        found = {kind: x.row() for kind, x in self.held.items() if x.sequences}
        if self.lengths is not None and self.lengths.full:
            found[GENERATE]["answer_lengths"] = self.lengths.row()
        return found

    def lines(self) -> list[str]:
        """`summary` in words: one line for every kind of request, none of a plain model."""
        if not self.is_dms:
            return []
        name = self.pretrained if isinstance(self.pretrained, str) else type(self.model).__name__
        part = f" (rank {self.rank} of {self.world_size})" if self.world_size > 1 else ""
        lines = []
        for kind, x in self.summary().items():
            how = "one forward each, no cache kept"
            if x["kv_bytes"] is not None:
                how = f"{x['kv_bytes']:,.0f} KV bytes, in the physical cache"
            lines.append(
                f"{name}: {kind}{part}: compression ratio {x['compression_ratio']:.2f}; {x['resident_tokens']:.1f} "
                f"resident of {x['context_tokens']:.1f} context tokens, mean of {x['sequences']} sequences; {how}"
            )
        if self.lengths is not None and self.lengths.full:
            lines.append(f"{name}: {GENERATE}{part}: {self.lengths.line()}")
        return lines or [f"{name}: no request was run{part}: all answers came from --use_cache"]

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[str]:
        """As HFLM's, counted."""
        before = self.held[GENERATE].sequences
        run: Any = super().generate_until
        found: list[str] = self._answer(GENERATE, requests, lambda x: run(x, *args, **kwargs))
        self._check_counted(GENERATE, len(requests), before)
        if self.lengths is not None:
            self.lengths.add(*map(self._tokens, (found, self._answers_in_full(requests, *args))))
        return found

    def _answers_in_full(self, requests: Sequence[Any], *args: Any) -> list[str]:
        """The answers of the full cache, which do not count."""
        self._counting = False
        run: Any = super().generate_until
        try:
            with eviction_off(self.model):
                return self._answer(IN_FULL, requests, lambda x: run(x, *args))
        finally:
            self._counting = True

    def loglikelihood(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As HFLM's, resumed."""
        run: Any = super().loglikelihood
        found = self._answer(SCORE, requests, lambda x: run(x, *args, **kwargs))
        return [tuple(x) for x in found]

    def _answer(self, kind: str, requests: Sequence[Any], run: Any) -> list[Any]:
        """Answers from the journal, whose figures count again, and of `run` for the others."""
        if self.journal is None:
            return list(run(requests))
        known = self.journal.find(kind, [x.args for x in requests])
        for entry in known:
            if entry is not None and entry.figures is not None and self._counting:
                self.held[kind].add(entry.figures)
        return answer_rest(known, requests, run)

    def answered(self, kind: str, request: Any, answer: Any) -> None:
        """Keep one answer with the figures of its sequence; called by HFLM, in the order of a batch."""
        figures: Figures = self._figures.pop(0) if self._figures else None
        if self.journal is not None and kind in self.held:
            kept = kind if self._counting else IN_FULL
            self.journal.add(kept, request, Entry(answer, figures))

    def _tokens(self, answers: Sequence[str]) -> list[int]:
        """Tokens of every answer, as far as lm-eval looks at it."""
        return [len(self.tok_encode(x, add_special_tokens=False)) for x in answers]

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        before = self.held[SCORE].sequences
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        self._check_counted(SCORE, len(requests), before)
        return found

    def _check_counted(self, kind: str, requests: int, before: int) -> None:
        if self.is_dms and requests and self.held[kind].sequences == before:
            raise RuntimeError(
                f"lm_eval {version('lm_eval')} runs models in another way than {TESTED}, so no cache was measured; "
                f"pip install lm-eval=={TESTED}"
            )

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_dms:
            return super()._model_generate(*args, **kwargs)
        out = super()._model_generate(*args, **kwargs | {"return_dict_in_generate": True})
        cache = cache_of(out)
        layers = cache.layers
        if plain := [x.layer_idx for x in gates(self.model) if not _ours(layers[x.layer_idx])]:
            raise RuntimeError(f"layers {plain} generated on a cache that cannot evict")
        if self._counting:
            self._figures = of_cache(kv_stats(cache))
            for figures in self._figures:
                self.held[GENERATE].add(figures)
        return out.sequences

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with record_alpha(self.model) as record:
            logits = super()._model_call(*args, **kwargs)
        self._marks, self._row = self._marked(record), 0
        return logits

    def _marked(self, record: AlphaRecord) -> Tensor | None:
        """Which tokens [B, heads of all layers, T] of a forward are evicted once they have left the window."""
        if not record.hard:
            return None  # no gates, or all switched off
        shift = gates(self.model)[0].shift
        return torch.cat([shift_decisions(x, shift).cpu() for x in record.hard.values()], dim=1)

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        # Called once for every row of the last forward, in order, with its length without padding.
        if self.is_dms:
            assert inplen is not None
            gone = 0.0
            if self._marks is not None:
                left = max(0, inplen - gates(self.model)[0].window - 1)
                gone = self._marks[self._row, :, :left].double().sum(-1).mean().item()
            self._figures = [of_forward(inplen, inplen - gone)]
            self.held[SCORE].add(self._figures[0])
            self._row += 1
        selected: Tensor = super()._select_cont_toks(logits, contlen, inplen)
        return selected


class _Answers:
    """Takes the place of lm-eval's hook for its cache of answers, which gets all of them but the full cache's."""

    def __init__(self, model: DMSLM, hook: Any) -> None:
        self.model, self.hook = model, hook

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Called by HFLM for every answer."""
        if self.model._counting:
            self.hook.add_partial(kind, request, answer)
        self.model.answered(kind, request, answer)


@contextmanager
def models_made() -> Iterator[list[DMSLM]]:
    """Collect the models that are made inside: lm-eval's command line does not hand them out."""
    made: list[DMSLM] = []
    token = _made.set(made)
    try:
        yield made
    finally:
        _made.reset(token)


# None outside, so that nothing keeps a model alive.
_made: ContextVar[list[DMSLM] | None] = ContextVar("made", default=None)


def _ours(layer: Any) -> bool:
    return isinstance(layer, DMSLayer)
