"""gated_mlp: activations between gated layers stay packed from end to end, forward and backward.

A hidden layer's product ends in bias, activation and gate, and leaves for backward the factors of its gradient; the
backward product multiplies by them and sums dz and db on the way. Hidden activations hold their gate, so the weight
gradient of the next layer needs no scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.gates import HardConcrete, round_up
from . import gather
from .linear import finish_gate_grad, input_grad, log_alpha_grad, natural, operand, weight_grad
from .matmul import Gate, Operand, matmul, row_tiles
from .pack import pack, reduce_partials, reduce_partials2

GLU = {"swiglu": "silu", "geglu": "gelu"}


def _gathers(x: Tensor, weights: list[Tensor], activation: str, dtype: torch.dtype) -> bool:
    if activation in GLU:
        return False
    return all(gather.prefers(x.shape[0], w.shape[0], w.shape[1], dtype) for w in weights)


def _saves(activation: str) -> bool:
    """Whether the gradient needs factors that the hidden activations do not give away."""
    return activation not in ("relu", "identity")


def saved_shapes(
    x: Tensor, weights: list[Tensor], activation: str, dtype: torch.dtype
) -> list[tuple[int, int]]:
    """Shapes of what mlp_forward saves, all in ``dtype``."""
    M = x.shape[0]
    if _gathers(x, weights, activation, dtype):
        return [(M, w.shape[1]) for w in weights[1:]]
    hidden = [(M, round_up(w.shape[1])) for w in weights[1:]]
    if not _saves(activation):
        return hidden
    return hidden + [(m, n * (2 if activation in GLU else 1)) for m, n in hidden]


def _weight(
    weight: Tensor, out_gate: Gate | None, in_gate: Gate | None, dtype: torch.dtype, first: bool, glu: bool
) -> Operand:
    """W of a layer; of the first with its input gate on it, for nothing else multiplies x."""
    scale = first and in_gate is not None
    if not glu:
        return operand(weight, out_gate, in_gate, dtype, scale_cols=scale)
    n = weight.shape[0] // 2
    gate_half = operand(weight[:n], out_gate, in_gate, dtype, scale_cols=scale)
    if gate_half.packed is None:
        return Operand(natural(weight, dtype))
    rows, columns = gate_half.packed.shape
    both = gate_half.packed.new_empty(2 * rows, columns)
    skip = gate_half.full is not None
    for half, out in ((weight[:n], both[:rows]), (weight[n:], both[rows:])):
        pack(half, out_gate, in_gate, dtype, scale_cols=scale, skip_plain=skip, out=out)
    return Operand(weight if skip else None, both)


def _halves(weight: Operand, units: int) -> tuple[int, int]:
    """Rows from the first half of a GLU's weight to the second: natural, packed."""
    return units, 0 if weight.packed is None else weight.packed.shape[0] // 2


def mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Gate | None],
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y (M, n_L) and, for backward, the hidden activations and the factors of their gradients (saved_shapes)."""
    if _gathers(x, weights, activation, dtype):
        return gather.mlp_forward(x, weights, biases, gates, activation, dtype)
    saved = [torch.empty(s, dtype=dtype, device=x.device) for s in saved_shapes(x, weights, activation, dtype)]
    depth, M = len(weights), x.shape[0]
    glu = activation in GLU
    h = operand(x, None, gates[0], dtype)
    for i in range(depth - 1):
        N, K = weights[i + 1].shape[1], weights[i].shape[1]
        w = _weight(weights[i], gates[i + 1], gates[i], dtype, i == 0, glu)
        out_gate = gates[i + 1]
        matmul(
            "nt", h, w, Operand(None, saved[i]), M, N, K,
            n_gate=out_gate, k_gate=gates[i], epilogue="glu" if glu else "act", activation=GLU.get(activation, activation),
            bias=biases[i], scale_n=out_gate is not None, saved=saved[depth - 1 + i] if _saves(activation) else None,
            half_b=_halves(w, N) if glu else (0, 0), half_s=round_up(N) if glu else 0,
        )  # fmt: skip
        h = Operand(None, saved[i])
    N, K = weights[-1].shape
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    w = _weight(weights[-1], None, gates[-1], dtype, depth == 1, False)
    matmul("nt", h, w, Operand(y), M, N, K, k_gate=gates[-1], bias=biases[-1])
    return y, saved


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Gate | None],
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    full: list[bool],
    needs: list[bool],
    dist: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz (with ``dist`` dlog_alpha) of every layer; None where ``needs`` says so."""
    if _gathers(x, weights, activation, dtype):
        return gather.mlp_backward(dy, x, weights, biases, gates, saved, activation, dtype, full, needs, dist)
    depth, M = len(weights), x.shape[0]
    glu = activation in GLU
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * depth
    db: list[Tensor | None] = [None] * depth
    dz: list[Tensor | None] = [None] * depth
    last_bias = biases[-1]
    if last_bias is not None and need_b[-1]:
        db[-1] = dy.sum(0, dtype=torch.float32).to(last_bias.dtype)
    grad = Operand(natural(dy, dtype))
    for i in range(depth - 1, -1, -1):
        gate, out_gate = gates[i], gates[i + 1] if i + 1 < depth else None
        halved = glu and i + 1 < depth  # grad and the rows of W are two halves
        N, K = weights[i].shape[0] // (2 if halved else 1), weights[i].shape[1]
        h = operand(x, None, gate, dtype) if i == 0 else Operand(None, saved[i - 1])
        dx_gives_dz = i > 0 or needs[0]
        if need_w[i] or (need_z[i] and not dx_gives_dz):
            theta = weights[0] if need_z[i] and not dx_gives_dz else None
            dw[i], dz_0 = _weight_grad(grad, h, (N, K, M), out_gate, gate, weights[i], theta, full[i], i == 0, halved)
            if dz_0 is not None:
                dz[0] = log_alpha_grad(dz_0, gate, dist)
        w = Operand()
        halves: dict[str, Any] = {}
        if i or needs[0]:
            w = _weight(weights[i], out_gate, gate, dtype, False, halved)
        if halved:
            halves = {"halves": 2, "half_a": (0, _half_width(grad)), "half_b": _halves(w, N)}
        if i == 0:
            if needs[0]:
                size = (M, K, N)
                dx, dz_0 = input_grad(
                    grad, w, h, size, gate, out_gate, x.dtype, dtype, need_z[0], full[0], dist, **halves
                )
                dz[0] = dz_0 if dz_0 is not None else dz[0]
            break
        if not (needs[0] or any(need_w[:i]) or any(need_b[:i]) or any(need_z[: i + 1])):
            break
        width = round_up(K)
        tiles = row_tiles(M, K, dtype, "glu_grad" if glu else "grad", x.device)
        want_db, bias = need_b[i - 1] and biases[i - 1] is not None, biases[i - 1]
        want_dz = need_z[i] and gate is not None
        partial = torch.empty(3 if glu else 2, tiles, width, device=x.device) if want_db or want_dz else None
        d_hidden = torch.empty(M, width * (2 if glu else 1), dtype=dtype, device=x.device)
        matmul(
            "nn", grad, w, Operand(None, d_hidden), M, K, N, n_gate=gate, k_gate=out_gate,
            epilogue="glu_grad" if glu else "grad", activation=GLU.get(activation, activation), scale_n=gate is not None,
            saved=saved[depth - 2 + i] if _saves(activation) else None, hidden=Operand(None, saved[i - 1]),
            partial=partial, dz=want_dz, db=want_db, half_s=width if glu else 0, half_c=width if glu else 0,
            **halves,
        )  # fmt: skip
        if partial is not None:
            if want_dz:
                dz[i] = finish_gate_grad(partial[0], gate, full[i], dist, over_z=True)
            if want_db and bias is not None:
                halves = [reduce_partials(p, gate, K, dz=False, dtype=bias.dtype) for p in partial[1:]]
                db[i - 1] = torch.cat(halves) if glu else halves[0]
        grad = Operand(None, d_hidden)
    return [dx, *dw, *db, *dz]


def _half_width(grad: Operand) -> int:
    """Columns from the gradient of the first half to that of the second."""
    return 0 if grad.packed is None else grad.packed.shape[1] // 2


def _weight_grad(
    grad: Operand,
    h: Operand,
    size: tuple[int, int, int],
    out_gate: Gate | None,
    gate: Gate | None,
    weight: Tensor,
    theta: Tensor | None,
    full: bool,
    scale: bool,
    halved: bool,
) -> tuple[Tensor, Tensor | None]:
    """dW, and for ``theta`` the dz of its columns; grad holds z of the rows, h that of the columns unless ``scale``."""
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    N, width = size[0], _half_width(grad)
    dz: Tensor | None = None
    for half in range(2 if halved else 1):
        rows = slice(half * N, (half + 1) * N)
        part = grad
        if halved and grad.packed is not None:
            part = Operand(None, grad.packed[:, half * width : (half + 1) * width])
        _, _, dz_half = weight_grad(
            part, h, size, out_gate, gate, weight.dtype, None if theta is None else theta[rows], full_cols=full,
            dz_cols=theta is not None, scale_rows=False, scale_cols=scale, out=dw[rows],
        )  # fmt: skip
        if dz_half is not None:
            dz = dz_half if dz is None else dz + dz_half
    return dw, dz
