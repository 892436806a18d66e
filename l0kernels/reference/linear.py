"""Linear layers whose inputs and outputs are gated."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._gates import DEFAULT_DIST, Gates, HardConcrete, check_layer_gates, scale
from .gates import sample_gates


def multiplier(gates: Gates) -> Tensor:
    """z, with a gradient where a gate passes one on: open, and without ``full_grad`` not at 1 (or beyond)."""
    z = gates.z
    held = z.detach()
    stays = held == 0 if gates.full_grad else (held <= 0) | (held >= 1)
    return torch.where(stays, held, z)


def closed(gates: Gates) -> Tensor:
    """Where the gates are closed; what stands there is left out, for infinity times 0 is NaN."""
    return gates.z.detach() == 0


def gate_input(x: Tensor, in_gates: Gates, trailing: int = 0) -> Tensor:
    """``x * z_in``; the gated dimension is followed by ``trailing`` others."""
    shape = (-1, *[1] * trailing)
    x = scale(x, multiplier(in_gates).reshape(shape))
    return x.masked_fill(closed(in_gates).reshape(shape), 0.0)


def gate_output(y: Tensor, out_gates: Gates | None, out_support: Gates | None, trailing: int = 0) -> Tensor:
    """``y * z_out`` or ``y * 1[z_g != 0]``; the gated dimension is followed by ``trailing`` others."""
    gates, shape = out_gates or out_support, (-1, *[1] * trailing)
    if gates is None:
        return y
    if out_gates is not None:
        y = scale(y, multiplier(out_gates).reshape(shape))
    return y.masked_fill(closed(gates).reshape(shape), 0.0)


def open_weight(weight: Tensor, in_gates: Gates | None, out_gates: Gates | None, groups: int = 1) -> Tensor:
    """The weight (out, in / groups, ...) without its closed rows and columns."""
    if in_gates is not None:
        columns = closed(in_gates).view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        columns = columns.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        weight = weight.masked_fill(columns, 0.0)
    if out_gates is not None:
        weight = weight.masked_fill(closed(out_gates).view(-1, *[1] * (weight.ndim - 1)), 0.0)
    return weight


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> Tensor:
    """Linear layer with gated inputs and outputs: ``y = z_out * ((x * z_in) W^T + b)``.

    torch: ``F.linear(x * z_in, weight, bias) * z_out``, of open units, whatever closed ones hold. An output
    gate closes the unit together with its bias. With ``out_support=g``:
    ``y = 1[z_g != 0] * ((x * z_in) W^T + b)``, unscaled; every consumer must be gated by g. dz comes where
    0 < z < 1, for ``Gates.full_grad`` wherever z != 0.

    Args:
        x: (..., in) any float dtype.
        weight: (out, in) dtype of x.
        bias: (out,) dtype of x, or None.
        in_gates: gates of the in inputs, or None.
        out_gates: gates of the out outputs, or None.
        out_support: gates of the consumer of y, out of them, or None; excludes out_gates.

    Returns:
        y (..., out) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates or device, or both out_gates and out_support.
    """
    _checks.check_linear(x, weight, bias)
    check_layer_gates(weight.shape[1], weight.shape[0], weight.device, in_gates, out_gates, out_support)
    if in_gates is not None:
        x = gate_input(x, in_gates)
    weight = open_weight(weight, in_gates, out_gates or out_support)
    y = torch.nn.functional.linear(x, weight, bias)
    return gate_output(y, out_gates, out_support)


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
        TypeError, ValueError: as sample_gates and gated_linear.
    """
    _checks.check_linear(x, weight, bias)
    given = [a for a in (in_log_alpha, out_log_alpha) if a is not None]
    gates = iter(sample_gates(given, seed=seed, dist=dist))
    return gated_linear(
        x,
        weight,
        bias,
        in_gates=None if in_log_alpha is None else next(gates),
        out_gates=None if out_log_alpha is None else next(gates),
    )
