"""How a dense tensor would lie in memory where a narrow one is, and what shares memory with it.

Whether reshape, flatten or contiguous return a view or a copy depends on strides, and a forward may write to
the result. A narrow tensor lies as the dense one but in two cases: layers make images of channels last where
torch makes none, and the strides of a single unit say nothing. There a note says how the dense one lies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._compat import shares_memory
from ...narrow import narrow_whole

if TYPE_CHECKING:
    from .draws import Draw, Present
    from .narrow import Narrow

Order = tuple[int, ...]
"""The dimensions of a dense tensor, by strides, the largest first. Empty: as they are numbered."""

IN_ORDER: Order = ()
LAST: Order = (0, 2, 3, 1)
"""That of channels_last images."""
ORDERS = {
    torch.contiguous_format: IN_ORDER,
    torch.channels_last: LAST,
    torch.channels_last_3d: (0, 2, 3, 4, 1),
}


def in_order(order: Sequence[int]) -> Order:
    return IN_ORDER if all(at == dim for at, dim in enumerate(order)) else tuple(order)


def order_of_strides(strides: Sequence[int]) -> Order:
    """Of a tensor; of equal strides the later dimension is the inner one."""
    return in_order(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


def known_order(x: Narrow) -> Order:
    """How the dense tensor lies, which the strides tell unless it is noted."""
    assert x._at is not None
    return _known_order(x._order, x._held.shape[x._at[1]], x._held.stride())


def _known_order(order: Order | None, n: int, strides: Sequence[int]) -> Order:
    if order is not None:
        return order
    return order_of_strides(strides) if n > 1 else IN_ORDER


def is_whole(x: Narrow) -> bool:
    """Whether the dense tensor is known to be contiguous, at a glance."""
    order, data = x._order, x._held
    assert x._at is not None
    if order or data.shape[x._at[1]] < 2:  # the stride of one unit may hide a gap
        return False
    return data.is_contiguous() or (
        order is not None and data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last)
    )


def dense_strides(x: Narrow) -> tuple[int, ...]:
    """Those of the dense tensor: the room that each dimension takes, gaps too, is read off what exists."""
    assert x._at is not None
    (space, units, _, _), data = x._at, x._held
    return _dense_strides(space.size, units, x._order, data.shape, data.stride())


@lru_cache(4096)
def _dense_strides(
    size: int, units: int, order: Order | None, sizes: torch.Size, strides: tuple[int, ...]
) -> tuple[int, ...]:
    dims = range(len(sizes))
    room, outer = [1 for _ in dims], 0
    for dim in sorted(dims, key=lambda dim: (-strides[dim], sizes[dim] == 1, dim == units)):
        if strides[dim]:
            room[dim] = max(outer // strides[dim], sizes[dim])
            outer = strides[dim]
    room[units] += size - max(sizes[units], 1)
    found = [0 for _ in dims]
    total = min((strides[dim] for dim in dims if strides[dim] and room[dim] > 1), default=1)
    for dim in reversed(_known_order(order, sizes[units], strides) or dims):
        found[dim] = total if strides[dim] or sizes[dim] == 1 else 0
        total *= room[dim]
    return tuple(found)


def as_dense(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A tensor without memory that lies so."""
    return torch.empty_strided(shape, strides, device="meta")


def is_view(x: Narrow, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[bool, Order]:
    """Whether a function of the dense tensor returns a view of it, and how that lies."""
    assert x._at is not None
    (space, units, _, _), data = x._at, x._held
    lies = space.size, units, x._order, data.shape, data.stride()
    try:
        return _is_view(lies, func, args, *kwargs.items())
    except TypeError:  # a list
        return _is_view(lies, func, frozen(args), *frozen(kwargs.items()))


@lru_cache(4096)
def _is_view(lies: Any, func: Any, args: tuple[Any, ...], *kwargs: tuple[str, Any]) -> tuple[bool, Order]:
    size, units, _, sizes, _ = lies
    with torch.inference_mode(False), torch.no_grad():
        x = as_dense((*sizes[:units], size, *sizes[units + 1 :]), _dense_strides(*lies))
        out = func(x, *args, **dict(kwargs))
        return shares_memory(x, out), order_of_strides(out.stride())


def keep_order(found: Narrow, x: Narrow, func: Any, args: Any, kwargs: dict[str, Any]) -> Narrow:
    """`found`, a view of x by a function, which lies as that of the dense tensor."""
    if x._order:
        view = func(as_dense(x.shape, dense_strides(x)), *args, **kwargs)
        view = view[0] if isinstance(view, tuple | list) else view
        found._order = order_of_strides(view.stride())
    return found


class Twin:
    """Memory of its own that holds what some tensor does, where torch would have one memory for both.

    What is written to one of them is copied to the other, and until then nothing is to do.

    Attributes:
        data: what exists.
        whole: the units' dimension of the twin that has all of them, and which exist; None: it has those.
    """

    def __init__(self, data: Tensor, twin: Tensor, whole: tuple[int, Present] | None) -> None:
        self.data, self.whole = data, whole
        self._twin = weakref.ref(twin)
        self._kept = twin if twin.is_inference() else None  # views made there do not keep it
        self._seen = _version(data), _version(twin)

    @property
    def twin(self) -> Tensor | None:
        """None where nobody has it any more."""
        return self._twin()

    def follow(self, written: Tensor) -> Tensor | None:
        """Copies what has been written, and returns what to; None: nothing has."""
        data, twin, to = self.data, self.twin, None
        if twin is None:
            return None
        if _is_changed(data, self._seen[0], written):
            to = self._copy_to(twin)
        elif _is_changed(twin, self._seen[1], written):
            to = self._copy_from(twin)
        self._seen = _version(data), _version(twin)
        return to

    def _copy_to(self, twin: Tensor) -> Tensor:
        data = self.data
        if self.whole is None:
            return twin.copy_(data.reshape(twin.shape))
        dim, present = self.whole
        if present.within is not None:
            data = data.index_select(dim, present.within)
        places, size = present.places, twin.shape[dim]
        return twin.copy_(data if places is None else narrow_whole(data, places, size, dim))

    def _copy_from(self, twin: Tensor) -> Tensor:
        data = self.data
        if self.whole is None:
            return data.copy_(twin.reshape(data.shape))
        dim, present = self.whole
        return data.copy_(twin if present.index is None else twin.index_select(dim, present.index))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _is_changed(x: Tensor, seen: int, written: Tensor) -> bool:
    return shares_memory(x, written) if x.is_inference() else x._version != seen


def pair(draw: Draw, data: Tensor, twin: Tensor, whole: tuple[int, Present] | None = None) -> None:
    """Has `twin` be what `data` is, for as long as the forward runs."""
    draw.twins = [*(other for other in draw.twins if other.twin is not None), Twin(data, twin, whole)]


def spread(draw: Draw, written: Tensor, by: Twin | None = None) -> None:
    """Has twins of what has been written have it, too."""
    for twin in draw.twins:
        if twin is not by:
            other = twin.follow(written)
            if other is not None:
                spread(draw, other, twin)


def told(
    where: Callable[..., Any], func: Any, ndim: int, lies: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """`where`, which is cached, of a function and its arguments behind the first."""
    try:
        return where(func, ndim, lies, args, *kwargs.items())
    except TypeError:  # a list
        return where(func, ndim, lies, frozen(args), *frozen(kwargs.items()))


def frozen(values: Any) -> Any:
    """Arguments as what they are looked up by."""
    return tuple(frozen(value) if isinstance(value, tuple | list) else value for value in values)
