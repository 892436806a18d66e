"""gated_linear: packed or natural operands by what the device finds open, three products, no host sync.

An input gate's z goes onto the packed weight forward, onto the columns of dx and of dW backward; an output gate's onto
the columns of y, onto the packed weight for dx and onto the rows of dW. So x and dy are packed as they are, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.gates import HardConcrete, round_up
from . import gather
from .matmul import Gate, Operand, _tma_ready, matmul, row_tiles
from .pack import pack, reduce_partials, unpack
from .sample import gate_grad


def natural(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as a product reads it best: in ``dtype``, its rows 16-byte aligned; a copy if it is not so."""
    if t.dtype == dtype and _tma_ready(t):
        return t
    return pack(t, None, None, dtype)[:, : t.shape[1]]


def operand(
    t: Tensor, rows: Gate | None, cols: Gate | None, dtype: torch.dtype, *, scale_rows: bool = False, scale_cols: bool = False
) -> Operand:
    """``t`` for a product: as it is where all its gates are plain, else packed; scaled, always packed."""
    if rows is None and cols is None:
        return Operand(natural(t, dtype))
    if scale_rows or scale_cols or t.dtype != dtype or not _tma_ready(t):
        packed = pack(t, rows, cols, dtype, scale_rows=scale_rows, scale_cols=scale_cols, skip_plain=False)
        return Operand(None, packed)
    return Operand(t, pack(t, rows, cols, dtype))


def support(gate: Gate | None, scale: bool) -> Gate | None:
    """The gate that a dimension is multiplied by: one that only selects has a 1 wherever it is open."""
    if gate is None or scale:
        return gate
    return [(gate[0] != 0).to(torch.float32), *gate[1:]]


def capacity(gate: Gate | None, size: int) -> int:
    return size if gate is None else round_up(size)


def finish_gate_grad(
    partial: Tensor, gate: Gate, full: bool, dist: HardConcrete | None, *, over_z: bool = False
) -> Tensor:
    """The gate gradient from its sums per tile of rows; with ``dist`` that of log_alpha."""
    dz = reduce_partials(partial, gate, gate[0].shape[0], dz=True, full=full)
    if over_z:
        dz = torch.where(gate[0] != 0, dz / gate[0], 0.0)
    return dz if dist is None else gate_grad(dz, gate[0], dist)


def log_alpha_grad(dz: Tensor | None, gate: Gate | None, dist: HardConcrete | None) -> Tensor | None:
    if dz is None or gate is None or dist is None:
        return dz
    return gate_grad(dz, gate[0], dist)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) = z_out * ((x * z_in) W^T + b) in ``dtype``, for x (M, K), weight (N, K)."""
    M, K = x.shape
    N = weight.shape[0]
    if gather.prefers(M, N, K, dtype):
        return gather.linear_forward(x, weight, bias, in_gate, out_gate, scale_out, dtype)
    out_gate = support(out_gate, scale_out)
    a = operand(x, None, in_gate, dtype)
    b = operand(weight, out_gate, in_gate, dtype, scale_cols=in_gate is not None)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    packed = None if out_gate is None else torch.empty(M, round_up(N), dtype=dtype, device=x.device)
    matmul(
        "nt", a, b, Operand(y, packed), M, N, K, n_gate=out_gate, k_gate=in_gate, bias=bias, scale_n=out_gate is not None
    )
    if packed is not None:
        unpack(packed, (M, N), None, out_gate, dtype, out=y, skip_plain=True)
    return y


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where ``needs`` says so; with ``dist`` dlog_alpha in place of dz."""
    M, K = x.shape
    N = weight.shape[0]
    if gather.prefers(M, N, K, dtype):
        return gather.linear_backward(
            dy, x, weight, bias, in_gate, out_gate, scale_out, full_in, full_out, dtype, needs, dist
        )
    need_x, need_w, need_b, need_in, need_out = needs
    out_gate = support(out_gate, scale_out)
    grad = operand(dy, None, out_gate, dtype)
    inputs = operand(x, None, in_gate, dtype) if need_w or need_out or need_in else Operand()
    dx = dw = db = dz_in = dz_out = None
    if need_x:
        b = operand(weight, out_gate, in_gate, dtype, scale_rows=out_gate is not None)
        dx, dz_in = input_grad(grad, b, inputs, (M, K, N), in_gate, out_gate, x.dtype, dtype, need_in, full_in, dist)
    if need_w or need_out or (need_in and not need_x):
        theta = weight if need_out or (need_in and not need_x) else None
        dw, dz_out, dz = weight_grad(
            grad, inputs, (N, K, M), out_gate, in_gate, weight.dtype, theta, full_out, full_in,
            need_out, need_in and not need_x,
        )  # fmt: skip
        dz_in = log_alpha_grad(dz, in_gate, dist) if dz is not None else dz_in
    if bias is not None and (need_b or need_out):
        raw = dy.sum(0, dtype=torch.float32)
        db = raw
        if out_gate is not None:
            z = out_gate[0]
            db = torch.where(z != 0, raw * z, 0.0)
            if need_out:
                wanted = z != 0 if full_out else (z > 0) & (z < 1)
                dz = torch.where(wanted, raw * bias, 0.0)
                dz_out = dz if dz_out is None else dz_out + dz
        db = db.to(bias.dtype)
    dz_out = log_alpha_grad(dz_out, out_gate, dist)
    return [dx, dw if need_w else None, db if need_b else None, dz_in, dz_out]


