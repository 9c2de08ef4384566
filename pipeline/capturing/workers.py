"""Worker processes side by side on one machine, one for each device: a worker that dies costs its shard, no more.

A shard whose worker died is done again by another, a few times at most; a worker that dies over and over is given up.
``capture`` says what happens to a shard, and ``worker`` is the process itself.
"""

import logging
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow.parquet as pq
import torch

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models.files import known_hashes
from softlabel.pipeline.processes import Child, ChildDiedError, listen
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.errors import WorkerError
from softlabel.storage.writer import Commit

ATTEMPTS = 3
"""How often a shard is tried before it is left: one that kills its workers must not do so for ever."""
SMALLEST_SHARD = 65_536
"""Positions for which a worker is started at all."""
_DEATHS = 2
"""In a row, after which a worker is given up: its device is broken, or there is no room for it."""
_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN_LOOKS = 0.2

logger = logging.getLogger("softlabel")


def cut(shards: Sequence[Path], workers: int) -> Sequence[Path]:
    """A plan's shards, cut further if there are fewer than workers, as far as that is worth a worker's start.

    Args:
        shards: Parquet files of sequences; those that are cut are replaced.
        workers: that there are.
    """
    if len(shards) >= workers:
        return shards
    found = []
    for path in shards:
        rows = pq.read_table(path)
        ends = np.cumsum(rows.column("positions").to_numpy())
        pieces = max(1, min(-(-workers // len(shards)), int(ends[-1]) // SMALLEST_SHARD))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, pieces) / pieces)
        bounds = np.unique([0, *cuts, len(rows)]).tolist()  # one sequence may be as long as several pieces
        for number, (start, end) in enumerate(pairwise(bounds)):
            found.append(path.with_stem(f"{path.stem}-{number}"))
            pq.write_table(rows.slice(start, end - start), found[-1])
        path.unlink()
    return found


class Worker:
    """A process on one device; it starts with its first shard, and anew with the next one after it has died.

    Args:
        name: for people.
        device: that it is pinned to.
        threads: of its CPU work.
        log: file for whatever it prints.
    """

    def __init__(self, name: str, device: str, threads: int, log: Path) -> None:
        self.name = name
        self.deaths = 0
        """In a row."""
        self.closed = False
        self._device, self._threads, self._log = device, threads, log
        self._child: Child | None = None
        self._lock = Lock()

    def capture_shard(self, config: CaptureConfig, path: Path, watch: Watch = unwatched) -> Commit:
        """See ``pipeline.capturing.capture.capture_shard``, which the process does.

        Raises:
            WorkerError: if the process dies; nothing of the shard is done then.
        """
        pinned = config.teacher.model_copy(update={"device": self._device, "workers": 1})
        settings = config.model_copy(update={"teacher": pinned}).model_dump(mode="json")
        child = self._running()
        try:
            child.tell([settings, str(path), known_hashes()])
            for _, kind, value in listen([child]):
                if kind == "commit":
                    self.deaths = 0
                    return Commit(**value)
                watch(Progress(**value))
        except ChildDiedError:
            self.deaths += 1
        raise WorkerError(f"worker {self.name} died; its shard was not captured", found=child.death())

    def close(self) -> None:
        """End the process, whatever it is at, and start none again."""
        with self._lock:
            self.closed = True
            if self._child is None:
                return
            self._child.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.process.wait(_SECONDS_TO_END)
            self._child.process.kill()
            self._child.process.wait()

    def _running(self) -> Child:
        with self._lock:
            if self.closed:
                raise WorkerError("the capture has ended")
            if self._child is None or self._child.process.poll() is not None:
                self._child = Child("softlabel.pipeline.capturing.worker", str(self._threads), log=self._log)
            return self._child


class Workers:
    """All workers of a capture. Use it as a context manager: none of them is there at its end.

    Args:
        devices: one for each worker; workers on the same device are numbered.
        folder: for what they print.
    """

    def __init__(self, devices: Sequence[str], folder: Path) -> None:
        threads = max(1, torch.get_num_threads() // len(devices))
        self._last: WorkerError | None = None
        several = len(set(devices)) < len(devices)
        names = [f"{device} #{i}" if several else device for i, device in enumerate(devices, 1)]
        self._workers = [
            Worker(name, device, threads, folder / f"worker-{i}.log")
            for i, (name, device) in enumerate(zip(names, devices, strict=True))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def each(self, paths: Sequence[Path], do: Callable[[Worker, Path], Commit]) -> list[Commit]:
        """Do every shard once, in no certain order.

        Args:
            paths: of the shards.
            do: has a worker do one shard. Called from several threads, in the context of this call.

        Raises:
            WorkerError: if shards are left because workers died over them; all others are done.
            SoftlabelError: what a shard raised otherwise, at once; the shards that were being done are not.
        """
        commits: list[Commit] = []
        left = list(paths)
        for attempt in range(ATTEMPTS):
            alive = [worker for worker in self._workers if worker.deaths < _DEATHS]
            if left and alive:
                left = self._once(left, alive, do, commits, retry=attempt + 1 < ATTEMPTS)
        if left:
            raise WorkerError(
                f"{len(left)} of {len(paths)} shards were not captured, because their workers died",
                found=self._last,
                do="fix what the workers died of, then run the same command again: it captures the remaining shards\n"
                "               (if memory ran out, lower teacher.batch_tokens or teacher.workers)",
            )
        return commits

    def _once(
        self,
        paths: Sequence[Path],
        alive: Sequence[Worker],
        do: Callable[[Worker, Path], Commit],
        commits: list[Commit],
        retry: bool,
    ) -> list[Path]:
        """Give each shard to one worker; those that were not done are returned."""
        waiting, failed = deque(paths), list[Path]()

        def work(worker: Worker) -> None:
            while waiting and worker.deaths < _DEATHS:
                try:
                    path = waiting.popleft()
                except IndexError:  # another worker was faster
                    return
                try:
                    commits.append(do(worker, path))
                except WorkerError as error:
                    if worker.closed:
                        return
                    failed.append(path)
                    self._last = error
                    logger.warning("%s\n  next:        %s", error, _next_steps(worker, retry))

        with ThreadPoolExecutor(len(alive)) as threads:
            at_work = {threads.submit(copy_context().run, work, worker) for worker in alive}
            try:
                while at_work:  # with polars loaded, a wait without end is deaf to Ctrl-C
                    done, at_work = wait(at_work, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                    for future in done:
                        future.result()
            except BaseException:
                waiting.clear()
                self._close()
                raise
        return [*failed, *waiting]

    def _close(self) -> None:
        with ThreadPoolExecutor(len(self._workers)) as threads:
            list(threads.map(Worker.close, self._workers))


def _next_steps(worker: Worker, retry: bool) -> str:
    shard = "the shard is tried again" if retry else "this run does not try the shard again"
    return f"{shard}; this worker is not used any more" if worker.deaths >= _DEATHS else shard
