"""Public operations, modules and the example on backend "triton": pack, product and unpack put together."""

import itertools

import pytest
import tiny_mnist
import torch
import train_lenet300 as example

import l0kernels as l0
from l0kernels import Gates, _ops
from l0kernels._gates import compact, round_up
from op_checks import check_large_activations
from triton_device import DEVICE, INTERPRETED
from triton_gates import make_gate

DTYPE = torch.float32
M = 20


@pytest.fixture(autouse=True)
def backend():
    """Backend triton; unwritten memory reads as NaN or as the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with l0.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["0", "1"], ids=["packed", "gathered"])
def route(request, monkeypatch):
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", request.param)
    return request.param


def gates_of(n, keep, plain=False):
    z, index, count = make_gate(n, keep, plain)
    return Gates(z, index, count)


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def results(call, leaves, dtype, dy):
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in leaves]
    y = call(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in leaves)]


def compare(call, leaves, n_out, gates=()):
    """Against the reference in fp64; a gate's gradient exactly zero unless 0 < z < 1."""
    dy = randn(M, n_out)
    mine = results(call, leaves, DTYPE, dy)
    with l0.use_backend("reference"):
        truth = results(call, leaves, torch.float64, dy)
    for leaf, value, exact in zip([None, *leaves], mine, truth, strict=True):
        if exact is None:
            assert value is None
            continue
        for gate in gates:
            if leaf is gate.z:
                fractional = (leaf > 0) & (leaf < 1)
                assert not value[~fractional].any()
                exact = exact * fractional
        bound = (1e-5 if INTERPRETED else 2e-2) * max(1.0, exact.norm().item())
        assert (value.double() - exact).norm().item() <= bound


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("sides", ["in", "out", "both", "support", "none"])
def test_gated_linear(sides, plain, keep, route):
    K, N = 24, 40
    g_in = gates_of(K, keep, plain) if sides in ("in", "both") else None
    g_out = gates_of(N, keep, plain) if sides in ("out", "both") else None
    support = gates_of(N, keep, plain) if sides == "support" else None
    for x_needs in (True, False):
        x = randn(M, K)

        def call(x_leaf, w, b, z_in, z_out, x=x):
            return l0.gated_linear(
                x.to(w.dtype) if x_leaf is None else x_leaf,
                w,
                b,
                in_gates=None if z_in is None else l0.Gates(z_in, *g_in[1:]),
                out_gates=None if z_out is None else l0.Gates(z_out, *g_out[1:]),
                out_support=support,
            )

        leaves = [x if x_needs else None, randn(N, K), randn(N), g_in and g_in.z, g_out and g_out.z]
        compare(call, leaves, N, [g for g in (g_in, g_out) if g is not None])


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", [0.0, 0.6])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity", "swiglu", "geglu"])
@pytest.mark.parametrize(
    ("which", "plain", "repack"), [(7, False, False), (7, False, True), (2, False, False), (7, True, False)]
)
def test_gated_mlp(activation, keep, which, plain, repack, route):
    """``which``: bits of the layers that have gates."""
    sizes = (16, 24, 20, 8)
    rows = 2 if "glu" in activation else 1
    weights = [
        randn(b * (rows if i < 2 else 1), a) * 0.3 for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    biases = [randn(w.shape[0]) * 0.3 for w in weights]
    gates = [gates_of(n, keep, plain) if which >> i & 1 else None for i, n in enumerate(sizes[:-1])]

    def call(x, w0, w1, w2, b0, b1, b2, *z):
        given = [g if g is None else l0.Gates(v, *g[1:]) for g, v in zip(gates, z, strict=True)]
        return l0.gated_mlp(x, [w0, w1, w2], [b0, b1, b2], given, activation, repack_in_backward=repack)

    leaves = [randn(M, 16), *weights, *biases, *(None if g is None else g.z for g in gates)]
    compare(call, leaves, 8, [g for g in gates if g is not None])


@pytest.mark.parametrize("call", ["l0_linear", "l0_mlp"])
def test_draws_are_the_references(call, route):
    """One seed, one result: the fused draw, the separate one and the reference's."""
    x, w, a_in, a_out = randn(M, 24), randn(40, 24), randn(24) * 2, randn(40) * 2
    w2, seed = randn(8, 40), torch.tensor([123], device=DEVICE)

    def run():
        leaves = [t.clone().requires_grad_() for t in (a_in, a_out)]
        if call == "l0_linear":
            y = l0.l0_linear(x, w, in_log_alpha=leaves[0], out_log_alpha=leaves[1], seed=seed)
        else:
            y = l0.l0_mlp(x, [w, w2], [None, None], leaves, "gelu", seed=seed)
        (y * torch.arange(y.shape[1], device=DEVICE)).sum().backward()
        return [y.detach(), *(t.grad for t in leaves)]

    mine = run()
    with l0.use_backend("reference"):
        truth = run()
    for value, exact in zip(mine, truth, strict=True):
        tolerance = (1e-5 if INTERPRETED else 1e-2) * exact.abs().max().item()
        torch.testing.assert_close(value, exact, rtol=0, atol=tolerance)


def test_three_dimensions_expanded_gradients_and_strides(route):
    x = randn(4, 24, 5).transpose(1, 2)
    w, b, gates = randn(40, 48)[:, ::2], randn(40), gates_of(24, 0.5)
    w = w.requires_grad_()
    y = l0.gated_linear(x, w, b, in_gates=gates)
    (grad,) = torch.autograd.grad(y, w, torch.ones((), device=DEVICE).expand_as(y))
    exact = torch.nn.functional.linear(x * gates.z, w, b)
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-4 if INTERPRETED else 0.1)
    (truth,) = torch.autograd.grad(exact, w, torch.ones((), device=DEVICE).expand_as(exact))
    torch.testing.assert_close(grad, truth, rtol=0, atol=1e-4 if INTERPRETED else 0.1)


