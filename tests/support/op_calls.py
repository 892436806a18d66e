"""Calls of the operations on leaves of a few sizes, for tests of what torch makes of them."""

import torch

import l0kernels as l0
from l0kernels import Gates
from op_checks import SEED


def leaves(batch):
    torch.manual_seed(batch)
    shapes = {
        "x": (batch, 13),
        "w": (9, 13),
        "b": (9,),
        "w2": (5, 9),
        "b2": (5,),
        "a_in": (13,),
        "a_out": (9,),
        "a_weight": (9, 13),
        "a_block": (3, 4),
    }
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


CALLS = {
    "l0_linear": lambda x, w, b, a_in, a_out, **_: l0.l0_linear(
        x, w, b, in_log_alpha=a_in, out_log_alpha=a_out, seed=SEED
    ),
    "l0_linear, leading dimensions": lambda x, w, b, a_in, **_: l0.l0_linear(
        x.view(-1, 1, 13), w, b, in_log_alpha=a_in, seed=SEED
    ),
    "l0_linear, own seed": lambda x, w, b, a_in, **_: l0.l0_linear(x, w, b, in_log_alpha=a_in),
    "sample and gate": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=l0.sample_gates(a_in)),
    "support": lambda x, w, b, w2, a_out, **_: support_chain(x, w, b, w2, l0.sample_gates(a_out, seed=SEED)),
    "gated_mlp": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.gated_mlp(
        x, [w, w2], [b, b2], l0.sample_gates([a_in, a_out], seed=SEED), "gelu"
    ),
    "l0_mlp": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.l0_mlp(x, [w, w2], [b, b2], [a_in, a_out]),
    "gated product": lambda x, w, b, w2, b2, a_in, a_out, **_: l0.l0_mlp(
        x, [torch.cat((w, -w)), w2], [torch.cat((b, b + 1)), b2], [a_in, a_out], "swiglu"
    ),
    "masked_linear": lambda x, w, b, a_weight, **_: l0.masked_linear(x, w, b, a_weight, seed=SEED),
    "masked_linear, blocks": lambda x, w, b, a_block, **_: l0.masked_linear(x, w, b, a_block, block=(3, 4)),
    "masked_linear, evaluation": lambda x, w, b, a_weight, **_: l0.masked_linear(
        x, w, b, a_weight, mode="topk"
    ),
    "evaluation": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=l0.eval_gates(a_in)),
    "own gates": lambda x, w, b, a_in, **_: l0.gated_linear(x, w, b, in_gates=Gates.from_z(a_in.relu())),
    "gated_conv2d": lambda x, w, b, a_in, a_out, **_: images(
        x, w, b, l0.sample_gates([a_in, a_out], seed=SEED), padding=1, stride=2
    ),
    "depthwise": lambda x, b, w2, a_in, **_: images(
        x,
        w2[:, :1].repeat(3, 1)[:13],
        None,
        [l0.sample_gates(a_in, seed=SEED)] * 2,
        padding="same",
        groups=13,
    ),
    "l0_penalty": lambda a_in, a_out, **_: l0.l0_penalty([a_in, a_out], [2.0, 3.0], lam=0.1),
    "l2_penalty": lambda w, a_in, a_out, **_: l0.l2_penalty(w, 0.3, in_log_alpha=a_in, out_log_alpha=a_out),
}


def support_chain(x, w, b, w2, gates):
    return l0.gated_linear(l0.gated_linear(x, w, b, out_support=gates), w2, in_gates=gates)


def images(x, w, b, gates, **options):
    """gated_conv2d of images that repeat x, with kernels that repeat w."""
    x, w = x[:, :, None, None].expand(-1, -1, 5, 4), w[:, :, None, None].expand(-1, -1, 3, 3)
    return l0.gated_conv2d(x, w, b, in_gates=gates[0], out_gates=gates[1], **options)


def step(call, tensors):
    """Output and gradients, with torch's generator in a known state."""
    torch.manual_seed(99)
    y = call(**tensors)
    grads = torch.autograd.grad(y.square().sum(), list(tensors.values()), allow_unused=True)
    return [y.detach(), *grads]


def assert_all_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
