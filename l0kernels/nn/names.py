"""What the gates of a model are called, and which layers they gate."""

from typing import NamedTuple

from torch import nn

from .gate import HardConcreteGate, gate_modules
from .units.place import GateGroups


class Named(NamedTuple):
    """The name of a gate among ``model.named_modules()``, or of its group where gate_ has made it, and those
    of the modules that hold it, or of the layers of its group."""

    name: str
    layers: list[str]


def named_gates(model: nn.Module) -> dict[HardConcreteGate, Named]:
    """In the order of gate_modules."""
    found: dict[HardConcreteGate, Named] = {}
    if isinstance(model, HardConcreteGate):
        found[model] = Named(type(model).__name__, [])
    for path, module in model.named_modules():
        if isinstance(module, GateGroups):
            host = path.rpartition(".")[0]
            for gate, group in zip(module.gates, module.groups, strict=True):
                found[gate] = Named(_joined(host, group.name), [_joined(host, name) for name in group.layers])
            if module.l0_layers is not None:
                pairs = zip(module.groups, module.layered, strict=True)
                names = [_joined(host, group.name) for group, at in pairs if at is not None]
                found[module.l0_layers] = Named(_joined(host, "layers"), names)
            continue
        for name, child in module.named_children():
            if isinstance(child, HardConcreteGate):
                _, layers = found.setdefault(child, Named(_joined(path, name), []))
                layers.append(path or type(module).__name__)
    return {gate: found[gate] for gate in gate_modules(model)}


def _joined(host: str, name: str) -> str:
    return f"{host}.{name}" if host and name else host or name
