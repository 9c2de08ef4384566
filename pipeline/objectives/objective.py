"""What a training and an evaluation need to know about the kind of model that a table teaches.

``Objective`` is the protocol; ``language_model`` and ``classifier`` implement it, and ``decide`` chooses between the
two, once per run. Nothing else asks for the kind of a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.report.content import Header, NamedTeacher, TrainedStudent
from softlabel.pipeline.evaluation.report.scores import EvaluationReport
from softlabel.pipeline.evaluation.standings import Gap
from softlabel.pipeline.evaluation.unfinished import Unfinished
from softlabel.pipeline.loss.targets import Target
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.views.view import AnyTable


@dataclass(frozen=True)
class Trainable:
    """A student with its loss, and the batches that it is trained and evaluated on."""

    module: nn.Module
    """Student and loss in one module, with the attributes and methods of ``language_model.Distillation``."""
    dataset: Callable[..., Any]
    """Makes one rank's dataset, which has the keyword arguments and methods of ``SoftLabelDataset``."""
    evaluation: Sequence[Any]
    """Batches of the eval split, the same on each rank; if empty, nothing is evaluated during training."""


S = TypeVar("S")


class HeldOut(Protocol[S]):
    """The part of a table that students are evaluated on."""

    @property
    def unit(self) -> str:
        """What ``size`` counts: positions or documents."""

    @property
    def size(self) -> int:
        """How much there is to measure."""

    def measure(
        self,
        model: PreTrainedModel,
        student: TrainedStudent,
        batch_tokens: int,
        done: Callable[[int], object],
        unfinished: Unfinished,
    ) -> S:
        """Measure a student.

        Args:
            model: the student's model.
            student: how it was trained.
            batch_tokens: maximum tokens of a forward pass, including padding.
            done: called after each pass with how much of ``size`` it measured.
            unfinished: where measurements are kept, and where those of an evaluation that was killed are found.

        Returns:
            The student with its measurements, for ``report``.
        """

    def results(self, measured: S) -> dict[str, float]:
        """The main results of a student by name, for trackers."""

    def report(
        self, header: Header, teacher: NamedTeacher, students: Sequence[S], gap: Gap | None, folder: Path
    ) -> EvaluationReport | ClassEvaluation:
        """Write report.html and report.json.

        Args:
            header: what every report says.
            teacher: the table's teacher.
            students: from ``measure``.
            gap: the models between which it is shown how far each student gets.
            folder: the report's folder.

        Raises:
            UsageError: if they can't be written.
        """


class Objective(Protocol):
    """How models of one kind are built, trained and measured, from given soft labels.

    The soft labels may be those of a table, or those that a planned capture would make: everything that takes no table
    is possible before the capture.
    """

    @property
    def task(self) -> str:
        """What such a model does, in the terms of transformers: text-generation or text-classification."""

    def require_fitting(self, config: StudentConfig, source: StudentSource | None = None) -> StudentSource:
        """Refuse a student that can't be built, or can't be trained on these soft labels. Loads no weights.

        Args:
            config: settings of the student.
            source: the files that it is made from, if they have been found already.

        Raises:
            UsageError, StudentError: see ``students.compatibility.require_fitting``.
        """

    def require_loss(self, config: TrainConfig) -> Target | None:
        """Refuse a loss that can't be computed from these soft labels.

        Returns:
            The target of a language model's soft loss; None if there is no soft part, or for a classifier.

        Raises:
            UsageError: if the soft labels lack what the loss needs, or a setting does not apply to this kind of model.
        """

    def build(
        self, config: StudentConfig, table: AnyTable, packing: bool = False, source: StudentSource | None = None
    ) -> PreTrainedModel:
        """The student that the settings describe, on the CPU.

        Args:
            config: settings of the student.
            table: the table that it has to fit.
            packing: whether sequences will share rows, where this kind of model can have several in a row.
            source: the files that it is made from, if they have been found already.

        Raises:
            UsageError, StudentError: if it can't be built, or does not fit the table.
        """

    def trainable(
        self, config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None
    ) -> Trainable:
        """What the trainer needs to train a student on a table.

        Args:
            config: settings of the training.
            table: table or view to train on.
            student: the model to train.
            target: from ``require_loss``.

        Raises:
            TableError, UsageError: if there is nothing to train on.
        """

    def require_output_layer(self, source: StudentSource) -> None:
        """Refuse a model to evaluate that softlabel did not train, if it does not predict what the table teaches.

        Raises:
            StudentError: if it has no output layer for the table's classes.
        """

    def held_out(self, table: AnyTable, students: Sequence[StudentConfig], by: Sequence[str] = ()) -> HeldOut[Any]:
        """The part of a table to evaluate students on.

        Args:
            table: table or view to evaluate on.
            students: settings of all students, which will be measured on the same part.
            by: carried columns to group results by.

        Raises:
            TableError: if there is nothing to evaluate on.
            UsageError: if the students can't be compared with each other, or there is no such column.
        """
