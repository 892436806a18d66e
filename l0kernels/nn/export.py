"""The trained model without gates: closed units sliced away, open ones folded into the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .chain import (
    NOTHING,
    Gates,
    Product,
    flatten,
    is_container,
    is_feed_forward,
    is_product,
    link,
    own_gates,
)
from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .linear import L0Linear
from .ranks import gathered
from .sequential import L0Residual, Step, Value, follow, is_residual
from .steps import is_conv, is_linear, is_norm, own_gate, units_in, units_out


class SelectInputs(nn.Module):
    """The features that an exported model reads: ``x[..., index]``, or channels: ``x[:, index]``.

    Args:
        index: (n,) int64, positions in [0, in_features); a buffer.
        in_features: width of x.
        dim: of x, counted from the end: -1 for features, -3 for the channels of images.
    """

    index: Tensor

    def __init__(self, index: Tensor, in_features: int, dim: int = -1) -> None:
        super().__init__()
        self.in_features = in_features
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features, ...) -> (..., n, ...)."""
        if x.shape[self.dim] != self.in_features:
            trailing = "".join([", *"] * (-1 - self.dim))
            raise ValueError(f"x must have shape (..., {self.in_features}{trailing}), got {x.shape}")
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.in_features}{_dim(self.dim)}"


class ScatterOutputs(nn.Module):
    """The outputs of an exported model in their places, zeros elsewhere: ``y[..., index] = x``.

    Args:
        index: (n,) int64, positions in [0, out_features); a buffer.
        out_features: width of y.
        dim: of x, counted from the end: -1 for features, -3 for the channels of images.
    """

    index: Tensor

    def __init__(self, index: Tensor, out_features: int, dim: int = -1) -> None:
        super().__init__()
        self.out_features = out_features
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n, ...) -> (..., out_features, ...)."""
        shape = list(x.shape)
        shape[self.dim] = self.out_features
        return x.new_zeros(shape).index_copy(self.dim, self.index, x)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.out_features}{_dim(self.dim)}"


class Residual(nn.Module):
    """An exported :class:`L0Residual`: ``shortcut(x) + body(x)``.

    Args:
        body, shortcut: plain modules.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """x -> shortcut(x) + body(x)."""
        return self.shortcut(x) + self.body(x)


def _dim(dim: int) -> str:
    return "" if dim == -1 else f", dim={dim}"


def export(model: nn.Module) -> nn.Module:
    """A smaller model of plain torch modules with the outputs of ``model.eval()``, itself in eval mode.

    Every L0Linear becomes an ``nn.Linear`` and every L0Conv2d an ``nn.Conv2d`` of its open units, every
    :class:`L0MLP`, :class:`L0Sequential` and ``nn.Sequential`` one flat ``nn.Sequential``, every
    :class:`L0FeedForward` an ``nn.Sequential`` of two ``nn.Linear`` and the activation (or a
    :class:`GatedProduct`) between them, every :class:`L0BatchNorm2d` an ``nn.BatchNorm2d`` of the open
    channels and every :class:`L0Residual` a :class:`Residual`. Closed hidden units vanish from both layers
    around them, ungated neighbours included (see :func:`expected_l0` for what a neighbour is). Closed
    features and channels at the borders are left out by :class:`SelectInputs` and put back as zeros by
    :class:`ScatterOutputs`, which appear only where something is closed. Of a grouped convolution whole
    groups vanish. Weight and block gates leave a dense weight with zeros. Any other module is copied, its
    children exported one by one.

    Sharded parameters (DTensor) are gathered: all ranks export, and have the same model.

    Args:
        model: any module; it is not changed, and nothing is shared with it.

    Returns:
        The exported model. It pickles, scripts and goes through ``torch.export``; its parameters can be
        trained on.

    Raises:
        ValueError: a gate belongs to a module other than the layers of this package, whose use of it is not
            known.
    """
    with torch.no_grad():
        return _export(gathered(model), {}).eval()


def _export(
    module: nn.Module, memo: dict[int, Any], gated: bool = False, value: Value = NOTHING
) -> nn.Module:
    """`memo` is that of deepcopy: what is already in it appears in later copies, so that sharing survives."""
    if id(module) in memo:
        return memo[id(module)]
    if is_container(module) or is_residual(module):
        parts = _export_chain(flatten(module, gated), memo, value)
        memo[id(module)] = parts[0] if is_residual(module) else nn.Sequential(*parts)
    elif is_product(module):
        parts = _export_chain([Step(module, False)], memo, NOTHING)
        memo[id(module)] = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    elif is_norm(module):
        memo[id(module)] = _sliced_norm(module, None)
    elif is_feed_forward(module):
        memo[id(module)] = _export_feed_forward(module)
    elif isinstance(module, HardConcreteGate):
        raise ValueError(
            f"model must have its gates in the layers of l0kernels.nn, got a gate elsewhere: {module}"
        )
    else:
        for child in module.children():
            _export(child, memo)
        _copy(module, memo)
    return memo[id(module)]


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    memo[id(module)] = copy.deepcopy(module, memo)
    return memo[id(module)]


