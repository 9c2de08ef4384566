"""Every command with its table in a bucket: the same settings, with an address in place of a path."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.rejects import RejectsConfig
from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.tables.export import export
from softlabel.pipeline.tables.rejects import rejects
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.tables.show import show
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import IntegrityError, UsageError
from softlabel.storage.places.open import place_of
from softlabel.storage.records.versions import pins
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import history, inspect
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.verification import verify
from tests import buckets
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.storage.tables import names_in

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def server(moto: str) -> Iterator[None]:
    with buckets.environment(moto):
        yield


def test_every_command_works_on_a_table_in_a_bucket(tiny_teacher: Path, tmp_path: Path) -> None:
    location = f"{buckets.BUCKET}/tables/tiny"
    documents = write(tmp_path / "documents.parquet", texts(60) | {"empty": ""})
    settings_in_bucket = settings(tiny_teacher, documents, location)  # type: ignore[arg-type]
    done = capture(settings_in_bucket)
    original_identity = Table.open(location).identity
    assert done.sequences == 60
    assert json.loads(place_of(location).read("_softlabel/rejects.jsonl"))["document_id"] == "empty"
    assert done.rejects_file == f"{location}/_softlabel/rejects.jsonl"
    assert capture(settings_in_bucket).sequences == 0

    student = tmp_path / "student"
    config = {
        "student": {"layers": (1,)},
        "stream": {"max_length": 128, "batch_size": 4},
        "optimizer": {"max_steps": 2},
    }
    trained = train(TrainConfig.model_validate({"table": location, "output": str(student), **config}))
    assert trained.table == f"{location}@{done.version}"
    assert [(pin.student, pin.version) for pin in pins(location)] == [(str(student), done.version)]
    assert json.loads((student / "softlabel.json").read_text())["table"]["location"] == location
    assert (student / "tokenizer.json").exists()
    report = evaluate(EvaluateConfig(table=f"{location}/", students=(str(student),), report=str(tmp_path / "report")))
    assert report.positions > 0
    assert inspect(Table.open(location)).splits["train"].sequences > 40
    assert [each.document_id for each in rejects(RejectsConfig(table=location)).documents] == ["empty"]
    [row] = show(ShowConfig(table=location)).rows
    assert row.table == f"{location}@{done.version}"
    exported = export(ExportConfig(table=location, output=str(tmp_path / "exported")))
    assert sum(split.sequences for split in exported.splits.values()) == 60
    assert f"describes its version {done.version}." in place_of(location).read("README.md").decode()
    assert history(Table.open(location))[-2].operation == "capture"

    fewer = f"{buckets.BUCKET}/tables/fewer"
    where = {"where": "document_id <> 'd7'"}
    assert reprocess(ReprocessConfig(source=location, destination=fewer, **where)).rows.sequences == 59
    local = str(tmp_path / "local")
    assert reprocess(ReprocessConfig(source=fewer, destination=local)).rows.sequences == 59
    assert names_in(Table.open(local)) == names_in(Table.open(fewer))
    with pytest.raises(UsageError, match="same"):
        reprocess(ReprocessConfig(source=fewer, destination=f"{fewer}/"))
    (tmp_path / "purged-ids").write_text("d8\n")
    purged = reprocess(ReprocessConfig(source=location, purge=str(tmp_path / "purged-ids"))).purged
    assert purged is not None
    assert any("maintain" in line for line in purged.out_of_reach)
    assert "d8" not in names_in(Table.open(location))
    assert reprocess(ReprocessConfig.model_validate({"source": location, "selection": {"max_k": 2}})).rows.left == 0
    narrow = Table.open(location)
    assert (narrow.identity.selection.max_k, narrow.identity.derived_from) == (2, original_identity.selection)
    assert verify(narrow).findings == ()
    assert maintain(location, grace_hours=-1).deleted == ()

    damaged = Table.open(fewer)
    (name,) = [file.name for file in damaged.place.files("_softlabel") if file.name.endswith("/tokenizer.json")]
    damaged.place.write(name, b"{}")
    (finding,) = verify(damaged).findings
    assert "tokenizer" in finding.path
    with pytest.raises(IntegrityError, match="tokenizer"):
        train(TrainConfig.model_validate({"table": fewer, "output": str(tmp_path / "other"), **config}))
