"""How many parameters and FLOPs a gated model has: expected over the draws, or under its evaluation gates."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .chain import (
    NOTHING,
    Product,
    flatten,
    inside,
    is_container,
    is_feed_forward,
    is_product,
    link,
    union,
)
from .gate import HardConcreteGate, gate_modules
from .linear import L0Linear
from .mlp import L0MLP
from .penalty import weight_parameters
from .ranks import check_none_flat, is_called_alone
from .sequential import Value, follow, is_residual
from .steps import is_linear, is_norm, units_in, units_out

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Openness = Callable[[HardConcreteGate], Tensor]


def open_units(model: nn.Module) -> list[int]:
    """Open gates of each gate vector under its evaluation gate, in the order of :func:`gate_modules`."""
    return [int(gate.eval_gates().count[0]) for gate in gate_modules(model)]


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
    convolution with one gate on both sides, it counts p, not p^2.

    Returns:
        A float64 scalar, differentiable in log_alpha (for a constraint on the size, say).
    """
    return _l0(model, _p_open)


def eval_l0(model: nn.Module) -> int:
    """The same count under the evaluation gates: the parameters that are not closed in ``model.eval()``."""
    with torch.no_grad():
        return round(_l0(model, _is_open).item())


def expected_flops(model: nn.Module, input_shape: Sequence[int] | None = None) -> Tensor:
    r"""E[FLOPs] of a forward: 2 k (sum p_in)(sum p_out) + sum p_out for the bias, per row or output position.

    The units are those of :func:`expected_l0`; positions that read padding count like others. Linear layers
    and convolutions count (weight gates as if each could be skipped); activations, normalisations and
    attention products do not.

    Args:
        model: any module.
        input_shape: of the whole input, the batch included: (1, 784) gives the FLOPs of one example. The
            model is run on zeros of this shape, in eval mode, to see how many rows or positions reach each
            layer. None: one row for every linear layer, without a run.

    Returns:
        A float64 scalar, differentiable in log_alpha.

    Raises:
        ValueError: input_shape is None for a model with convolutions, whose FLOPs depend on it.
    """
    return _flops(model, input_shape, _p_open)


def eval_flops(model: nn.Module, input_shape: Sequence[int] | None = None) -> int:
    """The same count under the evaluation gates: what ``export(model)`` spends, weight gates apart."""
    with torch.no_grad():
        return round(_flops(model, input_shape, _is_open).item())


def _p_open(gate: HardConcreteGate) -> Tensor:
    return gate.dist.p_open(gate.whole()).double()


def _is_open(gate: HardConcreteGate) -> Tensor:
    return (gate.eval_gates().z != 0).double().reshape(gate.log_alpha.shape)


def _l0(model: nn.Module, openness: Openness) -> Tensor:
    check_none_flat(model)
    products = _products(model)
    counted = {part for layer in products for part in layer.modules()}
    counts = [_count(product, openness) for product in products.values()]
    rest = {
        parameter: parameter.numel()
        for module in model.modules()
        if module not in counted and not isinstance(module, HardConcreteGate)
        for parameter in module.parameters(recurse=False)
    }
    return _total([weights + biases for weights, biases in counts], sum(rest.values()))


def _flops(model: nn.Module, input_shape: Sequence[int] | None, openness: Openness) -> Tensor:
    check_none_flat(model)
    products = _products(model)
    rows, dense = _rows(model, input_shape)
    counts = []
    for layer, product in products.items():
        if is_product(layer):
            weights, biases = _count(product, openness)
            counts.append(rows[layer] * (2 * weights + biases))
    return _total(counts, dense)


def _products(model: nn.Module, gated: bool = False, value: Value = NOTHING) -> dict[nn.Module, Product]:
    """Each layer once, with the gates around it where it is met first."""
    found: dict[nn.Module, Product] = {}
    steps = flatten(model, gated)
    for product in link(steps, value):
        found.setdefault(product.layer, product)
    for step, before in zip(steps, follow(steps, value), strict=False):
        module = step.module
        if is_feed_forward(module):
            found = {product.layer: product for product in inside(module)} | found
        elif is_residual(module):
            for branch in (module.body, module.shortcut):
                if branch is not None:
                    found = _products(branch, True, before) | found
        elif module not in found:
            for child in module.children():
                found = _products(child) | found
    return found


