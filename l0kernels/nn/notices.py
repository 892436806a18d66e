"""Warnings of what goes wrong in silence: gates drawn twice, a draw forgotten, a layer that closes."""

import math
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .. import _checks, reference
from .._compat import graph_task
from . import ranks
from .gate import HardConcreteGate

LOOK_EVERY = 64
"""Steps between two looks for closed layers: so rare that a look per gate costs a step next to nothing."""

_NODES = 2000
"""How far back a graph is searched for a gate: what shares one is near."""
_SEARCHES = 16
"""How often it is, of each gate: a layer that disagrees does so at its first forward."""


def warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


# ---- a shared gate that two layers draw, each for itself


def watch_shared(drawer: nn.Module, gates: Iterable[HardConcreteGate | None], x: Any) -> None:
    """Called where `drawer` is about to draw `gates` for x; warns where x or its sister has another draw.

    Two layers that share a gate disagree if each draws it: that is so where x was made with an earlier draw
    of the gate, or where another layer has just read the same x with one. A layer that is called in a loop
    draws anew each time, and means it.
    """
    if torch.compiler.is_compiling():
        return
    for gate in gates:
        if gate is not None and gate.shared and gate.searches < _SEARCHES and gate.draws:
            _watch_draw(drawer, gate, x)


def _watch_draw(drawer: nn.Module, gate: HardConcreteGate, x: Any) -> None:
    if not (isinstance(x, Tensor) and torch.is_grad_enabled() and graph_task() == -1 and _checks.readable()):
        return
    state, log_alpha = gate.__dict__, gate.log_alpha
    last, version = state.get("_last_draw"), log_alpha._version
    state["_last_draw"] = (weakref.ref(drawer), weakref.ref(x), version)
    before = None if last is None else last[0]()
    if last is None or before is None or before is drawer:
        return
    state["searches"] = gate.searches + 1
    same_x = last[1] is not None and last[1]() is x and last[2] == version
    if not same_x and not _comes_from(x.grad_fn, log_alpha):
        return
    state["searches"] = _SEARCHES
    first = "a call of its own" if before is gate else _named(before)
    warn(
        f"a gate that layers share was drawn twice in one forward, by {first} and by {_named(drawer)}, which "
        f"disagree on what is open: {gate}. Draw it once: put the layers into one L0Sequential, call draw() "
        "of a GateBank(model) before the forward, or pass gates = gate() to both layers"
    )


def _named(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def _comes_from(node: Any, leaf: Tensor) -> bool:
    """Whether a node of autograd's graph has `leaf` among what is next behind it."""
    seen = {node}
    front = [] if node is None else [node]
    while front and len(seen) < _NODES:
        if any(getattr(node, "variable", None) is leaf for node in front):
            return True
        behind = [other for node in front for other, _ in node.next_functions if other is not None]
        front = [node for node in dict.fromkeys(behind) if node not in seen]
        seen.update(front)
    return False


# ---- a GateBank whose draw() is forgotten


class _Draws:
    """What the last step of an optimiser that moved the gates of a bank found drawn."""

    gate: HardConcreteGate | None = None

    def __init__(self) -> None:
        self.missing = 0
        self.warned = False
        self.state: tuple[int, Any, int] = (0, None, 0)

    def look(self, bank: Any) -> None:
        """After a step: whether it moved the gates, and what they were drawn as since the step before."""
        gate = next((gate for gate in bank._gates if gate.training and gate.log_alpha.requires_grad), None)
        if gate is None or self.warned:
            return
        drawn, version = gate.__dict__.get("_drawn"), gate.log_alpha._version
        if gate is self.gate and version == self.state[0]:
            return
        before, self.state = self.state, (version, drawn, bank.step._version + _entered[0])
        new, self.gate = gate is not self.gate, gate
        if new or drawn is not before[1] or self.state[2] != before[2] or (drawn is None and bank._cleared):
            self.missing = int(new and drawn is None)
            return
        self.missing += 1
        if self.missing < 2:  # two optimisers may step for one draw
            return
        self.warned = True
        now = "each layer draws for itself" if drawn is None else "every forward has the gates of an old draw"
        warn(
            f"a GateBank did not draw before the last two steps of the optimiser, so that {now}: call its "
            "draw() before each forward. To keep a draw on purpose, enter it, as in `with draw: loss = ...`; "
            "to do without the bank, call its clear()"
        )


_banks: "weakref.WeakKeyDictionary[nn.Module, _Draws]" = weakref.WeakKeyDictionary()
_handles: list[RemovableHandle] = []
_entered = [0]


def watch_bank(bank: nn.Module) -> None:
    """Has each step of an optimiser look whether `bank` has drawn for it."""
    _banks[bank] = _Draws()
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_look_at_banks))


