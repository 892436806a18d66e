"""The kernels of gather.py, whose programs take different roles by their number.

Every index is used as it comes: it lists all units, open before closed, so that a program owns positions and
computes the open ones, zeroes the closed ones, or has some of both.
"""

import triton
import triton.language as tl

from .activation import act, act_grad
from .hard_concrete import gate_slope, gate_value, uniform


@triton.jit
def _units(position, index_ptr, size, GATED: tl.constexpr):
    """Units at these positions, 0 beyond the last."""
    if GATED:
        return tl.load(index_ptr + position, mask=position < size, other=0)
    else:
        return position


@triton.jit
def _scales(z_ptr, unit, is_open, GATED: tl.constexpr):
    """z of these units, 0 where not open; without a gate 1 where open."""
    if GATED:
        return tl.load(z_ptr + unit, mask=is_open, other=0.0)
    else:
        return tl.where(is_open, 1.0, 0.0)


@triton.jit
def _count(count_ptr, size, GATED: tl.constexpr):
    """How many units are open."""
    if GATED:
        return tl.load(count_ptr)
    else:
        return size


@triton.jit
def _at(row, column, stride_row, stride_column, WIDE: tl.constexpr):
    """Offsets of a tile; 32 bits save a register an element where the operands are small enough."""
    if WIDE:
        return row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    else:
        return row[:, None] * stride_row + column[None, :] * stride_column


