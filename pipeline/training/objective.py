"""Objective of a language model: its batches, and a module of student and loss.

``Objective`` holds everything that differs between a language model and a classifier, whose objective is in
``classifier_objective``. Knows no loop, no checkpoint and no device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import LossConfig, StreamConfig, TrainConfig
from softlabel.pipeline.evaluation.metrics import measure
from softlabel.pipeline.loss.averaging import decode_batch
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import Target, dropping
from softlabel.pipeline.stream.batch import Batch
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.stream.holdout import Holdout
from softlabel.pipeline.students.build import hidden_states, output_head
from softlabel.pipeline.students.origin import Origin
from softlabel.storage.errors import AccessError, IntegrityError, TableError
from softlabel.storage.views.view import AnyTable

EVAL_TOKENS = 4096
"""Tokens of the eval split, including padding, in evaluations during training; ``evaluate`` measures all of it."""


@dataclass(frozen=True)
class Objective:
    """Batches and module to train and evaluate a student with."""

    module: nn.Module
    """Student and loss in one module, with the attributes and methods of ``Distillation``."""
    dataset: Callable[..., Any]
    """Makes one rank's dataset, which has the keyword arguments and methods of ``SoftLabelDataset``."""
    evaluation: Sequence[Any]
    """Batches of the eval split, the same on each rank; if empty, nothing is evaluated."""


class Distillation(nn.Module):
    """A student and its loss in one module, so that whatever wraps it (autocast, DDP, FSDP) wraps both."""

    vocabulary: Tensor

    def __init__(self, student: PreTrainedModel, table: AnyTable, loss: LossConfig, max_k: int | None) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("vocabulary", torch.tensor(table.vocabulary), persistent=False)
        self.loss = loss
        """Settings of the loss, with its weights at the current step."""
        self._table = table
        self._max_k = max_k

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's share of the step's loss, with gradient, and (2,) its hard and soft part, detached."""
        head = output_head(self.student)
        hidden = hidden_states(self.student, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
        targets = None
        if self.loss.soft_weight:
            targets = decode_batch(batch.targets, self.vocabulary, self._table.temperatures, self.loss, self._max_k)
        positions = max(1, batch.global_positions)
        loss = distillation_loss(
            hidden,
            head.weight,
            batch.next_ids,
            targets,
            self.loss,
            bias=head.bias,
            vocabulary_size=len(self.vocabulary),
            soft_cap=head.soft_cap,
            logit_scale=head.scale,
            normalizer=positions,
        )
        return loss.total, torch.stack([loss.hard, loss.soft]).float() / positions

    def measured(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The student's metrics on these batches, by name in the curves."""
        metrics = measure(self.student, batches, self._table)
        logs = {"eval_kl": metrics.kl.mean, "eval_cross_entropy": metrics.cross_entropy.mean}
        if metrics.agreement is not None:
            logs["eval_agreement"] = metrics.agreement.mean
        return logs


def language_model_objective(
    config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None
) -> Objective:
    """Batches and module to train and evaluate a language model with.

    Args:
        config: settings of the training.
        table: table or view to train on.
        student: the model to train.
        target: target of the soft loss; None if the loss has no soft part.
    """
    loss = config.loss if target is None else config.loss.model_copy(update={"target": target})
    max_k = dropping(config.stream.max_k, Origin.of(table).head)
    return Objective(
        module=Distillation(student, table, loss, max_k),
        dataset=partial(SoftLabelDataset, table, config.stream),
        evaluation=_evaluation(table, config.stream),
    )


def _evaluation(table: AnyTable, stream: StreamConfig) -> list[Batch]:
    """The first held-out batches, in the table's order; empty if nothing is held out."""
    try:
        holdout = Holdout.of(table)
    except (AccessError, IntegrityError):
        raise
    except TableError:
        return []
    batches = holdout.batches(stream.max_length, stream.packing)
    return list(islice(batches, max(1, EVAL_TOKENS // stream.max_length)))
