"""Two processes never use the same GPU: here, the cards are names, and their users real processes."""

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from softlabel.pipeline import cards
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.tables import VerifyConfig
from softlabel.pipeline.estimation.estimate import estimate
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.tables.verify import verify
from softlabel.pipeline.training.train import train
from softlabel.storage import lock
from softlabel.storage.table import Table
from tests.conftest import ROOT
from tests.pipeline import trainings
from tests.pipeline.capturing.test_capture import DENSE, rows_of, settings, texts, write

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is a card of its own, and can't be shared."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(cards, "FOLDER", tmp_path / "locks")
    monkeypatch.setattr(cards, "card", lambda device: device)
    monkeypatch.setattr(cards, "_SECONDS_BETWEEN_TRIES", 0.05)
    monkeypatch.setattr(lock, "_SECONDS_TO_END", 0.1)


@contextmanager
def holder(*devices: str) -> Iterator["multiprocessing.process.BaseProcess"]:
    """Another process that holds these cards until it is killed."""
    holds = fork.Event()

    def hold() -> None:
        with cards.holding(devices):
            holds.set()
            time.sleep(600)

    process = fork.Process(target=hold)
    process.start()
    try:
        assert holds.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_run_waits_for_a_card_says_for_whom_and_gets_it_when_the_holder_is_killed(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "softlabel")
    with holder("a", "b") as process, cards.holding(["c"]):
        assert not caplog.records, "a free card is not waited for"

        def kill() -> None:
            deadline = time.monotonic() + 60
            while not caplog.records:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.kill()

        with ThreadPoolExecutor(1) as thread:
            killed = thread.submit(kill)
            with cards.holding(["b"]):
                process.join(60)
                assert process.exitcode == -signal.SIGKILL
            killed.result()
    first, last = [record.message for record in caplog.records]
    assert first.startswith(f"b is in use by process {process.pid} of ")
    assert "this run waits until it is free" in first
    assert last.startswith("b is free, after ")


def test_processes_that_want_overlapping_cards_neither_share_one_nor_wait_for_each_other_for_ever(tmp_path: Path):
    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(12):
            wanted = order.sample("abc", order.randint(1, 3))
            with cards.holding(wanted):
                for name in wanted:
                    (tmp_path / name).touch(exist_ok=False)  # fails if another process has it
                time.sleep(0.005)
                for name in wanted:
                    (tmp_path / name).unlink()
        os._exit(0)  # without the ends of threads that a fork does not have, such as Prefect's

    processes = [fork.Process(target=work, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4


def test_without_a_place_for_locks_work_is_done_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(cards, "FOLDER", tmp_path / "missing")
    with cards.holding(["a"]):
        pass
    assert "other runs may use it at the same time" in caplog.text


@pytest.mark.long
def test_everything_that_uses_a_device_holds_its_card(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held: list[str] = []
    monkeypatch.setattr(cards, "_hold", lambda name, _: held.append(name))

    def holds(work: Callable[[], object]) -> list[str]:
        held.clear()
        work()
        return list(held)

    documents = write(tmp_path / "documents.parquet", texts(40))
    config = settings(tiny_teacher, documents, tmp_path / "table", selection=DENSE)
    teacher = {"model": str(tiny_teacher), "dtype": "float32"}
    sample = EstimateConfig.model_validate({"documents": str(documents), "teacher": teacher})
    assert holds(lambda: estimate(sample)) == ["cpu"]
    assert holds(lambda: capture(config)) == ["cpu"]
    assert holds(lambda: capture(config)) == [], "nothing is left to do"
    table = Table.open(str(tmp_path / "table"))
    training = trainings.settings(table, tmp_path / "student", stream={"max_length": 128})
    assert holds(lambda: train(training)) == ["cpu"]
    assert holds(lambda: train(training)) == []
    students = (str(tmp_path / "student"),)
    measured = EvaluateConfig(table=table.location, students=students, report=str(tmp_path / "report"))
    assert holds(lambda: evaluate(measured)) == ["cpu"]
    checked = VerifyConfig.model_validate({"table": table.location, "teacher": teacher, "sequences": 4})
    assert holds(lambda: verify(checked)) == ["cpu"]


CAPTURE = """
import sys
from pathlib import Path
from softlabel.pipeline import cards
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig

cards.FOLDER, cards.card = Path(sys.argv[2]), lambda device: device
capture(CaptureConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.long
def test_of_two_captures_on_one_card_the_second_begins_when_the_first_is_killed(tiny_teacher: Path, tmp_path: Path):
    def start(name: str, seconds: str) -> "subprocess.Popen[bytes]":
        documents = write(tmp_path / f"{name}.parquet", texts(40))
        teacher = {"model": str(tiny_teacher), "dtype": "float32", "device": "cpu", "batch_tokens": 128}
        teacher |= {"engine": "tests.flows.paced:Paced"}
        config = settings(tiny_teacher, documents, tmp_path / name, teacher=teacher, shards={"positions": 300})
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", CAPTURE, config.model_dump_json(exclude_unset=True), str(tmp_path / "locks")],
                env=os.environ | {"PYTHONPATH": str(ROOT), "PACED_SECONDS": seconds},
                stderr=log,
            )

    def says(name: str, text: str) -> bool:
        return text in (tmp_path / f"{name}.log").read_text()

    first = start("first", "600")
    deadline = time.monotonic() + 120
    while not any((tmp_path / "locks").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = start("second", "0")
    while not says("second", f"is in use by process {first.pid} of"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not Table.exists(str(tmp_path / "second"))
    first.kill()
    assert second.wait(120) == 0
    assert len(rows_of(tmp_path / "second")) == 40
    first.wait()
