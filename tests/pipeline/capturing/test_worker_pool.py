"""Parallel workers do every shard once, whatever happens to a worker or to the process that started them."""

import os
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.capturing.worker_pool import ATTEMPTS, SMALLEST_SHARD, Worker, Workers, split_shards
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models import files as model_folder
from softlabel.pipeline.processes import Child
from softlabel.pipeline.progress import Progress
from softlabel.storage.errors import TeacherError, WorkerError
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.writer import Commit
from tests.pipeline.bigrams import REFUSING, UNHURRIED
from tests.pipeline.capturing.test_capture import rows_of, settings, texts, write


def with_two_workers(config: CaptureConfig, **teacher: object) -> CaptureConfig:
    """The same capture with two workers on the CPU that start soon."""
    changed = config.teacher.model_copy(update={"device": "cpu", "workers": 2, "engine": UNHURRIED, **teacher})
    return config.model_copy(update={"teacher": changed})


def workers_of(parent: int) -> list[int]:
    """Process ids of the workers that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:  # the process has ended meanwhile
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent and b"softlabel.pipeline.capturing.worker" in command:
            found.append(int(folder.name))
    return found


def gone(process: int) -> bool:
    """Whether a process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_after_a_worker_is_killed_every_row_is_still_captured_once(
    tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers use the hashes that this process has computed, and do not read the weights again.
    monkeypatch.setattr(model_folder, "_MIN_AGE_SECONDS", -1.0)
    model_folder.sha256(tiny_teacher / "model.safetensors")
    known = {state: "known" for state in model_folder.known_hashes() if "model.safetensors" in state}
    monkeypatch.setattr(model_folder, "_HASHES", known)
    documents = write(tmp_path / "d.parquet", texts(400))
    config = with_two_workers(settings(tiny_teacher, documents, tmp_path / "t"), batch_tokens=256)
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if set(progress.parts) == {"cpu #1", "cpu #2"} and not killed:
            killed.append(workers_of(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    report = capture(config, watch)
    assert killed
    assert "died" in caplog.text
    assert "SIGKILL" in caplog.text
    rows = rows_of(tmp_path / "t")
    assert len(rows) == 400
    assert set(Counter(rows).values()) == {1}
    found = inspect(Table.open(str(tmp_path / "t"))).splits.values()
    assert (report.sequences, report.positions) == (400, sum(split.positions for split in found))
    assert report.bytes == sum(split.bytes for split in found)
    assert seen[-1].done == seen[-1].total == report.positions
    assert sum(part.done for part in seen[-1].parts.values()) == report.positions
    assert 0.01 < seen[-1].details["probability in the head"] < 1
    assert 20 < seen[-1].details["bytes per position"] < 500
    assert Table.open(str(tmp_path / "t")).identity.teacher.files["model.safetensors"] == "known"
    again = capture(config)
    assert (again.sequences, again.unchanged, again.version) == (0, 400, report.version)


def test_an_interrupt_ends_all_workers(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = write(tmp_path / "d.parquet", texts(400))
    config = with_two_workers(settings(tiny_teacher, documents, tmp_path / "t"), batch_tokens=64)
    workers: list[int] = []
    interrupted = 0.0

    def watch(progress: Progress) -> None:
        nonlocal interrupted
        if len(progress.parts) == 2 and not workers:
            workers.extend(workers_of(os.getpid()))
            interrupted = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        capture(config, watch)
    assert time.monotonic() - interrupted < 60
    assert len(workers) == 2
    assert all(map(gone, workers))
    assert not list((tmp_path / "t" / "_softlabel" / "writing").glob("*.parquet")), "partly written shards are deleted"


def test_a_shard_that_is_given_up_is_not_said_to_be_the_death_of_its_worker(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resolve(settings(tiny_teacher, write(tmp_path / "d.parquet", texts(1)), tmp_path / "table"))
    worker = Worker("cpu", "cpu", 1, tmp_path / "log")
    worker._child = Child("tests.pipeline.speaking", "waits", log=tmp_path / "log")
    send, sent = worker._child.send, Event()
    monkeypatch.setattr(worker._child, "send", lambda message: (send(message), sent.set()))
    with ThreadPoolExecutor(1) as thread:
        shard = thread.submit(worker.capture_shard, job, tmp_path / "shard.parquet")
        assert sent.wait(60)
        worker.close()
        with pytest.raises(WorkerError, match="because the capture was ended") as error:
            shard.result()
    assert "died" not in str(error.value)


def test_a_workers_error_names_the_document_whatever_the_current_folder(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('somebody else')")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    broken = shutil.copytree(tiny_teacher, tmp_path / "broken")
    model.save_pretrained(broken)
    config = with_two_workers(settings(broken, write(tmp_path / "d.parquet", texts(1)), tmp_path / "t"))
    job = resolve(config)
    [shard] = plan(job, tmp_path / "plan").shards
    with Workers(["cpu"], tmp_path) as workers, pytest.raises(TeacherError, match="document d0"):
        workers.each([shard], lambda worker, path: worker.capture_shard(job, path))


def test_an_error_of_a_custom_engine_is_raised_with_its_details(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = write(tmp_path / "d.parquet", texts(300))
    config = with_two_workers(settings(tiny_teacher, documents, tmp_path / "t"), engine=REFUSING)
    with pytest.raises(TeacherError, match="RefusalError: not this one") as error:
        capture(config)
    assert error.value.details == {"model": 1}


class FakeCapture:
    """Captures shards without a process; the name of a shard says what happens to it."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.together = Barrier(2)

    def __call__(self, worker: Worker, path: Path) -> Commit:
        self.tried[path.name] += 1
        if "together" in path.name:
            self.together.wait(60)
        if "broken" in path.name:
            raise TeacherError("no distribution")
        if "poison" in path.name or ("once" in path.name and self.tried[path.name] == 1):
            worker.deaths += 1
            raise WorkerError(f"{worker.name} died")
        worker.deaths = 0
        return Commit(0, 1, 10, 100)


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def test_shards_are_captured_by_workers_in_parallel(tmp_path: Path) -> None:
    with Workers(["cuda:0", "cuda:1"], tmp_path) as workers:
        commits = workers.each(paths("together a", "together b", "c"), FakeCapture())
    assert len(commits) == 3


def test_a_shard_that_kills_its_workers_is_tried_a_few_times_and_then_an_error(tmp_path: Path) -> None:
    fake = FakeCapture()
    names = [f"s{i}" for i in range(20)]
    with Workers(["cpu"] * 3, tmp_path) as workers, pytest.raises(WorkerError, match="1 of 22 shards") as e:
        workers.each(paths("poison", "once", *names), fake)
    assert "run the same command again" in str(e.value)
    assert fake.tried == {"poison": ATTEMPTS, "once": 2} | dict.fromkeys(names, 1)


def test_workers_that_die_repeatedly_are_not_used_any_more(tmp_path: Path) -> None:
    fake = FakeCapture()
    with Workers(["cpu"] * 2, tmp_path) as workers, pytest.raises(WorkerError, match="50 of 50 shards"):
        workers.each(paths(*(f"poison {i}" for i in range(50))), fake)
    assert sum(fake.tried.values()) == 4


def test_an_error_other_than_a_death_ends_the_capture(tmp_path: Path) -> None:
    fake = FakeCapture()
    with Workers(["cpu"] * 2, tmp_path) as workers, pytest.raises(TeacherError, match="no distribution"):
        workers.each(paths("broken", *(f"once {i}" for i in range(1000))), fake)
    assert sum(fake.tried.values()) < 1000


def test_few_shards_are_split_so_that_every_worker_gets_one(tmp_path: Path) -> None:
    shards = []
    for number in range(2):
        shards.append(tmp_path / f"{number}.parquet")
        pq.write_table(
            pa.table({"positions": [1000] * 500, "row": range(500 * number, 500 * (number + 1))}), shards[-1]
        )
    assert split_shards(shards, 2) == shards
    pieces = [pq.read_table(path) for path in split_shards(shards, 7)]
    assert len(pieces) == 8
    assert pa.concat_tables(pieces).column("row").to_pylist() == list(range(1000))
    assert all(sum(piece["positions"].to_pylist()) >= 0.9 * SMALLEST_SHARD for piece in pieces)
    for positions in (SMALLEST_SHARD + 1, 3 * SMALLEST_SHARD):
        pq.write_table(pa.table({"positions": [positions]}), shards[0])
        assert [len(pq.read_table(path)) for path in split_shards(shards[:1], 4)] == [1]
