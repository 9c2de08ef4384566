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

from softlabel.storage.codec import Ints
from softlabel.storage.committing import all_or_nothing, try_commit
from softlabel.storage.errors import TableError
from softlabel.storage.narrowing import narrow, renumber
from softlabel.storage.places.place import File, PendingFile
from softlabel.storage.reader import read
from softlabel.storage.schema import PARTITION
from softlabel.storage.shard_file import ShardFile, add_action
from softlabel.storage.staging import REWRITTEN
from softlabel.storage.state import Shard
from softlabel.storage.table import Table
from softlabel.storage.upkeep.rewrite_plan import Output, Rewriting, Rewritten, nothing_left, outputs


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
        pending = list(job.target.place.files(REWRITTEN))
        for output in outputs(job, done, removed, lambda: watch(done.seen)):
            finished.append(_write(job, job.target, output, pending))
        _keep_unchanged(finished, removed, done)
        done.shards, done.replaced = len(finished), len(removed)
        done.bytes = sum(new.shard.bytes for new in finished) - sum(old.bytes for old in removed)
        if done.is_empty and not always:
            raise nothing_left(job.source, done.dropped)
        changes = bool(finished or removed or job.identity) or always
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
    prefix = f"{REWRITTEN}/{_name(job, target, output)}-"
    name = next((file.name for file in pending if file.name.startswith(prefix)), None)
    numbering = _numbering(job.source, target)
    if name is None:
        file = ShardFile(target, output.split, job.row_group)
        try:
            for shard, group, rows in output.pieces:
                part = read(job.source, shard, row_groups=[group]).take(pa.array(rows))
                part = narrow(part, job.narrowing, job.narrowing.seed) if job.narrowing else part
                file.append(part if numbering is None else renumber(part, numbering))
            file.finish()
            name = f"{prefix}{PurePath(file.shard_path).name}"
            file.publish(name)
        finally:
            file.discard()
    place = target.place
    path = f"{PARTITION}={output.split}/{name.removeprefix(prefix)}"
    shard = Shard(path, output.split, output.rows, place.stat(name).bytes)
    return _Finished(place.pending(name), shard, output.positions)


def _numbering(source: Table, target: Table) -> Ints | None:
    """The target's rank for each rank of the source; None if the rankings are equal."""
    if np.array_equal(source.vocabulary, target.vocabulary):
        return None
    ranks: Ints = target.ranks[source.vocabulary]
    return ranks


def _name(job: Rewriting, target: Table, output: Output) -> str:
    """A hash of everything that a shard is made from: shards with the same hash have the same rows."""
    digest = hashlib.blake2b(digest_size=16)
    identities = (identity.model_dump_json() for identity in (job.source.identity, job.identity or target.identity))
    for text in (*identities, output.split, str(job.row_group)):
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
    try:
        with target.place.gate():
            while True:
                newest = target.newest()
                _require_unchanged(job, target, newest, removed)
                if try_commit(newest, actions, {**about, **counts}, publications, job.identity):
                    break
    except ConflictError:
        _discard(finished)
        raise
    _discard(finished)
    return newest.version + 1


def _discard(finished: Sequence[_Finished]) -> None:
    """Delete the temporary files of new shards, after they are committed or if they can't be."""
    for new in finished:
        new.file.discard()


def _require_unchanged(job: Rewriting, target: Table, newest: Table, removed: Sequence[Shard]) -> None:
    """Require that the shards that were read still exist. New shards of other writers are fine, and stay unchanged."""
    exclusive = job.exclusive or not job.in_place or job.identity is not None  # new shards would have the old identity
    gone = {shard.path for shard in removed} - {shard.path for shard in newest.shards()}
    if gone or (newest.version != target.version and exclusive):
        raise ConflictError(
            "another process changed the table meanwhile, so this run changed nothing",
            expected=f"version {target.version}" if not gone else "all shards that this run has read",
            found=f"version {newest.version}" + (f", without {len(gone)} of these shards" if gone else ""),
            where=target.location,
            do="run the same command again",
        )
