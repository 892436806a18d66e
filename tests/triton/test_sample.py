"""Triton's sampler against the reference: bit-equal noise, near z, exact order and counts."""

import pytest
import torch

import l0kernels as l0
from l0kernels import HardConcrete, nn, reference
from l0kernels._gates import ALIGN, round_up
from l0kernels.triton_kernels import _table
from l0kernels.triton_kernels import sample as kernels
from op_checks import SEED, assert_near, make_z
from triton_device import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy tells of inf and NaN
]

DIST = HardConcrete()
DISTS = [DIST, HardConcrete(0.5, -0.3, 1.2)]


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def strided(t):
    """The same values, every other one of a larger tensor."""
    return t.repeat_interleave(2, -1)[..., ::2]


def sample(log_alphas, seed=SEED, rank=0, dist=DIST):
    """z, index and count per vector, on the CPU."""
    sizes = [len(a) for a in log_alphas]
    z, index, count = (t.cpu() for t in kernels.sample(on_device(log_alphas), seed.to(DEVICE), rank, dist))
    assert z.dtype == torch.float32
    assert index.dtype == count.dtype == torch.int32
    indices = index.split([round_up(n) for n in sizes])
    return list(zip(z.split(sizes), indices, count.view(-1, 2), strict=True))


def assert_order(z, index, count):
    closed = z == 0
    padding = torch.zeros(-len(z) % ALIGN, dtype=torch.int64)
    expected = torch.cat([(~closed).nonzero()[:, 0], closed.nonzero()[:, 0], padding])
    assert torch.equal(index.long(), expected)
    n_open = int((~closed).sum())
    many = n_open > torch.tensor(kernels.TAU).float() * len(z)
    assert count.tolist() == [n_open, round_up(len(z) if many else n_open)]


def assert_sampled(log_alphas, seed=SEED, rank=0, dist=DIST):
    eager = reference.sample_gates(log_alphas, seed=seed, rank=rank, dist=dist)
    exact = reference.sample_gates([a.double() for a in log_alphas], seed=seed, rank=rank, dist=dist)
    for got, single, double in zip(sample(log_alphas, seed, rank, dist), eager, exact, strict=True):
        assert_near(got[0], single.z, double.z, torch.float32, "z")
        assert torch.equal(got[0] == 0, double.z == 0)
        assert torch.equal(got[0] == 1, double.z == 1)
        assert_order(*got)


@pytest.mark.parametrize("dist", DISTS)
def test_every_length(dist):
    lengths = (*range(40), 127, 128, 129, 255, 256, 257, 383, 509)
    assert_sampled([torch.randn(n) * 3 for n in lengths], dist=dist)


@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 300, 784, 1024, 2053, 4096, 4097, 5003, 8192])
def test_one_vector(n):
    assert_sampled([torch.randn(n) * 3])


def test_long_and_short_vectors_together():
    assert_sampled([torch.randn(n) * 3 for n in (4999, 0, 1, 1023, 1024, 1025, 3000)])


def test_long():
    log_alpha = torch.randn(20_011 if INTERPRETED else 1_000_003)
    got = sample([log_alpha])[0]
    expected = reference.sample_gates(log_alpha, seed=SEED).z
    torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-6)  # some z of a million round to 0
    assert_order(*got)


def assert_expected(log_alphas, dist=DIST):
    args = on_device(log_alphas), SEED.to(DEVICE), 0, dist
    expected = torch.full((len(log_alphas),), float("nan"), device=DEVICE)
    for with_sums, without in zip(kernels.sample(*args, expected), kernels.sample(*args), strict=True):
        assert torch.equal(with_sums, without)
    eager = torch.stack([dist.p_open(a).sum() for a in log_alphas])
    exact = torch.stack([dist.p_open(a.double()).sum() for a in log_alphas])
    assert_near(expected.cpu(), eager, exact, torch.float32, "expected")


