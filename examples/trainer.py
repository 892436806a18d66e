"""What the examples share: training with gates and, beside it, of the same net dense; checkpoints and export.

Adam, batches of 100, loss = cross-entropy + sum_l lambda_l / N * sum_g |g| P(z_g > 0) with N training
examples, log_alpha clamped to +-log(100) after each step, and for evaluation a bias-corrected moving average
(.999) of the parameters (Louizos, Welling & Kingma, ICLR 2018, section 4.1).
"""

import argparse
import copy
import math
import pickle
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import data
import report
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from l0kernels import nn

EMA_DECAY = 0.999
# Blocks keep each net's weights in the caches; the first steps after a change of nets are not counted.
GATED_BLOCK, DENSE_BLOCK, UNCOUNTED = 100, 20, 4


Penalty = Callable[[torch.nn.Module], Tensor]


class Recipe(NamedTuple):
    epochs: int
    lambdas: tuple[float, ...]  # one per gate vector
    threads: int | None  # None: torch's own choice
    gates_lr: float | None = None  # of log_alpha; None: that of the weights


@dataclass(frozen=True)
class Example:
    """What the training of one net adds to this module.

    Attributes:
        title: of the net, for people; `file` is the name of its export.
        units: what each gate vector closes.
        recipes: by the name of the data, "digits" and "mnist".
        droprates: one per gate vector.
        sizes: the number of units of each gate vector, and of outputs, for examples of this shape.
        shaped: makes of the flat images those that the net takes.
        gated: the net with these droprates and lambdas; dense: the same in torch.nn.
        loaded: the plain net of a saved export (its sizes and state).
    """

    title: str
    file: str
    units: tuple[str, ...]
    recipes: Mapping[str, Recipe]
    droprates: tuple[float, ...]
    sizes: Callable[[int], tuple[int, ...]]
    shaped: Callable[[Tensor], Tensor]
    gated: Callable[[Sequence[int], Sequence[float], Sequence[float]], torch.nn.Module]
    dense: Callable[[Sequence[int]], torch.nn.Module]
    loaded: Callable[[Sequence[int], dict[str, Tensor]], torch.nn.Module]


@dataclass(frozen=True)
class Config:
    """What decides the numbers of a run; a checkpoint is resumed only under an equal one."""

    data: str
    sizes: tuple[int, ...]
    batch_size: int
    lr: float
    gates_lr: float
    lambdas: tuple[float, ...]
    droprates: tuple[float, ...]
    ema_decay: float
    seed: int
    device: str

    def refuse_other(self, saved: dict[str, Any], path: Path) -> None:
        for field in fields(self):
            ours, theirs = getattr(self, field.name), saved.get(field.name)
            if ours != theirs:
                raise ValueError(f"{path}: cannot resume: {field.name} was {theirs!r} there, got {ours!r}")


class Learner:
    """A net, its Adam and the moving average of its parameters; `step` is the training step that is timed."""

    def __init__(self, model: torch.nn.Module, config: Config, penalty: Penalty | None = None) -> None:
        self.model = model
        self.penalty = penalty
        groups: list[dict[str, Any]] = [{"params": nn.weight_parameters(model)}]
        if penalty is not None:
            groups.append({"params": nn.gate_parameters(model), "lr": config.gates_lr})
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        self._decay = config.ema_decay
        self._source: list[Tensor] = [p.detach() for p in model.parameters()]
        self._target: list[Tensor] = list(self.average.parameters())

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(x), y)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # ema / (1 - decay^t), the bias-corrected average, has this recursion of its own.
        self.updates += 1
        torch._foreach_lerp_(self._target, self._source, (1 - self._decay) / (1 - self._decay**self.updates))
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "updates": self.updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.updates = state["updates"]


