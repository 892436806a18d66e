"""What the gates of a model do: a table, a mapping, a CSV file, TensorBoard or a picture, and what is odd."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import reference
from .._gates import EVAL_MODES
from ..gates import eval_gates, sample_gates
from .cost import Cost, cost_of
from .gate import HardConcreteGate
from .names import named_gates
from .units.example import Inputs
from .units.graph import aligned

if TYPE_CHECKING:
    from .budget import Budget

UNDECIDED = (0.1, 0.9)
"""Between these a P(z > 0) is neither open nor closed."""
MANY = 0.5
"""From this share of undecided gates on there is a warning."""
FEW = 0.02
"""Up to this share of open gates a vector is about to close."""
APART = 0.02
"""By how much evaluation gates may disagree."""
STILL = 0.05
"""So near to where it began a log_alpha has not moved; they are drawn with a deviation of .01."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Writer(Protocol):
    """What takes figures, as a SummaryWriter of TensorBoard does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None, /) -> Any:
        """Takes one figure."""


@dataclass(frozen=True)
class GateReport:
    """A gate vector in a :class:`Report`. Counts are of gates.

    Attributes:
        name, layers, total: as in :class:`GateSummary`.
        expected: sum of P(z > 0), how many are open on average in train().
        sampled: how many are in one draw.
        open: how many are in eval(), in its own mode.
        paper, median, topk: in each of the three modes.
        undecided: the share with P(z > 0) between .1 and .9.
        log_alpha: its quantiles 0, .25, .5, .75, 1.
        parameters: how many the vector closes, with all other gates open.
        open_parameters: how many of these stay in eval().
        flops, open_flops: likewise; None without input_shape.
        warnings: what is odd.
    """

    name: str
    layers: tuple[str, ...]
    total: int
    expected: float
    sampled: int
    open: int
    paper: int
    median: int
    topk: int
    undecided: float
    log_alpha: tuple[float, ...]
    parameters: int
    open_parameters: int
    flops: int | None
    open_flops: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        total: with every gate open.
        expected: on average in train().
        open: in eval().
    """

    total: int
    expected: float
    open: int


