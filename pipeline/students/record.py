"""The record of a student, softlabel.json, and that of an unfinished run, run.json in each of its checkpoints.

Both are JSON objects with a ``format``; those from before there were formats are read as format 1. Records of any
format may have old names of settings.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from softlabel.pipeline.config.train import TrainConfig
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.location import require_clean
from softlabel.storage.table import Table
from softlabel.storage.views.view import AnyTable, How

RECORD = "softlabel.json"
"""File of the record in a student's folder."""
FORMAT = 2
"""Format of the records that this version writes."""
_RENAMED = {
    "optimiser.epochs": "optimizer.num_train_epochs",
    "optimiser.warmup": "optimizer.warmup_ratio",
    "optimiser.schedule": "optimizer.lr_scheduler_type",
    "optimiser.max_gradient_norm": "optimizer.max_grad_norm",
    "optimiser.liger": "optimizer.use_liger_kernel",
    "optimiser.checkpoint_steps": "optimizer.save_steps",
    "optimiser.patience": "optimizer.early_stopping_patience",
    **{
        f"optimiser.{name}": f"optimizer.{name}"
        for name in (
            *("max_steps", "learning_rate", "weight_decay", "bf16", "gradient_checkpointing", "eval_steps"),
            *("keep", "device", "processes", "sharding", "seed"),
        )
    },
    "stream.row_tokens": "stream.max_length",
    "stream.batch_rows": "stream.batch_size",
    "stream.micro_rows": "stream.micro_batch_size",
    "student.lora_rank": "student.lora_r",
    "student.lora_targets": "student.lora_target_modules",
}
"""Old names of settings, in records written before 0.1.0, and their current names."""
_RENAMED_VALUES = {("loss.target", "renormalised"): "renormalized"}


class _Part(BaseModel):
    # Pydantic would show the refused input, which may contain credentials.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class SourceRecord(_Part):
    """The files that a student was made from."""

    name: str
    """Folder, file or hub name, as in the settings or the table's history."""
    commit: str | None
    """Commit of a hub model; None for a folder or file."""
    files: dict[str, str]
    """SHA-256 of the configuration and of the weights, by file name."""


class TeacherRecord(_Part):
    """A teacher of the table that a student was trained on."""

    name: str
    commit: str | None


class TableRecord(_Part):
    """The version of a table that a student was trained on."""

    location: str
    version: int
    content: str
    """``Table.content`` of that version."""
    identity: Identity

    @property
    def tables(self) -> tuple[Self, ...]:
        """The table itself; a view has several."""
        return (self,)

    @property
    def in_words(self) -> str:
        """The table as a model card names it."""
        return f"{self.location}, version {self.version}"


class WeightedTableRecord(TableRecord):
    """A table of a view."""

    weight: float


class ViewRecord(_Part):
    """The view that a student was trained on."""

    location: str
    version: int
    content: str
    """``View.content``."""
    how: How
    tables: tuple[WeightedTableRecord, ...]

    @property
    def in_words(self) -> str:
        """The view as a model card names it."""
        parts = (f"{part.weight:g} x {part.in_words}" for part in self.tables)
        return f"{self.location}, a view ({self.how}): {'; '.join(parts)}"


@dataclass(frozen=True)
class Cursor:
    """Progress of a run: all that is needed to resume it with any number of ranks and any batch size."""

    step: int = 0
    """Optimizer steps done since the first epoch began."""
    epoch: int = 0
    """Epoch of the last of these steps, from 0."""
    packs: int = 0
    """Packs of that epoch that have been trained on, over all ranks."""


class TrainingRun(_Part):
    """A finished run: the first, or one that took a finished student further."""

    first_step: int
    last_step: int
    num_train_epochs: float
    max_steps: int | None
    """Settings that said how far it should go; max_steps replaces num_train_epochs."""
    circumstances: dict[str, str] = {}
    """Library versions, device and ranks."""
    trackers: dict[str, str] = {}
    """Ids of the runs of trackers that it reported to, by tracker."""


class _Record(_Part):
    """What a student is made from."""

    format: int = FORMAT
    config: TrainConfig
    """All settings: those that the run was not given, or that an older record lacks, have their defaults."""
    objective: str
    """The loss in words."""
    source: SourceRecord | None = None
    """None if an earlier version of softlabel did not record it."""
    teachers: tuple[TeacherRecord, ...] = ()
    table: TableRecord | ViewRecord
    runs: tuple[TrainingRun, ...] = ()
    """All runs that have finished, in their order; a record of format 1 has none."""

    @field_validator("config")
    @classmethod
    def _with_every_setting(cls, config: TrainConfig) -> TrainConfig:
        return config.completed()

    @property
    def made_from(self) -> dict[str, Any]:
        """The parts that the records of a run and of its student share, by name."""
        return {name: getattr(self, name) for name in _Record.model_fields}

    def to_json(self) -> str:
        """The content of the record's file."""
        return json.dumps(self.model_dump(mode="json"), indent=2)


