"""Takes documents down: removes them from the newest version by a commit, and from old ones by deleting shards.

It can be killed at any point and run again, because of its order: first the refuse list, so that no writer adds the
documents again; then the commit; then the record of the shards to delete; and last the deletion of these files. See
``storage.records.takedown`` for the records.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage.errors import AccessError, IntegrityError, TableError
from softlabel.storage.key_index import tidy
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import REJECTS, SIDE_FOLDER, WRITING, Place, content_hash, hash_in_name, reading
from softlabel.storage.reader import outline
from softlabel.storage.records.derivations import derived
from softlabel.storage.records.takedown import Purge, purges, record_deletion, refusal, refuse
from softlabel.storage.records.versions import pins, tags
from softlabel.storage.schema import PARTITION
from softlabel.storage.staging import REWRITTEN
from softlabel.storage.table import Table
from softlabel.storage.upkeep.replay import replay
from softlabel.storage.upkeep.rewrite import ConflictError, in_current_format, rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting, Rewritten, plan


@dataclass(frozen=True)
class Purged:
    """The result of a take-down."""

    documents: int
    """Number of documents that were taken down."""
    found: int
    """Number of these documents that any version of the table contained."""
    files: tuple[str, ...]
    """Deleted files, relative to the table: shards with these documents, and damaged ones, which may contain them."""
    versions: tuple[int, ...]
    """Versions that can no longer be opened because of this."""
    broken: tuple[str, ...]
    """Tags, and pins of students and views, on such a version."""
    same_text: tuple[str, ...]
    """Other documents with a sequence of a document that was taken down; these stay."""
    out_of_reach: tuple[str, ...]
    """What may still contain traces of the documents, and can't be changed from here."""


def purge(
    location: str,
    documents: Collection[str],
    about: Mapping[str, Any],
    layout: tuple[int, int],
    watch: Callable[[int], None] = lambda rows: None,
) -> tuple[Rewritten, Purged]:
    """Remove documents from every version of a table, for good.

    Args:
        location: location of the table.
        documents: ids of the documents; ids that the table never had are refused from now on too.
        about: metadata for the table's history.
        layout: captured positions in a shard and sequences in a row group, for rewritten shards.
        watch: called with the number of rows of the newest version that are done.

    Raises:
        IntegrityError: if a shard of the newest version is damaged.
        TableError: if the folder can't be written; run again, it continues.
    """
    record = refuse(location, documents)
    while True:
        newest = Table.open(location)
        try:
            # Always commit: a writer that has not seen the refuse list then has to try again, and sees it.
            job = Rewriting(newest, newest, *layout, change=in_current_format(newest), exclusive=True)
            rewritten = rewrite(job, about, watch, always=record.version is None)
            break
        except ConflictError:
            continue
        except (AccessError, IntegrityError):
            raise
        except TableError as error:
            raise TableError(
                "the documents are still in the table, because it could not be written; but captures "
                "leave them out from now on",
                expected="write permission for the folder, and free disk space",
                found=error.__cause__ or error,
                where=location,
                do="free disk space or fix the permissions, then run the same command again: it continues from there",
            ) from error
    with place_of(location).gate(exclusive=True):
        pass  # after this, each writer has either published and committed its files, or will see the refuse list
    try:
        return rewritten, _delete(Table.open(location), record, rewritten.version)
    except OSError as error:
        raise TableError(
            "some files with these documents could not be deleted; the newest version no longer contains them",
            expected="write permission for the folder",
            found=error,
            where=location,
            do="fix the permissions, then run the same command again",
        ) from error


def plan_purge(
    location: str, documents: Collection[str], layout: tuple[int, int], watch: Callable[[int], None]
) -> tuple[Rewritten, Purged]:
    """What ``purge`` would do; writes nothing."""
    newest = Table.open(location)
    refused = refusal(location)

    def keep(rows: pa.Table) -> NDArray[np.bool_]:
        return np.array([name not in documents for name in rows.column("document_id").to_pylist()], bool)

    change = in_current_format(newest, dry_run=True)
    job = Rewriting(newest, newest, *layout, keep=keep, columns=("document_id",), change=change, exclusive=True)
    earlier = [purge for purge in purges(location) if purge.is_of(documents)]
    rewritten, replaced = plan(job, watch, always=all(purge.version is None for purge in earlier))
    traces = _find(newest, lambda name: name in documents or refused(name), [shard.path for shard in replaced])
    lost = traces.versions | {version for purge in earlier for version in purge.versions}
    return rewritten, _purged(newest, len(documents), traces, lost, documents)


@dataclass(frozen=True)
class _Traces:
    """What a table holds of documents that are taken down, apart from its newest version."""

    files: list[str]
    """Files to delete: with rows of these documents, or damaged ones, which may have some."""
    abandoned: list[str]
    """Unfinished shards of dead writers, to delete, too."""
    named: set[str]
    """Those of the files that are shards of some version."""
    versions: set[int]
    """Versions that need one of the files."""
    documents: set[str]
    keys: set[bytes]
    foreign: list[str]
    """Parquet files that softlabel did not write."""
    damaged: list[str]
    """Damaged commits."""


