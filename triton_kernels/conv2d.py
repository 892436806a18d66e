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

from l0kernels._gates import HardConcrete, round_up

from . import conv2d_groups
from .conv2d_channels import _rows_operand, as_images, as_rows, bias_grads
from .conv2d_groups import _mode
from .conv2d_product import convolve, pack_weight
from .conv2d_tiles import Conv
from .conv2d_weight import weight_product
from .linear import (
    input_grad,
    linear_backward,
    linear_forward,
    linear_saved_shapes,
    operand,
    support,
    weight_grad,
)
from .matmul import Gate, Operand, matmul
from .pack import _launch_reduce, unpack
from .sample import gate_grad


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _output_shape(x_shape: torch.Size, weight_shape: torch.Size, conv: Conv) -> tuple[int, int]:
    stride, padding, dilation, _ = conv
    h, w = (
        output_size(x_shape[2 + d], weight_shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    return h, w


def _pointwise(weight_shape: torch.Size, conv: Conv) -> bool:
    stride, padding, _, groups = conv
    unit = list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1
    return unit and tuple(weight_shape[2:]) == (1, 1)


def conv2d_saved_shapes(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    in_gated: bool,
    out_gated: bool,
    in_packed: bool,
    out_packed: bool,
    conv: Conv,
    dtype: torch.dtype,
) -> list[tuple[int, ...]]:
    """What backward takes over: the packed x and, for a 1x1 convolution, what the linear layer keeps."""
    if in_packed or not in_gated or conv[3] != 1:
        return []
    rows = x_shape[0] * x_shape[2] * x_shape[3]
    if _pointwise(weight_shape, conv) and not out_packed:
        flat = (torch.empty(rows, x_shape[1], device="meta"), torch.empty(weight_shape[:2], device="meta"))
        return [*linear_saved_shapes(*flat, in_gated, out_gated, dtype)]
    return [(rows, round_up(x_shape[1]))]


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
    """y = z_out * (conv2d(x * z_in, W) + b) (N, out, H', W') in ``dtype``, and what backward takes over.

    Args:
        x: (N, in, H, W); with ``in_packed`` its channels are those of in_gate, packed: [0, open) the open
            ones, zeros to the extent, natural where the gate is plain. channels_last is read as it lies.
        in_gate, out_gate: [z, index, count] or None.
        scale_in, scale_out: False: the gate only selects.
        out_packed: y comes packed as out_gate says; else dense, zeros where closed. channels_last memory.
        conv: stride, padding, dilation, groups.
    """
    n_out, (n, n_in, h, w) = weight.shape[0], x.shape
    oh, ow = _output_shape(x.shape, weight.shape, conv)
    if conv[3] != 1:
        y = conv2d_groups.forward(
            as_rows(x), weight, bias, in_gate, out_gate, scale_in, scale_out, in_packed, out_packed,
            (n, h, w), (oh, ow), conv, dtype,
        )  # fmt: skip
        return as_images(y, n, oh, ow), []
    out_packed = out_packed and out_gate is not None
    if _pointwise(weight.shape, conv):
        y, saved = _pointwise_forward(
            x, weight.flatten(1), bias, support(in_gate, scale_in), out_gate, scale_out, in_packed,
            out_packed, dtype,
        )  # fmt: skip
        return as_images(y, n, oh, ow), saved
    inputs = _rows_operand(x, in_gate, in_packed, dtype)
    packed_weight = pack_weight(weight, out_gate, in_gate, dtype, mode_k=_mode(in_gate, scale_in))
    y = torch.empty(n * oh * ow, n_out, dtype=dtype, device=x.device)
    buffer = None
    if out_gate is not None and not out_packed:
        buffer = torch.empty(n * oh * ow, round_up(n_out), dtype=dtype, device=x.device)
    convolve(
        inputs, packed_weight, Operand(y, buffer), (n, h, w), (oh, ow), _kernel(weight), (n_out, n_in), conv,
        n_gate=out_gate, k_gate=in_gate, bias=bias, mode_n=_mode(out_gate, scale_out),
    )  # fmt: skip
    if buffer is not None:
        unpack(buffer, (y.shape[0], n_out), None, out_gate, dtype, out=y, skip_plain=True)
    saved = [inputs.packed] if inputs.packed is not None else []
    return as_images(y, n, oh, ow), saved


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _pointwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The layer over pixels; a packed side lies where the product reads or writes it."""
    rows = as_rows(x)
    if not in_packed and not out_packed:
        return linear_forward(rows, weight, bias, in_gate, out_gate, scale_out, dtype)
    N, K = weight.shape
    out_gate = support(out_gate, scale_out)
    a = _rows_operand(x, in_gate, in_packed, dtype)
    b = operand(weight, out_gate, in_gate, dtype, scale_cols=in_gate is not None)
    y = torch.empty(rows.shape[0], N, dtype=dtype, device=x.device)
    buffer = None
    if out_gate is not None and not out_packed:
        buffer = torch.empty(rows.shape[0], round_up(N), dtype=dtype, device=x.device)
    matmul(
        "nt", a, b, Operand(y, buffer), rows.shape[0], N, K, n_gate=out_gate, k_gate=in_gate, bias=bias,
        scale_n=out_gate is not None,
    )  # fmt: skip
    if buffer is not None:
        unpack(buffer, (y.shape[0], N), None, out_gate, dtype, out=y, skip_plain=True)
    return y, [a.packed] if a.packed is not None and in_gate is not None else []


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
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where ``needs`` says so; with ``dist`` dlog_alpha, not dz.

    dx comes packed as x came and dy as y went, in channels_last memory; what is closed is zero in dweight,
    dbias and a dense dx. dz is exactly 0 where z is not fractional, unless ``full_in``, ``full_out``.
    """
    (n, _, h, w), (oh, ow) = x.shape, dy.shape[2:]
    out_packed = out_packed and out_gate is not None
    need_x, need_w, need_b, need_in, need_out = needs
    need_in, need_out = need_in and in_gate is not None, need_out and out_gate is not None
    if _pointwise(weight.shape, conv) and not in_packed and not out_packed:
        flat = weight.flatten(1)
        dx, dw, *rest = linear_backward(
            as_rows(dy), as_rows(x), flat, bias, support(in_gate, scale_in), out_gate, saved, scale_out,
            full_in, full_out, dtype, [*needs[:3], need_in, need_out], dist,
        )  # fmt: skip
        return [
            None if dx is None else as_images(dx, n, h, w),
            None if dw is None else dw.view(weight.shape),
            *rest,
        ]
    db = share = None
    if bias is not None and (need_b or need_out):
        dy_gate = out_gate if out_packed else None
        db, share = bias_grads(as_rows(dy), bias, out_gate, dy_gate, _mode(out_gate, scale_out), need_out)
        db = db if need_b else None
    if not weight.numel():  # no inputs or no outputs
        dx = torch.zeros_like(x, memory_format=torch.channels_last) if need_x else None
        dz_in = torch.zeros_like(in_gate[0]) if need_in and in_gate is not None else None
        dz_out = None
        if need_out and out_gate is not None:
            sums = torch.zeros_like(out_gate[0]) if share is None else share
            dz_out = conv2d_groups._masked(sums, out_gate[0], full_out, dist)
        return [dx, torch.zeros_like(weight) if need_w else None, db, dz_in, dz_out]
    settings = (in_gate, out_gate, scale_in, scale_out, full_in, full_out)
    wants = (need_x, need_w, need_in, need_out)
    if conv[3] != 1:
        dx, dw, dz_in, dz_out = conv2d_groups.backward(
            as_rows(dy), as_rows(x), weight, share, in_gate, out_gate, scale_in, scale_out, in_packed,
            out_packed, full_in, full_out, (n, h, w), (oh, ow), conv, wants, dist,
        )  # fmt: skip
        return [None if dx is None else as_images(dx, n, h, w), dw, db, dz_in, dz_out]
    grad = _rows_operand(dy, out_gate, out_packed, dtype)
    inputs = Operand(None)
    if need_w or need_in or need_out:
        inputs = _rows_operand(x, in_gate, in_packed, dtype, saved[0] if saved else None)
    if _pointwise(weight.shape, conv):
        dx, dw, dz_in, dz_out = _pointwise_backward(
            grad, inputs, weight.flatten(1), share, *settings, in_packed, x.dtype, wants, n * h * w, dist
        )
        dw = None if dw is None else dw.view(weight.shape)
    else:
        dx, dw, dz_in, dz_out = _conv_backward(
            grad, inputs, weight, share, *settings, in_packed, x.dtype, wants, (n, h, w), (oh, ow), conv, dist
        )
    return [None if dx is None else as_images(dx, n, h, w), dw, db, dz_in, dz_out]


def _conv_backward(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    share: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    in_packed: bool,
    x_dtype: torch.dtype,
    wants: tuple[bool, bool, bool, bool],
    x_size: tuple[int, int, int],
    y_size: tuple[int, int],
    conv: Conv,
    dist: HardConcrete | None,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dz_in, dz_out; ``share``: what the bias adds to dz_out."""
    need_x, need_w, need_in, need_out = wants
    first = next(t for t in grad if t is not None)
    n_out, n_in = weight.shape[:2]
    modes = _mode(out_gate, scale_out), _mode(in_gate, scale_in)
    (n, h, w), kernel = x_size, _kernel(weight)
    dx = dw = dz_in = dz_out = None
    if need_x:
        turned = pack_weight(
            weight, in_gate, out_gate, first.dtype, mode_n=modes[1], mode_k=modes[0], transpose=True
        )
        dx = torch.empty(n * h * w, n_in, dtype=x_dtype, device=weight.device)
        buffer = None
        if in_gate is not None and not in_packed:
            buffer = torch.empty(n * h * w, round_up(n_in), dtype=x_dtype, device=weight.device)
        convolve(
            grad, turned, Operand(dx, buffer), (n, *y_size), (h, w), kernel, (n_in, n_out), conv,
            n_gate=in_gate, k_gate=out_gate, transposed=True,
        )  # fmt: skip
        if buffer is not None:
            unpack(buffer, (n * h * w, n_in), None, in_gate, x_dtype, out=dx, skip_plain=True)
    if need_w or need_in or need_out:
        dw, parts_o, parts_i = weight_product(
            grad, inputs, weight, x_size, y_size, conv, o_gate=out_gate, i_gate=in_gate, modes=modes,
            dz_o=need_out, dz_i=need_in, share=share,
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


def _pointwise_backward(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    share: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    in_packed: bool,
    x_dtype: torch.dtype,
    wants: tuple[bool, bool, bool, bool],
    rows: int,
    dist: HardConcrete | None,
) -> tuple[Tensor | None, ...]:
    """_conv_backward of a 1x1 convolution with a packed side: the products of linear.py."""
    need_x, need_w, need_in, need_out = wants
    dtype = next(t for t in grad if t is not None).dtype
    N, K = weight.shape
    in_gate, out_gate = support(in_gate, scale_in), support(out_gate, scale_out)
    dx = dw = dz_in = dz_out = None
    if need_x:
        w = operand(
            weight, out_gate, in_gate, dtype, scale_rows=out_gate is not None, scale_cols=in_gate is not None
        )
        if in_packed:
            dx = torch.empty(rows, K, dtype=x_dtype, device=weight.device)
            matmul("nn", grad, w, Operand(dx), rows, K, N, n_gate=in_gate, k_gate=out_gate)
        else:
            dx = input_grad(grad, w, (rows, K, N), in_gate, out_gate, x_dtype)
    if need_w or need_in or need_out:
        dw, dz_out, dz_in = weight_grad(
            grad, inputs, (N, K, rows), out_gate, in_gate, weight.dtype,
            weight if need_out or need_in else None, full_out, full_in, need_out, need_in,
            None if share is not None else dist,
        )  # fmt: skip
    if share is not None and dz_out is not None and out_gate is not None:
        z = out_gate[0]
        dz_out += torch.where(z != 0 if full_out else (z > 0) & (z < 1), share, 0.0)
        if dist is not None:
            dz_out = gate_grad(dz_out, z, dist)
            if dz_in is not None and in_gate is not None:
                dz_in = gate_grad(dz_in, in_gate[0], dist)
    return dx, dw if need_w else None, dz_in, dz_out
