"""Compares students with their teacher on the held-out part of a table, and writes the report.

The teacher's predictions come from the table: no teacher is loaded, unless it is to be measured like a student. All
models are compared with the table before the first one is measured, so that a mismatch is found early. Never changes a
table, or of a student more than what TensorBoard shows of it.
"""

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from transformers import PreTrainedModel

from softlabel.pipeline.cards import holding
from softlabel.pipeline.config.evaluate import EvaluateConfig, TasksConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.evaluation.cost import Cost, Lengths, cost_of, hardware
from softlabel.pipeline.evaluation.provenance import is_model, other_model, read_student, stored_dtype, warnings_of
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.report.content import Header, NamedTeacher, TrainedStudent, column_costs
from softlabel.pipeline.evaluation.report.folder import REPORT_FILES, prepare
from softlabel.pipeline.evaluation.report.scores import EvaluationReport, use_of
from softlabel.pipeline.evaluation.standings import Gap
from softlabel.pipeline.evaluation.tasks import MeasuredTasks, TaskComparison, Tasks, compared_tasks
from softlabel.pipeline.evaluation.unfinished import Unfinished, finish, once
from softlabel.pipeline.log_context import about
from softlabel.pipeline.models.adapter import ADAPTER, Adapter
from softlabel.pipeline.models.context_length import configured_positions
from softlabel.pipeline.models.files import weight_files
from softlabel.pipeline.models.pretrained import load_config
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.objectives.objective import HeldOut, Objective
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.students.build import parameters
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.record import RECORD, StudentRecord
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.students.trackers import TENSORBOARD, report_results, require_trackers
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import circumstances
from softlabel.storage.reader import captured_positions
from softlabel.storage.upkeep.inspection import column_bytes, last_capture
from softlabel.storage.views.view import AnyTable, View, open_table


@dataclass(frozen=True)
class EvaluatedModel:
    """One of the models to measure: a student, or another model to compare students with."""

    student: TrainedStudent
    settings: StudentConfig
    """How to load it."""
    source: StudentSource
    adapter: Adapter | None
    """Merged into the weights after they are loaded."""
    record: StudentRecord | None = None
    """None for a model that softlabel did not train."""

    def load(self, job: "EvaluationJob") -> PreTrainedModel:
        """Load the model onto the job's device."""
        model = job.objective.build(self.settings, job.table, source=self.source)
        return (model if self.adapter is None else self.adapter.merged(model)).to(job.device)

    def report_results(self, trackers: Sequence[str], report: Path, results: Mapping[str, float]) -> None:
        """Give its results to trackers: to the run of its training or, for another model, to one of its own.

        Args:
            trackers: their names.
            report: folder of the report.
            results: from ``HeldOut.results``.
        """
        name = self.student.name
        if self.record is None:
            report_results(trackers, name, report / TENSORBOARD / quote(name, safe=""), {}, 0, results)
        else:
            ids = self.record.runs[-1].trackers if self.record.runs else {}
            curves = Path(self.student.folder) / TENSORBOARD
            report_results(trackers, name, curves, ids, self.record.step, results)

    @property
    def files(self) -> dict[str, Any]:
        """What determines its weights."""
        adapter = None if self.adapter is None else self.adapter.hash
        return {"files": self.source.files, "adapter": adapter, "dtype": self.settings.dtype}

    @property
    def weights(self) -> list[Path]:
        """Its weight files."""
        return weight_files(self.source.path) + ([] if self.adapter is None else [self.adapter.weights])


@dataclass(frozen=True)
class EvaluationJob:
    """What one evaluation does: everything that its settings name, found and opened once."""

    config: EvaluateConfig
    table: AnyTable
    """At the version that is evaluated on."""
    objective: Objective
    models: tuple[EvaluatedModel, ...]
    lengths: Lengths
    """Of the runs that measure the cost of each model."""
    tasks: Tasks | None
    """None if the settings ask for none."""
    device: str

    @classmethod
    def resolve(cls, config: EvaluateConfig) -> Self:
        """Open the table, and find the files of all models.

        Raises:
            UsageError: if there is no student, a tracker is not installed, the cost of a model can't be measured with
                the given lengths, or a task can't be run.
            TableError: if the table can't be opened.
            StudentError: if a model does not exist, has another tokenizer than the table, or was trained with another
                teacher.
        """
        if not config.students:
            raise UsageError(
                "there is no student to evaluate", expected="students: at least one folder", found="students: []"
            )
        require_trackers(config.report_to, "report_to")
        table = open_table(config.table)
        origin = Origin.of(table)
        objective = objective_of(origin)
        named = zip(config.models, _names(config.models), strict=True)
        models = tuple(_model(name, folder, table, origin, objective) for folder, name in named)
        lengths = Lengths.fitting(config.cost, _limits(models, origin, objective), objective.task == "text-generation")
        where = str(device(config.device))
        return cls(config, table, objective, models, lengths, _tasks(config.tasks, origin, objective), where)

    def unfinished(self, model: EvaluatedModel, folder: Path) -> Unfinished:
        """Where a model's measurements are kept until the report is written."""
        depends_on = {"table": self.table.content, "model": model.files, "by": self.config.by, "device": self.device}
        return Unfinished.of(folder, depends_on)


