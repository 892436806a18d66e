"""gate_ and unit_graph on nets of every kind, against the oracle of unit_oracle."""

import copy
import cProfile
import dataclasses
import itertools
import math
import pstats
import sys
import threading

import pytest
import torch
import unit_nets
import unit_oracle
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import l0kernels as l0
from l0kernels import _checks
from l0kernels.impl import im2col
from l0kernels.nn.cost import cost_of
from l0kernels.nn.units import layers, narrow
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


def gated(name, **options):
    """A net, the same before it was gated, what is gated, and the example."""
    torch.manual_seed(0)
    model, args = unit_nets.NETS[name]()
    plain = copy.deepcopy(model)
    return model, plain, l0.nn.gate_(model, *args, **options), args


def check(case, pattern, train, what=""):
    model, plain, graph, args = case
    model.train(train)
    unit_oracle.set_gates(graph, model, pattern)
    unit_oracle.check(plain, model, graph, args, f"{pattern}, {'train' if train else 'eval'}{what}")


SERVED = [name for name in unit_nets.NETS if name != "checkpointed_reentrant"]
# Their parts are those of resnet, mobilenet_v3, packed and encoder.
ALIKE = ("bottleneck", "mobilenet_v2", "packed_sorted", "encoder_layer")
CHECKED = [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in SERVED]


@pytest.mark.parametrize("name", CHECKED)
def test_open_units_alone(name):
    case = gated(name)
    for pattern in ("open", "closed", "one group closed", "one unit open", "fractional", "mixed"):
        check(case, pattern, True)
    for pattern in ("half", "mixed"):
        check(case, pattern, False)
    rounded = case[0].l0_units
    for multiple in (4, 8):
        rounded.multiples = [1 if m == 1 else multiple for m in rounded.multiples]
        check(case, "half", True, f", rounded to {multiple}")


@pytest.fixture
def small_images(monkeypatch):
    """Convolutions as those of small images are, whatever they are of."""
    monkeypatch.setattr(im2col, "_has_small_images", lambda *_: True)
    im2col._plan.cache_clear()
    yield
    im2col._plan.cache_clear()


@pytest.mark.parametrize(
    "name", ["resnet", "bottleneck", "preactivation", "densenet", "unet", "vgg", "norms"]
)
def test_convolutions_of_small_images(name, small_images):
    case = gated(name)
    for pattern in ("open", "closed", "one unit open", "fractional", "mixed"):
        check(case, pattern, True)
    check(case, "half", False)


@pytest.mark.parametrize(
    "name", ["vgg", "mixer", "autoencoder", "towers", "glu", "encoder", "tied", "checkpointed"]
)
def test_inputs_times_their_gates(name, monkeypatch):
    """Linear layers as those are whose weight is far larger than what they read."""
    monkeypatch.setattr(layers, "_is_short", lambda *_: True)
    case = gated(name)
    for pattern in ("open", "closed", "one unit open", "fractional", "mixed"):
        check(case, pattern, True)
    check(case, "half", False)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("pattern", ["open", "mixed"])
