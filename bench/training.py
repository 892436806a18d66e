"""Times steps over a training run and writes them to bench/results/<device>-training.csv, which plot.py
draws. It trains an example and beside it the same net dense; each row holds the medians of
a stretch of epochs."""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cli
from rows import RESULTS, Row, append, common_fields, read, slug

ROOT = Path(__file__).resolve().parent.parent
POINTS = 40
FIELDS = (
    *("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment"),
    *("run", "epoch", "step_ms", "dense_ms", "expected_flops", "test_error"),
)
EXAMPLES = {
    "lenet5-5k": ("train_lenet5.py", ()),
    "lenet5": ("train_lenet5.py", ("--data",)),
    "mnist": ("train_lenet300.py", ("--data",)),
}
"""Runs by name: the script, and the options that it needs a value for."""


def results_of(device: str) -> Path:
    return RESULTS / f"{slug(device)}-training.csv"


def condense(metrics: Sequence[Row], points: int = POINTS) -> list[Row]:
    """Medians over stretches of epochs of equal length, the last epoch's number and error for each."""
    length = -(-len(metrics) // points)
    found = []
    for start in range(0, len(metrics), length):
        part = metrics[start : start + length]
        row = {"epoch": part[-1]["epoch"], "test_error": f"{float(part[-1]['test_error']):.4f}"}
        for name in ("step_ms", "dense_ms", "expected_flops"):
            row[name] = f"{median(float(r[name]) for r in part):.4g}"
        found.append(row)
    return found


def replace_run(path: Path, rows: Sequence[Row]) -> None:
    """The file with these rows in place of those of the same runs."""
    names = {row["run"] for row in rows}
    kept = [row for row in read(path) if row["run"] not in names] if path.exists() else []
    whole = path.with_suffix(".part")
    whole.unlink(missing_ok=True)
    append(whole, [*kept, *rows], FIELDS)
    whole.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "training.py lenet5-5k --epochs 100")
    parser.add_argument("run", nargs="?", choices=list(EXAMPLES), default="lenet5-5k")
    parser.add_argument("--data", type=Path, help="folder of MNIST's four idx .gz files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--epochs", type=int, help="default: the example's")
    parser.add_argument("--csv", type=Path, help="default bench/results/<device>-training.csv")
    args = parser.parse_args(argv)
    script, needs = EXAMPLES[args.run]
    if needs and args.data is None:
        parser.error(f"{args.run}: expected --data, the folder of MNIST's files")
    common = common_fields(args.device)
    with tempfile.TemporaryDirectory(prefix="l0kernels-training-") as out:
        command = [sys.executable, str(ROOT / "examples" / script), "--device", args.device, "--out", out]
        command += ["--epochs", str(args.epochs)] if args.epochs else []
        command += ["--data", str(args.data)] if needs else []
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        with (Path(out) / "metrics.csv").open(newline="") as file:
            rows = condense(list(csv.DictReader(file)))
    path = args.csv or results_of(common["device"])
    replace_run(path, [common | {"run": args.run} | row for row in rows])
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
