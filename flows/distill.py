"""The flow that runs the others: capture, train the student and its control, evaluate both."""

from prefect import flow

from softlabel.flows.capture import capture_flow
from softlabel.flows.evaluate import evaluate_flow
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.flows.train import train_flow
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.distillation import DistillReport, distill_in_stages


@flow(name="distill", flow_run_name="distill {config.table}", persist_result=False)
def distill_flow(config: DistillConfig) -> DistillReport:
    """Capture, train and evaluate; skip what is already there."""
    with recorded(table=config.table, output=config.output), retrying():
        return distill_in_stages(config, capture=capture_flow, train=train_flow, evaluate=evaluate_flow)
