"""Every error that a user can cause.

The command line exits with 2 for a ``UsageError`` (the request itself is wrong, and nothing was attempted) and with 1
for every other ``SoftlabelError``. Any other exception is a bug in softlabel.

    SoftlabelError
    ├── UsageError             the request contradicts itself or names something that does not exist
    ├── DocumentsError         documents can't be read
    ├── TeacherError           a teacher can't be loaded, or its output is not a probability distribution
    ├── StudentError           a student can't be built, or does not fit its table
    ├── TrainingError          training can't continue
    ├── WorkerError            worker processes died while they were working
    └── TableError             a soft-label table can't be used
        ├── TableNotFoundError     there is no such table, version or tag
        │   └── PurgedError        the version was removed because documents in it were taken down
        ├── AccessError            files can't be read at the moment; they may be undamaged
        ├── ProvenanceError        another teacher, tokenizer or selection made the table
        ├── IntegrityError         bytes differ from the ones that were written
        └── DisagreementError      the teacher does not reproduce the numbers in its table
"""

import re

from softlabel.storage.credentials import masked

_CAUSE = re.compile(r"↳(?:\x1b\[0m)? ")


def printable(text: str, kept: str = "") -> str:
    r"""The text with unprintable characters and terminal controls escaped, like \x1b, but for those that are kept."""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def cause(error: Exception) -> str:
    """An error's message in one line. delta-rs prints its causes as a tree; of that, the last two levels."""
    return ": ".join(part.splitlines()[0] for part in _CAUSE.split(str(error) or type(error).__name__)[-2:])


class SoftlabelError(Exception):
    """An error that a user can understand and act on.

    Its text fits on one screen: a summary, then what was expected, what was found, where, and what to do. Locations
    with credentials are masked, and terminal controls, which names and values may contain, are escaped. ``details``
    holds the full result, for programs, where it is too long for the text.
    """

    def __init__(
        self,
        summary: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        do: object = None,
        details: object = None,
    ) -> None:
        lines = [summary]
        for name, text in (("expected", expected), ("found", found), ("where", where), ("what to do", do)):
            if text is not None:
                lines.append(f"  {name + ':':<12} {text}")
        super().__init__(printable(masked("\n".join(lines)), kept="\n"))
        self.details = details


class UsageError(SoftlabelError):
    """The request contradicts itself, or names something that does not exist. Nothing was attempted."""


class DocumentsError(SoftlabelError):
    """The documents can't be read."""


class TeacherError(SoftlabelError):
    """The teacher can't be loaded, or its output is not a probability distribution."""


class StudentError(SoftlabelError):
    """The student can't be built, or does not fit its table."""


class TrainingError(SoftlabelError):
    """Training can't continue."""


class WorkerError(SoftlabelError):
    """Worker processes died while they were working."""


class TableError(SoftlabelError):
    """The soft-label table can't be used."""


class TableNotFoundError(TableError):
    """There is no table at this location, or the table has no such version or tag."""


class PurgedError(TableNotFoundError):
    """The version can't be opened any more, because documents in it were taken down."""


class AccessError(TableError):
    """Files can't be read at the moment (permissions, memory, disk, network). This says nothing about damage."""


class ProvenanceError(TableError):
    """The table was made by another teacher, tokenizer, selection or chunking."""


class IntegrityError(TableError):
    """Bytes differ from the ones that were written: a file is damaged or missing."""


class DisagreementError(TableError):
    """The teacher does not reproduce the numbers in its table: they differ by more than its numerical noise."""


def recapture(location: str) -> str:
    """The end of an error's ``do``: how to remove damaged shards from a table and restore their rows."""
    return (
        f"\n               softlabel verify {location} --remove-damaged, then capture the same"
        "\n               documents again (or, if the table was narrowed, reprocess its source table again)"
    )
