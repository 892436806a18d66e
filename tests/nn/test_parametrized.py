"""Layers whose weights others make, by hooks and parametrizations, and others in a layer's place."""

import copy

import pytest
import torch
from export_checks import Calls, check, spread
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from l0kernels import nn

T = torch.nn


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
