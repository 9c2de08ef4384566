"""Capture one shard: run the teacher over the sequences of one file of a plan, and commit their soft labels."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from softlabel.pipeline.capturing.copies import still_pending
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.masks import about_masks
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.selection.select import NotADistributionError, select
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.teachers.classifier_teacher import LabelTeacher
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import SoftLabels
from softlabel.storage.errors import TeacherError
from softlabel.storage.identity import circumstances
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter

VOCABULARY_SAMPLE = 65_536
"""Positions whose ids a new table's numbering of ids is based on."""

Labelled = tuple[pa.Table, SoftLabels]


def capture_shard(job: CaptureJob, path: Path, watch: Watch = unwatched) -> Commit:
    """Run the teacher over the sequences of one file of a plan that the table lacks, and commit the soft labels.

    The table is created if it does not exist. The teacher stays loaded for the next shard of this process. Sequences
    that another run has meanwhile committed under other documents are left for ``copy_rows``, in the file
    ``pipeline.capturing.copies.late_copies(path)``.

    Args:
        job: the capture.
        path: Parquet file of sequences, from ``CapturePlan.shards``.
        watch: called after each batch, in positions of this shard; those committed by another run count as done.

    Raises:
        ProvenanceError: if the teacher or the table is no longer the one that was planned for.
        TeacherError: if the teacher's logits are not a distribution; names the document.
        TableError: if the table can't be written.
    """
    sequences, total = still_pending(job, path), _positions(pq.read_table(path, columns=["positions"]))
    done = total - _positions(sequences)
    if done:
        watch(Progress("capture", done, total, "positions"))
    if not len(sequences):
        return Commit(Table.open(job.table).version, 0, 0, 0)
    job.require_unchanged()
    teacher = load_teacher(job.settings.teacher, job.checkpoint)
    details: dict[str, float] = {}
    batches = _watched(_labelled(job, teacher, sequences), done, total, watch, details)
    if not Table.exists(job.table):
        first = list(_at_least(batches, VOCABULARY_SAMPLE))
        sample = SoftLabels.concatenate([labels for _, labels in first])
        carried = pa.schema([field for field in sequences.schema if field.name not in SEQUENCE.names])
        tokenizer = DocumentTokenizer(job.checkpoint, job.settings.sequences, job.settings.columns.content)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # deleted with the plan in any case
            tokenizer.save(Path(folder))
            Table.create(job.table, job.identity, carried, sample, Path(folder))
        batches = chain(first, batches)
    table = Table.open(job.table)
    table.identity.require(job.identity, job.table)  # another capture may have created it meanwhile
    masks = about_masks(job, table)
    # Encoding and writing overlap with the teacher's next batch; both release the interpreter's lock.
    with ShardWriter(table, job.settings.shards.row_group_sequences) as writer, ThreadPoolExecutor(1) as io:
        written: Future[None] = io.submit(lambda: None)
        for rows, labels in batches:
            written.result()
            if (size := writer.bytes_a_position) is not None:
                details["bytes per position"] = size
            written = io.submit(writer.append, rows, labels)
        written.result()
        return writer.commit({"operation": "capture", **_history_entry(job, teacher), **masks})


def _positions(sequences: pa.Table) -> int:
    return pc.sum(sequences.column("positions")).as_py() or 0


def _labelled(job: CaptureJob, teacher: Teacher | LabelTeacher, sequences: pa.Table) -> Iterator[Labelled]:
    """The sequences with their soft labels, batch by batch."""
    if isinstance(teacher, LabelTeacher):
        yield from teacher.answers(sequences)
        return
    selection = job.selection
    queries = Queries(sequences, job.kind)

    def select_batch(batch: NDArray[np.int64], chunks: Iterator[torch.Tensor]) -> Labelled:
        rows = sequences.take(pa.array(batch))
        next_ids, seeds = queries.next_ids(batch), queries.seeds(batch, selection, job.identity.teacher)
        parts: list[SoftLabels] = []
        start = 0
        for logits in chunks:
            part = slice(start, start + len(logits))
            try:
                parts.append(select(logits, next_ids[part], seeds[part], selection, teacher.vocabulary))
            except NotADistributionError as error:
                raise _not_a_distribution(rows, [start + row for row in error.rows]) from None
            start += len(logits)
        return rows, SoftLabels.concatenate(parts)

    yield from each_batch(teacher, queries.tokens, queries.positions, select_batch, job.settings.teacher.batch_tokens)


def _watched(
    batches: Iterator[Labelled], before: int, total: int, watch: Watch, details: Mapping[str, float]
) -> Iterator[Labelled]:
    """The same batches; calls the watch for each, with these details. ``before`` positions were already done."""
    done, mass = 0, 0.0
    for rows, labels in batches:
        done += labels.positions
        mass -= float(np.expm1(labels.tail_log_masses[0]).sum())
        watch(
            Progress("capture", before + done, total, "positions", {"probability in the head": mass / done, **details})
        )
        yield rows, labels


def _at_least(batches: Iterator[Labelled], positions: int) -> Iterator[Labelled]:
    """The first batches, until they have this many positions."""
    count = 0
    for rows, labels in batches:
        yield rows, labels
        count += labels.positions
        if count >= positions:
            return


def _not_a_distribution(rows: pa.Table, positions: Sequence[int]) -> TeacherError:
    """The error for logits that are not a distribution, with the ids of the documents."""
    ends = np.cumsum(rows.column("positions").to_numpy())
    names = rows.column("document_id").take(pa.array(np.unique(np.searchsorted(ends, positions, side="right"))))
    return TeacherError(
        "the teacher's logits do not give a probability distribution; this shard was not stored",
        expected="logits that are finite, or -inf for an id of probability 0",
        found=f"NaN, +inf, or only -inf, at {len(positions)} positions",
        where=f"document {', '.join(names.to_pylist()[:5])}",
        do="use teacher.dtype bfloat16 or float32, or leave the document out",
    )


def _history_entry(job: CaptureJob, teacher: Teacher | LabelTeacher) -> dict[str, object]:
    """What the table's history records about a capture."""
    settings = job.settings
    return {
        "teacher": job.teacher,
        "revision": job.checkpoint.revision,
        "parameters": teacher.parameters,
        "config": settings.model_dump(mode="json"),
        "circumstances": circumstances(device=str(teacher.device), attention=settings.teacher.attn_implementation),
    }
