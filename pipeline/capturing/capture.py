"""Capture: run a teacher once over documents, and store its predictions in a table.

``capture`` does the whole job in steps: ``plan`` finds out what is missing, ``capture_shard`` and ``copies.copy_rows``
each process one file of the plan, in any process, and commit all of it or nothing.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from softlabel.pipeline.capturing.copies import copy_rows, late_copies, own_order, still_pending
from softlabel.pipeline.capturing.plan import CapturePlan, identify, plan
from softlabel.pipeline.capturing.plan_files import require_planned
from softlabel.pipeline.capturing.worker_pool import Workers, split_shards
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.devices import worker_devices
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.progress import CombinedProgress, Progress, Watch, unwatched
from softlabel.pipeline.selection.select import NotADistributionError, select, selection_of
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.teachers.classifier_teacher import LabelTeacher
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import SoftLabels
from softlabel.storage.errors import ProvenanceError, TeacherError
from softlabel.storage.identity import Identity, circumstances
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter, require_writable

VOCABULARY_SAMPLE = 65_536
"""Positions whose ids a new table's numbering of ids is based on."""

Labelled = tuple[pa.Table, SoftLabels]
ShardStep = Callable[[CaptureConfig, Path, Watch], Commit]
P = ParamSpec("P")
R = TypeVar("R")


class StepDecorator(Protocol):
    """A decorator for the steps of a capture, for example one that runs them as tasks of a scheduler."""

    def __call__(self, step: Callable[P, R], /) -> Callable[P, R]:
        """The function to call instead of the step."""
        ...


def undecorated(step: Callable[P, R], /) -> Callable[P, R]:
    """The decorator that changes nothing."""
    return step


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did."""

    table: str
    version: int
    """Newest version of the table at the end."""
    documents: int
    unchanged: int
    """Documents that the table already held completely."""
    taken_down: int
    """Documents left out because they are on the table's refuse list."""
    rejects: int
    """Documents that can't be used ..."""
    rejects_file: str | None
    """... and the file with the reasons."""
    truncated: int
    """Documents that were truncated to the longest sequence that a classifier reads."""
    sequences: int
    """Sequences that the teacher was run over."""
    copied: int
    """Sequences that another document has too, copied from there."""
    positions: int
    """Captured positions of the teacher's sequences."""
    bytes: int
    """Size of the new shards."""
    seconds: float


def capture(config: CaptureConfig, watch: Watch = unwatched, decorate: StepDecorator = undecorated) -> CaptureReport:
    """Bring a table up to date with documents: capture what is missing, and leave everything else as it is.

    A second run captures nothing. A run that was killed continues when run again; at most one shard is done twice.

    Args:
        config: settings of the capture.
        watch: called after each batch.
        decorate: applied to ``plan``, ``capture_shard`` and ``copy_rows``, so that a scheduler can run them as tasks.

    Raises:
        SoftlabelError: if documents, teacher or table can't be used; shards that are already committed stay.
    """
    started = time.monotonic()
    devices = worker_devices(config.teacher)
    with scratch() as folder:
        todo = decorate(plan)(config, folder, watch)
        if todo.shards:
            require_writable(config.table)
        else:
            watch(Progress("capture", 0, 0, "positions"))

        def run_step(worker: str, step: ShardStep, path: Path, stage: CombinedProgress) -> Commit:
            with stage.piece(worker) as watch_piece:
                return decorate(step)(config, path, watch_piece)

        capturing = CombinedProgress(Progress("capture", 0, todo.positions, "positions"), watch)
        shards = own_order(split_shards(todo.shards, len(devices)), config.table)
        if min(len(devices), len(shards)) > 1:
            with Workers(devices[: len(shards)], folder) as workers:
                commits = workers.each(shards, lambda w, path: run_step(w.name, w.capture_shard, path, capturing))
        else:
            commits = [run_step("", capture_shard, path, capturing) for path in shards]
        to_copy = [*todo.copies, *filter(Path.exists, map(late_copies, shards))]
        sequences = sum(pq.read_metadata(path).num_rows for path in to_copy)
        copying = CombinedProgress(Progress("copy", 0, sequences, "sequences"), watch)
        copies = [run_step("", copy_rows, path, copying) for path in to_copy]
    return _summarize(config, todo, commits, copies, time.monotonic() - started)


