"""Attention of the heads that exist."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .draws import Draw, Space, Spaces
from .einsum import as_product, spelled
from .narrow import Narrow, Rule, is_narrow, lie_alike, open_alike, plain


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
        alike = x._at[0] is space and x._at[1] == x._held.ndim - 3 and open_alike(x._at[2], draw)
        return x._data if alike else None
    index = draw.present(space).index
    x = plain(x)
    return x if index is None else x.index_select(-3, index)


def _multiplied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products of matrices, one for each head that exists."""
    if len(args) != 2 or kwargs:
        return None
    if not all(is_narrow(x) for x in args):
        return _multiplied_by(func, *args)
    (a, b), (space, dim, draw, spaces) = args, args[0]._at
    if not lie_alike(a, b) or dim >= a._held.ndim - 2:
        return None
    return Narrow.of(func(a._data, b._data), space, dim, draw, spaces)


def _multiplied_by(func: Any, a: Any, b: Any) -> Any:
    """Of matrices of which one alone has units, which it does not sum over."""
    x, other = (a, b) if is_narrow(a) else (b, a)
    if not is_narrow(x) or min(a.ndim, b.ndim) < 2:
        return None
    (space, dim, draw, spaces), other = x._at, plain(other)
    end = dim - x._held.ndim  # counted from the end
    if end == (-1 if x is a else -2):
        return None
    if end < -2 and other.ndim >= -end and other.shape[end] != 1:  # each has its own
        index = draw.present(space).index
        if other.shape[end] != space.size:
            return None
        other = other if index is None else other.index_select(end, index)
    out = func(x._data, other) if x is a else func(other, x._data)
    return Narrow.of(out, space, out.ndim + end, draw, spaces)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product = as_product(func, args, kwargs)
    if product is None:
        return None if kwargs else _plain_einsum(func, args)
    return product()


def _plain_einsum(func: Any, args: tuple[Any, ...]) -> Any:
    """Of operands of which one alone has units, which it does not sum over."""
    terms, operands = spelled(args) if func is torch.einsum else ([], [])
    with_units = [at for at, x in enumerate(operands) if is_narrow(x)]
    if len(with_units) != 1:
        return None
    x = cast(Narrow, operands[with_units[0]])
    assert x._at is not None
    space, dim, draw, spaces = x._at
    unit, made = terms[with_units[0]][dim], terms[-1]
    if unit not in made:
        return None
    index, values = draw.present(space).index, []
    for of, other in zip(terms, operands, strict=False):
        value = plain(other) if x is not other else x._data
        if other is not x and unit in of and index is not None:  # each has its own
            if other.shape[of.index(unit)] != space.size:
                return None
            value = value.index_select(of.index(unit), index)
        values.append(value)
    return Narrow.of(func(args[0], *values), space, made.index(unit), draw, spaces)


RULES: list[tuple[str, Rule]] = [
    ("einsum baddbmm glu", _product),
    ("scaled_dot_product_attention", _attended),
    ("matmul bmm __matmul__ mm spmm", _multiplied),
]
