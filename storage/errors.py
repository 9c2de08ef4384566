"""Every error that a user can cause, as a tree.

The command line exits with 2 for a ``UsageError`` (the request itself is wrong: nothing was tried) and with 1
for every other ``SoftlabelError``. Whatever is not in this tree is a defect of softlabel.

    SoftlabelError
    ├── UsageError             the request contradicts itself or names what does not exist
    ├── DocumentsError         documents that can't be read
    ├── TeacherError           a teacher that can't be loaded, or that says what no distribution is
    ├── StudentError           a student that can't be built, or does not fit its table
    ├── TrainingError          training that can't go on
    ├── WorkerError            worker processes that died over their work
    └── TableError             a table that can't be used
        ├── TableNotFoundError     no table, version or tag there
        │   └── PurgedError        a version that went with documents that were taken down
        ├── AccessError            a place that can't be read now, of which nothing else is known
        ├── ProvenanceError        another teacher, tokenizer or selection made it
        ├── IntegrityError         bytes that are not the ones that were written
        └── DisagreementError      numbers that its teacher does not say again
"""

import re

from softlabel.storage.credentials import masked

_CAUSE = re.compile(r"↳(?:\x1b\[0m)? ")


def cause(error: Exception) -> str:
    """What an error says, in one line: of delta-rs, which draws a tree of what led to what, its last branch."""
    return ": ".join(part.splitlines()[0] for part in _CAUSE.split(str(error) or type(error).__name__)[-2:])


class SoftlabelError(Exception):
    """What was expected, what was found, where, and what to do, in that order and on one screen; never credentials."""

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
        super().__init__(masked("\n".join(lines)))
        self.details = details
        """What a program may want to read of it, all of what the screen has no room for."""


class UsageError(SoftlabelError):
    """The request contradicts itself, or names what does not exist."""


class DocumentsError(SoftlabelError):
    """Documents that can't be read."""


class TeacherError(SoftlabelError):
    """A teacher that can't be loaded, or that says what no distribution is."""


class StudentError(SoftlabelError):
    """A student that can't be built, or does not fit its table."""


class TrainingError(SoftlabelError):
    """Training that can't go on."""


class WorkerError(SoftlabelError):
    """Worker processes that died over their work."""


class TableError(SoftlabelError):
    """A soft-label table that can't be used."""


class TableNotFoundError(TableError):
    """No table there, or no such version or tag of it."""


class PurgedError(TableNotFoundError):
    """Documents were taken down, and this version went with them."""


class AccessError(TableError):
    """A place that can't be read here and now, whose bytes may be as good as ever: never taken for damage."""


class ProvenanceError(TableError):
    """Another teacher, tokenizer, selection or chunking made this table."""


class IntegrityError(TableError):
    """Bytes that are not the ones that were written."""


class DisagreementError(TableError):
    """Numbers that the table's teacher does not say again, by more than its own noise."""


def recapture(location: str) -> str:
    """How damaged shards are taken out of a table and their rows brought again: an error's last words."""
    return (
        f"\n               softlabel verify {location} --remove-damaged, then capture the same documents"
        "\n               again; of a narrowed table, reprocess its source again"
    )
