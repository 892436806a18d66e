"""Linear layers whose inputs and outputs are gated."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from .gates import DEFAULT_DIST, Gates, HardConcrete, check_gates, sample_gates


def scale(x: Tensor, z: Tensor) -> Tensor:
    """``x * z`` in the dtype of x, rounded once: a float32 z is not rounded to the dtype of x first."""
    return (x * z).to(x.dtype)


def gate_output(y: Tensor, out_gates: Gates | None, out_support: Gates | None, trailing: int = 0) -> Tensor:
    """``y * z_out`` or ``y * 1[z_g != 0]``; the gated dimension is followed by ``trailing`` others."""
    if out_gates is not None:
        return scale(y, out_gates.z.reshape(-1, *[1] * trailing))
    if out_support is not None:
        return y.masked_fill((out_support.z == 0).reshape(-1, *[1] * trailing), 0.0)
    return y


def check_layer_gates(
    n_in: int,
    n_out: int,
    device: torch.device,
    in_gates: Gates | None,
    out_gates: Gates | None,
    out_support: Gates | None,
) -> None:
    """Checks of the three gate arguments of a layer with ``n_in`` inputs and ``n_out`` outputs."""
    if out_gates is not None and out_support is not None:
        raise ValueError("give either out_gates or out_support, got both")
    if in_gates is not None:
        check_gates("in_gates", in_gates, n_in, device, "input of weight")
    if out_gates is not None:
        check_gates("out_gates", out_gates, n_out, device, "output of weight")
    if out_support is not None:
        check_gates("out_support", out_support, n_out, device, "output of weight")


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

    torch: ``F.linear(x * z_in, weight, bias) * z_out``. An output gate closes the unit together with its
    bias. With ``out_support=g``: ``y = 1[z_g != 0] * ((x * z_in) W^T + b)``, unscaled; every consumer must
    be gated by g.

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
        x = scale(x, in_gates.z)
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
