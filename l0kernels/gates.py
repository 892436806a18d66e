"""Drawing gates: Philox noise and hard-concrete maths on the device, one call for all, no noise stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks, _ops, _registry, reference
from ._autograd import apply, differentiates
from ._compat import break_graph
from ._gates import (
    ALIGN,
    DEFAULT_DIST,
    EVAL_MODES,
    Gates,
    HardConcrete,
    check_dist,
    check_not_nan,
    draw_seed,
    round_up,
)
from ._operator import is_dtensor

__all__ = ["ALIGN", "EVAL_MODES", "Gates", "HardConcrete", "eval_gates", "sample_gates"]


class _HardConcreteGrad(torch.autograd.Function):
    """Joins a drawn z to its log_alpha: backward needs z alone. One node a gate vector, so that checkpointing
    and overlapping forwards find each its own."""

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, z: Tensor, dist: HardConcrete, backend: str) -> Tensor:
        z = z.detach()
        ctx.save_for_backward(z)
        ctx.settings = (dist, backend)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("sample_gates")
        (z,) = ctx.saved_tensors
        return _ops.gate_grad(dz, z, *ctx.settings), None, None, None


class _Joined(torch.autograd.Function):
    """z of all vectors of a draw, and a 1 behind them, joined to their log_alpha by one node: for a forward
    that draws for itself and is never computed again in parts."""

    @staticmethod
    def forward(
        ctx: Any, dist: HardConcrete, backend: str, z: Sequence[Tensor], *log_alphas: Tensor
    ) -> Tensor:
        joined = torch.cat([*z, z[0].new_ones(1)])
        ctx.save_for_backward(joined)
        ctx.settings = dist, backend
        ctx.sizes = [len(part) for part in z]
        return joined

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        _ops.refuse_second_derivative("sample_gates")
        (z,) = ctx.saved_tensors
        grads = _ops.gate_grad(dz, z, *ctx.settings).split_with_sizes([*ctx.sizes, 1])
        return None, None, None, *grads[:-1]


class Draw(NamedTuple):
    """Where a layer's gates come from: to be drawn from log_alpha with it, or ``drawn`` before, detached."""

    log_alpha: Tensor
    drawn: Gates | None = None


def check_log_alphas(log_alphas: Sequence[Tensor]) -> None:
    """Kind, dtype, shape and device of the gate vectors of one call, by attributes alone."""
    for i, log_alpha in enumerate(log_alphas):
        name = "log_alpha" if len(log_alphas) == 1 else f"log_alpha[{i}]"
        _checks.check_log_alpha(name, log_alpha, ndim=1)
        if i:
            _checks.check_device(name, log_alpha, log_alphas[0].device, "log_alpha[0]")
            if log_alpha.dtype != log_alphas[0].dtype:
                expected = f"the dtype of log_alpha[0], {log_alphas[0].dtype}"
                raise TypeError(f"{name} must have {expected}, got {log_alpha.dtype}")


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
    """Draws hard-concrete gates (Louizos, Welling, Kingma, ICLR 2018, arXiv 1712.01312, equations 10 and 11).

    ``z = clip(sigmoid((log u - log(1 - u) + log_alpha) / beta) * (zeta - gamma) + gamma, 0, 1)`` with u from
    Philox4x32-10, keyed by the seed and counted by (gate index, stream, rank). The gradient
    ``dz/dlog_alpha = (zeta - gamma) / beta * s * (1 - s)`` reaches log_alpha where 0 < z < 1 and is
    exactly zero elsewhere.

    Args:
        log_alpha: (G,) float32 or float64; or a sequence of such, of one dtype, drawn in one call:
            the position is the stream.
        seed: (1,) int64 on the device of log_alpha. The same seed gives the same noise on every backend, and
            so z to a few units in its last place; on one backend and device the same bits for any number of
            threads. None draws one with torch.randint from torch's default generator.
        generator: where a missing seed is drawn from instead.
        rank: in [0, 2**32): processes with different ranks draw different gates from one seed.
        dist: the distribution's constants.

    Returns:
        Gates, or a list of them for a sequence. z has the dtype of log_alpha, also under autocast.

    Raises:
        TypeError: log_alpha is not float32 or float64, dtypes differ, or seed is no int64 tensor.
        ValueError: a wrong shape, device or rank, both seed and generator, or (on the CPU) a NaN in
            log_alpha. On a GPU, where looking would stall the device, a NaN in log_alpha is a NaN in z.
    """
    log_alphas = [log_alpha] if isinstance(log_alpha, Tensor) else list(log_alpha)
    if not log_alphas:
        return []
    check_log_alphas(log_alphas)
    if generator is not None:
        break_graph("a compiled graph holds no generator; draw a seed from it outside, and give that")
    backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "sample")
    if backend == "reference":
        return reference.sample_gates(log_alpha, seed=seed, generator=generator, rank=rank, dist=dist)
    _checks.check_count("rank", rank, 0, 2**32)
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, got both")
    drawn = draw(log_alphas, seed, dist, backend, generator, rank)
    gates = [_attach(source, gate, dist, backend) for source, gate in zip(log_alphas, drawn, strict=True)]
    return gates[0] if isinstance(log_alpha, Tensor) else gates


