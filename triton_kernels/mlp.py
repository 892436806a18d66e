"""gated_mlp: activations between gated layers stay packed from end to end, forward and backward.

A hidden layer's product ends in bias, activation and gate, and leaves for backward the factors of its
gradient; the backward product multiplies by them and sums dz and db on the way. Hidden activations hold their
gate, so the weight gradient of the next layer needs no scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l0kernels._arguments import GLU
from l0kernels._calls import NO_GRADS, Gate, GateGrads, MlpCall, Wanted
from l0kernels._gates import HardConcrete, round_up

from . import gather
from .linear import input_grad, natural, operand, weight_grad
from .matmul import WHOLE, Epilogue, Halves, Operand, matmul, row_tiles
from .pack import column_sums, pack, reduce_partials, reduce_partials2


def _gathers(x: Tensor, weights: list[Tensor], activation: str, dtype: torch.dtype) -> bool:
    if activation in GLU and len(weights) > 1:
        return False
    return all(gather.prefers(x.shape[0], w.shape[0], w.shape[1], dtype) for w in weights)


def _saves(activation: str) -> bool:
    """Whether the gradient needs factors that the hidden activations do not give away."""
    return activation not in ("relu", "identity")


def _hidden_shapes(call: MlpCall) -> list[tuple[int, int]]:
    """Of the hidden activations and of their gradients' factors."""
    shapes = [(call.x.shape[0], round_up(w.shape[1])) for w in call.weights[1:]]
    if _saves(call.activation):
        shapes += [(m, n * (2 if call.activation in GLU else 1)) for m, n in shapes]
    return shapes


def mlp_saved_shapes(call: MlpCall) -> list[tuple[int, int]]:
    """Shapes of what mlp_forward saves, in ``dtype``: hidden activations, their gradients' factors, packs."""
    x, weights, _, gates, activation, dtype, repack = call
    if _gathers(x, weights, activation, dtype):
        return [(x.shape[0], w.shape[1]) for w in weights[1:]]
    shapes = _hidden_shapes(call)
    if repack:
        return shapes
    gated = [gate is not None for gate in gates]
    if gated[0]:
        shapes.append((x.shape[0], round_up(x.shape[1])))
    return shapes + [
        shape for i in range(len(weights)) for shape in _pack_shape(weights, i, gated, activation, dtype)
    ]


