"""Checks of the arguments of each operation, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._gates import (
    EVAL_MODES,
    Gates,
    HardConcrete,
    check_dist,
    check_gates,
    check_layer_gates,
    check_not_nan,
)

GLU = {"swiglu": "silu", "geglu": "gelu"}
"""Gated products: the activation of the first half of a hidden layer's rows, which multiplies the second."""

ROWS = {"relu": 1, "gelu": 1, "silu": 1, "identity": 1} | dict.fromkeys(GLU, 2)
"""Rows of a hidden weight per unit, for every activation there is."""


def check_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gates: Sequence[Gates | None],
    activation: str,
) -> None:
    """Checks of the arguments of gated_mlp."""
    _checks.check_tensor("x", x)
    if len(weights) == 0:
        raise ValueError("weights must hold at least one matrix, got none")
    for name, values in (("biases", biases), ("gates", gates)):
        if len(values) != len(weights):
            raise ValueError(f"{name} must hold one entry per weight, {len(weights)}, got {len(values)}")
    _checks.check_choice("activation", activation, ROWS)
    rows = ROWS[activation]
    _checks.check_linear(x, weights[0], biases[0], "[0]")
    for i, (weight, bias, gate) in enumerate(zip(weights, biases, gates, strict=True)):
        _checks.check_weight(weight, bias, f"[{i}]")
        _checks.check_device(f"weights[{i}]", weight, x.device, "x")
        _checks.check_same_dtype(f"weights[{i}]", weight, "x", x)
        if i and weight.shape[1] * rows != weights[i - 1].shape[0]:
            n, left = divmod(weights[i - 1].shape[0], rows)
            if left:
                raise ValueError(
                    f"weights[{i - 1}] must have an even number of rows, two per unit of {activation!r}, "
                    f"got shape {tuple(weights[i - 1].shape)}"
                )
            share = "half the rows" if rows == 2 else "the rows"
            raise ValueError(
                f"weights[{i}] must have {n} columns, {share} of weights[{i - 1}], "
                f"got shape {tuple(weight.shape)}"
            )
        if gate is not None:
            check_gates(f"gates[{i}]", gate, weight.shape[1], x.device, f"input of weights[{i}]")


def check_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, channels: int | None = None
) -> None:
    """Checks of ``x ([N,] in, H, W)``, ``weight (out, in / groups, kh, kw)`` and ``bias (out,)`` or None.

    ``channels``: those of a packed x, which does not hold them all.
    """
    _checks.check_floating("x", x)
    _checks.check_floating("weight", weight)
    if weight.ndim != 4:
        raise ValueError(f"weight must have shape (out, in / groups, kh, kw), got {tuple(weight.shape)}")
    _checks.check_count("groups", groups, 1, 2**31)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    n_in = weight.shape[1] * groups
    if x.ndim not in (3, 4) or (x.shape[-3] if channels is None else channels) != n_in:
        raise ValueError(
            f"x must have shape (N, {n_in}, H, W) or ({n_in}, H, W), groups times weight.shape[1] channels, "
            f"got {tuple(x.shape)}" + ("" if channels is None else f" packed from {channels} channels")
        )
    _checks.check_device("x", x, weight.device, "weight")
    _checks.check_same_dtype("x", x, "weight", weight)
    _checks.check_bias(weight, bias)


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    transposed: bool = False,
    in_gates: Gates | None = None,
    out_gates: Gates | None = None,
    out_support: Gates | None = None,
) -> None:
    """Checks of ``x ([N,] in, ...)``, ``weight (out, in / groups, ...)``, transposed ``(in, out / groups,
    ...)``, ``bias (out,)`` or None, and the gates of both sides."""
    _checks.check_floating("x", x)
    _checks.check_floating("weight", weight)
    if weight.ndim < 3:
        raise ValueError(f"weight must have shape (out, in / groups, ...), got {tuple(weight.shape)}")
    _checks.check_count("groups", groups, 1, 2**31)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    sizes = weight.shape[0], weight.shape[1] * groups
    n_in, n_out = sizes if transposed else sizes[::-1]
    batch = x.ndim == weight.ndim
    if not (batch or x.ndim == weight.ndim - 1) or x.shape[1 if batch else 0] != n_in:
        spatial = ", ".join({1: "L", 2: "HW", 3: "DHW"}.get(weight.ndim - 2, "..."))
        raise ValueError(
            f"x must have shape (N, {n_in}, {spatial}) or ({n_in}, {spatial}), got {tuple(x.shape)}"
        )
    _checks.check_device("x", x, weight.device, "weight")
    _checks.check_same_dtype("x", x, "weight", weight)
    if bias is not None:
        _checks.check_floating("bias", bias)
        _checks.check_shape("bias", bias, (n_out,), "one per output channel of weight")
        _checks.check_device("bias", bias, weight.device, "weight")
        _checks.check_same_dtype("bias", bias, "weight", weight)
    check_layer_gates(n_in, n_out, weight.device, in_gates, out_gates, out_support)


