"""The flow that trains one student from a table."""

from prefect import flow, task

from softlabel.flows.progress import watching
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import TrainReport, train


@task(name="train", task_run_name="train {config.output}", persist_result=False)
def train_student(config: TrainConfig) -> TrainReport:
    """Train a student, showing how far it is."""
    with watching() as watch:
        return train(config, watch)


@flow(name="train", flow_run_name="train {config.output}", persist_result=False)
def train_flow(config: TrainConfig) -> TrainReport:
    """Train a student from a table; one that is already trained like that is left as it is."""
    return train_student(config)