def test_a_model_with_a_bank_trains(route):
    model = l0.nn.L0MLP([24, 20, 8]).to(DEVICE)
    bank = l0.nn.GateBank(model).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, target = randn(M, 24), torch.randint(8, (M,), device=DEVICE)
    losses = []
    for _ in range(12):
        bank.draw()
        loss = torch.nn.functional.cross_entropy(model(x), target) + l0.nn.penalty(model) * 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_opcheck_of_the_fused_draw(monkeypatch):
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", "1")
    x, w, a, seed = randn(6, 13), randn(9, 13), randn(13), torch.tensor([5], device=DEVICE)
    dist = [2 / 3, -0.1, 1.1]
    args = (x, w, randn(9), a, None, seed, dist, torch.float32, "triton")
    torch.library.opcheck(torch.ops.l0kernels.l0_linear.default, args)
    y, z, index, count = _ops.l0_linear(*_ops.l0_linear.layout.gather(args))
    expected_index, expected_count = compact(z)
    assert torch.equal(index, expected_index)
    assert count[0] == expected_count[0]
    assert count[1] in (expected_count[1], round_up(13))
    assert y.shape == (6, 9)


@pytest.mark.parametrize("gather", ["0", "1"])
def test_opcheck_of_what_backward_takes_over(gather, monkeypatch):
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", gather)
    x, w, dy, gate = randn(6, 13), randn(9, 13), randn(6, 9), make_gate(13, 0.6)
    ops = torch.ops.l0kernels
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        args = (layout(x), layout(w), randn(9), gate, [], False, torch.float32, "triton")
        torch.library.opcheck(ops.gated_linear.default, args)
        _, *saved = ops.gated_linear(*args)
        needs = [True, True, True, True, False]
        rest = (gate, [], False, torch.float32, saved, [False, False], needs, [], "triton")
        torch.library.opcheck(ops.gated_linear_backward.default, (layout(dy), *args[:3], *rest))
    w2, hidden = randn(5, 9), make_gate(9, 0.6)
    for activation, repack in (("relu", False), ("gelu", False), ("silu", True)):
        chain = (x, [w, w2], [randn(9), None], [*gate, *hidden], activation, torch.float32, repack, "triton")
        # Not against a trace's values: beyond the open units nobody writes what is saved.
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ops.gated_mlp.default, chain, test_utils=utilities)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter's numpy, in a square
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_of_any_size(activation):
    """Far out they are 0 or x, their derivatives 0 or 1."""
    sizes = torch.tensor([1.0, 7.0, 30.0, 86.0, 90.0, 120.0, 1e4, 1e19, 1e30, 1e37, 1e38, 1.6e38])
    x = torch.cat([sizes, -sizes])[:, None].to(DEVICE).requires_grad_()
    one = torch.ones(1, 1, device=DEVICE)
    with l0.use_backend("triton"):
        y = l0.gated_mlp(x, [one, one], [None, None], [None, None], activation)
    (grad,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = getattr(torch.nn.functional, activation)(exact_x)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
    assert ((y.detach() - exact.detach()).abs() <= 1e-6 * (1 + exact.detach().abs())).all()
    assert ((grad - exact_grad).abs() <= 1e-5).all()


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU gpu-check runs the example itself")
def test_the_example_runs_unchanged(tmp_path):
    """The LeNet-300-100 example with no change of code, one step, its kernels interpreted."""
    tiny_mnist.write(tmp_path, train=8, test=4)
    options = ["--epochs", "1", "--batch-size", "8", "--no-dense", "--threads", "1"]
    run = example.main(["--data", str(tmp_path), "--out", str(tmp_path), *options])
    assert (tmp_path / "lenet300.pt2").exists()
    assert all(p.isfinite().all() for p in run.gated.model.parameters())


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_a_chain_of_one_layer_draws_on_the_way(activation, monkeypatch):
    monkeypatch.setenv("L0KERNELS_TRITON_GATHER", "1")
    x, w, b, a, seed = randn(6, 13), randn(9, 13), randn(9), randn(13), torch.tensor([5], device=DEVICE)
    args = (x, [w], [b], [a], activation, seed, [2 / 3, -0.1, 1.1], torch.float32, "triton")
    torch.library.opcheck(torch.ops.l0kernels.l0_mlp.default, args)
    leaves = [t.requires_grad_() for t in (x, w, b, a)]
    ran = []
    for name in ("sample", "l0_mlp", "gated_mlp"):
        operator = getattr(_ops, name)
        counted = lambda *args, name=name, operator=operator: (ran.append(name), operator(*args))[1]  # noqa: E731
        monkeypatch.setattr(_ops, name, counted)
    y = l0.l0_mlp(x, [w], [b], [a], activation, seed=seed)
    assert ran == ["l0_mlp"]
    layer = l0.l0_linear(x, w, b, in_log_alpha=a, seed=seed)
    assert torch.equal(y, layer)
    grads = (torch.autograd.grad(t, leaves, torch.ones_like(y)) for t in (y, layer))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu", "geglu"])
def test_large_arguments(activation, route):
    check_large_activations(activation, DEVICE)
