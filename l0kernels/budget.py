"""The step that puts gates on a budget, in place: one native call or kernel, else the reference.budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, _registry, reference
from ._calls import CostTerms

Run = tuple[int, int, float]
"""The first of values in a row, how many they are, and their weight."""


class Kind(NamedTuple):
    """Gates that share a price.

    Attributes:
        number: of its price among all.
        keep: the share of the cost that is to be left.
        sizes: of its gate vectors, one after the other.
        kept: how open they are.
        values: (..., n) how open they are -> (...) what that costs.
        terms: the same as terms; None where it is a function of the user's.
        offset, unit: the share is (cost - offset) / unit.
        points, rounds: of the search for the price.
    """

    number: int
    keep: float
    sizes: tuple[int, ...]
    kept: reference.budget.Kept
    values: reference.budget.Values
    terms: CostTerms | None
    offset: float
    unit: float
    points: int
    rounds: int

    def share(self, x: Tensor) -> Tensor:
        """(..., n) how open the gates are -> (...): the share of the cost that is left."""
        return (self.values(x) - self.offset) / self.unit

    def dists(self) -> list[tuple[float, float, float]]:
        """shift, low and 1 / (high - low) of each gate vector."""
        firsts = [0, *accumulate(self.sizes)][:-1]
        each = zip(*(of[firsts].tolist() for of in self.kept[:3]), strict=True)
        return [(shift, low, 1 / (high - low)) for shift, low, high in each]

    def runs(self) -> list[list[Run]]:
        """Of what is linear in the terms, then of each of their sums."""
        terms = self.terms
        assert terms is not None
        bounds = terms.offsets.tolist()
        linear = _runs(terms.linear.nonzero()[:, 0], terms.linear[terms.linear != 0])
        return [linear, *(_runs(terms.index[a:b], terms.weight[a:b]) for a, b in pairwise(bounds))]


def _runs(index: Tensor, weight: Tensor) -> list[Run]:
    """Ascending places and their weights, as runs of places in a row with one weight."""
    if not len(index):
        return []
    breaks = ((index.diff() != 1) | (weight.diff() != 0)).nonzero()[:, 0] + 1
    firsts, counts = [0, *breaks.tolist()], torch.tensor([0, *breaks.tolist(), len(index)]).diff().tolist()
    return [*zip(index[firsts].tolist(), counts, weight[firsts].tolist(), strict=True)]


class State(NamedTuple):
    """What a budget knows; all of it is written in place, but for `first`.

    Attributes:
        moment: (gates of all kinds,) v, in the dtype of the gates.
        first: (kinds,) float64: the shares at the start.
        price: (kinds,) float64: mu.
        step, skipped: () int64.
    """

    moment: Tensor
    first: Tensor
    price: Tensor
    step: Tensor
    skipped: Tensor


_NATIVE = ("cpp", "triton")
"""The backends that take a step at once; float64 on a GPU and costs of the user's are the formula's."""


class Projection:
    """Puts the gates of some kinds on their budgets.

    Args:
        kinds: their gates lie one after the other in `State.moment`.
        ramp_steps: over how many steps the budgets fall.
    """

    def __init__(self, kinds: Sequence[Kind], ramp_steps: float) -> None:
        self._kinds = tuple(kinds)
        self._ramp_steps = ramp_steps
        self._has_terms = all(kind.terms is not None for kind in kinds)
        self._plan: Any = None
        self._asked: str | None = None

    def __call__(self, log_alphas: list[Tensor], grads: list[Tensor | None], state: State) -> None:
        """One step: of log_alphas (those that do not require a gradient stay) and state, in place.

        Raises:
            RuntimeError: the requested backend cannot serve the gates.
        """
        if not (self._has_terms and self._kernel(log_alphas, grads, state)):
            self._formula(log_alphas, grads, state)

    def _kernel(self, log_alphas: list[Tensor], grads: list[Tensor | None], state: State) -> bool:
        """The step by a kernel; False where none takes these gates."""
        plan = self._plan
        try:
            if plan is None or plan.state is not state or self._asked != _registry.requested():
                plan = self._planned(log_alphas[0], state)
                if plan is None:
                    return False
            plan.step(log_alphas, grads)  # which looks at every log_alpha itself, before it writes
        except (RuntimeError, TypeError, ValueError):
            if self._is_plain(log_alphas):
                raise
            return False
        return True

    def _planned(self, first: Tensor, state: State) -> Any:
        """A plan of the backend for these gates; None where it has none."""
        self._plan, self._asked = None, _registry.requested()
        backend = _registry.resolve(first.device, first.dtype, "l0_penalty")
        if backend in _NATIVE:
            self._plan = _ops.module(backend).BudgetPlan(self._kinds, state, self._ramp_steps)
        return self._plan

    def _is_plain(self, log_alphas: list[Tensor]) -> bool:
        """Whether kernels take these: of one dtype, their elements one after the other."""
        dtype = log_alphas[0].dtype
        return all(log_alpha.dtype is dtype and log_alpha.is_contiguous() for log_alpha in log_alphas)

    @torch.no_grad()
    def _formula(self, log_alphas: list[Tensor], grads: list[Tensor | None], state: State) -> None:
        before = torch.cat([log_alpha.flatten() for log_alpha in log_alphas])
        pairs = zip(log_alphas, grads, strict=True)
        grad = torch.cat([torch.zeros_like(a).flatten() if g is None else g.flatten() for a, g in pairs])
        step, moment = state.step + 1, reference.budget.fresh_moment(state.moment, grad)
        fine = torch.stack((moment, before)).isfinite().all()
        moves = [log_alpha.requires_grad for log_alpha in log_alphas]
        parts, prices, start, at = [], state.price.clone(), 0, 0
        for kind in self._kinds:
            stop, behind = start + sum(kind.sizes), at + len(kind.sizes)
            own = before[start:stop]
            slope = reference.budget.gradient(kind.share, kind.kept, own)
            q = reference.budget.direction(slope, moment[start:stop], step)
            if not all(moves[at:behind]):
                q = q * torch.cat(
                    [q.new_full((n,), m) for n, m in zip(kind.sizes, moves[at:behind], strict=True)]
                )
            target = reference.budget.target_at(state.first[kind.number], kind.keep, step, self._ramp_steps)
            new, prices[kind.number] = reference.budget.project(
                kind.share, own, slope, q, kind.kept, target, kind.points, kind.rounds
            )
            parts += new.split(kind.sizes)
            start, at = stop, behind
        state.moment.copy_(torch.where(fine, moment, state.moment))
        state.price.copy_(torch.where(fine, prices, state.price))
        state.step.add_(fine)
        state.skipped.add_(~fine)
        moving = [(a, part.view(a.shape)) for a, part, m in zip(log_alphas, parts, moves, strict=True) if m]
        for log_alpha, part in moving:
            log_alpha.copy_(torch.where(fine, part, log_alpha))


def share_in_full(kind: Kind) -> tuple[float, float]:
    """The share of the cost with all gates closed, and with all open."""
    device, n = kind.kept.shift.device, sum(kind.sizes)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device).expand(2, n)
    with torch.no_grad():
        closed, open_ = kind.share(ends).tolist()
    return closed, open_
