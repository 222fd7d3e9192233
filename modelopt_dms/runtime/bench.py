# SPDX-License-Identifier: Apache-2.0
"""Times of a session: reading prompts, decode steps, and what the KV cache held. Prints nothing."""

from dataclasses import dataclass, replace

import torch

from modelopt_dms.runtime.session import Session


@dataclass(frozen=True)
class Times:
    """What a benchmark measured.

    Attributes:
        batch: prompts at a time.
        prompt_length: tokens of each.
        new_tokens: of each.
        prefill_ms: of one prompt.
        prefill_tokens_per_second: read, one prompt after the other.
        decode_ms: of one step for all prompts, choosing tokens included.
        tokens_per_second: generated for all prompts together, while decoding.
        resident_tokens: mean live slots of a list at the end.
        context_tokens: that its sequence has.
        filled_pages: that live slots fill at the end, of all layers together.
        filled_bytes: of them.
    """

    batch: int
    prompt_length: int
    new_tokens: int
    prefill_ms: float
    prefill_tokens_per_second: float
    decode_ms: float
    tokens_per_second: float
    resident_tokens: float
    context_tokens: int
    filled_pages: int
    filled_bytes: int


def bench(session: Session, prompt_length: int, new_tokens: int, seed: int = 0) -> Times:
    """Generate for random prompts in all batch slots at once, after a short run that is not counted.

    Raises:
        EngineError: prompts and new tokens are too long for the graphs.
        OutOfPagesError: all prompts together need more pages than there are.
    """
    model, backend = session.manifest.model, session.backend
    # No token ends a text here.
    endless = Session(replace(session.manifest, model=replace(model, eos=())), backend)
    batch = backend.state.batch
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.vocabulary, (batch, prompt_length), generator=generator)
    for tokens in (min(2, new_tokens), new_tokens):
        endless.generate(prompts, tokens)
    stats = endless.stats
    decode = stats.decode_seconds
    return Times(
        batch=batch,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        prefill_ms=1000 * stats.prefill_seconds / batch,
        prefill_tokens_per_second=stats.prompt_tokens / stats.prefill_seconds,
        decode_ms=1000 * decode / max(stats.decode_steps, 1),
        tokens_per_second=stats.decode_tokens / decode if decode else 0.0,
        resident_tokens=sum(stats.live) / batch,
        context_tokens=stats.seen[0],
        filled_pages=stats.pages,
        filled_bytes=stats.pages * model.page_bytes,
    )
