"""A budget as a term in the loss, with a multiplier that rises while the model is too large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _checks, reference
from .shares import CostFunction, GateKind, Wish, check_reach, kinds_of
from .units.example import Inputs


class Lagrangian:
    """A term ``lambda * (c - B_t)`` for the loss, whose lambda is ascended, and restarts (arXiv 2208.04425).

    ::

        lagrangian = l0.nn.Lagrangian(model, keep=0.5, steps=3000)
        lagrangian.attach(optimizer)
        l0.nn.clamp_after_step(optimizer, model)
        ...
        (loss + lagrangian()).backward()

    c is the share of the cost that is expected to be left, B_t falls from c_0 to B in the first ``ramp`` of
    the steps, both as for :class:`Budget`. After each step of the optimiser, with c of the last call,

    ::

        lambda <- lambda + eta * (c - B_t)    if c > B_t, else 0

    (Gallego-Posada et al., NeurIPS 2022, section 4 and its dual restarts; here with a ramp of the budget).
    :class:`Budget` needs no eta and ends on the target for any loss and rate; take this where the price must
    stand in the loss. eta = 1 is made for losses of order 1, and scales with them.

    Args:
        model, keep, cost, steps, ramp, input_shape: see :class:`Budget`.
        lr: eta, > 0.
        restarts: whether lambda is 0 where the budget is met; else it falls by eta (B_t - c), to 0 at least.

    Raises:
        ValueError, TypeError: as :class:`Budget`; lr is not positive and finite.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float | Mapping[str, float],
        *,
        cost: str | CostFunction = "params",
        steps: int,
        ramp: float = 0.3,
        lr: float = 1.0,
        restarts: bool = True,
        input_shape: Inputs | None = None,
    ) -> None:
        _checks.check_count("steps", steps, 1, 2**63)
        for name, value in (("ramp", ramp), ("lr", lr)):
            _checks.check_number(name, value)
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must lie in [0, 1], got {ramp!r}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr!r}")
        self._kinds = kinds_of(model, Wish(keep, cost, input_shape))
        check_reach(self._kinds)
        self.keep, self.steps, self.ramp, self.lr, self.restarts = keep, steps, ramp, lr, restarts
        with torch.no_grad():
            self._first = self._shares()
        self._last = self._first
        self._multiplier = torch.zeros_like(self._first)
        self._step = torch.zeros((), dtype=torch.int64, device=self._first.device)

    def _shares(self) -> Tensor:
        return torch.stack([_share(kind) for kind in self._kinds])

    def _targets(self) -> Tensor:
        at, steps = reference.budget.target_at, self.ramp * self.steps
        step = self._step + 1
        parts = zip(self._first, self._kinds, strict=True)
        return torch.stack([at(first, kind.of.keep, step, steps) for first, kind in parts])

    def __call__(self) -> Tensor:
        """The term, a float64 scalar, differentiable in log_alpha; its c is what the next step ascends by."""
        shares = self._shares()
        self._last = shares.detach()
        return (self._multiplier.clone() * (shares - self._targets())).sum()

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Has each step of `optimizer` end with :meth:`step`; the handle's ``remove()`` ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """Ascends. Everything stays on the device of the gates."""
        excess = self._last - self._targets()
        risen = (self._multiplier + self.lr * excess).clamp(min=0)
        if self.restarts:
            risen = torch.where(excess > 0, risen, 0.0)
        self._multiplier.copy_(torch.where(excess.isfinite(), risen, self._multiplier))
        self._step.add_(1)

    @property
    def multiplier(self) -> float | dict[str, float]:
        """lambda, or one for each pattern; on a GPU this waits for it."""
        values = {kind.name: v for kind, v in zip(self._kinds, self._multiplier.tolist(), strict=True)}
        return values if isinstance(self.keep, Mapping) else next(iter(values.values()))

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes needs beside gates and optimiser."""
        return {
            "multiplier": self._multiplier.clone(),
            "first": self._first.clone(),
            "last": self._last.clone(),
            "step": self._step.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned.

        Raises:
            ValueError: another number of multipliers.
        """
        if state["multiplier"].shape != self._multiplier.shape:
            expected, got = len(self._multiplier), len(state["multiplier"])
            raise ValueError(f"state must hold {expected} multipliers, got {got}")
        self._multiplier.copy_(state["multiplier"])
        self._first, self._last = (state[name].to(self._first) for name in ("first", "last"))
        self._step.copy_(state["step"])


def _share(kind: GateKind) -> Tensor:
    log_alpha = torch.cat([gate.log_alpha.flatten() for gate in kind.gates])
    return kind.of.share(kind.of.kept(log_alpha))
