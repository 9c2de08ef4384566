"""Estimate: the size, time and cost of a capture, from a small sample, before anyone pays for it.

The teacher runs over a few of the batches that the capture would make. Its soft labels are encoded and written as the
capture would, by several selections, into a folder that is then deleted. Nothing is added to any table.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.capturing.sequencer import Sequencer
from softlabel.pipeline.cards import holding
from softlabel.pipeline.config.capture import SelectionConfig, TeacherConfig
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS, EstimateConfig, Gpu
from softlabel.pipeline.devices import occupied, worker_devices
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.estimation.measure import (
    Batches,
    SampleTable,
    TimedBatch,
    bytes_of_copies,
    numbering_seconds,
    time_batch,
)
from softlabel.pipeline.estimation.sample import Sample, draw_sample
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.selection.fidelity import Doubles, bucket_kl, kept_mass, squared_error
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher
from softlabel.storage.errors import UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table

ALTERNATIVES = {
    "default": SelectionConfig(),
    "top-16": SelectionConfig(top_k=16),
    "top-64": SelectionConfig(top_k=64),
    "50 draws": SelectionConfig(min_k=0, max_k=0, draws=50),
}
"""Selections that are shown next to the requested one; "50 draws" is that of RS-KD (arXiv 2503.16870)."""


PREVIEWS = 3
"""Sequences that are shown as the teacher will read them."""


@dataclass(frozen=True)
class SelectionEstimate:
    """What one selection would cost and preserve, on average over the positions."""

    name: str
    ids_per_position: float
    bytes_per_position: float
    """Bytes of all soft-label columns."""
    bytes: int
    """Bytes of all new rows."""
    kept_mass: float
    """Probability of the head, which is stored exactly."""
    lost: float
    """KL divergence in nats from the teacher's distribution to the mean of what is stored. It is 0 with a sampled
    tail, which is unbiased; without one, the mass outside the head counts as spread evenly over all other ids."""
    noise: float
    """Root of the mean squared distance between a position's sampled target and its mean; 0 without samples."""


@dataclass(frozen=True)
class Seconds:
    """How long each part of a capture would take on this machine, with all devices that it would use."""

    plan: float
    """Reading and tokenizing."""
    load: float = 0.0
    """Loading the teacher."""
    teacher: float = 0.0
    """Running the teacher, selection included."""
    copy: float = 0.0
    """Copying soft labels to further documents."""
    numbering: float = 0.0
    """Numbering the ids of a new table by how often they occur."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a sequence."""

    text: str
    captured: bool


@dataclass(frozen=True)
class Preview:
    """A sequence as the teacher will read it."""

    document_id: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Estimate:
    """Size, time and cost of a capture; all zero if there is nothing to capture."""

    documents: int
    pending: int
    """Documents that the table does not hold completely."""
    rejects: int
    """Documents that can't be used; the tokenizer or the chat template may refuse more."""
    tokenized: float
    """Share of the pending text that the estimate is based on.

    Documents that repeat another are found among all documents, but repeated parts of documents only within this
    share. So if it is below 1 and documents share parts, ``sequences``, ``tokens``, ``positions`` and the teacher's
    time and operations are upper bounds, and ``copied`` is a lower bound. ``bytes`` is right in any case, because a
    copied sequence takes as many bytes.
    """
    seconds: Seconds
    gpu: Gpu
    gpu_utilization: float
    gpu_hours: float = 0.0
    """Calculated: operations divided by ``gpu_utilization`` times the GPU's dense bf16 rate. Nothing ran there."""
    flops: float = 0.0
    """Floating-point operations of the forward passes, as torch counts them."""
    device: str = ""
    sampled_positions: int = 0
    """Positions that the teacher was run over for this estimate."""
    sequences: int = 0
    """Sequences that the teacher would be run over."""
    tokens: int = 0
    """Tokens of these sequences."""
    positions: int = 0
    """Captured positions of these sequences."""
    reread: int = 0
    """Documents of the table that would be read again, because an older version of this program has captured them."""
    replacing: int = 0
    """Sequences, among these and the copied ones, that would replace wrong ones of documents that are read again."""
    copied: int = 0
    """Sequences that another document has too, copied from there."""
    bytes: int = 0
    """Bytes of all new rows. Copies of the same text in one row group are compressed together, and take less."""
    answers: int = 0
    """Answers of the assistant in the chats that were tokenized, ..."""
    partial_answers: int = 0
    """... and how many of them the chat template does not write whole: it leaves out a thought, a tool call, or content
    beside a tool call."""
    previews: tuple[Preview, ...] = ()
    """A few of the sequences; which of their tokens would be captured."""
    selections: tuple[SelectionEstimate, ...] = ()
    """The requested selection first, then the alternatives."""


