"""The README's table from a results file: ``python bench/table.py [bench/results/NAME.csv] [--all]``."""

import argparse
import csv
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from registry import GPU_WORKS, KEEPS, WORKS, Work

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    *("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment"),
    *("op", "shape", "dtype", "keep", "provider", "ms", "ms_p20", "ms_p80", "calls", "blocks", "rejected"),
    *("faults", "gflops", "stock", "fair", "target_stock", "target_fair"),
)
GPU_FIELDS = (
    *("date", "commit", "device", "python", "torch", "l0kernels", "environment"),
    *("op", "shape", "dtype", "keep", "pass", "mode", "provider", "ms", "ms_p20", "ms_p80", "calls"),
    *("tflops", "gbps", "peak_mb", "launches", "error", "stock", "fair", "target_stock", "target_fair"),
)
Row = dict[str, str]


def git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    status = git("status", "--porcelain", "--untracked-files=no").splitlines()
    changed = [line for line in status if "bench/results/" not in line]
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Iterable[Row], fields: Sequence[str] = FIELDS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(fields):
            raise ValueError(f"{path}: expected the columns {list(fields)}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """The last measured row of each (op, shape, keep, provider)."""
    return {(row["op"], row["shape"], row["keep"], row["provider"]): row for row in rows}


def gpu_targets(works: Iterable[Work], rows: list[Row]) -> str:
    """For each GPU work, pass and mode: ms and the ratio to dense of every provider at each density."""
    parts = []
    for work in works:
        of_work = [row for row in rows if (row["op"], row["shape"]) == (work.op, work.shape_name)]
        for key in dict.fromkeys((row["pass"], row["mode"]) for row in of_work):
            chosen = [row for row in of_work if (row["pass"], row["mode"]) == key]
            title = f"{work.op} {work.shape_name} {chosen[-1]['dtype']}, {key[0]}, {key[1]}"
            lines = [
                f"| {title}: ms (stock / fair) | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |",
                "|---|" + "---|" * len(KEEPS),
            ]
            for name in dict.fromkeys(row["provider"] for row in chosen):
                found = {row["keep"]: row for row in chosen if row["provider"] == name}
                at = [found.get(f"{keep:g}") for keep in KEEPS]
                cells = [
                    f"{row['ms']} ({row['stock'] or '-'} / {row['fair'] or '-'})" if row else "" for row in at
                ]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
                if any(row and row["target_stock"] for row in at):
                    cells = [
                        f"{row['target_stock']} / {row['target_fair'] or '-'}" if row else "" for row in at
                    ]
                    lines.append("| · target | " + " | ".join(cells) + " |")
                    lines.append(
                        "| · verdict | " + " | ".join(verdicts(row) if row else "" for row in at) + " |"
                    )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def gpu_micro(works: Iterable[Work], rows: list[Row]) -> str:
    """The parts of a step: us, rates."""
    ops = {work.op for work in works}
    lines = ["| part | keep | mode | provider | us (p20-p80) | TFLOP/s | GB/s |", "|" + "---|" * 7]
    for row in rows:
        if row["op"] not in ops:
            us = [f"{1e3 * float(row[name]):.4g}" for name in ("ms", "ms_p20", "ms_p80")]
            what = f"{row['op']} {row['shape']} {row['dtype']}"
            cells = [what, *(row[name] for name in ("keep", "mode", "provider"))]
            cells += [f"{us[0]} ({us[1]}-{us[2]})", row["tflops"], row["gbps"]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_latest(rows: Iterable[Row]) -> list[Row]:
    """The last measured row of each op, shape, density, pass, mode and provider."""
    key = ("op", "shape", "dtype", "keep", "pass", "mode", "provider")
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def verdict(measured: str, target: str) -> str:
    """ "met", or by how much the target was missed."""
    excess = float(measured) / float(target) - 1
    return "met" if excess <= 0 else f"+{100 * excess:.0f} %"


def verdicts(row: Row) -> str:
    """Stock / fair; empty for a row without targets."""
    if not row["target_stock"]:
        return ""
    fair = verdict(row["fair"], row["target_fair"]) if row["target_fair"] else "-"
    return f"{verdict(row['stock'], row['target_stock'])} / {fair}"


def targets(works: Iterable[Work], rows: list[Row]) -> str:
    """For each work: the measured stock / fair ratios at each density, the targets, the verdicts."""
    found = latest(rows)
    lines = [
        "| work (ratio to dense, stock / fair) | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |",
        "|---|" + "---|" * len(KEEPS),
    ]
    for work in works:
        ours = [found.get((work.op, work.shape_name, f"{keep:g}", "ours")) for keep in KEEPS]
        if not any(ours):
            continue
        cells = [f"{float(row['stock']):.2f} / {float(row['fair']):.2f}" if row else "" for row in ours]
        lines.append(f"| {work.op} {work.shape_name} | " + " | ".join(cells) + " |")
        cells = [f"{stock:g} / {fair:g}" for stock, fair in zip(work.stock, work.fair, strict=True)]
        lines.append("| · target | " + " | ".join(cells) + " |")
        cells = [verdicts(row) if row else "" for row in ours]
        lines.append("| · verdict | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def providers(rows: list[Row]) -> str:
    """Every measured figure; GFLOP/s counts the open part of the work."""
    lines = [
        "| op | keep | provider | ms (p20-p80) | stock | fair | GFLOP/s | faults/call | rejected | verdict |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        lines.append(
            f"| {row['op']} {row['shape']} | {row['keep']} | {row['provider']} "
            f"| {row['ms']} ({row['ms_p20']}-{row['ms_p80']}) | {row['stock']} | {row['fair']} "
            f"| {row['gflops']} | {row['faults']} | {row['rejected']}/{row['blocks']} | {verdicts(row)} |"
        )
    return "\n".join(lines)


def machine(rows: list[Row]) -> str:
    row = rows[-1]
    if "mode" in row:
        return (
            f"{row['device']}, torch {row['torch']}, {row['environment']}, Python {row['python']}, "
            f"commit {row['commit']}, {row['date']}"
        )
    return (
        f"{row['device']}, {row['cores']} cores, {row['threads']} threads, torch {row['torch']}, "
        f"Python {row['python']}, commit {row['commit']}, {row['date']} {row['environment']}".rstrip()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="default: the newest file in bench/results")
    parser.add_argument("--device", help="the file of this device, as in nvidia-h200")
    parser.add_argument("--all", action="store_true", help="also every provider's figures")
    args = parser.parse_args()
    if args.device:
        args.path = RESULTS / f"{args.device}.csv"
    files = [args.path] if args.path else sorted(RESULTS.glob("*.csv"), key=lambda path: path.stat().st_mtime)
    if not files or not files[-1].exists():
        parser.error(f"no results in {args.path or RESULTS}: run `make bench-cpu` first")
    rows = read(files[-1])
    if "mode" in rows[-1]:
        rows = gpu_latest(rows)
        print(machine(rows), gpu_targets(GPU_WORKS, rows), gpu_micro(GPU_WORKS, rows), sep="\n\n")
        return
    rows = list(latest(rows).values())
    print(machine(rows), targets(WORKS, rows), sep="\n\n")
    if args.all:
        print("", providers(rows), sep="\n")


if __name__ == "__main__":
    main()
