"""The selection against a plain float64 reference, over distributions chosen to break it."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.selection import select as module
from softlabel.pipeline.selection.select import NotADistributionError, position_seeds, select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.codec import trim_log_masses
from softlabel.storage.labels import SoftLabels

pytestmark = pytest.mark.usefixtures("one_thread", "passes")

DEFAULT = Selection.of(SelectionConfig())
TOP_8 = Selection.of(SelectionConfig(top_k=8))
TOP_64 = Selection.of(SelectionConfig(top_k=64))
RS_50 = Selection.of(SelectionConfig(min_k=0, max_k=0, draws=50))
EXACT_HEAD = Selection.of(SelectionConfig(top_p=0.9, min_k=3, max_k=20, draws=0))
WARM = Selection.of(SelectionConfig(temperatures=(1.0, 0.5, 4.0)))
SELECTIONS = {
    "default": DEFAULT,
    "top-8": TOP_8,
    "top-64": TOP_64,
    "rs-50": RS_50,
    "exact head": EXACT_HEAD,
    "temperatures": WARM,
}


def zipf(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Logits that look like a language model's, on a bf16 teacher's coarse grid, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    noise = torch.randn(rows, vocabulary, generator=generator)
    return (20 - 1.3 * (ranks + 1.0).log() + 0.5 * noise).bfloat16()


def hostile() -> dict[str, torch.Tensor]:
    """Rows of 2,000 logits each, by what makes them difficult."""
    V = 2000
    flat, one_hot, few = torch.full((V,), 3.0), torch.full((V,), -40.0), torch.full((V,), -torch.inf)
    one_hot[1234], few[[7, 1500, 1999]] = 12.0, torch.tensor([1.0, 1.0, 0.5])
    blocked = zipf(1, V)[0].float()
    blocked[::2] = -torch.inf
    tied = torch.zeros(V)
    tied[torch.randperm(V, generator=torch.Generator().manual_seed(1))[:300]] = 4.0
    signed_zeros = torch.full((V,), -9.0)
    signed_zeros[[5, 900, 901, 1700]] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    rows = {
        "flat": flat,
        "one-hot": one_hot,
        "certain": torch.where(torch.arange(V) == 9, 1000.0, 0.0),
        "few possible": few,
        "half impossible": blocked,
        "ties at the cut": tied,
        "signed zeros": signed_zeros,
        "far from zero": blocked.nan_to_num(neginf=-5.0) + 1e4,
        "wide": torch.linspace(-300, 300, V),
        "language": zipf(1, V)[0].float(),
    }
    for exponent in range(1, 13):
        tail = zipf(1, V, seed=exponent)[0].float()
        tail[64:] += math.log(10.0**-exponent)
        tail[:64] += 10
        rows[f"tail {exponent}"] = tail
    return rows


def reference_head(logits: np.ndarray, selection: Selection) -> np.ndarray:
    """Ids of one row's head: sorted plainly, in float64."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    order = order[np.isfinite(logits[order])]
    mass = np.cumsum(np.exp(logits[order] - np.logaddexp.reduce(logits)))
    reached = len(order) if selection.top_p == 1 else int(np.searchsorted(mass, selection.top_p)) + 1
    return order[: min(max(reached, selection.min_k), selection.max_k, len(order))]


def run(logits: torch.Tensor, selection: Selection, key: bytes = b"key", vocabulary: int | None = None) -> SoftLabels:
    positions = torch.arange(len(logits))
    next_ids = positions % 7
    seeds = position_seeds(selection, b"teacher", key, positions)
    return select(logits, next_ids, seeds, selection, vocabulary or logits.shape[1])


def split(labels: SoftLabels) -> list[dict[str, np.ndarray]]:
    """The fields of each position."""
    heads, tails = labels.head_counts.cumsum()[:-1], labels.tail_counts.cumsum()[:-1]
    cuts = {
        field.name: np.split(getattr(labels, field.name), heads if field.name.startswith("head") else tails)
        for field in fields(labels)
        if field.name in ("head_ids", "head_logprobs", "tail_ids", "tail_draws", "tail_logprobs")
    }
    return [
        {name: parts[i] for name, parts in cuts.items()}
        | {
            "tail_log_masses": labels.tail_log_masses[:, i],
            "entropies": labels.entropies[i],
            "next_logprobs": labels.next_logprobs[i],
        }
        for i in range(labels.positions)
    ]


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        assert np.array_equal(values, other[name]), name


