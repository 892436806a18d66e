"""Convolutions of three dimensions and transposed ones, gates per weight, gates of runs of units."""

import copy
import inspect
import io
import itertools
import math
import pickle

import pytest
import torch

import l0kernels as l0
from l0kernels import Gates, nn, reference
from op_checks import count_open

SHAPES = {1: (7,), 2: (5, 4), 3: (4, 3, 3)}
PAIRS = {name: (getattr(nn, f"L0{name}"), getattr(torch.nn, name)) for name in (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"
)}  # fmt: skip
NEW = [name for name in PAIRS if name not in ("Conv1d", "Conv2d")]
GATED = ["in", "out", "both"]
OPTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "dilation": 2},
    "groups": {"groups": 2, "padding": 1, "bias": False},
}


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def spread(layer, std=3.0):
    with torch.no_grad():
        for gate in nn.gate_modules(layer):
            gate.log_alpha.normal_(0, std)
    return layer


def make(name, gate, n_in=6, n_out=4, size=2, **options):
    options = dict(options)
    if "Transpose" in name and options.get("stride"):
        options["output_padding"] = 1
    return spread(PAIRS[name][0](n_in, n_out, size, gate=gate, **options)).double()


def image(name, n=6, batch=(2,)):
    return torch.randn(*batch, n, *SHAPES[int(name[-2])], dtype=torch.float64)


def dense_of(layer, name, weight=None):
    """torch's layer of the same geometry, as a function of x with the weights of `layer`."""
    kwargs = {"output_padding": layer.output_padding} if layer.transposed else {}
    dense = PAIRS[name][1](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        dtype=torch.float64,
        **kwargs,
    )
    values = {"weight": layer.weight if weight is None else weight}
    if layer.bias is not None:
        values["bias"] = layer.bias
    return lambda x, *args: torch.func.functional_call(dense, values, (x, *args))


