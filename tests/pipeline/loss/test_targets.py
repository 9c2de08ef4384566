import numpy as np
import pytest
import torch

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.targets import CompactTargets, TokenIds, decode_targets, resolve_target
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.codec import decode as decode_rows
from softlabel.storage.codec import encode
from softlabel.storage.errors import UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SOFT_LABELS
from tests.numberings import random_numbering

V = 97
TEMPERATURES = (1.0, 2.0)
NUMBERING = random_numbering(V)


def rows_of(labels: SoftLabels):
    return encode(labels, np.array([labels.positions]), NUMBERING)


def compact_of(labels: SoftLabels) -> CompactTargets:
    rows = rows_of(labels)
    flat = {name: torch.from_numpy(rows[name].chunk(0).flatten().to_numpy().copy()) for name in SOFT_LABELS.names}
    flat["tail_log_masses"] = flat["tail_log_masses"].reshape(labels.positions, -1).T
    return CompactTargets(**flat)


def capture(logits, seed=0, **selection) -> SoftLabels:
    chosen = Selection.of(SelectionConfig(temperatures=TEMPERATURES, **selection))
    seeds = torch.arange(len(logits)) + 1000 * seed
    return select(logits.float(), torch.zeros(len(logits), dtype=torch.int64), seeds, chosen, V)


def decoded(labels, max_k=None, **loss):
    return decode_targets(compact_of(labels), TokenIds(NUMBERING), TEMPERATURES, LossConfig(**loss), max_k)


def dense(targets):
    """(N, V) target probabilities of the ids."""
    return torch.zeros(len(targets.ids), V).scatter_add(1, targets.ids, targets.logprobs.exp())


