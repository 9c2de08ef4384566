"""Trains a student from a soft-label table and writes it, with its record, to its folder.

Idempotent: a finished student is left unchanged, and an unfinished one continues from its last checkpoint. The loop is
in ``trainer``; ``students.build`` builds the student, and ``students.folder`` manages its folder.
"""

import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.exclusive import lock_output
from softlabel.pipeline.loss.averaging import require_average
from softlabel.pipeline.loss.targets import Target, dropping
from softlabel.pipeline.progress import Watch, unwatched
from softlabel.pipeline.stream.epoch_plan import Cursor
from softlabel.pipeline.students.build import build, parameters
from softlabel.pipeline.students.classifier_student import build_classifier
from softlabel.pipeline.students.compatibility import require_loss
from softlabel.pipeline.students.folder import StudentFolder, run_record
from softlabel.pipeline.students.model_card import last_evaluation
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.training.adapters import adapt, use_liger
from softlabel.pipeline.training.classifier_objective import classifier_objective
from softlabel.pipeline.training.fsdp import is_sharded, shard, unshard
from softlabel.pipeline.training.launch import on_cpu, to_start, train_by
from softlabel.pipeline.training.objective import Objective, language_model_objective
from softlabel.pipeline.training.signals import stop_on_signals
from softlabel.pipeline.training.stop import Stop, StoppedError
from softlabel.pipeline.training.trainer import DistillationTrainer, cursor_of
from softlabel.storage.errors import StudentError, TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import circumstances
from softlabel.storage.table import Table
from softlabel.storage.versions import parse, pin
from softlabel.storage.views.view import AnyTable, View, open_table

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
    """Train a student until it is finished, from its last checkpoint if it has one.

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
    folder = _folder(config)
    with stop_on_signals(folder) as stop:
        processes = to_start(config.optimizer)
        if processes and folder.finished() is None:
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
        return _train(config, folder, watch, stop, began)


def _folder(config: TrainConfig) -> StudentFolder:
    return StudentFolder(Path(config.output).absolute())


def _train(config: TrainConfig, folder: StudentFolder, watch: Watch, stop: Stop, began: float) -> TrainReport:
    ranks = PartialState()
    table = _agree(folder.open_table(config))
    if ranks.is_main_process:
        folder.clear()
    finished, origin = folder.finished(), Origin.of(table)
    if finished is not None:
        _require_source(config, origin, folder)
        return _report(config, finished, 0, None, time.monotonic() - began)

    target = require_loss(config, origin)
    if isinstance(table, View) and table.average and (config.loss.soft_weight or config.loss.soft_weight_end):
        require_average(config.loss, dropping(config.stream.max_k, origin.head))
    source = StudentSource.find(config.student, origin)
    folder.require_source(source)
    record = run_record(config, table, source, target)
    set_seed(config.optimizer.seed)
    student = _student(config, table, source)
    merge = adapt(student, config.student) if config.student.lora_r else None
    if config.optimizer.use_liger_kernel:
        use_liger(student)
    checkpoint = folder.checkpoint
    start = cursor_of(checkpoint) if checkpoint else Cursor()
    objective = _objective(config, table, student, target)
    with folder.writing():
        trainer = _trainer(config, objective, record, folder, start, _named(watch, folder.path.name), stop)
        if ranks.is_main_process:
            _pin(table, folder.path)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.complete:
        raise StoppedError

    step = trainer.choose()
    unshard(student)
    if merge:
        merge()
    record |= _outcome(student, trainer, step)
    if ranks.is_main_process:
        with folder.writing():
            folder.finish(student, table.tokenizer, record)
    ranks.wait_for_everyone()
    resumed_from = start.step if checkpoint else None
    return _report(config, record, trainer.state.global_step - start.step, resumed_from, time.monotonic() - began)


def _require_source(config: TrainConfig, origin: Origin, folder: StudentFolder) -> None:
    """Refuse a finished student made from other files; if the files no longer exist, it is accepted."""
    try:
        source = StudentSource.find(config.student, origin)
        _ = source.files
    except (StudentError, UsageError):
        return
    folder.require_source(source)


def _student(config: TrainConfig, table: AnyTable, source: StudentSource) -> PreTrainedModel:
    if _of_classes(table):
        return build_classifier(config.student, table, source)
    return build(config.student, table, config.stream.packing, source)


def _objective(config: TrainConfig, table: AnyTable, student: PreTrainedModel, target: Target | None) -> Objective:
    if _of_classes(table):
        return classifier_objective(config, table, student)
    return language_model_objective(config, table, student, target)


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


def _trainer(
    config: TrainConfig,
    objective: Objective,
    record: dict[str, Any],
    folder: StudentFolder,
    start: Cursor,
    watch: Watch,
    stop: Stop,
) -> DistillationTrainer:
    ranks, settings = PartialState(), config.optimizer
    dataset = objective.dataset(
        rank=ranks.process_index,
        world_size=ranks.num_processes,
        start=start,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    if settings.gradient_checkpointing:
        # Newer transformers deprecate the older name, the only one that older transformers have.
        student: Any = objective.module.student
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(folder.scratch),
        max_steps=dataset.total_steps,
        gradient_accumulation_steps=dataset.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup"
        if settings.lr_scheduler_type == "constant"
        else settings.lr_scheduler_type,
        warmup_steps=round(settings.warmup_ratio * dataset.total_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=on_cpu(settings),
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if objective.evaluation else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=bool(objective.evaluation) and start.step == 0,
        logging_steps=max(1, dataset.total_steps // _LOGGED_STEPS),
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the dataset already starts where the checkpoint was taken
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # softlabel.pipeline.training.launch handles several GPUs, never nn.DataParallel
    if not objective.evaluation and (settings.keeps_best or settings.early_stopping_patience is not None):
        raise UsageError(
            "early stopping and keeping the best weights need an eval split, and the table has none to evaluate on",
            expected="an eval split, or neither optimizer.early_stopping_patience nor optimizer.keep best",
            found=f"nothing to evaluate on in the eval split of version {record['table']['version']}",
            where=record["table"]["location"],
            do="leave these settings out, or capture more documents; shards.eval_fraction sets the share of them that "
            "goes to eval",
        )
    if settings.sharding == "full" and ranks.num_processes > 1:
        shard(objective.module, ranks.device, settings.bf16)
    trainer = DistillationTrainer(objective, arguments, dataset, folder.run, record, settings, watch, stop)
    if ranks.is_main_process:
        trainer.add_callback(TensorBoardCallback(folder.open_curves(start.step)))
    return trainer


def _of_classes(table: AnyTable) -> TypeGuard[Table]:
    """Whether the teacher is a classifier; the tables of a view always have language models as teachers."""
    return isinstance(table, Table) and table.identity.classes is not None


def _outcome(student: PreTrainedModel, trainer: DistillationTrainer, step: int) -> dict[str, Any]:
    """What the record gains when the run is finished."""
    history = [
        {name: entry[name] for name in ("step", *_HISTORY) if name in entry} for entry in trainer.state.log_history
    ]
    return {
        "parameters": parameters(student),
        "step": step,
        "history": [entry for entry in history if len(entry) > 1],
        "circumstances": circumstances(
            device=str(trainer.args.device),
            ranks=str(trainer.args.world_size),
            sharding="full" if is_sharded(trainer.model) else "none",
        ),
    }


def _report(
    config: TrainConfig, record: dict[str, Any], steps_trained: int, resumed_from: int | None, seconds: float
) -> TrainReport:
    trained = [entry for entry in record["history"] if "positions" in entry]
    positions = [entry["positions"] for entry in trained if entry["step"] <= record["step"]]
    metrics = last_evaluation(record)
    metrics.pop("step", None)
    return TrainReport(
        output=config.output,
        table=f"{parse(config.table)[0]}@{record['table']['version']}",
        steps=record["step"],
        stopped_at=trained[-1]["step"],
        steps_trained=steps_trained,
        resumed_from=resumed_from,
        parameters=record["parameters"],
        positions=positions[-1] if positions else 0,
        seconds=seconds,
        metrics=metrics,
    )
