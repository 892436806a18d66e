"""Gates for a model of transformers: which example finds its units, and which of them are gated."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.units.graph import KINDS, Group, UnitGraph, aligned, unit_graph
from ..nn.units.place import OPEN, GateGroups, can_close, check_ungated, gated, groups_of, ungate_
from . import files

OPTIONS = ("droprate_init", "lam", "eval_mode", "dist", "block")
DROPRATE = 0.06
"""log_alpha = 2.75: a pretrained model starts with its gates all but open; .5 would halve everything."""
_TOKENS = 6


def gate(
    model: Any,
    heads: bool = True,
    units: bool = True,
    width: bool = False,
    layers: bool = False,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> Any:
    """Gates a model of transformers, in place: :func:`l0kernels.nn.gate_` with an example made of its config.

    The model stays what it is: class, forward, names of parameters, ``generate``, ``save_pretrained``. Its
    gates lie beside its weights, under ``l0_units``. Gate a model once it is loaded and on its device.

    Args:
        model: a ``PreTrainedModel``.
        heads: gates heads of attention. Heads that share keys and values (grouped-query attention) have one
            gate; layers that add one position bias (T5) have the same.
        units: gates the units of feed-forwards, those in the numbered blocks. Others, of a pooler say, are
            gated where `include` names them.
        width: gates the residual stream, where nothing pins it, as a model's output does.
        layers: gives each attention and each feed-forward one more gate, which closes it whole, or, with
            ``heads=False, units=False``, its only one. Its output is then the bias of its last projection.
        include, exclude: which of these, by the names of layers that make them: see :func:`gate_`.
        example: the inputs by name, in place of those made of the config.
        config: a folder of :func:`save_gates`. It says what is gated, how, and has the values of the gates;
            the other arguments but `example` must be left out then.
        **options: droprate_init, lam, eval_mode, dist, block, see :func:`gate_`. droprate_init is .06 here.

    Returns:
        The model.

    Raises:
        ValueError: it is gated already; units of a kind that is asked for are not found (the message says
            what was, and what pins the others); the example does not fit; a pattern matches nothing; the
            folder is of another model.
        TypeError: no model of transformers, or an unknown option.
    """
    _check_model(model)
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TypeError(f"options must be of {OPTIONS}, got {unknown[0]!r}")
    check_ungated(model)
    given = (heads, units, width, layers, include, exclude) != (True, True, False, False, None, None)
    if config is not None and (given or options):
        raise ValueError("config must come alone, it says what is gated and how, got other arguments, too")
    inputs = example_of(model) if example is None else dict(example)
    graph = _graph(model, inputs, made=example is None)
    if config is None:
        wanted = {"heads": heads, "units": units, "width": width, "layers": layers}
        groups = _chosen(graph, wanted, include, exclude)
        opened = [group for group in groups if not wanted[group.kind]]
        block = options.pop("block", 1)
        options = {"droprate_init": DROPRATE, **options}
        _keep_open(gated(model, groups, graph, (), inputs, block, layers=layers, **options), opened)
        return model
    saved = files.read(config)
    by_name = {group.name: group for group in graph.groups}
    found = {name: (group.kind, group.units) for name, group in by_name.items()}
    files.check_groups(saved, found, subset=True)
    groups = [by_name[name] for name in saved.groups]
    opened = [by_name[name] for name, of in saved.groups.items() if of["frozen"]]
    _keep_open(gated(model, groups, graph, (), inputs, saved.block, layers=saved.layers is not None), opened)
    files.load_gates(model, config)
    return model


def _keep_open(gates: GateGroups, groups: Sequence[Group]) -> None:
    """Has the gates of these groups be open for good: their layers' close them."""
    for group, own in zip(gates.groups, gates.gates, strict=True):
        if group in groups:
            nn.init.constant_(own.log_alpha, OPEN)
            own.freeze_()


