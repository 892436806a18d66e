"""The gradient of gated_conv2d's weight: sums over rows in shares that a second kernel adds, in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Gate
from l0kernels._gates import round_up

from ._launch import cdiv, gpu, launch
from .conv2d_product import _column, _columns, _factor
from .conv2d_tiles import _ANY, _VEC, Config, Window, choose_dw
from .matmul import Operand, _extent, _form, _pick, _stride, precision

_REDUCE_OUT = 8
_MAX_SPLITS = 16


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
    dy_ptr = _pick(dy_full_ptr, dy_packed_ptr, o_plain, DY_FORM)
    stride_dy = _pick(stride_dy_full, stride_dy_packed, o_plain, DY_FORM)
    x_ptr = _pick(x_full_ptr, x_packed_ptr, i_plain, X_FORM)
    stride_x = _pick(stride_x_full, stride_x_packed, i_plain, X_FORM)
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


def weight_product(
    grad: Operand,
    inputs: Operand,
    weight: Tensor,
    window: Window,
    *,
    o_gate: Gate | None = None,
    i_gate: Gate | None = None,
    modes: tuple[int, int] = (0, 0),
    dz_o: bool = False,
    dz_i: bool = False,
    share: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW of a convolution, zero where closed, and partial sums (P, units) of <W, dW / z> for the gates.

    Args:
        grad, inputs: dy and x, pixels by channels, natural and/or packed.
        weight: W, for its shape, dtype and the gates' sums.
        modes: of the gates of the outputs and inputs, as in pack_weight.
        dz_o, dz_i: whether the sums are wanted; ``share`` (out,) fp32, if any, is one more row of the first.
    """
    first = grad.given
    N, K, kh, kw = weight.shape
    capability, sms = gpu(first.device.index)
    config = config or choose_dw(N, K, first.dtype, capability)
    programs, rows = sms * config.CTAS, window.rows
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tiles = kh * kw * cdiv(N, config.BLOCK_M) * cdiv(K, config.BLOCK_N)
    area = kh * kw * round_up(N, config.BLOCK_M) * round_up(K, config.BLOCK_N)
    capacity = area * min(cdiv(2 * programs, tiles), _MAX_SPLITS)
    partial = torch.empty(capacity, dtype=torch.float32, device=weight.device)
    z_o, index_o, count_o = o_gate or (None, None, None)
    z_i, index_i, count_i = i_gate or (None, None, None)
    shape = {"MAX_SPLITS": _MAX_SPLITS, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    has = {"HAS_N": o_gate is not None, "HAS_K": i_gate is not None}
    launch(
        _conv_dw,
        (programs,),
        *grad, *inputs, partial, count_o, count_i,
        *(_stride(t) // _VEC for t in (*grad, *inputs)),
        N, K, *window, programs, capacity,
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
    launch(
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
