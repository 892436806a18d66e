"""Norms of exported models over units of which some stay as zeros, for a size in a forward asks for them.

Statistics are of the others, as while the model was gated. Plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kinds import epsilon


class OpenLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` of the features `opened`; the others are 0.

    Attributes:
        opened: (n,) int64, a buffer.
    """

    opened: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) -> the same shape."""
        weight = None if self.weight is None else self.weight.index_select(0, self.opened)
        bias = None if self.bias is None else self.bias.index_select(0, self.opened)
        some = x.index_select(-1, self.opened)
        y = F.layer_norm(some, some.shape[-1:], weight, bias, self.eps)
        return torch.zeros_like(x).index_copy(-1, self.opened, y)


class OpenRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` of the features `opened`; the others are 0.

    Attributes:
        opened: (n,) int64, a buffer.
    """

    opened: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., features) -> the same shape."""
        weight = None if self.weight is None else self.weight.index_select(0, self.opened)
        some = x.index_select(-1, self.opened)
        y = F.rms_norm(some, some.shape[-1:], weight, self.eps)
        return torch.zeros_like(x).index_copy(-1, self.opened, y)


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


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: OpenLayerNorm,
    nn.RMSNorm: OpenRMSNorm,
    nn.GroupNorm: OpenGroupNorm,
}


def open_norm_(norm: Any, is_open: Tensor) -> None:
    """Has a norm be one of its open units, where it has both."""
    if bool(is_open.all()) or not bool(is_open.any()):
        return
    like = next(iter(norm.parameters()), None)
    found = next((kind for base, kind in KINDS.items() if isinstance(norm, base)), None)
    if found is None:  # an RMSNorm of a library's own
        found, norm.eps = OpenRMSNorm, epsilon(norm)
        norm.normalized_shape, norm.elementwise_affine = tuple(norm.weight.shape), True
    norm.__class__ = found
    opened = is_open.nonzero()[:, 0]
    norm.register_buffer("opened", opened if like is None else opened.to(like.device))
