"""Recheck: run the teacher again over a random sample of a table's sequences, and compare the table with it.

A teacher's logits depend a little on the batch that a sequence is in. So the teacher runs twice, with different
batches, and the table may differ from it by about as much as the two runs differ from each other, plus the rounding of
the table's codes. The decision rests on means over whole sequences, because single positions vary too much. Nothing is
written. Whether the table's bytes are intact is checked by ``verify``, not here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch

from softlabel.pipeline.cards import holding
from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.devices import occupied
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.selection.fidelity import bucket_kl, kept_mass
from softlabel.pipeline.tables.accounts import Answers, Doubles, Indices, SampledSequences
from softlabel.pipeline.teachers.kind import kind_of
from softlabel.pipeline.teachers.load import load_teacher
from softlabel.storage.codec import CODES_PER_NAT, ENTROPY_CODES_PER_NAT
from softlabel.storage.errors import DisagreementError, ProvenanceError, TeacherError, UsageError
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import open_shard, read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table

_COLUMNS = ("key", "document_id", "chunk", "label", "token_ids", "loss_mask", *SOFT_LABELS.names)
_SECOND_RUN_GROUP = 3
"""Sequences per batch of the second run, whatever their lengths: shapes and padding then differ from the first run."""
_NOISE_FACTOR = 3.0
"""A sequence may differ by this many times the largest difference between the teacher's two runs."""
_ALLOWED_STEPS = 8.0
"""Difference that is always allowed, in steps of the teacher's number format at 1: other machines compute otherwise."""
_SHOWN = 5

_ROUNDING = {
    "log-probabilities": 1 / CODES_PER_NAT,
    "log-probabilities outside the head": 1e-4,
    "entropies": 1 / ENTROPY_CODES_PER_NAT,
    "log-probabilities of the next tokens": 1e-3,
}
"""How far rounding may move the stored values, in nats, for each field of ``Answers`` in order."""
_DERIVED_ROUNDING = {"log-probabilities": 2 / CODES_PER_NAT, "log-probabilities outside the head": 1 / CODES_PER_NAT}
"""The same in a table that was derived from a larger one: its masses are sums of rounded probabilities."""


@dataclass(frozen=True)
class Difference:
    """Summary of the absolute differences between two sets of values, in nats."""

    mean: float
    most: float
    """The 99.9th percentile."""
    maximum: float

    @classmethod
    def of(cls, values: Doubles) -> Self:
        """Summarize absolute differences."""
        return cls(float(values.mean()), float(np.quantile(values, 0.999)), float(values.max()))


@dataclass(frozen=True)
class Agreement:
    """How well table and teacher agree on one kind of value, such as the log-probabilities of the stored ids."""

    name: str
    noise: Difference
    """Between the teacher's two runs."""
    table: Difference
    """Between the table and the teacher."""
    allowed: float
    """Largest mean difference that a sequence may have."""


@dataclass(frozen=True)
class Disagreement:
    """A sequence on which the table and the teacher differ by more than is allowed."""

    document: str
    chunk: int
    position: int
    """Token with the largest difference, counted from 0."""
    name: str
    """The kind of value that differs, as in ``Agreement``."""
    mean: float
    allowed: float


@dataclass(frozen=True)
class Recheck:
    """Result of comparing a table with its teacher."""

    table: str
    version: int
    sequences: int
    positions: int
    agreements: tuple[Agreement, ...]
    top_changes: float
    """Share of the positions at which the teacher's two runs have different likeliest ids."""
    outside: float
    """Mean probability outside the head."""
    lost: float
    """Mean KL divergence, in nats, from the teacher's distribution to the head with the remaining mass spread evenly.
    A sampled tail is unbiased and does not lose this."""
    disagreements: tuple[Disagreement, ...]
    """Worst first."""


