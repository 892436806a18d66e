"""Rows that are gathered, scattered and sorted, of the units that exist."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .narrow import Narrow, Rule, at_place, is_in_place, is_narrow, like, open_alike, plain
from .trace_index import GATHERS, SCATTERS, SORTS

_NAMES = ("self", "dim", "index", "source")


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """The first arguments, by position, and all others; None where one is missing."""
    named = {**kwargs}
    first = [*args[:4]]
    for name in _NAMES[len(first) :]:
        other = "src" if name == "source" else name
        if name not in named and other not in named:
            return None
        first.append(named.pop(name) if name in named else named.pop(other))
    return (first, named) if not args[4:] else None


def _part(t: Tensor, at: Any) -> Tensor | None:
    """What exists of the units of t; None where it may have others."""
    space, dim, draw, _ = at
    if isinstance(t, Narrow) and t._at is not None:
        alike = t._at[0] is space and t._at[1] == dim and open_alike(t._at[2], draw)
        return t._data if alike else None
    if t.ndim <= dim or t.shape[dim] != space.size:
        return None
    present, t = draw.present(space), plain(t)
    if present.index is None:
        return t
    if t.stride(dim) == 0:  # the same for all
        return t.narrow(dim, 0, 1).expand(*t.shape[:dim], present.n, *t.shape[dim + 1 :])
    return t.index_select(dim, present.index)


def _scattered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _given(args, kwargs)
    if given is None:
        return None
    (x, dim, index, source), more = given
    first = x if is_narrow(x) else source
    if not is_narrow(first) or not isinstance(source, Tensor) or not isinstance(dim, int):
        return None
    at = first._at
    if (
        dim % first._held.ndim == at[1]
        or x.ndim != first._held.ndim
        or (is_in_place(func) and first is not x)
    ):
        return None
    parts = [_part(t, at) if t.ndim == x.ndim else plain(t) for t in (x, source)]
    by_row = index.ndim < 2 and "scatter" not in func.__name__
    parts.insert(1, plain(index) if by_row else _part(index, at))
    if any(part is None for part in parts):
        return None
    out = func(parts[0], dim, *parts[1:], **more)
    return like(x, out) if is_in_place(func) else at_place(out, at)


def _gathered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not is_narrow(x) or len(args) + len(kwargs) != 3:
        return None
    takes = func.__name__ == "take_along_dim"
    named = {**dict(zip(("indices", "dim") if takes else ("dim", "index"), args[1:], strict=False)), **kwargs}
    index, dim = named.get("indices" if takes else "index"), named.get("dim")
    if not isinstance(index, Tensor) or not isinstance(dim, int) or index.ndim != x._held.ndim:
        return None
    part = None if dim % index.ndim == x._at[1] else _part(index, x._at)
    if part is None:
        return None
    return like(x, func(x._data, part, dim) if takes else func(x._data, dim, part))


def _sorted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, at = args[0], 2 if func.__name__ == "topk" else 1
    default = 0 if func.__name__ == "msort" else -1
    dim = args[at] if len(args) > at else kwargs.get("dim", default)
    if not is_narrow(x) or isinstance(dim, bool) or not isinstance(dim, int) or "out" in kwargs:
        return None
    if dim % x._held.ndim == x._at[1]:
        return None
    out = func(x._data, *args[1:], **kwargs)
    return like(x, out) if isinstance(out, Tensor) else type(out)([like(x, part) for part in out])


RULES: list[tuple[str, Rule]] = [(SCATTERS, _scattered)]
"""In place, too."""
NOT_IN_PLACE: list[tuple[str, Rule]] = [(GATHERS, _gathered), (SORTS, _sorted)]
