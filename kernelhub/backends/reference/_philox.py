"""Philox4x32-10 and a 64 x 64 bit high product, on int64 tensors.

Torch has next to no unsigned arithmetic, so a 32-bit word lives in the low half of an int64 and an
unsigned 64-bit product in an int64's bits: multiplication and addition wrap, which gives the same
bits signed and unsigned, and `_high` shifts the sign away.
"""

from __future__ import annotations

from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def _low(x: Tensor) -> Tensor:
    return x & _WORD


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _WORD


def words(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32-bit word of each int64 (two's complement)."""
    return _low(x), _high(x)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of each counter under each key; all words int64 tensors that broadcast.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(product1) ^ c1 ^ k0,
            _low(product1),
            _high(product0) ^ c3 ^ k1,
            _low(product0),
        )
        k0, k1 = _low(k0 + _KEY_STEPS[0]), _low(k1 + _KEY_STEPS[1])
    return c0, c1, c2, c3


def multiply_high(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """High 64 bits of `(low + 2^32 * high) * factor`, unsigned; `factor` is an int64's bits."""
    factor_low, factor_high = words(factor)
    # No sum below passes 2^64: (2^32 - 1)^2 + 2 * (2^32 - 1) = 2^64 - 1.
    middle = high * factor_low + _high(low * factor_low)
    other = low * factor_high + _low(middle)
    return high * factor_high + _high(middle) + _high(other)
