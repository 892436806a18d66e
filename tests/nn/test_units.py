"""gate_ and unit_graph on nets of every kind, against the oracle of unit_oracle."""

import copy

import pytest
import torch
import unit_nets
import unit_oracle
from torch import nn
from torch.nn import functional as F
from unit_cases import CHECKED, LAYERED, SERVED, check, gated, layered
from unit_examples import image

import l0kernels as l0
from l0kernels.impl import im2col
from l0kernels.nn.units import layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


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
    model, x = nn.Sequential(*body, nn.Conv2d(8, 4, 3)).double(), image(batch=1)
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
    model, x = ByName(BY_NAME[name]).double(), image(size=4)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    for pattern in ("half", "mixed", "closed"):
        check((model, plain, graph, (x,)), pattern, True)


def test_a_view_of_another_dtype_has_no_units():
    model = ByName(lambda x: x.view(torch.int64).view(dtype=torch.float64)).double()
    graph = l0.nn.unit_graph(nn.Sequential(nn.Conv2d(3, 3, 1).double(), model), image(size=4))
    assert [group.name for group in graph.groups] == ["0"]
    assert "view in 1" in str(graph)


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


GROUPS = {
    "distances": {"embed": 8, "qkv": 2},
    "generator": {"features.0": 6, "again": 5},
    "rotated_pairs": {"embed": 8, "qkv": 2},
    "graph": {"first.message": 6, "third": 5},
    "experts": {"stem": 6, "experts.0.0": 5, "experts.1.0": 5, "experts.2.0": 5},
    "pooled": {"key": 5, "value": 6},
    "sorted_rows": {"up": 6, "mid": 6},
    "halves": {"up": 6, "down": 5},
    "adjacency": {"layers.0": 6, "layers.1": 5, "layers.2": 6, "layers.3": 4, "layers.4": 5},
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


class Skips(nn.Module):
    """Inputs beside units, as in a NeRF: who reads both is given what exists of the units."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 6), nn.Linear(11, 6), nn.Linear(16, 2)
        self.widths = []

    def forward(self, x):
        h = torch.relu(self.first(x))
        both = torch.cat([x, h], -1)
        y = torch.relu(self.second(both))
        all_of_them = torch.cat([y, x.sin(), x.cos()], -1)
        self.widths.append(both._data.shape[-1] if hasattr(both, "_data") else both.shape[-1])
        return self.out(all_of_them)


def test_units_beside_what_has_none():
    model, x = Skips().double(), torch.randn(3, 4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    case = model, plain, l0.nn.gate_(model, x), (x,)
    for pattern in unit_oracle.PATTERNS:
        check(case, pattern, True)
        check(case, pattern, False)
    unit_oracle.set_gates(case[2], model, "one unit open")
    model.widths.clear()
    model(x)
    assert model.widths == [5 + 1]
