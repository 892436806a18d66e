"""pack: the open rows or columns of a matrix, times their gates. unpack: the mirror, with the gate gradient.

A gate is a list [z, index, count]; count = [open, extent] lives on the device, only the kernels read it. A
gate whose extent reaches its size is plain: its dimension keeps its natural order. Rows travel as whole
contiguous pieces. Where columns are gathered the tile is (columns, rows): the compiler then lays columns over
consecutive lanes, so that a warp meets few sectors of its ascending sources; transposed, through shared
memory, the tile meets the contiguous side in pieces of 16 bytes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import NO_GRADS, Gate, GateGrads
from l0kernels._gates import ALIGN, HardConcrete, round_up

from ._launch import cdiv, gpu, launch, per_gpu
from .hard_concrete import gate_slope

_GATHER_ROWS, _GATHER_COLS = 8, 256  # 16 independent loads in flight per thread with 4 warps
# How many programs of 4 warps an SM holds, by their registers: one wave, whose programs stride over the rows.
_RESIDENT, _RESIDENT_SCALED, _RESIDENT_DZ, _RESIDENT_DZ_ROWS = 8, 6, 4, 3
_COPY_TILE = 4096
_REDUCE_COLS = 32
_SUM_ROWS, _SUM_COLS = 32, 128


@triton.jit
def _read_gate(count_ptr, size):
    """Is it plain, how many positions hold a unit, and how many of the packed ones are read or written."""
    n_open = tl.load(count_ptr)
    extent = tl.load(count_ptr + 1)
    plain = extent >= size
    limit = tl.where(plain, size, n_open)
    return plain, limit, tl.cdiv(tl.minimum(extent, size), 128) * 128


@triton.jit
def _rank(index_ptr, n_open, capacity, value, SEARCH: tl.constexpr):
    """How many of index[:n_open], ascending, are below value: two vector loads, SEARCH**2 >= capacity."""
    lane = tl.arange(0, SEARCH)
    # Every entry may be read, so that the samples need not wait for the count.
    sample = tl.load(index_ptr + lane * SEARCH, mask=lane * SEARCH < capacity, other=0)
    n_below = tl.sum(((sample < value) & (lane * SEARCH < n_open)).to(tl.int32), 0)
    start = tl.maximum(n_below - 1, 0) * SEARCH
    segment = tl.load(index_ptr + start + lane, mask=start + lane < n_open, other=2147483647)
    return tl.where(n_below > 0, start + tl.sum((segment < value).to(tl.int32), 0), 0)


@triton.jit
def _fractional(z, FULL: tl.constexpr):
    """Where a gate gradient is wanted; a NaN gate has one."""
    if FULL:
        return z != 0.0
    return ~((z <= 0.0) | (z >= 1.0))


@triton.jit
def _store_scaled(value, held, z_r, z_c, target, mask, SCALE_ROWS: tl.constexpr, SCALE_COLS: tl.constexpr):
    """Stores value * z_r * z_c; exactly 0 where nothing is held, also beside a NaN gate."""
    if SCALE_ROWS or SCALE_COLS:
        value = value.to(tl.float32)
    if SCALE_ROWS:
        value = value * z_r
    if SCALE_COLS:
        value = value * z_c
    tl.store(target, tl.where(held, value, 0.0).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _pack_rows(
    full_ptr,  # (R, C) stride_fr * VEC, stride_fc
    packed_ptr,  # (Rcap, >= C) stride_p * VEC, 1
    z_ptr,
    index_ptr,
    count_ptr,
    R,
    C,  # C * VEC columns
    C_out,  # C_out * VEC columns are written, the last ones zero
    stride_fr,
    stride_fc,
    stride_p,
    HAS_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    SKIP_PLAIN: tl.constexpr,
    UNIT: tl.constexpr,  # stride_fc == 1
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    C, C_out = C * VEC, C_out * VEC
    plain, limit, extent = True, R, R
    if HAS_ROWS:
        plain, limit, extent = _read_gate(count_ptr, R)
    n_tiles_c = tl.cdiv(C_out, BLOCK_C)
    n_tiles = tl.cdiv(extent, BLOCK_R) * n_tiles_c
    if SKIP_PLAIN:
        n_tiles = tl.where(plain, 0, n_tiles)
    for tile in range(pid, n_tiles, tl.num_programs(0)):
        row = tile // n_tiles_c * BLOCK_R + tl.arange(0, BLOCK_R)
        col = tile % n_tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        unit = row
        if HAS_ROWS:
            unit = tl.where(plain, row, tl.load(index_ptr + row, mask=row < limit, other=0))
        mask = (row < limit)[:, None] & (col < C)[None, :]
        source = full_ptr + unit.to(tl.int64)[:, None] * stride_fr * VEC
        if UNIT:
            source = source + col[None, :]
        else:
            source = source + col.to(tl.int64)[None, :] * stride_fc
        value = tl.load(source, mask=mask, other=0.0)
        if SCALE:
            z = tl.load(z_ptr + unit, mask=row < limit, other=0.0)
            value = tl.where(mask, value.to(tl.float32) * z[:, None], 0.0)
        target = packed_ptr + row.to(tl.int64)[:, None] * stride_p * VEC + col[None, :]
        tl.store(
            target,
            value.to(packed_ptr.dtype.element_ty),
            mask=(row < extent)[:, None] & (col < C_out)[None, :],
        )


@triton.jit
def _pack_step(
    row,
    col,
    unit_c,
    z_c,
    full_ptr,
    packed_ptr,
    row_z_ptr,
    row_index_ptr,
    plain_r,
    limit_r,
    extent_r,
    limit_c,
    extent_c,
    stride_fr,
    stride_fc,
    stride_p,
    PLAIN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    UNIT: tl.constexpr,
    VEC: tl.constexpr,
):
    """One tile of _pack_cols, its columns in natural order or gathered."""
    # The few rows of padding read row 0: a mask by column alone leaves the gather enough predicates.
    unit_r, z_r = tl.where(row < limit_r, row, 0), 1.0
    if HAS_ROWS:
        unit_r = tl.where(plain_r, unit_r, tl.load(row_index_ptr + row, mask=row < limit_r, other=0))
    if SCALE_ROWS:
        z_r = tl.load(row_z_ptr + unit_r)[:, None]
    source = full_ptr + unit_r.to(tl.int64) * stride_fr * VEC
    if PLAIN:
        if not UNIT:
            col_offset = col.to(tl.int64)[None, :] * stride_fc
        else:
            col_offset = col[None, :]
        value = tl.load(source[:, None] + col_offset, mask=(col < limit_c)[None, :], other=0.0)
    else:
        if not UNIT:
            col_offset = unit_c.to(tl.int64)[:, None] * stride_fc
        else:
            col_offset = unit_c[:, None]
        value = tl.trans(tl.load(source[None, :] + col_offset, mask=(col < limit_c)[:, None], other=0.0))
    target = packed_ptr + row.to(tl.int64)[:, None] * stride_p + col[None, :]
    held = (row < limit_r)[:, None] & (col < limit_c)[None, :]
    mask = (row < extent_r)[:, None] & (col < extent_c)[None, :]
    _store_scaled(value, held, z_r, z_c, target, mask, SCALE_ROWS, SCALE_COLS)


@triton.jit
def _pack_cols(
    full_ptr,  # (R, C) stride_fr * VEC, stride_fc
    packed_ptr,  # (Rcap, Ccap) stride_p, 1
    row_z_ptr,
    row_index_ptr,
    row_count_ptr,
    col_z_ptr,
    col_index_ptr,
    col_count_ptr,
    R,
    C,  # C * VEC columns
    stride_fr,
    stride_fc,
    stride_p,
    HAS_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    SKIP_PLAIN: tl.constexpr,
    UNIT: tl.constexpr,  # stride_fc == 1
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n_programs = tl.num_programs(0)
    C = C * VEC
    plain_c, limit_c, extent_c = _read_gate(col_count_ptr, C)
    plain, plain_r, limit_r, extent_r = plain_c, True, R, R
    if HAS_ROWS:
        plain_r, limit_r, extent_r = _read_gate(row_count_ptr, R)
        plain = plain_c & plain_r
    # All programs share what is open: a program keeps a tile of columns and strides over the rows.
    n_tiles = tl.cdiv(extent_c, BLOCK_C)
    n_chunks = tl.maximum(n_programs // tl.maximum(n_tiles, 1), 1)
    n_steps = tl.cdiv(extent_r, BLOCK_R)
    n_items = n_tiles * n_chunks
    if SKIP_PLAIN:
        n_items = tl.where(plain, 0, n_items)
    for item in range(tl.program_id(0), n_items, n_programs):
        start = item % n_tiles * BLOCK_C
        col = start + tl.arange(0, BLOCK_C)
        unit_c = tl.load(col_index_ptr + col, mask=(col < limit_c) & (plain_c == 0), other=0)
        unit_c = tl.where(plain_c, col, unit_c)
        z_c = 1.0
        if SCALE_COLS:
            z_c = tl.load(col_z_ptr + unit_c, mask=col < limit_c, other=0.0)[None, :]
        if plain_c:
            for step in range(item // n_tiles, n_steps, n_chunks):
                _pack_step(
                    step * BLOCK_R + tl.arange(0, BLOCK_R), col, unit_c, z_c,
                    full_ptr, packed_ptr, row_z_ptr, row_index_ptr,
                    plain_r, limit_r, extent_r, C, extent_c, stride_fr, stride_fc, stride_p,
                    True, HAS_ROWS, SCALE_ROWS, SCALE_COLS, UNIT, VEC,
                )  # fmt: skip
        else:
            for step in range(item // n_tiles, n_steps, n_chunks):
                _pack_step(
                    step * BLOCK_R + tl.arange(0, BLOCK_R), col, unit_c, z_c,
                    full_ptr, packed_ptr, row_z_ptr, row_index_ptr,
                    plain_r, limit_r, extent_r, limit_c, extent_c, stride_fr, stride_fc, stride_p,
                    False, HAS_ROWS, SCALE_ROWS, SCALE_COLS, UNIT, VEC,
                )  # fmt: skip


@triton.jit
def _unpack_rows(
    packed_ptr,  # (>= open, >= C) stride_p * VEC, 1
    full_ptr,  # (R, C) stride_f * VEC, 1
    theta_ptr,  # (R, C) stride_tr * VEC, stride_tc
    dz_ptr,  # (R,), or (n_chunks, R) partial sums
    z_ptr,
    index_ptr,
    count_ptr,
    R,
    C,  # C * VEC columns
    stride_p,
    stride_f,
    stride_tr,
    stride_tc,
    n_chunks,  # programs that share the columns
    HAS_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    DZ: tl.constexpr,
    FULL: tl.constexpr,
    SKIP_PLAIN: tl.constexpr,
    UNIT: tl.constexpr,  # stride_tc == 1
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = pid % n_chunks
    C = C * VEC
    row = pid // n_chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < R
    unit, filled, live, wanted, write = row, inside, inside, inside, True
    z = tl.full((BLOCK_R,), 1.0, tl.float32)
    # The index holds the closed units behind the open ones: every row of the result is written once.
    if HAS_ROWS:
        plain, limit, _ = _read_gate(count_ptr, R)
        filled = row < limit  # known before z: the loads of the matrix need not wait for it
        unit = tl.where(plain, row, tl.load(index_ptr + row, mask=inside, other=0))
        z = tl.load(z_ptr + unit, mask=inside, other=0.0)
        live = filled & (z != 0.0)
        wanted = live & _fractional(z, FULL)
        if SKIP_PLAIN:
            write = plain == 0
    n_tiles = tl.cdiv(C, BLOCK_C)
    if SKIP_PLAIN and not DZ:
        n_tiles = tl.where(write, n_tiles, 0)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for tile in range(chunk, n_tiles, n_chunks):
        col = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        source = packed_ptr + row.to(tl.int64)[:, None] * stride_p * VEC + col[None, :]
        value = tl.load(source, mask=filled[:, None] & (col < C)[None, :], other=0.0)
        if DZ:
            where = theta_ptr + unit.to(tl.int64)[:, None] * stride_tr * VEC
            if UNIT:
                where = where + col[None, :]
            else:
                where = where + col.to(tl.int64)[None, :] * stride_tc
            theta = tl.load(where, mask=wanted[:, None] & (col < C)[None, :], other=0.0)
            acc += value.to(tl.float32) * theta.to(tl.float32)
        target = full_ptr + unit.to(tl.int64)[:, None] * stride_f * VEC + col[None, :]
        mask = inside[:, None] & (col < C)[None, :] & write
        _store_scaled(value, live[:, None], z[:, None], 1.0, target, mask, SCALE, False)
    if DZ:
        dz = tl.where(wanted, tl.sum(acc, 1), 0.0)
        tl.store(dz_ptr + chunk.to(tl.int64) * R + unit, dz, mask=inside)


@triton.jit
def _unpack_step(
    acc,
    first,
    col,
    place,
    z_c,
    packed_ptr,
    full_ptr,
    theta_ptr,
    dz_row_ptr,
    row_z_ptr,
    row_index_ptr,
    plain_r,
    limit_r,
    write,
    R,
    C,
    stride_p,
    stride_f,
    stride_tr,
    stride_tc,
    PLAIN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DZ_COLS: tl.constexpr,
    FULL_ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of _unpack_cols, its columns in natural order or gathered; the sums of dz_col so far."""
    row = first + tl.arange(0, BLOCK_R)
    inside = row < R
    filled = row < limit_r  # known before z: the loads of the matrices need not wait for it
    open_c = z_c != 0.0
    # In a tile with any packed row the others read row 0: a mask by column alone leaves the gather enough
    # predicates. Where no row is packed nothing is read.
    source = packed_ptr + tl.where(filled, row, 0).to(tl.int64) * stride_p
    some = first < limit_r
    if PLAIN:
        value = tl.load(source[:, None] + col[None, :], mask=((col < C) & some)[None, :], other=0.0)
    else:
        value = tl.load(source[None, :] + place[:, None], mask=(open_c & some)[:, None], other=0.0)
    unit, live, z_r = row, inside, 1.0
    # The index holds the closed units behind the open ones: every row of the result is written once.
    if HAS_ROWS:
        unit = tl.where(plain_r, row, tl.load(row_index_ptr + row, mask=inside, other=0))
        z_r = tl.load(row_z_ptr + unit, mask=inside, other=0.0)
        live = filled & (z_r != 0.0)
        wanted = live & _fractional(z_r, FULL_ROWS)
        z_r = z_r[:, None]
    unit = unit.to(tl.int64)
    held = live[:, None] & open_c[None, :]
    if DZ_ROWS or DZ_COLS:
        # Before the transposition, a barrier, so that both loads are in flight.
        read = filled
        if not DZ_COLS:
            read = wanted
        where = theta_ptr + unit[:, None] * stride_tr * VEC
        if UNIT:
            where = where + col[None, :]
        else:
            where = where + col.to(tl.int64)[None, :] * stride_tc
        theta = tl.load(where, mask=read[:, None] & (col < C)[None, :], other=0.0)
    if not PLAIN:
        value = tl.trans(value)
    if DZ_ROWS or DZ_COLS:
        terms = tl.where(held, value.to(tl.float32) * theta.to(tl.float32), 0.0)
        if DZ_ROWS:
            weighted = terms
            if SCALE_COLS:
                weighted = tl.where(held, terms * z_c[None, :], 0.0)
            tl.store(dz_row_ptr + unit, tl.where(wanted, tl.sum(weighted, 1), 0.0), mask=inside)
        if DZ_COLS:
            if SCALE_ROWS:
                terms = tl.where(held, terms * z_r, 0.0)
            acc += terms
    target = full_ptr + unit[:, None] * stride_f * VEC + col[None, :]
    mask = inside[:, None] & (col < C)[None, :] & write
    _store_scaled(value, held, z_r, z_c[None, :], target, mask, SCALE_ROWS, SCALE_COLS)
    return acc


