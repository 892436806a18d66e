"""L0Sequential and L0Residual: packed from layer to layer, equal to the dense masked composition."""

import copy
import functools
import io
import itertools
import pickle
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import nn, reference
from op_checks import count_open

RELU, POOL = torch.nn.ReLU, torch.nn.MaxPool2d


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def spread(model, std=3.0, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, std)
    return model


def fill(model, value):
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.fill_(value)
    return model


class Dense:
    """The same net in plain torch: every product dense, every gate a multiplication by z."""

    def __init__(self, norms):
        self.norms = norms  # L0BatchNorm2d -> gate of its channels
        self.gates = {}

    def __call__(self, model, x):
        found = list(dict.fromkeys(nn.gate_modules(model)))
        pending = [gate for gate in found if gate.training]
        self.gates = dict(
            zip(pending, reference.sample_gates([g.log_alpha for g in pending]), strict=True)
        ) | {gate: gate.eval_gates() for gate in found if not gate.training}
        return self.run(model, x)

    def run(self, module, x):
        if isinstance(module, nn.L0MLP):
            gates = [self.z(layer.in_gate) for layer in module.layers]
            for i, (layer, z) in enumerate(zip(module.layers, gates, strict=True)):
                x = nn.mlp.ACTIVATIONS[module.activation]()(x) if i else x
                x = F.linear(x if z is None else x * z.z, layer.weight, layer.bias)
            return x
        if isinstance(module, torch.nn.Sequential):
            for child in module:
                x = self.run(child, x)
            return x
        if isinstance(module, nn.L0Residual):
            return (x if module.shortcut is None else self.run(module.shortcut, x)) + self.run(module.body, x)
        if isinstance(module, nn.L0BatchNorm2d):
            gate = self.norms.get(module)
            arguments = module.running_mean, module.running_var, module.weight, module.bias
            if module.training:
                module.num_batches_tracked.add_(1)
            options = module.training, module.momentum, module.eps
            return reference.gated_batch_norm(x, *arguments, *options, gates=self.z(gate))
        if isinstance(module, nn.L0Conv2d):
            if module.padding_mode != "zeros":
                sides = module._reversed_padding_repeated_twice
                x, padding = F.pad(x, sides, mode=module.padding_mode), 0
            else:
                padding = module.padding
            options = module.stride, padding, module.dilation, module.groups
            gates = {"in_gates": self.z(module.in_gate), "out_gates": self.z(module.out_gate)}
            return reference.gated_conv2d(x, module.weight, module.bias, *options, **gates)
        if isinstance(module, nn.L0Linear) and module.weight_gate is None:
            gates = {"in_gates": self.z(module.in_gate), "out_gates": self.z(module.out_gate)}
            return reference.gated_linear(x, module.weight, module.bias, **gates)
        return module(x)

    def z(self, gate):
        return None if gate is None else self.gates[gate]


def check(make, shape, norms=lambda model: {}, log_alpha=None, training=True, std=3.0, dtype=torch.float64):
    """Output, every gradient and every buffer of make() equal those of the dense composition."""
    torch.manual_seed(0)
    model = spread(make(), std).to(dtype).train(training)
    if log_alpha is not None:
        fill(model, log_alpha)
    twin = copy.deepcopy(model)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = model(x)
    torch.manual_seed(11)
    y_twin = Dense(norms(twin))(twin, x_twin)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, y_twin, **tolerance)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad, **tolerance)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        got, expected = (torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, theirs))
        torch.testing.assert_close(got, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        if name.endswith("log_alpha"):
            assert torch.equal(got != 0, expected != 0), name
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return model


def lenet5():
    return nn.L0Sequential(
        nn.L0Conv2d(1, 6, 3),
        RELU(),
        POOL(2),
        nn.L0Conv2d(6, 10, 3),
        RELU(),
        POOL(2),
        torch.nn.Flatten(),
        nn.L0Linear(40, 17),
        RELU(),
        nn.L0Linear(17, 5),
    )


def small_net():
    layers = nn.L0Conv2d(1, 4, 3), RELU(), POOL(2), torch.nn.Flatten(), nn.L0Linear(16, 5)
    return nn.L0Sequential(*layers)


def block():
    """The recommended order; the gate stands on the inputs of the second convolution."""
    return nn.L0Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.L0BatchNorm2d(12),
        RELU(),
        nn.L0Conv2d(12, 8, 3, padding=1, gate="in"),
    )


