"""The command ``softlabel``: a verb for each job, with the settings of ``pipeline.config.capture`` as its flags.

It reads what is asked for, runs the flow that does it, and shows the answer: tables for people on stdout or, with
``--json``, one object. Exit code 0, 1 (failed), 2 (misused) or 130 (interrupted). What a verb needs is imported
when the verb runs, so that help is quick.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from pydantic_core import to_json

from softlabel.flows.arguments import read_file, resolve, settings
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.storage.credentials import masked
from softlabel.storage.errors import SoftlabelError, UsageError

_HERE = Group("Everywhere", sort_key=1000)
File = Annotated[Path | None, Parameter("--config", group=_HERE, help="YAML file with settings; flags win over it.")]
AsJson = Annotated[
    bool,
    Parameter("--json", negative=(), group=_HERE, help="One JSON object on stdout; everything else goes to stderr."),
]

app = App(
    "softlabel",
    help="Run a teacher once over a corpus, keep what it knows in a table, and every student after that is cheap.",
    version=version("softlabel"),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, SoftlabelError) as error:
        misused = isinstance(error, CycloptsError | UsageError)
        kind = UsageError.__name__ if isinstance(error, CycloptsError) else type(error).__name__
        message = masked(str(error))  # cyclopts repeats what it could not read
        print(f"softlabel: {message}", file=sys.stderr)
        if "--json" in arguments:
            details = getattr(error, "details", None)
            more = {} if details is None else {"details": details}
            print(to_json({"error": kind, "message": message} | more).decode())
        return 2 if misused else 1
    except KeyboardInterrupt:
        print("softlabel: interrupted; what was committed is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def answer(verb: str, work: Callable[[], Any], as_json: bool) -> None:
    """Do the work and show its result; whatever the work itself prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        result = work()
    if as_json:
        print(to_json(result, inf_nan_mode="null").decode())
    else:
        from softlabel.flows.display import SHOW

        SHOW[verb](result)


def add_job(name: str, model: type[Settings], positional: tuple[str, ...] = ()) -> None:
    """Add a verb that takes a model's settings and runs the flow of the same name."""
    known = {"__".join(setting.path): setting for setting in settings(model)}
    parameters = [setting.parameter(key in positional) for key, setting in known.items()]
    parameters.sort(key=lambda parameter: parameter.kind)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("file", keyword, default=None, annotation=File))
    parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=AsJson))
    signature = inspect.Signature(parameters)

    def verb(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        file, as_json = given.pop("file", None), given.pop("as_json", False)
        flags = {known[key].path: value for key, value in given.items() if value is not None}
        config = resolve(model, flags, file, positional)
        answer(name, lambda: import_module("softlabel.flows.runner").run(name, config), as_json)

    verb.__doc__ = model.__doc__
    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(verb, name=name)


add_job("estimate", EstimateConfig, ("documents", "table"))
add_job("capture", CaptureConfig, ("documents", "table"))
add_job("train", TrainConfig, ("table", "output"))
add_job("evaluate", EvaluateConfig, ("table", "students"))
add_job("distill", DistillConfig)
add_job("verify", VerifyConfig, ("table",))
add_job("maintain", MaintainConfig, ("table",))
add_job("reprocess", ReprocessConfig, ("source", "destination"))
add_job("mix", MixConfig, ("view", "tables"))


def table_of(table: str | None, file: Path | None) -> str:
    """The table that is named on the command line or, as ``table``, in a job's configuration file."""
    named = table or (read_file(file).get("table") if file else None)
    if not isinstance(named, str):
        raise UsageError("no table is named", where=file, do="give its folder: softlabel inspect TABLE")
    return named


@app.command(name="inspect")
def inspect_table(table: str | None = None, /, *, file: File = None, as_json: AsJson = False) -> None:
    """Show what a table holds: its teacher and selection, its rows by split, its bytes a position by column.

    Args:
        table: Folder of the table, or of a view; TABLE@12 for version 12, TABLE@tag for the one of a tag.
    """

    def work() -> Any:
        from softlabel.pipeline import inspect

        return inspect(table_of(table, file))

    answer("inspect", work, as_json)


@app.command(name="history")
def show_versions(table: str | None = None, /, *, file: File = None, as_json: AsJson = False) -> None:
    """Show a table's versions: when, by whom, what was done, how many sequences, positions and bytes it added, who
    needs it.

    Args:
        table: Folder of the table.
    """

    def work() -> Any:
        from softlabel.pipeline import history

        return history(table_of(table, file))

    answer("history", work, as_json)


if __name__ == "__main__":
    main()
