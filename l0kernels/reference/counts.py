"""Expected parameters and FLOPs of gated layers, and with 0/1 probabilities the actual ones.

The gates of a layer's inputs and outputs are independent, so a weight between input i and output o is there
with probability p_i * p_o; a gate that sits on both sides of a weight counts once. In a chain the p_out of
one layer is the p_in of the next. FLOPs are counted per example: two for each multiply-add of an open
weight at each output position (positions that read padding included, as the dense product computes them)
and one for each bias added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .. import _checks


def _check_side(name: str, p: Tensor | int) -> int:
    """Checks one side's probabilities and returns how many units it has."""
    if isinstance(p, Tensor):
        _checks.check_floating(name, p)
        if p.ndim != 1:
            raise ValueError(f"{name} must have shape (n,), got {tuple(p.shape)}")
        return p.shape[0]
    if not isinstance(p, int) or isinstance(p, bool):
        raise TypeError(
            f"{name} must be a tensor of probabilities or an int, the number of ungated units, "
            f"got {type(p).__name__}"
        )
    _checks.check_count(name, p, 0, 2**63)
    return p


def _mass(p: Tensor | int) -> Tensor | float:
    return p.sum() if isinstance(p, Tensor) else float(p)


def _pairs(p_in: Tensor | int, p_out: Tensor | int, groups: int, shared: bool) -> Tensor | float:
    """Expected number of connected (input, output) pairs, both open."""
    n_in, n_out = _check_side("p_in", p_in), _check_side("p_out", p_out)
    _checks.check_count("groups", groups, 1, 2**31)
    for name, n in (("p_in", n_in), ("p_out", n_out)):
        if n % groups:
            raise ValueError(f"groups must divide the {n} units of {name}, got {groups}")
    if shared:
        if n_in != n_out:
            raise ValueError(f"a shared gate needs as many inputs as outputs, got {n_in} and {n_out}")
        if not isinstance(p_in, Tensor) or not isinstance(p_out, Tensor):
            raise TypeError(
                "a shared gate needs its probabilities as p_in and as p_out, got a number of units"
            )
        # E[z_i z_o] is p_i p_o off the diagonal, but p_i on it.
        once = (p_in - p_in * p_out).sum()
        return _pairs(p_in, p_out, groups, False) + once
    if groups == 1 or not (isinstance(p_in, Tensor) and isinstance(p_out, Tensor)):
        return _mass(p_in) * _mass(p_out) / groups
    return (p_in.reshape(groups, -1).sum(1) * p_out.reshape(groups, -1).sum(1)).sum()


def linear_expected_params(
    p_in: Tensor | int, p_out: Tensor | int, *, bias: bool = True, shared: bool = False
) -> Tensor | float:
    """Expected parameters of a linear layer: ``sum p_in * sum p_out``, plus ``sum p_out`` for the bias.

    Args:
        p_in: (in,) probabilities that an input is open, or their number if none is gated.
        p_out: (out,) probabilities that an output is open, or their number if none is gated.
        bias: whether there is a bias; it lives with its output.
        shared: the same gates are on both sides, and both arguments are their probabilities. A weight between
            a gate and itself is then there with p, not p^2.

    Returns:
        A scalar tensor, differentiable in the probabilities; a float if no side is gated.

    Raises:
        TypeError, ValueError: a wrong kind, shape or number.
    """
    return conv_expected_params(p_in, p_out, (), bias=bias, shared=shared)


def linear_expected_flops(
    p_in: Tensor | int, p_out: Tensor | int, *, bias: bool = True, shared: bool = False
) -> Tensor | float:
    """Expected FLOPs of a linear layer: ``2 * sum p_in * sum p_out``, plus ``sum p_out`` for the bias.

    Arguments, result and errors are those of linear_expected_params.
    """
    return conv_expected_flops(p_in, p_out, (), (), bias=bias, shared=shared)


