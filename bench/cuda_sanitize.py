"""Runs every CUDA kernel at small sizes under compute-sanitizer, one line per tool; exit status 0 if all
are clean. memcheck finds accesses out of bounds, racecheck shared memory without a barrier, initcheck
memory that nobody wrote, synccheck barriers that not every thread reaches; a report is printed whole.
Needs a GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cli

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # exit status that tells a finding from a failure to run


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "cuda_sanitize.py --tool memcheck")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    parser.add_argument("--limit-s", type=float, default=240.0, help="per tool")
    args = parser.parse_args(argv)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed")
        return 1
    # Every tensor an allocation of its own, so that its end is the end of what may be touched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    cases = str(Path(__file__).resolve().parent / "cuda_cases.py")
    failed = 0
    for tool in args.tool or TOOLS:
        command = [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", sys.executable, cases, "small"]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=args.limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{tool}: out of time after {args.limit_s:.0f} s")
            failed += 1
            continue
        launched = done.stdout.count(": launched")
        clean = done.returncode == 0 and launched > 0
        print(f"{tool}: {'clean' if clean else f'FAILED, exit {done.returncode}'}, {launched} calls")
        if not clean:
            print(done.stdout[-6000:], done.stderr[-3000:])
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    cli.run(main)
