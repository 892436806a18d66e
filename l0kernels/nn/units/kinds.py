"""The layers of torch.nn whose units can be gated, by what their forward computes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..._compat import AnyInstanceNorm


class Kind(NamedTuple):
    """Where a layer has its units.

    Attributes:
        name: of the method of `layers.py` that runs it.
        spatial: how many dimensions stand behind that of the units.
        rows, cols: the dimensions of the weight that make units and that read them.
    """

    name: str
    spatial: int = 0
    rows: int = 0
    cols: int = 1

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm")

    @property
    def is_bypassed(self) -> bool:
        """Whether torch.nn.TransformerEncoderLayer reads the weights of such layers, and calls none."""
        return self.name in ("linear", "layer_norm", "rms_norm")

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
        return parameter == "weight" if self.is_product else self.is_recurrent and "weight" in parameter


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
]


def kind_of(module: nn.Module) -> Kind | None:
    """How `module` computes, None where it is no layer of torch.nn or has a forward of its own."""
    cls = type(module)
    for base, kind in _BASES:
        if not isinstance(module, base) or "forward" in module.__dict__ or cls.forward is not base.forward:
            continue
        if kind.name == "conv" and cls._conv_forward is not base._conv_forward:  # type: ignore[attr-defined]
            return None
        if isinstance(module, AnyInstanceNorm) and module.track_running_stats:
            return None
        if getattr(module, "proj_size", 0):  # its outputs are other units than its cells
            return None
        return kind
    return None


def recurrent_names(module: nn.Module) -> list[str]:
    """The names of the parameters of a recurrent layer, as torch takes them: first W_ih, then W_hh."""
    if isinstance(module, nn.RNNBase):
        return module._flat_weights_names
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def reads_inputs(name: str) -> bool:
    """Whether a parameter of a recurrent layer of this name multiplies what the layer is given."""
    return name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
