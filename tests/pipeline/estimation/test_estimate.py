"""An estimate predicts what a capture then produces, and reports correctly what each selection loses."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.config.estimate import EstimateConfig, SampleConfig
from softlabel.pipeline.estimation.estimate import Estimate, estimate
from softlabel.pipeline.selection.fidelity import bucket_kl, collisions, squared_error
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.errors import UsageError
from tests.conftest import topics
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.classifiers import save_classifier, save_documents

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(teacher: Path, documents: Path, /, **more: object) -> EstimateConfig:
    given = settings(teacher, documents, Path("unused")).model_dump(exclude={"table"})
    return EstimateConfig.model_validate(given | {"sample": {"megabytes": 0.02, "batches": 3}} | more)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two long documents, then very many short ones: a sample of only the first ones would mislead."""
    pieces = list(topics().values())
    long = ["\n".join(pieces[i::2])[:25_000] for i in range(2)]
    short = [text[start : start + 90] for text in pieces for start in range(0, min(len(text), 270), 90)]
    named = {f"d{i}": text for i, text in enumerate(long + short)}
    return write(tmp_path_factory.mktemp("skewed") / "d.parquet", named)


def test_a_small_sample_predicts_the_size_of_the_capture(tiny_teacher: Path, skewed: Path, tmp_path: Path):
    config = config_of(tiny_teacher, skewed)
    found = estimate(config)
    report = capture(config.capture(str(tmp_path / "t")))
    assert found.tokenized < 0.3
    assert found.sampled_positions < report.positions / 10
    for name in ("sequences", "positions", "bytes"):
        assert getattr(found, name) == pytest.approx(getattr(report, name), rel=0.15), name
    requested = found.selections[0]
    assert requested.bytes == found.bytes
    assert requested.name == "default"


def test_repeated_documents_are_estimated_as_copies(tiny_teacher: Path, tmp_path: Path):
    """With a sample of all or some of them; each text is in three documents, short ones in more."""
    pieces = [text[:450] for text in topics().values() if len(text) > 450][:40]
    named = {f"{i}-{again}": text for again in range(3) for i, text in enumerate(pieces)}
    named |= {f"short-{i}": "This page was left blank on purpose." for i in range(60)}
    more = {
        "table": str(tmp_path / "t"),
        "shards": {"row_group_sequences": 8},
        "sample": {"megabytes": 0.01, "batches": 2},
    }
    config = config_of(tiny_teacher, write(tmp_path / "d.parquet", named), **more)
    some, every = estimate(config), estimate(config.model_copy(update={"sample": SampleConfig(batches=1)}))
    report = capture(config.capture(str(tmp_path / "t")))
    assert some.tokenized < 0.4
    for name in ("sequences", "copied", "positions", "bytes"):
        assert getattr(some, name) == pytest.approx(getattr(report, name), rel=0.15), name
    assert (every.sequences, every.copied, every.positions) == (report.sequences, report.copied, report.positions)
    assert every.bytes == pytest.approx(report.bytes, rel=0.15)
    assert every.seconds.copy > 0

    others = write(tmp_path / "others.parquet", {f"other-{name}": text for name, text in named.items()})
    config = config.model_copy(update={"documents": str(others)})
    found = estimate(config)
    report = capture(config.capture(str(tmp_path / "t")))
    assert (found.sequences, report.sequences) == (0, 0)
    assert (found.copied, found.bytes) == pytest.approx((report.copied, report.bytes), rel=0.15)


def test_repeated_parts_outside_the_sample_count_as_new_but_bytes_are_right(tiny_teacher: Path, tmp_path: Path):
    pieces = [(text * 3)[:600] for text in list(topics().values())[:20]]
    named = {f"d{i}": f"Doc {i}. {pieces[i % len(pieces)]}" for i in range(100, 200)}
    more = {"shards": {"row_group_sequences": 8}, "sample": {"megabytes": 0.01, "batches": 2}}
    config = config_of(tiny_teacher, write(tmp_path / "d.parquet", named), **more)
    found = estimate(config)
    report = capture(config.capture(str(tmp_path / "t")))
    assert found.positions > 1.2 * report.positions
    assert found.copied < report.copied
    assert found.sequences + found.copied == pytest.approx(report.sequences + report.copied, rel=0.15)
    assert found.bytes == pytest.approx(report.bytes, rel=0.15)


def test_a_sample_of_everything_is_exact(tiny_teacher: Path, documents: Path, tmp_path: Path):
    config = config_of(tiny_teacher, documents, sample={"batches": 1})
    found = estimate(config)
    report = capture(config.capture(str(tmp_path / "t")))
    assert (found.tokenized, found.sequences, found.positions) == (1.0, report.sequences, report.positions)


