"""What is done, as plain Python: capture, train, evaluate, reprocess. Torch, transformers and the table; never Prefect.

Names are loaded when they are asked for, so that the loss, the selection and the teacher also work where polars,
deltalake or Prefect are absent.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.capturing import CaptureReport, capture
    from pipeline.config import (
        CaptureConfig,
        ColumnsConfig,
        EvaluateConfig,
        SelectionConfig,
        SequencesConfig,
        ShardsConfig,
        StreamConfig,
        TeacherConfig,
        TrainConfig,
    )
    from pipeline.dataset import SoftLabelDataset
    from pipeline.distill_config import DistillConfig
    from pipeline.estimate_config import EstimateConfig
    from pipeline.estimating import Estimate, estimate
    from pipeline.evaluation import EvaluationReport, evaluate
    from pipeline.loss import distillation_loss
    from pipeline.progress import Progress
    from pipeline.reprocessing import ReprocessReport, reprocess
    from pipeline.student_config import LossConfig, OptimiserConfig, StudentConfig
    from pipeline.table_config import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
    from pipeline.training import TrainReport, train

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
