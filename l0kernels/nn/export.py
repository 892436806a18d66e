"""The trained model without gates: closed units sliced away, open ones folded into the weights."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import _checks
from .._compat import AnyBatchNorm
from .bank import GateBank
from .batch_norm import L0BatchNorm
from .conv import GatedConv
from .feed_forward import L0FeedForward
from .gate import GatedLayer, HardConcreteGate, gate_modules, leaves_no_fast_path
from .linear import L0Linear, over_runs
from .mlp import L0MLP
from .norm import L0GroupNorm, L0LayerNorm, L0RMSNorm, plain_norm
from .ranks import gathered
from .reads import Reads, is_foreign, reads_of
from .sequential import L0Residual, L0Sequential
from .steps import (
    NORMS,
    UNKNOWN,
    GateModules,
    Step,
    Value,
    conv_kind,
    gate_of,
    is_container,
    is_conv,
    is_feed_forward,
    is_linear,
    is_norm,
    is_product,
    is_residual,
    is_sequential,
    own_gate,
    own_gates,
    units_in,
    units_out,
    walk,
)
from .units.example import Inputs
from .units.place import GatedUnits, GateGroups, relink
from .units.shrink import narrowed, set_sizes, shrunk

UNIT_NORMS = (L0LayerNorm, L0RMSNorm, L0GroupNorm)
LISTS = (nn.ModuleList, nn.ModuleDict)
CONTENTS = {
    L0MLP: {"activation", "draw", "layers", "repack_in_backward"},
    L0FeedForward: {"activation", "activation_module", "d_hidden", "d_model", "down", "up"},
    L0Residual: {"body", "shortcut"},
}
"""What a forward may ask of a module beside calling it."""


class SelectInputs(nn.Module):
    """The features that an exported model reads: ``x[..., index]``, or channels: ``x[:, index]``.

    Args:
        index: (n,) int64, positions in [0, in_features); a buffer.
        in_features: width of x.
        dim: of x, counted from the end: -1 for features, -3 for the channels of images.
    """

    index: Tensor

    def __init__(self, index: Tensor, in_features: int, dim: int = -1) -> None:
        super().__init__()
        self.in_features = in_features
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features, ...) -> (..., n, ...)."""
        if x.shape[self.dim] != self.in_features:
            trailing = "".join([", *"] * (-1 - self.dim))
            raise ValueError(f"x must have shape (..., {self.in_features}{trailing}), got {x.shape}")
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.in_features}{_dim(self.dim)}"


class ScatterOutputs(nn.Module):
    """The outputs of an exported model in their places, zeros elsewhere: ``y[..., index] = x``.

    Args:
        index: (n,) int64, positions in [0, out_features); a buffer.
        out_features: width of y.
        dim: of x, counted from the end: -1 for features, -3 for the channels of images.
    """

    index: Tensor

    def __init__(self, index: Tensor, out_features: int, dim: int = -1) -> None:
        super().__init__()
        self.out_features = out_features
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n, ...) -> (..., out_features, ...)."""
        shape = list(x.shape)
        shape[self.dim] = self.out_features
        return x.new_zeros(shape).index_copy(self.dim, self.index, x)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.out_features}{_dim(self.dim)}"


class Residual(nn.Module):
    """An exported :class:`L0Residual`: ``shortcut(x) + body(x)``.

    Args:
        body, shortcut: plain modules.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x -> shortcut(x) + body(x)."""
        return self.shortcut(x) + self.body(x)


class _Sliced:
    """A layer of which some units are closed: all of its inputs, what is left of it, all of its outputs.

    Attributes:
        parts: SelectInputs, the smaller layer, ScatterOutputs; of those around it only what is needed.
    """

    def __init__(self, layer: Any, parts: list[nn.Module]) -> None:
        nn.Module.__init__(cast(nn.Module, self))
        for name in (*layer.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.parts = nn.Sequential(*parts)

    @property
    def weight(self) -> Any:
        """Of the smaller layer."""
        return self._smaller.weight

    @property
    def bias(self) -> Any:
        """Of the smaller layer."""
        return self._smaller.bias

    @property
    def _smaller(self) -> Any:
        return next(part for part in self.parts if is_product(part))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, in all sizes."""
        return self.parts(x)

    __jit_unused_properties__: ClassVar = ["weight", "bias", "_smaller"]


