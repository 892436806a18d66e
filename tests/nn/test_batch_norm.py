"""L0BatchNorm2d: torch's batch norm of the open channels, exactly zero in the others."""

import copy

import pytest
import torch

from l0kernels import Gates, _checks, nn
from l0kernels.conv2d import pack_channels, unpack_channels

OPTIONS = [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"affine": False}]
OPTIONS += [{"track_running_stats": False}]
STATS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def make(**options):
    """A layer and torch's own with the same random parameters and statistics."""
    theirs = torch.nn.BatchNorm2d(6, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    if theirs.track_running_stats:
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(0.5, 2)
    return nn.L0BatchNorm2d.from_dense(theirs), theirs


def buffers(norm):
    return [None if norm.running_mean is None else getattr(norm, name).clone() for name in STATS]


def inputs():
    return (3 * torch.randn(4, 6, 3, 5, dtype=torch.float64) + 2).requires_grad_()


def assert_same(ours, theirs, x, y, y_theirs, stay=(), before=()):
    """Values, gradients and statistics; those of the channels `stay` are as before, which torch's are not."""
    torch.testing.assert_close(y, y_theirs)
    dy = torch.randn_like(y)
    leaves = [x, *ours.parameters()], [x, *theirs.parameters()]
    grads = [torch.autograd.grad(out, part, dy) for out, part in zip((y, y_theirs), leaves, strict=True)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
    if theirs.track_running_stats and len(before):
        with torch.no_grad():
            theirs.running_mean[stay], theirs.running_var[stay] = before[0][stay], before[1][stay]
    for mine, other in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gates", ["none", "open"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_all_open_it_is_torchs(options, gates, packed, training):
    ours, theirs = make(**options)
    ours.train(training), theirs.train(training)
    x = inputs()
    drawn = Gates.from_z(torch.ones(6, dtype=torch.float64))
    for _ in range(2):
        if packed:
            y = unpack_channels(ours(pack_channels(x, drawn)))
        else:
            y = ours(x, None if gates == "none" else drawn)
        y_theirs = theirs(x)
    assert_same(ours, theirs, x, y, y_theirs)


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_closed_channels(options, packed, training):
    ours, theirs = make(**options)
    ours.train(training), theirs.train(training)
    z = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)
    is_open = z != 0
    x, gates = inputs(), Gates.from_z(z)
    before = buffers(ours)
    y = unpack_channels(ours(pack_channels(x, gates))) if packed else ours(x, gates)
    y_theirs = torch.where(is_open.view(-1, 1, 1), theirs(x), 0.0)
    assert not y[:, ~is_open].any()
    assert_same(ours, theirs, x, y, y_theirs, ~is_open, before)


@pytest.mark.parametrize("packed", [True, False])
def test_all_closed(packed):
    ours, _ = make()
    before = buffers(ours)
    x, gates = inputs(), Gates.from_z(torch.zeros(6, dtype=torch.float64))
    y = unpack_channels(ours(pack_channels(x, gates))) if packed else ours(x, gates)
    assert y.shape == x.shape
    assert not y.any()
    for now, then in zip(buffers(ours)[:2], before[:2], strict=True):
        assert torch.equal(now, then)


def test_from_dense_copies():
    theirs = torch.nn.BatchNorm2d(3, 0.1, 0.2, dtype=torch.float64).eval()
    theirs.weight.requires_grad_(False)
    theirs.num_batches_tracked += 5
    ours = nn.L0BatchNorm2d.from_dense(theirs)
    assert type(ours) is nn.L0BatchNorm2d
    assert (ours.eps, ours.momentum, ours.training) == (0.1, 0.2, False)
    assert ours.weight.dtype == ours.running_mean.dtype == torch.float64
    assert not ours.weight.requires_grad
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert ours.state_dict()[name].data_ptr() != value.data_ptr()
    ours.load_state_dict(copy.deepcopy(theirs).state_dict())
    with pytest.raises(TypeError, match=r"norm must be a torch\.nn\.BatchNorm2d, got BatchNorm1d"):
        nn.L0BatchNorm2d.from_dense(torch.nn.BatchNorm1d(3))


def test_refuses_what_it_cannot_take():
    norm = nn.L0BatchNorm2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gates must hold 3 gates"):
        norm(torch.ones(2, 3, 2, 2), Gates.from_z(torch.ones(4)))


@pytest.mark.parametrize("gated", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiles_without_a_graph_break(gated):
    norm = nn.L0BatchNorm2d(6)
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 6, 3, 3)
    gates = Gates.from_z(torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0])) if gated else None
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, gates)
    torch.testing.assert_close(compiled, twin(x, gates))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)


