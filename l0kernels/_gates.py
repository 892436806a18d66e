"""What a gate is: its distribution, the drawn vector and where it is open, and the checks of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks

ALIGN = 128
"""Extents are rounded up to this: a multiple of every tile extent of every backend."""

TAU = 0.93
"""Open share above which the GPU backends take a dimension in natural order: count[1] = round_up(G)."""

EVAL_MODES = ("paper", "median", "topk")

NO_GATE: list[Tensor] = []
"""For the operators: no gate on that side."""


@dataclass(frozen=True)
class HardConcrete:
    """Constants of the hard-concrete distribution (arXiv 1712.01312, section 2.2).

    ``z = clip(s * (zeta - gamma) + gamma, 0, 1)`` with
    ``s = sigmoid((log u - log(1 - u) + log_alpha) / beta)``.

    Args:
        beta: temperature, > 0.
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end of the stretched interval, > 1.

    Raises:
        TypeError: a constant is no number.
        ValueError: a constant is out of range.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        for name in ("beta", "gamma", "zeta"):
            _checks.check_number(name, getattr(self, name))
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")
        if not self.gamma < 0:
            raise ValueError(f"gamma must be < 0, got {self.gamma}")
        if not self.zeta > 1:
            raise ValueError(f"zeta must be > 1, got {self.zeta}")

    def p_open(self, log_alpha: Tensor) -> Tensor:
        """``P(z > 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))`` (equation 12), elementwise."""
        return torch.sigmoid(log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    def log_alpha_of(self, p: Tensor) -> Tensor:
        """The log_alpha at which P(z > 0) is p, elementwise; p within 1e-12 of 0 or 1 counts as that far."""
        inner = torch.logit(p.double(), eps=1e-12) + self.beta * math.log(-self.gamma / self.zeta)
        return inner.to(p.dtype)

    def p_one(self, log_alpha: Tensor) -> Tensor:
        """``P(z = 1) = sigmoid(log_alpha - beta * log((1 - gamma) / (zeta - 1)))``, elementwise."""
        return torch.sigmoid(log_alpha - self.beta * math.log((1 - self.gamma) / (self.zeta - 1)))


DEFAULT_DIST = HardConcrete()
"""The constants of the paper."""


class Gates(NamedTuple):
    """One drawn (or evaluated) gate vector and where it is open.

    Attributes:
        z: (G,) float32 (float64 for float64 gate parameters); carries the gradient.
        index: (round_up(G, ALIGN),) int32: the open gates ascending, then the closed ones ascending, then 0.
        count: (2,) int32, [open, extent] with extent = open rounded up to ALIGN; on the device of z.
        full_grad: True returns dz for every open gate; False only where 0 < z < 1, which is all that a
            hard-concrete gate passes on.
    """

    z: Tensor
    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]
    full_grad: bool = False

    @classmethod
    def from_z(cls, z: Tensor, *, full_grad: bool = True) -> Gates:
        """Gates from the caller's own z, open where ``z != 0`` (a NaN is open); keeps z's autograd graph.

        Args:
            z: (G,) float32 or float64.
            full_grad: whether dz is wanted for every open gate, not only where 0 < z < 1.

        Raises:
            TypeError: z is no float32 or float64 tensor.
            ValueError: z is not 1-D.
        """
        _checks.check_tensor("z", z)
        if z.dtype not in _checks.GATE_DTYPES:
            raise TypeError(f"z must be float32 or float64, got {z.dtype}")
        if z.ndim != 1:
            raise ValueError(f"z must have shape (G,), got {tuple(z.shape)}")
        return cls(z, *compact(z), full_grad)

    def of(self, z: Tensor) -> Gates:
        """The same gates with another tensor of the same values for z."""
        return Gates(z, self.index, self.count, self.full_grad)

    def detached(self) -> Gates:
        """The same gates without a way back from z."""
        return self.of(self.z.detach())


def _replace(self: Gates, **changes: Any) -> Gates:
    """These gates with other fields; of another z, index and count are found anew unless both are given.

    Raises:
        TypeError: z is no tensor; an unknown field.
        ValueError: z is not 1-D.
    """
    fields = {**self._asdict(), **changes}
    if fields.keys() != set(Gates._fields):
        raise TypeError(f"a field of Gates is one of {Gates._fields}, got {sorted(set(changes))}")
    if "z" in changes and not {"index", "count"} <= changes.keys():
        _checks.check_tensor("z", fields["z"])
        if fields["z"].ndim != 1:
            raise ValueError(f"z must have shape (G,), got {tuple(fields['z'].shape)}")
        index, count = compact(fields["z"])
        fields = {**fields, "index": index, "count": count, **changes}
    return Gates(**fields)


