"""One product for all layers: packed or natural operands, extents read on the device, fused epilogues.

    C (M, N) = epilogue(A (M, K) B (K, N))

Any of M, N, K may be gated. Then its extent is count[1] of the gate, known to the device alone, and positions
are packed (position j is unit index[j]) or, where the gate is plain (count[1] >= size), natural. An operand
whose gates are all plain is read where it lies; else from its packed buffer: the kernel takes the pointer.

Programs are persistent. Operands come through TMA descriptors made on the device, for their shape is the
extent; where a stride is no multiple of 16 bytes or the GPU has no TMA, through pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Gate

from ._launch import cdiv, gpu, launch
from .activation import act, act_grad

LAYOUTS = ("nt", "nn", "tn")
"""How A and B are stored: nt A (M, K), B (N, K); nn A (M, K), B (K, N); tn A (K, M), B (K, N)."""


class Operand(NamedTuple):
    """A matrix in natural order and in its packed buffer; None where it has no such form."""

    full: Tensor | None = None
    packed: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """One of the two."""
        some = self.packed if self.full is None else self.full
        assert some is not None
        return some


_ABSENT = Operand()


class Epilogue(NamedTuple):
    """What follows a product, with z and bias those of the column's unit.

    Kinds:
        linear    C = (A B + bias) * z * z_m, the factors that scale_n and scale_m ask for
        act       C = act(v) * z, v = A B + bias; ``saved``, if given, gets act'(v) * z
        glu       C = act(v) * v2 * z, v2 the product with the second half of B; ``saved`` gets the factors of
                  the gradients of v and of v2, act'(v) * v2 * z and act(v) * z, in two halves
        grad      C = A B * saved; for relu * z where ``hidden`` is not 0; for identity * z.
                  partial[0] gets the sums of A B * hidden over the rows of a tile (dz, or z dz where hidden
                  has z in it), partial[1] those of C (db)
        glu_grad  C in two halves, A B times the halves of ``saved``; partial[1] and partial[2] their sums

    Attributes:
        scatter: C is natural and takes row j of the product as its row index[j]; closed rows become 0.
        partial: (2 or 3, tiles of M, capacity of N) float32; ``dz``, ``db``: which of it are wanted.
    """

    kind: str = "linear"
    activation: str = "identity"
    bias: Tensor | None = None
    scale_m: bool = False
    scale_n: bool = False
    scatter: bool = False
    saved: Tensor | None = None
    hidden: Operand = _ABSENT
    partial: Tensor | None = None
    dz: bool = False
    db: bool = False


LINEAR = Epilogue()


class Halves(NamedTuple):
    """Operands of two halves: how far they are apart.

    Attributes:
        k: 2 for a K of two halves, ``a`` columns and ``b`` rows (natural, packed) apart; a GLU has ``b``.
        c, saved: columns from one half to the other.
    """

    k: int = 1
    a: tuple[int, int] = (0, 0)
    b: tuple[int, int] = (0, 0)
    c: int = 0
    saved: int = 0


WHOLE = Halves()


class Config(NamedTuple):
    """A tile and how it is computed."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SUBTILES: int = 1
    FLATTEN: bool = True
    CTAS: int = 1
    """Programs per multiprocessor: with two, one's epilogue runs beside the other's products."""


@triton.jit
def _extent(count_ptr, size, HAS: tl.constexpr):
    """(positions to compute, open positions, plain) of a dimension of `size` units."""
    if HAS:
        n_open = tl.load(count_ptr)
        extent = tl.multiple_of(tl.load(count_ptr + 1), 128)  # masks of packed operands keep copies wide
        plain = extent >= size
        return tl.where(plain, size, extent), tl.where(plain, size, n_open), plain
    else:
        return size, size, True


@triton.jit
def _pick(full, packed, plain, FORM: tl.constexpr):
    """What belongs to the form of an operand that is read or written: 0 natural, 1 packed, 2 by ``plain``."""
    if FORM == 0:
        return full
    else:
        if FORM == 1:
            return packed
        else:
            return tl.where(plain, full, packed)


@triton.jit
def _load(
    desc, ptr, stride, row, col, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """Tile (ROWS, COLS) at (row, col), zero outside (n_rows, n_cols)."""
    if TMA:
        return desc.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, COLS)
        at = ptr + r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(at, mask=(r < n_rows)[:, None] & (c < n_cols)[None, :], other=0.0)


