# SPDX-License-Identifier: Apache-2.0
"""Word problems: as many worked examples as fit, one right answer, found as GSM8K's is; the real generator if there."""

import random
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from paths import EMBEDDED
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modelopt_dms.evaluation.gsm_symbolic import INTRO, Problem, make_gsm_symbolic
from modelopt_dms.evaluation.names import GSM_SYMBOLIC, check_tasks

LENGTH = 2000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED)


def problems(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """What reasoning-gym's data sets look like, with sums in place of its templates."""
    assert name == "gsm_symbolic"
    found = []
    for number in range(size):
        rng = random.Random(seed + number)
        a, b = rng.randrange(1000), rng.randrange(1000)
        question = f"One has {a} and gets {b}, how many are there?"
        told = " Give the result as your final answer. Do not include units."
        steps = {"answer_cot": f"{a} + {b} = {a + b}.\n#### {a + b}"}
        found.append({"question": question + told, "answer": str(a + b), "metadata": steps})
    return found


@pytest.fixture(params=["double", "reasoning-gym"])
def generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "double":
        module: Any = ModuleType("reasoning_gym")
        module.create_dataset = problems
        monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    elif find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")


def test_worked_examples_fill_the_context_and_the_question_follows(
    generator: None, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = make_gsm_symbolic(GSM_SYMBOLIC, tokenizer, LENGTH, 3, 0)
    assert prompts == make_gsm_symbolic(GSM_SYMBOLIC, tokenizer, LENGTH, 3, 0)
    assert prompts != make_gsm_symbolic(GSM_SYMBOLIC, tokenizer, LENGTH, 3, 1)
    for prompt in prompts:
        context, asked = (str(tokenizer.decode(x)) for x in (prompt.context_ids, prompt.prompt_ids))
        used = len(prompt.context_ids) + len(prompt.prompt_ids)
        assert used <= LENGTH
        assert INTRO in context and context.count("Question:") == context.count("####") - 1
        assert context.count("Question:") > 1
        assert asked.startswith("Question:") and asked.endswith("Answer:")
        assert "Give the result" not in context + asked
        example = max(len(tokenizer(x)["input_ids"]) for x in context.split("\n\n")[1:])
        assert used > LENGTH - 3 * example  # one more would not have fitted
        assert prompt.share(f"It is {prompt.wanted[0]} - 0 = 0.\n#### {prompt.wanted[0]}") == 1.0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("3 + 4 = 7.\n#### 7", True),
        ("#### 7\n\nQuestion: 1 + 1?\nAnswer: 2\n#### 2", True),
        ("so there are 7.0", True),
        ("#### $7.", True),
        ("7 + 1 = 8", False),
        ("#### 8, not 7", False),
        ("#### 70", False),
        ("seven", False),
        ("", False),
    ],
)
def test_the_final_number_counts(said: str, right: bool) -> None:
    assert Problem(GSM_SYMBOLIC, [], [], ("7",), 1).share(said) == right


def test_thousands_may_be_separated() -> None:
    assert Problem(GSM_SYMBOLIC, [], [], ("1,234",), 1).share("#### 1234") == 1.0


def test_without_the_package_the_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelopt_dms.evaluation.names.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'modelopt-dms\[gsm\]'"):
        check_tasks([GSM_SYMBOLIC])


def test_too_short_a_length_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: Any
) -> None:
    module: Any = ModuleType("reasoning_gym")
    module.create_dataset = problems
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    with pytest.raises(ValueError, match="length=8 has no room for a gsm_symbolic problem"):
        make_gsm_symbolic(GSM_SYMBOLIC, tokenizer, 8, 1, 0)
