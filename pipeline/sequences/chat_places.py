"""Find where a chat template writes the text of each message.

A template is a program, so the place of a message in its output can't be read from its source. Instead, the chat is
rendered again with marks around each message's text. If the output is the same except for the marks, they show where
the message begins and ends.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

# Code points that Unicode reserves as noncharacters.
_BEGIN, _END, _NUMBERED = (chr(0xFDD7 + i) for i in range(3))
MARKS = f"{_BEGIN}{_END}{_NUMBERED}"
_MARK = re.compile(f"([{_BEGIN}{_END}])([0-9]+){_NUMBERED}")
_SPACE = re.compile(r"\s+")

Messages = list[dict[str, Any]]
Path = tuple[str | int, ...]
Kind = Literal["content", "thought", "call"]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which a message has the assistant's thoughts, if they are not in its content."""


class Place(NamedTuple):
    """A range of characters in the rendered chat that has text of a message."""

    start: int
    end: int
    whole: bool
    """Whether it has the text's end; a template may leave out the beginning, such as an earlier thought."""
    exact: bool = False
    """Whether it has all of the text, as marks around the text have shown."""

    def meets(self, turn: tuple[int, int]) -> bool:
        """Whether it overlaps the turn; an empty place does if it is strictly inside the turn."""
        return self.start < turn[1] and turn[0] < self.end

    def lies_in(self, turns: list[tuple[int, int]]) -> bool:
        """Whether the turns (in order) together cover all of it."""
        reached = self.start
        for start, end in turns:
            if start <= reached <= end:
                reached = end
        return reached >= self.end and any(start <= self.start <= end for start, end in turns)


class MessageText(NamedTuple):
    """A text of a message (its content, or a part of it), and where it is in the rendered chat."""

    message: int
    kind: Kind
    path: Path
    """Keys and indices that lead to the text in its message."""
    text: str
    core: str
    """The text without surrounding space, which templates may trim."""
    places: list[Place] | None
    """None if they can't be determined."""


def locate_texts(
    render: Callable[[Messages], str], messages: Messages, written: str, only: int | None = None
) -> list[MessageText]:
    """The texts of a chat's messages, and where they are in the rendered chat.

    Args:
        render: renders messages. It may raise anything.
        messages: the chat's messages. Their texts are in their content (a string, or parts, some of which have a text)
            and, if they are the assistant's, in its thoughts and tool calls.
        written: the rendered messages.
        only: index of the only message whose texts are wanted.
    """
    search = _Search(render, messages, written, range(len(messages)) if only is None else (only,))
    for empty in (False, True):  # marks in an empty text are more likely to change the output
        search.find([i for i, text in enumerate(search.texts) if empty == (not text.core)])
    return [
        MessageText(*text, text.core, search.found.get(i, None if text.core else []))
        for i, text in enumerate(search.texts)
    ]


class _Text(NamedTuple):
    message: int
    kind: Kind
    path: Path
    text: str

    @property
    def core(self) -> str:
        return self.text.strip()

    def with_core(self, core: str) -> str:
        """The text with another core, between the same space."""
        lead = len(self.text) - len(self.text.lstrip()) if self.core else 0
        return self.text[:lead] + core + self.text[lead + len(self.core) :]

    def marked(self, number: int, inner: slice) -> str:
        """The text with marks around a part of its core."""
        core = self.core
        return self.with_core(core[: inner.start] + _marked(core[inner], number) + core[inner.stop :])

    def place(self, written: str, inner: slice, span: tuple[int | None, int | None], exact: bool) -> Place:
        """The text's place around its marks, one of which the template may have cut off.

        Args:
            written: the whole rendered chat.
            inner: the part of the text that has marks around it.
            span: positions of the marks.
            exact: whether the place begins at the first mark. If not, it is extended backwards as far as the output
                equals the text.
        """
        sure = [(at, cut) for at, cut in zip(span, (inner.start, inner.stop), strict=True) if at is not None]
        (start, first), (end, last) = sure[0], sure[-1]
        before, after = "" if exact else self.core[:first], self.core[last:]
        start -= _common(before[::-1], written[max(0, start - len(before)) : start][::-1])
        more = _common(after, written[end : end + len(after)])
        space = len(written[start:end]) - len(written[start:end].lstrip())
        return Place(start + space, end + more, more == len(after), (first, last) == (0, len(self.core)))


