# SPDX-License-Identifier: Apache-2.0
"""Names of the tasks that `eval` knows, by what they are. Imports nothing: names are checked before work starts."""

from collections.abc import Sequence

# Records in Python source: `evaluation.tasks`, and perplexity on that source.
RECORDS = ("recall", "tracking", "arithmetic")
TEXT = "text"
# RULER's families: answers whose words are given one by one, and answers that are generated.
RULER_EXACT = ("needle", "multikey", "multivalue")
RULER_OPEN = ("multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")
RULER = (*RULER_EXACT, *RULER_OPEN)
# Conversations: `evaluation.conversations`.
CHATS = ("system", "turns")

# Categories of the package's own text, for fidelity.
CATEGORIES = ("prose", "code")

DEFAULT = (*RECORDS, TEXT)
EVALUATIONS = (*DEFAULT, *RULER_EXACT, *RULER_OPEN, *CHATS)


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names without spaces around them.

    Raises:
        ValueError: some are unknown; the message says which are known.
    """
    found = tuple(x.strip() for x in names)
    unknown = [x for x in found if x not in EVALUATIONS]
    if unknown or not found:
        raise ValueError(f"tasks {unknown} are unknown, must be among {', '.join(EVALUATIONS)}")
    if len(set(found)) != len(found):
        raise ValueError(f"tasks {', '.join(found)} name one twice")
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