@pytest.fixture(scope="module")
def logits():
    return 3 * torch.randn(40, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_bucket_target_is_the_head_and_the_stored_mass_of_its_temperature(logits, temperature):
    labels = capture(logits, top_k=8)
    targets = decoded(labels, temperature=temperature)
    p = (logits / temperature).softmax(1)
    head = p.topk(8, 1)
    assert targets.target == "bucket"
    torch.testing.assert_close(targets.log_rest.exp(), 1 - head.values.sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(dense(targets).gather(1, head.indices), head.values, rtol=0.02, atol=0)
    total = targets.logprobs.exp().sum(1) + targets.log_rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("selection", [{"top_k": 8}, {}, {"max_k": 0, "min_k": 0, "draws": 20}])
def test_the_head_equals_the_one_that_the_storage_decodes(logits, selection):
    labels = capture(logits, **selection)
    stored = decode_rows(rows_of(labels), NUMBERING)
    targets = decoded(labels, target="bucket")
    kept = targets.logprobs.isfinite()
    assert kept.sum(1).tolist() == stored.head_counts.tolist()
    assert targets.ids[kept].tolist() == stored.head_ids.tolist()
    np.testing.assert_allclose(targets.logprobs[kept], stored.head_logprobs, atol=1e-5)
    np.testing.assert_allclose(targets.entropies, stored.entropies)


def test_a_sampled_target_is_unbiased():
    """The mean over many seeds of the draws is the dense distribution, within 5 standard errors."""
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    seeds = 2000
    labels = capture(logits.expand(seeds, V), top_p=0.5, max_k=4, draws=12)
    targets = decoded(labels)
    assert targets.target == "sampled"
    assert (targets.log_rest == -torch.inf).all()
    samples = dense(targets).double()
    torch.testing.assert_close(samples.sum(1), torch.ones(seeds, dtype=torch.float64), atol=1e-4, rtol=0)
    p = logits.double().softmax(1)[0]
    head = torch.zeros(V, dtype=torch.bool)
    head[labels.head_ids[: labels.head_counts[0]]] = True
    errors = (samples.mean(0) - p)[~head] / (samples.std(0)[~head] / seeds**0.5).clamp(min=1e-5)
    assert errors.abs().max() < 5
    torch.testing.assert_close(samples.mean(0)[head], p[head], rtol=0.02, atol=0)


def test_pure_sampling_has_no_head_and_a_bucket_of_everything(logits):
    labels = capture(logits, max_k=0, min_k=0, draws=20)
    torch.testing.assert_close(dense(decoded(labels)).sum(1), torch.ones(40))
    bucket = decoded(labels, target="bucket")
    assert bucket.ids.shape == (40, 0)
    assert (bucket.log_rest == 0).all()


def test_renormalized_and_zero_tail_targets_have_no_bucket(logits):
    labels = capture(logits, top_k=8)
    renormalized, zero_tail = decoded(labels, target="renormalized"), decoded(labels, target="zero_tail")
    bucket = decoded(labels, target="bucket")
    torch.testing.assert_close(dense(renormalized).sum(1), torch.ones(40))
    torch.testing.assert_close(zero_tail.logprobs, bucket.logprobs)
    assert (torch.stack([renormalized.log_rest, zero_tail.log_rest]) == -torch.inf).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_max_k_moves_the_mass_of_dropped_ids_to_the_bucket(logits, temperature):
    narrow = decoded(capture(logits, top_k=8), max_k=3, temperature=temperature)
    stored = decoded(capture(logits, top_k=3), temperature=temperature)
    assert narrow.ids.equal(stored.ids)
    torch.testing.assert_close(narrow.log_rest, stored.log_rest, atol=1 / 64, rtol=0)
    total = narrow.logprobs.exp().sum(1) + narrow.log_rest.exp()
    torch.testing.assert_close(total, torch.ones(40))
    wide = decoded(capture(logits, top_k=3), max_k=50)
    assert wide.ids.shape == (40, 3)


def test_a_head_of_all_ids_has_an_empty_bucket():
    targets = decoded(capture(torch.randn(5, V), top_k=V))
    assert (targets.log_rest == -torch.inf).all()
    torch.testing.assert_close(dense(targets).sum(1), torch.ones(5))


def test_an_id_of_probability_zero_stays_at_zero():
    logits = torch.full((3, V), -torch.inf)
    logits[:, :2] = torch.tensor([0.0, 1.0])
    for temperature in TEMPERATURES:
        targets = decoded(capture(logits, top_k=4), temperature=temperature)
        assert not targets.logprobs.isnan().any()
        torch.testing.assert_close(dense(targets)[:, :2], (logits / temperature).softmax(1)[:, :2], rtol=0.02, atol=0)


def test_sums_over_many_positions_stay_exact():
    """The running sum passes both what an int16 holds and what a float32 counts exactly."""
    count = 30_000
    logits = torch.tensor([0.0, -1.0, -400.0, -500.0]).repeat(count, 1)
    labels = SoftLabels(
        head_counts=np.full(count, 4, np.int32),
        head_ids=np.tile(np.arange(4, dtype=np.int32), count),
        head_logprobs=logits.log_softmax(1).numpy().ravel(),
        tail_counts=np.zeros(count, np.int32),
        tail_ids=np.zeros(0, np.int32),
        tail_draws=np.zeros(0, np.int32),
        tail_logprobs=np.zeros(0, np.float32),
        tail_log_masses=np.full((2, count), -np.inf, np.float32),
        entropies=np.zeros(count, np.float32),
        next_logprobs=np.zeros(count, np.float32),
    )
    logprobs = decoded(labels).logprobs
    assert (logprobs == logprobs[0]).all()
    torch.testing.assert_close(logprobs[-1], logits[-1].log_softmax(0), atol=1 / 64, rtol=0)


def test_no_positions_decode_to_nothing():
    empty = decoded(capture(torch.randn(3, V), top_k=4))[:0]
    assert empty.ids.shape == (0, 4)
    none = compact_of(capture(torch.randn(1, V), top_k=4))
    none = CompactTargets(**{name: getattr(none, name)[..., :0] for name in SOFT_LABELS.names}).to("cpu")
    assert decode_targets(none, TokenIds(NUMBERING), TEMPERATURES, LossConfig()).ids.shape == (0, 0)


def test_a_batch_without_tail_mass_does_not_count_as_a_table_without_draws():
    labels = capture(torch.randn(5, V), top_p=1.0, max_k=V, draws=5)
    assert decoded(labels, target="sampled").target == "sampled"
    with pytest.raises(UsageError, match="a table without a sampled tail"):
        decoded(capture(torch.randn(5, V), top_k=5), target="sampled")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "sampled"),
        ({"temperature": 2.0}, "bucket"),
        ({"divergence": "jsd"}, "bucket"),
        ({"target": "bucket"}, "bucket"),
        ({"target": "sampled"}, "sampled"),
    ],
)
def test_auto_uses_the_draws_where_they_are_unbiased(settings, expected):
    assert resolve_target(LossConfig(**settings), TEMPERATURES, draws=True) == expected
    if settings.get("target") != "sampled":
        assert resolve_target(LossConfig(**settings), TEMPERATURES, draws=False) == "bucket"


@pytest.mark.parametrize(
    ("settings", "draws", "max_k", "message"),
    [
        ({"temperature": 4.0}, True, None, "one of 1, 2"),
        ({"target": "sampled", "temperature": 2.0}, True, None, "sampled at temperature 1"),
        ({"target": "sampled", "divergence": "jsd"}, True, None, "only unbiased for forward_kl"),
        ({"target": "sampled"}, False, None, "without a sampled tail"),
        ({"target": "sampled"}, True, 4, "max_k: 4"),
        ({"target": "renormalized", "divergence": "reverse_kl"}, True, None, "infinite"),
        ({"target": "zero_tail", "divergence": "reverse_kl"}, True, None, "infinite"),
    ],
)
def test_a_target_that_the_table_or_divergence_does_not_support_is_refused(settings, draws, max_k, message):
    with pytest.raises(UsageError, match=message):
        resolve_target(LossConfig(**settings), TEMPERATURES, draws, max_k)
