"""Finds the assistant's turns in chats of many shapes with many chat templates, and prints what was found.

``python -m tests.benchmarks.chats [FILE ...]`` takes templates that mark the assistant's turns with
``{% generation %}``; without files, those of ``tests/pipeline/sequences/templates``. Each is tried as it is and without
its marks. What transformers takes from the marks is right:

    right      exactly that is captured, apart from space at the beginning or end of a turn
    rejected   the chat is not captured, for the reason shown
    wrong      anything else; it should not occur
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from datetime import date, datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

from transformers.utils import chat_template_utils

from softlabel.pipeline.sequences.chat import ChatRefusedError, ChatTemplate
from tests.pipeline.sequences.shapes import SHAPES

TEMPLATES = Path(__file__).parents[1] / "pipeline" / "sequences" / "templates"
TODAY = date(2026, 1, 1)
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ("<s>", "</s>", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|start|>", "<|return|>")
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class Result(NamedTuple):
    """What became of one chat."""

    kind: str
    """right, rejected or wrong."""
    detail: str = ""
    """Why it was rejected, or what was found and expected."""


def without_marks(source: str) -> str:
    """A template without its ``{% generation %}``, which writes the same."""
    return _MARK.sub(r"{#\1 \2#}", source)


def compare(source: str, chat: Any, marked: str) -> Result:
    """Find the turns of a chat, and compare with what the marked template says.

    Args:
        source: the template, with or without marks.
        chat: messages, {messages, tools}, or {prompt, completion}.
        marked: the template with marks.
    """
    try:
        template = ChatTemplate(source, VARIABLES, SPECIAL, TODAY, SPECIAL)
        found = template.write(json.dumps(chat, ensure_ascii=False))
    except ChatRefusedError as reason:
        return Result("rejected", str(reason))
    text = "".join(piece for piece, _ in found.pieces)
    expected = next((spans for written, spans in _by_transformers(marked, chat) if written == text), None)
    if expected is None:
        return Result("wrong", f"another text: {text!r}")
    if isinstance(chat, dict) and "prompt" in chat:
        expected = expected[-sum(message["role"] == "assistant" for message in chat["completion"]) :]
    places = [
        {at for a, b in spans for at in range(a, b) if not text[at].isspace()} for spans in (found.turns, expected)
    ]
    if places[0] == places[1]:
        return Result("right")
    captured, right = (["".join(text[a:b]) for a, b in spans] for spans in (found.turns, expected))
    return Result("wrong", f"{captured} instead of {right}")


def _by_transformers(marked: str, chat: Any) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """What transformers writes, and its turns (adjacent ones joined), for each form of the messages that it takes."""
    given = chat if isinstance(chat, dict) else {"messages": chat}
    with mock.patch.object(chat_template_utils, "datetime", _FixedDate):
        for messages in _forms(given.get("messages") or given["prompt"] + given["completion"]):
            try:
                [written], [spans] = chat_template_utils.render_jinja_template(
                    [messages],
                    tools=given.get("tools"),
                    chat_template=marked,
                    return_assistant_tokens_mask=True,
                    **VARIABLES,
                )
            except Exception:
                continue
            joined: list[tuple[int, int]] = []
            for start, end in spans:
                is_next = joined and joined[-1][1] == start
                joined[-1:] = [(joined[-1][0], end)] if is_next else [*joined[-1:], (start, end)]
            yield written, joined


class _FixedDate(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages in all forms in which templates want them."""
    for developer, (users, answers), as_text, empty in product(
        ("developer", "system"), product((False, True), repeat=2), (False, True), ("", None, "absent")
    ):
        formed = deepcopy(messages)
        for message in formed:
            message["role"] = developer if message["role"] == "developer" else message["role"]
            content = message.pop("content", "") or ""
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            in_parts = answers if message["role"] == "assistant" else users
            message["content"] = [{"type": "text", "text": text}] if in_parts else text
            if message.get("tool_calls") and not text and empty != "":
                message.pop("content") if empty else message.update(content=None)
            for call in message.get("tool_calls", ()):
                function = call["function"]
                is_text = isinstance(function["arguments"], str)
                if is_text != as_text:
                    change = json.loads if is_text else json.dumps
                    function["arguments"] = change(function["arguments"])
        yield formed


def results_of(file: Path, shapes: Iterable[str] = SHAPES) -> dict[str, dict[str, Result]]:
    """The results with a template and with the same template without its marks, by shape."""
    marked = file.read_text()
    sources = {file.stem: marked, f"{file.stem}, unmarked": without_marks(marked)}
    return {name: {s: compare(source, SHAPES[s], marked) for s in shapes} for name, source in sources.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the assistant's turns in chats of many shapes.")
    parser.add_argument("templates", nargs="*", type=Path, help="files with chat templates that use {% generation %}")
    files = parser.parse_args().templates or sorted(TEMPLATES.glob("*.jinja"))
    found: dict[str, dict[str, Result]] = {}
    print(f"{'template':40} {'right':>8} {'rejected':>8} {'wrong':>8}")
    for file in files:
        for name, results in results_of(file).items():
            counts = Counter(result.kind for result in results.values())
            print(f"{name:40} {counts['right']:8} {counts['rejected']:8} {counts['wrong']:8}", flush=True)
            found[name] = results
    counts = Counter(result.kind for results in found.values() for result in results.values())
    print(f"{'all':40} {counts['right']:8} {counts['rejected']:8} {counts['wrong']:8}")
    details = defaultdict[Result, list[str]](list)
    for name, results in found.items():
        for shape, result in results.items():
            if result.kind != "right":
                details[result].append(f"{name}: {shape}")
    for result, places in sorted(details.items()):
        print(f"\n{result.kind}: {result.detail}", *places, sep="\n    ")
    if counts["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
