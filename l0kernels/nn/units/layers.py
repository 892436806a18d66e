"""What a layer of torch.nn computes of its open units.

In eager mode on a CPU a layer reads and writes packed activations: its parameters are gathered, and torch's
own function runs on what exists. Elsewhere, where no shape may depend on the gates, closed units are zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _checks
from ..._autograd import apply
from ...linear import gated_linear
from .draws import Draw, Space
from .kinds import Kind
from .narrow import Narrow, plain

if TYPE_CHECKING:
    from .place import GateGroups


class Units(NamedTuple):
    """Where the gates of a layer are.

    Attributes:
        groups: those of the whole model.
        kind: of the layer.
        ins, outs: the units that it reads and makes; None: those are always open. A norm has outs alone.
    """

    groups: GateGroups
    kind: Kind
    ins: Space | None
    outs: Space | None


def run(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a gated layer."""
    units: Units = layer._l0_units
    _checks.check_tensor("x" if units.kind.name != "embedding" else "input", x)
    draw = units.groups.now()
    if draw.exact:
        return getattr(_Exact(units, draw), units.kind.name)(layer, x, *args, **kwargs)
    return getattr(_Static(units, draw), units.kind.name)(layer, plain(x), *args, **kwargs)


class _PackWeight(torch.autograd.Function):
    """weight[rows][:, cols] * z along `dims`, and back; z is the factor of the columns, None for 1."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        z: Tensor | None,
        rows: Tensor | None,
        cols: Tensor | None,
        dims: tuple[int, int],
    ) -> Tensor:
        row_dim, col_dim = dims
        packed = weight if rows is None else weight.index_select(row_dim, rows)
        packed = packed if cols is None else packed.index_select(col_dim, cols)
        if z is not None:
            packed = packed * _along(z, col_dim, weight.ndim)
        ctx.save_for_backward(z, rows, cols, packed)
        ctx.settings = (weight.shape, dims)
        return packed if packed is not weight else weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, rows, cols, packed = ctx.saved_tensors
        shape, (row_dim, col_dim) = ctx.settings
        dz = None
        if z is not None:
            if ctx.needs_input_grad[1]:
                others = [dim for dim in range(grad.ndim) if dim != col_dim]
                dz = (grad * packed).sum(others) / torch.where(z == 0, 1, z)
            grad = grad * _along(z, col_dim, grad.ndim)
        if not ctx.needs_input_grad[0]:
            return None, dz, None, None, None
        if cols is not None:
            size = list(grad.shape)
            size[col_dim] = shape[col_dim]
            grad = grad.new_zeros(size).index_copy_(col_dim, cols, grad)
        if rows is not None:
            grad = grad.new_zeros(shape).index_copy_(row_dim, rows, grad)
        return grad, dz, None, None, None


def _along(value: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor of `ndim` dimensions that has it at `dim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return value.view(shape)


class _Exact:
    """Layers of what exists."""

    def __init__(self, units: Units, draw: Draw) -> None:
        self.units, self.draw = units, draw

    def enter(self, x: Tensor, space: Space | None, dim: int) -> Tensor:
        """What exists of x, whose dimension `dim` has the units of `space`."""
        if isinstance(x, Narrow):
            if x._at is not None and x._at[0] is space and x._at[1] == dim and x._at[2] is self.draw:
                return x._data
            x = x.dense()
        index = None if space is None else self.draw.present(space).index
        return x if index is None else x.index_select(dim, index)

    def leave(self, y: Tensor, dim: int) -> Tensor:
        """y, which has what exists of the outputs, as the layer's result."""
        outs = self.units.outs
        if outs is None or self.draw.open_all:
            return y
        return Narrow.of(y, outs, dim, self.draw, self.units.groups.spaces)

    def index(self, space: Space | None) -> Tensor | None:
        """What exists of a space, None: all."""
        return None if space is None else self.draw.present(space).index

    def take(self, parameter: Tensor | None, dim: int = 0) -> Tensor | None:
        """The present entries of a parameter that has the outputs' units."""
        index = self.index(self.units.outs)
        return parameter if parameter is None or index is None else parameter.index_select(dim, index)

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The weight of what exists, times z of the inputs."""
        ins, kind = self.units.ins, self.units.kind
        z = (
            None
            if ins is None or (self.draw.open_all and not self.draw.z.requires_grad)
            else self.draw.scales(ins, dtype)
        )
        rows, cols = self.index(self.units.outs), self.index(ins)
        if z is None and rows is None and cols is None:
            return layer.weight
        return apply(_PackWeight, layer.weight, z, rows, cols, (kind.rows, kind.cols))

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        dim = x.ndim - 1
        x = self.enter(x, self.units.ins, dim)
        y = F.linear(x, self.weight(layer, layer.weight.dtype), self.take(layer.bias))
        return self.leave(y, dim)

    def conv(self, layer: Any, x: Tensor) -> Tensor:
        dim = x.ndim - 1 - self.units.kind.spatial
        if layer.groups > 1:
            x = self.enter(x, self.units.ins, dim)
            return self.leave(self.grouped(layer, x), dim)
        x = self.enter(x, self.units.ins, dim)
        y = layer._conv_forward(x, self.weight(layer, layer.weight.dtype), self.take(layer.bias))
        return self.leave(y, dim)

    def grouped(self, layer: Any, x: Tensor) -> Tensor:
        """A group of channels is one unit: so many fewer groups are there."""
        weight, bias = self.take(layer.weight), self.take(layer.bias)
        assert weight is not None
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[self.units.kind.spatial - 1]
        groups = weight.shape[0] // (layer.out_channels // layer.groups)
        return convolve(x, weight, bias, layer.stride, padding, layer.dilation, groups)

    def transposed(self, layer: Any, x: Tensor, output_size: Any = None) -> Tensor:
        spatial = self.units.kind.spatial
        dim = x.ndim - 1 - spatial
        options = _transposed_options(layer, x, output_size, spatial)
        x = self.enter(x, self.units.ins, dim)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        y = convolve(x, self.weight(layer, layer.weight.dtype), self.take(layer.bias), **options)
        return self.leave(y, dim)

    def batch_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        x = self.enter(x, self.units.outs, 1)
        index, present = self.index(self.units.outs), self.draw.present(cast(Space, self.units.outs))
        norm = _BatchNorm(layer)
        some = [t if t is None or index is None else t.index_select(0, index) for t in norm.running]
        if norm.tracks and index is None and present.open is not None:  # what is closed keeps its statistics
            some = [None if t is None else t.clone() for t in some]
        y = norm(x, some, self.take(layer.weight), self.take(layer.bias))
        within, places = present.places()
        if norm.tracks and places is not None:
            with torch.no_grad():
                for whole, part in zip(norm.running, some, strict=True):
                    if whole is not None and part is not None:
                        whole.index_copy_(0, places, part if within is None else part.index_select(0, within))
        return self.leave(y, 1)

    def layer_norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        dim = x.ndim - 1
        x = self.enter(x, self.units.outs, dim)
        y = F.layer_norm(x, x.shape[-1:], self.take(layer.weight), self.take(layer.bias), layer.eps)
        return self.leave(y, dim)

    def rms_norm(self, layer: nn.RMSNorm, x: Tensor) -> Tensor:
        dim = x.ndim - 1
        x = self.enter(x, self.units.outs, dim)
        return self.leave(F.rms_norm(x, x.shape[-1:], self.take(layer.weight), layer.eps), dim)

    def group_norm(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        x = self.enter(x, self.units.outs, 1)
        groups = layer.num_groups if layer.num_groups != layer.num_channels else x.shape[1]
        return self.leave(
            F.group_norm(x, groups, self.take(layer.weight), self.take(layer.bias), layer.eps), 1
        )

    def instance_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        dim = 1 if x.ndim == layer._get_no_batch_dim() + 1 else 0
        x = self.enter(x, self.units.outs, dim)
        batch = x if dim else x.unsqueeze(0)
        y = F.instance_norm(
            batch, None, None, self.take(layer.weight), self.take(layer.bias), True, 0.0, layer.eps
        )
        return self.leave(y if dim else y.squeeze(0), dim)

    def prelu(self, layer: nn.PReLU, x: Tensor) -> Tensor:
        dim = min(1, x.ndim - 1)
        x = self.enter(x, self.units.outs, dim)
        return self.leave(F.prelu(x, cast(Tensor, self.take(layer.weight))), dim)

    def embedding(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        y = _embedded(layer, x)  # gathering the columns of all words would take longer
        index = self.index(self.units.outs)
        return self.leave(y if index is None else y.index_select(-1, index), y.ndim - 1)


class _BatchNorm:
    """What torch's batch norm does beside the formula.

    Attributes:
        tracks: whether this call moves the running statistics.
        running: mean and variance, None where the batch's are used.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.tracks = layer.training and layer.track_running_stats and layer.running_mean is not None
        self._momentum = 0.0 if layer.momentum is None else layer.momentum
        if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:
                self._momentum = 1.0 / float(layer.num_batches_tracked)
        use = not layer.training or layer.track_running_stats
        self.running = [layer.running_mean, layer.running_var] if use else [None, None]

    def __call__(
        self, x: Tensor, running: list[Tensor | None], weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        of_batch = self._layer.training or running[0] is None
        return F.batch_norm(
            x, running[0], running[1], weight, bias, of_batch, self._momentum, self._layer.eps
        )


def _embedded(layer: nn.Embedding, x: Tensor) -> Tensor:
    return F.embedding(
        x,
        layer.weight,
        layer.padding_idx,
        layer.max_norm,
        layer.norm_type,
        layer.scale_grad_by_freq,
        layer.sparse,
    )


def _transposed_options(layer: Any, x: Tensor, output_size: Any, spatial: int) -> dict[str, Any]:
    if layer.padding_mode != "zeros":
        raise ValueError("Only `zeros` padding mode is supported for ConvTranspose")
    padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
    )
    return {
        "stride": layer.stride,
        "padding": layer.padding,
        "output_padding": padding,
        "groups": layer.groups,
        "dilation": layer.dilation,
    }


