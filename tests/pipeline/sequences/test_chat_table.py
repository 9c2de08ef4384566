"""Each template of the folder ``templates``, which mark the assistant's turns, x chats of each shape.

``python -m tests.benchmarks.chats`` prints the whole table.
"""

from pathlib import Path

import pytest

from tests.benchmarks.chats import TEMPLATES, results_of
from tests.pipeline.sequences.shapes import SHAPES

FILES = sorted(TEMPLATES.glob("*.jinja"))
FEW = ("a system's words", "space around", "thoughts", "a call and more")
"""Shapes in which most faults show."""


def check(file: Path, shapes: tuple[str, ...]) -> None:
    own_words = "the chat template rejects the chat: "
    for name, results in results_of(file, shapes).items():
        for shape, result in results.items():
            is_refused = result.kind == "rejected" and result.detail.startswith(own_words)
            is_expected = is_refused and result.detail.removeprefix(own_words) in file.read_text()
            assert is_expected or result.kind == "right", (name, shape, result)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_turns_are_found_with_and_without_the_templates_own_marks(file: Path) -> None:
    check(file, FEW)


@pytest.mark.long
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_turns_are_found_in_chats_of_every_shape(file: Path) -> None:
    check(file, tuple(SHAPES))
