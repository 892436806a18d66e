"""Costs as terms: the values and gradients of expected_l0 and expected_flops, on nets of every kind."""

import warnings

import fuzz_nets
import fuzz_units
import pytest
import torch
import unit_nets

from l0kernels import nn
from l0kernels.nn.cost import cost_of
from l0kernels.reference.budget import Terms

T = torch.nn


def p_open(gates):
    return [gate.dist.p_open(gate.log_alpha).double().flatten() for gate in gates]


def check(model, shape, rtol=1e-12):
    """Both costs against the counts, as values and as gradients, and of gates that are open, or not."""
    gates = nn.gate_modules(model)
    if not gates:
        return
    for gate in gates:
        gate.log_alpha.requires_grad_()
    counts = {"params": nn.expected_l0(model)}
    if shape is not None:
        counts["flops"] = nn.expected_flops(model, shape)
    for cost, expected in counts.items():
        found = cost_of(model, gates, cost, shape)
        got = Terms(found.terms)(torch.cat(p_open(gates)))
        torch.testing.assert_close(got, expected.cpu(), rtol=rtol, atol=1e-9)
        alphas = [gate.log_alpha for gate in gates]
        ours, theirs = (
            torch.autograd.grad(value, alphas, allow_unused=True, retain_graph=True)
            if value.requires_grad
            else [None] * len(alphas)
            for value in (got, expected)
        )
        for a, b, alpha in zip(ours, theirs, alphas, strict=True):
            zero = torch.zeros_like(alpha)
            a, b = (zero if g is None else g for g in (a, b))
            narrow = alpha.dtype == torch.float32
            scale = max(b.abs().max().item(), 1e-9)
            torch.testing.assert_close(
                a, b, rtol=1e-5 if narrow else 1e-10, atol=scale * (1e-6 if narrow else 1e-12)
            )


