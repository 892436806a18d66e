"""How layers hang together: which gates close the inputs and the outputs of each linear layer.

In ``nn.Sequential`` and :class:`L0MLP`, however nested, an output unit of one linear layer is an input unit
of the next if only pointwise modules stand between them. A closed input makes the unit useless to the layer
before. A closed output is zero, and stays so through activations with act(0) = 0: the layer behind can drop
that input. Everything else (another module, the end of the container) is a border, behind which every unit
counts. An :class:`L0FeedForward` is a border, too; inside, its gate stands between its two layers.
"""

from dataclasses import dataclass, replace
from typing import TypeGuard

from torch import nn

from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .linear import L0Linear
from .mlp import ACTIVATIONS, L0MLP

ZERO_KEEPING = {
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
}
POINTWISE = ZERO_KEEPING | {nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Sigmoid, nn.Softplus, nn.Threshold}


@dataclass(frozen=True)
class Product:
    """A linear layer and the distinct gates that stand on its two sides.

    Attributes:
        layer: an L0Linear, or an nn.Linear without gates of its own.
        step: its position in the flattened container.
        in_gates: gates that close its inputs, its own and those of the layer before.
        out_gates: gates that close its outputs, its own and those of the layer behind.
        follows, leads: whether a layer of the chain stands directly before, behind.
    """

    layer: nn.Linear
    step: int
    in_gates: tuple[HardConcreteGate, ...]
    out_gates: tuple[HardConcreteGate, ...]
    follows: bool
    leads: bool


def is_container(module: nn.Module) -> TypeGuard[nn.Sequential | L0MLP]:
    """Whether the data flow through `module` is known: its flattened steps, one after the other."""
    return type(module).forward in (nn.Sequential.forward, L0MLP.forward)


def is_product(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes as nn.Linear or L0Linear; a subclass with a forward of its own may not."""
    return type(module).forward in (nn.Linear.forward, L0Linear.forward)


def is_feed_forward(module: nn.Module) -> TypeGuard[L0FeedForward]:
    """Whether `module` computes as L0FeedForward."""
    return type(module).forward is L0FeedForward.forward


def inside(block: L0FeedForward) -> list[Product]:
    """The two layers of a feed-forward block; of a gated product the gate meets every row of up twice."""
    gates = (block.hidden_gate,)
    return [
        Product(block.up, 0, (), gates, follows=False, leads=True),
        Product(block.down, 1, gates, (), follows=True, leads=False),
    ]


def flatten(module: nn.Module) -> list[nn.Module]:
    """The steps of a container, containers in it flattened; any other module is one step."""
    if not is_container(module):
        return [module]
    if isinstance(module, L0MLP):
        activation = ACTIVATIONS[module.activation]
        return [step for layer in module.layers for step in (layer, activation())][:-1]
    # Not children(), which leaves out a module that stands there a second time.
    return [step for child in module for step in flatten(child)]


def link(steps: list[nn.Module]) -> list[Product]:
    """The linear layers among `steps` and the gates around each."""
    products: list[Product] = []
    for step, module in enumerate(steps):
        if not is_product(module):
            continue
        own_in, own_out = own_gates(module, "in_gate"), own_gates(module, "out_gate")
        product = Product(module, step, own_in, own_out, follows=False, leads=False)
        if products:
            before = products[-1]
            between = {type(other) for other in steps[before.step + 1 : step]}
            if between <= POINTWISE:
                products[-1] = replace(before, out_gates=union(before.out_gates, own_in), leads=True)
                closed = before.out_gates if between <= ZERO_KEEPING else ()
                product = replace(product, in_gates=union(closed, own_in), follows=True)
        products.append(product)
    return products


def own_gates(layer: nn.Module, side: str) -> tuple[HardConcreteGate, ...]:
    """The gate that `layer` has as in_gate or out_gate, if any."""
    gate = getattr(layer, side) if isinstance(layer, L0Linear) else None
    return () if gate is None else (gate,)


def union(a: tuple[HardConcreteGate, ...], b: tuple[HardConcreteGate, ...]) -> tuple[HardConcreteGate, ...]:
    """The distinct gates of both, in order."""
    return tuple(dict.fromkeys(a + b))
