"""Where a student lives: its folder, there whole or not at all, and beside it what an unfinished run has come to.

    STUDENT/                   model, tokenizer, README.md (model card), softlabel.json (what it was made of),
                               tensorboard/
    STUDENT.training/          its last checkpoints, each with the settings of its run (run.json), the best weights so
                               far and the curves, until it is finished
    .STUDENT.softlabel.lock    held by the process that trains it, until that ends

Decides whether a run is new, goes on, or is done already, and refuses to mix two. Never trains.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.loss.targets import Target
from softlabel.pipeline.students.model_card import model_card
from softlabel.pipeline.students.origin import Origin, Teacher
from softlabel.pipeline.students.record import flatten, read_record, settings_of
from softlabel.pipeline.students.source import Source
from softlabel.storage.errors import TrainingError, UsageError
from softlabel.storage.table import Table
from softlabel.storage.versions import parse
from softlabel.storage.views.view import AnyTable, open_table

RUN = "run.json"
"""In each checkpoint: what its run is made of, and where its stream was."""
_FREE = {
    *("output", "table", "student.revision"),  # table and source are compared by what is in them
    *(
        "stream.micro_batch_size",
        "optimizer.device",
        "optimizer.processes",
        "optimizer.sharding",
        "optimizer.save_steps",
        "optimizer.gradient_checkpointing",
    ),
}
"""Settings that say where and how fast a student is trained, and do not change what it becomes."""


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
        """Where checkpoints and the student are written before they are whole."""
        return self.run / "scratch"

    @property
    def curves(self) -> Path:
        """What TensorBoard shows of the run."""
        return self.run / "tensorboard"

    @property
    def checkpoint(self) -> Path | None:
        """The last whole checkpoint of the unfinished run."""
        return newest_checkpoint(self.run)

    def finished(self) -> dict[str, Any] | None:
        """What the finished student's softlabel.json says."""
        return _record_at(self.path / "softlabel.json")

    def open_table(self, config: TrainConfig) -> AnyTable:
        """The table that this run reads: the version that an unfinished run began with, or the one asked for.

        Raises:
            UsageError: if the folder holds anything but a student of these settings, finished or not; or if a link has
                the name of its unfinished run.
        """
        if self.run.is_symlink():
            raise UsageError(
                "the folder for this student's checkpoints is a link, and softlabel does not write through links",
                expected="a folder that softlabel made, or nothing",
                found="a link",
                where=self.run,
                do="remove the link, or choose another output",
            )
        finished, unfinished = self.finished(), self._unfinished()
        location = config.table
        if finished is None and unfinished is not None and parse(location)[1] is None:
            location = f"{location}@{unfinished['table']['version']}"
        table = open_table(location)
        recorded = finished or unfinished
        if recorded is not None:
            self._require_same(recorded, config, table)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UsageError(
                "the output folder already holds other files",
                expected="an empty or new folder, or a student trained with these settings",
                found=", ".join(sorted(path.name for path in self.path.iterdir())[:5]),
                where=self.path,
                do="choose another output",
            )
        return table

    def require_source(self, source: Source) -> None:
        """Refuse to take a student that was made from other files for one of these.

        Raises:
            UsageError: naming the files that differ.
        """
        recorded = self.finished() or self._unfinished()
        if recorded is not None:
            then, folder = recorded["source"]["files"], source.path if source.path.is_dir() else source.path.parent
            changed = [name for name, hash in source.files.items() if then.get(name) != hash]
            self._refuse([f"{folder / name}: its content has changed" for name in changed])

    def clear(self) -> None:
        """Drop what a killed run left half-written or, beside a finished student, all that it left."""
        shutil.rmtree(self.run if self.finished() else self.scratch, ignore_errors=True)

    def open_curves(self, step: int) -> SummaryWriter:
        """A writer of the curves after a step: what a killed run logged since its last checkpoint comes again."""
        # TensorBoard reads files in the order of their names, which begin with the second of their making: two runs
        # within one second, or a clock that jumped back, would have it forget the new run's points for the old one's.
        for number, file in enumerate(sorted(self.curves.glob("*tfevents*"))):
            file.rename(self.curves / f"{number:04}.tfevents")
        return SummaryWriter(str(self.curves), purge_step=step + 1 if step else 0)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say what stops a student from being written.

        Raises:
            TrainingError: if the disk is full or the folder can't be written.
        """
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            # What torch.save says of a disk has no type of its own, and names the file in which torch writes archives.
            known = isinstance(error, SafetensorError) or "inline_container" in str(error)
            if not known and getattr(error, "errno", None) is None:
                raise
            raise TrainingError(
                "the student can't be written; its last checkpoint, if there is one, is complete",
                expected="a writable folder, on a disk with free space",
                found=str(error).splitlines()[0],
                where=self.path,
                do="free some space or fix the permissions, then run the same command again",
            ) from error

    def finish(self, student: PreTrainedModel, tokenizer: Path, record: Mapping[str, Any]) -> None:
        """Put a finished student in its place, all at once, and drop what its run had come to."""
        whole = self.scratch / "student"
        student.save_pretrained(whole)
        shutil.copytree(self.curves, whole / self.curves.name, dirs_exist_ok=True)
        for weights in whole.glob("*.safetensors"):
            shutil.copymode(whole / "config.json", weights)  # safetensors leaves them to their owner alone
        shutil.copytree(tokenizer, whole, dirs_exist_ok=True)
        (whole / "README.md").write_text(model_card(record), encoding="utf-8")
        (whole / "softlabel.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole.rename(self.path)
        shutil.rmtree(self.run)

    def _unfinished(self) -> dict[str, Any] | None:
        """What the last whole checkpoint says of its run."""
        checkpoint = self.checkpoint
        return _record_at(checkpoint / RUN) if checkpoint else None

    def _require_same(self, recorded: Mapping[str, Any], config: TrainConfig, table: AnyTable) -> None:
        where = self.path if self.finished() is not None else self.run
        before, now = (flatten(each.model_dump(mode="json")) for each in (settings_of(recorded, where), config))
        names = [name for name in now if name not in _FREE and before[name] != now[name]]
        differences = [f"{name}: {before[name]} then, {now[name]} now" for name in names]
        if "source" not in recorded:
            differences.append("an earlier version of softlabel made it, and did not record from which files")
        then = recorded["table"]
        if then["content"] != table.content:
            differences.append(
                f"table: {then['location']}@{then['version']} then, {table.place.address}@{table.version} now"
            )
        self._refuse(differences)

    def _refuse(self, differences: Sequence[str]) -> None:
        if differences:
            finished = self.finished() is not None
            raise UsageError(
                f"the output already holds {'a' if finished else 'an unfinished'} student that was made differently",
                expected="the same settings, files and table version, or a new folder",
                found="\n               ".join(differences),
                where=self.path if finished else self.run,
                do="choose another output, or delete that folder; to keep a table version, name it as TABLE@VERSION",
            )


def newest_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    return next(reversed(checkpoints(run)), None)


def best_weights(run: Path, step: int) -> Path:
    """Folder of the weights that a run had at the step of its best evaluation."""
    return run / f"best-{step}"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, in the order of their steps."""
    return sorted(run.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint's run had done."""
    return int(checkpoint.name.rpartition("-")[2])


def run_record(config: TrainConfig, table: AnyTable, source: Source, target: Target | None) -> dict[str, Any]:
    """What a student is made of.

    Args:
        config: the settings.
        table: the version that it learns from.
        source: the files that it begins as.
        target: what the soft part of the loss compares it with, if there is a question.
    """
    return {
        "config": config.model_dump(mode="json"),
        "objective": config.loss.in_words(target),
        "source": source.record,
        "teachers": [_teacher_record(teacher) for teacher in Origin.of(table).teachers()],
        "table": table_record(table),
    }


def _teacher_record(teacher: Teacher) -> dict[str, Any]:
    """What a student's record says of who taught it."""
    return {"name": teacher.name if teacher.files else "the documents' labels", "commit": teacher.commit}


def table_record(table: AnyTable) -> dict[str, Any]:
    """What a student's record says of its table: its identity or, of a view, all that of each of the view's tables."""
    record = {"location": table.place.address, "version": table.version, "content": table.content}
    if isinstance(table, Table):
        return record | {"identity": table.identity.model_dump(mode="json")}
    parts = zip(table.tables, table.weights, strict=True)
    return record | {
        "how": table.definition.how,
        "tables": [table_record(part) | {"weight": weight} for part, weight in parts],
    }


def _record_at(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return None
