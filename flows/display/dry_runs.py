"""What a dry run prints for people: what would be done, and what it would cost."""

from typing import TYPE_CHECKING

from rich.markup import escape

from softlabel.flows.display.console import bytes_of, console, count, duration, facts, printable, short

if TYPE_CHECKING:
    from softlabel.pipeline.dry_run import CaptureDryRun, DistillDryRun
    from softlabel.pipeline.evaluation.evaluate import EvaluatePreview
    from softlabel.pipeline.training.train import TrainPreview

NOTHING_WRITTEN = "dry run: nothing was written"


def show_capture_dry_run(report: "CaptureDryRun") -> None:
    """What a capture would add, and its size and time."""
    _capture(report)
    console.print(NOTHING_WRITTEN)


def show_train_dry_run(report: "TrainPreview") -> None:
    """What a training would do."""
    _train(report)
    console.print(NOTHING_WRITTEN)


def show_evaluate_dry_run(report: "EvaluatePreview") -> None:
    """What an evaluation would measure and write."""
    _evaluate(report)
    console.print(NOTHING_WRITTEN)


def show_distill_dry_run(report: "DistillDryRun") -> None:
    """What each stage would do."""
    _capture(report.capture)
    for each in report.train.values():
        _train(each)
    if report.evaluate:
        _evaluate(report.evaluate)
    else:
        _line("[bold]{}[/]: the students would be evaluated, and the report written there", report.report)
    console.print(NOTHING_WRITTEN)


def _capture(report: "CaptureDryRun") -> None:
    where = "would be made" if report.version is None else f"has version {report.version}"
    if not (report.sequences or report.copied or report.replaced):
        held = count(report.documents, "document")
        _line(f"[bold]{{}}[/] already holds all {held}: nothing would be captured", report.table)
    else:
        _line(f"[bold]{{}}[/] {where}; a capture would add:", report.table)
        size = "" if report.bytes is None else f", about {bytes_of(report.bytes)}"
        shards = f" in {count(report.shards, 'shard')}" if report.shards else ""
        shown = {
            "teacher": f"{count(report.sequences, 'sequence')}, {count(report.positions, 'position')}{shards}",
            "copied": f"{count(report.copied, 'sequence')} from other documents",
            "documents": f"{report.documents - report.unchanged:,} of {report.documents:,}{size}",
        }
        if report.seconds is not None:
            shown["time here"] = f"about {duration(report.seconds)} on {report.device or 'the CPU'}"
        facts(shown)
    if report.reread:
        console.print(
            f"{count(report.reread, 'document')} would be read again, because an earlier version of softlabel captured"
            f" them; {count(report.replaced, 'wrong sequence')} would be replaced"
        )
    if report.withdrawn:
        console.print(f"{count(report.withdrawn, 'document')} of these would be removed: they can't be used now")
    left_out = {
        "can't be used": report.rejects,
        "were taken down": report.taken_down,
        "repeat another document": report.repeated,
        "would be cut short": report.truncated,
    }
    for why, number in left_out.items():
        if number:
            console.print(f"[yellow]{count(number, 'document')}[/] {why}")
    for reject in report.rejected:
        _line("  {}", reject)


def _train(report: "TrainPreview") -> None:
    if report.steps_to_train == 0:
        steps = count(report.steps or 0, "step")
        _line(f"[bold]{{}}[/] is trained already: {steps} on {{}}; nothing would be done", report.output, report.table)
        return
    steps = "steps that depend on the capture" if report.steps is None else count(report.steps, "step")
    start = "" if report.resumed_from is None else f", from step {report.resumed_from:,} on"
    _line(f"[bold]{{}}[/] would be trained: {steps}{start}, on {{}}", report.output, report.table)
    if report.parameters is None or report.bytes is None or report.peak_bytes is None:
        return
    trained = "all of them" if report.trainable == report.parameters else f"{short(report.trainable or 0)} of adapters"
    facts(
        {
            "student": f"{short(report.parameters)} parameters, {trained} trained; loss: {report.objective}",
            "an epoch": f"{count(report.sequences or 0, 'sequence')}, {count(report.tokens or 0, 'token')},"
            f" {count(report.positions or 0, 'position')}",
            "disk": f"about {bytes_of(report.bytes)}, and {bytes_of(report.peak_bytes)} while it is trained",
        }
    )


def _evaluate(report: "EvaluatePreview") -> None:
    measured = f"{report.held_out:,} held-out {report.unit}"
    _line(
        f"{count(len(report.students), 'student')} would be measured on {measured} of {{}}",
        f"{report.table}@{report.version}",
    )
    for name in report.students:
        _line("  {}", name)
        for warning in report.warnings.get(name, ()):
            _line("    [yellow]{}[/]", warning)
    for task in report.tasks:
        _line("  task: {}", task)
    for file in report.files:
        verb = "replaced" if file in report.replaced else "written"
        _line(f"  {verb}: {{}}", file)


def _line(template: str, *names: str) -> None:
    """Print a line with names of files and folders, which may contain anything."""
    console.print(template.format(*(escape(printable(name)) for name in names)))
