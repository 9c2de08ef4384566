"""Takes documents down: out of the newest version by a commit, out of the old ones by deleting their shards.

The order makes it safe to be killed anywhere and run again: the refuse list is first, so that nothing brings the
documents back; then the commit; then the tombstone; and the bytes go last. See ``storage.takedown`` for the records.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import TableError
from storage.layout import Rewriting, Rewritten
from storage.log import read_log
from storage.place import REJECTS, SIDE_FOLDER, WRITING, Place, place_of, reading
from storage.reader import outline
from storage.rewrite import REWRITTEN, ConflictError, rewrite
from storage.schema import PARTITION
from storage.table import Table
from storage.takedown import Purge, bury, refusal, refuse
from storage.versions import pins, tags


@dataclass(frozen=True)
class Purged:
    """What a take-down came to."""

    documents: int
    """That nothing will bring back."""
    found: int
    """Those among them that the table held, in whichever version."""
    files: tuple[str, ...]
    """What was deleted, relative to the table."""
    versions: tuple[int, ...]
    """That can no longer be opened because of this."""
    broken: tuple[str, ...]
    """Tags, and students with their pins, that stand for such a version."""
    same_text: tuple[str, ...]
    """Other documents that hold a sequence of a purged one, and stay."""
    out_of_reach: tuple[str, ...]
    """What may still know the documents, and can't be changed from here."""


def purge(
    location: str,
    documents: Collection[str],
    about: Mapping[str, Any],
    layout: tuple[int, int],
    watch: Callable[[int], None] = lambda rows: None,
) -> tuple[Rewritten, Purged]:
    """Remove documents from every version of a table, for good.

    Args:
        location: the table's folder.
        documents: their ids; those that the table never held are refused from now on as well.
        about: what the table's history is to say of it.
        layout: captured positions of a shard and sequences of a row group, for shards that are rewritten.
        watch: told how many rows of the newest version are done.

    Raises:
        IntegrityError: if a shard of the newest version is damaged.
        TableError: if the folder can't be written. Run again, it goes on where it was.
    """
    record = refuse(location, documents)
    while True:
        newest = Table.open(location)
        try:
            # Always a commit: a writer that has not seen the refuse list is thrown back by it, and sees it then.
            job = Rewriting(newest, newest, *layout, exclusive=True)
            rewritten = rewrite(job, about, watch, always=record.version is None)
            break
        except ConflictError:
            continue
    with place_of(location).gate(alone=True):
        pass  # whoever was about to give a file its final name has done so, or sees the refuse list
    try:
        return rewritten, _delete(Table.open(location), record, rewritten.version)
    except OSError as error:
        raise TableError(
            "not every file that holds these documents could be deleted; the newest version is without them",
            found=error,
            where=location,
            do="mend the permissions, then run the same command again",
        ) from error


def _delete(newest: Table, record: Purge, version: int) -> Purged:
    place, refused = newest.place, refusal(newest.location)
    doomed: list[str] = []
    unreadable: list[str] = []
    found: set[str] = set()
    keys: set[bytes] = set()
    for name in _candidates(newest):
        try:
            rows = [row for row in _rows(place, name) if refused(row[0])]
        except (OSError, ValueError, pa.ArrowException) as error:
            unreadable.append(f"{name}: can't be read ({error})")
            continue
        doomed += [name] if rows else []
        found.update(document for document, _ in rows)
        keys.update(key for _, key in rows)
    deserted = [file.name for file in place.files(WRITING) if place.is_written(file.name) is False]
    named = {shard.path: shard.versions for shard in read_log(newest).named}
    lost = {version for path in doomed for version in named.get(path, ())}
    record = bury(newest.location, record, version, [name for name in doomed if name in named], lost)
    for name in [*doomed, *deserted]:
        place.delete(name)
    return Purged(
        documents=len(record.documents),
        found=len(found),
        files=tuple(sorted([*doomed, *deserted])),
        versions=tuple(record.versions),
        broken=tuple(_broken(newest.location, record)),
        same_text=tuple(sorted(_holders(newest, keys))),
        out_of_reach=(*unreadable, *_out_of_reach(newest)),
    )


def _candidates(newest: Table) -> list[str]:
    """Every file of rows but those of the newest version, which were looked at."""
    present = {shard.path for shard in newest.shards()}
    names = {file.name for file in newest.place.files() if file.name.endswith(".parquet")}
    return sorted(name for name in names - present if name.startswith((f"{PARTITION}=", f"{REWRITTEN}/")))


def _rows(place: Place, name: str) -> Iterator[tuple[str, bytes]]:
    """Document and key of each row of a file."""
    with reading(place.where(name)):
        file = pq.ParquetFile(place.open(name)[0])
        for batch in file.iter_batches(columns=["document_id", "key"]):
            yield from zip(*(batch.column(name).to_pylist() for name in ("document_id", "key")), strict=True)


def _holders(newest: Table, keys: Collection[bytes]) -> set[str]:
    """Documents of the newest version that have one of these sequences."""
    wanted = pa.array(list(keys), pa.binary())
    parts = (part for shard in newest.shards() for part in outline(newest, shard, ["document_id", "key"]) if keys)
    return {
        name for part in parts for name in part.filter(pc.is_in(part.column("key"), wanted))["document_id"].to_pylist()
    }


def _broken(location: str, record: Purge) -> Iterator[str]:
    lost = set(record.versions)
    yield from (f"{pin.kind} {pin.student}, of version {pin.version}" for pin in pins(location) if pin.version in lost)
    yield from (f"tag {tag.name}, of version {tag.version}" for tag in tags(location).values() if tag.version in lost)


def _out_of_reach(newest: Table) -> Iterator[str]:
    location, place = newest.location, newest.place
    students = [pin for pin in pins(location) if pin.kind == "student"]
    yield from (f"student {pin.student}, trained on version {pin.version}" for pin in students)
    if any(file.name == REJECTS for file in place.files(SIDE_FOLDER)):
        yield f"{place.where(REJECTS)}, which names what the newest capture left out, by id"
    yield "other students that were trained on older versions, and reports about them"
    yield f"copies of {location}, and tables that softlabel reprocess made from it: purge them as well"
    yield "backups, snapshots of the file system, and an object store's own versions of deleted objects"
    if not place.sees_writers or any(place.files(WRITING)):
        yield "shards that are being written at this moment; their writers leave these documents out when they commit"
    if not place.sees_writers:
        yield f"what they have uploaded in vain: softlabel maintain {location} deletes it after its grace period"