class SlicedLinear(_Sliced, nn.Linear):  # type: ignore[override]
    """An exported :class:`L0Linear` in a module that calls it: an ``nn.Linear`` of open units within."""


class SlicedConv1d(_Sliced, nn.Conv1d):  # type: ignore[override]
    """An exported :class:`L0Conv1d` in a module that calls it: an ``nn.Conv1d`` of open channels within."""


class SlicedConv2d(_Sliced, nn.Conv2d):  # type: ignore[override]
    """An exported :class:`L0Conv2d` in a module that calls it: an ``nn.Conv2d`` of open channels within."""


def _dim(dim: int) -> str:
    return "" if dim == -1 else f", dim={dim}"


def export(
    model: nn.Module,
    *,
    batched: bool = True,
    multiple_of: int = 1,
    keep: float | Mapping[str, float] | None = None,
    cost: Any = "params",
    input_shape: Inputs | None = None,
    evenly: bool = False,
) -> nn.Module:
    """A smaller model of plain torch modules with the outputs of ``model.eval()``, itself in eval mode.

    Every L0Linear becomes an ``nn.Linear`` and every L0Conv2d an ``nn.Conv2d`` of its open units, every
    :class:`L0MLP`, :class:`L0Sequential` and ``nn.Sequential`` one flat ``nn.Sequential``, every
    :class:`L0FeedForward` an ``nn.Sequential`` of two ``nn.Linear`` and the activation (or a
    :class:`GatedProduct`) between them, every :class:`L0BatchNorm2d` an ``nn.BatchNorm2d`` of the open
    channels and every :class:`L0Residual` a :class:`Residual`. Closed hidden units vanish from both layers
    around them, ungated neighbours included (see :func:`expected_l0` for what a neighbour is). Closed
    features and channels at the borders are left out by :class:`SelectInputs` and put back as zeros by
    :class:`ScatterOutputs`, which appear only where something is closed. Of a grouped convolution whole
    groups vanish, and a group that stays keeps its closed channels. Weight and block gates leave a dense
    weight with zeros.

    Any other module is copied, its children exported one by one. A layer in it becomes one module of the same
    kind and sizes (:class:`SlicedLinear`, :class:`SlicedConv1d`, :class:`SlicedConv2d`) where units of it are
    closed; in a module of torch.nn, which may read its weight, an ``nn.Linear`` with zeros. A container in it
    becomes a flat one if the forwards around it do no more than call it.

    What cannot be left out is kept: a copy of the gated module whose gates are frozen, evaluation gates for
    good (:meth:`HardConcreteGate.freeze_`). Kept are gates in modules of other kinds, layers that a forward
    around them hands gates or reads the values of, subclasses with a forward of their own, and what has hooks
    on it or in it. The weight of a layer with gates, or with closed neighbours, is as it is now: there end
    ``parametrize``, ``prune``, ``weight_norm`` and ``spectral_norm``, computed in eval() without a step of
    their buffers. A weight that two such layers share becomes one for each.

    A model that :func:`gate_` has gated keeps its classes and forwards: its layers are of their own classes
    again, without their closed units, z in the columns that read the open ones, and say so in their sizes.
    The result is run on random inputs like the example that gate_ was given. Groups of units that meet a size
    which stands in a forward stay whole, closed units all zeros, as do features of the model's inputs; a
    layer, RMS or group norm over them is one of the open ones, a class of ours. Of a group without an open
    unit one of zeros stays. A weight that two layers share, of which one multiplies it by z, becomes one for
    each.

    With `keep` it is cut to a size: not the evaluation gates say what is open, but the order of P(z > 0), of
    which as many gates stay as cost no more than ``keep`` of the whole. Where the gates of a :class:`Budget`
    are decided, that changes few of them. The cost is that of :func:`eval_l0` (or :func:`eval_flops`, see
    there what an export may spend beside it), at most the share and less by no more than the next unit is
    worth. An open gate whose evaluation gate is closed has the value sigmoid(.8 log_alpha / beta).

    Sharded parameters (DTensor) are gathered: all ranks export, and have the same model.

    Args:
        model: any module; it is not changed, and nothing is shared with it.
        batched: whether images come in batches. Single ones are another matter for ``nn.Flatten``, which
            makes rows of their channels: with False channels are all there in front of it. With True an
            exported model that has lost channels there fails on a single image.
        multiple_of: of a model that gate_ has gated: each group keeps a multiple of so many units (or all),
            the likeliest of the closed ones as zeros. Groups that a norm is over (layer, RMS, group norms)
            keep what is open, heads any number. With `keep`, of any model: each gate vector keeps a
            multiple of units (or all), all of them open, and the cost is met with these.
        keep: the share of the cost that is to be left, as of :class:`Budget`: one number, or one for each
            pattern of names of gates. None: what the evaluation gates leave.
        cost, input_shape: what the share is of, as of :class:`Budget`.
        evenly: with `keep`, whether each gate vector keeps the same share, rounded, and one unit (or
            multiple) at least; else the likeliest gates of all stay, wherever they are.

    Returns:
        The exported model. Its parameters can be trained on. It pickles, and a pickle (``torch.save`` of a
        model) names classes: to load it takes l0kernels where one of ours is in it, :class:`SelectInputs`,
        :class:`ScatterOutputs`, :class:`Residual`, :class:`GatedProduct`, the Sliced ones, or a gated module
        that is kept. A model that gate_ had gated has none. This loads with torch alone::

            small = export(model)
            batches = {0: torch.export.Dim("batch")}  # of any size
            program = torch.export.export(small, (x,), dynamic_shapes=(batches,))
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()

        It works, as does ``torch.jit.script(small).save(path)``, where nothing is kept and the modules of
        other kinds in it allow it.

    Raises:
        ValueError: a NaN in a log_alpha, gates on the meta device, or a gated layer as out_proj of a
            ``torch.nn.MultiheadAttention``, which would not call it; multiple_of is below 1, or, without
            `keep`, above it for a model that gate_ has not gated; a `keep` that :class:`Budget` would refuse,
            or evenly without it; a part of a model that gate_ has gated, or one in which a size that stands
            in a forward is that of units which a norm is over.
    """
    _checks.check_count("multiple_of", multiple_of, 1, 2**31)
    gates = gate_modules(model)  # refuses what torch would not call
    if any(gate.log_alpha.is_meta for gate in gates):
        raise ValueError("model must hold values, got gates on the meta device")
    by_units = any(isinstance(part, GateGroups | GatedUnits) for part in model.modules())
    if evenly and keep is None:
        raise ValueError("evenly needs keep, the share of the cost that is to be left")
    if multiple_of != 1 and not by_units and keep is None:
        raise ValueError(f"multiple_of must be 1 for a model that gate_ has not gated, got {multiple_of}")
    with torch.inference_mode(False), torch.no_grad():
        whole = gathered(model)
        if whole is not model:
            relink(whole)
        model = _at_rest(whole)
        if keep is not None:
            from .cut import cut_gates, set_gates_  # which counts, and counting knows what is exported
            from .shares import Wish

            values = cut_gates(whole, Wish(keep, cost, input_shape), multiple_of, evenly)
            evaluated = [values.get(gate, gate.eval_gates().z) for gate in gate_modules(whole)]
            set_gates_(model, evaluated)
        if by_units:
            while type(model).__name__ == "OptimizedModule":
                model = cast(nn.Module, model._orig_mod)
            model = shrunk(model, multiple_of)
            if not any(isinstance(part, HardConcreteGate) for part in model.modules()):
                return model.eval()
        return _Export(model, batched).alone(model).eval()


