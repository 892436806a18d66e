"""export: a smaller plain model with the outputs of model.eval()."""

import copy
import io
import math
import pickle
import pickletools
import textwrap
import warnings

import fresh
import pytest
import torch

from l0kernels import nn
from op_checks import count_open


def spread(model, seed=0, std=3.0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, std)
    return model


def set_all(model, value):
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.fill_(value)
    return model


def size(model):
    return sum(p.numel() for p in model.parameters())


def check(model, *shape, plain=True):
    """Exports, compares outputs, and sees that the model itself is as before."""
    before = copy.deepcopy(model.state_dict())
    training = [module.training for module in model.modules()]
    x = torch.randn(*shape)
    small = nn.export(model)
    assert [module.training for module in model.modules()] == training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not small.training
    assert not nn.gate_modules(small)
    if plain:
        kinds = {type(module).__module__.partition(".")[0] for module in small.modules()}
        special = {type(m) for m in small.modules() if type(m).__module__.startswith("l0kernels")}
        assert kinds <= {"torch", "l0kernels"}
        assert special <= {nn.SelectInputs, nn.ScatterOutputs}
    twin = copy.deepcopy(model).eval()
    torch.testing.assert_close(small(x), twin(x), rtol=1e-5, atol=1e-5)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.parameters() if p.numel()}
    return small


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", ["in", "out", "both"])
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(kind, mode, bias):
    layer = spread(nn.L0Linear(37, 29, bias, gate=kind, eval_mode=mode))
    small = check(layer, 5, 37)
    (linear,) = (m for m in small.modules() if isinstance(m, torch.nn.Linear))
    open_units = dict(zip(nn.gate_modules(layer), count_open(layer), strict=True))
    assert linear.in_features == open_units.get(layer.in_gate, 37) == linear.weight.shape[1]
    assert linear.out_features == open_units.get(layer.out_gate, 29) == linear.weight.shape[0]
    assert size(small) < size(layer)
    assert small(torch.randn(2, 3, 37)).shape == (2, 3, 29)


def test_closed_outputs_are_exact_zeros():
    layer = spread(nn.L0Linear(37, 29, gate="both"))
    closed = layer.out_gate.eval_gates().z == 0
    y = nn.export(layer)(torch.randn(4, 37))
    assert closed.any()
    assert not y[:, closed].any()


@pytest.mark.parametrize("kind", ["weight", (3, 4)])
def test_weight_gates_leave_a_dense_weight_with_zeros(kind):
    layer = spread(nn.L0Linear(37, 29, gate=kind))
    small = check(layer, 5, 37)
    assert type(small) is torch.nn.Linear
    z = layer.spread(layer.weight_gate.eval_gates().z)
    assert torch.equal(small.weight == 0, z == 0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("gate_input", [True, False])
def test_mlp(activation, gate_input):
    mlp = spread(nn.L0MLP((40, 30, 20, 5), activation, gate_input=gate_input))
    small = check(mlp, 6, 40)
    assert size(small) == nn.eval_l0(mlp)
    widths = [m.in_features for m in small if isinstance(m, torch.nn.Linear)]
    assert widths[-len(count_open(mlp)) :] == count_open(mlp)
    assert isinstance(small[0], nn.SelectInputs) == gate_input


def test_nothing_closed():
    mlp = set_all(nn.L0MLP((4, 3, 2)), 60.0)
    small = check(mlp, 6, 4)
    assert [type(m) for m in small] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    torch.testing.assert_close(small[0].weight, mlp.layers[0].weight)
    assert type(check(set_all(nn.L0Linear(4, 3, gate="both"), 60.0), 6, 4)) is torch.nn.Linear
    assert type(check(nn.L0Linear(4, 3, gate=None), 6, 4)) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["in", "out", "both", "weight", (2, 2)])
