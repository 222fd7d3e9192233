# SPDX-License-Identifier: Apache-2.0
"""The preview counts what the run really visits, and reads no more than it."""

from typing import Any

import pytest
from families import build

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.evaluation.report import data_table, printable
from modelopt_dms.training.loop import prepare

RECIPE = Recipe(
    dms={"target_cr": 1.5, "window": 4, "protect_first": 2},
    retrofit={"steps": 6, "sequence_length": 32, "batch_size": 2, "gradient_accumulation_steps": 2},
)
DATA = dms.Blend([([[i % 60] * 32 for i in range(200)], 3.0), ([[1] * 20, [2] * 70], 1.0)])


def test_the_numbers_are_those_of_the_samples_that_training_visits() -> None:
    found = dms.preview(DATA, RECIPE)
    assert RECIPE.retrofit is not None and RECIPE.dms is not None
    run = prepare(build("llama"), RECIPE.retrofit, RECIPE.dms, data=DATA)
    visits = list(run.data.visits(RECIPE.retrofit.visits(1), RECIPE.retrofit.seed))
    assert len(visits) == found.steps * found.samples_per_step == 24
    assert found.tokens == 24 * 32
    ahead = [x["tokens_ahead"] for x in visits]
    tokens = sum(int((x >= 0).sum()) for x in ahead)
    assert found.padding == pytest.approx(1 - tokens / found.tokens)
    effect = sum(int(((x["tokens_ahead"] > 4) & (x["position_ids"] >= 2)).sum()) for x in visits)
    assert found.in_effect == pytest.approx(effect / tokens)
    assert found.samples == len(run.data.training)
    large, small = found.sources
    assert (small.wanted, small.documents, small.tokens, small.longest) == (0.25, 2, 90, 70)
    assert (large.records, large.documents) == (200, 18 + 6)
    assert large.share + small.share == pytest.approx(1)
    # Its three samples, one of them held out, hold a quarter of what 24 samples do.
    assert small.epochs > 2 > 1 >= large.epochs


def test_all_documents_are_counted_when_asked_for() -> None:
    (large, small), (everything, _) = (
        dms.preview(DATA, RECIPE, count_all=x).sources for x in (False, True)
    )
    assert (everything.documents, everything.tokens) == (200, 6400)
    assert (everything.share, everything.epochs) == (large.share, large.epochs)


def test_compress_gives_the_same_numbers_before_it_changes_anything() -> None:
    seen: list[Any] = []

    def stop(preview: Any) -> None:
        seen.append(preview)
        raise KeyboardInterrupt

    model = build("llama")
    with pytest.raises(KeyboardInterrupt):
        dms.compress(model, RECIPE, data=DATA, on_data=stop, progress=False)
    assert seen == [dms.preview(DATA, RECIPE)]
    assert not hasattr(model.config, "dms_config")


def test_a_recipe_without_a_retrofit_is_refused() -> None:
    with pytest.raises(ValueError, match="the recipe has no retrofit"):
        dms.preview(DATA, Recipe(dms={"window": 4}))


def test_what_a_document_holds_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2J\n\t\u202e[bold]\u00e9") == r"a\x1b[2J\n\t\u202e[bold]" + "\u00e9"


def test_the_table_has_a_line_for_each_source() -> None:
    found = dms.preview(DATA, RECIPE)
    table = data_table(found)
    assert list(table.columns[0].cells) == ["parts[0]", "parts[1]"]
    assert "6 steps x 4 samples x 32 tokens = 768 tokens" in str(table.caption)
