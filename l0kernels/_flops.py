"""FLOPs of the operators for ``torch.utils.flop_counter``: those of the dense layers, as torch counts them.

Closed gates leave less of them; ``nn.expected_flops`` says how much less.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch

from ._compat import mode_stack

Shape = tuple[int, ...]


def _linear(x: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    return 2 * x[0] * prod(weight)


def _linear_backward(dy: Shape, x: Shape, weight: Shape, *rest: Any, out_shape: Any = None) -> int:
    dx, dw, _, *gates = rest[-3]
    return _linear(x, weight) * (dx + (dw or any(gates)))


def _block_backward(dy: Shape, x: Shape, weight: Shape, *rest: Any, out_shape: Any = None) -> int:
    dx, dw, _, dz = rest[-3]
    return _linear(x, weight) * (dx + (dw or dz))


def _mlp(x: Shape, weights: list[Shape], *_: Any, out_shape: Any = None) -> int:
    return 2 * x[0] * sum(map(prod, weights))


def _mlp_backward(dy: Shape, x: Shape, weights: list[Shape], *rest: Any, out_shape: Any = None) -> int:
    n, needs = len(weights), rest[-3]
    products = 0
    for l, weight in enumerate(weights):
        dx, dw, gate = l > 0 or needs[0], needs[1 + l], needs[1 + 2 * n + l]
        products += prod(weight) * (dx + (dw or gate))
    return 2 * x[0] * products


def _conv2d(x: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    n, _, height, width = out_shape[0]
    return 2 * n * height * width * prod(weight)


def _conv2d_backward(dy: Shape, x: Shape, weight: Shape, *rest: Any, out_shape: Any = None) -> int:
    dx, dw, _, *gates = rest[-3]
    return _conv2d(x, weight, out_shape=[dy]) * (dx + (dw or any(gates)))


def _attention(q: Shape, k: Shape, *_: Any, out_shape: Any = None) -> int:
    return 4 * prod(q) * k[2]


def _attention_backward(dy: Shape, q: Shape, k: Shape, *_: Any, out_shape: Any = None) -> int:
    return 10 * prod(q) * k[2]  # torch counts the weights' second computation


FORMULAS = {
    "block_linear": _linear,
    "block_linear_backward": _block_backward,
    "gated_attention": _attention,
    "gated_attention_backward": _attention_backward,
    "gated_conv2d": _conv2d,
    "gated_conv2d_backward": _conv2d_backward,
    "gated_linear": _linear,
    "gated_linear_backward": _linear_backward,
    "gated_mlp": _mlp,
    "gated_mlp_backward": _mlp_backward,
    "l0_linear": _linear,
    "l0_mlp": _mlp,
    "l0_mlp_backward": _mlp_backward,
}


def tell_counters() -> None:
    """Registers the formulas once torch's counter, slow to import, is there, and tells those at work.

    A counter copies the registry when it is made.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    packets = {getattr(torch.ops.l0kernels, name): formula for name, formula in FORMULAS.items()}
    for packet, formula in packets.items():
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)
    for mode in mode_stack():
        own = getattr(getattr(mode, "counter", None), "flop_registry", {})
        for packet in packets:
            own.setdefault(packet, counter.flop_registry[packet])