def test_ungated_images_lie_as_torch_has_them(kind, pattern, small_images):
    """Somebody views them."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 4, 3, padding=1)]
    model, x = nn.Sequential(*body), torch.randn(2, 3, 6, 6)
    graph = l0.nn.gate_(model, x)
    unit_oracle.set_gates(graph, model, pattern)
    assert model(x).is_contiguous()
    model.to(memory_format=torch.channels_last)
    assert model(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("tracks", [False, True], ids=["gated", "ungated"])
def test_gradients_of_an_instance_norm_of_one_image(tracks):
    """torch's backward is wrong where it is given channels_last gradients: it gets none."""
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=tracks)
    body = [nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model, x = nn.Sequential(*body, nn.Conv2d(8, 4, 3)).double(), unit_nets.image(batch=1)
    plain = copy.deepcopy(model)
    check((model, plain, l0.nn.gate_(model, x), (x,)), "half", True)


@pytest.mark.parametrize("groups", [1, 8])
def test_strides_across_a_single_channel(groups):
    """oneDNN reads channels_last images of one channel as wider ones where outputs have a width of 1."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(1, 8)]
    body.append(nn.Conv2d(8, 8, 3, (1, 2), 1, groups=groups, padding_mode="reflect"))
    model, x = nn.Sequential(*body, nn.Conv2d(8, 2, 1)).eval(), torch.randn(5, 3, 9, 2)
    graph = l0.nn.gate_(model, x)
    unit_oracle.set_gates(graph, model, "one unit open")
    torch.testing.assert_close(model(x), copy.deepcopy(model).double()(x.double()).float())


BY_NAME = {
    "permute": lambda x: torch.permute(input=x, dims=(0, 1, 3, 2)),
    "mean": lambda x: torch.mean(input=x, dim=(2, 3), keepdim=True),
    "max": lambda x: torch.max(input=x, dim=2, keepdim=True)[0],
    "softmax": lambda x: torch.softmax(input=x, dim=-1),
    "cumsum": lambda x: torch.cumsum(input=x, dim=2),
    "chunk": lambda x: torch.cat(tensors=torch.chunk(input=x, chunks=2, dim=1)[::-1], dim=1),
    "split": lambda x: torch.cat(torch.split(split_size_or_sections=[3, 5], tensor=x, dim=1), 1),
    "unsqueeze": lambda x: torch.squeeze(input=torch.unsqueeze(input=x, dim=2), dim=2),
    "flatten": lambda x: torch.reshape(input=torch.flatten(input=x, start_dim=2), shape=x.shape),
    "transpose": lambda x: torch.transpose(input=x, dim0=2, dim1=3),
    "index_select": lambda x: torch.index_select(input=x, dim=2, index=torch.arange(len(x[0, 0]))),
    "stack": lambda x: torch.stack(tensors=torch.unbind(input=x, dim=2), dim=2),
    "max_pool2d": lambda x: F.max_pool2d(input=x, kernel_size=3, stride=1, padding=1),
    "where": lambda x: torch.where(condition=x > 0, input=x, other=0.1 * x),
    "add": lambda x: torch.add(input=x, other=x),
}


class ByName(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.a, self.b = change, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.b(self.change(self.a(x)))


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name(name):
    model, x = ByName(BY_NAME[name]).double(), unit_nets.image(size=4)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    for pattern in ("half", "mixed", "closed"):
        check((model, plain, graph, (x,)), pattern, True)


def test_a_view_of_another_dtype_has_no_units():
    model = ByName(lambda x: x.view(torch.int64).view(dtype=torch.float64)).double()
    graph = l0.nn.unit_graph(nn.Sequential(nn.Conv2d(3, 3, 1).double(), model), unit_nets.image(size=4))
    assert [group.name for group in graph.groups] == ["0"]
    assert "view in 1" in str(graph)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CHECKED)
def test_dense_with_zeros(name, static):
    case = gated(name)
    for pattern, train in (("open", True), ("closed", True), ("mixed", True), ("half", False)):
        check(case, pattern, train)


@pytest.mark.parametrize("name", SERVED)
def test_with_every_unit_open_it_is_the_model(name):
    model, plain, graph, args = gated(name)
    unit_oracle.set_gates(graph, model, "open")
    model.eval(), plain.eval()
    for mine, other in zip(*map(unit_oracle.tensors_of, (model(*args), plain(*args))), strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHECKED)
def test_nothing_else_reads_a_unit(name):
    _, plain, graph, args = gated(name)
    plain.eval()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        z = [(torch.rand(group.units, generator=generator) < 0.5).double() for group in graph.groups]
        unit_oracle.check_graph(plain, graph, z, args, name)
    for one in range(len(graph.groups)):
        z = [torch.full((group.units,), float(at != one)).double() for at, group in enumerate(graph.groups)]
        unit_oracle.check_graph(plain, graph, z, args, f"{name}, {graph.groups[one].name}")


LAYERED = ["hand_attention", "grouped_queries", "fused_attention", "glu", "resnet", "mixer", "tied"]


def layered(name, **options):
    model, plain, graph, args = gated(name, layers=True, **options)
    layers = model.l0_units.l0_layers
    generator = torch.Generator().manual_seed(3)
    values = torch.where(torch.rand(layers.n, generator=generator) < 0.4, -40.0, 0.3)
    values[0], values[-1] = 0.7, -40.0
    layers.log_alpha.data.copy_(values)
    return model, plain, graph, args


@pytest.mark.parametrize("name", LAYERED)
def test_gates_of_layers(name):
    case = layered(name)
    for pattern in ("open", "fractional", "mixed", "one unit open"):
        check(case, pattern, True)
    check(case, "mixed", False)
    model, _, graph, args = case
    gates = model.l0_units
    unit_oracle.set_gates(graph, model, "mixed")
    model.eval()
    z_layers = gates.l0_layers().z
    drawn = gates.now().z
    assert drawn.ne(0).any()
    wanted = [
        gate().z * (1 if at is None else z_layers[at])
        for gate, at in zip(gates.gates, gates.layered, strict=True)
    ]
    torch.testing.assert_close(drawn[:-1], torch.cat(wanted))
    small = l0.nn.export(model)
    for mine, other in zip(*map(unit_oracle.tensors_of, (small(*args), model(*args))), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERED)
def test_gates_of_layers_dense_with_zeros(name, static):
    case = layered(name)
    for pattern, train in (("open", True), ("mixed", True), ("half", False)):
        check(case, pattern, train)


@pytest.mark.parametrize("name", LAYERED)
def test_counts_of_gates_of_layers(name):
    model, plain, graph, _ = layered(name)
    unit_oracle.set_gates(graph, model, "fractional")
    gates = model.l0_units
    p = {gate: gate.dist.p_open(gate.log_alpha.double()) for gate in l0.nn.gate_modules(model)}
    of = dict(
        zip((group.name for group in gates.groups), zip(gates.gates, gates.layered, strict=True), strict=True)
    )
    sides = {}
    for group in gates.groups:
        gate, at = of[group.name]
        own = p[gate] if at is None else p[gate] * p[gates.l0_layers][at]
        for member in group.members:
            along = sides.setdefault(member.name, {}).setdefault(member.dim, {})
            along.update({int(i): (group.name, u, own[u]) for u, row in enumerate(member.index) for i in row})
    total = 0.0
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name not in sides:
            total += parameter.numel()
            continue
        for place in itertools.product(*map(range, parameter.shape)):
            met = {along[place[dim]] for dim, along in sides[parameter_name].items() if place[dim] in along}
            total += math.prod(
                float(value) for _, _, value in {(n, u): (n, u, v) for n, u, v in met}.values()
            )
    assert float(l0.nn.expected_l0(model)) == pytest.approx(total, rel=1e-9)
    found = cost_of(model, l0.nn.gate_modules(model))
    x = torch.cat([p[gate].detach() for gate in found.gates])
    assert float(l0.reference.budget.Terms(found.terms)(x)) == pytest.approx(total, rel=1e-9)


GROUPS = {
    "resnet": {"body.0.0": 4, "body.1.conv1": 4, "body.2.conv1": 6, "body.2.conv2": 6, "body.3.conv1": 6},
    "resnet_option_a": {
        "body.0.0": 4,
        "body.2.conv2": 2,
        "body.1.conv1": 4,
        "body.2.conv1": 6,
        "body.3.conv1": 6,
    },
    "mobilenet_v2": {"body.0.0": 4, "body.1.conv.0": 6, "body.2.conv.0": 8, "body.2.conv.6": 5},
    "densenet": {
        "body.0.0": 4,
        "body.1.convs.0": 3,
        "body.1.convs.1": 3,
        "body.4": 5,
        "body.6.convs.0": 2,
        "body.6.convs.1": 2,
    },
    "unet": {"down1.0": 4, "down2.0": 5, "bottom.0": 6, "up2": 5, "mix2.0": 5, "up1": 4, "mix1.0": 4},
    "convnext": {"body.0": 4, "body.2.up": 8, "body.4": 6, "body.5.up": 12},
    "mixer": {"patch": 4, "blocks.0.channels.0": 6, "blocks.1.channels.0": 6},
    "vgg": {"features.0": 4, "features.3": 5, "head.0": 6},
    "resnext": {"body.0.0": 4, "body.1.a": 3, "body.1.c": 8, "body.2.a": 3, "body.2.c": 8},
    "norms": {"0": 6, "3": 2, "6": 4, "8": 4},
    "glu": {"0": 5, "1.up": 6, "1.down": 5, "2.gate": 4},
    "tied": {"up": 9, "down": 6},
    "constants": {"conv": 4, "fc1": 5},
    "hand_attention": {"0": 8, "1.q": 2, "2.gate": 6},
    "grouped_queries": {"0": 8, "1.q": 2, "2.gate": 6},
    "enabled_gqa": {"0": 8, "1.q": 2},
    "fused_attention": {"first": 8, "second": 8, "fused.qkv": 3, "fused.kv": 3},
    "timm_attention": {"0": 8, "1.qkv": 3, "1.proj": 8},
    "cosine_attention": {"0": 8, "1.qkv": 2},
    "swin": {"0": 8, "1.qkv": 2, "2.reduction": 12, "3.qkv": 3},
    "swin_v2": {
        "0": 8,
        "1.places.0": 5,
        "1.places.2": 2,
        "2.reduction": 12,
        "3.places.0": 5,
        "3.places.2": 3,
    },
    "added_products": {"0": 8, "1.qkv": 2, "2.qkv": 4},
    "custom_activation": {"0": 6, "2": 5},
    "patches": {"cut": 8, "block.q": 2},
    "attention": {"embed": 8, "attention": 2, "up": 12},
    "encoder_layer": {"0": 8, "1.self_attn": 2, "1.linear1": 12},
    "several_attentions": {"first": 6, "second": 4, "cross": 2, "alone": 3},
    "pixel_shuffle": {"0": 4, "2": 2},
    "branches": {"a": 3, "a/2": 3, "a/3": 3},
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    model, args = unit_nets.NETS[name]()
    graph = l0.nn.unit_graph(model, *args)
    assert {group.name: group.units for group in graph.groups} == GROUPS[name]


PINNED = {
    "mixer": ("blocks.0.tokens.0.weight", 0, "over another dimension"),
    "projected": ("embed.weight", 1, "lstm in lstm"),
    "custom": ("b.weight", 0, "Cube in the model's forward, out of sight"),
    "parametrized": ("0.weight", 0, "linear in 2"),
    "branches": ("b.weight", 0, "mean in the model's forward"),
    "towers": ("towers.words.weight", 0, "output of the model"),
    "vgg": ("head.4.weight", 0, "log_softmax in the model's forward"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_is_not_gated_says_why(name):
    model, args = unit_nets.NETS[name]()
    graph = l0.nn.unit_graph(model, *args)
    tensor, dim, why = PINNED[name]
    found = [pin for pin in graph.pinned if (pin.name, pin.dim) == (tensor, dim)]
    assert why in found[0].why
    assert why in str(graph)


class TwoGroups(nn.Module):
    """A norm over the units of two layers."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(3, 4), nn.Linear(3, 4), norm, nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.norm(torch.cat((self.a(x), torch.relu(self.b(x))), 1)))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(1, 8), nn.GroupNorm(8, 8)], ids=str
)
@pytest.mark.parametrize("closed", ["a", "b"])
def test_a_norm_does_not_count_a_group_that_is_closed(norm, closed):
    model, x = TwoGroups(copy.deepcopy(norm)).double(), torch.randn(5, 3, dtype=torch.float64)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    assert {group.units for group in graph.groups} == {4}
    for group, gate in zip(graph.groups, model.l0_units.gates, strict=True):
        gate.log_alpha.data.fill_(-40.0 if group.name == closed else 0.3)
    for train in (True, False):
        unit_oracle.check(plain, model.train(train), graph, (x,), closed)


