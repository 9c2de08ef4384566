"""Ctrl-C and SIGTERM end a training only after its current step, with a checkpoint; a second one ends it at once.

Before the first step, nothing can be lost: the signal ends the training at once. In any case, it then has the effect
that it would have had without this module, and a line says how far the training came.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from softlabel.pipeline.progress import Progress
from softlabel.pipeline.students.folder import StudentFolder, newest_checkpoint, step_of
from softlabel.pipeline.training.stop import Stop, StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nstopping: this step is finished and saved first; a second Ctrl-C or SIGTERM ends the training at once\n"

logger = logging.getLogger("softlabel")


@contextmanager
def stop_on_signals(folder: StudentFolder) -> Iterator[Stop]:
    """Let the block, a training, stop in order on SIGINT and SIGTERM; the signal then takes its usual effect.

    Only the main thread receives signals: in any other thread, nothing changes. An ignored signal stays ignored.

    Raises:
        KeyboardInterrupt: after a SIGINT, unless the caller's own handler does something else.
        SystemExit: after a SIGTERM, with code 143, unless the caller's own handler does something else.
    """
    stop, received = Stop(), list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = {number: signal.getsignal(number) for number in _SIGNALS}
    usual = {number: handler for number, handler in usual.items() if handler not in (None, signal.SIG_IGN)}

    def put_back() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def pass_on(number: int, frame: FrameType | None) -> NoReturn:
        handler = usual[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        raise SystemExit(128 + number)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        put_back()  # so that a second signal ends the training at once
        if not stop.begun:
            pass_on(number, frame)
        stop.request()
        with suppress(OSError):
            os.write(2, _NOTICE)  # without a lock, which the interrupted code may hold

    for number in usual:
        signal.signal(number, handle)
    try:
        yield stop
    except StoppedError:
        if not received:  # but another rank of torchrun has
            raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        put_back()
        if received:
            logger.warning("%s: %s", folder.path.name, _outcome(folder, stop.reached))
    if received:
        pass_on(received[0], None)


def _outcome(folder: StudentFolder, reached: Progress | None) -> str:
    """How far a training came that a signal has ended, and what the same command does next."""
    checkpoint = newest_checkpoint(folder.run)  # not folder.checkpoint, which would read and hash all of its files
    finished = folder.finished()
    done = finished.last_step if finished else 0
    if finished and (reached.done <= done if reached else checkpoint is None):
        return "the student is finished"
    saved = step_of(checkpoint) if checkpoint else done
    further = f"run the same command again to {f'go on from step {saved:,}' if saved else 'begin'}"
    if reached is None:
        return f"nothing {'more ' if saved else ''}was trained yet; {further}"
    step = max(reached.done, saved)
    if step == saved:
        kept = "saved"
    else:
        kept = f"the last checkpoint is of step {saved:,}" if saved else "nothing was saved yet"
    return f"stopped at step {step:,} of {reached.total:,}, {kept}; {further}"
