"""Open gates by name, and the table of them."""

import copy

import torch

from l0kernels import nn


def close(gate, which):
    with torch.no_grad():
        gate.log_alpha.fill_(3.0)
        gate.log_alpha.view(-1)[which] = -4.0


class Shared(torch.nn.Module):
    """A gate between two layers, one of its own, and a block in a list."""

    def __init__(self):
        super().__init__()
        gate = nn.HardConcreteGate(6, lam=0.25)
        self.first = nn.L0Linear(4, 6, gate="out", out_gate=gate)
        self.second = nn.L0Linear(6, 3, gate="both", in_gate=gate)
        self.blocks = torch.nn.ModuleList([nn.L0FeedForward(3, 5)])
        self.weights = nn.L0Linear(3, 3, gate="weight")

    def forward(self, x):
        gates = self.first.out_gate()
        return self.blocks[0](self.second(self.first(x, out_gates=gates), in_gates=gates))


def test_names_and_counts():
    model = Shared()
    close(model.first.out_gate, [0, 4])
    close(model.second.out_gate, slice(None))
    close(model.weights.weight_gate, [1])
    units = nn.open_units(model)
    assert units == {
        "first.out_gate": (4, 6),
        "second.out_gate": (0, 3),
        "blocks.0.hidden_gate": (5, 5),
        "weights.weight_gate": (8, 9),
    }
    assert units["first.out_gate"].open == 4
    assert all(model.get_submodule(name).n == found.total for name, found in units.items())


def test_all_modules_of_the_package_are_named():
    model = nn.L0Sequential(
        nn.L0Conv2d(3, 4, 3, gate="out"),
        torch.nn.ReLU(),
        nn.L0Residual(nn.L0Conv2d(4, 4, 1, gate="in")),
        torch.nn.Flatten(),
        nn.L0MLP([16, 8, 2]),
    )
    assert list(nn.open_units(model)) == [
        "0.out_gate",
        "2.body.in_gate",
        "4.layers.0.in_gate",
        "4.layers.1.in_gate",
    ]
    assert nn.open_units(nn.HardConcreteGate(3)) == {"HardConcreteGate": (3, 3)}
    assert nn.open_units(torch.nn.Linear(2, 2)) == {}


def test_units_go_by_the_names_of_gate_():
    inner = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    graph = nn.gate_(inner, torch.randn(1, 4), inputs=True, block=2)
    names = [group.name for group in graph.groups]
    assert list(nn.open_units(inner)) == names
    assert [found.total for found in nn.open_units(inner).values()] == [
        -(-g.units // 2) for g in graph.groups
    ]
    model = torch.nn.ModuleDict({"net": inner, "head": nn.L0Linear(3, 2)})
    assert list(nn.open_units(model)) == [*(f"net.{name}" for name in names), "head.in_gate"]
    layers = {gate.name: gate.layers for gate in nn.summary(model).gates}
    assert layers["net.0"] == ("net.0", "net.2")
    assert layers["head.in_gate"] == ("head",)


def test_summary_agrees_with_the_counts():
    torch.manual_seed(0)
    model = Shared()
    for gate in nn.gate_modules(model):
        close(gate, torch.rand(gate.n) < 0.4)
    found = nn.summary(model)
    assert {gate.name: (gate.open, gate.total) for gate in found.gates} == nn.open_units(model)
    assert found.parameters == sum(parameter.numel() for parameter in nn.weight_parameters(model))
    assert found.open_parameters == nn.eval_l0(model)
    assert found.expected_parameters == nn.expected_l0(model).item()
    shared = found.gates[0]
    assert shared.layers == ("first", "second")
    assert shared.lam == 0.25
    expected = nn.GateBank(model).draw(expected=True).expected
    for gate, row in zip(nn.gate_modules(model), found.gates, strict=True):
        assert abs(expected[gate].item() - row.expected) < 1e-4


def test_the_table():
    torch.manual_seed(0)
    model = Shared()
    close(model.first.out_gate, [0, 4])
    lines = str(nn.summary(model)).splitlines()
    assert lines[0].split("  ")[0] == "gate"
    assert lines[1].split()[:4] == ["first.out_gate", "4", "of", "6"]
    assert lines[1].endswith("  0.25  first, second")
    assert lines[-1].startswith("parameters")
    assert f"{nn.eval_l0(model):,} of {nn.summary(model).parameters:,}" in lines[-1]
    assert len(lines) == 1 + len(nn.gate_modules(model)) + 1
    # as printed in the docstring
    printed = [line.strip() for line in nn.summary.__doc__.splitlines() if "in_gate" in line]
    mlp = str(nn.summary(nn.L0MLP([64, 64, 2]))).splitlines()[1:3]
    assert [line.split()[:4] for line in printed] == [line.split()[:4] for line in mlp]


def test_a_gate_of_many_layers_is_one_row():
    gate = nn.HardConcreteGate(4)
    model = torch.nn.Sequential(*(nn.L0Linear(4, 2, in_gate=gate) for _ in range(6)))
    (row,) = nn.summary(model).gates
    assert row.layers == tuple("012345")
    assert "0, 1, 2, 3 and 2 more" in str(nn.summary(model))


def test_looking_changes_nothing():
    model = Shared().train()
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    str(nn.summary(model))
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_gates_are_left_out():
    model = Shared()
    model.first.out_gate.freeze_()
    assert "first.out_gate" not in nn.open_units(model)
    assert [gate.name for gate in nn.summary(model).gates] == list(nn.open_units(model))