def paper_block():
    """The paper's order: the gate on the outputs of the first convolution, in front of the norm."""
    with pytest.warns(UserWarning, match=r"'1' multiplies its outputs by gates directly before .* '2'"):
        return nn.L0Sequential(
            torch.nn.Identity(),
            nn.L0Conv2d(3, 12, 3, padding=1, bias=False),
            nn.L0BatchNorm2d(12),
            RELU(),
            torch.nn.Conv2d(12, 8, 3, padding=1),
        )


def wide_block(before_norm=False):
    """A block of a wide residual net, as the paper gates it and as recommended."""
    a, b = nn.L0BatchNorm2d(6), nn.L0BatchNorm2d(12)
    conv2 = torch.nn.Conv2d(12, 9, 3, padding=1, bias=False)
    conv1 = torch.nn.Conv2d(6, 12, 3, 2, padding=1, bias=False)
    if before_norm:
        conv1 = nn.L0Conv2d(6, 12, 3, 2, padding=1, bias=False, gate="out")
    else:
        conv2 = nn.L0Conv2d(12, 9, 3, padding=1, bias=False, gate="in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = nn.L0Sequential(conv1, b, RELU(), conv2)
        return nn.L0Sequential(a, RELU(), nn.L0Residual(inner, torch.nn.Conv2d(6, 9, 1, 2, bias=False)))


def wide_norms(model):
    conv1, norm, _, conv2 = model[2].body
    return {norm: getattr(conv1, "out_gate", None) or conv2.in_gate}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("log_alpha", [None, 60.0, -60.0])
def test_lenet5(log_alpha, training):
    check(lenet5, (7, 1, 14, 14), log_alpha=log_alpha, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("log_alpha", [None, 60.0, -60.0])
def test_recommended_block(log_alpha, training):
    check(block, (4, 3, 5, 6), lambda m: {m[1]: m[3].in_gate}, log_alpha, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("log_alpha", [None, 60.0, -60.0])
def test_paper_block(log_alpha, training):
    check(paper_block, (4, 3, 5, 6), lambda m: {m[2]: m[1].out_gate}, log_alpha, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before_norm", [True, False])
def test_wide_block(before_norm, training):
    check(lambda: wide_block(before_norm), (3, 6, 7, 7), wide_norms, training=training)


CASES = {
    # name: (modules, input shape, norms of the model -> gates)
    "both sides": (
        lambda: [
            nn.L0Conv2d(5, 9, 3, padding="same", gate="both"),
            torch.nn.Tanh(),
            nn.L0Conv2d(9, 7, (1, 3), stride=(2, 1), dilation=(1, 2), gate="both"),
            torch.nn.LeakyReLU(),
            nn.L0Conv2d(7, 4, 1, gate="in"),
        ],
        (3, 5, 8, 9),
        None,
    ),
    "plain neighbours": (
        lambda: [
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.AvgPool2d(2),
            nn.L0Conv2d(8, 6, 1, gate="both"),
            torch.nn.ELU(),
            torch.nn.Conv2d(6, 5, 1),
            RELU(),
        ],
        (2, 3, 9, 9),
        None,
    ),
    "zero moves": (
        lambda: [
            nn.L0Conv2d(3, 8, 3),
            torch.nn.Sigmoid(),
            nn.L0Conv2d(8, 6, 1, gate="both"),
            torch.nn.Softplus(),
            torch.nn.Flatten(),
            torch.nn.Linear(54, 4),
        ],
        (2, 3, 5, 5),
        None,
    ),
    "grouped": (
        lambda: [
            nn.L0Conv2d(4, 12, 3),
            RELU(),
            nn.L0Conv2d(12, 12, 3, padding=1, groups=12, gate="both"),
            RELU(),
            nn.L0Conv2d(12, 8, 1, groups=4, gate="in"),
        ],
        (2, 4, 6, 5),
        None,
    ),
    "padding modes": (
        lambda: [
            nn.L0Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            RELU(),
            nn.L0Conv2d(8, 6, 3, padding="same", padding_mode="circular", gate="in"),
            torch.nn.ZeroPad2d((1, 0, 2, 0)),
            torch.nn.ReplicationPad2d(1),
        ],
        (2, 3, 6, 5),
        None,
    ),
    "pools": (
        lambda: [
            nn.L0Conv2d(3, 8, 3),
            torch.nn.MaxPool2d(3, 2, 1),
            torch.nn.AvgPool2d(2, 1, 1),
            torch.nn.AdaptiveMaxPool2d((3, 2)),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            nn.L0Linear(8, 3),
        ],
        (2, 3, 12, 9),
        None,
    ),
    "flatten into every linear layer": (
        lambda: [
            nn.L0Conv2d(3, 9, 2),
            torch.nn.Flatten(),
            torch.nn.Tanh(),
            nn.L0Linear(36, 10, gate="both"),
            nn.L0Linear(10, 6, gate="out"),
        ],
        (4, 3, 3, 3),
        None,
    ),
    "flatten into a plain linear layer": (
        lambda: [nn.L0Conv2d(3, 9, 2), RELU(), torch.nn.Flatten(), torch.nn.Linear(36, 10)],
        (4, 3, 3, 3),
        None,
    ),
    "flatten into an MLP": (
        lambda: [
            nn.L0Conv2d(3, 9, 2),
            RELU(),
            torch.nn.Flatten(),
            nn.L0MLP((36, 12, 8, 3), "gelu", gate_input=False),
        ],
        (4, 3, 3, 3),
        None,
    ),
    "a border behind flatten": (
        lambda: [nn.L0Conv2d(3, 9, 2), torch.nn.Flatten(), torch.nn.LayerNorm(36), torch.nn.Linear(36, 2)],
        (4, 3, 3, 3),
        None,
    ),
    "linear layers alone": (
        lambda: [
            torch.nn.Linear(7, 12),
            torch.nn.GELU(),
            nn.L0Linear(12, 9),
            torch.nn.GELU(),
            nn.L0Linear(9, 6),
            RELU(),
            nn.L0Linear(6, 5),
            nn.L0Linear(5, 5, gate=None),
        ],
        (6, 7),
        None,
    ),
    "nested": (
        lambda: [
            torch.nn.Sequential(nn.L0Conv2d(3, 8, 3, padding=1), nn.L0Sequential(nn.L0BatchNorm2d(8))),
            nn.L0Sequential(RELU(), torch.nn.Sequential(nn.L0Conv2d(8, 5, 3, gate="in"))),
        ],
        (4, 3, 5, 5),
        lambda m: {m[0][1][0]: m[0][0].out_gate},
    ),
    "norm between two gates": (
        lambda: [
            nn.L0Conv2d(3, 10, 3),
            nn.L0BatchNorm2d(10, momentum=0.3),
            RELU(),
            nn.L0Conv2d(10, 5, 1, gate="in"),
            torch.nn.BatchNorm2d(5),
        ],
        (4, 3, 5, 5),
        lambda m: {m[1]: m[0].out_gate},
    ),
    "norm first": (
        lambda: [nn.L0BatchNorm2d(6), RELU(), nn.L0Conv2d(6, 4, 3, gate="in"), nn.L0BatchNorm2d(4)],
        (4, 6, 5, 5),
        lambda m: {m[0]: m[2].in_gate},
    ),
    "plain norm": (
        lambda: [
            nn.L0Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            nn.L0Conv2d(8, 6, 1, gate="in"),
            RELU(),
            torch.nn.BatchNorm2d(6),
        ],
        (4, 3, 5, 5),
        None,
    ),
    "sum in front of a gate": (
        lambda: [
            nn.L0Residual(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(4, 8, 1)),
            nn.L0BatchNorm2d(8),
            RELU(),
            nn.L0Residual(torch.nn.Sequential(RELU(), nn.L0Conv2d(8, 8, 1, gate="in"))),
            nn.L0Conv2d(8, 3, 1, gate="in"),
        ],
        (4, 4, 5, 5),
        lambda m: {},
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_chains(name, training):
    modules, shape, norms = CASES[name]

    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.L0Sequential(*modules())

    norms = norms or (lambda model: {})
    check(make, shape, norms, training=training)
    check(make, (0, *shape[1:]), norms, training=False)
    if training:
        check(make, shape, norms, log_alpha=-60.0)
        check(make, shape, norms, std=0.5, dtype=torch.float32)


def count_draws(monkeypatch):
    calls = []
    gate_module = sys.modules["l0kernels.nn.gate"]
    draw = gate_module.sample_gates

    def counted(log_alphas, **options):
        calls.append(len(log_alphas) if isinstance(log_alphas, list) else 1)
        return draw(log_alphas, **options)

    monkeypatch.setattr(gate_module, "sample_gates", counted)
    return calls


def test_all_gates_in_one_draw(monkeypatch):
    shared = nn.HardConcreteGate(6)
    model = nn.L0Sequential(
        nn.L0Conv2d(3, 6, 1, gate="both", out_gate=shared),
        nn.L0Residual(
            nn.L0Sequential(nn.L0Conv2d(6, 6, 1, gate="in")), nn.L0Conv2d(6, 6, 1, out_gate=shared)
        ),
        torch.nn.Flatten(),
        nn.L0MLP((24, 5, 4)),
        nn.L0Linear(4, 2),
    )
    calls = count_draws(monkeypatch)
    model(torch.randn(2, 3, 2, 2))
    assert calls == [6]
    model.eval()(torch.randn(2, 3, 2, 2))
    assert calls == [6]


def test_a_gate_bank_is_respected(monkeypatch):
    model = spread(lenet5())
    bank = nn.GateBank(model, seed=5)
    x = torch.randn(3, 1, 14, 14)
    draw = bank.draw()
    calls = count_draws(monkeypatch)
    y = model(x)
    assert calls == []
    assert torch.equal(model(x), y)
    bank.draw()
    assert not torch.equal(model(x), y)
    with draw:
        assert torch.equal(model(x), y)
    bank.clear()
    assert not torch.equal(model(x), y)
    y.sum().backward()  # each forward is joined to log_alpha by nodes of its own
    assert all(gate.log_alpha.grad.any() for gate in nn.gate_modules(model))


def test_channels_stay_packed(monkeypatch):
    """No step between the first convolution and the linear layer sees a closed channel."""
    seen = []

    class Watched(RELU):
        def forward(self, x):
            seen.append(tuple(x.shape[1:]))
            return super().forward(x)

    steps = sys.modules["l0kernels.nn.steps"]
    monkeypatch.setattr(steps, "ZERO_KEEPING", steps.ZERO_KEEPING | {Watched})
    monkeypatch.setattr(steps, "POINTWISE", steps.POINTWISE | {Watched})
    model = spread(lenet5())
    for i in (1, 4):
        model[i] = Watched()
    model.eval()(torch.randn(3, 1, 14, 14))
    n, m, *_ = count_open(model)
    assert 0 < n < 6
    assert 0 < m < 10
    assert seen == [(n, 12, 12), (m, 4, 4)]

    seen.clear()
    model = spread(block())
    model[2] = Watched()
    model.eval()(torch.randn(2, 3, 5, 5))
    assert seen == [(count_open(model)[0], 5, 5)]


@pytest.mark.parametrize("gated", [True, False])
def test_columns_of_closed_channels_are_not_read(gated):
    torch.manual_seed(0)
    conv = spread(nn.L0Conv2d(3, 9, 2))
    model = nn.L0Sequential(conv, torch.nn.Flatten(), nn.L0Linear(36, 5, gate="in" if gated else None)).eval()
    x = torch.randn(4, 3, 3, 3)
    closed = conv.out_gate.eval_gates().z == 0
    assert closed.any()
    expected = model(x)
    with torch.no_grad():
        model[2].weight[:, closed.repeat_interleave(4)] = torch.nan
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert not model[2].weight.grad[:, closed.repeat_interleave(4)].any()


def test_a_sum_of_branches_packed_by_one_gate(monkeypatch):
    stream = nn.HardConcreteGate(10)

    def conv(n_in, size):
        return nn.L0Conv2d(n_in, 10, size, padding=size // 2, gate="out", out_gate=stream)

    def make():
        return nn.L0Sequential(
            conv(3, 3),
            nn.L0Residual(nn.L0Sequential(nn.L0BatchNorm2d(10), RELU(), conv(10, 3))),
            nn.L0Residual(torch.nn.Sequential(RELU(), conv(10, 1)), conv(10, 1)),
            nn.L0BatchNorm2d(10),
            torch.nn.Conv2d(10, 4, 1),
        )

    check(make, (4, 3, 5, 5), lambda m: dict.fromkeys((m[1].body[0], m[3]), m[0].out_gate))
    unpacked = []
    module = sys.modules["l0kernels.nn.sequential"]
    unpack = module.unpack_channels
    monkeypatch.setattr(module, "unpack_channels", lambda x: unpacked.append(x) or unpack(x))
    spread(make())(torch.randn(2, 3, 5, 5))
    assert unpacked == []


def test_closed_channels_are_zero_and_their_statistics_stay():
    model = spread(block()).double()
    norm, gate = model[1], model[3].in_gate
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    draw = nn.GateBank(gate, seed=1).draw()
    is_open = gate.drawn.z != 0
    with draw:
        model(x)
    assert torch.equal(norm.running_mean != before[0], is_open)
    assert torch.equal(norm.running_var != before[1], is_open)
    assert norm.num_batches_tracked == 1


def test_a_layer_with_hooks_is_called_by_itself():
    model = spread(lenet5())
    x = torch.randn(3, 1, 14, 14)
    nn.GateBank(model, seed=2).draw()
    y = model(x)
    for module in model:
        seen = []
        handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape))
        torch.testing.assert_close(model(x), y)
        assert len(seen) == 1
        assert seen[0][0] == 3
        handle.remove()
    model[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(x).sum().backward()
    assert seen[-1] == "backward"


def test_warns_of_a_gate_before_a_norm_once():
    pair = [nn.L0Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)]
    with pytest.warns(UserWarning, match="'0' multiplies its outputs by gates .* batch norm '1'") as caught:
        inner = nn.L0Sequential(*pair)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="'body.0'") as caught:
        nn.L0Residual(torch.nn.Sequential(*pair))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer = nn.L0Sequential(nn.L0Residual(inner))
        nn.L0Sequential(pair[0], RELU(), pair[1])
        nn.L0Sequential(nn.L0Conv2d(3, 4, 1, gate="in"), pair[1])
        copy.deepcopy(outer)
        pickle.loads(pickle.dumps(outer))


def test_copies():
    model = spread(wide_block())
    x = torch.randn(3, 6, 7, 7)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = wide_block()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh
    torch.manual_seed(1)
    expected = model(x)
    for twin in twins:
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_gates(use_reentrant):
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = spread(lenet5())
        x = torch.randn(4, 1, 14, 14, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (small_net, True),
        (block, False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product((lenet5, wide_block), (True, False))
        ),
    ],
)
def test_compiles_without_a_graph_break(make, training):
    model = spread(make()).train(training)
    shapes = {lenet5: (1, 14, 14), small_net: (1, 6, 6), wide_block: (6, 7, 7), block: (3, 5, 6)}
    x = torch.randn(4, *shapes[make])
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = twin(x).square().sum() + nn.penalty(twin)
    torch.manual_seed(1)
    compiled = torch.compile(
        lambda x: model(x).square().sum() + nn.penalty(model), fullgraph=True, backend="aot_eager"
    )(x)
    torch.testing.assert_close(compiled, expected)
    grads = (
        torch.autograd.grad(compiled, model.parameters()),
        torch.autograd.grad(expected, twin.parameters()),
    )
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast):
    model = spread(lenet5())
    exact_model = copy.deepcopy(model).double()
    x = torch.randn(4, 1, 14, 14)
    torch.manual_seed(3)
    exact = exact_model(x.double())
    model = model if autocast else model.bfloat16()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x if autocast else x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for gate in nn.gate_modules(model):
        assert gate.log_alpha.grad.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=16 * eps * exact.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend(backend):
    with l0.use_backend(backend):
        check(lenet5, (3, 1, 14, 14))
        check(wide_block, (3, 6, 7, 7), wide_norms)


def test_channels_last_and_unbatched():
    model = spread(block())
    x = torch.randn(3, 3, 6, 6)
    nn.GateBank(model, seed=3).draw()
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
    convs = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3), RELU(), nn.L0Conv2d(4, 2, 1)))
    nn.GateBank(convs, seed=3).draw()
    torch.testing.assert_close(convs(x[0]), convs(x)[0])


