"""What happens to a model that gate_ has gated besides its training: export, counts, penalty, copies."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
import unit_nets
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels.nn.units.place import GatedUnits, groups_of


class BasicBlock(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.project = None
        if n_in != n_out:
            self.project = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.project is None else self.project(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1)
        return self.fc(torch.flatten(x, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.down, self.up = nn.Conv2d(n, hidden, 1), nn.Conv2d(hidden, n, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            SqueezeExcite(hidden, 4),
            nn.Conv2d(hidden, n, 1, bias=False),
            nn.BatchNorm2d(n),
        )

    def forward(self, x):
        return x + self.body(x)


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.ModuleList([InvertedResidual(6, 10), InvertedResidual(6, 9)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    """Layer norms over a residual stream, a scale of each branch, an embedding that is tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.up = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.scale = nn.Parameter(torch.randn(8))
        self.last = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words) + self.places
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x)))) * self.scale
        return self.head(self.last(x))


class Dense(nn.Module):
    """Concatenations, of which the last is flattened."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.GroupNorm(11, 11)])
        self.layers = nn.ModuleList([nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(11, 4, 3, padding=1)])
        self.act = nn.PReLU(11)
        self.fc = nn.Linear(15 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.layers[0](F.relu(self.norms[0](x)))], 1)
        x = torch.cat([x, self.layers[1](self.act(self.norms[1](x)))], 1)
        return self.fc(F.adaptive_max_pool2d(x, 2).flatten(1))


class Hourglass(nn.Module):
    """Transposed, grouped and 1-d convolutions, group and instance norms, halves of one layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(2, 8, 4, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose1d(12, 6, 4, 2, 1)
        self.bare = nn.InstanceNorm1d(6)
        self.both = nn.Conv1d(6, 8, 1)
        self.ends = nn.ModuleList([nn.Conv1d(4, 2, 1), nn.Conv1d(4, 2, 1)])

    def forward(self, x):
        x = self.grouped(F.relu(self.norm(self.down(x))))
        a, b = self.both(self.bare(self.up(x))).chunk(2, 1)
        return self.ends[0](F.relu(a)) + self.ends[1](F.silu(b))


class Loop(nn.Module):
    """A convolution whose rows and columns are the same units, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (
            nn.Conv2d(2, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = x + F.relu(self.again(x))
        return self.last(x)


class Tagger(nn.Module):
    """A stack of both directions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(14, 3)
        self.lstm = nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.last(F.relu(self.lstm(self.first(x))[0]))


class Reader(nn.Module):
    """A cell in a loop, its first state learned; what it has read is read again."""

    def __init__(self):
        super().__init__()
        self.cell, self.start = nn.GRUCell(4, 8), nn.Parameter(torch.randn(8))
        self.rnn, self.last = nn.RNN(8, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        states = [self.start.expand(len(x), -1)]
        for t in range(x.shape[1]):
            states.append(self.cell(x[:, t], states[-1]))
        return self.last(self.rnn(torch.stack(states))[1][-1])


def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


IMAGES = torch.Size((2, 3, 8, 8))
NETS = {
    "mlp": (mlp, torch.Size((4, 6))),
    "resnet": (ResNet, IMAGES),
    "mobile": (Mobile, IMAGES),
    "mixer": (Mixer, None),
    "dense": (Dense, IMAGES),
    "hourglass": (Hourglass, torch.Size((2, 2, 12))),
    "loop": (Loop, torch.Size((2, 2, 6, 6))),
    "tagger": (Tagger, torch.Size((3, 5, 4))),
    "reader": (Reader, torch.Size((3, 5, 4))),
}


def example(name):
    shape = NETS[name][1]
    return torch.randint(0, 11, (3, 5)) if shape is None else torch.randn(shape)


def set_gates(model, seed=0, closed=0.4):
    """Open, closed and fractional gates, one at least open of each group."""
    generator = torch.Generator().manual_seed(seed)
    for gate in groups_of(model).gates:
        n = gate.log_alpha.shape
        kind = torch.rand(n, generator=generator)
        fractional = torch.rand(n, generator=generator) * 3 - 1.5
        value = torch.where(kind < closed, -10.0, torch.where(kind < 0.7, 10.0, fractional))
        value[0] = 1.0
        gate.log_alpha.data.copy_(value)


def liven(model):
    """Statistics and norms that are not those of a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            nn.init.normal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)


def gated(name, seed=0, closed=0.4, **options):
    torch.manual_seed(seed)
    model, x = NETS[name][0](), example(name)
    liven(model)
    l0.nn.gate_(model, x, **options)
    set_gates(model, seed, closed)
    return model.eval(), x


def assert_same(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def is_plain(model):
    return not any(isinstance(m, GatedUnits | l0.nn.HardConcreteGate) for m in model.modules())


# ---- export


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_export_equals_eval(name, seed):
    model, x = gated(name, seed)
    small = l0.nn.export(model)
    assert is_plain(small)
    assert groups_of(small) is None
    assert_same(small(x), model(x))
    assert [(n, type(m)) for n, m in small.named_modules()] == [
        (n, type(m)) for n, m in NETS[name][0]().named_modules()
    ]
    assert not any("_l0" in key for m in small.modules() for key in m.__dict__)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


@pytest.mark.parametrize("name", NETS)
def test_export_is_as_small_as_counted(name):
    model, x = gated(name, closed=0.6)
    small = l0.nn.export(model)
    wanted = sum(p.numel() for p in small.parameters())
    if name == "mixer":  # the tied weight has become two: the head's is multiplied by z
        wanted -= small.head.weight.numel()
    assert l0.nn.eval_l0(model) == wanted < sum(p.numel() for p in NETS[name][0]().parameters())
    shape = x if name == "mixer" else x.shape
    assert l0.nn.eval_flops(model, shape) == l0.nn.eval_flops(small, shape) > 0


@pytest.mark.parametrize("name", NETS)
def test_layers_say_their_sizes(name):
    """A layer made anew from what the exported one says of itself takes its state."""
    model, _ = gated(name, closed=0.6)
    small = l0.nn.export(model)
    for module in small.modules():
        if not list(module.children()) and list(module.parameters(recurse=False)):
            options = {key: getattr(module, key) for key in ("num_groups",) if hasattr(module, key)}
            if isinstance(module, nn.Linear):
                new = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d):
                new = type(module)(
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size,
                    groups=module.groups,
                    bias=module.bias is not None,
                )
            elif isinstance(module, nn.BatchNorm2d):
                new = nn.BatchNorm2d(module.num_features)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                new = type(module)(module.normalized_shape)
            elif isinstance(module, nn.GroupNorm):
                new = nn.GroupNorm(options["num_groups"], module.num_channels)
            elif isinstance(module, nn.Embedding):
                new = nn.Embedding(module.num_embeddings, module.embedding_dim)
            elif isinstance(module, nn.LSTM):
                new = nn.LSTM(module.input_size, module.hidden_size, 2, batch_first=True, bidirectional=True)
            elif isinstance(module, nn.RNN | nn.GRUCell):
                new = type(module)(module.input_size, module.hidden_size, bias=module.bias)
            elif isinstance(module, nn.PReLU):
                new = nn.PReLU(module.num_parameters)
            else:
                continue
            new.load_state_dict(module.state_dict())
    if name == "tagger":
        assert small.lstm.input_size == small.first.out_features < 6
        assert 2 * small.lstm.hidden_size == small.last.in_features < 14
    if name == "hourglass":
        assert small.bare.num_features == small.up.out_channels < 6
        assert small.grouped.groups * 3 == small.grouped.out_channels == small.up.in_channels


@pytest.mark.parametrize("name", NETS)
def test_export_leaves_the_model_alone(name):
    model, x = gated(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    small = l0.nn.export(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not small.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert not any(t.data_ptr() in ours for t in (*small.parameters(), *small.buffers()))
    model.eval()
    assert_same(small(x), model(x))


@pytest.mark.parametrize("name", NETS)
def test_exported_models_train_and_pickle(name):
    model, x = gated(name)
    small = l0.nn.export(model)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again(x), small(x))
    small.train()
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    torch.optim.SGD(small.parameters(), 1e-3).step()


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_exported_models_script_and_export(name):
    model, x = gated(name)
    small = l0.nn.export(model)
    assert_same(torch.jit.script(small)(x), small(x))
    assert_same(torch.export.export(small, (x,)).module()(x), small(x))


@pytest.mark.parametrize("name", NETS)
def test_multiple_of(name):
    model, x = gated(name, closed=0.6)
    small = l0.nn.export(model, multiple_of=4)
    assert_same(small(x), model(x))
    for group in groups_of(model).groups:
        member = next(m for m in group.members if m.role == "out")
        kept = small.get_parameter(member.name).shape[member.dim]
        if name in ("mlp", "resnet", "loop"):
            assert kept % 4 == 0 or kept == group.units
    one = l0.nn.export(model, multiple_of=1)
    assert [p.shape for p in one.parameters()] == [p.shape for p in l0.nn.export(model).parameters()]


def test_multiple_of_keeps_the_likeliest():
    model, x = gated("mlp")
    gate = groups_of(model).gates[0]
    gate.log_alpha.data = torch.tensor([5.0, -4, -3, -9, 5, -8, -5, -7, 5, -6, -9, -9])
    small = l0.nn.export(model, multiple_of=4)
    assert small[0].out_features == 4
    assert torch.equal(
        small[0].weight,
        torch.where(torch.tensor([1.0, 0, 1, 1])[:, None] > 0, model[0].weight[[0, 2, 4, 8]], 0.0),
    )
    assert not small[2].weight[:, 1].any()
    assert_same(small(x), model(x))


@pytest.mark.parametrize("value", [0, -1, 2**31, True, 2.0, None])
def test_multiple_of_is_checked(value):
    model, _ = gated("mlp")
    with pytest.raises((ValueError, TypeError), match="multiple_of must be"):
        l0.nn.export(model, multiple_of=value)


def test_multiple_of_is_for_gated_models():
    with pytest.raises(ValueError, match="multiple_of must be 1 for a model that gate_ has not gated, got 8"):
        l0.nn.export(l0.nn.L0MLP([4, 5, 3]), multiple_of=8)


@pytest.mark.parametrize("name", NETS)
def test_a_group_without_open_units_keeps_one_where_a_convolution_needs_it(name):
    model, x = gated(name)
    for gate in groups_of(model).gates:
        before = gate.log_alpha.detach().clone()
        gate.log_alpha.data.fill_(-10)
        assert_same(l0.nn.export(model)(x), model(x))
        gate.log_alpha.data.copy_(before)
    for gate in groups_of(model).gates:
        gate.log_alpha.data.fill_(-10)
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert all(p.numel() for p in small.parameters()) == (name not in ("mlp", "mixer"))


ATTENTIONS = {
    "grouped_queries": ("1.q", 6),
    "enabled_gqa": ("1.q", 4),
    "fused_attention": ("fused.qkv", 4),
    "timm_attention": ("1.qkv", 4),
    "cosine_attention": ("1.qkv", 4),
}


@pytest.mark.parametrize("n_open", [0, 1])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_closed_heads_go(name, n_open):
    net, args = unit_nets.NETS[name]()
    graph = l0.nn.gate_(net, *args)
    net.eval()
    group, each = ATTENTIONS[name]
    for gate, of in zip(groups_of(net).gates, graph.groups, strict=True):
        gate.log_alpha.data.fill_(9.0)
        if of.name == group:
            assert of.kind == gate.kind == "heads"
            gate.log_alpha.data[n_open:] = -9.0
    small = l0.nn.export(net)
    torch.testing.assert_close(small(*args), net(*args), rtol=1e-12, atol=1e-12)
    queries = small.get_submodule(group)
    if name == "fused_attention":
        assert queries.nf == queries.weight.shape[1] == 3 * each * max(n_open, 1)  # Conv1D asks for one
    else:
        shared = {"grouped_queries": 2, "enabled_gqa": 3}.get(name, 3)
        n_open = max(n_open, name == "cosine_attention")  # whose scale may be asked for one
        assert queries.out_features == n_open * shared * each
        if name not in ("grouped_queries", "enabled_gqa"):
            assert (
                small[1].get_submodule({"timm_attention": "proj"}.get(name, "o")).in_features == n_open * each
            )
            return
        assert [small.get_submodule(f"1.{of}").out_features for of in "kv"] == [n_open * each] * 2
        assert small.get_submodule("1.o").in_features == n_open * shared * each
    if n_open:
        assert l0.nn.eval_l0(net) == sum(p.numel() for p in small.parameters())
        shapes = {"x" if at == 0 else "other": x for at, x in enumerate(args)}
        shapes = args[0] if len(args) == 1 else shapes
        assert l0.nn.eval_flops(net, shapes) == l0.nn.eval_flops(small, shapes)


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(2, 4)
        options = {"kdim": 4, "vdim": 4, "add_bias_kv": True, "add_zero_attn": True}
        self.cross, self.last = nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 2)

    def forward(self, x, other):
        x, y = self.first(x), torch.relu(self.second(other))
        return self.last(x + self.cross(x, y, y)[0])


@pytest.mark.parametrize("n_open", [0, 1, 2])
@pytest.mark.parametrize("name", ["attention", "encoder_layer", "cross"])
def test_closed_heads_of_multihead_attention_go(name, n_open):
    if name == "cross":
        net, args = Cross().double(), (torch.randn(5, 2, 3).double(), torch.randn(4, 2, 2).double())
    else:
        net, args = unit_nets.NETS[name]()
    l0.nn.gate_(net, *args)
    net.eval()
    for gate in groups_of(net).gates:
        gate.log_alpha.data.fill_(9.0)
        if gate.kind == "heads":
            gate.log_alpha.data[n_open:] = -9.0
    small = l0.nn.export(net)
    torch.testing.assert_close(small(*args), net(*args), rtol=1e-12, atol=1e-12)
    for part, before in zip(small.modules(), l0.nn.ungate_(copy.deepcopy(net)).modules(), strict=True):
        if isinstance(part, nn.MultiheadAttention):
            assert part.num_heads == min(n_open, before.num_heads)
            assert part.out_proj.weight.shape == (part.embed_dim, part.num_heads * part.head_dim)
            assert (type(part) is nn.MultiheadAttention) == (part.num_heads == before.num_heads)
    assert l0.nn.eval_l0(net) == sum(p.numel() for p in small.parameters())
    shapes = args[0] if len(args) == 1 else dict(zip(("x", "other"), args, strict=True))
    assert l0.nn.eval_flops(net, shapes) == l0.nn.eval_flops(small, shapes)
    dense = l0.nn.eval_flops(l0.nn.ungate_(copy.deepcopy(net)), shapes)
    assert (l0.nn.eval_flops(net, shapes) < dense) == (n_open < 2)
    small.train()(*args).sum().backward()
    copied = pickle.loads(pickle.dumps(small.eval()))
    torch.testing.assert_close(copied(*args), small(*args))


class MaskByHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x):
        y, n = self.first(x), len(x) * 4 * x.shape[1] ** 2
        mask = torch.linspace(-2, 2, n, dtype=x.dtype).view(-1, x.shape[1], x.shape[1])
        return self.last(y + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("closed", [[0], [1, 3], [0, 1, 2, 3]])
def test_masks_by_head_stay_those_of_all_heads(closed):
    model, x = MaskByHead().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    l0.nn.gate_(model, x, kinds=["heads"])
    (gate,) = groups_of(model).gates
    gate.log_alpha.data.fill_(9.0)
    gate.log_alpha.data[closed] = -9.0
    small = l0.nn.export(model.eval())
    assert small.attention.num_heads == 4 - len(closed)
    for n in (2, 3):
        x = torch.randn(n, 5, 3, dtype=torch.float64)
        assert_same(small(x), model(x))
    assert_same(copy.deepcopy(small)(x), model(x))


def test_flops_of_attention():
    net, (x,) = unit_nets.NETS["hand_attention"]()
    l0.nn.gate_(net, x, kinds=["heads"])
    (gate,) = groups_of(net).gates
    gate.log_alpha.data.copy_(torch.tensor([9.0, -9.0]))
    n, length = x.shape[:2]
    dense = l0.nn.eval_flops(l0.nn.ungate_(copy.deepcopy(net)), x)
    each = 2 * n * length * (3 * 8 * 4 + 4 * 8) + 2 * n * length * length * (4 + 4)
    assert dense - l0.nn.eval_flops(net, x) == each
    expected = l0.nn.expected_flops(net, x)
    p = gate.dist.p_open(gate.log_alpha.double()).sum()
    torch.testing.assert_close(expected, dense - each * (2 - p))
    cost = l0.nn.Budget(net, keep=0.9, cost="flops", steps=3, input_shape=x)
    assert cost.expected == pytest.approx((dense - each) / dense, abs=0.05)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2).view(-1, 24)
        return self.out(F.relu(self.fc(x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.c(F.relu(self.b(x * x.shape[-1] ** -0.5)))


@pytest.mark.parametrize(
    ("net", "shape", "whole", "narrow"),
    [
        (Views, IMAGES, "conv.weight", "fc.weight"),
        (Scaled, (3, 4), "a.weight", "b.weight"),
    ],
)
def test_groups_that_meet_a_size_in_a_forward_stay_whole(net, shape, whole, narrow):
    torch.manual_seed(0)
    model, x = net(), torch.randn(shape)
    l0.nn.gate_(model, x)
    set_gates(model)
    model.eval()
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert small.get_parameter(whole).shape == model.get_parameter(whole).shape
    assert small.get_parameter(narrow).shape[0] < model.get_parameter(narrow).shape[0]


class SizeBehindNorm(nn.Module):
    """A view knows how many features the first norm has; those of the other one may go."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), norm, nn.Linear(8, 8)
        self.free, self.c = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.free(self.b(self.norm(self.a(x)).view(-1, 8))))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        unit_nets.OwnRMSNorm(8),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(4, 8, affine=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("closed", [0.5, 0.1, 0.99])
def test_norms_of_units_that_stay_whole_are_over_the_open_ones(norm, closed):
    model, x = SizeBehindNorm(copy.deepcopy(norm)).double(), torch.randn(3, 4, dtype=torch.float64)
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    l0.nn.gate_(model, x)
    set_gates(model)
    gates = groups_of(model)
    gate = gates.gates[[group.name for group in gates.groups].index("a")]
    with torch.no_grad():
        gate.log_alpha.copy_(torch.linspace(0.5, 3, gate.n).double().flip(0))
        gone = min(max(1, int(closed * gate.n)), gate.n - 1)
        gate.log_alpha[:gone] = -10
    model.eval()
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert small.a.out_features == 8
    assert small.b.out_features < 8
    assert isinstance(small.norm, nn.RMSNorm if isinstance(norm, unit_nets.OwnRMSNorm) else type(norm))
    assert small.norm.opened.tolist() == [i for i in range(8) if i % gate.n >= gone]  # a unit in each group
    assert type(small.free) is nn.LayerNorm
    assert_same(pickle.loads(pickle.dumps(small))(x), model(x))
    assert_same(torch.export.export(small, (x,)).module()(x), model(x))


def test_inputs_stay_whole():
    model, x = gated("mlp", inputs=True)
    small = l0.nn.export(model)
    assert small[0].in_features == 6
    assert_same(small(x), model(x))


@pytest.mark.parametrize("name", ["mlp", "resnet", "mixer"])
def test_blocks_of_units(name):
    model, x = gated(name, block=4)
    assert_same(l0.nn.export(model)(x), model(x))
    small = l0.nn.export(model)
    tied = small.head.weight.numel() if name == "mixer" else 0
    assert l0.nn.eval_l0(model) == sum(p.numel() for p in small.parameters()) - tied
    units = l0.nn.open_units(model)
    assert [one.total for one in units.values()] == [-(-g.units // 4) for g in groups_of(model).groups]


def test_tied_weights_stay_tied_where_they_can():
    model, x = gated("mixer")
    for gate in groups_of(model).gates:
        gate.log_alpha.data = torch.where(gate.log_alpha > 0, 10.0, -10.0)
    small = l0.nn.export(model)
    assert small.head.weight is small.embed.weight
    assert_same(small(x), model(x))


def test_a_gated_model_within_another():
    inner, x = gated("resnet")
    outer = nn.Sequential(nn.Identity(), inner, nn.Linear(5, 2)).eval()
    small = l0.nn.export(outer)
    assert is_plain(small)
    assert_same(small(x), outer(x))
    assert l0.nn.eval_l0(outer) == sum(p.numel() for p in small.parameters())
    assert l0.nn.eval_flops(outer, IMAGES) == l0.nn.eval_flops(small, IMAGES)


def test_hand_gated_layers_beside():
    torch.manual_seed(0)
    inner, x = gated("resnet")
    outer = nn.Sequential(inner, l0.nn.L0MLP([5, 7, 2])).eval()
    for gate in l0.nn.gate_modules(outer[1]):
        gate.log_alpha.data = torch.randn(gate.n) * 3
    small = l0.nn.export(outer)
    assert is_plain(small)
    assert_same(small(x), outer(x))


def test_compiled_models_are_exported_as_what_they_compile():
    model, x = gated("mlp")
    assert_same(l0.nn.export(torch.compile(model, backend="eager"))(x), model(x))


def test_a_part_of_a_gated_model_is_refused():
    model, _ = gated("resnet")
    with pytest.raises(ValueError, match="model must have the gates of its layers, got 'conv1' of a model"):
        l0.nn.export(model.blocks[0])


def test_padding_modes_and_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
            self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular")
            self.c = nn.Conv2d(6, 2, 1)
            self.register_buffer("scale", torch.rand(6, 1, 1))

        def forward(self, x):
            return self.c(self.b(self.a(x) * self.scale))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(IMAGES)
    l0.nn.gate_(model, x)
    set_gates(model)
    model.eval()
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert len(small.scale) == small.a.out_channels < 6


# ---- counts and penalty


def element_openness(model, p_of):
    """P(open) of each element of each parameter that units touch, from the members of the groups alone."""
    gates = groups_of(model)
    units: dict[str, dict[int, dict[int, tuple[int, int]]]] = {}
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        for member in group.members:
            at = units.setdefault(member.name, {}).setdefault(member.dim, {})
            for unit, entries in enumerate(member.index.tolist()):
                for entry in entries:
                    at[entry] = (id(gate), unit // gates.block)
    p = {(id(gate), i): value for gate in gates.gates for i, value in enumerate(p_of(gate))}
    found = {}
    parameters = dict(model.named_parameters())
    for name, sides in units.items():
        if name not in parameters:
            continue
        shape = [n if dim in sides else 1 for dim, n in enumerate(parameters[name].shape)]
        values = []
        for place in itertools.product(*map(range, shape)):
            keys = {sides[dim][at] for dim, at in enumerate(place) if dim in sides and at in sides[dim]}
            values.append(
                torch.stack([p[key] for key in keys]).prod() if keys else torch.tensor(1.0).double()
            )
        found[name] = torch.stack(values).view(shape)
    return found


def p_open(gate):
    return gate.dist.p_open(gate.log_alpha).double()


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_expected_l0_is_the_sum_over_the_elements(name, block):
    model, _ = gated(name, block=block)
    openness = element_openness(model, p_open)
    wanted = sum(
        p.numel() if n not in openness else openness[n].expand(p.shape).sum()
        for n, p in model.named_parameters()
        if "l0_units" not in n
    )
    found = l0.nn.expected_l0(model)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    alphas = l0.nn.gate_parameters(model)
    ours, theirs = torch.autograd.grad(found, alphas), torch.autograd.grad(wanted, alphas)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_expected_flops_are_those_of_the_draws(name):
    """With gates that are open or closed for sure, what is expected is what is evaluated."""
    model, x = gated(name)
    for gate in groups_of(model).gates:
        gate.log_alpha.data = torch.where(gate.log_alpha > 0, 60.0, -60.0)
    shape = x if name == "mixer" else x.shape
    flops = l0.nn.eval_flops(model, shape)
    assert (
        round(l0.nn.expected_flops(model, shape).item())
        == flops
        == l0.nn.eval_flops(l0.nn.export(model), shape)
    )
    if name in ("mlp", "mixer"):
        assert l0.nn.eval_flops(model) == l0.nn.eval_flops(l0.nn.export(model))
    for gate in groups_of(model).gates:
        gate.log_alpha.data.fill_(60)
    l0.nn.ungate_(dense := copy.deepcopy(model))
    assert l0.nn.eval_flops(model, shape) == l0.nn.eval_flops(dense, shape)
    assert l0.nn.eval_l0(model) == sum(p.numel() for p in dense.parameters())


def test_expected_flops_have_a_gradient():
    model, x = gated("resnet")
    l0.nn.expected_flops(model, x.shape).backward()
    assert all(p.grad is not None and (p.grad >= 0).all() for p in l0.nn.gate_parameters(model))


def test_flops_of_three_dimensional_and_transposed_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv3d(2, 6, 3), nn.ConvTranspose3d(6, 5, 2, 2), nn.Conv3d(5, 2, 1)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    model, x = Net(), torch.randn(1, 2, 5, 5, 5)
    l0.nn.gate_(model, x)
    set_gates(model)
    model.eval()
    small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert l0.nn.eval_flops(model, x.shape) == l0.nn.eval_flops(small, x.shape)
    with pytest.raises(ValueError, match="input_shape must be given"):
        l0.nn.eval_flops(model)


def test_open_units_by_name():
    model, _ = gated("resnet")
    names = [group.name for group in groups_of(model).groups]
    found = l0.nn.open_units(model)
    assert list(found) == names
    assert list(found.values()) == [(int(gate().count[0]), gate.n) for gate in groups_of(model).gates]


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_penalty_is_the_sum_over_the_elements(name, block):
    model, _ = gated(name, block=block)
    model.double().train()
    for gate in groups_of(model).gates:
        gate.lam = 0.3
    openness = element_openness(model, p_open)
    parameters = dict(model.named_parameters())
    l2 = sum((p * parameters[n].square()).sum() for n, p in openness.items())
    size = 0.0
    for group, gate in zip(groups_of(model).groups, groups_of(model).gates, strict=True):
        size = size + group.parameters * p_open(gate).repeat_interleave(block)[: group.units].sum()
    wanted = 0.3 * size + 0.01 / 2 * l2
    found = l0.nn.penalty(model, weight_decay=0.01)
    torch.testing.assert_close(found, wanted)
    inputs = [p for n, p in parameters.items() if n in openness or "l0_units" in n]
    ours = torch.autograd.grad(found, inputs)
    theirs = torch.autograd.grad(wanted, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["resnet", "mixer"])
def test_penalty_in_single_precision_and_of_a_frozen_gate(name):
    model, _ = gated(name)
    groups_of(model).gates[0].freeze_()
    model.train()
    found = l0.nn.penalty(model, weight_decay=0.1)
    found.backward()
    openness = element_openness(
        model, lambda gate: (gate.eval_gates().z != 0).double() if gate.frozen else p_open(gate)
    )
    parameters = dict(model.named_parameters())
    l2 = sum((p * parameters[n].double().square()).sum() for n, p in openness.items())
    size = sum(
        gate.lam * group.parameters * p_open(gate).sum()
        for group, gate in zip(groups_of(model).groups, groups_of(model).gates, strict=True)
        if not gate.frozen
    )
    torch.testing.assert_close(found.double(), size + 0.05 * l2, rtol=1e-5, atol=0)


# ---- copies, state, helpers


@pytest.mark.covering(1)
@pytest.mark.parametrize("mode", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("name", NETS)
def test_copies(name, mode):
    model, x = gated(name)
    y = model(x)
    if mode == "deepcopy":
        again = copy.deepcopy(model)
    elif mode == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), y)
    for module in again.modules():
        if isinstance(module, GatedUnits):
            assert module._l0_units.groups is groups_of(again)
    # What it learns is its own.
    for gate in groups_of(again).gates:
        gate.log_alpha.data.fill_(10)
    assert torch.equal(model(x), y)
    assert not torch.equal(again(x), y)
    assert_same(l0.nn.export(again)(x), again(x))
    torch.manual_seed(5)
    again.train()(x).square().sum().backward()
    (l0.nn.penalty(again, weight_decay=0.1) / 10).backward()
    assert all(p.grad is not None for p in again.parameters())
    assert all(p.grad is None for p in model.parameters())
    l0.nn.ungate_(again)
    assert is_plain(again)


def test_a_copy_of_an_inner_layer():
    model, x = gated("resnet")
    block = copy.deepcopy(model.blocks[0])
    x = model.stem(x)
    assert torch.equal(block(x), model.blocks[0](x))
    model.blocks[0] = block  # its gates are those of the time of the copy
    assert model(example("resnet")).isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_state_dicts(name):
    model, x = gated(name)
    torch.manual_seed(9)
    dense = NETS[name][0]().eval()
    liven(dense)
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("l0_units.") for key in keys.missing_keys)
    other = NETS[name][0]()
    l0.nn.gate_(other, x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))
    keys = dense.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    before = dense(x)
    l0.nn.ungate_(other)
    assert torch.equal(other(x), before)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_dtypes(name, dtype):
    model, x = gated(name)
    y = model(x)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(p.dtype == wide for p in l0.nn.gate_parameters(model))
    small = l0.nn.export(model)
    assert all(p.dtype == dtype for p in small.parameters())
    assert_same(small(x).double(), model(x).double(), 1e-5 if dtype == torch.float64 else 0.1)
    assert_same(model(x).double(), y.double(), 1e-4 if dtype == torch.float64 else 0.2)


def test_meta_models_are_refused():
    model, _ = gated("mlp")
    with pytest.raises(ValueError, match="got gates on the meta device"):
        l0.nn.export(model.to("meta"))


@pytest.mark.parametrize("name", NETS)
def test_a_bank_draws_for_all_layers(name):
    model, x = gated(name, closed=0.2)
    model.train()
    bank = l0.nn.GateBank(model, seed=3)
    for module in model.modules():  # whose statistics would move
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    draw = bank.draw(expected=True)
    y = model(x)
    assert torch.equal(model(x), y)
    (y.square().sum()).backward()
    assert any(p.grad.any() for p in l0.nn.gate_parameters(model))
    assert set(draw.expected) == set(groups_of(model).gates)
    bank.draw()
    assert not torch.equal(model(x), y)
    with draw:
        assert torch.equal(model(x), y)
    again = l0.nn.GateBank(model, seed=3)
    again.draw()
    assert torch.equal(model(x), y)


def test_optimiser_helpers():
    model, x = gated("resnet")
    model.train()
    groups = l0.nn.parameter_groups(model, gate_lr=5.0, weight_decay=0.1, no_decay=lambda n, p: p.ndim < 2)
    assert [group["name"] for group in groups] == ["weights", "no_decay", "gates"]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[-1]["params"] == l0.nn.gate_parameters(model)
    optimizer = torch.optim.SGD(groups, 0.1)
    l0.nn.clamp_after_step(optimizer, model, limit=2.0)
    (model(x).square().mean() + l0.nn.penalty(model, weight_decay=0.1)).backward()
    optimizer.step()
    assert all(p.abs().max() <= 2 for p in l0.nn.gate_parameters(model))
    assert groups_of(l0.nn.ungate_(model)) is None


def test_hooks_see_the_gradients_of_all_units():
    model, x = gated("mixer", closed=0.5)
    model.double().train()
    l0.nn.GateBank(model, seed=3).draw()

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    before, seen = gradients(), []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    handles = [
        m.register_full_backward_hook(lambda m, gi, go: seen.append((m, go[0].shape[-1]))) for m in layers
    ]
    for a, b in zip(gradients(), before, strict=True):
        torch.testing.assert_close(a, b)
    assert set(seen) == {(m, m.out_features if isinstance(m, nn.Linear) else 8) for m in layers}
    for handle in handles:
        handle.remove()
    for a, b in zip(gradients(), before, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", [name for name in NETS if name != "mixer"])
def test_sharded(name, kept):
    """All blocks and layers with norms of their own sharded apart; the gates whole or sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, x = gated(name)
    wanted = l0.nn.penalty(alone, weight_decay=0.1)
    model = copy.deepcopy(alone)
    options = {"mesh": init_device_mesh("cpu", (1,))}
    if kept:
        options["ignored_params"] = l0.nn.keep_gates_whole(model)
    l0.nn.agree_on_gates(3)
    for module in model.modules():
        if isinstance(module, BasicBlock | InvertedResidual | nn.GroupNorm | nn.PReLU):
            fully_shard(module, **options)
    fully_shard(model, **options)
    assert_same(model(x), alone(x))
    torch.testing.assert_close(l0.nn.penalty(model, weight_decay=0.1), wanted)
    assert l0.nn.eval_l0(model) == l0.nn.eval_l0(alone)
    assert l0.nn.eval_flops(model, x.shape) == l0.nn.eval_flops(alone, x.shape)
    small = l0.nn.export(model)
    assert_same(small(x), alone(x))
    assert [p.shape for p in small.parameters()] == [p.shape for p in l0.nn.export(alone).parameters()]
    assert_same(model(x), alone(x))  # it is as it was
    model.train()
    (model(x).square().sum() + l0.nn.penalty(model, weight_decay=0.1)).backward()
    assert all(p.grad is not None for p in model.parameters())
