"""The figures of a run: its table, its summary in plain words, metrics.csv."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files

WIDE = 4  # gate vectors that the table shows one by one


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch; None: no dense net was trained."""

    epoch: int
    loss: float  # of the gated net: mean over the steps, penalty included
    test_error: float  # of the gated net in eval(), share of the test set
    dense_error: float | None
    open_units: tuple[int, ...]  # under the evaluation gates, of each gate vector
    expected_flops: float  # share of dense, expected over the draws of the next step
    step_ms: float  # median over the epoch's blocks of steps
    dense_ms: float | None
    seconds: float  # all steps so far
    dense_seconds: float | None


def _units(counts: Sequence[int]) -> str:
    return "-".join(map(str, counts)) if len(counts) <= WIDE else str(sum(counts))


def table_head(sizes: Sequence[int]) -> str:
    units = _width(sizes)
    above = (
        "",
        "",
        f"{'test error':^14}",
        "open units",
        "E[FLOPs]",
        f"{'ms per step':^20}",
        f"{'s in all':^13}",
    )
    names = ("epoch", "loss", " gated   dense", f"of {_units(sizes)}", "of dense")
    widths = (5, 7, 14, units, 8, 20, 13)
    below = (*names, " gated  dense  ratio", " gated  dense")
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (above, below)
    )


def table_row(history: Sequence[Epoch], sizes: Sequence[int]) -> str:
    """The last epoch."""
    row = history[-1]
    ratio = None if row.dense_ms is None else row.step_ms / row.dense_ms
    cells = (
        f"{row.epoch:5}",
        f"{row.loss:7.3f}",
        f"{row.test_error:6.1%}  {_or_dash(row.dense_error, '.1%')}",
        f"{_units(row.open_units):>{_width(sizes)}}",
        f"{row.expected_flops:8.0%}",
        f"{row.step_ms:6.2f} {_or_dash(row.dense_ms, '.2f')} {_or_dash(ratio, '.2f')}",
        f"{row.seconds:6.1f} {_or_dash(row.dense_seconds, '.1f')}",
    )
    return "  ".join(cells)


def _width(sizes: Sequence[int]) -> int:
    return max(len("open units"), len(f"of {_units(sizes)}"))


def _or_dash(value: float | None, spec: str) -> str:
    return f"{'-' if value is None else format(value, spec):>6}"


def summary(history: Sequence[Epoch], sizes: Sequence[int], names: Sequence[str]) -> str:
    """Errors, open units and the time that the gates saved, in sentences."""
    last = history[-1]
    dense = "" if last.dense_error is None else f", the dense net {last.dense_error:.1%}"
    counts = (
        [f"{n} of {size} {name}" for n, size, name in zip(last.open_units, sizes, names, strict=True)]
        if len(names) == len(sizes)
        else [f"{sum(last.open_units)} of {sum(sizes)} {names[0]}"]
    )
    lines = [
        "",
        f"Error: the gated net misreads {last.test_error:.1%} of the test images{dense}.",
        f"Open: {', '.join(counts)}.",
    ]
    if last.dense_ms is not None and last.dense_seconds is not None:
        saved = 1 - last.seconds / last.dense_seconds
        lines += [
            f"Time: all steps took {last.seconds:.1f} s with gates and {last.dense_seconds:.1f} s dense: "
            f"{abs(saved):.0%} of the time {'saved' if saved > 0 else 'lost'}. A step of the last epoch took "
            f"{last.step_ms / last.dense_ms:.2f} of a dense one.",
        ]
    return "\n".join(lines)


def write_csv(path: Path, history: Sequence[Epoch], sizes: Sequence[int], names: Sequence[str]) -> None:
    """A row for each epoch; what was not measured is an empty field."""
    if len(names) != len(sizes):
        names = [f"{names[0]} {i + 1}" for i in range(len(sizes))]
    text = io.StringIO(newline="")
    units = [f"open {name} of {size}" for name, size in zip(names, sizes, strict=True)]
    writer = csv.DictWriter(text, [*(name for name in vars(history[0]) if name != "open_units"), *units])
    writer.writeheader()
    for row in history:
        values = {name: value for name, value in vars(row).items() if name != "open_units"}
        writer.writerow(values | dict(zip(units, row.open_units, strict=True)))
    files.write_whole(path, text.getvalue().encode())


def read_csv(path: Path) -> tuple[list[Epoch], list[int], list[str]]:
    """What `write_csv` wrote: the epochs, the sizes of the gate vectors and their names.

    Raises:
        ValueError: it is another file.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    units = [name for name in (rows[0] if rows else ()) if name.startswith("open ")]
    try:
        names, sizes = zip(*(name.removeprefix("open ").rsplit(" of ", 1) for name in units), strict=True)
        history = []
        for row in rows:
            counts = tuple(int(row.pop(name)) for name in units)
            values: dict[str, Any] = {k: float(v) if v else None for k, v in row.items()}
            history.append(Epoch(open_units=counts, **(values | {"epoch": int(row["epoch"])})))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the metrics of a run, got another file: {error}") from error
    return history, [int(size) for size in sizes], list(names)
