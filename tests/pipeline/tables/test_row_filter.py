"""Which rows a reprocessing keeps: by expression, by list of documents, by the current documents."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.storage.errors import DocumentsError, UsageError
from softlabel.storage.reader import index
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import history
from tests.pipeline.tables.test_reprocess import A, B, listed, run, two_sources
from tests.storage.tables import identity, make_table, names_in


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return two_sources(tmp_path / "table")


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("source = 'a'", A),
        ("source = 'a' AND year >= 0 AND split IN ('train', 'eval')", A),
        ("document_id LIKE 'b3%' OR document_id = 'a1'", ["a1", *(name for name in B if name.startswith("b3"))]),
        ("label IS NULL AND tokens > 1 AND NOT source = 'b'", A),
        ("label = 'x' OR source = 'b'", B),
        ("true AND tokens BETWEEN 0 AND 100 AND source IN ('b', 'c')", B),
        ("source < 'b' AND tokens % 1 = 0 AND CAST(year AS STRING) LIKE '2%' AND GREATEST(year, 1) > 1", A),
        ("CASE WHEN source = 'a' THEN ARRAY_LENGTH(token_ids) > 1 ELSE COALESCE(label, 'y') = 'x' END", A),
    ],
)
def test_an_expression_keeps_only_its_rows(table: Table, where: str, kept: list[str]) -> None:
    report = run(table.location, where=where)
    assert names_in(Table.open(table.location)) == sorted(kept)
    assert report.rows.dropped == 80 - len(kept)
    assert len(names_in(table)) == 80, "the old version is as it was"
    entry = history(Table.open(table.location))[0]
    assert (entry.operation, entry.sequences) == ("filter", len(kept) - 80)


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("sauce = 'a'", "no column sauce"),
        ("tokens + 1", "neither true nor false"),
        ("tokens > AVG(tokens)", "which is not one of the functions that can be used here"),
        ("SUM(tokens) OVER (PARTITION BY source) > 60", "which is not one of the functions that can be used here"),
        (
            "year - MIN(year) < 1000000",
            "which is not one of the functions that can be used here",
        ),  # as true of each row alone as of all
        ("RANK() OVER (ORDER BY year) < 1000000", "which is not one of the functions that can be used here"),
        ("LAG(year) OVER (ORDER BY year) > 1000000", "which is not one of the functions that can be used here"),
        ("COUNT(*) > 0", "which is not one of the functions that can be used here"),
        ("true OR MAX(year) > 0", "which is not one of the functions that can be used here"),
        ("UNNEST(token_ids) = 3", "found:"),
        ("source = ", "found:"),
        ("nonsense(source)", "nonsense"),
        ("head_ids = 3", "no column head_ids"),
        ("source = 3", "found:"),
    ],
)
def test_an_expression_that_can_not_be_used_is_refused(table: Table, where: str, problem: str) -> None:
    with pytest.raises(UsageError, match=r"with the columns key, document_id.*source, year") as error:
        run(table.location, where=where)
    assert problem in str(error.value)
    assert Table.open(table.location).version == 2


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Table, Path]]:
    """A table that no test changes, and files that no expression may read."""
    folder = tmp_path_factory.mktemp("where")
    made = two_sources(folder / "table")
    for name in ("secret.csv", "secret.json", "secret.ndjson"):
        (folder / name).write_text('{"hidden": "treasure"}\n')
    yield made, folder
    assert Table.open(made.location).version == 2


@pytest.mark.parametrize(
    "where",
    [
        "read_csv('{}/secret.csv')",
        "source IN (SELECT hidden FROM read_csv('{}/secret.csv'))",
        "source IN (SELECT hidden FROM read_ndjson('{}/secret.ndjson'))",
        "EXISTS (SELECT * FROM read_json('{}/secret.json'))",
        "tokens > (SELECT COUNT(*) FROM read_parquet('{}/secret.csv'))",
        "source = (SELECT hidden FROM scan_csv('{}/secret.csv') LIMIT 1)",
        "source = 'a' OR tokens IN (SELECT 1 FROM read_ipc('http://127.0.0.1:9/x'))",
        "COALESCE(LOWER((SELECT hidden FROM read_csv('{}/secret.csv'))), 'a') = 'a'",
        "CASE WHEN source = 'a' THEN true ELSE source = ANY (TABLE read_csv('{}/secret.csv')) END",
        "\"read_csv\"('{}/secret.csv') = source",
        "source = 'a' UNION SELECT * FROM read_csv('{}/secret.csv')",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "source = 'a'; SELECT 1",
        "source = 'a' -- AND year > 0",
        "source = 'a' /* AND year > 0 */",
        "CAST(document_id AS INTEGER) > 0",
        "document_id::int > 0",
        "TRY_CAST(document_id AS DATE) IS NULL",
        "CAST('x' AS DATE) IS NULL",
        "tokens LIKE '1%'",
        "source < 3",
        "source AND true",
        "label = true",
        "token_ids = 3",
        "split.train = 1",
        "self.source = 'a'",
        "*",
        "COLUMNS('s.*') = 'a'",
        "source = $1",
        "source = @@version",
        "source = ?",
        "source = 'a",
        'source = "a',
        "source = ‘a’",
        "year > 1e999",
        "year > NaN",
        "",
        "  \n\t",
        "source REGEXP '('",
        "source ~ '('",
        "REGEXP_LIKE(source, '((((')",
        "source = 'a' OR " * 30_000 + "true",
        "(" * 5000 + "true" + ")" * 5000,
        "NOT " * 5000 + "true",
        "year = " + "1 + " * 5000 + "1",
        "source = '" + "a" * 1_000_000 + "'",
    ],
)
def test_sql_that_reads_files_or_other_rows_is_refused_before_anything_is_read(
    unchanged: tuple[Table, Path], where: str
) -> None:
    table, folder = unchanged
    with pytest.raises(UsageError, match=r"SQL that is true or false") as error:
        run(table.location, folder / "new", where=where.replace("{}", str(folder)))
    assert "treasure" not in str(error.value)
    assert re.search(r"\n {22} *\^+\n", str(error.value)), "it points at a place"
    assert not (folder / "new").exists()


def test_documents_are_dropped_by_their_ids(table: Table, tmp_path: Path) -> None:
    report = run(table.location, drop=listed(tmp_path / "ids", ["a1", "b2", "c3", ""]))
    assert (report.rows.dropped, report.unknown, report.operation) == (2, 1, "drop")
    assert names_in(Table.open(table.location)) == sorted({*A, *B} - {"a1", "b2"})
    for path in (listed(tmp_path / "none", []), str(tmp_path / "nowhere")):
        with pytest.raises(UsageError, match="the list of documents can't be used"):
            run(table.location, drop=path)


def test_stale_rows_are_dropped_and_rows_of_other_documents_stay(tmp_path: Path) -> None:
    documents = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "body": ["one", "two", "three"]}), documents)
    columns = ColumnsConfig(text="body")
    fingerprints = {}
    for batch in Documents(str(documents), columns).batches():
        names = batch.documents.column("document_id").to_pylist()
        fingerprints |= dict(zip(names, batch.documents.column("fingerprint").to_pylist(), strict=True))
    table = make_table(tmp_path / "table", identity())
    write(table, [("a", 0, fingerprints["a"]), ("a", 1, b"old"), ("b", 0, b"old"), ("d", 0, b"gone")])
    report = run(table.location, stale=str(documents), columns={"text": "body"})
    assert report.rows.dropped == 2
    left = index(Table.open(table.location), ["document_id", "chunk"])
    assert sorted(zip(*left.to_pydict().values(), strict=True))[:2] == [("a", 0, "train"), ("d", 0, "train")]
    with pytest.raises(UsageError, match="no column 'text'"):
        run(table.location, stale=str(documents))
    with pytest.raises((UsageError, DocumentsError)):
        run(table.location, stale=str(tmp_path / "nowhere"))


def write(table: Table, wanted: list[tuple[str, int, bytes]]) -> None:
    from softlabel.storage.writer import ShardWriter
    from tests.storage.tables import rows

    sequences, labels = rows([f"{name}{chunk}" for name, chunk, _ in wanted], "train")
    for column, values in zip(("document_id", "chunk", "fingerprint"), zip(*wanted, strict=True), strict=True):
        i = sequences.schema.get_field_index(column)
        sequences = sequences.set_column(i, sequences.schema.field(i), pa.array(values, sequences.schema.field(i).type))
    with ShardWriter(table) as writer:
        writer.append(sequences, labels)
        writer.commit({})
