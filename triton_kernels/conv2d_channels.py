"""Pixels as rows of channels: selected, packed, spread out again and summed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Gate
from l0kernels._gates import round_up

from ._launch import address, cdiv, gpu, launch
from .conv2d_product import _factor
from .conv2d_tiles import _VEC
from .matmul import Operand, _extent
from .pack import _programs, pack, unpack

_SELECT_ROWS, _SELECT_COLS = 32, 128
_SUM_ROWS, _SUM_COLS = 64, 64


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


def as_rows(x: Tensor) -> Tensor:
    """The pixels of x (N, C, H, W) as rows (N H W, C): a view of channels_last memory, else a copy."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n * h * w, c)


def as_images(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    """The mirror of as_rows: (N, C, H, W), channels_last; no view to autograd, for users write into it."""
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2).data


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
    rows: Tensor, gate: Gate | None, packed: bool, dtype: torch.dtype, buffer: Tensor | None = None
) -> Operand:
    """Rows for a product: as it lies where it is packed already or has no gate; else packed or natural.

    ``buffer`` is what an earlier call with the same arguments packed.
    """
    if gate is None or packed:
        return Operand(_operand_rows(rows, dtype))
    always = rows.dtype != dtype or not _is_operand(rows)
    if buffer is None:
        buffer = pack(rows, None, gate, dtype, skip_plain=not always)
    return Operand(None if always else rows, buffer)


def bias_grads(
    dy: Tensor,
    bias: Tensor,
    gate: Gate | None,
    dy_gate: Gate | None,
    mode: int,
    dz: bool,
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
    parts = max(1, min(cdiv(2 * gpu(dy.device.index)[1], blocks), cdiv(rows, 256)))
    partial = torch.empty(parts, N, dtype=torch.float32, device=dy.device)
    z, index, count = gate or (None, None, None)
    launch(
        _channel_sums, (blocks, parts), dy, dy_gate and dy_gate[2], partial, rows, N, *dy.stride(),
        cdiv(rows, parts), HAS=dy_gate is not None, BLOCK_R=_SUM_ROWS, BLOCK_C=_SUM_COLS,
    )  # fmt: skip
    launch(
        _finish_bias, (blocks,), partial, db, bias, share, z, index, count, parts, N,
        HAS=gate is not None, MODE=mode, DZ=dz, NATURAL=dy_gate is None, BLOCK=_SUM_COLS,
    )  # fmt: skip
    return db, share


def pack_channels(x: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """The open channels of x (N, C, H, W) first, in ``dtype`` and channels_last memory, unscaled.

    Channels [0, open) in ascending order, zeros to the extent, beyond it nothing is written; where the gate
    is plain natural order, closed channels zero.
    """
    n, c, h, w = x.shape
    rows = as_rows(x)
    out = torch.empty(n * h * w, c, dtype=dtype, device=x.device)
    tiles = cdiv(rows.shape[0], _SELECT_ROWS) * cdiv(c, _SELECT_COLS)
    if tiles:
        launch(
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
