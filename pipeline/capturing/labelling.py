"""Soft labels for sequences: from a teacher that is run, or from the documents' own labels in its place."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.selection.select import NotADistributionError, select
from softlabel.pipeline.sequences.whole_documents import class_ids
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import each_batch
from softlabel.storage.errors import TeacherError
from softlabel.storage.labels import SoftLabels

_SLICE = 4096
"""Rows that get their own labels at a time."""

Labelled = tuple[pa.Table, SoftLabels]


class Labeller(Protocol):
    """Where the soft labels of a capture come from."""

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters; None without a model, or if it is not known."""

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""

    def label(self, sequences: pa.Table) -> Iterator[Labelled]:
        """All of the sequences with their soft labels, some at a time, in any order.

        Args:
            sequences: rows of ``storage.schema.SEQUENCE`` and the carried columns.

        Raises:
            TeacherError: if the logits of some are not a distribution; names the documents.
        """


class TeacherLabeller:
    """What a teacher says, reduced to the job's selection. The teacher stays loaded for the next job of this process.

    Raises:
        TeacherError: if it can't be loaded.
    """

    def __init__(self, job: CaptureJob) -> None:
        self._job, self._teacher = job, load_teacher(job.settings.teacher, job.checkpoint)
        self.parameters, self.device = self._teacher.parameters, self._teacher.device

    def label(self, sequences: pa.Table) -> Iterator[Labelled]:
        """See ``Labeller.label``."""
        job, teacher, queries = self._job, self._teacher, Queries(sequences, self._job.kind)

        def select_batch(batch: NDArray[np.int64], chunks: Iterator[torch.Tensor]) -> Labelled:
            rows = sequences.take(pa.array(batch))
            next_ids, seeds = queries.next_ids(batch), queries.seeds(batch, job.selection, job.identity.teacher)
            parts: list[SoftLabels] = []
            start = 0
            for logits in chunks:
                part = slice(start, start + len(logits))
                try:
                    parts.append(select(logits, next_ids[part], seeds[part], job.selection, teacher.vocabulary))
                except NotADistributionError as error:
                    raise _not_a_distribution(rows, [start + row for row in error.rows]) from None
                start += len(logits)
            return rows, SoftLabels.concatenate(parts)

        yield from each_batch(
            teacher, queries.tokens, queries.positions, select_batch, job.settings.teacher.batch_tokens
        )


class OwnLabeller:
    """The documents' own labels, each with probability 1."""

    parameters = None
    device = torch.device("cpu")

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes

    def label(self, sequences: pa.Table) -> Iterator[Labelled]:
        """See ``Labeller.label``."""
        for start in range(0, len(sequences), _SLICE):
            rows = sequences.slice(start, _SLICE)
            yield rows, _certain(class_ids(rows.column("label").to_pylist(), self._classes).astype(np.int32))


def labeller_of(job: CaptureJob) -> Labeller:
    """Where the soft labels of this capture come from."""
    return OwnLabeller(job.checkpoint.labels) if job.checkpoint.labels else TeacherLabeller(job)


def _certain(ids: NDArray[np.int32]) -> SoftLabels:
    """Soft labels with all mass on one id each."""
    nothing, zeros, ones = np.zeros(0, np.int32), np.zeros(len(ids), np.float32), np.ones(len(ids), np.int32)
    return SoftLabels(
        head_counts=ones,
        head_ids=ids,
        head_logprobs=zeros,
        tail_counts=ones - 1,
        tail_ids=nothing,
        tail_draws=nothing,
        tail_logprobs=zeros[:0],
        tail_log_masses=np.full((1, len(ids)), -np.inf, np.float32),
        entropies=zeros,
        next_logprobs=zeros,
    )


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
