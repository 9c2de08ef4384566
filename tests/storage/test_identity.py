"""Identities are compared field by field; circumstances contain what they should, and no secret."""

import getpass
import json
from datetime import date
from pathlib import Path

import pytest

from softlabel.storage.errors import ProvenanceError
from softlabel.storage.identity import Identity, circumstances
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import verify
from tests.storage.tables import add, identity, make_table, names_in

CHANGES = {
    "teacher.files.model.safetensors": lambda i: {
        "teacher": i.teacher.model_copy(update={"files": {"config.json": "c0"}})
    },
    "teacher.dtype": lambda i: {"teacher": i.teacher.model_copy(update={"dtype": "float32"})},
    "teacher.adapter": lambda i: {"teacher": i.teacher.model_copy(update={"adapter": "ad"})},
    "tokenizer.files": lambda i: {"tokenizer": i.tokenizer.model_copy(update={"files": "f4"})},
    "tokenizer.chat_template": lambda i: {"tokenizer": i.tokenizer.model_copy(update={"chat_template": "t"})},
    "tokenizer.chat_template_date": lambda i: {
        "tokenizer": i.tokenizer.model_copy(update={"chat_template_date": date(2026, 1, 2)})
    },
    "vocabulary": lambda i: {"vocabulary": i.vocabulary + 1},
    "padded_vocabulary": lambda i: {"padded_vocabulary": i.padded_vocabulary + 1},
    **{
        f"selection.{name}": lambda i, n=name: {"selection": i.selection.model_copy(update={n: 9})}
        for name in ("top_p", "min_k", "max_k", "draws", "seed")
    },
    "temperatures": lambda i: {"temperatures": (1.0, 2.0)},
    "classes": lambda i: {"classes": ("good", "bad")},
    "sequences.special_tokens": lambda i: {"sequences": i.sequences.model_copy(update={"special_tokens": "parse"})},
    "sequences.mask": lambda i: {"sequences": i.sequences.model_copy(update={"mask": "last"})},
    **{
        f"sequences.{name}": lambda i, n=name: {"sequences": i.sequences.model_copy(update={n: 9})}
        for name in ("max_tokens", "context", "eval_fraction")
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_differing_field_is_refused_and_named(name: str):
    mine = identity()
    theirs = mine.model_copy(update=CHANGES[name](mine))
    assert list(mine.differences(theirs)) == [name]
    here, there = mine.differences(theirs)[name]
    assert theirs.differences(mine)[name] == (there, here)
    with pytest.raises(ProvenanceError) as error:
        mine.require(theirs, "some/table")
    assert f"{name}: the table has {here}, this run {there}" in str(error.value)
    assert "some/table" in str(error.value)


def test_every_field_is_among_the_tested_changes():
    def leaves(tree: dict, prefix: str = "") -> set[str]:
        return {
            leaf
            for name, value in tree.items()
            for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name})
        }

    named = leaves(identity().model_dump()) - {"teacher.files.config.json"}
    assert named == {*CHANGES, "derived_from"}


def test_what_a_later_version_adds_to_an_identity_is_kept_and_only_stops_writers(tmp_path: Path):
    fields = json.loads(identity().model_dump_json())
    fields["selection"]["later"], fields["newer"] = 2, {"a": [1]}
    made = make_table(tmp_path / "table", Identity.model_validate(fields))
    add(made, ["a", "b"])
    table = Table.open(made.location)
    assert json.loads(table.identity.model_dump_json()) == fields
    assert verify(table).findings == ()
    assert names_in(table) == ["a", "b"]
    with pytest.raises(ProvenanceError, match=r"newer.a: the table has \[1\], this run None(.|\n)*selection.later"):
        table.identity.require(identity(), table.location)


def test_a_derived_identity_differs_from_a_captured_one():
    mine = identity()
    derived = mine.model_copy(update={"derived_from": mine.selection})
    assert set(mine.differences(derived)) == {f"derived_from.{name}" for name in type(mine.selection).model_fields}
    with pytest.raises(
        ProvenanceError, match=r"derived_from: .*reduced the rows of this run, but not the table"
    ) as error:
        mine.require(derived, "here")
    assert "None" not in str(error.value)
    with pytest.raises(
        ProvenanceError, match=r"derived_from: .*reduced the table, but not the rows of this run"
    ) as error:
        derived.require(mine, "here")
    assert "make a new table in another folder" in str(error.value)
    assert "None" not in str(error.value)


def test_equal_identities_have_no_differences():
    assert identity().differences(identity()) == {}
    identity().require(Identity.model_validate_json(identity().model_dump_json()), "here")


def test_circumstances_hold_no_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = circumstances(device="cpu")
    assert {"user", "python", "machine", "torch", "pyarrow", "deltalake", "device"} <= set(found)
    text = json.dumps(found)
    assert "secret" not in text
    assert str(Path.home()) not in text
    assert found["user"] == getpass.getuser()
    assert all(isinstance(value, str) for value in found.values())


def test_a_user_without_a_name_is_called_unknown(monkeypatch: pytest.MonkeyPatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert circumstances()["user"] == "unknown"


def test_circumstances_are_in_the_history(table):
    add(table, ["a"])
    (commit, _) = table.newest().history()
    assert commit["softlabel"]["circumstances"]["user"] == "test"
