"""Forwards that look like what gate_ knows and are not: nothing may be gated that something else reads."""

import copy

import pytest
import torch
import unit_oracle
from torch import nn
from torch.nn import functional as F
from unit_nets_images import LayerNorm2d

import l0kernels as l0

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Attends(nn.Module):
    """Two heads of four features, `masks` makes four features of each position."""

    def __init__(self, attend):
        super().__init__()
        self.attend, self.calm = attend, False
        self.first, self.masks = nn.Linear(3, 8), nn.Linear(3, 4)
        self.q, self.k, self.v, self.one = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.whole = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out, self.of_masks, self.of_values = nn.Linear(8, 2), nn.Linear(4, 2), nn.Linear(8, 2)
        self.hidden, self.last = nn.Linear(2, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.last(F.relu(self.hidden(self.attend(self, self.first(x), x))))


def heads(x, n=2):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def joined(y):
    return y.transpose(1, 2).flatten(2)


def one_query(model, x, _):
    """Several heads of keys and values, one of queries."""
    v = model.v(x)
    y = F.scaled_dot_product_attention(heads(model.one(x), 1), heads(model.k(x)), heads(v))
    return model.out(joined(y)) + model.of_values(v)


def units_in_a_mask(model, x, given):
    """A layer's outputs are the positions of a mask."""
    mask = model.masks(given)
    q = heads(model.q(x))
    y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None])
    return model.out(joined(y)) + model.of_masks(mask)


def units_in_a_mask_of_one_head(model, x, given):
    mask, q = model.masks(given), model.q(x)[:, None]
    y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None])
    return model.out(y[:, 0]) + model.of_masks(mask)


def units_in_a_mask_of_a_module(model, x, given):
    """The second time what is known of the first does not hold."""
    mask = model.masks(given).repeat_interleave(2, 0)
    y = model.whole(x, x, x, need_weights=False)[0]
    other = model.whole(x, x, x, need_weights=False, attn_mask=mask)[0]
    return model.out(model.q(y)) + model.out(other)


def weights_read_elsewhere(model, x, _):
    y = model.whole(x, key=x, value=x, need_weights=False)[0]
    return model.out(y + F.linear(x, model.whole.in_proj_weight[:8]))


class Parametrized(nn.Module):
    """The weights of an attention are of other parameters."""

    def __init__(self, name):
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.hidden, self.last = nn.Linear(2, 5), nn.Linear(5, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        part = self.attention.out_proj if name == "weight" else self.attention
        nn.utils.parametrizations.weight_norm(part, name)

    def forward(self, x):
        x = self.first(x)
        y = self.out(self.attention(x, x, x, need_weights=False)[0])
        return self.last(F.relu(self.hidden(y)))


class Reversed(nn.Module):
    """Its hooks turn around what an attention reads and makes."""

    def __init__(self, before):
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        if before:
            self.attention.register_forward_pre_hook(lambda _, args: tuple(a.flip(-1) for a in args))
        else:
            self.attention.register_forward_hook(lambda _, __, out: (out[0].flip(-1), None))

    def forward(self, x):
        x = self.first(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0] + x)


class RMSNorm(nn.Module):
    """As libraries have it; `settings` has it be another function."""

    def __init__(self, **settings):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(rows(6)), 1e-6
        self.offset, self.in_training, self.limit = 0.0, 1.0, None
        vars(self).update(settings)

    def forward(self, hidden_states, gate=None):
        x = hidden_states if self.limit is None else hidden_states.clamp(-self.limit, self.limit)
        x = x if gate is None else x * F.silu(gate)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return y * (self.weight + self.offset) * (self.in_training if self.training else 1.0)


class Scaled(RMSNorm):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


Scaled.__name__ = "ScaledRMSNorm"


