"""Estimate: what a capture would give, cost and take, from a small sample, before anyone pays for it.

The teacher is run over a few of the batches that the capture would make, and what it says is encoded and written as
the capture would, by several selections, into a folder that is then deleted. Nothing is added to any table.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.capturing.plan import identify, whole_documents
from softlabel.pipeline.config.capture import CaptureConfig, SelectionConfig
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS, EstimateConfig, Gpu
from softlabel.pipeline.devices import places
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.estimation.measure import Layout, Run, Written, bytes_of_copies, run
from softlabel.pipeline.estimation.sample import Sample, Sequencer, draw_sample
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.selection.fidelity import Doubles, bucket_kl, kept_mass, squared_error
from softlabel.pipeline.selection.select import Selection, selection_of
from softlabel.pipeline.sequences.chunking import to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.teachers.classifier import LabelTeacher
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Questions
from softlabel.pipeline.teachers.teacher import Teacher
from softlabel.storage.codec import SoftLabels
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.schema import SOFT_LABELS

ALTERNATIVES = {
    "default": SelectionConfig(),
    "top-16": SelectionConfig(top_k=16),
    "top-64": SelectionConfig(top_k=64),
    "50 draws": SelectionConfig(min_k=0, max_k=0, draws=50),
}
"""Selections that are shown beside the one asked for; draws alone are RS-KD's (arXiv 2503.16870)."""


@dataclass(frozen=True)
class SelectionEstimate:
    """What one selection would cost and keep, on average over the positions."""

    name: str
    ids_per_position: float
    bytes_per_position: float
    """Of all soft-label columns."""
    bytes: int
    """Of the whole table."""
    kept_mass: float
    """Probability that is kept exactly: of the head."""
    lost: float
    """KL in nats from the teacher's distribution to what is kept of it on average: 0 with a sampled tail, which is
    unbiased; without one, the mass outside the head is thought to be spread evenly over all other ids."""
    noise: float
    """Root of the mean squared distance between a position's target and that average: 0 where nothing is drawn."""


@dataclass(frozen=True)
class Seconds:
    """How long a capture would take here, on all devices that it takes, by what takes it."""

    plan: float
    """Reading and tokenizing."""
    load: float = 0.0
    """Of the teacher's files."""
    teacher: float = 0.0
    """Running it, the selection included."""
    copy: float = 0.0
    """Copying soft labels to further documents."""


@dataclass(frozen=True)
class Estimate:
    """What a capture would give, cost and take; all zero if there is nothing to capture."""

    documents: int
    pending: int
    """Documents that the table does not hold whole."""
    rejects: int
    """Documents that can't be used; the tokenizer or the chat template may refuse more."""
    tokenized: float
    """Share of the pending text that this rests on.

    Documents that repeat another are found among all. Parts that documents have in common are seen within this share
    alone: if there are such, and it is below 1, ``sequences``, ``tokens`` and ``positions`` are upper bounds, and so
    are the teacher's time and operations; ``copied`` is a lower one. ``bytes`` hold: a copied sequence takes as many.
    """
    seconds: Seconds
    gpu: Gpu
    gpu_utilization: float
    gpu_hours: float = 0.0
    """By arithmetic: the operations over that share of the device's dense bf16 rate. Nothing was run there."""
    flops: float = 0.0
    """Floating-point operations of the forward passes, as torch counts them."""
    device: str = ""
    sampled_positions: int = 0
    """Positions that the teacher was run over for it."""
    sequences: int = 0
    """That the teacher would be run over ..."""
    tokens: int = 0
    """... with so many tokens ..."""
    positions: int = 0
    """... of which so many are captured."""
    copied: int = 0
    """Sequences that another document has too, copied from there."""
    bytes: int = 0
    """Of both. Copies of the same text that come to lie in one row group are compressed together, and take less."""
    selections: tuple[SelectionEstimate, ...] = ()
    """The one that was asked for, then others."""


