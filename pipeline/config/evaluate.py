"""Settings of an evaluation."""

from pydantic import PositiveInt

from softlabel.pipeline.config.base import Location, Settings


class EvaluateConfig(Settings):
    """Compare students with the teacher on the table's eval split, and write a report."""

    table: Location
    """Folder of the table; TABLE@12 opens version 12."""
    students: tuple[Location, ...]
    """Folders of trained students. Any other model with the table's tokenizer can stand among them for comparison, as a
    folder or hub name: the teacher itself, a model trained elsewhere, or an adapter on its base model."""
    by: tuple[str, ...] = ()
    """Carried columns: also show the results for each of their values."""
    report: Location = "report"
    """Folder for report.html and report.json. If it has a report on another table or other students, that one is kept,
    and this one is written to a folder with a number after the name."""
    device: str = "auto"
    """cpu, cuda, ...; auto uses a GPU if there is one."""
    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass."""
