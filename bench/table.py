"""The README's tables from a results file: ``python bench/table.py [bench/results/NAME.csv] [--all]``.

Without a file those of every device in bench/results. What was not timed reads "not measured".
"""

import argparse
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from registry import FEW_KEEPS, PROVIDERS, TABLE_KEEPS, WORKS, Keep, Work, keep_name
from rows import RESULTS, Row, latest, machine, read

MISSING = "not measured"
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward", "step": "step"}
OTHERS = ("dense", "masked", "masked_compiled", "index_select", "grouped_mm")
TITLES = {
    "dense": "torch.nn, dense",
    "masked": "masked (x @ (W * z))",
    "masked_compiled": "masked, torch.compile",
    "index_select": "index_select + product",
    "grouped_mm": "grouped_mm",
}


class Found:
    """The newest rows of works, by density and provider."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = latest(rows)
        self._by_key = {
            (r["op"], r["shape"], r["dtype"], r["pass"], r["mode"], r["provider"], r["keep"]): r
            for r in self.rows
        }

    def row(self, work: Work, keep: Keep, provider: str, mode: str, pass_: str | None = None) -> Row | None:
        """Where a work has no row of a density of its own, none."""
        key = (work.op, work.shape_name, work.dtype, pass_ or work.main_pass, mode, provider, keep_name(keep))
        return self._by_key.get(key)

    def has(self, work: Work) -> bool:
        return any(
            (r["op"], r["shape"], r["dtype"]) == (work.op, work.shape_name, work.dtype) for r in self.rows
        )

    def curve(
        self, work: Work, provider: str, mode: str, column: str = "stock", pass_: str | None = None
    ) -> list[tuple[float, float]]:
        """(keep, figure), from the densest down."""
        points = []
        for row in self.rows:
            key = (row["op"], row["shape"], row["dtype"], row["pass"], row["mode"], row["provider"])
            wanted = work.op, work.shape_name, work.dtype, pass_ or work.main_pass, mode, provider
            if key == wanted and row[column] and "-" not in row["keep"]:
                points.append((float(row["keep"]), float(row[column])))
        return sorted(points, reverse=True)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def header(*cells: str) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def short(keep: Keep) -> str:
    return keep_name(keep).removeprefix("0") or "0"


def ratio(row: Row | None, column: str) -> str:
    return f"{float(row[column]):.2f}" if row and row[column] else ""


def pair(first: str, second: str) -> str:
    return f"{first or '-'} / {second or '-'}" if first or second else MISSING


def break_even(curve: Sequence[tuple[float, float]]) -> float | None:
    """The largest keep at which a ratio to dense is 1, interpolated between those measured; None: at none.

    `curve` falls in keep; 1 where the ratio is at most 1 with everything open.
    """
    if curve and curve[0][1] <= 1:
        return curve[0][0]
    for (k_high, high), (k_low, low) in pairwise(curve):
        if high > 1 >= low:
            return k_low + (k_high - k_low) * (1 - low) / (high - low)
    return None


def even_cell(curve: Sequence[tuple[float, float]]) -> str:
    if not curve:
        return MISSING
    keep = break_even(curve)
    return "none" if keep is None else f"{keep:.2f}".removeprefix("0")


def own_providers(work: Work) -> list[str]:
    """Ours as it is by default; on a GPU, where the CUDA kernels are that, Triton's too."""
    return [work.provider, *(["triton"] if work.provider == "cuda" else [])]


def ratios(works: Sequence[Work], found: Found) -> str:
    """Ours to dense at each density and the density of equal time; stock / fair, on a GPU graph / eager."""
    on_gpu = works[0].device == "cuda"
    what = "CUDA graph / eager" if on_gpu else "stock / fair"
    keeps = [short(keep) for keep in TABLE_KEEPS]
    head = (f"ratio to dense: {what}", f"keep {keeps[0]}", *keeps[1:], "break-even keep")
    lines = header(*head)
    for work in works:
        for i, name in enumerate(own_providers(work)):
            kernels = f", `{name}` kernels" if work.provider == "cuda" else ""
            title = work.title if i == 0 else "the same"

            def cell(keep: Keep, work: Work = work, name: str = name) -> str:
                if on_gpu:
                    rows = [found.row(work, keep, name, mode) for mode in ("graph", "eager")]
                    return pair(*(ratio(row, "stock") for row in rows))
                row = found.row(work, keep, name, "eager")
                return pair(ratio(row, "stock"), ratio(row, "fair"))

            if on_gpu:
                curves = [found.curve(work, name, mode) for mode in ("graph", "eager")]
            else:
                curves = [found.curve(work, name, "eager", column) for column in ("stock", "fair")]
            even = " / ".join(map(even_cell, curves)) if any(curves) else MISSING
            lines.append(line(title + kernels, *(cell(keep) for keep in TABLE_KEEPS), even))
            for keep in work.own_keeps:
                text = f"· at {keep_name(keep)} open: {cell(keep)}"
                lines.append(line(text, *[""] * (len(TABLE_KEEPS) + 1)))
    return "\n".join(lines)


