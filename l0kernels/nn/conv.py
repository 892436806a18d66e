"""Convolutions with gates on their input channels, their output channels, or both."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._arguments import check_convolution
from .._compat import AnyConv
from .._gates import DEFAULT_DIST, Gates, HardConcrete, scale
from ..conv2d import gated_conv2d
from ..convolution import gated_convolution
from ..penalty import L2Term
from .gate import GatedLayer, HardConcreteGate, draw
from .linear import (
    check_given,
    check_one_dist,
    copy_parameters_,
    gates_of_units,
    meeting_squares,
    squares,
    two_sided_terms,
)
from .notices import watch_shared
from .ranks import check_not_flat, released, whole

GATINGS = ("in", "out", "both", "weight", None)
Self = TypeVar("Self", bound="GatedConv")


class GatedConv(GatedLayer, AnyConv):
    """What the gated convolutions share: their gates, and what :func:`penalty` asks of them."""

    in_gate: HardConcreteGate | None
    out_gate: HardConcreteGate | None
    weight_gate: HardConcreteGate | None
    gate: str | None
    _dense: ClassVar[type[AnyConv]]

    def _own_gates(
        self,
        gate: str | None,
        in_gate: HardConcreteGate | None,
        out_gate: HardConcreteGate | None,
        **options: Any,
    ) -> None:
        if gate not in GATINGS:
            raise ValueError(f"gate must be 'in', 'out', 'both', 'weight' or None, got {gate!r}")
        self.gate = gate
        self.in_gate = self.out_gate = self.weight_gate = None
        options |= {"device": self.weight.device, "dtype": self.weight.dtype}
        if check_given("in_gate", in_gate, self.in_channels, gate, ("in", "both")):
            self.in_gate = HardConcreteGate(self.in_channels, **options) if in_gate is None else in_gate
        if check_given("out_gate", out_gate, self.out_channels, gate, ("out", "both")):
            self.out_gate = HardConcreteGate(self.out_channels, **options) if out_gate is None else out_gate
        if gate == "weight":
            self.weight_gate = HardConcreteGate(tuple(self.weight.shape), **options)
        check_one_dist(self.in_gate, self.out_gate)

    @classmethod
    def from_dense(cls: type[Self], conv: nn.Module, **options: Any) -> Self:
        """A gated layer with a copy of `conv`'s weight and bias, on its device, in its dtype and mode.

        Args:
            conv: of the class of torch.nn whose gated kin this is, ``torch.nn.Conv2d`` of :class:`L0Conv2d`.
            **options: the keyword-only arguments of the gated layer.

        Raises:
            TypeError: `conv` is of another class.
        """
        if not isinstance(conv, cls._dense):
            raise TypeError(f"conv must be a torch.nn.{cls._dense.__name__}, got {type(conv).__name__}")
        geometry = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        geometry += ["output_padding"] if conv.transposed else []
        layer: Self = cls(
            **{name: getattr(conv, name) for name in geometry},
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        copy_parameters_(layer, conv)
        return layer.train(conv.training)

    def padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """x and the padding that is left to do: a padding_mode other than "zeros" is done here."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def _gates(
        self, x: Tensor, in_gates: Gates | None, out_gates: Gates | None, out_support: Gates | None
    ) -> dict[str, Any]:
        """One gate per channel on each side, drawn for x if not given; nothing where weights are gated."""
        in_gates, out_gates, out_support = released(in_gates), released(out_gates), released(out_support)
        if self.weight_gate is not None:
            if in_gates is not None or out_gates is not None or out_support is not None:
                raise ValueError(
                    "in_gates, out_gates and out_support must be None with gate='weight', got gates"
                )
            return {}
        if out_support is not None and self.out_gate is not None:
            raise ValueError("out_support must be None for a layer whose outputs are gated, got gates")
        own = self.in_gate if in_gates is None else None, self.out_gate if out_gates is None else None
        watch_shared(self, own, x)
        own_in, own_out = draw(own)
        in_gates, out_gates = self.of_channels(
            own_in if in_gates is None else in_gates, own_out if out_gates is None else out_gates
        )
        return {"in_gates": in_gates, "out_gates": out_gates, "out_support": out_support}

    def of_channels(
        self, in_gates: Gates | None, out_gates: Gates | None
    ) -> tuple[Gates | None, Gates | None]:
        """One gate per channel, of gates that close runs of them."""
        return (
            gates_of_units(in_gates, self.in_gate, self.in_channels),
            gates_of_units(out_gates, self.out_gate, self.out_channels),
        )

    def gated_weight(self) -> Tensor:
        """The weight times the gates of its single weights, if there are any."""
        gate = self.weight_gate
        return self.weight if gate is None else scale(self.weight, gate().z.view(self.weight.shape))

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def gate_groups(self) -> Iterator[tuple[HardConcreteGate, Tensor, int]]:
        """|g| = the channel's weights: out / groups * k (input gate), in / groups * k + 1 (output gate); of a
        gate that closes several channels the sum of theirs, 1 of a weight."""
        weights = self.weight.numel()
        in_gate, out_gate, weight_gate = self.in_gate, self.out_gate, self.weight_gate
        if in_gate is not None:
            yield in_gate, in_gate.whole(), weights // in_gate.n
        if out_gate is not None:
            biases = 0 if self.bias is None else self.out_channels
            yield out_gate, out_gate.whole(), (weights + biases) // out_gate.n
        if weight_gate is not None:
            yield weight_gate, weight_gate.whole(), 1

    def l2_terms(self) -> Iterator[tuple[HardConcrete, L2Term]]:
        """Weight, and the bias if an output gate closes it."""
        return two_sided_terms(self, self._sizes, self.groups, self.transposed)

    def l2_rest(self, weight_decay: float) -> Tensor | None:
        """All of a layer with weight gates; p - p^2 of the weights where a gate meets itself."""
        if self.weight_gate is not None:
            check_not_flat(self.weight)
            p_open = self.weight_gate.dist.p_open(self.weight_gate.whole())
            return weight_decay / 2 * (p_open * squares(whole(self.weight))).sum()
        gate = self.in_gate
        if gate is None or gate is not self.out_gate:
            return None
        p_open, weight = gate.dist.p_open(gate.whole()), whole(self.weight)
        if self._sizes == (gate.n, gate.n):
            meeting = squares(self.own_channel(weight)).flatten(1).sum(1)
        else:
            meeting = meeting_squares(gate, weight, self._sizes, self.groups, self.transposed)
        return weight_decay / 2 * ((p_open - p_open**2) * meeting).sum()

    def own_channel(self, weight: Tensor) -> Tensor:
        """(n, *kernel) of a weight (n, n / groups, *kernel): what leads from each channel to its namesake."""
        rows = torch.arange(weight.shape[0], device=weight.device)
        return weight[rows, rows % weight.shape[1]]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={self.gate!r}"


