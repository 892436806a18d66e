"""Convolutions of few channels on a CPU, of images in any memory format, by csrc/conv.h.

Patches are never whole in memory, and nothing is compiled for a new number of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import PLAIN
from .._compat import count_modes
from .._native import native as _C
from . import im2col
from .memory import fresh, images, optional, plain, vector

Conv = tuple[list[int], list[int], list[int], int]
"""stride, padding, dilation and groups."""


def serves(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether csrc computes a convolution of all of x's channels faster than torch.

    What watches torch's operations, as its counter of FLOPs does, is to see one.
    """
    (out, _, kh, kw), C = weight.shape, x.shape[1]
    return (
        conv[3] == 1
        and 1 < kh * kw <= im2col.MOST_TAPS
        and x.dtype == weight.dtype
        and im2col.serves(x.dtype)
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not count_modes()
        and im2col.are_few(C, out, x.element_size())
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, fmt: torch.memory_format) -> Tensor:
    """conv2d of x in a memory format, which y gets, too."""
    x, weight = plain(x).contiguous(memory_format=fmt), plain(weight).contiguous()
    shape, out, dtype = _shape_of(x, weight, conv), weight.shape[0], x.dtype
    y = torch.empty((shape[0], out, *shape[12:]), dtype=dtype, device=x.device, memory_format=fmt)
    if y.numel():
        bias = None if bias is None else plain(bias).contiguous()
        _run(x, weight, shape, fmt, optional(bias, "bias", dtype, out), fresh(y), 0, 0, 0, 0)
    return y


def convolve_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    fmt: torch.memory_format,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, and dweight with dbias; dx of large images is torch's."""
    x, weight = plain(x).contiguous(memory_format=fmt), plain(weight).contiguous()
    dy = plain(dy).contiguous(memory_format=fmt)
    shape, out = _shape_of(x, weight, conv), weight.shape[0]
    if dy.shape != (shape[0], out, *shape[12:]):
        raise ValueError(
            f"the gradient must have shape {(shape[0], out, *shape[12:])}, got {tuple(dy.shape)}"
        )
    if need_x and shape[12] * shape[13] * weight[:1].numel() * x.element_size() > im2col.PATCHES:
        stride, padding, dilation, groups = conv
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        _, dw, db = convolve_grad(dy, x, weight, conv, fmt, False, need_w)
        return dx.contiguous(memory_format=fmt), dw, db
    dx = torch.empty_like(x, memory_format=fmt) if need_x else None
    dw, db = (torch.empty_like(weight), x.new_empty(out)) if need_w else (None, None)
    if not dy.numel():
        for grad in (dx, dw, db):
            if grad is not None:
                grad.zero_()
    elif need_x or need_w:
        at = _address(dy, "the gradient", x.dtype, fmt)
        _run(x, weight, shape, fmt, 0, 0, at, fresh(dx), fresh(dw), fresh(db))
    return dx, dw, db


def _run(x: Tensor, weight: Tensor, shape: im2col.Shape, fmt: torch.memory_format, *addresses: int) -> None:
    """csrc's, of the bias and y, or of dy, dx, dweight and dbias."""
    is_double, out, last = x.dtype == torch.float64, weight.shape[0], fmt == torch.channels_last
    operands = _address(x, "x", x.dtype, fmt), vector(weight, "weight", x.dtype, weight.numel())
    _C.conv(is_double, shape, out, last, *operands, *addresses, torch.get_num_threads())


def _address(t: Tensor, name: str, dtype: torch.dtype, fmt: torch.memory_format) -> int:
    return images(t, name, dtype) if fmt == torch.channels_last else vector(t, name, dtype, t.numel())


def _shape_of(x: Tensor, weight: Tensor, conv: Conv) -> im2col.Shape:
    (sh, sw), (ph, pw), (dh, dw), _ = conv
    return im2col.shape_of(
        x, (weight.shape[2], weight.shape[3]), im2col.Geometry((sh, sw), (ph, pw), (dh, dw))
    )
