import itertools
import math

import pytest
import torch
from torch import nn

from l0kernels.reference import (
    conv_expected_flops,
    conv_expected_params,
    conv_output_size,
    linear_expected_flops,
    linear_expected_params,
)


def chances(seed, n):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(p):
    """Every 0/1 mask of independent gates with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=len(p)):
        yield math.prod(q if b else 1 - q for q, b in zip(p.tolist(), bits, strict=True)), torch.tensor(bits)


def count_params(in_mask, out_mask, kernel, groups, bias):
    """Walks over every weight of a convolution and counts those between open channels."""
    n_in, n_out = len(in_mask), len(out_mask)
    total = 0
    for o, i in itertools.product(range(n_out), range(n_in)):
        if o // (n_out // groups) == i // (n_in // groups):
            total += math.prod(kernel) * bool(in_mask[i]) * bool(out_mask[o])
    return total + bias * int(out_mask.sum())


def count_flops(in_mask, out_mask, kernel, size, geometry, groups, bias):
    """Convolves ones with ones: each output is the number of its multiply-adds, padding included."""
    pad = geometry.get("padding", 0)
    pad = [pad, pad] if isinstance(pad, int) else list(pad)
    x = in_mask[:, None, None].expand(-1, size[0] + 2 * pad[0], size[1] + 2 * pad[1])
    weight = torch.ones(len(out_mask), len(in_mask) // groups, *kernel)
    stride, dilation = geometry.get("stride", 1), geometry.get("dilation", 1)
    macs = nn.functional.conv2d(x, weight, None, stride, 0, dilation, groups) * out_mask[:, None, None]
    return 2 * macs.sum().item() + bias * out_mask.sum().item() * macs[0].numel()


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"dilation": 2},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [(True, True), (True, False), (False, True)])
def test_linear_is_the_expectation_over_the_masks(bias, gated):
    p_in, p_out = chances(0, 3), chances(1, 4)
    params = flops = 0.0
    for (p, a), (q, b) in itertools.product(
        masks(p_in if gated[0] else torch.ones(3)), masks(p_out if gated[1] else torch.ones(4))
    ):
        n = count_params(a, b, (), 1, bias)
        params += p * q * n
        flops += p * q * (2 * (n - bias * b.sum().item()) + bias * b.sum().item())
    arguments = (p_in if gated[0] else 3, p_out if gated[1] else 4)
    assert float(linear_expected_params(*arguments, bias=bias)) == pytest.approx(params, rel=1e-12)
    assert float(linear_expected_flops(*arguments, bias=bias)) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_is_the_expectation_over_the_masks(geometry, groups, bias):
    p_in, p_out, kernel, size = chances(2, 2), chances(3, 4), (3, 2), (7, 8)
    params = flops = 0.0
    for (p, a), (q, b) in itertools.product(masks(p_in), masks(p_out)):
        params += p * q * count_params(a, b, kernel, groups, bias)
        flops += p * q * count_flops(a, b, kernel, size, geometry, groups, bias)
    got = conv_expected_params(p_in, p_out, kernel, groups, bias=bias)
    assert got.item() == pytest.approx(params, rel=1e-12)
    got = conv_expected_flops(p_in, p_out, kernel, size, **geometry, groups=groups, bias=bias)
    assert got.item() == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_gate_on_both_sides_counts_once(groups):
    p, kernel, size = chances(4, 4), (3, 3), (5, 6)
    params = flops = 0.0
    for q, mask in masks(p):
        params += q * count_params(mask, mask, kernel, groups, True)
        flops += q * count_flops(mask, mask, kernel, size, {"padding": 1}, groups, True)
    got = conv_expected_params(p, p, kernel, groups, shared=True)
    assert got.item() == pytest.approx(params, rel=1e-12)
    got = conv_expected_flops(p, p, kernel, size, padding=1, groups=groups, shared=True)
    assert got.item() == pytest.approx(flops, rel=1e-12)
    if groups == 4:  # depthwise: p, not p squared
        expected = 9 * p.sum() + p.sum()
        torch.testing.assert_close(conv_expected_params(p, p, kernel, 4, shared=True), expected)


def test_chain_agrees_with_sampled_networks():
    """LeNet-300-100 in small: the outputs' gates of one layer are the inputs' gates of the next."""
    sizes = (9, 7, 5)
    p = [chances(5 + i, n) for i, n in enumerate(sizes)]
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.bernoulli(q.expand(draws, -1), generator=generator) for q in p]
    opened = [d.sum(1) for d in drawn] + [torch.full((draws,), 3.0)]
    actual = sum(a * b + b for a, b in itertools.pairwise(opened))
    expected = sum(linear_expected_params(a, b) for a, b in itertools.pairwise([*p, 3]))
    assert abs(actual.mean() - expected) < 4.5 * actual.std() / math.sqrt(draws)


def test_zero_one_probabilities_give_the_actual_count():
    mask_in, mask_out = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0.0, 1, 1])
    assert linear_expected_params(mask_in, mask_out).item() == 3 * 2 + 2
    assert linear_expected_flops(mask_in, mask_out).item() == 2 * 3 * 2 + 2
    assert linear_expected_params(torch.zeros(4), mask_out, bias=False).item() == 0


@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"padding": "same"}, {"padding": "valid", "stride": 2}])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ungated_layers_are_dense(geometry, groups):
    layer = nn.Conv2d(4, 8, (3, 3), groups=groups, **geometry)
    n_params = sum(p.numel() for p in layer.parameters())
    assert conv_expected_params(4, 8, (3, 3), groups) == n_params
    with torch.no_grad():
        out = layer(torch.zeros(1, 4, 9, 11))[0]
    assert conv_output_size((9, 11), (3, 3), **geometry) == tuple(out.shape[1:])
    flops = conv_expected_flops(4, 8, (3, 3), (9, 11), **geometry, groups=groups)
    assert flops == out.numel() * (2 * layer.weight[0].numel() + 1)
    assert isinstance(flops, float)
    assert linear_expected_params(300, 100) == sum(p.numel() for p in nn.Linear(300, 100).parameters())


def test_lenet_figures():
    """LeNet-5-Caffe without biases: 430500 weights, 2.293 million multiply-adds."""
    convolutions = [(1, 20, 28), (20, 50, 12)]
    flops = sum(conv_expected_flops(a, b, (5, 5), (n, n), bias=False) for a, b, n in convolutions)
    flops += linear_expected_flops(800, 500, bias=False) + linear_expected_flops(500, 10, bias=False)
    weights = sum(conv_expected_params(a, b, (5, 5), bias=False) for a, b, _ in convolutions)
    weights += linear_expected_params(800, 500, bias=False) + linear_expected_params(500, 10, bias=False)
    assert weights == 430_500
    assert flops == 2 * 2_293_000


def test_one_and_three_dimensions():
    assert conv_expected_params(4, 6, (3,), 2) == nn.Conv1d(4, 6, 3, groups=2).weight.numel() + 6
    assert conv_output_size((10,), (3,), 2, 1, 2) == (4,)
    assert conv_output_size((5, 6, 7), (1, 2, 3)) == (5, 5, 5)


@pytest.mark.parametrize("shared", [False, True])
def test_counts_are_differentiable(shared):
    p_in, p_out = chances(8, 4).requires_grad_(), chances(9, 4).requires_grad_()

    def call(a, b):
        return conv_expected_flops(a, b, (2, 2), (5, 5), groups=2, shared=shared)

    assert torch.autograd.gradcheck(call, (p_in, p_out))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_expected_params([0.5], 3), TypeError, "p_in must be a tensor.*got list"),
        (lambda: linear_expected_params(3, 3.0), TypeError, "p_out must be a tensor.*got float"),
        (lambda: linear_expected_params(3, -1), ValueError, "p_out must be in"),
        (lambda: linear_expected_params(torch.ones(2, 2), 3), ValueError, r"p_in must have shape \(n,\)"),
        (
            lambda: linear_expected_params(torch.ones(2).int(), 3),
            TypeError,
            "p_in must have a floating-point",
        ),
        (lambda: linear_expected_params(torch.ones(2), torch.ones(3), shared=True), ValueError, "2 and 3"),
        (lambda: linear_expected_params(2, 2, shared=True), TypeError, "shared gate needs its probabilities"),
        (lambda: conv_expected_params(4, 6, (3, 3), 3), ValueError, "groups must divide the 4 units of p_in"),
        (
            lambda: conv_expected_params(4, 6, (3, 3), 4),
            ValueError,
            "groups must divide the 6 units of p_out",
        ),
        (lambda: conv_expected_params(4, 6, (3, 0)), ValueError, "kernel_size must be in"),
        (lambda: conv_output_size((5,), (3, 3)), ValueError, r"input_size must hold 2 extent.*\(5,\)"),
        (
            lambda: conv_output_size((5, 5), (3, 3), (1, 1, 1)),
            ValueError,
            "stride must be one number or hold 2",
        ),
        (lambda: conv_output_size((5, 5), (3, 3), 0), ValueError, "stride must be in"),
        (lambda: conv_output_size((5, 5), (3, 3), padding="full"), ValueError, "padding must be one of"),
        (lambda: conv_output_size((5, 5), (3, 3), dilation=3), ValueError, "kernel_size 3 with dilation 3"),
    ],
)
def test_bad_counts(call, error, message):
    with pytest.raises(error, match=message):
        call()