def _export_chain(steps: list[Step], memo: dict[int, Any], value: Value) -> list[nn.Module]:
    products = link(steps, value)
    units = [_Units(product) for product in products]
    for at in range(len(units) - 2, -1, -1):
        if products[at].leads:
            units[at].write_for(units[at + 1])
    exported: list[nn.Module] = []
    held: Tensor | None = None  # units that the value has, None for all
    place = 0
    for at, (step, before) in enumerate(zip(steps, follow(steps, value), strict=False)):
        if place == len(products) or products[place].step != at:
            if is_residual(step.module):
                exported.append(_export_residual(step.module, memo, before))
            else:
                exported.append(_export(step.module, memo))
            continue
        product, own = products[place], units[place]
        place += 1
        layer: Any = product.layer
        if product.follows and held is not None:
            held = _spread(held, units_out(products[place - 2].layer), units_in(layer))
        exported += _select(held, own.read, units_in(layer), _dim_of(layer))
        if own.read is None and own.write is None and not own_gates(layer, "in_gate") and _is_plain(layer):
            exported.append(_copy(layer, memo))
        else:
            exported.append(own.sliced())
        held = own.write
        if held is not None and not product.leads:
            exported.append(ScatterOutputs(held, units_out(layer), _dim_of(layer)))
            held = None
    return exported


def _export_residual(residual: L0Residual, memo: dict[int, Any], value: Value) -> Residual:
    if id(residual) not in memo:
        branches = []
        for branch in (residual.body, residual.shortcut):
            steps = flatten(branch, gated=True)
            branches.append(_export_chain(steps, memo, value))
        body, shortcut = (parts[0] if len(parts) == 1 else nn.Sequential(*parts) for parts in branches)
        memo[id(residual)] = Residual(body, shortcut if branches[1] else nn.Identity())
    return memo[id(residual)]


def _is_plain(layer: nn.Module) -> bool:
    return type(layer).__module__.partition(".")[0] == "torch"


def _dim_of(layer: nn.Module) -> int:
    """Where the units of a layer's input and output lie, counted from the end."""
    return -1 if is_linear(layer) else -2 if isinstance(layer, nn.Conv1d) else -3


def _select(held: Tensor | None, read: Tensor | None, n: int, dim: int) -> list[nn.Module]:
    """What makes of the units `held`, None for all n, those that are to be read, which are among them."""
    if read is None or (held is not None and torch.equal(held, read)):
        return [] if held is None or read is not None else [ScatterOutputs(held, n, dim)]
    if held is None:
        return [SelectInputs(read, n, dim)]
    return [SelectInputs(torch.searchsorted(held, read), len(held), dim)]


def _spread(units: Tensor, n: int, size: int) -> Tensor:
    """The features of some of n channels behind nn.Flatten, of `size` in all; where size is n: the same."""
    positions = size // n
    return (units[:, None] * positions + torch.arange(positions, device=units.device)).flatten()