def input_grad(
    grad: Operand,
    weight: Operand,
    inputs: Operand,
    size: tuple[int, int, int],
    gate: Gate | None,
    k_gate: Gate | None,
    out_dtype: torch.dtype,
    dtype: torch.dtype,
    need_dz: bool,
    full: bool,
    dist: HardConcrete | None,
    **halves: Any,
) -> tuple[Tensor, Tensor | None]:
    """dx (M, K) = z * (grad W) and dz, the sums of (grad W) * x over the rows; ``halves`` as in matmul."""
    M, K, _ = size
    device = next(t for t in grad if t is not None).device
    dx = torch.empty(M, K, dtype=out_dtype, device=device)
    if gate is None:
        matmul("nn", grad, weight, Operand(dx), *size, k_gate=k_gate, **halves)
        return dx, None
    packed = torch.empty(M, round_up(K), dtype=out_dtype, device=device)
    partial = None
    if need_dz:
        partial = torch.empty(1, row_tiles(M, K, dtype, "grad", device), round_up(K), device=device)
    matmul(
        "nn", grad, weight, Operand(dx, packed), *size, n_gate=gate, k_gate=k_gate, epilogue="grad", scale_n=True,
        hidden=inputs if need_dz else Operand(), partial=partial, dz=need_dz, **halves,
    )  # fmt: skip
    unpack(packed, (M, K), None, gate, out_dtype, out=dx, skip_plain=True)
    return dx, None if partial is None else finish_gate_grad(partial[0], gate, full, dist)


def weight_grad(
    grad: Operand,
    inputs: Operand,
    size: tuple[int, int, int],
    rows: Gate | None,
    cols: Gate | None,
    out_dtype: torch.dtype,
    theta: Tensor | None = None,
    full_rows: bool = False,
    full_cols: bool = False,
    dz_rows: bool = False,
    dz_cols: bool = False,
    *,
    scale_rows: bool = True,
    scale_cols: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW (N, K) = z_rows * (grad^T x) * z_cols and, with ``theta``, the gates' <theta, grad^T x>.

    Rows alone scatter within the product; with columns, or for a gate gradient, an unpack follows.
    """
    N, K, M = size
    device = next(t for t in grad if t is not None).device
    dw = torch.empty(N, K, dtype=out_dtype, device=device) if out is None else out
    scale_rows, scale_cols = scale_rows and rows is not None, scale_cols and cols is not None
    if theta is None and cols is None:
        matmul(
            "tn", grad, inputs, Operand(dw), *size, m_gate=rows, scatter=rows is not None, scale_m=scale_rows
        )
        return dw, None, None
    packed = torch.empty(capacity(rows, N), capacity(cols, round_up(K, 8)), dtype=out_dtype, device=device)
    if theta is None:  # scaled by the product: plain gates leave nothing to do
        matmul(
            "tn", grad, inputs, Operand(dw, packed), *size, m_gate=rows, n_gate=cols, scale_m=scale_rows, scale_n=scale_cols
        )
        unpack(packed, (N, K), rows, cols, out_dtype, out=dw, skip_plain=True)
        return dw, None, None
    matmul("tn", grad, inputs, Operand(None, packed), *size, m_gate=rows, n_gate=cols)
    return unpack(
        packed, (N, K), rows, cols, out_dtype, scale_rows=scale_rows, scale_cols=scale_cols, theta=theta,
        full_rows=full_rows, full_cols=full_cols, dz_rows=dz_rows, dz_cols=dz_cols, out=dw,
    )  # fmt: skip
