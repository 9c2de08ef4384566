"""Run a chat template as transformers does, but with a fixed date, and with marks that survive in what it writes."""

import json
import re
from datetime import date, datetime, time
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from softlabel.pipeline.sequences.chat_places import Messages

FIRST_MARK, LAST_MARK = "\ufdd0", "\ufdd9"
"""Marks are code points that Unicode reserves as noncharacters; this module and ``chat_places`` divide these among
them."""
QUOTE, UNQUOTE, TURN_START, TURN_END, STAND_IN, ANSWER = (chr(ord(FIRST_MARK) + i) for i in range(6))
_ESCAPED_MARK = re.compile(r"\\u(fdd[0-9a-f])")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Renderer:
    """A chat template with everything that it is given except the chat.

    Args:
        source: the template, in Jinja.
        variables: values of further names, such as bos_token.
        today: the date that ``strftime_now`` gives.

    Raises:
        TemplateError: if the template is not valid.
    """

    def __init__(self, source: str, variables: dict[str, Any], today: date) -> None:
        self._template = _environment(today).from_string(source)
        self._variables = variables
        self.marks_turns = bool(_GENERATION.search(source))
        """Whether the template itself encloses the assistant's words, with ``{% generation %}``."""

    def __call__(self, messages: Messages, tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The chat as the template writes it; with ``prompt``, so that the assistant is to answer next.

        A template is a program, and may raise anything.
        """
        given = self._variables if tools is None else {**self._variables, "tools": tools}
        return self._template.render(messages=messages, add_generation_prompt=prompt, **given)


def _environment(today: date) -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to templates, except for the date."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        written = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        return _ESCAPED_MARK.sub(lambda mark: chr(int(mark[1], 16)), written) if ensure_ascii else written

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.combine(today, time()).strftime(form),
    }
    return environment


class _Generation(Extension):
    """``{% generation %}``, as in transformers: encloses the assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{TURN_START}{caller()}{TURN_END}"
