"""GateBank: one draw for every gate of a model, seeds counted on the device, nothing of it in copies."""

import contextvars
import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import nn, reference
from l0kernels.nn.bank import KEY_STEP
from op_checks import BACKENDS, ONE_BACKEND

D = 12


@pytest.fixture(params=[*BACKENDS, "reference"], autouse=True)
def backend(request):
    with l0.use_backend(request.param):
        yield request.param


class Net(torch.nn.Module):
    """Every kind of layer with gates, and a gate that two layers share."""

    def __init__(self):
        super().__init__()
        shared = nn.HardConcreteGate(D)
        self.both = nn.L0Linear(D, D, gate="both", out_gate=shared)
        self.input = nn.L0Linear(D, D, in_gate=shared)
        self.output = nn.L0Linear(D, D, gate="out")
        self.weight = nn.L0Linear(D, D, gate="weight")
        self.block = nn.L0Linear(D, D, gate=(5, 4))
        self.mlp = nn.L0MLP((D, 17, D), "gelu")
        self.feed_forward = nn.L0FeedForward(D, 19, "swiglu")
        self.own = nn.HardConcreteGate(D)

    def forward(self, x):
        x = torch.tanh(self.input(self.both(x)))
        x = self.weight(x) + self.output(x) + self.block(x)
        return self.feed_forward(self.mlp(x)) * self.own().z


def make(net=Net):
    torch.manual_seed(0)
    model = net()
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, 2)
    return model


def run(model, x):
    """Output and gradients of every parameter."""
    model.zero_grad()
    y = model(x.clone().requires_grad_())
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def zs(model):
    return [gate().z.detach().clone() for gate in nn.gate_modules(model)]


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def counter(monkeypatch):
    """The names of the operators called."""
    calls = []
    names = ("sample", "sample_expected", "gate_grad", "gated_mlp", "gated_linear", "masked_weight")
    for name in (*names, "block_linear"):
        operator = getattr(l0._ops, name)

        def counted(*args, name=name, operator=operator):
            calls.append(name)
            return operator(*args)

        monkeypatch.setattr(l0._ops, name, counted)
    return calls


X = torch.randn(6, D, generator=torch.Generator().manual_seed(1))


def key(bank_seed, t):
    """The documented seed of draw t as (1,) int64."""
    value = (bank_seed + KEY_STEP * t) % 2**64
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


def test_gates_are_those_of_the_documented_seed():
    model = make()
    bank = nn.GateBank(model, seed=2**63 - 5)
    weight = model.weight.weight_gate
    vectors = [gate for gate in nn.gate_modules(model) if gate is not weight]
    assert len(vectors) == 8
    for draw in range(3):
        bank.draw()
        logs = [gate.log_alpha.flatten() for gate in vectors]
        expected = reference.sample_gates(logs, seed=key(2**63 - 5, 2 * draw))
        for gate, theirs in zip(vectors, expected, strict=True):
            mine = gate()
            torch.testing.assert_close(mine.z, theirs.z)
            assert torch.equal(mine.index, theirs.index)
            assert torch.equal(mine.count, theirs.count)
        theirs = reference.sample_gates(weight.log_alpha.flatten(), seed=key(2**63 - 5, 2 * draw + 1))
        torch.testing.assert_close(weight().z, theirs.z)
    assert bank.step.item() == 6


def test_one_sample_call_for_the_whole_model(monkeypatch, backend):
    if backend == "reference":
        return  # has no operators
    model = make()
    bank = nn.GateBank(model)
    calls = counter(monkeypatch)
    bank.draw(expected=True)
    assert calls == ["sample_expected"]
    calls.clear()
    bank.draw()
    assert calls == ["sample"]
    calls.clear()
    y = model(X)
    assert sorted(calls) == [
        *("block_linear", "gated_linear", "gated_linear", "gated_linear", "gated_linear"),
        *("gated_mlp", "gated_mlp", "masked_weight"),
    ]
    calls.clear()
    y.sum().backward()
    assert calls.count("sample") == 0
    assert calls.count("gate_grad") == 2, "layers have it in their own node; model.own and the blocks do not"


