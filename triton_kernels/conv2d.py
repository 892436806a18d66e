"""gated_conv2d: implicit products over packed channels, extents read on the device, no host sync.

    y[m, o] = z_o * (sum over taps t and inputs i of x[row(m, t), i] W[o, i, t] z_i + b_o)

Pixels are the rows of a matrix (N H W, channels), channels_last memory; a gated side holds its open channels
first (pack.py), its packed W as (out', tap, in') with the factors of x in it. The product walks over taps and
chunks of open inputs and gathers whole pieces of rows. Tiles narrow where the open outputs end: the device
decides their widths. The gradient of x is the same product over the outputs, each phase of the stride with
the taps that meet it alone; that of W sums rows in shares that a second kernel adds, in one order.

1x1 convolutions go to the matrix product; groups have direct kernels of their own (conv2d_groups.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._gates import HardConcrete, round_up

from . import conv2d_groups
from ._launch import address, cdiv, launch
from ._variants import Variant, recorder
from .linear import (
    input_grad,
    linear_backward,
    linear_forward,
    linear_saved_shapes,
    operand,
    support,
    weight_grad,
)
from .matmul import Gate, Operand, _device, _extent, _form, _stride, matmul, precision
from .pack import _launch_reduce, _programs, pack, unpack
from .sample import gate_grad

Conv = tuple[list[int], list[int], list[int], int]
"""stride, padding, dilation (each of two dimensions) and groups."""

_VEC = 8  # strides of operands come in units of 8 elements: copies stay wide for 8, 24, 40... channels, too
_PACK_N, _PACK_K = 8, 64
_SELECT_ROWS, _SELECT_COLS = 32, 128
_SUM_ROWS, _SUM_COLS = 64, 64
_REDUCE_OUT = 8
_MAX_SPLITS = 16
_ANY = [
    "images",
    "H",
    "W",
    "OH",
    "OW",
    "KH",
    "KW",
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dilation_h",
    "dilation_w",
    "step_y",
    "step_x",
    "rows",
    "programs",
    "capacity",
]
"""Numbers that change no instruction worth a compilation of its own."""


class Config(NamedTuple):
    """A tile and how it is computed; its columns halve LEVELS - 1 times where the open channels end."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    LEVELS: int
    num_warps: int
    num_stages: int
    CTAS: int = 1
    """Programs per multiprocessor."""


# ---- the weight


@triton.jit
def _factor(z_ptr, unit, mask, MODE: tl.constexpr):
    """What a gate multiplies by: MODE 1 z, 2 a one where it is open; 0 beyond the mask."""
    z = tl.load(z_ptr + unit, mask=mask, other=0.0).to(tl.float32)
    if MODE == 2:
        z = tl.where(z != 0.0, 1.0, 0.0)
    return z


