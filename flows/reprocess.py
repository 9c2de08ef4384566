"""The flow that makes a smaller table from a table, or changes it in place, without the teacher."""

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.events import announcing
from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.tables.reprocess import ReprocessReport, reprocess


@flow(name="reprocess", flow_run_name="reprocess {config.source}", persist_result=False)
def reprocess_flow(config: ReprocessConfig) -> ReprocessReport:
    """Make a smaller table from a table, or change it in place as one new version; no teacher is needed."""
    target = config.destination or config.source
    with (
        recorded(destination=config.destination),
        retrying(),
        announcing(target, "reprocess"),
        reported(),
        publishing_progress("reprocess-progress") as watch,
    ):
        report = reprocess(config, watch)
    rows = [{"operation": report.operation, **vars(report.rows)}]
    publish(
        create_table_artifact, rows, key="reprocess", description=f"{report.source} reprocessed into {report.table}"
    )
    return report