def test_everything_closed(kind):
    layer = set_all(nn.L0Linear(4, 3, gate=kind), -60.0)
    y = check(layer, 6, 4)(torch.randn(2, 4))
    expected = torch.zeros(2, 3) if kind in ("out", "both") else layer.bias.expand(2, 3)
    torch.testing.assert_close(y, expected)


def test_mlp_with_everything_closed():
    mlp = set_all(nn.L0MLP((4, 3, 2)), -60.0)
    small = check(mlp, 6, 4)
    torch.testing.assert_close(small(torch.randn(5, 4)), mlp.layers[-1].bias.expand(5, 2))
    assert size(small) == 2


SIGMOID = torch.nn.Sigmoid
CHAINS = {
    "in": lambda: [
        nn.L0Linear(12, 9),
        torch.nn.ReLU(),
        nn.L0Linear(9, 7),
        torch.nn.Tanh(),
        nn.L0Linear(7, 4),
    ],
    "out": lambda: [
        nn.L0Linear(12, 9, gate="out"),
        torch.nn.GELU(),
        nn.L0Linear(9, 7, gate="out"),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(7, 4),
    ],
    "both": lambda: [
        nn.L0Linear(12, 9, gate="both"),
        torch.nn.SiLU(),
        nn.L0Linear(9, 7, gate="both"),
        torch.nn.ReLU(),
        nn.L0Linear(7, 4, gate="both"),
    ],
    "ungated neighbours": lambda: [
        torch.nn.Linear(12, 9),
        SIGMOID(),
        nn.L0Linear(9, 7),
        torch.nn.Linear(7, 4),
    ],
    "zero moves": lambda: [
        nn.L0Linear(12, 9, gate="out"),
        SIGMOID(),
        nn.L0Linear(9, 4, gate="both"),
        SIGMOID(),
    ],
    "weights": lambda: [
        nn.L0Linear(12, 9, gate="out"),
        nn.L0Linear(9, 7, gate="weight"),
        torch.nn.ReLU(),
        nn.L0Linear(7, 5, gate=(2, 3)),
        nn.L0Linear(5, 4),
    ],
    "nested": lambda: [
        torch.nn.Sequential(nn.L0MLP((12, 9, 7)), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Sequential(nn.L0Linear(7, 6, gate="out")), torch.nn.Identity()),
        nn.L0MLP((6, 5, 4), "gelu", gate_input=False),
    ],
    "border": lambda: [nn.L0Linear(12, 9, gate="out"), torch.nn.LayerNorm(9), nn.L0Linear(9, 4)],
    "activation first": lambda: [torch.nn.ReLU(), nn.L0Linear(12, 4, gate="both"), torch.nn.Softmax(-1)],
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_sequential(name, seed):
    model = spread(torch.nn.Sequential(*CHAINS[name]()), seed)
    small = check(model, 6, 12)
    assert size(small) < size(model) - sum(p.numel() for p in nn.gate_parameters(model)) or name == "weights"
    if name not in ("zero moves", "weights"):
        assert size(small) == nn.eval_l0(model)


def test_hidden_units_vanish_from_ungated_neighbours():
    model = spread(torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Sigmoid(), nn.L0Linear(9, 4)))
    (n_open,) = count_open(model)
    small = check(model, 6, 12)
    assert [m.weight.shape for m in (small[0], small[2])] == [(n_open, 12), (4, n_open)]


class Net(torch.nn.Module):
    """Branches, a residual sum, a shared layer and a container used as a list."""

    def __init__(self):
        super().__init__()
        self.stem = nn.L0Linear(12, 8, gate="both")
        self.body = torch.nn.Sequential(
            nn.L0Linear(8, 16, gate="out"), torch.nn.ReLU(), torch.nn.Linear(16, 8)
        )
        self.heads = torch.nn.ModuleList([nn.L0MLP((8, 6, 2)), self.body])
        self.alias = self.stem
        self.offset = torch.nn.Parameter(torch.randn(8))
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.norm(self.alias(x)) + self.offset
        return self.heads[0](h + self.body(h)), self.heads[1](h)


