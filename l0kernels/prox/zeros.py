"""Units whose weights are zero are skipped: gates that are open or closed for what the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _checks
from .._compat import AnyBatchNorm
from ..nn.gate import HardConcreteGate
from ..nn.units.graph import Group, Member, unit_graph
from ..nn.units.kinds import kind_of
from ..nn.units.place import GateGroups, check_ungated, gated, tensors_of

_OPEN = 80.0
"""A log_alpha whose evaluation gate is exactly 1; that of its negative is exactly 0."""


class ZeroGates:
    """What :func:`gates_from_zeros` has put into a model."""

    def __init__(self, model: nn.Module, gates: GateGroups, silent: set[str]) -> None:
        self._gates, self._silent = gates, silent
        parameters = {name for name, t in tensors_of(model).items() if isinstance(t, nn.Parameter)}
        self._members = {
            group.name: [member for member in group.members if member.name in parameters]
            for group in gates.groups
        }
        self._plain = {name for name in parameters if not _is_prelu(model, name)}
        self._homes = {
            member.name: _home(model, member.name) for members in self._members.values() for member in members
        }

    def __iter__(self) -> Iterator[tuple[Group, HardConcreteGate]]:
        return zip(self._gates.groups, self._gates.gates, strict=True)

    @property
    def closed(self) -> dict[str, int]:
        """How many units of each group are closed now."""
        return {group.name: int((gate.log_alpha < 0).sum()) for group, gate in self}

    @torch.no_grad()
    def refresh(self) -> None:
        """Closes the units that are zero now, and opens the others. It reads every weight once."""
        known: dict[tuple[str, int], Tensor] = {}
        for group, gate in self:
            found = torch.where(self._is_zero(group, known), -_OPEN, _OPEN).to(gate.log_alpha.dtype)
            # What stays is not made again by the next forward; a GPU is not waited for.
            if not (found.is_cpu and torch.equal(found, gate.log_alpha)):
                gate.log_alpha.copy_(found)

    @torch.no_grad()
    def open_(self) -> None:
        """Opens all units until the next refresh, so that zero weights get their gradients."""
        for _, gate in self:
            gate.log_alpha.fill_(_OPEN)

    def after_step(
        self, optimizer: torch.optim.Optimizer, every: int = 1, reopen: int | None = None
    ) -> RemovableHandle:
        """Has `optimizer` refresh after every so many steps; register it after :func:`after_step`.

        With ``every`` 1 the model is always the dense one's equal. With more, a closed unit stays closed
        until the next refresh, even where momentum moves its weights off zero meanwhile.

        Args:
            optimizer: any of ``torch.optim``.
            every: so many steps.
            reopen: each time so many refreshes are due, one opens all units instead, until the next; None:
                never.

        Raises:
            ValueError: every or reopen below 1.
        """
        _checks.check_count("every", every, 1, 2**63)
        if reopen is not None:
            _checks.check_count("reopen", reopen, 1, 2**63)
        steps = 0

        def after(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps % every:
                return
            if reopen is not None and steps // every % reopen == 0:
                self.open_()
            else:
                self.refresh()

        return optimizer.register_step_post_hook(after)

    def _is_zero(self, group: Group, known: dict[tuple[str, int], Tensor]) -> Tensor:
        """(units,) bool: nothing reads the unit, or nothing makes it."""
        members = self._members[group.name]
        read = [member for member in members if member.role == "in"]
        made = [member for member in members if member.role != "in" and member.name in self._plain]
        zero = ~self._any(read, known)
        return zero | ~self._any(made, known) if group.name in self._silent and made else zero

    def _any(self, members: Sequence[Member], known: dict[tuple[str, int], Tensor]) -> Tensor:
        """(units,) bool: whether a unit has an element that is not 0 in one of its places; vectors first."""
        found: Tensor | None = None
        for member in sorted(members, key=lambda member: self._value(member).ndim):
            own = self._not_zero(member, known)[member.index].any(1)
            found = own if found is None else found | own
            if found.is_cpu and bool(found.all()):
                break
        assert found is not None
        return found

    def _value(self, member: Member) -> Tensor:
        module, name = self._homes[member.name]
        value = module._parameters[name]
        assert value is not None
        return value

    def _not_zero(self, member: Member, known: dict[tuple[str, int], Tensor]) -> Tensor:
        key = member.name, member.dim
        if key not in known:
            value = self._value(member)
            others = [dim for dim in range(value.ndim) if dim != member.dim]
            known[key] = (value.abs().amax(others) if others else value) != 0  # a NaN is not 0
        return known[key]


def _is_prelu(model: nn.Module, name: str) -> bool:
    """Whether it is a slope, whose value does not matter to a 0."""
    kind = kind_of(model.get_submodule(name.rpartition(".")[0]))
    return kind is not None and kind.name == "prelu"


def _home(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def gates_from_zeros(
    model: nn.Module,
    *args: Any,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    inputs: bool = False,
    residual: bool = True,
    **kwargs: Any,
) -> ZeroGates:
    """Has a model skip its units whose weights are zero, in place, by gates as of :func:`l0kernels.nn.gate_`.

    ``model(*args, **kwargs)`` is run to find the units, see :func:`l0kernels.nn.unit_graph`. Each has a gate
    that is not trained: 0 where the unit is zero, else 1. A unit is zero where all weights that read it are
    (the columns: penalise dim 1), or where all parameters that make it are, rows and biases, if what stands
    between was seen to make 0 of 0.

    Outputs are those of the dense model. So are all gradients but those of the weights that are zero: a
    closed unit is not computed, and its weights get gradients of 0, where the dense model may have others
    for them. So a zero unit stays zero, but for the optimiser's momentum. :meth:`ZeroGates.open_`, or
    ``reopen`` of :meth:`ZeroGates.after_step`, lets it come back. Two things differ in training: dropout
    draws for the open units alone, and a batch norm keeps the statistics of a closed channel.

    :func:`l0kernels.nn.export` makes the model smaller by what is closed, :func:`l0kernels.nn.ungate_` takes
    the gates out.

    Args:
        model: any module that is not gated.
        *args, **kwargs: an example of its inputs.
        include, exclude, inputs, residual: as of :func:`l0kernels.nn.gate_`.

    Returns:
        The gates, refreshed once; refresh them as the weights change.

    Raises:
        ValueError: as :func:`l0kernels.nn.gate_`; units that a layer norm is over are left as they are, since
            a zero changes the others there: if these are all, there is nothing to gate.
    """
    check_ungated(model)
    graph = unit_graph(model, *args, inputs=inputs, **kwargs)
    modules = dict(model.named_modules())
    groups = [g for g in graph.select(include, exclude, residual) if not _is_normed(g, modules)]
    if not groups:
        raise ValueError(f"model must have units to gate, not all under a norm over units, got:\n{graph}")
    silent = _silent(model, groups, args, kwargs)
    gates = gated(model, groups, graph, args, kwargs, eval_mode="paper")
    for gate in gates.gates:
        gate.freeze_()
    found = ZeroGates(model, gates, silent)
    found.refresh()
    return found


def _is_normed(group: Group, modules: dict[str, nn.Module]) -> bool:
    """Whether a norm is over the units, so that a zero changes the others."""
    kinds = [kind_of(modules[layer]) for layer in group.layers if layer in modules]
    return any(kind is not None and kind.is_exact for kind in kinds)


def _silent(model: nn.Module, groups: Sequence[Group], args: Any, kwargs: Any) -> set[str]:
    """The groups whose units read as 0 where the parameters that make them are: seen in a run with these."""
    modules = dict(model.named_modules())
    made = {m.name for group in groups for m in group.members if m.role != "in"}
    values = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in made}
    reads: dict[str, list[tuple[str, Tensor]]] = {}
    silent = set()
    for group in groups:
        members = [m for m in group.members if m.role == "in"]
        layers = [(m.name.rpartition(".")[0], m) for m in members]
        kinds = [kind_of(modules[layer]) for layer, _ in layers if layer in modules]
        norms = [modules[layer] for layer in group.layers if isinstance(modules.get(layer), AnyBatchNorm)]
        # Without a weight it makes something else of 0 once its running mean has moved.
        makers = any(m.role == "out" for m in group.members) and all(cast(Any, m).affine for m in norms)
        if makers and len(kinds) == len(layers) and all(k is not None and k.is_product for k in kinds):
            silent.add(group.name)
            for layer, member in layers:
                reads.setdefault(layer, []).append((group.name, member.index.flatten()))
    handles = []
    for layer, found in reads.items():

        def look(module: nn.Module, inputs: tuple[Any, ...], found: list[tuple[str, Tensor]] = found) -> None:
            kind = kind_of(module)
            assert kind is not None
            x = inputs[0].movedim(-1 - kind.spatial, 0)
            for name, places in found:
                if getattr(module, "groups", 1) > 1 or bool((x[places.to(x.device)] != 0).any()):
                    silent.discard(name)

        handles.append(modules[layer].register_forward_pre_hook(look))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(model, values, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return silent
