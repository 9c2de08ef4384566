"""Stateless random numbers, each a function of a seed and a counter, with the same bits on every device.

The generator is splitmix64 in int64 tensors, whose products wrap. It is not cryptographically secure.
Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import hashlib

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = (constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Constants of splitmix64, as int64 with the same bits."""


def seed(*parts: bytes) -> int:
    """An int64 seed from all parts that the numbers should depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def bits(seeds: Tensor | int, counters: Tensor) -> Tensor:
    """int64 with 64 random bits: each seed's stream at a counter (from 0)."""
    states = (counters.long() + 1) * _STEP + seeds
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # >> copies the sign bit; the mask makes it an unsigned shift.
        states = (states ^ ((states >> shift) & (2 ** (64 - shift) - 1))) * factor
    return states


def uniform(seeds: Tensor | int, counters: Tensor) -> Tensor:
    """float64 strictly between 0 and 1: each seed's stream at a counter (from 0)."""
    mantissas = (bits(seeds, counters) >> 12) & (2**52 - 1)
    return (mantissas.to(torch.float64) + 0.5) * 2.0**-52
