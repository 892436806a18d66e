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
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
}
"""Of each channel by itself, and zero where that is zero."""

FEATURES, CHANNELS = "features", "channels"
"""Where the units of a value lie: in its last dimension, or in the one behind the batch."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes as nn.Linear or L0Linear; a subclass with a forward of its own may not."""
    return type(module).forward in (nn.Linear.forward, L0Linear.forward)


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `module` computes as nn.Conv2d or L0Conv2d."""
    return type(module).forward in (nn.Conv2d.forward, L0Conv2d.forward)


def is_conv(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether `module` computes as nn.Conv1d, nn.Conv2d or their gated kin."""
    return is_conv2d(module) or type(module).forward in (nn.Conv1d.forward, L0Conv1d.forward)


def is_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether `module` computes as nn.BatchNorm2d or L0BatchNorm2d."""
    forward = type(module).forward
    return isinstance(module, nn.BatchNorm2d) and forward in (nn.BatchNorm2d.forward, L0BatchNorm2d.forward)


def is_flatten(module: nn.Module) -> bool:
    """Whether `module` makes one vector of each example."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def treats_units(module: nn.Module, kind: str | None) -> bool:
    """Whether `module` treats each unit of a value of this kind by itself; unknown kinds are features."""
    return type(module) in POINTWISE or (kind == CHANNELS and is_channelwise(module))


def keeps_zero(module: nn.Module, kind: str | None) -> bool:
    """Whether it does, and leaves a unit of zeros zero."""
    return type(module) in ZERO_KEEPING or (kind == CHANNELS and is_channelwise(module))


def is_channelwise(module: nn.Module) -> bool:
    """Whether `module` is a pooling, padding or dropout of channels."""
    return type(module) in CHANNELWISE and not getattr(module, "return_indices", False)


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
