"""Gated models among what else there is: hooks, threads, modes, checkpoints, other models, profilers."""

import copy
import cProfile
import dataclasses
import pstats
import sys
import threading

import pytest
import torch
import unit_oracle
from torch import nn
from torch.nn import functional as F
from unit_cases import check, gated
from unit_examples import image, rows

import l0kernels as l0
from l0kernels.nn.units import narrow

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


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
    model, args = Changes().double(), (image(1, 4),)
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
        total = sum(unit_oracle.loss_of(model(rows(3, 4))) for _ in range(3))
        total.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_checkpoints_of_too_many_forwards_are_refused():
    model, _, graph, _ = gated("checkpointed")
    unit_oracle.set_gates(graph, model, "half")
    losses = [unit_oracle.loss_of(model(rows(3, 4))) for _ in range(9)]
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
