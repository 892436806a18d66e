"""The CUDA kernels of gates, value by value, against formulas in float64; on the GPU or on the emulator."""

import pytest
import torch
from cuda_checks import DIST, EPS, launches, near, on_device
from cuda_device import DEVICE, RUNS

from l0kernels import nn, reference
from l0kernels._gates import ALIGN, compact, round_up
from l0kernels.impl import cuda
from op_checks import make_z

if not RUNS:
    pytest.skip("no GPU; test_emulated.py runs these on the CPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")


class TestSample:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "sizes",
        [[1], [127, 128, 129], [0, 5, 0], [784, 300, 100], [2049, 4500, 31], [17000], [300, 140_001]],
        ids=str,
    )
    def test_equals_reference(self, sizes, dtype):
        log_alphas = [torch.randn(n, dtype=dtype) * 3 for n in sizes]
        seed = torch.randint(2**62, (1,))
        before = launches()
        expected = on_device(torch.empty(len(sizes), dtype=dtype))
        args = [on_device(a) for a in log_alphas], on_device(seed), 5, DIST
        z, index, count = cuda.sample(*args, expected)
        assert launches() - before in (0, 1)
        for with_sums, without in zip((z, index, count), cuda.sample(*args), strict=True):
            assert torch.equal(with_sums, without)
        index, count = index.cpu().split([round_up(n) for n in sizes]), count.cpu().view(-1, 2)
        for i, (values, a) in enumerate(zip(z.cpu().split(sizes), log_alphas, strict=True)):
            exact = reference.gates.sample_z(a.double(), seed, i, 5, DIST)
            error = (values.double() - exact).abs().max().item() if len(a) else 0.0
            assert error <= 8 * EPS[dtype]
            # Order and counts are those of the values drawn, whatever their last bit.
            want_index, want_count = compact(values)
            if want_count[0] > torch.tensor(cuda.TAU) * len(a):
                want_count[1] = round_up(len(a))
            assert torch.equal(index[i], want_index)
            assert torch.equal(count[i], want_count)
            assert abs(expected[i].item() - DIST.p_open(a.double()).sum().item()) <= 16 * EPS[dtype] * len(a)

    @pytest.mark.parametrize("shift", [-30.0, 30.0])
    def test_all_closed_and_all_open(self, shift):
        z, index, count = cuda.sample(
            [on_device(torch.full((300,), shift))], on_device(torch.tensor([7])), 0, DIST
        )
        assert (z == (shift > 0)).all()
        assert torch.equal(index.cpu(), torch.cat([torch.arange(300), torch.zeros(84)]).int())
        assert count.tolist() == ([300, 384] if shift > 0 else [0, 0])

    def test_nan_is_open(self):
        a = torch.full((5,), -30.0)
        a[3] = float("nan")
        z, index, count = cuda.sample([on_device(a)], on_device(torch.tensor([7])), 0, DIST)
        assert z.isnan().tolist() == [False, False, False, True, False]
        assert index[:5].tolist() == [3, 0, 1, 2, 4]
        assert count.tolist() == [1, ALIGN]

    def test_more_vectors_than_one_launch_takes(self):
        sizes = [1 + i % 5 for i in range(100)]
        a = [torch.randn(n) for n in sizes]
        seed = torch.tensor([11])
        z, _, count = cuda.sample([on_device(t) for t in a], on_device(seed), 0, DIST)
        want = torch.cat(reference.gates.sample_zs(a, seed, 0, DIST))
        near(z, want, 8 * EPS[torch.float32], 1.0)
        assert count.view(-1, 2)[:, 0].tolist() == [int((v != 0).sum()) for v in want.split(sizes)]

    def test_expected_of_a_bank(self, public):
        gates = [nn.HardConcreteGate(n, dtype=t) for n in (31, 4500) for t in (torch.float32, torch.float64)]
        bank = nn.GateBank(torch.nn.ModuleList(gates).to(DEVICE))
        before = launches()
        expected = bank.draw(expected=True).expected
        assert launches() - before in (0, 2)
        for gate in gates:
            a = gate.log_alpha.detach()
            assert expected[gate].dtype == a.dtype
            near(expected[gate], DIST.p_open(a.double()).sum(), 16 * EPS[a.dtype], len(a))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gate_grad(self, dtype):
        z, dz = make_z("mixed", 1000, dtype), torch.randn(1000, dtype=dtype)
        got = cuda.gate_grad(on_device(dz), on_device(z), DIST).cpu()
        s = (z.double() - DIST.gamma) / (DIST.zeta - DIST.gamma)
        slope = (DIST.zeta - DIST.gamma) / DIST.beta * s * (1 - s)
        want = torch.where((z > 0) & (z < 1), dz.double() * slope, 0.0)
        assert torch.equal(got == 0, want == 0)
        near(got, want, 8 * EPS[dtype], 1.0)