def one_channel_open(step):
    """The gates of a step: of two channels one or the other is open, in the first step none."""
    return Gates.from_z(torch.tensor([step % 2, (step % 3 == 1) * 0.5], dtype=torch.float64))


@pytest.mark.parametrize("packed", [True, False])
def test_without_momentum_the_average_is_over_the_batches_of_a_channel(packed):
    norm = nn.L0BatchNorm2d(2, momentum=None, dtype=torch.float64)
    means, variances = [[], []], [[], []]
    for step in range(7):
        x, gates = torch.randn(3, 2, 4, 4, dtype=torch.float64) + step, one_channel_open(step)
        norm(pack_channels(x, gates) if packed else x, gates=None if packed else gates)
        for c in range(2):
            if gates.z[c]:
                means[c].append(x[:, c].mean())
                variances[c].append(x[:, c].var())
    for c in range(2):
        torch.testing.assert_close(norm.running_mean[c], torch.stack(means[c]).mean())
        torch.testing.assert_close(norm.running_var[c], torch.stack(variances[c]).mean())
    assert norm.num_batches_tracked == 7
    assert norm.batches_open.tolist() == [len(means[0]), len(means[1])]
    norm.reset_running_stats()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def test_update_bn():
    """torch.optim.swa_utils.update_bn sets momentum to None for a while."""
    gate = nn.HardConcreteGate(6)
    model = nn.L0Sequential(
        torch.nn.Conv2d(3, 6, 1), nn.L0BatchNorm2d(6), nn.L0Conv2d(6, 2, 1, gate="in", in_gate=gate)
    ).double()
    torch.nn.init.normal_(gate.log_alpha, -0.5)
    batches = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(6)]
    model(batches[0])  # with momentum
    bank = nn.GateBank(model, seed=3)
    seen = [[] for _ in range(6)]

    def loader():
        for x in batches:
            bank.draw()
            for c in gate.drawn.z.nonzero()[:, 0]:
                seen[c].append(model[0](x)[:, c].mean())
            yield x

    torch.optim.swa_utils.update_bn(loader(), model)
    assert {0 < len(values) < 6 for values in seen} == {True, False}
    for c, values in enumerate(seen):
        expected = torch.stack(values).mean() if values else torch.tensor(0.0, dtype=torch.float64)
        torch.testing.assert_close(model[1].running_mean[c], expected)
    assert model[1].momentum == 0.1
    model(batches[0])
    assert not hasattr(model[1], "batches_open")


def test_the_state_is_that_of_torchs():
    ours, theirs = (
        nn.L0BatchNorm2d(2, momentum=None).double(),
        torch.nn.BatchNorm2d(2, momentum=None).double(),
    )
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for step in range(3):
        ours(x, one_channel_open(step))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.num_batches_tracked == 3
    twin = nn.L0BatchNorm2d.from_dense(ours)
    assert twin.batches_open.tolist() == ours.batches_open.tolist() == [1, 1]
    ours.load_state_dict(theirs.state_dict())
    for norm in (ours, theirs):  # every channel counts the batches of the state
        norm(x + 1)
    for mine, other in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(mine, other)
    for norm in (ours, theirs):
        norm.num_batches_tracked.zero_()
        norm(x + 2)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_mean, (x + 2).mean((0, 2, 3)))


@pytest.mark.covering(2)
@pytest.mark.parametrize("order", [("open", "some"), ("some", "open"), ("some", "other"), ("none", "some")])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_second_forward_before_the_backward(order, packed, training):
    z = {
        "open": torch.ones(6, dtype=torch.float64),
        "some": torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64),
        "other": torch.tensor([0.5, 0.0, 1.0, 0.2, 0.0, 0.0], dtype=torch.float64),
    }
    norm = make()[0].train(training)
    x = inputs()

    def forward(kind):
        gates = None if kind == "none" else Gates.from_z(z[kind])
        if packed and gates is not None:
            return unpack_channels(norm(pack_channels(x, gates)))
        return norm(x, gates)

    first = None if order[0] == "none" else Gates.from_z(z[order[0]])
    twin = copy.deepcopy(norm)
    expected = torch.autograd.grad(twin(x, first).square().sum(), [x, *twin.parameters()])
    y = forward(order[0])
    norm.train()
    forward(order[1])
    grads = torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bit_activations(options, dtype, packed, training):
    norm = nn.L0BatchNorm2d(6, **options).train(training)
    x = torch.randn(4, 6, 5, 5)
    gates = Gates.from_z(torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0]))
    expected = copy.deepcopy(norm)(x.to(dtype).float(), gates)
    with torch.autocast("cpu", dtype):
        low = x.to(dtype)
        y = unpack_channels(norm(pack_channels(low, gates))) if packed else norm(low, gates)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_one_image_in_any_layout(gated, training):
    """A view of one image has any stride there; torch's own backward then takes it for another layout."""
    norm = make()[0].train(training)
    gates = Gates.from_z(torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)) if gated else None
    values = torch.randn(1, 6, 3, 5, dtype=torch.float64)
    dy = torch.randn(1, 6, 3, 5, dtype=torch.float64)
    last = values.contiguous(memory_format=torch.channels_last)
    results = []
    for x in (values, last, last.view_as(last), values.as_strided(values.shape, (7, 15, 5, 1))):
        x = x.detach().requires_grad_()
        y = copy.deepcopy(norm)(x, gates)
        results.append([y, *torch.autograd.grad(y, x, dy)])
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_closed_channel_holds_stays_out(training):
    norm = make()[0].train(training)
    z = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)
    closed = z == 0
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t[closed] = torch.nan
    x = inputs()
    y = norm(x, Gates.from_z(z))
    assert not y[:, closed].any()
    for grad in torch.autograd.grad(y.square().sum(), [x, *norm.parameters()]):
        assert grad.isfinite().all()
    assert norm.running_mean[~closed].isfinite().all()
    assert norm.running_mean[closed].isnan().all()


