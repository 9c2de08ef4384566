"""Trains a student from a soft-label table and writes it, with its record, to its folder.

Idempotent: a finished student is left unchanged, and an unfinished one continues from its last checkpoint. A finished
one that gets more steps or epochs goes on from its last step. ``job`` resolves what a run does; its ``objective``
builds the student; the loop is in ``trainer``; ``students.folder`` manages the student's folder.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import PreTrainedModel, TrainingArguments, set_seed

from softlabel.pipeline.cards import holding
from softlabel.pipeline.config.train import VERSION, TrainConfig
from softlabel.pipeline.exclusive import lock_output, require_unlocked
from softlabel.pipeline.log_context import about
from softlabel.pipeline.objectives.objective import Trainable
from softlabel.pipeline.progress import Watch, unwatched
from softlabel.pipeline.students.build import parameters
from softlabel.pipeline.students.folder import Standing, StudentFolder
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.record import StudentRecord, TrainingRun
from softlabel.pipeline.students.serving import name_end_tokens
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.students.trackers import RunIds, TensorBoard, ending_runs
from softlabel.pipeline.training.adapters import adapt, use_liger, warn_of_experts
from softlabel.pipeline.training.checkpoints import KEPT as CHECKPOINTS_KEPT
from softlabel.pipeline.training.fsdp import is_sharded, shard, unshard
from softlabel.pipeline.training.job import TrainingJob
from softlabel.pipeline.training.launch import devices, on_cpu, to_start, train_by
from softlabel.pipeline.training.signals import stop_on_signals
from softlabel.pipeline.training.stop import Stop, StoppedError
from softlabel.pipeline.training.trainer import DistillationTrainer
from softlabel.storage.errors import StudentError, TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import circumstances
from softlabel.storage.places import durable
from softlabel.storage.records.versions import parse, pin
from softlabel.storage.views.row_groups import outlines
from softlabel.storage.views.view import AnyTable, open_table

_LOGGED_STEPS = 500
"""Approximate maximum number of points of a training curve."""
_HISTORY = (
    *("loss", "hard", "soft", "learning_rate", "positions"),
    *("eval_kl", "eval_cross_entropy", "eval_agreement", "eval_accuracy", "eval_f1"),
)


@dataclass(frozen=True)
class TrainReport:
    """Outcome of ``train``."""

    output: str
    table: str
    """TABLE@version."""
    steps: int
    """Optimizer step of the student's final weights."""
    stopped_at: int
    """Last step of the run; later than steps if earlier weights were the best."""
    steps_trained: int
    """Steps done by this call; 0 if the student was already finished."""
    resumed_from: int | None
    """Step of the checkpoint that this call continued from; None if it started from the beginning."""
    parameters: int
    positions: int
    """Number of captured positions that the student was trained on."""
    seconds: float
    metrics: dict[str, float]
    """Last evaluation of the final weights, by name in the curves (eval_kl, ...); empty without an eval split."""


def train(config: TrainConfig, watch: Watch = unwatched) -> TrainReport:
    """Train a student until it is finished, from its last checkpoint if it has one, or further if it is finished.

    With several processes, it starts them, and each calls this function as a rank. It can also be called from each rank
    of torchrun.

    Raises:
        UsageError: if the settings contradict the table, each other, or the content of the output folder.
        StudentError: if the student can't be built, or does not fit the table.
        TrainingError: if training diverges, the student can't be written, or another process is training it.
        TableError: if the table can't be read.
        WorkerError: if one of several processes died.
        KeyboardInterrupt, SystemExit: on Ctrl-C or SIGTERM, after the current step is done and saved; see ``signals``.
    """
    config = _of_version(config)
    folder = _folder(config)
    with stop_on_signals(folder) as stop:
        processes = to_start(config.optimizer)
        if not folder.has_work(config):
            return train_here(config, stop.noting(watch), stop)
        with holding(devices(config.optimizer, processes)):
            if processes:
                return TrainReport(**train_by(processes, config, stop.noting(watch), stop))
            return train_here(config, stop.noting(watch), stop)


def train_here(config: TrainConfig, watch: Watch, stop: Stop) -> TrainReport:
    """Train in this process, alone or as a rank, until the student is finished or the training is asked to stop.

    Raises:
        StoppedError: if it was asked to stop, and has written a checkpoint.
        SoftlabelError: as ``train`` does.
    """
    began, folder = time.monotonic(), _folder(config)
    ranks = PartialState(cpu=on_cpu(config.optimizer))
    with lock_output(folder.path) if ranks.is_main_process else nullcontext():
        return _run(config, folder, watch, stop, began)


