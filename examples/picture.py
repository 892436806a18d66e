"""A run as a picture: step time beside the dense line, test errors, open units; from metrics.csv alone.

python examples/picture.py runs/lenet5-mnist5k --out docs/assets/train.png
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import files
import report
from report import Epoch

GATED, DENSE, UNITS = "#0b66c3", "#6b7280", ("#0b66c3", "#c2410c", "#15803d", "#7e22ce")
INK = "#1f2937"


def draw(history: Sequence[Epoch], sizes: Sequence[int], names: Sequence[str], title: str = "") -> bytes:
    """A PNG of 1660 pixels on a white card: read at half its width, on light and dark pages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": DENSE,
        "text.color": INK,
        "axes.labelcolor": INK,
    }
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(10, 3.5), dpi=166, facecolor="white")
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.set_layout_engine("constrained", wspace=0.06)
        step, error, units = figure.subplots(1, 3)
        _step_time(step, history)
        _errors(error, history)
        _open_units(units, history, sizes, names)
        for axes in (step, error, units):
            axes.set_xlabel("epoch")
            axes.set_xlim(1, max(2, len(history)))
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        content = io.BytesIO()
        figure.savefig(content, format="png", facecolor="white")
    return content.getvalue()


def _step_time(axes: Any, history: Sequence[Epoch]) -> None:
    epochs, ours = [row.epoch for row in history], [row.step_ms for row in history]
    theirs = [row.dense_ms for row in history if row.dense_ms is not None]
    axes.plot(epochs, ours, color=GATED, linewidth=2.2)
    labels = [(ours[-1], f"gates\n{ours[-1]:.3g} ms", GATED)]
    axes.set_title("Time of a training step", fontsize=10.5)
    axes.set_ylabel("ms")
    if len(theirs) == len(epochs):
        axes.plot(epochs, theirs, color=DENSE, linewidth=2.2)
        axes.fill_between(epochs, ours, theirs, color=GATED, alpha=0.12, linewidth=0)
        labels.append((theirs[-1], f"dense\n{theirs[-1]:.3g} ms", DENSE))
        last = history[-1]
        if last.dense_seconds is not None and last.seconds < last.dense_seconds:
            text = f"{1 - last.seconds / last.dense_seconds:.0%} of\nall time saved"
            middle = len(epochs) // 2
            at = (ours[middle] + theirs[middle]) / 2
            axes.text(epochs[middle], at, text, ha="center", va="center", color=GATED)
    axes.set_ylim(0, 1.15 * max(ours + theirs))
    _label_ends(axes, labels)


def _errors(axes: Any, history: Sequence[Epoch]) -> None:
    epochs, ours = [row.epoch for row in history], [100 * row.test_error for row in history]
    theirs = [100 * row.dense_error for row in history if row.dense_error is not None]
    axes.plot(epochs, ours, color=GATED, linewidth=2.2)
    labels = [(ours[-1], f"gates\n{ours[-1]:.1f} %", GATED)]
    if len(theirs) == len(epochs):
        axes.plot(epochs, theirs, color=DENSE, linewidth=2.2)
        labels.append((theirs[-1], f"dense\n{theirs[-1]:.1f} %", DENSE))
    axes.set_title("Test error", fontsize=10.5)
    axes.set_ylabel("% of test images")
    # The first epochs know nothing yet: what is of interest starts where the dense net has learnt the most.
    axes.set_ylim(0, min(100.0, 8 * max(1.0, ours[-1], *theirs[-1:])))
    _label_ends(axes, labels)


def _open_units(axes: Any, history: Sequence[Epoch], sizes: Sequence[int], names: Sequence[str]) -> None:
    rows = [row.open_units for row in history]
    if len(sizes) > report.WIDE:
        rows, sizes, names = [(sum(row),) for row in rows], [sum(sizes)], ["all units"]
    labels = []
    for i, (size, name, color) in enumerate(zip(sizes, names, UNITS, strict=False)):
        shares = [100 * row[i] / size for row in rows]
        axes.plot([row.epoch for row in history], shares, color=color, linewidth=2.2)
        labels.append((shares[-1], f"{name}\n{rows[-1][i]} of {size}", color))
    axes.set_title("Open units", fontsize=10.5)
    axes.set_ylabel("% of all")
    axes.set_ylim(0, 105)
    _label_ends(axes, labels)


def _label_ends(axes: Any, labels: Sequence[tuple[float, str, str]], apart: float = 0.15) -> None:
    """Names beside the right ends of their lines, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    labels = sorted(labels)
    at = [min(max((y - low) / (high - low), 0.06), 0.94) for y, _, _ in labels]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + apart)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], 0.95 if i == len(at) - 1 else at[i + 1] - apart)
    for y, (_, text, color) in zip(at, labels, strict=True):
        axes.annotate(
            text, (1.02, y), xycoords="axes fraction", color=color, va="center", fontsize=9, linespacing=1.05
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw the picture of a run from its metrics.csv.",
        epilog="example: python examples/picture.py runs/lenet5-mnist5k --out docs/assets/train.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="of the picture, default curves.png in that folder")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    try:
        content = draw(*report.read_csv(args.run / "metrics.csv"), args.title)
        files.write_whole(args.out or args.run / "curves.png", content)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
