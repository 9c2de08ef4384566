"""The code in FORMAT.md (reference reader, example and recipes) is run, and agrees with the codec."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import softlabel.storage
from softlabel.pipeline.sequences.chunking import split_of
from softlabel.storage.codec import decode, encode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.numbering import Numbering
from softlabel.storage.reader import read
from softlabel.storage.records.versions import tag
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from tests.storage.tables import add, identity, make_table

PAGE = (Path(softlabel.storage.__path__[0]) / "FORMAT.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```\w+ ([\w-]+)\n(.*?)```", PAGE, re.DOTALL))
ENGINES = ("polars", "duckdb", "pandas", "pyarrow")
RECIPES = {"top_ids": "top-ids", "mass": "mass", "histogram": "entropy"}
"""What each recipe defines, and its block's name without the engine."""
VOCABULARY, ROW, DECODED = (json.loads(BLOCKS[name]) for name in ("vocabulary", "row", "decoded"))


def run(*names: str, **given: Any) -> dict[str, Any]:
    """What the named blocks define, one after the other."""
    for name in names:
        exec(compile(BLOCKS[name], f"FORMAT.md, {name}", "exec"), given)
    return given


def recipe(table: Table, engine: str, wanted: str, **given: Any) -> dict[str, list[Any]]:
    """Columns that a recipe makes; the engine's first one imports it for the others."""
    given = {"DOCUMENT": "a0", "POSITION": 0} | given
    blocks = dict.fromkeys(f"{RECIPES[name]}-{engine}" for name in ("top_ids", wanted))
    return pa.table(run("setup", *blocks, TABLE=table.location, **given)[wanted]).to_pydict()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    table = make_table(tmp_path_factory.mktemp("format") / "table", identity(temperatures=(1.0, 2.0)))
    add(table, [f"a{i}" for i in range(30)])
    add(table.newest(), [f"b{i}" for i in range(10)])
    return table.newest()


def decoded_rows(table: Table) -> dict[str, SoftLabels]:
    """Our own reading, by document."""
    rows = [row for shard in table.shards() for row in [read(table, shard)]]
    return {
        name: decode(part.slice(i, 1), table.numbering)
        for part in rows
        for i, name in enumerate(part.column("document_id").to_pylist())
    }


def test_the_reference_reader_agrees_with_ours(table: Table):
    reference = run("reference")["decode"]
    ours = decoded_rows(table)
    rows = [row for shard in table.shards() for row in read(table, shard).to_pylist()]
    vocabulary = pq.read_table(f"{table.location}/_softlabel/{table.vocabulary_name}").to_pylist()
    assert len(rows) == 40
    for row in rows:
        positions = reference(row, vocabulary, 2)
        labels = ours[row["document_id"]]
        assert len(positions) == labels.positions
        heads, tails, masses, entropies, following = zip(*positions, strict=True)
        assert [len(head) for head in heads] == labels.head_counts.tolist()
        assert [token for head in heads for token, _ in head] == labels.head_ids.tolist()
        np.testing.assert_allclose([value for head in heads for _, value in head], labels.head_logprobs, atol=1e-5)
        assert [len(tail) for tail in tails] == labels.tail_counts.tolist()
        flat = [entry for tail in tails for entry in tail]
        assert [entry[:2] for entry in flat] == list(zip(labels.tail_ids, labels.tail_draws, strict=True))
        np.testing.assert_array_equal([value for *_, value in flat], labels.tail_logprobs)
        np.testing.assert_array_equal(masses, labels.tail_log_masses.T)
        np.testing.assert_array_equal(entropies, labels.entropies)
        np.testing.assert_array_equal(following, labels.next_logprobs)


def test_the_example_decodes_to_the_documented_values():
    for found, documented in zip(run("reference")["decode"](ROW, VOCABULARY, 2), DECODED, strict=True):
        for part, expected in zip(found, documented, strict=True):
            np.testing.assert_allclose(np.array(part, float), np.array(expected, float), atol=5e-8)


def test_the_example_encodes_to_the_documented_values():
    f32 = np.float32
    labels = SoftLabels(
        head_counts=np.array([2, 1], np.int32),
        head_ids=np.array([5, 0, 2], np.int32),
        head_logprobs=np.log(np.array([0.6, 0.25, 1], f32)),
        tail_counts=np.array([2, 0], np.int32),
        tail_ids=np.array([2, 4], np.int32),
        tail_draws=np.array([3, 1], np.int32),
        tail_logprobs=np.log(np.array([0.05, 0.02], f32)),
        tail_log_masses=np.array([[np.log(0.15), -np.inf], [np.log(0.43), -np.inf]], f32),
        entropies=np.array([1.1174, 0], f32),
        next_logprobs=np.array([np.log(0.25), 0], f32),
    )
    sink = pa.BufferOutputStream()
    schema = [("cluster", pa.int16()), ("place", pa.int32()), ("number", pa.int32()), ("token_id", pa.int32())]
    pq.write_table(pa.Table.from_pylist(VOCABULARY, pa.schema(schema)), sink)
    numbering = Numbering.from_parquet(sink.getvalue().to_pybytes())
    rows = encode(labels, np.array([2]), numbering)
    assert rows.to_pylist() == [{name: ROW[name] for name in SOFT_LABELS.names}]


