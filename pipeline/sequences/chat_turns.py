"""Find where each of the assistant's turns begins and ends, in a template that does not mark them itself.

A turn begins after what the template writes to prompt the assistant, and ends with what it writes to end the turn. Both
can differ from turn to turn: a prompt may open a thought that earlier turns lack, and the last turn may end in its own
way. So they are compared with renderings of the same chat up to this turn.
"""

import os.path
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from softlabel.pipeline.sequences.chat_forms import attempt
from softlabel.pipeline.sequences.chat_places import Messages, MessageText, Path, Place, locate_texts, with_text
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
        self, render: Render, question: dict[str, Any], answer: dict[str, Any], special_tokens: Iterable[str]
    ) -> None:
        special = sorted(special_tokens, key=len, reverse=True)
        named = "|".join(map(re.escape, special)) or "(?!)"
        self._mark = re.compile(rf"{named}|<[^<>\s]+>|\[[^\[\]\s]+\]")
        self._unit = re.compile(rf"{self._mark.pattern}|\w+|\s+|.", re.DOTALL)
        pair = [question, answer]
        self._always = self._written_always(render, question, answer)
        """What the template writes at the end of every chat: a prompt, asked for or not, or other words."""
        render = self._with_prompt_only_if_asked(render)
        _, _, rest = render(pair).partition(STAND_IN)
        between, _, end = rest.rpartition(ANSWER)
        self._end = end.rstrip()
        """How the template ends a turn that is the last of its chat."""
        self._asked = self._prompt_after(render, [question])
        """What it writes to prompt the assistant after a question."""
        self._prompt = self._asked if self._asked and self._asked in between else self._head(render, question, between)
        """The same; if that differs from what is before an answer or is nothing, what begins the answer's turn."""
        self._intro = between.rpartition(self._asked)[2] if self._asked and self._asked in between else ""
        """What it writes after its prompt, before an answer; such as an empty thought."""
        gaps = self._gaps(render, [*pair, *pair])
        self._start = self._common_start([self._prompt, *(gap.before for gap in gaps)])
        """The part of this that all answers have before them."""
        if not self._end.strip() and not (gaps and self._leading_mark(gaps[0].after)):
            raise TemplateError(f"the template writes {between!r} before an answer and {end!r} after it")
        self._render, self._question, self._answer = render, question, answer

    def _written_always(self, render: Render, question: dict[str, Any], answer: dict[str, Any]) -> str:
        """See ``_always``: it is both after a last question and after a last answer."""
        asked, pair = attempt(render, [question]), [question, answer]
        gaps = self._gaps(render, [*pair, *pair])
        if not asked or not gaps:
            return ""
        (before, after), last_answer = gaps[0], render(pair).rpartition(ANSWER)[2]
        if after.startswith(last_answer):
            return ""
        # It begins like the chat or, at the latest, where it differs from how a question begins.
        opening = [unit for unit in self._unit.findall(asked)[:2] if unit.strip()]
        opening = opening if self._mark.fullmatch(opening[0]) else opening[:1]
        begins = [unit.start() for unit in self._unit.finditer(last_answer) if unit[0] in opening]
        begin = min([*begins, self._common(last_answer, after)])
        always, end = last_answer[begin:], last_answer[:begin]
        last_question = asked.partition(STAND_IN)[2]
        if not always.strip() or not last_question.endswith(always):
            return ""
        if end.strip() and re.search(r"\w", self._mark.sub("", always)):  # words are no mark of an end
            return always
        rest = before.removeprefix(last_question.removesuffix(always))
        head = always[: self._common(always, rest)]  # after it may be a thought that answers lack
        two = (attempt(render, [*pair, answer]) or "").split(ANSWER)[1:2]
        is_prompt = before == last_question or bool(two and two[0].startswith(end + head))
        return always if head.strip() and is_prompt else ""

    def _with_prompt_only_if_asked(self, render: Render) -> Render:
        def as_asked(messages: Messages, prompt: bool = False) -> str:
            return render(messages, prompt) if prompt else render(messages).removesuffix(self._always)

        return as_asked if self._always else render

    def _head(self, render: Render, question: dict[str, Any], between: str) -> str:
        """What is between a question and its answer, without the end of the question's turn."""
        _, _, end = (attempt(render, [question]) or "").partition(STAND_IN)
        head = between[self._common(end, between) :]
        return head if head.strip() else between

    def find(
        self, render: Render, messages: Messages, written: str, texts: list[MessageText], i: int
    ) -> list[tuple[int, int]]:
        """Where the turn of message ``i`` is, which is one of the assistant.

        It has several parts if the template writes another message, such as the result of a tool call, in the middle,
        and none if the template leaves the message out.

        Args:
            render: renders messages of this chat.
            messages: the chat.
            written: the rendered chat.
            texts: where the texts of all messages are.
            i: index of the message.

        Raises:
            TurnNotFoundError: if the turn's beginning or end can't be told.
        """
        render, written = self._with_prompt_only_if_asked(render), written.removesuffix(self._always)
        turn = _Turn(render, messages, written, i, self._answer)
        own = sorted(turn.own(texts) or self._nothing(turn, texts))
        others = [(place, text.message) for text in texts if text.message != i for place in text.places or ()]
        parts = _parts(own, [place for place, _ in others])
        return [self._part(turn, part, others, texts, part is parts[0], part is parts[-1]) for part in parts]

    def _part(
        self,
        turn: "_Turn",
        own: "list[_Own]",
        others: list[tuple[Place, int]],
        texts: list[MessageText],
        begins: bool,
        ends: bool,
    ) -> tuple[int, int]:
        """The part of a turn that has these texts; with ``begins`` and ``ends``, it is the turn's first and last."""
        written, first, last = turn.written, own[0], max(own, key=lambda each: each.place.end)
        start, end = first.place.start, last.place.end
        before = max((place.end for place, _ in others if place.end <= start), default=0)
        # The empty content of an earlier tool call may be written after its result, where this turn is.
        earlier = {i for i, message in enumerate(turn.messages[: turn.i]) if message["role"] == "assistant"}
        later = [
            (place.start, message)
            for place, message in others
            if place.start >= end and (place.start < place.end or message not in earlier)
        ]
        after, following = min(later, default=(len(written), turn.i + 1))
        start = min(start, self._begin(turn, before, first, texts)) if begins else start - turn.lead(first)
        if not ends:
            rest = turn.after_text(last.path)
            if rest is None:
                raise TurnNotFoundError("where the assistant's turn ends")
            return start, end + self._common(written[end:after], rest)
        space = last.text[len(last.text.rstrip()) :]
        space = space if written.startswith(space, end) else ""
        role = turn.messages[following]["role"] if following < len(turn.messages) else None
        if any(not text.places for text in texts if turn.i < text.message < following):
            role = ""  # another message may be written before it, at a place that is not known
        return start, self._finish(turn, end, len(space), after, role)

    def _nothing(self, turn: "_Turn", texts: list[MessageText]) -> "list[_Own]":
        """The place of an answer without text: where the template prompts for it, between its neighbours.

        There is none if the template would not write any answer there.
        """
        written, i = turn.written, turn.i
        before = max((p.end for text in texts if text.message < i for p in text.places or ()), default=0)
        later = [(p.start, text.message) for text in texts if text.message > i for p in text.places or ()]
        after, following = min(later, default=(len(written), len(turn.messages)))
        gap, plain = written[before:after], turn.plain
        if plain and ANSWER not in plain:
            return []
        if self._prompt and gap.count(self._prompt) == 1:
            at = before + gap.index(self._prompt) + len(self._prompt)
        else:
            at = len(plain.partition(ANSWER)[0])
            if not plain or not before <= at <= after or not plain.startswith(written[:at]):
                raise TurnNotFoundError("where the assistant's turn begins")
        # What the template adds to an empty answer, such as an empty thought, is part of the turn.
        is_bounded = all(text.places for text in texts if i < text.message < following)
        end = written.find(self._end, at, after) if self._end and is_bounded else -1
        return [_Own(Place(at, max(at, end), whole=True), "", ())]

    def _begin(self, turn: "_Turn", before: int, own: "_Own", texts: list[MessageText]) -> int:
        first = own.place
        gap = turn.written[before : first.start]
        prompted = (before + gap.rindex(each) + len(each) for each in self._prompts(turn) if each and each in gap)
        is_alone = all(text.places for text in texts if text.message < turn.i)
        # Otherwise the gap may also have the prompt of an earlier turn.
        if (begin := next(prompted, None) if is_alone else max(prompted, default=None)) is not None:
            return begin
        contents = [text for text in texts if text.kind == "content" and first in (text.places or ())]
        if any(self._begins(turn.written, first, text) for text in contents):
            begin = first.start - turn.lead(own)
            return begin - len(self._intro) * turn.written.endswith(self._intro, before, begin)
        # The turn begins with something else, such as a thought or a tool call, which the template introduces.
        plain = turn.plain or attempt(turn.render, [*turn.messages[: turn.i], self._answer]) or ""
        lead, found, _ = plain.partition(ANSWER)
        lead = lead.removesuffix(self._intro)
        common = self._common(lead, turn.written[: first.start])
        has_all = found and common == len(lead) > before  # of the header, also if it depends on the turn's place
        if not has_all and (start := self._start.strip()) and (at := gap.rfind(start)) >= 0:
            rest = gap[at + len(start) :]
            return before + at + len(start) + _common([rest, self._start.partition(start)[2]])
        if found and (common > before or common == before == len(lead)):
            return common
        raise TurnNotFoundError("where the assistant's turn begins")

    def _prompts(self, turn: "_Turn") -> Iterator[str]:
        """What may prompt for this turn; found by rendering only if the usual prompts are not there."""
        yield self._asked
        yield self._prompt
        yield self._prompt_after(turn.render, turn.messages[: turn.i])

    @staticmethod
    def _begins(written: str, place: Place, text: MessageText) -> bool:
        """Whether the place has the text's beginning."""
        return place.start == place.end or written.startswith(text.core[:1], place.start)

    def _finish(self, turn: "_Turn", last: int, space: int, after: int, following: str | None) -> int:
        """The end of the turn whose text ends at ``last``, by the role of the message that is written after it.

        It is None at the end of the chat, and "" if it is not known.
        """
        gap = turn.written[last:after]
        for skip in (0, space):  # a template may trim the answer
            if self._end.strip() and gap.startswith(self._end, skip):
                return last + skip + len(self._end)
        if following is None:
            return last + max(space, len(gap.rstrip()))
        end = turn.end_as_last()
        if end.strip() and gap.startswith(end):
            more = 0 if self._end.strip() else self._leading_mark(gap[len(end) :])
            return last + len(end) + more
        if not gap.strip() and following == "assistant":
            return last + space
        if (plain := self._finish_as_plain(turn, last, after, following)) is not None:
            return plain
        candidates = (self._end_before_prompt(turn), self._end_before_next(gap, following) if following else None)
        ends = [found for found in candidates if found is not None and gap.startswith(found)]
        found = next((found for found in ends if found.strip()), "")
        if found or (ends and self._end.strip()):  # if none is found, only the chat's last turn ends with a mark
            return last + (len(found) or space)
        if mark := self._leading_mark(gap):  # a turn ends where the next role begins
            return last + mark
        raise TurnNotFoundError("where the assistant's turn ends")

    def _finish_as_plain(self, turn: "_Turn", last: int, after: int, following: str) -> int | None:
        """The end of the turn, if a plain answer in its place has the same after it, except for what is before that,
        such as the end of a tool call."""
        gap, rest = turn.written[last:after], turn.written[after:]
        lead, found, plain = turn.plain.partition(ANSWER)
        own = plain[: len(plain) - len(rest)]
        if not found or not own.strip() or not plain.endswith(rest) or own == gap or not gap.endswith(own):
            return None
        start = len(lead) + len(ANSWER)
        return after - len(own) + self._finish(turn.as_plain(), start, 0, start + len(own), following) - start

    def _end_before_prompt(self, turn: "_Turn") -> str | None:
        """The end of the turn, if the assistant is prompted again after it."""
        tail = turn.tail(prompt=True)
        if tail is None:
            return None
        # After a question, since the assistant's turn itself may end otherwise if it is not the last.
        before, lasts = turn.messages[: turn.i], (self._question, turn.messages[turn.i])
        prompts = (self._prompt_after(turn.render, [*before, last]) for last in lasts)
        each = next((prompt for prompt in chain([self._prompt], prompts) if prompt and tail.endswith(prompt)), "")
        return tail.removesuffix(each).rstrip() if each else None

    def _end_before_next(self, gap: str, following: str) -> str | None:
        """The end of the turn, if what follows it is how the template begins a message of this role in other chats."""
        gap = gap.rstrip()
        for head in self._heads_of(following):
            if head.strip() and gap.endswith(head.rstrip()):
                return gap.removesuffix(head.rstrip()).rstrip()
        return None

    def _heads_of(self, role: str) -> Iterator[str]:
        """How the template may begin a message of this role."""
        if role == "assistant":
            yield self._prompt
            return
        message = {**self._question, "role": role}
        head = (attempt(self._render, [message, self._answer]) or "").partition(STAND_IN)[0]
        yield head
        between = (attempt(self._render, [self._question, message]) or "").split(STAND_IN)[1:2]
        after = self._head(self._render, self._question, between[0]) if between else ""
        if not self._leading_mark(after):  # otherwise it may be the end of the question's turn
            yield after
        # Without marks that every chat begins with.
        other = attempt(self._render, [self._answer, self._question])
        while (mark := self._mark.match(head)) and (other is None or other.startswith(mark[0])):
            head, other = head[mark.end() :], other and other[mark.end() :]
            yield head

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


