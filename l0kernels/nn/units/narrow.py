"""Activations of which only the present units exist, on their way through somebody's forward.

To the forward a :class:`Narrow` has its full shape. Functions of torch that treat units one by one run on
what exists; every other one gets the dense tensor, with zeros for what is closed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from ..._compat import pytree, running_function, view_as_subclass, without_torch_function
from . import table
from .draws import Draw, Space, Spaces


class Narrow(Tensor):
    """A tensor that reports all units of one dimension, and holds those that exist.

    Its gradient is that of what it holds: torch's code sees that alone, and autograd runs on it.
    """

    _held: Tensor
    _at: tuple[Space, int, Draw, Spaces] | None

    @staticmethod
    def of(data: Tensor, space: Space, dim: int, draw: Draw, spaces: Spaces) -> Narrow:
        """`data`, whose dimension `dim` holds what `draw` leaves of `space`."""
        return _at_place(data, (space, dim, draw, spaces))

    @property
    def _data(self) -> Tensor:
        """What exists, as a plain tensor."""
        held = self._held
        if self._at is not None and not held.requires_grad and torch.is_grad_enabled():
            with without_torch_function():
                if _REQUIRES_GRAD.__get__(self):  # autograd has made this the result of a Function
                    held = self._held = self.as_subclass(Tensor)
        return held

    def __new__(cls, *args: Any) -> Narrow:
        raise TypeError("Narrow is made by gated models alone")

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the dense tensor."""
        shape = self._data.shape
        if self._at is None:
            return shape
        space, dim, _, _ = self._at
        return torch.Size((*shape[:dim], space.size, *shape[dim + 1 :]))

    def size(self, dim: int | None = None) -> Any:
        """Of the dense tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of the dense tensor."""
        return self._held.ndim

    # Asked for more often than anything is computed, and dear by way of __torch_function__.
    ndim = property(dim)
    dtype = property(lambda self: self._held.dtype)
    device = property(lambda self: self._held.device)
    layout = property(lambda self: self._held.layout)
    is_cpu = property(lambda self: self._held.is_cpu)

    def numel(self) -> int:
        """Of the dense tensor."""
        return self.shape.numel()

    nelement = numel

    def dense(self) -> Tensor:
        """All units, zeros in the closed ones."""
        if self._at is None:
            return self._data
        (space, dim, draw, _), data = self._at, self._data
        present = draw.present(space)
        if present.places is None:
            return data
        if present.within is not None:
            data = data.index_select(dim, present.within)
        shape = self.shape
        return torch.zeros(shape, dtype=data.dtype, device=data.device).index_copy(dim, present.places, data)

    def settle(self, value: Tensor) -> None:
        """Takes on the value of a function in place, which :meth:`dense` has been given to."""
        assert self._at is not None
        space, dim, draw, _ = self._at
        if value is self._held:
            self._at = None if value.shape[dim : dim + 1] != (space.size,) else self._at
        elif value.shape != self.shape or value.dtype != self._held.dtype:
            self._held, self._at = value, None  # it holds all units from now on
        else:  # as others see that have a view of it
            index = draw.present(space).index
            self._data.copy_(value if index is None else value.index_select(dim, index))

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.dense())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.dense().__deepcopy__(memo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() and args and isinstance(args[0], Narrow):
            at = args[0]._at
            if at is not None and at[2].z.requires_grad:
                refuse_function()
        rule = RULES.get(func)
        if rule is not None:
            out = rule(func, args, kwargs)
            if out is not None:
                return out
        return _on_dense(func, args, kwargs)


def _at_place(data: Tensor, at: tuple[Space, int, Draw, Spaces]) -> Narrow:
    found: Narrow = view_as_subclass(Narrow, data)
    found._held = data
    found._at = at
    return found


_REQUIRES_GRAD: Any = Tensor.requires_grad
_GRAD: Any = Tensor.grad


def refuse_function() -> None:
    """RuntimeError in a torch.autograd.Function: its backward is not that of what exists of gated units."""
    cls = running_function(sys._getframe(2))
    if cls is CheckpointFunction:
        raise RuntimeError("torch.utils.checkpoint must have use_reentrant=False in a gated model, got True")
    if cls is not None:
        raise RuntimeError(
            f"{cls.__name__}.apply must not get or make gated units, got some: the example that gate_ ran in "
            "eval() did not show it; exclude the layers around it"
        )


def plain(value: Any) -> Any:
    """`value` with dense tensors for narrow ones, in whatever it holds them."""
    if isinstance(value, Narrow):
        return value.dense()
    if isinstance(value, Tensor):
        return value
    return pytree.tree_map_only(Narrow, Narrow.dense, value)


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    changed = [args[0]] if _is_in_place(func) else []
    changed += [kwargs["out"]] if isinstance(kwargs.get("out"), Narrow) else []
    dense = {id(x): x.dense() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Narrow)}
    for x in changed:
        if isinstance(x, Narrow) and dense[id(x)] is not x._held:  # autograd keeps what dense() has read
            dense[id(x)] = _like(x, x._data.clone()).dense()

    def swap(x: Any) -> Any:
        return dense[id(x)] if isinstance(x, Narrow) else x

    out = func(*pytree.tree_map(swap, args), **pytree.tree_map(swap, kwargs))
    for x in changed:
        if isinstance(x, Narrow):
            value = dense[id(x)]
            if x._at is not None:
                x.settle(value)
            if out is value:
                out = x
    return out


