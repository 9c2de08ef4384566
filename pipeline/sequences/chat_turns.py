"""Find where each of the assistant's turns begins and ends, in a template that does not mark them itself.

A turn begins after what the template writes to prompt the assistant, and ends with what it writes to end the turn. Both
can differ from turn to turn: a prompt may open a thought that earlier turns lack, and the last turn may end in its own
way. So they are compared with renderings of the same chat up to this turn.
"""

import os.path
import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from jinja2 import TemplateError

from softlabel.pipeline.sequences.chat_forms import attempt
from softlabel.pipeline.sequences.chat_places import Messages, MessageText, Place, locate_texts
from softlabel.pipeline.sequences.chat_rendering import ANSWER, STAND_IN


class Render(Protocol):
    """Renders messages of a chat, which may raise anything."""

    def __call__(self, messages: Messages, prompt: bool = False) -> str:
        """The rendered messages; with ``prompt``, so that the assistant is to answer next."""
        ...


class TurnNotFoundError(Exception):
    """Why the beginning or end of a turn can't be found."""


class _Gaps(NamedTuple):
    """What the template writes around an answer, up to the messages before and after it."""

    before: str
    after: str


class TurnFinder:
    """Finds turns in the chats that a template writes.

    Args:
        render: the template.
        question: a user's message, in a form that the template takes, ...
        answer: ... and one of the assistant. Their texts are ``STAND_IN`` and ``ANSWER``.
        special_tokens: the tokenizer's special tokens.

    Raises:
        TemplateError: if the template does not mark where a turn ends.
    """

    def __init__(
        self, render: Render, question: dict[str, object], answer: dict[str, object], special_tokens: Iterable[str]
    ) -> None:
        special = sorted(special_tokens, key=len, reverse=True)
        named = "|".join(map(re.escape, special)) or "(?!)"
        self._mark = re.compile(rf"{named}|<[^<>\s]+>|\[[^\[\]\s]+\]")
        self._unit = re.compile(rf"{self._mark.pattern}|\w+|\s+|.", re.DOTALL)
        pair = [question, answer]
        both = render(pair)
        self._head, _, rest = both.partition(STAND_IN)
        between, _, end = rest.rpartition(ANSWER)
        self._end = end.rstrip()
        """How the template ends a turn that is the last of its chat."""
        self._prompt = self._prompt_after(render, [question])
        """What it writes to prompt the assistant after a question; if that differs from what is before an answer or
        is nothing, everything between question and answer."""
        if not self._prompt or self._prompt not in between:
            self._prompt = between
        gaps = self._gaps(render, [*pair, *pair])
        self._start = self._common_start([self._prompt, *(gap.before for gap in gaps)])
        """The part of this that all answers have before them."""
        if not self._end.strip() and not (gaps and self._leading_mark(gaps[0].after)):
            raise TemplateError(f"the template writes {between!r} before an answer and {end!r} after it")
        self._answer = answer

    def find(self, render: Render, messages: Messages, written: str, texts: list[MessageText], i: int) -> Place:
        """Where the turn of message ``i`` is, which is one of the assistant.

        Args:
            render: renders messages of this chat.
            messages: the chat.
            written: the rendered chat.
            texts: where the texts of all messages are.
            i: index of the message.

        Raises:
            TurnNotFoundError: if the turn's beginning or end can't be told.
        """
        turn = _Turn(render, messages, written, i)
        own = turn.own(texts)
        others = sorted(place for text in texts if text.message != i for place in text.places or ())
        if not own:
            own = [(self._nothing(written, texts, i), "")]
        first, (final, text) = min(own)[0], max(own, key=lambda each: each[0].end)
        last, space = final.end, text[len(text.rstrip()) :]
        before = max((place.end for place in others if place.end <= first.start), default=0)
        after = min((place.start for place in others if place.start >= last), default=len(written))
        start = self._begin(turn, before, first, texts)
        space = space if written.startswith(space, last) else ""
        end = self._finish(turn, last, len(space), after, after == len(written) and i == len(messages) - 1)
        return Place(min(start, first.start), end, whole=True)

    def _nothing(self, written: str, texts: list[MessageText], i: int) -> Place:
        """The place of an answer without text: where the template prompts for it, between its neighbours."""
        before = max((p.end for text in texts if text.message < i for p in text.places or ()), default=0)
        after = min((p.start for text in texts if text.message > i for p in text.places or ()), default=len(written))
        gap = written[before:after]
        if not self._prompt or gap.count(self._prompt) != 1:
            raise TurnNotFoundError("where the assistant's turn begins")
        at = before + gap.index(self._prompt) + len(self._prompt)
        # What the template adds to an empty answer, such as an empty thought, is part of the turn.
        end = written.find(self._end, at, after) if self._end else -1
        return Place(at, max(at, end), whole=True)

    def _begin(self, turn: "_Turn", before: int, first: Place, texts: list[MessageText]) -> int:
        gap = turn.written[before : first.start]
        prompt = self._prompt
        if prompt not in gap:  # it may be another one at this place
            prompt = self._prompt_after(turn.render, turn.messages[: turn.i])
        if prompt and prompt in gap:
            return before + gap.rindex(prompt) + len(prompt)
        contents = [text for text in texts if text.kind == "content" and first in (text.places or ())]
        if any(self._begins(turn.written, first, text) for text in contents):
            return first.start
        # The turn begins with something else, such as a thought or a tool call, which the template introduces.
        if (start := self._start.strip()) and (at := gap.rfind(start)) >= 0:
            rest = gap[at + len(start) :]
            return before + at + len(start) + _common([rest, self._start.partition(start)[2]])
        plain = [*turn.messages[: turn.i], self._answer, *turn.messages[turn.i + 1 :]]
        written = attempt(turn.render, plain) or ""
        common = self._common(written.partition(ANSWER)[0], turn.written[: first.start])
        if ANSWER in written and common > before:
            return common
        raise TurnNotFoundError("where the assistant's turn begins")

    @staticmethod
    def _begins(written: str, place: Place, text: MessageText) -> bool:
        """Whether the place has the text's beginning."""
        return place.start == place.end or written.startswith(text.core[:1], place.start)

    def _finish(self, turn: "_Turn", last: int, space: int, after: int, is_last: bool) -> int:
        gap = turn.written[last:after]
        for skip in (0, space):  # a template may trim the answer
            if self._end.strip() and gap.startswith(self._end, skip):
                return last + skip + len(self._end)
        if is_last:
            return last + len(gap.rstrip())
        end = turn.end_as_last()
        if end.strip() and gap.startswith(end):
            more = 0 if self._end.strip() else self._leading_mark(gap[len(end) :])
            return last + len(end) + more
        next_role = turn.messages[turn.i + 1]["role"]
        if not gap.strip() and next_role == "assistant":
            return last + space
        for found in (self._end_before_prompt(turn), self._end_before_next(gap)):
            if found is not None and gap.startswith(found):
                if found.strip() or self._end.strip():  # only the chat's last turn ends with a mark
                    return last + (len(found) or space)
                break
        if mark := self._leading_mark(gap):  # a turn ends where the next role begins
            return last + mark
        raise TurnNotFoundError("where the assistant's turn ends")

    def _end_before_prompt(self, turn: "_Turn") -> str | None:
        """The end of the turn, if the assistant is prompted again after it."""
        before = turn.messages[: turn.i + 1]
        prompt = self._prompt_after(turn.render, before) or self._prompt
        for each in dict.fromkeys((prompt, self._prompt)):
            tail = turn.tail(prompt=True)
            if tail is not None and each and tail.endswith(each):
                return tail.removesuffix(each).rstrip()
        return None

    def _end_before_next(self, gap: str) -> str | None:
        """The end of the turn, if what follows it is what the template begins a chat with."""
        head = self._head
        while head:
            if head.strip() and gap.rstrip().endswith(head.rstrip()):
                return gap.rstrip().removesuffix(head.rstrip()).rstrip()
            mark = self._mark.match(head)
            head = head[mark.end() :] if mark else ""
        return None

    def _leading_mark(self, text: str) -> int:
        """Length of the text up to the end of the mark that it begins with; 0 if it begins with something else."""
        space = len(text) - len(text.lstrip())
        mark = self._mark.match(text, space)
        return mark.end() if mark else 0

    def _prompt_after(self, render: Render, messages: Messages) -> str:
        """What the template adds to these messages so that the assistant answers; "" if nothing."""
        prompted, plain = attempt(render, messages, prompt=True), attempt(render, messages)
        if prompted is None or plain is None or prompted == plain:
            return ""
        return prompted[self._common(prompted, plain) :]

    def _common(self, one: str, other: str) -> int:
        """Length of the common beginning of two texts, without a mark or word that they share only in part."""
        size = _common([one, other])
        if size in (len(one), len(other)) and size == min(len(one), len(other)):
            return size
        # A unit ends at the same place in both texts, or it is not common.
        line = one.rfind("\n", 0, max(0, size - 1)) + 1
        ends = [{match.end() for match in self._unit.finditer(text, line)} for text in (one, other)]
        return max((end for end in ends[0] & ends[1] if end <= size), default=line)

    def _common_start(self, texts: list[str]) -> str:
        """The longest beginning of the first text, in whole units, that all others contain."""
        first, *others = texts
        ends = [0, *(match.end() for match in self._unit.finditer(first))]
        return next(first[:end] for end in reversed(ends) if all(first[:end] in other for other in others))

    def _gaps(self, render: Render, pairs: Messages) -> list[_Gaps]:
        """What is around each answer in a chat of questions and answers."""
        between = f"([^{STAND_IN}{ANSWER}]*)"
        found = re.finditer(f"{STAND_IN}{between}{ANSWER}(?={between})", attempt(render, pairs) or "")
        return [_Gaps(match[1], match[2]) for match in found]


