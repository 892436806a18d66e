"""l0kernels.prox.after_step: the operators after each step of torch's optimisers."""

import copy
import math

import pytest
import torch
from torch import nn

from l0kernels import prox

pytestmark = pytest.mark.usefixtures("seeded")


def net():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lr tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimisers_and_then_the_operator(name):
    model, x = net(), torch.randn(20, 8)
    other = copy.deepcopy(model)
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    penalties = {r"0\.weight": prox.TransformedL1(0.3), r"2\.weight": prox.GroupLasso(0.5, dim=1)}
    prox.after_step(optimizer, penalties, model)
    for _ in range(5):
        step(model, optimizer, x)
        step(other, plain, x)
        lr = float(plain.param_groups[0]["lr"])
        penalties[r"0\.weight"].prox_(other[0].weight, lr)
        penalties[r"2\.weight"].prox_(other[2].weight, lr)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_each_group_has_its_rate_and_schedules_count():
    model, x = net(), torch.randn(20, 8)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    handle = prox.after_step(optimizer, {".*weight": prox.L1(0.2)}, model)
    for i in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        rates = (model[0], 0.1 * 0.5**i), (model[2], 0.3 * 0.5**i)
        before = [(layer.weight - lr * layer.weight.grad).detach() for layer, lr in rates]
        optimizer.step()
        for layer, w, lr in zip((model[0], model[2]), before, (0.1, 0.3), strict=True):
            assert torch.allclose(layer.weight, prox.l1(w, 0.2, step=lr * 0.5**i), atol=1e-7)
        schedule.step()
    handle.scale = 0.0
    zeros = (model[0].weight == 0).sum()
    step(model, optimizer, x)
    assert (model[0].weight == 0).sum() <= zeros


@pytest.mark.parametrize("name", ["adam", "adam foreach", "adam fused", "adam amsgrad", "adamw"])
def test_the_metric_of_adam(name):
    """By element lr / (sqrt(v_hat) + eps), by group lr / the mean of that below."""
    model, x = net(), torch.randn(20, 8)
    other = copy.deepcopy(model)
    optimizer, plain = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    penalties = {model[0].weight: prox.L1(0.02), (model[2].weight,): prox.GroupLasso(0.02, dim=1)}
    prox.after_step(optimizer, penalties, metric="adam")
    for i in range(1, 5):
        step(model, optimizer, x)
        step(other, plain, x)
        metrics = []
        for weight in (other[0].weight, other[2].weight):
            state = plain.state[weight]
            v = state["max_exp_avg_sq" if "amsgrad" in name else "exp_avg_sq"]
            metrics.append((v / (1 - 0.999**i)).sqrt() + 1e-8)
        with torch.no_grad():
            w, own = other[0].weight, 0.01 * 0.02 / metrics[0]
            w.copy_(torch.sign(w) * (w.abs() - own).clamp(min=0))
            w = other[2].weight
            norms = w.norm(dim=0)
            w.mul_((1 - 0.01 * 0.02 / metrics[1].mean(0) / norms.clamp(min=1e-30)).clamp(min=0))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                q.copy_(p)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            plain.state[q] = copy.deepcopy(optimizer.state[p])
    assert (model[0].weight == 0).any()


def test_training_finds_the_columns_that_matter():
    """A linear model of 4 inputs of 16; the others' columns become exact zeros."""
    model, x = nn.Linear(16, 3), torch.randn(400, 16)
    target = x[:, :4] @ torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = prox.after_step(optimizer, {"weight": prox.GroupLasso(0.05, dim=1)}, model)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        values.append(handle.value().item())
    assert (model.weight[:, 4:] == 0).all()
    assert (model.weight[:, :4] != 0).any(0).all()
    assert values[-1] == pytest.approx(0.05 * model.weight.norm(dim=0).sum().item(), rel=1e-5)


def test_every_so_many_steps():
    model, x = net(), torch.randn(20, 8)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    prox.after_step(optimizer, {r".*weight": prox.L1(0.1)}, model, every=3)
    for i in range(1, 7):
        step(model, optimizer, x)
        step(other, plain, x)
        if i % 3 == 0:
            prox.L1(0.1).prox_([other[0].weight, other[2].weight], 0.1 * 3)
        assert torch.allclose(model[0].weight, other[0].weight, atol=1e-7)


def test_state_continues_a_run():
    x = torch.randn(20, 8)

    def make():
        torch.manual_seed(3)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, prox.after_step(optimizer, {r".*weight": prox.L1(0.1)}, model, every=2)

    model, optimizer, handle = make()
    handle.scale = 0.5
    for _ in range(3):
        step(model, optimizer, x)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    assert saved[2] == {"steps": 3, "scale": 0.5}
    for _ in range(3):
        step(model, optimizer, x)
    other, again, handle = make()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    for _ in range(3):
        step(other, again, x)
    assert torch.equal(model[0].weight, other[0].weight)
    for wrong in ({}, {"steps": 1}, {"steps": 1, "scale": 1, "more": 2}):
        with pytest.raises(ValueError, match=r"^state must have 'steps' and 'scale', got"):
            handle.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"^scale must be >= 0, got -1$"):
        handle.load_state_dict({"steps": 1, "scale": -1})


