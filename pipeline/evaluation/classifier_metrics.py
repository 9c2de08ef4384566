"""Quality of a classifier, compared with the documents' labels and with its teacher.

The metrics are scikit-learn's, each with a standard error over documents. Precision, recall and F1 are derived from the
confusion matrix. Trains nothing and reads no files.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.evaluation.metrics import MeanWithError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softlabel.pipeline.stream.classifier_batches import ClassBatch

_RESAMPLES = 200
"""Bootstrap samples of the confusion matrix that the errors of the averages are computed from."""


@dataclass(frozen=True)
class ClassQuality:
    """One label's metrics; 0 where a label is never predicted, or never correctly."""

    name: str
    precision: float
    recall: float
    f1: float
    documents: int
    """Number of documents with this label."""


@dataclass(frozen=True)
class Quality:
    """A classifier compared with the labels of the documents that have one."""

    documents: int
    accuracy: MeanWithError
    precision: MeanWithError
    """Mean over the labels that occur (macro average), like recall and f1."""
    recall: MeanWithError
    f1: MeanWithError
    cross_entropy: MeanWithError
    """With the label, in nats."""
    by_label: tuple[ClassQuality, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Number of documents by their label (rows) and the classifier's prediction (columns)."""


@dataclass(frozen=True)
class ClassMetrics:
    """A classifier's metrics over documents, at temperature 1."""

    documents: int
    kl: MeanWithError
    """Forward KL from the teacher, nats per document."""
    agreement: MeanWithError
    """Share of documents for which both predict the same label."""
    quality: Quality | None
    """None if no document has a label."""


@torch.no_grad()
def measure_classes(model: "PreTrainedModel", batches: "Iterable[ClassBatch]") -> ClassMetrics:
    """Measure a student on documents; its training mode is restored afterwards."""
    was_training = model.training
    model.eval()
    predicted, labels, teacher = [], [], []
    try:
        for batch in batches:
            logits = model(**batch.to(model.device).inputs).logits[: len(batch.labels)]
            predicted.append(logits.float().log_softmax(1).cpu().numpy())
            labels.append(batch.labels.numpy())
            teacher.append(batch.logprobs.numpy())
    finally:
        model.train(was_training)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    return compare(np.concatenate(predicted), np.concatenate(labels), np.concatenate(teacher), names)


def compare(
    logprobs: NDArray[np.float32], labels: NDArray[np.int64], teacher: NDArray[np.float32], names: list[str]
) -> ClassMetrics:
    """Metrics of predictions for N documents.

    Args:
        logprobs: (N, labels) nats.
        labels: (N,) ids; -1 where there is none.
        teacher: (N, labels) nats; NaN where the teacher has no distribution over these labels.
        names: name of each label.
    """
    has_teacher = ~np.isnan(teacher).any(1)
    predicted, expected = logprobs[has_teacher].astype(np.float64), teacher[has_teacher].astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(expected), 0.0, np.exp(expected) * (expected - predicted))
    known = labels >= 0
    return ClassMetrics(
        documents=len(labels),
        kl=mean(terms.sum(1)),
        agreement=mean(predicted.argmax(1) == expected.argmax(1)),
        quality=_quality(logprobs[known], labels[known], names) if known.any() else None,
    )


def _quality(logprobs: NDArray[np.float32], labels: NDArray[np.int64], names: list[str]) -> Quality:
    predicted = logprobs.argmax(1)
    confusion = np.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    scores, documents = _scores(confusion), confusion.sum(1)
    means, errors = scores[:, documents > 0].mean(1), _bootstrap_errors(confusion)
    precision, recall, f1 = (
        MeanWithError(float(mean), float(error) if len(labels) > 1 else None)
        for mean, error in zip(means, errors, strict=True)
    )
    return Quality(
        documents=len(labels),
        accuracy=mean(predicted == labels),
        precision=precision,
        recall=recall,
        f1=f1,
        cross_entropy=mean(-logprobs[np.arange(len(labels)), labels]),
        by_label=tuple(map(ClassQuality, names, *scores.tolist(), documents.tolist())),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def _scores(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Precision, recall and F1 of each label; 0 where there is nothing to divide by.

    Args:
        confusion: (..., labels, labels) documents by label and by prediction.

    Returns:
        (3, ..., labels)
    """
    hits, actual, predicted = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)
    counts = np.stack([predicted, actual, (predicted + actual) / 2])
    return hits / np.where(counts > 0, counts, 1)


def _bootstrap_errors(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """(3,) standard errors of the means over labels of precision, recall and F1, by the bootstrap over documents.

    Args:
        confusion: (labels, labels) documents by label and by prediction; the means depend on nothing else.
    """
    total, present = confusion.sum(), confusion.sum(1) > 0
    draws = np.random.default_rng(0).multinomial(total, confusion.ravel() / total, _RESAMPLES)
    means = _scores(draws.reshape(_RESAMPLES, *confusion.shape))[..., present].mean(-1)
    errors: NDArray[np.float64] = means.std(1, ddof=1)
    return errors


def mean(values: NDArray[Any]) -> MeanWithError:
    """Mean over documents, and its standard error."""
    numbers = values.astype(np.float64)
    if not len(numbers):
        return MeanWithError(float("nan"), None)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else None
    return MeanWithError(float(numbers.mean()), error)
