"""L0Sequential over the GPU's layout of packed channels: the values of the CPU's, whatever memory held."""

import copy
import itertools

import fuzz_nets
import pytest
import torch
from sequential_nets import block, lenet5, paper_block, spread, wide_block

import l0kernels as l0
from l0kernels import nn
from triton_device import DEVICE, INTERPRETED

CASES = {
    "lenet5": (lenet5, (3, 1, 14, 14)),
    "recommended block": (block, (2, 3, 5, 6)),
    "paper's block": (paper_block, (2, 3, 5, 6)),
    "wide block": (wide_block, (2, 6, 7, 7)),
}


EVERY = [(name, None) for name in CASES] + [("wide block", 60.0), ("recommended block", -60.0)]
LONG = [(name, log_alpha) for name in CASES for log_alpha in (60.0, -60.0) if (name, log_alpha) not in EVERY]
LONG.remove(("lenet5", 60.0))  # slow, interpreted
EVERY += [pytest.param(case, marks=pytest.mark.long) for case in LONG]


@pytest.mark.covering(1)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_equal_to_the_exact_layout(poison, case, training):
    name, log_alpha = case
    make, shape = CASES[name]
    model = spread(make()).train(training)
    if log_alpha is not None:
        with torch.no_grad():
            for gate in nn.gate_modules(model):
                gate.log_alpha.fill_(log_alpha)
    x = torch.randn(shape)
    with l0.use_backend("torch"):
        nn.GateBank(model, seed=7).draw()
    gates = [gate.drawn for gate in nn.gate_modules(model)]
    found = []
    for backend, device in (("torch", "cpu"), ("triton", DEVICE)):
        twin = copy.deepcopy(model).to(device)
        values = x.detach().to(device).requires_grad_()
        drawn = {}
        for gate, one in zip(nn.gate_modules(twin), gates, strict=True):
            one = one if training else gate.eval_gates()
            drawn[gate] = l0.Gates(*(t.to(device) for t in one[:3]))
        with l0.use_backend(backend):
            y = twin(values, drawn)
            y.backward(torch.ones_like(y))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
        found.append([t.detach().cpu() for t in (y, values.grad, *grads, *twin.buffers())])
    for exact, capacity in zip(*found, strict=True):
        torch.testing.assert_close(capacity, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="the fuzz makes nets of the CPU")
@pytest.mark.parametrize("start", [0, 100, 200, 300])
def test_random_nets(seeded, start):
    """The first small one behind each start."""
    for seed in itertools.count(start):
        net, x = fuzz_nets.random_net(seed)
        if x.ndim == 4 and 0 < x.numel() <= 300 and sum(p.numel() for p in net.parameters()) < 400:
            x = x.detach().float().requires_grad_(x.requires_grad)
            fuzz_nets.check_net(seed, net=(net.float(), x), backends=("triton",))
            break