class Spread(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.var(0) + x.std(0, keepdim=True))


def test_a_variance_brings_no_warning(recwarn):
    model, x = Spread(), torch.randn(5, 3)
    l0.nn.gate_(model, x)
    model(x)
    assert not [str(one.message) for one in recwarn]


# ---- what is refused


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
    ((unit_nets.image(),), {"include": "conv9"}, "include must name a layer with units to gate, got 'conv9'"),
    (
        (unit_nets.image(),),
        {"exclude": ["conv9"]},
        r"exclude must name a layer with units to gate, got \['conv9'\]",
    ),
    ((unit_nets.image(),), {"exclude": ".*"}, "model must have units to gate, got none"),
    ((unit_nets.image(),), {"block": 0}, "block must be a positive int, got 0"),
    ((unit_nets.image(),), {"block": True}, "block must be a positive int, got True"),
    ((unit_nets.image(),), {"block": 1.5}, "block must be a positive int, got 1.5"),
    ((unit_nets.image(),), {"droprate_init": 2.0}, "droprate_init"),
    ((unit_nets.image(),), {"eval_mode": "mode"}, "eval_mode"),
    ((unit_nets.image(),), {"lam": -1.0}, "lam"),
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
    model, args = unit_nets.Custom(in_eval=False).double(), (unit_nets.rows(3, 4),)
    graph = l0.nn.gate_(model, *args)
    assert {group.name for group in graph.groups} == {"a", "b"}
    unit_oracle.set_gates(graph, model, "half")
    with pytest.raises(RuntimeError, match=r"Cube\.apply must not get or make gated units, got some"):
        model(*args)


