"""torch.func and torch.autograd's other modes: right, or refused with the way out."""

import copy
import warnings

import pytest
import torch
from op_calls import CALLS, leaves
from test_compile import MODELS, make
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vmap

import l0kernels as l0
from l0kernels import nn
from op_checks import SEED

pytestmark = pytest.mark.usefixtures("seeded")

NO_FORWARD_MODE = r'no forward-mode derivative .*; take reverse mode .* or use_backend\("reference"\)'
NO_SECOND = r'no second derivative, got a derivative of a gradient; use_backend\("reference"\) has one'
WITHOUT_WEIGHT = ("l0_penalty", "depthwise")


def call_with(name, tensors, **changed):
    """The call with one state of the generator, on `tensors` but for what is changed."""
    torch.manual_seed(99)
    return CALLS[name](**{**tensors, **changed})


def constants():
    return {key: value.detach() for key, value in leaves(6).items()}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CALLS)
class TestCalls:
    def test_gradients(self, backend, name):
        tensors = leaves(6)

        def loss(tensors):
            torch.manual_seed(99)
            return CALLS[name](**tensors).square().sum()

        expected = loss(tensors)
        grads = torch.autograd.grad(expected, list(tensors.values()), allow_unused=True)
        detached = {key: value.detach() for key, value in tensors.items()}
        found, value = grad_and_value(loss)(detached)
        assert torch.equal(value, expected)
        for key, g in zip(tensors, grads, strict=True):
            assert torch.equal(found[key], torch.zeros_like(found[key]) if g is None else g)

    def test_jacobian_and_gradients_of_examples(self, backend, name):
        tensors = constants()
        weight, x = tensors["w"], tensors["x"]

        def outputs(weight):
            return call_with(name, tensors, w=weight).flatten()[:3]

        def loss(weight, x):
            return call_with(name, tensors, w=weight, x=x[None]).square().sum()

        jacobian = jacrev(outputs)(weight)
        of_examples = vmap(grad(loss), in_dims=(None, 0), randomness="same")(weight, x)
        if name in WITHOUT_WEIGHT:
            assert not jacobian.any()
            assert not of_examples.any()
            return
        leaf = weight.clone().requires_grad_()
        y = outputs(leaf)
        rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in y.unbind()]
        torch.testing.assert_close(jacobian, torch.stack(rows))
        one_by_one = torch.stack([torch.autograd.grad(loss(leaf, row), leaf)[0] for row in x])
        torch.testing.assert_close(of_examples, one_by_one)

    def test_what_is_refused(self, backend, name):
        tensors = constants()
        key = "a_in" if name in WITHOUT_WEIGHT else "w"
        value = tensors[key]

        def loss(value):
            return call_with(name, tensors, **{key: value}).square().sum()

        with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
            jvp(loss, (value,), (value,))
        with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
            jacfwd(loss, randomness="same")(value)
        with pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
            jacfwd(jacrev(loss), randomness="same")(value)  # hessian, with draws
        with pytest.raises(RuntimeError, match=NO_SECOND):
            grad(lambda value: grad(loss)(value).square().sum())(value)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NO_FORWARD_MODE):
            loss(forward_ad.make_dual(value, value))
        leaf = value.clone().requires_grad_()
        y = call_with(name, tensors, **{key: leaf}).flatten()[:2]
        eye = torch.eye(len(y)) if len(y) > 1 else torch.ones(1, *y.shape)
        y = y if len(y) > 1 else y.reshape(1)
        with pytest.raises(RuntimeError, match="takes one gradient at a time, got is_grads_batched=True"):
            torch.autograd.grad(y, leaf, eye, is_grads_batched=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_modules(name, training):
    """functional_call, with the draws of a bank in train()."""
    model, x = make(name)
    model.train(training)
    if training:
        nn.GateBank(model, seed=1).draw()
    params = {key: value.detach() for key, value in model.named_parameters()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}

    def loss(params, x):
        state = {key: value.clone() for key, value in buffers.items()}
        return functional_call(model, (params, state), (x,)).sin().sum()

    def expected(x):
        wanted = {key: value.clone().requires_grad_() for key, value in params.items()}
        grads = torch.autograd.grad(
            loss(wanted, x), list(wanted.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(wanted, grads, strict=True))

    found = grad(loss)(params, x)
    for key, value in expected(x).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    if name == "chain" and training:
        return  # torch's batch norm has no batch of batches while it counts statistics
    of_examples = vmap(grad(loss), in_dims=(None, 0))(params, x[:, None])
    for i in range(len(x)):
        for key, value in expected(x[i : i + 1]).items():
            torch.testing.assert_close(of_examples[key][i], value, rtol=1e-4, atol=1e-5)
    outputs = vmap(lambda x: functional_call(model, (params, buffers), (x[None],))[0])(x)
    torch.testing.assert_close(outputs, functional_call(model, (params, buffers), (x,)))


def test_a_bank_draws_outside():
    model, x = make("mlp")
    bank = nn.GateBank(model)

    def loss(x):
        bank.draw()
        return model(x).sum()

    with pytest.raises(RuntimeError, match="a GateBank counts its draws"):
        grad(loss)(x)
    assert bank.step.item() == 0


def test_ensembles():
    models = [make("mlp")[0].eval() for _ in range(3)]
    x = make("mlp")[1]
    params, buffers = torch.func.stack_module_state(models)

    def call(params, buffers, x):
        return functional_call(models[0], (params, buffers), (x,))

    together = vmap(call, in_dims=(0, 0, None))(params, buffers, x)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


def test_gates_of_examples():
    """randomness="different" draws gates for each example, "same" one for all, the default refuses."""
    log_alpha = torch.randn(200)

    def draw(_):
        return l0.sample_gates(log_alpha).z

    rows = torch.zeros(3)
    different = vmap(draw, randomness="different")(rows)
    assert not torch.equal(different[0], different[1])
    assert vmap(draw, randomness="same", out_dims=None)(rows).shape == (200,)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(rows)


def test_penalty_of_a_model():
    class Penalty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make("mlp")[0]

        def forward(self):
            return nn.penalty(self.model, weight_decay=0.1)

    module = Penalty()
    found = grad(lambda params: functional_call(module, params, ()))(
        {key: value.detach() for key, value in module.named_parameters()}
    )
    grads = torch.autograd.grad(module(), list(module.parameters()), allow_unused=True)
    for value, expected in zip(found.values(), grads, strict=True):
        assert torch.equal(value, torch.zeros_like(value) if expected is None else expected)


def test_inside_of_a_compiled_graph():
    """The graph breaks there: Dynamo would take the forwards' derivative for the backwards', zero."""
    model, x = make("in")
    model.eval()
    params = {key: value.detach() for key, value in model.named_parameters()}

    def gradients(x):
        return grad(lambda params: functional_call(model, params, (x,)).sin().sum())(params)

    expected = gradients(x)
    torch._dynamo.reset()
    found = torch.compile(gradients, backend="aot_eager")(x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"l0kernels: no derivative of torch\.func"):
        torch.compile(gradients, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()


def test_second_derivatives_of_a_chain_of_convolutions():
    """Of its inputs alone they are torch's own, and right; through gates and weights they are refused."""
    g = nn.HardConcreteGate(4)
    layers = torch.nn.Conv2d(2, 4, 3), torch.nn.Tanh(), nn.L0Conv2d(4, 3, 3, gate="in", in_gate=g)
    model = nn.L0Sequential(*layers).double().eval()
    with torch.no_grad():
        g.log_alpha.copy_(torch.tensor([-9.0, 0.3, 9.0, 0.1]))
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)

    def second(net):
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layers[0].weight])

    with l0.use_backend("reference"):
        expected = second(model)
    for a, b in zip(second(model), expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="packed_conv2d has no second derivative, got create_graph=True"):
        torch.autograd.grad(model(x).square().sum(), layers[0].weight, create_graph=True)


