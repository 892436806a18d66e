"""The trained model without gates: closed units sliced away, open ones folded into the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .chain import flatten, is_container, is_feed_forward, is_product, link, own_gates
from .feed_forward import L0FeedForward
from .gate import HardConcreteGate
from .linear import L0Linear


class SelectInputs(nn.Module):
    """The features that an exported model reads: ``x[..., index]``.

    Args:
        index: (n,) int64, positions in [0, in_features); a buffer.
        in_features: width of x.
    """

    index: Tensor

    def __init__(self, index: Tensor, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., n)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., {self.in_features}), got {x.shape}")
        return x.index_select(-1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.in_features}"


class ScatterOutputs(nn.Module):
    """The outputs of an exported model in their places, zeros elsewhere: ``y[..., index] = x``.

    Args:
        index: (n,) int64, positions in [0, out_features); a buffer.
        out_features: width of y.
    """

    index: Tensor

    def __init__(self, index: Tensor, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., out_features)."""
        y = x.new_zeros(x.shape[:-1] + (self.out_features,))  # noqa: RUF005 - TorchScript cannot unpack
        return y.index_copy(-1, self.index, x)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.out_features}"


def export(model: nn.Module) -> nn.Module:
    """A smaller model of plain torch modules with the outputs of ``model.eval()``, itself in eval mode.

    Every L0Linear becomes an ``nn.Linear`` of its open units, every :class:`L0MLP` and ``nn.Sequential``
    one flat ``nn.Sequential``, every :class:`L0FeedForward` an ``nn.Sequential`` of two ``nn.Linear`` and the
    activation (or a :class:`GatedProduct`) between them. Closed hidden units vanish from both layers around
    them, ungated ``nn.Linear`` neighbours included (see :func:`expected_l0` for what a neighbour is). Closed
    features at the borders are left out by :class:`SelectInputs` and put back as zeros by
    :class:`ScatterOutputs`, which appear only where something is closed. Weight and block gates leave a dense
    weight with zeros. Any other module is copied, its children exported one by one.

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
        return _export(model, {}).eval()


def _export(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`memo` is that of deepcopy: what is already in it appears in later copies, so that sharing survives."""
    if id(module) in memo:
        return memo[id(module)]
    if is_container(module):
        memo[id(module)] = nn.Sequential(*_export_chain(flatten(module), memo))
    elif is_product(module):
        parts = _export_chain([module], memo)
        memo[id(module)] = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
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


def _export_chain(steps: list[nn.Module], memo: dict[int, Any]) -> list[nn.Module]:
    products = link(steps)
    reads = [_open_units(product.in_gates) for product in products]
    exported: list[nn.Module] = []
    place = 0
    for step, module in enumerate(steps):
        if place == len(products) or products[place].step != step:
            exported.append(_export(module, memo))
            continue
        product, read = products[place], reads[place]
        place += 1
        # Between two layers both keep what the one behind reads; at a border the width stays.
        write = reads[place] if product.leads else _open_units(own_gates(module, "out_gate"))
        if read is not None and not product.follows:
            exported.append(SelectInputs(read, product.layer.in_features))
        if not isinstance(module, L0Linear) and read is None and write is None:
            exported.append(_copy(module, memo))
        else:
            exported.append(_sliced(product.layer, read, write))
        if write is not None and not product.leads:
            exported.append(ScatterOutputs(write, product.layer.out_features))
    return exported


def _export_feed_forward(block: L0FeedForward) -> nn.Sequential:
    gate, up, down = block.hidden_gate, block.up, block.down
    read = write = _open_units((gate,))
    if read is not None and up.out_features > block.d_hidden:
        write = torch.cat((read, read + block.d_hidden))
    return nn.Sequential(
        _sliced(up, None, write), block.activation_module(), _sliced(down, read, None, gate.eval_gates().z)
    )


def _open_units(gates: tuple[HardConcreteGate, ...]) -> Tensor | None:
    """Ascending positions of the units that every gate leaves open; None if that is all of them."""
    if not gates:
        return None
    is_open = torch.stack([gate.eval_gates().z != 0 for gate in gates]).all(0)
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


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(value, requires_grad=like.requires_grad)