@dataclass(frozen=True)
class EvaluatePreview:
    """What an evaluation would do."""

    table: str
    version: int
    students: tuple[str, ...]
    """Names in the report."""
    warnings: dict[str, tuple[str, ...]]
    """What the report would say about each student's comparability."""
    held_out: int
    """How much each student would be measured on, ..."""
    unit: str
    """... in positions or documents."""
    tasks: tuple[str, ...]
    """Tasks of lm-eval that each student would also be measured on."""
    device: str
    files: tuple[str, ...]
    """Files that would be written."""
    replaced: tuple[str, ...]
    """Those of them that exist already."""
    dry_run: Literal[True] = True


def preview_evaluate(config: EvaluateConfig) -> EvaluatePreview:
    """What ``evaluate`` would do; nothing is written, and no student is loaded.

    Raises:
        SoftlabelError: as ``evaluate`` does before it loads a student.
    """
    job = EvaluationJob.resolve(config)
    held_out = job.objective.held_out(job.table, [model.settings for model in job.models], config.by)
    folder = prepare(Path(config.report), job.table.location, config.models, dry_run=True)
    files, students = [folder / name for name in REPORT_FILES], [model.student for model in job.models]
    return EvaluatePreview(
        table=job.table.location,
        version=job.table.version,
        students=tuple(student.name for student in students),
        warnings={student.name: student.warnings for student in students if student.warnings},
        held_out=held_out.size,
        unit=held_out.unit,
        tasks=() if job.tasks is None else tuple(job.tasks.loaded["tasks"]),
        device=job.device,
        files=tuple(map(str, files)),
        replaced=tuple(str(file) for file in files if file.exists()),
    )


def evaluate(config: EvaluateConfig, watch: Watch = unwatched) -> EvaluationReport | ClassEvaluation:
    """Measure students on a table's eval split and write report.html and report.json.

    An evaluation that was killed is continued by the same call. A report on another table or other students in the same
    folder is kept: then this one gets a folder of its own, with a number after the name.

    Raises:
        TableError: if the table does not exist, or has nothing to evaluate on.
        StudentError: if a student does not exist, or does not fit the table.
        UsageError: if the students can't be compared with each other, or the report can't be written.
        SoftlabelError: if a tracker does not accept the results; then the report has been written.
    """
    job = EvaluationJob.resolve(config)
    held_out = job.objective.held_out(job.table, [model.settings for model in job.models], config.by)
    folder = prepare(Path(config.report), job.table.location, config.models)
    with about(version=job.table.version), holding([job.device]):
        results = [_measure(job, held_out, model, folder, watch) for model in job.models]
    names = {model.student.folder: model.student.name for model in job.models}
    gap = None if config.control is None else Gap(names[config.control], names.get(config.reference or ""))
    header = _header(job, compared_tasks(list(names.values()), [tasks for _, tasks in results]))
    measured = [each for each, _ in results]
    report = held_out.report(header, _teacher(job.table), measured, gap, folder)
    finish(folder)
    for model, each in zip(job.models, measured, strict=True):
        model.report_results(config.report_to, folder, held_out.results(each) | use_of(each.student))
    return report


def _measure(
    job: EvaluationJob, held_out: HeldOut[Any], model: EvaluatedModel, folder: Path, watch: Watch
) -> tuple[Any, MeasuredTasks]:
    """Load a model, measure it, and forget it: on the held-out part, then what it costs to use, then on the tasks."""
    loaded = model.load(job)
    student = model.student
    if student.parameters is None:
        student = replace(student, parameters=parameters(loaded))
    done = _counting(f"evaluate {student.name}", held_out.size, held_out.unit, watch)
    measured = held_out.measure(loaded, student, job.config.batch_tokens, done, job.unfinished(model, folder))
    cost = _cost(job, model, loaded, folder)
    tasks = _measured_tasks(job, model, loaded, folder, watch)
    return replace(measured, student=replace(measured.student, cost=cost, tasks=tasks.scores)), tasks


def _tasks(config: TasksConfig, origin: Origin, objective: Objective) -> Tasks | None:
    if objective.task != "text-generation" and (config.names or config.include):
        raise UsageError(
            "tasks of lm-eval are only for language models, and this table's teacher is a classifier",
            expected="no tasks",
            found=f"tasks: {' '.join(config.names or config.include)}",
            do="leave the tasks out",
        )
    return Tasks.load(config, origin.tokenizer)


