"""Interleaved timing: blocks of calls of every step in turn, on a CPU or in a GPU's stream.

On a CPU blocks in which other processes ran are dropped, page faults are counted, and blocks with the cores
near each other are not mixed with those while they were apart. On a GPU the marks are events in its stream;
steps are launched one by one or replayed from a CUDA graph.
"""

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

import torch
from rows import APART, Row

Step = Callable[[int], object]

WARM_UP = 3
LONG_MS = 100.0  # one call warms a longer step up, none in each block
MIN_ROUNDS = 3
MAX_OTHERS = 0.10  # share of our cores that other processes may take within a block
PATIENCE_S = 60.0  # how long steps without a result wait for a quiet machine
RETRY_PAUSE_S = 1.0
SHORT_MS = 0.2  # of shorter steps on a GPU several lie between two marks
GROUP = 10
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Block(NamedTuple):
    """Of calls: ms of each, page faults per call, and how long our cores took to exchange data."""

    ms: list[float]
    faults: float
    exchange_us: float


@dataclass
class Timed:
    """A step, the context of its blocks, what comes untimed before each call, for how long the step is called
    before it is timed, and what was measured."""

    step: Step
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    setup: Step | None = None
    warm_s: float = 0.0
    kept: list[Block] = field(default_factory=list)
    blocks: int = 0
    rejected: int = 0

    @property
    def ms(self) -> list[float]:
        return [ms for block in self.kept for ms in block.ms]

    @property
    def exchange_us(self) -> float:
        """The longest: where blocks of both states had to be mixed, all count as apart."""
        return max(block.exchange_us for block in self.kept)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    def columns(self, on_cpu: bool) -> Row:
        """What a row holds of it."""
        found = {
            name: f"{self.quantile(q):.4g}" for name, q in (("ms", 0.5), ("ms_p20", 0.2), ("ms_p80", 0.8))
        }
        found["calls"] = str(len(self.ms))
        if on_cpu:
            found |= {
                "blocks": str(self.blocks),
                "rejected": str(self.rejected),
                "faults": f"{mean(block.faults for block in self.kept):.3g}",
                "exchange_us": f"{self.exchange_us:.3g}",
            }
        return found

    def call(self, i: int) -> None:
        if self.setup is not None:
            self.setup(i)
        self.step(i)


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


def minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Exchange:
    """How far apart our cores are: us in which two threads read 80 KB each, half of it written by the other.

    A hypervisor may move virtual cores to where they share no cache, for minutes; small products and what two
    threads hand to each other then take up to twice as long, and neither load nor /proc/stat shows why.
    """

    def __init__(self) -> None:
        first, second = torch.zeros(3, 20_000), torch.zeros(3, 20_000)
        # A thread takes a row of both, the next one of what it reads.
        self._ways = ((first[1:], second[:2]), (second[1:], first[:2]))

    def us(self) -> float:
        """The shortest of some; 0 with one thread."""
        if torch.get_num_threads() == 1:
            return 0.0
        shortest = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(5):
                for source, target in self._ways:
                    torch.neg(source, out=target)
            shortest = min(shortest, time.perf_counter() - start)
        return 1e5 * shortest


class HostClock:
    """Marks for a device that computes within the call; disturbed blocks are told, where that can be."""

    block_ms = 120.0  # /proc/stat counts in ticks of 10 ms: a block must span a dozen
    max_calls = 400
    max_rounds = 1_000_000
    min_rounds = MIN_ROUNDS
    groups = False

    def __init__(self, quick: bool = False) -> None:
        self._undisturbed = not quick
        self._exchange = Exchange()
        if quick:
            self.block_ms, self.min_rounds = 2.0, 1
        self._start: tuple[float | None, float, float, int] = (None, 0.0, 0.0, 0)

    def mark(self) -> Any:
        return time.perf_counter()

    def ms(self, start: Any, end: Any) -> float:
        return 1e3 * (end - start)

    def wait(self) -> None:
        pass

    def begin(self) -> None:
        self._start = busy_seconds(), own_seconds(), time.perf_counter(), minor_faults()

    def exchange_us(self) -> float:
        return self._exchange.us() if self._undisturbed else 0.0

    def end(self) -> tuple[bool, int]:
        """Since begin: whether others ran, and page faults."""
        busy, own, start, faults = self._start
        wall, own = time.perf_counter() - start, own_seconds() - own
        faults = minor_faults() - faults
        busy_after = busy_seconds()
        if not self._undisturbed or busy is None or busy_after is None:
            return False, faults
        cores = len(os.sched_getaffinity(0))
        return busy_after - busy - own > MAX_OTHERS * wall * cores + 2 * TICK_S, faults


