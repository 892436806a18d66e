"""Which gates of a trained model stay open so that it costs no more than a share of what it did."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..budget import Kind
from .gate import HardConcreteGate, gate_modules
from .shares import GateKind, Wish, check_reach, kinds_of
from .units.place import GateGroups

FILL = 64
"""So many of the likeliest gates that are left are tried, one by one, for what is left of the budget."""
FAR = 30.0
"""A log_alpha at which an evaluation gate is exactly 0 or 1."""


def cut_gates(
    model: nn.Module, wish: Wish, multiple_of: int = 1, evenly: bool = False
) -> dict[HardConcreteGate, Tensor]:
    """z of the gates of `model`, (n,), of which so many are open as cost no more than was asked for.

    Open are the gates with the largest P(z > 0), those of a kind in one order, or with `evenly` the same
    share of each vector. An open gate has the value of its evaluation gate or, where that is 0,
    sigmoid(.8 log_alpha / beta), as evaluation gates of mode "topk" do.

    Args:
        multiple_of: each vector keeps a multiple of so many units, or all; heads are not counted so.

    Raises:
        ValueError, TypeError: as :class:`Budget`.
    """
    kinds = kinds_of(model, wish)
    check_reach(kinds)
    blocks = _blocks(model)
    found: dict[HardConcreteGate, Tensor] = {}
    for kind in kinds:
        multiples = [1 if gate.kind == "heads" else multiple_of for gate in kind.gates]
        sizes = [_per_chunk(n, blocks.get(gate, 1)) for n, gate in zip(multiples, kind.gates, strict=True)]
        chunks = [_chunks(gate, size) for gate, size in zip(kind.gates, sizes, strict=True)]
        is_open = _even(kind, chunks) if evenly else _likeliest(kind, chunks)
        for gate, part in zip(kind.gates, is_open.split(kind.of.sizes), strict=True):
            found[gate] = torch.where(part, _value(gate), 0.0)
    return found


def set_gates_(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Has the evaluation gates of `model`, in the order of gate_modules, be these values."""
    for gate, z in zip(gate_modules(model), values, strict=True):
        dist = gate.dist
        inner = torch.logit((z.double() - dist.gamma) / (dist.zeta - dist.gamma))
        log_alpha = torch.where(z >= 1, FAR, torch.where(z <= 0, -FAR, inner))
        gate.eval_mode = "paper"
        gate.log_alpha.copy_(log_alpha.view(gate.log_alpha.shape))


def _blocks(model: nn.Module) -> dict[HardConcreteGate, int]:
    """The units of a gate, where they are several."""
    return {
        gate: host.block_of(group)
        for host in model.modules()
        if isinstance(host, GateGroups)
        for group, gate in zip(host.groups, host.gates, strict=True)
    }


def _per_chunk(multiple_of: int, block: int) -> int:
    return math.lcm(multiple_of, block) // block


def _p(gate: HardConcreteGate) -> Tensor:
    return gate.dist.p_open(gate.whole().detach().flatten().double())


def _value(gate: HardConcreteGate) -> Tensor:
    z = gate.eval_gates().z
    soft = torch.sigmoid(0.8 * gate.whole().detach().flatten() / gate.dist.beta)
    return torch.where(z != 0, z, soft)


def _chunks(gate: HardConcreteGate, size: int) -> list[Tensor]:
    """The gates of a vector, the likeliest first, in parts that stay or go together."""
    return list(_p(gate).argsort(descending=True, stable=True).split(size))


def _at(kind: Kind, is_open: Tensor) -> float:
    return float(kind.share(is_open.double()))


def _most(kind: Kind, masks: Callable[[int], Tensor], count: int) -> int:
    """The largest k of 0..count at which the k-th mask, which grow, costs no more than it may."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        fits = _at(kind, masks(middle)) <= kind.keep + 1e-12
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


class _Masks:
    """The mask of the first k of parts that come one after the other."""

    def __init__(self, parts: Sequence[Tensor], n: int) -> None:
        self.parts, self.n = parts, n

    def __call__(self, k: int) -> Tensor:
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.parts[0].device)
        if k:
            mask[torch.cat([*self.parts[:k]])] = True
        return mask


def _likeliest(kind: GateKind, chunks: list[list[Tensor]]) -> Tensor:
    """The chunks in the order of their likeliest gate, as many as fit, and then those that still do."""
    starts = [sum(kind.of.sizes[:at]) for at in range(len(chunks))]
    parts = [(at, starts[at] + chunk) for at, own in enumerate(chunks) for chunk in own]
    firsts = [torch.stack([chunk[0] for chunk in own]) for own in chunks]
    p = torch.cat([_p(gate)[first] for gate, first in zip(kind.gates, firsts, strict=True)])
    order = [parts[at] for at in p.argsort(descending=True, stable=True).tolist()]
    masks = _Masks([chunk for _, chunk in order], sum(kind.of.sizes))
    k = _most(kind.of, masks, len(order))
    mask = masks(k)
    full = {of for of, _ in order[k : k + 1]}  # vectors of which a chunk was too much: others go on
    for of, chunk in order[k + 1 : k + 1 + FILL]:
        more = mask.clone()
        more[chunk] = True
        if of not in full and _at(kind.of, more) <= kind.of.keep + 1e-12:
            mask = more
        else:
            full.add(of)
    return mask


def _even(kind: GateKind, chunks: list[list[Tensor]]) -> Tensor:
    """Of each vector the same share, rounded to chunks, and one chunk at least."""
    starts = [sum(kind.of.sizes[:at]) for at in range(len(chunks))]
    # In the order in which a growing share takes them in.
    placed = [
        ((k + 0.5) / len(own) if k else 0.0, at, starts[at] + chunk)
        for at, own in enumerate(chunks)
        for k, chunk in enumerate(own)
    ]
    placed.sort(key=lambda item: item[:2])
    shares = sorted({share for share, _, _ in placed})
    upto = [0, *(bisect_right(placed, share, key=lambda item: item[0]) for share in shares)]
    masks = _Masks([chunk for *_, chunk in placed], sum(kind.of.sizes))
    best = _most(kind.of, lambda k: masks(upto[k]), len(shares))
    return masks(upto[best])
