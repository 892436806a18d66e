"""Gated convolution as pack -> torch's convolution -> unpack, of exactly the open channels.

Gates are folded into the packed weight: conv(x * z_in, W) * z_out = conv(x, z_out W z_in), so that the products
read activations as they are. A gate is None or a list [z, index, count]; conv is stride, padding, dilation, groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference.gates import HardConcrete
from .packed import Gate, extent
from .recycle import empty_grad

Conv = tuple[list[int], list[int], list[int], int]


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """That of torch's conv2d: channels_last if either operand is."""
    for t in (x, weight):
        if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def output_shape(x: Tensor, weight: Tensor, conv: Conv) -> list[int]:
    """Shape of y (N, out, H', W') for x (N, in, H, W)."""
    stride, padding, dilation, _ = conv
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return [x.shape[0], weight.shape[0], *sizes]


def open_channels(gate: Gate | None, size: int) -> Tensor | None:
    """The open channels ascending, None where nothing is closed."""
    if gate is None:
        return None
    n_open = extent(gate, size, torch.float32)
    return None if n_open == size else gate[1][:n_open].long()


@dataclass(frozen=True)
class Plan:
    """What is computed: ``groups`` products of ``ins`` inputs and ``outs`` outputs each.

    Attributes:
        in_index: (groups * ins,) the input channels, None for all of them in order.
        out_index: (groups * outs,) the output channels, None for all in order.
        in_valid, out_valid: which entries are channels and not padding; None for all.
        cell: (groups * outs, ins) the position of each kernel in weight (out * in / groups, ...), None for all.
    """

    groups: int
    in_index: Tensor | None
    out_index: Tensor | None
    in_valid: Tensor | None
    out_valid: Tensor | None
    cell: Tensor | None
    empty: bool


def plan(
    weight: Tensor, groups: int, in_gate: Gate | None, out_gate: Gate | None, dtype: torch.dtype
) -> Plan:
    """The open channels of both sides, padded so that every group that is left has equally many.

    A group without an open input or without an open output is left out.
    """
    n_out, per_group = weight.shape[0], weight.shape[1]
    n_in = per_group * groups
    ins, outs = open_channels(in_gate, n_in), open_channels(out_gate, n_out)
    if ins is None and outs is None:
        return Plan(groups, None, None, None, None, None, n_out == 0 or n_in == 0)
    if groups == 1:
        in_index, in_valid = _padded(ins, n_in, in_gate, dtype)
        out_index, out_valid = _padded(outs, n_out, out_gate, dtype)
        empty = (n_in if ins is None else len(ins)) == 0 or (n_out if outs is None else len(outs)) == 0
    else:
        in_index, in_valid, out_index, out_valid = _by_group(ins, outs, n_in, n_out, groups, weight.device)
        empty = len(in_index) == 0
        groups = in_index.shape[0]
    if empty:
        return Plan(0, ins, outs, None, None, None, True)
    rows = torch.arange(n_out, device=weight.device) if out_index is None else out_index
    cols = torch.arange(n_in, device=weight.device) if in_index is None else in_index
    cell = rows.reshape(groups, -1, 1) * per_group + cols.reshape(groups, 1, -1) % per_group
    flat = [None if t is None else t.flatten() for t in (in_index, out_index, in_valid, out_valid)]
    return Plan(groups, *flat, cell.flatten(0, 1), False)


