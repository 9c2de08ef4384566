"""Small tables, and soft labels computed in a slow but simple way from whole distributions in float64."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.places.place import WRITING
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter
from tests.numberings import random_numbering

PROCESSES = multiprocessing.get_context("forkserver")
"""Real processes, which start quickly because their imports are preloaded."""
PROCESSES.set_forkserver_preload(["tests.storage.preloaded"])


def process(target: Callable[..., object], *args: object) -> multiprocessing.process.BaseProcess:
    """A process with the current environment variables for buckets."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return PROCESSES.Process(target=_run, args=(environment, target, *args))


def _run(environment: Mapping[str, str], target: Callable[..., object], *args: object) -> None:
    os.environ |= environment
    target(*args)


VOCABULARY = 300
CARRIED = pa.schema([("source", pa.string()), ("year", pa.int64())])


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_mass(logprobs: NDArray[np.float64]) -> float:
    return float(np.logaddexp.reduce(logprobs)) if len(logprobs) else -np.inf


def soft_labels(
    logits: NDArray[np.float64],
    head_counts: Sequence[int],
    draws: int,
    temperatures: Sequence[float],
    rng: np.random.Generator,
) -> SoftLabels:
    """Soft labels of (P, V) float64 logits, with the given head counts and number of draws from the tail."""
    P, V = logits.shape
    heads, tails, masses = [], [], np.zeros((len(temperatures), P))
    logprobs = log_softmax(logits)
    for i, k in enumerate(head_counts):
        order = np.lexsort((np.arange(V), -logits[i]))
        head, rest = order[:k], order[k:]
        heads.append(head)
        for t, T in enumerate(temperatures):
            masses[t, i] = min(0.0, log_mass(log_softmax(logits[i] / T)[rest])) if k else 0.0
        shares = np.exp(logprobs[i, rest] - logprobs[i, rest].max(initial=-1e300))
        times = rng.multinomial(draws, shares / shares.sum()) if draws and shares.sum() else np.zeros(len(rest), int)
        tails.append((rest[times > 0], times[times > 0]))

    def flat(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
        return np.concatenate([np.zeros(0), *parts]).astype(dtype)

    return SoftLabels(
        head_counts=np.array([len(head) for head in heads], np.int32),
        head_ids=flat(heads, np.int32),
        head_logprobs=flat([logprobs[i, head] for i, head in enumerate(heads)], np.float32),
        tail_counts=np.array([len(ids) for ids, _ in tails], np.int32),
        tail_ids=flat([ids for ids, _ in tails], np.int32),
        tail_draws=flat([times for _, times in tails], np.int32),
        tail_logprobs=flat([logprobs[i, ids] for i, (ids, _) in enumerate(tails)], np.float32),
        tail_log_masses=masses.astype(np.float32),
        entropies=-(np.exp(logprobs) * np.maximum(logprobs, -1e300)).sum(1).astype(np.float32),
        next_logprobs=logprobs[np.arange(P), rng.integers(0, V, P)].astype(np.float32),
    )


def random_labels(positions: int, seed: int = 0, vocabulary: int = VOCABULARY, temperatures: int = 1) -> SoftLabels:
    """Plausible soft labels: some ids likelier than others everywhere, heads of 1 to 8 ids, up to 6 draws."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(positions, vocabulary)) * 2 - 0.5 * np.log1p(np.arange(vocabulary))
    return soft_labels(logits, rng.integers(1, 9, positions).tolist(), 6, (1.0, 2.0, 4.0)[:temperatures], rng)


def sequences(names: Sequence[str], positions: Sequence[int], split: str | None = None) -> pa.Table:
    """One sequence for each document name, the last of its tokens captured; names decide everything but the length."""
    rows = []
    for name, count in zip(names, positions, strict=True):
        key = blake2b(name.encode(), digest_size=16).digest()
        ids = [byte + 1 for byte in blake2b(key, digest_size=64).digest()] * (count // 64 + 1)
        rows.append(
            {
                "key": key,
                "document_id": name,
                "chunk": 0,
                "chunks": 1,
                "fingerprint": key[::-1],
                "label": None,
                "split": split or ("eval" if key[0] < 64 else "train"),
                "token_ids": ids[: count + 1],
                "loss_mask": [False] + [True] * count,
                "tokens": count + 1,
                "positions": count,
                "source": name[:1],
                "year": 2000 + key[1],
            }
        )
    return pa.Table.from_pylist(rows, pa.schema([*SEQUENCE, *CARRIED]))


def rows(names: Sequence[str], split: str | None = None, temperatures: int = 1) -> tuple[pa.Table, SoftLabels]:
    """Sequences and their soft labels; those of a name do not depend on the other names."""
    seeds = [int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little") for name in names]
    counts = [3 + seed % 10 for seed in seeds]
    labels = [random_labels(n, seed, temperatures=temperatures) for n, seed in zip(counts, seeds, strict=True)]
    return sequences(names, counts, split), SoftLabels.concatenate(labels)


def identity(temperatures: tuple[float, ...] = (1.0,), **changes: Any) -> Identity:
    made = Identity(
        teacher=TeacherIdentity(files={"config.json": "c0", "model.safetensors": "a1"}, dtype="bfloat16"),
        tokenizer=TokenizerIdentity(files="f3", chat_template=None, chat_template_date=date(2026, 1, 1)),
        vocabulary=VOCABULARY,
        padded_vocabulary=VOCABULARY + 20,
        selection=SelectionIdentity(top_p=0.95, min_k=1, max_k=8, draws=6, seed=0),
        temperatures=temperatures,
        sequences=SequencesIdentity(max_tokens=1024, context=1, mask="all", eval_fraction=0.25),
    )
    return made.model_copy(update=changes)


def make_table(location: Path | str, identity: Identity, seed: int = 0) -> Table:
    """An empty table; the seed is for its numbering of token ids."""
    with tempfile.TemporaryDirectory() as tokenizer:
        Path(tokenizer, "tokenizer.json").write_text("{}")
        Path(tokenizer, "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        numbering = random_numbering(identity.vocabulary, seed)
        return Table.create(str(location), identity, CARRIED, numbering, Path(tokenizer))


def add(table: Table, names: Sequence[str], split: str | None = None) -> Commit:
    """Write rows of these names and commit them."""
    with ShardWriter(table, row_group=16) as writer:
        writer.append(*rows(names, split, len(table.temperatures)))
        return writer.commit({"operation": "capture", "circumstances": {"user": "test"}})


def names_in(table: Table) -> list[str]:
    """Document ids of a version, read by ``storage.reader``, which checks every byte."""
    found = [read(table, shard, ["document_id"]).column("document_id").to_pylist() for shard in table.shards()]
    return sorted(name for names in found for name in names)


def leftovers(table: Table) -> list[str]:
    """Files of unfinished shards."""
    return sorted(file.name for file in table.place.files(WRITING))
