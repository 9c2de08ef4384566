"""What softlabel writes about a commit into the table's log: what was done, by which teacher, and how much it added."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from softlabel.storage.errors import IntegrityError

COMMIT_MESSAGE = "softlabel"
"""Key of softlabel's own part of a commit's metadata."""


class CommitMessage(BaseModel):
    """softlabel's part of a commit's metadata, except for the two hashes that protect the log."""

    # Other versions of softlabel may write more.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, hide_input_in_errors=True)

    operation: str | None = None
    sequences: int = 0
    """Number of sequences that were added; negative if more were removed. Positions and bytes likewise."""
    positions: int = 0
    bytes: int = 0
    source: str | None = None
    """TABLE@version that the rows were taken from."""
    teacher: str | None = None
    """Folder or hub name of the teacher; None if no rows came from one."""
    revision: str | None = None
    """Commit of a hub model."""
    parameters: int | None = None
    config: dict[str, Any] = {}
    """Settings of the capture."""
    circumstances: dict[str, str] = {}
    reading: int = 1
    """Version of how the table's documents became sequences; 1 if the commit does not say it."""
    unread: str | None = None
    """File with the documents of the table for which that is not true."""

    @classmethod
    def of(cls, commit: dict[str, Any], where: str) -> Self:
        """The message in a commit's metadata; an empty one if another program made the commit.

        Args:
            commit: metadata of a commit, from ``Table.history``.
            where: the table's location, for the error.

        Raises:
            IntegrityError: if softlabel could not have written it.
        """
        try:
            return cls.model_validate(commit.get(COMMIT_MESSAGE, {}))
        except ValidationError as invalid:
            first = invalid.errors()[0]
            raise IntegrityError(
                "the table's log is damaged: softlabel's part of a commit can't be read",
                expected="what softlabel writes about a commit",
                found=".".join(map(str, (COMMIT_MESSAGE, *first["loc"]))) + f": {first['msg']}",
                where=f"{where}@{commit.get('version')}",
                do="restore the table's log from a copy",
            ) from None
