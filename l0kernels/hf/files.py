"""Gates in a folder: what is gated and how in l0_config.json, log_alpha in l0_gates.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from .._gates import HardConcrete

CONFIG, GATES = "l0_config.json", "l0_gates.safetensors"
FORMAT = 1


class Saved(NamedTuple):
    """What l0_config.json says: kind, units and options of each group by its name, and units to a gate."""

    groups: dict[str, dict[str, Any]]
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
        options = {"droprate_init": own.droprate_init, "lam": own.lam, "eval_mode": own.eval_mode}
        groups[group.name] = {
            "kind": group.kind,
            "units": group.units,
            **options,
            "dist": [own.dist.beta, own.dist.gamma, own.dist.zeta],
        }
    config = {
        "format": FORMAT,
        "l0kernels": __version__,
        "model_type": model.config.model_type,
        "block": gates.block,
        "groups": groups,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pairs = zip(gates.groups, gates.gates, strict=True)
    values = {group.name: own.whole().detach().contiguous() for group, own in pairs}
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
    values = load_file(str(_there(folder, GATES)))
    for group, own in pairs:
        options, value = saved.groups[group.name], values.get(group.name)
        if value is None or value.shape != own.log_alpha.shape:
            got = "none" if value is None else tuple(value.shape)
            raise ValueError(
                f"{GATES} must have {tuple(own.log_alpha.shape)} values of {group.name!r}, got {got}"
            )
        own.eval_mode, own.lam = options["eval_mode"], options["lam"]
        own.droprate_init, own.dist = options["droprate_init"], HardConcrete(*options["dist"])
        with torch.no_grad():
            own.log_alpha.copy_(value)
    return model


def read(folder: str | Path) -> Saved:
    """l0_config.json.

    Raises:
        ValueError: it is not there, or of a newer format.
    """
    config = json.loads(_there(folder, CONFIG).read_text(encoding="utf-8"))
    if config["format"] != FORMAT:
        raise ValueError(f"{CONFIG} must be of format {FORMAT}, got {config['format']}: a newer l0kernels")
    return Saved(config["groups"], config["block"], config["model_type"])


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
