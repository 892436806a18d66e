"""What a layer of torch.nn computes of its open units.

In eager mode on a CPU a layer reads and writes packed activations: its parameters are gathered, and torch's
own function runs on what exists. Elsewhere, where no shape may depend on the gates, closed units are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _checks
from ..._compat import batch_norm, foreach_mul, settled
from ...conv2d import gated_conv2d
from ...impl import im2col
from ...impl.batch_norm import Channels, Settings, serves
from ...impl.conv2d import memory_format
from ...impl.im2col import Geometry, Plan, Way
from ...linear import gated_linear
from ...narrow import Sides, narrow_batch_norm, narrow_conv2d, narrow_depthwise, narrow_weight
from ...norm import gated_group_norm, gated_layer_norm, gated_rms_norm
from .draws import Draw, Present, Space
from .kinds import Kind, epsilon, factor, normalised
from .narrow import Lent, Narrow, lies_last, like, plain, refuse_function
from .narrow_layout import IN_ORDER, LAST, Order, order_of_strides

if TYPE_CHECKING:
    from .place import GateGroups


class Units(NamedTuple):
    """Where the gates of a layer are.

    Attributes:
        groups: those of the whole model.
        kind: of the layer.
        ins, outs: the units that it reads and makes; None: those are always open. A norm has outs alone.
        heads, reads: of an attention, for queries, keys and values: the features of its heads; what is read.
        lends: whether forwards of other modules give its weight to functions.
    """

    groups: GateGroups
    kind: Kind
    ins: Space | None
    outs: Space | None
    heads: tuple[Space | None, Space | None, Space | None] = (None, None, None)
    reads: tuple[Space | None, Space | None, Space | None] = (None, None, None)
    lends: bool = False


def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a gated layer."""
    if not args:  # classes name it input, x or hidden_states
        args = (kwargs.pop(next((name for name, a in kwargs.items() if isinstance(a, Tensor)), ""), None),)
    x, args = args[0], args[1:]
    units: Units = layer._l0_units
    if type(x) is not Narrow:
        _checks.check_tensor("x" if units.kind.name != "embedding" else "input", x)
    if units.kind.own and units.kind.name != "attention":  # trace.py knows it by what it makes of x alone
        more = [a for a in (*args, *kwargs.values()) if a is not None]
        if more:
            raise TypeError(
                f"{layer._l0_class.__name__} must be given one tensor, as in the example that gate_ ran, got "
                f"{len(more)} more: exclude it, or run gate_ with an example that shows them"
            )
        args, kwargs = (), {}
    draw = units.groups.now()
    if not torch.is_grad_enabled() and draw.z.requires_grad:
        refuse_function()
    if draw.exact:
        return getattr(_Exact(units, draw), units.kind.name)(layer, x, *args, **kwargs)
    return getattr(_Static(units, draw), units.kind.name)(layer, plain(x), *args, **kwargs)


def lent(layer: Any) -> Tensor:
    """The weight of a gated linear layer, as others find it that give it to a function."""
    weight, units = layer._parameters["weight"], layer._l0_units
    if not units.groups.runs:
        return weight
    draw = units.groups.now()
    if not torch.is_grad_enabled() and draw.z.requires_grad:
        refuse_function()
    if not _checks.readable():
        return masked(draw, weight, units.outs, units.ins)
    of = _Exact(units, draw) if draw.exact else _Static(units, draw)
    return Lent.of_layer(layer, weight, of.product)


def kept(layer: Any) -> Tensor:
    """The weight of a linear layer, which may lend it."""
    return layer._parameters["weight"] if layer._l0_units.lends else layer.weight


def autocasts() -> bool:
    """Whether torch computes products on a CPU in another dtype than that of their operands."""
    return torch.is_autocast_enabled("cpu")


