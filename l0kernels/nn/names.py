"""What the gates of a model are called, and which layers they gate."""

from torch import nn

from .gate import HardConcreteGate, gate_modules
from .units.place import GateGroups


def gate_names(model: nn.Module) -> dict[HardConcreteGate, str]:
    """The name of each gate among ``model.named_modules()``, or of its group where gate_ has made it."""
    names: dict[HardConcreteGate, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, GateGroups):
            host = path.rpartition(".")[0]
            names.update(
                (gate, _joined(host, group.name))
                for gate, group in zip(module.gates, module.groups, strict=True)
            )
        elif isinstance(module, HardConcreteGate):
            names.setdefault(module, path or type(module).__name__)
    return {gate: names[gate] for gate in gate_modules(model)}


def layer_names(model: nn.Module) -> dict[HardConcreteGate, list[str]]:
    """The names of the modules that hold each gate, or of the layers of its group."""
    names: dict[HardConcreteGate, list[str]] = {gate: [] for gate in gate_modules(model)}
    for path, module in model.named_modules():
        if isinstance(module, GateGroups):
            host = path.rpartition(".")[0]
            for gate, group in zip(module.gates, module.groups, strict=True):
                if gate in names:
                    names[gate] = [_joined(host, layer) for layer in group.layers]
            continue
        for child in module.children():
            if isinstance(child, HardConcreteGate) and child in names:
                names[child].append(path or type(module).__name__)
    return names


def _joined(host: str, name: str) -> str:
    return f"{host}.{name}" if host and name else host or name
