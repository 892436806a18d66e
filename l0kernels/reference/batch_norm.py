"""Batch normalisation of the open channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks
from .gates import Gates, check_gates


def check_batch_norm(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """Checks of ``x (N, channels, ...)``, of which a packed one holds fewer, and of vectors (channels,)."""
    _checks.check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, channels, ...), got {tuple(x.shape)}")
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if value is not None:
            _checks.check_floating(name, value)
            _checks.check_shape(name, value, (channels,), "one per channel of x")
            _checks.check_device(name, value, x.device, "x")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None, got one")
    if not training and running_mean is None:
        raise ValueError("running_mean must be given where training is False, got None")
    _checks.check_number("momentum", momentum)
    _checks.check_number("eps", eps)
    if training and math.prod(x.shape[:1] + x.shape[2:]) == 1:
        raise ValueError(
            f"x must hold more than one value per channel where training is True, got {tuple(x.shape)}"
        )


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The products with weight and bias of no channel at all, which torch's batch_norm refuses to see."""
    for t in (weight, bias):
        x = x if t is None else (x * t.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)
    return x


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's batch_norm for any number of forwards before a backward, any strides, and no channel at all."""
    if x.shape[1] == 0:
        return affine(x, weight, bias)
    eager = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None
    if running_mean is not None and running_var is not None and eager:
        if training:
            # Autograd keeps them though backward does not read them, and another forward changes them.
            running_mean, running_var = running_mean.data, running_var.data
        elif torch.is_grad_enabled():  # here backward reads them
            running_mean, running_var = running_mean.clone(), running_var.clone()
    one_image = x.shape[0] == 1 and x.stride(0) != x.numel()
    if (one_image or 1 in x.shape[2:]) and not x.is_contiguous():
        # A view may have any stride where there is one. torch's backward takes that for what tells channels
        # last from channels first, and then mixes up the channels of x and of dy.
        x = x.contiguous()
    if not training and running_mean is not None and running_var is not None:  # which it reads as if dense
        running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    return torch.nn.functional.batch_norm(
        x,
        running_mean,
        running_var,
        None if weight is None else weight.contiguous(),
        bias,
        training,
        momentum,
        eps,
    )


def select(is_open: Tensor, value: Tensor | None, other: float) -> Tensor | None:
    """`value` of the open channels, `other` in the closed ones: whatever those hold."""
    return None if value is None else torch.where(is_open, value, other)


def gated_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    gates: Gates | None = None,
) -> Tensor:
    """Batch normalisation of the channels that the gates leave open, exactly 0 in the others.

    torch: ``F.batch_norm(x[:, open], running_mean[open], ...)`` spread over the channels. Closed channels
    keep their running statistics. The gates only select: z multiplies nothing and gets no gradient.

    Args:
        x: (N, channels, ...) any float dtype.
        running_mean, running_var: (channels,), changed in place where training is True, or None.
        weight, bias: (channels,) or None.
        training, momentum, eps: as torch.nn.functional.batch_norm.
        gates: of the channels, or None: all are open.

    Returns:
        y of the shape and dtype of x.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, device or number of gates, no statistics to evaluate with, or one value per
            channel to train on.
    """
    channels = x.shape[1] if isinstance(x, Tensor) and x.ndim > 1 else 0
    check_batch_norm(x, channels, running_mean, running_var, weight, bias, training, momentum, eps)
    if gates is None:
        return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    check_gates("gates", gates, channels, x.device, "channel of x")
    opened = (gates.z.detach() != 0).nonzero()[:, 0]
    mean, var, w, b = (
        None if t is None else t.index_select(0, opened) for t in (running_mean, running_var, weight, bias)
    )
    some = x.index_select(1, opened)
    y = batch_norm(some, mean, var, w, b, training, momentum, eps)
    if (
        training
        and running_mean is not None
        and running_var is not None
        and mean is not None
        and var is not None
    ):
        with torch.no_grad():
            running_mean.index_copy_(0, opened, mean)
            running_var.index_copy_(0, opened, var)
    return torch.zeros_like(x).index_copy(1, opened, y)