def _count(product: Product, openness: Openness) -> tuple[Tensor, Tensor]:
    """Open weights and open biases of one layer."""
    layer: Any = product.layer
    n_in, n_out = units_in(layer), units_out(layer)
    cols = _units(product.in_gates, layer, n_in, openness)
    rows = _units(product.out_gates, layer, n_out, openness, product.halves)
    if is_norm(layer):
        return rows.sum() * (layer.weight is not None), rows.sum() * (layer.bias is not None)
    own = None
    groups, taps = (1, 1) if is_linear(layer) else (layer.groups, layer.weight.shape[2:].numel())
    if isinstance(layer, L0Linear) and layer.weight_gate is not None:
        own = layer.spread(openness(layer.weight_gate))
        weights = rows @ own @ cols
    else:
        weights = taps * rows.view(groups, -1).sum(1).dot(cols.view(groups, -1).sum(1))
    if n_in == n_out and not set(product.in_gates).isdisjoint(product.out_gates):
        gates = union(product.in_gates, product.out_gates)
        meeting = taps * (_units(gates, layer, n_in, openness) - rows * cols)
        weights = weights + (meeting if own is None else meeting * own.diagonal()).sum()
    return weights, rows.sum() * (layer.bias is not None)


def _units(
    gates: Sequence[HardConcreteGate], layer: Any, n: int, openness: Openness, halves: bool = False
) -> Tensor:
    """(n,) float64: how open each unit is that all of `gates` close; Product says which gates close which."""
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


def _rows(model: nn.Module, input_shape: Sequence[int] | None) -> tuple[Counter[nn.Module], int]:
    """How many rows or positions reach each layer, and the FLOPs of the other convolutions."""
    rows: Counter[nn.Module] = Counter()
    modules = list(model.modules())
    products = [module for module in modules if is_product(module)]
    convolutions = [module for module in modules if isinstance(module, CONVOLUTIONS)]
    if input_shape is None:
        if convolutions:
            raise ValueError(f"input_shape must be given for a model with convolutions: {convolutions[0]}")
        rows.update(products)
    if input_shape is None or not (products or convolutions):
        return rows, 0

    dense = 0

    def see_product(layer: Any, _: Any, y: Tensor) -> None:
        rows[layer] += y.numel() // units_out(layer)

    def see_mlp(mlp: Any, _: Any, y: Tensor) -> None:
        for layer in mlp.layers:
            rows[layer] += y.numel() // y.shape[-1]

    def see_feed_forward(block: Any, _: Any, y: Tensor) -> None:
        for layer in (block.up, block.down):
            rows[layer] += y.numel() // y.shape[-1]

    def see_convolution(layer: Any, _: Any, y: Tensor) -> None:
        nonlocal dense
        dense += y.numel() * (2 * layer.weight[0].numel() + (layer.bias is not None))

    mlps = [module for module in modules if isinstance(module, L0MLP) and is_container(module)]
    mlps = [mlp for mlp in mlps if not any(is_called_alone(m) for m in mlp.modules() if m is not mlp)]
    hooks = [module.register_forward_hook(see_product) for module in products]
    hooks += [module.register_forward_hook(see_mlp) for module in mlps]
    blocks = [module for module in modules if is_feed_forward(module)]
    blocks = [block for block in blocks if not any(map(is_called_alone, (block.up, block.down)))]
    hooks += [module.register_forward_hook(see_feed_forward) for module in blocks]
    others = [module for module in convolutions if not is_product(module)]
    hooks += [module.register_forward_hook(see_convolution) for module in others]
    modes = [module.training for module in modules]
    like = weight_parameters(model)[0]
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(tuple(input_shape), dtype=like.dtype, device=like.device))
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for hook in hooks:
            hook.remove()
    return rows, dense
