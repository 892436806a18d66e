"""Gated models where no shape may depend on the gates: compiled, exported, transformed, on a GPU."""

import copy

import pytest
import torch
import unit_oracle
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from unit_cases import CHECKED, LAYERED, check, gated, layered
from unit_examples import image

import l0kernels as l0
from l0kernels import _checks
from l0kernels.nn.units import layers
from l0kernels.nn.units.place import GateGroups

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def on_a_gpu(monkeypatch):
    """Has gated models compute what they compute on a GPU in eager mode."""
    monkeypatch.setattr(GateGroups, "_is_seen_by_functions", lambda *_: True)
    monkeypatch.setattr(layers._Static, "skips", lambda *_: False)


@pytest.fixture(params=["compiled", "gpu"])
def static(request, monkeypatch):
    """As where no shape may depend on the gates."""
    if request.param == "compiled":
        monkeypatch.setattr(_checks, "readable", lambda: False)
    else:
        on_a_gpu(monkeypatch)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CHECKED)
def test_dense_with_zeros(name, static):
    case = gated(name)
    for pattern, train in (("open", True), ("closed", True), ("mixed", True), ("half", False)):
        check(case, pattern, train)


@pytest.mark.parametrize("name", LAYERED)
def test_gates_of_layers_dense_with_zeros(name, static):
    case = layered(name)
    for pattern, train in (("open", True), ("mixed", True), ("half", False)):
        check(case, pattern, train)


@pytest.mark.parametrize("train", [False, True])
def test_functional_call_and_grad(train):
    for name in ("convnext", "glu") if train else ("vgg", "convnext", "twice"):
        model, _, graph, args = gated(name)
        unit_oracle.set_gates(graph, model, "half")
        model.train(train)
        unit_oracle.loss_of(model(*args)).backward()
        values = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}

        def loss(parameters, values=values, model=model, args=args):
            return unit_oracle.loss_of(torch.func.functional_call(model, {**values, **parameters}, args))

        grads = torch.func.grad(loss)({k: values[k] for k, _ in model.named_parameters()})
        for key, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(grads[key], grad, rtol=1e-6, atol=1e-6)


def test_vmap():
    for name in ("vgg", "glu"):
        model, _, graph, args = gated(name)
        unit_oracle.set_gates(graph, model, "half")
        model.eval()
        x = torch.randn(3, *args[0].shape).double()
        torch.testing.assert_close(torch.func.vmap(model)(x), torch.stack([model(one) for one in x]))


def test_meta():
    model, _, _, args = gated("mobilenet_v3")
    assert model.to("meta")(*(arg.to("meta") for arg in args)).shape == (2, 3)


def test_export():
    model, _, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    exported = torch.export.export(model, args)
    torch.testing.assert_close(exported.module()(*args), model(*args))


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compile(train):
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()
    args = (image(1),)
    unit_oracle.set_gates(l0.nn.gate_(model, *args), model, "half")
    model.train(train)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    unit_oracle.loss_of(model(*args)).backward()
    out = compiled(*args)
    unit_oracle.loss_of(out).backward()
    torch.testing.assert_close(out, model(*args))
    for mine, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_compile_of_lent_weights(name):
    model, _, graph, args = gated(name)
    unit_oracle.set_gates(graph, model, "mixed")
    model.eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), model(*args))


def test_functions_are_smooth_where_units_are_closed():
    """A zero behind a closed gate gives neither value nor gradient that is not finite."""
    seen = 0
    made_of_what_lay_there = {"empty_like"}
    for name in set(l0.nn.units.table.POINTWISE.split()) - made_of_what_lay_there:
        function = getattr(F, name, None) or getattr(torch, name, None)
        x = torch.zeros(4, requires_grad=True)
        try:
            y = function(x)
        except (TypeError, RuntimeError):  # none of that name, or it takes more than a tensor
            continue
        seen += 1
        assert y.float().isfinite().all(), name
        if y.requires_grad:
            y.sum().backward()
            assert x.grad.isfinite().all(), name
    assert seen > 50


class Count(TorchDispatchMode):
    """Counts operations that are no views."""

    VIEWS = ("view", "detach", "slice", "expand", "split", "select.int", "unsqueeze", "aten.t.", "alias")

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(what in name for what in ("_local_scalar_dense", "nonzero", "lift_fresh")), name
        self.n += not any(view in name for view in self.VIEWS) or "backward" in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2"])
def test_few_operations_on_a_gpu(name, monkeypatch):
    """A layer adds seven to forward and backward, a draw two dozen; none reads a number on the host."""
    on_a_gpu(monkeypatch)
    model, plain, _, args = gated(name)
    counts = []
    for one in (model.train(), plain.train()):
        one(*args).sum().backward()  # what is made once
        with Count() as count:
            one(*args).sum().backward()
        counts.append(count.n)
    n_layers = sum(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in model.modules())
    assert counts[0] <= counts[1] + 7 * n_layers + 24


def test_running_statistics_move_once_where_a_norm_runs_twice(monkeypatch):
    model, plain, graph, args = gated("twice")
    unit_oracle.set_gates(graph, model, "half")
    others = copy.deepcopy(model)
    model.train()(*args)
    on_a_gpu(monkeypatch)
    others.train()(*args)
    assert int(others.norm.num_batches_tracked) == 2
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(others.norm, name)
        torch.testing.assert_close(value, getattr(model.norm, name), rtol=1e-12, atol=1e-12)
        assert not torch.equal(value, getattr(plain.norm, name))


def test_running_statistics_move_where_a_forward_fails(monkeypatch):
    model, plain, _, args = gated("twice")
    on_a_gpu(monkeypatch)
    handle = model.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        model.train()(*args)
    handle.remove()
    assert int(model.norm.num_batches_tracked) == 2
    assert not torch.equal(model.norm.running_mean, plain.norm.running_mean)


def test_a_capture_meets_no_node_of_an_earlier_forward(monkeypatch):
    """Nodes that add to a gradient run on the stream of their first forward, for which no capture waits."""

    def node():
        log_alpha = model.l0_units.gates[0].log_alpha
        return log_alpha.view_as(log_alpha).grad_fn.next_functions[0][0]

    on_a_gpu(monkeypatch)
    model, _, _, args = gated("resnet")
    model.train()(*args).sum().backward()
    node().metadata["forward"] = "eager"
    model(*args).sum().backward()
    assert node().metadata == {"forward": "eager"}
    model.l0_units._captures = True  # as if the forwards so far were of a capture, and the next ones are not
    model(*args).sum().backward()
    assert node().metadata == {}
