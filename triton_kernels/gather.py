"""Small layers and few rows: open rows and columns are gathered inside the product instead of being packed.

A gated layer is one launch forward, sampling included where asked, and one backward: programs take different
roles by their number. Every index is used as it comes: it lists all units, open before closed, so that a
program owns positions and computes the open ones, zeroes the closed ones, or has some of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._variants import Variant
from .activation import act, act_grad
from .hard_concrete import gate_slope, gate_value, uniform
from .matmul import precision as precision_of

if TYPE_CHECKING:
    from l0kernels._gates import HardConcrete

Gate = list[Tensor]

ALIGN = 128
"""Extents and the capacity of an index are multiples of this."""

MAX_GATES = 4096
"""The longest gate vector that every program of the sampling product draws for itself."""
GATHER_ROWS = 64
"""Up to here gathering is taken whatever the size: packing pays above about 325 * keep / (1 - keep) rows."""
GATHER_WORK = 1 << 27
"""Multiply-adds of a dense layer up to which launches cost more than products."""
PROGRAMS = 120
"""Programs wanted of a launch: about one per multiprocessor."""


class ForwardTile(NamedTuple):
    """y tile of rows x columns, the contraction in steps."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


FORWARD_TILES = (
    ForwardTile(64, 64, 64, 8, 2),
    ForwardTile(64, 32, 64, 8, 2),
    ForwardTile(32, 32, 64, 4, 2),
    ForwardTile(16, 32, 128, 4, 2),
    ForwardTile(16, 16, 128, 4, 2),
)
"""From large to small: the first that gives PROGRAMS programs is taken, else the last."""
SAMPLING_TILES = FORWARD_TILES[::2]
"""The same for programs that draw the gates first, each all of them."""


class BackwardTile(NamedTuple):
    """raw = dy^T x in tiles of outputs x inputs over steps of rows; dx in tiles of rows x inputs."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


LARGE_TILE = BackwardTile(64, 64, 32, 8, 2)
"""Where it gives PROGRAMS blocks of columns."""
SMALL_TILES = (
    BackwardTile(16, 64, 32, 4, 2),
    BackwardTile(32, 64, 16, 4, 1),
    BackwardTile(128, 32, 16, 8, 1),
)
"""Otherwise, for up to FEW_ROWS rows each: a program walks all of W's rows, times the steps over rows."""
FEW_ROWS = (16, 64)
PRECISE_LARGE_TILE = BackwardTile(64, 64, 32, 16, 1)
PRECISE_SMALL_TILES = (BackwardTile(16, 64, 32, 8, 1), *SMALL_TILES[1:])
"""The same for float32 without tensor cores, whose operands take registers."""

MAX_STEPS = 16
"""Tiles that a program walks for a gate's gradient before the walk is split and a second launch sums it."""

_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _units(position, index_ptr, size, GATED: tl.constexpr):
    """Units at these positions, 0 beyond the last."""
    if GATED:
        return tl.load(index_ptr + position, mask=position < size, other=0)
    else:
        return position


@triton.jit
def _scales(z_ptr, unit, is_open, GATED: tl.constexpr):
    """z of these units, 0 where not open; without a gate 1 where open."""
    if GATED:
        return tl.load(z_ptr + unit, mask=is_open, other=0.0)
    else:
        return tl.where(is_open, 1.0, 0.0)


@triton.jit
def _count(count_ptr, size, GATED: tl.constexpr):
    """How many units are open."""
    if GATED:
        return tl.load(count_ptr)
    else:
        return size


@triton.jit
def _at(row, column, stride_row, stride_column, WIDE: tl.constexpr):
    """Offsets of a tile; 32 bits save a register an element where the operands are small enough."""
    if WIDE:
        return row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    else:
        return row[:, None] * stride_row + column[None, :] * stride_column


