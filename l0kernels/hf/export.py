"""Gated models of transformers without their gates, and with a config that says so."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..nn.cut import cut_gates, set_gates_
from ..nn.export import export as export_layers
from ..nn.gate import HardConcreteGate
from ..nn.shares import Wish
from ..nn.units.graph import Group
from ..nn.units.place import tensors_of
from . import modeling_l0 as sized_models
from .gate import gates_of
from .known import make_known

UNITS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff")
"""What configs call the number of units of a feed-forward."""


def export(
    model: Any,
    keep: float | Mapping[str, float] | None = None,
    uniform: bool = False,
    multiple_of: int = 1,
    *,
    cost: Any = "params",
    input_shape: Any = None,
) -> Any:
    """A smaller model of transformers without gates: :func:`l0kernels.nn.export`, and a config to load it by.

    Layers keep the units that are open, each layer its own number. The result is then of a class derived from
    the model's (``L0BertModel``, a ``BertModel``), whose config holds the sizes: ``save_pretrained`` writes
    them with a file of Python, and :func:`from_pretrained` has them. Where nothing differs from what the
    model's own config can say, it is of the model's own class.

    Args:
        model: gated by :func:`gate`; it is not changed, and nothing is shared with it.
        keep: the share of `cost` that is to be left, or one for each kind, ``{"heads": .5, "units": .4}``,
            see :func:`l0kernels.nn.export`. None: what the evaluation gates leave.
        uniform: all layers keep as many heads and as many units as the layer that keeps most, filled up with
            zeros; with `keep`, the same share of each. The result is of the model's own class with its own
            config, which other programs load.
        multiple_of: of feed-forwards: each keeps a multiple of so many units, or all.
        cost, input_shape: as of :func:`l0kernels.nn.export`. ``input_shape`` may hold inputs by their names.

    Returns:
        The smaller model, in eval mode.

    Raises:
        ValueError: the model is not gated, `keep` is out of reach, or `uniform` asks for what the model's
            config cannot say (the message says what), or its class is none of transformers'.
    """
    gates = gates_of(model)
    stock = stock_class(model)
    if not uniform:
        small = export_layers(model, keep=keep, multiple_of=multiple_of, cost=cost, input_shape=input_shape)
        return with_sizes(small, stock, gates.groups)
    wish = None if keep is None else Wish(keep, cost, input_shape)
    return _uniform(model, stock, wish, multiple_of)


def stock_class(model: Any) -> Any:
    """The class of transformers that a model is of.

    Raises:
        ValueError: it is of another one.
    """
    cls = type(model)
    if issubclass(cls, sized_models.SizedModel):
        cls = _behind(cls, sized_models.SizedModel)
    if getattr(transformers, cls.__name__, None) is not cls:
        raise ValueError(
            f"model must be of a class of transformers, got {cls.__name__}, which no config can name: "
            "l0kernels.nn.export makes its layers smaller"
        )
    return cls


# ---- each layer with a size of its own


def with_sizes(small: Any, stock: Any, groups: Sequence[Group]) -> Any:
    """`small`, an exported model of the class `stock`, as one whose config holds its sizes."""
    config = stock_config(small.config)
    sizes = sized_models.sizes_of(small, built(stock, config))
    if not sizes:
        return _become(small, stock, config)
    layers = _per_layer(small, config, groups)
    config.auto_map = sized_models.auto_map(type(config))
    config.l0 = {"format": sized_models.FORMAT, **sizes}
    config.__class__ = sized_models.sized(type(config))
    if layers:
        config.per_layer_config = layers
    return _become(small, sized_models.sized(stock), config)


def stock_config(config: Any) -> Any:
    """A copy of a config as transformers has it, without sizes."""
    config = copy.deepcopy(config)
    if isinstance(config, sized_models.SizedConfig):
        config.__class__ = _behind(type(config), sized_models.SizedConfig)
        for name in ("l0", "auto_map", "_heterogeneity_spec"):
            config.__dict__.pop(name, None)
    return config


def _behind(cls: type, mixin: type) -> type:
    """The class of transformers that one with a mixin of ours is of."""
    return cls.__mro__[cls.__mro__.index(mixin) + 1]


def built(stock: Any, config: Any) -> Any:
    """What a class makes of a config, without memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return stock(copy.deepcopy(config))


