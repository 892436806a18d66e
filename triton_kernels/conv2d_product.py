"""The product of gated_conv2d, forward and for the gradient of x, and the weight packed for it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Gate
from l0kernels._gates import round_up

from ._launch import cdiv, gpu, launch
from .conv2d_tiles import _ANY, _VEC, Config, Window, choose
from .matmul import Operand, _extent, _form, _pick, _stride, precision

_PACK_N, _PACK_K = 8, 64


@triton.jit
def _factor(z_ptr, unit, mask, MODE: tl.constexpr):
    """What a gate multiplies by: MODE 1 z, 2 a one where it is open; 0 beyond the mask."""
    z = tl.load(z_ptr + unit, mask=mask, other=0.0).to(tl.float32)
    if MODE == 2:
        z = tl.where(z != 0.0, 1.0, 0.0)
    return z


@triton.jit
def _pack_weight(
    w_ptr,  # (N, K, KH, KW), any strides
    out_ptr,  # (>= N, KH KW, cap_k)
    n_z_ptr,
    n_index_ptr,
    n_count_ptr,
    k_z_ptr,
    k_index_ptr,
    k_count_ptr,
    N,
    K,
    KH,
    KW,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    cap_k,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    MODE_N: tl.constexpr,
    MODE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n', t, k'] = W[n, k, t] z_n z_k; zeros from the open k to the next 128."""
    _, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    _, k_open, k_plain = _extent(k_count_ptr, K, HAS_K)
    k_end = tl.minimum(tl.cdiv(k_open, 128) * 128, cap_k)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if (tl.program_id(0) * BLOCK_N < n_open) & (tl.program_id(1) * BLOCK_K < k_end):
        unit_n, unit_k = n, k
        if HAS_N:
            unit_n = tl.where(n_plain, n, tl.load(n_index_ptr + n, mask=n < n_open, other=0))
        if HAS_K:
            unit_k = tl.where(k_plain, k, tl.load(k_index_ptr + k, mask=k < k_open, other=0))
        held = (n < n_open)[:, None] & (k < k_open)[None, :]
        z = tl.full((BLOCK_N, BLOCK_K), 1.0, tl.float32)
        if MODE_N:
            z *= _factor(n_z_ptr, unit_n, n < n_open, MODE_N)[:, None]
        if MODE_K:
            z *= _factor(k_z_ptr, unit_k, k < k_open, MODE_K)[None, :]
        source = w_ptr + unit_n.to(tl.int64)[:, None] * stride_n + unit_k.to(tl.int64)[None, :] * stride_k
        target = out_ptr + n.to(tl.int64)[:, None] * (KH * KW * cap_k) + k[None, :]
        mask = (n < n_open)[:, None] & (k < k_end)[None, :]
        for ty in range(KH):
            for tx in range(KW):
                value = tl.load(source + ty * stride_y + tx * stride_x, mask=held, other=0.0).to(tl.float32)
                if MODE_N or MODE_K:
                    value = tl.where(z != 0.0, value * z, 0.0)
                tl.store(target + (ty * KW + tx) * cap_k, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns(n_open, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """(full tiles, tiles, columns they cover): the rest takes up to two tiles, a half and a quarter wide."""
    UNITS: tl.constexpr = 2 ** (LEVELS - 1)
    UNIT: tl.constexpr = BLOCK_N // UNITS
    full = n_open // BLOCK_N
    rest = tl.cdiv(n_open - full * BLOCK_N, UNIT)
    covered = full * BLOCK_N + rest * UNIT
    full += (rest == UNITS).to(tl.int32)
    rest = rest % UNITS
    return full, full + (rest > 0).to(tl.int32) + (rest == 3).to(tl.int32), covered


@triton.jit
def _column(tile, full, covered, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr):
    """Where a tile of columns starts, and how often its width is halved."""
    UNIT: tl.constexpr = BLOCK_N // 2 ** (LEVELS - 1)
    rest = (covered - full * BLOCK_N) // UNIT
    col = tl.minimum(tile, full) * BLOCK_N
    halvings = tl.where(tile < full, 0, LEVELS - 1)
    if LEVELS == 3:
        halvings = tl.where((tile == full) & (rest >= 2), 1, halvings)
        col += tl.where(tile > full, 2 * UNIT, 0)
    return col, halvings


@triton.jit
def _phase(f, pad, K, stride, dilation, step):
    """The taps t of K that meet phase f of a strided gradient, f + pad - t dilation = 0 mod stride:
    (the first, how many, the row of the first, rows from one to the next). ``step``: from one to the next."""
    first = f * 0 + K
    for t in range(step):
        first = tl.where((f + pad - t * dilation) % stride == 0, t, first)
    count = tl.where(first < K, tl.cdiv(K - first, step), 0)
    return first, count, (f + pad - first * dilation) // stride, -(dilation * step // stride)


@triton.jit
def _conv_tile(
    start_ptr,  # (BLOCK_M,) where the window of each row starts
    iy,
    ix,
    w_ptr,
    col,
    n_open,
    H,
    W,
    KW,
    first_y,
    first_x,
    step_y,
    step_x,
    n_y,
    n_x,
    gap_y,
    gap_x,
    chunks,
    limit,
    stride_x,
    stride_w,
    stride_t,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N) of the columns from col on."""
    n = col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = n[:, None] * stride_w + k[None, :]
    start_ptr = start_ptr[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(n_y * n_x * chunks):
        tap = step // chunks
        c = (step - tap * chunks) * BLOCK_K
        ty = tap // n_x
        tx = tap - ty * n_x
        y = iy + ty * gap_y
        x = ix + tx * gap_x
        mask = ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
        if not EVEN_K:
            mask = mask & (c + k < limit)[None, :]
        a = tl.load(start_ptr + ((ty * gap_y * W + tx * gap_x) * stride_x + c), mask=mask, other=0.0)
        t = (first_y + ty * step_y) * KW + first_x + tx * step_x
        b = tl.load(w_ptr + (t * stride_t + c) + w_at, mask=(n < n_open)[:, None], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_store(
    acc,
    col,
    y_ptr,  # (BLOCK_M,) where each row starts
    row_mask,
    n_open,
    n_extent,
    n_plain,
    n_index_ptr,
    n_z_ptr,
    bias_ptr,
    HAS_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = col + tl.arange(0, BLOCK_N)
    is_open = n < n_open
    unit = n
    if HAS_N:
        unit = tl.where(n_plain, n, tl.load(n_index_ptr + n, mask=is_open, other=0))
    if HAS_BIAS:
        acc += tl.load(bias_ptr + unit, mask=is_open, other=0.0).to(tl.float32)[None, :]
    if MODE_N:
        z = _factor(n_z_ptr, unit, is_open, MODE_N)[None, :]
        acc = tl.where(z != 0.0, acc * z, 0.0)
    value = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr[:, None] + n[None, :], value, mask=row_mask[:, None] & (n < n_extent)[None, :])


@triton.jit(do_not_specialize=_ANY)
def _conv(
    x_full_ptr,
    x_packed_ptr,
    w_ptr,  # (>= N, KH KW, stride_t)
    y_full_ptr,
    y_packed_ptr,
    n_z_ptr,
    n_index_ptr,
    n_count_ptr,
    k_count_ptr,
    bias_ptr,
    stride_x_full,  # of x: in units of VEC
    stride_x_packed,
    stride_y_full,
    stride_y_packed,
    stride_t,
    N,
    K,
    images,
    H,  # of x
    W,
    OH,  # of y
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    step_y,  # between the taps that meet a phase
    step_x,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    X_FORM: tl.constexpr,
    Y_FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MODE_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gradient: y and x change roles, each phase of the stride by itself
    EVEN_K: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    n_extent, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    k_extent, k_open, k_plain = _extent(k_count_ptr, K, HAS_K)
    x_ptr = _pick(x_full_ptr, x_packed_ptr, k_plain, X_FORM)
    stride_x = _pick(stride_x_full, stride_x_packed, k_plain, X_FORM)
    y_ptr = _pick(y_full_ptr, y_packed_ptr, n_plain, Y_FORM)
    stride_y = _pick(stride_y_full, stride_y_packed, n_plain, Y_FORM)
    stride_x = stride_x.to(tl.int64) * VEC
    stride_y = stride_y.to(tl.int64)
    # What x holds beyond the open channels up to here is zero; natural rows may be cut short of a chunk.
    limit = tl.cdiv(k_extent, VEC) * VEC
    chunks = tl.cdiv(k_open, BLOCK_K)

    full, tiles_n, covered = _columns(n_open, BLOCK_N, LEVELS)
    tiles_n = tl.maximum(tiles_n, 1)  # with nothing open one writes the zeros
    QH, QW = OH, OW
    phases = 1
    if TRANSPOSED:
        QH = tl.cdiv(OH, stride_h)
        QW = tl.cdiv(OW, stride_w)
        phases = stride_h * stride_w
    rows = images * QH * QW
    tiles_m = tl.cdiv(rows, BLOCK_M)
    # The narrow tiles come last and fill the gaps that the wide ones leave.
    for tile in range(tl.program_id(0), tiles_n * phases * tiles_m, tl.num_programs(0)):
        pid_m = tile % tiles_m
        phase = tile // tiles_m % phases
        pid_n = tile // tiles_m // phases
        m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        image = m // (QH * QW)
        qy = m // QW % QH
        qx = m % QW
        row_mask = m < rows
        oy, ox = qy, qx
        if TRANSPOSED:
            phase_y, phase_x = phase // stride_w, phase % stride_w
            first_y, n_y, base_y, gap_y = _phase(phase_y, pad_h, KH, stride_h, dilation_h, step_y)
            first_x, n_x, base_x, gap_x = _phase(phase_x, pad_w, KW, stride_w, dilation_w, step_x)
            oy = qy * stride_h + phase_y
            ox = qx * stride_w + phase_x
            iy, ix = qy + base_y, qx + base_x
            row_mask = row_mask & (oy < OH) & (ox < OW)
        else:
            first_y, first_x, n_y, n_x = 0, 0, KH, KW
            gap_y, gap_x = dilation_h, dilation_w
            iy, ix = qy * stride_h - pad_h, qx * stride_w - pad_w
        start_ptr = x_ptr + ((image * H + iy) * W + ix).to(tl.int64) * stride_x
        iy = tl.where(row_mask, iy, -1073741824)  # rows beyond the last meet no pixel
        out_ptr = y_ptr + ((image * OH + oy) * OW + ox).to(tl.int64) * stride_y
        col, halvings = _column(pid_n, full, covered, BLOCK_N, LEVELS)
        for level in tl.static_range(LEVELS):
            if halvings == level:
                acc = _conv_tile(
                    start_ptr, iy, ix, w_ptr, col, n_open, H, W, KW,
                    first_y, first_x, step_y, step_x, n_y, n_x, gap_y, gap_x, chunks, limit,
                    stride_x, KH * KW * stride_t, stride_t,
                    EVEN_K, PRECISION, BLOCK_M, BLOCK_N // 2**level, BLOCK_K,
                )  # fmt: skip
                _conv_store(
                    acc, col, out_ptr, row_mask, n_open, n_extent, n_plain, n_index_ptr, n_z_ptr, bias_ptr,
                    HAS_N, HAS_BIAS, MODE_N, BLOCK_N // 2**level,
                )  # fmt: skip
        if HAS_N:  # noqa: SIM102 - decided by the compiler, the next by the device
            if pid_n == tiles_n - 1:
                for left in range(covered, n_extent, 32):
                    c = left + tl.arange(0, 32)
                    zeros = tl.zeros((BLOCK_M, 32), y_ptr.dtype.element_ty)
                    mask = row_mask[:, None] & (c < n_extent)[None, :]
                    tl.store(out_ptr[:, None] + c[None, :], zeros, mask=mask)


def pack_weight(
    weight: Tensor,
    n_gate: Gate | None,
    k_gate: Gate | None,
    dtype: torch.dtype,
    *,
    mode_n: int = 0,
    mode_k: int = 0,
    transpose: bool = False,
) -> Tensor:
    """W (out, in, kh, kw) as (n', tap, k') in ``dtype``: n the outputs and k the inputs, or transposed.

    mode_n, mode_k: 1 multiplies by z, 2 by a one where the gate is open. Rows beyond the open ones are not
    written; beyond the open k there are zeros up to the next 128.
    """
    dims = (1, 0) if transpose else (0, 1)
    (N, K), (stride_n, stride_k) = ([f(d) for d in dims] for f in (weight.size, weight.stride))
    _, _, kh, kw = weight.shape
    cap_k = round_up(K, 64)
    out = torch.empty(N, kh * kw, cap_k, dtype=dtype, device=weight.device)
    if out.numel():
        z_n, index_n, count_n = n_gate or (None, None, None)
        z_k, index_k, count_k = k_gate or (None, None, None)
        launch(
            _pack_weight,
            (cdiv(N, _PACK_N), cdiv(cap_k, _PACK_K)),
            weight, out, z_n, index_n, count_n, z_k, index_k, count_k,
            N, K, kh, kw, stride_n, stride_k, weight.stride(2), weight.stride(3), cap_k,
            HAS_N=n_gate is not None, HAS_K=k_gate is not None, MODE_N=mode_n, MODE_K=mode_k,
            BLOCK_N=_PACK_N, BLOCK_K=_PACK_K, num_warps=4,
        )  # fmt: skip
    return out


def convolve(
    x: Operand,
    weight: Tensor,
    y: Operand,
    window: Window,
    channels: tuple[int, int],
    *,
    n_gate: Gate | None = None,
    k_gate: Gate | None = None,
    bias: Tensor | None = None,
    mode_n: int = 0,
    transposed: bool = False,
    config: Config | None = None,
) -> None:
    """The product of one convolution, written into ``y``; ``transposed``: of its gradient, x being dy.

    Args:
        x, y: pixels by channels, natural and/or packed: with both, natural where the gate is plain.
        weight: of pack_weight.
        window: of x and y; for a gradient the turned one.
        channels: (N, K), of y and of x.
        mode_n: y is multiplied by z of n_gate (1), by a one where it is open (2).
        config: the tile, if not the usual.
    """
    first = x.given
    (N, K), (stride_h, stride_w) = channels, window[7:9]
    capability, sms = gpu(first.device.index)
    config = config or choose(N, K, k_gate is not None, first.dtype, capability)
    rows, phases, steps = window.rows, 1, (1, 1)
    if transposed:
        rows = window.images * cdiv(window.OH, stride_h) * cdiv(window.OW, stride_w)
        phases = stride_h * stride_w
        steps = (
            stride_h // math.gcd(stride_h, window.dilation_h),
            stride_w // math.gcd(stride_w, window.dilation_w),
        )
    tiles = cdiv(rows, config.BLOCK_M) * phases * (cdiv(N, config.BLOCK_N) + 1)
    if window.rows * N == 0:
        return
    z, index, count = n_gate or (None, None, None)
    launch(
        _conv,
        (min(tiles, sms * config.CTAS),),
        *x, weight, *y, z, index, count, k_gate and k_gate[2], bias,
        *(_stride(t) // _VEC for t in x), *map(_stride, y), weight.shape[2],
        N, K, *window, *steps,
        HAS_N=n_gate is not None, HAS_K=k_gate is not None, X_FORM=_form(x), Y_FORM=_form(y),
        HAS_BIAS=bias is not None, MODE_N=mode_n, TRANSPOSED=transposed, EVEN_K=K % config.BLOCK_K == 0,
        VEC=_VEC, PRECISION=precision(first.dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, LEVELS=config.LEVELS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