def test_the_forward_uses_the_gates_drawn():
    """Against the dense formula with the z that the gates report."""
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    z = {name: gate().z for name, gate in model.named_modules() if isinstance(gate, nn.HardConcreteGate)}
    f = torch.nn.functional

    def dense(layer, x, z_in=1.0, z_out=1.0, z_weight=1.0):
        return f.linear(x * z_in, layer.weight * z_weight, layer.bias) * z_out

    x = dense(model.both, X, z["both.in_gate"], z["both.out_gate"])
    x = torch.tanh(dense(model.input, x, z["both.out_gate"]))
    blocks = model.block.spread(z["block.weight_gate"])
    total = dense(model.weight, x, z_weight=z["weight.weight_gate"].view(D, D))
    x = total + dense(model.output, x, z_out=z["output.out_gate"]) + dense(model.block, x, z_weight=blocks)
    first, second = model.mlp.layers
    x = dense(second, f.gelu(dense(first, x, z["mlp.layers.0.in_gate"])), z["mlp.layers.1.in_gate"])
    up = model.feed_forward.up(x)
    x = dense(model.feed_forward.down, f.silu(up[:, :19]) * up[:, 19:], z["feed_forward.hidden_gate"])
    expected = x * z["own"]
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    expected.square().sum().backward()
    theirs = [p.grad.clone() for p in model.parameters()]
    for mine, other in zip(run(model, X)[1:], theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_draw_holds_until_the_next():
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    first = run(model, X)
    assert all_equal(run(model, X), first)
    assert all_equal(zs(model), zs(model))
    before = zs(model)
    bank.draw()
    after = zs(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(run(model, X)[0], first[0])
    state = torch.get_rng_state()
    model(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_clear():
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    bank.clear()
    gate = model.mlp.layers[0].in_gate
    assert gate.draws
    assert not torch.equal(gate().z, gate().z)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="drawn twice in one forward"):
        y = model(X)
    torch.manual_seed(3)
    assert torch.equal(model(X), y)
    nn.GateBank(model)  # a bank that never draws changes nothing
    torch.manual_seed(3)
    assert torch.equal(model(X), y)


def test_gates_that_were_not_drawn_draw_themselves():
    model = make(lambda: torch.nn.Sequential(nn.L0MLP((D, 9, D)), nn.L0Linear(D, D, gate="both")))
    bank = nn.GateBank(model[0].layers[0])
    bank.draw()
    drawn, *others = nn.gate_modules(model)
    assert torch.equal(drawn().z, drawn().z)
    for gate in others:
        assert not torch.equal(gate().z, gate().z)
    torch.manual_seed(3)
    y = model(X)
    torch.manual_seed(3)
    assert torch.equal(model(X), y)
    assert not torch.equal(model(X), y)


def test_evaluation_is_unaffected():
    model = make().eval()
    expected = model(X)
    model.train()
    bank = nn.GateBank(model)
    bank.draw()
    model.eval()
    assert torch.equal(model(X), expected)
    step = bank.step.clone()
    bank.draw()
    assert torch.equal(bank.step, step), "nothing to draw"
    assert torch.equal(model(X), expected)
    model.train()
    model.mlp.layers[0].in_gate.eval()
    bank.draw()
    assert torch.equal(model.mlp.layers[0].in_gate().z, model.mlp.layers[0].in_gate.eval_gates().z)
    assert not model.mlp.layers[1].in_gate.draws
    gates = [layer.in_gate() for layer in model.mlp.layers]
    assert torch.equal(model.mlp(X), model.mlp(X, gates))


def test_layers_of_which_one_side_was_drawn():
    layer = make(lambda: nn.L0Linear(D, D, gate="both"))
    nn.GateBank(layer.out_gate).draw()
    torch.manual_seed(3)
    y = layer(X)
    torch.manual_seed(3)
    z_in = layer.in_gate()
    assert torch.equal(y, layer(X, z_in, layer.out_gate()))
    assert torch.equal(y, layer(X, z_in))
    assert not torch.equal(y, layer(X))


def test_steps_have_different_keys():
    model = make()
    bank = nn.GateBank(model, seed=7)
    seen = [bank._keys(3) for _ in range(50)]
    values = [k.item() for keys in seen for k in keys]
    assert values == [key(7, t).item() for t in range(150)]
    assert len(set(values)) == 150


def test_ranks():
    draws = []
    for rank, seed in ((0, 5), (0, 5), (1, 5), (2**23 - 1, 5), (0, 6)):
        model = make()
        bank = nn.GateBank(model, seed=seed, rank=rank)
        bank.draw()
        draws.append(zs(model))
    assert all_equal(draws[0], draws[1])
    for other in draws[2:]:
        assert not any(torch.equal(a, b) for a, b in zip(draws[0], other, strict=True))
    assert bank._keys(1)[0].item() == key(6, 2).item()
    ranked = nn.GateBank(model, seed=5, rank=3)
    assert [k.item() for k in ranked._keys(2)] == [key(5, (3 << 40) + t).item() for t in range(2)]
    assert ranked._keys(1)[0].item() == key(5, (3 << 40) + 2).item()


def test_state_dict_continues_the_draws():
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == {"seed": (1,), "step": (1,)}
    assert not list(bank.parameters())
    bank.draw()
    expected = zs(model)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin = make()
    other = nn.GateBank(twin)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.draw()
    assert all_equal(zs(twin), expected)


def test_default_seed_comes_from_torch():
    banks = []
    for _ in range(2):
        model = make()
        banks.append(nn.GateBank(model))
    assert torch.equal(banks[0].seed, banks[1].seed)
    assert not torch.equal(nn.GateBank(model).seed, banks[1].seed)


def test_nothing_of_a_draw_in_copies():
    model = make()
    bank = nn.GateBank(model)
    names = list(model.state_dict())
    bank.draw()
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, copy.copy(model.own)):
        assert all(gate.draws for gate in nn.gate_modules(twin))
    assert all(not gate.draws for gate in nn.gate_modules(model))


def test_model_and_bank_copied_together():
    """The bank of the copy serves the copy's gates, also where it is the model's own submodule."""
    model = make()
    model.bank = nn.GateBank(model)
    model.bank.draw()
    assert {"bank.seed", "bank.step"} <= set(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.bank.draw()
        assert not any(gate.draws for gate in nn.gate_modules(twin))
        model.bank.draw()
        assert all_equal(zs(twin), zs(model))
        model.bank.step.zero_()
        model.bank.step.add_(2)
    assert len(nn.gate_modules(model)) == 9


def test_moving_the_model_ends_the_draw():
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    model.double()
    assert all(gate.draws for gate in nn.gate_modules(model))
    bank.draw()
    assert model(X.double()).dtype == torch.float64
    assert model.own().z.dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    model = make()
    bank = nn.GateBank(model)
    bank.draw()
    plain = run(model, X)
    model.zero_grad()
    x = X.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=False)
    y.square().sum().backward()
    for mine, theirs in zip([y, *(p.grad for p in model.parameters())], plain, strict=True):
        assert torch.equal(mine, theirs)


def two_in_flight(forward):
    """Gradients of two forwards under two draws, both backwards at the end."""
    model = make()
    bank = nn.GateBank(model, seed=3)
    ys = [forward(model, bank.draw(), x.clone().requires_grad_()) for x in (X, 2 * X)]
    for weight, y in zip((1.0, 0.5), ys, strict=True):
        (weight * y.square().sum()).backward()
    return [*(y.detach() for y in ys), *(p.grad for p in model.parameters())]


def separately():
    model = make()
    bank = nn.GateBank(model, seed=3)
    ys = []
    for weight, x in ((1.0, X), (0.5, 2 * X)):
        bank.draw()
        ys.append(model(x))
        (weight * ys[-1].square().sum()).backward()
    return [*(y.detach() for y in ys), *(p.grad for p in model.parameters())]


def test_two_forwards_in_flight():
    for mine, theirs in zip(two_in_flight(lambda model, _, x: model(x)), separately(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_checkpointed_forwards_in_flight(use_reentrant):
    def forward(model, draw, x):
        def layers(draw, x):
            with draw:
                return model(x)

        return checkpoint(layers, draw, x, use_reentrant=use_reentrant)

    for mine, theirs in zip(two_in_flight(forward), separately(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_an_earlier_draw_as_context():
    model = make()
    bank = nn.GateBank(model)
    first = bank.draw()
    early = zs(model)
    second = bank.draw()
    late = zs(model)
    with first:
        assert all_equal(zs(model), early)
        with second:
            assert all_equal(zs(model), late)
        assert all_equal(zs(model), early)
    assert all_equal(zs(model), late)
    bank.clear()
    with pytest.raises(RuntimeError, match="in between"), first:
        raise RuntimeError("in between")
    assert all(gate.draws for gate in nn.gate_modules(model))


def test_a_gate_that_stands_in_two_layers_is_one():
    model = make()
    nn.GateBank(model).draw()
    (y,) = torch.autograd.grad(model.both(X).sum(), [model.both.out_gate.log_alpha])
    closed = model.both.out_gate().z == 0
    assert closed.any()
    assert not y[closed].any()
    assert not model.both(X)[:, closed].any()


@pytest.mark.parametrize("other", ["dist", "dtype"])
def test_gates_of_other_kinds_have_a_call_of_their_own(other):
    dist = reference.HardConcrete(0.5, -0.2, 1.3)
    gates = [nn.HardConcreteGate(40), nn.HardConcreteGate(40, dist=dist), nn.HardConcreteGate(40)]
    if other == "dtype":
        gates[1] = nn.HardConcreteGate(40, dtype=torch.float64)
        dist = gates[1].dist
    model = torch.nn.ModuleList(gates)
    bank = nn.GateBank(model, seed=9)
    bank.draw()
    first, third = reference.sample_gates([gates[0].log_alpha, gates[2].log_alpha], seed=key(9, 0))
    second = reference.sample_gates(gates[1].log_alpha, seed=key(9, 1), dist=dist)
    for gate, expected in zip(gates, (first, second, third), strict=True):
        torch.testing.assert_close(gate().z, expected.z)
    gates[1]().z.sum().backward()
    (expected,) = torch.autograd.grad(second.z.sum(), gates[1].log_alpha)
    torch.testing.assert_close(gates[1].log_alpha.grad, expected)


def assert_expected(expected, gates):
    assert list(expected) == gates
    for gate, value in expected.items():
        a = gate.log_alpha.detach()
        assert (value.dtype, value.device, value.shape) == (a.dtype, a.device, ())
        assert not value.requires_grad
        exact = gate.dist.p_open(a.double()).sum().item()
        assert abs(value.item() - exact) <= 16 * torch.finfo(a.dtype).eps * gate.n


def test_expected_of_every_kind_of_layer():
    model = make()
    bank = nn.GateBank(model, seed=4)
    assert bank.draw().expected is None
    bank.step.zero_()
    bank.draw()
    plain = [part for gate in bank._vectors for part in gate.drawn[:3]], bank._weights[0].seed
    bank.step.zero_()
    draw = bank.draw(expected=True)
    assert all_equal((part for gate in bank._vectors for part in gate.drawn[:3]), plain[0])
    assert torch.equal(bank._weights[0].seed, plain[1])
    assert_expected(draw.expected, [*bank._vectors, *bank._weights])
    values = [value.clone() for value in draw.expected.values()]
    with torch.no_grad():
        model.own.log_alpha.add_(1)
    bank.draw(expected=True)
    assert all_equal(draw.expected.values(), values), "it is that of the draw"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1], [31], [784], [4099], [1, 31, 784, 4099]], ids=str)
def test_expected_of_every_length(sizes, dtype):
    torch.manual_seed(0)
    dist = reference.HardConcrete(0.5, -0.2, 1.3)
    gates = [nn.HardConcreteGate(n, dtype=dtype) for n in sizes] + [nn.HardConcreteGate(50, dist=dist)]
    model = torch.nn.ModuleList(gates)
    with torch.no_grad():
        for gate in gates:
            gate.log_alpha.normal_(0, 3)
    assert_expected(nn.GateBank(model).draw(expected=True).expected, gates)


def test_expected_holds_the_gates_that_are_drawn():
    model = make()
    bank = nn.GateBank(model)
    model.own.eval()
    model.weight.weight_gate.eval()
    model.both.in_gate.log_alpha.requires_grad_(False)
    expected = bank.draw(expected=True).expected
    assert_expected(expected, [gate for gate in bank._vectors if gate is not model.own])
    assert nn.GateBank(model.eval()).draw(expected=True).expected == {}


def test_without_gradients():
    model = make()
    nn.GateBank(model).draw()
    with torch.no_grad():
        assert not model.own().z.requires_grad
        y = model(X)
    assert torch.equal(y, model(X))
    model.own.log_alpha.requires_grad_(False)
    assert not model.own().z.requires_grad


@pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
def test_compiles_without_a_graph_break_and_without_recompiling():
    model = make()
    bank = nn.GateBank(model)
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for _ in range(3):
        bank.draw()
        model.zero_grad()
        compiled(X).square().sum().backward()
        mine = [p.grad.clone() for p in model.parameters()]
        for left, right in zip(mine, run(model, X)[1:], strict=True):
            torch.testing.assert_close(left, right)
    assert counted.frame_count == 1
    torch._dynamo.reset()


def test_training_with_a_bank():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x[:, :1] * x[:, 1:2]
    mlp = nn.L0MLP((8, 32, 1), "gelu", droprate_init=0.2)
    bank, optimizer = nn.GateBank(mlp), torch.optim.Adam(mlp.parameters(), 1e-2)
    nn.clamp_after_step(optimizer, mlp)
    before = torch.nn.functional.mse_loss(mlp.eval()(x), target).item()
    mlp.train()
    for _ in range(150):
        optimizer.zero_grad()
        bank.draw()
        (torch.nn.functional.mse_loss(mlp(x), target) + 1e-3 * nn.penalty(mlp)).backward()
        optimizer.step()
    assert torch.nn.functional.mse_loss(mlp.eval()(x), target).item() < before / 2
    assert bank.step.item() == 150


def test_repr():
    model = make()
    assert (
        repr(nn.GateBank(model)) == f"GateBank(9 gate(s), {sum(g.n for g in nn.gate_modules(model))} in all)"
    )
    assert "rank=3" in repr(nn.GateBank(model, rank=3))


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (torch.nn.Linear(2, 2), {}, ValueError, "model must contain gates, got a Linear without any"),
        (nn.L0Linear(2, 2), {"seed": -1}, ValueError, r"seed must be in \[0, 9223372036854775808\), got -1"),
        (nn.L0Linear(2, 2), {"seed": 1.0}, TypeError, "seed must be an int, got float"),
        (nn.L0Linear(2, 2), {"rank": 2**23}, ValueError, r"rank must be in \[0, 8388608\), got 8388608"),
    ],
)
def test_bad_arguments(model, options, error, words):
    with pytest.raises(error, match=words):
        nn.GateBank(model, **options)


