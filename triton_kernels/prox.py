"""Proximal operators by element and by group, one pass over memory; one more where groups lie apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch

if TYPE_CHECKING:
    from l0kernels._calls import ProxCall

_BLOCK = 1024
_LONGEST = 16384  # elements of a group in a row that a program keeps in registers
_TILE = 2048  # elements of a program, where its groups are shorter
_ROWS, _COLUMNS = 16, 128  # a tile of what is summed by column
_PART = 16384  # elements that one program sums, at most
_SEGMENT = 64  # elements in a row from which on a group is read by itself


@triton.jit
def _root(p):
    """d of (1 - d)^2 d = p in [0, 1/3], as csrc/prox_impl.h has it."""
    s2 = tl.minimum(6.75 * p, 1.0)
    u = s2 / (1.0 + tl.sqrt(1.0 - s2))
    y = 0.0001814604412 * u - 0.0003992084366
    y = y * u + 0.0006282437938
    y = y * u - 8.945745262e-5
    y = y * u + 0.0008144265413
    y = y * u + 0.00196116306
    y = y * u + 0.006505663619
    y = y * u + 0.02743474376
    return (y * u + 0.2962962969) * u


@triton.jit
def _stage(x, step, first, second, third, threshold, KIND: tl.constexpr, BY: tl.constexpr):
    """One of the penalties of csrc/prox.h, with `step` by element or in the numbers already."""
    size = tl.abs(x)
    if KIND == 1:
        size = size - (second * step if BY else second)
        limit = tl.sqrt(2.0 * first * step) if BY else threshold
        result = size
    elif KIND == 2:
        shrink = 1.0 + second * (step if BY else 1.0)
        limit = tl.sqrt(2.0 * first * step * shrink) if BY else threshold
        result = size / shrink
    else:
        whole = tl.where(size + second > 3.4028234e38, 3.4028234e38, size + second)
        ratio = third / whole
        p = ratio * ratio * ratio
        if BY:
            own = first * step
            jump = tl.sqrt(2.0 * (second + 1.0) * own) - 0.5 * second
            below = own * ((second + 1.0) / second)
            limit = tl.where(own <= 0.5 * second * (second / (second + 1.0)), below, jump)
            p = p * step
        else:
            limit = threshold
        result = size - whole * _root(p)
        result = tl.where(result < 0.0, 0.0, result)
    return tl.where(size <= limit, 0.0, tl.where(x < 0.0, -result, result))


@triton.jit
def _load(x_ptr, step_ptr, at, mask, b0, b1, b2, b3, BEFORE: tl.constexpr, BY: tl.constexpr):
    """x after the first stage, and the steps."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(step_ptr + at, mask=mask, other=1.0) if BY else 1.0
    if BEFORE > 0:
        x = _stage(x, step, b0, b1, b2, b3, BEFORE, BY)
    return x, step