@triton.jit
def _unpack_cols(
    packed_ptr,  # (>= open, >= open) stride_p, 1
    full_ptr,  # (R, C) stride_f * VEC, 1
    theta_ptr,  # (R, C) stride_tr * VEC, stride_tc
    dz_row_ptr,  # (R,), or (n_tiles, R) partial sums
    dz_col_ptr,  # (C,), or (n_chunks, C) partial sums
    row_z_ptr,
    row_index_ptr,
    row_count_ptr,
    col_z_ptr,
    col_index_ptr,
    col_count_ptr,
    R,
    C,  # C * VEC columns
    capacity,  # of col_index
    stride_p,
    stride_f,
    stride_tr,
    stride_tc,
    n_chunks,  # programs that share the rows
    HAS_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    DZ_ROWS: tl.constexpr,
    DZ_COLS: tl.constexpr,
    FULL_ROWS: tl.constexpr,
    FULL_COLS: tl.constexpr,
    SKIP_PLAIN: tl.constexpr,
    UNIT: tl.constexpr,  # stride_tc == 1
    VEC: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = C * VEC
    n_tiles = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) % n_tiles
    chunk = tl.program_id(0) // n_tiles
    plain_c, limit_c, _ = _read_gate(col_count_ptr, C)
    plain, plain_r, limit_r = plain_c, True, R
    if HAS_ROWS:
        plain_r, limit_r, _ = _read_gate(row_count_ptr, R)
        plain = plain_c & plain_r
    write = True
    n_steps = tl.cdiv(R, BLOCK_R)
    if SKIP_PLAIN:
        write = plain == 0
        if not DZ_ROWS and not DZ_COLS:
            n_steps = tl.where(write, n_steps, 0)

    start = tile * BLOCK_C
    col = start + tl.arange(0, BLOCK_C)
    z_c = tl.load(col_z_ptr + col, mask=col < C, other=0.0)
    before = _rank(col_index_ptr, limit_c, capacity, start, SEARCH)
    place = before + tl.cumsum((z_c != 0.0).to(tl.int32), 0) - 1
    dz_row_tile_ptr = dz_row_ptr
    if DZ_ROWS:
        dz_row_tile_ptr += tile.to(tl.int64) * R
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if plain_c:
        for step in range(chunk, n_steps, n_chunks):
            acc = _unpack_step(
                acc, step * BLOCK_R, col, place, z_c, packed_ptr, full_ptr, theta_ptr,
                dz_row_tile_ptr, row_z_ptr, row_index_ptr, plain_r, limit_r, write, R, C,
                stride_p, stride_f, stride_tr, stride_tc,
                True, HAS_ROWS, SCALE_ROWS, SCALE_COLS, DZ_ROWS, DZ_COLS, FULL_ROWS, UNIT, VEC, BLOCK_R,
            )  # fmt: skip
    else:
        for step in range(chunk, n_steps, n_chunks):
            acc = _unpack_step(
                acc, step * BLOCK_R, col, place, z_c, packed_ptr, full_ptr, theta_ptr,
                dz_row_tile_ptr, row_z_ptr, row_index_ptr, plain_r, limit_r, write, R, C,
                stride_p, stride_f, stride_tr, stride_tc,
                False, HAS_ROWS, SCALE_ROWS, SCALE_COLS, DZ_ROWS, DZ_COLS, FULL_ROWS, UNIT, VEC, BLOCK_R,
            )  # fmt: skip
    if DZ_COLS:
        # One row of two dimensions: the layout of the matrix, not one that the loads of z would share.
        wanted = ((z_c != 0.0) & _fractional(z_c, FULL_COLS))[None, :]
        dz_col = tl.where(wanted, tl.sum(acc, 0, keep_dims=True), 0.0)
        tl.store(dz_col_ptr + chunk.to(tl.int64) * C + col[None, :], dz_col, mask=(col < C)[None, :])


