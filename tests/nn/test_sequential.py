"""L0Sequential and L0Residual compute what the dense masked composition does."""

import copy
import io
import itertools
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from sequential_nets import (
    RELU,
    block,
    check,
    lenet5,
    paper_block,
    small_net,
    spread,
    wide_block,
    wide_norms,
)
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import nn


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


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
