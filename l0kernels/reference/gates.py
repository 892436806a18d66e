"""The hard-concrete distribution and its gates (Louizos, Welling, Kingma, "Learning Sparse Neural Networks
through L0 Regularization", ICLR 2018, arXiv 1712.01312)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .. import _checks
from .._gates import (
    DEFAULT_DIST,
    EVAL_MODES,
    Gates,
    HardConcrete,
    check_dist,
    check_not_nan,
    draw_seed,
)
from .philox import uniform

_TOPK_SLOPE = 0.8  # the "magic number" of flop and CoFi, kept so that gates trained there evaluate alike


def hard_concrete(log_alpha: Tensor, u: Tensor, dist: HardConcrete) -> Tensor:
    """The gate of given noise (equations 10, 11), differentiable in log_alpha.

    ``dz/dlog_alpha = (zeta - gamma) / beta * s * (1 - s)`` where 0 < z < 1, else exactly 0.

    Args:
        log_alpha: any shape, float32 or float64.
        u: broadcastable to it, in (0, 1), exact in float32.

    Returns:
        z, dtype of log_alpha, in [0, 1].
    """
    u = u.to(log_alpha.dtype)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / dist.beta)
    z = s * (dist.zeta - dist.gamma) + dist.gamma
    # Not torch.clamp, whose gradient leaks where z is exactly 0 or 1. A NaN fails both comparisons and stays.
    return z.masked_fill(z <= 0, 0.0).masked_fill(z >= 1, 1.0)


def joined(log_alpha: Tensor, z: Tensor, dist: HardConcrete) -> Tensor:
    """A drawn z again as hard_concrete's function of log_alpha, with derivatives of every order."""
    z = z.detach()
    width = dist.zeta - dist.gamma
    fractional = (z > 0) & (z < 1)
    drawn = torch.logit(((z - dist.gamma) / width).masked_fill(~fractional, 0.5))
    z_of = torch.sigmoid(drawn + (log_alpha - log_alpha.detach()) / dist.beta) * width
    return torch.where(fractional, z + (z_of - z_of.detach()), z)  # the bits of the draw


def sample_z(log_alpha: Tensor, seed: Tensor, stream: int, rank: int, dist: HardConcrete) -> Tensor:
    """z of any shape; the noise's gate index is the row-major position in log_alpha."""
    index = torch.arange(log_alpha.numel(), dtype=torch.int64, device=log_alpha.device)
    u = uniform(seed, index, stream=stream, rank=rank).reshape(log_alpha.shape)
    return hard_concrete(log_alpha, u, dist)


def sample_zs(log_alphas: Sequence[Tensor], seed: Tensor, rank: int, dist: HardConcrete) -> list[Tensor]:
    """z of several vectors, stream = position: sample_z of each, but in one pass of the generator."""
    sizes = [a.numel() for a in log_alphas]
    index = [torch.arange(n, dtype=torch.int64, device=seed.device) for n in sizes]
    stream = [torch.full_like(values, i) for i, values in enumerate(index)]
    u = uniform(seed, torch.cat(index), stream=torch.cat(stream), rank=rank)
    return [hard_concrete(a, part, dist) for a, part in zip(log_alphas, u.split(sizes), strict=True)]


