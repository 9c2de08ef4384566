"""Settings of an evaluation."""

from pydantic import PositiveInt

from softlabel.pipeline.config.base import Location, Settings


class EvaluateConfig(Settings):
    """Compare students with the teacher on the table's eval split, and write a report."""

    table: Location
    """Folder of the table; TABLE@12 opens version 12."""
    students: tuple[Location, ...]
    """Folders of trained students."""
    report: Location = "report"
    """Folder for report.html and report.json."""
    device: str = "auto"
    """cpu, cuda, ...; auto uses a GPU if there is one."""
    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass."""
