"""Rewrites rows of a table into new shards, of the same table or another, and commits all of them at once.

Works as a stream: deciding about a row group takes a few numbers for each row, and soft labels are read only when their
new shard is written. Finished shards stay in the side folder until all are finished, named by what they are made from,
so that a run that was killed can continue with them. The caller's ``Rewriting`` decides what happens to each row.

    TABLE/_softlabel/rewritten/<hash of the sources>-<hash of the content>.parquet
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake.transaction import AddAction, RemoveAction

from softlabel.storage.clustering import SAMPLE
from softlabel.storage.codec import assemble, flatten, number, with_token_ids, without_tail_codes
from softlabel.storage.committing import all_or_nothing, try_commit
from softlabel.storage.errors import TableError
from softlabel.storage.identity import Identity
from softlabel.storage.log.state import Shard
from softlabel.storage.narrowing import narrow
from softlabel.storage.numbering import Numbering
from softlabel.storage.places.place import File, PendingFile, Place, content_hash, hash_in_name
from softlabel.storage.reader import first_labels, read
from softlabel.storage.schema import FORMAT, PARTITION, SEQUENCE, SOFT_LABELS, row_schema
from softlabel.storage.shard_file import ShardFile, add_action
from softlabel.storage.sidecars import store_vocabulary
from softlabel.storage.staging import REWRITTEN
from softlabel.storage.table import Change, Table
from softlabel.storage.upkeep.rewrite_plan import Output, Rewriting, Rewritten, nothing_left, outputs
from softlabel.storage.writer import stores_tail_codes


class ConflictError(TableError):
    """Another process has changed the table that was being rewritten."""


@dataclass(frozen=True)
class _Finished:
    file: PendingFile
    shard: Shard
    positions: int


def rewrite(
    job: Rewriting, about: Mapping[str, Any], watch: Callable[[int], None] = lambda rows: None, *, always: bool = False
) -> Rewritten:
    """Rewrite a table in one atomic commit.

    Args:
        job: what to do.
        about: metadata for the table's history.
        watch: called with the number of source rows that are done.
        always: commit even if nothing changes, or no row is left.

    Raises:
        ConflictError: if another process has removed shards that were read; this run then changes nothing.
        IntegrityError: if a shard is damaged.
        UsageError: if no row would be left.
        TableError: if the disk is full or the folder can't be written; the table is then unchanged.
    """
    done, removed, finished = Rewritten(), list[Shard](), list[_Finished]()
    assert job.target is not None, "only a dry run has no target"
    with all_or_nothing(job.target.location):
        if job.recodes:
            _ = job.numbering  # is read now, because maintenance may delete a file that no version names yet
        pending = list(job.target.place.files(REWRITTEN))
        for output in outputs(job, done, removed, lambda: watch(done.seen)):
            finished.append(_write(job, job.target, output, pending))
        _keep_unchanged(finished, removed, done)
        done.shards, done.replaced = len(finished), len(removed)
        done.bytes = sum(new.shard.bytes for new in finished) - sum(old.bytes for old in removed)
        if done.is_empty and not always:
            raise nothing_left(job.source, done.dropped)
        changes = bool(finished or removed or job.change) or always
        done.version = _commit(job, job.target, finished, removed, about, done) if changes else job.target.version
    return done


def _keep_unchanged(finished: list[_Finished], removed: list[Shard], done: Rewritten) -> None:
    """Keep shards that narrowing does not change: a commit must not remove and add the same file."""
    same = {new.shard.path for new in finished} & {old.path for old in removed}
    for new in finished:
        if new.shard.path in same:
            new.file.discard()
            done.sequences -= new.shard.rows
            done.positions -= new.positions
            done.left += new.shard.rows
    finished[:] = [new for new in finished if new.shard.path not in same]
    removed[:] = [old for old in removed if old.path not in same]


def _write(job: Rewriting, target: Table, output: Output, pending: Sequence[File]) -> _Finished:
    """Write a shard, or reuse the one that an earlier run has written."""
    prefix = f"{REWRITTEN}/{_name(job, output)}-"
    place = target.place
    name = next((file.name for file in pending if file.name.startswith(prefix) and _is_undamaged(place, file)), None)
    if name is None:
        file = ShardFile(target.place, row_schema(target.carried), output.split, job.row_group)
        try:
            for shard, group, rows in output.pieces:
                part = read(job.source, shard, row_groups=[group]).take(pa.array(rows))
                file.append(_rewritten(job, part, output.split))
            file.finish()
            name = f"{prefix}{PurePath(file.shard_path).name}"
            file.publish(name)
        finally:
            file.discard()
    path = f"{PARTITION}={output.split}/{name.removeprefix(prefix)}"
    shard = Shard(path, output.split, output.rows, place.stat(name).bytes)
    return _Finished(place.pending(name), shard, output.positions)


def _is_undamaged(place: Place, file: File) -> bool:
    """Whether a shard of an earlier run, which may have waited for long, matches the hash in its name."""
    try:
        with place.fetch(file.name) as content:
            return content_hash(content) == hash_in_name(file.name)
    except OSError:
        return False


def _rewritten(job: Rewriting, rows: pa.Table, split: str) -> pa.Table:
    """Rows of the source as those of a split of the target."""
    rows = rows.append_column(SEQUENCE.field(PARTITION), pa.array([split] * len(rows), pa.string()))
    stores = stores_tail_codes(job.identity, rows)
    if not job.recodes:
        return rows if stores.all() else without_tail_codes(rows, ~stores)
    positions = rows.column("positions").to_numpy().astype(np.int64)
    flat = with_token_ids(flatten(rows), job.source.numbering)
    if job.narrowing:
        flat = narrow(flat, job.narrowing, rows.column("key").to_pylist(), positions, job.narrowing.seed)
    labels = assemble(number(flat, positions, job.numbering, stores), positions)
    for name in labels.column_names:
        rows = rows.set_column(rows.column_names.index(name), SOFT_LABELS.field(name), labels.column(name))
    return rows


def _name(job: Rewriting, output: Output) -> str:
    """A hash of everything that a shard is made from: shards with the same hash have the same rows."""
    digest = hashlib.blake2b(digest_size=16)
    identities = (identity.model_dump_json() for identity in (job.source.identity, job.identity))
    for text in (*identities, job.vocabulary, output.split, str(job.row_group)):
        digest.update(f"{text}\n".encode())
    for shard, group, rows in output.pieces:
        digest.update(f"{shard.path} {group} {len(rows)}\n".encode() + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _commit(
    job: Rewriting,
    target: Table,
    finished: Sequence[_Finished],
    removed: Sequence[Shard],
    about: Mapping[str, Any],
    done: Rewritten,
) -> int:
    """Publish the new shards, and commit them in place of the shards that they replace."""
    moment = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [add_action(new.shard) for new in finished]
    actions += [RemoveAction(old.path, True, moment, old.bytes, {PARTITION: old.split}) for old in removed]
    counts = {
        "sequences": done.added - done.dropped if job.in_place else done.sequences,
        "positions": done.added_positions - done.dropped_positions if job.in_place else done.positions,
        "bytes": done.bytes,
    }
    publications = [partial(new.file.publish, new.shard.path) for new in finished]
    if job.change is not None and job.change.vocabulary is not None:
        publications.append(partial(_keep_vocabulary, target, job.numbering))
    try:
        with target.place.gate():
            while True:
                newest = target.newest()
                _require_unchanged(job, target, newest, removed)
                if try_commit(newest, actions, {**about, **counts}, publications, job.change):
                    break
    except ConflictError:
        _discard(finished)
        raise
    _discard(finished)
    return newest.version + 1


def _keep_vocabulary(target: Table, numbering: Numbering) -> None:
    """Store the new vocabulary again: no version names it yet, so maintenance has deleted it if it is old."""
    store_vocabulary(target.place, numbering, target.identity.vocabulary)


def _discard(finished: Sequence[_Finished]) -> None:
    """Delete the temporary files of new shards, after they are committed or if they can't be."""
    for new in finished:
        new.file.discard()


