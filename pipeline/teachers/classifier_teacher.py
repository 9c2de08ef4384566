"""Teachers that give distributions over classes: a sequence classifier, or the documents' own labels in its place.

The sequences are made by ``sequences.whole_documents``.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.padding import padded, padding_id
from softlabel.pipeline.sequences.whole_documents import class_ids
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.codec import SoftLabels

_SLICE = 4096
"""Rows labelled at a time."""


class ClassifierTeacher(TransformersTeacher):
    """A sequence classifier run by transformers. Its logits are over classes, one row per sequence."""

    @torch.inference_mode()
    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``Teacher.logits``; each sequence has one position, whose logits depend on the whole sequence."""
        inputs = padded(sequences, padding_id(self._model, self.checkpoint.tokenizer))
        yield self._model(**{name: values.to(self.device) for name, values in inputs.items()}).logits


class LabelTeacher:
    """A teacher that gives each document's own label probability 1."""

    parameters = None
    device = torch.device("cpu")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.classes = checkpoint.labels
        self.vocabulary = len(self.classes)

    def answers(self, sequences: pa.Table) -> Iterator[tuple[pa.Table, SoftLabels]]:
        """The sequences, some at a time, each with soft labels that have all mass on its own label."""
        for start in range(0, len(sequences), _SLICE):
            rows = sequences.slice(start, _SLICE)
            yield rows, _certain(class_ids(rows.column("label").to_pylist(), self.classes).astype(np.int32))


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
