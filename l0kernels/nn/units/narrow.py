"""Activations of which only the present units exist, on their way through somebody's forward.

To the forward a :class:`Narrow` has its full shape. Functions of torch that treat units one by one run on
what exists; every other one gets the dense tensor, with zeros for what is closed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from ..._compat import (
    pytree,
    running_function,
    shares_memory,
    view_as_subclass,
    without_torch_function,
)
from ...narrow import narrow_whole
from . import table
from .draws import Draw, Space, Spaces
from .narrow_layout import IN_ORDER, LAST, Order, dense_strides, is_whole, order_of_strides, pair, spread


class Narrow(Tensor):
    """A tensor that reports all units of one dimension, and holds those that exist.

    Its gradient is that of what it holds: torch's code sees that alone, and autograd runs on it.
    """

    _held: Tensor
    _at: tuple[Space, int, Draw, Spaces] | None
    _source: Narrow | None = None  # see narrow_shuffle
    _order: Order | None = None  # how the dense tensor lies: see narrow_layout; None: as what exists does
    _drawn: Draw | None = None  # of what has no place: whose twins follow what is written

    @staticmethod
    def of(data: Tensor, space: Space, dim: int, draw: Draw, spaces: Spaces) -> Narrow:
        """`data`, whose dimension `dim` holds what `draw` leaves of `space`."""
        return at_place(data, (space, dim, draw, spaces))

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
        """All units, zeros in the closed ones, as torch would have them lie."""
        if self._at is None:
            return self._data
        (space, dim, draw, _), data = self._at, self._data
        present = draw.present(space)
        if present.places is None and (self._order is None or self._order == order_of_strides(data.stride())):
            return data
        if present.within is not None:
            data = data.index_select(dim, present.within)
        strides = None if is_whole(self) else dense_strides(self)
        return narrow_whole(data, present.places, space.size, dim, strides)

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
            source = args[0]._source
            at = args[0]._at if source is None else source._at
            if at is not None and at[2].z.requires_grad:
                refuse_function()
        rule = RULES.get(func)
        if rule is not None:
            if not args:
                args, kwargs = table.by_position(args, kwargs)
            out = rule(func, args, kwargs)
            if out is not None:
                return out
        return _on_dense(func, args, kwargs)


class Lent(Narrow):
    """The weight of a gated linear layer, which somebody's forward gives to a function.

    Attributes:
        layer: whose it is.
        product: of x, the weight and a bias: torch.nn.functional.linear of open units.
    """

    layer: Any
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @staticmethod
    def of_layer(layer: Any, weight: Tensor, product: Callable[..., Tensor]) -> Lent:
        found: Lent = view_as_subclass(Lent, weight)
        found._held, found._at = weight, None
        found.layer, found.product = layer, product
        return found


_REQUIRES_GRAD: Any = Tensor.requires_grad


def at_place(data: Tensor, at: tuple[Space, int, Draw, Spaces]) -> Narrow:
    found: Narrow = view_as_subclass(Narrow, data)
    found._held = data
    found._at = at
    return found


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
    changed = [args[0]] if is_in_place(func) or kwargs.get("inplace") else []
    changed += [kwargs["out"]] if isinstance(kwargs.get("out"), Narrow) else []
    dense = {id(x): x.dense() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Narrow)}
    for x in changed:
        if isinstance(x, Narrow) and dense[id(x)] is not x._held:  # autograd keeps what dense() has read
            dense[id(x)] = like(x, x._data.clone()).dense()

    def swap(x: Any) -> Any:
        return dense[id(x)] if isinstance(x, Narrow) else x

    out = func(*pytree.tree_map(swap, args), **pytree.tree_map(swap, kwargs))
    if not changed:
        return _seen(out, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Narrow)], dense)
    for x in changed:
        if isinstance(x, Narrow):
            value = dense[id(x)]
            if x._at is not None:
                x.settle(value)
            draw = x._drawn if x._at is None else x._at[2]
            if draw is not None and draw.twins:
                spread(draw, x._held)
            if out is value:
                out = x
    return out


class Seen(Narrow):
    """A view of all units of a narrow tensor: what is written to it is written to that."""

    @staticmethod
    def of_view(view: Tensor, draw: Draw) -> Seen:
        found: Seen = view.as_subclass(Seen)
        found._held, found._at, found._drawn = view, None, draw
        return found


def _seen(out: Any, sources: list[Narrow], dense: dict[int, Tensor]) -> Any:
    """The result of a function of dense tensors, views of which go on to be of what exists."""
    if type(out) in (tuple, list):
        return type(out)(_seen(part, sources, dense) for part in out)
    if type(out) is not Tensor or out.layout != torch.strided:
        return out
    for x in sources:
        whole, draw = dense[id(x)], x._drawn if x._at is None else x._at[2]
        if draw is not None and shares_memory(whole, out):
            if whole is not x._held and not any(twin.twin is whole for twin in draw.twins):
                pair_whole(x, whole)
            return x if out is x._held else Seen.of_view(out, draw)
    return out


def pair_whole(x: Narrow, whole: Tensor) -> None:
    """Has `whole`, of all units, follow x and the other way round."""
    assert x._at is not None
    (space, dim, draw, _), data, base = x._at, x._data, whole._base
    if base is not None:  # it is expanded
        data, whole = data[tuple(map(slice, base.shape))], base
    pair(draw, data, whole, (dim, draw.present(space)))


@cache
def is_in_place(func: Any) -> bool:
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


def like(x: Narrow, data: Any, dim: int | None = None) -> Any:
    """The result of a function of x: what it holds, at the same or another dimension."""
    at = x._at
    if data is x._held:
        if at is not None and at[2].twins:
            spread(at[2], data)
        return x
    assert at is not None
    found = at_place(data, at if dim is None or dim == at[1] else (at[0], dim, at[2], at[3]))
    if x._order is not None:
        found._order = x._order if dim is None else IN_ORDER
    return found


def lies_last(x: Tensor) -> bool:
    """Whether torch would make channels_last images of images like the dense tensor."""
    if isinstance(x, Narrow):
        if x._order is not None:
            return x._order == LAST
        if x._at is not None and x._held.shape[x._at[1]] < 2:
            return False
        x = x._held
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def is_narrow(x: Any) -> bool:
    return isinstance(x, Narrow) and x._at is not None


def lie_alike(a: Narrow, b: Narrow) -> bool:
    """Whether their units meet, where both hold the same ones."""
    at, other = a._at, b._at
    if at is None or other is None or a._held.ndim != b._held.ndim:
        return False
    return at is other or (at[0] is other[0] and at[1] == other[1] and at[2] is other[2])


def open_alike(earlier: Draw, draw: Draw) -> bool:
    """Whether what exists is the same: keys and values of a forward before, in a cache."""
    if earlier is draw:
        return True
    both = earlier.exact and draw.exact and earlier._counts == draw._counts
    return both and torch.equal(earlier.is_open, draw.is_open)


def dims_of(value: Any, ndim: int) -> list[int]:
    values = [value] if isinstance(value, int) else [*value]
    return [int(dim) % ndim for dim in values]


RULES: dict[Any, Rule] = {}
"""By function of torch: how it runs on what exists. Filled by narrow_rules.py."""
