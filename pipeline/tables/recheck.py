"""Recheck: run the teacher again over a random sample of a table's sequences, and see whether it says the same.

A teacher does not quite say the same twice: what it says of a sequence depends a little on the batch that this stands
in. So it is asked twice, in other batches each time, and the table may differ from it by what it differs from itself,
and by the rounding of its codes. The decision is on means over whole sequences, which are calm where single positions
are not. Nothing is written; whether the bytes are those that were written is for ``verify``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.selection.fidelity import bucket_kl, kept_mass
from softlabel.pipeline.tables.accounts import Account, Doubles, Indices, Sequences
from softlabel.pipeline.teachers.classifier import LabelTeacher
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.storage.codec import CODES_PER_NAT, ENTROPY_CODES_PER_NAT
from softlabel.storage.errors import DisagreementError, ProvenanceError, TeacherError, UsageError
from softlabel.storage.reader import open_shard, read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.state import Shard
from softlabel.storage.table import Table

_COLUMNS = ("key", "document_id", "chunk", "label", "token_ids", "loss_mask", *SOFT_LABELS.names)
_TOGETHER = 3
"""Sequences of a batch the second time, whatever their lengths: other shapes and another padding than the first."""
_NOISE = 3.0
"""A sequence may be off by so many times what the teacher is off from itself, where that is most."""
_STEPS = 8.0
"""Steps of the teacher's number format around 1 that are always allowed: another machine has a noise of its own."""
_SHOWN = 5

_ROUNDING = {
    "log-probabilities": 1 / CODES_PER_NAT,
    "tail masses": 1e-4,
    "entropies": 1 / ENTROPY_CODES_PER_NAT,
    "next tokens": 1e-3,
}
"""How far from what was said the stored values may be, in nats, by the fields of an ``Account``."""
_DERIVED = {"log-probabilities": 2 / CODES_PER_NAT, "tail masses": 1 / CODES_PER_NAT}
"""The same in a table that was derived from a larger one: its masses are sums of rounded probabilities."""


@dataclass(frozen=True)
class Difference:
    """How far apart two accounts of the same values are, in nats."""

    mean: float
    most: float
    """Of all but 0.1 % of the values."""
    maximum: float

    @classmethod
    def of(cls, values: Doubles) -> Self:
        """Measure absolute differences."""
        return cls(float(values.mean()), float(np.quantile(values, 0.999)), float(values.max()))


@dataclass(frozen=True)
class Agreement:
    """On one of the things that the table says, such as the log-probabilities of the ids that it keeps."""

    name: str
    noise: Difference
    """Between the teacher and itself, in other batches."""
    table: Difference
    """Between the table and the teacher."""
    allowed: float
    """Mean difference that a sequence may have."""


@dataclass(frozen=True)
class Disagreement:
    """A sequence of which the teacher says something else now."""

    document: str
    chunk: int
    position: int
    """Where the difference is the largest: a token of the sequence, from 0."""
    name: str
    """What differs."""
    mean: float
    allowed: float


@dataclass(frozen=True)
class Recheck:
    """What came of asking the teacher again."""

    table: str
    version: int
    sequences: int
    positions: int
    agreements: tuple[Agreement, ...]
    top_changes: float
    """Share of the positions whose likeliest id is another one in another batch, by the teacher alone."""
    outside: float
    """What truncation loses: probability outside the head, on average ..."""
    lost: float
    """... and KL in nats from the teacher's distribution to the head with the tail's mass spread evenly. A sampled
    tail, which is unbiased, does not lose that."""
    disagreements: tuple[Disagreement, ...]
    """The worst first."""