@cache
def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _CHANGE


_CHANGE = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ior__",
    "__iand__",
    "__ixor__",
}

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""(function, args, kwargs) -> its result, or None where it must see the dense tensor."""


def _like(x: Narrow, data: Any, dim: int | None = None) -> Any:
    """The result of a function of x: what it holds, at the same or another dimension."""
    at = x._at
    if data is x._held:
        return x
    assert at is not None
    return _at_place(data, at if dim is None or dim == at[1] else (at[0], dim, at[2], at[3]))


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Narrow) and x._at is not None


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Narrow) or x._at is None:
        return None
    for a in (*args[1:], *kwargs.values()):
        if type(a) in _NUMBERS:
            continue
        if isinstance(a, Tensor) and (a.ndim or isinstance(a, Narrow)) and (args or a is not x):
            return _elementwise(func, args, kwargs) if args else None
    return _like(x, func(x._data, *args[1:], **kwargs) if args else func(**{**kwargs, "input": x._data}))


def _converted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As another tensor is, perhaps a narrow one."""
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    return _like(x, func(x._data, *plain(args[1:]), **plain(kwargs)))


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and not kwargs:
        a, b = args
        alike = type(b) in _NUMBERS or (type(b) is Narrow and type(a) is Narrow and _lie_alike(a, b))
        if alike and type(a) is Narrow and a._at is not None:
            return _like(a, func(a._data, b._data if type(b) is Narrow else b))
    first = next((a for a in args if _is_narrow(a)), None)
    if first is None or any(isinstance(a, Tensor) for a in kwargs.values()):
        return None
    if _is_in_place(func) and args[0] is not first:
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
        return first
    if out.ndim != ndim:
        return None
    return Narrow.of(out, space, end + ndim, draw, spaces)


_NUMBERS = (float, int, bool)


def _lie_alike(a: Narrow, b: Narrow) -> bool:
    """Whether their units meet, where both hold the same ones."""
    at, other = a._at, b._at
    if at is None or other is None or a._held.ndim != b._held.ndim:
        return False
    return at is other or (at[0] is other[0] and at[1] == other[1] and at[2] is other[2])


def _dims(value: Any, ndim: int) -> list[int]:
    values = [value] if isinstance(value, int) else [*value]
    return [int(dim) % ndim for dim in values]


def _permuted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    data = func(x._data, *args[1:], **kwargs)
    return _like(x, data, _told(_moved_to, func, data.ndim, x._at[1], args[1:], kwargs))