@triton.jit
def _pack_weight(
    w_ptr,  # (N, K, KH, KW), any strides
    out_ptr,  # (>= N, KH KW, cap_k)
    n_z_ptr,
    n_index_ptr,
    n_count_ptr,
    k_z_ptr,
    k_index_ptr,
    k_count_ptr,
    N,
    K,
    KH,
    KW,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    cap_k,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    MODE_N: tl.constexpr,
    MODE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n', t, k'] = W[n, k, t] z_n z_k; zeros from the open k to the next 128."""
    _, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    _, k_open, k_plain = _extent(k_count_ptr, K, HAS_K)
    k_end = tl.minimum(tl.cdiv(k_open, 128) * 128, cap_k)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if (tl.program_id(0) * BLOCK_N < n_open) & (tl.program_id(1) * BLOCK_K < k_end):
        unit_n, unit_k = n, k
        if HAS_N:
            unit_n = tl.where(n_plain, n, tl.load(n_index_ptr + n, mask=n < n_open, other=0))
        if HAS_K:
            unit_k = tl.where(k_plain, k, tl.load(k_index_ptr + k, mask=k < k_open, other=0))
        held = (n < n_open)[:, None] & (k < k_open)[None, :]
        z = tl.full((BLOCK_N, BLOCK_K), 1.0, tl.float32)
        if MODE_N:
            z *= _factor(n_z_ptr, unit_n, n < n_open, MODE_N)[:, None]
        if MODE_K:
            z *= _factor(k_z_ptr, unit_k, k < k_open, MODE_K)[None, :]
        source = w_ptr + unit_n.to(tl.int64)[:, None] * stride_n + unit_k.to(tl.int64)[None, :] * stride_k
        target = out_ptr + n.to(tl.int64)[:, None] * (KH * KW * cap_k) + k[None, :]
        mask = (n < n_open)[:, None] & (k < k_end)[None, :]
        for ty in range(KH):
            for tx in range(KW):
                value = tl.load(source + ty * stride_y + tx * stride_x, mask=held, other=0.0).to(tl.float32)
                if MODE_N or MODE_K:
                    value = tl.where(z != 0.0, value * z, 0.0)
                tl.store(target + (ty * KW + tx) * cap_k, value.to(out_ptr.dtype.element_ty), mask=mask)


# ---- the product


@triton.jit
def _columns(n_open, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """(full tiles, tiles, columns they cover): the rest takes up to two tiles, a half and a quarter wide."""
    UNITS: tl.constexpr = 2 ** (LEVELS - 1)
    UNIT: tl.constexpr = BLOCK_N // UNITS
    full = n_open // BLOCK_N
    rest = tl.cdiv(n_open - full * BLOCK_N, UNIT)
    covered = full * BLOCK_N + rest * UNIT
    full += (rest == UNITS).to(tl.int32)
    rest = rest % UNITS
    return full, full + (rest > 0).to(tl.int32) + (rest == 3).to(tl.int32), covered


@triton.jit
def _column(tile, full, covered, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """Where a tile of columns starts, and how often its width is halved."""
    UNIT: tl.constexpr = BLOCK_N // 2 ** (LEVELS - 1)
    rest = (covered - full * BLOCK_N) // UNIT
    col = tl.minimum(tile, full) * BLOCK_N
    halvings = tl.where(tile < full, 0, LEVELS - 1)
    if LEVELS == 3:
        halvings = tl.where((tile == full) & (rest >= 2), 1, halvings)
        col += tl.where(tile > full, 2 * UNIT, 0)
    return col, halvings


@triton.jit
def _phase(f, pad, K, stride, dilation, step):
    """The taps t of K that meet phase f of a strided gradient, f + pad - t dilation = 0 mod stride:
    (the first, how many, the row of the first, rows from one to the next). ``step``: from one to the next."""
    first = f * 0 + K
    for t in range(step):
        first = tl.where((f + pad - t * dilation) % stride == 0, t, first)
    count = tl.where(first < K, tl.cdiv(K - first, step), 0)
    return first, count, (f + pad - first * dilation) // stride, -(dilation * step // stride)


@triton.jit
def _conv_tile(
    start_ptr,  # (BLOCK_M,) where the window of each row starts
    iy,
    ix,
    w_ptr,
    col,
    n_open,
    H,
    W,
    KW,
    first_y,
    first_x,
    step_y,
    step_x,
    n_y,
    n_x,
    gap_y,
    gap_x,
    chunks,
    limit,
    stride_x,
    stride_w,
    stride_t,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N) of the columns from col on."""
    n = col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n[:, None] * stride_w + k[None, :]
    start_ptr = start_ptr[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(n_y * n_x * chunks):
        tap = step // chunks
        c = (step - tap * chunks) * BLOCK_K
        ty = tap // n_x
        tx = tap - ty * n_x
        y = iy + ty * gap_y
        x = ix + tx * gap_x
        mask = ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
        if not EVEN_K:
            mask = mask & (c + k < limit)[None, :]
        a = tl.load(start_ptr + ((ty * gap_y * W + tx * gap_x) * stride_x + c), mask=mask, other=0.0)
        t = (first_y + ty * step_y) * KW + first_x + tx * step_x
        b = tl.load(w_ptr + (t * stride_t + c) + w_at, mask=(n < n_open)[:, None], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_store(
    acc,
    col,
    y_ptr,  # (BLOCK_M,) where each row starts
    row_mask,
    n_open,
    n_extent,
    n_plain,
    n_index_ptr,
    n_z_ptr,
    bias_ptr,
    HAS_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = col + tl.arange(0, BLOCK_N)
    is_open = n < n_open
    unit = n
    if HAS_N:
        unit = tl.where(n_plain, n, tl.load(n_index_ptr + n, mask=is_open, other=0))
    if HAS_BIAS:
        acc += tl.load(bias_ptr + unit, mask=is_open, other=0.0).to(tl.float32)[None, :]
    if MODE_N:
        z = _factor(n_z_ptr, unit, is_open, MODE_N)[None, :]
        acc = tl.where(z != 0.0, acc * z, 0.0)
    value = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr[:, None] + n[None, :], value, mask=row_mask[:, None] & (n < n_extent)[None, :])


@triton.jit(do_not_specialize=_ANY)
def _conv(
    x_full_ptr,
    x_packed_ptr,
    w_ptr,  # (>= N, KH KW, stride_t)
    y_full_ptr,
    y_packed_ptr,
    n_z_ptr,
    n_index_ptr,
    n_count_ptr,
    k_count_ptr,
    bias_ptr,
    stride_x_full,  # of x: in units of VEC
    stride_x_packed,
    stride_y_full,
    stride_y_packed,
    stride_t,
    N,
    K,
    images,
    H,  # of x
    W,
    OH,  # of y
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    step_y,  # between the taps that meet a phase
    step_x,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    X_FORM: tl.constexpr,
    Y_FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gradient: y and x change roles, each phase of the stride by itself
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    # *_FORM: 0 natural, 1 packed, 2 decided here.
    n_extent, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    k_extent, k_open, k_plain = _extent(k_count_ptr, K, HAS_K)
    x_ptr, stride_x = x_full_ptr, stride_x_full
    if X_FORM == 1:
        x_ptr, stride_x = x_packed_ptr, stride_x_packed
    if X_FORM == 2:
        x_ptr = tl.where(k_plain, x_full_ptr, x_packed_ptr)
        stride_x = tl.where(k_plain, stride_x_full, stride_x_packed)
    y_ptr, stride_y = y_full_ptr, stride_y_full
    if Y_FORM == 1:
        y_ptr, stride_y = y_packed_ptr, stride_y_packed
    if Y_FORM == 2:
        y_ptr = tl.where(n_plain, y_full_ptr, y_packed_ptr)
        stride_y = tl.where(n_plain, stride_y_full, stride_y_packed)
    stride_x = stride_x.to(tl.int64) * VEC
    stride_y = stride_y.to(tl.int64)
    # What x holds beyond the open channels up to here is zero; natural rows may be cut short of a chunk.
    limit = tl.cdiv(k_extent, VEC) * VEC
    chunks = tl.cdiv(k_open, BLOCK_K)

    full, tiles_n, covered = _columns(n_open, BLOCK_N, LEVELS)
    tiles_n = tl.maximum(tiles_n, 1)  # with nothing open one writes the zeros
    QH, QW = OH, OW
    phases = 1
    if TRANSPOSED:
        QH = tl.cdiv(OH, stride_h)
        QW = tl.cdiv(OW, stride_w)
        phases = stride_h * stride_w
    rows = images * QH * QW
    tiles_m = tl.cdiv(rows, BLOCK_M)
    # The narrow tiles come last and fill the gaps that the wide ones leave.
    for tile in range(tl.program_id(0), tiles_n * phases * tiles_m, tl.num_programs(0)):
        pid_m = tile % tiles_m
        phase = tile // tiles_m % phases
        pid_n = tile // tiles_m // phases
        m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        image = m // (QH * QW)
        qy = m // QW % QH
        qx = m % QW
        row_mask = m < rows
        oy, ox = qy, qx
        if TRANSPOSED:
            phase_y, phase_x = phase // stride_w, phase % stride_w
            first_y, n_y, base_y, gap_y = _phase(phase_y, pad_h, KH, stride_h, dilation_h, step_y)
            first_x, n_x, base_x, gap_x = _phase(phase_x, pad_w, KW, stride_w, dilation_w, step_x)
            oy = qy * stride_h + phase_y
            ox = qx * stride_w + phase_x
            iy, ix = qy + base_y, qx + base_x
            row_mask = row_mask & (oy < OH) & (ox < OW)
        else:
            first_y, first_x, n_y, n_x = 0, 0, KH, KW
            gap_y, gap_x = dilation_h, dilation_w
            iy, ix = qy * stride_h - pad_h, qx * stride_w - pad_w
        start_ptr = x_ptr + ((image * H + iy) * W + ix).to(tl.int64) * stride_x
        iy = tl.where(row_mask, iy, -1073741824)  # rows beyond the last meet no pixel
        out_ptr = y_ptr + ((image * OH + oy) * OW + ox).to(tl.int64) * stride_y
        col, halvings = _column(pid_n, full, covered, BLOCK_N, LEVELS)
        for level in tl.static_range(LEVELS):
            if halvings == level:
                acc = _conv_tile(
                    start_ptr, iy, ix, w_ptr, col, n_open, H, W, KW,
                    first_y, first_x, step_y, step_x, n_y, n_x, gap_y, gap_x, chunks, limit,
                    stride_x, KH * KW * stride_t, stride_t,
                    EVEN_K, PRECISION, BLOCK_M, BLOCK_N // 2**level, BLOCK_K,
                )  # fmt: skip
                _conv_store(
                    acc, col, out_ptr, row_mask, n_open, n_extent, n_plain, n_index_ptr, n_z_ptr, bias_ptr,
                    HAS_N, HAS_BIAS, MODE_N, BLOCK_N // 2**level,
                )  # fmt: skip
        if HAS_N:  # noqa: SIM102 - decided by the compiler, the next by the device
            if pid_n == tiles_n - 1:
                for left in range(covered, n_extent, 32):
                    c = left + tl.arange(0, 32)
                    zeros = tl.zeros((BLOCK_M, 32), y_ptr.dtype.element_ty)
                    mask = row_mask[:, None] & (c < n_extent)[None, :]
                    tl.store(out_ptr[:, None] + c[None, :], zeros, mask=mask)


# ---- the gradient of the weight


@triton.jit
def _shares(
    o_open, i_open, taps, rows, programs, capacity,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """(tiles over the outputs, over the inputs, full ones of those, columns covered, shares of the rows).

    The shares fill the device evenly; one costs as much as 700 rows, for it writes a tile and reads it again.
    """
    tiles_o = tl.cdiv(o_open, BLOCK_M)
    full, tiles_i, covered = _columns(i_open, BLOCK_N, LEVELS)
    tiles = tl.maximum(tiles_o * tiles_i * taps, 1)
    area = tl.maximum(tiles_o * BLOCK_M * covered * taps, 1).to(tl.int64)
    splits = 1
    best = 1.0e30
    for s in range(1, MAX_SPLITS + 1):
        waves = tl.cdiv(tiles * s, programs).to(tl.float32)
        cost = waves * (rows.to(tl.float32) / s + 700.0)
        better = (cost < best) & ((s == 1) | (area * s <= capacity))
        splits = tl.where(better, s, splits)
        best = tl.where(better, cost, best)
    return tiles_o, tiles_i, full, covered, splits


@triton.jit
def _dw_tile(
    dy_ptr,
    x_ptr,
    row,
    last,
    o_col,
    i_col,
    ty,
    tx,
    H,
    W,
    OH,
    OW,
    stride_h,
    stride_w,
    o_limit,
    i_limit,
    stride_dy,
    stride_x,
    EVEN_O: tl.constexpr,
    EVEN_I: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the rows [row, last) of dy[m, o] x[pixel of m under the tap, i]."""
    o = o_col + tl.arange(0, BLOCK_M)
    i = i_col + tl.arange(0, BLOCK_N)
    m = row + tl.arange(0, BLOCK_K)
    image, oy, ox = m // (OH * OW), m // OW % OH, m % OW
    # The position of a row moves on by additions: a division per row and step would outlast the product.
    by_image, by_y, by_x = BLOCK_K // (OH * OW), BLOCK_K // OW % OH, BLOCK_K % OW
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(row, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        y = oy * stride_h + ty
        x = ox * stride_w + tx
        mask = (m < last)[:, None]
        inside = ((m < last) & (y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
        if not EVEN_O:
            mask = mask & (o < o_limit)[None, :]
        if not EVEN_I:
            inside = inside & (i < i_limit)[None, :]
        a = tl.load(dy_ptr + m.to(tl.int64)[:, None] * stride_dy + o[None, :], mask=mask, other=0.0)
        pixel = ((image * H + y) * W + x).to(tl.int64)
        b = tl.load(x_ptr + pixel[:, None] * stride_x + i[None, :], mask=inside, other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        ox += by_x
        carry = (ox >= OW).to(tl.int32)
        ox -= carry * OW
        oy += by_y + carry
        carry = (oy >= OH).to(tl.int32)
        oy -= carry * OH
        image += by_image + carry
    return acc


@triton.jit(do_not_specialize=_ANY)
def _conv_dw(
    dy_full_ptr,
    dy_packed_ptr,
    x_full_ptr,
    x_packed_ptr,
    partial_ptr,  # (splits, taps, padded outputs, covered inputs) float32
    o_count_ptr,
    i_count_ptr,
    stride_dy_full,  # of dy and x: in units of VEC
    stride_dy_packed,
    stride_x_full,
    stride_x_packed,
    N,
    K,
    images,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    programs,
    capacity,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    DY_FORM: tl.constexpr,
    X_FORM: tl.constexpr,
    EVEN_O: tl.constexpr,
    EVEN_I: tl.constexpr,
    VEC: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    o_extent, o_open, o_plain = _extent(o_count_ptr, N, HAS_N)
    i_extent, i_open, i_plain = _extent(i_count_ptr, K, HAS_K)
    dy_ptr, stride_dy = dy_full_ptr, stride_dy_full
    if DY_FORM == 1:
        dy_ptr, stride_dy = dy_packed_ptr, stride_dy_packed
    if DY_FORM == 2:
        dy_ptr = tl.where(o_plain, dy_full_ptr, dy_packed_ptr)
        stride_dy = tl.where(o_plain, stride_dy_full, stride_dy_packed)
    x_ptr, stride_x = x_full_ptr, stride_x_full
    if X_FORM == 1:
        x_ptr, stride_x = x_packed_ptr, stride_x_packed
    if X_FORM == 2:
        x_ptr = tl.where(i_plain, x_full_ptr, x_packed_ptr)
        stride_x = tl.where(i_plain, stride_x_full, stride_x_packed)
    stride_dy = stride_dy.to(tl.int64) * VEC
    stride_x = stride_x.to(tl.int64) * VEC
    o_limit = tl.cdiv(o_extent, VEC) * VEC
    i_limit = tl.cdiv(i_extent, VEC) * VEC
    taps = KH * KW
    rows = images * OH * OW
    tiles_o, tiles_i, full, covered, splits = _shares(
        o_open, i_open, taps, rows, programs, capacity, BLOCK_M, BLOCK_N, LEVELS, MAX_SPLITS
    )
    share = tl.cdiv(tl.cdiv(rows, splits), BLOCK_K) * BLOCK_K
    for unit in range(tl.program_id(0), tiles_o * tiles_i * taps * splits, tl.num_programs(0)):
        # Neighbours in time read the same rows.
        pid_o = unit % tiles_o
        tap = unit // tiles_o % taps
        split = unit // tiles_o // taps % splits
        pid_i = unit // tiles_o // taps // splits
        row = split * share
        last = tl.minimum(row + share, rows)
        ty = tap // KW * dilation_h - pad_h
        tx = tap % KW * dilation_w - pad_w
        i_col, halvings = _column(pid_i, full, covered, BLOCK_N, LEVELS)
        o = pid_o * BLOCK_M + tl.arange(0, BLOCK_M)
        line = (split * taps + tap).to(tl.int64) * (tiles_o * BLOCK_M) + o
        for level in tl.static_range(LEVELS):
            if halvings == level:
                acc = _dw_tile(
                    dy_ptr, x_ptr, row, last, pid_o * BLOCK_M, i_col, ty, tx, H, W, OH, OW,
                    stride_h, stride_w, o_limit, i_limit, stride_dy, stride_x,
                    EVEN_O, EVEN_I, PRECISION, BLOCK_M, BLOCK_N // 2**level, BLOCK_K,
                )  # fmt: skip
                i = i_col + tl.arange(0, BLOCK_N // 2**level)
                tl.store(partial_ptr + line[:, None] * covered + i[None, :], acc)


@triton.jit(do_not_specialize=_ANY)
def _finish_dw(
    partial_ptr,
    dw_ptr,  # (N, K, taps) contiguous
    theta_ptr,  # (N, K, KH, KW), any strides
    dz_o_ptr,  # (cdiv(K, BLOCK_I) or more, N) partial sums
    dz_i_ptr,  # (cdiv(N, BLOCK_O), K) partial sums
    o_z_ptr,
    o_index_ptr,
    o_count_ptr,
    i_z_ptr,
    i_index_ptr,
    i_count_ptr,
    N,
    K,
    rows,
    KH,
    KW,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    programs,
    capacity,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    MODE_N: tl.constexpr,
    MODE_K: tl.constexpr,
    DZ_N: tl.constexpr,
    DZ_K: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dW = z_o z_i (sum of the shares), zeros where closed; the gates' sums over this program's units."""
    _, o_open, o_plain = _extent(o_count_ptr, N, HAS_N)
    _, i_open, i_plain = _extent(i_count_ptr, K, HAS_K)
    taps = KH * KW
    tiles_o, _, _, covered, splits = _shares(
        o_open, i_open, taps, rows, programs, capacity, BLOCK_M, BLOCK_N, LEVELS, MAX_SPLITS
    )
    lines = tiles_o * BLOCK_M
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    unit_i, z_i = i, tl.full((BLOCK_I,), 1.0, tl.float32)
    if HAS_K:
        # The index holds the closed units behind the open ones: every element of dW is written once.
        unit_i = tl.where(i_plain, i, tl.load(i_index_ptr + i, mask=i < K, other=0))
        z_i = _factor(i_z_ptr, unit_i, i < K, MODE_K)
    held_i = (i < i_open) & (z_i != 0.0)
    sum_i = tl.zeros((BLOCK_I,), tl.float32)
    plane = covered.to(tl.int64) * lines * taps
    for step in range(tl.minimum(N - tl.program_id(0) * BLOCK_O, BLOCK_O)):
        o = tl.program_id(0) * BLOCK_O + step
        unit_o, z_o, held_o = o, 1.0, o < o_open
        if HAS_N:
            unit_o = tl.where(o_plain, o, tl.load(o_index_ptr + o))
            z_o = _factor(o_z_ptr, unit_o, True, MODE_N)
            held_o = held_o & (z_o != 0.0)
        held = held_i & held_o
        sum_o = tl.zeros((BLOCK_I,), tl.float32)
        for first in range(0, taps, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            inside = (t < taps)[:, None] & held[None, :]
            at = (t.to(tl.int64)[:, None] * lines + o) * covered + i[None, :]
            g = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
            for split in range(splits):
                g += tl.load(partial_ptr + split * plane + at, mask=inside, other=0.0)
            g = tl.trans(g)
            mask = (i < K)[:, None] & (t < taps)[None, :]
            if DZ_N or DZ_K:
                where = unit_i.to(tl.int64)[:, None] * stride_k
                where += (t // KW * stride_y + t % KW * stride_x)[None, :]
                theta = tl.load(
                    theta_ptr + unit_o.to(tl.int64) * stride_n + where,
                    mask=(t < taps)[None, :] & held[:, None],
                    other=0.0,
                )
                sum_o += tl.sum(g * theta.to(tl.float32), 1)
            value = tl.where(held[:, None], g * z_o * z_i[:, None], 0.0)
            target = dw_ptr + (unit_o.to(tl.int64) * K + unit_i.to(tl.int64)[:, None]) * taps + t[None, :]
            tl.store(target, value.to(dw_ptr.dtype.element_ty), mask=mask)
        if DZ_N:
            total = tl.sum(tl.where(held, sum_o * z_i, 0.0), 0)
            tl.store(dz_o_ptr + tl.program_id(1).to(tl.int64) * N + unit_o, total)
        if DZ_K:
            sum_i += tl.where(held, sum_o * z_o, 0.0)
    if DZ_K:
        tl.store(dz_i_ptr + tl.program_id(0).to(tl.int64) * K + unit_i, sum_i, mask=i < K)


# ---- sums over the rows, and channels selected


@triton.jit
def _channel_sums(
    ptr, count_ptr, partial_ptr, rows, C, stride_r, stride_c, share,
    HAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (programs of axis 1, C): sums of `share` rows each, of the open columns."""
    extent, n_open, _ = _extent(count_ptr, C, HAS)  # zeros lie up to the extent, and copies stay wide
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, rows)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if tl.program_id(0) * BLOCK_C < n_open:
        for row in range(first, last, BLOCK_R):
            r = row + tl.arange(0, BLOCK_R)
            at = ptr + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
            mask = (r < last)[:, None] & (c < extent)[None, :]
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + tl.program_id(1) * C + c, tl.sum(acc, 0), mask=c < C)


@triton.jit
def _finish_bias(
    partial_ptr,  # (parts, N), columns as dy's
    db_ptr,  # (N,) in the order of the units
    bias_ptr,
    dz_ptr,  # (N,) the bias' share of dz
    z_ptr,
    index_ptr,
    count_ptr,
    parts,
    N,
    HAS: tl.constexpr,
    MODE: tl.constexpr,
    DZ: tl.constexpr,
    NATURAL: tl.constexpr,  # dy holds every unit, in natural order
    BLOCK: tl.constexpr,
):
    _, n_open, plain = _extent(count_ptr, N, HAS)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit, held, z = c, c < N, tl.full((BLOCK,), 1.0, tl.float32)
    if HAS:
        if not NATURAL:
            held = c < n_open
            unit = tl.where(plain, c, tl.load(index_ptr + c, mask=c < N, other=0))
        z = _factor(z_ptr, unit, c < N, MODE)
        held = held & (z != 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + part * N + c, mask=held, other=0.0)
    db = tl.where(held, total * z, 0.0)
    tl.store(db_ptr + unit, db.to(db_ptr.dtype.element_ty), mask=c < N)
    if DZ:
        bias = tl.load(bias_ptr + unit, mask=held, other=0.0).to(tl.float32)
        tl.store(dz_ptr + unit, tl.where(held, total * bias, 0.0), mask=c < N)


@triton.jit
def _select(
    x_ptr, y_ptr, z_ptr, index_ptr, count_ptr, rows, C, stride_r, stride_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, p] = x[m, index[p]], zeros to the extent; plain: natural order, zeros where closed."""
    extent, n_open, plain = _extent(count_ptr, C, True)
    tiles_c = tl.cdiv(extent, BLOCK_C)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R) * tiles_c, tl.num_programs(0)):
        r = (tile // tiles_c * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        p = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = tl.where(plain, p, tl.load(index_ptr + p, mask=p < n_open, other=0))
        held = (p < n_open) & (tl.load(z_ptr + unit, mask=p < n_open, other=0.0) != 0.0)
        at = x_ptr + r[:, None] * stride_r + unit.to(tl.int64)[None, :] * stride_c
        value = tl.load(at, mask=(r < rows)[:, None] & held[None, :], other=0.0)
        tl.store(
            y_ptr + r[:, None] * C + p[None, :],
            value.to(y_ptr.dtype.element_ty),
            mask=(r < rows)[:, None] & (p < extent)[None, :],
        )


# ---- launchers


def as_rows(x: Tensor) -> Tensor:
    """The pixels of x (N, C, H, W) as rows (N H W, C): a view of channels_last memory, else a copy."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n * h * w, c)


def as_images(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    """The mirror of as_rows: (N, C, H, W), channels_last; no view to autograd, for users write into it."""
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2).data


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _output_shape(x_shape: torch.Size, weight_shape: torch.Size, conv: Conv) -> tuple[int, int]:
    stride, padding, dilation, _ = conv
    h, w = (
        output_size(x_shape[2 + d], weight_shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    return h, w


def _pointwise(weight_shape: torch.Size, conv: Conv) -> bool:
    stride, padding, _, groups = conv
    unit = list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1
    return unit and tuple(weight_shape[2:]) == (1, 1)


def _mode(gate: Gate | None, scale: bool) -> int:
    return 0 if gate is None else 1 if scale else 2


def choose(N: int, K: int, gated: bool, dtype: torch.dtype, capability: int) -> Config:
    """The tile of a product with N columns, K channels a tap (``gated``: how many the device decides)."""
    if dtype == torch.float32:
        fast = precision(dtype) == "tf32"
        block_k = 32 if fast and K > 16 else 16
        if not fast or capability < 90:
            return Config(64, 64, block_k, 2, 8, 3)
        return Config(128, 128, block_k, 3, 8, 3) if N > 64 else Config(128, 64, block_k, 2, 4, 3)
    # A chunk that straddles the open channels multiplies zeros: narrower ones where few are expected.
    block_k = 16 if K <= 16 else 32 if K <= 32 or K % 64 or (gated and K < 512) else 64
    stages = 4 if block_k < 64 or capability < 90 else 3
    if capability < 90:
        return Config(128, 128, 32 if K > 16 else 16, 3, 8, 3) if N > 64 else Config(64, 32, 16, 1, 4, 3)
    if N > 128 and capability < 100:
        return Config(128, 256, block_k, 3, 8, stages)
    if N > 64 and capability < 100:
        return Config(128, 128, block_k, 3, 8, stages)
    if N > 32:
        return Config(128 if capability < 100 else 64, 64, block_k, 2, 4, stages)
    return Config(128, 32, block_k, 1, 4, stages)


def choose_dw(N: int, K: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile of a weight gradient of N outputs and K inputs; BLOCK_K counts rows."""
    if dtype == torch.float32:
        return Config(64, 64, 32 if precision(dtype) == "tf32" else 16, 2, 4, 3)
    if capability < 90:
        return Config(64, 64, 32, 2, 4, 3)
    if K > 128 and N > 64 and capability < 100:
        return Config(128, 256, 32, 3, 8, 4)  # with 64 rows a step the addresses spill
    block_n, levels = (128, 3) if K > 64 else (64, 2)
    return Config(128, block_n, 64, levels, 8, 3) if N > 64 else Config(64, block_n, 64, levels, 4, 3)


CANDIDATES = (
    Config(128, 256, 64, 3, 8, 3),
    Config(128, 256, 64, 3, 8, 4),
    Config(128, 256, 32, 3, 8, 4),
    Config(128, 256, 32, 3, 8, 6),
    Config(128, 256, 64, 1, 8, 3),
    Config(256, 128, 64, 3, 8, 3),
    Config(256, 128, 32, 3, 8, 4),
    Config(128, 128, 64, 3, 8, 4),
    Config(128, 128, 64, 3, 4, 3, 2),
    Config(128, 128, 32, 3, 4, 4, 2),
    Config(128, 64, 64, 2, 4, 4, 2),
    Config(128, 64, 64, 1, 4, 4, 3),
    Config(256, 64, 64, 1, 8, 4),
)
"""Tiles worth timing for ``convolve`` on a Hopper GPU."""

DW_CANDIDATES = (
    Config(128, 256, 32, 3, 8, 4),
    Config(128, 256, 32, 3, 8, 5),
    Config(128, 256, 64, 3, 8, 3),
    Config(64, 256, 32, 3, 4, 4),
    Config(64, 256, 32, 3, 4, 3, 2),
    Config(128, 128, 64, 3, 8, 4),
    Config(128, 128, 32, 3, 8, 4, 2),
    Config(128, 128, 64, 2, 4, 3, 2),
    Config(128, 64, 64, 2, 4, 4, 2),
)
"""Tiles worth timing for ``weight_product``; LEVELS and BLOCK_N are those of the inputs."""


def _machine(t: Tensor, device: tuple[int, int] | None) -> tuple[int, int]:
    return device or _device(t.device.index if t.is_cuda else None)


def pack_weight(
    weight: Tensor,
    n_gate: Gate | None,
    k_gate: Gate | None,
    dtype: torch.dtype,
    *,
    mode_n: int = 0,
    mode_k: int = 0,
    transpose: bool = False,
    run: Callable[..., None] = launch,
) -> Tensor:
    """W (out, in, kh, kw) as (n', tap, k') in ``dtype``: n the outputs and k the inputs, or transposed.

    mode_n, mode_k: 1 multiplies by z, 2 by a one where the gate is open. Rows beyond the open ones are not
    written; beyond the open k there are zeros up to the next 128.
    """
    dims = (1, 0) if transpose else (0, 1)
    (N, K), (stride_n, stride_k) = ([f(d) for d in dims] for f in (weight.size, weight.stride))
    _, _, kh, kw = weight.shape
    cap_k = round_up(K, 64)
    out = torch.empty(N, kh * kw, cap_k, dtype=dtype, device=weight.device)
    if out.numel():
        z_n, index_n, count_n = n_gate or (None, None, None)
        z_k, index_k, count_k = k_gate or (None, None, None)
        run(
            _pack_weight,
            (cdiv(N, _PACK_N), cdiv(cap_k, _PACK_K)),
            weight, out, z_n, index_n, count_n, z_k, index_k, count_k,
            N, K, kh, kw, stride_n, stride_k, weight.stride(2), weight.stride(3), cap_k,
            HAS_N=n_gate is not None, HAS_K=k_gate is not None, MODE_N=mode_n, MODE_K=mode_k,
            BLOCK_N=_PACK_N, BLOCK_K=_PACK_K, num_warps=4,
        )  # fmt: skip
    return out


def convolve(
    x: Operand,
    weight: Tensor,
    y: Operand,
    x_size: tuple[int, int, int],
    y_size: tuple[int, int],
    kernel: tuple[int, int],
    channels: tuple[int, int],
    conv: Conv,
    *,
    n_gate: Gate | None = None,
    k_gate: Gate | None = None,
    bias: Tensor | None = None,
    mode_n: int = 0,
    transposed: bool = False,
    config: Config | None = None,
    device: tuple[int, int] | None = None,
    run: Callable[..., None] = launch,
) -> None:
    """The product of one convolution, written into ``y``; ``transposed``: of its gradient, x being dy.

    Args:
        x, y: pixels by channels, natural and/or packed: with both, natural where the gate is plain.
        weight: of pack_weight.
        x_size, y_size: (images, rows, columns) of x, (rows, columns) of y.
        channels: (N, K), of y and of x.
        mode_n: y is multiplied by z of n_gate (1), by a one where it is open (2).
        config, device, run: the tile, (capability, multiprocessors), who gets the launch, if not the usual.
    """
    first = next(t for t in x if t is not None)
    (images, h, w), (oh, ow), (N, K) = x_size, y_size, channels
    stride, padding, dilation, _ = conv
    capability, sms = _machine(first, device)
    config = config or choose(N, K, k_gate is not None, first.dtype, capability)
    phases = math.prod(stride) if transposed else 1
    steps = (s // math.gcd(s, d) if transposed else 1 for s, d in zip(stride, dilation, strict=True))
    grid_h, grid_w = (cdiv(oh, stride[0]), cdiv(ow, stride[1])) if transposed else (oh, ow)
    tiles = cdiv(images * grid_h * grid_w, config.BLOCK_M) * phases * (cdiv(N, config.BLOCK_N) + 1)
    if images * oh * ow * N == 0:
        return
    z, index, count = n_gate or (None, None, None)
    run(
        _conv,
        (min(tiles, sms * config.CTAS),),
        *x, weight, *y, z, index, count, k_gate and k_gate[2], bias,
        *(_stride(t) // _VEC for t in x), *map(_stride, y), weight.shape[2],
        N, K, images, h, w, oh, ow, *kernel, *stride, *padding, *dilation, *steps,
        HAS_N=n_gate is not None, HAS_K=k_gate is not None, X_FORM=_form(x), Y_FORM=_form(y),
        HAS_BIAS=bias is not None, MODE_N=mode_n, TRANSPOSED=transposed, EVEN_K=K % config.BLOCK_K == 0,
        VEC=_VEC, PRECISION=precision(first.dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, LEVELS=config.LEVELS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _is_operand(rows: Tensor) -> bool:
    """Whether a product reads these rows in pieces of 8 elements that hold nothing else."""
    pieces = rows.stride(1) == 1 and rows.stride(0) % _VEC == 0 and rows.shape[1] % _VEC == 0
    return pieces and address(rows) % 16 == 0


def _operand_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the products read them, in ``dtype``; a copy, padded with zeros, if they do not lie so."""
    if rows.dtype == dtype and _is_operand(rows):
        return rows
    out = torch.empty(rows.shape[0], round_up(rows.shape[1], _VEC), dtype=dtype, device=rows.device)
    return pack(rows, None, None, dtype, out=out)[:, : rows.shape[1]]


def _rows_operand(
    x: Tensor, gate: Gate | None, packed: bool, dtype: torch.dtype, buffer: Tensor | None = None
) -> Operand:
    """x for a product: as it lies where it is packed already or has no gate; else packed or natural.

    ``buffer`` is what an earlier call with the same arguments packed.
    """
    rows = as_rows(x)
    if gate is None or packed:
        return Operand(_operand_rows(rows, dtype))
    always = rows.dtype != dtype or not _is_operand(rows)
    if buffer is None:
        buffer = pack(rows, None, gate, dtype, skip_plain=not always)
    return Operand(None if always else rows, buffer)


def conv2d_saved_shapes(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    in_gated: bool,
    out_gated: bool,
    in_packed: bool,
    out_packed: bool,
    conv: Conv,
    dtype: torch.dtype,
) -> list[tuple[int, ...]]:
    """What backward takes over: the packed x and, for a 1x1 convolution, what the linear layer keeps."""
    if in_packed or not in_gated or conv[3] != 1:
        return []
    rows = x_shape[0] * x_shape[2] * x_shape[3]
    if _pointwise(weight_shape, conv) and not out_packed:
        flat = (torch.empty(rows, x_shape[1], device="meta"), torch.empty(weight_shape[:2], device="meta"))
        return [*linear_saved_shapes(*flat, in_gated, out_gated, dtype)]
    return [(rows, round_up(x_shape[1]))]


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    conv: Conv,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y = z_out * (conv2d(x * z_in, W) + b) (N, out, H', W') in ``dtype``, and what backward takes over.

    Args:
        x: (N, in, H, W); with ``in_packed`` its channels are those of in_gate, packed: [0, open) the open
            ones, zeros to the extent, natural where the gate is plain. channels_last is read as it lies.
        in_gate, out_gate: [z, index, count] or None.
        scale_in, scale_out: False: the gate only selects.
        out_packed: y comes packed as out_gate says; else dense, zeros where closed. channels_last memory.
        conv: stride, padding, dilation, groups.
    """
    n_out, (n, n_in, h, w) = weight.shape[0], x.shape
    oh, ow = _output_shape(x.shape, weight.shape, conv)
    if conv[3] != 1:
        y = conv2d_groups.forward(
            as_rows(x), weight, bias, in_gate, out_gate, scale_in, scale_out, in_packed, out_packed,
            (n, h, w), (oh, ow), conv, dtype,
        )  # fmt: skip
        return as_images(y, n, oh, ow), []
    out_packed = out_packed and out_gate is not None
    if _pointwise(weight.shape, conv):
        y, saved = _pointwise_forward(
            x, weight.flatten(1), bias, support(in_gate, scale_in), out_gate, scale_out, in_packed,
            out_packed, dtype,
        )  # fmt: skip
        return as_images(y, n, oh, ow), saved
    inputs = _rows_operand(x, in_gate, in_packed, dtype)
    packed_weight = pack_weight(weight, out_gate, in_gate, dtype, mode_k=_mode(in_gate, scale_in))
    y = torch.empty(n * oh * ow, n_out, dtype=dtype, device=x.device)
    buffer = None
    if out_gate is not None and not out_packed:
        buffer = torch.empty(n * oh * ow, round_up(n_out), dtype=dtype, device=x.device)
    convolve(
        inputs, packed_weight, Operand(y, buffer), (n, h, w), (oh, ow), _kernel(weight), (n_out, n_in), conv,
        n_gate=out_gate, k_gate=in_gate, bias=bias, mode_n=_mode(out_gate, scale_out),
    )  # fmt: skip
    if buffer is not None:
        unpack(buffer, (y.shape[0], n_out), None, out_gate, dtype, out=y, skip_plain=True)
    saved = [inputs.packed] if inputs.packed is not None else []
    return as_images(y, n, oh, ow), saved


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _pointwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """The layer over pixels; a packed side lies where the product reads or writes it."""
    rows = as_rows(x)
    if not in_packed and not out_packed:
        return linear_forward(rows, weight, bias, in_gate, out_gate, scale_out, dtype)
    N, K = weight.shape
    out_gate = support(out_gate, scale_out)
    a = _rows_operand(x, in_gate, in_packed, dtype)
    b = operand(weight, out_gate, in_gate, dtype, scale_cols=in_gate is not None)
    y = torch.empty(rows.shape[0], N, dtype=dtype, device=x.device)
    buffer = None
    if out_gate is not None and not out_packed:
        buffer = torch.empty(rows.shape[0], round_up(N), dtype=dtype, device=x.device)
    matmul(
        "nt", a, b, Operand(y, buffer), rows.shape[0], N, K, n_gate=out_gate, k_gate=in_gate, bias=bias,
        scale_n=out_gate is not None,
    )  # fmt: skip
    if buffer is not None:
        unpack(buffer, (y.shape[0], N), None, out_gate, dtype, out=y, skip_plain=True)
    return y, [a.packed] if a.packed is not None and in_gate is not None else []


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    saved: list[Tensor],
    scale_in: bool,
    scale_out: bool,
    in_packed: bool,
    out_packed: bool,
    full_in: bool,
    full_out: bool,
    conv: Conv,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where ``needs`` says so; with ``dist`` dlog_alpha, not dz.

    dx comes packed as x came and dy as y went, in channels_last memory; what is closed is zero in dweight,
    dbias and a dense dx. dz is exactly 0 where z is not fractional, unless ``full_in``, ``full_out``.
    """
    (n, _, h, w), (oh, ow) = x.shape, dy.shape[2:]
    out_packed = out_packed and out_gate is not None
    need_x, need_w, need_b, need_in, need_out = needs
    need_in, need_out = need_in and in_gate is not None, need_out and out_gate is not None
    if _pointwise(weight.shape, conv) and not in_packed and not out_packed:
        flat = weight.flatten(1)
        dx, dw, *rest = linear_backward(
            as_rows(dy), as_rows(x), flat, bias, support(in_gate, scale_in), out_gate, saved, scale_out,
            full_in, full_out, dtype, [*needs[:3], need_in, need_out], dist,
        )  # fmt: skip
        return [
            None if dx is None else as_images(dx, n, h, w),
            None if dw is None else dw.view(weight.shape),
            *rest,
        ]
    db = share = None
    if bias is not None and (need_b or need_out):
        dy_gate = out_gate if out_packed else None
        db, share = bias_grads(as_rows(dy), bias, out_gate, dy_gate, _mode(out_gate, scale_out), need_out)
        db = db if need_b else None
    if not weight.numel():  # no inputs or no outputs
        dx = torch.zeros_like(x, memory_format=torch.channels_last) if need_x else None
        dz_in = torch.zeros_like(in_gate[0]) if need_in and in_gate is not None else None
        dz_out = None
        if need_out and out_gate is not None:
            sums = torch.zeros_like(out_gate[0]) if share is None else share
            dz_out = conv2d_groups._masked(sums, out_gate[0], full_out, dist)
        return [dx, torch.zeros_like(weight) if need_w else None, db, dz_in, dz_out]
    settings = (in_gate, out_gate, scale_in, scale_out, full_in, full_out)
    wants = (need_x, need_w, need_in, need_out)
    if conv[3] != 1:
        dx, dw, dz_in, dz_out = conv2d_groups.backward(
            as_rows(dy), as_rows(x), weight, share, in_gate, out_gate, scale_in, scale_out, in_packed,
            out_packed, full_in, full_out, (n, h, w), (oh, ow), conv, wants, dist,
        )  # fmt: skip
        return [None if dx is None else as_images(dx, n, h, w), dw, db, dz_in, dz_out]
    grad = _rows_operand(dy, out_gate, out_packed, dtype)
    inputs = Operand(None)
    if need_w or need_in or need_out:
        inputs = _rows_operand(x, in_gate, in_packed, dtype, saved[0] if saved else None)
    if _pointwise(weight.shape, conv):
        dx, dw, dz_in, dz_out = _pointwise_backward(
            grad, inputs, weight.flatten(1), share, *settings, in_packed, x.dtype, wants, n * h * w, dist
        )
        dw = None if dw is None else dw.view(weight.shape)
    else:
        dx, dw, dz_in, dz_out = _conv_backward(
            grad, inputs, weight, share, *settings, in_packed, x.dtype, wants, (n, h, w), (oh, ow), conv, dist
        )
    return [None if dx is None else as_images(dx, n, h, w), dw, db, dz_in, dz_out]


def _conv_backward(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    share: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    in_packed: bool,
    x_dtype: torch.dtype,
    wants: tuple[bool, bool, bool, bool],
    x_size: tuple[int, int, int],
    y_size: tuple[int, int],
    conv: Conv,
    dist: HardConcrete | None,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dz_in, dz_out; ``share``: what the bias adds to dz_out."""
    need_x, need_w, need_in, need_out = wants
    first = next(t for t in grad if t is not None)
    n_out, n_in = weight.shape[:2]
    modes = _mode(out_gate, scale_out), _mode(in_gate, scale_in)
    (n, h, w), kernel = x_size, _kernel(weight)
    dx = dw = dz_in = dz_out = None
    if need_x:
        turned = pack_weight(
            weight, in_gate, out_gate, first.dtype, mode_n=modes[1], mode_k=modes[0], transpose=True
        )
        dx = torch.empty(n * h * w, n_in, dtype=x_dtype, device=weight.device)
        buffer = None
        if in_gate is not None and not in_packed:
            buffer = torch.empty(n * h * w, round_up(n_in), dtype=x_dtype, device=weight.device)
        convolve(
            grad, turned, Operand(dx, buffer), (n, *y_size), (h, w), kernel, (n_in, n_out), conv,
            n_gate=in_gate, k_gate=out_gate, transposed=True,
        )  # fmt: skip
        if buffer is not None:
            unpack(buffer, (n * h * w, n_in), None, in_gate, x_dtype, out=dx, skip_plain=True)
    if need_w or need_in or need_out:
        dw, parts_o, parts_i = weight_product(
            grad, inputs, weight, x_size, y_size, conv, o_gate=out_gate, i_gate=in_gate, modes=modes,
            dz_o=need_out, dz_i=need_in, share=share,
        )  # fmt: skip
        if parts_o is not None and out_gate is not None:
            dz_out = _gate_total(parts_o, out_gate, full_out, dist)
        if parts_i is not None and in_gate is not None:
            dz_in = _gate_total(parts_i, in_gate, full_in, dist)
    return dx, dw if need_w else None, dz_in, dz_out


def _gate_total(partial: Tensor, gate: Gate, full: bool, dist: HardConcrete | None) -> Tensor:
    """The gradient of a gate from its partial sums (P, units)."""
    out = torch.empty(partial.shape[1], dtype=torch.float32, device=partial.device)
    _launch_reduce(partial, None, out, None, gate, False, True, full, dist)
    return out


def _pointwise_backward(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    share: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_in: bool,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    in_packed: bool,
    x_dtype: torch.dtype,
    wants: tuple[bool, bool, bool, bool],
    rows: int,
    dist: HardConcrete | None,
) -> tuple[Tensor | None, ...]:
    """_conv_backward of a 1x1 convolution with a packed side: the products of linear.py."""
    need_x, need_w, need_in, need_out = wants
    dtype = next(t for t in grad if t is not None).dtype
    N, K = weight.shape
    in_gate, out_gate = support(in_gate, scale_in), support(out_gate, scale_out)
    dx = dw = dz_in = dz_out = None
    if need_x:
        w = operand(
            weight, out_gate, in_gate, dtype, scale_rows=out_gate is not None, scale_cols=in_gate is not None
        )
        if in_packed:
            dx = torch.empty(rows, K, dtype=x_dtype, device=weight.device)
            matmul("nn", grad, w, Operand(dx), rows, K, N, n_gate=in_gate, k_gate=out_gate)
        else:
            dx = input_grad(grad, w, (rows, K, N), in_gate, out_gate, x_dtype)
    if need_w or need_in or need_out:
        dw, dz_out, dz_in = weight_grad(
            grad, inputs, (N, K, rows), out_gate, in_gate, weight.dtype,
            weight if need_out or need_in else None, full_out, full_in, need_out, need_in,
            None if share is not None else dist,
        )  # fmt: skip
    if share is not None and dz_out is not None and out_gate is not None:
        z = out_gate[0]
        dz_out += torch.where(z != 0 if full_out else (z > 0) & (z < 1), share, 0.0)
        if dist is not None:
            dz_out = gate_grad(dz_out, z, dist)
            if dz_in is not None and in_gate is not None:
                dz_in = gate_grad(dz_in, in_gate[0], dist)
    return dx, dw if need_w else None, dz_in, dz_out


def weight_product(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    x_size: tuple[int, int, int],
    y_size: tuple[int, int],
    conv: Conv,
    *,
    o_gate: Gate | None = None,
    i_gate: Gate | None = None,
    modes: tuple[int, int] = (0, 0),
    dz_o: bool = False,
    dz_i: bool = False,
    share: Tensor | None = None,
    config: Config | None = None,
    device: tuple[int, int] | None = None,
    run: Callable[..., None] = launch,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW of a convolution, zero where closed, and partial sums (P, units) of <W, dW / z> for the gates.

    Args:
        grad, inputs: dy and x, pixels by channels, natural and/or packed.
        weight: W, for its shape, dtype and the gates' sums.
        modes: of the gates of the outputs and inputs, as in pack_weight.
        dz_o, dz_i: whether the sums are wanted; ``share`` (out,) fp32, if any, is one more row of the first.
    """
    first = next(t for t in grad if t is not None)
    (N, K, kh, kw), (images, h, w), (oh, ow) = weight.shape, x_size, y_size
    stride, padding, dilation, _ = conv
    capability, sms = _machine(first, device)
    config = config or choose_dw(N, K, first.dtype, capability)
    programs, rows = sms * config.CTAS, images * oh * ow
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tiles = kh * kw * cdiv(N, config.BLOCK_M) * cdiv(K, config.BLOCK_N)
    area = kh * kw * round_up(N, config.BLOCK_M) * round_up(K, config.BLOCK_N)
    capacity = area * min(cdiv(2 * programs, tiles), _MAX_SPLITS)
    partial = torch.empty(capacity, dtype=torch.float32, device=weight.device)
    z_o, index_o, count_o = o_gate or (None, None, None)
    z_i, index_i, count_i = i_gate or (None, None, None)
    shape = {"MAX_SPLITS": _MAX_SPLITS, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    has = {"HAS_N": o_gate is not None, "HAS_K": i_gate is not None}
    run(
        _conv_dw,
        (programs,),
        *grad, *inputs, partial, count_o, count_i,
        *(_stride(t) // _VEC for t in (*grad, *inputs)),
        N, K, images, h, w, oh, ow, kh, kw, *stride, *padding, *dilation, programs, capacity,
        **has, DY_FORM=_form(grad), X_FORM=_form(inputs),
        EVEN_O=N % config.BLOCK_M == 0, EVEN_I=K % config.BLOCK_N == 0, VEC=_VEC,
        MAX_SPLITS=_MAX_SPLITS, PRECISION=precision(first.dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, LEVELS=config.LEVELS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    block_t = min(triton.next_power_of_2(kh * kw), 16)
    block_i = 1024 // block_t
    blocks_o, blocks_i = cdiv(N, _REDUCE_OUT), cdiv(K, block_i)
    parts_o = partial.new_empty(blocks_i + (share is not None), N) if dz_o else None
    parts_i = partial.new_empty(blocks_o, K) if dz_i else None
    run(
        _finish_dw,
        (blocks_o, blocks_i),
        partial, dw, weight, parts_o, parts_i, z_o, index_o, count_o, z_i, index_i, count_i,
        N, K, rows, kh, kw, *weight.stride(), programs, capacity,
        **has, MODE_N=modes[0], MODE_K=modes[1], DZ_N=dz_o, DZ_K=dz_i, **shape, LEVELS=config.LEVELS,
        BLOCK_O=_REDUCE_OUT, BLOCK_I=block_i, BLOCK_T=block_t, num_warps=4,
    )  # fmt: skip
    if parts_o is not None and share is not None:
        parts_o[-1] = share
    return dw, parts_o, parts_i


def bias_grads(
    dy: Tensor,
    bias: Tensor,
    gate: Gate | None,
    dy_gate: Gate | None,
    mode: int,
    dz: bool,
    run: Callable[..., None] = launch,
) -> tuple[Tensor, Tensor | None]:
    """db (out,) = z * sums of the rows of dy and, with ``dz``, sums * bias in fp32; zero where closed.

    ``gate`` is that of the outputs; ``dy_gate`` the same where the columns of dy are packed by it, else None.
    """
    rows, N = dy.shape
    db = torch.empty(N, dtype=bias.dtype, device=dy.device)
    share = torch.empty(N, dtype=torch.float32, device=dy.device) if dz else None
    if not N:
        return db, share
    blocks = cdiv(N, _SUM_COLS)
    parts = max(1, min(cdiv(2 * _machine(dy, None)[1], blocks), cdiv(rows, 256)))
    partial = torch.empty(parts, N, dtype=torch.float32, device=dy.device)
    z, index, count = gate or (None, None, None)
    run(
        _channel_sums, (blocks, parts), dy, dy_gate and dy_gate[2], partial, rows, N, *dy.stride(),
        cdiv(rows, parts), HAS=dy_gate is not None, BLOCK_R=_SUM_ROWS, BLOCK_C=_SUM_COLS,
    )  # fmt: skip
    run(
        _finish_bias, (blocks,), partial, db, bias, share, z, index, count, parts, N,
        HAS=gate is not None, MODE=mode, DZ=dz, NATURAL=dy_gate is None, BLOCK=_SUM_COLS,
    )  # fmt: skip
    return db, share


def pack_channels(x: Tensor, gate: Gate, dtype: torch.dtype, run: Callable[..., None] = launch) -> Tensor:
    """The open channels of x (N, C, H, W) first, in ``dtype`` and channels_last memory, unscaled.

    Channels [0, open) in ascending order, zeros to the extent, beyond it nothing is written; where the gate
    is plain natural order, closed channels zero.
    """
    n, c, h, w = x.shape
    rows = as_rows(x)
    out = torch.empty(n * h * w, c, dtype=dtype, device=x.device)
    tiles = cdiv(rows.shape[0], _SELECT_ROWS) * cdiv(c, _SELECT_COLS)
    if tiles:
        run(
            _select,
            (min(tiles, _programs(x.device)),),
            rows, out, *gate, *rows.shape, *rows.stride(), BLOCK_R=_SELECT_ROWS, BLOCK_C=_SELECT_COLS,
        )  # fmt: skip
    return as_images(out, n, h, w)


def unpack_channels(data: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """The mirror of pack_channels: every channel in its place, zeros where closed."""
    n, c, h, w = data.shape
    rows = as_rows(data)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out, _, _ = unpack(rows, (n * h * w, c), None, gate, dtype)
    return as_images(out, n, h, w)


def variants() -> Iterator[Variant]:
    """A wide layer, gated and packed, in every dtype; narrow ones, strided ones, and odd channels."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    x = torch.empty(2, 320, 16, 16, dtype=bf16, device="meta", memory_format=torch.channels_last)
    bias, index, count = (torch.empty(k, device="meta") for k in (320, 384, 2))
    gate = [bias, index.int(), count.int()]
    found: list[Variant] = []
    bias_grads(as_rows(x), bias, gate, gate, 1, True, recorder(found, "conv2d/bf16"))
    pack_channels(x, gate, bf16, recorder(found, "conv2d/bf16"))
    yield from found
    before = torch.get_float32_matmul_precision()
    for name, dtype, n_in, n_out, stride, form, archs, wanted in (
        ("wide_bf16", bf16, 640, 640, 1, 1, (80, 90, 100), "high"),
        ("mid_bf16", bf16, 320, 320, 1, 2, (90,), "high"),
        ("dense_bf16", bf16, 320, 160, 2, 0, (90,), "high"),
        ("narrow_fp16", fp16, 64, 64, 1, 0, (90, 100), "high"),
        ("odd_bf16", bf16, 24, 20, 1, 2, (80, 90), "high"),
        ("tf32", fp32, 320, 320, 1, 1, (90,), "high"),
        ("ieee", fp32, 320, 320, 1, 2, (90,), "highest"),
    ):
        torch.set_float32_matmul_precision(wanted)
        try:
            for arch in archs:
                suffix = "" if arch == 90 else f"_sm{arch}"
                yield from _listed(f"conv2d/{name}{suffix}", dtype, (n_in, n_out), stride, form, arch)
        finally:
            torch.set_float32_matmul_precision(before)


def _listed(
    name: str, dtype: torch.dtype, channels: tuple[int, int], stride: int, form: int, arch: int
) -> Iterator[Variant]:
    """What one layer launches on such a GPU; form 0 has no gates, 1 packed sides, 2 dense ones."""
    found: list[Variant] = []
    n_in, n_out = channels

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def gate(n: int) -> Gate | None:
        if not form:
            return None
        return [new(n, dtype=torch.float32), new(round_up(n), dtype=torch.int32), new(2, dtype=torch.int32)]

    def side(n: int) -> Operand:
        rows = new(512, round_up(n, _VEC))[:, :n]
        return Operand(rows, new(512, round_up(n))) if form == 2 else Operand(rows)

    products = frozenset({"wide_copy", "tensor_core"} if precision(dtype) == "tf32" else {"wide_copy"})
    # wgmma turns no 32-bit operand around: dW's are copied in pieces of 4 bytes.
    of_dw = products - {"wide_copy"} if dtype == torch.float32 else products
    expects = {"_conv": products, "_conv_dw": of_dw}
    for prefix, transposed in (("", False), ("dx_", True)):
        K, N = channels[::-1] if transposed else channels
        mode = int(form > 0)
        run = recorder(found, name.replace("/", f"/{prefix}"), expects, (arch,))
        options: dict[str, Any] = {"mode_n": mode if transposed else 0, "mode_k": mode}
        weight, n_gate, k_gate = new(n_out, n_in, 3, 3), gate(N), gate(K)
        packed = pack_weight(weight, n_gate, k_gate, dtype, **options, transpose=transposed, run=run)
        pixels: dict[str, Any] = {"x_size": (2, 16, 16), "y_size": (16 // stride, 16 // stride)}
        if transposed:
            pixels = {"x_size": (2, 16 // stride, 16 // stride), "y_size": (16, 16)}
        convolve(
            side(K), packed, side(N), **pixels, kernel=(3, 3), channels=(N, K),
            conv=([stride] * 2, [1, 1], [1, 1], 1), n_gate=n_gate, k_gate=k_gate,
            bias=None if transposed else new(N), mode_n=0 if transposed else mode, transposed=transposed,
            device=(arch, 132), run=run,
        )  # fmt: skip
    weight_product(
        side(n_out), side(n_in), new(n_out, n_in, 3, 3), (2, 16, 16), (16 // stride, 16 // stride),
        ([stride] * 2, [1, 1], [1, 1], 1), o_gate=gate(n_out), i_gate=gate(n_in), modes=(int(form > 0),) * 2,
        dz_o=form > 0, dz_i=form > 0, device=(arch, 132), run=recorder(found, name, expects, (arch,)),
    )  # fmt: skip
    yield from found
