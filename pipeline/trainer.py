"""transformers' Trainer with our loss and loader: the loop, precision, schedules and devices are its own.

What it would do to a loss on the way is undone here: a step's loss is divided once, by the captured positions of the
global batch, so that micro-batches, accumulation and ranks change nothing but rounding. Checkpoints appear whole or not
at all, and a loss that is no number stops the run before it touches a weight. Knows no folders but the checkpoints'.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline.averaging import decode
from pipeline.batch import Batch
from pipeline.loss import distillation_loss
from pipeline.metrics import measure
from pipeline.order import Cursor
from pipeline.progress import Progress, Watch
from pipeline.stopping import best_step, drop_superseded, evaluations_since_best
from pipeline.student import hidden_states, output_head
from pipeline.student_config import LossConfig, OptimiserConfig
from pipeline.student_folder import RUN, best_weights, checkpoints, newest_checkpoint
from storage.errors import TrainingError
from storage.view import AnyTable

_WEIGHTS = "model.safetensors"
_KEPT_CHECKPOINTS = 2


class Distillation(nn.Module):
    """A student and its loss in one module, so that whatever wraps it (autocast, DDP) wraps both."""

    vocabulary: Tensor

    def __init__(self, student: PreTrainedModel, table: AnyTable, loss: LossConfig, max_k: int | None) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("vocabulary", torch.tensor(table.vocabulary), persistent=False)
        # A view may have tables with draws beside others without: then none are used.
        self.loss = loss if table.draws or loss.target != "auto" else loss.model_copy(update={"target": "bucket"})
        """What is minimised, its weights as they are at this step."""
        self._temperatures = table.temperatures
        self._max_k = max_k

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's share of its step's loss, with gradient, and (2,) that of the hard and the soft part, without."""
        head = output_head(self.student)
        hidden = hidden_states(self.student, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
        targets = None
        if self.loss.soft_weight:
            targets = decode(batch.targets, self.vocabulary, self._temperatures, self.loss, self._max_k)
        positions = max(1, batch.global_positions)
        loss = distillation_loss(
            hidden,
            head.weight,
            batch.next_ids,
            targets,
            self.loss,
            bias=head.bias,
            vocabulary_size=len(self.vocabulary),
            soft_cap=head.soft_cap,
            logit_scale=head.scale,
            normaliser=positions,
        )
        return loss.total, torch.stack([loss.hard, loss.soft]).float() / positions


@dataclass(frozen=True)
class Lesson:
    """What a student is trained and measured on: all that differs between a language model and a classifier."""

    module: nn.Module
    """The student, its attribute ``student``, with its loss, whose settings are ``loss``; called with a batch like
    ``Distillation``."""
    dataset: Callable[..., Any]
    """Makes one rank's batches, given ``SoftLabelDataset``'s keyword arguments, whose methods it has."""
    evaluation: Sequence[Any]
    """Batches of the eval split, the same on each rank; none, and nothing is evaluated."""
    measure: Callable[[PreTrainedModel, Sequence[Any]], dict[str, float]]
    """What the curves show of the student on these batches."""


def measured(student: PreTrainedModel, batches: Sequence[Batch], table: AnyTable) -> dict[str, float]:
    """What the curves show of a language model."""
    metrics = measure(student, batches, table)
    logs = {"eval_kl": metrics.kl.mean, "eval_cross_entropy": metrics.cross_entropy.mean}
    if metrics.agreement is not None:
        logs["eval_agreement"] = metrics.agreement.mean
    return logs


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains a lesson's student on one rank's batches.

    Args:
        lesson: the student with its loss, and what it is measured on.
        arguments: the Trainer's own; ``output_dir`` is where checkpoints are written before they are whole.
        dataset: this rank's batches, from the step on at which training begins.
        run: folder that whole checkpoints are moved to.
        record: what each checkpoint says of its run.
        optimiser: when to stop, and which weights to keep.
        watch: told of each step.
    """

    def __init__(
        self,
        lesson: Lesson,
        arguments: TrainingArguments,
        dataset: Any,
        run: Path,
        record: Mapping[str, Any],
        optimiser: OptimiserConfig,
        watch: Watch,
    ) -> None:
        super().__init__(lesson.module, arguments, train_dataset=dataset, eval_dataset=list(lesson.evaluation))
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(watch))
        self._measure = lesson.measure
        self._run = run
        self._record = record
        self._optimiser = optimiser
        self._loss: Any = lesson.module.loss
        self._step_loss = torch.zeros((), device=arguments.device)
        self._parts = torch.zeros(3, device=arguments.device, dtype=torch.float64)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The dataset's batches as they are: it knows its rank, its order and where to begin."""
        pinned = self.args.device.type == "cuda"
        own = torch.Generator()  # a loader draws a seed: not from the numbers that dropout goes on with after a resume
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=_as_inputs, pin_memory=pinned, generator=own)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: object = None) -> Tensor:
        """One micro-batch, forward and backward; the Trainer's own divides by the number of micro-batches, too."""
        model.train()
        self.model.loss = self._loss.at(self.state.global_step / max(1, self.state.max_steps - 1))
        batch = inputs["batch"].to(self.args.device, non_blocking=True)
        with self.compute_loss_context_manager():
            loss, parts = model(batch)
        # DDP averages the ranks' gradients, and the log their losses; both are to be sums.
        loss = loss * self.args.world_size
        self.accelerator.backward(loss)
        trained: Tensor = loss.detach()
        self._step_loss += trained
        self._parts += torch.cat([parts, parts.new_tensor([len(batch.positions)])])
        return trained

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(self._step_loss + norm):
            last = newest_checkpoint(self._run)
            raise TrainingError(
                "the loss is no longer a number",
                expected="a finite loss and finite gradients",
                found=f"loss {float(self._step_loss):g}, gradient norm {float(norm):g}",
                where=f"step {self.state.global_step + 1} of {self.state.max_steps}",
                do=f"the last good checkpoint is {last or '(none was written yet)'}; set optimiser.learning_rate "
                "lower or optimiser.warmup longer, and train into another folder",
            )
        self._step_loss.zero_()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what the Trainer logs: means of the steps since, and positions so far."""
        if "loss" in logs:
            hard, soft, positions = self.accelerator.reduce(self._parts, "sum").tolist()
            logged = [past for past in self.state.log_history if "positions" in past]
            before = logged[-1] if logged else {"step": 0, "positions": 0}
            steps = self.state.global_step - before["step"]
            logs |= {"hard": hard / steps, "soft": soft / steps, "positions": before["positions"] + round(positions)}
            self._parts.zero_()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student on the eval split, by the metrics that its report will show."""
        agreed = [self._measure(self.model.student, self.eval_dataset)]
        broadcast_object_list(agreed)  # all ranks stop at the same step, whatever the last digits that each has found
        logs = agreed[0]
        self.log(dict(logs))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._keep_or_stop()
        return logs

    def _keep_or_stop(self) -> None:
        """What follows from the evaluations so far, which the log has: so a resumed run decides as the first did."""
        history, step = self.state.log_history, self.state.global_step
        if self._optimiser.keeps_best and best_step(history) == step and self.args.should_save:
            unfinished, whole = Path(self.args.output_dir, "best"), best_weights(self._run, step)
            self._save(str(unfinished))
            shutil.rmtree(whole, ignore_errors=True)
            unfinished.rename(whole)
            drop_superseded(self._run, history)
        patience = self._optimiser.patience
        if patience is not None and evaluations_since_best(history) >= patience:
            self.control.should_training_stop = True
            self.control.should_save = False  # the finished student is saved instead

    def choose(self) -> int:
        """Give the student the weights that are to be kept, and return their step."""
        step: int = self.state.global_step
        if self._optimiser.keeps_best:
            step = best_step(self.state.log_history)
            self.accelerator.wait_for_everyone()
            load_model(self.model.student, best_weights(self._run, step) / _WEIGHTS)
        return step

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            whole = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            cursor = asdict(self.train_dataset.state(self.state.global_step))
            (whole / RUN).write_text(json.dumps({**self._record, "cursor": cursor}))
            whole.rename(self._run / whole.name)
            for old in checkpoints(self._run)[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
            if self._optimiser.keeps_best:
                drop_superseded(self._run, self.state.log_history)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            # The names that the module itself uses, and tied weights once: loading gives the same bits.
            save_model(self.model.student, str(Path(output_dir, _WEIGHTS)), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(self.model.student, Path(resume_from_checkpoint, _WEIGHTS))


class _Flow(TrainerCallback):  # type: ignore[misc]
    """Tells whoever watches, and decides what happens at the end and around a checkpoint."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._details: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # optimiser.checkpoint_steps as they are now, not in the checkpoint

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_evaluate = args.eval_strategy != "no" and (control.should_evaluate or last)
        control.should_save = control.should_save and not last  # the finished student is saved instead
        # A checkpoint is taken where the log begins anew, so that a resumed run's log is the uninterrupted one's.
        control.should_log = control.should_log or control.should_save or control.should_evaluate or last
        if state.is_world_process_zero:
            self._watch(Progress("train", state.global_step, state.max_steps, "steps", dict(self._details)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        shown = ("loss", "eval_kl", "eval_cross_entropy", "eval_agreement", "eval_accuracy", "eval_f1")
        self._details |= {name: value for name, value in (logs or {}).items() if name in shown}


def cursor_of(checkpoint: Path) -> Cursor:
    """Where the stream was when a checkpoint was taken."""
    return Cursor(**json.loads((checkpoint / RUN).read_text())["cursor"])


def _as_inputs(batch: Any) -> dict[str, Any]:
    return {"batch": batch}  # the Trainer looks for names in its inputs