# ---- options


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


# ---- the model among others


def test_hooks_see_all_units():
    model, plain, graph, args = gated("resnet")
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    z = [*model.l0_units._draw().z[:-1].split([group.units for group in graph.groups])]
    oracle = unit_oracle.Oracle(plain.eval(), graph, [v.detach().double() for v in z])
    seen, expected = {}, {}
    for net, found in ((model, seen), (oracle.model, expected)):
        for name in ("body.1.conv1", "body.1.bn1", "body.2.conv2"):
            net.get_submodule(name).register_forward_hook(
                lambda module, args, out, found=found, name=name: found.update({name: (out.shape, out + 0)})
            )
    model(*args), oracle.model(*args)
    for name, (shape, value) in expected.items():
        assert seen[name][0] == shape
        torch.testing.assert_close(seen[name][1] + torch.zeros(shape).double(), value)
        assert seen[name][1].tolist() == seen[name][1].detach().numpy().tolist()


def test_hooks_may_change_what_passes():
    model, plain, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, model, "half")
    z = [*model.eval().l0_units._draw().z[:-1].split([group.units for group in graph.groups])]
    oracle = unit_oracle.Oracle(plain.eval(), graph, [v.detach().double() for v in z]).model
    for net in (model, oracle):
        net.features[0].register_forward_hook(lambda module, args, out: out.flip(-1) * 2)
        net.head[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,), prepend=True)
    torch.testing.assert_close(model(*args), oracle(*args))


