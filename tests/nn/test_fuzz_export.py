"""Random nets, exported: the function is that of eval(), in whatever the net is wrapped.

L0KERNELS_FUZZ_NETS says how many nets there are (see tests/support/fuzz_nets.py).
"""

import copy
import itertools
import random
import warnings

import pytest
import torch
from fuzz_nets import NETS, random_net

from l0kernels import nn

T = torch.nn


class Caller(T.Module):
    """Calls what is in it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Walker(T.Module):
    """Calls the modules of its container one by one, and does between them what nobody knows of."""

    def __init__(self, net):
        super().__init__()
        self.steps = net

    def forward(self, x):
        for step in self.steps:
            x = step(x).add(0.1)
        return x


class Hooked(Caller):
    """A module of the net is changed from outside."""

    def __init__(self, net):
        super().__init__(net)
        inner = [part for part in net.modules() if not isinstance(part, nn.HardConcreteGate)]
        random.Random(len(inner)).choice(inner).register_forward_hook(add_one)


def add_one(module, args, y):
    return y + 1


def plain(net):
    """The modules of the net in torch's container, whose norms know no gates."""
    return T.Sequential(*net) if isinstance(net, T.Sequential) else T.Sequential(net)


def within(net):
    """The net in a plain container, behind what it does not know of, and in front of itself."""
    return T.Sequential(T.Identity(), net)


def walked(net):
    return Walker(net) if isinstance(net, T.Sequential) else Caller(net)


WRAPS = (lambda net: net, plain, within, Caller, walked, Hooked, lambda net: Caller(plain(net)))


def assert_near(got, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def check(seed):
    batched = seed % 6 != 5
    net, x = random_net(seed, batched=batched)
    with warnings.catch_warnings():
        # Of gates before norms, and of what Dropout2d makes of three dimensions.
        warnings.simplefilter("ignore", UserWarning)
        model = WRAPS[seed % len(WRAPS)](net)
        for gate in nn.gate_modules(model):
            gate.eval_mode = ("paper", "median", "topk")[seed // len(WRAPS) % 3]
        small = nn.export(model.train(bool(seed % 2)), batched=batched)
        assert not nn.gate_modules(small)
        with torch.no_grad():
            expected, got = copy.deepcopy(model).eval()(x), small(x)
    assert_near(got, expected, x.dtype)
    mine = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers()) if p.numel()}
    assert not mine & {p.untyped_storage().data_ptr() for p in small.parameters() if p.numel()}


class Twice(Caller):
    def forward(self, x):
        return self.net(self.net(x))


REPEATS = (
    lambda net: nn.L0Sequential(net, T.Sigmoid(), net),
    lambda net: T.Sequential(net, T.ReLU(), net),
    lambda net: nn.L0Sequential(nn.L0Residual(net), T.Sigmoid(), nn.L0Residual(net)),
    Twice,
)


def fits_itself(seed):
    """A net whose output is an input for it, the n-th from `seed` on."""
    while True:
        net, x = random_net(seed, batched=True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", UserWarning)
            if net.eval()(x).shape == x.shape:
                return net, x
        seed += 1


@pytest.mark.parametrize("seed", range(0, NETS, 8))
def test_nets_that_are_used_twice(seed):
    net, x = fits_itself(10 * seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        model = REPEATS[seed // 8 % len(REPEATS)](net).eval()
        small, expected = nn.export(model), model(x)
        assert_near(small(x), expected, x.dtype)


def few_gates(seed):
    while True:
        net, x = random_net(seed, batched=True)
        if 1 < sum(gate.n for gate in nn.gate_modules(net)) <= 8 and x.numel():
            return net.double(), x
        seed += 1


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(n, marks=pytest.mark.long) for n in range(6, 12))]
)
def test_expected_counts_are_averages_of_counts(seed):
    net, x = few_gates(100 * seed)
    gates = nn.gate_modules(net)
    for gate in gates:
        torch.nn.init.normal_(gate.log_alpha)
    p = torch.cat([gate.dist.p_open(gate.log_alpha.detach()).flatten() for gate in gates])
    expected = nn.expected_l0(net).item(), nn.expected_flops(net, x.shape).item()
    params = flops = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=len(p)):
        pattern = torch.tensor(bits, dtype=p.dtype)
        probability = torch.where(pattern > 0, p, 1 - p).prod().item()
        for gate, part in zip(gates, pattern.split([gate.n for gate in gates]), strict=True):
            gate.log_alpha.data = (60 * part - 30).view(gate.log_alpha.shape)
        params += probability * nn.eval_l0(net)
        flops += probability * nn.eval_flops(net, x.shape)
    assert expected == pytest.approx((params, flops), rel=1e-9)


@pytest.mark.parametrize("seed", range(NETS))
def test_exports_compute_what_eval_does(seed):
    check(seed)
