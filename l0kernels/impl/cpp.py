"""Launchers of the native CPU kernels (csrc/): allocate, hand over addresses, sizes and strides.

Every tensor whose address is taken is bound to a name until the call returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._registry import native as _C
from ..reference.gates import HardConcrete
from ..reference.mlp import GLU
from . import conv2d, joined, packed
from . import torch as portable
from .packed import Gate, Term, extent
from .recycle import empty_grad

# 16-bit products go through packed.py to torch.mm, which uses the hardware's 16-bit instructions.
_FUSED = (torch.float32, torch.float64)
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "silu": 3}


def _gate(gate: Gate | None, full: bool = False) -> tuple[int, int, int, int, bool] | None:
    if gate is None:
        return None
    z, index, count = gate
    return z.data_ptr(), index.data_ptr(), count.data_ptr(), z.shape[0], full


def _matrix(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _draw(log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete) -> tuple[Any, ...]:
    """Where gates are drawn from; the log_alphas are contiguous and bound to a name by the caller."""
    return seed.data_ptr(), rank, _constants(dist), [a.data_ptr() for a in log_alphas]


def _constants(dist: HardConcrete) -> tuple[float, float, float]:
    return dist.beta, dist.gamma, dist.zeta


def _joined_gates(
    z: Tensor, index: Tensor, count: Tensor, sizes: list[int | None]
) -> list[tuple[int, int, int, int, bool] | None]:
    return [None if gate is None else (*gate, False) for gate in joined.addresses(z, index, count, sizes)]


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, one after the other, in one call.

    ``expected``: (vectors,), gets the expected number of open gates of each.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    gates = joined.empty(log_alphas)
    nan_at = _C.sample(
        log_alphas[0].dtype == torch.float64,
        _draw(log_alphas, seed, rank, dist),
        _joined_gates(*gates, [a.shape[0] for a in log_alphas]),
        _address(expected),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, len(log_alphas))
    return gates


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, from z alone; exactly 0 where z is 0 or 1."""
    dz, z = dz.contiguous(), z.contiguous()
    out = torch.empty_like(z)
    _C.gate_grad(
        dz.data_ptr(), z.data_ptr(), out.data_ptr(), z.numel(), z.dtype == torch.float64, _constants(dist)
    )
    return out


def l0_penalty(log_alphas: list[Tensor], weights: list[float], dist: HardConcrete) -> tuple[Tensor, Tensor]:
    """sum_g weight * p_open_g over all vectors, and its gradient, flat."""
    log_alphas = [a.contiguous() for a in log_alphas]
    sizes = [a.numel() for a in log_alphas]
    first = log_alphas[0]
    total, grad = first.new_empty(()), first.new_empty(sum(sizes))
    nan = _C.penalty(
        [a.data_ptr() for a in log_alphas],
        sizes,
        weights,
        first.dtype == torch.float64,
        dist.beta * math.log(-dist.gamma / dist.zeta),
        total.data_ptr(),
        grad.data_ptr(),
    )
    if nan:
        portable.check_not_nan(log_alphas)
    return total, grad


def _is_native(theta: Tensor) -> bool:
    return theta.dtype in _FUSED and theta.is_contiguous()


def _coupled(
    call: Callable[..., Any],
    terms: list[Term],
    gates: list[Tensor],
    weights: list[float],
    decay: float,
    dist: HardConcrete,
    like: Tensor,
    *results: Any,
) -> Any:
    return call(
        like.dtype == torch.float64,
        [(a.data_ptr(), a.numel(), weight) for a, weight in zip(gates, weights, strict=True)],
        [
            (t.data_ptr(), t.shape[0], t.shape[1:].numel(), groups, max(t.shape[2:].numel(), 1), out, in_)
            for t, out, in_, groups in terms
        ],
        decay,
        dist.beta * math.log(-dist.gamma / dist.zeta),
        like.data_ptr(),
        *results,
        torch.get_num_threads(),
    )


