"""The stages of ``distill``: which settings each of them gets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.distillation import distill_in_stages


def test_students_and_report_are_named_by_the_version_that_the_capture_leaves(
    tiny_teacher: Path, documents: Path, tmp_path: Path
) -> None:
    config = DistillConfig.model_validate(
        {
            "documents": str(documents),
            "table": str(tmp_path / "table"),
            "output": str(tmp_path / "runs" / "{version}"),
            "teacher": {"model": str(tiny_teacher)},
            "student": {"layers": [0]},
        }
    )
    calls: list[Any] = []

    def train(settings: Any) -> Any:
        calls.append((settings.table, settings.output))
        return settings.output

    def evaluate(settings: Any) -> Any:
        calls.append((settings.table, settings.report, *settings.students))

    captured: Any = SimpleNamespace(table=config.table, version=7)
    distill_in_stages(config, capture=lambda _: captured, train=train, evaluate=evaluate)
    table, runs = f"{tmp_path}/table@7", f"{tmp_path}/runs/7"
    students = (f"{runs}/student", f"{runs}/control")
    assert calls == [*((table, student) for student in students), (table, f"{runs}/report", *students)]
