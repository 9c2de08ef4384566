"""When a run stops, and which of its weights it keeps: decided by the evaluations in its log alone.

So a run that was killed and goes on decides as the uninterrupted one would. Evaluates and saves nothing.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.student_folder import best_weights, checkpoints, step_of

History = Sequence[Mapping[str, float]]
"""What the Trainer has logged; an entry with ``eval_kl`` is an evaluation after its ``step``."""


def best_step(history: History, until: float = math.inf) -> int:
    """Step of the evaluation with the lowest eval_kl, the first of equals, among those up to a step."""
    evaluated = [entry for entry in history if "eval_kl" in entry and entry["step"] <= until]
    return int(min(evaluated, key=lambda entry: entry["eval_kl"])["step"])


def evaluations_since_best(history: History) -> int:
    """Evaluations in a row that have brought nothing better."""
    best = best_step(history)
    return sum("eval_kl" in entry and entry["step"] > best for entry in history)


def drop_superseded(run: Path, history: History) -> None:
    """Delete weights that were the best once, but for those that a run from the last checkpoint would still need."""
    moments = [math.inf, *(step_of(checkpoint) for checkpoint in checkpoints(run)[-1:])]
    needed = {best_weights(run, best_step(history, until)) for until in moments}
    for weights in set(run.glob("best-*")) - needed:
        shutil.rmtree(weights)
