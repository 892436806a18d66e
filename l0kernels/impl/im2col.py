"""Convolutions of channels-last images on a CPU, most as products of matrices; depthwise ones by csrc/conv.h.

oneDNN compiles a kernel for each new number of channels, for some milliseconds; a product of matrices is
ready for any. Images are (N, C, H, W) in channels_last memory; so are the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import native as _C
from .memory import fresh, vector

CHUNK = 1 << 20
"""Bytes of the rows that are made at a time: they stay in the cache until the product has read them."""

FEW_TAPS = 9
"""Of a kernel: where there are more, copying patches takes longer than oneDNN's compiling. Its convolutions
with vectors of 512 bits are so fast that no patches are worth it."""

MUCH = 1 << 24
"""Products of numbers, from which on a call for each tap costs less than it saves."""

MOST_TAPS = 64
"""Of a kernel that csrc computes, see kMostTaps in csrc/conv.h."""


class Geometry(NamedTuple):
    """stride, padding and dilation of a convolution, (height, width) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


Shape = tuple[int, ...]

_convolution_backward = torch.ops.aten.convolution_backward.default


class Way(Enum):
    """How a convolution is computed.

    PRODUCT: the images are the rows of one. PATCHES: so are copies of what each output reads. TAPS: a product
    for each tap, of the pixels that it reads within the image: small ones are mostly border, where others
    multiply zeros. TORCH: by torch's convolution, which is oneDNN's.
    """

    PRODUCT, PATCHES, TAPS, TORCH = range(4)


class Plan(NamedTuple):
    """How a convolution of images is computed, what native code is told, and torch's options."""

    way: Way
    shape: Shape
    options: tuple[Shape, Shape, Shape]


def plan(size: torch.Size, kernel: tuple[int, int], geometry: Geometry, outs: int) -> Plan:
    """The plan of a convolution of images of a size to so many channels."""
    return _plan(size, kernel, geometry, outs, few_taps())


@lru_cache(4096)
def _plan(size: torch.Size, kernel: tuple[int, int], geometry: Geometry, outs: int, few: int) -> Plan:
    shape = _shape(size, kernel, geometry)
    taps = shape[4] * shape[5]
    if _is_product(shape):
        way = Way.PRODUCT
    elif 1 < taps <= FEW_TAPS and _has_small_images(shape, outs):
        way = Way.TAPS
    else:
        way = Way.TORCH if taps > few else Way.PATCHES
    return Plan(way, shape, (shape[6:8], shape[8:10], shape[10:12]))


def _has_small_images(shape: Shape, outs: int) -> bool:
    """Whether a convolution reads more weights than activations, and is worth a call for each tap."""
    N, H, W, C, kh, kw, *_, out_h, out_w = shape
    weights, outputs = kh * kw * C * outs, N * out_h * out_w
    return weights > N * H * W * C + outputs * outs and weights * outputs > MUCH