def capture_shard(config: CaptureConfig, path: Path, watch: Watch = unwatched) -> Commit:
    """Run the teacher over the sequences of one file of a plan that the table lacks, and commit the soft labels.

    The table is created if it does not exist. The teacher stays loaded for the next shard of this process. Sequences
    that another run has meanwhile committed under other documents are left for ``copy_rows``, in the file
    ``pipeline.capturing.copies.late_copies(path)``.

    Args:
        config: settings of the capture.
        path: Parquet file of sequences, from ``CapturePlan.shards``.
        watch: called after each batch, in positions of this shard; those committed by another run count as done.

    Raises:
        ProvenanceError: if the teacher or the table is no longer the one that was planned for.
        TeacherError: if the teacher's logits are not a distribution; names the document.
        TableError: if the table can't be written.
    """
    sequences, total = still_pending(config, path), _positions(pq.read_table(path, columns=["positions"]))
    done = total - _positions(sequences)
    if done:
        watch(Progress("capture", done, total, "positions"))
    if not len(sequences):
        return Commit(Table.open(config.table).version, 0, 0, 0)
    teacher = load_teacher(config.teacher)
    tokenizer = DocumentTokenizer(teacher.checkpoint, config.sequences, config.columns.content)
    identity = identify(config, teacher.checkpoint, tokenizer)
    try:
        require_planned(sequences, identity, teacher.checkpoint.folder)
    except ProvenanceError:
        load_teacher.cache_clear()  # this process may have loaded the teacher before its files changed
        raise
    details: dict[str, float] = {}
    batches = _watched(_labelled(config, teacher, identity, sequences), done, total, watch, details)
    if not Table.exists(config.table):
        first = list(_at_least(batches, VOCABULARY_SAMPLE))
        sample = SoftLabels.concatenate([labels for _, labels in first])
        carried = pa.schema([field for field in sequences.schema if field.name not in SEQUENCE.names])
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # deleted with the plan in any case
            tokenizer.save(Path(folder))
            Table.create(config.table, identity, carried, sample, Path(folder))
        batches = chain(first, batches)
    table = Table.open(config.table)
    table.identity.require(identity, config.table)  # another capture may have created it meanwhile
    # Encoding and writing overlap with the teacher's next batch; both release the interpreter's lock.
    with ShardWriter(table, config.shards.row_group_sequences) as writer, ThreadPoolExecutor(1) as io:
        written: Future[None] = io.submit(lambda: None)
        for rows, labels in batches:
            written.result()
            if (size := writer.bytes_a_position) is not None:
                details["bytes per position"] = size
            written = io.submit(writer.append, rows, labels)
        written.result()
        return writer.commit({"operation": "capture", **_history_entry(config, teacher)})


def _positions(sequences: pa.Table) -> int:
    return pc.sum(sequences.column("positions")).as_py() or 0


def _summarize(
    config: CaptureConfig, todo: CapturePlan, commits: Sequence[Commit], copies: Sequence[Commit], seconds: float
) -> CaptureReport:
    """The report on a plan and the commits that carried it out."""
    return CaptureReport(
        table=config.table,
        version=Table.open(config.table).version,
        documents=todo.documents,
        unchanged=todo.unchanged,
        taken_down=todo.taken_down,
        rejects=todo.rejects,
        rejects_file=todo.rejects_file,
        truncated=todo.truncated,
        sequences=sum(commit.sequences for commit in commits),
        copied=sum(commit.sequences for commit in copies),
        positions=sum(commit.positions for commit in commits),
        bytes=sum(commit.bytes for commit in (*commits, *copies)),
        seconds=seconds,
    )


def _labelled(
    config: CaptureConfig, teacher: Teacher | LabelTeacher, identity: Identity, sequences: pa.Table
) -> Iterator[Labelled]:
    """The sequences with their soft labels, batch by batch."""
    if isinstance(teacher, LabelTeacher):
        yield from teacher.answers(sequences)
        return
    selection = selection_of(config.selection, identity.classes)
    queries = Queries(sequences, identity.classes)

    def select_batch(batch: NDArray[np.int64], chunks: Iterator[torch.Tensor]) -> Labelled:
        rows = sequences.take(pa.array(batch))
        next_ids, seeds = queries.next_ids(batch), queries.seeds(batch, selection, identity.teacher)
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

    yield from each_batch(teacher, queries.tokens, queries.positions, select_batch, config.teacher.batch_tokens)


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


def _history_entry(config: CaptureConfig, teacher: Teacher | LabelTeacher) -> dict[str, object]:
    """What the table's history records about a capture."""
    folder = Path(config.teacher.model)
    return {
        "teacher": str(folder.absolute()) if folder.is_dir() else config.teacher.model,
        "revision": teacher.checkpoint.revision,
        "parameters": teacher.parameters,
        "config": config.model_dump(mode="json"),
        "circumstances": circumstances(device=str(teacher.device), attention=config.teacher.attn_implementation),
    }