def recheck(table: Table, config: TeacherConfig, sequences: int, seed: int = 0, watch: Watch = unwatched) -> Recheck:
    """Run a table's teacher again over a sample, and compare.

    Args:
        table: version to check.
        config: the teacher.
        sequences: size of the sample.
        seed: of the sample; another seed picks other sequences.
        watch: called after each batch.

    Raises:
        ProvenanceError: if another teacher made the table.
        UsageError: if the table was made from the documents' own labels, or is empty.
        IntegrityError: if a shard of the sample is damaged.
        TeacherError: if the teacher can't be loaded, or its logits are not a distribution.
    """
    if config.labels:
        raise UsageError(
            "teacher.labels runs no model, so there is nothing to compare the table with",
            found=f"teacher.labels: {' '.join(config.labels)}",
            do="leave out teacher.labels; if the table holds the documents' own labels, leave out all teacher settings",
        )
    needed = ("entropies", "tail_log_masses", "next_logprobs")
    table.identity.require_known(needed, table.location, "a comparison with its teacher", "leave out the teacher")
    checkpoint = Checkpoint.find(config)
    _require_teacher(table, checkpoint)
    rows = _sample(table, sequences, seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    small_groups = [order[start : start + _SECOND_RUN_GROUP] for start in range(0, len(rows), _SECOND_RUN_GROUP)]
    with holding(occupied(config)):
        teacher = load_teacher(config, checkpoint)
        sampled = SampledSequences(table, rows, teacher)
        first = _run_teacher(sampled, [order], config.batch_tokens, "recheck", watch)
        second = _run_teacher(sampled, small_groups, config.batch_tokens, "second run", watch)
    _require_distributions(rows, first, second)
    noise = [first[i].differences(second[i]) for i in range(len(rows))]
    differences = [sampled.stored_answers(i).differences(first[i]) for i in range(len(rows))]
    rounding = _ROUNDING | (_DERIVED_ROUNDING if table.identity.derived_from else {})
    floor = _ALLOWED_STEPS * torch.finfo(getattr(torch, config.dtype)).eps
    agreements = []
    for field, name in enumerate(_ROUNDING):
        largest_noise = max(_mean(values[field]) for values in noise)
        allowed = rounding[name] + floor + _NOISE_FACTOR * largest_noise
        between_runs, from_table = (
            Difference.of(np.concatenate([fields[field] for fields in each])) for each in (noise, differences)
        )
        agreements.append(Agreement(name, between_runs, from_table, allowed))
    changes = np.concatenate([first[i].top != second[i].top for i in range(len(rows))])
    return Recheck(
        table=table.location,
        version=table.version,
        sequences=len(rows),
        positions=sampled.labels.positions,
        agreements=tuple(agreements),
        top_changes=float(changes.mean()),
        outside=1 - float(kept_mass(sampled.labels).mean()),
        lost=float(bucket_kl(sampled.labels, teacher.vocabulary).mean()),
        disagreements=tuple(_disagreements(sampled, rows, differences, agreements)),
    )


def disagreement(found: Recheck) -> DisagreementError:
    """The error that lists the disagreements, one per line."""
    lines = [
        f"document {d.document}, chunk {d.chunk}: {d.name} differ by {d.mean:.3f} nats on average"
        f" (allowed: {d.allowed:.3f}), most at token {d.position}"
        for d in found.disagreements
    ]
    more = [f"... and {len(lines) - _SHOWN} more; --json lists them all"] if len(lines) > _SHOWN else []
    noise = ", ".join(f"{agreement.name} {agreement.noise.mean:.3f}" for agreement in found.agreements)
    return DisagreementError(
        f"the table disagrees with its teacher on {len(found.disagreements)} of {found.sequences} sequences",
        expected=f"differences about as small as those between two runs of the teacher (mean, in nats): {noise}",
        found="\n               ".join(lines[:_SHOWN] + more),
        where=f"{found.table}@{found.version}",
        do="do not train on this table; check that the teacher runs as it did in the capture, and capture a new table",
        details=found,
    )


def _run_teacher(
    sampled: SampledSequences, groups: Iterable[Indices], batch_tokens: int, stage: str, watch: Watch
) -> dict[int, Answers]:
    """Run the teacher over every sequence, in these groups, and return its answers by sequence number."""
    answers: dict[int, Answers] = {}
    for group in groups:
        for batch_answers in sampled.teacher_answers(group, batch_tokens):
            answers |= batch_answers
            done = int(sampled.tokens[list(answers)].sum())
            watch(Progress(stage, done, int(sampled.tokens.sum()), "tokens"))
    return answers


def _require_distributions(rows: pa.Table, *runs: dict[int, Answers]) -> None:
    """Refuse a teacher whose logits are not a distribution in any run: with NaN as noise, every table would pass."""
    found = sorted({i for run in runs for i, answers in run.items() if np.isnan(answers.entropies).any()})
    if found:
        names = rows.column("document_id").take(pa.array(found)).unique().to_pylist()
        raise TeacherError(
            "the teacher's logits do not give a probability distribution, so the table can't be compared with them",
            expected="logits that are finite, or -inf for an id of probability 0",
            found=f"NaN, +inf, or only -inf, in {len(found)} of {len(rows)} sequences",
            where=f"document {', '.join(names[:_SHOWN])}",
            do="check that the teacher runs on this machine: try another teacher.device or attn_implementation",
        )


def _disagreements(
    sampled: SampledSequences, rows: pa.Table, differences: list[list[Doubles]], agreements: list[Agreement]
) -> list[Disagreement]:
    """The sequences that differ by more than is allowed, each with its worst kind of value."""
    found: list[tuple[float, Disagreement]] = []
    for i, fields in enumerate(differences):
        excess = [_mean(values) / agreement.allowed for values, agreement in zip(fields, agreements, strict=True)]
        worst = int(np.argmax(excess))
        if excess[worst] <= 1:
            continue
        agreement, values = agreements[worst], fields[worst]
        document, chunk = rows.column("document_id")[i].as_py(), rows.column("chunk")[i].as_py()
        position = int(sampled.token_indices(i)[worst][np.argmax(values)])
        item = Disagreement(document, chunk, position, agreement.name, _mean(values), agreement.allowed)
        found.append((excess[worst], item))
    return [item for _, item in sorted(found, key=lambda pair: -pair[0])]


def _mean(values: Doubles) -> float:
    """Mean of a sequence's differences; infinite if one of them is NaN."""
    mean = float(values.mean()) if len(values) else 0.0
    return np.inf if np.isnan(mean) else mean


def _sample(table: Table, sequences: int, seed: int) -> pa.Table:
    """Rows drawn at random from the whole version, in the table's order."""
    shards = table.shards()
    ends = np.cumsum([shard.rows for shard in shards])
    if not len(ends) or not ends[-1]:
        raise UsageError("the table has no rows to compare with its teacher", where=table.location)
    chosen = np.sort(np.random.default_rng(seed).choice(ends[-1], min(sequences, int(ends[-1])), replace=False))
    parts = []
    for shard, end in zip(shards, ends, strict=True):
        in_shard = chosen[(chosen >= end - shard.rows) & (chosen < end)] - (end - shard.rows)
        if len(in_shard):
            parts.append(_rows(table, shard, in_shard))
    return pa.concat_tables(parts)


def _rows(table: Table, shard: Shard, wanted: Indices) -> pa.Table:
    """Rows of a shard by their numbers; reads only the row groups that hold them."""
    with open_shard(table, shard) as file:
        metadata = file.metadata
    sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    groups = np.unique(np.searchsorted(np.cumsum(sizes), wanted, side="right"))
    numbers = np.concatenate([np.arange(sizes[group]) + sizes[:group].sum() for group in groups])
    return read(table, shard, _COLUMNS, groups.tolist()).take(pa.array(np.searchsorted(numbers, wanted)))


def _require_teacher(table: Table, checkpoint: Checkpoint) -> None:
    """Refuse a teacher that did not make the table, before the model is loaded."""
    expected = table.identity
    given = expected.model_copy(
        update={
            "teacher": checkpoint.identity,
            "vocabulary": kind_of(checkpoint.classes).vocabulary(checkpoint),
            "padded_vocabulary": checkpoint.padded_vocabulary,
            "classes": checkpoint.classes,
        }
    )
    differences = expected.differences(given)
    if differences:
        lines = [f"{name}: the table has {a}, this teacher {b}" for name, (a, b) in differences.items()]
        raise ProvenanceError(
            "this is not the teacher that made the table",
            expected="a teacher with the same files and dtype",
            found="\n               ".join(lines),
            where=checkpoint.folder,
            do="set teacher.model and teacher.dtype to the teacher that softlabel inspect shows",
        )
