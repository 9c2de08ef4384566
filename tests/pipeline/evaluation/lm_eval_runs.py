"""Evaluations with tasks of lm-eval, in a process that finds it: ``make test-long`` installs it into its own folder.

``python -m tests.pipeline.evaluation.lm_eval_runs`` reads a list of calls as JSON, each with the name of a function
here and its arguments, and prints their results, or their errors.
"""

import contextlib
import json
import sys
from typing import Any

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate, preview_evaluate
from softlabel.pipeline.progress import Progress
from softlabel.storage.errors import SoftlabelError


def evaluated(config: dict[str, Any], dies_at: str | None = None, dry_run: bool = False) -> dict[str, Any]:
    """The report's path and the stages that were seen, unless the evaluation is killed at one of them."""
    stages: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.stage == dies_at:
            raise KeyboardInterrupt
        if progress.stage not in stages:
            stages.append(progress.stage)

    try:
        if dry_run:
            return {"files": preview_evaluate(EvaluateConfig(**config)).files}
        return {"json": evaluate(EvaluateConfig(**config), watch).json, "stages": stages}
    except KeyboardInterrupt:
        return {"stages": stages}
    except SoftlabelError as error:
        return {"error": type(error).__name__, "text": str(error), "stages": stages}


def expected(model: str, include: str, tasks: list[str], few_shot: int | None = None) -> dict[str, Any]:
    """What lm-eval's own command computes for a model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            tasks=tasks,
            num_fewshot=few_shot,
            batch_size=8,
            device="cpu",
            task_manager=TaskManager(include_path=include, include_defaults=False),
            bootstrap_iters=1,  # 0 would give no standard errors
        )
    return {task: {k: v for k, v in each.items() if isinstance(v, float)} for task, each in found["results"].items()}


if __name__ == "__main__":
    calls = json.load(sys.stdin)
    print(json.dumps([globals()[name](**arguments) for name, arguments in calls]))