def attach(log_alpha: Tensor, gate: Gates, dist: HardConcrete) -> Gates:
    """Gates drawn earlier and detached, with a gradient to log_alpha of their own."""
    check_drawn([log_alpha], [gate])
    backend = _registry.resolve(log_alpha.device, log_alpha.dtype, "gate_grad")
    if backend != "reference":
        return _attach(log_alpha, gate, dist, backend)
    if not (log_alpha.requires_grad and torch.is_grad_enabled()):
        return gate
    return gate.of(reference.gates.joined(log_alpha, gate.z, dist))


def draw_joined(
    log_alphas: list[Tensor], drawn: Sequence[Gates] | None, seed: Tensor | None, dist: HardConcrete
) -> tuple[Sequence[Gates], Tensor]:
    """Gates without a way back, drawn now unless they are, and their z and a 1 in one vector, with one."""
    if drawn is None:
        check_log_alphas(log_alphas)
        backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "sample")
        drawn = draw(log_alphas, seed, dist, backend)
    else:
        check_drawn(log_alphas, drawn)
    backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "gate_grad")
    return drawn, apply(_Joined, dist, backend, [gate.z for gate in drawn], *log_alphas)


def are_drawn(sources: Sequence[Draw | None]) -> bool:
    """Whether sources have been drawn: all of them or none."""
    return next(source.drawn is not None for source in sources if source is not None)


def attached(sources: Sequence[Draw | None], dist: HardConcrete) -> list[Gates | None]:
    """attach of each source, all of which have been drawn."""
    return [
        None if source is None or source.drawn is None else attach(source.log_alpha, source.drawn, dist)
        for source in sources
    ]


def of_a_layer(
    sources: Sequence[Draw | None], seed: Tensor | None, dist: HardConcrete, backend: str
) -> list[Gates | None]:
    """The gates of sources, without a way back to log_alpha: those drawn before, or a draw of all."""
    if are_drawn(sources):
        return [None if source is None else source.drawn for source in sources]
    drawn = iter(draw([s.log_alpha for s in sources if s is not None], seed, dist, backend))
    return [None if source is None else next(drawn) for source in sources]


def _attach(log_alpha: Tensor, gate: Gates, dist: HardConcrete, backend: str) -> Gates:
    if not differentiates(log_alpha):
        return gate
    z = apply(_HardConcreteGrad, log_alpha, gate.z, dist, backend)
    return Gates(z, gate.index, gate.count)


def check_drawn(log_alphas: Sequence[Tensor | None], gates: Sequence[Gates | None]) -> None:
    """ValueError where a vector has been resized since its gates were drawn, or is sharded since."""
    for log_alpha, gate in zip(log_alphas, gates, strict=True):
        if is_dtensor(log_alpha):
            raise TypeError(
                "log_alpha must be whole where its gates multiply, got a DTensor: keep gates whole, for "
                "fully_shard by ignored_params=l0kernels.nn.keep_gates_whole(model)"
            )
        if log_alpha is not None and gate is not None and gate.z.shape != log_alpha.shape:
            n, drawn = log_alpha.shape[0], gate.z.shape[0]
            raise ValueError(
                f"gates must be drawn for log_alpha as it is, {n} gates, got {drawn} of an earlier draw: "
                "draw again"
            )


