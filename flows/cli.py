"""The command ``softlabel``: one verb for each job, with the settings in ``pipeline.config`` as its flags.

It reads the settings, runs the matching flow and prints the result on stdout: tables for people or, with ``--json``,
one object. The exit code is 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM). Each verb imports what it
needs only when it runs, so that help is quick.
"""

import inspect
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError
from pydantic_core import to_json

from softlabel.flows.arguments import placed, read_file, resolve, settings
from softlabel.flows.running.logs import line
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import CompareConfig, EvaluateConfig
from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.rejects import RejectsConfig
from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.processes import open_standard_files
from softlabel.storage.credentials import masked
from softlabel.storage.errors import SoftlabelError, UsageError

_COMMON = Group("Common options", sort_key=1000)
File = Annotated[Path | None, Parameter("--config", group=_COMMON, help="YAML file with settings; flags override it.")]
AsJson = Annotated[
    bool,
    Parameter(
        "--json",
        negative=(),
        group=_COMMON,
        help="Print the result as one JSON object on stdout; all other output goes to stderr.",
    ),
]

DryRun = Annotated[
    bool,
    Parameter(
        "--dry-run",
        negative=(),
        group=_COMMON,
        help="Show what would be done and what it would cost, and write nothing.",
    ),
]

app = App(
    "softlabel",
    help="Distill language models offline: run a teacher once over your documents, store its soft labels in a table,"
    " and train and evaluate any number of students from that table.",
    version=version("softlabel"),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    open_standard_files()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, SoftlabelError) as error:
        wrong_usage = isinstance(error, CycloptsError | UsageError)
        kind = UsageError.__name__ if isinstance(error, CycloptsError) else type(error).__name__
        message = masked(_text_of(error))  # cyclopts repeats the arguments that it could not read
        print(line(logging.ERROR, message), file=sys.stderr)
        if "--json" in arguments:
            details = getattr(error, "details", None)
            more = {} if details is None else {"details": details}
            print(to_json({"error": kind, "message": message} | more).decode())
        return 2 if wrong_usage else 1
    except KeyboardInterrupt as stop:
        kept = "interrupted; finished work is kept, run the same command again to continue"
        print(line(logging.WARNING, kept), file=sys.stderr)
        return 143 if isinstance(stop, TerminatedError) else 130
    return 0


class TerminatedError(KeyboardInterrupt):
    """SIGTERM was received, which interrupts as Ctrl-C does."""


def _terminate(*_: object) -> None:
    raise TerminatedError


def _text_of(error: Exception) -> str:
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return (
            f"too many arguments: {' '.join(error.unused_tokens)}\n  what to do:  leave them out, or write a flag"
            " before each value; put a glob in quotes, so that the shell does not expand it"
        )
    return str(error)


