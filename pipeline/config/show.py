"""Settings of the commands that look into a table."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from softlabel.pipeline.config.base import Location, Settings


class ShowConfig(Settings):
    """Show rows of a table token by token: the text, what is captured, and what the teacher expected there.

    Without document, where and random, one row is shown, drawn at random.
    """

    table: Location
    """Folder of the table or view; TABLE@12 or TABLE@tag opens that version instead of the newest."""
    document: str | None = None
    """Show the rows of the document with this id, chunk by chunk."""
    where: str | None = None
    """Show rows for which this SQL expression is true, for example "source = 'web' AND chunk = 2". It may contain
    columns (carried ones too), literals, operators and a few functions; an error message lists them."""
    random: PositiveInt | None = None
    """Show this many rows, drawn at random from all rows or from those of where."""
    seed: NonNegativeInt = 0
    """Seed for drawing rows."""
    limit: PositiveInt = 10
    """Show at most this many rows of a document or of where."""
    choices: PositiveInt = 5
    """Show this many of the teacher's likeliest choices for each token."""
    tokens: PositiveInt = 100
    """List this many tokens of each row in the terminal, from the first captured one. The text above the list, the page
    and --json have all of them."""
    html: Location | None = Field(default=None)
    """Write the rows to this file, PAGE.html, as a page that needs no other file and no network."""

    @field_validator("html")
    @classmethod
    def _is_a_page(cls, html: str | None) -> str | None:
        if html is not None and ("://" in html or Path(html).suffix.lower() not in (".html", ".htm")):
            raise ValueError("must be a file on this machine whose name ends in .html")
        return html

    @model_validator(mode="after")
    def _either_a_document_or_random(self) -> Self:
        if self.document is not None and self.random is not None:
            raise ValueError("document shows the rows of one document; leave out random")
        return self
