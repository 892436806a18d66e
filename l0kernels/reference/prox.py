"""Proximal operators: ``argmin_y 1/2 |y - x|^2 + step * R(y)``, by element or by group.

``step`` is a number, or a tensor of x's shape: then the distance is ``1/2 sum (y - x)^2 / step``, the metric
of an optimiser that divides its steps by element. Groups have one metric each, the mean of their elements'.
Arithmetic is float64 for float64, else float32; norms of groups are float64. Of two minimisers the result is
the smaller one. NaN stays NaN, and makes NaN of a group whose norm scales it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import check_groups, check_not_negative, check_prox, check_tl1, check_top

Step = float | Tensor


def _wide(x: Tensor, step: Step) -> tuple[Tensor, Step]:
    """Both in the dtype of the arithmetic."""
    check_prox(x, step)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), step.to(dtype) if isinstance(step, Tensor) else float(step)


def _root(value: Step) -> Step:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _kept(y: Tensor, size: Tensor, threshold: Step) -> Tensor:
    """y where its size is above the threshold or NaN, exactly 0 elsewhere."""
    return torch.where(size <= threshold, torch.zeros_like(y), y)


def _l0_l1(x: Tensor, l0: float, l1: float, step: Step) -> Tensor:
    size = x.abs() - l1 * step
    return _kept(torch.copysign(size, x), size, _root(2 * l0 * step))


def _l0_l2(x: Tensor, l0: float, l2: float, step: Step) -> Tensor:
    shrink = 1 + l2 * step
    return _kept(x / shrink, x.abs(), _root(2 * l0 * step * shrink))


def tl1_threshold(lam: Step, a: float) -> Step:
    """At and below which transformed l1 gives 0; lam times the step."""
    critical = a * a / (2 * (a + 1))
    if not isinstance(lam, Tensor):
        return lam * ((a + 1) / a) if lam <= critical else math.sqrt(2 * lam * (a + 1)) - a / 2
    return torch.where(lam <= critical, lam * ((a + 1) / a), (2 * (a + 1) * lam).sqrt() - a / 2)


def _transformed_l1(x: Tensor, lam: float, a: float, step: Step) -> Tensor:
    if lam == 0:
        return x
    size, t = x.abs(), tl1_threshold(lam * step, a)
    third = math.pow(lam, 1 / 3) * math.pow(a, 1 / 3) * math.pow(a + 1, 1 / 3)
    # inf - inf * 0 would be NaN; what comes to 0 is computed elsewhere, where there is a derivative.
    whole = torch.where(size <= t, a + 2 * third, size + a).clamp(max=torch.finfo(x.dtype).max)
    sine = (6.75 * step * (third / whole) ** 3).clamp(max=1).sqrt()
    shrunk = size - whole * (4 / 3 * torch.sin(torch.asin(sine) / 3).square())
    return _kept(torch.copysign(shrunk.clamp(min=0), x), size, t)


def _by_group(x: Tensor, dim: int, run: int) -> Tensor:
    """(groups, their elements), float64."""
    return x.movedim(dim, 0).unflatten(0, (x.shape[dim] // run, run)).flatten(1).double()


def group_norms(x: Tensor, dim: int, run: int) -> Tensor:
    """(groups,) float64 norms: of each entry of a dimension, or of runs of them."""
    return torch.linalg.vector_norm(_by_group(x, dim, run), dim=1)


def group_step(step: Step, x: Tensor, dim: int, run: int) -> Step:
    """step by group: the mean of its elements' metrics 1 / step, as a step."""
    if not isinstance(step, Tensor):
        return step
    return _by_group(step.expand_as(x), dim, run).reciprocal().mean(1).reciprocal()


def _spread(value: Tensor, x: Tensor, dim: int, run: int) -> Tensor:
    """A value by group as a factor of x."""
    shape = [1] * x.ndim
    shape[dim] = x.shape[dim]
    return value.to(x.dtype).repeat_interleave(run).view(shape)


def _scaled(x: Tensor, factor: Tensor, dim: int, run: int) -> Tensor:
    by_element = _spread(factor, x, dim, run)
    return torch.where(by_element == 0, torch.zeros_like(x), x * by_element)


def _group_lasso(x: Tensor, lam: float, dim: int, run: int, step: Step) -> Tensor:
    norms, t = group_norms(x, dim, run), lam * group_step(step, x, dim, run)
    return _scaled(x, _kept(1 - t / torch.where(norms <= t, 1.0, norms), norms, t), dim, run)


def _group_l0(x: Tensor, lam: float, dim: int, run: int, step: Step) -> Tensor:
    norms, t = group_norms(x, dim, run), _root(2 * lam * group_step(step, x, dim, run))
    return _scaled(x, _kept(torch.ones_like(norms), norms, t), dim, run)


def l1(x: Tensor, lam: float, *, step: Step = 1.0) -> Tensor:
    """Soft threshold, R = lam |y|_1: ``sign(x) max(0, |x| - step lam)``."""
    return l0_l1(x, 0.0, lam, step=step)


def l0(x: Tensor, lam: float, *, step: Step = 1.0) -> Tensor:
    """Hard threshold, R = lam |y|_0: ``x 1[|x| > sqrt(2 step lam)]``."""
    return l0_l1(x, lam, 0.0, step=step)


def l0_l1(x: Tensor, l0: float, l1: float, *, step: Step = 1.0) -> Tensor:
    """R = l0 |y|_0 + l1 |y|_1: soft at ``step l1``, kept where that is above ``sqrt(2 step l0)``."""
    check_not_negative(l0=l0, l1=l1)
    wide, step = _wide(x, step)
    return _l0_l1(wide, l0, l1, step).to(x.dtype)


