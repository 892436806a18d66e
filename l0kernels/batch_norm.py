"""Batch normalisation that keeps closed channels closed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _ops, _registry, reference
from ._arguments import check_batch_norm
from ._autograd import apply
from ._compat import batch_norm
from ._gates import Gates, check_gates
from .conv2d import STATIC, Packed, is_exact, open_order
from .impl import module


class _BatchNorm(torch.autograd.Function):
    """Of packed channels whose number the device alone knows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        gates: Gates,
        training: bool,
        momentum: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        gate = list(gates[:3])
        y, mean, rstd = module(backend).batch_norm_forward(
            x, gate, running_mean, running_var, weight, bias, training, momentum, eps
        )
        ctx.save_for_backward(x, mean, rstd, weight, *gate)
        ctx.settings = (training, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("gated_batch_norm")
        x, mean, rstd, weight, *gate = ctx.saved_tensors
        training, backend = ctx.settings
        needs = list(ctx.needs_input_grad[:3])
        grads = module(backend).batch_norm_backward(dy, x, gate, mean, rstd, weight, training, needs)
        return *grads, *[None] * 7


def select(is_open: Tensor, value: Tensor | None, other: float) -> Tensor | None:
    """`value` of the open channels, `other` in the closed ones: whatever those hold."""
    return None if value is None else torch.where(is_open, value, other)


def gated_batch_norm(
    x: Tensor | Packed,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    gates: Gates | None = None,
) -> Tensor | Packed:
    """Batch normalisation of the channels that the gates leave open, exactly 0 in the others.

    torch: ``F.batch_norm(x[:, open], running_mean[open], ...)`` spread over the channels. Closed channels
    keep their running statistics. The gates only select: z multiplies nothing and gets no gradient. (A gate
    that multiplies in front of a batch norm loses its gradient: the norm divides it away. Gate what follows.)

    Args:
        x: (N, channels, ...) any float dtype; or Packed, of which only the open channels are there.
        running_mean, running_var: (channels,), changed in place where training is True, or None.
        weight, bias: (channels,) or None.
        training, momentum, eps: as torch.nn.functional.batch_norm.
        gates: of the channels of a dense x, or None: all are open.

    Returns:
        y as x came: a tensor of its shape and dtype, or Packed by the same gates.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, device or number of gates, gates beside a Packed x, no statistics to
            evaluate with, or one value per channel to train on.
        RuntimeError: the requested backend cannot serve the call.
    """
    statistics = (running_mean, running_var, weight, bias, training, momentum, eps)
    if isinstance(x, Packed):
        if gates is not None:
            raise ValueError("gates must be None for a Packed x, which has its own, got Gates")
        check_batch_norm(x.data, x.channels, *statistics)
        return replace(x, data=_packed(x, *statistics))
    channels = x.shape[1] if isinstance(x, Tensor) and x.ndim > 1 and not x.is_nested else 0
    check_batch_norm(x, channels, *statistics)
    if gates is None:
        return batch_norm(x, *statistics)
    check_gates("gates", gates, channels, x.device, "channel of x")
    if _registry.resolve(x.device, x.dtype, "gated_batch_norm") == "reference":
        return reference.gated_batch_norm(x, *statistics, gates=gates)
    return _dense(x, gates.z.detach() != 0, *statistics)


def _dense(
    x: Tensor,
    is_open: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Channels are independent: all are normalised, in static shapes, and the closed ones scaled by 0.

    Whatever a closed channel holds, in x or in the vectors, stays out.
    """
    x = x.masked_fill(~is_open.view(-1, *[1] * (x.ndim - 2)), 0)
    mean, var = select(is_open, running_mean, 0), select(is_open, running_var, 1)
    if weight is None:
        w: Tensor | None = is_open.to(x.dtype if mean is None else mean.dtype)
    else:
        w = select(is_open, weight, 0)
    y = batch_norm(x, mean, var, w, select(is_open, bias, 0), training, momentum, eps)
    if training:
        for running, value in ((running_mean, mean), (running_var, var)):
            if running is not None and value is not None:
                running.copy_(torch.where(is_open, value, running))
    return y


def _packed(
    x: Packed,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if x.backend == STATIC:
        is_open = x.gates.z != 0
        return _dense(x.data, is_open, running_mean, running_var, weight, bias, training, momentum, eps)
    if not is_exact(x.backend):
        return apply(
            _BatchNorm,
            x.data,
            weight,
            bias,
            running_mean,
            running_var,
            x.gates,
            training,
            momentum,
            eps,
            x.backend,
        )
    index = open_order(x.gates)
    if index is None:
        return batch_norm(x.data, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, w, b = (
        None if t is None else t.index_select(0, index) for t in (running_mean, running_var, weight, bias)
    )
    y = batch_norm(x.data, mean, var, w, b, training, momentum, eps)
    if (
        training
        and running_mean is not None
        and running_var is not None
        and mean is not None
        and var is not None
    ):
        running_mean.index_copy_(0, index, mean)
        running_var.index_copy_(0, index, var)
    return y