def test_more_chunks_than_one_step_counts(monkeypatch):
    chunk = 128  # the smallest block there is
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    monkeypatch.setattr(kernels, "ONE_PASS", chunk)
    log_alphas = [torch.randn(n) for n in (chunk * (chunk + 2) + 5, 200)]
    assert_sampled(log_alphas)
    assert_expected(log_alphas)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(
    "sizes", [[0], [1], [31], [784], [4096], [4097], [1, 31, 784], [4999, 0, 1, 1024, 3000]], ids=str
)
def test_expected(sizes, dist):
    assert_expected([torch.randn(n) * 3 for n in sizes], dist)


def test_expected_of_a_bank():
    gates = [nn.HardConcreteGate(n, device=DEVICE) for n in (31, 5000)]
    with l0.use_backend("triton"):
        expected = nn.GateBank(torch.nn.ModuleList(gates)).draw(expected=True).expected
    for gate in gates:
        exact = DIST.p_open(gate.log_alpha.detach().double()).sum()
        torch.testing.assert_close(expected[gate], exact.float(), rtol=1e-6, atol=0)


def test_opcheck():
    log_alphas = on_device([torch.randn(140), torch.randn(7)])
    args = (log_alphas, SEED.to(DEVICE), 3, [DIST.beta, DIST.gamma, DIST.zeta], "triton")
    torch.library.opcheck(torch.ops.l0kernels.sample_expected.default, args)


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("rank", [0, 1, 2**31, 2**32 - 1])
def test_seed_and_rank(seed, rank):
    assert_sampled([torch.randn(133), torch.randn(70)], torch.tensor([seed]), rank)
    assert_sampled([torch.randn(133)], torch.tensor([seed]), rank)


def test_noise_is_bit_equal():
    """u, recovered from fractional z, lies nearest to the grid point of 2^-23 where the generator put it."""
    dist = HardConcrete(beta=20.0)  # so flat that z tells u apart by several grid points at most
    z = sample([torch.zeros(4000)], dist=dist)[0][0].double()
    s = (z - dist.gamma) / (dist.zeta - dist.gamma)
    u = torch.sigmoid(dist.beta * torch.logit(s))
    expected = reference.uniform(SEED, torch.arange(4000)).double()
    assert ((z > 0) & (z < 1)).all()
    assert (u - expected).abs().max() < 1e-4


@pytest.mark.parametrize("n", [1, 200, 300, 5000])
@pytest.mark.parametrize("value", [-60.0, 60.0])
def test_all_closed_and_all_open(n, value):
    z, index, count = sample([torch.full((n,), value)])[0]
    assert torch.equal(z, torch.full((n,), float(value > 0)))
    assert torch.equal(index[:n], torch.arange(n, dtype=torch.int32))
    assert count.tolist() == ([n, round_up(n)] if value > 0 else [0, 0])


@pytest.mark.parametrize("n", [1000, 5000])
def test_extent_around_tau(n):
    """Above the open share TAU the extent covers the dimension, at it it does not."""
    limit = int(n * kernels.TAU)
    for n_open, extent in ((limit, round_up(limit)), (limit + 1, round_up(n))):
        log_alpha = torch.full((n,), -60.0)
        log_alpha[torch.randperm(n)[:n_open]] = 60.0
        z, index, count = sample([log_alpha])[0]
        assert count.tolist() == [n_open, extent]
        assert_order(z, index, count)


