"""Gated linear layers: the closed inputs and outputs are skipped in all three products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _ops, _registry, reference
from ._autograd import apply
from ._compat import unsafe_view
from ._gates import DEFAULT_DIST, NO_GATE, Gates, HardConcrete, check_layer_gates
from .gates import attach, check_draw, check_drawn, draw, split

_NO_TENSORS: tuple[None, None, None] = (None, None, None)


def as_rows(t: Tensor) -> Tensor:
    """t (..., n) as a matrix; the number of rows is said, for n = 0 leaves a -1 undetermined."""
    return t if t.ndim == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """y (rows, n) with the leading dimensions of x; to autograd no view, so it may be changed in place."""
    if x.ndim == 2:
        return y
    return unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: autocast's where it is on, else that of x."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def gate_tensors(gates: Gates, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count, contiguous; z float64 for a float64 product, else float32."""
    z_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    z = gates.z if gates.z.dtype == z_dtype else gates.z.to(z_dtype)
    return z.contiguous(), gates.index.contiguous(), gates.count.contiguous()


def constants(dist: HardConcrete | None) -> list[float]:
    """The constants as the operators take them; none where gates come from the caller's z."""
    return [] if dist is None else [dist.beta, dist.gamma, dist.zeta]


class _GatedLinear(torch.autograd.Function):
    """A source gets its gate's gradient: it is the log_alpha that z was drawn from or, where z is None, z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_source: Tensor | None,
        out_source: Tensor | None,
        in_z: Tensor | None,
        in_index: Tensor | None,
        in_count: Tensor | None,
        out_z: Tensor | None,
        out_index: Tensor | None,
        out_count: Tensor | None,
        options: tuple[bool, bool, bool, torch.dtype],
        dist: HardConcrete | None,
        backend: str,
    ) -> Tensor:
        in_z, out_z = in_source if in_z is None else in_z, out_source if out_z is None else out_z
        in_gate = NO_GATE if in_z is None else [in_z, in_index, in_count]
        out_gate = NO_GATE if out_z is None else [out_z, out_index, out_count]
        scale_out, _, _, dtype = options
        y, *saved = _ops.gated_linear(as_rows(x), weight, bias, in_gate, out_gate, scale_out, dtype, backend)
        ctx.save_for_backward(x, weight, bias, in_z, in_index, in_count, out_z, out_index, out_count, *saved)
        ctx.settings = (options, dist, backend)
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), *[None] * 9


class _L0Linear(torch.autograd.Function):
    """The same where the backend draws the gates within the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_log_alpha: Tensor | None,
        out_log_alpha: Tensor | None,
        seed: Tensor,
        dist: HardConcrete,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        y, *flat = _ops.l0_linear(
            as_rows(x), weight, bias, in_log_alpha, out_log_alpha, seed, constants(dist), dtype, backend
        )
        given = [a for a in (in_log_alpha, out_log_alpha) if a is not None]
        gates = iter(split(given, *flat))
        inputs = _NO_TENSORS if in_log_alpha is None else next(gates)[:3]
        outputs = _NO_TENSORS if out_log_alpha is None else next(gates)[:3]
        ctx.save_for_backward(x, weight, bias, *inputs, *outputs)
        ctx.settings = ((out_log_alpha is not None, False, False, dtype), dist, backend)
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy), *[None] * 4


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Gradients of x, weight, bias and the sources of the two gates."""
    _ops.refuse_second_derivative("gated_linear")
    x, weight, bias, in_z, in_index, in_count, out_z, out_index, out_count, *saved = ctx.saved_tensors
    options, dist, backend = ctx.settings
    in_gate = NO_GATE if in_z is None else [in_z, in_index, in_count]
    out_gate = NO_GATE if out_z is None else [out_z, out_index, out_count]
    needs = list(ctx.needs_input_grad[:5])
    grads = _ops.gated_linear_backward(
        as_rows(dy),
        as_rows(x),
        weight,
        bias,
        in_gate,
        out_gate,
        saved,
        *options,
        needs,
        constants(dist),
        backend,
    )
    return wanted(grads, needs, x)


def wanted(grads: Sequence[Tensor], needs: Sequence[bool], x: Tensor) -> list[Tensor | None]:
    """dx in the shape of x and the other gradients, None where not needed."""
    dx, *rest = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return [dx if dx is None or x.ndim == 2 else dx.view(x.shape), *rest]


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor:
    """Linear layer with gated inputs and outputs: ``y = z_out * ((x * z_in) W^T + b)``, closed gates skipped.

    torch: ``F.linear(x * z_in, weight, bias) * z_out``. An output gate closes the unit together with its
    bias. With ``out_support=g``: ``y = 1[z_g != 0] * ((x * z_in) W^T + b)``, unscaled; every consumer of y
    must be gated by g. Gradients: dz comes where 0 < z < 1, for ``Gates.full_grad`` wherever z != 0; it is
    zero for closed gates.

    Args:
        x: (..., in) any float dtype and strides.
        weight: (out, in) dtype of x.
        bias: (out,) dtype of x, or None.
        in_gates: gates of the in inputs, or None.
        out_gates: gates of the out outputs, or None.
        out_support: gates of the consumer of y, out of them, or None; excludes out_gates.

    Returns:
        y (..., out) in the dtype of x; under autocast in its dtype, weight and bias cast while they are
        packed.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates or device, both out_gates and out_support, or a count that
            is no count.
        RuntimeError: the requested backend cannot serve the call.
    """
    _checks.check_linear(x, weight, bias)
    check_layer_gates(weight.shape[1], weight.shape[0], weight.device, in_gates, out_gates, out_support)
    backend = _registry.resolve_layers(x, (weight,), "gated_linear")
    if backend == "reference":
        return reference.gated_linear(
            x, weight, bias, in_gates=in_gates, out_gates=out_gates, out_support=out_support
        )
    dtype = compute_dtype(x)
    in_source, *in_order = _NO_TENSORS if in_gates is None else gate_tensors(in_gates, dtype)
    out_source, *out_order = _NO_TENSORS if out_gates is None else gate_tensors(out_gates, dtype)
    support = None
    if out_support is not None:  # it selects; its z takes no part and gets no gradient
        support, *out_order = gate_tensors(out_support, dtype)
        support = support.detach()
    options = (
        out_gates is not None,
        in_gates is not None and in_gates.full_grad,
        out_gates is not None and out_gates.full_grad,
        dtype,
    )
    return apply(
        _GatedLinear,
        x,
        weight,
        bias,
        in_source,
        out_source,
        None,
        *in_order,
        support,
        *out_order,
        options,
        None,
        backend,
    )


def l0_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_log_alpha: Tensor | None = None,
    out_log_alpha: Tensor | None = None,
    seed: Tensor | None = None,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Draws the gates and applies the layer: sample_gates followed by gated_linear, as one autograd node.

    The input gates are stream 0 and the output gates stream 1 of the seed; output gates alone are stream 0.

    Args:
        x: (..., in) any float dtype.
        weight: (out, in) dtype of x.
        bias: (out,) dtype of x, or None.
        in_log_alpha: (in,) float32 or float64, or None.
        out_log_alpha: (out,) float32 or float64, or None.
        seed: (1,) int64 on the device of the gates; None draws one from torch's default generator.
        dist: the distribution's constants.

    Returns:
        y (..., out) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError, ValueError, RuntimeError: as sample_gates and gated_linear.
    """
    return _l0_linear(x, weight, bias, in_log_alpha, out_log_alpha, seed, dist, None)