def recheck(table: Table, config: TeacherConfig, sequences: int, seed: int = 0, watch: Watch = unwatched) -> Recheck:
    """Ask a table's teacher again.

    Args:
        table: the version.
        config: where its teacher is.
        sequences: size of the sample.
        seed: of the sample; another one looks at other sequences.
        watch: told of each batch.

    Raises:
        ProvenanceError: if another teacher made the table.
        UsageError: if no teacher did, but the documents' own labels; or the table is empty.
        IntegrityError: if a shard of the sample is damaged.
        TeacherError: if the teacher can't be loaded, or says what no distribution is.
    """
    if config.labels:
        raise UsageError(
            "a table of the documents' own labels can't be compared with a teacher: there is none",
            found="teacher.labels",
            do="leave out all teacher settings",
        )
    _require_teacher(table, Checkpoint.find(config))
    rows = _sample(table, sequences, seed)
    teacher = load_teacher(config)
    assert not isinstance(teacher, LabelTeacher)
    asked = Sequences(table, rows, teacher)
    everything = np.random.default_rng(seed).permutation(len(rows))
    others = [everything[start : start + _TOGETHER] for start in range(0, len(rows), _TOGETHER)]
    first = _ask(asked, [everything], config.batch_tokens, "recheck", watch)
    second = _ask(asked, others, config.batch_tokens, "once more", watch)
    _require_distributions(rows, first, second)
    noise = [first[i].apart(second[i]) for i in range(len(rows))]
    apart = [asked.stored(i).apart(first[i]) for i in range(len(rows))]
    rounding = _ROUNDING | (_DERIVED if table.identity.derived_from else {})
    floor = _STEPS * torch.finfo(getattr(torch, config.dtype)).eps
    agreements = []
    for field, name in enumerate(_ROUNDING):
        most = max(_mean(values[field]) for values in noise)
        allowed = rounding[name] + floor + _NOISE * most
        itself, stored = (Difference.of(np.concatenate([v[field] for v in of])) for of in (noise, apart))
        agreements.append(Agreement(name, itself, stored, allowed))
    changes = np.concatenate([first[i].top != second[i].top for i in range(len(rows))])
    return Recheck(
        table=table.location,
        version=table.version,
        sequences=len(rows),
        positions=asked.labels.positions,
        agreements=tuple(agreements),
        top_changes=float(changes.mean()),
        outside=1 - float(kept_mass(asked.labels).mean()),
        lost=float(bucket_kl(asked.labels, teacher.vocabulary).mean()),
        disagreements=tuple(_disagreements(asked, rows, apart, agreements)),
    )


def disagreement(found: Recheck) -> DisagreementError:
    """The error that says what was found, a line each."""
    lines = [
        f"document {d.document}, chunk {d.chunk}: {d.name} differ by {d.mean:.3f} nats on average"
        f" (allowed: {d.allowed:.3f}), most at token {d.position}"
        for d in found.disagreements
    ]
    more = [f"... and {len(lines) - _SHOWN} more; --json lists them all"] if len(lines) > _SHOWN else []
    noise = ", ".join(f"{agreement.name} {agreement.noise.mean:.3f}" for agreement in found.agreements)
    return DisagreementError(
        f"the table disagrees with its teacher on {len(found.disagreements)} of {found.sequences} sequences",
        expected=f"about the differences between two runs of the teacher (nats, on average): {noise}",
        found="\n               ".join(lines[:_SHOWN] + more),
        where=f"{found.table}@{found.version}",
        do="do not train on this table; check that the teacher runs as it did then, and capture a new table",
        details=found,
    )


def _ask(
    asked: Sequences, groups: Iterable[Indices], batch_tokens: int, stage: str, watch: Watch
) -> dict[int, Account]:
    """The teacher's account of every sequence, asked about in these groups."""
    accounts: dict[int, Account] = {}
    for group in groups:
        for found in asked.ask(group, batch_tokens):
            accounts |= found
            done = int(asked.tokens[list(accounts)].sum())
            watch(Progress(stage, done, int(asked.tokens.sum()), "tokens"))
    return accounts


