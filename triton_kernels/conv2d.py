"""gated_conv2d: implicit products over packed channels, extents read on the device, no host sync.

    y[m, o] = z_o * (sum over taps t and inputs i of x[row(m, t), i] W[o, i, t] z_i + b_o)

Pixels are the rows of a matrix (N H W, channels), channels_last memory; a gated side holds its open channels
first (pack.py), its packed W as (out', tap, in') with the factors of x in it. The product walks over taps and
chunks of open inputs and gathers whole pieces of rows. Tiles narrow where the open outputs end: the device
decides their widths. The gradient of x is the same product over the outputs, each phase of the stride with
the taps that meet it alone; that of W sums rows in shares that a second kernel adds, in one order.

1x1 convolutions go to the matrix product; groups have direct kernels of their own (conv2d_groups.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from l0kernels._calls import Conv2dCall, Gate, LinearCall, Wanted
from l0kernels._gates import HardConcrete, round_up

from . import conv2d_groups
from .conv2d_channels import _rows_operand, as_images, as_rows, bias_grads
from .conv2d_groups import _mode
from .conv2d_product import convolve, pack_weight
from .conv2d_tiles import Window, window
from .conv2d_weight import weight_product
from .linear import (
    affine,
    input_grad_of,
    linear_backward,
    linear_forward,
    linear_saved_shapes,
    placed,
    result,
    support,
    weight_grad_of,
)
from .matmul import Operand
from .pack import _launch_reduce


def _pointwise(call: Conv2dCall) -> bool:
    unit = call.stride == [1, 1] and call.padding == [0, 0] and call.groups == 1
    return unit and tuple(call.weight.shape[2:]) == (1, 1)


def _over_pixels(call: Conv2dCall, rows: Tensor) -> LinearCall:
    """The layer that a 1x1 convolution is; ``rows``: the pixels of x."""
    _, weight, bias, in_gate, out_gate = call[:5]
    in_gate = support(in_gate, call.scale_in)
    return LinearCall(rows, weight.flatten(1), bias, in_gate, out_gate, call.scale_out, call.dtype)


def conv2d_saved_shapes(call: Conv2dCall) -> list[tuple[int, ...]]:
    """What backward takes over: the packed x and, for a 1x1 convolution, what the linear layer keeps."""
    x, weight, bias, in_gate, out_gate = call[:5]
    if call.in_packed or in_gate is None or call.groups != 1:
        return []
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if _pointwise(call) and not call.out_packed:
        flat = (torch.empty(rows, x.shape[1], device="meta"), torch.empty(weight.shape[:2], device="meta"))
        return [*linear_saved_shapes(LinearCall(*flat, bias, in_gate, out_gate, call.scale_out, call.dtype))]
    return [(rows, round_up(x.shape[1]))]


def conv2d_forward(call: Conv2dCall) -> tuple[Tensor, list[Tensor]]:
    """y = z_out * (conv2d(x * z_in, W) + b) (N, out, H', W'), and what backward takes over.

    A packed side's channels are those of its gate: [0, open) the open ones, zeros to the extent, natural
    where the gate is plain. y is zero where closed and channels_last; a channels_last x is read as it lies.
    """
    x, weight, bias, in_gate, out_gate, scale_in, scale_out, in_packed, out_packed, *_, dtype = call
    (n, _, h, w), rows = x.shape, as_rows(x)
    pointwise, out_packed = _pointwise(call), out_packed and out_gate is not None
    if pointwise and not in_packed and not out_packed:
        y, saved = linear_forward(_over_pixels(call, rows))
        return as_images(y, n, h, w), saved
    at = window(call)
    if call.groups != 1:
        return as_images(conv2d_groups.forward(call, rows, at), n, at.OH, at.OW), []
    inputs = _rows_operand(rows, in_gate, in_packed, dtype)
    if pointwise:
        y, _ = affine(_over_pixels(call, rows), inputs, out_packed)
    else:
        packed = pack_weight(weight, out_gate, in_gate, dtype, mode_k=_mode(in_gate, scale_in))
        (n_out, n_in), mode_n = weight.shape[:2], _mode(out_gate, scale_out)
        c = result(at.rows, n_out, None if out_packed else out_gate, dtype, x.device)
        convolve(
            inputs, packed, c, at, (n_out, n_in), n_gate=out_gate, k_gate=in_gate, bias=bias, mode_n=mode_n
        )
        y = placed(c, out_gate)
    return as_images(y, n, at.OH, at.OW), [] if inputs.packed is None else [inputs.packed]


def conv2d_backward(call: Conv2dCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where not wanted.

    dx comes packed as x came and dy as y went, in channels_last memory; what is closed is zero in dweight,
    dbias and a dense dx.
    """
    x, weight, bias, in_gate, out_gate, _, scale_out, in_packed, out_packed, *_, dtype = call
    (n, _, h, w), out_packed = x.shape, out_packed and out_gate is not None
    need_x, need_w, need_b, need_in, need_out = wanted.needs
    need_in, need_out = need_in and in_gate is not None, need_out and out_gate is not None
    wanted = Wanted(wanted.full, [need_x, need_w, need_b, need_in, need_out], wanted.dist)
    rows, pointwise = as_rows(dy), _pointwise(call)
    reads_x = need_w or need_in or need_out
    x_rows = as_rows(x) if pointwise or reads_x else x
    if pointwise and not in_packed and not out_packed:
        dx, dw, db, dz_in, dz_out = linear_backward(_over_pixels(call, x_rows), rows, saved, wanted)
    else:
        dx = dw = db = dz_in = dz_out = share = None
        if bias is not None and (need_b or need_out):
            dy_gate = out_gate if out_packed else None
            db, share = bias_grads(rows, bias, out_gate, dy_gate, _mode(out_gate, scale_out), need_out)
            db = db if need_b else None
        if not weight.numel():  # no inputs or no outputs
            dx = torch.zeros_like(x, memory_format=torch.channels_last) if need_x else None
            dz_in = torch.zeros_like(in_gate[0]) if need_in and in_gate is not None else None
            if need_out and out_gate is not None:
                sums = torch.zeros_like(out_gate[0]) if share is None else share
                dz_out = conv2d_groups._masked(sums, out_gate[0], wanted.full[1], wanted.dist)
            return [dx, torch.zeros_like(weight) if need_w else None, db, dz_in, dz_out]
        if call.groups != 1:
            dx, dw, dz_in, dz_out = conv2d_groups.backward(call, rows, share, wanted, window(call))
        else:
            grad, inputs = _rows_operand(rows, out_gate, out_packed, dtype), Operand(None)
            if reads_x:
                inputs = _rows_operand(x_rows, in_gate, in_packed, dtype, saved[0] if saved else None)
            if pointwise:
                layer, out_gate = _over_pixels(call, x_rows), support(out_gate, scale_out)
                dx = input_grad_of(layer, grad, out_gate, in_packed=in_packed) if need_x else None
                if reads_x:
                    dw, dz_in, dz_out = weight_grad_of(layer, grad, inputs, out_gate, share, wanted)
            else:
                dx, dw, dz_in, dz_out = _conv_backward(call, grad, inputs, share, wanted, window(call))
    dw = dw.view(weight.shape) if pointwise and dw is not None else dw
    return [None if dx is None else as_images(dx, n, h, w), dw, db, dz_in, dz_out]


