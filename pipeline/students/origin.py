"""What a student has to fit, described by a table or, before the capture, by the teacher.

The same description for both lets every check run before a capture is paid for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow.compute as pc

from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.files import first_line
from softlabel.pipeline.models.pretrained import load_tokenizer
from softlabel.storage.codec import NUMBERED, with_token_ids
from softlabel.storage.errors import TableError
from softlabel.storage.identity import Identity, TeacherIdentity
from softlabel.storage.upkeep.inspection import last_capture
from softlabel.storage.views.row_groups import column_of, flat, load, outlines
from softlabel.storage.views.view import AnyTable, View


class KnownTeacher(NamedTuple):
    """A teacher that soft labels come from."""

    name: str
    """Folder or hub name."""
    commit: str | None
    """Commit of a hub model; None for a folder."""
    files: dict[str, str]
    """SHA-256 of each of its files, by name; empty if the documents' labels were used instead of a teacher."""
    adapter: str | None
    """SHA-256 of its adapter's weights; None without an adapter."""

    @classmethod
    def of(cls, name: str, commit: str | None, identity: TeacherIdentity) -> Self:
        """A teacher by its name, commit and recorded identity."""
        return cls(name, commit, identity.files, identity.adapter)


@dataclass(frozen=True)
class Origin:
    """The soft labels, of a table or of a planned capture, that a student has to fit."""

    location: str | Path
    """Location of the table or, before the capture, of the teacher."""
    tokenizer: Callable[[], Any]
    """Loads the teacher's tokenizer."""
    vocabulary: int
    """Number of token ids that the tokenizer uses, or number of classes."""
    padded_vocabulary: int
    """Number of rows of the teacher's output layer."""
    max_tokens: int
    """Maximum tokens of a sequence."""
    longest: Callable[[], int]
    """Computes the tokens of the longest sequence (their maximum before the capture); a function because it reads the
    table."""
    highest: Callable[[], int]
    """Finds the highest token id that a student needs: the tokenizer's before the capture, otherwise the highest in any
    sequence or distribution; a function because it reads the whole table."""
    classes: tuple[str, ...] | None
    """Classes of a classifier; None for a language model."""
    temperatures: tuple[float, ...]
    """Temperatures whose tail mass is stored."""
    draws: bool
    """Whether tails are sampled."""
    unknown: frozenset[str]
    """Columns of the table in which values may be unknown."""
    head: int
    """Maximum number of ids in a position's head."""
    average: bool
    """Whether the soft labels are the average of several teachers'."""
    teachers: Callable[[], Sequence[KnownTeacher]]
    """Finds all teachers; a function because it reads the table's history."""

    @property
    def token_ids(self) -> int:
        """Number of token ids that a student has to know: those of the tokenizer that the teacher knows, too."""
        return min(int(max(self.tokenizer().get_vocab().values())) + 1, self.padded_vocabulary)

    @classmethod
    def of(cls, table: AnyTable) -> Self:
        """The origin that a table describes."""
        identity = table.tables[0].identity
        return cls(
            location=table.location,
            tokenizer=cache(partial(_tokenizer_of, table)),
            vocabulary=identity.vocabulary,
            padded_vocabulary=identity.padded_vocabulary,
            max_tokens=max(part.identity.sequences.max_tokens for part in table.tables),
            longest=partial(_longest_of, table),
            highest=partial(_highest_of, table),
            classes=identity.classes,
            temperatures=table.temperatures,
            draws=table.draws,
            unknown=frozenset(name for part in table.tables for name in part.identity.unknown),
            head=min(identity.vocabulary, max(part.identity.selection.max_k for part in table.tables)),
            average=isinstance(table, View) and table.average,
            teachers=partial(_teachers_of, table),
        )

    @classmethod
    def of_capture(cls, teacher: Checkpoint, name: str, identity: Identity) -> Self:
        """The origin of the table that a capture would make.

        Args:
            teacher: the files of its teacher.
            name: the teacher's folder or hub name.
            identity: of the table.
        """
        max_tokens = identity.sequences.max_tokens
        return cls(
            location=teacher.folder,
            tokenizer=lambda: teacher.tokenizer,
            vocabulary=identity.vocabulary,
            padded_vocabulary=identity.padded_vocabulary,
            max_tokens=max_tokens,
            longest=lambda: max_tokens,
            highest=lambda: max(teacher.tokenizer.get_vocab().values()),
            classes=identity.classes,
            temperatures=identity.temperatures,
            draws=identity.selection.draws > 0,
            unknown=frozenset(identity.unknown),
            head=min(identity.vocabulary, identity.selection.max_k),
            average=False,
            teachers=lambda: [KnownTeacher.of(name, teacher.revision, identity.teacher)],
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


def _teachers_of(table: AnyTable) -> list[KnownTeacher]:
    teachers: list[KnownTeacher] = []
    for part in table.tables:
        capture = last_capture(part)
        if capture.teacher is not None:
            teacher = KnownTeacher.of(capture.teacher, capture.revision, part.identity.teacher)
            teachers += [teacher] if teacher not in teachers else []
    return teachers


def _longest_of(table: AnyTable) -> int:
    return max((pc.max(rows.column("tokens")).as_py() or 0 for _, rows in outlines(table, ["tokens"])), default=0)


def _highest_of(table: AnyTable) -> int:
    names = [] if table.tables[0].identity.classes is not None else NUMBERED
    teachers = len(table.tables) if isinstance(table, View) and table.average else 1
    highest = 0
    for group, _ in outlines(table, ["key"]):
        rows = load(table, group, ["token_ids", *names])
        found = [flat(rows, "token_ids")[0]]
        for number in range(teachers) if names else ():
            labels = {name: flat(rows, column_of(name, number))[0] for name in names}
            ids = with_token_ids(labels, table.numbering)
            found += [ids["head_ids"], ids["tail_ids"]]
        highest = max(highest, *(int(ids.max(initial=0)) for ids in found))
    return highest
