"""export of layers in modules of other people: whatever their forwards do, the function is that of eval()."""

import copy
import itertools
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import l0kernels as l0
from l0kernels import nn

T = torch.nn


def spread(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, 3)
            gate.log_alpha.view(-1)[0] = -6
    return model


def size(model):
    return sum(p.numel() for p in model.parameters())


def check(model, x, smaller=None):
    """The export computes what model.eval() does; whether parameters of the layers are gone."""
    state = copy.deepcopy(model.state_dict())
    small = nn.export(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        expected, got = model.eval()(x), small(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), got)
        torch.testing.assert_close(small(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
    assert not nn.gate_modules(small)
    assert not small.training
    if smaller is not None:
        weights = size(model) - sum(p.numel() for p in nn.gate_parameters(model))
        assert (size(small) < weights) == smaller, (size(small), weights)
    return small


class Base(T.Module):
    """Two layers and a tanh, which each of the modules below treats in its own way."""

    def __init__(self):
        super().__init__()
        self.a = nn.L0Linear(6, 8, gate="both")
        self.b = nn.L0Linear(8, 6)


class Calls(Base):
    def forward(self, x):
        return self.b(self.a(x).tanh())


class ReadsDtype(Base):
    def forward(self, x):
        h = self.a(x.to(self.a.weight.dtype)).to(self.b.weight.device)
        if isinstance(self.b.weight, torch.Tensor) and h.dtype != self.b.weight.dtype:
            h = h.to(self.b.weight.dtype)
        return self.b(h) if self.b.bias is not None else h


class ReadsSizes(Base):
    def forward(self, x):
        h = self.a(x).view(-1, self.a.out_features) * self.b.in_features**-0.5
        return self.b(h) + self.b.out_features


class ReadsShape(Base):
    def forward(self, x):
        return self.b(self.a(x)) / self.b.weight.shape[1]


class Tied(Base):
    def forward(self, x):
        return F.linear(self.a(x), self.a.weight.t())


class ReadsBias(Base):
    def forward(self, x):
        return self.a(x)[:, :6] + self.b.bias


def product(x, layer):
    return F.linear(x, layer.weight)


class ReadsElsewhere(Base):
    def forward(self, x):
        return self.b(product(x, self.a))


class ReadsInMethod(Base):
    @property
    def first(self):
        return self.a.weight

    def norm(self):
        return self.first.square().sum()

    def forward(self, x):
        return self.b(self.a(x)) * self.norm()


class ReadsByName(Base):
    def forward(self, x):
        return self.b(self.a(x)) + getattr(self.b, "weight").sum()  # noqa: B009


class ReadsParameters(Base):
    def forward(self, x):
        return self.b(self.a(x)) + sum(p.abs().sum() for p in self.parameters())


class AsksParameters(Base):
    def forward(self, x):
        return self.b(self.a(x.to(next(self.parameters()).dtype)))


class ReadsLogAlpha(Base):
    def forward(self, x):
        return self.b(self.a(x)) * self.b.in_gate.log_alpha.sum()


class AsksKind(Base):
    def forward(self, x):
        for layer in (self.a, self.b):
            x = layer(x).tanh() if isinstance(layer, nn.L0Linear) else layer(x)
        return x


class AsksForLinear(Base):
    def forward(self, x):
        for layer in self.children():
            x = layer(x).tanh() if isinstance(layer, T.Linear) else layer(x)
        return x


class OwnGate(T.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.HardConcreteGate(6)
        self.b = nn.L0Linear(6, 6)

    def forward(self, x):
        return self.b(x * self.gate().z)


class OneDraw(T.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.HardConcreteGate(8)
        self.a = nn.L0Linear(6, 8, gate="out", out_gate=self.gate)
        self.b = nn.L0Linear(8, 6, in_gate=self.gate)

    def forward(self, x):
        gates = self.gate()
        return self.b(self.a(x, out_gates=gates).sigmoid(), in_gates=gates)


class OneDrawByPosition(OneDraw):
    def forward(self, x):
        gates = self.gate()
        return self.b(self.a(x, None, gates).sigmoid(), gates)


class DrawOfALayer(Base):
    def forward(self, x):
        return self.b(self.a(x, out_gates=self.b.in_gate()), self.a.out_gate())


class OwnMask(Base):
    def forward(self, x):
        return self.b(self.a(x), in_gates=l0.Gates.from_z(torch.arange(8.0) / 8))


class Pass(T.Module):
    """Hands on what its caller gives it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, gates):
        return self.layer(x, gates)


class HandsDown(T.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.HardConcreteGate(6)
        self.inner = T.ModuleList([Pass(nn.L0Linear(6, 6, in_gate=self.gate)) for _ in range(2)])

    def forward(self, x):
        gates = self.gate()
        for layer in self.inner:
            x = layer(x, gates)
        return x


class SupportsConvolution(T.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.read = nn.L0Conv1d(6, 4, 1, gate=None), nn.L0Conv1d(4, 6, 1, gate="in")
        self.norm = nn.L0BatchNorm2d(4)

    def forward(self, x):
        gates = self.read.in_gate()
        h = self.conv(x[..., None], out_support=gates)
        return self.read(self.norm(h[..., None], gates)[..., 0].sigmoid(), gates)[..., 0]


class Changed(nn.L0Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OfChanged(T.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Changed(6, 6), T.Sequential(nn.L0Linear(6, 6), T.ReLU(), Changed(6, 6, gate="both"))

    def forward(self, x):
        return self.b(self.a(x))


class Scaled(nn.L0Linear):
    scale = 3.0


class ReadsMore(T.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Scaled(6, 8), nn.L0Linear(8, 6)
        self.b.shift = 2.0
        self.b.register_buffer("factor", torch.tensor(5.0))

    def forward(self, x):
        return self.b(self.a(x) * self.a.scale) * self.b.factor + self.b.shift


class Owner(T.Module):
    """Containers that are called."""

    def __init__(self):
        super().__init__()
        self.body = T.Sequential(nn.L0Linear(6, 8, gate="out"), T.ReLU(), nn.L0Linear(8, 6))
        self.block = nn.L0FeedForward(6, 9, "swiglu")
        self.chain = nn.L0MLP((6, 7, 6))
        self.packed = nn.L0Sequential(nn.L0Linear(6, 8), T.ReLU(), nn.L0Linear(8, 6))

    def forward(self, x):
        return self.packed(self.chain(x) + self.block(x)) + self.body(x)


class Iterates(Owner):
    def forward(self, x):
        for layer in self.body:
            x = layer(x) + 1
        for layer in self.packed:
            x = layer(x) + 1
        return x


class Indexes(Owner):
    def forward(self, x):
        return self.body[2](self.body[0](x).sigmoid()) + self.packed[-1](self.packed[:2](x))


class LooksIn(Owner):
    def forward(self, x):
        h = self.chain.layers[1](self.chain.layers[0](x)) * len(self.body)
        return h + self.block.down(self.block.up(x)[:, :9]) + self.block.d_hidden


class AsksTheContainer(Owner):
    def forward(self, x):
        return self.body(x) * self.body[0].out_features


class InAList(T.Module):
    def __init__(self):
        super().__init__()
        blocks = Owner().body, nn.L0MLP((6, 7, 6)), nn.L0FeedForward(6, 9), Owner().packed
        self.blocks = T.ModuleList(blocks)
        self.named = T.ModuleDict({"a": nn.L0Linear(6, 6), "b": Owner().body})

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) * i + x
        return self.named["b"](self.named["a"](x))


class InAListOfLists(InAList):
    def forward(self, x):
        for part in self.blocks[0]:
            x = part(x)
        block = self.blocks[3]
        for part in block:
            x = part(x)
        return x


class MySequential(T.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0](x).sum()


class UsedTwice(T.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.L0Linear(6, 6, gate="both")
        self.body = T.Sequential(self.stem, T.ReLU(), nn.L0Linear(6, 6), self.stem)
        self.same = self.body

    def forward(self, x):
        return self.same(self.body(self.stem(x)) + self.stem(x))


class InAPythonList(Base):
    def __init__(self):
        super().__init__()
        self.layers = [self.a, self.b]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LambdaForward(Base):
    def forward(self, x):
        return self.b(self.a(x)) * (lambda layer: layer.weight.sum())(self.a)


class Helper(T.Module):
    def forward(self, layer, x):
        return F.linear(x, layer.weight)


class HandsALayer(Base):
    """Another module multiplies by the weight."""

    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.b(self.helper(self.a, x))


class Scale(T.Module):
    def __init__(self):
        super().__init__()
        self.weight = T.Parameter(torch.rand(6))

    def forward(self, x):
        return x * self.weight


class Encoder(T.Module):
    """As in transformers: a parameter of its own, blocks in a list, the first row at the end."""

    def __init__(self):
        super().__init__()
        self.norm = Scale()
        self.blocks = T.ModuleList([nn.L0FeedForward(6, 9), nn.L0MLP((6, 7, 6)), Calls()])
        self.head = nn.L0Linear(6, 6, gate="both")

    def forward(self, x):
        x = self.norm(x)[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            x = x + block(x).to(self.head.weight.dtype)
        return self.head(x[:, 0])


class DrawsByItself(Base):
    def __init__(self):
        super().__init__()
        self.bank = nn.GateBank(self)

    def forward(self, x):
        self.bank.draw()
        return self.b(self.a(x))


class HandsADraw(Owner):
    def forward(self, x):
        return self.chain(x, self.chain.draw()) + self.packed(x, {})


class HoldsAFunction(Base):
    def __init__(self):
        super().__init__()
        self.product = product

    def forward(self, x):
        return self.b(self.product(x, self.a))


def twice(forward):
    def run(self, x):
        return 2 * forward(self, x)

    return run


class Decorated(Base):
    @twice
    def forward(self, x):
        return F.linear(self.a(x), self.b.weight)


class NamesItsInput(Owner):
    def forward(self, x):
        return self.chain(x=x) + self.block(x=x)


class Keywords(Owner):
    def forward(self, x):
        return self.a_call(x=x)

    def a_call(self, **given):
        return self.body(*given.values())


class HoldsAMethod(Base):
    def __init__(self):
        super().__init__()
        self.first = self.a.forward

    def forward(self, x):
        return self.b(self.first(x).tanh())


class Blocks(T.Module):
    def __init__(self):
        super().__init__()

        def layer():
            return nn.L0Linear(6, 6, gate="both")

        self.blocks = T.ModuleList(T.Sequential(layer(), T.Tanh(), layer()) for _ in range(2))


class CountsLayers(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x) / len(block)
        return x


class UnpacksLayers(Blocks):
    def forward(self, x):
        for a, act, b in self.blocks:
            x = b(act(a(x)) + 1)
        return x


class Named(T.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.scale = T.Parameter(torch.tensor(2.0))

    def head(self, x):
        return self[0](x)


class AsksTheBlock(Blocks):
    def __init__(self):
        super().__init__()
        self.blocks = T.ModuleList(Named(*block) for block in self.blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * block.scale + block.head(x)
        return x


class SumsAllParameters(Owner):
    def forward(self, x):
        return self.chain(self.body(x)) + sum(p.abs().sum() for p in self.parameters())


SMALLER = [
    Calls,
    ReadsDtype,
    ReadsSizes,
    AsksParameters,
    AsksForLinear,
    Owner,
    AsksTheContainer,
    Iterates,
    Indexes,
    LooksIn,
    InAList,
    UsedTwice,
    InAPythonList,
    OfChanged,
    Encoder,
    DrawsByItself,
]
SAME = [
    ReadsShape,
    Tied,
    ReadsBias,
    ReadsElsewhere,
    ReadsInMethod,
    ReadsByName,
    ReadsLogAlpha,
    AsksKind,
    OwnGate,
    OneDraw,
    OneDrawByPosition,
    DrawOfALayer,
    OwnMask,
    HandsDown,
    SupportsConvolution,
    ReadsMore,
    LambdaForward,
    HandsADraw,
    NamesItsInput,
    Keywords,
    HoldsAFunction,
    Decorated,
    HoldsAMethod,
    SumsAllParameters,
]
EITHER = [InAListOfLists, HandsALayer, CountsLayers, UnpacksLayers, AsksTheBlock]


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", SMALLER + SAME + EITHER)
@pytest.mark.parametrize("seed", [0, 1])
def test_forwards_of_other_people(kind, seed):
    torch.manual_seed(seed)
    model = spread(kind(), seed)
    check(model, torch.randn(4, 6), True if kind in SMALLER else False if kind in SAME else None)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.fill_(-30.0)
    check(model, torch.randn(4, 6))


class Convolutions(T.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.L0Conv2d(3, 8, 3, padding=1, gate="both")
        self.b = nn.L0Conv2d(8, 8, 3, padding="same", groups=4, padding_mode="circular", gate="both")
        self.norm = nn.L0BatchNorm2d(8)
        self.line = nn.L0Conv1d(8, 6, 2, gate="both")

    def forward(self, x):
        h = self.norm(self.b(self.a(x).sigmoid())).flatten(2)
        return self.line(h) * self.a.kernel_size[0] * self.b.groups


@pytest.mark.parametrize("seed", range(3))
def test_convolutions(seed):
    model = spread(Convolutions(), seed)
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.bias.normal_()
    small = check(model, torch.randn(2, 3, 5, 5), True)
    assert isinstance(small.a, T.Conv2d)
    assert (small.a.in_channels, small.a.out_channels) == (3, 8)
    assert isinstance(small.line, T.Conv1d)


def test_counts_of_exported_layers():
    class Net(T.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.L0Conv2d(3, 8, 3, gate="both")
            self.line = nn.L0Conv1d(8, 6, 2, gate="both")
            self.out = nn.L0Linear(8, 5, gate="both")

        def forward(self, x):
            return self.out(self.line(self.conv(x).flatten(2)))

    model = spread(Net())
    small = nn.export(model)
    assert {type(part) for part in small.children()} == {nn.SlicedConv2d, nn.SlicedConv1d, nn.SlicedLinear}
    assert nn.eval_l0(small) == nn.eval_l0(model) == size(small)
    assert nn.eval_flops(small, (2, 3, 5, 5)) == nn.eval_flops(model, (2, 3, 5, 5)) > 0


def encoder_layer(**options):
    torch.manual_seed(0)
    layer = T.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    layer.linear1 = nn.L0Linear.from_dense(layer.linear1, gate="both")
    layer.linear2 = nn.L0Linear.from_dense(layer.linear2)
    return spread(layer)


ENCODERS = [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}]


@pytest.mark.parametrize(
    "options", [ENCODERS[0], *(pytest.param(options, marks=pytest.mark.long) for options in ENCODERS[1:])]
)
def test_encoder_layers_of_torch_compile(options):
    layer, x = encoder_layer(**options).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


@pytest.mark.parametrize("options", ENCODERS)
def test_encoder_layers_of_torch(options):
    layer, x = encoder_layer(**options), torch.randn(2, 5, 16)
    layer.eval()
    expected = layer(x)
    with torch.no_grad():  # torch's fused kernel would read the weights, and no gates
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x), expected)
    small = nn.export(layer)
    assert type(small.linear2) is T.Linear
    torch.testing.assert_close(small(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)
    kept = layer.linear2.in_gate.eval_gates().z != 0
    assert torch.equal((small.linear2.weight != 0).any(0), kept)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding():
    encoder = T.TransformerEncoder(encoder_layer(), 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():  # as nested tensors
        got = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding])
    small = nn.export(encoder)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            got = small(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # said once a process
def test_nested_tensors_have_one_draw():
    layers = [
        nn.L0Linear(6, 4, gate="both"),
        nn.L0MLP([6, 5, 4], "gelu"),
        nn.L0FeedForward(6, 8, "swiglu"),
        nn.L0Sequential(nn.L0Linear(6, 5), T.ReLU(), nn.L0Linear(5, 4), nn.L0FeedForward(4, 5)),
    ]
    parts = [torch.randn(3, 6), torch.randn(2, 6)]
    for layer, layout in itertools.product(map(spread, layers), (torch.strided, torch.jagged)):
        torch.manual_seed(3)
        got = layer(torch.nested.nested_tensor(parts, layout=layout)).unbind()
        torch.manual_seed(3)
        expected = layer(torch.cat(parts)).split([3, 2])
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


class CallsOutProj(T.MultiheadAttention):
    """An attention that does call the layer."""

    def forward(self, x):
        return self.out_proj(x)


class SelfAttention(T.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class LooksAndCalls(T.MultiheadAttention):
    """An attention that looks at the layer, and leaves the rest to torch's."""

    def forward(self, x):
        return super().forward(x, x, x.to(self.out_proj.bias.dtype))[0]


class ScaledInput(T.Linear):
    """A layer of somebody else with a gate in it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.HardConcreteGate(sizes[0])

    def forward(self, x):
        return super().forward(x * self.gate().z)


class ScaledWeight(T.Module):
    def __init__(self, n):
        super().__init__()
        self.gate = nn.HardConcreteGate(n)

    def forward(self, weight):
        return weight * self.gate().z


def gated_attention(kind=T.MultiheadAttention, assign=setattr):
    attention = kind(16, 4, batch_first=True)
    assign(attention, "out_proj", nn.L0Linear.from_dense(attention.out_proj))
    return attention


def test_attention_of_torch_refuses_a_gated_projection():
    x, message = torch.randn(2, 5, 16), r"out_proj of \w+ must be a plain torch.nn.Linear, got L0Linear\("
    attention = gated_attention()
    for model in (attention, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        for training in (True, False):
            with pytest.raises(ValueError, match=message):
                model.train(training)(x, x, x)
    with pytest.raises(ValueError, match=message):
        torch.compile(attention, backend="eager")(x, x, x)
    with pytest.raises(ValueError, match=message):
        gated_attention(SelfAttention)(x)
    with pytest.raises(ValueError, match=message):
        gated_attention(assign=T.Module.add_module)(x, x, x)
    layer = T.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    layer.multihead_attn.out_proj = nn.L0Linear(16, 16)
    with pytest.raises(ValueError, match=message):
        layer(x, x)
    layer = T.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    layer.self_attn.out_proj = nn.L0Linear(16, 16)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        layer(x)
    hidden = gated_attention(assign=lambda module, name, layer: module._modules.update({name: layer}))
    for use in (nn.penalty, nn.export, nn.expected_l0, nn.eval_l0, nn.expected_flops, nn.GateBank):
        with pytest.raises(ValueError, match=message):
            use(hidden)
    with pytest.raises(ValueError, match=message):
        gated_attention(LooksAndCalls)(x)
    for within in (T.Sequential(nn.L0Linear(16, 16)), ScaledInput(16, 16)):
        attention.out_proj = within
        with pytest.raises(ValueError, match=r"out_proj of MultiheadAttention must be a plain torch\.nn\."):
            attention(x, x, x)
    # What calls it, or has no gate, is no concern of ours.
    assert gated_attention(CallsOutProj)(x).shape == x.shape
    attention.out_proj = T.Linear(16, 16)
    attention(x, x, x)
    plain = T.MultiheadAttention(16, 4)
    plain.out_proj = nn.L0Linear(16, 16, gate=None)
    plain(x, x, x)


def test_a_gate_on_the_weight_of_attention_acts():
    """As a parametrization it stands where the weight is read."""
    attention, x = T.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    twin, gate = copy.deepcopy(attention), spread(ScaledWeight(16))
    parametrize.register_parametrization(attention.out_proj, "weight", gate.eval())
    with torch.no_grad():
        twin.out_proj.weight.mul_(gate.gate().z)
        torch.testing.assert_close(attention(x, x, x)[0], twin(x, x, x)[0])
    assert nn.gate_modules(attention) == [gate.gate]
    assert nn.penalty(attention).item() > 0


def magnitude(layer):
    prune.l1_unstructured(layer, "weight", 0.4)


CHAINS = {
    "mlp": (lambda: nn.L0MLP((6, 8, 7, 3), "gelu"), ["layers.1"]),
    "first": (lambda: nn.L0MLP((6, 8, 3), gate_input=False), ["layers.0", "layers.1"]),
    "up": (lambda: nn.L0FeedForward(6, 8, "geglu"), ["up"]),
    "down": (lambda: nn.L0FeedForward(6, 8), ["down"]),
    "both": (lambda: nn.L0FeedForward(6, 8, "silu"), ["up", "down"]),
    "packed": (
        lambda: nn.L0Sequential(nn.L0Linear(6, 8), T.ReLU(), nn.L0MLP((8, 5, 6)), nn.L0Linear(6, 4)),
        ["2.layers.0", "3"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [magnitude, weight_norm, spectral_norm])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_hooks_that_make_weights_of_layers_of_chains(hook, training, name):
    make, names = CHAINS[name]
    model, twin, x = spread(make()).train(training), make().train(training), torch.randn(5, 6)
    twin.load_state_dict(model.state_dict())
    for layer in map(model.get_submodule, names):
        hook(layer)
        model(x)
        source = layer.weight_g if hook is weight_norm else layer.weight_orig
        with torch.no_grad():  # as a step of an optimiser: the weight that there is now is another one
            source.add_(torch.randn_like(source))
    torch.manual_seed(1)
    y = model(x)
    y.sum().backward()
    for other in names:
        assert model.get_submodule(other).weight.grad_fn is not None
        with torch.no_grad():
            twin.get_submodule(other).weight.copy_(model.get_submodule(other).weight)
    torch.manual_seed(1)
    expected = twin(x)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    assert source.grad.abs().sum() > 0
    for (of, gate), (_, other) in zip(gates(model), gates(twin), strict=True):
        torch.testing.assert_close(gate.log_alpha.grad, other.log_alpha.grad, msg=of)


def gates(model):
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.HardConcreteGate)]


class Adapter(T.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x, *args):
        return 2 * self.layer(x, *args)


def test_layers_of_chains_that_are_other_modules():
    """An adapter around a layer is called, not bypassed."""

    block, mlp, x = spread(nn.L0FeedForward(6, 8)), spread(nn.L0MLP((6, 8, 6))), torch.randn(5, 6)
    block.eval(), mlp.eval()
    expected = 2 * block(x), 2 * mlp(x)
    block.down, mlp.layers[1] = Adapter(block.down), Adapter(mlp.layers[1])
    mlp.layers[1].in_gate = mlp.layers[1].layer.in_gate
    torch.testing.assert_close((block(x), mlp(x)), expected)
    check(block, x), check(mlp, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [magnitude, weight_norm, spectral_norm])
def test_exported_weights_are_those_of_now(hook):
    models = spread(nn.L0MLP((6, 8, 7, 3), "gelu")), spread(nn.L0FeedForward(6, 8)), spread(Calls())
    x = torch.randn(5, 6)
    for model in models:
        for layer in [part for part in model.modules() if isinstance(part, T.Linear)]:
            hook(layer)
        model(x).sum().backward()  # leaves weights that deepcopy refuses
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        small = nn.export(model)
        torch.testing.assert_close(small(x), model(x))


def test_parametrized_models():
    model = spread(Calls())
    parametrizations.spectral_norm(model.a)
    parametrizations.weight_norm(model.b)
    model.c = parametrizations.orthogonal(T.Linear(3, 3))
    x = torch.randn(5, 6)
    model.train()(x)
    state = copy.deepcopy(model.state_dict())
    small = nn.export(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    torch.testing.assert_close(small(x), model.eval()(x))
    assert type(small.b) is T.Linear or type(small.b) is nn.SlicedLinear
    assert parametrize.is_parametrized(small.c)  # without gates it goes on


def test_parametrized_layers_of_chains():
    for make, name in ((lambda: nn.L0MLP((6, 8, 6)), "layers.1"), (lambda: nn.L0FeedForward(6, 8), "up")):
        model, twin, x = spread(make()), make(), torch.randn(5, 6)
        twin.load_state_dict(model.state_dict())
        parametrizations.weight_norm(model.get_submodule(name))
        with torch.no_grad():
            model.get_submodule(name).parametrizations.weight.original0.mul_(2)
            twin.get_submodule(name).weight.mul_(2)
        torch.manual_seed(1)
        y = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, twin(x))
        torch.testing.assert_close(nn.export(model)(x), twin.eval()(x))


@pytest.mark.filterwarnings("ignore:torch", "ignore:.*deprecat")
def test_a_quantized_layer_of_a_block_is_called():
    block, x = spread(nn.L0FeedForward(6, 8, "swiglu")).eval(), torch.randn(5, 6)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(block), {T.Linear})
    assert type(quantized.up) is not T.Linear
    expected = block(x)
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_where_there_is_no_gradient_or_no_value():
    model, x = spread(Calls()), torch.randn(5, 6)
    with torch.inference_mode():
        small = nn.export(model)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    with pytest.raises(ValueError, match="model must hold values, got gates on the meta device"):
        nn.export(model.to("meta"))


def test_hooks():
    seen = []
    names = "body.0", "chain.layers.1", "block.up", "packed"
    for kind, name in ((Calls, "a"), *((Owner, name) for name in names)):
        model = spread(kind())
        model.get_submodule(name).register_forward_hook(double)
        check(model, torch.randn(5, 6))
    model = spread(Owner())
    for part in model.modules():
        part.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    small, x = nn.export(model), torch.randn(5, 6)
    torch.testing.assert_close(small(x), model.eval()(x))
    assert seen


def double(module, args, y):
    return 2 * y


def test_a_forward_of_one_object():
    model = spread(Calls())
    model.a.forward = MethodType(lambda self, x: 2 * nn.L0Linear.forward(self, x), model.a)
    small, x = nn.export(model), torch.randn(5, 6)
    torch.testing.assert_close(small(x), model.eval()(x))


class MoreThanAContainer(nn.L0Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class MoreThanASum(nn.L0Residual):
    def forward(self, x):
        return 1 + super().forward(x)


@pytest.mark.filterwarnings("ignore:.*multiplies its outputs by gates")
@pytest.mark.parametrize("training", [True, False])
def test_subclasses_of_containers_run_their_modules_as_these_do(training):
    def modules():
        body = nn.L0BatchNorm2d(8), T.Sigmoid(), nn.L0Conv2d(8, 8, 1, gate="in")
        return nn.L0Conv2d(3, 8, 1), nn.L0BatchNorm2d(8), nn.L0Sequential(*body)

    first, norm, body = modules()
    more = MoreThanAContainer(first, norm, MoreThanASum(body))
    same = nn.L0Sequential(first, norm, more[2])
    spread(more).train(training)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.manual_seed(1)
        y = more(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, 2 * same(x))
        torch.manual_seed(1)
        h, summed = x.new_zeros(2, 8, 4, 4), nn.L0Residual(body)
        z = more[2](h)
        torch.manual_seed(1)
        torch.testing.assert_close(z, 1 + summed(h))
    check(more, x)
