"""Soft labels that lack values, as another program may have made them: stored, told apart, and refused where needed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.targets import TokenIds, decode_targets
from softlabel.pipeline.tables.export import export
from softlabel.storage.codec import decode, encode
from softlabel.storage.errors import UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.upkeep.verification import verify
from softlabel.storage.writer import ShardWriter
from tests.pipeline.loss.test_targets import NUMBERING, TEMPERATURES, V, capture, compact_of
from tests.storage.tables import identity, make_table, rows

COLUMNS = ("entropies", "tail_log_masses", "next_logprobs")


def without(labels: SoftLabels, column: str) -> SoftLabels:
    return dataclasses.replace(labels, **{column: np.full_like(getattr(labels, column), np.nan)})


@pytest.mark.parametrize("column", COLUMNS)
def test_unknown_values_are_read_back_as_such(column: str) -> None:
    labels = capture(3 * torch.randn(20, V), top_k=8)
    found = decode(encode(without(labels, column), np.array([20]), NUMBERING), NUMBERING)
    assert np.isnan(getattr(found, column)).all()
    for other in {*COLUMNS} - {column}:
        assert not np.isnan(getattr(found, other)).any()


def test_a_target_that_is_normalized_over_its_head_needs_no_mass() -> None:
    labels = capture(3 * torch.randn(20, V), top_k=8)
    loss = LossConfig(target="renormalized")
    known, unknown = (
        decode_targets(compact_of(each), TokenIds(NUMBERING), TEMPERATURES, loss)
        for each in (labels, without(labels, "tail_log_masses"))
    )
    torch.testing.assert_close(unknown.logprobs, known.logprobs, atol=1e-4, rtol=0)
    missing = decode_targets(compact_of(without(labels, "entropies")), TokenIds(NUMBERING), TEMPERATURES, loss)
    assert missing.entropies.isnan().all()


@pytest.mark.parametrize("column", COLUMNS)
def test_values_are_only_unknown_where_the_table_says_so(column: str, tmp_path: Path) -> None:
    for number, declared in enumerate([(), (column,)]):
        made = make_table(tmp_path / str(number) / "table", identity(unknown=declared))
        sequences, labels = rows([f"a{i}" for i in range(5)], "train")
        with ShardWriter(made) as writer:
            writer.append(sequences, without(labels, column))
            writer.commit({})
        findings = verify(made.newest()).findings
        assert [column in finding.problem for finding in findings] == ([] if declared else [True])
        assert np.isnan(getattr(decode(read(made.newest(), made.newest().shards()[0]), made.numbering), column)).all()
        if declared:
            with pytest.raises(UsageError, match=column):
                made.identity.require_known(COLUMNS, made.location, "an evaluation", "use another")


@pytest.mark.parametrize("form", ["parquet", "datasets", "axolotl"])
def test_probabilities_that_are_known_only_in_proportion_are_not_exported(form: str, tmp_path: Path) -> None:
    made = make_table(tmp_path / "table", identity(unknown=("tail_log_masses",)))
    config = ExportConfig(table=made.location, output=str(tmp_path / "out"), format=form)
    with pytest.raises(UsageError, match="tail_log_masses"):
        export(config)
    assert not (tmp_path / "out").exists()
