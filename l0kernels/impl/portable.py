"""What the backend "torch" computes in torch's operations, and "cpp" where no kernel takes the dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._gates import HardConcrete
from ..reference.gates import sample_z
from .packed import Term


def check_not_nan(log_alphas: list[Tensor]) -> None:
    """On a GPU looking would stall the device; there a NaN shows in z."""
    for i, log_alpha in enumerate(log_alphas):
        if log_alpha.device.type == "cpu" and torch.isnan(log_alpha).any():
            raise_nan(i, len(log_alphas))


def raise_nan(i: int, n: int) -> None:
    """The error for a NaN in gate vector i of n."""
    raise ValueError(f"log_alpha{f'[{i}]' if n > 1 else ''} must not hold NaN, got at least one")


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, from z alone; exactly 0 where z is 0 or 1."""
    width = dist.zeta - dist.gamma
    s = (z - dist.gamma) / width
    return torch.where((z > 0) & (z < 1), dz * (width / dist.beta * s * (1 - s)), torch.zeros_like(z))


def add_l2_terms(
    total: Tensor, grad: Tensor, terms: list[Term], gates: list[Tensor], decay: float, dist: HardConcrete
) -> None:
    """Adds decay / 2 * sum_oi p_o * p_i * theta_oi^2 of every term to total, its gradients to grad."""
    grads = grad.split([a.numel() for a in gates])
    for theta, out, in_, groups in terms:
        squares = _squares(theta, groups)
        p_out, p_in = _p_open(gates, out, in_, groups, dist)
        half = 0.5 * decay
        rows = squares.sum(2, True) if p_in is None else (squares * p_in).sum(2, True)
        total += half * (rows if p_out is None else rows * p_out).sum()
        if p_out is not None:
            grads[out].add_((half * p_out * (1 - p_out) * rows).flatten())
        if p_in is not None:
            cols = (squares if p_out is None else squares * p_out).sum(1, True)
            grads[in_].add_((half * p_in * (1 - p_in) * cols).flatten())


def _squares(theta: Tensor, groups: int) -> Tensor:
    """(groups, out, in) sums of squares over what an output and an input share."""
    wide = theta.to(torch.promote_types(theta.dtype, torch.float32))
    n_in = math.prod(theta.shape[1:2])
    return wide.square().reshape(groups, theta.shape[0] // groups, n_in, math.prod(theta.shape[2:])).sum(-1)


def _p_open(
    gates: list[Tensor], out: int, in_: int, groups: int, dist: HardConcrete
) -> tuple[Tensor | None, Tensor | None]:
    """p of the outputs (groups, out, 1) and of the inputs (groups, 1, in), None on a side without gates."""
    p_out = None if out < 0 else dist.p_open(gates[out]).reshape(groups, -1, 1)
    return p_out, None if in_ < 0 else dist.p_open(gates[in_]).reshape(groups, 1, -1)


def coupled_penalty_grad(
    terms: list[Term], gates: list[Tensor], factor: Tensor, decay: float, dist: HardConcrete
) -> list[Tensor]:
    """factor * decay * p_o * p_i * theta of every term, in theta's dtype."""
    grads = []
    for theta, out, in_, groups in terms:
        scale = factor * decay
        for p in _p_open(gates, out, in_, groups, dist):
            scale = scale if p is None else scale * p
        if scale.ndim:
            n_out, n_scales = theta.shape[0], scale.shape[2]
            scale = scale.expand(groups, n_out // groups, n_scales).reshape(n_out, n_scales)
            scale = scale.view((n_out, n_scales, *[1] * (theta.ndim - 2))[: theta.ndim])
        grad = torch.mul(theta, scale)
        grads.append(grad.to(theta.dtype, memory_format=torch.preserve_format))
    return grads


def masked_weight(weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete) -> Tensor:
    """W * z, z drawn from the seed."""
    check_not_nan([log_alpha])
    return (weight * sample_z(log_alpha, seed, 0, 0, dist)).to(weight.dtype)


def masked_weight_grad(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor,
    dist: HardConcrete,
    need_w: bool,
    need_log_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and dlog_alpha from dL/d(W * z), z drawn again."""
    z = sample_z(log_alpha, seed, 0, 0, dist)
    dw = (grad * z).to(weight.dtype) if need_w else None
    if not need_log_alpha:
        return dw, None
    dz = grad.to(torch.promote_types(grad.dtype, z.dtype)) * weight  # not rounded to 16 bits on the way
    return dw, gate_grad(dz.to(z.dtype), z, dist)