class _Static:
    """Layers of dense activations whose closed units are zero."""

    def __init__(self, units: Units, draw: Draw) -> None:
        self.units, self.draw = units, draw

    def mask(self, y: Tensor, dim: int) -> Tensor:
        """y, zero where an output is closed."""
        outs = self.units.outs
        return y if outs is None else y * _along(self.draw.mask(outs, y.dtype), dim, y.ndim)

    def scaled(self, x: Tensor, dim: int) -> Tensor:
        """x times z of the inputs."""
        ins = self.units.ins
        return x if ins is None else x * _along(self.draw.scales(ins, x.dtype), dim, x.ndim)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        ins, outs = self.units.ins, self.units.outs
        gates = {
            "in_gates": None if ins is None else self.draw.gates(ins),
            "out_support": None if outs is None else self.draw.gates(outs),
        }
        return gated_linear(x, layer.weight, layer.bias, **gates)

    def conv(self, layer: Any, x: Tensor) -> Tensor:
        dim = x.ndim - 1 - self.units.kind.spatial
        x = x if layer.groups > 1 else self.scaled(x, dim)
        return self.mask(layer._conv_forward(x, layer.weight, layer.bias), dim)

    def transposed(self, layer: Any, x: Tensor, output_size: Any = None) -> Tensor:
        spatial = self.units.kind.spatial
        dim = x.ndim - 1 - spatial
        options = _transposed_options(layer, x, output_size, spatial)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        return self.mask(convolve(self.scaled(x, dim), layer.weight, layer.bias, **options), dim)

    def batch_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        norm = _BatchNorm(layer)
        some = [None if t is None else t.clone() if norm.tracks else t for t in norm.running]
        y = norm(x, some, layer.weight, layer.bias)
        if norm.tracks:
            is_open = self.draw.mask(cast(Space, self.units.outs), torch.bool)
            with torch.no_grad():
                for whole, new in zip(norm.running, some, strict=True):
                    if whole is not None and new is not None:
                        whole.copy_(torch.where(is_open, new, whole))
        return self.mask(y, 1)

    def layer_norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return self._normal(layer, x, centred=True)

    def rms_norm(self, layer: nn.RMSNorm, x: Tensor) -> Tensor:
        return self._normal(layer, x, centred=False)

    def _normal(self, layer: Any, x: Tensor, centred: bool) -> Tensor:
        outs, wide = self.units.outs, torch.promote_types(x.dtype, torch.float32)
        assert outs is not None
        mask = self.draw.mask(outs, wide)
        n, value = mask.sum().clamp(min=1), x.to(wide) * mask
        if centred:
            value = (value - value.sum(-1, keepdim=True) / n) * mask
        eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
        y = value * torch.rsqrt(value.square().sum(-1, keepdim=True) / n + eps)
        if layer.weight is not None:
            y = y * layer.weight
        bias = getattr(layer, "bias", None)
        y = y if bias is None else y + bias
        return self.mask(y.to(x.dtype), x.ndim - 1)

    def group_norm(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        outs, wide = self.units.outs, torch.promote_types(x.dtype, torch.float32)
        assert outs is not None
        mask = (
            _along(self.draw.mask(outs, wide), 1, x.ndim)
            .expand(x.shape)
            .reshape(x.shape[0], layer.num_groups, -1)
        )
        n = mask.sum(-1, keepdim=True).clamp(min=1)
        value = x.to(wide).reshape(mask.shape) * mask
        value = (value - value.sum(-1, keepdim=True) / n) * mask
        y = (value * torch.rsqrt(value.square().sum(-1, keepdim=True) / n + layer.eps)).view(x.shape)
        if layer.weight is not None:
            y = y * _along(layer.weight, 1, x.ndim) + _along(layer.bias, 1, x.ndim)
        return self.mask(y.to(x.dtype), 1)

    def instance_norm(self, layer: Any, x: Tensor) -> Tensor:
        dim = 1 if x.ndim == layer._get_no_batch_dim() + 1 else 0
        return self.mask(type(layer).__mro__[2].forward(layer, x), dim)  # type: ignore[attr-defined]

    def prelu(self, layer: nn.PReLU, x: Tensor) -> Tensor:
        return F.prelu(x, layer.weight)

    def embedding(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        return self.mask(_embedded(layer, x), x.ndim)
