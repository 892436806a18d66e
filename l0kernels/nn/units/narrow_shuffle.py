"""Channels that are seen in groups, moved and joined again: those that exist, in another order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._compat import view_as_subclass
from ...narrow import narrow_shuffle
from .narrow import Narrow, at_place, pair_whole
from .narrow_layout import IN_ORDER, frozen, in_order, is_view, is_whole


class Parted(Narrow):
    """A narrow tensor whose units are seen in several dimensions, in none of which as many exist everywhere.

    It computes nothing: what moves its dimensions notes where they are, and what joins those of the units
    has the units in that order. All else gets the dense tensor.

    Attributes:
        sizes: its source's shape, with several sizes in place of the units'.
        order: which of these dimensions each of its own is.
        seen: which of them the units are seen in.
    """

    sizes: torch.Size
    order: tuple[int, ...]
    seen: range

    @staticmethod
    def of_source(source: Narrow, sizes: torch.Size, order: tuple[int, ...], seen: range) -> Parted:
        found: Parted = view_as_subclass(Parted, source._held)
        found._held, found._at, found._source = source._held, None, source
        found._drawn = None if source._at is None else source._at[2]
        found.sizes, found.order, found.seen = sizes, order, seen
        return found

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the dense tensor."""
        if self._source is None:
            return self._held.shape
        return torch.Size([self.sizes[dim] for dim in self.order])

    def dim(self) -> int:
        """As of the dense tensor."""
        return self._held.ndim if self._source is None else len(self.order)

    ndim = property(dim)

    @property
    def _data(self) -> Tensor:
        return self.dense()

    def dense(self) -> Tensor:
        """All units, as a view of the source, which holds them all from now on."""
        source = self._source
        if source is not None:
            with torch.enable_grad():  # whoever asks first: others may ask for a gradient
                whole = source.dense()
                self._held, self._source = whole.view(self.sizes).permute(self.order), None
            if source._at is not None and whole is not source._held:
                pair_whole(source, whole)
        return self._held

    @property
    def is_moved(self) -> bool:
        """Whether its dimensions are not in the order of its source's."""
        return not _is_in_order(self.order, self.sizes)


def parted(
    x: Narrow, shape: torch.Size, at: int, func: Any, args: Any, kwargs: dict[str, Any]
) -> Parted | None:
    """x seen as `shape` by a function, its units from dimension `at` on; None: others are among those."""
    assert x._at is not None
    size, product, stop = x._at[0].size, 1, at
    while product < size and stop < len(shape):
        product, stop = product * shape[stop], stop + 1
    if product != size:
        return None
    whole = torch.Size((*shape[:at], size, *shape[stop:]))
    source: Any = x
    if not is_whole(x) and not is_view(x, func, args, kwargs)[0]:
        source = x.clone(memory_format=torch.contiguous_format)
    source = source if whole == x.shape else source.reshape(whole)
    if type(source) is not Narrow or source._at is None or source._at[1] != at:
        return None
    return Parted.of_source(source, shape, tuple(range(len(shape))), range(at, stop))


def moved(x: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Parted | None:
    """By a function that permutes dimensions."""
    if type(x) is not Parted or x._source is None:
        return None
    order = order_of(func, len(x.order), frozen(args), *frozen(kwargs.items()))
    return Parted.of_source(x._source, x.sizes, tuple(x.order[dim] for dim in order), x.seen)


@lru_cache(1024)
def order_of(func: Any, ndim: int, args: tuple[Any, ...], *kwargs: tuple[str, Any]) -> tuple[int, ...]:
    """Which dimension each one of the result is, of a tensor whose sizes are its dimensions' numbers."""
    sizes = func(torch.empty([*range(1, ndim + 1)], device="meta"), *args, **dict(kwargs)).shape
    return tuple(size - 1 for size in sizes)


def joined(x: Parted) -> Narrow | None:
    """x with its units in one dimension, None where others are between."""
    source, plan = x._source, _plan(x.order, x.seen, x.sizes)
    if source is None or source._at is None or plan is None:
        return None
    (space, dim, draw, spaces), (at, dims, order) = source._at, plan
    data = source._data if dims is None else source._data.permute(dims)
    if order is None:
        found = at_place(data, (space, at, draw, spaces))
        if dims is None:
            found._order = source._order
        elif source._order is not None or data.shape[at] == 1:
            found._order = in_order([dims.index(d) for d in source._order or range(len(dims))])
        return found
    made, forth, back = spaces.shuffled(space, x.sizes[dim : x.seen.stop], order)
    index = draw.present(space).index
    places = forth if index is None else back.index_select(0, index).argsort()
    found = at_place(narrow_shuffle(data, places, at), (made, at, draw, spaces))
    found._order = IN_ORDER
    return found


def _is_in_order(dims: tuple[int, ...], sizes: torch.Size) -> bool:
    """But for those of size 1, which lie anywhere."""
    wide = [dim for dim in dims if sizes[dim] != 1]
    return wide == sorted(wide)


@lru_cache(1024)
def _plan(
    order: tuple[int, ...], seen: range, sizes: torch.Size
) -> tuple[int, tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """Where the units are, the order of the source's dimensions, and that of the parts of the units; None: as
    they were."""
    at = next(at for at, dim in enumerate(order) if dim in seen)
    units = order[at : at + len(seen)]
    if any(dim not in seen for dim in units):
        return None
    others = [dim if dim < seen.start else dim - len(seen) + 1 for dim in order if dim not in seen]
    dims = (*others[:at], seen.start, *others[at:])
    is_same = _is_in_order(units, sizes)
    return (
        at,
        None if dims == tuple(range(len(dims))) else dims,
        None if is_same else tuple(dim - seen.start for dim in units),
    )


def shuffled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's own channel shuffle."""
    x, groups = args[0], args[1] if len(args) > 1 else kwargs["groups"]
    if not isinstance(x, Narrow) or x._at is None or x._at[1] != 1 or x._at[0].size % groups:
        return None
    full = x.shape
    sizes = torch.Size((full[0], groups, full[1] // groups, *full[2:]))
    return joined(Parted.of_source(x, sizes, (0, 2, 1, *range(3, len(sizes))), range(1, 3)))


def copied(x: Any, *args: Any, **kwargs: Any) -> Parted | None:
    """contiguous of what is parted: the units lie in their order."""
    if type(x) is not Parted or x._source is None or args or kwargs:
        return None
    if not x.is_moved:
        source = x._source
        return x if is_whole(source) or is_view(source, Tensor.contiguous, (), {})[0] else None
    plan = _plan(x.order, x.seen, x.sizes)
    whole = None if plan is None or plan[2] is None else joined(x)  # without an order of units it is no copy
    if plan is None or whole is None:
        return None
    return Parted.of_source(whole, x.shape, tuple(range(x.ndim)), range(plan[0], plan[0] + len(x.seen)))
