"""What each verb shows a person when it is done: short tables on stdout, and where the rest is."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from softlabel.flows.console import bytes_of, console, duration, facts, short, table_of, try_next
from softlabel.flows.table_display import (
    show_history,
    show_inspect,
    show_maintain,
    show_mix,
    show_reprocess,
    show_verify,
)
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS

if TYPE_CHECKING:
    from softlabel.pipeline.capturing.capture import CaptureReport
    from softlabel.pipeline.distillation import DistillReport
    from softlabel.pipeline.estimation.estimate import Estimate
    from softlabel.pipeline.evaluation.classifier import ClassEvaluation
    from softlabel.pipeline.evaluation.evaluate import EvaluationReport
    from softlabel.pipeline.training.train import TrainReport


def show_capture(report: "CaptureReport") -> None:
    """What was captured, what was there already, what could not be used, and what to do next."""
    _capture_line(report)
    try_next([f"softlabel inspect {report.table}", f"softlabel train {report.table} STUDENT --student.depth 2"])


def show_estimate(found: "Estimate") -> None:
    """What a capture would give and take, and what other selections would cost and keep."""
    if not found.pending:
        console.print(f"all {found.documents:,} documents are in the table already: a capture would do nothing")
        return
    if not found.sequences and found.copied:
        console.print(
            "nothing that was looked at needs the teacher: a capture would copy about"
            f" [bold]{found.copied:,} sequences, {bytes_of(found.bytes)}[/], from other documents"
        )
        return
    if not found.sequences:
        console.print(
            f"{found.pending:,} documents are not in the table, but none that was looked at has a sequence for the"
            " teacher: it has them all, or their text can't be used"
        )
        return
    console.print(
        f"a capture would add about [bold]{found.sequences:,} sequences, {found.positions:,} positions,"
        f" {bytes_of(found.bytes)}[/]{_copied(found.copied)}"
    )
    took = found.seconds
    parts = {"reading and tokenizing": took.plan, "loading": took.load, "the teacher": took.teacher}
    parts |= {"copying": took.copy} if found.copied else {}
    rate = BF16_TERAFLOPS[found.gpu]
    facts(
        {
            "documents": f"{found.pending:,} of {found.documents:,}, {found.rejects:,} more can't be used",
            "here": f"about {duration(sum(parts.values()))} on {found.device}: "
            + ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items()),
            "elsewhere": f"{found.flops:.2g} operations of the teacher; by arithmetic {found.gpu_hours:,.2g} hours on"
            f" one {found.gpu}, if {found.gpu_utilization:.0%} of its {rate:,.0f} teraflops were reached",
            "from": f"{found.tokenized:.1%} of the text, and {found.sampled_positions:,} positions by the teacher",
        }
    )
    if found.tokenized < 1:
        console.print(
            "documents that repeat are counted; parts that several have in common are seen within that text alone: if"
            " there are\nsuch, sequences, positions and what the teacher takes are upper bounds, and the bytes hold"
        )
    table = table_of("selection", "ids", "bytes a position", "table", "kept exactly", "lost (KL)", "noise")
    for i, s in enumerate(found.selections):
        sizes = (f"{s.ids_per_position:.1f}", f"{s.bytes_per_position:.1f}", bytes_of(s.bytes))
        table.add_row(
            s.name, *sizes, f"{s.kept_mass:.1%}", f"{s.lost:.3f}", f"{s.noise:.3f}", style="" if i else "bold"
        )
    console.print(table)
    console.print(
        "lost: nats from the teacher's distribution to what is kept of it on average; none with a sampled tail, which"
        "\nis unbiased; else the rest is thought to be spread evenly. noise: root mean square distance of a sampled"
        " target\nfrom that average, as probabilities"
    )


def show_train(report: "TrainReport") -> None:
    """One line, and what to do next."""
    _train_line(report)
    try_next([f"softlabel evaluate {report.table} {report.output}"])


def show_evaluate(report: "EvaluationReport | ClassEvaluation") -> None:
    """The teacher and its students side by side."""
    _scores(report)
    facts({"report": report.html, "numbers": report.json})


def show_distill(report: "DistillReport") -> None:
    """What each stage did, the teacher and its students side by side, and what to try next."""
    from softlabel.pipeline.evaluation.classifier import ClassEvaluation

    _capture_line(report.capture)
    for trained in report.train.values():
        _train_line(trained)
    _scores(report.evaluate)
    table = report.evaluate.table
    facts({"table": f"{table} (version {report.evaluate.version})", "report": report.evaluate.html})
    student = report.train["student"].output
    other = f"{student}-reverse"
    commands = [f"softlabel inspect {table}"]
    if not isinstance(report.evaluate, ClassEvaluation):  # to go on from a classifier takes its labels, not known here
        commands += [
            f"softlabel train {table} {other} --student.model {student} --loss.divergence reverse_kl",
            f"softlabel evaluate {table} {student} {other}",
        ]
    try_next(commands)


def _capture_line(report: "CaptureReport") -> None:
    where = f"[bold]{report.table}[/] (version {report.version})"
    if not report.sequences and not report.copied:
        console.print(f"{where} holds all {report.documents:,} documents already: nothing was captured")
    else:
        console.print(
            f"{where} captured: {report.sequences:,} sequences, {report.positions:,} positions in"
            f" {duration(report.seconds)}, {bytes_of(report.bytes)}{_copied(report.copied)}"
        )
    if report.truncated:
        console.print(f"[yellow]{report.truncated:,} documents are longer[/] than what the classifier reads: cut short")
    if report.taken_down:
        console.print(f"[yellow]{report.taken_down:,} documents were taken down[/]: left out")
    if report.rejects:
        console.print(f"[yellow]{report.rejects:,} documents can't be used[/]: see {report.rejects_file}")


def _copied(sequences: int) -> str:
    return f", {sequences:,} copied from other documents" if sequences else ""


def _train_line(report: "TrainReport") -> None:
    if not report.steps_trained:
        console.print(f"[bold]{report.output}[/] was trained already: {report.steps:,} steps on {report.table}")
        return
    resumed = "" if report.resumed_from is None else f", on from step {report.resumed_from:,}"
    best = "" if report.steps == report.stopped_at else f" (the best of {report.stopped_at:,})"
    took = duration(report.seconds)
    console.print(
        f"[bold]{report.output}[/] trained: {report.steps:,} steps{best}{resumed}, {report.positions:,} positions"
        f" of {report.table}, in {took}"
    )


def _scores(report: "EvaluationReport | ClassEvaluation") -> None:
    from softlabel.pipeline.evaluation.classifier import ClassEvaluation

    if isinstance(report, ClassEvaluation):
        _class_scores(report)
        return
    scores = table_of("", "perplexity", "KL to the teacher", "top-1 agreement", "parameters")
    for score in (report.teacher, *report.students):
        agreement = "" if score.agreement is None else f"{score.agreement:.1%}"
        parameters = "" if score.parameters is None else short(score.parameters)
        scores.add_row(score.name, f"{score.perplexity:,.2f}", f"{score.kl:.3f}", agreement, parameters)
    console.print(scores)
    left_out = f", {report.left_out:,} that also occur in train left out" if report.left_out else ""
    console.print(f"{report.positions:,} positions of {report.sequences:,} held-out sequences{left_out}")
    if report.kl_kind == "mean over teachers":
        console.print("the KL is the mean over the teachers: the KL to their average, and how far they are from that")


def _class_scores(report: "ClassEvaluation") -> None:
    scores = table_of("", "accuracy", "precision", "recall", "F1", "KL to the teacher", "parameters")
    for score in (report.teacher, *report.students):
        shares = (score.accuracy, score.precision, score.recall, score.f1)
        parameters = "" if score.parameters is None else short(score.parameters)
        scores.add_row(
            score.name, *("" if share is None else f"{share:.1%}" for share in shares), f"{score.kl:.3f}", parameters
        )
    console.print(scores)
    left_out = f", {report.left_out:,} that also occur in train left out" if report.left_out else ""
    console.print(f"{report.documents:,} held-out documents{left_out}")
    if report.unmapped > 0.0005:
        console.print(f"{report.unmapped:.1%} of the teacher's mass is on classes without a label, and left out")


SHOW: Mapping[str, Callable[[Any], None]] = {
    "capture": show_capture,
    "estimate": show_estimate,
    "train": show_train,
    "evaluate": show_evaluate,
    "distill": show_distill,
    "verify": show_verify,
    "maintain": show_maintain,
    "reprocess": show_reprocess,
    "mix": show_mix,
    "inspect": show_inspect,
    "history": show_history,
}
"""By verb."""