@triton.jit
def _load(ptr, row, column, stride_row, stride_column, row_mask, column_mask, WIDE: tl.constexpr):
    """A tile of rows and columns, 0 outside the masks."""
    at = _at(row, column, stride_row, stride_column, WIDE)
    return tl.load(ptr + at, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def _forward_tile(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_z,
    in_index,
    in_open,
    out_z,
    out_index,
    out_open,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PACKED: tl.constexpr,
    Y_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The y tile of this program; y is contiguous (M, N)."""
    tiles_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # one program draws even where there is no output
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pos_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    open_n = pos_n < out_open
    unit_n = _units(pos_n, out_index, N, OUT_GATED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end_k = tl.where(pid_n * BLOCK_N < out_open, in_open, 0)
    for k in range(0, end_k, BLOCK_K):
        pos_k = k + tl.arange(0, BLOCK_K)
        open_k = pos_k < in_open
        unit_k = _units(pos_k, in_index, K, IN_GATED)
        x = _load(x_ptr, offs_m, pos_k if X_PACKED else unit_k, stride_xm, stride_xk, mask_m, open_k, WIDE)
        w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, open_k, WIDE)
        if IN_GATED or ACT != "identity":
            x = act(x.to(tl.float32), ACT)
        if IN_GATED:
            x = x * _scales(in_z, unit_k, open_k, IN_GATED)[None, :]
        acc = tl.dot(x.to(DTYPE), tl.trans(w.to(DTYPE)), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(b_ptr + unit_n.to(tl.int64) * stride_b, mask=open_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if SCALE_OUT:
        acc *= _scales(out_z, unit_n, open_n, OUT_GATED)[None, :]
    if Y_PACKED:
        at = _at(offs_m, pos_n, N, 1, WIDE)
        tl.store(y_ptr + at, acc, mask=mask_m[:, None] & open_n[None, :])
    else:
        at = _at(offs_m, unit_n, N, 1, WIDE)
        acc = tl.where(open_n[None, :], acc, 0.0)
        tl.store(y_ptr + at, acc, mask=mask_m[:, None] & (pos_n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_z,
    in_index,
    in_count,
    out_z,
    out_index,
    out_count,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PACKED: tl.constexpr,
    Y_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = [z_out] * ((act(x) * z_in) W^T + b) of gates that were drawn before."""
    _forward_tile(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        in_z,
        in_index,
        _count(in_count, K, IN_GATED),
        out_z,
        out_index,
        _count(out_count, N, OUT_GATED),
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        stride_b,
        IN_GATED,
        OUT_GATED,
        SCALE_OUT,
        HAS_BIAS,
        X_PACKED,
        Y_PACKED,
        ACT,
        DTYPE,
        PRECISION,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _draw(
    log_alpha_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    size,
    capacity,
    limit,
    seed,
    stream,
    rank,
    inv_beta,
    gamma,
    zeta,
    BLOCK_G: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes z, index and count of one gate vector; returns how many gates are open."""
    i = tl.arange(0, BLOCK_G)
    given = i < size
    log_alpha = tl.load(log_alpha_ptr + i, mask=given, other=0.0)
    z = gate_value(log_alpha, uniform(seed, i, stream, rank), inv_beta, gamma, zeta)
    is_open = given & (z != 0.0)
    rank_open = tl.cumsum(is_open.to(tl.int32), 0)
    n_open = tl.sum(is_open.to(tl.int32), 0)
    position = tl.where(is_open, rank_open - 1, n_open + i - rank_open)
    position = tl.where(given, position, i)
    tl.store(z_ptr + i, z, mask=given)
    tl.store(index_ptr + position, tl.where(given, i, 0), mask=i < capacity)
    extent = tl.where(n_open > limit, capacity, tl.cdiv(n_open, ALIGN) * ALIGN)
    tl.store(count_ptr, n_open)
    tl.store(count_ptr + 1, extent)
    return n_open


@triton.jit(do_not_specialize=["M", "in_limit", "out_limit", "rank"])
def sampling_forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    in_log_alpha,
    out_log_alpha,
    seed_ptr,
    z_ptr,
    index_ptr,
    count_ptr,
    in_limit,
    out_limit,
    rank,
    inv_beta,
    gamma,
    zeta,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Draws the gates and computes y = z_out * ((x * z_in) W^T + b).

    Every program draws all gates and writes the same z, index and count to the same place; after the
    barrier it reads its own writes.
    """
    seed = tl.load(seed_ptr)
    out_z = z_ptr
    out_index = index_ptr
    in_open = K
    out_open = N
    stream = tl.full((), 0, tl.int32)
    if IN_GATED:
        capacity = tl.cdiv(K, ALIGN) * ALIGN
        in_open = _draw(
            in_log_alpha,
            z_ptr,
            index_ptr,
            count_ptr,
            K,
            capacity,
            in_limit,
            seed,
            stream,
            rank,
            inv_beta,
            gamma,
            zeta,
            BLOCK_IN,
            ALIGN,
        )
        out_z = z_ptr + K
        out_index = index_ptr + capacity
        count_ptr += 2
        stream += 1
    if OUT_GATED:
        out_open = _draw(
            out_log_alpha,
            out_z,
            out_index,
            count_ptr,
            N,
            tl.cdiv(N, ALIGN) * ALIGN,
            out_limit,
            seed,
            stream,
            rank,
            inv_beta,
            gamma,
            zeta,
            BLOCK_OUT,
            ALIGN,
        )
    tl.debug_barrier()
    _forward_tile(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        z_ptr,
        index_ptr,
        in_open,
        out_z,
        out_index,
        out_open,
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        stride_b,
        IN_GATED,
        OUT_GATED,
        OUT_GATED,
        HAS_BIAS,
        False,
        False,
        "identity",
        DTYPE,
        PRECISION,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _wants_grad(z, is_open, FULL: tl.constexpr):
    """Gates that get a gradient: every open one, or the fractional ones."""
    if FULL:
        return is_open
    else:
        return is_open & (z > 0.0) & (z < 1.0)


@triton.jit
def _store_gate_grad(ptr, unit, z, dz, wanted, mask, inv_beta, gamma, zeta, DLOG: tl.constexpr):
    """dz, or with DLOG the gradient of log_alpha; exactly 0 where not wanted."""
    if DLOG:
        dz = dz * gate_slope(z, inv_beta, gamma, zeta)
    tl.store(ptr + unit, tl.where(wanted, dz, 0.0), mask=mask)


@triton.jit
def _raw_tile(
    dy_ptr,
    x_ptr,
    dy_column,
    open_n,
    x_column,
    open_k,
    end_m,
    M,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy^T act(x) of these columns, over the rows below end_m (M, or 0 where nothing is open)."""
    raw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, end_m, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, mask_m, open_n, WIDE)
        x = _load(x_ptr, offs_m, x_column, stride_xm, stride_xk, mask_m, open_k, WIDE)
        if ACT != "identity":
            x = act(x.to(tl.float32), ACT)
        raw = tl.dot(tl.trans(dy.to(DTYPE)), x.to(DTYPE), raw, input_precision=PRECISION)
    return raw


@triton.jit
def _sum_rows(
    dy_ptr,
    dy_column,
    open_n,
    M,
    stride_dym,
    stride_dyn,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum over the rows of dy, in float32."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, offs_m < M, open_n, WIDE)
        total += tl.sum(dy.to(tl.float32), 0)
    return total


@triton.jit(
    do_not_specialize=["M", "n_split", "k_split", "stride_split", "first_rows", "first_dx", "first_db"]
)
def backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    dz_in_ptr,
    dz_out_ptr,
    in_z,
    in_index,
    in_count,
    out_z,
    out_index,
    out_count,
    inv_beta,
    gamma,
    zeta,
    M,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    n_split,
    k_split,
    stride_split,
    first_rows,
    first_dx,
    first_db,
    IN_GATED: tl.constexpr,
    OUT_GATED: tl.constexpr,
    SCALE_OUT: tl.constexpr,
    DY_PACKED: tl.constexpr,
    X_PACKED: tl.constexpr,
    ACT: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_IN: tl.constexpr,
    NEED_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL_IN: tl.constexpr,
    FULL_OUT: tl.constexpr,
    DLOG: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All gradients of a layer; dx, dw and db are contiguous, dx of a packed x is packed.

    Programs below first_rows own a block of columns and n_split rows of W: dW and their part of dz_in. Those
    below first_dx own a block of rows and k_split columns: their part of dz_out. Those below first_db own a
    tile of dx, the rest a block of db. The parts of one gradient are stride_split apart.
    """
    pid = tl.program_id(0)
    in_open = _count(in_count, K, IN_GATED)
    out_open = _count(out_count, N, OUT_GATED)
    tiles_k = tl.cdiv(K, BLOCK_K)
    if pid < first_rows:
        pos_k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        open_k = pos_k < in_open
        unit_k = _units(pos_k, in_index, K, IN_GATED)
        z_k = _scales(in_z, unit_k, open_k, IN_GATED)
        wants_k = _wants_grad(z_k, open_k, FULL_IN)
        begin_n = (pid // tiles_k) * n_split
        some_k = tl.where((pid % tiles_k) * BLOCK_K < in_open, out_open, 0)
        dz = tl.zeros((BLOCK_K,), tl.float32)
        for n in range(begin_n, tl.minimum(begin_n + n_split, N), BLOCK_N):
            pos_n = n + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            raw = _raw_tile(
                dy_ptr,
                x_ptr,
                pos_n if DY_PACKED else unit_n,
                open_n,
                pos_k if X_PACKED else unit_k,
                open_k,
                tl.where(n < some_k, M, 0),
                M,
                stride_dym,
                stride_dyn,
                stride_xm,
                stride_xk,
                ACT,
                DTYPE,
                PRECISION,
                WIDE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            if SCALE_OUT:
                raw *= _scales(out_z, unit_n, open_n, OUT_GATED)[:, None]
            if NEED_IN:
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, wants_k, WIDE)
                dz += tl.sum(raw * w.to(tl.float32), 0)
            if NEED_W:
                if IN_GATED:
                    raw = tl.where(open_k[None, :], raw * z_k[None, :], 0.0)
                at = _at(unit_n, unit_k, K, 1, WIDE)
                tl.store(dw_ptr + at, raw, mask=(pos_n < N)[:, None] & (pos_k < K)[None, :])
        if NEED_IN:
            dz_in_ptr += (pid // tiles_k) * stride_split
            _store_gate_grad(dz_in_ptr, unit_k, z_k, dz, wants_k, pos_k < K, inv_beta, gamma, zeta, DLOG)
    elif pid < first_dx:
        if NEED_OUT:
            tiles_n = tl.cdiv(N, BLOCK_N)
            part = (pid - first_rows) // tiles_n
            pos_n = ((pid - first_rows) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            z_n = _scales(out_z, unit_n, open_n, OUT_GATED)
            wants_n = _wants_grad(z_n, open_n, FULL_OUT)
            dy_column = pos_n if DY_PACKED else unit_n
            dz = tl.zeros((BLOCK_N,), tl.float32)
            some_n = tl.max(wants_n.to(tl.int32), 0)
            end_k = tl.minimum((part + 1) * k_split, in_open) * some_n
            for k in range(part * k_split, end_k, BLOCK_K):
                pos_k = k + tl.arange(0, BLOCK_K)
                open_k = pos_k < in_open
                unit_k = _units(pos_k, in_index, K, IN_GATED)
                raw = _raw_tile(
                    dy_ptr,
                    x_ptr,
                    dy_column,
                    wants_n,
                    pos_k if X_PACKED else unit_k,
                    open_k,
                    M,
                    M,
                    stride_dym,
                    stride_dyn,
                    stride_xm,
                    stride_xk,
                    ACT,
                    DTYPE,
                    PRECISION,
                    WIDE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, wants_n, open_k, WIDE).to(tl.float32)
                dz += tl.sum(raw * w * _scales(in_z, unit_k, open_k, IN_GATED)[None, :], 1)
            if HAS_BIAS:
                b = tl.load(b_ptr + unit_n.to(tl.int64) * stride_b, mask=wants_n, other=0.0)
                end_m = tl.where(part == 0, M * some_n, 0)
                total = _sum_rows(
                    dy_ptr, dy_column, wants_n, end_m, stride_dym, stride_dyn, WIDE, BLOCK_M, BLOCK_N
                )
                dz += b.to(tl.float32) * total
            dz_out_ptr += part * stride_split
            _store_gate_grad(dz_out_ptr, unit_n, z_n, dz, wants_n, pos_n < N, inv_beta, gamma, zeta, DLOG)
    elif pid < first_db:
        if dx_ptr is not None:
            first_k = ((pid - first_dx) % tiles_k) * BLOCK_K
            offs_m = ((pid - first_dx) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            pos_k = first_k + tl.arange(0, BLOCK_K)
            open_k = pos_k < in_open
            unit_k = _units(pos_k, in_index, K, IN_GATED)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for n in range(0, tl.where(first_k < in_open, out_open, 0), BLOCK_N):
                pos_n = n + tl.arange(0, BLOCK_N)
                open_n = pos_n < out_open
                unit_n = _units(pos_n, out_index, N, OUT_GATED)
                dy_column = pos_n if DY_PACKED else unit_n
                dy = _load(dy_ptr, offs_m, dy_column, stride_dym, stride_dyn, mask_m, open_n, WIDE)
                w = _load(w_ptr, unit_n, unit_k, stride_wn, stride_wk, open_n, open_k, WIDE)
                if SCALE_OUT:
                    w = w.to(tl.float32) * _scales(out_z, unit_n, open_n, OUT_GATED)[:, None]
                acc = tl.dot(dy.to(DTYPE), w.to(DTYPE), acc, input_precision=PRECISION)
            if IN_GATED:
                acc = tl.where(open_k[None, :], acc * _scales(in_z, unit_k, open_k, IN_GATED)[None, :], 0.0)
            if X_PACKED:
                if ACT != "identity":
                    a = _load(x_ptr, offs_m, pos_k, stride_xm, stride_xk, mask_m, open_k, WIDE)
                    acc *= act_grad(a.to(tl.float32), ACT)
                tl.store(dx_ptr + _at(offs_m, pos_k, K, 1, WIDE), acc, mask=mask_m[:, None] & open_k[None, :])
            else:
                at = _at(offs_m, unit_k, K, 1, WIDE)
                tl.store(dx_ptr + at, acc, mask=mask_m[:, None] & (pos_k < K)[None, :])
    else:
        if db_ptr is not None:
            pos_n = (pid - first_db) * BLOCK_N + tl.arange(0, BLOCK_N)
            open_n = pos_n < out_open
            unit_n = _units(pos_n, out_index, N, OUT_GATED)
            dy_column = pos_n if DY_PACKED else unit_n
            total = _sum_rows(dy_ptr, dy_column, open_n, M, stride_dym, stride_dyn, WIDE, BLOCK_M, BLOCK_N)
            if SCALE_OUT:
                total *= _scales(out_z, unit_n, open_n, OUT_GATED)
            tl.store(db_ptr + unit_n, tl.where(open_n, total, 0.0), mask=pos_n < N)


@triton.jit
def sum_parts_kernel(parts_ptr, dz_in_ptr, dz_out_ptr, width_in, width, parts, BLOCK: tl.constexpr):
    """dz_in and dz_out, width_in and the rest of width long, from their parts side by side."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * width + i, mask=i < width, other=0.0)
    if dz_in_ptr is not None:
        tl.store(dz_in_ptr + i, total, mask=i < width_in)
    if dz_out_ptr is not None:
        tl.store(dz_out_ptr + i - width_in, total, mask=(i >= width_in) & (i < width))
