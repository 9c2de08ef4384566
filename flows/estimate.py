"""The flow that says from a small sample what a capture would give, cost and take."""

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.progress import watching
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.estimation.estimate import Estimate, estimate


@flow(name="estimate", flow_run_name="estimate {config.documents}", persist_result=False)
def estimate_flow(config: EstimateConfig) -> Estimate:
    """Say from a small sample what a capture would give, cost and take; nothing is captured."""
    with watching() as watch:
        found = estimate(config, watch)
    if found.selections:
        create_table_artifact(
            [vars(selection) for selection in found.selections],
            key="selections",
            description=f"{found.positions:,} positions of {config.documents}, by selection; an estimate",
        )
    return found
