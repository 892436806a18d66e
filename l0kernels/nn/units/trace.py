"""Runs a model once and follows its units through every function of torch that it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..._compat import pytree
from . import table, trace_attention, trace_index, trace_recurrent
from .einsum import as_product
from .kinds import is_pointwise, kind_of
from .labels import UnionFind, across, along, shortened, spread, varying


class Call(NamedTuple):
    """One call of a function of torch that the model has made."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def name(self) -> str:
        name = getattr(self.func, "__name__", str(self.func))
        owner = getattr(self.func, "__self__", None)
        return getattr(owner, "__name__", name) if name == "__get__" else name

    def get(self, at: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[at] if len(self.args) > at else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        return [a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Tensor)]

    def results(self) -> list[Tensor]:
        return [a for a in pytree.tree_leaves(self.out) if isinstance(a, Tensor)]


class Dim(NamedTuple):
    """A dimension of a parameter or buffer, by its first name in the model."""

    name: str
    dim: int


class Trace(TorchFunctionMode):
    """What is found while the model runs.

    Attributes:
        sets: the units.
        dims: of each dimension of a parameter or buffer that has units, their labels.
        roles: what the dimension is to its layer: "out" makes the units, "in" reads them, "along" is between.
        sums: labels of the sums of two branches.
        recurrent: the recurrent layers that have been called.
        attentions: of each product of activations, in order: the module that calls it, and the labels of its
            heads, (H,), None where it has none.
        lent: the names of linear layers whose weights the forwards of others give to functions.
        pointwise: the names of activations that are a torch.autograd.Function.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sets = UnionFind()
        self.dims: dict[Dim, Tensor] = {}
        self.roles: dict[Dim, str] = {}
        self.sums: list[Tensor] = []
        self.recurrent: set[nn.Module] = set()
        self.attentions: list[tuple[str, Tensor | None]] = []
        self.lent: set[str] = set()
        self.pointwise: set[str] = set()
        self.stack: list[tuple[str, nn.Module]] = []
        self._names: dict[int, str] = {}
        self._owned: list[Tensor] = []
        self._lenders: dict[int, tuple[str, nn.Module]] = {}
        self._labels: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # an address is not given away again
        self._empty: set[int] = set()  # addresses of what has no element that would tell its units
        self._constants: dict[int, int] = {}  # by address, the version that was made
        self._busy = False
        self._leaf: nn.Module | None = None  # that runs, and computes what its kind says
        self._function: type[torch.autograd.Function] | None = None  # that is about to begin
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            self._names.setdefault(id(value), name)
            self._owned.append(value)
        self._read = {
            id(value)
            for module in model.modules()
            if (kind := kind_of(module)) is not None
            for name, value in module._parameters.items()
            if kind.reads(name)
        }

    # ---- labels

    def labels(self, x: Tensor) -> Tensor | None:
        """The labels of x, or None: no units."""
        labels = self._labels.get(id(x))
        if labels is not None and len(varying(labels)) > 1:  # some may have become one since
            labels = self._labels[id(x)] = spread(self.sets.named(labels))
        return labels

    def units(self, x: Any) -> Tensor | None:
        """The labels of x, None where it is a parameter, or no tensor, or nothing in it is of a unit."""
        labels = self.labels(x) if isinstance(x, Tensor) and not self.is_owned(x) else None
        return labels if labels is not None and bool(shortened([labels])[0].any()) else None

    def set(self, x: Tensor, labels: Tensor | None) -> None:
        """x has these labels."""
        self._alive.append(x)
        if labels is None:
            self._labels.pop(id(x), None)
            return
        assert labels.shape == x.shape, (labels.shape, x.shape)
        labels = spread(labels)
        if len(varying(labels)) > 1:  # by other numbers for the same units, it may be
            labels = spread(self.sets.named(labels))
        self._labels[id(x)] = labels

    def is_constant(self, x: Tensor, changed: bool = False) -> bool:
        """Whether x was made of one number, and nobody has written into it or a view of it since, but for the
        call that is seen, where that has `changed` it."""
        made = self._constants.get(id(x))
        return made is not None and made == x._version - changed

    def is_owned(self, x: Any) -> bool:
        """Whether x is a parameter or buffer of the model."""
        return id(x) in self._names

    def multiplies(self, x: Tensor) -> bool:
        """Whether a layer multiplies what it reads by this parameter: z may be in it, in an export."""
        return id(x) in self._read or id(x) in self._lenders

    def lender(self, weight: Any) -> nn.Module | None:
        """The linear layer whose attribute this is, as it will be found there when the layer is gated."""
        return self._lenders.get(id(weight), ("", None))[1]

    def lend(self, weight: Tensor) -> None:
        """Somebody else gives it to a function that can be gated."""
        self.lent.add(self._lenders[id(weight)][0])

    @contextmanager
    def lending(self, model: nn.Module) -> Iterator[None]:
        """Has the weight of a linear layer be another object for who asks the layer for it than for who keeps
        it: what is kept elsewhere no gate reaches."""
        bypassed = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        lenders = []
        for name, module in model.named_modules():
            kind, weight = kind_of(module), module._parameters.get("weight")
            lends = kind is not None and kind.name == "linear" and not kind.own and module not in bypassed
            if lends and type(weight) is nn.Parameter and "weight" not in vars(module):
                alias = nn.Parameter(weight.detach(), weight.requires_grad)
                self._names[id(alias)] = self._names[id(weight)]
                self._lenders[id(alias)] = name, module
                self._owned.append(alias)
                lenders.append(module)
                module.__dict__["weight"] = alias
        try:
            yield
        finally:
            for module in lenders:
                module.__dict__.pop("weight", None)

    def dim(self, x: Tensor, dim: int, role: str) -> Tensor:
        """The labels of a dimension of a parameter or buffer."""
        key = Dim(self._names[id(x)], dim)
        if key not in self.dims:
            self.dims[key] = self.sets.fresh(x.shape[dim])
        if self.roles.get(key) != "in":
            self.roles[key] = role
        return self.dims[key]

    def between(self, name: str, n: int) -> Tensor:
        """The labels of a layer that has units and no parameter of them."""
        key = Dim(f"{name}.", 0)
        if key not in self.dims:
            self.dims[key], self.roles[key] = self.sets.fresh(n), "along"
        return self.dims[key]

    def where(self, call: Call) -> str:
        """The place of a call, in words."""
        name = next((name for name, _ in reversed(self.stack) if name), "")
        return f"{call.name} in {name}" if name else f"{call.name} in the model's forward"

    def pin(self, x: Tensor | None, why: str) -> None:
        """Has no unit of x be gated; of a parameter: in any dimension."""
        if x is None:
            return
        if self.is_owned(x):
            self.pin_dims(x, range(x.ndim), why)
        labels = self.labels(x)
        if labels is not None:
            self.sets.pin(shortened([labels])[0], why)

    def pin_dims(self, x: Tensor, dims: Sequence[int], why: str) -> None:
        """Has no unit in these dimensions of a parameter or buffer be gated."""
        for dim in dims:
            known = self.dims.get(Dim(self._names[id(x)], dim))
            if known is None and x.shape[dim] < 1 << 20:
                known = self.dim(x, dim, "along")
            if known is not None:
                self.sets.pin(known, why)

    # ---- the model runs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._busy:
            return func(*args, **kwargs or {})
        args, kwargs = table.by_position(args, kwargs or {})
        product = as_product(func, args, kwargs)
        if product is not None:
            with self:
                return product()
        self._busy = True
        try:
            call = Call(func, args, kwargs, func(*args, **kwargs))
            self._see(call)
            return call.out
        finally:
            self._busy = False

    def _see(self, call: Call) -> None:
        if call.func in CONSTANTS and not call.out.is_inference():
            self._constants[id(call.out)] = call.out._version
        if call.func in trace_attention.PRODUCTS:
            self.attentions.append((self.stack[-1][0] if self.stack else "", None))
        used = [t for t in call.tensors() if id(t) in self._labels or id(t) in self._empty]
        if not used and not any(self.is_owned(t) for t in call.tensors()):
            self._none(call)
            return
        rule = RULES.get(call.func)
        hidden = any(id(t) in self._empty for t in used) or any(
            not out.numel() and not self._lacks_units(out, used) for out in call.results()
        )
        if rule is not None and (rule is _fresh or not hidden):
            rule(self, call)
            return
        self.unknown(call)
        for out in call.results():
            if not out.numel():
                self._empty.add(id(out))
                self._alive.append(out)

    def _lacks_units(self, out: Tensor, used: Sequence[Tensor]) -> bool:
        """Whether an empty result has none of the units, as of features behind those that are rotated. Else
        it has no row, as of an expert without a token, and does not show which units it would meet."""
        gone = {dim for dim, size in enumerate(out.shape) if not size}
        for x in used:
            labels = self.labels(x)
            if labels is None:
                continue
            if not x.numel() or (x.ndim == out.ndim and gone <= {*varying(labels)}):
                return True
        return False

    def _none(self, call: Call) -> None:
        for out in call.results():  # an address may have been another tensor's
            self.set(out, None)

    def unknown(self, call: Call) -> None:
        """A function of which nothing is known, or not with these operands."""
        if not call.results() and (call.func in LOOKS or getattr(call.func, "__name__", "") == "__get__"):
            return
        for x in call.tensors():
            self.pin(x, self.where(call))
        same = {id(x) for x in call.tensors()}
        for out in call.results():
            if id(out) not in same:
                self.set(out, None)

    def hidden(self, func: Any, args: Any) -> None:
        """An operation that no function of torch has called: a script, an operator of its own."""
        if self._busy:
            return
        for x in pytree.tree_leaves(args):
            if isinstance(x, Tensor) and (id(x) in self._labels or self.is_owned(x)):
                place = next((name for name, _ in reversed(self.stack) if name), "the model's forward")
                self.pin(x, f"{func} in {place}, out of sight")

    def profile(self, frame: Any, event: str, called: Any) -> None:
        """Sees a torch.autograd.Function, whose backward may be anything, begin: what it takes is pinned."""
        if event == "c_call" and getattr(called, "__name__", "") == "apply":
            cls = getattr(called, "__self__", None)
            if isinstance(cls, type) and issubclass(cls, torch.autograd.Function):
                self._function = cls
        elif event == "call" and self._function is not None and not self._busy:
            cls = self._function
            if frame.f_code is not getattr(cls.forward, "__code__", None):
                return
            if not self._is_activation():
                self.hidden(cls.__name__, [*frame.f_locals.values()])
            self._function = None

    def _is_activation(self) -> bool:
        """Whether the module that runs treats elements one by one, whatever it calls."""
        name, module = self.stack[-1] if self.stack else ("", None)
        if module is None:
            return False
        self._busy = True
        try:
            found = is_pointwise(module)
        finally:
            self._busy = False
        if found:
            self.pointwise.add(name)
        return found

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Knows which module runs."""
        handles = []
        for name, module in model.named_modules():

            def enter(module: nn.Module, _: Any, name: str = name) -> None:
                self.stack.append((name, module))

            def begin(module: nn.Module, _: Any) -> None:
                if self._leaf is None:
                    self._leaf, self._busy = module, True

            def end(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                if self._leaf is module:
                    self._leaf = None
                    self._own(module, Call(module.forward, args, kwargs, out))
                    self._busy = False

            def leave(*_: Any) -> None:
                self.stack.pop()

            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            if (kind := kind_of(module)) is not None and kind.own:  # between these are no hooks of others
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(
                    module.register_forward_hook(end, always_call=True, prepend=True, with_kwargs=True)
                )
            handles.append(module.register_forward_hook(leave, always_call=True))
        profiler = sys.getprofile()
        try:
            sys.setprofile(self.profile)
            with self.lending(model), _Hidden(self), self:
                yield
        finally:
            _profile_again(profiler)
            for handle in handles:
                handle.remove()

    def _own(self, module: nn.Module, call: Call) -> None:
        """A module with a forward of its own has run."""
        given = [a for a in (*call.args, *call.kwargs.values()) if a is not None]
        if isinstance(module, nn.MultiheadAttention):
            trace_attention.module(self, module, call._replace(func=F.multi_head_attention_forward))
        elif len(given) == 1 and isinstance(call.out, Tensor):
            self._see(_as_function(module, given[0], call.out))
        else:
            self.unknown_module(module, call)

    def unknown_module(self, module: nn.Module, call: Call) -> None:
        """As :meth:`unknown`: its parameters stay whole, too."""
        self.unknown(call)
        for parameter in module.parameters():
            self.pin(parameter, self.where(call))


def _profile_again(profiler: Any) -> None:
    """What sys.getprofile gave, of which sys.setprofile takes functions alone: cProfile is none."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        sys.setprofile(None)
        profiler.enable()


def _as_function(module: nn.Module, x: Tensor, out: Tensor) -> Call:
    """The function of torch that a module with a forward of its own stands for."""
    kind = kind_of(module)
    assert kind is not None
    weight = module._parameters["weight"]
    own = {"bias": module._parameters.get("bias")}
    if kind.is_norm and weight is not None:
        return Call(getattr(F, kind.name), (x, weight.shape, weight), own, out)
    return Call(F.linear, (x, weight), own, out)


class _Hidden(TorchDispatchMode):
    """Sees what the function mode does not."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._trace.hidden(func, (args, kwargs))
        return func(*args, **kwargs or {})


Rule = Callable[[Trace, Call], None]


# ---- rules


def _pointwise(trace: Trace, call: Call) -> None:
    x = call.tensors()[0]
    labels = _of_vector(trace, x) if trace.is_owned(x) else trace.labels(x)
    is_unknown = trace.is_owned(x) and (labels is None or call.out is x)
    if is_unknown or (call.name in POWERS and not _is_smooth_at_0(call)):
        trace.unknown(call)
        return
    others = [t for t in call.tensors()[1:] if t.numel() > 1]
    if call.name in ("to", "type_as"):  # of the other that is its type
        others = []
    if others:
        _elementwise(trace, call)
        return
    for out in call.results():
        if labels is not None and out.shape == x.shape:
            trace.set(out, labels)
        elif out is not x:
            trace.pin(x, trace.where(call))


def _of_vector(trace: Trace, x: Tensor) -> Tensor | None:
    """The labels of a parameter with one dimension that has entries, such as a bias or a scale by head."""
    dims = [dim for dim in range(x.ndim) if x.shape[dim] > 1]
    if len(dims) != 1 or not isinstance(x, nn.Parameter) or trace.multiplies(x):
        return None
    return across(trace.dim(x, dims[0], "along"), dims[0], x.shape)


POWERS = ("pow", "pow_", "__pow__")


def _is_smooth_at_0(call: Call) -> bool:
    """Whether a power and its derivative are finite at 0."""
    exponent = call.get(1, "exponent", call.kwargs.get("other"))
    base = call.get(0, "self", call.kwargs.get("input"))
    if not isinstance(base, Tensor):
        return True
    return isinstance(exponent, int | float) and (exponent >= 1 or exponent == 0)


def _aligned(labels: Tensor, shape: torch.Size) -> Tensor:
    return labels.expand(shape)


def _elementwise(trace: Trace, call: Call) -> None:
    results = call.results()
    if len(results) != 1:
        trace.unknown(call)
        return
    shape, tensors = (
        results[0].shape,
        [t for t in call.tensors() if t.numel() != 1 or trace.labels(t) is not None],
    )
    if any(torch.broadcast_shapes(t.shape, shape) != shape for t in tensors):
        trace.unknown(call)
        return
    labelled = [
        (t, spread(_aligned(labels, shape))) for t in tensors if (labels := trace.labels(t)) is not None
    ]
    if not labelled:
        trace._none(call)
        return
    _, most = max(labelled, key=lambda pair: (len(varying(pair[1])), pair[0].numel()))
    dims, are_two = varying(most), False
    pinned = set()
    for x, labels in labelled:
        if varying(labels) != dims:  # as what has no units: a rotation, of a buffer, to each head
            trace.pin(x, trace.where(call))
            pinned.add(id(x))
        elif labels is not most:
            first, second = shortened([most, labels])
            are_two = are_two or not trace.sets.are_one(first.flatten(), second.flatten())
            trace.sets.join(first.flatten(), second.flatten(), trace.where(call))
    for x in tensors:
        if trace.labels(x) is not None and id(x) not in pinned:
            continue
        wide = [dim for dim in dims if _size_at(x, dim, len(shape)) > 1]
        if not wide:
            continue
        within = [dim for dim in dims if dim not in wide]
        if (
            within and trace.is_owned(x) and len(wide) == 1 and wide[0] < within[0]
        ):  # one number for each head
            most = spread(trace_attention.merged(trace, most, within, call))
            dims = varying(most)
        elif within:  # it does the same to whatever else there is: a rotation to each head
            most = spread(trace_attention.merged(trace, most, wide, call))
            dims = varying(most)
            continue
        units = along(most, dims[0]) if len(dims) == 1 else None
        if trace.is_owned(x) and units is not None:
            own = dims[0] - (len(shape) - x.ndim)
            trace.sets.join(units, trace.dim(x, own, "along"), trace.where(call))
        elif not trace.is_owned(x) and (
            trace.is_constant(x) or trace_attention.are_alike(x, [dim - len(shape) for dim in dims])
        ):
            trace.set(x, trace_attention.of_shape(most, x.shape))  # who else meets it has as many units
        else:
            trace.sets.pin(shortened([most])[0], f"{trace.where(call)}, with what has no units")
    if call.func in SUMS and are_two:
        trace.sums.append(shortened([most])[0])
    trace.set(results[0], most)


def _size_at(x: Tensor, dim: int, ndim: int) -> int:
    own = dim - (ndim - x.ndim)
    return x.shape[own] if own >= 0 else 1


def _fresh(trace: Trace, call: Call) -> None:
    """A new tensor, which takes dtype and device of another one."""
    trace._none(call)


def _quotient(trace: Trace, call: Call) -> None:
    divisor = call.get(2, "tensor2") if call.name.startswith("addcdiv") else call.get(1, "other")
    if isinstance(divisor, Tensor) and trace.labels(divisor) is not None:
        trace.unknown(call)
    else:
        _elementwise(trace, call)


def _move(trace: Trace, call: Call) -> None:
    moved_ones = {id(t) for t in pytree.tree_leaves(call.args[:1]) if isinstance(t, Tensor)}
    others = [t for t in call.tensors() if id(t) not in moved_ones]
    if call.name in ("view_as", "reshape_as", "expand_as"):  # asks for the other's shape
        others = []
    if any((labels := trace.labels(t)) is not None and varying(labels) for t in others):
        trace.unknown(call)  # units say what is moved
        return

    def label(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or id(x) in moved_ones):
            return x  # an index is one of itself
        labels = trace.labels(x)
        if labels is None and trace.is_owned(x) and x.is_floating_point() and 0 < x.ndim < 4:
            own = _kept_dim(call, x)
            labels = across(trace.dim(x, own, "along"), own, x.shape)
            trace.pin_dims(x, [dim for dim in range(x.ndim) if dim != own], trace.where(call))
        if labels is None:
            return torch.zeros((), dtype=torch.int64, device="cpu").expand(x.shape)
        return labels

    args, kwargs = pytree.tree_map(label, (call.args, call.kwargs))
    try:
        moved = _moved(call.func, args, kwargs)
    except Exception:  # what cannot be done to labels is not known
        trace.unknown(call)
        return
    found = [a for a in pytree.tree_leaves(moved) if isinstance(a, Tensor)]
    if call.name in ("cat", "concat", "concatenate"):
        found = [_met(trace, call, args, kwargs, found[0])]
    for out, labels in zip(call.results(), found, strict=True):
        if out.shape != labels.shape or labels.dtype != torch.int64:  # a view of another dtype
            trace.unknown(call)
            return
        trace.set(out, labels)


def _kept_dim(call: Call, x: Tensor) -> int:
    """The dimension of a parameter that may have units where it is moved: the last, or the first of a table
    whose others an index looks up, as of biases by head and distance."""
    index = call.args[1] if call.name == "__getitem__" and len(call.args) > 1 else None
    if not isinstance(index, tuple) or not isinstance(index[0], slice) or index[0] != slice(None):
        return x.ndim - 1
    return 0 if any(isinstance(part, Tensor) for part in index[1:]) else x.ndim - 1


def _met(trace: Trace, call: Call, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """The labels of a concatenation along another dimension than that of the units: they are one there."""
    parts = [spread(part) for part in args[0] if part.ndim == out.ndim]
    dim = call.get(1, "dim", kwargs.get("axis", 0)) % out.ndim
    dims = varying(parts[0])
    if not dims or dim in dims or any(varying(part) != dims for part in parts):
        return out
    first = parts[0].narrow(dim, 0, 1)
    for part in parts[1:]:
        a, b = shortened([first, part.narrow(dim, 0, 1)])
        trace.sets.join(a.flatten(), b.flatten(), trace.where(call))
    return first.expand(out.shape)


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    try:
        return func(*args, **kwargs)
    except RuntimeError:  # a view that labels, which lie otherwise, have after a copy
        args = pytree.tree_map_only(Tensor, Tensor.contiguous, args)
        return func(*args, **kwargs)


def _set_item(trace: Trace, call: Call) -> None:
    x, index, value = call.args
    if any(trace.labels(t) is not None for t in pytree.tree_leaves(index) if isinstance(t, Tensor)):
        trace.unknown(call)
        return
    labels, new = trace.labels(x), trace.labels(value) if isinstance(value, Tensor) else None
    if labels is None and new is None:
        return
    if labels is None or new is None or not isinstance(value, Tensor):
        if isinstance(value, Tensor) and value.numel() > 1:
            trace.pin(x, trace.where(call))
            trace.pin(value, trace.where(call))
        return
    first, second = shortened([labels[index], new])
    trace.sets.join(first.flatten(), second.flatten(), trace.where(call))


def _channels(trace: Trace, call: Call, x: Tensor, dim: int) -> Tensor | None:
    """The labels along a dimension, None if there are none or, pinned, if they vary along others: along those
    behind, as of features that are seen as images, a channel is one unit."""
    labels = trace.labels(x)
    if labels is None:
        return None
    within = [other for other in varying(labels) if other != dim]
    if within and dim in varying(labels) and min(within) > dim:
        labels = spread(trace_attention.merged(trace, labels, within, call))
    found = along(labels, dim)
    if found is None:
        trace.pin(x, trace.where(call))
    return found


def _reduction(trace: Trace, call: Call) -> None:
    x = call.args[0]
    labels = trace.labels(x) if isinstance(x, Tensor) else None
    if labels is None or not call.results() or len(call.tensors()) > 1:
        trace.unknown(call)
        return
    at = 2 if call.name == "norm" else 1
    dims, keepdim = call.get(at, "dim"), call.results()[0].ndim == x.ndim
    if dims is None or isinstance(dims, bool | Tensor):
        dims = range(x.ndim)
    dims = sorted({int(d) % x.ndim for d in ([dims] if isinstance(dims, int) else dims)}, reverse=True)
    within = [dim for dim in varying(labels) if dim in dims]
    if within and len(within) < len(varying(labels)):
        labels, within = spread(trace_attention.merged(trace, labels, within, call)), []
    if within or not dims:
        trace.pin(x, trace.where(call))
        trace._none(call)
        return
    for dim in dims:
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    for out in call.results():
        trace.set(out, labels if out.shape == labels.shape else None)
        if out.shape != labels.shape:
            trace.pin(x, trace.where(call))


def _over(trace: Trace, call: Call) -> None:
    x = call.args[0]
    labels = trace.labels(x)
    default = 1 if call.name == "normalize" else None
    dim = call.get(2 if call.name == "normalize" else 1, "dim", default)
    if labels is None or not isinstance(dim, int):
        trace.unknown(call)
        return
    if dim % x.ndim in varying(labels) and len(varying(labels)) > 1:  # of the features of a head
        labels = spread(trace_attention.merged(trace, labels, [dim % x.ndim], call))
    if dim % x.ndim in varying(labels):
        trace.unknown(call)
        return
    trace.set(call.results()[0], labels)


def _spatial(trace: Trace, call: Call) -> None:
    x = call.args[0]
    out, spatial = call.results()[0], x.ndim - 2
    for digit in "123":
        if f"{digit}d" in call.name:
            spatial = int(digit)
    dim = x.ndim - spatial - 1
    units = _channels(trace, call, x, dim)
    others = any(trace.labels(t) is not None or trace.is_owned(t) for t in call.tensors() if t is not x)
    if others or units is None or dim < 0 or out.ndim != x.ndim or out.shape[dim] != len(units):
        trace.unknown(call)
        return
    for out in call.results():
        trace.set(out, across(units, dim, out.shape))


def _pad(trace: Trace, call: Call) -> None:
    x, sides = call.get(0, "input"), call.get(1, "pad")
    labels = trace.labels(x)
    touched = {x.ndim - 1 - i // 2 for i, size in enumerate(sides) if size}
    if labels is None:
        trace.unknown(call)
        return
    out = call.results()[0]
    for dim in touched:
        if dim not in varying(labels):
            labels = labels.narrow(dim, 0, 1)
            continue
        units, at = _channels(trace, call, x, dim), 2 * (x.ndim - 1 - dim)
        before, behind = sides[at : at + 2]
        zeros = call.get(2, "mode", "constant") == "constant" and not call.get(3, "value")
        if units is None or not zeros or before < 0 or behind < 0 or call.name != "pad":
            trace.unknown(call)
            return
        units = torch.cat(
            [trace.sets.fresh(before), units, trace.sets.fresh(behind)]
        )  # zeros may be any unit's
        labels = across(units, dim, [*labels.shape[:dim], len(units), *labels.shape[dim + 1 :]])
    trace.set(out, labels.expand(out.shape))


def _pixel_shuffle(trace: Trace, call: Call) -> None:
    x, factor = call.get(0, "input"), call.get(1, "upscale_factor")
    units = _channels(trace, call, x, x.ndim - 3)
    if units is None:
        trace.unknown(call)
        return
    out, cells = call.results()[0], units.view(-1, factor * factor)
    for column in cells.unbind(1)[1:]:
        trace.sets.join(cells[:, 0], column, trace.where(call))
    trace.set(out, across(cells[:, 0], x.ndim - 3, out.shape))


def _layer(trace: Trace, call: Call, weight: Any) -> nn.Module | None:
    """The layer of torch.nn whose own weight this is, if it makes this call or lends the weight for it."""
    lender = trace.lender(weight)
    module = trace.stack[-1][1] if trace.stack else None
    if lender is not None and lender is not module and call.func is F.linear:
        trace.lend(weight)
        return lender
    if module is None or kind_of(module) is None:
        return None
    known = module is lender or module._parameters.get("weight") is weight
    return module if known and (weight is None or trace.is_owned(weight)) else None


def _refuse_layer(trace: Trace, call: Call) -> None:
    """A product that is no layer's: its parameters and what it reads stay as they are."""
    trace.unknown(call)


def _product(trace: Trace, call: Call) -> None:
    x, weight = call.get(0, "input"), call.get(1, "weight")
    module = _layer(trace, call, weight)
    if module is None:
        _refuse_layer(trace, call)
        return
    kind = kind_of(module)
    assert kind is not None
    bias, out = call.get(2, "bias"), call.results()[0]
    dim = x.ndim - 1 - kind.spatial
    labels, units = trace.labels(x), None
    if labels is not None and not (varying(labels) and dim not in varying(labels)):
        units = _channels(trace, call, x, dim)
    elif labels is not None and kind.spatial == 0:  # a product over another dimension than that of the units
        why = f"{trace.where(call)}, over another dimension than that of the units"
        trace.sets.pin(trace.dim(weight, kind.cols, "in"), why)
        trace.sets.pin(trace.dim(weight, kind.rows, "out"), why)
        trace.pin(bias, why)
        trace.set(out, labels.narrow(dim, 0, 1).expand(out.shape))
        return
    elif labels is not None:
        trace.pin(x, trace.where(call))
    groups = getattr(module, "groups", 1)
    if groups > 1:
        _grouped(trace, call, x, weight, bias, groups, units, dim)
        return
    cols = trace.dim(weight, kind.cols, "in")
    if units is None:
        trace.sets.pin(cols, f"{trace.where(call)}, of what has no units")
    else:
        trace.sets.join(units, cols, trace.where(call))
    rows = trace.dim(weight, kind.rows, "out")
    if bias is not None:
        own = trace.dim(bias, 0, "along") if trace.is_owned(bias) else trace.labels(bias)
        trace.sets.join(rows, torch.zeros_like(rows) if own is None else own.flatten(), trace.where(call))
    trace.set(out, across(rows, dim, out.shape))


def _grouped(
    trace: Trace,
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    units: Tensor | None,
    dim: int,
) -> None:
    """Of a grouped convolution the channels of a group are one unit, with those that it makes of them."""
    kind = kind_of(trace.stack[-1][1])
    assert kind is not None
    if kind.rows != 0 or units is None:
        trace.unknown(call)
        return
    out, rows = call.results()[0], trace.dim(weight, 0, "along")
    ins, outs = units.view(groups, -1), rows.view(groups, -1)
    for columns in (ins, outs):
        for column in columns.unbind(1):
            trace.sets.join(ins[:, 0], column, trace.where(call))
    if bias is not None:
        trace.sets.join(rows, trace.dim(bias, 0, "along"), trace.where(call))
    trace.set(out, across(rows, dim, out.shape))


def _norm(trace: Trace, call: Call) -> None:
    """Batch, instance and group norms: parameters and statistics have the channels, at dimension 1."""
    x = call.get(0, "input")
    module = trace.stack[-1][1] if trace.stack else None
    kind = None if module is None else kind_of(module)
    if kind is None or not kind.is_norm or module is None:
        trace.unknown(call)
        return
    own = [
        t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.ndim == 1
    ]
    given = [t for t in call.tensors() if t is not x]
    if any(all(t is not mine for mine in own) for t in given):
        trace.unknown(call)
        return
    last = call.name in ("layer_norm", "rms_norm")
    if last and len(call.get(1, "normalized_shape")) != 1:
        trace.unknown(call)
        return
    if kind.spatial and x.ndim != 4:
        trace.unknown(call)
        return
    dim = x.ndim - 1 - kind.spatial if last else 1 if x.ndim > 1 else 0
    labels = trace.labels(x)
    if last and labels is not None and dim in varying(labels) and len(varying(labels)) > 1:
        labels = spread(trace_attention.merged(trace, labels, [dim], call))
    if last and labels is not None and dim not in varying(labels) and varying(labels):
        for parameter in own:
            trace.pin(parameter, f"{trace.where(call)}, over another dimension than that of the units")
        trace.set(call.results()[0], labels)  # each unit by itself
        return
    units = _channels(trace, call, x, dim)
    if units is None:
        trace.unknown(call)
        return
    if call.name == "group_norm" and call.get(1, "num_groups") not in (1, len(units)):
        # As many channels are open in one group as in another: the group's size stays a whole number.
        cells = units.view(call.get(1, "num_groups"), -1)
        for row in cells[1:]:
            trace.sets.join(cells[0], row, trace.where(call))
    for parameter in own:
        trace.sets.join(units, trace.dim(parameter, 0, "along"), trace.where(call))
    if not own:
        trace.sets.join(units, trace.between(trace.stack[-1][0], len(units)), trace.where(call))
    trace.set(call.results()[0], across(units, dim, x.shape))


def _embedding(trace: Trace, call: Call) -> None:
    weight = call.get(1, "weight")
    if _layer(trace, call, weight) is None:
        trace.unknown(call)
        return
    out = call.results()[0]
    trace.set(out, across(trace.dim(weight, 1, "out"), -1, out.shape))


def _prelu(trace: Trace, call: Call) -> None:
    x, weight = call.get(0, "input"), call.get(1, "weight")
    labels = trace.labels(x)
    if labels is None or weight.numel() == 1:
        trace.set(call.results()[0], labels)
        return
    units = _channels(trace, call, x, min(1, x.ndim - 1))
    if units is None or not trace.is_owned(weight) or _layer(trace, call, weight) is None:
        trace.unknown(call)
        return
    trace.sets.join(units, trace.dim(weight, 0, "along"), trace.where(call))
    trace.set(call.results()[0], labels)


def _rules() -> dict[Any, Rule]:
    kinds: list[tuple[str, Rule]] = [
        (table.POINTWISE, _pointwise),
        (table.ELEMENTWISE, _elementwise),
        (table.QUOTIENTS, _quotient),
        (table.MOVES, _move),
        (table.REDUCTIONS, _reduction),
        (table.OVER, _over),
        (table.SPATIAL, _spatial),
        ("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _product),
        ("batch_norm instance_norm group_norm layer_norm rms_norm", _norm),
        ("embedding", _embedding),
        ("prelu", _prelu),
        (table.RECURRENT, trace_recurrent.recurrence),
        (table.SEQUENCES, trace_recurrent.sequences),
        (trace_attention.ATTENTION, trace_attention.attention),
        (trace_attention.BATCHED, trace_attention.batched_product),
        (trace_attention.PLAIN, trace_attention.plain_product),
        ("einsum", trace_attention.plain_einsum),
        (trace_index.SCATTERS, trace_index.scattered),
        (trace_index.GATHERS, trace_index.gathered),
        (trace_index.SORTS, trace_index.sorted_rows),
        ("pad", _pad),
        ("pixel_shuffle", _pixel_shuffle),
        ("__setitem__", _set_item),
        ("new_zeros new_ones new_empty new_full new_empty_strided", _fresh),
    ]
    rules: dict[Any, Rule] = {}
    for names, rule in kinds:
        for function in table.functions(names):
            rules[function] = rule
    rules[torch.sparse.mm] = trace_attention.plain_product
    for name in ("T", "mT", "data"):
        rules[getattr(Tensor, name).__get__] = _move
    return rules


RULES = _rules()
SUMS = {*table.functions(table.SUMS)}
CONSTANTS = {torch.zeros, torch.ones, torch.full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
LOOKS = {*table.functions(table.LOOKS)}


def model_inputs(trace: Trace, values: Sequence[Any]) -> None:
    """Has each feature or channel of the inputs be a unit."""
    for x in pytree.tree_leaves(values):
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1:
            dim = 1 if x.ndim != 3 else -1
            trace.set(x, across(trace.sets.fresh(x.shape[dim]), dim, x.shape))
