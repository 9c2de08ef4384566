"""Trackers that show a run's curves while it trains: TensorBoard and, through transformers' own callbacks, others."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from softlabel.pipeline.config.train import OptimizerConfig
from softlabel.storage.errors import UsageError


def require_trackers(optimizer: OptimizerConfig) -> None:
    """Refuse trackers that are not installed, before anything is computed.

    Raises:
        UsageError: if ``report_to`` names a tracker whose package is missing.
    """
    for tracker in optimizer.report_to:
        if find_spec(tracker) is None:
            package = "'softlabel[tensorboard]'" if tracker == "tensorboard" else tracker
            raise UsageError(
                f"optimizer.report_to names {tracker}, which is not installed",
                do=f"pip install {package}, or leave out {tracker}; the student's record and report have the curves in "
                "any case",
            )


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """Draws a run's curves in a new folder; a resumed run's from the log of its checkpoint.

    Points that a killed run had after its checkpoint therefore never appear twice.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Draw the steps up to the checkpoint."""
        super().on_train_begin(args, state, control, **kw)
        for entry in state.log_history:
            self.on_log(args, replace(state, global_step=entry["step"]), control, entry)
