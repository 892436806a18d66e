"""The Triton kernels behind the operators, on the device of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .._gates import HardConcrete
from ..triton_kernels import batch_norm, conv2d, conv2d_channels, gather, linear, masked_linear, mlp, penalty
from ..triton_kernels import sample as sampling
from .memory import plain, strided

P = ParamSpec("P")
T = TypeVar("T")

_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype, HardConcrete))


def _readable(arg: Any) -> Any:
    """``arg`` as kernels read it, in memory of its own; vectors are dense: they go there by address alone."""
    kind = type(arg)
    if kind in _VALUES:
        return arg
    if kind is list or kind is tuple:
        return [_readable(a) for a in arg]
    arg = plain(arg)
    strided(arg, "an operand", arg.device)
    return arg if arg.ndim != 1 or arg.is_contiguous() else arg.contiguous()


def _on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """Triton launches on the current device; a tensor may live on another one."""
    on_device: Callable[..., T] = launcher

    @functools.wraps(launcher)
    def launch(*given: Any) -> T:
        args = [_readable(a) for a in given]
        device = (args[0] if isinstance(args[0], Tensor) else args[0][0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return on_device(*args)
        with torch.cuda.device(device):
            return on_device(*args)

    return cast("Callable[P, T]", launch)


sample = _on_its_device(sampling.sample)
gate_grad = _on_its_device(sampling.gate_grad)
l0_penalty = _on_its_device(penalty.l0_penalty)
linear_forward = _on_its_device(linear.linear_forward)
linear_backward = _on_its_device(linear.linear_backward)
mlp_forward = _on_its_device(mlp.mlp_forward)
mlp_backward = _on_its_device(mlp.mlp_backward)
masked_weight = _on_its_device(masked_linear.masked_weight)
masked_weight_grad = _on_its_device(masked_linear.masked_weight_grad)
block_linear_forward = _on_its_device(masked_linear.block_linear_forward)
block_linear_backward = _on_its_device(masked_linear.block_linear_backward)
conv2d_forward = _on_its_device(conv2d.conv2d_forward)
conv2d_backward = _on_its_device(conv2d.conv2d_backward)
pack_channels = _on_its_device(conv2d_channels.pack_channels)
unpack_channels = _on_its_device(conv2d_channels.unpack_channels)
_batch_norm_forward = _on_its_device(batch_norm.batch_norm_forward)
batch_norm_backward = _on_its_device(batch_norm.batch_norm_backward)
conv2d_saved_shapes = conv2d.conv2d_saved_shapes
saved_shapes = mlp.saved_shapes
linear_saved_shapes = linear.linear_saved_shapes


def draws_within(x: Tensor, weight: Tensor, log_alphas: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether l0_linear of this layer draws its gates within the product: small layers do."""
    M = x.numel() // max(x.shape[-1], 1)
    return gather.prefers(M, weight.shape[0], weight.shape[1], dtype) and all(
        a.dtype == torch.float32 and a.shape[0] <= gather.MAX_GATES for a in log_alphas
    )


@_on_its_device
def l0_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor,
    rank: int,
    dist: HardConcrete,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw and product in one launch."""
    return gather.l0_linear_forward(
        x, weight, bias, in_log_alpha, out_log_alpha, seed, rank, dist, sampling.TAU, dtype
    )


def l0_mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    log_alphas: list[Tensor | None],
    activation: str,
    seed: Tensor,
    rank: int,
    dist: HardConcrete,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Of a chain of one layer, for which draws_within may say yes: l0_linear_forward."""
    (weight,), (bias,), (log_alpha,) = weights, biases, log_alphas
    y, *gates = l0_linear_forward(x, weight, bias, log_alpha, None, seed, rank, dist, dtype)
    return y, [], (gates[0], gates[1], gates[2])


def l0_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gated: list[bool],
    z: Tensor,
    index: Tensor,
    count: Tensor,
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete,
) -> list[Tensor | None]:
    """mlp_backward of l0_mlp_forward, with its gates as it returned them."""
    gates: list[list[Tensor] | None] = [[z, index, count]]
    return mlp_backward(dy, x, weights, biases, gates, saved, activation, dtype, [False], needs, dist)


def batch_norm_forward(
    x: Tensor,
    gate: list[Tensor] | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """batch_norm.batch_norm_forward; it writes into the running statistics, whatever their strides."""
    dense = [_readable(t) for t in (running_mean, running_var)]
    result = _batch_norm_forward(x, gate, *dense, *rest)
    for t, written in zip((running_mean, running_var), dense, strict=True):
        if t is not None and t is not written:
            t.copy_(written)
    return result