def _become(model: Any, cls: type, config: Any) -> Any:
    """`model` as one of a class, with a config in each part that had its."""
    old, last = model.config, model.get_output_embeddings()
    if last is not None and last.weight is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = False  # one of two was multiplied by z: a file must hold both
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = config
    model.__class__ = cls
    return model


def _per_layer(small: nn.Module, config: Any, groups: Sequence[Group]) -> dict[int, dict[str, int]]:
    """What `per_layer_config` of transformers says of the layers of an exported model; caches read it.

    Empty where this version has none, and where encoder and decoder count their layers apart.
    """
    if not hasattr(type(config), "per_layer_config") or getattr(config, "is_encoder_decoder", False):
        return {}
    tensors = tensors_of(small)
    found: dict[int, dict[str, int]] = {}
    for group in groups:
        member = next((m for m in group.members if m.role == "out"), None)
        if member is None or group.kind == "width":
            continue
        left = tensors[member.name].shape[member.dim] // member.index.shape[1]
        for layer in {layer for name in group.makers if (layer := _layer_of(name)) is not None}:
            found.setdefault(layer, {}).update(_in_config(config, group, left))
    if any(group.kind == "heads" for group in groups) and not hasattr(config, "head_dim"):
        config.head_dim = config.hidden_size // config.num_attention_heads
    return found


def _layer_of(name: str) -> int | None:
    found = re.search(r"(?<=\.)\d+(?=\.)", f".{name}.")
    return None if found is None else int(found[0])


def _in_config(config: Any, group: Group, left: int) -> dict[str, int]:
    """What a config says if so many units of a group are left."""
    if group.kind == "units":
        name = next((name for name in UNITS if hasattr(config, name)), None)
        return {} if name is None else {name: left}
    found = {}
    for name in ("num_attention_heads", "num_key_value_heads"):
        whole = getattr(config, name, None)
        if whole is not None and whole % group.units == 0:
            found[config.attribute_map.get(name, name)] = whole // group.units * left
    return found


# ---- all layers alike