def test_given_gates_and_frozen_ones():
    model = spread(lenet5())
    x = torch.randn(3, 1, 14, 14)
    gates = {gate: gate.eval_gates() for gate in nn.gate_modules(model)}
    torch.testing.assert_close(model(x, gates), model.eval()(x))
    model.train()
    for gate in list(gates)[1:]:
        gate.eval()
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    torch.testing.assert_close(y, model(x, gates | {model[0].out_gate: model[0].out_gate()}))


def test_conv1d_runs_one_by_one():
    model = spread(
        nn.L0Sequential(
            nn.L0Conv1d(3, 8, 3), RELU(), torch.nn.MaxPool1d(2), nn.L0Conv1d(8, 4, 3, gate="both")
        )
    )
    x = torch.randn(2, 3, 20)
    bank = nn.GateBank(model, seed=4)
    bank.draw()
    expected = F.conv1d(x, model[0].weight, model[0].bias) * model[0].out_gate().z[:, None]
    expected = F.max_pool1d(F.relu(expected), 2) * model[3].in_gate().z[:, None]
    expected = F.conv1d(expected, model[3].weight, model[3].bias) * model[3].out_gate().z[:, None]
    torch.testing.assert_close(model(x), expected)


def test_it_is_an_nn_sequential():
    model = nn.L0Sequential(OrderedDict(conv=nn.L0Conv2d(3, 4, 1), act=RELU()))
    assert isinstance(model, torch.nn.Sequential)
    assert [name for name, _ in model.named_children()] == ["conv", "act"]
    assert isinstance(model[:1], nn.L0Sequential)
    model.append(nn.L0Conv2d(4, 2, 1))
    assert model(torch.randn(1, 3, 2, 2)).shape == (1, 2, 2, 2)
    assert nn.L0Sequential()(torch.ones(2)).sum() == 2


