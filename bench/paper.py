"""Trains the nets of the paper's table of MNIST (Louizos, Welling & Kingma, ICLR 2018, table 1) by its
recipe: LeNet-300-100 and LeNet-5-Caffe, 200 epochs, batches of 100, Adam at 1e-3 for weights and gates alike,
errors of an exponential moving average of .999. Then the same nets with nn.Budget instead of a penalty, each
gate vector towards the number of units that the paper's net has, in fewer epochs and with gates at .02: their
last error is that of the net cut to these numbers. One row a run in bench/results/accuracy/paper.csv, one an
epoch in paper-epochs.csv. Hours: a run is saved after each epoch and goes on from there; those that have a
row are not run again."""

import argparse
import copy
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cli
import torch
from documents import header, line
from rows import RESULTS, Row, append, commit, cpu_name, read
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l0kernels as l0

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import data  # noqa: E402
import files  # noqa: E402
import train_lenet5  # noqa: E402
import train_lenet300  # noqa: E402
import trainer  # noqa: E402

BATCH, RATE, AVERAGE = 100, 1e-3, 0.999
GATE_RATE = 0.02
"""Of gates under a budget."""
BUDGET = "budget"
"""What a row has in the place of lambdas if there are none."""
TIMED = 10
"""Steps of each epoch for which the same net dense, and with masks, takes a step beside."""
PATH = RESULTS / "accuracy" / "paper.csv"
COMMON = ("date", "commit", "device", "torch")
KEY = ("net", "lambdas", "seed", "epochs")
FIELDS = (
    *(*COMMON, *KEY, "data", "open", "last_error", "best_error", "best_epoch", "expected_flops"),
    *("seconds", "dense_seconds", "masked_seconds"),
)
"""Units that are open at the end, errors of the test set, expected FLOPs as a share of the dense net's, and
processor seconds of all steps: of ours as they were, of the others TIMED steps an epoch times as many."""
EPOCH_FIELDS = (*KEY, "epoch", "error", "expected_flops", "step_ms", "dense_ms", "masked_ms")


class Setting(NamedTuple):
    """A line of the table.

    Attributes:
        example: the net, as the examples build it.
        lambdas: of each gate vector; none: a budget.
        open, error: what the paper's table has.
        epochs: how long it is trained.
    """

    example: trainer.Example
    lambdas: tuple[float, ...]
    open: str
    error: float
    epochs: int = 200

    @property
    def told(self) -> str:
        """Its lambdas, for a row."""
        return " ".join(f"{value:g}" for value in self.lambdas) or BUDGET

    def gated(self) -> nn.Module:
        return self.example.gated(self.lambdas or (0.0,) * len(self.example.units))

    def keep(self, model: nn.Module) -> dict[str, float] | None:
        """The share of each gate vector that the paper's net has; None: no budget."""
        if self.lambdas:
            return None
        units = l0.nn.open_units(model)
        sizes = map(int, self.open.split("-"))
        return {name: size / of.total for (name, of), size in zip(units.items(), sizes, strict=True)}


LENET300, LENET5 = train_lenet300.EXAMPLE, train_lenet5.EXAMPLE
SETTINGS = {
    "lenet300": Setting(LENET300, (0.1, 0.1, 0.1), "219-214-100", 1.4),
    "lenet300-apart": Setting(LENET300, (0.1, 0.4, 4.0), "266-88-33", 1.8),
    "lenet5": Setting(LENET5, (0.1, 0.1, 0.1, 0.1), "20-25-45-462", 0.9),
    "lenet5-apart": Setting(LENET5, (10.0, 0.5, 0.1, 10.0), "9-18-65-25", 1.0),
    "lenet300-budget": Setting(LENET300, (), "219-214-100", 1.4, 60),
    "lenet300-apart-budget": Setting(LENET300, (), "266-88-33", 1.8, 60),
    "lenet5-budget": Setting(LENET5, (), "20-25-45-462", 0.9, 60),
    "lenet5-apart-budget": Setting(LENET5, (), "9-18-65-25", 1.0, 60),
}
"""One lambda for all, and one for each; those of LeNet-300-100 are ours, for want of the paper's."""


