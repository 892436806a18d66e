"""The rules of autograd, and checkpointing: gates and gradients of each forward are its own."""

import copy
from functools import partial

import pytest
import torch
from op_calls import CALLS, assert_all_equal, leaves, step
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from op_checks import SEED

pytestmark = pytest.mark.usefixtures("seeded")


class TestCheckpoint:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("name", [name for name in CALLS if name != "l0_penalty"])
    def test_same_gates_and_gradients(self, backend, name, use_reentrant):
        call = CALLS[name]

        def recomputed(**tensors):
            names, values = zip(*tensors.items(), strict=True)

            def region(*args):
                return call(**dict(zip(names, args, strict=True)))

            return checkpoint(region, *values, use_reentrant=use_reentrant)

        def run(call):
            tensors = leaves(6)
            torch.manual_seed(99)
            y = call(**tensors)
            y.square().sum().backward()
            return [y.detach(), *(t.grad for t in tensors.values())]

        assert_all_equal(run(recomputed), run(call))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gates_drawn_outside_the_region(self, backend, use_reentrant):
        def run(wrap):
            t = leaves(6)
            gates = l0.sample_gates(t["a_in"], seed=SEED)

            def region(x, z):
                return l0.gated_linear(x, t["w"], t["b"], in_gates=gates._replace(z=z)).relu()

            wrap(region, t["x"], gates.z).square().sum().backward()
            return [t[name].grad for name in ("x", "w", "b", "a_in")]

        plain = run(lambda region, *args: region(*args))
        assert_all_equal(run(partial(checkpoint, use_reentrant=use_reentrant)), plain)


class TestAutograd:
    def test_two_forwards_in_flight(self, backend):
        """The gates of each forward are its own, whatever is drawn before its backward."""

        def losses(t, order):
            results = {}
            forwards = [
                l0.l0_mlp(
                    t["x"] * k,
                    [t["w"], t["w2"]],
                    [t["b"], t["b2"]],
                    [t["a_in"], t["a_out"]],
                    "gelu",
                    seed=SEED + k,
                )
                for k in (1, 2, 3)
            ]
            for k in order:
                inputs = [t[n] for n in ("x", "w", "b", "a_in", "a_out")]
                results[k] = torch.autograd.grad(forwards[k].square().sum(), inputs)
            return [g for k in range(3) for g in results[k]]

        tensors = leaves(6)
        assert_all_equal(losses(tensors, (0, 1, 2)), losses(tensors, (2, 0, 1)))

    @pytest.mark.parametrize("name", CALLS)
    def test_retain_graph(self, backend, name):
        tensors = leaves(6)
        y = CALLS[name](**tensors).square().sum()
        inputs = list(tensors.values())
        first = torch.autograd.grad(y, inputs, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(y, inputs, allow_unused=True)
        assert_all_equal(first, second)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, inputs, allow_unused=True)

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("l0_linear", "w"),
            ("l0_linear", "x"),
            ("gated_mlp", "w"),
            ("gated_mlp", "w2"),
            ("l0_mlp", "x"),
            ("masked_linear", "w"),
            ("masked_linear", "a_weight"),
            ("masked_linear, blocks", "w"),
            ("gated_conv2d", "w"),
        ],
    )
    def test_a_saved_tensor_changed_in_place(self, backend, name, changed):
        tensors = leaves(6)
        y = CALLS[name](**tensors)
        with torch.no_grad():
            tensors[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("name", CALLS)
    def test_a_second_derivative_is_refused(self, backend, name):
        """It would miss the terms inside the operators, silently."""
        tensors = leaves(6)
        y = CALLS[name](**tensors).square().sum()
        if name in ("masked_linear, evaluation", "evaluation"):
            inputs = tensors["w"]
        else:
            inputs = [t for n, t in tensors.items() if n != "x"]
        with pytest.raises(RuntimeError, match="has no second derivative, got create_graph=True"):
            torch.autograd.grad(y, inputs, create_graph=True, allow_unused=True)

    def test_the_reference_has_a_second_derivative(self):
        tensors = {name: t.detach().double().requires_grad_() for name, t in leaves(3).items()}
        with l0.use_backend("reference"):
            y = CALLS["l0_linear"](**tensors)
            (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), tensors["w"])
        assert second.abs().sum() > 0

    def test_accumulation_into_grad(self, backend):
        once, twice = leaves(6), leaves(6)
        CALLS["l0_linear"](**once).sum().backward()
        for _ in range(2):
            CALLS["l0_linear"](**twice).sum().backward()
        for name, t in once.items():
            assert (t.grad is None) == (twice[name].grad is None)
            if t.grad is not None:
                torch.testing.assert_close(twice[name].grad, 2 * t.grad)

    def test_gradients_are_memory_of_their_own(self, backend):
        for call in CALLS.values():
            tensors = leaves(6)
            grads = [g for g in step(call, tensors)[1:] if g is not None]
            if call in (CALLS["l0_penalty"], CALLS["l2_penalty"]):
                continue  # slices of one vector
            storages = [t.untyped_storage().data_ptr() for t in (*grads, *tensors.values())]
            assert len(set(storages)) == len(storages)
            assert all(g.is_contiguous() for g in grads)

    def test_outputs_may_be_changed_in_place(self, backend):
        for call in CALLS.values():
            tensors = leaves(6)
            doubled = [step(lambda **t: call(**t).mul_(2), tensors), step(lambda **t: call(**t) * 2, tensors)]  # noqa: B023
            assert_all_equal(*doubled)

    def test_deepcopy_of_a_model_with_its_gates(self, backend):
        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.randn(9, 13))
                self.log_alpha = torch.nn.Parameter(torch.randn(13))
                self.gates = l0.eval_gates(self.log_alpha)

            def forward(self, x):
                drawn = l0.l0_linear(x, self.weight, in_log_alpha=self.log_alpha, seed=SEED)
                return drawn + l0.gated_linear(x, self.weight, in_gates=self.gates)

        layer, x = Layer(), torch.randn(6, 13)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), layer(x))
        twin(x).sum().backward()
        assert layer.weight.grad is None
        assert twin.weight.grad is not None

    def test_leaf_and_parameter_hooks_run_once(self, backend):
        tensors, calls = leaves(6), []
        tensors["a_in"].register_hook(lambda g: calls.append(tuple(g.shape)))
        CALLS["l0_mlp"](**tensors).sum().backward()
        assert calls == [(13,)]
