"""Runs examples/prune_minilm.py and writes the lines of its table to
bench/results/accuracy/minilm.csv, in place of those of the same keep, steps and seed. With --write a table
of all goes between the markers of docs/guides/prune-an-encoder.md; --check says whether it stands there."""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import cli
import documents
import torch
from documents import header, line
from rows import RESULTS, Row, append, common_fields, machine, read

OF_RUN = ("keep", "steps", "seed")
FIELDS = (
    *("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment"),
    *("transformers", *OF_RUN, "name", "parameters", "heads", "units"),
    *("cosine", "pairs", "lee_pearson", "lee_spearman", "words", "encode_ms", "step_ms", "saved_mb"),
)
"""Behind OF_RUN: see Row of examples/distil.py."""
DOCUMENT = Path("docs", "guides", "prune-an-encoder.md")
PATH = RESULTS / "accuracy" / "minilm.csv"


def run(wanted: Row, options: Sequence[str]) -> list[Row]:
    """The lines of the table of a run."""
    with tempfile.TemporaryDirectory(prefix="l0kernels-minilm-") as out:
        script = str(documents.ROOT / "examples" / "prune_minilm.py")
        of_run = [part for name, value in wanted.items() for part in (f"--{name}", value)]
        command = [sys.executable, script, "--out", out, *of_run, *options]
        subprocess.run(command, check=True)
        with (Path(out) / "table.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
    return [{name: _short(value) for name, value in row.items()} for row in found]


def _short(value: str) -> str:
    """Numbers to five digits."""
    try:
        return value if value.isdecimal() else f"{float(value):.5g}"
    except ValueError:
        return value


def replaced(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`rows` with these in place of those of the same run."""
    runs = {_of_run(row) for row in new}
    return [*(row for row in rows if _of_run(row) not in runs), *new]


def _of_run(row: Row) -> tuple[float, ...]:
    return tuple(float(row[name]) for name in OF_RUN)


def table(rows: Sequence[Row]) -> str:
    lines = header(
        *("", "encoder", "cos to teacher", "order of pairs", "Lee-50, Pearson", "Lee-50, Spearman"),
        *("WordSim-353", "encoding", "step", "kept for backward"),
    )
    runs: dict[tuple[float, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(_of_run(row), []).append(row)
    for (keep, steps, _), own in sorted(runs.items(), reverse=True):
        teacher, *others = own
        if len(lines) == 2:
            lines.append(line("teacher", *_cells(teacher, teacher)))
        lines += [
            line(f"{row['name']}, {steps:g} steps to {keep:g}", *_cells(row, teacher)) for row in others
        ]
    first = rows[0]
    versions = f"transformers {first['transformers']}, {first['threads']} thread(s)"
    origin = f"{machine(rows)}, {versions}. Measured by `python bench/minilm.py`."
    return "\n".join([*lines, "", origin])


def _cells(row: Row, teacher: Row) -> list[str]:
    scores = [
        f"{float(row[name]):.3f}" for name in ("cosine", "pairs", "lee_pearson", "lee_spearman", "words")
    ]
    shares = [
        f"{float(row[name]) / float(teacher[name]):.2f}" if row[name] else ""
        for name in ("encode_ms", "step_ms", "saved_mb")
    ]
    return [f"{float(row['parameters']) / float(teacher['parameters']):.3f}", *scores, *shares]


def document(rows: Sequence[Row], write: bool) -> int:
    path = documents.ROOT / DOCUMENT
    text, changed = documents.filled(path.read_text(), {"minilm": table(rows)}, ("minilm",))
    if write:
        path.write_text(text)
    stale = bool(changed) and not write
    print(f"{DOCUMENT}: {'not what the results give' if stale else 'as the results give it'}")
    return int(stale)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "minilm.py --keep 0.35")
    parser.add_argument("--write", action="store_true", help="the table into the manual; runs nothing")
    parser.add_argument("--check", action="store_true", help="exit status 1 if --write would change it")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--baseline", action="store_true", help="the example's --baseline, too")
    parser.add_argument("--data", type=Path, help="where downloads are kept; default: the example's")
    args = parser.parse_args(argv)
    if args.write or args.check:
        return document(read(PATH), args.write)
    wanted = {name: f"{getattr(args, name):g}" for name in OF_RUN}
    options = ["--threads", str(args.threads), *(("--data", str(args.data)) if args.data else ())]
    options += ["--baseline"] if args.baseline else []
    torch.set_num_threads(args.threads)
    common = common_fields("cpu") | {"transformers": version("transformers")} | wanted
    new = [common | row for row in run(wanted, options)]
    rows = replaced(read(PATH) if PATH.exists() else [], new)
    PATH.unlink(missing_ok=True)
    append(PATH, rows, FIELDS)
    return 0


if __name__ == "__main__":
    cli.run(main)
