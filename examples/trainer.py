"""What the examples share: a net with gates and the same net dense, trained side by side on the same batches.

The objective of the gated net is ``cross_entropy + l0.nn.penalty(model) / N``, N the number of training
examples (Louizos, Welling & Kingma, ICLR 2018). Blocks of steps of the two nets take turns in one process,
so that whatever else the machine does meets both; the wall-clock of a net is the sum over its own blocks.
"""

import argparse
import io
import math
import pickle
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import baseline
import data
import files
import picture
import report
import shipping
import torch
import torch.nn.functional as F
from report import Epoch
from torch import Tensor
from tqdm import tqdm

import l0kernels as l0

BLOCK = 10  # steps of one net before it is the other's turn


class Recipe(NamedTuple):
    epochs: int
    lambdas: tuple[float, ...]  # the paper's lambda: one for all gate vectors, or one for each
    lr: float = 1e-3
    gate_lr: float = 0.02  # of log_alpha
    batch_size: int = 100
    threads: int | None = None  # None: torch's own choice


@dataclass(frozen=True)
class Example:
    """What the training of one net adds to this module.

    Attributes:
        title: of the net, for people.
        name: of its files.
        units: what each gate vector closes; of a deep net a name for all of them.
        recipes: by the name of the data.
        gated: the net for these lambdas; dense: the same in torch.nn.
        optimizer: of parameter groups and a learning rate.
        schedule: the factor of all learning rates after this share of the run.
        shaped: makes of flat images those that the net takes.
        augmented: what each training batch goes through.
        load: the data, from the folder of --data or None.
    """

    title: str
    name: str
    units: tuple[str, ...]
    recipes: Mapping[str, Recipe]
    gated: Callable[[Sequence[float]], torch.nn.Module]
    dense: Callable[[], torch.nn.Module]
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    schedule: Callable[[float], float]
    shaped: Callable[[Tensor], Tensor]
    augmented: Callable[[Tensor], Tensor] = lambda x: x
    load: Callable[[Path | None], data.Data] = lambda folder: data.mnist(folder) if folder else data.mnist5k()


def adam(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=lr, fused=True)


def half_then_down(share: float) -> float:
    """1 for half of the run, then down to 0 in a line."""
    return min(1.0, 2 * (1 - share))


@dataclass(frozen=True)
class Config:
    """What decides the numbers of a run; a checkpoint is resumed only under an equal one."""

    example: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    gate_lr: float
    lambdas: tuple[float, ...]
    seed: int
    device: str
    dense: bool

    def refuse_other(self, saved: dict[str, Any], path: Path) -> None:
        for field in fields(self):
            ours, theirs = getattr(self, field.name), saved.get(field.name)
            if ours != theirs:
                raise ValueError(f"{path}: cannot resume: {field.name} was {theirs!r} there, got {ours!r}")


