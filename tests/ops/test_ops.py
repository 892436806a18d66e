"""The operators under torch.library, torch.compile, checkpointing, autocast and the rules of autograd."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import Gates, _ops, reference
from l0kernels._arguments import GLU, ROWS
from op_checks import BACKENDS, LAYOUTS, ONE_BACKEND, SEED, compare, make_z, strided, to_list, wanted

pytestmark = pytest.mark.usefixtures("seeded")

OPS = torch.ops.l0kernels
DIST = [2 / 3, -0.1, 1.1]
CASES = [(layout, torch.float32) for layout in LAYOUTS] + [("contiguous", torch.bfloat16)]
TRACE = "test_aot_dispatch_dynamic"
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")


def gate(n):
    return to_list(Gates.from_z(make_z("mixed", n)))


def form(argument):
    """Of an operator's argument what AOTAutograd's trace goes by: which parts there are, flags and names."""
    if isinstance(argument, list | tuple):
        return tuple(map(form, argument))
    return argument if isinstance(argument, bool | str | None) else type(argument)


@pytest.fixture(scope="class")
def traced():
    """The operators that AOTAutograd has traced, with the forms of their arguments."""
    return set()


@pytest.fixture
def check(request, traced):
    """opcheck. The trace takes longest: arguments of one form have it once, with -m long every time."""

    def check(op, args, trace=True):
        key = str(op), form(args)
        trace &= key not in traced or request.node.get_closest_marker("long") is not None
        traced.update([key] if trace else [])
        opcheck(op, args, test_utils=(*UTILITIES, TRACE) if trace else UTILITIES)

    return check


class TestOpcheck:
    """Schema, fake and autograd registration, and AOTAutograd with dynamic shapes, of every operator."""

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("layout", [torch.clone, strided])
    def test_gates(self, check, backend, layout):
        log_alpha, other = layout(torch.randn(140)), layout(torch.randn(7))
        check(OPS.sample.default, ([log_alpha, other], SEED, 3, DIST, backend))
        check(OPS.sample_expected.default, ([log_alpha, other], SEED, 3, DIST, backend))
        check(OPS.gate_grad.default, (layout(torch.randn(140)), layout(make_z("mixed", 140)), DIST, backend))
        check(OPS.l0_penalty.default, ([log_alpha, other], [1.0, 2.5], DIST, backend))

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(("layout", "dtype"), CASES)
    def test_gated_linear(self, check, backend, layout, dtype):
        x, weight, dy = (LAYOUTS[layout](torch.randn(s)).to(dtype) for s in ((6, 13), (9, 13), (6, 9)))
        bias, g_in, g_out = torch.randn(9).to(dtype), gate(13), gate(9)
        for b, gates in ((bias, (g_in, g_out)), (None, ([], g_out)), (bias, (g_in, []))):
            check(OPS.gated_linear.default, (x, weight, b, *gates, True, dtype, backend))
        for needs, dist in (([True] * 5, []), ([False, False, True, True, False], DIST)):
            args = (dy, x, weight, bias, g_in, g_out, True, dtype, [], [False, True], needs, dist, backend)
            check(OPS.gated_linear_backward.default, args)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("layout", list(LAYOUTS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_drawn_within(self, check, backend, layout, dtype):
        """Where a backend draws on the way; Triton and CUDA: triton/test_layers.py, cuda/test_kernels.py."""
        x, w, w2, dy = (LAYOUTS[layout](torch.randn(s).to(dtype)) for s in ((6, 13), (9, 13), (5, 9), (6, 5)))
        bias, a, a2 = (torch.randn(n).to(dtype) for n in (9, 13, 9))
        weights, biases, dist = [w, w2], [bias, None], DIST
        if not _ops.module(backend).draws_within(x, weights, biases, [a, a2], dtype, "relu"):
            assert backend == "torch"
            return
        for sides in ((a, a2), (a, None), (None, a2)):
            check(OPS.l0_linear.default, (x, w, bias, *sides, SEED, dist, dtype, backend))
        for activation in ("relu", "gelu"):
            for log_alphas in ([a, a2], [None, a2], [a, None]):
                args = (x, weights, biases, log_alphas, activation, SEED, dist, dtype, backend)
                # Beyond the open units packed activations hold anything.
                check(OPS.l0_mlp.default, args, trace=False)
                z, index, count, _, *saved = OPS.l0_mlp(*args)
                gated = [log_alpha is not None for log_alpha in log_alphas]
                needs = [True, True, True, True, False, *gated]
                drawn = (x, weights, biases, gated, z, index, count, activation, dtype)
                wanted = ([False] * 2, needs, dist)
                check(OPS.l0_mlp_backward.default, (dy, *drawn, saved, *wanted, backend))

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(("layout", "dtype"), CASES)
    @pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
    def test_gated_mlp(self, check, backend, layout, dtype, activation):
        make, rows = LAYOUTS[layout], ROWS[activation]
        x, dy = make(torch.randn(6, 13)).to(dtype), make(torch.randn(6, 5)).to(dtype)
        shapes = ((9 * rows, 13), (7 * rows, 9), (5, 7))
        weights = [make(torch.randn(shape)).to(dtype) for shape in shapes]
        biases = [torch.randn(9 * rows).to(dtype), None, torch.randn(5).to(dtype)]
        # Beyond the open units packed activations hold anything; the comparison with AOTAutograd cannot know.
        for hidden, trace in ((to_list(Gates.from_z(torch.rand(7))), True), (gate(7), False)):
            args = (x, weights, biases, [*gate(13), None, None, None, *hidden], activation, dtype, False)
            check(OPS.gated_mlp.default, (*args, backend), trace)
            _, *saved = OPS.gated_mlp(*args, backend)
            needs = [True, *[True] * 3, True, False, True, True, False, True]
            for dist in ([], DIST):
                rest = (saved, [False] * 3, needs, dist, backend)
                check(OPS.gated_mlp_backward.default, (dy, *args, *rest))

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_gated_conv2d(self, check, backend, layout, dtype, groups):
        x, dy = (torch.randn(s).to(dtype).to(memory_format=layout) for s in ((2, 12, 6, 5), (2, 9, 3, 5)))
        weight, bias = torch.randn(9, 12 // groups, 3, 3).to(dtype), torch.randn(9).to(dtype)
        conv, g_in, g_out = ([2, 1], [1, 1], [1, 1], groups), gate(12), gate(9)
        for b, gates, scale in (
            (bias, (g_in, g_out), True),
            (None, ([], g_out), False),
            (bias, (g_in, []), True),
        ):
            args = (x, weight, b, *gates, True, scale, False, False, *conv, dtype, backend)
            check(OPS.gated_conv2d.default, args)
        for needs, dist in (([True] * 5, []), ([False, False, True, True, False], DIST)):
            flags, wanted = (True, True, False, False), ([False, True], needs, dist)
            args = (dy, x, weight, bias, g_in, g_out, *flags, *conv, dtype, [], *wanted, backend)
            check(OPS.gated_conv2d_backward.default, args)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize(("layout", "dtype"), CASES)
    def test_masked_and_block(self, check, backend, layout, dtype):
        make = LAYOUTS[layout]
        x, dy = make(torch.randn(6, 13)).to(dtype), make(torch.randn(6, 9)).to(dtype)
        weight, log_alpha = make(torch.randn(9, 13)).to(dtype), make(torch.randn(9, 13))
        check(OPS.masked_weight.default, (weight, log_alpha, SEED, DIST, backend))
        for needs in ((True, True), (False, True)):
            args = (weight, weight, log_alpha, SEED, DIST, *needs, backend)
            check(OPS.masked_weight_grad.default, args)
        z, bias = make(make_z("mixed", 12).view(3, 4)), torch.randn(9).to(dtype)
        check(OPS.block_linear.default, (x, weight, bias, z, 3, 4, dtype, backend))
        for needs in ([True] * 4, [False, True, False, True]):
            args = (dy, x, weight, bias, z, 3, 4, dtype, [False], needs, [], backend)
            check(OPS.block_linear_backward.default, args)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_coupled_penalty(self, check, backend, dtype):
        gates = torch.float64 if dtype == torch.float64 else torch.float32
        for shape, groups, layout in (
            ((6, 5), 1, torch.clone),
            ((5, 6), 1, torch.t),
            ((6, 5, 3, 2), 2, torch.clone),
        ):
            thetas = [layout(torch.randn(shape).to(dtype)), torch.randn(6).to(dtype)]
            log_alphas = [torch.randn(n, dtype=gates) for n in (6, 5 * groups)]
            factor = torch.ones((), dtype=gates)
            # Every kind of sides of a matrix, and both and none where what is laid out or grouped differs.
            for sides in ((0, 1), (-1, -1), (0, -1), (-1, 1))[
                : 4 if layout is torch.clone and groups == 1 else 2
            ]:
                numbers, rest = [*sides, groups, 0, -1, 1], (0.3, DIST, backend)
                check(OPS.coupled_penalty.default, (thetas, log_alphas, [1.0, 0.0], numbers, *rest))
                check(OPS.coupled_penalty_grad.default, (thetas, log_alphas, numbers, factor, *rest))
        check(OPS.coupled_penalty.default, (thetas, [], [], [-1, -1, 1] * 2, *rest))

    def test_leaves_that_require_a_gradient_get_no_graph_from_an_operator(self, backend):
        x, weight, log_alpha = (torch.randn(*s, requires_grad=True) for s in ((6, 13), (9, 13), (13,)))
        outputs = [
            *OPS.gated_linear(x, weight, None, gate(13), [], True, torch.float32, backend),
            *OPS.gated_mlp(x, [weight], [None], [None] * 3, "relu", torch.float32, False, backend),
            *OPS.gated_conv2d(
                *(x[..., None, None], weight[..., None, None], None, gate(13), [], True, True, False, False),
                *([1, 1], [0, 0], [1, 1], 1, torch.float32, backend),
            ),
            *OPS.sample([log_alpha], SEED, 0, DIST, backend),
            *OPS.sample_expected([log_alpha], SEED, 0, DIST, backend),
            OPS.l0_penalty([log_alpha], [1.0], DIST, backend)[0],
            OPS.masked_weight(weight, weight, SEED, DIST, backend),
        ]
        assert not any(t.requires_grad for t in outputs)
        args = (x, weight, None, gate(13), [], True, torch.float32, backend)
        opcheck(OPS.gated_linear.default, args)

    def test_every_operator_is_checked_here(self):
        names = {
            name.split("::")[1].split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if "l0kernels::" in name
        }
        assert names == {
            *("gated_attention", "gated_attention_backward"),  # Triton's alone: triton/test_attention.py
            *("l0_linear", "l0_mlp", "l0_mlp_backward"),
            *("coupled_penalty", "coupled_penalty_grad"),
            *("sample", "sample_expected", "gate_grad", "l0_penalty", "weighted_penalty"),
            *("copied_seed", "kept_seed", "agreed_seed", "prox"),
            *("gated_linear", "gated_linear_backward", "gated_mlp"),
            *("gated_conv2d", "gated_conv2d_backward"),
            *(
                "gated_mlp_backward",
                "masked_weight",
                "masked_weight_grad",
                "block_linear",
                "block_linear_backward",
            ),
        }

    def test_meta_tensors(self, backend):
        x, weight = (
            torch.randn(2, 3, 13, device="meta"),
            torch.randn(9, 13, device="meta", requires_grad=True),
        )
        log_alpha = torch.randn(13, device="meta", requires_grad=True)
        y = l0.l0_linear(x, weight, in_log_alpha=log_alpha)
        assert (y.shape, y.device.type) == ((2, 3, 9), "meta")
        y.sum().backward()
        assert (weight.grad.shape, log_alpha.grad.shape) == ((9, 13), (13,))

    def test_modes_and_make_fx_see_the_operators(self, backend):
        seen = []

        class Spy(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func.name())
                return func(*args, **(kwargs or {}))

        x, weight, log_alpha = torch.randn(6, 13), torch.randn(9, 13), torch.randn(13)

        def call(x, weight, log_alpha):
            return l0.l0_linear(x, weight, in_log_alpha=log_alpha, seed=SEED)

        with Spy():
            expected = call(x, weight, log_alpha)
        settings = torch.float32, "identity"
        within = _ops.module(backend).draws_within(x, [weight], [None], [log_alpha], *settings)
        names = {"l0_linear"} if within else {"sample", "gated_linear"}
        assert {f"l0kernels::{name}" for name in names} <= set(seen)
        graph = make_fx(call)(x, weight, log_alpha)
        again = torch.randn(6, 13)
        assert torch.equal(graph(x, weight, log_alpha), expected)
        assert torch.equal(graph(again, weight, log_alpha), call(again, weight, log_alpha))


def leaves(batch):
    torch.manual_seed(batch)
    shapes = {
        "x": (batch, 13),
        "w": (9, 13),
        "b": (9,),
        "w2": (5, 9),
        "b2": (5,),
        "a_in": (13,),
        "a_out": (9,),
        "a_weight": (9, 13),
        "a_block": (3, 4),
    }
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


CALLS = {
    "l0_linear": lambda x, w, b, a_in, a_out, **_: l0.l0_linear(
        x, w, b, in_log_alpha=a_in, out_log_alpha=a_out, seed=SEED
    ),
    "l0_linear, leading dimensions": lambda x, w, b, a_in, **_: l0.l0_linear(
        x.view(-1, 1, 13), w, b, in_log_alpha=a_in, seed=SEED
    ),
    "l0_linear, own seed": lambda x, w, b, a_in, **_: l0.l0_linear(x, w, b, in_log_alpha=a_in),
    "sample and gate": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=l0.sample_gates(a_in)),
    "support": lambda x, w, b, w2, a_out, **_: support_chain(x, w, b, w2, l0.sample_gates(a_out, seed=SEED)),
    "gated_mlp": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.gated_mlp(
        x, [w, w2], [b, b2], l0.sample_gates([a_in, a_out], seed=SEED), "gelu"
    ),
    "l0_mlp": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.l0_mlp(x, [w, w2], [b, b2], [a_in, a_out]),
    "gated product": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.l0_mlp(
        x, [torch.cat((w, -w)), w2], [torch.cat((b, b + 1)), b2], [a_in, a_out], "swiglu"
    ),
    "masked_linear": lambda x, w, b, a_weight, **_: l0.masked_linear(x, w, b, a_weight, seed=SEED),
    "masked_linear, blocks": lambda x, w, b, a_block, **_: l0.masked_linear(x, w, b, a_block, block=(3, 4)),
    "masked_linear, evaluation": lambda x, w, b, a_weight, **_: l0.masked_linear(
        x, w, b, a_weight, mode="topk"
    ),
    "evaluation": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=l0.eval_gates(a_in)),
    "own gates": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=Gates.from_z(a_in.relu())),
    "gated_conv2d": lambda x, w, b, a_in, a_out, **_: images(
        x, w, b, l0.sample_gates([a_in, a_out], seed=SEED), padding=1, stride=2
    ),
    "depthwise": lambda x, b, w2, a_in, **_: images(
        x,
        w2[:, :1].repeat(3, 1)[:13],
        None,
        [l0.sample_gates(a_in, seed=SEED)] * 2,
        padding="same",
        groups=13,
    ),
    "l0_penalty": lambda a_in, a_out, **_: l0.l0_penalty([a_in, a_out], [2.0, 3.0], lam=0.1),
    "l2_penalty": lambda w, a_in, a_out, **_: l0.l2_penalty(w, 0.3, in_log_alpha=a_in, out_log_alpha=a_out),
}


def support_chain(x, w, b, w2, gates):
    return l0.gated_linear(l0.gated_linear(x, w, b, out_support=gates), w2, in_gates=gates)


def images(x, w, b, gates, **options):
    """gated_conv2d of images that repeat x, with kernels that repeat w."""
    x, w = x[:, :, None, None].expand(-1, -1, 5, 4), w[:, :, None, None].expand(-1, -1, 3, 3)
    return l0.gated_conv2d(x, w, b, in_gates=gates[0], out_gates=gates[1], **options)


def step(call, tensors):
    """Output and gradients, with torch's generator in a known state."""
    torch.manual_seed(99)
    y = call(**tensors)
    grads = torch.autograd.grad(y.square().sum(), list(tensors.values()), allow_unused=True)
    return [y.detach(), *grads]


