"""What a classifier is trained and measured on: its batches, and a module of student and loss.

The student is called as transformers calls it, so any architecture with a classification head will do.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import LossConfig, TrainConfig
from softlabel.pipeline.evaluation.classifier_metrics import measure_classes
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import SparseTargets
from softlabel.pipeline.stream.classifier import ClassBatch, ClassDataset, Documents
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.training.objective import Lesson
from softlabel.storage.errors import AccessError, IntegrityError, TableError, UsageError
from softlabel.storage.table import Table

EVAL_TOKENS = 8192
"""Tokens of one forward pass, padding included, when a student is measured while it is trained."""
EVAL_BATCHES = 32
"""So many passes at most; ``evaluate`` measures all of the eval split."""


class Classification(nn.Module):
    """A classifier and its loss in one module, so that whatever wraps it (autocast, DDP) wraps both."""

    same: Tensor

    def __init__(self, student: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("same", torch.eye(student.config.num_labels), persistent=False)
        self.loss = loss
        """What is minimised, its weights as they are at this step."""

    def forward(self, batch: ClassBatch) -> tuple[Tensor, Tensor]:
        """The batch's share of its step's loss, with gradient, and (2,) that of the hard and the soft part, without.

        Both are divided by all documents of the step. One without a label adds nothing to the hard part, and one of
        which the label map leaves everything out adds nothing to the soft part.
        """
        hard_loss = self.loss.model_copy(update={"soft_weight": 0.0})
        soft_loss = self.loss.model_copy(update={"hard_weight": 0.0})
        logits = self.student(**batch.inputs).logits[: len(batch.labels)].float()
        known, taught = batch.labels >= 0, ~batch.logprobs.isnan().any(1)
        documents = max(1, batch.global_positions)
        with torch.autocast(logits.device.type, enabled=False):
            # The logits are there already: they go through a head that changes nothing.
            hard = distillation_loss(
                logits[known], self.same, batch.labels[known], None, hard_loss, normalizer=documents
            )
            total, soft_part = hard.total, torch.zeros_like(hard.soft)
            if soft_loss.soft_weight:
                targets = _targets(batch.logprobs[taught], soft_loss.temperature)
                nothing = batch.labels[taught].clamp(min=0)
                soft = distillation_loss(logits[taught], self.same, nothing, targets, soft_loss, normalizer=documents)
                total, soft_part = total + soft.total, soft.soft
        # Every parameter has a gradient, of 0 if there is nothing to learn: ranks wait for each other's.
        return total + 0 * logits.sum(), torch.stack([hard.hard, soft_part]).float() / documents

    def measured(self, batches: Sequence[ClassBatch]) -> dict[str, float]:
        """What the curves show of the student on these batches."""
        metrics = measure_classes(self.student, batches)
        found = {"eval_kl": metrics.kl, "eval_agreement": metrics.agreement}
        if metrics.quality is not None:
            found |= {"eval_accuracy": metrics.quality.accuracy, "eval_f1": metrics.quality.f1}
        return {name: estimate.mean for name, estimate in found.items()}


def class_lesson(config: TrainConfig, table: Table, student: PreTrainedModel) -> Lesson:
    """What a classifier is trained and measured on.

    Raises:
        TableError: if there is nothing to train on.
        UsageError: if documents have labels that nobody knows, or none has what a part of the loss is measured against.
    """
    labels = LabelMap.of(config.student.labels, table.identity.classes or ())
    pad = student.config.pad_token_id
    documents = Documents.read(table, "train", labels)
    _require_targets(config.loss, documents, table)
    try:
        held = list(islice(Documents.read(table, "eval", labels).batches(pad, EVAL_TOKENS), EVAL_BATCHES))
    except (AccessError, IntegrityError):
        raise
    except TableError:
        held = []
    if all(batch.logprobs.isnan().any(1).all() for batch in held):  # the teacher knows none of their labels
        held = []
    return Lesson(
        module=Classification(student, config.loss),
        dataset=partial(ClassDataset, documents, config.stream, pad),
        evaluation=held,
    )


def _require_targets(loss: LossConfig, documents: Documents, table: Table) -> None:
    """Refuse a part of the loss that no document would ever add anything to."""
    without = []
    if (loss.hard_weight or loss.hard_weight_end) and (documents.labels < 0).all():
        without.append("one of the student's labels (loss.hard_weight)")
    if (loss.soft_weight or loss.soft_weight_end) and np.isnan(documents.logprobs).all():
        without.append("a teacher's probability for the student's labels (loss.soft_weight)")
    if without:
        raise UsageError(
            "no document has what a part of the loss needs",
            expected="documents with labels for the hard loss, and with the teacher's probabilities for the soft loss",
            found=f"{len(documents.tokens)} documents to train on, none with {' or '.join(without)}",
            where=table.location,
            do="set that weight to 0, or capture with columns.label; distill's control student has only the hard loss, "
            "and control: false leaves it out",
        )


def _targets(logprobs: Tensor, temperature: float) -> SparseTargets:
    """Distributions over all labels, (N, labels) nats at temperature 1, at another."""
    softened = (logprobs / temperature).log_softmax(1)
    ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand(len(logprobs), -1)
    rest = softened.new_full((len(logprobs),), -torch.inf)
    return SparseTargets(ids, softened, rest, entropies=torch.zeros_like(rest), target="bucket")
