"""A student's folder, which appears only when it is complete, and the folder of its unfinished run.

    STUDENT/                   model, tokenizer, README.md (model card), softlabel.json (record of the training),
                               and tensorboard/, if it was asked for
    STUDENT/training-state/    checkpoint of the last step, and the best weights if these were kept: a longer training
                               goes on from there. Nothing else needs it
    STUDENT.training/          until it is finished: its last checkpoints, each with the settings of its run
                               (run.json), and the best weights so far
    .STUDENT.softlabel.lock    held by the process that trains it

Decides whether a run is new, is resumed, takes a finished student further, or is already finished, and refuses to mix
two runs. Never trains.
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from softlabel.pipeline.config.base import summary
from softlabel.pipeline.config.flags import as_flag
from softlabel.pipeline.config.train import SOURCES, OptimizerConfig, TrainConfig
from softlabel.pipeline.loss.targets import Target
from softlabel.pipeline.models.pretrained import keep_rules, load_tokenizer
from softlabel.pipeline.students.manifest import problem_of
from softlabel.pipeline.students.model_card import model_card
from softlabel.pipeline.students.origin import KnownTeacher
from softlabel.pipeline.students.record import (
    RECORD,
    R,
    RunRecord,
    StudentRecord,
    TeacherRecord,
    TrainingRun,
    flatten,
    read_record,
    table_record,
)
from softlabel.pipeline.students.serving import write_older_names
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.students.trackers import TENSORBOARD
from softlabel.storage.errors import StudentError, TrainingError, UsageError
from softlabel.storage.places import durable
from softlabel.storage.records.versions import parse
from softlabel.storage.views.view import AnyTable, open_table

RUN = "run.json"
"""File in each checkpoint: the record of its run, and the position in its stream."""
STATE = "training-state"
"""Folder in that of a finished student, with the state of its last step."""
_LENGTH = {"optimizer.max_steps", "optimizer.num_train_epochs"}
"""Settings with which a finished student is trained further."""
_MAY_CHANGE = {
    *("output", "table", "student.revision"),  # table and source are compared by content
    *(
        "stream.micro_batch_size",
        "optimizer.device",
        "optimizer.processes",
        "optimizer.sharding",
        "optimizer.save_steps",
        "optimizer.gradient_checkpointing",
        "optimizer.report_to",
    ),
}
"""Settings that affect where and how fast a student is trained, and what is shown meanwhile, but not the result."""
_NOT_TAKEN = {"optimizer.device", "optimizer.processes", "student.revision"}
"""Settings that a training that goes on does not take from the record."""


@dataclass(frozen=True)
class Standing:
    """How far the training has come that some settings ask for."""

    finished: StudentRecord | None = None
    """The student that is there, if there is nothing to train: these settings ask for it, or it has to be refused."""
    earlier: StudentRecord | None = None
    """The finished student that is trained further."""
    unfinished: RunRecord | None = None
    """The run that goes on."""
    checkpoint: Path | None = None
    """Checkpoint that the training goes on from: of the unfinished run, or else the state of the earlier student."""

    @property
    def recorded(self) -> StudentRecord | RunRecord | None:
        """What is there and has to be the same; None for a new student."""
        return self.finished or self.unfinished or self.earlier

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        """The runs of the student that is trained further."""
        return self.earlier.runs if self.earlier else ()


_NEW = Standing()


@dataclass(frozen=True)
class StudentFolder:
    """A student's folder and its unfinished run."""

    path: Path

    @property
    def run(self) -> Path:
        """Folder of the unfinished run."""
        return self.path.with_name(f"{self.path.name}.training")

    @property
    def scratch(self) -> Path:
        """Folder in which checkpoints and the student are written until they are complete."""
        return self.run / "scratch"

    @property
    def curves(self) -> Path:
        """Folder of TensorBoard's curves; a resumed run draws all of them again."""
        return self.scratch / TENSORBOARD

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the unfinished run goes on from: the last that is whole. None without one."""
        return self._newest_first[0]

    @cached_property
    def _newest_first(self) -> tuple[Path | None, dict[Path, str]]:
        """The last whole checkpoint when this was first asked, and the problem of each one after it."""
        problems: dict[Path, str] = {}
        for checkpoint in reversed(checkpoints(self.run)):
            problem = problem_of(checkpoint)
            if problem is None:
                return checkpoint, problems
            problems[checkpoint] = problem
        return None, problems

    def finished(self) -> StudentRecord | None:
        """Record of the finished student; None if it is not finished."""
        return _record_at(self.path / RECORD, StudentRecord)

    def complete(self, config: TrainConfig) -> TrainConfig:
        """The settings with nothing left out: from the student's record so far, if there is one, else the defaults.

        The device and the number of processes have their defaults: this may be another machine.

        Raises:
            UsageError: if they contradict each other, or something else has the name of one of the folders.
        """
        self._require_folders()
        finished, unfinished = self.finished(), self._unfinished()
        goes_further = finished is not None and unfinished is not None and unfinished.runs == finished.runs != ()
        recorded = unfinished if goes_further else finished or unfinished
        try:
            return (config if recorded is None else _taking(config, recorded)).completed()
        except ValidationError as invalid:
            raise UsageError(
                summary(invalid),
                where=None if recorded is None else f"{self.path} (settings that you leave out come from its record)",
            ) from None

    def has_work(self, config: TrainConfig) -> bool:
        """Whether these settings may ask for steps that are not done; ``standing`` knows, but reads more.

        Raises:
            UsageError: if something else has the name of one of the folders.
        """
        self._require_folders()
        finished = self.finished()
        if finished is None:
            return True
        config = self.complete(config)
        return bool(_changed(finished.config, config)) and (
            self.run.is_dir() or _goes_further(finished, config.optimizer)
        )

    def standing(self, config: TrainConfig) -> Standing:
        """How far the training has come that these settings ask for.

        Raises:
            UsageError: if something else has the name of one of the folders.
            StudentError: if a record can't be read; or if a finished student should be trained further, and the state
                of its training was not kept.
        """
        self._require_folders()
        finished, unfinished = self.finished(), self._unfinished()
        if finished is None:
            return Standing(unfinished=unfinished, checkpoint=self.checkpoint)
        changed = _changed(finished.config, config)
        if not changed:
            return Standing(finished=finished)
        if unfinished is not None and unfinished.runs and unfinished.runs == finished.runs:
            return Standing(earlier=finished, unfinished=unfinished, checkpoint=self.checkpoint)
        if changed.keys() <= _LENGTH and _goes_further(finished, config.optimizer):
            return Standing(earlier=finished, checkpoint=self._kept(finished))
        return Standing(finished=finished)

    def _require_folders(self) -> None:
        if self.run.is_symlink():
            raise UsageError(
                "the folder for this student's checkpoints is a link, and softlabel does not write through links",
                expected="a folder that softlabel made, or nothing",
                found="a link",
                where=self.run,
                do="remove the link, or choose another output",
            )
        if file := next((path for path in (self.path, *self.path.parents) if path.is_file()), None):
            raise UsageError(
                "there is a file where the output folder should be",
                expected="a folder for the student, new or made by softlabel",
                found=f"the file {file}",
                where=self.path,
                do="choose another output",
            )

    def _kept(self, finished: StudentRecord) -> Path:
        """The checkpoint of a finished student's last step."""
        checkpoint = newest_checkpoint(self.path / STATE)
        problem = "no checkpoint" if checkpoint is None else problem_of(checkpoint)
        if checkpoint is None or problem is not None:
            raise StudentError(
                "this student can't be trained further, because the state of its training is missing or damaged",
                expected=f"weights and optimizer state of step {finished.last_step}, which softlabel keeps "
                "with each finished student",
                found=problem,
                where=self.path / STATE,
                do="restore that folder from a copy; or train a new student in another folder: from the beginning, or "
                f"from this student's weights, with student.model {self.path}",
            )
        return checkpoint

    def begin_run(self, standing: Standing) -> None:
        """Copy what a run needs besides its checkpoint, if it begins to take a finished student further."""
        if standing.earlier is None or standing.unfinished is not None:
            return
        shutil.rmtree(self.run, ignore_errors=True)
        durable.make_folder(self.scratch)
        for best in (self.path / STATE).glob("best-*"):
            durable.publish(shutil.copytree(best, self.scratch / best.name), self.run / best.name)

    def open_table(self, config: TrainConfig, standing: Standing) -> AnyTable:
        """The table that this run reads: at the version of the unfinished run, if there is one.

        Raises:
            UsageError: if the folder holds anything other than a student with these settings, finished or not.
        """
        location = config.table
        if standing.unfinished is not None and parse(location)[1] is None:
            location = f"{location}@{standing.unfinished.table.version}"
        table = open_table(location)
        if standing.recorded is not None:
            self._require_same(standing, config, table)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UsageError(
                "the output folder already holds other files",
                expected="an empty or new folder, or a student trained with these settings",
                found=", ".join(sorted(path.name for path in self.path.iterdir())[:5]),
                where=self.path,
                do="choose another output",
            )
        return table

    def require_source(self, source: StudentSource, standing: Standing) -> None:
        """Refuse to resume, or return as finished, a student that was made from other files.

        Raises:
            UsageError: with the files that differ.
        """
        recorded = standing.recorded
        if recorded is not None and recorded.source is not None:
            before, folder = recorded.source.files, source.path if source.path.is_dir() else source.path.parent
            changed = [name for name, hash in source.files.items() if before.get(name) != hash]
            self._refuse([f"{folder / name}: its content has changed" for name in changed], standing)

    def recover(self) -> None:
        """Let a finished student replace the one before, if a kill came between its completion and that."""
        if self._complete.is_dir() and not self.run.is_symlink():
            self._put_in_place()

    def clear(self, standing: Standing = _NEW) -> None:
        """Delete files that no run goes on from; warn of damaged checkpoints among them.

        These are the half-written files of a killed run or, once the student is finished, all files of its run. A run
        that takes the student further stays, even if these settings don't ask for it.
        """
        finished = self.finished()
        if finished is not None and standing.earlier is None:
            unfinished = self._unfinished()
            if self.run.is_dir() and (unfinished is None or unfinished.runs != finished.runs or not finished.runs):
                durable.sync_names(self.path)  # a killed process may have renamed the student, and no more than that
                shutil.rmtree(self.run, ignore_errors=True)
            return
        whole, problems = self._newest_first
        beginning = "the beginning" if standing.earlier is None else f"step {standing.earlier.last_step}"
        for checkpoint, problem in problems.items():
            warnings.warn(
                f"{checkpoint} is damaged or incomplete, and is skipped: {problem}.\n"
                f"Training continues from {whole.name if whole else beginning}.",
                stacklevel=3,
            )
            with self.writing():
                durable.remove_folder(checkpoint, self.scratch)
        shutil.rmtree(self.scratch, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of writing a student into a TrainingError.

        Raises:
            TrainingError: if the disk is full or the folder can't be written.
        """
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save raises a bare RuntimeError if it can't write, with the name of torch's own source file.
            from_library = isinstance(error, SafetensorError) or "inline_container" in str(error)
            if not from_library and getattr(error, "errno", None) is None:
                raise
            raise TrainingError(
                "the student can't be written; its last checkpoint, if there is one, is complete",
                expected="a writable folder, on a disk with free space",
                found=str(error).splitlines()[0],
                where=self.path,
                do="free some space or fix the permissions, then run the same command again",
            ) from error

    def finish(self, student: PreTrainedModel, tokenizer: Path, record: StudentRecord, task: str, state: Path) -> None:
        """Write the finished student, move it into place, and delete its run once the student is durable.

        Args:
            student: the model with its final weights.
            tokenizer: folder of the tokenizer.
            record: the student's record.
            task: what the model does: see ``model_card``.
            state: checkpoint of the last step, in ``scratch``.
        """
        complete = self.scratch / "student"
        student.save_pretrained(complete)
        (complete / STATE).mkdir()
        state.rename(complete / STATE / state.name)
        for best in self.run.glob("best-*"):
            shutil.copytree(best, complete / STATE / best.name)
        if self.curves.is_dir():
            self.curves.rename(complete / self.curves.name)
        shutil.copytree(tokenizer, complete, dirs_exist_ok=True)
        keep_rules(complete, load_tokenizer(tokenizer))
        write_older_names(complete)
        (complete / "README.md").write_text(model_card(record, task), encoding="utf-8")
        (complete / RECORD).write_text(record.to_json(), encoding="utf-8")
        if self.finished() is None:
            durable.publish(complete, self.path)
            shutil.rmtree(self.run)
        else:
            durable.publish(complete, self._complete)
            self._put_in_place()

    @property
    def _complete(self) -> Path:
        """A student that is complete and durable, and only has to replace another one; it does so even after a kill."""
        return self.run / "student"

    def _put_in_place(self) -> None:
        durable.replace_folder(self._complete, self.path, self.scratch)
        durable.remove_folder(self._complete, self.scratch)
        shutil.rmtree(self.run)

    def _unfinished(self) -> RunRecord | None:
        """Record of the run in its last complete checkpoint; None without one."""
        checkpoint = self.checkpoint
        return _record_at(checkpoint / RUN, RunRecord) if checkpoint else None

    def _require_same(self, standing: Standing, config: TrainConfig, table: AnyTable) -> None:
        recorded = standing.recorded
        assert recorded is not None
        changed = _changed(recorded.config, config)
        if recorded is standing.earlier:
            changed = {name: values for name, values in changed.items() if name not in _LENGTH}
        differences = [
            f"{name}: {before} then, {now} now (to match: {as_flag(name, before)})"
            for name, (before, now) in changed.items()
        ]
        if recorded.source is None:
            differences.append("an earlier version of softlabel made it, and did not record from which files")
        then = recorded.table
        if then.content != table.content:
            differences.append(f"table: {then.location}@{then.version} then, {table.place.address}@{table.version} now")
        self._refuse(differences, standing)

    def _refuse(self, differences: Sequence[str], standing: Standing) -> None:
        if differences:
            finished = standing.unfinished is None
            raise UsageError(
                f"the output already holds {'a' if finished else 'an unfinished'} student that was made differently",
                expected="the same settings, files and table version, or a new folder",
                found="\n               ".join(differences),
                where=self.path if finished else self.run,
                do="choose another output, or delete that folder; to train on the same version of "
                "the table as before, write TABLE@VERSION; to train a finished student further, give it a larger "
                "optimizer.max_steps or optimizer.num_train_epochs and change nothing else",
            )


def _changed(before: TrainConfig, now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that affect the student and differ, by name, with both values."""
    old, new = (flatten(each.model_dump(mode="json")) for each in (before, now))
    return {name: (old[name], new[name]) for name in new if name not in _MAY_CHANGE and old[name] != new[name]}


def _goes_further(finished: StudentRecord, now: OptimizerConfig) -> bool:
    """Whether the length that the settings ask for is beyond that of a finished training, as far as they show it."""
    before = finished.config.optimizer
    if now.max_steps is not None:
        return now.max_steps > max(finished.last_step, before.max_steps or 0)
    return before.max_steps is not None or now.num_train_epochs > before.num_train_epochs


def _taking(config: TrainConfig, recorded: StudentRecord | RunRecord) -> TrainConfig:
    """The settings, with those that are left out from a student's record; a hub model stays at its commit."""
    sections = {}
    # Steps replace epochs, so who gives epochs has not left out how long to train.
    apart = {*_NOT_TAKEN, "optimizer.max_steps"} if config.optimizer.gives("num_train_epochs") else _NOT_TAKEN
    for section in ("student", "loss", "stream", "optimizer"):
        values = dict(getattr(recorded.config, section))
        taken = {name: values[name] for name in values if f"{section}.{name}" not in apart}
        sections[section] = getattr(config, section).taking(taken)
    given, before = config.student, recorded.config.student
    if any(given.gives(name) and getattr(given, name) != getattr(before, name) for name in SOURCES):
        sections["student"] = given  # made from something else: refused with each difference
    elif recorded.source is not None and (before.model or before.teacher or before.config):
        sections["student"] = sections["student"].taking({"revision": recorded.source.commit})
    return config.model_copy(update=sections)


def newest_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run; None without one."""
    return next(reversed(checkpoints(run)), None)


def best_weights(run: Path, step: int) -> Path:
    """Folder of the best weights, which the run had at a step."""
    return run / f"best-{step}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    return sorted(run.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps at which a checkpoint was taken."""
    return int(checkpoint.name.rpartition("-")[2])


def run_record(
    config: TrainConfig, table: AnyTable, source: StudentSource, target: Target | None, runs: tuple[TrainingRun, ...]
) -> RunRecord:
    """Record of what a student is made from.

    Args:
        config: the settings.
        table: the table version that it is trained on.
        source: the files that it starts from.
        target: target of the soft loss; None if there is none, or for a classifier.
        runs: the runs before this one.
    """
    return RunRecord(
        config=config,
        objective=config.loss.in_words(target),
        source=source.record,
        teachers=tuple(_teacher_record(teacher) for teacher in source.origin.teachers()),
        table=table_record(table),
        runs=runs,
    )


def _teacher_record(teacher: KnownTeacher) -> TeacherRecord:
    """Entry for a teacher in a student's record."""
    name = teacher.name if teacher.files else "the documents' labels"
    return TeacherRecord(name=name, commit=teacher.commit)


def _record_at(path: Path, kind: type[R]) -> R | None:
    """The record in a file; None if the file does not exist."""
    try:
        return read_record(path, kind)
    except FileNotFoundError:
        return None