def _require_distributions(rows: pa.Table, *asked: dict[int, Account]) -> None:
    """Refuse a teacher that says what no distribution is, in whichever batch: such noise would excuse any table."""
    found = sorted({i for said in asked for i, account in said.items() if np.isnan(account.entropies).any()})
    if found:
        names = rows.column("document_id").take(pa.array(found)).unique().to_pylist()
        raise TeacherError(
            "the teacher's logits are not a probability distribution, so the table can't be compared with them",
            expected="finite logits (-inf for an id of probability 0)",
            found=f"NaN, +inf, or only -inf, in {len(found)} of {len(rows)} sequences",
            where=f"document {', '.join(names[:_SHOWN])}",
            do="check that the teacher runs on this machine: try another teacher.device or attn_implementation",
        )


def _disagreements(
    asked: Sequences, rows: pa.Table, apart: list[list[Doubles]], agreements: list[Agreement]
) -> list[Disagreement]:
    """The sequences that are further off than they may be, each with what is worst about it."""
    found: list[tuple[float, Disagreement]] = []
    for i, fields in enumerate(apart):
        excess = [_mean(values) / agreement.allowed for values, agreement in zip(fields, agreements, strict=True)]
        worst = int(np.argmax(excess))
        if excess[worst] <= 1:
            continue
        agreement, values = agreements[worst], fields[worst]
        document, chunk = rows.column("document_id")[i].as_py(), rows.column("chunk")[i].as_py()
        position = int(asked.places(i)[worst][np.argmax(values)])
        named = Disagreement(document, chunk, position, agreement.name, _mean(values), agreement.allowed)
        found.append((excess[worst], named))
    return [named for _, named in sorted(found, key=lambda pair: -pair[0])]


def _mean(values: Doubles) -> float:
    """Of a sequence's differences; what is no number is as far off as can be."""
    mean = float(values.mean()) if len(values) else 0.0
    return np.inf if np.isnan(mean) else mean


def _sample(table: Table, sequences: int, seed: int) -> pa.Table:
    """Rows drawn at random from the whole version, in the table's order."""
    shards = table.shards()
    ends = np.cumsum([shard.rows for shard in shards])
    if not len(ends) or not ends[-1]:
        raise UsageError(
            "the table can't be compared with its teacher", found="a table without rows", where=table.location
        )
    chosen = np.sort(np.random.default_rng(seed).choice(ends[-1], min(sequences, int(ends[-1])), replace=False))
    parts = []
    for shard, end in zip(shards, ends, strict=True):
        here = chosen[(chosen >= end - shard.rows) & (chosen < end)] - (end - shard.rows)
        if len(here):
            parts.append(_rows(table, shard, here))
    return pa.concat_tables(parts)


def _rows(table: Table, shard: Shard, wanted: Indices) -> pa.Table:
    """Rows of a shard by their numbers; only their row groups are read."""
    with open_shard(table, shard) as file:
        metadata = file.metadata
    sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    groups = np.unique(np.searchsorted(np.cumsum(sizes), wanted, side="right"))
    numbers = np.concatenate([np.arange(sizes[group]) + sizes[:group].sum() for group in groups])
    return read(table, shard, _COLUMNS, groups.tolist()).take(pa.array(np.searchsorted(numbers, wanted)))


def _require_teacher(table: Table, checkpoint: Checkpoint) -> None:
    """Refuse a teacher that did not make the table, before anything is loaded."""
    mine = table.identity
    given = mine.model_copy(
        update={
            "teacher": checkpoint.identity,
            "vocabulary": checkpoint.vocabulary,
            "padded_vocabulary": checkpoint.padded_vocabulary,
            "classes": checkpoint.classes,
        }
    )
    differences = mine.differences(given)
    if differences:
        lines = [f"{name}: the table has {a}, this teacher {b}" for name, (a, b) in differences.items()]
        raise ProvenanceError(
            "this is not the teacher that made the table",
            expected="a teacher with the same files and dtype",
            found="\n               ".join(lines),
            where=checkpoint.folder,
            do="set teacher.model and teacher.dtype to the teacher that softlabel inspect shows",
        )
