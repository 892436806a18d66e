"""Prints what the results files hold as tables; with --write puts them between the markers of README.md,
docs/benchmarks.md and docs/guides/proximal.md, and with --check says whether what stands there is what the
files give. A file whose name is given is read alone; else those of every machine in bench/results are."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cli
import documents
import paper
import proximal
import wrn
import zoo
from documents import header, line
from found import Found, break_even, curve, device_files, load
from registry import FEW_KEEPS, NETS, PROVIDERS, TABLE_KEEPS, WORKS, Keep, Work, keep_name
from rows import RESULTS, Row, machine

MISSING = "-"
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward", "step": "step"}
OTHERS = {
    "dense": "torch.nn, dense",
    "masked": "masked (x @ (W * z))",
    "masked_compiled": "masked, torch.compile",
    "index_select": "index_select + product",
    "grouped_mm": "grouped_mm",
}
KINDS = {"cpu": "CPU", "cuda": "GPU"}
COMMANDS = {"cpu": "make bench-cpu", "cuda": "make gpu-check"}
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
FAIRLY = 1.1
"""By how much a dense variant must be faster than torch.nn as installed for the small table to name it."""


def short(keep: Keep) -> str:
    return keep_name(keep).removeprefix("0") or "0"


def ratio(row: Row | None, column: str = "stock") -> str:
    return f"{float(row[column]):.2f}" if row and row[column] else ""


def pair(first: str, second: str) -> str:
    return f"{first or MISSING} / {second or MISSING}" if first or second else MISSING


def even_cell(points: Sequence[tuple[float, float]]) -> str:
    """The break-even keep; "none" only where it was looked for down to the sparsest column."""
    keep = break_even(points)
    if keep is None:
        return "none" if points and points[-1][0] <= TABLE_KEEPS[-1] else MISSING
    text = f"{keep:.2f}".removeprefix("0")
    return f"≥ {text}" if keep == points[0][0] < 1 else text


class Line(NamedTuple):
    """A line of a table and the rows that it was made of."""

    work: Work
    title: str
    cells: list[str]
    rows: list[Row]
    found: Found


def ratio_lines(work: Work, found: Found) -> list[Line]:
    """Ours to dense at each density and the density of equal time: stock / fair, on a GPU graph / eager."""
    on_gpu = work.device == "cuda"
    ways = [("graph", "stock"), ("eager", "stock")] if on_gpu else [("eager", "stock"), ("eager", "fair")]
    lines = []
    # Where CUDA kernels are the default, Triton's stand beside them.
    for name in dict.fromkeys([work.provider, *(["triton"] if work.provider == "cuda" else [])]):

        def cell(keep: Keep, name: str = name) -> str:
            return pair(*(ratio(found.row(work, keep, name, mode), column) for mode, column in ways))

        sweeps = [found.sweep(work, name, mode) for mode, _ in ways]
        evens = [even_cell(curve(rows, column)) for rows, (_, column) in zip(sweeps, ways, strict=True)]
        kernels = f", `{name}` kernels" if work.provider == "cuda" else ""
        used = sweeps[0] + (sweeps[1] if on_gpu else [])
        lines.append(
            Line(work, work.title + kernels, [*map(cell, TABLE_KEEPS), " / ".join(evens)], used, found)
        )
        for keep in work.own_keeps:
            modes = dict.fromkeys(mode for mode, _ in ways)
            rows = [row for mode in modes if (row := found.row(work, keep, name, mode))]
            title = f"the same, {keep_name(keep)} units open: {cell(keep)}"
            lines.append(Line(work, title, [""] * (len(TABLE_KEEPS) + 1), rows, found))
    return lines


def time_lines(work: Work, found: Found) -> list[Line]:
    """ms of every way to compute a work at keep 1, .5 and .1; on a GPU in CUDA graphs."""
    mode = "graph" if work.device == "cuda" else "eager"
    cells, used = [], []
    for name in (*OTHERS, work.provider):
        rows = [found.row(work, keep, name, mode) for keep in FEW_KEEPS]
        used += [row for row in rows if row]
        cells.append(" / ".join(row["ms"] if row else MISSING for row in rows) if any(rows) else MISSING)
    return [Line(work, work.title, cells, used, found)]


def render(head: Sequence[str], lines: Sequence[Line]) -> str:
    """A table of the lines and columns that hold a figure, and below it where they come from."""
    lines = [one for one in lines if one.rows]
    if not lines:
        return ""
    used = [row for one in lines for row in one.rows]
    devices = list(dict.fromkeys(row["device"] for row in used))
    columns = [i for i in range(len(head) - 1) if any(one.cells[i] not in ("", MISSING) for one in lines)]
    text = header(head[0], *(head[i + 1] for i in columns))
    for one in lines:
        mark = f" {MARKS[devices.index(one.rows[0]['device'])]}" if len(devices) > 1 else ""
        text.append(line(one.title + mark, *(one.cells[i] for i in columns)))
    kind = "cuda" if any(one.work.device == "cuda" for one in lines) else "cpu"
    return "\n".join([*text, "", f"{origins(used)}. Measured by `{COMMANDS[kind]}`."])


def origins(rows: Sequence[Row], brief: bool = False) -> str:
    """The machines, versions, commits and dates of rows, with the marks of the lines."""
    devices = dict.fromkeys(row["device"] for row in rows)
    texts = [machine([row for row in rows if row["device"] == device], brief) for device in devices]
    return ". ".join(f"{MARKS[i]} {text}" for i, text in enumerate(texts)) if len(texts) > 1 else texts[0]


def ratios(sources: Iterable[Found], kind: str) -> str:
    what = "CUDA graph / eager" if kind == "cuda" else "stock / fair"
    keeps = [short(keep) for keep in TABLE_KEEPS]
    head = (f"ratio to dense: {what}", f"keep {keeps[0]}", *keeps[1:], "break-even keep")
    return render(head, [one for work, found in entries(sources, kind) for one in ratio_lines(work, found)])


def times(sources: Iterable[Found], kind: str) -> str:
    keeps = " / ".join(short(keep) for keep in FEW_KEEPS)
    suffix = ", CUDA graph" if kind == "cuda" else ""
    head = (f"ms at keep {keeps}{suffix}", *OTHERS.values(), "l0kernels")
    return render(head, [one for work, found in entries(sources, kind) for one in time_lines(work, found)])


def entries(sources: Iterable[Found], kind: str) -> list[tuple[Work, Found]]:
    """The works of the tables of a kind of device, each with every machine that has rows of it."""
    places = [(work, found) for found in sources if found.kind == kind for work in found.works()]
    order = [(work.op, work.shape, work.dtype) for work in WORKS if work.device == kind]
    return sorted(places, key=lambda place: order.index((place[0].op, place[0].shape, place[0].dtype)))


def nets(sources: Iterable[Found]) -> str:
    """The README's table: time over dense at two densities and the break-even, on CPU and GPU."""
    sources = list(sources)
    columns = {name: found for kind, name in KINDS.items() if (found := net_lines(sources, kind))}
    if not columns:
        return ""
    keeps = FEW_KEEPS[1:]
    used = {name: [row for one in lines.values() for row in one.rows] for name, lines in columns.items()}
    devices = {name: list(dict.fromkeys(row["device"] for row in rows)) for name, rows in used.items()}
    heads = [
        (f"{name}: keep {short(keeps[0])}", *map(short, keeps[1:]), "break-even keep") for name in columns
    ]
    text = header("time of a training step / dense", *(cell for cells in heads for cell in cells))
    for op, title in NETS.items():
        of_op = {name: lines.get(op) for name, lines in columns.items()}
        if not any(of_op.values()):
            continue
        marks = [
            MARKS[devices[n].index(one.rows[0]["device"])]
            for n, one in of_op.items()
            if one and len(devices[n]) > 1
        ]
        cells = [cell for one in of_op.values() for cell in (one.cells if one else [""] * len(heads[0]))]
        text.append(line(" ".join([title, *marks]), *cells))
    places = [f"{name}: {origins(rows, brief=True)}." for name, rows in used.items()]
    return "\n".join([*text, "", *places, *net_notes(columns)])


