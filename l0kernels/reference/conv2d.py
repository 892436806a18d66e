"""2-D convolution whose input and output channels are gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .gates import Gates
from .linear import check_layer_gates, gate_input, gate_output, open_weight


def check_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, channels: int | None = None
) -> None:
    """Checks of ``x ([N,] in, H, W)``, ``weight (out, in / groups, kh, kw)`` and ``bias (out,)`` or None.

    ``channels``: those of a packed x, which does not hold them all.
    """
    _checks.check_floating("x", x)
    _checks.check_floating("weight", weight)
    if weight.ndim != 4:
        raise ValueError(f"weight must have shape (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    _checks.check_count("groups", groups, 1, 2**31)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    n_in = weight.shape[1] * groups
    if x.ndim not in (3, 4) or (x.shape[-3] if channels is None else channels) != n_in:
        raise ValueError(
            f"x must have shape (N, {n_in}, H, W) or ({n_in}, H, W), groups times weight.shape[1] channels, "
            f"got {tuple(x.shape)}" + ("" if channels is None else f" packed from {channels} channels")
        )
    _checks.check_device("x", x, weight.device, "weight")
    _checks.check_same_dtype("x", x, "weight", weight)
    _checks.check_bias(weight, bias)


def pair(name: str, value: Any, low: int) -> list[int]:
    """``value`` of torch's conv2d, an int or two of them, as a list of two, each >= low."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(items) not in (1, 2):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    for item in items:
        _checks.check_count(name, item, low, 2**31)
    return items * 2 if len(items) == 1 else items


def conv_options(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[int], list[int]]:
    """stride, padding, dilation of two dimensions, and the zeros that x needs behind its rows and columns.

    ``padding="same"`` with an odd total has one more behind than in front, as torch has it.

    Raises:
        TypeError: no ints.
        ValueError: out of range, an unknown name, "same" with a stride, or a kernel larger than padded x.
    """
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    behind = [0, 0]
    if isinstance(padding, str):
        _checks.check_choice("padding", padding, ("same", "valid"))
        if padding == "same" and strides != [1, 1]:
            raise ValueError(f"padding must be numbers where stride is not 1, got 'same' and stride {stride}")
        total = [0, 0]
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        paddings, behind = [t // 2 for t in total], [t % 2 for t in total]
    else:
        paddings = pair("padding", padding, 0)
    padded = [x.shape[i - 2] + 2 * paddings[i] + behind[i] for i in range(2)]
    span = [dilations[i] * (weight.shape[i + 2] - 1) + 1 for i in range(2)]
    if padded[0] < span[0] or padded[1] < span[1]:
        raise ValueError(
            f"x must cover the kernel, {span[0]} x {span[1]} with its dilation, got {padded[0]} x {padded[1]}"
            " with its padding"
        )
    return strides, paddings, dilations, behind


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


def settled(x: Tensor, groups: int) -> Tensor:
    """x (N, C, H, W) in strides that torch's grouped convolution reads right.

    A single image may have any batch stride. Where that is a view's and channels come last, in x and in the
    weight, torch gets the weight's gradient wrong.
    """
    if groups == 1 or x.ndim != 4 or x.shape[0] != 1 or torch.compiler.is_compiling():
        return x
    if x.is_contiguous() or x.stride(0) == x.numel():
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
            settled(batch, groups), weight, bias, strides, paddings, dilations, groups
        )
        y = y if x.ndim == 4 else y.squeeze(0)
    else:
        y = _of_no_channels(x, weight, bias, (strides, paddings, dilations))
    return gate_output(y, out_gates, out_support, trailing=2)
