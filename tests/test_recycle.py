"""The gradient's buffer is lent again only when nobody holds the gradient, and never outlives its weight."""

import gc

import pytest
import torch

import l0kernels as l0
from l0kernels._registry import native
from l0kernels.impl import recycle


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(recycle, "SMALLEST", 0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 9))
    log_alpha = torch.nn.Parameter(torch.randn(9))
    x = torch.randn(5, 9)

    def step(seed):
        y = l0.l0_linear(x, weight, in_log_alpha=log_alpha, seed=torch.tensor([seed]))
        y.square().sum().backward()
        return weight.grad

    return weight, step


def expected(weight, step, seed):
    with l0.use_backend("reference"):
        weight.grad = None
        grad = step(seed).clone()
    weight.grad = None
    return grad


needs_native = pytest.mark.skipif(native is None, reason="only the native backend recycles")


@needs_native
def test_a_released_gradient_is_written_over(layer):
    weight, step = layer
    first = step(1).data_ptr()
    weight.grad = None
    assert step(2).data_ptr() == first
    assert torch.allclose(weight.grad, expected(weight, step, 2), rtol=1e-5, atol=1e-5)


@needs_native
def test_a_gradient_that_is_held_is_left_alone(layer):
    weight, step = layer
    held = step(1)
    as_it_was = held.clone()
    weight.grad = None
    view = step(2)[2:5]
    view_as_it_was = view.clone()
    weight.grad = None
    for seed in range(3, 7):
        step(seed)
        weight.grad = None
    assert torch.equal(held, as_it_was)
    assert torch.equal(view, view_as_it_was)


@needs_native
def test_gradients_accumulate(layer):
    weight, step = layer
    total = expected(weight, step, 1) + expected(weight, step, 2) + expected(weight, step, 3)
    for seed in (1, 2, 3):
        step(seed)
    assert torch.allclose(weight.grad, total, rtol=1e-5, atol=1e-5)


def test_numpy_shares_what_it_holds():
    weight = torch.randn(3, 4)
    array = recycle.empty_grad(weight).numpy()
    array[:] = 1
    recycle.empty_grad(weight).fill_(2)
    assert (array == 1).all()


def test_at_most_two_buffers_and_none_without_the_weight():
    weight = torch.randn(3, 4)
    grads = [recycle.empty_grad(weight) for _ in range(4)]
    assert len({grad.data_ptr() for grad in grads}) == 4
    assert len(recycle._buffers[weight]) == recycle.KEPT
    before = len(recycle._buffers)
    del weight
    gc.collect()
    assert len(recycle._buffers) == before - 1


def test_another_shape_gets_another_buffer():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    recycle.empty_grad(weight)
    weight.data = torch.randn(5, 6)
    assert recycle.empty_grad(weight).shape == (5, 6)


def test_small_gradients_are_left_to_the_allocator(monkeypatch):
    monkeypatch.setattr(recycle, "SMALLEST", 1 << 20)
    weight = torch.randn(3, 4)
    recycle.empty_grad(weight)
    assert weight not in recycle._buffers