def _find(newest: Table, refused: Callable[[str], bool], replaced: Collection[str] = ()) -> _Traces:
    """Look for documents in every file that the newest version does not have.

    Args:
        newest: the newest version.
        refused: whether a document is taken down.
        replaced: shards of the newest version that it would no longer have; in a dry run.
    """
    place = newest.place
    files, documents, keys = list[str](), set[str](), set[bytes]()
    ours, foreign = _candidates(newest)
    for name in [*ours, *replaced]:
        rows = _rows(place, name)
        hits = [row for row in rows or () if refused(row[0])]
        files += [name] if hits or rows is None else []
        documents.update(document for document, _ in hits)
        keys.update(key for _, key in hits)
    log = replay(newest)  # unchecked: a damaged log must not keep files with these documents from being deleted
    versions = {shard.path: shard.versions for shard in log.named}
    return _Traces(
        files=files,
        abandoned=[file.name for file in place.files(WRITING) if place.is_written(file.name) is False],
        named=versions.keys() & set(files),
        versions={version for path in files for version in versions.get(path, ())},
        documents=documents,
        keys=keys,
        foreign=foreign,
        damaged=list(log.damaged),
    )


def _delete(newest: Table, record: Purge, version: int) -> Purged:
    traces = _find(newest, refusal(newest.location))
    named = [name for name in traces.files if name in traces.named]
    record = record_deletion(newest.location, record, version, named, traces.versions)
    for name in [*traces.files, *traces.abandoned]:
        newest.place.delete(name)
    tidy(newest)  # so that nothing is left of the keys of these documents
    return _purged(newest, len(record.documents), traces, set(record.versions))


def _purged(newest: Table, documents: int, traces: _Traces, lost: set[int], gone: Collection[str] = ()) -> Purged:
    """The report; ``gone`` are documents that the newest version still has, in a dry run."""
    return Purged(
        documents=documents,
        found=len(traces.documents),
        files=tuple(sorted([*traces.files, *traces.abandoned])),
        versions=tuple(sorted(lost)),
        broken=tuple(_broken(newest.location, lost)),
        same_text=tuple(sorted(_documents_sharing(newest, traces.keys).difference(gone))),
        out_of_reach=(
            *(f"{name}, which was not checked, because softlabel did not write it" for name in traces.foreign),
            *(
                f"{name}, a damaged commit: because of it, the list of versions that can no longer be opened may be"
                " incomplete"
                for name in traces.damaged
            ),
            *_out_of_reach(newest),
        ),
    )


def _candidates(newest: Table) -> tuple[list[str], list[str]]:
    """Every file with rows that is not in the newest version; and Parquet files that softlabel did not write."""
    present = {shard.path for shard in newest.shards()}
    names = {file.name for file in newest.place.files() if file.name.endswith(".parquet")}
    among = sorted(name for name in names - present if name.startswith((f"{PARTITION}=", f"{REWRITTEN}/")))
    ours = [name for name in among if re.fullmatch("[0-9a-f]{32}", hash_in_name(name))]
    return ours, [name for name in among if name not in ours]


def _rows(place: Place, name: str) -> list[tuple[str, bytes]] | None:
    """Document and key of each row of a file; None if it is damaged, and so may contain any document.

    Raises:
        AccessError: if it can't be read at the moment.
    """
    try:
        with reading(place.where(name)), place.fetch(name) as content:
            if content_hash(content) != hash_in_name(name):
                return None
            rows = pq.ParquetFile(content).read(["document_id", "key"])
    except (OSError, ValueError, pa.ArrowException):
        return None
    return list(zip(*(rows.column(name).to_pylist() for name in ("document_id", "key")), strict=True))


def _documents_sharing(newest: Table, keys: Collection[bytes]) -> set[str]:
    """Documents in the newest version with one of these sequences."""
    wanted = pa.array(list(keys), pa.binary())
    parts = (part for shard in newest.shards() for part in outline(newest, shard, ["document_id", "key"]) if keys)
    return {
        name for part in parts for name in part.filter(pc.is_in(part.column("key"), wanted))["document_id"].to_pylist()
    }


def _broken(location: str, lost: Collection[int]) -> Iterator[str]:
    yield from (f"{pin.kind} {pin.student}, of version {pin.version}" for pin in pins(location) if pin.version in lost)
    yield from (f"tag {tag.name}, of version {tag.version}" for tag in tags(location).values() if tag.version in lost)


def _out_of_reach(newest: Table) -> Iterator[str]:
    location, place = newest.location, newest.place
    students = [pin for pin in pins(location) if pin.kind == "student"]
    yield from (f"student {pin.student}, trained on version {pin.version}" for pin in students)
    if any(file.name == REJECTS for file in place.files(SIDE_FOLDER)):
        yield f"{place.where(REJECTS)}, which lists the ids of documents that the newest capture rejected"
    yield "other students that were trained on older versions, and their reports"
    yield from (f"table {made.table}, made from version {made.version}: purge it too" for made in derived(location))
    yield f"copies of {location}, and tables that softlabel reprocess made from it: purge these too"
    yield "backups, file system snapshots, and versions of deleted objects that an object store keeps"
    if not place.sees_writers or any(place.files(WRITING)):
        yield "shards that are being written now; their writers will leave out these documents when they commit"
    if not place.sees_writers:
        yield f"shards uploaded by these writers but not committed: softlabel maintain {location} deletes them later"
