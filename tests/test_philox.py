"""Philox4x32-10 and the 64 x 64 bit high product against published and exact answers."""

from __future__ import annotations

import random

import pytest
import torch

from kernelhub.backends.reference._philox import multiply_high, philox4x32, words
from kernelhub.contracts.top_k_top_p_sampling_from_probs import _uniform as uniform_in_python

MASK = 2**32 - 1
EDGES = (0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62, 2**63 - 1, -1, -(2**63))


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# The known answers that Random123 publishes for philox4x32-10: counter, key, result.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


@pytest.mark.parametrize("counter, key, result", KNOWN, ids=("zeros", "ones", "pi"))
def test_known_answers(counter: str, key: str, result: str) -> None:
    counter_words, key_words, expected = (
        [int(word, 16) for word in text.split()] for text in (counter, key, result)
    )
    c0, c1, c2, c3 = map(column, counter_words)
    k0, k1 = map(column, key_words)
    got = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in got] == expected
    offset, stream = (low + (high << 32) for low, high in (counter_words[:2], counter_words[2:]))
    seed = key_words[0] + (key_words[1] << 32)
    assert uniform_in_python(seed, offset, stream) == expected[0] + (expected[1] << 32)


def test_vector_equals_python() -> None:
    rng = random.Random(0)
    seeds, offsets, streams = (
        [*EDGES, *(rng.randrange(-(2**63), 2**63) for _ in range(500))] for _ in range(3)
    )
    rng.shuffle(offsets)
    rng.shuffle(streams)
    out = philox4x32((*words(column(*offsets)), *words(column(*streams))), words(column(*seeds)))
    got = [low + (high << 32) for low, high in zip(out[0].tolist(), out[1].tolist(), strict=True)]
    assert got == [uniform_in_python(*each) for each in zip(seeds, offsets, streams, strict=True)]
    assert all(word.min() >= 0 and word.max() <= MASK for word in out)


def test_words_broadcast() -> None:
    many = philox4x32((column(3), column(0), column(*range(50)), column(0)), words(column(9)))
    for stream in (0, 17, 49):
        one = philox4x32((column(3), column(0), column(stream), column(0)), words(column(9)))
        assert [int(word[stream]) for word in many] == [int(word) for word in one]


def test_multiply_high_is_exact() -> None:
    rng = random.Random(1)
    numbers = [x % 2**64 for x in EDGES] + [rng.randrange(2**64) for _ in range(40)]
    pairs = [(u, factor) for u in numbers for factor in numbers]
    low, high = column(*(u & MASK for u, _ in pairs)), column(*(u >> 32 for u, _ in pairs))
    factors = column(*(f - 2**64 if f >= 2**63 else f for _, f in pairs))
    got = [value % 2**64 for value in multiply_high(low, high, factors).tolist()]
    assert got == [(u * factor) >> 64 for u, factor in pairs]
