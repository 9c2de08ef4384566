"""A classifier as a student: building it for its labels, and its loss.

It is called as transformers calls it, so any architecture with a classification head will do. The loop is
``pipeline.trainer``'s.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipeline.checkpoint import class_names, is_classifier
from pipeline.class_labels import LabelMap
from pipeline.class_metrics import measure_classes
from pipeline.class_stream import ClassBatch, ClassDataset, Documents
from pipeline.classifier import padding_id
from pipeline.config import TrainConfig
from pipeline.fitting import require_fitting
from pipeline.lesson import Lesson
from pipeline.loading import load_model, require_weights
from pipeline.loss import distillation_loss
from pipeline.origin import Origin
from pipeline.pretrained import fresh_model, load_config
from pipeline.source import Source, explained
from pipeline.student import pruned
from pipeline.student_config import LossConfig, StudentConfig
from pipeline.targets import SparseTargets
from storage.errors import AccessError, IntegrityError, TableError, UsageError
from storage.table import Table

EVAL_TOKENS = 8192
"""Tokens of one forward pass, padding included, when a student is measured while it is trained."""
EVAL_BATCHES = 32
"""So many passes at most; ``evaluate`` measures all of the eval split."""


def build_classifier(config: StudentConfig, table: Table, source: Source | None = None) -> PreTrainedModel:
    """The student that the settings describe, on the CPU, with a head for its labels.

    A head for the same labels is kept as it is; of another model, or for other labels, it is made anew at random.

    Args:
        config: where it comes from.
        table: what it has to fit.
        source: the files that it is made from, if they have been found already.

    Raises:
        UsageError: unless exactly one place is named that it comes from, or if its labels can't be made.
        StudentError: if it can't be loaded, or its tokenizer, vocabulary or positions do not fit.
    """
    origin = Origin.of(table)
    folder = require_fitting(config, origin, source).path
    names = LabelMap.of(config.labels, table.identity.classes or ()).names
    head: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    dtype, tokenizer = getattr(torch, config.dtype), origin.tokenizer()
    if config.config is not None:
        settings = explained(folder, "configuration", lambda: load_config(folder, **head))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings, name, getattr(tokenizer, name))
        student = explained(
            folder, "model", lambda: fresh_model(AutoModelForSequenceClassification, settings, dtype=dtype)
        )
    else:
        student = pruned(_load(folder, dtype, head), config, table)
    padding_id(student, tokenizer)
    return student


def _load(source: Path, dtype: torch.dtype, head: dict[str, Any]) -> PreTrainedModel:
    settings = explained(source, "configuration", lambda: load_config(source))
    # A model that was saved as something else has no head, whatever the names that it would give to classes.
    same = is_classifier(settings) and class_names(settings) == tuple(head["id2label"].values())
    student, wrong = load_model(AutoModelForSequenceClassification, source, dtype, **head)
    if not same:  # of other labels, even if they are as many
        _renew_head(student)
    # A new head, and what pools the layers' states for it, may be missing; nothing else.
    body = f"{student.base_model_prefix}."
    needed = {name for name in wrong if same or (name.startswith(body) and ".pooler." not in name)}
    require_weights(student, source, {name: wrong[name] for name in needed}, but="" if same else " but its head's")
    return student


@torch.no_grad()
def _renew_head(student: PreTrainedModel) -> None:
    """Draw the layers outside of the body anew."""
    for name, module in student.named_children():
        if name != student.base_model_prefix:
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=getattr(student.config, "initializer_range", 0.02))
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)


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
                logits[known], self.same, batch.labels[known], None, hard_loss, normaliser=documents
            )
            total, soft_part = hard.total, torch.zeros_like(hard.soft)
            if soft_loss.soft_weight:
                targets = _targets(batch.logprobs[taught], soft_loss.temperature)
                nothing = batch.labels[taught].clamp(min=0)
                soft = distillation_loss(logits[taught], self.same, nothing, targets, soft_loss, normaliser=documents)
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
        without.append("a label of the student's (loss.hard_weight)")
    if (loss.soft_weight or loss.soft_weight_end) and np.isnan(documents.logprobs).all():
        without.append("a probability of the student's labels (loss.soft_weight)")
    if without:
        raise UsageError(
            "a part of the loss has nothing to be measured against",
            expected="documents with labels for the hard loss, and with probabilities of these labels for the soft one",
            found=f"{len(documents.tokens)} documents to train on, none with {' or '.join(without)}",
            where=table.location,
            do="set that weight to 0, or capture with columns.label; distill's control has the hard loss alone, "
            "control: false leaves it out",
        )


def _targets(logprobs: Tensor, temperature: float) -> SparseTargets:
    """Distributions over all labels, (N, labels) nats at temperature 1, at another."""
    softened = (logprobs / temperature).log_softmax(1)
    ids = torch.arange(logprobs.shape[1], device=logprobs.device).expand(len(logprobs), -1)
    rest = softened.new_full((len(logprobs),), -torch.inf)
    return SparseTargets(ids, softened, rest, entropies=torch.zeros_like(rest), target="bucket")
