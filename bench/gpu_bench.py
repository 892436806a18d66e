"""One part of the GPU rows: ``python bench/gpu_bench.py ffn|linear|step|micro --csv FILE``.

gpu_check.py calls it. Every provider is compared with fp64 before it is timed; one that cannot run here is
named and left out. Each group of rows is written once measured. On a machine without a GPU
`--device cpu --quick --backend torch` shows that it runs.
"""

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_micro
import torch
from gpu_measure import Step, Timed, captured, clock_of, interleave, launches, peak_mb
from gpu_ops import DENSE, OPS, Case, Provider
from registry import GPU_WORKS, KEEPS, Work
from table import GPU_FIELDS, Row, append, commit
from torch import Tensor

import l0kernels as l0

SEED = 20_260
SLACK = 4.0  # times the error of the plain formula in the same dtype
FLOOR = 5e-7  # few gates are open in small cases: one rounding of theirs is no error
SANE = 0.02  # relative error of an output, whatever the dtype
KEEP_ORDER = (0.5, 0.1, 1.0, 0.25, 0.9)  # what says most comes first
FULL = {"ffn": torch.bfloat16, "linear": torch.bfloat16, "step": torch.float32}
QUICK = {"ffn": (32, 16, 48), "linear": (32, 48, 16), "step": (16, 40, 24, 12, 5)}
GROUP_S = 2.0  # of timing per density, pass and mode; the smallest number of rounds may take longer
MODES = ("eager", "graph")
BROKEN = 3  # exit code: the GPU's context is lost, the provider named last lost it


class Broken(RuntimeError):
    """The GPU's context is lost; nothing more runs in this process."""


def common_fields(device: torch.device) -> Row:
    on_gpu = device.type == "cuda"
    environment = [f"CUDA {torch.version.cuda}"] if on_gpu else []
    try:
        import triton

        environment.append(f"triton {triton.__version__}")
    except ImportError:
        environment.append("no triton")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": os.environ.get("L0KERNELS_COMMIT") or commit(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "l0kernels": l0.__version__,
        "environment": " ".join(environment),
    }


def log(*words: object) -> None:
    print(*words, flush=True)


def context(provider: Provider) -> AbstractContextManager[object]:
    return l0.use_backend(provider.backend)


def refuse_broken(error: BaseException, name: str, device: torch.device) -> None:
    """Raises Broken if the GPU no longer answers."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise Broken(name) from lost


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm; 0 where both are zero, NaN if either holds one."""
    difference = (value.double() - truth).norm().item()
    return difference / max(truth.norm().item(), 1e-30) if difference else difference


class Checker:
    """Compares providers with their formula in fp64, at the densities of `case`."""

    def __init__(self, case: Case, exact: Case) -> None:
        self.case, self.exact = case, exact
        self._keep: float | None = None
        self._truths: dict[str, tuple[list[Tensor], list[float]]] = {}

    def set_keep(self, keep: float) -> None:
        self._truths.clear()
        self._keep = keep
        self.exact.set_keep(keep)

    def _truth(self, name: str) -> tuple[list[Tensor], list[float]]:
        if name not in self._truths:
            self._truths.clear()  # one is large
            leaves, exact_leaves = self.case.leaves(name), self.exact.leaves(name)
            with l0.use_backend("reference"):
                truth = self.exact.values(self.exact.truths[name], exact_leaves, True, SEED)
                eager = self.case.values(self.case.truths[name], leaves, True, SEED)
            eps = torch.finfo(self.case.dtype).eps
            errors = [relative_error(e, t) for e, t in zip(eager, truth, strict=True)]
            if not errors[0] <= SANE:
                raise RuntimeError(f"the formula {name} itself differs from fp64 by {errors[0]:.1e}")
            bounds = [SLACK * max(error, eps, FLOOR) for error in errors]
            self._truths[name] = truth, bounds
        return self._truths[name]

    def error(self, name: str, provider: Provider) -> float | None:
        """The largest relative error of output and gradients; None where nothing can be compared.

        Raises:
            RuntimeError: one of them is further from fp64 than SLACK times the plain formula.
        """
        if provider.truth is None:
            return None
        truth, bounds = self._truth(provider.truth)
        with context(provider):
            values = self.case.values(provider.forward, provider.leaves, provider.backward, SEED)
        worst = 0.0
        for i, (value, right, bound) in enumerate(zip(values, truth, bounds, strict=False)):
            error = relative_error(value, right)
            if not error <= bound:  # also when it is NaN
                what = "the output" if i == 0 else f"gradient {i - 1} of shape {tuple(value.shape)}"
                raise RuntimeError(f"{name}: {what} differs from fp64 by {error:.1e}, allowed {bound:.1e}")
            if bound < 1:  # the penalty's gradient at keep 1 is a rounding error of 0 in any fp32
                worst = max(worst, error)
        return worst


