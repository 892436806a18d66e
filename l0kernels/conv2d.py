"""Gated convolution: closed input and output channels are skipped in all three products, and need not exist
between two layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _ops, _registry, reference
from ._arguments import check_conv2d, conv_options
from ._autograd import apply
from ._calls import Conv2dCall, Wanted
from ._compat import break_graph, settled
from ._gates import Gates, check_gates, check_layer_gates
from .impl import conv2d as impl
from .impl import module
from .linear import _NO_TENSORS, compute_dtype, gate_tensors


class _Settings(NamedTuple):
    """What a layer is besides its tensors; ``flags``: scale_in, scale_out, in_packed, out_packed."""

    flags: tuple[bool, bool, bool, bool]
    full: list[bool]
    conv: impl.Conv
    dtype: torch.dtype
    backend: str


class _GatedConv2d(torch.autograd.Function):
    """``order``: index and count of the inputs and of the outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_z: Tensor | None,
        out_z: Tensor | None,
        settings: _Settings,
        *order: Tensor | None,
    ) -> Tensor:
        tensors = (x, weight, bias, in_z, out_z, *order)
        y, *saved = _ops.gated_conv2d(_call(tensors, settings), settings.backend)
        ctx.save_for_backward(*tensors, *saved)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("gated_conv2d")
        tensors, settings, needs = ctx.saved_tensors, ctx.settings, list(ctx.needs_input_grad[:5])
        wanted = Wanted(settings.full, needs, None)
        call, saved = _call(tensors[:9], settings), [*tensors[9:]]
        grads = _ops.gated_conv2d_backward(dy, call, saved, wanted, settings.backend)
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 5


def _call(tensors: Sequence[Any], settings: _Settings) -> Conv2dCall:
    x, weight, bias, in_z, out_z, in_index, in_count, out_index, out_count = tensors
    in_gate = None if in_z is None else [in_z, in_index, in_count]
    out_gate = None if out_z is None else [out_z, out_index, out_count]
    return Conv2dCall(x, weight, bias, in_gate, out_gate, *settings.flags, *settings.conv, settings.dtype)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gates: Gates | None,
    out_gates: Gates | None,
    flags: tuple[bool, bool, bool, bool],
    conv: impl.Conv,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """y (N, out, H', W') by the operator; gates that only select get no gradient."""
    scale_in, scale_out, _, _ = flags
    in_z, *in_order = _NO_TENSORS if in_gates is None else gate_tensors(in_gates, dtype)
    out_z, *out_order = _NO_TENSORS if out_gates is None else gate_tensors(out_gates, dtype)
    if in_z is not None and out_z is not None and in_order[0] is out_order[0]:  # Dynamo takes no tensor twice
        out_z, *out_order = (t.view_as(t) for t in (out_z, *out_order))
    in_z = in_z if in_z is None or scale_in else in_z.detach()
    out_z = out_z if out_z is None or scale_out else out_z.detach()
    full = [gates is not None and gates.full_grad for gates in (in_gates, out_gates)]
    settings = _Settings(flags, full, conv, dtype, backend)
    return apply(_GatedConv2d, x, weight, bias, in_z, out_z, settings, *in_order, *out_order)


