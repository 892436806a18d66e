"""Penalties as small objects: their proximal operator, in place or not, and their value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _ops, _registry, reference
from .._arguments import check_groups, check_not_negative, check_prox, check_tl1, check_top
from .._calls import ProxCall
from .._checks import check_count, check_device, check_floating, check_shape
from .._compat import count_modes, functorch_active
from ..impl import module

Step = float | Tensor
_L0_L1, _L0_L2, _TRANSFORMED_L1 = 1.0, 2.0, 3.0  # csrc/prox.h has these kinds
_LASSO, _HARD, _TOP = 1.0, 2.0, 3.0
Numbers = tuple[list[float], list[float], list[float]]
"""Before the groups' factor, the groups', and after it, as of ProxCall."""


class Regulariser:
    """A penalty R of a tensor.

    A subclass of your own gives :meth:`formula` and :meth:`value`; ``dim`` and ``run`` as attributes where it
    has groups.
    """

    dim: int | None = None
    run: int = 1
    backends: tuple[str, ...] = ("cpp", "triton")
    """Which have a kernel for it, where :meth:`numbers` tells what."""

    def prox(self, x: Tensor, step: Step = 1.0, out: Tensor | None = None) -> Tensor:
        """``argmin_y 1/2 sum (y - x)^2 / step + R(y)``, with exact zeros; of two minimisers the smaller.

        Args:
            x: float32, float64, bfloat16 or float16 in any layout; 16 bits are computed in float32. Native
                code and Triton take dense memory, all other layouts are computed in plain torch.
            step: >= 0, a number, or a tensor of x's shape or of none: the learning rate, by element where the
                optimiser has a metric. Values of a tensor are not looked at.
            out: of x's shape, dtype and device, gets the result; x itself: in place. It must not share memory
                with x otherwise.

        Returns:
            ``out``, or a new tensor. No gradient flows through it.

        Raises:
            TypeError: a wrong kind or dtype.
            ValueError: a wrong shape, device or number.
            RuntimeError: x is in a graph of autograd; :mod:`l0kernels.reference.prox` differentiates.
        """
        self.check(x, step)
        if out is not None:
            check_floating("out", out)
            check_shape("out", out, x.shape, "that of x")
            check_device("out", out, x.device, "x")
            if out.dtype != x.dtype:
                raise TypeError(f"out must have the dtype of x, {x.dtype}, got {out.dtype}")
        _refuse_graph(x, in_place=out is x)
        with torch.no_grad():
            if out is None:
                return self._new(x, step)
            self._write([x], [step], [out])
            return out

    def prox_(self, tensors: Tensor | Sequence[Tensor], step: Step | Sequence[Step] = 1.0) -> None:
        """:meth:`prox` in place, of one tensor or of several in one call.

        Args:
            tensors: as x of :meth:`prox`.
            step: for all of them, or one each.

        Raises:
            as :meth:`prox`; ValueError: another number of steps than tensors.
        """
        several = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        steps = [*step] if isinstance(step, Sequence) else [step] * len(several)
        if len(steps) != len(several):
            raise ValueError(f"step must be one or one per tensor, {len(several)}, got {len(steps)}")
        for x, own in zip(several, steps, strict=True):
            self.check(x, own)
            _refuse_graph(x, in_place=True)
        with torch.no_grad():
            self._write(several, steps, several)

    def value(self, x: Tensor) -> Tensor:
        """R(x), a scalar, differentiable where R is."""
        raise NotImplementedError

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """:meth:`prox` in plain torch."""
        raise NotImplementedError

    def check(self, x: Tensor, step: Step = 1.0) -> None:
        """Raises what :meth:`prox` raises of its arguments."""
        check_prox(x, step)
        if self.dim is not None:
            check_groups(x, self.dim, self.run)

    def numbers(self, x: Tensor, step: float) -> Numbers | None:
        """What the kernels are told; None: the formula alone computes it."""
        return None

    def _call(self, x: Tensor, step: Step) -> tuple[ProxCall, list[int]] | None:
        """What a kernel is called with, and the order of x's dimensions in memory; None: none takes it."""
        order = _order(x)
        scale = float(step) if not isinstance(step, Tensor) else 1.0
        numbers = None if order is None else self.numbers(x, scale)
        if order is None or numbers is None:
            return None
        by_element, by_group = None, None
        if isinstance(step, Tensor):
            if numbers[0] or numbers[2]:
                wide = step.to(torch.promote_types(x.dtype, torch.float32)).expand_as(x)
                by_element = wide.permute(order).contiguous()
            if numbers[1] and self.dim is not None:
                found = reference.prox.group_step(step, x, self.dim, self.run)
                by_group = found if isinstance(found, Tensor) else None
        layout = _layout(x, order, self.dim, self.run)
        return ProxCall(x.detach().permute(order), by_element, by_group, *numbers, layout), order

    def _new(self, x: Tensor, step: Step) -> Tensor:
        backend = _registry.resolve(x.device, x.dtype, "prox")
        found = self._call(x, step) if backend in self.backends else None
        if found is None:
            return self.formula(x, step)
        call, order = found
        y: Tensor = _ops.prox(call, backend)
        return y.permute([order.index(dim) for dim in range(x.ndim)])

    def _write(self, tensors: Sequence[Tensor], steps: Sequence[Step], outs: Sequence[Tensor]) -> None:
        eager = not (torch.compiler.is_compiling() or count_modes() or functorch_active())
        jobs: dict[str, tuple[list[ProxCall], list[Tensor], list[Tensor]]] = {}
        for x, step, out in zip(tensors, steps, outs, strict=True):
            backend = _registry.resolve(x.device, x.dtype, "prox")
            direct = eager and backend in self.backends and out.stride() == x.stride()
            found = self._call(x, step) if direct else None
            if found is None:
                out.copy_(self._new(x, step))
                continue
            call, order = found
            calls, places, written = jobs.setdefault(backend, ([], [], []))
            calls.append(call)
            places.append(call.x if out is x else out.detach().permute(order))
            written.append(out)
        for backend, (calls, places, written) in jobs.items():
            module(backend).prox(calls, places)
            for out in written:
                if not out.is_inference():
                    torch.autograd.graph.increment_version(out)


