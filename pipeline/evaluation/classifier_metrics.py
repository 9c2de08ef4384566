"""Quality of a classifier, compared with the documents' labels and with its teacher.

The metrics are scikit-learn's, each with a standard error and an interval over documents. Precision, recall and F1 are
derived from the confusion matrix. Trains nothing and reads no files.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate, around
from softlabel.pipeline.evaluation.figures import Bin, Calibration
from softlabel.pipeline.evaluation.metrics import CONFIDENCE_BINS
from softlabel.pipeline.evaluation.standings import Gap

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
    accuracy: Estimate
    precision: Estimate
    """Mean over the labels that occur (macro average), like recall and f1."""
    recall: Estimate
    f1: Estimate
    cross_entropy: Estimate
    """With the label, in nats."""
    by_label: tuple[ClassQuality, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Number of documents by their label (rows) and the classifier's prediction (columns)."""


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """How good a classifier is on some documents, at temperature 1."""

    documents: int
    kl: Estimate
    """Forward KL from the teacher, nats per document."""
    agreement: Estimate
    """Share of documents for which both predict the same label."""
    quality: Quality | None
    """None if no document has a label."""
    calibration: Calibration | None
    """Against the documents' labels, where they have one, and against the teacher; None if no document has a label."""


@dataclass(frozen=True, kw_only=True)
class ClassGroup(ClassFigures):
    """The same over documents with the same value of a column."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ClassMetrics(ClassFigures):
    """A classifier's metrics over all documents, and by groups of them."""

    by_column: dict[str, tuple[ClassGroup, ...]]
    """By the value of each column of ``by``, those of the most documents first."""


@dataclass(frozen=True)
class MeasuredClasses:
    """A classifier's metrics, and what they were computed from at each of N documents, for comparing it with others."""

    metrics: ClassMetrics
    kl: NDArray[np.float64]
    """(N,) nats; NaN where the teacher has no distribution."""
    correct: NDArray[np.float64]
    """(N,) 1 if the prediction is the label, otherwise 0; NaN without a label."""


@dataclass(frozen=True)
class ClassComparison:
    """Two students on the same documents: how much larger the first one's means are."""

    student: str
    other: str
    accuracy: Difference | None
    """None if no document has a label."""
    kl: Difference