def _texts(messages: Messages, numbers: Iterable[int]) -> Iterator[_Text]:
    for i in numbers:
        message = messages[i]
        yield from (_Text(i, "content", ("content", *path), text) for path, text in _content(message.get("content")))
        if message["role"] == "assistant":
            thoughts = (((key,), message.get(key)) for key in THOUGHTS)
            yield from (_Text(i, "thought", path, t) for path, t in thoughts if isinstance(t, str) and t)
            calls = _called(message.get("tool_calls"), ("tool_calls",))
            yield from (_Text(i, "call", path, text) for path, text in calls if text.strip())


def read_text(message: dict[str, Any]) -> list[tuple[Path, str]]:
    """The texts of a message that a template may look into: its content and the assistant's thoughts."""
    thoughts = [((key,), message[key]) for key in THOUGHTS if isinstance(message.get(key), str)]
    return [*((("content", *path), text) for path, text in _content(message.get("content"))), *thoughts]


def _content(content: Any) -> Iterator[tuple[Path, str]]:
    if isinstance(content, str):
        yield (), content
    for j, part in enumerate(content) if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield (j, "text"), part["text"]


def _called(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """The names and arguments of tool calls. The other strings in a call, such as its id, are not the assistant's."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _called(item, (*path, i))
    elif isinstance(value, dict):
        is_argument = "arguments" in path
        for key, item in value.items():
            if is_argument or key in ("function", "name", "arguments"):
                yield from _called(item, (*path, key))


class _Search:
    """The search for the places of a chat's texts."""

    def __init__(
        self, render: Callable[[Messages], str], messages: Messages, written: str, numbers: Iterable[int]
    ) -> None:
        self._render, self._messages, self._written = render, messages, written
        self.texts = list(_texts(messages, numbers))
        self.found: dict[int, list[Place]] = {}
        """The places of each text, by its number; an empty list for a text that the template leaves out."""

    def find(self, numbers: list[int]) -> None:
        """Find as many of these texts as possible: all together, grouped by kind and role, or one by one."""
        kinds = {i: (self.texts[i].kind, self._messages[self.texts[i].message]["role"]) for i in numbers}
        groups = [[i for i in numbers if kinds[i] == kind] for kind in dict.fromkeys(kinds.values())]
        if self._mark(self._whole(numbers)) is None:
            for group in groups:
                self._mark(self._whole(group))
        for group in groups:
            self._find_parts(group)
        for i in self._missing(numbers):
            self._mark(self._whole([i]))
            self._find_parts([i])
        for i in self._missing(numbers):
            for at in {0, len(self.texts[i].core) // 2} if self.texts[i].core else ():
                self._replace(i, at)
        for i in self._missing(numbers):
            self._leave_out_answer(i)

    def _whole(self, numbers: list[int]) -> dict[int, slice]:
        return {i: slice(0, len(self.texts[i].core)) for i in numbers}

    def _find_parts(self, numbers: list[int]) -> None:
        """Find texts of which the template leaves out a part, or whose beginning or end it inspects.

        Marks there would change the output, so they go around the last character, the first, or one in the middle.
        """
        sizes = {i: len(self.texts[i].core) for i in self._missing(numbers) if self.texts[i].core}
        self._leave_out(list(sizes))
        self._begin(self._mark({i: slice(sizes[i] - 1, sizes[i]) for i in self._missing(list(sizes))}) or [])
        self._mark({i: slice(0, 1) for i in self._missing(list(sizes))})
        middle = {i: slice((sizes[i] - 1) // 2, (sizes[i] + 1) // 2) for i in self._missing(list(sizes))}
        self._begin(self._mark(middle) or [])

    def _missing(self, numbers: list[int]) -> list[int]:
        return [i for i in numbers if i not in self.found]

    def _mark(self, inner: dict[int, slice], exact: bool = False) -> list[int] | None:
        """Render with marks around a part of each of these texts, and record the places of the marks that come back.

        Returns:
            The numbers of the texts found, or None if the marks change the template's output.
        """
        spans = self._spans({i: self.texts[i].marked(i, part) for i, part in inner.items()})
        if spans is None:
            return None
        sure = [i for i, found in spans.items() if any(None not in span for span in found)]
        for i in sure:
            self.found[i] = [self.texts[i].place(self._written, inner[i], span, exact) for span in spans[i]]
        return sure

    def _replace(self, number: int, at: int) -> None:
        """Replace a character with a mark: the text keeps its length, in case the template depends on it."""
        text = self.texts[number]
        try:
            marked = self._render(self._with({number: text.with_core(text.core[:at] + _BEGIN + text.core[at + 1 :])}))
        except Exception:
            return
        if _BEGIN in marked and marked.replace(_BEGIN, text.core[at]) == self._written:
            spans = [(found.start(), found.end()) for found in re.finditer(_BEGIN, marked)]
            self.found[number] = [text.place(self._written, slice(at, at + 1), span, False) for span in spans]

    def _begin(self, numbers: list[int]) -> None:
        """Find where these texts begin, of which the template leaves out the beginning.

        The characters before the part found may equal the text only by chance, and be the template's own. So a mark is
        tried there, then before the next word, and then by bisection.
        """
        cores = {i: self.texts[i].core for i in numbers}
        first = {i: max(0, len(cores[i]) - max(p.end - p.start for p in self.found[i])) for i in numbers}
        first = self._begin_at(first)
        first = self._begin_at({i: _next_word(cores[i], at) for i, at in first.items()})
        for i, at in first.items():
            low, high = at + 1, len(cores[i])
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if self._begin_at({i: middle}) else (low, middle)

    def _begin_at(self, first: dict[int, int]) -> dict[int, int]:
        """The texts, with their assumed beginnings, of which less than that is written."""
        sure = self._mark({i: slice(at, len(self.texts[i].core)) for i, at in first.items()}, exact=True) or []
        rest = {i: slice(at, at + 1) for i, at in first.items() if i not in sure}  # it may inspect the text's end
        sure += self._mark(rest, exact=True) or []
        return {i: at for i, at in first.items() if i not in sure}

    def _leave_out(self, numbers: list[int]) -> None:
        """Record that these texts are left out, if the output is the same without them."""
        if self._spans({i: _marked("", i) for i in numbers}) is not None:
            self.found |= {i: [] for i in numbers}

    def _leave_out_answer(self, number: int) -> None:
        """Record that this text of the assistant is left out if marks in its middle are left out with it.

        The template reads such a text: for example, the marks of a thought that it does not write.
        """
        text = self.texts[number]
        middle = len(text.core) // 2
        is_answer = bool(text.core) and self._messages[text.message]["role"] == "assistant"
        if is_answer and self._spans({number: text.marked(number, slice(middle, middle + 1))}) == {}:
            self.found[number] = []

    def _spans(self, words: dict[int, str]) -> dict[int, list[tuple[int | None, int | None]]] | None:
        """Positions of the marks of these texts, if the output is the same except for the marks."""
        if not words:
            return None
        try:
            bare, marks = _read(self._render(self._with(words)))
        except Exception:  # a template is a program, and may raise anything
            return None
        return {i: _paired(found) for i, found in marks.items()} if bare == self._written else None

    def _with(self, words: dict[int, str]) -> Messages:
        """The messages with some texts replaced."""
        changed = list(self._messages)
        for i, text in words.items():
            number, _, path, _ = self.texts[i]
            changed[number] = with_text(changed[number], path, text)
        return changed


def with_text(value: Any, path: Path, text: str) -> Any:
    """The message, or another tree of dicts and lists, with another text at the end of this path."""
    if not path:
        return text
    changed = value.copy()
    changed[path[0]] = with_text(value[path[0]], path[1:], text)
    return changed


def _next_word(text: str, start: int) -> int:
    """Where the next word begins, or the last character if there is no next word."""
    found = _SPACE.search(text, start)
    return found.end() if found else len(text) - 1


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marked(text: str, number: int) -> str:
    return f"{_BEGIN}{number}{_NUMBERED}{text}{_END}{number}{_NUMBERED}"


def _read(marked: str) -> tuple[str, dict[int, list[tuple[str, int]]]]:
    """A text without its marks, and for each number its marks with their positions."""
    first, *rest = _MARK.split(marked)
    texts, size, marks = [first], len(first), defaultdict[int, list[tuple[str, int]]](list)
    for mark, number, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        marks[int(number)].append((mark, size))
        texts.append(text)
        size += len(text)
    return "".join(texts), marks


def _paired(marks: list[tuple[str, int]]) -> list[tuple[int | None, int | None]]:
    """Pairs of begin and end marks; None for a mark that the template has cut off."""
    pairs: list[tuple[int | None, int | None]] = []
    for mark, at in marks:
        if mark == _BEGIN:
            pairs.append((at, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], at)
        else:
            pairs.append((None, at))
    return pairs