class _Own(NamedTuple):
    """A text of the message whose turn is to be found, at one of its places."""

    place: Place
    text: str
    path: Path


def _parts(own: list[_Own], others: list[Place]) -> list[list[_Own]]:
    """These texts, in groups between which the template writes texts of other messages."""
    parts = [own[:1]]
    for each in own[1:]:
        end = max(one.place.end for one in parts[-1])
        is_apart = any(end <= other.start < other.end <= each.place.start for other in others)
        # A copy of the same text is no further part: the template repeats it, or it can't be told apart.
        if is_apart and all(each.path != one.path for part in parts for one in part):
            parts.append([each])
        else:
            parts[-1].append(each)
    return parts if own else []


class _Turn:
    """A turn that is to be found, and the renderings that end with it."""

    def __init__(self, render: Render, messages: Messages, written: str, i: int, answer: dict[str, Any]) -> None:
        self.render, self.messages, self.written, self.i, self._answer = render, messages, written, i, answer
        self._tails: dict[bool, tuple[str, list[MessageText]] | None] = {}

    @cached_property
    def plain(self) -> str:
        """The chat as written if the message were a plain answer; "" if the template raises an error."""
        return attempt(self.render, self._plain_messages) or ""

    @property
    def _plain_messages(self) -> Messages:
        return [*self.messages[: self.i], self._answer, *self.messages[self.i + 1 :]]

    def as_plain(self) -> "_Turn":
        """The turn of a plain answer in the place of this message."""
        return _Turn(self.render, self._plain_messages, self.plain, self.i, self._answer)

    def own(self, texts: list[MessageText]) -> list[_Own]:
        """The message's texts, at each of their places.

        A template may repeat a text in a later message, such as the name of a tool that was called. That is no part of
        the turn, so a text counts as often as in a chat that ends with the turn.
        """
        mine = [text for text in texts if text.message == self.i]
        if any(text.core and text.places for text in mine):
            mine = [text for text in mine if text.places and (text.core or text.kind == "thought")]
        copied = any(len(text.places or ()) > 1 for text in mine) and self.i < len(self.messages) - 1
        known = self._tail(prompt=False) if copied else None
        counts = {text.path: len(text.places or ()) or 1 for text in known[1]} if known else {}
        return [_Own(p, t.text, t.path) for t in mine for p in (t.places or [])[: counts.get(t.path)]]

    def end_as_last(self) -> str:
        """What the template writes after this turn in a chat that ends with it."""
        return (self.tail(prompt=False) or "").rstrip()

    def lead(self, own: _Own) -> int:
        """Length of the space that the text begins with, if the template writes it."""
        bare = own.text.lstrip()
        lead = own.text[: len(own.text) - len(bare)]
        if not lead or not bare or not self.written[: own.place.start].endswith(lead):
            return 0
        trimmed = with_text(self.messages[self.i], own.path, bare)
        is_trimmed = attempt(self.render, [*self.messages[: self.i], trimmed, *self.messages[self.i + 1 :]])
        return 0 if is_trimmed == self.written else len(lead)

    def after_text(self, path: Path) -> str | None:
        """What follows this text of the message in a chat that ends with the turn; None if that is not known."""
        known = self._tail(prompt=False)
        places = [place for text in known[1] if text.path == path for place in text.places or ()] if known else []
        return known[0][max(place.end for place in places) :] if known and places else None

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