def _prepared(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, impl.Conv]:
    """x with the zeros of an uneven padding, and the options as two numbers each."""
    strides, paddings, dilations, behind = conv_options(x, weight, stride, padding, dilation)
    if any(behind):
        x = F.pad(x, (0, behind[1], 0, behind[0]))
    return x, (strides, paddings, dilations, groups)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor:
    """2-D convolution with gated channels: ``y = z_out * (conv2d(x * z_in, W) + b)``, closed ones skipped.

    torch: ``F.conv2d(x * z_in[:, None, None], weight, bias, ...) * z_out[:, None, None]``. An output gate
    closes the channel together with its bias. With ``out_support=g``:
    ``y = 1[z_g != 0] * (conv2d(x * z_in, W) + b)``, unscaled; every consumer of y must be gated by g.
    Gradients: dz comes where 0 < z < 1, for ``Gates.full_grad`` wherever z != 0; it is zero for closed gates.

    Args:
        x: (N, in, H, W) or (in, H, W), any float dtype, contiguous or channels_last.
        weight: (out, in / groups, kh, kw) dtype of x.
        bias: (out,) dtype of x, or None.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d.
        in_gates: gates of the in channels, or None.
        out_gates: gates of the out channels, or None.
        out_support: gates of the consumer of y, out of them, or None; excludes out_gates.

    Returns:
        y (N, out, H', W') or (out, H', W') in the dtype of x; under autocast in its dtype, weight and bias
        cast while they are packed. Its memory format is that of torch's conv2d (on a GPU channels_last).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates or device, both out_gates and out_support, a stride,
            padding, dilation or groups that do not fit, or a count that is no count.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_conv2d(x, weight, bias, groups)
    n_in, n_out = weight.shape[1] * groups, weight.shape[0]
    check_layer_gates(n_in, n_out, weight.device, in_gates, out_gates, out_support)
    backend = _registry.resolve(x.device, x.dtype, "gated_conv2d")
    if backend == "reference":
        return reference.gated_conv2d(
            x,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            in_gates=in_gates,
            out_gates=out_gates,
            out_support=out_support,
        )
    padded, conv = _prepared(x, weight, stride, padding, dilation, groups)
    flags = (in_gates is not None, out_gates is not None, False, False)
    gates = out_gates if out_support is None else out_support
    batch = padded if x.ndim == 4 else padded.unsqueeze(0)
    y = _apply(batch, weight, bias, in_gates, gates, flags, conv, compute_dtype(x), backend)
    return y if x.ndim == 4 else y.squeeze(0)


@dataclass(frozen=True)
class Packed:
    """Activations of which only the open channels exist.

    Attributes:
        data: compiled, traced or under torch.func, where no shape may depend on the gates, (N, channels, H,
            W), the closed ones zero; else on a CPU (N, n, H, W), the n open channels ascending; on a GPU
            (N, channels, H, W) channels_last, of which [0, open) are the open ones ascending, [open, extent)
            zeros and the rest unwritten, or, where count[1] >= channels, all of them in order, the closed
            ones zero.
        gates: which channels exist; z is detached and multiplies nothing.
        channels: the number of all channels.
        backend: whose layout data has.
    """

    data: Tensor
    gates: Gates
    channels: int
    backend: str

    def map(self, fn: Callable[[Tensor], Tensor]) -> Packed:
        """``fn`` of data, one that takes each channel by itself and keeps zeros: relu, pooling, dropout."""
        if self.data.shape[1]:
            return replace(self, data=fn(self.data))
        one = F.pad(self.data, (0, 0, 0, 0, 0, 1))  # torch's pooling refuses to see no channel at all
        return replace(self, data=fn(one)[:, :0])


class _PackChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Gates, backend: str) -> Tensor:
        ctx.settings = (gates, backend)
        return _gather(x, gates, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_batched("pack_channels")
        return _UnpackChannels.apply(dy, *ctx.settings), None, None


class _UnpackChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Tensor, gates: Gates, backend: str) -> Tensor:
        ctx.settings = (gates, backend)
        return _scatter(data, gates, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_batched("unpack_channels")
        return _PackChannels.apply(dy, *ctx.settings), None, None


def _gather(x: Tensor, gates: Gates, backend: str) -> Tensor:
    if is_exact(backend):
        return impl.take(x, open_order(gates))
    return module(backend).pack_channels(x, list(gates[:3]), x.dtype)


def _scatter(data: Tensor, gates: Gates, backend: str) -> Tensor:
    if is_exact(backend):
        fmt = impl.memory_format(data, data)
        return impl.put(module(backend), data, list(gate_tensors(gates, data.dtype)), data.dtype, fmt)
    return module(backend).unpack_channels(data, list(gates[:3]), data.dtype)


def open_order(gates: Gates) -> Tensor | None:
    """The open channels of an exact layout; None where all are open."""
    return impl.open_channels(list(gates[:3]), gates.z.shape[0])


STATIC = "static"
"""The layout of packed channels where shapes must not depend on gates: all channels, the closed ones zero."""


def is_exact(backend: str) -> bool:
    """Whether packed channels of this backend are the open ones and no more."""
    return backend != STATIC and _registry.packs_exactly(backend)


class _Take(torch.autograd.Function):
    """Channels of x; ``valid`` tells which entries of ``index`` are no padding, None for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
        ctx.settings = (index, valid, x.shape)
        return impl.take(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("packed_conv2d")
        index, valid, shape = ctx.settings
        if valid is not None:
            index, dy = index[valid], dy[:, valid]
        dx = impl.constant(dy, shape, None, dy.dtype, impl.memory_format(dy, dy))
        return dx.index_copy_(1, index, dy), None, None


def _packing_backend(x: Tensor) -> str:
    """The backend whose layout packed activations get; the reference has none of its own."""
    backend = _registry.resolve(x.device, x.dtype, "gated_conv2d")
    return "torch" if backend == "reference" else backend


def pack_channels(x: Tensor, gates: Gates) -> Packed:
    """The channels of x (N, channels, H, W) that the gates leave open, unscaled; unpack_channels goes back.

    Raises:
        TypeError, ValueError: x is no such tensor or the gates are not its.
        RuntimeError: the requested backend cannot serve the call.
    """
    _checks.check_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must have shape (N, channels, H, W), got {tuple(x.shape)}")
    check_gates("gates", gates, x.shape[1], x.device, "channel of x")
    support = gates.detached()
    if not _checks.readable():
        return Packed(x.masked_fill((support.z == 0)[:, None, None], 0), support, x.shape[1], STATIC)
    backend = _packing_backend(x)
    whole = is_exact(backend) and open_order(support) is None
    return Packed(x if whole else apply(_PackChannels, x, support, backend), support, x.shape[1], backend)


def unpack_channels(packed: Packed) -> Tensor:
    """All channels of packed activations, (N, channels, H, W); zeros in the closed ones."""
    if packed.backend == STATIC:
        return packed.data
    break_graph("Packed channels from outside of a compiled graph have no static shape; pack them inside")
    if is_exact(packed.backend) and open_order(packed.gates) is None:
        return packed.data
    return apply(_UnpackChannels, packed.data, packed.gates, packed.backend)


class _PackWeight(torch.autograd.Function):
    """The packed weight and bias of an exact product, gates folded in."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        in_z: Tensor | None,
        out_z: Tensor | None,
        plan: impl.Plan,
        orders: tuple[list[Tensor], list[Tensor]],
        scales: tuple[bool, bool],
        full: tuple[bool, bool],
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(weight, bias, in_z, out_z)
        ctx.settings = (plan, orders, scales, full, backend)
        pair, gates = module(backend), _with_z(in_z, out_z, orders)
        w = (
            weight.new_empty(0)
            if plan.empty
            else impl.pack_weight(pair, weight, plan, *gates, *scales, dtype)
        )
        b = None if bias is None else impl.pack_bias(pair, bias, gates[1], scales[1], dtype)
        return w if w is not weight else w.view_as(w), b if b is None or b is not bias else b.view_as(b)

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("packed_conv2d")
        weight, bias, in_z, out_z = ctx.saved_tensors
        plan, orders, scales, full, backend = ctx.settings
        pair, gates = module(backend), _with_z(in_z, out_z, orders)
        need_w, need_b, need_in, need_out = ctx.needs_input_grad[:4]
        dweight = dbias = dz_in = dz_out = None
        if dw is not None and plan.empty:
            dweight, dz_in, dz_out = (
                torch.zeros_like(t) if t is not None and needed else None
                for t, needed in ((weight, need_w), (in_z, need_in), (out_z, need_out))
            )
        elif dw is not None and (need_w or need_in or need_out):
            needs = (need_w, need_in, need_out)
            dweight, dz_in, dz_out = impl.unpack_weight(
                pair, dw, weight, plan, gates[0], gates[1], scales[0], scales[1], full, needs
            )
        if db is not None and bias is not None and (need_b or need_out):
            dbias, dz_bias = impl.unpack_bias(pair, db, bias, gates[1], scales[1], full[1], need_out)
            dz_out = dz_bias if dz_out is None else dz_out if dz_bias is None else dz_out + dz_bias
        return dweight if need_w else None, dbias if need_b else None, dz_in, dz_out, *[None] * 6


def _with_z(
    in_z: Tensor | None, out_z: Tensor | None, orders: tuple[list[Tensor], list[Tensor]]
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    return (
        None if in_z is None else [in_z, *orders[0]],
        None if out_z is None else [out_z, *orders[1]],
    )


class _Without(torch.autograd.Function):
    """(N, C, H, W), of which every channel is its bias: x and the weight get zeros, as from a product.

    Made here: a tensor that a Function returns as it came is a view, of one image with strides of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: list[int],
        dtype: torch.dtype,
        fmt: torch.memory_format,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return impl.constant(x, shape, bias, dtype, fmt)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("packed_conv2d")
        *inputs, need_b = ctx.needs_input_grad[:3]
        grads = zip(ctx.saved_tensors, inputs, strict=True)
        dx, dw = (torch.zeros_like(t) if needed else None for t, needed in grads)
        return dx, dw, dy.sum((0, 2, 3)) if need_b else None, None, None, None


class _Convolution(torch.autograd.Function):
    """conv2d of all channels by a backend's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: impl.Convolution,
        conv: impl.Conv,
        fmt: torch.memory_format,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = own, conv, fmt
        return own.convolve(x, weight, bias, conv, fmt)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (own, conv, fmt) = ctx.saved_tensors, ctx.settings
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # torch's has derivatives of its own
            stride, padding, dilation, groups = conv
            sizes, needs = [weight.shape[0]] if need_b else None, [need_x, need_w, need_b]
            dx, dw, db = torch.ops.aten.convolution_backward(
                dy, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, needs
            )
        else:
            dx, dw, db = own.convolve_grad(dy, x, weight, conv, fmt, need_x, need_w or need_b)
        return dx, dw if need_w else None, db if need_b else None, None, None, None


def _combined(support: Gates, gates: Gates | None) -> tuple[Gates, bool]:
    """The gates of a product whose input exists where ``support`` is open, and whether they multiply."""
    if gates is None:
        return support, False
    if gates.index is support.index and gates.count is support.count:
        return gates, True
    return Gates.from_z(gates.z.masked_fill(support.z == 0, 0), full_grad=gates.full_grad), True


def packed_conv2d(
    x: Tensor | Packed,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor | Packed:
    """gated_conv2d between packed activations: no channel that is closed is gathered, scattered or zeroed.

    Args:
        x: (N, in, H, W), or Packed of in channels: those that do not exist are zero.
        in_gates: as in gated_conv2d. Of a Packed x they should be the gates that it was packed with; with
            other gates the product sees the channels that both leave open.
        weight, bias, stride, padding, dilation, groups, out_gates, out_support: as in gated_conv2d.

    Returns:
        Packed by out_gates or out_support; without either the dense y (N, out, H', W').

    Raises:
        TypeError, ValueError, RuntimeError: as gated_conv2d.
    """
    data, channels = (x.data, x.channels) if isinstance(x, Packed) else (x, None)
    check_conv2d(data, weight, bias, groups, channels)
    if data.ndim != 4:
        raise ValueError(f"x must have shape (N, channels, H, W), got {tuple(data.shape)}")
    n_in, n_out = weight.shape[1] * groups, weight.shape[0]
    check_layer_gates(n_in, n_out, weight.device, in_gates, out_gates, out_support)
    gates, scale_out = (out_gates, True) if out_support is None else (out_support, False)
    if gates is None and not isinstance(x, Packed):
        return gated_conv2d(x, weight, bias, stride, padding, dilation, groups, in_gates=in_gates)
    backend = _registry.resolve(data.device, data.dtype, "gated_conv2d")
    static = x.backend == STATIC if isinstance(x, Packed) else not _checks.readable()
    if isinstance(x, Packed) and backend != "reference" and not static:
        break_graph("Packed channels from outside of a compiled graph have no static shape; pack them inside")
        backend = x.backend
    if backend == "reference" or (not (static or is_exact(backend)) and _unpacks(x, in_gates, groups)):
        dense = unpack_channels(x) if isinstance(x, Packed) else x
        y = gated_conv2d(
            dense,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            in_gates=in_gates,
            out_gates=out_gates,
            out_support=out_support,
        )
        return y if gates is None else pack_channels(y, gates)
    dtype = compute_dtype(data)
    data, conv = _prepared(data, weight, stride, padding, dilation, groups)
    support, scale_in = (None, False) if in_gates is None else (in_gates, True)
    if isinstance(x, Packed):
        support, scale_in = _combined(x.gates, in_gates)
    if static or not is_exact(backend):
        in_packed, out_packed = isinstance(x, Packed) and not static, gates is not None and not static
        flags = (scale_in, scale_out, in_packed, out_packed)
        y = _apply(data, weight, bias, support, gates, flags, conv, dtype, backend)
    else:
        held = x if isinstance(x, Packed) else None
        y = _exact(data, held, weight, bias, support, gates, (scale_in, scale_out), conv, dtype, backend)
    if gates is None:
        return y
    return Packed(y, gates.detached(), n_out, STATIC if static else backend)


def _unpacks(x: Tensor | Packed, in_gates: Gates | None, groups: int) -> bool:
    """Whether the GPU's kernels have no product for this packed input."""
    if groups != 1:
        return True
    return isinstance(x, Packed) and in_gates is not None and in_gates.index is not x.gates.index


def _exact(
    data: Tensor,
    held: Packed | None,
    weight: Tensor,
    bias: Tensor | None,
    in_gates: Gates | None,
    out_gates: Gates | None,
    scales: tuple[bool, bool],
    conv: impl.Conv,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The open channels of y by torch's own convolution, and autograd's derivative of it."""
    stride, padding, dilation, groups = conv
    in_z, *in_order = _NO_TENSORS if in_gates is None else gate_tensors(in_gates, dtype)
    out_z, *out_order = _NO_TENSORS if out_gates is None else gate_tensors(out_gates, dtype)
    in_z = in_z if in_z is None or scales[0] else in_z.detach()
    out_z = out_z if out_z is None or scales[1] else out_z.detach()
    orders = ([t for t in in_order if t is not None], [t for t in out_order if t is not None])
    gates = _with_z(in_z, out_z, orders)
    plan = impl.plan(weight, groups, *gates)
    full = (in_gates is not None and in_gates.full_grad, out_gates is not None and out_gates.full_grad)
    w, b = apply(_PackWeight, weight, bias, in_z, out_z, plan, orders, scales, full, dtype, backend)
    shape = impl.output_shape(data, weight, conv)
    if plan.opened is not None:
        shape[1] = len(plan.opened)
    fmt = impl.fastest_format(data)
    if plan.empty:
        return apply(_Without, data, w, b, shape, dtype, fmt)
    x = impl.in_format(_inputs(data, held, plan).to(dtype), fmt)
    bias = None if b is None else impl.bias_of(plan, b)
    of = (stride, padding, dilation, plan.groups)
    own = module(backend).convolution(x, w, of)
    if own is None:
        y = F.conv2d(settled(x, plan.groups, stride), w, bias, *of)
    else:
        y = apply(_Convolution, x, w, bias, own, of, fmt)
    if not plan.computes_all:
        rest = data.new_zeros(shape, dtype=dtype) if b is None else b[:, None, None].expand(shape)
        y = impl.put_groups(y, plan, rest)
    return y.contiguous(memory_format=fmt)


def _inputs(data: Tensor, held: Packed | None, plan: impl.Plan) -> Tensor:
    """The plan's input channels out of all, or out of those that a packed x holds."""
    index = plan.in_index
    order = None if held is None else open_order(held.gates)
    if order is not None and index is not None:
        if plan.in_valid is None and len(index) == len(order) and torch.equal(index, order):
            return data
        index = torch.searchsorted(order, index)
    if index is None:
        return data
    return apply(_Take, data, index, plan.in_valid)
