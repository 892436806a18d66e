"""Shares of a model's cost: which gates go together, and how much of the cost they leave."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks, reference
from ..budget import Kind, share_in_full
from .cost import COSTS, cost_of
from .gate import HardConcreteGate
from .names import named_gates
from .penalty import LIMIT
from .ranks import is_sharded
from .units.example import Inputs

CostFunction = Callable[[dict[str, Tensor]], Tensor]
"""Names of gates -> how open they are, (n,) float64 in [0, 1]; what that costs, a scalar, differentiable."""
WHOLE = "model"
"""What the only kind of a budget for all gates is called."""
BISECTIONS = 22
"""Of the price of a cost that is a function of the user's: it is asked for one vector at a time."""


class Wish(NamedTuple):
    """What is to be left of a model: see :class:`Budget`, whose arguments these are."""

    keep: float | Mapping[str, float]
    cost: str | CostFunction = "params"
    input_shape: Inputs | None = None


class GateKind(NamedTuple):
    """Gates that share a price.

    Attributes:
        name: the pattern that names them, or WHOLE.
        of: what the step knows of them.
    """

    name: str
    gates: tuple[HardConcreteGate, ...]
    of: Kind


def kinds_of(model: nn.Module, wish: Wish, strict: bool = True) -> list[GateKind]:
    """The kinds of gates of a wish, with their costs; without `strict` a pattern may name none.

    Raises:
        ValueError, TypeError: as :class:`Budget`, but for a share that is out of reach.
    """
    _check(wish)
    names = {gate: name for gate, (name, _) in named_gates(model).items()}
    if not names:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    _check_whole(names)
    patterns = wish.keep if isinstance(wish.keep, Mapping) else {WHOLE: wish.keep}
    chosen = matched(patterns, names, strict) if patterns is wish.keep else {WHOLE: [*names]}
    kinds = []
    for number, (name, own) in enumerate(chosen.items()):
        if own:
            kind = _kind(model, wish, float(patterns[name]), name, tuple(own), names)
            kinds.append(GateKind(name, tuple(own), kind._replace(number=number)))
    return kinds


def check_reach(kinds: Sequence[GateKind]) -> None:
    """ValueError for a share that not even closed gates leave."""
    for kind in kinds:
        floor = share_in_full(kind.of)[0]
        if kind.of.keep <= floor:
            raise ValueError(
                f"keep must be more than {floor:.4f}{_of(kind.name)}, which is left with every gate closed, "
                f"and at most 1, got {kind.of.keep!r}"
            )


def _kind(
    model: nn.Module,
    wish: Wish,
    keep: float,
    name: str,
    gates: tuple[HardConcreteGate, ...],
    names: dict[HardConcreteGate, str],
) -> Kind:
    device = gates[0].log_alpha.device
    sizes = tuple(gate.n for gate in gates)
    shifts = [gate.dist.beta * math.log(-gate.dist.gamma / gate.dist.zeta) for gate in gates]
    shift = torch.tensor(shifts, dtype=torch.float64).repeat_interleave(torch.tensor(sizes)).to(device)
    kept = reference.budget.Kept(shift, *reference.budget.ends(LIMIT, shift), LIMIT)
    values: reference.budget.Values
    if callable(wish.cost):
        values, cost, search = _Function(wish.cost, gates, names), None, (1, BISECTIONS)
    else:
        cost = cost_of(model, gates, wish.cost, wish.input_shape)
        values = evaluate = reference.budget.Terms(cost.terms.to(device))
        search = _search(evaluate.entries)
    terms = None if cost is None else cost.terms
    kind = Kind(0, keep, sizes, kept, values, terms, 0.0, 1.0, *search)
    closed, open_ = share_in_full(kind)
    if not open_ > closed:
        raise ValueError(f"cost must grow with the gates{_of(name)}, got {closed} closed and {open_} open")
    if isinstance(wish.keep, Mapping):
        return kind._replace(offset=closed, unit=open_ - closed)
    return kind._replace(unit=open_ if cost is None else cost.full)


class _Function:
    """A cost of the user's, of gates one after the other."""

    def __init__(
        self, cost: CostFunction, gates: tuple[HardConcreteGate, ...], names: dict[HardConcreteGate, str]
    ) -> None:
        self._cost, self._names = cost, names
        self._places = {}
        start = 0
        for gate in gates:
            self._places[gate] = slice(start, start + gate.n)
            start += gate.n

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim > 1:
            return torch.stack([self(part) for part in x])
        found = self._cost({name: self._of(gate, x) for gate, name in self._names.items()})
        if not isinstance(found, Tensor) or found.ndim:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"cost must return a scalar tensor, got {got}")
        return found.double()

    def _of(self, gate: HardConcreteGate, x: Tensor) -> Tensor:
        place = self._places.get(gate)
        return x.new_ones(gate.n) if place is None else x[place]


def _of(name: str) -> str:
    return "" if name == WHOLE else f" for {name!r}"


def _search(entries: int) -> tuple[int, int]:
    """Prices at once, and how often: as many as 64 MB of float64 hold, down to one interval of all rounds."""
    points = min(reference.budget.POINTS, max(2**23 // max(entries, 1), 1))
    wanted = (reference.budget.POINTS + 1) ** reference.budget.ROUNDS
    return points, math.ceil(math.log(wanted) / math.log(points + 1) - 1e-9)


def _check(wish: Wish) -> None:
    keep, cost = wish.keep, wish.cost
    if not callable(cost) and cost not in COSTS:
        raise ValueError(f"cost must be 'params', 'flops' or a function, got {cost!r}")
    shares = list(keep.values()) if isinstance(keep, Mapping) else [keep]
    if not shares:
        raise ValueError("keep must name gates, got an empty mapping")
    for share in shares:
        _checks.check_number("keep", share)
        if not 0 < share <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {share!r}")


def _check_whole(names: Mapping[HardConcreteGate, str]) -> None:
    devices = {gate.log_alpha.device for gate in names}
    if len(devices) > 1:
        raise ValueError(f"model must have its gates on one device, got {sorted(map(str, devices))}")
    for gate, name in names.items():
        if gate.log_alpha.is_meta:
            raise ValueError(f"model must hold values, got {name} on the meta device")
        if is_sharded(gate.log_alpha) or gate.log_alpha.numel() != gate.n:
            raise ValueError(
                f"model must have its gates whole, got a shard of {name}: "
                "fully_shard(model, ignored_params=l0kernels.nn.keep_gates_whole(model))"
            )


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a regular expression for the whole name, or the end of it after a dot."""
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None


def matched(
    patterns: Mapping[str, Any], names: Mapping[HardConcreteGate, str], strict: bool = True
) -> dict[str, list[HardConcreteGate]]:
    """The gates of each pattern."""
    found: dict[str, list[HardConcreteGate]] = {}
    of: dict[HardConcreteGate, str] = {}
    for pattern in patterns:
        try:
            own = [gate for gate, name in names.items() if matches(name, pattern) or gate.kind == pattern]
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
        if strict and not own:
            raise ValueError(f"pattern must name a gate, got {pattern!r}; there are {list(names.values())}")
        for gate in own:
            if gate in of:
                raise ValueError(
                    f"patterns must name each gate once, got {of[gate]!r} and {pattern!r} for {names[gate]!r}"
                )
            of[gate] = pattern
        found[pattern] = own
    return found