class _Turn:
    """A turn that is to be found, and the renderings that end with it."""

    def __init__(self, render: Render, messages: Messages, written: str, i: int) -> None:
        self.render, self.messages, self.written, self.i = render, messages, written, i
        self._tails: dict[bool, tuple[str, list[MessageText]] | None] = {}

    def own(self, texts: list[MessageText]) -> list[tuple[Place, str]]:
        """Places of the message's texts, with these texts.

        A later message may repeat the name of a tool that was called. That is no part of the turn, so a text counts as
        often as in a chat that ends with the turn.
        """
        mine = [text for text in texts if text.message == self.i]
        mine = [text for text in mine if text.core and text.places] or mine
        if not any(text.kind == "call" for text in mine) or self.i == len(self.messages) - 1:
            return [(place, text.text) for text in mine for place in text.places or ()]
        known = self._tail(prompt=False)
        counts = {text.path: len(text.places or ()) for text in known[1]} if known else {}
        return [(p, t.text) for t in mine for p in (t.places or ())[: max(1, counts.get(t.path, 1))]]

    def end_as_last(self) -> str:
        """What the template writes after this turn in a chat that ends with it."""
        return (self.tail(prompt=False) or "").rstrip()

    def tail(self, prompt: bool) -> str | None:
        """What follows the turn's last text in a chat that ends with it; None if that is not known."""
        known = self._tail(prompt)
        texts = known[1] if known else []
        texts = [text for text in texts if text.core and text.places] or texts
        places = [place for text in texts for place in text.places or ()]
        return known[0][max(place.end for place in places) :] if known and places else None

    def _tail(self, prompt: bool) -> tuple[str, list[MessageText]] | None:
        if prompt not in self._tails:
            messages = self.messages[: self.i + 1]
            written = attempt(self.render, messages, prompt)

            def render(messages: Messages) -> str:
                return self.render(messages, prompt)

            found = None if written is None else (written, locate_texts(render, messages, written, self.i))
            self._tails[prompt] = found
        return self._tails[prompt]


def _common(texts: list[str]) -> int:
    """Length of the common beginning of these texts."""
    return len(os.path.commonprefix(texts))  # noqa: RUF071  # character by character is what is wanted
