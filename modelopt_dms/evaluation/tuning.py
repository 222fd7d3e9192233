# SPDX-License-Identifier: Apache-2.0
"""The largest compression ratio within a quality budget, on a user's own text. No training."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.mixing import open_sources, read_once
from modelopt_dms.evaluation.files import cut_documents
from modelopt_dms.evaluation.score import perplexity
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.gates.thresholds import curve_of, move_thresholds

# Each halves the interval that holds the ratio.
HALVINGS = 6


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        evicted_fraction: what the thresholds were set for.
        compression_ratio: measured at the end of the samples, by bytes.
        perplexity: through the physical KV cache.
        loss: percent by which that is above the perplexity with the full cache.
    """

    evicted_fraction: float
    compression_ratio: float
    perplexity: float
    loss: float


@dataclass(frozen=True)
class TuneResult:
    """What was chosen, and what was tried.

    Attributes:
        chosen: the setting that the model now has.
        full_perplexity: with nothing evicted.
        max_loss: the budget, in percent of perplexity.
        trials: all settings, in the order of trying.
        length: tokens of a sample.
        samples: how many.
    """

    chosen: Trial
    full_perplexity: float
    max_loss: float
    trials: tuple[Trial, ...]
    length: int
    samples: int

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)


def tune(
    model: PreTrainedModel,
    *,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_loss: float = 0.5,
    length: int | None = None,
    count: int = 16,
    batch_size: int = 8,
) -> TuneResult:
    """Set a model, in place, to the largest compression ratio within a quality budget.

    Perplexity is measured through the cache that `generate` uses, quantized if the model's is. The ratio is found by
    halving, between none and the largest on the model's curve.

    Args:
        model: a DMS model that carries a curve, such as `compress` makes.
        data: see `modelopt_dms.data.documents.ACCEPTED`.
        tokenizer: needed unless the data are token ids.
        max_loss: the budget: percent by which perplexity may rise above the full cache's.
        length: tokens of a sample; by default the curve's.
        count: samples, from the start of the data.
        batch_size: samples at a time.

    Raises:
        ValueError: no curve, a budget below 0, or data that are not usable.
    """
    if not max_loss >= 0:  # nor is not a number
        raise ValueError(f"max_loss={max_loss:g} must be at least 0 (percent of perplexity)")
    curve = curve_of(model)
    length = curve.length if length is None else length
    samples = cut_documents(read_once(open_sources(data, tokenizer, model), None), length, count)
    model.eval()
    with eviction_off(model):
        full = perplexity(model, samples, batch_size).value
    trials: list[Trial] = []

    def try_fraction(fraction: float) -> Trial:
        move_thresholds(model, curve.thresholds, curve.at_fraction(fraction).shift)
        score = perplexity(model, samples, batch_size)
        loss = 100.0 * (score.value / full - 1.0)
        trials.append(Trial(fraction, score.end.compression_ratio, score.value, loss))
        return trials[-1]

    least, most = (x.evicted_fraction for x in (curve.points[0], curve.points[-1]))
    chosen = try_fraction(most)
    if chosen.loss > max_loss:
        chosen = Trial(least, 1.0, full, 0.0)
        for _ in range(HALVINGS):
            trial = try_fraction((least + most) / 2)
            if trial.loss <= max_loss:
                least, chosen = trial.evicted_fraction, trial
            else:
                most = trial.evicted_fraction
        move_thresholds(model, curve.thresholds, curve.at_fraction(chosen.evicted_fraction).shift)
    return TuneResult(chosen, full, max_loss, tuple(trials), length, len(samples))
