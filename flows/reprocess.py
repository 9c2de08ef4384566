"""The flow that makes a smaller table of a table, or changes it in place, without the teacher."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from softlabel.flows.progress import watching
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.tables.reprocess import ReprocessReport, reprocess


@task(name="reprocess", task_run_name="reprocess {config.source}", persist_result=False, cache_policy=NO_CACHE)
def reprocess_table(config: ReprocessConfig) -> ReprocessReport:
    """Rewrite what changes and commit it at once, showing how far it is."""
    with watching("reprocess-progress") as watch:
        return reprocess(config, watch)


@flow(name="reprocess", flow_run_name="reprocess {config.source}", persist_result=False)
def reprocess_flow(config: ReprocessConfig) -> ReprocessReport:
    """Make a smaller table of a table, or change it in place as one new version; the teacher is not needed."""
    report = reprocess_table(config)
    rows = [{"what": report.operation, **vars(report.rows)}]
    create_table_artifact(rows, key="reprocess", description=f"{report.source} reprocessed into {report.table}")
    return report
