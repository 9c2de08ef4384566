"""Progress lines: rates, time left, and how often they appear."""

import io
import logging
import sys

import pytest

from softlabel.flows.running import progress
from softlabel.flows.running.progress import Pace, describe, watching
from softlabel.pipeline.progress import Progress


def test_a_line_shows_count_rate_and_time_left():
    text = describe(Progress("capture", 3_000, 12_000, "positions", {"bytes per position": 58.214}), 1_500.0)
    assert text == "3,000/12,000 positions  1,500/s  0:00:06 left  bytes per position 58.21"


def test_no_rate_is_shown_before_it_is_known():
    assert describe(Progress("train", 0, 10, "steps"), None) == "0/10 steps"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_no_time_left_is_shown_without_a_total():
    text = describe(Progress("plan", 60, None, "documents", {"pending positions": 15_769.0}), 30.0)
    assert text == "60 documents  30/s  pending positions 15,769"


def test_the_rate_counts_from_the_first_report_of_a_stage(now: list[float]):
    pace = Pace()
    assert pace.rate(50) is None
    now[0] = 110.0
    assert pace.rate(90) == 4.0


def test_the_rate_is_that_of_the_last_minute(now: list[float]):
    pace, done, rates = Pace(), 0, []
    for second in range(400):
        now[0] += 1
        done += 1 if second < 200 else 10  # a slow start
        rates.append(pace.rate(done))
    assert (rates[199], rates[-1]) == (1.0, 10.0)
    now[0] += 1000
    assert pace.rate(done + 500) == pytest.approx(0.5, rel=0.01), (
        "a step that takes longer than a minute has a rate, too"
    )


def test_the_rate_starts_again_after_work_was_lost(now: list[float]):
    pace = Pace()
    for done, rate in ((0, None), (100, 10.0), (60, None), (80, 2.0)):
        assert pace.rate(done) == rate
        now[0] += 10


def test_few_lines_are_logged_but_always_the_first_and_the_last(caplog: pytest.LogCaptureFixture, now: list[float]):
    with caplog.at_level(logging.INFO, "softlabel"), watching() as watch:
        for done in range(101):
            watch(Progress("capture", done, 100, "positions"))
            now[0] += 0.1
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "capture  0/100 positions"
    assert lines[-1] == "capture  100/100 positions  10/s"
    assert len(lines) == 3


def test_each_worker_has_its_own_line(caplog: pytest.LogCaptureFixture, now: list[float]):
    with caplog.at_level(logging.INFO, "softlabel"), watching() as watch:
        for done in (0, 100):
            parts = {
                f"cuda:{i}": Progress(
                    "capture", done // 4 + done // 2 * i, None, "positions", {"probability in the head": 0.9}
                )
                for i in range(2)
            }
            watch(Progress("capture", done, 100, "positions", parts=parts))
            now[0] += 10
    lines = [record.getMessage() for record in caplog.records]
    assert lines[3:] == [
        "capture  100/100 positions  10/s",
        "  cuda:0  25 positions  2.5/s  probability in the head 0.9",
        "  cuda:1  75 positions  7.5/s  probability in the head 0.9",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("now")
def test_a_terminal_shows_bars_while_the_log_gets_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler, ours = logging.StreamHandler(terminal), logging.getLogger("softlabel")
    ours.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "softlabel"), watching() as watch:
            watch(Progress("capture", 0, 100, "positions"))
            watch(Progress("capture", 100, 100, "positions"))
            ours.warning("a worker died")
    finally:
        ours.removeHandler(handler)
    assert [record.getMessage() for record in caplog.records][:2] == [
        "capture  0/100 positions",
        "capture  100/100 positions",
    ]
    shown = terminal.getvalue()
    assert "100/100 positions" in shown
    assert "capture  " not in shown, "a log line between the bars"
    assert "a worker died" in shown