def pair(name: str, value: Any, low: int) -> list[int]:
    """``value`` of torch's conv2d, an int or two of them, as a list of two, each >= low."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(items) not in (1, 2):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    for item in items:
        _checks.check_count(name, item, low, 2**31)
    return items * 2 if len(items) == 1 else items


def conv_options(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[int], list[int]]:
    """stride, padding, dilation of two dimensions, and the zeros that x needs behind its rows and columns.

    ``padding="same"`` with an odd total has one more behind than in front, as torch has it.

    Raises:
        TypeError: no ints.
        ValueError: out of range, an unknown name, "same" with a stride, or a kernel larger than padded x.
    """
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    behind = [0, 0]
    if isinstance(padding, str):
        _checks.check_choice("padding", padding, ("same", "valid"))
        if padding == "same" and strides != [1, 1]:
            raise ValueError(f"padding must be numbers where stride is not 1, got 'same' and stride {stride}")
        total = [0, 0]
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        paddings, behind = [t // 2 for t in total], [t % 2 for t in total]
    else:
        paddings = pair("padding", padding, 0)
    padded = [x.shape[i - 2] + 2 * paddings[i] + behind[i] for i in range(2)]
    span = [dilations[i] * (weight.shape[i + 2] - 1) + 1 for i in range(2)]
    if padded[0] < span[0] or padded[1] < span[1]:
        raise ValueError(
            f"x must cover the kernel, {span[0]} x {span[1]} with its dilation, got {padded[0]} x {padded[1]}"
            " with its padding"
        )
    return strides, paddings, dilations, behind


def check_batch_norm(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """Checks of ``x (N, channels, ...)``, of which a packed one holds fewer, and of vectors (channels,)."""
    _checks.check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, channels, ...), got {tuple(x.shape)}")
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if value is not None:
            _checks.check_floating(name, value)
            _checks.check_shape(name, value, (channels,), "one per channel of x")
            _checks.check_device(name, value, x.device, "x")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None, got one")
    if not training and running_mean is None:
        raise ValueError("running_mean must be given where training is False, got None")
    _checks.check_number("momentum", momentum)
    _checks.check_number("eps", eps)
    if training and math.prod(x.shape[:1] + x.shape[2:]) == 1:
        raise ValueError(
            f"x must hold more than one value per channel where training is True, got {tuple(x.shape)}"
        )


def check_layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    gates: Gates | None,
) -> tuple[int, ...]:
    """Checks of ``x (..., *normalized_shape)`` and what goes with it; normalized_shape as a tuple."""
    _checks.check_floating("x", x)
    is_several = isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str)
    shape = tuple(normalized_shape) if is_several else (normalized_shape,)
    for size in shape:
        _checks.check_count("normalized_shape", size, 1, 2**31)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"x must have shape (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.check_floating(name, value)
            _checks.check_shape(name, value, shape, "normalized_shape")
            _checks.check_device(name, value, x.device, "x")
    if eps is not None:
        _checks.check_number("eps", eps)
    if gates is not None:
        if len(shape) != 1:
            raise ValueError(
                f"normalized_shape must be of the last dimension alone where gates are given, got {shape}"
            )
        check_gates("gates", gates, shape[0], x.device, "feature of x")
    return shape


def check_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """Checks of ``x (N, channels, ...)`` and of vectors (channels,)."""
    _checks.check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, channels, ...), got {tuple(x.shape)}")
    _checks.check_count("num_groups", num_groups, 1, 2**31)
    if x.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {x.shape[1]} channels of x, got {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.check_floating(name, value)
            _checks.check_shape(name, value, (x.shape[1],), "one per channel of x")
            _checks.check_device(name, value, x.device, "x")
    _checks.check_number("eps", eps)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Checks of the arguments of gated_attention."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.check_floating(name, value)
        _checks.check_device(name, value, q.device, "q")
        _checks.check_same_dtype(name, value, "q", q)
    if q.ndim != 4 or not q.shape[3]:
        raise ValueError(f"q must have shape (B, Hq, L, D), D > 0, got {tuple(q.shape)}")
    (B, heads, L, D), got = q.shape, tuple(k.shape)
    if k.ndim != 4 or (got[0], got[3]) != (B, D):
        raise ValueError(f"k must have shape ({B}, Hkv, S, {D}), batch and D of q, got {got}")
    if heads % k.shape[1] if k.shape[1] else heads:
        raise ValueError(f"k must have a number of heads that divides the {heads} of q, got {got}")
    _checks.check_shape("v", v, k.shape, "that of k")
    if gates is not None:
        n = len(gates.z) if isinstance(gates, Gates) and isinstance(gates.z, Tensor) and gates.z.ndim else 0
        of_q = n == heads or k.shape[1] == heads
        what = "head of q" if of_q else f"head of k, or {heads}, one per head of q"
        check_gates("gates", gates, heads if of_q else k.shape[1], q.device, what)
    if attn_mask is not None:
        _checks.check_tensor("attn_mask", attn_mask)
        _checks.check_device("attn_mask", attn_mask, q.device, "q")
        if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
            raise TypeError(
                f"attn_mask must be bool, float32 or of q's dtype, {q.dtype}, got {attn_mask.dtype}"
            )
        _checks.check_broadcastable("attn_mask", attn_mask, (B, heads, L, k.shape[2]))
        if is_causal:
            raise ValueError(
                "is_causal must be False where attn_mask is given, which may hold both, got True"
            )
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    _checks.check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is not None:
        _checks.check_number("scale", scale)


def check_masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    block: tuple[int, int] | None,
    seed: Tensor | None,
    mode: str | None,
    dist: HardConcrete,
) -> None:
    """Checks of the arguments of masked_linear."""
    _checks.check_linear(x, weight, bias)
    _checks.check_log_alpha("log_alpha", log_alpha, ndim=2)
    _checks.check_device("log_alpha", log_alpha, weight.device, "weight")
    n_out, n_in = weight.shape
    if block is None:
        _checks.check_shape("log_alpha", log_alpha, (n_out, n_in), "the shape of weight")
    else:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise TypeError(f"block must be a pair (b_out, b_in) or None, got {block!r}")
        _checks.check_count("block[0]", block[0], 1, 2**31)
        _checks.check_count("block[1]", block[1], 1, 2**31)
        shape = (-(-n_out // block[0]), -(-n_in // block[1]))
        _checks.check_shape(
            "log_alpha", log_alpha, shape, f"blocks of {tuple(block)} in weight {n_out} x {n_in}"
        )
    if mode is not None:
        _checks.check_choice("mode", mode, EVAL_MODES)
    if seed is not None:
        _checks.check_seed(seed, log_alpha.device)
    check_dist(dist)


def per_tensor(name: str, value: float | Sequence[float], n: int) -> list[float]:
    """One number for all n tensors, or one each, as a list of n."""
    # list and tuple first: an ABC's isinstance costs a microsecond
    values = list(value) if isinstance(value, (list, tuple, Sequence)) else [value] * n
    if len(values) != n:
        raise ValueError(f"{name} must be one number or one per log_alpha, {n}, got {len(values)}")
    for v in values:
        _checks.check_number(name, v)
    return values


def check_l0_penalty(log_alphas: Sequence[Tensor], dist: HardConcrete) -> None:
    """Checks of the gate parameters of l0_penalty."""
    if len(log_alphas) == 0:
        raise ValueError("log_alpha must hold at least one tensor, got none")
    for i, log_alpha in enumerate(log_alphas):
        name = "log_alpha" if len(log_alphas) == 1 else f"log_alpha[{i}]"
        _checks.check_log_alpha(name, log_alpha)
        _checks.check_device(name, log_alpha, log_alphas[0].device, "log_alpha[0]")
        check_not_nan(name, log_alpha)
    check_dist(dist)


def check_l2_penalty(
    weight: Tensor,
    weight_decay: float,
    in_log_alpha: Tensor | None,
    out_log_alpha: Tensor | None,
    groups: int,
    dist: HardConcrete,
) -> None:
    """Checks of the arguments of l2_penalty."""
    _checks.check_floating("weight", weight)
    if weight.ndim < 2:
        raise ValueError(f"weight must have shape (out, in, ...), got {tuple(weight.shape)}")
    _checks.check_number("weight_decay", weight_decay)
    _checks.check_count("groups", groups, 1, 2**31)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} rows of weight, got {groups}")
    sides = (
        ("in_log_alpha", in_log_alpha, weight.shape[1] * groups),
        ("out_log_alpha", out_log_alpha, weight.shape[0]),
    )
    for name, log_alpha, size in sides:
        if log_alpha is not None:
            _checks.check_log_alpha(name, log_alpha)
            _checks.check_shape(name, log_alpha, (size,), "one gate per channel of weight")
            _checks.check_device(name, log_alpha, weight.device, "weight")
            check_not_nan(name, log_alpha)
    check_dist(dist)


def check_prox(x: Any, step: Any) -> None:
    """Checks of what every proximal operator takes."""
    _checks.check_floating("x", x)
    if not isinstance(step, Tensor):
        check_not_negative(step=step)
        return
    _checks.check_floating("step", step)
    if step.shape != x.shape and step.ndim:
        raise ValueError(
            f"step must be a number or have shape {tuple(x.shape)}, that of x, got {tuple(step.shape)}"
        )
    _checks.check_device("step", step, x.device, "x")


def check_not_negative(**numbers: Any) -> None:
    """TypeError unless these are numbers, ValueError unless they are finite and >= 0."""
    for name, value in numbers.items():
        _checks.check_number(name, value)
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def check_tl1(a: Any, group_share: Any = 0.0) -> None:
    """Checks of the shape of transformed l1, and of what part a group's penalty has of a sum with it."""
    _checks.check_number("a", a)
    if not 0 < a <= 1e30:
        raise ValueError(f"a must be in (0, 1e30], got {a}: towards 0 it is l0, towards infinity l1")
    if not 0 <= group_share <= 1:
        raise ValueError(f"group_share must be in [0, 1], got {group_share}")


def check_groups(x: Tensor, dim: Any, run: Any) -> None:
    """Checks that the entries of a dimension of x, or runs of them, are groups."""
    if x.ndim == 0:
        raise ValueError("x must have a dimension to have groups, got a scalar")
    _checks.check_count("dim", dim, -x.ndim, x.ndim)
    _checks.check_count("run", run, 1, 2**31)
    if x.shape[dim] % run:
        raise ValueError(f"run must divide the {x.shape[dim]} entries of dimension {dim}, got {run}")


def check_top(k: Any, n: int, of: str) -> None:
    """Checks of a number out of n."""
    _checks.check_count("k", k, 0, 2**63)
    if k > n:
        raise ValueError(f"k must be at most the {n} {of} of x, got {k}")
