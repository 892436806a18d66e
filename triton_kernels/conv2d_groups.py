"""Convolutions of groups, depthwise ones among them: direct kernels over the open channels, no tensor cores.

An output meets only the inputs of its own group. In the ascending order of the open channels those are one
range, whose ends are prefix counts: each output walks over its range, so closed inputs and closed outputs
cost nothing here either. A group's few channels would leave a matrix tile mostly empty; a program therefore
keeps rows by outputs in registers and multiplies channel by channel, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Conv2dCall, Gate, Wanted
from l0kernels._gates import HardConcrete

from ._launch import cdiv, launch
from .conv2d_channels import as_rows
from .conv2d_product import _factor
from .conv2d_tiles import Window
from .matmul import _extent
from .pack import _programs
from .sample import gate_grad

_ROWS, _COLS, _WARPS = 16, 32, 4
_SHARE = 256  # rows, at least, of a share of the weight gradient
_ANY = [
    "images",
    "H",
    "W",
    "OH",
    "OW",
    "KH",
    "KW",
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dilation_h",
    "dilation_w",
    "n_per",
    "k_per",
    "share",
]
"""Numbers that change no instruction worth a compilation of its own."""


@triton.jit
def _range(before_ptr, group, per, plain, HAS: tl.constexpr):
    """The positions of the open channels of a group: (first, end)."""
    first = group * per
    end = first + per
    if HAS:
        first = tl.where(plain, first, tl.load(before_ptr + first))
        end = tl.where(plain, end, tl.load(before_ptr + end))
    return first, end


@triton.jit
def _unit(index_ptr, position, size, plain, HAS: tl.constexpr):
    """The channel at a position; some channel for one beyond the last."""
    if HAS:
        # Not masked: triton 3.6 can leave the mask in another layout than the address, and not compile.
        return tl.where(plain, position, tl.load(index_ptr + tl.minimum(position, size - 1)))
    else:
        return position


@triton.jit(do_not_specialize=_ANY)
def _direct(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    n_z_ptr,
    n_index_ptr,
    n_count_ptr,
    k_z_ptr,
    k_index_ptr,
    k_count_ptr,
    k_before_ptr,  # (K + 1,) int32: how many open channels precede each
    N,
    K,
    n_per,  # channels of a group
    k_per,
    stride_x,
    stride_c,
    stride_wn,  # of w: from n to n, from k to k of a group, from tap row to row, from tap to tap
    stride_wk,
    stride_wy,
    stride_wx,
    images,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    MODE_N: tl.constexpr,
    MODE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PACKED: tl.constexpr,
    Y_PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gradient of x: taps that no row of dy meets are masked
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_extent, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    _, _, k_plain = _extent(k_count_ptr, K, HAS_K)
    width = N
    if Y_PACKED:
        width = n_extent
    tiles_n = tl.cdiv(width, BLOCK_N)
    rows = images * OH * OW
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * tiles_n, tl.num_programs(0)):
        m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        oy, ox = m // OW % OH, m % OW
        image_ptr = x_ptr + (m // (OH * OW)).to(tl.int64)[:, None] * H * W * stride_x
        # The index holds the closed units behind the open ones.
        unit = _unit(n_index_ptr, n, N, n_plain, HAS_N)
        held, z = n < n_open, tl.full((BLOCK_N,), 1.0, tl.float32)
        if HAS_N:
            z = _factor(n_z_ptr, unit, n < n_open, MODE_N)
            held = held & (z != 0.0)
        group = tl.where(held, unit // n_per, 0)
        first, end = _range(k_before_ptr, group, k_per, k_plain, HAS_K)
        count = tl.max(tl.where(held, end - first, 0), 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j in range(count):
            k = first + j
            live = held & (k < end)
            k_unit = _unit(k_index_ptr, k, K, k_plain, HAS_K)
            z_k = tl.full((BLOCK_N,), 1.0, tl.float32)
            if MODE_K:
                z_k = _factor(k_z_ptr, k_unit, live, MODE_K)
            live = live & (z_k != 0.0)
            col = k_unit
            if X_PACKED:
                col = k
            w_n, w_k = unit, k_unit - group * k_per
            if TRANSPOSED:
                w_n, w_k = unit - group * n_per, k_unit
            line_ptr = w_ptr + w_n.to(tl.int64) * stride_wn + w_k.to(tl.int64) * stride_wk
            for tap in range(KH * KW):
                ty, tx = tap // KW, tap % KW
                if TRANSPOSED:
                    y, x = oy + pad_h - ty * dilation_h, ox + pad_w - tx * dilation_w
                    inside = (y % stride_h == 0) & (x % stride_w == 0) & (y >= 0) & (x >= 0)
                    y, x = y // stride_h, x // stride_w
                else:
                    y = oy * stride_h - pad_h + ty * dilation_h
                    x = ox * stride_w - pad_w + tx * dilation_w
                    inside = (y >= 0) & (x >= 0)
                inside = inside & (m < rows) & (y < H) & (x < W)
                pixel = (y * W + x).to(tl.int64)[:, None] * stride_x
                at = image_ptr + pixel + col.to(tl.int64)[None, :] * stride_c
                value = tl.load(at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
                w = tl.load(line_ptr + ty * stride_wy + tx * stride_wx, mask=live, other=0.0)
                acc += value * (w.to(tl.float32) * z_k)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + unit, mask=held, other=0.0).to(tl.float32)[None, :]
        value = tl.where(held[None, :], acc * z[None, :], 0.0).to(y_ptr.dtype.element_ty)
        target = unit
        if Y_PACKED:
            target = n
        at = y_ptr + m.to(tl.int64)[:, None] * N + target[None, :]
        tl.store(at, value, mask=(m < rows)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=_ANY)
def _direct_dw(
    dy_ptr,
    x_ptr,
    partial_ptr,  # (shares, N, k_per, KH KW) float32, zeros
    n_index_ptr,
    n_count_ptr,
    k_index_ptr,
    k_count_ptr,
    k_before_ptr,
    N,
    K,
    n_per,
    k_per,
    stride_dy,
    stride_dy_c,
    stride_x,
    stride_x_c,
    images,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    share,
    HAS_N: tl.constexpr,
    HAS_K: tl.constexpr,
    DY_PACKED: tl.constexpr,
    X_PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over a share of the rows of dy[m, o] x[pixel of m under a tap, j-th open input of o's group]."""
    _, n_open, n_plain = _extent(n_count_ptr, N, HAS_N)
    _, _, k_plain = _extent(k_count_ptr, K, HAS_K)
    taps = KH * KW
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j, tap = tl.program_id(1) // taps, tl.program_id(1) % taps
    rows = images * OH * OW
    row = tl.program_id(2) * share
    last = tl.minimum(row + share, rows)
    held = n < n_open
    unit = _unit(n_index_ptr, n, N, n_plain, HAS_N)
    group = tl.where(held, unit // n_per, 0)
    first, end = _range(k_before_ptr, group, k_per, k_plain, HAS_K)
    k = first + j
    held = held & (k < end)
    k_unit = _unit(k_index_ptr, k, K, k_plain, HAS_K)
    x_col, dy_col = k_unit, unit
    if X_PACKED:
        x_col = k
    if DY_PACKED:
        dy_col = n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.max(held.to(tl.int32), 0) > 0:
        for start in range(row, last, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            y = m // OW % OH * stride_h - pad_h + tap // KW * dilation_h
            x = m % OW * stride_w - pad_w + tap % KW * dilation_w
            inside = (m < last) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            mask = inside[:, None] & held[None, :]
            pixel = ((m // (OH * OW)).to(tl.int64) * H + y) * W + x
            at = dy_ptr + m.to(tl.int64)[:, None] * stride_dy + dy_col.to(tl.int64)[None, :] * stride_dy_c
            d = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            at = x_ptr + pixel[:, None] * stride_x + x_col.to(tl.int64)[None, :] * stride_x_c
            acc += d * tl.load(at, mask=mask, other=0.0).to(tl.float32)
        line = tl.program_id(2).to(tl.int64) * N + unit
        at = partial_ptr + (line * k_per + k_unit - group * k_per) * taps + tap
        tl.store(at, tl.sum(acc, 0), mask=held)


def _before(gate: Gate | None) -> Tensor | None:
    """(K + 1,) int32: the open channels before each, on the device."""
    if gate is None:
        return None
    counts = (gate[0] != 0).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(counts, (1, 0))


def _mode(gate: Gate | None, scale: bool) -> int:
    return 0 if gate is None else 1 if scale else 2


def _run_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_gate: Gate | None,
    k_gate: Gate | None,
    modes: tuple[int, int],
    packed: tuple[bool, bool],
    window: Window,
    groups: int,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """y (rows, N) or, transposed, dx from dy; ``modes`` and ``packed`` are those of x and of y."""
    n_out, n_in = weight.shape[:2]
    N, K = (n_in * groups, n_out) if transposed else (n_out, n_in * groups)
    stride_wn, stride_wk = (weight.stride(d) for d in ((1, 0) if transposed else (0, 1)))
    y = torch.empty(window.rows, N, dtype=dtype, device=x.device)
    tiles = cdiv(y.shape[0], _ROWS) * cdiv(N, _COLS)
    if not tiles:
        return y
    launch(
        _direct,
        (min(tiles, _programs(x.device)),),
        x, weight, y, bias, *(n_gate or (None,) * 3), *(k_gate or (None,) * 3), _before(k_gate),
        N, K, N // groups, K // groups, *x.stride(), stride_wn, stride_wk, weight.stride(2), weight.stride(3),
        *window,
        HAS_N=n_gate is not None, HAS_K=k_gate is not None, MODE_N=modes[1], MODE_K=modes[0],
        HAS_BIAS=bias is not None, X_PACKED=packed[0], Y_PACKED=packed[1], TRANSPOSED=transposed,
        BLOCK_M=_ROWS, BLOCK_N=_COLS, num_warps=_WARPS,
    )  # fmt: skip
    return y


def _sides(call: Conv2dCall) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """The modes of the gates of x and of y, and which of the two are packed."""
    modes = _mode(call.in_gate, call.scale_in), _mode(call.out_gate, call.scale_out)
    return modes, (
        call.in_packed and call.in_gate is not None,
        call.out_packed and call.out_gate is not None,
    )


def forward(call: Conv2dCall, x: Tensor, window: Window) -> Tensor:
    """conv2d.conv2d_forward over rows of pixels."""
    _, weight, bias, in_gate, out_gate = call[:5]
    sides = _sides(call)
    return _run_direct(x, weight, bias, out_gate, in_gate, *sides, window, call.groups, call.dtype)


def backward(
    call: Conv2dCall, dy: Tensor, share: Tensor | None, wanted: Wanted, window: Window
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dz_in, dz_out over rows of pixels; ``share``: what the bias adds to dz_out."""
    _, weight, _, in_gate, out_gate, scale_in, scale_out, *_, groups, _ = call
    (full_in, full_out), (need_x, need_w, _, need_in, need_out), dist = wanted
    x = as_rows(call.x)
    n_out, n_per_in, kh, kw = weight.shape
    n_in = n_per_in * groups
    modes, packed = _sides(call)
    dx = dw = dz_in = dz_out = None
    if need_x:
        dx = _run_direct(
            dy, weight, None, in_gate, out_gate, modes[::-1], packed[::-1], window.turned, groups, x.dtype,
            transposed=True,
        )  # fmt: skip
    if not (need_w or need_in or need_out):
        return dx, None, None, None
    rows, blocks = window.rows, cdiv(n_out, _COLS) * n_per_in * kh * kw
    shares = max(1, min(cdiv(rows, _SHARE), cdiv(2 * _programs(dy.device), max(blocks, 1))))
    partial = torch.zeros(shares, n_out, n_per_in, kh * kw, dtype=torch.float32, device=dy.device)
    if partial.numel():
        launch(
            _direct_dw,
            (cdiv(n_out, _COLS), n_per_in * kh * kw, shares),
            dy, x, partial, *(out_gate or (None,) * 3)[1:], *(in_gate or (None,) * 3)[1:], _before(in_gate),
            n_out, n_in, n_out // groups, n_per_in, *dy.stride(), *x.stride(),
            *window, cdiv(rows, shares),
            HAS_N=out_gate is not None, HAS_K=in_gate is not None, DY_PACKED=packed[1], X_PACKED=packed[0],
            BLOCK_M=_ROWS, BLOCK_N=_COLS, num_warps=_WARPS,
        )  # fmt: skip
    grad = partial.sum(0).view(groups, n_out // groups, n_per_in, kh * kw)
    z_out = _factors(out_gate, scale_out, (groups, -1, 1, 1))
    z_in = _factors(in_gate, scale_in, (groups, 1, -1, 1))
    if need_in or need_out:
        terms = (grad * weight.reshape(grad.shape).float()).sum(3, keepdim=True)
        if need_in and in_gate is not None:
            sums = (terms if z_out is None else terms * z_out).sum(1).flatten()
            dz_in = _masked(sums, in_gate[0], full_in, dist)
        if need_out and out_gate is not None:
            sums = (terms if z_in is None else terms * z_in).sum(2).flatten()
            dz_out = _masked(sums if share is None else sums + share, out_gate[0], full_out, dist)
    if need_w:
        for z in (z_out, z_in):
            grad = grad if z is None else torch.where(z != 0, grad * z, 0.0)
        dw = grad.to(weight.dtype).view(weight.shape)
    return dx, dw, dz_in, dz_out


def _factors(gate: Gate | None, scale: bool, shape: tuple[int, ...]) -> Tensor | None:
    if gate is None:
        return None
    return (gate[0] if scale else (gate[0] != 0).float()).view(shape)


def _masked(sums: Tensor, z: Tensor, full: bool, dist: HardConcrete | None) -> Tensor:
    """A gate's gradient: 0 where closed, or not fractional unless ``full``; with ``dist`` log_alpha's."""
    wanted = (z != 0) if full else ~((z <= 0) | (z >= 1))
    dz = torch.where(wanted, sums, 0.0)
    return dz if dist is None else gate_grad(dz, z, dist)
