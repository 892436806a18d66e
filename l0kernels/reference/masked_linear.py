"""Linear layers whose weights are gated one by one or in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .gates import (
    DEFAULT_DIST,
    EVAL_MODES,
    HardConcrete,
    check_dist,
    check_not_nan,
    draw_seed,
    eval_z,
    sample_z,
)
from .linear import scale


def check_masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    block: tuple[int, int] | None,
    seed: Tensor | None,
    mode: str | None,
    dist: HardConcrete,
) -> None:
    """Checks of the arguments of masked_linear."""
    _checks.check_linear(x, weight, bias)
    _checks.check_log_alpha("log_alpha", log_alpha, ndim=2)
    _checks.check_device("log_alpha", log_alpha, weight.device, "weight")
    n_out, n_in = weight.shape
    if block is None:
        _checks.check_shape("log_alpha", log_alpha, (n_out, n_in), "the shape of weight")
    else:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise TypeError(f"block must be a pair (b_out, b_in) or None, got {block!r}")
        _checks.check_count("block[0]", block[0], 1, 2**31)
        _checks.check_count("block[1]", block[1], 1, 2**31)
        shape = (-(-n_out // block[0]), -(-n_in // block[1]))
        _checks.check_shape(
            "log_alpha", log_alpha, shape, f"blocks of {tuple(block)} in weight {n_out} x {n_in}"
        )
    if mode is not None:
        _checks.check_choice("mode", mode, EVAL_MODES)
    if seed is not None:
        _checks.check_seed(seed, log_alpha.device)
    check_dist(dist)


def expand_blocks(z: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """z of blocks as a matrix of ``shape``; the edge blocks are cropped."""
    b_out, b_in = (min(b, n) for b, n in zip(block, shape, strict=True))  # a block may be larger than all
    return z.repeat_interleave(b_out, 0)[: shape[0]].repeat_interleave(b_in, 1)[:, : shape[1]]


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
    in log_alpha for index, and stream 0. Single weights save memory, not time; blocks skip.

    Args:
        x: (..., in) any float dtype.
        weight: (out, in) dtype of x.
        bias: (out,) dtype of x, or None.
        log_alpha: float32 or float64; (out, in), or (ceil(out / b_out), ceil(in / b_in)) with blocks.
        block: (b_out, b_in), or None for a gate per weight; edge blocks are cropped.
        seed: (1,) int64 on the device of log_alpha; None draws one. Not used with a mode.
        mode: None draws gates (training); "paper", "median" or "topk" evaluates as eval_gates, no gradient.
        dist: the distribution's constants.

    Returns:
        y (..., out) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, an unknown mode, or a NaN in a log_alpha on the CPU.
    """
    check_masked(x, weight, bias, log_alpha, block, seed, mode, dist)
    check_not_nan("log_alpha", log_alpha)
    if mode is not None:
        z = eval_z(log_alpha, mode, dist)
    else:
        z = sample_z(log_alpha, draw_seed(log_alpha.device) if seed is None else seed, 0, 0, dist)
    if block is not None:
        z = expand_blocks(z, block, (weight.shape[0], weight.shape[1]))
        weight = weight.masked_fill(z.detach() == 0, 0.0)  # a closed block is left out, whatever it holds
    return torch.nn.functional.linear(x, scale(weight, z), bias)
