"""Any convolution of torch with gated channels, for the kinds that have no operator of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _checks, _registry, reference
from ._arguments import check_convolution
from ._gates import Gates, scale


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
    """reference.gated_convolution by torch's operations, on a CPU of the open channels alone.

    That is where the host may ask which they are without waiting, in eager mode, with groups=1. Elsewhere no
    shape depends on the gates, and all channels are multiplied.
    """
    readable = x.device.type == "cpu" and _checks.readable() and _registry.requested() != "reference"
    if groups > 1 or not readable:
        return reference.gated_convolution(
            convolve,
            x,
            weight,
            bias,
            groups,
            transposed,
            in_gates=in_gates,
            out_gates=out_gates,
            out_support=out_support,
        )
    check_convolution(x, weight, bias, groups, transposed, in_gates, out_gates, out_support)
    channel = x.ndim - weight.ndim + 1
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    out = out_gates if out_support is None else out_support
    n_out = weight.shape[out_dim]
    inputs, outputs = (None if gates is None else _kept(gates) for gates in (in_gates, out))
    if inputs is not None:
        x, weight = x.index_select(channel, inputs), weight.index_select(in_dim, inputs)
    if outputs is not None:
        weight = weight.index_select(out_dim, outputs)
        bias = None if bias is None else bias.index_select(0, outputs)
    if in_gates is not None:
        weight = _multiplied(weight, in_gates, inputs, in_dim)
        if not int(in_gates.count[0]):
            x = x.masked_fill(torch.ones((), dtype=torch.bool), 0)
    if out_gates is not None:
        weight = _multiplied(weight, out_gates, outputs, out_dim)
        bias = None if bias is None else _multiplied(bias, out_gates, outputs, 0)
    y = convolve(x, weight, bias, groups)
    if out is not None and not int(out.count[0]):
        y = y.masked_fill(torch.ones((), dtype=torch.bool), 0)
    if outputs is None:
        return y
    shape = list(y.shape)
    shape[channel] = n_out
    return y.new_zeros(shape).index_copy_(channel, outputs, y)


def _kept(gates: Gates) -> Tensor | None:
    """The open channels ascending, or None where all are; where none is, the first: torch needs one."""
    n = int(gates.count[0])
    return None if n == len(gates.z) else gates.index[: max(n, 1)].to(torch.int64)


def _multiplied(weight: Tensor, gates: Gates, kept: Tensor | None, dim: int) -> Tensor:
    """`weight` of the channels kept times their gates at `dim`; 0 where none is open, whatever it holds."""
    z = reference.linear.multiplier(gates)
    z = z if kept is None else z.index_select(0, kept)
    weight = scale(weight, z.view(-1, *[1] * (weight.ndim - dim - 1)))
    return weight if int(gates.count[0]) else weight.masked_fill(torch.ones((), dtype=torch.bool), 0)
