"""The expected L0 norm and the L2 norm coupled to it (arXiv 1712.01312, sections 2.2 to 2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import check_l0_penalty, check_l2_penalty, per_tensor
from .._gates import DEFAULT_DIST, HardConcrete


def l0_penalty(
    log_alpha: Tensor | Sequence[Tensor],
    group_size: float | Sequence[float] = 1,
    *,
    lam: float | Sequence[float] = 1.0,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Expected number of open parameters, weighted: ``sum_g lam * |g| * p_open_g`` (equation 12).

    Its gradient ``lam * |g| * p_open * (1 - p_open)`` is the only one that reaches a closed gate.

    Args:
        log_alpha: any shape, float32 or float64, or a sequence of such on one device.
        group_size: |g|, the parameters behind one gate: a number, or one per tensor of the sequence.
        lam: the weight of the penalty: a number, or one per tensor of the sequence.
        dist: the distribution's constants.

    Returns:
        A scalar in the dtype of log_alpha, also under autocast.

    Raises:
        TypeError: log_alpha is not float32 or float64; group_size or lam is no number.
        ValueError: no tensor, different devices, lists of another length, or a NaN in a log_alpha on the CPU.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    check_l0_penalty(log_alphas, dist)
    sizes = per_tensor("group_size", group_size, len(log_alphas))
    lams = per_tensor("lam", lam, len(log_alphas))
    terms = [w * n * dist.p_open(a).sum() for a, n, w in zip(log_alphas, sizes, lams, strict=True)]
    return torch.stack(terms).sum()


def l2_penalty(
    weight: Tensor,
    weight_decay: float = 1.0,
    *,
    in_log_alpha: Tensor | None = None,
    out_log_alpha: Tensor | None = None,
    groups: int = 1,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """L2 penalty of the open parameters: ``weight_decay / 2 * sum_oi p_o * p_i * theta_oi^2`` (section 2.3).

    p = P(z > 0); an absent side has p = 1. One gate vector on both sides of a depthwise convolution counts
    once: give it as out_log_alpha alone.

    Args:
        weight: (out, in / groups, ...) with at least two dimensions, any float dtype.
        weight_decay: the strength.
        in_log_alpha: (in,) float32 or float64, or None.
        out_log_alpha: (out,) float32 or float64, or None.
        groups: of a grouped convolution; 1 otherwise.
        dist: the distribution's constants.

    Returns:
        A scalar: float32, or float64 if any of the tensors is; also under autocast and for a bfloat16 weight.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, or a NaN in a log_alpha on the CPU.
    """
    check_l2_penalty(weight, weight_decay, in_log_alpha, out_log_alpha, groups, dist)
    n_out, n_in, *kernel = weight.shape
    squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
    squares = squares.reshape(groups, n_out // groups, n_in, math.prod(kernel)).sum(-1)
    if in_log_alpha is not None:
        squares = squares * dist.p_open(in_log_alpha).reshape(groups, 1, -1)
    if out_log_alpha is not None:
        squares = squares * dist.p_open(out_log_alpha).reshape(groups, -1, 1)
    return 0.5 * weight_decay * squares.sum()