def test_a_norm_without_bias():
    theirs = torch.nn.BatchNorm2d(3)
    theirs.register_parameter("bias", None)
    ours = nn.L0BatchNorm2d.from_dense(theirs)
    assert ours.bias is None
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(ours(x), theirs(x))


def convolution_and_norm(momentum=None, **options):
    """A net whose batch norm's channels `gate_` has gated, and the gate."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, momentum=momentum), torch.nn.Conv2d(4, 2, 1)
    ).double()
    nn.gate_(net, torch.zeros(1, 3, 5, 5, dtype=torch.float64), **options)
    (gate,) = (module for module in net.modules() if isinstance(module, nn.HardConcreteGate))
    return net, gate


@pytest.mark.parametrize("static", [False, True])
def test_averages_of_a_gated_models_channels_are_over_the_batches_that_had_them(static, monkeypatch):
    if static:
        monkeypatch.setattr(_checks, "readable", lambda: False)
    net, gate = convolution_and_norm()
    bank, means, variances = nn.GateBank(net, seed=5), [[] for _ in range(4)], [[] for _ in range(4)]
    torch.nn.init.constant_(gate.log_alpha, -0.3)
    with torch.no_grad():
        gate.log_alpha[2] = -100  # never open
    for _ in range(9):
        x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
        bank.draw()
        net(x)
        made = torch.nn.functional.conv2d(x, net[0].weight, net[0].bias)
        for c in gate.drawn.z.nonzero()[:, 0].tolist():
            means[c].append(made[:, c].mean())
            variances[c].append(made[:, c].var())
    counts = [len(values) for values in means]
    assert {0 < n < 9 for n in counts} == {True, False}
    assert net[1].batches_open.tolist() == counts
    assert net[1].num_batches_tracked == 9
    for c, n in enumerate(counts):
        mean = torch.stack(means[c]).mean() if n else torch.tensor(0.0, dtype=torch.float64)
        var = torch.stack(variances[c]).mean() if n else torch.tensor(1.0, dtype=torch.float64)
        torch.testing.assert_close(net[1].running_mean[c], mean.detach())
        torch.testing.assert_close(net[1].running_var[c], var.detach())
    assert "1.batches_open" not in net.state_dict()


def test_a_gated_models_counts_end_with_its_gates_and_with_what_is_loaded():
    net, _ = convolution_and_norm()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    for forget in (
        lambda: net.load_state_dict(net.state_dict()),
        net[1].reset_running_stats,
        lambda: nn.ungate_(net),
    ):
        net(x)
        assert hasattr(net[1], "batches_open")
        forget()
        assert not hasattr(net[1], "batches_open")
    assert type(net[1]) is torch.nn.BatchNorm2d


def test_update_bn_of_a_gated_model():
    net, gate = convolution_and_norm(momentum=0.1)
    torch.nn.init.constant_(gate.log_alpha, 100.0)
    batches = [torch.randn(3, 3, 5, 5, dtype=torch.float64) for _ in range(4)]
    torch.optim.swa_utils.update_bn(batches, net)
    made = [torch.nn.functional.conv2d(x, net[0].weight, net[0].bias).mean((0, 2, 3)) for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack(made).mean(0).detach())
    net(batches[0])
    assert net[1].momentum == 0.1
    assert not hasattr(net[1], "batches_open")