def _uniform(model: Any, stock: Any, wish: Wish | None, multiple_of: int) -> Any:
    gates, z = gates_of(model), _values(model, wish, multiple_of)
    most: dict[str, int] = {}
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        n, block = max(int((z[gate] != 0).sum()), 1), gates.block_of(group)
        if group.kind == "units":
            n = -(-n * block // multiple_of) * multiple_of // block
        most[group.kind] = max(most.get(group.kind, 0), n)
    whole = copy.deepcopy(model)
    for part in whole.modules():
        if isinstance(part, HardConcreteGate) and part.frozen:  # their layers' gates are theirs now
            value = part.log_alpha
            del part._buffers["log_alpha"]
            part.frozen, part.log_alpha = False, nn.Parameter(value)
    tensors = tensors_of(whole)
    config = stock_config(model.config)
    said: dict[str, int] = {}
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        if group.kind == "width":
            continue
        n, block = min(most[group.kind], gate.n), gates.block_of(group)
        likely = gate.whole().detach().flatten().cpu().double().masked_fill(z[gate] != 0, torch.inf)
        order = likely.argsort(descending=True, stable=True)[:n]
        filled = order[z[gate][order] == 0]
        z[gate] = z[gate].index_fill(0, filled, 1)
        _zero(tensors, group, filled, block)
        said |= _in_config(config, group, min(n * block, group.units))
    with torch.no_grad():  # the gates of a copy come in the order of their model's
        set_gates_(whole, [value.to(gates.gates[0].log_alpha.device) for value in z.values()])
    said = {name: n for name, n in said.items() if n != getattr(config, name)}
    return _said(export_layers(whole), stock, config, said)


def _values(model: Any, wish: Wish | None, multiple_of: int) -> dict[HardConcreteGate, Tensor]:
    """z of all gates of a model, in order, those of layers taken into their groups."""
    gates = gates_of(model)
    cut = {} if wish is None else cut_gates(model, wish, multiple_of, evenly=True)
    own = [*gates.gates, *([] if gates.l0_layers is None else [gates.l0_layers])]
    found = [cut.get(gate, gate.eval_gates().z.detach()).cpu() for gate in own]
    if gates.l0_layers is not None:
        found = [*gates.closed_by_layers(found[:-1], found[-1]), torch.ones_like(found[-1])]
    return dict(zip(own, found, strict=True))


def _zero(tensors: Mapping[str, Tensor], group: Group, closed: Tensor, block: int) -> None:
    """Has closed gates of a group be zero in the columns that read their units."""
    units = [
        int(unit) for gate in closed for unit in range(gate * block, min((gate + 1) * block, group.units))
    ]
    for member in group.members:
        if member.role == "in" and units:
            tensor = tensors[member.name].detach()
            tensor.index_fill_(member.dim, member.index[units].flatten().to(tensor.device), 0)


def _said(small: Any, stock: Any, config: Any, said: Mapping[str, int]) -> Any:
    """`small` with a config that has these numbers, and says all of its sizes."""
    has_heads = any(name not in UNITS for name in said)
    head_dim = {"head_dim": config.hidden_size // config.num_attention_heads} if has_heads else {}
    failed = ""
    for values in (said, {**head_dim, **said}):
        trial = copy.deepcopy(config)
        try:
            for name, n in values.items():
                setattr(trial, name, n)
            type(trial).from_dict(trial.to_dict())  # as a file is read, with all checks
            like = built(stock, trial)
        except Exception as error:  # a size that this architecture refuses
            failed = failed or str(error)
            continue
        differs = sized_models.sizes_of(small, like)
        if not differs or not differs["shapes"]:
            for name, attributes in (differs or {"attributes": {}})["attributes"].items():
                for key in attributes:
                    setattr(small.get_submodule(name), key, getattr(like.get_submodule(name), key))
            return _become(small, stock, trial)
        name, shape = next(iter(differs["shapes"].items()))
        failed = failed or f"{name} would be {list(like.state_dict()[name].shape)}, not {shape}"
    told = ", ".join(f"{name}={n}" for name, n in said.items())
    raise ValueError(
        f"uniform must leave sizes that {type(config).__name__} can say, got {told}: {failed}. Leave uniform "
        "out, or gate with heads=False where the size of a head follows from the number of heads"
    )


# ---- loading


def from_pretrained(folder: str | Path, **options: Any) -> Any:
    """Loads what :func:`export` made and ``save_pretrained`` wrote, as the class that was saved.

    ``AutoModel.from_pretrained(folder)`` and its kin load it, too, once l0kernels.hf is imported, or with
    ``trust_remote_code=True`` where l0kernels is not installed. Classes of transformers themselves,
    ``BertModel.from_pretrained(folder)``, refuse it.

    Args:
        folder: with the model, or its name on a hub.
        **options: of transformers' ``from_pretrained``.

    Raises:
        ValueError: the config there names no class.
    """
    config, _ = transformers.PretrainedConfig.get_config_dict(str(folder))
    model_type, names = config.get("model_type", ""), config.get("architectures") or [None]
    if "l0" in config:
        make_known(model_type.removeprefix("l0_"))
    module = sized_models if "l0" in config else transformers
    cls = getattr(module, names[0] or "", None)
    if cls is None:
        raise ValueError(f"config.json must name a class of transformers in architectures, got {names[0]!r}")
    return cls.from_pretrained(str(folder), **options)
