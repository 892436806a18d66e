"""Launchers of the native CPU kernels (csrc/): allocate, hand over addresses, sizes and strides.

Addresses of what is handed in come from memory.py, which checks what the kernel will believe of them. Every
tensor whose address is taken is bound to a name until the call returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .._arguments import GLU
from .._calls import (
    NO_GRADS,
    BlockCall,
    Conv2dCall,
    CostTerms,
    DrawnMlpCall,
    Gate,
    GateGrads,
    L0LinearCall,
    L0MlpCall,
    LinearCall,
    MlpCall,
    ProxCall,
    Wanted,
)
from .._gates import HardConcrete, round_up
from . import conv2d, few_channels, im2col, joined, packed, portable
from .im2col import Way
from .joined import ACTIVATIONS, TYPES, constants
from .memory import empty_grad, fresh, images, matrix, optional, plain, vector
from .packed import Term, extent

# 16-bit products go through packed.py to torch.mm, which uses the hardware's 16-bit instructions.
_FUSED = (torch.float32, torch.float64)


def _gate(gate: Gate | None, name: str, n: int, dtype: torch.dtype, full: bool = False) -> _C.Gate | None:
    """n gates for a product in ``dtype``, whose z is float64 for float64 and else float32."""
    if gate is None:
        return None
    z, index, count = gate
    return (
        vector(z, name, torch.float64 if dtype == torch.float64 else torch.float32, n),
        vector(index, name, torch.int32, round_up(n)),
        vector(count, name, torch.int32, 2),
        n,
        full,
    )


def _draw(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, dtype: torch.dtype
) -> _C.Draw:
    """Where gates are drawn from; the log_alphas are contiguous and bound to a name by the caller."""
    addresses = [vector(a, "log_alpha", dtype, a.numel()) for a in log_alphas]
    return vector(seed, "seed", torch.int64, 1), rank, constants(dist), addresses


def _joined_gates(
    z: Tensor,
    index: Tensor,
    count: Tensor,
    sizes: list[int | None],
    dtype: torch.dtype,
    are_fresh: bool = False,
) -> list[_C.Gate | None]:
    places = joined.addresses(z, index, count, sizes, dtype, are_fresh=are_fresh)
    return [None if gate is None else (*gate, False) for gate in places]


def sample(
    log_alphas: list[Tensor], seed: Tensor, rank: int, dist: HardConcrete, expected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, index and count of every gate vector, one after the other, in one call.

    ``expected``: (vectors,), gets the expected number of open gates of each.
    """
    log_alphas = [a.contiguous() for a in log_alphas]
    gates = joined.empty(log_alphas)
    dtype = log_alphas[0].dtype
    nan_at = _C.sample(
        dtype == torch.float64,
        _draw(log_alphas, seed, rank, dist, dtype),
        _joined_gates(*gates, [a.shape[0] for a in log_alphas], dtype, True),  # type: ignore[arg-type]  # no None
        optional(expected, "expected", dtype, len(log_alphas)),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, len(log_alphas))
    return gates


class Places(NamedTuple):
    """What of a vector of gates exists in packed data: the open ones, and closed ones that round up.

    Attributes:
        exist: int64, which do, ascending.
        within: int64, where the open ones are among those.
        opened: int64, which are open.
        order: int32, those that exist, then the others, as long as an index of Gates.
    """

    exist: Tensor
    within: Tensor
    opened: Tensor
    order: Tensor


def present(
    indices: Sequence[Tensor], sizes: Sequence[int], counts: Sequence[tuple[int, int]]
) -> list[Places]:
    """Of vectors of gates by their index, so many gates, and how many are open and exist: all in one call."""
    lengths = [length for n_open, n in counts for length in (n, n_open, n_open)]
    padded = [*map(round_up, sizes)]
    places = torch.empty(sum(lengths), dtype=torch.int64, device="cpu")
    orders = torch.empty(sum(padded), dtype=torch.int32, device="cpu")
    vectors = [
        (vector(index, "index", torch.int32, whole), size, n_open, n, whole)
        for index, size, (n_open, n), whole in zip(indices, sizes, counts, padded, strict=True)
    ]
    _C.present(vectors, fresh(places), fresh(orders))
    parts = iter(places.split_with_sizes(lengths))
    return [
        Places(exist, next(parts), next(parts), order)
        for exist, order in zip(parts, orders.split_with_sizes(padded), strict=False)
    ]


