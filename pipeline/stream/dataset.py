"""The stream of a student's training rows: reads a table or a view and yields one rank's batches, from any step on.

Which sequences come when, and which share a row, is ``pipeline.stream.epoch_plan``'s plan; how they are laid out is
``pipeline.stream.batch``'s. This file reads what the plan names, a window ahead. It never decodes soft labels
(``pipeline.loss.targets``, on the device) and knows no model and no loss.
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
from softlabel.pipeline.stream.epoch_plan import Cursor, Ints, Plan, accumulation, occurrences, plan_epoch, share
from softlabel.storage.errors import UsageError
from softlabel.storage.views.row_groups import Group, load, outlines
from softlabel.storage.views.view import AnyTable, View

WINDOW_TOKENS = 1 << 20
"""Sequences are mixed and packed among so many tokens. It is part of the order: a run that goes on after a change of
it would see some sequences twice."""


class SoftLabelDataset(IterableDataset[Batch]):
    """One rank's share of a table's training rows, from a cursor on.

    Every sequence comes exactly once an epoch (from a view with weights, as often as ``epoch_plan.occurrences`` says),
    over any number of ranks and DataLoader workers, in an order that the table's version, ``stream.seed`` and the epoch
    alone decide; ``epoch_plan.plan_epoch`` says what shuffling does. A pack is what a training row holds:
    as many sequences as have room or, without ``stream.packing``, a single one. An optimizer step takes the plan's
    next ``stream.batch_size`` packs (fewer at an epoch's end) and deals them out to the ranks one by one; each rank
    yields ``accumulation`` batches a step, of ``stream.micro_batch_size`` rows at most. A rank that has no pack left
    for a batch yields one row of padding without captured positions, so that all ranks make equally many passes.

    Workers, as in ``DataLoader(dataset, batch_size=None, num_workers=n)``, take batches in turn, which is how the
    DataLoader asks for them: their number changes nothing but the speed. Where a table is in a bucket, they need
    ``multiprocessing_context="forkserver"``, since no connection lives through a fork. Each worker of each rank reads
    every window of the plan, a window ahead of its use: two are in its memory, the next one twice for a moment.

    Args:
        table: the version, or the view, to read.
        stream: packing, length of a row, batch sizes and seed.
        split: train or eval.
        shuffle: False for the table's own order.
        rank: which of the ranks this is.
        world_size: how many ranks share the packs.
        start: where to begin: what ``state`` said of the run that is resumed.
        epochs: passes over the split, those before ``start`` included.
        max_steps: optimizer steps instead, those before ``start`` included.

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
        self._plans: dict[int, Plan] = {}
        self._packs: dict[int, int] = {}
        self.total_steps = self._steps_of(epochs) if max_steps is None else max_steps
        """Optimizer steps of the whole run, those before ``start`` included."""
        self._require_steps(epochs)

    @property
    def accumulation(self) -> int:
        """Batches that each rank yields an optimizer step."""
        return accumulation(self._stream.batch_size, self._world_size, self._stream.micro_batch_size)

    def state(self, step: int) -> Cursor:
        """Where a run is that has done so many optimizer steps, those before ``start`` included.

        It follows from the steps that were trained on alone, so that batches read ahead are never lost.
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
        """Steps done before the start, and those from there until so many epochs have passed."""
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

    def _plan(self, epoch: int) -> Plan:
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
    plan: Plan
    first: int
    last: int


@dataclass(frozen=True)
class _Index:
    """What is known of all sequences of a split up front: the small columns, and where the row groups are."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    weights: NDArray[np.float64] | None
    """How often each comes in an epoch; None for once each."""
    group_starts: Ints
    """(row groups + 1,) the first sequence of each, and the number of sequences."""
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
    """Of their sequences, ascending."""
    sequences: Sequences

    def pack(self, plan: Plan, number: int) -> Pack:
        """One of the window's packs."""
        return Pack(self.sequences, np.searchsorted(self.numbers, plan.members(number, number + 1)))


class _Windows:
    """The row groups of the window in use, and in the background those of the next one."""

    def __init__(self, table: AnyTable, index: _Index) -> None:
        self._table = table
        self._index = index
        self._read: dict[tuple[int, int], Future[_Window]] = {}
        self._pool = ThreadPoolExecutor(1, "softlabel-window")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(self, epoch: int, plan: Plan, number: int) -> _Window:
        """A window. They are asked for in the plan's order: older ones are let go."""
        for wanted in range(number, min(number + 2, plan.windows)):
            if (epoch, wanted) not in self._read:
                groups = np.unique(self._index.group_of(plan.window(wanted))).tolist()
                self._read[epoch, wanted] = self._pool.submit(self._load, groups)
        self._read = {key: future for key, future in self._read.items() if key >= (epoch, number)}
        return self._read[epoch, number].result()

    def _load(self, groups: list[int]) -> _Window:
        starts, rows = self._index.group_starts, [load(self._table, self._index.groups[g], COLUMNS) for g in groups]
        return _Window(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups]), Sequences(rows))