@triton.jit(do_not_specialize=["part"])
def _row_squares_kernel(
    x_ptr,
    step_ptr,
    out_ptr,
    n,
    part,
    b0,
    b1,
    b2,
    b3,
    BEFORE: tl.constexpr,
    BY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row, part] = the sum of squares of up to `part` elements of a row of n."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * part
    end = tl.minimum(start + part, n)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, end, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        x, _ = _load(x_ptr, step_ptr, row * n + offs, offs < end, b0, b1, b2, b3, BEFORE, BY)
        wide = tl.where(offs < end, x, 0.0).to(tl.float64)
        total += wide * wide
    tl.store(out_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit(do_not_specialize=["rows", "part"])
def _column_squares_kernel(
    x_ptr,
    step_ptr,
    out_ptr,
    rows,
    width,
    part,
    b0,
    b1,
    b2,
    b3,
    BEFORE: tl.constexpr,
    BY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[part, column] = the sum of squares of up to `part` rows of a column."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for begin in range(start, end, ROWS):
        offs = begin + tl.arange(0, ROWS)[:, None]
        mask = (offs < end) & (cols < width)
        x, _ = _load(x_ptr, step_ptr, offs.to(tl.int64) * width + cols, mask, b0, b1, b2, b3, BEFORE, BY)
        wide = tl.where(mask, x, 0.0).to(tl.float64)
        total += wide * wide
    first = tl.arange(0, COLUMNS)
    place = tl.program_id(0) * COLUMNS + first
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * width + place, tl.sum(total, 0), mask=place < width)


@triton.jit
def _scaled(x, squares, group_step_ptr, mask, lam, GROUP: tl.constexpr, GROUP_BY: tl.constexpr):
    """x times its group's factor, by the sum of the group's squares in float64."""
    norm = tl.sqrt(squares)
    own = tl.zeros_like(norm) + lam
    if GROUP_BY:
        own *= tl.load(group_step_ptr, mask=mask, other=1.0)
    if GROUP == 1:
        factor = tl.where(norm <= own, 0.0, 1.0 - own / norm)
    else:
        factor = tl.where(norm <= tl.sqrt(2.0 * own), 0.0, 1.0)
    scale = factor.to(tl.float32)
    return tl.where(scale == 0.0, 0.0, x * scale)


@triton.jit
def _rows_kernel(
    x_ptr,
    step_ptr,  # like x, if BY
    y_ptr,  # may be x
    group_step_ptr,  # (groups,), if GROUP_BY
    groups,
    n,
    lam,
    b0,
    b1,
    b2,
    b3,
    a0,
    a1,
    a2,
    a3,
    BEFORE: tl.constexpr,
    GROUP: tl.constexpr,
    AFTER: tl.constexpr,
    BY: tl.constexpr,
    GROUP_BY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = after(factor_g * before(x)) of groups of n elements in a row, each read once."""
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    offs, own = tl.arange(0, BLOCK)[None, :], group < groups
    at, mask = group.to(tl.int64) * n + offs, own & (offs < n)
    x, step = _load(x_ptr, step_ptr, at, mask, b0, b1, b2, b3, BEFORE, BY)
    wide = tl.where(mask, x, 0.0).to(tl.float64)
    squares = tl.sum(wide * wide, 1)[:, None]
    x = _scaled(x, squares, group_step_ptr + group, own, lam, GROUP, GROUP_BY)
    if AFTER > 0:
        x = _stage(x, step, a0, a1, a2, a3, AFTER, BY)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prox_kernel(
    x_ptr,
    step_ptr,  # like x, if BY
    y_ptr,  # may be x
    squares_ptr,  # (groups,), if GROUP
    group_step_ptr,  # (groups,), if GROUP_BY
    n,
    groups,
    inner,
    lam,
    b0,
    b1,
    b2,
    b3,
    a0,
    a1,
    a2,
    a3,
    BEFORE: tl.constexpr,
    GROUP: tl.constexpr,
    AFTER: tl.constexpr,
    BY: tl.constexpr,
    GROUP_BY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = after(factor_g * before(x))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x, step = _load(x_ptr, step_ptr, at, mask, b0, b1, b2, b3, BEFORE, BY)
    if GROUP > 0:
        group = (at if WIDE else at.to(tl.int32)) // inner % groups  # 64 bits divide slowly
        squares = tl.load(squares_ptr + group, mask=mask, other=0.0)
        x = _scaled(x, squares, group_step_ptr + group, mask, lam, GROUP, GROUP_BY)
    if AFTER > 0:
        x = _stage(x, step, a0, a1, a2, a3, AFTER, BY)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=mask)


def _numbers(stage: list[float]) -> tuple[int, tuple[float, float, float, float]]:
    """Its kind, its two numbers, the cube root of lam a (a + 1), and the threshold where there is no step."""
    if not stage:
        return 0, (0.0, 0.0, 0.0, 0.0)
    kind, first, second = int(stage[0]), stage[1], stage[2]
    if kind == 1:
        return kind, (first, second, 0.0, math.sqrt(2 * first))
    if kind == 2:
        return kind, (first, second, 0.0, math.sqrt(2 * first * (1 + second)))
    third = math.pow(first, 1 / 3) * math.pow(second, 1 / 3) * math.pow(second + 1, 1 / 3)
    below = first <= second * second / (2 * (second + 1))
    limit = first * ((second + 1) / second) if below else math.sqrt(2 * first * (second + 1)) - second / 2
    return kind, (first, second, third, limit)


def _squares(call: ProxCall, before: tuple[int, tuple[float, float, float, float]]) -> Tensor:
    """(groups,) float64: of x after its first stage."""
    x, step, (outer, groups, inner) = call.x, call.step, call.layout
    kind, numbers = before
    given = x if step is None else step
    if outer == 1 or inner >= _SEGMENT:
        parts = cdiv(inner, _PART)
        out = torch.empty((outer * groups, parts), dtype=torch.float64, device=x.device)
        launch(
            _row_squares_kernel, (outer * groups, parts), x, given, out, inner, _PART, *numbers,
            BEFORE=kind, BY=step is not None, BLOCK=_BLOCK,
        )  # fmt: skip
        return out.view(outer, groups, parts).sum((0, 2))
    width, part = groups * inner, max(_ROWS, _PART // _COLUMNS)
    parts = cdiv(outer, part)
    out = torch.empty((parts, width), dtype=torch.float64, device=x.device)
    launch(
        _column_squares_kernel, (cdiv(width, _COLUMNS), parts), x, given, out, outer, width, part, *numbers,
        BEFORE=kind, BY=step is not None, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out.view(parts, groups, inner).sum((0, 2))


def _by_rows(call: ProxCall, out: Tensor) -> None:
    """Of groups that lie in a row and fit into registers: memory is read once."""
    x, step, group_step, before, group, after, (_, groups, inner) = call
    first, last, block = _numbers(before), _numbers(after), triton.next_power_of_2(inner)
    rows = max(1, _TILE // block)
    launch(
        _rows_kernel,
        (cdiv(groups, rows),),
        x,
        x if step is None else step,
        out,
        x if group_step is None else group_step,
        groups,
        inner,
        float(group[1]),
        *first[1],
        *last[1],
        BEFORE=first[0],
        GROUP=int(group[0]),
        AFTER=last[0],
        BY=step is not None,
        GROUP_BY=group_step is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=max(4, rows * block // 512),
    )


def _prox(call: ProxCall, out: Tensor) -> None:
    x, step, group_step, before, group, after, (outer, groups, inner) = call
    n = x.numel()
    if n == 0:
        return
    if group and outer == 1 and inner <= _LONGEST:
        _by_rows(call, out)
        return
    first, last = _numbers(before), _numbers(after)
    squares = _squares(call, first) if group else x
    launch(
        _prox_kernel,
        (cdiv(n, _BLOCK),),
        x,
        x if step is None else step,
        out,
        squares,
        x if group_step is None else group_step,
        n,
        groups,
        inner,
        float(group[1]) if group else 0.0,
        *first[1],
        *last[1],
        BEFORE=first[0],
        GROUP=int(group[0]) if group else 0,
        AFTER=last[0],
        BY=step is not None,
        GROUP_BY=group_step is not None,
        WIDE=n + _BLOCK >= 2**31,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def prox(calls: list[ProxCall], outs: list[Tensor]) -> None:
    """The proximal operator of each call, written into its `out`, which may be its x.

    Args:
        calls: x float32, bfloat16 or float16, contiguous; step float32.
        outs: contiguous, of the dtype of x.
    """
    for call, out in zip(calls, outs, strict=True):
        _prox(call, out)
