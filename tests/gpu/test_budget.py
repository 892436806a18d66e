"""On a GPU a budget's step and the proximal operators never make the host wait, can be captured, and equal
those on the CPU."""

import copy

import pytest
import torch
from gpu_cases import NEEDS_GPU, capture, no_sync

import l0kernels as l0

pytestmark = NEEDS_GPU

DEVICE = "cuda"
SIZES = (40, 60, 30, 7)


def trained(model, device, keep=0.3):
    """(step, budget): the step gives every parameter a fixed gradient and ends with the budget's."""
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.Adam(
        l0.nn.parameter_groups(model, gate_lr=0.05), lr=1e-3, capturable=device == "cuda"
    )
    budget = l0.nn.Budget(model, keep=keep, steps=20)
    budget.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * 0.01
        parameter.grad = -gradient.abs().to(device)  # the loss would have every gate open
    return optimizer.step, budget, model


def log_alphas(model):
    return torch.cat([gate.log_alpha.detach() for gate in l0.nn.gate_modules(model)])


def test_a_budget_never_waits():
    step, budget, _ = trained(l0.nn.L0MLP(SIZES), DEVICE)
    for _ in range(3):
        step()
    with no_sync():
        for _ in range(70):  # past the steps that look at the model anew
            step()
    assert budget.expected == pytest.approx(0.3, abs=1e-3)


def test_a_budget_equals_that_on_the_cpu():
    model = l0.nn.L0MLP(SIZES)
    runs = [trained(model, device) for device in ("cpu", DEVICE)]
    for _ in range(30):
        for step, _, _ in runs:
            step()
    (_, on_cpu, slow), (_, on_gpu, fast) = runs
    assert on_gpu.expected == pytest.approx(on_cpu.expected, abs=1e-5)
    assert on_gpu.expected == pytest.approx(0.3, abs=1e-3)
    torch.testing.assert_close(log_alphas(fast).cpu(), log_alphas(slow), rtol=1e-3, atol=1e-3)


def test_a_captured_budget_equals_eager():
    model = l0.nn.L0MLP(SIZES)
    step, budget, captured = trained(model, DEVICE)
    graph, _ = capture(step)
    before = budget.expected
    for _ in range(17):
        graph.replay()
    torch.cuda.synchronize()
    assert budget.expected < before
    eager_step, eager, eager_model = trained(model, DEVICE)
    for _ in range(20):  # three of them warmed up
        eager_step()
    assert budget.expected == pytest.approx(eager.expected, abs=1e-6)
    torch.testing.assert_close(log_alphas(captured), log_alphas(eager_model), rtol=1e-4, atol=1e-4)


REGULARISERS = {
    "l1": l0.prox.L1(0.3),
    "l0": l0.prox.L0(0.2),
    "transformed_l1": l0.prox.TransformedL1(0.3),
    "group_lasso": l0.prox.GroupLasso(2.0),
    "transformed_l1_group": l0.prox.TransformedL1Group(0.3, 0.5),
}


@pytest.mark.parametrize("name", REGULARISERS)
def test_prox(name):
    regulariser = REGULARISERS[name]
    x = torch.randn(257, 130, device=DEVICE)
    x[3] *= 0.01
    expected = regulariser.prox(x.double().cpu(), 0.5)
    regulariser.prox(x, 0.5)
    with no_sync():
        found = regulariser.prox(x, 0.5)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    assert found.eq(0).any()
    weights = x.clone()
    graph, _ = capture(lambda: regulariser.prox_(weights, 0.5))
    weights.copy_(x)
    graph.replay()
    torch.testing.assert_close(weights, found, rtol=0, atol=0)
