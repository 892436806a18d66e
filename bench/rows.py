"""Rows of figures: their columns, the CSV files that hold them, and where each row comes from."""

import csv
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    *("date", "commit", "device", "cores", "threads", "python", "torch", "l0kernels", "environment"),
    *("op", "shape", "dtype", "keep", "pass", "mode", "provider", "ms", "ms_p20", "ms_p80", "calls"),
    *("blocks", "rejected", "faults", "exchange_us", "tflops", "of_dense", "gbps", "peak_mb", "launches"),
    *("error", "stock", "fair", "target_stock", "target_fair"),
)
"""ms per call: median, p20 and p80. blocks and rejected: of calls, on a CPU; faults: pages mapped per call.
exchange_us: that our cores took to exchange data meanwhile, see Exchange in measure.py.
tflops: of the open work; of_dense: its share of the same run's dense rate; gbps: of what must move.
peak_mb: allocated by torch within a call. launches: kernels and copies of a call on the GPU. error: the
largest relative one against fp64. stock, fair: time over that of `dense`, and of the fastest ungated one."""
APART = 1.6
"""By how much an exchange takes longer once the cores share no cache: figures of both are not mixed."""
GENERATIONS = {"25-1": "Zen 3, AVX2", "25-17": "Zen 4, AVX-512", "26-2": "Zen 5, AVX-512"}
"""AMD's names, and the widest vectors, by family and model."""
KEY = ("op", "shape", "dtype", "keep", "pass", "mode", "provider")
Row = dict[str, str]


def git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The short hash, "-dirty" where a tracked file other than results differs; or L0KERNELS_COMMIT."""
    given = os.environ.get("L0KERNELS_COMMIT")
    if given:
        return given
    status = git("status", "--porcelain", "--untracked-files=no").splitlines()
    changed = [line for line in status if "bench/results/" not in line]
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def cpu_name() -> str:
    """The processor's name, with family and model where generations share a marketing name."""
    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    generation = f"{info['cpu family']}-{info['model']}" if "cpu family" in info else ""
    return f"{info.get('model name', platform.machine())} {generation}".strip()


def common_fields(device: str) -> Row:
    """What all rows of a run say of the machine, the versions and the day."""
    import torch

    import l0kernels as l0

    tuned = [name for name in sorted(os.environ) if name.startswith(("MALLOC_", "THP_", "OMP_", "GOMP_"))]
    environment = [f"{name}={os.environ[name]}" for name in tuned]
    if device == "cuda":
        try:
            import triton

            environment = [f"CUDA {torch.version.cuda}", f"triton {triton.__version__}"]
        except ImportError:
            environment = [f"CUDA {torch.version.cuda}", "no triton"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "l0kernels": l0.__version__,
        "environment": " ".join(environment),
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_of(device_name: str) -> Path:
    return RESULTS / f"{slug(device_name)}.csv"


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Iterable[Row], fields: Sequence[str] = FIELDS) -> None:
    """Writes the rows behind those that are there.

    Raises:
        ValueError: the file has other columns.
    """
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


def apart(rows: Iterable[Row]) -> list[Row]:
    """Those measured while the cores were farther apart than during others."""
    rows = list(rows)
    us = [float(row.get("exchange_us") or 0) for row in rows]  # columns of before had none
    nearest = min(filter(None, us), default=0.0)
    return [row for row, value in zip(rows, us, strict=True) if value > APART * nearest]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last measured row of each op, shape, dtype, density, pass, mode and provider; of one commit rather
    one with the cores near each other."""
    rows = list(rows)
    far = {id(row) for row in apart(rows)}
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        known = found.get(key)
        if known and known["commit"] == row["commit"] and id(row) in far and id(known) not in far:
            continue
        found[key] = row
    return list(found.values())


def machine(rows: Sequence[Row], brief: bool = False) -> str:
    """Device, versions, commits and dates that a set of rows came from."""

    def each(name: str, form: str) -> str:
        values = [value for value in dict.fromkeys(row.get(name, "") for row in rows) if value]
        return form.format(listed(values), "s" * (len(values) > 1)) if values else ""

    dates = sorted({row["date"] for row in rows})
    far = len(apart(rows))
    on_gpu = any(row.get("environment", "").startswith("CUDA") for row in rows)
    parts = (
        listed([device_name(name) for name in dict.fromkeys(row["device"] for row in rows)]),
        "" if on_gpu else each("cores", "{} cores"),
        each("torch", "torch {}"),
        "" if brief else each("environment", "{}"),
        "" if brief else each("python", "Python {}"),
        each("commit", "commit{1} {0}"),
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        f"{far} of {len(rows)} figures with the cores apart" if far and not brief else "",
    )
    return ", ".join(filter(None, parts))


def listed(names: Sequence[str]) -> str:
    """Names in a row of words: one, another and a third."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def device_name(device: str) -> str:
    """A processor's name, with its generation for the numbers of family and model where that is known."""
    name, _, generation = device.rpartition(" ")
    known = GENERATIONS.get(generation)
    return f"{name} ({known})" if known else device
