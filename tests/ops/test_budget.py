"""The step of a budget: csrc against the formula, on the costs of random nets, and what either refuses."""

import copy
import math
import warnings

import fuzz_nets
import fuzz_units
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import l0kernels as l0
from l0kernels import nn, reference
from l0kernels._native import native
from l0kernels.budget import Projection, State
from l0kernels.impl import memory
from l0kernels.nn.shares import Wish, kinds_of

T = torch.nn
needs_native = pytest.mark.skipif(native is None, reason="l0kernels._C was not built")


@pytest.fixture(autouse=True)
def fixed(seeded, threads):
    threads(1)


def container(seed):
    net, _ = fuzz_nets.random_net(seed)
    return net


def units(seed):
    net, x = fuzz_units.random_net(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.gate_(net, x, block=1 + seed % 3 // 2)
    return net


def random_cases(makers, seeds):
    """(net, its gates, one kind for all of them), gates of one dtype, some at the ends of the clamp."""
    for make in makers:
        for seed in seeds:
            try:
                net = make(seed)
                gates = nn.gate_modules(net)
                (kind,) = kinds_of(net, Wish(0.5))
            except ValueError:  # nothing to gate, or nothing that would change the size
                continue
            if len({gate.log_alpha.dtype for gate in gates}) > 1:
                continue
            for gate in gates:
                gate.log_alpha.requires_grad_()
                T.init.normal_(gate.log_alpha, 0.5, 3)
                gate.log_alpha.grad = torch.randn_like(gate.log_alpha) * 10 ** torch.randn(())
            yield net, gates, kind


def step(kind, gates, keep, backend, price=0.0):
    """log_alphas and price after a step, which starts from the price of the step before."""
    copies = [copy.deepcopy(gate.log_alpha) for gate in gates]
    n, dtype = sum(gate.n for gate in gates), gates[0].log_alpha.dtype
    integer = torch.zeros(2, dtype=torch.int64)
    state = State(
        torch.zeros(n, dtype=dtype),
        torch.ones(1, dtype=torch.float64),
        torch.tensor([price], dtype=torch.float64),
        *integer,
    )
    with l0.use_backend(backend):
        Projection([kind.of._replace(keep=keep)], 0.0)(copies, [gate.log_alpha.grad for gate in gates], state)
    assert state.step == 1
    return torch.cat([one.detach().flatten() for one in copies]), state


@needs_native
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.long)])
def test_native_is_the_formula(half):
    compared = moved = 0
    for _, gates, kind in random_cases((container, units), range(half, 60, 2)):
        share = kind.of.share
        before = kind.of.kept(torch.cat([gate.log_alpha.detach().flatten() for gate in gates]))
        now, floor = share(before).item(), share(torch.zeros_like(before)).item()
        target = floor + torch.rand(()).item() * (now - floor)
        (theirs, right), (ours, got) = (step(kind, gates, target, name) for name in ("reference", "cpp"))
        off = 1e-6 if theirs.dtype == torch.float32 else 1e-10
        for result in (theirs, ours):
            assert abs(share(kind.of.kept(result)).item() - target) <= off * max(1, now)
        torch.testing.assert_close(got.moment, right.moment)
        # Where the share falls slowly, prices that are far apart come to the same.
        same = torch.isclose(got.price, right.price, rtol=1e-3, atol=0)
        if same:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
        compared += 1
        moved += bool(same)
    assert compared > 15
    assert moved > 0.9 * compared


@needs_native
@pytest.mark.parametrize("price", [1e-12, 1e-3, 1.0, 1e3, 1e12, math.inf, math.nan])
def test_the_search_ends_alike_wherever_it_starts(price):
    model = nn.L0MLP([37, 61, 19, 4])
    gates = nn.gate_modules(model)
    for gate in gates:
        gate.log_alpha.grad = torch.randn(gate.n)
    (kind,) = kinds_of(model, Wish(0.5))
    for keep in (0.3, 0.05, kind.of.share(torch.zeros(sum(gate.n for gate in gates))).item(), 0.0):
        (theirs, right), (ours, got) = step(kind, gates, keep, "cpp"), step(kind, gates, keep, "cpp", price)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.price, right.price, rtol=1e-3, atol=0)


