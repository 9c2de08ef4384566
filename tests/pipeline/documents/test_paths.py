"""Documents in a bucket are read like those on a disk, from a local S3 server; errors say what can't be read."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from obstore.store import MemoryStore

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.storage.errors import DocumentsError, UsageError
from softlabel.storage.places import bucket as places_bucket
from tests import buckets

RECORDS = [{"id": f"d{i}", "text": f"text {i} é"} for i in range(50)]
BUCKET = f"{buckets.BUCKET}/documents"


@pytest.fixture
def bucket(moto: str, folder: Path) -> Iterator[str]:
    """The URL of the files of ``folder``, in an environment in which they can be read."""
    with buckets.environment(moto):
        yield BUCKET


@pytest.fixture(scope="module")
def folder(moto: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files on a disk, each also in the bucket under the same name."""
    root = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    for name in ("lines/2024/a.jsonl", "lines/b c+é.ndjson.gz", "lines/c.jsonl.zst", "text/sub/one.txt", "text/two.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(RECORDS), root / "table" / "x.parquet", row_group_size=7)
    (root / "lines/2024/a.jsonl").write_bytes(lines)
    (root / "lines/b c+é.ndjson.gz").write_bytes(gzip.compress(lines.replace(b'"d', b'"b')))
    (root / "lines/c.jsonl.zst").write_bytes(pa.compress(lines.replace(b'"d', b'"c'), "zstd", asbytes=True))
    (root / "text/sub/one.txt").write_text("One\nmore")
    (root / "text/two.md").write_text("Two")
    (root / "text/_hidden.txt").write_text("not asked for")
    (root / "table/short.parquet.part").write_text("of no kind")

    buckets.put(moto, "documents/text/", b"")  # as consoles make folders
    for path in root.rglob("*"):
        if path.is_file():
            buckets.put(moto, f"documents/{path.relative_to(root).as_posix()}", path.read_bytes())
    return root


def read(path: str) -> tuple[pa.Table, int]:
    batches = list(Documents(path, ColumnsConfig()).batches())
    return pa.concat_tables([batch.documents for batch in batches]), sum(len(batch.rejects) for batch in batches)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("table/x.parquet", 50),
        ("lines/c.jsonl.zst", 50),
        ("lines", 150),
        ("lines/", 150),
        ("text", 2),
        ("lines/*.*", 100),
        ("lines/**/*.jsonl", 50),
        ("*/*/*.jsonl", 50),
        ("text/*.[mt]*", 2),
    ],
)
def test_a_bucket_is_read_like_a_folder(path: str, count: int, folder: Path, bucket: str) -> None:
    there, rejects = read(f"{bucket}/{path}")
    here, _ = read(f"{folder}/{path}")
    assert (there.num_rows, rejects) == (count, 0)
    assert there.equals(here)


def fails(path: str, *parts: str) -> None:
    with pytest.raises((UsageError, DocumentsError)) as caught:
        read(path)
    message = str(caught.value)
    assert len(message.splitlines()) < 10
    assert buckets.KEYS["AWS_SECRET_ACCESS_KEY"] not in message
    for part in parts:
        assert part in message


def test_a_missing_object_or_bucket_is_an_error(bucket: str) -> None:
    for path in ("nowhere.parquet", "nowhere/*.parquet", "text/*.parquet", "lines/2024/a.json"):
        fails(f"{bucket}/{path}", "nothing there", f"{bucket}/{path}")
    fails("s3://no-such-bucket/x.parquet", "NoSuchBucket", "s3://no-such-bucket")
    for path in ("ftp://bucket/x.parquet", "s3://", "s3:///x.parquet", "hf://"):
        fails(path, "s3://BUCKET/PATH", path)


@pytest.mark.long  # the client tries again for ten seconds
def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    fails(f"{bucket}/text", "no credentials", "AWS_ACCESS_KEY_ID")


def test_a_damaged_object_is_named(folder: Path, bucket: str, moto: str) -> None:
    buckets.put(moto, "documents/bad/x.parquet", (folder / "table/x.parquet").read_bytes()[:-20])
    fails(f"{bucket}/bad", f"{BUCKET}/bad/x.parquet", "a complete, undamaged Parquet file")


def test_buckets_of_google_and_azure_are_read_like_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()  # in place of services that only the internet has
    for path in folder.rglob("*.*"):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    opened: list[str] = []
    monkeypatch.setattr(places_bucket, "from_url", lambda url, **_: opened.append(url) or store)
    for address in ("gs://google", "abfss://docs@account.dfs.core.windows.net", "az://azure"):
        for path in ("lines", "table/x.parquet", "*/*/*.jsonl"):
            assert read(f"{address}/{path}")[0].equals(read(f"{folder}/{path}")[0])
        assert opened[-1] == address
        fails(f"{address}/nowhere.parquet", "nothing there", address)
    for secret in ("docs@account.dfs.core.windows.net/a?sig=a-secret-key=", "name:key@account.dfs.core.windows.net/a"):
        fails(f"abfss://{secret}", "credentials")


def test_a_bucket_without_its_settings_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    fails("az://docs-of-nobody/a", "AZURE_STORAGE_ACCOUNT_NAME", "Account must be specified")


class HubOfFiles(LocalFileSystem):  # type: ignore[misc]
    """The hub's file system, with a folder of this machine in place of the hub."""

    root = ""

    def _strip(self, path: str) -> str:
        return f"{self.root}/{path.removeprefix('datasets/')}"

    def find(self, path: str, **_: object) -> list[str]:
        return [f"datasets/{name.removeprefix(self.root + '/')}" for name in super().find(self._strip(path))]

    def isfile(self, path: str) -> bool:
        return bool(super().isfile(self._strip(path)))

    def open(self, path: str, mode: str = "rb", **_: object) -> object:
        return super().open(self._strip(path), mode)


def test_a_data_set_on_the_hub_is_read_like_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HubOfFiles.root = str(folder)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", HubOfFiles)
    for path in ("lines", "table/x.parquet", "*/*/*.jsonl", "text"):
        assert read(f"hf://datasets/{path}")[0].equals(read(f"{folder}/{path}")[0])
    fails("hf://datasets/nowhere", "nothing there")


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("hf://datasets/owner/name/x.parquet", "hf://datasets/owner/name/x.parquet", "HF_HUB_OFFLINE")
