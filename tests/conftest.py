"""Fixtures of the tests of the operations."""

import gc
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

import l0kernels as l0
from l0kernels._native import native
from op_checks import BACKENDS
from triton_device import INTERPRETED, RUNS

# What a test compares with is float32 as written; each process of the tests reads this file first.
torch.backends.cudnn.allow_tf32 = False

# Triton decides at import whether it interprets or compiles: one process runs the kernels or compiles them.
STATIC = list(Path(__file__).parent.glob("*/test_static*.py"))
RUN = [path for path in Path(__file__).parent.glob("triton/test_*.py") if path not in STATIC]
collect_ignore = [] if RUNS else RUN
collect_ignore += STATIC if INTERPRETED else []
if INTERPRETED:
    from interpreter import quicken

    quicken()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """What is collected lives to the end: the collector of garbage need not walk it again and again."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `covering(n)` so many cases stay that every n values meet; the others are long."""
    tests = defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("covering")) and not item.get_closest_marker("long"):
            values = [(name, repr(value)) for name, value in item.callspec.params.items()]
            meetings = set(itertools.combinations(values, min(mark.args[0], len(values))))
            tests[item.nodeid.partition("[")[0]].append((item, values, meetings))
    for cases in tests.values():
        missing, used = set().union(*(meetings for *_, meetings in cases)), Counter()
        while missing:
            # Of cases that bring as much, one whose values the others have least.
            best = max(cases, key=lambda case: (len(case[2] & missing), -sum(used[v] for v in case[1])))
            cases.remove(best)
            used.update(best[1])
            missing -= best[2]
        for item, *_ in cases:
            item.add_marker(pytest.mark.long)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend of this machine but the reference, in turn."""
    with l0.use_backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seeded(threads):
    """One state of torch's generator; one thread, for on small inputs more only wait for each other."""
    torch.manual_seed(0)
    threads(1)


@pytest.fixture
def poison(seeded):
    """Unwritten memory, torch's and the native scratch, reads as NaN or as the largest integer."""
    if native is not None:
        with l0.use_backend("cpp"):
            for dtype in (torch.float32, torch.float64):
                nan = torch.full((64, 800), float("nan"), dtype=dtype, requires_grad=True)
                weights = [torch.ones(100, 800, dtype=dtype), torch.ones(800, 100, dtype=dtype)] * 2
                l0.gated_mlp(nan, weights, [None] * 4, [None] * 4).sum().backward()
    torch.use_deterministic_algorithms(True)  # and torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request):
    """Every instruction set of this processor that the native kernels know."""
    if native is None:
        pytest.skip("no native kernels")
    if not native.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    with l0.use_backend("cpp"):
        yield request.param
    native.set_isa("auto")