@pytest.mark.parametrize("n", [100, 5000])
def test_nan_is_open_and_stays(n):
    log_alpha = torch.full((n,), -60.0)
    log_alpha[n // 2] = float("nan")
    z, index, count = sample([log_alpha])[0]
    assert z.isnan().nonzero().tolist() == [[n // 2]]
    assert index[0] == n // 2
    assert count.tolist() == [1, 128]


def test_strided_and_unaligned():
    a, b = torch.randn(700), torch.randn(301)
    flat = torch.cat([torch.zeros(1), a, b]).to(DEVICE)
    got = kernels.sample([flat[1:701], strided(b.to(DEVICE))], SEED.to(DEVICE), 0, DIST)
    expected = kernels.sample(on_device([a, b]), SEED.to(DEVICE), 0, DIST)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert torch.equal(
        kernels.sample([flat[1:701]], SEED.to(DEVICE), 0, DIST)[1],
        kernels.sample(on_device([a]), SEED.to(DEVICE), 0, DIST)[1],
    )


def test_writes_nothing_else(monkeypatch):
    """Outputs are slices of larger poisoned buffers; what lies around them stays."""
    buffers = []

    def empty(n, dtype, device):
        value = -7 if dtype == torch.int32 else float("nan")
        buffers.append((torch.full((n + 512,), value, dtype=dtype, device=device), n))
        return buffers[-1][0][256 : 256 + n]

    log_alphas = on_device([torch.randn(n) for n in (1, 130, 5000, 0)])
    expected = empty(len(log_alphas), torch.float32, DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty", empty)
        kernels.sample(log_alphas, SEED.to(DEVICE), 0, DIST, expected)
    for buffer, n in buffers:
        untouched = torch.cat([buffer[:256], buffer[256 + n :]])
        assert (untouched.isnan() if buffer.is_floating_point() else untouched == -7).all()
        assert not buffer[256 : 256 + n].isnan().any()
        assert (buffer[256 : 256 + n] >= 0).all()


def test_new_values_at_old_addresses():
    """A table holds addresses alone."""
    log_alphas = on_device([torch.randn(200), torch.randn(300)])
    first = kernels.sample(log_alphas, SEED.to(DEVICE), 0, DIST)[0]
    for log_alpha in log_alphas:
        log_alpha.neg_()
    second = kernels.sample(log_alphas, SEED.to(DEVICE), 0, DIST)[0]
    expected = reference.sample_gates([a.cpu() for a in log_alphas], seed=SEED)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second.cpu(), torch.cat([g.z for g in expected]))


class TestTable:
    def test_is_built_once_per_key(self):
        device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
        calls = []

        def build():
            calls.append(1)
            return [len(calls), 2**62]

        first = _table.device_table("once", device, build)
        assert _table.device_table("once", device, build) is first
        assert first.tolist() == [1, 2**62]
        assert _table.device_table("twice", device, build).tolist() == [2, 2**62]

    def test_is_bounded(self):
        device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
        for i in range(2 * _table._LIMIT):
            assert _table.device_table(("many", i), device, lambda i=i: [i]).item() == i
        assert len(_table._tables) <= _table._LIMIT


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (2048,), (37, 41)])
def test_gate_grad(shape, dist):
    n = torch.Size(shape).numel()
    z = make_z("mixed", n).reshape(shape)
    dz = torch.randn(shape)
    z64 = z.double()
    s = (z64 - dist.gamma) / (dist.zeta - dist.gamma)
    fractional = (z > 0) & (z < 1)
    exact = dz.double() * (dist.zeta - dist.gamma) / dist.beta * s * (1 - s) * fractional
    for layout in (torch.clone, strided):
        got = kernels.gate_grad(layout(dz.to(DEVICE)), layout(z.to(DEVICE)), dist).cpu()
        assert_near(got, exact.float(), exact, torch.float32, "dlog_alpha")
        assert torch.equal(got != 0, fractional & (dz != 0))


def test_gate_grad_of_saturated_gates_is_zero_whatever_dz_is():
    z = torch.tensor([0.0, 1.0, 0.5, float("nan"), 0.0], device=DEVICE)
    dz = torch.tensor([float("nan"), float("inf"), 2.0, 1.0, float("-inf")], device=DEVICE)
    got = kernels.gate_grad(dz, z, DIST).cpu()
    assert got[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert got[2] > 0


def test_gate_grad_of_an_expanded_gradient():
    z = make_z("mixed", 300).to(DEVICE)
    got = kernels.gate_grad(torch.ones((), device=DEVICE).expand(300), z, DIST)
    assert torch.equal(got, kernels.gate_grad(torch.ones(300, device=DEVICE), z, DIST))
