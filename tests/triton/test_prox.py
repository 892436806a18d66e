"""Triton's proximal operators against the formula in float64, by the backend and past it."""

import pytest
import torch

import l0kernels as l0
from l0kernels import prox
from op_checks import tolerance
from triton_device import DEVICE

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy tells of inf and NaN
]

PENALTIES = {
    "l0_l1": prox.L0L1(0.1, 0.2),
    "l0_l2": prox.L0L2(0.1, 0.5),
    "tl1 small": prox.TransformedL1(1e-4),
    "tl1 soft": prox.TransformedL1(0.2, 1.5),
    "tl1 hard": prox.TransformedL1(0.2, 0.1),
    "lasso": prox.GroupLasso(0.8),
    "lasso columns": prox.GroupLasso(0.8, dim=1, by_size=True),
    "l0 groups": prox.GroupL0(0.8, dim=-1),
    "sparse group": prox.SparseGroupLasso(0.1, 0.5, dim=1),
    "tl1 group": prox.TransformedL1Group(0.4, 1.0, 0.7),
    "tl1 group columns": prox.TransformedL1Group(0.4, 0.2, 0.3, dim=1),
}
each = pytest.mark.parametrize("name", PENALTIES)


def assert_prox(penalty, x, step=1.0):
    exact = penalty.formula(x.double(), step.double() if isinstance(step, torch.Tensor) else step)
    eager = penalty.formula(x, step)
    on_device = step.to(DEVICE) if isinstance(step, torch.Tensor) else step
    with l0.use_backend("triton"):
        got = penalty.prox(x.to(DEVICE), on_device)
        own = x.to(DEVICE).clone(memory_format=torch.preserve_format)
        penalty.prox_(own, on_device)
    assert torch.equal(own, got)
    assert got.dtype == x.dtype
    got = got.cpu()
    # At a jump either side is as good: a rounding of x decides which.
    both = torch.ones_like(x, dtype=torch.bool)
    for factor in (1 - 1e-5, 1 + 1e-5):
        both &= (penalty.formula(x.double() * factor, step) == 0) == (exact == 0)
    assert ((got == 0) == (exact.to(x.dtype) == 0))[both].all()
    assert (got - exact)[both].abs().max() <= tolerance(eager[both], exact[both], x.dtype)


@each
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 130), (5, 6, 3, 3), (3, 4, 70), (33, 9)])
@pytest.mark.parametrize("by_element", [False, True])
def test_values(name, dtype, shape, by_element):
    assert_prox(PENALTIES[name], torch.randn(shape).to(dtype), torch.rand(shape) + 0.1 if by_element else 1.0)


@pytest.mark.parametrize("name", ["tl1 hard", "lasso", "sparse group"])
@pytest.mark.parametrize("shape", [(2, 20_000), (300, 3), (2, 1025)])
def test_several_parts(name, shape):
    assert_prox(PENALTIES[name], torch.randn(shape))


@pytest.mark.parametrize("name", ["tl1 group", "lasso", "sparse group rows", "l0 rows"])
@pytest.mark.parametrize("shape", [(3, 16_384), (2, 16_385), (2, 9_000), (1000, 3), (70, 31), (5, 1)])
@pytest.mark.parametrize("by_element", [False, True])
def test_groups_in_a_row(name, shape, by_element):
    """Long ones are read twice, short ones several at once."""
    more = {"sparse group rows": prox.SparseGroupLasso(0.1, 0.5), "l0 rows": prox.GroupL0(1.5)}
    penalty = {**PENALTIES, **more}[name]
    x = torch.randn(shape) * torch.rand(shape[0], 1).square()
    assert_prox(penalty, x, torch.rand(shape) + 0.1 if by_element else 1.0)


def test_several_rows_are_one_group():
    x = torch.randn(30, 40)
    for penalty in (prox.GroupLasso(5.0, run=3), prox.TransformedL1Group(0.9, 1.0, 0.9, run=10)):
        assert_prox(penalty, x)
    assert (prox.GroupLasso(5.0, run=3).formula(x, 1.0) != 0).any()


@each
def test_channels_last(name):
    x = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    assert_prox(PENALTIES[name], x)


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_magnitude(name, scale):
    x = torch.randn(20, 30) * scale
    with l0.use_backend("triton"):
        got = PENALTIES[name].prox(x.to(DEVICE)).cpu()
    assert torch.allclose(got.double(), PENALTIES[name].formula(x.double(), 1.0), rtol=1e-5, atol=0)


@each
def test_what_is_not_finite(name):
    x = torch.randn(6, 40)
    x[0, 3], x[1, 2], x[2, 1], x[3] = float("nan"), float("inf"), float("-inf"), 0.0
    expected = PENALTIES[name].formula(x, 1.0)
    with l0.use_backend("triton"):
        got = PENALTIES[name].prox(x.to(DEVICE)).cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())


def test_nothing_and_what_has_no_kernel():
    with l0.use_backend("triton"):
        assert prox.L1(0.1).prox(torch.empty(0, 3, device=DEVICE)).shape == (0, 3)
        x = torch.randn(4, 6, device=DEVICE)
        assert torch.equal(prox.TopK(3).prox(x), prox.TopK(3).formula(x, 1.0))
        assert torch.equal(prox.L0(0.3).prox(x[:, ::2]), prox.L0(0.3).formula(x[:, ::2], 1.0))