def test_other_modules_are_copied_around_their_exported_children():
    net = spread(Net())
    net(torch.randn(50, 12))  # running statistics
    net.eval()
    small = nn.export(net)
    x = torch.randn(6, 12)
    for mine, theirs in zip(small(x), net(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert type(small) is Net
    assert small.alias is small.stem
    assert small.heads[1] is small.body
    assert small.offset is not net.offset
    assert not nn.gate_modules(small)
    assert nn.gate_modules(net)
    assert size(small) < size(net)


def test_a_shared_gate():
    gate = nn.HardConcreteGate(9)
    model = torch.nn.Sequential(
        nn.L0Linear(12, 9, gate="out", out_gate=gate), nn.L0Linear(9, 4, in_gate=gate)
    )
    spread(model)
    small = check(model, 6, 12)
    assert small[0].out_features == small[1].in_features == count_open(model)[0]


def test_a_layer_used_twice_in_a_chain():
    layer = nn.L0Linear(8, 8, gate="in")
    dense = torch.nn.Linear(8, 8)
    model = spread(
        torch.nn.Sequential(layer, torch.nn.ReLU(), layer, torch.nn.LayerNorm(8), dense, SIGMOID(), dense)
    )
    small = check(model, 6, 8)
    dense_copies = {id(m) for m in small if isinstance(m, torch.nn.Linear) and m.weight.shape == (8, 8)}
    assert len(dense_copies) == 1


def test_frozen_parameters_stay_frozen_and_the_rest_trains():
    model = spread(nn.L0Linear(12, 4))
    model.weight.requires_grad_(False)
    small = nn.export(model)
    assert [p.requires_grad for p in small.parameters()] == [False, True]
    small.train()(torch.randn(3, 12)).sum().backward()
    assert small[1].bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = spread(nn.L0MLP((40, 30, 5))).to(dtype)
    small = nn.export(model)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small[0].index.dtype == torch.int64
    x = torch.randn(8, 40, dtype=dtype)
    exact = copy.deepcopy(model).double().eval()(x.double())
    tolerance = 8 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(small(x).double(), exact, rtol=0, atol=tolerance)


def test_saved_and_loaded(tmp_path):
    model = spread(torch.nn.Sequential(nn.L0MLP((12, 9, 7)), nn.L0Linear(7, 5, gate="both")))
    small = check(model, 6, 12)
    x = torch.randn(6, 12)
    torch.save(small, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), small(x))
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    again = nn.export(model)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("value", [None, -60.0], ids=["some open", "all closed"])
def test_torch_export_and_script(value):
    model = torch.nn.Sequential(nn.L0MLP((12, 9, 7)), nn.L0Linear(7, 5, gate="both"))
    spread(model) if value is None else set_all(model, value)
    small = check(model, 6, 12)
    x = torch.randn(6, 12)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), small(x))
    torch.testing.assert_close(torch.jit.script(small)(x), small(x))


def test_input_of_another_width():
    small = nn.export(spread(nn.L0Linear(12, 4)))
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 12\), got .*6, 13"):
        small(torch.randn(6, 13))


def test_gates_of_other_modules_are_frozen():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.HardConcreteGate(3)

        def forward(self, x):
            return x * self.gate().z

    model = spread(torch.nn.Sequential(torch.nn.Linear(3, 3), Own()))
    x = torch.randn(5, 3)
    small = nn.export(model)
    expected = model.eval()(x)
    torch.testing.assert_close(small(x), expected)
    small.train()  # the gates stay what they are
    assert torch.equal(small(x), small(x))
    torch.testing.assert_close(small(x), expected)
    assert not nn.gate_modules(small)
    assert not nn.gate_parameters(small)
    assert small[1].gate.frozen
    assert isinstance(small[1].gate.log_alpha, torch.Tensor)
    assert not small[1].gate.log_alpha.requires_grad


