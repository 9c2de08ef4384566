"""Settings of the command that lists the documents that a capture could not use, or not as a whole."""

from pydantic import PositiveInt

from softlabel.pipeline.config.base import Location, Settings


class RejectsConfig(Settings):
    """List the documents that the newest capture could not use, and those that the table holds cut short, by reason."""

    table: Location
    """Folder of the table or view."""
    reason: str | None = None
    """List the documents whose reason contains this text, in upper or lower case."""
    limit: PositiveInt = 20
    """List at most this many documents."""