class StepTimer:
    """The median time between marks; on a GPU marks are events in its stream, so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[list[Any]] = []

    def start(self) -> None:
        self._blocks.append([])
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._blocks[-1].append(event)
        else:
            self._blocks[-1].append(time.perf_counter())

    def median_ms(self) -> float:
        laps = [
            lap for block in self._blocks for lap in list(pairwise(block))[min(UNCOUNTED, len(block) - 2) :]
        ]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return median(start.elapsed_time(end) for start, end in laps)
        return 1e3 * median(end - start for start, end in laps)


class Run:
    """A training run between two epochs: the nets, the random streams and the figures so far."""

    def __init__(self, example: Example, config: Config, dataset: data.Data, *, time_dense: bool) -> None:
        self.example = example
        self.config = config
        self.device = torch.device(config.device)
        name, train_x, train_y, test_x, test_y = dataset
        tensors = example.shaped(train_x), train_y, example.shaped(test_x), test_y
        self.data = data.Data(name, *(tensor.to(self.device) for tensor in tensors))
        self.shape = (1, *self.data.train_x.shape[1:])
        # What does not fill a batch is left out, other examples in each epoch.
        self.steps = len(dataset.train_y) // config.batch_size
        self.history: list[report.Epoch] = []
        # Before the seed is set: with or without the dense net the gated one sees the same random numbers.
        dense = example.dense(config.sizes)
        self.dense_flops = nn.eval_flops(dense, self.shape)
        self.dense = Learner(dense.to(self.device), config) if time_dense else None
        torch.manual_seed(config.seed)
        self.order = torch.Generator().manual_seed(config.seed)
        lams = [lam / len(dataset.train_y) for lam in config.lambdas]
        gated_net = example.gated(config.sizes, config.droprates, lams)
        self.gated = Learner(gated_net.to(self.device), config, nn.penalty)
        nn.clamp_after_step(self.gated.optimizer, gated_net)

    def epoch(self, on_steps: Callable[[int], object]) -> report.Epoch:
        """Trains one epoch; calls `on_steps` with the number of steps just done."""
        order = torch.randperm(len(self.data.train_y), generator=self.order)[
            : self.steps * self.config.batch_size
        ]
        batches = order.to(self.device).view(self.steps, -1).unbind()
        total = torch.zeros((), device=self.device)
        gated_timer, dense_timer = StepTimer(self.device), StepTimer(self.device)
        for start in range(0, self.steps, GATED_BLOCK):
            block = batches[start : start + GATED_BLOCK]
            self._block(self.gated, block, gated_timer, total)
            if self.dense is not None:
                self._block(self.dense, block[:DENSE_BLOCK], dense_timer, torch.zeros_like(total))
            on_steps(len(block))
        row = self._row(total.item() / self.steps, gated_timer, dense_timer)
        self.history.append(row)
        return row

    def _block(self, learner: Learner, batches: Sequence[Tensor], timer: StepTimer, total: Tensor) -> None:
        x, y = self.data.train_x, self.data.train_y
        timer.start()
        for batch in batches:
            total += learner.step(x.index_select(0, batch), y.index_select(0, batch))
            timer.mark()

    def _row(self, loss: float, gated_timer: StepTimer, dense_timer: StepTimer) -> report.Epoch:
        epoch = len(self.history) + 1
        if not math.isfinite(loss):
            raise ValueError(
                f"--lr: expected a finite training loss, got {loss} in epoch {epoch}; try a smaller one"
            )
        average = self.gated.average
        wrong = predict(average, self.data.test_x).argmax(1) != self.data.test_y
        return report.Epoch(
            epoch=epoch,
            loss=loss,
            test_error=wrong.double().mean().item(),
            open_units=tuple(units.open for units in nn.open_units(average).values()),
            expected_flops=nn.expected_flops(self.gated.model, self.shape).item() / self.dense_flops,
            actual_flops=nn.eval_flops(average, self.shape) / self.dense_flops,
            step_ms=gated_timer.median_ms(),
            dense_ms=None if self.dense is None else dense_timer.median_ms(),
        )

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "gated": self.gated.state(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [vars(row) for row in self.history],
        }

    def save(self, path: Path) -> None:
        report.write_whole(path, lambda temporary: torch.save(self.state(), temporary))

    def load(self, path: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged, or of a run with another configuration (the message names the field).
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a checkpoint to resume from, got none")
        try:
            # A cut file is no zip archive any more.
            state = (
                torch.load(path, map_location="cpu", weights_only=True) if zipfile.is_zipfile(path) else None
            )
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: expected a checkpoint of this example, got: {error}") from error
        if not isinstance(state, dict) or not self.state().keys() <= state.keys():
            raise ValueError(f"{path}: expected a checkpoint of this example, got a damaged or another file")
        self.config.refuse_other(state["config"], path)
        self.gated.load(state["gated"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.history = [report.Epoch(**row) for row in state["history"]]


@torch.no_grad()
def predict(net: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(part) for part in x.split(2000)])


@contextmanager
def without_tf32() -> Iterator[None]:
    """cuDNN's convolutions in float32 as written: torch lets them round what they multiply to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Adam's averages of weights long unused decay into denormal numbers, which processors are slow at.

    A thread inherits the setting when it starts: those that torch starts in here keep it, older ones lack it.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def parse_args(example: Example, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Train a {example.title} with hard-concrete gates on {', '.join(example.units)}.",
        epilog=f"Defaults on the digits: {example.recipes['digits']}; on MNIST: {example.recipes['mnist']}.",
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of MNIST's four idx .gz files; default: the digits")
    add("--epochs", type=whole(1), help="default: see below")
    add("--batch-size", type=whole(1), default=100, help="default %(default)s")
    add("--lr", type=positive, default=1e-3, help="Adam's learning rate, default %(default)s")
    add("--gates-lr", type=positive, help="of log_alpha; default: see below, None that of the weights")
    many = len(example.units)
    add("--lambdas", type=positive, nargs=many, metavar="L", help="for each of them, to be divided by N")
    add("--seed", type=whole(0), default=0, help="default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--out", type=Path, metavar="DIR", help="folder of the results, default runs/digits or runs/mnist")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    add("--threads", type=whole(1), help="of torch and the kernels")
    add("--no-dense-timing", action="store_true", help="do not time the same net dense in every epoch")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device and a torch build for it, got none")
    return args


def whole(low: int) -> Callable[[str], int]:
    """The type of a whole number for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def prepare(example: Example, args: argparse.Namespace) -> tuple[Run, int, Path]:
    """The run, new or resumed, its number of epochs and the folder of its results; writes nothing."""
    dataset = data.digits() if args.data is None else data.mnist(args.data)
    recipe = example.recipes["digits" if args.data is None else "mnist"]
    examples, pixels = dataset.train_x.shape
    if args.batch_size > examples:
        raise ValueError(
            f"--batch-size: expected at most {examples}, the training examples, got {args.batch_size}"
        )
    out = Path("runs", dataset.name) if args.out is None else args.out
    config = Config(
        data=dataset.fingerprint,
        sizes=example.sizes(pixels),
        batch_size=args.batch_size,
        lr=args.lr,
        gates_lr=args.gates_lr or recipe.gates_lr or args.lr,
        lambdas=tuple(args.lambdas or recipe.lambdas),
        droprates=example.droprates,
        ema_decay=EMA_DECAY,
        seed=args.seed,
        device=args.device,
    )
    threads = args.threads or recipe.threads
    if threads is not None:
        torch.set_num_threads(threads)
    with denormals_flushed():
        run = Run(example, config, dataset, time_dense=not args.no_dense_timing)
    epochs = args.epochs or recipe.epochs
    if args.resume:
        run.load(out / "checkpoint.pt")
        if epochs < len(run.history):
            raise ValueError(
                f"--epochs: expected at least {len(run.history)}, as in the checkpoint, got {epochs}"
            )
    return run, epochs, out


def train(run: Run, epochs: int, out: Path) -> None:
    """Trains up to `epochs`; each is saved (checkpoint.pt, metrics.csv), some twenty get a table row."""
    out.mkdir(parents=True, exist_ok=True)
    done = len(run.history)
    show_every = -(-epochs // 20)
    # A terminal gets a bar, anything else the rows alone.
    total, initial = epochs * run.steps, done * run.steps
    bar = tqdm(total=total, initial=initial, unit="step", disable=None, dynamic_ncols=True)
    with denormals_flushed(), bar:
        bar.write(report.table_head())
        for epoch in range(done + 1, epochs + 1):
            run.epoch(bar.update)
            run.save(out / "checkpoint.pt")
            report.write_csv(out / "metrics.csv", run.history)
            if epoch in (1, epochs) or epoch % show_every == 0:
                bar.write(report.table_row(run.history))
                sys.stdout.flush()


def export(run: Run, path: Path) -> str:
    """Saves the open part of the averaged net, once what is read back is proven equal to the gated net.

    Raises:
        RuntimeError: on the test set an output differs by more than rounding, or a prediction differs.
    """
    small = nn.export(run.gated.average).cpu()
    test_x = run.data.test_x
    with without_tf32():
        wanted = predict(run.gated.average, test_x)
    # Another order of summation: sums of some hundred terms stay far within 1e-5 of the largest output.
    tolerance = 1e-5 * max(1.0, wanted.abs().max().item())
    difference = math.nan

    def write(temporary: Path) -> None:
        nonlocal difference
        torch.save({"sizes": run.config.sizes, "state": small.state_dict()}, temporary)
        with without_tf32():
            got = predict(load_exported(run.example, temporary).to(run.device), test_x)
        difference = (got - wanted).abs().max().item()
        changed = int((got.argmax(1) != wanted.argmax(1)).sum())
        if not difference <= tolerance or changed:
            raise RuntimeError(
                f"{path}: expected the gated net's outputs within {tolerance:.1e} and its predictions, "
                f"got a difference of {difference:.1e} and {changed} other predictions"
            )

    report.write_whole(path, write)
    kept, of = (
        sum(p.numel() for p in net.parameters()) for net in (small, run.example.dense(run.config.sizes))
    )
    return (
        f"exported net  {kept:,} of {of:,} parameters; the gated net's predictions on all {len(test_x):,} "
        f"test images, outputs within {difference:.1e}"
    )


def load_exported(example: Example, path: Path) -> torch.nn.Module:
    """The plain net in the file of `export`."""
    saved = torch.load(path, weights_only=True)
    with warnings.catch_warnings():  # nn.Linear(0, n) warns, but a layer may well be closed altogether
        warnings.simplefilter("ignore", UserWarning)
        return example.loaded(saved["sizes"], saved["state"]).eval()


def main(example: Example, argv: Sequence[str] | None = None) -> Run:
    """Returns the finished run."""
    args = parse_args(example, argv)
    run, epochs, out = prepare(example, args)
    print(
        f"{run.data.name}: {len(run.data.train_y):,} training and {len(run.data.test_y):,} test images, "
        f"{'-'.join(map(str, run.config.sizes))}, {args.device}, {torch.get_num_threads()} thread(s)"
    )
    train(run, epochs, out)
    title = f"{example.title} with L0 gates, {run.data.name}"
    report.plot_curves(out / "curves.png", run.history, run.config.sizes, example.units, title)
    print(report.summary(run.history, run.config.sizes))
    print(export(run, out / example.file))
    print(f"written to    {out}: metrics.csv, curves.png, checkpoint.pt, {example.file}")
    return run


def run_script(main: Callable[[], object]) -> None:
    """`main` with what stops it said in one line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume goes on from the last whole epoch")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
