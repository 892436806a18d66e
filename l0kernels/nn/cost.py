"""What a model costs, as a polynomial of how open its gates are: made once, evaluated in every step.

:func:`expected_l0` and :func:`expected_flops` walk through the model each time. Here the walk leaves terms:
per layer a coefficient times the product of two sums, those of the units on its two sides.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._calls import Atoms, CostTerms
from . import counts
from .conv import GatedConv
from .counts import _Sides as LayerSides
from .gate import HardConcreteGate
from .linear import L0Linear
from .steps import gate_of, is_linear, is_norm, units_in, units_out
from .times import Times, times_of
from .units.example import Inputs
from .units.place import NAME, GateGroups
from .units.sizes import Sided, hosts_of, sided_parameters

COSTS = ("params", "flops")


class Cost(NamedTuple):
    """The cost of a model as terms of some of its gates.

    Attributes:
        gates: those that it depends on; their values stand one after the other.
        terms: of the shares to which they are open.
        full: the cost of the model with every gate open, frozen ones too.
    """

    gates: tuple[HardConcreteGate, ...]
    terms: CostTerms
    full: float


def cost_of(
    model: nn.Module,
    gates: Sequence[HardConcreteGate],
    cost: str = "params",
    input_shape: Inputs | None = None,
) -> Cost:
    """The cost of `model` as terms of `gates`; every other gate is open, a frozen one as it is.

    Args:
        cost: "params", as :func:`expected_l0` counts, or "flops", as :func:`expected_flops` does.
        input_shape: of "flops", see there.

    Raises:
        ValueError: as these two.
    """
    terms = _Terms(gates)
    with torch.no_grad():
        if cost == "params":
            full = counts._l0(model, _open)
            with torch.device("cpu"):  # whatever the default is
                _add_parameters(terms, model)
        else:
            full = counts._flops(model, input_shape, _open)
            times = times_of(model, input_shape)
            with torch.device("cpu"):
                _add_flops(terms, model, times)
        with torch.device("cpu"):
            return Cost(tuple(gates), terms.made(), full.item())


def _open(gate: HardConcreteGate) -> Tensor:
    return torch.ones(gate.log_alpha.shape, dtype=torch.float64, device=gate.log_alpha.device)


def _add_parameters(terms: "_Terms", model: nn.Module) -> None:
    products = counts._products(model)
    for sides in products.values():
        _add_layer(terms, sides, 1, 1)
    of_units = _add_units(terms, model, lambda _: 1)
    counted = {part for layer in products for part in layer.modules()}
    tied = {parameter for layer in products for parameter in layer.parameters(recurse=False)}
    rest = {
        parameter: parameter.numel()
        for module in model.modules()
        if module not in counted and not isinstance(module, HardConcreteGate)
        for parameter in module.parameters(recurse=False)
        if parameter not in of_units and parameter not in tied
    }
    terms.constant += sum(rest.values())


def _add_flops(terms: "_Terms", model: nn.Module, times: Times) -> None:
    products = counts._products(model)
    others: dict[Tensor, float] = {}
    for (layer, name), n in times.of.items():
        if layer not in products:
            parameter = getattr(layer, name)
            others[parameter] = others.get(parameter, 0) + n
    of_units = _add_units(terms, model, lambda parameter: others.get(parameter, 0))
    for (gates, space), n in times.heads.items():
        terms.add(_numbers(terms, gates)[gates.gate_index(space, torch.device("cpu"))], n)
    terms.constant += times.dense + sum(n * p.numel() for p, n in others.items() if p not in of_units)
    for layer, sides in products.items():
        of_weights, of_biases = times.of[layer, "weight"], times.of[layer, "bias"]
        if of_weights or of_biases:
            _add_layer(terms, sides, of_weights, of_biases)


class _Terms:
    """Terms that grow. A unit is a number: of a gate, of what is always open or closed, or of an atom."""

    def __init__(self, gates: Sequence[HardConcreteGate]) -> None:
        self._starts: dict[HardConcreteGate, int] = {}
        self.n = 0
        for gate in gates:
            self._starts[gate] = self.n
            self.n += gate.n
        self.one, self.zero = self.n, self.n + 1
        self.constant = 0.0
        self._atoms: list[Atoms] = []
        self._width = self.n + 2
        self._linear: list[tuple[Tensor, Tensor]] = []
        self._sides: list[tuple[Tensor, Tensor]] = []
        self._known: dict[tuple[bytes, bytes], int] = {}
        self._pairs: dict[tuple[int, int], float] = {}
        self._units: dict[Any, Tensor] = {}

    def gate(self, gate: HardConcreteGate) -> Tensor:
        """(n,) the numbers of a gate vector."""
        start = self._starts.get(gate)
        if start is not None:
            return torch.arange(start, start + gate.n, device="cpu")
        if not gate.frozen:
            return torch.full((gate.n,), self.one, device="cpu")
        return torch.where(gate.eval_gates().z.cpu() != 0, self.one, self.zero)

    def product(self, factors: Tensor) -> Tensor:
        """(m, k) -> (m,): numbers of the products of units."""
        closed = (factors == self.zero).any(1)
        last = torch.iinfo(torch.int64).max
        ordered = factors.masked_fill(factors == self.one, last).sort(1)[0]
        ordered = ordered[:, (ordered != last).any(0)]  # whose sort puts the ones behind
        if not ordered.shape[1]:
            found = torch.full((len(factors),), self.one, device="cpu")
        else:
            found = ordered[:, 0].masked_fill(ordered[:, 0] == last, self.one)
            several = (ordered[:, 1:] != last).any(1) & ~closed
            if several.any():
                found[several] = self._atom(ordered[several].masked_fill(ordered[several] == last, self.one))
        return found.masked_fill(closed, self.zero)

    def any(self, factors: Tensor) -> Tensor:
        """(m, k) -> (m,): numbers of what is open where one of k units is."""
        found = torch.full((len(factors),), self.zero, device="cpu")
        open_ = (factors == self.one).any(1)
        several = (factors != self.zero).any(1) & ~open_
        if several.any():
            found[several] = self._atom(factors[several], is_any=True)
        return found.masked_fill(open_, self.one)

    def _atom(self, factors: Tensor, is_any: bool = False) -> Tensor:
        index, place = factors.unique(dim=0, return_inverse=True)
        self._atoms.append(Atoms(is_any, index))
        self._width += len(index)
        return self._width - len(index) + place

    def units(self, gates: Sequence[HardConcreteGate], n: int, halves: bool = False) -> Tensor:
        """(n, gates): the units that all of `gates` close, a column for each gate; see `steps.gate_of`."""
        key = tuple(gates), n, halves
        if key not in self._units:
            columns = [self._column(gate, n, halves) for gate in gates]
            self._units[key] = (
                torch.stack(columns, 1) if columns else torch.empty(n, 0, dtype=torch.int64, device="cpu")
            )
        return self._units[key]

    def _column(self, gate: HardConcreteGate, n: int, halves: bool) -> Tensor:
        of = self.gate(gate)[gate_of(gate.n, n, halves)]
        return of if of.ndim == 1 else self.any(of)

    def add(self, units: Tensor, scale: float | Tensor) -> None:
        """scale * sum of units."""
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(units))
        self.constant += scales[units == self.one].sum().item()
        free = (units != self.one) & (units != self.zero)
        if free.any():
            self._linear.append((units[free], scales[free]))

    def add_product(self, rows: Tensor, cols: Tensor, scale: float) -> None:
        """scale * (sum of rows) * (sum of cols)."""
        for one, other in ((rows, cols), (cols, rows)):
            fixed = one[(one == self.one) | (one == self.zero)]
            if len(fixed) == len(one):
                self.add(other, scale * int((fixed == self.one).sum()))
                return
        pair = tuple(sorted((self._side(rows), self._side(cols))))
        self._pairs[pair] = self._pairs.get(pair, 0.0) + scale  # type: ignore[index, arg-type]

    def _side(self, units: Tensor) -> int:
        index, times = units[units != self.zero].unique(return_counts=True)
        key = index.numpy().tobytes(), times.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self._sides)
            self._sides.append((index, times.double()))
        return self._known[key]

    def made(self) -> CostTerms:
        """What has been added."""
        linear = torch.zeros(self._width, dtype=torch.float64, device="cpu")
        for units, scales in self._linear:
            linear.index_add_(0, units, scales)
        empty = torch.empty(0, device="cpu")
        sizes = [0, *(len(index) for index, _ in self._sides)]
        pairs = torch.tensor([*self._pairs], dtype=torch.int64, device="cpu").view(-1, 2)
        return CostTerms(
            self.n,
            tuple(self._atoms),
            self.constant,
            linear,
            torch.tensor(sizes, device="cpu").cumsum(0),
            torch.cat([empty.long(), *(index for index, _ in self._sides)]),
            torch.cat([empty.double(), *(weight for _, weight in self._sides)]),
            pairs[:, 0].contiguous(),
            pairs[:, 1].contiguous(),
            torch.tensor([*self._pairs.values()], dtype=torch.float64, device="cpu"),
        )


def _add_layer(terms: _Terms, sides: LayerSides, of_weights: float, of_biases: float) -> None:
    """The weights and biases of one layer, each element so many times, as `counts._count` counts them."""
    layer: Any = sides.layer
    n_in, n_out = units_in(layer), units_out(layer)
    rows = terms.units(sides.out_gates, n_out, sides.halves)
    outs = terms.product(rows)
    if is_norm(layer):
        terms.add(outs, of_weights * (layer.weight is not None) + of_biases * (layer.bias is not None))
        return
    if layer.bias is not None:
        terms.add(outs, of_biases)
    cols = terms.units(sides.in_gates, n_in)
    groups, taps = (1, 1) if is_linear(layer) else (layer.groups, layer.weight.shape[2:].numel())
    own = _own(terms, layer)
    per_out, per_in = n_out // groups, n_in // groups
    if own is not None:
        at_out, at_in, of_gates = own
        terms.add(_joint(terms, sides, rows, cols, at_out, at_in, of_gates), of_weights)
    elif groups > 1 and min(per_out, per_in) == 1:
        at_out = torch.arange(n_out, device="cpu").repeat_interleave(per_in)
        at_in = (
            torch.arange(n_in, device="cpu").view(groups, 1, per_in).expand(groups, per_out, per_in).flatten()
        )
        terms.add(_joint(terms, sides, rows, cols, at_out, at_in), of_weights * taps)
    else:
        ins = terms.product(cols).view(groups, -1)
        for of_outs, of_ins in zip(outs.view(groups, -1), ins, strict=True):
            terms.add_product(of_outs, of_ins, of_weights * taps)
        if not set(sides.in_gates).isdisjoint(sides.out_gates):
            at_out, at_in = _meets(sides, n_in, n_out, groups).nonzero(as_tuple=True)
            apart = terms.product(torch.cat((rows[at_out], cols[at_in]), 1))
            terms.add(_joint(terms, sides, rows, cols, at_out, at_in), of_weights * taps)
            terms.add(apart, -of_weights * taps)


def _joint(
    terms: _Terms,
    sides: LayerSides,
    rows: Tensor,
    cols: Tensor,
    at_out: Tensor,
    at_in: Tensor,
    *more: Tensor,
) -> Tensor:
    """Units that are open where output and input of each pair are; a gate that is both counts once."""
    of_rows = rows[at_out]
    for column, gate in enumerate(sides.out_gates):
        if gate in sides.in_gates:  # an open input is one of those that keep the output open
            of_rows[_is_met(sides, gate, at_out, at_in), column] = terms.one
    return terms.product(torch.cat((of_rows, cols[at_in], *(unit[:, None] for unit in more)), 1))


def _is_met(sides: LayerSides, gate: HardConcreteGate, at_out: Tensor, at_in: Tensor) -> Tensor:
    """Whether of a vector on both sides one gate closes output and input of each pair."""
    outs = gate_of(gate.n, units_out(sides.layer), sides.halves)[at_out]
    ins = gate_of(gate.n, units_in(sides.layer))[at_in]
    return (outs.view(len(at_out), -1) == ins[:, None]).any(1)


def _meets(sides: LayerSides, n_in: int, n_out: int, groups: int) -> Tensor:
    """(out, in): where one gate closes both."""
    outs = torch.arange(n_out, device="cpu").repeat_interleave(n_in)
    ins = torch.arange(n_in, device="cpu").repeat(n_out)
    meets = torch.zeros(n_out * n_in, dtype=torch.bool, device="cpu")
    for gate in sides.in_gates:
        if gate in sides.out_gates:
            meets |= _is_met(sides, gate, outs, ins)
    return (meets & (outs // (n_out // groups) == ins // (n_in // groups))).view(n_out, n_in)


def _own(terms: _Terms, layer: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Output, input and gate of each weight, where there are gates per weight or per block."""
    gate = layer.weight_gate if isinstance(layer, L0Linear | GatedConv) else None
    if gate is None:
        return None
    if isinstance(layer, L0Linear):
        of = layer.spread(terms.gate(gate))
        outs, ins = torch.meshgrid(*map(torch.arange, of.shape), indexing="ij")
        return outs.flatten(), ins.flatten(), of.flatten()
    of = terms.gate(gate).view(layer.weight.shape).flatten(2)
    first, second, _ = of.shape
    at_first = torch.arange(first, device="cpu").view(-1, 1, 1).expand(of.shape).flatten()
    at_second = torch.arange(second, device="cpu").view(-1, 1).expand(of.shape).flatten()
    group = at_first // (first // layer.groups)
    inner = group * second + at_second
    return (inner, at_first, of.flatten()) if layer.transposed else (at_first, inner, of.flatten())