def test_gradients_of_activations():
    """retain_grad and hooks of tensors tell the gradients of all units."""
    model, plain, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, model, "half")
    z = [*model.eval().l0_units._draw().z[:-1].split([group.units for group in graph.groups])]
    oracle = unit_oracle.Oracle(plain.eval(), graph, [v.detach().double() for v in z]).model
    found = []
    for net in (model, oracle):
        kept = []

        def keep(module, args, out, kept=kept):
            out.retain_grad()
            kept.append(out)
            out.register_hook(lambda grad: kept.append(grad) or 2 * grad)

        net.features[3].register_forward_hook(keep)
        unit_oracle.loss_of(net(*args)).backward()
        found.append([kept[0].grad + 0, kept[1], net.features[0].weight.grad])
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
    torch.testing.assert_close(found[0][1] * (found[1][1] != 0), found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.seen = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2), None

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        self.seen = self.b(hidden)
        return Result(self.c(self.seen), hidden)


def test_results_of_classes_of_their_own():
    model = Returns()
    graph = l0.nn.gate_(model, torch.randn(2, 4))
    assert [group.name for group in graph.groups] == ["b"]
    unit_oracle.set_gates(graph, model, "half")
    result = model.eval()(torch.randn(2, 4))
    assert type(result.hidden) is type(result.logits) is torch.Tensor
    assert model.seen.shape == (2, 6)  # what it keeps is seen with all units
    assert (model.seen + 0).sum(0).ne(0).tolist() == (model.l0_units.gates[0].log_alpha > 0).tolist()


