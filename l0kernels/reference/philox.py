"""Philox4x32-10, the counter-based generator behind every gate (Salmon et al., SC 2011, "Parallel random
numbers: as easy as 1, 2, 3"; the Random123 library), in plain int64 tensor arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _pair(values: tuple[int, int], like: Tensor) -> Tensor:
    """Two constants as (2, 1, ...), filled on the device: torch.tensor would copy them there and wait."""
    filled = [torch.full((1,) * (like.ndim - 1), v, dtype=torch.int64, device=like.device) for v in values]
    return torch.stack(filled)


def _mul_hi_lo(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit word of ``a * b``, both below 2**32."""
    # Two 32 x 16-bit products stay below 2**49; the 32 x 32-bit product would overflow a signed int64.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: (4, ...) int64, words in [0, 2**32).
        key: (2, ...) int64, words in [0, 2**32), as many dimensions as counter and broadcastable to it.

    Returns:
        (4, ...) int64, words in [0, 2**32).
    """
    multipliers, weyl = _pair(_MULTIPLIERS, counter), _pair(_WEYL, counter)
    even, odd = counter[0::2], counter[1::2]
    for i in range(_ROUNDS):
        high, low = _mul_hi_lo(multipliers, even)
        even, odd = high.flip(0) ^ odd ^ ((key + i * weyl) & _MASK32), low.flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seed: Tensor, index: Tensor, *, stream: int | Tensor = 0, rank: int = 0) -> Tensor:
    """Uniform noise of the gates: ``u = ((r >> 9) + 0.5) * 2**-23`` with r the first Philox word.

    key = (seed low, seed high), counter = (index low, index high, stream, rank), in 32-bit words. Both u
    and 1 - u are exact in float32 and never 0 or 1.

    Args:
        seed: (1,) int64, any value.
        index: int64 tensor of any shape, gate indices, on the device of ``seed``.
        stream: the gate vector's position within one call, in [0, 2**32), or an int64 tensor of such in the
            shape of ``index``.
        rank: the process whose gates these are, in [0, 2**32); 0 where all ranks share them.

    Returns:
        float32 tensor of the shape of ``index``, in [2**-24, 1 - 2**-24].
    """
    streams = stream if isinstance(stream, Tensor) else torch.full_like(index, stream)
    counter = torch.stack((index & _MASK32, (index >> 32) & _MASK32, streams, torch.full_like(index, rank)))
    key = torch.stack((seed & _MASK32, (seed >> 32) & _MASK32)).reshape(2, *[1] * index.ndim)
    word = philox4x32(counter, key)[0]
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
