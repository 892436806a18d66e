"""torch.nn.MultiheadAttention of fewer heads than its features divided by their size: plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Options(NamedTuple):
    """What ``torch.nn.MultiheadAttention`` takes beside its operands."""

    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """What follows the projections of queries, keys and values: ``layer.out_proj`` of what heads attend to.

    Args:
        layer: has num_heads, head_dim, dropout, batch_first, bias_k, bias_v, add_zero_attn and out_proj;
            ``_kept``, where it has it, says which heads of a mask by head are its own, and of how many.
        q, k, v: (N, L, heads * head_dim), (N, S, ...), (N, S, ...), or as `layer.batch_first` says; without
            N where there are no examples. Several heads of q in a row may share one of k and v.
    """
    batched = q.ndim == 3
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    elif not layer.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if k.shape[0] != q.shape[0] or k.shape[:2] != v.shape[:2]:
        sizes = ", ".join(f"{tuple(x.shape[:2])}" for x in (q, k, v))
        raise RuntimeError(f"query, key and value must be of (N, L), (N, S) and (N, S) rows, got {sizes}")
    if layer.bias_k is not None:
        k, v = (
            torch.cat((x, extra.expand(len(x), 1, -1)), 1)
            for x, extra in ((k, layer.bias_k), (v, layer.bias_v))
        )
    size = layer.head_dim
    q, k, v = (x.view(*x.shape[:2], x.shape[-1] // size, size).transpose(1, 2) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:  # of several queries
        each = q.shape[1] // max(k.shape[1], 1)
        k, v = (x[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2) for x in (k, v))
    if layer.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = _mask(layer, q, k, options, batched)
    # As torch has it: the hint alone counts where nothing else asks for the mask.
    is_causal = options.is_causal and options.key_padding_mask is None and not options.need_weights
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if options.need_weights:
        scores = torch.matmul(q * layer.head_dim**-0.5, k.transpose(-2, -1))
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        y = torch.matmul(weights, v)
    else:
        mask = None if is_causal else mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    y = y.transpose(1, 2).flatten(2)
    if not batched:
        y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
    elif not layer.batch_first:
        y = y.transpose(0, 1)
    if weights is not None and options.average_attn_weights:
        weights = weights.sum(-3) / max(layer.num_heads, 1)
    return layer.out_proj(y), weights


def _mask(layer: Any, q: Tensor, k: Tensor, options: Options, batched: bool) -> Tensor | None:
    """(N or 1, heads or 1, L, S) to add to the scores."""
    mask, padding = options.attn_mask, options.key_padding_mask
    if options.is_causal and mask is None:
        raise RuntimeError("attn_mask must be given where is_causal is a hint of what it is, got None")
    n, heads, length = q.shape[:3]
    size = k.shape[-2]
    more = size - layer.add_zero_attn - (layer.bias_k is not None)
    if mask is not None:
        kept, all_heads = getattr(layer, "_kept", None) or (None, heads)
        shapes = [(length, more), (n * all_heads, length, more)]
        if tuple(mask.shape) not in shapes:
            raise RuntimeError(
                f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(mask.shape)}"
            )
        mask = _floats("attn_mask", mask, q)
        mask = mask[None, None] if mask.ndim == 2 else mask.view(n, all_heads, length, more)
        mask = mask if kept is None or len(mask[0]) == 1 else mask[:, kept]
    if padding is not None:
        wanted = (n, more) if batched else (more,)
        if tuple(padding.shape) != wanted:
            raise RuntimeError(f"key_padding_mask must have shape {wanted}, got {tuple(padding.shape)}")
        padding = _floats("key_padding_mask", padding, q).view(-1, 1, 1, more)
        mask = padding if mask is None else mask + padding
    return mask if mask is None or size == more else F.pad(mask, (0, size - more))


def _floats(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """-inf where a bool is True, which says: not this one."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -torch.inf)


def projections(layer: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias for queries, keys and values."""
    weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    biases: Any = [None] * 3
    if layer.in_proj_bias is not None:
        biases = layer.in_proj_bias.split([len(weight) for weight in weights])
    return list(zip(weights, biases, strict=True))


def is_nested(x: Any) -> bool:
    """Whether x is what torch.nn.TransformerEncoder makes of a padded batch."""
    return type(x) is Tensor and x.is_nested and x.layout == torch.strided


def over_padded(x: Tensor, run: Callable[..., Any]) -> Tensor:
    """What an attention makes of a nested tensor, whose parts attend to themselves."""
    sizes = [len(part) for part in x.unbind()]
    dense = x.to_padded_tensor(0.0)
    lengths = torch.tensor(sizes, device=dense.device)
    padding = torch.arange(dense.shape[1], device=dense.device) >= lengths[:, None]
    y, _ = run(dense, dense, dense, padding, need_weights=False)
    return torch.nested.as_nested_tensor([part[:n] for part, n in zip(y.unbind(), sizes, strict=True)])


class OpenMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with the heads that are open: ``num_heads * head_dim`` may differ from
    ``embed_dim``. Of attention weights that are averaged it is the mean over these heads; those of a closed
    head that stays are zero. A mask by head is that of all heads, those of the gated layer."""

    _kept: tuple[list[int], int] | None = None
    _closed: tuple[int, ...] = ()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's."""
        if is_nested(query) and query is key is value:
            return over_padded(query, self.forward), None
        q, k, v = (
            F.linear(x, weight, bias)
            for x, (weight, bias) in zip((query, key, value), projections(self), strict=True)
        )
        options = Options(*args, **kwargs)
        if not self._closed or not options.need_weights:
            return attend(self, q, k, v, options)
        y, weights = attend(self, q, k, v, options._replace(average_attn_weights=False))
        assert weights is not None
        weights = weights.index_fill(-3, torch.tensor(self._closed, device=weights.device), 0)
        if options.average_attn_weights:
            weights = weights.sum(-3) / max(self.num_heads - len(self._closed), 1)
        return y, weights


def open_attention_(layer: Any, kept: Tensor | None, is_open: Tensor | None) -> None:
    """Has an attention whose parameters have become smaller be one of its heads.

    Args:
        kept: of all features of its queries, (n,) bool, which stay; None: all.
        is_open: of those that stay, which are; None: all.
    """
    if is_open is not None:  # zeros attend to all alike
        layer._closed = tuple((~is_open.view(-1, layer.head_dim)[:, 0]).nonzero()[:, 0].tolist())
    whole = layer.num_heads * layer.head_dim == layer.embed_dim == layer.out_proj.in_features
    whole = whole and not getattr(layer, "_closed", ())
    if layer.num_heads and whole and all(len(weight) == layer.embed_dim for weight, _ in projections(layer)):
        layer.__class__ = nn.MultiheadAttention
        return
    layer.__class__ = OpenMultiheadAttention
    if kept is not None:
        by_head = kept.view(-1, layer.head_dim)[:, 0]
        layer._kept = by_head.nonzero()[:, 0].tolist(), len(by_head)
    layer._qkv_same_embed_dim = False  # torch's fast path of an encoder layer asks
