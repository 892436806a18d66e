"""Which function of torch runs on what exists by which rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import narrow_attention, narrow_elementwise, narrow_index, narrow_recurrent, narrow_shapes, table
from .narrow import RULES, Lent, Narrow, Rule, at_place, like, plain

_REQUIRES_GRAD: Any = Tensor.requires_grad
_GRAD: Any = Tensor.grad


def _looked_at(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0]._data, *args[1:], **kwargs)


def _hooked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook sees, and may change, the gradient of all units."""
    (x, hook), at = args, args[0]._at
    if at is None:
        return func(x._data, hook)
    index = at[2].present(at[0]).index

    def narrow(grad: Tensor) -> Tensor | None:
        found = hook(at_place(grad, at).dense())
        return found if found is None or index is None else found.index_select(at[1], index)

    return func(x._data, narrow)


def _gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, grad = args[0], func(args[0]._data)
    return grad if grad is None or x._at is None else like(x, grad)


def _set(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    func(args[0]._data, *args[1:])
    return True  # nobody sees it; None would ask for the dense tensor


def _made_new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0]._data, *args[1:], **kwargs) if isinstance(args[0], Narrow) else None


def _length(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].shape[0]


def _layer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product with a weight that a gated layer lends, or with one that the example of gate_ did not show:
    of an auxiliary head that runs in train() alone, say. That one reads z, too."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight = given["input"], given["weight"]
    if isinstance(weight, Lent):
        return weight.product(x, weight._held, plain(given.get("bias")))
    if not isinstance(x, Narrow) or x._at is None:
        return None
    space, dim, draw, _ = x._at
    if dim != x._held.ndim - 1 - next((int(n) for n in "123" if f"{n}d" in func.__name__), 0):
        return None
    z = draw.scales(space, x.dtype).to(x.dtype)
    x = x.dense() * z.view(-1, *[1] * (x._held.ndim - 1 - dim))
    return func(x, *plain(args[1:]), **plain(kwargs)) if args else func(**plain({**kwargs, "input": x}))


_LOOKS: list[tuple[str, Rule]] = [
    ("is_floating_point is_complex element_size get_device ndimension is_signed", _looked_at),
    ("__len__", _length),
    ("register_hook", _hooked),
    ("retain_grad", _set),
    ("new_zeros new_ones new_empty new_full", _made_new),
]
_LAYERS = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
_IN_PLACE = (
    *narrow_elementwise.RULES,
    *narrow_shapes.RULES,
    *narrow_attention.RULES,
    *narrow_index.RULES,
    *_LOOKS,
)
"""Of these the variants in place, too."""
_NOT_IN_PLACE = (
    *narrow_shapes.OF_ANOTHER_SHAPE,
    *narrow_recurrent.RULES,
    *narrow_index.NOT_IN_PLACE,
    (_LAYERS, _layer),
)


def _rules() -> dict[Any, Rule]:
    found: dict[Any, Rule] = {}
    for kinds, in_place in ((_IN_PLACE, True), (_NOT_IN_PLACE, False)):
        for names, rule in kinds:
            found.update(dict.fromkeys(table.functions(names, in_place), rule))
    found[torch.sparse.mm] = found[torch.mm]
    found[_REQUIRES_GRAD.__set__], found[_GRAD.__get__] = _set, _gradient
    names = "device dtype requires_grad ndim is_cuda layout is_cpu is_meta is_leaf grad_fn is_sparse"
    found.update({getattr(Tensor, name).__get__: _looked_at for name in names.split()})
    return found


RULES.update(_rules())
