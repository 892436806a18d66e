"""The layers of torch.nn whose units can be gated, by what their forward computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._compat import AnyInstanceNorm


class Kind(NamedTuple):
    """Where a layer has its units.

    Attributes:
        name: of the method of `layers.py` that runs it.
        spatial: how many dimensions stand behind that of the units.
        rows, cols: the dimensions of the weight that make units and that read them.
        own: whether the class has a forward of its own: what it calls of torch is not looked at.
        offset: what a norm adds to its weight.
    """

    name: str
    spatial: int = 0
    rows: int = 0
    cols: int = 1
    own: bool = False
    offset: float = 0.0

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm")

    @property
    def is_bypassed(self) -> bool:
        """Whether torch.nn.TransformerEncoderLayer reads the weights of such layers, and calls none."""
        return self.name in ("linear", "layer_norm", "rms_norm", "attention")

    @property
    def is_exact(self) -> bool:
        """Whether it would see units that exist and are closed: in the statistics over all units."""
        return self.name in ("layer_norm", "rms_norm", "group_norm")

    @property
    def is_product(self) -> bool:
        return self.name in ("linear", "conv", "transposed")

    @property
    def is_recurrent(self) -> bool:
        return self.name == "recurrent"

    def reads(self, parameter: str) -> bool:
        """Whether the columns of a parameter of this name are multiplied by what the layer reads."""
        if self.is_product:
            return parameter == "weight"
        return (self.is_recurrent or self.name == "attention") and "weight" in parameter


_BASES: list[tuple[type[nn.Module], Kind]] = [
    (nn.Linear, Kind("linear")),
    (nn.Conv1d, Kind("conv", 1)),
    (nn.Conv2d, Kind("conv", 2)),
    (nn.Conv3d, Kind("conv", 3)),
    (nn.ConvTranspose1d, Kind("transposed", 1, 1, 0)),
    (nn.ConvTranspose2d, Kind("transposed", 2, 1, 0)),
    (nn.ConvTranspose3d, Kind("transposed", 3, 1, 0)),
    (nn.BatchNorm1d, Kind("batch_norm")),
    (nn.BatchNorm2d, Kind("batch_norm")),
    (nn.BatchNorm3d, Kind("batch_norm")),
    (nn.InstanceNorm1d, Kind("instance_norm")),
    (nn.InstanceNorm2d, Kind("instance_norm")),
    (nn.InstanceNorm3d, Kind("instance_norm")),
    (nn.LayerNorm, Kind("layer_norm")),
    (nn.RMSNorm, Kind("rms_norm")),
    (nn.GroupNorm, Kind("group_norm")),
    (nn.Embedding, Kind("embedding")),
    (nn.PReLU, Kind("prelu")),
    (nn.RNN, Kind("recurrent")),
    (nn.GRU, Kind("recurrent")),
    (nn.LSTM, Kind("recurrent")),
    (nn.RNNCell, Kind("recurrent")),
    (nn.GRUCell, Kind("recurrent")),
    (nn.LSTMCell, Kind("recurrent")),
    (nn.MultiheadAttention, Kind("attention", own=True)),
]


POINTWISE = Kind("pointwise", own=True)
"""An activation, of any units: a torch.autograd.Function that is known by what it computes."""

_NORMS = (
    Kind("rms_norm", own=True),
    Kind("rms_norm", own=True, offset=1.0),  # of Gemma
    Kind("rms_norm", 2, own=True),
    Kind("layer_norm", own=True),
    Kind("layer_norm", 2, own=True),
)
"""Of features at the last dimension, and of the channels of images."""


@cache
def _own_kinds(cls: Hashable) -> tuple[Kind, ...]:
    """What a class with a forward of its own may be, by its name, as model libraries have them."""
    cls = cast(type, cls)
    if cls.__name__ == "Conv1D":  # of GPT-2: a linear layer whose weight is (in, out)
        return (Kind("linear", 0, 1, 0, own=True),)
    if issubclass(cls, nn.Linear):
        return (Kind("linear", own=True),)
    is_norm = issubclass(cls, nn.LayerNorm | nn.RMSNorm)
    return _NORMS if is_norm or any(name in cls.__name__.lower() for name in ("rmsnorm", "layernorm")) else ()


def _computes(module: nn.Module, kind: Kind) -> bool:
    """Whether a forward is that of its kind: it is run, on random numbers."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != (1 if kind.is_norm else 2) or module._buffers or module._modules:
        return False
    if kind.is_norm and epsilon(module) is None:
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = copy.copy(module)
        like: Any = {"dtype": torch.float64, "device": "cpu"}
        layer._parameters = {
            name: None if p is None else nn.Parameter(torch.randn(p.shape, **like), False)
            for name, p in module._parameters.items()
        }
        sizes = torch.tensor([[1e-3], [1], [1e3]], **like)  # it may clip, or add another epsilon
        n = weight.shape[0 if kind.is_norm else kind.cols]
        rows = torch.randn(2, 3, n, **like) * sizes
        given, bias = cast(Tensor, layer._parameters["weight"]), layer._parameters.get("bias")
        if not kind.is_norm:
            matrix = given if kind.cols == 1 else given.T
            return _is_function(layer, lambda x: F.linear(x, matrix, bias), rows) is True
        function = partial(normalised, kind, weight=given, bias=bias, eps=epsilon(module))
        if kind.spatial:
            return (
                _is_function(layer, function, (torch.randn(2, 5, 3, n, **like) * sizes).movedim(3, 1)) is True
            )
        # Of images, as wide as they have channels, it may be another function, or none.
        return _is_function(layer, function, rows) is True and (
            _is_function(layer, function, torch.randn(2, n, 3, n, **like)) is not False
        )


