"""A small table captured from a small teacher, for tests of training."""

from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softlabel.pipeline.models.files import sha256
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.numberings import random_numbering

VOCABULARY, PADDED = 500, 512
_FILES = ("config.json", "model.safetensors")
SELECTION = Selection(top_p=0.9, min_k=1, max_k=8, draws=8, temperatures=(1.0,), seed=0)


def make_table(folder: Path, teacher: Path, train: int = 40, held_out: int = 6, tokenizer: Path | None = None) -> Table:
    """Sequences of 8 to 40 random ids, all but the first captured, with the teacher's soft labels.

    The tokenizer's files are the teacher's, or those in the given folder.
    """
    if tokenizer is None:
        tokenizer = folder.with_name(f"{folder.name}-tokenizer")
        AutoTokenizer.from_pretrained(teacher).save_pretrained(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    identity = Identity(
        teacher=TeacherIdentity(files={file: sha256(teacher / file) for file in _FILES}, dtype="float32"),
        tokenizer=TokenizerIdentity(files="0", chat_template=None, chat_template_date=date(2026, 1, 1)),
        vocabulary=VOCABULARY,
        padded_vocabulary=PADDED,
        selection=SelectionIdentity(top_p=0.9, min_k=1, max_k=8, draws=8, seed=0),
        temperatures=(1.0,),
        sequences=SequencesIdentity(max_tokens=40, context=1, mask="all", eval_fraction=0.1),
    )
    parts = [_labels(model, number) for number in range(train + held_out)]
    table = Table.create(str(folder), identity, pa.schema([]), random_numbering(VOCABULARY), tokenizer)
    if train:
        add(table, parts[:train], range(train), "train", teacher)
    if held_out:
        add(table.newest(), parts[train:], range(train, train + held_out), "eval", teacher)
    return table.newest()


def add(table: Table, parts: list[SoftLabels], numbers: range, split: str, teacher: Path) -> None:
    with ShardWriter(table, row_group=8) as writer:
        writer.append(
            pa.Table.from_pylist([_row(number, split) for number in numbers], SEQUENCE), SoftLabels.concatenate(parts)
        )
        writer.commit({"operation": "capture", "teacher": str(teacher)})


def _ids(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    return generator.integers(0, VOCABULARY, generator.integers(8, 41))


def _row(number: int, split: str) -> dict[str, object]:
    ids = _ids(number)
    return {
        "key": f"{number:016}".encode(),
        "document_id": str(number),
        "chunk": 0,
        "chunks": 1,
        "fingerprint": f"{number:016}".encode(),
        "label": None,
        "split": split,
        "token_ids": ids.tolist(),
        "loss_mask": [False] + [True] * (len(ids) - 1),
        "tokens": len(ids),
        "positions": len(ids) - 1,
    }


@torch.no_grad()
def _labels(model: torch.nn.Module, number: int) -> SoftLabels:
    ids = torch.from_numpy(_ids(number))
    seeds = torch.arange(len(ids) - 1) + 1000 * number
    return select(model(ids[None]).logits[0, :-1], ids[1:], seeds, SELECTION, VOCABULARY)