class _GatedDirect(GatedConv):
    """What the others share: torch's order of arguments."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | None = "out",
        in_gate: HardConcreteGate | None = None,
        out_gate: HardConcreteGate | None = None,
        droprate_init: float = 0.5,
        lam: float = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
    ) -> None:
        initialise: Any = super().__init__  # that of torch's class behind this one
        initialise(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._own_gates(
            gate, in_gate, out_gate, droprate_init=droprate_init, lam=lam, eval_mode=eval_mode, dist=dist
        )


class L0Conv2d(_GatedDirect, nn.Conv2d):
    r"""``torch.nn.Conv2d`` with hard-concrete gates whose closed channels are skipped.

    ========  =======================================  =====================================
    ``gate``  y                                        log_alpha
    ========  =======================================  =====================================
    "out"     z_out * (conv2d(x, W) + b)               out_gate.log_alpha (out_channels,)
    "in"      conv2d(x * z_in, W) + b                  in_gate.log_alpha (in_channels,)
    "both"    z_out * (conv2d(x * z_in, W) + b)        both
    "weight"  conv2d(x, W * z) + b                     weight_gate.log_alpha, shaped as weight
    None      conv2d(x, W) + b                         none: the dense layer
    ========  =======================================  =====================================

    Weight gates skip nothing: they save no time, and memory only where what is exported is stored sparsely.
    An output gate closes the channel with its bias, in training as in evaluation. One draw serves the whole
    minibatch. Positional arguments, weight, bias and their initialisation are those of ``torch.nn.Conv2d``;
    its state_dict loads with ``strict=False``, and :meth:`from_dense` copies a trained layer. Alone a layer
    reads and writes all channels; in :class:`L0Sequential` activations hold the open ones only.

    In front of a batch norm an output gate loses its data gradient, since the norm divides z away: the
    recommended block is conv -> :class:`L0BatchNorm2d` -> activation -> conv with gate="in", in an
    :class:`L0Sequential`, which has the first convolution compute only what the second one's gates leave
    open.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as in ``torch.nn.Conv2d``.
        groups, bias, padding_mode, device, dtype: as there.
        gate: what is gated, see the table.
        in_gate, out_gate: a gate to use on that side instead of an own one, e.g. one shared with another
            layer (which then has to be drawn once and passed to both forwards, as :class:`L0Sequential`
            does). Of k gates, k a divisor of the channels, each closes a run of channels / k. A depthwise
            convolution may have one gate on both sides.
        droprate_init, lam, eval_mode, dist: of the layer's own gates, see :class:`HardConcreteGate`.

    Raises:
        ValueError: an unknown `gate`, a given gate of another size, of another distribution than that of
            the other side, or for a side that is not gated; and what ``torch.nn.Conv2d`` raises.
        TypeError: in_gate or out_gate is not a HardConcreteGate, or one with a forward of its own.
    """

    _dense = nn.Conv2d

    def forward(
        self,
        x: Tensor,
        in_gates: Gates | None = None,
        out_gates: Gates | None = None,
        out_support: Gates | None = None,
    ) -> Tensor:
        """The gated convolution.

        Args:
            x: (N, in_channels, H, W) or (in_channels, H, W).
            in_gates, out_gates: gates drawn beforehand, used instead of the layer's own; a side without a
                gate takes them too.
            out_support: gates of every consumer of y: only what they leave open is computed, unscaled, the
                rest is zero. For a layer without an output gate.

        Returns:
            (N, out_channels, H', W') or (out_channels, H', W').

        Raises:
            ValueError: out_support is given to a layer whose outputs are gated; and as
                :func:`l0kernels.gated_conv2d`.
        """
        _checks.check_tensor("x", x)
        gates = self._gates(x, in_gates, out_gates, out_support)
        if self.weight_gate is not None:
            check_convolution(x, self.weight, self.bias, self.groups)
            return self._conv_forward(x, self.gated_weight(), self.bias)
        x, padding = self.padded(x)
        stride, dilation = cast(Any, self.stride), cast(Any, self.dilation)
        return gated_conv2d(x, self.weight, self.bias, stride, padding, dilation, self.groups, **gates)


class L0Conv1d(_GatedDirect, nn.Conv1d):
    r"""``torch.nn.Conv1d`` with hard-concrete gates whose closed channels are skipped.

    As :class:`L0Conv2d`, on (N, C, L), with the arguments, weight (out, in / groups, k) and bias of
    ``torch.nn.Conv1d``; computed as a 2-D convolution of height 1.
    """

    _dense = nn.Conv1d

    def forward(
        self,
        x: Tensor,
        in_gates: Gates | None = None,
        out_gates: Gates | None = None,
        out_support: Gates | None = None,
    ) -> Tensor:
        """x (N, in_channels, L) -> (N, out_channels, L'), N or none; see :meth:`L0Conv2d.forward`."""
        _checks.check_tensor("x", x)
        gates = self._gates(x, in_gates, out_gates, out_support)
        if self.weight_gate is not None:
            check_convolution(x, self.weight, self.bias, self.groups)
            return self._conv_forward(x, self.gated_weight(), self.bias)
        x, padding = self.padded(x)
        if not isinstance(padding, str):
            padding = (0, *padding) if padding else 0
        geometry: Any = {"stride": (1, *self.stride), "padding": padding, "dilation": (1, *self.dilation)}
        weight = self.weight.unsqueeze(-2)
        y = gated_conv2d(x.unsqueeze(-2), weight, self.bias, groups=self.groups, **geometry, **gates)
        return y.squeeze(-2)


class L0Conv3d(_GatedDirect, nn.Conv3d):
    r"""``torch.nn.Conv3d`` with hard-concrete gates on its channels or weights.

    As :class:`L0Conv2d`, on (N, C, D, H, W), with the arguments, weight (out, in / groups, kd, kh, kw) and
    bias of ``torch.nn.Conv3d``. On a CPU a convolution of one group gathers the open channels of both sides
    and multiplies these; with more groups, on a GPU, and compiled, all are multiplied, and gates save no
    time.
    """

    _dense = nn.Conv3d

    def forward(
        self,
        x: Tensor,
        in_gates: Gates | None = None,
        out_gates: Gates | None = None,
        out_support: Gates | None = None,
    ) -> Tensor:
        """x (N, in_channels, D, H, W) -> (N, out_channels, D', H', W'), N or none; see
        :meth:`L0Conv2d.forward`."""
        gates = self._gates(x, in_gates, out_gates, out_support)
        return gated_convolution(self._convolve, x, self.gated_weight(), self.bias, self.groups, **gates)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        x, padding = self.padded(x)
        return F.conv3d(x, weight, bias, self.stride, padding, self.dilation, groups)


class _GatedTransposed(GatedConv):
    """What the gated transposed convolutions share: torch's order of arguments, and the forward."""

    _convolution: ClassVar[Any]
    """torch's function; in a tuple, for it is no method."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | None = "out",
        in_gate: HardConcreteGate | None = None,
        out_gate: HardConcreteGate | None = None,
        droprate_init: float = 0.5,
        lam: float = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
    ) -> None:
        initialise: Any = super().__init__  # that of torch's class behind this one
        initialise(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._own_gates(
            gate, in_gate, out_gate, droprate_init=droprate_init, lam=lam, eval_mode=eval_mode, dist=dist
        )

    def forward(
        self,
        x: Tensor,
        output_size: list[int] | None = None,
        in_gates: Gates | None = None,
        out_gates: Gates | None = None,
        out_support: Gates | None = None,
    ) -> Tensor:
        """The gated convolution.

        Args:
            x: (N, in_channels, ...) or (in_channels, ...).
            output_size: of the positions of y, as torch's layer takes it.
            in_gates, out_gates, out_support: as in :meth:`L0Conv2d.forward`.

        Returns:
            (N, out_channels, ...) or (out_channels, ...).
        """
        _checks.check_tensor("x", x)
        gates = self._gates(x, in_gates, out_gates, out_support)
        of_size: Any = self._output_padding  # torch's, of its transposed classes
        geometry = self.stride, self.padding, self.kernel_size
        output_padding = of_size(x, output_size, *geometry, len(self.kernel_size), self.dilation)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            options = self.stride, self.padding, output_padding, groups, self.dilation
            function: Any = type(self)._convolution[0]
            return function(x, weight, bias, *options)

        return gated_convolution(
            convolve, x, self.gated_weight(), self.bias, self.groups, transposed=True, **gates
        )


class L0ConvTranspose2d(_GatedTransposed, nn.ConvTranspose2d):
    r"""``torch.nn.ConvTranspose2d`` with hard-concrete gates on its channels or weights.

    ``y = z_out * (conv_transpose2d(x * z_in, W) + b)``; the table of `gate`, the bias and the arguments of
    gates are those of :class:`L0Conv2d`, the others, weight (in, out / groups, kh, kw) and bias those of
    ``torch.nn.ConvTranspose2d``. What is skipped where, :class:`L0Conv3d` says.
    """

    _dense = nn.ConvTranspose2d
    _convolution = (F.conv_transpose2d,)


class L0ConvTranspose1d(_GatedTransposed, nn.ConvTranspose1d):
    r"""``torch.nn.ConvTranspose1d`` with hard-concrete gates; as :class:`L0ConvTranspose2d`, on (N, C, L)."""

    _dense = nn.ConvTranspose1d
    _convolution = (F.conv_transpose1d,)


class L0ConvTranspose3d(_GatedTransposed, nn.ConvTranspose3d):
    r"""``torch.nn.ConvTranspose3d`` with hard-concrete gates; as :class:`L0ConvTranspose2d`, on
    (N, C, D, H, W)."""

    _dense = nn.ConvTranspose3d
    _convolution = (F.conv_transpose3d,)