@triton.jit
def _reduce(
    first_ptr,  # (P, >= size) stride_p, 1
    second_ptr,  # the same
    first_out_ptr,  # (size,)
    second_out_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    P,
    size,
    stride_p,
    inv_beta,
    gamma,
    zeta,
    HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr,  # the columns are the gate's positions, else units
    DZ: tl.constexpr,  # the first sum is a gate gradient
    OVER_Z: tl.constexpr,  # with z in it
    DLOG: tl.constexpr,  # wanted is that of log_alpha
    FULL: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    unit, filled, live, wanted = place, inside, inside, inside
    if HAS_GATE:
        if PACKED:
            plain, limit, _ = _read_gate(count_ptr, size)
            unit = tl.where(plain, place, tl.load(index_ptr + place, mask=inside, other=0))
            filled = place < limit
        z = tl.load(z_ptr + unit, mask=inside, other=0.0)
        live = filled & (z != 0.0)
        wanted = live
        if DZ:
            wanted = live & _fractional(z, FULL)
    acc = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    other = tl.zeros((BLOCK_P, BLOCK), dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        mask = (row < P)[:, None] & filled[None, :]
        offset = row.to(tl.int64)[:, None] * stride_p + place[None, :]
        acc += tl.load(first_ptr + offset, mask=mask, other=0.0)
        if HAS_SECOND:
            other += tl.load(second_ptr + offset, mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if OVER_Z:
        total = total / tl.where(z != 0.0, z, 1.0)
    if DLOG:
        total = total * gate_slope(z, inv_beta, gamma, zeta)
    total = tl.where(wanted, total, 0.0)
    tl.store(first_out_ptr + unit, total.to(first_out_ptr.dtype.element_ty), mask=inside)
    if HAS_SECOND:
        total = tl.where(live, tl.sum(other, 0), 0.0)
        tl.store(second_out_ptr + unit, total.to(second_out_ptr.dtype.element_ty), mask=inside)


@per_gpu
def _programs(device: torch.device, resident: int = _RESIDENT) -> int:
    """How many programs fill the device."""
    return gpu(device.index)[1] * resident


def _copy_blocks(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile that is copied whole."""
    block_c = min(max(triton.next_power_of_2(columns), 16), 1024)
    return _COPY_TILE // block_c, block_c


def _search(size: int) -> int:
    """The width of the two-level search, one of few values."""
    width = 128
    while width * width < size:
        width *= 4
    return width


def pack(
    full: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    skip_plain: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The open rows and columns of ``full``, times their gates where asked (in fp32), in ``dtype``.

    Args:
        full: (R, C), any strides; a unit column stride is the fast case.
        rows, cols: the gate of a dimension, or None.
        scale_rows, scale_cols: multiply by z.
        skip_plain: where every gate given is plain and nothing is scaled, leave the buffer alone: the
            consumer reads ``full``. Decided on the device. Without any gate the buffer is always written.
        out: where to write, of the shape returned, with unit column stride.

    Returns:
        (round_up(R, 128) or R, round_up(C, 128) or C rounded up to 16 bytes), row-major: a gated dimension is
        rounded to 128. Zeros from the open units to the extent and in an ungated dimension's padding;
        beyond an extent nothing is written.
    """
    n_rows, n_cols = full.shape
    scale_rows, scale_cols = scale_rows and rows is not None, scale_cols and cols is not None
    if out is None:
        capacity_r = n_rows if rows is None else round_up(n_rows)
        capacity_c = round_up(n_cols, 16 // dtype.itemsize if cols is None else ALIGN)
        out = torch.empty(capacity_r, capacity_c, dtype=dtype, device=full.device)
    if not n_rows or not n_cols:
        return out
    stride_r, stride_c = full.stride()
    unit = stride_c == 1 or n_cols == 1
    skip = skip_plain and not scale_rows and not scale_cols and not (rows is None and cols is None)
    z_r, index_r, count_r = rows or (None, None, None)
    if cols is None:
        vec = math.gcd(8, n_cols, stride_r, out.shape[1], out.stride(0))
        block_r, block_c = _copy_blocks(n_cols)
        n_tiles = cdiv(out.shape[0], block_r) * cdiv(out.shape[1], block_c)
        launch(
            _pack_rows,
            (min(n_tiles, 2 * _programs(full.device)),),
            full, out, z_r, index_r, count_r,
            n_rows, n_cols // vec, out.shape[1] // vec, stride_r // vec, stride_c, out.stride(0) // vec,
            HAS_ROWS=rows is not None, SCALE=scale_rows, SKIP_PLAIN=skip, UNIT=unit, VEC=vec,
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        return out
    z_c, index_c, count_c = cols
    vec = math.gcd(8, n_cols, stride_r)
    n_tiles = cdiv(out.shape[0], _GATHER_ROWS) * cdiv(out.shape[1], _GATHER_COLS)
    programs = _programs(full.device, _RESIDENT_SCALED if scale_rows and scale_cols else _RESIDENT)
    launch(
        _pack_cols,
        (min(n_tiles, programs),),
        full, out, z_r, index_r, count_r, z_c, index_c, count_c,
        n_rows, n_cols // vec, stride_r // vec, stride_c, out.stride(0),
        HAS_ROWS=rows is not None, SCALE_ROWS=scale_rows, SCALE_COLS=scale_cols, SKIP_PLAIN=skip,
        UNIT=unit, VEC=vec,
        BLOCK_R=_GATHER_ROWS, BLOCK_C=_GATHER_COLS, num_warps=4,
    )  # fmt: skip
    return out


def unpack(
    packed: Tensor,
    shape: tuple[int, int],
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    grads: GateGrads = NO_GRADS,
    out: Tensor | None = None,
    skip_plain: bool = False,
    dist: HardConcrete | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix of ``shape`` with ``packed`` in its open rows and columns, times the gates; gate gradients.

    ``dz_rows[i] = sum_j packed * theta * (z_j if scale_cols)`` where 0 < z_i < 1 (z_i != 0 with full_rows),
    else exactly 0; columns likewise. The sums are in fp32, in an order that does not vary.

    Args:
        packed: at least the open rows and columns, unit column stride; what is closed is not read.
        grads: the gate gradients; theta (R, C) may have any strides.
        out: where to write, (R, C) with unit column stride.
        skip_plain: where every gate given is plain, leave ``out`` alone: the product wrote it. The gate
            gradients come from ``packed`` all the same.
        dist: makes the gate gradients those of log_alpha.

    Returns:
        the matrix in ``dtype``, and dz (R,) and (C,), fp32, None where not asked for or without a gate.
    """
    n_rows, n_cols = shape
    device = packed.device
    scale_rows, scale_cols = scale_rows and rows is not None, scale_cols and cols is not None
    theta, dz_rows, dz_cols, full_rows, full_cols = grads
    dz_rows = dz_rows and rows is not None and theta is not None
    dz_cols = dz_cols and cols is not None and theta is not None
    skip = skip_plain and not (rows is None and cols is None)
    if out is None:
        out = torch.empty(n_rows, n_cols, dtype=dtype, device=device)
    if not n_rows or not n_cols:
        nothing = torch.zeros(n_rows + n_cols, dtype=torch.float32, device=device)
        return out, nothing[:n_rows] if dz_rows else None, nothing[n_rows:] if dz_cols else None
    stride_tr, stride_tc = theta.stride() if theta is not None else (0, 1)
    unit = stride_tc == 1 or n_cols == 1
    z_r, index_r, count_r = rows or (None, None, None)
    if cols is None:
        vec = math.gcd(8, n_cols, out.stride(0), packed.stride(0), stride_tr)
        block_r, block_c = _copy_blocks(n_cols)
        n_steps = cdiv(n_rows, block_r)
        # A program takes whole rows and finishes their dz, unless that leaves the device idle.
        n_chunks = min(cdiv(n_cols, block_c), cdiv(_programs(device), n_steps))
        part_r = torch.empty(n_chunks, n_rows, dtype=torch.float32, device=device) if dz_rows else None
        launch(
            _unpack_rows,
            (n_steps * n_chunks,),
            packed, out, theta, part_r, z_r, index_r, count_r,
            n_rows, n_cols // vec, packed.stride(0) // vec, out.stride(0) // vec, stride_tr // vec, stride_tc,
            n_chunks,
            HAS_ROWS=rows is not None, SCALE=scale_rows, DZ=dz_rows, FULL=full_rows, SKIP_PLAIN=skip,
            UNIT=unit, VEC=vec, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        return out, _total(part_r, rows, dist), None
    z_c, index_c, count_c = cols
    vec = math.gcd(8, n_cols, out.stride(0), stride_tr)
    n_tiles = cdiv(n_cols, _GATHER_COLS)
    resident = _RESIDENT_DZ_ROWS if dz_rows else _RESIDENT_DZ if dz_cols else _RESIDENT
    n_chunks = min(max(_programs(device, resident) // n_tiles, 1), cdiv(n_rows, _GATHER_ROWS))
    part_r = torch.empty(n_tiles, n_rows, dtype=torch.float32, device=device) if dz_rows else None
    part_c = torch.empty(n_chunks, n_cols, dtype=torch.float32, device=device) if dz_cols else None
    launch(
        _unpack_cols,
        (n_tiles * n_chunks,),
        packed, out, theta, part_r, part_c, z_r, index_r, count_r, z_c, index_c, count_c,
        n_rows, n_cols // vec, index_c.shape[0],
        packed.stride(0), out.stride(0) // vec, stride_tr // vec, stride_tc, n_chunks,
        HAS_ROWS=rows is not None, SCALE_ROWS=scale_rows, SCALE_COLS=scale_cols, DZ_ROWS=dz_rows,
        DZ_COLS=dz_cols, FULL_ROWS=full_rows, FULL_COLS=full_cols, SKIP_PLAIN=skip,
        UNIT=unit, VEC=vec, SEARCH=_search(index_c.shape[0]),
        BLOCK_R=_GATHER_ROWS, BLOCK_C=_GATHER_COLS, num_warps=4,
    )  # fmt: skip
    return out, _total(part_r, rows, dist), _total(part_c, cols, dist)


def _total(partial: Tensor | None, gate: Gate | None, dist: HardConcrete | None) -> Tensor | None:
    """Gate gradients in natural order from their partial sums; one row of those is the sum itself."""
    if partial is None or gate is None:
        return None
    if partial.shape[0] == 1 and dist is None:
        return partial[0]
    out = torch.empty(partial.shape[1], dtype=torch.float32, device=partial.device)
    _launch_reduce(partial, None, out, None, gate, False, True, True, dist, False)
    return out


def reduce_partials(
    partial: Tensor,
    gate: Gate | None,
    size: int,
    *,
    dz: bool,
    full: bool = False,
    over_z: bool = False,
    dist: HardConcrete | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Column sums of ``partial``, packed as ``gate`` is, in the order of the units; 0 for closed ones.

    Args:
        partial: (P, >= size or capacity) fp32, unit column stride; beyond the open columns it is not read.
        gate: None where the columns are the units.
        dz: the sum is a gate gradient: 0 also where z is not fractional, unless ``full``.
        over_z: the gradient is the sum divided by z.
        dist: makes it the gradient of log_alpha.

    Returns:
        (size,) in ``dtype``; summed in fp32, in an order that does not vary.
    """
    out = torch.empty(size, dtype=dtype, device=partial.device)
    _launch_reduce(partial, None, out, None, gate, gate is not None, dz, full, dist, over_z)
    return out


def reduce_partials2(
    dz_partial: Tensor,
    db_partial: Tensor,
    gate: Gate,
    size: int,
    *,
    full: bool = False,
    over_z: bool = False,
    dist: HardConcrete | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """reduce_partials of a gate gradient (fp32) and of a bias gradient (``dtype``), in one launch.

    Both partials have the same shape and strides.
    """
    dz = torch.empty(size, dtype=torch.float32, device=dz_partial.device)
    db = torch.empty(size, dtype=dtype, device=dz_partial.device)
    _launch_reduce(dz_partial, db_partial, dz, db, gate, True, True, full, dist, over_z)
    return dz, db


def _launch_reduce(
    first: Tensor,
    second: Tensor | None,
    first_out: Tensor,
    second_out: Tensor | None,
    gate: Gate | None,
    packed: bool,
    dz: bool,
    full: bool,
    dist: HardConcrete | None = None,
    over_z: bool = False,
) -> None:
    size = first_out.shape[0]
    if not size:
        return
    z, index, count = gate or (None, None, None)
    constants = (0.0, 0.0, 0.0) if dist is None else (1.0 / dist.beta, dist.gamma, dist.zeta)
    launch(
        _reduce,
        (cdiv(size, _REDUCE_COLS),),
        first, second, first_out, second_out, z, index, count, first.shape[0], size, first.stride(0),
        *constants,
        HAS_GATE=gate is not None, PACKED=packed, DZ=dz, OVER_Z=over_z, DLOG=dist is not None, FULL=full,
        HAS_SECOND=second is not None,
        BLOCK_P=16 if first.shape[0] <= 16 else 64, BLOCK=_REDUCE_COLS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _column_sums(
    ptr, partial_ptr, M, N, stride_m, stride_n, rows,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (programs of axis 1, N): sums of `rows` rows each."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = c if UNIT else c.to(tl.int64) * stride_n
    for row in range(first, last, BLOCK_M):
        r = row + tl.arange(0, BLOCK_M)
        mask = (r < last)[:, None] & (c < N)[None, :]
        acc += tl.load(ptr + r.to(tl.int64)[:, None] * stride_m + at[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(partial_ptr + tl.program_id(1) * N + c, tl.sum(acc, 0), mask=c < N)


def column_sums(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the columns of t (M, N), a bias gradient, in ``dtype``: two launches, fp32, one order."""
    M, N = t.shape
    out = torch.empty(N, dtype=dtype, device=t.device)
    if not M:
        return out.zero_()
    blocks = cdiv(N, _SUM_COLS)
    parts = max(1, min(_programs(t.device) // max(blocks, 1), cdiv(M, _SUM_ROWS)))
    partial = torch.empty(parts, N, dtype=torch.float32, device=t.device)
    if N:
        launch(
            _column_sums, (blocks, parts), t, partial, M, N, t.stride(0), t.stride(1), cdiv(M, parts),
            UNIT=t.stride(1) == 1, BLOCK_M=_SUM_ROWS, BLOCK_N=_SUM_COLS,
        )  # fmt: skip
        _launch_reduce(partial, None, out, None, None, False, False, False)
    return out
