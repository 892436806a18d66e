"""How layers hang together: which gates close the inputs and the outputs of each layer.

In ``nn.Sequential``, :class:`L0MLP` and :class:`L0Sequential`, however nested, an output unit (a channel, of
a convolution) of one layer is an input unit of the next if only modules stand between them that treat units
one by one. A closed input makes the unit useless to the layer before. A closed output is zero, and stays so
through modules with f(0) = 0: the layer behind can drop that input. Behind ``nn.Flatten`` a channel is as
many features as it has positions. A batch norm treats channels one by one, but of zeros it makes its bias:
only an :class:`L0BatchNorm2d` in an :class:`L0Sequential` knows which channels are closed, and keeps them so.
Everything else (another module, the two ends of an :class:`L0Residual`, the end of the container) is a
border, behind which every unit counts. An :class:`L0FeedForward` is a border, too; inside, its gate stands
between its two layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

from torch import nn

from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .mlp import ACTIVATIONS, L0MLP
from .sequential import Step, Value, follow, is_sequential, steps_of
from .steps import (
    behind_flatten,
    is_conv,
    is_flatten,
    is_linear,
    is_norm,
    own_gate,
    treats_units,
    unit_dim,
    units_in,
    units_out,
)

NOTHING = Value()
Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Gates = tuple[HardConcreteGate, ...]


@dataclass(frozen=True)
class Product:
    """A linear layer, a convolution or, between two convolutions, a batch norm, and the gates on its two
    sides.

    Attributes:
        layer: with gates of its own, or without.
        step: its position in the flattened container.
        in_gates: gates that close its inputs, its own and those of the layer before. A gate that has fewer
            gates than there are inputs closes several at a time: those of a channel behind nn.Flatten.
        out_gates: gates that close its outputs, its own and those of the layer behind. A gate that has more
            gates than there are outputs closes one where all of its features are closed.
        follows, leads: whether a layer of the chain stands directly before, behind.
        halves: whether out_gates stand for both halves of the outputs: the two arguments of a gated product.
    """

    layer: nn.Module
    step: int
    in_gates: Gates
    out_gates: Gates
    follows: bool
    leads: bool
    halves: bool = False


def is_container(module: nn.Module) -> TypeGuard[nn.Sequential | L0MLP]:
    """Whether the data flow through `module` is known: its flattened steps, one after the other."""
    return is_sequential(module) or type(module).forward is L0MLP.forward


def is_product(module: nn.Module) -> TypeGuard[Layer]:
    """Whether `module` computes as a linear layer or convolution of torch.nn or of this package."""
    return is_linear(module) or is_conv(module)


def is_feed_forward(module: nn.Module) -> TypeGuard[L0FeedForward]:
    """Whether `module` computes as L0FeedForward."""
    return type(module).forward is L0FeedForward.forward


def inside(block: L0FeedForward) -> list[Product]:
    """The two layers of a feed-forward block; of a gated product the gate meets every row of up twice."""
    gates = (block.hidden_gate,)
    return [
        Product(block.up, 0, (), gates, follows=False, leads=True, halves=True),
        Product(block.down, 1, gates, (), follows=True, leads=False),
    ]


def flatten(module: nn.Module | None, gated: bool = False) -> list[Step]:
    """The steps of a container, containers in it flattened; any other module is one step."""
    steps: list[Step] = []
    for step in steps_of(module, gated):
        if type(step.module).forward is L0MLP.forward:
            mlp = cast(L0MLP, step.module)
            activation = ACTIVATIONS[mlp.activation]
            inner = [part for layer in mlp.layers for part in (layer, activation())][:-1]
            steps += [Step(part, step.gated) for part in inner]
        else:
            steps.append(step)
    return steps


def link(steps: Sequence[Step], value: Value = NOTHING) -> list[Product]:
    """The layers among `steps` and the gates around each, for an input of which `value` is known."""
    products: list[Product] = []
    border = -1
    for at, (step, before) in enumerate(zip(steps, follow(steps, value), strict=False)):
        module = step.module
        if is_product(module) or is_norm(module):
            follows = bool(products) and border < products[-1].step and before.dim == unit_dim(module)
            if follows:
                behind = products[-1].step + 1
                flat = any(is_flatten(other.module) for other in steps[behind:at])
                follows = _fits(products[-1].layer, module, flat)
            if follows:
                products[-1] = replace(products[-1], leads=True)
            closed = before.closed if step.keeps_closed or not is_norm(module) else ()
            in_gates = union(closed, own_gates(module, "in_gate"))
            products.append(
                Product(module, at, in_gates, own_gates(module, "out_gate"), follows=follows, leads=False)
            )
        elif is_flatten(module):
            border = at if behind_flatten(before.dim, before.ndim) is None else border
        elif not treats_units(module, before.dim):
            border = at
    # Backwards: what a layer does not read, the one before need not write.
    for i in range(len(products) - 1, -1, -1):
        product, wanted = products[i], NOTHING.closed
        if product.leads:
            reader = products[i + 1]
            wanted = reader.in_gates if is_norm(reader.layer) else own_gates(reader.layer, "in_gate")
        if is_norm(product.layer):  # it computes what it is asked for, of what is open
            wanted = union(product.in_gates, wanted)
            product = replace(product, in_gates=wanted)
        products[i] = replace(product, out_gates=union(product.out_gates, wanted))
    return products


def _fits(before: nn.Module, layer: nn.Module, flat: bool) -> bool:
    """Whether the units that `before` writes are those that `layer` reads, behind nn.Flatten where `flat`."""
    n, size = units_out(before), units_in(layer)
    if is_linear(before):
        return is_linear(layer) and not flat and n == size
    return size % n == 0 if flat else not is_linear(layer) and n == size


def own_gates(layer: nn.Module, side: str) -> Gates:
    """The gate that `layer` has as in_gate or out_gate, if any."""
    gate = own_gate(layer, side)
    return () if gate is None else (gate,)


def union(a: Gates, b: Gates) -> Gates:
    """The distinct gates of both, in order."""
    return tuple(dict.fromkeys(a + b))