class Learner:
    """A net and its optimiser.

    Args:
        examples: N, by which the penalty is divided; None: no penalty.
        backend: that computes it, None: the default one.
        budget: what the gates end on in place of the penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: int | None = None,
        backend: str | None = None,
        budget: l0.nn.Budget | None = None,
    ) -> None:
        self.model, self.budget = model, budget
        self._examples, self._backend = examples, backend
        gate_rate = RATE if budget is None else GATE_RATE
        groups = l0.nn.parameter_groups(model, gate_lr=gate_rate) if examples else model.parameters()
        self.optimizer = torch.optim.Adam(groups, lr=RATE, fused=True)
        if budget is not None:
            budget.attach(self.optimizer)
        elif examples:
            l0.nn.clamp_after_step(self.optimizer, model)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Processor seconds of a step."""
        begin = time.process_time()
        if self._backend is None:
            self._step(x, y)
        else:
            with l0.use_backend(self._backend):
                self._step(x, y)
        return time.process_time() - begin

    def _step(self, x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(self.model(x), y)
        if self._examples and self.budget is None:
            loss = loss + l0.nn.penalty(self.model) / self._examples
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Run:
    """A net between two epochs, beside it the dense and the masked one that are only timed.

    Attributes:
        keep: of each gate vector under a budget, None without one.
    """

    def __init__(self, setting: Setting, of: data.Data, seed: int, epochs: int) -> None:
        example, examples = setting.example, len(of.train_y)
        name, train_x, train_y, test_x, test_y = of
        self.data = data.Data(name, example.shaped(train_x), train_y, example.shaped(test_x), test_y)
        self.order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = setting.gated()
        self.keep, budget = setting.keep(model), None
        if self.keep is not None:
            budget = l0.nn.Budget(model, self.keep, steps=epochs * (examples // BATCH))
        self.ours = Learner(model, examples, budget=budget)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
        self.beside = {
            "dense": Learner(example.dense()),
            "masked": Learner(copy.deepcopy(model), examples, "reference"),
        }
        self.shape = (1, *self.data.train_x.shape[1:])
        self.dense_flops = l0.nn.eval_flops(self.beside["dense"].model, self.shape)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def epoch(self) -> dict[str, float]:
        """Trains on every example once, in an order of its own."""
        x, y = self.data.train_x, self.data.train_y
        order = torch.randperm(len(y), generator=self.order)
        batches = [*order[: len(y) // BATCH * BATCH].split(BATCH)]
        times: dict[str, list[float]] = {"ours": [], "dense": [], "masked": []}
        every = max(1, len(batches) // TIMED)
        for i, batch in enumerate(batches):
            one = x.index_select(0, batch), y.index_select(0, batch)
            times["ours"].append(self.ours.step(*one))
            self.average.update_parameters(self.ours.model)
            if i % every == 0:
                for name, learner in self.beside.items():
                    times[name].append(learner.step(*one))
        self.seconds += sum(times["ours"])
        net = self.average.module
        flops = l0.nn.expected_flops(self.ours.model, self.shape).item() / self.dense_flops
        ms = {name: 1e3 * median(found) for name, found in times.items()}
        row = {
            "epoch": len(self.history) + 1.0,
            "error": self.error(net),
            "expected_flops": flops,
            "step_ms": ms["ours"],
            "dense_ms": ms["dense"],
            "masked_ms": ms["masked"],
        }
        self.history.append(row)
        return row

    @torch.no_grad()
    def error(self, net: nn.Module) -> float:
        net.eval()
        found = [net(part).argmax(1) for part in self.data.test_x.split(500)]
        return (torch.cat(found) != self.data.test_y).double().mean().item()

    def open(self) -> str:
        """The open units of the averaged net."""
        return "-".join(str(units.open) for units in l0.nn.open_units(self.average.module.eval()).values())

    def cut(self) -> tuple[str, float]:
        """Units that the averaged net has when it is cut to the budget, and its error."""
        net = l0.nn.export(self.average.module.eval(), keep=self.keep)
        sizes = [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)]
        sizes += [layer.in_features for layer in net.modules() if isinstance(layer, nn.Linear)]
        return "-".join(map(str, sizes)), self.error(net)

    def state(self) -> dict[str, Any]:
        learners = {"ours": self.ours, **self.beside}
        return {
            "models": {name: learner.model.state_dict() for name, learner in learners.items()},
            "optimizers": {name: learner.optimizer.state_dict() for name, learner in learners.items()},
            "average": self.average.state_dict(),
            "budget": None if self.ours.budget is None else self.ours.budget.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        for name, learner in {"ours": self.ours, **self.beside}.items():
            learner.model.load_state_dict(state["models"][name])
            learner.optimizer.load_state_dict(state["optimizers"][name])
        self.average.load_state_dict(state["average"])
        if self.ours.budget is not None:
            self.ours.budget.load_state_dict(state["budget"])
        self.history, self.seconds = state["history"], state["seconds"]
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])


def train(run: Run, epochs: int, checkpoint: Path, name: str) -> None:
    if checkpoint.exists():
        run.load(torch.load(checkpoint, weights_only=True))
    while len(run.history) < epochs:
        row = run.epoch()
        content = io.BytesIO()
        torch.save(run.state(), content)
        files.write_whole(checkpoint, content.getbuffer())
        times = f"{row['step_ms']:.2f} ms of {row['dense_ms']:.2f} dense, {row['masked_ms']:.2f} masked"
        print(
            f"{name}, epoch {row['epoch']:.0f}: error {row['error']:.2%}, open {run.open()}, {times}",
            flush=True,
        )


def result(run: Run, steps: int) -> Row:
    """The fields of a finished run behind its key."""
    errors = [row["error"] for row in run.history]
    best = min(range(len(errors)), key=errors.__getitem__)
    seconds = {
        name: sum(row[f"{name}_ms"] for row in run.history) * steps / 1e3 for name in ("dense", "masked")
    }
    is_open, last = (run.open(), errors[-1]) if run.keep is None else run.cut()
    # Before a budget is met, an error is of a larger net.
    chosen = (f"{errors[best]:.4f}", str(best + 1)) if run.keep is None else ("", "")
    return {
        "data": run.data.name,
        "open": is_open,
        "last_error": f"{last:.4f}",
        "best_error": chosen[0],
        "best_epoch": chosen[1],
        "expected_flops": f"{run.history[-1]['expected_flops']:.4f}",
        "seconds": f"{run.seconds:.1f}",
        **{f"{name}_seconds": f"{value:.1f}" for name, value in seconds.items()},
    }


def brief(lambdas: str) -> str:
    """Of a row, for people: one number where all gate vectors have the same."""
    each = lambdas.split()
    return each[0] if len(set(each)) == 1 else "-".join(each)


def table(rows: Sequence[Row]) -> str:
    """Each run beside the paper's line, by net and seed."""
    lines = header(
        *("net", "lambda", "seed", "epochs", "units at the end", "paper's", "error, last / best", "paper's"),
        *("s dense", "s masked", "s ours"),
    )
    order = list(SETTINGS)
    for row in sorted(rows, key=lambda row: (order.index(row["net"]), row["lambdas"], int(row["seed"]))):
        setting = SETTINGS[row["net"]]
        errors = " / ".join(
            f"{100 * float(row[name]):.2f}" for name in ("last_error", "best_error") if row[name]
        )
        times = [f"{float(row[name]):.0f}" for name in ("dense_seconds", "masked_seconds", "seconds")]
        found = (
            setting.example.title,
            brief(row["lambdas"]),
            row["seed"],
            row["epochs"],
            row["open"],
            setting.open,
        )
        lines.append(line(*found, f"{errors} %", f"{setting.error} %", *times))
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Of the runs on all of MNIST in bench/results, with where they come from."""
    rows = [row for row in read(PATH) if row["data"] == "mnist"]
    machines = {f"{row['device']}, torch {row['torch']}" for row in rows}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    last = max(row["date"] for row in rows)
    origin = (
        f"{' and '.join(sorted(machines))}, one thread, commit {commits}, {last}. "
        'Measured by `make paper ARGS="--data DIR"`.'
    )
    return {"paper": f"{table(rows)}\n\n{origin}"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__, "paper.py --data MNIST --net lenet300 --seeds 0")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four idx .gz files; default: digits")
    parser.add_argument("--net", choices=list(SETTINGS), nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=trainer.whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lambdas", type=float, nargs="+", help="others than those of --net, one a gate vector"
    )
    parser.add_argument("--epochs", type=trainer.whole(1), help="default 200, under a budget 60")
    parser.add_argument("--work", type=Path, default=Path("runs", "paper"), help="folder of the checkpoints")
    parser.add_argument("--csv", type=Path, default=PATH, help="default bench/results/accuracy/paper.csv")
    args = parser.parse_args(argv)
    for net in args.net if args.lambdas else ():
        expected = len(SETTINGS[net].example.units)
        if len(args.lambdas) != expected or not SETTINGS[net].lambdas:
            needs = f"{expected} for {net}" if SETTINGS[net].lambdas else f"none for {net}"
            parser.error(f"--lambdas must be {needs}, got {len(args.lambdas)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    of = data.mnist(args.data) if args.data else data.mnist5k()
    done = read(args.csv) if args.csv.exists() else []
    args.work.mkdir(parents=True, exist_ok=True)
    begun = commit()
    for seed in args.seeds:
        for net in args.net:
            setting = SETTINGS[net]
            if args.lambdas:
                setting = setting._replace(lambdas=tuple(args.lambdas))
            epochs = args.epochs or setting.epochs
            key = {"net": net, "lambdas": setting.told, "seed": str(seed), "epochs": str(epochs)}
            if any(key.items() <= row.items() and row["data"] == of.name for row in done):
                continue
            with trainer.denormals_flushed():
                run = Run(setting, of, seed, epochs)
                own = "-".join([net, *(f"{value:g}" for value in args.lambdas or ())])
                checkpoint = args.work / f"{own}-{of.name}-{epochs}-{seed}.pt"
                train(run, epochs, checkpoint, f"{own}, seed {seed}")
            common = dict(
                zip(COMMON, (time.strftime("%Y-%m-%d"), begun, cpu_name(), torch.__version__), strict=True)
            )
            row = common | key | result(run, len(of.train_y) // BATCH)
            append(args.csv, [row], FIELDS)
            each = [key | {name: f"{value:.5g}" for name, value in one.items()} for one in run.history]
            append(args.csv.with_stem(f"{args.csv.stem}-epochs"), each, EPOCH_FIELDS)
            done.append(row)
    print(table([row for row in done if row["data"] == of.name]))
    return 0


if __name__ == "__main__":
    cli.run(main)
