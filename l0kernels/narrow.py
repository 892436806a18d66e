"""Products of what exists: layers whose weights are gathered by the open units around, on a CPU.

Inputs and outputs hold the existing units alone. The weight is packed, its columns times z, and its gradient
is scattered back, with zeros for what does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._autograd import apply
from ._calls import GateGrads
from .impl import batch_norm, im2col, module
from .impl.batch_norm import Channels, Settings
from .impl.im2col import Geometry, Plan, Way
from .impl.memory import empty_grad, plain

Gate = list[Tensor]  # z, index, count of Gates; the first count[0] of index exist


class Sides(NamedTuple):
    """How a weight is packed.

    Attributes:
        rows, cols: the gates of its first and second dimension; None: all exist.
        scaled: which of the two z multiplies, the one that is read.
        backend: that packs.
    """

    rows: Gate | None
    cols: Gate | None
    scaled: int
    backend: str


def _scales(sides: Sides, z: Tensor | None) -> dict[str, bool]:
    return {
        "scale_rows": sides.scaled == 0 and z is not None,
        "scale_cols": sides.scaled == 1 and z is not None,
    }


def _unpacked(
    grad: Tensor, weight: Tensor, sides: Sides, scales: dict[str, bool], need_z: bool, **layout: Any
) -> tuple[Tensor, Tensor | None]:
    """dweight and dz from the gradient of the packed weight, a matrix."""
    matrix = weight.reshape(weight.shape[0], -1)
    dw, dz_rows, dz_cols = module(sides.backend).unpack(
        grad,
        (matrix.shape[0], matrix.shape[1]),
        sides.rows,
        sides.cols,
        weight.dtype,
        **scales,
        grads=GateGrads(
            matrix if need_z else None, need_z and sides.scaled == 0, need_z and sides.scaled == 1
        ),
        out=empty_grad(weight).view(matrix.shape),
        run=weight.shape[2:].numel(),
        **layout,
    )
    return dw.view(weight.shape), (dz_rows if sides.scaled == 0 else dz_cols) if need_z else None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, z: Tensor | None, sides: Sides) -> Tensor:
        scales, taps, dtype = _scales(sides, z), weight.shape[2:].numel(), weight.dtype
        matrix, wide = weight.reshape(weight.shape[0], -1), torch.promote_types(dtype, torch.float32)
        packed = (
            module(sides.backend).pack(matrix, sides.rows, sides.cols, wide, run=taps, **scales).to(dtype)
        )
        ctx.save_for_backward(weight)
        ctx.settings = sides, scales
        return packed.view(packed.shape[0], packed.shape[1] // taps, *weight.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("narrow_weight")
        (weight,), (sides, scales) = ctx.saved_tensors, ctx.settings
        grad = grad.reshape(grad.shape[0], -1)
        dw, dz = _unpacked(grad, weight, sides, scales, ctx.needs_input_grad[1])
        return dw, dz, None


class _Whole(torch.autograd.Function):
    """All of a weight whose gates are 1: they have a gradient of 0, as processes expect of all parameters."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, z: Tensor) -> Tensor:
        ctx.like = z
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, torch.zeros_like(ctx.like) if ctx.needs_input_grad[1] else None


