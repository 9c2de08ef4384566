"""One rank of a training by several processes, as torchrun starts it: ``python -m pipeline.rank SETTINGS``.

Writes what ``pipeline.ranks``, at the other end, wants to know, a line of JSON each. It ends when its standard input
does, so it never outlives the process that started torchrun.
"""

import json
import os
import sys
import warnings
from dataclasses import asdict
from threading import Thread
from typing import Any


def main() -> None:
    """Train as one rank."""
    Thread(target=_end_with_parent, daemon=True).start()
    # Whatever a library prints must not come between the lines.
    lines = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(kind: str, value: Any) -> None:
        os.write(lines, (json.dumps([kind, value]) + "\n").encode())

    from pipeline.config import TrainConfig
    from pipeline.progress import Progress
    from pipeline.training import train
    from storage.errors import SoftlabelError

    def watch(progress: Progress) -> None:
        tell("progress", asdict(progress))

    first = os.environ["RANK"] == "0"
    if first:
        warnings.showwarning = lambda message, *_, **__: tell("warning", str(message))
    try:
        report = train(TrainConfig.model_validate_json(sys.argv[1]), watch)
    except SoftlabelError as error:
        tell("error", [type(error).__name__, str(error)])
        sys.exit(1)
    if first:
        tell("report", asdict(report))
    # Without the interpreter's own end: a thread of gloo's that lets go of a tensor meanwhile would abort the process,
    # and torchrun then ends the others, of which one may still be writing.
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)  # also in the middle of a step: a checkpoint is whole or not there


if __name__ == "__main__":
    main()
