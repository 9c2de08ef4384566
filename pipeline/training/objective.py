"""What a student is trained and measured on: batches, and a module of student and loss that turns them into numbers.

All that differs between a language model, which is here, and a classifier, which is in ``classifier_objective``. Knows
no loop, no checkpoint and no device.
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
from softlabel.pipeline.loss.averaging import decode
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
"""Tokens of the eval split, padding included, that are measured while training; ``evaluate`` measures all of it."""


@dataclass(frozen=True)
class Lesson:
    """What a student is trained and measured on: all that differs between a language model and a classifier."""

    module: nn.Module
    """The student, its attribute ``student``, with its loss, whose settings are ``loss``; called with a batch, and
    asked what it ``measured``, like ``Distillation``."""
    dataset: Callable[..., Any]
    """Makes one rank's batches, given ``SoftLabelDataset``'s keyword arguments, whose methods it has."""
    evaluation: Sequence[Any]
    """Batches of the eval split, the same on each rank; none, and nothing is evaluated."""


class Distillation(nn.Module):
    """A student and its loss in one module, so that whatever wraps it (autocast, DDP, FSDP) wraps both."""

    vocabulary: Tensor

    def __init__(self, student: PreTrainedModel, table: AnyTable, loss: LossConfig, max_k: int | None) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("vocabulary", torch.tensor(table.vocabulary), persistent=False)
        self.loss = loss
        """What is minimised, its weights as they are at this step."""
        self._table = table
        self._max_k = max_k

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's share of its step's loss, with gradient, and (2,) that of the hard and the soft part, without."""
        head = output_head(self.student)
        hidden = hidden_states(self.student, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
        targets = None
        if self.loss.soft_weight:
            targets = decode(batch.targets, self.vocabulary, self._table.temperatures, self.loss, self._max_k)
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
        """What the curves show of the student on these batches."""
        metrics = measure(self.student, batches, self._table)
        logs = {"eval_kl": metrics.kl.mean, "eval_cross_entropy": metrics.cross_entropy.mean}
        if metrics.agreement is not None:
            logs["eval_agreement"] = metrics.agreement.mean
        return logs


def language_lesson(config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None) -> Lesson:
    """What a language model is trained and measured on.

    Args:
        config: of the training.
        table: what it learns from.
        student: the model.
        target: what the soft part of the loss compares it with; None if there is none.
    """
    loss = config.loss if target is None else config.loss.model_copy(update={"target": target})
    max_k = dropping(config.stream.max_k, Origin.of(table).head)
    return Lesson(
        module=Distillation(student, table, loss, max_k),
        dataset=partial(SoftLabelDataset, table, config.stream),
        evaluation=_evaluation(table, config.stream),
    )


def _evaluation(table: AnyTable, stream: StreamConfig) -> list[Batch]:
    """The first held-out batches, in the table's order; none if nothing is held out."""
    try:
        holdout = Holdout.of(table)
    except (AccessError, IntegrityError):
        raise
    except TableError:
        return []
    batches = holdout.batches(stream.max_length, stream.packing)
    return list(islice(batches, max(1, EVAL_TOKENS // stream.max_length)))
