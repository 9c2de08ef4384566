"""Language models: students that predict the next token, trained on a table's positions and measured on held-out ones.

The student is built by ``students.build``, its batches come from ``stream.dataset`` and ``stream.holdout``, its loss is
``loss.fused``, its metrics are ``evaluation.metrics``. This module ties them together; it knows no loop, no checkpoint
and no device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import LossConfig, StreamConfig, StudentConfig, TrainConfig
from softlabel.pipeline.evaluation import partings
from softlabel.pipeline.evaluation.bootstrap import effective
from softlabel.pipeline.evaluation.figures import Metrics, TeacherMetrics
from softlabel.pipeline.evaluation.metrics import QUANTITIES, empty_sums, means, measure
from softlabel.pipeline.evaluation.partings import Likeliest
from softlabel.pipeline.evaluation.report.content import (
    Header,
    NamedTeacher,
    Report,
    StudentSummary,
    TeacherSummary,
    TrainedStudent,
    to_json,
)
from softlabel.pipeline.evaluation.report.folder import write
from softlabel.pipeline.evaluation.report.page import to_html
from softlabel.pipeline.evaluation.report.scores import EvaluationReport, results_of
from softlabel.pipeline.evaluation.standings import Gap, standings_of
from softlabel.pipeline.evaluation.summary import Cell, Measurement, compared, gaps_closed
from softlabel.pipeline.evaluation.token_bytes import token_bytes
from softlabel.pipeline.evaluation.unfinished import Unfinished
from softlabel.pipeline.loss.averaging import decode_batch, require_average
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import Target, TokenIds, dropping, resolve_target
from softlabel.pipeline.models.multimodal import blank_text_model
from softlabel.pipeline.objectives.objective import Trainable
from softlabel.pipeline.stream.batch import Batch
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.stream.holdout import HeldOutBatch, Holdout
from softlabel.pipeline.students.build import build, hidden_states, output_head, separates
from softlabel.pipeline.students.compatibility import require_fitting
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.errors import AccessError, IntegrityError, TableError, UsageError
from softlabel.storage.views.view import AnyTable, View

EVAL_TOKENS = 4096
"""Tokens of the eval split, including padding, in evaluations during training; ``evaluate`` measures all of it."""
_ROW_GROUPS, _ALL = "row groups", 2**62
"""Name of the number of row groups that sums are from, and the number that stands for all of them."""


@dataclass(frozen=True)
class LanguageModel:
    """The ``Objective`` of a student whose teacher is a language model."""

    origin: Origin
    task = "text-generation"

    def require_fitting(self, config: StudentConfig, source: StudentSource | None = None) -> StudentSource:
        """See ``Objective``."""
        if config.labels:
            raise UsageError(
                "student.labels is only for classifiers, and this table's teacher is a language model",
                expected="no student.labels, or a table captured from a classifier",
                found=f"student.labels: {' '.join(config.labels)}",
                where=self.origin.location,
                do="leave student.labels out",
            )
        return require_fitting(config, self.origin, blank_text_model, source)

    def require_loss(self, config: TrainConfig) -> Target | None:
        """See ``Objective``."""
        if not config.loss.soft_weight and not config.loss.soft_weight_end:
            return None
        max_k = self._max_k(config.stream)
        target = resolve_target(config.loss, self.origin.temperatures, self.origin.draws, max_k)
        if self.origin.average:
            require_average(config.loss, max_k)
        self._require_known(target)
        return target

    def _require_known(self, target: Target) -> None:
        """Refuse soft labels without what the loss needs: entropies to report it and, but for one target, masses."""
        needed = {"entropies"} | ({"tail_log_masses"} if target != "renormalized" else set())
        if missing := sorted(needed & self.origin.unknown):
            raise UsageError(
                "the soft labels lack values that this loss needs",
                expected=f"known {', '.join(sorted(needed))}",
                found=f"values that may be unknown in {', '.join(missing)}",
                where=self.origin.location,
                do="set loss.target to renormalized, which needs no tail_log_masses; or loss.soft_weight to 0",
            )

    def build(
        self, config: StudentConfig, table: AnyTable, packing: bool = False, source: StudentSource | None = None
    ) -> PreTrainedModel:
        """See ``Objective``."""
        return build(config, table, self.require_fitting(config, source), packing)

    def trainable(
        self, config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None
    ) -> Trainable:
        """See ``Objective``."""
        loss = config.loss if target is None else config.loss.model_copy(update={"target": target})
        return Trainable(
            module=Distillation(student, table, loss, self._max_k(config.stream)),
            dataset=partial(SoftLabelDataset, table, config.stream),
            evaluation=_evaluation(table, config.stream),
        )

    def require_output_layer(self, source: StudentSource) -> None:
        """See ``Objective``; every language model has one."""

    def held_out(
        self, table: AnyTable, students: Sequence[StudentConfig], by: Sequence[str] = ()
    ) -> "HeldOutPositions":
        """See ``Objective``."""
        for part in table.tables:
            needed = ("entropies", "tail_log_masses", "next_logprobs")
            part.identity.require_known(needed, part.location, "an evaluation", "evaluate on another table")
        tokenizer = self.origin.tokenizer()
        return HeldOutPositions(Holdout.of(table, by), tokenizer, token_bytes(tokenizer, self.origin.vocabulary))

    def _max_k(self, stream: StreamConfig) -> int | None:
        return dropping(stream.max_k, self.origin.head)


class Distillation(nn.Module):
    """A student and its loss in one module, so that whatever wraps it (autocast, DDP, FSDP) wraps both."""

    def __init__(self, student: PreTrainedModel, table: AnyTable, loss: LossConfig, max_k: int | None) -> None:
        super().__init__()
        self.student = student
        self.token_ids = TokenIds(table.numbering)
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
            targets = decode_batch(batch.targets, self.token_ids, self._table.temperatures, self.loss, self._max_k)
        positions = max(1, batch.global_positions)
        loss = distillation_loss(
            hidden,
            head.weight,
            batch.next_ids,
            targets,
            self.loss,
            bias=head.bias,
            vocabulary_size=min(len(self.token_ids), len(head.weight)),  # a smaller student lacks only unused ids
            soft_cap=head.soft_cap,
            logit_scale=head.scale,
            normalizer=positions,
        )
        return loss.total, torch.stack([loss.hard, loss.soft]).float() / positions

    def measured(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The student's metrics on these batches, by name in the curves."""
        found = means(self.student, batches, self._table)
        logs = {"eval_kl": found["forward_kl"], "eval_cross_entropy": found["cross_entropy"]}
        if not isnan(found["agreement"]):
            logs["eval_agreement"] = found["agreement"]
        return logs


