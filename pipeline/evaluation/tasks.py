"""Measures language models on tasks of lm-eval: those that come with it, and those in folders of the user.

lm-eval is an optional package, imported only if a task is asked for. Tasks are loaded with their data before any model
is, so that what is missing is found early. Python code that a user's task names, and code that models write, runs only
if the settings allow it; templates are rendered in a sandbox. The docstrings here are part of the description of
report.json.
"""

import io
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from itertools import combinations
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel

from softlabel.pipeline.config.evaluate import TasksConfig
from softlabel.pipeline.evaluation.bootstrap import Difference, around
from softlabel.pipeline.evaluation.task_files import require_no_code, require_tasks
from softlabel.storage.errors import SoftlabelError, StudentError, UsageError

_PACKAGE = "lm_eval"
_SEED = 1234
"""That of lm-eval's own command, for the choice of solved examples and for sampling; ``random`` gets 0 there."""
_RESAMPLES = 1000
"""For the standard error of a metric that is no mean."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one model on a task, or on a group of tasks."""

    task: str
    metric: str
    """Name of the metric, followed by that of lm-eval's filter if there is one."""
    value: float
    error: float | None
    """Standard error over the task's documents, by lm-eval; None if it gives none."""
    documents: int
    few_shot: int | None
    """Solved examples in each prompt; None for a group whose tasks differ in it."""
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskComparison:
    """Two models on the same documents of a task."""

    student: str
    other: str
    task: str
    metric: str
    difference: Difference
    """How much larger the first one's mean is."""


