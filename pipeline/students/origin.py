"""Where soft labels come from, or are to come from: all that a student of theirs has to fit.

The same of a table as of a teacher that is yet to be asked, so that nobody pays for labels that nobody can learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow.compute as pc

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.context_length import longest
from softlabel.pipeline.models.files import first_line
from softlabel.pipeline.models.pretrained import load_tokenizer
from softlabel.pipeline.selection.select import selection_of
from softlabel.storage.errors import TableError
from softlabel.storage.identity import TeacherIdentity
from softlabel.storage.upkeep.inspection import last_capture
from softlabel.storage.views.row_groups import outlines
from softlabel.storage.views.view import AnyTable


class Teacher(NamedTuple):
    """Who said it."""

    name: str
    """Folder or hub name."""
    commit: str | None
    """Of a hub model."""
    files: dict[str, str]
    """SHA-256 of each of its files, by name; none if the documents' labels stood for it."""
    adapter: str | None
    """SHA-256 of an adapter's weights."""

    @classmethod
    def of(cls, name: str, commit: str | None, identity: TeacherIdentity) -> Self:
        """One that was found under a name."""
        return cls(name, commit, identity.files, identity.adapter)


@dataclass(frozen=True)
class Origin:
    """Where soft labels come from, or are to come from: what a student of theirs has to fit."""

    location: str | Path
    """Of the table or, before there is one, of the teacher."""
    tokenizer: Callable[[], Any]
    """Loads the teacher's."""
    vocabulary: int
    """Token ids that the tokenizer knows, or the number of classes."""
    padded_vocabulary: int
    """Rows of the teacher's output layer."""
    max_tokens: int
    """Tokens that a sequence may have."""
    longest: Callable[[], int]
    """Tokens that the longest has, or may have as long as there is none: a table's, which are not read in vain."""
    classes: tuple[str, ...] | None
    """Of a classifier."""
    temperatures: tuple[float, ...]
    """Whose tail mass is stored."""
    draws: bool
    """Whether tails are sampled."""
    head: int
    """Ids that a position may have in its head."""
    teachers: Callable[[], Sequence[Teacher]]
    """Each teacher: from a table's history, which is not read in vain."""

    @classmethod
    def of(cls, table: AnyTable) -> Self:
        """That of a table, as its history tells it."""
        identity = table.tables[0].identity
        return cls(
            location=table.location,
            tokenizer=partial(_tokenizer_of, table),
            vocabulary=identity.vocabulary,
            padded_vocabulary=identity.padded_vocabulary,
            max_tokens=max(part.identity.sequences.max_tokens for part in table.tables),
            longest=partial(_longest_of, table),
            classes=identity.classes,
            temperatures=table.temperatures,
            draws=table.draws,
            head=min(identity.vocabulary, max(part.identity.selection.max_k for part in table.tables)),
            teachers=partial(_teachers_of, table),
        )

    @classmethod
    def of_capture(cls, config: CaptureConfig) -> Self:
        """That of the table that a capture would make.

        Raises:
            TeacherError: if there is no teacher.
        """
        teacher = Checkpoint.find(config.teacher)
        selection = selection_of(config.selection, teacher.classes)
        most = config.sequences.max_tokens if teacher.classes is None else longest(teacher, config.sequences)
        return cls(
            location=teacher.folder,
            tokenizer=lambda: teacher.tokenizer,
            vocabulary=teacher.vocabulary,
            padded_vocabulary=teacher.padded_vocabulary,
            max_tokens=most,
            longest=lambda: most,
            classes=teacher.classes,
            temperatures=selection.temperatures,
            draws=selection.draws > 0,
            head=min(teacher.vocabulary, selection.max_k),
            teachers=lambda: [Teacher.of(config.teacher.model, teacher.revision, teacher.identity)],
        )


def _tokenizer_of(table: AnyTable) -> Any:
    folder = table.tokenizer
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the backend raises a bare Exception on a broken file
        raise TableError(
            "the table's tokenizer can't be loaded",
            expected="tokenizer files as a capture writes them (softlabel never runs code that comes with them)",
            found=first_line(error),
            where=folder,
            do="copy the table again from where it was made, or capture it again",
        ) from error


def _teachers_of(table: AnyTable) -> list[Teacher]:
    found: list[Teacher] = []
    for part in table.tables:
        said = last_capture(part)
        if "teacher" in said:
            teacher = Teacher.of(said["teacher"], said.get("revision"), part.identity.teacher)
            found += [teacher] if teacher not in found else []
    return found


def _longest_of(table: AnyTable) -> int:
    return max((pc.max(rows.column("tokens")).as_py() or 0 for _, rows in outlines(table, ["tokens"])), default=0)
