"""What gate_ is asked for: options, and what it refuses with nothing changed."""

import pytest
import torch
import unit_nets
import unit_oracle
from torch import nn
from unit_cases import check, gated
from unit_examples import image, rows
from unit_nets_forwards import Custom

import l0kernels as l0

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), type(m), m.training, *m._modules)
        for m in model.modules()
    ]
    return {k: v.clone() for k, v in model.state_dict().items()}, hooks, [*model.__dict__]


def unchanged(model, before):
    after = state_of(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][k], after[0][k]) for k in after[0])


REFUSED = [
    ((), {}, "example must be given"),
    ((torch.randn(2, 4, 8, 8),), {}, "example must be inputs that the model takes, got RuntimeError"),
    (("x",), {}, "example must be inputs that the model takes, got"),
    ((image(),), {"include": "conv9"}, "include must name a layer with units to gate, got 'conv9'"),
    (
        (image(),),
        {"exclude": ["conv9"]},
        r"exclude must name a layer with units to gate, got \['conv9'\]",
    ),
    ((image(),), {"exclude": ".*"}, "model must have units to gate, got none"),
    ((image(),), {"block": 0}, "block must be a positive int, got 0"),
    ((image(),), {"block": True}, "block must be a positive int, got True"),
    ((image(),), {"block": 1.5}, "block must be a positive int, got 1.5"),
    ((image(),), {"droprate_init": 2.0}, "droprate_init"),
    ((image(),), {"eval_mode": "mode"}, "eval_mode"),
    ((image(),), {"lam": -1.0}, "lam"),
]


@pytest.mark.parametrize(("args", "options", "message"), REFUSED)
def test_refused(args, options, message):
    model, _ = unit_nets.NETS["mobilenet_v3"]()
    model.body[1].eval()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        l0.nn.gate_(model, *args, **options)
    unchanged(model, before)


def test_refused_where_nothing_is_gated():
    model = nn.Sequential(nn.Linear(3, 3))
    before = state_of(model)
    with pytest.raises(ValueError, match="model must have units to gate, got none"):
        l0.nn.gate_(model, torch.randn(2, 3))
    unchanged(model, before)
    with pytest.raises(ValueError, match="model must be gated by gate_, got a Sequential that is not"):
        l0.nn.ungate_(model)


def test_refused_where_sizes_are_missing():
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"which its first call gives it, got '0\.weight' without one"):
        l0.nn.gate_(model, torch.randn(2, 4))
    assert isinstance(model[0], nn.LazyLinear)


def test_refused_outside_of_the_forward():
    """Each layer would have a draw of its own."""
    model, _, _, args = gated("vgg")
    with pytest.raises(RuntimeError, match="a gated layer must be called by the forward of the model"):
        model.features(*args)
    model.eval().features(*args)


def test_refused_where_it_is_gated():
    model, _, _, args = gated("resnet")
    before = state_of(model)
    for outer in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="model must not be gated already"):
            l0.nn.gate_(outer, *args)
    unchanged(model, before)


def test_ungated_is_unchanged():
    torch.manual_seed(0)
    model, args = unit_nets.NETS["mobilenet_v3"]()
    before = state_of(model)
    l0.nn.gate_(model, *args)
    assert l0.nn.ungate_(model) is model
    unchanged(model, before)


def test_reentrant_checkpoints_are_refused():
    model, _, _, args = gated("checkpointed_reentrant")
    with pytest.raises(RuntimeError, match="use_reentrant=False in a gated model, got True"):
        model(*args)
    model.eval()
    model(*args)


def test_custom_functions_of_training_alone_are_refused():
    model, args = Custom(in_eval=False).double(), (rows(3, 4),)
    graph = l0.nn.gate_(model, *args)
    assert {group.name for group in graph.groups} == {"a", "b"}
    unit_oracle.set_gates(graph, model, "half")
    with pytest.raises(RuntimeError, match=r"Cube\.apply must not get or make gated units, got some"):
        model(*args)


def test_include_and_exclude():
    def groups(**options):
        return [group.name for group in gated("resnet", **options)[2].groups]

    assert groups(include=r".*\.conv1") == ["body.1.conv1", "body.2.conv1", "body.3.conv1"]
    assert groups(include=["conv1"]) == ["body.1.conv1", "body.2.conv1", "body.3.conv1"]
    assert groups(include=["conv1"], exclude=r"body\.3.*") == ["body.1.conv1", "body.2.conv1"]
    assert groups(residual=False) == ["body.1.conv1", "body.2.conv1", "body.3.conv1"]
    assert groups(exclude="body.0.0") == ["body.1.conv1", "body.2.conv1", "body.2.conv2", "body.3.conv1"]


@pytest.mark.parametrize("name", ["resnet", "densenet", "glu", "vgg", "shufflenet"])
@pytest.mark.parametrize("options", [{"block": 3}, {"block": 64}, {"inputs": True}, {"residual": False}])
def test_options(name, options):
    case = gated(name, **options)
    check(case, "mixed", True)
    check(case, "half", False)
    for group, gate in zip(case[2].groups, case[0].l0_units.gates, strict=True):
        assert gate.n == -(-group.units // options.get("block", 1))
    if "inputs" in options:
        assert any(not group.makers for group in case[2].groups)


def test_every_parameter_has_a_gradient():
    """Where ranks close different units, none waits for another's."""
    for name in ("resnet", "convnext", "glu"):
        model, _, graph, args = gated(name)
        for pattern in ("closed", "open", "mixed"):
            unit_oracle.set_gates(graph, model, pattern)
            model.zero_grad()
            unit_oracle.loss_of(model(*args)).backward()
            assert [n for n, p in model.named_parameters() if p.grad is None] == []