def test_nan_is_an_error():
    model = make()
    with torch.no_grad():
        model.own.log_alpha[0] = float("nan")
    for expected in (False, True):
        with pytest.raises(ValueError, match="NaN"):
            nn.GateBank(model).draw(expected=expected)


def in_threads(fn, n=6):
    """What `fn(i, barrier)` returns in n threads at once."""
    barrier, results = threading.Barrier(n), [None] * n

    def run(i):
        try:
            results[i] = fn(i, barrier)
        except BaseException as error:
            barrier.abort()
            results[i] = error

    # A thread begins without the backend of the test: it gets a copy of the test's context.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, i)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def threaded_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        l0.nn.L0MLP([20, 16, 12]), l0.nn.L0Linear(12, 30), l0.nn.L0Linear(30, 8, gate="weight")
    )


def drawn_step(model, x):
    """Output and gradients of a forward with the gates drawn."""
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def test_threads_draw_from_one_bank_what_one_thread_draws_in_turn():
    x = torch.randn(4, 20)
    model = threaded_model()
    bank = l0.nn.GateBank(model, seed=1)
    expected = []
    for _ in range(6):
        bank.draw()
        expected.append(drawn_step(model, x))
    assert len({step[0].numpy().tobytes() for step in expected}) == 6

    model = threaded_model()
    bank = l0.nn.GateBank(model, seed=1)

    def in_thread(_, barrier):
        barrier.wait()
        bank.draw()
        first = drawn_step(model, x)
        barrier.wait()  # all have drawn: each goes by its own draw
        second = drawn_step(model, x)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        return first

    found = in_threads(in_thread)
    assert int(bank.step) == 12
    found.sort(key=lambda step: step[0].numpy().tobytes())
    expected.sort(key=lambda step: step[0].numpy().tobytes())
    for got, want in zip(found, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_threads_share_the_draw_of_another():
    x = torch.randn(4, 20)
    model = threaded_model()
    bank = l0.nn.GateBank(model, seed=1)
    bank.draw()
    expected = drawn_step(model, x)
    for got in in_threads(lambda *_: drawn_step(model, x)):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_a_draw_as_a_context_is_of_its_thread():
    gate = l0.nn.HardConcreteGate(50)
    bank = l0.nn.GateBank(gate, seed=1)
    draws = [bank.draw() for _ in range(7)]
    zs = [draw._drawn[gate].z for draw in draws]

    def in_thread(i, barrier):
        with draws[i]:
            barrier.wait()
            assert torch.equal(gate.drawn.z, zs[i])
            with draws[(i + 1) % 6]:
                barrier.wait()
                assert torch.equal(gate.drawn.z, zs[(i + 1) % 6])
            barrier.wait()
            assert torch.equal(gate.drawn.z, zs[i])
        barrier.wait()
        assert torch.equal(gate.drawn.z, zs[6])

    in_threads(in_thread)
    assert torch.equal(gate.drawn.z, zs[6])
    assert gate._threads is None


def test_a_thread_keeps_its_draw_when_another_draws_and_clears():
    gate = l0.nn.HardConcreteGate(50)
    bank = l0.nn.GateBank(gate, seed=1)
    bank.draw()
    z = gate.drawn.z

    def other():
        bank.draw()
        assert not torch.equal(gate.drawn.z, z)
        bank.clear()
        assert gate.drawn is None

    in_threads(lambda *_: other(), 1)
    assert torch.equal(gate.drawn.z, z)
    gate.to(torch.float64)
    assert gate.drawn is None


def test_threads_draw_other_gates_without_a_bank():
    gate = l0.nn.HardConcreteGate(200)
    torch.manual_seed(3)
    expected = sorted(gate().z.detach().numpy().tobytes() for _ in range(6))
    torch.manual_seed(3)
    assert sorted(in_threads(lambda *_: gate().z.detach().numpy().tobytes())) == expected


def test_a_bank_made_under_the_meta_device_keeps_its_seed():
    with torch.device("meta"):
        model = torch.nn.ModuleList([l0.nn.HardConcreteGate(30)])
        model.append(l0.nn.GateBank(model, seed=5))
    bank = model[1]
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        bank.draw()
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert bank.seed.item() == 5
    bank.draw()
    plain = l0.nn.GateBank(copy.deepcopy(model[0]), seed=5)
    plain.draw()
    assert torch.equal(model[0]().z, plain._gates[0]().z)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_bank_of_gates_that_exist_may_be_made_under_the_meta_device(seed):
    gate = l0.nn.HardConcreteGate(30)
    with torch.device("meta"):
        bank = l0.nn.GateBank(gate, seed=seed)
    assert bank.seed.device.type == bank.step.device.type == "cpu"
    with torch.device("meta"):
        bank.draw()
    assert gate().z.shape == (30,)


def test_moving_a_bank_to_the_meta_device_and_back_keeps_its_count():
    bank = l0.nn.GateBank(l0.nn.HardConcreteGate(30), seed=5)
    bank.draw()
    bank.to("meta").to_empty(device="cpu")
    assert (bank.seed.item(), bank.step.item()) == (5, 1)


FORK = """
import os, sys, threading
import torch
import l0kernels as l0
from l0kernels.nn import ranks

gate = l0.nn.HardConcreteGate(50)
bank = l0.nn.GateBank(gate, seed=1)
bank.draw()
held, done = threading.Event(), threading.Event()

def hold():
    with ranks.lock:
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
read, write = os.pipe()
if not os.fork():
    bank.draw()
    os.write(write, gate.drawn.z.numpy().tobytes() + gate.forward().z.detach().numpy().tobytes())
    os._exit(0)
done.set()
thread.join()
child = os.read(read, 10000)
bank.draw()
assert child == 2 * gate.drawn.z.numpy().tobytes(), len(child)
"""


@pytest.mark.parametrize("backend", BACKENDS[:1], indirect=True)  # the process has its own
def test_a_forked_process_draws_though_a_thread_of_its_parent_was_drawing():
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
