"""On a GPU a gated model never makes the host wait, can be captured, and equals that on the CPU."""

import copy
import itertools

import pytest
import torch
from gpu_cases import NEEDS_GPU, capture, no_sync
from torch.nn import functional as F
from unit_nets_attention import HandAttention, TimmAttention
from unit_nets_images import Basic, Head, Inverted, stem
from unit_nets_rows import GRU, SwiGLU

import l0kernels as l0

pytestmark = NEEDS_GPU

DEVICE = "cuda"


def resnet():
    body = torch.nn.Sequential(stem(16), Basic(16, 16), Basic(16, 24, 2), Basic(24, 24))
    return Head(body, 24), torch.randn(8, 3, 16, 16)


def mobilenet():
    body = torch.nn.Sequential(stem(8), Inverted(8, 32, 8), Inverted(8, 24, 16, 2))
    return Head(body, 16), torch.randn(8, 3, 16, 16)


def gru():
    return GRU(), torch.randint(7, (16, 6))


class Tokens(torch.nn.Module):
    """Layers of a transformer, x (batch, tokens, 3) -> (batch, 2)."""

    def __init__(self, width, *layers):
        super().__init__()
        self.embed, self.head = torch.nn.Linear(3, width), torch.nn.Linear(width, 2)
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


def encoder():
    layer = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
    return Tokens(16, torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.randn(
        16, 6, 3
    )


def heads_by_hand():
    attentions = HandAttention(16, 4), SwiGLU(16, 24), TimmAttention(16, 4, 4)
    return Tokens(16, *attentions), torch.randn(16, 6, 3)


NETS = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "gru": gru,
    "encoder": encoder,
    "heads by hand": heads_by_hand,
}


@pytest.fixture(params=NETS)
def gated(request):
    """(what is gated, the model on the CPU, its input, targets)."""
    torch.manual_seed(0)
    model, x = NETS[request.param]()
    graph = l0.nn.gate_(model.float().train(), x[:2])
    with torch.no_grad():
        for gate in l0.nn.gate_modules(model):
            gate.log_alpha.normal_(0.0, 2.0)
    return graph, model, x, torch.randint(2, (len(x),))


def training(model, x, target):
    """A step of training on the device that returns its loss."""
    model.to(DEVICE)
    x, target = x.to(DEVICE), target.to(DEVICE)
    groups = l0.nn.parameter_groups(model, gate_lr=0.05)
    optimizer = torch.optim.Adam(groups, lr=1e-2, fused=True, capturable=True)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def assert_closed_have_no_gradient(graph, model, z):
    """Of all that closed units make and are read by; some are closed."""
    parameters, start, closed_ones = dict(model.named_parameters()), 0, 0
    for group in graph.groups:
        closed = (z[start : start + group.units] == 0).nonzero()[:, 0]
        start, closed_ones = start + group.units, closed_ones + len(closed)
        for member in group.members:
            if member.name in parameters:
                index = member.index[closed].flatten().to(DEVICE)
                grad = parameters[member.name].grad.index_select(member.dim, index)
                assert grad.eq(0).all(), member.name
    assert closed_ones


def test_a_step_never_waits(gated):
    _, model, x, target = gated
    step = training(model, x, target)
    for _ in range(3):
        step()
    with no_sync():
        for _ in range(3):
            step()


def test_a_captured_step_draws_anew(gated):
    graph, model, x, target = gated
    step = training(model, x, target)
    for _ in range(3):  # in the default stream, where no capture may wait
        step()
    replayed, loss = capture(step)
    z, seen = model.l0_units._recent[-1].z.detach(), []
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        replayed.replay()
        assert loss.isfinite()
        assert_closed_have_no_gradient(graph, model, z.cpu())
        changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert sum(changed) > len(changed) // 2
        seen.append(z.clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert int(buffer) == 3 + 3 + 4, name
    step()  # eager again
    model.eval()(x.to(DEVICE))


def test_equals_the_cpu(gated):
    """By evaluation gates, and norms in training."""
    _, model, x, target = gated
    model.l0_units.eval()
    other = copy.deepcopy(model).to(DEVICE)
    results = []
    for one, device in ((model, "cpu"), (other, DEVICE)):
        y = one(x.to(device))
        F.cross_entropy(y, target.to(device)).backward()
        grads = {name: p.grad.cpu() for name, p in one.named_parameters() if p.grad is not None}
        state = {name: b.cpu() for name, b in one.named_buffers() if b.is_floating_point()}
        results.append((y.detach().cpu(), grads, state))
    (y, grads, state), (found, found_grads, found_state) = results
    torch.testing.assert_close(found, y, rtol=0, atol=1e-4 * float(y.abs().max()))
    assert grads.keys() == found_grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        # Some are 0 but for rounding: those of biases in front of a norm.
        scale = max(float(grad.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(found_grads[name], grad, rtol=0, atol=1e-4 * scale, msg=name)
    for name, value in state.items():
        torch.testing.assert_close(found_state[name], value, rtol=1e-4, atol=1e-5, msg=name)
