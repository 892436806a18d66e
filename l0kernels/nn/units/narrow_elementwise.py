"""Functions of each unit by itself, and of all numbers of a unit, on the units that exist."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._compat import function_homes
from . import table
from .narrow import Narrow, Rule, dims_of, is_in_place, is_narrow, lie_alike, like, plain
from .narrow_layout import IN_ORDER, ORDERS, is_view, is_whole, told
from .narrow_shuffle import copied


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    for a in (*args[1:], *kwargs.values()):
        if type(a) in _NUMBERS:
            continue
        if isinstance(a, Tensor) and (a.ndim or isinstance(a, Narrow)):
            return _elementwise(func, args, kwargs)
    return like(x, func(x._data, *args[1:], **kwargs))


def _contiguous(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return copied(*args, **kwargs)
    wanted = args[1] if len(args) > 1 else kwargs.get("memory_format", torch.contiguous_format)
    return _formatted(x, wanted, func, args, kwargs)


def _formatted(
    x: Narrow, wanted: torch.memory_format, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """x itself where the dense tensor has the memory format that is wanted, else a copy."""
    is_so = wanted == torch.contiguous_format and is_whole(x)
    if is_so or is_view(x, func, (), {"memory_format": wanted})[0]:
        return x
    data = x._data
    out = func(data, *args[1:], **kwargs)
    found = like(x, data.clone(memory_format=wanted) if out is data else out)
    found._order = ORDERS[wanted]
    return found


def _cloned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _pointwise(func, args, kwargs)
    wanted = kwargs.get("memory_format", torch.preserve_format)
    if wanted in ORDERS and isinstance(found, Narrow):
        found._order = ORDERS[wanted]
    return found


def _dropped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's operator at once: its function would look at all arguments once more."""
    p = kwargs.get("p", -1.0)
    if func is not F.dropout or len(args) != 1 or kwargs["inplace"] or not 0.0 <= p <= 1.0:
        return _pointwise(func, args, kwargs)
    x = args[0]
    return None if x._at is None else like(x, torch.dropout(x._data, p, kwargs["training"]))


