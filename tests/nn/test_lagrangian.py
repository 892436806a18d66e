"""The multiplier of a budget in the loss, and what changes in the course of a training."""

import dataclasses

import pytest
import torch

import l0kernels as l0
from l0kernels import nn

T = torch.nn


@pytest.fixture(autouse=True)
def fixed(seeded):
    """Random nets, always the same."""


def mlp(**options):
    return nn.L0MLP([20, 30, 12, 4], **options)


def spread(model, std=2.0):
    for gate in nn.gate_modules(model):
        T.init.normal_(gate.log_alpha, 0.5, std)
    return model


class TestLagrangian:
    def test_the_term_and_its_ascent_are_the_formula(self):
        model = spread(mlp())
        lagrangian = nn.Lagrangian(model, 0.4, steps=10, ramp=0.5, lr=0.7)
        budget = nn.Budget(model, 0.4, steps=10)
        first, multiplier = budget.expected, 0.0
        for step in range(1, 9):
            target = first + (0.4 - first) * min(1, step / 5)
            for gate in nn.gate_modules(model):
                gate.log_alpha.grad = None
            term = lagrangian()
            assert term.item() == pytest.approx(multiplier * (budget.expected - target), abs=1e-12)
            term.backward()
            gate = nn.gate_modules(model)[0]
            with torch.no_grad():
                before, change = budget.expected, 1e-3
                slope = gate.log_alpha.grad.double().sum().item()
                gate.log_alpha += change
                risen = multiplier * (budget.expected - before) / change
                gate.log_alpha -= change
            assert slope == pytest.approx(risen, rel=0.01, abs=1e-6)
            lagrangian.step()
            excess = budget.expected - target
            multiplier = multiplier + 0.7 * excess if excess > 0 else 0.0
            assert lagrangian.multiplier == pytest.approx(multiplier, abs=1e-12)
            with torch.no_grad():
                gate.log_alpha += 0.3 if step % 2 else -0.5

    def test_it_restarts_or_not(self):
        model = spread(mlp())
        both = [nn.Lagrangian(model, 0.2, steps=10, ramp=0, restarts=restarts) for restarts in (True, False)]
        for lagrangian in both:
            lagrangian()
            lagrangian.step()
            assert lagrangian.multiplier > 0
        for gate in nn.gate_modules(model):
            T.init.constant_(gate.log_alpha, -2.5)
        risen = both[1].multiplier
        for lagrangian in both:
            lagrangian()
            lagrangian.step()
        assert both[0].multiplier == 0
        assert 0 < both[1].multiplier < risen

    def test_it_reaches_the_target(self):
        model = mlp(droprate_init=0.1)
        optimizer = torch.optim.Adam(nn.parameter_groups(model, gate_lr=0.05), lr=1e-3)
        nn.clamp_after_step(optimizer, model)
        lagrangian = nn.Lagrangian(model, 0.4, steps=300)
        lagrangian.attach(optimizer)
        budget = nn.Budget(model, 0.4, steps=1)
        for _ in range(300):
            x = torch.randn(16, 20)
            optimizer.zero_grad()
            loss = T.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
            (loss + lagrangian()).backward()
            optimizer.step()
        assert budget.expected == pytest.approx(0.4, abs=0.05)

    def test_kinds_and_state(self):
        model = spread(mlp())
        keep = {"0.in_gate": 0.3, "1.in_gate": 0.9}
        lagrangian = nn.Lagrangian(model, keep, steps=10, ramp=0)
        lagrangian()
        lagrangian.step()
        assert set(lagrangian.multiplier) == set(keep)
        assert lagrangian.multiplier["0.in_gate"] > lagrangian.multiplier["1.in_gate"]
        other = nn.Lagrangian(model, keep, steps=10, ramp=0)
        other.load_state_dict(lagrangian.state_dict())
        assert other.multiplier == lagrangian.multiplier
        assert torch.equal(other(), lagrangian())
        with pytest.raises(ValueError, match="state must hold 1 multipliers, got 2"):
            nn.Lagrangian(model, 0.5, steps=2).load_state_dict(lagrangian.state_dict())

    def test_a_nan_does_not_stay(self):
        model = spread(mlp())
        lagrangian = nn.Lagrangian(model, 0.2, steps=10, ramp=0)
        gate = nn.gate_modules(model)[0]
        before = gate.log_alpha.detach().clone()
        with torch.no_grad():
            gate.log_alpha[0] = float("nan")
        lagrangian()
        lagrangian.step()
        assert lagrangian.multiplier == 0
        with torch.no_grad():
            gate.log_alpha.copy_(before)
        lagrangian()
        lagrangian.step()
        assert 0 < lagrangian.multiplier < 1

    def test_errors(self):
        for options, text in (
            ({"lr": 0.0}, r"lr must be positive and finite, got 0.0"),
            ({"ramp": 2}, r"ramp must lie in \[0, 1\], got 2"),
            ({"steps": 0}, r"steps must"),
            ({"cost": "time"}, r"cost must be 'params'"),
        ):
            with pytest.raises(ValueError, match=text):
                nn.Lagrangian(mlp(), 0.5, **{"steps": 5, **options})
        with pytest.raises(ValueError, match="model must contain gates"):
            nn.Lagrangian(T.Linear(2, 2), 0.5, steps=5)