def half_open(n, seed=0):
    """A gate whose even half is closed, in train() as in eval()."""
    gate = nn.HardConcreteGate(n)
    with torch.no_grad():
        gate.log_alpha.fill_(30.0)
        gate.log_alpha[::2] = -30.0
    return gate


def reads(layer, n, *args):
    """A gated layer of n inputs, half of them closed."""
    return layer(n, *args, gate="in", in_gate=half_open(n))


COLUMNS = {
    # The convolution in front has as many channels as the gated layer has inputs, and they are others.
    "columns of images": (
        lambda: [torch.nn.Conv2d(3, 8, 1), reads(nn.L0Linear, 8, 5)],
        (2, 3, 4, 8),
    ),
    "columns behind pooling": (
        lambda: [nn.L0Conv2d(3, 8, 1, gate=None), torch.nn.MaxPool2d(1), RELU(), reads(nn.L0Linear, 8, 5)],
        (2, 3, 4, 8),
    ),
    "columns of sequences": (
        lambda: [nn.L0Conv1d(3, 8, 1, gate=None), reads(nn.L0Linear, 8, 5)],
        (2, 3, 8),
    ),
    "columns of one sequence": (
        lambda: [nn.L0Conv1d(3, 8, 1, gate=None), torch.nn.Flatten(), reads(nn.L0Linear, 8, 5)],
        (3, 8),
    ),
    "one image, flattened": (
        lambda: [nn.L0Conv2d(3, 4, 1, gate=None), torch.nn.Flatten(), reads(nn.L0Linear, 4, 5)],
        (3, 2, 2),
    ),
    "one image behind an unknown module": (
        lambda: [torch.nn.PReLU(), torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), reads(nn.L0Linear, 4, 5)],
        (3, 2, 2),
    ),
    "a sum of branches": (
        lambda: [
            nn.L0Residual(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(3, 8, 1)),
            RELU(),
            reads(nn.L0Linear, 8, 5),
        ],
        (2, 3, 4, 8),
    ),
    "pooling over channels": (
        lambda: [torch.nn.Conv1d(3, 8, 1), torch.nn.AvgPool2d(3, 1, 1), reads(nn.L0Conv1d, 8, 5, 1)],
        (2, 3, 7),
    ),
    "pooling over gated channels": (
        lambda: [
            nn.L0Conv1d(3, 8, 1, gate="out", out_gate=half_open(8)),
            torch.nn.AvgPool2d(3, 1, 1),
            nn.L0Conv1d(8, 5, 1, gate="in"),
        ],
        (2, 3, 7),
    ),
    "a sequence for one image": (
        lambda: [torch.nn.Conv1d(3, 4, 1), nn.L0Conv2d(2, 5, 1, gate="in", in_gate=half_open(2))],
        (2, 3, 6),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COLUMNS)
