"""Interleaved timing on a GPU: events in its stream, steps launched one by one or replayed from a graph."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Step = Callable[[int], None]

WARM_UP = 3
BLOCK_MS = 40.0
MAX_CALLS = 40  # per block
MIN_ROUNDS = 3
MAX_ROUNDS = 12
SHORT_MS = 0.2  # of shorter steps several lie between two events
GROUP = 10


@dataclass
class Timed:
    """A step, the context in which it runs, and what was measured in ms per call."""

    step: Step
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    ms: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


class HostClock:
    """Marks for a device that computes within the call."""

    def mark(self) -> Any:
        return time.perf_counter()

    def ms(self, start: Any, end: Any) -> float:
        return 1e3 * (end - start)

    def wait(self) -> None:
        pass


class EventClock:
    """Marks in the current stream of the GPU: no step waits for another's end."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


Clock = HostClock | EventClock


def clock_of(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else HostClock()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def block(timed: Timed, calls: int, group: int, clock: Clock) -> list[float]:
    """ms per call of `calls` groups of `group` calls, launched without waiting."""
    with timed.context():
        timed.step(0)
        marks = [clock.mark()]
        for i in range(calls):
            for j in range(group):
                timed.step(i * group + j)
            marks.append(clock.mark())
    clock.wait()
    return [clock.ms(a, b) / group for a, b in pairwise(marks)]


def interleave(steps: dict[str, Timed], clock: Clock, budget_s: float) -> None:
    """Blocks of every step in turn until `budget_s` is over, each at least MIN_ROUNDS times."""
    plan: dict[str, tuple[int, int]] = {}
    round_ms = 0.0
    for name, timed in steps.items():
        ms = min(block(timed, WARM_UP, 1, clock))
        group = GROUP if ms < SHORT_MS else 1
        calls = max(2, min(MAX_CALLS, round(BLOCK_MS / (ms * group))))
        plan[name] = calls, group
        round_ms += ms * calls * group
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(1e3 * budget_s / round_ms)))
    with _no_collection():
        for _ in range(rounds):
            for name, timed in steps.items():
                timed.ms += block(timed, *plan[name], clock)


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


def peak_mb(step: Step, device: torch.device) -> float:
    """The largest allocation during a step beyond what was there before, in MiB; 0 off the GPU."""
    if device.type != "cuda":
        return 0.0
    step(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(step: Step, device: torch.device) -> int:
    """Kernels and copies that one step puts on the GPU; 0 off it."""
    if device.type != "cuda":
        return 0
    step(0)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(0)
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in profile.events() or [])
