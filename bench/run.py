"""Time the works of the target table: ``python bench/run.py [--op linear] [--device cpu] [--quick]``.

Every provider of a case is first compared with fp64, then timed in interleaved blocks. Rows are appended to
bench/results/<cpu>.csv (not with --quick); `bench/table.py` renders them.
"""

import argparse
import os
import platform
import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from check import check
from measure import Timed, interleave
from ops import OPS
from registry import KEEPS, WORKS, Case, Work
from table import RESULTS, Row, append, commit, machine, providers, targets
from tqdm import tqdm

import l0kernels as l0

# Per density; a large case takes a second for one call of each provider.
BUDGET_S = 8.0
LARGE_BUDGET_S = 15.0
LARGE_FLOPS = 1e10
QUICK_BUDGET_S = 0.3
QUICK_SHAPES = {"linear": (32, 64, 48), "ffn": (32, 32, 64), "chain": (16, 40, 24, 12, 5)}


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


def common_fields() -> Row:
    tuned = [name for name in sorted(os.environ) if name.startswith(("MALLOC_", "THP_", "OMP_", "GOMP_"))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "device": cpu_name(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "l0kernels": l0.__version__,
        "environment": " ".join(f"{name}={os.environ[name]}" for name in tuned),
    }


def context(backend: str | None) -> AbstractContextManager[object]:
    return l0.use_backend(backend) if backend else nullcontext()


def measure(work: Work, keep: float, case: Case, quick: bool) -> list[Row]:
    timed = {
        name: Timed(partial(case.step, provider), partial(context, provider.backend))
        for name, provider in case.providers.items()
        if provider.timed
    }
    budget_s = LARGE_BUDGET_S if case.dense_flops > LARGE_FLOPS else BUDGET_S
    interleave(timed, QUICK_BUDGET_S if quick else budget_s, undisturbed=not quick)
    stock, fair = (timed[name].quantile(0.5) for name in ("dense", "dense_own"))
    at = KEEPS.index(keep)
    rows = []
    for name, result in timed.items():
        seconds = result.quantile(0.5)
        flops = case.dense_flops if name in ("dense", "dense_own") else case.flops
        targeted = name == "ours" and work in WORKS
        rows.append(
            {
                "op": work.op,
                "shape": work.shape_name,
                "dtype": "float32",
                "keep": f"{keep:g}",
                "provider": name,
                "ms": f"{1e3 * seconds:.4g}",
                "ms_p20": f"{1e3 * result.quantile(0.2):.4g}",
                "ms_p80": f"{1e3 * result.quantile(0.8):.4g}",
                "calls": str(len(result.seconds)),
                "blocks": str(result.blocks),
                "rejected": str(result.rejected),
                "faults": f"{sum(result.faults) / len(result.faults):.3g}",
                "gflops": f"{flops / seconds / 1e9:.3g}",
                "stock": f"{seconds / stock:.3f}",
                "fair": f"{seconds / fair:.3f}",
                "target_stock": f"{work.stock[at]:g}" if targeted else "",
                "target_fair": f"{work.fair[at]:g}" if targeted else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=sorted(OPS), help="only this op")
    parser.add_argument("--shape", help="only this shape, as in 100x784x300")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--keep", type=float, nargs="+", choices=KEEPS, default=list(KEEPS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, saves nothing: does it run?")
    args = parser.parse_args()

    works = [w for w in WORKS if w.device == args.device and args.op in (None, w.op)]
    works = [w for w in works if args.shape in (None, w.shape_name)]
    if not works:
        parser.error(f"no such work; there are {', '.join(f'{w.op} {w.shape_name}' for w in WORKS)}")
    if args.quick:
        works = [Work(op, QUICK_SHAPES[op], args.device, (), ()) for op in dict.fromkeys(w.op for w in works)]

    common = common_fields()
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-") + ".csv")
    rows: list[Row] = []
    with tqdm(total=len(works) * len(args.keep), unit="case", file=sys.stderr) as bar:
        for work in works:
            for keep in args.keep:
                label = f"{work.op} {work.shape_name} keep {keep:g}"
                bar.set_postfix_str(f"{label}: against fp64")
                case = OPS[work.op](work.shape, keep)
                exact = OPS[work.op](work.shape, keep, torch.float64)
                check(case, exact, label)
                del exact
                bar.set_postfix_str(f"{label}: timing")
                measured = [{**common, **row} for row in measure(work, keep, case, args.quick)]
                if not args.quick:
                    append(path, measured)
                rows += measured
                bar.update()
    print(machine(rows), providers(rows), sep="\n\n")
    if not args.quick:
        print("", targets(works, rows), f"\nappended to {path}", sep="\n")


if __name__ == "__main__":
    main()