def _along(value: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor of `ndim` dimensions that has it at `dim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return value.view(shape)


def _is_short(x: Tensor, weight: Tensor) -> bool:
    """Whether there are so few rows that z had better multiply them: a large weight is read but once."""
    return weight.numel() >= _LARGE and 8 * x.numel() <= weight.numel()


_LARGE = 1 << 18  # elements; of smaller weights the product takes less than two more operations


def masked(draw: Draw, weight: Tensor, rows: Space | None, cols: Space | None, rows_dim: int = 0) -> Tensor:
    """A weight times z of what it reads, zero where what it makes is closed: one product with it.

    Args:
        rows, cols: the units of dimension `rows_dim`, and of the other of the first two; None: always open.
    """
    if rows is None and cols is None:
        return weight
    if rows is not None and cols is not None:
        factor = draw.factor(rows, cols, rows_dim, weight.dtype)
        return weight * factor.view(*factor.shape, *[1] * (weight.ndim - 2))
    if rows is not None:
        return weight * _along(draw.mask(rows, weight.dtype), rows_dim, weight.ndim)
    assert cols is not None
    z = draw.scales(cols, weight.dtype).to(weight.dtype)
    return weight * _along(z, 1 - rows_dim, weight.ndim)


def features(kind: Kind, x: Tensor) -> int:
    """The dimension of x that a layer or RMS norm is over."""
    if kind.spatial and x.ndim != 4:
        raise ValueError(
            f"x must be images (N, channels, height, width) for this norm, got {x.ndim} dimensions"
        )
    return x.ndim - 1 - kind.spatial


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

    def leave(self, y: Tensor, dim: int, order: Order | None = None) -> Tensor:
        """y, which has what exists of the outputs, as the layer's result, which would lie in `order`."""
        outs = self.units.outs
        if outs is None or self.draw.open_all:
            return y
        found = Narrow.of(y, outs, dim, self.draw, self.units.groups.spaces)
        if order is not None:
            found._order = order
        return found

    def index(self, space: Space | None) -> Tensor | None:
        """What exists of a space, None: all."""
        return None if space is None else self.draw.present(space).index

    def take(self, parameter: Tensor | None, dim: int = 0) -> Tensor | None:
        """The present entries of a parameter that has the outputs' units."""
        index = self.index(self.units.outs)
        return parameter if parameter is None or index is None else parameter.index_select(dim, index)

    def sides(self, weight: Tensor, scales: bool = True) -> tuple[Tensor | None, Sides]:
        """z of the inputs, where that `scales` the weight, and how it is packed."""
        draw, (_, kind, ins, outs, *_) = self.draw, self.units
        z = draw.scales(ins, weight.dtype) if ins is not None and scales else None
        made = None if outs is None else draw.side(outs, weight.dtype, True)
        read = None if ins is None else draw.side(ins, weight.dtype, not scales)
        rows, cols = (made, read) if kind.cols == 1 else (read, made)
        return z, Sides(rows, cols, kind.cols, draw.backend)

    def present_scales(self, dtype: torch.dtype) -> Tensor:
        """z of the inputs that exist."""
        ins = cast(Space, self.units.ins)
        z, index = self.draw.scales(ins, dtype).to(dtype), self.index(ins)
        return z if index is None else z.index_select(0, index)

    def weight(self, layer: Any) -> Tensor:
        """The weight of what exists, times z of the inputs."""
        return narrow_weight(layer.weight, *self.sides(layer.weight))

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        return self.product(x, kept(layer), layer.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of a linear layer."""
        dim = x.ndim - 1
        x = self.enter(x, self.units.ins, dim)
        ins = self.units.ins
        short = ins is not None and not self.draw.one_all and _is_short(x, weight)
        weight = narrow_weight(weight, *self.sides(weight, scales=not short))
        x = x * self.present_scales(x.dtype) if short else x
        y = F.linear(x, weight if self.units.kind.rows == 0 else weight.T, self.take(bias))
        return self.leave(y, dim)

    def conv(self, layer: Any, x: Tensor) -> Tensor:
        dim = x.ndim - 1 - self.units.kind.spatial
        given, x, weight = x, self.enter(x, self.units.ins, dim), layer.weight
        if layer.groups > 1:
            return self.leave_images(self.grouped(layer, x, weight), dim, weight, given)
        plan = self.plan(layer, x, weight)
        if plan is not None and self.takes(plan):
            z, sides = self.sides(weight)
            y = narrow_conv2d(x, weight, self.take(layer.bias), z, sides, plan)
        else:
            packed = weight
            if not self.is_whole(x, weight):
                packed = narrow_weight(weight, *self.sides(weight))
            elif self.units.ins is not None:
                x = x * _along(self.present_scales(x.dtype), dim, x.ndim)
            y = layer._conv_forward(settled(x, 1, layer.stride), packed, self.take(layer.bias))
        return self.leave_images(y, dim, weight, given)

    def is_whole(self, x: Tensor, weight: Tensor) -> bool:
        """Whether all units exist and there are fewer activations than weights: those are multiplied by z."""
        _, _, ins, outs, *_ = self.units
        return self.index(ins) is None and self.index(outs) is None and x.numel() < weight.numel()

    def leave_images(self, y: Tensor, dim: int, weight: Tensor, given: Tensor) -> Tensor:
        """As leave of what a convolution makes of `given`. What is no Narrow somebody may view: it gets the
        memory format that torch gives it, however a norm of ours had the images before."""
        if y.ndim == 4 and (self.units.outs is None or self.draw.open_all):
            like = weight if isinstance(given, Narrow) else given
            y = y.contiguous(memory_format=memory_format(like, weight))
            return self.leave(y, dim)
        if y.ndim != 4:
            return self.leave(y, dim)
        return self.leave(y, dim, LAST if lies_last(given) or lies_last(weight) else IN_ORDER)

    def geometry(self, layer: Any, x: Tensor, weight: Tensor) -> Geometry | None:
        """How images are convolved by native code, None where it does not serve."""
        dtype, backend = x.dtype, self.draw.backend
        if x.ndim != 4 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        if backend != "cpp" or dtype != weight.dtype or not im2col.serves(dtype) or autocasts():
            return None
        return Geometry(layer.stride, layer.padding, layer.dilation)

    def plan(self, layer: Any, x: Tensor, weight: Tensor) -> Plan | None:
        """The same, with the way that is the fastest."""
        geometry, outs = self.geometry(layer, x, weight), self.units.outs
        if geometry is None:
            return None
        n = weight.shape[0] if outs is None else self.draw.present(outs).n
        kh, kw = weight.shape[2:]
        return im2col.plan(x.shape, (kh, kw), geometry, n)

    def takes(self, plan: Plan) -> bool:
        """Whether a convolution is one of channels_last images: not where all channels exist, which torch has
        compiled, nor of large kernels, unless a norm follows, which wants such images."""
        way, (kh, kw) = plan.way, plan.shape[4:6]
        if way is Way.TAPS or self.draw.open_all:
            return way is Way.TAPS
        if way in (Way.DIRECT, Way.TORCH) and self.units.outs in self.units.groups.normed:
            return True
        return self.units.ins is not None and kh * kw <= im2col.FEW_TAPS

    def grouped(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        """A group of channels is one unit: so many fewer groups are there."""
        weight, bias = cast(Tensor, self.take(weight)), self.take(layer.bias)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[self.units.kind.spatial - 1]
        groups = weight.shape[0] // (layer.out_channels // layer.groups)
        one_each = groups == weight.shape[0] == x.shape[1] and not self.draw.open_all
        geometry = self.geometry(layer, x, weight) if one_each else None
        if geometry is not None and weight.shape[2:].numel() <= im2col.MOST_TAPS:
            y = narrow_depthwise(x, weight, geometry)
            return y if bias is None else y + _along(bias, 1, 4)
        x = settled(x, groups, layer.stride)
        return convolve(x, weight, bias, layer.stride, padding, layer.dilation, groups)

    def transposed(self, layer: Any, x: Tensor, output_size: Any = None) -> Tensor:
        spatial = self.units.kind.spatial
        dim = x.ndim - 1 - spatial
        options = _transposed_options(layer, x, output_size, spatial)
        given, x = x, self.enter(x, self.units.ins, dim)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        y = convolve(x, self.weight(layer), self.take(layer.bias), **options)
        return self.leave_images(y, dim, layer.weight, given)

    def batch_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        outs = cast(Space, self.units.outs)
        order = _order_of_images(x)
        x = self.enter(x, outs, 1)
        y = _step(layer, self.draw, outs, lambda norm: self.normalised(norm, x, outs))
        return self.leave(y, 1, order)

    def normalised(self, norm: _BatchNorm, x: Tensor, outs: Space) -> Tensor:
        """The norm of what exists."""
        (weight, bias), running, present = norm.affine, norm.running, self.draw.present(outs)
        if self.draw.open_all or self.draw.backend != "cpp" or not serves(x, weight, bias, *running):
            return self.gathered_batch_norm(norm, x, present)
        channels = Channels(present.index, present.within)
        settings = Settings(norm.of_batch, norm.momentum, norm.eps, outs.size)
        return narrow_batch_norm(x, weight, bias, running[0], running[1], channels, settings)

    def gathered_batch_norm(self, norm: _BatchNorm, x: Tensor, present: Present) -> Tensor:
        """By torch's operations."""
        index, within, places = present.index, present.within, present.places
        some = [t if t is None or index is None else t.index_select(0, index) for t in norm.running]
        if norm.tracks and index is None and places is not None:  # closed ones keep their statistics
            some = [None if t is None else t.clone() for t in some]
        weight, bias = norm.affine
        y = norm(x, some, self.take(weight), self.take(bias))
        if norm.tracks and places is not None:
            with torch.no_grad():
                for whole, part in zip(norm.running, some, strict=True):
                    if whole is not None and part is not None:
                        whole.index_copy_(0, places, part if within is None else part.index_select(0, within))
        return y

    def over_open(
        self, norm: Callable[..., Tensor], layer: Any, x: Tensor, dim: int, order: Order | None = None
    ) -> Tensor:
        """A norm of what exists, but for a closed unit, which is there where all of its group are closed.

        Args:
            norm: of x, weight and bias.
        """
        x = self.enter(x, self.units.outs, dim)
        affine = [self.take(layer.weight), self.take(getattr(layer, "bias", None))]
        within = self.draw.present(cast(Space, self.units.outs)).within
        if within is None or not len(within):
            return self.leave(norm(x, *affine), dim, order)
        affine = [None if t is None else t.index_select(0, within) for t in affine]
        y = norm(x.index_select(dim, within), *affine)
        return self.leave(torch.zeros_like(x, dtype=y.dtype).index_copy(dim, within, y), dim, order)

    def layer_norm(self, layer: Any, x: Tensor) -> Tensor:
        kind, eps = self.units.kind, epsilon(layer)
        dim = features(kind, x)
        return self.over_open(lambda x, weight, bias: normalised(kind, x, weight, bias, eps), layer, x, dim)

    rms_norm = layer_norm

    def group_norm(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            groups = layer.num_groups if layer.num_groups != layer.num_channels else x.shape[1]
            return F.group_norm(x, groups, weight, bias, layer.eps)

        return self.over_open(norm, layer, x, 1, _order_of_images(x))

    def instance_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        dim = 1 if x.ndim == layer._get_no_batch_dim() + 1 else 0
        x = self.enter(x, self.units.outs, dim)
        batch, affine = x if dim else x.unsqueeze(0), (self.take(layer.weight), self.take(layer.bias))
        if len(batch) == 1:  # F.instance_norm, whose backward errs where gradients are channels_last
            y = F.group_norm(batch, batch.shape[1], *affine, layer.eps)
        else:
            y = F.instance_norm(batch, None, None, *affine, True, 0.0, layer.eps)
        return self.leave(y if dim else y.squeeze(0), dim)

    def prelu(self, layer: nn.PReLU, x: Tensor) -> Tensor:
        dim = min(1, x.ndim - 1)
        order = x._order if isinstance(x, Narrow) else order_of_strides(x.stride())
        x = self.enter(x, self.units.outs, dim)
        return self.leave(F.prelu(x, cast(Tensor, self.take(layer.weight))), dim, order)

    def pointwise(self, layer: Any, x: Tensor) -> Tensor:
        if not isinstance(x, Narrow) or x._at is None:
            return layer._l0_class.forward(layer, x)
        return like(x, layer._l0_class.forward(layer, x._data))

    def embedding(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        y = _embedded(layer, x)  # gathering the columns of all words would take longer
        index = self.index(self.units.outs)
        return self.leave(y if index is None else y.index_select(-1, index), y.ndim - 1)


def _order_of_images(x: Tensor) -> Order | None:
    """How what torch's norms of batches and groups make of x lies; None: as the norm's of what exists."""
    if x.ndim != 4:
        return None
    return LAST if lies_last(x) else IN_ORDER


Running = tuple[Tensor | None, Tensor | None]


class _BatchNorm(NamedTuple):
    """What torch's batch norm does beside the formula.

    Attributes:
        affine: weight and bias.
        running: mean and variance, None where the batch's are used.
        of_batch: whether the statistics are those of x.
        tracks, momentum: whether this call moves the running statistics, and by what share.
    """

    affine: Running
    running: Running
    of_batch: bool
    tracks: bool
    momentum: float
    eps: float

    def __call__(
        self, x: Tensor, running: list[Tensor | None], weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        mean, var = running
        return batch_norm(x, mean, var, weight, bias, self.of_batch, self.momentum, self.eps)


def _step(layer: Any, draw: Draw, outs: Space, compute: Callable[[_BatchNorm], Tensor]) -> Tensor:
    """`compute` by the layer's statistics, which it moves in training."""
    tracks = layer.training and layer.track_running_stats and layer.running_mean is not None
    use = not layer.training or layer.track_running_stats
    running: Running = (layer.running_mean, layer.running_var) if use else (None, None)
    of_batch = layer.training or running[0] is None
    norm = _BatchNorm((layer.weight, layer.bias), running, of_batch, tracks, layer.momentum or 0.0, layer.eps)
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        if layer.momentum is None and tracks:
            is_open = draw.mask(outs, torch.bool)
            return layer.average(
                is_open, lambda mean, var: compute(norm._replace(running=(mean, var), momentum=1.0))
            )
        layer.forget_counts()
        if draw.averages is None:
            layer.num_batches_tracked.add_(1)
        else:
            draw.averages.count(layer.num_batches_tracked)
    return compute(norm)


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

    def gates(self) -> dict[str, Any]:
        """As the gated operations take them."""
        _, _, ins, outs, *_ = self.units
        return {
            "in_gates": None if ins is None else self.draw.gates(ins),
            "out_support": None if outs is None else self.draw.gates(outs),
        }

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        return self.product(x, kept(layer), layer.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of a linear layer."""
        weight = weight if self.units.kind.rows == 0 else weight.T
        return gated_linear(x, weight, bias, **self.gates())

    def folded(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, z of the inputs and zeros of closed outputs in them: smaller than activations."""
        weight, bias, (_, kind, ins, outs, *_) = layer.weight, layer.bias, self.units
        if getattr(layer, "groups", 1) > 1:
            ins = None
        weight = masked(self.draw, weight, outs, ins, kind.rows)
        if outs is not None and bias is not None:
            bias = bias * self.draw.mask(outs, bias.dtype)
        return weight, bias

    def conv(self, layer: Any, x: Tensor) -> Tensor:
        dim = x.ndim - 1 - self.units.kind.spatial
        if self.skips(x) and dim == 1 and x.ndim == 4 and layer.groups == 1 and layer.padding_mode == "zeros":
            stride, dilation = layer.stride, layer.dilation
            return gated_conv2d(x, layer.weight, layer.bias, stride, layer.padding, dilation, **self.gates())
        return layer._conv_forward(x, *self.folded(layer))

    def skips(self, x: Tensor) -> bool:
        """Whether convolutions of x leave out what is closed: on a GPU torch's dense ones are faster."""
        return x.is_cpu

    def transposed(self, layer: Any, x: Tensor, output_size: Any = None) -> Tensor:
        spatial = self.units.kind.spatial
        options = _transposed_options(layer, x, output_size, spatial)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        return convolve(x, *self.folded(layer), **options)

    def batch_norm(self, layer: Any, x: Tensor) -> Tensor:
        layer._check_input_dim(x)
        outs = cast(Space, self.units.outs)
        return _step(layer, self.draw, outs, lambda norm: self.normalised(norm, x, outs))

    def normalised(self, norm: _BatchNorm, x: Tensor, outs: Space) -> Tensor:
        """The norm of all channels; weight and bias, rather than activations, make closed ones zero."""
        some, averages = [*norm.running], self.draw.averages
        mean, var = some
        if norm.tracks and averages is not None and mean is not None and var is not None:
            some = [*averages.copies(mean, var, outs)]
        elif norm.tracks:
            some = [None if t is None else t.clone() for t in some]
        weight, bias = self.masked_affine(norm, outs)
        y = norm(x, some, weight, bias)
        if norm.tracks and averages is None:
            is_open = self.draw.mask(outs, torch.bool)
            with torch.no_grad():
                for whole, new in zip(norm.running, some, strict=True):
                    if whole is not None and new is not None:
                        whole.copy_(torch.where(is_open, new, whole))
        return y if weight is not None else self.mask(y, 1)

    def masked_affine(self, norm: _BatchNorm, outs: Space) -> Running:
        """Weight and bias, zero where a channel is closed."""
        weight, bias = norm.affine
        if weight is not None and bias is not None and weight.dtype == bias.dtype and _checks.readable():
            weight, bias = foreach_mul([weight, bias], [self.draw.mask(outs, weight.dtype)] * 2)
            return weight, bias
        weight, bias = (None if t is None else t * self.draw.mask(outs, t.dtype) for t in norm.affine)
        return weight, bias

    def layer_norm(self, layer: Any, x: Tensor) -> Tensor:
        gates = self.draw.gates(cast(Space, self.units.outs))
        eps, bias = epsilon(layer), getattr(layer, "bias", None)
        dim = features(self.units.kind, x)
        x = x.movedim(dim, -1) if self.units.kind.spatial else x
        if self.units.kind.name == "rms_norm":
            y = gated_rms_norm(x, x.shape[-1:], factor(self.units.kind, layer.weight), eps, gates=gates)
        else:
            y = gated_layer_norm(x, x.shape[-1:], layer.weight, bias, cast(float, eps), gates=gates)
        return y.movedim(-1, dim) if self.units.kind.spatial else y

    rms_norm = layer_norm

    def group_norm(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        gates = self.draw.gates(cast(Space, self.units.outs))
        return gated_group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps, gates=gates)

    def instance_norm(self, layer: Any, x: Tensor) -> Tensor:
        dim = 1 if x.ndim == layer._get_no_batch_dim() + 1 else 0
        return self.mask(layer._l0_class.forward(layer, x), dim)

    def prelu(self, layer: nn.PReLU, x: Tensor) -> Tensor:
        return F.prelu(x, layer.weight)

    def pointwise(self, layer: Any, x: Tensor) -> Tensor:
        return layer._l0_class.forward(layer, x)

    def embedding(self, layer: nn.Embedding, x: Tensor) -> Tensor:
        return self.mask(_embedded(layer, x), x.ndim)
