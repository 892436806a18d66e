"""Gates per weight, drawn again wherever they are needed, and products that skip closed blocks of weights.

A line is a row or a column of blocks. The products walk over a line's open blocks packed together: position k
of the packed dimension is in block list[k // B_K], so that narrow blocks share a tile. Nothing of a closed
block is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from .hard_concrete import gate_slope, gate_value, uniform
from .matmul import precision as precision_of
from .sample import order

if TYPE_CHECKING:
    from l0kernels._gates import HardConcrete

_BLOCK = 1024  # of elementwise kernels
_LINE = 512
_TILE = 2048  # of the scaled weight
_WIDTH = 32
_BLOCKS = 64
_GROUP_M = 8
_FEW_TILES = 264  # two for each multiprocessor of an H200


@triton.jit
def _masked_weight_kernel(
    weight_ptr, log_alpha_ptr, seed_ptr, out_ptr, n, inv_beta, gamma, zeta, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    u = uniform(tl.load(seed_ptr), offs, tl.program_id(0) * 0, tl.program_id(0) * 0)
    z = gate_value(tl.load(log_alpha_ptr + offs, mask=mask, other=0.0), u, inv_beta, gamma, zeta)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, weight * z, mask=mask)


@triton.jit
def _masked_weight_grad_kernel(
    grad_ptr,
    weight_ptr,
    log_alpha_ptr,
    seed_ptr,
    dw_ptr,
    dlog_alpha_ptr,
    n,
    inv_beta,
    gamma,
    zeta,
    NEED_W: tl.constexpr,
    NEED_LOG_ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    u = uniform(tl.load(seed_ptr), offs, tl.program_id(0) * 0, tl.program_id(0) * 0)
    z = gate_value(tl.load(log_alpha_ptr + offs, mask=mask, other=0.0), u, inv_beta, gamma, zeta)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if NEED_W:
        tl.store(dw_ptr + offs, grad * z, mask=mask)
    if NEED_LOG_ALPHA:
        dz = grad * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        slope = gate_slope(z, inv_beta, gamma, zeta)
        tl.store(dlog_alpha_ptr + offs, tl.where((z > 0.0) & (z < 1.0), dz * slope, 0.0), mask=mask)


@triton.jit
def _list_line(z_ptr, stride, n, list_ptr, LINE: tl.constexpr):
    """list = [open count, the open blocks ascending, the closed ones ascending]."""
    n_open = n * 0
    for start in range(0, n, LINE):
        offs = start + tl.arange(0, LINE)
        z = tl.load(z_ptr + offs.to(tl.int64) * stride, mask=offs < n, other=0.0)
        n_open += tl.sum((z != 0.0).to(tl.int32), 0)
    tl.store(list_ptr, n_open)
    before = n * 0
    for start in range(0, n, LINE):
        offs = start + tl.arange(0, LINE)
        z = tl.load(z_ptr + offs.to(tl.int64) * stride, mask=offs < n, other=0.0)
        order(list_ptr + 1, offs, offs < n, z != 0.0, before, n_open)
        before += tl.sum((z != 0.0).to(tl.int32), 0)


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _prepare_kernel(
    z_ptr,  # (n_rows, n_cols): a gate per block
    rows_ptr,  # (n_rows, 1 + n_cols) int32, the lists of the rows of blocks
    cols_ptr,  # (n_cols, 1 + n_rows) int32, of the columns
    weight_ptr,  # (N, K)
    scaled_ptr,  # (N, stride): weight * z where the gate is open
    n_rows,
    n_cols,
    N,
    K,
    stride,
    B_N: tl.constexpr,
    B_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LINE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program a list, then one a tile of the scaled weight."""
    pid = tl.program_id(0)
    row_lists = n_rows if ROWS else 0
    lists = row_lists + n_cols if COLS else row_lists
    if pid < row_lists:
        _list_line(
            z_ptr + pid.to(tl.int64) * n_cols, 1, n_cols, rows_ptr + pid.to(tl.int64) * (n_cols + 1), LINE
        )
    elif pid < lists:
        col = (pid - row_lists).to(tl.int64)
        _list_line(z_ptr + col, n_cols, n_rows, cols_ptr + col * (n_rows + 1), LINE)
    else:
        tiles_k = tl.cdiv(K, TILE_K)
        tile = pid - lists
        offs_n = (tile // tiles_k * TILE_N + tl.arange(0, TILE_N))[:, None]
        offs_k = (tile % tiles_k * TILE_K + tl.arange(0, TILE_K))[None, :]
        mask = (offs_n < N) & (offs_k < K)
        z = tl.load(z_ptr + (offs_n // B_N).to(tl.int64) * n_cols + offs_k // B_K, mask=mask, other=0.0)
        is_open = mask & tl.max_constancy(z != 0.0, [1, ALIGN_K])
        row = offs_n.to(tl.int64)
        weight = tl.load(weight_ptr + row * K + offs_k, mask=is_open, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row * stride + offs_k, weight * z, mask=is_open)


@triton.jit
def _packed_columns(
    list_ptr, first, limit, n_blocks, B_K: tl.constexpr, ALIGN_K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Columns at packed positions first ...; beyond ``limit`` a column that does not exist."""
    if B_K % BLOCK_K == 0:
        block = tl.load(list_ptr + first // B_K, mask=first < limit, other=n_blocks)
        offs_k = block * B_K + first % B_K + tl.arange(0, BLOCK_K)
        return tl.max_contiguous(tl.multiple_of(offs_k, BLOCK_K), BLOCK_K)
    else:
        packed = first + tl.arange(0, BLOCK_K)
        block = tl.load(list_ptr + packed // B_K, mask=packed < limit, other=n_blocks)
        offs_k = block * B_K + packed % B_K
        return tl.max_contiguous(tl.multiple_of(offs_k, ALIGN_K), ALIGN_K)


@triton.jit(do_not_specialize=["M", "n_lines", "n_blocks"])
def _product_kernel(
    a_ptr,  # (M, K)
    w_ptr,  # (N, K) by strides
    bias_ptr,  # (N,)
    out_ptr,  # (M, N)
    list_ptr,  # (n_lines, 1 + n_blocks) int32
    M,
    N,
    K,
    stride_am,
    stride_wn,
    stride_wk,
    n_lines,  # lines of B_N outputs
    n_blocks,  # blocks of B_K in a line
    B_N: tl.constexpr,
    B_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = a w^T + bias over the open blocks of each line."""
    pid = tl.program_id(0)
    tiles: tl.constexpr = (B_N + BLOCK_N - 1) // BLOCK_N
    grid_m = tl.cdiv(M, BLOCK_M)
    group = pid // (GROUP_M * n_lines * tiles)
    group_m = min(grid_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + pid % (GROUP_M * n_lines * tiles) % group_m
    pid_n = pid % (GROUP_M * n_lines * tiles) // group_m
    line = pid_n // tiles

    in_block = pid_n % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = line * B_N + in_block
    mask_n = (in_block < B_N) & (offs_n < N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    a_row_ptr = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am
    w_row_ptr = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn
    list_ptr += line.to(tl.int64) * (n_blocks + 1)
    limit = tl.load(list_ptr) * B_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, limit, BLOCK_K):
        offs_k = _packed_columns(list_ptr + 1, first, limit, n_blocks, B_K, ALIGN_K, BLOCK_K)
        mask_k = offs_k < K
        a = tl.load(a_row_ptr + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(
            w_row_ptr + offs_k.to(tl.int64)[:, None] * stride_wk,
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "n_blocks"])
def _weight_grad_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    z_ptr,  # (rows of blocks, n_blocks)
    dw_ptr,  # (N, K)
    sums_ptr,  # (rows of blocks * tiles, K): <theta, raw> of each column within a tile
    list_ptr,  # (rows of blocks, 1 + n_blocks) int32
    M,
    N,
    K,
    stride_dym,
    stride_xm,
    n_blocks,
    B_N: tl.constexpr,
    B_K: tl.constexpr,
    ALIGN_K: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw = z * (dy^T x) of open blocks, 0 of closed ones."""
    tiles: tl.constexpr = (B_N + BLOCK_N - 1) // BLOCK_N
    tiles_k = tl.cdiv(n_blocks * B_K, BLOCK_K)
    pid_n = tl.program_id(0) // tiles_k
    first = tl.program_id(0) % tiles_k * BLOCK_K
    line = (pid_n // tiles).to(tl.int64)
    list_ptr += line * (n_blocks + 1)
    limit = tl.load(list_ptr) * B_K

    in_block = pid_n % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = pid_n // tiles * B_N + in_block
    mask_n = (in_block < B_N) & (offs_n < N)
    offs_k = _packed_columns(list_ptr + 1, first, n_blocks * B_K, n_blocks, B_K, ALIGN_K, BLOCK_K)
    mask_k = offs_k < K
    is_open = (first + tl.arange(0, BLOCK_K) < limit) & mask_k

    # (K, N): narrow rows of blocks leave N small, and a tensor core wants 64 rows.
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    rows = tl.where(first < limit, M, 0)
    for m in range(0, rows, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        row = offs_m.to(tl.int64)[:, None]
        mask_m = (offs_m < M)[:, None]
        x = tl.load(x_ptr + row * stride_xm + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0)
        dy = tl.load(dy_ptr + row * stride_dym + offs_n[None, :], mask=mask_m & mask_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)

    offs = offs_n.to(tl.int64)[None, :] * K + offs_k[:, None]
    mask = mask_k[:, None] & mask_n[None, :]
    if NEED_W:
        z = tl.load(z_ptr + line * n_blocks + offs_k // B_K, mask=is_open, other=0.0)
        # Not acc * 0: a NaN must not get into a closed block.
        tl.store(dw_ptr + offs, tl.where(is_open[:, None], acc * z[:, None], 0.0), mask=mask)
    if NEED_Z:
        weight = tl.load(weight_ptr + offs, mask=mask & is_open[:, None], other=0.0).to(tl.float32)
        total = tl.sum(tl.where(mask, acc * weight, 0.0), 1)
        tl.store(sums_ptr + pid_n.to(tl.int64) * K + offs_k, total, mask=is_open)


@triton.jit(do_not_specialize=["n_blocks", "tiles"])
def _block_sum_kernel(
    sums_ptr,  # (lines * tiles, K)
    z_ptr,  # (lines, n_blocks)
    dz_ptr,  # (lines, n_blocks)
    K,
    n_blocks,
    tiles,
    B_K: tl.constexpr,
    FULL: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dz of each block from the sums of its columns; 0 where not fractional, or, if FULL, not open."""
    programs = tl.cdiv(n_blocks, BLOCKS)
    line = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < n_blocks
    z = tl.load(z_ptr + line * n_blocks + block, mask=mask, other=0.0)
    wanted = (z != 0.0) & mask if FULL else (z > 0.0) & (z < 1.0) & mask
    total = tl.zeros((BLOCKS,), tl.float32)
    for tile in range(tiles):
        for first in range(0, B_K, WIDTH):
            in_block = first + tl.arange(0, WIDTH)[None, :]
            offs = block[:, None] * B_K + in_block
            valid = wanted[:, None] & (in_block < B_K) & (offs < K)
            total += tl.sum(tl.load(sums_ptr + (line * tiles + tile) * K + offs, mask=valid, other=0.0), 1)
    tl.store(dz_ptr + line * n_blocks + block, tl.where(wanted, total, 0.0), mask=mask)


class _Config(NamedTuple):
    """Tile extents along M, the lines and the packed dimension, and launch options."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _tile(size: int, most: int) -> int:
    """The tile of lines of ``size``: little padding, but narrow tiles cost, too."""
    tiles = [t for t in (128, 64, 32, 16) if t <= most]
    return min(tiles, key=lambda t: -(-size // t) * t * (16 + t) / t)


def _product_config(itemsize: int, precision: str, m: int, b_n: int) -> _Config:
    if precision == "ieee":  # without tensor cores: what fits the registers
        return _Config(64 if m > 16 else 16, _tile(b_n, 64), 16, 4, 2)
    block_m = 128 if m > 64 else 64 if m > 16 else 16
    block_n = _tile(b_n, 128)
    # The load of indices in the loop takes pipeline stages: 5 give 3 buffers.
    return _Config(block_m, block_n, 128 // itemsize, 8 if block_m * block_n == 128 * 128 else 4, 5)


def _weight_grad_config(itemsize: int, precision: str, b_n: int, tiles: int) -> _Config:
    """``tiles``: how many of 128 columns there would be."""
    if precision == "ieee":
        return _Config(16, _tile(b_n, 64), 64, 4, 2)
    block_n = _tile(b_n, 128)
    block_k = 128 if tiles * -(-b_n // block_n) >= _FEW_TILES else 64
    return _Config(128 // itemsize, block_n, block_k, 8 if block_n * block_k == 128 * 128 else 4, 3)


def _align(block: int) -> int:
    """Largest power of two up to 16 that divides ``block``."""
    return min(16, block & -block)


def _rows(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t in ``dtype`` with contiguous rows."""
    if dtype is not None and t.dtype != dtype:
        t = t.to(dtype)
    return t if t.stride(1) == 1 else t.contiguous()


def masked_weight(weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete) -> Tensor:
    """W * z, z drawn from the seed; contiguous, dtype of W, log_alpha float32 in its shape."""
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = torch.empty_like(weight)
    n = weight.numel()
    if n:
        launch(
            _masked_weight_kernel,
            (cdiv(n, _BLOCK),),
            weight,
            log_alpha,
            seed,
            out,
            n,
            1.0 / dist.beta,
            dist.gamma,
            dist.zeta,
            BLOCK=_BLOCK,
        )
    return out


def masked_weight_grad(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor,
    dist: HardConcrete,
    need_w: bool,
    need_log_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and dlog_alpha from dL/d(W * z), z drawn again; None where not needed."""
    grad, weight, log_alpha = grad.contiguous(), weight.contiguous(), log_alpha.contiguous()
    dw = torch.empty_like(weight) if need_w else None
    dlog_alpha = torch.empty_like(log_alpha) if need_log_alpha else None
    n = weight.numel()
    if n and (need_w or need_log_alpha):
        launch(
            _masked_weight_grad_kernel,
            (cdiv(n, _BLOCK),),
            grad,
            weight,
            log_alpha,
            seed,
            weight if dw is None else dw,
            log_alpha if dlog_alpha is None else dlog_alpha,
            n,
            1.0 / dist.beta,
            dist.gamma,
            dist.zeta,
            NEED_W=need_w,
            NEED_LOG_ALPHA=need_log_alpha,
            BLOCK=_BLOCK,
        )
    return dw, dlog_alpha


def _prepare(
    weight: Tensor, z: Tensor, b_out: int, b_in: int, dtype: torch.dtype, rows: bool, cols: bool, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of rows and of columns of blocks and weight * z in ``dtype``, each only if asked for."""
    n_out, n_in = weight.shape
    n_rows, n_cols = z.shape
    row_lists = torch.empty(n_rows if rows else 0, 1 + n_cols, dtype=torch.int32, device=z.device)
    col_lists = torch.empty(n_cols if cols else 0, 1 + n_rows, dtype=torch.int32, device=z.device)
    # A leading dimension that 16 does not divide would make the products' loads narrow.
    stride = cdiv(n_in, 16) * 16
    product = torch.empty(n_out if scaled else 0, stride, dtype=dtype, device=z.device)
    tile_k = min(triton.next_power_of_2(max(n_in, 1)), _TILE)
    tile_n = _TILE // tile_k
    tiles = cdiv(n_out, tile_n) * cdiv(n_in, tile_k) if scaled else 0
    programs = len(row_lists) + len(col_lists) + tiles
    if programs:
        launch(
            _prepare_kernel,
            (programs,),
            z,
            row_lists,
            col_lists,
            weight,
            product,
            n_rows,
            n_cols,
            n_out,
            n_in,
            stride,
            B_N=b_out,
            B_K=b_in,
            ALIGN_K=_align(b_in),
            ROWS=rows,
            COLS=cols,
            LINE=_LINE,
            TILE_N=tile_n,
            TILE_K=tile_k,
            num_warps=4,
        )
    return row_lists, col_lists, product


def _product(
    a: Tensor,
    w: Tensor,
    w_strides: tuple[int, int],
    bias: Tensor | None,
    lists: Tensor,
    b_n: int,
    b_k: int,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """a w^T + bias (M, n) in ``dtype``; w (n, K) by its strides."""
    m, k = a.shape
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    precision = precision_of(a.dtype)
    config = _product_config(a.element_size(), precision, m, b_n)
    n_lines, n_blocks = lists.shape[0], lists.shape[1] - 1
    programs = cdiv(m, config.m) * n_lines * cdiv(b_n, config.n)
    if programs:
        launch(
            _product_kernel,
            (programs,),
            a,
            w,
            None if bias is None else bias.contiguous(),
            out,
            lists,
            m,
            n,
            k,
            a.stride(0),
            *w_strides,
            n_lines,
            n_blocks,
            B_N=b_n,
            B_K=b_k,
            ALIGN_K=_align(b_k),
            HAS_BIAS=bias is not None,
            PRECISION=precision,
            BLOCK_M=config.m,
            BLOCK_N=config.n,
            BLOCK_K=config.k,
            GROUP_M=_GROUP_M,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _blocks(weight: Tensor, z: Tensor, b_out: int, b_in: int) -> tuple[Tensor, Tensor, int, int]:
    """Contiguous weight and gates, and blocks no larger than the weight."""
    return weight.contiguous(), z.contiguous(), min(b_out, weight.shape[0]), min(b_in, weight.shape[1])


def block_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b_out: int, b_in: int, dtype: torch.dtype
) -> Tensor:
    """y (M, out) = x (W * Z)^T + b in ``dtype``, Z the gates z spread over blocks; closed blocks are skipped.

    Args:
        x: (M, in), any strides, any dtype.
        weight: (out, in).
        bias: (out,) or None.
        z: (ceil(out / b_out), ceil(in / b_in)) float32.
        b_out, b_in: the block; those at the edges are cropped.
        dtype: of the product, float32, float16 or bfloat16.
    """
    if not weight.numel():  # no blocks: nothing that a kernel could be compiled for
        y = x.new_zeros(x.shape[0], weight.shape[0], dtype=dtype)
        return y if bias is None else y.add_(bias)
    weight, z, b_out, b_in = _blocks(weight, z, b_out, b_in)
    lists, _, scaled = _prepare(weight, z, b_out, b_in, dtype, True, False, True)
    strides = scaled.stride(0), 1
    return _product(_rows(x, dtype), scaled, strides, bias, lists, b_out, b_in, weight.shape[0], dtype)


def block_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    b_out: int,
    b_in: int,
    full: bool,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    """dx, dweight, dbias (in the dtype of dy) and dz, each None where ``needs`` says so.

    dz is <theta, raw> of each block, where its gate is fractional; where it is open, if ``full``.
    """
    need_x, need_w, need_b, need_z = needs
    if not weight.numel():
        zeros = [t.new_zeros(t.shape) if n else None for t, n in ((x, need_x), (weight, need_w), (z, need_z))]
        return [zeros[0], zeros[1], dy.sum(0) if need_b else None, zeros[2]]
    weight, z, b_out, b_in = _blocks(weight, z, b_out, b_in)
    rows, cols, scaled = _prepare(weight, z, b_out, b_in, dtype, need_w or need_z, need_x, need_x)
    dx = dw = dz = None
    dy_rows = _rows(dy, dtype)
    if need_x:
        strides = 1, scaled.stride(0)
        dx = _product(dy_rows, scaled, strides, None, cols, b_in, b_out, weight.shape[1], x.dtype)
    if need_w or need_z:
        dw, dz = _weight_grad(dy_rows, _rows(x, dtype), weight, z, rows, b_out, b_in, full, need_w, need_z)
    return [dx, dw, dy.sum(0) if need_b else None, dz]


def _weight_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    lists: Tensor,
    b_out: int,
    b_in: int,
    full: bool,
    need_w: bool,
    need_z: bool,
) -> tuple[Tensor | None, Tensor | None]:
    n_out, n_in = weight.shape
    n_rows, n_cols = z.shape
    precision = precision_of(x.dtype)
    config = _weight_grad_config(x.element_size(), precision, b_out, n_rows * cdiv(n_in, 128))
    tiles = cdiv(b_out, config.n)
    dw = torch.empty_like(weight) if need_w else None
    dz = torch.empty_like(z) if need_z else None
    sums = torch.empty(n_rows * tiles if need_z else 0, n_in, dtype=torch.float32, device=z.device)
    programs = n_rows * tiles * cdiv(n_cols * b_in, config.k)
    if programs:
        launch(
            _weight_grad_kernel,
            (programs,),
            dy,
            x,
            weight,
            z,
            weight if dw is None else dw,
            sums,
            lists,
            x.shape[0],
            n_out,
            n_in,
            dy.stride(0),
            x.stride(0),
            n_cols,
            B_N=b_out,
            B_K=b_in,
            ALIGN_K=_align(b_in),
            NEED_W=need_w,
            NEED_Z=need_z,
            PRECISION=precision,
            BLOCK_M=config.m,
            BLOCK_N=config.n,
            BLOCK_K=config.k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if dz is not None:
            launch(
                _block_sum_kernel,
                (n_rows * cdiv(n_cols, _BLOCKS),),
                sums,
                z,
                dz,
                n_in,
                n_cols,
                tiles,
                B_K=b_in,
                FULL=full,
                BLOCKS=_BLOCKS,
                WIDTH=min(triton.next_power_of_2(b_in), _WIDTH),
                num_warps=4,
            )
    return dw, dz
