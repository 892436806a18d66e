"""What containers do to units: which gates close the inputs and the outputs of each layer.

In ``nn.Sequential``, :class:`L0MLP` and :class:`L0Sequential`, however nested, an output unit (a channel, of
a convolution) of one layer is an input unit of the next if only modules stand between them that treat units
one by one. A closed input makes the unit useless to the layer before. A closed output is zero, and stays so
through modules with f(0) = 0: the layer behind can drop that input. Behind ``nn.Flatten`` a channel is as
many features as it has positions. A batch norm treats channels one by one, but of zeros it makes its bias:
only an :class:`L0BatchNorm2d` (1d, 3d) in an :class:`L0Sequential` knows which channels are closed, and keeps
them so.
It knows what its own container tells it: an L0Sequential or L0Residual in a plain ``nn.Sequential`` is called
with an input of which it knows nothing, whatever closed channels there are in it.
Everything else (another module, the two ends of an :class:`L0Residual`, the end of the container) is a
border, behind which every unit counts. An :class:`L0FeedForward` is a border, too; inside, its gate stands
between its two layers.

:func:`walk` finds this for counts and export, and for a forward what that may use: there the sum of two
branches is no border, but a norm of torch is, which has statistics of what nobody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from .._compat import AnyBatchNorm, AnyConv
from .batch_norm import L0BatchNorm
from .conv import (
    GatedConv,
    L0Conv1d,
    L0Conv2d,
    L0Conv3d,
    L0ConvTranspose1d,
    L0ConvTranspose2d,
    L0ConvTranspose3d,
)
from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .linear import L0Linear, is_hooked
from .mlp import ACTIVATIONS, L0MLP

Layer = nn.Linear | AnyConv
GateModules = tuple[HardConcreteGate, ...]

ZERO_KEEPING = {
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
}
POINTWISE = ZERO_KEEPING | {nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Sigmoid, nn.Softplus, nn.Threshold}
CHANNELWISE = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.ReflectionPad1d: 1,
    nn.ReflectionPad2d: 2,
    nn.ReflectionPad3d: 3,
    nn.ReplicationPad1d: 1,
    nn.ReplicationPad2d: 2,
    nn.ReplicationPad3d: 3,
    nn.ZeroPad1d: 1,
    nn.ZeroPad2d: 2,
    nn.ZeroPad3d: 3,
}
"""Of each channel by itself, and zero where that is zero: how many dimensions they work on, the last ones."""

CONVOLUTIONS: dict[type[Any], type[GatedConv]] = {
    nn.Conv1d: L0Conv1d,
    nn.Conv2d: L0Conv2d,
    nn.Conv3d: L0Conv3d,
    nn.ConvTranspose1d: L0ConvTranspose1d,
    nn.ConvTranspose2d: L0ConvTranspose2d,
    nn.ConvTranspose3d: L0ConvTranspose3d,
}
"""torch's, and their gated kin."""
PLAIN = (nn.Conv1d, nn.Conv2d)
"""Of these containers know torch's own, too."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

FEATURES = -1
"""Where the units of a value lie, as a dimension from its end: features in the last one."""

UNKNOWN = 0
"""A number of dimensions that no tensor has: that of what an unknown module returns."""


class TellsNorms:
    """Mixin of the containers that tell the norms in them the gates of their channels."""

    _known_forward: ClassVar[Callable[..., Any]]
    """A subclass with another does what nobody knows."""


def tells_norms(module: nn.Module) -> bool:
    """Whether `module` computes as L0Sequential or L0Residual."""
    return isinstance(module, TellsNorms) and type(module).forward is type(module)._known_forward


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether `module` runs its children one after the other."""
    if type(module).forward is nn.Sequential.forward:
        return True
    return isinstance(module, nn.Sequential) and tells_norms(module)


def is_residual(module: nn.Module) -> TypeGuard[Any]:
    """Whether `module` computes as L0Residual."""
    return tells_norms(module) and not isinstance(module, nn.Sequential)


