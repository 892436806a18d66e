"""The expected L0 norm, one autograd node for all gates of a model, and the L2 norm coupled to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops, _registry, reference
from .gates import HardConcrete
from .reference import _checks
from .reference.gates import DEFAULT_DIST, check_dist
from .reference.penalty import check_l2_penalty, per_tensor

_PLAIN = (Tensor, torch.nn.Parameter)


class _L0Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: list[float], constants: tuple[float, float, float, str], *log_alphas: Tensor
    ) -> Tensor:
        total, grad = _ops.l0_penalty(log_alphas, weights, *constants)
        ctx.save_for_backward(grad)
        ctx.shapes = [a.shape for a in log_alphas]
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("l0_penalty")
        (grad,) = ctx.saved_tensors
        parts = (grad * dtotal).split_with_sizes([shape.numel() for shape in ctx.shapes])
        shaped = [p if len(s) == 1 else p.view(s) for p, s in zip(parts, ctx.shapes, strict=True)]
        return None, None, *shaped


def l0_penalty(
    log_alpha: Tensor | Sequence[Tensor],
    group_size: float | Sequence[float] = 1,
    *,
    lam: float | Sequence[float] = 1.0,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Expected number of open parameters: ``sum_g lam * |g| * P(z_g > 0)`` (arXiv 1712.01312, eq. 12).

    ``P(z > 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))``. Its gradient ``lam * |g| * p * (1 - p)`` is
    the only one that reaches a closed gate.

    Args:
        log_alpha: any shape, float32 or float64, or a sequence of such of one dtype on one device.
        group_size: |g|, the parameters behind one gate: a number, or one per tensor of the sequence.
        lam: the weight of the penalty: a number, or one per tensor of the sequence.
        dist: the distribution's constants.

    Returns:
        A scalar in the dtype of log_alpha, also under autocast.

    Raises:
        TypeError: log_alpha is not float32 or float64, dtypes differ; group_size or lam is no number.
        ValueError: no tensor, different devices, lists of another length, or (on the CPU) a NaN in log_alpha.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    if not log_alphas:
        raise ValueError("log_alpha must hold at least one tensor, got none")
    first = log_alphas[0]
    for i, a in enumerate(log_alphas):
        if (
            type(a) in _PLAIN
            and a.dtype is torch.float32
            and first.dtype is a.dtype
            and a.device == first.device
        ):
            continue
        name = "log_alpha" if len(log_alphas) == 1 else f"log_alpha[{i}]"
        _checks.check_log_alpha(name, a)
        _checks.check_device(name, a, first.device, "log_alpha[0]")
        if a.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of log_alpha[0], {first.dtype}, got {a.dtype}")
    check_dist(dist)
    sizes = per_tensor("group_size", group_size, len(log_alphas))
    lams = per_tensor("lam", lam, len(log_alphas))
    backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "l0_penalty")
    if backend == "reference":
        return reference.l0_penalty(log_alphas, sizes, lam=lams, dist=dist)
    weights = [float(size) * float(weight) for size, weight in zip(sizes, lams, strict=True)]
    return _L0Penalty.apply(weights, (dist.beta, dist.gamma, dist.zeta, backend), *log_alphas)


class _L2Penalty(torch.autograd.Function):
    """Forward reads the weight once and keeps the gradients of the gates; backward writes the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        out_log_alpha: Tensor | None,
        in_log_alpha: Tensor | None,
        decay: float,
        groups: int,
        dist: HardConcrete,
        backend: str,
    ) -> Tensor:
        settings = (decay, groups, [dist.beta, dist.gamma, dist.zeta], backend)
        total, d_out, d_in = _ops.l2_penalty(weight, out_log_alpha, in_log_alpha, *settings)
        ctx.save_for_backward(weight, out_log_alpha, in_log_alpha, d_out, d_in)
        ctx.settings = settings
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("l2_penalty")
        weight, out_log_alpha, in_log_alpha, d_out, d_in = ctx.saved_tensors
        need_weight, need_out, need_in = ctx.needs_input_grad[:3]
        d_weight = (
            _ops.l2_weight_grad(weight, out_log_alpha, in_log_alpha, dtotal, *ctx.settings)
            if need_weight
            else None
        )
        return d_weight, d_out * dtotal if need_out else None, d_in * dtotal if need_in else None, *[None] * 4


def l2_penalty(
    weight: Tensor,
    weight_decay: float = 1.0,
    *,
    in_log_alpha: Tensor | None = None,
    out_log_alpha: Tensor | None = None,
    groups: int = 1,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """L2 norm of the open parameters: ``weight_decay / 2 * sum_oi p_o * p_i * theta_oi^2`` (arXiv 1712.01312,
    section 2.3).

    p = P(z > 0), 1 on a side without gates. Its gradient is dense: a closed weight still decays. Backends
    "cpp" and "cuda" pass over the weight once, and once more for its gradient; the others are plain torch.

    Args:
        weight: (out, in / groups, ...) any float dtype.
        weight_decay: the strength.
        in_log_alpha: (in,) float32 or float64, or None.
        out_log_alpha: (out,) float32 or float64, or None.
        groups: of a grouped convolution; 1 otherwise.
        dist: the distribution's constants.

    Returns:
        A scalar: float32, or float64 if any of the tensors is; also under autocast.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, or (on the CPU) a NaN in log_alpha.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_l2_penalty(weight, weight_decay, in_log_alpha, out_log_alpha, groups, dist)
    backend = _registry.resolve(weight.device, weight.dtype, "l2_penalty")
    # Gates of the other precision than the weight's are rare enough for the formula.
    double = weight.dtype == torch.float64
    fits = all(a is None or (a.dtype == torch.float64) == double for a in (in_log_alpha, out_log_alpha))
    if backend in ("reference", "triton") or not fits:
        return reference.l2_penalty(
            weight,
            weight_decay,
            in_log_alpha=in_log_alpha,
            out_log_alpha=out_log_alpha,
            groups=groups,
            dist=dist,
        )
    return _L2Penalty.apply(weight, out_log_alpha, in_log_alpha, float(weight_decay), groups, dist, backend)
