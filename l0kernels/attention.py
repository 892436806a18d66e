"""Attention whose heads are gated: closed heads are skipped, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import _checks, _ops, _registry, reference
from ._arguments import check_attention
from ._autograd import apply
from ._calls import AttentionCall, Wanted
from ._gates import Gates, draw_seed
from ._gates import scale as scaled
from .conv2d import open_order
from .linear import compute_dtype, gate_tensors

MAX_HEAD_DIM = 256
"""Of the kernels: a block of a head lies in registers whole."""


class _Settings(NamedTuple):
    """What attention is besides its tensors; ``full``: whether dz is wanted wherever a gate is open."""

    scale: float
    is_causal: bool
    dropout: float
    full: bool
    backend: str


class _GatedAttention(torch.autograd.Function):
    """On a backend that has operators of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        call = AttentionCall(q, k, v, z, mask, seed, *settings[:3])
        y, *saved = _ops.gated_attention(call, settings.backend)
        ctx.save_for_backward(q, k, v, z, mask, seed, y, *saved)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("gated_attention")
        tensors, settings, needs = ctx.saved_tensors, ctx.settings, list(ctx.needs_input_grad[:4])
        call = AttentionCall(*tensors[:6], *settings[:3])
        wanted = Wanted([settings.full], needs, None)
        grads = _ops.gated_attention_backward(dy, call, list(tensors[6:]), wanted, settings.backend)
        return (
            *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)),
            None,
            None,
            None,
        )


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
    """Attention with gated heads: ``y_h = z_h * softmax(q_h k_h^T * scale + mask) v_h``, closed ones skipped.

    torch: ``F.scaled_dot_product_attention(q, k, v, ...) * z[:, None, None]``. Where z_h is 0, y_h and the
    gradients of q_h, k_h and v_h are 0. A row that sees no key is 0, as torch has it. Gradients: dz comes
    where 0 < z < 1, for ``Gates.full_grad`` wherever z != 0; it is zero for closed gates.

    On a CPU torch's attention computes the open heads alone; in a compiled graph, whose shapes must not
    depend on gates, all of them. On a GPU the kernels skip closed heads: FlashAttention-2 (Dao, arXiv
    2307.08691), with the gates of Louizos et al. (arXiv 1712.01312) read on the device. With most heads open
    torch's attention is faster there, see the benchmarks; it serves calls without gates, D above 256 and
    those that ask for the gradient of attn_mask. Where torch computes all heads, the zeros of closed heads'
    gradients need finite q, k and v.

    Args:
        q: (B, Hq, L, D) any float dtype and strides; a last dimension in one piece is not copied, whatever
            the others' order: ``x.view(B, L, Hq, D).transpose(1, 2)`` is all right.
        k, v: (B, Hkv, S, D), dtype of q; Hkv divides Hq, and k's head h serves Hq / Hkv heads of q in a row.
        gates: Hq of them, one per head of q, or Hkv, one per head of k with all that it serves; or None.
        attn_mask: broadcastable to (B, Hq, L, S), padding of keys is (B, 1, 1, S): bool, True where a key
            takes part; or float32 or dtype of q, added to the scaled products.
        dropout_p: in [0, 1), the share of weights that are left out, whoever calls; 0 is right in evaluation.
        is_causal: row i sees the keys 0 to i; without attn_mask.
        scale: a number; None: 1 / sqrt(D).

    Returns:
        y (B, Hq, L, D) in the dtype of q (under autocast, in its dtype), on Triton in the memory order of q.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape, number of gates, device or range, both attn_mask and is_causal, or a count
            that is no count.
        RuntimeError: the requested backend cannot serve the call: "triton" takes D up to 256, and has no
            gradient of attn_mask.
    """
    check_attention(q, k, v, gates, attn_mask, dropout_p, is_causal, scale)
    backend = _registry.resolve(q.device, q.dtype, "gated_attention")
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
    }
    if backend == "reference":
        return reference.gated_attention(q, k, v, gates=gates, **options)
    if backend != "triton" or (_registry.requested() is None and _is_torchs(q, gates, attn_mask)):
        return _of_torch(q, k, v, gates, options)
    return _of_kernels(q, k, v, gates, options, backend)


def _is_torchs(q: Tensor, gates: Gates | None, mask: Tensor | None) -> bool:
    """Whether torch's attention is faster, or the only one to serve the call."""
    has_gradient = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    return gates is None or q.shape[-1] > MAX_HEAD_DIM or has_gradient


def _of_kernels(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates | None, options: dict[str, Any], backend: str
) -> Tensor:
    mask, dropout, is_causal, scale = options.values()
    if q.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(
            f"backend {backend!r} cannot be used: it serves head dimensions to {MAX_HEAD_DIM}, got "
            f"{q.shape[-1]}; torch serves all"
        )
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"backend {backend!r} cannot be used: it has no gradient of attn_mask; torch and reference have"
        )
    dtype = compute_dtype(q)
    q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
    z = None if gates is None else gate_tensors(gates, dtype)[0]
    seed = _ops.kept_seed(draw_seed(q.device)) if dropout > 0 else None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    full = gates is not None and gates.full_grad
    settings = _Settings(scale, is_causal, float(dropout), full, backend)
    return apply(_GatedAttention, q, k, v, z, mask, seed, settings)


def _of_torch(q: Tensor, k: Tensor, v: Tensor, gates: Gates | None, options: dict[str, Any]) -> Tensor:
    """Of the open heads where the host may ask which they are without waiting, else of all."""
    is_shared, mask = k.shape[1] != q.shape[1], options["attn_mask"]
    if mask is not None:  # torch takes no vector
        mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        options = {**options, "attn_mask": mask}
    if gates is None:
        return scaled_dot_product_attention(q, k, v, **options, enable_gqa=is_shared)
    per_gate = q.shape[1] // max(len(gates.z), 1)
    z = reference.linear.multiplier(gates)
    exact = q.is_cpu and _checks.readable()
    index = open_order(gates) if exact else None
    if index is None:
        y = scaled_dot_product_attention(q, k, v, **options, enable_gqa=is_shared)
        y = scaled(y, _of_heads(z, per_gate))
        return y if exact else y.masked_fill(_of_heads(reference.linear.closed(gates), per_gate), 0.0)
    of_q, of_k = index, index
    if per_gate > 1:
        of_q = (index[:, None] * per_gate + torch.arange(per_gate)).flatten()
    elif is_shared:
        of_k = index // (q.shape[1] // k.shape[1])
    if mask is not None and mask.shape[1] > 1:
        options = {**options, "attn_mask": mask.index_select(1, of_q)}
    some = q.index_select(1, of_q), k.index_select(1, of_k), v.index_select(1, of_k)
    y = scaled_dot_product_attention(*some, **options, enable_gqa=per_gate > 1)
    y = scaled(y, _of_heads(z.index_select(0, index), per_gate))
    return torch.zeros_like(q, dtype=y.dtype).index_copy_(1, of_q, y)


def _of_heads(values: Tensor, per_gate: int) -> Tensor:
    """values of gates as one per head of q, (Hq, 1, 1)."""
    return (values if per_gate == 1 else values.repeat_interleave(per_gate)).view(-1, 1, 1)
