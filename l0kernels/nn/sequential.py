"""The container that keeps activations packed from layer to layer, and the sum of two branches."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _registry
from .._compat import AnyBatchNorm
from ..conv2d import Packed, is_exact, packed_conv2d, unpack_channels
from ..gates import Gates, attach
from ..linear import gated_linear, linear
from ..mlp import chain, gated_mlp
from .batch_norm import L0BatchNorm
from .conv import GatedConv
from .gate import HardConcreteGate, Unscriptable, draw, draws_of, enter, leave
from .linear import (
    L0Linear,
    gates_of_units,
    has_gates_beside,
    has_runs,
    is_hooked,
    is_only_weight,
    over_rows,
)
from .notices import watch_shared
from .ranks import held, is_sharded
from .steps import (
    UNKNOWN,
    Step,
    TellsNorms,
    Value,
    activation_name,
    is_conv2d,
    own_gate,
    steps_of,
    walk,
)

Drawn = Mapping[HardConcreteGate, Gates]


class _Container(TellsNorms, Unscriptable):
    """What L0Sequential and L0Residual share."""

    _norms: dict[str, str]
    """The names of the norms of open channels, as the container was made, and their kinds."""

    def _set_norms(self) -> None:
        modules = cast(nn.Module, self).named_modules()
        self._norms = {name: _kind(module) for name, module in modules if isinstance(module, L0BatchNorm)}

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of torch.nn.Module, but for what convert_sync_batchnorm puts in place of an L0BatchNorm."""
        before = cast(nn.Module, self)._modules.get(name)
        if isinstance(module, nn.SyncBatchNorm) and isinstance(before, L0BatchNorm):
            _refuse_sync(name, _kind(before))
        super().add_module(name, module)  # type: ignore[misc]

    def check_norms(self) -> None:
        """RuntimeError where that happened within a container of torch."""
        for name, kind in self._norms.items():
            if isinstance(cast(nn.Module, self).get_submodule(name), nn.SyncBatchNorm):
                _refuse_sync(name, kind)


def _kind(norm: L0BatchNorm) -> str:
    return f"L0{norm.dense.__name__}"


def _refuse_sync(name: str, kind: str) -> None:
    raise RuntimeError(
        f"{name!r} must be the {kind} that it was, got a SyncBatchNorm, which knows of no closed "
        f"channels: leave {kind} out of SyncBatchNorm.convert_sync_batchnorm"
    )


