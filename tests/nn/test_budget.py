"""Budget: where it ends, by which formula, and what it refuses."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import nn
from l0kernels._native import native

T = torch.nn
LIMIT = math.log(100)
BACKENDS = ["torch", *(["cpp"] if native is not None else [])]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, seeded, threads):
    threads(1)
    with l0.use_backend(request.param):
        yield request.param


def mlp(dtype=torch.float32, **options):
    return nn.L0MLP([20, 30, 12, 4], **options).to(dtype)


def spread(model, std=1.5):
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(1.0, std)
    return model


def adam(model, lr=1e-3, gate_lr=0.05):
    return torch.optim.Adam(nn.parameter_groups(model, gate_lr=gate_lr), lr=lr)


def train(model, optimizer, steps, scale=1.0, seed=0, n_in=20, n_out=4):
    """Some steps on fresh random data."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, n_in, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(x), (x[:, 0] > 0).long() * (n_out - 1))).backward()
        optimizer.step()
        yield


def shares(gate):
    """p between its ends at the clamp, in float64, by the formula."""
    low, high = (gate.dist.p_open(torch.tensor(end, dtype=torch.float64)) for end in (-LIMIT, LIMIT))
    p = gate.dist.p_open(gate.log_alpha.detach().double().clamp(-LIMIT, LIMIT))
    return (p - low) / (high - low)


def expected(model, count=nn.counts._l0):
    """The share of the parameters that the gates leave, by the counts and not by terms."""
    full = count(model, lambda gate: torch.ones(gate.log_alpha.shape, dtype=torch.float64))
    return (count(model, shares) / full).item()