def is_mlp(module: nn.Module) -> TypeGuard[L0MLP]:
    """Whether `module` computes as an L0MLP of linear layers."""
    return type(module).forward is L0MLP.forward and all(map(is_linear, cast(L0MLP, module).layers))


def is_container(module: nn.Module) -> TypeGuard[nn.Sequential | L0MLP]:
    """Whether the data flow through `module` is known: its flattened steps, one after the other."""
    return is_sequential(module) or is_mlp(module)


def is_feed_forward(module: nn.Module) -> TypeGuard[L0FeedForward]:
    """Whether `module` computes as an L0FeedForward of linear layers."""
    if type(module).forward is not L0FeedForward.forward:
        return False
    block = cast(L0FeedForward, module)
    return is_linear(block.up) and is_linear(block.down)


def is_product(module: nn.Module) -> TypeGuard[Layer]:
    """Whether `module` computes as a linear layer or convolution of torch.nn or of this package."""
    return is_linear(module) or is_conv(module)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes as nn.Linear or L0Linear; a subclass with a forward of its own may not."""
    return type(module).forward in (nn.Linear.forward, L0Linear.forward)


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `module` computes as nn.Conv2d or L0Conv2d."""
    return conv_kind(module) is nn.Conv2d


def conv_kind(module: nn.Module) -> type[Any] | None:
    """The convolution of torch as which `module` computes, gated or in PLAIN; None if it is none."""
    kind, forward = type(module), type(module).forward
    for dense, gated in CONVOLUTIONS.items():
        forwards = (dense.forward, gated.forward) if dense in PLAIN else (gated.forward,)
        if isinstance(module, dense) and forward in forwards:
            # torch's forward leaves a step to its subclasses
            same = getattr(kind, "_conv_forward", None) is getattr(dense, "_conv_forward", None)
            return dense if same else None
    return None


def is_conv(module: nn.Module) -> TypeGuard[AnyConv]:
    """Whether `module` computes as a gated convolution, or as nn.Conv1d or nn.Conv2d."""
    return isinstance(module, AnyConv) and conv_kind(module) is not None


def is_norm(module: nn.Module) -> TypeGuard[AnyBatchNorm]:
    """Whether `module` computes as nn.BatchNorm2d or an L0BatchNorm."""
    forward = type(module).forward
    if isinstance(module, L0BatchNorm):
        return forward is L0BatchNorm.forward
    return isinstance(module, nn.BatchNorm2d) and forward is nn.BatchNorm2d.forward


def is_flatten(module: nn.Module) -> bool:
    """Whether `module` makes one vector of each example."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def unit_dim(layer: Any, dim: int | None = None) -> int:
    """Where a linear layer, a convolution or a batch norm reads and writes its units, from the end.

    dim: where the value has its units, as far as that is known: a norm of (N, C) or (N, C, L) reads either;
        0 if it is not.
    """
    if isinstance(layer, nn.Linear):
        return FEATURES
    if isinstance(layer, AnyConv):
        return -1 - len(layer.kernel_size)
    if isinstance(layer, nn.BatchNorm1d):
        return dim if dim in (-1, -2) else 0
    return -4 if isinstance(layer, nn.BatchNorm3d) else -3


def treats_units(module: nn.Module, dim: int | None) -> bool:
    """Whether `module` treats each unit of a value by itself that has them at `dim`; None: nobody knows."""
    return type(module) in POINTWISE or is_channelwise(module, dim)


def keeps_zero(module: nn.Module, dim: int | None) -> bool:
    """Whether it does, and leaves a unit of zeros zero."""
    return type(module) in ZERO_KEEPING or is_channelwise(module, dim)


def is_channelwise(module: nn.Module, dim: int | None) -> bool:
    """Whether `module` is a pooling, padding or dropout of the units at `dim`."""
    spatial = CHANNELWISE.get(type(module))
    if spatial is None or dim is None or getattr(module, "return_indices", False):
        return False
    return dim < -spatial


def behind_flatten(dim: int | None, ndim: int | None) -> int | None:
    """Where the units at `dim` lie behind :func:`is_flatten`'s module; None where they are no units any more.

    A channel of a batch becomes several features. Of a single image the channels lie in the dimension that
    is left alone.

    Args:
        ndim: of the value; None: it is a batch of what has its units first.
    """
    if dim is None or ndim == UNKNOWN:
        return None
    if ndim is None:
        return None if dim == FEATURES else FEATURES
    if ndim <= 2:
        return dim
    return {0: -2, 1: FEATURES}.get(ndim + dim)


def units_in(layer: Any) -> int:
    """Input units of a linear layer, a convolution or a batch norm."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.num_features if is_norm(layer) else layer.in_channels


