"""The model card of a student, written from its record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.students.record import SourceRecord, StudentRecord, TeacherRecord

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [distillation, softlabel]
---

# {name}

A student model with {parameters:,} parameters, distilled by softlabel from a teacher's soft labels.

{facts}

softlabel.json records every setting, the hashes of the source files, the table's provenance and the training curve.
"""


def model_card(record: StudentRecord, task: str) -> str:
    """README.md of a student.

    Args:
        record: the student's record.
        task: what the model does, in the terms of its hub: text-generation or text-classification.
    """
    facts = {
        "from": None if record.source is None else _origin(record.config.student, record.source),
        "teacher": ", ".join(map(_named, record.teachers)) or "not named in the table's history",
        "table": record.table.in_words,
        "loss": record.objective,
        "trained in several runs": ", then ".join(record.runs_in_words) or None,
        **{name.replace("_", " "): f"{value:.4g}" for name, value in record.last_evaluation.items()},
    }
    return _TEMPLATE.format(
        task=task,
        name=Path(record.config.output).name,
        parameters=record.parameters,
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None),
    )


def _origin(student: StudentConfig, source: SourceRecord) -> str:
    named = _named(source)
    if student.config is not None:
        named = f"random weights, with the configuration of {named}"
    for name in ("layers", "depth", "intermediate_size", "labels"):
        if value := getattr(student, name):
            named += f", {name.replace('_', ' ')} {_in_words(value)}"
    if student.lora_r is not None:
        named += f", LoRA of rank {student.lora_r}, alpha {student.lora_alpha:g}"
    return named


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _named(model: SourceRecord | TeacherRecord) -> str:
    return f"{model.name} at {model.commit}" if model.commit else model.name