class Learner:
    """A net, its optimiser and the time that its steps took; `examples`: N if it has gates, else None."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, examples: int | None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.examples = examples
        self.seconds = 0.0  # of all steps so far
        self.step_ms: list[float] = []  # of the blocks of this epoch, per step
        self._full = [group["lr"] for group in optimizer.param_groups]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(x), y)
        if self.examples is not None:
            loss = loss + l0.nn.penalty(self.model) / self.examples
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def block(self, batches: Sequence[tuple[Tensor, Tensor]], rates: Sequence[float]) -> float:
        """A timed step on each batch under its factor of the learning rates; the sum of the losses."""
        total = torch.zeros((), device=batches[0][0].device)
        begin = _now(total.device)
        for (x, y), rate in zip(batches, rates, strict=True):
            for group, full in zip(self.optimizer.param_groups, self._full, strict=True):
                group["lr"] = full * rate
            total += self.step(x, y)
        seconds = _now(total.device) - begin
        self.seconds += seconds
        self.step_ms.append(1e3 * seconds / len(batches))
        return total.item()

    def test_error(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        wrong = shipping.predict(self.model, x).argmax(1) != y
        self.model.train()
        return wrong.double().mean().item()

    def state(self) -> dict[str, Any]:
        times = {"seconds": self.seconds, "step_ms": self.step_ms}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **times}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.step_ms = state["seconds"], list(state["step_ms"])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Run:
    """A training run between two blocks of steps: the nets, the random streams and the figures so far."""

    def __init__(self, example: Example, config: Config, dataset: data.Data) -> None:
        self.example = example
        self.config = config
        self.device = torch.device(config.device)
        name, train_x, train_y, test_x, test_y = dataset
        tensors = example.shaped(train_x), train_y, example.shaped(test_x), test_y
        self.data = data.Data(name, *(tensor.to(self.device) for tensor in tensors))
        # What does not fill a batch is left out, other examples in each epoch.
        self.steps = len(train_y) // config.batch_size
        self.step = 0
        self.loss = 0.0  # the sum over the steps of this epoch
        self.history: list[Epoch] = []

        torch.manual_seed(config.seed)
        net = example.dense().to(self.device)
        self.shape = (1, *self.data.train_x.shape[1:])
        self.dense_flops = l0.nn.eval_flops(net, self.shape)
        self.dense = (
            Learner(net, example.optimizer(net.parameters(), config.lr), None) if config.dense else None
        )
        torch.manual_seed(config.seed)  # again: the gated net starts alike if the dense one is another
        net = example.gated(config.lambdas).to(self.device)
        groups = l0.nn.parameter_groups(net, gate_lr=config.gate_lr)
        self.gated = Learner(net, example.optimizer(groups, config.lr), len(train_y))
        l0.nn.clamp_after_step(self.gated.optimizer, net)
        self.gates = [gate.n for gate in l0.nn.gate_modules(net)]
        self.random = torch.Generator().manual_seed(config.seed)
        self.order = self._shuffled()

    @property
    def total(self) -> int:
        return self.config.epochs * self.steps

    def block(self) -> int:
        """Trains both nets on the next few batches of this epoch; ends the epoch where it ends."""
        first = self.step % self.steps
        order = self.order[first : first + BLOCK]
        x, y = self.data.train_x, self.data.train_y
        batches = [(self.example.augmented(x.index_select(0, i)), y.index_select(0, i)) for i in order]
        rates = [self.example.schedule((self.step + i) / self.total) for i in range(len(batches))]
        self.loss += self.gated.block(batches, rates)
        if self.dense is not None:
            self.dense.block(batches, rates)
        self.step += len(batches)
        if self.step % self.steps == 0:
            self._end_epoch()
        return len(batches)

    def _shuffled(self) -> Tensor:
        """(steps, batch_size): the batches of an epoch."""
        order = torch.randperm(len(self.data.train_y), generator=self.random)
        return order[: self.steps * self.config.batch_size].view(self.steps, -1).to(self.device)

    def _end_epoch(self) -> None:
        epoch, loss = len(self.history) + 1, self.loss / self.steps
        if not math.isfinite(loss):
            raise ValueError(
                f"--lr: expected a finite training loss, got {loss} in epoch {epoch}; try a smaller one"
            )
        gated, dense = self.gated, self.dense
        test = self.data.test_x, self.data.test_y
        expected = l0.nn.expected_flops(gated.model, self.shape).item()
        self.history.append(
            Epoch(
                epoch=epoch,
                loss=loss,
                test_error=gated.test_error(*test),
                dense_error=None if dense is None else dense.test_error(*test),
                open_units=tuple(units.open for units in l0.nn.open_units(gated.model).values()),
                expected_flops=expected / self.dense_flops,
                step_ms=median(gated.step_ms),
                dense_ms=None if dense is None else median(dense.step_ms),
                seconds=gated.seconds,
                dense_seconds=None if dense is None else dense.seconds,
            )
        )
        self.loss, self.order = 0.0, self._shuffled()
        for learner in (gated, dense):
            if learner is not None:
                learner.step_ms.clear()

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "gated": self.gated.state(),
            "dense": None if self.dense is None else self.dense.state(),
            "step": self.step,
            "loss": self.loss,
            "order": self.order,
            "random": self.random.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [vars(row) for row in self.history],
        }

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        torch.save(self.state(), content)
        files.write_whole(path, content.getbuffer())

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
        if self.dense is not None:
            self.dense.load(state["dense"])
        self.step, self.loss, self.order = state["step"], state["loss"], state["order"].to(self.device)
        self.random.set_state(state["random"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.history = [Epoch(**row) for row in state["history"]]


class Interrupted(Exception):
    """Ctrl-C was pressed, and the run is saved."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; pressed again it interrupts at once."""
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


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