@pytest.mark.covering(1)
@pytest.mark.parametrize("keep", [0.5, 0.2, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_hits_the_target_and_stays_there(keep, dtype):
    model = mlp(dtype, droprate_init=0.1)
    optimizer = adam(model)
    budget = nn.Budget(model, keep, steps=100)
    budget.attach(optimizer)
    first = budget.expected
    for t, _ in enumerate(train(model, optimizer, 120), 1):
        target = first + (keep - first) * min(1, t / 30)
        assert budget.target == pytest.approx(target, abs=1e-12)
        assert budget.expected <= target + 1e-6
        if budget.mu > 0:
            assert budget.expected == pytest.approx(target, abs=1e-6)
    assert budget.expected == pytest.approx(expected(model), abs=1e-9)
    assert budget.expected == pytest.approx(keep, abs=0.01)
    assert budget.count == 120
    assert budget.skipped == 0


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grads", ["random", "some", "none", "zero"])
def test_a_step_is_the_formula(dtype, grads):
    """By hand, in float64, with 100 bisections; v, the floor and its mean included."""
    model = spread(mlp(dtype))
    gates = nn.gate_modules(model)
    budget = nn.Budget(model, 0.3, steps=10, ramp=0.0)
    v, n = [torch.zeros(gate.n, dtype=torch.float64) for gate in gates], 0
    for step in range(1, 4):
        for at, gate in enumerate(gates):
            gate.log_alpha.grad = torch.randn_like(gate.log_alpha) * 10.0 ** (at - step)
            if grads == "zero":
                gate.log_alpha.grad.zero_()
            if grads == "none" or (grads == "some" and at == 1):
                gate.log_alpha.grad = None
        given = [0.0 if g.log_alpha.grad is None else g.log_alpha.grad.double() for g in gates]
        v = [0.999 * old + 0.001 * (g**2) for old, g in zip(v, given, strict=True)]
        rms = (torch.cat(v) / (1 - 0.999**step)).mean().sqrt()
        before = [gate.log_alpha.detach().double().clone() for gate in gates]
        xs = [b.clamp(-LIMIT, LIMIT).requires_grad_() for b in before]
        slope = torch.autograd.grad(_cost(model, xs), xs)
        scales = [(w / (1 - 0.999**step)).sqrt() + 0.01 * rms for w in v]
        q = [s / (torch.ones(()) if rms == 0 else c) for s, c in zip(slope, scales, strict=True)]

        def at_price(mu, before=before, q=q):
            return [(b - mu * d).clamp(-LIMIT, LIMIT) for b, d in zip(before, q, strict=True)]

        budget.step()
        low, high = 0.0, 1e12
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _cost(model, at_price(middle)) > 0.3 else (low, middle)
        mu = high
        assert _cost(model, before) > 0.3
        # What the shares are off by, and what that makes of the price where they fall so fast.
        beside = [_cost(model, at_price(part * mu)).item() for part in (0.999, 1.001)]
        off = (3e-7 if dtype == torch.float32 else 1e-9) * 0.002 * mu / (beside[0] - beside[1])
        assert budget.mu == pytest.approx(mu, abs=off)
        eps = torch.finfo(dtype).eps
        for gate, right, d in zip(gates, at_price(mu), q, strict=True):
            wrong = (gate.log_alpha.double() - right).abs()
            # 1 - P, in the slope of P, is .002 for an open gate: the direction is off by eps / .002.
            assert (wrong <= (off + mu * eps / 0.002) * d + 4 * eps * LIMIT).all()
        n += 1
        with torch.no_grad():
            for gate in gates:
                gate.log_alpha.add_(0.3 * torch.rand_like(gate.log_alpha))
    assert budget.count == n


def _cost(model, log_alphas):
    """c of given log_alphas, by the counts."""
    of = dict(zip(nn.gate_modules(model), log_alphas, strict=True))

    def share(gate):
        low, high = (gate.dist.p_open(torch.tensor(end, dtype=torch.float64)) for end in (-LIMIT, LIMIT))
        return (gate.dist.p_open(of[gate]) - low) / (high - low)

    full = nn.counts._l0(model, lambda gate: torch.ones(gate.n, dtype=torch.float64))
    return nn.counts._l0(model, share) / full


def test_it_pushes_nobody_who_is_below():
    model = mlp()
    for gate in nn.gate_modules(model):
        T.init.constant_(gate.log_alpha, -3.0)
    before = [gate.log_alpha.clone() for gate in nn.gate_modules(model)]
    budget = nn.Budget(model, 0.9, steps=10, ramp=0)
    budget.step()
    assert budget.mu == 0
    assert all(torch.equal(a, g.log_alpha) for a, g in zip(before, nn.gate_modules(model), strict=True))


def test_it_clamps():
    model = mlp()
    budget = nn.Budget(model, 0.9, steps=10)
    for gate, value in zip(nn.gate_modules(model), (9.0, -9.0, 9.0), strict=True):
        T.init.constant_(gate.log_alpha, value)
    budget.step()
    for gate, value in zip(nn.gate_modules(model), (LIMIT, -LIMIT, LIMIT), strict=True):
        torch.testing.assert_close(gate.log_alpha, torch.full_like(gate.log_alpha, value))


def test_high_targets_are_within_reach():
    """P(z > 0) alone ends at .047 of each side."""
    model = mlp(droprate_init=0.1)
    budget = nn.Budget(model, 0.02, steps=1, ramp=0)
    budget.step()
    assert budget.expected == pytest.approx(0.02, abs=1e-5)
    assert nn.expected_l0(model).item() / budget._kinds[0].of.unit > 0.03


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["grad", "log_alpha"])
def test_a_step_that_is_not_finite_is_skipped(bad, where):
    model = mlp()
    optimizer = adam(model)
    budget = nn.Budget(model, 0.5, steps=10)
    budget.attach(optimizer)
    [*train(model, optimizer, 3)]
    gates = nn.gate_modules(model)
    gates[1].log_alpha.grad[3] = bad
    if where == "log_alpha":
        gates[1].log_alpha.grad[3] = 0
        with torch.no_grad():
            gates[1].log_alpha[3] = bad
    before = [gate.log_alpha.clone() for gate in gates], copy.deepcopy(budget.state_dict())
    budget.step()
    assert budget.skipped == 1
    assert budget.count == 3
    for gate, old in zip(gates, before[0], strict=True):
        assert torch.equal(gate.log_alpha.nan_to_num(), old.nan_to_num())
    after = budget.state_dict()
    assert torch.equal(after["price"], before[1]["price"])
    for name, moment in before[1]["moment"].items():
        assert torch.equal(after["moment"][name], moment)


def test_kinds_have_a_price_each():
    model = mlp(droprate_init=0.1)
    optimizer = adam(model)
    budget = nn.Budget(model, {"0.in_gate": 0.8, r"layers\.[1]\..*": 0.3}, steps=60)
    budget.attach(optimizer)
    [*train(model, optimizer, 60)]
    first, second, third = nn.gate_modules(model)
    assert budget.expected == pytest.approx({"0.in_gate": 0.8, r"layers\.[1]\..*": 0.3}, abs=1e-3)
    assert shares(first).mean().item() == pytest.approx(0.8, abs=1e-3)
    assert shares(second).mean().item() == pytest.approx(0.3, abs=1e-3)
    assert shares(third).mean().item() > 0.8  # it belongs to none
    assert set(budget.mu) == set(budget.target) == set(budget.deterministic) == set(budget.keep)


def test_gates_of_no_kind_are_clamped():
    model = mlp()
    budget = nn.Budget(model, {"0.in_gate": 0.5}, steps=5)
    third = nn.gate_modules(model)[2]
    T.init.constant_(third.log_alpha, 50.0)
    budget.step()
    assert third.log_alpha.max().item() == pytest.approx(LIMIT)


def test_flops_of_convolutions():
    model = nn.L0Sequential(
        nn.L0Conv2d(3, 16, 3, gate="out"), T.ReLU(), nn.L0Conv2d(16, 8, 3, gate="out"), T.ReLU(), T.Flatten()
    )
    budget = nn.Budget(model, 0.4, cost="flops", steps=1, ramp=0, input_shape=(1, 3, 8, 8))
    budget.step()
    flops = nn.counts._flops(model, (1, 3, 8, 8), shares) / nn.counts._flops(
        model, (1, 3, 8, 8), lambda gate: torch.ones(gate.n, dtype=torch.float64)
    )
    assert budget.expected == pytest.approx(flops.item(), abs=1e-9)
    assert budget.expected == pytest.approx(0.4, abs=1e-5)
    full = nn.counts._flops(model, (1, 3, 8, 8), lambda gate: torch.ones(gate.n, dtype=torch.float64)).item()
    assert budget.deterministic == pytest.approx(nn.eval_flops(model.eval(), (1, 3, 8, 8)) / full)


def test_a_model_that_gate_has_gated():
    net = T.Sequential(T.Conv2d(3, 16, 3), T.BatchNorm2d(16), T.ReLU(), T.Flatten(), T.Linear(16 * 36, 20))
    net.append(T.ReLU()).append(T.Linear(20, 4))
    x = torch.randn(8, 3, 8, 8)
    nn.gate_(net, x, droprate_init=0.1)
    optimizer = adam(net)
    budget = nn.Budget(net, 0.25, steps=20)
    budget.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert budget.expected <= 0.25 + 1e-6
    assert budget.expected == pytest.approx(expected(net), abs=1e-6)


def test_a_cost_of_ones_own():
    model = mlp(droprate_init=0.1)
    asked = []

    def latency(kept):
        asked.append({name: x.shape for name, x in kept.items()})
        a, b, c = kept.values()
        return 3 + a.sum() * b.sum() + 7 * c.sum()

    budget = nn.Budget(model, 0.3, cost=latency, steps=1, ramp=0)
    budget.step()
    a, b, c = (shares(gate) for gate in nn.gate_modules(model))
    assert budget.expected == pytest.approx(
        (3 + a.sum() * b.sum() + 7 * c.sum()).item() / (3 + 600 + 84), abs=1e-9
    )
    assert budget.expected == pytest.approx(0.3, abs=1e-6)
    assert asked[0] == {f"layers.{i}.in_gate": (n,) for i, n in enumerate((20, 30, 12))}


def test_resumed_it_goes_on_bit_for_bit():
    def fresh():
        torch.manual_seed(3)
        model = mlp(droprate_init=0.1)
        optimizer = adam(model)
        budget = nn.Budget(model, 0.3, steps=60)
        budget.attach(optimizer)
        return model, optimizer, budget

    model, optimizer, budget = fresh()
    [*train(model, optimizer, 30, seed=1)]
    saved = pickle.dumps(
        (model.state_dict(), optimizer.state_dict(), budget.state_dict(), torch.get_rng_state())
    )
    [*train(model, optimizer, 30, seed=2)]
    other, again, second = fresh()
    state = pickle.loads(saved)
    other.load_state_dict(state[0])
    again.load_state_dict(state[1])
    second.load_state_dict(state[2])
    torch.set_rng_state(state[3])
    [*train(other, again, 30, seed=2)]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert budget.mu == second.mu
    assert second.count == 60


def test_state_of_other_gates_is_refused():
    state = nn.Budget(mlp(), 0.5, steps=5).state_dict()
    with pytest.raises(ValueError, match=r"state must be of the gates {'layers.0.in_gate': 8.*got {.*20"):
        nn.Budget(nn.L0MLP([8, 4]), 0.5, steps=5).load_state_dict(state)
    budget = nn.Budget(mlp(), {f"{i}.in_gate": 0.5 for i in range(3)}, steps=5)
    with pytest.raises(ValueError, match=r"state must hold 3 prices, got 1"):
        budget.load_state_dict(state)


def test_gates_that_do_not_train_stay():
    model = mlp(droprate_init=0.1)
    still = nn.gate_modules(model)[1]
    still.log_alpha.requires_grad_(False)
    optimizer = adam(model)
    before = still.log_alpha.clone()
    budget = nn.Budget(model, 0.3, steps=20)
    budget.attach(optimizer)
    [*train(model, optimizer, 20)]
    assert torch.equal(still.log_alpha, before)
    assert budget.expected == pytest.approx(0.3, abs=1e-4)


def test_a_gate_that_is_frozen_counts_as_it_is():
    model = mlp(droprate_init=0.1)
    optimizer = adam(model)
    budget = nn.Budget(model, 0.3, steps=20)
    budget.attach(optimizer)
    [*train(model, optimizer, 10)]
    first, *others = nn.gate_modules(model)
    with torch.no_grad():
        first.log_alpha[:10] = -4.0
    moments = budget.state_dict()["moment"]
    first.freeze_()
    [*train(model, optimizer, 10)]
    assert budget.expected <= 0.3 + 1e-6
    assert budget.expected == pytest.approx(expected_with(model, first), abs=1e-6)
    assert set(budget.state_dict()["moment"]) == set(moments) - {"layers.0.in_gate"}
    for gate in others:
        gate.freeze_()
    left = budget.deterministic
    [*train(model, optimizer, 2)]
    assert budget.deterministic == left


def expected_with(model, frozen):
    full = nn.counts._l0(model, lambda gate: torch.ones(gate.n, dtype=torch.float64))
    is_open = frozen.eval_gates().z.ne(0).double()
    return (nn.counts._l0(model, lambda gate: is_open if gate is frozen else shares(gate)) / full).item()


def test_layers_that_are_exchanged_are_seen():
    model = T.Sequential(nn.L0Linear(20, 30, gate="in"), T.ReLU(), nn.L0Linear(30, 4, gate="in"))
    optimizer = adam(model)
    budget = nn.Budget(model, 0.5, steps=10)
    budget.attach(optimizer)
    [*train(model, optimizer, 2)]
    model[2] = nn.L0Linear(30, 4, gate="both")
    optimizer.add_param_group({"params": [*model[2].parameters()]})
    [*train(model, optimizer, 64)]
    assert list(budget.state_dict()["moment"]) == ["0.in_gate", "2.in_gate", "2.out_gate"]
    assert budget.expected == pytest.approx(0.5, abs=1e-4)
    assert budget.expected == pytest.approx(expected(model), abs=1e-6)


def test_it_follows_its_gates_to_another_dtype():
    model = mlp(droprate_init=0.1)
    budget = nn.Budget(model, 0.3, steps=5, ramp=0)
    budget.step()
    model.double()
    for gate in nn.gate_modules(model):
        gate.log_alpha.data.add_(0.1)
    budget.step()
    assert budget.expected == pytest.approx(0.3, abs=1e-6)
    assert all(v.dtype == torch.float64 for v in budget.state_dict()["moment"].values())


def test_gates_of_two_precisions_and_distributions():
    first = nn.HardConcreteGate(20, dist=l0.HardConcrete(0.5, -0.3, 1.2), dtype=torch.float64)
    model = nn.L0Sequential(
        nn.L0Linear(20, 30, gate="in", in_gate=first), T.ReLU(), nn.L0Linear(30, 4, gate="in")
    )
    budget = nn.Budget(model, 0.3, steps=1, ramp=0)
    budget.step()
    assert budget.expected == pytest.approx(0.3, abs=1e-5)
    assert budget.expected == pytest.approx(expected(model), abs=1e-9)


def test_hooks_come_and_go():
    model = mlp()
    optimizer = adam(model)
    budget = nn.Budget(model, 0.5, steps=10)
    handle = budget.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached to an optimizer already: remove\(\)"):
        budget.attach(optimizer)
    handle.remove()
    [*train(model, optimizer, 1)]
    assert budget.count == 0
    budget.attach(optimizer)
    [*train(model, optimizer, 1)]
    assert budget.count == 1


def test_it_warns_of_a_layer_that_stays_closed():
    model = mlp()
    optimizer = adam(model, gate_lr=0.0)
    nn.Budget(model, 0.5, steps=10).attach(optimizer)
    T.init.constant_(nn.gate_modules(model)[1].log_alpha, -4.5)
    with pytest.warns(UserWarning, match=r"every evaluation gate is closed.*layers.1.in_gate"):
        [*train(model, optimizer, 130)]


def test_price_and_repr():
    budget = nn.Budget(mlp(), 0.5, steps=10)
    assert repr(budget) == "Budget(keep=0.5, cost='params', steps=10, ramp=0.3)"
    assert budget.mu == 0
    assert budget.target == budget.expected


class TestErrors:
    def test_no_gates(self):
        with pytest.raises(ValueError, match=r"model must contain gates, got a Linear without any"):
            nn.Budget(T.Linear(2, 3), 0.5, steps=5)

    @pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.1, math.nan])
    def test_keep_out_of_range(self, keep):
        with pytest.raises(ValueError, match=r"keep must (lie in \(0, 1\]|be finite), got"):
            nn.Budget(mlp(), keep, steps=5)
        with pytest.raises(ValueError, match=r"keep must (lie in \(0, 1\]|be finite), got"):
            nn.Budget(mlp(), {"0.in_gate": keep}, steps=5)

    def test_keep_out_of_reach(self):
        """The biases of the first two layers and of the last one stay: 4 + 4 + 3 of 47."""
        model = T.Sequential(
            nn.L0Linear(4, 4, gate="in"), T.Sigmoid(), T.Linear(4, 4), T.Sigmoid(), T.Linear(4, 1)
        )
        left = 4 + 20 + 5
        with pytest.raises(
            ValueError, match=rf"keep must be more than {left / 45:.4f}.*every gate closed.*got 0.3"
        ):
            nn.Budget(model, 0.3, steps=5)
        nn.Budget(model, 0.7, steps=5)

    def test_keep_of_a_wrong_kind(self):
        for keep in ("half", None, [0.5]):
            with pytest.raises(TypeError, match="keep must be a number"):
                nn.Budget(mlp(), keep, steps=5)
        with pytest.raises(ValueError, match="keep must name gates, got an empty mapping"):
            nn.Budget(mlp(), {}, steps=5)

    @pytest.mark.parametrize("steps", [0, -1])
    def test_steps(self, steps):
        with pytest.raises(ValueError, match="steps must"):
            nn.Budget(mlp(), 0.5, steps=steps)
        with pytest.raises(TypeError, match="steps must"):
            nn.Budget(mlp(), 0.5, steps=1.5)

    def test_ramp(self):
        with pytest.raises(ValueError, match=r"ramp must lie in \[0, 1\], got 1.5"):
            nn.Budget(mlp(), 0.5, steps=5, ramp=1.5)
        with pytest.raises(TypeError, match="ramp must be a number"):
            nn.Budget(mlp(), 0.5, steps=5, ramp="a")

    def test_cost(self):
        with pytest.raises(ValueError, match="cost must be 'params', 'flops' or a function, got 'memory'"):
            nn.Budget(mlp(), 0.5, cost="memory", steps=5)
        with pytest.raises(ValueError, match=r"cost must grow with the gates, got 3.0 closed and 3.0 open"):
            nn.Budget(mlp(), 0.5, cost=lambda kept: torch.tensor(3.0), steps=5)
        with pytest.raises(TypeError, match="cost must return a scalar tensor, got float"):
            nn.Budget(mlp(), 0.5, cost=lambda kept: 3.0, steps=5)
        with pytest.raises(TypeError, match=r"cost must return a scalar tensor, got shape \(20,\)"):
            nn.Budget(mlp(), 0.5, cost=lambda kept: next(iter(kept.values())), steps=5)

    def test_flops_need_a_shape(self):
        with pytest.raises(ValueError, match="input_shape must be given"):
            nn.Budget(nn.L0Conv2d(3, 4, 3, gate="out"), 0.5, cost="flops", steps=5)

    def test_patterns(self):
        with pytest.raises(ValueError, match=r"pattern must name a gate, got 'heads'; there are \['layers.0"):
            nn.Budget(mlp(), {"heads": 0.5}, steps=5)
        with pytest.raises(ValueError, match=re.escape("must name each gate once, got '0.in_gate' and '.*'")):
            nn.Budget(mlp(), {"0.in_gate": 0.5, ".*": 0.3}, steps=5)
        with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\*'"):
            nn.Budget(mlp(), {"*": 0.5}, steps=5)

    def test_optimizers(self):
        model = mlp()
        budget = nn.Budget(model, 0.5, steps=5)
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
            budget.attach([])
        with pytest.raises(
            ValueError, match=r"optimizer must train the gates.*lacks the log_alpha of layers.0"
        ):
            budget.attach(torch.optim.SGD(nn.weight_parameters(model), lr=0.1))

    def test_no_values(self):
        with pytest.raises(
            ValueError, match=r"model must hold values, got layers.0.in_gate on the meta device"
        ):
            nn.Budget(mlp().to("meta"), 0.5, steps=5)

    def test_devices(self):
        model = T.Sequential(nn.L0Linear(2, 3, gate="in"), nn.L0Linear(3, 2, gate="in").to("meta"))
        with pytest.raises(ValueError, match=r"gates on one device, got \['cpu', 'meta'\]"):
            nn.Budget(model, 0.5, steps=5)
