"""The flow that compares students with their teacher, and leaves the numbers and the report as artifacts."""

from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact

from flows.progress import watching
from pipeline.config import EvaluateConfig
from pipeline.evaluation import EvaluationReport, evaluate


@task(name="evaluate", persist_result=False)
def evaluate_students(config: EvaluateConfig) -> EvaluationReport:
    """Measure the students and write the report, showing how far it is."""
    with watching() as watch:
        return evaluate(config, watch)


@flow(name="evaluate", persist_result=False)
def evaluate_flow(config: EvaluateConfig) -> EvaluationReport:
    """Compare students with the teacher on the table's eval split, and write a report."""
    report = evaluate_students(config)
    create_table_artifact(
        [
            {
                "model": score.name,
                "perplexity": score.perplexity,
                "KL to the teacher": score.kl,
                "top-1 agreement": score.agreement,
                "parameters": score.parameters,
            }
            for score in (report.teacher, *report.students)
        ],
        key="students",
        description=f"{report.positions:,} held-out positions of {report.table}@{report.version}",
    )
    create_link_artifact(Path(report.html).absolute().as_uri(), link_text="report", key="report")
    return report
