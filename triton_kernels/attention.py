"""Attention of the heads that are open: forward, and backward as two kernels (FlashAttention-2, Dao 2023).

A program takes a block of rows of one head. Where the gate is 0 it takes no step and writes zeros: which
heads are closed the device alone knows. Logits are in base 2; backward computes the weights of attention
again from ``lse``, the logarithm of each row's sum, infinite for rows that see no key. With o the product
before the gate, y = z * o and ``delta = sum(dy * o) = sum(dy * y) / z``, whose sum over the rows is dz.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import AttentionCall, Wanted

from ._launch import cdiv, gpu, launch
from .hard_concrete import uniform
from .matmul import precision

_LOG2E = tl.constexpr(1.4426950408889634)
_ANY = ["heads", "shared", "per_gate", "blocks"]
"""Numbers that change no instruction worth a compilation of its own."""


@triton.jit
def _place(blocks, heads, per_gate, z_ptr, HAS_Z: tl.constexpr):
    """(block, batch and head as one, batch, head, z) of this program; late blocks, of more keys, begin."""
    pid = tl.program_id(0)
    bh = pid // blocks
    h = bh % heads
    z = tl.load(z_ptr + h // per_gate) if HAS_Z else 1.0
    return blocks - 1 - pid % blocks, bh, (bh // heads).to(tl.int64), h.to(tl.int64), z


@triton.jit
def _at(ptr, b, h, rows, cols, stride_b, stride_h, stride_l):
    """Addresses of rows and cols of a head."""
    return ptr + b * stride_b + h * stride_h + rows.to(tl.int64)[:, None] * stride_l + cols[None, :]


@triton.jit
def _logits(
    s,
    mask_ptr,  # of this head
    rows,  # (BLOCK, 1), or (1, BLOCK) where s is turned around
    cols,
    L,
    S,
    stride_ml,
    stride_ms,
    scale,  # with log2(e)
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # 0: none, 1: of bools, 2: to be added
    BY_ROW: tl.constexpr,  # whether rows have masks of their own
    EDGE: tl.constexpr,  # whether keys may lie behind the row, or behind the last one
):
    s = s * scale
    if MASK > 0:
        at = mask_ptr + cols.to(tl.int64) * stride_ms
        inside = cols < S
        if BY_ROW:
            at = at + rows.to(tl.int64) * stride_ml
            inside = inside & (rows < L)
        value = tl.load(at, mask=inside, other=0)
        if MASK == 1:
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32) * _LOG2E
    if EDGE:
        seen = cols < S
        if CAUSAL:
            seen = seen & (cols <= rows)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _kept(seed_ptr, bh, rows, cols, dropout):
    """Which weights stay: counter = (key, row, batch and head), the same in forward and backward."""
    index = (rows.to(tl.int64) << 32) + cols.to(tl.int64)
    return uniform(tl.load(seed_ptr), index, bh, bh * 0) >= dropout


@triton.jit
def _attend(
    acc, total, top, q,
    k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, h, rows, first, last, L, S,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms, scale, dropout,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys from first to last: the products, the rows' sums and maxima after them."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys < S)[:, None] & (d < D)[None, :]
        k = tl.load(_at(k_ptr, b, h, keys, d, stride_kb, stride_kh, stride_ks), mask=inside, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = _logits(
            s, mask_ptr, rows[:, None], keys[None, :], L, S, stride_ml, stride_ms, scale,
            CAUSAL, MASK, BY_ROW, EDGE,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        base = new
        if MASK > 0:  # a row may have seen no key so far
            base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        old = tl.exp2(top - base)
        total = total * old + tl.sum(p, 1)
        if DROPOUT:
            kept = _kept(seed_ptr, bh, rows[:, None], keys[None, :], dropout)
            p = tl.where(kept, p / (1.0 - dropout), 0.0)
        v = tl.load(_at(v_ptr, b, h, keys, d, stride_vb, stride_vh, stride_vs), mask=inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
        top = new
    return acc, total, top


@triton.jit(do_not_specialize=_ANY)
def _attention(
    q_ptr,  # (B, heads, L, D)
    k_ptr,  # (B, heads / shared, S, D)
    v_ptr,
    y_ptr,
    lse_ptr,  # (B, heads, L)
    z_ptr,  # (heads / per_gate,)
    mask_ptr,  # (B, heads, L, S)
    seed_ptr,
    L,
    S,
    heads,
    shared,
    per_gate,
    blocks,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_yb,
    stride_yh,
    stride_yl,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    scale,
    dropout,
    HAS_Z: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BY_ROW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, bh, b, h, z = _place(blocks, heads, per_gate, z_ptr, HAS_Z)
    rows, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < L)[:, None] & (d < D)[None, :]
    whole, last = S // BLOCK_N * BLOCK_N, S
    if CAUSAL:
        whole = tl.minimum(whole, block * BLOCK_M // BLOCK_N * BLOCK_N)
        last = tl.minimum(last, block * BLOCK_M + BLOCK_M)
    if HAS_Z:
        whole, last = tl.where(z == 0.0, 0, whole), tl.where(z == 0.0, 0, last)
    q_at = _at(q_ptr, b, h, rows, d, stride_qb, stride_qh, stride_ql)
    q = tl.load(q_at, mask=inside & (last > 0), other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if MASK > 0:
        mask_ptr += b * stride_mb + h * stride_mh
    of_k = h // shared
    scale = scale * _LOG2E
    acc, total, top = _attend(
        acc, total, top, q,
        k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, of_k, rows, 0, whole, L, S,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms,
        scale, dropout,
        D, CAUSAL, MASK, BY_ROW, DROPOUT, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q,
        k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, of_k, rows, whole, last, L, S,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms,
        scale, dropout,
        D, CAUSAL, MASK, BY_ROW, DROPOUT, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    y = acc * (z / total)[:, None]
    y_at = _at(y_ptr, b, h, rows, d, stride_yb, stride_yh, stride_yl)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(none, float("inf"), top + tl.log2(total))
    tl.store(lse_ptr + bh.to(tl.int64) * L + rows, lse, mask=rows < L)


@triton.jit
def _rows_grad(
    acc, q, dy, lse, delta, z,
    k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, h, rows, first, last, L, S,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms, scale, dropout,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of the keys from first to last."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys < S)[:, None] & (d < D)[None, :]
        k = tl.load(_at(k_ptr, b, h, keys, d, stride_kb, stride_kh, stride_ks), mask=inside, other=0.0)
        v = tl.load(_at(v_ptr, b, h, keys, d, stride_vb, stride_vh, stride_vs), mask=inside, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = _logits(
            s, mask_ptr, rows[:, None], keys[None, :], L, S, stride_ml, stride_ms, scale,
            CAUSAL, MASK, BY_ROW, EDGE,
        )  # fmt: skip
        p = tl.exp2(s - lse[:, None]) * z
        dp = tl.dot(dy, v.T, input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(seed_ptr, bh, rows[:, None], keys[None, :], dropout)
            dp = tl.where(kept, dp / (1.0 - dropout), 0.0)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=_ANY)
def _attention_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    dy_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,  # (B, heads, L)
    part_ptr,  # (B, heads, blocks): sums of delta
    z_ptr,
    mask_ptr,
    seed_ptr,
    L,
    S,
    heads,
    shared,
    per_gate,
    blocks,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_yb,
    stride_yh,
    stride_yl,
    stride_dyb,
    stride_dyh,
    stride_dyl,
    stride_dqb,
    stride_dqh,
    stride_dql,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    scale,
    dropout,
    HAS_Z: tl.constexpr,
    DQ: tl.constexpr,  # else delta alone
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BY_ROW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block, bh, b, h, z = _place(blocks, heads, per_gate, z_ptr, HAS_Z)
    rows, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < L)[:, None] & (d < D)[None, :]
    whole, last = S // BLOCK_N * BLOCK_N, S
    if CAUSAL:
        whole = tl.minimum(whole, block * BLOCK_M // BLOCK_N * BLOCK_N)
        last = tl.minimum(last, block * BLOCK_M + BLOCK_M)
    if HAS_Z:
        whole, last = tl.where(z == 0.0, 0, whole), tl.where(z == 0.0, 0, last)
    seen = inside & (last > 0)
    dy = tl.load(_at(dy_ptr, b, h, rows, d, stride_dyb, stride_dyh, stride_dyl), mask=seen, other=0.0)
    y = tl.load(_at(y_ptr, b, h, rows, d, stride_yb, stride_yh, stride_yl), mask=seen, other=0.0)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    if HAS_Z:
        delta = delta / tl.where(z == 0.0, 1.0, z)  # of a closed head 0
        tl.store(part_ptr + bh.to(tl.int64) * blocks + block, tl.sum(delta, 0))
    of_rows = bh.to(tl.int64) * L + rows
    tl.store(delta_ptr + of_rows, delta, mask=rows < L)
    if DQ:
        q = tl.load(_at(q_ptr, b, h, rows, d, stride_qb, stride_qh, stride_ql), mask=seen, other=0.0)
        lse = tl.load(lse_ptr + of_rows, mask=rows < L, other=float("inf"))
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if MASK > 0:
            mask_ptr += b * stride_mb + h * stride_mh
        of_k, scale2 = h // shared, scale * _LOG2E
        acc = _rows_grad(
            acc, q, dy, lse, delta, z,
            k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, of_k, rows, 0, whole, L, S,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms,
            scale2, dropout,
            D, CAUSAL, MASK, BY_ROW, DROPOUT, False, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc = _rows_grad(
            acc, q, dy, lse, delta, z,
            k_ptr, v_ptr, mask_ptr, seed_ptr, bh, b, of_k, rows, whole, last, L, S,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ml, stride_ms,
            scale2, dropout,
            D, CAUSAL, MASK, BY_ROW, DROPOUT, True, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dq_at = _at(dq_ptr, b, h, rows, d, stride_dqb, stride_dqh, stride_dql)
        tl.store(dq_at, (acc * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keys_grad(
    dk, dv, k, v, z,
    q_ptr, dy_ptr, lse_ptr, delta_ptr, mask_ptr, seed_ptr, bh, b, h, keys, first, last, L, S,
    stride_qb, stride_qh, stride_ql, stride_dyb, stride_dyh, stride_dyl, stride_ml, stride_ms, scale, dropout,
    D: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of the rows from first to last; what comes of keys behind the last one is not stored."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < L)[:, None] & (d < D)[None, :]
        q = tl.load(_at(q_ptr, b, h, rows, d, stride_qb, stride_qh, stride_ql), mask=inside, other=0.0)
        dy = tl.load(_at(dy_ptr, b, h, rows, d, stride_dyb, stride_dyh, stride_dyl), mask=inside, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=rows < L, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < L, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        s = _logits(
            s, mask_ptr, rows[None, :], keys[:, None], L, S, stride_ml, stride_ms, scale,
            CAUSAL, MASK, BY_ROW, EDGE,
        )  # fmt: skip
        p = tl.exp2(s - lse[None, :]) * z
        dp = tl.dot(v, dy.T, input_precision=PRECISION)
        stay = p
        if DROPOUT:
            kept = _kept(seed_ptr, bh, rows[None, :], keys[:, None], dropout)
            dp = tl.where(kept, dp / (1.0 - dropout), 0.0)
            stay = tl.where(kept, p / (1.0 - dropout), 0.0)
        dv = tl.dot(stay.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_ANY)
def _attention_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    z_ptr,
    mask_ptr,
    seed_ptr,
    L,
    S,
    heads,
    shared,
    per_gate,
    blocks,  # of keys
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_dyb,
    stride_dyh,
    stride_dyl,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    stride_mb,
    stride_mh,
    stride_ml,
    stride_ms,
    scale,
    dropout,
    HAS_Z: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BY_ROW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    block, b_of_k = pid % blocks, pid // blocks
    of_k = heads // shared
    b, h_k = (b_of_k // of_k).to(tl.int64), b_of_k % of_k
    keys, d = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (keys < S)[:, None] & (d < D)[None, :]
    k = tl.load(
        _at(k_ptr, b, h_k.to(tl.int64), keys, d, stride_kb, stride_kh, stride_ks), mask=inside, other=0.0
    )
    v = tl.load(
        _at(v_ptr, b, h_k.to(tl.int64), keys, d, stride_vb, stride_vh, stride_vs), mask=inside, other=0.0
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    scale2 = scale * _LOG2E
    for group in range(shared):
        h = h_k * shared + group
        bh = pid // blocks // of_k * heads + h
        z = tl.load(z_ptr + h // per_gate) if HAS_Z else 1.0
        first, last = 0, L
        if CAUSAL:  # the masks of the blocks off the diagonal cost less than a second loop's registers
            first = tl.minimum(block * BLOCK_N // BLOCK_M * BLOCK_M, L)
        if HAS_Z:
            last = tl.where(z == 0.0, first, last)
        of_rows, head = bh.to(tl.int64) * L, h.to(tl.int64)
        mask_at = mask_ptr
        if MASK > 0:
            mask_at = mask_ptr + b * stride_mb + head * stride_mh
        dk, dv = _keys_grad(
            dk, dv, k, v, z,
            q_ptr, dy_ptr, lse_ptr + of_rows, delta_ptr + of_rows, mask_at, seed_ptr, bh, b, head, keys,
            first, last, L, S,
            stride_qb, stride_qh, stride_ql, stride_dyb, stride_dyh, stride_dyl, stride_ml, stride_ms,
            scale2, dropout,
            D, CAUSAL, MASK, BY_ROW, DROPOUT, CAUSAL, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    dk_at = _at(dk_ptr, b, h_k.to(tl.int64), keys, d, stride_dkb, stride_dkh, stride_dks)
    dv_at = _at(dv_ptr, b, h_k.to(tl.int64), keys, d, stride_dvb, stride_dvh, stride_dvs)
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "heads", "n"])
def _attention_dz(part_ptr, z_ptr, dz_ptr, B, heads, n, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """dz of one gate: the sums of its heads' n blocks, in one order; 0 where no gradient comes."""
    gate = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for b in range(B):
        at = part_ptr + (tl.zeros((), tl.int64) + b * heads + gate) * n
        for start in range(0, n, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            acc += tl.load(at + offs, mask=offs < n, other=0.0)
    z = tl.load(z_ptr + gate)
    stays = (z == 0.0) if FULL else (z <= 0.0) | (z >= 1.0)
    tl.store(dz_ptr + gate, tl.where(stays, 0.0, tl.sum(acc, 0)))


class _Tile(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int


def _size(d: int) -> int:
    """A power of two that holds the head's dimension, 16 at least: what the products take."""
    return max(16, 1 << (d - 1).bit_length())


def _tile(kernel: str, call: AttentionCall) -> _Tile:
    """Rows, keys, warps and stages of a program."""
    q, mask, dropout = call.q, call.mask, call.dropout
    size, rows = _size(q.shape[-1]), q.shape[2]
    if q.dtype == torch.float32:
        tile = (_IEEE if precision(q.dtype) == "ieee" else _TF32)[kernel][size]
    else:
        tile = _HALF[kernel][size]
        if gpu(q.device.index)[0] == 90 and mask is None and not dropout and size == q.shape[-1]:
            tile = _HOPPER.get((kernel, size), tile)
    if kernel != "dkv" and rows <= 16:
        return tile._replace(m=16, n=min(tile.n, 32), warps=4)
    return tile


def _tiles(*by_size: tuple[int, int, int, int]) -> dict[int, _Tile]:
    """For head dimensions to 64, 128 and 256."""
    small, middle, large = (_Tile(*tile) for tile in by_size)
    return {16: small, 32: small, 64: small, 128: middle, 256: large}


_HALF = {
    "forward": _tiles((64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
    "dq": _tiles((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    "dkv": _tiles((32, 64, 4, 2), (32, 64, 8, 2), (16, 32, 4, 2)),
}
_HOPPER = {
    ("forward", 64): _Tile(128, 64, 4, 3),
    ("forward", 128): _Tile(128, 64, 8, 3),
    ("dq", 64): _Tile(128, 64, 8, 2),
    ("dq", 128): _Tile(64, 64, 4, 2),
    ("dkv", 64): _Tile(64, 128, 8, 2),
    ("dkv", 128): _Tile(32, 128, 8, 2),
    ("dkv", 256): _Tile(16, 64, 8, 2),
}
"""Larger ones without masks and dropout, with which, as on other chips, these would spill."""
_TF32 = {
    "forward": _tiles((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
    "dq": _tiles((64, 32, 4, 2), (32, 32, 4, 1), (32, 16, 8, 1)),
    "dkv": _tiles((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1))
    | dict.fromkeys((16, 32), _Tile(16, 32, 4, 1)),
}
_IEEE = {
    "forward": _tiles((32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    "dq": _tiles((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "dkv": _tiles((16, 64, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1))
    | dict.fromkeys((16, 32), _Tile(32, 16, 4, 1)),
}


def _in_one_piece(t: Tensor) -> Tensor:
    """t, or a copy of it, whose last dimension lies in one piece."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _mask_of(call: AttentionCall) -> tuple[Tensor | None, tuple[int, ...], int, bool]:
    """(mask, its strides of (B, heads, L, S), kind, whether it differs by row)."""
    mask = call.mask
    if mask is None:
        return None, (0, 0, 0, 0), 0, False
    spread = mask.expand(*call.q.shape[:3], call.k.shape[2])
    if mask.dtype == torch.bool:
        return spread.view(torch.uint8), spread.stride(), 1, spread.stride(2) != 0
    return spread, spread.stride(), 2, spread.stride(2) != 0


def attention_forward(call: AttentionCall) -> tuple[Tensor, list[Tensor]]:
    """y (B, heads, L, D) in the memory order of q, and [lse (B, heads, L) fp32, in base 2]."""
    q, k, v, z, _, seed, scale, is_causal, dropout = call
    q, k, v = _in_one_piece(q), _in_one_piece(k), _in_one_piece(v)
    B, heads, L, D = q.shape
    y = torch.empty_like(q)
    lse = torch.empty(B, heads, L, dtype=torch.float32, device=q.device)
    if not y.numel():
        return y, [lse]
    mask, mask_strides, kind, by_row = _mask_of(call)
    tile = _tile("forward", call)
    blocks = cdiv(L, tile.m)
    launch(
        _attention,
        (B * heads * blocks,),
        q, k, v, y, lse, z, mask, seed, L, k.shape[2], heads, heads // k.shape[1],
        1 if z is None else heads // len(z), blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], *mask_strides,
        float(scale), float(dropout),
        HAS_Z=z is not None, D=D, CAUSAL=is_causal, MASK=kind, BY_ROW=by_row, DROPOUT=dropout > 0,
        PRECISION=precision(q.dtype), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=_size(D),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, [lse]


def attention_backward(
    call: AttentionCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """dq, dk, dv, each in the memory order of its tensor, and dz.

    Args:
        saved: y and lse of attention_forward.
    """
    q, k, v, z, _, seed, scale, is_causal, dropout = call
    q, k, v, dy = _in_one_piece(q), _in_one_piece(k), _in_one_piece(v), _in_one_piece(dy)
    y, lse = saved
    need_q, need_k, need_v, need_z = wanted.needs
    need_kv = need_k or need_v
    B, heads, L, D = q.shape
    dq = torch.empty_like(q) if need_q else None
    dk, dv = (torch.empty_like(t) if need_kv else None for t in (k, v))
    dz = torch.empty_like(z) if need_z and z is not None else None
    if not y.numel() or not k.numel():
        return [None if t is None else t.zero_() for t in (dq, dk, dv, dz)]
    mask, mask_strides, kind, by_row = _mask_of(call)
    shared, per_gate = heads // k.shape[1], 1 if z is None else heads // len(z)
    constants = {
        "D": D,
        "CAUSAL": is_causal,
        "MASK": kind,
        "BY_ROW": by_row,
        "DROPOUT": dropout > 0,
        "PRECISION": precision(q.dtype),
    }
    tile = _tile("dq", call)
    blocks = cdiv(L, tile.m)
    delta = torch.empty_like(lse)
    part = None if z is None else torch.empty(B, heads, blocks, dtype=torch.float32, device=q.device)
    launch(
        _attention_dq,
        (B * heads * blocks,),
        q, k, v, y, dy, dq, lse, delta, part, z, mask, seed, L, k.shape[2], heads, shared, per_gate, blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], *dy.stride()[:3],
        *((0, 0, 0) if dq is None else dq.stride()[:3]), *mask_strides, float(scale), float(dropout),
        HAS_Z=z is not None, DQ=need_q, **constants,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=_size(D), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if dz is not None:
        launch(
            _attention_dz, (len(dz),), part, z, dz, B, len(dz), per_gate * blocks,
            FULL=wanted.full[0], BLOCK=128, num_warps=1,
        )  # fmt: skip
    if dk is not None and dv is not None:
        tile = _tile("dkv", call)
        blocks = cdiv(k.shape[2], tile.n)
        launch(
            _attention_dkv,
            (B * k.shape[1] * blocks,),
            q, k, v, dy, dk, dv, lse, delta, z, mask, seed, L, k.shape[2], heads, shared, per_gate, blocks,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3], *mask_strides, float(scale), float(dropout),
            HAS_Z=z is not None, **constants,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_D=_size(D), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return [dq, dk if need_k else None, dv if need_v else None, dz]
