"""Reprocess: make a smaller table from a table, or change it in place, without the teacher.

Decides which rows stay and how they change; ``storage.upkeep.rewrite`` does it in one commit, and
``storage.upkeep.purge`` deletes documents permanently.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from softlabel.pipeline.config.tables import NarrowingConfig, ReprocessConfig
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.sequences.chunking import split_of
from softlabel.pipeline.tables.row_filter import RowFilter, listed
from softlabel.pipeline.teachers.kind import kind_of
from softlabel.storage.clustering import SAMPLE
from softlabel.storage.committing import all_or_nothing
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.labels import SoftLabels
from softlabel.storage.log.files import require_no_remains
from softlabel.storage.narrowing import Narrowing
from softlabel.storage.numbering import Numbering
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import first_labels, outline, with_split
from softlabel.storage.records.derivations import record_derived
from softlabel.storage.records.takedown import carry_over
from softlabel.storage.records.versions import parse
from softlabel.storage.schema import FORMAT, PARTITION
from softlabel.storage.table import Change, Table
from softlabel.storage.upkeep.card import keeping_card
from softlabel.storage.upkeep.inspection import last_capture
from softlabel.storage.upkeep.purge import Purged, plan_purge, purge
from softlabel.storage.upkeep.rewrite import in_current_format, rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting, Rewritten, nothing_left, plan
from softlabel.storage.writer import require_current_format, require_writable


@dataclass(frozen=True)
class ReprocessReport:
    """What a reprocessing did."""

    source: str
    """TABLE@version that was read."""
    table: str
    """The table that was made or changed."""
    version: int
    """Newest version of the table at the end."""
    operation: str
    """Name of the operation in the table's history."""
    rows: Rewritten
    """What happened to the rows."""
    unknown: int
    """Number of ids to drop that the table does not hold."""
    purged: Purged | None
    """Result of ``purge``, if it was set."""
    seconds: float
    dry_run: bool = False
    """Whether nothing was written, and this is what would be done. The bytes of ``rows`` are then estimated from the
    source, as if a smaller selection took nothing away."""


def reprocess(config: ReprocessConfig, watch: Watch = unwatched, *, dry_run: bool = False) -> ReprocessReport:
    """Make or change a table. It stays unchanged until everything is done; a killed run continues when run again.

    Args:
        config: what to do.
        watch: called with the number of rows that are done.
        dry_run: only report what would be done.

    Raises:
        UsageError: if the settings require something that the table does not hold.
        ProvenanceError: if the destination was made with another teacher or other settings.
        TableError: if a table can't be used, or was changed by someone else meanwhile.
    """
    started = time.monotonic()
    source = Table.open(config.source)
    target_identity, narrowing = _identity(source, config)
    row_filter = RowFilter(source, config)
    target = _target(source, config, target_identity, row_filter, dry_run)
    change = None
    if not (config.destination or config.purge):
        changed = None if target_identity == source.identity else target_identity
        with all_or_nothing(source.location):
            change = in_current_format(source, changed, dry_run=dry_run)
        _require_something_to_do(source, config, change)
    operation, fraction = _operation(config), config.shards.eval_fraction
    history_entry = {
        "operation": operation,
        "source": f"{source.location}@{source.version}",
        "settings": config.model_dump(mode="json", exclude_defaults=True),
    }
    layout = config.shards.positions, config.shards.row_group_sequences
    total = sum(shard.rows for shard in source.shards())

    def report_progress(rows: int) -> None:
        watch(Progress("reprocess", rows, total, "sequences"))

    if dry_run:
        require_writable(config.destination or source.location, dry_run=True)
    purged: Purged | None = None
    with nullcontext() if dry_run else keeping_card(config.destination or source.location):
        if config.purge and dry_run:
            done, purged = plan_purge(source.location, listed(config.purge), layout, report_progress)
        elif config.purge:
            done, purged = purge(source.location, listed(config.purge), history_entry, layout, report_progress)
        else:
            job = Rewriting(
                source,
                target,
                *layout,
                keep=row_filter,
                columns=row_filter.columns,
                split=None if fraction is None else partial(split_of, eval_fraction=fraction),
                narrowing=narrowing,
                change=change,
                compact=config.compact,
            )
            if dry_run:
                done, _ = plan(job, report_progress)
            else:
                entry = history_entry if job.in_place else _teacher_entry(source) | history_entry
                done = rewrite(job, entry, report_progress)
            if not (dry_run or job.in_place or target is None):
                record_derived(source.location, source.version, target.place.address, operation)
    return ReprocessReport(
        source=f"{source.location}@{source.version}",
        table=config.destination or source.location,
        version=done.version,
        operation=operation,
        rows=done,
        unknown=row_filter.unknown,
        purged=purged,
        seconds=time.monotonic() - started,
        dry_run=dry_run,
    )


def _operation(config: ReprocessConfig) -> str:
    """Name of the operation in the table's history."""
    parts = {
        "narrow": any(value is not None for _, value in config.selection),
        "filter": config.where,
        "drop": config.drop,
        "drop stale": config.stale,
        "split": config.shards.eval_fraction is not None,
        "compact": config.compact,
        "purge": config.purge,
    }
    return " + ".join(name for name, given in parts.items() if given) or ("copy" if config.destination else "format")