def _of_version(config: TrainConfig) -> TrainConfig:
    """The settings with the table's version in place of ``{version}``, and for this version, whatever comes later."""
    if VERSION not in config.output:
        return config
    table = open_table(config.table)
    output = config.output.replace(VERSION, str(table.version))
    return config.model_copy(update={"output": output, "table": f"{table.location}@{table.version}"})


def _folder(config: TrainConfig) -> StudentFolder:
    return StudentFolder(Path(config.output).absolute())


def _run(config: TrainConfig, folder: StudentFolder, watch: Watch, stop: Stop, began: float) -> TrainReport:
    """Train the student of a folder, unless it is finished."""
    ranks = PartialState()
    if ranks.is_main_process:
        folder.recover()
    ranks.wait_for_everyone()
    config = folder.complete(config)
    standing = folder.standing(config)
    table = _agree(folder.open_table(config, standing))
    if ranks.is_main_process:
        folder.clear(standing)
    if standing.finished is not None:
        _require_source(config, table, folder, standing)
        return _report(config, standing.finished, 0, None, time.monotonic() - began)
    job = TrainingJob.resolve(config, folder, table, standing)
    with about(version=table.version), ending_runs():
        record = _train(job, _named(watch, folder.path.name), stop)
    resumed_from = job.start.step if job.checkpoint else None
    return _report(config, record, record.last_step - job.start.step, resumed_from, time.monotonic() - began)


@dataclass(frozen=True)
class TrainPreview:
    """What a training would do."""

    output: str
    table: str
    """TABLE@version."""
    steps: int | None
    """Optimizer steps of the whole training; None if they depend on rows that are not captured yet."""
    steps_to_train: int | None
    """Those that are left to do; 0 if the student is finished."""
    resumed_from: int | None = None
    """Step that it would go on from; None if it would start from the beginning."""
    objective: str = ""
    """The loss in words."""
    parameters: int | None = None
    trainable: int | None = None
    """Parameters that the training changes: all, or those of the adapters."""
    sequences: int | None = None
    """Sequences of the train split."""
    tokens: int | None = None
    positions: int | None = None
    """Captured positions of the train split: what an epoch trains on."""
    bytes: int | None = None
    """Disk space of the finished student with the state of its training, about."""
    peak_bytes: int | None = None
    """Most disk space while it is trained, about: checkpoints, and the one being written."""
    dry_run: Literal[True] = True


def preview_train(config: TrainConfig) -> TrainPreview:
    """What ``train`` would do. The student is built as for the training, in memory; nothing is written.

    Raises:
        SoftlabelError: as ``train`` does before the first step.
    """
    config = _of_version(config)
    folder = _folder(config)
    to_start(config.optimizer)
    require_unlocked(folder.path)
    PartialState(cpu=on_cpu(config.optimizer))
    config = folder.complete(config)
    standing = folder.standing(config)
    table = folder.open_table(config, standing)
    name = f"{parse(config.table)[0]}@{table.version}"
    if standing.finished is not None:
        _require_source(config, table, folder, standing)
        done = standing.finished
        return TrainPreview(
            config.output, name, done.last_step, 0, objective=done.objective, parameters=done.parameters
        )
    job = TrainingJob.resolve(config, folder, table, standing)
    with folder.writing():
        durable.require_permission(folder.path)
    built = _build(job)
    steps, size, trained = _dataset(job, built.trainable).total_steps, built.bytes, built.trained_bytes
    state = size + 2 * trained  # AdamW keeps two numbers for each weight
    best = size if config.optimizer.keeps_best else 0
    rows = [rows for _, rows in outlines(table, ["tokens", "positions"], "train")]
    return TrainPreview(
        output=config.output,
        table=name,
        steps=steps,
        steps_to_train=steps - job.start.step,
        resumed_from=job.start.step if job.checkpoint else None,
        objective=job.record.objective,
        parameters=built.parameters,
        trainable=built.trained_parameters,
        sequences=sum(map(len, rows)),
        tokens=sum(int(part.column("tokens").to_numpy().sum()) for part in rows),
        positions=sum(int(part.column("positions").to_numpy().sum()) for part in rows),
        bytes=size + state + best,
        peak_bytes=(CHECKPOINTS_KEPT + 1) * state + best + size,
    )