def test_several_gradients_at_once_through_packed_channels():
    model = nn.L0Sequential(
        torch.nn.Conv2d(2, 4, 3), nn.L0Conv2d(4, 4, 3), torch.nn.Tanh(), nn.L0Conv2d(4, 3, 3, gate="both")
    )
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.copy_(torch.tensor([-9.0, 0.3, 9.0, 0.1][: gate.n]))
    x = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(
        RuntimeError, match=r"l0kernels\.\w+ takes one gradient at a time, got is_grads_batched"
    ):
        torch.autograd.functional.jacobian(model, x, vectorize=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_alone(name, training):
    """Under a FakeTensorMode nothing has values, and nothing asks for them."""
    model, x = make(name)
    expected = model(x).shape
    model.train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == expected


def test_forward_mode_without_tangents():
    model, x = make("chain")
    model.eval()
    with forward_ad.dual_level():
        y = model(x)
        assert forward_ad.unpack_dual(y).tangent is None
    torch.testing.assert_close(y, model(x))


def test_the_reference_has_both():
    model, x = make("mlp")
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    with l0.use_backend("reference"), warnings.catch_warnings():
        _, tangent = jvp(lambda x: model(x).sum(), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, grad(lambda x: model(x).sum())(x).sum())
        assert hessian(lambda x: model(x).sin().sum())(x[:1]).abs().sum() > 0


def test_seeds_are_given_by_example():
    log_alpha, seeds = torch.randn(50), torch.arange(3)[:, None]
    rows = vmap(lambda seed: l0.sample_gates(log_alpha, seed=seed).z)(seeds)
    expected = [l0.sample_gates(log_alpha, seed=seed).z for seed in seeds]
    assert torch.equal(rows, torch.stack(expected))
    assert SEED.shape == (1,)
