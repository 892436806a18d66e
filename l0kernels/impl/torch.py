"""The portable backend: torch's index_select, mm and index_copy. On a GPU each count read is a sync."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._calls import NO_GRADS, Conv2dCall, Gate, GateGrads, LinearCall, MlpCall, Wanted
from .._gates import HardConcrete, compact, round_up
from ..reference.gates import sample_zs
from . import conv2d, packed
from .packed import Term, extent
from .portable import (  # noqa: F401  as they are
    add_l2_terms,
    check_not_nan,
    coupled_penalty_grad,
    gate_grad,
    masked_weight,
    masked_weight_grad,
)


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, one after the other.

    ``expected``: (vectors,), gets the expected number of open gates of each.
    """
    check_not_nan(log_alphas)
    if expected is not None:
        torch.stack([dist.p_open(a).sum() for a in log_alphas], out=expected)
    z = sample_zs(log_alphas, seed, rank, dist)
    order = [compact(values) for values in z]
    return torch.cat(z), torch.cat([index for index, _ in order]), torch.cat([count for _, count in order])


def l0_penalty(log_alphas: list[Tensor], weights: list[float], dist: HardConcrete) -> tuple[Tensor, Tensor]:
    """sum_g weight * p_open_g over all vectors, and its gradient, flat."""
    check_not_nan(log_alphas)
    p = [dist.p_open(log_alpha.flatten()) for log_alpha in log_alphas]
    total = torch.stack([w * q.sum() for w, q in zip(weights, p, strict=True)]).sum()
    return total, torch.cat([w * q * (1 - q) for w, q in zip(weights, p, strict=True)])


def coupled_penalty(
    terms: list[Term], gates: list[Tensor], weights: list[float], decay: float, dist: HardConcrete
) -> tuple[Tensor, Tensor]:
    """l0_penalty of the gates plus the L2 terms, and its gradient of the gates, flat."""
    if gates:
        total, grad = l0_penalty(gates, weights, dist)
    else:
        total = terms[0][0].new_zeros((), dtype=torch.promote_types(terms[0][0].dtype, torch.float32))
        grad = total.new_empty(0)
    add_l2_terms(total, grad, terms, gates, decay, dist)
    return total, grad


def _open(gate: Gate | None, size: int) -> Tensor | None:
    """The open indices, None where nothing is closed."""
    if gate is None:
        return None
    n_open = int(gate[2][0])
    return None if n_open == size else gate[1][:n_open].long()


def pack(
    full: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    run: int = 1,
) -> Tensor:
    """full[rows][:, cols], times the gates where asked, in ``dtype``, zero-padded to the extents.

    ``run``: how many entries in a row are one column.
    """
    if run > 1:
        cols = None if cols is None else with_runs(cols, run)
    extents = extent(rows, full.shape[0], dtype), extent(cols, full.shape[1], dtype)
    for dim, gate, scale in ((0, rows, scale_rows), (1, cols, scale_cols)):
        index = _open(gate, full.shape[dim])
        if index is not None:
            full = full.index_select(dim, index)
        if scale and gate is not None:
            z = gate[0] if index is None else gate[0].index_select(0, index)
            full = full * (z[:, None] if dim == 0 else z)
    full = full.to(dtype)
    padding = (0, extents[1] - full.shape[1], 0, extents[0] - full.shape[0])
    return F.pad(full, padding) if any(padding) else full


