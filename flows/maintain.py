"""The flow that maintains a table: tags versions, drops old ones, and deletes files that nothing needs."""

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.pipeline.tables.maintain import MaintainReport, maintain


@flow(name="maintain", flow_run_name="maintain {config.table}", persist_result=False)
def maintain_flow(config: MaintainConfig) -> MaintainReport:
    """Delete the files that no version of a table refers to and no writer is writing; or tag and drop versions."""
    with recorded(), retrying(), reported():
        report = maintain(config)
    if report.deletion and report.deletion.deleted:
        rows = [vars(leftover) for leftover in report.deletion.deleted]
        publish(create_table_artifact, rows, key="deleted", description=f"Deleted from {report.table}")
    return report
