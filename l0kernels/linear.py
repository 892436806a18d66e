"""Gated linear layers: the closed inputs and outputs are skipped in all three products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry, reference
from ._ops import ops
from .gates import Gates, HardConcrete, sample_gates
from .reference import _checks
from .reference.gates import DEFAULT_DIST
from .reference.linear import check_layer_gates

_NO_GATE: list[Tensor] = []
_NO_TENSORS = (None, None, None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: autocast's where it is on, else that of x."""
    kind = x.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        else x.dtype
    )


def gate_tensors(gates: Gates, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count; z in float64 for a float64 product, else in float32, whatever log_alpha was."""
    z_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return gates.z if gates.z.dtype == z_dtype else gates.z.to(z_dtype), gates.index, gates.count


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_z: Tensor | None,
        in_index: Tensor | None,
        in_count: Tensor | None,
        out_z: Tensor | None,
        out_index: Tensor | None,
        out_count: Tensor | None,
        scale_out: bool,
        full_in: bool,
        full_out: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        in_gate = _NO_GATE if in_z is None else [in_z, in_index, in_count]
        out_gate = _NO_GATE if out_z is None else [out_z, out_index, out_count]
        rows = x.reshape(-1, x.shape[-1])
        y = ops.gated_linear(rows, weight, bias, in_gate, out_gate, scale_out, dtype, backend)
        ctx.save_for_backward(x, weight, bias, in_z, in_index, in_count, out_z, out_index, out_count)
        ctx.options = (scale_out, full_in, full_out, dtype)
        ctx.backend = backend
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, in_z, in_index, in_count, out_z, out_index, out_count = ctx.saved_tensors
        in_gate = _NO_GATE if in_z is None else [in_z, in_index, in_count]
        out_gate = _NO_GATE if out_z is None else [out_z, out_index, out_count]
        needs_x, needs_w, needs_b, needs_in, _, _, needs_out = ctx.needs_input_grad[:7]
        needs = [needs_x, needs_w, needs_b, needs_in, needs_out]
        dx, dw, db, dz_in, dz_out = ops.gated_linear_backward(
            dy.reshape(-1, dy.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            weight,
            bias,
            in_gate,
            out_gate,
            *ctx.options,
            needs,
            ctx.backend,
        )
        return (
            dx.view(x.shape) if needs_x else None,
            dw if needs_w else None,
            db if needs_b else None,
            dz_in if needs_in else None,
            None,
            None,
            dz_out if needs_out else None,
            *[None] * 7,
        )


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
    backend = _registry.resolve(x.device)
    if backend == "reference":
        return reference.gated_linear(
            x, weight, bias, in_gates=in_gates, out_gates=out_gates, out_support=out_support
        )
    dtype = compute_dtype(x)
    inputs = _NO_TENSORS if in_gates is None else gate_tensors(in_gates, dtype)
    outputs = _NO_TENSORS if out_gates is None else gate_tensors(out_gates, dtype)
    if out_support is not None:  # it selects; its z takes no part and gets no gradient
        z, index, count = gate_tensors(out_support, dtype)
        outputs = (z.detach(), index, count)
    return _GatedLinear.apply(
        x,
        weight,
        bias,
        *inputs,
        *outputs,
        out_gates is not None,
        in_gates is not None and in_gates.full_grad,
        out_gates is not None and out_gates.full_grad,
        dtype,
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
    """Draws the gates and applies the layer: sample_gates followed by gated_linear.

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
    given = [a for a in (in_log_alpha, out_log_alpha) if a is not None]
    gates = iter(sample_gates(given, seed=seed, dist=dist))
    return gated_linear(
        x,
        weight,
        bias,
        in_gates=None if in_log_alpha is None else next(gates),
        out_gates=None if out_log_alpha is None else next(gates),
    )
