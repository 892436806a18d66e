"""What changes in the course of a training: the price of the gates, and their temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import _checks
from .gate import HardConcreteGate
from .names import named_gates
from .shares import matched

SHAPES = ("constant", "linear", "cubic")


class Ramp(NamedTuple):
    """A number that goes from `start` to `end` in `steps` steps, from step `begin` on; called with a step.

    With ``x = (step - begin) / steps`` in [0, 1]: "linear" is ``start + (end - start) x``, "cubic"
    ``end + (start - end) (1 - x)^3``, fast at first and gentle at the end (Zhu and Gupta, arXiv 1710.01878,
    equation 1), "constant" ``end``.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0
    begin: int = 0
    shape: str = "linear"

    def __call__(self, step: int) -> float:
        """The number at a step."""
        if self.shape == "constant":
            return self.end
        x = min(max((step - self.begin) / max(self.steps, 1), 0.0), 1.0)
        if self.shape == "cubic":
            return self.end + (self.start - self.end) * (1 - x) ** 3
        return self.start + (self.end - self.start) * x


class Schedule:
    """Sets `lam` and the temperature of a model's gates in the course of a training.

    ::

        schedule = l0.nn.Schedule(model, lam=l0.nn.Ramp(1000, shape="cubic"))    # from 0 to what lam is now
        schedule.attach(optimizer)

    Args:
        model: with gates.
        lam: a factor of the lam that each gate has now, as a function of the step; None: it stays.
        beta: the temperature of the gates' distribution (`HardConcrete.beta`), likewise; None: it stays. Low
            ones decide gates sooner. P(z > 0) at a log_alpha changes with it, and compiled graphs, of which
            it is a constant, are compiled anew.
        every: so many steps lie between two settings.

    Raises:
        ValueError: no gate in the model, nothing to set, a shape that is none, or every is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: Callable[[int], float] | None = None,
        beta: Callable[[int], float] | None = None,
        every: int = 1,
    ) -> None:
        gates = [*named_gates(model)]
        if not gates:
            raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
        if lam is None and beta is None:
            raise ValueError("lam or beta must be given, got neither")
        for name, ramp in (("lam", lam), ("beta", beta)):
            if isinstance(ramp, Ramp):
                _checks.check_choice(f"the shape of {name}", ramp.shape, SHAPES)
        _checks.check_count("every", every, 1, 2**63)
        self._lams = [(gate, gate.lam) for gate in gates]
        self._lam, self._beta, self._every = lam, beta, every
        self.steps = 0
        self.set()

    def set(self) -> None:
        """Sets what the gates are to have now."""
        for gate, lam in self._lams:
            if self._lam is not None:
                gate.lam = lam * self._lam(self.steps)
        if self._beta is not None:
            _set_beta([gate for gate, _ in self._lams], self._beta(self.steps))

    def step(self) -> None:
        """Counts a step, and sets at every so many."""
        self.steps += 1
        if self.steps % self._every == 0:
            self.set()

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Has each step of `optimizer` count; the handle's ``remove()`` ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def state_dict(self) -> dict[str, Any]:
        """The steps so far, and the lams that the factor is of."""
        return {"steps": self.steps, "lams": [lam for _, lam in self._lams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, and sets the gates so.

        Raises:
            ValueError: another number of gates.
        """
        if len(state["lams"]) != len(self._lams):
            raise ValueError(f"state must be of {len(self._lams)} gates, got {len(state['lams'])}")
        self.steps = state["steps"]
        self._lams = [(gate, lam) for (gate, _), lam in zip(self._lams, state["lams"], strict=True)]
        self.set()


def _set_beta(gates: list[HardConcreteGate], beta: float) -> None:
    """Gates of one distribution go on having one object, by which they are drawn together."""
    made: dict[Any, Any] = {}
    for gate in gates:
        if gate.dist.beta != beta:
            if gate.dist not in made:
                made[gate.dist] = dataclasses.replace(gate.dist, beta=beta)
            gate.dist = made[gate.dist]


def set_lam_(model: nn.Module, lams: Mapping[str, float]) -> None:
    """Sets `lam` of the gates that patterns name; others keep theirs.

    ::

        set_lam_(model, {r"conv\\d\\.out_gate": 0.03, "head.in_gate": 0.3})

    Args:
        model: with gates.
        lams: patterns, as of :class:`Budget`, and the lam of their gates, >= 0.

    Raises:
        ValueError: a pattern that names no gate, two that name one, or a lam out of range.
    """
    names = {gate: name for gate, (name, _) in named_gates(model).items()}
    for pattern, lam in lams.items():
        _checks.check_number("lam", lam)
        if lam < 0:
            raise ValueError(f"lam must be >= 0, got {lam!r} for {pattern!r}")
    for pattern, gates in matched(lams, names).items():
        for gate in gates:
            gate.lam = float(lams[pattern])
