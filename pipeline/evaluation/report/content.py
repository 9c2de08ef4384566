"""Everything that a report says: the content of report.json, whose fields are described here, in ``figures``, ``cost``
and ``tasks``.

Measures nothing, and reads neither table nor model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any, Literal, Self

from pydantic import TypeAdapter

from softlabel.pipeline.config.flags import flags_of
from softlabel.pipeline.evaluation.bootstrap import Estimate
from softlabel.pipeline.evaluation.cost import Cost
from softlabel.pipeline.evaluation.figures import Comparison, Metrics, TeacherMetrics
from softlabel.pipeline.evaluation.partings import Place
from softlabel.pipeline.evaluation.standings import Gap, Standing, Use
from softlabel.pipeline.evaluation.tasks import TaskComparison, TaskScore
from softlabel.pipeline.students.record import StudentRecord


@dataclass(frozen=True)
class NamedTeacher:
    """What the table's history says about its teacher."""

    name: str
    parameters: int | None


@dataclass(frozen=True)
class TeacherSummary(NamedTeacher):
    """The teacher's metrics on the same positions, as the table stores them."""

    metrics: TeacherMetrics


@dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """How a student was trained, and what a reader should know before comparing it."""

    name: str
    folder: str
    """Folder or, of a model trained elsewhere, maybe its name on the hub."""
    kind: Literal["student", "teacher", "other"] = "student"
    """A student that softlabel trained, the table's teacher itself, or a model trained elsewhere."""
    parameters: int | None
    objective: str
    """Description of the training loss or, for another model, of what it is."""
    history: tuple[dict[str, float], ...]
    """Training and evaluation records in the order of their steps."""
    trained_on: str | None
    """TABLE@version; None if it is not known."""
    runs: tuple[str, ...] = ()
    """The steps of each run, if there were several."""
    command: str | None = None
    """The command that trains it; None for another model."""
    config: dict[str, Any]
    circumstances: dict[str, Any]
    warnings: tuple[str, ...] = ()
    cost: Cost | None = None
    """What it costs to use; None before that is measured."""
    tasks: tuple[TaskScore, ...] = ()
    """Its scores on tasks of lm-eval."""

    @property
    def use(self) -> Use:
        """What it costs to use, to compare it with others."""
        speed = None if self.cost is None else self.cost.speed
        return Use(self.parameters, None if speed is None else speed.produced)

    @classmethod
    def of(cls, name: str, folder: str, record: StudentRecord, warnings: Sequence[str]) -> Self:
        """A student as its record describes it."""
        table = f"{record.table.location}@{record.table.version}"
        return cls(
            name=name,
            folder=folder,
            parameters=record.parameters,
            objective=record.objective,
            history=record.history,
            trained_on=table,
            command=" ".join(["softlabel train", quote(table), quote(folder), *flags_of(record.config)]),
            runs=record.runs_in_words,
            config=record.config.model_dump(mode="json"),
            circumstances=dict(record.circumstances),
            warnings=tuple(warnings),
        )


@dataclass(frozen=True, kw_only=True)
class StudentSummary(TrainedStudent):
    """One student's training and its metrics."""

    metrics: Metrics


@dataclass(frozen=True)
class ColumnBytes:
    """One column's size on disk."""

    name: str
    bytes: int
    bytes_per_position: float
    """Per captured position, over the whole table."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every report says about the table and the evaluation."""

    format: int = 1
    """Version of the report's JSON, raised when a field is dropped or changes its meaning; fields may be added."""
    table: str
    version: int
    created: str
    """Time of the evaluation, ISO 8601, UTC."""
    columns: tuple[ColumnBytes, ...]
    identity: dict[str, Any]
    """The table's identity or, by name, that of each table of a view."""
    circumstances: dict[str, Any]
    task_comparisons: tuple[TaskComparison, ...] = ()
    """Each pair of students on the same documents of each task."""
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report(Header):
    """Everything that the page shows."""

    sequences: int
    """Number of sequences evaluated."""
    positions: int
    """Number of positions evaluated."""
    documents: int
    """Number of documents evaluated."""
    left_out: int
    """Sequences of the eval split that also occur in the train split, and were not evaluated."""
    left_out_documents: int
    """Further sequences of the eval split whose document also occurs in the train split, and were not evaluated."""
    teacher: TeacherSummary
    students: tuple[StudentSummary, ...]
    comparisons: tuple[Comparison, ...]
    """Each pair of students, compared over the same documents."""
    gap: Gap | None
    standings: tuple[Standing, ...]
    """All students, the closest to the teacher first."""
    places: tuple[Place, ...]
    """Some positions at which the first student parts from the teacher."""


def column_costs(sizes: Mapping[str, int], positions: int) -> tuple[ColumnBytes, ...]:
    """Sizes by column, the largest first.

    Args:
        sizes: bytes of each column over the whole table.
        positions: captured positions of the whole table.
    """
    largest_first = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ColumnBytes(name, size, size / positions) for name, size in largest_first)


def reach(value: Estimate | None) -> float | None:
    """Half of a 95 % interval; None if there is none."""
    return None if value is None or value.interval is None else (value.interval[1] - value.interval[0]) / 2


def fixed(value: float, digits: int, like: float | None = None) -> str:
    """A number as people read it: with fewer digits if it is very large, and more if it is a distance close to 0.

    Args:
        value: the number.
        digits: after the decimal point, for most numbers.
        like: the number that it is shown beside, and has as many digits as.
    """
    size = abs(value if like is None else like)
    if size >= 1e6:
        return f"{value:.3g}"
    return f"{value:.{digits + 2 if digits > 2 and 0 < size < 0.01 else digits}f}"


def to_json(report: Report) -> bytes:
    """The report as JSON; numbers that are not finite (a perplexity that overflows) become null."""
    return TypeAdapter(Report).dump_json(report, indent=2)
