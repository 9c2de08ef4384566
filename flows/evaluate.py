"""The flow that compares students with their teacher, and shows the report in Prefect's UI."""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import punctuation
from typing import TypeVar

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import is_deployed, recorded
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation, ClassScore
from softlabel.pipeline.evaluation.report.page import pictures
from softlabel.pipeline.evaluation.report.scores import EvaluationReport, Score
from softlabel.storage.errors import printable

_WORDS = {
    "name": "model",
    "bits_per_byte": "bits/byte",
    "kl": "KL",
    "kl_reach": "±",
    "f1": "F1",
    "parameters": "size",
    "bytes": "on disk",
}
_SHARES = ("agreement", "acceptance", "accuracy", "precision", "recall", "f1")
_SIGNS = set(punctuation) - set(",%/()")
_COLUMNS = 6
"""Columns of numbers in one table of the report: in the UI, a wider one would cover what is beside it."""
C = TypeVar("C", bound=EvaluateConfig)


@flow(name="evaluate", flow_run_name="evaluate {config.table}", persist_result=False)
def evaluate_flow(config: EvaluateConfig) -> EvaluationReport | ClassEvaluation:
    """Compare students with the teacher on the table's eval split, and write a report."""
    config = with_lasting_report(config)
    with recorded(report=config.report), retrying(), reported(), publishing_progress("evaluate-progress") as watch:
        report = evaluate(config, watch)
    show_report(report)
    return report


def with_lasting_report(config: C) -> C:
    """Let the report of a deployed run be beside the first student by default: its working folder is temporary."""
    first = next(map(Path, config.students), Path())
    if is_deployed() and "report" not in config.model_fields_set and first.is_absolute():
        return config.model_copy(update={"report": str(first.parent / config.report)})
    return config


def show_report(report: EvaluationReport | ClassEvaluation) -> None:
    """Show the scores and the report in Prefect's UI."""
    scores = _rows([report.teacher, *report.students])
    description = f"Scores on {report.measured} of {report.table}@{report.version}"
    rows = [row | {"model": _in_a_table(row["model"])} for row in scores]
    publish(create_table_artifact, rows, key="students", description=description)
    markdown = "\n\n".join(_markdown(report, scores))
    publish(create_markdown_artifact, markdown, key="report", description="Report of the evaluation")


def _rows(scores: Sequence[Score | ClassScore]) -> list[dict[str, str]]:
    """The models' scores by their names in words, in a few digits: the UI cuts wide tables off."""
    numbers = [_numbers(score) for score in scores]
    names = dict.fromkeys(name for row in numbers for name in row)
    return [{_WORDS.get(name, name.replace("_", " ")): _cell(name, row.get(name)) for name in names} for row in numbers]


def _numbers(score: Score | ClassScore) -> dict[str, float | str | None]:
    """A model's scores, and the main numbers of what it costs to use."""
    row, cost = asdict(score), score.cost
    del row["cost"]
    row |= {f"{each['task']} {each['metric']}": each["value"] for each in row.pop("tasks", ())}
    if cost is not None:
        row["bytes"] = cost.bytes
    if cost is not None and cost.speed is not None:
        produced = cost.speed.produced
        row["memory"] = cost.speed.memory
        row["documents/s" if isinstance(score, ClassScore) else "tokens/s"] = produced and produced.median
    return row


def _in_a_table(name: str) -> str:
    """A name for a table: of the UI's two versions, one shows cells as Markdown, and the other as they are."""
    return _plain(name) if set("[<`*&") & set(name) else name


def _markdown(report: EvaluationReport | ClassEvaluation, scores: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The verdict, the scores and the drawings of the report, as paragraphs of Markdown.

    Prefect's UI drops links to files, so the content itself stands here.
    """
    if report.verdict:
        yield f"**{_plain(report.verdict)}**"
    model, *columns = scores[0]
    for start in range(0, len(columns), _COLUMNS):
        names = [model, *columns[start : start + _COLUMNS]]
        rows = [[*map(_plain, names)], ["---", *("--:" for _ in names[1:])]]
        rows += [[_plain(score[name]) for name in names] for score in scores]
        yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    yield f"On {_plain(report.measured)} of {_plain(f'{report.table}@{report.version}')}."
    for title, svg in pictures(Path(report.html)):
        yield f"### {_plain(title)}\n\n![{_plain(title)}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"
    yield f"The whole report is in `{Path(report.html).absolute().as_posix().replace('`', '')}`."


def _cell(name: str, value: float | str | None) -> str:
    match value:
        case None:
            return "—"
        case str():
            return value
        case int():
            return f"{value / 1e6:,.3g}M" if value >= 1e6 else f"{value:,}"
        case _:
            return f"{value:.1%}" if name in _SHARES else f"{value:,.4g}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; the names of folders may contain its signs. The UI shows entities as such."""
    return "".join(f"\\{sign}" if sign in _SIGNS else sign for sign in printable(text))
