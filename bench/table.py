"""The README's table from a results file: ``python bench/table.py [bench/results/NAME.csv] [--all]``."""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from registry import KEEPS, WORKS, Work

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    *("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment"),
    *("op", "shape", "dtype", "keep", "provider", "ms", "ms_p20", "ms_p80", "calls", "blocks", "rejected"),
    *("faults", "gflops", "stock", "fair", "target_stock", "target_fair"),
)
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """The last measured row of each (op, shape, keep, provider)."""
    return {(row["op"], row["shape"], row["keep"], row["provider"]): row for row in rows}


def verdict(measured: str, target: str) -> str:
    """ "met", or by how much the target was missed."""
    excess = float(measured) / float(target) - 1
    return "met" if excess <= 0 else f"+{100 * excess:.0f} %"


def verdicts(row: Row) -> str:
    """Stock / fair; empty for a row without targets."""
    if not row["target_stock"]:
        return ""
    return f"{verdict(row['stock'], row['target_stock'])} / {verdict(row['fair'], row['target_fair'])}"


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
    return (
        f"{row['device']}, {row['cores']} cores, {row['threads']} threads, torch {row['torch']}, "
        f"Python {row['python']}, commit {row['commit']}, {row['date']} {row['environment']}".rstrip()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="default: the newest file in bench/results")
    parser.add_argument("--all", action="store_true", help="also every provider's figures")
    args = parser.parse_args()
    files = [args.path] if args.path else sorted(RESULTS.glob("*.csv"), key=lambda path: path.stat().st_mtime)
    if not files or not files[-1].exists():
        parser.error(f"no results in {args.path or RESULTS}: run `make bench-cpu` first")
    rows = list(latest(read(files[-1])).values())
    print(machine(rows), targets(WORKS, rows), sep="\n\n")
    if args.all:
        print("", providers(rows), sep="\n")


if __name__ == "__main__":
    main()
