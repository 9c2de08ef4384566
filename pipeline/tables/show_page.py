"""Rows of a table as one self-contained page, on which a token shows what the teacher expected in its place.

Text from documents only ever becomes text on the page: the template escapes it, and the page's own script, the only one
that its policy lets a browser run, sets text and no markup.
"""

import hashlib
import json
import re
from base64 import b64encode
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from softlabel.pipeline.tables.show import ShownRow, ShownToken, ShowReport
from softlabel.storage.errors import UsageError, printable
from softlabel.storage.places import durable

_LEVELS = (0.5, 0.1, 0.01)
"""A token with a probability below each of these is shown as more of a surprise."""


def write_page(report: ShowReport, path: str) -> None:
    """Write the page at once; a dry run only looks at the permissions of its folder.

    Raises:
        UsageError: if it can't be written.
    """
    try:
        if report.dry_run:
            durable.require_permission(Path(path).parent)
        else:
            durable.write(Path(path), to_html(report).encode())
    except OSError as error:
        raise UsageError(
            "the page can't be written",
            expected="a file in a writable folder, on a disk with free space",
            found=error,
            where=Path(path).absolute(),
            do="choose another place for --html",
        ) from error


def to_html(report: ShowReport) -> str:
    """The report as one self-contained page."""
    templates = Environment(
        loader=PackageLoader("softlabel.pipeline.tables"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"visible": visible, "lines": _lines, "surprise": surprise, "value": _value}
    script = templates.get_template("show.js.j2").render()
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("show.html.j2").render(
        report=report, script=Markup(script), digest=digest, data=_data(report.rows)
    )


def surprise(token: ShownToken) -> int:
    """0 for a token that the teacher expected, up to 3 for one that it thought very unlikely."""
    return 0 if token.probability is None else sum(token.probability < level for level in _LEVELS)


def visible(text: str, kept: str = "") -> str:
    """The text with everything that can't be seen, or that acts on other text, as an escape."""
    return printable(text, kept)


def _lines(text: str) -> Markup:
    """A token's text with visible line ends and tabs."""
    escaped = str(Markup.escape(visible(text, "\n\t")))
    shown = re.sub("\n", '<i class="end">↵</i>\n', escaped)
    return Markup(shown.replace("\t", '<i class="end">→</i>\t'))


def _value(value: Any) -> str:
    """A carried value."""
    return visible(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))


def _data(rows: tuple[ShownRow, ...]) -> Markup:
    """What the page's script shows of each token, as JSON that can't end the element that it is in."""
    tokens = [[_token(token) for token in row.tokens] for row in rows]
    text = json.dumps(tokens, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _token(token: ShownToken) -> dict[str, Any]:
    kept: dict[str, Any] = {"id": token.id, "text": visible(token.text)}
    kept |= {} if token.text.startswith(token.reading) else {"completes": visible(token.reading)}
    if token.captured:
        predictions = [asdict(each) for each in token.predictions]
        for each in predictions:
            for choice in each["choices"]:
                choice |= {"text": visible(choice["text"]), "probability": _rounded(choice["probability"])}
            each |= {"entropy": _rounded(each["entropy"]), "outside": _rounded(each["outside"])}
        kept |= {"probability": _rounded(token.probability), "predictions": predictions}
    return kept


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")
