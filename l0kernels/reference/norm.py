"""Layer, RMS and group normalisation of the open units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._arguments import check_group_norm, check_layer_norm
from .._compat import affine
from .._gates import Gates, check_gates


def _opened(is_open: Tensor) -> Tensor:
    return is_open.nonzero()[:, 0]


def _over_features(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gates: Gates,
    norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Tensor:
    opened = _opened(gates.z.detach() != 0)
    some, w, b = (None if t is None else t.index_select(-1, opened) for t in (x, weight, bias))
    assert some is not None
    y = norm(some, w, b) if len(opened) else affine(some.flatten(0, -2), w, b).view(some.shape)
    return torch.zeros_like(x).index_copy(-1, opened, y.to(x.dtype))


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
        x: (..., *normalized_shape) any float dtype.
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
    if gates is None:
        return F.layer_norm(x, shape, weight, bias, eps).to(x.dtype)
    return _over_features(
        x, weight, bias, gates, lambda some, w, b: F.layer_norm(some, some.shape[-1:], w, b, eps)
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
        x: (..., *normalized_shape) any float dtype.
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
    if gates is None:
        return F.rms_norm(x, shape, weight, eps).to(x.dtype)
    return _over_features(
        x, weight, None, gates, lambda some, w, _: F.rms_norm(some, some.shape[-1:], w, eps)
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
        x: (N, channels, ...) any float dtype.
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
    if gates is None:
        return F.group_norm(x, num_groups, weight, bias, eps).to(x.dtype)
    check_gates("gates", gates, x.shape[1], x.device, "channel of x")
    y, size = torch.zeros_like(x), x.shape[1] // num_groups
    for group, is_open in enumerate((gates.z.detach() != 0).split(size)):
        opened = _opened(is_open) + group * size
        some, w, b = (
            None if t is None else t.index_select(dim, opened) for t, dim in ((x, 1), (weight, 0), (bias, 0))
        )
        assert some is not None
        some = F.group_norm(some, 1, w, b, eps) if len(opened) else affine(some, w, b)
        y = y.index_copy(1, opened, some.to(x.dtype))
    return y