class EitherLayerNorm(nn.LayerNorm):
    """Of the channels of images, and of the last features of rows."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if x.ndim == 4 else super().forward(x)


class ShiftedLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + self.weight


def as_image(norms, a, b):
    """Units are the channels of an image that is as wide."""
    image = a.movedim(-1, 1).unsqueeze(-1) * torch.ones(6)
    return norms[0](image).sum(-1).movedim(1, -1) + norms[1](b)


class Conv1D(nn.Module):
    """As GPT-2 has it, but for `scale`."""

    def __init__(self, n_out, n_in, scale=1.0):
        super().__init__()
        self.nf, self.nx, self.scale = n_out, n_in, scale
        self.weight, self.bias = nn.Parameter(rows(n_in, n_out)), nn.Parameter(rows(n_out))

    def forward(self, x):
        return (x @ self.weight + self.bias) * self.scale


class OwnLinear(nn.Linear):
    """As Falcon has it, but for `scale`."""

    def __init__(self, *sizes, scale=1.0):
        super().__init__(*sizes)
        self.scale = scale

    def forward(self, x):
        return (x @ self.weight.T + self.bias) * self.scale


class Normed(nn.Module):
    """`normal`: (norms, a, b) -> what the last layer reads."""

    def __init__(self, normal, *norms):
        super().__init__()
        self.a, self.b, self.norms, self.out = (
            nn.Linear(3, 6),
            nn.Linear(3, 6),
            nn.ModuleList(norms),
            nn.Linear(6, 2),
        )
        self.hidden, self.last = nn.Linear(2, 5), nn.Linear(5, 1)
        self.normal = normal

    def forward(self, x):
        y = self.out(self.normal(self.norms, self.a(x), self.b(x)))
        return self.last(F.relu(self.hidden(y)))


def in_turn(norms, a, b):
    for norm in norms:
        a = norm(a)
    return a


def scaled():
    norm = Scaled()
    model = Normed(in_turn, Scaled(), norm)
    norm.scale.fill_(3.0)
    return model


def with_a_bias(model, x, bias):
    q, k, v = (heads(layer(x)) for layer in (model.q, model.k, model.v))
    return model.out(joined((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v))


def zeros_of_each_head(model, x, _):
    """As T5 has it for its cross-attention."""
    return with_a_bias(model, x, torch.zeros(1, 2, x.shape[1], x.shape[1], dtype=x.dtype))


def zeros_that_are_written_into(model, x, _):
    bias = torch.zeros(1, 2, x.shape[1], x.shape[1], dtype=x.dtype)
    bias.view(-1)[: bias.numel() // 2].fill_(0.0 if model.calm else 1.0)
    return with_a_bias(model, x, bias)


class OneByOne(torch.autograd.Function):
    """`across`: forward, backward, or neither, makes one element of others."""

    @staticmethod
    def forward(ctx, x, across):
        ctx.across = across
        ctx.save_for_backward(x)
        return x.exp() - x.exp().mean() if across == "forward" else x.exp()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = dy * x.exp()
        return dx.flip(-1) if ctx.across == "backward" else dx, None


class Activation(nn.Module):
    def __init__(self, across="none"):
        super().__init__()
        self.across = across

    def forward(self, x):
        if self.across == "training" and not self.training:
            return OneByOne.apply(x, "none")
        return OneByOne.apply(x, "forward" if self.across == "training" else self.across)


class Turned(Activation):
    def forward(self, x):
        return super().forward(x).flip(-1)


class Cold(Activation):
    def forward(self, x):
        return OneByOne.apply(x.abs().sqrt(), "none")


class Noisy(Activation):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


ACTIVATIONS = {
    "one by one": Activation,
    "forwards mix": lambda: Activation("forward"),
    "backwards mix": lambda: Activation("backward"),
    "training mixes": lambda: Activation("training"),
    "order changes": Turned,
    "zeros have no derivative": Cold,
    "noise": Noisy,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(name):
    model = nn.Sequential(nn.Linear(3, 6), ACTIVATIONS[name](), nn.Linear(6, 2)).double()
    graph = l0.nn.unit_graph(model, rows(4, 3))
    assert [group.name for group in graph.groups] == (["0"] if name == "one by one" else [])
    assert name == "one by one" or any("in 1" in pin.why for pin in graph.pinned)


class Given(nn.Module):
    """`give`: (model, x) -> what the last layer reads, of weights that no layer is called for."""

    def __init__(self, give):
        super().__init__()
        self.give = give
        self.first, self.mid, self.other = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.one, self.slopes = nn.Linear(6, 1), nn.Parameter(torch.randn(6))
        self.hidden, self.last = nn.Linear(6, 5), nn.Linear(5, 1)
        self.kept = [self.mid.weight]

    def forward(self, x):
        return self.last(F.relu(self.hidden(self.give(self, self.first(x)))))


GIVEN = {
    "weights lent": lambda m, x: F.linear(x, m.mid.weight, m.mid.bias),
    "weights lent by name": lambda m, x: F.linear(input=x, weight=m.mid.weight, bias=m.mid.bias),
    "weights lent without a bias": lambda m, x: F.linear(F.linear(x, m.mid.weight), m.mid.weight),
    "weights lent and layers called": lambda m, x: F.linear(x, m.mid.weight) + m.mid(m.other(x)),
    "weights lent with a bias of another": lambda m, x: F.linear(x, m.mid.weight, m.other.bias),
    "weights lent with a bias of no units": lambda m, x: F.linear(x, m.mid.weight, torch.arange(6).double()),
    "weights kept in a list": lambda m, x: F.linear(x, m.kept[0], m.mid.bias),
    "weights kept and lent": lambda m, x: F.linear(x, m.mid.weight) + F.linear(x, m.kept[0]),
    "weights taken from a layer": lambda m, x: F.linear(x, m.mid._parameters["weight"]),
    "parts of weights": lambda m, x: F.linear(x, m.mid.weight[:4], m.mid.bias[:4]) @ m.mid.weight[:4],
    "scaled weights": lambda m, x: F.linear(x, 2 * m.mid.weight),
    "weights in another product": lambda m, x: x @ m.mid.weight.T + F.linear(x, m.mid.weight),
    "weights of a layer as factors": lambda m, x: x * m.one.weight.exp() + m.one(x),
    "a bias turned around": lambda m, x: F.linear(x, m.mid.weight, m.mid.bias.clone().flip(0)),
    "a bias in part": lambda m, x: F.linear(
        x, m.mid.weight, torch.cat([m.mid.bias[:3].clone(), m.slopes[3:]])
    ),
    "slopes": lambda m, x: x * m.slopes.exp() + m.slopes.sigmoid().clone(),
    "slopes that sum to one": lambda m, x: x * m.slopes.exp().softmax(0),
    "slopes in order": lambda m, x: x * m.slopes.exp().sort().values,
}

NETS = {
    "zeros of each head": lambda: Attends(zeros_of_each_head),
    "zeros that are written into": lambda: Attends(zeros_that_are_written_into),
    **{name: lambda give=give: Given(give) for name, give in GIVEN.items()},
    "one query": lambda: Attends(one_query),
    "units in a mask": lambda: Attends(units_in_a_mask),
    "units in a mask of one head": lambda: Attends(units_in_a_mask_of_one_head),
    "units in a mask of a module": lambda: Attends(units_in_a_mask_of_a_module),
    "weights read elsewhere": lambda: Attends(weights_read_elsewhere),
    "parametrized queries": lambda: Parametrized("in_proj_weight"),
    "parametrized output": lambda: Parametrized("weight"),
    "hooks before": lambda: Reversed(True),
    "hooks behind": lambda: Reversed(False),
    "norms of other settings": lambda: Normed(in_turn, RMSNorm(), RMSNorm(offset=1.0)),
    "norms of other settings in training": lambda: Normed(in_turn, RMSNorm(), RMSNorm(in_training=2.0)),
    "norms that clip": lambda: Normed(in_turn, RMSNorm(limit=1.0), RMSNorm(limit=100.0)),
    "norms with buffers": scaled,
    "norms with gates": lambda: Normed(lambda norms, a, b: norms[0](a, b), RMSNorm()),
    "norms with gates by name": lambda: Normed(lambda norms, a, b: norms[0](a, gate=b), RMSNorm()),
    "norms by name": lambda: Normed(lambda norms, a, b: norms[0](hidden_states=a) + b, RMSNorm()),
    "norms of channels": lambda: Normed(as_image, LayerNorm2d(6), nn.LayerNorm(6)),
    "norms by rank": lambda: Normed(as_image, *(EitherLayerNorm(6) for _ in range(2))),
    "norms and a weight": lambda: Normed(in_turn, nn.LayerNorm(6), ShiftedLayerNorm(6)),
    "layers by name": lambda: Normed(lambda parts, a, b: parts[0](input=a), nn.Linear(6, 6)),
    "layers of other settings": lambda: Normed(in_turn, Conv1D(6, 6), Conv1D(6, 6, scale=2.0)),
    "linear layers of their own": lambda: Normed(in_turn, OwnLinear(6, 6), OwnLinear(6, 6, scale=2.0)),
}


@pytest.mark.parametrize("name", NETS)
def test_never_a_wrong_coupling(name, seeded):
    model, x = NETS[name]().double(), rows(2, 4, 3)
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, x)
    for train in (True, False):
        unit_oracle.set_gates(graph, model, "open")
        model.train(train), plain.train(train)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    for one in range(len(graph.groups)):
        z = [torch.full((g.units,), float(at != one)).double() for at, g in enumerate(graph.groups)]
        unit_oracle.check_graph(plain, graph, z, (x,), f"{name}, {graph.groups[one].name}")
    z = [(torch.rand(g.units, generator=generator) < 0.5).double() for g in graph.groups]
    unit_oracle.check_graph(plain, graph, z, (x,), name)
    for pattern in ("half", "one unit open", "closed"):
        unit_oracle.set_gates(graph, model, pattern)
        torch.testing.assert_close(l0.nn.export(model)(x), model(x))


LENT = (
    "weights lent",
    "weights lent by name",
    "weights lent without a bias",
    "weights lent and layers called",
)


@pytest.mark.parametrize("name", [name for name in GIVEN if "weights" in name])
def test_a_weight_is_lent_where_its_layer_is_asked_for_it(name):
    model, x = Given(GIVEN[name]).double(), rows(2, 4, 3)
    graph = l0.nn.unit_graph(model, x)
    members = {(member.name, member.dim) for group in graph.groups for member in group.members}
    assert (("mid.weight", 0) in members) == (name in (*LENT, "weights lent with a bias of another"))
    assert model.mid.weight is model._parameters.get("mid.weight", model.kept[0])


@pytest.mark.parametrize("name", [*LENT, "weights lent with a bias of another", "slopes"])
@pytest.mark.parametrize("way", ["open units alone", "dense"])
def test_lent_weights_compute_what_their_layers_do(name, way, monkeypatch, seeded):
    if way == "dense":
        monkeypatch.setattr(l0.nn.units.place.GateGroups, "_is_seen_by_functions", lambda *_: True)
    model, x = Given(GIVEN[name]).double(), rows(2, 4, 3)
    plain, keys = copy.deepcopy(model), [*model.state_dict()]
    graph = l0.nn.gate_(model, x)
    assert [key for key in model.state_dict() if not key.startswith("l0_units")] == keys
    for pattern in unit_oracle.PATTERNS:
        unit_oracle.set_gates(graph, model, pattern)
        unit_oracle.check(plain, model, graph, (x,), pattern)
    assert l0.nn.eval_flops(model.eval(), x) == l0.nn.eval_flops(l0.nn.export(model), x)
    l0.nn.ungate_(model)
    assert model.mid.weight is model._parameters.get("mid.weight", model.kept[0])


@pytest.mark.parametrize(
    ("attend", "kinds"), [(zeros_of_each_head, {"heads"}), (zeros_that_are_written_into, set())]
)
def test_a_bias_of_zeros_is_of_all_heads_alike(attend, kinds):
    model = Attends(attend).double()
    model.calm = True
    graph = l0.nn.unit_graph(model, rows(2, 4, 3))
    assert {group.kind for group in graph.groups} - {"units", "width"} == kinds
    with torch.inference_mode():
        l0.nn.unit_graph(model, rows(2, 4, 3))


class Adapted(OwnLinear):
    def forward(self, x, adapter=None):
        return super().forward(x) if adapter is None else super().forward(x) + adapter


def test_more_than_the_example_showed_is_refused():
    """What a layer computes of one tensor is known; None says nothing."""
    x = rows(2, 4, 3)
    given = {"nothing": [], "none": [None], "more": [torch.ones(6).double()]}
    net = Normed(lambda parts, a, b: parts[0](a, *given[net.what]) + b, Adapted(6, 6)).double()
    net.what = "nothing"
    unit_oracle.set_gates(l0.nn.gate_(net, x), net, "open")
    expected = net(x)
    net.what = "none"
    torch.testing.assert_close(net(x), expected)
    net.what = "more"
    with pytest.raises(TypeError, match="Adapted must be given one tensor, as in the example that gate_ ran"):
        net(x)


def test_a_trial_is_no_attention():
    """Whether a layer computes what its name says is found by running it, which is not the model's run."""
    net = nn.Sequential(Conv1D(5, 3), nn.ReLU(), Conv1D(2, 5)).double()
    assert l0.nn.unit_graph(net, rows(2, 3)).attentions == ()


