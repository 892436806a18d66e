"""The packed chain: between gated layers activations exist for open units only; FLOPs fall with the product
of densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops, _registry, reference
from ._arguments import ROWS, check_mlp
from ._autograd import apply
from ._calls import DrawnMlpCall, Gate, L0MlpCall, MlpCall, Wanted
from ._gates import DEFAULT_DIST, Gates, HardConcrete
from .gates import Draw, are_drawn, attached, check_draw, check_drawn, check_log_alphas, of_a_layer
from .impl import module
from .linear import _NO_TENSORS, as_rows, compute_dtype, gate_tensors, like_rows, wanted


class _Settings(NamedTuple):
    """What a chain is besides its tensors; ``dist``: of gates that have log_alphas."""

    activation: str
    dtype: torch.dtype
    full: list[bool]
    dist: HardConcrete | None
    repack: bool
    backend: str


class _GatedMlp(torch.autograd.Function):
    """One node for the whole chain, whose gates are given, or drawn on the way where there is a seed.

    ``tensors``: L weights, L biases, L sources of the gates, then without a seed z, index and count of L
    gates. A source gets its gate's gradient: it is the log_alpha that z was, or will be, drawn from or, where
    z is None and there is no seed, z.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, settings: _Settings, *tensors: Any) -> Tensor:
        activation, dtype, full, dist, repack, backend = settings
        depth, rows = len(full), as_rows(x)
        weights, biases, sources = [[*tensors[i : i + depth]] for i in (0, depth, 2 * depth)]
        ctx.gated = None  # which layers have a gate, where gates are drawn here
        if seed is not None and dist is not None:
            drawn = L0MlpCall(rows, weights, biases, sources, activation, seed, dist, dtype)
            z, index, count, y, *saved = _ops.l0_mlp(drawn, backend)
            gates: list[Tensor | None] = [z, index, count]
            ctx.gated = [source is not None for source in sources]
        else:
            gates = [*tensors[3 * depth :]]
            for i, source in enumerate(sources):
                if gates[3 * i] is None:
                    gates[3 * i] = source
            call = MlpCall(rows, weights, biases, _triples(gates), activation, dtype, repack)
            y, *saved = _ops.gated_mlp(call, backend)
        ctx.save_for_backward(x, *weights, *biases, *gates, *saved)
        ctx.settings = settings
        return like_rows(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("gated_mlp")
        activation, dtype, full, dist, repack, backend = ctx.settings
        depth = len(full)
        x, *tensors = ctx.saved_tensors
        weights, biases, tensors = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3 : 3 + 3 * depth]]
        rows, of_gates = as_rows(x), Wanted(full, needs, dist)
        if ctx.gated is not None:
            z, index, count, *saved = tensors
            drawn = DrawnMlpCall(rows, weights, biases, ctx.gated, z, index, count, activation, dtype)
            grads = _ops.l0_mlp_backward(as_rows(dy), drawn, saved, of_gates, backend)
        else:
            gates = _triples(tensors[: 3 * depth])
            call = MlpCall(rows, weights, biases, gates, activation, dtype, repack)
            grads = _ops.gated_mlp_backward(as_rows(dy), call, tensors[3 * depth :], of_gates, backend)
        dx, *rest = wanted(grads, needs, x)
        return (dx, None, None, *rest, *[None] * (len(ctx.needs_input_grad) - 3 - 3 * depth))


