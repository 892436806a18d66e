"""2-D convolution whose input and output channels are gated."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_conv2d, conv_options
from .._compat import settled
from .._gates import Gates, check_layer_gates
from .linear import gate_input, gate_output, open_weight


def _of_no_channels(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[list[int], list[int], list[int]]
) -> Tensor:
    """The convolution of no input or no output channel, of which torch's has a wrong shape or refuses."""
    stride, padding, dilation = options
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True)
    ]
    kind, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    y = x.new_zeros(*x.shape[:-3], weight.shape[0], *size) + (x.sum() + weight.sum()) * 0
    return (y if bias is None else y + bias[:, None, None]).to(dtype)


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
        ValueError: a wrong shape, number of gates or device, both out_gates and out_support, or a stride,
            padding, dilation or groups that do not fit.
    """
    check_conv2d(x, weight, bias, groups)
    n_in, n_out = weight.shape[1] * groups, weight.shape[0]
    check_layer_gates(n_in, n_out, weight.device, in_gates, out_gates, out_support)
    strides, paddings, dilations, behind = conv_options(x, weight, stride, padding, dilation)
    if in_gates is not None:
        x = gate_input(x, in_gates, trailing=2)
    if any(behind):  # as torch does, with a warning
        x = torch.nn.functional.pad(x, (0, behind[1], 0, behind[0]))
    weight = open_weight(weight, in_gates, out_gates or out_support, groups)
    if weight.shape[0] and weight.shape[1]:
        batch = x if x.ndim == 4 else x.unsqueeze(0)
        y = torch.nn.functional.conv2d(
            settled(batch, groups, strides), weight, bias, strides, paddings, dilations, groups
        )
        y = y if x.ndim == 4 else y.squeeze(0)
    else:
        y = _of_no_channels(x, weight, bias, (strides, paddings, dilations))
    return gate_output(y, out_gates, out_support, trailing=2)
