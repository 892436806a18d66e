"""What the operators of a layer are called with: a record an operator, made once and handed down whole."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._gates import HardConcrete

Gate = list[Tensor]
"""z, index and count."""


class Wanted(NamedTuple):
    """What a backward pass is to return.

    Attributes:
        full: of each gate, whether dz is wanted wherever it is open, not where it is fractional alone.
        needs: of each gradient, whether it is wanted at all.
        dist: with it the gates' gradients are those of the log_alphas that z was drawn from, else those of z.
    """

    full: list[bool]
    needs: list[bool]
    dist: HardConcrete | None


class GateGrads(NamedTuple):
    """What unpack sums for the gates of a matrix' rows and columns, the products with ``theta``.

    Attributes:
        theta: what the matrix is the gradient of; without it no gate has one.
        rows, cols: whether those of that side are wanted.
        full_rows, full_cols: whether wherever a gate is open, not where it is fractional alone.
    """

    theta: Tensor | None = None
    rows: bool = False
    cols: bool = False
    full_rows: bool = False
    full_cols: bool = False


NO_GRADS = GateGrads()


class LinearCall(NamedTuple):
    """``y = z_out * ((x * z_in) W^T + b)`` in ``dtype``.

    Attributes:
        x: (M, in).
        weight: (out, in).
        bias: (out,).
        scale_out: whether z_out multiplies y; else it selects alone.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    in_gate: Gate | None
    out_gate: Gate | None
    scale_out: bool
    dtype: torch.dtype


class L0LinearCall(NamedTuple):
    """LinearCall with gates that are drawn on the way: those of the inputs first, by number of stream."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    in_log_alpha: Tensor | None
    out_log_alpha: Tensor | None
    seed: Tensor
    dist: HardConcrete
    dtype: torch.dtype


class MlpCall(NamedTuple):
    """The chain of gated_mlp, x (M, in).

    Attributes:
        gates: of the input of each layer.
        repack: whether backward packs operands again instead of forward's packs being kept.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    gates: list[Gate | None]
    activation: str
    dtype: torch.dtype
    repack: bool


class L0MlpCall(NamedTuple):
    """MlpCall with gates that are drawn on the way, the first of them from stream 0."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    log_alphas: list[Tensor | None]
    activation: str
    seed: Tensor
    dist: HardConcrete
    dtype: torch.dtype


class DrawnMlpCall(NamedTuple):
    """What L0MlpCall has drawn, for backward.

    Attributes:
        gated: which layers have a gate.
        z, index, count: of all gates, end to end.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    gated: list[bool]
    z: Tensor
    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]
    activation: str
    dtype: torch.dtype


class Conv2dCall(NamedTuple):
    """The convolution of gated_conv2d, x (N, C, H, W).

    Attributes:
        scale_in, scale_out: whether that side's z multiplies; else it selects alone.
        in_packed, out_packed: whether that side holds open channels alone, in the order of the index.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    in_gate: Gate | None
    out_gate: Gate | None
    scale_in: bool
    scale_out: bool
    in_packed: bool
    out_packed: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    dtype: torch.dtype

    @property
    def conv(self) -> tuple[list[int], list[int], list[int], int]:
        return self.stride, self.padding, self.dilation, self.groups


class BlockCall(NamedTuple):
    """``y = x (W * z)^T + b``, z one per block (b_out, b_in) of weight."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor
    b_out: int
    b_in: int
    dtype: torch.dtype


class AttentionCall(NamedTuple):
    """``y = z * softmax(q k^T * scale + mask) v``, closed heads skipped.

    Attributes:
        q: (B, heads, L, D).
        k, v: (B, heads / shared, S, D).
        z: one per head of q, or one per head of k.
        mask: of (B, heads, L, S), expanded or to be; bool, True where a key takes part, or to be added.
        seed: (1,) int64, of the weights that dropout leaves out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    scale: float
    is_causal: bool
    dropout: float


class ProxCall(NamedTuple):
    """``after(factor_g * before(x))``, a proximal operator of a penalty by element and by group.

    Attributes:
        x: contiguous.
        step: of x's shape, multiplies the weights of the elements, in the dtype of the arithmetic; None: 1.
        group_step: (groups,), float64, those of the groups; None: 1.
        before, after: [kind, its two numbers] as csrc/prox.h has them, [] for none.
        group: [kind, lam] likewise.
        layout: (outer, groups, inner), as which x has its groups.
    """

    x: Tensor
    step: Tensor | None
    group_step: Tensor | None
    before: list[float]
    group: list[float]
    after: list[float]
    layout: list[int]


class Atoms(NamedTuple):
    """Values that are computed of others: ``prod_j x_j``, or with ``is_any`` ``1 - prod_j (1 - x_j)``.

    Attributes:
        index: (atoms, factors) int64: which of the values before.
    """

    is_any: bool
    index: Tensor  # type: ignore[assignment]


class CostTerms(NamedTuple):
    """A cost of n gates that are open to the shares x: ``constant + <linear, x> + sum_t c_t s_a(t) s_b(t)``.

    ``s_k`` is a weighted sum of x. Behind the gates x goes on: 1, 0, and the atoms, which are the units that
    several gates close.

    Attributes:
        n: how many gates.
        atoms: one after the other, each may read those before.
        linear: (width,) float64.
        offsets: (sides + 1,) int64: where the sums begin in index and weight.
        index, weight: what the sums are of, int64 and float64.
        first, second: (terms,) int64: the two sums of each product.
        coefficient: (terms,) float64.
    """

    n: int
    atoms: tuple[Atoms, ...]
    constant: float
    linear: Tensor
    offsets: Tensor
    index: Tensor  # type: ignore[assignment]
    weight: Tensor
    first: Tensor
    second: Tensor
    coefficient: Tensor

    @property
    def width(self) -> int:
        """How many values there are: gates, 1, 0, and atoms."""
        return self.n + 2 + sum(len(atoms.index) for atoms in self.atoms)

    def to(self, device: torch.device) -> "CostTerms":
        """The same on a device."""
        atoms = tuple(Atoms(one.is_any, one.index.to(device)) for one in self.atoms)
        return CostTerms(self.n, atoms, self.constant, *(value.to(device) for value in self[3:]))
