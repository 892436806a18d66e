"""The expected L0 norm of all gate vectors and its gradient, one launch."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import address, launch
from ._table import device_table

if TYPE_CHECKING:
    from l0kernels._gates import HardConcrete

_COLUMNS = 4  # of a table row: address, length, offset in the gradient, bits of the weight as a double
_TILE = 8192  # gates of a program, at most
_BLOCK = 1024  # gates of a row, at most, while rows are few
_MANY = 2**20


@triton.jit(do_not_specialize=["n", "rows"])
def _penalty_kernel(
    log_alpha_ptr,  # of the only tensor, if SINGLE
    table_ptr,  # (rows, 4) int64, if not SINGLE
    partial_ptr,  # (programs,)
    grad_ptr,  # (sum n,)
    n,
    rows,
    weight,
    shift,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight * p_open summed over ROWS rows of up to BLOCK gates, and its gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    offs = tl.arange(0, BLOCK)[None, :]
    if SINGLE:
        start = row.to(tl.int64) * BLOCK
        mask = start + offs < n
        address = log_alpha_ptr + start
    else:
        row_ptr = table_ptr + row * 4
        valid = row < rows
        address = tl.load(row_ptr, mask=valid, other=0).to(tl.pointer_type(tl.float32))
        mask = offs < tl.load(row_ptr + 1, mask=valid, other=0)
        start = tl.load(row_ptr + 2, mask=valid, other=0)
        weight = tl.load(row_ptr + 3, mask=valid, other=0).to(tl.float64, bitcast=True).to(tl.float32)
    log_alpha = tl.load(address + offs, mask=mask, other=0.0)
    p = 1.0 / (1.0 + tl.exp(shift - log_alpha))
    term = weight * p
    tl.store(grad_ptr + start + offs, term * (1.0 - p), mask=mask)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(tl.where(mask, term, 0.0), 1), 0))


def _table_rows(sizes: list[int], addresses: list[int], weights: list[float], block: int) -> list[int]:
    rows: list[int] = []
    offset = 0
    for n, start_of, weight in zip(sizes, addresses, weights, strict=True):
        (bits,) = struct.unpack("<q", struct.pack("<d", weight))
        for start in range(0, n, block):
            rows += (start_of + 4 * start, min(n - start, block), offset + start, bits)
        offset += n
    return rows


def _row(longest: int, total: int) -> int:
    """Gates of a row."""
    return _TILE if total > _MANY else min(max(128, triton.next_power_of_2(longest)), _BLOCK)


def _warps(tile: int) -> int:
    return min(max(tile // 256, 1), 16)


def l0_penalty(log_alphas: list[Tensor], weights: list[float], dist: HardConcrete) -> tuple[Tensor, Tensor]:
    """sum_g weight * p_open_g over all tensors, and its gradient, flat. The same sum every time.

    Args:
        log_alphas: float32, any shape.
        weights: one per tensor.
        dist: the distribution's constants.

    Returns:
        total () and gradient (sum n,), float32.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    sizes = [a.numel() for a in log_alphas]
    total, device = sum(sizes), log_alphas[0].device
    grad = torch.empty(total, dtype=torch.float32, device=device)
    if total == 0:
        return torch.zeros((), dtype=torch.float32, device=device), grad
    block = _row(max(sizes), total)
    single = len(sizes) == 1
    if single:
        table, rows = grad, -(-total // block)
    else:
        addresses = [address(a) for a in log_alphas]
        key = ("l0_penalty", block, *sizes, *addresses, *weights)
        table = device_table(key, device, lambda: _table_rows(sizes, addresses, weights, block))
        rows = table.shape[0] // _COLUMNS
    rows_each = triton.next_power_of_2(rows)
    if rows_each * block > _TILE:
        rows_each = 1
    programs = -(-rows // rows_each)
    partial = torch.empty(() if programs == 1 else programs, dtype=torch.float32, device=device)
    launch(
        _penalty_kernel,
        (programs,),
        log_alphas[0],
        table,
        partial,
        grad,
        total,
        rows,
        float(weights[0]),
        dist.beta * math.log(-dist.gamma / dist.zeta),
        SINGLE=single,
        ROWS=rows_each,
        BLOCK=block,
        num_warps=_warps(rows_each * block),
    )
    return partial if programs == 1 else partial.sum(), grad