def _told(
    where: Callable[..., int | None], func: Any, ndim: int, dim: int, args: Any, kwargs: dict[str, Any]
) -> int | None:
    """`where`, which is cached, of a function and its arguments behind the first."""
    try:
        return where(func, ndim, dim, args, *kwargs.items())
    except TypeError:  # a list
        return where(func, ndim, dim, _frozen(args), *_frozen(kwargs.items()))


def _frozen(values: Any) -> Any:
    """Arguments as what they are looked up by."""
    return tuple(_frozen(value) if isinstance(value, tuple | list) else value for value in values)


@lru_cache(1024)
def _moved_to(func: Any, ndim: int, dim: int, args: tuple[Any, ...], *kwargs: tuple[str, Any]) -> int:
    """Where dimension `dim` is behind the function, of a tensor whose sizes are its dimensions' numbers."""
    sizes = func(torch.empty([*range(1, ndim + 1)], device="meta"), *args, **dict(kwargs)).shape
    return sizes.index(dim + 1)


def _squeezed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    ndim, dim, name = x._data.ndim, x._at[1], func.__name__
    if name == "unsqueeze":
        at = args[1] if len(args) > 1 else kwargs["dim"]
        at %= ndim + 1
        return _like(x, func(x._data, *args[1:], **kwargs), dim + (at <= dim))
    if len(args) < 2 and "dim" not in kwargs:
        gone = [i for i, size in enumerate(x.shape) if size == 1]
    else:
        gone = [i for i in _dims(args[1] if len(args) > 1 else kwargs["dim"], ndim) if x.shape[i] == 1]
    if dim in gone:
        return None
    data = x._data.squeeze(tuple(gone)) if gone else x._data
    return _like(x, data, dim - sum(i < dim for i in gone))


def _reshaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    space, dim, draw, spaces = x._at
    full = x.shape
    # A tensor of one element with the shape of x tells which shape is asked for.
    shape = (
        func(torch.zeros((), device=x._data.device).expand(full), *args[1:], **kwargs).shape
        if func is not (Tensor.view)
        else _view_shape(full, args[1:], kwargs)
    )
    if shape is None:
        return None
    before, end = full[:dim].numel(), full[: dim + 1].numel()
    passed = 1
    for at, size in enumerate(shape):
        if passed == before and size > 0 and size % space.size == 0:
            times = size // space.size
            if end * times <= full.numel() and full[dim + 1 :].numel() % times == 0:
                if times > 1 and _run(full[dim + 1 :], times) is None:
                    return None
                narrow = (*shape[:at], draw.present(space).n * times, *shape[at + 1 :])
                if not x._data.retains_grad:  # as of the dense tensor, the result is a view
                    x._held = x._data.contiguous()
                data = x._data.reshape(narrow)
                return Narrow.of(data, spaces.repeated(space, times), at, draw, spaces)
        if passed == before and 1 < size < space.size and space.size % size == 0:
            found = _in_runs(x, shape, at)
            return _in_tiles(x, shape, at) if found is None else found
        passed *= size
    return None


def _in_runs(x: Narrow, shape: torch.Size, at: int) -> Any:
    """x whose units, in runs of one, are seen run by run: heads, of a projection's features."""
    assert x._at is not None
    space, _, draw, spaces = x._at
    times = space.size // shape[at]
    if _run(shape[at + 1 :], times) is None:
        return None
    runs = spaces.runs(space, times)
    if runs is None or draw.present(runs).n * times != draw.present(space).n:
        return None
    if not x._data.retains_grad:
        x._held = x._data.contiguous()
    data = x._data.reshape((*shape[:at], draw.present(runs).n, *shape[at + 1 :]))
    return Narrow.of(data, runs, at, draw, spaces)


