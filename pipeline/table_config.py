"""Settings of the jobs that look after a table, like those of ``pipeline.config``."""

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pipeline.config import Settings

_NAME = r"[A-Za-z][A-Za-z0-9_.-]*"


class VerifyConfig(Settings):
    """Look at every byte of a table, without its teacher, and name each file that is damaged, missing or foreign."""

    table: str
    """Folder of the table; TABLE@12 or TABLE@tag for another version than the newest."""
    all_versions: bool = False
    """Look at the shards of every version that can be opened, not of one alone."""
    remove_damaged: bool = False
    """Take damaged shards out of the newest version; a capture of the same documents then brings their rows back."""


class MaintainConfig(Settings):
    """Delete what no version of a table names and nobody is writing; or name versions, and let go of them.

    With tag, untag or unpin, nothing is deleted unless vacuum is given too.
    """

    table: str
    """Folder of the table."""
    dry_run: bool = False
    """Say what would be deleted, and delete nothing."""
    grace_hours: NonNegativeFloat = 24.0
    """Spare files that were written in the last so many hours: on another machine, a writer may be at work on them."""
    vacuum: bool = False
    """Also delete the shards that only dropped versions name. The newest, and those with a tag or pin, are kept."""
    keep_versions: PositiveInt | None = None
    """With vacuum: drop all but so many of the newest versions; left out, none."""
    tag: str | None = Field(default=None, pattern=rf"^{_NAME}(=\d+)?$")
    """NAME or NAME=VERSION: name a version (the newest, or that of TABLE@12), to open it as TABLE@NAME. A tag never
    moves, and keeps its version from being dropped."""
    untag: str | None = None
    """Free the name of a tag."""
    unpin: str | None = None
    """Folder of a student: the version that it was trained on may be dropped."""

    @model_validator(mode="after")
    def _vacuum_is_named(self) -> Self:
        if self.keep_versions is not None and not self.vacuum:
            raise ValueError("keep_versions drops versions, which only vacuum does; give vacuum too")
        return self
