"""How many parameters and FLOPs a gated model has: expected over the draws, or under its evaluation gates."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._compat import AnyConv
from .conv import GatedConv
from .export import SlicedConv1d, SlicedConv2d
from .gate import HardConcreteGate, gate_modules
from .linear import L0Linear
from .penalty import weight_parameters
from .ranks import check_none_flat
from .steps import (
    GateModules,
    Step,
    is_feed_forward,
    is_linear,
    is_norm,
    is_product,
    is_residual,
    units_in,
    units_out,
    walk,
)
from .units.place import GatedUnits
from .units.sizes import open_counts

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


def expected_flops(model: nn.Module, input_shape: Sequence[int] | Tensor | None = None) -> Tensor:
    r"""E[FLOPs] of a forward: 2 k (sum p_in)(sum p_out) + sum p_out for the bias, per row or output position.

    The units are those of :func:`expected_l0`; positions that read padding count like others. Linear layers,
    convolutions and the projections of ``nn.MultiheadAttention`` count (weight gates as if each could be
    skipped), a transposed convolution 2 k (in) (out) / groups per input position and its bias per output;
    activations, normalisations, recurrent layers and the products within attention do not.

    Args:
        model: any module.
        input_shape: of the whole input, the batch included: (1, 784) gives the FLOPs of one example. The
            model is run on zeros of this shape, in eval mode, to see how many rows or positions reach each
            layer. A tensor is an input itself, for models that take other than floats. None: one row for
            every linear layer, without a run.

    Returns:
        A float64 scalar, differentiable in log_alpha.

    Raises:
        ValueError: input_shape is None for a model with convolutions, whose FLOPs depend on it; a gated
            layer as out_proj of a ``torch.nn.MultiheadAttention``, which would not call it.
    """
    return _flops(model, input_shape, _p_open)


def eval_flops(model: nn.Module, input_shape: Sequence[int] | Tensor | None = None) -> int:
    """The same count under the evaluation gates: of what is open, on both sides of each layer.

    ``export(model)`` spends as much where all that is closed can be left out. It spends more for weight and
    block gates, for a grouped convolution, of which whole groups stay, for a convolution that is closed
    altogether, of which one channel of zeros stays on each side, for closed units of which a plain norm
    or an activation with f(0) != 0 makes constants that the next layer reads, and for what it keeps of a
    model that :func:`gate_` has gated: one unit of a closed group, and groups that have to stay whole.
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
    gate_modules(model)  # refuses what torch would not call
    check_none_flat(model)
    products = _products(model)
    of_units = open_counts(model, openness)
    counted = {part for layer in products for part in layer.modules()}
    counts = [_count(product, openness) for product in products.values()]
    rest = {
        parameter: parameter.numel()
        for module in model.modules()
        if module not in counted and not isinstance(module, HardConcreteGate)
        for parameter in module.parameters(recurse=False)
        if parameter not in of_units
    }
    counts_of_layers = [weights + biases for weights, biases in counts]
    return _total([*counts_of_layers, *of_units.values()], sum(rest.values()))


def _flops(model: nn.Module, input_shape: Sequence[int] | Tensor | None, openness: Openness) -> Tensor:
    gate_modules(model)  # refuses what torch would not call
    check_none_flat(model)
    products = _products(model)
    rows, reads, of_names, dense = _rows(model, input_shape)
    # By name: a sharded parameter is another one within the forward.
    of_parameters = [(getattr(layer, name), n) for (layer, name), n in of_names.items()]
    of_units = open_counts(model, openness)
    counts = [n * of_units[parameter] for parameter, n in of_parameters if parameter in of_units]
    dense += sum(n * p.numel() for p, n in of_parameters if p not in of_units)
    for layer, product in products.items():
        if is_product(layer):
            weights, biases = _count(product, openness)
            counts.append(2 * reads[layer] * weights + rows[layer] * biases)
    return _total(counts, dense)


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
            inside = _Sides(module.up, (), gates, halves=True), _Sides(module.down, gates, ())
            found = {sides.layer: sides for sides in inside} | found
        elif is_residual(module):
            for branch in step.branches:
                found = _products_of(branch) | found
        elif module not in found:
            for child in module.children():
                found = _products(child) | found
    return found