def test_only_documents_that_the_table_lacks_are_estimated(tiny_teacher: Path, tmp_path: Path):
    config = config_of(tiny_teacher, write(tmp_path / "a.parquet", texts(20)), table=str(tmp_path / "t"))
    capture(config.capture(str(tmp_path / "t")))
    version = sorted(tmp_path.glob("t/_delta_log/*.json"))
    nothing = estimate(config)
    assert (nothing.documents, nothing.pending, nothing.sequences, nothing.bytes) == (20, 0, 0, 0)
    more = config_of(tiny_teacher, write(tmp_path / "b.parquet", texts(30)), table=str(tmp_path / "t"))
    assert (estimate(more).pending, estimate(more).sequences) == (10, 10)
    assert sorted(tmp_path.glob("t/_delta_log/*.json")) == version


@pytest.mark.parametrize("workers", [1, 2])
def test_a_classifiers_estimate_matches_its_capture(workers: int, tiny_teacher: Path, tmp_path: Path):
    """Every document is one sequence, even if truncated or repeated, and all classes are stored."""
    teacher = {"model": str(save_classifier(tmp_path / "bert", tiny_teacher)), "workers": workers, "device": "cpu"}
    more = {"columns": {"label": "label", "carry": ["source"]}, "shards": {}, "sample": {}}
    once = pq.read_table(save_documents(tmp_path / "d.parquet"))
    again = once.set_column(0, "id", pc.binary_join_element_wise(once["id"], "again", "-"))
    pq.write_table(pa.concat_tables([once, again]), tmp_path / "d.parquet")
    config = config_of(tmp_path, tmp_path / "d.parquet", teacher=teacher, **more)
    found = estimate(config)
    report = capture(config.capture(str(tmp_path / "t")))
    for name in ("sequences", "positions", "bytes"):
        assert getattr(found, name) == pytest.approx(getattr(report, name), rel=0.15), name
    assert [(s.name, s.lost < 1e-6, s.noise) for s in found.selections] == [("all classes", True, 0)]
    assert found.device == "cpu"


def test_an_estimate_with_labels_is_refused(tiny_teacher: Path, tmp_path: Path):
    teacher = {"model": str(tiny_teacher), "labels": ["a", "b"]}
    with pytest.raises(UsageError, match=r"teacher\.labels runs no model"):
        estimate(config_of(tiny_teacher, tmp_path, teacher=teacher, columns={"label": "label"}))


def test_operations_and_gpu_hours_follow_from_the_models_size(tiny_teacher: Path, documents: Path):
    found: Estimate = estimate(config_of(tiny_teacher, documents, gpu="a100", gpu_utilization=0.5))
    weights = 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128) + 512 * 64  # two layers, and the output layer
    assert 2 * weights * found.tokens == pytest.approx(found.flops, rel=0.35)  # attention comes on top
    assert found.gpu_hours == pytest.approx(found.flops / 156e12 / 3600)


def test_the_reported_loss_and_noise_of_a_selection_are_right():
    torch.manual_seed(0)
    logits = torch.randn(40, 300) * 3
    p = logits.double().softmax(1).numpy()
    next_ids, seeds = torch.zeros(40, dtype=torch.int64), torch.arange(40)
    top = select(logits, next_ids, seeds, Selection.of(SelectionConfig(top_k=8)), 300)
    rows = np.repeat(np.arange(40), top.head_counts)
    kept = np.zeros_like(p)
    kept[rows, top.head_ids] = p[rows, top.head_ids]
    rest = 1 - kept.sum(1, keepdims=True)
    target = np.where(kept > 0, kept, rest / (300 - 8))
    np.testing.assert_allclose(bucket_kl(top, 300), (p * np.log(p / target)).sum(1), atol=1e-5)

    same = collisions(logits).double().numpy()
    np.testing.assert_allclose(same, (p**2).sum(1), rtol=1e-4)
    sampled = SelectionConfig(top_p=0.8, max_k=8, draws=20)
    expected, errors = None, []
    for seed in range(200):
        labels = select(logits, next_ids, seeds + 40 * seed, Selection.of(sampled), 300)
        expected = squared_error(labels, same, 20)
        target = np.zeros_like(p)
        target[np.repeat(np.arange(40), labels.head_counts), labels.head_ids] = np.exp(labels.head_logprobs)
        drawn = np.repeat(np.arange(40), labels.tail_counts)
        draws = np.bincount(drawn, labels.tail_draws, 40)
        r = np.exp(labels.tail_log_masses[0])
        target[drawn, labels.tail_ids] += labels.tail_draws * (r / np.maximum(draws, 1))[drawn]
        errors.append(((target - p) ** 2).sum(1))
    np.testing.assert_allclose(np.mean(errors), np.mean(expected), rtol=0.05)
