"""A request to stop a training: it finishes its current step, writes a checkpoint, and then ends."""

from collections.abc import Callable

from softlabel.pipeline.progress import Progress, Watch


class StoppedError(Exception):
    """The training was asked to stop, and has written its checkpoint."""


class Stop:
    """Whether a training is asked to stop, which it can be from its first step on, and how far it has come.

    Args:
        on_begin: called when the first step begins.
    """

    def __init__(self, on_begin: Callable[[], None] = lambda: None) -> None:
        self.begun = False
        self.requested = False
        self.reached: Progress | None = None
        """None before the first step is done."""
        self.on_request: Callable[[], None] = lambda: None
        """Called when the training is asked to stop, maybe from a signal handler."""
        self._on_begin = on_begin

    def begin(self) -> None:
        """Note that a step begins."""
        if not self.begun:
            self.begun = True
            self._on_begin()

    def request(self) -> None:
        """Ask the training to stop."""
        self.requested = True
        self.on_request()

    def noting(self, watch: Watch) -> Watch:
        """A watch that notes how far the training has come."""

        def note(progress: Progress) -> None:
            self.reached = progress
            watch(progress)

        return note
