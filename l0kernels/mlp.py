"""The packed chain: between gated layers activations exist for open units only; FLOPs fall with the product
of densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _registry, reference
from ._ops import ops
from .gates import Gates
from .linear import compute_dtype, gate_tensors
from .reference.mlp import check_mlp


class _GatedMlp(torch.autograd.Function):
    """One node for the whole chain. ``tensors``: L weights, L biases, then z, index and count of L gates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depth: int,
        activation: str,
        full: list[bool],
        dtype: torch.dtype,
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        weights, biases, gates = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth :]
        y, *saved = ops.gated_mlp(
            x.reshape(-1, x.shape[-1]), weights, biases, gates, activation, dtype, backend
        )
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.options = (depth, activation, full, dtype, backend)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        depth, activation, full, dtype, backend = ctx.options
        x, *tensors = ctx.saved_tensors
        weights, biases, gates = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth : 5 * depth]
        wanted = ctx.needs_input_grad
        needs = [wanted[0], *wanted[6 : 6 + 2 * depth], *wanted[6 + 2 * depth :: 3]]
        grads = ops.gated_mlp_backward(
            dy.reshape(-1, dy.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            weights,
            biases,
            gates,
            tensors[5 * depth :],
            activation,
            dtype,
            full,
            needs,
            backend,
        )
        dx, *rest = (g if n else None for g, n in zip(grads, needs, strict=True))
        result: list[Tensor | None] = [
            None if dx is None else dx.view(x.shape),
            None,
            None,
            None,
            None,
            None,
            *rest[: 2 * depth],
        ]
        for dz in rest[2 * depth :]:
            result += [dz, None, None]
        return tuple(result)


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str = "relu",
) -> Tensor:
    """Chain of linear layers, each gated at its input, hidden activations packed to the open units.

    ``h_0 = x * z_0``, ``h_l = act(h_{l-1} W_{l-1}^T + b_{l-1}) * z_l``, ``y = h_{L-1} W_{L-1}^T + b_{L-1}``:
    a hidden gate multiplies after the activation, and the last layer has none. Layer l computes open x open
    units only.

    Args:
        x: (..., in) any float dtype.
        weights: L matrices (n_{l+1}, n_l), dtype of x.
        biases: L vectors (n_{l+1},) or None each.
        gates: L Gates of n_l gates or None each; gates[l] multiplies the input of layer l.
        activation: "relu", "gelu" (the erf form), "silu" or "identity".

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: unequal lengths, a wrong shape, number of gates or device, an unknown activation, or a
            count that is no count.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_mlp(x, weights, biases, gates, activation)
    backend = _registry.resolve(x.device)
    if backend == "reference":
        return reference.gated_mlp(x, weights, biases, gates, activation)
    dtype = compute_dtype(x)
    tensors: list[Tensor | None] = [*weights, *biases]
    for gate in gates:
        tensors += (None, None, None) if gate is None else gate_tensors(gate, dtype)
    full = [gate is not None and gate.full_grad for gate in gates]
    return _GatedMlp.apply(x, len(weights), activation, full, dtype, backend, *tensors)