def unpack(
    packed: Tensor,
    shape: tuple[int, int],
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    grads: GateGrads = NO_GRADS,
    out: Tensor | None = None,
    run: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix of ``shape`` with packed in its open rows and columns, times the gates; gate gradients.

    ``out``: memory for the matrix. ``run``: as of pack.
    """
    if run > 1 and cols is not None:
        dw, dz_row, dz_col = unpack(
            packed, shape, rows, with_runs(cols, run), dtype,
            scale_rows=scale_rows, scale_cols=scale_cols, grads=grads, out=out,
        )  # fmt: skip
        return dw, dz_row, None if dz_col is None else dz_col.view(-1, run).sum(1)
    theta, dz_rows, dz_cols, full_rows, full_cols = grads
    z_dtype = next((g[0].dtype for g in (rows, cols) if g is not None), packed.dtype)
    row_index, col_index = _open(rows, shape[0]), _open(cols, shape[1])
    n_rows = shape[0] if row_index is None else len(row_index)
    n_cols = shape[1] if col_index is None else len(col_index)
    # Only where needed: a Function must not return a view, users could not change it in place.
    value = packed if packed.shape == (n_rows, n_cols) else packed[:n_rows, :n_cols]

    def gate_of(gate: Gate, index: Tensor | None) -> Tensor:
        return gate[0] if index is None else gate[0].index_select(0, index)

    dz: list[Tensor | None] = [None, None]
    if theta is not None and (dz_rows or dz_cols):
        for dim, index in enumerate((row_index, col_index)):
            theta = theta if index is None else theta.index_select(dim, index)
        product = value.to(z_dtype) * theta.to(z_dtype)
        for dim, wanted, gate, index, full in (
            (0, dz_rows, rows, row_index, full_rows),
            (1, dz_cols, cols, col_index, full_cols),
        ):
            if not wanted or gate is None:
                continue
            other, other_index, other_scale = (
                (cols, col_index, scale_cols) if dim == 0 else (rows, row_index, scale_rows)
            )
            terms = product
            if other is not None and other_scale:
                z_other = gate_of(other, other_index)
                terms = product * (z_other if dim == 0 else z_other[:, None])
            z = gate_of(gate, index)
            grad = terms.sum(1 - dim)
            if not full:
                grad = grad.masked_fill((z <= 0) | (z >= 1), 0)
            dz[dim] = grad if index is None else torch.zeros_like(gate[0]).index_copy_(0, index, grad)

    for dim, gate, index, scale in ((0, rows, row_index, scale_rows), (1, cols, col_index, scale_cols)):
        if scale and gate is not None:
            z = gate_of(gate, index)
            value = value * (z[:, None] if dim == 0 else z)
    value = value.to(dtype)
    if col_index is not None:
        value = value.new_zeros(n_rows, shape[1]).index_copy_(1, col_index, value)
    if row_index is not None:
        value = value.new_zeros(shape).index_copy_(0, row_index, value)
    return value.contiguous() if out is None else out.copy_(value), dz[0], dz[1]


def with_runs(gate: Gate, run: int) -> Gate:
    """The gate of every entry of a dimension whose units are runs of entries."""
    z, index, count = gate
    n = z.shape[0]
    spread = index[:n, None] * run + torch.arange(run, dtype=torch.int32, device=index.device)
    z = z.repeat_interleave(run)
    return [z, F.pad(spread.view(-1), (0, round_up(n * run) - n * run)), count * run]


def convolution(*_: Any) -> None:
    """None beside torch's."""


_PACK = SimpleNamespace(pack=pack, unpack=unpack, gate_grad=gate_grad, convolution=convolution)
block_linear_forward = packed.block_linear_forward
block_linear_backward = packed.block_linear_backward
linear_saved_shapes = packed.linear_saved_shapes
mlp_saved_shapes = packed.mlp_saved_shapes
conv2d_saved_shapes = conv2d.conv2d_saved_shapes
conv2d_memory_format = conv2d.memory_format


def draws_within(*_: Any) -> bool:
    """No layer draws its gates itself."""
    return False


def linear_forward(call: LinearCall) -> tuple[Tensor, list[Tensor]]:
    return packed.linear_forward(_PACK, call), []


def linear_backward(call: LinearCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    return packed.linear_backward(_PACK, call, dy, wanted)


def mlp_forward(call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    return packed.mlp_forward(_PACK, call)


def mlp_backward(call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    return packed.mlp_backward(_PACK, call, dy, saved, wanted)


def conv2d_forward(call: Conv2dCall) -> tuple[Tensor, list[Tensor]]:
    return conv2d.conv2d_forward(_PACK, call)


def conv2d_backward(call: Conv2dCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    return conv2d.conv2d_backward(_PACK, call, dy, saved, wanted)
