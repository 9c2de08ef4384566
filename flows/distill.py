"""The flow of flows: capture, train the student and its control, evaluate both."""

from dataclasses import dataclass

from prefect import flow

from softlabel.flows.capture import capture_flow
from softlabel.flows.evaluate import evaluate_flow
from softlabel.flows.train import train_flow
from softlabel.pipeline.capturing.capture import CaptureReport
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.evaluation.classifier import ClassEvaluation
from softlabel.pipeline.evaluation.evaluate import EvaluationReport
from softlabel.pipeline.students.compatibility import require_fitting, require_loss
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.training.train import TrainReport


@dataclass(frozen=True)
class DistillReport:
    """What each stage came to."""

    capture: CaptureReport
    train: dict[str, TrainReport]
    """By name: the student, and the control if one was asked for."""
    evaluate: EvaluationReport | ClassEvaluation


@flow(name="distill", flow_run_name="distill {config.table}", persist_result=False)
def distill_flow(config: DistillConfig) -> DistillReport:
    """Capture, train and evaluate; what is there already is not made again."""
    origin = Origin.of_capture(config)
    require_fitting(config.student, origin)
    for settings in config.train().values():
        require_loss(settings, origin)
    captured = capture_flow(config.capture())
    trained = {name: train_flow(settings) for name, settings in config.train().items()}
    return DistillReport(captured, trained, evaluate_flow(config.evaluate()))
