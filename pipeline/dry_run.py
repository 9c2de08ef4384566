"""Dry runs: what a verb would do with its settings, and what it would cost. Nothing is written.

Each goes through the code that plans the real run, and raises the errors that the run would raise before it acts.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from softlabel.pipeline.capturing.capture import CapturePreview, preview_capture
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import CompareConfig, EvaluateConfig
from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import VERSION, TrainConfig
from softlabel.pipeline.progress import Watch, unwatched


@dataclass(frozen=True)
class CaptureDryRun(CapturePreview):
    """What a capture would do and cost."""

    bytes: int | None = None
    """Size of the new shards, as ``estimate`` measures it on a sample; None if no model runs."""
    seconds: float | None = None
    """Time on this machine, likewise."""
    device: str = ""
    """Devices that this time is for."""


@dataclass(frozen=True)
class DistillDryRun:
    """What each stage would do."""

    capture: CaptureDryRun
    train: dict[str, Any]
    """``TrainPreview`` by name: "student" and, if ``config.control`` is set, "control". What depends on rows that are
    not captured yet is None."""
    evaluate: Any
    """``EvaluatePreview``; None if the students are not trained yet."""
    report: str
    """Folder of the report."""
    dry_run: Literal[True] = True


def dry_run(config: Settings, watch: Watch = unwatched) -> Any:
    """What a verb would do with these settings; the settings' type says which verb.

    Args:
        config: settings of any verb that writes.
        watch: called with the progress of reading what is there.

    Returns:
        A typed report whose ``dry_run`` is true: ``CaptureDryRun``, ``TrainPreview``, ``EvaluatePreview`` or
        ``DistillDryRun``, and for all other verbs the verb's own.

    Raises:
        SoftlabelError: as the verb does before it changes anything.
    """
    # Imported here: some need torch, which takes seconds.
    match config:
        case EstimateConfig():
            pass
        case DistillConfig():
            return _distill(config, watch)
        case CaptureConfig():
            return _capture(resolve(config), config, watch)
        case TrainConfig():
            from softlabel.pipeline.training.train import preview_train

            return preview_train(config)
        case CompareConfig():
            from softlabel.pipeline.evaluation.compare import preview_compare

            return preview_compare(config)
        case EvaluateConfig():
            from softlabel.pipeline.evaluation.evaluate import preview_evaluate

            return preview_evaluate(config)
        case ReprocessConfig():
            from softlabel.pipeline.tables.reprocess import reprocess

            return reprocess(config, watch, dry_run=True)
        case MaintainConfig():
            from softlabel.pipeline.tables.maintain import maintain

            return maintain(config, dry_run=True)
        case MixConfig():
            from softlabel.pipeline.tables.mix import mix

            return mix(config, dry_run=True)
        case VerifyConfig():
            from softlabel.pipeline.tables.verify import verify

            return verify(config, watch, dry_run=True)
        case ExportConfig():
            from softlabel.pipeline.tables.export import export

            return export(config, watch, dry_run=True)
        case ShowConfig():
            from softlabel.pipeline.tables.show import show

            return show(config, dry_run=True)
    raise TypeError(f"{type(config).__name__} are not the settings of a verb that writes")


def _capture(job: CaptureJob, config: CaptureConfig, watch: Watch) -> CaptureDryRun:
    found = CaptureDryRun(**vars(preview_capture(job, watch)))
    if not (found.sequences or found.copied) or job.settings.teacher.labels:
        return found
    from softlabel.pipeline.estimation.estimate import estimate

    given = {name: getattr(config, name) for name in CaptureConfig.model_fields if name in config.model_fields_set}
    cost = estimate(EstimateConfig(**given), watch)
    # The plan knows exactly what is pending; the estimate may know a sample of it.
    share = found.positions / cost.positions if cost.positions else 1.0
    took = cost.seconds
    seconds = took.plan + took.load + took.teacher * share + took.copy
    return replace(found, bytes=cost.bytes, seconds=seconds, device=cost.device)


def _distill(config: DistillConfig, watch: Watch) -> DistillDryRun:
    from softlabel.pipeline.distillation import require_trainable
    from softlabel.pipeline.evaluation.evaluate import preview_evaluate
    from softlabel.pipeline.training.train import TrainPreview, preview_train

    capture = _capture(require_trainable(config), config.capture(), watch)
    stays = not (capture.sequences or capture.copied or capture.replaced) and capture.version is not None
    if stays and VERSION in config.output:
        output = config.output.replace(VERSION, str(capture.version))
        config = config.model_copy(update={"output": output, "table": f"{capture.table}@{capture.version}"})
    trainings = config.train()
    if stays:
        train = {name: preview_train(each) for name, each in trainings.items()}
    else:
        train = {name: TrainPreview(e.output, e.table, e.optimizer.max_steps, None) for name, e in trainings.items()}
    settings = config.evaluate()
    trained = stays and all(each.steps_to_train == 0 for each in train.values())
    return DistillDryRun(capture, train, preview_evaluate(settings) if trained else None, settings.report)
