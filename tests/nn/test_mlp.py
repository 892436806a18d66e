"""L0MLP: the chain as a module, equal to the dense formula for the same seed."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint

import l0kernels.nn.mlp
from l0kernels import nn, reference

SIZES = (19, 23, 11, 5)
MODULES = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "identity": torch.nn.Identity,
}


def make(**options):
    torch.manual_seed(0)
    mlp = nn.L0MLP(SIZES, **options)
    with torch.no_grad():
        for gate in nn.gate_modules(mlp):
            gate.log_alpha.normal_(0, 3)
    return mlp


def dense_formula(mlp, x, mode=None):
    """The same network by the reference; draws its seed from torch's generator like the module."""
    logs = [layer.in_gate.log_alpha for layer in mlp.layers if layer.in_gate is not None]
    drawn = reference.sample_gates(logs) if mode is None else reference.eval_gates(logs, mode)
    gates = [None] * (len(mlp.layers) - len(drawn)) + drawn
    weights, biases = [l.weight for l in mlp.layers], [l.bias for l in mlp.layers]
    return reference.gated_mlp(x, weights, biases, gates, mlp.activation)


def dense_net(mlp):
    modules = []
    for layer in mlp.layers:
        linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.load_state_dict(layer.state_dict(), strict=False)
        modules += [linear, MODULES[mlp.activation]()]
    return torch.nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize(
    "options", [{}, {"gate_input": False}, {"bias": False}, {"bias": [True, False, True]}]
)
def test_training_is_the_reference_of_the_same_seed(activation, options):
    mlp = make(activation=activation, **options)
    twin = copy.deepcopy(mlp)
    x = torch.randn(16, SIZES[0], requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    dy = torch.randn(16, SIZES[-1])
    torch.manual_seed(11)
    y = mlp(x)
    torch.manual_seed(11)
    y_twin = dense_formula(twin, x_twin)
    torch.testing.assert_close(y, y_twin)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad)
    for (name, mine), theirs in zip(mlp.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        if name.endswith("log_alpha"):
            assert torch.equal(mine.grad != 0, theirs.grad != 0)
            assert (mine.grad != 0).any()


@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation(mode):
    mlp = make(eval_mode=mode).eval()
    x = torch.randn(2, 8, SIZES[0])
    torch.testing.assert_close(mlp(x), dense_formula(mlp, x, mode))
    assert torch.equal(mlp(x), mlp(x))


@pytest.mark.parametrize("activation", MODULES)
def test_open_gates_give_the_dense_network(activation):
    mlp = make(activation=activation)
    with torch.no_grad():
        for gate in nn.gate_modules(mlp):
            gate.log_alpha.fill_(60.0)
    x = torch.randn(16, SIZES[0])
    torch.testing.assert_close(mlp(x), dense_net(mlp)(x))
    torch.testing.assert_close(mlp.eval()(x), dense_net(mlp)(x))


def test_one_draw_and_one_product_per_forward(monkeypatch, backend):
    calls = []

    def count(name):
        operator = getattr(l0kernels._ops, name)

        def counted(*args):
            calls.append(name)
            return operator(*args)

        monkeypatch.setattr(l0kernels._ops, name, counted)

    for name in ("sample", "gated_mlp", "gated_mlp_backward", "l0_mlp", "l0_mlp_backward"):
        count(name)
    make()(torch.randn(4, SIZES[0])).sum().backward()
    drawn_before = ["sample", "gated_mlp", "gated_mlp_backward"]
    assert calls == (["l0_mlp", "l0_mlp_backward"] if backend == "cpp" else drawn_before)


def test_a_gate_used_twice_is_drawn_once():
    mlp = nn.L0MLP((8, 8, 8))
    mlp.layers[1].in_gate = mlp.layers[0].in_gate
    torch.manual_seed(3)
    y = mlp(torch.ones(2, 8))
    torch.manual_seed(3)
    gates = mlp.layers[0].in_gate()
    assert torch.equal(y, mlp(torch.ones(2, 8), [gates, gates]))


def test_forward_with_known_gates():
    mlp = make(gate_input=False)
    gates = mlp.draw()
    assert gates[0] is None
    assert [len(g.z) for g in gates[1:]] == list(SIZES[1:-1])
    x = torch.randn(4, SIZES[0])
    assert torch.equal(mlp(x, gates), mlp(x, gates))
    h = x
    for l, layer in enumerate(mlp.layers):
        h = torch.relu(h) * gates[l].z if l else h
        h = torch.nn.functional.linear(h, layer.weight, layer.bias)
    torch.testing.assert_close(mlp(x, gates), h)


def test_names_and_shapes():
    state = make().state_dict()
    assert list(state) == [
        f"layers.{l}.{name}" for l in range(3) for name in ("weight", "bias", "in_gate.log_alpha")
    ]
    assert [tuple(state[f"layers.{l}.weight"].shape) for l in range(3)] == [(23, 19), (11, 23), (5, 11)]


def test_weights_are_initialised_like_torch():
    torch.manual_seed(0)
    mlp = nn.L0MLP(SIZES)
    for layer in mlp.layers:
        bound = layer.in_features**-0.5
        assert bound * 0.9 < layer.weight.abs().max() <= bound


def test_one_value_per_gate():
    mlp = nn.L0MLP(SIZES, droprate_init=[0.2, 0.5, 0.6], lam=(0.3, 0.03, 0.1))
    assert [gate.droprate_init for gate in nn.gate_modules(mlp)] == [0.2, 0.5, 0.6]
    assert [gate.lam for gate in nn.gate_modules(mlp)] == [0.3, 0.03, 0.1]
    mlp = nn.L0MLP(SIZES, gate_input=False, lam=(0.03, 0.1))
    assert [gate.lam for gate in nn.gate_modules(mlp)] == [0.03, 0.1]


@pytest.mark.parametrize("activation", MODULES)
def test_from_dense(activation):
    dense = dense_net(make(activation=activation, bias=[True, False, True])).double().eval()
    mlp = nn.L0MLP.from_dense(dense, lam=(1.0, 2.0, 3.0), eval_mode="median")
    assert mlp.activation == activation
    assert not mlp.training
    assert [gate.lam for gate in nn.gate_modules(mlp)] == [1.0, 2.0, 3.0]
    with torch.no_grad():
        for gate in nn.gate_modules(mlp):
            gate.log_alpha.fill_(60.0)
    x = torch.randn(4, SIZES[0], dtype=torch.float64)
    torch.testing.assert_close(mlp(x), dense(x))
    assert mlp.layers[0].weight.data_ptr() != dense[0].weight.data_ptr()


def test_from_dense_of_one_layer():
    mlp = nn.L0MLP.from_dense(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    assert len(mlp.layers) == 1
    assert mlp(torch.randn(4, 3)).shape == (4, 2)


def test_copies():
    mlp = make(activation="silu")
    fresh = nn.L0MLP(SIZES, "silu")
    file = io.BytesIO()
    torch.save(mlp.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, SIZES[0])
    torch.manual_seed(1)
    expected = mlp(x)
    for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)), fresh):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    mlp = make() if autocast else make().bfloat16()
    x = torch.randn(16, SIZES[0], dtype=torch.float32 if autocast else torch.bfloat16)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for layer in mlp.layers:
        assert layer.weight.grad.dtype == layer.weight.dtype
        assert layer.in_gate.log_alpha.grad.dtype == torch.float32
        assert layer.in_gate.log_alpha.grad.any()
    torch.manual_seed(3)
    exact = dense_formula(copy.deepcopy(mlp).double(), x.double())
    atol = 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)