@dataclass(frozen=True)
class MeasuredTasks:
    """The scores of one model, and what it takes to compare it with others."""

    scores: tuple[TaskScore, ...] = ()
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By task and metric, the value of each document, if the score is their mean."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded with their data."""

    config: TasksConfig
    loaded: Mapping[str, Any]
    """As lm-eval's ``TaskManager`` returns them."""
    tokenizer: Any

    @classmethod
    def load(cls, config: TasksConfig, tokenizer: Callable[[], Any]) -> Self | None:
        """The tasks that the settings ask for; None if they ask for none.

        Args:
            config: the settings.
            tokenizer: loads the models' tokenizer.

        Raises:
            UsageError: if lm-eval is not installed, a task does not exist or can't be loaded, or one would run code
                that the settings do not allow.
        """
        if not (config.names or config.include):
            return None
        if find_spec(_PACKAGE) is None:
            raise UsageError(
                "tasks need the package lm-eval, which is not installed",
                found=f"tasks: {' '.join(config.names or config.include)}",
                do="pip install 'softlabel[lm-eval]', or leave out the tasks",
            )
        folders = [Path(folder) for folder in config.include]
        with _quiet(config):
            from lm_eval.api import metrics, registry
            from lm_eval.tasks import TaskManager

            assert metrics  # importing it registers the metrics

            for folder in folders:
                require_tasks(folder)
                if not config.trust_code:
                    require_no_code(folder, frozenset(registry.metric_registry.keys()))
            # Reading the thousands of tasks that come with lm-eval takes seconds.
            manager = TaskManager(include_path=list(config.include), include_defaults=bool(config.names))
            names = config.names or _names_in(folders, manager)
            _require_known(names, manager)
            loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in names:
                for part, entries in _loaded(name, manager).items():
                    loaded[part] |= entries
            for name, task in loaded["tasks"].items():
                _require_runnable(name, task, config)
                _set_few_shot(task, config.few_shot)
        return cls(config, loaded, tokenizer())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the results, beside the model."""
        settings = self.config.model_dump(mode="json")
        content = {name: [task.dump_config(), _documents(task)] for name, task in self.loaded["tasks"].items()}
        text = json.dumps(content, sort_keys=True, default=str)
        hashed = blake2b(text.encode(), digest_size=16).hexdigest()
        return {"settings": settings, "tasks": hashed, "lm-eval": self.version}

    @property
    def version(self) -> str:
        """Version of lm-eval."""
        return version(_PACKAGE)

    def measure(self, model: PreTrainedModel, name: str, done: Callable[[int, int], None]) -> MeasuredTasks:
        """The scores of a model.

        Args:
            model: a language model.
            name: its name, for an error.
            done: called with the number of requests that were answered and of all requests of their kind.

        Raises:
            StudentError: if a task can't be run with it.
        """
        with _quiet(self.config), torch.random.fork_rng():
            from lm_eval.evaluator import evaluate

            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(_SEED)
            try:
                found = evaluate(
                    _answering(model, deepcopy(self.tokenizer), self.config.batch_size, done),
                    dict(self.loaded),
                    limit=self.config.limit,
                    bootstrap_iters=_RESAMPLES,
                    confirm_run_unsafe_code=self.config.trust_code,
                )
            except (SoftlabelError, KeyboardInterrupt):
                raise
            except Exception as error:  # tasks can raise anything
                raise StudentError(
                    f"{name} can't be measured on the tasks",
                    expected="tasks that lm-eval can run with this model",
                    found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                    where=" ".join(self.loaded["tasks"]),
                    do="correct the task or leave it out; if memory ran out, choose a smaller tasks.batch_size. The"
                    " finished measurements are kept",
                ) from error
        scores = tuple(_scores(found))
        return MeasuredTasks(scores, dict(_values(found, scores)))


def compared_tasks(names: Sequence[str], measured: Sequence[MeasuredTasks]) -> tuple[TaskComparison, ...]:
    """Each pair of models on the documents of each task whose score is a mean over them."""
    pairs = []
    for (name, first), (other, second) in combinations(zip(names, measured, strict=True), 2):
        for score in first.scores:
            key = _key(score.task, score.metric)
            if key not in first.values or len(first.values[key]) != len(second.values.get(key, ())):
                continue
            differences = np.array(first.values[key]) - np.array(second.values[key])
            count = len(differences)
            error = float(differences.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
            found = around(float(differences.mean()), error, count)
            difference = Difference(found.mean, found.error, found.interval)
            pairs.append(TaskComparison(name, other, score.task, score.metric, difference))
    return tuple(pairs)


def _names_in(folders: Sequence[Path], manager: Any) -> list[str]:
    """The tasks whose files are in these folders."""
    inside = [folder.resolve() for folder in folders]
    entries = ((name, manager.task_index[name].yaml_path) for name in manager.all_subtasks)
    found = [name for name, path in entries if path and any(Path(path).resolve().is_relative_to(f) for f in inside)]
    if not found:
        raise UsageError(
            "there is no task in these folders that lm-eval can read",
            expected="files with the settings of a task, such as task, dataset_path and output_type",
            where=" ".join(map(str, folders)),
            do="correct the files, or name tasks with tasks.names",
        )
    return found


def _require_known(names: Sequence[str], manager: Any) -> None:
    """Refuse names that lm-eval does not know; it would take them for paths of files."""
    from difflib import get_close_matches

    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"there is no task {name}",
                expected="a task or group of tasks of lm-eval, or of a folder in tasks.include",
                found=name,
                do=f"did you mean {' or '.join(near)}?" if near else "check the name, and tasks.include",
            )


def _loaded(name: str, manager: Any) -> Mapping[str, Any]:
    """A task or the tasks of a group, with their data."""
    try:
        found: Mapping[str, Any] = manager.load([name])
        for task in found["tasks"].values():
            _try_prompt(task)
    except Exception as error:  # tasks and the readers of their data can raise anything
        from datasets import config

        raise UsageError(
            f"the task {name} can't be loaded",
            expected="a task whose data is on disk, or can be downloaded",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            do="nothing is downloaded, because HF_HUB_OFFLINE is set: load the task's data once without it, or choose a"
            " task whose data is on disk"
            if config.HF_HUB_OFFLINE
            else "check the task's settings and the connection to the hub; a task whose data is on disk needs none",
        ) from error
    return found


def _try_prompt(task: Any) -> None:
    """Make the first document's prompt, so that a wrong template is found at once."""
    document = next(iter(task.eval_docs))
    task.doc_to_text(document)
    task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        task.doc_to_choice(document)