def _cost(job: EvaluationJob, model: EvaluatedModel, loaded: PreTrainedModel, folder: Path) -> Cost:
    """What it costs to use a model, measured in this run or, on the same machine, by the one that it continues."""
    runs = job.config.cost.runs if job.config.cost.measure else 0
    name, conditions = model.student.name, {"lengths": asdict(job.lengths), "runs": runs}
    machine = {"machine": platform.node(), "hardware": hardware(loaded.device)}
    depends_on = {"cost": model.files, "folder": model.student.folder, **conditions, **machine}
    return once(
        Cost,
        folder,
        depends_on,
        lambda: cost_of(loaded, name, model.weights, job.lengths, runs, job.objective.task),
    )


def _measured_tasks(
    job: EvaluationJob, model: EvaluatedModel, loaded: PreTrainedModel, folder: Path, watch: Watch
) -> MeasuredTasks:
    """A model's scores on the tasks, measured in this run or in the one that it continues."""
    tasks, name = job.tasks, model.student.name
    if tasks is None:
        return MeasuredTasks()

    def done(answered: int, asked: int) -> None:
        watch(Progress(f"tasks {name}", answered, asked, "requests"))

    depends_on = {**tasks.identity, "model": model.files, "device": job.device}
    return once(MeasuredTasks, folder, depends_on, lambda: tasks.measure(loaded, name, done))


def _model(name: str, folder: str, table: AnyTable, origin: Origin, objective: Objective) -> EvaluatedModel:
    """A student by its record; any other model, or an adapter on its base model, by its files."""
    path = Path(folder)
    if (path / RECORD).exists() or not is_model(path, folder):
        record = read_student(path)
        trained = record.config.student
        settings = StudentConfig(model=folder, dtype=trained.dtype, labels=trained.labels)
        student = TrainedStudent.of(name, folder, record, warnings_of(record, path, table))
        return EvaluatedModel(student, settings, objective.require_fitting(settings), None, record)
    adapter = Adapter.find(folder) if (path / ADAPTER).is_file() else None
    settings = StudentConfig(model=folder if adapter is None else adapter.base)
    source = objective.require_fitting(settings)
    settings = settings.model_copy(update={"dtype": stored_dtype(source.path)})
    objective.require_output_layer(source)
    return EvaluatedModel(other_model(name, folder, source, adapter, table), settings, source, adapter)


def _limits(models: Sequence[EvaluatedModel], origin: Origin, objective: Objective) -> list[tuple[str, int]]:
    """Name and number of positions of each model that has a limit; a classifier's tokenizer may know a lower one."""
    configured = [(each.student.name, configured_positions(load_config(each.source.path))) for each in models]
    found = [(name, positions) for name, positions in configured if positions is not None]
    if objective.task == "text-classification":
        longest = int(origin.tokenizer().model_max_length)
        found = [(name, min(positions, longest)) for name, positions in found]
    return found


def _counting(stage: str, total: int, unit: str, watch: Watch) -> Callable[[int], None]:
    """A function that reports progress each time that more is done."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        watch(Progress(stage, done, total, unit))

    return count


def _header(job: EvaluationJob, task_comparisons: tuple[TaskComparison, ...]) -> Header:
    lm_eval = {} if job.tasks is None else {"lm-eval": job.tasks.version}
    return Header(
        table=job.table.location,
        version=job.table.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        columns=column_costs(_column_bytes(job.table), sum(map(captured_positions, job.table.tables))),
        identity=_identity(job.table),
        circumstances=circumstances(device=job.device, **lm_eval),
        task_comparisons=task_comparisons,
        config=job.config.completed().model_dump(mode="json"),
    )


def _teacher(table: AnyTable) -> NamedTeacher:
    captures = [last_capture(part) for part in table.tables]
    names = [
        Path(capture.teacher or "teacher").name if part.identity.teacher.files else "the labels"
        for capture, part in zip(captures, table.tables, strict=True)
    ]
    parameters = {capture.parameters for capture in captures}
    different = dict.fromkeys(names)
    return NamedTeacher(
        name=" and ".join(different), parameters=parameters.pop() if len(different) == len(parameters) == 1 else None
    )


def _names(folders: tuple[str, ...]) -> list[str]:
    """Each folder's name, or its whole path if another folder has the same name."""
    names = [Path(folder).absolute().name for folder in folders]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]


def _column_bytes(table: AnyTable) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for part in table.tables:
        sizes.update(column_bytes(part))
    return dict(sizes)


def _identity(table: AnyTable) -> dict[str, Any]:
    """The identity of a table or, by name, of each table of a view."""
    if isinstance(table, View):
        named = zip(table.names, table.tables, strict=True)
        return {name: part.identity.model_dump(mode="json") for name, part in named}
    return table.identity.model_dump(mode="json")
