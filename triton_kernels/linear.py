"""gated_linear: packed or natural operands by what the device finds open, three products, no host sync.

An input gate's z goes onto the packed weight and, backward, onto the columns of dW; an output gate's onto the
columns of y, onto the packed weight for dx and onto the rows of dW. So x and dy are packed as they are, and
forward's packs of x and of the weight serve backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l0kernels._calls import NO_GRADS, Gate, GateGrads, LinearCall, Wanted
from l0kernels._gates import HardConcrete, round_up

from . import gather
from .matmul import WHOLE, Epilogue, Halves, Operand, _tma_ready, matmul
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


def result(rows: int, columns: int, gate: Gate | None, dtype: torch.dtype, device: torch.device) -> Operand:
    """Where a product goes whose columns are gated: the matrix, and room for it packed. See ``placed``."""
    full = torch.empty(rows, columns, dtype=dtype, device=device)
    packed = None if gate is None else torch.empty(rows, round_up(columns), dtype=dtype, device=device)
    return Operand(full, packed)


def placed(c: Operand, gate: Gate | None) -> Tensor:
    """The matrix of a ``result``, what the product packed in its place."""
    full, packed = c
    assert full is not None
    if packed is not None:
        shape = full.shape[0], full.shape[1]
        unpack(packed, shape, None, gate, full.dtype, out=full, skip_plain=True)
    return full


def linear_saved_shapes(call: LinearCall) -> list[tuple[int, int]]:
    """What backward takes over: the packed x and, where nothing else is to go on it, the packed weight."""
    (M, K), N = call.x.shape, call.weight.shape[0]
    if call.in_gate is None or gather.prefers(M, N, K, call.dtype):
        return []
    shapes = [(M, round_up(K)), (N, round_up(K))]
    return shapes if call.out_gate is None else shapes[:1]


def linear_forward(call: LinearCall) -> tuple[Tensor, list[Tensor]]:
    """y (M, N) = z_out * ((x * z_in) W^T + b), x (M, K), weight (N, K); what backward needs."""
    M, (N, K) = call.x.shape[0], call.weight.shape
    if gather.prefers(M, N, K, call.dtype):
        return gather.linear_forward(call), []
    a = operand(call.x, None, call.in_gate, call.dtype)
    y, b = affine(call, a)
    saved = [a.packed, b.packed] if call.out_gate is None else [a.packed]
    return y, [t for t in saved if t is not None and call.in_gate is not None]


def affine(call: LinearCall, inputs: Operand, out_packed: bool = False) -> tuple[Tensor, Operand]:
    """y of linear_forward for x in ``inputs``, packed as out_gate says where asked; and its weight."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    M, (N, K) = x.shape[0], weight.shape
    out_gate = support(out_gate, scale_out)
    w = operand(weight, out_gate, in_gate, dtype, scale_cols=in_gate is not None)
    y = result(M, N, None if out_packed else out_gate, dtype, x.device)
    after = Epilogue("linear", "identity", bias, False, out_gate is not None)
    matmul("nt", inputs, w, y, (M, N, K), n_gate=out_gate, k_gate=in_gate, epilogue=after)
    return placed(y, out_gate), w


