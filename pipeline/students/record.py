"""Reads a student's record, with old names of settings replaced by their current ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from softlabel.pipeline.config.train import TrainConfig
from softlabel.storage.errors import UsageError
from softlabel.storage.location import require_clean

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


def read_record(path: Path) -> dict[str, Any]:
    """Read a record, with the current names of its settings.

    Args:
        path: softlabel.json of a finished student, or run.json of a checkpoint.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is not the JSON object of a record.
        UsageError: if one of its locations holds credentials.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("config", {}), dict):
        raise ValueError(f"{path.name} holds no settings")
    require_clean(record, path, "remove them from that location in the file")
    return record | {"config": _with_current_names(record.get("config", {}))}


def settings_of(record: Mapping[str, Any], where: Path) -> TrainConfig:
    """All settings of a recorded run; settings that the record lacks have their defaults.

    Args:
        record: from ``read_record``.
        where: path of the record, for the error.

    Raises:
        UsageError: if the record has a setting that this version does not know.
    """
    try:
        return TrainConfig.model_validate(record["config"])
    except ValidationError as invalid:
        names = [".".join(map(str, error["loc"])) for error in invalid.errors()]
        raise UsageError(
            "this student's record has settings that this version of softlabel does not know",
            expected="the settings of this version of softlabel",
            found=", ".join(names),
            where=where,
            do="use the version of softlabel that trained the student, or choose another output",
        ) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names: ``{"stream": {"seed": 0}}`` becomes ``{"stream.seed": 0}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in flatten(settings).items():
        *sections, last = _RENAMED.get(name, name).split(".")
        section = renamed
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
    return renamed