class Changes(nn.Module):
    """Views that share their memory with what changes in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Linear(16, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.a(x)
        flat = x.flatten(1)
        x += x.mean((2, 3), keepdim=True)
        x[:, :, 0] = 2.0
        x[..., -1] = x[..., 0].clone()
        return self.b(flat) + self.c(x).amax((2, 3))


@pytest.mark.parametrize("pattern", ["half", "closed", "open"])
def test_views_of_what_changes(pattern):
    torch.manual_seed(0)
    model, args = Changes().double(), (unit_nets.image(1, 4),)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, *args)
    for train in (True, False):
        check((model, plain, graph, args), pattern, train)


def test_threads_have_draws_of_their_own():
    model, _, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, model, "mixed")
    model.eval()
    expected, found = model(*args), []

    def work():
        with torch.no_grad():
            found.extend(torch.equal(model(*args), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


class Calls(nn.Module):
    """A gated model in another one, which calls it within its own forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(3, 2).double()

    def forward(self, x):
        return self.out(self.inner(x) + self.inner(x.flip(0)))


def test_a_gated_model_in_another():
    inner, plain, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, inner, "half")
    outer = Calls(inner).eval()
    z = [*inner.l0_units._draw().z[:-1].split([group.units for group in graph.groups])]
    other = unit_oracle.Oracle(plain.eval(), graph, [v.detach().double() for v in z]).model
    torch.testing.assert_close(outer(*args), outer.out(other(*args) + other(args[0].flip(0))))


def test_a_forward_that_fails_leaves_no_draw():
    model, _, _, args = gated("vgg")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 3, 3).double())
    assert model.l0_units._stack() == []
    model(*args)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*args)
    assert model.l0_units._stack() == []
    handle.remove()


@pytest.mark.parametrize("name", ["vgg", "convnext", "densenet", "encoder_layer", "encoder"])
def test_without_gradients(name):
    model, _, graph, args = gated(name)
    unit_oracle.set_gates(graph, model, "mixed")
    model.eval()
    expected = model(*args)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(*args), expected)
    model.train()
    with torch.no_grad():
        model(*args)


@pytest.mark.parametrize("name", ["vgg", "convnext", "resnet", "glu"])
def test_autocast(name):
    model, plain, graph, args = gated(name)
    model, plain, args = model.float(), plain.float(), tuple(arg.float() for arg in args)
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    z = [*model.l0_units._draw().z[:-1].split([group.units for group in graph.groups])]
    oracle = unit_oracle.Oracle(plain.eval().double(), graph, [v.detach().double() for v in z]).model
    expected = oracle(*(arg.double() for arg in args))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*args)
    scale = expected.abs().max()
    torch.testing.assert_close(out.double() / scale, expected / scale, rtol=0, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_checkpoints_find_the_draw_of_their_forward():
    """Several forwards may come before one backward pass."""
    model, _, graph, _ = gated("checkpointed")
    unit_oracle.set_gates(graph, model, "mixed")
    found = []
    for training in (True, False):  # with checkpoints, without
        torch.manual_seed(3)
        model.zero_grad()
        model.train(training)
        model.l0_units.train()
        total = sum(unit_oracle.loss_of(model(unit_nets.rows(3, 4))) for _ in range(3))
        total.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_checkpoints_of_too_many_forwards_are_refused():
    model, _, graph, _ = gated("checkpointed")
    unit_oracle.set_gates(graph, model, "half")
    losses = [unit_oracle.loss_of(model(unit_nets.rows(3, 4))) for _ in range(9)]
    with pytest.raises(RuntimeError, match="must be computed again before 8 more forwards"):
        sum(losses).backward()


def test_a_checkpoint_around_the_model():
    found = []
    for checkpointed in (True, False):
        model, _, graph, args = gated("vgg")
        unit_oracle.set_gates(graph, model, "mixed")
        torch.manual_seed(1)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model, *args, use_reentrant=False)
        else:
            out = model(*args)
        unit_oracle.loss_of(out).backward()
        found.append([p.grad for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_copies_and_pickles():
    model, _, graph, args = gated("resnet")
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(*args), model(*args))
    unit_oracle.set_gates(graph, other, "closed")
    assert not torch.allclose(other(*args), model(*args))


# ---- where shapes may not depend on the gates


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


def test_whatever_the_default_device():
    """Tensors of indices are on the CPU, where the model is or not."""
    model, plain, graph, args = gated("attention")
    unit_oracle.set_gates(graph, model, "half")
    expected, other = model.eval()(*args), copy.deepcopy(plain)
    torch.set_default_device("meta")
    try:
        torch.testing.assert_close(l0.nn.export(model)(*args), expected)
        l0.nn.gate_(other, *args)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other.eval()(*args), expected)
        other.train()(*args).sum().backward()
        (l0.nn.penalty(other) + l0.nn.expected_flops(other, args[0])).backward()
    finally:
        torch.set_default_device(None)


