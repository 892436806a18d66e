"""Which dimensions of recurrent layers, and of sequences around them, are the same units: rules of trace.py.

A hidden unit k of a layer is row k of each of its gates in weight_ih and weight_hh, with these entries of the
biases, column k of weight_hh, and entry k of its states and outputs. The layers and directions of one
nn.RNN, GRU or LSTM have one hidden_size: unit k of one is unit k of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .kinds import kind_of, reads_inputs, recurrent_names
from .labels import across, along, shortened, varying

if TYPE_CHECKING:
    from .trace import Call, Trace


def recurrence(trace: Trace, call: Call) -> None:
    """The one function of torch that the forward of a recurrent layer calls."""
    module = trace.stack[-1][1] if trace.stack else None
    kind = None if module is None else kind_of(module)
    if kind is None or not kind.is_recurrent or module is None:
        trace.unknown(call)
        return
    is_cell = not isinstance(module, nn.RNNBase)
    at = 1 if is_cell or isinstance(call.args[3], bool) else 2  # packed ones have their sizes in front
    given = call.args[2:6] if is_cell else call.args[at + 1]
    names = recurrent_names(module)
    own: list[Any] = [module._parameters.get(name) for name in names]
    if [id(t) for t in given if t is not None] != [id(t) for t in own if t is not None]:
        trace.unknown(call)
        return
    x = call.args[0]
    labels, units = trace.labels(x), None
    if labels is not None:
        units = along(labels, -1)
        if units is None:  # they vary over time or examples
            trace.unknown(call)
            return
    hidden = trace.dim(own[1], 1, "in")
    directions = 2 if getattr(module, "bidirectional", False) else 1
    for name, parameter in zip(names, own, strict=True):
        if parameter is None:
            continue
        rows = trace.dim(parameter, 0, "out" if parameter.ndim == 2 else "along")
        if module not in trace.recurrent:
            trace.sets.join(hidden.repeat(len(rows) // len(hidden)), rows, trace.where(call))
        if parameter.ndim == 1:
            continue
        cols = trace.dim(parameter, 1, "in")
        if reads_inputs(name):
            if units is None:
                trace.sets.pin(cols, f"{trace.where(call)}, of what has no units")
            else:
                trace.sets.join(units, cols, trace.where(call))
        elif module not in trace.recurrent:
            trace.sets.join(hidden.repeat(len(cols) // len(hidden)), cols, trace.where(call))
    trace.recurrent.add(module)
    states = call.args[at]
    for state in [states] if isinstance(states, Tensor) else states:
        _join_state(trace, call, state, hidden)
    first, *others = call.results()
    if not is_cell:
        trace.set(first, across(hidden.repeat(directions), -1, first.shape))
    for out in others if not is_cell else [first, *others]:
        trace.set(out, across(hidden, -1, out.shape))


def _join_state(trace: Trace, call: Call, state: Tensor, hidden: Tensor) -> None:
    """An initial state: its units are the layer's; one that has none is closed with them all the same."""
    labels = trace.labels(state)
    if labels is None and trace.is_owned(state):
        labels = across(trace.dim(state, state.ndim - 1, "along"), -1, state.shape)
    if labels is not None:
        mine, own = shortened([labels, across(hidden, -1, state.shape)])
        trace.sets.join(mine.flatten(), own.flatten(), trace.where(call))


def sequences(trace: Trace, call: Call) -> None:
    """pack_padded_sequence and pad_packed_sequence: time and examples become one dimension, and back."""
    x, out = call.args[0], call.results()[0]
    labels = trace.labels(x)
    leading = 2 if call.name == "_pack_padded_sequence" else 1
    if labels is None or any(dim < leading for dim in varying(labels)):
        trace.unknown(call)
        return
    for _ in range(leading):
        labels = labels.select(0, 0)
    trace._none(call)
    trace.set(out, labels.expand(out.shape))
