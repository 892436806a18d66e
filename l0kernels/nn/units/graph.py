"""The units of a model: which dimensions of which parameters are one, found by running the model once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..._compat import pytree
from .trace import Dim, Trace, model_inputs

KINDS = ("heads", "units", "width")


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter or buffer that the units of a group lie in.

    Attributes:
        name: of the parameter or buffer in the model.
        dim: of it.
        role: "out": makes the units; "in": reads them; "along": is in between, as a norm's weight.
        index: (units, times) int64: where each unit lies in that dimension; more than once behind nn.Flatten.
    """

    name: str
    dim: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Units that the same layers make and read; each can be closed for itself.

    Attributes:
        name: of the first layer that makes them, or reads them where no layer does, with "/2" and so on where
            that layer makes the units of other groups, too.
        units: how many.
        members: what a closed unit takes with it.
        parameters: how many parameters that is, of one unit.
        residual: whether the sum of two branches carries them.
        kind: "heads" of attention; "width", the features or channels of a residual stream; else "units".
    """

    name: str
    units: int
    members: tuple[Member, ...]
    parameters: int
    residual: bool
    kind: str = "units"

    @property
    def layers(self) -> list[str]:
        """The names of the modules around."""
        return list(dict.fromkeys(member.name.rpartition(".")[0] for member in self.members))

    @property
    def makers(self) -> list[str]:
        """The names of the modules that make the units."""
        names = [member.name.rpartition(".")[0] for member in self.members if member.role == "out"]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Pinned:
    """A dimension of a parameter that cannot be gated, in part or whole, and the function that is why."""

    name: str
    dim: int
    units: int
    why: str


@dataclass(frozen=True)
class Attention:
    """A product of activations, by head: scores, what they weigh, or both.

    Attributes:
        module: the name of the module that calls it.
        heads: the group and the unit in it that each head is, None where it has none.
    """

    module: str
    heads: tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class UnitGraph:
    """What :func:`unit_graph` has found.

    Attributes:
        groups: those that can be gated, in the order of the parameters.
        pinned: what cannot.
        attentions: each product of activations, in the order of the calls.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    attentions: tuple[Attention, ...] = field(default=(), repr=False)
    _sizes: dict[tuple[str, int], int] = field(default_factory=dict, repr=False)
    _lent: frozenset[str] = field(default=frozenset(), repr=False)
    _pointwise: frozenset[str] = field(default=frozenset(), repr=False)

    def __getitem__(self, name: str) -> Group:
        """The group of this name.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {[group.name for group in self.groups]}")

    def select(
        self,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        residual: bool = True,
        kinds: Sequence[str] | None = None,
    ) -> list[Group]:
        """The groups one of whose makers is named by `include`, and none by `exclude`.

        Args:
            include, exclude: a regular expression for the whole name of a module, or suffixes of names.
            residual: whether those carried by sums, "width", are among them.
            kinds: of "heads", "units" and "width"; None: all.

        Raises:
            ValueError: a pattern that names no module around any group, or another kind.
        """
        if kinds is not None and (isinstance(kinds, str) or not {*kinds} <= {*KINDS}):
            raise ValueError(f"kinds must be some of {KINDS}, got {kinds!r}")
        for what, pattern in (("include", include), ("exclude", exclude)):
            names = [name for group in self.groups for name in (group.makers or group.layers)]
            if pattern is not None and not any(_named(name, pattern) for name in names):
                raise ValueError(
                    f"{what} must name a layer with units to gate, got {pattern!r}; there are {names}"
                )
        found = []
        for group in self.groups:
            names = group.makers or group.layers
            wanted = include is None or any(_named(name, include) for name in names)
            left = exclude is not None and any(_named(name, exclude) for name in names)
            wanted = wanted and (kinds is None or group.kind in kinds)
            if wanted and not left and (residual or group.kind != "width"):
                found.append(group)
        return found

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [("group", "units", "layers", "parameters a unit closes")]
        for group in self.groups:
            layers = group.layers
            names = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
            kind = "" if group.kind == "units" else f" ({group.kind})"
            rows.append((group.name + kind, str(group.units), names, f"{group.parameters:,}"))
        lines = aligned(rows)
        if self.pinned:
            rows = [("not gated", "units", "why")]
            rows += [(f"{pin.name}, dimension {pin.dim}", str(pin.units), pin.why) for pin in self.pinned]
            lines += ["", *aligned(rows)]
        return "\n".join(lines)


def key_of(name: str) -> str:
    """The name of the gate of the group of this name, among the gates of a model."""
    return name.replace(".", "_").replace("/", "_") or "model"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _named(name: str, pattern: str | Sequence[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def unit_graph(model: nn.Module, *args: Any, inputs: bool = False, **kwargs: Any) -> UnitGraph:
    """Runs ``model(*args, **kwargs)`` once and finds which dimensions of its parameters are the same units.

    A unit is an output of a linear layer, a convolution or an embedding, with all that depends on it alone:
    its row of the weight, its bias, its entry in norms, the columns that read it, and the units that meet it
    in sums, products and concatenations. Its layers must be called as modules of torch.nn, or their weights
    given to torch.nn.functional.linear as ``layer.weight``. A function of torch that is not known to treat
    units one by one pins those that it sees: they are not gated, and
    :attr:`UnitGraph.pinned` says why. The run is in eval() without gradients and leaves the model as it is;
    where the control flow depends on data, what counts is the way that this example takes.

    Args:
        model: any module.
        *args, **kwargs: an example of its inputs. The batch may have one entry.
        inputs: whether the inputs' features (or channels) are units, too.

    Raises:
        ValueError: no example, or one that the model refuses.
    """
    if not args and not kwargs:
        raise ValueError("example must be given: inputs that the model can be called with, got none")
    lazy = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if lazy:
        raise ValueError(f"model must have sizes, which its first call gives it, got {lazy[0]!r} without one")
    trace = Trace(model)
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    encoders = nesting(model)
    try:
        model.eval()
        for encoder in encoders.values():
            encoder.use_nested_tensor = False
        if inputs:
            model_inputs(trace, (args, kwargs))
        devices = {p.device.index for p in model.parameters() if p.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), trace.watching(model):
            out = model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example must be inputs that the model takes, got {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for encoder in encoders.values():
            encoder.use_nested_tensor = True
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
    for value in _tensors_in(out):
        trace.pin(value, "output of the model")
    return _build(model, trace)


def nesting(model: nn.Module) -> dict[str, Any]:
    """Each torch.nn.TransformerEncoder that makes nested tensors of padded batches, by its name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    }


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in what a model returns, in the attributes of its own classes, too."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, nn.Module):
            yield from _tensors_in([*getattr(leaf, "__dict__", {}).values()], depth - 1)


