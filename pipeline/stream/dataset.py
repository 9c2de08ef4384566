"""Streams training batches: reads a table or a view and yields one rank's batches, from any step on.

``pipeline.stream.epoch_plan`` decides the order and the packing, ``pipeline.stream.batch`` the layout; this module
reads the plan's sequences, a window ahead. It never decodes soft labels (``pipeline.loss.targets`` does, on the device)
and knows no model and no loss.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.stream.batch import COLUMNS, Batch, Pack, Sequences, collate
from softlabel.pipeline.stream.epoch_plan import EpochPlan, Ints, accumulation, occurrences, plan_epoch, share
from softlabel.pipeline.students.record import Cursor
from softlabel.storage.errors import UsageError
from softlabel.storage.views.row_groups import Group, load, outlines
from softlabel.storage.views.view import AnyTable, View

WINDOW_TOKENS = 1 << 20
"""Tokens of a window, within which sequences are shuffled and packed. It affects the order: after a change, a resumed
run would see some sequences twice."""


class SoftLabelDataset(IterableDataset[Batch]):
    """One rank's share of a table's training rows, from a cursor on.

    Every sequence comes exactly once per epoch (from a view with weights, as often as ``epoch_plan.occurrences`` says),
    with any number of ranks and DataLoader workers, in an order that depends only on the table's version,
    ``stream.seed`` and the epoch (see ``epoch_plan.plan_epoch``). A pack is the content of a training row: as many
    sequences as fit or, without ``stream.packing``, a single one. An optimizer step takes the plan's next
    ``stream.batch_size`` packs (fewer at an epoch's end) and deals them out to the ranks one by one; each rank yields
    ``accumulation`` batches per step, of at most ``stream.micro_batch_size`` rows. A rank without a pack left for a
    batch yields one row of padding without captured positions, so that all ranks make equally many passes.

    Workers, as in ``DataLoader(dataset, batch_size=None, num_workers=n)``, take turns in producing batches, as the
    DataLoader expects: their number affects only the speed. For a table in a bucket, they need
    ``multiprocessing_context="forkserver"``, since connections do not survive a fork. Each worker of each rank reads
    every window of the plan, one window ahead: it holds two windows in memory, and briefly a second copy of the next.

    Args:
        table: table version or view to read.
        stream: packing, row length, batch sizes and seed.
        split: train or eval.
        shuffle: False for the table's order.
        rank: index of this rank.
        world_size: number of ranks.
        start: where to start: ``state`` of the run that is resumed.
        epochs: passes over the split, including those before ``start``.
        max_steps: optimizer steps instead of epochs, including those before ``start``.

    Raises:
        UsageError: if the split is empty, or a sequence is longer than a row.
        IntegrityError: if a shard is missing or damaged.
    """

    def __init__(
        self,
        table: AnyTable,
        stream: StreamConfig,
        *,
        split: str = "train",
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        start: Cursor | None = None,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size, "ranks are numbered from 0"
        self._table = table
        self._stream = stream
        self._row_tokens = stream.max_length if stream.packing else None
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size
        self._start = start or Cursor()
        self._window_tokens = WINDOW_TOKENS
        self._index = _Index.read(table, split)
        self._check(split)
        self._plans: dict[int, EpochPlan] = {}
        self._packs: dict[int, int] = {}
        self.total_steps = self._steps_of(epochs) if max_steps is None else max_steps
        """Optimizer steps of the whole run, including those before ``start``."""
        self._require_steps(epochs)

    @property
    def accumulation(self) -> int:
        """Number of batches that each rank yields per optimizer step."""
        return accumulation(self._stream.batch_size, self._world_size, self._stream.micro_batch_size)

    def state(self, step: int) -> Cursor:
        """Cursor of a run after a number of optimizer steps, including those before ``start``.

        It depends only on the steps that were trained, so that no batch that was read ahead is lost.
        """
        cursor = self._start
        assert step >= cursor.step, "a run does not go back"
        while True:
            packs, steps = self._packs_in(cursor.epoch), step - cursor.step
            if steps <= self._steps_left(cursor):
                return Cursor(step, cursor.epoch, min(packs, cursor.packs + steps * self._stream.batch_size))
            cursor = Cursor(cursor.step + self._steps_left(cursor), cursor.epoch + 1)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        with _Windows(self._table, self._index) as windows:
            number = -1
            for step in self._steps():
                positions = int(self._index.positions[step.plan.members(step.first, step.last)].sum())
                for micro in range(self.accumulation):
                    number += 1
                    if number % turns == turn:
                        yield self._batch(step, micro, positions, windows)

    def _batch(self, step: "_Step", micro: int, global_positions: int, windows: "_Windows") -> Batch:
        mine = share(step.first, step.last, self._rank, self._world_size, self._stream.micro_batch_size, micro)
        packs = [windows.get(step.epoch, step.plan, step.plan.window_of(pack)).pack(step.plan, pack) for pack in mine]
        return collate(packs, self._row_tokens, self._table, global_positions)

    def _steps(self) -> Iterator["_Step"]:
        """The optimizer steps from the start on."""
        cursor = self._start
        while cursor.step < self.total_steps:
            plan = self._plan(cursor.epoch)
            first, last = cursor.packs, min(plan.packs, cursor.packs + self._stream.batch_size)
            if first < last:
                yield _Step(cursor.epoch, plan, first, last)
                cursor = Cursor(cursor.step + 1, cursor.epoch, last)
            else:
                cursor = Cursor(cursor.step, cursor.epoch + 1)

    def _steps_of(self, epochs: float) -> int:
        """Steps of the whole run, if it ends after a number of epochs: those before the start and those from there."""
        cursor, whole = self._start, math.floor(epochs)
        while cursor.epoch < whole:
            cursor = Cursor(cursor.step + self._steps_left(cursor), cursor.epoch + 1)
        if cursor.epoch > whole or epochs == whole:
            return cursor.step
        part = math.ceil((epochs - whole) * self._packs_in(whole)) - cursor.packs
        return cursor.step + max(0, math.ceil(part / self._stream.batch_size))

    def _steps_left(self, cursor: Cursor) -> int:
        """Steps from a cursor to the end of its epoch."""
        return math.ceil((self._packs_in(cursor.epoch) - cursor.packs) / self._stream.batch_size)

    def _packs_in(self, epoch: int) -> int:
        if epoch not in self._packs:
            self._plan(epoch)
        return self._packs[epoch]

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            seed, weights = self._stream.seed, self._index.weights
            plan = plan_epoch(
                self._index.tokens,
                self._index.group_starts,
                self._row_tokens,
                self._window_tokens,
                seed=seed,
                epoch=epoch,
                shuffle=self._shuffle,
                counts=None if weights is None else occurrences(weights, seed, epoch),
            )
            self._plans = {epoch: plan}
            self._packs[epoch] = plan.packs
        return self._plans[epoch]

    def _check(self, split: str) -> None:
        if not self._index.positions.any():
            raise UsageError(
                f"the table has no {split} sequences",
                expected=f"at least one sequence with captured positions in the {split} split",
                found=f"{len(self._index.positions)} sequences, none with captured positions, in version "
                f"{self._table.version}",
                where=self._table.location,
                do="capture more documents; shards.eval_fraction sets the share of them that goes to eval",
            )
        longest = int(self._index.tokens.max())
        if longest > self._stream.max_length:
            raise UsageError(
                "some of the table's sequences are longer than a training row, and training never cuts them",
                expected=f"stream.max_length: at least {longest}",
                found=f"stream.max_length: {self._stream.max_length}",
                where=self._table.location,
                do=f"set stream.max_length to {longest} or more, or capture with a smaller sequences.max_tokens",
            )

    def _require_steps(self, epochs: float) -> None:
        if self.total_steps == 0:
            raise UsageError(
                "there is nothing to train on: so few epochs of this view include none of its sequences",
                expected="at least one optimizer step",
                found=f"no step in optimizer.num_train_epochs: {epochs:g}, with the small weights of the view's tables",
                where=self._table.location,
                do="raise optimizer.num_train_epochs, or give the view's tables larger weights",
            )


class _Step(NamedTuple):
    """One optimizer step: the packs from ``first`` up to, not including, ``last``."""

    epoch: int
    plan: EpochPlan
    first: int
    last: int


@dataclass(frozen=True)
class _Index:
    """Index of a split: the small columns of all its sequences, and its row groups."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    weights: NDArray[np.float64] | None
    """Mean number of times that each sequence comes in an epoch; None for exactly once."""
    group_starts: Ints
    """(row groups + 1,) the first sequence of each row group, and the number of sequences."""
    groups: list[Group]

    @classmethod
    def read(cls, table: AnyTable, split: str) -> Self:
        groups = []
        tokens, positions = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for group, rows in outlines(table, ["tokens", "positions"], split):
            groups.append(group)
            tokens.append(rows.column("tokens").to_numpy())
            positions.append(rows.column("positions").to_numpy())
        counts = [len(part) for part in tokens]
        weights = None
        if isinstance(table, View) and not table.average:
            weights = np.repeat([0.0, *(table.weights[group.table] for group in groups)], counts)
        return cls(
            np.concatenate(tokens), np.concatenate(positions), weights, np.cumsum(counts, dtype=np.int64), groups
        )

    def group_of(self, sequences: Ints) -> Ints:
        """Row group of each sequence."""
        return np.searchsorted(self.group_starts, sequences, side="right") - 1


class _Window(NamedTuple):
    """The row groups of a window of the plan."""

    numbers: Ints
    """Numbers of their sequences, ascending."""
    sequences: Sequences

    def pack(self, plan: EpochPlan, number: int) -> Pack:
        """One of the window's packs."""
        return Pack(self.sequences, np.searchsorted(self.numbers, plan.members(number, number + 1)))


class _Windows:
    """Reads the row groups of the current window and, in the background, those of the next one."""

    def __init__(self, table: AnyTable, index: _Index) -> None:
        self._table = table
        self._index = index
        self._read: dict[tuple[int, int], Future[_Window]] = {}
        self._pool = ThreadPoolExecutor(1, "softlabel-window")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, epoch: int, plan: EpochPlan, number: int) -> _Window:
        """A window. Windows have to be requested in the plan's order: earlier ones are dropped."""
        for ahead in range(number, min(number + 2, plan.windows)):
            if (epoch, ahead) not in self._read:
                groups = np.unique(self._index.group_of(plan.window(ahead))).tolist()
                self._read[epoch, ahead] = self._pool.submit(self._load, groups)
        self._read = {key: future for key, future in self._read.items() if key >= (epoch, number)}
        return self._read[epoch, number].result()

    def _load(self, groups: list[int]) -> _Window:
        starts, rows = self._index.group_starts, [load(self._table, self._index.groups[g], COLUMNS) for g in groups]
        return _Window(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups]), Sequences(rows))
