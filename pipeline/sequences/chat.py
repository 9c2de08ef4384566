"""Render a chat with the teacher's chat template, and find the assistant's turns in the result.

The template is rendered here and not by transformers for three reasons: it sees a fixed date instead of today's, the
assistant's turns are found in any template, and special tokens inside messages stay text. A message can't fake the
beginning or end of a turn either. Each turn found has the whole answer and nothing of another message; if a template
makes that impossible, the chat is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from jinja2 import UndefinedError

from softlabel.pipeline.sequences.chat_forms import ChatForms, UnfitPartError
from softlabel.pipeline.sequences.chat_places import (
    THOUGHTS,
    Messages,
    MessageText,
    Place,
    locate_texts,
    read_text,
    with_text,
)
from softlabel.pipeline.sequences.chat_rendering import (
    FIRST_MARK,
    LAST_MARK,
    QUOTE,
    STAND_IN,
    TURN_END,
    TURN_START,
    UNQUOTE,
    Renderer,
)
from softlabel.pipeline.sequences.chat_turns import TurnFinder, TurnNotFoundError
from softlabel.storage.errors import UsageError

_MARKS = re.compile(f"([{QUOTE}{UNQUOTE}{TURN_START}{TURN_END}])")
_RESERVED = re.compile(f"[{FIRST_MARK}-{LAST_MARK}]")

_AS_WRITTEN = "as the chat template writes it"

Span = tuple[int, int]


class ChatRefusedError(Exception):
    """Why a chat can't be rendered and captured."""


class RenderedChat(NamedTuple):
    """A chat as text: its pieces in order, each with whether special tokens in it are plain text; and the assistant's
    turns, as character ranges of the whole."""

    pieces: list[tuple[str, bool]]
    turns: list[Span]
    answers: list[Place]
    """Where the texts of these turns are ..."""
    others: list[Place]
    """... and where all other messages are."""
    whole: list[bool]
    """For each answer to capture, whether the template writes all of it: also its thoughts, its tool calls, and its
    content beside a tool call."""


class _Written(NamedTuple):
    """A rendered chat without marks, and what the marks enclosed."""

    text: str
    quotes: list[Span]
    """Special tokens in messages."""
    turns: list[Span]
    """What the template itself marks as the assistant's words."""