def net_lines(sources: Iterable[Found], kind: str) -> dict[str, Line]:
    """By op, in the order of NETS; of several machines the one with the newest row."""
    mode = "graph" if kind == "cuda" else "eager"
    lines: dict[str, Line] = {}
    for work, found in entries(sources, kind):
        sweep = found.sweep(work, work.provider, mode)
        known = lines.get(work.op)
        if work.op in NETS and sweep and (known is None or newest(known.rows) <= newest(sweep)):
            figures = [ratio(found.row(work, keep, work.provider, mode)) for keep in FEW_KEEPS[1:]]
            even = even_cell(curve(sweep)).replace(MISSING, "")
            lines[work.op] = Line(work, NETS[work.op], [*figures, even], sweep, found)
    return {op: lines[op] for op in NETS if op in lines}


def newest(rows: Iterable[Row]) -> str:
    return max(row["date"] for row in rows)


def net_notes(columns: dict[str, dict[str, Line]]) -> list[str]:
    """What the small table's figures leave out."""
    notes = []
    blocks = [(name, lines["ffn"].work) for name, lines in columns.items() if "ffn" in lines]
    sizes = [f"{' x '.join(map(str, work.shape))} in {work.dtype} on the {name}" for name, work in blocks]
    if sizes:
        notes.append(f"The block: forward and backward, {', '.join(sizes)}.")
    if "GPU" in columns:
        notes.append("GPU steps are replayed from a CUDA graph.")
    keep = FEW_KEEPS[1]
    slower = []
    for name, lines in columns.items():
        halves = [
            (one, one.found.row(one.work, keep, one.work.provider, one.rows[0]["mode"]))
            for one in lines.values()
        ]
        figures = [
            f"{one.title.partition(',')[0]} {ratio(row, 'fair')}"
            for one, row in halves
            if row and float(row["fair"]) > FAIRLY * float(row["stock"])
        ]
        slower += [f"{name} {', '.join(figures)}"] if figures else []
    if slower:
        notes.append(f"Against the fastest dense variant, at keep {short(keep)}: {'; '.join(slower)}.")
    return notes