def units_out(layer: Any) -> int:
    """Output units of the same."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.num_features if is_norm(layer) else layer.out_channels


def own_gate(layer: nn.Module, side: str) -> Any:
    """The gate that `layer` has as in_gate or out_gate, None if it has none."""
    return getattr(layer, side) if isinstance(layer, _GATED) else None


def own_gates(layer: nn.Module, side: str) -> GateModules:
    """The same as a tuple, empty if it has none."""
    gate = own_gate(layer, side)
    return () if gate is None else (gate,)


def activation_name(module: nn.Module) -> str | None:
    """The name by which a packed chain knows the activation."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and getattr(module, "approximate", "none") == "none":
            return name
    return None


def gate_of(size: int, n: int, halves: bool = False) -> Tensor:
    """Which of `size` gates close each of n units: (n,), or (n, times) where they do so together.

    halves: whether the units are two halves that the gates close alike.
    """
    if size > n:
        return torch.arange(size).view(n, -1)
    n = n // 2 if halves else n
    of = torch.arange(n) // (n // size)
    return of.repeat(2) if halves else of


class Value(NamedTuple):
    """What is known of an activation.

    Attributes:
        closed: the gates whose closed units are exactly zero in it.
        dim: where its units lie, counted from its end; None: not known.
        ndim: how many dimensions it has, or UNKNOWN; None: it is a batch, where there is no tensor to ask.
    """

    closed: GateModules = ()
    dim: int | None = None
    ndim: int | None = None


NOTHING = Value()


class Read(NamedTuple):
    """All that is read of an activation: the units at a dimension from its end that gates leave open.

    Attributes:
        reader: the step that reads them.
        flat: whether nn.Flatten stands between.
    """

    gates: GateModules
    dim: int
    reader: "Step"
    flat: bool = False

    @staticmethod
    def agreed(first: "Read | None", second: "Read | None") -> "Read | None":
        """What two branches read alike."""
        if first is None or second is None or first[:2] != second[:2]:
            return None
        return first


_GATED = (L0Linear, GatedConv)
LAYERS = ("linear", "conv", "norm")


def kind_of(module: nn.Module) -> str:
    """What a step is; "units": what may treat them one by one; "other" of one of which nothing is known."""
    if type(module) in POINTWISE or type(module) in CHANNELWISE:
        return "units"
    for name, holds in _KINDS:
        if holds(module):
            return name
    return "other"


_KINDS: list[tuple[str, Callable[[nn.Module], bool]]] = [
    ("linear", is_linear),
    ("conv", is_conv),
    ("flatten", is_flatten),
    ("norm", is_norm),
    ("sequential", is_sequential),
    ("residual", is_residual),
    ("mlp", lambda module: type(module).forward is L0MLP.forward),
]