# A NamedTuple lets no class body define these: another z in front of the old order would skip what is open.
Gates._replace = _replace  # type: ignore[method-assign, assignment]
Gates.__replace__ = _replace  # type: ignore[attr-defined]


def round_up(n: int, multiple: int = ALIGN) -> int:
    """The smallest multiple of ``multiple`` that is not below ``n``."""
    return -(-n // multiple) * multiple


def compact(z: Tensor) -> tuple[Tensor, Tensor]:
    """``index`` and ``count`` of a gate vector (see Gates), without a host sync.

    Args:
        z: (G,) any dtype; open where z != 0.

    Returns:
        index (round_up(G, ALIGN),) int32 and count (2,) int32.
    """
    closed = z.detach() == 0
    order = torch.argsort(closed.to(torch.uint8), stable=True)
    index = torch.nn.functional.pad(order.to(torch.int32), (0, round_up(len(z)) - len(z)))
    n_open = len(z) - closed.sum()
    extent = (n_open + ALIGN - 1) // ALIGN * ALIGN
    return index, torch.stack((n_open, extent)).to(torch.int32)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, (1,) int64 in [0, 2**63 - 1), from ``generator`` or else torch's default one.

    Raises:
        ValueError: the generator belongs to another device.
        RuntimeError: torch.jit.trace would freeze what is drawn.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, the device of log_alpha, got {generator.device}")
    _checks.refuse_traced_draw()
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def scale(x: Tensor, z: Tensor) -> Tensor:
    """``x * z`` in the dtype of x, rounded once: a float32 z is not rounded to the dtype of x first."""
    return (x * z).to(x.dtype)


def expand_blocks(z: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """z of blocks as a matrix of ``shape``; the edge blocks are cropped."""
    b_out, b_in = (min(b, n) for b, n in zip(block, shape, strict=True))  # a block may be larger than all
    return z.repeat_interleave(b_out, 0)[: shape[0]].repeat_interleave(b_in, 1)[:, : shape[1]]


def check_dist(dist: Any) -> None:
    """TypeError unless ``dist`` is a HardConcrete."""
    if not isinstance(dist, HardConcrete):
        raise TypeError(f"dist must be a HardConcrete, got {type(dist).__name__}")


def check_not_nan(name: str, log_alpha: Tensor) -> None:
    """ValueError if a CPU tensor holds a NaN. On a GPU that would cost a sync: there the NaN shows in z."""
    if log_alpha.device.type == "cpu" and _checks.readable() and torch.isnan(log_alpha).any():
        raise ValueError(f"{name} must not hold NaN, got {int(torch.isnan(log_alpha).sum())} NaN value(s)")


def check_gates(name: str, gates: Any, size: int, device: torch.device, what: str) -> None:
    """Checks, by attributes only, that ``gates`` is a Gates of ``size`` gates on ``device``.

    Args:
        what: what each gate gates, for the message.

    Raises:
        TypeError: not a Gates, or its tensors have the wrong dtype.
        ValueError: another number of gates, another device, or an index or count that does not belong to z.
    """
    if not isinstance(gates, Gates):
        raise TypeError(
            f"{name} must be Gates (see sample_gates, eval_gates, Gates.from_z), got {type(gates).__name__}"
        )
    z, index, count, _ = gates
    for part, value in (("z", z), ("index", index), ("count", count)):
        _checks.check_tensor(f"{name}.{part}", value)
        _checks.check_device(f"{name}.{part}", value, device, "the tensor it gates")
    if z.dtype not in _checks.GATE_DTYPES:
        raise TypeError(f"{name}.z must be float32 or float64, got {z.dtype}")
    if z.ndim != 1 or z.shape[0] != size:
        raise ValueError(f"{name} must hold {size} gates, one per {what}, got z of shape {tuple(z.shape)}")
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise TypeError(f"{name}.index and .count must be int32, got {index.dtype} and {count.dtype}")
    _checks.check_shape(f"{name}.index", index, (round_up(size),), f"{size} gates rounded up to {ALIGN}")
    _checks.check_shape(f"{name}.count", count, (2,), "[open, extent]")


def check_layer_gates(
    n_in: int,
    n_out: int,
    device: torch.device,
    in_gates: Gates | None,
    out_gates: Gates | None,
    out_support: Gates | None,
) -> None:
    """Checks of the three gate arguments of a layer with ``n_in`` inputs and ``n_out`` outputs."""
    if out_gates is not None and out_support is not None:
        raise ValueError("give either out_gates or out_support, got both")
    if in_gates is not None:
        check_gates("in_gates", in_gates, n_in, device, "input of weight")
    if out_gates is not None:
        check_gates("out_gates", out_gates, n_out, device, "output of weight")
    if out_support is not None:
        check_gates("out_support", out_support, n_out, device, "output of weight")
