"""Gates put on a budget after a step of the optimiser, at the price at which they cost what they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._calls import CostTerms

DECAY = 0.999
"""Of the second moment of the gates' gradients."""
FLOOR = 1e-2
"""Below this part of their root mean square, gradients count as that much."""
LEAST = 1e-30
"""A direction below it is none: its price would overflow."""
BELOW = 2.0**-20
"""From this part of what the slope at price 0 asks for on, prices are looked for."""
POINTS = 31
"""Prices that are tried at once."""
ROUNDS = 4
"""How often; of 60 octaves an interval of 6e-5 is left, and a line through it."""

Values = Callable[[Tensor], Tensor]
"""(..., n) shares to which gates are open -> (...) what they cost."""


class Kept(NamedTuple):
    """``x = (P(z > 0) - low) / (high - low)``: P between what it is at the two ends of the clamp.

    Attributes:
        shift: (n,) float64: ``beta * log(-gamma / zeta)`` of each gate.
        low, high: (n,) float64.
        limit: of the clamp.
    """

    shift: Tensor
    low: Tensor
    high: Tensor
    limit: float

    def __call__(self, log_alpha: Tensor) -> Tensor:
        """(..., n) -> (..., n) float64, in [0, 1]."""
        log_alpha = log_alpha.double().clamp(-self.limit, self.limit)
        x = (torch.sigmoid(log_alpha - self.shift) - self.low) / (self.high - self.low)
        return x.clamp(0, 1)

    def slope(self, log_alpha: Tensor) -> Tensor:
        """The derivative within the clamp, and at its ends the one from within."""
        p = torch.sigmoid(log_alpha.double().clamp(-self.limit, self.limit) - self.shift)
        return p * (1 - p) / (self.high - self.low)


class Sides(NamedTuple):
    """Sums of about as many entries, of a cost: (sums, entries) each, filled up with weights of 0."""

    index: Tensor  # type: ignore[assignment]
    weight: Tensor


