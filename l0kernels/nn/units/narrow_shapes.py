"""Functions that move, part and join dimensions, on the units that exist."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._compat import shares_memory
from .draws import Draw, Space, Spaces
from .narrow import Narrow, Rule, at_place, dims_of, is_narrow, lies_last, like, open_alike, plain
from .narrow_layout import (
    IN_ORDER,
    LAST,
    Order,
    in_order,
    is_view,
    is_whole,
    keep_order,
    known_order,
    pair,
    told,
)
from .narrow_shuffle import Parted, joined, moved, order_of, parted, shuffled


def _permuted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return moved(x, func, args[1:], kwargs)
    data, at, order = func(x._data, *args[1:], **kwargs), x._at[1], x._order
    dim, lies = told(_moved, func, data.ndim, (at, order or IN_ORDER), args[1:], kwargs)
    found = like(x, data, dim)
    if order is not None or data.size(dim) == 1:
        found._order = lies
    return found


@lru_cache(1024)
def _moved(
    func: Any, ndim: int, lies: tuple[int, Order], args: tuple[Any, ...], *kwargs: tuple[str, Any]
) -> tuple[int, Order]:
    """Where a dimension is behind the function, and how what lies in an order does."""
    dims = order_of(func, ndim, args, *kwargs)
    dim, order = lies
    return dims.index(dim), in_order([dims.index(d) for d in order or range(ndim)])


def _squeezed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    ndim, dim, name = x._data.ndim, x._at[1], func.__name__
    if name == "unsqueeze":
        at = args[1] if len(args) > 1 else kwargs["dim"]
        at %= ndim + 1
        return keep_order(
            like(x, func(x._data, *args[1:], **kwargs), dim + (at <= dim)), x, func, args[1:], kwargs
        )
    if len(args) < 2 and "dim" not in kwargs:
        gone = [i for i, size in enumerate(x.shape) if size == 1]
    else:
        gone = [i for i in dims_of(args[1] if len(args) > 1 else kwargs["dim"], ndim) if x.shape[i] == 1]
    if dim in gone:
        return None
    data = x._data.squeeze(tuple(gone)) if gone else x._data
    return keep_order(like(x, data, dim - sum(i < dim for i in gone)), x, func, args[1:], kwargs)


def _reshaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return _joined(func, args, kwargs) if type(x) is Parted else None
    space, dim, draw, spaces = x._at
    full = x.shape
    shape = _asked(func, full, args[1:], kwargs)
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
                place = spaces.repeated(space, times), at, draw, spaces
                return _of_shape(x, narrow, place, func, args[1:], kwargs)
        if passed == before and 1 < size < space.size and space.size % size == 0:
            found = _in_runs(x, shape, at, func, args[1:], kwargs)
            found = _in_tiles(x, shape, at, func, args[1:], kwargs) if found is None else found
            return parted(x, shape, at, func, args[1:], kwargs) if found is None else found
        passed *= size
    return None


def _of_shape(
    x: Narrow,
    shape: Sequence[int],
    place: tuple[Space, int, Draw, Spaces],
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
) -> Narrow:
    """What exists of x in another shape: a view of it if that of the dense tensor is one."""
    data, order = x._data, x._order
    out = data.reshape(shape)
    if is_whole(x):
        viewed, lies = True, IN_ORDER
        if data.is_contiguous():
            return at_place(out, place)
    else:
        viewed, lies = is_view(x, func, args, kwargs)
    if viewed != shares_memory(data, out):
        if viewed:
            pair(place[2], data, out)
        else:
            out = out.clone(memory_format=torch.contiguous_format)
    found = at_place(out, place)
    if order is not None:
        found._order = lies if viewed else IN_ORDER
    elif out.shape[place[1]] == 1 and lies:
        found._order = lies
    return found


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of units that were seen in several dimensions: what asks for the shape with them in one."""
    x = args[0]
    if func is Tensor.view and x.is_moved:  # which torch refuses
        return None
    whole = joined(x)
    shape = None if whole is None else _asked(func, x.shape, args[1:], kwargs)
    if shape is None or whole is None:
        return None
    return whole if shape == whole.shape else whole.reshape(shape)


