"""Times ops against dense and appends the rows to bench/results/<device>.csv as they are measured. Every
provider is compared with fp64 first, then timed interleaved with the others of its op, density and pass;
a wrong one is named, not timed, and fails the run. registry.py lists what is timed, table.py renders the
rows, plot.py draws them, cost.py explains them."""

import argparse
import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cli
import torch
from check import Checker, context, precision
from cost import cost
from measure import PATIENCE_S, Exchange, Step, Timed, captured, clock_of, interleave, launches, peak_mb
from net_ops import ALL_OPS
from ops import Case, Provider, usable_backend
from registry import (
    AT_FEW_KEEPS,
    DENSE,
    DTYPES,
    FEW_KEEPS,
    KEEPS,
    MAY_FAIL,
    MODES,
    ORDER,
    PASSES,
    PROVIDERS,
    QUICK,
    TABLE_KEEPS,
    Keep,
    Work,
    chosen,
    keep_name,
)
from rows import APART, Row, apart, append, common_fields, results_of
from table import summary

# Of timing, for a density, pass and mode; the smallest number of rounds may take longer.
GROUP_S = {"cpu": 2.0, "cuda": 2.0}
LARGE_S = 6.0
LARGE_FLOPS = 1e10
QUICK_S = 0.02
WARM_S = 1.0  # of small convolutions with drawn gates on a CPU
CONVOLUTIONS = ("conv", "lenet5")
BROKEN = 3  # exit code: the GPU's context is lost, the provider named last lost it


class Broken(RuntimeError):
    """The GPU's context is lost; nothing more runs in this process."""


