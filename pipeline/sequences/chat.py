"""Render a chat with the teacher's chat template, and find the assistant's turns in the result.

The template is rendered here and not by transformers for three reasons: it sees a fixed date instead of today's, the
assistant's turns are found in any template, and special tokens inside messages stay text. A message can't fake the
beginning or end of a turn either. Each turn found has the whole answer and nothing of another message; if a template
makes that impossible, the chat is refused.
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

from softlabel.pipeline.sequences.chat_places import MARKS, Messages, MessageText, Place, locate_texts
from softlabel.storage.errors import UsageError

# Marks within a rendered chat: code points that Unicode reserves as noncharacters.
_QUOTE, _UNQUOTE, _TURN_START, _TURN_END, _BREAK, _QUESTION, _ANSWER = (chr(0xFDD0 + i) for i in range(7))
_MARKS = re.compile(f"([{_QUOTE}-{_ANSWER}])")
_RESERVED = re.compile(f"[{_QUOTE}-{_ANSWER}{MARKS}]")

_AS_WRITTEN = "as the chat template writes it"


class ChatRefusedError(Exception):
    """Why a chat can't be rendered and captured."""


class RenderedChat(NamedTuple):
    """A chat as text: its pieces in order, each with whether special tokens in it are plain text; and the assistant's
    turns, as character ranges of the whole."""

    pieces: list[tuple[str, bool]]
    turns: list[tuple[int, int]]
    answers: list[Place]
    """Where the messages of these turns are ..."""
    others: list[Place]
    """... and where all other messages are."""


class _Turn(NamedTuple):
    """How the template writes a turn of the assistant."""

    pattern: re.Pattern[str]
    """Matches the header of the turn, and the rest up to its end."""
    broken: dict[str, str]
    """Header and end, each with the form that it gets inside messages: broken by marks, so that it does not match."""


