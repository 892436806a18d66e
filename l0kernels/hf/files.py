"""Gates in a folder: what is gated and how in l0_config.json, log_alpha in l0_gates.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from .._gates import HardConcrete
from ..nn.gate import HardConcreteGate
from ..nn.units.place import GateGroups

CONFIG, GATES = "l0_config.json", "l0_gates.safetensors"
FORMAT = 1
LAYERS = "(layers)"
"""Name of the gates of whole layers, beside those of groups."""


class Saved(NamedTuple):
    """What l0_config.json says: kind, units and options of each group by its name, of the layers' gates, and
    units to a gate."""

    groups: dict[str, dict[str, Any]]
    layers: dict[str, Any] | None
    block: int
    model_type: str


def save_gates(model: Any, folder: str | Path) -> None:
    """Writes the gates of a model into a folder, as l0_config.json and l0_gates.safetensors.

    The weights are not among them: ``save_pretrained`` writes those, and the gates a second time.

    Args:
        model: a gated ``PreTrainedModel``.
        folder: is made if it is not there.

    Raises:
        ValueError: the model is not gated.
    """
    from safetensors.torch import save_file

    from .gate import gates_of

    gates, folder = gates_of(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {}
    for group, own in zip(gates.groups, gates.gates, strict=True):
        groups[group.name] = {"kind": group.kind, "units": group.units, **_options(own)}
    config = {
        "format": FORMAT,
        "l0kernels": __version__,
        "model_type": model.config.model_type,
        "block": gates.block,
        "groups": groups,
        "layers": None if gates.l0_layers is None else _options(gates.l0_layers),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    values = {name: own.whole().detach().contiguous() for name, own in _named(gates).items()}
    save_file(values, str(folder / GATES), {"format": "pt"})


def load_gates(model: Any, folder: str | Path) -> Any:
    """Gives the gates of a gated model the values that :func:`save_gates` wrote, and their options.

    Args:
        model: is gated alike, as ``gate(model, config=folder)`` does.
        folder: of :func:`save_gates`.

    Returns:
        The model.

    Raises:
        ValueError: the folder lacks a file, is of a newer format, or of other gates (the message names them).
    """
    from safetensors.torch import load_file

    from .gate import gates_of

    saved, gates = read(folder), gates_of(model)
    pairs = list(zip(gates.groups, gates.gates, strict=True))
    check_groups(saved, {group.name: (group.kind, group.units) for group, _ in pairs})
    if saved.block != gates.block:
        raise ValueError(f"model must have gates of block={saved.block}, as {folder} has, got {gates.block}")
    if (saved.layers is None) != (gates.l0_layers is None):
        raise ValueError(f"model must have gates with layers={saved.layers is not None}, as {folder} has")
    values = load_file(str(_there(folder, GATES)))
    for name, own in _named(gates).items():
        options, value = saved.layers if name == LAYERS else saved.groups[name], values.get(name)
        assert options is not None
        if value is None or value.shape != own.log_alpha.shape:
            got = "none" if value is None else tuple(value.shape)
            raise ValueError(f"{GATES} must have {tuple(own.log_alpha.shape)} values of {name!r}, got {got}")
        own.eval_mode, own.lam = options["eval_mode"], options["lam"]
        own.droprate_init, own.dist = options["droprate_init"], HardConcrete(*options["dist"])
        with torch.no_grad():
            own.log_alpha.copy_(value)
    return model


def _options(gate: HardConcreteGate) -> dict[str, Any]:
    dist = [gate.dist.beta, gate.dist.gamma, gate.dist.zeta]
    options = {"droprate_init": gate.droprate_init, "lam": gate.lam, "eval_mode": gate.eval_mode}
    return {**options, "dist": dist, "frozen": gate.frozen}


def _named(gates: GateGroups) -> dict[str, HardConcreteGate]:
    """All gates by the names of their groups, the layers' as LAYERS."""
    named = {group.name: own for group, own in zip(gates.groups, gates.gates, strict=True)}
    return named if gates.l0_layers is None else {**named, LAYERS: gates.l0_layers}


def read(folder: str | Path) -> Saved:
    """l0_config.json.

    Raises:
        ValueError: it is not there, or of a newer format.
    """
    config = json.loads(_there(folder, CONFIG).read_text(encoding="utf-8"))
    if config["format"] != FORMAT:
        raise ValueError(f"{CONFIG} must be of format {FORMAT}, got {config['format']}: a newer l0kernels")
    return Saved(config["groups"], config["layers"], config["block"], config["model_type"])


def check_groups(saved: Saved, found: Mapping[str, tuple[str, int]], subset: bool = False) -> None:
    """ValueError where the groups of a file are not those of a model, or not among them with `subset`."""
    for name, of in saved.groups.items():
        if name not in found:
            raise ValueError(
                f"model must have the {of['kind']} {name!r}, which the gates are of (of model type "
                f"{saved.model_type!r}), got {list(found)}"
            )
        if found[name] != (of["kind"], of["units"]):
            kind, n = found[name]
            raise ValueError(f"model must have {of['units']} {of['kind']} in {name!r}, got {n} {kind}")
    more = [name for name in found if name not in saved.groups]
    if more and not subset:
        raise ValueError(f"model must have no gates but {list(saved.groups)}, got those of {more}, too")


def _there(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"folder must hold {name}, which save_gates writes, got {str(folder)!r} without")
    return path
