"""Plots from the results alone: ``python bench/plot.py [CSV ...]``; small SVG files beside the CSV.

<device>.csv gives <device>-speedup.svg: how many times faster than torch.nn each way of computing a work is,
against the expected share of open gates, beside the ideal 1 / keep; a diamond marks where ours equals dense.
<device>-training.csv gives <device>-training.svg: step time over a training run. Nothing else is read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from registry import KEEPS, Work
from rows import RESULTS, Row, machine, read
from table import Found, break_even, device_files, kind_of, titled

# Okabe and Ito's colours, told apart by colour-blind readers, and by markers without any colour.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "label": "l0kernels", "linewidth": 2.0, "zorder": 5},
    "eager": {"color": "#0072B2", "marker": ".", "label": "l0kernels, eager", "linestyle": ":"},
    "index_select": {"color": "#E69F00", "marker": "s", "label": "index_select + product"},
    "grouped_mm": {"color": "#009E73", "marker": "^", "label": "grouped_mm"},
    "masked_compiled": {"color": "#CC79A7", "marker": "x", "label": "masked, torch.compile"},
    "masked": {"color": "#D55E00", "marker": "v", "label": "masked"},
}
SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "l0kernels",  # the same rows give the same bytes
}
PANEL = (2.9, 2.3)  # inches


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def panels(count: int, columns: int, title: str) -> tuple[Figure, list[Any]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    figure.suptitle(title, fontsize=7, wrap=True)
    return figure, axes[:count]


def speedups(work: Work, found: Found, axis: Any) -> None:
    """One work: speed-up over torch.nn, dense, in the same run, against keep."""
    mode = "graph" if work.device == "cuda" else "eager"
    curves = {name: found.curve(work, name, mode) for name in STYLES if name not in ("ours", "eager")}
    curves["ours"] = found.curve(work, work.provider, mode)
    if mode == "graph":
        curves["eager"] = found.curve(work, work.provider, "eager")
    ideal = [keep for keep in KEEPS if keep >= 0.1]
    axis.plot(
        ideal, [1 / keep for keep in ideal], color="black", linestyle="--", linewidth=0.8, label="1 / keep"
    )
    axis.axhline(1, color="#999999", linewidth=0.8)
    for name, style in STYLES.items():
        points = curves.get(name)
        if points:
            axis.plot([keep for keep, _ in points], [1 / ratio for _, ratio in points], **style)
    even = break_even(curves["ours"])
    if even is not None:
        axis.plot([even], [1], marker="D", markersize=6, color="white", markeredgecolor="black", zorder=6)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlim(1.03, -0.03)
    equal = "at no keep" if even is None else f"from keep {even:.2f} down" if even < 1 else "at every keep"
    axis.set_title(f"{work.title}\nno slower than dense {equal}")


def plot_speedups(rows: Sequence[Row], path: Path) -> list[Work]:
    """Every work of the README that has rows; returns them."""
    found = Found(rows)
    works = [work for work in titled(kind_of(rows)) if found.has(work)]
    if not works:
        return []
    shown = {(work.op, work.shape_name) for work in works}
    used = [row for row in found.rows if (row["op"], row["shape"]) in shown]
    how = "CUDA graphs, " if works[0].device == "cuda" else ""
    figure, axes = panels(len(works), 3 if len(works) > 4 else 2, f"{how}{machine(used)}")
    for work, axis in zip(works, axes, strict=True):
        speedups(work, found, axis)
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
        axis.set_xlabel("keep (share of open gates)")
        axis.set_ylabel("times faster than torch.nn")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    diamond = matplotlib.lines.Line2D([], [], marker="D", color="white", markeredgecolor="black")
    figure.legend(
        [*handles.values(), diamond],
        [*handles, "break-even"],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    save(figure, path)
    return works


def plot_training(rows: Sequence[Row], path: Path) -> list[str]:
    """Median step time of the gated and of the dense net, epoch by epoch; returns the names of the runs."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = panels(len(runs), 3, machine(rows))
    for run, axis in zip(runs, axes, strict=True):
        part = [row for row in rows if row["run"] == run]
        epochs = [int(row["epoch"]) for row in part]
        ours = [float(row["step_ms"]) for row in part]
        axis.plot(epochs, ours, **STYLES["ours"] | {"marker": "", "label": "with gates"})
        if all(row["dense_ms"] for row in part):
            dense = [float(row["dense_ms"]) for row in part]
            axis.plot(epochs, dense, color="#D55E00", linestyle="--", label="dense")
        last = part[-1]
        axis.set_title(
            f"{run}: test error {float(last['test_error']):.2%}, "
            f"FLOPs {float(last['expected_flops']):.0%} of dense"
        )
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
        axis.set_ylabel("ms per step")
        axis.legend(frameon=False)
    save(figure, path)
    return runs


def plot(path: Path) -> Path | None:
    """The SVG file that belongs to a CSV file; None where it holds nothing to draw."""
    rows = read(path)
    if not rows:
        return None
    with matplotlib.rc_context(SETTINGS):
        if "run" in rows[0]:
            out = path.with_suffix(".svg")
            return out if plot_training(rows, out) else None
        out = path.with_name(f"{path.stem}-speedup.svg")
        return out if plot_speedups(rows, out) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: all in bench/results")
    args = parser.parse_args()
    for path in args.paths or [*device_files(), *sorted(RESULTS.glob("*-training.csv"))]:
        out = plot(path)
        print(f"{out}: {out.stat().st_size / 1024:.0f} kB" if out else f"{path}: nothing to draw")


if __name__ == "__main__":
    main()
