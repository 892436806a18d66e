"""Labels: which unit each element of a tensor belongs to, and which units are one.

A label tensor has the shape of what it labels, mostly by broadcasting (strides of 0); 0 says "no unit". Data
movement is done to labels as to data. Where two tensors meet element by element, their units become one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class UnionFind:
    """Disjoint sets of the numbers from 1 on, and why those that may not be gated may not."""

    def __init__(self) -> None:
        self._parent = [0]
        self.pins: dict[int, str] = {}

    def fresh(self, n: int) -> Tensor:
        """n new numbers, each a set of its own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return torch.arange(start, start + n, device="cpu")

    def find(self, a: int) -> int:
        """The number that stands for the set of `a`."""
        parent = self._parent
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    def named(self, labels: Tensor) -> Tensor:
        """`labels` by the numbers that stand for their sets."""
        short = shortened([labels])[0]
        names = [self.find(label) for label in short.flatten().tolist()]
        return torch.tensor(names, dtype=labels.dtype, device="cpu").view(short.shape).expand(labels.shape)

    def join(self, a: Tensor, b: Tensor, why: str) -> None:
        """Makes one of the sets of each pair; a number beside a 0, which is no unit, is pinned."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            first, second = self.find(x), self.find(y)
            if not first or not second:
                self.pins.setdefault(max(first, second), f"{why}, with what has no units")
            elif first != second:  # the older number stands for both
                self._parent[max(first, second)] = min(first, second)

    def are_one(self, a: Tensor, b: Tensor) -> bool:
        """Whether the numbers of each pair are of one set."""
        return all(self.find(x) == self.find(y) for x, y in zip(a.tolist(), b.tolist(), strict=True))

    def pin(self, labels: Tensor, why: str) -> None:
        """Has the units of `labels` never be gated."""
        for label in labels.flatten().tolist():
            if label:
                self.pins.setdefault(label, why)

    def reasons(self) -> dict[int, str]:
        """Why, by the number that stands for a set."""
        found: dict[int, str] = {}
        for label in sorted(self.pins):
            if label:
                found.setdefault(self.find(label), self.pins[label])
        return found


def shortened(labels: Sequence[Tensor]) -> list[Tensor]:
    """Labels of one shape with one entry of each dimension along which none of them varies."""
    labels = torch.broadcast_tensors(*labels)
    for dim in range(labels[0].ndim):
        if labels[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in labels):
            labels = [t.narrow(dim, 0, 1) for t in labels]
    return [*labels]


def spread(labels: Tensor) -> Tensor:
    """`labels` with a stride of 0 wherever they do not vary."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if shortened([labels])[0].eq(shortened([first.expand_as(labels)])[0]).all():
                labels = first.expand_as(labels)
    return labels


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which `labels`, as `spread` leaves them, vary."""
    return [dim for dim in range(labels.ndim) if labels.shape[dim] > 1 and labels.stride(dim) != 0]


def along(labels: Tensor, dim: int) -> Tensor | None:
    """The labels of the entries of `dim`, (size,), or None where they vary along another dimension, too."""
    dim %= labels.ndim
    if any(other != dim for other in varying(labels)):
        return None
    if not labels.numel():
        return labels.new_zeros(labels.shape[dim])
    for other in range(labels.ndim):
        if other != dim:
            labels = labels.narrow(other, 0, 1)
    return labels.flatten()


def across(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """The labels of a tensor of `shape` whose entries of `dim` have `labels`."""
    dim %= len(shape)
    place = [1] * len(shape)
    place[dim] = len(labels)
    return labels.view(place).expand(tuple(shape))
