"""Batch norm that keeps closed channels closed."""

from typing import Any

from torch import Tensor, nn

from ..batch_norm import gated_batch_norm
from ..gates import Gates
from .gate import Unscriptable
from .linear import copy_parameters_


class L0BatchNorm2d(Unscriptable, nn.BatchNorm2d):
    r"""``torch.nn.BatchNorm2d`` over open channels: a closed channel is exactly 0 and its statistics stay.

    ``y_c = 1[z_c != 0] * ((x_c - mean_c) / sqrt(var_c + eps) * weight_c + bias_c)``, mean and var of the
    batch in training, the running ones in evaluation; the running statistics of a closed channel are not
    updated. Without gates, or with all of them open, it is ``torch.nn.BatchNorm2d``, whose arguments,
    parameters, buffers and state_dict it has. The value of z takes no part.

    In an :class:`L0Sequential` the gates are found: those that close its input, or those of the next layer
    that needs only what they leave open. Behind an ungated channel an ``nn.BatchNorm2d`` would make of zeros
    the constant ``bias``: there the chain of packed channels ends.
    """

    @classmethod
    def from_dense(cls, norm: nn.BatchNorm2d) -> "L0BatchNorm2d":
        """A layer with copies of `norm`'s parameters and statistics, on its device, in its dtype and mode.

        Raises:
            TypeError: `norm` is not a ``torch.nn.BatchNorm2d``.
        """
        if not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"norm must be a torch.nn.BatchNorm2d, got {type(norm).__name__}")
        like = norm.weight if norm.affine else norm.running_mean
        options: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        layer = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **options
        )
        copy_parameters_(layer, norm)
        for name, value in norm.named_buffers(recurse=False):
            layer.get_buffer(name).copy_(value)
        return layer.train(norm.training)

    def forward(self, x: Any, gates: Gates | None = None) -> Any:
        """The norm of the open channels.

        Args:
            x: (N, C, H, W), or Packed, which carries its gates.
            gates: C gates that say which channels are open; None: all.

        Returns:
            As x; zeros in closed channels.
        """
        if isinstance(x, Tensor):
            self._check_input_dim(x)
            if gates is None:
                return super().forward(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        return gated_batch_norm(
            x,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            gates=gates,
        )