def test_a_subclass_with_its_own_forward_is_not_sliced():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = spread(torch.nn.Sequential(Doubled(12, 9), torch.nn.ReLU(), nn.L0Linear(9, 4)))
    small = check(model, 6, 12, plain=False)
    assert type(small[0]) is Doubled
    assert isinstance(small[2], nn.SelectInputs)


def test_nan_is_an_error():
    layer = nn.L0Linear(3, 2)
    with torch.no_grad():
        layer.in_gate.log_alpha[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        nn.export(layer)


def norms_set(model):
    """Running statistics and affine parameters away from 0 and 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
    return model


def quietly(make, *args):
    """Without the warning of gates in front of norms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args)


def check_conv(model, *shape, counted=True):
    """As check, in float64 and to its precision; `counted`: the size is that of eval_l0."""
    model = norms_set(model).double()
    x = torch.randn(*shape, dtype=torch.float64)
    small = nn.export(model)
    assert not small.training
    assert not nn.gate_modules(small)
    expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-10)
    special = {type(m) for m in small.modules() if type(m).__module__.startswith("l0kernels")}
    assert special <= {nn.SelectInputs, nn.ScatterOutputs, nn.Residual}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.parameters() if p.numel()}
    assert size(small) == nn.eval_l0(model) or not counted
    return small


def classes_in(model):
    """The classes that a pickle of `model` names."""
    file = io.BytesIO()
    pickle.Pickler(file, protocol=2).dump(model)
    names = [arg for op, arg, _ in pickletools.genops(file.getvalue()) if op.name == "GLOBAL"]
    return {name.split()[1] for name in names if name.startswith("l0kernels")}


def test_what_an_export_needs_to_be_loaded():
    torch.manual_seed(0)
    mlp = spread(nn.L0MLP([20, 12, 3]))
    assert classes_in(nn.export(mlp)) == {"SelectInputs"}
    inside = spread(nn.L0MLP([20, 12, 3], gate_input=False))
    assert classes_in(nn.export(inside)) == set()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    nn.gate_(model, torch.randn(1, 8))
    assert classes_in(nn.export(spread(model))) == set()


SAVED = textwrap.dedent(nn.export.__doc__.split("torch alone::")[1].split("It works")[0])
LOADS = """
import sys
sys.modules["l0kernels"] = None  # importing it is an error
import torch
x, y = torch.load("data.pt")
torch.testing.assert_close(torch.export.load("small.pt2").module()(x), y)
"""


