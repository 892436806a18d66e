"""The door to the operators: torch.library's for compilers, modes and transforms, a shorter way for the rest.

An operator is a function of records (_calls.py), tensors and numbers; its schema follows from annotations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ._calls import Gate
from ._checks import PLAIN, check_tensor
from ._compat import count_modes, functorch_active, operator_names, register_fake
from ._flops import tell_counters
from ._gates import HardConcrete
from .impl import made_of_torch, native
from .impl.memory import NotPlain, check_not_freed, plain

LIBRARY = torch.library.Library("l0kernels", "DEF")
_PLAIN = frozenset((*PLAIN, type(None)))
_dist = functools.lru_cache(HardConcrete)
_hints = functools.cache(get_type_hints)  # of a record; those of a forward and its backward are the same


def _constants(dist: HardConcrete | None) -> list[float]:
    return [] if dist is None else [dist.beta, dist.gamma, dist.zeta]


def _flat_gates(gates: list[Gate | None]) -> list[Tensor | None]:
    """Three entries a layer, all None where it has no gate."""
    return [t for gate in gates for t in (gate or (None, None, None))]


def _gates(tensors: list[Tensor | None]) -> list[Gate | None]:
    triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    return [None if triple[0] is None else [t for t in triple if t is not None] for triple in triples]


class _Kind(NamedTuple):
    """How torch.library knows a type of ours, and the way there and back."""

    annotation: Any
    flatten: Callable[[Any], Any]
    gather: Callable[[Any], Any]


_KINDS = {
    Gate | None: _Kind(list[Tensor], lambda gate: gate or [], lambda tensors: tensors or None),
    list[Gate | None]: _Kind(list[Tensor | None], _flat_gates, _gates),
    HardConcrete: _Kind(list[float], _constants, lambda values: _dist(*values)),
    HardConcrete | None: _Kind(list[float], _constants, lambda values: _dist(*values) if values else None),
}


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


class _Layout:
    """Where the fields of an operator's records stand among the flat arguments of its schema."""

    def __init__(self, implementation: Callable[..., Any]) -> None:
        hints = get_type_hints(implementation)
        self.returns = hints.pop("return")
        self.parts: list[tuple[Any, int]] = []  # the record's type or None, and how many arguments it takes
        fields: dict[str, Any] = {}
        for name, hint in hints.items():
            own = _hints(hint) if _is_record(hint) else {name: hint}
            self.parts.append((hint if _is_record(hint) else None, len(own)))
            fields |= own
        self.names = list(fields)
        self.places: list[tuple[int, int | None]] = [  # of each field: its argument, and its number there
            (i, None if record is None else field)
            for i, (record, size) in enumerate(self.parts)
            for field in range(size)
        ]
        self.kinds = [_KINDS.get(hint) for hint in fields.values()]
        self.annotations = [
            hint if kind is None else kind.annotation
            for hint, kind in zip(fields.values(), self.kinds, strict=True)
        ]
        of_kinds = {i: kind for i, kind in enumerate(self.kinds) if kind is not None}
        self.flatten_at = [(i, kind.flatten) for i, kind in of_kinds.items()]
        self.gather_at = [(i, kind.gather) for i, kind in of_kinds.items()]
        self.is_flat = not of_kinds and all(record is None for record, _ in self.parts)

    def schema(self) -> str:
        def prototype() -> None: ...

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(name, kind, annotation=annotation)
            for name, annotation in zip(self.names, self.annotations, strict=True)
        ]
        prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=self.returns
        )
        return torch.library.infer_schema(prototype, mutates_args=())

    def fields(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments one by one, records taken apart."""
        flat: list[Any] = []
        for arg, (record, _) in zip(args, self.parts, strict=True):
            if record is None:
                flat.append(arg)
            else:
                flat.extend(arg)
        return flat

    def flatten(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments as torch.library takes them."""
        flat = self.fields(args)
        for i, flatten in self.flatten_at:
            flat[i] = flatten(flat[i])
        return flat

    def gather(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """``flatten`` undone."""
        if self.is_flat:
            return flat
        values = list(flat)
        for i, gather in self.gather_at:
            values[i] = gather(values[i])
        args, start = [], 0
        for record, size in self.parts:
            args.append(values[start] if record is None else record(*values[start : start + size]))
            start += size
        return tuple(args)


def _tensors_of(value: Any) -> Iterable[Any]:
    """The tensors of a flat argument, None among them, lists of lists taken apart."""
    if not isinstance(value, list | tuple):
        return (value,)
    nested = any(isinstance(item, list) for item in value)
    return [t for item in value for t in _tensors_of(item)] if nested else value


def _are_plain(tensors: Iterable[Any]) -> bool:
    """Whether those of a list, or of lists in it, are None and torch's own."""
    for t in tensors:
        kind = type(t)
        if kind not in _PLAIN and not ((kind is list or kind is tuple) and _are_plain(t)):
            return False
    return True


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated implementation as operator l0kernels::NAME and returns how to call it.

    Args:
        fake: a function of the same arguments, or of as many as it needs, for shapes, dtypes and strides.

    A tensor of size 0 stands for a gradient that is not wanted. Operators are opaque and not differentiable;
    the autograd.Functions beside the public functions are.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name, layout = implementation.__name__, _Layout(implementation)
        LIBRARY.define(name + layout.schema(), tags=(torch.Tag.needs_fixed_stride_order,))
        of_library = getattr(torch.ops.l0kernels, name).default
        has_backend = layout.names[-1] == "backend"
        of_torch, by_address = made_of_torch(name), native(name) if has_backend else frozenset()
        kinds = [str(argument.type) for argument in of_library._schema.arguments]
        tensors_at = [i for i, kind in enumerate(kinds) if "Tensor" in kind]
        places = [layout.places[i] for i in tensors_at]
        # Where the first tensor is, for its device: of a record, of a list, or an argument.
        of_record, of_list = layout.parts[0][0] is not None, "List" in kinds[0]

        def run(*args: Any) -> Any:
            backend = args[-1] if has_backend else "torch"
            if backend in of_torch:
                flat = layout.fields(args)
                for i in tensors_at:
                    for t in _tensors_of(flat[i]):
                        check_not_freed(t, layout.names[i])
            # Autograd falls through: a backend made of torch's operations must not record a graph of its own.
            if not torch.is_grad_enabled() or backend in by_address:
                return implementation(*args)
            with torch.no_grad():
                return implementation(*args)

        LIBRARY.impl(name, lambda *flat: run(*layout.gather(flat)), "CompositeExplicitAutograd")
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        register_fake(LIBRARY, name, lambda *flat: fake(*layout.gather(flat)))

        def is_plain(args: tuple[Any, ...]) -> bool:
            for i, field in places:
                t = args[i] if field is None else args[i][field]
                kind = type(t)
                if kind not in _PLAIN and not ((kind is list or kind is tuple) and _are_plain(t)):
                    return False
            return True

        def refuse_sparse(args: tuple[Any, ...]) -> None:
            flat = layout.fields(args)
            for i in tensors_at:
                for t in _tensors_of(flat[i]):
                    if t is not None and t.layout is not torch.strided:
                        check_tensor(f"{layout.names[i]} of l0kernels.{name}", t)

        def call(*args: Any) -> Any:
            # The dispatcher costs 6 to 10 us, as much as a small layer; eager tensors do without,
            # unless a mode (make_fx, say) wants to see the operators.
            if torch.compiler.is_compiling():
                return of_library(*layout.flatten(args))
            if count_modes():
                tell_counters()
                return of_library(*layout.flatten(args))
            if functorch_active():
                register_batching()
                return of_library(*layout.flatten(args))
            # Of who asks for every address, type and all, only the place matters here.
            first = args[0][0] if of_record or of_list else args[0]
            if (first.is_cpu or first.is_cuda) and (
                (has_backend and args[-1] in by_address) or is_plain(args)
            ):
                try:
                    return run(*args)
                except NotPlain:  # negated views are made plain here, a transform's tensors by the dispatcher
                    refuse_sparse(args)
                    args = layout.gather(tuple(map(_made_plain, layout.flatten(args))))
                except RuntimeError:  # torch's words, where a fast way has looked at sizes alone
                    refuse_sparse(args)
                    raise
            flat = layout.flatten(args)
            for i in tensors_at:
                for t in _tensors_of(flat[i]):
                    if is_dtensor(t):
                        raise TypeError(
                            f"{layout.names[i]} of l0kernels.{name} must be a plain tensor, got a "
                            "DTensor: give its full_tensor() or to_local(), or shard the module as "
                            "l0kernels.nn documents"
                        )
            return of_library(*flat)

        call.layout = layout  # type: ignore[attr-defined]
        return call

    return register


def _made_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return plain(value)
    return [_made_plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_dtensor(t: Any) -> bool:
    """Whether t is a DTensor, without importing what most programs never need."""
    kind = type(t)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


@functools.cache
def register_batching() -> None:
    """Has torch.vmap run the operators example by example; once, at the first transform."""
    for name in operator_names():
        if name.startswith("l0kernels::"):
            of_library = getattr(torch.ops.l0kernels, name.split("::")[1].split(".")[0]).default
            if name != "l0kernels::kept_seed" and not of_library._schema.is_mutable:
                torch.library.register_vmap(
                    of_library, functools.partial(_one_by_one, of_library), lib=LIBRARY
                )


def _one_by_one(of_library: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    if not info.batch_size:
        raise ValueError(f"torch.vmap must have at least one example for {of_library}, got none")

    def example(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [example(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i).contiguous()

    results = [
        of_library(*(example(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(each) for each in zip(*results, strict=True)]
    kind = type(results[0])
    return kind(stacked), kind([0] * len(stacked))
