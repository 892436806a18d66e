"""Functions around recurrent layers, on the units that exist: time taken apart and put together, sequences
packed without their padding.
"""

from __future__ import annotations

from typing import Any

import torch

from . import table
from .narrow import Narrow, Rule, like


def _taken_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """select and index_select along another dimension than that of the units."""
    x = args[0]
    if not isinstance(x, Narrow) or x._at is None or kwargs or any(isinstance(a, Narrow) for a in args[1:]):
        return None
    dim, at = x._at[1], (args[1] if len(args) > 1 else 0) % x._data.ndim
    if at == dim:
        return None
    return like(x, func(x._data, *args[1:]), dim - (at < dim and func not in _KEEP))


def _stacked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    at = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    places = [t._at for t in tensors if isinstance(t, Narrow) and t._at is not None]
    if len(places) != len(tensors) or not places:
        return None
    space, dim, draw, spaces = places[0]
    if any(other[0] is not space or other[1] != dim or other[2] is not draw for other in places):
        return None
    data = torch.stack([t._data for t in tensors], at)
    return Narrow.of(data, space, dim + (at % data.ndim <= dim), draw, spaces)


def _packed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two dimensions, time and examples, become one, or one becomes two."""
    x = args[0]
    leading, change = (2, -1) if func.__name__ == "_pack_padded_sequence" else (1, 1)
    if not isinstance(x, Narrow) or x._at is None or kwargs or x._at[1] < leading:
        return None
    out, sizes = func(x._data, *args[1:])
    return like(x, out, x._at[1] + change), sizes


RULES: list[tuple[str, Rule]] = [
    ("select index_select", _taken_apart),
    ("stack", _stacked),
    (table.SEQUENCES, _packed),
]
_KEEP = {*table.functions("index_select", False)}
