# SPDX-License-Identifier: Apache-2.0
"""Names of the tasks that `eval` knows, by what they are. Imports nothing: names are checked before work starts."""

from collections.abc import Sequence
from importlib.util import find_spec

# Records in Python source: `evaluation.tasks`, and perplexity on that source.
RECORDS = ("recall", "tracking", "arithmetic")
TEXT = "text"
# RULER's families: answers whose words are given one by one, and answers that are generated.
RULER_EXACT = ("needle", "multikey", "multivalue")
RULER_OPEN = ("multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")
RULER = (*RULER_EXACT, *RULER_OPEN)
# Conversations: `evaluation.conversations`.
CHATS = ("system", "turns")
# Word problems that are solved in writing: `evaluation.gsm_symbolic`.
GSM_SYMBOLIC = "gsm_symbolic"

# Categories of the package's own text, for fidelity.
CATEGORIES = ("prose", "code")

DEFAULT = (*RECORDS, TEXT)
EVALUATIONS = (*DEFAULT, *RULER_EXACT, *RULER_OPEN, *CHATS, GSM_SYMBOLIC)


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names without spaces around them.

    Raises:
        ValueError: some are unknown, or need a package that is not there; the message says what is accepted.
    """
    found = tuple(x.strip() for x in names)
    unknown = [x for x in found if x not in EVALUATIONS]
    if unknown or not found:
        raise ValueError(f"tasks {unknown} are unknown, must be among {', '.join(EVALUATIONS)}")
    if len(set(found)) != len(found):
        raise ValueError(f"tasks {', '.join(found)} name one twice")
    if GSM_SYMBOLIC in found and find_spec("reasoning_gym") is None:
        raise ValueError(
            f"tasks: {GSM_SYMBOLIC} needs reasoning-gym, which is not installed; pip install 'modelopt-dms[gsm]'"
        )
    return found


def check_ruler(names: Sequence[str]) -> None:
    """Refuse tasks that are not RULER's.

    Raises:
        ValueError: with those that are.
    """
    if others := [x for x in names if x not in RULER]:
        raise ValueError(
            f"--kvpress: tasks {', '.join(others)} are not of RULER; accepted: {', '.join(RULER)}"
        )