def train(run: Run, out: Path) -> None:
    """Trains to the end; each epoch is saved (checkpoint.pt, metrics.csv), some twenty get a table row.

    Raises:
        Interrupted: Ctrl-C was pressed; checkpoint.pt is of this very step.
    """
    show_every = -(-run.config.epochs // 20)
    # A terminal gets a bar, anything else the rows alone.
    bar = tqdm(total=run.total, initial=run.step, unit="step", disable=None, dynamic_ncols=True, leave=False)
    with denormals_flushed(), asked_to_stop() as stop, bar:
        bar.write(report.table_head(run.gates))
        while run.step < run.total:
            bar.update(run.block())
            if run.step % run.steps == 0:
                save(run, out, bar.write)
                epoch = len(run.history)
                if epoch in (1, run.config.epochs) or epoch % show_every == 0:
                    bar.write(report.table_row(run.history, run.gates))
                    sys.stdout.flush()
            if stop():
                run.save(out / "checkpoint.pt")
                raise Interrupted


def save(run: Run, out: Path, say: Callable[[str], object]) -> None:
    """Checkpoint and metrics; a full disk costs the checkpoint and not the run."""
    try:
        run.save(out / "checkpoint.pt")
        report.write_csv(out / "metrics.csv", run.history, run.gates, run.example.units)
    except OSError as error:
        say(f"epoch {len(run.history)} is not saved, training goes on: {error}")


def parser(example: str, title: str, lambdas: str) -> argparse.ArgumentParser:
    """The options of all examples; `example` is a command, `lambdas` says what --lambdas is for."""
    made = argparse.ArgumentParser(
        description=f"Train a {title} with L0 gates and, beside it, the same net dense.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of the whole data set; default: what needs none")
    add("--epochs", type=whole(1))
    add("--batch-size", type=whole(1))
    add("--lr", type=positive, help="learning rate of the weights")
    add("--gate-lr", type=positive, help="learning rate of the gates")
    add("--lambdas", type=positive, nargs="+", metavar="L", help=lambdas)
    add("--seed", type=whole(0), default=0, help="default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--threads", type=whole(1), help="of torch and the kernels; default: the example's or torch's choice")
    add("--out", type=Path, metavar="DIR", help="folder of the results; default: one in runs")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    add("--no-dense", action="store_true", help="do not train the dense net")
    return made


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


def prepare(example: Example, args: argparse.Namespace) -> tuple[Run, Path]:
    """The run, new or resumed, and the folder of its results, which is there and can be written to."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device and a torch build for it, got none")
    dataset = example.load(args.data)
    recipe = example.recipes[dataset.name]
    lambdas = tuple(args.lambdas or recipe.lambdas)
    if len(lambdas) not in (1, len(recipe.lambdas)):
        raise ValueError(f"--lambdas: expected {len(recipe.lambdas)} numbers, got {len(lambdas)}")
    config = Config(
        example=example.name,
        data=dataset.fingerprint,
        epochs=args.epochs or recipe.epochs,
        batch_size=args.batch_size or recipe.batch_size,
        lr=args.lr or recipe.lr,
        gate_lr=args.gate_lr or recipe.gate_lr,
        lambdas=lambdas,
        seed=args.seed,
        device=args.device,
        dense=not args.no_dense,
    )
    if config.batch_size > len(dataset.train_y):
        raise ValueError(
            f"--batch-size: expected at most {len(dataset.train_y)}, the training examples, "
            f"got {config.batch_size}"
        )
    threads = args.threads or recipe.threads
    if threads is not None:
        torch.set_num_threads(threads)
    with denormals_flushed():
        run = Run(example, config, dataset)
    out = args.out or Path("runs", f"{example.name}-{dataset.name}")
    if args.resume:
        run.load(out / "checkpoint.pt")
    files.check_folder(out, need=sum(p.nbytes for p in run.gated.model.parameters()) * 8)
    return run, out


def main(example: Example, args: argparse.Namespace) -> Run:
    """Trains, reports, exports; returns the finished run."""
    run, out = prepare(example, args)
    beside = "the same net dense" if run.dense else "nothing"
    print(
        f"{example.title} on {run.data.name}: {len(run.data.train_y):,} images to train on, "
        f"{len(run.data.test_y):,} to test; beside it {beside}; {args.device}, "
        f"{torch.get_num_threads()} thread(s)",
        flush=True,
    )
    train(run, out)
    print(report.summary(run.history, run.gates, example.units))
    with denormals_flushed():
        beside = baseline.by_magnitude(run)
    if beside:
        print(beside, flush=True)
    print("exporting the open units to plain torch ...", flush=True)
    print(shipping.ship(run, out / f"{example.name}.pt2"))
    title = f"{example.title} with L0 gates beside the same net dense"
    drawn = picture.draw(run.history, run.gates, example.units, title)
    files.write_whole(out / "curves.png", drawn)
    print(f"written to {out}: {example.name}.pt2, curves.png, metrics.csv, checkpoint.pt")
    return run


def run_script(main: Callable[[], object]) -> None:
    """`main`, with what stops it said in one line."""
    try:
        main()
    except (Interrupted, KeyboardInterrupt) as stop:
        saved = "here" if isinstance(stop, Interrupted) else "after the last whole epoch"
        again = [argument for argument in sys.argv if argument != "--resume"]
        print(f"\nstopped; a checkpoint was written {saved}. To go on:", file=sys.stderr)
        print(f"    {shlex.join([sys.executable, *again, '--resume'])}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