def answer(verb: str, work: Callable[[], Any], as_json: bool) -> None:
    """Do the work and print its result; anything that the work itself prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        result = work()
    if as_json:
        print(to_json(result, inf_nan_mode="null").decode())
    else:
        from softlabel.flows.display.verbs import SHOW, SHOW_DRY_RUN

        dry = SHOW_DRY_RUN.get(verb) if getattr(result, "dry_run", False) else None
        (dry or SHOW[verb])(result)


def _run_flow(name: str, config: Settings) -> Any:
    return import_module("softlabel.flows.running.runner").run(name, config)


def _dry_run(config: Settings) -> Any:
    return import_module("softlabel.flows.running.runner").dry_run(config)


def _several_then_one(several: str, last: str) -> inspect.Parameter:
    """The positional arguments of a verb that takes several values of one setting, then one of another."""
    described = Parameter(
        name=f"{several.upper()}... {last.upper()}",
        group=Group("Settings", sort_key=0),
        help=f"The same as --{several} and --{last}; the last of several arguments is the {last}.",
    )
    return inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, described])


def add_job(
    name: str,
    model: type[Settings],
    positional: tuple[str, ...] = (),
    *,
    work: Callable[[Any], Any] | None = None,
    writes: bool = True,
) -> None:
    """Add a verb that takes the settings of a model and runs the flow of the same name.

    Args:
        name: of the verb and its flow.
        model: its settings.
        positional: settings that may also be given as arguments.
        work: what the verb does instead, if it has no flow.
        writes: whether it writes anything, and so has a dry run.
    """
    known = {"__".join(setting.path): setting for setting in settings(model)}
    like_cp = len(positional) > 1 and known[positional[0]].takes_several
    parameters = [setting.parameter(key in positional and not like_cp) for key, setting in known.items()]
    if like_cp:
        parameters.append(_several_then_one(*positional))
    parameters.sort(key=lambda parameter: parameter.kind)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("file", keyword, default=None, annotation=File))
    parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=AsJson))
    if writes:
        parameters.append(inspect.Parameter("dry_run", keyword, default=False, annotation=DryRun))
    signature = inspect.Signature(parameters)

    def verb(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if like_cp:
            given |= placed(given.pop("arguments", ()), given.keys(), *positional)
        file, as_json, dry = given.pop("file", None), given.pop("as_json", False), given.pop("dry_run", False)
        flags = {known[key].path: value for key, value in given.items() if value is not None}
        config = resolve(model, flags, file, positional)
        do = partial(_dry_run, config) if dry else partial(work, config) if work else partial(_run_flow, name, config)
        answer(name, do, as_json)

    verb.__doc__ = model.__doc__
    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(verb, name=name)


add_job("estimate", EstimateConfig, ("documents", "table"), writes=False)
add_job("capture", CaptureConfig, ("documents", "table"))
add_job("train", TrainConfig, ("table", "output"))
add_job("evaluate", EvaluateConfig, ("table", "students"))
add_job("compare", CompareConfig, ("students",))
add_job("distill", DistillConfig)
add_job("verify", VerifyConfig, ("table",))
add_job("maintain", MaintainConfig, ("table",))
add_job("reprocess", ReprocessConfig, ("source", "destination"))
add_job("mix", MixConfig, ("view", "tables"))


def _show(config: ShowConfig) -> Any:
    from softlabel.pipeline import show

    return show(config)


def _export(config: ExportConfig) -> Any:
    from softlabel.flows.running.progress import watching
    from softlabel.pipeline.tables.export import export

    with watching() as watch:
        return export(config, watch)


def _rejects(config: RejectsConfig) -> Any:
    from softlabel.pipeline import rejects

    return rejects(config)


add_job("show", ShowConfig, ("table",), work=_show)
add_job("rejects", RejectsConfig, ("table",), work=_rejects, writes=False)
add_job("export", ExportConfig, ("table", "output"), work=_export)


def table_of(table: str | None, file: Path | None) -> str:
    """The table from the command line or, failing that, the setting ``table`` of a configuration file."""
    location = table or (read_file(file).get("table") if file else None)
    if not isinstance(location, str):
        raise UsageError("no table was given", where=file, do="give it as an argument (TABLE), or in a --config file")
    return location


@app.command(name="inspect")
def inspect_table(table: str | None = None, /, *, file: File = None, as_json: AsJson = False) -> None:
    """Show the contents of a table: teacher and selection, the size of each split, and the cost of each column.

    Args:
        table: Folder or s3:// location of a table or a view; TABLE@12 or TABLE@TAG selects an older version.
    """

    def work() -> Any:
        from softlabel.flows.running.progress import watching
        from softlabel.pipeline import inspect

        with watching() as watch:
            return inspect(table_of(table, file), watch)

    answer("inspect", work, as_json)


@app.command(name="history")
def show_versions(table: str | None = None, /, *, file: File = None, as_json: AsJson = False) -> None:
    """Show the versions of a table: when, how and by whom each was made, what it added, and what needs it.

    Args:
        table: Folder or s3:// location of a table or a view.
    """

    def work() -> Any:
        from softlabel.pipeline import history

        return history(table_of(table, file))

    answer("history", work, as_json)


@app.command(name="lineage")
def show_lineage(location: str, /, *, as_json: AsJson = False) -> None:
    """Show where a student or a table comes from, and what was made from a table.

    Args:
        location: Folder of a student; or folder or s3:// location of a table or a view, where TABLE@12 or TABLE@TAG
            selects an older version.
    """

    def work() -> Any:
        from softlabel.pipeline import lineage

        return lineage(location)

    answer("lineage", work, as_json)


@app.command(name="deploy")
def deploy_flows(
    *,
    schedules: Annotated[bool | None, Parameter(negative=())] = None,
    work_pool: str | None = None,
    file: File = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Install the deployments of all flows on the configured Prefect server, with a work pool and automations.

    If you run it again, it changes only what differs. A --config file can also describe deployments of your own.

    Args:
        schedules: Turn on the schedules of deployments with parameters. By default, new schedules are off.
        work_pool: Work pool that the workers serve. [default: softlabel]
    """

    def work() -> Any:
        given = {("schedules",): schedules, ("work_pool",): work_pool}
        flags: dict[tuple[str, ...], Any] = {name: value for name, value in given.items() if value is not None}
        with import_module("softlabel.flows.running.runner").without_traces() if dry_run else nullcontext():
            from softlabel.flows.deploy import deploy
            from softlabel.flows.deployments import DeployConfig

            return deploy(resolve(DeployConfig, flags, file), dry_run=dry_run)

    answer("deploy", work, as_json)


if __name__ == "__main__":
    main()