def _at_rest(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with the weights that hooks compute as of now."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for values in (vars(module), module._buffers):
            for value in values.values():
                if isinstance(value, Tensor) and value.grad_fn is not None:  # which deepcopy refuses
                    memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        for hook in module._forward_pre_hooks.values():
            if _makes_weight(hook):
                hook(module, ())
    return copied


def _makes_weight(hook: Any) -> bool:
    """Whether it is a hook of torch.nn.utils that computes a parameter, and looks at no input."""
    return isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm)


def _is_watched(module: nn.Module) -> bool:
    """Whether something beside its class decides on what a module, or one in it, computes."""
    for part in module.modules():
        hooks = [hook for hook in part._forward_pre_hooks.values() if not _makes_weight(hook)]
        ours = isinstance(part, HardConcreteGate) and hooks == [leaves_no_fast_path]
        if part._forward_hooks or part._backward_hooks or part._backward_pre_hooks or "forward" in vars(part):
            return True
        if hooks and not ours:
            return True
    return False


class _Export:
    """The export of one model, which is at rest, and ours to take apart."""

    def __init__(self, model: nn.Module, batched: bool) -> None:
        self._model = model
        self._nothing = Value() if batched else Value(ndim=UNKNOWN)
        # Memos of deepcopy: what is in them appears in later copies, so that sharing survives.
        self._kept: dict[int, Any] = {}
        self._around: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        self._reads: dict[nn.Module, Reads] = {}  # of the forwards around each module
        self._all_reads = Reads()
        for part in model.modules():
            for value in (*part._parameters.values(), *part._buffers.values()):
                if value is not None:
                    copy.deepcopy(value, self._kept)
            for name, child in part._modules.items():
                if child is not None:
                    self._around.setdefault(child, []).append((part, name))
            if _is_foreign(part):
                reads = reads_of(part)
                kinds = {type(child) for child in part.children()}
                reads.gates |= any(issubclass(kind, HardConcreteGate) for kind in kinds)
                reads.gates |= "draw" in reads.called and GateBank not in kinds
                self._all_reads.add(reads)
                for inner in part.modules():
                    self._reads.setdefault(inner, Reads()).add(reads)
        for part in model.modules():
            if isinstance(part, HardConcreteGate):
                frozen = copy.deepcopy(part).freeze_()
                if self._reads.get(part, Reads()).all_weights:  # by parameters(), which knows no buffers
                    log_alpha = nn.Parameter(frozen.log_alpha, requires_grad=False)
                    del frozen.log_alpha
                    frozen.log_alpha = log_alpha
                self._kept[id(part)] = frozen
        self._exported: dict[int, Any] = dict(self._kept)

    def alone(self, module: nn.Module) -> nn.Module:
        """`module` for whoever calls it with all of its units, and uses all that comes."""
        found = self._exported.get(id(module))
        if found is None:
            found = self._exported[id(module)] = self._export(module)
        return found

    def _export(self, module: nn.Module) -> nn.Module:
        if type(module).__name__ == "OptimizedModule":  # of torch.compile
            return self.alone(cast(nn.Module, module._orig_mod))
        if isinstance(module, torch.jit.ScriptModule) or self._is_kept(module):
            return copy.deepcopy(module, self._kept)
        if is_residual(module):
            return self._chain(walk(module, self._nothing))[0]
        if is_container(module) and self._is_only_called(module):
            return nn.Sequential(*self._chain(walk(module, self._nothing)))
        if is_product(module):
            return self._layer(module)
        if is_norm(module):
            return _sliced_norm(module) if isinstance(module, L0BatchNorm) else self._copy(module)
        if isinstance(module, UNIT_NORMS):
            return plain_norm(module)
        if is_feed_forward(module):
            return _export_feed_forward(module)
        for child in module.children():
            self.alone(child)
        return self._copy(module)

    def _copy(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module, self._exported)

    def _is_kept(self, module: nn.Module) -> bool:
        """Whether something of `module` beside its outputs counts, or it is not known how they come about."""
        ours = isinstance(module, (GatedLayer, L0BatchNorm, *UNIT_NORMS, L0MLP, L0Residual, L0Sequential))
        if _is_watched(module):
            return ours or is_container(module)
        if not ours:
            return False
        if not (is_container(module) or is_residual(module) or is_feed_forward(module)):
            if not (is_product(module) or is_norm(module) or type(module) in UNIT_NORMS):
                return True
            reads = self._reads.get(module)
            if reads is None:
                return False
            if any(
                name in reads.names or isinstance(parent, (*LISTS, nn.Sequential))
                for parent, name in self._around[module]
            ):  # it may be handed to somebody else
                reads = self._all_reads
            return reads.gates or reads.weights or _has_more(module)
        return not self._is_only_called(module)

    def _is_only_called(self, module: nn.Module) -> bool:
        """Whether the forwards around a container do no more than call it."""
        reads = self._reads.get(module)
        if reads is None:
            return True
        if reads.gates or reads.any_module or reads.all_weights:
            return False
        contents = next((names for kind, names in CONTENTS.items() if isinstance(module, kind)), set())
        contents = contents | _own_names(module)
        untouched = not contents & (reads.names | reads.called)
        untouched = untouched and not (is_sequential(module) and reads.opens)
        for parent, name in self._around.get(module, ()):
            if _is_foreign(parent) and name in reads.names:
                return False
            if isinstance(parent, LISTS) and not untouched:
                return False
            if is_sequential(parent) and not untouched and not self._is_only_called(parent):
                return False
        return True

    def _layer(self, layer: Any) -> nn.Module:
        around = [parent for parent, _ in self._around.get(layer, ())]
        inside = any(not (_is_foreign(p) or isinstance(p, (*LISTS, nn.Sequential))) for p in around)
        if inside or not (layer is self._model or isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)):
            # Modules of torch.nn may multiply by the weight themselves: it is whole, with the gates in it.
            # So is a layer that may be called with more than x, a transposed convolution's output_size.
            if _is_plain(layer):
                return self._copy(layer)
            return _sliced(layer)
        parts = self._chain(walk(layer, self._nothing))
        if len(parts) == 1:
            return parts[0]
        if layer is self._model:
            return nn.Sequential(*parts)
        kind = SlicedLinear if is_linear(layer) else SlicedConv2d
        return (SlicedConv1d if isinstance(layer, nn.Conv1d) else kind)(layer, parts)

    def _chain(self, steps: Sequence[Step]) -> list[nn.Module]:
        units = [_Units(step) for step in steps if step.is_layer]
        for own, behind in reversed([*pairwise(units)]):
            if own.step.leads:
                own.write_for(behind)
        exported: list[nn.Module] = []
        held: Tensor | None = None  # units that the value has, None for all
        n = 0
        rest = iter(units)
        for step in steps:
            if is_residual(step.module):
                exported.append(self._residual(step))
            elif not step.is_layer:
                exported.append(self.alone(step.module))
            else:
                own, size = next(rest), units_in(step.module)
                held = held if held is None else _spread(held, n, size)
                exported += _select(held, own.read, size, step.dim)
                exported.append(self._copy(own.layer) if own.is_whole else own.sliced())
                held, n = own.write, units_out(own.layer)
                if held is not None and not step.leads:
                    exported.append(ScatterOutputs(held, n, step.dim))
                    held = None
        return exported

    def _residual(self, step: Step) -> Residual:
        """Anew each time: what may be left out depends on what comes in."""
        branches = [self._chain(branch) for branch in step.branches]
        body, shortcut = (parts[0] if len(parts) == 1 else nn.Sequential(*parts) for parts in branches)
        return Residual(body, shortcut if branches[1] else nn.Identity())


