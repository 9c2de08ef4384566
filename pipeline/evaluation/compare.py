"""Ranks students that were trained on the same table, on one version of it."""

from pathlib import Path

from softlabel.pipeline.config.evaluate import CompareConfig
from softlabel.pipeline.evaluation.evaluate import EvaluatePreview, evaluate, preview_evaluate
from softlabel.pipeline.evaluation.provenance import read_student
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.report.scores import EvaluationReport
from softlabel.pipeline.progress import Watch, unwatched
from softlabel.pipeline.students.record import RECORD
from softlabel.storage.errors import UsageError


def compare(config: CompareConfig, watch: Watch = unwatched) -> EvaluationReport | ClassEvaluation:
    """Measure students on a table's eval split, and rank them by their distance from the teacher.

    Raises:
        TableError, StudentError, UsageError: as ``evaluate`` does.
        UsageError: if no table is given, and the students were trained on different ones or none.
    """
    return evaluate(_with_table(config), watch)


def preview_compare(config: CompareConfig) -> EvaluatePreview:
    """What ``compare`` would do; see ``evaluate.preview_evaluate``."""
    return preview_evaluate(_with_table(config))


def _with_table(config: CompareConfig) -> CompareConfig:
    return config.model_copy(update={"table": config.table or trained_on(config)})


def trained_on(config: CompareConfig) -> str:
    """TABLE@version that the students were trained on: the newest, if they differ only in the version.

    Raises:
        StudentError: if a student's record can't be read.
        UsageError: if they were trained on different tables, or none of the models is a student.
    """
    folders = [folder for folder in map(Path, config.models) if (folder / RECORD).exists()]
    tables = [read_student(folder).table for folder in folders]
    locations = list(dict.fromkeys(table.location for table in tables))
    if len(locations) != 1:
        raise UsageError(
            "the students do not say on which table to compare them",
            expected="table, or students that were all trained on the same one",
            found=" and ".join(f"trained on {location}" for location in locations)
            or "no student that softlabel trained",
            do="name a table with --table",
        )
    return f"{locations[0]}@{max(table.version for table in tables)}"