def times(works: Sequence[Work], found: Found) -> str:
    """ms of every way to compute a work at keep 1, .5 and .1; on a GPU in CUDA graphs."""
    mode = "graph" if works[0].device == "cuda" else "eager"
    names = [
        name
        for name in OTHERS
        if any(found.row(work, keep, name, mode) for work in works for keep in FEW_KEEPS)
    ]
    keeps = " / ".join(short(keep) for keep in FEW_KEEPS)
    suffix = ", CUDA graph" if mode == "graph" else ""
    lines = header(f"ms at keep {keeps}{suffix}", *(TITLES[name] for name in names), "l0kernels")
    for work in works:
        cells = []
        for name in [*names, work.provider]:
            rows = [found.row(work, keep, name, mode) for keep in FEW_KEEPS]
            cells.append(" / ".join(row["ms"] if row else "-" for row in rows) if any(rows) else MISSING)
        lines.append(line(work.title, *cells))
    return "\n".join(lines)


def verdict(measured: str, target: str) -> str:
    """ "met", or by how much the target was missed."""
    excess = float(measured) / float(target) - 1
    return "met" if excess <= 0 else f"+{100 * excess:.0f} %"


def targets(works: Sequence[Work], found: Found) -> str:
    """For each work: measured ratios, targets and verdicts, stock / fair, in the mode the targets are for."""
    lines = header("ratio to dense, stock / fair", *(f"keep {short(keep)}" for keep in TABLE_KEEPS))
    for work in works:
        if not found.has(work):
            continue
        keeps = [*TABLE_KEEPS, *work.own_keeps]
        rows = [found.row(work, keep, work.provider, work.mode) for keep in keeps]
        measured, wanted, verdicts = [], [], []
        for keep, row in zip(keeps, rows, strict=True):
            stock, fair = work.targets.get(keep, (None, None))
            measured.append(pair(ratio(row, "stock"), ratio(row, "fair")))
            wanted.append(pair(f"{stock:g}" if stock else "", f"{fair:g}" if fair else ""))
            verdicts.append(
                ""
                if not (stock or fair)
                else pair(
                    verdict(row["stock"], str(stock)) if row and row["stock"] and stock else "",
                    verdict(row["fair"], str(fair)) if row and row["fair"] and fair else "",
                )
                if row
                else MISSING
            )
        n = len(TABLE_KEEPS)
        lines.append(line(f"{work.label}, {PASS_NAMES[work.main_pass]}, {work.mode}", *measured[:n]))
        if work.targets:
            lines.append(line("· target", *(w if w != MISSING else "" for w in wanted[:n])))
            lines.append(line("· verdict", *verdicts[:n]))
        for i, keep in enumerate(keeps[n:], n):
            text = f"· {keep_name(keep)} open: {measured[i]}, target {wanted[i]}, {verdicts[i]}"
            lines.append(line(text, *[""] * n))
    return "\n".join(lines)


def even(works: Sequence[Work], found: Found) -> str:
    """The density at which each of our backends takes as long as dense, for every work, pass and mode."""
    lines = header("break-even keep", "pass", "mode", "backend", "stock", "fair")
    for work in works:
        keys = dict.fromkeys(
            (row["pass"], row["mode"], row["provider"])
            for row in found.rows
            if (row["op"], row["shape"], row["dtype"]) == (work.op, work.shape_name, work.dtype)
        )
        for pass_, mode, name in keys:
            if PROVIDERS.get(name, "").startswith(("l0kernels", "written")):
                cells = [even_cell(found.curve(work, name, mode, c, pass_)) for c in ("stock", "fair")]
                lines.append(line(work.label, PASS_NAMES[pass_], mode, name, *cells))
    return "\n".join(lines)


def everything(rows: Iterable[Row]) -> str:
    """Every measured figure; TFLOP/s counts the open part of the work."""
    head = ("op", "keep", "pass", "mode", "provider", "ms (p20-p80)", "stock", "fair", "TFLOP/s", "of dense")
    lines = header(*head, "GB/s", "MiB", "launches", "error", "faults", "rejected")
    for row in rows:
        rejected = f"{row['rejected']}/{row['blocks']}" if row["blocks"] else ""
        lines.append(
            line(
                f"{row['op']} {row['shape']} {row['dtype']}",
                *(row[name] for name in ("keep", "pass", "mode", "provider")),
                f"{row['ms']} ({row['ms_p20']}-{row['ms_p80']})",
                *(row[name] for name in ("stock", "fair", "tflops", "of_dense", "gbps", "peak_mb")),
                *(row[name] for name in ("launches", "error", "faults")),
                rejected,
            )
        )
    return "\n".join(lines)