def test_the_docstring_saves_what_loads_without_the_package(tmp_path):
    torch.manual_seed(0)
    model, x = spread(nn.L0MLP([20, 12, 3])), torch.randn(5, 20)
    path = str(tmp_path / "small.pt2")
    names = {"torch": torch, "export": nn.export, "model": model, "x": x, "path": path}
    exec(SAVED, names)
    x = torch.randn(9, 20)
    torch.testing.assert_close(names["loaded"](x), model.eval()(x))
    torch.save((x, model(x)), tmp_path / "data.pt")
    done = fresh.run(LOADS, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", ["in", "out", "both"])
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(kind, mode, bias):
    layer = spread(nn.L0Conv2d(11, 13, 3, 2, 1, bias=bias, gate=kind, eval_mode=mode))
    small = check_conv(layer, 2, 11, 6, 5)
    (conv,) = (m for m in small.modules() if isinstance(m, torch.nn.Conv2d))
    open_units = dict(zip(nn.gate_modules(layer), count_open(layer), strict=True))
    assert conv.in_channels == open_units.get(layer.in_gate, 11) == conv.weight.shape[1]
    assert conv.out_channels == open_units.get(layer.out_gate, 13) == conv.weight.shape[0]


def conv1d():
    return nn.L0Conv1d(4, 7, 3), RELU(), torch.nn.MaxPool1d(2), nn.L0Conv1d(7, 5, 3, gate="both")


RELU, FLATTEN = torch.nn.ReLU, torch.nn.Flatten
CONVOLUTIONS = {
    # name: (modules, input shape)
    "lenet5": (
        lambda: [
            nn.L0Conv2d(1, 8, 3),
            RELU(),
            torch.nn.MaxPool2d(2),
            nn.L0Conv2d(8, 12, 3),
            RELU(),
            torch.nn.MaxPool2d(2),
            FLATTEN(),
            nn.L0Linear(48, 20),
            RELU(),
            nn.L0Linear(20, 5),
        ],
        (3, 1, 14, 14),
    ),
    "channels of closed features": (
        lambda: [nn.L0Conv2d(2, 30, 2, gate=None), RELU(), FLATTEN(), nn.L0Linear(60, 4)],
        (3, 2, 2, 3),
    ),
    "features of closed channels": (
        lambda: [nn.L0Conv2d(2, 9, 2), torch.nn.Tanh(), FLATTEN(), torch.nn.Linear(18, 4)],
        (3, 2, 2, 3),
    ),
    "flatten at the border": (
        lambda: [nn.L0Conv2d(2, 9, 2), FLATTEN(), torch.nn.LayerNorm(18), torch.nn.Linear(18, 4)],
        (3, 2, 2, 3),
    ),
    "flatten behind a sigmoid": (
        lambda: [nn.L0Conv2d(2, 9, 2), torch.nn.Sigmoid(), FLATTEN(), nn.L0Linear(18, 4)],
        (3, 2, 2, 3),
    ),
    "recommended block": (
        lambda: [
            torch.nn.Conv2d(3, 12, 3, padding=1),
            nn.L0BatchNorm2d(12),
            RELU(),
            nn.L0Conv2d(12, 8, 3, gate="in"),
        ],
        (2, 3, 5, 5),
    ),
    "paper's block": (
        lambda: [nn.L0Conv2d(3, 12, 3), nn.L0BatchNorm2d(12), RELU(), torch.nn.Conv2d(12, 8, 3)],
        (2, 3, 7, 7),
    ),
    "norm at both borders": (
        lambda: [
            nn.L0BatchNorm2d(3),
            RELU(),
            nn.L0Conv2d(3, 12, 3, gate="both"),
            RELU(),
            nn.L0BatchNorm2d(12),
            torch.nn.Softmax2d(),
        ],
        (2, 3, 7, 7),
    ),
    "norm between two gates": (
        lambda: [nn.L0Conv2d(3, 12, 3), nn.L0BatchNorm2d(12), nn.L0Conv2d(12, 8, 1, gate="both"), RELU()],
        (2, 3, 7, 7),
    ),
    "plain norm": (
        lambda: [nn.L0Conv2d(3, 12, 3), torch.nn.BatchNorm2d(12), nn.L0Conv2d(12, 8, 1, gate="both")],
        (2, 3, 7, 7),
    ),
    "depthwise": (
        lambda: [
            nn.L0Conv2d(3, 12, 1),
            RELU(),
            torch.nn.Conv2d(12, 12, 3, groups=12),
            RELU(),
            nn.L0Conv2d(12, 5, 1, gate="in"),
        ],
        (2, 3, 5, 5),
    ),
    "1d": (conv1d, (2, 4, 16)),
    "sum": (
        lambda: [
            nn.L0Conv2d(3, 8, 1),
            nn.L0Residual(
                nn.L0Sequential(
                    nn.L0BatchNorm2d(8),
                    RELU(),
                    nn.L0Conv2d(8, 9, 3, padding=1, gate="both"),
                    RELU(),
                    nn.L0Conv2d(9, 8, 1),
                )
            ),
            nn.L0Residual(torch.nn.Conv2d(8, 6, 1), nn.L0Conv2d(8, 6, 1)),
            nn.L0BatchNorm2d(6),
            nn.L0Conv2d(6, 4, 1, gate="in"),
        ],
        (2, 3, 5, 5),
    ),
    "sum of one gate": (
        lambda: [
            conv := nn.L0Conv2d(3, 8, 1),
            nn.L0Residual(
                torch.nn.Sequential(
                    nn.L0BatchNorm2d(8), nn.L0Conv2d(8, 8, 3, padding=1, out_gate=conv.out_gate)
                )
            ),
            nn.L0BatchNorm2d(8),
            RELU(),
            torch.nn.Conv2d(8, 4, 1),
        ],
        (2, 3, 5, 5),
    ),
}
NOT_ZERO = {"plain norm", "flatten behind a sigmoid", "depthwise"}
"""Where closed outputs become constants that the next layer reads, so that they have to stay."""


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_convolutions(name, seed):
    modules, shape = CONVOLUTIONS[name]
    model = spread(quietly(lambda: nn.L0Sequential(*modules())), seed)
    small = check_conv(model, *shape, counted=name not in NOT_ZERO)
    assert size(small) < size(model) - sum(p.numel() for p in nn.gate_parameters(model))
    set_all(model, 60.0)
    small = check_conv(model, *shape)
    assert not [m for m in small.modules() if isinstance(m, nn.SelectInputs | nn.ScatterOutputs)]
    check_conv(set_all(model, -60.0), *shape, counted=False)


@pytest.mark.parametrize("name", ["recommended block", "paper's block", "norm between two gates"])
def test_in_a_plain_container_a_norm_knows_no_gates(name):
    modules, shape = CONVOLUTIONS[name]
    model = spread(torch.nn.Sequential(*modules()))
    check_conv(model, *shape, counted=name == "recommended block")


@pytest.mark.parametrize("kind", ["in", "out", "both"])
def test_groups_vanish_whole(kind):
    model = spread(
        nn.L0Sequential(nn.L0Conv2d(6, 12, 1), RELU(), nn.L0Conv2d(12, 8, 3, groups=4, gate=kind)), std=1.5
    ).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    small = nn.export(model)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-10, atol=1e-10)
    grouped = [m for m in small if isinstance(m, torch.nn.Conv2d)][-1]
    assert grouped.weight.shape[1] == 3
    assert grouped.out_channels == 2 * grouped.groups


