"""What the CUDA kernels take and refuse: operators, calls, types, devices; on the GPU or on the emulator."""

import call_table
import fuzz_ops
import pytest
import torch
from cuda_checks import DIST, WEIGHT_LAYOUTS, gate_of, on_device
from cuda_device import DEVICE, EMULATOR, RUNS
from torch.library import opcheck

from l0kernels import _registry
from l0kernels._calls import GateGrads, LinearCall, MlpCall, Wanted
from l0kernels.impl import cuda
from op_checks import LAYOUTS, SEED, make_z, sliced, transposed

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")


class TestOpcheck:
    """Schema and fake of every operator that the kernels serve; l0_mlp is theirs alone."""

    # Without the comparison of values with AOTAutograd's: beyond the open units buffers hold anything.
    UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")
    OPS = torch.ops.l0kernels
    CONSTANTS = (DIST.beta, DIST.gamma, DIST.zeta)

    def check(self, name, *args):
        opcheck(getattr(self.OPS, name).default, (*args, "cuda"), test_utils=self.UTILITIES)

    def test_gates(self):
        a, other = on_device(torch.randn(140)), on_device(torch.randn(7))
        self.check("sample", [a, other], on_device(SEED), 3, [*self.CONSTANTS])
        self.check("sample_expected", [a, other], on_device(SEED), 3, [*self.CONSTANTS])
        self.check("gate_grad", a, on_device(make_z("mixed", 140)), [*self.CONSTANTS])
        self.check("l0_penalty", [a, other], [1.0, 2.5], [*self.CONSTANTS])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", list(LAYOUTS))
    def test_layers(self, layout, dtype):
        sizes, dist = ((6, 13), (9, 13), (5, 9), (6, 9), (6, 5)), list(self.CONSTANTS)
        x, w, w2, dy, dy2 = (WEIGHT_LAYOUTS[layout](on_device(torch.randn(s).to(dtype))) for s in sizes)
        bias, hidden = on_device(torch.randn(9).to(dtype)), gate_of(make_z("mixed", 9))
        gates = [*gate_of(make_z("mixed", 13)), *hidden]
        self.check("gated_linear", x, w, bias, gates[:3], hidden, True, dtype)
        settings = (True, dtype, [], [False, True], [True] * 5, dist)
        self.check("gated_linear_backward", dy, x, w, bias, gates[:3], hidden, *settings)
        weights, biases = [w, w2], [bias, None]
        self.check("gated_mlp", x, weights, biases, gates, "relu", dtype, False)
        _, *saved = self.OPS.gated_mlp(x, weights, biases, gates, "relu", dtype, False, "cuda")
        wanted = ([False] * 2, [True, True, True, True, False, True, True], dist)
        self.check("gated_mlp_backward", dy2, x, weights, biases, gates, "relu", dtype, False, saved, *wanted)
        a, a2 = on_device(torch.randn(13)), on_device(torch.randn(9))
        for log_alphas in ([a, a2], [None, a2], [a, None]):
            args = (x, weights, biases, log_alphas, "relu", on_device(SEED), dist, dtype)
            self.check("l0_mlp", *args)
            z, index, count, _, *saved = self.OPS.l0_mlp(*args, "cuda")
            gated = [log_alpha is not None for log_alpha in log_alphas]
            needs = [True, True, True, True, False, *gated]
            drawn = (gated, z, index, count, "relu", dtype)
            wanted = ([False] * 2, needs, dist)
            self.check("l0_mlp_backward", dy2, x, weights, biases, *drawn, saved, *wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_l2(self, dtype):
        gates = torch.float64 if dtype == torch.float64 else torch.float32
        channels_last = torch.randn(6, 5, 3, 2).contiguous(memory_format=torch.channels_last)
        for weight, groups in (
            (torch.randn(6, 5), 1),
            (transposed(torch.randn(6, 5)), 1),
            (sliced(torch.randn(6, 5)), 1),
            (torch.randn(6, 5, 3, 2), 2),
            (channels_last, 1),
            (channels_last, 2),
        ):
            weight = on_device(weight.to(dtype))
            out, in_ = (on_device(torch.randn(n, dtype=gates)) for n in (6, 5 * groups))
            bias, factor = on_device(torch.randn(6).to(dtype)), on_device(torch.ones((), dtype=gates))
            thetas, given, settings = [weight, bias], [out, in_], (0.3, list(self.CONSTANTS))
            every = ((0, 1), (0, -1), (-1, 1), (-1, -1))
            for sides in every if dtype == torch.float32 else every[:1]:
                layout = [*sides, groups, 0, -1, 1]
                self.check("coupled_penalty", thetas, given, [1.0, 0.0], layout, *settings)
                self.check("coupled_penalty_grad", thetas, given, layout, factor, *settings)


REFUSED = {
    "masked_linear weights": "it does not serve masked_linear; the triton backend does",
    "masked_linear blocks": "it does not serve block_linear; the triton backend does",
    "gated_mlp swiglu": "it does not serve 'swiglu'; triton does",
    "gated_mlp geglu": "it does not serve 'geglu'; triton does",
    "l0_mlp swiglu": "it does not serve 'swiglu'; triton does",
    "l0_mlp geglu": "it does not serve 'geglu'; triton does",
    "gated_conv2d": "it does not serve gated_conv2d; the triton backend does",
    "packed_conv2d": "it does not serve gated_conv2d; the triton backend does",
    "gated_attention": "it does not serve gated_attention; the triton backend does",
    "gated_batch_norm": "it does not serve gated_batch_norm; the triton backend does",
    "nn.L0Linear weight": "it does not serve masked_linear; the triton backend does",
    "nn.L0Linear (5, 5)": "it does not serve block_linear; the triton backend does",
    "nn.L0Conv2d": "it does not serve gated_conv2d; the triton backend does",
    "nn.L0Sequential": "it does not serve gated_conv2d; the triton backend does",
    "nn.L0FeedForward swiglu": "it does not serve 'swiglu'; triton does",
}
"""By how its name begins, what the CUDA kernels answer to a call of the table; they compute all others."""


@pytest.mark.skipif(not EMULATOR, reason="the table's and the fuzzer's tensors are on the CPU")
class TestEveryCall:
    @pytest.mark.parametrize("name", call_table.CALLS)
    def test_call(self, name, served):
        reasons = {reason for start, reason in REFUSED.items() if name.startswith(start)}
        assert {call_table.check(name, "cuda")} == (reasons or {None})

    @pytest.mark.parametrize("name", ["l0_linear in", "l0_mlp relu 1", "gated_linear both"])
    def test_call_in_float64(self, name, served):
        torch.set_default_dtype(torch.float64)
        try:
            assert call_table.check(name, "cuda") is None
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("name", fuzz_ops.OPS)
    def test_random_calls(self, name, public):
        if _registry.implements("cuda") >= fuzz_ops.PRIMITIVES[name]:
            for seed in range(fuzz_ops.count(5)):
                fuzz_ops.check(name, seed, largest=150, activations=fuzz_ops.ACTIVATIONS[:4])


class TestGatesOfAnotherType:
    @pytest.mark.parametrize("wrong", ["dtype", "strides", "index"])
    def test_refused(self, wrong):
        z, index, count = gate_of(torch.ones(20))
        z = z.double() if wrong == "dtype" else on_device(torch.ones(40))[::2] if wrong == "strides" else z
        gate = [z, index.long() if wrong == "index" else index, count]
        x, w = on_device(torch.ones(3, 20)), on_device(torch.ones(4, 20))
        message = "must be 20 contiguous" if wrong == "strides" else "must have dtype torch"
        with pytest.raises((TypeError, ValueError), match=f"^in_gate {message}"):
            cuda.linear_forward(LinearCall(x, w, None, gate, None, False, torch.float32))


def refusal(name):
    return rf"^{name} must be on the device of the matrix, {DEVICE}(:\d+)?, got meta$"


class TestOtherDevices:
    """An address of another device must not reach a kernel; a meta tensor stands for every one."""

    @pytest.mark.parametrize("name", ["rows", "cols"])
    def test_gates_of_packing(self, name):
        gates = {"rows": None, "cols": None, name: [t.to("meta") for t in gate_of(make_z("few", 300))]}
        matrix = on_device(torch.randn(300, 300))
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.pack(matrix, dtype=torch.float32, **gates)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.unpack(matrix, (300, 300), dtype=torch.float32, **gates)

    def test_theta(self):
        matrix, theta = on_device(torch.randn(300, 304)), torch.randn(300, 300, device="meta")
        gate = gate_of(make_z("few", 300))
        with pytest.raises(RuntimeError, match=refusal("theta")):
            cuda.unpack(matrix, (300, 300), gate, None, torch.float32, grads=GateGrads(theta, rows=True))
        with pytest.raises(RuntimeError, match=refusal("theta")):
            cuda.coupled_penalty([(theta, 0, -1, 1)], [on_device(torch.randn(300))], [1.0], 0.1, DIST)

    @pytest.mark.parametrize("name", ["in_gate", "out_gate", "weight"])
    def test_layer(self, name):
        x, dy = on_device(torch.randn(5, 30)), on_device(torch.randn(5, 30))
        given = {"weight": on_device(torch.randn(30, 30)), "bias": None, "in_gate": None, "out_gate": None}
        given |= {name: gate_of(make_z("few", 30)) if given[name] is None else given[name]}
        other = given[name]
        given[name] = [t.to("meta") for t in other] if isinstance(other, list) else other.to("meta")
        call = LinearCall(x, **given, scale_out=True, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.linear_forward(call)
        wanted = Wanted([False] * 2, [True] * 2 + [False] * 3, None)
        with pytest.raises(RuntimeError, match=refusal(name)):
            cuda.linear_backward(call, dy, [], wanted)

    def test_gates_of_a_chain(self):
        x, weights = on_device(torch.randn(5, 30)), [on_device(torch.randn(30, 30)) for _ in range(2)]
        gates = [None, [t.to("meta") for t in gate_of(make_z("few", 30))]]
        call = MlpCall(x, weights, [None, None], gates, "relu", torch.float32, False)
        with pytest.raises(RuntimeError, match=refusal("gates")):
            cuda.mlp_forward(call)
        saved, needs = [on_device(torch.randn(5, 30))], [True] * 3 + [False] * 4
        with pytest.raises(RuntimeError, match=refusal("gates")):
            cuda.mlp_backward(call, x, saved, Wanted([False] * 2, needs, None))
