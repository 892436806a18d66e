"""gated_linear: packed or natural operands by what the device finds open, three products, no host sync.

An input gate's z goes onto the packed weight and, backward, onto the columns of dW; an output gate's onto the
columns of y, onto the packed weight for dx and onto the rows of dW. So x and dy are packed as they are, and
forward's packs of x and of the weight serve backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0kernels._gates import HardConcrete, round_up

from . import gather
from .matmul import Gate, Operand, _tma_ready, matmul
from .pack import column_sums, pack, unpack
from .sample import gate_grad


def natural(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix as a product reads it best: in ``dtype``, rows 16-byte aligned; a copy if it is not so."""
    if t.dtype == dtype and _tma_ready(t):
        return t
    return pack(t, None, None, dtype)[:, : t.shape[1]]


def operand(
    t: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    packed: Tensor | None = None,
) -> Operand:
    """``t`` for a product: as it is where all its gates are plain, else packed; scaled, always packed.

    ``packed`` is what an earlier call with the same arguments packed.
    """
    if rows is None and cols is None:
        return Operand(natural(t, dtype))
    always = scale_rows or scale_cols or t.dtype != dtype or not _tma_ready(t)
    if packed is None:
        packed = pack(
            t, rows, cols, dtype, scale_rows=scale_rows, scale_cols=scale_cols, skip_plain=not always
        )
    return Operand(None if always else t, packed)


def support(gate: Gate | None, scale: bool) -> Gate | None:
    """The gate that a dimension is multiplied by: one that only selects has a 1 wherever it is open."""
    if gate is None or scale:
        return gate
    return [(gate[0] != 0).to(torch.float32), *gate[1:]]


def capacity(gate: Gate | None, size: int) -> int:
    return size if gate is None else round_up(size)


def linear_saved_shapes(
    x: Tensor, weight: Tensor, in_gated: bool, out_gated: bool, dtype: torch.dtype
) -> list[tuple[int, int]]:
    """What backward takes over: the packed x and, where nothing else is to go on it, the packed weight."""
    (M, K), N = x.shape, weight.shape[0]
    if not in_gated or gather.prefers(M, N, K, dtype):
        return []
    shapes = [(M, round_up(K)), (N, round_up(K))]
    return shapes[:1] if out_gated else shapes


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y (M, N) = z_out * ((x * z_in) W^T + b) in ``dtype``, x (M, K), weight (N, K); what backward needs."""
    M, K = x.shape
    N = weight.shape[0]
    if gather.prefers(M, N, K, dtype):
        return gather.linear_forward(x, weight, bias, in_gate, out_gate, scale_out, dtype), []
    out_gate = support(out_gate, scale_out)
    a = operand(x, None, in_gate, dtype)
    b = operand(weight, out_gate, in_gate, dtype, scale_cols=in_gate is not None)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    packed = None if out_gate is None else torch.empty(M, round_up(N), dtype=dtype, device=x.device)
    scale = out_gate is not None
    matmul("nt", a, b, Operand(y, packed), M, N, K, n_gate=out_gate, k_gate=in_gate, bias=bias, scale_n=scale)
    if packed is not None:
        unpack(packed, (M, N), None, out_gate, dtype, out=y, skip_plain=True)
    saved = [a.packed, b.packed] if out_gate is None else [a.packed]
    return y, [t for t in saved if t is not None and in_gate is not None]


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    saved: list[Tensor],
    scale_out: bool,
    full_in: bool,
    full_out: bool,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where ``needs`` says so; with ``dist`` dlog_alpha, not dz.

    ``saved``: of forward, or empty to pack again.
    """
    M, K = x.shape
    N = weight.shape[0]
    if gather.prefers(M, N, K, dtype):
        return gather.linear_backward(
            dy, x, weight, bias, in_gate, out_gate, scale_out, full_in, full_out, dtype, needs, dist
        )
    need_x, need_w, need_b, need_in, need_out = needs
    out_gate = support(out_gate, scale_out)
    x_packed, w_packed = (*saved, None, None)[:2]
    grad = operand(dy, None, out_gate, dtype)
    dx = dw = db = dz_in = dz_out = None
    if need_x:
        scales = {"scale_rows": out_gate is not None, "scale_cols": in_gate is not None}
        w = operand(weight, out_gate, in_gate, dtype, **scales, packed=w_packed)
        dx = input_grad(grad, w, (M, K, N), in_gate, out_gate, x.dtype)
    bias_after = bias is not None and need_out  # dz_out goes on with the bias, so it is no log_alpha yet
    if need_w or need_in or need_out:
        inputs = operand(x, None, in_gate, dtype, packed=x_packed)
        dw, dz_out, dz_in = weight_grad(
            grad, inputs, (N, K, M), out_gate, in_gate, weight.dtype, weight if need_out or need_in else None,
            full_out, full_in, need_out, need_in, None if bias_after else dist,
        )  # fmt: skip
    if bias_after and dist is not None and dz_in is not None and in_gate is not None:
        dz_in = gate_grad(dz_in, in_gate[0], dist)
    if bias is not None and (need_b or need_out):
        if out_gate is None:
            db = column_sums(dy, bias.dtype)
        else:
            z, raw = out_gate[0], column_sums(dy, torch.float32)
            db = torch.where(z != 0, raw * z, 0.0).to(bias.dtype)
            if need_out and dz_out is not None:
                dz_out += torch.where(z != 0 if full_out else (z > 0) & (z < 1), raw * bias, 0.0)
                dz_out = dz_out if dist is None else gate_grad(dz_out, z, dist)
    return [dx, dw if need_w else None, db if need_b else None, dz_in, dz_out]


def input_grad(
    grad: Operand,
    weight: Operand,
    size: tuple[int, int, int],
    gate: Gate | None,
    k_gate: Gate | None,
    out_dtype: torch.dtype,
    **halves: Any,
) -> Tensor:
    """dx (M, K) = grad W for a weight with z on its columns; ``halves`` as in matmul."""
    M, K, _ = size
    device = next(t for t in grad if t is not None).device
    dx = torch.empty(M, K, dtype=out_dtype, device=device)
    packed = None if gate is None else torch.empty(M, round_up(K), dtype=out_dtype, device=device)
    matmul("nn", grad, weight, Operand(dx, packed), *size, n_gate=gate, k_gate=k_gate, **halves)
    if packed is not None:
        unpack(packed, (M, K), None, gate, out_dtype, out=dx, skip_plain=True)
    return dx


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
    dist: HardConcrete | None = None,
    *,
    scale_rows: bool = True,
    scale_cols: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW (N, K) = z_rows * (grad^T x) * z_cols; with ``theta`` the gates' <theta, grad^T x>, or dlog_alpha.

    Rows alone scatter within the product; with columns, or for a gate gradient, an unpack follows.
    """
    N, K, _ = size
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
            "tn",
            grad,
            inputs,
            Operand(dw, packed),
            *size,
            m_gate=rows,
            n_gate=cols,
            scale_m=scale_rows,
            scale_n=scale_cols,
        )
        unpack(packed, (N, K), rows, cols, out_dtype, out=dw, skip_plain=True)
        return dw, None, None
    matmul("tn", grad, inputs, Operand(None, packed), *size, m_gate=rows, n_gate=cols)
    return unpack(
        packed, (N, K), rows, cols, out_dtype, scale_rows=scale_rows, scale_cols=scale_cols, theta=theta,
        full_rows=full_rows, full_cols=full_cols, dz_rows=dz_rows, dz_cols=dz_cols, out=dw, dist=dist,
    )  # fmt: skip
