"""Interleaved timing on a CPU: blocks of calls, disturbed blocks dropped, page faults counted."""

import gc
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

BLOCK_S = 0.12  # /proc/stat counts in ticks of 10 ms: a block must span a dozen
MAX_CALLS = 400
MAX_OTHERS = 0.10  # share of our cores that other processes may take within a block
MIN_ROUNDS = 3
PATIENCE_S = 60.0  # how long steps without a result wait for a quiet machine
RETRY_PAUSE_S = 1.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Timed:
    """A step to time, the context in which its blocks run, and what was measured."""

    step: Callable[[int], None]
    context: Callable[[], AbstractContextManager[object]]
    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    blocks: int = 0
    rejected: int = 0

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def busy_seconds() -> float | None:
    """Time our cores have spent on anybody's work; None where there is no /proc/stat."""
    try:
        with open("/proc/stat") as stat:
            lines = [line.split() for line in stat if line.startswith("cpu")]
    except OSError:
        return None
    ours = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    # user nice system (idle iowait) irq softirq steal; guests are in user already
    return TICK_S * sum(int(line[i]) for line in lines if line[0] in ours for i in (1, 2, 3, 6, 7, 8))


def own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_block(timed: Timed, calls: int, drop: int, undisturbed: bool) -> None:
    """`drop` calls to warm up, then `calls` timed ones, thrown away if other processes ran meanwhile."""
    seconds = []
    gc.collect()
    gc.disable()
    try:
        with timed.context():
            for i in range(drop):
                timed.step(i)
            busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for i in range(calls):
                begin = time.perf_counter()
                timed.step(i)
                seconds.append(time.perf_counter() - begin)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            wall, own = time.perf_counter() - start, own_seconds() - own
            busy_after = busy_seconds()
    finally:
        gc.enable()
    timed.blocks += 1
    if undisturbed and busy is not None and busy_after is not None:
        cores = len(os.sched_getaffinity(0))
        if busy_after - busy - own > MAX_OTHERS * wall * cores + 2 * TICK_S:
            timed.rejected += 1
            return
    timed.seconds += seconds
    timed.faults.append(faults / calls)


def interleave(steps: dict[str, Timed], budget_s: float, undisturbed: bool = True) -> None:
    """Rounds of one block per step until the budget is spent; a step without a result waits for quiet.

    Raises:
        RuntimeError: other processes ran during every block of a step.
    """
    plan: dict[str, tuple[int, int]] = {}
    round_s = 0.0
    for name, timed in steps.items():
        with timed.context():
            for i in range(3):
                begin = time.perf_counter()
                timed.step(i)
                last = time.perf_counter() - begin
        calls = min(max(round(BLOCK_S / last), 2), MAX_CALLS)
        plan[name] = (calls, max(1, calls // 6))
        round_s += last * sum(plan[name])
    for _ in range(max(MIN_ROUNDS, round(budget_s / round_s))):
        for name, timed in steps.items():
            run_block(timed, *plan[name], undisturbed)
    deadline = time.monotonic() + PATIENCE_S
    for name, timed in steps.items():
        while not timed.seconds and time.monotonic() < deadline:
            time.sleep(RETRY_PAUSE_S)
            run_block(timed, *plan[name], undisturbed)
        if not timed.seconds:
            raise RuntimeError(
                f"other processes ran during all {timed.blocks} blocks of {name}: leave the machine alone"
            )
