"""Head and sampled tail are an unbiased estimate of the whole distribution, and these tests detect a biased one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from softlabel.pipeline.selection import select as module
from softlabel.pipeline.selection.selection import Selection
from tests.pipeline.selection.test_select import DEFAULT, RS_50, SELECTIONS, run, split, zipf

pytestmark = pytest.mark.usefixtures("one_thread", "passes")


def estimates(logits: torch.Tensor, selection: Selection, seeds: int) -> np.ndarray:
    """(seeds, V) distribution that head and tail represent, one row per seed."""
    labels = run(logits.expand(seeds, -1), selection)
    found = np.zeros((seeds, logits.shape[-1]))
    for row, part in zip(found, split(labels), strict=True):
        row[part["head_ids"]] = np.exp(part["head_logprobs"].astype(np.float64))
        mass = np.exp(part["tail_log_masses"][0].astype(np.float64))
        row[part["tail_ids"]] = mass * part["tail_draws"] / part["tail_draws"].sum()
    return found


def bias(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest deviation of the mean from the exact probabilities, in standard errors.

    Grouped, since a normal error needs ids that are drawn now and then: the head and the likeliest 20 of the tail
    one by one, the others in 20 groups of like probability, each with the spread that the draws really had.
    """
    order = np.argsort(-exact)
    groups = [order[i : i + 1] for i in range(44)] + np.array_split(order[44:], 20)
    deviations = []
    for group in groups:
        mass, expected = found[:, group].sum(1), exact[group].sum()
        error = mass.std(ddof=1) / math.sqrt(len(found))
        deviations.append(abs(mass.mean() - expected) / (error + 1e-6 * expected))
    return max(deviations)


@pytest.mark.parametrize("name", ["default", "rs-50"])
def test_head_and_tail_are_unbiased(name):
    logits = zipf(1, 3000)
    exact = logits.double().softmax(1)[0].numpy()
    assert bias(estimates(logits, SELECTIONS[name], 400), exact) < 4


def even(scan):
    """Bounds of blocks that count 1 each."""
    return torch.ones_like(scan.block_bounds).cumsum(1)


def uniform_tail(logits, seeds, scan, outside, log_masses, selection):
    """A biased sampler: all ids outside the head are equally likely."""
    outside = torch.where(outside.isfinite(), 0.0, outside)
    flat = scan._replace(values=torch.zeros_like(scan.values), block_bounds=64 * even(scan))
    return DRAW(torch.zeros_like(logits), seeds, flat, outside, log_masses, selection)


def head_drawn_too(logits, seeds, scan, outside, log_masses, selection):
    """A biased sampler: it also draws ids of the head."""
    return DRAW(logits, seeds, scan, scan.values[:, :-1], log_masses, selection)


def blocks_alike(logits, seeds, scan, outside, log_masses, selection):
    """A biased sampler: all blocks are equally likely."""
    blocks = scan.block_bounds.shape[1]
    alike = even(scan) * scan.block_bounds[:, -1:] / blocks
    return DRAW(logits, seeds, scan._replace(block_bounds=alike), outside, log_masses, selection)


DRAW = module._draw


@pytest.mark.parametrize("sampler", [uniform_tail, head_drawn_too, blocks_alike])
def test_a_biased_sampler_is_detected(sampler, monkeypatch):
    logits = zipf(1, 3000).sort(descending=True).values  # so that blocks differ
    exact = logits.double().softmax(1)[0].numpy()
    monkeypatch.setattr(module, "_draw", sampler)
    assert bias(estimates(logits, DEFAULT, 400), exact) > 6


def test_a_renormalized_head_is_detected():
    logits = zipf(1, 3000)
    exact = logits.double().softmax(1)[0].numpy()
    found = estimates(logits, DEFAULT, 400)
    found[:, np.argsort(-exact)[24:]] = 0
    assert bias(found / found.sum(1, keepdims=True), exact) > 6


def test_draws_within_a_block_follow_the_tail():
    """Chi-square of many draws against the exact tail, id by id."""
    logits = torch.linspace(0, -3, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    labels = run(logits.expand(400, -1), replace(RS_50, draws=500))
    drawn = np.bincount(labels.tail_ids, weights=labels.tail_draws, minlength=256)
    expected = 200_000 * logits.double().softmax(0).numpy()
    assert ((drawn - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)