def estimate(config: EstimateConfig, watch: Watch = unwatched) -> Estimate:
    """Say what a capture with these settings would give, cost and take; nothing is written.

    Args:
        config: of the capture, and how much to look at.
        watch: told of each batch of documents, and of each batch of the teacher.

    Raises:
        SoftlabelError: if documents, teacher or table can't be used; what stops a capture stops this.
    """
    if config.teacher.labels:
        raise UsageError("there is nothing to estimate: teacher.labels runs no model", do="run softlabel capture")
    with scratch() as folder:
        capture = config.capture(config.table or str(folder / "table"))
        documents = Documents(capture.documents, capture.columns)
        started = time.perf_counter()
        checkpoint = Checkpoint.find(capture.teacher)
        tokenizer = DocumentTokenizer(checkpoint, capture.sequences, capture.columns.content)
        identity = identify(capture, checkpoint, tokenizer)
        load = time.perf_counter() - started
        cut = _sequencer(capture, checkpoint, tokenizer)
        sample = draw_sample(capture, documents, cut, identity, config.sample.megabytes * 1e6, watch)
        found = Estimate(
            documents=sample.documents,
            pending=sample.pending,
            rejects=sample.rejects,
            tokenized=sample.share,
            seconds=Seconds(sample.seconds),
            gpu=config.gpu,
            gpu_utilization=config.gpu_utilization,
        )
        if not len(sample.sequences.rows):
            return replace(found, copied=sample.copies.total(), bytes=bytes_of_copies(sample, capture))
        started = time.perf_counter()
        teacher = load_teacher(capture.teacher)
        assert not isinstance(teacher, LabelTeacher)
        load += time.perf_counter() - started
        selections = _selections(capture.selection, identity)
        layout = Layout(sample.sequences.tokens, sample.sequences.weights, capture.teacher.batch_tokens)
        tried = layout.spread(config.sample.batches)
        runs = list(_runs(teacher, identity, sample, [layout.batches[i] for i in tried], selections, capture, watch))
        flops = layout.over_all(tried, [run.flops for run in runs])
        rows = sample.sequences.rows.take(pa.array(np.concatenate([layout.batches[i] for i in tried])))
        same = np.concatenate([run.collisions for run in runs])
        estimates, copying = [], 0.0
        for i, (name, selection) in enumerate(selections.items()):
            labels = SoftLabels.concatenate([run.labels[i] for run in runs])
            written = Written.of(folder / f"trial-{i}", capture, identity, rows, labels)
            size = written.over_all(sample, capture)
            estimates.append(_selection_estimate(name, selection, labels, same, teacher.vocabulary, written, size))
            if not i:
                copying = written.seconds_of_copies(sample)
    on = list(dict.fromkeys(places(capture.teacher)))  # on one device, workers share what it can do
    seconds = layout.over_all(tried, [run.seconds for run in runs]) / len(on)
    return replace(
        found,
        seconds=Seconds(sample.seconds, load, seconds, copying),
        gpu_hours=flops / (BF16_TERAFLOPS[config.gpu] * 1e12 * config.gpu_utilization) / 3600,
        flops=flops,
        device=" ".join(on),
        sampled_positions=len(same),
        sequences=sample.sequences.total(),
        tokens=sample.sequences.total("tokens"),
        positions=sample.sequences.total("positions"),
        copied=sample.copies.total(),
        bytes=estimates[0].bytes,
        selections=tuple(estimates),
    )


def _sequencer(capture: CaptureConfig, checkpoint: Checkpoint, tokenizer: DocumentTokenizer) -> Sequencer:
    """What makes sequences of documents, as the plan of this capture would."""
    if checkpoint.classes is None:
        return lambda documents: to_sequences(documents, tokenizer, capture.sequences, eval_fraction=0)[0]
    whole = whole_documents(capture, checkpoint)
    return lambda documents: whole.sequences(documents, eval_fraction=0)[0]


def _selections(asked_for: SelectionConfig, identity: Identity) -> dict[str, Selection]:
    """The selection that was asked for, then the alternatives, at the same temperatures; of classes, all are kept."""
    first = selection_of(asked_for, identity.classes)
    if identity.classes is not None:
        return {"all classes": first}
    like = {"temperatures": asked_for.temperatures, "seed": asked_for.seed}
    others = {name: Selection.of(other.model_copy(update=like)) for name, other in ALTERNATIVES.items()}
    name = next((name for name, other in others.items() if other == first), "as asked for")
    return {name: first} | others


def _runs(
    teacher: Teacher,
    identity: Identity,
    sample: Sample,
    batches: Sequence[NDArray[np.int64]],
    selections: Mapping[str, Selection],
    capture: CaptureConfig,
    watch: Watch,
) -> Iterator[Run]:
    """Each batch in turn."""
    asked, done = Questions(sample.sequences.rows, identity.classes), 0
    tokens = sample.sequences.tokens
    total = int(sum(tokens[batch].sum() for batch in batches))
    watch(Progress("estimate", done, total, "tokens"))
    for batch in batches:
        yield run(teacher, identity.teacher, asked, batch, list(selections.values()), capture.teacher.batch_tokens)
        done += int(tokens[batch].sum())
        watch(Progress("estimate", done, total, "tokens"))


def _selection_estimate(
    name: str,
    selection: Selection,
    labels: SoftLabels,
    collisions: Doubles,
    vocabulary: int,
    written: Written,
    size: int,
) -> SelectionEstimate:
    soft = sum(written.columns[column] for column in SOFT_LABELS.names)
    drawn = selection.draws > 0
    return SelectionEstimate(
        name=name,
        ids_per_position=(len(labels.head_ids) + len(labels.tail_ids)) / labels.positions,
        bytes_per_position=soft / labels.positions,
        bytes=size,
        kept_mass=float(kept_mass(labels).mean()),
        lost=0.0 if drawn else float(bucket_kl(labels, vocabulary).mean()),
        noise=float(squared_error(labels, collisions, selection.draws).mean() ** 0.5) if drawn else 0.0,
    )