def test_units_lie_where_the_next_layer_reads_them(name, training):
    modules, shape = COLUMNS[name]
    modules = modules()
    model = nn.L0Sequential(*modules).double().train(training)
    if training:
        nn.GateBank(model, seed=1).draw()
    results = []
    for run in (model, lambda x: functools.reduce(lambda x, module: module(x), modules, x)):
        torch.manual_seed(2)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_pooled_map_flattens_into_the_gate_of_its_channels():
    """Where Flatten leaves one feature of each channel, a convolution computes those that are read."""
    model = spread(
        nn.L0Sequential(
            torch.nn.Conv2d(3, 12, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.L0Linear(12, 4)
        )
    ).eval()
    closed = model[3].in_gate.eval_gates().z == 0
    x = torch.randn(2, 3, 6, 6)
    expected = model[3](model[2](model[1](model[0](x))))
    with torch.no_grad():
        model[0].weight[closed] = torch.nan
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_chain_without_gates_first(training):
    mlp, layer = nn.L0MLP([8, 4], gate_input=False), nn.L0Linear(4, 4)
    model = spread(nn.L0Sequential(mlp, layer)).train(training)
    if training:
        nn.GateBank(model, seed=1).draw()
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), layer(mlp(x)))
    torch.testing.assert_close(nn.L0Sequential(mlp)(x), F.linear(x, mlp.layers[0].weight, mlp.layers[0].bias))


