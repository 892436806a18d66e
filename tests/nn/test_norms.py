"""L0LayerNorm, L0RMSNorm, L0GroupNorm and the batch norms of one and three dimensions."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from l0kernels import Gates, nn

UNITS = {"LayerNorm": (6,), "RMSNorm": (6,), "GroupNorm": (3, 6)}
BATCH = {"BatchNorm1d": [(5, 6), (4, 6, 3)], "BatchNorm3d": [(3, 6, 2, 3, 2)]}
PAIRS = {name: (getattr(nn, f"L0{name}"), getattr(torch.nn, name)) for name in [*UNITS, *BATCH]}
Z = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def make(name, affine=True, **options):
    """A layer and torch's own with the same random parameters."""
    key = "affine" if name not in ("LayerNorm", "RMSNorm") else "elementwise_affine"
    theirs = PAIRS[name][1](*UNITS.get(name, (6,)), dtype=torch.float64, **{key: affine}, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        for value in theirs.buffers():
            if value.ndim:
                value.uniform_(0.5, 2)
    return PAIRS[name][0].from_dense(theirs), theirs


def inputs(name, which=0):
    shape = BATCH[name][which] if name in BATCH else (3, 4, 6) if name != "GroupNorm" else (3, 6, 4)
    return (torch.randn(shape, dtype=torch.float64) * 3 + 2).requires_grad_()


def dim(name):
    return -1 if name in ("LayerNorm", "RMSNorm") else 1


@pytest.mark.parametrize("name", PAIRS)
def test_same_arguments_and_state_as_torch(name):
    mine, dense = (inspect.signature(c).parameters for c in PAIRS[name])
    assert [(n, p.default) for n, p in mine.items()] == [(n, p.default) for n, p in dense.items()]
    ours, theirs = make(name)
    assert isinstance(ours, PAIRS[name][1])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = inputs(name)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert repr(ours) == repr(theirs).replace(f"{name}(", f"L0{name}(")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("given", ["none", "open"])
@pytest.mark.parametrize("training", [True, False])
def test_all_open_it_is_torchs(name, affine, given, training):
    ours, theirs = (norm.train(training) for norm in make(name, affine))
    gates = None if given == "none" else Gates.from_z(torch.full((6,), 0.4, dtype=torch.float64))
    for which in range(len(BATCH.get(name, [0]))):
        x = inputs(name, which)
        y, expected = ours(x, gates), theirs(x)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        leaves = [[x, *norm.parameters()] for norm in (ours, theirs)]
        for mine, other in zip(
            torch.autograd.grad(y, leaves[0], dy), torch.autograd.grad(expected, leaves[1], dy), strict=True
        ):
            torch.testing.assert_close(mine, other)
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("z", [Z, Z * 0])
@pytest.mark.parametrize("training", [True, False])
def test_closed_units(name, affine, z, training):
    ours = make(name, affine)[0].train(training)
    opened, at = z != 0, dim(name)
    index = opened.nonzero()[:, 0]
    before = copy.deepcopy(ours.state_dict())
    for which in range(len(BATCH.get(name, [0]))):
        x = inputs(name, which)
        some = [x.index_select(at, index)]
        if name == "GroupNorm":
            some = [x.index_select(at, index[(index // 2) == group]) for group in range(3)]
        parts = []
        for part in some:
            n = part.shape[at]
            if not n:
                continue
            sizes = (1, n) if name == "GroupNorm" else (n,)
            key = "affine" if at == 1 else "elementwise_affine"
            small = PAIRS[name][1](*sizes, dtype=torch.float64, **{key: False}).train(training)
            if name in BATCH:
                small.running_mean.copy_(ours.running_mean[index])
                small.running_var.copy_(ours.running_var[index])
            parts.append(small(part))
        expected = torch.zeros_like(x)
        if parts:
            expected = expected.index_copy(at, index, torch.cat(parts, at))
        vector = (-1, *[1] * (x.ndim - 2)) if at == 1 else (-1,)
        if affine:
            expected = expected * ours.weight.view(vector)
            if getattr(ours, "bias", None) is not None:
                expected = expected + ours.bias.view(vector)
        expected = expected * opened.view(vector)
        y = ours(x, Gates.from_z(z))
        torch.testing.assert_close(y, expected)
        assert not y.movedim(at, 0)[~opened].any()
        dy, leaves = torch.randn_like(y), [x, *ours.parameters()]
        grads = [torch.autograd.grad(t, leaves, dy) for t in (y, expected + x.sum() * 0)]
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other)
    for buffer in ("running_mean", "running_var"):
        if buffer in before:
            assert torch.equal(getattr(ours, buffer)[~opened], before[buffer][~opened])
            changed = (getattr(ours, buffer) != before[buffer])[opened]
            assert changed.all() == (training or not opened.any())


@pytest.mark.parametrize("name", BATCH)
def test_batch_norms_average_over_the_batches_of_a_channel(name):
    norm = PAIRS[name][0](2, momentum=None, dtype=torch.float64)
    means = [[], []]
    for step in range(7):
        x = torch.randn(3, 2, *BATCH[name][-1][2:], dtype=torch.float64) + step
        z = torch.tensor([step % 2, (step % 3 == 1) * 0.5], dtype=torch.float64)
        norm(x, Gates.from_z(z))
        for c in range(2):
            if z[c]:
                means[c].append(x[:, c].mean())
    for c in range(2):
        torch.testing.assert_close(norm.running_mean[c], torch.stack(means[c]).mean())
    assert norm.batches_open.tolist() == [len(means[0]), len(means[1])]
    twin = PAIRS[name][0].from_dense(norm)
    assert twin.batches_open.tolist() == norm.batches_open.tolist()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("affine", [True, False])
def test_from_dense_and_copies(name, affine):
    ours, theirs = make(name, affine, eps=0.1)
    theirs = theirs.eval()
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    ours = PAIRS[name][0].from_dense(theirs)
    assert type(ours) is PAIRS[name][0]
    assert (ours.eps, ours.training) == (0.1, False)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.data_ptr() != other.data_ptr()
        assert not mine.requires_grad
        assert mine.dtype == torch.float64
    x, gates = inputs(name), Gates.from_z(Z)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = make(name, affine, eps=0.1)[0].eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), fresh):
        assert torch.equal(twin(x, gates), ours(x, gates))


def test_norms_without_bias():
    for theirs in (torch.nn.LayerNorm(6, bias=False), torch.nn.GroupNorm(2, 6, bias=False)):
        kind = nn.L0LayerNorm if isinstance(theirs, torch.nn.LayerNorm) else nn.L0GroupNorm
        ours = kind.from_dense(theirs)
        assert ours.bias is None
        x = torch.randn(2, 6, 6)
        torch.testing.assert_close(ours(x), theirs(x))
        exported = nn.export(torch.nn.Sequential(ours))[0]
        assert type(exported) is type(theirs)
        assert exported.bias is None


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("gated", [True, False])
def test_compiled_and_meta(name, gated):
    torch._dynamo.reset()
    norm, _ = make(name)
    twin, x = copy.deepcopy(norm), inputs(name)
    gates = Gates.from_z(Z) if gated else None
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, gates)
    expected = twin(x, gates)
    torch.testing.assert_close(y, expected)
    for mine, other in zip(
        torch.autograd.grad(y.square().sum(), [x, *norm.parameters()]),
        torch.autograd.grad(expected.square().sum(), [x, *twin.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    meta = None if gates is None else Gates(*(t.to("meta") for t in gates[:3]))
    y = twin.to("meta")(x.detach().to("meta"), meta)
    assert (y.shape, y.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(name, dtype):
    norm = make(name)[0]
    x, gates = inputs(name).detach().to(dtype), Gates.from_z(Z.float())
    expected = copy.deepcopy(norm)(x.double(), Gates.from_z(Z))
    y = norm.float()(x, gates)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2 * eps * expected.abs().max().item())


class Passes(torch.nn.Module):
    """Hands the gates of one layer to a norm."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.L0Linear(4, 6, gate="in", in_gate=None), norm
        self.gate = nn.HardConcreteGate(6)

    def forward(self, x):
        return self.norm(self.first(x), self.gate())


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_export_and_counts(name):
    norm = make(name)[0].float()
    x = torch.randn(5, 4)
    model = torch.nn.Sequential(nn.L0Linear(4, 6), norm, torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[0].in_gate.log_alpha.copy_(torch.tensor([3.0, -4, 3, -4]))
    exported = nn.export(model)
    torch.testing.assert_close(exported(x), model(x))
    assert not any(type(part).__module__.startswith("l0kernels.nn.norm") for part in exported.modules())
    assert type(exported[2]) is PAIRS[name][1]
    other = sum(p.numel() for part in (norm, model[3]) for p in part.parameters())
    assert nn.eval_l0(model) == 2 * 6 + 6 + other
    model = Passes(norm).eval()
    with torch.no_grad():
        model.gate.log_alpha.copy_(torch.tensor([3.0, -4, 3, -4, -4, 3]))
    exported = nn.export(model)
    torch.testing.assert_close(exported(x), model(x))
    assert isinstance(exported.norm, PAIRS[name][0])


def test_export_of_an_image_norm():
    model = torch.nn.Sequential(nn.L0Conv2d(3, 6, 1), make("GroupNorm")[0].float(), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 4, 5)
    exported = nn.export(model)
    torch.testing.assert_close(exported(x), model(x))
    assert any(type(part) is torch.nn.GroupNorm for part in exported)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile L0GroupNorm"):
        torch.jit.script(model[1])


def test_sync_batch_norm_is_refused():
    convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(RuntimeError, match="'0' must be the L0BatchNorm3d that it was"):
        convert(nn.L0Sequential(nn.L0BatchNorm3d(3)))


def test_bad_arguments():
    gates, x = Gates.from_z(torch.ones(4)), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="normalized_shape must be of the last dimension alone"):
        nn.L0LayerNorm((3, 4))(x, gates)
    with pytest.raises(ValueError, match="normalized_shape must be of the last dimension alone"):
        nn.L0RMSNorm((3, 4))(x, gates)
    assert nn.L0LayerNorm((3, 4))(x).shape == x.shape
    with pytest.raises(ValueError, match="gates must hold 3 gates, one per channel of x"):
        nn.L0GroupNorm(1, 3)(x, gates)
    with pytest.raises(ValueError, match=r"num_channels \(3\) must be divisible by num_groups"):
        nn.L0GroupNorm(2, 3)
    with pytest.raises(ValueError, match="gates must hold 3 gates"):
        nn.L0BatchNorm1d(3)(x, gates)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        nn.L0BatchNorm1d(3)(x[None], None)
    with pytest.raises(ValueError, match="expected 5D input"):
        nn.L0BatchNorm3d(3)(x, None)
    for name, (ours, theirs) in PAIRS.items():
        with pytest.raises(TypeError, match=rf"norm must be a torch\.nn\.{theirs.__name__}, got Linear"):
            ours.from_dense(torch.nn.Linear(1, 1))
        assert name in ours.__name__
