"""The operators as functions: those of the objects of regularisers.py, whose docstrings have the formulas.

x, step, out, what comes back and what is raised are as of Regulariser.prox.
"""

from __future__ import annotations

from torch import Tensor

from . import regularisers as of
from .regularisers import Step


def l1(x: Tensor, lam: float, *, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
    """Soft threshold: ``sign(x) max(0, |x| - step lam)``; see :class:`L1` and :meth:`Regulariser.prox`."""
    return of.L1(lam).prox(x, step, out)


def l0(x: Tensor, lam: float, *, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
    """Hard threshold: ``x 1[|x| > sqrt(2 step lam)]``; see :class:`L0` and :meth:`Regulariser.prox`."""
    return of.L0(lam).prox(x, step, out)


def l0_l1(x: Tensor, l0: float, l1: float, *, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
    """The operator of :class:`L0L1`; see :meth:`Regulariser.prox`."""
    return of.L0L1(l0, l1).prox(x, step, out)


def l0_l2(x: Tensor, l0: float, l2: float, *, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
    """The operator of :class:`L0L2`; see :meth:`Regulariser.prox`."""
    return of.L0L2(l0, l2).prox(x, step, out)


def transformed_l1(
    x: Tensor, lam: float, a: float = 1.0, *, step: Step = 1.0, out: Tensor | None = None
) -> Tensor:
    """The operator of :class:`TransformedL1`; see :meth:`Regulariser.prox`."""
    return of.TransformedL1(lam, a).prox(x, step, out)


def group_lasso(
    x: Tensor, lam: float, dim: int = 0, run: int = 1, *, step: Step = 1.0, out: Tensor | None = None
) -> Tensor:
    """``x_g max(0, 1 - step lam / |x_g|)``; see :class:`GroupLasso` and :meth:`Regulariser.prox`."""
    return of.GroupLasso(lam, dim, run).prox(x, step, out)


def group_l0(
    x: Tensor, lam: float, dim: int = 0, run: int = 1, *, step: Step = 1.0, out: Tensor | None = None
) -> Tensor:
    """``x_g 1[|x_g| > sqrt(2 step lam)]``; see :class:`GroupL0` and :meth:`Regulariser.prox`."""
    return of.GroupL0(lam, dim, run).prox(x, step, out)


def sparse_group_lasso(
    x: Tensor,
    l1: float,
    group: float,
    dim: int = 0,
    run: int = 1,
    *,
    step: Step = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """The operator of :class:`SparseGroupLasso`; see :meth:`Regulariser.prox`."""
    return of.SparseGroupLasso(l1, group, dim, run).prox(x, step, out)


def transformed_l1_group(
    x: Tensor,
    lam: float,
    a: float = 1.0,
    group_share: float = 0.5,
    dim: int = 0,
    run: int = 1,
    *,
    step: Step = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """That of :class:`TransformedL1Group`, an approximation; see :meth:`Regulariser.prox`."""
    return of.TransformedL1Group(lam, a, group_share, dim, run).prox(x, step, out)


def top_k(x: Tensor, k: int, *, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
    """The k largest elements, others 0; see :class:`TopK` and :meth:`Regulariser.prox`."""
    return of.TopK(k).prox(x, step, out)


def group_top_k(
    x: Tensor, k: int, dim: int = 0, run: int = 1, *, step: Step = 1.0, out: Tensor | None = None
) -> Tensor:
    """The k groups of the largest norms, others 0; see :class:`GroupTopK` and :meth:`Regulariser.prox`."""
    return of.GroupTopK(k, dim, run).prox(x, step, out)