def assert_is_right(found: dict[str, np.ndarray], row: torch.Tensor, next_id: int, selection: Selection) -> None:
    """One position against the reference."""
    logits = row.double().numpy()
    logprobs = logits - np.logaddexp.reduce(logits)
    head, precision = reference_head(logits, selection), 1e-6 + 1e-7 * np.abs(logits[np.isfinite(logits)]).max()
    np.testing.assert_array_equal(found["head_ids"], head)
    np.testing.assert_allclose(found["head_logprobs"], logprobs[head], rtol=2e-7, atol=precision)
    stored = trim_log_masses(found["tail_log_masses"])
    for temperature, log_mass in zip(selection.temperatures, stored, strict=True):
        outside = np.delete(logits, head) / temperature
        expected = np.logaddexp.reduce(outside, initial=-np.inf) - np.logaddexp.reduce(logits / temperature)
        # From the logits to the table: a relative error of 1e-5 in the mass, plus float32's rounding of its log.
        np.testing.assert_allclose(log_mass, expected, rtol=2e-7, atol=1e-5)
        if len(head) == 0:
            assert log_mass == 0
    possible = np.isfinite(logits)
    entropy = -(np.exp(logprobs[possible]) * logprobs[possible]).sum()
    np.testing.assert_allclose(found["entropies"], entropy, rtol=1e-5, atol=10 * precision)
    np.testing.assert_allclose(found["next_logprobs"], logprobs[next_id], rtol=2e-7, atol=precision)
    mass = np.exp(found["tail_log_masses"][0].astype(np.float64))
    drawn, draws = found["tail_ids"], found["tail_draws"]
    share = selection.draws * mass  # rounded up, and an integer itself where logits are equal
    assert math.ceil(share * (1 - 1e-5)) <= draws.sum() <= min(math.ceil(share * (1 + 1e-5)), selection.draws)
    assert len(set(drawn.tolist())) == len(drawn)
    assert not set(drawn.tolist()) & set(head.tolist())
    assert np.isfinite(logits[drawn]).all()
    assert (draws > 0).all()
    np.testing.assert_array_equal(drawn, drawn[np.lexsort((drawn, -logits[drawn]))])
    np.testing.assert_allclose(found["tail_logprobs"], logprobs[drawn], rtol=2e-7, atol=precision)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("kind", hostile())
def test_hostile_distributions_match_the_reference(name, kind):
    row = hostile()[kind]
    assert_is_right(split(run(row[None], SELECTIONS[name]))[0], row, 0, SELECTIONS[name])


