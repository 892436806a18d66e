"""pytest-benchmark entries of the core operations: ``make bench``.

Every run is kept in .benchmarks under its commit; ``ARGS=--benchmark-compare`` shows the last one beside it.
"""

import pytest
import torch
from check import context
from measure import Timed
from net_ops import ALL_OPS
from ops import trained_log_alpha, usable_backend

import l0kernels as l0

BACKENDS = [name for name in ("torch", "cpp") if usable_backend(name)]
CPU = torch.device("cpu")
STEPS = [
    ("linear", (100, 784, 300), "fwd+bwd", ["dense", "dense_own", "masked", "index_select", *BACKENDS]),
    ("ffn", (64, 256, 1024), "fwd+bwd", ["dense", "dense_own", *BACKENDS]),
    ("conv", (100, 20, 12, 12, 50, 5), "fwd+bwd", ["dense", "dense_channels_last", *BACKENDS]),
    ("chain", (100, 784, 300, 100, 10), "step", ["dense", "dense_own", "masked", "nn", *BACKENDS]),
]


@pytest.fixture
def log_alphas():
    generator = torch.Generator().manual_seed(0)
    return [trained_log_alpha(n, 0.5, generator) for n in (784, 300, 100)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_gates(benchmark, log_alphas, backend):
    benchmark.group = "sample_gates of 784, 300 and 100 gates"
    with l0.use_backend(backend):
        gates = benchmark(l0.sample_gates, log_alphas)
    assert all(0 < int(g.count[0]) < g.z.numel() for g in gates)


def test_l0_penalty(benchmark, log_alphas):
    benchmark.group = "l0_penalty of 784, 300 and 100 gates"
    value = benchmark(l0.l0_penalty, log_alphas, [300, 100, 10])
    torch.testing.assert_close(value, l0.reference.l0_penalty(log_alphas, [300, 100, 10]))


@pytest.mark.parametrize("keep", [0.5, 0.1])
@pytest.mark.parametrize(
    ("op", "shape", "name", "provider"),
    [(op, shape, name, provider) for op, shape, name, providers in STEPS for provider in providers],
)
def test_step(benchmark, op, shape, name, provider, keep):
    case = ALL_OPS[op](shape, torch.float32, CPU)
    case.set_keep(keep)
    chosen = case.providers[provider]
    benchmark.group = f"{op} {'x'.join(map(str, shape))}, {name}, keep {keep:g}"
    step, setup = case.steps(chosen, name)
    with context(chosen.backend):
        benchmark(Timed(step, setup=setup).call, 0)
        values = case.values(chosen.forward, chosen.leaves, True, seed=0)
    assert all(bool(value.isfinite().all()) for value in values)
