"""Philox4x32-10, the counter-based generator behind every gate (Salmon et al., SC 2011, "Parallel random
numbers: as easy as 1, 2, 3"; the Random123 library), in plain int64 tensor arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit word of ``multiplier * x``, both below 2**32."""
    # Two 32 x 16-bit products stay below 2**49; the 32 x 32-bit product would overflow a signed int64.
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors, broadcastable, each word in [0, 2**32).
        key: two int64 tensors, broadcastable, each word in [0, 2**32).

    Returns:
        Four int64 tensors of words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIER_0, c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: Tensor, index: Tensor, *, stream: int = 0, rank: int = 0) -> Tensor:
    """Uniform noise of the gates: ``u = ((r >> 9) + 0.5) * 2**-23`` with r the first Philox word.

    key = (seed low, seed high), counter = (index low, index high, stream, rank), in 32-bit words. Both u
    and 1 - u are exact in float32 and never 0 or 1.

    Args:
        seed: (1,) int64, any value.
        index: int64 tensor of any shape, gate indices, on the device of ``seed``.
        stream: the gate vector's position within one call, in [0, 2**32).
        rank: the process whose gates these are, in [0, 2**32); 0 where all ranks share them.

    Returns:
        float32 tensor of the shape of ``index``, in [2**-24, 1 - 2**-24].
    """
    counter = (
        index & _MASK32,
        (index >> 32) & _MASK32,
        torch.full_like(index, stream),
        torch.full_like(index, rank),
    )
    word = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))[0]
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