def coupled_penalty(
    terms: list[Term], gates: list[Tensor], weights: list[float], decay: float, dist: HardConcrete
) -> tuple[Tensor, Tensor]:
    """l0_penalty of the gates plus the L2 terms, and its gradient of the gates, flat, in one call."""
    first = terms[0][0]
    total = first.new_empty((), dtype=torch.promote_types(first.dtype, torch.float32))
    grad = total.new_empty(sum(a.numel() for a in gates))
    gates = [a.contiguous() for a in gates]
    native = [term for term in terms if _is_native(term[0])]
    if _coupled(_C.coupled_penalty, native, gates, weights, decay, dist, total, grad.data_ptr()):
        portable.check_not_nan(gates)
    if len(native) < len(terms):
        others = [term for term in terms if not _is_native(term[0])]
        portable.add_l2_terms(total, grad, others, gates, decay, dist)
    return total, grad


def coupled_penalty_grad(
    terms: list[Term], gates: list[Tensor], factor: Tensor, decay: float, dist: HardConcrete
) -> list[Tensor]:
    """factor * decay * p_o * p_i * theta of every term, in one call."""
    gates = [a.contiguous() for a in gates]
    grads = [empty_grad(theta) if _is_native(theta) else None for theta, *_ in terms]
    native = [term for term, grad in zip(terms, grads, strict=True) if grad is not None]
    addresses = [grad.data_ptr() for grad in grads if grad is not None]
    _coupled(_C.coupled_penalty_grad, native, gates, [0.0] * len(gates), decay, dist, factor, addresses)
    return [
        portable.coupled_penalty_grad([term], gates, factor, decay, dist)[0] if grad is None else grad
        for term, grad in zip(terms, grads, strict=True)
    ]


def _in_double(dtype: torch.dtype, rows: Gate | None, cols: Gate | None) -> bool:
    """Whether pack and unpack compute in float64: if the gates are; without gates, if the matrix is."""
    gate = cols if rows is None else rows
    return (dtype if gate is None else gate[0].dtype) == torch.float64


def pack(
    full: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
) -> Tensor:
    """full[rows][:, cols], times the gates where asked, in ``dtype``, zero-padded to the extents."""
    n_rows, n_cols = extent(rows, full.shape[0], dtype), extent(cols, full.shape[1], dtype)
    out = full.new_empty(n_rows, n_cols, dtype=dtype)
    _C.pack(
        _matrix(full),
        _TYPES[full.dtype],
        full.shape[0],
        full.shape[1],
        out.data_ptr(),
        _TYPES[dtype],
        n_rows,
        n_cols,
        _gate(rows),
        _gate(cols),
        scale_rows,
        scale_cols,
        _in_double(dtype, rows, cols),
        torch.get_num_threads(),
    )
    return out


