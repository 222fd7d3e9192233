# SPDX-License-Identifier: Apache-2.0
"""What every section of a recipe has in common: finite numbers, and errors in one line.

Nothing here imports ModelOpt, and torch with it: mistakes in a recipe are found before.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

# No window, number of steps or seed that is meant needs more than 32 bits; nor a float more than this range.
LARGEST_INTEGER = 2**32 - 1
# Tokens: more than any context that a model has.
LONGEST = 2**24
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-12, 1e9


class Section(BaseModel):
    """What users write: every number is finite, and of a size that can be computed with."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python True is 1, to pydantic also "yes" and 1 are True; one of them was meant for another key.
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if kinds == {bool} and not isinstance(value, bool):
            raise ValueError("must be true or false")
        if kinds & {int, float} and not kinds & {bool, Any}:
            for x in value if isinstance(value, list | tuple) else [value]:
                if isinstance(x, bool):
                    raise ValueError("must be a number, not a boolean")
        return value

    @field_validator("*")
    @classmethod
    def _numbers_can_be_meant(cls, value: Any) -> Any:
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int) and abs(x) > LARGEST_INTEGER:
                raise ValueError(f"must be at most {LARGEST_INTEGER}")
            if isinstance(x, float) and x and not SMALLEST_FLOAT <= abs(x) <= LARGEST_FLOAT:
                raise ValueError(
                    f"must be 0, or of a size from {SMALLEST_FLOAT:g} to {LARGEST_FLOAT:g}"
                )
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation such as `list[float] | None` ends in; those of a literal's values."""
    if get_origin(annotation) is Literal:
        return {type(x) for x in get_args(annotation)}
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def in_one_line(error: ValidationError) -> str:
    """Every field that pydantic refuses, with its value and what is accepted."""
    return "; ".join(_readable(x) for x in error.errors())


def _readable(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    given = repr(error["input"])
    if isinstance(error["input"], Mapping):
        return f"{key}: {message}" if key else message
    if len(given) > 200:
        given = f"{given[:200]}..."
    return f"{key or 'value'}={given}: {message}"