@triton.jit
def _store(desc, ptr, stride, value, row, col, r, row_mask, n_cols, COLS: tl.constexpr, TMA: tl.constexpr):
    """`value` to the tile at (row, col); by pointers, to the rows r."""
    value = value.to(ptr.dtype.element_ty)
    if TMA:
        desc.store([row, col], value)
    else:
        c = col + tl.arange(0, COLS)
        at = ptr + r.to(tl.int64)[:, None] * stride + c[None, :]
        tl.store(at, value, mask=row_mask[:, None] & (c < n_cols)[None, :])


@triton.jit
def _part(acc, PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Part PART of PARTS (1, 2 or 4) of the columns of acc (ROWS, PARTS COLS)."""
    if PARTS == 1:
        return acc
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, PARTS // 2 * COLS)), (0, 2, 1)))
        if PART < PARTS // 2:
            return _part(left, PART, PARTS // 2, ROWS, COLS)
        else:
            return _part(right, PART - PARTS // 2, PARTS // 2, ROWS, COLS)


@triton.jit
def _epilogue(
    acc, acc2, row, col, pid_m, r, row_mask, n_rows, z_m,
    c_desc, c_ptr, stride_c, c_cols, s_desc, s_ptr, stride_s, half_s, half_c, h_desc, h_ptr, stride_h,
    n_index_ptr, n_z_ptr, bias_ptr, half_bias, n_open, n_plain, partial_ptr, stride_partial, partial_plane,
    HAS_N: tl.constexpr, EPILOGUE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_M: tl.constexpr, SCALE_N: tl.constexpr, SAVE: tl.constexpr, DZ: tl.constexpr, DB: tl.constexpr,
    STORE_TMA: tl.constexpr, SAVED_TMA: tl.constexpr, HIDDEN_TMA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What follows the product, for one tile or a part of its columns."""
    c = col + tl.arange(0, COLS)
    is_open = c < n_open
    unit = c
    if HAS_N:
        unit = tl.where(n_plain, c, tl.load(n_index_ptr + c, mask=is_open, other=0))
    if SCALE_N:
        z = tl.load(n_z_ptr + unit, mask=is_open, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + unit, mask=is_open, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE == "glu":
            acc2 += tl.load(bias_ptr + half_bias + unit, mask=is_open, other=0.0).to(tl.float32)[None, :]

    if EPILOGUE == "act" or EPILOGUE == "glu":
        if HAS_N:
            # A closed unit is 0 whatever it computed: its z is 0, and 0 times this 0 is 0 for any activation.
            live = is_open
            if SCALE_N:
                live = z != 0.0
            acc = tl.where(live[None, :], acc, 0.0)
            if EPILOGUE == "glu":
                acc2 = tl.where(live[None, :], acc2, 0.0)
        h = act(acc, ACT)
        if SAVE:
            slope = act_grad(acc, ACT)
            if EPILOGUE == "glu":
                slope *= acc2
                d_up = h
                if SCALE_N:
                    d_up *= z[None, :]
                _store(
                    s_desc,
                    s_ptr,
                    stride_s,
                    d_up,
                    row,
                    col + half_s,
                    r,
                    row_mask,
                    c_cols + half_s,
                    COLS,
                    SAVED_TMA,
                )
            if SCALE_N:
                slope *= z[None, :]
            elif HAS_N:
                slope = tl.where(is_open[None, :], slope, 0.0)
            _store(s_desc, s_ptr, stride_s, slope, row, col, r, row_mask, c_cols, COLS, SAVED_TMA)
        if EPILOGUE == "glu":
            h *= acc2
        if SCALE_N:
            h *= z[None, :]
        _store(c_desc, c_ptr, stride_c, h, row, col, r, row_mask, c_cols, COLS, STORE_TMA)
    elif EPILOGUE == "grad" or EPILOGUE == "glu_grad":
        if DZ or ACT == "relu":
            h = _load(h_desc, h_ptr, stride_h, row, col, n_rows, c_cols, ROWS, COLS, HIDDEN_TMA).to(
                tl.float32
            )
        if DZ:
            at = partial_ptr + pid_m.to(tl.int64) * stride_partial + c
            tl.store(at, tl.sum(acc * h, 0), mask=c < c_cols)
        if ACT == "relu":
            grad = tl.where(h != 0.0, acc, 0.0)
            if SCALE_N:
                grad *= z[None, :]
        elif ACT == "identity":
            grad = acc
            if SCALE_N:
                grad = tl.where((z != 0.0)[None, :], acc * z[None, :], 0.0)
        else:
            grad = acc * _load(
                s_desc, s_ptr, stride_s, row, col, n_rows, c_cols + half_s, ROWS, COLS, SAVED_TMA
            ).to(tl.float32)
        if DB:
            at = partial_ptr + partial_plane + pid_m.to(tl.int64) * stride_partial + c
            tl.store(at, tl.sum(grad, 0), mask=c < c_cols)
        _store(c_desc, c_ptr, stride_c, grad, row, col, r, row_mask, c_cols, COLS, STORE_TMA)
        if EPILOGUE == "glu_grad":
            s = _load(
                s_desc, s_ptr, stride_s, row, col + half_s, n_rows, c_cols + half_s, ROWS, COLS, SAVED_TMA
            ).to(tl.float32)
            grad = acc * s
            if DB:
                tl.store(at + partial_plane, tl.sum(grad, 0), mask=c < c_cols)
            _store(
                c_desc,
                c_ptr,
                stride_c,
                grad,
                row,
                col + half_c,
                r,
                row_mask,
                c_cols + half_c,
                COLS,
                STORE_TMA,
            )
    else:
        if SCALE_N:
            acc = tl.where((z != 0.0)[None, :], acc * z[None, :], 0.0)
        if SCALE_M:
            acc = tl.where((z_m != 0.0)[:, None], acc * z_m[:, None], 0.0)
        if HAS_N:
            acc = tl.where(is_open[None, :], acc, 0.0)
        _store(c_desc, c_ptr, stride_c, acc, row, col, r, row_mask, c_cols, COLS, STORE_TMA)


@triton.jit
def _matmul(
    a_full_ptr,
    a_packed_ptr,
    b_full_ptr,
    b_packed_ptr,
    c_full_ptr,
    c_packed_ptr,
    stride_a_full,
    stride_a_packed,
    stride_b_full,
    stride_b_packed,
    stride_c_full,
    stride_c_packed,
    M,
    N,
    K,
    m_count_ptr,
    n_count_ptr,
    k_count_ptr,
    m_index_ptr,
    n_index_ptr,
    m_z_ptr,
    n_z_ptr,
    bias_ptr,
    saved_ptr,
    stride_s,
    hidden_full_ptr,
    hidden_packed_ptr,
    stride_h_full,
    stride_h_packed,
    partial_ptr,
    stride_partial,
    partial_plane,
    half_a_full,
    half_a_packed,
    half_b_full,
    half_b_packed,
    half_c,
    half_s,
    half_bias,
    HAS_M: tl.constexpr,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    A_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    LAYOUT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_M: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCATTER: tl.constexpr,
    SAVE: tl.constexpr,
    HALVES: tl.constexpr,
    DZ: tl.constexpr,
    DB: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    SAVED_TMA: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    # *_FORM and HIDDEN: see _pick. HALVES 2: K is two halves, gate and up of a GLU.
    GLU: tl.constexpr = EPILOGUE == "glu"
    m_extent, m_open, m_plain = _extent(m_count_ptr, M, HAS_M)
    n_extent, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    k_extent, _, k_plain = _extent(k_count_ptr, K, HAS_K)

    natural = m_plain & k_plain
    a_ptr = _pick(a_full_ptr, a_packed_ptr, natural, A_FORM)
    stride_a = _pick(stride_a_full, stride_a_packed, natural, A_FORM)
    half_a = _pick(half_a_full, half_a_packed, natural, A_FORM)
    natural = n_plain & k_plain
    b_ptr = _pick(b_full_ptr, b_packed_ptr, natural, B_FORM)
    stride_b = _pick(stride_b_full, stride_b_packed, natural, B_FORM)
    half_b = _pick(half_b_full, half_b_packed, natural, B_FORM)
    c_cols = n_extent
    if C_FORM == 1 and HAS_N:
        c_cols = tl.cdiv(n_extent, 128) * 128  # consumers find zeros up to here
    natural = m_plain & n_plain
    c_ptr = _pick(c_full_ptr, c_packed_ptr, natural, C_FORM)
    stride_c = _pick(stride_c_full, stride_c_packed, natural, C_FORM)
    h_ptr, stride_h = hidden_full_ptr, stride_h_full
    if HIDDEN:  # no function returns the None that there may be else
        h_ptr = _pick(hidden_full_ptr, hidden_packed_ptr, natural, HIDDEN)
        stride_h = _pick(stride_h_full, stride_h_packed, natural, HIDDEN)
    stride_a = stride_a.to(tl.int64)
    stride_b = stride_b.to(tl.int64)
    stride_c = stride_c.to(tl.int64)
    stride_s = stride_s.to(tl.int64)
    stride_h = stride_h.to(tl.int64)

    SUB_N: tl.constexpr = BLOCK_N // SUBTILES
    a_desc = None
    b_desc = None
    c_desc = None
    s_desc = None
    h_desc = None
    # The descriptors end where the extents do, so nothing beyond is read. A dimension is at least 1: with
    # nothing open no tile is read. The second half of a GLU lies half_* further in the same matrix.
    a_rows = m_extent
    a_cols = k_extent
    if LAYOUT == "tn":
        a_rows = k_extent
        a_cols = m_extent
    b_rows = k_extent
    b_cols = n_extent
    if LAYOUT == "nt":
        b_rows = n_extent
        b_cols = k_extent
    if GLU:
        b_rows += half_b
    if HALVES == 2:
        a_cols += half_a
        b_rows += half_b
    if TMA:
        if LAYOUT == "tn":
            a_desc = tl.make_tensor_descriptor(
                a_ptr, [max(a_rows, 1), max(a_cols, 1)], [stride_a, 1], [BLOCK_K, BLOCK_M]
            )
        else:
            a_desc = tl.make_tensor_descriptor(
                a_ptr, [max(a_rows, 1), max(a_cols, 1)], [stride_a, 1], [BLOCK_M, BLOCK_K]
            )
        if LAYOUT == "nt":
            b_desc = tl.make_tensor_descriptor(
                b_ptr, [max(b_rows, 1), max(b_cols, 1)], [stride_b, 1], [BLOCK_N, BLOCK_K]
            )
        else:
            b_desc = tl.make_tensor_descriptor(
                b_ptr, [max(b_rows, 1), max(b_cols, 1)], [stride_b, 1], [BLOCK_K, BLOCK_N]
            )
    if STORE_TMA:
        width = max(c_cols + half_c, 1)
        c_desc = tl.make_tensor_descriptor(c_ptr, [max(m_extent, 1), width], [stride_c, 1], [BLOCK_M, SUB_N])
    if SAVED_TMA:
        width = max(c_cols + half_s, 1)
        s_desc = tl.make_tensor_descriptor(
            saved_ptr, [max(m_extent, 1), width], [stride_s, 1], [BLOCK_M, SUB_N]
        )
    if HIDDEN_TMA:
        h_desc = tl.make_tensor_descriptor(
            h_ptr, [max(m_extent, 1), max(c_cols, 1)], [stride_h, 1], [BLOCK_M, SUB_N]
        )

    tiles_m = tl.cdiv(m_extent, BLOCK_M)
    tiles_n = tl.cdiv(c_cols, BLOCK_N)
    tiles_k = tl.cdiv(k_extent, BLOCK_K)
    start = tl.program_id(0)
    programs = tl.num_programs(0)
    for tile in tl.range(start, tiles_m * tiles_n, programs, flatten=FLATTEN):
        # Tiles go in groups of GROUP_M rows of tiles, so that neighbours in time share operands in L2.
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        group = min(tiles_m - first, GROUP_M)
        pid_m = first + (tile % (GROUP_M * tiles_n)) % group
        pid_n = (tile % (GROUP_M * tiles_n)) // group
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = acc
        for step in range(tiles_k * HALVES):
            k = step * BLOCK_K
            k_a = k
            k_b = k
            if HALVES == 2:
                second = step >= tiles_k
                k = tl.where(second, k - tiles_k * BLOCK_K, k)
                k_a = tl.where(second, k + half_a, k)
                k_b = tl.where(second, k + half_b, k)
            if LAYOUT == "tn":
                a = _load(a_desc, a_ptr, stride_a, k_a, row, a_rows, a_cols, BLOCK_K, BLOCK_M, TMA).T
            else:
                a = _load(a_desc, a_ptr, stride_a, row, k_a, a_rows, a_cols, BLOCK_M, BLOCK_K, TMA)
            if LAYOUT == "nt":
                b = _load(b_desc, b_ptr, stride_b, col, k_b, b_rows, b_cols, BLOCK_N, BLOCK_K, TMA).T
            else:
                b = _load(b_desc, b_ptr, stride_b, k_b, col, b_rows, b_cols, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            if GLU:
                b2 = _load(
                    b_desc, b_ptr, stride_b, col + half_b, k_b, b_rows, b_cols, BLOCK_N, BLOCK_K, TMA
                ).T
                acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)

        r = row + tl.arange(0, BLOCK_M)
        row_mask = r < m_extent
        z_m = tl.full((BLOCK_M,), 1.0, tl.float32)
        if SCATTER or SCALE_M:
            unit_m = tl.where(m_plain, r, tl.load(m_index_ptr + r, mask=r < m_open, other=0))
            if SCALE_M:
                z_m = tl.load(m_z_ptr + unit_m, mask=r < m_open, other=0.0).to(tl.float32)
            if SCATTER:
                row_mask = r < m_open
                r = unit_m
        for part in tl.static_range(SUBTILES):
            value = _part(acc, part, SUBTILES, BLOCK_M, SUB_N)
            value2 = value
            if GLU:
                value2 = _part(acc2, part, SUBTILES, BLOCK_M, SUB_N)
            _epilogue(
                value, value2, row, col + part * SUB_N, pid_m, r, row_mask, m_extent, z_m,
                c_desc, c_ptr, stride_c, c_cols, s_desc, saved_ptr, stride_s, half_s, half_c,
                h_desc, h_ptr, stride_h, n_index_ptr, n_z_ptr, bias_ptr, half_bias, n_open, n_plain,
                partial_ptr, stride_partial, partial_plane,
                HAS_N, EPILOGUE, ACT, HAS_BIAS, SCALE_M, SCALE_N, SAVE, DZ, DB,
                STORE_TMA, SAVED_TMA, HIDDEN_TMA, BLOCK_M, SUB_N,
            )  # fmt: skip

    if SCATTER:  # noqa: SIM102 - decided by the compiler, the next by the device
        if not m_plain:
            for position in range(m_open + start, M, programs):
                zero_row = tl.load(m_index_ptr + position).to(tl.int64)
                for left in range(0, n_extent, 1024):
                    c = left + tl.arange(0, 1024)
                    tl.store(
                        c_ptr + zero_row * stride_c + c,
                        tl.zeros((1024,), c_ptr.dtype.element_ty),
                        mask=c < n_extent,
                    )


def _allocate(size: int, alignment: int, stream: Any) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def ensure_allocator() -> None:
    """Memory for descriptors made on the device; a context variable, so autograd's threads need it too."""
    triton.set_allocator(_allocate)


def precision(dtype: torch.dtype) -> str:
    """ "tf32" where torch's own products would use it, else "ieee"."""
    fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if fast or dtype != torch.float32 else "ieee"


def choose(
    M: int,
    N: int,
    dtype: torch.dtype,
    epilogue: str,
    capability: int,
    out: torch.dtype | None = None,
    aligned: bool = True,
) -> Config:
    """The tile for capacities M x N, operands of ``dtype`` and a C of ``out``, by default the same.

    ``aligned``: C can be written by TMA. BLOCK_M depends on neither, for row_tiles does not know them.
    """
    glu = epilogue in ("glu", "glu_grad")
    blackwell = capability >= 100
    if dtype == torch.float32:
        if precision(dtype) == "ieee":
            return Config(64, 64, 16, 4, 2 if capability < 90 else 3, 1, False)
        if capability < 90:
            return Config(64, 64, 32, 4, 3, 1, False)
        if glu:
            return Config(64, 128, 32, 4, 3, 4 if blackwell else 1, False)
        return Config(128, 128, 32, 4, 3, 4, False) if blackwell else Config(128, 128, 32, 8, 3, 1, False)
    # Activations take registers: in narrow parts of a tile they do not spill.
    if capability < 90:
        if glu:
            return Config(64, 64, 64, 4, 3, 2, False)
        return Config(128, 128, 32, 8, 4, 2 if epilogue == "act" else 1, False)
    if epilogue == "glu":
        return Config(128, 64, 64, 4, 3, 2 if blackwell else 1, False, 2)
    if N <= 128 or M * N <= 132 * 128 * 128:
        return Config(64, 128, 64, 4, 4, 4) if M <= 64 else Config(128, 128, 64, 8, 4, 4)
    if epilogue == "act" or (blackwell and epilogue == "grad"):
        return Config(256, 128, 64, 8, 3, 4)
    if epilogue == "linear":
        if blackwell and not aligned:
            return Config(128, 128, 64, 8, 4, 4)
        # At once, a float32 C does not fit beside the operands, and the addresses of an unaligned one spill.
        return Config(128, 256, 64, 8, 3, 1 if aligned and out != torch.float32 else 4, not blackwell)
    return Config(128, 256, 64, 8, 3, 2 if epilogue == "grad" else 4)


def _tma_ready(*tensors: Tensor | None) -> bool:
    for t in tensors:
        if t is not None:
            stride_row, stride_col = t.stride()
            if stride_col != 1 or stride_row * t.itemsize % 16 or t.data_ptr() % 16:
                return False
    return True


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _form(operand: Operand) -> int:
    if operand.packed is None:
        return 0
    return 1 if operand.full is None else 2


def matmul(
    layout: str,
    a: Operand,
    b: Operand,
    c: Operand,
    size: tuple[int, int, int],
    *,
    m_gate: Gate | None = None,
    n_gate: Gate | None = None,
    k_gate: Gate | None = None,
    epilogue: Epilogue = LINEAR,
    halves: Halves = WHOLE,
    config: Config | None = None,
    pointers: bool = False,
) -> None:
    """C = epilogue(A B), written into ``c``.

    Args:
        layout: see LAYOUTS.
        a, b, c: in natural order and/or packed; with both, the natural one is read or written if all gates of
            that operand are plain. Rows may have any stride, columns have stride 1.
        size: M, N, K, units (not capacities).
        m_gate, n_gate, k_gate: gates of the dimensions.
        config: overrides the tile.
        pointers: refuses TMA.
    """
    M, N, K = size
    if M == 0 or N == 0:
        return
    kind, activation, bias, scale_m, scale_n, scatter, saved, hidden, partial, dz, db = epilogue
    first = a.given
    capability, sms = gpu(first.device.index)
    aligned = _tma_ready(*c)
    if config is None:
        out = c.given.dtype
        config = choose(M, N, first.dtype, kind, capability, out, aligned)
    tma = not pointers and capability >= 90 and _tma_ready(*a, *b)
    store_tma = tma and not scatter and aligned
    has_hidden = hidden.full is not None or hidden.packed is not None
    if tma:
        ensure_allocator()
    cap_m = cdiv(M, config.BLOCK_M)
    cap_n = cdiv(N, config.BLOCK_N)
    launch(
        _matmul,
        (min(sms * config.CTAS, cap_m * cap_n),),
        a.full, a.packed, b.full, b.packed, c.full, c.packed,
        _stride(a.full), _stride(a.packed), _stride(b.full), _stride(b.packed),
        _stride(c.full), _stride(c.packed),
        M, N, K,
        m_gate and m_gate[2], n_gate and n_gate[2], k_gate and k_gate[2],
        m_gate and m_gate[1], n_gate and n_gate[1], m_gate and m_gate[0], n_gate and n_gate[0],
        bias,
        saved, _stride(saved), hidden.full, hidden.packed, _stride(hidden.full), _stride(hidden.packed),
        partial, 0 if partial is None else partial.stride(1), 0 if partial is None else partial.stride(0),
        *halves.a, *halves.b, halves.c, halves.saved, 0 if bias is None else bias.shape[0] // 2,
        HAS_M=m_gate is not None, HAS_N=n_gate is not None, HAS_K=k_gate is not None,
        A_FORM=_form(a), B_FORM=_form(b), C_FORM=_form(c),
        LAYOUT=layout, EPILOGUE=kind, ACT=activation,
        HAS_BIAS=bias is not None, SCALE_M=scale_m, SCALE_N=scale_n, SCATTER=scatter,
        SAVE=saved is not None and kind in ("act", "glu"), HALVES=halves.k, DZ=dz, DB=db,
        TMA=tma, STORE_TMA=store_tma, SAVED_TMA=store_tma and saved is not None and _tma_ready(saved),
        HIDDEN_TMA=tma and has_hidden and _tma_ready(*hidden), HIDDEN=_form(hidden),
        PRECISION=precision(first.dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, GROUP_M=8,
        SUBTILES=config.SUBTILES, FLATTEN=config.FLATTEN,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def row_tiles(M: int, N: int, dtype: torch.dtype, epilogue: str, device: torch.device) -> int:
    """Tiles over M that ``matmul`` will use: the size of ``partial``."""
    capability, _ = gpu(device.index)
    return cdiv(M, choose(M, N, dtype, epilogue, capability).BLOCK_M)