def unpack(
    packed: Tensor,
    shape: tuple[int, int],
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    theta: Tensor | None = None,
    full_rows: bool = False,
    full_cols: bool = False,
    dz_rows: bool = False,
    dz_cols: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix of ``shape`` with packed in its open rows and columns, times the gates; gate gradients.

    ``out``: contiguous memory for the matrix.
    """
    packed = packed.contiguous()
    out = packed.new_empty(shape, dtype=dtype) if out is None else out
    dz_row = torch.empty_like(rows[0]) if dz_rows and rows is not None else None
    dz_col = torch.empty_like(cols[0]) if dz_cols and cols is not None else None
    _C.unpack(
        (packed.data_ptr(), packed.stride(0), 1),  # a lone column may have any stride
        _TYPES[packed.dtype],
        out.data_ptr(),
        _TYPES[dtype],
        shape[0],
        shape[1],
        _gate(rows, full_rows),
        _gate(cols, full_cols),
        scale_rows,
        scale_cols,
        _in_double(packed.dtype, rows, cols),
        (0, 0, 0) if theta is None else _matrix(theta),
        0 if theta is None else _TYPES[theta.dtype],
        _address(dz_row),
        _address(dz_col),
        torch.get_num_threads(),
    )
    return out, dz_row, dz_col


_PACK = SimpleNamespace(pack=pack, unpack=unpack)


def _fused(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return dtype in _FUSED and all(t is None or t.dtype == dtype for t in tensors)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Gate | None,
    out_gate: Gate | None,
    scale_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    if not _fused(dtype, x, weight, bias):
        return packed.linear_forward(_PACK, x, weight, bias, in_gate, out_gate, scale_out, dtype)
    return _linear_forward(x, weight, bias, [_gate(in_gate), _gate(out_gate)], scale_out, None)


def l0_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    seed: Tensor,
    rank: int,
    dist: HardConcrete,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample and linear_forward in one call: y, and the gates joined."""
    log_alphas = [None if a is None else a.contiguous() for a in (in_log_alpha, out_log_alpha)]
    given = [a for a in log_alphas if a is not None]
    gates = joined.empty(given)
    sides = _joined_gates(*gates, [None if a is None else a.shape[0] for a in log_alphas])
    return _linear_forward(x, weight, bias, sides, True, _draw(given, seed, rank, dist)), *gates


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sides: list[Any],
    scale_out: bool,
    draw: tuple[Any, ...] | None,
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    nan_at = _C.linear_forward(
        x.dtype == torch.float64,
        x.shape[0],
        weight.shape[1],
        weight.shape[0],
        _matrix(x),
        _matrix(weight),
        _address(bias),
        *sides,
        scale_out,
        draw,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, 2 - sides.count(None))
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
    to_log_alpha: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where ``needs`` says so; with ``to_log_alpha`` the last two are
    the gradients of the log_alphas that the gates were drawn from."""
    if not _fused(dtype, dy, x, weight, bias):
        grads = packed.linear_backward(
            _PACK, dy, x, weight, bias, in_gate, out_gate, scale_out, full_in, full_out, dtype, needs
        )
        return packed.to_log_alpha(gate_grad, grads, 3, [in_gate, out_gate], to_log_alpha)
    need_x, need_w, need_b, need_in, need_out = needs
    M, (n_out, n_in) = x.shape[0], weight.shape
    dx = x.new_empty(M, n_in) if need_x else None
    reads_dw = need_out or (need_in and not need_x)  # dz is read off dW
    dw = empty_grad(weight) if need_w or reads_dw else None
    bias = None if bias is None else bias.contiguous()
    db = x.new_empty(n_out) if need_b or (need_out and bias is not None) else None
    dz_in = x.new_empty(n_in) if need_in else None
    dz_out = x.new_empty(n_out) if need_out else None
    _C.linear_backward(
        dtype == torch.float64,
        M,
        n_in,
        n_out,
        _matrix(x),
        _matrix(weight),
        _address(bias),
        _gate(in_gate, full_in),
        _gate(out_gate, full_out),
        scale_out,
        _matrix(dy),
        _address(dx),
        _address(dw),
        _address(db),
        _address(dz_in),
        _address(dz_out),
        None if to_log_alpha is None else _constants(to_log_alpha),
        torch.get_num_threads(),
    )
    return [dx, dw if need_w else None, db if need_b else None, dz_in, dz_out]


def draws_within(tensors: list[Tensor | None], dtype: torch.dtype, activation: str) -> bool:
    """Whether a layer or chain of these tensors, log_alphas among them, is one call that can draw."""
    return activation not in GLU and _fused(dtype, *tensors)


def _layers(
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Any],
    saved: list[Tensor],
    grads: list[list[Tensor | None]] | None = None,
) -> list[tuple[Any, ...]]:
    depth = len(weights)
    layers = []
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        dw, db, dz = (None, None, None) if grads is None else (group[i] for group in grads)
        n_out, n_in = weight.shape
        layers.append(
            (
                n_in,
                n_out,
                _matrix(weight),
                _address(bias),
                gate,
                saved[i - 1].data_ptr() if i else 0,
                saved[depth - 2 + i].data_ptr() if i and len(saved) > depth - 1 else 0,
                _address(dw),
                _address(db),
                _address(dz),
            )
        )
    return layers


def mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Gate | None],
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """y, and what backward needs: the hidden activations, packed in (M, n_l) buffers, and for curved
    activations their arguments. Gated products are composed: native pack and unpack around torch.mm."""
    if activation in GLU or not _fused(dtype, x, *weights, *biases):
        return packed.mlp_forward(_PACK, x, weights, biases, gates, activation, dtype)
    return _mlp_forward(x, weights, biases, [_gate(gate) for gate in gates], activation, None)


def l0_mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    log_alphas: list[Tensor | None],
    activation: str,
    seed: Tensor,
    rank: int,
    dist: HardConcrete,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """sample and mlp_forward in one call: y, what backward needs, and the gates joined."""
    given = [a.contiguous() for a in log_alphas if a is not None]
    gates = joined.empty(given)
    layers = _joined_gates(*gates, [None if a is None else a.shape[0] for a in log_alphas])
    draw = _draw(given, seed, rank, dist)
    return *_mlp_forward(x, weights, biases, layers, activation, draw), gates


def _mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Any],
    activation: str,
    draw: tuple[Any, ...] | None,
) -> tuple[Tensor, list[Tensor]]:
    M = x.shape[0]
    saved = [x.new_empty(M, w.shape[1]) for w in weights[1:]]
    if activation in ("gelu", "silu"):
        saved += [torch.empty_like(h) for h in saved]
    y = x.new_empty(M, weights[-1].shape[0])
    biases = [None if b is None else b.contiguous() for b in biases]
    nan_at = _C.mlp_forward(
        x.dtype == torch.float64,
        M,
        _matrix(x),
        _ACTIVATIONS[activation],
        _layers(weights, biases, gates, saved),
        draw,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, len(gates) - gates.count(None))
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
    to_log_alpha: HardConcrete | None = None,
) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer, None where ``needs`` says so; with ``to_log_alpha`` the
    last are the gradients of the log_alphas that the gates were drawn from."""
    if activation in GLU or not _fused(dtype, dy, x, *weights, *biases):
        grads = packed.mlp_backward(
            _PACK, dy, x, weights, biases, gates, saved, activation, dtype, full, needs
        )
        return packed.to_log_alpha(gate_grad, grads, 1 + 2 * len(weights), gates, to_log_alpha)
    given = [_gate(gate, f) for gate, f in zip(gates, full, strict=True)]
    return _mlp_backward(dy, x, weights, biases, given, saved, activation, needs, to_log_alpha)


def l0_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gated: list[bool],
    z: Tensor,
    index: Tensor,
    count: Tensor,
    saved: list[Tensor],
    activation: str,
    dtype: torch.dtype,
    needs: list[bool],
    dist: HardConcrete,
) -> list[Tensor | None]:
    """mlp_backward of l0_mlp_forward, with its gates as it returned them."""
    sizes = [w.shape[1] if has_gate else None for w, has_gate in zip(weights, gated, strict=True)]
    gates = _joined_gates(z, index, count, sizes)
    dy = dy if dy.dtype == dtype else dy.to(dtype)
    return _mlp_backward(dy, x, weights, biases, gates, saved, activation, needs, dist)


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Any],
    saved: list[Tensor],
    activation: str,
    needs: list[bool],
    to_log_alpha: HardConcrete | None,
) -> list[Tensor | None]:
    depth = len(weights)
    need_w, need_b, need_z = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth], needs[1 + 2 * depth :]
    dx = x.new_empty(x.shape) if needs[0] else None
    # the first dz is read off dx or dW
    dw = [
        empty_grad(w) if n or (i == 0 and need_z[0] and not needs[0]) else None
        for i, (w, n) in enumerate(zip(weights, need_w, strict=True))
    ]
    db = [
        x.new_empty(w.shape[0]) if n and b is not None else None
        for w, b, n in zip(weights, biases, need_b, strict=True)
    ]
    dz = [x.new_empty(w.shape[1]) if n else None for w, n in zip(weights, need_z, strict=True)]
    _C.mlp_backward(
        x.dtype == torch.float64,
        x.shape[0],
        _matrix(x),
        _ACTIVATIONS[activation],
        _layers(weights, biases, gates, saved, [dw, db, dz]),
        _matrix(dy),
        _address(dx),
        None if to_log_alpha is None else _constants(to_log_alpha),
        torch.get_num_threads(),
    )
    return [dx, *(w if n else None for w, n in zip(dw, need_w, strict=True)), *db, *dz]


