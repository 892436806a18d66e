"""Batch normalisation of the open channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_batch_norm
from .._compat import batch_norm
from .._gates import Gates, check_gates


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