def _triples(tensors: Sequence[Any]) -> list[Gate | None]:
    """The gate of each layer out of z, index and count of all, None where it has none."""
    starts = range(0, len(tensors), 3)
    return [None if tensors[i] is None else [*tensors[i : i + 3]] for i in starts]


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str = "relu",
    *,
    repack_in_backward: bool = False,
) -> Tensor:
    """Chain of linear layers, each gated at its input, hidden activations packed to the open units.

    ``h_0 = x * z_0``, ``h_l = act(h_{l-1} W_{l-1}^T + b_{l-1}) * z_l``, ``y = h_{L-1} W_{L-1}^T + b_{L-1}``:
    a hidden gate multiplies after the activation, and the last layer has none. Layer l computes open x open
    units only. For the gated products "swiglu" and "geglu",
    ``h_l = act(h_{l-1} W_g^T + b_g) * (h_{l-1} W_u^T + b_u) * z_l`` with act = silu or gelu,
    ``W_{l-1} = [W_g; W_u]`` and ``b_{l-1} = [b_g; b_u]``; y is linear as ever. torch, for two layers:
    ``F.linear(F.silu(F.linear(x, W_g, b_g)) * F.linear(x, W_u, b_u) * z, W_1, b_1)``.

    Args:
        x: (..., in) any float dtype.
        weights: L matrices (n_{l+1}, n_l), dtype of x; (2 n_{l+1}, n_l) in front of a gated product.
        biases: L vectors, as long as their weight has rows, or None each.
        gates: L Gates of n_l gates or None each; gates[l] multiplies the input of layer l.
        activation: "relu", "gelu" (the erf form), "silu", "identity", "swiglu" or "geglu".
        repack_in_backward: on a GPU, pack the gated weights and x again for backward instead of keeping
            forward's packs: saves their memory, costs the time to write them. No effect on a CPU.

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: unequal lengths, a wrong shape, number of gates or device, an unknown activation, or a
            count that is no count.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_mlp(x, weights, biases, gates, activation)
    backend = _registry.resolve_layers(x, weights, "gated_mlp", activation)
    if backend == "reference":
        return reference.gated_mlp(x, weights, biases, gates, activation)
    dtype = compute_dtype(x)
    parts = [_NO_TENSORS if gate is None else gate_tensors(gate, dtype) for gate in gates]
    full = [gate is not None and gate.full_grad for gate in gates]
    settings = _Settings(activation, dtype, full, None, repack_in_backward, backend)
    sources = (part[0] for part in parts)
    order = (tensor for part in parts for tensor in (None, *part[1:]))
    return apply(_GatedMlp, x, None, settings, *weights, *biases, *sources, *order)


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
    """Draws the gates and applies the chain: sample_gates followed by gated_mlp, as one autograd node.

    The gates present are one list for sample_gates: the first is stream 0.

    Args:
        x: (..., in) any float dtype.
        weights, biases: as in gated_mlp.
        log_alphas: L vectors (n_l,) float32 or float64, or None each; the gates of the input of layer l.
        activation: as in gated_mlp.
        seed: (1,) int64 on the device of x; None draws one from torch's default generator.
        dist: the distribution's constants.
        repack_in_backward: as in gated_mlp.

    Returns:
        y (..., n_L) in the dtype of x (under autocast, in its dtype).

    Raises:
        TypeError, ValueError, RuntimeError: as sample_gates and gated_mlp.
    """
    sources = [None if a is None else Draw(a) for a in log_alphas]
    if not any(sources):
        _check_l0_mlp(x, weights, biases, log_alphas, activation)
    return chain(x, weights, biases, sources, activation, repack_in_backward, seed, dist)


def chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sources: Sequence[Gates | Draw | None],
    activation: str,
    repack: bool,
    seed: Tensor | None = None,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """gated_mlp where the sources are Gates, l0_mlp where they are Draws; all drawn before or none."""
    if not any(isinstance(source, Draw) for source in sources):
        gates: Any = sources
        return gated_mlp(x, weights, biases, gates, activation, repack_in_backward=repack)
    draws: Any = sources
    log_alphas = [None if source is None else source.log_alpha for source in draws]
    if activation not in ROWS or not _checks.fits_chain(x, weights, biases, log_alphas, ROWS[activation]):
        _check_l0_mlp(x, weights, biases, log_alphas, activation)
    is_drawn = are_drawn(draws)
    if is_drawn:
        check_drawn(log_alphas, [source and source.drawn for source in draws])
    backend = _registry.resolve_layers(x, weights, "gated_mlp", activation)
    if backend == "reference" and is_drawn:
        return reference.gated_mlp(x, weights, biases, attached(draws, dist), activation)
    if backend == "reference":
        return reference.l0_mlp(x, weights, biases, log_alphas, activation, seed=seed, dist=dist)
    dtype = compute_dtype(x)
    given = [a for a in log_alphas if a is not None]
    settings = _Settings(activation, dtype, [False] * len(weights), dist, repack, backend)
    if not is_drawn and module(backend).draws_within(x, weights, biases, given, dtype, activation):
        seed = check_draw(given, seed, dist)
        return apply(_GatedMlp, x, seed, settings, *weights, *biases, *log_alphas)
    gates = of_a_layer(draws, seed, dist, backend)
    order = (t for gate in gates for t in (_NO_TENSORS if gate is None else gate_tensors(gate, dtype)))
    return apply(_GatedMlp, x, None, settings, *weights, *biases, *log_alphas, *order)


def _check_l0_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor | None],
    activation: str,
) -> None:
    """Checks of the arguments of l0_mlp."""
    check_mlp(x, weights, biases, [None] * len(weights), activation)
    if len(log_alphas) != len(weights):
        raise ValueError(f"log_alphas must hold one entry per weight, {len(weights)}, got {len(log_alphas)}")
    check_log_alphas([a for a in log_alphas if a is not None])
    for i, (log_alpha, weight) in enumerate(zip(log_alphas, weights, strict=True)):
        if log_alpha is not None:
            name = f"log_alphas[{i}]"
            _checks.check_shape(name, log_alpha, (weight.shape[1],), f"one gate per input of weights[{i}]")
            _checks.check_device(name, log_alpha, x.device, "x")
