"""Layer, RMS and group normalisation with statistics of the open units, which keep closed units closed.

Of torch's operations on every backend: masked formulas, whose shapes do not depend on the gates. In eager
mode on a CPU open features are gathered, which is faster; channels of groups, each with another number of
them, are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _registry, reference
from ._arguments import check_group_norm, check_layer_norm
from ._gates import Gates, check_gates
from .batch_norm import select

Norm = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""Of some values, their weight and their bias."""


def gated_layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gates: Gates | None = None,
) -> Tensor:
    """Layer normalisation of the features that the gates leave open, exactly 0 in the others.

    torch: ``F.layer_norm(x[..., open], (n_open,), weight[open], bias[open], eps)`` spread over the features.
    The gates only select: z multiplies nothing and gets no gradient.

    Args:
        x: (..., *normalized_shape) any float dtype; 16 bits are computed in float32.
        normalized_shape: of the last dimensions of x; with gates of the last one alone.
        weight, bias: normalized_shape, or None.
        eps: added to the variance.
        gates: of the features, or None: all are open.

    Returns:
        y of the shape and dtype of x.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, device or number of gates, or gates of several dimensions.
    """
    shape = check_layer_norm(x, normalized_shape, weight, bias, eps, gates)
    if gates is None or _registry.requested() == "reference":
        return reference.gated_layer_norm(x, shape, weight, bias, eps, gates=gates)
    return _over_features(
        x,
        weight,
        bias,
        gates,
        lambda some, w, b: F.layer_norm(some, some.shape[-1:], w, b, eps),
        centred=True,
    )


def gated_rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    gates: Gates | None = None,
) -> Tensor:
    """Normalisation of the open features by their root mean square, exactly 0 in the others.

    torch: ``F.rms_norm(x[..., open], (n_open,), weight[open], eps)`` spread over the features. The gates only
    select: z multiplies nothing and gets no gradient.

    Args:
        x: (..., *normalized_shape) any float dtype; 16 bits are computed in float32.
        normalized_shape: of the last dimensions of x; with gates of the last one alone.
        weight: normalized_shape, or None.
        eps: added to the mean square; None: as torch, that of x's dtype (of float32 for 16 bits).
        gates: of the features, or None: all are open.

    Returns:
        y of the shape and dtype of x.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, device or number of gates, or gates of several dimensions.
    """
    shape = check_layer_norm(x, normalized_shape, weight, None, eps, gates)
    if gates is None or _registry.requested() == "reference":
        return reference.gated_rms_norm(x, shape, weight, eps, gates=gates)
    return _over_features(
        x, weight, None, gates, lambda some, w, _: F.rms_norm(some, some.shape[-1:], w, eps), centred=False
    )


def gated_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gates: Gates | None = None,
) -> Tensor:
    """Group normalisation over the open channels of each group, exactly 0 in the others.

    torch: ``F.group_norm(x[:, open], 1, weight[open], bias[open], eps)`` of each group by itself, spread over
    the channels; a group without an open channel is zero. The gates only select: z multiplies nothing and
    gets no gradient.

    Args:
        x: (N, channels, ...) any float dtype; 16 bits are computed in float32.
        num_groups: a divisor of the channels.
        weight, bias: (channels,) or None.
        eps: added to the variance.
        gates: of the channels, or None: all are open.

    Returns:
        y of the shape and dtype of x.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, device or number of gates.
    """
    check_group_norm(x, num_groups, weight, bias, eps)
    if gates is None or _registry.requested() == "reference":
        return reference.gated_group_norm(x, num_groups, weight, bias, eps, gates=gates)
    check_gates("gates", gates, x.shape[1], x.device, "channel of x")
    w, b = (None if t is None else t.to(_dtype(x)) for t in (weight, bias))
    if _readable(x) and int(gates.count[0]) == x.shape[1]:
        return F.group_norm(x.to(_dtype(x)), num_groups, w, b, eps).to(x.dtype)
    return _masked_groups(x, num_groups, w, b, eps, gates.z.detach() != 0)


def _readable(x: Tensor) -> bool:
    """Whether the host may ask which gates are open: it need not wait for them."""
    return x.device.type == "cpu" and _checks.readable()


def _dtype(x: Tensor) -> torch.dtype:
    """In which x is normalised."""
    return torch.promote_types(x.dtype, torch.float32)


def _closed(x: Tensor, *vectors: Tensor | None) -> Tensor:
    """Zeros, which hand zeros back."""
    none = [t[..., :0].sum().to(x.dtype) for t in (x, *vectors) if t is not None]
    return torch.zeros_like(x) + sum(none)


def _over_features(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gates: Gates, norm: Norm, centred: bool
) -> Tensor:
    w, b = (None if t is None else t.to(_dtype(x)) for t in (weight, bias))
    if not _readable(x):
        return _masked_features(x, w, b, gates.z.detach() != 0, norm, centred)
    n = int(gates.count[0])
    if n == 0:
        return _closed(x, weight, bias)
    if n == x.shape[-1]:
        return norm(x.to(_dtype(x)), w, b).to(x.dtype)
    index = gates.index[:n].to(torch.int64)
    w, b = (None if t is None else t.index_select(0, index) for t in (w, b))
    y = norm(x.index_select(-1, index).to(_dtype(x)), w, b)
    return torch.zeros_like(x).index_copy_(-1, index, y.to(x.dtype))


def _masked_features(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    is_open: Tensor,
    norm: Norm,
    centred: bool,
) -> Tensor:
    """torch's norm of all features, of which the closed ones are 0 and the open ones scaled.

    Zeros count in torch's mean square: times size / open it is that of the open features, centred before.
    """
    closed = ~is_open
    some = x.masked_fill(closed, 0).to(_dtype(x))
    n = is_open.sum().clamp(min=1)
    if centred:
        some = (some - some.sum(-1, keepdim=True) / n).masked_fill(closed, 0)
    scale = (x.shape[-1] / n).sqrt().to(some.dtype)
    w = is_open.to(some.dtype) if weight is None else torch.where(is_open, weight, 0)
    y = norm(some * scale, w / scale, select(is_open, bias, 0))
    return y.to(x.dtype).masked_fill(closed, 0)


def _masked_groups(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, is_open: Tensor
) -> Tensor:
    channels = (-1, *[1] * (x.ndim - 2))
    closed = ~is_open.view(channels)
    some = x.masked_fill(closed, 0).to(_dtype(x))
    size = x.shape[1] // num_groups
    n = is_open.view(num_groups, size).sum(1).clamp(min=1)
    sums = some.reshape(len(x), num_groups, size * math.prod(x.shape[2:])).sum(-1)
    mean = sums / (n * math.prod(x.shape[2:]))
    mean = mean.repeat_interleave(size, 1).view(len(x), x.shape[1], *channels[1:])
    scale = (size / n).sqrt().to(some.dtype).repeat_interleave(size)
    some = (some - mean) * (is_open * scale).view(channels)
    w = is_open.to(some.dtype) if weight is None else torch.where(is_open, weight, 0)
    y = F.group_norm(some, num_groups, w / scale, select(is_open, bias, 0), eps)
    return y.to(x.dtype).masked_fill(closed, 0)
