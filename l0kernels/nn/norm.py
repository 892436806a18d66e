"""Layer, RMS and group norms that keep closed units closed."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._gates import Gates
from ..norm import gated_group_norm, gated_layer_norm, gated_rms_norm
from .gate import Unscriptable
from .ranks import released

Norm = TypeVar("Norm", bound=nn.Module)


def _from_dense(layer: Norm, norm: nn.Module) -> Norm:
    """`layer` with copies of the parameters of `norm`, in its mode; one that `norm` lacks is taken away."""
    with torch.no_grad():
        for name, of in norm.named_parameters(recurse=False):
            layer.get_parameter(name).copy_(of).requires_grad_(of.requires_grad)
    for name in [name for name in layer._parameters if norm._parameters.get(name) is None]:
        layer.register_parameter(name, None)
    return layer.train(norm.training)


def _check_kind(norm: Any, kind: type[nn.Module]) -> dict[str, Any]:
    """TypeError unless `norm` is one of torch's `kind`; its device and dtype."""
    if not isinstance(norm, kind):
        raise TypeError(f"norm must be a torch.nn.{kind.__name__}, got {type(norm).__name__}")
    like = next(norm.parameters(recurse=False), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def plain_norm(norm: nn.Module) -> nn.Module:
    """torch's norm of which `norm` is one of open units, with copies of its parameters, in its mode."""
    kind = next(kind for kind in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm) if isinstance(norm, kind))
    return _from_dense(kind(*_arguments(norm), **_check_kind(norm, kind)), norm)


def _arguments(norm: Any) -> tuple[Any, ...]:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups, norm.num_channels, norm.eps, norm.affine
    return norm.normalized_shape, norm.eps, norm.elementwise_affine


class L0LayerNorm(Unscriptable, nn.LayerNorm):
    r"""``torch.nn.LayerNorm`` over open features: a closed feature is exactly 0 and counts in no statistic.

    ``y_i = 1[z_i != 0] * ((x_i - mean) / sqrt(var + eps) * weight_i + bias_i)``, mean and var of the open
    features of each row, in training as in evaluation: what a layer norm of the open features alone would
    compute, after which a narrower network is a slice of this one. Without gates, or with all of them open,
    it is ``torch.nn.LayerNorm``, whose arguments, parameters and state_dict it has. The value of z takes no
    part and gets no gradient: multiply by it once, in what writes the features or in what reads them.

    The gates are those that its forward is given; no container finds them.
    """

    @classmethod
    def from_dense(cls, norm: nn.LayerNorm) -> "L0LayerNorm":
        """A layer with copies of `norm`'s parameters, on its device, in its dtype and mode.

        Raises:
            TypeError: `norm` is not a ``torch.nn.LayerNorm``.
        """
        options = _check_kind(norm, nn.LayerNorm)
        return _from_dense(cls(*_arguments(norm), **options), norm)

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """The norm of the open features.

        Args:
            x: (..., *normalized_shape).
            gates: of the last dimension, which is then all of normalized_shape, or None: all are open.

        Returns:
            As x; zeros in closed features.

        Raises:
            ValueError: gates and a normalized_shape of several dimensions; as
                :func:`l0kernels.gated_layer_norm`.
        """
        return gated_layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, gates=released(gates)
        )


class L0RMSNorm(Unscriptable, nn.RMSNorm):
    r"""``torch.nn.RMSNorm`` over open features: a closed feature is exactly 0 and counts in no statistic.

    ``y_i = 1[z_i != 0] * x_i / sqrt(mean of x^2 + eps) * weight_i``, the mean over the open features of each
    row; see :class:`L0LayerNorm`.
    """

    @classmethod
    def from_dense(cls, norm: nn.RMSNorm) -> "L0RMSNorm":
        """A layer with a copy of `norm`'s weight, on its device, in its dtype and mode.

        Raises:
            TypeError: `norm` is not a ``torch.nn.RMSNorm``.
        """
        options = _check_kind(norm, nn.RMSNorm)
        return _from_dense(cls(*_arguments(norm), **options), norm)

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """The norm of the open features; as :meth:`L0LayerNorm.forward`."""
        return gated_rms_norm(x, self.normalized_shape, self.weight, self.eps, gates=released(gates))


class L0GroupNorm(Unscriptable, nn.GroupNorm):
    r"""``torch.nn.GroupNorm`` over open channels: a closed channel is exactly 0 and counts in no statistic.

    ``y_c = 1[z_c != 0] * ((x_c - mean_g) / sqrt(var_g + eps) * weight_c + bias_c)``, mean and var over the
    open channels of c's group g and all positions of an example. A group without an open channel is zero.
    The rest is as for :class:`L0LayerNorm`.
    """

    @classmethod
    def from_dense(cls, norm: nn.GroupNorm) -> "L0GroupNorm":
        """A layer with copies of `norm`'s parameters, on its device, in its dtype and mode.

        Raises:
            TypeError: `norm` is not a ``torch.nn.GroupNorm``.
        """
        options = _check_kind(norm, nn.GroupNorm)
        return _from_dense(cls(*_arguments(norm), **options), norm)

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        """The norm of the open channels.

        Args:
            x: (N, num_channels, ...).
            gates: of the channels, or None: all are open.

        Returns:
            As x; zeros in closed channels.
        """
        return gated_group_norm(x, self.num_groups, self.weight, self.bias, self.eps, gates=released(gates))