def _require_unchanged(job: Rewriting, target: Table, newest: Table, removed: Sequence[Shard]) -> None:
    """Require that the shards that were read still exist. New shards of other writers are fine, and stay unchanged."""
    exclusive = job.exclusive or not job.in_place or job.change is not None  # new shards would have the old identity
    gone = {shard.path for shard in removed} - {shard.path for shard in newest.shards()}
    if gone or (newest.version != target.version and exclusive):
        raise ConflictError(
            "another process changed the table meanwhile, so this run changed nothing",
            expected=f"version {target.version}" if not gone else "all shards that this run has read",
            found=f"version {newest.version}" + (f", without {len(gone)} of these shards" if gone else ""),
            where=target.location,
            do="run the same command again",
        )


def in_current_format(table: Table, identity: Identity | None = None, *, dry_run: bool = False) -> Change | None:
    """The change of a table whose rows are all rewritten in the current format; None if they have that already.

    Args:
        table: the newest version.
        identity: its new identity, if that changes, too.
        dry_run: write nothing; the change then names no file.

    Raises:
        IntegrityError: if a shard is damaged.
        OSError: if the new vocabulary can't be written.
    """
    if table.format == FORMAT:
        return None if identity is None else Change(identity)
    if dry_run:
        return Change(identity or table.identity, "not written")
    sample = first_labels(table, SAMPLE)
    return Change(identity or table.identity, store_vocabulary(table.place, sample, table.identity.vocabulary))
