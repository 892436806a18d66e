"""What a gated torch.nn.MultiheadAttention computes of its open heads.

    y = W_o concat(z_h * softmax(q_h k_h^T / sqrt(D) + mask) v_h) + b_o,  over the heads h with z_h != 0

Projections, products and the output's projection are of open heads alone. The attention weights of a closed
head are 0, in the mean over all heads, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import _checks
from ...linear import gated_linear
from ...narrow import Sides, narrow_weight
from .draws import Space
from .layers import Units, _Exact
from .narrow import Narrow, plain, refuse_function
from .open_attention import Options, attend, projections


def run(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The forward of a gated attention: that of torch.nn.MultiheadAttention, on open heads."""
    units: Units = layer._l0_units
    given, options = (query, key, value), Options(*args, **kwargs)
    _check(layer, given)
    draw = units.groups.now()
    if not torch.is_grad_enabled() and draw.z.requires_grad:
        refuse_function()
    side = _OpenHeads(units, draw) if draw.exact else _Zeros(units, draw)
    parts = projections(layer)
    if query is key is value and layer.in_proj_weight is not None:
        whole = layer.in_proj_weight, layer.in_proj_bias
        q, k, v = side.project(query, *whole, units.ins, times=3).chunk(3, -1)
    else:
        q, k, v = (
            side.project(x, *part, ins) for x, part, ins in zip(given, parts, units.reads, strict=True)
        )
    y, weights = attend(layer, q, k, v, options)
    return y, plain(weights)


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

    def project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, ins: Space | None, times: int = 1
    ) -> Tensor:
        draw, units = self.draw, self.units
        spaces, dim = units.groups.spaces, x.ndim - 1
        heads = units.heads
        outs = None if heads is None else spaces.tiled(heads, times)
        x = self.enter(x, ins, dim)
        rows = None if outs is None else draw.side(outs, weight.dtype, True)
        cols = None if ins is None else draw.side(ins, weight.dtype, False)
        z = None if ins is None else draw.scales(ins, weight.dtype)
        index = self.index(outs)
        bias = bias if bias is None or index is None else bias.index_select(0, index)
        y = F.linear(x, narrow_weight(weight, z, Sides(rows, cols, 1, draw.backend)), bias)
        return y if outs is None or draw.open_all else Narrow.of(y, outs, dim, draw, spaces)


class _Zeros:
    """Projections that are zero where a head is closed."""

    def __init__(self, units: Units, draw: Any) -> None:
        self.units, self.draw = units, draw

    def project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, ins: Space | None, times: int = 1
    ) -> Tensor:
        heads = self.units.heads
        outs = None if heads is None else self.units.groups.spaces.tiled(heads, times)
        gates = {
            "in_gates": None if ins is None else self.draw.gates(ins),
            "out_support": None if outs is None else self.draw.gates(outs),
        }
        return gated_linear(plain(x), weight, bias, **gates)


def prepare(units: Units) -> None:
    """Has the spaces of a layer be made before anything is compiled."""
    if units.heads is not None:
        units.groups.spaces.tiled(units.heads, 3)
