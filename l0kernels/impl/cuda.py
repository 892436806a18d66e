"""Launchers of the CUDA kernels (csrc/cuda): allocate, hand over addresses, sizes, strides and the stream.

Nothing here waits for the device: extents stay there, results have the capacity that they may need. A kernel
that adds up across its blocks takes `tickets`, words that are 0 between launches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._calls import (
    NO_GRADS,
    DrawnMlpCall,
    Gate,
    GateGrads,
    L0LinearCall,
    L0MlpCall,
    LinearCall,
    MlpCall,
    Wanted,
)
from .._compat import foreach_add_, raw_stream
from .._gates import ALIGN, TAU, HardConcrete, round_up
from .._native import load
from . import joined, packed
from .joined import ACTIVATIONS, TYPES, constants
from .memory import matrix, optional, strided, vector
from .packed import Term

SERVES = frozenset(
    {"sample", "gate_grad", "l0_penalty", "l2_penalty", "pack", "unpack", "gated_linear", "gated_mlp"}
)
"""The primitives served here; large products are Triton's."""

_CONVERTS = {
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
}


if TYPE_CHECKING:
    from .. import _CUDA

    _why_not_loaded: str | None
else:
    _CUDA, _why_not_loaded = load(
        "l0kernels._CUDA", "no nvcc or no ninja at installation, or L0KERNELS_CUDA=0"
    )


def why_not() -> str | None:
    """None where the kernels can run, else the reason."""
    loaded: Any = _CUDA  # None, whatever its stub says, where it was not
    if loaded is None:
        return _why_not_loaded
    if torch.version.cuda is None and _CUDA.architectures != "emulated":
        return "this torch has no CUDA"
    return _CUDA.device_error() or None


def _where(t: Tensor) -> tuple[int, int]:
    """Device and current stream of t's device."""
    if t.is_cuda:
        return t.device.index, raw_stream(t.device.index)
    if _CUDA.architectures != "emulated":
        raise RuntimeError(f"the CUDA kernels serve tensors on a CUDA device, got {t.device}")
    return 0, 0


def _beside(t: Tensor, matrix: Tensor, name: str) -> None:
    """Refuses what the kernel would read at an address of another device."""
    if t.device != matrix.device:
        raise RuntimeError(f"{name} must be on the device of the matrix, {matrix.device}, got {t.device}")


def _z_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of gates beside matrices of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gate(matrix: Tensor, name: str, gate: Sequence[Tensor], n: int) -> tuple[int, int, int]:
    """Addresses of z, index and count of n gates, which the kernel believes to be dense and of its types."""
    z, index, count = gate
    device = matrix.device
    for t in gate:
        _beside(t, matrix, name)
    return (
        vector(z, name, _z_dtype(matrix.dtype), n, device),
        vector(index, name, torch.int32, round_up(n), device),
        vector(count, name, torch.int32, 2, device),
    )


def _address(t: Tensor | None) -> int:
    """Where t begins; 0 where there is none, or nothing in it."""
    return 0 if t is None else strided(t, "an operand")


class _Tickets:
    """Words that are 0 between launches; two launches under way at a time never share one.

    Launches of one stream follow each other and share its words. A captured launch may be replayed on any
    stream, so it gets words of its own, for good.
    """

    POOL = 1 << 18

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], Tensor] = {}
        self.pool: dict[torch.device, Tensor] = {}
        self.used: dict[torch.device, int] = {}

    def take(self, n: int, like: Tensor, where: tuple[int, int]) -> Tensor:
        device = like.device
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            start = self.used.get(device, 0)
            if device not in self.pool or start + n > self.POOL:
                return torch.zeros(n, dtype=torch.int32, device=device)  # zeroed by every replay
            self.used[device] = start + n
            return self.pool[device][start : start + n]
        words = self.of_stream.get(where)
        if words is None or words.shape[0] < n:
            words = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
            self.of_stream[where] = words
            if like.is_cuda and device not in self.pool:
                # Zero before any capture reads it: torch.cuda.graph waits for the device on its way in.
                self.pool[device] = torch.zeros(self.POOL, dtype=torch.int32, device=device)
        return words


