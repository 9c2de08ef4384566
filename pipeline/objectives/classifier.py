"""Classifiers: students that label whole documents, trained on the teacher's distributions over its classes.

The student is built by ``students.classifier_student``, its documents come from ``stream.classifier_batches``, its
metrics are ``evaluation.classifier_metrics``. It is called through transformers' interface, so any architecture with a
classification head works. This module knows no loop, no checkpoint and no device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import LossConfig, StudentConfig, TrainConfig
from softlabel.pipeline.evaluation.classifier_metrics import (
    ClassMetrics,
    MeasuredClasses,
    compare,
    compared,
    gaps_closed,
    mean,
    measure_classes,
    predictions,
)
from softlabel.pipeline.evaluation.metrics import require_numbers
from softlabel.pipeline.evaluation.report.classifier_report import (
    ClassEvaluation,
    ClassReport,
    ClassStudent,
    ClassTeacher,
    to_html,
    to_json,
)
from softlabel.pipeline.evaluation.report.content import Header, NamedTeacher, TrainedStudent
from softlabel.pipeline.evaluation.report.folder import write
from softlabel.pipeline.evaluation.report.scores import results_of
from softlabel.pipeline.evaluation.standings import Gap, standings_of
from softlabel.pipeline.evaluation.unfinished import Unfinished
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import SparseTargets, Target
from softlabel.pipeline.models.checkpoint import class_names, is_classifier
from softlabel.pipeline.models.pretrained import load_config
from softlabel.pipeline.models.student_loading import load_or_raise
from softlabel.pipeline.objectives.objective import Trainable
from softlabel.pipeline.stream.classifier_batches import ClassBatch, ClassDataset, LabelledDocuments
from softlabel.pipeline.stream.holdout import PART_TOKENS
from softlabel.pipeline.students.classifier_student import blank_classifier, build_classifier
from softlabel.pipeline.students.compatibility import require_fitting
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.errors import AccessError, IntegrityError, StudentError, TableError, UsageError
from softlabel.storage.table import Table
from softlabel.storage.views.view import AnyTable

EVAL_TOKENS = 8192
"""Tokens of one forward pass, including padding, in evaluations during training."""
EVAL_BATCHES = 32
"""Maximum number of passes in evaluations during training; ``evaluate`` measures the whole eval split."""


@dataclass(frozen=True)
class Classifier:
    """The ``Objective`` of a student whose teacher is a classifier, or the documents' labels."""

    origin: Origin
    classes: tuple[str, ...]
    """The teacher's classes."""
    task = "text-classification"

    def require_fitting(self, config: StudentConfig, source: StudentSource | None = None) -> StudentSource:
        """See ``Objective``."""
        self._labels(config)
        return require_fitting(config, self.origin, blank_classifier, source)

    def require_loss(self, config: TrainConfig) -> Target | None:
        """See ``Objective``."""
        if config.student.lora_r is not None:
            raise UsageError(
                "adapters are only for language models, and this table's teacher is a classifier",
                expected="no student.lora_r (a classifier's new head has to be trained in full)",
                found=f"student.lora_r: {config.student.lora_r}",
                do="leave student.lora_r out",
            )
        found = [f"stream.max_k: {config.stream.max_k}"] if config.stream.max_k is not None else []
        found += [f"loss.target: {config.loss.target}"] if config.loss.target != "auto" else []
        if found:
            raise UsageError(
                "a classifier is always trained on the teacher's whole distribution",
                expected="neither stream.max_k nor loss.target",
                found=", ".join(found),
                do="leave these settings out; student.labels chooses the classes that a student learns",
            )
        return None

    def build(
        self, config: StudentConfig, table: AnyTable, packing: bool = False, source: StudentSource | None = None
    ) -> PreTrainedModel:
        """See ``Objective``; documents never share a row."""
        labels = self._labels(config)
        return build_classifier(config, labels, table, self.require_fitting(config, source))

    def trainable(
        self, config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None
    ) -> Trainable:
        """See ``Objective``.

        Raises:
            TableError: if there is nothing to train on.
            UsageError: if documents have unknown labels, or no document has what a part of the loss needs.
        """
        labels, pad = self._labels(config.student), student.config.pad_token_id
        documents = LabelledDocuments.read(_single(table), "train", labels)
        _require_targets(config.loss, documents, table)
        return Trainable(
            module=Classification(student, config.loss),
            dataset=partial(ClassDataset, documents, config.stream, pad),
            evaluation=_evaluation(table, labels, pad),
        )

    def require_output_layer(self, source: StudentSource) -> None:
        """See ``Objective``."""
        settings = load_or_raise(source.path, "configuration", lambda: load_config(source.path))
        if not is_classifier(settings) or class_names(settings) != self.classes:
            raise StudentError(
                "this model is not a classifier of the table's classes",
                expected=f"a model saved as a classifier with the classes {', '.join(self.classes)}",
                found=", ".join(class_names(settings)) if is_classifier(settings) else "another kind of model",
                where=source.path,
                do="train a student from it with student.model, and evaluate that",
            )

    def held_out(
        self, table: AnyTable, students: Sequence[StudentConfig], by: Sequence[str] = ()
    ) -> "HeldOutDocuments":
        """See ``Objective``."""
        maps = list(map(self._labels, students))
        different = next((number for number, labels in enumerate(maps) if labels != maps[0]), None)
        if different is not None:
            raise UsageError(
                "these students have different labels and can't be compared with each other",
                expected=f"{students[0].model}: {', '.join(maps[0].names)}",
                found=f"{students[different].model}: {', '.join(maps[different].names)}",
                do="evaluate students with different labels in separate reports",
            )
        return HeldOutDocuments(LabelledDocuments.read(_single(table), "eval", maps[0], by), maps[0])

    def _labels(self, config: StudentConfig) -> LabelMap:
        return LabelMap.of(config.labels, self.classes)