class _Units:
    """Which units of a layer are kept: `read` and `write` ascending, None for all."""

    def __init__(self, product: Product) -> None:
        self.layer: Any = product.layer
        layer = self.layer
        self.closed = False  # whether the one unit that stays is closed
        self.read = self._one_at_least(_open_units(product.in_gates, units_in(layer)))
        self.write = self._one_at_least(_open_units(own_gates(layer, "out_gate"), units_out(layer)))
        if is_norm(layer):
            self.write = self.read
        elif is_conv(layer) and layer.groups > 1:
            self._whole_groups()

    def write_for(self, behind: "_Units") -> None:
        """Of what is open only that which the next layer reads; all of that, open or not."""
        n, size = units_out(self.layer), units_in(behind.layer)
        read = behind.read
        if read is not None:
            read = (read // (size // n)).unique()
            read = None if len(read) == n else read
        self.write = self._one_at_least(read)
        if is_norm(self.layer):
            self.read = self.write
        elif is_conv(self.layer) and self.layer.groups > 1:
            self._whole_groups()

    def _one_at_least(self, units: Tensor | None) -> Tensor | None:
        """torch has no convolution without channels: a closed one, of zeros, stays if no other does."""
        if units is None or len(units) or is_linear(self.layer):
            return units
        self.closed = True
        return units.new_zeros(1)

    def _whole_groups(self) -> None:
        """Of a grouped convolution the groups stay that write anything, with all of their channels."""
        if self.write is None:
            self.read = None
            return
        n_in, n_out, groups = self.layer.in_channels, self.layer.out_channels, self.layer.groups
        kept = (self.write // (n_out // groups)).unique()
        self.read, self.write = _spread(kept, groups, n_in), _spread(kept, groups, n_out)
        if len(kept) == groups:
            self.read = self.write = None

    def sliced(self) -> nn.Module:
        if is_norm(self.layer):
            return _sliced_norm(self.layer, self.read, self.closed)
        if is_conv(self.layer):
            return _sliced_conv(self.layer, self.read, self.write)
        return _sliced(self.layer, self.read, self.write)


def _export_feed_forward(block: L0FeedForward) -> nn.Sequential:
    gate, up, down = block.hidden_gate, block.up, block.down
    read = write = _open_units((gate,), gate.n)
    if read is not None and up.out_features > block.d_hidden:
        write = torch.cat((read, read + block.d_hidden))
    return nn.Sequential(
        _sliced(up, None, write), block.activation_module(), _sliced(down, read, None, gate.eval_gates().z)
    )


def _open_units(gates: Gates, n: int) -> Tensor | None:
    """Ascending positions of the n units that every gate leaves open; None if that is all of them."""
    if not gates:
        return None
    is_open = torch.ones(n, dtype=torch.bool, device=gates[0].log_alpha.device)
    for gate in gates:
        each = gate.eval_gates().z != 0
        if gate.n > n:  # the features of a channel
            each = each.view(n, -1).any(1)
        elif gate.n < n:
            each = each.repeat_interleave(n // gate.n)
        is_open &= each
    return None if is_open.all() else is_open.nonzero().flatten()


def _sliced(
    layer: nn.Linear, read: Tensor | None, write: Tensor | None, z_in: Tensor | None = None
) -> nn.Linear:
    """The layer times its evaluation gates, in fp32 or above, restricted to some inputs and outputs.

    z_in: evaluation gates of the inputs that the layer does not own.
    """
    weight: Tensor = layer.weight if z_in is None else layer.weight * z_in
    bias: Tensor | None = layer.bias
    if isinstance(layer, L0Linear):
        if layer.weight_gate is not None:
            weight = weight * layer.spread(layer.weight_gate.eval_gates().z)
        if layer.in_gate is not None:
            weight = weight * layer.in_gate.eval_gates().z
        if layer.out_gate is not None:
            z_out = layer.out_gate.eval_gates().z
            weight = weight * z_out[:, None]
            bias = None if bias is None else bias * z_out
    if read is not None:
        weight = weight[:, read]
    if write is not None:
        weight = weight[write]
        bias = None if bias is None else bias[write]

    # Built on meta and by hand: nn.Linear(0, n) warns, but a layer may well be closed altogether.
    linear = nn.Linear(1, 1, bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = _parameter(weight, layer.weight)
    if bias is not None:
        linear.bias = _parameter(bias, layer.bias)
    return linear


def _sliced_conv(layer: Any, read: Tensor | None, write: Tensor | None) -> nn.Module:
    """The convolution times its evaluation gates, restricted to some channels, of a grouped one to groups."""
    weight, bias = layer.weight, layer.bias
    in_gate, out_gate = own_gate(layer, "in_gate"), own_gate(layer, "out_gate")
    outs, per_group, *kernel = weight.shape
    if in_gate is not None:
        z_in = in_gate.eval_gates().z.view(layer.groups, 1, per_group)
        weight = weight.view(layer.groups, -1, per_group, *kernel) * z_in.view(
            *z_in.shape, *[1] * len(kernel)
        )
        weight = weight.view(outs, per_group, *kernel)
    if out_gate is not None:
        z_out = out_gate.eval_gates().z
        weight = weight * z_out.view(-1, 1, *[1] * len(kernel))
        bias = None if bias is None else bias * z_out
    if read is not None and layer.groups == 1:
        weight = weight[:, read]
    if write is not None:
        weight = weight[write]
        bias = None if bias is None else bias[write]

    n_in = layer.in_channels if read is None else len(read)
    kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    conv: Any = kind(
        1,
        1,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    conv.in_channels, conv.out_channels = n_in, weight.shape[0]
    conv.groups = layer.groups if layer.groups == 1 else n_in // per_group
    conv.weight = _parameter(weight, layer.weight)
    if bias is not None:
        conv.bias = _parameter(bias, layer.bias)
    return conv


def _sliced_norm(layer: nn.BatchNorm2d, read: Tensor | None, closed: bool = False) -> nn.BatchNorm2d:
    """The norm of some channels, zero where they are closed."""
    norm = nn.BatchNorm2d(
        layer.num_features if read is None else len(read),
        layer.eps,
        layer.momentum,
        layer.affine or closed,
        layer.track_running_stats,
        device="meta",
    )

    def part(value: Tensor) -> Tensor:
        return value if read is None or value.ndim == 0 else value[read]

    for name, parameter in layer.named_parameters(recurse=False):
        setattr(norm, name, _parameter(part(parameter), parameter))
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(norm, name, part(buffer).clone())
    if closed:
        like = norm.running_mean if layer.track_running_stats else layer.weight
        zeros = torch.zeros(norm.num_features) if like is None else like.new_zeros(norm.num_features)
        norm.weight, norm.bias = nn.Parameter(zeros), nn.Parameter(zeros.clone())
    return norm


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=like.requires_grad)
