"""Hard-concrete gate vectors: noise, z, and the order of open and closed gates, for all vectors at once.

A vector of up to ONE_PASS gates is one program. A longer one would keep one multiprocessor busy (at 130
instructions a gate, 1 to 2 clocks) while the others idle: one launch draws its chunks, a second orders them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._gates import TAU, HardConcrete, round_up

from ._launch import address, cdiv, launch
from ._table import device_table
from .hard_concrete import gate_slope, gate_value, uniform

ONE_PASS = 4096
"""Longest vector, up to 8192, that one program draws and orders in registers."""

_CHUNK = 1024
_COLUMNS = 8  # of a table row: address, length, offset in z, offset in index, vector, chunk, chunks, 0
_GRAD_BLOCK = 1024


@triton.jit
def _program(log_alpha_ptr, table_ptr, n, CHUNK: tl.constexpr, SINGLE: tl.constexpr):
    """What this program works on: log_alpha, length, offsets in z and index, vector, chunk, chunks."""
    pid = tl.program_id(0)
    if SINGLE:
        zero = pid.to(tl.int64) * 0
        return log_alpha_ptr, n, zero, zero, pid * 0, pid, tl.cdiv(n, CHUNK)
    else:
        row_ptr = table_ptr + pid * 8
        return (
            tl.load(row_ptr).to(tl.pointer_type(tl.float32)),
            tl.load(row_ptr + 1).to(tl.int32),
            tl.load(row_ptr + 2),
            tl.load(row_ptr + 3),
            tl.load(row_ptr + 4).to(tl.int32),
            tl.load(row_ptr + 5).to(tl.int32),
            tl.load(row_ptr + 6).to(tl.int32),
        )


@triton.jit
def order(index_ptr, offs, mask, is_open, open_before, n_open):
    """Places gates ``offs``, of which is_open are open, after open_before open ones in a vector of n_open."""
    place = tl.cumsum(is_open.to(tl.int32), 0) + open_before
    tl.store(index_ptr + tl.where(is_open, place - 1, n_open + offs - place), offs, mask=mask)


@triton.jit
def _finish(index_ptr, count_ptr, n, n_open, tau):
    """The padding of index and both counts."""
    tail = n + tl.arange(0, 128)
    tl.store(index_ptr + tail, tail * 0, mask=tail < tl.cdiv(n, 128) * 128)
    many = n_open.to(tl.float32) > tau * n.to(tl.float32)
    tl.store(count_ptr, n_open)
    tl.store(count_ptr + 1, tl.cdiv(tl.where(many, n, n_open), 128) * 128)


@triton.jit(do_not_specialize=["n", "rank"])
def _draw_kernel(
    log_alpha_ptr,  # of the only vector, if SINGLE
    table_ptr,  # (programs, 8) int64, if not SINGLE
    seed_ptr,  # (1,) int64
    z_ptr,  # (sum n,)
    index_ptr,  # (sum round_up(n),) int32
    count_ptr,  # (vectors, 2) int32
    chunk_open_ptr,  # (programs,) int32, unless WHOLE
    chunk_expected_ptr,  # (programs,), None unless EXPECTED
    n,
    rank,
    inv_beta,
    gamma,
    zeta,
    tau,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,  # vectors of one chunk each
    EXPECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z of a chunk, and its order if it is the whole vector, else how many of it are open.

    With EXPECTED also how many of it are expected to be.
    """
    log_alpha_ptr, n, z_offset, index_offset, vector, chunk, _ = _program(
        log_alpha_ptr, table_ptr, n, BLOCK, SINGLE
    )
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    log_alpha = tl.load(log_alpha_ptr + offs, mask=mask, other=0.0)
    u = uniform(tl.load(seed_ptr), offs, vector, rank)
    z = gate_value(log_alpha, u, inv_beta, gamma, zeta)
    tl.store(z_ptr + z_offset + offs, z, mask=mask)
    is_open = (z != 0.0) & mask  # true of a NaN
    n_open = tl.sum(is_open.to(tl.int32), 0)
    if WHOLE:
        order(index_ptr + index_offset, offs, mask, is_open, 0, n_open)
        _finish(index_ptr + index_offset, count_ptr + 2 * vector, n, n_open, tau)
    else:
        tl.store(chunk_open_ptr + tl.program_id(0), n_open)
    if EXPECTED:
        p_open = 1.0 / (1.0 + tl.exp(tl.log(-gamma / zeta) / inv_beta - log_alpha))
        tl.store(chunk_expected_ptr + tl.program_id(0), tl.sum(tl.where(mask, p_open, 0.0), 0))