class Twice(torch.nn.Module):
    def forward(self, x):
        return x, 2 * x


class Sum(torch.nn.Module):
    def forward(self, pair):
        return pair[0] + pair[1]


def test_modules_that_take_and_return_tuples():
    conv = spread(nn.L0Conv2d(3, 6, 3)).eval()
    x = torch.randn(2, 3, 6, 6)
    y, indices = nn.L0Sequential(conv, torch.nn.MaxPool2d(2, return_indices=True)).eval()(x)
    expected, expected_indices = F.max_pool2d(conv(x), 2, return_indices=True)
    torch.testing.assert_close(y, expected)
    assert torch.equal(indices, expected_indices)
    model = nn.L0Sequential(Sum(), conv, Twice(), Sum(), nn.L0Conv2d(6, 2, 1, gate="in")).eval()
    torch.testing.assert_close(model((x, x)), model[4](3 * conv(2 * x)))


@pytest.mark.parametrize("training", [True, False])
def test_gates_of_two_distributions_and_dtypes(training):
    other = nn.HardConcreteGate(5, dist=l0.HardConcrete(0.5, -0.3, 1.3))
    model = spread(
        nn.L0Sequential(
            nn.L0Linear(7, 6),
            RELU(),
            nn.L0Linear(6, 5),
            RELU(),
            nn.L0Linear(5, 4, in_gate=other),
        )
    ).double()
    model[2].in_gate.float()
    model.train(training)
    x = torch.randn(3, 7, dtype=torch.float64)
    model(x).sum().backward()  # a draw of its own
    if training:
        nn.GateBank(model, seed=1).draw()
    expected = x
    for module in model:
        expected = module(expected)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_a_layer_whose_forward_was_put_there_is_called():
    model = spread(lenet5()).eval()
    x = torch.randn(3, 1, 14, 14)
    expected, calls = model(x), []
    for layer in (model[0], model[3], model[7]):
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: calls.append(1) or forward(*args)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 3