def test_gradcheck_in_double():
    torch.manual_seed(0)
    mlp = nn.L0MLP((4, 5, 3), "silu").double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *_):
        torch.manual_seed(1)
        return mlp(x)

    assert torch.autograd.gradcheck(forward, (x, *mlp.parameters()))


def test_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x[:, 0] * x[:, 1]
    mlp = nn.L0MLP((8, 32, 1), "gelu", droprate_init=0.2, lam=1.0)
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    nn.clamp_after_step(optimizer, mlp)
    with torch.no_grad():
        before = torch.nn.functional.mse_loss(mlp.eval()(x)[:, 0], target).item()
    mlp.train()
    for _ in range(150):
        optimizer.zero_grad()
        (torch.nn.functional.mse_loss(mlp(x)[:, 0], target) + 1e-3 * nn.penalty(mlp)).backward()
        optimizer.step()
    with torch.no_grad():
        after = torch.nn.functional.mse_loss(mlp.eval()(x)[:, 0], target).item()
    assert after < before / 2
    useless = mlp.layers[0].in_gate.log_alpha[2:]
    assert useless.max() < mlp.layers[0].in_gate.log_alpha[:2].min()


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (((5,),), {}, "sizes must name at least"),
        (((5, 4), "tanh"), {}, "activation must be one of .* got 'tanh'"),
        ((SIZES,), {"lam": [1.0, 2.0]}, "lam must be one value or 3 of them, got 2"),
        (
            (SIZES,),
            {"droprate_init": [0.5] * 3, "gate_input": False},
            "droprate_init must be .* 2 of them, got 3",
        ),
        ((SIZES,), {"bias": [True]}, "bias must be one value or 3 of them, got 1"),
    ],
)
def test_bad_arguments(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        nn.L0MLP(*arguments, **options)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([], "dense must be nn.Linear, activation"),
        (["linear", "relu"], r"dense must be nn.Linear, activation, .* got \(Linear, ReLU\)"),
        (["linear", "relu", "relu"], "dense must be nn.Linear, activation"),
        (["linear", "tanh", "linear"], "dense must have an activation among ReLU"),
        (["linear", "tanh-gelu", "linear"], "dense must have an activation among ReLU"),
        (["linear", "relu", "linear", "gelu", "linear"], "dense must have one activation"),
        (["linear", "relu", "wide"], r"dense\[2\] must have 3 in_features.* got 4"),
        (["linear", "relu", "double"], "dense must be on one device and in one dtype"),
    ],
)
def test_from_dense_of_something_else(modules, words):
    make_module = {
        "linear": lambda: torch.nn.Linear(3, 3),
        "wide": lambda: torch.nn.Linear(4, 3),
        "double": lambda: torch.nn.Linear(3, 3, dtype=torch.float64),
        "relu": torch.nn.ReLU,
        "gelu": torch.nn.GELU,
        "tanh": torch.nn.Tanh,
        "tanh-gelu": lambda: torch.nn.GELU("tanh"),
    }
    with pytest.raises(ValueError, match=words):
        nn.L0MLP.from_dense(torch.nn.Sequential(*[make_module[name]() for name in modules]))