def over(z, n, x):
    """z of runs, for the channels of x."""
    return z.repeat_interleave(n // len(z)).view(-1, *[1] * (x.ndim - 2))


def formula(layer, name, x, in_z=None, out_z=None, w_z=None):
    weight = None if w_z is None else layer.weight * w_z.view(layer.weight.shape)
    y = dense_of(layer, name, weight)(x if in_z is None else x * over(in_z, layer.in_channels, x))
    return y if out_z is None else y * over(out_z, layer.out_channels, y)


def drawn(layer, seed):
    torch.manual_seed(seed)
    gates = [gate for gate in (layer.in_gate, layer.out_gate, getattr(layer, "weight_gate", None)) if gate]
    if not layer.training:
        zs = [reference.eval_gates(gate.log_alpha.flatten()).z for gate in gates]
    else:
        zs = [g.z for g in reference.sample_gates([gate.log_alpha.flatten() for gate in gates])]
    found = dict(zip(gates, zs, strict=True))
    return [found.get(gate) for gate in (layer.in_gate, layer.out_gate, getattr(layer, "weight_gate", None))]


def compare(layer, y, expected, x):
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    grads = (torch.autograd.grad(t, leaves, dy, retain_graph=True) for t in (y, expected))
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for what, mine, theirs in zip(names, *grads, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, w=what: f"{w}: {text}")


@pytest.mark.parametrize("name", NEW)
def test_same_positional_arguments_as_torch(name):
    mine, dense = (list(inspect.signature(c).parameters.items()) for c in PAIRS[name])
    assert [(n, p.default) for n, p in mine[: len(dense)]] == [(n, p.default) for n, p in dense]
    assert all(p.kind is p.KEYWORD_ONLY for _, p in mine[len(dense) :])


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("gate", GATED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_is_the_dense_formula(name, gate, options, backend, training):
    layer = make(name, gate, **OPTIONS[options]).train(training)
    x = image(name).requires_grad_()
    zs = drawn(layer, 5)
    expected = formula(layer, name, x, *zs)
    torch.manual_seed(5)
    with l0.use_backend(backend):
        y = layer(x)
    if training:
        compare(layer, y, expected, x)
    torch.testing.assert_close(y, expected)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x[0]), y[0])


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_a_gate_per_weight(name, options, backend, training):
    layer = make(name, "weight", **OPTIONS[options]).train(training)
    assert layer.weight_gate.log_alpha.shape == layer.weight.shape
    x = image(name).requires_grad_()
    expected = formula(layer, name, x, *drawn(layer, 5))
    torch.manual_seed(5)
    with l0.use_backend(backend):
        y = layer(x)
    if training:
        compare(layer, y, expected, x)
    torch.testing.assert_close(y, expected)
    if training:
        nn.GateBank(layer, seed=1).draw()
        torch.testing.assert_close(layer(x), formula(layer, name, x, w_z=layer.weight_gate().z))
    with pytest.raises(ValueError, match="must be None with gate='weight', got gates"):
        layer(x, in_gates=Gates.from_z(torch.ones(6, dtype=torch.float64)))


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("opened", ["all", "none", "half", "one"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_known_gates(name, opened, backend):
    layer, x = make(name, None), image(name).requires_grad_()
    zs = []
    for n in (6, 4):
        z = torch.rand(n, dtype=torch.float64) * 0.9 + 0.05
        keep = {"all": n, "none": 0, "half": n // 2, "one": 1}[opened]
        z[torch.randperm(n)[keep:]] = 0
        zs.append(z.requires_grad_())
    gates = [Gates.from_z(z) for z in zs]
    with l0.use_backend(backend):
        for given in ((0,), (1,), (0, 1)):
            picked = [gates[i] if i in given else None for i in (0, 1)]
            y = layer(x, in_gates=picked[0], out_gates=picked[1])
            expected = formula(layer, name, x, *(zs[i] if i in given else None for i in (0, 1)))
            torch.testing.assert_close(y, expected)
            dy, leaves = torch.randn_like(y), [x, layer.weight, layer.bias, *(zs[i] for i in given)]
            mine, theirs = (torch.autograd.grad(t, leaves, dy) for t in (y, expected))
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                # a closed gate gets nothing
                b = b * (leaves[i] != 0) if i > 2 else b
                torch.testing.assert_close(a, b)
        y = layer(x, out_support=gates[1])
        torch.testing.assert_close(y, formula(layer, name, x, None, (zs[1] != 0).double()))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("closed", [[0, 3], range(6)])
def test_what_a_closed_channel_holds_stays_out(name, backend, closed):
    layer, x = make(name, None), image(name)
    z_in, z_out = torch.ones(6, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    z_in[[*closed]] = 0
    x[:, [*closed]] = torch.nan
    with torch.no_grad():
        layer.bias[1] = torch.nan
        layer.weight.select(1 if layer.transposed else 0, 2).fill_(torch.inf)
        layer.weight.select(0 if layer.transposed else 1, 0).fill_(torch.nan)
    x.requires_grad_()
    with l0.use_backend(backend):
        y = layer(x, in_gates=Gates.from_z(z_in), out_gates=Gates.from_z(z_out))
    assert y.isfinite().all()
    for grad in torch.autograd.grad(y.sum(), [x, layer.weight, layer.bias]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NEW if "Transpose" in name])
def test_output_size(name):
    layer = make(name, "both", stride=2, padding=1).eval()
    x = image(name)
    for extra in (0, 1):
        size = [2 * n - 2 + extra for n in x.shape[2:]]
        zs = drawn(layer, 0)
        y = layer(x, size)
        assert list(y.shape[2:]) == size
        expected = dense_of(layer, name)(x * over(zs[0], 6, x), size)
        torch.testing.assert_close(y, expected * over(zs[1], 4, y))
        torch.testing.assert_close(y, layer(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        layer(x, [100] * (x.ndim - 2))
    exported = nn.export(Calls(layer, size))
    torch.testing.assert_close(exported(x), y)


class Calls(torch.nn.Module):
    """Somebody's own forward."""

    def __init__(self, layer, *args):
        super().__init__()
        self.layer, self.args = layer, args

    def forward(self, x):
        return self.layer(x, *self.args)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode):
    layer = make("Conv3d", "both", padding=(1, 1, 1), padding_mode=mode)
    x = image("Conv3d").requires_grad_()
    expected = formula(layer, "Conv3d", x, *drawn(layer, 5))
    torch.manual_seed(5)
    compare(layer, layer(x), expected, x)
    layer = make("Conv3d", "both", size=3, padding="same", padding_mode=mode).eval()
    torch.testing.assert_close(layer(x), formula(layer, "Conv3d", x, *drawn(layer, 0)))


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("gate", [*GATED, "weight", None])
@pytest.mark.parametrize("options", ["strided", "groups"])
def test_from_dense_and_copies(name, gate, options):
    ours, theirs = PAIRS[name]
    options = dict(OPTIONS[options])
    if "Transpose" in name and "stride" in options:
        options["output_padding"] = 1
    dense = theirs(6, 4, 2, dtype=torch.float64, **options).eval()
    dense.weight.requires_grad_(False)
    layer = ours.from_dense(dense, gate=gate, droprate_init=0.2, lam=0.3)
    assert type(layer) is ours
    assert not layer.training
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.data_ptr() != dense.weight.data_ptr()
    x = image(name)
    with torch.no_grad():
        for found in nn.gate_modules(layer):
            assert (found.droprate_init, found.lam) == (0.2, 0.3)
            found.log_alpha.fill_(60.0)
    torch.testing.assert_close(layer(x), dense(x))
    missing, unexpected = layer.load_state_dict(dense.state_dict(), strict=False)
    assert unexpected == []
    sides = {"both": ["in", "out"], None: []}.get(gate, [gate])
    assert sorted(missing) == [f"{side}_gate.log_alpha" for side in sides]
    dense.load_state_dict({n: v for n, v in layer.state_dict().items() if "gate" not in n})
    spread(layer.train())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = ours(6, 4, 2, gate=gate, dtype=torch.float64, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(1)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("gate", ["both", "weight"])
def test_compiled_and_meta(name, gate):
    torch._dynamo.reset()
    layer, x = make(name, gate, padding=1), image(name).requires_grad_()
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compare(layer, compiled, expected, x)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == expected.shape
    twin = torch.nn.utils.skip_init(PAIRS[name][0], 4, 4, 2, gate=gate)
    assert {p.device.type for p in twin.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("gate", ["both", "weight"])
def test_bfloat16(name, gate):
    layer, x = make(name, gate), image(name)
    expected = formula(layer.eval(), name, x, *drawn(layer, 0))
    y = layer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * eps * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["Conv3d", "ConvTranspose2d"])
@pytest.mark.parametrize("gate", [*GATED, "weight"])
def test_gradcheck(name, gate):
    layer = PAIRS[name][0](2, 3, 2, gate=gate, stride=2).double()
    x = image(name, 2)[:1].requires_grad_()

    def forward(x, *_):
        torch.manual_seed(1)
        return layer(x)

    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))


# Gates that close runs of units.


def make_runs(name, k_in, k_out, groups=1, n_in=6, n_out=4):
    gates = {}
    if k_in:
        gates["in_gate"] = nn.HardConcreteGate(k_in, lam=0.3)
    if k_out:
        gates["out_gate"] = nn.HardConcreteGate(k_out, lam=0.7)
    gate = "both" if len(gates) == 2 else next(iter(gates))[: -len("_gate")]
    if name == "Linear":
        return spread(nn.L0Linear(n_in, n_out, gate=gate, **gates)).double()
    return make(name, gate, n_in=n_in, n_out=n_out, groups=groups, **gates)


RUNS = [(3, None), (2, None), (1, None), (None, 2), (None, 1), (3, 2), (6, 2), (2, 4)]


def linear_formula(layer, x, in_z, out_z, _=None):
    x = x if in_z is None else x * in_z.repeat_interleave(layer.in_features // len(in_z))
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return y if out_z is None else y * out_z.repeat_interleave(layer.out_features // len(out_z))


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", ["Linear", *PAIRS])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("training", [True, False])
def test_fewer_gates_than_units(name, runs, training):
    layer = make_runs(name, *runs).train(training)
    x = (torch.randn(5, 6, dtype=torch.float64) if name == "Linear" else image(name)).requires_grad_()
    zs = drawn(layer, 5)
    expected = linear_formula(layer, x, *zs) if name == "Linear" else formula(layer, name, x, *zs)
    torch.manual_seed(5)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    if training:
        compare(layer, y, expected, x)
        twin = copy.deepcopy(layer)
        nn.GateBank(twin, seed=3).draw()
        held = [None if g is None else g.drawn.z for g in (twin.in_gate, twin.out_gate)]
        y = twin(x)
        given = linear_formula(layer, x, *held) if name == "Linear" else formula(layer, name, x, *held)
        torch.testing.assert_close(y, given)
    twin = copy.deepcopy(layer)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    assert torch.equal(twin(x), y)


def test_runs_compile_in_chains_and_containers():
    gate = nn.HardConcreteGate(3)
    layer = spread(nn.L0Linear(12, 4, in_gate=gate))
    x = torch.randn(5, 12)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    mlp = nn.L0MLP([12, 12, 4])
    mlp.layers[1] = layer
    torch.manual_seed(1)
    gates = mlp.draw()
    x = torch.randn(5, 12)
    hidden = torch.relu(mlp.layers[0](x, gates[0]))
    torch.testing.assert_close(mlp(x, gates), layer(hidden, gates[1]))
    torch.manual_seed(1)
    y = mlp(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, mlp(x, mlp.draw()))


def containers():
    """Models in which a gate closes runs, and the shape of their input."""
    lin = lambda n, m, **k: nn.L0Linear(n, m, **k)  # noqa: E731
    gate = nn.HardConcreteGate
    yield (
        "flatten",
        nn.L0Sequential(
            nn.L0Conv2d(2, 4, 2, gate="out"), torch.nn.ReLU(), torch.nn.Flatten(), lin(48, 3, in_gate=gate(4))
        ),
        (2, 2, 5, 4),
    )
    yield (
        "flat packed",
        nn.L0Sequential(
            nn.L0Conv2d(2, 4, 2, gate="out", out_gate=gate(2)),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            lin(48, 3, in_gate=gate(8)),
        ),
        (2, 2, 5, 4),
    )
    yield (
        "convolutions",
        nn.L0Sequential(
            nn.L0Conv2d(2, 6, 2, gate="out", out_gate=gate(3)),
            torch.nn.ReLU(),
            nn.L0Conv2d(6, 4, 1, gate="both", in_gate=gate(2), out_gate=gate(2)),
        ),
        (2, 2, 5, 4),
    )
    yield "norm", nn.L0Sequential(
        nn.L0Conv2d(2, 6, 2, gate="out", out_gate=gate(3)), torch.nn.ReLU(), nn.L0Conv2d(6, 4, 1, gate="in"),
        nn.L0BatchNorm2d(4), torch.nn.ReLU(), nn.L0Conv2d(4, 2, 1, gate="in", in_gate=gate(2)),
    ), (2, 2, 5, 4)  # fmt: skip
    yield (
        "linear",
        nn.L0Sequential(
            lin(4, 6, gate="both", out_gate=gate(3)),
            torch.nn.ReLU(),
            lin(6, 6, in_gate=gate(2)),
            lin(6, 2, gate=None),
        ),
        (3, 4),
    )
    yield (
        "odd runs",
        nn.L0Sequential(nn.L0Conv2d(2, 4, 2, gate="out"), torch.nn.Flatten(), lin(48, 3, in_gate=gate(6))),
        (2, 2, 5, 4),
    )


CONTAINERS = ["flatten", "flat packed", "convolutions", "norm", "linear", "odd runs"]


# One by one an odd run and a norm show it; dynamo traces each for seconds.
COMPILED = ("norm", "odd runs")
ALONE = [
    (which, False) if which in COMPILED else pytest.param(which, False, marks=pytest.mark.long)
    for which in CONTAINERS
]


@pytest.mark.parametrize(("which", "packed"), [*((which, True) for which in CONTAINERS), *ALONE])
def test_runs_in_containers(which, packed):
    model, shape = {name: (model, shape) for name, model, shape in containers()}[which]
    spread(model.double())
    x = torch.randn(*shape, dtype=torch.float64)
    bank = nn.GateBank(model, seed=1)
    bank.draw()
    y = model(x) if packed else torch.compile(model, backend="eager")(x)
    expected = x
    for layer in model:
        expected = layer(expected)
    torch.testing.assert_close(y, expected)
    model.eval()
    y = model(x)
    for batched in (True, False):
        torch.testing.assert_close(nn.export(model, batched=batched)(x), y)
    layers = [part for part in model if isinstance(part, nn.GatedLayer)]
    if which in ("norm", "odd runs"):
        return
    sides = []
    for before, layer, behind in zip([None, *layers[:-1]], layers, [*layers[1:], None], strict=True):
        cols = [before and before.out_gate, layer.in_gate]
        rows = [layer.out_gate, behind and behind.in_gate]
        sides.append((layer, *([gate for gate in gates if gate] for gates in (cols, rows))))
    check_counts(model, sides)


# Counts and penalties, weight by weight.


def is_open(gate, unit, n, pattern):
    """Whether a unit out of n is open: a gate closes a run, or the gates of a channel's features close it."""
    if gate.n > n:
        return any(pattern[gate][unit * (gate.n // n) : (unit + 1) * (gate.n // n)])
    return bool(pattern[gate][unit // (n // gate.n)])


def entries(layer):
    """(position in the flattened weight, output, input) of each weight."""
    if isinstance(layer, torch.nn.Linear):
        sizes, groups, transposed = (layer.in_features, layer.out_features), 1, False
    else:
        sizes, groups, transposed = (layer.in_channels, layer.out_channels), layer.groups, layer.transposed
    n_in, n_out = sizes
    for at, place in enumerate(itertools.product(*map(range, layer.weight.shape))):
        a, b = place[:2]
        if transposed:
            yield at, a // (n_in // groups) * (n_out // groups) + b, a
        else:
            yield at, a, a // (n_out // groups) * (n_in // groups) + b


def sizes_of(layer):
    linear = isinstance(layer, torch.nn.Linear)
    return (layer.in_features, layer.out_features) if linear else (layer.in_channels, layer.out_channels)


def alive(layer, cols, rows, pattern):
    n_in, n_out = sizes_of(layer)
    ins = [all(is_open(gate, i, n_in, pattern) for gate in cols) for i in range(n_in)]
    outs = [all(is_open(gate, o, n_out, pattern) for gate in rows) for o in range(n_out)]
    own = getattr(layer, "weight_gate", None)
    weights = sum(
        outs[o] and ins[i] and (own is None or bool(pattern[own][at])) for at, o, i in entries(layer)
    )
    return weights, sum(outs) if layer.bias is not None else 0


def p_open(gate):
    return torch.sigmoid(gate.log_alpha.detach().double() - 2 / 3 * math.log(0.1 / 1.1)).flatten()


def check_counts(model, sides, other=0):
    """expected_l0 by enumeration of all patterns; sides: (layer, gates on inputs, gates on outputs)."""
    gates = nn.gate_modules(model)
    ps = [p_open(gate).tolist() for gate in gates]
    expected = 0.0
    for bits in itertools.product((0, 1), repeat=sum(map(len, ps))):
        rest, probability, pattern = iter(bits), 1.0, {}
        for gate, p in zip(gates, ps, strict=True):
            pattern[gate] = [next(rest) for _ in p]
            probability *= math.prod(q if bit else 1 - q for q, bit in zip(p, pattern[gate], strict=True))
        expected += probability * sum(sum(alive(*side, pattern)) for side in sides)
    assert nn.expected_l0(model).item() == pytest.approx(expected + other, rel=1e-6)
    pattern = {gate: (gate.eval_gates().z != 0).int().tolist() for gate in gates}
    assert nn.eval_l0(model) == sum(sum(alive(*side, pattern)) for side in sides) + other
    assert count_open(model) == [sum(pattern[gate]) for gate in gates]
    return pattern


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gate", [*GATED, "weight"])
def test_counts_of_one_layer(name, groups, gate):
    size = 1 if gate == "weight" else 2
    layer = spread(PAIRS[name][0](4, 2, size, groups=groups, gate=gate), 2.0)
    own = [[] if g is None else [g] for g in (layer.in_gate, layer.out_gate)]
    pattern = check_counts(layer, [(layer, *own)])
    x = image(name, 4).float()
    weights, biases = alive(layer, *own, pattern)
    y = layer.eval()(x)
    positions, reads = y[:, 0].numel(), (x if layer.transposed else y)[:, 0].numel()
    assert nn.eval_flops(layer, x.shape) == 2 * reads * weights + positions * biases
    with pytest.raises(ValueError, match="input_shape must be given for a model with convolutions"):
        nn.expected_flops(layer)


@pytest.mark.parametrize("name", ["Linear", *PAIRS])
@pytest.mark.parametrize(("k_in", "k_out", "groups"), [(2, None, 1), (1, 2, 1), (4, 1, 1), (2, 1, 2)])
def test_counts_of_runs(name, k_in, k_out, groups):
    layer = make_runs(name, k_in, k_out, 1 if name == "Linear" else groups, 4, 2)
    own = [[] if g is None else [g] for g in (layer.in_gate, layer.out_gate)]
    check_counts(layer, [(layer, *own)])


@pytest.mark.parametrize("name", ["Linear", *PAIRS])
@pytest.mark.parametrize(
    ("k", "n_in", "n_out", "groups"), [(2, 4, 6, 1), (2, 4, 4, 2), (3, 3, 3, 1), (4, 4, 4, 4)]
)
def test_one_gate_on_both_sides(name, k, n_in, n_out, groups):
    gate = nn.HardConcreteGate(k)
    if name == "Linear":
        layer = spread(nn.L0Linear(n_in, n_out, gate="both", in_gate=gate, out_gate=gate), 2.0)
    else:
        layer = spread(
            PAIRS[name][0](n_in, n_out, 1, groups=groups, gate="both", in_gate=gate, out_gate=gate), 2.0
        )
    check_counts(layer, [(layer, [gate], [gate])])
    check_penalty(layer, 0.7)


def check_penalty(layer, weight_decay):
    n_in, n_out = sizes_of(layer)
    weight = layer.weight.detach().double().flatten()
    in_gate, out_gate, own = layer.in_gate, layer.out_gate, layer.weight_gate
    total = 0.0
    for at, o, i in entries(layer):
        p = 1.0
        if in_gate is not None:
            p_in = p_open(in_gate)[i // (n_in // in_gate.n)].item()
            total += in_gate.lam * p_in
            p *= p_in
        if out_gate is not None:
            p_out = p_open(out_gate)[o // (n_out // out_gate.n)].item()
            total += out_gate.lam * p_out
            same = in_gate is out_gate and i // (n_in // in_gate.n) == o // (n_out // out_gate.n)
            p *= 1 if same else p_out
        if own is not None:
            p = p_open(own)[at].item()
            total += own.lam * p
        total += weight_decay / 2 * p * weight[at].item() ** 2
    if out_gate is not None and layer.bias is not None:
        for o in range(n_out):
            p_out = p_open(out_gate)[o // (n_out // out_gate.n)].item()
            total += p_out * (out_gate.lam + weight_decay / 2 * layer.bias[o].item() ** 2)
    assert nn.penalty(layer, weight_decay=weight_decay).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gate", [*GATED, "weight"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_penalty(name, groups, gate, weight_decay):
    check_penalty(make(name, gate, groups=groups, lam=0.3), weight_decay)


@pytest.mark.parametrize("name", ["Linear", *PAIRS])
@pytest.mark.parametrize("runs", RUNS)
def test_penalty_of_runs(name, runs):
    check_penalty(make_runs(name, *runs), 0.7)
    layer = make_runs(name, *runs)
    nn.penalty(layer, weight_decay=0.7).backward()
    for gate in nn.gate_modules(layer):
        assert gate.log_alpha.grad.all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_penalty_of_runs_in_groups(weight_decay):
    for name in PAIRS:
        check_penalty(make_runs(name, 3, 2, groups=2), weight_decay)


# Chains and export.


def chains():
    conv, g = torch.nn, nn.HardConcreteGate(4)
    last = nn.L0Conv3d(4, 3, 1, gate="in", in_gate=g)
    model = nn.L0Sequential(nn.L0Conv3d(2, 4, 2, gate=None), nn.L0BatchNorm3d(4), conv.ReLU(), last)
    yield "norm3d", model, (2, 2, 3, 4, 3), [(model[0], [], [g]), (model[3], [g], [])]
    first, last = nn.L0Conv3d(1, 3, 2, gate="out"), nn.L0Linear(12, 2, gate=None)
    model = nn.L0Sequential(first, conv.ReLU(), conv.MaxPool3d(2), conv.Flatten(), last)
    out = model[0].out_gate
    yield "flatten", model, (2, 1, 5, 3, 5), [(model[0], [], [out]), (model[4], [out], [])]
    model = torch.nn.Sequential(
        nn.L0ConvTranspose2d(2, 4, 2, 2, gate="both"), conv.ReLU(), nn.L0ConvTranspose2d(4, 3, 2, gate="in")
    )
    a, b = model[0], model[2]
    gates = [a.out_gate, b.in_gate]
    yield "decoder", model, (2, 2, 3, 4), [(a, [a.in_gate], gates), (b, gates, [])]
    model = nn.L0Sequential(
        nn.L0ConvTranspose2d(4, 4, 2, 2, groups=2, gate="both"),
        conv.ReLU(),
        nn.L0Conv2d(4, 1, 1, gate="weight"),  # its counts are of every pattern of the gates: 2 ** 12
    )
    a = model[0]
    yield "grouped", model, (2, 4, 3, 4), [(a, [a.in_gate], [a.out_gate]), (model[2], [a.out_gate], [])]
    model = nn.L0Sequential(
        nn.L0Linear(3, 4, gate=None), nn.L0BatchNorm1d(4), conv.ReLU(), nn.L0Linear(4, 2, gate="in")
    )
    g = model[3].in_gate
    yield "norm1d", model, (5, 3), [(model[0], [], [g]), (model[3], [g], [])]
    model = nn.L0Sequential(
        nn.L0Conv1d(3, 4, 2, gate="out"), nn.L0BatchNorm1d(4), conv.ReLU(), nn.L0Conv1d(4, 2, 1, gate="in")
    )
    out, g = model[0].out_gate, model[3].in_gate
    yield "norm of lengths", model, (5, 3, 6), [(model[0], [], [out, g]), (model[3], [out, g], [])]


CHAINS = ["norm3d", "flatten", "decoder", "grouped", "norm1d", "norm of lengths"]


@pytest.mark.filterwarnings("ignore:.*directly before the batch norm")
@pytest.mark.parametrize("which", CHAINS)
def test_chains(which):
    model, shape, sides = {name: rest for name, *rest in chains()}[which]
    spread(model.double(), 2.0)
    with torch.no_grad():
        for part in model:
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.bias.normal_()
                part.running_mean.normal_()
    x = torch.randn(*shape, dtype=torch.float64)
    norms = [part for part in model if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    for training in (True, False):
        model.train(training)
        nn.GateBank(model, seed=1).draw()
        before = copy.deepcopy(model.state_dict())
        y = model(x)
        after = copy.deepcopy(model.state_dict())
        model.load_state_dict(before)
        expected = x
        for part in model:
            if part in norms:
                closing = sides[0][2][0]
                expected = part(expected, closing())
            else:
                expected = part(expected)
        torch.testing.assert_close(y, expected)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, after[name])
    exported = nn.export(model)
    torch.testing.assert_close(exported(x), model(x))
    kinds = {type(part).__module__.partition(".")[0] for part in exported.modules()}
    assert kinds <= {"torch", "l0kernels"}
    assert not any(isinstance(part, nn.GatedLayer | nn.HardConcreteGate) for part in exported.modules())
    if which in ("decoder", "flatten"):  # nothing in it stays that is closed
        assert sum(p.numel() for p in exported.parameters()) == nn.eval_l0(model)
    rows = {id(part): sum(p.numel() for p in part.parameters()) for part in norms}
    if not rows:
        check_counts(model.float(), sides)
    else:
        gates = sides[0][2]
        each = 1.0
        for gate in gates:
            each = each * p_open(gate)
        pattern = {gate: (gate.eval_gates().z != 0) for gate in gates}
        total = sum(
            alive(*side, {g: (g.eval_gates().z != 0).int().tolist() for g in nn.gate_modules(model)})[k]
            for side in sides
            for k in (0, 1)
        )
        both = torch.stack([*pattern.values()]).all(0).sum().item()
        assert nn.eval_l0(model) == total + 2 * both


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("gate", [*GATED, "weight", None])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("where", ["alone", "called", "listed"])
def test_export_of_one_layer(name, gate, groups, where):
    layer = make(name, gate, groups=groups).eval()
    x = image(name)
    model = {
        "alone": lambda: layer,
        "called": lambda: Calls(layer),
        "listed": lambda: torch.nn.Sequential(layer),
    }
    model = model[where]()
    y = model(x)
    exported = nn.export(model)
    torch.testing.assert_close(exported(x), y)
    assert not any(isinstance(part, nn.GatedLayer | nn.HardConcreteGate) for part in exported.modules())


@pytest.mark.parametrize("value", [60.0, -60.0])
@pytest.mark.parametrize("name", NEW)
def test_export_of_everything_open_or_closed(name, value):
    layer = make(name, "both").eval()
    with torch.no_grad():
        for gate in nn.gate_modules(layer):
            gate.log_alpha.fill_(value)
    x = image(name)
    torch.testing.assert_close(nn.export(layer)(x), layer(x))
    assert bool(layer(x).any()) == (value > 0)


def test_bad_arguments():
    gate = nn.HardConcreteGate(4)
    for name in PAIRS:
        ours, _ = PAIRS[name]
        with pytest.raises(
            ValueError, match=r"gate must be 'in', 'out', 'both', 'weight' or None, got 'all'"
        ):
            ours(4, 4, 1, gate="all")
        with pytest.raises(ValueError, match="in_gate must be None with gate='weight'"):
            ours(4, 4, 1, gate="weight", in_gate=gate)
        with pytest.raises(
            ValueError, match=r"out_gate must have log_alpha of shape \(6,\), got \(4,\): fewer"
        ):
            ours(4, 6, 1, out_gate=gate)
        with pytest.raises(ValueError, match=r"in_gate must have log_alpha of shape \(2,\), got \(4,\)"):
            ours(2, 4, 1, gate="in", in_gate=gate)
        with pytest.raises(TypeError, match=rf"conv must be a torch\.nn\.{name}, got Linear"):
            ours.from_dense(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"in_gate must have log_alpha of shape \(6,\), got \(4,\)"):
        nn.L0Linear(6, 4, in_gate=gate)
    with pytest.raises(ValueError, match=r"log_alpha of shape \(4,\), got \(2, 2\)"):
        nn.L0Linear(4, 4, in_gate=nn.HardConcreteGate((2, 2)))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4, D, H, W\) or \(4, D, H, W\), got"):
        nn.L0Conv3d(4, 4, 1)(torch.ones(1, 5, 2, 2, 2))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 4, L\)"):
        nn.L0ConvTranspose1d(4, 4, 1)(torch.ones(1, 5, 2))
    with pytest.raises(ValueError, match="in_gates must hold 4 gates"):
        nn.L0Conv3d(4, 4, 1, gate=None)(torch.ones(1, 4, 2, 2, 2), Gates.from_z(torch.ones(2)))
    with pytest.raises(TypeError, match="x must have the dtype of weight"):
        nn.L0Conv3d(4, 4, 1)(torch.ones(1, 4, 2, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="out_support must be None for a layer whose outputs are gated"):
        nn.L0Conv3d(4, 4, 1)(torch.ones(1, 4, 2, 2, 2), out_support=Gates.from_z(torch.ones(4)))
    with pytest.raises(ValueError, match="in_gates must hold 6 gates"):
        nn.L0Linear(6, 4, in_gate=nn.HardConcreteGate(3))(torch.ones(1, 6), Gates.from_z(torch.ones(2)))
