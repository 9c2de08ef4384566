"""The flow that trains one student from a table."""

from prefect import flow

from softlabel.flows.progress import watching
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import TrainReport, train


@flow(name="train", flow_run_name="train {config.output}", persist_result=False)
def train_flow(config: TrainConfig) -> TrainReport:
    """Train a student from a table; a student that is already trained with these settings is left unchanged."""
    with watching() as watch:
        return train(config, watch)
