"""Triton's step of a budget against the formula and csrc: of random nets, kinds, frozen gates."""

import copy
import warnings

import fuzz_nets
import fuzz_units
import pytest
import torch

import l0kernels as l0
from l0kernels import nn
from l0kernels._native import native
from l0kernels.budget import Projection, State
from l0kernels.nn.shares import Wish, kinds_of
from triton_device import DEVICE

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy tells of inf and NaN
]

BACKENDS = ("reference", "cpp") if native is not None else ("reference",)


def prepared(model, std=2.0):
    """Gates of any openness, with gradients."""
    for gate in nn.gate_modules(model):
        with torch.no_grad():
            gate.log_alpha.normal_(0.5, std)
        gate.log_alpha.grad = torch.randn_like(gate.log_alpha) * 10 ** torch.randn(())
    return model


def fresh_state(n, kinds, device="cpu"):
    def zeros(*shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=device)

    doubles, integers = torch.float64, torch.int64
    return State(
        torch.rand(n).to(device) * 1e-3,
        zeros(kinds, dtype=doubles) + 1,
        zeros(kinds, dtype=doubles),
        zeros(dtype=integers) + 5,
        zeros(dtype=integers),
    )


def on_device(kind, device):
    kept = kind.kept
    return kind._replace(
        kept=kept._replace(**{k: getattr(kept, k).to(device) for k in ("shift", "low", "high")})
    )


def step(kinds, gates, backend, ramp_steps=0.0):
    """log_alphas and state after two steps from the same start."""
    device = DEVICE if backend == "triton" else "cpu"
    copies = [copy.deepcopy(gate.log_alpha).to(device).detach() for gate in gates]
    for mine, gate in zip(copies, gates, strict=True):
        mine.requires_grad_(gate.log_alpha.requires_grad)
    grads = [None if g.log_alpha.grad is None else g.log_alpha.grad.to(device) for g in gates]
    torch.manual_seed(7)
    state = fresh_state(sum(gate.n for gate in gates), len(kinds), device)
    projection = Projection([on_device(kind, device) for kind in kinds], ramp_steps)
    with l0.use_backend(backend):
        for at in range(2):
            for one in copies if at else ():
                one.data += 0.3 * one.requires_grad  # the optimiser opens them
            projection(copies, grads, state)
    return [one.detach().cpu().flatten() for one in copies], State(*(value.cpu() for value in state))


def assert_alike(kinds, gates, one_price=False, **options):
    """Of all backends: moments and counts, log_alphas where the price is one, and the shares.

    one_price: whether it is, as it is where the share falls with every price around the budget.
    """
    ours, got = step(kinds, gates, "triton", **options)
    for backend in BACKENDS:
        theirs, right = step(kinds, gates, backend, **options)
        torch.testing.assert_close(got.moment, right.moment)
        assert (got.step, got.skipped) == (right.step, right.skipped)
        for kind in kinds:
            price, other = float(got.price[kind.number]), float(right.price[kind.number])
            is_one = price == pytest.approx(other, rel=1e-3, abs=1e-12)
            assert is_one or not one_price, (backend, price, other)
            if is_one:
                for mine, one in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mine, one, rtol=1e-3, atol=5e-3)
        start = 0
        for kind in kinds:
            last = start + len(kind.sizes)
            found, expected = (
                kind.share(kind.kept(torch.cat(each[start:last]))).item() for each in (ours, theirs)
            )
            assert found == pytest.approx(expected, abs=2e-6)
            start = last
    return ours, got


def kinds_at(model, wish, closer):
    """Kinds whose budgets are between what is left with all gates closed and what there is."""
    kinds = []
    for kind in kinds_of(model, wish):
        a = torch.cat([gate.log_alpha.detach().flatten() for gate in kind.gates])
        now = kind.of.share(kind.of.kept(a)).item()
        floor = kind.of.share(torch.zeros(len(a), dtype=torch.float64)).item()
        kinds.append(kind.of._replace(keep=floor + closer * (now - floor)))
    return kinds


@pytest.mark.parametrize("closer", [1.1, 0.9, 0.3, 0.01])
def test_mlp(closer):
    model = prepared(nn.L0MLP([37, 161, 19, 4]))
    kinds = kinds_at(model, Wish(0.5), closer)
    _, state = assert_alike(kinds, nn.gate_modules(model), one_price=closer > 0.1)
    assert (state.price[0] > 0) == (closer < 1)
    assert int(state.step) == 7


def test_what_no_price_reaches():
    model = prepared(nn.L0MLP([37, 16, 4]))
    (kind,) = kinds_of(model, Wish(0.5))
    ours, _ = assert_alike([kind.of._replace(keep=-1.0)], nn.gate_modules(model))
    assert torch.cat(ours).lt(-4.6).all()


def test_ramp():
    model = prepared(nn.L0MLP([37, 16, 4]))
    assert_alike(kinds_at(model, Wish(0.5), 0.3), nn.gate_modules(model), one_price=True, ramp_steps=9.0)


def convolutional():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.Conv2d(6, 6, 3, groups=6, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 9, 1),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(9 * 16, 5),
    )  # fmt: skip
    nn.gate_(net, torch.randn(2, 3, 4, 4))
    return net


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_gated_model(cost):
    model = prepared(convolutional())
    wish = Wish(0.5, cost, (1, 3, 4, 4))
    assert_alike(kinds_at(model, wish, 0.4), nn.gate_modules(model), one_price=True)


