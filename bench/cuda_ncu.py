"""Nsight Compute's figures of each CUDA kernel: ``python bench/cuda_ncu.py OUT.csv``, a row per launch."""

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--limit-s", type=float, default=300.0)
    args = parser.parse_args()
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        print("ncu is not installed")
        return 1
    cases = str(Path(__file__).resolve().parent / "cuda_cases.py")
    command = [ncu, "--csv", "--page=raw", "--print-units=base", f"--metrics={','.join(METRICS)}"]
    command += ["--kernel-name-base=demangled", "--kernel-name=regex:l0::cuda", "--target-processes=all"]
    command += [sys.executable, cases, "target", "--once", f"--only={args.only}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit_s, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if not lines:
        print(f"ncu gave no figures, exit {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", *METRICS.values()])
        for row in csv.DictReader(io.StringIO("\n".join(lines))):
            if not row["ID"]:  # the line of units
                continue
            values = [float(row[m].replace(",", "")) * SCALE.get(name, 1.0) for m, name in METRICS.items()]
            writer.writerow([row["Kernel Name"].split("(")[0], *(f"{v:.4g}" for v in values)])
    print(args.out.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
