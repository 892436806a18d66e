"""Convolutions of channels-last images on a CPU as products of matrices, and depthwise ones by csrc/conv.h.

oneDNN compiles a kernel for each new number of channels, for some milliseconds; a product of matrices is
ready for any. Images are (N, C, H, W) in channels_last memory; so are the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._native import native as _C
from .memory import fresh, vector

CHUNK = 1 << 20
"""Bytes of the rows that are made at a time: they stay in the cache until the product has read them."""

MOST_TAPS = 64
"""Of a depthwise kernel, see kMostTaps in csrc/conv.h."""


class Geometry(NamedTuple):
    """stride, padding and dilation of a convolution, (height, width) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


Shape = tuple[int, ...]


def shape_of(x: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Shape:
    """ConvShape of csrc/conv.h."""
    N, C, H, W = x.shape
    (stride, padding, dilation), out = geometry, []
    for n, k, s, p, d in zip((H, W), kernel, stride, padding, dilation, strict=True):
        out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    if min(out) < 1:
        raise RuntimeError(f"images must have no fewer pixels than kernels reach, {kernel}, got {(H, W)}")
    return (N, H, W, C, *kernel, *stride, *padding, *dilation, *out)


def serves(dtype: torch.dtype) -> bool:
    """Whether this machine computes such convolutions here."""
    return _C is not None and dtype in (torch.float32, torch.float64)


def rows(x: Tensor) -> Tensor:
    """x in channels_last memory as a matrix (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(matrix: Tensor, N: int, H: int, W: int) -> Tensor:
    """The other way."""
    return matrix.view(N, H, W, matrix.shape[1]).permute(0, 3, 1, 2)


def _is_product(shape: Shape) -> bool:
    """Whether the images are the rows: a kernel of one position, without strides or padding."""
    return shape[4:12] == (1, 1, 1, 1, 0, 0, 1, 1)


def _chunks(shape: Shape, itemsize: int) -> Iterator[tuple[int, Shape]]:
    """First image and shape of so many images at a time that their rows fit CHUNK."""
    N, _, _, C, kh, kw, *_, out_h, out_w = shape
    each = max(1, CHUNK // max(1, out_h * out_w * kh * kw * C * itemsize))
    for first in range(0, N, each):
        yield first, (min(each, N - first), *shape[1:])


def _im2col(x: Tensor, shape: Shape, col: Tensor) -> None:
    """`x`: rows of the images that `shape` has."""
    address = vector(x, "x", x.dtype, x.numel())
    _C.im2col(x.dtype == torch.float64, shape, address, fresh(col), torch.get_num_threads())


def _col2im(col: Tensor, shape: Shape, x: Tensor) -> None:
    address = vector(col, "the rows", x.dtype, col.numel())
    _C.col2im(x.dtype == torch.float64, shape, address, fresh(x), torch.get_num_threads())


def _scratch(x: Tensor, shape: Shape) -> Tensor:
    """Memory for the rows of the first, largest chunk."""
    _, (n, _, _, C, kh, kw, *_, out_h, out_w) = next(iter(_chunks(shape, x.element_size())))
    return x.new_empty(n * out_h * out_w, kh * kw * C)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """y of images x for a packed weight (out, kh * kw * C), whose columns are taps of all channels."""
    N, H, W, *_, out_h, out_w = shape
    source, w = rows(x), weight.t()
    if _is_product(shape):
        y = source @ w if bias is None else torch.addmm(bias, source, w)
        return images(y, N, out_h, out_w)
    y, each = x.new_empty(N * out_h * out_w, weight.shape[0]), out_h * out_w
    if N:
        col = _scratch(x, shape)
        for first, part in _chunks(shape, x.element_size()):
            n = part[0]
            some = col[: n * each]
            _im2col(source[first * H * W : (first + n) * H * W], part, some)
            out = y[first * each : (first + n) * each]
            if bias is None:
                torch.mm(some, w, out=out)
            else:
                torch.addmm(bias, some, w, out=out)
    return images(y, N, out_h, out_w)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, shape: Shape, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight packed as weight."""
    N, H, W, C, *_, out_h, out_w = shape
    source, grads = rows(x), rows(dy)
    if _is_product(shape):
        dw = grads.t() @ source if need_w else None
        return images(grads @ weight, N, H, W) if need_x else None, dw
    dw = torch.zeros_like(weight) if need_w else None
    dx, each = x.new_empty(N * H * W, C), out_h * out_w
    if N:
        col = _scratch(x, shape)
        for first, part in _chunks(shape, x.element_size()):
            n = part[0]
            some, grad = col[: n * each], grads[first * each : (first + n) * each]
            here = slice(first * H * W, (first + n) * H * W)
            if dw is not None:
                _im2col(source[here], part, some)
                dw.addmm_(grad.t(), some)
            if need_x:
                torch.mm(grad, weight, out=some)
                _col2im(some, part, dx[here])
    return images(dx, N, H, W) if need_x else None, dw


def depthwise(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """y of images x for kernels (kh * kw, C), a channel of which sees its own alone."""
    N, _, _, C, *_, out_h, out_w = shape
    source, y = rows(x), x.new_empty(N * out_h * out_w, C)
    w = vector(weight, "weight", x.dtype, weight.numel())
    address = vector(source, "x", x.dtype, source.numel())
    _C.depthwise(x.dtype == torch.float64, shape, address, w, fresh(y), 0, 0, 0, torch.get_num_threads())
    return images(y, N, out_h, out_w)


def depthwise_grad(
    dy: Tensor, x: Tensor, weight: Tensor, shape: Shape, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight as weight."""
    N, H, W, C = shape[:4]
    source, grads = rows(x), rows(dy)
    dx = x.new_empty(N * H * W, C) if need_x else None
    parts = x.new_empty(N, weight.shape[0], C) if need_w else None
    if grads.numel() and (need_x or need_w):
        _C.depthwise(
            x.dtype == torch.float64,
            shape,
            vector(source, "x", x.dtype, source.numel()),
            vector(weight, "weight", x.dtype, weight.numel()),
            0,
            vector(grads, "dy", x.dtype, grads.numel()),
            fresh(dx),
            fresh(parts),
            torch.get_num_threads(),
        )
    return None if dx is None else images(dx, N, H, W), None if parts is None else parts.sum(0)
