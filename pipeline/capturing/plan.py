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
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.masks import Reread, are_current
from softlabel.pipeline.capturing.plan_files import PlanFiles, Rejects
from softlabel.pipeline.capturing.sequencer import Sequencer
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.digests import Digests, DigestSet, as_digests, digests, side_by_side
from softlabel.pipeline.documents.documents import DocumentBatch, Documents
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.errors import DocumentsError
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import outline
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.takedown import refusal


@dataclass(frozen=True)
class CapturePlan:
    """The pending sequences, as Parquet files of ``storage.schema.SEQUENCE`` and the carried columns."""

    shards: tuple[Path, ...]
    """Sequences that the teacher has to run over, one file per shard; no key is in them twice."""
    copies: tuple[Path, ...]
    """Sequences that another document has too; their soft labels are copied once the shards are committed."""
    sequences: int
    """Number of sequences in ``shards``."""
    positions: int
    """Captured positions of ``shards``."""
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
    copied: int
    """Number of sequences in ``copies``."""
    rejects_file: str | None
    """JSON lines with the id and the reason of each reject, in the table's folder; None without rejects, or in a dry
    run."""
    folder: Path
    """Folder of the plan's files."""
    seconds: float
    """Time that planning took."""

    answers: int = 0
    """Answers of the assistant in the chats that were tokenized, ..."""
    partial_answers: int = 0
    """... and how many of them the chat template does not write whole."""
    rejected: tuple[str, ...] = ()
    """The first documents that can't be used, each with the reason."""
    reread: Path | None = None
    """What all documents have now, if the table's masks may be wrong; for ``masks.replace_rows``."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.shards and not self.copies and self.reread is None


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
    pending = PlanFiles(folder / "shards", schema, config.shards.positions)
    copies = PlanFiles(folder / "copies", schema, config.shards.positions)
    rejects = Rejects(folder / "rejects.jsonl")
    found = unchanged = repeated = 0
    for batch in known.permitted(documents):
        changed = known.changed(batch.documents)
        to_read = batch.documents if known.reread else changed
        sequences, refused = sequencer.sequences(to_read, config.shards.eval_fraction)
        if known.reread:
            known.reread.add(to_read, sequences)
        rejects.add(batch.in_order([*batch.rejects, *refused]))
        if config.strict and rejects.count:
            advice = "; or leave out strict, so that such documents are skipped and listed"
            raise _unusable("a document can't be used, and strict is set", rejects.first, config, advice)
        statuses = known.statuses(sequences)
        pending.add(sequences.filter(pc.equal(statuses, "pending")))
        copies.add(sequences.filter(pc.equal(statuses, "copy")))
        found += batch.documents.num_rows - len(refused)
        unchanged += batch.documents.num_rows - changed.num_rows
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
    if pending.sequences and Table.exists(job.table):
        job.kind.require_trained_positions(job.checkpoint, config.sequences, is_new=False)
    return CapturePlan(
        shards=pending.close(),
        copies=copies.close(),
        sequences=pending.sequences,
        positions=pending.positions,
        documents=found,
        unchanged=unchanged,
        taken_down=known.taken_down,
        repeated=repeated,
        rejects=rejects.count,
        truncated=sequencer.truncated,
        copied=copies.sequences,
        rejects_file=publish(),
        folder=folder,
        seconds=time.monotonic() - started,
        answers=sequencer.answers,
        partial_answers=sequencer.partial_answers,
        rejected=rejects.shown,
        reread=None if known.reread is None else known.reread.save(folder / "reread.npz"),
    )


class Known:
    """What the table holds, and what this plan has seen so far: tells which sequences are still to be captured.

    Takes about a hundred bytes per row of the table, whatever is in it.
    """

    def __init__(self, job: CaptureJob, carried: pa.Schema) -> None:
        self._table = job.table
        self._whole, self._rows, self._keys = DigestSet(), DigestSet(), DigestSet()
        self.taken_down = 0
        """Documents that ``permitted`` has left out."""
        self.reread: Reread | None = None
        """Where the plan notes what all documents have now, if the table's masks may be wrong."""
        self._copies = job.kind.copies
        if not Table.exists(job.table):
            return
        table = Table.open(job.table)
        table.identity.require(job.identity, job.table)
        table.require_carried(carried)
        if job.settings.columns.content != "text" and not are_current(table):
            self.reread = Reread()
        columns = ["document_id", "chunk", "key", "fingerprint", "chunks"]
        parts = [_compact(rows) for shard in table.shards() for rows in outline(table, shard, columns)]
        if parts:
            names, chunk, keys, contents, chunks = (np.concatenate(column) for column in zip(*parts, strict=True))
            self._rows.add(side_by_side(names, chunk, keys))
            self._keys.add(keys)
            # After a run that was killed, the table may hold only some chunks of a document.
            versions = side_by_side(names, contents)
            _, each = np.unique(side_by_side(versions, chunk), return_index=True)
            found, first, present = np.unique(versions[each], return_index=True, return_counts=True)
            self._whole.add(found[present == chunks[each[first]]])

    def permitted(self, documents: Documents) -> Iterator[DocumentBatch]:
        """The documents without those on the refuse list, which holds only hashes: their ids are written nowhere."""
        self.taken_down = 0
        is_refused = refusal(self._table)
        for batch in documents.batches():
            names = batch.documents.column("document_id").to_pylist()
            taken_down = np.array([is_refused(name) for name in names], bool)
            self.taken_down += int(taken_down.sum())
            yield batch._replace(documents=batch.documents.filter(pa.array(~taken_down)))

    def changed(self, documents: pa.Table) -> pa.Table:
        """The documents that the table does not hold completely in their current version."""
        versions = side_by_side(_names(documents), as_digests(documents.column("fingerprint")))
        return documents.filter(pa.array(~self._whole.has(versions)))

    def statuses(self, sequences: pa.Table) -> pa.Array:
        """For each sequence "present", "copy" (its key is already known) or "pending"; remembers the keys."""
        names, chunk, keys, *_ = _compact(sequences)
        present, new = self._rows.has(side_by_side(names, chunk, keys)), self._keys.add(keys)
        pending = new | (not self._copies)
        return pa.array(np.where(present, "present", np.where(pending, "pending", "copy")), pa.string())


def _compact(rows: pa.Table) -> tuple[Digests, NDArray[np.int32], Digests, Digests, NDArray[np.int32]]:
    """Document, chunk, key, fingerprint and number of chunks of each row."""
    chunk, chunks = (rows.column(name).to_numpy() for name in ("chunk", "chunks"))
    return _names(rows), chunk, as_digests(rows.column("key")), as_digests(rows.column("fingerprint")), chunks


def _names(rows: pa.Table) -> Digests:
    return digests(rows.column("document_id").to_pylist())


def _unusable(summary: str, found: str, config: CaptureConfig, advice: str = "") -> DocumentsError:
    return DocumentsError(
        summary,
        expected="documents with an id and a text of at least one token to predict",
        found=found,
        where=config.sources,
        do=f"fix the documents, or set columns.* to the columns that hold their ids and texts{advice}",
    )
