"""How many elements of a gated model's parameters are open, and their L2 norms weighted so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..._gates import HardConcrete
from ...penalty import L2Term
from .. import ranks
from ..gate import HardConcreteGate
from .draws import Space
from .place import NAME, OPEN, GateGroups


class Sided(NamedTuple):
    """A parameter of a gated model, and the dimensions of it that have units."""

    parameter: nn.Parameter
    sides: dict[int, Space]


def hosts_of(model: nn.Module) -> list[nn.Module]:
    """The gated models in a model."""
    return [module for module in model.modules() if isinstance(module._modules.get(NAME), GateGroups)]


def sided_parameters(host: nn.Module) -> Iterator[Sided]:
    """The parameters of a gated model that have units, as they are now."""
    for name, sides in cast(GateGroups, host._modules[NAME]).places.items():
        *path, last = name.split(".")
        module: Any = host
        for part in path:  # get_submodule takes ten times as long
            module = None if module is None else module._modules.get(part)
        parameter = None if module is None else module._parameters.get(last)
        if parameter is not None:
            yield Sided(parameter, sides)


def open_counts(
    model: nn.Module, openness: Callable[[HardConcreteGate], Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Of each parameter that has units how many elements are open, a float64 scalar.

    An element is open if its row's and its column's units are; where these are of one gate, it counts once.
    """
    counts: dict[nn.Parameter, Tensor] = {}
    for host in hosts_of(model):
        gates = cast(GateGroups, host._modules[NAME])
        p = with_one(gates.p_open(openness))
        for parameter, sides in sided_parameters(host):
            labels = {dim: gates.gate_index(space, p.device) for dim, space in sides.items()}
            others = parameter.numel()
            for of in labels.values():
                others //= len(of)
            if len(labels) > 2:
                total = _product(labels, p, parameter.ndim).sum()
            elif len(labels) == 2:
                met, (rows, cols) = gates.meeting(*sides.values()), labels.values()
                total = open_pairs(p, [rows], [cols], None if met is None else met[:2].to(p.device))
            else:
                total = open_entries(p, labels.values()).sum()
            counts[parameter] = total * others
    return counts


def open_heads(gates: GateGroups, space: Space, openness: Callable[[HardConcreteGate], Tensor]) -> Tensor:
    """How many entries of a space are open, a float64 scalar."""
    p = with_one(gates.p_open(openness))
    return p[gates.gate_index(space, p.device)].sum()


def with_one(parts: list[Tensor]) -> Tensor:
    """P(open) of all gates, one after the other, in float64; behind them stands what is always open."""
    flat = [part.double().flatten() for part in parts]
    return torch.cat([*flat, flat[0].new_ones(1)])


def open_entries(p: Tensor, labels: Iterable[Tensor]) -> Tensor:
    """(n,): P(open) of each entry of a dimension.

    labels: which gates close it, as numbers in p: of each tensor, (n,), that one has to be open, or of
        (n, times) one of several.
    """
    parts = [p[of] if of.ndim == 1 else 1 - (1 - p[of]).prod(1) for of in labels]
    return torch.stack(parts).prod(0)


