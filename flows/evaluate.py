"""The flow that compares students with their teacher, and shows the report in Prefect's UI."""

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.progress import watching
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation, ClassScore
from softlabel.pipeline.evaluation.report.page import pictures
from softlabel.pipeline.evaluation.report.scores import EvaluationReport, Score


@flow(name="evaluate", flow_run_name="evaluate {config.table}", persist_result=False)
def evaluate_flow(config: EvaluateConfig) -> EvaluationReport | ClassEvaluation:
    """Compare students with the teacher on the table's eval split, and write a report."""
    with recorded(), retrying(), reported(), watching() as watch:
        report = evaluate(config, watch)
    show_report(report)
    return report


def show_report(report: EvaluationReport | ClassEvaluation) -> None:
    """Show the scores and the report in Prefect's UI."""
    publish(
        create_table_artifact,
        [_row(score) for score in (report.teacher, *report.students)],
        key="students",
        description=f"Scores on {report.measured} of {report.table}@{report.version}",
    )
    markdown = "\n\n".join(_markdown(report))
    publish(create_markdown_artifact, markdown, key="report", description="Report of the evaluation")


def _markdown(report: EvaluationReport | ClassEvaluation) -> Iterator[str]:
    """The verdict, the scores and the drawings of the report, as paragraphs of Markdown.

    Prefect's UI drops links to files, so the content itself stands here.
    """
    if report.verdict:
        yield f"**{_plain(report.verdict)}**"
    scores = [_row(score) for score in (report.teacher, *report.students)]
    columns = [name for name in dict.fromkeys(name for score in scores for name in score) if name != "name"]
    rows = [["", *map(_plain, columns)], ["---", *("--:" for _ in columns)]]
    rows += [[_plain(score["name"]), *(_cell(score.get(name)) for name in columns)] for score in scores]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    yield f"On {report.measured} of {_plain(report.table)}@{report.version}."
    for title, svg in pictures(Path(report.html)):
        yield f"### {_plain(title)}\n\n![{_plain(title)}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"
    yield f"The whole report is in `{Path(report.html).absolute().as_posix().replace('`', '')}`."


def _row(score: Score | ClassScore) -> dict[str, Any]:
    """A line of the table, with the main numbers of what a model costs to use."""
    row, cost = asdict(score), score.cost
    del row["cost"]
    tasks = {f"{each['task']} {each['metric']}": each["value"] for each in row.pop("tasks", ())}
    speed = None if cost is None else cost.speed
    produced = None if speed is None else speed.decode or speed.documents
    return (
        row
        | tasks
        | {
            "bytes": None if cost is None else cost.bytes,
            "memory": None if speed is None else speed.memory,
            "documents/s" if isinstance(score, ClassScore) else "tokens/s": None
            if produced is None
            else produced.median,
        }
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; the names of folders may contain its signs."""
    return "".join(f"&#{ord(sign)};" if not (sign.isalnum() or sign in " .,:;/@%()-_") else sign for sign in text)