def estimate(config: EstimateConfig, watch: Watch = unwatched) -> Estimate:
    """Estimate the size, time and cost of a capture with these settings. Nothing is written.

    Args:
        config: settings of the capture, and the size of the sample.
        watch: called after each batch of documents, and after each batch of the teacher.

    Raises:
        SoftlabelError: if documents, teacher or table can't be used, as in a capture.
    """
    _require_model(config.teacher)
    with scratch() as folder, ExitStack() as cards:
        started = time.perf_counter()
        job = resolve(config.capture(config.table or str(folder / "table")))
        _require_model(job.settings.teacher)
        capture, sequencer = job.settings, Sequencer(job)
        if Table.exists(job.table):
            job.kind.require_trained_positions(job.checkpoint, capture.sequences, is_new=False)
        load = time.perf_counter() - started
        documents = Documents(capture.documents, capture.columns)
        sample = draw_sample(job, documents, sequencer, config.sample.megabytes * 1e6, watch)
        found = Estimate(
            documents=sample.documents,
            pending=sample.pending,
            reread=sample.reread,
            replacing=sample.replacing,
            rejects=sample.rejects,
            tokenized=sample.share,
            seconds=Seconds(sample.seconds),
            gpu=config.gpu,
            gpu_utilization=config.gpu_utilization,
            answers=sequencer.answers,
            partial_answers=sequencer.partial_answers,
            previews=_previews(sample.sequences.rows, sequencer),
        )
        if not len(sample.sequences.rows):
            return replace(found, copied=sample.copies.total(), bytes=bytes_of_copies(sample, job.table))
        cards.enter_context(holding(occupied(capture.teacher)))
        started = time.perf_counter()
        teacher = load_teacher(capture.teacher, job.checkpoint)
        load += time.perf_counter() - started
        selections = job.kind.compared(job.selection, ALTERNATIVES)
        batches = Batches(sample.sequences.tokens, sample.sequences.weights, capture.teacher.batch_tokens)
        chosen = batches.spread(config.sample.batches)
        groups = [batches.batches[i] for i in chosen]
        timed = list(_time_batches(teacher, job, sample, groups, selections, watch))
        flops = batches.estimated_total(chosen, [batch.flops for batch in timed])
        rows = sample.sequences.rows.take(pa.array(np.concatenate(groups)))
        collisions = np.concatenate([batch.collisions for batch in timed])
        estimates, copy_seconds, seconds_to_number = [], 0.0, 0.0
        for i, (name, selection) in enumerate(selections.items()):
            labels = SoftLabels.concatenate([batch.labels[i] for batch in timed])
            table = SampleTable.write(folder / f"selection-{i}", job, rows, labels)
            size = table.estimated_bytes(sample, capture.shards)
            estimates.append(_selection_estimate(name, selection, labels, collisions, teacher.vocabulary, table, size))
            if not i:
                copy_seconds = table.copy_seconds(sample)
                if not Table.exists(job.table):
                    positions = sample.sequences.total("positions")
                    seconds_to_number = numbering_seconds(labels, positions, job.identity.vocabulary)
    devices = list(dict.fromkeys(worker_devices(capture.teacher)))  # workers on the same device share its speed
    teacher_seconds = batches.estimated_total(chosen, [batch.seconds for batch in timed]) / len(devices)
    return replace(
        found,
        seconds=Seconds(sample.seconds, load, teacher_seconds, copy_seconds, seconds_to_number),
        gpu_hours=flops / (BF16_TERAFLOPS[config.gpu] * 1e12 * config.gpu_utilization) / 3600,
        flops=flops,
        device=" ".join(devices),
        sampled_positions=len(collisions),
        sequences=sample.sequences.total(),
        tokens=sample.sequences.total("tokens"),
        positions=sample.sequences.total("positions"),
        copied=sample.copies.total(),
        bytes=estimates[0].bytes,
        selections=tuple(estimates),
    )


def _previews(rows: pa.Table, sequencer: Sequencer) -> tuple[Preview, ...]:
    """The first sequences of a few documents."""
    first = rows.filter(pc.equal(rows.column("chunk"), 0)).slice(0, PREVIEWS)
    return tuple(
        Preview(row["document_id"], tuple(_segments(row["token_ids"], row["loss_mask"], sequencer)))
        for row in first.select(["document_id", "token_ids", "loss_mask"]).to_pylist()
    )


def _segments(ids: list[int], mask: list[bool], sequencer: Sequencer) -> Iterator[Segment]:
    for captured, tokens in groupby(zip(ids, mask, strict=True), key=itemgetter(1)):
        yield Segment(sequencer.decode([i for i, _ in tokens]), captured)


def _require_model(teacher: TeacherConfig) -> None:
    if teacher.labels:
        raise UsageError("there is nothing to estimate: teacher.labels runs no model", do="run softlabel capture")


def _time_batches(
    teacher: Teacher,
    job: CaptureJob,
    sample: Sample,
    batches: Sequence[NDArray[np.int64]],
    selections: Mapping[str, Selection],
    watch: Watch,
) -> Iterator[TimedBatch]:
    """Time the teacher on each batch in turn."""
    queries, done = Queries(sample.sequences.rows, job.kind), 0
    tokens = sample.sequences.tokens
    total = int(sum(tokens[batch].sum() for batch in batches))
    watch(Progress("estimate", done, total, "tokens"))
    for batch in batches:
        each = list(selections.values())
        yield time_batch(teacher, job.identity.teacher, queries, batch, each, job.settings.teacher.batch_tokens)
        done += int(tokens[batch].sum())
        watch(Progress("estimate", done, total, "tokens"))


def _selection_estimate(
    name: str,
    selection: Selection,
    labels: SoftLabels,
    collisions: Doubles,
    vocabulary: int,
    table: SampleTable,
    size: int,
) -> SelectionEstimate:
    label_bytes = sum(table.columns[column] for column in SOFT_LABELS.names)
    has_tail = selection.draws > 0
    return SelectionEstimate(
        name=name,
        ids_per_position=(len(labels.head_ids) + len(labels.tail_ids)) / labels.positions,
        bytes_per_position=label_bytes / labels.positions,
        bytes=size,
        kept_mass=float(kept_mass(labels).mean()),
        lost=0.0 if has_tail else float(bucket_kl(labels, vocabulary).mean()),
        noise=float(squared_error(labels, collisions, selection.draws).mean() ** 0.5) if has_tail else 0.0,
    )
