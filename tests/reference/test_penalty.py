import itertools
import math

import pytest
import torch

from l0kernels.reference import HardConcrete, l0_penalty, l2_penalty, sample_gates

DISTS = [HardConcrete(), HardConcrete(beta=0.5, gamma=-0.2, zeta=1.3)]


def p_open(log_alpha, dist=DISTS[0]):
    """1 - CDF(0), the CDF as AMLab writes it: sigmoid(beta * logit of the stretched 0 - log_alpha)."""
    s = -dist.gamma / (dist.zeta - dist.gamma)
    return 1 - 1 / (1 + math.exp(log_alpha - dist.beta * math.log(s / (1 - s))))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (37,), (4, 5)])
def test_l0_value_and_gradient(shape, dtype, dist):
    log_alpha = (4 * randn(*shape, dtype=dtype)).detach().requires_grad_()
    penalty = l0_penalty(log_alpha, 12, lam=0.3, dist=dist)
    (grad,) = torch.autograd.grad(penalty, log_alpha)
    p = [p_open(v, dist) for v in log_alpha.flatten().tolist()]
    assert penalty.shape == ()
    assert penalty.dtype == grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert penalty.item() == pytest.approx(0.3 * 12 * sum(p), rel=8 * eps)
    expected = torch.tensor([0.3 * 12 * v * (1 - v) for v in p], dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=8 * eps * 0.3 * 12)


def test_l0_of_a_sequence():
    a, b, c = randn(5), randn(2, 3), randn(7)
    expected = l0_penalty(a, 10, lam=0.1) + l0_penalty(b, 20, lam=0.2) + l0_penalty(c, 30.5, lam=0)
    got = l0_penalty([a, b, c], [10, 20, 30.5], lam=(0.1, 0.2, 0))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(l0_penalty([a, b], 4, lam=0.5), 2 * (l0_penalty(a) + l0_penalty(b)))
    assert l0_penalty([a.float(), b]).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *t: l0_penalty(t, [1, 2, 3], lam=0.7), (a, b, c))
    assert torch.autograd.gradgradcheck(l0_penalty, a)


def test_l0_moves_closed_gates():
    log_alpha = torch.full((50,), -4.6, requires_grad=True)
    gates = sample_gates(log_alpha, seed=torch.tensor([0]))
    (gates.z.sum() + l0_penalty(log_alpha)).backward()
    closed = gates.z == 0
    assert closed.any()
    assert (log_alpha.grad[closed] > 0).all()


def test_penalties_stay_float32_under_autocast_and_for_bfloat16_weights():
    log_alpha, weight = randn(6, dtype=torch.float32), randn(4, 6, dtype=torch.float32)
    log_out = log_alpha[:4]

    def both():
        values = l0_penalty(log_alpha), l2_penalty(weight, in_log_alpha=log_alpha, out_log_alpha=log_out)
        return [*values, *torch.autograd.grad(sum(values), (log_alpha, weight))]

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both()
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)

    half = weight.detach().bfloat16().requires_grad_()
    penalty = l2_penalty(half, in_log_alpha=log_alpha)
    penalty.backward()
    assert penalty.dtype == log_alpha.grad.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(penalty, l2_penalty(half.float(), in_log_alpha=log_alpha))