def micro(rows: Sequence[Row]) -> str:
    """The primitives: us and rate of each backend at the same shapes, the fastest and the default one."""
    from micro import BACKENDS, default_of

    ops = {work.op for work in WORKS}
    keys: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] not in ops:
            key = tuple(row[name] for name in ("op", "shape", "dtype", "keep", "pass", "mode"))
            keys.setdefault(key, {})[row["provider"]] = row
    lines = header("primitive", "keep", "mode", "us (p20-p80), rate", "fastest of ours", "default")
    for (op, shape, dtype, keep, pass_, mode), found in keys.items():
        cells = []
        for name, row in found.items():
            us = [f"{1e3 * float(row[column]):.4g}" for column in ("ms", "ms_p20", "ms_p80")]
            rate = (
                f", {row['tflops']} TFLOP/s"
                if row["tflops"]
                else f", {row['gbps']} GB/s"
                if row["gbps"]
                else ""
            )
            cells.append(f"{name} {us[0]} ({us[1]}-{us[2]}){rate}")
        ours = {name: float(row["ms"]) for name, row in found.items() if name in BACKENDS}
        default = default_of(op, list(ours))
        best = min(ours, key=lambda name: ours[name], default="")
        note = ""
        if len(ours) > 1 and default in ours:
            slower = ours[default] / ours[best] - 1
            note = default if best == default else f"{default}, {100 * slower:.0f} % slower"
        what = f"{op} {shape} {dtype}" + ("" if pass_ == "fwd" else f", {PASS_NAMES[pass_]}")
        lines.append(line(what, keep, mode, "; ".join(cells), best if len(ours) > 1 else "", note))
    return "\n".join(lines) if keys else ""


def titled(device: str) -> list[Work]:
    return [work for work in WORKS if work.device == device and work.title]


def kind_of(rows: Sequence[Row]) -> str:
    """cpu or cuda, by what the rows hold."""
    return "cuda" if any(row["environment"].startswith("CUDA") for row in rows) else "cpu"


def summary(works: Sequence[Work], rows: Sequence[Row]) -> str:
    """What a run prints at its end."""
    found = Found(rows)
    return "\n\n".join([machine(rows), targets(works, found), even(works, found)])


def readme(rows: Sequence[Row]) -> str:
    """Exactly the README's tables."""
    found, works = Found(rows), titled(kind_of(rows))
    # What they show, or interpolate between: ours at every density, the others at few.
    few = {keep_name(keep) for keep in FEW_KEEPS}
    used = [
        row
        for row in found.rows
        for work in works
        if (row["op"], row["shape"], row["dtype"]) == (work.op, work.shape_name, work.dtype)
        and (row["provider"] in own_providers(work) or (row["provider"] in OTHERS and row["keep"] in few))
    ]
    return "\n\n".join([machine(used or rows), ratios(works, found), times(works, found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: every device's in bench/results")
    parser.add_argument("--targets", action="store_true", help="also targets, verdicts, break-even")
    parser.add_argument("--micro", action="store_true", help="also the primitives, our backends side by side")
    parser.add_argument("--all", action="store_true", help="all of these, and every provider's figures")
    args = parser.parse_args()
    files = args.paths or device_files()
    if not files:
        parser.error(f"no results in {RESULTS}: run `make bench-cpu` first")
    for path in files:
        if not path.exists():
            parser.error(f"{path}: no such file")
        rows = read(path)
        parts = [readme(rows)]
        found = Found(rows)
        works = [work for work in WORKS if work.device == kind_of(rows)]
        if args.targets or args.all:
            parts += [targets(works, found), even(works, found)]
        if args.micro or args.all:
            parts += [micro(found.rows)]
        if args.all:
            parts += [everything(found.rows)]
        print("\n\n".join(filter(None, parts)), end="\n\n")


def device_files() -> list[Path]:
    """The results of run.py: other CSV files beside them have a suffix to a device's name."""
    names = {path.stem for path in RESULTS.glob("*.csv")}
    return [
        RESULTS / f"{n}.csv" for n in sorted(names) if not any(n.startswith(f"{m}-") for m in names - {n})
    ]


if __name__ == "__main__":
    main()
