"""Gated layers as pack -> product -> unpack, products of exactly the open size, for any pack and unpack.

A gate is None or a list [z, index, count]; ``full`` asks for dz of every open gate, not of fractional ones
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .._arguments import GLU, ROWS
from .._calls import BlockCall, Gate, GateGrads, LinearCall, MlpCall, Wanted
from .._gates import HardConcrete, round_up

Term = tuple[Tensor, int, int, int]  # weight, numbers of its output's and input's gates or -1, groups


class PackUnpack(Protocol):
    """The two primitives, with the meaning of csrc/pack.h, and what turns dz into dlog_alpha."""

    def pack(
        self,
        full: Tensor,
        rows: Gate | None,
        cols: Gate | None,
        dtype: torch.dtype,
        *,
        scale_rows: bool = ...,
        scale_cols: bool = ...,
        run: int = ...,
    ) -> Tensor: ...

    def unpack(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        rows: Gate | None,
        cols: Gate | None,
        dtype: torch.dtype,
        *,
        scale_rows: bool = ...,
        scale_cols: bool = ...,
        grads: GateGrads = ...,
        out: Tensor | None = ...,
        run: int = ...,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...

    def gate_grad(self, dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor: ...


def extent(gate: Gate | None, size: int, dtype: torch.dtype) -> int:
    """Packed length of a gated dimension: the open count, for 16-bit types rounded up to 32.

    Counts change on every step, and oneDNN, which does the 16-bit products, compiles a kernel for
    every new shape.
    """
    if gate is None:
        return size
    n_open = int(gate[2][0])
    if not 0 <= n_open <= size:
        raise ValueError(f"gates.count[0] must be in [0, {size}], got {n_open}")
    return _padded(n_open, size, dtype)


def _padded(n_open: int, size: int, dtype: torch.dtype) -> int:
    return n_open if dtype.itemsize > 2 else min(round_up(n_open, 32), size)


def to_log_alpha(
    p: PackUnpack, dz: Sequence[Tensor | None], gates: Sequence[Gate | None], dist: HardConcrete | None
) -> list[Tensor | None]:
    """With a ``dist``, gradients of the log_alphas that z was drawn from, out of those of z."""
    if dist is None:
        return [*dz]
    pairs = zip(dz, gates, strict=True)
    return [None if d is None or gate is None else p.gate_grad(d, gate[0], dist) for d, gate in pairs]


def linear_saved_shapes(call: LinearCall) -> list[tuple[int, int]]:
    """Nothing is kept for backward."""
    return []


def mlp_saved_shapes(call: MlpCall) -> list[tuple[int, int]]:
    return [(call.x.shape[0], weight.shape[0]) for weight in call.weights[:-1]]


def linear_forward(p: PackUnpack, call: LinearCall) -> Tensor:
    """y (M, out)."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    x_packed = p.pack(x, None, in_gate, dtype, scale_cols=True)
    w_packed = p.pack(weight, out_gate, in_gate, dtype)
    y_packed = _affine(p, x_packed, w_packed, bias, out_gate, dtype)
    return p.unpack(y_packed, (x.shape[0], weight.shape[0]), None, out_gate, dtype, scale_cols=scale_out)[0]


def _affine(
    p: PackUnpack, x: Tensor, w: Tensor, bias: Tensor | None, out_gate: Gate | None, dtype: torch.dtype
) -> Tensor:
    if bias is None:
        return torch.mm(x, w.t())
    return torch.addmm(p.pack(bias[None], None, out_gate, dtype)[0], x, w.t())