class Bar:
    """A progress bar on a terminal, where tqdm is there; lines go above it."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="group", file=sys.stderr, disable=None, dynamic_ncols=True)
        except ImportError:
            pass

    def say(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def log(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)
        if self._bar is not None:
            self._bar.refresh()


def refuse_broken(name: str, device: torch.device) -> None:
    """Called for an error: raises Broken if the GPU no longer answers."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise Broken(name) from lost


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class Bench:
    """A work's case, what may compute it here, and the figures that hold at every density."""

    def __init__(self, work: Work, args: argparse.Namespace, bar: Bar) -> None:
        self.work, self.args, self.bar = work, args, bar
        self.device = torch.device(args.device)
        self.right = True
        torch._dynamo.reset()  # code compiled for another shape counts against a limit
        build = partial(ALL_OPS[work.op], work.shape, DTYPES[work.dtype], self.device)
        self.case: Case = build(exact=False)
        self.checker = Checker(self.case, build(exact=True), work.dtype)
        self.providers: dict[str, Provider] = {}
        self._graphs: dict[tuple[str, str], Step | None] = {}
        self._constant: dict[str, Row] = {}

    def find(self, keep: Keep) -> None:
        """Calls every provider once, for its compiler; those that do not run here are named and left out."""
        self.case.set_keep(keep)
        for name, provider in self.case.providers.items():
            if name in self.args.without or (self.args.provider and name not in self.args.provider):
                continue
            if provider.backend not in ("default", "reference") and not usable_backend(provider.backend):
                continue
            self.bar.say(f"{self.work.label}: {name}")
            self.bar.log(f"  {name}: first call")
            try:
                step, setup = self.case.steps(provider, "fwd+bwd" if provider.backward else "fwd")
                with context(provider.backend):
                    Timed(step, setup=setup).call(0)
                self.providers[name] = provider
            except Exception as error:  # a provider fails in its own way; it is named and the rest go on
                refuse_broken(name, self.device)
                self.bar.log(f"  {name}: skipped, {first_line(error)}")
                self.right &= name in MAY_FAIL
                self.case.release(provider)

    def check(self, keep: Keep, names: Sequence[str]) -> dict[str, Row]:
        """Error, memory and launches of the providers that are right at this density."""
        extra: dict[str, Row] = {}
        main = self.work.main_pass
        # By truth: it is computed once for all of them.
        for name in sorted(names, key=lambda name: self.providers[name].truth):
            provider = self.providers[name]
            self.bar.say(f"{self.work.label} keep {keep_name(keep)}: {name} against fp64")
            try:
                row = {"error": f"{self.checker.error(name, provider):.1e}"}
                step, setup = self.case.steps(provider, main if provider.backward else "fwd")
                timed = Timed(step, setup=setup)
                with context(provider.backend):
                    if name not in self._constant:
                        count = launches(timed.call, self.device)
                        self._constant[name] = {} if count is None else {"launches": str(count)}
                        if name in DENSE or name.startswith("masked"):
                            self._constant[name]["peak_mb"] = f"{peak_mb(timed.call, self.device):.4g}"
                    if "peak_mb" not in self._constant[name]:
                        row["peak_mb"] = f"{peak_mb(timed.call, self.device):.4g}"
                extra[name] = row | self._constant[name]
            except Exception as error:
                refuse_broken(name, self.device)
                self.right = False
                self.case.release(provider)
                self.bar.log(f"  keep {keep_name(keep)}, {name}: NOT TIMED, {first_line(error)}")
        return extra

    def timed(self, name: str, pass_: str, mode: str) -> Timed | None:
        """None where this provider has no such pass or mode."""
        provider = self.providers[name]
        if pass_ != "fwd" and not provider.backward:
            return None
        step, setup = self.case.steps(provider, pass_)
        if mode == "graph":
            if provider.syncs or self.device.type != "cuda" or setup is not None:
                return None
            key = name, pass_
            if key not in self._graphs:
                try:
                    with context(provider.backend):
                        self._graphs[key] = captured(step)
                except Exception as error:
                    self._graphs[key] = None
                    refuse_broken(name, self.device)
                    self.bar.log(f"  {name}: no CUDA graph, {first_line(error)}")
            replay = self._graphs[key]
            if replay is None:
                return None
            step = replay
        return Timed(step, partial(context, provider.backend), setup, self._warm_s(name))

    def _warm_s(self, name: str) -> float:
        """Each draw has another number of open channels, and oneDNN compiles once for every new shape."""
        drawn = self.device.type == "cpu" and self.work.op in CONVOLUTIONS and name not in DENSE
        return WARM_S if drawn and not self.args.quick else 0.0

    def rows(self, keep: Keep, pass_: str, mode: str, timed: dict[str, Timed]) -> Iterator[Row]:
        work = self.work
        ms = {name: result.quantile(0.5) for name, result in timed.items()}
        stock = ms.get("dense")
        fair = min((ms[name] for name in DENSE if name in ms), default=None)
        share = self.open_share(keep)
        rates = {
            name: cost(work.op, work.shape, 1.0 if name in DENSE else share, pass_, work.dtype) for name in ms
        }
        targets = work.targets.get(keep, (None, None))
        counts = (pass_, mode) == (work.main_pass, work.mode)
        for name, result in timed.items():
            tflops = rates[name].flops / ms[name] / 1e9
            wanted = targets if counts and name == work.provider else (None, None)
            yield {
                "op": work.op,
                "shape": work.shape_name,
                "dtype": work.dtype,
                "keep": keep_name(keep),
                "pass": pass_,
                "mode": mode,
                "provider": name,
                **result.columns(self.device.type == "cpu"),
                "tflops": f"{tflops:.4g}",
                "of_dense": f"{tflops / (rates['dense'].flops / stock / 1e9):.3f}" if stock else "",
                "gbps": f"{rates[name].bytes / ms[name] / 1e6:.4g}",
                "stock": f"{ms[name] / stock:.3f}" if stock else "",
                "fair": f"{ms[name] / fair:.3f}" if fair else "",
                "target_stock": f"{wanted[0]:g}" if wanted[0] is not None else "",
                "target_fair": f"{wanted[1]:g}" if wanted[1] is not None else "",
            }

    def open_share(self, keep: Keep) -> float | list[float]:
        if isinstance(keep, tuple):
            return [n / gates[0].numel() for n, gates in zip(keep, self.case.log_alphas, strict=True)]
        return keep

    def measure(self, keep: Keep, deadline: float) -> list[Row]:
        """All passes and modes at one density, rows appended as they come."""
        args, work = self.args, self.work
        self.checker.set_keep(keep)
        few = keep in FEW_KEEPS or isinstance(keep, tuple) or args.full or len(args.keep) == 1
        names = [name for name in self.providers if few or name not in AT_FEW_KEEPS]
        extra = self.check(keep, names)
        found = []
        for pass_ in args.passes or work.passes:
            for mode in args.modes:
                timed = {name: self.timed(name, pass_, mode) for name in extra}
                known = {name: result for name, result in timed.items() if result is not None}
                if not known or time.monotonic() > deadline:
                    continue
                self.bar.say(f"{work.label} keep {keep_name(keep)}: {pass_} {mode}")
                large = cost(work.op, work.shape, 1.0, pass_, work.dtype).flops > LARGE_FLOPS
                group_s = LARGE_S if large and args.device == "cpu" else GROUP_S[args.device]
                budget_s = QUICK_S if args.quick else min(group_s, max(0.0, deadline - time.monotonic()))
                try:
                    patience_s = min(PATIENCE_S, max(0.0, deadline - time.monotonic()))
                    interleave(known, clock_of(self.device, args.quick), budget_s, patience_s)
                except RuntimeError as error:
                    refuse_broken(f"mode-{mode}", self.device)
                    self.bar.log(f"  keep {keep_name(keep)}, {mode}: stopped, {first_line(error)}")
                    self.right = False
                    continue
                rows = [row | extra[row["provider"]] for row in self.rows(keep, pass_, mode, known)]
                for row in rows:
                    self.bar.log(line_of(row))
                if args.csv is not None:
                    append(args.csv, [args.common | row for row in rows])
                found += [args.common | row for row in rows]
        return found


