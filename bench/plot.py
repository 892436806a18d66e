"""Draws the results files as small SVG pictures beside them, from the rows alone. <device>.csv gives
<device>-speedup.svg: how many times faster than torch.nn a work is computed, against the share of open
gates; <device>-training.csv gives <device>-training.svg: step time over training runs; and the whole nets
of all CPUs together give nets-cpu.svg: their step time against the share of open gates. The runs of paper.py
give paper.svg, by epoch, those of wrn.py steps.svg. --check draws nothing and says which pictures are older
than their rows."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cli
import matplotlib
import paper
import wrn
from found import Found, break_even, curve, device_files
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from nets import NETS
from registry import Work
from rows import RESULTS, Row, device_name, machine, read
from table import Line, net_lines
from training import EXAMPLES

WIDTH = 830  # of README, in px
PX = 1 / 72  # inches: the SVG backend counts 72 units to an inch
INK, FAINT, EDGE = "#24292f", "#6e7781", "#d0d7de"
# Okabe and Ito's colours, told apart by colour-blind readers; lines differ in their dashes, too.
OURS, OTHER, PLAIN = "#0072B2", "#C45500", "#9A6700"
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib's own
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # the same letters, as wide, on every machine
    "svg.hashsalt": "l0kernels",  # the same rows give the same bytes
}
Point = tuple[float, float]


class Picture(NamedTuple):
    """A file, the results that it shows, and how."""

    out: Path
    sources: tuple[Path, ...]
    draw: Callable[[], Figure]

    @property
    def origin(self) -> str:
        """Of the rows: what the file says of itself, to be compared with."""
        return ", ".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()[:16]}" for p in self.sources)

    def save(self) -> None:
        drawn = StringIO()
        with matplotlib.rc_context(SETTINGS):
            about = {"Date": None, "Source": self.origin}
            self.draw().savefig(drawn, format="svg", facecolor="none", metadata=about)
        # In points a page would show it a third larger, or shrink it.
        self.out.write_text(re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', drawn.getvalue(), count=2))

    @property
    def current(self) -> bool:
        return self.out.is_file() and self.origin in self.out.read_text()


def card(width: int, height: int, title: str, rows: Sequence[Row], commits: bool = True) -> Figure:
    """A figure of so many px without axes: a light card, legible on any page, and where the rows are from."""
    rows = rows if commits else [row | {"commit": ""} for row in rows]
    figure = Figure(figsize=(width * PX, height * PX), dpi=72)
    box = FancyBboxPatch(
        (1, 1),
        width - 2,
        height - 2,
        boxstyle="round,pad=0,rounding_size=10",
        facecolor="white",
        edgecolor=EDGE,
        zorder=-1,
    )
    box.set_transform(matplotlib.transforms.IdentityTransform())
    figure.add_artist(box)
    figure.text(16 / width, 1 - 26 / height, title, fontsize=15, fontweight="bold")
    figure.text(16 / width, 14 / height, machine(rows, brief=True), fontsize=10.5, color=FAINT)
    return figure


def grid(figure: Figure, count: int, columns: int, right: int, above: int = 36) -> list[Any]:
    """Axes of panels, with `above` px for the title of each and `right` px for the names of its lines."""
    width, height = (float(size) / PX for size in figure.get_size_inches())
    rows = -(-count // columns)
    top, bottom, left = 40, 34, 64
    cell_w, cell_h = (width - 16) / columns, (height - top - bottom) / rows
    axes = []
    for i in range(count):
        x, y = i % columns * cell_w, height - top - (i // columns + 1) * cell_h
        box = (x + left, y + 48, cell_w - left - right, cell_h - 48 - above)
        axes.append(figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height)))
    return axes


def name_lines(axis: Any, names: Sequence[tuple[str, float, str]], gap: float = 15) -> None:
    """Writes the names of lines (name, last y, colour) beside the right edge, at least `gap` px apart."""
    to_px = axis.transData.transform
    ys = sorted((to_px((0, y))[1], name, color) for name, y, color in names)
    low, high = (axis.transAxes.transform((0, end))[1] for end in (0, 1))
    placed = [max(low, y) for y, *_ in ys]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed[-1] = min(placed[-1], high)
    for i in reversed(range(len(placed) - 1)):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    right = axis.transAxes.transform((1, 0))[0] + 6
    for (_, name, color), y in zip(ys, placed, strict=True):
        where = axis.transAxes.inverted().transform((right, y))
        axis.text(*where, name, transform=axis.transAxes, color=color, va="center", fontsize=12)


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


# ---- how many times faster

WAYS = (
    ("masked", "masked", PLAIN, (4, 2)),
    ("index_select", "index_select", OTHER, (6, 2)),
    ("grouped_mm", "grouped_mm", OTHER, (6, 2)),
)
"""Beside ours: provider, name, colour, dashes."""
DENSEST, SPARSEST = 1.0, 0.1


def speedups(work: Work, found: Found, axis: Any) -> list[tuple[str, float, str]]:
    """One work: speed-up over torch.nn in the same run, against keep; returns the names of the lines."""
    mode = "graph" if work.device == "cuda" else "eager"
    ours = found.sweep(work, work.provider, mode)
    axis.axhline(1, color=FAINT, linewidth=1)
    keeps = [SPARSEST + i * (DENSEST - SPARSEST) / 50 for i in range(51)]
    axis.plot(keeps, [1 / keep for keep in keeps], color=INK, linewidth=1, dashes=(1, 2))
    names = [("1 / keep", 1 / SPARSEST, INK)]
    for provider, name, color, dashes in WAYS:
        points = fast(curve(beside(ours, found.sweep(work, provider, mode))))
        if points:
            axis.plot(*zip(*points, strict=True), color=color, dashes=dashes)
            names.append((name, points[-1][1], color))
    points = fast(curve(ours))
    axis.plot(*zip(*points, strict=True), color=OURS, linewidth=2.4, marker="o", markersize=4)
    names.append(("l0kernels", points[-1][1], OURS))
    even = break_even(curve(ours))
    if even is None:
        text = "at no keep faster than dense"
    else:
        text = f"as fast as dense at keep {even:.2f}" if even < 1 else "never slower than dense"
    axis.text(0.02, 0.9, text, transform=axis.transAxes, fontsize=11, color=FAINT)
    return names


def beside(ours: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Those of the commits of ours: all at once, or nothing to compare with."""
    commits = {row["commit"] for row in ours}
    return [row for row in others if row["commit"] in commits]