@torch.no_grad()
def predictions(
    model: "PreTrainedModel", batches: "Iterable[ClassBatch]"
) -> "Iterator[tuple[ClassBatch, NDArray[np.float32]]]":
    """Each batch with (N, labels) log-probabilities of a student, in nats; its training mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            logits = model(**batch.to(model.device).inputs).logits[: len(batch.labels)]
            yield batch, logits.float().log_softmax(1).cpu().numpy()
    finally:
        model.train(was_training)


def measure_classes(model: "PreTrainedModel", batches: "Iterable[ClassBatch]") -> MeasuredClasses:
    """Measure a student on documents."""
    found = list(predictions(model, batches))
    labels, teacher = (
        np.concatenate([getattr(batch, name).numpy() for batch, _ in found]) for name in ("labels", "logprobs")
    )
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    return compare(np.concatenate([logprobs for _, logprobs in found]), labels, teacher, names)


def compare(
    logprobs: NDArray[np.float32],
    labels: NDArray[np.int64],
    teacher: NDArray[np.float32],
    names: Sequence[str],
    groups: "Mapping[str, tuple[tuple[str, ...], NDArray[np.int64]]] | None" = None,
) -> MeasuredClasses:
    """Metrics of predictions for N documents.

    Args:
        logprobs: (N, labels) nats.
        labels: (N,) ids; -1 where there is none.
        teacher: (N, labels) nats; NaN where the teacher has no distribution over these labels.
        names: name of each label.
        groups: by column: its values, and (N,) which of them each document has.
    """
    predicted, expected = logprobs.astype(np.float64), teacher.astype(np.float64)
    with np.errstate(invalid="ignore"):
        kl = np.where(np.isneginf(expected), 0.0, np.exp(expected) * (expected - predicted)).sum(1)
    same = (predicted.argmax(1) == expected.argmax(1)).astype(np.float64)
    known = labels >= 0
    correct = np.where(known, (logprobs.argmax(1) == labels).astype(np.float64), np.nan)

    def figures(chosen: "NDArray[np.bool_]") -> dict[str, Any]:
        here, labelled = chosen & ~np.isnan(kl), chosen & known
        quality = calibration = None
        if labelled.any():
            quality = _quality(logprobs[labelled], labels[labelled], names)
            calibration = _calibration(predicted[labelled], correct[labelled], expected[labelled])
        return {
            "documents": int(chosen.sum()),
            "kl": mean(kl[here]),
            "agreement": mean(same[here]),
            "quality": quality,
            "calibration": calibration,
        }

    metrics = ClassMetrics(
        **figures(np.ones(len(labels), np.bool_)),
        by_column={
            column: tuple(ClassGroup(name=name, **figures(value == number)) for number, name in enumerate(values))
            for column, (values, value) in (groups or {}).items()
        },
    )
    return MeasuredClasses(metrics, kl, correct)


def compared(names: Sequence[str], measured: Sequence[MeasuredClasses]) -> tuple[ClassComparison, ...]:
    """Each pair of students, measured on the same documents."""
    return tuple(
        ClassComparison(
            names[first],
            names[second],
            None if np.isnan(measured[first].correct).all() else _paired(measured, first, second, "correct"),
            _paired(measured, first, second, "kl"),
        )
        for first in range(len(names))
        for second in range(first + 1, len(names))
    )


def gaps_closed(names: Sequence[str], measured: Sequence[MeasuredClasses], gap: Gap | None) -> list[Estimate | None]:
    """Share of the gap in KL between control and reference that each student closes; None without a gap."""
    if gap is None:
        return [None] * len(names)
    rng, count = np.random.default_rng(0), len(measured[0].kl)
    weights = np.concatenate([np.ones((1, count)), rng.poisson(1.0, (_RESAMPLES, count))])
    known = ~np.isnan(measured[0].kl)
    kl = {name: (weights @ np.where(known, each.kl, 0.0)) for name, each in zip(names, measured, strict=True)}
    width = kl[gap.control] - (0.0 if gap.reference is None else kl[gap.reference])
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = [(kl[gap.control] - kl[name]) / width for name in names]
    return [around(float(share[0]), float(share[1:].std(ddof=1)), count) for share in shares]


def _paired(measured: Sequence[MeasuredClasses], first: int, second: int, name: str) -> Difference:
    values = getattr(measured[first], name) - getattr(measured[second], name)
    found = mean(values[~np.isnan(values)])
    return Difference(found.mean, found.error, found.interval)


def _calibration(
    logprobs: NDArray[np.float64], correct: NDArray[np.float64], teacher: NDArray[np.float64]
) -> Calibration:
    confidence, predicted = np.exp(logprobs.max(1)), logprobs.argmax(1)
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    given = np.exp(teacher[np.arange(len(predicted)), predicted])
    has_teacher = ~np.isnan(given)
    found = []
    for number in np.unique(bins).tolist():
        here = bins == number
        from_teacher = float(given[here & has_teacher].mean()) if (here & has_teacher).any() else None
        found.append(
            Bin(
                number / CONFIDENCE_BINS,
                (number + 1) / CONFIDENCE_BINS,
                int(here.sum()),
                float(confidence[here].mean()),
                float(correct[here].mean()),
                from_teacher,
                None,
            )
        )
    to_teacher = _ece(bins[has_teacher], (confidence - given)[has_teacher]) if has_teacher.any() else None
    return Calibration(_ece(bins, confidence - correct), to_teacher, tuple(found))


def _ece(bins: NDArray[np.int64], gaps: NDArray[np.float64]) -> Estimate:
    """Mean over documents of the distance between confidence and correctness in their bin of confidence."""

    def of(weights: NDArray[np.int64]) -> float:
        return float(np.abs(np.bincount(bins, weights * gaps, CONFIDENCE_BINS)).sum() / max(1, weights.sum()))

    rng, ones = np.random.default_rng(0), np.ones(len(bins), np.int64)
    replicates = [of(rng.poisson(1.0, len(bins))) for _ in range(_RESAMPLES)]
    return around(of(ones), float(np.std(replicates, ddof=1)), len(bins))


def _quality(logprobs: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str]) -> Quality:
    predicted = logprobs.argmax(1)
    confusion = np.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    scores, documents = _scores(confusion), confusion.sum(1)
    means, errors = scores[:, documents > 0].mean(1), _bootstrap_errors(confusion)
    precision, recall, f1 = (
        around(float(mean), float(error), len(labels)) for mean, error in zip(means, errors, strict=True)
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


def mean(values: NDArray[Any]) -> Estimate:
    """Mean over documents, with its standard error and interval."""
    numbers = values.astype(np.float64)
    if not len(numbers):
        return Estimate(float("nan"), None, None)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else 0.0
    return around(float(numbers.mean()), error, len(numbers))
