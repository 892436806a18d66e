"""Sets two files of rows side by side, B over A; FILE@COMMIT takes the newest rows of one commit. B
differs from A only where the ranges p20 to p80 of the two lie apart: those rows are listed, the largest
ratio on top."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cli
from rows import KEY, Row, latest, machine, read
from table import header, line


class Pair(NamedTuple):
    """A row of A and the row of B with the same key."""

    a: Row
    b: Row

    @property
    def ratio(self) -> float:
        return float(self.b["ms"]) / float(self.a["ms"])

    @property
    def differs(self) -> bool:
        return float(self.b["ms_p20"]) > float(self.a["ms_p80"]) or self.faster

    @property
    def faster(self) -> bool:
        return float(self.b["ms_p80"]) < float(self.a["ms_p20"])


def load(text: str) -> list[Row]:
    """The newest rows of a file, of one commit where ``@COMMIT`` follows its name.

    Raises:
        ValueError: no such file, or no such row in it.
    """
    name, _, commit = text.partition("@")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    rows = [row for row in read(path) if not commit or row["commit"].startswith(commit)]
    if not rows:
        raise ValueError(f"{text}: no row of that commit")
    return latest(rows)


def pairs(a: Sequence[Row], b: Sequence[Row]) -> list[Pair]:
    """What both hold, the largest ratio on top."""
    other = {tuple(row[name] for name in KEY): row for row in b}
    keys = [(row, tuple(row[name] for name in KEY)) for row in a]
    found = [Pair(row, other[key]) for row, key in keys if key in other]
    return sorted(found, key=lambda pair: max(pair.ratio, 1 / pair.ratio), reverse=True)


def spread(row: Row) -> str:
    """Half the range p20 to p80 over the median."""
    return f"{50 * (float(row['ms_p80']) - float(row['ms_p20'])) / float(row['ms']):.1f} %"


def render(found: Sequence[Pair]) -> str:
    lines = header(
        "what", "keep", "pass", "mode", "provider", "A ms", "B ms", "B / A", "spread A, B", "verdict"
    )
    for pair in found:
        a, b = pair
        verdict = "same" if not pair.differs else "faster" if pair.faster else "slower"
        what = f"{a['op']} {a['shape']} {a['dtype']}"
        cells = [a[name] for name in ("keep", "pass", "mode", "provider", "ms")]
        cells += [b["ms"], f"{pair.ratio:.3f}", f"{spread(a)}, {spread(b)}", verdict]
        lines.append(line(what, *cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        __doc__, "compare.py bench/results/nvidia-h200.csv@26281ab bench/results/nvidia-h200.csv"
    )
    parser.add_argument("a", help="FILE or FILE@COMMIT")
    parser.add_argument("b", help="FILE or FILE@COMMIT")
    parser.add_argument("--all", action="store_true", help="also what is the same within the spread")
    parser.add_argument("--provider", nargs="+", help="only these")
    parser.add_argument("--fail-above", type=float, metavar="R", help="as a share: 0.1 is a tenth slower")
    args = parser.parse_args(argv)
    try:
        a, b = load(args.a), load(args.b)
    except ValueError as error:
        parser.error(str(error))
    found = [p for p in pairs(a, b) if not args.provider or p.a["provider"] in args.provider]
    different = [pair for pair in found if pair.differs]
    print(f"A: {machine(a)}\nB: {machine(b)}\n")
    print(render([*different, *(pair for pair in found if not pair.differs)] if args.all else different))
    faster = sum(pair.faster for pair in different)
    print(
        f"\n{len(found)} rows in both, {len(a) - len(found)} only in A, {len(b) - len(found)} only in B: "
        f"{faster} faster, {len(different) - faster} slower, {len(found) - len(different)} within the spread"
    )
    limit = args.fail_above
    return int(limit is not None and any(p.ratio > 1 + limit and not p.faster for p in different))


if __name__ == "__main__":
    cli.run(main)