@pytest.mark.parametrize("first", range(0, fuzz_nets.NETS, 10))
def test_containers(first):
    checked = 0
    for seed in range(first, first + 10):
        net, x = fuzz_nets.random_net(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(net, x.shape)
        checked += bool(nn.gate_modules(net))
    assert checked > 3


@pytest.mark.parametrize("name", unit_nets.NETS)
def test_gated_models(name):
    torch.manual_seed(0)
    net, args = unit_nets.NETS[name]()
    block = int(torch.randint(1, 3, ()))
    nn.gate_(net, *args, block=block)
    for gate in nn.gate_modules(net):
        T.init.normal_(gate.log_alpha, 0, 2)
    single = len(args) == 1 and isinstance(args[0], torch.Tensor)
    check(net, args[0] if single else None)


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (25, 50, 75))])
def test_random_gated_models(first):
    checked = 0
    for seed in range(first, first + 25):
        net, x = fuzz_units.random_net(seed)
        try:
            nn.gate_(net, x, inputs=seed % 5 == 0, block=1 + seed % 3 // 2)
        except ValueError:  # it has nothing to gate
            continue
        for gate in nn.gate_modules(net):
            T.init.normal_(gate.log_alpha, 0, 2)
        check(net, x)
        checked += 1
    assert checked > 5


class TestLayers:
    """What the random nets seldom have: each way in which a gate meets itself, and gates per weight."""

    def of(self, model, shape):
        model = model.double()
        for gate in nn.gate_modules(model):
            T.init.normal_(gate.log_alpha, 0, 2)
        check(model, shape)
        return model

    def test_feed_forward(self):
        for activation in ("relu", "swiglu"):
            self.of(nn.L0FeedForward(5, 7, activation), (2, 5))

    def test_a_gate_on_both_sides_of_a_linear_layer(self):
        gate = nn.HardConcreteGate(6)
        self.of(nn.L0Linear(6, 6, gate="both", in_gate=gate, out_gate=gate), (2, 6))

    def test_a_gate_on_both_sides_with_weight_gates(self):
        gate = nn.HardConcreteGate(4)
        first, second = nn.L0Linear(3, 4, gate="weight"), nn.L0Linear(4, 2, gate=(2, 3))
        self.of(nn.L0Sequential(nn.L0Linear(3, 3, gate="in"), first, T.ReLU(), second, T.ReLU()), (2, 3))
        middle = nn.L0Linear(4, 4, gate="weight")
        before = nn.L0Linear(3, 4, gate="out", out_gate=gate)
        behind = nn.L0Linear(4, 2, gate="in", in_gate=gate)
        self.of(nn.L0Sequential(before, middle, behind), (2, 3))

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_grouped_convolutions_with_one_gate(self, groups):
        gate = nn.HardConcreteGate(4)
        first = nn.L0Conv2d(3, 4, 3, gate="out", out_gate=gate)
        second = nn.L0Conv2d(4, 4, 3, padding=1, groups=groups, gate="out", out_gate=gate)
        self.of(nn.L0Sequential(first, T.ReLU(), second, T.ReLU(), nn.L0Conv2d(4, 2, 1)), (1, 3, 6, 6))

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_convolutions_of_gates_per_weight(self, groups):
        for kind in (nn.L0Conv2d, nn.L0ConvTranspose2d):
            first = nn.L0Conv2d(3, 4, 1, gate="both")
            self.of(nn.L0Sequential(first, kind(4, 8, 3, groups=groups, gate="weight")), (1, 3, 6, 6))

    def test_features_behind_flatten(self):
        conv, linear = nn.L0Conv2d(2, 3, 3, gate="out"), nn.L0Linear(3 * 16, 5, gate="in")
        self.of(nn.L0Sequential(conv, T.ReLU(), T.Flatten(), linear), (1, 2, 6, 6))

    def test_nothing_gated_on_one_side_is_linear(self):
        cost = cost_of(model := nn.L0Linear(4, 3, gate="in"), nn.gate_modules(model))
        assert not len(cost.terms.coefficient)
        assert cost.terms.linear.tolist() == [3.0] * 4 + [0.0] * 2
        assert cost.terms.constant == 3

    def test_chains_are_products_of_sums(self):
        cost = cost_of(model := nn.L0MLP([20, 30, 10]), nn.gate_modules(model))
        assert not cost.terms.atoms
        assert cost.terms.coefficient.tolist() == [1.0]
        assert sorted(cost.terms.offsets.diff().tolist()) == [20, 30]


def test_frozen_gates_are_constants_and_others_open():
    torch.manual_seed(0)
    model = nn.L0MLP([6, 7, 5, 4])
    for gate in nn.gate_modules(model):
        T.init.normal_(gate.log_alpha, 0, 3)
    first, second, _ = nn.gate_modules(model)
    first.freeze_()
    cost = cost_of(model, [second])
    open_ = first.eval_gates().z.ne(0).sum().item()
    p = torch.rand(7, dtype=torch.float64)
    expected = open_ * p.sum() + p.sum() + p.sum() * 5 + 5 + 5 * 4 + 4
    torch.testing.assert_close(Terms(cost.terms)(p), expected)
    assert cost.full == sum(w.numel() for w in nn.weight_parameters(model))


def test_the_default_device_does_not_matter():
    torch.manual_seed(0)
    net, args = unit_nets.NETS["mobilenet_v2"]()
    nn.gate_(net, *args)
    wanted = cost_of(net, nn.gate_modules(net))
    with torch.device("meta"):
        found = cost_of(net, nn.gate_modules(net))
    assert found.terms.constant == wanted.terms.constant
    for a, b in zip(found.terms[3:], wanted.terms[3:], strict=True):
        assert torch.equal(a, b)


def test_many_vectors_at_once():
    torch.manual_seed(0)
    conv, linear = nn.L0Conv2d(2, 3, 3, gate="out"), nn.L0Linear(3 * 16, 5, gate="in")
    model = nn.L0Sequential(conv, T.ReLU(), T.Flatten(), linear)
    terms = Terms(cost_of(model, nn.gate_modules(model)).terms)
    x = torch.rand(4, 2, terms.terms.n, dtype=torch.float64)
    each = torch.stack([torch.stack([terms(part) for part in half]) for half in x])
    torch.testing.assert_close(terms(x), each, rtol=1e-14, atol=0)
