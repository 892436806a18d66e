"""What a model was run with, without its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..._compat import pytree

Inputs = Sequence[int] | Tensor | Mapping[str, Any]
"""The shape of zeros that a model is run on, a tensor, or inputs by their names."""


class _Like(NamedTuple):
    """A tensor to be made: of floats random, of ints in the range of those that it stands for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int
    high: int

    @staticmethod
    def of(x: Tensor) -> _Like:
        """What `x` is like."""
        is_int = not (x.is_floating_point() or x.is_complex()) and x.numel() > 0
        low, high = (int(x.min()), int(x.max())) if is_int else (0, 0)
        return _Like(tuple(x.shape), x.dtype, low, high)

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor like it, floats in `dtype`."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, device="cpu").to(device, dtype)
        if self.dtype.is_complex:
            return torch.randn(self.shape, dtype=self.dtype, device="cpu").to(device)
        return torch.randint(self.low, self.high + 1, self.shape, device="cpu").to(device, self.dtype)


class Example(NamedTuple):
    """The inputs of a model, with a :class:`_Like` for each tensor in them."""

    inputs: Any
    dtype: torch.dtype | None

    def make(self, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args, kwargs: random ones on the device of the parameter `like`, in its dtype now."""

        def one(x: Any) -> Any:
            if not isinstance(x, _Like):
                return x
            dtype = like.dtype if x.dtype == self.dtype else x.dtype
            return x.make(dtype, like.device)

        return pytree.tree_map(one, self.inputs, is_leaf=lambda x: isinstance(x, _Like))


def example_of(args: Any, kwargs: Any, dtype: torch.dtype | None) -> Example | None:
    """What the inputs are like; None where they hold other things than tensors and plain values.

    `dtype`: of the model's parameters.
    """
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))
    if not all(x is None or isinstance(x, Tensor | bool | int | float | str) for x in leaves):
        return None
    if any(x.is_sparse or x.is_nested or x.is_meta for x in leaves if isinstance(x, Tensor)):
        return None
    return Example(pytree.tree_map_only(Tensor, _Like.of, (args, kwargs)), dtype)
