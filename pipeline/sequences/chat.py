"""A chat as the teacher's template writes it, with the places that are the assistant's own words.

The template is rendered here, not by transformers, for three reasons: a fixed date instead of today's, the turns of
the assistant found in any template, and special tokens inside messages quoted, so that they stay text. Nor does a
message begin or end a turn by words that the template uses for it. Whatever the template does: a turn that is found
holds the whole of its answer and nothing of another message, or the chat is refused.
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

from softlabel.pipeline.sequences.chat_places import MARKS, Messages, Place, Said, said
from softlabel.storage.errors import UsageError

# Marks within a rendered chat. Unicode says of these code points that they never are characters of a text.
_QUOTE, _UNQUOTE, _SPEAK, _STOP, _BREAK, _ASKED, _ANSWERED = (chr(0xFDD0 + i) for i in range(7))
_MARKS = re.compile(f"([{_QUOTE}-{_ANSWERED}])")
_NO_TEXT = re.compile(f"[{_QUOTE}-{_ANSWERED}{MARKS}]")

_AS_WRITTEN = "as the chat template writes it"


class ChatRefusedError(Exception):
    """Why the template can't write a chat."""


class Written(NamedTuple):
    """A chat as text: its pieces in order, each with whether its special tokens are to be taken as text; and the
    assistant's turns, as character ranges of the whole."""

    pieces: list[tuple[str, bool]]
    turns: list[tuple[int, int]]
    answers: list[Place]
    """What the assistant says in these turns, ..."""
    others: list[Place]
    """... and what else is said, by anyone."""


class _Turn(NamedTuple):
    """What a turn of the assistant looks like."""

    pattern: re.Pattern[str]
    """Its header, and what it says to the end of the turn."""
    broken: dict[str, str]
    """What begins and ends it, and the same as a message may have it: broken by marks, and so passed over."""


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
            self._turn = None if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) else self._find_turn()
        except (TemplateError, TypeError, KeyError) as error:
            raise UsageError(
                "the teacher's chat template can't be used for capturing",
                expected="a template that writes a question and an answer, and marks where the answer ends",
                found=f"{type(error).__name__}: {error}",
                do="put the assistant's words between {% generation %} and {% endgeneration %} in chat_template.jinja",
            ) from None

    def write(self, chat: str, turns: Literal["all", "last"] = "all") -> Written:
        """A chat as the template writes it, and the turns of the assistant that are wanted.

        Args:
            chat: JSON: a list of messages, or {prompt, completion} with a list of messages each. Of the latter, only
                turns of the completion are wanted.
            turns: all of them, or the last alone.

        Raises:
            ChatRefusedError: if the template refuses it, no assistant speaks in it, or a turn that is wanted, as far as
                it can be told, does not hold all that its message says, or holds what another does.
        """
        if found := _NO_TEXT.search(chat):
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
        except Exception as error:  # a template is a program: it may stumble over a chat in any way
            raise ChatRefusedError(f"the chat template rejects the chat: {error}") from None
        if self._turn is not None:
            text = self._turn.pattern.sub(lambda turn: f"{turn[1]}{_SPEAK}{turn[2]}{_STOP}", text)
        pieces, spoken = _parse(text)
        # A template that encloses what the assistant says may do so in several parts, all of which are wanted then.
        if len(spoken) != len(answers) and (self._turn is not None or len(wanted) < len(answers)):
            raise ChatRefusedError(
                f"the chat template writes {len(spoken)} turns for {len(answers)} assistant messages"
            )
        return self._checked(pieces, spoken[len(answers) - len(wanted) :], messages, wanted)

    def _checked(
        self, pieces: list[tuple[str, bool]], turns: list[tuple[int, int]], messages: Messages, wanted: list[int]
    ) -> Written:
        """The chat as written, if the wanted turns hold just what the messages say of which they are."""
        texts = said(self._written_of, messages, "".join(piece for piece, _ in pieces))
        if self._turn is None:
            heard = _heard(turns, wanted, texts)
        else:
            heard = [place for turn, i in zip(turns, wanted, strict=True) for place in _heard([turn], [i], texts)]
        others = [place for text in texts if text.message not in wanted for place in text.places or ()]
        return Written(pieces, turns, heard, others)

    def _written_of(self, messages: Messages) -> str:
        """What the template writes of messages, without the marks of this file."""
        return _MARKS.sub("", self._render(self._guarded_messages(messages)))

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        return self._template.render(messages=messages, add_generation_prompt=prompt, **self._special_tokens)

    def _guarded_messages(self, messages: Messages) -> Messages:
        # A template compares the role, which may be what begins a turn ("assistant\n"): that is not broken.
        return [{**self._guarded(message), "role": self._quoted_text(message["role"])} for message in messages]

    def _guarded(self, value: Any) -> Any:
        """The same, with marks around each special token in a string, and within each header or end of a turn."""
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
        """Read header and end of a turn off a chat of one question and one answer."""
        question = {"role": "user", "content": _ASKED}
        both = self._render([question, {"role": "assistant", "content": _ANSWERED}])
        asked, prompted = self._render([question]), self._render([question], prompt=True)
        end = both.rpartition(_ANSWERED)[2].rstrip()
        header = prompted.removeprefix(asked)
        if not header or header == prompted or header not in both:  # the template knows no prompt, or another one
            header = both.partition(_ASKED)[2].rpartition(_ANSWERED)[0]
        if not header.strip() or not end.strip():
            raise TemplateError(f"the template writes {header!r} before an answer and {end!r} after it")
        # Broken is what has no space around: a template may trim a message, and put its own there.
        broken = {text: "".join(c + _BREAK for c in text) for text in (header.strip(), end.strip())}
        lead, body, trail = header.partition(header.strip())
        own = f"(?!{_BREAK})"  # not a single character that a message has
        pattern = f"({re.escape(lead + body)}{own}{re.escape(trail)})(.*?{re.escape(end)}{own})"
        return _Turn(re.compile(pattern, re.DOTALL), broken)


class _Generation(Extension):
    """``{% generation %}``, as transformers has it: encloses what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_SPEAK}{caller()}{_STOP}"


def _answers(messages: Messages) -> list[int]:
    """Which of the messages are the assistant's."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _heard(turns: list[tuple[int, int]], speakers: list[int], texts: list[Said]) -> list[Place]:
    """What these messages say: the turns hold all of it, and nothing that another message says."""
    answers = []
    for text in texts:
        if text.places is None:
            raise ChatRefusedError(f"can't tell where the chat template writes message {text.message}")
        if text.message in speakers:
            inside = [place for place in text.places if place.whole and place.lies_in(turns)]
            if text.places and not inside:
                raise ChatRefusedError(
                    f"the assistant's turn, {_AS_WRITTEN}, does not contain all of message {text.message}"
                )
            if text.core and not inside:
                raise ChatRefusedError(f"the chat template leaves out message {text.message}")
            answers += inside if text.core else []
        elif any(place.meets(turn) for place in text.places for turn in turns):
            raise ChatRefusedError(f"the assistant's turn, {_AS_WRITTEN}, also contains message {text.message}")
    return answers


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


def _parse(marked: str) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """The pieces and the turns of a rendered chat, without its marks."""
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
        elif part != _BREAK:
            text += part
            position += len(part)
    pieces.append((text, quoted))
    return [piece for piece in pieces if piece[0]], turns
