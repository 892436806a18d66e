"""export of layers in modules of other people: whatever their forwards do, the function is that of eval()."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from export_checks import Base, Calls, check, size, spread

import l0kernels as l0
from l0kernels import nn

T = torch.nn


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
