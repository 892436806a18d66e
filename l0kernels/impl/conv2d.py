"""Gated convolution as pack -> torch's convolution -> unpack, of exactly the open channels.

Gates are folded into the packed weight: conv(x * z_in, W) * z_out = conv(x, z_out W z_in), so that the
products read activations as they are. A gate is None or a list [z, index, count]; conv is stride, padding,
dilation, groups; p is the backend's pair of pack and unpack. Counts change on every step, and oneDNN compiles
a kernel for every new shape: about 1 ms, once, and less than the channels that rounding would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .._calls import Conv2dCall, Gate, GateGrads, Wanted
from .._compat import settled
from .few_channels import Conv
from .memory import empty_grad
from .packed import PackUnpack, extent, to_log_alpha


class Convolution(Protocol):
    """A backend's own, of all channels of x and in one memory format."""

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, fmt: torch.memory_format, /
    ) -> Tensor: ...

    def convolve_grad(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        fmt: torch.memory_format,
        need_x: bool,
        need_w: bool,
        /,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx, and dweight with dbias."""


class Convolves(PackUnpack, Protocol):
    """Pack and unpack, and what multiplies in between."""

    def convolution(self, x: Tensor, weight: Tensor, conv: Conv, /) -> Convolution | None:
        """None where torch's is faster."""


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """That of torch's conv2d: channels_last if either operand is."""
    for t in (x, weight):
        if t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def fastest_format(x: Tensor) -> torch.memory_format:
    """Where the caller has no say that of x: to turn it and its gradient costs more than a format gains. Of a
    single channel, which has both, channels last: oneDNN, pooling and the rest are faster with it."""
    return torch.channels_last if x.shape[1] == 1 else memory_format(x, x)


def in_format(x: Tensor, fmt: torch.memory_format) -> Tensor:
    """x in a memory format, a single channel by its strides, too, for they choose oneDNN's kernel."""
    if fmt == torch.channels_last and x.shape[1] == 1:
        return x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=fmt)


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
    """What is computed: ``groups`` products of equally many inputs and equally many outputs each.

    Attributes:
        in_index: the input channels, group by group; None for all of them in order.
        out_index: the output channels.
        opened: the open output channels: a group whose inputs are all closed leaves them their bias.
        in_valid, out_valid: which entries of the indices are channels and not padding; None for all.
        cell: (groups * outs, ins) the kernels' positions in weight (out * in / groups, ...); None for all.
        empty: no product is left.
    """

    groups: int
    in_index: Tensor | None
    out_index: Tensor | None
    opened: Tensor | None
    in_valid: Tensor | None = None
    out_valid: Tensor | None = None
    cell: Tensor | None = None
    empty: bool = False

    @property
    def computes_all(self) -> bool:
        """Whether the products give every open channel, in order."""
        return not self.empty and (self.out_index is None or self.out_index is self.opened)


def plan(weight: Tensor, groups: int, in_gate: Gate | None, out_gate: Gate | None) -> Plan:
    """The open channels of both sides, several groups padded so that each has equally many.

    A group without an open input or without an open output is left out.
    """
    n_out, per_group = weight.shape[0], weight.shape[1]
    n_in = per_group * groups
    ins, outs = open_channels(in_gate, n_in), open_channels(out_gate, n_out)
    if groups == 1:
        empty = 0 in (n_in if ins is None else len(ins), n_out if outs is None else len(outs))
        return Plan(1, ins, outs, outs, empty=empty)
    if ins is None and outs is None:
        return Plan(groups, None, None, None, empty=weight.numel() == 0)
    in_index, in_valid, out_index, out_valid = _by_group(ins, outs, n_in, n_out, groups, weight.device)
    if in_index.numel() == 0:
        return Plan(0, None, None, outs, empty=True)
    cell = out_index[:, :, None] * per_group + (in_index % per_group)[:, None]
    return Plan(
        in_index.shape[0],
        in_index.flatten(),
        out_index.flatten(),
        outs,
        in_valid.flatten(),
        out_valid.flatten(),
        cell.flatten(0, 1),
    )