def open_pairs(
    p: Tensor,
    rows: Sequence[Tensor],
    cols: Sequence[Tensor],
    met: Tensor | None,
    groups: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """The sum of P(row and column are open) over the pairs of each group, each gate once.

    Args:
        rows, cols: labels, as of :func:`open_entries`; those of cols (n,).
        met: (2, m): the rows and columns that have a label in common; None: none has.
        weights: (rows, columns): P(open) of the pair itself.
    """
    row, col = open_entries(p, rows), open_entries(p, cols)
    if weights is None:
        total = row.view(groups, -1).sum(1).dot(col.view(groups, -1).sum(1))
    else:
        total = row @ weights @ col
    if met is None:
        return total
    at_row, at_col = met[:, met[0] // (len(row) // groups) == met[1] // (len(col) // groups)]
    both = col[at_col]
    for of in rows:  # an open column is one of those that keep the row open
        keeps = _common([of.view(len(of), -1)[at_row]], [other[at_col] for other in cols])
        both = torch.where(keeps, both, both * open_entries(p, [of[at_row]]))
    difference = both - row[at_row] * col[at_col]
    return total + (difference if weights is None else difference * weights[at_row, at_col]).sum()


def meeting(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> Tensor:
    """(2, m): the rows and columns that have a label in common."""
    return _common([of.view(len(of), 1, -1) for of in rows], cols).nonzero().T


def _common(rows: Sequence[Tensor], cols: Sequence[Tensor]) -> Tensor:
    """Whether labels of rows, (..., times), are among those of columns, (...)."""
    return torch.stack([(row == col[..., None]).any(-1) for row in rows for col in cols]).any(0)


def _product(labels: dict[int, Tensor], p: Tensor, ndim: int) -> Tensor:
    """P(open) of each element of a tensor of `ndim` dimensions, each gate once."""
    total, seen = p.new_ones([1] * ndim), list[Tensor]()
    for dim, of in labels.items():
        place = [1] * ndim
        place[dim] = len(of)
        of = of.view(place)
        factor = p[of]
        for other in seen:
            factor = torch.where(of == other, 1.0, factor)
        seen.append(of)
        total = total * factor
    return total


class _Odd(NamedTuple):
    """A parameter whose term is no L2Term."""

    parameter: nn.Parameter
    labels: dict[int, Tensor]


class L2Terms:
    """weight_decay / 2 * sum of P(open) theta^2 over the parameters of a gated model that have units.

    Attributes:
        terms: all of it but for what :meth:`rest` adds, with their distribution.
    """

    def __init__(self, host: nn.Module) -> None:
        self._gates = gates = cast(GateGroups, host._modules[NAME])
        self._dist = gates.gates[0].dist
        self._log_alphas = [_log_alpha(gate) for gate in gates.gates]
        if gates.l0_layers is not None:
            p = [self._dist.p_open(log_alpha) for log_alpha in self._log_alphas]
            of_layers = self._dist.p_open(_log_alpha(gates.l0_layers))
            closed = gates.closed_by_layers(p, of_layers)
            self._log_alphas = [
                a if one is before else self._dist.log_alpha_of(one)
                for a, before, one in zip(self._log_alphas, p, closed, strict=True)
            ]
        self._all: Tensor | None = None
        self._of: dict[Space, Tensor] = {}
        self.terms: list[tuple[HardConcrete, L2Term]] = []
        self._odd: list[_Odd] = []
        self._meeting: list[tuple[nn.Parameter, Tensor]] = []
        for parameter, sides in sided_parameters(host):
            self._add(parameter, sides)

    def _add(self, parameter: nn.Parameter, sides: dict[int, Space]) -> None:
        device = parameter.device
        theta: Tensor = parameter
        if len(sides) == 1 and (0 in sides or not ranks.is_sharded(parameter)):
            ((dim, space),) = sides.items()
            theta = theta if dim == 0 else theta.movedim(dim, 0)
            self.terms.append((self._dist, L2Term(theta, self._side(space), None)))
        elif sides.keys() == {0, 1}:
            self.terms.append((self._dist, L2Term(theta, self._side(sides[0]), self._side(sides[1]))))
            met = self._gates.meeting(sides[0], sides[1])
            if met is not None:
                self._meeting.append((parameter, met.to(device)))
        else:
            labels = {dim: self._gates.gate_index(space, device) for dim, space in sides.items()}
            self._odd.append(_Odd(parameter, labels))

    def _side(self, space: Space) -> Tensor:
        """log_alpha of each entry of a space."""
        found = self._of.get(space)
        if found is None:
            at = self._gates.whole_gate(space)
            if at is not None:
                found = self._log_alphas[at]
            else:
                whole = self._whole()
                found = whole.index_select(0, self._gates.gate_index(space, whole.device))
            self._of[space] = found
        return found

    def _whole(self) -> Tensor:
        if self._all is None:
            self._all = torch.cat([*self._log_alphas, self._log_alphas[0].new_full((1,), OPEN)])
        return self._all

    def rest(self, weight_decay: float) -> Tensor | None:
        """What no term has: where one gate closes rows and columns, P counts once; dimensions beyond two."""
        if not self._meeting and not self._odd:
            return None
        p = self._dist.p_open(self._whole())
        parts = []
        for parameter, (rows, cols, gates) in self._meeting:
            theta = ranks.whole(parameter)[rows, cols].to(p.dtype)
            of = p[gates]
            parts.append((theta.square().view(len(of), -1).sum(1) * (of - of * of)).sum())
        for parameter, labels in self._odd:
            square = ranks.whole(parameter).to(p.dtype).square()
            parts.append((square * _product(labels, p, parameter.ndim)).sum())
        return weight_decay / 2 * torch.stack(parts).sum()


def _log_alpha(gate: HardConcreteGate) -> Tensor:
    if gate.frozen:
        z = gate.eval_gates().z
        return torch.where(z != 0, OPEN, -OPEN)
    log_alpha = gate.whole()
    return log_alpha if log_alpha.ndim == 1 else log_alpha.flatten()