def dense_flops(work: Work) -> float:
    return cost(work.op, work.shape, 1.0, work.main_pass, work.dtype).flops


def line_of(row: Row) -> str:
    launched = f" {row['launches']} launches" if row.get("launches") else ""
    return (
        f"  {row['keep']:>5} {row['pass']:8}{row['mode']:6}{row['provider']:16}{row['ms']:>9} ms "
        f"({row['ms_p20']}-{row['ms_p80']})  {row['tflops']:>6} TFLOP/s  stock {row['stock'] or '-':6} "
        f"fair {row['fair'] or '-':6} {row['peak_mb']} MiB{launched} error {row['error']}"
    )


Plan = list[tuple[Work, Sequence[Keep]]]


def measured_apart(works: Sequence[Work], rows: Sequence[Row]) -> Plan:
    """What was timed while the cores were farther apart than during other rows; the shortest first."""
    far = {(row["op"], row["shape"], row["dtype"], row["keep"]) for row in apart(rows)}
    plan: Plan = []
    for work in sorted(works, key=dense_flops):
        known: tuple[Keep, ...] = (*ORDER, *work.own_keeps)
        keeps = [k for k in known if (work.op, work.shape_name, work.dtype, keep_name(k)) in far]
        if keeps:
            plan.append((work, keeps))
    return plan


