"""How many parameters and FLOPs a gated model has: expected over the draws, or under its evaluation gates."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .conv import GatedConv
from .gate import HardConcreteGate, gate_modules
from .linear import L0Linear
from .ranks import check_none_flat
from .steps import (
    GateModules,
    Step,
    gate_of,
    is_feed_forward,
    is_linear,
    is_norm,
    is_residual,
    units_in,
    units_out,
    walk,
)
from .times import times_of
from .units.example import Inputs
from .units.sizes import meeting, open_counts, open_entries, open_heads, open_pairs, with_one

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Openness = Callable[[HardConcreteGate], Tensor]


def expected_l0(model: nn.Module) -> Tensor:
    r"""E[parameters that are not closed]: k (sum p_in)(sum p_out) + sum p_out for the bias, of all layers.

    p = P(z > 0) of a unit, k the taps of a convolution (1 otherwise); a grouped convolution sums over its
    groups. In ``nn.Sequential``, :class:`L0MLP` and :class:`L0Sequential`, p_out includes the input gates of
    the next layer, and p_in the output gates of the layer before if what stands between maps 0 to 0 (ReLU
    does, Sigmoid does not; a batch norm only as :class:`L0BatchNorm2d` in an :class:`L0Sequential`). Behind
    nn.Flatten a channel is H * W features: closed with the channel, and a channel all of whose features are
    closed is closed. Ungated linear layers and convolutions count with their neighbours' gates, weight and
    block gates on top of them, the two parameters of a batch norm between convolutions with its channels,
    every other parameter in full, log_alpha not at all. Where a gate meets itself, as in a depthwise
    convolution with one gate on both sides, or behind nn.Flatten, it counts p, not p^2.

    In a model that :func:`gate_` has gated an element counts the product of P(open) over the gates of its
    units, whichever parameter it is of.

    Returns:
        A float64 scalar, differentiable in log_alpha (for a constraint on the size, say).
    """
    return _l0(model, _p_open)


def eval_l0(model: nn.Module) -> int:
    """The same count under the evaluation gates: the parameters that are not closed in ``model.eval()``."""
    with torch.no_grad():
        return round(_l0(model, _is_open).item())


def expected_flops(model: nn.Module, input_shape: Inputs | None = None) -> Tensor:
    r"""E[FLOPs] of a forward: 2 k (sum p_in)(sum p_out) + sum p_out for the bias, per row or output position.

    The units are those of :func:`expected_l0`; positions that read padding count like others. Linear layers,
    convolutions and attention count (weight gates as if each could be skipped), a transposed convolution
    2 k (in) (out) / groups per input position and its bias per output; activations, normalisations and
    recurrent layers do not. The products within attention are 2 (D + D') per head and pair of positions, D
    of the keys, D' of the values; without a run they are left out.

    Args:
        model: any module.
        input_shape: of the whole input, the batch included: (1, 784) gives the FLOPs of one example. The
            model is run on zeros of this shape, in eval mode, to see how many rows or positions reach each
            layer. A tensor is an input itself, for models that take other than floats; a mapping holds
            inputs by name. None: one row for every linear layer, without a run.

    Returns:
        A float64 scalar, differentiable in log_alpha.

    Raises:
        ValueError: input_shape is None for a model with convolutions, whose FLOPs depend on it; a gated
            layer as out_proj of a ``torch.nn.MultiheadAttention``, which would not call it.
    """
    return _flops(model, input_shape, _p_open)


def eval_flops(model: nn.Module, input_shape: Inputs | None = None) -> int:
    """The same count under the evaluation gates: of what is open, on both sides of each layer.

    ``export(model)`` spends as much where all that is closed can be left out. It spends more for weight and
    block gates, for a grouped convolution, of which whole groups stay, for a convolution that is closed
    altogether, of which one channel of zeros stays on each side, for closed units of which a plain norm
    or an activation with f(0) != 0 makes constants that the next layer reads, and for what it keeps of a
    model that :func:`gate_` has gated: one unit of a closed group where a convolution, a norm or the forward
    needs one, and groups that have to stay whole.
    """
    with torch.no_grad():
        return round(_flops(model, input_shape, _is_open).item())


def _p_open(gate: HardConcreteGate) -> Tensor:
    if gate.frozen:
        return _is_open(gate)
    return gate.dist.p_open(gate.whole()).double()


def _is_open(gate: HardConcreteGate) -> Tensor:
    return (gate.eval_gates().z != 0).double().reshape(gate.log_alpha.shape)


def _l0(model: nn.Module, openness: Openness) -> Tensor:
    _check(model)
    of_layers, of_units = _open(model, openness)
    counted = {part for layer, _ in of_layers for part in layer.modules()}
    tied = {parameter for layer, _ in of_layers for parameter in layer.parameters(recurse=False)}
    rest = {
        parameter: parameter.numel()
        for module in model.modules()
        if module not in counted and not isinstance(module, HardConcreteGate)
        for parameter in module.parameters(recurse=False)
        if parameter not in of_units and parameter not in tied
    }
    return _total([*of_layers.values(), *of_units.values()], sum(rest.values()))


def _flops(model: nn.Module, input_shape: Inputs | None, openness: Openness) -> Tensor:
    _check(model)
    times = times_of(model, input_shape)
    dense = times.dense
    of_layers, of_units = _open(model, openness)  # behind the run, which makes sharded parameters anew
    counts = [n * open_heads(gates, space, openness) for (gates, space), n in times.heads.items()]
    for (layer, name), n in times.of.items():
        parameter = getattr(layer, name)
        found = of_layers.get((layer, name), of_units.get(parameter))
        if found is None:
            dense += n * parameter.numel()
        else:
            counts.append(n * found)
    return _total(counts, dense)


def _check(model: nn.Module) -> None:
    gate_modules(model)  # refuses what torch would not call
    check_none_flat(model)


def _open(
    model: nn.Module, openness: Openness
) -> tuple[dict[tuple[nn.Module, str], Tensor], dict[nn.Parameter, Tensor]]:
    """How many elements are open: of weight and bias of each layer that containers know, and of each
    parameter with units of a model that gate_ has gated."""
    openness = cache(openness)
    of_layers = {
        (layer, name): count
        for layer, sides in _products(model).items()
        for name, count in _count(sides, openness).items()
    }
    return of_layers, open_counts(model, openness)


class _Sides(NamedTuple):
    """A linear layer, a convolution or a batch norm, and the gates on its two sides, see `Step`.

    halves: whether out_gates stand for both halves of the outputs: the two arguments of a gated product.
    """

    layer: nn.Module
    in_gates: GateModules
    out_gates: GateModules
    halves: bool = False


def _products(model: nn.Module) -> dict[nn.Module, _Sides]:
    """Each layer once, with the gates around it where it is met first."""
    return _products_of(walk(model))


def _products_of(steps: Sequence[Step]) -> dict[nn.Module, _Sides]:
    found: dict[nn.Module, _Sides] = {}
    for step in steps:
        if step.is_layer:
            found.setdefault(step.module, _Sides(step.module, step.in_gates, step.out_gates))
    for step in steps:
        module = step.module
        if is_feed_forward(module):
            gates = (module.hidden_gate,)
            halves = units_out(module.up) > module.d_hidden
            inside = _Sides(module.up, (), gates, halves), _Sides(module.down, gates, ())
            found = {sides.layer: sides for sides in inside} | found
        elif is_residual(module):
            for branch in step.branches:
                found = _products_of(branch) | found
        elif module not in found:
            for child in module.children():
                found = _products(child) | found
    return found


def _count(sides: _Sides, openness: Openness) -> dict[str, Tensor]:
    """How many elements of a layer's weight and bias are open."""
    layer: Any = sides.layer
    gates = dict.fromkeys(sides.in_gates + sides.out_gates)
    starts = dict(zip(gates, accumulate((gate.n for gate in gates), initial=0), strict=False))
    parts = [openness(gate) for gate in gates]
    p = with_one(parts or [torch.ones(0, device=next((t.device for t in layer.parameters()), None))])

    def labels(gates: GateModules, n: int, halves: bool = False) -> list[Tensor]:
        each = [starts[gate] + gate_of(gate.n, n, halves).to(p.device) for gate in gates]
        return each or [torch.full((n,), len(p) - 1, device=p.device)]

    rows = labels(sides.out_gates, units_out(layer), sides.halves)
    biases = open_entries(p, rows).sum()
    if is_norm(layer):
        weights = biases
    else:
        cols = labels(sides.in_gates, units_in(layer))
        groups, taps = (1, 1) if is_linear(layer) else (layer.groups, layer.weight.shape[2:].numel())
        own = _own(layer, openness)
        meet = not set(sides.in_gates).isdisjoint(sides.out_gates)
        met = meeting(rows, cols) if meet else None
        weights = open_pairs(p, rows, cols, met, groups, own) * (taps if own is None else 1)
    found = {"weight": weights, "bias": biases}
    return {name: count for name, count in found.items() if getattr(layer, name) is not None}


def _own(layer: Any, openness: Openness) -> Tensor | None:
    """(out, in): how many of the weights between two units are open, as far as gates per weight decide."""
    if isinstance(layer, L0Linear) and layer.weight_gate is not None:
        return layer.spread(openness(layer.weight_gate))
    if not isinstance(layer, GatedConv) or layer.weight_gate is None:
        return None
    each = openness(layer.weight_gate).flatten(2).sum(2)
    blocks = each.view(layer.groups, -1, each.shape[1])
    return torch.block_diag(*(blocks.mT if layer.transposed else blocks))


def _total(counts: Sequence[Tensor], rest: float) -> Tensor:
    device = counts[0].device if counts else None
    return sum(counts, torch.tensor(float(rest), dtype=torch.float64, device=device))