def conv_expected_params(
    p_in: Tensor | int,
    p_out: Tensor | int,
    kernel_size: Sequence[int],
    groups: int = 1,
    *,
    bias: bool = True,
    shared: bool = False,
) -> Tensor | float:
    """Expected parameters of a convolution: ``k * sum_groups (sum p_in)(sum p_out)``, plus ``sum p_out``.

    Args:
        p_in: (in,) probabilities that a channel is open, or the number of channels if none is gated.
        p_out: (out,) likewise.
        kernel_size: one extent per spatial dimension; k is their product.
        groups: of the convolution.
        bias, shared: as in linear_expected_params; a depthwise convolution under one gate vector is shared.

    Returns:
        A scalar tensor, differentiable in the probabilities; a float if no side is gated.

    Raises:
        TypeError, ValueError: a wrong kind, shape or number.
    """
    for extent in kernel_size:
        _checks.check_count("kernel_size", extent, 1, 2**31)
    weights = math.prod(kernel_size) * _pairs(p_in, p_out, groups, shared)
    return weights + _mass(p_out) if bias else weights


def conv_expected_flops(
    p_in: Tensor | int,
    p_out: Tensor | int,
    kernel_size: Sequence[int],
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bias: bool = True,
    shared: bool = False,
) -> Tensor | float:
    """Expected FLOPs of a convolution on one example: output positions times those of one position.

    ``positions * (2 * k * sum_groups (sum p_in)(sum p_out) + sum p_out)``, the last term with a bias only.

    Args:
        p_in, p_out, kernel_size, groups, bias, shared: as in conv_expected_params.
        input_size: spatial extents of the input, (H, W) for a 2-D convolution.
        stride, padding, dilation: as in torch.nn.functional.conv2d; padding may be "same" or "valid".

    Returns:
        A scalar tensor, differentiable in the probabilities; a float if no side is gated.

    Raises:
        TypeError, ValueError: a wrong kind, shape or number, or a kernel larger than the padded input.
    """
    weights = conv_expected_params(p_in, p_out, kernel_size, groups, bias=False, shared=shared)
    positions = math.prod(conv_output_size(input_size, kernel_size, stride, padding, dilation))
    per_position = 2 * weights + _mass(p_out) if bias else 2 * weights
    return positions * per_position


def conv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> tuple[int, ...]:
    """Output extents of a convolution: ``floor((n + 2 * pad - dilation * (k - 1) - 1) / stride) + 1`` each.

    Args:
        input_size, kernel_size: one extent per spatial dimension.
        stride, padding, dilation: a number, or one per spatial dimension; padding may be "same" or "valid".

    Raises:
        ValueError: sequences of unequal length, unknown padding, or a kernel larger than the padded input.
    """
    n_dims = len(kernel_size)
    if len(input_size) != n_dims:
        raise ValueError(
            f"input_size must hold {n_dims} extent(s), one per kernel_size, got {tuple(input_size)}"
        )
    if isinstance(padding, str):
        _checks.check_choice("padding", padding, ("valid", "same"))
        if padding == "same":
            return tuple(input_size)
        padding = 0

    def each(name: str, value: int | Sequence[int], low: int) -> tuple[int, ...]:
        values = (value,) * n_dims if isinstance(value, int) else tuple(value)
        if len(values) != n_dims:
            raise ValueError(f"{name} must be one number or hold {n_dims}, one per kernel_size, got {values}")
        for v in values:
            _checks.check_count(name, v, low, 2**31)
        return values

    strides, pads, dilations = (
        each("stride", stride, 1),
        each("padding", padding, 0),
        each("dilation", dilation, 1),
    )
    sizes = []
    for n, k, s, p, d in zip(input_size, kernel_size, strides, pads, dilations, strict=True):
        reach = n + 2 * p - d * (k - 1) - 1
        if reach < 0:
            raise ValueError(
                f"kernel_size {k} with dilation {d} is larger than the padded input, {n + 2 * p}"
            )
        sizes.append(reach // s + 1)
    return tuple(sizes)
