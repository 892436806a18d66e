"""A chain of linear layers, gated between the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checks
from .gates import Gates, check_gates
from .linear import scale


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,  # the erf form
    "silu": torch.nn.functional.silu,
    "identity": _identity,
}


def check_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str,
) -> None:
    """Checks of the arguments of gated_mlp."""
    if len(weights) == 0:
        raise ValueError("weights must hold at least one matrix, got none")
    for name, values in (("biases", biases), ("gates", gates)):
        if len(values) != len(weights):
            raise ValueError(f"{name} must hold one entry per weight, {len(weights)}, got {len(values)}")
    _checks.check_choice("activation", activation, ACTIVATIONS)
    _checks.check_linear(x, weights[0], biases[0], "[0]")
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        _checks.check_weight(weight, bias, f"[{i}]")
        _checks.check_device(f"weights[{i}]", weight, x.device, "x")
        _checks.check_same_dtype(f"weights[{i}]", weight, "x", x)
        if i and weight.shape[1] != weights[i - 1].shape[0]:
            raise ValueError(
                f"weights[{i}] must have {weights[i - 1].shape[0]} columns, the rows of weights[{i - 1}], "
                f"got shape {tuple(weight.shape)}"
            )
        if gate is not None:
            check_gates(f"gates[{i}]", gate, weight.shape[1], x.device, f"input of weights[{i}]")


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str = "relu",
) -> Tensor:
    """Chain of linear layers, each gated at its input.

    ``h_0 = x * z_0``, ``h_l = act(h_{l-1} W_{l-1}^T + b_{l-1}) * z_l``, ``y = h_{L-1} W_{L-1}^T + b_{L-1}``:
    a hidden gate multiplies after the activation, and the last layer has none.

    Args:
        x: (..., in) any float dtype.
        weights: L matrices (n_{l+1}, n_l), dtype of x.
        biases: L vectors (n_{l+1},) or None each.
        gates: L Gates of n_l gates or None each.
        activation: "relu", "gelu" (the erf form), "silu" or "identity".

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: unequal lengths, a wrong shape, number of gates or device, or an unknown activation.
    """
    check_mlp(x, weights, biases, gates, activation)
    act = ACTIVATIONS[activation]
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        if i:
            x = act(x)
        if gate is not None:
            x = scale(x, gate.z)
        x = torch.nn.functional.linear(x, weight, bias)
    return x