def narrow_weight(weight: Tensor, z: Tensor | None, sides: Sides) -> Tensor:
    """The rows and columns of a weight (rows, cols, *taps) that exist, the read side times z.

    Args:
        weight: of a linear layer or a convolution.
        z: (cols,) of the columns, of the rows where ``sides.scaled`` is 0; None: 1. Its gradient comes where
            0 < z < 1.
    """
    if sides.rows is None and sides.cols is None:
        return weight if z is None or not z.requires_grad else apply(_Whole, weight, z)
    return apply(_Weight, weight, z, sides)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        sides: Sides,
        plan: Plan,
    ) -> Tensor:
        x = plain(x)
        ctx.format = im2col.format_of(x)
        if plan.way is not Way.DIRECT or ctx.format is torch.channels_last:  # else read as it lies
            x = x.contiguous(memory_format=torch.channels_last)
        N, H, W, C, kh, kw = plan.shape[:6]
        if x.shape != (N, C, H, W) or weight.shape[2:] != (kh, kw):
            raise ValueError(f"plan must be of {tuple(x.shape)} and {tuple(weight.shape)}, got {plan.shape}")
        ctx.settings = sides, z is not None, plan
        if plan.is_one_call:
            w = plain(weight).contiguous()
            bias = None if bias is None else plain(bias).contiguous()
            y, packed = module(sides.backend).open_conv(
                x, w, bias, sides.rows, sides.cols, z is not None, plan, keeps=ctx.needs_input_grad[0]
            )
            ctx.save_for_backward(x, weight, packed)
            return y
        scales, matrix = _scales(sides, z), weight.reshape(weight.shape[0], -1)
        pack = module(sides.backend).pack
        packed = pack(matrix, sides.rows, sides.cols, weight.dtype, run=kh * kw, apart=True, **scales)
        ctx.save_for_backward(x, weight, packed)
        return im2col.forward(x, packed, bias, plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("narrow_conv2d")
        (x, weight, packed), (sides, scaled, plan) = ctx.saved_tensors, ctx.settings
        need_x, need_w, need_b, need_z, *_ = ctx.needs_input_grad
        dy = plain(dy).contiguous(memory_format=torch.channels_last)
        db = im2col.rows(dy).sum(0) if need_b else None
        reads_z = need_z and sides.cols is not None
        if plan.is_one_call:
            needs = need_x or (reads_z and plan.way is Way.TAPS), need_w, reads_z  # see csrc/bindings.cpp
            dx, dw, dz = module(sides.backend).open_conv_grad(
                dy,
                x,
                plain(weight).contiguous(),
                packed,
                sides.rows,
                sides.cols,
                scaled,
                plan,
                needs,
            )
        else:
            dx, grad = im2col.backward(dy, x, packed, plan, need_x, need_w or reads_z)
            dw = dz = None
            if grad is not None:
                scales = {"scale_rows": False, "scale_cols": scaled}
                dw, dz = _unpacked(grad, weight, sides, scales, reads_z, apart=True)
        if need_z and sides.cols is None:  # all are 1, see _Whole
            dz = weight.new_zeros(weight.shape[1])
        if dx is not None:  # as x lies: torch's instance norm of one image errs with the other format
            dx = dx.contiguous(memory_format=ctx.format)
        return dx if need_x else None, dw if need_w else None, db, dz, None, None


def narrow_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, sides: Sides, plan: Plan
) -> Tensor:
    """conv2d of existing channels x (N, c, H, W) to those of the outputs, in channels_last memory.

    Args:
        weight: of all channels, (out, in, kh, kw), float32 or float64.
        bias: of the existing outputs.
        z, sides: as of :func:`narrow_weight`.
        plan: how, of ``impl.im2col.plan``.

    Raises:
        ValueError: a plan of other images or kernels.
    """
    return apply(_Conv2d, x, weight, bias, z, sides, plan)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        x = plain(x).contiguous(memory_format=torch.channels_last)
        kh, kw = weight.shape[2:]
        taps = weight.reshape(weight.shape[0], kh * kw).t().contiguous()
        shape = im2col.shape_of(x, (kh, kw), geometry)
        ctx.save_for_backward(x, taps)
        ctx.settings = shape, weight.shape
        return im2col.depthwise(x, taps, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("narrow_depthwise")
        (x, taps), (shape, of_weight) = ctx.saved_tensors, ctx.settings
        dy = plain(dy).contiguous(memory_format=torch.channels_last)
        dx, dw = im2col.depthwise_grad(dy, x, taps, shape, *ctx.needs_input_grad[:2])
        return dx, None if dw is None else dw.t().reshape(of_weight), None


def narrow_depthwise(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """conv2d of each channel of x (N, c, H, W) with its own kernel of weight (c, 1, kh, kw)."""
    return apply(_Depthwise, x, weight, geometry)


class _Shuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, dim: int) -> Tensor:
        x = plain(x)
        ctx.by_rows = x.ndim == 4 and dim == 1 and not x.is_contiguous()
        ctx.dim = dim
        ctx.save_for_backward(places)
        return _selected(x, places, dim, ctx.by_rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("narrow_shuffle")
        (places,) = ctx.saved_tensors
        return _selected(plain(dy), places.argsort(), ctx.dim, ctx.by_rows), None, None


def _selected(x: Tensor, places: Tensor, dim: int, by_rows: bool) -> Tensor:
    """index_select, which makes no channels_last images; by_rows: these, no view, as they may be written."""
    if not by_rows:
        return x.index_select(dim, places)
    out = im2col.empty_images(x, *x.shape)
    torch.index_select(im2col.rows(x), 1, places, out=im2col.rows(out))
    return out


class _Zeros(torch.autograd.Function):
    """torch's index_copy keeps what it copies, which somebody may write to before the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, places: Tensor | None, size: int, dim: int, strides: Sequence[int] | None
    ) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(places)
        shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
        zeros = x.new_zeros(shape) if strides is None else x.new_empty_strided(shape, strides).zero_()
        return zeros.copy_(x) if places is None else zeros.index_copy_(dim, places, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        dx = dy if places is None else dy.index_select(ctx.dim, places)
        return dx, None, None, None, None


def narrow_whole(
    x: Tensor, places: Tensor | None, size: int, dim: int, strides: Sequence[int] | None = None
) -> Tensor:
    """The entries of dimension `dim` of x at `places` of one of `size`, with zeros for all others.

    Args:
        places: None: x has all entries.
        strides: of the result, 0 where x is expanded; None: it is contiguous.
    """
    if strides is None or 0 not in strides:
        return apply(_Zeros, x, places, size, dim, strides)
    once = x[tuple(slice(None if stride else 1) for stride in strides)]
    whole = apply(_Zeros, once, places, size, dim, strides)
    return whole.expand(*x.shape[:dim], size, *x.shape[dim + 1 :])


def narrow_shuffle(x: Tensor, places: Tensor, dim: int) -> Tensor:
    """The entries of dimension `dim` of x in another order.

    Args:
        places: (x.shape[dim],) int64, where each is in x: all of them, once.
    """
    return apply(_Shuffle, x, places, dim)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        channels: Channels,
        settings: Settings,
    ) -> Tensor:
        x = batch_norm.as_rows(plain(x))
        y, statistics = batch_norm.forward(x, weight, bias, running_mean, running_var, channels, settings)
        ctx.save_for_backward(x, weight, statistics, channels.exist)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("narrow_batch_norm")
        x, weight, statistics, index = ctx.saved_tensors
        dy = batch_norm.as_rows(plain(dy))
        needs = ctx.needs_input_grad[:3]
        grads = batch_norm.backward(dy, x, weight, statistics, index, ctx.settings, needs)
        return *grads, None, None, None, None


def narrow_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Channels,
    settings: Settings,
) -> Tensor:
    """batch_norm of existing channels x (N, c) or (N, c, H, W), by vectors of all channels.

    Args:
        weight, bias: (channels,) or None.
        running_mean, running_var: (channels,) or None, in training changed where channels are updated.
        channels, settings: which exist, and torch's options; `impl.batch_norm.serves` says of what.
    """
    return apply(_BatchNorm, x, weight, bias, running_mean, running_var, channels, settings)
