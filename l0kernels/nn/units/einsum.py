"""torch.einsum, baddbmm and glu as what the rules of trace.py and narrow.py know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Orders(NamedTuple):
    """How dimensions are permuted: of both operands for torch.matmul, and of what it makes."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    out: tuple[int, ...]


def as_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """What computes an einsum by torch.matmul, a baddbmm by torch.bmm, a glu by its halves; None where these,
    or another function, cannot be computed so."""
    if func is F.glu:
        return _gated_half(*args, **kwargs)
    if func in (torch.baddbmm, Tensor.baddbmm):
        return _sum_and_product(args, kwargs)
    if func is not torch.einsum or kwargs or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    if len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    a, b = operands
    orders = _orders(args[0], a.ndim, b.ndim)
    if orders is None or a.shape[orders.a[-1]] != b.shape[orders.b[-2]]:  # one of 1 meets all of the other
        return None
    return lambda: _permuted(torch.matmul(_permuted(a, orders.a), _permuted(b, orders.b)), orders.out)


def _sum_and_product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
    if len(args) > 3 or "out" in kwargs:
        return None
    given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
    beta = given.get("beta", 1)

    def product() -> Tensor:
        y = torch.bmm(given["batch1"], given["batch2"]) * given.get("alpha", 1)
        return given["input"] * beta + y if beta else y  # 0 of what may not be finite

    return product


def spelled(args: Sequence[Any]) -> tuple[list[str], list[Tensor]]:
    """The terms of an einsum, that of its result last, and its operands: none where it is not written out."""
    if not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return [], []
    operands = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    terms = args[0].replace(" ", "").replace("->", ",").split(",")
    is_known = len(terms) == len(operands) + 1 and all(len({*term}) == len(term) for term in terms)
    return (terms, [*operands]) if is_known else ([], [])


def _gated_half(input: Tensor, dim: int = -1) -> Callable[[], Tensor] | None:
    if not -input.ndim <= dim < input.ndim or input.shape[dim] % 2:  # which torch says
        return None

    def product() -> Tensor:
        a, b = input.chunk(2, dim)
        return a * b.sigmoid()

    return product


def _permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x if order == (*range(len(order)),) else x.permute(order)


@lru_cache(256)
def _orders(equation: str, a_ndim: int, b_ndim: int) -> Orders | None:
    """One index of a alone, one of b alone, one that is summed over, all others of both and of the result."""
    sides, arrow, result = equation.replace(" ", "").partition("->")
    terms = sides.split(",")
    if not arrow or len(terms) != 2:
        return None
    n = max(
        ndim - len(term) + 3 if "..." in term else 0
        for term, ndim in zip(terms, (a_ndim, b_ndim), strict=True)
    )
    a, b = (_spelled(term, ndim - len(term) + 3) for term, ndim in zip(terms, (a_ndim, b_ndim), strict=True))
    out = _spelled(result, n)
    if any(len({*term}) != len(term) for term in (a, b, out)) or not {*out} <= {*a, *b}:
        return None
    shared = [index for index in out if index in a and index in b]
    left = [index for index in out if index not in b]
    right = [index for index in out if index not in a]
    summed = [index for index in {*a, *b} if index not in out]
    if (
        not shared
        or not len(left) == len(right) == len(summed) == 1
        or summed[0] not in a
        or summed[0] not in b
    ):
        return None
    made = [*shared, *left, *right]
    return Orders(
        tuple(map(a.index, [*shared, *left, *summed])),
        tuple(map(b.index, [*shared, *summed, *right])),
        tuple(map(made.index, out)),
    )


def _spelled(term: str, n: int) -> str:
    """A term with an index for each of the `n` dimensions that "..." stands for: the last ones of more."""
    return (
        term.replace("...", "".join(chr(ord("0") + n - 1 - i) for i in range(n))) if "..." in term else term
    )