def _chosen(
    graph: UnitGraph,
    wanted: Mapping[str, bool],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> list[Group]:
    asked = [kind for kind, is_wanted in wanted.items() if is_wanted]
    if not asked:
        raise ValueError("heads, units, width or layers must be True, got none of them")
    layers = wanted["layers"]
    found = [group for group in graph.groups if group.kind in asked or (layers and can_close(group))]
    lacking = [kind for kind in asked if kind != "layers" and kind not in {group.kind for group in found}]
    lacking += ["layers"] if layers and not any(map(can_close, found)) else []
    if lacking:
        raise ValueError(
            f"model must have {lacking[0]} to gate, or {lacking[0]}=False be given, got none that can be. If "
            f"a layer is not seen, call it in an example={{...}} of your own. Found was\n{graph}"
        )
    groups = [group for group in graph.select(include, exclude) if group in found]
    groups = [group for group in groups if include is not None or _is_in_blocks(group)]
    if not groups:
        raise ValueError(
            f"include and exclude must leave {' or '.join(asked)} to gate, got {include!r} and {exclude!r}; "
            f"there are {[group.name for group in found]}"
        )
    return groups


def _is_in_blocks(group: Group) -> bool:
    """Whether it lies in one of the model's numbered blocks, or runs through them."""
    names = group.makers or group.layers
    return group.kind == "width" or any(part.isdigit() for name in names for part in name.split("."))


def _check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}; of an adapter's "
            "wrapper the merged model. l0kernels.nn.gate_ takes any module"
        )


def _graph(model: nn.Module, inputs: Mapping[str, Any], made: bool) -> UnitGraph:
    try:
        return unit_graph(model, **inputs)
    except ValueError as error:
        if not made:
            raise
        raise ValueError(
            f"example must be given for {type(model).__name__}, as a dict of inputs by name; one made of its "
            f"config ({', '.join(inputs)}) did not do: {error}"
        ) from error


