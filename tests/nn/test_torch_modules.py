"""Gated layers within torch's own modules: encoder layers, attention, nested tensors."""

import copy
import itertools
import pickle

import pytest
import torch
from export_checks import spread
from torch.nn.utils import parametrize

from l0kernels import nn

T = torch.nn


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
