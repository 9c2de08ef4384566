"""What a capture has to do: the sequences that the documents have and the table lacks.

Documents that the table holds completely are not tokenized again, and a sequence that it holds under any document is
never sent to the teacher again. The plan consists of files, one for each future shard, so that any process can capture
any shard, and a plan over millions of documents takes little more memory than one over thousands.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.capturing.corrections import Corrections, Reread, staged_rows, unread
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.plan_files import Pending, PendingFiles, Rejects
from softlabel.pipeline.capturing.sequencer import Sequencer
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.digests import (
    Digests,
    DigestSet,
    as_digests,
    row_digests,
    side_by_side,
    version_digests,
)
from softlabel.pipeline.documents.documents import DocumentBatch, Documents, Reject
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.errors import DocumentsError
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import outline
from softlabel.storage.records.takedown import refusal
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table


@dataclass(frozen=True, kw_only=True)
class CapturePlan(Pending):
    """What a capture has to do, and what it found on the way."""

    documents: int
    """Number of usable documents."""
    unchanged: int
    """Usable documents that the table already holds completely."""
    taken_down: int
    """Documents left out because they are on the table's refuse list."""
    repeated: int
    """Documents without an id that were left out because another one has the same content."""
    rejects: int
    """Documents that can't be used."""
    truncated: int
    """Documents that were truncated to the longest sequence that a classifier reads; always 0 for language models."""
    rejects_file: str | None
    """JSON lines with the id and the reason of each reject, in the table's folder; None without rejects, or in a dry
    run."""
    seconds: float
    """Time that planning took."""
    answers: int = 0
    """Answers of the assistant in the chats that were tokenized, ..."""
    partial_answers: int = 0
    """... and how many of them the chat template does not write whole."""
    rejected: tuple[str, ...] = ()
    """The first documents that can't be used, each with the reason."""
    reread: int = 0
    """Documents of the table that were read again, because an older version of this program had captured them, ..."""
    replaced: int = 0
    """... how many wrong rows these have, ..."""
    withdrawn: int = 0
    """... and how many of them have rows in the table but can't be used now."""
    corrections: Corrections | None = None
    """What has to be done because of these; None if nothing was read again."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.shards and not self.copies and self.corrections is None


def plan(job: CaptureJob, folder: Path, watch: Watch = unwatched, *, dry_run: bool = False) -> CapturePlan:
    """Find out what a capture has to do, and write it to files. The table's rows are not touched.

    Args:
        job: the capture.
        folder: for the plan's files.
        watch: called after each batch of documents.
        dry_run: write nothing outside of ``folder``: the table does not get the list of rejects.

    Raises:
        DocumentsError: if there is no usable document; with ``strict``, at the first one that can't be used.
        ProvenanceError: if the existing table was made with another teacher or other settings.
        TeacherError: if the tokenizer can't be loaded.
        UsageError: if a column does not exist, or the settings contradict the teacher.
    """
    started = time.monotonic()
    config = job.settings
    documents = Documents(config.documents, config.columns)
    sequencer = Sequencer(job)
    known = Known(job, documents.carried)
    schema = pa.schema([*SEQUENCE, *documents.carried])
    pending = PendingFiles(folder, schema, config.shards.positions)
    corrected = PendingFiles(folder / "corrections", schema, config.shards.positions)
    rejects = Rejects(folder / "rejects.jsonl")
    found = unchanged = repeated = 0
    for batch in known.permitted(documents):
        missing, outdated = known.outdated(batch.documents)
        to_read = batch.documents.filter(pa.array(missing | outdated))
        sequences, refused = sequencer.sequences(to_read, config.shards.eval_fraction)
        wrong, replacing = known.reread.compare(to_read, sequences)
        refused = _with_consequences(refused, to_read.filter(pa.array(wrong)))
        rejects.add(batch.in_order([*batch.rejects, *refused]))
        if config.strict and rejects.count:
            advice = "; or leave out strict, so that such documents are skipped and listed"
            raise _unusable("a document can't be used, and strict is set", rejects.first, config, advice)
        for files, part in ((pending, ~replacing), (corrected, replacing)):
            rows = sequences.filter(pa.array(part))
            files.add(rows, known.statuses(rows, corrected=files is corrected))
        found += batch.documents.num_rows - len(refused)
        unchanged += int((~missing).sum()) - int((wrong & outdated[missing | outdated]).sum())
        repeated += batch.repeated
        watch(Progress("plan", found, None, "documents", {"pending positions": pending.positions}))

    def publish() -> str | None:
        return None if dry_run else rejects.publish(place_of(config.table))

    if not found:
        published = publish()
        more = [] if published is None else [f"complete list: {published}"]
        listed = [str(rejects), *more] if rejects.count else []
        taken_down = [f"{known.taken_down} documents that were taken down"] if known.taken_down else []
        raise _unusable("no document can be used", "\n               ".join(listed + taken_down), config)
    new, reread = pending.close(), known.reread
    corrections = corrected.close()
    if (new.shards or corrections.shards) and Table.exists(job.table):
        job.kind.require_trained_positions(job.checkpoint, config.sequences, is_new=False)
    return CapturePlan(
        **vars(new),
        documents=found,
        unchanged=unchanged,
        taken_down=known.taken_down,
        repeated=repeated,
        rejects=rejects.count,
        truncated=sequencer.truncated,
        rejects_file=publish(),
        seconds=time.monotonic() - started,
        answers=sequencer.answers,
        partial_answers=sequencer.partial_answers,
        rejected=rejects.shown,
        reread=reread.documents,
        replaced=reread.wrong,
        withdrawn=reread.withdrawn,
        corrections=Corrections(**vars(corrections), notes=reread.save(folder / "reread.npz"))
        if reread.documents
        else None,
    )


class Known:
    """What the table holds, and what this plan has seen so far: tells which sequences are still to be captured.

    Takes about a hundred bytes per row of the table, whatever is in it.
    """

    def __init__(self, job: CaptureJob, carried: pa.Schema) -> None:
        self._table = job.table
        self._whole, self._rows, self._keys = DigestSet(), DigestSet(), DigestSet()
        self._new_keys, self._staged_rows, self._corrected_keys = DigestSet(), DigestSet(), DigestSet()
        self.taken_down = 0
        """Documents that ``permitted`` has left out."""
        self._copies = job.kind.copies
        self.reread = Reread(_NONE, _NONE, DigestSet())
        """Compares what an older version of this program has captured with what it should be."""
        if not Table.exists(job.table):
            return
        table = Table.open(job.table)
        table.identity.require(job.identity, job.table)
        table.require_carried(carried)
        columns = ["document_id", "chunk", "key", "fingerprint", "chunks"]
        parts = [_compact(rows) for shard in table.shards() for rows in outline(table, shard, columns)]
        if parts:
            versions, chunk, rows, keys, chunks = (np.concatenate(column) for column in zip(*parts, strict=True))
            self._rows.add(rows)
            self._keys.add(keys)
            # After a run that was killed, the table may hold only some chunks of a document.
            _, each = np.unique(side_by_side(versions, chunk), return_index=True)
            found, first, present = np.unique(versions[each], return_index=True, return_counts=True)
            self._whole.add(found[present == chunks[each[first]]])
            self.reread = Reread(versions, rows, unread(table, [found]))
            self._staged_rows, self._corrected_keys = staged_rows(table)

    def permitted(self, documents: Documents) -> Iterator[DocumentBatch]:
        """The documents without those on the refuse list, which holds only hashes: their ids are written nowhere."""
        self.taken_down = 0
        is_refused = refusal(self._table)
        for batch in documents.batches():
            names = batch.documents.column("document_id").to_pylist()
            taken_down = np.array([is_refused(name) for name in names], bool)
            self.taken_down += int(taken_down.sum())
            yield batch._replace(documents=batch.documents.filter(pa.array(~taken_down)))

    def outdated(self, documents: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which documents the table does not hold completely in their current version; and which of the others were
        captured by an older version of this program, and are to be read again."""
        versions = version_digests(documents)
        missing = ~self._whole.has(versions)
        return missing, self.reread.includes(versions) & ~missing

    def statuses(self, sequences: pa.Table, corrected: bool = False) -> pa.Array:
        """For each sequence "present", "copy" (its key is already known) or "pending"; remembers the keys.

        Args:
            sequences: rows of the schema of a plan.
            corrected: whether they are corrections. These are staged before anything else is captured, so they can't be
                copied from other new sequences.
        """
        rows, keys = row_digests(sequences), as_digests(sequences.column("key"))
        present, known = self._rows.has(rows), self._keys.has(keys)
        if corrected:
            present |= self._staged_rows.has(rows)
            new = self._corrected_keys.add(keys) & ~known
        else:
            known |= self._corrected_keys.has(keys)
            new = self._new_keys.add(keys) & ~known
        pending = new | (not self._copies)
        return pa.array(np.where(present, "present", np.where(pending, "pending", "copy")), pa.string())


_NONE: Digests = np.zeros(0, "S1")


def _compact(rows: pa.Table) -> tuple[Digests, NDArray[np.int32], Digests, Digests, NDArray[np.int32]]:
    """Version, chunk, digest, key and number of chunks of each row."""
    chunk, chunks = (rows.column(name).to_numpy() for name in ("chunk", "chunks"))
    return version_digests(rows), chunk, row_digests(rows), as_digests(rows.column("key")), chunks


def _with_consequences(refused: list[Reject], wrong: pa.Table) -> list[Reject]:
    """The rejects; if they have rows in the table, the reason says that these go."""
    captured = set(wrong.column("document_id").to_pylist())
    gone = "; its rows, which an older version of softlabel captured, are removed"
    return [r._replace(reason=r.reason + gone) if r.document_id in captured else r for r in refused]


def _unusable(summary: str, found: str, config: CaptureConfig, advice: str = "") -> DocumentsError:
    return DocumentsError(
        summary,
        expected="documents with an id and a text of at least one token to predict",
        found=found,
        where=config.sources,
        do=f"fix the documents, or set columns.* to the columns that hold their ids and texts{advice}",
    )