def _count(product: _Sides, openness: Openness) -> tuple[Tensor, Tensor]:
    """Open weights and open biases of one layer."""
    layer: Any = product.layer
    n_in, n_out = units_in(layer), units_out(layer)
    cols = _units(product.in_gates, layer, n_in, openness)
    rows = _units(product.out_gates, layer, n_out, openness, product.halves)
    if is_norm(layer):
        return rows.sum() * (layer.weight is not None), rows.sum() * (layer.bias is not None)
    groups, taps = (1, 1) if is_linear(layer) else (layer.groups, layer.weight.shape[2:].numel())
    own = _own(layer, openness)
    if own is not None:
        weights, taps = rows @ own @ cols, 1
    else:
        weights = taps * rows.view(groups, -1).sum(1).dot(cols.view(groups, -1).sum(1))
    if not set(product.in_gates).isdisjoint(product.out_gates):
        at_out, at_in, difference = _meeting(product, n_in, n_out, groups, openness)
        weights = weights + taps * (difference if own is None else difference * own[at_out, at_in]).sum()
    return weights, rows.sum() * (layer.bias is not None)


def _own(layer: Any, openness: Openness) -> Tensor | None:
    """(out, in): how many of the weights between two units are open, as far as gates per weight decide."""
    if isinstance(layer, L0Linear) and layer.weight_gate is not None:
        return layer.spread(openness(layer.weight_gate))
    if not isinstance(layer, GatedConv) or layer.weight_gate is None:
        return None
    each = openness(layer.weight_gate).flatten(2).sum(2)
    blocks = each.view(layer.groups, -1, each.shape[1])
    return torch.block_diag(*(blocks.mT if layer.transposed else blocks))


