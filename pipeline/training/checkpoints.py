"""A run's checkpoints, and its best weights so far: what makes a checkpoint complete, and which are kept."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from softlabel.pipeline.students.folder import RUN, best_weights, checkpoints, step_of
from softlabel.pipeline.students.manifest import seal
from softlabel.pipeline.students.record import RunRecord
from softlabel.storage.places import durable

WEIGHTS = "model.safetensors"
"""File with the weights, in a checkpoint and in the folder of the best weights."""
KEPT = 2
"""Checkpoints that are kept: if the last one is damaged, training goes on from the one before."""
History = Sequence[Mapping[str, float]]
"""The Trainer's log; an entry with ``eval_kl`` is an evaluation after its ``step``."""


def best_step(history: History, until: float = math.inf) -> int:
    """Step of the evaluation with the lowest eval_kl (the first of several) up to a step."""
    evaluated = [entry for entry in history if "eval_kl" in entry and entry["step"] <= until]
    return int(min(evaluated, key=lambda entry: entry["eval_kl"])["step"])


def evaluations_since_best(history: History, steps_before: int = 0) -> int:
    """Number of evaluations since the best one; of earlier runs, whose steps are ``steps_before``, none counts."""
    best = max(best_step(history), steps_before)
    return sum("eval_kl" in entry and entry["step"] > best for entry in history)


def drop_superseded(run: Path, history: History) -> None:
    """Delete formerly best weights, except those that a run resumed from a checkpoint would still need."""
    last_steps = [math.inf, *map(step_of, checkpoints(run))]
    needed = {best_weights(run, best_step(history, until)) for until in last_steps}
    for superseded in set(run.glob("best-*")) - needed:
        shutil.rmtree(superseded)


def publish(written: Path, run: Path, record: RunRecord, history: History, keeps_best: bool) -> None:
    """Move a checkpoint into the run's folder, and delete what it supersedes once it is durable; see ``complete``."""
    complete(written, run, record, history, keeps_best)
    durable.publish(written, run / written.name)
    for old in checkpoints(run)[:-KEPT]:
        durable.remove_folder(old, written.parent)
    if keeps_best:
        drop_superseded(run, history)


def complete(written: Path, run: Path, record: RunRecord, history: History, keeps_best: bool) -> None:
    """Write the record and the manifest of a checkpoint.

    Args:
        written: the checkpoint under its temporary name, without its record.
        run: folder of the run.
        record: the run's record at this checkpoint.
        history: the Trainer's log until then.
        keeps_best: whether a run that goes on from it needs the best weights so far.
    """
    (written / RUN).write_text(record.to_json(), encoding="utf-8")
    seal(written, run / written.name, [best_weights(run, best_step(history)) / WEIGHTS] if keeps_best else [])