def example_of(model: Any) -> dict[str, Any]:
    """Inputs of a model by name, small, as its config says they are.

    Raises:
        ValueError: its config does not.
    """
    config, name = model.config, model.main_input_name
    like = next(model.parameters())
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if name == "input_ids":
        inputs["input_ids"] = _tokens(config).to(like.device)
        if "attention_mask" in takes:
            mask = torch.ones_like(inputs["input_ids"])
            mask[-1, _TOKENS - 2 :] = 0
            inputs["attention_mask"] = mask
    elif name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        rows, cols = (size, size) if isinstance(size, int) else size
        images = torch.linspace(-1, 1, 2 * config.num_channels * rows * cols)
        inputs["pixel_values"] = images.view(2, config.num_channels, rows, cols).to(like.device, like.dtype)
    else:
        raise ValueError(
            f"example must be given for {type(model).__name__}, as a dict of inputs by name: its config does "
            f"not say what {name} is like"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config)[:, 1:].to(like.device)
    if "use_cache" in takes or hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _tokens(config: Any) -> Tensor:
    """(2, 6) of the vocabulary, those with a meaning of their own left out."""
    text = config.get_text_config()
    special = [getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    last = [text.vocab_size - 1 - at for at in range(min(text.vocab_size, 32))]
    plain = [token for token in last if token not in special] or last
    return torch.tensor([plain[at % len(plain)] for at in range(2 * _TOKENS)]).view(2, _TOKENS)


@dataclass(frozen=True)
class Kept:
    """A row of :class:`Description`: parameters that no gate closes, and why."""

    layers: str
    parameters: int
    why: str


@dataclass(frozen=True)
class Description:
    """What of a model has gates, and what stays dense; it prints as two tables.

    Attributes:
        kinds: for "heads", "units", "width" and "layers": how many groups, how many units, the size of one,
            how many of the model's parameters all of them are, and whether they are gated.
        dense: parameters that no gate closes, by the names of their layers without numbers, with the reason.
        parameters: of the whole model.
    """

    kinds: dict[str, tuple[int, int, float, int, bool]]
    dense: tuple[Kept, ...]
    parameters: int

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [
            ("kind", "groups", "units", "parameters a unit closes", "share of the model", "gated")
        ]
        for kind, (groups, units, each, total, is_gated) in self.kinds.items():
            share = f"{total / self.parameters:.1%}"
            rows.append((kind, str(groups), str(units), f"{each:,.0f}", share, "yes" if is_gated else "no"))
        lines = aligned(rows)
        rows = [("stays dense", "parameters", "share of the model", "why")]
        for kept in self.dense:
            share = f"{kept.parameters / self.parameters:.1%}"
            rows.append((kept.layers, f"{kept.parameters:,}", share, kept.why))
        return "\n".join([*lines, "", *aligned(rows)] if self.dense else lines)


def describe(model: Any, example: Mapping[str, Any] | None = None) -> Description:
    """What :func:`gate` finds in a model, or has gated in it, and what stays dense.

    Args:
        model: a ``PreTrainedModel``, gated or not.
        example: as of :func:`gate`.

    Raises:
        ValueError: an example that does not fit.
        TypeError: no model of transformers.
    """
    _check_model(model)
    gates = groups_of(model)
    inputs = example_of(model) if example is None else dict(example)
    plain = model if gates is None else _without_gates(model)
    graph = _graph(plain, inputs, made=example is None)
    pairs = [] if gates is None else list(zip(gates.groups, gates.gates, strict=True))
    names = {group.name for group, own in pairs if not own.frozen}
    kinds = {}
    for kind in KINDS:
        groups = [group for group in graph.groups if group.kind == kind and _is_in_blocks(group)]
        of_kind = [group for group in groups if group.name in names] or groups
        if of_kind:
            n, total = sum(g.units for g in of_kind), sum(g.units * g.parameters for g in of_kind)
            is_gated = any(group.name in names for group in of_kind)
            kinds[kind] = len(of_kind), n, total / n, total, is_gated
    closable = [g for g in graph.groups if can_close(g) and _is_in_blocks(g)]
    if gates is not None and gates.l0_layers is not None:
        layered = zip(gates.groups, gates.layered, strict=True)
        names |= {group.name for group, at in layered if at is not None}
        closable = [g for g in graph.groups if g.name in names and can_close(g)]
    if closable:
        total = sum(g.units * g.parameters for g in closable)
        is_gated = gates is not None and gates.l0_layers is not None
        kinds["layers"] = len(closable), len(closable), total / len(closable), total, is_gated
    chosen = [g for g in graph.groups if g.name in names or (gates is None and _is_in_blocks(g))]
    dense = tuple(_dense(plain, graph, chosen))
    return Description(kinds, dense, sum(p.numel() for p in plain.parameters()))


def _without_gates(model: nn.Module) -> nn.Module:
    """A copy without gates that shares its weights."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return ungate_(copy.deepcopy(model, cast(dict[int, Any], memo)))


def _dense(model: nn.Module, graph: UnitGraph, chosen: Sequence[Group]) -> list[Kept]:
    why = {pin.name.rpartition(".")[0]: pin.why for pin in graph.pinned}
    closed = {member.name for group in chosen for member in group.members}
    free = {member.name for group in graph.groups for member in group.members}
    found: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        if name in closed:
            continue
        layer = ".".join("*" if part.isdigit() else part for part in name.split(".")[:-1])
        reason = "not asked for" if name in free else why.get(name.rpartition(".")[0], "no units")
        found[layer, reason] = found.get((layer, reason), 0) + parameter.numel()
    return [Kept(layer, n, reason) for (layer, reason), n in found.items()]


def gates_of(model: nn.Module) -> GateGroups:
    """The gates of a model.

    Raises:
        ValueError: it has none.
    """
    gates = groups_of(model)
    if gates is None:
        raise ValueError(
            f"model must be gated by l0kernels.hf.gate, got a {type(model).__name__} that is not"
        )
    return gates
