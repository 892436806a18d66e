"""Batch normalisation of the channels that exist, on a CPU by csrc/batch_norm.h: one call for what torch's
operations do in ten, which gather the vectors of all channels and scatter them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._checks import PLAIN
from .._native import native as _C
from .memory import empty_grad, fresh, images, vector


class Channels(NamedTuple):
    """Which channels there are.

    Attributes:
        exist: (n,) int64, which of all channels these are, None: all.
        updated: int64, which of these n move their running statistics, None: all.
    """

    exist: Tensor | None
    updated: Tensor | None


class Settings(NamedTuple):
    """training, momentum and eps as of torch's batch_norm; size: the number of all channels."""

    training: bool
    momentum: float
    eps: float
    size: int


def serves(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether rows of channels, or images, of this dtype are normalised here, by vectors of the same one."""
    dtype = x.dtype
    if _C is None or dtype not in (torch.float32, torch.float64) or x.ndim not in (2, 4):
        return False
    for v in vectors:
        if v is not None and (type(v) not in PLAIN or v.dtype is not dtype or not v.is_contiguous()):
            return False
    return x.numel() > x.shape[1]  # torch refuses to train on one value a channel


def as_rows(x: Tensor) -> Tensor:
    """x (N, C) or (N, C, H, W) whose memory is that of a matrix with a column a channel."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _rows(x: Tensor, name: str, like: Tensor) -> int:
    """The address of x, which is to have the shape and dtype of `like`."""
    if x.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(x.shape)}")
    return images(x, name, like.dtype) if x.ndim == 4 else vector(x, name, like.dtype, like.numel())


def _optional(value: Tensor | None, name: str, dtype: torch.dtype, size: int) -> int:
    return 0 if value is None else vector(value, name, dtype, size)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Channels,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """y of x as :func:`as_rows` makes it, and (2, n): mean and 1 / sqrt(variance + eps).

    In training the running statistics change in place.
    """
    n, (training, momentum, eps, size) = x.shape[1], settings
    index, updated = channels
    dtype = x.dtype
    moved = n if updated is None else updated.numel()
    y, statistics = torch.empty_like(x), torch.empty((2, n), dtype=dtype, device=x.device)
    mean = fresh(statistics)
    _C.batch_norm(
        dtype is torch.float64,
        x.numel() // n,
        n,
        size,
        _optional(index, "index", torch.int64, n),
        training,
        _rows(x, "x", x),
        _optional(weight, "weight", dtype, size),
        _optional(bias, "bias", dtype, size),
        mean,
        mean + n * x.element_size(),
        eps,
        fresh(y),
        _optional(running_mean, "running_mean", dtype, size),
        _optional(running_var, "running_var", dtype, size),
        momentum,
        _optional(updated, "updated", torch.int64, moved),
        moved,
        0,
        0,
        0,
        0,
        torch.get_num_threads(),
    )
    if training and running_mean is not None and running_var is not None:
        increment_version([running_mean, running_var])
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    index: Tensor | None,
    settings: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, and dweight and dbias of all channels; `needs`: which of them are wanted."""
    n, (training, _, eps, size) = x.shape[1], settings
    dx = torch.empty_like(x) if needs[0] else None
    dweight = empty_grad(weight) if needs[1] and weight is not None else None
    dbias = x.new_empty(size) if needs[2] else None
    mean = vector(statistics, "statistics", x.dtype, 2 * n)
    _C.batch_norm(
        x.dtype is torch.float64,
        x.numel() // n,
        n,
        size,
        _optional(index, "index", torch.int64, n),
        training,
        _rows(x, "x", x),
        _optional(weight, "weight", x.dtype, size),
        0,
        mean,
        mean + n * x.element_size(),
        eps,
        0,
        0,
        0,
        0.0,
        0,
        0,
        _rows(dy, "dy", x),
        fresh(dx),
        fresh(dweight),
        fresh(dbias),
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