def forget_bank(bank: nn.Module) -> None:
    """Its draws are no longer seen here, as those of a captured graph."""
    _banks.pop(bank, None)


def note_entered() -> None:
    """A draw is entered as a context: it is kept on purpose."""
    _entered[0] += 1


def _look_at_banks(*_: Any) -> None:
    if _banks and _checks.readable():
        for bank, draws in list(_banks.items()):
            draws.look(bank)


# ---- a layer whose gates are all closed


class Closing:
    """Looks now and then for gate vectors without an open evaluation gate, and warns of those that stay so.

    Nobody waits for it: what a GPU finds is copied behind its work and read at the next look.

    Args:
        names: the gates, and how to call them.
    """

    def __init__(self, names: dict[HardConcreteGate, str]) -> None:
        self._names = {gate: name for gate, name in names.items() if gate.n > 1 and _is_known(gate)}
        self._steps = 0
        self._asked: list[tuple[list[HardConcreteGate], Tensor, Any]] = []
        self._closed: dict[HardConcreteGate, float] = {}

    def step(self) -> None:
        """Counts a step of the optimiser, and at some of them looks."""
        self._steps += 1
        if self._steps % LOOK_EVERY == 0 and _checks.readable() and ranks.rank() == 0:
            self._ask()
            self._read()

    def _ask(self) -> None:
        on: dict[torch.device, list[HardConcreteGate]] = {}
        for gate in self._names:
            log_alpha = gate.log_alpha
            if log_alpha.requires_grad and log_alpha.numel() == gate.n and not ranks.is_sharded(log_alpha):
                on.setdefault(log_alpha.device, []).append(gate)
        for device, gates in on.items():
            if device.type == "cpu":
                self._asked.append((gates, _levels(gates), None))
            elif device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                with torch.cuda.device(device):
                    levels = _levels(gates).to("cpu", non_blocking=True)
                    event = torch.cuda.Event()
                    event.record()
                self._asked.append((gates, levels, event))

    def _read(self) -> None:
        known = [asked for asked in self._asked if asked[2] is None or asked[2].query()]
        self._asked = [asked for asked in self._asked if not any(asked is one for one in known)]
        stay = []
        for gates, levels, _ in known:
            for gate, level in zip(gates, levels.tolist(), strict=True):
                before = self._closed.pop(gate, -math.inf)
                if not level < math.inf:  # open, or a NaN
                    continue
                if level <= before:  # a look ago it was closed, and it has not risen since
                    stay.append(gate)
                self._closed[gate] = level
        if stay:
            named = ", ".join(f"{self._names.pop(gate)} (lam={gate.lam:g})" for gate in stay)
            warn(
                f"every evaluation gate is closed, and stays so, of {named}: nothing passes there. If that "
                "is not meant, train again with a lower lam or a lower learning rate of the gates, gate_lr "
                "in parameter_groups; to a mean loss penalty(model) / N is added, N the number of examples"
            )


def _is_known(gate: HardConcreteGate) -> bool:
    return type(gate).eval_gates is HardConcreteGate.eval_gates


def _levels(gates: list[HardConcreteGate]) -> Tensor:
    """The highest log_alpha of each gate vector, infinite where an evaluation gate is open; on the device."""
    eval_z = reference.gates.eval_z
    with torch.no_grad():
        tops = [gate.log_alpha.amax() for gate in gates]
        kinds = {(gate.eval_mode, gate.dist, top.dtype) for gate, top in zip(gates, tops, strict=True)}
        mode, dist, _ = next(iter(kinds))
        if len(kinds) == 1 and mode != "topk":  # each for itself: no gate is open unless the highest is
            z = eval_z(torch.stack(tops), mode, dist)
        else:
            each = [eval_z(gate.log_alpha, gate.eval_mode, gate.dist).amax().float() for gate in gates]
            z = torch.stack(each)
        return torch.stack([top.float() for top in tops]).masked_fill(z != 0, math.inf)
