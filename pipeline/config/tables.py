"""Settings of the commands that check and change tables: verify, maintain, mix and reprocess."""

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from softlabel.pipeline.config.base import Location, Locations, Settings
from softlabel.pipeline.config.capture import ColumnsConfig, ShardsConfig, TeacherConfig

_TAG = r"[A-Za-z][A-Za-z0-9_.-]*(=\d+)?"


class NamedTeacherConfig(TeacherConfig):
    """The model that made the table; required if the table is to be compared with its teacher."""

    model: Location
    """Folder or hub name of the model that made the table."""


class VerifyConfig(Settings):
    """Check every byte of a table, and list the files that are damaged, missing or not part of it.

    With teacher.model, also compare the table with its teacher, which runs again over some sequences.
    """

    table: Location
    """Folder of the table; TABLE@12 or TABLE@tag opens that version instead of the newest."""
    all_versions: bool = False
    """Check the shards of every version that can be opened, instead of only one version."""
    remove_damaged: bool = False
    """Remove damaged shards from the newest version; capturing the same documents again then restores their
    rows."""
    teacher: NamedTeacherConfig | None = None
    """The teacher that made the table, to run it again."""
    sequences: PositiveInt = 32
    """Random sequences to run through the teacher again. To find an error in 1 of n sequences with 95 % certainty,
    take 3n: 32 are enough for an error in 1 of 10 sequences, 300 for one in 1 of 100."""
    seed: int = 0
    """Seed for choosing these sequences."""


class MaintainConfig(Settings):
    """Delete files that no version of a table uses; or tag, untag and unpin versions.

    With tag, untag or unpin, nothing is deleted unless vacuum is given too.
    """

    table: Location
    """Folder of the table."""
    grace_hours: NonNegativeFloat = 24.0
    """Keep files that were written less than this many hours ago: another machine may still be writing them."""
    vacuum: bool = False
    """Also delete the shards that only dropped versions use. The newest version, and versions with a tag or pin,
    are never dropped."""
    keep_versions: PositiveInt | None = None
    """With vacuum: keep only this many of the newest versions, and drop the others; if left out, no version is
    dropped."""
    tag: str | None = Field(default=None, json_schema_extra={"pattern": f"^{_TAG}$"})
    """NAME or NAME=VERSION: tag a version (without VERSION the newest, or that of TABLE@12), so that TABLE@NAME
    opens it. A tag never moves, and its version is never dropped."""
    untag: str | None = None
    """Remove this tag."""
    unpin: Location | None = None
    """Folder of a student, or location of a view: allow the version that it needs to be dropped."""
    unpin_gone_after_days: NonNegativeFloat | None = None
    """Also unpin each student that was trained at least this many days ago and whose folder is gone. Give this only on
    a machine that sees the folders of all students: one that was moved, or is on another machine's disk, counts as
    gone. If there is nothing at all where a student was, its disk is not mounted, and it stays pinned."""

    @field_validator("tag")
    @classmethod
    def _tag_is_a_name(cls, tag: str | None) -> str | None:
        if tag is not None and not re.fullmatch(_TAG, tag):
            raise ValueError("must be NAME or NAME=VERSION, where NAME is a letter, then letters, digits, _ . or -")
        return tag

    @model_validator(mode="after")
    def _keep_versions_needs_vacuum(self) -> Self:
        if self.keep_versions is not None and not self.vacuum:
            raise ValueError("keep_versions has an effect only with vacuum; give vacuum too")
        return self