def assert_all_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("backend", "name"),
        [(BACKENDS[i % len(BACKENDS)], name) for i, name in enumerate(CALLS)],
        indirect=["backend"],
    )
    def test_whole_graph_two_sizes(self, backend, name):
        """One graph, the batch a symbol; it has the backend by name alone: each call is on one of them."""
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter)
        for batch in (6, 11):
            tensors = leaves(batch)
            torch._dynamo.mark_dynamic(tensors["x"], 0)
            results = step(compiled, tensors), step(CALLS[name], leaves(batch))
            if name == "l2_penalty":  # compiled, weight_decay multiplies the sum and not its terms
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)
            else:
                assert_all_equal(*results)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
    def test_many_sizes_compile_twice(self, backend):
        """The batch becomes a symbol: the shapes of the operators' results follow from their inputs."""
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(CALLS["gated_mlp"], fullgraph=True, backend=counter)
        for batch in (6, 11, 17, 30):
            assert_all_equal(step(compiled, leaves(batch)), step(CALLS["gated_mlp"], leaves(batch)))
        assert counter.frame_count == 2

    @pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
    def test_seed_is_an_input(self, backend):
        tensors = leaves(6)

        def call(seed):
            return l0.l0_linear(tensors["x"], tensors["w"], in_log_alpha=tensors["a_in"], seed=seed)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for value in (1, 2, 2**62):
            seed = torch.tensor([value])
            assert torch.equal(compiled(seed), call(seed))
        assert not torch.equal(compiled(torch.tensor([1])), compiled(torch.tensor([2])))

    def test_backend_is_a_guard(self):
        call = CALLS["own gates"]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for name in ("torch", "reference", "torch"):
            with l0.use_backend(name):
                results.append(step(compiled, leaves(6)))
        assert_all_equal(results[0], results[2])
        torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-4, atol=1e-4)


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


