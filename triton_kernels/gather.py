"""Small layers and few rows: open rows and columns are gathered inside the product instead of being packed.

A gated layer is one launch forward, sampling included where asked, and one backward (gather_kernels.py).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels._calls import Gate, L0LinearCall, LinearCall, MlpCall, Wanted
from l0kernels._gates import ALIGN, TAU

from ._launch import launch
from .gather_kernels import backward_kernel, forward_kernel, sampling_forward_kernel, sum_parts_kernel
from .matmul import precision as precision_of

MAX_GATES = 4096
"""The longest gate vector that every program of the sampling product draws for itself."""
GATHER_ROWS = 64
"""Up to here gathering is taken whatever the size: packing pays above about 325 * keep / (1 - keep) rows."""
GATHER_WORK = 1 << 27
"""Multiply-adds of a dense layer up to which launches cost more than products."""
PROGRAMS = 120
"""Programs wanted of a launch: about one per multiprocessor."""


class ForwardTile(NamedTuple):
    """y tile of rows x columns, the contraction in steps."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


FORWARD_TILES = (
    ForwardTile(64, 64, 64, 8, 2),
    ForwardTile(64, 32, 64, 8, 2),
    ForwardTile(32, 32, 64, 4, 2),
    ForwardTile(16, 32, 128, 4, 2),
    ForwardTile(16, 16, 128, 4, 2),
)
"""From large to small: the first that gives PROGRAMS programs is taken, else the last."""
SAMPLING_TILES = FORWARD_TILES[::2]
"""The same for programs that draw the gates first, each all of them."""


class BackwardTile(NamedTuple):
    """raw = dy^T x in tiles of outputs x inputs over steps of rows; dx in tiles of rows x inputs."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


LARGE_TILE = BackwardTile(64, 64, 32, 8, 2)
"""Where it gives PROGRAMS blocks of columns."""
SMALL_TILES = (
    BackwardTile(16, 64, 32, 4, 2),
    BackwardTile(32, 64, 16, 4, 1),
    BackwardTile(128, 32, 16, 8, 1),
)
"""Otherwise, for up to FEW_ROWS rows each: a program walks all of W's rows, times the steps over rows."""
FEW_ROWS = (16, 64)
PRECISE_LARGE_TILE = BackwardTile(64, 64, 32, 16, 1)
PRECISE_SMALL_TILES = (BackwardTile(16, 64, 32, 8, 1), *SMALL_TILES[1:])
"""The same for float32 without tensor cores, whose operands take registers."""

MAX_STEPS = 16
"""Tiles that a program walks for a gate's gradient before the walk is split and a second launch sums it."""

_TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def prefers(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether a layer of M rows, K inputs and N outputs belongs here rather than to pack and matmul.

    Raises:
        RuntimeError: the environment variable L0KERNELS_TRITON_GATHER is none of auto, 0 and 1.
    """
    mode = os.environ.get("L0KERNELS_TRITON_GATHER", "auto")
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"L0KERNELS_TRITON_GATHER must be auto, 0 or 1, got {mode!r}")
    if dtype not in _TL_DTYPES or mode == "0":
        return False
    return mode == "1" or M <= GATHER_ROWS or M * N * K <= GATHER_WORK


def _wide(a: Tensor, b: Tensor, numel: int) -> bool:
    """Whether an offset into either matrix, or into ``numel`` elements, needs more than 32 bits."""
    (rows, columns), (row, column) = a.shape, a.stride()
    far = max(rows * row + columns * column, numel)
    (rows, columns), (row, column) = b.shape, b.stride()
    return max(far, rows * row + columns * column) >= 1 << 31


def _forward_tile_for(M: int, N: int, tiles: tuple[ForwardTile, ...]) -> ForwardTile:
    for tile in tiles:
        if tile.rows < 2 * M and -(-M // tile.rows) * -(-N // tile.columns) >= PROGRAMS:
            return tile
    return tiles[-1]


def _backward_tile_for(M: int, K: int, precise: bool) -> BackwardTile:
    large, small = LARGE_TILE, SMALL_TILES
    if precise:
        large, small = PRECISE_LARGE_TILE, PRECISE_SMALL_TILES
    if FEW_ROWS[0] < M and -(-K // large.inputs) >= PROGRAMS:
        return large
    return small[(FEW_ROWS[0] < M) + (FEW_ROWS[1] < M)]


def _triple(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if gate is None else (gate[0], gate[1], gate[2])


def linear_forward(
    call: LinearCall, x_packed: bool = False, y_packed: bool = False, activation: str = "identity"
) -> Tensor:
    """y (M, N) = [z_out] * ((act(x) * z_in) W^T + b), closed outputs exactly 0, or packed. One launch."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    M, (N, K) = x.shape[0], weight.shape
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    rows, columns, step, num_warps, num_stages = _forward_tile_for(M, N, FORWARD_TILES)
    grid = -(-M // rows) * -(-N // columns)
    if grid:
        launch(
            forward_kernel,
            (grid,),
            x,
            weight,
            bias,
            y,
            *_triple(in_gate),
            *_triple(out_gate),
            M,
            N,
            K,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            IN_GATED=in_gate is not None,
            OUT_GATED=out_gate is not None,
            SCALE_OUT=scale_out and out_gate is not None,
            HAS_BIAS=bias is not None,
            X_PACKED=x_packed,
            Y_PACKED=y_packed,
            ACT=activation,
            DTYPE=_TL_DTYPES[dtype],
            PRECISION=precision_of(dtype),
            WIDE=_wide(x, weight, M * N),
            BLOCK_M=rows,
            BLOCK_N=columns,
            BLOCK_K=step,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return y


def l0_linear_forward(
    call: L0LinearCall, rank: int = 0, tau: float = TAU
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and z, index and count of the gates given, flat as of ``sample``; one launch.

    Args:
        call: its log_alphas are float32, contiguous, at most MAX_GATES each; at least one of them. The first
            given is stream 0.
        tau: the open share above which a gate vector is plain, its extent the whole capacity.
    """
    x, weight, bias, in_log_alpha, out_log_alpha, seed, dist, dtype = call
    M, (N, K) = x.shape[0], weight.shape
    sizes = [a.shape[0] for a in (in_log_alpha, out_log_alpha) if a is not None]
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    z = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    index = torch.empty(sum(-(-n // ALIGN) * ALIGN for n in sizes), dtype=torch.int32, device=x.device)
    count = torch.empty(2 * len(sizes), dtype=torch.int32, device=x.device)
    rows, columns, step, num_warps, num_stages = _forward_tile_for(M, N, SAMPLING_TILES)
    block_in = 0 if in_log_alpha is None else max(ALIGN, triton.next_power_of_2(K))
    block_out = 0 if out_log_alpha is None else max(ALIGN, triton.next_power_of_2(N))
    # One program draws the gates also where there is no y to compute.
    grid = max(1, -(-M // rows) * -(-N // columns))
    launch(
        sampling_forward_kernel,
        (grid,),
        x,
        weight,
        bias,
        y,
        in_log_alpha,
        out_log_alpha,
        seed,
        z,
        index,
        count,
        int(tau * K),
        int(tau * N),
        rank,
        1.0 / dist.beta,
        dist.gamma,
        dist.zeta,
        M,
        N,
        K,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        IN_GATED=in_log_alpha is not None,
        OUT_GATED=out_log_alpha is not None,
        HAS_BIAS=bias is not None,
        DTYPE=_TL_DTYPES[dtype],
        PRECISION=precision_of(dtype),
        WIDE=_wide(x, weight, M * N),
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=step,
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        ALIGN=ALIGN,
        num_warps=8 if max(block_in, block_out) > 1024 else num_warps,
        num_stages=num_stages,
    )
    return y, z, index, count


def linear_backward(
    call: LinearCall,
    dy: Tensor,
    wanted: Wanted,
    dy_packed: bool = False,
    x_packed: bool = False,
    activation: str = "identity",
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where not wanted. One launch, or two where a gate's
    gradient is a long sum."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    (full_in, full_out), needs, dist = wanted
    need_x, need_w, need_b, need_in, need_out = needs
    need_b = need_b and bias is not None
    need_in = need_in and in_gate is not None
    need_out = need_out and out_gate is not None
    M, (N, K) = x.shape[0], weight.shape
    device = x.device
    dx = torch.empty((M, K), dtype=dtype if x_packed else x.dtype, device=device) if need_x else None
    dw = torch.empty((N, K), dtype=weight.dtype, device=device) if need_w else None
    db = torch.empty(N, dtype=bias.dtype, device=device) if bias is not None and need_b else None
    dz_in = torch.empty_like(in_gate[0]) if in_gate is not None and need_in else None
    dz_out = torch.empty_like(out_gate[0]) if out_gate is not None and need_out else None
    precision = precision_of(dtype)
    rows, outputs, inputs, num_warps, num_stages = _backward_tile_for(
        M, K, dtype == torch.float32 and precision == "ieee"
    )
    tiles_k, tiles_n = -(-K // inputs), -(-N // outputs)
    # A program that sums a gate's gradient walks the other side; where that is long, parts are summed later.
    walks = max(tiles_n if need_in else 0, tiles_k if need_out else 0) * -(-M // rows)
    parts = max(1, -(-walks // MAX_STEPS))
    n_split = -(-tiles_n // parts) * outputs if need_in else outputs
    n_parts = parts if need_in else tiles_n
    first_rows = tiles_k * n_parts if need_w or need_in else 0
    first_dx = first_rows + (tiles_n * parts if need_out else 0)
    first_db = first_dx + (tiles_k * -(-M // rows) if need_x else 0)
    grid = first_db + (tiles_n if need_b else 0)
    width_in = K if need_in else 0
    width = width_in + (N if need_out else 0)
    part_in, part_out = dz_in, dz_out
    if parts > 1:
        scratch = torch.empty((parts, width), dtype=torch.float32, device=device)
        part_in, part_out = scratch, scratch[:, width_in:]
    if grid:
        launch(
            backward_kernel,
            (grid,),
            dy,
            x,
            weight,
            bias,
            dx,
            dw,
            db,
            part_in,
            part_out,
            *_triple(in_gate),
            *_triple(out_gate),
            *((0.0, 0.0, 0.0) if dist is None else (1.0 / dist.beta, dist.gamma, dist.zeta)),
            M,
            N,
            K,
            *dy.stride(),
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            n_split,
            -(-tiles_k // parts) * inputs,
            width,
            first_rows,
            first_dx,
            first_db,
            IN_GATED=in_gate is not None,
            OUT_GATED=out_gate is not None,
            SCALE_OUT=scale_out and out_gate is not None,
            DY_PACKED=dy_packed,
            X_PACKED=x_packed,
            ACT=activation,
            NEED_W=need_w,
            NEED_IN=need_in,
            NEED_OUT=need_out,
            HAS_BIAS=bias is not None,
            FULL_IN=full_in,
            FULL_OUT=full_out,
            DLOG=dist is not None,
            DTYPE=_TL_DTYPES[dtype],
            PRECISION=precision,
            WIDE=_wide(x, weight, M * K) or _wide(dy, weight, N * K),
            BLOCK_M=rows,
            BLOCK_N=outputs,
            BLOCK_K=inputs,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    if parts > 1:
        launch(
            sum_parts_kernel, (-(-width // 128),), scratch, dz_in, dz_out, width_in, width, parts, BLOCK=128
        )
    return [dx, dw, db, dz_in, dz_out]


def mlp_forward(call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    """y (M, n_L) and the hidden pre-activations, (M, n_l) each: the open ones first, what follows is never
    written. One launch a layer; the activation and the gate are applied where a layer reads them."""
    h, weights, biases, gates, activation, dtype, _ = call
    saved: list[Tensor] = []
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        layer = LinearCall(h, weight, bias, gates[i], gates[i + 1] if i < last else None, False, dtype)
        h = linear_forward(layer, i > 0, i < last, activation if i else "identity")
        if i < last:
            saved.append(h)
    return h, saved


def mlp_backward(call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer, None where not wanted. One launch a layer."""
    x, weights, biases, gates, activation, dtype, _ = call
    full, needs, dist = wanted
    depth = len(weights)
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * depth
    db: list[Tensor | None] = [None] * depth
    dz: list[Tensor | None] = [None] * depth
    for i in range(depth - 1, -1, -1):
        below = needs[0] or any(need_w[:i]) or any(need_b[:i]) or any(need_z[:i])
        out_gate = gates[i + 1] if i + 1 < depth else None
        layer = LinearCall(saved[i - 1] if i else x, weights[i], biases[i], gates[i], out_gate, False, dtype)
        asked = Wanted([full[i], False], [below, need_w[i], need_b[i], need_z[i], False], dist)
        dx, dw[i], db[i], dz[i], _ = linear_backward(
            layer, dy, asked, i + 1 < depth, i > 0, activation if i else "identity"
        )
        if dx is None:
            break
        dy = dx  # of this layer's input: the gradient of the output below
    return [dx, *dw, *db, *dz]