def _by_group(
    ins: Tensor | None, outs: Tensor | None, n_in: int, n_out: int, groups: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channels (groups left, most in a group) of either side, and which of them are no padding."""
    sides = []
    for index, size in ((ins, n_in), (outs, n_out)):
        is_open = torch.full((size,), index is None, device=device)
        if index is not None:
            is_open[index] = True
        sides.append(is_open.view(groups, -1))
    left = (sides[0].any(1) & sides[1].any(1)).nonzero()[:, 0]
    tables = []
    for is_open in sides:
        is_open = is_open.index_select(0, left)
        number = is_open.sum(1, keepdim=True)
        order = torch.argsort(is_open.to(torch.uint8), dim=1, descending=True, stable=True)
        order = order[:, : int(number.max()) if len(left) else 0]
        valid = torch.arange(order.shape[1], device=device) < number
        # The padding repeats an open channel: what it holds reaches this group anyhow.
        order = torch.where(valid, order, order[:, :1]) + left[:, None] * is_open.shape[1]
        tables += [order, valid]
    return tables[0], tables[1], tables[2], tables[3]


def _factors(
    p: Plan, in_gate: Gate | None, out_gate: Gate | None, scale_in: bool, scale_out: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What multiplies the inputs and the outputs of grouped kernels (groups, outs, ins, taps); None for 1."""
    factors: list[Tensor | None] = []
    for gate, index, valid, scaled, shape in (
        (in_gate, p.in_index, p.in_valid, scale_in, (p.groups, 1, -1, 1)),
        (out_gate, p.out_index, p.out_valid, scale_out, (p.groups, -1, 1, 1)),
    ):
        z = None
        if gate is not None and scaled:
            z = gate[0] if index is None else gate[0].index_select(0, index)
        if valid is not None:
            z = valid.to(torch.float32) if z is None else z * valid
        factors.append(None if z is None else z.view(shape))
    return factors[0], factors[1]


def _grouped_kernels(weight: Tensor, p: Plan) -> Tensor:
    """The kernels of a plan, unscaled, (groups, outs, ins, taps)."""
    taps = weight.shape[2] * weight.shape[3]
    if p.cell is None:
        return weight.reshape(p.groups, -1, weight.shape[1], taps)
    kernels = weight.reshape(-1, taps).index_select(0, p.cell.flatten())
    return kernels.view(p.groups, -1, p.cell.shape[1], taps)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """pack rounds the lengths of 16-bit types up, which would cut kernels apart."""
    return torch.promote_types(dtype, torch.float32)


def pack_weight(
    pair: PackUnpack,
    weight: Tensor,
    p: Plan,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """z_out W z_in of the plan's channels, (groups * outs, ins, kh, kw)."""
    if in_gate is None and out_gate is None:
        return weight.to(dtype)
    if p.cell is None and p.groups == 1:
        full = weight.reshape(weight.shape[0], -1)
        scales, taps = {"scale_rows": scale_out, "scale_cols": scale_in}, weight.shape[2] * weight.shape[3]
        packed = pair.pack(full, out_gate, in_gate, _wide(dtype), run=taps, **scales).to(dtype)
        return packed.view(packed.shape[0], packed.shape[1] // taps, *weight.shape[2:])
    kernels = _grouped_kernels(weight, p)
    for factor in _factors(p, in_gate, out_gate, scale_in, scale_out):
        if factor is not None:
            kernels = kernels * factor
    return kernels.to(dtype).reshape(-1, kernels.shape[2], *weight.shape[2:])


def unpack_weight(
    pair: PackUnpack,
    grad: Tensor,
    weight: Tensor,
    p: Plan,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    full: tuple[bool, bool],
    needs: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """dW, dz_in and dz_out from the gradient of the packed weight."""
    if in_gate is None and out_gate is None:
        return [grad.to(weight.dtype).contiguous(), None, None]
    taps = weight.shape[2] * weight.shape[3]
    if p.cell is None and p.groups == 1:
        dw, dz_out, dz_in = pair.unpack(
            grad.reshape(grad.shape[0], -1),
            (weight.shape[0], weight.shape[1] * taps),
            out_gate,
            in_gate,
            weight.dtype,
            scale_rows=scale_out,
            scale_cols=scale_in,
            grads=GateGrads(weight.reshape(weight.shape[0], -1), needs[2], needs[1], full[1], full[0]),
            out=empty_grad(weight).view(weight.shape[0], weight.shape[1] * taps),
            run=taps,
        )
        return [dw.view(weight.shape), dz_in, dz_out]
    ins = weight.shape[1] if p.cell is None else p.cell.shape[1]
    kernels = grad.reshape(p.groups, -1, ins, taps)
    in_factor, out_factor = _factors(p, in_gate, out_gate, scale_in, scale_out)
    terms = (
        (kernels.to(_wide(kernels.dtype)) * _grouped_kernels(weight, p)).sum(3) if any(needs[1:]) else None
    )
    dz: list[Tensor | None] = [None, None]
    for side, (gate, other, index, valid, dim) in enumerate(
        (
            (in_gate, out_factor, p.in_index, p.in_valid, 1),
            (out_gate, in_factor, p.out_index, p.out_valid, 2),
        )
    ):
        if needs[1 + side] and gate is not None and terms is not None:
            total = (
                (terms if other is None else terms * other.squeeze(3)).sum(dim).flatten().to(gate[0].dtype)
            )
            if index is not None and valid is not None:
                total = torch.zeros_like(gate[0]).index_add_(0, index, total * valid)
            dz[side] = _fractional(total, gate, full[side])
    for factor in (in_factor, out_factor):
        if factor is not None:
            kernels = kernels * factor
    kernels = kernels.to(weight.dtype).reshape(-1, taps)
    if p.cell is None:
        return [kernels.view(weight.shape), *dz]
    dw = empty_grad(weight).zero_()
    dw.view(-1, taps).index_add_(0, p.cell.flatten(), kernels)
    return [dw, *dz]


def _fractional(dz: Tensor, gate: Gate, full: bool) -> Tensor:
    return dz if full else dz.masked_fill((gate[0] <= 0) | (gate[0] >= 1), 0)


def pack_bias(
    pair: PackUnpack, bias: Tensor, out_gate: Gate | None, scale_out: bool, dtype: torch.dtype
) -> Tensor:
    """The bias of the open output channels, times their gates."""
    if out_gate is None:
        return bias.to(dtype)
    return pair.pack(bias[None], None, out_gate, _wide(dtype), scale_cols=scale_out)[0].to(dtype)


def unpack_bias(
    pair: PackUnpack,
    grad: Tensor,
    bias: Tensor,
    out_gate: Gate | None,
    scale_out: bool,
    full: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """dbias and its part of dz_out from the gradient of the packed bias."""
    if out_gate is None:
        return grad.to(bias.dtype), None
    db, _, dz = pair.unpack(
        grad[None],
        (1, bias.shape[0]),
        None,
        out_gate,
        bias.dtype,
        scale_cols=scale_out,
        grads=GateGrads(bias[None], cols=need_z, full_cols=full),
    )
    return db[0], dz


def take(t: Tensor, index: Tensor | None) -> Tensor:
    """The channels ``index`` of t (N, C, H, W), in t's memory format."""
    if index is None:
        return t
    if memory_format(t, t) == torch.contiguous_format:
        return t.index_select(1, index)
    out, matrix = _channels_last(t, len(index), t.dtype)
    torch.index_select(_rows(t), 1, index, out=matrix)  # torch selects columns five times as fast as channels
    return out


def put(pair: PackUnpack, value: Tensor, gate: Gate, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    """The mirror of take: value's channels where the gate is open, zeros in the others."""
    N, _, H, W = value.shape
    C = gate[0].shape[0]
    if fmt == torch.contiguous_format:
        out = value.new_zeros(N, C, H, W, dtype=dtype)
        return out.index_add_(1, gate[1][: value.shape[1]].long(), value.to(dtype))
    out, matrix = _channels_last(value, C, dtype)
    pair.unpack(_rows(value), (len(matrix), C), None, gate, dtype, out=matrix)
    return out


def _rows(t: Tensor) -> Tensor:
    """t (N, C, H, W), channels last, as a matrix of C columns."""
    return t.permute(0, 2, 3, 1).reshape(t.shape[0] * t.shape[2] * t.shape[3], t.shape[1])


def _channels_last(like: Tensor, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unwritten memory (N, channels, H, W), no view, for users may change it in place; and as a matrix."""
    N, _, H, W = like.shape
    shape, fmt = (N, channels, H, W), torch.channels_last
    out = torch.empty(shape, dtype=dtype, device=like.device, memory_format=fmt)
    return out, out.permute(0, 2, 3, 1).view(N * H * W, channels)


def constant(
    like: Tensor, shape: list[int], value: Tensor | None, dtype: torch.dtype, fmt: torch.memory_format
) -> Tensor:
    """A tensor (N, C, H, W) of one value per channel, or of zeros."""
    out = torch.empty(shape, dtype=dtype, device=like.device, memory_format=fmt)
    return out.zero_() if value is None else out.copy_(value[:, None, None].expand(shape))


def put_groups(y: Tensor, p: Plan, rest: Tensor) -> Tensor:
    """The outputs of a plan's groups, and ``rest`` where an open channel's group was left out."""
    out_index = p.out_index
    if p.out_valid is not None and out_index is not None:
        valid = p.out_valid.nonzero()[:, 0]
        out_index, y = out_index.index_select(0, valid), y.index_select(1, valid)
    place = out_index if p.opened is None or out_index is None else torch.searchsorted(p.opened, out_index)
    return y if place is None else rest.index_copy(1, place, y.to(rest.dtype))


def bias_of(p: Plan, bias: Tensor) -> Tensor:
    """The bias of the computed channels out of that of the open ones."""
    if p.computes_all or p.out_index is None:
        return bias
    return bias.index_select(
        0, p.out_index if p.opened is None else torch.searchsorted(p.opened, p.out_index)
    )


def conv2d_saved_shapes(call: Conv2dCall) -> list[tuple[int, ...]]:
    """Nothing is kept for backward."""
    return []


def conv2d_forward(pair: Convolves, call: Conv2dCall) -> tuple[Tensor, list[Tensor]]:
    """y (N, out, H', W') of gated_conv2d for x (N, in, H, W)."""
    x, weight, bias, in_gate, out_gate, scale_in, scale_out, *_, dtype = call
    conv = stride, padding, dilation, groups = call.conv
    fmt = memory_format(x, weight)
    p = plan(weight, groups, in_gate, out_gate)
    shape = output_shape(x, weight, conv)
    b = None if bias is None else pack_bias(pair, bias, out_gate, scale_out, dtype)
    if not p.empty:
        ins = settled(take(x, p.in_index).to(dtype), p.groups, stride)
        w = pack_weight(pair, weight, p, in_gate, out_gate, scale_in, scale_out, dtype)
        of, bias = (stride, padding, dilation, p.groups), None if b is None else bias_of(p, b)
        own = pair.convolution(ins, w, of)
        y = F.conv2d(ins, w, bias, *of) if own is None else own.convolve(ins, w, bias, of, fmt)
    if p.opened is not None:
        shape[1] = len(p.opened)
    if not p.computes_all:
        rest = constant(x, shape, b, dtype, fmt)
        y = rest if p.empty else put_groups(y, p, rest)
    if out_gate is None or p.opened is None:
        return y.contiguous(memory_format=fmt), []
    return put(pair, y, out_gate, dtype, fmt), []


def conv2d_backward(
    pair: Convolves, call: Conv2dCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where not wanted."""
    x, weight, bias, in_gate, out_gate, scale_in, scale_out, *_, dtype = call
    (full_in, full_out), (need_x, need_w, need_b, need_in, need_out), dist = wanted
    stride, padding, dilation, groups = call.conv
    fmt = memory_format(x, weight)
    dx = dw = db = dz_in = dz_out = total = None
    p = plan(weight, groups, in_gate, out_gate)
    reads_dw = need_w or need_in or need_out
    reads_db = bias is not None and (need_b or need_out)
    dy_open = take(dy, p.opened).to(dtype)
    if p.empty or x.shape[0] == 0:
        dx = constant(x, list(x.shape), None, x.dtype, fmt) if need_x else None
        dw = empty_grad(weight).zero_() if need_w else None
        dz_in = torch.zeros_like(in_gate[0]) if need_in and in_gate is not None else None
        dz_out = torch.zeros_like(out_gate[0]) if need_out and out_gate is not None else None
    elif need_x or reads_dw:
        along = reads_db and reads_dw and p.computes_all  # then the bias comes with the weight
        grad = dy_open if p.computes_all else take(dy, p.out_index).to(dtype)
        ins = settled(take(x, p.in_index).to(dtype), p.groups, stride)
        w = pack_weight(pair, weight, p, in_gate, out_gate, scale_in, scale_out, dtype)
        of = stride, padding, dilation, p.groups
        own = pair.convolution(ins, w, of)
        if own is None:
            sizes, wants = [dy_open.shape[1]] if along else None, [need_x, reads_dw, along]
            dx, dw_packed, total = torch.ops.aten.convolution_backward(
                grad, ins, w, sizes, stride, padding, dilation, False, [0, 0], p.groups, wants
            )
        else:
            dx, dw_packed, db_packed = own.convolve_grad(grad, ins, w, of, fmt, need_x, reads_dw)
            total = db_packed if along else None
        if dx is not None:
            dx = _scatter_dx(pair, dx, x, p, in_gate, groups, fmt)
        if reads_dw:
            full, needs = (full_in, full_out), (need_w, need_in, need_out)
            gates = (in_gate, out_gate, scale_in, scale_out)
            dw, dz_in, dz_out = unpack_weight(pair, dw_packed, weight, p, *gates, full, needs)
    if bias is not None and reads_db:
        if total is None:
            total = dy_open.sum((0, 2, 3), dtype=_wide(dtype))
        db, dz_bias = unpack_bias(pair, total, bias, out_gate, scale_out, full_out, need_out)
        dz_out = dz_bias if dz_out is None else dz_out if dz_bias is None else dz_out + dz_bias
    dz = to_log_alpha(pair, (dz_in, dz_out), (in_gate, out_gate), dist)
    return [dx, dw if need_w else None, db if need_b else None, *dz]


def _scatter_dx(
    pair: PackUnpack,
    dx: Tensor,
    x: Tensor,
    p: Plan,
    in_gate: Gate | None,
    groups: int,
    fmt: torch.memory_format,
) -> Tensor:
    if p.in_index is None:
        return dx.to(x.dtype).contiguous(memory_format=fmt)
    if groups == 1 and in_gate is not None:
        return put(pair, dx, in_gate, x.dtype, fmt)
    if p.in_valid is not None:
        index, dx = p.in_index[p.in_valid], dx[:, p.in_valid]
    return constant(x, list(x.shape), None, x.dtype, fmt).index_copy_(1, index, dx.to(x.dtype))
