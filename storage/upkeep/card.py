"""The card of a table or an export: a README.md as the Hugging Face hub shows it, so that a folder explains itself.

Names come from users and may contain anything: they are quoted in YAML, and every sign that means something in Markdown
or HTML is written as a character reference. A card names no folder of the machine that wrote it.

A table's card names the version that it describes. What a user writes into it, such as the licence, stays: only the
part between two marks is written again, and a README.md without the marks is not softlabel's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import yaml

from softlabel.storage.errors import SoftlabelError, TableError, printable
from softlabel.storage.identity import Identity, SelectionIdentity
from softlabel.storage.log.commit_message import CommitMessage
from softlabel.storage.places.place import reading
from softlabel.storage.records.versions import parse
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture

FILE = "README.md"
_BEGIN = "<!-- softlabel writes this part again with each new version; write above or below it -->"
_END = "<!-- end of the part that softlabel writes -->"
_PLAIN = " .,:;-/%()'+=@"
"""Signs that mean nothing to Markdown within a line."""
_TAGS = ("softlabel", "knowledge-distillation")
_MASKS = {
    "text": "every token that can be predicted",
    "completion": "what follows the prompt",
    "assistant": "every answer of the assistant",
    "last_assistant": "the last answer of the assistant",
}


@contextmanager
def keeping_card(location: str) -> Iterator[None]:
    """Write the table's card at the end if there is a newer version then, also if the block fails after some commits.

    Everything that commits to a table does so in such a block.

    Raises:
        TableError: if the card can't be written.
    """
    location = parse(location)[0]
    before = _version(location)
    try:
        yield
    except BaseException:
        with suppress(SoftlabelError):  # what stopped the block is what matters
            if _version(location) != before:
                update_card(location)
        raise
    if _version(location) != before:
        update_card(location)


def _version(location: str) -> int | None:
    return Table.open(location).version if Table.exists(location) else None


def update_card(location: str) -> None:
    """Write the card of a table's newest version; a README.md that is someone else's stays as it is.

    Raises:
        TableError: if it can't be written.
    """
    source = Table.open(location)
    where = source.place.where(FILE)
    try:
        with reading(where):
            known = source.place.read(FILE).decode()
    except FileNotFoundError:
        known = f"{heading('unknown', (), viewer=False)}\n{_BEGIN}\n{_END}\n"
    except (OSError, UnicodeDecodeError):
        return  # a folder, a link, or no text
    before, begin, rest = known.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    text = f"{before}{_BEGIN}\n\n{_of_table(source)}\n{_END}{after}"
    if not (begin and end) or text == known:
        return
    try:
        source.place.write(FILE, text.encode())
    except OSError as error:
        raise TableError(
            "the table's card can't be written; its rows are not affected",
            expected="write permission for the folder, and free disk space",
            found=error,
            where=where,
            do="check the permissions and the free disk space; softlabel maintain then writes the card",
        ) from error


def _of_table(source: Table) -> str:
    sizes: dict[str, list[int]] = {}
    for shard in source.shards():
        size = sizes.setdefault(shard.split, [0, 0])
        size[0] += shard.rows
        size[1] += shard.bytes
    rows = [[split, *(f"{number:,}" for number in sizes[split])] for split in sorted(sizes, reverse=True)]
    return "\n".join(
        [
            f"# Soft labels of {plain(named(source.location))}\n",
            "What a model, the teacher, predicted at each position of many documents, for distilling other models from"
            f" it. This is a softlabel table; the card describes its version {source.version}.\n",
            table(["split", "sequences", "bytes"], rows),
            "## Where it comes from\n",
            provenance([source]),
            "## How to read it\n",
            "It is a Delta Lake table of Parquet files: list them with a Delta library, never by folder, because old"
            " versions keep theirs. With softlabel:\n",
            "```\nsoftlabel inspect FOLDER\nsoftlabel show FOLDER\nsoftlabel export FOLDER NEW --format parquet\n```\n",
        ]
    )


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML at the head of a card."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False)}---\n"


def heading(license: str, configs: Sequence[Mapping[str, Any]], **more: Any) -> str:
    """The front matter of a data set with soft labels."""
    values: dict[str, Any] = {"license": license, "tags": list(_TAGS), **more}
    return front_matter(values | ({"configs": list(configs)} if configs else {}))


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(each if each.isalnum() or each in _PLAIN else f"&#{ord(each)};" for each in printable(text))


def code(text: str) -> str:
    """Text that Markdown shows as code."""
    return f"`{text}`" if re.fullmatch(r"[\w.@/-]+", text, re.ASCII) else f"<code>{plain(text)}</code>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def definitions(terms: Mapping[str, str]) -> str:
    """A list of terms with their meaning, as Markdown."""
    return "\n".join(f"- {code(name)}: {plain(text)}" for name, text in terms.items()) + "\n"


def provenance(tables: Sequence[Table]) -> str:
    """Which teacher read what, and what was kept, for each table; as Markdown."""
    return "\n".join("\n".join(f"- {line}" for line in _provenance(each)) + "\n" for each in tables)


def named(location: str) -> str:
    """The name of a table or a view, without its folder."""
    return PurePath(location).name


def _provenance(source: Table) -> Iterator[str]:
    identity, capture = source.identity, last_capture(source)
    yield f"Table: {code(f'{named(source.location)}@{source.version}')}; content {code(source.content)}"
    yield _teacher(identity, capture)
    if identity.classes:
        yield f"Classes: {', '.join(map(code, identity.classes))}"
    else:
        temperatures = ", ".join(f"{temperature:g}" for temperature in identity.temperatures)
        yield f"Kept of each distribution: {_selection(identity.selection)}; temperatures {temperatures}"
    if identity.derived_from is not None:
        yield f"Reduced from a larger table, without the teacher, which kept: {_selection(identity.derived_from)}"
    sequences = identity.sequences
    captured = plain(_MASKS.get(sequences.mask, sequences.mask))
    yield f"Sequences of at most {sequences.max_tokens:,} tokens, of one document each. Captured: {captured}"
    yield f"Split: {sequences.eval_fraction:.1%} of the documents are in eval, by a hash of their ids"
    yield f"Tokenizer: {identity.vocabulary:,} ids; SHA-256 of its files {code(identity.tokenizer.files)}"


def _teacher(identity: Identity, capture: CommitMessage) -> str:
    if not identity.teacher.files:
        return "Teacher: none; each row has the document's own label"
    # A folder's path says something about a machine, and nothing about the teacher.
    name = capture.teacher or "unknown"
    shown = PurePath(name).name if PurePath(name).is_absolute() or name.startswith((".", "~")) else name
    size = f", {capture.parameters:,} parameters" if capture.parameters else ""
    revision = f", revision {code(capture.revision)}" if capture.revision else ""
    files = ", ".join(f"{code(file)} {digest[:16]}…" for file, digest in sorted(identity.teacher.files.items())[:4])
    return f"Teacher: {code(shown)}{revision}, in {plain(identity.teacher.dtype)}{size}; SHA-256 of its files: {files}"


def _selection(selection: SelectionIdentity) -> str:
    head = f"the likeliest {selection.min_k} to {selection.max_k} ids, until they have {selection.top_p:.4g}"
    tail = f"{selection.draws} draws from the others" if selection.draws else "nothing of the others"
    return f"{head} of the probability; {tail}"


def made_by() -> str:
    """What wrote the card."""
    return f"softlabel {version('softlabel')}"
