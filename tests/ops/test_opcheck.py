"""Every operator under torch.library: schema, fake, registration, AOTAutograd."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import l0kernels as l0
from l0kernels import Gates, _ops
from l0kernels._arguments import ROWS
from op_checks import LAYOUTS, SEED, make_z, strided, to_list

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
        """Where a backend draws on the way; Triton and CUDA: triton/test_layers.py, cuda/test_calls.py."""
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