LOW = [torch.bfloat16, torch.float16]


def low_call(name):
    """Calls on explicit leaves, by namespace, for the comparison with float64."""

    def linear(namespace, x, w, b, a_in, a_out):
        return namespace.l0_linear(x, w, b, in_log_alpha=a_in, out_log_alpha=a_out, seed=SEED)

    def support(namespace, x, w, b, a_out):
        g = namespace.sample_gates(a_out, seed=SEED)
        return namespace.gated_linear(x, w, b, out_support=g)

    def mlp(activation, namespace, x, w, b, w2, b2, a_in, a_out):
        gates = namespace.sample_gates([a_in, a_out], seed=SEED)
        if activation in GLU:
            w, b = torch.cat((w, w.flip(0))), torch.cat((b, -b))
        return namespace.gated_mlp(x, [w, w2], [b, b2], gates, activation)

    def masked(block, namespace, x, w, b, a):
        return namespace.masked_linear(x, w, b, a, block=block, seed=SEED)

    table = {
        "linear": linear,
        "support": support,
        "masked": partial(masked, None),
        "blocks": partial(masked, (16, 8)),
    }
    return table.get(name) or partial(mlp, name)


def low_case(name, dtype):
    shapes = {"x": (37, 53), "w": (41, 53), "b": (41,)}
    shapes |= {
        "linear": {"a_in": (53,), "a_out": (41,)},
        "support": {"a_out": (41,)},
        "masked": {"a": (41, 53)},
        "blocks": {"a": (3, 7)},
    }.get(name, {"w2": (19, 41), "b2": (19,), "a_in": (53,), "a_out": (41,)})
    scale = {"w": 53**-0.5, "w2": 41**-0.5}
    return {
        n: torch.randn(s) if n.startswith("a") else (torch.randn(s) * scale.get(n, 1)).to(dtype)
        for n, s in shapes.items()
    }