def test_what_has_no_gradient_is_left_alone():
    model, x = net(), torch.randn(20, 8)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = prox.after_step(optimizer, {r".*weight": prox.L1(10.0)}, model)
    step(model, optimizer, x)
    assert torch.equal(model[0].weight, before)
    assert (model[2].weight == 0).all()
    handle.remove()
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    step(model, optimizer, x)
    assert (model[2].weight != 0).any()


def test_compiled_steps():
    model, x = net(), torch.randn(20, 8)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for m, o in ((model, optimizer), (other, plain)):
        prox.after_step(o, {r".*weight": prox.TransformedL1(0.1)}, m)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
            m(x).square().mean().backward()
        compiled()
        plain.step()
    assert torch.allclose(model[0].weight, other[0].weight)
    assert torch.equal(model[0].weight == 0, other[0].weight == 0)


def test_layer_shares():
    assert prox.layer_shares(4) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert prox.layer_shares(2, 0.5, 0.0) == [0.5, 0.5]
    for call in (lambda: prox.layer_shares(6), lambda: prox.layer_shares(2, 1.2)):
        with pytest.raises(ValueError, match=r"^first and change must give shares in \[0, 1\] for"):
            call()
    with pytest.raises(ValueError, match=r"^layers must be in \[1, "):
        prox.layer_shares(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, o: prox.after_step(o, {"3.weight": prox.L1(1)}, m),
            ValueError,
            "^'3.weight' must match the name of a parameter, got none of",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": prox.L1(1)}),
            ValueError,
            "^model must be given for the pattern '0.weight', got none$",
        ),
        (
            lambda m, o: prox.after_step(o, {}, m),
            ValueError,
            "^regularisers must hold at least one, got none$",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": 0.1}, m),
            TypeError,
            r"^regularisers\['0.weight'\] must be a Regulariser, got 0.1$",
        ),
        (
            lambda m, o: prox.after_step(o, {3: prox.L1(1)}, m),
            TypeError,
            "^a key of regularisers must be a pattern, a parameter or a tuple of these, got int$",
        ),
        (
            lambda m, o: prox.after_step(m, {"0.weight": prox.L1(1)}, m),
            TypeError,
            "^optimizer must be a torch.optim.Optimizer, got Sequential$",
        ),
        (
            lambda m, o: prox.after_step(o, {".*weight": prox.L1(1), "0.weight": prox.L0(1)}, m),
            ValueError,
            "^regularisers must name a parameter once, got 0.weight twice$",
        ),
        (
            lambda m, o: prox.after_step(o, {nn.Parameter(torch.ones(2)): prox.L1(1)}),
            ValueError,
            r"^optimizer must have the parameters of regularisers, got none for a parameter of shape \(2,\)$",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.*": prox.GroupLasso(1, dim=1)}, m),
            ValueError,
            r"^0.bias, GroupLasso\(.*\): dim must be in \[-1, 1\), got 1$",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": prox.TopK(99)}, m),
            ValueError,
            r"^0.weight, TopK\(k=99\): k must be at most the 48 elements of x, got 99$",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": prox.L1(1)}, m, metric="euclid"),
            ValueError,
            "^metric must be one of 'none', 'adam', got 'euclid'$",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": prox.L1(1)}, m, metric="adam"),
            ValueError,
            "^metric='adam' must have an optimizer with betas and eps, got",
        ),
        (
            lambda m, o: prox.after_step(o, {"0.weight": prox.L1(1)}, m, every=0),
            ValueError,
            r"^every must be in \[1, ",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        call(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimiser_without_second_moments():
    model = net()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.1)
    prox.after_step(optimizer, {"0.weight": prox.L1(1)}, model, metric="adam")
    with pytest.raises(
        RuntimeError, match=r"^metric='adam' must find exp_avg_sq in the state of 0.weight, got"
    ):
        step(model, optimizer, torch.randn(4, 8))


def test_a_subclass_of_ones_own():
    class Clip(prox.Regulariser):
        def formula(self, x, step):
            return x.clamp(-0.1, 0.1)

        def value(self, x):
            return torch.where(x.abs().max() <= 0.1, 0.0, math.inf)

    model, x = net(), torch.randn(20, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = prox.after_step(optimizer, {".*": Clip()}, model)
    assert handle.value() == math.inf
    step(model, optimizer, x)
    assert max(p.abs().max() for p in model.parameters()) <= 0.1
    assert handle.value() == 0
