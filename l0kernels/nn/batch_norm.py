"""Batch norm that keeps closed channels closed."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .._compat import AnyBatchNorm
from ..batch_norm import gated_batch_norm
from ..conv2d import Packed
from ..gates import Gates
from .gate import Unscriptable
from .linear import copy_parameters_

Self = TypeVar("Self", bound="L0BatchNorm")
Result = TypeVar("Result")


class ChannelAverages:
    """Mixin of batch norms some of whose channels are closed: with momentum=None the statistics of a channel
    are its average over the batches in which it was open. The device alone knows how many those are."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    batches_open: Tensor
    """(channels,) int64, a buffer once momentum was None."""
    _buffers: dict[str, Tensor | None]
    register_buffer: Callable[..., None]

    def average(self, is_open: Tensor | None, norm: Callable[[Tensor, Tensor], Result]) -> Result:
        """A training step.

        Args:
            is_open: (channels,) which are, None: all.
            norm: computes it and puts the batch's statistics of open channels into the vectors that it gets.

        Returns:
            What `norm` does.
        """
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert var is not None
        assert tracked is not None
        seen = self._buffers.get("batches_open")
        # Somebody may have set num_batches_tracked back.
        seen = tracked.expand(len(mean)) if seen is None else torch.minimum(seen, tracked)
        seen = seen + (1 if is_open is None else is_open.to(seen.dtype))
        of_batch = mean.clone(), var.clone()
        y = norm(*of_batch)
        with torch.no_grad():
            tracked.add_(1)
            for running, value in zip((mean, var), of_batch, strict=True):
                running.add_((value - running) / seen.clamp(min=1))  # a closed channel's value is as it was
        self.register_buffer("batches_open", seen, persistent=False)
        return y

    def forget_counts(self) -> None:
        """Every channel counts num_batches_tracked from here on."""
        self._buffers.pop("batches_open", None)

    def reset_running_stats(self) -> None:
        """As torch's; the next cumulative average starts anew, too."""
        super().reset_running_stats()  # type: ignore[misc]
        self.forget_counts()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.forget_counts()


class L0BatchNorm(Unscriptable, ChannelAverages, AnyBatchNorm):
    """What the batch norms of open channels share."""

    dense: ClassVar[type[AnyBatchNorm]]
    """torch's class."""

    @classmethod
    def from_dense(cls: type[Self], norm: AnyBatchNorm) -> Self:
        """A layer with copies of `norm`'s parameters and statistics, on its device, in its dtype and mode.

        Raises:
            TypeError: `norm` is not torch's batch norm of as many dimensions.
        """
        if not isinstance(norm, cls.dense):
            raise TypeError(f"norm must be a torch.nn.{cls.dense.__name__}, got {type(norm).__name__}")
        like = norm.weight if norm.affine else norm.running_mean
        options: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        layer = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **options
        )
        if norm.affine and norm._parameters["bias"] is None:
            layer.register_parameter("bias", None)
        copy_parameters_(layer, norm)
        for name, value in norm.named_buffers(recurse=False):
            if name == "batches_open":
                layer.register_buffer(name, value.clone(), persistent=False)
            else:
                layer.get_buffer(name).copy_(value)
        return layer.train(norm.training)

    def forward(self, x: Any, gates: Gates | None = None) -> Any:
        """The norm of the open channels.

        Args:
            x: what torch's layer takes, or Packed images, which carry their gates.
            gates: C gates that say which channels are open; None: all.

        Returns:
            As x; zeros in closed channels.
        """
        data = x.data if isinstance(x, Packed) else x
        if isinstance(data, Tensor):
            self._check_input_dim(data)
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            if self.momentum is None:
                found = x.gates if isinstance(x, Packed) else gates
                is_open = None if found is None else found.z.detach() != 0
                return self.average(is_open, lambda mean, var: self._norm(x, gates, mean, var, 1.0))
            self.forget_counts()
            self.num_batches_tracked.add_(1)
        momentum = 0.0 if self.momentum is None else self.momentum
        use_running = not self.training or self.track_running_stats
        return self._norm(
            x,
            gates,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            momentum,
        )

    def _norm(
        self,
        x: Any,
        gates: Gates | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> Any:
        training = self.training or (self.running_mean is None and self.running_var is None)
        return gated_batch_norm(
            x,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            gates=gates,
        )


class L0BatchNorm2d(L0BatchNorm, nn.BatchNorm2d):
    r"""``torch.nn.BatchNorm2d`` over open channels: a closed channel is exactly 0 and its statistics stay.

    ``y_c = 1[z_c != 0] * ((x_c - mean_c) / sqrt(var_c + eps) * weight_c + bias_c)``, mean and var of the
    batch in training, the running ones in evaluation; the running statistics of a closed channel are not
    updated. Without gates, or with all of them open, it is ``torch.nn.BatchNorm2d``, whose arguments,
    parameters, buffers and state_dict it has. The value of z takes no part.

    In an :class:`L0Sequential` the gates are found: those that close its input, or those of the next layer
    that needs only what they leave open. Behind an ungated channel an ``nn.BatchNorm2d`` would make of zeros
    the constant ``bias``: there the chain of packed channels ends.

    With ``momentum=None`` (``torch.optim.swa_utils.update_bn`` sets it for a while) the statistics of a
    channel are its average over the batches in which it was open. How many those were is not in the
    state_dict, which is ``torch.nn.BatchNorm2d``'s: after loading, every channel counts
    ``num_batches_tracked``.
    """

    dense = nn.BatchNorm2d


class L0BatchNorm1d(L0BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over open channels, of (N, C) or (N, C, L); see :class:`L0BatchNorm2d`.

    Its gates are those that its forward is given: an :class:`L0Sequential` finds none for it.
    """

    dense = nn.BatchNorm1d


class L0BatchNorm3d(L0BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over open channels, of (N, C, D, H, W); see :class:`L0BatchNorm2d`."""

    dense = nn.BatchNorm3d