class MixConfig(Settings):
    """Combine several tables with the same tokenizer into a view, which can be used like one table.

    A view is a small file that names the tables and pins their versions; no row is copied.
    """

    view: Location
    """Folder of the view."""
    tables: tuple[Location, ...] = Field(min_length=2)
    """Folders of the tables; TABLE@12 or TABLE@tag takes that version instead of the newest."""
    how: Literal["concatenate", "average"] = "concatenate"
    """concatenate uses the rows of all tables. average uses only the sequences that every table holds, and averages
    the teachers' distributions; students can train on it only with forward KL."""
    weights: tuple[PositiveFloat, ...] = ()
    """One weight per table: how often its sequences come up in an epoch (0.5: in every second epoch), or its weight
    in the average; if left out, all tables weigh the same."""

    @model_validator(mode="after")
    def _one_weight_per_table(self) -> Self:
        if self.weights and len(self.weights) != len(self.tables):
            found = f"{len(self.tables)} tables and {len(self.weights)} weights"
            raise ValueError(f"give one weight per table; found {found}")
        return self


class NarrowingConfig(Settings):
    """Store less of each distribution than the table does; a setting that is left out changes nothing."""

    max_k: int | None = Field(default=None, ge=0, le=32767)
    """Keep at most this many ids of each head. The tail is then sampled again from the removed ids and the old
    samples."""
    draws: int | None = Field(default=None, ge=0, le=32767)
    """Keep this many samples in the tail, in proportion to the probability outside the head; 0 removes the tail."""
    temperatures: tuple[PositiveFloat, ...] | None = None
    """Stored temperatures to keep, 1 first."""
    tail_logprobs: Literal["eval", "all"] | None = None
    """Splits whose rows keep the log-probabilities of their samples: eval, or all. A table of format 1 has them all,
    and keeps those of its eval split if this is left out."""


class RelayConfig(ShardsConfig):
    """How rows are written to new shards."""

    eval_fraction: float | None = Field(default=None, ge=0, lt=1)  # type: ignore[assignment]
    """Split the documents again, with this share of them in the eval split; if left out, every document stays in its
    split."""


class ReprocessConfig(Settings):
    """Make a smaller table from a table, or change it in place as one new version; no teacher is needed.

    All settings can be combined in one pass, except purge. Without any, a table of an older format gets the current
    one; every other change in place does that, too.
    """

    source: Location
    """Folder of the table; TABLE@12 or TABLE@tag opens that version instead of the newest."""
    destination: Location | None = None
    """Folder or s3:// address of another table, which is created or added to; if left out, the source gets a new
    version. A source whose selection was made smaller accepts no more captures."""
    where: str | None = None
    """Keep only the rows for which this SQL expression is true, for example "source = 'web' AND tokens > 20". It
    may contain columns (carried ones too), literals, operators and a few functions; an error message lists them."""
    drop: Location | None = None
    """File with one document id per line: drop these documents."""
    stale: Locations | None = None
    """One or several files, folders or globs of documents: where one of these documents has changed since its capture,
    drop the rows of its earlier text. Other rows stay. They are read with the columns.* settings; if these are left
    out, with those of the table's newest capture."""
    compact: bool = False
    """Merge shards that are less than half full."""
    purge: Location | None = None
    """File with one document id per line: delete these documents from every version, permanently. Old versions that
    held them can no longer be opened, and no capture adds the documents again."""
    selection: NarrowingConfig = NarrowingConfig()
    columns: ColumnsConfig = ColumnsConfig()
    shards: RelayConfig = RelayConfig()

    @model_validator(mode="after")
    def _combined(self) -> Self:
        if self.purge and (self.changes or self.destination):
            others = ", ".join(self.changes) or "the destination"
            raise ValueError(f"purge can't be combined with other changes or a destination; leave out {others}")
        if self.stale and self.columns.id is None:
            raise ValueError("stale compares documents by their ids, so columns.id can't be none")
        return self

    @property
    def changes(self) -> list[str]:
        """The settings that say what to change."""
        changes = [f"selection.{name}" for name, value in self.selection if value is not None]
        changes += ["shards.eval_fraction"] if self.shards.eval_fraction is not None else []
        changes += ["where"] if self.where is not None else []
        return changes + [name for name in ("drop", "stale", "compact") if getattr(self, name)]
