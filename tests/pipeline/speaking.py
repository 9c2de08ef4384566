"""A child process that says what a test wants to hear, and whose modules a test asks for."""

import logging
import os
import signal
import sys
import warnings

from softlabel.pipeline.processes import message_sender, same_modules, send_warnings, serialized
from softlabel.storage.errors import SoftlabelError, TeacherError


class OfMyEngineError(TeacherError):
    """Of a class that nobody else knows."""


class TableError(Exception):
    """Of a name that softlabel knows otherwise."""


RAISED = {
    "ours": TeacherError("a teacher", found="nothing", details={"positions": [1, 2]}),
    "of an engine": OfMyEngineError("no room", details={"bytes": 7}),
    "of no class of its own": SoftlabelError("in general"),
    "of a library": ValueError("3 is no 4"),
    "of another's name": TableError("of a restaurant"),
    "with odd details": TeacherError("odd \udcff", details={"what": object, "nan": float("nan")}),
}


def main() -> None:
    if sys.argv[1] == "modules":
        print(same_modules()["PYTHONPATH"])
        return
    if sys.argv[1] == "waits":
        sys.stdin.read()
        return
    send = message_sender()
    if sys.argv[1] == "warns":
        send_warnings(send)
        warn()
        send("progress", {})
        sys.stdin.read()
        return
    print("what a library prints")
    send("progress", {"text": "long " * 100_000})
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    send("error", serialized(RAISED[sys.argv[1]]))
    assert not sys.stdin.read()


def warn() -> None:
    """Warn as libraries do, each time twice; and say things that are no warnings."""
    library = logging.getLogger("library.of.models")
    library.propagate = False
    library.addHandler(logging.StreamHandler())
    library.setLevel(logging.INFO)
    for _ in range(2):
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        library.warning("%d tokens are too many", 7)
        library.warning("%d tokens", "too many")
        library.error("from a document: \x1b[31m\r")
        library.warning("no access to s3://key:PLANTED@bucket/table")
        library.info("no warning")
        logging.getLogger("softlabel.part").warning("ours")
    for number in range(1000):
        library.warning("number %d", number)


if __name__ == "__main__":
    main()
