"""Triton's l0_penalty against the formula in float64: total and gradient, any shapes, one weight a tensor."""

import pytest
import torch

from l0kernels import HardConcrete
from l0kernels.triton_kernels import penalty as kernels
from op_checks import assert_near
from triton_device import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy tells of inf and NaN
]

DISTS = [HardConcrete(), HardConcrete(0.5, -0.3, 1.2)]


def formula(log_alphas, weights, dist):
    p = [dist.p_open(a.flatten()) for a in log_alphas]
    total = torch.stack([w * q.sum() for w, q in zip(weights, p, strict=True)]).sum()
    return total, torch.cat([w * q * (1 - q) for w, q in zip(weights, p, strict=True)])


def assert_penalty(log_alphas, weights, dist=DISTS[0]):
    got = kernels.l0_penalty([a.to(DEVICE) for a in log_alphas], weights, dist)
    eager = formula(log_alphas, weights, dist)
    exact = formula([a.double() for a in log_alphas], weights, dist)
    for name, *values in zip(("total", "gradient"), got, eager, exact, strict=True):
        assert values[0].dtype == torch.float32
        assert_near(values[0].cpu(), *values[1:], torch.float32, name)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000, 1024, 1025, 5003, 8192, 8193, 20_011])
def test_one_tensor(n, dist):
    assert_penalty([torch.randn(n) * 3], [1.5], dist)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(
    "sizes", [(784, 300, 100), (1, 1), (0, 5, 0), (0, 0), (5003, 1), (300,) * 9, (128,) * 33, (1500, 9000)]
)
def test_several_tensors(sizes, dist):
    weights = [0.25 * (i + 1) if i % 3 else -0.1 for i in range(len(sizes))]
    assert_penalty([torch.randn(n) * 3 for n in sizes], weights, dist)


def test_any_shape_and_layout():
    log_alphas = [torch.randn(37, 41).t(), torch.randn(5, 6, 7)[:, ::2], torch.randn(()), torch.randn(3)]
    assert_penalty(log_alphas, [1.0, 2.0, 3.0, 4.0])
    assert_penalty(log_alphas[:1], [2.0])


def test_unaligned_vectors():
    flat = torch.randn(1000).to(DEVICE)
    parts = [flat[1:301], flat[301:302], flat[302:]]
    total, grad = kernels.l0_penalty(parts, [1.0, 1.0, 1.0], DISTS[0])
    expected, expected_grad = kernels.l0_penalty([flat[1:].clone()], [1.0], DISTS[0])
    torch.testing.assert_close(total, expected)
    assert torch.equal(grad, expected_grad)


def test_many_gates(monkeypatch):
    """Longer rows above _MANY gates."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_MANY", 10_000)
    n = 20_000 if INTERPRETED else 2_000_003
    assert_penalty([torch.randn(n), torch.randn(17)], [1.0, 3.0])
    assert_penalty([torch.randn(n)], [2.0])


def test_new_weights_at_old_addresses():
    log_alphas = [torch.randn(50), torch.randn(60)]
    for weights in ([1.0, 2.0], [3.0, 2.0], [1.0, 2.0]):
        assert_penalty(log_alphas, weights)


def test_is_reproducible():
    log_alphas = [torch.randn(9001).to(DEVICE), torch.randn(300).to(DEVICE)]
    first = kernels.l0_penalty(log_alphas, [1.0, 2.0], DISTS[0])
    second = kernels.l0_penalty(log_alphas, [1.0, 2.0], DISTS[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sizes", [(300,), (300, 20)])
def test_saturated_and_nan(sizes):
    log_alphas = [torch.full((n,), 200.0).to(DEVICE) for n in sizes]
    log_alphas[0][1] = -200
    total, grad = kernels.l0_penalty(log_alphas, [1.0] * len(sizes), DISTS[0])
    assert total.item() == sum(sizes) - 1
    assert not grad.any()
    log_alphas[0][2] = float("nan")
    total, grad = kernels.l0_penalty(log_alphas, [1.0] * len(sizes), DISTS[0])
    assert total.isnan()
    assert grad.isnan().nonzero().tolist() == [[2]]
