"""The whole pipeline in one call: capture, train a student and its control, and evaluate both."""

from collections.abc import Callable
from dataclasses import dataclass

from softlabel.pipeline.capturing.capture import CaptureReport, capture
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import VERSION, TrainConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.report.scores import EvaluationReport
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.progress import Watch, unwatched
from softlabel.pipeline.students.compatibility import require_same_tokens_elsewhere
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.trackers import require_trackers
from softlabel.pipeline.training.train import TrainReport, train


@dataclass(frozen=True)
class DistillReport:
    """The report of each stage."""

    capture: CaptureReport
    train: dict[str, TrainReport]
    """Reports by name: "student" and, if ``config.control`` is set, "control"."""
    evaluate: EvaluationReport | ClassEvaluation


def distill(config: DistillConfig, watch: Watch = unwatched) -> DistillReport:
    """Capture, train and evaluate. Work that is already done is not repeated.

    Args:
        config: settings of all stages.
        watch: called with each stage's progress.

    Raises:
        SoftlabelError: if a stage fails. A student or a loss that can't be trained is refused before the teacher runs.
    """
    return distill_in_stages(
        config,
        capture=lambda settings: capture(settings, watch),
        train=lambda settings: train(settings, watch),
        evaluate=lambda settings: evaluate(settings, watch),
    )


def distill_in_stages(
    config: DistillConfig,
    *,
    capture: Callable[[CaptureConfig], CaptureReport],
    train: Callable[[TrainConfig], TrainReport],
    evaluate: Callable[[EvaluateConfig], EvaluationReport | ClassEvaluation],
) -> DistillReport:
    """Like ``distill``, with functions that run the stages, so that a scheduler can run each as a flow."""
    require_trainable(config)
    captured = capture(config.capture())
    if VERSION in config.output:
        output = config.output.replace(VERSION, str(captured.version))
        config = config.model_copy(update={"output": output, "table": f"{captured.table}@{captured.version}"})
    trained = {name: train(settings) for name, settings in config.train().items()}
    return DistillReport(captured, trained, evaluate(config.evaluate()))


def require_trainable(config: DistillConfig) -> CaptureJob:
    """Refuse a student or a loss that can't be trained from what the capture would store.

    Returns:
        The capture.

    Raises:
        SoftlabelError: with what does not fit.
    """
    job = resolve(config.capture())
    origin = Origin.of_capture(job.checkpoint, job.teacher, job.identity)
    objective = objective_of(origin)
    require_same_tokens_elsewhere(objective.require_fitting(config.student), origin)
    for settings in config.train().values():
        objective.require_loss(settings)
        require_trackers(settings.optimizer.report_to, "optimizer.report_to")
    return job