def _build(model: nn.Module, trace: Trace) -> UnitGraph:
    sets, why = trace.sets, trace.sets.reasons()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    order = {name: i for i, name in enumerate([*tensors, *(key.name for key in trace.dims)])}
    places: dict[int, list[tuple[Dim, int]]] = {}
    for key in sorted(trace.dims, key=lambda key: (order[key.name], key.dim)):
        for at, label in enumerate(trace.dims[key].tolist()):
            places.setdefault(sets.find(label), []).append((key, at))
    summed = {sets.find(label) for labels in trace.sums for label in labels.flatten().tolist() if label}

    pinned = _pinned(trace, why)
    by_signature: dict[tuple[Any, ...], list[int]] = {}
    for unit, found in places.items():
        if unit in why or "in" not in {trace.roles[key] for key, _ in found}:
            continue
        signature = tuple(
            sorted(
                Counter(key for key, _ in found).items(), key=lambda item: (order[item[0].name], item[0].dim)
            )
        )
        by_signature.setdefault(signature, []).append(unit)
    groups, known = [], set[str]()
    attending = {
        sets.find(label) for _, labels in trace.attentions if labels is not None for label in labels.tolist()
    }
    for signature, units in by_signature.items():
        group = _group(signature, units, places, trace, tensors, summed)
        kind = "heads" if units[0] in attending else "width" if group.residual else "units"
        group = replace(group, kind=kind)
        name, times = group.name, 1
        while key_of(name) in known:  # what one layer makes, and several read
            times += 1
            name = f"{group.name}/{times}"
        known.add(key_of(name))
        groups.append(replace(group, name=name))
    sizes = {(key.name, key.dim): len(labels) for key, labels in trace.dims.items()}
    named = tuple(_named_apart(groups))
    of_unit = {
        unit: (group.name, at)
        for group, units in zip(named, by_signature.values(), strict=True)
        for at, unit in enumerate(units)
    }
    attentions = tuple(_attentions(trace, of_unit))
    called = frozenset(trace.lent), frozenset(trace.pointwise)
    return UnitGraph(named, tuple(pinned), attentions, sizes, *called)


def _attentions(trace: Trace, of_unit: dict[int, tuple[str, int]]) -> Iterator[Attention]:
    for name, labels in trace.attentions:
        heads = [] if labels is None else labels.tolist()
        yield Attention(name, tuple(of_unit.get(trace.sets.find(head)) for head in heads))


def _named_apart(groups: Sequence[Group]) -> Iterator[Group]:
    """A layer whose units fall into several groups names the first, and the others with a number."""
    seen: Counter[str] = Counter()
    for group in groups:
        seen[group.name] += 1
        n = seen[group.name]
        yield group if n == 1 else replace(group, name=f"{group.name}#{n}")


def _pinned(trace: Trace, why: dict[int, str]) -> Iterator[Pinned]:
    for key, labels in trace.dims.items():
        reasons = [why[unit] for unit in map(trace.sets.find, labels.tolist()) if unit in why]
        if reasons and trace.roles[key] != "along":
            yield Pinned(key.name, key.dim, len(reasons), reasons[0])


def _group(
    signature: tuple[tuple[Dim, int], ...],
    units: list[int],
    places: dict[int, list[tuple[Dim, int]]],
    trace: Trace,
    tensors: dict[str, Tensor],
    summed: set[int],
) -> Group:
    members = []
    for key, times in signature:
        index = [[at for found, at in places[unit] if found == key] for unit in units]
        members.append(
            Member(
                key.name, key.dim, trace.roles[key], torch.tensor(index, device="cpu").view(len(units), times)
            )
        )
    makers = [member for member in members if member.role == "out"] or members
    name = makers[0].name.rpartition(".")[0] or makers[0].name
    return Group(name, len(units), tuple(members), _closed_by_one(members, tensors), units[0] in summed)


def _closed_by_one(members: Sequence[Member], tensors: dict[str, Tensor]) -> int:
    """Parameters that one unit closes; what is in two dimensions of it counts once."""
    total = 0
    for name in dict.fromkeys(member.name for member in members):
        t = tensors.get(name)
        if not isinstance(t, nn.Parameter):
            continue
        kept = t.numel()
        for member in members:
            if member.name == name:
                kept = kept // t.shape[member.dim] * (t.shape[member.dim] - member.index.shape[1])
        total += t.numel() - kept
    return total