_tickets = _Tickets()


@lru_cache
def _blocks(device: torch.device, each: int) -> int:
    """``each`` blocks for every multiprocessor; few on the emulator, which runs them one by one."""
    if device.type != "cuda":
        return 6
    return torch.cuda.get_device_properties(device).multi_processor_count * each


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, one after the other, in one launch.

    ``expected``: (vectors,), gets the expected number of open gates of each.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    first = log_alphas[0]
    z, index, count = joined.empty(log_alphas)
    _CUDA.sample(
        [_address(a) for a in log_alphas],
        [a.shape[0] for a in log_alphas],
        first.dtype == torch.float64,
        _address(seed),
        rank,
        constants(dist),
        TAU,
        _address(z),
        _address(index),
        _address(count),
        _address(expected),
        _where(first),
    )
    return z, index, count


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, from z alone; exactly 0 where z is 0 or 1."""
    dz, z = dz.contiguous(), z.contiguous()
    out = torch.empty_like(z)
    _CUDA.gate_grad(
        _address(dz),
        _address(z),
        _address(out),
        z.numel(),
        z.dtype == torch.float64,
        constants(dist),
        _where(z),
    )
    return out


def l0_penalty(log_alphas: list[Tensor], weights: list[float], dist: HardConcrete) -> tuple[Tensor, Tensor]:
    """sum_g weight * p_open_g over all vectors, and its gradient, flat, in one launch."""
    return _penalty(log_alphas, weights, [], dist, log_alphas[0])


class _Matrix(NamedTuple):
    """A term ``decay / 2 * sum_oi p_o * p_i * theta_oi^2``; an absent side has p = 1."""

    run: int  # of columns with one input
    n_in: int
    theta: Tensor  # (out, columns) as they lie in memory
    out: Tensor | None
    in_: Tensor | None
    d_out: Tensor | None = None  # what is None is not written
    d_in: Tensor | None = None
    d_theta: Tensor | None = None  # contiguous


def _columns(theta: Tensor) -> tuple[Tensor, int]:
    """theta as a matrix of one row per output, as it lies in memory, and the run of an input in it."""
    n_out, *kernel = theta.shape[0], *theta.shape[2:]
    if theta.ndim == 1:
        return theta[:, None].contiguous(), 1
    if theta.ndim == 2:
        return theta if theta.stride(1) == 1 else theta.contiguous(), 1
    n_cols = math.prod(theta.shape[1:])
    if theta.ndim == 4 and theta.is_contiguous(memory_format=torch.channels_last):
        return theta.permute(0, 2, 3, 1).reshape(n_out, n_cols), 1
    return theta.contiguous().reshape(n_out, n_cols), math.prod(kernel)


def _like(columns: Tensor, theta: Tensor, run: int) -> Tensor:
    """What _columns made, in theta's shape again."""
    if theta.ndim != 4 or run > 1 or math.prod(theta.shape[2:]) <= 1:
        return columns.view(theta.shape)
    n_out, n_in, *kernel = theta.shape
    return columns.view(n_out, *kernel, n_in).permute(0, 3, 1, 2)


