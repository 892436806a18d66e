"""Norms of exported models over units of which some stay as zeros, for a size in a forward asks for them.

Statistics are of the others, as while the model was gated. Plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kinds import Kind, epsilon


class OpenLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` of the features `opened`; the others are 0.

    Attributes:
        opened: (n,) int64, a buffer.
        dim: of x that has the features.
    """

    opened: Tensor
    dim = -1

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features), or (N, features, height, width) where `dim` is 1 -> the same shape."""
        weight = None if self.weight is None else self.weight.index_select(0, self.opened)
        bias = None if self.bias is None else self.bias.index_select(0, self.opened)
        some = x.index_select(self.dim, self.opened).movedim(self.dim, -1)
        y = F.layer_norm(some, some.shape[-1:], weight, bias, self.eps).movedim(-1, self.dim)
        return torch.zeros_like(x).index_copy(self.dim, self.opened, y)


class OpenRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` of the features `opened`; the others are 0.

    Attributes:
        opened: (n,) int64, a buffer.
        dim: of x that has the features.
        offset: what is added to the weight.
    """

    opened: Tensor
    dim = -1
    offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features), or (N, features, height, width) where `dim` is 1 -> the same shape."""
        weight = None if self.weight is None else self.weight.index_select(0, self.opened) + self.offset
        some = x.index_select(self.dim, self.opened).movedim(self.dim, -1)
        y = F.rms_norm(some, some.shape[-1:], weight, self.eps).movedim(-1, self.dim)
        return torch.zeros_like(x).index_copy(self.dim, self.opened, y)


class OpenGroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` of the channels `opened`; the others are 0 and count in no group.

    Attributes:
        opened: (n,) int64, a buffer.
    """

    opened: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, ...) -> the same shape."""
        mask = torch.zeros(self.num_channels, dtype=x.dtype, device=x.device)
        mask = mask.index_fill(0, self.opened, 1)
        groups = x.reshape(x.shape[0], self.num_groups, self.num_channels // self.num_groups, -1)
        is_open = mask.view(1, self.num_groups, -1, 1)
        count = (is_open.sum(2, keepdim=True) * groups.shape[-1]).clamp(min=1)
        mean = (groups * is_open).sum((2, 3), keepdim=True) / count
        centred = (groups - mean) * is_open
        var = centred.square().sum((2, 3), keepdim=True) / count
        y = (centred * torch.rsqrt(var + self.eps)).reshape(x.shape)
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = y if self.weight is None else y * self.weight.view(shape)
        return y if self.bias is None else y + (self.bias * mask).view(shape)


NORMS: dict[str, type[nn.Module]] = {
    "layer_norm": OpenLayerNorm,
    "rms_norm": OpenRMSNorm,
    "group_norm": OpenGroupNorm,
}


def open_norm_(norm: Any, kind: Kind, is_open: Tensor) -> None:
    """Has a norm be one of its open units, where it has both."""
    if bool(is_open.all()) or not bool(is_open.any()):
        return
    like = next(iter(norm.parameters()), None)
    if kind.own:  # a library's
        norm.eps, norm.normalized_shape, norm.elementwise_affine = (
            epsilon(norm),
            tuple(norm.weight.shape),
            True,
        )
        for name in ("weight", "bias"):
            norm._parameters.setdefault(name, None)
        norm.dim, norm.offset = 1 if kind.spatial else -1, kind.offset
    norm.__class__ = NORMS[kind.name]
    opened = is_open.nonzero()[:, 0]
    norm.register_buffer("opened", opened if like is None else opened.to(like.device))
