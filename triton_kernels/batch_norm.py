"""Batch normalisation of packed channels, whose number the device alone knows; no host sync.

Rows are pixels, columns channels: [0, open) the open ones, zeros to the extent, natural order where the gate
is plain. Forward makes two passes: shares of the rows leave their means and squared deviations (Welford's
update, so that fp32 stays accurate beside a large mean), the second pass joins them in one order (Chan, Golub
and LeVeque, 1979) and normalises. Backward makes two as well. Loads run to the extent: a mask by the count of
open channels would make narrow ones of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, gpu, launch
from .conv2d_channels import as_images, as_rows
from .matmul import Gate, _extent

_ROWS, _COLS = 32, 64
_SHARE = 512  # rows, at least, of a share
_ANY = ["rows", "share", "shares", "steps"]
"""Numbers that change no instruction worth a compilation of its own."""


@triton.jit
def _units(
    c, index_ptr, z_ptr, C, n_open, plain, HAS: tl.constexpr
):  # fmt: skip
    """(unit of each column, whether it is open): closed units stand behind the open ones."""
    unit, is_open = c, c < C
    if HAS:
        unit = tl.where(plain, c, tl.load(index_ptr + c, mask=c < C, other=0))
        is_open = (c < n_open) & (tl.load(z_ptr + unit, mask=c < n_open, other=0.0) != 0.0)
    return unit, is_open


@triton.jit(do_not_specialize=_ANY)
def _moments(
    x_ptr,
    mean_ptr,  # (shares, C)
    square_ptr,  # (shares, C): sums of squared deviations from that mean
    count_ptr,
    rows,
    C,
    stride_r,
    stride_c,
    share,
    HAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    extent, n_open, _ = _extent(count_ptr, C, HAS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1) * share
    last = tl.minimum(row + share, rows)
    if tl.program_id(0) * BLOCK_C < n_open:
        mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        n = 0.0
        for start in range(row, last, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = (r < last)[:, None] & (c < extent)[None, :]
            at = x_ptr + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            n += 1.0
            delta = tl.where(mask, value - mean, 0.0)
            mean += delta / n
            square += delta * tl.where(mask, value - mean, 0.0)
        # A line has seen as many rows as steps, one less where the last step ended before it.
        line = tl.arange(0, BLOCK_R)
        seen = tl.maximum(tl.cdiv(last - row - line, BLOCK_R), 0).to(tl.float32)[:, None]
        total = tl.maximum(last - row, 1).to(tl.float32)
        joined = tl.sum(mean * seen, 0) / total
        apart = mean - joined[None, :]
        square = tl.sum(square + seen * apart * apart, 0)
        at = tl.program_id(1) * C + c
        tl.store(mean_ptr + at, joined, mask=c < n_open)
        tl.store(square_ptr + at, square, mask=c < n_open)


@triton.jit(do_not_specialize=_ANY)
def _normalise(
    x_ptr,
    y_ptr,  # (rows, C) contiguous
    part_mean_ptr,
    part_square_ptr,
    mean_ptr,  # (C,) by column, float32: for backward
    rstd_ptr,
    running_mean_ptr,  # (C,) by unit
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    rows,
    C,
    stride_r,
    stride_c,
    share,  # rows of a share of the moments
    shares,
    steps,  # tiles of rows that a program takes
    momentum,
    eps,
    HAS: tl.constexpr,
    BATCH: tl.constexpr,  # normalise with the batch's moments, else with the running ones
    UPDATE: tl.constexpr,  # the running ones
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    extent, n_open, plain = _extent(count_ptr, C, HAS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if tl.program_id(0) * BLOCK_C < extent:
        unit, is_open = _units(c, index_ptr, z_ptr, C, n_open, plain, HAS)
        if BATCH:
            mean = tl.zeros((BLOCK_C,), tl.float32)
            square = tl.zeros((BLOCK_C,), tl.float32)
            seen = 0.0
            for part in range(shares):
                n = tl.minimum(share, rows - part * share).to(tl.float32)
                part_mean = tl.load(part_mean_ptr + part * C + c, mask=is_open, other=0.0)
                delta = part_mean - mean
                mean += delta * (n / (seen + n))
                square += delta * delta * (seen * n / (seen + n))
                square += tl.load(part_square_ptr + part * C + c, mask=is_open, other=0.0)
                seen += n
            var = square / rows
            if UPDATE:  # noqa: SIM102 - decided by the compiler, the next by the device
                if tl.program_id(1) == 0:
                    kept = tl.load(running_mean_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
                    new = kept + momentum * (mean - kept)
                    to = running_mean_ptr.dtype.element_ty
                    tl.store(running_mean_ptr + unit, new.to(to), mask=is_open)
                    kept = tl.load(running_var_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
                    new = kept + momentum * (square / tl.maximum(rows - 1, 1).to(tl.float32) - kept)
                    tl.store(running_var_ptr + unit, new.to(to), mask=is_open)
        else:
            mean = tl.load(running_mean_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
            var = tl.load(running_var_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(var + eps)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + c, tl.where(is_open, mean, 0.0), mask=c < C)
            tl.store(rstd_ptr + c, tl.where(is_open, rstd, 0.0), mask=c < C)
        scale = rstd
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
        shift = tl.zeros((BLOCK_C,), tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
        first = tl.program_id(1) * steps
        for tile in range(first, tl.minimum(first + steps, tl.cdiv(rows, BLOCK_R))):
            r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
            at = x_ptr + r[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
            mask = (r < rows)[:, None] & (c < extent)[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
            value = tl.where(is_open[None, :], value, 0.0).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + r[:, None] * C + c[None, :], value, mask=mask)


@triton.jit(do_not_specialize=_ANY)
def _grad_sums(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dot_ptr,  # (shares, C): sums of dy times the normalised x
    sum_ptr,  # (shares, C): sums of dy
    count_ptr,
    rows,
    C,
    stride_dr,
    stride_dc,
    stride_r,
    stride_c,
    share,
    HAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    extent, n_open, _ = _extent(count_ptr, C, HAS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1) * share
    last = tl.minimum(row + share, rows)
    if tl.program_id(0) * BLOCK_C < n_open:
        mean = tl.load(mean_ptr + c, mask=c < n_open, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + c, mask=c < n_open, other=0.0)
        dot = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(row, last, BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
            mask = (r < last) & (c < extent)[None, :]
            col = c.to(tl.int64)[None, :]
            dy = tl.load(dy_ptr + r * stride_dr + col * stride_dc, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + r * stride_r + col * stride_c, mask=mask, other=0.0).to(tl.float32)
            dot += dy * (x - mean)
            total += dy
        at = tl.program_id(1) * C + c
        tl.store(dot_ptr + at, tl.sum(dot, 0) * rstd, mask=c < n_open)
        tl.store(sum_ptr + at, tl.sum(total, 0), mask=c < n_open)


@triton.jit(do_not_specialize=_ANY)
def _grad(
    dy_ptr,
    x_ptr,
    dx_ptr,  # (rows, C) contiguous
    mean_ptr,
    rstd_ptr,
    dot_ptr,
    sum_ptr,
    dweight_ptr,  # (C,) by unit
    dbias_ptr,
    weight_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    rows,
    C,
    stride_dr,
    stride_dc,
    stride_r,
    stride_c,
    shares,
    steps,
    HAS: tl.constexpr,
    BATCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DX: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    extent, n_open, plain = _extent(count_ptr, C, HAS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    unit, is_open = _units(c, index_ptr, z_ptr, C, n_open, plain, HAS)
    dot = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH or DWEIGHT or DBIAS:
        for part in range(shares):
            dot += tl.load(dot_ptr + part * C + c, mask=is_open, other=0.0)
            total += tl.load(sum_ptr + part * C + c, mask=is_open, other=0.0)
        if tl.program_id(1) == 0:
            if DWEIGHT:
                tl.store(dweight_ptr + unit, dot.to(dweight_ptr.dtype.element_ty), mask=c < C)
            if DBIAS:
                tl.store(dbias_ptr + unit, total.to(dbias_ptr.dtype.element_ty), mask=c < C)
    if DX:
        mean = tl.load(mean_ptr + c, mask=is_open, other=0.0)
        rstd = tl.load(rstd_ptr + c, mask=is_open, other=0.0)
        scale = rstd
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
        slope = dot * rstd / rows
        shift = total / rows
        first = tl.program_id(1) * steps
        last = tl.minimum(first + steps, tl.cdiv(rows, BLOCK_R))
        if tl.program_id(0) * BLOCK_C >= extent:
            last = first
        for tile in range(first, last):
            r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
            mask = (r < rows) & (c < extent)[None, :]
            col = c.to(tl.int64)[None, :]
            grad = tl.load(dy_ptr + r * stride_dr + col * stride_dc, mask=mask, other=0.0).to(tl.float32)
            if BATCH:
                x = tl.load(x_ptr + r * stride_r + col * stride_c, mask=mask, other=0.0).to(tl.float32)
                grad -= shift[None, :] + (x - mean[None, :]) * slope[None, :]
            value = tl.where(is_open[None, :], grad * scale[None, :], 0.0).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + r * C + c[None, :], value, mask=mask)


def _plan(rows: int, C: int, t: Tensor) -> tuple[int, int, int, tuple[int, int], int]:
    """(blocks of columns, shares of the rows, rows of one, grid of the second pass, its steps)."""
    programs = 4 * gpu(t.device.index)[1]
    blocks = cdiv(C, _COLS)
    share = cdiv(rows, max(1, min(cdiv(programs, blocks), cdiv(rows, _SHARE))))
    tiles = cdiv(rows, _ROWS)
    steps = cdiv(tiles, max(1, min(tiles, cdiv(programs, blocks))))
    return blocks, cdiv(rows, share), share, (blocks, cdiv(tiles, steps)), steps


def _partials(shares: int, C: int, t: Tensor) -> list[Tensor | None]:
    return [*torch.empty(2, shares, C, dtype=torch.float32, device=t.device).unbind()]


def batch_norm_forward(
    x: Tensor,
    gate: Gate | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """F.batch_norm of the open channels, 0 in the others; mean and 1 / std (C,) fp32, by column.

    Args:
        x: (N, C, H, W), packed as ``gate`` says (see conv2d.pack_channels); None: all are open.
        running_mean, running_var: (C,) by unit, of one dtype; in training those of the open channels move.
        weight, bias: (C,) by unit, or None.

    Returns:
        y as x, in channels_last memory: zeros up to the extent, beyond it nothing is written.
    """
    n, C, h, w = x.shape
    values = as_rows(x)
    rows = values.shape[0]
    y = torch.empty(rows, C, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(2, C, dtype=torch.float32, device=x.device).unbind()
    batch = training or running_mean is None or running_var is None
    if rows == 0 or C == 0:
        return as_images(y, n, h, w), mean.zero_(), rstd.zero_()
    blocks, shares, share, grid, steps = _plan(rows, C, x)
    z, index, count = gate or (None, None, None)
    parts: list[Tensor | None] = [None, None]
    has = gate is not None
    if batch:
        parts = _partials(shares, C, x)
        launch(
            _moments, (blocks, shares), values, *parts, count, rows, C, *values.stride(), share,
            HAS=has, BLOCK_R=_ROWS, BLOCK_C=_COLS, num_warps=4,
        )  # fmt: skip
    launch(
        _normalise,
        grid,
        values, y, *parts, mean, rstd, running_mean, running_var, weight, bias, z, index, count,
        rows, C, *values.stride(), share, shares, steps, float(momentum), float(eps),
        HAS=has, BATCH=batch, UPDATE=training and running_mean is not None and running_var is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_R=_ROWS, BLOCK_C=_COLS, num_warps=4,
    )  # fmt: skip
    return as_images(y, n, h, w), mean, rstd


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Gate | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """dx packed as x, dweight and dbias (C,) by unit, in the dtype of weight, zero where closed.

    Args:
        mean, rstd: of batch_norm_forward.
        training: whether they are the batch's.
        needs: which of the three are wanted; the others are None.
    """
    need_x, need_w, need_b = needs
    n, C, h, w = x.shape
    grads, values = as_rows(dy), as_rows(x)
    rows = values.shape[0]
    dtype = torch.float32 if weight is None else weight.dtype
    dx = torch.empty(rows, C, dtype=x.dtype, device=x.device) if need_x else None
    dw, db = (torch.empty(C, dtype=dtype, device=x.device) if need else None for need in (need_w, need_b))
    if rows == 0 or C == 0:
        dw, db = (None if t is None else t.zero_() for t in (dw, db))
        return [None if dx is None else as_images(dx, n, h, w), dw, db]
    blocks, shares, share, grid, steps = _plan(rows, C, x)
    z, index, count = gate or (None, None, None)
    parts: list[Tensor | None] = [None, None]
    has = gate is not None
    sums = need_w or need_b or (need_x and training)
    if sums:
        parts = _partials(shares, C, x)
        launch(
            _grad_sums, (blocks, shares), grads, values, mean, rstd, *parts, count, rows, C,
            *grads.stride(), *values.stride(), share, HAS=has, BLOCK_R=_ROWS, BLOCK_C=_COLS, num_warps=4,
        )  # fmt: skip
    launch(
        _grad,
        grid if need_x else (blocks, 1),
        grads, values, dx, mean, rstd, *parts, dw, db, weight, z, index, count, rows, C,
        *grads.stride(), *values.stride(), shares, steps,
        HAS=has, BATCH=training, HAS_WEIGHT=weight is not None, DX=need_x, DWEIGHT=need_w, DBIAS=need_b,
        BLOCK_R=_ROWS, BLOCK_C=_COLS, num_warps=4,
    )  # fmt: skip
    return [None if dx is None else as_images(dx, n, h, w), dw, db]
