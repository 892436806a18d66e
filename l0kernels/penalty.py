"""The expected L0 norm, one autograd node for all gates of a model, and the L2 norm coupled to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _ops, _registry, reference
from ._arguments import check_l2_penalty, per_tensor
from ._autograd import apply
from ._gates import DEFAULT_DIST, HardConcrete, check_dist


class _L0Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: list[float] | Tensor,
        settings: tuple[HardConcrete, str],
        *log_alphas: Tensor,
    ) -> Tensor:
        operator = _ops.l0_penalty if isinstance(weights, list) else _ops.weighted_penalty
        total, grad = operator(log_alphas, weights, *settings)
        ctx.save_for_backward(grad)
        ctx.shapes = [a.shape for a in log_alphas]
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("l0_penalty")
        (grad,) = ctx.saved_tensors
        parts = (grad * dtotal).split_with_sizes([shape.numel() for shape in ctx.shapes])
        shaped = [p if len(s) == 1 else p.view(s) for p, s in zip(parts, ctx.shapes, strict=True)]
        return None, None, *shaped


def _check_log_alphas(log_alphas: Sequence[Tensor], dist: HardConcrete) -> None:
    if not log_alphas:
        raise ValueError("log_alpha must hold at least one tensor, got none")
    first = log_alphas[0]
    for i, a in enumerate(log_alphas):
        if (
            type(a) in _checks.PLAIN
            and a.dtype is torch.float32
            and first.dtype is a.dtype
            and a.layout is torch.strided
            and not a.is_nested
            and a.device == first.device
        ):
            continue
        name = "log_alpha" if len(log_alphas) == 1 else f"log_alpha[{i}]"
        _checks.check_log_alpha(name, a)
        _checks.check_device(name, a, first.device, "log_alpha[0]")
        if a.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of log_alpha[0], {first.dtype}, got {a.dtype}")
    check_dist(dist)


def per_log_alpha(lam: float | Tensor | Sequence[float | Tensor], n: int) -> list[float | Tensor]:
    """One lam for all n log_alphas, or one each, as a list of n; 0-d tensors are numbers, too."""
    lams: list[float | Tensor] = list(lam) if isinstance(lam, (list, tuple, Sequence)) else [lam] * n
    for value in lams:
        if isinstance(value, Tensor):
            if value.ndim or value.requires_grad:
                kind = f"shape {tuple(value.shape)}" if value.ndim else "one that requires a gradient"
                raise ValueError(f"lam must be a number or a 0-d tensor without a gradient, got {kind}")
        else:
            _checks.check_number("lam", value)
    if len(lams) != n:
        raise ValueError(f"lam must be one number or one per log_alpha, {n}, got {len(lams)}")
    return lams


def _any_tensor(lams: Sequence[float | Tensor]) -> bool:
    return any(isinstance(lam, Tensor) for lam in lams)


def _weights(
    sizes: Sequence[float], lams: Sequence[float | Tensor], device: torch.device
) -> list[float] | Tensor:
    """|g| * lam of each log_alpha: numbers, or one tensor where lam is a tensor or a graph is compiled."""
    if not torch.compiler.is_compiling() and not _any_tensor(lams):
        return [float(size) * float(lam) for size, lam in zip(sizes, lams, strict=True)]
    # A product, and no tensor made of the number: a compiler keeps only the former free of guards.
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one * lam * size for size, lam in zip(sizes, lams, strict=True)])


def l0_penalty(
    log_alpha: Tensor | Sequence[Tensor],
    group_size: float | Sequence[float] = 1,
    *,
    lam: float | Tensor | Sequence[float | Tensor] = 1.0,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Expected number of open parameters: ``sum_g lam * |g| * P(z_g > 0)`` (arXiv 1712.01312, eq. 12).

    ``P(z > 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))``. Its gradient ``lam * |g| * p * (1 - p)`` is
    the only one that reaches a closed gate.

    Args:
        log_alpha: any shape, float32 or float64, or a sequence of such of one dtype on one device.
        group_size: |g|, the parameters behind one gate: a number, or one per tensor of the sequence.
        lam: the weight of the penalty: a number, or one per tensor of the sequence; a number may be a 0-d
            tensor, too: a schedule of it then compiles once. Beside a mean loss over N training examples, add
            the result divided by N, and lam is the paper's lambda (0.1 for a fully connected net).
        dist: the distribution's constants.

    Returns:
        A scalar in the dtype of log_alpha, also under autocast.

    Raises:
        TypeError: log_alpha is not float32 or float64, dtypes differ; group_size or lam is no number.
        ValueError: no tensor, different devices, lists of another length, a lam that requires a gradient, or
            (on the CPU) a NaN in log_alpha.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    _check_log_alphas(log_alphas, dist)
    sizes = per_tensor("group_size", group_size, len(log_alphas))
    lams = per_log_alpha(lam, len(log_alphas))
    backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "l0_penalty")
    weights = _weights(sizes, lams, log_alphas[0].device)
    if backend == "reference":
        if isinstance(weights, list):
            return reference.l0_penalty(log_alphas, lam=weights, dist=dist)
        each = [reference.l0_penalty(a, dist=dist) for a in log_alphas]
        return torch.stack(each).mul(weights).sum().to(log_alphas[0].dtype)
    return apply(_L0Penalty, weights, (dist, backend), *log_alphas)


class L2Term(NamedTuple):
    """``weight_decay / 2 * sum_oi p_o * p_i * theta_oi^2``, p = 1 on a side without gates."""

    weight: Tensor  # (out, in / groups, ...) or, as a bias, (out,)
    out_log_alpha: Tensor | None
    in_log_alpha: Tensor | None
    groups: int = 1


class _CoupledPenalty(torch.autograd.Function):
    """Forward reads every weight once and keeps the gradient of the gates; backward writes the weights'."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: list[float],
        layout: list[int],
        settings: tuple[float, HardConcrete, str],
        *tensors: Tensor,
    ) -> Tensor:
        n = len(weights)
        total, grad = _ops.coupled_penalty(tensors[n:], tensors[:n], weights, layout, *settings)
        ctx.save_for_backward(grad, *tensors)
        ctx.n_gates, ctx.layout, ctx.settings = n, layout, settings
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("l2_penalty")
        grad, *tensors = ctx.saved_tensors
        n, needs = ctx.n_gates, ctx.needs_input_grad[3:]
        gates, thetas = tensors[:n], tensors[n:]
        grads: list[Tensor | None] = [None] * len(tensors)
        if any(needs[:n]):
            parts = (grad * dtotal).split_with_sizes([a.numel() for a in gates])
            grads[:n] = [p if a.ndim == 1 else p.view(a.shape) for p, a in zip(parts, gates, strict=True)]
        wanted = [i for i, need in enumerate(needs[n:]) if need]
        if wanted:
            layout = [entry for i in wanted for entry in ctx.layout[3 * i : 3 * i + 3]]
            of = [thetas[i] for i in wanted]
            d_thetas = _ops.coupled_penalty_grad(of, gates, layout, dtotal, *ctx.settings)
            for i, d_theta in zip(wanted, d_thetas, strict=True):
                grads[n + i] = d_theta
        return None, None, None, *grads


