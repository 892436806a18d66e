"""What a gated torch.nn.MultiheadAttention computes of its open heads.

    y = W_o concat(z_h * softmax(q_h k_h^T / sqrt(D) + mask) v_h) + b_o,  over the heads h with z_h != 0

Projections, products and the output's projection are of open heads alone. The attention weights of a closed
head are 0, and their mean is over the open ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _checks
from ...linear import gated_linear
from ...narrow import Sides, narrow_weight
from .draws import Draw, Space
from .kinds import Kind
from .layers import Units, _Exact
from .narrow import Narrow, plain, refuse_function
from .open_attention import Options, attend, is_nested, over_padded, projections

if TYPE_CHECKING:
    from .place import GateGroups

Projection = tuple[Tensor, Tensor | None]
"""Weight and bias."""


def run(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The forward of a gated attention: that of torch.nn.MultiheadAttention, on open heads."""
    if is_nested(query) and query is key is value:
        return over_padded(query, partial(run, layer)), None
    units: Units = layer._l0_units
    given, options = (query, key, value), Options(*args, **kwargs)
    _check(layer, given)
    draw = units.groups.now()
    if not torch.is_grad_enabled() and draw.z.requires_grad:
        refuse_function()
    side = _OpenHeads(units, draw) if draw.exact else _Zeros(units, draw)
    if query is key is value and layer.in_proj_weight is not None:
        outs = _whole(units, units.heads[0])
        whole = layer.in_proj_weight, layer.in_proj_bias
        q, k, v = side.project(query, whole, units.ins, outs).chunk(3, -1)
    else:
        parts = zip(given, projections(layer), units.reads, units.heads, strict=True)
        q, k, v = (side.project(*part) for part in parts)
    y, weights = attend(layer, q, k, v, options._replace(average_attn_weights=False))
    if weights is None:
        return y, None
    weights, heads = plain(weights), units.heads[0]
    if heads is not None:
        is_open = draw.mask(cast(Space, _by_head(units.groups, layer, heads)), weights.dtype)
        weights = weights * is_open[:, None, None]
    if options.average_attn_weights:
        n = layer.num_heads if heads is None else is_open.sum().clamp(min=1)
        weights = weights.sum(-3) / n
    return y, weights


def _whole(units: Units, heads: Space | None) -> Space | None:
    """Queries, keys and values one after the other."""
    return None if heads is None else units.groups.spaces.tiled(heads, 3)


def units_of(
    groups: GateGroups, kind: Kind, layer: nn.Module, space: Callable[[str, int], Space | None]
) -> Units:
    """Where the gates of an attention are; `space`: of a parameter's dimension."""
    names = [f"{of}_proj_weight" for of in ("q", "k", "v")]
    if layer._parameters.get("in_proj_weight") is not None:
        read, whole = space("in_proj_weight", 1), space("in_proj_weight", 0)
        heads = None if whole is None else groups.spaces.tile(whole, 3)
        units = Units(groups, kind, read, None, (heads,) * 3, (read,) * 3)
        _whole(units, heads)  # before anything is compiled
        _by_head(groups, layer, heads)
        return units
    first, second, third = (space(name, 1) for name in names)
    q, k, v = (space(name, 0) for name in names)
    _by_head(groups, layer, q)
    return Units(groups, kind, None, None, (q, k, v), (first, second, third))


def _by_head(groups: GateGroups, layer: Any, heads: Space | None) -> Space | None:
    """One entry for each head."""
    return None if heads is None else groups.spaces.runs(heads, layer.head_dim)


def _check(layer: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
    sizes = (layer.embed_dim, layer.kdim, layer.vdim)
    for name, x, size in zip(("query", "key", "value"), given, sizes, strict=True):
        if type(x) is not Narrow:
            _checks.check_tensor(name, x)
        if x.ndim not in (2, 3) or x.shape[-1] != size:
            raise RuntimeError(
                f"{name} must have 2 or 3 dimensions, the last one of {size}, got shape {tuple(x.shape)}"
            )


class _OpenHeads(_Exact):
    """Projections of what exists."""

    def project(self, x: Tensor, by: Projection, ins: Space | None, outs: Space | None) -> Tensor:
        draw, dim, (weight, bias) = self.draw, x.ndim - 1, by
        x = self.enter(x, ins, dim)
        rows = None if outs is None else draw.side(outs, weight.dtype, True)
        cols = None if ins is None else draw.side(ins, weight.dtype, False)
        z = None if ins is None else draw.scales(ins, weight.dtype)
        index = self.index(outs)
        bias = bias if bias is None or index is None else bias.index_select(0, index)
        y = F.linear(x, narrow_weight(weight, z, Sides(rows, cols, 1, draw.backend)), bias)
        whole = outs is None or draw.open_all
        return y if whole else Narrow.of(y, cast(Space, outs), dim, draw, self.units.groups.spaces)


class _Zeros:
    """Projections that are zero where a head is closed."""

    def __init__(self, units: Units, draw: Draw) -> None:
        self.units, self.draw = units, draw

    def project(self, x: Tensor, by: Projection, ins: Space | None, outs: Space | None) -> Tensor:
        read, made = (None if space is None else self.draw.gates(space) for space in (ins, outs))
        return gated_linear(plain(x), *by, in_gates=read, out_support=made)