class Terms:
    """Evaluates CostTerms for any number of gate vectors at once.

    Args:
        terms: on any device, where they are evaluated.
    """

    def __init__(self, terms: CostTerms) -> None:
        self.terms = terms
        sizes = terms.offsets.diff().tolist()
        by_size: dict[int, list[int]] = {}
        for side, size in enumerate(sizes):
            by_size.setdefault(max(size - 1, 0).bit_length(), []).append(side)
        self.sides = [_padded(terms, of) for of in by_size.values()]
        place = {side: at for at, side in enumerate(side for of in by_size.values() for side in of)}
        device = terms.first.device
        self._first, self._second = (
            torch.tensor([place[side] for side in of.tolist()], dtype=torch.int64, device=device)
            for of in (terms.first, terms.second)
        )
        self._fixed = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)

    @property
    def entries(self) -> int:
        """How many numbers one evaluation reads."""
        return self.terms.width + sum(side.index.numel() for side in self.sides)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., n) float64 -> (...): the cost of gates that are open to the shares x, differentiable."""
        terms = self.terms
        x = torch.cat((x, self._fixed.expand(*x.shape[:-1], 2)), -1)
        for atoms in terms.atoms:
            factors = x[..., atoms.index]
            values = 1 - (1 - factors).prod(-1) if atoms.is_any else factors.prod(-1)
            x = torch.cat((x, values), -1)
        total = x @ terms.linear + terms.constant
        if not self.sides:
            return total
        sums = torch.cat([(x[..., side.index] * side.weight).sum(-1) for side in self.sides], -1)
        return total + (sums[..., self._first] * sums[..., self._second]) @ terms.coefficient


def _padded(terms: CostTerms, of: Sequence[int]) -> Sides:
    bounds = [terms.offsets[side : side + 2].tolist() for side in of]
    pad = torch.nn.utils.rnn.pad_sequence
    index = pad([terms.index[a:b] for a, b in bounds], batch_first=True, padding_value=terms.n)
    return Sides(index, pad([terms.weight[a:b] for a, b in bounds], batch_first=True))


def moved(log_alpha: Tensor, direction: Tensor, price: Tensor, limit: float) -> Tensor:
    """``clamp(log_alpha - price * direction, -limit, limit)`` in float64."""
    return (log_alpha.double() - price[..., None] * direction).clamp(-limit, limit)


def direction(gradient: Tensor, second_moment: Tensor, step: Tensor) -> Tensor:
    """``q = dc/da / (sqrt(v^) + FLOOR * rms(sqrt(v^)))``, ``v^ = v / (1 - DECAY**step)``; dc/da where v is 0.

    Args:
        gradient: (n,) float64: dc/da.
        second_moment: (n,): v, the running mean of the squared gradients of the loss.
        step: (): how many gradients it is of.
    """
    unbiased = second_moment.double() / (1 - DECAY ** step.double().clamp(min=1))
    scale = unbiased.sqrt() + FLOOR * unbiased.mean().sqrt()
    q = gradient.clamp(min=0) / torch.where(scale > 0, scale, 1.0)
    return torch.where(q < LEAST, 0.0, q)


def solve(
    values: Callable[[Tensor], Tensor],
    first: Tensor,
    highest: Tensor,
    target: Tensor,
    points: int,
    rounds: int,
) -> Tensor:
    """The smallest price >= 0 at which `values`, which fall with the price, are at most `target`.

    No number is read on the host: every search takes the same steps.

    Args:
        values: (k,) prices -> (k,).
        first: (2,): values at 0, and by how much they fall there.
        highest: (): a price from which on they stay the same.
        points: so many prices are tried at once, geometrically between those that still come into question.
        rounds: so many times; then a line is drawn between the two that are left.
    """
    start, slope = first
    high, tiny = highest, torch.finfo(torch.float64).tiny
    low = ((start - target) / slope).nan_to_num(tiny, tiny, tiny).clamp(min=tiny) * BELOW
    low = torch.minimum(low, high * 0.5)
    at_low, at_high = start, values(high[None])[0]
    parts = torch.arange(1, points + 1, dtype=torch.float64, device=start.device) / (points + 1)
    for _ in range(rounds):
        prices = low * (high / low) ** parts
        found = values(prices)
        k = (found > target).sum()[None]
        lows, highs = torch.cat((low[None], prices)), torch.cat((prices, high[None]))
        at_lows, at_highs = torch.cat((at_low[None], found)), torch.cat((found, at_high[None]))
        low, high, at_low, at_high = (x.index_select(0, k)[0] for x in (lows, highs, at_lows, at_highs))
    share = ((at_low - target) / (at_low - at_high)).nan_to_num(1.0, 1.0, 1.0).clamp(0, 1)
    return torch.where((start <= target) | ~(highest > 0), 0.0, low + (high - low) * share)


def highest_price(log_alpha: Tensor, direction_: Tensor, limit: float) -> Tensor:
    """From which on every gate that moves lies at the lower end of the clamp."""
    steps = (log_alpha.double() + limit).clamp(min=0) / direction_
    return torch.where(direction_ > 0, steps, 0.0).amax()


def project(
    values: Values,
    log_alpha: Tensor,
    slope: Tensor,
    direction_: Tensor,
    kept: Kept,
    target: Tensor,
    points: int = POINTS,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """The gates on the budget: ``clamp(log_alpha - mu q)`` with the smallest mu >= 0 at which they cost at
    most `target`, or the highest that changes anything; and mu.

    Args:
        values: their cost.
        log_alpha: (n,) what the optimiser has made of them.
        slope: (n,) float64: :func:`gradient` there.
        direction_: (n,) float64, >= 0.
        kept: of log_alpha, how open.
        target: ().

    Returns:
        (n,) in the dtype of log_alpha, and () float64.
    """
    limit = kept.limit

    def at(prices: Tensor) -> Tensor:
        return values(kept(moved(log_alpha, direction_, prices, limit)))

    zero = torch.zeros((), dtype=torch.float64, device=log_alpha.device)
    first = torch.stack((at(zero[None])[0], slope.dot(direction_)))
    price = solve(at, first, highest_price(log_alpha, direction_, limit), target, points, rounds)
    return moved(log_alpha, direction_, price, limit).to(log_alpha.dtype), price


def target_at(first: Tensor, keep: float, step: Tensor, ramp_steps: float) -> Tensor:
    """``B_t = c_0 + (B - c_0) * min(1, t / ramp_steps)``."""
    share = (step.double() / ramp_steps).clamp(max=1) if ramp_steps > 0 else torch.ones_like(first)
    return first + (keep - first) * share


def gradient(values: Values, kept: Kept, log_alpha: Tensor) -> Tensor:
    """dc/dlog_alpha, (n,) float64."""
    with torch.enable_grad():
        x = kept(log_alpha.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(values(x), x)
    return slope * kept.slope(log_alpha)


def fresh_moment(second_moment: Tensor, grad: Tensor) -> Tensor:
    """``DECAY * v + (1 - DECAY) * grad**2`` in the dtype of v."""
    return DECAY * second_moment + (1 - DECAY) * grad.to(second_moment.dtype).square()


def ends(limit: float, shift: Tensor) -> tuple[Tensor, Tensor]:
    """P(z > 0) at the two ends of the clamp."""
    return torch.sigmoid(-limit - shift), torch.sigmoid(limit - shift)
