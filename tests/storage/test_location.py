"""Locations: credentials are never accepted, stored or shown, wherever they come from; ``~`` is the home folder."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from softlabel.storage.credentials import WITHOUT_CREDENTIALS, holds_credentials, masked
from softlabel.storage.errors import IntegrityError, SoftlabelError, TableNotFoundError, UsageError
from softlabel.storage.location import located
from softlabel.storage.opening import exists
from softlabel.storage.places.open import place_of
from softlabel.storage.records.sealed_json import seal, unseal
from softlabel.storage.records.versions import pin, pins, tag, unpin
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view import open_table
from softlabel.storage.writer import ShardWriter
from tests import buckets
from tests.storage.tables import add, identity, make_table, names_in, rows

SECRET = "S3CR3T"
HOLDING = [
    f"s3://AKIA:{SECRET}@bucket/table",
    f"s3://{SECRET}@bucket/table",
    f"s3://:{SECRET}@bucket/table",
    f"S3://AKIA:{SECRET}@bucket/table",
    f"s3a://AKIA:{SECRET}@bucket/table@12",
    f"s3://AKIA%3A{SECRET}%40bucket/table",
    f"s3://AKIA%253A{SECRET}%2540bucket/table",
    f"s3://AKIA:{SECRET}/with+slashes/in=it@bucket/table",
    f"s3://AKIA:{SECRET}",
    f"s3://AKIA:{SECRET}@bucket@tag",
    f" s3://AKIA:{SECRET}@bucket/table",
    f"s3:/AKIA:{SECRET}@bucket/table",
    f"s3:AKIA:{SECRET}@bucket/table",
    f"s3:///AKIA:{SECRET}@bucket/table",
    f"s3:\\\\AKIA:{SECRET}@bucket",
    f"https://someone:{SECRET}@example.com/table",
    f"https://hf_{SECRET}@huggingface.co/org/model",
    f"jdbc:mysql://someone:{SECRET}@example.com/table",
    f"s3://bucket/table?access_key_id=AKIA&secret_access_key={SECRET}",
    f"s3://bucket/table?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRET}",
    f"s3://bucket?AWS_SECRET_ACCESS_KEY={SECRET}",
    f"s3://bucket/table#token={SECRET}",
    f"https://bucket.s3.amazonaws.com/table?sig={SECRET}",
]
CLEAN = [
    *("s3://bucket/table", "s3://bucket/table@12", "s3://bucket/table@tag", "s3://bucket", "s3://bucket/@12"),
    *("s3://bucket/a@b/c", "s3://bucket/a@b/c@12", "s3://bucket/a:b/c@d", "s3://bucket/50%25/c"),
    *("s3://bucket/year=202?/month=01/*.parquet", "s3://bucket/part-?.jsonl", "http://localhost:9000/bucket"),
    *("table", "table@12", "a@b/c@12", "./s3:/a@b", "/data/a@b", "/data/s3:/a@b", "a:b@3", "org/model", "data?/k=v"),
]


@pytest.mark.parametrize("location", HOLDING)
def test_credentials_are_refused_and_never_shown(location: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    entries: list[Callable[[], object]] = [
        lambda: located(location),
        lambda: place_of(location),
        lambda: exists(location),
        lambda: Table.open(location),
        lambda: Table.open(f"{location}@3"),
        lambda: Table.create(location, identity(), pa.schema([]), None, tmp_path),
        lambda: open_table(location),
        lambda: maintain(location),
        lambda: make_view(location, ["a", "b"], [1, 1], "concatenate"),
        lambda: make_view("view", [location, "b"], [1, 1], "concatenate"),
        lambda: tag(location, 0, "name"),
        lambda: pin("table", 0, location),
        lambda: pin("table", 0, Path(location)),
        lambda: unpin("table", location),
    ]
    for entry in entries:
        with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY") as error:
            entry()
        assert SECRET not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("location", CLEAN)
def test_locations_without_credentials_are_accepted_unchanged(location: str):
    assert located(location) == location
    assert not holds_credentials(location)
    assert re.search(WITHOUT_CREDENTIALS, location)


@pytest.mark.parametrize("location", HOLDING)
def test_the_schema_pattern_refuses_credentials_too(location: str):
    assert not re.search(WITHOUT_CREDENTIALS, location)


@pytest.mark.parametrize("location", HOLDING)
@pytest.mark.parametrize("text", ["{}", "can't open '{}'", '{{"a": ["{}"]}}', "not {}, but s3://bucket/table@12"])
def test_credentials_in_messages_of_other_libraries_are_masked(location: str, text: str):
    error = SoftlabelError("it failed", found=text.format(location), where="http://localhost:9000/bucket/a@b")
    assert SECRET not in str(error)
    assert "http://localhost:9000/bucket/a@b" in str(error)
    assert masked("s3://bucket/table@12 and /home/a@b") == "s3://bucket/table@12 and /home/a@b"


def test_an_at_sign_in_a_bucket_prefix_belongs_to_the_prefix(moto: str):
    with buckets.environment(moto):
        table = make_table(f"{buckets.BUCKET}/location/a@b/table", identity())
        add(table, ["a"])
        assert names_in(Table.open(f"{table.location}@1")) == ["a"]
        assert Table.open(f"{table.location}@0").version == 0


@pytest.mark.parametrize("location", HOLDING[:8])
def test_a_view_file_with_credentials_is_refused(location: str, filled: Table, tmp_path: Path):
    other = make_table(tmp_path / "other", identity())
    view = make_view(str(tmp_path / "view"), [filled.location, other.location], [1, 1], "concatenate")
    file = tmp_path / "view" / "view.json"
    says = unseal(file.read_bytes())
    says["parts"][1]["table"] = location
    file.write_bytes(seal(says))
    entries: list[Callable[[], object]] = [
        lambda: open_table(view.location),
        lambda: make_view(view.location, [filled.location, other.location], [1, 1], "concatenate"),
    ]
    for entry in entries:
        with pytest.raises(UsageError, match=r"contains credentials(.|\n)*view\.json") as error:
            entry()
        assert SECRET not in str(error.value)


def test_a_pin_with_credentials_is_refused(filled: Table):
    made = pin(filled.location, 1, Path("student"))
    (file,) = Path(filled.location, "_softlabel", "pins").iterdir()
    file.write_bytes(seal(asdict(made) | {"student": HOLDING[0]}))
    with pytest.raises(IntegrityError, match=rf"contains credentials(.|\n)*{file.name}") as error:
        pins(filled.location)
    assert SECRET not in str(error.value)
    assert SECRET in json.loads(file.read_text())["student"]
    assert Table.open(filled.location).shards() == filled.shards()


def test_credentials_in_the_name_of_an_old_captures_teacher_are_masked(table: Table):
    with ShardWriter(table, row_group=8) as writer:
        writer.append(*rows(["a"]))
        writer.commit({"operation": "capture", "teacher": HOLDING[0], "parameters": 1})
    assert last_capture(table.newest()).teacher == "(a location with credentials)"
    assert last_capture(table).teacher is None


def test_a_table_in_the_home_folder_is_the_same_by_tilde_and_by_path(home: Path):
    table = make_table("~/t", identity())
    add(table, ["a"])
    assert table.location == str(home / "t")
    assert (home / "t" / "_softlabel").is_dir()
    assert [Table.open(name).version for name in ("~/t", "~/t@0", str(home / "t"))] == [1, 0, 1]
    tag("~/t", 0, "first")
    assert Table.open("~/t@first").version == 0
    assert place_of("~/t").address == place_of(str(home / "t")).address
    assert maintain("~/t").location == str(home / "t")
    assert not list(Path().iterdir())


def test_a_view_in_the_home_folder_stores_expanded_locations(home: Path):
    for name in ("a", "b"):
        make_table(f"~/{name}", identity())
    make_view("~/view", ["~/a@0", "~/b"], [1, 1], "concatenate")
    assert [table.location for table in open_table("~/view").tables] == [str(home / "a"), str(home / "b")]
    assert [pin.student for pin in pins("~/a")] == [str(home / "view")]
    assert unpin("~/a", "~/view").version == 0
    assert not list(Path().iterdir())


def test_a_folder_named_tilde_can_be_reached_by_a_relative_path(home: Path):
    table = make_table("./~/t", identity())
    assert Path("~", "t", "_softlabel").is_dir()
    assert Table.open("./~/t").place.address == table.place.address
    with pytest.raises(TableNotFoundError):
        Table.open("~/t")
    assert not list(home.iterdir())


@pytest.mark.parametrize("location", ["~nobody-of-this-name/t", "~nobody-of-this-name", "~@12"])
def test_an_unknown_home_folder_is_refused(location: str, home: Path):
    with pytest.raises(UsageError, match=rf"this machine does not know that user(.|\n)*{location}(.|\n)*\./ before it"):
        Table.open(location)
    assert not list(Path().iterdir())


def test_the_home_folder_of_another_user_is_expanded(home: Path):
    assert located("~root/t") == str(Path("~root/t").expanduser())