@dataclass(frozen=True)
class _Built:
    """A student that is ready to be trained."""

    student: PreTrainedModel
    merge: Callable[[], object] | None
    """Merges its adapters, if it has any."""
    trainable: Trainable
    parameters: int
    """Of the student without adapters."""
    bytes: int
    """Size of these."""

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained."""
        return sum(each.numel() for each in self.student.parameters() if each.requires_grad)

    @property
    def trained_bytes(self) -> int:
        """Size of the parameters that are trained."""
        return sum(each.numel() * each.element_size() for each in self.student.parameters() if each.requires_grad)


def _build(job: TrainingJob) -> _Built:
    """The student of a run, with its loss and its batches."""
    settings = job.config.student
    set_seed(job.config.optimizer.seed)
    student = job.objective.build(settings, job.table, job.config.stream.packing, job.source)
    count = parameters(student)
    size = sum(each.numel() * each.element_size() for each in student.parameters())
    if PartialState().is_main_process:
        warn_of_experts(student, adapted=settings.lora_r is not None)
    merge = adapt(student, settings) if settings.lora_r else None
    if job.config.optimizer.use_liger_kernel:
        use_liger(student)
    return _Built(student, merge, job.objective.trainable(job.config, job.table, student, job.target), count, size)


def _train(job: TrainingJob, watch: Watch, stop: Stop) -> StudentRecord:
    ranks, built, runs = PartialState(), _build(job), RunIds()
    student = built.student
    with job.folder.writing():
        if ranks.is_main_process:
            job.folder.begin_run(job.standing)
        trainer = _trainer(job, built.trainable, watch, stop, runs)
        if ranks.is_main_process:
            _pin(job.table, job.folder.path)
        trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
    if not trainer.complete:
        raise StoppedError

    with job.folder.writing():
        state = trainer.save_last_step()
    step = trainer.choose()
    unshard(student)
    if built.merge:
        built.merge()
    name_end_tokens(student, job.table, Origin.of(job.table).tokenizer())
    record = _finished(job, student, trainer, step, runs)
    if ranks.is_main_process:
        with job.folder.writing():
            job.folder.finish(student, job.table.tokenizer, record, job.objective.task, state)
    ranks.wait_for_everyone()
    return record


def _require_source(config: TrainConfig, table: AnyTable, folder: StudentFolder, standing: Standing) -> None:
    """Refuse a finished student made from other files; if the files no longer exist, it is accepted."""
    try:
        source = StudentSource.find(config.student, Origin.of(table))
        _ = source.files
    except (StudentError, UsageError):
        return
    folder.require_source(source, standing)


def _named(watch: Watch, student: str) -> Watch:
    """A watch whose progress has the student's name."""
    return lambda progress: watch(replace(progress, stage=f"train {student}"))


def _agree(table: AnyTable) -> AnyTable:
    """The table at the version that the first rank opened; another rank may have opened a newer one."""
    version = int(broadcast(torch.tensor(table.version, device=PartialState().device)))
    return table if version == table.version else open_table(f"{table.location}@{version}")


def _pin(table: AnyTable, student: Path) -> None:
    """Protect the table's version from vacuum; only warn if the table is read-only."""
    try:
        for part in table.tables:
            pin(part.location, part.version, student)
    except TableNotFoundError:
        raise
    except TableError as error:
        warnings.warn(
            f"{error}\nThis version of the table could not be pinned, so a later vacuum may delete it.", stacklevel=3
        )


