"""Documents that a capture left out can be listed by reason."""

from pathlib import Path
from typing import Any

import pytest

from softlabel.pipeline.config.rejects import RejectsConfig
from softlabel.pipeline.config.tables import MixConfig
from softlabel.pipeline.tables.mix import mix
from softlabel.pipeline.tables.rejects import RejectsReport, rejects
from softlabel.storage.errors import IntegrityError
from softlabel.storage.table import Table
from tests.pipeline.classifiers import save_classifier
from tests.pipeline.tables.conftest import HOSTILE, captured


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Table:
    """A table of three documents, from which five others were left out for two reasons."""
    documents = [{"id": f"good-{i}", "text": f"Words {i}."} for i in range(3)]
    documents += [{"id": f"empty-{i}", "text": ""} for i in range(4)] + [{"id": HOSTILE, "text": None}]
    return captured(tmp_path_factory.mktemp("partial") / "table", tiny_teacher, documents)


def listed(table: Table | str, **settings: Any) -> RejectsReport:
    return rejects(
        RejectsConfig.model_validate({"table": table if isinstance(table, str) else table.location, **settings})
    )


def test_rejected_documents_are_counted_and_listed_by_reason(partial: Table):
    report = listed(partial)
    assert (report.rejected, report.shortened, report.matching) == (5, 0, 5)
    assert {each.document_id for each in report.documents} == {HOSTILE, *(f"empty-{i}" for i in range(4))}
    first, second = report.reasons
    assert (first.documents, second.documents) == (4, 1)
    assert first.examples == ("empty-0", "empty-1", "empty-2")
    assert second.examples == (HOSTILE,)
    one = listed(partial, reason=second.reason.upper()[:20])
    assert [each.document_id for each in one.documents] == [HOSTILE]
    assert (one.matching, one.rejected) == (1, 5)
    assert len(listed(partial, limit=2).documents) == 2


def test_documents_that_a_classifier_read_in_part_are_listed_too(tiny_teacher: Path, tmp_path: Path):
    save_classifier(tmp_path / "classifier", tiny_teacher)
    documents = [{"id": "long", "text": "word " * 300}, {"id": "short", "text": "word"}, {"id": "empty", "text": ""}]
    table = captured(tmp_path / "table", tmp_path / "classifier", documents)
    report = listed(table)
    assert (report.rejected, report.shortened) == (1, 1)
    [long] = [each for each in report.documents if each.shortened]
    assert (long.document_id, "128 tokens" in long.reason) == ("long", True)
    assert listed(table, reason="longest input").matching == 1


def test_a_table_that_left_nothing_out_has_an_empty_list_and_a_view_those_of_its_tables(
    texts: Table, partial: Table, tmp_path: Path
):
    assert (listed(texts).matching, listed(texts).reasons) == (0, ())
    mix(MixConfig(view=str(tmp_path / "view"), tables=(texts.location, partial.location)))
    assert {each.table for each in listed(str(tmp_path / "view")).documents} == {partial.location}


@pytest.mark.parametrize("line", ["{", '{"document_id": 1, "reason": "x"}', '["a"]', "\x00"])
def test_a_damaged_list_is_an_error_that_names_the_line(tiny_teacher: Path, tmp_path: Path, line: str):
    documents = [{"id": "good", "text": "Words."}, {"id": "bad", "text": ""}]
    table = captured(tmp_path / "table", tiny_teacher, documents)
    with (tmp_path / "table" / "_softlabel" / "rejects.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(IntegrityError, match=r"rejects\.jsonl, line 2"):
        listed(table)
