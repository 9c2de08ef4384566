"""The training loop: transformers' Trainer with softlabel's batches, checkpoints and early stopping.

Some things that the Trainer can do are done here or in ``checkpoints``, because a run that was killed has to go on as
if it had not been:

- Best weights (``load_best_model_at_end``): the Trainer keeps them only where it takes a checkpoint, and forgets the
  evaluation before the first step.
- Early stopping (``EarlyStoppingCallback``): it counts evaluations in a state of its own, which earlier checkpoints
  lack. Here, both depend only on the evaluations in the run's log.
- Rotation (``save_total_limit``): the Trainer writes a checkpoint under its final name, and deletes the one before
  whether or not the new one is durable.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from softlabel.pipeline.models.student_loading import finite
from softlabel.pipeline.objectives.objective import Trainable
from softlabel.pipeline.progress import Progress, Watch
from softlabel.pipeline.students.folder import best_weights, newest_checkpoint
from softlabel.pipeline.students.record import RunRecord
from softlabel.pipeline.training.checkpoints import (
    WEIGHTS,
    History,
    best_step,
    complete,
    drop_superseded,
    evaluations_since_best,
    publish,
)
from softlabel.pipeline.training.fsdp import (
    gathered,
    load_optimizer,
    load_weights,
    reshard,
    weights,
    whole,
)
from softlabel.pipeline.training.job import TrainingJob
from softlabel.pipeline.training.stop import Stop
from softlabel.storage.errors import TrainingError
from softlabel.storage.places import durable

_OPTIMIZER, _SCHEDULE = "optimizer.pt", "scheduler.pt"


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains a student on one rank's batches.

    Args:
        job: the run.
        trainable: student with its loss, and evaluation batches.
        arguments: the Trainer's arguments; checkpoints are in ``output_dir`` until they are complete.
        dataset: this rank's batches, from the step at which training starts.
        watch: called after each step.
        stop: asked after each step whether to save and stop there.
    """

    def __init__(
        self,
        job: TrainingJob,
        trainable: Trainable,
        arguments: TrainingArguments,
        dataset: Any,
        watch: Watch,
        stop: Stop,
    ) -> None:
        if arguments.should_save:
            durable.make_folder(Path(arguments.output_dir))
        super().__init__(trainable.module, arguments, train_dataset=dataset, eval_dataset=list(trainable.evaluation))
        self.remove_callback(PrinterCallback)
        self.add_callback(_Callback(watch, stop, self._publish_checkpoint))
        # Each micro-batch's loss is a share of its step's. The Trainer would divide it by their number unless this is
        # set, also in releases that do not know loss_is_scaled_for_ga; it calls compute_loss in any case.
        self.compute_loss_func = self.compute_loss
        self._run = job.folder.run
        self._steps_before = job.steps_before
        self._record = job.record
        self._optimizer = job.config.optimizer
        self._loss: Any = trainable.module.loss
        self._step_loss = torch.zeros((), device=arguments.device)
        self._parts = torch.zeros(3, device=arguments.device, dtype=torch.float64)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The dataset's batches, unchanged: the dataset knows its rank, its order and where to start."""
        pinned = self.args.device.type == "cuda"
        generator = torch.Generator()  # the loader draws a seed, which must not change the random state of dropout
        return DataLoader(
            self.train_dataset, batch_size=None, collate_fn=_as_inputs, pin_memory=pinned, generator=generator
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor:
        """A micro-batch's share of the loss of its step; the loss has its weights at this step."""
        self.model.loss = self._loss.at(self._share_done)
        batch = inputs["batch"].to(self.args.device, non_blocking=True)
        share, parts = model(batch)
        # DDP averages the ranks' gradients, and the log averages their losses; both should be sums.
        loss: Tensor = share * self.args.world_size
        self._step_loss += loss.detach()
        self._parts += torch.cat([parts, parts.new_tensor([len(batch.positions)])])
        return loss

    @property
    def _share_done(self) -> float:
        """Share of the run for the weights of the loss; a run after the first keeps those of the first one's end."""
        return 1.0 if self._steps_before else self.state.global_step / max(1, self.state.max_steps - 1)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule of the learning rate for the steps of this run only: the run before had its own."""
        return super().create_scheduler(num_training_steps - self._steps_before, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # The only place between the backward pass and the step that sees the norm, also of a sharded student.
        norm = whole(super()._clip_grad_norm(model))
        if not torch.isfinite(self._step_loss + norm):
            found = f"loss {float(self._step_loss):g}, gradient norm {float(norm):g}"
            raise self._diverged(found, self.state.global_step + 1)
        self._step_loss.zero_()
        return norm

    def _require_finite(self) -> None:
        """Refuse NaN and infinite weights, on all ranks if any rank has one."""
        infinite = torch.tensor(float(not finite(self.model.student)), device=self.args.device)
        if self.accelerator.reduce(infinite, "sum"):
            raise self._diverged("NaN or infinite weights", self.state.global_step)

    def _diverged(self, found: str, step: int) -> TrainingError:
        last = newest_checkpoint(self._run)
        return TrainingError(
            "training diverged",
            expected="a finite loss, finite gradients and finite weights",
            found=found,
            where=f"step {step} of {self.state.max_steps}",
            do="train into another folder with a lower optimizer.learning_rate or a larger optimizer.warmup_ratio; "
            f"the last good checkpoint is {last or '(none was written yet)'}",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss (means since the last log) and the positions so far to the Trainer's log."""
        if "loss" in logs:
            hard, soft, positions = self.accelerator.reduce(self._parts, "sum").tolist()
            earlier = [entry for entry in self.state.log_history if "positions" in entry]
            before = earlier[-1] if earlier else {"step": 0, "positions": 0}
            steps = self.state.global_step - before["step"]
            logs |= {"hard": hard / steps, "soft": soft / steps, "positions": before["positions"] + round(positions)}
            self._parts.zero_()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student on the eval split, with the metrics of its report."""
        measured: dict[str, float] = self.model.measured(self.eval_dataset)
        reshard(self.model)
        # Ranks may differ in the last digits, but have to stop at the same step.
        agreed = broadcast(torch.tensor([*measured.values()], dtype=torch.float64, device=self.args.device))
        logs = dict(zip(measured, agreed.tolist(), strict=True))
        if not all(map(math.isfinite, logs.values())):
            found = ", ".join(f"{name} {value:g}" for name, value in logs.items())
            raise self._diverged(found, self.state.global_step)
        self.log(dict(logs))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._apply_evaluation()
        return logs

    def _apply_evaluation(self) -> None:
        """Keep the weights if they are the best so far, and stop if patience has run out."""
        history, step = self.state.log_history, self.state.global_step
        if self._optimizer.keeps_best and best_step(history) == step:
            unfinished, best = Path(self.args.output_dir, "best"), best_weights(self._run, step)
            self.save_model(str(unfinished))
            if self.args.should_save:
                durable.publish(unfinished / WEIGHTS, best / WEIGHTS)
                drop_superseded(self._run, history)
        if self._lost_patience:
            self.control.should_training_stop = True
            self.control.should_save = False  # the finished student is saved instead

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end, rather than been asked to stop."""
        return self.state.global_step >= self.state.max_steps or self._lost_patience

    @property
    def _lost_patience(self) -> bool:
        patience = self._optimizer.early_stopping_patience
        return patience is not None and evaluations_since_best(self.state.log_history, self._steps_before) >= patience

    def choose(self) -> int:
        """Load the final weights into the student, and return their step.

        Raises:
            TrainingError: if they are NaN or infinite.
        """
        step: int = self.state.global_step
        if self._optimizer.keeps_best:
            step = best_step(self.state.log_history)
            self.accelerator.wait_for_everyone()
            load_weights(self.model.student, load_file(best_weights(self._run, step) / WEIGHTS))
            self.accelerator.wait_for_everyone()  # the first rank deletes the file once it has saved the student
        self._require_finite()
        return step

    def save_last_step(self) -> Path:
        """Write a checkpoint of the last step, from which a longer training can go on; returns its folder.

        All ranks have to call it, before ``choose``.
        """
        self._save_checkpoint(self.model, None)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete(self._written, self._run, *self._about_checkpoint)
        return self._written

    @property
    def _written(self) -> Path:
        """The checkpoint of this step, under its temporary name."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    @property
    def _about_checkpoint(self) -> tuple[RunRecord, History, bool]:
        record = self._record.at(self.train_dataset.state(self.state.global_step))
        return record, self.state.log_history, self._optimizer.keeps_best

    def _publish_checkpoint(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(self._written, self._run, *self._about_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student's weights, by the student's own names, gathered from all ranks.

        Raises:
            TrainingError: if they are NaN or infinite.
        """
        self._require_finite()
        tensors = weights(self.model.student)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    # The Trainer knows the student only as part of its objective's module, and can't gather or divide the state of a
    # student that is sharded on CPUs. On GPUs, it would load the whole of it onto each.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = gathered(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir, _OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model.student, load_file(Path(resume_from_checkpoint, WEIGHTS)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint, _OPTIMIZER), map_location="cpu", weights_only=True, mmap=True)
            load_optimizer(self.optimizer, state)
            if self.state.global_step > self._steps_before:
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, _SCHEDULE), weights_only=True))
            else:  # the optimizer of the run before has the rate that its schedule ended with
                for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                    group["lr"] = rate


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Reports progress, and decides when to log, evaluate, save and stop."""

    def __init__(self, watch: Watch, stop: Stop, publish_checkpoint: Callable[[], None]) -> None:
        self._watch = watch
        self._stop = stop
        self._publish_checkpoint = publish_checkpoint
        self._asked = False
        self._details: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # use the current optimizer.save_steps, not the checkpoint's

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if not last:  # the last step is reported after its evaluation
            self._report(state)
        control.should_evaluate = args.eval_strategy != "no" and (control.should_evaluate or last)
        # Ranks are asked at different moments, but have to stop at the same step.
        self._asked = bool(reduce(torch.tensor(float(self._stop.requested), device=args.device), "sum"))
        if self._asked:
            control.should_save = control.should_training_stop = True
        control.should_save = control.should_save and not last  # the finished student is saved instead
        # Log at each checkpoint, so that a resumed run's log equals that of an uninterrupted run.
        control.should_log = control.should_log or control.should_save or control.should_evaluate or last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._publish_checkpoint()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if (
            state.global_step >= state.max_steps or not self._asked
        ):  # otherwise, the step was reported before it was saved
            self._report(state)

    def _report(self, state: TrainerState) -> None:
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


def _as_inputs(batch: Any) -> dict[str, Any]:
    return {"batch": batch}  # the Trainer expects inputs by name