def masked_weight(weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete) -> Tensor:
    """W * z, z drawn from the seed chunk by chunk: neither noise nor mask is ever stored."""
    if not _fused(log_alpha.dtype, weight):
        return portable.masked_weight(weight, log_alpha, seed, dist)
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = torch.empty_like(weight)
    nan = _C.masked_weight_forward(
        weight.dtype == torch.float64,
        weight.data_ptr(),
        log_alpha.data_ptr(),
        weight.numel(),
        seed.data_ptr(),
        dist.beta,
        dist.gamma,
        dist.zeta,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if nan:
        portable.raise_nan(0, 1)
    return out


def masked_weight_grad(
    grad: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor,
    dist: HardConcrete,
    need_w: bool,
    need_log_alpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and dlog_alpha from dL/d(W * z), z drawn again."""
    if not _fused(log_alpha.dtype, weight, grad):
        return portable.masked_weight_grad(grad, weight, log_alpha, seed, dist, need_w, need_log_alpha)
    grad, weight, log_alpha = grad.contiguous(), weight.contiguous(), log_alpha.contiguous()
    dw = torch.empty_like(weight) if need_w else None
    dlog_alpha = torch.empty_like(log_alpha) if need_log_alpha else None
    _C.masked_weight_backward(
        weight.dtype == torch.float64,
        weight.data_ptr(),
        log_alpha.data_ptr(),
        weight.numel(),
        seed.data_ptr(),
        dist.beta,
        dist.gamma,
        dist.zeta,
        grad.data_ptr(),
        _address(dw),
        _address(dlog_alpha),
        torch.get_num_threads(),
    )
    return dw, dlog_alpha


def block_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b_out: int, b_in: int, dtype: torch.dtype
) -> Tensor:
    if not _fused(dtype, x, weight, bias, z):
        return packed.block_linear_forward(x, weight, bias, z, b_out, b_in, dtype)
    z = z.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    _C.block_linear_forward(
        dtype == torch.float64,
        x.shape[0],
        weight.shape[1],
        weight.shape[0],
        b_out,
        b_in,
        _matrix(x),
        _matrix(weight),
        _address(bias),
        z.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def block_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    b_out: int,
    b_in: int,
    full: bool,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    if not _fused(dtype, dy, x, weight, z):
        return packed.block_linear_backward(dy, x, weight, z, b_out, b_in, full, dtype, needs)
    need_x, need_w, need_b, need_z = needs
    z = z.contiguous()
    dx = x.new_empty(x.shape) if need_x else None
    dw = empty_grad(weight) if need_w or need_z else None  # dz is read off dW
    db = x.new_empty(weight.shape[0]) if need_b else None
    dz = torch.empty_like(z) if need_z else None
    _C.block_linear_backward(
        dtype == torch.float64,
        x.shape[0],
        weight.shape[1],
        weight.shape[0],
        b_out,
        b_in,
        _matrix(x),
        _matrix(weight),
        z.data_ptr(),
        full,
        _matrix(dy),
        _address(dx),
        _address(dw),
        _address(db),
        _address(dz),
        torch.get_num_threads(),
    )
    return [dx, dw if need_w else None, db, dz]


def conv2d_forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    return conv2d.conv2d_forward(_PACK, *args)


def conv2d_backward(*args: Any) -> list[Tensor | None]:
    *given, dist = args
    return packed.to_log_alpha(gate_grad, conv2d.conv2d_backward(_PACK, *given), 3, given[4:6], dist)
