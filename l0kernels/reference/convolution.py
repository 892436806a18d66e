"""Any convolution of torch, transposed or not, whose input and output channels are gated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._arguments import check_convolution
from .._gates import Gates
from .linear import gate_input, gate_output, open_weight


def gated_convolution(
    convolve: Callable[[Tensor, Tensor, Tensor | None, int], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    transposed: bool = False,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor:
    """``y = z_out * (convolve(x * z_in, W) + b)``; an output gate closes the channel with its bias.

    ``out_support`` is as in gated_linear. dz comes where 0 < z < 1, for ``full_grad`` wherever z != 0.

    Args:
        convolve: of x, weight, bias and groups, the rest bound: ``F.conv3d``, ``F.conv_transpose2d``.
        x: (N, in, ...) or (in, ...), with as many dimensions behind as weight has, any float dtype.
        weight: (out, in / groups, ...), transposed (in, out / groups, ...), dtype of x.
        bias: (out,) dtype of x, or None.
        in_gates, out_gates, out_support: gates of the in and of the out channels, or None.

    Returns:
        What convolve returns, closed channels 0.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates or device, or both out_gates and out_support.
    """
    check_convolution(x, weight, bias, groups, transposed, in_gates, out_gates, out_support)
    trailing = weight.ndim - 2
    if in_gates is not None:
        x = gate_input(x, in_gates, trailing)
    sides = in_gates, out_gates or out_support
    weight = open_weight(weight, *(sides[::-1] if transposed else sides), groups)
    return gate_output(convolve(x, weight, bias, groups), out_gates, out_support, trailing)