@dataclass(eq=False, slots=True)
class Step:
    """A module in a flattened container, and what there is of units around it.

    Attributes:
        kind: what it is, see :func:`kind_of`.
        scope: one object for all modules in a run of an L0Sequential or L0Residual, which tells norms the
            gates of their channels; None in plain containers.
        value: what is known of its input.
        told: the same as far as the container knows it that runs the norms here.
        read: what is read of its output; None: all.
        branches: of a residual, the steps of its body and of its shortcut.
    """

    module: Any
    kind: str
    scope: object | None = None
    value: Value = NOTHING
    told: Value = NOTHING
    read: Read | None = None
    branches: "tuple[list[Step], ...]" = ()

    @property
    def keeps_closed(self) -> bool:
        """Of a norm: whether closed channels are zero behind it."""
        return self.scope is not None and isinstance(self.module, L0BatchNorm)

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer, a convolution or a batch norm."""
        return self.kind in LAYERS

    @property
    def keeps_zero(self) -> bool:
        """Whether it treats each unit by itself, and leaves one of zeros zero."""
        return keeps_zero(self.module, self.value.dim)

    @property
    def dim(self) -> int:
        """Where a layer reads and writes its units, from the end."""
        return unit_dim(self.module, self.value.dim)

    @property
    def zeros(self) -> GateModules:
        """Of a norm: the gate whose closed channels it makes zero, where that is known from before it."""
        closed, dim, _ = self.told
        if not self.keeps_closed or dim != unit_dim(self.module, dim):
            return ()
        return self._closing(closed[:1])

    @property
    def in_gates(self) -> GateModules:
        """The gates that close a layer's inputs, its own and those of the layer before; a norm computes what
        it is asked for, of what is open.

        A gate that has fewer gates than there are inputs closes several at a time: those of a channel behind
        nn.Flatten.
        """
        if self.kind == "norm":
            return _union(self.zeros, self._wanted)
        closed = self.value.closed if self.value.dim == self.dim else ()
        return _union(self._closing(closed), own_gates(self.module, "in_gate"))

    @property
    def out_gates(self) -> GateModules:
        """The gates that close its outputs, its own and those of the layer behind.

        A gate that has more gates than there are outputs closes one where all of its features are closed.
        """
        own = self.zeros if self.kind == "norm" else own_gates(self.module, "out_gate")
        return _union(own, self._wanted)

    @property
    def leads(self) -> bool:
        """Whether a layer of the chain stands directly behind, which reads the units that this one writes."""
        read, n = self.read, units_out(self.module)
        if read is None or not self.dim or read.dim != self.dim:
            return False
        size = units_in(read.reader.module)
        if read.flat:
            return read.reader.kind == "linear" and read.dim != FEATURES and size % n == 0
        return n == size

    def gate_read(self, n: int) -> HardConcreteGate | None:
        """The gate that is all that is read of a layer's n units, one by one."""
        read = self.read
        if read is None or not read.gates or read.gates[0].n != n or read.dim != self.dim:
            return None
        return read.gates[0]

    @property
    def _wanted(self) -> GateModules:
        """The gates of what is read, but for those whose runs end within a channel's features."""
        n, read = units_out(self.module), self.read
        if read is None or not self.leads:
            return ()
        return tuple(gate for gate in read.gates if n % gate.n == 0 or gate.n % n == 0)

    def _closing(self, gates: GateModules) -> GateModules:
        """Those that close the units which the layer reads."""
        n = units_in(self.module)
        return tuple(gate for gate in gates if n % gate.n == 0)

    def behind(self, value: Value) -> Value:
        """What is known of the output, for an input of which `value` is."""
        module, (closed, dim, ndim) = self.module, value
        match self.kind:
            case "linear" | "conv":
                return Value(own_gates(module, "out_gate"), unit_dim(module), ndim)
            case "norm":
                place = unit_dim(module, dim)
                if ndim is not None and not isinstance(module, nn.BatchNorm1d):
                    ndim = 1 - place
                return Value(closed if self.keeps_closed else (), place or None, ndim)
            case "flatten":
                dim = behind_flatten(dim, ndim)
                return Value(() if dim is None else closed, dim, ndim and 2)
            case "units" if treats_units(module, dim):
                return Value(closed if closed and keeps_zero(module, dim) else (), dim, ndim)
        return Value(ndim=None if ndim is None else UNKNOWN)


def _union(a: GateModules, b: GateModules) -> GateModules:
    """The distinct gates of both, in order."""
    return tuple(dict.fromkeys(a + b)) if a and b else a or b


