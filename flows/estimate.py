"""The flow that estimates the size, cost and time of a capture from a small sample."""

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.estimation.estimate import Estimate, estimate


@flow(name="estimate", flow_run_name="estimate {config.sources}", persist_result=False)
def estimate_flow(config: EstimateConfig) -> Estimate:
    """Estimate the size, cost and time of a capture from a small sample; nothing is captured."""
    with recorded(), retrying(), reported(), publishing_progress("estimate-progress") as watch:
        report = estimate(config, watch)
    if report.selections:
        publish(
            create_table_artifact,
            [vars(selection) for selection in report.selections],
            key="selections",
            description=f"Estimate for {report.positions:,} positions of {config.sources}, by selection",
        )
    return report