@pytest.mark.parametrize("norm", [nn.L0BatchNorm2d, torch.nn.BatchNorm2d])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("fmt", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("training", [True, False])
def test_no_input_of_a_convolution_open(norm, n, fmt, training):
    torch.manual_seed(0)
    model = nn.L0Sequential(
        nn.L0Conv2d(3, 4, 3, padding=1),
        RELU(),
        nn.L0Conv2d(4, 5, 1, gate="in"),
        norm(5),
        torch.nn.Flatten(),
        torch.nn.Linear(180, 3),
    ).double()
    model.train(training)
    with torch.no_grad():
        model[3].bias.normal_()
        model[2].in_gate.log_alpha.fill_(-30.0)
    nn.GateBank(model, seed=1).draw()
    x = torch.randn(n, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=fmt)
    results = []
    for backend in ("torch", "reference", None):
        model.zero_grad()
        twin = copy.deepcopy(model[3])
        if backend is None:  # the second convolution is its bias
            y = model[2].bias.view(1, 5, 1, 1).expand(n, 5, 6, 6).contiguous()
            y = model[5](twin(y).flatten(1))
        else:
            with l0.use_backend(backend):
                y = nn.L0Sequential(*model[:3], twin, *model[4:])(x)
        y.square().sum().backward()
        results.append([y, model[2].bias.grad, twin.weight.grad, twin.bias.grad, model[5].weight.grad])
    for mine, theirs, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact)
        torch.testing.assert_close(theirs, exact)


def test_second_derivatives_of_the_reference():
    model = spread(
        nn.L0Sequential(
            nn.L0Conv2d(2, 5, 2),
            torch.nn.Tanh(),
            nn.L0Conv2d(5, 3, 1),
            torch.nn.Flatten(),
            nn.L0Linear(12, 2),
        ),
        std=1.0,
    ).double()
    nn.GateBank(model, seed=1).draw()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    gates = [gate.log_alpha for gate in nn.gate_modules(model)]

    def slope(x):
        dx, *of_gates = torch.autograd.grad(model(x).square().sum(), [x, *gates], create_graph=True)
        return dx, torch.cat(of_gates)

    with l0.use_backend("reference"):
        assert torch.autograd.gradcheck(slope, x)
        grads = torch.autograd.grad(slope(x)[1].square().sum(), gates)
    assert all(grad.any() for grad in grads)
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
        slope(x)


