"""pytest-benchmark entries of the core operations at LeNet size: ``make bench``."""

import pytest
import torch
from ops import OPS, trained_log_alpha

import l0kernels as l0

BACKENDS = ["torch", "cpp"]
STEPS = [
    ("linear", (100, 784, 300), ["dense", "dense_own", "masked", "index_select", "ours_torch", "ours"]),
    (
        "chain",
        (100, 784, 300, 100, 10),
        ["dense", "dense_own", "masked", "index_select", "ours_torch", "ours", "ours_nn"],
    ),
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
    ("op", "shape", "provider"), [(op, shape, name) for op, shape, names in STEPS for name in names]
)
def test_step(benchmark, op, shape, provider, keep):
    case = OPS[op](shape, keep)
    chosen = case.providers[provider]
    benchmark.group = f"{op} {'x'.join(map(str, shape))}, forward and backward, keep {keep:g}"
    with l0.use_backend(chosen.backend or "torch"):
        benchmark(case.step, chosen, 0)
        assert all(bool(value.isfinite().all()) for value in case.values(chosen, seed=0))
