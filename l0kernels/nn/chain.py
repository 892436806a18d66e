"""How layers hang together: which gates close the inputs and the outputs of each layer.

In ``nn.Sequential``, :class:`L0MLP` and :class:`L0Sequential`, however nested, an output unit (a channel, of
a convolution) of one layer is an input unit of the next if only modules stand between them that treat units
one by one. A closed input makes the unit useless to the layer before. A closed output is zero, and stays so
through modules with f(0) = 0: the layer behind can drop that input. Behind ``nn.Flatten`` a channel is as
many features as it has positions. A batch norm treats channels one by one, but of zeros it makes its bias:
only an :class:`L0BatchNorm2d` (1d, 3d) in an :class:`L0Sequential` knows which channels are closed, and keeps
them so.
It knows what its own container tells it: an L0Sequential or L0Residual in a plain ``nn.Sequential`` is called
with an input of which it knows nothing, whatever closed channels there are in it.
Everything else (another module, the two ends of an :class:`L0Residual`, the end of the container) is a
border, behind which every unit counts. An :class:`L0FeedForward` is a border, too; inside, its gate stands
between its two layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeGuard, cast

from torch import nn

from .._compat import AnyConv
from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .mlp import ACTIVATIONS, L0MLP
from .sequential import L0Sequential, Step, Value, follow, is_residual, is_sequential
from .steps import (
    FEATURES,
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

Layer = nn.Linear | AnyConv
GateModules = tuple[HardConcreteGate, ...]


class Known(NamedTuple):
    """What is known of an activation.

    Attributes:
        value: the gates whose closed units are zero in it.
        told: the same as far as the container that runs the norms here knows it.
    """

    value: Value = Value()
    told: Value = Value()


NOTHING = Known()
NO_GATES: GateModules = ()


class Part(NamedTuple):
    """A module in the flattened container, and the run of an L0Sequential or L0Residual that it is part of.

    ``scope`` is one object for all modules of such a run, None in plain containers.
    """

    module: nn.Module
    scope: object | None

    @property
    def step(self) -> Step:
        return Step(self.module, self.scope is not None)


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
        dim: where it reads and writes its units, from the end.
        zeros: of a norm: the gates whose closed channels it makes zero, in its container.
        halves: whether out_gates stand for both halves of the outputs: the two arguments of a gated product.
    """

    layer: nn.Module
    step: int
    in_gates: GateModules
    out_gates: GateModules
    follows: bool
    leads: bool
    dim: int = FEATURES
    zeros: GateModules = ()
    halves: bool = False


def is_container(module: nn.Module) -> TypeGuard[nn.Sequential | L0MLP]:
    """Whether the data flow through `module` is known: its flattened steps, one after the other."""
    return is_sequential(module) or is_mlp(module)


def is_mlp(module: nn.Module) -> TypeGuard[L0MLP]:
    """Whether `module` computes as an L0MLP of linear layers."""
    return type(module).forward is L0MLP.forward and all(map(is_linear, cast(L0MLP, module).layers))


def is_product(module: nn.Module) -> TypeGuard[Layer]:
    """Whether `module` computes as a linear layer or convolution of torch.nn or of this package."""
    return is_linear(module) or is_conv(module)


def is_feed_forward(module: nn.Module) -> TypeGuard[L0FeedForward]:
    """Whether `module` computes as an L0FeedForward of linear layers."""
    if type(module).forward is not L0FeedForward.forward:
        return False
    block = cast(L0FeedForward, module)
    return is_linear(block.up) and is_linear(block.down)


def inside(block: L0FeedForward) -> list[Product]:
    """The two layers of a feed-forward block; of a gated product the gate meets every row of up twice."""
    gates = (block.hidden_gate,)
    return [
        Product(block.up, 0, (), gates, follows=False, leads=True, halves=True),
        Product(block.down, 1, gates, (), follows=True, leads=False),
    ]