def _dataset(job: TrainingJob, trainable: Trainable) -> Any:
    """This rank's batches from where the training starts.

    Raises:
        UsageError: if there are no further steps, or nothing to evaluate on where the settings need it.
    """
    ranks, settings = PartialState(), job.config.optimizer
    dataset = trainable.dataset(
        rank=ranks.process_index,
        world_size=ranks.num_processes,
        start=job.start,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    if dataset.total_steps <= job.steps_before:
        raise _not_further(job, dataset.total_steps)
    if not trainable.evaluation and (settings.keeps_best or settings.early_stopping_patience is not None):
        raise UsageError(
            "early stopping and keeping the best weights need an eval split, and the table has none to evaluate on",
            expected="an eval split, or neither optimizer.early_stopping_patience nor optimizer.keep best",
            found=f"nothing to evaluate on in the eval split of version {job.table.version}",
            where=job.table.location,
            do="leave these settings out, or capture more documents; shards.eval_fraction sets the share of them that "
            "goes to eval",
        )
    return dataset


def _trainer(job: TrainingJob, trainable: Trainable, watch: Watch, stop: Stop, runs: RunIds) -> DistillationTrainer:
    ranks, settings = PartialState(), job.config.optimizer
    dataset = _dataset(job, trainable)
    if settings.gradient_checkpointing:
        # Newer transformers deprecate the older name, the only one that older transformers have.
        student: Any = trainable.module.student
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(job.folder.scratch),
        max_steps=dataset.total_steps,
        gradient_accumulation_steps=dataset.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if settings.lr_scheduler_type == "constant"
        else settings.lr_scheduler_type,
        warmup_steps=round(settings.warmup_ratio * (dataset.total_steps - job.steps_before)),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=on_cpu(settings),
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if trainable.evaluation else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=bool(trainable.evaluation) and job.start.step == 0,
        logging_steps=max(1, dataset.total_steps // _LOGGED_STEPS),
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the dataset already starts where the checkpoint was taken
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        run_name=job.folder.path.name,
        report_to=[tracker for tracker in settings.report_to if tracker != "tensorboard"],
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # softlabel.pipeline.training.launch handles several GPUs, never nn.DataParallel
    if not trainable.evaluation and ranks.is_main_process:
        warnings.warn(
            f"nothing is held out in version {job.table.version} of {job.table.location}, so the student is not "
            "evaluated while it is trained, and softlabel evaluate can't measure it on this table. To evaluate it, "
            "capture more documents, or into a new table with a larger shards.eval_fraction.",
            stacklevel=2,
        )
    if settings.sharding == "full" and ranks.num_processes > 1:
        shard(trainable.module, ranks.device, settings.bf16)
    trainer = DistillationTrainer(job, trainable, arguments, dataset, watch, stop)
    if "tensorboard" in settings.report_to:
        trainer.add_callback(TensorBoard(job.folder.curves))
    trainer.add_callback(runs)
    return trainer


def _not_further(job: TrainingJob, total: int) -> UsageError:
    settings = job.config.optimizer
    return UsageError(
        "the output holds a finished student that was trained for at least as many steps",
        expected=f"more than {job.steps_before} steps",
        found=f"{total} steps (optimizer.max_steps: {settings.max_steps}, optimizer.num_train_epochs: "
        f"{settings.num_train_epochs:g})",
        where=job.folder.path,
        do="raise these settings, use the ones that the student was trained with, or choose another output",
    )


def _finished(
    job: TrainingJob, student: PreTrainedModel, trainer: DistillationTrainer, step: int, runs: RunIds
) -> StudentRecord:
    """The record of a student whose weights are those of a step."""
    history = [
        {name: entry[name] for name in ("step", *_HISTORY) if name in entry} for entry in trainer.state.log_history
    ]
    around = circumstances(
        device=str(trainer.args.device),
        ranks=str(trainer.args.world_size),
        sharding="full" if is_sharded(trainer.model) else "none",
    )
    run = TrainingRun(
        first_step=job.steps_before + 1,
        last_step=trainer.state.global_step,
        num_train_epochs=job.config.optimizer.num_train_epochs,
        max_steps=job.config.optimizer.max_steps,
        circumstances=around,
        trackers=runs.found,
    )
    return StudentRecord(
        **{**job.record.made_from, "runs": (*job.record.runs, run)},
        parameters=parameters(student),
        step=step,
        history=tuple(entry for entry in history if len(entry) > 1),
        circumstances=around,
    )


def _report(
    config: TrainConfig, record: StudentRecord, steps_trained: int, resumed_from: int | None, seconds: float
) -> TrainReport:
    metrics = record.last_evaluation
    metrics.pop("step", None)
    return TrainReport(
        output=config.output,
        table=f"{parse(config.table)[0]}@{record.table.version}",
        steps=record.step,
        stopped_at=record.last_step,
        steps_trained=steps_trained,
        resumed_from=resumed_from,
        parameters=record.parameters,
        positions=record.positions,
        seconds=seconds,
        metrics=metrics,
    )
