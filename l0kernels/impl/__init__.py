"""Implementations of the operators in _ops.py, one module per backend; all have the same functions.

cpp      native kernels on raw addresses; 16-bit products go through packed.py
torch    packed.py over torch's own index_select, mm and index_copy
triton   launchers of triton_kernels/, imported on first use
portable what torch computes, and cpp where no kernel takes the dtype or layout
memory   the one way from a tensor to an address
packed   the compositions pack -> product -> unpack, for either of the two pairs of pack and unpack
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from .._native import native as _C

if TYPE_CHECKING:
    import torch as of_torch
    from torch import Tensor

    from .._calls import (
        AttentionCall,
        BlockCall,
        Conv2dCall,
        DrawnMlpCall,
        L0LinearCall,
        L0MlpCall,
        LinearCall,
        MlpCall,
        ProxCall,
        Wanted,
    )
    from .._gates import HardConcrete
    from . import cpp, cuda, triton
    from . import torch as plain_torch
    from .conv2d import Convolution
    from .few_channels import Conv
    from .packed import Term

_MODULES = {
    name: import_module(f"{__name__}.{name}") for name in ("torch", "cpp") if name != "cpp" or _C is not None
}


_BY_ADDRESS = {
    *("sample", "sample_expected", "gate_grad", "l0_penalty", "weighted_penalty"),
    *("gated_linear", "gated_linear_backward", "l0_linear", "block_linear", "block_linear_backward"),
    *("gated_mlp", "gated_mlp_backward", "l0_mlp", "l0_mlp_backward", "masked_weight", "masked_weight_grad"),
    "prox",
}
"""What cpp hands to csrc, every operand by an address of memory.py's: nobody else need look at it before."""


def native(operator: str) -> frozenset[str]:
    """The backends that compute an operator past torch, and look at every operand before they do."""
    return frozenset(("cpp",)) if operator in _BY_ADDRESS else frozenset()


def made_of_torch(operator: str) -> frozenset[str]:
    """Those that compute it, in part at least, by torch's own operations."""
    return frozenset(("torch",) if operator in _BY_ADDRESS else ("torch", "cpp"))


def module(name: str) -> ModuleType:
    """The module of backend ``name``."""
    if name not in _MODULES:
        _MODULES[name] = import_module(f"{__name__}.{name}")
    return _MODULES[name]