def steps_of(
    module: nn.Module | None, scope: object | None = None, executed: bool = False, running: bool = False
) -> list[Step]:
    """The steps of a container, containers in it flattened; any other module is one step.

    executed: whether they are for a forward: an L0MLP is one step, and so is a container that is watched,
        unless it is `running`.
    """
    if module is None:
        return []
    kind = kind_of(module)
    if kind in ("sequential", "residual"):
        if executed and not running and _is_watched(module):
            return [Step(module, "called", scope)]
        if scope is None and tells_norms(module):
            scope = [module]  # another one where it stands again
    if kind == "sequential":
        # Not children(), which leaves out a module that stands there a second time.
        return [step for child in cast(nn.Sequential, module) for step in steps_of(child, scope, executed)]
    if not executed and is_mlp(module):
        activation = ACTIVATIONS[module.activation]
        parts = [part for layer in module.layers for part in (layer, activation())][:-1]
        return [Step(part, kind_of(part), scope) for part in parts]
    return [Step(module, kind, scope)]


def _is_watched(container: nn.Module) -> bool:
    """Whether an inner container is to be called.

    A norm of open channels in it must know the gates around, which a call hides: then its hooks do not fire,
    but a forward set on the object is called all the same.
    """
    if not is_hooked(container):
        return False
    norms = any(isinstance(module, L0BatchNorm) for module in container.modules())
    return not norms or "forward" in container.__dict__


def walk(module: nn.Module, value: Value = NOTHING, executed: bool = False) -> list[Step]:
    """The steps of a container, for an input of which `value` is known.

    executed: as of :func:`steps_of`; what is read then goes through sums, and not through norms of torch.
    """
    steps = steps_of(module, executed=executed, running=True)
    _know(steps, value, value, executed)
    _read(steps, None, executed)
    return steps


def _know(steps: Sequence[Step], value: Value, told: Value, executed: bool) -> tuple[Value, Value]:
    """Notes what is known in front of each step, and returns what is behind all."""
    scope = steps[0].scope if steps else None
    for step in steps:
        if step.scope is not scope:
            scope, told = step.scope, Value(ndim=value.ndim)
        step.value, step.told = value, told
        if step.kind == "residual":
            body = steps_of(step.module.body, scope, executed)
            shortcut = steps_of(step.module.shortcut, scope, executed)
            step.branches = body, shortcut
            ends = [_know(branch, value, told, executed)[1] for branch in step.branches]
            told = value = _sum(*ends)  # sums and norms know, of what is zero, what their container tells
            continue
        behind = step.behind(told)
        value = behind if value is told or step.kind == "norm" else step.behind(value)
        told = behind
    return value, told


def _sum(body: Value, shortcut: Value) -> Value:
    """What is known of the sum of two branches."""
    ndim = body.ndim
    if ndim is not None:  # branches broadcast
        ndim = max(ndim, shortcut.ndim or 0) if ndim and shortcut.ndim else UNKNOWN
    if body.dim != shortcut.dim:
        return Value(ndim=ndim)
    return Value(tuple(gate for gate in body.closed if gate in shortcut.closed), body.dim, ndim)


def _read(steps: Sequence[Step], read: Read | None, executed: bool) -> Read | None:
    """Notes what is read behind each step, and returns what they read."""
    for step in reversed(steps):
        step.read = read
        read = _read_by(step, read, executed)
    return read


def _read_by(step: Step, read: Read | None, executed: bool) -> Read | None:
    module, value = step.module, step.value
    match step.kind:
        case "linear" | "conv":
            return Read(own_gates(module, "in_gate"), unit_dim(module), step)
        case "mlp" if executed:
            return _read_by(Step(module.layers[0], kind_of(module.layers[0])), None, executed)
        case "norm" if step.keeps_closed or not executed:
            return Read(step.in_gates, step.dim, step)
        case "residual":
            first, second = (_read(branch, read if executed else None, executed) for branch in step.branches)
            return Read.agreed(first, second) if executed and module.shortcut is not None else None
        case "flatten" if read is not None and value.dim is not None:
            behind = behind_flatten(value.dim, value.ndim)
            return read._replace(dim=value.dim, flat=True) if read.dim == behind else None
        case "units" if read is not None and treats_units(module, read.dim):
            return read
    return None