@pytest.mark.parametrize("has_in", [True, False])
@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_l2_value_and_gradient(has_in, has_out, groups):
    dist = DISTS[1]
    weight = randn(8, 4 // groups, 3, 2)
    in_la, out_la = (randn(4) if has_in else None), (randn(8) if has_out else None)
    expected = 0.0
    for o, i in itertools.product(range(8), range(4 // groups)):
        channel = o // (8 // groups) * (4 // groups) + i
        p = p_open(in_la[channel].item(), dist) if has_in else 1.0
        p *= p_open(out_la[o].item(), dist) if has_out else 1.0
        expected += 0.7 / 2 * p * weight[o, i].square().sum().item()

    def call(weight, in_la, out_la):
        return l2_penalty(weight, 0.7, in_log_alpha=in_la, out_log_alpha=out_la, groups=groups, dist=dist)

    assert call(weight, in_la, out_la).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(call, (weight, in_la, out_la))


def test_l2_is_the_expectation_over_the_gates():
    weight, in_la, out_la = randn(2, 3), randn(3), randn(2)
    p_in, p_out = ([p_open(v) for v in la.tolist()] for la in (in_la, out_la))
    expected = 0.0
    for bits in itertools.product((0, 1), repeat=5):
        chance = math.prod(p if bit else 1 - p for p, bit in zip(p_in + p_out, bits, strict=True))
        mask = torch.tensor(bits[3:])[:, None] * torch.tensor(bits[:3])
        expected += chance * (weight.square() * mask).sum().item() / 2
    got = l2_penalty(weight, in_log_alpha=in_la, out_log_alpha=out_la)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_l2_without_gates_and_empty():
    weight = randn(3, 5, 2)
    torch.testing.assert_close(l2_penalty(weight, 3.0), 1.5 * weight.square().sum())
    assert l2_penalty(torch.zeros(0, 5), in_log_alpha=torch.zeros(5)).item() == 0


NAN = torch.tensor([math.nan])


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([],), {}, ValueError, "at least one tensor"),
        ((torch.zeros(3).half(),), {}, TypeError, "log_alpha must be float32 or float64"),
        (([torch.zeros(3), 1.0],), {}, TypeError, r"log_alpha\[1\] must be a torch.Tensor, got float"),
        (([torch.zeros(3), NAN],), {}, ValueError, r"log_alpha\[1\] must not hold NaN, got 1"),
        (
            ([torch.zeros(3), torch.zeros(3, device="meta")],),
            {},
            ValueError,
            r"log_alpha\[1\] must be on cpu",
        ),
        (([torch.zeros(3)] * 2, [1, 2, 3]), {}, ValueError, "group_size must be one number or.* 2, got 3"),
        ((torch.zeros(3), "many"), {}, ValueError, "group_size must be one number or"),
        ((torch.zeros(3), None), {}, TypeError, "group_size must be a number, got NoneType"),
        ((torch.zeros(3),), {"lam": math.inf}, ValueError, "lam must be finite, got inf"),
        (([torch.zeros(3)] * 2,), {"lam": [1.0]}, ValueError, "lam must be one number or.* 2, got 1"),
        ((torch.zeros(3),), {"dist": 0.5}, TypeError, "dist must be a HardConcrete"),
    ],
)
def test_bad_l0(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        l0_penalty(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("w",), {}, TypeError, "weight must be a torch.Tensor"),
        ((torch.zeros(3),), {}, ValueError, r"weight must have shape \(out, in, ...\), got \(3,\)"),
        ((torch.zeros(3, 2).int(),), {}, TypeError, "weight must have a floating-point dtype"),
        ((torch.zeros(3, 2), None), {}, TypeError, "weight_decay must be a number"),
        ((torch.zeros(3, 2), math.nan), {}, ValueError, "weight_decay must be finite"),
        ((torch.zeros(3, 2),), {"groups": 2}, ValueError, "groups must divide the 3 rows of weight, got 2"),
        ((torch.zeros(3, 2),), {"in_log_alpha": torch.zeros(3)}, ValueError, r"in_log_alpha.*\(2,\).*\(3,\)"),
        ((torch.zeros(3, 2),), {"out_log_alpha": torch.zeros(2)}, ValueError, r"out_log_alpha.*\(3,\)"),
        ((torch.zeros(3, 1),), {"in_log_alpha": NAN}, ValueError, "in_log_alpha must not hold NaN"),
        ((torch.zeros(3, 1),), {"in_log_alpha": NAN.bfloat16()}, TypeError, "in_log_alpha must be float32"),
        ((torch.zeros(1, 3),), {"out_log_alpha": NAN.to("meta")}, ValueError, "out_log_alpha must be on cpu"),
        ((torch.zeros(1, 3),), {"dist": None}, TypeError, "dist must be a HardConcrete"),
    ],
)
def test_bad_l2(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        l2_penalty(*args, **kwargs)