class TestSchedules:
    def test_ramps(self):
        linear, cubic = nn.Ramp(10, 1.0, 3.0, begin=5), nn.Ramp(10, 1.0, 3.0, begin=5, shape="cubic")
        assert [linear(step) for step in (0, 5, 10, 15, 99)] == [1, 1, 2, 3, 3]
        assert [cubic(step) for step in (0, 5, 10, 15, 99)] == [1, 1, 3 - 2 * 0.125, 3, 3]
        assert nn.Ramp(10, 1.0, 3.0, shape="constant")(0) == 3

    def test_lam(self):
        model = mlp(lam=[0.1, 0.2, 0.4])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = nn.Schedule(model, lam=nn.Ramp(4), every=2)
        handle = schedule.attach(optimizer)
        found = [[gate.lam for gate in nn.gate_modules(model)]]
        for _ in range(4):
            optimizer.step()
            found.append([gate.lam for gate in nn.gate_modules(model)])
        assert found == [[0.0] * 3, [0.0] * 3, [0.05, 0.1, 0.2], [0.05, 0.1, 0.2], [0.1, 0.2, 0.4]]
        assert nn.gate_modules(model)[1].lam_tensor.item() == 0.2
        handle.remove()
        state = schedule.state_dict()
        other = nn.Schedule(again := mlp(), lam=nn.Ramp(4))
        other.load_state_dict(state)
        assert [gate.lam for gate in nn.gate_modules(again)] == found[-1]

    def test_temperature(self):
        model = mlp()
        gates = nn.gate_modules(model)
        gates[0].dist = dataclasses.replace(gates[0].dist, zeta=1.2)
        schedule = nn.Schedule(model, beta=nn.Ramp(2, 2 / 3, 1 / 3))
        schedule.step()
        assert [gate.dist.beta for gate in gates] == pytest.approx([0.5] * 3)
        assert gates[0].dist.zeta == 1.2
        assert gates[1].dist is gates[2].dist  # they are drawn together
        schedule.step()
        assert gates[0].dist == l0.HardConcrete(1 / 3, -0.1, 1.2)

    def test_a_budget_follows_the_temperature(self):
        model = spread(mlp())
        budget = nn.Budget(model, 0.3, steps=1, ramp=0)
        budget.step()
        nn.Schedule(model, beta=lambda step: 0.9)
        budget.step()
        assert budget.expected == pytest.approx(0.3, abs=1e-5)
        ends = [gate.dist.p_open(torch.tensor([-4.605170, 4.605170])) for gate in nn.gate_modules(model)]
        share = [
            ((g.dist.p_open(g.log_alpha) - low) / (high - low)).clamp(0, 1).sum()
            for g, (low, high) in zip(nn.gate_modules(model), ends, strict=True)
        ]
        count = share[0] * share[1] + share[1] + share[1] * share[2] + share[2] + 4 * share[2] + 4
        full = 20 * 30 + 30 + 30 * 12 + 12 + 12 * 4 + 4
        assert count.item() / full == pytest.approx(0.3, abs=1e-5)

    def test_lams_by_pattern(self):
        model = mlp()
        nn.set_lam_(model, {"0.in_gate": 0.5, r"layers\.[12]\..*": 0.03})
        assert [gate.lam for gate in nn.gate_modules(model)] == [0.5, 0.03, 0.03]
        with pytest.raises(ValueError, match=r"lam must be >= 0, got -1 for 'in_gate'"):
            nn.set_lam_(model, {"in_gate": -1})
        with pytest.raises(ValueError, match=r"pattern must name a gate, got 'heads'"):
            nn.set_lam_(model, {"heads": 1})
        assert [gate.lam for gate in nn.gate_modules(model)] == [0.5, 0.03, 0.03]

    def test_errors(self):
        with pytest.raises(ValueError, match="lam or beta must be given, got neither"):
            nn.Schedule(mlp())
        with pytest.raises(ValueError, match="model must contain gates"):
            nn.Schedule(T.Linear(2, 2), lam=nn.Ramp(3))
        with pytest.raises(ValueError, match=r"shape of lam must be one of .*got 'square'"):
            nn.Schedule(mlp(), lam=nn.Ramp(3, shape="square"))
        with pytest.raises(ValueError, match="every must"):
            nn.Schedule(mlp(), lam=nn.Ramp(3), every=0)
        with pytest.raises(ValueError, match="state must be of 3 gates, got 1"):
            nn.Schedule(mlp(), lam=nn.Ramp(3)).load_state_dict({"steps": 1, "lams": [0.1]})


def nets():
    conv = T.Sequential(T.Conv2d(3, 6, 3), T.ReLU(), T.Conv2d(6, 6, 3, groups=6), T.ReLU(), T.Conv2d(6, 4, 1))
    nn.gate_(conv, torch.randn(1, 3, 8, 8))
    gate = nn.HardConcreteGate(5)
    return {
        "chain": mlp(),
        "weights": nn.L0Linear(4, 3, gate="weight"),
        "both sides": nn.L0Linear(5, 5, gate="both", in_gate=gate, out_gate=gate),
        "gate_": conv,
    }


@pytest.mark.parametrize("name", nets())
def test_weight_decay_of_detached_gates(name):
    """The value and the weights' gradients are those of the coupled norm, the gates' those without it."""
    model = spread(nets()[name].double())
    gates, weights = nn.gate_parameters(model), nn.weight_parameters(model)
    grads = {}
    for key, options in (
        ("coupled", {"weight_decay": 0.3}),
        ("detached", {"weight_decay": 0.3, "detach_gates": True}),
        ("alone", {}),
    ):
        total = nn.penalty(model, **options)
        grads[key] = total, torch.autograd.grad(total, [*gates, *weights], allow_unused=True)
    n = len(gates)
    torch.testing.assert_close(grads["detached"][0], grads["coupled"][0])
    torch.testing.assert_close(grads["detached"][1][:n], grads["alone"][1][:n])
    assert any(
        not torch.equal(a, b) for a, b in zip(grads["coupled"][1][:n], grads["alone"][1][:n], strict=True)
    )
    for a, b in zip(grads["detached"][1][n:], grads["coupled"][1][n:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert all(log_alpha.requires_grad for log_alpha in gates)
