"""A chain of linear layers, gated between the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._arguments import GLU, check_mlp
from .._gates import DEFAULT_DIST, Gates, HardConcrete
from .gates import sample_gates
from .linear import gate_input, open_weight


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,  # the erf form
    "silu": torch.nn.functional.silu,
    "identity": _identity,
}


def _activate(activation: str, a: Tensor) -> Tensor:
    """The hidden units (..., n) of pre-activations (..., n), or (..., 2 n) for a gated product."""
    if activation not in GLU:
        return ACTIVATIONS[activation](a)
    gate, up = a.tensor_split(2, -1)
    return ACTIVATIONS[GLU[activation]](gate) * up


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str = "relu",
    *,
    repack_in_backward: bool = False,
) -> Tensor:
    """Chain of linear layers, each gated at its input.

    ``h_0 = x * z_0``, ``h_l = act(h_{l-1} W_{l-1}^T + b_{l-1}) * z_l``, ``y = h_{L-1} W_{L-1}^T + b_{L-1}``:
    a hidden gate multiplies after the activation, and the last layer has none. For the gated products
    "swiglu" and "geglu", ``h_l = act(h_{l-1} W_g^T + b_g) * (h_{l-1} W_u^T + b_u) * z_l`` with act = silu or
    gelu, ``W_{l-1} = [W_g; W_u]`` and ``b_{l-1} = [b_g; b_u]``; y is linear as ever.

    Args:
        x: (..., in) any float dtype.
        weights: L matrices (n_{l+1}, n_l), dtype of x; (2 n_{l+1}, n_l) in front of a gated product.
        biases: L vectors, as long as their weight has rows, or None each.
        gates: L Gates of n_l gates or None each.
        activation: "relu", "gelu" (the erf form), "silu", "identity", "swiglu" or "geglu".
        repack_in_backward: no effect here.

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: unequal lengths, a wrong shape, number of gates or device, or an unknown activation.
    """
    check_mlp(x, weights, biases, gates, activation)
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        if i:
            x = _activate(activation, x)
        if gate is not None:
            x = gate_input(x, gate)
        x = torch.nn.functional.linear(x, open_weight(weight, gate, None), bias)
    return x


def l0_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor | None],
    activation: str = "relu",
    *,
    seed: Tensor | None = None,
    dist: HardConcrete = DEFAULT_DIST,
    repack_in_backward: bool = False,
) -> Tensor:
    """Draws the gates and applies the chain: sample_gates followed by gated_mlp.

    The gates present are one list for sample_gates: the first is stream 0.

    Args:
        x, weights, biases, activation: as in gated_mlp.
        log_alphas: L vectors (n_l,) float32 or float64, or None each; the gates of the input of layer l.
        seed: (1,) int64 on the device of x; None draws one from torch's default generator.
        dist: the distribution's constants.
        repack_in_backward: no effect here.

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError, ValueError: as sample_gates and gated_mlp.
    """
    drawn = iter(sample_gates([a for a in log_alphas if a is not None], seed=seed, dist=dist))
    return gated_mlp(x, weights, biases, [None if a is None else next(drawn) for a in log_alphas], activation)