def coupled_penalty(
    log_alphas: Sequence[Tensor],
    group_sizes: Sequence[float],
    lams: Sequence[float | Tensor],
    terms: Sequence[L2Term],
    weight_decay: float,
    dist: HardConcrete,
) -> Tensor:
    """:func:`l0_penalty` of all log_alphas, of which there may be none, plus all terms: one autograd node.

    A term of another precision than log_alphas, or than the first weight, takes the formula. Compiled, and
    where a lam is a tensor, it is one node for either: no number that a schedule may change is in the graph.
    """
    if log_alphas and (torch.compiler.is_compiling() or _any_tensor(lams)):
        total = l0_penalty(log_alphas, group_sizes, lam=lams, dist=dist)
        return total + coupled_penalty([], [], [], terms, weight_decay, dist)
    if weight_decay != 1.0 and torch.compiler.is_compiling():
        return weight_decay * coupled_penalty([], [], [], terms, 1.0, dist)
    if log_alphas:
        _check_log_alphas(log_alphas, dist)
    sizes = per_tensor("group_size", group_sizes, len(log_alphas))
    for term in terms:
        # Of a quantised layer the weight is a method.
        if not isinstance(term.weight, Tensor) or not _is_sound(term):
            weight, out, in_, groups = term
            _checks.check_floating("weight", weight)
            check_l2_penalty(_as_matrix(weight), weight_decay, in_, out, groups, dist)
    weight = terms[0].weight
    double = (log_alphas[0] if log_alphas else weight).dtype == torch.float64
    backend = _registry.resolve(weight.device, weight.dtype, "l2_penalty")
    fused: list[L2Term] = []
    rest: list[L2Term] = []
    for term in terms:
        one_precision = all(t is None or (t.dtype == torch.float64) == double for t in term[:3])
        (fused if one_precision and _registry.has(backend, "l2_penalty") else rest).append(term)
    totals = []
    if fused:
        # A gate that several terms share is one input: its gradients need not be added up afterwards.
        gates: dict[Tensor, float] = {}
        for log_alpha, size, lam in zip(log_alphas, sizes, lams, strict=True):
            gates[log_alpha] = gates.get(log_alpha, 0.0) + float(size) * float(lam)
        for term in fused:
            for side in term[1:3]:
                if side is not None:
                    gates.setdefault(side, 0.0)
        number: dict[Tensor | None, int] = {log_alpha: i for i, log_alpha in enumerate(gates)}
        number[None] = -1
        layout = [entry for _, out, in_, groups in fused for entry in (number[out], number[in_], groups)]
        settings = (float(weight_decay), dist, backend)
        thetas = [term.weight for term in fused]
        totals.append(apply(_CoupledPenalty, list(gates.values()), layout, settings, *gates, *thetas))
    elif log_alphas:
        totals.append(l0_penalty(log_alphas, sizes, lam=lams, dist=dist))
    for weight, out, in_, groups in rest:
        totals.append(
            reference.l2_penalty(
                _as_matrix(weight),
                weight_decay,
                in_log_alpha=in_,
                out_log_alpha=out,
                groups=groups,
                dist=dist,
            )
        )
    return functools.reduce(torch.add, totals)


