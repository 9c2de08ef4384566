"""The flow that makes a view over several tables."""

from prefect import flow

from softlabel.flows.running.outages import reported
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.tables import MixConfig
from softlabel.pipeline.tables.mix import MixReport, mix


@flow(name="mix", flow_run_name="mix {config.view}", persist_result=False)
def mix_flow(config: MixConfig) -> MixReport:
    """Make a view, through which several tables with one tokenizer are read like one table."""
    with recorded(view=config.view), reported():
        return mix(config)
