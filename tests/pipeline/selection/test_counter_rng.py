import numpy as np
import torch

from softlabel.pipeline.selection import counter_rng as counters


def test_the_generator_is_splitmix64():
    """The first numbers of the published reference from state 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % 2**64 for number in counters.bits(1234567, torch.arange(3)).tolist()] == expected


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    numbers = counters.uniform(torch.arange(100)[:, None], torch.arange(1000)).flatten().numpy()
    assert numbers.min() > 0
    assert numbers.max() < 1
    filled = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((filled - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)


def test_a_seed_depends_on_the_boundaries_of_its_parts():
    assert counters.seed(b"a", b"bc") != counters.seed(b"ab", b"c")
    assert counters.seed(b"a") == counters.seed(b"a")
    assert -(2**63) <= counters.seed(b"a") < 2**63