class Gates(Protocol):
    """What is asked of every backend for gates; vectors of a call are joined end to end."""

    def sample(
        self,
        log_alphas: list[Tensor],
        seed: Tensor,
        rank: int,
        dist: HardConcrete,
        expected: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, index and count; ``expected`` (vectors,) gets the expected number of open gates of each."""

    def gate_grad(self, dz: Tensor, z: Tensor, dist: HardConcrete, /) -> Tensor:
        """dlog_alpha from z alone."""

    def l0_penalty(
        self, log_alphas: list[Tensor], weights: list[float], dist: HardConcrete, /
    ) -> tuple[Tensor, Tensor]:
        """sum_g weight * p_open_g over all vectors, and its gradient, flat."""


class Layers(Protocol):
    """What is asked of every backend for layers; a gradient is None where it is not wanted."""

    def linear_forward(self, call: LinearCall, /) -> tuple[Tensor, list[Tensor]]:
        """y, and what backward takes over, of linear_saved_shapes."""

    def linear_saved_shapes(self, call: LinearCall, /) -> Sequence[tuple[int, ...]]:
        """Static, whatever is open."""

    def linear_backward(
        self, call: LinearCall, dy: Tensor, saved: list[Tensor], wanted: Wanted, /
    ) -> list[Tensor | None]:
        """dx, dweight, dbias, dz_in, dz_out."""

    def mlp_forward(self, call: MlpCall, /) -> tuple[Tensor, list[Tensor]]:
        """y, and what backward takes over, of mlp_saved_shapes."""

    def mlp_saved_shapes(self, call: MlpCall, /) -> Sequence[tuple[int, ...]]:
        """Static, whatever is open."""

    def mlp_backward(
        self, call: MlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted, /
    ) -> list[Tensor | None]:
        """dx, then all dweight, all dbias, all dz."""

    def draws_within(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        log_alphas: Sequence[Tensor],
        dtype: of_torch.dtype,
        activation: str,
        /,
    ) -> bool:
        """Whether a layer or chain of these is computed by the functions of ``Draws``."""


class Draws(Protocol):
    """Layers whose gates are drawn on the way, and returned as of ``sample``."""

    def l0_linear_forward(self, call: L0LinearCall, /) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, z, index and count; linear_backward takes these."""

    def l0_mlp_forward(
        self, call: L0MlpCall, /
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """y, what backward takes over, and z, index and count."""

    def l0_mlp_backward(
        self, call: DrawnMlpCall, dy: Tensor, saved: list[Tensor], wanted: Wanted, /
    ) -> list[Tensor | None]:
        """As mlp_backward."""


class Penalties(Protocol):
    """l0_penalty with weight decay, one pass over all gates and weights."""

    def coupled_penalty(
        self,
        terms: list[Term],
        gates: list[Tensor],
        weights: list[float],
        decay: float,
        dist: HardConcrete,
        /,
    ) -> tuple[Tensor, Tensor]:
        """The sum, and its gradient of the gates, flat."""

    def coupled_penalty_grad(
        self, terms: list[Term], gates: list[Tensor], factor: Tensor, decay: float, dist: HardConcrete, /
    ) -> list[Tensor]:
        """factor times the gradient of every weight."""


class Masked(Protocol):
    """Gates of single weights and of blocks of weights."""

    def masked_weight(self, weight: Tensor, log_alpha: Tensor, seed: Tensor, dist: HardConcrete, /) -> Tensor:
        """W * z, z drawn from the seed."""

    def masked_weight_grad(
        self,
        grad: Tensor,
        weight: Tensor,
        log_alpha: Tensor,
        seed: Tensor,
        dist: HardConcrete,
        need_w: bool,
        need_log_alpha: bool,
        /,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW and dlog_alpha from dL/d(W * z), z drawn again."""

    def block_linear_forward(self, call: BlockCall, /) -> Tensor:
        """y."""

    def block_linear_backward(self, call: BlockCall, dy: Tensor, wanted: Wanted, /) -> list[Tensor | None]:
        """dx, dweight, dbias, dz."""


class Convolutions(Protocol):
    """Convolutions of channels that exist."""

    def conv2d_forward(self, call: Conv2dCall, /) -> tuple[Tensor, list[Tensor]]:
        """y, and what backward takes over, of conv2d_saved_shapes."""

    def conv2d_saved_shapes(self, call: Conv2dCall, /) -> Sequence[tuple[int, ...]]:
        """Static, whatever is open."""

    def conv2d_memory_format(self, x: Tensor, weight: Tensor, /) -> of_torch.memory_format:
        """Of y and dx."""

    def conv2d_backward(
        self, call: Conv2dCall, dy: Tensor, saved: list[Tensor], wanted: Wanted, /
    ) -> list[Tensor | None]:
        """dx, dweight, dbias, dz_in, dz_out."""


class Exact(Protocol):
    """Convolutions of exactly the open channels."""

    def convolution(self, x: Tensor, weight: Tensor, conv: Conv, /) -> Convolution | None:
        """The backend's own, None where torch's is faster."""


class Attention(Protocol):
    """Attention that skips closed heads, whichever they are."""

    def attention_forward(self, call: AttentionCall, /) -> tuple[Tensor, list[Tensor]]:
        """y, and what backward takes over behind it: the logarithms of the rows' sums."""

    def attention_backward(
        self, call: AttentionCall, dy: Tensor, saved: list[Tensor], wanted: Wanted, /
    ) -> list[Tensor | None]:
        """dq, dk, dv, dz; ``saved``: y and the rest."""


class Proximal(Protocol):
    """Proximal operators, in place where an `out` is its x."""

    def prox(self, calls: list[ProxCall], outs: list[Tensor], /) -> None:
        """Writes each result; calls of the same stages on one device."""


class Backend(Gates, Layers, Draws, Penalties, Masked, Convolutions, Exact, Proximal, Protocol):
    """Everything but attention; who serves what says _registry.py."""


if TYPE_CHECKING:

    class _Torch(Gates, Layers, Penalties, Masked, Convolutions, Exact, Protocol): ...

    class _Cuda(Gates, Layers, Draws, Penalties, Protocol): ...

    class _Triton(Gates, Layers, Draws, Masked, Convolutions, Proximal, Attention, Protocol): ...

    _cpp: Backend = cpp
    _portable: _Torch = plain_torch
    _cuda: _Cuda = cuda
    _triton: _Triton = triton
