"""2-D convolution whose input and output channels are gated."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .gates import Gates
from .linear import check_layer_gates, gate_output, scale


def check_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Checks of ``x ([N,] in, H, W)``, ``weight (out, in / groups, kh, kw)`` and ``bias (out,)`` or None."""
    _checks.check_floating("x", x)
    _checks.check_floating("weight", weight)
    if weight.ndim != 4:
        raise ValueError(f"weight must have shape (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    _checks.check_count("groups", groups, 1, 2**31)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    n_in = weight.shape[1] * groups
    if x.ndim not in (3, 4) or x.shape[-3] != n_in:
        raise ValueError(
            f"x must have shape (N, {n_in}, H, W) or ({n_in}, H, W), groups times weight.shape[1] channels, "
            f"got {tuple(x.shape)}"
        )
    _checks.check_device("x", x, weight.device, "weight")
    _checks.check_same_dtype("x", x, "weight", weight)
    _checks.check_bias(weight, bias)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor:
    """2-D convolution with gated channels: ``y = z_out * (conv2d(x * z_in, W) + b)``.

    torch: ``F.conv2d(x * z_in[:, None, None], weight, bias, ...) * z_out[:, None, None]``. An output gate
    closes the channel together with its bias. ``out_support`` is as in gated_linear.

    Args:
        x: (N, in, H, W) or (in, H, W), any float dtype.
        weight: (out, in / groups, kh, kw) dtype of x.
        bias: (out,) dtype of x, or None.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d.
        in_gates: gates of the in channels, or None.
        out_gates: gates of the out channels, or None.
        out_support: gates of the consumer of y, out of them, or None; excludes out_gates.

    Returns:
        y (N, out, H', W') or (out, H', W') in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates or device, or both out_gates and out_support.
    """
    check_conv2d(x, weight, bias, groups)
    n_in, n_out = weight.shape[1] * groups, weight.shape[0]
    check_layer_gates(n_in, n_out, weight.device, in_gates, out_gates, out_support)
    if in_gates is not None:
        x = scale(x, in_gates.z[:, None, None])
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return gate_output(y, out_gates, out_support, trailing=2)