def _conv_backward(
    call: Conv2dCall, grad: Operand, inputs: Operand, share: Tensor | None, wanted: Wanted, at: Window
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dz_in, dz_out; ``share``: what the bias adds to dz_out."""
    x, weight, _, in_gate, out_gate, scale_in, scale_out, in_packed, *_, dtype = call
    (full_in, full_out), (need_x, need_w, _, need_in, need_out), dist = wanted
    n_out, n_in = weight.shape[:2]
    modes = _mode(out_gate, scale_out), _mode(in_gate, scale_in)
    dx = dw = dz_in = dz_out = None
    if need_x:
        back = at.turned
        w = pack_weight(weight, in_gate, out_gate, dtype, mode_n=modes[1], mode_k=modes[0], transpose=True)
        c = result(back.rows, n_in, None if in_packed else in_gate, x.dtype, weight.device)
        convolve(grad, w, c, back, (n_in, n_out), n_gate=in_gate, k_gate=out_gate, transposed=True)
        dx = placed(c, in_gate)
    if need_w or need_in or need_out:
        dw, parts_o, parts_i = weight_product(
            grad, inputs, weight, at, o_gate=out_gate, i_gate=in_gate, modes=modes, dz_o=need_out,
            dz_i=need_in, share=share,
        )  # fmt: skip
        if parts_o is not None and out_gate is not None:
            dz_out = _gate_total(parts_o, out_gate, full_out, dist)
        if parts_i is not None and in_gate is not None:
            dz_in = _gate_total(parts_i, in_gate, full_in, dist)
    return dx, dw if need_w else None, dz_in, dz_out


def _gate_total(partial: Tensor, gate: Gate, full: bool, dist: HardConcrete | None) -> Tensor:
    """The gradient of a gate from its partial sums (P, units)."""
    out = torch.empty(partial.shape[1], dtype=torch.float32, device=partial.device)
    _launch_reduce(partial, None, out, None, gate, False, True, full, dist)
    return out
