"""The step that puts gates on a budget: one program from the moment of the gradients to log_alpha.

It does what csrc/budget_impl.h does. An evaluation of the cost goes over all gates, so that one
multiprocessor takes some 100 ns for a thousand of them; several would wait for each other a
dozen times in a step.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import address, has_registers, launch
from ._table import device_table

if TYPE_CHECKING:
    from l0kernels._calls import CostTerms

_TILE = 2048  # gates at once
_ATOMS = 512  # atoms at once
_SUMS, _PARTS = 32, 32  # sums at once, and so many parts of each
_COLUMNS = 8  # of a row of gates: address, count, place, place in grad (-1: none), moves, 0, 0, 0
_HEAD = 32  # numbers of a kind, see `plan`


@triton.jit
def _place(head_ptr, ints_ptr, AT: tl.constexpr):
    """Where an array of a kind begins."""
    return ints_ptr + tl.load(head_ptr + AT)


@triton.jit
def _dist(dist_ptr, of_ptr, at, mask, UNIFORM: tl.constexpr):
    """shift, low and 1 / (high - low) of gates."""
    if UNIFORM:
        return tl.load(dist_ptr), tl.load(dist_ptr + 1), tl.load(dist_ptr + 2)
    else:
        row_ptr = dist_ptr + 3 * tl.load(of_ptr + at, mask=mask, other=0)
        return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)


@triton.jit
def _segments(
    values_ptr,
    bounds_ptr,
    k,
    mask,
    most,
    index_ptr,
    weight_ptr,
    BY_INDEX: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(SUMS,) float64: for each k the sum between its bounds of values, or of weight * values[index]."""
    first = tl.load(bounds_ptr + k, mask=mask, other=0)
    last = tl.load(bounds_ptr + k + 1, mask=mask, other=0)
    total = tl.zeros((SUMS,), tl.float64)
    for start in range(0, most, PARTS):
        at = first[:, None] + start + tl.arange(0, PARTS)[None, :]
        within = at < last[:, None]
        if BY_INDEX:
            index = tl.load(index_ptr + at, mask=within, other=0)
            weight = tl.load(weight_ptr + at, mask=within, other=0.0)
            total += tl.sum(tl.load(values_ptr + index, mask=within, other=0.0) * weight, 1)
        else:
            total += tl.sum(tl.load(values_ptr + at, mask=within, other=0.0), 1)
    return total


