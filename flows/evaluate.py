"""The flow that compares students with their teacher, and creates artifacts for the scores and the report."""

from dataclasses import asdict
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact

from softlabel.flows.progress import watching
from softlabel.flows.retries import retrying
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report import EvaluationReport


@flow(name="evaluate", flow_run_name="evaluate {config.table}", persist_result=False)
def evaluate_flow(config: EvaluateConfig) -> EvaluationReport | ClassEvaluation:
    """Compare students with the teacher on the table's eval split, and write a report."""
    with retrying(), watching() as watch:
        report = evaluate(config, watch)
    if isinstance(report, ClassEvaluation):
        size = f"{report.documents:,} documents"
    else:
        size = f"{report.positions:,} positions"
    create_table_artifact(
        [asdict(score) for score in (report.teacher, *report.students)],
        key="students",
        description=f"Scores on {size}, held out, of {report.table}@{report.version}",
    )
    create_link_artifact(Path(report.html).absolute().as_uri(), link_text="report", key="report")
    return report