class RunRecord(_Record):
    """The record of an unfinished run, in one of its checkpoints."""

    cursor: Cursor = Cursor()
    """Position in the stream at which the checkpoint was taken."""

    def at(self, cursor: Cursor) -> Self:
        """The record of a checkpoint that is taken at this position."""
        return self.model_copy(update={"cursor": cursor})


class StudentRecord(_Record):
    """The record of a finished student."""

    parameters: int
    step: int
    """Optimizer step of its weights."""
    history: tuple[dict[str, int | float], ...]
    """Training and evaluation in the order of their steps: values by name, among them ``step``."""
    circumstances: dict[str, str] = {}
    """Library versions, device and ranks of its last run."""

    @property
    def runs_in_words(self) -> tuple[str, ...]:
        """The steps of each run, if there were several."""
        several = self.runs if len(self.runs) > 1 else ()
        return tuple(f"steps {run.first_step:,} to {run.last_step:,}" for run in several)

    @property
    def last_step(self) -> int:
        """Last step of the training; later than ``step`` if earlier weights were the best."""
        return int(self._trained[-1]["step"]) if self._trained else self.step

    @property
    def positions(self) -> int:
        """Number of captured positions that the final weights were trained on."""
        before = [entry["positions"] for entry in self._trained if entry["step"] <= self.step]
        return int(before[-1]) if before else 0

    @property
    def _trained(self) -> list[dict[str, int | float]]:
        return [entry for entry in self.history if "positions" in entry]

    @property
    def last_evaluation(self) -> dict[str, int | float]:
        """Step and metrics of the last evaluation up to the final weights; empty without one."""
        evaluated = [entry for entry in self.history if "eval_kl" in entry and entry["step"] <= self.step]
        return dict(evaluated[-1]) if evaluated else {}


R = TypeVar("R", bound=_Record)


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record.

    Args:
        path: softlabel.json of a finished student, or run.json of a checkpoint.
        kind: StudentRecord or RunRecord.

    Raises:
        OSError: if it can't be read.
        StudentError: if it is damaged or no record, or if a newer version of softlabel wrote it.
        UsageError: if one of its locations holds credentials, or if it has settings that this version does not know.
    """
    content = path.read_bytes()
    try:
        record = json.loads(content)
        require_clean(record, path, "remove them from that location in the file")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    written = record.get("format", 1) if isinstance(record, dict) else None
    if not isinstance(written, int) or written < 1:
        raise _damaged(path, "no known format")
    if written > FORMAT:
        raise StudentError(
            "a newer version of softlabel trained this student, and this one can't read its record",
            expected=f"a record of format {FORMAT} or older",
            found=f"format {written}",
            where=path,
            do="upgrade softlabel to the version that trained the student, or choose another student",
        )
    try:
        renamed = {**record, "config": _with_current_names(record.get("config"))}
        return kind.model_validate(renamed if written > 1 else _completed(renamed, kind))
    except ValidationError as invalid:
        raise _invalid(path, invalid) from None
    except (TypeError, AttributeError) as error:  # settings that are no settings
        raise _damaged(path, error) from None


def table_record(table: AnyTable) -> TableRecord | ViewRecord:
    """The entry for a table or a view in a student's record."""
    where = {"location": table.place.address, "version": table.version, "content": table.content}
    if isinstance(table, Table):
        return TableRecord(**where, identity=table.identity)
    parts = zip(table.tables, table.weights, strict=True)
    tables = tuple(WeightedTableRecord(**vars(table_record(part)), weight=weight) for part, weight in parts)
    return ViewRecord(**where, how=table.definition.how, tables=tables)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names: ``{"stream": {"seed": 0}}`` becomes ``{"stream.seed": 0}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _completed(record: Mapping[str, Any], kind: type[_Record]) -> dict[str, Any]:
    """A record of format 1 with only today's parts, and with a student's step, which was at first always the last."""
    known = {name: value for name, value in record.items() if name in kind.model_fields}
    if kind is StudentRecord and "step" not in known:
        history = record.get("history")
        known["step"] = history[-1].get("step", 0) if isinstance(history, list) and history else 0
    return {**known, "format": FORMAT}


def _with_current_names(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    renamed: dict[str, Any] = {}
    for name, value in flatten(settings).items():
        *sections, last = _RENAMED.get(name, name).split(".")
        section = renamed
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
    return renamed


def _invalid(path: Path, invalid: ValidationError) -> StudentError | UsageError:
    settings = [".".join(map(str, error["loc"][1:])) for error in invalid.errors() if error["loc"][0] == "config"]
    if any(settings):
        return UsageError(
            "this student's record has settings that this version of softlabel does not know",
            expected="the settings of this version of softlabel",
            found=", ".join(filter(None, settings)),
            where=path,
            do="use the version of softlabel that trained the student, or choose another output",
        )
    first = invalid.errors()[0]
    return _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _damaged(path: Path, found: object) -> StudentError:
    return StudentError(
        "this folder is not a student that softlabel trained, or its record is damaged",
        expected=f"a folder with the {path.name} that softlabel train writes",
        found=str(found).splitlines()[0],
        where=path,
        do="check the path, or restore this file from a copy; to evaluate a model trained elsewhere, first train it "
        "here with student.model",
    )
