"""Objective of a classifier: its batches, and a module of student and loss.

The student is called through transformers' interface, so any architecture with a classification head works.
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
from softlabel.pipeline.stream.classifier_batches import ClassBatch, ClassDataset, LabelledDocuments
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.training.objective import Objective
from softlabel.storage.errors import AccessError, IntegrityError, TableError, UsageError
from softlabel.storage.table import Table

EVAL_TOKENS = 8192
"""Tokens of one forward pass, including padding, in evaluations during training."""
EVAL_BATCHES = 32
"""Maximum number of passes in evaluations during training; ``evaluate`` measures the whole eval split."""


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
        metrics = measure_classes(self.student, batches)
        logs = {"eval_kl": metrics.kl, "eval_agreement": metrics.agreement}
        if metrics.quality is not None:
            logs |= {"eval_accuracy": metrics.quality.accuracy, "eval_f1": metrics.quality.f1}
        return {name: estimate.mean for name, estimate in logs.items()}


def classifier_objective(config: TrainConfig, table: Table, student: PreTrainedModel) -> Objective:
    """Batches and module to train and evaluate a classifier with.

    Raises:
        TableError: if there is nothing to train on.
        UsageError: if documents have unknown labels, or no document has what a part of the loss needs.
    """
    labels = LabelMap.of(config.student.labels, table.identity.classes or ())
    pad = student.config.pad_token_id
    documents = LabelledDocuments.read(table, "train", labels)
    _require_targets(config.loss, documents, table)
    try:
        evaluation = list(islice(LabelledDocuments.read(table, "eval", labels).batches(pad, EVAL_TOKENS), EVAL_BATCHES))
    except (AccessError, IntegrityError):
        raise
    except TableError:
        evaluation = []
    if all(batch.logprobs.isnan().any(1).all() for batch in evaluation):  # nothing to compute a KL from
        evaluation = []
    return Objective(
        module=Classification(student, config.loss),
        dataset=partial(ClassDataset, documents, config.stream, pad),
        evaluation=evaluation,
    )


def _require_targets(loss: LossConfig, documents: LabelledDocuments, table: Table) -> None:
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