class Slopes(nn.Module):
    """A bias of each head that is zero at the first position, for as many heads as the module says."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        slopes = 2.0 ** -torch.arange(self.num_heads, dtype=q.dtype).view(1, -1, 1, 1)
        mask = slopes * torch.arange(k.shape[-2])
        return self.out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def test_a_mask_of_one_position_may_be_of_each_head():
    graph = l0.nn.unit_graph(Slopes().double(), rows(2, 1, 5))
    assert graph.groups == ()
    assert any("scaled_dot_product_attention" in pin.why for pin in graph.pinned)


class Weights(nn.Module):
    """Returns attention weights, of each head or their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, average_attn_weights=True):
        x = self.first(x)
        y, weights = self.attention(x, x, x, average_attn_weights=average_attn_weights)
        return self.out(y), weights


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_a_model_returns(average):
    model, x = Weights().double().eval(), rows(2, 4, 3)
    graph = l0.nn.gate_(model, x, average_attn_weights=average)
    assert ("heads" in {group.kind for group in graph.groups}) == average
    unit_oracle.set_gates(graph, model, "half")
    exported = l0.nn.export(model)
    for mine, other in zip(
        exported(x, average_attn_weights=average), model(x, average_attn_weights=average), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True], ids=["whole example", "padded example"])