def _padded(
    index: Tensor | None, size: int, gate: Gate | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The open channels up to their extent, the first one repeated, and which of them are meant."""
    if index is None or len(index) == 0:
        return index, None
    n = extent(gate, size, dtype)
    if n == len(index):
        return index, None
    valid = torch.arange(n, device=index.device) < len(index)
    return torch.cat((index, index[:1].expand(n - len(index)))), valid


def _by_group(
    ins: Tensor | None, outs: Tensor | None, n_in: int, n_out: int, groups: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channels (groups left, largest number in a group) of either side and which of them are meant."""
    sides = []
    for index, size in ((ins, n_in), (outs, n_out)):
        is_open = torch.zeros(size, dtype=torch.bool, device=device)
        is_open = ~is_open if index is None else is_open.index_fill(0, index, True)
        sides.append(is_open.view(groups, size // groups))
    left = (sides[0].any(1) & sides[1].any(1)).nonzero()[:, 0]
    tables = []
    for is_open in sides:
        is_open = is_open.index_select(0, left)
        number = is_open.sum(1, keepdim=True)
        order = torch.argsort(is_open.to(torch.uint8), dim=1, descending=True, stable=True)
        order = order[:, : int(number.max()) if len(left) else 0]
        valid = torch.arange(order.shape[1], device=device) < number
        first = order[:, :1] if order.shape[1] else order
        tables += [torch.where(valid, order, first) + left[:, None] * is_open.shape[1], valid]
    return tables[0], tables[1], tables[2], tables[3]


def _scale(
    gate: Gate | None, index: Tensor | None, valid: Tensor | None, scaled: bool, shape: tuple[int, ...]
) -> Tensor | None:
    """What multiplies the channels of one side, in ``shape``: z or 1, and 0 in the padding; None for ones."""
    z = None
    if gate is not None and scaled:
        z = gate[0] if index is None else gate[0].index_select(0, index)
    if valid is not None:
        z = valid.to(torch.float32) if z is None else z * valid
    return None if z is None else z.view(shape)


def _scales(
    p: Plan, in_gate: Gate | None, out_gate: Gate | None, scale_in: bool, scale_out: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Factors of the packed weight (groups, outs, ins, taps), of its inputs and of its outputs."""
    return (
        _scale(in_gate, p.in_index, p.in_valid, scale_in, (p.groups, 1, -1, 1)),
        _scale(out_gate, p.out_index, p.out_valid, scale_out, (p.groups, -1, 1, 1)),
    )


def _select(weight: Tensor, p: Plan) -> Tensor:
    """The packed kernels, unscaled, (groups, outs, ins, taps)."""
    taps = weight.shape[2] * weight.shape[3]
    if p.cell is None:
        return weight.reshape(p.groups, -1, weight.shape[1], taps)
    kernels = weight.reshape(-1, taps).index_select(0, p.cell.flatten())
    return kernels.view(p.groups, -1, p.cell.shape[1], taps)


def pack_weight(
    weight: Tensor,
    p: Plan,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """z_out W z_in of the plan's channels, (groups * outs, ins, kh, kw)."""
    kernels = _select(weight, p)
    for factor in _scales(p, in_gate, out_gate, scale_in, scale_out):
        if factor is not None:
            kernels = kernels * factor
    return kernels.to(dtype).reshape(-1, kernels.shape[2], *weight.shape[2:])


def unpack_weight(
    grad: Tensor,
    weight: Tensor,
    p: Plan,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """dW, dz_in and dz_out (of every open gate) from the gradient of the packed weight."""
    need_w, need_in, need_out = needs
    taps = weight.shape[2] * weight.shape[3]
    in_factor, out_factor = _scales(p, in_gate, out_gate, scale_in, scale_out)
    ins = weight.shape[1] if p.cell is None else p.cell.shape[1]
    kernels = grad.reshape(p.groups, -1, ins, taps)
    dz: list[Tensor | None] = [None, None]
    if need_in or need_out:
        wide = torch.promote_types(kernels.dtype, torch.float32)
        terms = (kernels.to(wide) * _select(weight, p)).sum(3)
        for side, wanted, other, own, index, valid, dim in (
            (0, need_in, out_factor, in_gate, p.in_index, p.in_valid, 1),
            (1, need_out, in_factor, out_gate, p.out_index, p.out_valid, 2),
        ):
            if wanted and own is not None:
                total = (terms if other is None else terms * other.squeeze(3)).sum(dim).flatten()
                total = total.to(own[0].dtype)
                if valid is not None:
                    total = total * valid
                dz[side] = total if index is None else torch.zeros_like(own[0]).index_add_(0, index, total)
    dw = None
    if need_w:
        for factor in (in_factor, out_factor):
            if factor is not None:
                kernels = kernels * factor
        kernels = kernels.to(weight.dtype).reshape(-1, taps)
        if p.cell is None:
            dw = kernels.view(weight.shape)
        else:
            dw = empty_grad(weight).zero_()
            dw.view(-1, taps).index_add_(0, p.cell.flatten(), kernels)
    return [dw, *dz]


def fractional(dz: Tensor | None, gate: Gate | None, full: bool) -> Tensor | None:
    """dz of every open gate, or of fractional ones alone."""
    if dz is None or gate is None or full:
        return dz
    return dz.masked_fill((gate[0] <= 0) | (gate[0] >= 1), 0)


def gated_bias(bias: Tensor, out_gate: Gate | None, scale_out: bool) -> Tensor:
    """The bias of every output channel times its gate, 0 where that is closed; in the gates' dtype."""
    if out_gate is None:
        return bias
    return bias * (out_gate[0] if scale_out else (out_gate[0] != 0).to(out_gate[0].dtype))


def take(t: Tensor, index: Tensor | None, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    """The channels ``index`` of t (N, C, H, W) in a memory format."""
    t = t if index is None else t.index_select(1, index)
    return t.to(dtype).contiguous(memory_format=fmt)


def _put(out: Tensor, index: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
    """Writes the channels ``index`` of out."""
    if valid is not None:
        index, value = index[valid], value[:, valid]
    return out.index_copy_(1, index, value.to(out.dtype))


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    conv: Conv,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y (N, out, H', W') of gated_conv2d for x (N, in, H, W), in ``dtype``; nothing is kept for backward."""
    stride, padding, dilation, groups = conv
    fmt = memory_format(x, weight)
    p = plan(weight, groups, in_gate, out_gate, dtype)
    shape = output_shape(x, weight, conv)
    b = None if bias is None else gated_bias(bias, out_gate, scale_out).to(dtype)
    if p.empty or x.shape[0] == 0:
        return _constant(x, shape, b, dtype, fmt), []
    b_packed = b if b is None or p.out_index is None else b.index_select(0, p.out_index)
    y = F.conv2d(
        take(x, p.in_index, dtype, fmt),
        pack_weight(weight, p, in_gate, out_gate, scale_in, scale_out, dtype),
        b_packed,
        stride,
        padding,
        dilation,
        p.groups,
    )
    if p.out_index is None:
        return y.contiguous(memory_format=fmt), []
    # Channels that are open, but whose inputs are all closed, are their bias.
    constant = _constant(x, shape, None if groups == 1 else b, dtype, fmt)
    return _put(constant, p.out_index, p.out_valid, y), []


def _constant(
    x: Tensor, shape: list[int], value: Tensor | None, dtype: torch.dtype, fmt: torch.memory_format
) -> Tensor:
    out = x.new_empty(shape, dtype=dtype).to(memory_format=fmt)
    return out.zero_() if value is None else out.copy_(value[:, None, None].expand(shape))


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    saved: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    full_in: bool,
    full_out: bool,
    conv: Conv,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where ``needs`` says so."""
    need_x, need_w, need_b, need_in, need_out = needs
    stride, padding, dilation, groups = conv
    fmt = memory_format(x, weight)
    dx = dw = db = dz_in = dz_out = None
    p = plan(weight, groups, in_gate, out_gate, dtype)
    reads_dw = need_w or need_in or need_out
    if p.empty or x.shape[0] == 0:
        dx = _constant(x, list(x.shape), None, x.dtype, fmt) if need_x else None
        dw = empty_grad(weight).zero_() if need_w else None
        dz_in = torch.zeros_like(in_gate[0]) if need_in and in_gate is not None else None
        dz_out = torch.zeros_like(out_gate[0]) if need_out and out_gate is not None else None
    elif need_x or reads_dw:
        dx, dw_packed, _ = torch.ops.aten.convolution_backward(
            take(dy, p.out_index, dtype, fmt),
            take(x, p.in_index, dtype, fmt),
            pack_weight(weight, p, in_gate, out_gate, scale_in, scale_out, dtype),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            p.groups,
            [need_x, reads_dw, False],
        )
        if dx is not None and p.in_index is None:
            dx = dx.to(x.dtype).contiguous(memory_format=fmt)
        elif dx is not None:
            dx = _put(_constant(x, list(x.shape), None, x.dtype, fmt), p.in_index, p.in_valid, dx)
        if reads_dw:
            dw, dz_in, dz_out = unpack_weight(
                dw_packed,
                weight,
                p,
                in_gate,
                out_gate,
                scale_in,
                scale_out,
                (need_w, need_in, need_out),
            )
    if bias is not None and (need_b or need_out):
        db, dz_bias = unpack_bias(
            dy.sum((0, 2, 3), dtype=torch.promote_types(dtype, torch.float32)),
            bias,
            out_gate,
            scale_out,
            need_out,
        )
        dz_out = dz_bias if dz_out is None else dz_out if dz_bias is None else dz_out + dz_bias
    return [
        dx,
        dw if need_w else None,
        db if need_b else None,
        fractional(dz_in, in_gate, full_in),
        fractional(dz_out, out_gate, full_out),
    ]


def unpack_bias(
    total: Tensor, bias: Tensor, out_gate: Gate | None, scale_out: bool, need_z: bool
) -> tuple[Tensor, Tensor | None]:
    """dbias and its part of dz_out (of every open gate), from dy summed over everything but channels."""
    if out_gate is None:
        return total.to(bias.dtype), None
    z = out_gate[0]
    total = total.to(z.dtype).masked_fill(z == 0, 0)  # a closed channel's dy may be anything
    return (total * z if scale_out else total).to(bias.dtype), total * bias if need_z else None