def _is_sound(term: L2Term) -> bool:
    """Whether dtypes, shapes and devices are right, for less than the checks that say what is wrong."""
    weight, out, in_, groups = term
    shape, device = weight.shape, weight.device
    if weight.dtype not in _checks.DTYPES or shape[0] % groups:
        return False
    for side, size in ((out, shape[0]), (in_, shape[1:2].numel() * groups)):
        if side is not None and not (
            side.shape == (size,) and side.dtype in _checks.GATE_DTYPES and side.device == device
        ):
            return False
    return True


def _as_matrix(weight: Tensor) -> Tensor:
    return weight[:, None] if weight.ndim == 1 else weight


def l2_penalty(
    weight: Tensor,
    weight_decay: float = 1.0,
    *,
    in_log_alpha: Tensor | None = None,
    out_log_alpha: Tensor | None = None,
    groups: int = 1,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """L2 norm of the open parameters: ``weight_decay / 2 * sum_oi p_o * p_i * theta_oi^2`` (arXiv 1712.01312,
    section 2.3).

    p = P(z > 0), 1 on a side without gates. Its gradient is dense: a closed weight still decays. Backends
    "cpp" and "cuda" pass over the weight once, and once more for its gradient; the others are plain torch.

    Args:
        weight: (out, in / groups, ...) any float dtype.
        weight_decay: the strength.
        in_log_alpha: (in,) float32 or float64, or None.
        out_log_alpha: (out,) float32 or float64, or None.
        groups: of a grouped convolution; 1 otherwise.
        dist: the distribution's constants.

    Returns:
        A scalar: float32, or float64 if any of the tensors is; also under autocast.

    Raises:
        TypeError: a wrong kind or dtype.
        ValueError: a wrong shape or device, or (on the CPU) a NaN in log_alpha.
        RuntimeError: the requested backend cannot serve the call.
    """
    check_l2_penalty(weight, weight_decay, in_log_alpha, out_log_alpha, groups, dist)
    term = L2Term(weight, out_log_alpha, in_log_alpha, groups)
    return coupled_penalty([], [], [], [term], weight_decay, dist)
