"""Worker processes on one machine, one for each device: a worker that dies loses only its current shard.

A shard whose worker died is tried again, a few times at most; a worker that dies repeatedly is not used any more.
``capture.capture_shard`` is what a worker does with a shard, and ``worker`` is the process itself.
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

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.models.files import known_hashes
from softlabel.pipeline.processes import Child, ChildDiedError, Warned, messages
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.errors import WorkerError
from softlabel.storage.writer import Commit

ATTEMPTS = 3
"""How often a shard is tried: one that kills its workers must not do so for ever."""
SMALLEST_SHARD = 65_536
"""Fewest positions that are worth starting a worker for."""
_MAX_DEATHS = 2
"""Deaths in a row after which a worker is not used any more: its device is broken, or its memory is too small."""
_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN_LOOKS = 0.2

logger = logging.getLogger("softlabel")


def split_shards(shards: Sequence[Path], workers: int) -> Sequence[Path]:
    """A plan's shards, split further if there are fewer shards than workers and the pieces are large enough.

    Args:
        shards: Parquet files of sequences; files that are split are replaced by their pieces.
        workers: number of workers.
    """
    if len(shards) >= workers:
        return shards
    split = []
    for path in shards:
        rows = pq.read_table(path)
        ends = np.cumsum(rows.column("positions").to_numpy())
        pieces = max(1, min(-(-workers // len(shards)), int(ends[-1]) // SMALLEST_SHARD))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, pieces) / pieces)
        bounds = np.unique([0, *cuts, len(rows)]).tolist()  # one sequence may be as long as several pieces
        for number, (start, end) in enumerate(pairwise(bounds)):
            split.append(path.with_stem(f"{path.stem}-{number}"))
            pq.write_table(rows.slice(start, end - start), split[-1])
        path.unlink()
    return split


class Worker:
    """A process on one device; it is started for its first shard, and restarted if it has died.

    Args:
        name: shown to the user.
        device: that the process is pinned to.
        threads: number of CPU threads.
        log: file for the process's output.
        warned: takes its warnings.
    """

    def __init__(self, name: str, device: str, threads: int, log: Path, warned: Warned | None = None) -> None:
        self.name = name
        self.deaths = 0
        """Number of deaths in a row."""
        self.closed = False
        self._device, self._threads, self._log, self._warned = device, threads, log, warned
        self._child: Child | None = None
        self._lock = Lock()

    def capture_shard(self, job: CaptureJob, path: Path, watch: Watch = unwatched) -> Commit:
        """Run ``pipeline.capturing.shard.capture_shard`` in the process.

        Raises:
            WorkerError: if the process dies; nothing of the shard is committed then.
        """
        child = self._running()
        try:
            child.send([job.on(self._device).to_json(), str(path), known_hashes()])
            for _, kind, value in messages([child]):
                if kind == "commit":
                    self.deaths = 0
                    return Commit(**value)
                watch(Progress(**value))
        except ChildDiedError:
            self.deaths += 1
        if self.closed:
            raise WorkerError("this shard was not captured, because the capture was ended")
        raise WorkerError(f"worker {self.name} died; its shard was not captured", found=child.death())

    def close(self) -> None:
        """End the process, even in the middle of a shard, and never start it again."""
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
                module, threads = "softlabel.pipeline.capturing.worker", str(self._threads)
                self._child = Child(module, threads, log=self._log, warned=self._warned)
            return self._child


class Workers:
    """All workers of a capture, as a context manager that ends their processes.

    Args:
        devices: device of each worker; workers on the same device are numbered.
        folder: for the processes' output.
    """

    def __init__(self, devices: Sequence[str], folder: Path) -> None:
        threads = max(1, torch.get_num_threads() // len(devices))
        self._last_error: WorkerError | None = None
        several = len(set(devices)) < len(devices)
        names = [f"{device} #{i}" if several else device for i, device in enumerate(devices, 1)]
        warned = Warned()
        self._workers = [
            Worker(name, device, threads, folder / f"worker-{i}.log", warned)
            for i, (name, device) in enumerate(zip(names, devices, strict=True))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def each(self, paths: Sequence[Path], do: Callable[[Worker, Path], Commit]) -> list[Commit]:
        """Process every shard once, in any order.

        Args:
            paths: files of the shards.
            do: makes a worker process one shard. Called from several threads, in the context of this call.

        Raises:
            WorkerError: if shards remain because their workers died; all others are done.
            SoftlabelError: any other error of a shard, raised at once; unfinished shards are abandoned.
        """
        commits: list[Commit] = []
        left = list(paths)
        for attempt in range(ATTEMPTS):
            alive = [worker for worker in self._workers if worker.deaths < _MAX_DEATHS]
            if left and alive:
                left = self._try_each(left, alive, do, commits, retry=attempt + 1 < ATTEMPTS)
        if left:
            raise WorkerError(
                f"{len(left)} of {len(paths)} shards were not captured, because their workers died",
                found=self._last_error,
                do="fix the cause, then run the same command again: it captures the remaining shards\n"
                "               (if memory ran out, lower teacher.batch_tokens or teacher.workers)",
            )
        return commits

    def _try_each(
        self,
        paths: Sequence[Path],
        alive: Sequence[Worker],
        do: Callable[[Worker, Path], Commit],
        commits: list[Commit],
        retry: bool,
    ) -> list[Path]:
        """Give each shard to one worker, and return the shards that were not done."""
        waiting, failed = deque(paths), list[Path]()

        def work(worker: Worker) -> None:
            while waiting and worker.deaths < _MAX_DEATHS:
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
                    self._last_error = error
                    logger.warning("%s\n  next:        %s", error, _next_steps(worker, retry))

        with ThreadPoolExecutor(len(alive)) as threads:
            at_work = {threads.submit(copy_context().run, work, worker) for worker in alive}
            try:
                while at_work:  # with polars loaded, a wait without a timeout ignores Ctrl-C
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
    return f"{shard}; this worker is not used any more" if worker.deaths >= _MAX_DEATHS else shard