def _is_foreign(module: nn.Module) -> bool:
    return is_foreign(type(module)) or "forward" in vars(module)


def _own_names(module: nn.Module) -> set[str]:
    """What a module of another class has beyond those of this package and torch."""
    kinds = [kind for kind in type(module).__mro__ if is_foreign(kind) and kind is not object]
    if not kinds:
        return set()
    names = {name for kind in kinds for name in vars(kind)}
    own = {*vars(module), *module._parameters, *module._buffers} - {*vars(nn.Sequential())}
    return {name for name in names | own if not name.startswith("__")}


def _has_more(layer: nn.Module) -> bool:
    """Whether a layer has more than its kind has, which the modules around it may use."""
    if is_norm(layer):
        plain: nn.Module = nn.BatchNorm2d(1)
    elif isinstance(layer, UNIT_NORMS):
        plain = plain_norm(layer)
    else:
        plain = nn.Conv2d(1, 1, 1) if is_conv(layer) else nn.Linear(1, 1)
    known = {*vars(plain), *plain._parameters, *plain._buffers}
    known |= {"batches_open", "gate", "in_gate", "out_gate", "weight_gate", "parametrizations"}
    has = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    return not has <= known or (is_foreign(type(layer)) and not hasattr(layer, "parametrizations"))


def _is_plain(layer: nn.Module) -> bool:
    return type(layer).__module__.partition(".")[0] == "torch"