def test_what_works_in_place_at_the_head_of_a_branch_changes_what_both_branches_see():
    heads = [
        torch.nn.Hardtanh(-0.1, 0.2, inplace=True),
        torch.nn.Sequential(torch.nn.Identity(), torch.nn.Threshold(0.1, 0.3, inplace=True)),
        nn.L0Residual(torch.nn.Hardtanh(-0.1, 0.2, inplace=True), RELU()),
        torch.nn.ELU(inplace=True),
    ]
    for head, shortcut in itertools.product(heads, (None, nn.L0Conv2d(4, 4, 1, gate="both"))):
        body = nn.L0Sequential(head, nn.L0Conv2d(4, 4, 3, padding=1, gate="both"))
        first, last = nn.L0Conv2d(3, 4, 3), nn.L0Conv2d(4, 2, 1, gate="in")
        model = spread(nn.L0Sequential(first, nn.L0Residual(body, shortcut), last)).double()
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        nn.GateBank(model, seed=1).draw()
        y = first(x)
        z = y if shortcut is None else shortcut(y)
        expected = last(z + body[1](head(y)))
        torch.testing.assert_close(model(x), expected)


def test_a_watched_inner_container_is_called():
    def watch(module, how):
        if how == "forward":
            module.forward = lambda x: 2 * type(module).forward(module, x) + 1
        elif how == "pre":
            module.register_forward_pre_hook(lambda _, args: (2 * args[0] + 1,))
        elif how == "post":
            module.register_forward_hook(lambda _, args, y: 2 * y + 1)
        elif how == "backward":
            module.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],))

    def residual(*layers):
        return nn.L0Residual(nn.L0Sequential(*layers), torch.nn.Conv2d(4, 4, 1))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    kinds = (torch.nn.Sequential, nn.L0Sequential, residual)
    for how, kind in itertools.product(("forward", "pre", "post", "backward"), kinds):
        inner = kind(nn.L0Conv2d(4, 4, 3, padding=1, gate="both"), torch.nn.Tanh())
        watch(inner, how)
        model = nn.L0Sequential(nn.L0Conv2d(3, 4, 3), inner, nn.L0Conv2d(4, 2, 1, gate="in"))
        spread(model).double()
        nn.GateBank(model, seed=1).draw()
        y = model(x)
        expected = model[2](model[1](model[0](x)))
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        inputs = [x, *model.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
        )


def test_a_watched_inner_container_agrees_on_the_draw():
    gate = nn.HardConcreteGate(4)
    inner = torch.nn.Sequential(RELU(), nn.L0Conv2d(4, 4, 1, gate="both", in_gate=gate, out_gate=gate))
    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3, gate="out", out_gate=gate), inner))
    x = torch.randn(2, 3, 6, 6)

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = step()
    inner.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(step(), expected)
    assert gate.drawn is None


def test_a_convolution_of_another_kind_is_called():
    class Doubled(torch.nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3), Doubled(4, 4, 1), nn.L0Conv2d(4, 2, 1, gate="in")))
    x = torch.randn(2, 3, 6, 6)
    y = model.eval()(x)
    torch.testing.assert_close(y, model[2](model[1](model[0](x))))
    torch.testing.assert_close(nn.export(model)(x), y)


@pytest.mark.parametrize("gate", ["both", "out", "weight", (2, 2)])
@pytest.mark.parametrize("at", [0, 1])
def test_a_chain_within_with_a_replaced_layer(gate, at):
    """Its gates act, too, that an L0MLP does not have itself."""
    torch.manual_seed(0)
    inner = nn.L0MLP([8, 7, 6])
    old = inner.layers[at]
    inner.layers[at] = nn.L0Linear(old.in_features, old.out_features, gate=gate)
    model = nn.L0Sequential(nn.L0Linear(6, 8), torch.nn.ReLU(), inner, torch.nn.ReLU(), nn.L0Linear(6, 3))
    with torch.no_grad():
        for source in nn.gate_modules(model):
            source.log_alpha.normal_(0, 2)
    x, bank = torch.randn(4, 6), nn.GateBank(model, seed=1)
    for training in (True, False):
        model.train(training)
        bank.draw()
        expected = inner.layers[1](inner.layers[0](model[0](x).relu()).relu())
        torch.testing.assert_close(model(x), model[4](expected.relu()))


def test_a_norm_in_a_watched_inner_container_knows_its_gates():
    """A hook changes no value: the container is not called, for a call would hide the gates from the norm."""
    inner = torch.nn.Sequential(nn.L0BatchNorm2d(4), RELU())
    model = spread(nn.L0Sequential(nn.L0Conv2d(3, 4, 3, gate=None), inner, nn.L0Conv2d(4, 2, 1, gate="in")))
    nn.GateBank(model, seed=1).draw()
    assert not model[2].in_gate.drawn.z.all()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    inner.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), expected)
