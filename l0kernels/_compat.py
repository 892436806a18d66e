"""torch's own operations where they need help: what they get wrong of some strides and sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def settled(x: Tensor, groups: int) -> Tensor:
    """x (N, C, H, W) in strides that torch's grouped convolution reads right.

    A single image may have any batch stride. Where that is a view's and channels come last, in x and in the
    weight, torch gets the weight's gradient wrong.
    """
    if groups == 1 or x.ndim != 4 or x.shape[0] != 1 or torch.compiler.is_compiling():
        return x
    if x.is_contiguous() or x.stride(0) == x.numel():
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
