"""Gates put into a model, in place, and taken out again."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ... import _checks, _registry
from ..._compat import AnyBatchNorm, current_node, graph_task
from ..._gates import DEFAULT_DIST, Gates, HardConcrete
from ...conv2d import is_exact
from ...gates import draw_joined
from ...impl.im2col import few_taps
from ...penalty import L2Term
from ..batch_norm import ChannelAverages
from ..gate import GatedLayer, HardConcreteGate, draw, draws_of, leaves_no_fast_path
from . import attention, recurrent
from .draws import Averages, Draw, Space, Spaces
from .example import Example, example_of
from .graph import Group, UnitGraph, nesting, unit_graph
from .kinds import POINTWISE, Kind, kind_of, recurrent_names
from .layers import Units, lent, run
from .narrow import plain

MULTIPLE = 8
"""Of channels of convolutions: products of matrices are faster so."""
NUMBERS = 32
"""So many numbers of channels may occur where oneDNN computes, which compiles each new one."""

NAME = "l0_units"
"""Of the module in a gated model that holds its gates."""
_DRAWS = ("CatBackward0", "_JoinedBackward")
"""The nodes of autograd that z of a draw comes from."""
OPEN = 80.0
"""A log_alpha of what is always open: P is 1 to the last bit, and its derivative 0 for sums."""
_RECENT = 8
"""So many forwards may come before the backward pass of the first, whose checkpoints look for their draw."""


class GateGroups(GatedLayer, nn.Module):
    """The gates of a model that :func:`gate_` has gated: a :class:`HardConcreteGate` for each group of units.

    Attributes:
        groups: what of :func:`unit_graph` is gated, in the order of the gates.
        block: so many units in a row are closed together, heads each for itself.
        spaces: where the units lie in the layers.
        places: those of each parameter and buffer of the model, by its name and dimension.
        attentions: by the name of a module, the heads of each product of activations that it calls, in order;
            None: they are not gated.
        example: what the model was run with, without its values; None where that cannot be made again.
        l0_layers: the gates that close whole groups, None: there are none.
        layered: the number in l0_layers of the gate of each group, None: it has none.
        normed: the spaces of batch norms.
        nesting: the names of the encoders that make nested tensors without gates.
    """

    l0_layers: HardConcreteGate | None

    _backwards: Sequence[dict[int, Any]] = ()
    """The backward hooks of the model's modules, as they are at any time."""
    _captures = False
    """Whether the recent draws were made within the capture of a CUDA graph."""

    def __init__(self, groups: Sequence[Group], block: int, layers: bool = False, **options: Any) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.block = block
        self.spaces = Spaces()
        self.places: dict[str, dict[int, Space]] = {}
        self.attentions: dict[str, list[Space | None]] = {}
        self.nesting: list[str] = []
        self.example: Example | None = None
        self._keys: dict[str, str] = {}
        for group in groups:
            key = re.sub(r"\W", "_", group.name) or "model"
            while hasattr(self, key):
                key += "_"
            self._keys[group.name] = key
            gate = HardConcreteGate(-(-group.units // self.block_of(group)), **options)
            gate.kind = group.kind
            self.add_module(key, gate)
        at = iter(range(len(groups)))
        self.layered = [next(at) if layers and can_close(group) else None for group in groups]
        n_layers = len(groups) - self.layered.count(None)
        self.l0_layers = HardConcreteGate(n_layers, **options) if n_layers else None
        if self.l0_layers is not None:
            self.l0_layers.kind = "layers"
        self.multiples = [1] * len(groups)
        self.normed: set[Space | None] = set()
        self._made: dict[Any, Any] = {}
        self._local = threading.local()
        self._recent: deque[Draw] = deque(maxlen=_RECENT)

    @property
    def gates(self) -> list[HardConcreteGate]:
        """In the order of the groups."""
        return [cast(HardConcreteGate, self._modules[key]) for key in self._keys.values()]

    def block_of(self, group: Group) -> int:
        """How many units of a group share a gate."""
        return 1 if group.kind == "heads" else self.block

    def gate_of_unit(self) -> Tensor:
        """(units + 1,) int64: which of all gates closes each unit; the last number: none."""
        found = self._made.get("gate_of_unit")
        if found is None:
            parts, start = [], 0
            for group in self.groups:
                parts.append(start + torch.arange(group.units, device="cpu") // self.block_of(group))
                start += -(-group.units // self.block_of(group))
            found = self._made["gate_of_unit"] = torch.cat([*parts, torch.tensor([start], device="cpu")])
        return found

    def gate_index(self, space: Space, device: torch.device) -> Tensor:
        """Which of all gates closes each entry of a space, (size,)."""
        key = "gate_index", space, device
        if key not in self._made:
            self._made[key] = self.gate_of_unit()[space.labels].to(device)
        return self._made[key]

    def whole_gate(self, space: Space) -> int | None:
        """The number of the HardConcreteGate whose gates are those of a space's entries, in order."""
        key = "whole_gate", space
        if key not in self._made:
            of, start, found = self.gate_of_unit()[space.labels], 0, None
            for at, group in enumerate(self.groups):
                n = -(-group.units // self.block_of(group))
                found = at if torch.equal(of, torch.arange(start, start + n, device="cpu")) else found
                start += n
            self._made[key] = found
        return self._made[key]

    def meeting(self, rows: Space, cols: Space) -> Tensor | None:
        """(3, n): rows, columns and gates where both are of one gate; None: there is none."""
        key = "meeting", rows, cols
        if key not in self._made:  # by _place, before anything is compiled
            of = self.gate_of_unit()
            first, second = of[rows.labels], of[cols.labels]
            both = (first[:, None] == second) & (first[:, None] != of[-1])
            at = both.nonzero().T
            self._made[key] = torch.stack([*at, first[at[0]]]) if at.numel() else None
        return self._made[key]

    def forward(self, x: Any) -> Any:
        """x: an nn.Sequential, whose last part this is, calls it."""
        return x

    def _is_seen_by_functions(self, model: nn.Module) -> bool:
        """Whether hooks hand activations to functions of autograd, which take dense ones."""
        if not self._backwards:
            parts = [*model.modules()]
            self._backwards = [
                hooks for part in parts for hooks in (part._backward_hooks, part._backward_pre_hooks)
            ]
        return any(self._backwards) or hasattr(type(model), "unshard")  # fully_shard's

    def hook(self, model: nn.Module) -> None:
        """Has each forward of `model` begin and end a draw."""
        model.register_forward_pre_hook(self.begin, prepend=True)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, *_: Any) -> None:
        """The model's forward begins: its layers are to see one draw."""
        stack = self._stack()
        self._forget_others()
        stack.append(self._draw(model))
        stack[-1].recurrent = {}
        if _checks.readable():
            stack[-1].averages = Averages()
        self._recent.append(stack[-1])
        if _checks.readable() and (node := stack[-1].z.grad_fn) is not None:
            cast(Any, node).metadata[NAME] = True

    def end(self, _: nn.Module, __: Any, out: Any) -> Any:
        """It ends; what it returns is dense."""
        stack = self._stack()
        if stack:
            draw = stack.pop()
            averages, draw.recurrent, draw.averages = draw.averages, None, None
            draw.twins = []
            if averages is not None:
                averages.settle(draw)
        return plain(out)

    def _forget_others(self) -> None:
        """At the begin and end of the capture of a CUDA graph: the draws hold the nodes that add to
        log_alpha.grad, each on the stream of its first forward, which no capture may be made to wait for."""
        device = self.gates[0].log_alpha.device
        captures = device.type == "cuda" and _checks.readable() and torch.cuda.is_current_stream_capturing()
        if captures != self._captures:
            self._captures = captures
            self._recent.clear()

    @property
    def runs(self) -> bool:
        """Whether the model's forward runs, or a checkpoint of it is computed again."""
        return bool(self._stack()) or (graph_task() != -1 and bool(self._recent) and self.training)

    def now(self) -> Draw:
        """The draw of the forward that runs; of a checkpoint computed again, that of its forward."""
        stack = self._stack()
        if stack:
            return stack[-1]
        if graph_task() != -1 and self._recent and self.training:
            return self._behind(current_node())
        if self._draws():
            raise RuntimeError(
                "a gated layer must be called by the forward of the model that gate_ has gated, which draws "
                "its gates: call that model, or eval() it"
            )
        return self._draw()

    def _draws(self) -> bool:
        layers = self.l0_layers
        return any(gate.draws for gate in self.gates) or (layers is not None and layers.draws)

    def _behind(self, node: Any) -> Draw:
        """The draw that the result of a node of autograd's graph, which a backward pass runs, comes from."""
        recent = [*self._recent]
        draws = {draw.z.grad_fn: draw for draw in recent if draw.z.grad_fn is not None}
        if node is None:
            return recent[-1]
        seen, front = {node}, [node]
        while front:
            behind = [other for node in front for other, _ in node.next_functions if other is not None]
            front = [node for node in dict.fromkeys(behind) if node not in seen]
            found = next((draws[node] for node in front if node in draws), None)
            if found is not None:
                return found
            if any(node.name() in _DRAWS and NAME in node.metadata for node in front):
                raise RuntimeError(
                    f"a checkpoint must be computed again before {_RECENT} more forwards, and before the "
                    "capture of a CUDA graph begins or ends"
                )
            seen.update(front)
        return recent[-1]

    def _stack(self) -> list[Draw]:
        found = self._local.__dict__.get("stack")
        if found is None:
            found = self._local.stack = []
        return found

    def closed_by_layers(self, values: Sequence[Tensor], of_layers: Tensor | None) -> list[Tensor]:
        """Values of the gates of each group, such as z or P(open), times those of the group's layer."""
        if of_layers is None:
            return [*values]
        pairs = zip(values, self.layered, strict=True)
        return [value if at is None else value * of_layers[at] for value, at in pairs]

    def p_open(self, openness: Callable[[HardConcreteGate], Tensor]) -> list[Tensor]:
        """How open the units of each gate are, flat: so far as their layer is."""
        of_layers = None if self.l0_layers is None else openness(self.l0_layers).flatten()
        return self.closed_by_layers([openness(gate).flatten() for gate in self.gates], of_layers)

    def _draw(self, model: nn.Module | None = None) -> Draw:
        gates = self.gates if self.l0_layers is None else [*self.gates, self.l0_layers]
        device = gates[0].log_alpha.device
        backend = _registry.resolve(device, torch.float32, "gated_conv2d")
        exact = device.type == "cpu" and _checks.readable() and (backend == "reference" or is_exact(backend))
        exact = exact and (model is None or not self._is_seen_by_functions(model))
        held = [gate.drawn if gate.training else None for gate in gates]
        joins = self.l0_layers is None and self.block == 1 and _checks.readable()
        joins = joins and draws_of(gates, held) is not None
        joins = joins and _registry.resolve(device, gates[0].log_alpha.dtype, "sample") != "reference"
        z = key = None
        if joins:
            of_bank = [one for one in held if one is not None]
            seed = None if of_bank else gates[0].fresh_seed()
            whole = [gate.gathered().flatten() for gate in gates]
            drawn, z = draw_joined(whole, of_bank or None, seed, gates[0].dist)
        else:
            found = draw(gates)
            if exact and all(gate.frozen for gate in gates):  # gates that stay the same objects
                key = (*map(id, found), *self.multiples, backend, torch.is_inference_mode_enabled())
                kept = self._local.__dict__.get("kept")
                if kept is not None and kept[0] == key:
                    return kept[2]
            drawn = self.spread([cast(Gates, one) for one in found])
        made = Draw(drawn, self.multiples, exact, "torch" if backend == "reference" else backend, z)
        if key is not None:
            self._local.kept = key, found, made
        return made

    def spread(self, drawn: Sequence[Gates]) -> list[Gates]:
        """The gates of the units of each group, from what is drawn for its gates and, behind, the layers'."""
        values = [gates.z for gates in drawn]
        of_layers = values.pop() if self.l0_layers is not None else None
        made = []
        for gates, z, group in zip(
            drawn, self.closed_by_layers(values, of_layers), self.groups, strict=False
        ):
            block = self.block_of(group)
            if block > 1:
                z = z.repeat_interleave(block)[: group.units]
            made.append(gates if z is gates.z else Gates.from_z(z, full_grad=False))
        return made

    def gate_groups(self) -> Iterator[tuple[HardConcreteGate, Tensor, int]]:
        """|g| = what one unit closes, of all of its layers, times the units of a block."""
        for group, gate in zip(self.groups, self.gates, strict=True):
            block = self.block_of(group)
            log_alpha, last = gate.whole(), group.units % block
            if not last:
                yield gate, log_alpha, group.parameters * block
                continue
            if len(log_alpha) > 1:
                yield gate, log_alpha[:-1], group.parameters * block
            yield gate, log_alpha[-1:], group.parameters * last
        if self.l0_layers is not None:
            log_alpha = self.l0_layers.whole()
            for group, at in zip(self.groups, self.layered, strict=True):
                if at is not None:
                    yield self.l0_layers, log_alpha[at : at + 1], group.parameters * group.units

    def l2_terms(self) -> Iterator[tuple[HardConcrete, L2Term]]:
        """None: :func:`penalty` asks the model that has the weights, see `sizes.L2Terms`."""
        return iter(())

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_local", "_backwards", "_recent", "_captures")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._local = threading.local()
        self._recent = deque(maxlen=_RECENT)

    def extra_repr(self) -> str:
        return "" if self.block == 1 else f"block={self.block}"


def can_close(group: Group) -> bool:
    """Whether a gate of its own may close all of a group: it is a layer's, and meets itself in no weight."""
    names = [member.name for member in group.members]
    return group.kind != "width" and len({*names}) == len(names)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by their first names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class GatedUnits:
    """Mixin of the layers that :func:`gate_` has gated; each stays an instance of its class."""

    _l0_units: Units
    _l0_class: ClassVar[type[nn.Module]]
    """That it is of without gates; a class that shards it may stand before its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class it is of, of open units."""
        return run(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self._l0_class,), self.__getstate__()


class GatedRecurrent(GatedUnits):
    """Mixin of recurrent ones."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class it is of, of open units."""
        return recurrent.run(self, *args, **kwargs)


class GatedAttention(GatedUnits):
    """Mixin of ``torch.nn.MultiheadAttention``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class it is of, of open heads."""
        return attention.run(self, *args, **kwargs)


class GatedLender(GatedUnits):
    """Mixin of a linear layer that lends its weight."""

    @property
    def weight(self) -> Tensor:
        """As the parameter; while the gated model runs, functions of torch see its gates."""
        return lent(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self._l0_class, True), cast(Any, self).__getstate__()


class GatedNorm(GatedUnits, ChannelAverages):
    """Mixin of batch norms."""


_gated: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _class_of(cls: type[nn.Module], lends: bool = False) -> type[nn.Module]:
    found = _gated.get((cls, lends))
    if found is None:
        attributes = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_l0_class": cls,
        }
        mixin: type[GatedUnits] = GatedUnits
        if issubclass(cls, nn.RNNBase | nn.RNNCellBase):
            mixin = GatedRecurrent
        elif issubclass(cls, nn.MultiheadAttention):
            mixin = GatedAttention
        elif issubclass(cls, AnyBatchNorm):
            mixin = GatedNorm
        elif lends:
            mixin = GatedLender
        found = _gated[cls, lends] = type(cls.__name__, (mixin, cls), attributes)
    return found


def _rebuilt(cls: type[nn.Module], lends: bool = False) -> nn.Module:
    gated = _class_of(cls, lends)
    return gated.__new__(gated)


def groups_of(model: nn.Module) -> GateGroups | None:
    """The gates that :func:`gate_` has put into `model`, or None."""
    found = model._modules.get(NAME)
    return found if isinstance(found, GateGroups) else None


def gate_(
    model: nn.Module,
    *args: Any,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    inputs: bool = False,
    residual: bool = True,
    kinds: Sequence[str] | None = None,
    layers: bool = False,
    block: int = 1,
    droprate_init: float = 0.5,
    lam: float = 0.1,
    eval_mode: str = "paper",
    dist: HardConcrete = DEFAULT_DIST,
    **kwargs: Any,
) -> UnitGraph:
    r"""Gates the units of any model, in place: closed ones are skipped in all layers around them.

    ``model(*args, **kwargs)`` is run once to find the units, see :func:`unit_graph`. Each group of them gets
    a :class:`HardConcreteGate`; a layer computes ``y = 1[z_out != 0] * f(x * z_in)``: what reads units
    multiplies them by z, what makes them computes the open ones. All gates are drawn at the beginning of the
    model's forward. Norms over units that may be closed are those of the open ones (in batch norms a closed
    channel keeps its statistics). The units of recurrent layers are their hidden units: closed ones are 0 at
    every time step, and z multiplies h_{t-1} where weight_hh reads it; the layers and directions of a stack
    share their gates.

    A ``torch.nn.TransformerEncoder`` makes no nested tensor of a padded batch: as in training it computes the
    padding, too.

    Layers stay instances of their classes, with their parameters, names, hooks, dtypes and devices;
    state_dict has the gates beside them, under ``l0_units``. :func:`penalty`, :class:`GateBank`,
    :func:`clamp_after_step`, :func:`open_units` and :func:`export` work as with every gated layer.

    On a CPU, in eager mode, activations between two layers hold the open units only, through the model's own
    forward: functions of torch that treat units one by one run on those, all others get a dense tensor.
    Elsewhere (a GPU, torch.compile, torch.func, meta tensors) shapes do not depend on the gates: activations
    are dense, closed units zero; linear layers skip inside, on a CPU ungrouped 2-D convolutions, too.

    Args:
        model: any module; its layers of torch.nn are what is gated.
        *args, **kwargs: an example of its inputs.
        include, exclude: which layers' outputs are gated: a regular expression that matches the whole name
            of a module, or a sequence of last parts of names. None: all, none.
        inputs: whether the inputs' features (channels, of images) are gated, too.
        residual: whether units that a sum of two branches carries are.
        kinds: which of "heads" (of attention; queries that share keys and values are one), "width" (of the
            residual stream) and "units" (all others); None: all.
        layers: whether each group of heads and units has one more gate, which closes all of them at once: z
            of a unit is then its own times that of its layer. Of an attention or a feed-forward network that
            is closed so the bias of the last projection is left. A layer that is not among `kinds` has that
            gate alone.
        block: so many units in a row share a gate; a head has its own.
        droprate_init, lam, eval_mode, dist: see :class:`HardConcreteGate`.

    Returns:
        What is gated, what is not, and why; it prints as a table.

    Raises:
        ValueError: no example or one that the model refuses, nothing to gate, a pattern that matches
            nothing, a block below 1, or a model that is gated already. The model is unchanged then.
    """
    check_ungated(model)
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block must be a positive int, got {block!r}")
    graph = unit_graph(model, *args, inputs=inputs, **kwargs)
    chosen = graph.select(include, exclude, residual, kinds)
    groups = [
        group
        for group in graph.select(include, exclude, residual)
        if group in chosen or (layers and can_close(group))
    ]
    if not groups:
        raise ValueError(f"model must have units to gate, got none:\n{graph}")
    gates = gated(
        model,
        groups,
        graph,
        args,
        kwargs,
        block,
        layers=layers,
        droprate_init=droprate_init,
        lam=lam,
        eval_mode=eval_mode,
        dist=dist,
    )
    for group, gate in zip(groups, gates.gates, strict=True):
        if group not in chosen:
            nn.init.constant_(gate.log_alpha, OPEN)
            gate.freeze_()
    return replace(graph, groups=tuple(groups))


def gated(
    model: nn.Module,
    groups: Sequence[Group],
    graph: UnitGraph,
    args: Any,
    kwargs: Any,
    block: int = 1,
    **options: Any,
) -> GateGroups:
    """Puts gates for `groups` into the model; args, kwargs: an example of its inputs."""
    first = next(iter(model.parameters()))
    gates = GateGroups(groups, block, device=first.device, dtype=first.dtype, **options)
    gates.example = example_of(args, kwargs, first.dtype)
    _place(model, gates, graph)
    _note_attentions(gates, graph)
    gates.train(model.training)
    return gates


def check_ungated(model: nn.Module) -> None:
    """ValueError where `gate_` has put gates into the model or a part of it."""
    for name, module in model.named_modules():
        if isinstance(module, GateGroups):
            raise ValueError(
                f"model must not be gated already, got gates in {name!r}; ungate_ takes them out"
            )


def _place(model: nn.Module, gates: GateGroups, graph: UnitGraph) -> None:
    labels: dict[tuple[str, int], Tensor] = {}
    tensors = tensors_of(model)
    start, total = 0, sum(group.units for group in gates.groups)
    for group in gates.groups:
        for member in group.members:
            key = member.name, member.dim
            found = labels.setdefault(key, torch.full((graph._sizes[key],), total, device="cpu"))
            found[member.index] = (start + torch.arange(group.units, device="cpu"))[:, None]
        start += group.units
    spaces = {key: gates.spaces.of(found) for key, found in labels.items()}
    placed: list[tuple[nn.Module, Units]] = []
    by_tensor = {(id(tensors[name]), dim): one for (name, dim), one in spaces.items() if name in tensors}
    for (name, dim), one in spaces.items():
        gates.places.setdefault(name, {})[dim] = one
        gates.whole_gate(one)
    for sides in gates.places.values():
        if sides.keys() == {0, 1}:
            gates.meeting(sides[0], sides[1])
    for name, module in model.named_modules():
        kind = POINTWISE if name in graph._pointwise else kind_of(module)
        if kind is None:
            continue

        def space(of: str, dim: int, module: nn.Module = module) -> Space | None:
            value = module._parameters.get(of)
            return by_tensor.get((id(module._buffers.get(of) if value is None else value), dim))

        if kind.is_product:
            units = Units(gates, kind, space("weight", kind.cols), space("weight", kind.rows))
            units = units._replace(lends=name in graph._lent)
            if getattr(module, "groups", 1) > 1:  # what it reads is what it makes, group by group
                outs = units.outs
                each = cast(int, module.out_channels) // cast(int, module.groups)
                ins = cast(int, module.in_channels) // cast(int, module.groups)
                if outs is not None:
                    of_inputs = outs.labels[::each].repeat_interleave(ins)
                    units = units._replace(ins=gates.spaces.of(of_inputs))
        elif kind.is_recurrent:
            first, second = recurrent_names(module)[:2]
            units = Units(gates, kind, space(first, 1), space(second, 1))
            recurrent.prepare(module, units)
        elif kind.name == "attention":
            units = attention.units_of(gates, kind, module, space)
        elif kind.name == "embedding":
            units = Units(gates, kind, None, space("weight", 1))
        elif kind is POINTWISE:
            units = Units(gates, kind, None, None)
        else:
            own = [space(of, 0) for of in ("weight", "bias", "running_mean")]
            outs = next((one for one in own if one is not None), spaces.get((f"{name}.", 0)))
            units = Units(gates, kind, None, outs)
        if kind is not POINTWISE and all(
            one is None for one in (units.ins, units.outs, *units.heads, *units.reads)
        ):
            continue
        placed.append((module, units))
        module.__dict__["_l0_units"] = units
        module.__class__ = _class_of(type(module), units.lends)
        if kind.is_bypassed:
            module.register_forward_pre_hook(leaves_no_fast_path)
    for name, encoder in nesting(model).items():
        if any(isinstance(part, GatedUnits) for part in encoder.modules()):
            encoder.use_nested_tensor = False
            gates.nesting.append(name)
    gates.normed = {units.outs for _, units in placed if units.kind.name == "batch_norm"}
    _round(gates, placed, total)
    model.add_module(NAME, gates)
    gates.hook(model)


def _note_attentions(gates: GateGroups, graph: UnitGraph) -> None:
    starts, total = {}, 0
    for group in gates.groups:
        starts[group.name] = total
        total += group.units
    for product in graph.attentions:
        of = [
            starts[head[0]] + head[1] if head is not None and head[0] in starts else total
            for head in product.heads
        ]
        space = gates.spaces.of(torch.tensor(of, device="cpu")) if any(at != total for at in of) else None
        gates.attentions.setdefault(product.module, []).append(space)


def _round(gates: GateGroups, placed: Sequence[tuple[nn.Module, Units]], total: int) -> None:
    """Sets the multiples: of what convolutions see, unless the statistics of a norm would see it, too."""
    convolved, compiled, exact = (torch.zeros(total + 1, dtype=torch.bool, device="cpu") for _ in range(3))
    few = few_taps()
    for layer, units in placed:
        for space in (units.ins, units.outs):
            if space is not None:
                convolved[space.labels] |= units.kind.spatial > 0
                compiled[space.labels] |= _is_compiled(layer, units.kind, few)
                exact[space.labels] |= units.kind.is_exact
    start = 0
    for at, group in enumerate(gates.groups):
        if convolved[start] and not exact[start]:
            of_all = group.units // NUMBERS // MULTIPLE * MULTIPLE if compiled[start] else 0
            gates.multiples[at] = max(MULTIPLE, of_all)
        start += group.units


def _is_compiled(layer: Any, kind: Kind, few: int) -> bool:
    """Whether oneDNN computes a layer, see `layers`: a convolution of which patches would be too many."""
    if not kind.is_product or kind.spatial == 0 or layer.groups > 1:
        return False
    return kind.spatial != 2 or kind.name != "conv" or layer.weight.shape[2:].numel() > few


def ungate_(model: nn.Module) -> nn.Module:
    """Undoes :func:`gate_`: the layers are dense again, their parameters as they are now.

    Raises:
        ValueError: the model is not gated.
    """
    gates = groups_of(model)
    if gates is None:
        raise ValueError(f"model must be gated by gate_, got a {type(model).__name__} that is not")
    for module in model.modules():
        if isinstance(module, GatedUnits):
            del module.__dict__["_l0_units"]
            if isinstance(module, ChannelAverages):
                module.forget_counts()
            module.__class__ = cast(Any, module)._l0_class
            _drop(module._forward_pre_hooks, leaves_no_fast_path)
    for name in gates.nesting:
        cast(Any, model.get_submodule(name)).use_nested_tensor = True
    _drop(model._forward_pre_hooks, gates.begin)
    _drop(model._forward_hooks, gates.end)
    for key in [k for k in model._forward_hooks_always_called if k not in model._forward_hooks]:
        del model._forward_hooks_always_called[key]
    del model._modules[NAME]
    return model


def relink(model: nn.Module) -> None:
    """Has the layers and hooks of a model that was copied module by module go by the copy of its gates."""
    for host in model.modules():
        gates = groups_of(host)
        if gates is None:
            continue
        for module in host.modules():
            if isinstance(module, GatedUnits):
                module.__dict__["_l0_units"] = module._l0_units._replace(groups=gates)
        for name in ("_forward_pre_hooks", "_forward_hooks"):  # which are those of the source
            hooks = vars(host)[name].items()
            others = [(key, hook) for key, hook in hooks if not _is_ours(hook)]
            host.__dict__[name] = OrderedDict(others)
        always = vars(host)["_forward_hooks_always_called"]
        kept = [(key, value) for key, value in always.items() if key in host._forward_hooks]
        host.__dict__["_forward_hooks_always_called"] = OrderedDict(kept)
        gates.hook(host)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), GateGroups)


def _drop(hooks: Any, hook: Any) -> None:
    for key in [key for key, value in hooks.items() if value == hook]:
        del hooks[key]