def test_widths_between_convolutions():
    modules, shape = CONVOLUTIONS["lenet5"]
    model = spread(nn.L0Sequential(*modules())).eval()
    first, second, *_ = count_open(model)
    small = check_conv(model, *shape)
    convs = [m for m in small if isinstance(m, torch.nn.Conv2d)]
    assert convs[0].out_channels == convs[1].in_channels == first
    assert convs[1].out_channels <= second
    kinds = [type(m).__name__ for m in small]
    assert kinds[:7] == ["Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Flatten"]
    assert kinds[7:] == ["SelectInputs", "Linear", "ReLU", "Linear"]


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("value", [None, -60.0], ids=["some open", "all closed"])
def test_exported_convolutions_script_and_pickle(name, value):
    modules, shape = CONVOLUTIONS[name]
    model = quietly(lambda: nn.L0Sequential(*modules()))
    spread(model) if value is None else set_all(model, value)
    x = torch.randn(*shape)
    if value is None:
        small = nn.export(model)
        torch.testing.assert_close(torch.jit.script(small)(x), small(x))
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
        program = torch.export.export(small, (x,))
        torch.testing.assert_close(program.module()(x), small(x))


def test_channels_of_another_number():
    small = nn.export(spread(nn.L0Conv2d(6, 4, 1, gate="in")))
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 6, \*, \*\), got .*2, 5, 3, 3"):
        small(torch.randn(2, 5, 3, 3))
    assert "of 6, dim=-3" in repr(small)
