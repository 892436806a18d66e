"""Linear layers whose weights are gated one by one or in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_masked
from .._gates import DEFAULT_DIST, HardConcrete, check_not_nan, draw_seed, expand_blocks, scale
from .gates import eval_z, sample_z


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
