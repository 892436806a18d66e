"""Gated linear layers: the closed inputs and outputs are skipped in all three products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops, _registry, reference
from ._autograd import apply
from ._calls import L0LinearCall, LinearCall, Wanted
from ._compat import unsafe_view
from ._gates import DEFAULT_DIST, Gates, HardConcrete, check_layer_gates
from .gates import Draw, are_drawn, attached, check_draw, check_drawn, of_a_layer, split
from .impl import module

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


class _GatedLinear(torch.autograd.Function):
    """One layer, whose gates are given, or drawn within the product where there is a seed.

    A source gets its gate's gradient: it is the log_alpha that z was, or will be, drawn from or, where z is
    None and there is no seed, z. ``order``: z, index and count of the inputs and of the outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_source: Tensor | None,
        out_source: Tensor | None,
        seed: Tensor | None,
        settings: _Settings,
        *order: Tensor | None,
    ) -> Tensor:
        rows, (_, dtype, _, dist, backend) = as_rows(x), settings
        if seed is not None and dist is not None:
            drawn = L0LinearCall(rows, weight, bias, in_source, out_source, seed, dist, dtype)
            y, *flat = _ops.l0_linear(drawn, backend)
            gates = iter(split([a for a in (in_source, out_source) if a is not None], *flat))
            sides = [_NO_TENSORS if a is None else next(gates)[:3] for a in (in_source, out_source)]
            order, saved = (*sides[0], *sides[1]), []
        else:
            order = (
                in_source if order[0] is None else order[0],
                *order[1:3],
                out_source if order[3] is None else order[3],
                *order[4:],
            )
            y, *saved = _ops.gated_linear(_call(rows, weight, bias, order, settings), backend)
        ctx.save_for_backward(x, weight, bias, *order, *saved)
        ctx.settings = settings
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("gated_linear")
        x, weight, bias, *tensors = ctx.saved_tensors
        settings, needed = ctx.settings, ctx.needs_input_grad
        needs = [*needed[:5]]
        call = _call(as_rows(x), weight, bias, tensors[:6], settings)
        of_gates = Wanted(settings.full, needs, settings.dist)
        grads = _ops.gated_linear_backward(as_rows(dy), call, tensors[6:], of_gates, settings.backend)
        return *wanted(grads, needs, x), *[None] * (len(needed) - 5)


class _Settings(NamedTuple):
    """What a layer is besides its tensors; ``dist``: of gates that have log_alphas."""

    scale_out: bool
    dtype: torch.dtype
    full: list[bool]
    dist: HardConcrete | None
    backend: str


def _call(
    rows: Tensor, weight: Tensor, bias: Tensor | None, order: Sequence[Any], settings: _Settings
) -> LinearCall:
    in_z, in_index, in_count, out_z, out_index, out_count = order
    in_gate = None if in_z is None else [in_z, in_index, in_count]
    out_gate = None if out_z is None else [out_z, out_index, out_count]
    return LinearCall(rows, weight, bias, in_gate, out_gate, settings.scale_out, settings.dtype)


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
    full = [gates is not None and gates.full_grad for gates in (in_gates, out_gates)]
    settings = _Settings(out_gates is not None, dtype, full, None, backend)
    sources = in_source, out_source
    return apply(
        _GatedLinear, x, weight, bias, *sources, None, settings, None, *in_order, support, *out_order
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
    in_source = None if in_log_alpha is None else Draw(in_log_alpha)
    out_source = None if out_log_alpha is None else Draw(out_log_alpha)
    return linear(x, weight, bias, in_source, out_source, seed, dist)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_source: Gates | Draw | None,
    out_source: Gates | Draw | None,
    seed: Tensor | None = None,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """gated_linear where both sources are Gates, l0_linear where both are Draws; all drawn before or none."""
    sources: list[Any] = [in_source, out_source]
    if not isinstance(in_source or out_source, Draw):
        return gated_linear(x, weight, bias, in_gates=sources[0], out_gates=sources[1])
    in_log_alpha, out_log_alpha = (None if source is None else source.log_alpha for source in sources)
    if out_log_alpha is not None or not _checks.fits_chain(x, (weight,), (bias,), (in_log_alpha,)):
        _check_l0_linear(x, weight, bias, in_log_alpha, out_log_alpha)
    is_drawn = are_drawn(sources)
    if is_drawn:
        check_drawn([in_log_alpha, out_log_alpha], [s and s.drawn for s in sources])
    backend = _registry.resolve_layers(x, (weight,), "gated_linear")
    if backend == "reference" and is_drawn:
        in_gates, out_gates = attached(sources, dist)
        return reference.gated_linear(x, weight, bias, in_gates=in_gates, out_gates=out_gates)
    if backend == "reference":
        return reference.l0_linear(
            x, weight, bias, in_log_alpha=in_log_alpha, out_log_alpha=out_log_alpha, seed=seed, dist=dist
        )
    dtype = compute_dtype(x)
    log_alphas = in_log_alpha, out_log_alpha
    given = [a for a in log_alphas if a is not None]
    settings = _Settings(out_log_alpha is not None, dtype, [False, False], dist, backend)
    if not is_drawn and module(backend).draws_within(x, (weight,), (bias,), given, dtype, "identity"):
        seed = check_draw(given, seed, dist)
        return apply(_GatedLinear, x, weight, bias, *log_alphas, seed, settings)
    inputs, outputs = (
        _NO_TENSORS if gate is None else gate_tensors(gate, dtype)
        for gate in of_a_layer(sources, seed, dist, backend)
    )
    return apply(_GatedLinear, x, weight, bias, *log_alphas, None, settings, *inputs, *outputs)


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
