"""The Triton kernels behind the operators, on the device of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .._calls import (
    AttentionCall,
    BlockCall,
    Conv2dCall,
    DrawnMlpCall,
    L0LinearCall,
    L0MlpCall,
    LinearCall,
    MlpCall,
    ProxCall,
    Wanted,
)
from .._gates import HardConcrete
from ..triton_kernels import (
    attention,
    batch_norm,
    budget,
    conv2d,
    conv2d_channels,
    gather,
    linear,
    masked_linear,
    mlp,
    penalty,
)
from ..triton_kernels import prox as proximal
from ..triton_kernels import sample as sampling
from .memory import optional, plain, strided, vector

P = ParamSpec("P")
T = TypeVar("T")

_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype, HardConcrete, Wanted))
_RECORDS = frozenset((LinearCall, L0LinearCall, MlpCall, Conv2dCall, AttentionCall))
_SEVERAL = _RECORDS | {list}


def _readable(arg: Any) -> Any:
    """``arg`` as kernels read it, in memory of its own; vectors are dense: they go there by address alone."""
    kind = type(arg)
    if kind in _VALUES:
        return arg
    if kind is list or kind is tuple:
        return [_readable(a) for a in arg]
    if kind in _RECORDS:
        return tuple.__new__(kind, map(_readable, arg))
    arg = plain(arg)
    strided(arg, "an operand")
    return arg if arg.ndim != 1 or arg.is_contiguous() else arg.contiguous()


def _on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """Triton launches on the current device; a tensor may live on another one."""
    on_device: Callable[..., T] = launcher

    @functools.wraps(launcher)
    def launch(*given: Any) -> T:
        args = [_readable(a) for a in given]
        device = (args[0][0] if type(args[0]) in _SEVERAL else args[0]).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return on_device(*args)
        with torch.cuda.device(device):
            return on_device(*args)

    return cast("Callable[P, T]", launch)


sample = _on_its_device(sampling.sample)
gate_grad = _on_its_device(sampling.gate_grad)
l0_penalty = _on_its_device(penalty.l0_penalty)
masked_weight = _on_its_device(masked_linear.masked_weight)
masked_weight_grad = _on_its_device(masked_linear.masked_weight_grad)
pack_channels = _on_its_device(conv2d_channels.pack_channels)
unpack_channels = _on_its_device(conv2d_channels.unpack_channels)
_batch_norm_forward = _on_its_device(batch_norm.batch_norm_forward)
batch_norm_backward = _on_its_device(batch_norm.batch_norm_backward)
linear_forward = _on_its_device(linear.linear_forward)
linear_backward = _on_its_device(linear.linear_backward)
l0_linear_forward = _on_its_device(gather.l0_linear_forward)
mlp_forward = _on_its_device(mlp.mlp_forward)
mlp_backward = _on_its_device(mlp.mlp_backward)
linear_saved_shapes = linear.linear_saved_shapes
mlp_saved_shapes = mlp.mlp_saved_shapes
conv2d_saved_shapes = conv2d.conv2d_saved_shapes
_block_linear_forward = _on_its_device(masked_linear.block_linear_forward)
_block_linear_backward = _on_its_device(masked_linear.block_linear_backward)
conv2d_forward = _on_its_device(conv2d.conv2d_forward)
conv2d_backward = _on_its_device(conv2d.conv2d_backward)
attention_forward = _on_its_device(attention.attention_forward)
attention_backward = _on_its_device(attention.attention_backward)


def draws_within(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor],
    dtype: torch.dtype,
    activation: str,
) -> bool:
    """Whether l0_linear of this layer draws its gates within the product: small layers do."""
    if len(weights) != 1:
        return False
    M, (n_out, n_in) = x.numel() // max(x.shape[-1], 1), weights[0].shape
    return gather.prefers(M, n_out, n_in, dtype) and all(
        a.dtype == torch.float32 and a.shape[0] <= gather.MAX_GATES for a in log_alphas
    )


def l0_mlp_forward(
    call: L0MlpCall, rank: int = 0
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Of a chain of one layer, for which draws_within may say yes: l0_linear_forward."""
    x, (weight,), (bias,), (log_alpha,), _, seed, dist, dtype = call
    layer = L0LinearCall(x, weight, bias, log_alpha, None, seed, dist, dtype)
    y, z, index, count = l0_linear_forward(layer, rank)
    return y, [], (z, index, count)


def l0_mlp_backward(
    call: DrawnMlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """mlp_backward of l0_mlp_forward, with its gates as it returned them."""
    x, weights, biases, _, z, index, count, activation, dtype = call
    drawn = MlpCall(x, weights, biases, [[z, index, count]], activation, dtype, False)
    return mlp_backward(drawn, dy, saved, wanted)


def block_linear_forward(call: BlockCall) -> Tensor:
    return _block_linear_forward(*call)


def block_linear_backward(call: BlockCall, dy: Tensor, wanted: Wanted) -> list[Tensor | None]:
    x, weight, _, z, b_out, b_in, dtype = call
    return _block_linear_backward(dy, x, weight, z, b_out, b_in, wanted.full[0], dtype, wanted.needs)


def conv2d_memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of y and dx."""
    return torch.channels_last


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


def prox(calls: list[ProxCall], outs: list[Tensor]) -> None:
    """prox.prox; every address as `memory.vector` checks it."""
    for call, out in zip(calls, outs, strict=True):
        x, step, group_step = call[:3]
        device, n = x.device, x.numel()
        vector(x, "x", x.dtype, n, device)
        vector(out, "out", x.dtype, n, device)
        optional(step, "step", torch.float32, n, device)
        optional(group_step, "group_step", torch.float64, call.layout[1], device)
    if not calls:
        return
    device = calls[0].x.device
    if device.type != "cuda" or all(call.x.device.index == torch.cuda.current_device() for call in calls):
        proximal.prox(calls, outs)
        return
    for call, out in zip(calls, outs, strict=True):
        with torch.cuda.device(call.x.device):
            proximal.prox([call], [out])


class BudgetPlan:
    """Steps of some kinds of gates and of a state (l0kernels.budget's), which it holds."""

    def __init__(self, kinds: Sequence[Any], state: Any, ramp_steps: float) -> None:
        self._sizes = [size for kind in kinds for size in kind.sizes]
        self.state, self._device = state, state.moment.device
        n = state.first.numel()
        vector(state.moment, "moment", torch.float32, sum(self._sizes), self._device)
        vector(state.first, "first", torch.float64, n, self._device)
        vector(state.price, "price", torch.float64, n, self._device)
        vector(state.step, "step", torch.int64, 1, self._device)
        vector(state.skipped, "skipped", torch.int64, 1, self._device)
        dists = [dist for kind in kinds for dist in kind.dists()]
        self._plan = budget.plan(kinds, [kind.runs() for kind in kinds], dists, self._device)
        self._ramp_steps, self._limit = ramp_steps, kinds[0].kept.limit

    def step(self, log_alphas: list[Tensor], grads: list[Tensor | None]) -> None:
        """One step of l0kernels.budget's Projection, of log_alphas and state in place; errors as `vector`."""
        own = [None if grad is None else grad.contiguous() for grad in grads]
        for log_alpha, grad, n in zip(log_alphas, own, self._sizes, strict=True):
            vector(log_alpha, "log_alpha", torch.float32, n, self._device)
            optional(grad, "grad", torch.float32, n, self._device)
        with torch.no_grad(), _on(self._device):
            budget.step(self._plan, log_alphas, own, self.state, self._ramp_steps, self._limit)
        torch.autograd.graph.increment_version(log_alphas)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """On which Triton launches."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)