def test_a_profiler_goes_on_behind_gate_():
    """cProfile's is no function, which sys.setprofile would take back."""
    seen, model = [], nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code.co_name))
    try:
        l0.nn.gate_(model, torch.randn(1, 3))
        seen.clear()
        model.train()
    finally:
        sys.setprofile(None)
    assert "train" in seen
    profiler = cProfile.Profile()
    with profiler:
        l0.nn.unit_graph(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(1, 3))
        torch.nn.functional.relu(torch.ones(1))
    assert any(name == "relu" for _, _, name in pstats.Stats(profiler).stats)


def test_export():
    model, _, graph, args = gated("vgg")
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    exported = torch.export.export(model, args)
    torch.testing.assert_close(exported.module()(*args), model(*args))


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compile(train):
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()
    args = (unit_nets.image(1),)
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


class Decoder(nn.Module):
    """Attends to what it has been given so far, which it keeps."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, kept=None):
        q, k, v = (f(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (
            torch.cat((old, new), -2)
            for old, new in zip(kept or (torch.tensor([], dtype=x.dtype),) * 2, (k, v), strict=True)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), [k, v]


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.cache = Decoder(), None

    def forward(self, x):
        y, self.cache = self.decoder(x, self.cache)
        return y


@pytest.mark.parametrize("changes", [False, True], ids=["same gates", "other gates"])
def test_heads_of_forwards_before(changes, monkeypatch):
    model = Caching().double().eval()
    l0.nn.gate_(model, torch.randn(1, 3, 8, dtype=torch.float64))
    (gate,) = l0.nn.gate_modules(model)
    fell = []
    on_dense = narrow._on_dense
    monkeypatch.setattr(narrow, "_on_dense", lambda func, *rest: fell.append(func) or on_dense(func, *rest))
    model.cache, parts = None, torch.randn(2, 4, 8, dtype=torch.float64).split([2, 1, 1], 1)
    found = []
    for at, part in enumerate(parts):
        closed = changes and at == 1
        gate.log_alpha.data.copy_(torch.tensor([9.0, -9.0] if not closed else [-9.0, 9.0]))
        found.append(model(part))
    assert bool(fell) == changes
    z, keys, values = torch.tensor([1.0, 0.0]), [], []
    decoder = model.decoder
    for at, part in enumerate(parts):
        z = torch.tensor([1.0, 0.0] if not (changes and at == 1) else [0.0, 1.0], dtype=torch.float64)
        q, k, v = (
            F.linear(part, f.weight, f.bias).view(2, -1, 2, 4).transpose(1, 2)
            for f in (decoder.q, decoder.k, decoder.v)
        )
        keys.append(k * z[:, None, None])
        values.append(v * z[:, None, None])
        y = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2)) * z[:, None, None]
        y = F.linear(y.transpose(1, 2).flatten(2), decoder.o.weight, decoder.o.bias)
        torch.testing.assert_close(found[at], y)


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
