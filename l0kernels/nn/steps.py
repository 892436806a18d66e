"""What the modules of a container do to closed units, as far as this package knows them."""

from typing import Any, TypeGuard

from torch import nn

from .._compat import AnyBatchNorm, AnyConv
from .batch_norm import L0BatchNorm
from .conv import (
    GatedConv,
    L0Conv1d,
    L0Conv2d,
    L0Conv3d,
    L0ConvTranspose1d,
    L0ConvTranspose2d,
    L0ConvTranspose3d,
)
from .linear import L0Linear
from .mlp import ACTIVATIONS

ZERO_KEEPING = {
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
}
POINTWISE = ZERO_KEEPING | {nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Sigmoid, nn.Softplus, nn.Threshold}
CHANNELWISE = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.ReflectionPad1d: 1,
    nn.ReflectionPad2d: 2,
    nn.ReflectionPad3d: 3,
    nn.ReplicationPad1d: 1,
    nn.ReplicationPad2d: 2,
    nn.ReplicationPad3d: 3,
    nn.ZeroPad1d: 1,
    nn.ZeroPad2d: 2,
    nn.ZeroPad3d: 3,
}
"""Of each channel by itself, and zero where that is zero: how many dimensions they work on, the last ones."""

CONVOLUTIONS: dict[type[Any], type[GatedConv]] = {
    nn.Conv1d: L0Conv1d,
    nn.Conv2d: L0Conv2d,
    nn.Conv3d: L0Conv3d,
    nn.ConvTranspose1d: L0ConvTranspose1d,
    nn.ConvTranspose2d: L0ConvTranspose2d,
    nn.ConvTranspose3d: L0ConvTranspose3d,
}
"""torch's, and their gated kin."""
PLAIN = (nn.Conv1d, nn.Conv2d)
"""Of these containers know torch's own, too."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

FEATURES = -1
"""Where the units of a value lie, as a dimension from its end: features in the last one."""

UNKNOWN = 0
"""A number of dimensions that no tensor has: that of what an unknown module returns."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes as nn.Linear or L0Linear; a subclass with a forward of its own may not."""
    return type(module).forward in (nn.Linear.forward, L0Linear.forward)


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `module` computes as nn.Conv2d or L0Conv2d."""
    return conv_kind(module) is nn.Conv2d


def conv_kind(module: nn.Module) -> type[Any] | None:
    """The convolution of torch as which `module` computes, gated or in PLAIN; None if it is none."""
    kind, forward = type(module), type(module).forward
    for dense, gated in CONVOLUTIONS.items():
        forwards = (dense.forward, gated.forward) if dense in PLAIN else (gated.forward,)
        if isinstance(module, dense) and forward in forwards:
            # torch's forward leaves a step to its subclasses
            same = getattr(kind, "_conv_forward", None) is getattr(dense, "_conv_forward", None)
            return dense if same else None
    return None


def is_conv(module: nn.Module) -> TypeGuard[AnyConv]:
    """Whether `module` computes as a gated convolution, or as nn.Conv1d or nn.Conv2d."""
    return isinstance(module, AnyConv) and conv_kind(module) is not None


def is_norm(module: nn.Module) -> TypeGuard[AnyBatchNorm]:
    """Whether `module` computes as nn.BatchNorm2d or an L0BatchNorm."""
    forward = type(module).forward
    if isinstance(module, L0BatchNorm):
        return forward is L0BatchNorm.forward
    return isinstance(module, nn.BatchNorm2d) and forward is nn.BatchNorm2d.forward


def is_flatten(module: nn.Module) -> bool:
    """Whether `module` makes one vector of each example."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def unit_dim(layer: Any, dim: int | None = None) -> int:
    """Where a linear layer, a convolution or a batch norm reads and writes its units, from the end.

    dim: where the value has its units, as far as that is known: a norm of (N, C) or (N, C, L) reads either;
        0 if it is not.
    """
    if is_linear(layer):
        return FEATURES
    if isinstance(layer, nn.BatchNorm1d):
        return dim if dim in (-1, -2) else 0
    if isinstance(layer, AnyBatchNorm):
        return -4 if isinstance(layer, nn.BatchNorm3d) else -3
    return -1 - len(layer.kernel_size)


def treats_units(module: nn.Module, dim: int | None) -> bool:
    """Whether `module` treats each unit of a value by itself that has them at `dim`; None: nobody knows."""
    return type(module) in POINTWISE or is_channelwise(module, dim)


def keeps_zero(module: nn.Module, dim: int | None) -> bool:
    """Whether it does, and leaves a unit of zeros zero."""
    return type(module) in ZERO_KEEPING or is_channelwise(module, dim)


def is_channelwise(module: nn.Module, dim: int | None) -> bool:
    """Whether `module` is a pooling, padding or dropout of the units at `dim`."""
    spatial = CHANNELWISE.get(type(module))
    if spatial is None or dim is None or getattr(module, "return_indices", False):
        return False
    return dim < -spatial


def behind_flatten(dim: int | None, ndim: int | None) -> int | None:
    """Where the units at `dim` lie behind :func:`is_flatten`'s module; None where they are no units any more.

    A channel of a batch becomes several features. Of a single image the channels lie in the dimension that
    is left alone.

    Args:
        ndim: of the value; None: it is a batch of what has its units first.
    """
    if dim is None or ndim == UNKNOWN:
        return None
    if ndim is None:
        return None if dim == FEATURES else FEATURES
    if ndim <= 2:
        return dim
    return {0: -2, 1: FEATURES}.get(ndim + dim)


def units_in(layer: Any) -> int:
    """Input units of a linear layer, a convolution or a batch norm."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.num_features if is_norm(layer) else layer.in_channels


def units_out(layer: Any) -> int:
    """Output units of the same."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.num_features if is_norm(layer) else layer.out_channels


def own_gate(layer: nn.Module, side: str) -> Any:
    """The gate that `layer` has as in_gate or out_gate, None if it has none."""
    return getattr(layer, side) if isinstance(layer, L0Linear | GatedConv) else None


def activation_name(module: nn.Module) -> str | None:
    """The name by which a packed chain knows the activation."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and getattr(module, "approximate", "none") == "none":
            return name
    return None
