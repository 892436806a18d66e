"""Writes Nsight Compute's figures of each CUDA kernel to a CSV file, a row per launch; needs a GPU and
ncu."""

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cli

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read_mb",
    "dram__bytes_write.sum": "written_mb",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_pct",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
SCALE = {"us": 1e-3, "read_mb": 1e-6, "written_mb": 1e-6}  # from ns and bytes


def calls_of(output: str) -> list[str]:
    """The call that each launch belongs to: cuda_cases.py names a call behind its launches."""
    calls: list[str] = []
    launches = 0
    for line in output.splitlines():
        if line.startswith("==PROF== Profiling"):
            launches += 1
        elif line.endswith(": launched"):
            calls += [line.removesuffix(": launched")] * launches
            launches = 0
    return calls


def kernel_of(demangled: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    match = re.search(r"(\w+_kernel(<.*?>)?)\((?!bool)", demangled)
    return match[1] if match else demangled


def number(text: str | None, scale: float) -> str:
    """A metric that this chip does not have is left empty."""
    try:
        return f"{float((text or '').replace(',', '')) * scale:.4g}"
    except ValueError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "cuda_ncu.py profile.csv --only pack")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--limit-s", type=float, default=300.0)
    args = parser.parse_args(argv)
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        print("ncu is not installed")
        return 1
    cases = str(Path(__file__).resolve().parent / "cuda_cases.py")
    command = [ncu, "--csv", "--page=raw", "--print-units=base", f"--metrics={','.join(METRICS)}"]
    command += ["--kernel-name-base=demangled", "--kernel-name=regex:l0::cuda", "--target-processes=all"]
    command += [sys.executable, cases, "target", f"--only={args.only}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"ncu: out of time after {args.limit_s:.0f} s; --only takes a part of the calls")
        return 1
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        print(
            "ncu may not read the performance counters here: ERR_NVGPUCTRPERM, they need CAP_SYS_ADMIN or the"
        )
        print("driver's option NVreg_RestrictProfilingToAdminUsers=0")
        return 1
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    rows = [
        row for row in csv.DictReader(io.StringIO("\n".join(lines))) if row.get("ID")
    ]  # not that of units
    if not rows:
        print(f"ncu gave no figures, exit {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
        return 1
    calls = calls_of(done.stdout)
    if len(calls) != len(rows):
        calls = [""] * len(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["call", "kernel", *METRICS.values()])
        for call, row in zip(calls, rows, strict=True):
            values = (number(row.get(metric), SCALE.get(name, 1.0)) for metric, name in METRICS.items())
            writer.writerow([call, kernel_of(row["Kernel Name"]), *values])
    print(args.out.read_text())
    return 0


if __name__ == "__main__":
    cli.run(main)