def _require_runnable(name: str, task: Any, config: TasksConfig) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not config.trust_code:
        raise UsageError(
            f"the task {name} runs code that the models write, which softlabel is not allowed to do",
            expected="a task without unsafe_code",
            do="run softlabel where such code can do no harm, and set tasks.trust_code; or choose another task",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(
            f"the task {name} needs a model that reads images or sound, and students read only text",
            do="choose another task",
        )


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    """As lm-eval's own command does: a task that sets 0 keeps it, because its prompts allow no examples."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):
        task.set_config(key="num_fewshot", value=few_shot or 0)


def _documents(task: Any) -> list[Any]:
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else ()
    return [*task.eval_docs, *examples]


def _answering(model: PreTrainedModel, tokenizer: Any, batch_size: int, done: Callable[[int, int], None]) -> Any:
    """The model as lm-eval asks it."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]
        """Counts the requests that are answered."""

        answered, asked = 0, 1

        def add_partial(self, *_: Any) -> None:
            """Called for each answer, which lm-eval's own hook would keep."""
            self.answered += 1
            done(min(self.answered, self.asked), self.asked)

        def _begin(self, requests: Sequence[Any]) -> None:
            self.answered, self.asked = 0, len(requests)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

    asked = Counting(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
    )
    asked.set_cache_hook(asked)
    return asked


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The scores in lm-eval's results."""
    shots, better = found["n-shot"], found["higher_is_better"]
    for task, results in {**found["results"], **found.get("groups", {})}.items():
        for key, value in results.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            error = results.get(f"{metric}_stderr,{chosen}")
            yield TaskScore(
                task=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=float(value),
                error=float(error) if isinstance(error, int | float | np.number) and isfinite(error) else None,
                documents=int(results["sample_len"]),
                few_shot=shots.get(task),
                higher_is_better=better.get(task, {}).get(metric),
            )


def _values(found: Mapping[str, Any], scores: Sequence[TaskScore]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The values of the documents, in their order, for each score that is their mean."""
    for score in scores:
        metric, _, chosen = score.metric.partition(" (")
        samples = [each for each in found["samples"].get(score.task, ()) if each["filter"] == (chosen[:-1] or "none")]
        values = [each.get(metric) for each in sorted(samples, key=lambda each: int(each["doc_id"]))]
        if values and all(isinstance(value, int | float | np.number) for value in values):
            numbers = tuple(map(float, values))
            if abs(float(np.mean(numbers)) - score.value) <= 1e-9 * max(1.0, abs(score.value)):
                yield _key(score.task, score.metric), numbers


def _key(task: str, metric: str) -> str:
    return f"{task} {metric}"


@contextmanager
def _quiet(config: TasksConfig) -> Iterator[None]:
    """Let lm-eval print nothing, start no processes, run no code from templates, and begin with its own seeds."""
    from tqdm import tqdm

    def hidden(self: Any, *arguments: Any, **named: Any) -> None:
        shows(self, *arguments, **{**named, "disable": True})

    random_state, numpy_state = random.getstate(), np.random.get_state()
    logger, shows = logging.getLogger(_PACKAGE), tqdm.__init__
    level, alone = logger.level, os.environ.get("DISABLE_MULTIPROC")
    random.seed(0)
    np.random.seed(_SEED)
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    tqdm.__init__ = hidden
    try:
        with redirect_stdout(io.StringIO()), _sandbox(config.trust_code):
            yield
    finally:
        tqdm.__init__ = shows
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        logger.setLevel(level)
        random.setstate(random_state)
        np.random.set_state(numpy_state)


@contextmanager
def _sandbox(trusted: bool) -> Iterator[None]:
    """Render the templates of tasks in a sandbox; in Jinja's plain environment, a template can run any code."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    if not trusted:
        utils.env = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=True)
        utils.env.filters |= plain.filters
    try:
        yield
    finally:
        utils.env = plain