def eval_z(log_alpha: Tensor, mode: str, dist: HardConcrete) -> Tensor:
    """The evaluation gate of ``mode``, any shape, detached. See eval_gates."""
    log_alpha = log_alpha.detach()
    if mode != "topk":
        s = torch.sigmoid(log_alpha if mode == "paper" else log_alpha / dist.beta)
        return (s * (dist.zeta - dist.gamma) + dist.gamma).clamp(0, 1)
    flat = log_alpha.flatten()
    n_closed = torch.round(flat.numel() - dist.p_open(flat).sum(dtype=torch.float64))
    # By log_alpha, not by its sigmoid: the ties are then those of the parameter, however exp rounds.
    order = torch.argsort(flat, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    z = torch.sigmoid(_TOPK_SLOPE * flat / dist.beta)
    return z.masked_fill(place < n_closed, 0.0).reshape(log_alpha.shape)


def _check_sampling(
    log_alphas: Sequence[Tensor],
    seed: Tensor | None,
    generator: torch.Generator | None,
    rank: int,
    dist: HardConcrete,
) -> None:
    for i, log_alpha in enumerate(log_alphas):
        name = "log_alpha" if len(log_alphas) == 1 else f"log_alpha[{i}]"
        _checks.check_log_alpha(name, log_alpha, ndim=1)
        _checks.check_device(name, log_alpha, log_alphas[0].device, "log_alpha[0]")
        check_not_nan(name, log_alpha)
    _checks.check_count("rank", rank, 0, 2**32)
    check_dist(dist)
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, got both")
    if seed is not None and log_alphas:
        _checks.check_seed(seed, log_alphas[0].device)


@overload
def sample_gates(
    log_alpha: Tensor,
    *,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    rank: int = ...,
    dist: HardConcrete = ...,
) -> Gates: ...


@overload
def sample_gates(
    log_alpha: Sequence[Tensor],
    *,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    rank: int = ...,
    dist: HardConcrete = ...,
) -> list[Gates]: ...


def sample_gates(
    log_alpha: Tensor | Sequence[Tensor],
    *,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    rank: int = 0,
    dist: HardConcrete = DEFAULT_DIST,
) -> Gates | list[Gates]:
    """Draws hard-concrete gates (arXiv 1712.01312, equations 10 and 11).

    ``z = clip(sigmoid((log u - log(1 - u) + log_alpha) / beta) * (zeta - gamma) + gamma, 0, 1)``, u from
    Philox4x32-10 keyed by the seed, counted by (gate index, stream, rank). The gradient reaches log_alpha
    where 0 < z < 1 only.

    Args:
        log_alpha: (G,) float32 or float64, or a sequence of such; its position in the sequence is its stream.
        seed: (1,) int64 on the device of log_alpha; one seed, one noise, anywhere. None draws one.
        generator: where a missing seed is drawn from; None is torch's default generator.
        rank: in [0, 2**32): processes with different ranks draw different gates from one seed.
        dist: the distribution's constants.

    Returns:
        Gates, or a list of them for a sequence. z has the dtype of log_alpha, also under autocast.

    Raises:
        TypeError: log_alpha is not float32 or float64, or seed is no int64 tensor.
        ValueError: a wrong shape, device or rank, both seed and generator, or a NaN in log_alpha on the CPU.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    _check_sampling(log_alphas, seed, generator, rank, dist)
    if not log_alphas:
        return []
    if seed is None:
        seed = draw_seed(log_alphas[0].device, generator)
    drawn = [Gates.from_z(z, full_grad=False) for z in sample_zs(log_alphas, seed, rank, dist)]
    return drawn[0] if isinstance(log_alpha, Tensor) else drawn


def sample_gates_per_example(
    log_alpha: Tensor,
    batch: int,
    *,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    rank: int = 0,
    dist: HardConcrete = DEFAULT_DIST,
) -> Tensor:
    """Draws one gate vector per example (AMLab's ``local_rep=True``); such gates cannot skip anything.

    The gradients vary less, but every unit is open for some example, so the products stay dense whatever
    the gates are: multiply the layer's input by z (or a convolution's output by ``z[:, :, None, None]``).
    It is one vector for the whole minibatch, from sample_gates, that makes training faster.

    Args:
        log_alpha: (G,) float32 or float64.
        batch: the number of examples, >= 0.
        seed, generator, rank, dist: as in sample_gates; example b, gate g has noise index ``b * G + g``.

    Returns:
        z (batch, G) in the dtype of log_alpha, differentiable in log_alpha where 0 < z < 1.

    Raises:
        TypeError, ValueError: as sample_gates; batch is no int or is negative.
    """
    _check_sampling([log_alpha], seed, generator, rank, dist)
    _checks.check_count("batch", batch, 0, 2**63)
    if seed is None:
        seed = draw_seed(log_alpha.device, generator)
    return sample_z(log_alpha.expand(batch, -1), seed, 0, rank, dist)


@overload
def eval_gates(log_alpha: Tensor, mode: str = ..., *, dist: HardConcrete = ...) -> Gates: ...


@overload
def eval_gates(log_alpha: Sequence[Tensor], mode: str = ..., *, dist: HardConcrete = ...) -> list[Gates]: ...


def eval_gates(
    log_alpha: Tensor | Sequence[Tensor], mode: str = "paper", *, dist: HardConcrete = DEFAULT_DIST
) -> Gates | list[Gates]:
    """Deterministic gates for evaluation (arXiv 1712.01312, section 2.2, and others). They carry no gradient.

    - ``"paper"``: ``clip(sigmoid(log_alpha) * (zeta - gamma) + gamma, 0, 1)`` (equation 13).
    - ``"median"``: ``clip(sigmoid(log_alpha / beta) * (zeta - gamma) + gamma, 0, 1)``, the gate of u = 1/2:
      zero exactly where P(z = 0) >= 1/2.
    - ``"topk"``: ``sigmoid(0.8 * log_alpha / beta)`` with the ``round(G - sum p_open)`` smallest set to 0,
      the lowest index first among ties (flop, CoFi). Round is to even; the sum is taken in float64.

    Args:
        log_alpha: (G,) float32 or float64, or a sequence of such.
        mode: "paper", "median" or "topk".
        dist: the distribution's constants.

    Returns:
        Gates, or a list of them for a sequence; z is detached, in the dtype of log_alpha.

    Raises:
        TypeError: log_alpha is not float32 or float64.
        ValueError: an unknown mode, a log_alpha that is not 1-D, or a NaN in one on the CPU.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    _check_sampling(log_alphas, None, None, 0, dist)
    _checks.check_choice("mode", mode, EVAL_MODES)
    gates = [Gates.from_z(eval_z(values, mode, dist), full_grad=False) for values in log_alphas]
    return gates[0] if isinstance(log_alpha, Tensor) else gates
