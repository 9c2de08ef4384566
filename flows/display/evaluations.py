"""What an evaluation prints below the scores: results on tasks, costs of use, and the order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from softlabel.flows.display.console import bytes_of, console, count, printable, short, table_of

if TYPE_CHECKING:
    from softlabel.pipeline.evaluation.cost import Rate
    from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation, ClassScore
    from softlabel.pipeline.evaluation.report.scores import EvaluationReport, Score
    from softlabel.pipeline.evaluation.tasks import TaskScore


def show_tasks(students: "Sequence[Score]") -> None:
    """Each model's scores on the tasks, if there are any."""
    scored = [student for student in students if student.tasks]
    if not scored:
        return
    table = table_of("", "", "", "documents", "score", words=3)
    for number, score in enumerate(scored[0].tasks):
        for student in scored:
            first = student is scored[0]
            task = [escape(printable(text)) if first else "" for text in (score.task, score.metric)]
            documents = f"{score.documents:,}" if first else ""
            table.add_row(*task, escape(printable(student.name)), documents, _score(student.tasks[number]))
    console.print(table)
    console.print("[dim](±): standard error by lm-eval[/]")


def _score(score: "TaskScore") -> str:
    return f"{score.value:.4g}" if score.error is None else f"{score.value:.4g} (±{score.error:.2g})"


def show_cost(students: "Sequence[Score | ClassScore]") -> None:
    """What each model costs to use, if its speed was measured, and how."""
    costs = [(each.name, each.cost, each.cost.speed) for each in students if each.cost is not None]
    speeds = [speed for _, _, speed in costs if speed is not None]
    if not speeds:
        return
    generates = speeds[0].decode is not None
    table = table_of(
        "", "on disk", "peak memory", "tokens/s read", "generated" if generates else "documents/s", "weights"
    )
    for name, cost, speed in costs:
        if speed is not None:
            sizes = bytes_of(cost.bytes), bytes_of(speed.memory)
            rates = (_rate(speed.prefill), _rate(speed.produced))
            table.add_row(escape(printable(name)), *sizes, *rates, speed.dtype)
    console.print(table)
    lengths = speeds[0].lengths
    read = f"{count(lengths.batch_size, 'prompt' if generates else 'document')} of {lengths.prompt_tokens:,} tokens"
    new = f" and {lengths.new_tokens:,} new ones" if generates else ""
    console.print(
        f"[dim]on {escape(printable(speeds[0].device))}: {read}{new} at a time; medians of"
        f" {count(speeds[0].runs, 'run')}, whose spread is in the report[/]"
    )


def show_standings(report: "EvaluationReport | ClassEvaluation") -> None:
    """The order of the models, with what they cost: which are outdone by one that is closer and costs no more."""
    from softlabel.pipeline.evaluation.standings import in_words

    closed = report.standings[0].gap_closed is not None
    scores = {each.name: each for each in report.students}
    speeds = {name: each.cost.speed for name, each in scores.items() if each.cost and each.cost.speed}
    generates = any(speed.decode for speed in speeds.values())
    columns = ["gap closed"] if closed else []
    columns += ["parameters", *(["tokens/s" if generates else "documents/s"] if speeds else [])]
    table = table_of("", "place", *columns, last="outdone by")
    for each in report.standings:
        cells = [] if each.gap_closed is None else [_with_interval(each.gap_closed.mean, each.gap_closed.interval)]
        parameters = scores[each.student].parameters
        cells.append("" if parameters is None else short(parameters))
        if speeds:
            speed = speeds.get(each.student)
            cells.append(_rate(speed.produced) if speed else "")
        cells.append(escape(printable(in_words(each.outdone_by))))
        table.add_row(escape(printable(each.student)), str(each.place), *cells)
    console.print(table)
    console.print("[dim]outdone by: models that are really closer to the teacher, and neither larger nor slower[/]")


def _with_interval(share: float, interval: tuple[float, float] | None) -> str:
    return f"{share:.1%}" if interval is None else f"{share:.1%} ±{(interval[1] - interval[0]) / 2:.1%}"


def _rate(rate: "Rate | None") -> str:
    return "" if rate is None else f"{rate.median:,.0f}" if rate.median >= 100 else f"{rate.median:,.1f}"