class ChatTemplate:
    """A chat template with a fixed date.

    If the template uses ``{% generation %}``, the assistant's turns are what it encloses. Otherwise each turn goes from
    the template's header of the turn to its end, including the token that ends it; header and end are taken from a
    rendered chat of one question and one answer.

    Args:
        source: the template, in Jinja.
        special_tokens: values of the names that the template may use, such as bos_token.
        quoted: special tokens that are plain text inside messages.
        today: the date that ``strftime_now`` gives.

    Raises:
        UsageError: if the template can't be used, or does not mark where an assistant's turn ends.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], quoted: Iterable[str], today: date) -> None:
        environment = _environment(today)
        self._special_tokens = special_tokens
        self._quoted = re.compile("|".join(map(re.escape, sorted(quoted, key=len, reverse=True))) or "(?!)")
        try:
            self._template = environment.from_string(source)
            self._turn = None if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) else self._find_turn()
        except (TemplateError, TypeError, KeyError) as error:
            raise UsageError(
                "the teacher's chat template can't be used for capturing",
                expected="a template that writes a question and an answer, and marks where the answer ends",
                found=f"{type(error).__name__}: {error}",
                do="put the assistant's words between {% generation %} and {% endgeneration %} in chat_template.jinja",
            ) from None

    def write(self, chat: str, turns: Literal["all", "last"] = "all") -> RenderedChat:
        """Render a chat and find the assistant's turns that are to be captured.

        Args:
            chat: JSON: a list of messages, or {prompt, completion} with a list of messages each; of the latter, only
                turns of the completion are captured.
            turns: all turns, or only the last one.

        Raises:
            ChatRefusedError: if the template rejects the chat, it has no assistant message, or a turn to capture can't
                be shown to have all of its own message and nothing of another.
        """
        if found := _RESERVED.search(chat):
            raise ChatRefusedError(f"the chat contains U+{ord(found[0]):04X}, which is not a character")
        parts = json.loads(chat)
        prompt, completion = (parts["prompt"], parts["completion"]) if isinstance(parts, dict) else ([], parts)
        answering = len(_answers(completion))
        if not answering:
            raise ChatRefusedError(f"the {'completion' if prompt else 'chat'} has no assistant message")
        messages = prompt + completion
        answers = _answers(messages)
        wanted = answers[-answering:] if turns == "all" else answers[-1:]
        try:
            text = self._render(self._guarded_messages(messages))
        except Exception as error:  # a template is a program, and may raise anything
            raise ChatRefusedError(f"the chat template rejects the chat: {error}") from None
        if self._turn is not None:
            text = self._turn.pattern.sub(lambda turn: f"{turn[1]}{_TURN_START}{turn[2]}{_TURN_END}", text)
        pieces, found_turns = _parse(text)
        # A template with {% generation %} may enclose one message in several parts; then all parts are captured.
        if len(found_turns) != len(answers) and (self._turn is not None or len(wanted) < len(answers)):
            raise ChatRefusedError(
                f"the chat template writes {len(found_turns)} turns for {len(answers)} assistant messages"
            )
        return self._checked(pieces, found_turns[len(answers) - len(wanted) :], messages, wanted)

    def _checked(
        self, pieces: list[tuple[str, bool]], turns: list[tuple[int, int]], messages: Messages, wanted: list[int]
    ) -> RenderedChat:
        """The rendered chat, if each turn has exactly the text of its own message."""
        texts = locate_texts(self._rendered, messages, "".join(piece for piece, _ in pieces))
        if self._turn is None:
            answers = _answer_places(turns, wanted, texts)
        else:
            pairs = zip(turns, wanted, strict=True)
            answers = [place for turn, i in pairs for place in _answer_places([turn], [i], texts)]
        others = [place for text in texts if text.message not in wanted for place in text.places or ()]
        return RenderedChat(pieces, turns, answers, others)

    def _rendered(self, messages: Messages) -> str:
        """The messages as the template writes them, without the marks of this module."""
        return _MARKS.sub("", self._render(self._guarded_messages(messages)))

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        return self._template.render(messages=messages, add_generation_prompt=prompt, **self._special_tokens)

    def _guarded_messages(self, messages: Messages) -> Messages:
        # Templates compare the role, so it is not broken even if it begins a turn ("assistant\n").
        return [{**self._guarded(message), "role": self._quoted_text(message["role"])} for message in messages]

    def _guarded(self, value: Any) -> Any:
        """The value with marks around each special token, and inside each header or end of a turn, in its strings."""
        if isinstance(value, str):
            text = self._quoted_text(value)
            for whole, broken in self._turn.broken.items() if self._turn else ():
                text = text.replace(whole, broken)
            return text
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return value

    def _quoted_text(self, text: str) -> str:
        return self._quoted.sub(f"{_QUOTE}\\g<0>{_UNQUOTE}", text)

    def _find_turn(self) -> _Turn:
        """Find header and end of a turn by rendering a chat of one question and one answer."""
        question = {"role": "user", "content": _QUESTION}
        both = self._render([question, {"role": "assistant", "content": _ANSWER}])
        unanswered, prompted = self._render([question]), self._render([question], prompt=True)
        end = both.rpartition(_ANSWER)[2].rstrip()
        header = prompted.removeprefix(unanswered)
        if (
            not header or header == prompted or header not in both
        ):  # the template has no generation prompt, or a different one
            header = both.partition(_QUESTION)[2].rpartition(_ANSWER)[0]
        if not header.strip() or not end.strip():
            raise TemplateError(f"the template writes {header!r} before an answer and {end!r} after it")
        # Only the text without surrounding space is broken: a template may trim a message and add its own space.
        broken = {text: "".join(c + _BREAK for c in text) for text in (header.strip(), end.strip())}
        lead, body, trail = header.partition(header.strip())
        own = f"(?!{_BREAK})"  # not a single character that is in a message
        pattern = f"({re.escape(lead + body)}{own}{re.escape(trail)})(.*?{re.escape(end)}{own})"
        return _Turn(re.compile(pattern, re.DOTALL), broken)


class _Generation(Extension):
    """``{% generation %}``, as in transformers: encloses the assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_TURN_START}{caller()}{_TURN_END}"


def _answers(messages: Messages) -> list[int]:
    """Indices of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _answer_places(turns: list[tuple[int, int]], answers: list[int], texts: list[MessageText]) -> list[Place]:
    """Places of these messages, after a check that the turns have all of them and nothing of other messages."""
    places = []
    for text in texts:
        name = f"message {text.message} (counting from 0)"
        if text.places is None:
            raise ChatRefusedError(f"can't tell where the chat template writes {name}")
        if text.message in answers:
            inside = [place for place in text.places if place.whole and place.lies_in(turns)]
            if text.places and not inside:
                raise ChatRefusedError(f"the assistant's turn, {_AS_WRITTEN}, does not contain all of {name}")
            if text.core and not inside:
                raise ChatRefusedError(f"the chat template leaves out {name}")
            places += inside if text.core else []
        elif any(place.meets(turn) for place in text.places for turn in turns):
            raise ChatRefusedError(f"the assistant's turn, {_AS_WRITTEN}, also contains {name}")
    return places


def _environment(today: date) -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to templates, except for the date."""

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


def _parse(marked: str) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """The pieces and turns of a rendered chat with marks, without the marks."""
    pieces: list[tuple[str, bool]] = []
    turns: list[tuple[int, int]] = []
    quoted, position, start, text = False, 0, 0, ""
    for part in _MARKS.split(marked):
        if part in (_QUOTE, _UNQUOTE):
            pieces.append((text, quoted))
            quoted, text = part == _QUOTE, ""
        elif part == _TURN_START:
            start = position
        elif part == _TURN_END:
            turns.append((start, position))
        elif part != _BREAK:
            text += part
            position += len(part)
    pieces.append((text, quoted))
    return [piece for piece in pieces if piece[0]], turns