def _require_something_to_do(source: Table, config: ReprocessConfig, change: Change | None) -> None:
    if not (change or config.changes):
        raise UsageError(
            f"nothing to do: this table has format {source.format} already",
            expected="destination, selection, where, drop, stale, compact, shards.eval_fraction or purge",
            where=f"{source.location}@{source.version}",
            do="give what to change, or the destination of a copy",
        )


def _teacher_entry(source: Table) -> dict[str, Any]:
    """What the source's newest capture records about the teacher, for a table that had no capture of its own."""
    return last_capture(source).model_dump(include={"teacher", "revision", "parameters", "config"}, exclude_unset=True)


def _identity(source: Table, config: ReprocessConfig) -> tuple[Identity, Narrowing | None]:
    """Identity of the resulting table, and the narrowing to apply to each row."""
    identity, narrowing, fraction = source.identity, None, config.shards.eval_fraction
    if any(value is not None for _, value in config.selection):
        narrowing = _narrowing(source, config.selection)
        identity, narrowing = narrowing.identity, narrowing if narrowing.identity != source.identity else None
    if fraction is not None:
        sequences = identity.sequences.model_copy(update={"eval_fraction": fraction})
        identity = identity.model_copy(update={"sequences": sequences})
    return identity, narrowing


def _narrowing(source: Table, wanted: NarrowingConfig) -> Narrowing:
    given = {name: value for name, value in wanted if value is not None}
    where = f"{source.location}@{source.version}"
    kind_of(source.identity.classes).require_narrowing(given, where)
    source.identity.require_known(["tail_log_masses"], where, "narrowing", "leave out the selection")
    stored = source.identity.selection
    max_k = stored.max_k if wanted.max_k is None else wanted.max_k
    draws = stored.draws if wanted.draws is None else wanted.draws
    temperatures = source.temperatures if wanted.temperatures is None else wanted.temperatures
    limits = {"max_k": (max_k, stored.max_k), "draws": (draws, stored.draws)}
    for name, (requested, stored_limit) in limits.items():
        if requested > stored_limit:
            raise _too_much(source, name, f"at most {stored_limit}", requested)
    tail_logprobs = wanted.tail_logprobs or source.identity.tail_logprobs
    has_all = source.identity.tail_logprobs == "all" or source.format == 1
    if tail_logprobs == "all" and not has_all:
        raise _too_much(source, "tail_logprobs", "eval, the only split in which they are stored", tail_logprobs)
    if max_k == draws == 0:
        raise _too_much(source, "max_k and selection.draws", "at least one above 0", "0 for both")
    if (
        temperatures[:1] != (1.0,)
        or len({*temperatures}) < len(temperatures)
        or {*temperatures} - {*source.temperatures}
    ):
        stored_ones = " ".join(f"{T:g}" for T in source.temperatures)
        requested_ones = " ".join(f"{T:g}" for T in temperatures)
        expected = f"1, then any others of the stored temperatures ({stored_ones})"
        raise _too_much(source, "temperatures", expected, requested_ones)
    return Narrowing(source.identity, max_k, draws, temperatures, tail_logprobs)


def _too_much(source: Table, name: str, expected: object, found: object) -> UsageError:
    return UsageError(
        f"selection.{name} can't be used to narrow this table",
        expected=expected,
        found=found,
        where=f"{source.location}@{source.version}",
        do="run softlabel inspect to see what the table holds; to store more, capture a new table",
    )


def _target(
    source: Table, config: ReprocessConfig, identity: Identity, row_filter: RowFilter, dry_run: bool
) -> Table | None:
    """The table to write to. A destination that does not exist is created, and stays empty until everything is done.

    A dry run creates none, and returns None for one that does not exist.
    """
    if config.destination is None:
        if parse(config.source)[1] is not None:
            raise UsageError(
                "an old version can't be changed in place",
                expected="a table without a version, or a destination",
                found=config.source,
                do="leave out the version, or give a destination for a new table",
            )
        return source
    if place_of(config.destination).address == source.place.address:
        raise UsageError(
            "source and destination are the same folder",
            where=config.destination,
            do="to change the table in place, leave out the destination",
        )
    if Table.exists(config.destination):
        target = Table.open(config.destination)
        require_current_format(target)
        target.identity.require(identity, config.destination)
        target.require_carried(source.carried)
    elif dry_run:
        require_no_remains(place_of(config.destination))
        return None
    else:
        _require_rows(source, row_filter)
        target = Table.create(config.destination, identity, source.carried, _numbering(source), source.tokenizer)
    if not dry_run:
        carry_over(source.location, target.location)
    return target


def _numbering(source: Table) -> Numbering | SoftLabels:
    """What a new table's numbering is: the source's, or one for its rows, if the source's is of an older format."""
    return source.numbering if source.format == FORMAT else first_labels(source, SAMPLE)


def _require_rows(source: Table, row_filter: RowFilter) -> None:
    """Refuse a filter that keeps no row before a table is created; usually the first row group settles it."""
    dropped, columns = 0, sorted({*row_filter.columns} - {PARTITION})
    for shard in source.shards():
        for rows in outline(source, shard, columns):
            if row_filter(with_split(rows, shard)).any():
                return
            dropped += len(rows)
    if dropped:
        raise nothing_left(source, dropped)
