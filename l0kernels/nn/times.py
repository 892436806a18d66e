"""How often a forward uses each element of a layer's parameters, found by running the model once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._compat import AnyConv
from .export import SlicedConv1d, SlicedConv2d
from .penalty import weight_parameters
from .steps import is_product, units_in, units_out
from .units.draws import Space
from .units.einsum import as_product
from .units.example import Inputs
from .units.kinds import kind_of
from .units.narrow import Lent
from .units.open_attention import OpenMultiheadAttention, projections
from .units.place import NAME, GatedUnits, GateGroups
from .units.sizes import hosts_of
from .units.trace_attention import PRODUCTS

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Times(NamedTuple):
    """FLOPs of a forward, by what they are spent for.

    Attributes:
        of: for each element of a layer's parameter, by its name.
        heads: for each entry of a space of gated heads.
        dense: for what no gate of ours can close.
    """

    of: dict[tuple[nn.Module, str], float]
    heads: Counter[tuple[GateGroups, Space]]
    dense: float


def times_of(model: nn.Module, inputs: Inputs | None) -> Times:
    """Runs the model on `inputs`, see :func:`expected_flops`; None: one row for each linear layer."""
    layers = [module for module in model.modules() if is_product(module) or _is_linear_or_conv(module)]
    layers = [layer for layer in layers if not isinstance(layer, SlicedConv1d | SlicedConv2d)]
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    found = _Found(model, layers)
    if inputs is None:
        for layer in layers:
            if isinstance(layer, AnyConv):
                raise ValueError(f"input_shape must be given for a model with convolutions: {layer}")
            if is_product(layer) or isinstance(layer, GatedUnits):
                found.count(layer, 1, 1)
        for attention in attentions:
            found.see_projections(attention, [1, 1, 1])
        return found.times()
    hooks = [layer.register_forward_pre_hook(found.enter_layer) for layer in layers]
    hooks += [layer.register_forward_hook(found.see_layer, with_kwargs=True) for layer in layers]
    hooks += [module.register_forward_hook(found.see_attention, with_kwargs=True) for module in attentions]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), found.watching():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(_input(model, inputs))
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return found.times()


def _is_linear_or_conv(layer: nn.Module) -> bool:
    """Whether it counts though no container knows it: a convolution, or what gate_ has gated."""
    if isinstance(layer, GatedUnits):
        return layer._l0_units.kind.is_product
    return isinstance(layer, AnyConv) or _is_own(layer)


def _sizes(layer: Any) -> tuple[int, int]:
    """Units that a layer reads, and makes."""
    if isinstance(layer, nn.Linear | AnyConv):
        return units_in(layer), units_out(layer)
    kind = layer._l0_units.kind if isinstance(layer, GatedUnits) else kind_of(layer)
    assert kind is not None
    return layer.weight.shape[kind.cols], layer.weight.shape[kind.rows]


def _is_own(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.own and kind.is_product


class _Found(TorchFunctionMode):
    """What a run shows."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._model = model
        self._of: dict[tuple[nn.Module, str], float] = defaultdict(float)
        self._heads: Counter[tuple[GateGroups, Space]] = Counter()
        self.dense = 0.0
        self._running: list[tuple[GateGroups, str]] = []
        self._calls: Counter[tuple[GateGroups, str]] = Counter()
        self._layers: list[nn.Module] = []
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self._linear = {id(layer._parameters.get("weight")): layer for layer in linear}
        self._biased = {id(layer.bias): layer for layer in linear if layer.bias is not None}

    def times(self) -> Times:
        return Times(self._of, self._heads, self.dense)

    def count(self, layer: Any, n_in: int, n_out: int) -> None:
        """So many rows, or positions, of inputs and outputs."""
        self._of[layer, "weight"] += 2 * (n_in if isinstance(layer, TRANSPOSED) else n_out)
        if layer.bias is not None:
            self._of[layer, "bias"] += n_out

    def enter_layer(self, layer: Any, _: Any) -> None:
        """It begins to run."""
        self._layers.append(layer)

    def see_layer(self, layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
        self._layers.pop()
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        if isinstance(layer, AnyConv) and not (is_product(layer) or isinstance(layer, GatedUnits)):
            taps = layer.weight[0].numel()  # of an output's position or, in a transposed one, of an input's
            self.dense += 2 * taps * (x if isinstance(layer, TRANSPOSED) else y).numel()
            self.dense += y.numel() * (layer.bias is not None)
            return
        n_in, n_out = _sizes(layer)
        # An exported layer may have no units left.
        self.count(layer, x.numel() // max(n_in, 1), y.numel() // max(n_out, 1))

    def see_attention(self, layer: Any, args: Any, kwargs: Any, _: Any) -> None:
        given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
        counts = [x.numel() // x.shape[-1] for x in given]
        self.see_projections(layer, counts)
        if isinstance(layer, GatedUnits | OpenMultiheadAttention):  # the rest is seen where it is called
            return
        out = layer.out_proj
        self.dense += counts[0] * (2 * out.weight.numel() + (0 if out.bias is None else out.bias.numel()))
        examples = 1 if given[0].ndim == 2 else given[0].shape[0 if layer.batch_first else 1]
        keys = counts[1] // max(examples, 1) + (layer.bias_k is not None) + layer.add_zero_attn
        self.dense += 4 * counts[0] * keys * layer.embed_dim

    def see_projections(self, layer: Any, rows: list[int]) -> None:
        """Those of queries, keys and values, of so many rows each."""
        if not isinstance(layer, GatedUnits):
            for n, (weight, bias) in zip(rows, projections(layer), strict=True):
                self.dense += n * (2 * weight.numel() + (0 if bias is None else bias.numel()))
            return
        of = cast(nn.Module, layer)
        parameters = of._parameters
        thirds = sum(rows) / 3  # of one parameter for all three, which have as many open heads
        if parameters.get("in_proj_bias") is not None:
            self._of[of, "in_proj_bias"] += thirds
        if parameters.get("in_proj_weight") is not None:
            self._of[of, "in_proj_weight"] += 2 * thirds
            return
        for n, name in zip(rows, ("q", "k", "v"), strict=True):
            self._of[of, f"{name}_proj_weight"] += 2 * n

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Knows which module multiplies activations."""
        with ExitStack() as hooks:
            for host in hosts_of(self._model):
                gates = cast(GateGroups, host._modules[NAME])
                for name, module in host.named_modules() if gates.attentions else ():

                    def enter(*_: Any, of: Any = (gates, name)) -> None:
                        self._running.append(of)

                    def leave(*_: Any) -> None:
                        self._running.pop()

                    hooks.callback(module.register_forward_pre_hook(enter).remove)
                    hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            with self:
                yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = as_product(func, args, kwargs or {})
        if product is not None:
            with self:
                return product()
        out = func(*args, **kwargs or {})
        if func in PRODUCTS:
            self._see_product(func, args, kwargs or {}, out)
        elif func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self._see_linear(given["weight"], given.get("bias"), out)
        return out

    def _see_linear(self, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """A product with the weight of a layer that another module's forward has given to the function."""
        layer = weight.layer if isinstance(weight, Lent) else self._linear.get(id(weight))
        if layer is None or layer in self._layers[-1:]:
            return
        rows = y.shape[:-1].numel()
        self._of[layer, "weight"] += 2 * rows
        if bias is None:
            return
        maker = self._biased.get(id(bias), layer)  # what a layer's was made into counts as that
        if maker.bias is None:
            self.dense += y.numel()
        else:
            self._of[maker, "bias"] += rows

    def _see_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        space = None
        if self._running:
            running = self._running[-1]
            spaces, at = running[0].attentions.get(running[1], []), self._calls[running]
            space = spaces[at] if at < len(spaces) else None
            self._calls[running] += 1
        flops = _of_product(func, args, kwargs, out)
        n = out.shape[-3] if out.ndim > 2 else 0
        several = out.ndim == 3 and space is not None and n % space.size == 0  # examples by heads
        if space is not None and n and (n == space.size or several):
            self._heads[running[0], space] += flops // space.size
        else:
            self.dense += flops


def _of_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> int:
    """FLOPs of a product of activations; those with parameters are layers' or nobody's."""
    if func is F.scaled_dot_product_attention:
        q, k, v = (
            args[at] if len(args) > at else kwargs[name] for at, name in enumerate(("query", "key", "value"))
        )
        return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    given = [*args, *kwargs.values()][:2]
    if any(not isinstance(x, Tensor) or x.ndim < 3 or isinstance(x, nn.Parameter) for x in given):
        return 0
    return 2 * out.numel() * given[0].shape[-1]


def _input(model: nn.Module, inputs: Sequence[int] | Tensor) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    like = next((parameter for parameter in weight_parameters(model) if parameter.is_floating_point()), None)
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    return torch.zeros(tuple(inputs), **options)