class TestLowPrecision:
    NAMES = ("linear", "support", *ROWS, "masked", "blocks")

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("name", NAMES)
    def test_sixteen_bit_layers(self, backend, poison, name, dtype):
        y, grads = compare(low_call(name), low_case(name, dtype), dtype=dtype)
        assert y.dtype == dtype
        for leaf, grad in grads.items():
            assert grad is None or grad.dtype == (torch.float32 if leaf.startswith("a") else dtype)

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("name", NAMES)
    def test_autocast(self, backend, poison, name, dtype):
        y, grads = compare(low_call(name), low_case(name, torch.float32), dtype=dtype, autocast=dtype)
        assert y.dtype == dtype
        assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())

    @pytest.mark.parametrize("dtype", LOW)
    def test_mixed_dtypes_under_autocast(self, backend, poison, dtype):
        tensors = low_case("linear", torch.float32)
        tensors["x"] = tensors["x"].to(dtype)  # as it leaves the layer before
        y, grads = compare(low_call("linear"), tensors, dtype=dtype, autocast=dtype)
        assert y.dtype == dtype
        assert grads["x"].dtype == dtype
        assert grads["w"].dtype == torch.float32

    @pytest.mark.parametrize("dtype", LOW)
    def test_zero_set_of_gate_gradients(self, backend, dtype):
        for autocast in (None, dtype):
            tensors = low_case("linear", dtype if autocast is None else torch.float32)
            drawn = reference.sample_gates([tensors["a_in"], tensors["a_out"]], seed=SEED)
            _, grads = compare(low_call("linear"), tensors, dtype=dtype, autocast=autocast)
            for name, g in zip(("a_in", "a_out"), drawn, strict=True):
                assert torch.equal(grads[name] != 0, wanted(g.z, False))

    def test_autocast_leaves_float64_alone(self, backend):
        tensors = {n: t.double() for n, t in low_case("linear", torch.float32).items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = low_call("linear")(l0, **tensors)
        assert torch.equal(y, low_call("linear")(l0, **tensors))

    @pytest.mark.parametrize("dtype", LOW)
    def test_all_closed_and_no_gates(self, backend, poison, dtype):
        x, w, b = (torch.randn(s).to(dtype) for s in ((5, 40), (33, 40), (33,)))
        closed = Gates.from_z(torch.zeros(40))
        assert torch.equal(l0.gated_linear(x, w, b, in_gates=closed), b.expand(5, 33))
        assert not l0.gated_linear(x, w, b, out_gates=Gates.from_z(torch.zeros(33))).any()
        torch.testing.assert_close(l0.gated_linear(x, w, b), torch.nn.functional.linear(x, w, b))
        assert l0.gated_linear(x[:0], w, b, in_gates=closed).shape == (0, 33)


class TestErrors:
    """Arguments of the layers that no other file covers: gates that do not belong."""

    def gates(self, n=6):
        return Gates.from_z(make_z("mixed", n))

    def call(self, **kwargs):
        return l0.gated_linear(torch.randn(2, 6), torch.randn(4, 6), **kwargs)

    @pytest.mark.parametrize("name", ["in_gates", "out_gates", "out_support"])
    def test_gates_of_another_size_kind_or_device(self, backend, name):
        size = 6 if name == "in_gates" else 4
        with pytest.raises(ValueError, match=rf"{name} must hold {size} gates, .* got z of shape \(5,\)"):
            self.call(**{name: self.gates(5)})
        with pytest.raises(TypeError, match=rf"{name} must be Gates .*, got Tensor"):
            self.call(**{name: torch.ones(size)})
        z, index, count, _ = self.gates(size)
        with pytest.raises(ValueError, match=rf"{name}.z must be on cpu, .* got meta"):
            self.call(**{name: Gates(z.to("meta"), index, count)})
        with pytest.raises(TypeError, match=rf"{name}.z must be float32 or float64, got torch.bfloat16"):
            self.call(**{name: Gates(z.bfloat16(), index, count)})
        with pytest.raises(TypeError, match=rf"{name}.index and .count must be int32, got torch.int64"):
            self.call(**{name: Gates(z, index.long(), count)})
        with pytest.raises(ValueError, match=rf"{name}.index must have shape \(128,\) .* got \(6,\)"):
            self.call(**{name: Gates(z, index[:6], count)})
        with pytest.raises(ValueError, match=rf"{name}.count must have shape \(2,\) .* got \(1,\)"):
            self.call(**{name: Gates(z, index, count[:1])})

    def test_both_sides_of_the_output(self, backend):
        with pytest.raises(ValueError, match="give either out_gates or out_support, got both"):
            self.call(out_gates=self.gates(4), out_support=self.gates(4))

    @pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, -(2**31)])
    def test_counts_that_are_none(self, backend, value):
        z, index, _, _ = self.gates()
        bad = Gates(z, index, torch.tensor([value, 128], dtype=torch.int32))
        with pytest.raises(ValueError, match=rf"count\[0\] must be in \[0, 6\], got {value}"):
            self.call(in_gates=bad)

    @pytest.mark.skipif("cpp" not in BACKENDS, reason="l0kernels._C was not built")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("side", ["in_gates", "out_gates", "out_support"])
    def test_counts_and_orders_of_other_gates(self, side, dtype):
        """Native kernels look; torch's own operations read what index and count say, and stay inside."""
        z, index, count, _ = Gates.from_z(torch.tensor([0.5, 0.0, 0.3, 1.0, 0.0, 0.2]))
        x, w = torch.randn(2, 6).to(dtype), torch.randn(6, 6).to(dtype)
        for order, number, match in (
            (index, count - 1, r"count\[0\] must count the gates that are not 0, 4, got 3"),
            (index[[2, 1, 0, *range(3, 128)]], count, "index must list the open gates in ascending order"),
            (index[[0, 0, *range(2, 128)]], count, "index must list the open gates in ascending order"),
        ):
            bad = {side: Gates(z, order, number)}
            with l0.use_backend("cpp"), pytest.raises(ValueError, match=match):
                l0.gated_linear(x, w, **bad)

    @pytest.mark.parametrize("value", [-1, 6, 2**31 - 1])
    def test_indices_out_of_range(self, backend, value):
        if backend != "cpp":
            return  # torch's index_select checks, with its own error
        z, index, count, _ = self.gates()
        for position in (0, 5):
            bad = index.clone()
            bad[position] = value
            with pytest.raises(ValueError, match=r"gates.index must hold numbers in \[0, 6\)"):
                self.call(in_gates=Gates(z, bad, count))

    def test_operands(self, backend):
        x, w, b = torch.randn(2, 6), torch.randn(4, 6), torch.randn(4)
        cases = [
            (
                (x[:, :5], w, b),
                ValueError,
                r"x must have shape \(\.\.\., 6\), the columns of weight, got \(2, 5\)",
            ),
            ((torch.tensor(1.0), w, b), ValueError, r"x must have shape \(\.\.\., 6\), .* got \(\)"),
            ((x, w[0], b), ValueError, r"weight must have shape \(out, in\), got \(6,\)"),
            ((x, w, b[:3]), ValueError, r"bias must have shape \(4,\) \(one per row of weight\), got \(3,\)"),
            (
                (x.double(), w, b),
                TypeError,
                "x must have the dtype of weight, torch.float32, got torch.float64",
            ),
            (
                (x, w, b.half()),
                TypeError,
                "bias must have the dtype of weight, torch.float32, got torch.float16",
            ),
            ((x.long(), w, b), TypeError, "x must have a floating-point dtype, got torch.int64"),
            ((x, w.to(torch.complex64), b), TypeError, "weight must have a floating-point dtype"),
            (([[1.0]], w, b), TypeError, "x must be a torch.Tensor, got list"),
            ((x.to("meta"), w, b), ValueError, "x must be on cpu, the device of weight, got meta"),
            ((x, w, b.to("meta")), ValueError, "bias must be on cpu, the device of weight, got meta"),
        ]
        for args, error, match in cases:
            for call in (l0.gated_linear, l0.l0_linear):
                with pytest.raises(error, match=match):
                    call(*args)

    def test_l0_linear_names_its_gates(self, backend):
        x, w = torch.randn(2, 6), torch.randn(4, 6)
        for name, size in (("in_log_alpha", 6), ("out_log_alpha", 4)):
            with pytest.raises(ValueError, match=rf"{name} must have shape \({size},\) .* got \(5,\)"):
                l0.l0_linear(x, w, **{name: torch.zeros(5)})
            with pytest.raises(TypeError, match=f"{name} must be float32 or float64, got torch.float16"):
                l0.l0_linear(x, w, **{name: torch.zeros(size).half()})
            with pytest.raises(ValueError, match=f"{name} must be on cpu, the device of x, got meta"):
                l0.l0_linear(x, w, **{name: torch.zeros(size, device="meta")})
            with pytest.raises(ValueError, match=r"log_alpha must not hold NaN"):
                l0.l0_linear(x, w, **{name: torch.full((size,), float("nan"))})
        with pytest.raises(ValueError, match=r"log_alpha\[1\] must not hold NaN"):
            l0.l0_linear(x, w, in_log_alpha=torch.zeros(6), out_log_alpha=torch.full((4,), float("nan")))
        with pytest.raises(TypeError, match="seed must be an int64 tensor of shape"):
            l0.l0_linear(x, w, in_log_alpha=torch.zeros(6), seed=1)

    def test_nothing_half_written(self, backend):
        """An error in the forward leaves torch's generator and the leaves as they were."""
        leaf = torch.randn(2, 6, requires_grad=True)
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="out_log_alpha"):
            l0.l0_linear(leaf, torch.randn(4, 6), in_log_alpha=torch.zeros(6), out_log_alpha=torch.zeros(3))
        assert leaf.grad is None
        assert not torch.equal(torch.get_rng_state(), state)  # randn of the weight
        state = torch.get_rng_state()
        with pytest.raises(TypeError, match="dist must be"):
            l0.sample_gates(torch.zeros(3), dist=3)
        assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from(["mixed", "open", "closed", "few", "wild", None]), min_size=3, max_size=3),
    activation=st.sampled_from(list(ROWS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    full=st.booleans(),
    value=st.integers(0, 2**31),
)
def test_chains_of_random_shapes(batch, sizes, kinds, activation, layout, full, value):
    torch.manual_seed(value)
    depth = len(sizes) - 1
    tensors, masks = {"x": LAYOUTS[layout](torch.randn(batch, sizes[0]))}, {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        n_rows = n_out * (ROWS[activation] if i + 1 < depth else 1)
        tensors[f"w{i}"] = LAYOUTS[layout](torch.randn(n_rows, n_in) / n_in**0.5)
        tensors[f"b{i}"] = torch.randn(n_rows)
        if kinds[i] is not None:
            tensors[f"z{i}"] = make_z(kinds[i], n_in)
            masks[f"z{i}"] = wanted(tensors[f"z{i}"], full)

    def call(namespace, x, **leaves):
        w, b = ([leaves[f"{name}{i}"] for i in range(depth)] for name in "wb")
        gates = [
            Gates.from_z(leaves[f"z{i}"], full_grad=full) if f"z{i}" in leaves else None for i in range(depth)
        ]
        return namespace.gated_mlp(x, w, b, gates, activation)

    for name in [n for n in ("cpp", "torch") if l0.backends()["gated_mlp"][n] == "yes"]:
        with l0.use_backend(name):
            compare(call, tensors, dtype=torch.float32, what=name, masks=masks)