def test_padded_batches_of_an_encoder(padded):
    """In eval() without gradients torch makes a nested tensor of one, which gated layers do not take."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).double().eval(), rows(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    graph = l0.nn.gate_(model, x, **({"src_key_padding_mask": padding} if padded else {}))
    assert "heads" in {group.kind for group in graph.groups}
    unit_oracle.set_gates(graph, model, "half")
    expected = model(x, src_key_padding_mask=padding)[~padding]
    exported = l0.nn.export(model)
    with torch.no_grad():
        for one in (model, exported):
            torch.testing.assert_close(one(x, src_key_padding_mask=padding)[~padding], expected)
    assert l0.nn.ungate_(model).use_nested_tensor


def test_a_norm_of_a_library_over_what_stays():
    """A size in the forward keeps closed units, as zeros, of which the exported norm knows."""

    class Fixed(Normed):
        def forward(self, x):
            return self.out(self.norms[0](self.a(x)).view(-1, 6))

    model, x = Fixed(None, RMSNorm()).double().eval(), rows(2, 4, 3)
    graph = l0.nn.gate_(model, x)
    unit_oracle.set_gates(graph, model, "half")
    exported = l0.nn.export(model)
    assert exported.norms[0].weight.shape == (6,)
    torch.testing.assert_close(exported(x), model(x))
    assert "1e-06" in repr(exported)


class ScaledByHeads(nn.Module):
    """Its scale is of the number of its heads, which an export changes, and its weights are small."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.width = 4, 48
        self.first, self.norm = nn.Linear(5, 48), nn.LayerNorm(48)
        self.qkv, self.back, self.out = nn.Linear(48, 144), nn.Linear(48, 48), nn.Linear(48, 2)
        for layer in (self.qkv, self.back):
            nn.init.normal_(layer.weight, 0, 0.02)

    def forward(self, x):
        x = self.first(x)
        y = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (self.width // self.num_heads) ** -0.5
        return self.out(x + self.back(joined(scores.softmax(-1) @ v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_of_the_number_of_heads(dtype, seeded):
    model, x = ScaledByHeads().to(dtype).eval(), torch.randn(2, 7, 5, dtype=dtype)
    graph = l0.nn.gate_(model, x, kinds=["heads"])
    unit_oracle.set_gates(graph, model, "half")
    torch.testing.assert_close(l0.nn.export(model)(x), model(x), rtol=2e-6, atol=2e-6)
