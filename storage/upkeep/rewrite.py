"""Lays rows of a table into new shards, of the same table or of another, and puts these in its place by one commit.

Streams: what is decided about a row group is a few numbers a row, and soft labels are read when their new shard is
written. New shards wait in the side folder, named by what they are made from, until all are there: a run that was
killed goes on with them. Knows no documents and no settings; what to do with a row is decided by what it is given.

    TABLE/_softlabel/rewritten/<hash of what it is made from>-<hash of its content>.parquet
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
from softlabel.storage.committing import all_or_nothing, committed
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.narrowing import narrow, renumber
from softlabel.storage.places.place import SIDE_FOLDER, File, Unnamed
from softlabel.storage.reader import read
from softlabel.storage.schema import PARTITION
from softlabel.storage.shard_file import ShardFile, add_action
from softlabel.storage.state import Shard
from softlabel.storage.table import Table
from softlabel.storage.upkeep.rewrite_plan import Output, Rewriting, Rewritten, outputs

REWRITTEN = f"{SIDE_FOLDER}/rewritten"
"""Folder of shards that wait for the commit."""


class ConflictError(TableError):
    """Somebody else has changed what was being rewritten."""


@dataclass(frozen=True)
class _Finished:
    file: Unnamed
    shard: Shard
    positions: int


def rewrite(
    job: Rewriting, about: Mapping[str, Any], watch: Callable[[int], None] = lambda rows: None, *, always: bool = False
) -> Rewritten:
    """Rewrite a table; it is as it was until all is done, and then all is.

    Args:
        job: what to do.
        about: what the table's history is to say of it.
        watch: told how many of the source's rows are done.
        always: commit even if nothing changes, or nothing is left.

    Raises:
        ConflictError: if shards that were read are gone meanwhile; the table is as the others have left it.
        IntegrityError: if a shard is damaged.
        UsageError: if no row would be left.
        TableError: if the disk is full or the folder can't be written; the table is as it was.
    """
    done, removed, finished = Rewritten(), list[Shard](), list[_Finished]()

    def tell() -> None:
        watch(done.sequences + done.left + done.dropped)

    with all_or_nothing(job.target.location):
        waiting = list(job.target.place.files(REWRITTEN))
        for output in outputs(job, done, removed, tell):
            whole = output.pieces[0][0]
            if job.in_place and not job.narrowing and output.is_just(whole):
                removed.remove(whole)
                done.left += whole.rows
            else:
                finished.append(_write(job, output, waiting))
                done.sequences += output.rows
                done.positions += output.positions
            tell()
        _keep_the_same(finished, removed, done)
        done.shards, done.replaced = len(finished), len(removed)
        done.bytes = sum(new.shard.bytes for new in finished) - sum(old.bytes for old in removed if job.in_place)
        if done.dropped and not always and not done.sequences and not done.left:
            raise nothing_left(job.source, done.dropped)
        changes = bool(finished or removed or job.identity) or always
        done.version = _commit(job, finished, removed, about, done) if changes else job.target.version
    return done


def _keep_the_same(finished: list[_Finished], removed: list[Shard], done: Rewritten) -> None:
    """Leave shards that were narrowed to what they were already: no commit may take a file away and bring it back."""
    same = {new.shard.path for new in finished} & {old.path for old in removed}
    for new in finished:
        if new.shard.path in same:
            new.file.discard()
            done.sequences -= new.shard.rows
            done.positions -= new.positions
            done.left += new.shard.rows
    finished[:] = [new for new in finished if new.shard.path not in same]
    removed[:] = [old for old in removed if old.path not in same]


def _write(job: Rewriting, output: Output, waiting: Sequence[File]) -> _Finished:
    """Make a shard, or find the one that a run before this one has made."""
    prefix = f"{REWRITTEN}/{_name(job, output)}-"
    name = next((file.name for file in waiting if file.name.startswith(prefix)), None)
    numbering = _numbering(job)
    if name is None:
        file = ShardFile(job.target, output.split, job.row_group)
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
    place = job.target.place
    path = f"{PARTITION}={output.split}/{name.removeprefix(prefix)}"
    shard = Shard(path, output.split, output.rows, place.stat(name).bytes)
    return _Finished(place.waiting(name), shard, output.positions)


def _numbering(job: Rewriting) -> Ints | None:
    """The target's rank for each of the source's; None if they are the same."""
    if np.array_equal(job.source.vocabulary, job.target.vocabulary):
        return None
    ranks: Ints = job.target.ranks[job.source.vocabulary]
    return ranks


def _name(job: Rewriting, output: Output) -> str:
    """All that a shard is made from, as a hash: the same name, the same rows."""
    digest = hashlib.blake2b(digest_size=16)
    identities = (identity.model_dump_json() for identity in (job.source.identity, job.identity or job.target.identity))
    for text in (*identities, output.split, str(job.row_group)):
        digest.update(f"{text}\n".encode())
    for shard, group, rows in output.pieces:
        digest.update(f"{shard.path} {group} {len(rows)}\n".encode() + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _commit(
    job: Rewriting, finished: Sequence[_Finished], removed: Sequence[Shard], about: Mapping[str, Any], done: Rewritten
) -> int:
    """Give the new shards their names and put them into the table, in the place of those that they stand for."""
    moment = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [add_action(new.shard) for new in finished]
    actions += [RemoveAction(old.path, True, moment, old.bytes, {PARTITION: old.split}) for old in removed]
    counts = {
        "sequences": -done.dropped if job.in_place else done.sequences,
        "positions": -done.dropped_positions if job.in_place else done.positions,
        "bytes": done.bytes,
    }
    publications = [partial(new.file.publish, new.shard.path) for new in finished]
    try:
        with job.target.place.gate():
            while True:
                newest = job.target.newest()
                _require_unchanged(job, newest, removed)
                if committed(newest, actions, {**about, **counts}, publications, job.identity):
                    break
    except ConflictError:
        _discard(finished)
        raise
    _discard(finished)
    return newest.version + 1


def _discard(finished: Sequence[_Finished]) -> None:
    """They are in the table by now, or have come too late."""
    for new in finished:
        new.file.discard()


def _require_unchanged(job: Rewriting, newest: Table, removed: Sequence[Shard]) -> None:
    """New shards of others may have come, and stay as they are; those that were read must be there still."""
    exclusive = job.exclusive or not job.in_place or job.identity is not None  # others' shards would be of the old one
    gone = {shard.path for shard in removed} - {shard.path for shard in newest.shards()}
    if gone or (newest.version != job.target.version and exclusive):
        raise ConflictError(
            "another process changed the table meanwhile, so this run changed nothing",
            expected=f"version {job.target.version}" if not gone else "all shards that this run has read",
            found=f"version {newest.version}" + (f", without {len(gone)} of these shards" if gone else ""),
            where=job.target.location,
            do="run the same command again",
        )


def nothing_left(source: Table, dropped: int) -> UsageError:
    """The error for a rewriting that would leave no row."""
    return UsageError(
        "no row would be left; nothing was changed",
        expected="at least one row to keep",
        found=f"{dropped:,} rows, all of which would be dropped",
        where=f"{source.location}@{source.version}",
        do="check the filter and the list of documents",
    )