def _select(held: Tensor | None, read: Tensor | None, n: int, dim: int) -> list[nn.Module]:
    """What makes of the units `held`, None for all n, those that are to be read, which are among them."""
    if read is None or (held is not None and torch.equal(held, read)):
        return [] if held is None or read is not None else [ScatterOutputs(held, n, dim)]
    if held is None:
        return [SelectInputs(read, n, dim)]
    return [SelectInputs(torch.searchsorted(held, read), len(held), dim)]


def _spread(units: Tensor, n: int, size: int) -> Tensor:
    """The features of some of n channels behind nn.Flatten, of `size` in all; where size is n: the same."""
    positions = size // n
    return (units[:, None] * positions + torch.arange(positions, device=units.device)).flatten()


class _Units:
    """Which units of a layer are kept: `read` and `write` ascending, None for all."""

    def __init__(self, step: Step) -> None:
        self.step = step
        layer = self.layer = step.module
        self._zeros = _open_units(step.zeros, units_in(layer))
        self._like = step.zeros[0].log_alpha if step.zeros else None
        self.read = self._one_at_least(_open_units(step.in_gates, units_in(layer)))
        self.write = self._one_at_least(_open_units(own_gates(layer, "out_gate"), units_out(layer)))
        if is_norm(layer):
            self.write = self.read
        elif is_conv(layer) and layer.groups > 1:
            self._whole_groups()

    @property
    def is_whole(self) -> bool:
        """Whether the layer stays as it is."""
        gated = isinstance(self.layer, GatedLayer) or self._zeros is not None
        return self.read is None and self.write is None and not gated and _is_plain(self.layer)

    def write_for(self, behind: "_Units") -> None:
        """Of what is open only that which the next layer reads; all of that, open or not."""
        n, size = units_out(self.layer), units_in(behind.layer)
        read = behind.read
        if read is not None:
            read = (read // (size // n)).unique()
            read = None if len(read) == n else read
        self.write = self._one_at_least(read)
        if is_norm(self.layer):
            self.read = self.write
        elif is_conv(self.layer) and self.layer.groups > 1:
            self._whole_groups()

    def _one_at_least(self, units: Tensor | None) -> Tensor | None:
        """torch has no convolution without channels: a closed one, of zeros, stays if no other does."""
        return units if units is None or len(units) or is_linear(self.layer) else units.new_zeros(1)

    def _whole_groups(self) -> None:
        """Of a grouped convolution the groups stay that write anything, with all of their channels."""
        if self.write is None:
            self.read = None
            return
        n_in, n_out, groups = self.layer.in_channels, self.layer.out_channels, self.layer.groups
        kept = (self.write // (n_out // groups)).unique()
        self.read, self.write = _spread(kept, groups, n_in), _spread(kept, groups, n_out)
        if len(kept) == groups:
            self.read = self.write = None

    def sliced(self) -> nn.Module:
        if is_norm(self.layer):
            return _sliced_norm(self.layer, self.read, self._zeros, self._like)
        return _sliced(self.layer, self.read, self.write)


def _export_feed_forward(block: L0FeedForward) -> nn.Sequential:
    gate, up, down = block.hidden_gate, block.up, block.down
    read = write = _open_units((gate,), block.d_hidden)
    if read is not None and up.out_features > block.d_hidden:
        write = torch.cat((read, read + block.d_hidden))
    z = over_runs(gate.eval_gates().z, block.d_hidden)
    between = [block.activation_module(), *([nn.Dropout(block.dropout)] if block.dropout else [])]
    return nn.Sequential(_sliced(up, None, write), *between, _sliced(down, read, None, z))


def _open_units(gates: GateModules, n: int) -> Tensor | None:
    """Ascending positions of the n units that every gate leaves open; None if that is all of them."""
    if not gates:
        return None
    is_open = torch.ones(n, dtype=torch.bool, device=gates[0].log_alpha.device)
    for gate in gates:
        each = gate.eval_gates().z != 0
        is_open &= each[gate_of(gate.n, n).to(each.device)].view(n, -1).any(1)
    return None if is_open.all() else is_open.nonzero().flatten()


def _sliced(
    layer: Any, read: Tensor | None = None, write: Tensor | None = None, z_in: Tensor | None = None
) -> nn.Module:
    """The layer times its evaluation gates, in fp32 or above, restricted to some inputs and outputs; of a
    grouped convolution to groups.

    z_in: evaluation gates of the inputs that the layer does not own.
    """
    weight, bias, kind = layer.weight, layer.bias, conv_kind(layer) or nn.Linear
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    if isinstance(layer, L0Linear | GatedConv) and layer.weight_gate is not None:
        z = layer.weight_gate.eval_gates().z
        weight = weight * (layer.spread(z) if isinstance(layer, L0Linear) else z.view(weight.shape))
    weight = _turned(weight, groups) if transposed else weight
    per_group = weight.shape[1]
    own = _z_of(layer, "in_gate", units_in(layer))
    z_in = own if z_in is None else z_in if own is None else own * z_in
    if groups == 1:
        weight = narrowed(weight, 1, read, z_in)
    elif z_in is not None:
        parts = zip(weight.chunk(groups), z_in.chunk(groups), strict=True)
        weight = torch.cat([narrowed(part, 1, None, z) for part, z in parts])
    z_out = _z_of(layer, "out_gate", units_out(layer))
    weight = narrowed(weight, 0, write, z_out)

    geometry = [] if kind is nn.Linear else ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    geometry += ["output_padding"] if transposed else []
    options = {name: getattr(layer, name) for name in geometry}
    # Built on meta and by hand: nn.Linear(0, n) warns, but a layer may well be closed altogether.
    made: Any = kind(1, 1, bias=bias is not None, device="meta", **options)
    n_in = units_in(layer) if read is None else len(read)
    set_sizes(made, n_in, len(weight))
    if groups > 1:
        groups = made.groups = n_in // per_group
    weight = _turned(weight, groups) if transposed else weight
    made.weight = _parameter(weight, layer.weight)
    if bias is not None:
        made.bias = _parameter(narrowed(bias, 0, write, z_out), layer.bias)
    return made


def _z_of(layer: nn.Module, side: str, n: int) -> Tensor | None:
    """The evaluation gates of a layer's n units on one side, None if it has none there."""
    gate = own_gate(layer, side)
    return None if gate is None else over_runs(gate.eval_gates().z, n)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """(out, in / groups, ...) of a transposed convolution's weight (in, out / groups, ...), and back."""
    rows, cols, *kernel = weight.shape
    parts = weight.view(groups, rows // groups, cols, *kernel).transpose(1, 2)
    return parts.reshape(groups * cols, rows // groups, *kernel)


def _sliced_norm(
    layer: AnyBatchNorm,
    read: Tensor | None = None,
    is_open: Tensor | None = None,
    like: Tensor | None = None,
) -> AnyBatchNorm:
    """The norm of the channels `read`; of these it makes zeros but for those that are open.

    like: tells the dtype and device of a norm without tensors.
    """
    n = layer.num_features
    read = torch.arange(n, device=None if is_open is None else is_open.device) if read is None else read
    zeros = torch.ones(n, dtype=torch.bool, device=read.device)
    zeros = zeros[:0] if is_open is None else zeros.index_fill(0, is_open, False)[read]
    norm = next(kind for kind in NORMS if isinstance(layer, kind))(
        len(read),
        layer.eps,
        layer.momentum,
        layer.affine or bool(zeros.any()),
        layer.track_running_stats,
        device="meta",
    )
    for name in norm._buffers:
        buffer = layer._buffers[name]
        if buffer is not None:
            setattr(norm, name, buffer[read.to(buffer.device)] if buffer.ndim else buffer.clone())
    like = like if layer.running_mean is None else layer.running_mean
    for name in ("weight", "bias") if norm.affine else ():
        own: Tensor | None = getattr(layer, name)
        if own is None and layer.affine:  # a norm without bias
            setattr(norm, name, None)
            continue
        value = torch.full((n,), float(name == "weight")) if own is None else own
        value = value if own is not None or like is None else value.to(like)
        value = value[read.to(value.device)]
        if zeros.numel():
            value = value.masked_fill(zeros.to(value.device), 0)
        trains = own is not None and own.requires_grad
        setattr(norm, name, nn.Parameter(value.detach().clone(), requires_grad=trains))
    return norm


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=like.requires_grad)
