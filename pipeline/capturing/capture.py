"""Capture: run a teacher once over documents, and keep what it knows in a table.

``capture`` is the whole job. Its parts are ``capture_shard`` and ``copies.copy_rows``: each commits all that its file
of the plan asks for, or nothing, in whatever process it runs. ``plan`` finds out what there is to do.
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
from softlabel.pipeline.capturing.plan import Plan, identify, plan
from softlabel.pipeline.capturing.plan_files import require_planned
from softlabel.pipeline.capturing.workers import Workers, cut
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.devices import places
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.progress import Progress, Together, Watch, unwatched
from softlabel.pipeline.selection.select import NotADistributionError, select, selection_of
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.teachers.classifier import LabelTeacher
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Questions
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import SoftLabels
from softlabel.storage.errors import ProvenanceError, TeacherError
from softlabel.storage.identity import Identity, circumstances
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter, require_writable

VOCABULARY_SAMPLE = 65_536
"""Positions whose ids decide how a new table numbers its ids."""

Labelled = tuple[pa.Table, SoftLabels]
ShardStep = Callable[[CaptureConfig, Path, Watch], Commit]
P = ParamSpec("P")
R = TypeVar("R")


class Wrap(Protocol):
    """Something that runs the steps of a capture in its own way."""

    def __call__(self, step: Callable[P, R], /) -> Callable[P, R]:
        """What to call instead of the step."""
        ...


def as_it_is(step: Callable[P, R], /) -> Callable[P, R]:
    """A step by itself."""
    return step


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did."""

    table: str
    version: int
    """The table's newest at the end."""
    documents: int
    unchanged: int
    """Documents that the table held whole before."""
    taken_down: int
    """Documents that are left out: the table's refuse list has them."""
    rejects: int
    """Documents that can't be used ..."""
    rejects_file: str | None
    """... and where their reasons are."""
    truncated: int
    """Documents that were cut short to what a classifier reads."""
    sequences: int
    """Sequences that the teacher was run over."""
    copied: int
    """Sequences that another document has too, copied from there."""
    positions: int
    """Captured positions of the teacher's sequences."""
    bytes: int
    """Of the new shards."""
    seconds: float


def capture(config: CaptureConfig, watch: Watch = unwatched, by: Wrap = as_it_is) -> CaptureReport:
    """Bring a table up to date with documents: what it lacks is captured, all else stays as it is.

    Run again, it captures nothing; killed and run again, it goes on where it was, with at most one shard done twice.

    Args:
        config: of the capture.
        watch: told of each batch.
        by: wraps ``plan``, ``capture_shard`` and ``copy_rows``, so that a scheduler can make tasks of them.

    Raises:
        SoftlabelError: if documents, teacher or table can't be used; what was committed before stays.
    """
    started = time.monotonic()
    devices = places(config.teacher)
    with scratch() as folder:
        todo = by(plan)(config, folder, watch)
        if todo.shards:
            require_writable(config.table)
        else:
            watch(Progress("capture", 0, 0, "positions"))

        def done_by(name: str, step: ShardStep, path: Path, stage: Together) -> Commit:
            with stage.piece(name) as piece:
                return by(step)(config, path, piece)

        asking = Together(Progress("capture", 0, todo.positions, "positions"), watch)
        shards = own_order(cut(todo.shards, len(devices)), config.table)
        if min(len(devices), len(shards)) > 1:
            with Workers(devices[: len(shards)], folder) as workers:
                commits = workers.each(shards, lambda w, path: done_by(w.name, w.capture_shard, path, asking))
        else:
            commits = [done_by("", capture_shard, path, asking) for path in shards]
        to_copy = [*todo.copies, *filter(Path.exists, map(late_copies, shards))]
        sequences = sum(pq.read_metadata(path).num_rows for path in to_copy)
        copying = Together(Progress("copy", 0, sequences, "sequences"), watch)
        copies = [done_by("", copy_rows, path, copying) for path in to_copy]
    return _summarise(config, todo, commits, copies, time.monotonic() - started)