@dataclass(frozen=True)
class HeldOutPositions:
    """The ``HeldOut`` of a table of positions."""

    holdout: Holdout
    tokenizer: Any
    sizes: NDArray[np.int64]
    """(V,) bytes of text that each token id stands for."""
    unit = "positions"

    @cached_property
    def sample(self) -> HeldOutBatch:
        """A batch to show places of."""
        batches = self.holdout.batches(partings.BATCH_TOKENS, packing=False)
        return next(held for held in batches if len(held.batch.positions))

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.holdout.positions

    def measure(
        self,
        model: PreTrainedModel,
        student: TrainedStudent,
        batch_tokens: int,
        done: Callable[[int], object],
        unfinished: Unfinished,
    ) -> "MeasuredStudent":
        """See ``HeldOut``."""
        holdout = self.holdout
        sums, kept = empty_sums(holdout.groups), unfinished.restore()
        start = int(kept.pop(_ROW_GROUPS, 0))
        sums.values.update(kept)
        done(int(sums.values["overall"][0, QUANTITIES.index("positions")]))

        def after(held: HeldOutBatch) -> None:
            done(len(held.batch.positions))
            if held.done is not None:
                unfinished.save({**sums.values, _ROW_GROUPS: np.array(held.done)})

        batches = holdout.batches(batch_tokens, separates(model), start)
        measure(model, batches, holdout.table, self.sizes, sums, after)
        unfinished.save({**sums.values, _ROW_GROUPS: np.array(_ALL)})
        average = isinstance(holdout.table, View) and holdout.table.average
        found = Measurement(sums, effective(holdout.document_positions), average)
        return MeasuredStudent(
            student=student,
            metrics=found.metrics(holdout.sequences, len(holdout.document_positions), holdout.groups),
            teacher=found.teacher(holdout.groups),
            overall=found.overall,
            likeliest=partings.of_student(model, self.sample, holdout.table),
        )

    def results(self, measured: "MeasuredStudent") -> dict[str, float]:
        """See ``HeldOut``."""
        return results_of(measured.metrics)

    def report(
        self,
        header: Header,
        teacher: NamedTeacher,
        students: Sequence["MeasuredStudent"],
        gap: Gap | None,
        folder: Path,
    ) -> EvaluationReport:
        """See ``HeldOut``."""
        holdout = self.holdout
        names, overall = [each.student.name for each in students], [each.overall for each in students]
        comparisons = compared(names, overall)
        closed = gaps_closed(names, overall, gap)
        report = Report(
            **vars(header),
            sequences=holdout.sequences,
            positions=holdout.positions,
            documents=len(holdout.document_positions),
            left_out=holdout.left_out,
            left_out_documents=holdout.left_out_documents,
            teacher=TeacherSummary(**vars(teacher), metrics=students[0].teacher),
            students=tuple(StudentSummary(**vars(each.student), metrics=each.metrics) for each in students),
            comparisons=comparisons,
            places=partings.places(
                self.sample,
                partings.of_teacher(self.sample, holdout.table),
                [each.likeliest for each in students],
                self.tokenizer,
            ),
            gap=gap,
            standings=standings_of(
                names,
                [each.metrics.kl for each in students],
                comparisons,
                closed,
                [each.student.use for each in students],
                apart={each.student.name for each in students if each.student.kind == "teacher"},
            ),
        )
        return EvaluationReport.of(report, *write(to_html(report), to_json(report), folder))


@dataclass(frozen=True)
class MeasuredStudent:
    """A student with its metrics; the sums of the groups, which they come from, are no longer kept."""

    student: TrainedStudent
    metrics: Metrics
    teacher: TeacherMetrics
    """Of the same positions."""
    overall: Cell
    """The sums over all positions, to compare it with other students."""
    likeliest: Likeliest
    """Its likeliest tokens in the sample."""


def _evaluation(table: AnyTable, stream: StreamConfig) -> list[Batch]:
    """The first held-out batches, in the table's order; empty if nothing is held out."""
    try:
        holdout = Holdout.of(table)
    except (AccessError, IntegrityError):
        raise
    except TableError:
        return []
    batches = holdout.batches(stream.max_length, stream.packing)
    return [held.batch for held in islice(batches, max(1, EVAL_TOKENS // stream.max_length))]