def linear_backward(p: PackUnpack, call: LinearCall, dy: Tensor, wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, each None where not wanted."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    (full_in, full_out), (need_x, need_w, need_b, need_in, need_out), dist = wanted
    out_features, in_features = weight.shape
    dx = dw = db = dz_in = dz_out = None
    dy_packed = p.pack(dy, None, out_gate, dtype)
    if need_x:
        w_packed = p.pack(weight, out_gate, in_gate, dtype, scale_rows=scale_out)
        dx_packed = torch.mm(dy_packed, w_packed)
        dx = p.unpack(dx_packed, (x.shape[0], in_features), None, in_gate, x.dtype, scale_cols=True)[0]
    if need_w or need_in or need_out:
        raw = torch.mm(dy_packed.t(), p.pack(x, None, in_gate, dtype))
        dw, dz_out, dz_in = p.unpack(
            raw,
            (out_features, in_features),
            out_gate,
            in_gate,
            weight.dtype,
            scale_rows=scale_out,
            scale_cols=True,
            grads=GateGrads(weight, need_out, need_in, full_out, full_in),
        )
    if bias is not None and (need_b or need_out):
        db_raw = dy_packed.sum(0, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
        db, _, dz_bias = p.unpack(
            db_raw,
            (1, out_features),
            None,
            out_gate,
            bias.dtype,
            scale_cols=scale_out,
            grads=GateGrads(bias[None], cols=need_out, full_cols=full_out),
        )
        db = db[0]
        if dz_bias is not None:
            dz_out = dz_bias if dz_out is None else dz_out + dz_bias
    dz = to_log_alpha(p, (dz_in, dz_out), (in_gate, out_gate), dist)
    return [dx, dw if need_w else None, db if need_b else None, *dz]


def mlp_forward(p: PackUnpack, call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    """y (M, n_L) and what backward needs: the hidden layers' pre-activations, packed in (M, n_l) buffers.

    Of a gated product the buffer is (M, 2 n_l): its first argument from column 0, the second from n_l on.
    """
    x, weights, biases, gates, activation, dtype, _ = call
    saved: list[Tensor] = []
    h = p.pack(x, None, gates[0], dtype, scale_cols=True)
    for weight, bias, gate, out_gate in zip(weights[:-1], biases[:-1], gates[:-1], gates[1:], strict=True):
        rows = _rows(out_gate, weight, activation, dtype)
        a = _affine(p, h, p.pack(weight, rows, gate, dtype), bias, rows, dtype)
        arguments = [a]
        if activation in GLU:
            saved.append(_spread(a, out_gate, weight.shape[0] // 2))
            arguments = _arguments(saved[-1], out_gate, activation, dtype)
        else:
            saved.append(F.pad(a, (0, weight.shape[0] - a.shape[1])))  # a static shape, whatever is open
        h = _scaled(_activate(activation, *arguments), out_gate, dtype)
    return _affine(p, h, p.pack(weights[-1], None, gates[-1], dtype), biases[-1], None, dtype), saved


def _rows(gate: Gate | None, weight: Tensor, activation: str, dtype: torch.dtype) -> Gate | None:
    """The gate of a hidden weight's rows: for a gated product the units' gate, twice."""
    if gate is None or activation not in GLU:
        return gate
    n = weight.shape[0] // 2
    extent(gate, n, dtype)  # raises for a count that is none
    z, index, count = gate
    n_open = int(count[0])
    opened, closed = index[:n_open], index[n_open:n]
    index = torch.cat((opened, opened + n, closed, closed + n, index.new_zeros(round_up(2 * n) - 2 * n)))
    return [torch.cat((z, z)), index, count.new_tensor([2 * n_open, round_up(2 * n_open)])]


def _spread(a: Tensor, gate: Gate | None, n: int) -> Tensor:
    """The two packed halves of a gated product, each at the start of n columns, zeros behind."""
    if gate is None:
        return a
    n_open = int(gate[2][0])
    out = a.new_zeros(a.shape[0], 2 * n)
    out[:, :n_open] = a[:, :n_open]
    out[:, n : n + n_open] = a[:, n_open : 2 * n_open]
    return out


def _join(halves: list[Tensor], gate: Gate | None, n: int, dtype: torch.dtype) -> Tensor:
    """The mirror of _spread: one behind the other, as long as the packed rows of their weight."""
    if gate is None:
        return torch.cat(halves, 1)
    n_open = int(gate[2][0])
    joined = torch.cat([half[:, :n_open] for half in halves], 1)
    padding = _padded(2 * n_open, 2 * n, dtype) - 2 * n_open
    return F.pad(joined, (0, padding)) if padding else joined


def _arguments(saved: Tensor, gate: Gate | None, activation: str, dtype: torch.dtype) -> list[Tensor]:
    """The packed arguments of a hidden layer's activation: one, of a gated product two."""
    n = saved.shape[1] // ROWS[activation]
    length = extent(gate, n, dtype)
    return [saved[:, half * n : half * n + length] for half in range(ROWS[activation])]


def _activate(activation: str, a: Tensor, up: Tensor | None = None) -> Tensor:
    if up is not None:
        return _activate(GLU[activation], a) * up
    if activation == "relu":
        return torch.relu(a)
    if activation == "gelu":
        return F.gelu(a)
    if activation == "silu":
        return F.silu(a)
    return a


def _activation_grads(activation: str, grad: Tensor, a: Tensor, up: Tensor | None = None) -> list[Tensor]:
    if up is not None:
        act = GLU[activation]
        return [*_activation_grads(act, grad * up, a), grad * _activate(act, a)]
    if activation == "relu":
        return [torch.ops.aten.threshold_backward(grad, a, 0)]
    if activation == "gelu":
        return [torch.ops.aten.gelu_backward(grad, a)]
    if activation == "silu":
        return [torch.ops.aten.silu_backward(grad, a)]
    return [grad]


def _scaled(h: Tensor, gate: Gate | None, dtype: torch.dtype) -> Tensor:
    """Packed columns times their gates, zero beyond the open ones."""
    if gate is None:
        return h
    z, index, count = gate
    n_open = int(count[0])
    return (h * F.pad(z.index_select(0, index[:n_open]), (0, h.shape[1] - n_open))).to(dtype)


def mlp_backward(
    p: PackUnpack, call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer, as in ``wanted.needs``; None where not wanted."""
    x, weights, biases, gates, activation, dtype, _ = call
    full, needs, dist = wanted
    depth = len(weights)
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * depth
    db: list[Tensor | None] = [None] * depth
    dz: list[Tensor | None] = [None] * depth
    grad = dy.to(dtype)
    for i in range(depth - 1, -1, -1):
        weight, bias = weights[i], biases[i]
        rows = _rows(gates[i + 1], weight, activation, dtype) if i + 1 < depth else None
        arguments = _arguments(saved[i - 1], gates[i], activation, dtype) if i else []
        if need_w[i] or need_z[i]:
            h = _activate(activation, *arguments) if i else p.pack(x, None, gates[0], dtype)
            dw[i], _, dz[i] = p.unpack(
                torch.mm(grad.t(), h),
                (weight.shape[0], weight.shape[1]),
                rows,
                gates[i],
                weight.dtype,
                scale_cols=True,
                grads=GateGrads(weight, cols=need_z[i], full_cols=full[i]),
            )
        if bias is not None and need_b[i]:
            db_packed = grad.sum(0, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
            db[i] = p.unpack(db_packed, (1, weight.shape[0]), None, rows, bias.dtype)[0][0]
        if i == 0 and not needs[0]:
            break
        grad = torch.mm(grad, p.pack(weight, rows, gates[i], dtype))
        if i == 0:
            dx = p.unpack(grad, (x.shape[0], x.shape[1]), None, gates[0], x.dtype, scale_cols=True)[0]
        else:
            grads = _activation_grads(activation, _scaled(grad, gates[i], dtype), *arguments)
            grad = grads[0] if len(grads) == 1 else _join(grads, gates[i], weight.shape[1], dtype)
    return [
        dx,
        *(w if n else None for w, n in zip(dw, need_w, strict=True)),
        *db,
        *to_log_alpha(p, dz, gates, dist),
    ]


def block_linear_forward(call: BlockCall) -> Tensor:
    """y (M, out) of x (W * Z)^T + b, Z the gates spread over blocks: a product per row of blocks."""
    x, weight, bias, z, b_out, b_in, dtype = call
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    for r in range(z.shape[0]):
        rows = slice(r * b_out, (r + 1) * b_out)
        columns, scale = _line(z[r], b_in, weight.shape[1])
        w = weight[rows].index_select(1, columns) * scale
        torch.mm(x.index_select(1, columns).to(dtype), w.to(dtype).t(), out=y[:, rows])
    return y if bias is None else y.add_(bias.to(dtype))


def _line(z: Tensor, block: int, size: int) -> tuple[Tensor, Tensor]:
    """Columns that the open blocks of a row of blocks cover, and the gate of each."""
    spread = z.repeat_interleave(block)[:size]
    columns = spread.nonzero()[:, 0]
    return columns, spread[columns]


def block_linear_backward(call: BlockCall, dy: Tensor, wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz, each None where not wanted."""
    x, weight, _, z, b_out, b_in, dtype = call
    (full,), (need_x, need_w, need_b, need_z), _ = wanted
    dx = dw = dz = None
    if need_x:
        dx = x.new_empty(x.shape)
        for c in range(z.shape[1]):
            block = slice(c * b_in, (c + 1) * b_in)
            rows, scale = _line(z[:, c], b_out, weight.shape[0])
            w = weight[:, block].index_select(0, rows) * scale[:, None]
            dx[:, block] = torch.mm(dy.index_select(1, rows).to(dtype), w.to(dtype))
    if need_w or need_z:
        dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        dz = torch.zeros_like(z)
        for r in range(z.shape[0]):
            block = slice(r * b_out, (r + 1) * b_out)
            cols, scale = _line(z[r], b_in, weight.shape[1])
            raw = torch.mm(dy[:, block].to(dtype).t(), x.index_select(1, cols).to(dtype)).to(z.dtype)
            dw[block] = dw[block].index_copy(1, cols, (raw * scale).to(dw.dtype))
            if need_z:
                terms = (raw * weight[block].index_select(1, cols)).sum(0)
                dz[r] = dz[r].index_add(0, cols // b_in, terms)
        if need_z and not full:
            dz = dz.masked_fill((z <= 0) | (z >= 1), 0)
    db = dy.sum(0) if need_b else None
    return [dx, dw if need_w else None, db, dz if need_z else None]
