"""What is done, as plain Python: capture, train, evaluate, reprocess. Torch, transformers and the table; never Prefect.

Names are loaded when they are asked for, so that the loss, the selection and the teacher also work where polars,
deltalake or Prefect are absent.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softlabel.pipeline.capturing.capture import CaptureReport, capture
    from softlabel.pipeline.config.capture import (
        CaptureConfig,
        ColumnsConfig,
        SelectionConfig,
        SequencesConfig,
        ShardsConfig,
        TeacherConfig,
    )
    from softlabel.pipeline.config.distill import DistillConfig
    from softlabel.pipeline.config.estimate import EstimateConfig
    from softlabel.pipeline.config.evaluate import EvaluateConfig
    from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
    from softlabel.pipeline.config.train import LossConfig, OptimiserConfig, StreamConfig, StudentConfig, TrainConfig
    from softlabel.pipeline.estimation.estimate import Estimate, estimate
    from softlabel.pipeline.evaluation.evaluate import EvaluationReport, evaluate
    from softlabel.pipeline.loss.fused import distillation_loss
    from softlabel.pipeline.progress import Progress
    from softlabel.pipeline.stream.dataset import SoftLabelDataset
    from softlabel.pipeline.tables.reprocess import ReprocessReport, reprocess
    from softlabel.pipeline.training.train import TrainReport, train

__all__ = [
    "CaptureConfig",
    "CaptureReport",
    "ColumnsConfig",
    "DistillConfig",
    "Estimate",
    "EstimateConfig",
    "EvaluateConfig",
    "EvaluationReport",
    "LossConfig",
    "MaintainConfig",
    "MixConfig",
    "OptimiserConfig",
    "Progress",
    "ReprocessConfig",
    "ReprocessReport",
    "SelectionConfig",
    "SequencesConfig",
    "ShardsConfig",
    "SoftLabelDataset",
    "StreamConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainReport",
    "VerifyConfig",
    "capture",
    "distillation_loss",
    "estimate",
    "evaluate",
    "reprocess",
    "train",
]

_ELSEWHERE = {
    "CaptureReport": "capturing",
    "DistillConfig": "distill_config",
    "Estimate": "estimating",
    "EstimateConfig": "estimate_config",
    "EvaluationReport": "evaluation",
    "LossConfig": "student_config",
    "MaintainConfig": "table_config",
    "MixConfig": "table_config",
    "OptimiserConfig": "student_config",
    "Progress": "progress",
    "ReprocessConfig": "table_config",
    "ReprocessReport": "reprocessing",
    "SoftLabelDataset": "dataset",
    "StudentConfig": "student_config",
    "TrainReport": "training",
    "VerifyConfig": "table_config",
    "capture": "capturing",
    "distillation_loss": "loss",
    "estimate": "estimating",
    "evaluate": "evaluation",
    "reprocess": "reprocessing",
    "train": "training",
}
"""Modules of the names that are not in ``config``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'config')}"), name)