def verdict(measured: str, target: str) -> str:
    """ "met", or by how much the target was missed."""
    excess = float(measured) / float(target) - 1
    return "met" if excess <= 0 else f"+{100 * excess:.0f} %"


def targets(works: Sequence[Work], found: Found) -> str:
    """For each work: measured ratios, targets and verdicts, stock / fair, in the mode the targets are for."""
    lines = header("ratio to dense, stock / fair", *(f"keep {short(keep)}" for keep in TABLE_KEEPS))
    for work in works:
        if not found.of(work):
            continue
        keeps = [*TABLE_KEEPS, *work.own_keeps]
        rows = [found.row(work, keep, work.provider, work.mode) for keep in keeps]
        measured, wanted, verdicts = [], [], []
        for keep, row in zip(keeps, rows, strict=True):
            stock, fair = work.targets.get(keep, (None, None))
            measured.append(pair(ratio(row, "stock"), ratio(row, "fair")))
            wanted.append(pair(f"{stock:g}" if stock else "", f"{fair:g}" if fair else ""))
            verdicts.append(
                pair(
                    verdict(row["stock"], str(stock)) if row and row["stock"] and stock else "",
                    verdict(row["fair"], str(fair)) if row and row["fair"] and fair else "",
                )
            )
        n = len(TABLE_KEEPS)
        lines.append(line(f"{work.label}, {PASS_NAMES[work.main_pass]}, {work.mode}", *measured[:n]))
        if work.targets:
            lines.append(line("· target", *wanted[:n]))
            lines.append(line("· verdict", *verdicts[:n]))
        for i, keep in enumerate(keeps[n:], n):
            text = f"· {keep_name(keep)} open: {measured[i]}, target {wanted[i]}, {verdicts[i]}"
            lines.append(line(text, *[""] * n))
    return "\n".join(lines)


def even(works: Sequence[Work], found: Found) -> str:
    """The density at which each of our backends takes as long as dense, for every work, pass and mode."""
    lines = header("break-even keep", "pass", "mode", "backend", "stock", "fair")
    for work in works:
        keys = dict.fromkeys((row["pass"], row["mode"], row["provider"]) for row in found.of(work))
        for pass_, mode, name in keys:
            if PROVIDERS.get(name, "").startswith(("l0kernels", "written")):
                rows = found.sweep(work, name, mode, pass_)
                cells = [even_cell(curve(rows, column)) for column in ("stock", "fair")]
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
            rates = ((row["tflops"], "TFLOP/s"), (row["gbps"], "GB/s"))
            rate = next((f", {value} {unit}" for value, unit in rates if value), "")
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


def summary(works: Sequence[Work], rows: Sequence[Row]) -> str:
    """What a run prints at its end."""
    found = Found(rows)
    return "\n\n".join([machine(rows), targets(works, found), even(works, found)])


TABLES: dict[str, Callable[[list[Found]], str]] = {
    "nets": nets,
    "cpu": lambda sources: ratios(sources, "cpu"),
    "cpu-ms": lambda sources: times(sources, "cpu"),
    "gpu": lambda sources: ratios(sources, "cuda"),
    "gpu-ms": lambda sources: times(sources, "cuda"),
}
"""By the names that the markers give them."""


def tables(sources: list[Found]) -> dict[str, str]:
    return {name: make(sources) for name, make in TABLES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "table.py --write")
    parser.add_argument("paths", nargs="*", type=Path, help="default: every machine's in bench/results")
    parser.add_argument("--write", action="store_true", help="into the documents that show them")
    parser.add_argument("--check", action="store_true", help="exit status 1 if --write would change them")
    parser.add_argument("--targets", action="store_true", help="also targets, verdicts, break-even")
    parser.add_argument("--micro", action="store_true", help="also the primitives, our backends side by side")
    parser.add_argument("--all", action="store_true", help="all of these, and every provider's figures")
    args = parser.parse_args(argv)
    if not (args.paths or device_files()):
        parser.error(f"no results in {RESULTS}: run `make bench-cpu` first")
    if (args.write or args.check) and args.paths:
        parser.error("--write, --check: expected no paths, the documents show every machine's results")
    try:
        sources = load(args.paths or device_files())
        if args.write or args.check:
            all_tables = tables(sources) | proximal.tables() | paper.tables() | wrn.tables() | zoo.tables()
            return documents.main(all_tables, args.write)
    except ValueError as error:
        parser.error(str(error))
    parts = list(tables(sources).values())
    for found in sources:
        works = [work for work in WORKS if work.device == found.kind]
        if args.targets or args.all:
            parts += [machine(found.rows), targets(works, found), even(works, found)]
        if args.micro or args.all:
            parts += [micro(found.rows)]
        if args.all:
            parts += [everything(found.rows)]
    print("\n\n".join(filter(None, parts)))
    return 0


if __name__ == "__main__":
    cli.run(main)