def shape_of(x: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Shape:
    """ConvShape of csrc/conv.h."""
    return _shape(x.shape, kernel, geometry)


@lru_cache(4096)
def _shape(size: torch.Size, kernel: tuple[int, int], geometry: Geometry) -> Shape:
    N, C, H, W = size
    (stride, padding, dilation), out = geometry, []
    for n, k, s, p, d in zip((H, W), kernel, stride, padding, dilation, strict=True):
        out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    if min(out) < 1:
        raise RuntimeError(f"images must have no fewer pixels than kernels reach, {kernel}, got {(H, W)}")
    return (N, H, W, C, *kernel, *stride, *padding, *dilation, *out)


def few_taps() -> int:
    """Of a kernel up to which convolutions are products of matrices on this machine."""
    return 1 if _C is not None and _C.isa() == "avx512" else FEW_TAPS


def serves(dtype: torch.dtype) -> bool:
    """Whether this machine computes such convolutions here."""
    return _C is not None and dtype in (torch.float32, torch.float64)


def rows(x: Tensor) -> Tensor:
    """x in channels_last memory as a matrix (N * H * W, C)."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return _matrix(x)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _matrix(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    return x.as_strided((N * H * W, C), (C, 1))  # permute and view are two calls


def _images(like: Tensor, N: int, C: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Unwritten images, no view, for users may change them in place; and as a matrix."""
    out = torch.empty((N, C, H, W), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return out, _matrix(out)


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


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """y of images x for a packed weight (out, kh * kw * C), whose columns are taps of all channels."""
    way, shape, options = plan
    N, H, W, *_, out_h, out_w = shape
    if way is Way.TORCH:
        y = F.conv2d(x, _kernels(weight, shape), bias, *options)
        return y.contiguous(memory_format=torch.channels_last)
    source, w, each = rows(x), weight.t(), out_h * out_w
    made, y = _images(x, N, weight.shape[0], out_h, out_w)
    if way is Way.PRODUCT:
        _product(source, w, bias, y)
    elif way is Way.TAPS:
        _by_tap(source, w, bias, shape, y)
    elif N:
        col = _scratch(x, shape)
        for first, part in _chunks(shape, x.element_size()):
            n = part[0]
            some = col[: n * each]
            _im2col(source[first * H * W : (first + n) * H * W], part, some)
            _product(some, w, bias, y[first * each : (first + n) * each])
    return made


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _kernels(weight: Tensor, shape: Shape) -> Tensor:
    """A packed weight as torch's convolution takes it, in channels_last memory."""
    C, kh, kw = shape[3:6]
    return weight.as_strided((weight.shape[0], C, kh, kw), (C * kh * kw, 1, kw * C, C))


Block = tuple[slice, slice, slice]  # of images (N, H, W, C): all of them, some of their rows and columns


@lru_cache(4096)
def _taps(shape: Shape) -> list[tuple[slice, Block, Block]]:
    """Of each tap that reads a pixel of the image: its columns of the packed weight, the pixels that it reads
    and the outputs that it reaches. Those that reach most come first."""
    H, W, C, kh, kw, sh, sw, ph, pw, dh, dw, out_h, out_w = shape[1:]
    found = []
    for i in range(kh):
        for j in range(kw):
            down, across = _reach(out_h, H, i, sh, ph, dh), _reach(out_w, W, j, sw, pw, dw)
            if down is not None and across is not None:
                at = (i * kw + j) * C
                read, made = zip(down, across, strict=True)
                found.append((slice(at, at + C), (slice(None), *read), (slice(None), *made)))
    return sorted(found, key=lambda tap: -_length(tap[2][1]) * _length(tap[2][2]))


def _reach(n_out: int, n: int, tap: int, stride: int, pad: int, dilation: int) -> tuple[slice, slice] | None:
    """Of one dimension, the pixels that a tap reads and the outputs that read them; None: there are none."""
    shift = tap * dilation - pad
    first, last = max(0, -(shift // stride)), min(n_out - 1, (n - 1 - shift) // stride)
    if first > last:
        return None
    return slice(first * stride + shift, last * stride + shift + 1, stride), slice(first, last + 1)


def _length(part: slice) -> int:
    return part.stop - part.start


def _by_tap(source: Tensor, w: Tensor, bias: Tensor | None, shape: Shape, y: Tensor) -> None:
    """y, the rows of the outputs, of the rows of the images."""
    N, H, W, C, *_, out_h, out_w = shape
    pixels, outputs, taps = source.view(N, H, W, C), y.view(N, out_h, out_w, y.shape[1]), _taps(shape)
    first = 0
    if taps and outputs[taps[0][2]].shape == outputs.shape:
        columns, read, _ = taps[0]
        _product(_matrix_of(pixels, read), w[columns], bias, y)
        first = 1
    elif bias is None:
        y.zero_()
    else:
        y.copy_(bias)
    for columns, read, made in taps[first:]:
        part = outputs[made]
        part.add_((_matrix_of(pixels, read) @ w[columns]).view(part.shape))


def _matrix_of(images: Tensor, block: Block) -> Tensor:
    """A block of each image (N, H, W, C) as rows of channels."""
    part = images[block]
    return part.reshape(part.shape[:3].numel(), part.shape[3])


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, plan: Plan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight packed as weight."""
    way, shape, _ = plan
    N, H, W, C, *_, out_h, out_w = shape
    if way is Way.TORCH:
        return _torch_backward(dy, x, weight, plan, need_x, need_w)
    source, grads, each = rows(x), rows(dy), out_h * out_w
    made, dx = _images(x, N, C, H, W) if need_x else (None, source)
    if way is Way.PRODUCT:
        if need_x:
            torch.mm(grads, weight, out=dx)
        return made, grads.t() @ source if need_w else None
    if way is Way.TAPS:
        return made, _by_tap_backward(grads, source, weight, shape, dx if need_x else None, need_w)
    dw = torch.zeros_like(weight) if need_w else None
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
    return made, dw


def _torch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, plan: Plan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    _, shape, options = plan
    wanted = [need_x, need_w, False]
    dx, dw, _ = _convolution_backward(
        dy, x, _kernels(weight, shape), None, *options, False, [0, 0], 1, wanted
    )
    if dx is not None:
        dx = dx.contiguous(memory_format=torch.channels_last)
    return dx, None if dw is None else dw.permute(0, 2, 3, 1).reshape(weight.shape)


def _by_tap_backward(
    grads: Tensor, source: Tensor, weight: Tensor, shape: Shape, dx: Tensor | None, need_w: bool
) -> Tensor | None:
    """Writes dx, rows of the images, and returns dweight."""
    N, H, W, C, kh, kw, *_, out_h, out_w = shape
    pixels, outputs = source.view(N, H, W, C), grads.view(N, out_h, out_w, grads.shape[1])
    taps = _taps(shape)
    dw = None
    if need_w:
        dw = torch.empty_like(weight) if len(taps) == kh * kw else torch.zeros_like(weight)
    inputs = None if dx is None else dx.zero_().view(N, H, W, C)
    for columns, read, made in taps:
        grad = _matrix_of(outputs, made)
        if dw is not None:
            torch.mm(grad.t(), _matrix_of(pixels, read), out=dw[:, columns])
        if inputs is not None:
            part = inputs[read]
            part.add_((grad @ weight[:, columns]).view(part.shape))
    return dw


def gate_grad(x: Tensor, dx: Tensor, z: Tensor, index: Tensor) -> Tensor:
    """dz where 0 < z < 1 from the gradient dx of images x, which z multiplies.

    Args:
        z, index: of all channels, and which of them x has, first in index.
    """
    exist = index[: x.shape[1]].long()
    some = z.index_select(0, exist)
    at = ((some > 0) & (some < 1)).nonzero()[:, 0]
    terms = rows(x).index_select(1, at) * rows(dx).index_select(1, at)
    return torch.zeros_like(z).index_copy_(0, exist[at], terms.sum(0) / some[at])


def depthwise(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """y of images x for kernels (kh * kw, C), a channel of which sees its own alone."""
    N, _, _, C, *_, out_h, out_w = shape
    source, (made, y) = rows(x), _images(x, N, C, out_h, out_w)
    w = vector(weight, "weight", x.dtype, weight.numel())
    address = vector(source, "x", x.dtype, source.numel())
    _C.depthwise(x.dtype == torch.float64, shape, address, w, fresh(y), 0, 0, 0, torch.get_num_threads())
    return made


def depthwise_grad(
    dy: Tensor, x: Tensor, weight: Tensor, shape: Shape, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight as weight."""
    N, H, W, C = shape[:4]
    source, grads = rows(x), rows(dy)
    made, dx = _images(x, N, C, H, W) if need_x else (None, None)
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
    return made, None if parts is None else parts.sum(0)
