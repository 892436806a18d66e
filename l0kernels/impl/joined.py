"""What the launchers of both extensions tell their kernels alike: numbers of types, constants, joined gates.

The gates of a call are as sample returns them: z, index and count of all vectors, one after the other.
Kernels take them apart by address; a view per vector would cost the host more than the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._gates import HardConcrete, round_up
from .memory import fresh, vector

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "silu": 3}


def constants(dist: HardConcrete) -> tuple[float, float, float]:
    return dist.beta, dist.gamma, dist.zeta


def empty(log_alphas: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised z, index and count for gates of these log_alphas."""
    first, sizes = log_alphas[0], [a.shape[0] for a in log_alphas]
    return (
        first.new_empty(sum(sizes)),
        torch.empty(sum(map(round_up, sizes)), dtype=torch.int32, device=first.device),
        torch.empty(2 * len(sizes), dtype=torch.int32, device=first.device),
    )


def sizes(log_alphas: Sequence[Tensor | None], units: Sequence[int]) -> list[int | None]:
    """The sizes of the gates drawn from these log_alphas; ``units``: of what they gate."""
    for a, n in zip(log_alphas, units, strict=True):
        if a is not None and a.numel() != n:
            raise ValueError(f"log_alpha must have {n} elements, one per unit of the weight, got {a.numel()}")
    return [None if a is None else n for a, n in zip(log_alphas, units, strict=True)]


def addresses(
    z: Tensor,
    index: Tensor,
    count: Tensor,
    sizes: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    are_fresh: bool = False,
) -> list[tuple[int, int, int, int] | None]:
    """Of z, index and count of each vector, and its size; None where ``sizes`` has none.

    ``dtype``: of z; ``device``: as in memory.vector; ``are_fresh``: whether ``empty`` has just made them.
    """
    if are_fresh:
        at_z, at_index, at_count = fresh(z), fresh(index), fresh(count)
    else:
        given = [n for n in sizes if n is not None]
        at_z = vector(z, "z", dtype, sum(given), device)
        at_index = vector(index, "index", torch.int32, sum(map(round_up, given)), device)
        at_count = vector(count, "count", torch.int32, 2 * len(given), device)
    itemsize = z.element_size()
    found: list[tuple[int, int, int, int] | None] = []
    for n in sizes:
        if n is None:
            found.append(None)
            continue
        found.append((at_z, at_index, at_count, n))
        at_z, at_index, at_count = at_z + itemsize * n, at_index + 4 * round_up(n), at_count + 8
    return found