def test_from_dense_wants_a_sequential():
    with pytest.raises(TypeError, match=r"dense must be an nn.Sequential, got Linear"):
        nn.L0MLP.from_dense(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiles_without_a_graph_break(training):
    mlp = make().train(training)
    x = torch.randn(4, SIZES[0])

    def loss(x):
        return mlp(x).square().sum() + nn.penalty(mlp)

    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(value, mlp.parameters()) for value in (compiled, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_gates(use_reentrant):
    results = []
    for recompute in (False, True):
        mlp = make()
        torch.manual_seed(5)
        x = torch.randn(4, SIZES[0], requires_grad=True)
        if recompute:
            y = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=use_reentrant)
        else:
            y = mlp(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in mlp.parameters())])
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)


@pytest.mark.parametrize("gate", ["both", "out", "weight", (2, 2), None])
@pytest.mark.parametrize("at", [0, 1])
def test_a_replaced_layer_keeps_its_gates(gate, at):
    """A layer that somebody has put in, with gates that the chain does not apply itself, acts as it is."""
    torch.manual_seed(0)
    mlp = nn.L0MLP([6, 8, 3])
    old = mlp.layers[at]
    new = nn.L0Linear(old.in_features, old.out_features, gate=gate)
    mlp.layers[at] = new if gate is not None else torch.nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        for source in nn.gate_modules(mlp):
            source.log_alpha.normal_(0, 2)
    x, bank = torch.randn(4, 6), nn.GateBank(mlp, seed=1)
    for training in (True, False):
        mlp.train(training)
        bank.draw()
        first, second = mlp.layers
        expected = second(first(x).relu())
        torch.testing.assert_close(mlp(x), expected)
        parameters = list(mlp.parameters())
        grads = [
            torch.autograd.grad(y.sin().sum(), parameters, allow_unused=True) for y in (mlp(x), expected)
        ]
        for left, right in zip(*grads, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right)
    torch.testing.assert_close(nn.export(mlp)(x), mlp(x))
