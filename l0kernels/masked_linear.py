"""Gates finer than rows and columns: per weight (saves memory, not time) or per block of weights (skips)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops, _registry, reference
from ._arguments import check_masked
from ._autograd import apply
from ._calls import BlockCall, LinearCall, Wanted
from ._gates import DEFAULT_DIST, HardConcrete, expand_blocks, scale
from .gates import check_draw, eval_weight_gates, sample_gates
from .linear import as_rows, compute_dtype, gated_linear, like_rows


class _MaskedLinear(torch.autograd.Function):
    """y = x (W * z)^T + b with z drawn from the seed, forward and again backward: no z is stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_alpha: Tensor,
        seed: Tensor,
        dist: HardConcrete,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        masked = _ops.masked_weight(weight, log_alpha, seed, dist, backend)
        (y,) = _ops.gated_linear(LinearCall(as_rows(x), masked, bias, None, None, False, dtype), backend)
        ctx.save_for_backward(x, weight, bias, log_alpha, seed)
        ctx.options = (dist, dtype, backend)
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("masked_linear")
        x, weight, bias, log_alpha, seed = ctx.saved_tensors
        dist, dtype, backend = ctx.options
        needs_x, needs_w, needs_b, needs_log_alpha = ctx.needs_input_grad[:4]
        masked = _ops.masked_weight(weight, log_alpha, seed, dist, backend)
        grad_needed = needs_w or needs_log_alpha
        call = LinearCall(as_rows(x), masked, bias, None, None, False, dtype)
        wanted = Wanted([False, False], [needs_x, grad_needed, needs_b, False, False], None)
        dx, grad, db, _, _ = _ops.gated_linear_backward(as_rows(dy), call, [], wanted, backend)
        dw = dlog_alpha = None
        if grad_needed:
            dw, dlog_alpha = _ops.masked_weight_grad(
                grad, weight, log_alpha, seed, dist, needs_w, needs_log_alpha, backend
            )
        return (
            dx.view(x.shape) if needs_x else None,
            dw if needs_w else None,
            db if needs_b else None,
            dlog_alpha if needs_log_alpha else None,
            *[None] * 4,
        )


class _BlockLinear(torch.autograd.Function):
    """y = x (W * Z)^T + b, Z the gates z spread over blocks; closed blocks are skipped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor,
        block: tuple[int, int],
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        y = _ops.block_linear(BlockCall(as_rows(x), weight, bias, z, *block, dtype), backend)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.options = (block, dtype, backend)
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("masked_linear")
        x, weight, bias, z = ctx.saved_tensors
        (b_out, b_in), dtype, backend = ctx.options
        needs = list(ctx.needs_input_grad[:4])
        call = BlockCall(as_rows(x), weight, bias, z, b_out, b_in, dtype)
        grads = _ops.block_linear_backward(as_rows(dy), call, Wanted([False], needs, None), backend)
        dx, dw, db, dz = (g if n else None for g, n in zip(grads, needs, strict=True))
        return None if dx is None else dx.view(x.shape), dw, db, dz, None, None, None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    *,
    block: tuple[int, int] | None = None,
    seed: Tensor | None = None,
    mode: str | None = None,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Linear layer with a gate per weight or per block of weights: ``y = x (W * z)^T + b``.

    torch: ``F.linear(x, weight * z, bias)``. The bias is ungated. A gate's noise has its row-major position
    in log_alpha for index, and stream 0. Gates per weight save memory, not time: z is drawn again in the
    backward, and neither noise nor mask is stored. Gates per block skip the closed blocks in all three
    products; blocks of fewer than 16 rows or columns gain little.

    Args:
        x: (..., in) any float dtype.
        weight: (out, in) dtype of x.
        bias: (out,) dtype of x, or None.
        log_alpha: float32 or float64; (out, in), or (ceil(out / b_out), ceil(in / b_in)) with blocks.
        block: (b_out, b_in), or None for a gate per weight; edge blocks are cropped.
        seed: (1,) int64 on the device of log_alpha; None draws one from torch's default generator. Not used
            with a mode.
        mode: None draws gates (training); "paper", "median" or "topk" evaluates as eval_gates, no gradient.
        dist: the distribution's constants.

    Returns:
        y (..., out) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, an unknown mode, or (on the CPU) a NaN in log_alpha.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_masked(x, weight, bias, log_alpha, block, seed, mode, dist)
    backend = _registry.resolve(x.device, x.dtype, "masked_linear" if block is None else "block_linear")
    if backend == "reference":
        return reference.masked_linear(
            x, weight, bias, log_alpha, block=block, seed=seed, mode=mode, dist=dist
        )
    if mode is None:
        seed = check_draw([log_alpha], seed, dist)
    if block is None:
        if mode is not None:
            return gated_linear(x, scale(weight, eval_weight_gates(log_alpha, mode, dist)), bias)
        return apply(_MaskedLinear, x, weight, bias, log_alpha, seed, dist, compute_dtype(x), backend)
    if mode is not None:
        z = eval_weight_gates(log_alpha, mode, dist)
    else:
        z = sample_gates(log_alpha.flatten(), seed=seed, dist=dist).z.view(log_alpha.shape)
    return block_linear(x, weight, bias, z, block)


def block_linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, block: tuple[int, int]) -> Tensor:
    """masked_linear with one gate per block, z drawn beforehand; arguments that masked_linear checks."""
    backend = _registry.resolve(x.device, x.dtype, "block_linear")
    if backend == "reference":
        z = expand_blocks(z, block, (weight.shape[0], weight.shape[1]))
        return torch.nn.functional.linear(x, scale(weight, z), bias)
    dtype = compute_dtype(x)
    z = z.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return apply(_BlockLinear, x, weight, bias, z, tuple(block), dtype, backend)