def _in_tiles(x: Narrow, shape: torch.Size, at: int) -> Any:
    """x whose units come several times, seen one after the other: queries, keys and values of one layer."""
    assert x._at is not None
    space, _, draw, spaces = x._at
    times = shape[at]
    tile = spaces.tile(space, times)
    if (
        tile is None
        or at + 1 == len(shape)
        or not 1 < shape[at + 1] <= tile.size
        or tile.size % shape[at + 1]
    ):
        return None
    run = tile.size // shape[at + 1]
    runs = spaces.runs(tile, run)
    if runs is None or _run(shape[at + 2 :], run) is None:
        return None
    n = draw.present(runs).n
    if n * run * times != draw.present(space).n:
        return None
    if not x._data.retains_grad:
        x._held = x._data.contiguous()
    return Narrow.of(x._data.reshape((*shape[: at + 1], n, *shape[at + 2 :])), runs, at + 1, draw, spaces)


def _run(sizes: Sequence[int], product: int) -> int | None:
    """How many of the first sizes have this product."""
    total = 1
    for i, size in enumerate(sizes):
        if total == product:
            return i
        total *= size
    return len(sizes) if total == product else None


def _view_shape(full: torch.Size, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    if kwargs or not args or isinstance(args[0], torch.dtype):
        return None
    sizes = [*(args[0] if isinstance(args[0], Sequence) else args)]
    if -1 in sizes:
        at = sizes.index(-1)
        known = torch.Size(size for size in sizes if size != -1).numel()
        sizes[at] = full.numel() // known if known else 0
    return torch.Size(sizes) if torch.Size(sizes).numel() == full.numel() else None


def _expanded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None or kwargs:
        return None
    sizes = [*(args[1] if isinstance(args[1], Sequence) else args[1:])]
    at = x._at[1] + len(sizes) - x._data.ndim
    if sizes[at] not in (-1, x._at[0].size):
        return None
    sizes[at] = -1
    return _like(x, x._data.expand(sizes), at)


def _attended(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """scaled_dot_product_attention of the heads that exist."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    q = named["query"]
    if not isinstance(q, Narrow) or q._at is None or q._at[1] != q._held.ndim - 3:
        return None
    space, dim, draw, spaces = q._at
    for name in ("key", "value", "attn_mask"):
        x = named.get(name)
        if isinstance(x, Tensor) and x.ndim > 2:
            named[name] = found = _heads_of(x, space, draw, spaces, named.get("enable_gqa", False))
            if found is None:
                return None
    named["query"] = q._data
    return Narrow.of(func(**named), space, dim, draw, spaces)


def _heads_of(x: Tensor, space: Space, draw: Draw, spaces: Spaces, shares: bool) -> Tensor | None:
    """What exists of the heads of x, (..., H, rows, columns), which are those of `space`, fewer if queries
    share them; None where they may lie otherwise."""
    heads = x.shape[-3]
    if heads == 1 and space.size > 1 and not isinstance(x, Narrow):
        return x
    if heads != space.size:
        found = spaces.runs(space, space.size // heads) if shares and heads else None
        if found is None:
            return None
        space = found
    if isinstance(x, Narrow) and x._at is not None:
        alike = x._at[0] is space and x._at[1] == x._held.ndim - 3 and _open_alike(x._at[2], draw)
        return x._data if alike else None
    index = draw.present(space).index
    x = plain(x)
    return x if index is None else x.index_select(-3, index)


def _multiplied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products of matrices, one for each head that exists."""
    if len(args) != 2 or kwargs or not all(_is_narrow(x) for x in args):
        return None
    (a, b), (space, dim, draw, spaces) = args, args[0]._at
    if not _lie_alike(a, b) or dim >= a._held.ndim - 2:
        return None
    return Narrow.of(func(a._data, b._data), space, dim, draw, spaces)


def _concatenated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    at = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    tensors = [t for t in tensors if isinstance(t, Narrow) or t.shape != (0,)]  # as torch leaves it out
    last = next((t for t in reversed(tensors) if _is_narrow(t)), None)
    if last is None:
        return None
    first = last._at
    _, dim, draw, known = first
    at %= last._held.ndim
    if at != dim:
        return _behind_each_other(tensors, at, first)
    spaces = []
    for t in tensors:
        other = t._at if isinstance(t, Narrow) else None
        if other is None or other[1] != dim or not _open_alike(other[2], draw):
            return None
        spaces.append(other[0])
    data = torch.cat([t._data for t in tensors], at)
    return _at_place(data, (known.joined(spaces), dim, draw, known))


def _behind_each_other(tensors: Sequence[Tensor], at: int, place: tuple[Space, int, Draw, Spaces]) -> Any:
    """Along another dimension than that of the units; of what has all units, those that exist."""
    space, dim, draw, _ = place
    index, parts = draw.present(space).index, []
    for t in tensors:
        other = t._at if isinstance(t, Narrow) else None
        if other is not None:
            if other[0] is not space or other[1] != dim or not _open_alike(other[2], draw):
                return None
            parts.append(t._data)  # type: ignore[attr-defined]
        elif t.ndim <= dim or t.shape[dim] != space.size:
            return None
        else:
            t = plain(t)
            parts.append(t if index is None else t.index_select(dim, index))
    return _at_place(torch.cat(parts, at), place)


def _open_alike(earlier: Draw, draw: Draw) -> bool:
    """Whether what exists is the same: keys and values of a forward before, in a cache."""
    if earlier is draw:
        return True
    both = earlier.exact and draw.exact and earlier._counts == draw._counts
    return both and torch.equal(earlier.is_open, draw.is_open)


def _divided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["tensor"]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    space, dim, draw, spaces = x._at
    sizes = args[1] if len(args) > 1 else next((v for k, v in kwargs.items() if k != "dim"), None)
    at = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x._data.ndim
    if at != dim:
        return tuple(_like(x, part) for part in func(x._data, sizes, at))
    parts = func(torch.arange(space.size, device="cpu"), sizes, 0)
    found, index, start = [], draw.present(space).index, 0
    for part in parts:
        stop = start + len(part)
        piece = spaces.part(space, start, stop)
        first, last = start, stop
        if index is not None:
            first, last = torch.searchsorted(index, torch.tensor([start, stop], device="cpu")).tolist()
        data = x._data.narrow(dim, first, last - first)
        mine = draw.present(piece).n
        if mine != last - first or not mine:  # not every function takes what has no channel at all
            return None
        found.append(Narrow.of(data, piece, dim, draw, spaces))
        start = stop
    return tuple(found)


def _unbound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    at = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(x, Narrow) or x._at is None or at % x._held.ndim == x._at[1]:
        return None
    dim = x._at[1] - (at % x._held.ndim < x._at[1])
    return tuple(_like(x, part, dim) for part in x._data.unbind(at))


def _item(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    if not isinstance(x, Narrow) or x._at is None:
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return None
    if any(isinstance(part, bool) for part in parts):
        return None
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x._data.ndim - taken)
    dim, source = 0, 0
    for part in parts:
        if part is None:
            dim += 1
            continue
        if source == x._at[1]:
            if part != slice(None):
                return None
            break
        dim += not isinstance(part, int)
        source += 1
    else:
        dim += x._at[1] - source
    return _like(x, x._data[tuple(parts)], dim)


def _reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    for a in args[1:]:
        if isinstance(a, Tensor):
            return None
    dim = _told(_reduced_to, func, x._held.ndim, x._at[1], args[1:], kwargs)
    if dim is None:
        return None
    out = func(x._data, *args[1:], **kwargs)
    if isinstance(out, Tensor):
        return _like(x, out, dim)
    return type(out)([_like(x, part, dim) for part in out]) if isinstance(out, tuple) else None


@lru_cache(1024)
def _reduced_to(
    func: Any, ndim: int, dim: int, args: tuple[Any, ...], *kwargs: tuple[str, Any]
) -> int | None:
    """Where dimension `dim` is behind the function, None where it is, or may be, reduced."""
    named = dict(kwargs)
    value = args[0] if args else named.get("dim")
    if func.__name__ == "norm" or value is None or isinstance(value, bool):
        return None
    dims = _dims(value, ndim)
    if dim in dims or not dims:
        return None
    out = func(torch.zeros([2] * ndim, device="cpu"), *args, **named)  # of one alone there is no variance
    kept = (out if isinstance(out, Tensor) else out[0]).ndim == ndim
    return dim if kept else dim - sum(d < dim for d in dims)


def _over(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(x, Narrow) or x._at is None or not isinstance(dim, int) or func.__name__ == "normalize":
        return None
    return None if dim % x._data.ndim == x._at[1] else _like(x, func(x._data, *args[1:], **kwargs))


def _spatial(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    for a in (*args[1:], *kwargs.values()):
        if isinstance(a, Narrow) and a is not x:
            return None
    ndim = x._held.ndim
    if x._at[1] != ndim - (_spatial_dims(func) or ndim - 2) - 1:
        return None
    out = func(x._data, *args[1:], **kwargs) if args else func(**{**kwargs, "input": x._data})
    return _like(x, out) if isinstance(out, Tensor) else tuple(_like(x, part) for part in out)


@cache
def _spatial_dims(func: Any) -> int:
    """How many dimensions a function says it is of, 0: it does not."""
    return next((int(digit) for digit in "123" if f"{digit}d" in func.__name__), 0)


def _padded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, sides = args[0], args[1] if len(args) > 1 else kwargs["pad"]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    touched = {x._data.ndim - 1 - i // 2 for i, size in enumerate(sides) if size}
    return None if x._at[1] in touched else _like(x, func(x._data, *args[1:], **kwargs))


def _looked_at(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0]._data, *args[1:], **kwargs)


def _hooked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook sees, and may change, the gradient of all units."""
    x, hook = args
    if x._at is None:
        return func(x._data, hook)
    index = x._at[2].present(x._at[0]).index

    def narrow(grad: Tensor) -> Tensor | None:
        found = hook(_like(x, grad).dense())
        return found if found is None or index is None else found.index_select(x._at[1], index)

    return func(x._data, narrow)


def _gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, grad = args[0], func(args[0]._data)
    return grad if grad is None or x._at is None else _like(x, grad)


def _set(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    func(args[0]._data, *args[1:])
    return True  # nobody sees it; None would ask for the dense tensor


def _made_new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0]._data, *args[1:], **kwargs) if isinstance(args[0], Narrow) else None


def _length(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].shape[0]


def _rules() -> dict[Any, Rule]:
    kinds: list[tuple[str, Rule]] = [
        (
            f"{table.POINTWISE} rsqrt",
            _pointwise,
        ),  # of norms whose forward is their own: closed heads do not exist
        ("to type_as", _converted),
        (f"{table.ELEMENTWISE} {table.QUOTIENTS}", _elementwise),
        (table.SPATIAL, _spatial),
        (table.REDUCTIONS, _reduced),
        (table.OVER, _over),
        ("permute transpose swapaxes swapdims movedim moveaxis t", _permuted),
        ("squeeze unsqueeze", _squeezed),
        ("view reshape flatten unflatten", _reshaped),
        ("cat concat concatenate", _concatenated),
        ("expand", _expanded),
        ("scaled_dot_product_attention", _attended),
        ("matmul bmm __matmul__", _multiplied),
        ("chunk split split_with_sizes tensor_split", _divided),
        ("unbind", _unbound),
        ("__getitem__", _item),
        ("pad", _padded),
        ("is_floating_point is_complex element_size get_device ndimension is_signed", _looked_at),
        ("__len__", _length),
        ("register_hook", _hooked),
        ("retain_grad", _set),
        ("new_zeros new_ones new_empty new_full", _made_new),
    ]
    rules: dict[Any, Rule] = {}
    for names, rule in kinds:
        in_place = rule not in (_permuted, _squeezed, _reshaped)  # those have it be of another shape
        for function in table.functions(names, in_place):
            rules[function] = rule
    rules[_REQUIRES_GRAD.__set__], rules[_GRAD.__get__] = _set, _gradient
    names = "device dtype requires_grad ndim is_cuda layout is_cpu is_meta is_leaf grad_fn is_sparse"
    for name in names.split():
        rules[getattr(Tensor, name).__get__] = _looked_at
    return rules


RULES = _rules()