class EventClock(HostClock):
    """Marks in the current stream of the GPU: no step waits for another's end."""

    block_ms = 40.0
    max_calls = 40
    max_rounds = 12
    groups = True

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def begin(self) -> None:
        pass

    def exchange_us(self) -> float:
        return 0.0

    def end(self) -> tuple[bool, int]:
        return False, 0


def clock_of(device: torch.device, quick: bool = False) -> HostClock:
    """`quick`: one short block, disturbed or not, only to show that it runs."""
    return EventClock(quick) if device.type == "cuda" else HostClock(quick)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_block(timed: Timed, calls: int, drop: int, group: int, clock: HostClock) -> list[float]:
    """ms per call of `calls` groups of `group` calls, launched without waiting, after `drop` calls.

    They are added to `timed` unless other processes ran meanwhile.
    """
    marks = []
    with timed.context():
        for i in range(drop):
            timed.call(i)
        clock.begin()
        for i in range(calls):
            if timed.setup is not None:
                timed.setup(i)
            start = clock.mark()
            for j in range(group):
                timed.step(i * group + j)
            marks.append((start, clock.mark()))
        disturbed, faults = clock.end()
    clock.wait()
    ms = [clock.ms(a, b) / group for a, b in marks]
    timed.blocks += 1
    if disturbed:
        timed.rejected += 1
    else:
        timed.kept.append(Block(ms, faults / (calls * group), clock.exchange_us()))
    return ms


def keep_one_place(steps: dict[str, Timed]) -> None:
    """Of all steps the blocks with the cores near each other, if each has such, or those with them apart; all
    of them, if some have none of the one and some none of the other."""
    nearest = min(block.exchange_us for timed in steps.values() for block in timed.kept)
    for near in (True, False):
        kept = [[b for b in t.kept if (b.exchange_us <= APART * nearest) == near] for t in steps.values()]
        if all(kept):
            for timed, blocks in zip(steps.values(), kept, strict=True):
                timed.rejected += len(timed.kept) - len(blocks)
                timed.kept = blocks
            return


def interleave(
    steps: dict[str, Timed], clock: HostClock, budget_s: float, patience_s: float | None = None
) -> None:
    """Rounds of one block per step until the budget is spent; a step without a result waits for quiet.

    Raises:
        RuntimeError: other processes ran during every block of a step.
    """
    plan: dict[str, tuple[int, int, int]] = {}
    round_ms = 0.0
    for name, timed in steps.items():
        trial = Timed(timed.step, timed.context, timed.setup)
        warm = time.monotonic() + timed.warm_s
        while time.monotonic() < warm:
            run_block(trial, 1, 0, 1, clock)
        (ms,) = run_block(trial, 1, 0, 1, clock)
        if ms < LONG_MS:
            ms = min(run_block(trial, WARM_UP, 0, 1, clock))
        group = GROUP if clock.groups and ms < SHORT_MS and timed.setup is None else 1
        calls = max(2, min(clock.max_calls, round(clock.block_ms / (ms * group))))
        drop = 0 if ms >= LONG_MS else 1 if clock.groups else max(1, calls // 6)
        plan[name] = calls, drop, group
        round_ms += ms * (calls * group + drop)
    rounds = max(clock.min_rounds, min(clock.max_rounds, round(1e3 * budget_s / round_ms)))
    with _no_collection():
        for _ in range(rounds):
            for name, timed in steps.items():
                run_block(timed, *plan[name], clock)
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    for name, timed in steps.items():
        while not timed.kept and time.monotonic() < deadline:
            time.sleep(RETRY_PAUSE_S)
            run_block(timed, *plan[name], clock)
        if not timed.kept:
            raise RuntimeError(
                f"other processes ran during all {timed.blocks} blocks of {name}: leave the machine alone"
            )
    keep_one_place(steps)


def captured(step: Step) -> Step:
    """`step(0)` as a CUDA graph; each call replays it with fresh noise: torch's generator takes part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)

    def replay(_: int) -> None:
        graph.replay()

    return replay


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library writes lines of its own."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _profiled(step: Step, **options: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with _quiet_stderr(), torch.profiler.profile(**options) as profile:
        step(0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profile


def peak_mb(step: Step, device: torch.device) -> float:
    """The largest sum of torch's allocations in a step that ran before, beyond what was there, in MiB."""
    if device.type != "cuda":
        options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
        events = _profiled(step, **options).profiler.kineto_results.events()
        total = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        return peak / 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(step: Step, device: torch.device) -> int | None:
    """Kernels and copies that a step that ran before puts on the GPU; None off it."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    events = _profiled(step, activities=activities).events() or []
    return sum(str(event.device_type).endswith("CUDA") for event in events)