def _is_function(layer: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> bool | None:
    """Whether a layer computes a function of x, in both modes; None: it refuses x."""
    try:
        found = [type(layer).forward(layer.train(mode), x) for mode in (True, False)]
        return all(torch.allclose(y, function(x), rtol=1e-5, atol=1e-5) for y in found)
    except Exception:  # it takes something else
        return None


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module computes each element by itself, gradients, too: it is run, on random numbers."""
    settings = _settings(module)
    has_parts = module._parameters or module._buffers or module._modules or "forward" in vars(module)
    if settings is None or has_parts:
        return False
    key = type(module), "pointwise", settings
    if key not in _computed:
        _computed[key] = POINTWISE if _treats_one_by_one(module) else None
    return _computed[key] is not None


def _treats_one_by_one(module: nn.Module) -> bool:
    layer = copy.copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.cat((torch.randn(22, dtype=torch.float64, device="cpu") * 3, torch.zeros(2, device="cpu")))
        try:
            for mode in (True, False):
                layer.train(mode)
                y, grad = _with_gradient(layer, x.view(2, 3, 4))
                parts = zip(*(_with_gradient(layer, part) for part in x.split(1)), strict=True)
                for whole, of in zip((y, grad), parts, strict=True):
                    if not whole.isfinite().all() or not torch.allclose(whole.flatten(), torch.cat(of)):
                        return False
        except Exception:  # it takes something else
            return False
    return True


def _with_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of x, and a gradient of it."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = type(layer).forward(layer, x)
        return y.detach(), torch.autograd.grad(y, x, torch.sin(7 * x.detach()))[0]


def factor(kind: Kind, weight: Tensor | None) -> Tensor | None:
    """What a norm multiplies by."""
    return weight + kind.offset if kind.offset and weight is not None else weight


def normalised(
    kind: Kind, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> Tensor:
    """A layer or RMS norm of x, over the features of its kind."""
    if kind.spatial:
        return normalised(kind._replace(spatial=0), x.movedim(1, -1), weight, bias, eps).movedim(-1, 1)
    if kind.name == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], factor(kind, weight), eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, cast(float, eps))


_computed: dict[Any, Kind | None] = {}
_EVERY = {*vars(nn.Module())}
_PLAIN = (bool, int, float, str, torch.Size, torch.dtype, type(None))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else isinstance(value, _PLAIN)


def _settings(module: nn.Module) -> tuple[Any, ...] | None:
    """What a forward may go by besides parameters and inputs; None: more than can be compared."""
    values = [(name, value) for name, value in vars(module).items() if name not in _EVERY]
    sizes = [(name, None if p is None else p.shape) for name, p in module._parameters.items()]
    return (*values, *sizes) if all(_is_plain(value) for _, value in values) else None


def epsilon(norm: Any) -> float | None:
    """What a norm adds to the mean square, None: that of the dtype, or it is not known."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _has_own_weights(attention: Any) -> bool:
    """Whether its weights and those of its output are parameters, which no parametrization makes."""
    names = [*(f"{of}_proj_weight" for of in ("in", "q", "k", "v")), "in_proj_bias", "bias_k", "bias_v"]
    pairs = [(attention, name) for name in names] + [
        (attention.out_proj, name) for name in ("weight", "bias")
    ]
    linear = kind_of(attention.out_proj)
    return linear is not None and all(
        getattr(module, name) is module._parameters.get(name) for module, name in pairs
    )


def kind_of(module: nn.Module) -> Kind | None:
    """How `module` computes, None where it is no layer that is known, or has a forward of its own."""
    cls = type(module)
    for base, kind in _BASES:
        if not isinstance(module, base) or "forward" in module.__dict__ or cls.forward is not base.forward:
            continue
        if kind.name == "conv" and cls._conv_forward is not base._conv_forward:  # type: ignore[attr-defined]
            return None
        if isinstance(module, AnyInstanceNorm) and module.track_running_stats:
            return None
        if kind.name == "attention" and not _has_own_weights(module):
            return None
        if getattr(module, "proj_size", 0):  # its outputs are other units than its cells
            return None
        return kind
    return _own_kind(module)


def _own_kind(module: nn.Module) -> Kind | None:
    """How a module with a forward of its own computes, if that is what its name says."""
    cls = type(module)
    own = _own_kinds(cast(Hashable, cls))
    if not own or "forward" in module.__dict__:
        return None
    if not all(isinstance(p, nn.Parameter) for p in module._parameters.values() if p is not None):
        return None
    settings = _settings(module)
    if settings is None:
        return None
    key = cls, settings
    if key not in _computed:
        _computed[key] = next((kind for kind in own if _computes(module, kind)), None)
    return _computed[key]


def recurrent_names(module: nn.Module) -> list[str]:
    """The names of the parameters of a recurrent layer, as torch takes them: first W_ih, then W_hh."""
    if isinstance(module, nn.RNNBase):
        return module._flat_weights_names
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def reads_inputs(name: str) -> bool:
    """Whether a parameter of a recurrent layer of this name multiplies what the layer is given."""
    return name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
