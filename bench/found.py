"""What the results hold of a work: its newest rows, its curve over densities, its break-even."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from registry import WORKS, Keep, Work, keep_name
from rows import RESULTS, Row, latest, read


class Found:
    """The newest rows of one machine, by work, density and provider."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = latest(rows)
        self._by_key = {
            (r["op"], r["shape"], r["dtype"], r["pass"], r["mode"], r["provider"], r["keep"]): r
            for r in self.rows
        }

    @property
    def kind(self) -> str:
        """cpu or cuda, by what the rows hold."""
        return "cuda" if any(row["environment"].startswith("CUDA") for row in self.rows) else "cpu"

    def works(self) -> list[Work]:
        """Those of the tables that have rows here; of a work that was timed forward alone, that."""
        works = []
        for work in WORKS:
            passes = {row["pass"] for row in self.of(work)} if work.device == self.kind else set()
            if work.title and work.main_pass in passes:
                works.append(work)
            elif work.title and "fwd" in passes:
                works.append(replace(work, passes=("fwd",), title=f"{work.title}, forward", targets={}))
        return works

    def of(self, work: Work) -> list[Row]:
        """All rows of a work."""
        wanted = work.op, work.shape_name, work.dtype
        return [row for row in self.rows if (row["op"], row["shape"], row["dtype"]) == wanted]

    def row(self, work: Work, keep: Keep, provider: str, mode: str) -> Row | None:
        """The one of the work's main pass."""
        key = (work.op, work.shape_name, work.dtype, work.main_pass, mode, provider, keep_name(keep))
        return self._by_key.get(key)

    def sweep(self, work: Work, provider: str, mode: str, pass_: str | None = None) -> list[Row]:
        """The rows at all densities that the gate vectors share, from the densest down."""
        wanted = pass_ or work.main_pass, mode, provider
        rows = [
            row
            for row in self.of(work)
            if (row["pass"], row["mode"], row["provider"]) == wanted and "-" not in row["keep"]
        ]
        return sorted(rows, key=lambda row: float(row["keep"]), reverse=True)


def curve(rows: Iterable[Row], column: str = "stock") -> list[tuple[float, float]]:
    """(keep, figure) of those that have the figure."""
    return [(float(row["keep"]), float(row[column])) for row in rows if row[column]]


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The largest keep at which a ratio to dense is 1, interpolated between those measured; None: at none.

    `points` fall in keep; the first keep where the ratio is at most 1 there.
    """
    if points and points[0][1] <= 1:
        return points[0][0]
    for (k_high, high), (k_low, low) in pairwise(points):
        if high > 1 >= low:
            return k_low + (k_high - k_low) * (1 - low) / (high - low)
    return None


def device_files() -> list[Path]:
    """The results of run.py: other CSV files beside them have a suffix to a device's name."""
    names = {path.stem for path in RESULTS.glob("*.csv")}
    return [
        RESULTS / f"{n}.csv" for n in sorted(names) if not any(n.startswith(f"{m}-") for m in names - {n})
    ]


def load(paths: Iterable[Path]) -> list[Found]:
    """The results of each file.

    Raises:
        ValueError: a file is not there.
    """
    found = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        found.append(Found(read(path)))
    return found
