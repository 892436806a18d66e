"""What an export must be, and a module of two layers, for tests of layers in modules of other people."""

import copy
import pickle

import torch

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
