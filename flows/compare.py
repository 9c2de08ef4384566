"""The flow that ranks students, and shows the report in Prefect's UI."""

from prefect import flow

from softlabel.flows.evaluate import show_report, with_lasting_report
from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.outages import reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.evaluate import CompareConfig
from softlabel.pipeline.evaluation.compare import compare
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.report.scores import EvaluationReport


@flow(name="compare", flow_run_name="compare {config.models}", persist_result=False)
def compare_flow(config: CompareConfig) -> EvaluationReport | ClassEvaluation:
    """Rank students on one version of a table, and write a report."""
    config = with_lasting_report(config)
    with recorded(report=config.report), retrying(), reported(), publishing_progress("compare-progress") as watch:
        report = compare(config, watch)
    show_report(report)
    return report