def _penalty(
    log_alphas: Sequence[Tensor],
    weights: Sequence[float],
    matrices: list[_Matrix],
    dist: HardConcrete,
    like: Tensor,
    decay: float = 0.0,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_g weight * p_open_g`` over all vectors plus the terms, each matrix read once.

    Args:
        like: on the device, of the precision.
        factor: (), in the type of the gates; multiplies the gradients of the thetas.

    Returns:
        the total () and the gradients of the first sum, flat; those of the terms are in the matrices.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = like.new_empty((), dtype=dtype)
    sizes = [a.numel() for a in log_alphas]
    grad = like.new_empty(sum(sizes), dtype=dtype)
    starts = itertools.accumulate([0, *sizes])
    vectors = [
        (_address(a), _address(grad) + start * grad.element_size(), a.numel(), w)
        for a, w, start in zip(log_alphas, weights, starts, strict=False)
    ]
    kept: list[Any] = []  # whatever is handed over by address alone
    rows = []
    for m in matrices:
        n_out, n_cols = m.theta.shape
        out, in_ = (None if a is None else a.contiguous() for a in (m.out, m.in_))
        if m.theta.numel() == 0:  # no block of the launch is theirs
            for d in (m.d_out, m.d_in):
                if d is not None:
                    d.zero_()
        tile = _CUDA.penalty_column_bytes // m.theta.element_size()
        row_sums = None if m.d_out is None else total.new_empty(-(-n_cols // tile), n_out)
        col_sums = None if m.d_in is None else total.new_empty(-(-n_out // _CUDA.penalty_rows), n_cols)
        kept += [out, in_, row_sums, col_sums]
        rows.append(
            (
                (_address(m.theta), m.theta.stride(0), TYPES[m.theta.dtype], n_out, n_cols, decay),
                (m.run, m.n_in),
                (_address(out), _address(in_)),
                (_address(m.d_theta), _address(m.d_out), _address(m.d_in)),
                (_address(row_sums), _address(col_sums)),
            )
        )
    n_blocks, n_tickets = _CUDA.penalty_scratch(vectors, rows)
    if n_blocks == 0:
        return total.zero_(), grad
    where = _where(like)
    sums = like.new_empty(n_blocks, dtype=torch.float64)
    tickets = _tickets.take(n_tickets, like, where)
    _CUDA.penalty(
        vectors,
        rows,
        dtype == torch.float64,
        constants(dist),
        _address(sums),
        _address(tickets),
        _address(total),
        _address(factor),
        where,
    )
    return total, grad


def _matrices(
    columns: Tensor,
    run: int,
    term: Term,
    gates: list[Tensor],
    d_out: Tensor | None = None,
    d_in: Tensor | None = None,
    d_theta: Tensor | None = None,
) -> list[_Matrix]:
    """Of a grouped convolution one for every group; without gates of the input it is one."""
    theta, out, in_, groups = term
    n_in, sides = math.prod(theta.shape[1:2]), (None if i < 0 else gates[i] for i in (out, in_))
    tensors: tuple[Any, ...] = (columns, *sides, d_out, d_in, d_theta)
    if in_ < 0 or groups == 1:
        return [_Matrix(run, n_in, *tensors)]
    parts = [[None] * groups if t is None else t.tensor_split(groups) for t in tensors]
    return [_Matrix(run, n_in, *of_group) for of_group in zip(*parts, strict=True)]


def coupled_penalty(
    terms: list[Term], gates: list[Tensor], weights: list[float], decay: float, dist: HardConcrete
) -> tuple[Tensor, Tensor]:
    """l0_penalty of the gates plus the L2 terms, and its gradient of the gates, flat, in one launch."""
    first = gates[0] if gates else terms[0][0]
    numbers = [i for _, out, in_, _ in terms for i in (out, in_) if i >= 0]
    sizes = [gates[i].numel() for i in numbers]
    parts = first.new_empty(sum(sizes)).split_with_sizes(sizes)
    rest, matrices = iter(parts), []
    for term in terms:
        theta, out, in_, _ = term
        _beside(theta, first, "theta")
        d_out, d_in = (None if i < 0 else next(rest) for i in (out, in_))
        matrices += _matrices(*_columns(theta), term, gates, d_out, d_in)
    total, grad = _penalty(gates, weights, matrices, dist, first, decay)
    of_gate: list[list[Tensor]] = [[] for _ in gates]
    for i, part in zip(numbers, parts, strict=True):
        of_gate[i].append(part)
    grads = grad.split_with_sizes([a.numel() for a in gates])
    for addends in itertools.zip_longest(*of_gate):  # once for the first term of every gate, and so on
        pairs = [(g, part) for g, part in zip(grads, addends, strict=True) if part is not None]
        foreach_add_([g for g, _ in pairs], [part for _, part in pairs])
    return total, grad


def coupled_penalty_grad(
    terms: list[Term], gates: list[Tensor], factor: Tensor, decay: float, dist: HardConcrete
) -> list[Tensor]:
    """factor * decay * p_o * p_i * theta of every term, in theta's dtype, in one launch."""
    matrices, grads = [], []
    for term in terms:
        theta = term[0]
        columns, run = _columns(theta)
        d_theta = columns.new_empty(columns.shape)
        matrices += _matrices(columns, run, term, gates, d_theta=d_theta)
        grads.append(_like(d_theta, theta, run))
    _penalty([], [], matrices, dist, factor, decay, factor)
    # Of the strides that the operator's fake promises.
    like = [torch.empty_like(theta) for theta, *_ in terms]
    return [g if g.stride() == to.stride() else to.copy_(g) for g, to in zip(grads, like, strict=True)]


def _side(
    matrix: Tensor, name: str, size: int, gate: Gate | None, scale: bool, full: bool = False
) -> _CUDA.Side:
    if gate is None:
        return size, None, False, False
    return size, _gate(matrix, name, gate, size), scale, full


def _by_rows(n_blocks: int) -> _CUDA.Grid:
    return 0, n_blocks, 1, 0


def _grid(n_rows: int, n_cols: int, itemsize: int, n_blocks: int) -> _CUDA.Grid:
    """PackGrid of csrc/cuda/pack.h: about n_blocks blocks, and as many rows each as that leaves."""
    tiles = -(-n_cols // _tile(itemsize))
    warps_x = min(8, 1 << (tiles - 1).bit_length())
    blocks_x, warps_y = -(-tiles // warps_x), 8 // warps_x
    rows_per_warp = max(-(-n_rows * blocks_x // (n_blocks * warps_y)), 1)
    rows_per_warp = -(-rows_per_warp // 4) * 4  # as many are under way together
    return warps_x, blocks_x, -(-n_rows // (warps_y * rows_per_warp)), rows_per_warp


def _tile(itemsize: int) -> int:
    """Columns of a warp."""
    return 32 * 16 // itemsize


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
    """The open rows and columns of ``full``, times their gates where asked, in ``dtype``.

    Args:
        full: (R, C), any strides; a unit column stride is the fast case.
        rows, cols: the gate of a dimension, or None.
        scale_rows, scale_cols: multiply by z.
        skip_plain: where every gate given is plain and nothing is scaled, leave the buffer alone: the
            consumer reads ``full``. Decided on the device. Without any gate the buffer is always written.
        out: where to write, of the shape returned, unit column stride, rows of a multiple of 16 bytes.

    Returns:
        (round_up(R, 128) or R, round_up(C, 128) or C rounded up to 16 bytes), row-major: a gated dimension is
        rounded to 128. Zeros from the open units to the extent and in an ungated dimension's padding; beyond
        an extent nothing is written.
    """
    if full.dtype != dtype and (full.dtype, dtype) not in _CONVERTS:
        full = full.to(dtype)
    n_rows, n_cols = full.shape
    capacity_rows = n_rows if rows is None else round_up(n_rows)
    capacity_cols = round_up(n_cols, 16 // dtype.itemsize if cols is None else ALIGN)
    if out is None:
        out = full.new_empty(capacity_rows, capacity_cols, dtype=dtype)
    if not n_rows or not n_cols:
        return out
    scale_rows, scale_cols = scale_rows and rows is not None, scale_cols and cols is not None
    # Multiples of what fits a multiprocessor, in csrc/cuda/pack.cu: 4 by rows, 3 else.
    if cols is None and full.stride(1) == 1:
        grid = _by_rows(_blocks(full.device, 4))
    else:
        grid = _grid(capacity_rows, capacity_cols, dtype.itemsize, _blocks(full.device, 6))
    _CUDA.pack(
        (_address(full), full.stride(0), full.stride(1)),
        TYPES[full.dtype],
        _address(out),
        out.stride(0),
        capacity_cols,
        TYPES[dtype],
        _side(full, "rows", n_rows, rows, scale_rows),
        _side(full, "cols", n_cols, cols, scale_cols),
        skip_plain and not scale_rows and not scale_cols and not (rows is None and cols is None),
        grid,
        _where(full),
    )
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix of ``shape`` with ``packed`` in its open rows and columns, times the gates; gate gradients.

    ``dz_rows[i] = sum_j packed * theta * (z_j if scale_cols)`` where 0 < z_i < 1 (z_i != 0 with full_rows),
    else exactly 0; columns likewise. The sums are in fp32 (fp64 for fp64), in an order that does not vary.

    Args:
        packed: at least the open rows and columns, unit column stride; what is closed is not read.
        grads: the gate gradients; theta (R, C) may have any strides.
        out: where to write, (R, C) with unit column stride.
        skip_plain: where every gate given is plain, leave ``out`` alone: the product wrote it. The gate
            gradients come from ``packed`` all the same.

    Returns:
        the matrix in ``dtype``, and dz (R,) and (C,), None where not asked for or without a gate.
    """
    theta, dz_rows, dz_cols, full_rows, full_cols = grads
    if packed.dtype != dtype and (packed.dtype, dtype) not in _CONVERTS:
        packed = packed.to(dtype)
    if theta is not None:
        _beside(theta, packed, "theta")
        theta = theta if theta.dtype == dtype else theta.to(dtype)
    n_rows, n_cols = shape
    if out is None:
        out = packed.new_empty(shape, dtype=dtype)
    given = theta is not None
    dz_row = torch.empty_like(rows[0]) if given and dz_rows and rows is not None else None
    dz_col = torch.empty_like(cols[0]) if given and dz_cols and cols is not None else None
    if not n_rows or not n_cols:
        return out, None if dz_row is None else dz_row.zero_(), None if dz_col is None else dz_col.zero_()
    where = _where(packed)
    row_sums = col_sums = None
    # Multiples of what fits a multiprocessor: by rows 3 with sums, 4 without, one less if elements shrink;
    # else 2 and 3.
    if cols is None and (dz_row is None or n_rows >= _blocks(packed.device, 4)):
        each = (4 if dz_row is None else 3) - (packed.dtype.itemsize > dtype.itemsize)
        grid = _by_rows(_blocks(packed.device, each))
    else:
        summed = dz_row is not None or dz_col is not None
        grid = _grid(n_rows, n_cols, dtype.itemsize, _blocks(packed.device, 4 if summed else 6))
        if dz_row is not None:
            row_sums = dz_row.new_empty(-(-n_cols // _tile(dtype.itemsize)), n_rows)
        if dz_col is not None:
            col_sums = dz_col.new_empty(-(-n_rows // grid[3]), n_cols)
    _CUDA.unpack(
        _address(packed),
        packed.stride(0),
        TYPES[packed.dtype],
        _address(out),
        out.stride(0),
        TYPES[dtype],
        _side(packed, "rows", n_rows, rows, scale_rows, full_rows),
        _side(packed, "cols", n_cols, cols, scale_cols, full_cols),
        skip_plain and not (rows is None and cols is None),
        (0, 0, 0) if theta is None else _matrix(theta, theta, n_rows, n_cols),
        _address(dz_row),
        _address(dz_col),
        _address(row_sums),
        _address(col_sums),
        grid,
        where,
    )
    return out, dz_row, dz_col


SMALL_WORK = 1 << 27
"""Largest M * in * out that the fused small layers are meant for; beyond it Triton's products are faster."""


def small(M: int, sizes: Sequence[int]) -> bool:
    """Whether the fused small-layer kernels are meant for a chain of these widths (a layer has two)."""
    if max(M, *sizes) >= 2**31 or max(sizes) > _CUDA.small_gates:
        return False
    return all(M * a * b <= SMALL_WORK for a, b in itertools.pairwise(sizes))


def _refuse_large(M: int, sizes: Sequence[int]) -> None:
    if max(sizes) > _CUDA.small_gates:
        raise RuntimeError(
            f"the CUDA kernels compute layers of up to {_CUDA.small_gates} units, got {max(sizes)}; "
            "large products are served by the triton backend"
        )
    if M >= 2**31:
        raise RuntimeError(f"the CUDA kernels take fewer than 2**31 rows, got {M}")


def _matrix(t: Tensor, beside: Tensor, rows: int, cols: int) -> tuple[int, int, int]:
    return matrix(t, "an operand", beside.dtype, rows, cols, beside.device)


def _vector(t: Tensor | None, beside: Tensor, n: int) -> int:
    return optional(t, "an operand", beside.dtype, n, beside.device)


def _small_gate(x: Tensor, name: str, gate: Gate | None, n: int) -> _CUDA.SmallGate | None:
    return None if gate is None else (n, *_gate(x, name, gate, n), 0, 0)


def _joined_gates(
    x: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    sizes: Sequence[int | None],
    log_alphas: Sequence[Tensor] | None = None,
) -> list[_CUDA.SmallGate | None]:
    """Where ``sizes`` has one, a gate; with log_alphas, one for each of these, they are drawn."""
    found: list[_CUDA.SmallGate | None] = []
    stream = 0
    for place in joined.addresses(*gates, sizes, _z_dtype(x.dtype), x.device):
        if place is None:
            found.append(None)
            continue
        z, index, count, size = place
        found.append((size, z, index, count, _address(log_alphas[stream]) if log_alphas else 0, stream))
        stream += 1
    return found


def _empty_gates(log_alphas: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """joined.empty; to the kernel a gate vector of no units is none, and it writes no count."""
    gates = joined.empty(log_alphas)
    if not all(a.shape[0] for a in log_alphas):
        gates[2].zero_()
    return gates


def _draw(seed: Tensor, rank: int, dist: HardConcrete) -> _CUDA.SmallDraw:
    return vector(seed, "seed", torch.int64, 1, seed.device), rank, constants(dist), TAU


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def _z_like(t: Tensor, *shape: int) -> Tensor:
    """An empty tensor in the type of gates beside matrices of t's type."""
    return t.new_empty(shape, dtype=_z_dtype(t.dtype))


def _tiles(n: int) -> int:
    """As small_tiles of csrc/cuda/small.h."""
    return max(-(-n // _CUDA.small_tile), 1)


linear_saved_shapes = packed.linear_saved_shapes
mlp_saved_shapes = packed.mlp_saved_shapes


def draws_within(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor],
    dtype: torch.dtype,
    activation: str,
) -> bool:
    """The kernels draw in the type that they multiply by."""
    return dtype != torch.float64 and all(a.dtype == torch.float32 for a in log_alphas)


def linear_forward(call: LinearCall) -> tuple[Tensor, list[Tensor]]:
    """y (M, out) of gated_linear, in one launch."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    n_out, n_in = weight.shape
    in_, out = _small_gate(x, "in_gate", in_gate, n_in), _small_gate(x, "out_gate", out_gate, n_out)
    return _linear_forward(x, weight, bias, in_, out, scale_out, dtype, None), []


def l0_linear_forward(call: L0LinearCall, rank: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample and linear_forward in one launch: y, and the gates joined. Input gates are stream 0."""
    x, weight, bias, in_log_alpha, out_log_alpha, seed, dist, dtype = call
    log_alphas = [None if a is None else a.contiguous() for a in (in_log_alpha, out_log_alpha)]
    given = [a for a in log_alphas if a is not None]
    gates = _empty_gates(given)
    sizes = joined.sizes(log_alphas, [weight.shape[1], weight.shape[0]])
    in_gate, out_gate = _joined_gates(x, gates, sizes, given)
    draw = _draw(seed, rank, dist)
    return _linear_forward(x, weight, bias, in_gate, out_gate, True, dtype, draw), *gates


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: _CUDA.SmallGate | None,
    out_gate: _CUDA.SmallGate | None,
    scale_out: bool,
    dtype: torch.dtype,
    draw: _CUDA.SmallDraw | None,
) -> Tensor:
    M, (n_out, n_in) = x.shape[0], weight.shape
    _refuse_large(M, (n_in, n_out))
    _beside(weight, x, "weight")
    x, weight, bias = _cast(dtype, x, weight, None if bias is None else bias.contiguous())
    y = x.new_empty(M, n_out)
    _CUDA.small_linear_forward(
        TYPES[dtype],
        M,
        n_in,
        n_out,
        _matrix(x, x, M, n_in),
        _matrix(weight, x, n_out, n_in),
        _vector(bias, x, n_out),
        in_gate,
        out_gate,
        scale_out,
        _address(y),
        draw,
        _where(x),
    )
    return y


def linear_backward(call: LinearCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where not wanted, in one launch."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    (full_in, full_out), (need_x, need_w, need_b, need_in, need_out), dist = wanted
    M, (n_out, n_in) = x.shape[0], weight.shape
    _refuse_large(M, (n_in, n_out))
    _beside(weight, x, "weight")
    types = [t if t is None else t.dtype for t in (x, weight, bias)]
    dy, x, weight, bias = _cast(dtype, dy, x, weight, None if bias is None else bias.contiguous())
    dx = x.new_empty(M, n_in) if need_x else None
    dw = weight.new_empty(n_out, n_in) if need_w else None
    db = None if bias is None or not need_b else bias.new_empty(n_out)
    dz_in = in_sums = dz_out = out_sums = db_sums = tickets = None
    where = _where(x)
    if need_in:
        dz_in, in_sums = _z_like(x, n_in), _z_like(x, _tiles(n_out), n_in)
    if need_out:
        dz_out, out_sums = _z_like(x, n_out), _z_like(x, _tiles(n_in), n_out)
        db_sums = None if bias is None else _z_like(x, n_out)
    if need_in or need_out:
        tickets = _tickets.take(_tiles(n_in) + _tiles(n_out), x, where)
    _CUDA.small_linear_backward(
        TYPES[dtype],
        M,
        n_in,
        n_out,
        _matrix(x, x, M, n_in),
        _matrix(weight, x, n_out, n_in),
        _vector(bias, x, n_out),
        _small_gate(x, "in_gate", in_gate, n_in),
        _small_gate(x, "out_gate", out_gate, n_out),
        scale_out,
        full_in,
        full_out,
        _matrix(dy, x, M, n_out),
        _address(dx),
        _address(dw),
        _address(db),
        _address(dz_in),
        _address(dz_out),
        _address(in_sums),
        _address(out_sums),
        _address(db_sums),
        _address(tickets),
        None if dist is None else constants(dist),
        where,
    )
    grads = [g if g is None or g.dtype == t else g.to(t) for g, t in zip((dx, dw, db), types, strict=True)]
    return [*grads, dz_in, dz_out]


def _small_layers(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_CUDA.SmallGate | None],
    saved: list[Tensor],
) -> list[_CUDA.SmallLayer]:
    layers, (M, n_in) = [], x.shape
    for i, (w, b, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        n_out = w.shape[0]
        pre = _vector(saved[i - 1], x, M * n_in) if i else 0
        layers.append((n_in, n_out, _matrix(w, x, n_out, n_in), _vector(b, x, n_out), gate, pre))
        n_in = n_out
    return layers


def _mlp_tensors(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    _refuse_large(x.shape[0], [x.shape[1], *(w.shape[0] for w in weights)])
    biases = [None if b is None else b.contiguous() for b in biases]
    return _cast(dtype, x)[0], _cast(dtype, *weights), _cast(dtype, *biases)


def mlp_forward(call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    """y and the hidden layers' pre-activations, packed in (M, n_l) buffers. One launch a layer."""
    x, weights, biases, gates, activation, dtype, _ = call
    given = [_small_gate(x, "gates", g, w.shape[1]) for g, w in zip(gates, weights, strict=True)]
    return _mlp_forward(x, weights, biases, given, activation, dtype, None)


def l0_mlp_forward(
    call: L0MlpCall, rank: int = 0
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """sample and mlp_forward in one launch a layer; the gates, joined, are streams 0, 1, ... in order."""
    x, weights, biases, log_alphas, activation, seed, dist, dtype = call
    given = [a.contiguous() for a in log_alphas if a is not None]
    gates = _empty_gates(given)
    sizes = joined.sizes(log_alphas, [w.shape[1] for w in weights])
    layers = _joined_gates(x, gates, sizes, given)
    draw = _draw(seed, rank, dist)
    return *_mlp_forward(x, weights, biases, layers, activation, dtype, draw), gates


def _mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_CUDA.SmallGate | None],
    activation: str,
    dtype: torch.dtype,
    draw: _CUDA.SmallDraw | None,
) -> tuple[Tensor, list[Tensor]]:
    x, weights, biases = _mlp_tensors(x, weights, biases, dtype)
    M = x.shape[0]
    saved = [x.new_empty(M, w.shape[1]) for w in weights[1:]]
    y = x.new_empty(M, weights[-1].shape[0])
    _CUDA.small_mlp_forward(
        TYPES[dtype],
        M,
        _matrix(x, x, *x.shape),
        ACTIVATIONS[activation],
        _small_layers(x, weights, biases, gates, saved),
        _address(y),
        draw,
        _where(x),
    )
    return y, saved


def mlp_backward(call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer; ``wanted.needs`` has that order. A launch a layer."""
    x, weights, biases, gates, activation, dtype, _ = call
    given = [_small_gate(x, "gates", g, w.shape[1]) for g, w in zip(gates, weights, strict=True)]
    return _mlp_backward(dy, x, weights, biases, given, saved, activation, dtype, wanted)


def l0_mlp_backward(
    call: DrawnMlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """mlp_backward of l0_mlp_forward, with its gates as it returned them."""
    x, weights, biases, gated, z, index, count, activation, dtype = call
    sizes = [w.shape[1] if has_gate else None for w, has_gate in zip(weights, gated, strict=True)]
    gates = _joined_gates(x, (z, index, count), sizes)
    return _mlp_backward(dy, x, weights, biases, gates, saved, activation, dtype, wanted)


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_CUDA.SmallGate | None],
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    wanted: Wanted,
) -> list[Tensor | None]:
    full, needs, dist = wanted
    depth = len(weights)
    types = [t if t is None else t.dtype for t in (x, *weights, *biases)]
    x, weights, biases = _mlp_tensors(x, weights, biases, dtype)
    dy = _cast(dtype, dy)[0]
    M = x.shape[0]
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx = x.new_empty(x.shape) if needs[0] else None
    dw = [w.new_empty(w.shape) if n else None for w, n in zip(weights, need_w, strict=True)]
    db = [None if b is None or not n else b.new_empty(b.shape) for b, n in zip(biases, need_b, strict=True)]
    dz = [_z_like(x, w.shape[1]) if n else None for w, n in zip(weights, need_z, strict=True)]
    # One buffer is read while the other is written.
    da = [x.new_empty(M * max((w.shape[1] for w in weights[i::2]), default=0)) for i in range(2)]
    sums = [
        _z_like(x, _tiles(w.shape[0]), w.shape[1]) if n else None
        for w, n in zip(weights, need_z, strict=True)
    ]
    where = _where(x)
    n_tickets = max(_tiles(w.shape[0]) + _tiles(w.shape[1]) for w in weights)
    tickets = _tickets.take(n_tickets, x, where) if any(need_z) else None
    _CUDA.small_mlp_backward(
        TYPES[dtype],
        M,
        _matrix(x, x, *x.shape),
        ACTIVATIONS[activation],
        _small_layers(x, weights, biases, gates, saved),
        [
            (_address(dw[i]), _address(db[i]), _address(dz[i]), _address(da[i % 2]), _address(sums[i]))
            for i in range(depth)
        ],
        full,
        _matrix(dy, x, M, weights[-1].shape[0]),
        _address(dx),
        _address(tickets),
        None if dist is None else constants(dist),
        where,
    )
    grads = [g if g is None or g.dtype == t else g.to(t) for g, t in zip((dx, *dw, *db), types, strict=True)]
    return [*grads, *dz]