def l0_l2(x: Tensor, l0: float, l2: float, *, step: Step = 1.0) -> Tensor:
    """R = l0 |y|_0 + l2/2 |y|^2: ``x / (1 + step l2)`` where ``|x| > sqrt(2 step l0 (1 + step l2))``."""
    check_not_negative(l0=l0, l2=l2)
    wide, step = _wide(x, step)
    return _l0_l2(wide, l0, l2, step).to(x.dtype)


def transformed_l1(x: Tensor, lam: float, a: float = 1.0, *, step: Step = 1.0) -> Tensor:
    """R = lam sum (a + 1)|y| / (a + |y|), in both of its regimes (Zhang, Xin, arXiv 1412.5240).

    ``y = sign(x) (|x| - 4/3 (a + |x|) sin^2(asin(s) / 3))`` with
    ``s^2 = 27 step lam a (a + 1) / (4 (a + |x|)^3)`` above the threshold, which is ``step lam (a + 1) / a``
    while ``step lam <= a^2 / (2 (a + 1))``, else ``sqrt(2 step lam (a + 1)) - a / 2``.
    """
    check_not_negative(lam=lam)
    check_tl1(a)
    wide, step = _wide(x, step)
    return _transformed_l1(wide, lam, a, step).to(x.dtype)


def group_lasso(x: Tensor, lam: float, dim: int = 0, run: int = 1, *, step: Step = 1.0) -> Tensor:
    """R = lam sum_g |y_g|_2: ``x_g max(0, 1 - step_g lam / |x_g|)``."""
    return sparse_group_lasso(x, 0.0, lam, dim, run, step=step)


def group_l0(x: Tensor, lam: float, dim: int = 0, run: int = 1, *, step: Step = 1.0) -> Tensor:
    """R = lam times the number of groups that are not 0: ``x_g 1[|x_g| > sqrt(2 step_g lam)]``."""
    check_not_negative(lam=lam)
    wide, step = _wide(x, step)
    check_groups(x, dim, run)
    return _group_l0(wide, lam, dim, run, step).to(x.dtype)


def sparse_group_lasso(
    x: Tensor, l1: float, group: float, dim: int = 0, run: int = 1, *, step: Step = 1.0
) -> Tensor:
    """R = l1 |y|_1 + group sum_g |y_g|_2: the soft threshold, then the groups'; exact of a number step."""
    check_not_negative(l1=l1, group=group)
    wide, step = _wide(x, step)
    check_groups(x, dim, run)
    return _group_lasso(_l0_l1(wide, 0.0, l1, step) if l1 else wide, group, dim, run, step).to(x.dtype)


def transformed_l1_group(
    x: Tensor,
    lam: float,
    a: float = 1.0,
    group_share: float = 0.5,
    dim: int = 0,
    run: int = 1,
    *,
    step: Step = 1.0,
) -> Tensor:
    """Group lasso at ``group_share lam``, then transformed l1 at ``(1 - group_share) lam``.

    An approximation: neither order is the operator of the sum. This one is the nearer of the two.
    """
    check_not_negative(lam=lam, group_share=group_share)
    check_tl1(a, group_share)
    wide, step = _wide(x, step)
    check_groups(x, dim, run)
    grouped = _group_lasso(wide, lam * group_share, dim, run, step)
    return _transformed_l1(grouped, lam * (1 - group_share), a, step).to(x.dtype)


def kth_largest(size: Tensor, k: int) -> Tensor:
    """(): of a vector without NaN. On a GPU many blocks select by digits; kthvalue has one do it."""
    smaller = len(size) - k + 1
    if k <= smaller:
        return size.topk(k, sorted=False).values.amin()
    return size.topk(smaller, largest=False, sorted=False).values.amax()


def largest(size: Tensor, k: int) -> Tensor:
    """(n,) bool: the k largest of a vector, lowest place first among ties; NaN is above all."""
    if k == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    size = torch.where(size.isnan(), torch.inf, size)
    bound = size.kthvalue(len(size) - k + 1).values if size.is_cpu else kth_largest(size, k)
    above, tied = size > bound, size == bound
    return above | (tied & (tied.cumsum(0) <= k - above.sum()))


def top_k(x: Tensor, k: int, *, step: Step = 1.0) -> Tensor:
    """Projection onto k elements: the largest ``|x| / sqrt(step)``, of a number the largest |x|, others 0."""
    wide, step = _wide(x, step)
    check_top(k, x.numel(), "elements")
    size = (wide.abs() / step.sqrt() if isinstance(step, Tensor) else wide.abs()).flatten()
    return torch.where(largest(size, k).view(x.shape), x, torch.zeros_like(x))


def group_top_k(x: Tensor, k: int, dim: int = 0, run: int = 1, *, step: Step = 1.0) -> Tensor:
    """Projection onto k groups: those of the largest ``|x_g| / sqrt(step_g)``, others 0."""
    wide, step = _wide(x, step)
    check_groups(x, dim, run)
    check_top(k, x.shape[dim] // run, "groups")
    size = group_norms(wide, dim, run)
    by_group = group_step(step, x, dim, run)
    keep = largest(size / by_group.sqrt() if isinstance(by_group, Tensor) else size, k)
    return torch.where(_spread(keep, keep.new_empty(x.shape), dim, run), x, torch.zeros_like(x))