def run(works: Sequence[Work], args: argparse.Namespace, deadline: float) -> tuple[bool, list[Row]]:
    """Every work at the densities of the tables, those measured with the cores apart once more if they are
    near each other now, then the other densities, as far as the time goes.

    Returns:
        whether every provider that runs here was right, and the rows.
    """
    table = [keep for keep in ORDER if keep in args.keep and keep in TABLE_KEEPS]
    others = [keep for keep in ORDER if keep in args.keep and keep not in TABLE_KEEPS]
    whole = args.keep == list(KEEPS)
    first: Plan = [(work, (*table, *work.own_keeps) if whole else table) for work in works]
    rest: Plan = [(work, others) for work in sorted(works, key=dense_flops)]  # the longest may be dropped
    bar = Bar(sum(len(keeps) for _, keeps in first + rest))
    right, rows = True, list[Row]()
    bench: Bench | None = None

    def again() -> Iterator[tuple[Work, Sequence[Keep]]]:
        plan = measured_apart(works, rows)
        if not plan or args.quick:
            return
        limit = APART * min(float(row["exchange_us"]) for row in rows)
        bar.log("measured with the cores apart: " + ", ".join(work.label for work, _ in plan))
        for work, keeps in plan:
            if Exchange().us() <= limit:
                yield work, keeps

    for work, keeps in itertools.chain(first, again(), rest):
        if not keeps:
            continue
        if time.monotonic() > deadline:
            bar.log(f"{work.label} keep {', '.join(map(keep_name, keeps))}: dropped, time is up")
            continue
        with precision(work.dtype):
            if bench is None or bench.work is not work:
                bar.log(work.label)
                bench = None  # frees its memory first
                bench = Bench(work, args, bar)
                bench.find(keeps[0])
            if args.warm:
                continue
            for keep in keeps:
                if time.monotonic() > deadline:
                    bar.log(f"  keep {keep_name(keep)}: dropped, time is up")
                else:
                    rows += bench.measure(keep, deadline)
                bar.update()
        right &= bench.right
    return right, rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__, "run.py --op linear --shape 100x784x300 --keep 0.5")
    add = parser.add_argument
    add("--op", choices=sorted(ALL_OPS), help="only this op")
    add("--shape", help="with --op, only this shape, as in 100x784x300; it need not be listed")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=list(DTYPES), help="only works of this dtype; with --shape in this dtype")
    add("--keep", type=float, nargs="+", choices=KEEPS, default=list(KEEPS))
    add("--pass", dest="passes", nargs="+", choices=PASSES, help="default: those of the work")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--provider", nargs="+", choices=list(PROVIDERS), help="only these")
    add("--without", nargs="*", default=[], help="providers to leave out")
    add("--full", action="store_true", help="every work, pass, and provider at every density: hours")
    add("--quick", action="store_true", help="tiny shapes, saves nothing: does it run, is it right?")
    add("--warm", action="store_true", help="only call every provider once, for its compiler")
    add("--budget-s", type=float, help="what is not begun by then is dropped; default: none")
    add("--csv", type=Path, help="rows are appended to it; default bench/results/<device>.csv")
    args = parser.parse_args(argv)
    if args.shape and not args.op:
        parser.error("--shape: expected an --op with it")
    if args.full and args.passes is None:
        args.passes = list(PASSES)
    args.works = chosen(args.device, args.op, args.shape, args.dtype, args.full)
    if args.quick:
        dtype = args.dtype or "float32"
        quick = {w.op: replace(w, shape=QUICK[w.op], dtype=dtype, targets={}) for w in args.works}
        args.works = list(quick.values())
    if not args.works:
        parser.error(f"no such work on {args.device}; see WORKS in bench/registry.py")
    if args.device == "cuda" and not args.full:
        args.without.append("torch")  # it waits for the GPU in every layer, as index_select does
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + (args.budget_s or 1e9)
    args.common = common_fields(args.device)
    if args.csv is None and not args.quick:
        args.csv = results_of(args.common["device"])
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
    start = time.monotonic()
    try:
        right, rows = run(args.works, args, deadline)
    except Broken as broken:
        print(f"BROKEN by {broken}: {broken.__cause__}", flush=True)
        sys.stdout.flush()
        os._exit(BROKEN)  # destructors would wait for the GPU
    if rows:
        print("", summary(args.works, rows), sep="\n")
    print(f"\n{len(rows)} rows in {time.monotonic() - start:.0f} s to {args.csv or 'nowhere'}")
    if not right:
        print("A CHECK FAILED: see NOT TIMED, stopped and skipped above")
    return 0 if right else 1


if __name__ == "__main__":
    # Moments of weights that are closed for long are denormal numbers: docs/performance.md advises this.
    torch.set_flush_denormal(True)
    cli.run(main)
