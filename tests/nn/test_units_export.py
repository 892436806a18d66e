"""The export of a model that gate_ has gated."""

import copy
import pickle

import pytest
import torch
import unit_nets
from export_nets import IMAGES, NETS, assert_same, gated, is_plain, set_gates
from torch import nn
from torch.nn import functional as F
from unit_nets_attention import OffsetRMSNorm, OwnRMSNorm
from unit_nets_images import ChannelsLayerNorm, LayerNorm2d

import l0kernels as l0
from l0kernels.nn.units.place import groups_of

pytestmark = pytest.mark.filterwarnings("ignore:export has left the closed units:UserWarning")


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_a_width_that_gives_heads_their_size_goes_with_them(name, seed):
    """A forward divides one by the other: both keep the same share."""
    net, args = unit_nets.NETS[name]()
    graph = l0.nn.gate_(net, *args)
    net.eval()
    generator = torch.Generator().manual_seed(seed)
    for gate in groups_of(net).gates:
        gate.log_alpha.data.copy_(torch.where(torch.rand(gate.n, generator=generator) < 0.4, 9.0, -9.0))
    n_open = [int(gate.eval_gates().count[0]) for gate in groups_of(net).gates]
    small = l0.nn.export(net)
    torch.testing.assert_close(small(*args), net(*args), rtol=1e-12, atol=1e-12)
    by_name = dict(zip((group.name for group in graph.groups), n_open, strict=True))
    for width, block in (("0", 1), ("2.reduction", 3)):
        heads = f"{block}.qkv" if name == "swin" else f"{block}.places.2"
        kept = max(-(-by_name[width] // 4), by_name[heads], 1)
        attention = small[block]
        assert (attention.num_heads, attention.proj.in_features) == (kept, 4 * kept)
        assert (attention.qkv.in_features, attention.qkv.out_features) == (4 * kept, 12 * kept)
    assert l0.nn.eval_flops(small, args[0]) > 0


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_flops_of_lent_weights(name):
    net, (x,) = unit_nets.NETS[name]()
    dense = l0.nn.eval_flops(net, x)
    l0.nn.gate_(net, x)
    for gate in groups_of(net).gates:
        gate.log_alpha.data.fill_(9.0)
    assert l0.nn.eval_flops(net.eval(), x) == l0.nn.eval_flops(l0.nn.export(net), x) == dense
    one = groups_of(net).gates[0]
    one.log_alpha.data[:4] = -9.0
    stem, attention, merging = 2 * 3 + 1, 2 * 8 * 3 + 2 * 8 + 1, 2 * 12
    assert dense - l0.nn.eval_flops(net, x) == 4 * 2 * 4 * 6 * (stem + attention + merging)


class ByBmm(nn.Module):
    """Examples and heads in one dimension, as in fairseq."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 2
        self.first, self.qkv = nn.Linear(3, 8), nn.Linear(8, 24)
        self.out, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x, (n, length) = self.first(x), x.shape[:2]
        q, k, v = (
            t.reshape(n, length, self.num_heads, self.head_dim).transpose(1, 2).flatten(0, 1)
            for t in self.qkv(x).chunk(3, -1)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        y = y.view(n, self.num_heads, length, self.head_dim).transpose(1, 2).flatten(2)
        return self.last(x + self.out(y))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_open", [1, 2, 4])
def test_heads_beside_examples_go(n, n_open):
    model, x = ByBmm().double(), torch.randn(n, 5, 3, dtype=torch.float64)
    graph = l0.nn.gate_(model, x, kinds=["heads"])
    assert [group.units for group in graph.groups] == [4]
    (gate,) = groups_of(model).gates
    gate.log_alpha.data.copy_(torch.where(torch.arange(4) < n_open, 9.0, -9.0))
    small = l0.nn.export(model.eval())
    assert (small.num_heads, small.out.in_features) == (n_open, 2 * n_open)
    for other in (1, 2, 5):
        x = torch.randn(other, 7, 3, dtype=torch.float64)
        assert_same(small(x), model(x))
        assert l0.nn.eval_flops(model, x) == l0.nn.eval_flops(small, x)


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


class Weights(nn.Module):
    """It reads what attention attends to, and a view of its cannot be of no units."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        up = self.up(x)
        x = x + self.down(up.view(len(x), -1, up.shape[-1]))
        y, weights = self.attention(x, x, x)
        return y + weights.sum(-1, keepdim=True)


def test_weights_of_a_closed_head_that_stays_are_zero():
    model, x = Weights().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    l0.nn.gate_(model, x)
    for gate in groups_of(model).gates:
        gate.log_alpha.data.fill_(-9.0)
    small = l0.nn.export(model.eval())
    assert (small.up.out_features, small.attention.num_heads) == (1, 1)
    assert_same(small(x), model(x))


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
    with pytest.warns(UserWarning, match=f"has left the closed units of {whole.partition('.')[0]} in place"):
        small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert small.get_parameter(whole).shape == model.get_parameter(whole).shape
    assert small.get_parameter(narrow).shape[0] < model.get_parameter(narrow).shape[0]


class SizeBehindNorm(nn.Module):
    """A view knows how many features the first norm has; those of the other one may go."""

    def __init__(self, norm, images=False):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), norm, nn.Linear(8, 8)
        self.free, self.c = nn.LayerNorm(8), nn.Linear(8, 2)
        self.images = images

    def forward(self, x):
        x = self.a(x)
        x = self.norm(x[:, :, None, None]).flatten(1) if self.images else self.norm(x)
        return self.c(self.free(self.b(x.view(-1, 8))))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        OwnRMSNorm(8),
        OffsetRMSNorm(8),
        ChannelsLayerNorm(8, "channels_last"),
        ChannelsLayerNorm(8, "channels_first"),
        LayerNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(4, 8, affine=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("closed", [0.5, 0.1, 0.99])
def test_norms_of_units_that_stay_whole_are_over_the_open_ones(norm, closed):
    images = isinstance(norm, LayerNorm2d) or getattr(norm, "data_format", "") == "channels_first"
    model, x = SizeBehindNorm(copy.deepcopy(norm), images).double(), torch.randn(3, 4, dtype=torch.float64)
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
    with pytest.warns(UserWarning, match="has left the closed units of a in place, as zeros"):
        small = l0.nn.export(model)
    assert_same(small(x), model(x))
    assert small.a.out_features == 8
    assert small.b.out_features < 8
    of_libraries = dict.fromkeys((OwnRMSNorm, OffsetRMSNorm), nn.RMSNorm)
    of_libraries |= dict.fromkeys((ChannelsLayerNorm, LayerNorm2d), nn.LayerNorm)
    assert isinstance(small.norm, of_libraries.get(type(norm), type(norm)))
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


@pytest.mark.parametrize("bias", [False, True])
def test_units_made_and_read_by_one_weight_go(bias):
    """They are not the model's inputs, which stay whole."""
    model, (x,) = unit_nets.NETS["tied_convs"]()
    if bias:
        model.encode.bias = nn.Parameter(torch.randn(5).double())
    l0.nn.gate_(model, x)
    model.l0_units.gates[0].log_alpha.data.copy_(torch.tensor([-40.0, 40.0, 40.0, -40.0, -40.0]))
    small = l0.nn.export(model.eval())
    assert small.encode.weight is small.decode.weight
    assert small.decode.weight.shape == (2, 2, 3, 3)
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
