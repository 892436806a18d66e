"""Stochastic proximal gradient: an operator after each step of any optimiser of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _checks
from .._arguments import check_not_negative
from .regularisers import Regulariser, Step

Keys = str | nn.Parameter | Sequence[nn.Parameter]
METRICS = ("none", "adam")


class _Place(NamedTuple):
    """A parameter with what shrinks it, and the number of its group in the optimiser."""

    name: str
    parameter: nn.Parameter
    regulariser: Regulariser
    group: int


class AfterStep:
    """What :func:`after_step` has registered.

    Attributes:
        scale: multiplies every step, so that a schedule may raise a penalty or let it go; 1.0 at first.
    """

    scale: float

    def __init__(
        self, optimizer: torch.optim.Optimizer, places: Sequence[_Place], metric: str, every: int
    ) -> None:
        self.scale = 1.0
        self._optimizer, self._places, self._metric, self._every = optimizer, list(places), metric, every
        self._steps = 0
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._after)

    def value(self) -> Tensor:
        """The sum of the penalties, each of its parameters as they are now, without ``scale``; detached."""
        with torch.no_grad():
            values = [place.regulariser.value(place.parameter).double() for place in self._places]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def apply_(self) -> None:
        """What a step is followed by: parameters that have a gradient are shrunk, others are left alone."""
        jobs: dict[tuple[Regulariser, float | None], tuple[list[Tensor], list[Step]]] = {}
        for place in self._places:
            if place.parameter.grad is None:
                continue
            step = self._step(place)
            key = place.regulariser, None if isinstance(step, Tensor) else step
            tensors, steps = jobs.setdefault(key, ([], []))
            tensors.append(place.parameter)
            steps.append(step)
        for (regulariser, _), (tensors, steps) in jobs.items():
            regulariser.prox_(tensors, steps)

    def remove(self) -> None:
        """Ends it."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and the scale."""
        return {"steps": self._steps, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`.

        Raises:
            ValueError: other keys, or numbers out of their ranges.
        """
        if set(state) != {"steps", "scale"}:
            raise ValueError(f"state must have 'steps' and 'scale', got {sorted(state)}")
        _checks.check_count("steps", state["steps"], 0, 2**63)
        check_not_negative(scale=state["scale"])
        self._steps, self.scale = state["steps"], state["scale"]

    def _after(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self.apply_()

    def _step(self, place: _Place) -> Step:
        group = self._optimizer.param_groups[place.group]
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.is_cpu and not torch.compiler.is_compiling():
            rate = rate.item()
        factor = self.scale * self._every
        if self._metric == "none":
            return rate * factor
        metric = _adam_metric(place, group, self._optimizer.state[place.parameter])
        return metric.reciprocal_().mul_(rate * factor)


def _adam_metric(place: _Place, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """``sqrt(v_hat) + eps`` by element: what Adam divides by."""
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if second is None:
        raise RuntimeError(f"metric='adam' must find exp_avg_sq in the state of {place.name}, got {[*state]}")
    steps = state["step"]
    if isinstance(steps, Tensor) and steps.is_cpu and not torch.compiler.is_compiling():
        steps = steps.item()
    correction = 1 - group["betas"][1] ** steps
    wide = second.to(torch.promote_types(second.dtype, torch.float32))
    metric: Tensor = (wide / correction).sqrt_().add_(group["eps"])
    return metric


def after_step(
    optimizer: torch.optim.Optimizer,
    regularisers: Mapping[Any, Regulariser],
    model: nn.Module | None = None,
    *,
    metric: str = "none",
    every: int = 1,
) -> AfterStep:
    """Has `optimizer` apply proximal operators after each of its steps: ``w <- prox_{lr R}(w)``, in place.

    With the optimiser's step on the loss alone this is stochastic proximal gradient for ``loss + sum R(w)``:
    zeros are exact. The learning rate is that of the parameter's group at that step. A parameter without a
    gradient is left alone, as by the optimiser. Optimisers neither copy nor save hooks: after ``deepcopy`` or
    unpickling, register again.

    ::

        after_step(optimizer, {r".*weight": GroupLasso(1e-3, dim=1), model.head.weight: L1(1e-4)}, model)

    Args:
        optimizer: any of ``torch.optim``, foreach, fused or neither.
        regularisers: what shrinks which parameters. A key is a regular expression for the whole name of
            parameters of `model`, a parameter, or a tuple of parameters.
        model: whose parameters the expressions name.
        metric: "none": the Euclidean distance, a step of lr. "adam": that in which Adam and its kin step
            (ProxGEN, arXiv 2007.07484): by element ``lr / (sqrt(v_hat) + eps)``, v_hat the second moment
            without its bias (with amsgrad the largest); of a group ``lr / mean(sqrt(v_hat) + eps)``.
        every: so many steps are followed by one operator of as many steps' size.

    Returns:
        The handle: its ``value()`` is the penalty, ``remove()`` ends it, ``state_dict()`` continues a run.

    Raises:
        TypeError: a key or a value of another kind.
        ValueError: a pattern that matches nothing or needs a model, a parameter twice, or one that the
            optimiser does not have; one that its regulariser cannot take; a metric that is not known, or
            not the optimiser's; every below 1.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    _checks.check_choice("metric", metric, METRICS)
    _checks.check_count("every", every, 1, 2**63)
    if not regularisers:
        raise ValueError("regularisers must hold at least one, got none")
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()} if model is not None else {}
    places: dict[nn.Parameter, _Place] = {}
    for key, regulariser in regularisers.items():
        if not isinstance(regulariser, Regulariser):
            raise TypeError(f"regularisers[{_told(key)}] must be a Regulariser, got {regulariser!r}")
        for parameter in _named(key, model, names):
            name = names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")
            if parameter in places:
                raise ValueError(f"regularisers must name a parameter once, got {name} twice")
            if parameter not in groups:
                raise ValueError(f"optimizer must have the parameters of regularisers, got none for {name}")
            places[parameter] = _Place(name, parameter, regulariser, groups[parameter])
            _check(places[parameter], metric, optimizer.param_groups[groups[parameter]])
    return AfterStep(optimizer, [*places.values()], metric, every)


def _check(place: _Place, metric: str, group: Mapping[str, Any]) -> None:
    try:
        place.regulariser.check(place.parameter)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place.name}, {place.regulariser}: {error}") from error
    if type(place.parameter) not in _checks.PLAIN:
        kind = type(place.parameter).__name__
        raise TypeError(f"{place.name} must be a plain parameter, got a {kind}: shard what trains otherwise")
    if metric == "adam" and not ("betas" in group and "eps" in group):
        raise ValueError(f"metric='adam' must have an optimizer with betas and eps, got {sorted(group)}")


def _told(key: Any) -> str:
    return repr(key) if isinstance(key, str) else type(key).__name__


def _named(key: Any, model: nn.Module | None, names: Mapping[nn.Parameter, str]) -> list[nn.Parameter]:
    if isinstance(key, nn.Parameter):
        return [key]
    if isinstance(key, tuple) and key and all(isinstance(p, nn.Parameter) for p in key):
        return [*key]
    if not isinstance(key, str):
        raise TypeError(
            f"a key of regularisers must be a pattern, a parameter or a tuple of these, got {_told(key)}"
        )
    if model is None:
        raise ValueError(f"model must be given for the pattern {key!r}, got none")
    found = [p for p, name in names.items() if re.fullmatch(key, name)]
    if not found:
        raise ValueError(f"{key!r} must match the name of a parameter, got none of {[*names.values()]}")
    return found


def layer_shares(layers: int, first: float = 0.8, change: float = 0.2) -> list[float]:
    """``first - change * l`` for l = 0 .. layers - 1: the share of the groups in each layer of a net.

    It falls from the lower layers to the upper ones, as in CGES (Yoon, Hwang, ICML 2017), on whose mixing by
    layer Ma et al. (arXiv 1901.01021) build.

    Raises:
        ValueError: a share outside [0, 1], or no layer.
    """
    _checks.check_count("layers", layers, 1, 2**31)
    found = [first - change * layer for layer in range(layers)]
    if not all(0 <= share <= 1 for share in found):
        raise ValueError(f"first and change must give shares in [0, 1] for {layers} layers, got {found}")
    return found