def draw(
    log_alphas: list[Tensor],
    seed: Tensor | None,
    dist: HardConcrete,
    backend: str,
    generator: torch.Generator | None = None,
    rank: int = 0,
) -> list[Gates]:
    """Gates without a way back to log_alpha, in one call: sample_gates and the fused ops add theirs."""
    seed = check_draw(log_alphas, seed, dist, generator)
    backend = _registry.who_draws(log_alphas[0], backend)
    z, index, count = _ops.sample(log_alphas, seed, rank, dist, backend)
    return split(log_alphas, z, index, count)


def sample_with_expected(
    log_alphas: list[Tensor], seed: Tensor, dist: HardConcrete
) -> tuple[list[Gates], Sequence[Tensor]]:
    """What sample_gates draws under no_grad, and sum_g P(z_g > 0) of each vector, ()."""
    check_log_alphas(log_alphas)
    backend = _registry.resolve(log_alphas[0].device, log_alphas[0].dtype, "sample")
    if backend == "reference":
        gates = reference.sample_gates(log_alphas, seed=seed, dist=dist)
        return gates, [dist.p_open(log_alpha).sum() for log_alpha in log_alphas]
    seed = check_draw(log_alphas, seed, dist)
    *drawn, expected = _ops.sample_expected(log_alphas, seed, 0, dist, backend)
    return split(log_alphas, *drawn), expected.unbind()


def check_draw(
    log_alphas: list[Tensor],
    seed: Tensor | None,
    dist: HardConcrete,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The seed of a draw: the checked one that was given, or a fresh one."""
    check_dist(dist)
    if seed is None:
        seed = draw_seed(log_alphas[0].device, generator)
    else:
        _checks.check_seed(seed, log_alphas[0].device)
    return _ops.kept_seed(seed)


def split(log_alphas: list[Tensor], z: Tensor, index: Tensor, count: Tensor) -> list[Gates]:
    """The gates of each vector out of what ``sample`` returned for all."""
    if len(log_alphas) == 1:
        return [Gates(z, index, count)]
    sizes = [a.shape[0] for a in log_alphas]
    parts = (
        z.split_with_sizes(sizes),
        index.split_with_sizes([round_up(n) for n in sizes]),
        count.view(-1, 2).unbind(),
    )
    return [Gates(*part) for part in zip(*parts, strict=True)]


@overload
def eval_gates(log_alpha: Tensor, mode: str = ..., *, dist: HardConcrete = ...) -> Gates: ...


@overload
def eval_gates(log_alpha: Sequence[Tensor], mode: str = ..., *, dist: HardConcrete = ...) -> list[Gates]: ...


def eval_gates(
    log_alpha: Tensor | Sequence[Tensor], mode: str = "paper", *, dist: HardConcrete = DEFAULT_DIST
) -> Gates | list[Gates]:
    """Deterministic gates for evaluation. They carry no gradient.

    - ``"paper"``: ``clip(sigmoid(log_alpha) * (zeta - gamma) + gamma, 0, 1)`` (arXiv 1712.01312, eq. 13).
    - ``"median"``: ``clip(sigmoid(log_alpha / beta) * (zeta - gamma) + gamma, 0, 1)``, the gate of u = 1/2:
      zero exactly where P(z = 0) >= 1/2.
    - ``"topk"``: ``sigmoid(0.8 * log_alpha / beta)`` with the ``round(G - sum p_open)`` smallest set to 0,
      the lowest index first among ties (flop, CoFi).

    Args:
        log_alpha: (G,) float32 or float64, or a sequence of such.
        mode: "paper", "median" or "topk".
        dist: the distribution's constants.

    Returns:
        Gates, or a list of them for a sequence; z is detached, in the dtype of log_alpha.

    Raises:
        TypeError: log_alpha is not float32 or float64.
        ValueError: an unknown mode, a log_alpha that is not 1-D, or (on the CPU) a NaN in one.
    """
    return reference.eval_gates(
        log_alpha, mode, dist=dist
    )  # plain torch on every backend: once an evaluation, not on the hot path


def eval_weight_gates(log_alpha: Tensor, mode: str, dist: HardConcrete) -> Tensor:
    """eval_gates for gates of any shape: z alone."""
    _checks.check_choice("mode", mode, EVAL_MODES)
    check_not_nan("log_alpha", log_alpha)
    return reference.gates.eval_z(log_alpha, mode, dist)
