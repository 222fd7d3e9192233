# SPDX-License-Identifier: Apache-2.0
"""Random values for facts: names, numbers, codes, dates, words."""

import random
import re
import string
from collections.abc import Callable
from typing import Any

from modelopt_dms.data.mix.content import POOLS

_SYLLABLES = """
b br c cl d dr f fl g gr h j k kr l m n p pr qu r s sk st t tr v w z
a ai au e ea ee i ia o oa ou u
ck d ft l ld lm m n nd ng nt p r rd rk rn rt s sk ss st th x
"""
_STARTS, _MIDDLES, _ENDS = (x.split() for x in _SYLLABLES.strip().splitlines())
_TAILS = ("", "", "", "ia", "ton", "by", "dale", "holm", "ara", "ix", "wick", "more", "o", "et")


def digits(rng: random.Random, count: int) -> str:
    """A number of so many digits that does not begin with 0."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def name(rng: random.Random) -> str:
    """A word that does not exist, "Krauldton"."""
    syllables = rng.choice((1, 2, 2))
    word = "".join(rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(syllables))
    return (word + rng.choice(_ENDS) + rng.choice(_TAILS)).capitalize()


def _letters(rng: random.Random, count: int, letters: str = string.ascii_uppercase) -> str:
    return "".join(rng.choice(letters) for _ in range(count))


def _code(rng: random.Random) -> str:
    """A code of one of the many forms that people give to codes."""
    forms: list[Callable[[], str]] = [
        lambda: f"{_letters(rng, 2)}-{digits(rng, 4)}",
        lambda: f"{_letters(rng, 3)}{digits(rng, 3)}",
        lambda: f"{digits(rng, 3)}-{digits(rng, 3)}-{_letters(rng, 1)}",
        lambda: f"{_letters(rng, 1)}{digits(rng, 2)}/{digits(rng, 3)}",
        lambda: _letters(rng, 6, string.ascii_uppercase + string.digits),
        lambda: _letters(rng, 8, "0123456789abcdef"),
        lambda: f"{rng.choice(POOLS['animal'])}-{rng.choice(POOLS['thing'])}-{digits(rng, 2)}",
        lambda: f"#{digits(rng, 5)}",
    ]
    return rng.choice(forms)()


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(POOLS['month'])}"


def _phrase(rng: random.Random) -> str:
    picked = [rng.choice(POOLS[x]) for x in ("colour", "animal", "material", "thing")]
    return " ".join(picked[: rng.choice((2, 3, 4))])


# What is not a word of a pool.
_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda r: f"{r.choice(POOLS['first'])} {r.choice(POOLS['last'])}",
    "name": name,
    "company": lambda r: (
        f"{name(r)} {r.choice(('Ltd', 'Group', 'Partners', 'Works', 'Foods', 'Systems'))}"
    ),
    "street": lambda r: (
        f"{r.randrange(1, 240)} {name(r)} {r.choice(('Street', 'Road', 'Lane', 'Avenue', 'Square'))}"
    ),
    "code": _code,
    "phrase": _phrase,
    "date": _date,
    "year": lambda r: str(r.randrange(1780, 2025)),
    "time": lambda r: f"{r.randrange(24):02}:{r.randrange(60):02}",
    "price": lambda r: f"${r.randrange(2, 900)}.{r.randrange(100):02}",
    "phone": lambda r: f"{digits(r, 3)}-{digits(r, 3)}-{digits(r, 4)}",
    "ip": lambda r: ".".join(str(r.randrange(1, 255)) for _ in range(4)),
    "port": lambda r: str(r.randrange(1024, 65000)),
    "small": lambda r: str(r.randrange(3, 30)),
    "two": lambda r: digits(r, 2),
    "three": lambda r: digits(r, 3),
    "four": lambda r: digits(r, 4),
    "five": lambda r: digits(r, 5),
    "number": lambda r: digits(r, r.randrange(2, 9)),
    "decimal": lambda r: f"{r.randrange(1, 100)}.{r.randrange(10, 100)}",
    "email": lambda r: (
        f"{r.choice(POOLS['first']).lower()}.{r.choice(POOLS['last']).lower()}@{name(r).lower()}.org"
    ),
    "path": lambda r: (
        f"/{r.choice(('srv', 'opt', 'var', 'home', 'mnt'))}/{name(r).lower()}/{r.choice(POOLS['noun'])}"
    ),
    "version": lambda r: f"{r.randrange(1, 12)}.{r.randrange(20)}.{r.randrange(40)}",
    "room": lambda r: f"{r.choice('ABCDEFG')}{digits(r, 3)}",
    "value": lambda r: r.choice((digits, _worded))(r, r.randrange(2, 6)),
    "function": lambda r: f"{r.choice(POOLS['verb'])}_{r.choice(POOLS['noun'])}",
}


def _worded(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(POOLS["noun"]) for _ in range(1 + count % 3))


class Draw(dict[str, Any]):
    """Values by the name of a slot, {city} or {city2}, drawn when first asked for and kept.

    No value of any slot is drawn twice as long as `taken` is shared, so that a question has one answer.
    """

    def __init__(self, rng: random.Random, taken: set[str]) -> None:
        """Draw from `rng`, and nothing that is in `taken`."""
        super().__init__()
        self.rng, self.taken = rng, taken

    def __missing__(self, slot: str) -> str:
        """A new value for a slot."""
        kind = slot.rstrip("0123456789")
        for _ in range(200):
            value = self.rng.choice(POOLS[kind]) if kind in POOLS else _MAKERS[kind](self.rng)
            if value.casefold() not in self.taken:
                break
        self.taken.add(value.casefold())
        self[slot] = value
        return value

    def fill(self, template: str) -> str:
        """A template with its slots filled, and "an" where it belongs."""
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format_map(self))
