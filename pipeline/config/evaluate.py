"""Settings of an evaluation."""

from typing import Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from softlabel.pipeline.config.base import Location, Settings
from softlabel.pipeline.config.train import Trackers


class CostConfig(Settings):
    """What it costs to use each model: besides its size, its speed and memory on this machine, with transformers."""

    measure: bool = True
    """Measure the speed and the memory, after the held-out documents. For a model of 135M parameters, this takes about
    ten seconds on two CPU cores."""
    prompt_tokens: PositiveInt = 256
    """Tokens of each prompt or, for classifiers, of each document. If left out, it is shortened until all models can
    read it."""
    new_tokens: PositiveInt = 16
    """Tokens that are generated after each prompt; shortened likewise."""
    batch_size: PositiveInt = 1
    """Prompts or documents at a time."""
    runs: PositiveInt = 3
    """Number of runs, of which the report has the median, the slowest and the fastest; one more comes first, to warm
    up."""


class TasksConfig(Settings):
    """Tasks of lm-eval that all models are also measured on (language models only): pip install 'softlabel[lm-eval]'"""

    names: tuple[str, ...] = ()
    """Tasks or groups of tasks, of those that come with lm-eval or are in the folders of include."""
    include: tuple[Location, ...] = ()
    """Folders with tasks of your own, in lm-eval's YAML. If names is left out, all tasks in these folders are run."""
    few_shot: NonNegativeInt | None = None
    """Solved examples in each prompt; if left out, as many as each task says. A task that sets 0 keeps it."""
    limit: PositiveInt | None = None
    """Only the first documents of each task, to try it out."""
    batch_size: PositiveInt = 8
    """Requests per forward pass."""
    trust_code: bool = False
    """Run Python code that tasks of include name, and code that models write, which some tasks execute."""


class EvaluateConfig(Settings):
    """Compare students with the teacher on the table's eval split, and write a report."""

    table: Location
    """Folder of the table; TABLE@12 opens version 12."""
    students: tuple[Location, ...]
    """Folders of trained students. Any other model with the table's tokenizer can stand among them for comparison, as a
    folder or hub name: the teacher itself, a model trained elsewhere, or an adapter on its base model."""
    control: Location | None = None
    """One more model, at whose distance from the teacher a gap starts, such as a student that was trained on the text
    alone: the report then shows how much of the gap each student closes."""
    reference: Location | None = None
    """With control: one more model, at whose distance the gap ends, such as a larger student. If left out, it ends at
    the teacher."""
    by: tuple[str, ...] = ()
    """Carried columns: also show the results for each of their values."""
    report: Location = "report"
    """Folder for report.html and report.json. If it has a report on another table or other students, that one is kept,
    and this one is written to a folder with a number after the name."""
    report_to: Trackers = ()
    """Trackers that also get each student's results, with their 95 % intervals, in the run of its training; each needs
    its package. tensorboard writes into the folder of the student, or of the report for another model."""
    device: str = "auto"
    """cpu, cuda, ...; auto uses a GPU if there is one."""
    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass."""
    cost: CostConfig = CostConfig()
    tasks: TasksConfig = TasksConfig()

    @model_validator(mode="after")
    def _reference_needs_a_control(self) -> Self:
        if self.reference is not None and self.control is None:
            raise ValueError("reference applies only with a control, at which the gap starts; give control too")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The students, and the control and the reference if they are not among them."""
        more = [model for model in (self.control, self.reference) if model is not None]
        return tuple(dict.fromkeys([*self.students, *more]))


class CompareConfig(EvaluateConfig):
    """Rank students on one version of a table, by their distance from the teacher, and write a report."""

    table: Location | None = None  # type: ignore[assignment]
    """Folder of the table; TABLE@12 opens version 12. If left out, the table that the students were trained on, at the
    newest version that one of them was trained on."""
    report: Location = "comparison"
    """Folder for report.html and report.json. If it has a report on another table or other students, that one is kept,
    and this one is written to a folder with a number after the name."""