def _asked(func: Any, full: torch.Size, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size | None:
    """Which shape a function asks for, of a tensor of shape `full`; None: that is not known."""
    if func is Tensor.view or (func is Tensor.reshape and not kwargs):
        return _view_shape(full, args, kwargs)
    return func(torch.zeros((), device="cpu").expand(full), *args, **kwargs).shape


def _in_runs(x: Narrow, shape: torch.Size, at: int, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """x whose units, in runs of one, are seen run by run: heads, of a projection's features."""
    assert x._at is not None
    space, _, draw, spaces = x._at
    times = space.size // shape[at]
    if _run(shape[at + 1 :], times) is None:
        return None
    runs = spaces.runs(space, times)
    if runs is None or draw.present(runs).n * times != draw.present(space).n:
        return None
    narrow = (*shape[:at], draw.present(runs).n, *shape[at + 1 :])
    return _of_shape(x, narrow, (runs, at, draw, spaces), func, args, kwargs)


def _in_tiles(x: Narrow, shape: torch.Size, at: int, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
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
    narrow = (*shape[: at + 1], n, *shape[at + 2 :])
    return _of_shape(x, narrow, (runs, at + 1, draw, spaces), func, args, kwargs)


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
    return keep_order(like(x, x._data.expand(sizes), at), x, func, args[1:], kwargs)


def _is_nothing(t: Tensor) -> bool:
    """Whether torch.cat leaves t out."""
    return type(t) is not Narrow and t.shape == (0,)


def _concatenated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    at = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    last = tensors[-1]
    if type(last) is not Narrow or last._at is None:
        last = next((t for t in reversed(tensors) if is_narrow(t)), None)
        if last is None:
            return None
    place = last._at
    assert place is not None
    _, dim, draw, known = place
    at %= last._held.ndim
    if at != dim:
        return _behind_each_other([t for t in tensors if not _is_nothing(t)], at, place)
    spaces, parts = [], []
    order, alike = last._order, True
    for t in tensors:
        if type(t) is Narrow and (other := t._at) is not None:
            if other[1] != dim or not (other[2] is draw or open_alike(other[2], draw)):
                return None
            spaces.append(other[0])
            parts.append(t._data)
            alike = alike and t._order is order
        elif not _is_nothing(t):
            if t.ndim != last._held.ndim:
                return None
            spaces.append(known.ungated(t.shape[dim], len(draw.z) - 1))
            parts.append(plain(t))
            alike = False
    found = at_place(torch.cat(parts, at), (known.joined(spaces), dim, draw, known))
    if not alike:
        return _joined_order(found, tensors)
    if order is not None:
        found._order = LAST if order == LAST else IN_ORDER
    return found


def _behind_each_other(tensors: Sequence[Tensor], at: int, place: tuple[Space, int, Draw, Spaces]) -> Any:
    """Along another dimension than that of the units; of what has all units, those that exist."""
    space, dim, draw, _ = place
    index, parts = draw.present(space).index, []
    for t in tensors:
        other = t._at if isinstance(t, Narrow) else None
        if other is not None:
            if other[0] is not space or other[1] != dim or not open_alike(other[2], draw):
                return None
            parts.append(t._data)  # type: ignore[attr-defined]
        elif t.ndim <= dim or t.shape[dim] != space.size:
            return None
        else:
            t = plain(t)
            parts.append(t if index is None else t.index_select(dim, index))
    return _joined_order(at_place(torch.cat(parts, at), place), tensors)


def _joined_order(found: Narrow, tensors: Sequence[Tensor]) -> Narrow:
    """torch.cat makes images of channels last of nothing else."""
    if any(isinstance(t, Narrow) and t._order is not None for t in tensors):
        last = found._held.ndim == 4 and all(lies_last(t) for t in tensors if not _is_nothing(t))
        found._order = LAST if last else IN_ORDER
    return found


def _divided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None:
        return None
    space, dim, draw, spaces = x._at
    sizes = args[1] if len(args) > 1 else next((v for k, v in kwargs.items() if k != "dim"), None)
    at = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x._data.ndim
    if at != dim:
        return tuple(like(x, part) for part in func(x._data, sizes, at))
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    pieces, ends = _pieces(func, space, spaces, tuple(sizes) if isinstance(sizes, list) else sizes)
    index = draw.present(space).index
    stops = ends.tolist() if index is None else torch.searchsorted(index, ends).tolist()
    lengths = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    if not all(lengths):  # not every function takes what has no channel at all
        return None
    data = x._data
    if func.__name__ == "tensor_split":  # into its parts torch lets one write
        parts = [data.narrow(dim, stop - n, n) for n, stop in zip(lengths, stops, strict=True)]
    else:
        parts = [*data.split_with_sizes(lengths, dim)]
    found = tuple(
        at_place(part, (piece, dim, draw, spaces)) for part, piece in zip(parts, pieces, strict=True)
    )
    if x._order is not None or 1 in lengths:
        order = known_order(x)
        for part in found:
            part._order = order
    return found


def _pieces(func: Any, space: Space, spaces: Spaces, sizes: Any) -> tuple[list[Space], Tensor]:
    """What a function divides a space into, and where each piece ends."""
    key = "pieces", func, sizes
    found = space._made.get(key)
    if found is None:
        parts = func(torch.arange(space.size, device="cpu"), sizes, 0)
        ends = torch.tensor([len(part) for part in parts], device="cpu").cumsum(0)
        pieces = [spaces.of(space.labels[part].clone()) for part in parts]
        found = space._made[key] = pieces, ends
    return found


def _unbound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    at = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(x, Narrow) or x._at is None or at % x._held.ndim == x._at[1]:
        return None
    dim = x._at[1] - (at % x._held.ndim < x._at[1])
    return tuple(keep_order(like(x, part, dim), x, func, args[1:], kwargs) for part in x._data.unbind(at))


def _rolled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dims = args[0], args[2] if len(args) > 2 else kwargs.get("dims")
    if not isinstance(x, Narrow) or x._at is None or dims is None:
        return None
    dims = dims_of(dims, x._held.ndim)
    return like(x, func(x._data, *args[1:], **kwargs)) if dims and x._at[1] not in dims else None


_ALL = slice(None)


def _item(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    if not isinstance(x, Narrow) or x._at is None:
        return None
    if type(index) is Tensor and index.dtype in (torch.int64, torch.int32) and x._at[1]:
        return like(x, x._data[index], x._at[1] + index.ndim - 1)
    parts = [*index] if isinstance(index, tuple) else [index]
    if all(type(part) is slice for part in parts):
        at = x._at[1]
        return like(x, x._data[index]) if at >= len(parts) or parts[at] == _ALL else None
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
            if part != _ALL:
                return None
            break
        dim += not isinstance(part, int)
        source += 1
    else:
        dim += x._at[1] - source
    return keep_order(like(x, x._data[tuple(parts)], dim), x, func, args[1:], kwargs)


RULES: list[tuple[str, Rule]] = [
    ("cat concat concatenate", _concatenated),
    ("expand", _expanded),
    ("chunk split split_with_sizes tensor_split", _divided),
    ("unbind", _unbound),
    ("__getitem__", _item),
    ("roll", _rolled),
    ("channel_shuffle native_channel_shuffle", shuffled),
]
OF_ANOTHER_SHAPE: list[tuple[str, Rule]] = [
    ("permute transpose swapaxes swapdims movedim moveaxis t", _permuted),
    ("squeeze unsqueeze", _squeezed),
    ("view reshape flatten unflatten", _reshaped),
]
"""In place they would have the tensor itself be of another shape: these get the dense one."""
