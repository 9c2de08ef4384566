"""What one training run does: everything that its settings name, found, opened and checked once, before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.loss.targets import Target
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.objectives.objective import Objective
from softlabel.pipeline.students.compatibility import require_same_tokens_elsewhere
from softlabel.pipeline.students.folder import RUN, Standing, StudentFolder, run_record
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.record import Cursor, RunRecord, read_record
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.students.trackers import require_trackers
from softlabel.storage.views.view import AnyTable


@dataclass(frozen=True)
class TrainingJob:
    """A training run that can start, or go on."""

    config: TrainConfig
    folder: StudentFolder
    table: AnyTable
    """At the version that the run reads."""
    objective: Objective
    target: Target | None
    """Target of the soft loss; None if there is none, or for a classifier."""
    source: StudentSource
    record: RunRecord
    """What the student is made from, as its record will say."""
    standing: Standing
    """How far the training has come."""
    start: Cursor
    """Position in the stream from which on the student is trained."""

    @property
    def checkpoint(self) -> Path | None:
        """Checkpoint that the training goes on from; None if it begins."""
        return self.standing.checkpoint

    @property
    def steps_before(self) -> int:
        """Steps of the finished runs before this one."""
        return self.record.runs[-1].last_step if self.record.runs else 0

    @classmethod
    def resolve(cls, config: TrainConfig, folder: StudentFolder, table: AnyTable, standing: Standing) -> Self:
        """Decide on the objective, find the student's source, and compare both with the run so far.

        Args:
            config: the settings.
            folder: the student's folder.
            table: from ``StudentFolder.open_table``.
            standing: from ``StudentFolder.standing``.

        Raises:
            UsageError: if the loss can't be computed from the table, if the source has changed since the run began, or
                if a tracker is not installed.
            StudentError: if the source can't be found, or transformers would split text differently for its students.
        """
        require_trackers(config.optimizer.report_to, "optimizer.report_to")
        origin = Origin.of(table)
        objective = objective_of(origin)
        target = objective.require_loss(config)
        source = StudentSource.find(config.student, origin)
        folder.require_source(source, standing)
        require_same_tokens_elsewhere(source, origin)
        record = run_record(config, table, source, target, standing.runs)
        start = Cursor() if standing.checkpoint is None else read_record(standing.checkpoint / RUN, RunRecord).cursor
        return cls(config, folder, table, objective, target, source, record, standing, start)
