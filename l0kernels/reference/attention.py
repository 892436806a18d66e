"""Attention whose heads are gated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import check_attention
from .._gates import Gates
from .._gates import scale as scaled
from .linear import closed, multiplier


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Gates | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention with gated heads: ``y_h = z_h * softmax(q_h k_h^T * scale + mask) v_h``, 0 where z_h is 0.

    torch: ``F.scaled_dot_product_attention(q, k, v, ...) * z[:, None, None]`` of open heads, whatever closed
    ones hold. A row that sees no key is 0. dz comes where 0 < z < 1, for ``Gates.full_grad`` wherever z != 0.

    Args:
        q: (B, Hq, L, D) any float dtype.
        k, v: (B, Hkv, S, D), dtype of q; Hkv divides Hq, and k's head h serves Hq / Hkv heads of q in a row.
        gates: Hq of them, one per head of q, or Hkv, one per head of k with all that it serves; or None.
        attn_mask: broadcastable to (B, Hq, L, S): bool, True where a key takes part; or float32 or dtype of
            q, added to the scaled products.
        dropout_p: in [0, 1), the share of weights that are left out.
        is_causal: row i sees the keys 0 to i; without attn_mask.
        scale: a number; None: 1 / sqrt(D).

    Returns:
        y (B, Hq, L, D) in the dtype of q (under autocast, in its dtype).

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates, device or range, or both attn_mask and is_causal.
    """
    check_attention(q, k, v, gates, attn_mask, dropout_p, is_causal, scale)
    heads, shared = q.shape[1], q.shape[1] // max(k.shape[1], 1)
    k, v = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (k, v))
    z = shut = None
    if gates is not None:
        per_gate = heads // max(len(gates.z), 1)
        z, shut = (t.repeat_interleave(per_gate)[:, None, None] for t in (multiplier(gates), closed(gates)))
        q, k, v = (t.masked_fill(shut, 0.0) for t in (q, k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    y = torch.nn.functional.dropout(weights, dropout_p).to(v.dtype) @ v
    return y if z is None or shut is None else scaled(y, z).masked_fill(shut, 0.0)
