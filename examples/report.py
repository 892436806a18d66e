"""What a run shows and leaves behind: table, summary, metrics.csv, curves.png; files whole or not at all."""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

COLUMNS = {  # of the table, with their widths
    "epoch": 5,
    "loss": 8,
    "test error": 10,
    "best (epoch)": 13,
    "open units": 13,
    "E[FLOPs]": 8,
    "FLOPs": 7,
    "step ms": 7,
    "vs dense": 8,
}


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch; test error, open units and actual FLOPs are the averaged net's."""

    epoch: int
    loss: float  # mean over the steps, penalty included
    test_error: float  # share of the test set
    open_units: tuple[int, ...]  # under the evaluation gates, of each gate vector
    expected_flops: float  # share of dense, expected over the draws of the next step
    actual_flops: float  # share of dense, under the evaluation gates
    step_ms: float  # median of the epoch
    dense_ms: float | None  # of the same net dense in the same epoch; None: not timed

    @property
    def step_ratio(self) -> float | None:
        return None if self.dense_ms is None else self.step_ms / self.dense_ms


def best(history: Sequence[Epoch]) -> Epoch:
    """The epoch with the lowest test error, the first among equals."""
    return min(history, key=lambda row: row.test_error)


def table_head() -> str:
    return _line(COLUMNS)


def table_row(history: Sequence[Epoch]) -> str:
    """The last epoch."""
    row, top = history[-1], best(history)
    return _line(
        (
            str(row.epoch),
            f"{row.loss:.4f}",
            f"{row.test_error:.2%}",
            f"{top.test_error:.2%} ({top.epoch})",
            _dashed(row.open_units),
            f"{row.expected_flops:.1%}",
            f"{row.actual_flops:.1%}",
            f"{row.step_ms:.3f}",
            "-" if row.step_ratio is None else f"{row.step_ratio:.2f}x",
        )
    )


def summary(history: Sequence[Epoch], sizes: Sequence[int]) -> str:
    last, top = history[-1], best(history)
    lines = [
        f"test error    {last.test_error:.2%} at the last epoch ({last.epoch}), "
        f"{top.test_error:.2%} at the best ({top.epoch})",
        f"open units    {_dashed(last.open_units)} of {_dashed(sizes[:-1])}",
        f"FLOPs         {last.expected_flops:.1%} of dense expected in training, "
        f"{last.actual_flops:.1%} under the evaluation gates",
    ]
    # One epoch of the digits is too short to be timed well: a twentieth of the run on either side.
    n = max(1, len(history) // 20)
    first_ratio, last_ratio = (
        [row.step_ratio for row in rows if row.step_ratio is not None] for rows in (history[:n], history[-n:])
    )
    if first_ratio and last_ratio:
        lines.append(
            f"step time     {median(first_ratio):.2f}x dense in the first {n} epoch(s), "
            f"{median(last_ratio):.2f}x in the last {n}"
        )
    return "\n".join(lines)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then moves it there; an error leaves nothing."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    units = [f"open_units_{i}" for i in range(len(history[0].open_units))]
    head = [
        "epoch",
        "loss",
        "test_error",
        *units,
        "expected_flops",
        "actual_flops",
        "step_ms",
        "dense_ms",
        "step_ratio",
    ]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for row in history:
                shares = (row.expected_flops, row.actual_flops)
                times = (row.step_ms, row.dense_ms, row.step_ratio)  # None becomes an empty field
                writer.writerow((row.epoch, row.loss, row.test_error, *row.open_units, *shares, *times))

    write_whole(path, write)


def plot_curves(
    path: Path, history: Sequence[Epoch], sizes: Sequence[int], names: Sequence[str], title: str
) -> None:
    """Loss, test error, open units with FLOPs, and step time against the epoch, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state
    from matplotlib.ticker import LogLocator

    epochs = [row.epoch for row in history]
    style = {"marker": "."} if len(epochs) <= 30 else {"linewidth": 1.0}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    (loss, error), (units, step) = figure.subplots(2, 2, sharex=True)

    loss.plot(epochs, [row.loss for row in history], **style)
    loss.set(title="training loss, cross-entropy + penalty")

    top, last = best(history), history[-1]
    error.plot(epochs, [100 * row.test_error for row in history], **style)
    error.plot(top.epoch, 100 * top.test_error, "o", label=f"best {top.test_error:.2%}, epoch {top.epoch}")
    error.plot(
        last.epoch, 100 * last.test_error, "s", label=f"last {last.test_error:.2%}, epoch {last.epoch}"
    )
    error.set(title="test error of the averaged net", ylabel="%", yscale="log")
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_minor_formatter("")
    error.legend()

    for i, (name, size) in enumerate(zip(names, sizes[:-1], strict=True)):
        share = [100 * row.open_units[i] / size for row in history]
        units.plot(epochs, share, label=f"{name}, {last.open_units[i]} of {size}", **style)
    units.plot(epochs, [100 * row.expected_flops for row in history], "k--", label="E[FLOPs] in training")
    units.set(title="open units and FLOPs", xlabel="epoch", ylabel="% of dense", ylim=(0, 105))
    units.legend()

    ratios = [row.step_ratio for row in history if row.step_ratio is not None]
    if len(ratios) < len(epochs):
        step.plot(epochs, [row.step_ms for row in history], **style)
        step.set(title="time of a training step", xlabel="epoch", ylabel="ms")
    else:
        # A running median and its scale: another program on the cores must not hide the course of the run.
        reach = len(ratios) // 40
        smooth = [median(ratios[max(0, i - reach) : i + reach + 1]) for i in range(len(ratios))]
        step.plot(epochs, ratios, ".", color="C0", alpha=0.3, markersize=3)
        step.plot(epochs, smooth, color="C0", label=f"median of {2 * reach + 1} epoch(s)")
        step.axhline(1, color="k", linestyle=":", label="dense")
        step.set_ylim(top=1.2 * max(1, *smooth))
        step.set(title="time of a training step, gated / dense", xlabel="epoch")
        step.legend()

    for axes in (loss, step):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    for axes in (loss, error, units, step):
        axes.grid(alpha=0.3)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _line(cells: Iterable[str]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _dashed(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))