def flatten(module: nn.Module | None, scope: object | None = None) -> list[Part]:
    """The parts of a container, containers in it flattened; any other module is one part."""
    if module is None:
        return []
    if is_mlp(module):
        activation = ACTIVATIONS[module.activation]
        return [Part(part, scope) for layer in module.layers for part in (layer, activation())][:-1]
    if scope is None and (is_residual(module) or type(module).forward is L0Sequential.forward):
        scope = object()
    if not is_sequential(module):
        return [Part(module, scope)]
    # Not children(), which leaves out a module that stands there a second time.
    return [part for child in cast(nn.Sequential, module) for part in flatten(child, scope)]


def known_before(parts: Sequence[Part], known: Known = NOTHING) -> list[Known]:
    """What is known in front of each part, for an input of which `known` is."""
    found, scope = [], parts[0].scope if parts else None
    for part in parts:
        value, told = known
        if part.scope is not scope:
            scope, told = part.scope, Value(ndim=value.ndim)
        found.append(Known(value, told))
        told = follow([part.step], told)[-1]
        # Norms and sums know, of what is zero, what their container tells them.
        by_container = is_norm(part.module) or is_residual(part.module)
        known = Known(told if by_container else follow([part.step], value)[-1], told)
    return found


def link(parts: Sequence[Part], known: Known = NOTHING) -> list[Product]:
    """The layers among `parts` and the gates around each, for an input of which `known` is."""
    products: list[Product] = []
    border = -1
    for at, (part, before) in enumerate(zip(parts, known_before(parts, known), strict=True)):
        module, (value, told) = part.module, before
        if is_product(module) or is_norm(module):
            place = unit_dim(module, value.dim)
            follows = bool(products) and border < products[-1].step and value.dim == place
            if follows:
                behind = products[-1].step + 1
                flat = any(is_flatten(other.module) for other in parts[behind:at])
                follows = _fits(products[-1], module, place, flat)
            if follows:
                products[-1] = replace(products[-1], leads=True)
            zeros: GateModules = ()
            if not is_norm(module):
                closed = value.closed if value.dim == place else ()
                closed = tuple(gate for gate in closed if units_in(module) % gate.n == 0)
            else:
                keeps = part.step.keeps_closed and told.dim == unit_dim(module, told.dim)
                closed = told.closed[:1] if keeps else ()
                zeros = closed = tuple(gate for gate in closed if units_in(module) % gate.n == 0)
            in_gates = union(closed, own_gates(module, "in_gate"))
            out_gates = own_gates(module, "out_gate")
            products.append(Product(module, at, in_gates, out_gates, follows, False, place, zeros))
        elif is_flatten(module):
            border = at if behind_flatten(value.dim, value.ndim) is None else border
        elif not treats_units(module, value.dim):
            border = at
    # Backwards: what a layer does not read, the one before need not write.
    for i in range(len(products) - 1, -1, -1):
        product, wanted = products[i], NO_GATES
        if product.leads:
            reader = products[i + 1]
            wanted = reader.in_gates if is_norm(reader.layer) else own_gates(reader.layer, "in_gate")
            wanted = _fit_runs(wanted, units_out(product.layer))
        if is_norm(product.layer):  # it computes what it is asked for, of what is open
            wanted = union(product.in_gates, wanted)
            product = replace(product, in_gates=wanted)
        products[i] = replace(product, out_gates=union(product.out_gates, wanted))
    return products


def _fits(before: Product, layer: nn.Module, dim: int, flat: bool) -> bool:
    """Whether the units that `before` writes are those that `layer` reads, behind nn.Flatten where `flat`."""
    n, size = units_out(before.layer), units_in(layer)
    if flat:
        return is_linear(layer) and before.dim != FEATURES and size % n == 0
    return before.dim == dim and n == size


def _fit_runs(gates: GateModules, n: int) -> GateModules:
    """Those whose runs begin and end with units out of n; others end within a channel's features."""
    return tuple(gate for gate in gates if n % gate.n == 0 or gate.n % n == 0)


def own_gates(layer: nn.Module, side: str) -> GateModules:
    """The gate that `layer` has as in_gate or out_gate, if any."""
    gate = own_gate(layer, side)
    return () if gate is None else (gate,)


def union(a: GateModules, b: GateModules) -> GateModules:
    """The distinct gates of both, in order."""
    return tuple(dict.fromkeys(a + b))