def fast(points: Sequence[Point]) -> list[Point]:
    """(keep, times faster) of (keep, ratio), where keep is shown."""
    return [(keep, 1 / ratio) for keep, ratio in points if SPARSEST <= keep <= DENSEST]


def draw_speedups(found: Found) -> Figure:
    works = speedup_works(found)
    mode = "graph" if found.kind == "cuda" else "eager"
    used = [row for work in works for row in found.sweep(work, work.provider, mode)]
    rows = -(-len(works) // 2)
    how = ", CUDA graphs" if found.kind == "cuda" else ""
    title = f"Times faster than dense torch.nn: {device_name(used[-1]['device'])}{how}"
    figure = card(WIDTH, 80 + 218 * rows, title, used)
    axes = grid(figure, len(works), 2, right=98)
    named = [speedups(work, found, axis) for work, axis in zip(works, axes, strict=True)]
    low = min(0.5, *(0.9 * min(line.get_ydata()) for axis in axes for line in axis.lines))
    for axis, names, work in zip(axes, named, works, strict=True):
        axis.set_yscale("log", base=2)
        axis.set_xlim(DENSEST + 0.02, SPARSEST)
        axis.set_ylim(low, 1.1 / SPARSEST)
        plain_ticks(axis.yaxis, [0.5, 1, 2, 4, 8])
        plain_ticks(axis.xaxis, [1, 0.75, 0.5, 0.25, 0.1])
        axis.set_xlabel("keep: share of open gates")
        axis.set_ylabel("times faster")
        axis.set_title(work.title, pad=10)
        name_lines(axis, names)
    return figure


def speedup_works(found: Found) -> list[Work]:
    """Those timed at the ends of the axis; whole nets have a picture of their own."""
    mode = "graph" if found.kind == "cuda" else "eager"
    return [
        work
        for work in found.works()
        if work.op not in NETS and len(fast(curve(found.sweep(work, work.provider, mode)))) > 2
    ]


# ---- whole nets


def draw_nets(lines: Sequence[Line]) -> Figure:
    """Step time over dense against keep."""
    used = [row for one in lines for row in one.rows]
    figure = card(WIDTH, 360, "A training step of gated nets, as a share of the dense step", used)
    (axis,) = grid(figure, 1, 1, right=150, above=16)
    axis.axhline(1, color=FAINT, linewidth=1)
    axis.plot([1, 0], [1, 0], color=INK, linewidth=1, dashes=(1, 2))
    names = [("dense torch.nn", 1.0, FAINT), ("ideal", 0.0, INK)]
    for one, color in zip(lines, (OURS, OTHER, PLAIN), strict=False):
        points = curve(one.rows)
        axis.plot(*zip(*points, strict=True), color=color, linewidth=2.4, marker="o", markersize=5)
        names.append((one.title.partition(",")[0], points[-1][1], color))
    axis.set_xlim(1.02, 0)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    plain_ticks(axis.yaxis, [0, 0.25, 0.5, 0.75, 1])
    plain_ticks(axis.xaxis, [1, 0.75, 0.5, 0.25, 0])
    axis.set_xlabel("keep: share of open units")
    axis.set_ylabel("step time / dense step time")
    name_lines(axis, names)
    return figure


# ---- training runs

TRAINED = {"train_lenet5.py": "LeNet-5-Caffe", "train_lenet300.py": "LeNet-300-100"}


def run_title(run: str) -> str:
    """The net and what it learns; of a run that training.py no longer has, its name."""
    if run not in EXAMPLES:
        return run
    script, needs = EXAMPLES[run]
    return f"{TRAINED[script]}, {'MNIST' if needs else 'digits'}"


def draw_training(rows: Sequence[Row]) -> Figure:
    """Median step time of the gated and of the dense net, epoch by epoch."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    columns = min(3, len(runs))
    height = 80 + 260 * -(-len(runs) // columns)
    figure = card(WIDTH, height, f"Step time over training: {device_name(rows[-1]['device'])}", rows)
    for run, axis in zip(runs, grid(figure, len(runs), columns, right=14, above=50), strict=True):
        part = [row for row in rows if row["run"] == run]
        epochs = [int(row["epoch"]) for row in part]
        curves = {"with gates": ("step_ms", OURS, 2.4), "dense": ("dense_ms", OTHER, 1.6)}
        highest, ends = 0.0, {}
        for name, (column, color, width) in curves.items():
            ms = [float(row[column]) for row in part if row[column]]
            if len(ms) == len(part):
                axis.plot(epochs, ms, color=color, linewidth=width)
                highest, ends[name] = max(highest, *ms), max(ms[-len(ms) // 3 :])
        axis.set_ylim(0, 1.35 * highest)
        for name, end in ends.items():
            below = name != max(ends, key=lambda n: ends[n])
            axis.annotate(
                name,
                (epochs[-1], min(end, float(part[-1][curves[name][0]])) if below else end),
                (0, -6 if below else 6),
                textcoords="offset points",
                ha="right",
                va="top" if below else "bottom",
                color=curves[name][1],
            )
        last = part[-1]
        axis.set_title(run_title(run), fontsize=12, pad=22)
        told = f"error {float(last['test_error']):.2%}, FLOPs {float(last['expected_flops']):.0%} of dense"
        axis.text(0, 1.04, told, transform=axis.transAxes, fontsize=11, color=FAINT)
        axis.set_xlabel("epoch")
        axis.set_ylabel("ms per step")
    return figure


# ---- the paper's nets


def draw_paper(runs: Sequence[Row], epochs: Sequence[Row]) -> Figure:
    """Step time and expected FLOPs over the dense net's by epoch: a panel a net, a line a seed."""
    nets = [net for net in paper.SETTINGS if any(row["net"] == net for row in runs)]
    columns = min(2, len(nets))
    height = 80 + 250 * -(-len(nets) // columns)
    title = "The paper's nets, by epoch, as shares of the dense net"
    figure = card(WIDTH, height, title, runs, commits=False)
    for net, axis in zip(nets, grid(figure, len(nets), columns, right=112), strict=True):
        setting = paper.SETTINGS[net]
        part = [row for row in epochs if row["net"] == net and row["lambdas"] == setting.told]
        ends: dict[str, float] = {}
        for seed in dict.fromkeys(row["seed"] for row in part):
            own = [row for row in part if row["seed"] == seed]
            numbers = [int(row["epoch"]) for row in own]
            times = smooth([float(row["step_ms"]) / float(row["dense_ms"]) for row in own])
            flops = [float(row["expected_flops"]) for row in own]
            for name, values, color in (("step time", times, OURS), ("E[FLOPs]", flops, OTHER)):
                axis.plot(numbers, values, color=color, linewidth=1.2)
                ends[name] = values[-1]
        axis.axhline(1, color=FAINT, linewidth=1)
        axis.set_ylim(0, max(1.05, axis.get_ylim()[1]))
        axis.set_xlim(left=0)
        axis.set_xlabel("epoch")
        axis.set_ylabel("share of dense")
        told = paper.brief(setting.told)
        title = f"lambda {told}" if setting.lambdas else f"budget to {setting.open}"
        axis.set_title(f"{setting.example.title}, {title}", fontsize=12)
        colors = {"step time": OURS, "E[FLOPs]": OTHER}
        name_lines(axis, [("dense", 1.0, FAINT), *((name, end, colors[name]) for name, end in ends.items())])
    return figure


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running medians: what else the machine did meets single epochs."""
    return [median(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))]


def draw_wrn(rows: Sequence[Row]) -> Figure:
    """Step time over the dense one against the expected FLOPs."""
    first = rows[0]
    title = f"A training step of WRN-{first['depth']}-{first['width']}, as a share of the dense step"
    figure = card(WIDTH, 360, title, rows)
    (axis,) = grid(figure, 1, 1, right=200, above=16)
    axis.axhline(1, color=FAINT, linewidth=1)
    axis.plot([1, 0], [1, 0], color=INK, linewidth=1, dashes=(1, 2))
    names = [("dense torch.nn", 1.0, FAINT), ("ideal", 0.0, INK)]
    for order, color in zip(wrn.ORDERS, (OURS, OTHER), strict=True):
        points = [
            (float(row["expected_flops"]), float(row["gated_ms"]) / float(row["dense_ms"]))
            for row in rows
            if row["order"] == order
        ]
        axis.plot(*zip(*points, strict=True), color=color, linewidth=2.4, marker="o", markersize=5)
        names.append((f"gates {order}", points[-1][1], color))
    axis.set_xlim(1.02, 0)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    plain_ticks(axis.xaxis, [1, 0.75, 0.5, 0.25, 0])
    axis.set_xlabel("expected FLOPs, of the dense net's")
    axis.set_ylabel("step time / dense step time")
    name_lines(axis, names)
    return figure


def result_files() -> list[Path]:
    others = (path for path in (paper.PATH, wrn.PATH) if path.is_file())
    return [*device_files(), *sorted(RESULTS.glob("*-training.csv")), *others]


def pictures(paths: Sequence[Path]) -> Iterator[Picture]:
    """Those that results files give."""
    sources: dict[Path, Found] = {}
    for path in paths:
        rows = read(path)
        if rows and "run" in rows[0]:
            yield Picture(path.with_suffix(".svg"), (path,), partial(draw_training, rows))
        elif rows and "net" in rows[0]:
            whole = [row for row in rows if row["data"] == "mnist"]
            of_epochs = path.with_stem(f"{path.stem}-epochs")
            yield Picture(
                path.with_suffix(".svg"), (path, of_epochs), partial(draw_paper, whole, read(of_epochs))
            )
        elif rows and "p_open" in rows[0]:
            yield Picture(path.with_suffix(".svg"), (path,), partial(draw_wrn, rows))
        elif rows:
            sources[path] = found = Found(rows)
            if speedup_works(found):
                out = path.with_name(f"{path.stem}-speedup.svg")
                yield Picture(out, (path,), partial(draw_speedups, found))
    for kind in ("cpu", "cuda"):
        lines = [one for op, one in net_lines(sources.values(), kind).items() if op in NETS]
        used = tuple(path for path, found in sources.items() if any(one.found is found for one in lines))
        if lines:
            out = used[0].with_name(f"nets-{'gpu' if kind == 'cuda' else kind}.svg")
            yield Picture(out, used, partial(draw_nets, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "plot.py bench/results/nvidia-h200.csv")
    parser.add_argument("paths", nargs="*", type=Path, help="default: all in bench/results")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a picture is not of its rows")
    args = parser.parse_args(argv)
    stale = False
    for picture in pictures(args.paths or result_files()):
        if not args.check:
            picture.save()
            print(f"{picture.out}: {picture.out.stat().st_size / 1024:.0f} kB")
        elif not picture.current:
            stale = True
            print(f"{picture.out}: older than its rows: run `python bench/plot.py`")
    return int(stale)


if __name__ == "__main__":
    cli.run(main)