@triton.jit(do_not_specialize=["n"])
def _order_kernel(
    table_ptr,  # as above
    z_ptr,
    index_ptr,
    count_ptr,
    chunk_open_ptr,
    chunk_expected_ptr,
    expected_ptr,  # (vectors,), None unless EXPECTED
    n,
    tau,
    SINGLE: tl.constexpr,
    EXPECTED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The order of a chunk, from the open counts of all chunks of its vector, CHUNKS at a time."""
    _, n, z_offset, index_offset, vector, chunk, chunks = _program(z_ptr, table_ptr, n, BLOCK, SINGLE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    z = tl.load(z_ptr + z_offset + offs, mask=mask, other=0.0)
    chunk_open_ptr += tl.program_id(0) - chunk
    if EXPECTED:
        chunk_expected_ptr += tl.program_id(0) - chunk
    n_open = chunk * 0
    open_before = chunk * 0
    expected = 0.0
    for start in range(0, chunks, CHUNKS):
        other = start + tl.arange(0, CHUNKS)
        counts = tl.load(chunk_open_ptr + other, mask=other < chunks, other=0)
        n_open += tl.sum(counts, 0)
        open_before += tl.sum(tl.where(other < chunk, counts, 0), 0)
        if EXPECTED:
            expected += tl.sum(tl.load(chunk_expected_ptr + other, mask=other < chunks, other=0.0), 0)
    order(index_ptr + index_offset, offs, mask, z != 0.0, open_before, n_open)
    if chunk == 0:
        _finish(index_ptr + index_offset, count_ptr + 2 * vector, n, n_open, tau)
        if EXPECTED:
            tl.store(expected_ptr + vector, expected)


@triton.jit
def _gate_grad_kernel(dz_ptr, z_ptr, out_ptr, n, inv_beta, gamma, zeta, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)
    fractional = (z > 0.0) & (z < 1.0)
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0)
    # Not dz * 0: a NaN of a closed gate must not get through.
    grad = tl.where(fractional, dz * gate_slope(z, inv_beta, gamma, zeta), 0.0)
    tl.store(out_ptr + offs, grad, mask=mask)


def _block(n: int) -> int:
    """The block of a vector that one program draws."""
    return max(128, triton.next_power_of_2(n))


def _warps(block: int) -> int:
    """4 gates a thread, 8 in large blocks: fewer partial sums to add up across warps, still no spills."""
    return max(min(block // 128, 8), block // 256)


def _table_rows(sizes: list[int], addresses: list[int], block: int) -> list[int]:
    rows: list[int] = []
    z_offset = index_offset = 0
    for i, (n, start_of) in enumerate(zip(sizes, addresses, strict=True)):
        chunks = max(1, cdiv(n, block))
        for chunk in range(chunks):
            rows += (start_of, n, z_offset, index_offset, i, chunk, chunks, 0)
        z_offset += n
        index_offset += round_up(n)
    return rows


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, concatenated; stream = position.

    Args:
        log_alphas: (n,) float32 each, n < 2**31 - 128.
        seed: (1,) int64.
        rank: in [0, 2**32).
        dist: the distribution's constants.
        expected: (vectors,) float32, gets the expected number of open gates of each; the same sum every time.

    Returns:
        z (sum n,) float32, index (sum round_up(n),) int32 and count (2 * vectors,) int32, [open, extent] of
        each: extent is round_up(open), or round_up(n) where open > TAU * n.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    sizes = [a.shape[0] for a in log_alphas]
    device = seed.device
    z = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    index = torch.empty(sum([round_up(n) for n in sizes]), dtype=torch.int32, device=device)
    count = torch.empty(2 * len(sizes), dtype=torch.int32, device=device)
    longest = max(sizes)
    whole = longest <= ONE_PASS
    block = _block(longest) if whole else _CHUNK
    single = len(sizes) == 1
    if single:
        programs, table = max(1, cdiv(longest, block)), seed
    else:
        addresses = [address(a) for a in log_alphas]
        key = ("sample", block, *sizes, *addresses)
        table = device_table(key, device, lambda: _table_rows(sizes, addresses, block))
        programs = table.shape[0] // _COLUMNS
    chunk_open = count if whole else torch.empty(programs, dtype=torch.int32, device=device)
    chunk_expected = expected
    if expected is not None and not whole:
        chunk_expected = torch.empty(programs, dtype=torch.float32, device=device)
    launch(
        _draw_kernel,
        (programs,),
        log_alphas[0],
        table,
        seed,
        z,
        index,
        count,
        chunk_open,
        chunk_expected,
        longest,
        rank,
        1.0 / dist.beta,
        dist.gamma,
        dist.zeta,
        TAU,
        SINGLE=single,
        WHOLE=whole,
        EXPECTED=expected is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    if not whole:
        launch(
            _order_kernel,
            (programs,),
            table,
            z,
            index,
            count,
            chunk_open,
            chunk_expected,
            expected,
            longest,
            TAU,
            SINGLE=single,
            EXPECTED=expected is not None,
            BLOCK=_CHUNK,
            CHUNKS=_CHUNK,
            num_warps=_warps(_CHUNK),
        )
    return z, index, count


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, float32 in the shape of z; exactly 0 where z is 0 or 1."""
    dz, z = dz.contiguous(), z.contiguous()
    grad = torch.empty_like(z)
    n = z.numel()
    if n:
        grid = (cdiv(n, _GRAD_BLOCK),)
        launch(
            _gate_grad_kernel,
            grid,
            dz,
            z,
            grad,
            n,
            1.0 / dist.beta,
            dist.gamma,
            dist.zeta,
            BLOCK=_GRAD_BLOCK,
            num_warps=4,
        )
    return grad