def test_key_and_split_of_the_example_are_as_documented():
    content = b"".join(n.to_bytes(4, "little") for n in (3, 5, 2)) + bytes([0, 1, 1])
    for part in (content[:12].hex(), content[12:].hex(), hashlib.blake2b(content, digest_size=16).hexdigest()):
        assert f"`{part}`" in PAGE
    assert split_of("doc-1", 0.1039) == "train"
    assert split_of("doc-1", 0.1040) == "eval"


def test_every_column_is_described():
    for name in {*SEQUENCE.names, *SOFT_LABELS.names}:
        assert re.search(rf"^\|[^|]*`{name}`", PAGE, re.MULTILINE), name
    for field in SOFT_LABELS:
        kind = {"int16": "int16", "int32": "int32", "float": "float32"}[str(field.type.value_type)]
        assert f"| `{field.name}` | list of {kind} |" in PAGE


def test_the_documented_properties_are_those_of_a_table(table: Table):
    found = run("setup", TABLE=table.location)["properties"]
    assert set(found) == set(re.findall(r"^\| `((?:softlabel|delta)\.\w+)`", PAGE, re.MULTILINE))
    assert found["softlabel.format"] == "2"
    for file in found["softlabel.vocabulary"], *(Path(shard.path).name for shard in table.shards()):
        (path,) = Path(table.location).rglob(file)
        assert path.stem.removeprefix("vocabulary-") == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_hashes_of_the_log_and_of_records_are_as_documented(table: Table):
    last = ""
    for version in range(table.version + 1):
        content = Path(table.location, "_delta_log", f"{version:020}.json").read_bytes()
        about = next(action["commitInfo"] for action in map(json.loads, content.splitlines()) if "commitInfo" in action)
        info = about["softlabel"]
        assert info["state"] == run("state")["state"](DeltaTable(table.location, version=version))
        assert info.get("previous", "") == last
        own = hashlib.blake2b(content.replace(info["hash"].encode(), b"0" * 32, 1), digest_size=16).hexdigest()
        assert own == info["hash"]
        last = hashlib.blake2b(content, digest_size=16).hexdigest()
    tag(table.location, 1, "paper")
    record = json.loads(Path(table.location, "_softlabel/tags/paper.json").read_text())
    found = record.pop("hash")
    assert found == hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("position", [0, 2])
def test_the_top_ids_recipe_agrees_with_the_decoder(table: Table, engine: str, position: int):
    for document in ("a7", "b3"):
        found = recipe(table, engine, "top_ids", DOCUMENT=document, POSITION=position)
        labels = decoded_rows(table)[document]
        start, count = labels.head_counts[:position].sum(), labels.head_counts[position]
        assert found["token_id"] == labels.head_ids[start : start + count].tolist()
        probabilities = np.exp(labels.head_logprobs[start : start + count].astype(np.float64))
        np.testing.assert_allclose(found["probability"], probabilities, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mass_recipe_agrees_with_the_decoder(table: Table, engine: str):
    found = recipe(table, engine, "mass")
    expected = {
        name: -np.expm1(labels.tail_log_masses[0].astype(np.float64)).mean()
        for name, labels in decoded_rows(table).items()
    }
    assert found["document_id"] == sorted(expected)
    np.testing.assert_allclose(found["mass"], [expected[name] for name in sorted(expected)], rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_entropy_recipe_agrees_with_the_decoder(table: Table, engine: str):
    found = recipe(table, engine, "histogram")
    counts = Counter(int(value) for labels in decoded_rows(table).values() for value in labels.entropies)
    assert list(zip(*found.values(), strict=True)) == sorted(counts.items())
    assert list(found) == ["nats", "positions"]


def test_every_block_was_run():
    tested = {"reference", "vocabulary", "row", "decoded", "setup", "state"}
    tested |= {f"{block}-{engine}" for block in RECIPES.values() for engine in ENGINES}
    assert set(BLOCKS) == tested
    assert PAGE.count("```") == 2 * len(BLOCKS), "no block without a name"
