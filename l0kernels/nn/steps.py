"""What the modules of a container do to closed units, as far as this package knows them."""

from typing import Any, TypeGuard

from torch import nn

from .batch_norm import L0BatchNorm2d
from .conv import L0Conv1d, L0Conv2d
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
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.ReflectionPad1d: 1,
    nn.ReflectionPad2d: 2,
    nn.ReplicationPad1d: 1,
    nn.ReplicationPad2d: 2,
    nn.ZeroPad1d: 1,
    nn.ZeroPad2d: 2,
}
"""Of each channel by itself, and zero where that is zero: how many dimensions they work on, the last ones."""

FEATURES = -1
"""Where the units of a value lie, as a dimension from its end: features in the last one."""

UNKNOWN = 0
"""A number of dimensions that no tensor has: that of what an unknown module returns."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes as nn.Linear or L0Linear; a subclass with a forward of its own may not."""
    return type(module).forward in (nn.Linear.forward, L0Linear.forward)


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `module` computes as nn.Conv2d or L0Conv2d."""
    return type(module).forward in (nn.Conv2d.forward, L0Conv2d.forward) and _convolves(module, nn.Conv2d)


def _convolves(module: nn.Module, kind: type[nn.Conv1d | nn.Conv2d]) -> bool:
    """Whether the step that torch's forward leaves to its subclasses is that of `kind`."""
    return getattr(type(module), "_conv_forward", None) is kind._conv_forward


def is_conv(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether `module` computes as nn.Conv1d, nn.Conv2d or their gated kin."""
    if type(module).forward in (nn.Conv1d.forward, L0Conv1d.forward):
        return _convolves(module, nn.Conv1d)
    return is_conv2d(module)


def is_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether `module` computes as nn.BatchNorm2d or L0BatchNorm2d."""
    forward = type(module).forward
    return isinstance(module, nn.BatchNorm2d) and forward in (nn.BatchNorm2d.forward, L0BatchNorm2d.forward)


def is_flatten(module: nn.Module) -> bool:
    """Whether `module` makes one vector of each example."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def unit_dim(layer: nn.Module) -> int:
    """Where a linear layer, a convolution or a batch norm reads and writes its units, from the end."""
    if is_linear(layer):
        return FEATURES
    return -2 if isinstance(layer, nn.Conv1d) else -3


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
    return getattr(layer, side) if isinstance(layer, L0Linear | L0Conv1d | L0Conv2d) else None


def activation_name(module: nn.Module) -> str | None:
    """The name by which a packed chain knows the activation."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and getattr(module, "approximate", "none") == "none":
            return name
    return None