def present_among(is_open: Tensor, exists: Tensor, labels: Tensor) -> Places:
    """The same of entries by the numbers of their gates: (gates,) bool each, and (n,) int64."""
    size, gates = labels.numel(), is_open.numel()
    places = torch.empty((3, size), dtype=torch.int64, device="cpu")
    order = torch.empty(round_up(size), dtype=torch.int32, device="cpu")
    n, n_open = _C.present_among(
        gates,
        vector(is_open, "is_open", torch.bool, gates),
        vector(exists, "exists", torch.bool, gates),
        size,
        vector(labels, "labels", torch.int64, size),
        fresh(places),
        fresh(order),
        order.numel(),
    )
    exist, within, opened = places
    return Places(exist[:n], within[:n_open], opened[:n_open], order)


def gate_grad(dz: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """dlog_alpha = dz * dz/dlog_alpha, from z alone; exactly 0 where z is 0 or 1."""
    dz, z = dz.contiguous(), z.contiguous()
    out, n, dtype = z.new_empty(z.shape), z.numel(), z.dtype
    _C.gate_grad(
        vector(dz, "dz", dtype, n),
        vector(z, "z", dtype, n),
        fresh(out),
        n,
        dtype == torch.float64,
        constants(dist),
    )
    return out


def l0_penalty(log_alphas: list[Tensor], weights: list[float], dist: HardConcrete) -> tuple[Tensor, Tensor]:
    """sum_g weight * p_open_g over all vectors, and its gradient, flat."""
    log_alphas = [a.contiguous() for a in log_alphas]
    sizes = [a.numel() for a in log_alphas]
    first = log_alphas[0]
    total, grad = first.new_empty(()), first.new_empty(sum(sizes))
    nan = _C.penalty(
        [vector(a, "log_alpha", first.dtype, n) for a, n in zip(log_alphas, sizes, strict=True)],
        sizes,
        weights,
        first.dtype == torch.float64,
        dist.beta * math.log(-dist.gamma / dist.zeta),
        fresh(total),
        fresh(grad),
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
    dtype: torch.dtype,
    *results: Any,
) -> Any:
    sizes = [a.numel() for a in gates]
    for theta, out, in_, groups in terms:
        for i, n in ((out, theta.shape[0]), (in_, theta.shape[1:2].numel() * groups)):
            if i >= len(gates) or (i >= 0 and sizes[i] != n):
                raise ValueError(f"the gates of a weight {tuple(theta.shape)} must be {n}, one per unit")
        if groups < 1 or theta.shape[0] % groups:
            raise ValueError(f"groups must divide the {theta.shape[0]} outputs of a weight, got {groups}")
    return call(
        dtype == torch.float64,
        [
            (vector(a, "log_alpha", dtype, n), n, weight)
            for a, n, weight in zip(gates, sizes, weights, strict=True)
        ],
        [
            (
                vector(t, "weight", dtype, t.numel()),
                t.shape[0],
                t.shape[1:].numel(),
                groups,
                max(t.shape[2:].numel(), 1),
                out,
                in_,
            )
            for t, out, in_, groups in terms
        ],
        decay,
        dist.beta * math.log(-dist.gamma / dist.zeta),
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
    results = fresh(total), fresh(grad)
    if _coupled(_C.coupled_penalty, native, gates, weights, decay, dist, total.dtype, *results):
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
    at_factor = vector(factor, "the gradient", factor.dtype, 1)
    addresses = [fresh(grad) for grad in grads if grad is not None]
    unused = [0.0] * len(gates)
    _coupled(_C.coupled_penalty_grad, native, gates, unused, decay, dist, factor.dtype, at_factor, addresses)
    return [
        portable.coupled_penalty_grad([term], gates, factor, decay, dist)[0] if grad is None else grad
        for term, grad in zip(terms, grads, strict=True)
    ]


class BudgetPlan:
    """Steps of some kinds of gates and of a state (l0kernels.budget's), which it holds."""

    def __init__(self, kinds: Sequence[Any], state: Any, ramp_steps: float) -> None:
        self._sizes = [size for kind in kinds for size in kind.sizes]
        self.state, self._dtype = state, state.moment.dtype
        n = state.first.numel()
        addresses = (
            vector(state.moment, "moment", self._dtype, sum(self._sizes)),
            vector(state.first, "first", torch.float64, n),
            vector(state.price, "price", torch.float64, n),
            vector(state.step, "step", torch.int64, 1),
            vector(state.skipped, "skipped", torch.int64, 1),
        )
        own, is_double = [_budget_kind(kind) for kind in kinds], self._dtype is torch.float64
        limit = kinds[0].kept.limit
        self._step = _C.Budget(own, is_double, self._dtype, addresses, ramp_steps, limit).step

    def step(self, log_alphas: list[Tensor], grads: list[Tensor | None]) -> None:
        """One step of l0kernels.budget's Projection, of log_alphas and state in place.

        Raises:
            as `vector`, before anything is written.
        """
        if not self._step(log_alphas, grads):
            self._check(log_alphas, "log_alpha")
            grads = [None if grad is None else grad.contiguous() for grad in grads]  # as a rule they are
            self._check(grads, "grad")
            if not self._step(log_alphas, grads):
                raise RuntimeError(
                    "log_alphas and grads must be plain tensors of the budget's dtype and sizes"
                )
        torch.autograd.graph.increment_version(log_alphas)

    def _check(self, tensors: Sequence[Tensor | None], name: str) -> None:
        """Says what is wrong with one, as `vector`."""
        for tensor, n in zip(tensors, self._sizes, strict=True):
            optional(tensor, name, self._dtype, n)


def _budget_kind(kind: Any) -> _C.BudgetKind:
    terms: CostTerms = kind.terms
    atoms = [(one.is_any, one.index.shape[1], one.index.flatten().tolist()) for one in terms.atoms]
    linear, *sums = kind.runs()
    offsets = [0, *accumulate(len(runs) for runs in sums)]
    of_pairs = terms.first.tolist(), terms.second.tolist(), terms.coefficient.tolist()
    pairs = [*zip(*of_pairs, strict=True)]
    runs = [run for of_sum in sums for run in of_sum]
    cost = terms.n, terms.constant, atoms, linear, offsets, runs, pairs
    gates = [(size, *dist) for size, dist in zip(kind.sizes, kind.dists(), strict=True)]
    return kind.number, cost, gates, kind.offset, kind.unit, kind.keep


def _z_dtype(dtype: torch.dtype, rows: Gate | None, cols: Gate | None) -> torch.dtype:
    """In which pack and unpack compute: that of the gates; without gates float64 if the matrix is."""
    gate = cols if rows is None else rows
    double = (dtype if gate is None else gate[0].dtype) == torch.float64
    return torch.float64 if double else torch.float32


def _following(t: Tensor, run: int) -> Tensor:
    """A matrix whose columns' entries follow one another: kernels may be expanded, or every other entry."""
    t = plain(t)
    return t if run == 1 or t.stride(1) == 1 else t.contiguous()


def pack(
    full: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    dtype: torch.dtype,
    *,
    scale_rows: bool = False,
    scale_cols: bool = False,
    run: int = 1,
    apart: bool = False,
) -> Tensor:
    """full[rows][:, cols], times the gates where asked, in ``dtype``, zero-padded to the extents.

    ``run``: how many entries in a row are one column; ``apart``: in the result the first entries of all
    columns stand together, then the second ones, and so on.
    """
    full, size_rows, size_cols = _following(full, run), full.shape[0], full.shape[1] // run
    n_rows, n_cols = extent(rows, size_rows, dtype), extent(cols, size_cols, dtype)
    out = full.new_empty(n_rows, n_cols * run, dtype=dtype)
    z_dtype = _z_dtype(dtype, rows, cols)
    _C.pack(
        matrix(full, "the matrix", full.dtype, size_rows, size_cols * run),
        TYPES[full.dtype],
        size_rows,
        size_cols,
        fresh(out),
        TYPES[dtype],
        n_rows,
        n_cols,
        _gate(rows, "the gate of the rows", size_rows, z_dtype),
        _gate(cols, "the gate of the columns", size_cols, z_dtype),
        scale_rows,
        scale_cols,
        z_dtype == torch.float64,
        run,
        apart,
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
    grads: GateGrads = NO_GRADS,
    out: Tensor | None = None,
    run: int = 1,
    apart: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix of ``shape`` with packed in its open rows and columns, times the gates; gate gradients.

    ``out``: contiguous memory for the matrix. ``run``, ``apart``: as of pack.
    """
    packed = plain(packed).contiguous()
    theta = None if grads.theta is None else _following(grads.theta, run)
    out = packed.new_empty(shape, dtype=dtype) if out is None else out
    dz_row = torch.empty_like(rows[0]) if grads.rows and rows is not None else None
    dz_col = torch.empty_like(cols[0]) if grads.cols and cols is not None else None
    (n_rows, width), z_dtype = packed.shape, _z_dtype(packed.dtype, rows, cols)
    n_cols, size_cols = width // run, shape[1] // run
    at_packed, stride, _ = matrix(packed, "the packed matrix", packed.dtype, n_rows, width)
    _C.unpack(
        (at_packed, stride, 1),  # a lone column may have any stride
        TYPES[packed.dtype],
        n_rows,
        n_cols,
        vector(out, "out", dtype, shape[0] * shape[1]),
        TYPES[dtype],
        shape[0],
        size_cols,
        _gate(rows, "the gate of the rows", shape[0], z_dtype, grads.full_rows),
        _gate(cols, "the gate of the columns", size_cols, z_dtype, grads.full_cols),
        scale_rows,
        scale_cols,
        z_dtype == torch.float64,
        (0, 0, 0) if theta is None else matrix(theta, "theta", theta.dtype, *shape),
        0 if theta is None else TYPES[theta.dtype],
        fresh(dz_row),
        fresh(dz_col),
        run,
        apart,
        torch.get_num_threads(),
    )
    return out, dz_row, dz_col


def open_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Gate | None,
    cols: Gate | None,
    scale: bool,
    plan: im2col.Plan,
    keeps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y of images x, which hold the columns that exist, for the rows of `weight` that do; bias: of those.

    x is in channels_last memory, with DIRECT or contiguous; y is in channels_last memory, weight (out, in,
    kh, kw) contiguous. ``scale``: z of the columns multiplies them. The plan is of one call, TAPS or DIRECT;
    with DIRECT there is what exists of the weight, too, where ``keeps``, which backward need not pack again.
    """
    y, packed = im2col.empty_images(x, plan.shape[0], plan.outs, plan.shape[12], plan.shape[13]), None
    if y.numel():
        if keeps and plan.way is Way.DIRECT:
            packed = x.new_empty(_packed_size(plan))
        at = fresh(packed), optional(bias, "bias", x.dtype, plan.outs), fresh(y)
        _open_conv(x, weight, rows, cols, scale, plan, (*at, 0, 0, 0, 0))
    return y, packed


def _packed_size(plan: im2col.Plan) -> int:
    *_, C, kh, kw = plan.shape[:6]
    return plan.outs * C * kh * kw


def open_conv_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    rows: Gate | None,
    cols: Gate | None,
    scale: bool,
    plan: im2col.Plan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dz of the columns; `needs`: which of them are wanted; dz with TAPS needs dx. dy is in
    channels_last memory, dx lies as x; `packed` is what open_conv has kept."""
    made = (plan.shape[0], plan.outs, *plan.shape[12:])
    if dy.shape != made:
        raise ValueError(f"the gradient must have shape {made}, got {tuple(dy.shape)}")
    dx = torch.empty_like(x, memory_format=im2col.format_of(x)) if needs[0] else None
    dw = empty_grad(weight) if needs[1] else None
    dz = torch.empty_like(cols[0]) if needs[2] and cols is not None else None
    if dz is not None and not x.numel():
        dz.zero_()
    if any(t is not None and t.numel() for t in (dx, dw)) or (dz is not None and x.numel()):
        at = images(dy, "the gradient", x.dtype)
        wanted = fresh(dx), fresh(dw), fresh(dz) if x.numel() else 0
        kept = optional(packed, "packed", x.dtype, _packed_size(plan))
        _open_conv(x, weight, rows, cols, scale, plan, (kept, 0, 0, at, *wanted))
    return dx, dw, dz


def _open_conv(
    x: Tensor,
    weight: Tensor,
    rows: Gate | None,
    cols: Gate | None,
    scale: bool,
    plan: im2col.Plan,
    addresses: tuple[int, int, int, int, int, int, int],
) -> None:
    """Addresses: of packed, bias, y, dy, dx, dw and dz."""
    dtype, (n_out, n_in) = x.dtype, weight.shape[:2]
    N, H, W, C = plan.shape[:4]
    if x.shape != (N, C, H, W) or weight.shape[2:] != plan.shape[4:6]:
        raise ValueError(f"the plan must be of {tuple(x.shape)} and {tuple(weight.shape)}, got {plan.shape}")
    planar = plan.way is Way.DIRECT and im2col.format_of(x) is torch.contiguous_format
    _C.open_conv(
        dtype == torch.float64,
        plan.shape,
        plan.way is Way.TAPS,
        planar,
        plan.outs,
        _gate(rows, "the gate of the rows", n_out, dtype),
        _gate(cols, "the gate of the columns", n_in, dtype),
        scale,
        n_out,
        n_in,
        vector(x, "x", dtype, x.numel()) if planar else images(x, "x", dtype),
        vector(weight, "weight", dtype, weight.numel()),
        *addresses,
        torch.get_num_threads(),
    )


def convolution(x: Tensor, weight: Tensor, conv: conv2d.Conv) -> conv2d.Convolution | None:
    """That of csrc where it is the faster one."""
    return few_channels if few_channels.serves(x, weight, conv) else None


_PACK = SimpleNamespace(pack=pack, unpack=unpack, gate_grad=gate_grad, convolution=convolution)
linear_saved_shapes = packed.linear_saved_shapes
conv2d_saved_shapes = conv2d.conv2d_saved_shapes
conv2d_memory_format = conv2d.memory_format


def _fused(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return dtype in _FUSED and all(t is None or t.dtype == dtype for t in tensors)


def linear_forward(call: LinearCall) -> tuple[Tensor, list[Tensor]]:
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    if not _fused(dtype, x, weight, bias):
        return packed.linear_forward(_PACK, call), []
    n_out, n_in = weight.shape
    sides = [_gate(in_gate, "in_gates", n_in, dtype), _gate(out_gate, "out_gates", n_out, dtype)]
    return _linear_forward(x, weight, bias, sides, scale_out, None), []


def l0_linear_forward(call: L0LinearCall, rank: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample and linear_forward in one call: y, and the gates joined."""
    x, weight, bias, in_log_alpha, out_log_alpha, seed, dist, _ = call
    log_alphas = [None if a is None else a.contiguous() for a in (in_log_alpha, out_log_alpha)]
    given = [a for a in log_alphas if a is not None]
    gates = joined.empty(given)
    sizes = joined.sizes(log_alphas, [weight.shape[1], weight.shape[0]])
    sides = _joined_gates(*gates, sizes, x.dtype, True)
    draw = _draw(given, seed, rank, dist, x.dtype)
    return _linear_forward(x, weight, bias, sides, True, draw), *gates


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sides: list[_C.Gate | None],
    scale_out: bool,
    draw: _C.Draw | None,
) -> Tensor:
    dtype, M, (n_out, n_in) = x.dtype, x.shape[0], weight.shape
    y = x.new_empty(M, n_out)
    bias = None if bias is None else bias.contiguous()
    nan_at = _C.linear_forward(
        dtype == torch.float64,
        M,
        n_in,
        n_out,
        matrix(x, "x", dtype, M, n_in),
        matrix(weight, "weight", dtype, n_out, n_in),
        optional(bias, "bias", dtype, n_out),
        sides[0],
        sides[1],
        scale_out,
        draw,
        fresh(y),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, 2 - sides.count(None))
    return y


def linear_backward(call: LinearCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, dweight, dbias, dz_in, dz_out, None where not wanted."""
    x, weight, bias, in_gate, out_gate, scale_out, dtype = call
    (full_in, full_out), needs, dist = wanted
    if not _fused(dtype, dy, x, weight, bias):
        return packed.linear_backward(_PACK, call, dy, wanted)
    need_x, need_w, need_b, need_in, need_out = needs
    need_in, need_out = need_in and in_gate is not None, need_out and out_gate is not None
    M, (n_out, n_in) = x.shape[0], weight.shape
    dx = x.new_empty(M, n_in) if need_x else None
    reads_dw = need_out or (need_in and not need_x)  # dz is read off dW
    dw = empty_grad(weight) if need_w or reads_dw else None
    bias = bias.contiguous() if need_out and bias is not None else None  # read for dz_out alone
    db = x.new_empty(n_out) if need_b or bias is not None else None
    dz_in = x.new_empty(n_in) if need_in else None
    dz_out = x.new_empty(n_out) if need_out else None
    _C.linear_backward(
        dtype == torch.float64,
        M,
        n_in,
        n_out,
        matrix(x, "x", dtype, M, n_in),
        matrix(weight, "weight", dtype, n_out, n_in),
        optional(bias, "bias", dtype, n_out),
        _gate(in_gate, "in_gates", n_in, dtype, full_in),
        _gate(out_gate, "out_gates", n_out, dtype, full_out),
        scale_out,
        matrix(dy, "the gradient", dtype, M, n_out),
        fresh(dx),
        fresh(dw),
        fresh(db),
        fresh(dz_in),
        fresh(dz_out),
        None if dist is None else constants(dist),
        torch.get_num_threads(),
    )
    return [dx, dw if need_w else None, db if need_b else None, dz_in, dz_out]


def draws_within(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    log_alphas: Sequence[Tensor],
    dtype: torch.dtype,
    activation: str,
) -> bool:
    """Whether a layer or chain of these tensors is one call that can draw its gates."""
    return activation not in GLU and _fused(dtype, x, *weights, *biases, *log_alphas)


def _layers(
    M: int,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_C.Gate | None],
    saved: list[Tensor],
    dtype: torch.dtype,
    grads: list[list[Tensor | None]] | None = None,
) -> list[_C.Layer]:
    depth = len(weights)
    if grads is None:
        hidden = [fresh(h) for h in saved]
    else:
        widths = [w.shape[1] for w in weights[1:]]
        hidden = [
            vector(h, "saved", dtype, M * widths[i % (depth - 1)]) if M else 0 for i, h in enumerate(saved)
        ]
    layers = []
    n_in = weights[0].shape[1]
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        dw, db, dz = (None, None, None) if grads is None else (group[i] for group in grads)
        n_out = weight.shape[0]
        layers.append(
            (
                n_in,
                n_out,
                matrix(weight, "weights", dtype, n_out, n_in),
                optional(bias, "biases", dtype, n_out),
                gate,
                hidden[i - 1] if i else 0,
                hidden[depth - 2 + i] if i and len(hidden) > depth - 1 else 0,
                fresh(dw),
                fresh(db),
                fresh(dz),
            )
        )
        n_in = n_out
    return layers


def mlp_saved_shapes(call: MlpCall) -> list[tuple[int, int]]:
    """Rows, not the columns of the next: a gated product keeps both of its arguments."""
    shapes = packed.mlp_saved_shapes(call)
    keeps_both = call.activation in ("gelu", "silu") and _fused(
        call.dtype, call.x, *call.weights, *call.biases
    )
    return shapes * 2 if keeps_both else shapes


def mlp_forward(call: MlpCall) -> tuple[Tensor, list[Tensor]]:
    """y, and what backward needs: the hidden activations, packed in (M, n_l) buffers, and for curved
    activations their arguments. Gated products are composed: native pack and unpack around torch.mm."""
    x, weights, biases, gates, activation, dtype, _ = call
    if activation in GLU or not _fused(dtype, x, *weights, *biases):
        return packed.mlp_forward(_PACK, call)
    return _mlp_forward(x, weights, biases, _given_gates(weights, gates, dtype), activation, None)


def l0_mlp_forward(
    call: L0MlpCall, rank: int = 0
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """sample and mlp_forward in one call: y, what backward needs, and the gates joined."""
    x, weights, biases, log_alphas, activation, seed, dist, _ = call
    given = [a.contiguous() for a in log_alphas if a is not None]
    gates = joined.empty(given)
    sizes = joined.sizes(log_alphas, [w.shape[1] for w in weights])
    layers = _joined_gates(*gates, sizes, x.dtype, True)
    draw = _draw(given, seed, rank, dist, x.dtype)
    return *_mlp_forward(x, weights, biases, layers, activation, draw), gates


def _given_gates(
    weights: list[Tensor], gates: list[Gate | None], dtype: torch.dtype, full: list[bool] | None = None
) -> list[_C.Gate | None]:
    wants_all = full or [False] * len(gates)
    return [
        _gate(gate, "gates", weight.shape[1], dtype, every)
        for weight, gate, every in zip(weights, gates, wants_all, strict=True)
    ]


def _mlp_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_C.Gate | None],
    activation: str,
    draw: _C.Draw | None,
) -> tuple[Tensor, list[Tensor]]:
    dtype, M = x.dtype, x.shape[0]
    saved = [x.new_empty(M, w.shape[1]) for w in weights[1:]]
    if activation in ("gelu", "silu"):
        saved += [torch.empty_like(h) for h in saved]
    y = x.new_empty(M, weights[-1].shape[0])
    biases = [None if b is None else b.contiguous() for b in biases]
    nan_at = _C.mlp_forward(
        dtype == torch.float64,
        M,
        matrix(x, "x", dtype, M, weights[0].shape[1]),
        ACTIVATIONS[activation],
        _layers(M, weights, biases, gates, saved, dtype),
        draw,
        fresh(y),
        torch.get_num_threads(),
    )
    if nan_at >= 0:
        portable.raise_nan(nan_at, len(gates) - gates.count(None))
    return y, saved


def mlp_backward(call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    """dx, then dweight, dbias and dz of every layer, None where not wanted."""
    x, weights, biases, gates, activation, dtype, _ = call
    if activation in GLU or not _fused(dtype, dy, x, *weights, *biases):
        return packed.mlp_backward(_PACK, call, dy, saved, wanted)
    given = _given_gates(weights, gates, dtype, wanted.full)
    return _mlp_backward(dy, x, weights, biases, given, saved, activation, wanted)


def l0_mlp_backward(
    call: DrawnMlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted
) -> list[Tensor | None]:
    """mlp_backward of l0_mlp_forward, with its gates as it returned them."""
    x, weights, biases, gated, z, index, count, activation, dtype = call
    sizes = [w.shape[1] if has_gate else None for w, has_gate in zip(weights, gated, strict=True)]
    gates = _joined_gates(z, index, count, sizes, dtype)
    dy = dy if dy.dtype == dtype else dy.to(dtype)
    return _mlp_backward(dy, x, weights, biases, gates, saved, activation, wanted)


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    gates: list[_C.Gate | None],
    saved: list[Tensor],
    activation: str,
    wanted: Wanted,
) -> list[Tensor | None]:
    _, needs, dist = wanted
    depth = len(weights)
    need_w, need_b = needs[1 : 1 + depth], needs[1 + depth : 1 + 2 * depth]
    need_z = [n and gate is not None for n, gate in zip(needs[1 + 2 * depth :], gates, strict=True)]
    dtype, M = x.dtype, x.shape[0]
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
    layers = _layers(M, weights, [None] * depth, gates, saved, dtype, [dw, db, dz])  # no bias is read
    _C.mlp_backward(
        dtype == torch.float64,
        M,
        matrix(x, "x", dtype, M, weights[0].shape[1]),
        ACTIVATIONS[activation],
        layers,
        matrix(dy, "the gradient", dtype, M, weights[-1].shape[0]),
        fresh(dx),
        None if dist is None else constants(dist),
        torch.get_num_threads(),
    )
    return [dx, *(w if n else None for w, n in zip(dw, need_w, strict=True)), *db, *dz]


def masked_weight(weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete) -> Tensor:
    """W * z, z drawn from the seed chunk by chunk: neither noise nor mask is ever stored."""
    if not _fused(log_alpha.dtype, weight):
        return portable.masked_weight(weight, log_alpha, seed, dist)
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out, dtype, n = weight.new_empty(weight.shape), weight.dtype, weight.numel()
    nan = _C.masked_weight_forward(
        dtype == torch.float64,
        vector(weight, "weight", dtype, n),
        vector(log_alpha, "log_alpha", dtype, n),
        n,
        vector(seed, "seed", torch.int64, 1),
        *constants(dist),
        fresh(out),
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
    dtype, n = weight.dtype, weight.numel()
    dw = empty_grad(weight) if need_w else None
    dlog_alpha = empty_grad(log_alpha) if need_log_alpha else None
    _C.masked_weight_backward(
        dtype == torch.float64,
        vector(weight, "weight", dtype, n),
        vector(log_alpha, "log_alpha", dtype, n),
        n,
        vector(seed, "seed", torch.int64, 1),
        *constants(dist),
        vector(grad, "the gradient", dtype, n),
        fresh(dw),
        fresh(dlog_alpha),
        torch.get_num_threads(),
    )
    return dw, dlog_alpha


def _blocks(n: int, block: int) -> int:
    """How many blocks cover n units."""
    return -(-n // block)


def block_linear_forward(call: BlockCall) -> Tensor:
    x, weight, bias, z, b_out, b_in, dtype = call
    if not _fused(dtype, x, weight, bias, z):
        return packed.block_linear_forward(call)
    z = z.contiguous()
    bias = None if bias is None else bias.contiguous()
    M, (n_out, n_in) = x.shape[0], weight.shape
    y = x.new_empty(M, n_out)
    _C.block_linear_forward(
        dtype == torch.float64,
        M,
        n_in,
        n_out,
        b_out,
        b_in,
        matrix(x, "x", dtype, M, n_in),
        matrix(weight, "weight", dtype, n_out, n_in),
        optional(bias, "bias", dtype, n_out),
        vector(z, "z", dtype, _blocks(n_out, b_out) * _blocks(n_in, b_in)),
        fresh(y),
        torch.get_num_threads(),
    )
    return y


def block_linear_backward(call: BlockCall, dy: Tensor, wanted: Wanted) -> list[Tensor | None]:
    x, weight, _, z, b_out, b_in, dtype = call
    (full,), needs, _ = wanted
    if not _fused(dtype, dy, x, weight, z):
        return packed.block_linear_backward(call, dy, wanted)
    need_x, need_w, need_b, need_z = needs
    z, M, (n_out, n_in) = z.contiguous(), x.shape[0], weight.shape
    dx = x.new_empty(x.shape) if need_x else None
    dw = empty_grad(weight) if need_w or need_z else None  # dz is read off dW
    db = x.new_empty(n_out) if need_b else None
    dz = z.new_empty(z.shape) if need_z else None
    _C.block_linear_backward(
        dtype == torch.float64,
        M,
        n_in,
        n_out,
        b_out,
        b_in,
        matrix(x, "x", dtype, M, n_in),
        matrix(weight, "weight", dtype, n_out, n_in),
        vector(z, "z", dtype, _blocks(n_out, b_out) * _blocks(n_in, b_in)),
        full,
        matrix(dy, "the gradient", dtype, M, n_out),
        fresh(dx),
        fresh(dw),
        fresh(db),
        fresh(dz),
        torch.get_num_threads(),
    )
    return [dx, dw if need_w else None, db, dz]


def conv2d_forward(call: Conv2dCall) -> tuple[Tensor, list[Tensor]]:
    return conv2d.conv2d_forward(_PACK, call)


def conv2d_backward(call: Conv2dCall, dy: Tensor, saved: list[Tensor], wanted: Wanted) -> list[Tensor | None]:
    return conv2d.conv2d_backward(_PACK, call, dy, saved, wanted)


_NO_STAGE = (0, 0.0, 0.0)


def _stage(numbers: list[float]) -> _C.ProxStage:
    return (int(numbers[0]), numbers[1], numbers[2]) if numbers else _NO_STAGE


def _prox(call: ProxCall, out: Tensor) -> _C.ProxTensor:
    x, step, group_step, before, group, after, (outer, groups, inner) = call
    dtype, n = x.dtype, outer * groups * inner
    if min(outer, groups, inner) < 0:
        raise ValueError(f"layout must be three sizes, got {call.layout}")
    at_x = vector(x, "x", dtype, n)
    return (
        at_x,
        at_x if out is x else vector(out, "out", dtype, n),
        TYPES[dtype],
        optional(step, "step", torch.float64 if dtype == torch.float64 else torch.float32, n),
        optional(group_step, "group_step", torch.float64, groups),
        (outer, groups, inner),
        _stage(before),
        int(group[0]) if group else 0,
        group[1] if group else 0.0,
        _stage(after),
    )


def prox(calls: list[ProxCall], outs: list[Tensor]) -> None:
    """The proximal operator of each call, written into its `out`, which may be its x."""
    _C.prox([_prox(*pair) for pair in zip(calls, outs, strict=True)], torch.get_num_threads())