def linear_backward(call: LinearCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where not wanted. ``saved``: of forward, or []."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    M, (N, K) = x.shape[0], weight.shape
    if gather.prefers(M, N, K, dtype):
        return gather.linear_backward(call, dy, wanted)
    need_x, need_w, need_b, need_in, need_out = wanted.needs
    out_gate = support(out_gate, scale_out)
    x_packed, w_packed = (*saved, None, None)[:2]
    grad = operand(dy, None, out_gate, dtype)
    dx = dw = db = dz_in = dz_out = share = None
    if need_x:
        dx = input_grad_of(call, grad, out_gate, w_packed)
    if bias is not None and (need_b or need_out):
        if out_gate is None:
            db = column_sums(dy, bias.dtype)
        else:
            z, raw = out_gate[0], column_sums(dy, torch.float32)
            db = torch.where(z != 0, raw * z, 0.0).to(bias.dtype)
            share = raw * bias if need_out else None
    if need_w or need_in or need_out:
        inputs = operand(x, None, in_gate, dtype, packed=x_packed)
        dw, dz_in, dz_out = weight_grad_of(call, grad, inputs, out_gate, share, wanted)
    return [dx, dw, db if need_b else None, dz_in, dz_out]


def input_grad_of(
    call: LinearCall,
    grad: Operand,
    out_gate: Gate | None,
    w_packed: Tensor | None = None,
    in_packed: bool = False,
) -> Tensor:
    """dx of a layer, packed as in_gate says where asked; ``out_gate``: the support of the call's."""
    (M, K), N, weight, in_gate = call.x.shape, call.weight.shape[0], call.weight, call.in_gate
    scale_rows, scale_cols = out_gate is not None, in_gate is not None
    w = operand(
        weight, out_gate, in_gate, call.dtype, scale_rows=scale_rows, scale_cols=scale_cols, packed=w_packed
    )
    return input_grad(grad, w, (M, K, N), in_gate, out_gate, call.x.dtype, packed=in_packed)


def weight_grad_of(
    call: LinearCall,
    grad: Operand,
    inputs: Operand,
    out_gate: Gate | None,
    share: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dz_in, dz_out of a layer; ``out_gate``: the support of the call's, ``share``: what the bias
    adds to dz_out, which is therefore no log_alpha's before."""
    (full_in, full_out), (_, need_w, _, need_in, need_out), dist = wanted
    weight, in_gate = call.weight, call.in_gate
    theta = weight if need_in or need_out else None
    dw, dz_out, dz_in = weight_grad(
        grad, inputs, (*weight.shape, call.x.shape[0]), out_gate, in_gate, weight.dtype,
        GateGrads(theta, need_out, need_in, full_out, full_in), dist if share is None else None,
    )  # fmt: skip
    if share is not None and dz_out is not None and out_gate is not None:
        z = out_gate[0]
        dz_out += torch.where(z != 0 if full_out else (z > 0) & (z < 1), share, 0.0)
        if dist is not None:
            dz_out = gate_grad(dz_out, z, dist)
            if dz_in is not None and in_gate is not None:
                dz_in = gate_grad(dz_in, in_gate[0], dist)
    return dw if need_w else None, dz_in, dz_out


def input_grad(
    grad: Operand,
    weight: Operand,
    size: tuple[int, int, int],
    gate: Gate | None,
    k_gate: Gate | None,
    out_dtype: torch.dtype,
    halves: Halves = WHOLE,
    packed: bool = False,
) -> Tensor:
    """dx (M, K) = grad W for a weight with z on its columns; ``packed``: dx stays as ``gate`` packs it."""
    device = grad.given.device
    dx = result(size[0], size[1], None if packed else gate, out_dtype, device)
    matmul("nn", grad, weight, dx, size, n_gate=gate, k_gate=k_gate, halves=halves)
    return placed(dx, gate)


def weight_grad(
    grad: Operand,
    inputs: Operand,
    size: tuple[int, int, int],
    rows: Gate | None,
    cols: Gate | None,
    out_dtype: torch.dtype,
    grads: GateGrads = NO_GRADS,
    dist: HardConcrete | None = None,
    *,
    scale_rows: bool = True,
    scale_cols: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW (N, K) = z_rows * (grad^T x) * z_cols; the gates' <theta, grad^T x>, with ``dist`` dlog_alpha.

    Rows alone scatter within the product; with columns, or for a gate gradient, an unpack follows.
    """
    N, K, _ = size
    device = grad.given.device
    dw = torch.empty(N, K, dtype=out_dtype, device=device) if out is None else out
    scale_rows, scale_cols = scale_rows and rows is not None, scale_cols and cols is not None
    if grads.theta is None and cols is None:
        after = Epilogue(scatter=rows is not None, scale_m=scale_rows)
        matmul("tn", grad, inputs, Operand(dw), size, m_gate=rows, epilogue=after)
        return dw, None, None
    packed = torch.empty(capacity(rows, N), capacity(cols, round_up(K, 8)), dtype=out_dtype, device=device)
    if grads.theta is None:  # scaled by the product: plain gates leave nothing to do
        after = Epilogue(scale_m=scale_rows, scale_n=scale_cols)
        matmul("tn", grad, inputs, Operand(dw, packed), size, m_gate=rows, n_gate=cols, epilogue=after)
        unpack(packed, (N, K), rows, cols, out_dtype, out=dw, skip_plain=True)
        return dw, None, None
    matmul("tn", grad, inputs, Operand(None, packed), size, m_gate=rows, n_gate=cols)
    return unpack(
        packed, (N, K), rows, cols, out_dtype, scale_rows=scale_rows, scale_cols=scale_cols, grads=grads,
        out=dw, dist=dist,
    )  # fmt: skip
