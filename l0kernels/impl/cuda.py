"""Launchers of the CUDA kernels (csrc/cuda): allocate, hand over addresses, sizes, strides and the stream.

Nothing here waits for the device: extents stay there, results have the capacity that they may need. A kernel that
adds up across its blocks takes `tickets`, words that are 0 between launches.
"""

from __future__ import annotations

from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from ..reference.gates import HardConcrete, round_up
from .packed import Gate

SERVES = frozenset({"sample", "gate_grad", "l0_penalty"})
"""The primitives served here; large products are Triton's."""

TAU = 0.9
"""Open share above which a dimension is taken in natural order: count[1] >= G."""


def _load() -> tuple[Any, str | None]:
    """The extension module, or None and why."""
    if util.find_spec("l0kernels._CUDA") is None:
        return None, "l0kernels._CUDA was not built (no nvcc at installation, or L0KERNELS_CUDA=0)"
    try:
        return import_module("l0kernels._CUDA"), None
    except ImportError as error:
        return None, f"l0kernels._CUDA does not load: {error}"


_CUDA, _why_not_loaded = _load()


def why_not() -> str | None:
    """None where the kernels can run, else the reason."""
    if _CUDA is None:
        return _why_not_loaded
    if torch.version.cuda is None and _CUDA.architectures != "emulated":
        return "this torch has no CUDA"
    return _CUDA.device_error() or None


def _where(t: Tensor) -> tuple[int, int]:
    """Device and current stream of t's device."""
    if t.is_cuda:
        return t.device.index, torch._C._cuda_getCurrentRawStream(t.device.index)
    if _CUDA.architectures != "emulated":
        raise RuntimeError(f"the CUDA kernels serve tensors on a CUDA device, got {t.device}")
    return 0, 0


_dist_key = tuple[float, float, float]


def _constants(dist: HardConcrete) -> _dist_key:
    return dist.beta, dist.gamma, dist.zeta


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, one after the other, in one launch."""
    return _sample(log_alphas, seed, rank, dist, None)


def sample_with_expected(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What sample returns, and the expected number of open gates of every vector, in the same launch."""
    expected = log_alphas[0].new_empty(len(log_alphas))
    return *_sample(log_alphas, seed, rank, dist, expected), expected


def _sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    log_alphas = [a.contiguous() for a in log_alphas]
    first = log_alphas[0]
    sizes = [a.shape[0] for a in log_alphas]
    z = first.new_empty(sum(sizes))
    index = torch.empty(sum(map(round_up, sizes)), dtype=torch.int32, device=first.device)
    count = torch.empty(2 * len(sizes), dtype=torch.int32, device=first.device)
    _CUDA.sample(
        [a.data_ptr() for a in log_alphas],
        sizes,
        first.dtype == torch.float64,
        seed.data_ptr(),
        rank,
        _constants(dist),
        TAU,
        z.data_ptr(),
        index.data_ptr(),
        count.data_ptr(),
        0 if expected is None else expected.data_ptr(),
        _where(first),
    )
    return z, index, count


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, from z alone; exactly 0 where z is 0 or 1."""
    dz, z = dz.contiguous(), z.contiguous()
    out = torch.empty_like(z)
    _CUDA.gate_grad(
        dz.data_ptr(),
        z.data_ptr(),
        out.data_ptr(),
        z.numel(),
        z.dtype == torch.float64,
        _constants(dist),
        _where(z),
    )
    return out
