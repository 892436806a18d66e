"""Checkpoints of other packages that train with L0 gates, as state_dicts of models of this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .gate import HardConcreteGate

WEIGHTS = {"weights": "weight"}
"""AMLab's name; everybody else has torch's."""
AMLAB = "qz_loga"
GATES = (AMLAB, "weight_log_alpha", "weight_gates.qz_logits", "channel_gates.qz_logits")
"""log_alpha in AMLab-Amsterdam/L0_regularization (and what is derived of it), in
gallego-posada/constrained_sparsity, and of single weights and of channels in the package l0-python."""
NO_PLACE = "bias_log_alpha"
"""constrained_sparsity's gates of single biases."""


class _Source(NamedTuple):
    """A layer of the checkpoint.

    Attributes:
        name: of the layer there.
        values: what it holds, under torch's names.
        log_alpha: of its gates, or None.
        gate: the name of these there.
    """

    name: str
    values: dict[str, Tensor]
    log_alpha: Tensor | None
    gate: str


def converted_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint of a model with L0 layers of another package, as a state_dict for `model`.

    Layers are paired in their order, each with one of the same kind and sizes: give `model` the layers of the
    other one, gates where that has them. Known are the names of AMLab-Amsterdam/L0_regularization
    (``weights``, ``qz_loga``; its linear layers hold (in, out), which is transposed), of
    gallego-posada/constrained_sparsity (``weight_log_alpha``) and of the package l0-python
    (``weight_gates.qz_logits``, ``channel_gates.qz_logits``)::

        model = l0.nn.L0MLP((784, 300, 100, 10))
        model.load_state_dict(l0.nn.converted_state_dict(torch.load("theirs.pt")["state_dict"], model))

    What such a file does not hold is for you to set: the temperature (l0-python's default is .5, here it is
    2/3, see :class:`HardConcrete`), and the evaluation gate, ``eval_mode="paper"`` for AMLab, ``"median"``
    for the others. A bias behind an output gate is closed with its channel here, in training and in
    ``eval()``. constrained_sparsity does so, too; AMLab's convolutions do in evaluation, and have no bias at
    all in training. l0-python's keep it: a bias that is not 0 is refused there.

    Args:
        state: names and tensors, those of ``state_dict()``.
        model: whose layers say what goes where; it is not changed.

    Returns:
        A state_dict that ``model.load_state_dict`` takes, with copies in the model's dtypes.

    Raises:
        ValueError: another number of layers, or of other sizes; a layer with gates whose partner has none, or
            the reverse; gates of single biases.
    """
    sources, targets = list(_sources(state)), list(_layers(model))
    if len(sources) != len(targets):
        raise ValueError(
            f"model must have the {len(sources)} layers of the checkpoint, "
            f"{[source.name for source in sources]}, got {len(targets)}: {[name for name, _ in targets]}"
        )
    found: dict[str, Tensor] = {}
    for source, (name, layer) in zip(sources, targets, strict=True):
        for key, value in _paired(source, name, layer).items():
            found[f"{name}.{key}" if name else key] = value
    return {**{key: value.clone() for key, value in model.state_dict().items()}, **found}


def _sources(state: Mapping[str, Tensor]) -> Iterator[_Source]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        gate = next((gate for gate in GATES if key == gate or key.endswith(f".{gate}")), None)
        prefix, _, last = (key.removesuffix(gate), "", gate) if gate else key.rpartition(".")
        layers.setdefault(prefix.rstrip("."), {})[last] = value
    of_amlab = any(AMLAB in values for values in layers.values())
    for name, values in layers.items():
        if NO_PLACE in values:
            raise ValueError(
                f"state must have no gates of single biases, which no layer here has, got {NO_PLACE!r} of "
                f"{name!r}"
            )
        gate = next((gate for gate in GATES if gate in values), "")
        log_alpha = values.pop(gate, None)
        named = {WEIGHTS.get(key, key): value for key, value in values.items()}
        if of_amlab and "weight" in named and named["weight"].ndim == 2:  # (in, out), without gates, too
            named["weight"] = named["weight"].t()
        yield _Source(name, named, log_alpha, gate)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that hold parameters or buffers, but for gates."""
    for name, module in model.named_modules():
        if isinstance(module, HardConcreteGate):
            continue
        if any(value is not None for value in (*module._parameters.values(), *module._buffers.values())):
            yield name, module


def _paired(source: _Source, name: str, layer: nn.Module) -> dict[str, Tensor]:
    """The entries of one layer."""
    own = {**layer._parameters, **layer._buffers}
    kept = {key: value for key, value in own.items() if value is not None}
    theirs, ours = ({k: tuple(v.shape) for k, v in of.items()} for of in (source.values, kept))
    if theirs != ours:
        raise ValueError(
            f"{name!r} must hold {theirs}, as {source.name!r} of the checkpoint does, got {ours}"
        )
    found = {key: value.to(kept[key].dtype).clone() for key, value in source.values.items()}
    side = _side(layer)
    if (source.log_alpha is None) != (side is None):
        has, lacks = ("gates", "none") if side is None else ("no gates", "some")
        raise ValueError(
            f"{name!r} must be gated as {source.name!r} of the checkpoint, which has {has}, got {lacks}"
        )
    if source.log_alpha is None or side is None:
        return found
    gate: Any = getattr(layer, side)
    if source.log_alpha.numel() != gate.log_alpha.numel():
        raise ValueError(
            f"{name!r} must have {source.log_alpha.numel()} gates, as {source.name!r} of the checkpoint, "
            f"got {gate.log_alpha.numel()} on its {side}"
        )
    bias = source.values.get("bias")
    if source.gate.startswith("channel_gates") and bias is not None and bool(bias.any()):
        raise ValueError(
            f"the bias of {source.name!r} must be 0 or absent, for there it is not closed with its channel, "
            f"got up to {bias.abs().max().item():.3g}"
        )
    return {
        **found,
        f"{side}.log_alpha": source.log_alpha.to(gate.log_alpha.dtype).view(gate.log_alpha.shape).clone(),
    }


def _side(layer: nn.Module) -> str | None:
    """Where a layer has its only gates."""
    sides = [
        side for side in ("in_gate", "out_gate", "weight_gate") if getattr(layer, side, None) is not None
    ]
    if len(sides) > 1:
        raise ValueError(f"model must have one gate vector a layer, as the checkpoint, got {sides}")
    return sides[0] if sides else None