def drawn_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    gates: Sequence[Gates],
    dist: HardConcrete,
) -> Tensor:
    """l0_linear with gates that were drawn from its log_alphas before, detached; one for each given."""
    return _l0_linear(x, weight, bias, in_log_alpha, out_log_alpha, None, dist, gates)


def _l0_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor | None,
    dist: HardConcrete,
    drawn: Sequence[Gates] | None,
) -> Tensor:
    if out_log_alpha is not None or not _checks.fits_chain(x, (weight,), (bias,), (in_log_alpha,)):
        _check_l0_linear(x, weight, bias, in_log_alpha, out_log_alpha)
    given = [a for a in (in_log_alpha, out_log_alpha) if a is not None]
    if drawn is not None:
        check_drawn(given, drawn)
    if not given:
        return gated_linear(x, weight, bias)
    backend = _registry.resolve_layers(x, (weight,), "gated_linear")
    if backend == "reference" and drawn is not None:
        joined = iter([attach(a, gate, dist) for a, gate in zip(given, drawn, strict=True)])
        return reference.gated_linear(
            x,
            weight,
            bias,
            in_gates=None if in_log_alpha is None else next(joined),
            out_gates=None if out_log_alpha is None else next(joined),
        )
    if backend == "reference":
        return reference.l0_linear(
            x, weight, bias, in_log_alpha=in_log_alpha, out_log_alpha=out_log_alpha, seed=seed, dist=dist
        )
    dtype = compute_dtype(x)
    if drawn is None and _ops.draws_within(x, (weight,), (bias,), given, dtype, backend):
        seed = check_draw(given, seed, dist)
        return apply(_L0Linear, x, weight, bias, in_log_alpha, out_log_alpha, seed, dist, dtype, backend)
    gates = iter(draw(given, seed, dist, backend) if drawn is None else drawn)
    inputs = _NO_TENSORS if in_log_alpha is None else gate_tensors(next(gates), dtype)
    outputs = _NO_TENSORS if out_log_alpha is None else gate_tensors(next(gates), dtype)
    options = (out_log_alpha is not None, False, False, dtype)
    return apply(
        _GatedLinear, x, weight, bias, in_log_alpha, out_log_alpha, *inputs, *outputs, options, dist, backend
    )


def _check_l0_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
) -> None:
    """Checks of the arguments of l0_linear."""
    _checks.check_linear(x, weight, bias)
    for name, log_alpha, size in (
        ("in_log_alpha", in_log_alpha, weight.shape[1]),
        ("out_log_alpha", out_log_alpha, weight.shape[0]),
    ):
        if log_alpha is not None:
            _checks.check_log_alpha(name, log_alpha, ndim=1)
            _checks.check_shape(name, log_alpha, (size,), "one gate per unit of weight")
            _checks.check_device(name, log_alpha, x.device, "x")
    if in_log_alpha is not None and out_log_alpha is not None and out_log_alpha.dtype != in_log_alpha.dtype:
        expected = f"the dtype of in_log_alpha, {in_log_alpha.dtype}"
        raise TypeError(f"out_log_alpha must have {expected}, got {out_log_alpha.dtype}")
