"""l0_penalty and l2_penalty on every backend against the formula in float64."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

import l0kernels as l0
from l0kernels import HardConcrete, reference
from op_checks import compare, sliced, strided, transposed

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dist", [HardConcrete(), HardConcrete(0.5, -0.3, 1.2)])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (13,), (256,), (257,), (3001,), (7, 11), (2, 3, 5)])
def test_one_tensor_of_any_shape(backend, shape, dist, dtype):
    tensors = {"log_alpha": torch.randn(shape, dtype=dtype) * 3}

    def call(namespace, log_alpha):
        return namespace.l0_penalty(log_alpha, 7, lam=0.25, dist=dist)

    y, grads = compare(call, tensors, dtype=dtype)
    assert y.shape == ()
    assert grads["log_alpha"].shape == shape
    assert (grads["log_alpha"] != 0).all()  # the penalty reaches every gate, closed ones too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [2, 0.5, [3, 0, 2.5], (3, 4, 5)])
@pytest.mark.parametrize("lams", [1.0, [0.1, 20, 3], (0.0, 1.0, 2.0)])
def test_lists(backend, sizes, lams, dtype):
    tensors = {name: torch.randn(n, dtype=dtype) for name, n in (("a", 40), ("b", 1), ("c", 300))}

    def call(namespace, **log_alphas):
        return namespace.l0_penalty(list(log_alphas.values()), sizes, lam=lams)

    y, _ = compare(call, tensors, dtype=dtype)
    assert y.dtype == dtype
    sizes, lams = ([v] * 3 if isinstance(v, (int, float)) else v for v in (sizes, lams))
    parts = [l0.l0_penalty(t, n, lam=lam) for t, n, lam in zip(tensors.values(), sizes, lams, strict=True)]
    torch.testing.assert_close(y, torch.stack(parts).sum().detach())


def test_defaults_are_the_expected_count(backend):
    log_alpha = torch.tensor([-30.0, 30.0, 30.0, 0.0])
    expected = 2 + HardConcrete().p_open(torch.zeros(())).item()
    assert l0.l0_penalty(log_alpha).item() == pytest.approx(expected)


def test_each_subset_of_gradients(backend):
    tensors = {name: torch.randn(40) for name in "abc"}

    def call(namespace, **log_alphas):
        return namespace.l0_penalty(list(log_alphas.values()), [1, 2, 3])

    for needs in ("a", "b", "ac", "abc", ""):
        _, grads = compare(call, tensors, dtype=torch.float32, needs=list(needs))
        assert set(grads) == set(needs)


def test_layouts(backend):
    tensors = {
        "a": strided(torch.randn(40)),
        "b": transposed(torch.randn(5, 8)),
        "c": torch.randn(1).expand(9),
    }

    def call(namespace, **log_alphas):
        return namespace.l0_penalty(list(log_alphas.values()), [1, 2, 3])

    compare(call, tensors, dtype=torch.float32)


def test_gradient_scales_with_the_loss(backend):
    log_alpha = torch.randn(40, requires_grad=True)
    (one,) = torch.autograd.grad(l0.l0_penalty(log_alpha), log_alpha)
    (three,) = torch.autograd.grad(3 * l0.l0_penalty(log_alpha), log_alpha)
    torch.testing.assert_close(three, 3 * one)
    p = HardConcrete().p_open(log_alpha.detach())
    torch.testing.assert_close(one, p * (1 - p))


def test_the_same_tensor_twice(backend):
    log_alpha = torch.randn(40, requires_grad=True)
    (grad,) = torch.autograd.grad(l0.l0_penalty([log_alpha, log_alpha], [1, 2]), log_alpha)
    (expected,) = torch.autograd.grad(l0.l0_penalty(log_alpha, 3), log_alpha)
    torch.testing.assert_close(grad, expected)


def test_gradcheck(backend):
    leaves = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    assert gradcheck(lambda *a: l0.l0_penalty(list(a), [2.0, 3.0], lam=[0.5, 0.1]), leaves)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    assert gradcheck(lambda w, a, b: l2(l0, w, in_log_alpha=a, out_log_alpha=b), (weight, *leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, dtype):
    log_alpha, weight = torch.randn(40, requires_grad=True), torch.randn(7, 40)
    plain = (l0.l0_penalty(log_alpha), l0.l2_penalty(weight, in_log_alpha=log_alpha))
    with torch.autocast("cpu", dtype=dtype):
        cast = (l0.l0_penalty(log_alpha), l0.l2_penalty(weight, in_log_alpha=log_alpha))
    for left, right in zip(plain, cast, strict=True):
        assert right.dtype == torch.float32
        assert torch.equal(left, right)
    (grad,) = torch.autograd.grad(cast[0], log_alpha)
    assert grad.dtype == torch.float32


def test_extreme_values(backend):
    log_alpha = torch.tensor([-1e30, 1e30, -float("inf"), float("inf"), -87.0, 90.0], requires_grad=True)
    y = l0.l0_penalty(log_alpha)
    (grad,) = torch.autograd.grad(y, log_alpha)
    assert y.item() == pytest.approx(3.0)
    assert grad.abs().max() < 1e-30


def test_a_long_sum_keeps_its_digits(backend):
    log_alpha = torch.randn(300_001)
    exact = reference.l0_penalty(log_alpha.double()).item()
    assert l0.l0_penalty(log_alpha).item() == pytest.approx(exact, rel=3e-7)


def l2(namespace, weight, groups=1, **log_alphas):
    return namespace.l2_penalty(weight, 0.3, groups=groups, **log_alphas)


def l2_tensors(shape, groups, has, dtype, layout=torch.clone):
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "weight": layout(torch.randn(shape).to(dtype)),
        "in_log_alpha": torch.randn(shape[1] * groups, dtype=gates) if has[0] else None,
        "out_log_alpha": torch.randn(shape[0], dtype=gates) if has[1] else None,
    }


SIDES = [(True, True), (True, False), (False, True), (False, False)]
SHAPES = [
    ((4, 6), 1),
    ((129, 1100), 1),  # several parts of rows and chunks of columns
    ((300, 1), 1),  # a bias is a column
    ((4, 6, 3, 2), 1),
    ((130, 3, 3, 2), 2),
    ((6, 1, 3), 6),
    ((0, 4), 1),
    ((4, 0), 1),
]


class TestL2:
    @pytest.mark.parametrize("has", SIDES)
    @pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
    def test_equals_the_formula(self, backend, shape, groups, has):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            compare(partial(l2, groups=groups), l2_tensors(shape, groups, has, dtype), dtype=dtype)

    @pytest.mark.parametrize(("shape", "groups"), SHAPES[:5], ids=str)
    def test_instruction_sets(self, isa, shape, groups):
        for dtype in (torch.float32, torch.float64):
            compare(partial(l2, groups=groups), l2_tensors(shape, groups, (True, True), dtype), dtype=dtype)

    def test_layouts(self, backend):
        for shape, layout in (
            ((7, 13), transposed),
            ((7, 13), sliced),
            ((6, 5, 3, 3), lambda t: t.contiguous(memory_format=torch.channels_last)),
        ):
            tensors = l2_tensors(shape, 1, (True, True), torch.float32, layout)
            tensors["in_log_alpha"] = strided(tensors["in_log_alpha"])
            _, grads = compare(l2, tensors, dtype=torch.float32)
            assert grads["weight"].stride() == torch.empty_like(tensors["weight"]).stride()

    def test_each_gradient_alone(self, backend):
        tensors = l2_tensors((70, 37), 1, (True, True), torch.float32)
        for name in tensors:
            compare(l2, tensors, dtype=torch.float32, needs=[name])

    def test_the_same_for_any_number_of_threads(self, isa, threads):
        tensors = l2_tensors((400, 300), 1, (True, True), torch.float32)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        results = []
        for n in (1, 2, 3):
            threads(n)
            y = l2(l0, **leaves)
            results.append([y, *torch.autograd.grad(y, leaves.values())])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    def test_a_long_sum_keeps_its_digits(self, backend):
        tensors = l2_tensors((3000, 700), 1, (True, True), torch.float32)
        exact = l2(reference, **{name: t.double() for name, t in tensors.items()}).item()
        assert l2(l0, **tensors).item() == pytest.approx(exact, rel=1e-6)


class TestErrors:
    def test_log_alpha(self, backend):
        with pytest.raises(ValueError, match="log_alpha must hold at least one tensor, got none"):
            l0.l0_penalty([])
        with pytest.raises(TypeError, match=r"log_alpha must be float32 or float64, got torch.bfloat16"):
            l0.l0_penalty(torch.zeros(3).bfloat16())
        with pytest.raises(TypeError, match=r"log_alpha\[1\] must have the dtype of log_alpha\[0\]"):
            l0.l0_penalty([torch.zeros(3), torch.zeros(3).double()])
        with pytest.raises(TypeError, match=r"log_alpha\[1\] must be a torch.Tensor, got list"):
            l0.l0_penalty([torch.zeros(3), [1.0]])
        with pytest.raises(ValueError, match=r"log_alpha\[1\] must be on cpu, .* got meta"):
            l0.l0_penalty([torch.zeros(3), torch.zeros(3, device="meta")])

    def test_nan_names_the_tensor(self, backend):
        nan = torch.tensor([0.0, float("nan")])
        with pytest.raises(ValueError, match=r"^log_alpha must not hold NaN"):
            l0.l0_penalty(nan)
        with pytest.raises(ValueError, match=r"log_alpha\[1\] must not hold NaN"):
            l0.l0_penalty([torch.zeros(3), nan, torch.zeros(2)])
        with pytest.raises(ValueError, match="in_log_alpha must not hold NaN"):
            l0.l2_penalty(torch.zeros(3, 2), in_log_alpha=nan)

    @pytest.mark.parametrize("name", ["group_size", "lam"])
    def test_numbers(self, backend, name):
        a = torch.zeros(3)
        with pytest.raises(ValueError, match=f"{name} must be one number or one per log_alpha, 2, got 3"):
            l0.l0_penalty([a, a], **{name: [1, 2, 3]})
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            l0.l0_penalty([a, a], **{name: [1, "2"]})
        with pytest.raises(ValueError, match=f"{name} must be finite, got inf"):
            l0.l0_penalty(a, **{name: float("inf")})

    def test_constants(self, backend):
        with pytest.raises(TypeError, match="dist must be a HardConcrete, got float"):
            l0.l0_penalty(torch.zeros(3), dist=1.0)

    def test_l2(self, backend):
        weight = torch.zeros(4, 6)
        with pytest.raises(ValueError, match=r"in_log_alpha must have shape \(6,\) .* got \(4,\)"):
            l0.l2_penalty(weight, in_log_alpha=torch.zeros(4))
        with pytest.raises(ValueError, match=r"out_log_alpha must be on cpu, .* got meta"):
            l0.l2_penalty(weight, out_log_alpha=torch.zeros(4, device="meta"))
        with pytest.raises(ValueError, match=r"weight must have shape \(out, in, \.\.\.\), got \(4,\)"):
            l0.l2_penalty(weight[:, 0])