def usable(case: Case, without: Sequence[str]) -> dict[str, Provider]:
    """The providers that run here, each called once; the others are named in the log."""
    found = {}
    for name, provider in case.providers.items():
        if name in without:
            log(f"  {name}: left out, asked for")
            continue
        log(f"  {name}: first call")
        try:
            with context(provider):
                case.step(provider, provider.backward, 0)
            found[name] = provider
        except Exception as error:  # a provider fails in its own way; it is named and the rest go on
            refuse_broken(error, name, case.device)
            log(f"  {name}: skipped, {first_line(error)}")
            case.batches[0].grad = None
            for leaf in provider.leaves:
                leaf.grad = None
    return found


class Graphs:
    """Captured steps, one for every provider and pass: the densities are read anew at each replay."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._steps: dict[tuple[str, bool], Step | None] = {}

    def step(self, name: str, provider: Provider, backward: bool) -> Step | None:
        if provider.syncs or self._case.device.type != "cuda":
            return None
        key = name, backward
        if key not in self._steps:
            try:
                with context(provider):
                    self._steps[key] = captured(partial(self._case.step, provider, backward))
            except Exception as error:
                self._steps[key] = None
                refuse_broken(error, name, self._case.device)
                log(f"  {name}: no CUDA graph, {first_line(error)}")
        return self._steps[key]


def measure(
    work: Work,
    case: Case,
    keep: float,
    backward: bool,
    mode: str,
    timed: dict[str, Timed],
    extra: dict[str, Row],
    budget_s: float,
) -> list[Row]:
    interleave(timed, clock_of(case.device), budget_s)
    ms = {name: result.quantile(0.5) for name, result in timed.items()}
    stock = ms.get("dense")
    fair = min((ms[name] for name in DENSE if name in ms), default=None)
    counts = backward and mode == ("graph" if work.op == "step" else "eager")
    rows = []
    for name, result in timed.items():
        targeted = counts and name == "ours" and work in GPU_WORKS
        at = KEEPS.index(keep)
        rows.append(
            {
                "op": work.op,
                "shape": work.shape_name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "keep": f"{keep:g}",
                "pass": "step" if work.op == "step" else "fwd+bwd" if backward else "fwd",
                "mode": mode,
                "provider": name,
                "ms": f"{ms[name]:.4g}",
                "ms_p20": f"{result.quantile(0.2):.4g}",
                "ms_p80": f"{result.quantile(0.8):.4g}",
                "calls": str(len(result.ms)),
                "tflops": f"{case.flops(name, keep, backward) / ms[name] / 1e9:.4g}",
                "stock": f"{ms[name] / stock:.3f}" if stock else "",
                "fair": f"{ms[name] / fair:.3f}" if fair else "",
                "target_stock": f"{work.stock[at]:g}" if targeted and work.stock else "",
                "target_fair": f"{work.fair[at]:g}" if targeted and work.fair else "",
                **extra.get(name, {}),
            }
        )
    return rows


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        log(
            f"  {row['keep']:>5} {row['pass']:8}{row['mode']:6}{row['provider']:16}{row['ms']:>9} ms "
            f"({row['ms_p20']}-{row['ms_p80']})  {row['tflops']:>6} TFLOP/s  stock {row['stock'] or '-':6} "
            f"fair {row['fair'] or '-':6} {row.get('peak_mb', '')} MiB {row.get('launches', '')} "
            f"{row.get('error', '')}"
        )


def run_op(args: argparse.Namespace, common: Row, deadline: float) -> bool:
    """Whether every provider that runs here was right."""
    device = torch.device(args.device)
    work = next(w for w in GPU_WORKS if w.op == args.part)
    dtype = FULL[work.op]
    if args.quick:
        work, dtype = replace(work, shape=QUICK[work.op]), torch.float32
    case = OPS[work.op](work.shape, dtype, device)
    if args.backend != "triton":
        for name, provider in case.providers.items():
            if provider.backend == "triton":
                case.providers[name] = replace(provider, backend=args.backend)
    exact = OPS[work.op](work.shape, dtype, device, exact=True)
    checker, graphs = Checker(case, exact), Graphs(case)
    keeps = [keep for keep in KEEP_ORDER if keep in args.keep]
    case.set_keep(keeps[0])
    log(f"{work.op} {work.shape_name} {dtype}")
    providers = usable(case, args.without)
    if args.warm:
        return True
    right = True
    counted: dict[str, Row] = {}
    for keep in keeps:
        if time.monotonic() > deadline:
            log(f"  keep {keep:g}: dropped, time is up")
            continue
        case.set_keep(keep)
        checker.set_keep(keep)
        extra: dict[str, Row] = {}
        # By truth: it is computed once for all of them.
        for name, provider in sorted(providers.items(), key=lambda item: str(item[1].truth)):
            row = extra.setdefault(name, {})
            try:
                error = checker.error(name, provider)
                step = partial(case.step, provider, provider.backward)
                with context(provider):
                    row["peak_mb"] = f"{peak_mb(step, device):.0f}"
                    if name not in counted:
                        counted[name] = {"launches": str(launches(step, device))}
                row |= counted[name]
                row["error"] = "" if error is None else f"{error:.1e}"
            except Exception as error:
                refuse_broken(error, name, device)
                del extra[name]
                right = False
                log(f"  keep {keep:g}, {name}: NOT TIMED, {first_line(error)}")
        passes = [True] if work.op == "step" else [True, False]
        for backward in passes:
            for mode in args.modes:
                timed = {}
                for name, provider in providers.items():
                    if name not in extra or (backward and not provider.backward):
                        continue
                    step = partial(case.step, provider, backward)
                    chosen = step if mode == "eager" else graphs.step(name, provider, backward)
                    if chosen is not None:
                        timed[name] = Timed(chosen, partial(context, provider))
                if not timed or time.monotonic() > deadline:
                    continue
                budget_s = 0.02 if args.quick else min(GROUP_S, max(0.0, deadline - time.monotonic()))
                try:
                    rows = measure(work, case, keep, backward, mode, timed, extra, budget_s)
                except RuntimeError as error:
                    refuse_broken(error, f"mode-{mode}", device)
                    log(f"  keep {keep:g}, {mode}: stopped, {first_line(error)}")
                    continue
                show(rows)
                append(args.csv, [common | row for row in rows], GPU_FIELDS)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*OPS, "micro"])
    parser.add_argument("--csv", type=Path, required=True, help="rows are appended to it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", default="triton", help="of `ours` and `dense_own`")
    parser.add_argument("--keep", type=float, nargs="+", choices=KEEPS, default=list(KEEPS))
    parser.add_argument("--budget-s", type=float, default=120.0, help="what is not begun by then is dropped")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--warm", action="store_true", help="only call every provider once, for its compiler")
    parser.add_argument("--without", nargs="*", default=[], help="providers to leave out")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_s
    device = torch.device(args.device)
    common = common_fields(device)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
    try:
        if args.part == "micro":
            right = gpu_micro.run(args.csv, common, device, deadline, args.quick, log)
        else:
            right = run_op(args, common, deadline)
    except Broken as broken:
        log(f"BROKEN by {broken}: {broken.__cause__}")
        sys.stdout.flush()
        os._exit(BROKEN)  # destructors would wait for the GPU
    sys.exit(not right)


if __name__ == "__main__":
    main()
