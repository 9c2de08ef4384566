"""The report's charts, as SVG to embed in its page.

Colors are roles, whose values the page's style sheet sets for light and dark mode. A student has the same role in every
chart. Knows nothing of models, tables or files.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from softlabel.storage.errors import printable

SERIES = 6
"""Number of colors in the page's style sheet; further series repeat them, dashed and with hollow marks."""

_FEWEST = 30
"""Positions of a bin of confidence that is drawn."""
_TALLEST = 45
"""Height of a group's dots, in the units of a drawing."""
_WIDTH = 400  # of a drawing, in its own units; the page scales it
_ROLES = {"ink": "#000001", "muted": "#000002", "line": "#000003"} | {
    f"series-{index}": f"#0000{index + 10}" for index in range(SERIES)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "softlabel",  # the same report gives the same page
    "text.parse_math": False,  # a folder may have a dollar in its name
    "font.size": 9.5,
    "text.color": _ROLES["ink"],
    "axes.edgecolor": _ROLES["line"],
    "axes.labelcolor": _ROLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _ROLES["line"],
    "grid.linewidth": 0.6,
    "xtick.color": _ROLES["line"],
    "ytick.color": _ROLES["line"],
    "xtick.labelcolor": _ROLES["muted"],
    "ytick.labelcolor": _ROLES["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


class Score(Protocol):
    """A mean and its interval."""

    @property
    def mean(self) -> float:
        """The mean."""
        ...

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval; None if unknown."""
        ...


class Confidence(Protocol):
    """Positions at which a model is about equally confident."""

    @property
    def positions(self) -> int:
        """Their number."""
        ...

    @property
    def confidence(self) -> float:
        """Mean probability of the most likely token."""
        ...

    @property
    def correct(self) -> float:
        """How often it follows."""
        ...


@dataclass(frozen=True)
class Bar:
    """One model's scores; ``index`` is a student's place in the report, which sets its color, or -1 for the teacher."""

    index: int
    name: str
    values: Sequence[Score]

    @property
    def color(self) -> str:
        """Placeholder that becomes the series' color."""
        return _color(self.index)


@dataclass(frozen=True)
class Dot:
    """One model's size or speed, and its score; ``index`` is its place in the report, which sets its color."""

    index: int
    name: str
    x: float
    y: float
    reach: float | None
    """Half of the score's 95 % interval; None if unknown."""


@dataclass(frozen=True)
class Curve:
    """One model's line; ``index`` is a student's place in the report, which sets its color, or -1 for the teacher."""

    index: int
    name: str
    x: Sequence[float]
    y: Sequence[float]

    @property
    def color(self) -> str:
        """Placeholder that becomes the series' color."""
        return _color(self.index)

    @property
    def dashes(self) -> str:
        """Line style: dashed once the colors repeat."""
        return "--" if self.index >= SERIES else "-"


def _color(index: int) -> str:
    return _ROLES["muted" if index < 0 else f"series-{index % SERIES}"]


def _mark(index: int) -> dict[str, Any]:
    """Properties of a series' marks: hollow once the colors repeat."""
    return {"color": _color(index), "marker": "o"} | ({"markerfacecolor": "none"} if index >= SERIES else {})


def by_cost(dots: Sequence[Dot], xlabel: str, ylabel: str) -> str:
    """A dot for each model over its size or speed, with a line for its interval."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=230)
        for dot in dots:
            axes.errorbar(dot.x, dot.y, yerr=dot.reach, markersize=6, linewidth=1.8, **_mark(dot.index))
        axes.set_xscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.set_ylim(0, 1.1 * max(dot.y + (dot.reach or 0) for dot in dots))
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted({dot.x for dot in dots}), low, high)))
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0 if low >= 10 else 1))
        axes.xaxis.set_minor_locator(NullLocator())
        _label_ends(axes, [Curve(dot.index, dot.name, [dot.x], [dot.y]) for dot in dots])
        return _svg(figure, f"{ylabel} of each model by {xlabel}")


def _apart(values: Sequence[float], low: float, high: float) -> list[float]:
    """Those of some sorted values whose labels have room on a logarithmic axis."""
    room, found = (1.5**2 * high / low) ** 0.1, [values[0]]
    for value in values:
        if value >= found[-1] * room:
            found.append(value)
    return found


def by_position(curves: Sequence[Curve], ylabel: str) -> str:
    """Lines over the place in the sequence, which is scaled by its logarithm."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=230)
        for curve in curves:
            axes.plot(curve.x, curve.y, curve.dashes, **_mark(curve.index), markersize=3.5)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position in the sequence", ylabel=ylabel)
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
        _ylim(axes, [curve.y for curve in curves])
        _label_ends(axes, curves)
        return _svg(figure, f"{ylabel} by the position in the sequence")


def reliability_of(index: int, name: str, bins: Sequence[Confidence]) -> Curve:
    """A model's line in ``reliability``, without bins of few positions, whose shares are chance."""
    drawn = [each for each in bins if each.positions >= _FEWEST] or bins
    return Curve(index, name, [each.confidence for each in drawn], [each.correct for each in drawn])


def reliability(curves: Sequence[Curve], what: str, right: str) -> str:
    """How often each model is right, over how confident it is, next to the diagonal.

    Args:
        curves: from ``reliability_of``.
        what: what models predict, such as "token".
        right: how often it is right, in words.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=290)
        axes.plot([0, 1], [0, 1], ":", color=_ROLES["muted"], linewidth=1)
        for curve in curves:
            axes.plot(curve.x, curve.y, curve.dashes, **_mark(curve.index), markersize=3.5)
        axes.set(xlabel=f"probability of the most likely {what}", ylabel=right, xlim=(0, 1), ylim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _label_ends(axes, curves)
        return _svg(figure, f"{right}, by the probability of the most likely {what}")


def by_group(bars: Sequence[Bar], names: Sequence[str], xlabel: str) -> str:
    """A dot for each group and student, with a line for its interval; names of groups are shortened."""
    with mpl.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _canvas(height=70 + len(names) * (10 + min(9 * len(bars), _TALLEST)))
        gap = 0.6 / len(bars)
        for place, bar in enumerate(bars):
            for group, value in enumerate(bar.values):
                height = group + (place - (len(bars) - 1) / 2) * gap
                axes.plot(value.mean, height, markersize=4.5, **_mark(bar.index))
                if value.interval is not None:
                    axes.plot(value.interval, [height, height], linewidth=1.6, color=bar.color)
        axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
        axes.set_xlim(left=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        return _svg(figure, f"{xlabel} of each student, by group")


def by_step(curves: Sequence[Curve], ylabel: str, *, smooth: bool = False) -> str:
    """Lines over the training step; ``smooth`` draws a running mean over the faint values."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=230)
        for curve in curves:
            y = _running_mean(curve.y) if smooth else curve.y
            if smooth:
                axes.plot(curve.x, curve.y, color=curve.color, alpha=0.25, linewidth=0.8)
            marker = "o" if len(curve.x) < 25 and not smooth else ""
            axes.plot(curve.x, y, curve.dashes, color=curve.color, marker=marker, markersize=3.5)
        axes.set(xlabel="training step", ylabel=ylabel)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _ylim(axes, [_running_mean(c.y) if smooth else c.y for c in curves])
        _label_ends(axes, curves)
        return _svg(figure, f"{ylabel} by training step")


def by_entropy(
    curves: Sequence[Curve], edges: Sequence[tuple[float, float]], counts: Sequence[int], ylabel: str
) -> str:
    """Lines over the teacher's entropy, above the number of positions in each bin."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, 290 / 72), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for curve in curves:
            axes.plot(curve.x, curve.y, curve.dashes, **_mark(curve.index), markersize=3.5)
        axes.set(ylabel=ylabel)
        axes.tick_params(axis="x", length=0)
        _ylim(axes, [curve.y for curve in curves])
        lows, highs = np.array(edges).T
        below.bar(lows, counts, width=(highs - lows) * 0.92, align="edge", color=_ROLES["muted"], alpha=0.55)
        below.set(xlabel="teacher's entropy (nats)", ylabel="positions", ylim=(0, None))
        below.yaxis.set_major_formatter(EngFormatter(sep=""))
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        figure.align_ylabels()
        _label_ends(axes, curves)
        return _svg(figure, f"{ylabel} by the teacher's entropy, with the number of positions")


def by_score(bars: Sequence[Bar], names: Sequence[str]) -> str:
    """A group of dots for each score, one dot per model, with a line for its 95 % interval."""
    with mpl.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _canvas(height=60 + len(names) * 16 * len(bars))
        gap = 0.75 / len(bars)
        for place, bar in enumerate(bars):
            heights = np.arange(len(names)) + (place - (len(bars) - 1) / 2) * gap
            means = [estimate.mean for estimate in bar.values]
            errors = [_reach(estimate) for estimate in bar.values]
            axes.errorbar(means, heights, xerr=errors, linestyle="", markersize=5, linewidth=1.8, **_mark(bar.index))
            axes.annotate(
                _shortened(bar.name),
                (means[0] + errors[0], heights[0]),
                xytext=(5, 0),
                textcoords="offset points",
                color=bar.color,
                va="center",
                fontweight="bold",
                annotation_clip=False,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(right=1)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return _svg(figure, f"{', '.join(names)} of each model")


def confusion(index: int, counts: Sequence[Sequence[int]], names: Sequence[str], model: str) -> str:
    """Documents by their label (down) and a model's prediction (across): the darker, the larger the label's share."""
    color, size = _ROLES[f"series-{index % SERIES}"], len(names)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _canvas(height=min(400, 120 + 26 * size))
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                share = count / max(1, sum(line))
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=0.75 * share, linewidth=0))
                if count:
                    axes.annotate(str(count), (column, row), ha="center", va="center", fontsize=max(5, 10 - size / 4))
        axes.set(
            xlim=(-0.5, size - 0.5),
            ylim=(size - 0.5, -0.5),
            xlabel=f"prediction of {_shortened(model)}",
            ylabel="label",
        )
        axes.set_xticks(range(size), map(_shortened, names), rotation=45, ha="right")
        axes.set_yticks(range(size), map(_shortened, names))
        return _svg(figure, f"documents by label and by prediction of {model}")


def _reach(score: Score) -> float:
    return 0.0 if score.interval is None else (score.interval[1] - score.interval[0]) / 2


def _shortened(name: str) -> str:
    """A name in which nothing is invisible, in at most 20 characters."""
    shown = printable(name)
    return shown if len(shown) <= 20 else f"{shown[:19]}…"


def _canvas(height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _running_mean(values: Sequence[float]) -> Sequence[float]:
    """Mean over about a twentieth of the values, shorter at both ends so that no value is invented."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    reach = np.minimum(np.minimum(middle, len(values) - 1 - middle), half)
    means: list[float] = ((sums[middle + reach + 1] - sums[middle - reach]) / (2 * reach + 1)).tolist()
    return means


def _ylim(axes: Axes, lines: Sequence[Sequence[float]]) -> None:
    """From 0, because these are distances; a first value far above the rest does not flatten the curve."""
    values = np.concatenate([np.asarray(line, float) for line in lines])
    axes.set_ylim(0, 1.08 * min(np.max(values), 4 * np.median(values)) or 1)


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each name at the end of its line, spread out where lines meet."""
    low, high = axes.get_ylim()
    ordered = sorted(curves, key=lambda curve: curve.y[-1])
    heights = _spread_out([(curve.y[-1] - low) / (high - low) for curve in ordered], gap=0.085)
    for curve, height in zip(ordered, heights, strict=True):
        axes.annotate(
            _shortened(curve.name),
            (1.015, height),
            xycoords="axes fraction",
            color=curve.color,
            va="center",
            fontweight="bold",
        )


def _spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights at least a gap apart: pushed up, then down again where that went beyond the top."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _svg(figure: Figure, label: str) -> str:
    """The drawing as an element of the page: scalable, labelled for screen readers, with roles as colors."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page is shown in the reader's fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    drawing = buffer.getvalue()
    body = drawing[drawing.index("</defs>") + len("</defs>") :]  # what comes before is only for standalone files
    height = figure.get_figheight() * 72
    for role, color in _ROLES.items():
        body = body.replace(color, f"var(--{role})")
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # ids repeat across drawings, and nothing refers to them
    body = re.sub(r"font-family: [^;]*; ", "", body)  # use the page's font
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(printable(label))}">{body}'
