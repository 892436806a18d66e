"""A gated model without its gates: layers of their own classes, narrower by what is closed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..._compat import pytree
from ..notices import warn
from .draws import Space
from .graph import Group, nesting
from .layers import Units
from .open_attention import OpenMultiheadAttention, open_attention_
from .open_norm import NORMS, open_norm_
from .place import GatedUnits, GateGroups, groups_of, tensors_of, ungate_

STATISTICS = ("running_mean", "running_var")
OPEN: tuple[type[nn.Module], ...] = (OpenMultiheadAttention, *NORMS.values())
"""Layers that take no nested tensors."""


def shrunk(model: nn.Module, multiple_of: int) -> nn.Module:
    """`model`, at rest and ours to take apart, with each gated model in it made narrower."""
    hosts = [module for module in model.modules() if groups_of(module) is not None]
    inside: set[Any] = {part for host in hosts for part in host.modules()}
    for name, module in model.named_modules():
        if isinstance(module, GatedUnits) and module not in inside:
            raise ValueError(
                f"model must have the gates of its layers, got {name or type(module).__name__!r} of a "
                "model that gate_ has gated, without that model: export the whole, and take the part of that"
            )
    for host in hosts:
        smaller = _shrunk(host, multiple_of)
        for module in model.modules():
            for name, child in module._modules.items():
                if child is host:
                    module._modules[name] = smaller
        model = smaller if model is host else model
    return model


def _shrunk(host: nn.Module, multiple_of: int) -> nn.Module:
    gates = cast(GateGroups, groups_of(host))
    check = _Check(host, gates)
    for least in (0, 1):  # not every forward takes what has no units at all
        plan = _Plan(host, gates, multiple_of, least)
        out, found = check.of(plan.cut(plan.narrowed))
        if found is None:
            return out
        if not plan.leaves_none:  # the next plan would be the same
            break
    # Some of them meet a size that stands in a forward: those stay whole, with zeros.
    out, wrong = check.of(plan.cut([]), loosely=True)
    if wrong is not None:
        raise ValueError(
            f"model must compute the same with its closed units zero, got another result: {wrong}"
        )
    alone, others = list[list[Group]](), list[Group]()
    for group in plan.narrowed:
        if check.of(plan.cut([group]))[1] is None:
            alone.append([group])
        else:
            others.append(group)
    alone += [groups for groups in plan.tie(others) if check.of(plan.cut(groups))[1] is None]
    chosen = [group for groups in alone for group in groups]
    both, wrong = check.of(plan.cut(chosen))
    if wrong is None:
        out = both
    else:
        chosen = []
        for groups in alone:
            both, wrong = check.of(plan.cut([*chosen, *groups]))
            if wrong is None:
                chosen, out = [*chosen, *groups], both
    whole = [group.name for group in plan.narrowed if group not in chosen]
    if whole:
        warn(
            f"export has left the closed units of {', '.join(whole)} in place, as zeros: with fewer, the "
            "model's forward fails or computes something else, as where a size stands in it"
        )
    return out


class _Plan:
    """What of each unit is kept: all of it, its place with zeros, or nothing.

    Attributes:
        narrowed: the groups of which something can go.
        needed: the names of those of which all that is closed must go: a norm is over them.
    """

    def __init__(self, host: nn.Module, gates: GateGroups, multiple_of: int, least: int) -> None:
        self._host, self._gates = host, gates
        linear = {
            f"{name}.{of}" if name else of
            for name, m in host.named_modules()
            if isinstance(m, nn.Linear | nn.Embedding | nn.MultiheadAttention)
            for of in m._parameters
        }
        self._layers: list[Any] = [m for m in host.modules() if isinstance(m, GatedUnits)]
        starts: list[int] = []
        total = 0
        own = gates.gates if gates.l0_layers is None else [*gates.gates, gates.l0_layers]
        z = [one.z.detach().cpu() for one in gates.spread([gate.eval_gates() for gate in own])]
        for group in gates.groups:
            starts.append(total)
            total += group.units
        self._z = torch.cat([*z, z[0].new_ones(1)])  # behind all units stands what is always open
        self._open = self._z != 0
        self._of = {
            group.name: slice(at, at + group.units) for group, at in zip(gates.groups, starts, strict=True)
        }
        self.needed, mixed = self._normed()
        fixed = self._fixed()
        self._kept = self._open.clone()
        self.narrowed: list[Group] = []
        for group in gates.groups:
            place = self._of[group.name]
            n_open = int(self._open[place].sum())
            if group.name in fixed:
                self._kept[place] = True
                continue
            wanted = n_open
            if group.name not in self.needed:
                at_least = least if all(m.name in linear for m in group.members) else 1
                multiple = 1 if group.kind == "heads" else multiple_of
                wanted = min(group.units, max(-(-n_open // multiple) * multiple, at_least))
            elif group.name not in mixed:
                wanted = max(n_open, 1)
            self._keep(group, wanted)
            if not self._kept[place].all():
                self.narrowed.append(group)

    def _keep(self, group: Group, wanted: int) -> None:
        """Has so many units of a group stay, the likeliest behind those that are open."""
        place = self._of[group.name]
        gate = self._gates.gates[self._gates.groups.index(group)]
        likely = gate.whole().detach().flatten().cpu().repeat_interleave(self._gates.block_of(group))
        likely = likely[: group.units]
        likely = likely.double().masked_fill(self._open[place], torch.inf)
        self._kept[place][likely.argsort(descending=True, stable=True)[:wanted]] = True

    def tie(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Has a width and the heads that read and make it keep the same share: where a forward divides one
        by the number of the others for the size of a head. Returns which groups go together."""
        found: list[list[Group]] = []
        for width in groups:
            heads = [group for group in groups if _divide(group, width)]
            if heads:
                of_others = [tied for tied in found if any(group in tied for group in heads)]
                found = [tied for tied in found if tied not in of_others]
                both = [width, *heads, *(group for tied in of_others for group in tied)]
                found.append([*{group.name: group for group in both}.values()])
        for tied in found:
            shares = math.gcd(*(group.units for group in tied))
            kept = [int(self._kept[self._of[group.name]].sum()) for group in tied]
            most = max(-(-n * shares // group.units) for n, group in zip(kept, tied, strict=True))
            for group in tied:
                self._keep(group, group.units // shares * max(most, 1))
        return found

    @property
    def leaves_none(self) -> bool:
        """Whether nothing is kept of some group."""
        return not all(bool(self._kept[place].any()) for place in self._of.values())

    def _names(self, space: Space) -> set[str]:
        """The groups whose units lie in a space."""
        return {name for name, place in self._of.items() if _holds(space.labels, place)}

    def _normed(self) -> tuple[set[str], set[str]]:
        """The groups that a norm is over; of these, those that have company there."""
        needed: set[str] = set()
        mixed: set[str] = set()
        for layer in self._layers:
            units = layer._l0_units
            if not _is_over_units(layer, units):
                continue
            space = cast(Space, units.outs)
            names = self._names(space)
            needed |= names
            if len(names) > 1 or bool((space.labels == len(self._z) - 1).any()):
                mixed |= names
        return needed, mixed

    def _fixed(self) -> set[str]:
        """The groups whose units stay, with zeros: the model's inputs, words that are kept to a norm."""
        fixed = {group.name for group in self._gates.groups if all(m.role != "out" for m in group.members)}
        for layer in self._layers:  # a weight that another layer reads by has one role, and makes them, too
            outs, kind = layer._l0_units.outs, layer._l0_units.kind
            if outs is not None and kind.is_product and getattr(layer, "groups", 1) == 1:
                fixed -= self._names(outs)
        for layer in self._layers:
            if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
                fixed |= self._names(cast(Any, layer)._l0_units.outs)
        return fixed - self.needed

    def cut(self, groups: Iterable[Group]) -> nn.Module:
        """A copy of the model whose closed units are gone, of `groups`; else zero.

        It shares with the model what stays as it is. A norm over units some of which are zero is one of the
        others.
        """
        kept = self._kept.clone()
        gone = {group.name for group in groups}
        for name, place in self._of.items():
            if name not in gone:
                kept[place] = True
        host = self._host
        memo = {id(t): t for t in (*host.parameters(), *host.buffers())}
        copied = copy.deepcopy(host, cast(dict[int, Any], memo))
        units = {layer: layer._l0_units for layer in copied.modules() if isinstance(layer, GatedUnits)}
        places = cast(GateGroups, groups_of(copied)).places
        tensors = tensors_of(copied)
        sides = {id(tensors[name]): places[name] for name in places if name in tensors}
        ungate_(copied)
        cutter = _Cutter(kept, self._open, self._z, sides)
        for module in copied.modules():
            cutter.parameters(module, units.get(cast(Any, module)))
        for layer, own in units.items():
            _resize(cast(Any, layer), own, cutter.count)
            if _is_over_units(layer, own):
                open_norm_(layer, own.kind, cutter.is_open(cast(Space, own.outs)))
        for name, spaces in self._gates.attentions.items():
            _set_heads(copied.get_submodule(name), spaces, cutter.count)
        for layer, own in units.items():
            if own.kind.name == "attention":
                of_q = own.heads[0]
                if of_q is None:
                    open_attention_(layer, None, None)
                else:
                    open_attention_(layer, cutter.kept(of_q), cutter.is_open(of_q))
        for encoder in nesting(copied).values():
            encoder.use_nested_tensor = not any(isinstance(part, OPEN) for part in encoder.modules())
        return copied


def _divide(heads: Group, width: Group) -> bool:
    """Whether as many features as a width has are those of heads, in a weight of both."""
    if heads.kind != "heads" or width.kind == "heads":
        return False
    sides = {(member.name, member.dim) for member in width.members if member.index.shape[1] == 1}
    return any(
        member.role == "in" and (member.name, 1 - member.dim) in sides and member.index.numel() == width.units
        for member in heads.members
    )


def _holds(labels: Tensor, place: slice) -> bool:
    return bool(((labels >= place.start) & (labels < place.stop)).any())


def _is_over_units(layer: Any, units: Units) -> bool:
    """Whether a closed unit must be gone for the open ones to be normalised right."""
    name = units.kind.name
    return name in ("layer_norm", "rms_norm") or (
        name == "group_norm" and layer.num_groups != layer.num_channels
    )


class _Cutter:
    """Makes tensors narrower, each once for each way in which it is used."""

    def __init__(self, kept: Tensor, is_open: Tensor, z: Tensor, sides: dict[int, dict[int, Space]]) -> None:
        self._kept, self._open, self._z, self._sides = kept, is_open, z, sides
        self._made: dict[tuple[int, Space | None], Tensor] = {}

    def count(self, space: Space) -> int:
        """How many entries of a space stay."""
        return int(self._kept[space.labels].sum())

    def kept(self, space: Space) -> Tensor:
        """Which entries of a space stay."""
        return self._kept[space.labels]

    def is_open(self, space: Space) -> Tensor:
        """Which of the entries that stay are."""
        return self._open[space.labels][self._kept[space.labels]]

    def parameters(self, module: nn.Module, units: Units | None) -> None:
        """Makes those of `module` narrower, and its buffers."""
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is None or id(value) not in self._sides:
                    continue
                reads = units is not None and units.kind.reads(name)
                reads = reads and getattr(module, "groups", 1) == 1
                scaled = units.kind.cols if units is not None and reads else None
                values[name] = self._cut(value, scaled, name)  # type: ignore[assignment]

    def _cut(self, value: Tensor, scaled: int | None, name: str) -> Tensor:
        sides = self._sides[id(value)]
        space = None if scaled is None else sides.get(scaled)
        if space is not None and bool((self._z[space.labels][self._open[space.labels]] == 1).all()):
            space = None  # zeros are everybody's: a weight that is tied stays so
        key = id(value), space
        found = self._made.get(key)
        if found is not None:
            return found
        data = value.detach()
        for dim, side in sides.items():
            data = self._side(data, dim, side, name, factor=space is not None and dim == scaled)
        data = data.clone()  # it may be a view
        is_parameter = isinstance(value, nn.Parameter)
        found = nn.Parameter(data, requires_grad=value.requires_grad) if is_parameter else data
        self._made[key] = found
        self._sides_of_copy(found)
        return found

    def _sides_of_copy(self, made: Tensor) -> None:
        """What is made has no sides, though an address may have been another's."""
        self._sides.pop(id(made), None)

    def _side(self, data: Tensor, dim: int, space: Space, name: str, factor: bool) -> Tensor:
        kept, closed = self._kept[space.labels], ~self._open[space.labels]
        z = self._z[space.labels].to(data.device, data.dtype) if factor else None
        if not factor and bool((kept & closed).any()) and name != "running_var":
            data = data.index_fill(dim, closed.nonzero()[:, 0].to(data.device), 0)
        return narrowed(data, dim, None if bool(kept.all()) else kept.nonzero()[:, 0], z)


def narrowed(data: Tensor, dim: int, index: Tensor | None, z: Tensor | None = None) -> Tensor:
    """The entries `index` of a dimension, None: all; each times its z."""
    if z is not None:
        data = data * z.view([-1 if at == dim else 1 for at in range(data.ndim)])
    return data if index is None else data.index_select(dim, index.to(data.device))


def set_sizes(layer: Any, n_in: int | None, n_out: int | None) -> None:
    """Has a linear layer or a convolution say how many units it reads and makes; None: as many as it did."""
    of = "{}_features" if isinstance(layer, nn.Linear) else "{}_channels"
    names = ("nx", "nf") if hasattr(layer, "nf") else (of.format("in"), of.format("out"))  # Conv1D of GPT-2
    for name, n in zip(names, (n_in, n_out), strict=True):
        if n is not None:
            setattr(layer, name, n)


HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads")
SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
FEATURES = ("all_head_size", "attn_dim", "inner_dim", "split_size")


def _set_heads(attention: nn.Module, spaces: Sequence[Space | None], count: Callable[[Space], int]) -> None:
    """Has the attributes of a module that attends say how many heads it has left, by their usual names."""
    sizes = {(space.size, count(space)) for space in spaces if space is not None}
    if len(sizes) != 1:
        return
    ((heads, left),) = sizes
    for name, value in vars(attention).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            continue
        if (name in HEADS and value == heads) or (name in FEATURES and value % heads == 0):
            setattr(attention, name, value // heads * left)
        elif name in SHARED and heads % value == 0 and left % (heads // value) == 0:
            setattr(attention, name, left // (heads // value))


def _resize(layer: Any, units: Units, count: Callable[[Space], int]) -> None:
    """Has a layer's attributes say its sizes."""
    name, ins, outs = units.kind.name, units.ins, units.outs
    n_in = None if ins is None else count(ins)
    n_out = None if outs is None else count(outs)
    if units.kind.is_product:
        groups = getattr(layer, "groups", 1)
        if groups > 1:  # whole groups go
            assert n_out is not None
            layer.groups = groups * n_out // layer.out_channels
        set_sizes(layer, n_in, n_out)
        return
    if name == "attention":
        sizes = [layer.embed_dim if space is None else count(space) for space in units.reads]
        layer.embed_dim, layer.kdim, layer.vdim = (
            old if space is None else new
            for old, new, space in zip(
                (layer.embed_dim, layer.kdim, layer.vdim), sizes, units.reads, strict=True
            )
        )
        return
    if units.kind.is_recurrent:
        layer.input_size = layer.input_size if n_in is None else n_in
        layer.hidden_size = layer.hidden_size if n_out is None else n_out
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
        return
    if n_out is None:
        return
    if name in ("batch_norm", "instance_norm"):
        layer.num_features = n_out
    elif name in ("layer_norm", "rms_norm"):
        layer.normalized_shape = (n_out,)
    elif name == "group_norm":
        layer.num_groups = n_out if layer.num_groups == layer.num_channels else layer.num_groups
        layer.num_channels = n_out
    elif name == "embedding":
        layer.embedding_dim = n_out
    elif name == "prelu":
        layer.num_parameters = n_out


class _Fault(NamedTuple):
    """Why a model that has been made narrower is not right."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.what}{f' in {self.where}' if self.where else ''}"


class _Check:
    """Compares with the gated model, on random inputs like the example that gate_ was given."""

    def __init__(self, host: nn.Module, gates: GateGroups) -> None:
        self._host = host
        self._wanted: list[Any] | None = None
        like = next((p for p in host.parameters() if p.is_floating_point()), None)
        self._devices = [like.device] if like is not None and like.is_cuda else []
        if gates.example is None or like is None:
            return
        with torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(0)
            self._inputs = gates.example.make(like)
        try:
            self._wanted = self._run(host)
        except Exception:  # its inputs cannot be random
            self._wanted = None
            return

    def of(self, model: nn.Module, loosely: bool = False) -> tuple[nn.Module, _Fault | None]:
        """The model, and what is wrong with it; `loosely`: only what is plainly so."""
        return model, self._fault(model, LOOSE if loosely or self._devices else STRICT)

    def _fault(self, model: nn.Module, tolerance: float) -> _Fault | None:
        if self._wanted is None:
            return None
        stack: list[str] = []
        handles = []
        for name, module in model.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                stack.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                stack.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))  # not after an error: there it is
        try:
            out = self._run(model)
        except Exception as error:
            where = next((name for name in reversed(stack) if name), "the model's forward")
            return _Fault(where, f"{type(error).__name__} ({error})")
        finally:
            for handle in handles:
                handle.remove()
        if [_shape(a) for a in out] != [_shape(b) for b in self._wanted]:
            return _Fault("", "outputs of another shape")
        if _differ(out, self._wanted, tolerance) and not self._is_random():
            return _Fault("", "other outputs")
        return None

    def _is_random(self) -> bool:
        """Whether the gated model itself gives other outputs each time."""
        assert self._wanted is not None
        return _differ(self._wanted, self._run(self._host, seed=2), LOOSE)

    def _run(self, model: nn.Module, seed: int = 1) -> list[Any]:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, self._inputs)
        with torch.no_grad(), torch.random.fork_rng(devices=self._devices):
            torch.manual_seed(seed)
            return _tensors(model(*args, **kwargs))


def _tensors(value: Any) -> list[Tensor]:
    """Those in an output, which may be a record of a class of its own."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [x for x in pytree.tree_leaves(vars(leaf)) if isinstance(x, Tensor)]
    return found


def _shape(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype


STRICT, LOOSE = 2e-5, 1e-3
"""How much of the largest output another one may differ. A scale that a forward takes from the number of its
heads changes little while weights are small; a GPU rounds products to 10 bits."""


def _differ(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether outputs differ by more than rounding makes of them; those of ints may, at ties."""
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        near = {torch.float64: min(tolerance, 1e-5), torch.float32: tolerance}.get(a.dtype, 5e-2)
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return True
        a, b = (torch.where(x.isfinite(), x, 0) for x in (a, b))
        if (a - b).abs().max() > near * b.abs().max() + 1e-12:
            return True
    return False