class Classification(nn.Module):
    """A classifier and its loss in one module, so that whatever wraps it (autocast, DDP) wraps both."""

    identity: Tensor

    def __init__(self, student: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("identity", torch.eye(student.config.num_labels), persistent=False)
        self.loss = loss
        """Settings of the loss, with its weights at the current step."""

    def forward(self, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        """The batch's share of the step's loss, with gradient, and (2,) its hard and soft part, detached.

        Both are divided by the number of documents of the step. A document without a label adds nothing to the hard
        part; a document whose classes are all left out by the label map adds nothing to the soft part.
        """
        hard_loss = self.loss.model_copy(update={"soft_weight": 0.0})
        soft_loss = self.loss.model_copy(update={"hard_weight": 0.0})
        logits = self.student(**batch.inputs).logits[: len(batch.labels)].float()
        has_label, has_teacher = batch.labels >= 0, ~batch.logprobs.isnan().any(1)
        documents = max(1, batch.global_positions)
        with torch.autocast(logits.device.type, enabled=False):
            # The fused loss takes hidden states and a head: these are the logits and an identity matrix.
            hard = distillation_loss(
                logits[has_label], self.identity, batch.labels[has_label], None, hard_loss, normalizer=documents
            )
            total, soft_part = hard.total, torch.zeros_like(hard.soft)
            if soft_loss.soft_weight:
                targets = _targets(batch.logprobs[has_teacher], soft_loss.temperature)
                unused = batch.labels[has_teacher].clamp(min=0)
                soft = distillation_loss(
                    logits[has_teacher], self.identity, unused, targets, soft_loss, normalizer=documents
                )
                total, soft_part = total + soft.total, soft.soft
        # Every parameter needs a gradient, if only 0, because the ranks wait for each other's gradients.
        return total + 0 * logits.sum(), torch.stack([hard.hard, soft_part]).float() / documents

    def measured(self, batches: Sequence[ClassBatch]) -> dict[str, float]:
        """The student's metrics on these batches, by name in the curves."""
        metrics = measure_classes(self.student, batches).metrics
        logs = {"eval_kl": metrics.kl, "eval_agreement": metrics.agreement}
        if metrics.quality is not None:
            logs |= {"eval_accuracy": metrics.quality.accuracy, "eval_f1": metrics.quality.f1}
        return {name: estimate.mean for name, estimate in logs.items()}


@dataclass(frozen=True)
class HeldOutDocuments:
    """The ``HeldOut`` of a classifier's table."""

    documents: LabelledDocuments
    labels: LabelMap
    """The labels that all students have."""
    unit = "documents"

    @property
    def size(self) -> int:
        """Number of documents."""
        return len(self.documents.tokens)

    def measure(
        self,
        model: PreTrainedModel,
        student: TrainedStudent,
        batch_tokens: int,
        done: Callable[[int], object],
        unfinished: Unfinished,
    ) -> "MeasuredClassifier":
        """See ``HeldOut``."""
        found = [unfinished.restore().get("logprobs", np.zeros((0, len(self.labels.names)), np.float32))]
        start, tokens = len(found[0]), 0
        done(start)
        for batch, logprobs in predictions(
            model, self.documents.batches(model.config.pad_token_id, batch_tokens, start)
        ):
            require_numbers(int(np.isnan(logprobs).any(1).sum()), len(logprobs), "documents", model)
            found.append(logprobs)
            done(len(logprobs))
            tokens += batch.attention_mask.numel()
            if tokens >= PART_TOKENS:
                unfinished.save({"logprobs": np.concatenate(found)})
                tokens = 0
        unfinished.save({"logprobs": np.concatenate(found)})
        return MeasuredClassifier(student, self._compared(np.concatenate(found)))

    def _compared(self, logprobs: NDArray[np.float32]) -> MeasuredClasses:
        """A model's metrics from its (N, labels) log-probabilities."""
        documents = self.documents
        groups = {name: (documents.values[name], documents.groups[name]) for name in documents.groups}
        return compare(logprobs, documents.labels, documents.logprobs, self.labels.names, groups)

    def results(self, measured: "MeasuredClassifier") -> dict[str, float]:
        """See ``HeldOut``."""
        return results_of(measured.measured.metrics)

    def report(
        self,
        header: Header,
        teacher: NamedTeacher,
        students: Sequence["MeasuredClassifier"],
        gap: Gap | None,
        folder: Path,
    ) -> ClassEvaluation:
        """See ``HeldOut``."""
        names, measured = [each.student.name for each in students], [each.measured for each in students]
        comparisons = compared(names, measured)
        kl, closed = [each.metrics.kl for each in measured], gaps_closed(names, measured, gap)
        uses = [each.student.use for each in students]
        apart = {each.student.name for each in students if each.student.kind == "teacher"}
        report = ClassReport(
            **vars(header),
            documents=self.size,
            left_out=self.documents.left_out,
            labels=self.labels.names,
            unmapped=mean(self.documents.unmapped),
            teacher=ClassTeacher(**vars(teacher), metrics=self._teacher_metrics()),
            students=tuple(ClassStudent(**vars(each.student), metrics=each.measured.metrics) for each in students),
            comparisons=comparisons,
            gap=gap,
            standings=standings_of(names, kl, comparisons, closed, uses, apart),
        )
        return ClassEvaluation.of(report, *write(to_html(report), to_json(report), folder))

    def _teacher_metrics(self) -> ClassMetrics:
        """The teacher measured like a student; a uniform distribution stands in where it has none over the labels."""
        logprobs = self.documents.logprobs
        uniform = np.float32(-np.log(len(self.labels.names)))
        return self._compared(np.where(np.isnan(logprobs), uniform, logprobs)).metrics


@dataclass(frozen=True)
class MeasuredClassifier:
    """A student and what was measured of it."""

    student: TrainedStudent
    measured: MeasuredClasses


def _single(table: AnyTable) -> Table:
    assert isinstance(table, Table), "the tables of a view always have language models as teachers"
    return table


def _evaluation(table: AnyTable, labels: LabelMap, pad: int) -> list[ClassBatch]:
    """The first held-out batches, in the table's order; empty if nothing is held out, or nothing gives a KL."""
    try:
        documents = LabelledDocuments.read(_single(table), "eval", labels)
    except (AccessError, IntegrityError):
        raise
    except TableError:
        return []
    batches = list(islice(documents.batches(pad, EVAL_TOKENS), EVAL_BATCHES))
    return [] if all(batch.logprobs.isnan().any(1).all() for batch in batches) else batches


def _require_targets(loss: LossConfig, documents: LabelledDocuments, table: AnyTable) -> None:
    """Refuse a loss with a part that no document contributes to."""
    missing = []
    if (loss.hard_weight or loss.hard_weight_end) and (documents.labels < 0).all():
        missing.append("one of the student's labels (loss.hard_weight)")
    if (loss.soft_weight or loss.soft_weight_end) and np.isnan(documents.logprobs).all():
        missing.append("a teacher's probability for the student's labels (loss.soft_weight)")
    if missing:
        raise UsageError(
            "a part of the loss has no document to learn from",
            expected="documents with labels for the hard loss, and with the teacher's probabilities for the soft loss",
            found=f"{len(documents.tokens)} documents to train on, none with {' or '.join(missing)}",
            where=table.location,
            do="set the weight named above to 0, or capture with columns.label; distill's control student has only the "
            "hard loss, and control: false leaves it out",
        )


def _targets(logprobs: Tensor, temperature: float) -> SparseTargets:
    """Targets at a temperature, from (N, labels) log-probabilities in nats at temperature 1."""
    softened = (logprobs / temperature).log_softmax(1)
    ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand(len(logprobs), -1)
    rest = softened.new_full((len(logprobs),), -torch.inf)
    return SparseTargets(ids, softened, rest, entropies=torch.zeros_like(rest), target="bucket")