@triton.jit
def _share(
    head_ptr,
    numbers_ptr,
    ints_ptr,
    floats_ptr,
    dist_ptr,
    of_ptr,
    before_ptr,
    q_ptr,
    x_ptr,
    doubles_ptr,
    price,
    limit,
    SEGMENT: tl.constexpr,
    UNIFORM: tl.constexpr,
    TILE: tl.constexpr,
    ATOMS: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The share of the cost at a price; leaves x and what the sums' derivatives are."""
    start, n = tl.load(head_ptr), tl.load(head_ptr + 1).to(tl.int32)
    by = price.to(tl.float32)
    for begin in range(0, n, TILE):
        offs = begin + tl.arange(0, TILE)
        mask = offs < n
        a = tl.load(before_ptr + start + offs, mask=mask, other=0.0)
        a -= by * tl.load(q_ptr + start + offs, mask=mask, other=0.0)
        a = tl.minimum(tl.maximum(a, -limit), limit)
        shift, low, scale = _dist(dist_ptr, of_ptr, start + offs, mask, UNIFORM)
        x = (1.0 / (1.0 + tl.exp(shift - a)) - low) * scale
        tl.store(x_ptr + offs, tl.minimum(tl.maximum(x, 0.0), 1.0), mask=mask)
    tl.store(x_ptr + n, 1.0)
    tl.store(x_ptr + n + 1, 0.0)
    tl.debug_barrier()
    levels, factors = tl.load(head_ptr + 15).to(tl.int32), tl.load(head_ptr + 16).to(tl.int32)
    level_ptr, place_ptr = _place(head_ptr, ints_ptr, 17), _place(head_ptr, ints_ptr, 18)
    any_ptr, factor_ptr = _place(head_ptr, ints_ptr, 19), _place(head_ptr, ints_ptr, 20)
    for level in range(levels):
        stop = tl.load(level_ptr + level + 1)
        for begin in range(tl.load(level_ptr + level), stop, ATOMS):
            at = begin + tl.arange(0, ATOMS)
            mask = at < stop
            is_any = tl.load(any_ptr + at, mask=mask, other=0) != 0
            product = tl.full((ATOMS,), 1.0, tl.float32)
            for j in range(factors):
                value = tl.load(x_ptr + tl.load(factor_ptr + at * factors + j, mask=mask, other=n))
                product *= tl.where(is_any, 1.0 - value, value)
            place = tl.load(place_ptr + at, mask=mask, other=0)
            tl.store(x_ptr + place, tl.where(is_any, 1.0 - product, product), mask=mask)
        tl.debug_barrier()
    # Sums of runs, then of what they add up to: the same order every time.
    runs, sums = tl.load(head_ptr + 4).to(tl.int32), tl.load(head_ptr + 5).to(tl.int32)
    first_ptr, count_ptr = _place(head_ptr, ints_ptr, 7), _place(head_ptr, ints_ptr, 8)
    weight_ptr, part_ptr = floats_ptr + tl.load(head_ptr + 21), doubles_ptr
    ROWS: tl.constexpr = TILE // SEGMENT
    for begin in range(0, runs, ROWS):
        run = begin + tl.arange(0, ROWS)
        valid = run < runs
        first = tl.load(first_ptr + run, mask=valid, other=0)
        count = tl.load(count_ptr + run, mask=valid, other=0)
        offs = tl.arange(0, SEGMENT)[None, :]
        x = tl.load(x_ptr + first[:, None] + offs, mask=offs < count[:, None], other=0.0)
        total = tl.sum(x.to(tl.float64), 1) * tl.load(weight_ptr + run, mask=valid, other=0.0)
        tl.store(part_ptr + run, total, mask=valid)
    tl.debug_barrier()
    s_ptr = part_ptr + runs
    for begin in range(0, sums, SUMS):
        k = begin + tl.arange(0, SUMS)
        most = tl.load(head_ptr + 6).to(tl.int32)
        total = _segments(
            part_ptr,
            _place(head_ptr, ints_ptr, 9),
            k,
            k < sums,
            most,
            ints_ptr,
            floats_ptr,
            False,
            SUMS,
            PARTS,
        )
        tl.store(s_ptr + k, total, mask=k < sums)
    tl.debug_barrier()
    ds_ptr = s_ptr + sums
    other_ptr, coefficient_ptr = _place(head_ptr, ints_ptr, 11), floats_ptr + tl.load(head_ptr + 22)
    cost = tl.zeros((SUMS,), tl.float64)
    for begin in range(0, sums, SUMS):
        k = begin + tl.arange(0, SUMS)
        most = tl.load(head_ptr + 10).to(tl.int32)
        bounds_ptr = _place(head_ptr, ints_ptr, 12)
        ds = _segments(s_ptr, bounds_ptr, k, k < sums, most, other_ptr, coefficient_ptr, True, SUMS, PARTS)
        s = tl.load(s_ptr + k, mask=k < sums, other=0.0)
        linear = k == 0  # stands alone, and each product in two of the others
        cost += tl.where(linear, s, 0.5 * s * ds)
        tl.store(ds_ptr + k, tl.where(linear, 1.0, ds), mask=k < sums)
    total = tl.load(numbers_ptr) + tl.sum(cost, 0)
    tl.debug_barrier()
    return (total - tl.load(numbers_ptr + 1)) / tl.load(numbers_ptr + 2)


@triton.jit
def _gradient(
    head_ptr,
    ints_ptr,
    floats_ptr,
    x_ptr,
    doubles_ptr,
    TILE: tl.constexpr,
    ATOMS: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dcost/dx of what was evaluated last; returns where it lies."""
    width = tl.load(head_ptr + 2).to(tl.int32)
    runs, sums = tl.load(head_ptr + 4).to(tl.int32), tl.load(head_ptr + 5).to(tl.int32)
    pieces = tl.load(head_ptr + 13).to(tl.int32)
    ds_ptr = doubles_ptr + runs + sums
    of_piece_ptr = ds_ptr + sums
    dx_ptr = of_piece_ptr + pieces
    bounds_ptr = _place(head_ptr, ints_ptr, 14)
    # Places that the same sums read with the same weights are a piece.
    piece_ptr = bounds_ptr + pieces + 1
    side_ptr = piece_ptr + width
    most = tl.load(head_ptr + 3).to(tl.int32)
    for begin in range(0, pieces, SUMS):
        k = begin + tl.arange(0, SUMS)
        weight_ptr = floats_ptr + tl.load(head_ptr + 23)
        total = _segments(ds_ptr, bounds_ptr, k, k < pieces, most, side_ptr, weight_ptr, True, SUMS, PARTS)
        tl.store(of_piece_ptr + k, total, mask=k < pieces)
    tl.debug_barrier()
    for begin in range(0, width, TILE):
        offs = begin + tl.arange(0, TILE)
        piece = tl.load(piece_ptr + offs, mask=offs < width, other=0)
        tl.store(dx_ptr + offs, tl.load(of_piece_ptr + piece), mask=offs < width)
    tl.debug_barrier()
    levels, factors = tl.load(head_ptr + 15).to(tl.int32), tl.load(head_ptr + 16).to(tl.int32)
    level_ptr, place_ptr = _place(head_ptr, ints_ptr, 17), _place(head_ptr, ints_ptr, 18)
    any_ptr, factor_ptr = _place(head_ptr, ints_ptr, 19), _place(head_ptr, ints_ptr, 20)
    atoms = tl.load(level_ptr + levels)
    touched_level_ptr = level_ptr + levels + 1
    touched = tl.load(touched_level_ptr + levels)
    touched_ptr = factor_ptr + atoms * factors
    bounds_ptr = touched_ptr + touched
    entry_ptr = bounds_ptr + touched + 1
    for back in range(levels):
        level = levels - 1 - back
        stop = tl.load(touched_level_ptr + level + 1)
        for begin in range(tl.load(touched_level_ptr + level), stop, ATOMS):
            at = begin + tl.arange(0, ATOMS)
            mask = at < stop
            value = tl.load(touched_ptr + at, mask=mask, other=0)
            first = tl.load(bounds_ptr + at, mask=mask, other=0)
            count = tl.load(bounds_ptr + at + 1, mask=mask, other=0) - first
            total = tl.load(dx_ptr + value, mask=mask, other=0.0)
            for i in range(tl.max(count, 0)):
                within = mask & (i < count)
                entry = tl.load(entry_ptr + first + i, mask=within, other=0)
                atom = entry // factors
                is_any = tl.load(any_ptr + atom) != 0
                others = tl.load(dx_ptr + tl.load(place_ptr + atom))
                for j in range(factors):  # the product of all factors but this one
                    x = tl.load(x_ptr + tl.load(factor_ptr + atom * factors + j))
                    x = tl.where(is_any, 1.0 - x, x)
                    others *= tl.where(atom * factors + j == entry, 1.0, x)
                total += tl.where(within, others, 0.0)
            tl.store(dx_ptr + value, total, mask=mask)
        tl.debug_barrier()
    return dx_ptr


@partial(has_registers, n=128)
@triton.jit(do_not_specialize=["kinds", "rows"])
def _budget_kernel(
    table_ptr,  # (rows, 8) int64: where the gates are
    grad_ptr,  # of all gates that have one
    moment_ptr,  # (gates,)
    start_share_ptr,  # (kinds,) float64
    price_ptr,  # (kinds,) float64
    step_ptr,  # () int64
    skipped_ptr,  # () int64
    heads_ptr,  # (kinds, 32) int64
    numbers_ptr,  # (kinds, 4) float64: constant, offset, unit, keep
    ints_ptr,
    floats_ptr,
    dist_ptr,  # (dists, 3)
    of_ptr,  # (gates,) int32, unless UNIFORM
    before_ptr,  # (gates,) scratch
    next_ptr,  # (gates,) scratch
    q_ptr,  # (gates,) scratch
    x_ptr,  # (width,) scratch
    doubles_ptr,  # float64 scratch
    kinds,
    rows,
    ramp_high,  # how many steps the budget falls, in two parts
    ramp_low,
    limit,
    ROW: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNIFORM: tl.constexpr,
    TILE: tl.constexpr,
    ATOMS: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // ROW
    offs = tl.arange(0, ROW)[None, :]
    bad = tl.zeros((ROWS, ROW), tl.int32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        row_ptr, valid = table_ptr + row * 8, row < rows
        a_ptr = tl.load(row_ptr, mask=valid, other=0).to(tl.pointer_type(tl.float32))
        mask = offs < tl.load(row_ptr + 1, mask=valid, other=0)
        place = tl.load(row_ptr + 2, mask=valid, other=0) + offs
        from_grad = tl.load(row_ptr + 3, mask=valid, other=-1)
        moves = tl.load(row_ptr + 4, mask=valid, other=0).to(tl.float32)
        a = tl.load(a_ptr + offs, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + from_grad + offs, mask=mask & (from_grad >= 0), other=0.0)
        moment = tl.load(moment_ptr + place, mask=mask, other=0.0)
        moment = 0.999 * moment + 0.001 * (grad * grad)
        fine = (tl.abs(a) < float("inf")) & (tl.abs(moment) < float("inf"))
        bad += (mask & (fine == 0)).to(tl.int32)
        tl.store(before_ptr + place, a, mask=mask)
        tl.store(next_ptr + place, moment, mask=mask)
        tl.store(q_ptr + place, tl.zeros((ROWS, ROW), tl.float32) + moves, mask=mask)
    is_fine = (tl.sum(tl.sum(bad, 1), 0) == 0).to(tl.int32)
    step = tl.load(step_ptr) + is_fine
    skipped = tl.load(skipped_ptr) + 1 - is_fine
    tl.debug_barrier()
    tl.store(step_ptr, step)
    tl.store(skipped_ptr, skipped)
    correction = 1.0 / (1.0 - tl.exp(step.to(tl.float64) * -0.0010005003335835335))
    ramp = step.to(tl.float64) * 0.0 + ramp_high + ramp_low
    passed = tl.minimum(step.to(tl.float64) / tl.where(ramp > 0.0, ramp, 1.0), 1.0)
    passed = tl.where(ramp > 0.0, passed, 1.0)
    for kind in range(kinds * is_fine):
        head_ptr, own_ptr = heads_ptr + kind * 32, numbers_ptr + kind * 4
        start, n = tl.load(head_ptr), tl.load(head_ptr + 1).to(tl.int32)
        at_zero = _share(
            head_ptr, own_ptr, ints_ptr, floats_ptr, dist_ptr, of_ptr, before_ptr, q_ptr, x_ptr, doubles_ptr,
            ramp * 0.0, limit, SEGMENT, UNIFORM, TILE, ATOMS, SUMS, PARTS,
        )  # fmt: skip
        dx_ptr = _gradient(head_ptr, ints_ptr, floats_ptr, x_ptr, doubles_ptr, TILE, ATOMS, SUMS, PARTS)
        sums = tl.zeros((TILE,), tl.float64)
        for begin in range(0, n, TILE):
            at = begin + tl.arange(0, TILE)
            sums += tl.load(next_ptr + start + at, mask=at < n, other=0.0).to(tl.float64)
        floor = (0.01 * tl.sqrt(tl.sum(sums, 0) / n * correction)).to(tl.float32)
        sums = tl.zeros((TILE,), tl.float64)
        farthest = tl.zeros((TILE,), tl.float32)
        unit = tl.load(own_ptr + 2)
        for begin in range(0, n, TILE):
            at = begin + tl.arange(0, TILE)
            mask, place = at < n, start + at
            _, low, scale = _dist(dist_ptr, of_ptr, place, mask, UNIFORM)
            p = low + tl.load(x_ptr + at, mask=mask, other=0.0) / scale
            slope = tl.load(dx_ptr + at, mask=mask, other=0.0) / unit
            dc = slope.to(tl.float32) * p * (1.0 - p) * scale
            moment = tl.load(next_ptr + place, mask=mask, other=0.0)
            by = tl.sqrt(moment * correction.to(tl.float32)) + floor
            q = tl.load(q_ptr + place, mask=mask, other=0.0) * dc / tl.where(floor > 0.0, by, 1.0)
            q = tl.where(q < 1e-30, 0.0, q)
            sums += (dc * q).to(tl.float64)
            a = tl.load(before_ptr + place, mask=mask, other=0.0)
            farthest = tl.maximum(farthest, tl.where(q > 0.0, (a + limit) / tl.where(q > 0.0, q, 1.0), 0.0))
            tl.store(q_ptr + place, q, mask=mask)
            tl.store(moment_ptr + place, moment, mask=mask)
        slope = tl.sum(sums, 0)
        end = tl.max(farthest, 0).to(tl.float64) * 1.000001  # past the rounding, where all lie at the end
        tl.debug_barrier()

        number = tl.load(head_ptr + 24)
        first = tl.load(start_share_ptr + number)
        target = first + (tl.load(own_ptr + 3) - first) * passed
        # A line from price 0, then between the two prices around the target.
        low_price, at_low, high_price, at_high = end * 0.0, at_zero - target, end, end * 0.0
        around, side, tries = kind < 0, kind * 0, kind * 0
        price = tl.where(slope > 0.0, tl.minimum(at_low / tl.where(slope > 0.0, slope, 1.0), end), end)
        active = (at_zero > target) & (end > 0.0)
        price = tl.where(active, price, 0.0)
        while active & (tries < 100):
            found = _share(
                head_ptr, own_ptr, ints_ptr, floats_ptr, dist_ptr, of_ptr, before_ptr, q_ptr, x_ptr,
                doubles_ptr, price, limit, SEGMENT, UNIFORM, TILE, ATOMS, SUMS, PARTS,
            ) - target  # fmt: skip
            over = found > 0.0
            stop = (tl.abs(found) <= 1e-7) | (over & (price >= end))
            by = found * (price - low_price) / tl.where(at_low == found, 1e-300, at_low - found)
            ahead = tl.minimum(price + tl.minimum(tl.maximum(1.2 * by, 0.1 * price), 10.0 * price), end)
            ahead = tl.where(ahead > price, ahead, end)
            at_high = tl.where(over & around & (side > 0), at_high * 0.5, at_high)
            at_low = tl.where((over == 0) & around & (side < 0), at_low * 0.5, at_low)
            low_price, high_price = tl.where(over, price, low_price), tl.where(over, high_price, price)
            at_low, at_high = tl.where(over, found, at_low), tl.where(over, at_high, found)
            side = tl.where(over, 1, -1)
            around = around | (over == 0)
            middle = (low_price * at_high - high_price * at_low) / tl.where(
                at_high == at_low, 1.0, at_high - at_low
            )
            inside = (middle > low_price) & (middle < high_price)
            middle = tl.where(inside, middle, low_price + (high_price - low_price) * 0.5)
            inside = (middle > low_price) & (middle < high_price)
            neighbours = around & (inside == 0)
            ahead = tl.where(around, tl.where(neighbours, high_price, middle), ahead)
            price = tl.where(stop, price, ahead)
            active = (stop | neighbours) == 0
            tries += 1
        tl.store(price_ptr + number, price)

        last = tl.load(head_ptr + 26).to(tl.int32)
        for begin in range(tl.load(head_ptr + 25).to(tl.int32), last, ROWS):
            row = begin + tl.arange(0, ROWS)[:, None]
            row_ptr, valid = table_ptr + row * 8, row < last
            a_ptr = tl.load(row_ptr, mask=valid, other=0).to(tl.pointer_type(tl.float32))
            moves = tl.load(row_ptr + 4, mask=valid, other=0) != 0
            mask = (offs < tl.load(row_ptr + 1, mask=valid, other=0)) & moves
            place = tl.load(row_ptr + 2, mask=valid, other=0) + offs
            a = tl.load(before_ptr + place, mask=mask, other=0.0)
            a -= price.to(tl.float32) * tl.load(q_ptr + place, mask=mask, other=0.0)
            tl.store(a_ptr + offs, tl.minimum(tl.maximum(a, -limit), limit), mask=mask)
        tl.debug_barrier()


Run = tuple[int, int, float]
"""First place, how many, and their weight."""


class Plan(NamedTuple):
    """The kinds of a budget as the kernel reads them, all but the addresses of the gates.

    Attributes:
        heads: (kinds, 32) int64: what `plan` says, and where the arrays of a kind begin.
        numbers: (kinds, 4) float64: constant, offset, unit, keep.
        ints, floats: int32 and float64: the arrays of all kinds.
        dists: (dists, 3) float32: shift, low and 1 / (high - low); the gates of a dist have them alike.
        dist_of: (gates,) int32.
        row, segment: gates of a row, and places of a run, at most.
        width, doubles: of the scratch.
    """

    heads: Tensor
    numbers: Tensor
    ints: Tensor
    floats: Tensor
    dists: Tensor
    dist_of: Tensor
    row: int
    segment: int
    width: int
    doubles: int


class _Arrays:
    """Arrays on their way into one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._parts: list[Tensor] = []
        self._dtype, self._end = dtype, 0

    def add(self, *arrays: Any) -> int:
        """Where the first of these begins."""
        place = self._end
        for array in arrays:
            self._parts.append(torch.as_tensor(array, dtype=self._dtype).flatten())
            self._end += len(self._parts[-1])
        return place

    def joined(self) -> Tensor:
        return torch.cat([*self._parts, torch.zeros(1, dtype=self._dtype)])


def _bounds(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)]


def _split(runs: Sequence[Run], longest: int) -> list[Run]:
    """Runs of up to `longest`."""
    return [
        (first + at, min(longest, count - at), weight)
        for first, count, weight in runs
        for at in range(0, count, longest)
    ]


def _pieces(sums: Sequence[Sequence[Run]], width: int) -> tuple[list[list[tuple[int, float]]], Tensor]:
    """Which sums read a piece, with what weights, and (width,) the piece of each place."""
    begins: dict[int, list[tuple[int, float]]] = {0: []}
    ends: dict[int, list[tuple[int, float]]] = {width: []}
    for k, runs in enumerate(sums):
        for first, count, weight in runs:
            begins.setdefault(first, []).append((k, weight))
            ends.setdefault(first + count, []).append((k, weight))
    known: dict[tuple[tuple[int, float], ...], int] = {}
    numbers, readers = [], Counter[tuple[int, float]]()
    places = sorted({*begins, *ends})
    for place in places[:-1]:
        readers.update(begins.get(place, []))
        readers.subtract(ends.get(place, []))
        readers = +readers
        numbers.append(known.setdefault(tuple(sorted(readers.elements())), len(known)))
    of = torch.tensor(numbers).repeat_interleave(torch.tensor(places).diff())
    return [[*each] for each in known], of


def _atoms(terms: CostTerms) -> tuple[list[int], list[int], int, list[Any]]:
    """Bounds of the levels, of atoms and of what they read; the number of factors; the arrays of both.

    A level reads gates and the levels before. Factors that are missing are a 1, or of what is open where one
    is, a 0.
    """
    n = terms.n
    factors = max([one.index.shape[1] for one in terms.atoms], default=1)
    depth, indices, are_any, place = torch.zeros(terms.width, dtype=torch.int64), [], [], n + 2
    for one in terms.atoms:
        depth[place : place + len(one.index)] = depth[one.index].amax(1) + 1
        pad = torch.full((len(one.index), factors - one.index.shape[1]), n + 1 if one.is_any else n)
        indices.append(torch.cat((one.index, pad), 1))
        are_any += [int(one.is_any)] * len(one.index)
        place += len(one.index)
    if not indices:
        return [0], [0], factors, [[], [], [], [], [0], []]
    order = depth[n + 2 :].argsort(stable=True)
    index = torch.cat(indices)[order]
    levels = _bounds(torch.bincount(depth[n + 2 :])[1:].tolist())
    values, sizes, entries, touched = [], [], [], [0]
    for first, last in pairwise(levels):
        own = index[first:last].flatten()
        entry = torch.arange(first * factors, last * factors)[(own != n) & (own != n + 1)]
        value, by_value = index.flatten()[entry].sort(stable=True)
        found, times = value.unique_consecutive(return_counts=True)
        values += found.tolist()
        sizes += times.tolist()
        entries += entry[by_value].tolist()
        touched.append(len(values))
    arrays = [order + n + 2, torch.tensor(are_any)[order], index, values, _bounds(sizes), entries]
    return levels, touched, factors, arrays


def row_of(sizes: Sequence[int]) -> int:
    """How many values in a row are read at once, of vectors of these sizes."""
    return min(max(32, triton.next_power_of_2(max(sizes))), 1024)


def plan(
    kinds: Sequence[Any],
    sums: Sequence[Sequence[Sequence[Run]]],
    dists: Sequence[tuple[float, float, float]],
    device: torch.device,
) -> Plan:
    """The plan of l0kernels.budget's kinds.

    Args:
        sums: of each kind, the runs of its linear part, then those of its sums.
        dists: of each gate vector of all kinds: shift, low and 1 / (high - low).
    """
    sizes = [size for kind in kinds for size in kind.sizes]
    row = row_of(sizes)
    longest = max([count for of in sums for runs in of for _, count, _ in runs], default=1)
    segment = row_of([longest])
    ints, floats = _Arrays(torch.int32), _Arrays(torch.float64)
    heads, numbers, width, doubles, start, rows = [], [], 0, 0, 0, 0
    for kind, of in zip(kinds, sums, strict=True):
        terms = kind.terms
        parts = [_split(runs, segment) for runs in of]
        flat = [run for runs in parts for run in runs]
        beside: list[list[tuple[int, float]]] = [[] for _ in of]
        pairs = terms.first.tolist(), terms.second.tolist(), terms.coefficient.tolist()
        for a, b, coefficient in zip(*pairs, strict=True):
            beside[a + 1].append((b + 1, coefficient))
            beside[b + 1].append((a + 1, coefficient))
        readers, piece_of = _pieces(of, terms.width)
        levels, touched, factors, (place, is_any, index, *read) = _atoms(terms)
        own_rows = sum(-(-size // row) for size in kind.sizes)
        heads.append(
            [
                start,
                terms.n,
                terms.width,
                max(map(len, readers)),
                len(flat),
                len(parts),
                max(map(len, parts)),
                ints.add([first for first, _, _ in flat]),
                ints.add([count for _, count, _ in flat]),
                ints.add(_bounds(map(len, parts))),
                max(map(len, beside)),
                ints.add([other for each in beside for other, _ in each]),
                ints.add(_bounds(map(len, beside))),
                len(readers),
                ints.add(_bounds(map(len, readers)), piece_of, [k for each in readers for k, _ in each]),
                len(levels) - 1,
                factors,
                ints.add(levels, touched),
                ints.add(place),
                ints.add(is_any),
                ints.add(index, *read),
                floats.add([weight for _, _, weight in flat]),
                floats.add([coefficient for each in beside for _, coefficient in each]),
                floats.add([weight for each in readers for _, weight in each]),
                kind.number,
                rows,
                rows + own_rows,
                *[0] * (_HEAD - 27),
            ]
        )
        numbers.append([terms.constant, kind.offset, kind.unit, kind.keep])
        width = max(width, terms.width)
        doubles = max(doubles, len(flat) + 2 * len(parts) + len(readers) + terms.width)
        start, rows = start + terms.n, rows + own_rows
    several = [*dict.fromkeys(dists)]
    of_vector = torch.tensor([several.index(one) for one in dists], dtype=torch.int32)
    return Plan(
        torch.tensor(heads).to(device),
        torch.tensor(numbers, dtype=torch.float64).to(device),
        ints.joined().to(device),
        floats.joined().to(device),
        torch.tensor(several, dtype=torch.float32).to(device),
        of_vector.repeat_interleave(torch.tensor(sizes)).to(device),
        row,
        segment,
        width,
        doubles,
    )


def _table_rows(log_alphas: list[Tensor], given: list[bool], moves: list[bool], row: int) -> list[int]:
    rows: list[int] = []
    start = in_grad = 0
    for log_alpha, has_grad, is_moving in zip(log_alphas, given, moves, strict=True):
        n, base = log_alpha.numel(), address(log_alpha)
        for at in range(0, n, row):
            place = in_grad + at if has_grad else -1
            rows += (base + 4 * at, min(row, n - at), start + at, place, int(is_moving), 0, 0, 0)
        start += n
        in_grad += n if has_grad else 0
    return rows


def step(
    of: Plan,
    log_alphas: list[Tensor],
    grads: list[Tensor | None],
    state: Any,
    ramp_steps: float,
    limit: float,
) -> None:
    """One step of l0kernels.budget's Projection, of log_alphas and state in place.

    Args:
        of: its kinds.
        log_alphas: contiguous float32, those of all kinds; those that require no gradient stay.
        grads: as log_alphas, None: 0.
        state: its State.
    """
    device, n = log_alphas[0].device, state.moment.numel()
    given = [grad is not None for grad in grads]
    moves = [log_alpha.requires_grad for log_alpha in log_alphas]
    sizes = [log_alpha.numel() for log_alpha in log_alphas]
    present = [grad.flatten() for grad in grads if grad is not None]
    grad = torch.cat(present) if len(present) > 1 else present[0] if present else state.moment
    key = ("budget", of.row, *sizes, *map(address, log_alphas), *given, *moves)
    table = device_table(key, device, lambda: _table_rows(log_alphas, given, moves, of.row))
    floats = torch.empty(3 * n + of.width, dtype=torch.float32, device=device)
    before, fresh, q, x = floats.split([n, n, n, of.width])
    high = struct.unpack("<f", struct.pack("<f", ramp_steps))[0]
    launch(
        _budget_kernel,
        (1,),
        table,
        grad,
        state.moment,
        state.first,
        state.price,
        state.step,
        state.skipped,
        of.heads,
        of.numbers,
        of.ints,
        of.floats,
        of.dists,
        of.dist_of,
        before,
        fresh,
        q,
        x,
        torch.empty(of.doubles, dtype=torch.float64, device=device),
        of.heads.shape[0],
        table.shape[0] // _COLUMNS,
        high,
        ramp_steps - high,
        limit,
        ROW=of.row,
        SEGMENT=of.segment,
        UNIFORM=of.dists.shape[0] == 1,
        TILE=_TILE,
        ATOMS=_ATOMS,
        SUMS=_SUMS,
        PARTS=_PARTS,
        num_warps=16,
        num_stages=1,
    )
