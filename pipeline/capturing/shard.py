"""Capture one shard: run the teacher over the sequences of one file of a plan, and commit their soft labels."""

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel.pipeline.capturing.copies import still_pending
from softlabel.pipeline.capturing.corrections import about_reading
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.labelling import Labelled, Labeller, labeller_of
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.storage.clustering import SAMPLE
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter


def capture_shard(job: CaptureJob, path: Path, watch: Watch = unwatched) -> Commit:
    """Run the teacher over the sequences of one file of a plan that the table lacks, and commit the soft labels.

    The table is created if it does not exist. The teacher stays loaded for the next shard of this process. Sequences
    that another run has meanwhile committed under other documents are left for ``copy_rows``, in the file
    ``pipeline.capturing.copies.late_copies(path)``. The rows of a correction are only staged.

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
    labeller = labeller_of(job)
    details: dict[str, float] = {}
    batches = _watched(labeller.label(sequences), done, total, watch, details)
    if not Table.exists(job.table):
        first = list(_at_least(batches, SAMPLE))
        sample = SoftLabels.concatenate([labels for _, labels in first])
        carried = pa.schema([field for field in sequences.schema if field.name not in SEQUENCE.names])
        tokenizer = DocumentTokenizer(job.checkpoint, job.settings.sequences, job.settings.columns.content)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # deleted with the plan in any case
            tokenizer.save(Path(folder))
            Table.create(job.table, job.identity, carried, sample, Path(folder))
        batches = chain(first, batches)
    table = Table.open(job.table)
    table.identity.require(job.identity, job.table)  # another capture may have created it meanwhile
    about = {"operation": "capture", **_history_entry(job, labeller), **about_reading(table)}
    # Encoding and writing overlap with the teacher's next batch; both release the interpreter's lock.
    with ShardWriter(table, job.settings.shards.row_group_sequences) as writer, ThreadPoolExecutor(1) as io:
        written: Future[None] = io.submit(lambda: None)
        for rows, labels in batches:
            written.result()
            if (size := writer.bytes_a_position) is not None:
                details["bytes per position"] = size
            written = io.submit(writer.append, rows, labels)
        written.result()
        return writer.stage() if job.is_correction else writer.commit(about)


def _positions(sequences: pa.Table) -> int:
    return pc.sum(sequences.column("positions")).as_py() or 0


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


def _history_entry(job: CaptureJob, labeller: Labeller) -> dict[str, object]:
    """What the table's history records about a capture."""
    settings = job.settings
    return {
        "teacher": job.teacher,
        "revision": job.checkpoint.revision,
        "parameters": labeller.parameters,
        "config": settings.model_dump(mode="json"),
        "circumstances": {"device": str(labeller.device), "attention": settings.teacher.attn_implementation},
    }
