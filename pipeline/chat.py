"""A chat as the teacher's template writes it, with the places that are the assistant's own words.

The template is rendered here, not by transformers, for three reasons: a fixed date instead of today's, the turns of
the assistant found in any template, and special tokens inside messages quoted, so that they stay text.
"""

import json
import re
from collections.abc import Iterable
from datetime import date, datetime, time
from typing import Any, Literal, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from storage.errors import UsageError

# Marks within a rendered chat. Unicode says of these code points that they never are characters of a text.
_QUOTE, _UNQUOTE, _SPEAK, _STOP, _ASKED, _ANSWERED = (chr(0xFDD0 + i) for i in range(6))
_MARKS = re.compile(f"([{_QUOTE}-{_ANSWERED}])")


class ChatRefusedError(Exception):
    """Why the template can't write a chat."""


class Written(NamedTuple):
    """A chat as text: its pieces in order, each with whether its special tokens are to be taken as text; and the
    assistant's turns, as character ranges of the whole."""

    pieces: list[tuple[str, bool]]
    turns: list[tuple[int, int]]


class ChatTemplate:
    """A chat template with its date.

    The assistant's turns are what ``{% generation %}`` encloses, if the template says so. Otherwise each goes from the
    template's own header of the turn to its own end of it, which includes the token that ends the turn. Header and
    end are read off a chat of one question and one answer.

    Args:
        source: the template, in Jinja.
        special_tokens: names that the template may use, like bos_token, and their values.
        quoted: special tokens that are text when a message contains them.
        today: the date that ``strftime_now`` gives.

    Raises:
        UsageError: if the template can't be used, or does not say where an assistant's turn ends.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], quoted: Iterable[str], today: date) -> None:
        environment = _environment(today)
        self._special_tokens = special_tokens
        self._quoted = re.compile("|".join(map(re.escape, sorted(quoted, key=len, reverse=True))) or "(?!)")
        try:
            self._template = environment.from_string(source)
            self._turn = None if re.search(r"\{%-?\s*generation\s*-?%\}", source) else self._find_turn()
        except (TemplateError, TypeError, KeyError) as error:
            raise UsageError(
                "the teacher's chat template can't be used for capturing",
                expected="a template that writes a question and its answer, with an end to the answer",
                found=f"{type(error).__name__}: {error}",
                do="enclose the assistant's words in {% generation %} ... {% endgeneration %} in chat_template.jinja",
            ) from None

    def write(self, chat: str, turns: Literal["all", "last"] = "all") -> Written:
        """A chat as the template writes it, and the turns of the assistant that are wanted.

        Args:
            chat: JSON: a list of messages, or {prompt, completion} with a list of messages each. Of the latter, only
                turns of the completion are wanted.
            turns: all of them, or the last alone.

        Raises:
            ChatRefusedError: if the template refuses it, or no assistant speaks in it.
        """
        if found := _MARKS.search(chat):
            raise ChatRefusedError(f"the chat holds U+{ord(found[0]):04X}, which is no character")
        parts = json.loads(chat)
        prompt, completion = (parts["prompt"], parts["completion"]) if isinstance(parts, dict) else ([], parts)
        wanted = _answers(completion)
        if not wanted:
            raise ChatRefusedError(f"no assistant speaks in the {'completion' if prompt else 'chat'}")
        answers = _answers(prompt) + wanted
        try:
            text = self._render(self._quote(prompt + completion))
        except Exception as error:  # a template is a program: it may stumble over a chat in any way
            raise ChatRefusedError(f"the chat template refuses it: {error}") from None
        if self._turn is not None:
            text = self._turn.sub(lambda turn: f"{turn[1]}{_SPEAK}{turn[2]}{_STOP}", text)
        written = _parse(text)
        wanted = wanted if turns == "all" else 1
        # A template that encloses what the assistant says may do so in several parts, all of which are wanted then.
        if len(written.turns) != answers and (self._turn is not None or wanted < answers):
            raise ChatRefusedError(
                f"the chat template writes {len(written.turns)} turns for {answers} of the assistant"
            )
        return written if wanted == answers else Written(written.pieces, written.turns[-wanted:])

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._template.render(messages=messages, add_generation_prompt=prompt, **self._special_tokens)

    def _quote(self, value: Any) -> Any:
        """The same messages, with marks around each special token in a string."""
        if isinstance(value, str):
            return self._quoted.sub(f"{_QUOTE}\\g<0>{_UNQUOTE}", value)
        if isinstance(value, list):
            return [self._quote(item) for item in value]
        return {key: self._quote(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _find_turn(self) -> re.Pattern[str]:
        """What a turn of the assistant looks like: its header, and what it says to the end of the turn."""
        question = {"role": "user", "content": _ASKED}
        both = self._render([question, {"role": "assistant", "content": _ANSWERED}])
        asked, prompted = self._render([question]), self._render([question], prompt=True)
        end = both.rpartition(_ANSWERED)[2].rstrip()
        header = prompted.removeprefix(asked)
        if not header or header == prompted or header not in both:  # the template knows no prompt, or another one
            header = both.partition(_ASKED)[2].rpartition(_ANSWERED)[0]
        if not header or not end:
            raise TemplateError(f"it writes {header!r} before an answer and {end!r} after it")
        own = f"(?<!{_QUOTE})"  # not one that a message quotes
        return re.compile(f"({own}{re.escape(header)})(.*?{own}{re.escape(end)})", re.DOTALL)


class _Generation(Extension):
    """``{% generation %}``, as transformers has it: encloses what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_SPEAK}{caller()}{_STOP}"


def _answers(messages: list[dict[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _environment(today: date) -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates, but for the date."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.combine(today, time()).strftime(form),
    }
    return environment


def _parse(marked: str) -> Written:
    """Take the marks out of a rendered chat."""
    pieces: list[tuple[str, bool]] = []
    turns: list[tuple[int, int]] = []
    quoted, position, start, text = False, 0, 0, ""
    for part in _MARKS.split(marked):
        if part in (_QUOTE, _UNQUOTE):
            pieces.append((text, quoted))
            quoted, text = part == _QUOTE, ""
        elif part == _SPEAK:
            start = position
        elif part == _STOP:
            turns.append((start, position))
        else:
            text += part
            position += len(part)
    pieces.append((text, quoted))
    return Written([piece for piece in pieces if piece[0]], turns)
