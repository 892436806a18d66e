"""Which gates of a model are open, by name."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .counts import eval_l0, expected_l0
from .gate import HardConcreteGate
from .names import named_gates
from .penalty import weight_parameters
from .units.graph import aligned


class Open(NamedTuple):
    """How many gates of a vector are open, of how many."""

    open: int
    total: int


def open_units(model: nn.Module) -> dict[str, Open]:
    """Open gates of each gate vector under its evaluation gate, and how many it has, by name.

    ::

        open_units(L0MLP([784, 300, 10]))       # {"layers.0.in_gate": (784, 784), "layers.1.in_gate": ...}

    Args:
        model: any module.

    Returns:
        name -> (open, total), in the order of :func:`gate_modules`, a shared gate once. The name is that of
        the gate among ``model.named_modules()``; in a model that :func:`gate_` has gated, that of the group
        of units in the table that gate_ returns. Gates that close blocks of units count blocks.
    """
    return {name: _open(gate) for gate, (name, _) in named_gates(model).items()}


def _open(gate: HardConcreteGate) -> Open:
    return Open(int(gate.eval_gates().count[0]), gate.n)


@dataclass(frozen=True)
class GateSummary:
    """A gate vector in a :class:`Summary`.

    Attributes:
        name: as in :func:`open_units`.
        layers: the names of the modules that it gates.
        open, total: gates open in eval(), and all.
        expected: sum of P(z > 0), how many are open on average in train().
        lam: its weight in :func:`penalty`.
    """

    name: str
    layers: tuple[str, ...]
    open: int
    total: int
    expected: float
    lam: float


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns; it prints as a table.

    Attributes:
        gates: one entry for each gate vector.
        parameters: of the model, log_alpha left out.
        open_parameters: those that are not closed in eval(), :func:`eval_l0`.
        expected_parameters: how many are not on average in train(), :func:`expected_l0`.
    """

    gates: tuple[GateSummary, ...]
    parameters: int
    open_parameters: int
    expected_parameters: float

    def __str__(self) -> str:
        rows = [("gate", "open in eval()", "expected in train()", "lam", "layers")]
        for gate in self.gates:
            layers = ", ".join(gate.layers[:4])
            layers += f" and {len(gate.layers) - 4} more" if len(gate.layers) > 4 else ""
            share = f"{gate.open:,} of {gate.total:,}"
            rows.append((gate.name, share, f"{gate.expected:,.1f}", f"{gate.lam:g}", layers))
        share = f"{self.open_parameters:,} of {self.parameters:,}"
        rows.append(("parameters", share, f"{self.expected_parameters:,.1f}", "", ""))
        return "\n".join(aligned(rows))


def summary(model: nn.Module) -> Summary:
    """What is open in a model: gate by gate, and how many parameters that leaves.

    ::

        >>> print(summary(L0MLP([64, 64, 2])))
        gate              open in eval()  expected in train()  lam  layers
        layers.0.in_gate  64 of 64        53.3                 0.1  layers.0
        layers.1.in_gate  64 of 64        53.2                 0.1  layers.1
        parameters        4,290 of 4,290  2,996.5

    Args:
        model: any module.

    Raises:
        ValueError: a NaN in a log_alpha, or a gated layer as out_proj of a ``torch.nn.MultiheadAttention``,
            which would not call it.
    """
    gates = []
    with torch.no_grad():
        for gate, (name, layers) in named_gates(model).items():
            expected = gate.dist.p_open(gate.whole()).double().sum().item()
            gates.append(GateSummary(name, tuple(layers), *_open(gate), expected, gate.lam))
        of_model = expected_l0(model).item()
    parameters = sum(parameter.numel() for parameter in weight_parameters(model))
    return Summary(tuple(gates), parameters, eval_l0(model), of_model)
