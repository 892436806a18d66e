"""l0kernels.prox.gates_from_zeros: units without weights are skipped, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels import prox

pytestmark = pytest.mark.usefixtures("seeded")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(x + self.norm(self.second(x))).mean((2, 3)))


class Depthwise(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.PReLU(12),
            nn.Conv2d(12, 5, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5)),
        (10,),
    ),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(10, 32), nn.Sigmoid(), nn.Linear(32, 5)), (10,)),
    "norm": (
        lambda: nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 5)),
        (10,),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9, 10),
            nn.ReLU(),
            nn.Linear(10, 3),
        ),
        (3, 12, 12),
    ),
    "residual": (Residual, (3, 8, 8)),
    "depthwise": (Depthwise, (3, 8, 8)),
}
each_net = pytest.mark.parametrize("name", NETS)
RATE = 0.4


def zero_units(model, x, inputs, made):
    """Takes all weights of some units of each group that read it, or (`made`) that make it, to 0."""
    graph, counts = l0.nn.unit_graph(model, x[:1], inputs=inputs), {}
    parameters = dict(model.named_parameters())
    for group in graph.groups:
        closed = torch.rand(group.units) < RATE
        counts[group.name] = int(closed.sum())
        for member in group.members:
            chosen = member.role != "in" if made else member.role == "in"
            if chosen and member.name in parameters:
                with torch.no_grad():
                    parameters[member.name].index_fill_(member.dim, member.index[closed].flatten(), 0)
    return counts


def results(model, x, target):
    """Output and gradients."""
    model.zero_grad()
    y = model(x)
    nn.functional.cross_entropy(y, target).backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_but_for_zeros(dense, gated, x, target):
    """Outputs, and the gradients of every weight that is not 0; closed units get gradients of 0."""
    y, grads = results(dense, x, target)
    got, own = results(gated, x, target)
    assert torch.allclose(got, y, atol=1e-5)
    assert grads.keys() == own.keys()
    for name, p in dense.named_parameters():
        same = (own[name] - grads[name]).abs() <= 1e-5
        skipped = (own[name] == 0) & (p == 0)
        assert (same | skipped).all(), name


@each_net
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_dense_models_output_and_gradients(name, made, inputs, training):
    make, shape = NETS[name]
    model, x, target = make().train(training), torch.randn(6, *shape), torch.randint(3, (6,))
    counts = zero_units(model, x, inputs, made)
    dense = copy.deepcopy(model)
    zeros = prox.gates_from_zeros(model, x[:1], inputs=inputs)
    assert zeros.closed.keys() == counts.keys()
    assert made or zeros.closed == counts
    assert_equal_but_for_zeros(dense, model, x, target)
    with torch.no_grad():
        small = l0.nn.export(model.eval())
        assert torch.allclose(small(x), dense.eval()(x), atol=1e-5)
        if any(zeros.closed.values()) and not inputs:
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())


def test_what_is_made_of_nothing_is_closed_only_where_it_reads_as_0():
    """Behind a sigmoid it reads as 1/2; a bias alone makes something."""
    for activation, closed in ((nn.ReLU(), 4), (nn.Tanh(), 4), (nn.Sigmoid(), 0), (nn.Softplus(), 0)):
        model = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 3))
        with torch.no_grad():
            model[0].weight[:4] = 0
        zeros = prox.gates_from_zeros(model, torch.zeros(1, 5))
        assert zeros.closed == {"0": 0}
        with torch.no_grad():
            model[0].bias[:4] = 0
        zeros.refresh()
        assert zeros.closed == {"0": closed}


def test_a_batch_norm_makes_something_of_nothing():
    """With weight and bias of 0 it does not; without any it does once it has seen other data."""
    for affine in (True, False):
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=affine), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            model[0].weight[:4] = model[0].bias[:4] = 0
        zeros = prox.gates_from_zeros(model, torch.zeros(1, 5))
        assert zeros.closed == {"0": 0}
        if affine:
            with torch.no_grad():
                model[1].weight[:3] = model[1].bias[:3] = 0
            zeros.refresh()
            assert zeros.closed == {"0": 3}


def test_refresh_follows_the_weights():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    zeros = prox.gates_from_zeros(model, x)
    assert zeros.closed == {"0": 0}
    with torch.no_grad():
        model[2].weight[:, 2:6] = 0
        model[2].weight[0, 5] = float("nan")
    zeros.refresh()
    assert zeros.closed == {"0": 3}
    with torch.no_grad():
        model[2].weight[1, 2] = 1e-30
    zeros.refresh()
    assert zeros.closed == {"0": 2}
    zeros.open_()
    assert zeros.closed == {"0": 0}


def test_a_closed_unit_gets_no_gradient_until_it_is_opened():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(40, 5)
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    zeros = prox.gates_from_zeros(model, x[:1])
    model(x).square().mean().backward()
    assert (model[2].weight.grad[:, :4] == 0).all()
    assert (model[0].weight.grad[:4] == 0).all()
    zeros.open_()
    model.zero_grad()
    model(x).square().mean().backward()
    assert (model[2].weight.grad[:, :4] != 0).any()


def train(model, x, target, steps, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prox.after_step(optimizer, {r"[24]\.weight": prox.GroupLasso(0.1, dim=1)}, model)
    zeros = None
    if options:
        zeros = prox.gates_from_zeros(model, x[:1])
        zeros.after_step(optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return zeros


def test_training_is_the_dense_one_while_nothing_comes_back():
    """Of a zero group the dense model has a gradient; where that is below lam it stays zero in both."""
    model = NETS["mlp"][0]()
    x, target = torch.randn(64, 10), torch.randint(5, (64,))
    dense = copy.deepcopy(model)
    zeros = train(model, x, target, 150, every=1)
    train(dense, x, target, 150)
    assert sum(zeros.closed.values()) > 10
    for p, q in zip(model.parameters(), dense.parameters(), strict=False):
        assert torch.allclose(p, q, atol=1e-5)


def test_every_and_reopen():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    zeros = prox.gates_from_zeros(model, x)
    handle = zeros.after_step(optimizer, every=2, reopen=3)
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    seen = []
    for _ in range(8):
        model(x).sum().backward()
        optimizer.step()
        seen.append(zeros.closed["0"])
    assert seen == [0, 4, 4, 4, 4, 0, 0, 4]
    handle.remove()
    zeros.open_()
    optimizer.step()
    assert zeros.closed["0"] == 0


def test_what_is_kept_from_forward_to_forward():
    """Gates that nobody writes into are made once, but not for training in inference mode."""
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    zeros = prox.gates_from_zeros(model, x)
    (gate,) = [gate for _, gate in zeros]
    with torch.inference_mode():
        y = model(x)
    assert gate() is gate()
    model(x).sum().backward()
    assert torch.equal(model(x), y)
    first, other = gate(), copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight[:, 6] = 0
    zeros.refresh()
    assert gate() is not first
    assert gate().z.tolist() == [0, 0, 0, 0, 1, 1, 0, 1]
    assert torch.equal(other(x), y)
    gate.eval_mode = "median"
    assert gate().z.tolist() == [0, 0, 0, 0, 1, 1, 0, 1]


def test_gates_are_frozen_and_saved():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    names = [name for name, _ in model.named_parameters()]
    zeros = prox.gates_from_zeros(model, x)
    assert [name for name, _ in model.named_parameters()] == names
    model.train()
    other = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    again = prox.gates_from_zeros(other, x)
    other.load_state_dict(model.state_dict())
    assert again.closed == zeros.closed == {"0": 4}
    assert torch.equal(other(x), model(x))
    l0.nn.ungate_(model)
    assert type(model[0]) is nn.Linear
    assert torch.allclose(other(x), model(x), atol=1e-6)


def test_inputs_are_units_where_they_are_asked_for():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    dense = copy.deepcopy(model)
    zeros = prox.gates_from_zeros(model, x, inputs=True)
    assert sorted(zeros.closed.values()) == [0, 2]
    assert torch.allclose(model(x), dense(x), atol=1e-6)


def test_what_a_norm_is_over_is_left_alone():
    """Its statistics are of all units, zeros among them."""
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight[:, :4] = model[4].weight[:, :4] = 0
    dense, x = copy.deepcopy(model), torch.randn(4, 5)
    zeros = prox.gates_from_zeros(model, x)
    assert zeros.closed == {"2": 4}
    assert torch.allclose(model(x), dense(x), atol=1e-6)
    alone = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"^model must have units to gate, not all under a norm over units"):
        prox.gates_from_zeros(alone, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: prox.gates_from_zeros(m), "^example must be given"),
        (lambda m, x: prox.gates_from_zeros(m, x[:, :2]), "^example must be inputs that the model takes"),
        (
            lambda m, x: prox.gates_from_zeros(m, x, include="7"),
            "^include must name a layer with units to gate",
        ),
        (lambda m, x: (l0.nn.gate_(m, x), prox.gates_from_zeros(m, x)), "^model must not be gated already"),
        (
            lambda m, x: prox.gates_from_zeros(m, x).after_step(torch.optim.SGD(m.parameters()), 0),
            r"^every must be",
        ),
        (
            lambda m, x: prox.gates_from_zeros(m, x).after_step(torch.optim.SGD(m.parameters()), 1, 0),
            r"^reopen must",
        ),
    ],
)
def test_wrong_arguments(call, message):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(4, 5))