def capture_shard(config: CaptureConfig, path: Path, watch: Watch = unwatched) -> Commit:
    """Run the teacher over what the table lacks of one file of a plan, and commit what it says.

    The table is made if it is not there. The teacher stays loaded for the next shard of this process. What another run
    has committed under other documents is left for ``copy_rows``, in ``pipeline.capturing.copies.late_copies(path)``.

    Args:
        config: of the capture.
        path: Parquet file of sequences, from ``Plan.shards``.
        watch: told of each batch, in positions of this shard; those that another run has committed are done, too.

    Raises:
        ProvenanceError: if the teacher or the table is not the one of the plan any more.
        TeacherError: if the teacher says what no distribution is, naming the document.
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
        load_teacher.cache_clear()  # this process may have loaded it before its files changed
        raise
    details: dict[str, float] = {}
    batches = _told(_labelled(config, teacher, identity, sequences), done, total, watch, details)
    if not Table.exists(config.table):
        first = list(_at_least(batches, VOCABULARY_SAMPLE))
        sample = SoftLabels.concatenate([labels for _, labels in first])
        carried = pa.schema([field for field in sequences.schema if field.name not in SEQUENCE.names])
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # with the plan it goes, whatever happens
            tokenizer.save(Path(folder))
            Table.create(config.table, identity, carried, sample, Path(folder))
        batches = chain(first, batches)
    table = Table.open(config.table)
    table.identity.require(identity, config.table)  # another capture may have made it meanwhile
    # Encoding and writing overlap with the teacher's next batch; both let go of the interpreter's lock.
    with ShardWriter(table, config.shards.row_group_sequences) as writer, ThreadPoolExecutor(1) as io:
        written: Future[None] = io.submit(lambda: None)
        for rows, labels in batches:
            written.result()
            if (size := writer.bytes_a_position) is not None:
                details["bytes a position"] = size
            written = io.submit(writer.append, rows, labels)
        written.result()
        return writer.commit({"operation": "capture", **_about(config, teacher)})


def _positions(sequences: pa.Table) -> int:
    return pc.sum(sequences.column("positions")).as_py() or 0


def _summarise(
    config: CaptureConfig, todo: Plan, commits: Sequence[Commit], copies: Sequence[Commit], seconds: float
) -> CaptureReport:
    """What a plan and the commits that carried it out come to."""
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
    """The sequences, a batch at a time, with what the teacher says of them."""
    if isinstance(teacher, LabelTeacher):
        yield from teacher.answers(sequences)
        return
    selection = selection_of(config.selection, identity.classes)
    asked = Questions(sequences, identity.classes)

    def select_batch(batch: NDArray[np.int64], chunks: Iterator[torch.Tensor]) -> Labelled:
        rows = sequences.take(pa.array(batch))
        next_ids, seeds = asked.next_ids(batch), asked.seeds(batch, selection, identity.teacher)
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

    yield from each_batch(teacher, asked.tokens, asked.positions, select_batch, config.teacher.batch_tokens)


def _told(
    batches: Iterator[Labelled], before: int, total: int, watch: Watch, details: Mapping[str, float]
) -> Iterator[Labelled]:
    """The same batches; the watch is told of each, with these details, beside the positions that were done before."""
    done, mass = 0, 0.0
    for rows, labels in batches:
        done += labels.positions
        mass -= float(np.expm1(labels.tail_log_masses[0]).sum())
        watch(Progress("capture", before + done, total, "positions", {"kept mass": mass / done, **details}))
        yield rows, labels


def _at_least(batches: Iterator[Labelled], positions: int) -> Iterator[Labelled]:
    """The first batches, until they have so many positions."""
    held = 0
    for rows, labels in batches:
        yield rows, labels
        held += labels.positions
        if held >= positions:
            return


def _not_a_distribution(rows: pa.Table, positions: Sequence[int]) -> TeacherError:
    """The error for logits that are not a distribution, with the ids of the documents."""
    ends = np.cumsum(rows.column("positions").to_numpy())
    names = rows.column("document_id").take(pa.array(np.unique(np.searchsorted(ends, positions, side="right"))))
    return TeacherError(
        "the teacher's logits are not a probability distribution; this shard was not stored",
        expected="finite logits (-inf for an id of probability 0)",
        found=f"NaN, +inf, or only -inf, at {len(positions)} positions",
        where=f"document {', '.join(names.to_pylist()[:5])}",
        do="use teacher.dtype bfloat16 or float32, or leave the document out",
    )


def _about(config: CaptureConfig, teacher: Teacher | LabelTeacher) -> dict[str, object]:
    """What the table's history says of a capture."""
    folder = Path(config.teacher.model)
    return {
        "teacher": str(folder.absolute()) if folder.is_dir() else config.teacher.model,
        "revision": teacher.checkpoint.revision,
        "parameters": teacher.parameters,
        "config": config.model_dump(mode="json"),
        "circumstances": circumstances(device=str(teacher.device), attention=config.teacher.attn_implementation),
    }
