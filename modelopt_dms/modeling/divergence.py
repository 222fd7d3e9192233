# SPDX-License-Identifier: Apache-2.0
"""KL divergence of next-token distributions, over the vocabulary in chunks.

Shapes: B batch, T tokens, C hidden width, V vocabulary, N valid tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# From hidden states [N, C] to logits [N, V].
Head = Callable[[Tensor], Tensor]
Direction = Literal["forward", "reverse"]


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    direction: Direction,
    chunk_tokens: int,
) -> Tensor:
    """Mean over valid tokens of the KL divergence between next-token distributions, in nats, float32.

    Logits exist for at most `chunk_tokens` tokens at a time: the backward pass computes each chunk's anew.

    Args:
        student: hidden states [B, T, C] that enter the output head; gradients flow into them.
        teacher: likewise, of the model to imitate.
        valid: bool [B, T], True for the tokens that count; at least one.
        student_head: makes logits of the student's hidden states.
        teacher_head: makes logits of the teacher's.
        direction: "forward" is KL(teacher || student), "reverse" is KL(student || teacher).
        chunk_tokens: tokens per chunk.
    """
    student, teacher = student[valid], teacher[valid]  # [B, T, C] -> [N, C]

    def chunk_kl(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logprob = teacher_head(teacher).float().log_softmax(-1)
        return token_kl(student_head(student).float().log_softmax(-1), teacher_logprob, direction)

    chunks = list(zip(student.split(chunk_tokens), teacher.split(chunk_tokens), strict=True))
    if len(chunks) == 1:
        # One chunk is within the bound anyway: no need to compute it twice.
        return chunk_kl(*chunks[0]).mean()
    parts = [
        checkpoint(chunk_kl, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return torch.cat(parts).mean()


def token_kl(student: Tensor, teacher: Tensor, direction: Direction) -> Tensor:
    """KL divergence [N] between rows of log-probabilities [N, V]; see `kl_divergence` for the direction."""
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