def _meeting(
    product: _Sides, n_in: int, n_out: int, groups: int, openness: Openness
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs and inputs that one gate closes, pair by pair, and P(both open) - P(open) P(open) there."""
    layer, halves = product.layer, product.halves
    shared = [gate for gate in product.in_gates if gate in product.out_gates]
    device = _device(layer)
    outs, ins = torch.arange(n_out, device=device), torch.arange(n_in, device=device)
    meets = torch.zeros(n_out, n_in, dtype=torch.bool, device=device)
    for gate in shared:
        meets |= _place(gate, outs, n_out, n_out, halves)[:, None] == _place(gate, ins, n_in, n_out)
    meets &= (outs // (n_out // groups))[:, None] == ins // (n_in // groups)
    at_out, at_in = meets.nonzero(as_tuple=True)
    both = apart = torch.ones(len(at_out), dtype=torch.float64, device=device)
    for gate in dict.fromkeys(product.in_gates + product.out_gates):
        p_in = _units((gate,), layer, n_in, openness)[at_in] if gate in product.in_gates else 1.0
        p_out = _units((gate,), layer, n_out, openness, halves)[at_out] if gate in product.out_gates else 1.0
        apart = apart * p_in * p_out
        if gate in shared:  # an open input is one of those that keep the output open
            same = _place(gate, at_out, n_out, n_out, halves) == _place(gate, at_in, n_in, n_out)
            both = both * torch.where(same, p_in, p_in * p_out)
        else:
            both = both * p_in * p_out
    return at_out, at_in, both - apart


def _place(gate: HardConcreteGate, units: Tensor, n: int, n_out: int, halves: bool = False) -> Tensor:
    """Which gate closes each of some of n units; of gates that close an output together, which output."""
    if halves:
        return units % gate.n
    place = units // (n // gate.n) if gate.n <= n else units
    return place if gate.n <= n_out or n == n_out else place // (gate.n // n_out)


def _units(
    gates: Sequence[HardConcreteGate], layer: Any, n: int, openness: Openness, halves: bool = False
) -> Tensor:
    """(n,) float64: how open each unit is that all of `gates` close; Step says which gates close which."""
    units = torch.ones(n, dtype=torch.float64, device=_device(layer))
    for gate in gates:
        each = openness(gate)
        if gate.n > n:
            each = 1 - (1 - each).view(n, -1).prod(1)
        elif gate.n < n:
            each = each.repeat(n // gate.n) if halves else each.repeat_interleave(n // gate.n)
        units = units * each
    return units


def _device(layer: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in layer.parameters()), None)


def _total(counts: Sequence[Tensor], rest: int) -> Tensor:
    device = counts[0].device if counts else None
    return sum(counts, torch.tensor(float(rest), dtype=torch.float64, device=device))


def _rows(
    model: nn.Module, input_shape: Sequence[int] | Tensor | None
) -> tuple[Counter[nn.Module], Counter[nn.Module], Counter[tuple[nn.Module, str]], int]:
    """How many rows or positions each layer writes, and at how many it multiplies by its weight; the FLOPs
    for each element of parameters of layers that :func:`gate_` has gated; and the FLOPs of what no gate of
    ours can close."""
    rows: Counter[nn.Module] = Counter()
    reads: Counter[nn.Module] = Counter()
    of_names: Counter[tuple[nn.Module, str]] = Counter()
    modules = list(model.modules())
    products = [module for module in modules if is_product(module)]
    attentions = [module for module in modules if isinstance(module, nn.MultiheadAttention)]
    convolutions = [module for module in modules if isinstance(module, AnyConv)]
    convolutions = [module for module in convolutions if not isinstance(module, SlicedConv1d | SlicedConv2d)]
    by_units: list[nn.Module] = [module for module in modules if _is_product_of_units(module)]

    def count(layer: Any, n_in: int, n_out: int) -> None:
        of_names[layer, "weight"] += 2 * (n_in if isinstance(layer, TRANSPOSED) else n_out)
        if layer.bias is not None:
            of_names[layer, "bias"] += n_out

    if input_shape is None:
        if convolutions:
            raise ValueError(f"input_shape must be given for a model with convolutions: {convolutions[0]}")
        rows.update(products)
        for layer in by_units:
            count(layer, 1, 1)
        closed = sum(_of_attention(attention, (1, 1, 1, 0)) for attention in attentions)
        return rows, rows, of_names, closed
    if not (products or convolutions or attentions or by_units):
        return rows, reads, of_names, 0

    dense = 0

    def see_product(layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
        rows[layer] += y.numel() // max(units_out(layer), 1)  # an exported layer may have no outputs left
        x, n = y, units_out(layer)
        if isinstance(layer, TRANSPOSED):
            x, n = args[0] if args else kwargs.get("x", kwargs.get("input")), units_in(layer)
        reads[layer] += x.numel() // max(n, 1)

    def see_convolution(layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
        nonlocal dense
        x = args[0] if args else kwargs["input"]
        taps = layer.weight[0].numel()  # of an output's position or, in a transposed one, of an input's
        dense += 2 * taps * (x if isinstance(layer, TRANSPOSED) else y).numel()
        dense += y.numel() * (layer.bias is not None)

    def see_units(layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        count(layer, x.numel() // units_in(layer), y.numel() // units_out(layer))

    def see_attention(layer: Any, args: Any, kwargs: Any, _: Any) -> None:
        nonlocal dense
        given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
        counts = [x.numel() // x.shape[-1] for x in given]
        dense += _of_attention(layer, (*counts, counts[0]))

    hooks = [module.register_forward_hook(see_product, with_kwargs=True) for module in products]
    others = [module for module in convolutions if not is_product(module) and module not in by_units]
    hooks += [module.register_forward_hook(see_units, with_kwargs=True) for module in by_units]
    hooks += [module.register_forward_hook(see_convolution, with_kwargs=True) for module in others]
    hooks += [module.register_forward_hook(see_attention, with_kwargs=True) for module in attentions]
    modes = [module.training for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            model(_input(model, input_shape))
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for hook in hooks:
            hook.remove()
    return rows, reads, of_names, dense


def _is_product_of_units(layer: nn.Module) -> bool:
    return isinstance(layer, GatedUnits) and isinstance(layer, nn.Linear | AnyConv)


def _input(model: nn.Module, input_shape: Sequence[int] | Tensor) -> Tensor:
    if isinstance(input_shape, Tensor):
        return input_shape
    like = next((parameter for parameter in weight_parameters(model) if parameter.is_floating_point()), None)
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    return torch.zeros(tuple(input_shape), **options)


def _of_attention(attention: nn.MultiheadAttention, rows: tuple[int, int, int, int]) -> int:
    """FLOPs of the projections of query, key, value and output: of so many rows each."""
    width = attention.embed_dim
    sizes = (width, attention.kdim or width, attention.vdim or width, width)
    bias = attention.in_proj_bias is not None
    flops = sum(n * width * (2 * size + bias) for n, size in zip(rows[:3], sizes, strict=False))
    return flops + rows[3] * width * (2 * width + (attention.out_proj.bias is not None))
