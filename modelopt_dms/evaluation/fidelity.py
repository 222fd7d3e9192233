# SPDX-License-Identifier: Apache-2.0
"""How far a DMS model is from itself with eviction off, token by token, and what its cache holds.

One full forward each: the mask of a full forward is what the physical cache holds, step by step. With eviction off
attention is another kernel, which rounds otherwise: gates that evict nothing show the floor, about 1e-7 in float32 and
far more in bfloat16, below which no KL means anything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.gates.gate import eviction_off, gates, record_alpha
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.modeling.divergence import token_kl
from modelopt_dms.modeling.lm_head import input_device, last_hidden, output_head

CHUNK = 256  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Comparison:
    """One sample of T tokens, read with the full cache and with eviction.

    Attributes:
        kl: KL(full || evicting) of every next-token distribution [T], nats, float32.
        same: whether both have the same most likely token [T].
        nll_full: negative log-likelihood of tokens 1 to T - 1 with the full cache [T - 1].
        nll: the same with eviction [T - 1].
        marked: share of the heads of all layers that evict each token, once it has left the window [T].
        window: tokens a marked token stays readable.
    """

    kl: Tensor
    same: Tensor
    nll_full: Tensor
    nll: Tensor
    marked: Tensor
    window: int

    def resident_tokens(self, length: int | None = None) -> float:
        """Tokens that a head holds, on average, when `length` tokens have been read; all by default."""
        length = len(self.marked) if length is None else length
        gone = self.marked[: max(0, length - self.window - 1)]
        return length - gone.sum().item()


@dataclass(frozen=True)
class Fidelity:
    """Comparisons together, every token counting alike.

    Attributes:
        tokens: number of distributions compared.
        kl: mean KL, nats per token.
        kl_p95: 95 % of tokens are below it.
        kl_p99: likewise, 99 %.
        kl_max: of the worst token.
        top1: share of tokens with the same most likely token.
        perplexity_full: with the full cache.
        perplexity: with eviction.
        compression_ratio: physical, at the end of the samples: context over resident tokens.
        compression_ratios: of each sample.
    """

    tokens: int
    kl: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity_full: float
    perplexity: float
    compression_ratio: float
    compression_ratios: tuple[float, ...]


def fidelity(
    model: PreTrainedModel, samples: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Fidelity]:
    """Fidelity of a converted model in eval mode; samples are token ids by category of text."""
    return {
        category: summarize([compare(model, ids, full_hidden(model, ids)) for ids in texts])
        for category, texts in samples.items()
    }


@torch.no_grad()
def full_hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Hidden states [T, C] that enter the output head with eviction off: what `compare` compares with."""
    with eviction_off(model):
        return _hidden(model, ids)


@torch.no_grad()
def compare(model: PreTrainedModel, ids: Sequence[int], full: Tensor) -> Comparison:
    """A sample with eviction against `full_hidden` of the same sample [T, C]."""
    with record_alpha(model) as record:
        evicting = _hidden(model, ids)
    targets = torch.tensor(ids[1:], device=full.device)
    head = output_head(model)
    parts = []
    for start in range(0, len(ids), CHUNK):
        p = head(full[start : start + CHUNK]).float().log_softmax(-1)  # [N, C] -> [N, V]
        q = head(evicting[start : start + CHUNK]).float().log_softmax(-1)
        said = targets[start : start + CHUNK, None]
        parts.append(
            (
                token_kl(q, p, "forward").clamp(min=0.0),
                p.argmax(-1) == q.argmax(-1),
                -p[: len(said)].gather(1, said)[:, 0],
                -q[: len(said)].gather(1, said)[:, 0],
            )
        )
    first = gates(model)[0]
    marks = [shift_decisions(x[0], first.shift).double().cpu() for x in record.hard.values()]
    kl, same, nll_full, nll = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return Comparison(kl, same, nll_full, nll, torch.cat(marks).mean(0), first.window)


def summarize(comparisons: Sequence[Comparison]) -> Fidelity:
    """Comparisons of several samples as one result.

    Raises:
        ValueError: there are none.
    """
    if not comparisons:
        raise ValueError("no samples to compare")
    kl = torch.cat([x.kl for x in comparisons]).double()
    logical = [len(x.kl) for x in comparisons]
    live = [x.resident_tokens() for x in comparisons]

    def perplexity(losses: list[Tensor]) -> float:
        return math.exp(torch.cat(losses).double().mean().item())

    return Fidelity(
        tokens=len(kl),
        kl=kl.mean().item(),
        kl_p95=kl.quantile(0.95).item(),
        kl_p99=kl.quantile(0.99).item(),
        kl_max=kl.max().item(),
        top1=torch.cat([x.same for x in comparisons]).double().mean().item(),
        perplexity_full=perplexity([x.nll_full for x in comparisons]),
        perplexity=perplexity([x.nll for x in comparisons]),
        compression_ratio=sum(logical) / sum(live),
        compression_ratios=tuple(t / held for t, held in zip(logical, live, strict=True)),
    )


def _hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([list(ids)], device=input_device(model))
    positions = torch.arange(len(ids), device=tokens.device)[None]
    return last_hidden(model, tokens, positions)[0]