class ChatTemplate:
    """A chat template with a fixed date.

    If the template uses ``{% generation %}``, the assistant's turns are what it encloses. Otherwise each turn goes from
    the template's header of the turn to its end, including the token that ends it (see ``chat_turns``).

    Args:
        source: the template, in Jinja.
        variables: values of further names in the template, such as bos_token.
        quoted: special tokens that are plain text inside messages.
        today: the date that ``strftime_now`` gives.
        special_tokens: all special tokens.

    Raises:
        UsageError: if the template can't be used, or does not mark where an assistant's turn ends.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        quoted: Iterable[str],
        today: date,
        special_tokens: Iterable[str] = (),
    ) -> None:
        quoted = sorted(quoted, key=len, reverse=True)
        self._quoted = re.compile("|".join(map(re.escape, quoted)) or "(?!)")
        try:
            self._render = Renderer(source, dict(variables), today)
            self._forms = ChatForms(self._render)
            self._finder = None if self._render.marks_turns else self._turn_finder({*quoted, *special_tokens})
        except Exception as error:  # a template is a program, and may raise anything
            do = "put the assistant's words between {% generation %} and {% endgeneration %} in chat_template.jinja"
            if isinstance(error, UndefinedError) and str(error).endswith("is undefined"):  # jinja2's own words
                do = "give that value in sequences.chat_template_kwargs"
            raise UsageError(
                "the teacher's chat template can't be used for capturing",
                expected="a template that writes a question and an answer, and marks where the answer ends",
                found=f"{type(error).__name__}: {error}",
                do=do,
            ) from None

    def _turn_finder(self, special_tokens: set[str]) -> TurnFinder:
        return TurnFinder(self._render_plainly, self._forms.question, self._forms.answer, special_tokens)

    def write(self, chat: str, turns: Literal["all", "last"] = "all") -> RenderedChat:
        """Render a chat and find the assistant's turns that are to be captured.

        Args:
            chat: JSON: a list of messages, or {messages, tools}, or {prompt, completion} with a list of messages each
                (and tools); of the latter, only turns of the completion are captured.
            turns: all turns, or only the last one.

        Raises:
            ChatRefusedError: if the template rejects the chat, it has no assistant message, or a turn to capture can't
                be shown to have all of its own message and nothing of another.
        """
        if found := _RESERVED.search(chat):
            raise ChatRefusedError(f"the chat contains U+{ord(found[0]):04X}, which is not a character")
        parts = json.loads(chat)
        parts = parts if isinstance(parts, dict) else {"messages": parts}
        prompt, completion = parts.get("prompt", []), parts["completion"] if "prompt" in parts else parts["messages"]
        answering = len(_answers(completion))
        if not answering:
            raise ChatRefusedError(f"the {'completion' if prompt else 'chat'} has no assistant message")
        try:
            messages = [self._guarded_message(message) for message in self._forms.adapted(prompt + completion)]
        except UnfitPartError as reason:
            raise ChatRefusedError(str(reason)) from None
        answers = _answers(messages)
        wanted = answers[-answering:] if turns == "all" else answers[-1:]
        return self._written(messages, self._guarded(parts.get("tools")), answers, wanted)

    def _written(
        self, messages: Messages, tools: list[Any] | None, answers: list[int], wanted: list[int]
    ) -> RenderedChat:
        def render(messages: Messages, prompt: bool = False) -> str:
            return _MARKS.sub("", self._render(messages, tools, prompt))

        try:
            written = _parsed(self._render(messages, tools))
        except Exception as error:
            raise ChatRefusedError(f"the chat template rejects the chat: {error}") from None
        texts = locate_texts(render, messages, written.text)
        if any(text.places is None and text.kind == "content" for text in texts):
            number = next(text.message for text in texts if text.places is None and text.kind == "content")
            raise ChatRefusedError(f"can't tell where the chat template writes message {number} (counting from 0)")
        if self._finder is None:
            turns = _marked_turns(written.turns, answers, wanted, texts)
            places = _answer_places(turns, wanted, texts)
        else:
            turns, places = [], []
            for i in wanted:
                try:
                    found = self._finder.find(render, messages, written.text, texts, i)
                except TurnNotFoundError as reason:
                    raise ChatRefusedError(
                        f"can't tell {reason} in what the chat template writes for message {i} (counting from 0)"
                    ) from None
                turns += found
                places += _answer_places(found, [i], texts)
        if not places and (
            given := [t.message for t in texts if t.message in wanted and t.kind == "content" and t.core]
        ):
            raise ChatRefusedError(f"the chat template leaves out message {given[0]} (counting from 0)")
        others = [place for text in texts if text.message not in wanted for place in text.places or ()]
        quotes = [*written.quotes, *self._names_in_texts(render, messages, written.text)]
        whole = [_is_whole([text for text in texts if text.message == i], written.text, turns) for i in wanted]
        return RenderedChat(_pieces(written.text, quotes), turns, places, others, whole)

    def _render_plainly(self, messages: Messages, prompt: bool = False) -> str:
        return _MARKS.sub("", self._render(messages, None, prompt))

    def _guarded_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with marks around each special token in its strings, except in its content and thoughts.

        Templates look for their own marks in these, such as the end of a thought; see ``_names_in_texts``.
        """
        own = {key: message[key] for key in ("content", *THOUGHTS) if key in message}
        return self._guarded(message) | own if self._quoted.search(json.dumps(message, ensure_ascii=False)) else message

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._quoted.sub(f"{QUOTE}\\g<0>{UNQUOTE}", value)
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return value

    def _names_in_texts(self, render: Any, messages: Messages, written: str) -> list[Span]:
        """Where the template writes names of special tokens that it copies from a message's content or thoughts.

        These stay text. A name that the template reads (if it writes something else without that name) is not a copy:
        it is what the template takes it for, such as the end of a thought.
        """
        found = [
            (i, path, match)
            for i, message in enumerate(messages)
            for path, text in read_text(message)
            for match in self._quoted.finditer(text)
        ]
        groups = [found, *([name for name in found if name[:2] == at] for at in dict.fromkeys(n[:2] for n in found))]
        spans: list[Span] = []
        while groups:
            group = groups.pop(0)
            copies = self._copies(render, messages, written, group) if group else []
            if copies is not None:
                spans += copies
                groups = [] if group is found else groups
            elif len(group) > 1 and group is not found:
                groups += [[name] for name in group]
        return spans

    @staticmethod
    def _copies(
        render: Any, messages: Messages, written: str, names: list[tuple[int, tuple[str | int, ...], re.Match[str]]]
    ) -> list[Span] | None:
        """Where these names are written, or None if the template writes something else without them."""
        changed = list(messages)
        for i, path, match in names:
            middle = (match.start() + match.end()) // 2
            text = next(text for at, text in read_text(changed[i]) if at == path)
            changed[i] = with_text(changed[i], path, text[:middle] + STAND_IN + text[middle + 1 :])
        try:
            marked = render(changed)
        except Exception:
            return None
        if len(marked) != len(written) or any(a != b and a != STAND_IN for a, b in zip(marked, written, strict=True)):
            return None
        starts = [
            (match.start() - len(name) // 2, name)
            for match in re.finditer(STAND_IN, marked)
            for name in dict.fromkeys(found[0] for *_, found in names)
        ]
        return [(start, start + len(name)) for start, name in starts if written.startswith(name, start)]


def _answers(messages: Messages) -> list[int]:
    """Indices of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _answer_places(turns: list[Span], answers: list[int], texts: list[MessageText]) -> list[Place]:
    """Places of these messages, after a check that the turns have all of them and nothing of other messages."""
    places = []
    for text in texts:
        name = f"message {text.message} (counting from 0)"
        if text.message in answers:
            inside = [place for place in text.places or () if place.whole and place.lies_in(turns)]
            if text.kind == "content" and text.core and text.places and not inside:
                raise ChatRefusedError(f"the assistant's turn, {_AS_WRITTEN}, does not contain all of {name}")
            places += inside if text.core else []
        elif any(place.meets(turn) for place in text.places or () for turn in turns):
            raise ChatRefusedError(f"the assistant's turn, {_AS_WRITTEN}, also contains {name}")
    return places


def _marked_turns(marked: list[Span], answers: list[int], wanted: list[int], texts: list[MessageText]) -> list[Span]:
    """The turns of the wanted answers among those that the template marks; one answer may be marked in several parts.

    What it marks of other messages only is no turn. A part without any text belongs to the message before it or, if
    that is not the assistant's, to the one after it.
    """
    places = sorted((place.start, place.end, text.message) for text in texts for place in text.places or ())
    parts = [((start, end), [i for a, b, i in places if a < end and start < max(b, a + 1)]) for start, end in marked]
    parts = [part for part in parts if not part[1] or not set(answers).isdisjoint(part[1])] or parts
    if len(wanted) == len(answers):
        return [turn for turn, _ in parts]
    if len(parts) == len(answers):
        return [parts[answers.index(i)][0] for i in wanted]
    turns = []
    for (start, end), inside in parts:
        before = [message for _, b, message in places if b <= start][-1:]
        after = [message for a, _, message in places if a >= end][:1]
        owner = next((message for message in [*inside, *before, *after] if message in answers), None)
        if owner in wanted:
            turns.append((start, end))
    if not turns:
        raise ChatRefusedError(f"the chat template marks {len(marked)} turns for {len(answers)} assistant messages")
    return turns


def _is_whole(texts: list[MessageText], written: str, turns: list[Span]) -> bool:
    """Whether the template writes all texts of an answer, apart from space. Its thoughts may have several keys."""

    def is_written(text: MessageText) -> bool:
        if text.places is None or not text.core:
            return True
        inside = [place for place in text.places if place.whole and place.lies_in(turns)]
        if text.kind == "call":
            return bool(inside)
        bare = "".join(text.core.split())
        return any(
            place.exact or "".join(written[max(0, place.end - 2 * len(text.core)) : place.end].split()).endswith(bare)
            for place in inside
        )

    thoughts = [is_written(text) for text in texts if text.kind == "thought"]
    return all(is_written(text) for text in texts if text.kind != "thought") and (any(thoughts) or not thoughts)


def _parsed(marked: str) -> _Written:
    """A rendered chat with marks, taken apart."""
    spans, starts = {UNQUOTE: list[Span](), TURN_END: list[Span]()}, {UNQUOTE: 0, TURN_END: 0}
    begins = {QUOTE: UNQUOTE, TURN_START: TURN_END}
    pieces = []
    size = 0
    for part in _MARKS.split(marked):
        if part in begins:
            starts[begins[part]] = size
        elif part in spans:
            spans[part].append((starts[part], size))
        else:
            pieces.append(part)
            size += len(part)
    text = "".join(pieces)
    return _Written(text, spans[UNQUOTE], spans[TURN_END])


def _pieces(text: str, quotes: list[Span]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is quoted."""
    return list(_split(text, sorted(set(quotes))))


def _split(text: str, quotes: list[Span]) -> Iterator[tuple[str, bool]]:
    bounds = [(0, 0), *quotes, (len(text), len(text))]
    for (_, last), (start, end) in pairwise(bounds):
        if last < start:
            yield text[last:start], False
        if start < end:
            yield text[start:end], True