def _refuse_graph(x: Tensor, in_place: bool) -> None:
    if torch.is_grad_enabled() and x.requires_grad and not (in_place and x.is_leaf):
        raise RuntimeError(
            "x must need no gradient, which does not flow through l0kernels.prox: detach it, or call "
            "l0kernels.reference.prox"
        )


def _order(x: Tensor) -> list[int] | None:
    """The dimensions of x from the slowest in memory to the fastest; None: there are gaps."""
    order = list(range(x.ndim))
    if x.is_contiguous():
        return order
    strides = x.stride()
    order.sort(key=lambda dim: (-strides[dim], -x.shape[dim]))
    return order if x.permute(order).is_contiguous() else None


def _layout(x: Tensor, order: Sequence[int], dim: int | None, run: int) -> list[int]:
    """(outer, groups, inner) of x in memory."""
    if dim is None:
        return [1, 1, x.numel()]
    place = order.index(dim % x.ndim)
    sizes = [x.shape[d] for d in order]
    return [math.prod(sizes[:place]), sizes[place] // run, run * math.prod(sizes[place + 1 :])]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class L0L1(Regulariser):
    """``l0 |w|_0 + l1 |w|_1``; prox: soft at ``step l1``, kept where that is above ``sqrt(2 step l0)``."""

    l0: float
    l1: float

    def __post_init__(self) -> None:
        check_not_negative(l0=self.l0, l1=self.l1)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        wide = _wide(x)
        return self.l0 * (wide != 0).sum() + self.l1 * wide.abs().sum()

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.l0_l1`."""
        return reference.prox.l0_l1(x, self.l0, self.l1, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        return [_L0_L1, self.l0 * step, self.l1 * step], [], []


@dataclass(frozen=True)
class L0L2(Regulariser):
    """``l0 |w|_0 + l2/2 |w|^2``; prox: ``w / (1 + step l2)`` above ``sqrt(2 step l0 (1 + step l2))``."""

    l0: float
    l2: float

    def __post_init__(self) -> None:
        check_not_negative(l0=self.l0, l2=self.l2)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        wide = _wide(x)
        return self.l0 * (wide != 0).sum() + self.l2 / 2 * wide.square().sum()

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.l0_l2`."""
        return reference.prox.l0_l2(x, self.l0, self.l2, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        return [_L0_L2, self.l0 * step, self.l2 * step], [], []


class L1(L0L1):
    """``lam |w|_1``; prox: the soft threshold, ``sign(w) max(0, |w| - step lam)``."""

    def __init__(self, lam: float) -> None:
        check_not_negative(lam=lam)
        super().__init__(0.0, lam)


class L0(L0L1):
    """``lam |w|_0``; prox: the hard threshold, ``w 1[|w| > sqrt(2 step lam)]``."""

    def __init__(self, lam: float) -> None:
        check_not_negative(lam=lam)
        super().__init__(lam, 0.0)


@dataclass(frozen=True)
class TransformedL1(Regulariser):
    """``lam sum (a + 1)|w| / (a + |w|)`` (Zhang, Xin, arXiv 1412.5240): l0 for a near 0, l1 for a large.

    The operator is exact, in both of its regimes; float32 does not lose the shrinkage of a small step.
    """

    lam: float
    a: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)
        check_tl1(self.a)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        return self.lam * _transformed(_wide(x), self.a)

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.transformed_l1`."""
        return reference.prox.transformed_l1(x, self.lam, self.a, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        return [_TRANSFORMED_L1, self.lam * step, self.a], [], []


def _transformed(x: Tensor, a: float) -> Tensor:
    size = x.abs()
    return ((a + 1) * size / (a + size)).sum()


@dataclass(frozen=True)
class SparseGroupLasso(Regulariser):
    """``l1 |w|_1 + group sum_g |w_g|_2``; prox: the soft threshold, then the groups', which is exact.

    Where ``step`` is a tensor, groups have one metric each, see :mod:`l0kernels.reference.prox`; that with
    another metric for the elements is an approximation.

    Args:
        l1, group: the weights, >= 0.
        dim: whose entries are the groups: 0 for the rows of a weight (what makes a unit), 1 for its columns
            (what reads one).
        run: so many entries in a row are one group, as of the columns behind nn.Flatten.
        by_size: whether the weight of the groups is multiplied by the root of their size.
    """

    l1: float
    group: float
    dim: int = 0
    run: int = 1
    by_size: bool = False

    def __post_init__(self) -> None:
        check_not_negative(l1=self.l1, group=self.group)
        _check_run(self.run)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        self.check(x)
        wide, sums = _wide(x), _norms(x, self.dim, self.run).sum()
        return (self.l1 * wide.abs().sum() if self.l1 else 0.0) + self._lam(x) * sums.to(wide.dtype)

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.sparse_group_lasso`."""
        return reference.prox.sparse_group_lasso(x, self.l1, self._lam(x), self.dim, self.run, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        before = [_L0_L1, 0.0, self.l1 * step] if self.l1 else []
        return before, [_LASSO, self._lam(x) * step], []

    def _lam(self, x: Tensor) -> float:
        return self.group * _weight(x, self.dim, self.run, self.by_size)


def _check_run(run: int) -> None:
    check_count("run", run, 1, 2**31)


def _norms(x: Tensor, dim: int, run: int) -> Tensor:
    return reference.prox.group_norms(x, dim, run)


def _weight(x: Tensor, dim: int, run: int, by_size: bool) -> float:
    return math.sqrt(run * x.numel() / max(x.shape[dim], 1)) if by_size else 1.0


class GroupLasso(SparseGroupLasso):
    """``lam sum_g |w_g|_2``; prox: ``w_g max(0, 1 - step lam / |w_g|)``. Arguments as of SparseGroupLasso."""

    def __init__(self, lam: float, dim: int = 0, run: int = 1, by_size: bool = False) -> None:
        check_not_negative(lam=lam)
        super().__init__(0.0, lam, dim, run, by_size)


@dataclass(frozen=True)
class GroupL0(Regulariser):
    """lam times the number of groups that are not 0; prox: ``w_g 1[|w_g| > sqrt(2 step lam)]``."""

    lam: float
    dim: int = 0
    run: int = 1
    by_size: bool = False

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam)
        _check_run(self.run)

    def value(self, x: Tensor) -> Tensor:
        """As the class says; where `by_size`, with the root of their size."""
        self.check(x)
        return self._lam(x) * (_norms(x, self.dim, self.run) != 0).sum()

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.group_l0`."""
        return reference.prox.group_l0(x, self._lam(x), self.dim, self.run, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        return [], [_HARD, self._lam(x) * step], []

    def _lam(self, x: Tensor) -> float:
        return self.lam * _weight(x, self.dim, self.run, self.by_size)


@dataclass(frozen=True)
class TransformedL1Group(Regulariser):
    """Transformed l1 with the group lasso, the integrated regulariser of Ma et al. (arXiv 1901.01021)::

        lam ((1 - group_share) sum (a + 1)|w| / (a + |w|)  +  group_share sum_g |w_g|_2)

    The operator is that of the groups, then that of transformed l1: an approximation, as either order is;
    this one is the nearer. :func:`layer_shares` gives the shares of the layers of a net.
    """

    lam: float
    a: float = 1.0
    group_share: float = 0.5
    dim: int = 0
    run: int = 1
    by_size: bool = False

    def __post_init__(self) -> None:
        check_not_negative(lam=self.lam, group_share=self.group_share)
        check_tl1(self.a, self.group_share)
        _check_run(self.run)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        self.check(x)
        first, second = self._lams(x)
        wide = _wide(x)
        norms = _norms(x, self.dim, self.run).sum().to(wide.dtype)
        return first * norms + second * _transformed(wide, self.a)

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.transformed_l1_group`."""
        first, second = self._lams(x)
        both = first + second
        share = first / both if both else 0.0
        return reference.prox.transformed_l1_group(x, both, self.a, share, self.dim, self.run, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        first, second = self._lams(x)
        after = [_TRANSFORMED_L1, second * step, self.a] if second else []
        return [], [_LASSO, first * step], after

    def _lams(self, x: Tensor) -> tuple[float, float]:
        """Of the groups, and of the elements."""
        weight = _weight(x, self.dim, self.run, self.by_size)
        return self.lam * self.group_share * weight, self.lam * (1 - self.group_share)


@dataclass(frozen=True)
class TopK(Regulariser):
    """0 for tensors with at most k elements that are not 0, else infinite; prox: the projection onto these.

    It keeps the k largest, the first ones among equals. On the CPU contiguous memory with one step for all is
    native; all else is plain torch.
    """

    k: int
    backends = ("cpp",)

    def __post_init__(self) -> None:
        check_count("k", self.k, 0, 2**63)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        return torch.where((x != 0).sum() <= self.k, 0.0, math.inf)

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.top_k`."""
        return reference.prox.top_k(x, self.k, step=step)

    def numbers(self, x: Tensor, step: float) -> Numbers:
        return [], [_TOP, float(self.k)], []

    def _call(self, x: Tensor, step: Step) -> tuple[ProxCall, list[int]] | None:
        # the first among equals is that of the indices, not of the memory
        return super()._call(x, step) if x.is_contiguous() and not isinstance(step, Tensor) else None

    def check(self, x: Tensor, step: Step = 1.0) -> None:
        """As of every penalty; ValueError: k is more than there are."""
        super().check(x, step)
        check_top(self.k, x.numel(), "elements")


@dataclass(frozen=True)
class GroupTopK(Regulariser):
    """0 for tensors with at most k groups that are not 0, else infinite; prox: the projection onto these.

    It keeps the k groups of the largest norms, the first ones among equals; in plain torch on every backend.
    """

    k: int
    dim: int = 0
    run: int = 1

    def __post_init__(self) -> None:
        check_count("k", self.k, 0, 2**63)
        _check_run(self.run)

    def value(self, x: Tensor) -> Tensor:
        """As the class says."""
        self.check(x)
        return torch.where((_norms(x, self.dim, self.run) != 0).sum() <= self.k, 0.0, math.inf)

    def formula(self, x: Tensor, step: Step) -> Tensor:
        """See :func:`l0kernels.reference.prox.group_top_k`."""
        return reference.prox.group_top_k(x, self.k, self.dim, self.run, step=step)

    def check(self, x: Tensor, step: Step = 1.0) -> None:
        """As of every penalty; ValueError: k is more than there are."""
        super().check(x, step)
        check_top(self.k, x.shape[self.dim] // self.run, "groups")