@pytest.mark.parametrize("gate", ["weight", (3, 4)])
def test_atoms(gate):
    """Gates of single weights meet those of units."""
    model = prepared(torch.nn.Sequential(nn.L0Linear(9, 7, gate="in"), nn.L0Linear(7, 5, gate=gate)))
    assert_alike(kinds_at(model, Wish(0.5), 0.4), nn.gate_modules(model))


def units(seed):
    net, x = fuzz_units.random_net(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.gate_(net, x, block=1 + seed % 3 // 2)
    return net.float()


def test_random_nets():
    compared = with_atoms = 0
    for make in (lambda seed: fuzz_nets.random_net(seed)[0].float(), units):
        for seed in range(4):
            try:
                model = prepared(make(seed))
                kinds = kinds_at(model, Wish(0.5), float(torch.rand(())))
            except ValueError:  # nothing to gate, or nothing that would change the size
                continue
            assert_alike(kinds, nn.gate_modules(model))
            compared += 1
            with_atoms += bool(kinds[0].terms.atoms)
    assert compared > 4
    assert with_atoms


def test_kinds_frozen_ones_and_dists():
    """Each kind has its own price; what requires no gradient stays, and counts."""
    dist = l0.HardConcrete(0.5, -0.3, 1.2)
    model = torch.nn.Sequential(
        nn.L0Linear(33, 40, gate="in"),
        nn.L0Linear(40, 1100, gate="in", dist=dist),
        nn.L0Linear(1100, 3, gate="in"),
    )
    prepared(model)
    wish = Wish({"0.in_gate": 0.5, "[12].in_gate": 0.5})
    kinds = kinds_at(model, wish, 0.4)
    gates = nn.gate_modules(model)
    gates[1].log_alpha.requires_grad_(False)
    gates[1].log_alpha.grad = None
    before = gates[1].log_alpha.clone()
    ours, state = assert_alike(kinds, gates)
    assert torch.equal(ours[1], before)
    assert (state.price > 0).all()


@pytest.mark.parametrize("what", ["grad", "log_alpha", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_moves_nothing(what, value):
    model = prepared(nn.L0MLP([37, 16, 4]))
    gates = nn.gate_modules(model)
    kinds = kinds_at(model, Wish(0.5), 0.3)
    log_alphas = [gate.log_alpha.detach().clone().to(DEVICE).requires_grad_() for gate in gates]
    grads = [gate.log_alpha.grad.clone().to(DEVICE) for gate in gates]
    state = fresh_state(53, 1, DEVICE)
    with torch.no_grad():
        {"grad": grads[1], "log_alpha": log_alphas[1], "moment": state.moment}[what][3] = value
    before = [t.detach().clone() for t in (*log_alphas, *state)]
    with l0.use_backend("triton"):
        Projection([on_device(kind, DEVICE) for kind in kinds], 0.0)(log_alphas, grads, state)
    after = [*log_alphas, *state]
    for old, new in zip(before[:-1], after[:-1], strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=0, equal_nan=True)
    assert int(state.skipped) == 1


@pytest.mark.parametrize("given", [(), (0,), (1,)])
def test_gates_without_a_gradient(given):
    model = prepared(nn.L0MLP([37, 16, 4]))
    gates = nn.gate_modules(model)
    for at, gate in enumerate(gates):
        if at not in given:
            gate.log_alpha.grad = None
    assert_alike(kinds_at(model, Wish(0.5), 0.3), gates)


def test_is_reproducible():
    model = prepared(nn.L0MLP([37, 161, 19, 4]))
    kinds = kinds_at(model, Wish(0.5), 0.3)
    (first, one), (second, other) = (step(kinds, nn.gate_modules(model), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first, *one), (*second, *other), strict=True))


def test_budget_trains():
    model = nn.L0MLP([20, 30, 12, 4], droprate_init=0.1).to(DEVICE)
    optimizer = torch.optim.Adam(nn.parameter_groups(model, gate_lr=0.05), lr=1e-3)
    with l0.use_backend("triton"):
        budget = nn.Budget(model, 0.3, steps=6, ramp=0.5)
        budget.attach(optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            (model(torch.randn(4, 20, device=DEVICE)).square().mean()).backward()
            optimizer.step()
    assert 0.2 < budget.expected <= 0.3 + 2e-6
    assert budget.count == 6


def test_memory_is_looked_at():
    model = nn.L0MLP([6, 4])
    kind = on_device(kinds_of(model, Wish(0.5))[0].of, DEVICE)
    log_alpha = nn.gate_modules(model)[0].log_alpha.detach().to(DEVICE)
    projection = Projection([kind], 0.0)

    def freed(t):
        t = t.clone()
        t.untyped_storage().resize_(0)
        return t

    state = fresh_state(6, 1, DEVICE)
    zeros = torch.zeros(6, device=DEVICE)
    with l0.use_backend("triton"):
        projection([log_alpha.clone()], [None], state)
        for wrong, error in (
            (([freed(log_alpha)], [None], state), RuntimeError),
            (([log_alpha], [freed(log_alpha)], state), RuntimeError),
            (([log_alpha], [zeros[:5]], state), ValueError),
            (([log_alpha], [zeros.double()], state), TypeError),
            (([log_alpha], [None], state._replace(moment=zeros[:5])), ValueError),
            (([log_alpha], [None], state._replace(price=zeros[:1])), TypeError),
            (([log_alpha], [None], state._replace(step=zeros[0])), TypeError),
        ):
            with pytest.raises(error):
                projection(*wrong)
