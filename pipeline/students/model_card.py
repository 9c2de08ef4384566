"""The model card of a student, written from its softlabel.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-{task}
tags: [distillation, softlabel]
---

# {name}

A student model with {parameters:,} parameters, distilled by softlabel from a teacher's soft labels.

{facts}

softlabel.json records every setting, the hashes of the source files, the table's provenance and the training curve.
"""


def model_card(record: Mapping[str, Any]) -> str:
    """README.md for the content of softlabel.json."""
    config, table = record["config"], record["table"]
    teachers = ", ".join(_named(teacher) for teacher in record["teachers"])
    facts = {
        "from": _origin(config["student"], record["source"]),
        "teacher": teachers or "not named in the table's history",
        "table": _described(table),
        "loss": record["objective"],
        **{name.replace("_", " "): f"{value:.4g}" for name, value in last_evaluation(record).items()},
    }
    classes = table.get("identity", {}).get("classes")
    return _TEMPLATE.format(
        task="generation" if classes is None else "classification",
        name=Path(config["output"]).name,
        parameters=record["parameters"],
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
    )


def last_evaluation(record: Mapping[str, Any]) -> dict[str, float]:
    """Step and metrics of the last evaluation up to the student's final weights; empty without one."""
    evaluated = [entry for entry in record["history"] if "eval_kl" in entry and entry["step"] <= record["step"]]
    return dict(evaluated[-1]) if evaluated else {}


def _origin(student: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    named = _named(source)
    if student["config"] is not None:
        named = f"random weights, with the configuration of {named}"
    for name in ("layers", "depth", "intermediate_size", "labels"):
        if student[name]:
            named += f", {name.replace('_', ' ')} {_in_words(student[name])}"
    if student["lora_r"] is not None:
        named += f", LoRA of rank {student['lora_r']}, alpha {student['lora_alpha']:g}"
    return named


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(model: Mapping[str, Any]) -> str:
    return f"{model['name']} at {model['commit']}" if model["commit"] else str(model["name"])


def _described(table: Mapping[str, Any]) -> str:
    if "tables" not in table:
        return f"{table['location']}, version {table['version']}"
    parts = (f"{part['weight']:g} x {_described(part)}" for part in table["tables"])
    return f"{table['location']}, a view ({table['how']}): {'; '.join(parts)}"
