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

from .._compat import settled
from .._native import native as _C
from .memory import fresh, vector

CHUNK = 1 << 20
"""Bytes of the rows that are made at a time: they stay in the cache until the product has read them."""

FEW_TAPS = 9
"""Of a kernel: where there are more, copying patches takes longer than oneDNN's compiling. Its convolutions
with vectors of 512 bits are so fast that no patches are worth it."""

MOST_TAPS = 64
"""Of a kernel that csrc computes, see kMostTaps in csrc/conv.h."""

LITTLE = 1 << 22
"""Products of numbers, up to which the way into oneDNN takes longer than csrc's slower loops."""

LITTLE_OF_FEW = 1 << 25
"""The same, where most of oneDNN's vectors are empty."""

PATCHES = 1 << 21
"""Bytes of the gradients of an image's patches that csrc adds up before they leave the cache."""

_VECTOR_BYTES = {"avx2": 32, "avx512": 64}


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
    multiply zeros. DIRECT: as csrc/conv.h has it. TORCH: by torch's convolution, which is oneDNN's.
    """

    PRODUCT, PATCHES, TAPS, DIRECT, TORCH = range(5)


class Plan(NamedTuple):
    """How a convolution of images is computed, what native code is told, torch's options, and the outputs."""

    way: Way
    shape: Shape
    options: tuple[Shape, Shape, Shape]
    outs: int

    @property
    def is_one_call(self) -> bool:
        """Whether csrc computes it by the weight as it is: of the others the weight is packed."""
        return self.way is Way.TAPS or self.way is Way.DIRECT


def plan(size: torch.Size, kernel: tuple[int, int], geometry: Geometry, outs: int) -> Plan:
    """The plan of a convolution of images of a size to so many channels."""
    return _plan(size, kernel, geometry, outs, None if _C is None else _C.isa())


@lru_cache(4096)
def _plan(size: torch.Size, kernel: tuple[int, int], geometry: Geometry, outs: int, isa: str | None) -> Plan:
    """isa: by which the answers below differ."""
    shape = _shape(size, kernel, geometry)
    taps = shape[4] * shape[5]
    if _is_product(shape):
        way = Way.PRODUCT
    elif 1 < taps <= FEW_TAPS and _has_small_images(shape, outs):
        way = Way.TAPS
    elif taps <= MOST_TAPS and _is_little(shape, outs):
        way = Way.DIRECT
    else:
        way = Way.TORCH if taps > few_taps() else Way.PATCHES
    return Plan(way, shape, (shape[6:8], shape[8:10], shape[10:12]), outs)


def _has_small_images(shape: Shape, outs: int) -> bool:
    """Whether a convolution reads more weights than activations, and there is much to compute."""
    N, H, W, C, kh, kw, *_, out_h, out_w = shape
    weights, outputs = kh * kw * C * outs, N * out_h * out_w
    return weights > N * H * W * C + outputs * outs and weights * outputs > LITTLE


def _is_little(shape: Shape, outs: int) -> bool:
    """Whether oneDNN, which prepares every call, is slower than csrc."""
    N, _, _, C, kh, kw, *_, out_h, out_w = shape
    patches = out_h * out_w * kh * kw * C
    if _C is None or _C.isa() not in _VECTOR_BYTES or not N * patches * outs or 4 * patches > PATCHES:
        return False
    return N * patches * outs <= (LITTLE_OF_FEW if are_few(C, outs, 4) else LITTLE)


def are_few(C: int, out: int, itemsize: int) -> bool:
    """oneDNN's vectors are channels on both sides: where these fill them it is the fastest. Those of csrc are
    positions and taps: it is, where a quarter or more of oneDNN's products would be for nothing."""
    width = 0 if _C is None else _VECTOR_BYTES.get(_C.isa(), 0) // itemsize
    if C == 0 or out == 0 or width == 0:
        return False
    return 4 * C * out <= 3 * _filled(C, width) * _filled(out, width)


def _filled(n: int, width: int) -> int:
    return -(-n // width) * width


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


def format_of(x: Tensor) -> torch.memory_format:
    """Contiguous where images lie as planes and not, what one channel does, channels last, too."""
    is_last = x.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def empty_images(like: Tensor, N: int, C: int, H: int, W: int) -> Tensor:
    """Unwritten ones, no view, for users may change them in place."""
    return torch.empty((N, C, H, W), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _images(like: Tensor, N: int, C: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Unwritten images, and as a matrix."""
    out = empty_images(like, N, C, H, W)
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
    way, shape, options, _ = plan
    N, H, W, *_, out_h, out_w = shape
    if way is Way.TORCH:
        y = F.conv2d(settled(x, 1, options[0]), _kernels(weight, shape), bias, *options)
        return y.contiguous(memory_format=torch.channels_last)
    source, w, each = rows(x), weight.t(), out_h * out_w
    made, y = _images(x, N, weight.shape[0], out_h, out_w)
    if way is Way.PRODUCT:
        _product(source, w, bias, y)
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


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, plan: Plan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight packed as weight."""
    way, shape, *_ = plan
    N, H, W, C, *_, out_h, out_w = shape
    if way is Way.TORCH:
        return _torch_backward(dy, x, weight, plan, need_x, need_w)
    source, grads, each = rows(x), rows(dy), out_h * out_w
    made, dx = _images(x, N, C, H, W) if need_x else (None, source)
    if way is Way.PRODUCT:
        if need_x:
            torch.mm(grads, weight, out=dx)
        return made, grads.t() @ source if need_w else None
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
    _, shape, options, _ = plan
    wanted = [need_x, need_w, False]
    dx, dw, _ = _convolution_backward(
        dy, settled(x, 1, options[0]), _kernels(weight, shape), None, *options, False, [0, 0], 1, wanted
    )
    if dx is not None:
        dx = dx.contiguous(memory_format=torch.channels_last)
    return dx, None if dw is None else dw.permute(0, 2, 3, 1).reshape(weight.shape)


def depthwise(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """y of images x for kernels (kh * kw, C), a channel of which sees its own alone."""
    N, H, W, C, kh, kw, *_, out_h, out_w = shape
    source, (made, y) = rows(x), _images(x, N, C, out_h, out_w)
    w = vector(weight, "weight", x.dtype, kh * kw * C)
    address = vector(source, "x", x.dtype, N * H * W * C)
    _C.depthwise(x.dtype == torch.float64, shape, address, w, fresh(y), 0, 0, 0, torch.get_num_threads())
    return made


def depthwise_grad(
    dy: Tensor, x: Tensor, weight: Tensor, shape: Shape, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dweight as weight."""
    N, H, W, C, kh, kw, *_, out_h, out_w = shape
    source, grads = rows(x), rows(dy)
    made, dx = _images(x, N, C, H, W) if need_x else (None, None)
    parts = x.new_empty(N, kh * kw, C) if need_w else None
    if grads.numel() and (need_x or need_w):
        _C.depthwise(
            x.dtype == torch.float64,
            shape,
            vector(source, "x", x.dtype, N * H * W * C),
            vector(weight, "weight", x.dtype, kh * kw * C),
            0,
            vector(grads, "dy", x.dtype, N * out_h * out_w * C),
            fresh(dx),
            fresh(parts),
            torch.get_num_threads(),
        )
    return made, None if parts is None else parts.sum(0)
