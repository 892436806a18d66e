"""The training of l0kernels.nn's docstring, as printed: it finds the inputs that matter."""

import textwrap

import pytest
import torch

import l0kernels as l0

FEATURES, USEFUL, N, EPOCHS = 64, 5, 1000, 50
SNIPPET = textwrap.dedent(l0.nn.__doc__.split("::\n\n")[1])


def data(seed):
    """Points on two sides of a plane that five of the features make, and which features these are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, FEATURES, generator=generator)
    useful = torch.randperm(FEATURES, generator=generator)[:USEFUL]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    return x, (x[:, useful] @ signs > 0).long(), useful.sort().values


def open_inputs(seed, lam=None):
    """Runs the docstring on them; returns the inputs that are open in eval(), those of use, and its names."""
    x, target, useful = data(seed)
    torch.manual_seed(seed)
    batches = ((x[i], target[i]) for _ in range(EPOCHS) for i in torch.randperm(N).split(100))
    code = SNIPPET if lam is None else SNIPPET.replace("64, 2]", f"64, 2], lam={lam}")
    names = {"torch": torch, "l0": l0, "batches": batches, "N": N}
    exec(code, names)
    gates = names["model"].eval().layers[0].in_gate()
    return gates.z.nonzero()[:, 0], useful, names | {"x": x, "target": target}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_useful_inputs_stay_open_and_no_others(seed, seeded, capsys):
    found, useful, names = open_inputs(seed)
    assert torch.equal(found, useful)
    assert f"{USEFUL} of {FEATURES}" in capsys.readouterr().out
    model, small, x = names["model"], names["small"], names["x"]
    torch.testing.assert_close(small(x), model(x))
    assert (small(x).argmax(1) == names["target"]).double().mean() > 0.95
    assert sum(p.numel() for p in small.parameters()) == l0.nn.eval_l0(model) < 0.15 * 4290


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("lam", [0.1 / 3, 0.3])
def test_no_fine_tuning_of_lam_is_needed(lam, seeds, seeded):
    results = [open_inputs(seed, lam) for seed in range(seeds)]
    assert sum(torch.equal(found, useful) for found, useful, _ in results) >= 2 * seeds / 3
    assert all(abs(len(found) - USEFUL) <= 2 for found, _, _ in results)


def test_lam_as_printed_is_the_default():
    assert l0.nn.HardConcreteGate(2).lam == 0.1
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    l0.nn.gate_(linear, torch.randn(1, 4))
    layers = [linear, l0.nn.L0Linear(2, 2), l0.nn.L0MLP([2, 2]), l0.nn.L0FeedForward(2, 2)]
    layers += [getattr(l0.nn, f"L0Conv{d}d")(2, 2, 1) for d in (1, 2, 3)]
    layers += [getattr(l0.nn, f"L0ConvTranspose{d}d")(2, 2, 1) for d in (1, 2, 3)]
    for layer in layers:
        assert [gate.lam for gate in l0.nn.gate_modules(layer)] == [0.1], layer


def test_groups_of_the_quickstart():
    groups = l0.nn.parameter_groups(l0.nn.L0MLP([3, 3]))
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {"weights": (1e-3, 0.1), "gates": (0.02, 0.0)}
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(l0.nn.L0MLP([3, 3]), gate_lr=None), lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
