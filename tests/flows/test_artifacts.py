"""Progress on the server: the work never waits for it, and the server gets the newest progress once it answers."""

import time
from threading import Event

import pytest

from softlabel.flows.running import artifacts
from softlabel.flows.running.artifacts import progress_artifact
from softlabel.pipeline.progress import Progress
from tests.flows.servers import wait_until

HANGS = 20
"""Seconds that a server which hangs keeps whoever waits for it."""


class Server:
    """Takes artifacts while it is up, and answers nothing while it hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up, self.gone = Event(), False
        self.tried = 0
        self.received: list[float] = []
        monkeypatch.setattr(artifacts, "_SECONDS_FOR_THE_LAST", 60.0)  # however busy the machine is
        monkeypatch.setattr(artifacts, "create_progress_artifact", lambda progress, **_: self._take(progress))
        monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, progress, **__: self._take(progress))

    def _take(self, progress: float) -> str:
        gone = self.gone
        self.tried += 1  # from now on, the test may change whether it is gone
        if gone:
            raise RuntimeError("Failed to reach API")
        assert self.up.wait(HANGS)
        self.received.append(progress)
        return "artifact"


def at(done: int) -> tuple[Progress, str, dict[str, str]]:
    return Progress("capture", done, 4, "positions"), "", {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def test_a_server_that_hangs_does_not_stall_the_work_and_then_gets_the_newest_progress(server: Server):
    with progress_artifact("key") as show:
        for done in range(5):
            began = time.monotonic()
            show(*at(done))
            assert time.monotonic() - began < HANGS / 2
        server.up.set()
    assert len(server.received) <= 2
    assert server.received[-1] == 100.0


def test_the_end_of_the_work_waits_only_a_moment_for_a_server_that_hangs(server, monkeypatch):
    monkeypatch.setattr(artifacts, "_SECONDS_FOR_THE_LAST", 0.1)
    began = time.monotonic()
    with progress_artifact("key") as show:
        show(*at(4))
    assert time.monotonic() - began < HANGS / 2
    server.up.set()
    wait_until(lambda: server.received == [100.0], seconds=60)  # not in the middle of the next test


def test_progress_is_sent_again_once_the_server_is_back(server, caplog):
    server.up.set()
    with progress_artifact("key") as show:
        for done in range(5):
            server.gone = done in (1, 2)
            show(*at(done))
            wait_until(lambda: server.tried == done + 1, seconds=60)  # noqa: B023
    assert server.received == [0.0, 75.0, 100.0]
    assert len(caplog.records) == 1


def test_an_error_of_the_work_is_raised_as_it_is(server: Server):
    server.up.set()

    def work() -> None:
        with progress_artifact("key") as show:
            show(*at(1))
            raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        work()
    assert server.received == [25.0]