def _add_units(
    terms: _Terms, model: nn.Module, times: Callable[[nn.Parameter], float]
) -> Mapping[nn.Parameter, object]:
    """The parameters of what :func:`gate_` has gated, each so many times; see `units.sizes.open_counts`."""
    found: dict[nn.Parameter, tuple[GateGroups, Sided]] = {}
    for host in hosts_of(model):
        gates = cast(GateGroups, host._modules[NAME])
        found |= {sided.parameter: (gates, sided) for sided in sided_parameters(host)}
    for parameter, (gates, sided) in found.items():
        if times(parameter):
            _add_sided(terms, gates, sided, times(parameter))
    return found


def _add_sided(terms: _Terms, gates: GateGroups, sided: Sided, times: float) -> None:
    numbers = _numbers(terms, gates)
    labels = [gates.gate_index(space, torch.device("cpu")) for space in sided.sides.values()]
    others = sided.parameter.numel()
    for of in labels:
        others //= len(of)
    scale = times * others
    if len(labels) == 1:
        terms.add(numbers[labels[0]], scale)
    elif len(labels) == 2:
        terms.add_product(numbers[labels[0]], numbers[labels[1]], scale)
        meets = torch.stack([torch.bincount(of, minlength=len(numbers)) for of in labels]).prod(0)[:-1]
        both = numbers[:-1][meets > 0]
        meets = scale * meets[meets > 0].double()
        terms.add(both, meets)
        terms.add(terms.product(torch.stack((both, both), 1)), -meets)
    else:
        terms.add(_elements(terms, numbers, labels), scale)


def _numbers(terms: _Terms, gates: GateGroups) -> Tensor:
    """Those of all gates of a gated model; behind them that of what is always open."""
    numbers = [terms.gate(gate) for gate in gates.gates]
    if gates.l0_layers is not None:
        layers = terms.gate(gates.l0_layers)
        numbers = [
            of if at is None else terms.product(torch.stack((of, layers[at].expand_as(of)), 1))
            for of, at in zip(numbers, gates.layered, strict=True)
        ]
    return torch.cat([*numbers, torch.tensor([terms.one], device="cpu")])


def _elements(terms: _Terms, numbers: Tensor, labels: list[Tensor]) -> Tensor:
    """The units of each element of a parameter of more than two sides, each gate once."""
    rows = torch.cartesian_prod(*labels).sort(1)[0]
    again = rows[:, 1:] == rows[:, :-1]
    rows[:, 1:] = rows[:, 1:].masked_fill(again, len(numbers) - 1)
    return terms.product(numbers[rows])