@triton.jit
def _load(ptr, row, column, stride_row, stride_column, row_mask, column_mask, WIDE: tl.constexpr):
    """A tile of rows and columns, 0 outside the masks."""
    at = _at(row, column, stride_row, stride_column, WIDE)
    return tl.load(ptr + at, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def _forward_tile(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_z,
    in_index,
    in_open,
    out_z,
    out_index,
    out_open,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PACKED: tl.constexpr,
    Y_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The y tile of this program; y is contiguous (M, N)."""
    tiles_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # one program draws even where there is no output
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pos_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    open_n = pos_n < out_open
    unit_n = _units(pos_n, out_index, N, OUT_GATED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end_k = tl.where(pid_n * BLOCK_N < out_open, in_open, 0)
    for k in range(0, end_k, BLOCK_K):
        pos_k = k + tl.arange(0, BLOCK_K)
        open_k = pos_k < in_open
        unit_k = _units(pos_k, in_index, K, IN_GATED)
        x = _load(x_ptr, offs_m, pos_k if X_PACKED else unit_k, stride_xm, stride_xk, mask_m, open_k, WIDE)
        w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, open_k, WIDE)
        if IN_GATED or ACT != "identity":
            x = act(x.to(tl.float32), ACT)
        if IN_GATED:
            x = x * _scales(in_z, unit_k, open_k, IN_GATED)[None, :]
        acc = tl.dot(x.to(DTYPE), tl.trans(w.to(DTYPE)), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(b_ptr + unit_n.to(tl.int64) * stride_b, mask=open_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if SCALE_OUT:
        acc *= _scales(out_z, unit_n, open_n, OUT_GATED)[None, :]
    if Y_PACKED:
        at = _at(offs_m, pos_n, N, 1, WIDE)
        tl.store(y_ptr + at, acc, mask=mask_m[:, None] & open_n[None, :])
    else:
        at = _at(offs_m, unit_n, N, 1, WIDE)
        acc = tl.where(open_n[None, :], acc, 0.0)
        tl.store(y_ptr + at, acc, mask=mask_m[:, None] & (pos_n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_z,
    in_index,
    in_count,
    out_z,
    out_index,
    out_count,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PACKED: tl.constexpr,
    Y_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = [z_out] * ((act(x) * z_in) W^T + b) of gates that were drawn before."""
    _forward_tile(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        in_z,
        in_index,
        _count(in_count, K, IN_GATED),
        out_z,
        out_index,
        _count(out_count, N, OUT_GATED),
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        stride_b,
        IN_GATED,
        OUT_GATED,
        SCALE_OUT,
        HAS_BIAS,
        X_PACKED,
        Y_PACKED,
        ACT,
        DTYPE,
        PRECISION,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _draw(
    log_alpha_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    size,
    capacity,
    limit,
    seed,
    stream,
    rank,
    inv_beta,
    gamma,
    zeta,
    BLOCK_G: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes z, index and count of one gate vector; returns how many gates are open."""
    i = tl.arange(0, BLOCK_G)
    given = i < size
    log_alpha = tl.load(log_alpha_ptr + i, mask=given, other=0.0)
    z = gate_value(log_alpha, uniform(seed, i, stream, rank), inv_beta, gamma, zeta)
    is_open = given & (z != 0.0)
    rank_open = tl.cumsum(is_open.to(tl.int32), 0)
    n_open = tl.sum(is_open.to(tl.int32), 0)
    position = tl.where(is_open, rank_open - 1, n_open + i - rank_open)
    position = tl.where(given, position, i)
    tl.store(z_ptr + i, z, mask=given)
    tl.store(index_ptr + position, tl.where(given, i, 0), mask=i < capacity)
    extent = tl.where(n_open > limit, capacity, tl.cdiv(n_open, ALIGN) * ALIGN)
    tl.store(count_ptr, n_open)
    tl.store(count_ptr + 1, extent)
    return n_open


@triton.jit(do_not_specialize=["M", "in_limit", "out_limit", "rank"])
def sampling_forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_log_alpha,
    out_log_alpha,
    seed_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    in_limit,
    out_limit,
    rank,
    inv_beta,
    gamma,
    zeta,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Draws the gates and computes y = z_out * ((x * z_in) W^T + b).

    Every program draws all gates and writes the same z, index and count to the same place; after the
    barrier it reads its own writes.
    """
    seed = tl.load(seed_ptr)
    out_z = z_ptr
    out_index = index_ptr
    in_open = K
    out_open = N
    stream = tl.full((), 0, tl.int32)
    if IN_GATED:
        capacity = tl.cdiv(K, ALIGN) * ALIGN
        in_open = _draw(
            in_log_alpha,
            z_ptr,
            index_ptr,
            count_ptr,
            K,
            capacity,
            in_limit,
            seed,
            stream,
            rank,
            inv_beta,
            gamma,
            zeta,
            BLOCK_IN,
            ALIGN,
        )
        out_z = z_ptr + K
        out_index = index_ptr + capacity
        count_ptr += 2
        stream += 1
    if OUT_GATED:
        out_open = _draw(
            out_log_alpha,
            out_z,
            out_index,
            count_ptr,
            N,
            tl.cdiv(N, ALIGN) * ALIGN,
            out_limit,
            seed,
            stream,
            rank,
            inv_beta,
            gamma,
            zeta,
            BLOCK_OUT,
            ALIGN,
        )
    tl.debug_barrier()
    _forward_tile(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        z_ptr,
        index_ptr,
        in_open,
        out_z,
        out_index,
        out_open,
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        stride_b,
        IN_GATED,
        OUT_GATED,
        OUT_GATED,
        HAS_BIAS,
        False,
        False,
        "identity",
        DTYPE,
        PRECISION,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _wants_grad(z, is_open, FULL: tl.constexpr):
    """Gates that get a gradient: every open one, or the fractional ones."""
    if FULL:
        return is_open
    else:
        return is_open & (z > 0.0) & (z < 1.0)


@triton.jit
def _store_gate_grad(ptr, unit, z, dz, wanted, mask, inv_beta, gamma, zeta, DLOG: tl.constexpr):
    """dz, or with DLOG the gradient of log_alpha; exactly 0 where not wanted."""
    if DLOG:
        dz = dz * gate_slope(z, inv_beta, gamma, zeta)
    tl.store(ptr + unit, tl.where(wanted, dz, 0.0), mask=mask)


@triton.jit
def _raw_tile(
    dy_ptr,
    x_ptr,
    dy_column,
    open_n,
    x_column,
    open_k,
    end_m,
    M,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy^T act(x) of these columns, over the rows below end_m (M, or 0 where nothing is open)."""
    raw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, end_m, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, mask_m, open_n, WIDE)
        x = _load(x_ptr, offs_m, x_column, stride_xm, stride_xk, mask_m, open_k, WIDE)
        if ACT != "identity":
            x = act(x.to(tl.float32), ACT)
        raw = tl.dot(tl.trans(dy.to(DTYPE)), x.to(DTYPE), raw, input_precision=PRECISION)
    return raw


@triton.jit
def _sum_rows(
    dy_ptr,
    dy_column,
    open_n,
    M,
    stride_dym,
    stride_dyn,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum over the rows of dy, in float32."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, offs_m < M, open_n, WIDE)
        total += tl.sum(dy.to(tl.float32), 0)
    return total


@triton.jit(
    do_not_specialize=["M", "n_split", "k_split", "stride_split", "first_rows", "first_dx", "first_db"]
)
def backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    dz_in_ptr,
    dz_out_ptr,
    in_z,
    in_index,
    in_count,
    out_z,
    out_index,
    out_count,
    inv_beta,
    gamma,
    zeta,
    M,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    n_split,
    k_split,
    stride_split,
    first_rows,
    first_dx,
    first_db,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    DY_PACKED: tl.constexpr,
    X_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_IN: tl.constexpr,
    NEED_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL_IN: tl.constexpr,
    FULL_OUT: tl.constexpr,
    DLOG: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All gradients of a layer; dx, dw and db are contiguous, dx of a packed x is packed.

    Programs below first_rows own a block of columns and n_split rows of W: dW and their part of dz_in. Those
    below first_dx own a block of rows and k_split columns: their part of dz_out. Those below first_db own a
    tile of dx, the rest a block of db. The parts of one gradient are stride_split apart.
    """
    pid = tl.program_id(0)
    in_open = _count(in_count, K, IN_GATED)
    out_open = _count(out_count, N, OUT_GATED)
    tiles_k = tl.cdiv(K, BLOCK_K)
    if pid < first_rows:
        pos_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        open_k = pos_k < in_open
        unit_k = _units(pos_k, in_index, K, IN_GATED)
        z_k = _scales(in_z, unit_k, open_k, IN_GATED)
        wants_k = _wants_grad(z_k, open_k, FULL_IN)
        begin_n = (pid // tiles_k) * n_split
        some_k = tl.where((pid % tiles_k) * BLOCK_K < in_open, out_open, 0)
        dz = tl.zeros((BLOCK_K,), tl.float32)
        for n in range(begin_n, tl.minimum(begin_n + n_split, N), BLOCK_N):
            pos_n = n + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            raw = _raw_tile(
                dy_ptr,
                x_ptr,
                pos_n if DY_PACKED else unit_n,
                open_n,
                pos_k if X_PACKED else unit_k,
                open_k,
                tl.where(n < some_k, M, 0),
                M,
                stride_dym,
                stride_dyn,
                stride_xm,
                stride_xk,
                ACT,
                DTYPE,
                PRECISION,
                WIDE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            if SCALE_OUT:
                raw *= _scales(out_z, unit_n, open_n, OUT_GATED)[:, None]
            if NEED_IN:
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, wants_k, WIDE)
                dz += tl.sum(raw * w.to(tl.float32), 0)
            if NEED_W:
                if IN_GATED:
                    raw = tl.where(open_k[None, :], raw * z_k[None, :], 0.0)
                at = _at(unit_n, unit_k, K, 1, WIDE)
                tl.store(dw_ptr + at, raw, mask=(pos_n < N)[:, None] & (pos_k < K)[None, :])
        if NEED_IN:
            dz_in_ptr += (pid // tiles_k) * stride_split
            _store_gate_grad(dz_in_ptr, unit_k, z_k, dz, wants_k, pos_k < K, inv_beta, gamma, zeta, DLOG)
    elif pid < first_dx:
        if NEED_OUT:
            tiles_n = tl.cdiv(N, BLOCK_N)
            part = (pid - first_rows) // tiles_n
            pos_n = ((pid - first_rows) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            z_n = _scales(out_z, unit_n, open_n, OUT_GATED)
            wants_n = _wants_grad(z_n, open_n, FULL_OUT)
            dy_column = pos_n if DY_PACKED else unit_n
            dz = tl.zeros((BLOCK_N,), tl.float32)
            some_n = tl.max(wants_n.to(tl.int32), 0)
            end_k = tl.minimum((part + 1) * k_split, in_open) * some_n
            for k in range(part * k_split, end_k, BLOCK_K):
                pos_k = k + tl.arange(0, BLOCK_K)
                open_k = pos_k < in_open
                unit_k = _units(pos_k, in_index, K, IN_GATED)
                raw = _raw_tile(
                    dy_ptr,
                    x_ptr,
                    dy_column,
                    wants_n,
                    pos_k if X_PACKED else unit_k,
                    open_k,
                    M,
                    M,
                    stride_dym,
                    stride_dyn,
                    stride_xm,
                    stride_xk,
                    ACT,
                    DTYPE,
                    PRECISION,
                    WIDE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, wants_n, open_k, WIDE).to(tl.float32)
                dz += tl.sum(raw * w * _scales(in_z, unit_k, open_k, IN_GATED)[None, :], 1)
            if HAS_BIAS:
                b = tl.load(b_ptr + unit_n.to(tl.int64) * stride_b, mask=wants_n, other=0.0)
                end_m = tl.where(part == 0, M * some_n, 0)
                total = _sum_rows(
                    dy_ptr, dy_column, wants_n, end_m, stride_dym, stride_dyn, WIDE, BLOCK_M, BLOCK_N
                )
                dz += b.to(tl.float32) * total
            dz_out_ptr += part * stride_split
            _store_gate_grad(dz_out_ptr, unit_n, z_n, dz, wants_n, pos_n < N, inv_beta, gamma, zeta, DLOG)
    elif pid < first_db:
        if dx_ptr is not None:
            first_k = ((pid - first_dx) % tiles_k) * BLOCK_K
            offs_m = ((pid - first_dx) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            pos_k = first_k + tl.arange(0, BLOCK_K)
            open_k = pos_k < in_open
            unit_k = _units(pos_k, in_index, K, IN_GATED)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for n in range(0, tl.where(first_k < in_open, out_open, 0), BLOCK_N):
                pos_n = n + tl.arange(0, BLOCK_N)
                open_n = pos_n < out_open
                unit_n = _units(pos_n, out_index, N, OUT_GATED)
                dy_column = pos_n if DY_PACKED else unit_n
                dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, mask_m, open_n, WIDE)
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, open_k, WIDE)
                if SCALE_OUT:
                    w = w.to(tl.float32) * _scales(out_z, unit_n, open_n, OUT_GATED)[:, None]
                acc = tl.dot(dy.to(DTYPE), w.to(DTYPE), acc, input_precision=PRECISION)
            if IN_GATED:
                acc = tl.where(open_k[None, :], acc * _scales(in_z, unit_k, open_k, IN_GATED)[None, :], 0.0)
            if X_PACKED:
                if ACT != "identity":
                    a = _load(x_ptr, offs_m, pos_k, stride_xm, stride_xk, mask_m, open_k, WIDE)
                    acc *= act_grad(a.to(tl.float32), ACT)
                tl.store(dx_ptr + _at(offs_m, pos_k, K, 1, WIDE), acc, mask=mask_m[:, None] & open_k[None, :])
            else:
                at = _at(offs_m, unit_k, K, 1, WIDE)
                tl.store(dx_ptr + at, acc, mask=mask_m[:, None] & (pos_k < K)[None, :])
    else:
        if db_ptr is not None:
            pos_n = (pid - first_db) * BLOCK_N + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            dy_column = pos_n if DY_PACKED else unit_n
            total = _sum_rows(dy_ptr, dy_column, open_n, M, stride_dym, stride_dyn, WIDE, BLOCK_M, BLOCK_N)
            if SCALE_OUT:
                total *= _scales(out_z, unit_n, open_n, OUT_GATED)
            tl.store(db_ptr + unit_n, tl.where(open_n, total, 0.0), mask=pos_n < N)


@triton.jit
def sum_parts_kernel(parts_ptr, dz_in_ptr, dz_out_ptr, width_in, width, parts, BLOCK: tl.constexpr):
    """dz_in and dz_out, width_in and the rest of width long, from their parts side by side."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * width + i, mask=i < width, other=0.0)
    if dz_in_ptr is not None:
        tl.store(dz_in_ptr + i, total, mask=i < width_in)
    if dz_out_ptr is not None:
        tl.store(dz_out_ptr + i - width_in, total, mask=(i >= width_in) & (i < width))


def prefers(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether a layer of M rows, K inputs and N outputs belongs here rather than to pack and matmul.

    Raises:
        RuntimeError: the environment variable L0KERNELS_TRITON_GATHER is none of auto, 0 and 1.
    """
    mode = os.environ.get("L0KERNELS_TRITON_GATHER", "auto")
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"L0KERNELS_TRITON_GATHER must be auto, 0 or 1, got {mode!r}")
    if dtype not in _TL_DTYPES or mode == "0":
        return False
    return mode == "1" or M <= GATHER_ROWS or M * N * K <= GATHER_WORK


def _wide(a: Tensor, b: Tensor, numel: int) -> bool:
    """Whether an offset into either matrix, or into ``numel`` elements, needs more than 32 bits."""
    (rows, columns), (row, column) = a.shape, a.stride()
    far = max(rows * row + columns * column, numel)
    (rows, columns), (row, column) = b.shape, b.stride()
    return max(far, rows * row + columns * column) >= 1 << 31


def _forward_tile_for(M: int, N: int, tiles: tuple[ForwardTile, ...]) -> ForwardTile:
    for tile in tiles:
        if tile.rows < 2 * M and -(-M // tile.rows) * -(-N // tile.columns) >= PROGRAMS:
            return tile
    return tiles[-1]


def _backward_tile_for(M: int, K: int, precise: bool) -> BackwardTile:
    large, small = LARGE_TILE, SMALL_TILES
    if precise:
        large, small = PRECISE_LARGE_TILE, PRECISE_SMALL_TILES
    if FEW_ROWS[0] < M and -(-K // large.inputs) >= PROGRAMS:
        return large
    return small[(FEW_ROWS[0] < M) + (FEW_ROWS[1] < M)]


def _triple(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if gate is None else (gate[0], gate[1], gate[2])


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dtype: torch.dtype,
    x_packed: bool = False,
    y_packed: bool = False,
    activation: str = "identity",
) -> Tensor:
    M, (N, K) = x.shape[0], weight.shape
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    rows, columns, step, num_warps, num_stages = _forward_tile_for(M, N, FORWARD_TILES)
    grid = -(-M // rows) * -(-N // columns)
    if grid:
        launch(
            forward_kernel,
            (grid,),
            x,
            weight,
            bias,
            y,
            *_triple(in_gate),
            *_triple(out_gate),
            M,
            N,
            K,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            IN_GATED=in_gate is not None,
            OUT_GATED=out_gate is not None,
            SCALE_OUT=scale_out and out_gate is not None,
            HAS_BIAS=bias is not None,
            X_PACKED=x_packed,
            Y_PACKED=y_packed,
            ACT=activation,
            DTYPE=_TL_DTYPES[dtype],
            PRECISION=precision_of(dtype),
            WIDE=_wide(x, weight, M * N),
            BLOCK_M=rows,
            BLOCK_N=columns,
            BLOCK_K=step,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return y


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) = [z_out] * ((x * z_in) W^T + b) in ``dtype``, closed outputs exactly 0. One launch."""
    return _forward(x, weight, bias, in_gate, out_gate, scale_out, dtype)


def l0_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor,
    rank: int,
    dist: HardConcrete,
    tau: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and z, index and count of the gates given, flat as of ``sample``; one launch.

    Args:
        in_log_alpha, out_log_alpha: float32, contiguous, at most MAX_GATES each; at least one of them. The
            first given is stream 0.
        tau: the open share above which a gate vector is plain, its extent the whole capacity.
    """
    M, (N, K) = x.shape[0], weight.shape
    sizes = [a.shape[0] for a in (in_log_alpha, out_log_alpha) if a is not None]
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    z = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    index = torch.empty(sum(-(-n // ALIGN) * ALIGN for n in sizes), dtype=torch.int32, device=x.device)
    count = torch.empty(2 * len(sizes), dtype=torch.int32, device=x.device)
    rows, columns, step, num_warps, num_stages = _forward_tile_for(M, N, SAMPLING_TILES)
    block_in = 0 if in_log_alpha is None else max(ALIGN, triton.next_power_of_2(K))
    block_out = 0 if out_log_alpha is None else max(ALIGN, triton.next_power_of_2(N))
    # One program draws the gates also where there is no y to compute.
    grid = max(1, -(-M // rows) * -(-N // columns))
    launch(
        sampling_forward_kernel,
        (grid,),
        x,
        weight,
        bias,
        y,
        in_log_alpha,
        out_log_alpha,
        seed,
        z,
        index,
        count,
        int(tau * K),
        int(tau * N),
        rank,
        1.0 / dist.beta,
        dist.gamma,
        dist.zeta,
        M,
        N,
        K,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        IN_GATED=in_log_alpha is not None,
        OUT_GATED=out_log_alpha is not None,
        HAS_BIAS=bias is not None,
        DTYPE=_TL_DTYPES[dtype],
        PRECISION=precision_of(dtype),
        WIDE=_wide(x, weight, M * N),
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=step,
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        ALIGN=ALIGN,
        num_warps=8 if max(block_in, block_out) > 1024 else num_warps,
        num_stages=num_stages,
    )
    return y, z, index, count


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None,
    dy_packed: bool = False,
    x_packed: bool = False,
    activation: str = "identity",
) -> list[Tensor | None]:
    need_x, need_w, need_b, need_in, need_out = needs
    need_b = need_b and bias is not None
    need_in = need_in and in_gate is not None
    need_out = need_out and out_gate is not None
    M, (N, K) = x.shape[0], weight.shape
    device = x.device
    dx = torch.empty((M, K), dtype=dtype if x_packed else x.dtype, device=device) if need_x else None
    dw = torch.empty((N, K), dtype=weight.dtype, device=device) if need_w else None
    db = torch.empty(N, dtype=bias.dtype, device=device) if bias is not None and need_b else None
    dz_in = torch.empty_like(in_gate[0]) if in_gate is not None and need_in else None
    dz_out = torch.empty_like(out_gate[0]) if out_gate is not None and need_out else None
    precision = precision_of(dtype)
    rows, outputs, inputs, num_warps, num_stages = _backward_tile_for(
        M, K, dtype == torch.float32 and precision == "ieee"
    )
    tiles_k, tiles_n = -(-K // inputs), -(-N // outputs)
    # A program that sums a gate's gradient walks the other side; where that is long, parts are summed later.
    walks = max(tiles_n if need_in else 0, tiles_k if need_out else 0) * -(-M // rows)
    parts = max(1, -(-walks // MAX_STEPS))
    n_split = -(-tiles_n // parts) * outputs if need_in else outputs
    n_parts = parts if need_in else tiles_n
    first_rows = tiles_k * n_parts if need_w or need_in else 0
    first_dx = first_rows + (tiles_n * parts if need_out else 0)
    first_db = first_dx + (tiles_k * -(-M // rows) if need_x else 0)
    grid = first_db + (tiles_n if need_b else 0)
    width_in = K if need_in else 0
    width = width_in + (N if need_out else 0)
    part_in, part_out = dz_in, dz_out
    if parts > 1:
        scratch = torch.empty((parts, width), dtype=torch.float32, device=device)
        part_in, part_out = scratch, scratch[:, width_in:]
    if grid:
        launch(
            backward_kernel,
            (grid,),
            dy,
            x,
            weight,
            bias,
            dx,
            dw,
            db,
            part_in,
            part_out,
            *_triple(in_gate),
            *_triple(out_gate),
            *((0.0, 0.0, 0.0) if dist is None else (1.0 / dist.beta, dist.gamma, dist.zeta)),
            M,
            N,
            K,
            *dy.stride(),
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            n_split,
            -(-tiles_k // parts) * inputs,
            width,
            first_rows,
            first_dx,
            first_db,
            IN_GATED=in_gate is not None,
            OUT_GATED=out_gate is not None,
            SCALE_OUT=scale_out and out_gate is not None,
            DY_PACKED=dy_packed,
            X_PACKED=x_packed,
            ACT=activation,
            NEED_W=need_w,
            NEED_IN=need_in,
            NEED_OUT=need_out,
            HAS_BIAS=bias is not None,
            FULL_IN=full_in,
            FULL_OUT=full_out,
            DLOG=dist is not None,
            DTYPE=_TL_DTYPES[dtype],
            PRECISION=precision,
            WIDE=_wide(x, weight, M * K) or _wide(dy, weight, N * K),
            BLOCK_M=rows,
            BLOCK_N=outputs,
            BLOCK_K=inputs,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if parts > 1:
        launch(
            sum_parts_kernel, (-(-width // 128),), scratch, dz_in, dz_out, width_in, width, parts, BLOCK=128
        )
    return [dx, dw, db, dz_in, dz_out]


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where ``needs`` says so; with ``dist`` the gradients of
    log_alpha in place of those of z. One launch, or two where a gate's gradient is a long sum."""
    return _backward(dy, x, weight, bias, in_gate, out_gate, scale_out, full_in, full_out, dtype, needs, dist)


def mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Gate | None],
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y (M, n_L) and the hidden pre-activations, (M, n_l) each: the open ones first, what follows is never
    written. One launch a layer; the activation and the gate are applied where a layer reads them."""
    saved: list[Tensor] = []
    h = x
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out_gate = gates[i + 1] if i < last else None
        h = _forward(
            h,
            weight,
            bias,
            gates[i],
            out_gate,
            False,
            dtype,
            x_packed=i > 0,
            y_packed=i < last,
            activation=activation if i else "identity",
        )
        if i < last:
            saved.append(h)
    return h, saved


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Gate | None],
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    full: list[bool],
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer (with ``dist`` dlog_alpha); ``needs`` has that order;
    None where it says so. One launch a layer."""
    depth = len(weights)
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * depth
    db: list[Tensor | None] = [None] * depth
    dz: list[Tensor | None] = [None] * depth
    for i in range(depth - 1, -1, -1):
        below = needs[0] or any(need_w[:i]) or any(need_b[:i]) or any(need_z[:i])
        dx, dw[i], db[i], dz[i], _ = _backward(
            dy,
            saved[i - 1] if i else x,
            weights[i],
            biases[i],
            gates[i],
            gates[i + 1] if i + 1 < depth else None,
            False,
            full[i],
            False,
            dtype,
            [below, need_w[i], need_b[i], need_z[i], False],
            dist,
            dy_packed=i + 1 < depth,
            x_packed=i > 0,
            activation=activation if i else "identity",
        )
        if dx is None:
            break
        dy = dx  # of this layer's input: the gradient of the output below
    return [dx, *dw, *db, *dz]


def _variant(name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], tile: Any) -> Variant:
    """Arguments get their types by name; rows of W and x are contiguous, as they nearly always are."""
    types = {"inv_beta": "fp32", "gamma": "fp32", "zeta": "fp32", "seed_ptr": "*i64"}
    for argument in kernel.arg_names:
        if argument.endswith(("_z", "z_ptr", "_log_alpha", "dz_in_ptr", "dz_out_ptr")):
            types[argument] = "*fp32"
        elif argument.endswith(("index", "count", "index_ptr", "count_ptr")):
            types[argument] = "*i32"
        elif argument.endswith("_ptr"):
            types.setdefault(argument, {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype])
        elif argument.islower() or argument in "MNK":
            types.setdefault(argument, "i32")
    unit = dict.fromkeys(("stride_xk", "stride_wk", "stride_b", "stride_dyn"), 1)
    constants = {**unit, **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=False)), **constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {k: types[k] for k in kernel.arg_names if k not in constants}
    return Variant(f"gather/{name}", kernel, signature, constants, tile.num_warps, tile.num_stages)


def variants() -> Iterator[Variant]:
    """Every tile with gates on both sides and as the inside of a chain; sampling at its largest."""
    for name, dtype, precision in (
        ("fp32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("bf16", torch.bfloat16, "tf32"),
    ):
        base = {
            "IN_GATED": True,
            "OUT_GATED": True,
            "HAS_BIAS": True,
            "DTYPE": _TL_DTYPES[dtype],
            "PRECISION": precision,
            "WIDE": False,
            "ALIGN": ALIGN,
            "BLOCK_IN": MAX_GATES,
            "BLOCK_OUT": MAX_GATES,
            "NEED_W": True,
            "FULL_IN": False,
            "FULL_OUT": False,
            "NEED_IN": True,
            "DLOG": True,
        }
        both = {
            **base,
            "SCALE_OUT": True,
            "ACT": "identity",
            "X_PACKED": False,
            "Y_PACKED": False,
            "DY_PACKED": False,
            "NEED_OUT": True,
        }
        chain = {
            **base,
            "SCALE_OUT": False,
            "ACT": "gelu",
            "X_PACKED": True,
            "Y_PACKED": True,
            "DY_PACKED": True,
            "NEED_OUT": False,
        }
        for tile in SAMPLING_TILES if name == "tf32" else FORWARD_TILES:
            yield _variant(f"forward_{name}_{tile.rows}x{tile.columns}", forward_kernel, dtype, both, tile)
        yield _variant(f"chain_{name}", forward_kernel, dtype, chain, FORWARD_TILES[-1])
        for tile in SAMPLING_TILES if name != "tf32" else ():
            shape = f"{name}_{tile.rows}x{tile.columns}"
            tile = tile._replace(num_warps=8)
            yield _variant(f"sampling_{shape}", sampling_forward_kernel, dtype, both, tile)
        tiles = (LARGE_TILE, *SMALL_TILES)
        if name == "fp32":
            tiles = (PRECISE_LARGE_TILE, *PRECISE_SMALL_TILES)
        for back in tiles:
            shape = f"{name}_{back.rows}x{back.outputs}x{back.inputs}"
            yield _variant(f"backward_{shape}", backward_kernel, dtype, both, back)
            if name != "tf32":
                yield _variant(f"chain_backward_{shape}", backward_kernel, dtype, chain, back)
    # What is absent is None: each result alone, without gates where it can do without.
    results = {"dx_ptr": None, "dw_ptr": None, "db_ptr": None, "dz_in_ptr": None, "dz_out_ptr": None}
    for result in results:
        alone: dict[str, Any] = {**both, **{k: v for k, v in results.items() if k != result}}
        alone.update({"NEED_W": result == "dw_ptr", "NEED_IN": result == "dz_in_ptr", "DLOG": False})
        alone["NEED_OUT"] = result == "dz_out_ptr"
        if "z" not in result:
            alone.update(
                {f"{side}_{part}": None for side in ("in", "out") for part in ("z", "index", "count")}
            )
            alone.update({"IN_GATED": False, "OUT_GATED": False, "SCALE_OUT": False})
            alone.update({"HAS_BIAS": False, "b_ptr": None})
        name = f"backward_only_{result[:-4]}"
        yield _variant(name, backward_kernel, torch.bfloat16, alone, SMALL_TILES[-1])
    yield Variant(
        "gather/sum_parts",
        sum_parts_kernel,
        {
            **dict.fromkeys(("parts_ptr", "dz_in_ptr", "dz_out_ptr"), "*fp32:16"),
            **dict.fromkeys(("width_in", "width", "parts"), "i32"),
        },
        {"BLOCK": 128},
    )