@settings(max_examples=300)
@given(
    st.integers(1, 700),
    st.sampled_from([0.125, 1.0, 2.0]),
    st.floats(0.05, 12),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 0.99901, 0.90007, 0.30003]),  # no k/V of equal logits: there, rounding decides
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(0, 60),
)
def test_random_distributions_and_selections_match_the_reference(
    vocabulary, grid, spread, seed, top_p, min_k, more_k, draws
):
    selection = Selection(top_p, min_k, min_k + more_k, draws, (1.0, 2.0), 0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, vocabulary, generator=generator).mul_(spread).div_(grid).round_().mul_(grid)
    rows[torch.rand(3, vocabulary, generator=generator) < 0.1] = -torch.inf
    rows[:, vocabulary // 2] = 0.0
    labels = select(rows, torch.zeros(3), torch.arange(3), selection, vocabulary)
    for found, row in zip(split(labels), rows, strict=True):
        assert_is_right(found, row, 0, selection)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_padding_is_never_kept_drawn_or_counted(dtype):
    logits = zipf(4, 300).to(dtype)
    padded = torch.cat([logits, torch.full((4, 84), 50.0, dtype=dtype)], dim=1)
    padded[1, 300:] = torch.nan
    for selection in (DEFAULT, TOP_64, RS_50):
        for one, other in zip(
            split(run(padded, selection, vocabulary=300)), split(run(logits, selection)), strict=True
        ):
            assert_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "lay_out",
    [lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, 300:], lambda x: x.repeat(2, 1)[4:]],
    ids=["column after column", "a part of each row", "a part of the rows"],
)
def test_the_memory_layout_of_logits_does_not_matter(dtype, lay_out):
    logits = zipf(4, 300).to(dtype)
    for one, other in zip(split(run(lay_out(logits), DEFAULT)), split(run(logits, DEFAULT)), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_position_does_not_depend_on_other_rows(name, monkeypatch):
    selection, logits = (
        SELECTIONS[name],
        torch.cat([zipf(30, 2000).float(), *(row[None] for row in hostile().values())]),
    )
    P = len(logits)
    positions, next_ids = torch.arange(P), torch.arange(P) % 7
    seeds = position_seeds(selection, b"teacher", b"key", positions)
    together = split(select(logits, next_ids, seeds, selection, 2000))
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    shuffled = split(select(logits[order], next_ids[order], seeds[order], selection, 2000))
    for i, found in zip(order.tolist(), shuffled, strict=True):
        assert_equal(found, together[i])
    monkeypatch.setattr(module, "_ROWS", 7)
    torch.set_num_threads(3)
    for found, expected in zip(split(select(logits, next_ids, seeds, selection, 2000)), together, strict=True):
        assert_equal(found, expected)
    single = split(select(logits[5:6], next_ids[5:6], seeds[5:6], selection, 2000))
    assert_equal(single[0], together[5])


def test_draws_depend_only_on_teacher_key_position_and_seed():
    row = zipf(1, 2000)

    def draws(seed: int = 0, teacher: bytes = b"teacher", key: bytes = b"key", position: int = 0) -> bytes:
        selection = replace(RS_50, seed=seed)
        seeds = position_seeds(selection, teacher, key, torch.tensor([position]))
        labels = select(row, torch.zeros(1), seeds, selection, 2000)
        return labels.tail_ids.tobytes() + labels.tail_draws.tobytes()

    assert draws() == draws()
    others = {draws(), draws(seed=1), draws(teacher=b"other"), draws(key=b"yek"), draws(position=1)}
    assert len(others) == 5
    assert draws(teacher=b"a", key=b"bc") != draws(teacher=b"ab", key=b"c")


def test_a_head_as_large_as_the_vocabulary_leaves_no_tail():
    torch.manual_seed(0)
    labels = run(torch.randn(5, 10), Selection.of(SelectionConfig(top_k=10)))
    assert (labels.head_counts == 10).all()
    assert np.isneginf(labels.tail_log_masses).all()
    assert len(labels.tail_ids) == 0
    more = run(torch.randn(5, 10), Selection.of(SelectionConfig(top_p=1, min_k=10, max_k=50)))
    assert (more.head_counts == 10).all()
    assert np.isneginf(more.tail_log_masses).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SELECTIONS)
def test_an_id_masked_by_the_lowest_number_is_impossible_like_one_of_minus_infinity(name, kind):
    """Models mask ids with -inf or with the lowest number of their dtype."""
    logits = zipf(3, 300).to(kind)
    logits[0, :] = logits[1, 7:] = logits[2, ::2] = -torch.inf
    logits[0, 9] = 1
    impossible, masked = (run(rows, SELECTIONS[name]) for rows in (logits, logits.nan_to_num()))
    assert_equal(vars(masked), vars(impossible))
    assert np.isneginf(impossible.next_logprobs).tolist() == [True, False, True]


def test_an_impossible_next_token_has_probability_zero():
    row = torch.zeros(1, 300)
    row[0, 0] = -torch.inf
    assert np.isneginf(run(row, DEFAULT).next_logprobs).all()


def test_no_positions_give_empty_soft_labels():
    labels = run(torch.zeros(0, 300), WARM)
    assert labels.positions == 0
    assert labels.tail_log_masses.shape == (3, 0)


NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("value", [torch.nan, NEGATIVE_NAN, torch.inf])
def test_the_error_for_non_finite_logits_names_their_rows(value, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 8)
    logits = zipf(20, 300).float()
    logits[11, 299] = logits[13, 0] = value
    with pytest.raises(NotADistributionError, match="positions 11, 13 of the batch") as raised:
        run(logits, DEFAULT)
    assert raised.value.rows == [11, 13]
    logits = zipf(20, 300).float()
    logits[5] = -torch.inf
    with pytest.raises(NotADistributionError) as raised:
        run(logits, TOP_64)
    assert raised.value.rows == [5]


def test_top_k_is_a_shorthand_for_a_head_without_tail():
    assert Selection(1.0, 8, 8, 0, (1.0,), 0) == TOP_8


@pytest.mark.gpu
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_gpu_gives_the_same_selection(name):
    selection, logits = SELECTIONS[name], zipf(50, 3000)
    seeds = position_seeds(selection, b"teacher", b"key", torch.arange(50))
    here, there = (select(logits.to(device), torch.zeros(50), seeds, selection, 3000) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(here.head_ids, there.head_ids)
    np.testing.assert_allclose(here.tail_log_masses, there.tail_log_masses, atol=1e-5)
    assert (here.tail_counts == there.tail_counts).mean() > 0.9  # a draw at a boundary may round to its neighbour
