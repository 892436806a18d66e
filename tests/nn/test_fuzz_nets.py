"""Random containers against their modules one by one and against masks: see fuzz_nets."""

from collections import Counter

import fuzz_nets
import pytest
import torch

from l0kernels import nn
from l0kernels.nn import steps

BLOCK = 25


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


@pytest.mark.parametrize("block", range(-(-fuzz_nets.NETS // BLOCK)))
def test_nets(block):
    seeds = range(BLOCK * block, min(BLOCK * (block + 1), fuzz_nets.NETS))
    smooth = sum(fuzz_nets.check_net(seed) for seed in seeds)
    assert smooth >= 0.8 * len(seeds)  # else the tolerances would say nothing


def test_nets_are_of_every_kind():
    """What the fuzz is for does occur, and equal seeds give equal nets."""
    seen = Counter()
    for seed in range(150):
        net, x = fuzz_nets.random_net(seed)
        seen.update({type(module).__name__ for module in net.modules()})
        seen["one image"] += x.ndim == 4 and x.shape[0] == 1
        seen["channels last"] += x.ndim == 4 and not x.is_contiguous()
        seen["frozen"] += not all(p.requires_grad for p in net.parameters())
        gates = [gate for gate in nn.gate_modules(net) if not gate.eval_gates().z.any()]
        seen["closed"] += bool(gates)
        seen["grouped"] += any(getattr(module, "groups", 1) > 1 for module in net.modules())
    kinds = (
        "L0Conv1d",
        "L0Conv2d",
        "L0BatchNorm2d",
        "BatchNorm2d",
        "L0Residual",
        "L0MLP",
        "L0Linear",
        "Linear",
    )
    kinds += ("Flatten", "MaxPool2d", "Sigmoid", "one image", "channels last", "frozen", "closed", "grouped")
    assert {kind: seen[kind] for kind in kinds if seen[kind] < 3} == {}
    a, b = fuzz_nets.random_net(7), fuzz_nets.random_net(7)
    assert torch.equal(a[1], b[1])
    for mine, other in zip(a[0].state_dict().items(), b[0].state_dict().items(), strict=True):
        assert mine[0] == other[0]
        torch.testing.assert_close(mine[1], other[1], rtol=0, atol=0, equal_nan=True)


def by_size_alone(step, n):
    read = step.read
    return read.gates[0] if read is not None and read.gates and read.gates[0].n == n else None


FAULTS = {
    "columns taken for channels": (steps.Step, "gate_read", by_size_alone),
    "f(0) taken for 0": (steps, "keeps_zero", steps.treats_units),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    """Containers that went wrong in these ways would not pass."""
    monkeypatch.setattr(*FAULTS[fault])

    def search():
        for seed in range(100):
            fuzz_nets.check_net(seed, backends=("torch",))

    with pytest.raises(AssertionError, match=r"net \d+, (train|eval), packed"):
        search()
