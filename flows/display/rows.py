"""What ``softlabel show`` prints: the text of each row, and its tokens beside what the teacher expected."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from softlabel.flows.display.console import console, count, printable, table_of, try_next
from softlabel.pipeline.config.flags import as_flag

if TYPE_CHECKING:
    from softlabel.pipeline.tables.show import ShownRow, ShownToken, ShowReport

_STYLES = ("green", "yellow", "red", "bold white on red")
_LEVELS = (0.5, 0.1, 0.01)
"""Probabilities below which a token gets the next style."""
_SKIPPED = "bright_black"
_WIDEST = 18
"""Cells of a token in the list; longer ones are cut."""
_COLUMNS = 49
"""Cells of a line of the list before the choices."""
_LEFT_OUT = 60
"""Characters that are shown of the tokens that are not captured."""


def show_show(report: "ShowReport") -> None:
    """The rows with their texts and tokens; of a page, only where it is."""
    title = Text(f"{printable(report.table)} (version {report.version})", "bold")
    console.print(title, Text(f"{len(report.rows):,} of {count(report.matching, 'row')}", "dim"))
    if report.html is not None:
        would = "dry run: the page would be  " if report.dry_run else "page  "
        console.print(Text.assemble((would, "dim"), printable(report.html)))
        return
    if not report.rows[0].classes:
        console.print(_legend())
    for row in report.rows:
        _show_row(row, report)
    if any(len(row.tokens) > report.tokens and not row.classes for row in report.rows):
        try_next(
            [
                f"the same command with {as_flag('tokens', max(len(row.tokens) for row in report.rows))}"
                " lists every token; --html page.html has them on a page"
            ]
        )


def _legend() -> Text:
    words = ("at least 50%", "10 to 50%", "1 to 10%", "below 1%")
    parts: list[Any] = [("the teacher's probability of what follows: ", "dim")]
    for word, style in zip(words, _STYLES, strict=True):
        parts += [(word, style), ("  ", "")]
    return Text.assemble(*parts, ("⟦ ⟧ is captured; ", "dim"), ("the rest is not", _SKIPPED))


def _show_row(row: "ShownRow", report: "ShowReport") -> None:
    facts = [f"text {row.text} of {row.texts}"] if row.texts > 1 else []
    facts += [f"chunk {row.chunk + 1} of {row.chunks}", row.split, count(len(row.tokens), "token")]
    facts += [] if row.classes else [f"{row.positions:,} captured"]
    facts += [] if row.label is None else [f"label {row.label}"]
    facts += [f"{name} {value}" for name, value in row.carried.items()]
    facts += [row.table] if len(report.teachers) > 1 else []
    console.print()
    console.print(Text(printable(row.document), "bold"), Text(printable(" · ".join(facts)), "dim"))
    for line in _text(row).split("\n", allow_blank=True):
        console.print(Text("  | ", "dim") + line)
    if row.classes:
        _classes(row)
    else:
        for line in _list(row, report.tokens):
            console.print(line)


def _text(row: "ShownRow") -> Text:
    shown = Text()
    captured = False
    for token in row.tokens:
        if token.captured != captured:
            shown.append("⟦" if token.captured else "⟧", "dim")
            captured = token.captured
        style = "" if row.classes else _style(token)
        for i, line in enumerate(token.reading.split("\n")):
            shown.append("\n" if i else "")
            shown.append(_safe(line), style)
    return shown.append("⟧", "dim") if captured else shown


def _word(token: "ShownToken") -> str:
    """A token's own text and, if it ends a character that others began, the character."""
    return token.text if token.text.startswith(token.reading) else f"{token.text} = {token.reading}"


def _safe(text: str) -> str:
    """Text without anything that acts on the terminal, or that could be taken for a mark of ours."""
    return printable(text).replace("⟦", "\\u27e6").replace("⟧", "\\u27e7")


def _style(token: "ShownToken") -> str:
    if token.probability is None:
        return "" if token.captured else _SKIPPED
    return _STYLES[sum(token.probability < level for level in _LEVELS)]


def _list(row: "ShownRow", limit: int) -> Iterator[Text]:
    """The tokens from the first captured one, one a line; those that are not captured together."""
    numbered = list(enumerate(row.tokens))
    start = next((i for i, token in numbered if token.captured), 0)
    yield _line(
        "", Text("token", "dim"), "follows", "choice", "others", Text("what the teacher expected", "dim"), "dim"
    )
    for captured, group in groupby(numbered[start : start + limit], key=lambda each: each[1].captured):
        tokens = list(group)
        if captured:
            for i, token in tokens:
                yield from _predicted(i, token)
        else:
            text = Text(f"{count(len(tokens), 'token')} not captured: ", _SKIPPED)
            text.append(_cut(_quoted("".join(token.reading for _, token in tokens)), _LEFT_OUT))
            yield Text(f"{tokens[0][0]:>5}  ", _SKIPPED) + text


def _predicted(number: int, token: "ShownToken") -> Iterator[Text]:
    """A line for each teacher: the token's probability, its place among the choices, and the choices."""
    for i, prediction in enumerate(token.predictions):
        choices = Text()
        room = console.width - _COLUMNS if console.is_terminal else None
        for choice in prediction.choices:
            shown = f"{_cut(_quoted(choice.text), _WIDEST)} {_percent(choice.probability)}  "
            if room is not None and choices.cell_len + cell_len(shown) > room:
                break
            choices.append(shown, "bold" if choice.id == token.id else "dim")
        place = "-" if prediction.rank is None else str(prediction.rank)
        more = (place, _percent(prediction.outside), choices)
        if i:
            yield _line("", Text(), "", *more)
        else:
            token_shown = Text(_cut(_quoted(_word(token)), _WIDEST), _style(token))
            yield _line(str(number), token_shown, _percent(token.probability), *more)


def _line(number: str, token: Text, follows: str, place: str, others: str, choices: Text, style: str = "") -> Text:
    token.pad_right(max(0, _WIDEST - token.cell_len))
    return Text.assemble(
        (f"{number:>5}  ", "dim"), token, (f" {follows:>7} {place:>6} {others:>6}  ", style), choices, no_wrap=True
    )


def _classes(row: "ShownRow") -> None:
    table = table_of("class", "probability")
    for choice in row.classes:
        table.add_row(
            Text(printable(choice.text)), _percent(choice.probability), style="bold" if choice.text == row.label else ""
        )
    console.print(table)


def _quoted(text: str) -> str:
    """A text in quotes and in one line, in which nothing is invisible."""
    return f'"{printable(text)}"'


def _cut(text: str, widest: int) -> str:
    """A quoted text in as many cells at most."""
    return text if cell_len(text) <= widest else f"{set_cell_size(text, widest - 2)}…{text[-1]}"


def _percent(probability: float | None) -> str:
    if probability is None:
        return "?"
    return f"{probability:.1%}" if probability >= 0.001 else f"{probability:.0e}" if probability else "0%"
