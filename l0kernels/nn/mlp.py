"""The packed chain as a module: one draw for all gates, one call for all layers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import _checks
from .._gates import DEFAULT_DIST, Gates, HardConcrete
from ..mlp import chain
from .gate import draw, sources_of
from .linear import L0Linear, copy_parameters_, has_gates_beside, is_only_weight, over_rows
from .notices import watch_shared
from .ranks import held, is_sharded, released

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}
T = TypeVar("T", bool, float)


class L0MLP(nn.Module):
    r"""Linear layers with a gate on the inputs of each, activations between them kept packed.

    h_0 = x * z_0,  h_l = act(h_{l-1} W_l^T + b_l) * z_l,  y = h_{L-1} W_L^T + b_L

    The torch equivalent is ``nn.Sequential(nn.Linear(..), act, .., nn.Linear(..))`` with multiplications by
    z in between; the products here run over open x open units only. The layers are `layers[0]`,
    `layers[1]`, ... (:class:`L0Linear`), computed together. Where one of them has hooks (``prune`` and
    the old ``weight_norm`` of torch.nn.utils are hooks), is another module, has other gates than on its
    inputs, or is sharded by FSDP, they are called one by one, which gives up the packing. Shard the L0MLP
    as one.

    Args:
        sizes: features from input to output, at least two.
        activation: "relu", "gelu", "silu" or "identity"; after every layer but the last.
        bias: for all layers, or one per layer.
        gate_input: whether the inputs of the network are gated, too.
        droprate_init, lam: for all gates, or one per gate (input first); see :class:`HardConcreteGate`.
        eval_mode, dist: of all gates.
        repack_in_backward: as in :func:`l0kernels.gated_mlp`.
        device, dtype: as in ``torch.nn.Linear``.

    Raises:
        ValueError: fewer than two sizes, an unknown activation, a sequence of the wrong length.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        *,
        bias: bool | Sequence[bool] = True,
        gate_input: bool = True,
        droprate_init: float | Sequence[float] = 0.5,
        lam: float | Sequence[float] = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
        repack_in_backward: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least an input and an output size, got {sizes}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
        n_layers, ungated = len(sizes) - 1, 0 if gate_input else 1
        biases = _per_item("bias", bias, n_layers)
        droprates = _per_item("droprate_init", droprate_init, n_layers - ungated)
        lams = _per_item("lam", lam, n_layers - ungated)
        self.activation = activation
        self.repack_in_backward = repack_in_backward
        layers = []
        for l, (n_in, n_out) in enumerate(pairwise(sizes)):
            if l < ungated:
                layer = L0Linear(n_in, n_out, biases[l], device=device, dtype=dtype, gate=None)
            else:
                layer = L0Linear(
                    n_in,
                    n_out,
                    biases[l],
                    device=device,
                    dtype=dtype,
                    droprate_init=droprates[l - ungated],
                    lam=lams[l - ungated],
                    eval_mode=eval_mode,
                    dist=dist,
                )
            layers.append(layer)
        # ModuleList is not generic: this tells the type checker what is in it.
        self.layers = cast("Sequence[L0Linear]", nn.ModuleList(layers))

    @classmethod
    def from_dense(cls, dense: nn.Sequential, **options: Any) -> "L0MLP":
        """A gated MLP with copies of the weights and biases of `dense`, on its device, in its dtype and mode.

        Args:
            dense: ``nn.Sequential`` of ``nn.Linear`` layers, with the same activation (``nn.ReLU``, exact
                ``nn.GELU``, ``nn.SiLU`` or ``nn.Identity``) between any two of them.
            **options: gate_input, droprate_init, lam, eval_mode, dist.

        Raises:
            TypeError: `dense` is not an ``nn.Sequential``.
            ValueError: it has another structure, or sizes, devices or dtypes that do not fit.
        """
        if not isinstance(dense, nn.Sequential):
            raise TypeError(f"dense must be an nn.Sequential, got {type(dense).__name__}")
        modules = list(dense)
        linears, activations = [m for m in modules[::2] if isinstance(m, nn.Linear)], modules[1::2]
        if len(linears) != len(activations) + 1:
            got = ", ".join(type(module).__name__ for module in modules)
            raise ValueError(f"dense must be nn.Linear, activation, nn.Linear, .., nn.Linear, got ({got})")
        names = {_activation_name(module) for module in activations} or {"relu"}
        if len(names) > 1:
            raise ValueError(f"dense must have one activation throughout, got {sorted(names)}")
        sizes = [linears[0].in_features, *(linear.out_features for linear in linears)]
        for l, linear in enumerate(linears):
            if linear.in_features != sizes[l]:
                raise ValueError(
                    f"dense[{2 * l}] must have {sizes[l]} in_features, as many as the layer before has "
                    f"out_features, got {linear.in_features}"
                )
        kinds = {(linear.weight.device, linear.weight.dtype) for linear in linears}
        if len(kinds) > 1:
            raise ValueError(f"dense must be on one device and in one dtype, got {sorted(map(str, kinds))}")
        (device, dtype), (activation,) = kinds.pop(), names
        bias = [linear.bias is not None for linear in linears]
        mlp = cls(sizes, activation, bias=bias, device=device, dtype=dtype, **options)
        for layer, linear in zip(mlp.layers, linears, strict=True):
            copy_parameters_(layer, linear)
        return mlp.train(dense.training)

    def draw(self) -> list[Gates | None]:
        """The gates of one forward, one entry per layer: drawn in train(), evaluation gates in eval()."""
        return draw([getattr(layer, "in_gate", None) for layer in self.layers])

    def forward(self, x: Tensor, gates: Sequence[Gates | None] | None = None) -> Tensor:
        """The gated chain.

        Args:
            x: (..., sizes[0]), also nested.
            gates: what :meth:`draw` returned, for a forward with known gates.

        Returns:
            (..., sizes[-1]).
        """
        if isinstance(x, Tensor) and x.is_nested:
            return over_rows(x, lambda rows: self.forward(rows, gates))
        _checks.check_tensor("x", x)
        layers = [*self.layers]
        gates = None if gates is None else [*map(released, gates)]
        if not all(is_only_weight(layer) and not has_gates_beside(layer, "in_gate") for layer in layers):
            return self._one_by_one(x, gates)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if gates is not None:
            return chain(x, weights, biases, gates, self.activation, self.repack_in_backward)
        own = [getattr(layer, "in_gate", None) for layer in layers]
        watch_shared(self, own, x)
        sources, seed, dist = sources_of(own)
        return chain(x, weights, biases, sources, self.activation, self.repack_in_backward, seed, dist)

    def _one_by_one(self, x: Tensor, gates: Sequence[Gates | None] | None) -> Tensor:
        """The same, each layer called by itself: for its hooks, or for FSDP to gather its parameters."""
        activation = ACTIVATIONS[self.activation]()
        sources = [getattr(layer, "in_gate", None) for layer in self.layers]
        if gates is None and any(gate is not None and is_sharded(gate.log_alpha) for gate in sources):
            gates = [None] * len(sources)  # within its call each layer draws for itself
        gates = self.draw() if gates is None else gates
        for l, (layer, drawn) in enumerate(zip(self.layers, gates, strict=True)):
            x = activation(x) if l else x
            x = layer(x) if drawn is None else layer(x, held(layer, drawn))
        return x

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _per_item(name: str, value: T | Sequence[T], n: int) -> list[T]:
    if not isinstance(value, Sequence):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} must be one value or {n} of them, got {len(value)}")
    return list(value)


def _activation_name(module: nn.Module) -> str:
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and getattr(module, "approximate", "none") == "none":
            return name
    kinds = ", ".join(kind.__name__ for kind in ACTIVATIONS.values())
    raise ValueError(f"dense must have an activation among {kinds} (exact) between its layers, got {module}")