def _pack_shape(
    weights: list[Tensor], i: int, gated: list[bool], activation: str, dtype: torch.dtype
) -> list[tuple[int, int]]:
    """The pack of weight i, if it has one."""
    last = i + 1 == len(weights)
    if not gated[i] and (last or not gated[i + 1]):
        return []
    rows, columns = weights[i].shape
    if not last and gated[i + 1]:
        halves = 2 if activation in GLU else 1
        rows = halves * round_up(rows // halves)
    return [(rows, round_up(columns) if gated[i] else round_up(columns, 16 // dtype.itemsize))]


def _weight(
    weight: Tensor,
    out_gate: Gate | None,
    in_gate: Gate | None,
    dtype: torch.dtype,
    first: bool,
    glu: bool,
    packed: Tensor | None = None,
) -> Operand:
    """W of a layer; of the first with its input gate on it, for nothing else multiplies x.

    ``packed`` is what forward packed.
    """
    scale = first and in_gate is not None
    if not glu or out_gate is None:  # both halves lie as one
        return operand(weight, out_gate, in_gate, dtype, scale_cols=scale, packed=packed)
    n = weight.shape[0] // 2
    if packed is not None:
        skip = operand(weight[:n], out_gate, in_gate, dtype, scale_cols=scale, packed=packed).full is not None
        return Operand(weight if skip else None, packed)
    (rows, columns), *_ = _pack_shape([weight, weight[:1]], 0, [in_gate is not None, True], "swiglu", dtype)
    packed = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    skip = operand(weight[:n], out_gate, in_gate, dtype, scale_cols=scale, packed=packed).full is not None
    for half, out in ((weight[:n], packed[: rows // 2]), (weight[n:], packed[rows // 2 :])):
        pack(half, out_gate, in_gate, dtype, scale_cols=scale, skip_plain=skip, out=out)
    return Operand(weight if skip else None, packed)


def _halves(units: int, out_gate: Gate | None) -> tuple[int, int]:
    """Rows from the first half of a GLU's weight to the second: natural, packed."""
    return units, units if out_gate is None else round_up(units)


def mlp_forward(call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    """y (M, n_L) and what backward takes over (mlp_saved_shapes)."""
    x, weights, biases, gates, activation, dtype, repack = call
    if _gathers(x, weights, activation, dtype):
        return gather.mlp_forward(call)
    gated = [gate is not None for gate in gates]
    saved = [torch.empty(shape, dtype=dtype, device=x.device) for shape in _hidden_shapes(call)]
    depth, M = len(weights), x.shape[0]
    glu = activation in GLU
    h = operand(x, None, gates[0], dtype)
    packs = [h.packed]
    for i in range(depth - 1):
        N, K = weights[i + 1].shape[1], weights[i].shape[1]
        w = _weight(weights[i], gates[i + 1], gates[i], dtype, i == 0, glu)
        out_gate = gates[i + 1]
        packs.append(w.packed)
        after = Epilogue(
            "glu" if glu else "act", GLU.get(activation, activation), biases[i], scale_n=out_gate is not None,
            saved=saved[depth - 1 + i] if _saves(activation) else None,
        )  # fmt: skip
        halves = Halves(b=_halves(N, out_gate), saved=round_up(N)) if glu else WHOLE
        hidden = Operand(None, saved[i])
        matmul("nt", h, w, hidden, (M, N, K), n_gate=out_gate, k_gate=gates[i], epilogue=after, halves=halves)
        h = hidden
    N, K = weights[-1].shape
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    w = _weight(weights[-1], None, gates[-1], dtype, depth == 1, False)
    matmul("nt", h, w, Operand(y), (M, N, K), k_gate=gates[-1], epilogue=Epilogue(bias=biases[-1]))
    packs.append(w.packed)
    if not repack:
        needed = [gated[0], *(bool(_pack_shape(weights, i, gated, activation, dtype)) for i in range(depth))]
        saved += [t for t, need in zip(packs, needed, strict=True) if need and t is not None]
    return y, saved


def mlp_backward(call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, then dweight, dbias, dz of every layer, None where not wanted."""
    x, weights, biases, gates, activation, dtype, _ = call
    full, needs, dist = wanted
    if _gathers(x, weights, activation, dtype):
        return gather.mlp_backward(call, dy, saved, wanted)
    depth, M = len(weights), x.shape[0]
    glu = activation in GLU
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx: Tensor | None = None
    dw: list[Tensor | None] = [None] * depth
    db: list[Tensor | None] = [None] * depth
    dz: list[Tensor | None] = [None] * depth
    last_bias = biases[-1]
    if last_bias is not None and need_b[-1]:
        db[-1] = column_sums(dy, last_bias.dtype)
    gated = [gate is not None for gate in gates]
    packs = iter(saved[len(_hidden_shapes(call)) :])
    x_packed = next(packs, None) if gated[0] else None
    w_packed = [
        next(packs, None) if _pack_shape(weights, i, gated, activation, dtype) else None for i in range(depth)
    ]
    grad = Operand(natural(dy, dtype))
    for i in range(depth - 1, -1, -1):
        gate, out_gate = gates[i], gates[i + 1] if i + 1 < depth else None
        halved = glu and i + 1 < depth  # grad and the rows of W are two halves
        N, K = weights[i].shape[0] // (2 if halved else 1), weights[i].shape[1]
        h = operand(x, None, gate, dtype, packed=x_packed) if i == 0 else Operand(None, saved[i - 1])
        if need_w[i] or (i == 0 and need_z[0]):
            theta = weights[0] if i == 0 and need_z[0] else None
            dw[i], dz_0 = _weight_grad(
                grad, h, (N, K, M), out_gate, gate, weights[i], theta, full[i], dist, i == 0, halved
            )
            dz[0] = dz_0 if i == 0 else dz[0]
        if not (needs[0] or (i > 0 and any([*need_w[:i], *need_b[:i], *need_z[: i + 1]]))):
            break
        w = _weight(weights[i], out_gate, gate, dtype, i == 0, halved, w_packed[i])
        halves = Halves(2, (0, _half_width(grad)), _halves(N, out_gate)) if halved else WHOLE
        if i == 0:
            dx = input_grad(grad, w, (M, K, N), gate, out_gate, x.dtype, halves)
            break
        width = round_up(K)
        tiles = row_tiles(M, K, dtype, "glu_grad" if glu else "grad", x.device)
        want_db, bias = need_b[i - 1] and biases[i - 1] is not None, biases[i - 1]
        want_dz = need_z[i] and gate is not None
        partial = torch.empty(3 if glu else 2, tiles, width, device=x.device) if want_db or want_dz else None
        d_hidden = torch.empty(M, width * (2 if glu else 1), dtype=dtype, device=x.device)
        after = Epilogue(
            "glu_grad" if glu else "grad", GLU.get(activation, activation), scale_n=gate is not None,
            saved=saved[depth - 2 + i] if _saves(activation) else None, hidden=Operand(None, saved[i - 1]),
            partial=partial, dz=want_dz, db=want_db,
        )  # fmt: skip
        below = Operand(None, d_hidden)
        halves = Halves(*halves[:3], width, width) if glu else halves
        matmul("nn", grad, w, below, (M, K, N), n_gate=gate, k_gate=out_gate, epilogue=after, halves=halves)
        if partial is not None:
            dz[i], db[i - 1] = _finish(partial, gate, K, full[i], dist, want_dz, bias if want_db else None)
        grad = below
    return [dx, *dw, *db, *dz]


def _finish(
    partial: Tensor,
    gate: Gate | None,
    K: int,
    full: bool,
    dist: HardConcrete | None,
    want_dz: bool,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dz of a hidden gate and db of the layer below (of a GLU both halves) from their sums per row tile."""
    if want_dz and gate is not None and bias is not None and partial.shape[0] == 2:
        return reduce_partials2(
            partial[0], partial[1], gate, K, full=full, over_z=True, dist=dist, dtype=bias.dtype
        )
    dz = db = None
    if want_dz and gate is not None:
        dz = reduce_partials(partial[0], gate, K, dz=True, full=full, over_z=True, dist=dist)
    if bias is not None:
        halves = [reduce_partials(p, gate, K, dz=False, dtype=bias.dtype) for p in partial[1:]]
        db = torch.cat(halves) if len(halves) == 2 else halves[0]
    return dz, db


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
    dist: HardConcrete | None,
    scale: bool,
    halved: bool,
) -> tuple[Tensor, Tensor | None]:
    """dW, for ``theta`` the dz of its columns; grad holds the rows' z, h the columns' unless ``scale``."""
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    N, width = size[0], _half_width(grad)
    dz: Tensor | None = None
    for half in range(2 if halved else 1):
        rows = slice(half * N, (half + 1) * N)
        part = grad
        if halved and grad.packed is not None:
            part = Operand(None, grad.packed[:, half * width : (half + 1) * width])
        _, _, dz_half = weight_grad(
            part, h, size, out_gate, gate, weight.dtype,
            NO_GRADS if theta is None else GateGrads(theta[rows], cols=True, full_cols=full), dist,
            scale_rows=False, scale_cols=scale, out=dw[rows],
        )  # fmt: skip
        if dz_half is not None:
            dz = dz_half if dz is None else dz + dz_half
    return dw, dz