def _converted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As another tensor is, perhaps a narrow one."""
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    wanted = kwargs.get("memory_format", torch.preserve_format)
    out = func(x._data, *plain(args[1:]), **plain(kwargs))
    if wanted not in ORDERS:
        return x if out is x._data else like(x, out)
    if out.dtype == x.dtype and not kwargs.get("copy"):
        return _formatted(x, wanted, Tensor.to, (x,), {"memory_format": wanted})
    found = like(x, out)
    found._order = ORDERS[wanted]
    return found


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and not kwargs:
        a, b = args
        alike = type(b) in _NUMBERS or (type(b) is Narrow and type(a) is Narrow and lie_alike(a, b))
        if alike and type(a) is Narrow and a._at is not None:
            return like(a, func(a._data, b._data if type(b) is Narrow else b))
    first = next((a for a in args if is_narrow(a)), None)
    if first is None or any(isinstance(a, Tensor) for a in kwargs.values()):
        return None
    if is_in_place(func) and args[0] is not first:
        return None
    space, dim, draw, spaces = first._at
    ndim = max([a.ndim for a in args if isinstance(a, Tensor)])
    end = dim - first._data.ndim  # counted from the end
    values = []
    for a in args:
        if not isinstance(a, Tensor):
            values.append(a)
        elif isinstance(a, Narrow):
            if a._at is None:
                return _elementwise(func, tuple(b._data if b is a else b for b in args), kwargs)
            other, at, drawn, _ = a._at
            if other is not space or drawn is not draw or at - a._data.ndim != end:
                return None
            values.append(a._data)
        elif a.ndim < -end or a.shape[end] == 1:
            values.append(a)
        elif a.shape[end] == space.size:  # what meets closed units there meets no one's
            index = draw.present(space).index
            values.append(a if index is None else a.index_select(end % a.ndim, index))
        else:
            return None
    out = func(*values, **kwargs)
    if out is first._data:
        return like(first, out)
    if out.ndim != ndim:
        return None
    found = Narrow.of(out, space, end + ndim, draw, spaces)
    wide = next((a for a in args if is_narrow(a) and a._held.shape == out.shape), None)
    if wide is not None:
        found._order = wide._order
    elif first._order is not None:
        found._order = IN_ORDER
    return found


_NUMBERS = (float, int, bool)


def _reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    others = args[1:]
    for a in others:
        if isinstance(a, Tensor):
            return None
    dim = told(_reduced_to, func, x._held.ndim, x._at[1], others, kwargs)
    if dim is None:
        return None
    out = func(x._data, *others, **kwargs)
    if isinstance(out, Tensor):
        return like(x, out, dim)
    return type(out)([like(x, part, dim) for part in out]) if isinstance(out, tuple) else None


@lru_cache(1024)
def _reduced_to(
    func: Any, ndim: int, dim: int, args: tuple[Any, ...], *kwargs: tuple[str, Any]
) -> int | None:
    """Where dimension `dim` is behind the function, None where it is, or may be, reduced."""
    named = dict(kwargs)
    value = args[0] if args else named.get("dim")
    if func.__name__ == "norm" or value is None or isinstance(value, bool):
        return None
    dims = dims_of(value, ndim)
    if dim in dims or not dims:
        return None
    out = func(torch.zeros([2] * ndim, device="cpu"), *args, **named)  # of one alone there is no variance
    kept = (out if isinstance(out, Tensor) else out[0]).ndim == ndim
    return dim if kept else dim - sum(d < dim for d in dims)


def _over(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, at = args[0], 2 if func.__name__ == "normalize" else 1
    dim = args[at] if len(args) > at else kwargs.get("dim", 1 if at == 2 else None)
    if not isinstance(x, Narrow) or x._at is None or not isinstance(dim, int):
        return None
    return None if dim % x._data.ndim == x._at[1] else like(x, func(x._data, *args[1:], **kwargs))


def _spatial(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    for a in (*args[1:], *kwargs.values()):
        if isinstance(a, Narrow) and a is not x:
            return None
    ndim = x._held.ndim
    if x._at[1] != ndim - (_spatialdims_of(func) or ndim - 2) - 1:
        return None
    out = func(x._data, *args[1:], **kwargs)
    return like(x, out) if isinstance(out, Tensor) else tuple(like(x, part) for part in out)


@cache
def _spatialdims_of(func: Any) -> int:
    """How many dimensions a function says it is of, 0: it does not."""
    return next((int(digit) for digit in "123" if f"{digit}d" in func.__name__), 0)


_MAX_POOLS: dict[Any, tuple[Any, int]] = {
    F.max_pool1d: (torch.max_pool1d, 1),
    F.max_pool2d: (torch.max_pool2d, 2),
    F.max_pool3d: (torch.max_pool3d, 3),
}
"""By torch's function the operator that it calls where no indices are wanted, and its dimensions."""


def _max_pooled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _MAX_POOLS.get(func)
    if found is None or len(args) != 2 or kwargs.get("return_indices", True) or type(args[0]) is not Narrow:
        return _spatial(func, args, kwargs)
    (x, kernel), (operator, spatialdims), stride = args, found, kwargs["stride"]
    if x._at is None or x._at[1] != x._held.ndim - spatialdims - 1:
        return None
    stride = [] if stride is None else stride
    return like(
        x, operator(x._data, kernel, stride, kwargs["padding"], kwargs["dilation"], kwargs["ceil_mode"])
    )


def _averaged(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's operator at once, as `_dropped`, where a number says the size."""
    x, *size = args
    if (
        func is not F.adaptive_avg_pool2d
        or len(size) != 1
        or type(size[0]) is not int
        or type(x) is not Narrow
    ):
        return _spatial(func, args, kwargs)
    if x._at is None or x._at[1] != x._held.ndim - 3:
        return None
    return like(x, function_homes[0].adaptive_avg_pool2d(x._data, size[0]))


def _padded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, sides = args[0], args[1] if len(args) > 1 else kwargs["pad"]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    touched = {x._data.ndim - 1 - i // 2 for i, size in enumerate(sides) if size}
    return None if x._at[1] in touched else like(x, func(x._data, *args[1:], **kwargs))


RULES: list[tuple[str, Rule]] = [
    (f"{table.POINTWISE} rsqrt", _pointwise),
    ("contiguous", _contiguous),
    ("clone zeros_like ones_like empty_like rand_like randn_like full_like", _cloned),
    ("dropout", _dropped),
    ("to type_as", _converted),
    (f"{table.ELEMENTWISE} {table.QUOTIENTS}", _elementwise),
    (table.SPATIAL, _spatial),
    ("max_pool1d max_pool2d max_pool3d", _max_pooled),
    ("adaptive_avg_pool2d", _averaged),
    (table.REDUCTIONS, _reduced),
    (table.OVER, _over),
    ("pad", _padded),
]
