# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's chat template as a function from messages to text, the same every day."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.records import Chat, Message, from_json, plain

# What templates that print the date are told. With today's, data would be others tomorrow, and no run could resume.
TODAY = datetime(2025, 1, 1)

# Columns that are text of the chat: what a template does not render of them is refused. Other columns that it does not
# take are about the chat, not of it.
_CONTENT = ("tools", "documents")
_KWARGS = "chat_template_kwargs"
# Names that a template reads, but that no column can give it.
_TAKEN = {
    *("messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace"),
    *("range", "dict", "lipsum", "cycler", "joiner"),
}
_FORMAT = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(?:'([^']*)'|\"([^\"]*)\")")
# A macro hides the function of that name that transformers gives to templates; the plus keeps what follows as it is.
_DATES = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format not in _dates -%}{{ raise_exception('no fixed date for ' ~ format) }}{%- endif -%}"
    "{{- _dates[format] -}}{%- endmacro +%}"
)


class Refused(DataError):
    """A chat template raised an error."""


class _Generation(Extension):
    """Transformers' {% generation %} block, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _variables(source: str) -> frozenset[str]:
    """The variables that a template reads without setting them."""
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols])  # noqa: S701
    return frozenset(find_undeclared_variables(environment.parse(source)))


class Template:
    """The chat template of a tokenizer with the columns of one record that it takes.

    Attributes:
        source: of the template.
        label: of the record, for messages.
        variables: for the template, besides messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, label: str) -> None:
        """Find the template and what it takes.

        Raises:
            DataError: it does not take a column that is text of the chat, or an entry of chat_template_kwargs.
        """
        self.label = label
        self._tokenizer = tokenizer
        columns = dict(chat.columns)
        given = from_json(columns.pop(_KWARGS, {}), f"{label}: {_KWARGS}")
        if not isinstance(given, dict):
            raise DataError(f"{label}: {_KWARGS} is a list; expected a mapping")
        columns |= given
        tools = from_json(columns.get("tools") or [], f"{label}: tools") or None
        self.source = self._guard(lambda: str(tokenizer.get_chat_template(None, tools)))
        names = self._guard(lambda: _variables(self.source))
        names -= _TAKEN | tokenizer.special_tokens_map.keys()
        self.variables: dict[str, Any] = {}
        for name, value in columns.items():
            if name in _CONTENT:
                found = from_json(value or [], f"{label}: {name}")
                if found:
                    self.variables[name] = found
            elif name in names:
                self.variables[name] = plain(value, f"{label}: {name}")
            elif name in given:
                raise DataError(
                    f"{label}: {_KWARGS} has {name}, which the tokenizer's chat_template does not take; it takes "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )

    def render(self, messages: Sequence[Message], *, ask: bool = False, **defaults: Any) -> str:
        """The text of messages.

        Args:
            messages: plain JSON.
            ask: whether it ends where the assistant's next turn begins.
            defaults: variables that the record does not say itself.

        Raises:
            DataError: the template refuses them.
        """
        variables = defaults | self.variables
        source = self.source
        if "strftime_now" in source:
            found = {single or double for single, double in _FORMAT.findall(source)}
            variables |= {"_dates": {x: TODAY.strftime(x) for x in found}}
            source = _DATES + source
        return self._guard(
            lambda: cast(
                str,
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=ask,
                    **variables,
                ),
            )
        )

    def check_columns(self, messages: Sequence[Message], text: str) -> None:
        """Refuse tools or documents without which the text would be the same.

        Raises:
            DataError: names the column.
        """
        for name in _CONTENT:
            if name in self.variables:
                others = dict(self.variables)
                del others[name]
                if self.with_variables(others).render(messages) == text:
                    raise DataError(
                        f"{self.label}: the tokenizer's chat_template does not render {name}; take a model that is "
                        "made for them, or remove the column"
                    )

    def with_variables(self, variables: Mapping[str, Any]) -> "Template":
        """The same template with other variables."""
        other = object.__new__(Template)
        other.__dict__ = self.__dict__ | {"variables": variables}
        return other

    def _guard(self, call: Any) -> Any:
        # A template is a program that comes with the model; it may raise anything.
        try:
            return call()
        except Exception as error:
            said = " ".join(str(error).split())
            raise Refused(
                f"{self.label}: the tokenizer's chat_template refuses it: {said or type(error).__name__}"
            ) from error
