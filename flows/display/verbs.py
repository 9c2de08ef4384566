"""What each verb prints for people when it is done: short tables, and the paths of fuller reports."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from softlabel.flows.display.console import (
    bytes_of,
    console,
    count,
    duration,
    facts,
    printable,
    short,
    table_of,
    try_next,
)
from softlabel.flows.display.dry_runs import (
    show_capture_dry_run,
    show_distill_dry_run,
    show_evaluate_dry_run,
    show_train_dry_run,
)
from softlabel.flows.display.evaluations import show_cost, show_standings, show_tasks
from softlabel.flows.display.lineage import show_lineage
from softlabel.flows.display.rows import show_show
from softlabel.flows.display.tables import (
    show_export,
    show_history,
    show_inspect,
    show_maintain,
    show_mix,
    show_rejects,
    show_reprocess,
    show_verify,
)
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS

if TYPE_CHECKING:
    from softlabel.flows.deploy import DeployReport
    from softlabel.pipeline.capturing.capture import CaptureReport
    from softlabel.pipeline.distillation import DistillReport
    from softlabel.pipeline.estimation.estimate import Estimate, Preview
    from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
    from softlabel.pipeline.evaluation.report.scores import EvaluationReport
    from softlabel.pipeline.training.train import TrainReport


def show_capture(report: "CaptureReport") -> None:
    """What was captured, what was already there, what could not be used, and what to do next."""
    _capture_line(report)
    try_next([f"softlabel inspect {report.table}", f"softlabel train {report.table} STUDENT --student.depth 2"])


def show_estimate(report: "Estimate") -> None:
    """What the teacher would read, the size and time of a capture, and what other selections would cost and keep."""
    for preview in report.previews:
        _show_preview(preview)
    _partial_answers(report.answers, report.partial_answers)
    if report.reread:
        console.print(
            f"[yellow]{count(report.reread, 'document')} would be read again[/], because an earlier version of"
            f" softlabel captured them; about {count(report.replacing, 'sequence')} would replace wrong ones"
        )
    if not report.pending and not report.sequences and not report.copied:
        console.print(f"the table already holds all {count(report.documents, 'document')}: a capture would add nothing")
        return
    if not report.sequences and report.copied:
        console.print(
            "no document in the sample needs the teacher: a capture would only copy about"
            f" [bold]{count(report.copied, 'sequence')}, {bytes_of(report.bytes)}[/], from other documents"
        )
        return
    if not report.sequences:
        console.print(
            f"{report.pending:,} documents are not in the table, but no document in the sample has a new sequence for"
            " the teacher: the table already holds all their sequences, or their text can't be used"
        )
        return
    console.print(
        f"a capture would add about [bold]{count(report.sequences, 'sequence')}, {count(report.positions, 'position')},"
        f" {bytes_of(report.bytes)}[/]{_copied(report.copied)}"
    )
    took = report.seconds
    parts = {"reading and tokenizing": took.plan, "loading": took.load, "the teacher": took.teacher}
    parts |= {"numbering": took.numbering} if took.numbering else {}
    parts |= {"copying": took.copy} if report.copied else {}
    rate = BF16_TERAFLOPS[report.gpu]
    facts(
        {
            "documents": f"{report.pending:,} of {report.documents:,} are not in the table yet;"
            f" {report.rejects:,} more can't be used",
            "time here": f"about {duration(sum(parts.values()))} on {report.device}: "
            + ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items()),
            "time on a GPU": f"{report.gpu_hours:,.2g} hours on one {report.gpu}: not measured, but calculated from"
            f" {report.flops:.2g} operations of the teacher at {report.gpu_utilization:.0%} of {rate:,.0f} teraflops",
            "sample": f"tokenized {report.tokenized:.1%} of the text, and ran the teacher on"
            f" {report.sampled_positions:,} positions",
        }
    )
    if report.tokenized < 1:
        console.print(
            "repeated documents are taken into account, but passages that several documents share are seen only in"
            " the\nsample. If there are many, the real number of sequences and positions and the teacher's time are"
            " lower; the\nsize in bytes stays the same"
        )
    table = table_of("selection", "ids", "bytes per position", "table", "kept exactly", "lost (KL)", "noise")
    for i, s in enumerate(report.selections):
        sizes = (f"{s.ids_per_position:.1f}", f"{s.bytes_per_position:.1f}", bytes_of(s.bytes))
        table.add_row(
            s.name, *sizes, f"{s.kept_mass:.1%}", f"{s.lost:.3f}", f"{s.noise:.3f}", style="" if i else "bold"
        )
    console.print(table)
    console.print(
        "kept exactly: probability of the head, which is stored exactly.\n"
        "lost: KL in nats from the teacher's distribution to the mean of the stored targets; zero with a sampled tail,"
        "\nwhich is unbiased; without one, the remaining probability is assumed to be spread evenly.\n"
        "noise: root mean square distance of a stored target from that mean, in probability"
    )


def show_train(report: "TrainReport") -> None:
    """One line on the training, and what to do next."""
    _train_line(report)
    try_next([f"softlabel evaluate {report.table} {report.output}"])


def show_evaluate(report: "EvaluationReport | ClassEvaluation") -> None:
    """The scores of the teacher and its students."""
    _scores(report)
    facts({"report": report.html, "numbers": report.json})


def show_compare(report: "EvaluationReport | ClassEvaluation") -> None:
    """The scores of all models, and their order."""
    _scores(report)
    show_standings(report)
    facts({"table": f"{report.table} (version {report.version})", "report": report.html, "numbers": report.json})


def show_distill(report: "DistillReport") -> None:
    """What each stage did, the scores of teacher and students, and what to do next."""
    from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation

    _capture_line(report.capture)
    for trained in report.train.values():
        _train_line(trained)
    _scores(report.evaluate)
    table = report.evaluate.table
    facts({"table": f"{table} (version {report.evaluate.version})", "report": report.evaluate.html})
    student = report.train["student"].output
    next_student = f"{student}-reverse"
    commands = [f"softlabel inspect {table}"]
    if not isinstance(
        report.evaluate, ClassEvaluation
    ):  # for a classifier, train would need its labels, which are not known here
        commands += [
            f"softlabel train {table} {next_student} --student.model {student} --loss.divergence reverse_kl",
            f"softlabel evaluate {table} {student} {next_student}",
        ]
    try_next(commands)


def show_deploy(report: "DeployReport") -> None:
    """What is installed on the server, what changed, and how to start a worker."""
    table = table_of("", "name", "", "schedule", words=4)
    for each in report.installed:
        style = "dim" if each.change == "unchanged" else ""
        table.add_row(each.kind, escape(each.name), each.change, each.schedule or "", style=style)
    console.print(table)
    changes = f"{count(report.changed, 'change')}{' would be made' if report.dry_run else ''}"
    changed = f"{changes} on" if report.changed else "nothing to change on"
    console.print(f"{changed} {escape(report.server)}")
    try_next([f"prefect worker start --pool {report.work_pool} --limit 1"])


def _capture_line(report: "CaptureReport") -> None:
    where = f"[bold]{report.table}[/] (version {report.version})"
    if not report.sequences and not report.copied:
        console.print(f"{where} already holds all {count(report.documents, 'document')}: nothing was captured")
    else:
        console.print(
            f"{where} captured: {count(report.sequences, 'sequence')}, {count(report.positions, 'position')} in"
            f" {duration(report.seconds)}, {bytes_of(report.bytes)}{_copied(report.copied)}"
        )
    if report.truncated:
        console.print(f"[yellow]{count(report.truncated, 'document')} cut short[/] to the classifier's longest input")
    if report.repeated:
        console.print(f"{count(report.repeated, 'document')} left out: another one has the same content")
    if report.taken_down:
        console.print(f"[yellow]{count(report.taken_down, 'document')} left out[/]: taken down earlier")
    if report.reread:
        console.print(
            f"{count(report.reread, 'document')} read again, because an earlier version of softlabel captured them;"
            f" [yellow]{count(report.replaced, 'wrong sequence')} replaced[/]"
        )
    if report.withdrawn:
        console.print(f"[yellow]{count(report.withdrawn, 'document')} of these removed[/]: they can't be used now")
    if not report.held_out:
        console.print(
            "[yellow]no document is held out[/]: students can be trained from this table, but not evaluated on it;"
            " capture more documents, or into a new table with a larger shards.eval_fraction"
        )
    _partial_answers(report.answers, report.partial_answers)
    if report.rejects:
        console.print(f"[yellow]{count(report.rejects, 'document')} can't be used[/]: see {report.rejects_file}")


def _show_preview(preview: "Preview") -> None:
    """A sequence as the teacher will read it, with the captured tokens between brackets."""
    legend = (": what is between ⟦ and ⟧ is captured", "dim")
    console.print(Text.assemble(("document ", "dim"), printable(preview.document_id), legend))
    shown = Text()
    for i, segment in enumerate(preview.segments[:_SEGMENTS]):
        lines = _shortened(segment.text).split("\n")
        text = "\n".join(printable(line).replace("⟦", "\\u27e6").replace("⟧", "\\u27e7") for line in lines)
        shown.append(f"⟦{text}⟧" if segment.captured else text, style="bold green" if segment.captured else "")
        if i == _SEGMENTS - 1 < len(preview.segments) - 1:
            shown.append(" ...")
    for line in shown.split("\n", allow_blank=True):
        console.print(Text("  | ", style="dim") + line)


_SEGMENTS = 12
"""Segments of a sequence that are shown ..."""
_LONGEST = 400
"""... and characters of a segment."""


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


def _partial_answers(answers: int, partial: int) -> None:
    if partial:
        console.print(
            f"[yellow]{partial:,} of {count(answers, 'answer')} incomplete[/]: the chat template leaves out their"
            " thoughts, their tool calls, their content beside a tool call, or all of them"
        )


def _copied(sequences: int) -> str:
    return f", {count(sequences, 'sequence')} copied from other documents" if sequences else ""


def _train_line(report: "TrainReport") -> None:
    steps = count(report.steps, "step")
    if not report.steps_trained:
        console.print(f"[bold]{report.output}[/] was trained already: {steps} on {report.table}; nothing was done")
        return
    resumed = "" if report.resumed_from is None else f", resumed at step {report.resumed_from:,}"
    stopped = f" (the best weights; training stopped at step {report.stopped_at:,})"
    best = "" if report.steps == report.stopped_at else stopped
    positions, took = count(report.positions, "position"), duration(report.seconds)
    console.print(f"[bold]{report.output}[/] trained: {steps}{best}{resumed}, {positions} of {report.table}, in {took}")


def _scores(report: "EvaluationReport | ClassEvaluation") -> None:
    from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation
    from softlabel.pipeline.evaluation.report.content import fixed

    if isinstance(report, ClassEvaluation):
        _class_scores(report)
        return
    scores = table_of("", "perplexity", "KL to the teacher", "top-1 agreement", "parameters")
    for score in (report.teacher, *report.students):
        least = "≥ " if report.kl_kind == "lower bound" and score is not report.teacher else ""
        reach = "" if score.kl_reach is None else f" ±{fixed(score.kl_reach, 3, score.kl)}"
        scores.add_row(
            escape(printable(score.name)),
            f"{score.perplexity:,.2f}" if score.perplexity < 1e6 else fixed(score.perplexity, 2),
            f"{least}{fixed(score.kl, 3)}{reach}",
            "" if score.agreement is None else f"{score.agreement:.1%}",
            "" if score.parameters is None else short(score.parameters),
        )
    console.print(scores)
    show_tasks(report.students)
    show_cost(report.students)
    console.print(escape(printable(report.verdict)))
    left_out = f"; {report.left_out:,} more left out (also in the train split)" if report.left_out else ""
    if report.left_out_documents:
        left_out += f"; {report.left_out_documents:,} left out because their documents are also in the train split"
    console.print(
        f"{count(report.positions, 'position')} of {count(report.sequences, 'held-out sequence')} of"
        f" {count(report.documents, 'document')}{left_out}"
    )
    if report.kl_kind == "lower bound":
        console.print("≥ the table has no sample of the tokens outside its heads, so the KL is at least this")
    if report.kl_kind == "mean over teachers":
        console.print(
            "the KL is the mean over the teachers: the KL to their average, plus the distance of the teachers from it"
        )


def _class_scores(report: "ClassEvaluation") -> None:
    from softlabel.pipeline.evaluation.report.content import fixed

    scores = table_of("", "accuracy", "precision", "recall", "F1", "KL to the teacher", "parameters")
    for score in (report.teacher, *report.students):
        shares = (score.accuracy, score.precision, score.recall, score.f1)
        parameters = "" if score.parameters is None else short(score.parameters)
        scores.add_row(
            escape(printable(score.name)),
            *("" if share is None else f"{share:.1%}" for share in shares),
            fixed(score.kl, 3),
            parameters,
        )
    console.print(scores)
    show_cost(report.students)
    if report.verdict:
        console.print(escape(printable(report.verdict)))
    left_out = f"; {report.left_out:,} more left out (also in the train split)" if report.left_out else ""
    console.print(f"{count(report.documents, 'held-out document')}{left_out}")
    if report.unmapped > 0.0005:
        console.print(
            f"{report.unmapped:.1%} of the teacher's probability is on classes without a label, and is left out"
        )


SHOW: Mapping[str, Callable[[Any], None]] = {
    "capture": show_capture,
    "estimate": show_estimate,
    "train": show_train,
    "evaluate": show_evaluate,
    "compare": show_compare,
    "distill": show_distill,
    "verify": show_verify,
    "maintain": show_maintain,
    "reprocess": show_reprocess,
    "mix": show_mix,
    "inspect": show_inspect,
    "history": show_history,
    "lineage": show_lineage,
    "rejects": show_rejects,
    "show": show_show,
    "export": show_export,
    "deploy": show_deploy,
}
"""Function that prints the result of each verb."""
SHOW_DRY_RUN: Mapping[str, Callable[[Any], None]] = {
    "capture": show_capture_dry_run,
    "train": show_train_dry_run,
    "evaluate": show_evaluate_dry_run,
    "compare": show_evaluate_dry_run,
    "distill": show_distill_dry_run,
}
"""Function that prints what each verb would do, if its result has another type then."""
