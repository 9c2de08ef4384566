"""Trackers of a student's run: they show its curves while it trains and, if asked for, the results of its evaluation.

Curves get there through transformers' own callbacks. The results of an evaluation go to the run of the training, whose
id the student's record keeps, or to a new run of the same name.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from softlabel.storage.errors import SoftlabelError, UsageError

TENSORBOARD = "tensorboard"
"""Name of a tracker, and of its folder."""
_SUFFIX = ".evaluation"
"""End of the name of TensorBoard's file with the results of an evaluation."""


def require_trackers(names: Sequence[str], setting: str) -> None:
    """Refuse trackers that are not installed, before anything is computed.

    Args:
        names: the trackers.
        setting: name of the setting that asks for them.

    Raises:
        UsageError: if the package of one is missing.
    """
    for tracker in names:
        if find_spec(tracker) is None:
            package = "'softlabel[tensorboard]'" if tracker == TENSORBOARD else tracker
            raise UsageError(
                f"{setting} names {tracker}, which is not installed",
                do=f"pip install {package}, or leave out {tracker}; the student's record and report have the curves and"
                " results in any case",
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


@contextmanager
def ending_runs() -> Iterator[None]:
    """Ends the run that transformers begins with wandb in the block, which would otherwise get the next training's
    curves, too."""
    before = _wandb_run()
    try:
        yield
    finally:
        if (run := _wandb_run()) is not None and run is not before:
            run.finish()


class RunIds(TrainerCallback):  # type: ignore[misc]
    """Notes the ids of the runs that other callbacks have begun, by tracker; trackio finds a run by its name."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the current run of each tracker."""
        if "wandb" in args.report_to and (run := _wandb_run()) is not None:
            self.found["wandb"] = str(run.id)
        mlflow = sys.modules.get("mlflow") if "mlflow" in args.report_to else None
        if mlflow is not None and (run := mlflow.active_run()) is not None:
            self.found["mlflow"] = str(run.info.run_id)


def report_results(
    names: Sequence[str], student: str, folder: Path, ids: Mapping[str, str], step: int, results: Mapping[str, float]
) -> None:
    """Give the results of an evaluation to trackers.

    Args:
        names: the trackers.
        student: name of a run that is begun because ``ids`` has none.
        folder: folder of TensorBoard's run. Results of an earlier evaluation there are replaced.
        ids: the runs of the student's training, by tracker.
        step: step of the student's weights.
        results: finite numbers by name.

    Raises:
        SoftlabelError: if a tracker does not accept them.
    """
    for tracker in names:
        try:
            _REPORT[tracker](student, folder, ids.get(tracker), step, dict(results))
        except Exception as error:
            raise SoftlabelError(
                f"{tracker} did not accept the results of the evaluation; the report is complete",
                expected=f"a run of {tracker} that can be written to",
                found=f"{type(error).__name__}: {error}",
                where=folder if tracker == TENSORBOARD else f"the run of {student}",
                do=f"check the settings of {tracker} in the environment, and evaluate again; or leave out report_to",
            ) from error


def _to_tensorboard(_: str, folder: Path, __: str | None, step: int, results: dict[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    earlier = list(folder.glob(f"*{_SUFFIX}"))
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        for name, value in results.items():
            writer.add_scalar(name, value, step)
    for path in earlier:
        path.unlink()


def _to_wandb(student: str, _: Path, run_id: str | None, __: int, results: dict[str, float]) -> None:
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # that of transformers' callback
    run = import_module("wandb").init(project=project, name=student, id=run_id, resume="allow")
    run.summary.update(results)
    run.finish()


def _to_mlflow(student: str, _: Path, run_id: str | None, step: int, results: dict[str, float]) -> None:
    mlflow = import_module("mlflow")
    with mlflow.start_run(run_id=run_id, run_name=student):
        mlflow.log_metrics(results, step=step)


def _to_trackio(student: str, _: Path, __: str | None, step: int, results: dict[str, float]) -> None:
    trackio = import_module("trackio")
    trackio.init(project="huggingface", name=student, resume="allow")  # the project of transformers' callback
    trackio.log({**results, "train/global_step": step})
    trackio.finish()


_REPORT = {TENSORBOARD: _to_tensorboard, "wandb": _to_wandb, "mlflow": _to_mlflow, "trackio": _to_trackio}


def _wandb_run() -> Any:
    """The current run of wandb, if it is in use."""
    return getattr(sys.modules.get("wandb"), "run", None)