@needs_native
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    before = native.isa()
    model = nn.L0MLP([37, 61, 19, 4])
    for gate in nn.gate_modules(model):
        gate.log_alpha.grad = torch.randn(gate.n)
    (kind,) = kinds_of(model, Wish(0.5))
    theirs, _ = step(kind, nn.gate_modules(model), 0.3, "reference")
    if not native.set_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        ours, _ = step(kind, nn.gate_modules(model), 0.3, "cpp")
    finally:
        native.set_isa(before)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_formula_reads_no_number_on_the_host():
    """A fake tensor has none: what would wait for a GPU, or differ in a captured graph, raises here."""
    model = nn.L0Sequential(
        nn.L0Conv2d(2, 3, 3, gate="out"), T.ReLU(), T.Flatten(), nn.L0Linear(48, 5, gate="in")
    )
    kinds = [kind.of for kind in kinds_of(model, Wish({"0.out_gate": 0.5, "3.in_gate": 0.3}))]
    log_alphas = [gate.log_alpha for gate in nn.gate_modules(model)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        n = sum(a.numel() for a in log_alphas)
        integers = (torch.zeros((), dtype=torch.int64) for _ in range(2))
        shares = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
        fakes = [torch.zeros(a.shape, requires_grad=True) for a in log_alphas]
        Projection(kinds, 10.0)._formula(
            fakes, [fakes[0].detach(), None], State(torch.zeros(n), *shares, *integers)
        )


def test_searches_end_where_they_should():
    """Of steep, flat and far away curves, with any number of points."""
    for points, rounds in ((31, 4), (1, 22), (7, 7)):
        for scale in (1e-6, 1.0, 1e8):
            for curve in (lambda x: 1 / (1 + x), lambda x: (-x).exp(), lambda x: (1 - x / 50).clamp(min=0)):

                def values(prices, curve=curve, scale=scale):
                    return curve(prices / scale)

                zero = torch.zeros((), dtype=torch.float64)
                slope = (values(zero) - values(zero + 1e-6 * scale)) / (1e-6 * scale)
                first = torch.stack((values(zero), slope))
                for target in (0.99, 0.5, 0.02):
                    found = reference.budget.solve(
                        values, first, zero + 60 * scale, zero + target, points, rounds
                    )
                    reach = values(zero + 60 * scale).item()
                    assert values(found).item() == pytest.approx(max(target, reach), rel=1e-6)
                assert reference.budget.solve(values, first, zero + 60, zero + 1.0, points, rounds) == 0


@needs_native
class TestNative:
    KIND = (
        0,
        (2, 1.0, [(False, 2, [0, 1])], [(0, 2, 1.0)], [0, 1], [(0, 2, 1.0)], [(0, 0, 1.0)]),
        [(2, 0, 0, 1)],
    )

    def test_terms_must_lie_within(self):
        number, cost, gates = self.KIND
        rest = False, torch.float32, (0,) * 5, 1.0, 2.0
        native.Budget([(number, cost, gates, 0.0, 1.0, 0.5)], *rest)
        for at, wrong in (
            (2, [(False, 2, [0, 9])]),
            (2, [(False, 0, [])]),
            (2, [(False, 2, [0])]),
            (3, [(4, 2, 1.0)]),
            (3, [(-1, 2, 1.0)]),
            (4, [0, 2]),
            (4, [1, 1]),
            (4, []),
            (5, [(0, 99, 1.0)]),
            (6, [(0, 1, 1.0)]),
            (6, [(-1, 0, 1.0)]),
        ):
            bad = (*cost[:at], wrong, *cost[at + 1 :])
            with pytest.raises(ValueError, match="terms of a cost must lie within its values"):
                native.Budget([(number, bad, gates, 0.0, 1.0, 0.5)], *rest)
        with pytest.raises(ValueError, match="terms of a cost"):
            native.Budget([(number, cost, [(3, 0, 0, 1)], 0.0, 1.0, 0.5)], *rest)

    def test_memory_is_looked_at(self):
        model = nn.L0MLP([6, 4])
        (kind,) = kinds_of(model, Wish(0.5))
        log_alpha = nn.gate_modules(model)[0].log_alpha.detach()
        projection = Projection([kind.of], 0.0)

        def state(**changes):
            integers = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
            shares = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
            return State(torch.zeros(6), *shares, *integers)._replace(**changes)

        def freed(t):
            t = t.clone()
            t.untyped_storage().resize_(0)
            return t

        projection([log_alpha.clone()], [None], state())
        for wrong, error in (
            (([freed(log_alpha)], [None], state()), RuntimeError),
            (([log_alpha], [freed(log_alpha)], state()), RuntimeError),
            (([log_alpha], [torch.zeros(5)], state()), ValueError),
            (([log_alpha], [torch.zeros(6).double()], state()), TypeError),
            (([log_alpha], [None], state(moment=torch.zeros(5))), ValueError),
            (([log_alpha], [None], state(price=torch.zeros(1))), TypeError),
            (([log_alpha], [None], state(step=torch.zeros(()))), TypeError),
            (([log_alpha], [torch._neg_view(torch.zeros(6))], state()), memory.NotPlain),
        ):
            with pytest.raises(error):
                projection(*wrong)

    def test_each_of_several_vectors_is_looked_at(self):
        """Behind others that are fine; nothing is written."""
        model = nn.L0MLP([6, 8, 5, 4])
        (kind,) = kinds_of(model, Wish(0.5))
        given = [gate.log_alpha.detach() for gate in nn.gate_modules(model)]
        freed = torch.zeros(8)
        freed.untyped_storage().resize_(16)
        state = State(
            torch.zeros(19),
            *(torch.ones(1, dtype=torch.float64) for _ in range(2)),
            *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
        )
        projection = Projection([kind.of], 0.0)
        before = [a.clone() for a in given]
        for wrong, error in (
            (freed, RuntimeError),
            (torch.zeros(9), ValueError),
            (torch.zeros(8).double(), TypeError),
            (torch._neg_view(torch.zeros(8)), memory.NotPlain),
        ):
            with pytest.raises(error, match=r"^grad must"):
                projection(given, [None, wrong, torch.zeros(5)], state)
        assert all(map(torch.equal, given, before))
        assert state.step == state.skipped == 0

    def test_gradients_of_any_strides(self):
        model = nn.L0MLP([6, 8, 4])
        gates = nn.gate_modules(model)
        (kind,) = kinds_of(model, Wish(0.5))
        for gate in gates:
            gate.log_alpha.grad = torch.randn(gate.n)
        expected, _ = step(kind, gates, 0.3, "cpp")
        gates[1].log_alpha.grad = gates[1].log_alpha.grad.repeat_interleave(2)[::2]
        assert not gates[1].log_alpha.grad.is_contiguous()
        assert torch.equal(step(kind, gates, 0.3, "cpp")[0], expected)

    def test_versions_count(self):
        """Autograd sees that log_alpha was written."""
        model = nn.L0MLP([6, 4])
        log_alpha = nn.gate_modules(model)[0].log_alpha
        before = log_alpha._version
        nn.Budget(model, 0.5, steps=1).step()
        assert log_alpha._version > before

    def test_gates_across_memory_take_the_formula(self):
        model = nn.L0MLP([6, 8, 4])
        gate = nn.gate_modules(model)[0]
        gate.log_alpha.data = gate.log_alpha.data.repeat_interleave(2)[::2]
        budget = nn.Budget(model, 0.3, steps=1, ramp=0)
        budget.step()
        assert budget.expected == pytest.approx(0.3, abs=1e-6)