@dataclass(frozen=True)
class Report:
    """What :func:`report` returns; it prints as a table.

    Attributes:
        gates: one entry for each gate vector.
        parameters: of the model, log_alpha left out.
        flops: of a forward; None without input_shape.
    """

    gates: tuple[GateReport, ...]
    parameters: Size
    flops: Size | None

    @property
    def warnings(self) -> list[str]:
        """What is odd, in words, with the names of the gates."""
        return [f"{gate.name}: {text}" for gate in self.gates for text in gate.warnings]

    def __str__(self) -> str:
        head = ("gate", "of", "open in eval()", "expected", "sampled", "undecided", "log_alpha", "parameters")
        rows: list[Sequence[str]] = [head if self.flops is None else (*head, "FLOPs")]
        for gate in self.gates:
            modes = f"{gate.open:,} ({gate.paper:,} / {gate.median:,} / {gate.topk:,})"
            alpha = " ".join(f"{value:.1f}" for value in gate.log_alpha[::2])
            cells = [gate.name, f"{gate.total:,}", modes, f"{gate.expected:,.1f}", f"{gate.sampled:,}"]
            cells += [f"{gate.undecided:.0%}", alpha, f"{gate.open_parameters:,} of {gate.parameters:,}"]
            cells += [] if gate.flops is None else [f"{gate.open_flops:,} of {gate.flops:,}"]
            rows.append(cells)
        lines = aligned(rows)
        sizes = (("parameters", self.parameters), ("FLOPs", self.flops))
        lines += ["", *(_sentence(what, size) for what, size in sizes if size is not None)]
        return "\n".join([*lines, *(f"! {text}" for text in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and mappings."""
        gates = {gate.name: _plain(asdict(gate)) for gate in self.gates}
        sizes = {"parameters": self.parameters, "flops": self.flops}
        told = {name: None if size is None else asdict(size) for name, size in sizes.items()}
        return {"gates": gates, **told, "warnings": self.warnings}

    def scalars(self) -> Iterator[tuple[str, float]]:
        """(tag, figure): shares of the model, and of each gate vector "NAME/open" and so on."""
        for name, size in (("parameters", self.parameters), ("flops", self.flops)):
            if size is not None:
                yield f"{name}/expected", size.expected / max(size.total, 1)
                yield f"{name}/open", size.open / max(size.total, 1)
        for gate in self.gates:
            for what in ("open", "expected", "sampled"):
                yield f"{gate.name}/{what}", getattr(gate, what) / gate.total
            yield f"{gate.name}/undecided", gate.undecided
            yield f"{gate.name}/log_alpha", gate.log_alpha[len(gate.log_alpha) // 2]

    def write(self, writer: Writer, step: int | None = None, prefix: str = "gates/") -> None:
        """Hands all :meth:`scalars` to a writer: TensorBoard's SummaryWriter, or anything with add_scalar."""
        for tag, value in self.scalars():
            writer.add_scalar(prefix + tag, value, step)

    def to_csv(self, path: str | Path, step: int | None = None) -> None:
        """Writes a row for each gate vector, behind those that are there.

        Raises:
            ValueError: the file has other columns.
        """
        path = Path(path)
        names = ["step", *(field.name for field in fields(GateReport))]
        new = not path.exists() or not path.stat().st_size
        if not new:
            with path.open(newline="") as file:
                found = next(csv.reader(file), [])
            if found != names:
                raise ValueError(f"path must be a file with the columns {names}, got {found}")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            if new:
                writer.writeheader()
            for gate in self.gates:
                writer.writerow({"step": "" if step is None else step, **_cells(gate)})

    def plot(self, path: str | Path) -> None:
        """Draws how many gates of each vector are open, expected and undecided, as PNG, SVG or PDF.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.4 * len(self.gates)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        at = range(len(self.gates))
        share = [[gate.open / gate.total, gate.expected / gate.total, gate.undecided] for gate in self.gates]
        axes.barh(at, [s[0] for s in share], 0.6, color="#3b6ea8", label="open in eval()")
        axes.barh(at, [s[2] for s in share], 0.2, color="#e0a030", label="undecided")
        axes.plot([s[1] for s in share], at, "k|", markersize=14, label="expected in train()")
        axes.set_yticks(at, [gate.name for gate in self.gates])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the gates")
        axes.legend(loc="lower right")
        figure.savefig(path)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _cells(gate: GateReport) -> dict[str, Any]:
    cells = {}
    for name, value in asdict(gate).items():
        joined = " ".join(map(str, value)) if name == "log_alpha" else value
        joined = "; ".join(value) if name in ("layers", "warnings") else joined
        cells[name] = "" if joined is None else joined
    return cells


def _sentence(what: str, size: Size) -> str:
    parts = (size.open / max(size.total, 1), size.expected / max(size.total, 1))
    return (
        f"{what}: {size.open:,} of {size.total:,} in eval() ({parts[0]:.1%}), "
        f"{size.expected:,.0f} expected ({parts[1]:.1%})"
    )


def report(model: nn.Module, input_shape: Inputs | None = None, *, seed: int = 0) -> Report:
    """What the gates of a model do, vector by vector, what that makes of its size, and what is odd.

    ::

        >>> print(report(model, (1, 784)))

    It warns, in words, of gates that have not moved from where they began, of a vector half of whose gates
    are neither open nor closed, of one that has closed or is about to, and of one of which the three
    evaluation gates ("paper", "median", "topk") keep shares that differ by more than two points: the model
    that is exported then depends on the mode.

    Args:
        model: any module with gates.
        input_shape: to count FLOPs, too: see :func:`expected_flops`.
        seed: of the draw that "sampled" counts; torch's generators are left alone.

    Raises:
        ValueError: no gate in the model, or (on the CPU) a NaN in a log_alpha.
    """
    names = named_gates(model)
    if not names:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    gates = [*names]
    with torch.no_grad():
        sizes = _Sizes(gates, cost_of(model, gates, "params"))
        flops = None if input_shape is None else _Sizes(gates, cost_of(model, gates, "flops", input_shape))
        found = []
        for at, (gate, (name, layers)) in enumerate(names.items()):
            of = sizes.of(at), None if flops is None else flops.of(at)
            found.append(_of_gate(gate, name, tuple(layers), seed, of))
        return Report(tuple(found), sizes.whole(), None if flops is None else flops.whole())


class _Sizes:
    """One cost of a model, whole and by gate vector."""

    def __init__(self, gates: Sequence[HardConcreteGate], cost: Cost) -> None:
        self._full = cost.full
        self._values = reference.budget.Terms(cost.terms)
        places = [0, *accumulate(gate.n for gate in gates)]
        self._open = torch.cat([(gate.eval_gates().z != 0).double().cpu() for gate in gates])
        self._p = torch.cat([_p(gate).cpu() for gate in gates])
        ones = torch.ones_like(self._p)
        cases = [ones]
        for start, stop in pairwise(places):
            closed, left = ones.clone(), ones.clone()
            closed[start:stop], left[start:stop] = 0, self._open[start:stop]
            cases += [closed, left]
        self._by_gate = [self._values(case).item() for case in cases]

    def of(self, at: int) -> tuple[int, int]:
        """What a gate vector closes, and what of it is open."""
        whole, (closed, left) = self._by_gate[0], self._by_gate[2 * at + 1 : 2 * at + 3]
        return round(whole - closed), round(left - closed)

    def whole(self) -> Size:
        """Of the model."""
        expected, open_ = self._values(self._p).item(), self._values(self._open).item()
        return Size(round(self._full), expected, round(open_))


def _p(gate: HardConcreteGate) -> Tensor:
    return gate.dist.p_open(gate.whole().detach().flatten().double())


def _of_gate(
    gate: HardConcreteGate,
    name: str,
    layers: tuple[str, ...],
    seed: int,
    sizes: tuple[tuple[int, int], tuple[int, int] | None],
) -> GateReport:
    log_alpha = gate.whole().detach().flatten()
    p = _p(gate)
    modes = {mode: int(eval_gates(log_alpha, mode, dist=gate.dist).count[0]) for mode in EVAL_MODES}
    drawn = sample_gates(log_alpha, seed=torch.tensor([seed], device=log_alpha.device), dist=gate.dist)
    at = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    (parameters, of_parameters), flops = sizes
    values = {
        "name": name,
        "layers": layers,
        "total": gate.n,
        "expected": p.sum().item(),
        "sampled": int(drawn.count[0]),
        "open": int(gate.eval_gates().count[0]),
        **modes,
        "undecided": ((p > UNDECIDED[0]) & (p < UNDECIDED[1])).double().mean().item(),
        "log_alpha": tuple(_quantiles(log_alpha.cpu().double(), at).tolist()),
        "parameters": parameters,
        "open_parameters": of_parameters,
        "flops": None if flops is None else flops[0],
        "open_flops": None if flops is None else flops[1],
    }
    return GateReport(**values, warnings=tuple(_odd(gate, log_alpha, values)))  # type: ignore[arg-type]


def _quantiles(x: Tensor, at: Tensor) -> Tensor:
    """Of sorted values the nearest below: torch.quantile takes 16 million at most."""
    return x.sort()[0][(at * (len(x) - 1)).long()]


def _odd(gate: HardConcreteGate, log_alpha: Tensor, of: dict[str, Any]) -> Iterator[str]:
    start = math.log(1 - gate.droprate_init) - math.log(gate.droprate_init)
    still = bool(((log_alpha - start).abs() < STILL).all())
    if still:
        yield (
            f"no log_alpha has moved from {start:.2f}, where droprate_init={gate.droprate_init:g} put it: "
            "do the gates train, at a rate of their own (gate_lr of parameter_groups)?"
        )
    elif of["undecided"] >= MANY:
        yield (
            f"{of['undecided']:.0%} of the gates are neither open nor closed (P(z > 0) between .1 and .9): "
            "what eval() computes may be far from what was trained"
        )
    if not of["open"]:
        yield "every evaluation gate is closed: nothing passes there"
    elif of["open"] <= FEW * of["total"]:
        yield f"{of['open']} of {of['total']} evaluation gates are open: it is about to close"
    shares = {mode: of[mode] / of["total"] for mode in EVAL_MODES}
    if max(shares.values()) - min(shares.values()) > APART:
        told = ", ".join(f"{mode} {share:.0%}" for mode, share in shares.items())
        if abs(shares["paper"] - shares["median"]) <= APART:
            why = "topk counts P(z > 0), which is .05 for a closed gate within the clamp"
        else:
            why = "the gates are not decided yet"
        yield f"evaluation gates disagree ({told}): {why}; export(keep=...) asks no mode"


class Watch:
    """Reports now and then while a model trains, in any loop.

    ::

        watch = Watch(model, every=100, csv="gates.csv", budget=budget)
        watch.attach(optimizer)         # a plain loop, Lightning, accelerate, transformers.Trainer

    Instead of :meth:`attach` a loop may call :meth:`step`. It is a callback, too,
    ``Trainer(callbacks=[watch])``: of transformers' trainer, where it adds its figures to what is logged,
    and of Lightning's, where a step is a batch, and a checkpoint holds how many there were.

    Args:
        model: with gates.
        every: so many steps lie between two reports.
        budget: whose price, target and shares are reported, too.
        writer: anything with ``add_scalar(tag, value, step)``.
        csv: a file that gets the rows of :meth:`Report.to_csv`.
        call: takes each (step, Report), ``print`` for example.
        input_shape: see :func:`report`.

    Raises:
        ValueError: no gate in the model, or every is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        budget: Budget | None = None,
        writer: Writer | None = None,
        csv: str | Path | None = None,
        call: Callable[[int, Report], Any] | None = None,
        input_shape: Inputs | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        if not named_gates(model):
            raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
        self.model, self.every, self.budget = model, every, budget
        self.writer, self.csv, self.call = writer, csv, call
        self.steps = 0
        self.last: Report | None = None
        self._input_shape = input_shape

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Has each step of `optimizer` count; its ``remove()`` ends that."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """Counts a step, and reports at every so many."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.report()

    def report(self) -> Report:
        """Reports now."""
        self.last = report(self.model, self._input_shape)
        if self.writer is not None:
            self.last.write(self.writer, self.steps)
            for tag, value in self._of_budget():
                self.writer.add_scalar(tag, value, self.steps)
        if self.csv is not None:
            self.last.to_csv(self.csv, self.steps)
        if self.call is not None:
            self.call(self.steps, self.last)
        return self.last

    def _of_budget(self) -> Iterator[tuple[str, float]]:
        if self.budget is None:
            return
        for what in ("mu", "target", "expected", "deterministic"):
            value = getattr(self.budget, what)
            for name, number in (value if isinstance(value, dict) else {"": value}).items():
                yield f"budget/{what}" + (f"/{name}" if name else ""), number

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Of transformers' callbacks: adds the figures of the whole model to what is logged."""
        if logs is None:
            return
        of_model = [
            (tag, value) for tag, value in report(self.model).scalars() if tag.startswith("parameters/")
        ]
        logs.update({tag: round(value, 4) for tag, value in (*of_model, *self._of_budget())})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Of transformers' callbacks."""
        self.step()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Of Lightning's callbacks."""
        self.step()

    @property
    def state_key(self) -> str:
        """Of Lightning's callbacks: under which a checkpoint holds their state."""
        return type(self).__qualname__

    _legacy_state_key = state_key  # Lightning asks for the key of old checkpoints, too

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting where :meth:`state_dict` was called."""
        self.steps = state["steps"]

    def __getattr__(self, name: str) -> Any:
        # The trainers call every event of every callback, the two names without "on_" are Lightning's.
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None:
    """An event that is none of ours."""
