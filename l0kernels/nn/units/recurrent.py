"""What a gated recurrent layer computes of its open units.

    h_t = 1[z != 0] * f(W_ih (z_in * x_t) + b_ih, W_hh (z * h_{t-1}) + b_hh, h_{t-1})

f is the step of nn.RNN, GRU or LSTM. A closed unit of h is 0 at every time step, and its cell in an LSTM too:
the initial state, whether it is given or not, is masked by 1[z != 0]. z multiplies h wherever a weight reads
it: in W_hh, in the next layer of a stack, in what is behind. What the gates of a GRU carry over from h_{t-1}
meets no weight, and has no z. All layers and directions of a stack share their gates, and all time steps of a
forward of the model see one draw.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ... import _checks
from ...narrow import narrow_weight
from .draws import Draw, Space, _unwatched
from .kinds import reads_inputs, recurrent_names
from .layers import Units, _Exact, _Static, masked
from .narrow import plain, refuse_function


def run(layer: Any, input: Any, hx: Any = None) -> Any:
    """The forward of a gated recurrent layer: that of its class, on what exists.

    Args:
        layer: nn.RNN, GRU, LSTM or a cell of these.
        input, hx: as the class takes them, of all units.
    """
    units: Units = layer._l0_units
    is_packed = isinstance(input, PackedSequence)
    x: Any = input.data if is_packed else input
    states = [] if hx is None else [*hx] if _has_cells(layer) else [hx]
    _check("input", x, layer.input_size)
    for state in states:
        _check("hx", state, layer.hidden_size)
    draw = units.groups.now()
    if not torch.is_grad_enabled() and draw.z.requires_grad:
        refuse_function()
    side = (_OpenUnits if draw.exact else _Zeros)(units, draw)
    x = side.input(x)
    states = [side.state(state) for state in states]
    given = None if hx is None else tuple(states) if _has_cells(layer) else states[0]
    small = side.layer(layer)
    out = layer._l0_class.forward(small, input._replace(data=x) if is_packed else x, given)
    if not isinstance(layer, nn.RNNBase):
        return tuple(map(side.result, out)) if isinstance(out, tuple) else side.result(out)
    y, last = out
    times = 2 if layer.bidirectional else 1
    y = y._replace(data=side.result(y.data, times)) if is_packed else side.result(y, times)
    return y, tuple(map(side.result, last)) if isinstance(last, tuple) else side.result(last)


def _has_cells(layer: nn.Module) -> bool:
    """Whether its state is a pair."""
    return isinstance(layer, nn.LSTM | nn.LSTMCell)


def _check(what: str, x: Any, size: int) -> None:
    """Of all units: what is left of a wrong number of them may be a right one."""
    _checks.check_tensor(what, x)
    if x.ndim and x.shape[-1] != size:
        raise RuntimeError(f"{what} must have {size} as its last size, got shape {tuple(x.shape)}")


def prepare(layer: Any, units: Units) -> None:
    """Has the spaces of a layer's gates and directions be made before anything is compiled."""
    if units.outs is not None:
        gates = getattr(layer, recurrent_names(layer)[1]).shape[0] // layer.hidden_size
        for times in (gates, 1 + getattr(layer, "bidirectional", False)):
            units.groups.spaces.tiled(units.outs, times)


class _Side:
    """A recurrent layer of some of its units."""

    def __init__(self, units: Units, draw: Draw) -> None:
        self.units, self.draw = units, draw

    def weight(self, value: Tensor, rows: Space | None, cols: Space | None) -> Tensor:
        """What exists of a weight, times z of what it reads."""
        raise NotImplementedError

    def bias(self, value: Tensor, rows: Space | None) -> Tensor:
        """What exists of a bias."""
        raise NotImplementedError

    def tiled(self, times: int) -> Space | None:
        """The hidden units `times` times: once for each gate, or direction."""
        outs = self.units.outs
        return None if outs is None else self.units.groups.spaces.tiled(outs, times)

    def layer(self, layer: Any) -> Any:
        """One of its class that has the weights of what exists; in a loop over time it is made once."""
        known = self.draw.recurrent if _checks.readable() else None
        if known is None:
            return self._made(layer)
        values = [getattr(layer, name) for name in recurrent_names(layer)]
        key = (
            layer,
            layer.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *map(id, values),
        )
        found = known.get(key)
        if found is None:
            found = known[key] = self._made(layer)
        return found

    def _made(self, layer: Any) -> Any:
        cls = layer._l0_class
        small = cls.__new__(cls)
        small.__dict__.update(vars(layer))
        with _unwatched():
            values = {name: self._parameter(layer, name) for name in recurrent_names(layer)}
        small.__dict__["_parameters"] = values
        flat: list[Any] = [*values.values()]
        small.__dict__["input_size"], small.__dict__["hidden_size"] = (w.shape[1] for w in flat[:2])
        small.__dict__["_flat_weights"], small.__dict__["_flat_weight_refs"] = flat, [None] * len(flat)
        return small

    def _parameter(self, layer: Any, name: str) -> Tensor | None:
        value: Tensor | None = getattr(layer, name)
        if value is None:
            return None
        rows = self.tiled(value.shape[0] // layer.hidden_size)
        if value.ndim == 1:
            return self.bias(value, rows)
        hidden = None if reads_inputs(name) else self.tiled(value.shape[1] // layer.hidden_size)
        return self.weight(value, rows, self.units.ins if reads_inputs(name) else hidden)


class _OpenUnits(_Side):
    """Of what exists."""

    def of(self, rows: Space | None, cols: Space | None = None) -> _Exact:
        return _Exact(self.units._replace(ins=cols, outs=rows), self.draw)

    def input(self, x: Tensor) -> Tensor:
        return self.of(None).enter(x, self.units.ins, x.ndim - 1)

    def state(self, x: Tensor) -> Tensor:
        return self.of(None).enter(x, self.units.outs, x.ndim - 1)

    def result(self, y: Tensor, times: int = 1) -> Tensor:
        return self.of(self.tiled(times)).leave(y, y.ndim - 1)

    def weight(self, value: Tensor, rows: Space | None, cols: Space | None) -> Tensor:
        return narrow_weight(value, *self.of(rows, cols).sides(value))

    def bias(self, value: Tensor, rows: Space | None) -> Tensor:
        return cast(Tensor, self.of(rows).take(value))


class _Zeros(_Side):
    """Of all units, the closed ones zero: a step of zeros from a state of zeros is zeros."""

    def input(self, x: Tensor) -> Tensor:
        return plain(x)

    def state(self, x: Tensor) -> Tensor:
        return _Static(self.units, self.draw).mask(plain(x), x.ndim - 1)

    def result(self, y: Tensor, times: int = 1) -> Tensor:
        return y

    def weight(self, value: Tensor, rows: Space | None, cols: Space | None) -> Tensor:
        return masked(self.draw, value, rows, cols)

    def bias(self, value: Tensor, rows: Space | None) -> Tensor:
        return value if rows is None else value * self.draw.mask(rows, value.dtype)