class L0Sequential(_Container, nn.Sequential):
    r"""``torch.nn.Sequential`` that draws its gates at once and keeps activations packed between its layers.

    The values are those of its modules one after the other, but for the batch norms::

        g = nn.HardConcreteGate(64)
        nn.L0Sequential(
            torch.nn.Conv2d(16, 64, 3, padding=1, bias=False),   # computes what g leaves open
            nn.L0BatchNorm2d(64),                                # statistics of open channels; closed stay 0
            torch.nn.ReLU(),
            nn.L0Conv2d(64, 32, 3, gate="in", in_gate=g),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            nn.L0Linear(32 * 8 * 8, 10),
        )

    - Every gate in it, in nested containers, too, is drawn once per forward, all of them in one call; layers
      that share a gate agree on it. What a :class:`GateBank` has drawn is respected.
    - An :class:`L0BatchNorm2d` normalises the channels that are open under the output gate of the layer
      before, or else under the input gate of the next layer; the others are exactly 0.
    - Between convolutions only open channels exist: through activations with act(0) = 0, pooling, padding,
      dropout, L0BatchNorm2d, :class:`L0Residual`, and through ``nn.Flatten`` into linear layers, whose
      columns of closed channels are not touched. A convolution without an output gate, a plain ``nn.Conv2d``,
      too, computes only the channels that the next gated layer takes. In front of any other module all
      channels come back, closed ones as zeros; a plain ``nn.BatchNorm2d`` makes constants of them.
    - Linear layers with gates on their inputs and one activation between them run as :class:`L0MLP` does.
    - Units are told by the dimension that a layer reads. In front of a linear layer over the columns of
      images, and of Flatten of a single image, all channels come back.
    - Dropout draws for the channels that exist: it drops others than the modules one by one would.

    A layer or an inner container with hooks, or a forward set on the object, is called by itself, what goes
    in and comes out unpacked; gates in it are drawn with the others. Hooks of an inner container that holds
    an :class:`L0BatchNorm2d` do not fire: the norm must know the gates around.
    Unbatched inputs run one by one, unpacked. Compiled, traced and under torch.func no shape depends on the
    gates: each layer computes what is open, and closed channels are there as zeros.

    A gate in front of a batch norm loses its data gradient, since the norm divides it away: for a layer with
    an output gate directly before one, as the paper's wide residual nets have it, a UserWarning names it.

    Args:
        *args: modules, or one OrderedDict of them, as for ``torch.nn.Sequential``.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._set_norms()
        _warn_of_gates_before_norms(self)

    def forward(self, x: Tensor, drawn: Drawn | None = None) -> Tensor:
        """The modules one after the other.

        Args:
            x: what the first module takes.
            drawn: detached gates drawn beforehand, used instead of a draw where they are given.

        Returns:
            What the last module returns, all channels in it.
        """
        return _forward(_as_kind(self, L0Sequential), x, drawn)

    _known_forward = forward


class L0Residual(_Container, nn.Module):
    r"""``shortcut(x) + body(x)``, with the rules of :class:`L0Sequential` inside and in an outer one.

    Two branches that end in channels packed by one and the same gate are added packed. If the next layer
    behind the sum has gates on its inputs, both branches compute only what it takes.

    Args:
        body: a module, e.g. an :class:`L0Sequential`.
        shortcut: another one; None: the identity.
    """

    shortcut: nn.Module | None

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self._set_norms()
        _warn_of_gates_before_norms(self)

    def forward(self, x: Tensor, drawn: Drawn | None = None) -> Tensor:
        """x -> shortcut(x) + body(x); `drawn` as in :meth:`L0Sequential.forward`."""
        return _forward(_as_kind(self, L0Residual), x, drawn)

    _known_forward = forward


@dataclass(eq=False, slots=True)
class _Op:
    """How one step, or a stretch of linear layers, is executed.

    Attributes:
        run: the method of _Forward that does it.
        module: of the step; the first layer of a stretch.
        gates: a layer's own in_gate and out_gate and its out_support; of a norm, the gate of its channels.
        layers, activation: of a stretch.
        branches: of a residual, the body and the shortcut.
    """

    run: str
    module: nn.Module
    gates: tuple[HardConcreteGate | None, ...] = ()
    layers: tuple[nn.Linear, ...] = ()
    activation: str = "identity"
    repack: bool = False
    branches: "tuple[list[_Op], list[_Op] | None] | None" = None

    def own_gates(self) -> Iterator[HardConcreteGate | None]:
        """The gates that this op draws, in the order of modules()."""
        if self.run == "conv" or self.run == "linear":
            yield from self.gates[:2]
        elif self.run == "called":
            for part in self.module.modules():
                if isinstance(part, HardConcreteGate) and part.log_alpha.ndim == 1:
                    yield None if is_sharded(part.log_alpha) else part
        for layer in self.layers:
            yield own_gate(layer, "in_gate")
        for branch in self.branches or ():
            for op in branch or ():
                yield from op.own_gates()


def _plan(steps: Sequence[Step]) -> list[_Op]:
    """The ops of the steps; linear layers that are one packed chain are one."""
    ops: list[_Op] = []
    end = len(steps)
    while end:
        start = _stretch_start(steps, end - 1)
        ops.append(_op(steps[end - 1]) if start is None else _stretch(steps[start:end]))
        end = end - 1 if start is None else start
    return ops[::-1]


def _op(step: Step) -> _Op:
    module, kind = step.module, step.kind
    match kind:
        case "mlp":
            repack = module.repack_in_backward
            return _Op("stretch", module, (), tuple(module.layers), module.activation, repack)
        case "linear" | "conv":
            own, out_gate = own_gate(module, "in_gate"), own_gate(module, "out_gate")
            support = step.gate_read(module.out_channels) if kind == "conv" and out_gate is None else None
            return _Op(kind, module, (own, out_gate, support))
        case "norm" if step.keeps_closed:
            return _Op("norm", module, step.zeros or (step.gate_read(module.num_features),))
        case "residual":
            body, shortcut = map(_plan, step.branches)
            return _Op("residual", module, branches=(body, None if module.shortcut is None else shortcut))
        case "called" | "flatten":
            return _Op(kind, module)
    return _Op("keep" if step.keeps_zero else "other", module)


def _stretch(steps: Sequence[Step]) -> _Op:
    layers = tuple(step.module for step in steps if step.kind == "linear")
    between = [activation_name(step.module) for step in steps if step.kind != "linear"]
    return _Op("stretch", layers[0], (), layers, (between and between[0]) or "identity")


def _stretch_start(steps: Sequence[Step], end: int) -> int | None:
    """Where the longest stretch begins that ends with the step `end` and is one packed chain, if any does."""
    if not _chains(steps[end]):
        return None
    start, activation, gated = end, None, own_gate(steps[end].module, "in_gate") is not None
    while start:
        name, before = "identity", start - 1
        if steps[before].kind != "linear":
            found = activation_name(steps[before].module)
            if found is None or is_hooked(steps[before].module) or not before:
                break
            name, before = found, before - 1
        if activation not in (None, name) or not _chains(steps[before]):
            break
        activation, start = name, before
        gated = gated or own_gate(steps[start].module, "in_gate") is not None
    return start if gated else None


def _chains(step: Step) -> bool:
    """Whether it is a linear layer that is gated on its inputs at most."""
    if step.kind != "linear" or is_hooked(step.module):
        return False
    return not has_gates_beside(step.module, "in_gate") and not has_runs(step.module)


class _Flat(NamedTuple):
    """Packed channels behind nn.Flatten: (N, channels * positions), closed ones zero, and which those are.

    Products skip the columns of closed channels. Were these left out of data, the weight's would have to be
    copied out, and that takes longer.
    """

    data: Tensor
    gates: Gates
    positions: int

    def within(self, own: Gates | None) -> Gates:
        """The gates of the columns: `own`, closed where their channel is."""
        is_open = (self.gates.z != 0)[:, None].expand(-1, self.positions).flatten()
        if own is None:
            return Gates.from_z(is_open.to(self.gates.z.dtype), full_grad=False)
        return Gates.from_z(own.z.masked_fill(~is_open, 0), full_grad=own.full_grad)


Activation = Tensor | Packed | _Flat


def _as_kind(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """`module`, or the container that a subclass with a forward of its own means by super().forward."""
    if type(module).forward is kind.forward:
        return module
    plain = kind.__new__(kind)
    plain.__dict__ = module.__dict__
    return plain


def _forward(module: Any, x: Any, given: Drawn | None) -> Tensor:
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "x must be a torch.Tensor, got a Proxy of torch.fx; torch.export traces this container"
        )
    ops = _plan(walk(module, Value(ndim=x.ndim if isinstance(x, Tensor) else UNKNOWN), executed=True))
    gates = list(dict.fromkeys(gate for op in ops for gate in op.own_gates() if gate is not None))
    given = given or {}
    missing = [gate for gate in gates if gate not in given]
    watch_shared(module, missing, x)
    with torch.no_grad():  # the ops that take log_alpha itself need no node between z and it
        fresh = draw(missing)
    drawn = {gate: given[gate] for gate in gates if gate in given}
    drawn.update((gate, gates) for gate, gates in zip(missing, fresh, strict=True) if gates is not None)
    return _dense(_Forward(module, drawn).run(ops, x))


def _dense(x: Activation) -> Tensor:
    if isinstance(x, Packed):
        return unpack_channels(x)
    return x.data if isinstance(x, _Flat) else x  # whatever the modules return: pooling has indices, too


class _Forward:
    """One forward of a plan with the gates drawn for it."""

    def __init__(self, container: _Container, drawn: Drawn) -> None:
        self._container = container
        self._drawn = drawn
        self._attached: dict[HardConcreteGate, Gates] = {}

    def run(self, ops: Sequence[_Op], x: Activation) -> Activation:
        for op in ops:
            x = getattr(self, op.run)(op, x)
        return x

    def gates(self, gate: HardConcreteGate | None) -> Gates | None:
        """The drawn gates, joined to log_alpha; one object, by which the ops know that gates are the same."""
        if gate is None:
            return None
        found = self._attached.get(gate)
        if found is None:
            found = self._drawn[gate] if gate in self._drawn else gate.forward()
            if gate.training and gate in self._drawn:
                found = attach(gate.log_alpha.flatten(), found, gate.dist)
            self._attached[gate] = found
        return found

    def conv(self, op: _Op, x: Activation) -> Activation:
        layer = op.module
        in_gates, out_gates, support = map(self.gates, op.gates)
        of_weights = isinstance(layer, GatedConv) and layer.weight_gate is not None
        if not is_conv2d(layer) or is_hooked(layer) or not _packs(x) or of_weights:
            x = _dense(x)
            if not isinstance(layer, GatedConv):
                return layer(x)
            given = [held(layer, gates) for gates in (in_gates, out_gates, support)]
            return layer(x, None, *given) if layer.transposed else layer(x, *given)
        if isinstance(layer, GatedConv):
            in_gates, out_gates = layer.of_channels(in_gates, out_gates)
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            sides, mode, padding = layer._reversed_padding_repeated_twice, layer.padding_mode, 0
            x = _mapped(x, lambda t: F.pad(t, sides, mode=mode))
        return packed_conv2d(
            cast("Tensor | Packed", x),
            layer.weight,
            layer.bias,
            cast(Any, layer.stride),
            padding,
            cast(Any, layer.dilation),
            layer.groups,
            in_gates=in_gates,
            out_gates=out_gates,
            out_support=support,
        )

    def norm(self, op: _Op, x: Activation) -> Activation:
        if isinstance(x, Packed) and not is_hooked(op.module):
            return op.module(x)
        norm = cast(L0BatchNorm, op.module)
        return norm(_dense(x), gates_of_units(self.gates(op.gates[0]), op.gates[0], norm.num_features))

    def keep(self, op: _Op, x: Activation) -> Activation:
        return op.module(_dense(x)) if is_hooked(op.module) else _mapped(x, op.module)

    def other(self, op: _Op, x: Activation) -> Activation:
        if isinstance(op.module, nn.SyncBatchNorm):
            self._container.check_norms()
        return op.module(_dense(x))

    def called(self, op: _Op, x: Activation) -> Activation:
        before = [
            (gate, enter(gate, self._drawn[gate]))
            for gate in op.own_gates()
            if gate in self._drawn and gate is not None and gate.training
        ]
        try:
            return op.module(_dense(x))
        finally:
            for gate, held_before in before:
                leave(gate, held_before)

    def flatten(self, op: _Op, x: Activation) -> Activation:
        data = op.module(_dense(x))
        if not isinstance(x, Packed) or (is_exact(x.backend) and x.data.shape[1] == x.channels):
            return data
        return _Flat(data, x.gates, data.shape[1] // x.channels)

    def linear(self, op: _Op, x: Activation) -> Activation:
        layer = cast(nn.Linear, op.module)
        in_gates, out_gates = map(self.gates, op.gates[:2])
        gated = layer if isinstance(layer, L0Linear) else None
        weight_gated = gated is not None and gated.weight_gate is not None
        if not isinstance(x, _Flat) or is_hooked(layer) or weight_gated:
            x = _dense(x)
            return layer(x) if gated is None else gated(x, held(gated, in_gates), held(gated, out_gates))
        weight, bias = layer.weight, layer.bias
        if gated is not None:
            in_gates = gates_of_units(in_gates, gated.in_gate, gated.in_features)
            out_gates = gates_of_units(out_gates, gated.out_gate, gated.out_features)
        return gated_linear(x.data, weight, bias, in_gates=x.within(in_gates), out_gates=out_gates)

    def stretch(self, op: _Op, x: Activation) -> Activation:
        if isinstance(x, Tensor) and x.is_nested:
            return over_rows(x, lambda rows: cast(Tensor, self.stretch(op, rows)))
        own: list[HardConcreteGate | None] = [own_gate(layer, "in_gate") for layer in op.layers]
        beside = any(has_gates_beside(layer, "in_gate") for layer in op.layers)
        if beside or is_hooked(op.module) or not all(map(is_only_weight, op.layers)):
            return op.module(_dense(x), [held(op.module, gates) for gates in map(self.gates, own)])
        weights: list[Tensor] = [layer.weight for layer in op.layers]
        biases: list[Tensor | None] = [layer.bias for layer in op.layers]
        drawn = [None if gate is None else self._drawn.get(gate) for gate in own]
        sources = None if isinstance(x, _Flat) or not any(drawn) else draws_of(own, drawn)
        if sources is not None:
            dist = next(gate.dist for gate in own if gate is not None)
            rows = _dense(x)
            if len(own) == 1:
                return linear(rows, weights[0], biases[0], sources[0], None, None, dist)
            return chain(rows, weights, biases, sources, op.activation, op.repack, None, dist)
        first = x.within(self.gates(own[0])) if isinstance(x, _Flat) else self.gates(own[0])
        gates = [first, *map(self.gates, own[1:])]
        return gated_mlp(_dense(x), weights, biases, gates, op.activation, repack_in_backward=op.repack)

    def residual(self, op: _Op, x: Activation) -> Activation:
        assert op.branches is not None
        body, shortcut = op.branches
        if isinstance(x, Packed) and (_unpacks(body) or _unpacks(shortcut or [])):
            x = _dense(x)  # once: a module that works in place is to change what both branches see
        a = x if shortcut is None else self.run(shortcut, x)
        b = self.run(body, x)
        if isinstance(a, Packed) and isinstance(b, Packed) and a.gates.index is b.gates.index:
            return replace(a, data=a.data + b.data)
        return _dense(a) + _dense(b)


def _unpacks(ops: Sequence[_Op]) -> bool:
    """Whether ops begin, behind such as may hand on the memory of their input, with one that unpacks it."""
    for op in ops:
        if op.run == "residual" and op.branches is not None:
            return any(map(_unpacks, (op.branches[0], op.branches[1] or ())))
        if op.run != "keep" or is_hooked(op.module):
            return op.run in ("keep", "other", "called")
    return False


def _packs(x: Activation) -> bool:
    """Whether a convolution of x may return packed channels."""
    if isinstance(x, Tensor):
        if type(x) not in (Tensor, nn.Parameter) or x.ndim != 4 or x.device.type == "meta":
            return False
        return _registry.resolve(x.device, x.dtype, "gated_conv2d") != "reference"
    return isinstance(x, Packed)


def _mapped(x: Activation, fn: Callable[[Tensor], Tensor]) -> Activation:
    """A function that treats units one by one and keeps zeros, on the units that exist."""
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, _Flat):
        return x._replace(data=fn(x.data))
    if x.data.shape[1]:
        return x.map(fn)
    # Pooling refuses tensors without channels: it gets one, of zeros.
    return x.map(lambda data: fn(F.pad(data, (0, 0, 0, 0, 0, 1)))[:, :0])


def _warn_of_gates_before_norms(container: nn.Module) -> None:
    """A UserWarning for each output gate directly before a batch norm; inner containers have said theirs."""
    names = {module: name for name, module in container.named_modules()}
    silent: set[tuple[nn.Module, nn.Module]] = set()
    for module in container.modules():
        if module is not container and _warns(module):
            silent.update(_gates_before_norms(module))
    for layer, norm in _gates_before_norms(container):
        if (layer, norm) not in silent:
            warnings.warn(
                f"{names[layer]!r} multiplies its outputs by gates directly before the batch norm "
                f"{names[norm]!r}, which divides the gates away: they get next to no gradient from the data. "
                "Gate the inputs of the next layer instead (see L0Conv2d)",
                UserWarning,
                stacklevel=3,
            )


def _warns(module: nn.Module) -> bool:
    return isinstance(module, L0Sequential | L0Residual)


def _gates_before_norms(module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of an output-gated layer and the batch norm directly behind it, in one container."""
    if isinstance(module, L0Residual):
        branches = [steps_of(module.body, executed=True), steps_of(module.shortcut, executed=True)]
    else:
        branches = [steps_of(module, executed=True, running=True)]
    return [
        (a.module, b.module)
        for steps in branches
        for a, b in pairwise(steps)
        if own_gate(a.module, "out_gate") is not None and isinstance(b.module, AnyBatchNorm)
    ]
