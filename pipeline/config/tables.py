"""Settings of the jobs that look after a table, like those of ``pipeline.config.capture``."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from softlabel.pipeline.config.base import Location, Settings
from softlabel.pipeline.config.capture import ColumnsConfig, ShardsConfig, TeacherConfig

_NAME = r"[A-Za-z][A-Za-z0-9_.-]*"


class VerifyConfig(Settings):
    """Look at every byte of a table, and name each file that is damaged, missing or foreign; or ask its teacher, too.

    With teacher.model, the teacher is also run again over some of its sequences, twice: the table must not differ from
    it by more than it differs from itself in other batches.
    """

    table: Location
    """Folder of the table; TABLE@12 or TABLE@tag for another version than the newest."""
    all_versions: bool = False
    """Look at the shards of every version that can be opened, not of one alone."""
    remove_damaged: bool = False
    """Take damaged shards out of the newest version; a capture of the same documents then brings their rows back."""
    teacher: TeacherConfig | None = None
    """The teacher that made the table, if it is to be asked again."""
    sequences: PositiveInt = 32
    """Sequences, chosen at random, that the teacher is asked about again. If one in n of all is wrong, 3n find one with
    a certainty of 95 %: 32 are enough for what is wrong everywhere, 300 for what is wrong in 1 %."""
    seed: int = 0
    """Seed of that choice."""


class MaintainConfig(Settings):
    """Delete what no version of a table names and nobody is writing; or name versions, and let go of them.

    With tag, untag or unpin, nothing is deleted unless vacuum is given too.
    """

    table: Location
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
    unpin: Location | None = None
    """Folder of a student: the version that it was trained on may be dropped."""

    @model_validator(mode="after")
    def _vacuum_is_named(self) -> Self:
        if self.keep_versions is not None and not self.vacuum:
            raise ValueError("keep_versions drops versions, which only vacuum does; give vacuum too")
        return self


class MixConfig(Settings):
    """Make a view: several tables with one tokenizer that can be trained on, evaluated and inspected like one.

    It is a small file that names them, and pins their versions; no row is copied.
    """

    view: Location
    """Folder of the view."""
    tables: tuple[Location, ...] = Field(min_length=2)
    """Folders of the tables; TABLE@12 or TABLE@tag for another version than the newest."""
    how: Literal["concatenate", "average"] = "concatenate"
    """The rows of all tables; or, for the sequences that all of them hold, the average of what the teachers say, which
    is a target of forward KL alone."""
    weights: tuple[PositiveFloat, ...] = ()
    """For each table, how often its sequences come in an epoch (0.5: in every second one), or its weight in the
    average; left out, all are alike."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.tables):
            raise ValueError(f"there are {len(self.tables)} tables and {len(self.weights)} weights")
        return self


class NarrowingConfig(Settings):
    """Keep less of each distribution than the table does; what is left out here stays as it is."""

    max_k: int | None = Field(default=None, ge=0, le=32767)
    """Keep at most so many ids of each head. A sampled tail is drawn again from what is dropped and the old draws."""
    draws: int | None = Field(default=None, ge=0, le=32767)
    """Keep so many draws, were all mass in the tail; 0 drops the tail."""
    temperatures: tuple[PositiveFloat, ...] | None = None
    """Keep these of the stored temperatures, 1 first."""


class RelayConfig(ShardsConfig):
    """How rows are laid into new shards."""

    eval_fraction: float | None = Field(default=None, ge=0, lt=1)  # type: ignore[assignment]
    """Split the documents anew, so that this share of them goes to the eval split; left out, all stay in theirs."""


class ReprocessConfig(Settings):
    """Make a smaller table of a table, or change it in place as one new version; the teacher is not needed.

    Any of the settings can be combined, in one pass; purge stands alone.
    """

    source: Location
    """Folder of the table; TABLE@12 or TABLE@tag for another version than the newest."""
    destination: Location | None = None
    """Folder or s3:// address of another table, made if it is not there, added to if it is; left out, the source gets a
    new version; a smaller selection is final then: no capture can be added to it any more."""
    where: str | None = None
    """Keep the rows for which this SQL expression is true, over the row's and the carried columns:
    "source = 'web' AND tokens > 20". Columns, literals, operators and a few functions, nothing else; an error says
    which."""
    drop: Location | None = None
    """File with a document's id a line: drop these documents."""
    stale: Location | None = None
    """File, folder or glob of documents: drop what a table holds of former versions of them. Others stay."""
    compact: bool = False
    """Merge shards that are less than half full."""
    purge: Location | None = None
    """File with a document's id a line: delete these documents from every version, for good. Old versions that held
    them can no longer be opened, and no capture brings the documents back."""
    selection: NarrowingConfig = NarrowingConfig()
    columns: ColumnsConfig = ColumnsConfig()
    shards: RelayConfig = RelayConfig()

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        changes = [f"selection.{name}" for name, value in self.selection if value is not None]
        changes += ["shards.eval_fraction"] if self.shards.eval_fraction is not None else []
        changes += ["where"] if self.where is not None else []
        changes += [name for name in ("drop", "stale", "compact") if getattr(self, name)]
        if self.purge and (changes or self.destination):
            raise ValueError(f"purge stands alone; leave out {', '.join(changes) or 'the destination'}")
        if not (changes or self.purge or self.destination):
            raise ValueError(
                "nothing to do; give a destination, a selection, where, drop, stale, compact, an eval_fraction or purge"
            )
        return self
