"""The penalty of a whole model, the clamp of its gates, and its parameters in optimiser groups."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._compat import foreach_clamp_max_, foreach_clamp_min_
from ..gates import HardConcrete
from ..penalty import L2Term, coupled_penalty, l0_penalty
from .gate import GatedLayer, HardConcreteGate, gate_modules, is_frozen, refuse_bypassed
from .names import named_gates
from .notices import Closing
from .ranks import is_sharded, l2_of_shards
from .units.place import NAME, GateGroups
from .units.sizes import L2Terms

LIMIT = math.log(100)


def penalty(model: nn.Module, *, weight_decay: float = 0.0, detach_gates: bool = False) -> Tensor:
    r"""sum over the gates g of the model: p_open_g * ( lam_g |g| + weight_decay/2 * ||theta_g||^2 ).

    |g| is the number of parameters that the gate closes: out_features for an input gate, in_features (+ 1
    with a bias) for an output gate, the area of a block, 1 for a weight, and for a hidden unit of
    :class:`L0FeedForward` its rows, their biases and its column; for a unit of a model that :func:`gate_` has
    gated, what :attr:`UnitGraph.groups` says. A shared gate counts the groups of all its layers; a gate that
    no layer owns counts |g| = 1. Between an input and an output gate the second term is
    weight_decay/2 * sum_oi p_o p_i theta_oi^2. Ungated parameters, and the bias of a layer without output
    gates, are left to the optimiser. Add ``penalty(model) / N`` to a mean loss, N the number of training
    examples (Louizos, Welling, Kingma, ICLR 2018, eq. 9, 12 and appendix A): lam is then the paper's lambda,
    which they divide by N, too, and means the same for any batch and any data set.

    One autograd node for the whole model (one per distribution), which reads every weight once; weight and
    block gates, and a gate on both sides of one layer, take a few operations of torch more for their weights.
    Of sharded parameters (DTensor) log_alpha is gathered, and each rank sums over what it holds of a weight:
    all ranks call this alike, and have the same value. FullyShardedDataParallel's flat shards are refused.

    Args:
        model: any module with gates in it.
        weight_decay: the L2 coefficient, >= 0.
        detach_gates: whether the second term is a decay of the weights alone: its gradient does not reach the
            gates, which large weights would close.

    Returns:
        A differentiable scalar in the dtype of the gates.

    Raises:
        ValueError: no gate in the model, weight_decay out of range, or a gated layer as out_proj of a
            ``torch.nn.MultiheadAttention``, which would not call it.
        RuntimeError: FullyShardedDataParallel has sharded a gate or, with weight_decay, a weight; see
            :func:`keep_gates_whole`.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
    # A cache of the walk could not see a module replaced.
    layers: list[GatedLayer] = []
    gates: list[HardConcreteGate] = []
    hosts: list[nn.Module] = []
    for module in _modules(model):
        gates_of_units = module._modules.get(NAME) if weight_decay else None
        if isinstance(gates_of_units, GateGroups) and not is_frozen(gates_of_units):
            hosts.append(module)
        if isinstance(module, HardConcreteGate):
            if not module.frozen:
                gates.append(module)
        elif isinstance(module, GatedLayer):
            if not is_frozen(module):
                layers.append(module)
        elif isinstance(module, nn.MultiheadAttention):
            refuse_bypassed(module)
    if not gates:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    groups = [group for layer in layers for group in layer.gate_groups() if not group[0].frozen]
    owned = {gate for gate, _, _ in groups}
    groups += [(gate, gate.whole(), 1) for gate in gates if gate not in owned]

    terms, rests = _l2(layers, hosts, weight_decay, gates if detach_gates else [])
    sharded = [term for term in terms if is_sharded(term[1].weight)]
    if sharded:
        terms = [term for term in terms if not is_sharded(term[1].weight)]
    total = _by_dist(groups, terms, weight_decay, groups[0][0].dist)
    for dist, (weight, out, in_, n_groups) in sharded:
        total = total + l2_of_shards(weight, weight_decay, out, in_, n_groups, dist)
    return functools.reduce(torch.add, rests, total)


def _modules(model: nn.Module) -> list[nn.Module]:
    """model.modules(), whose nested generators take longer than the penalty."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(reversed(module._modules.values()))
    return [*found]


def _l2(
    layers: list[GatedLayer],
    hosts: list[nn.Module],
    weight_decay: float,
    detached: list[HardConcreteGate],
) -> tuple[list[tuple[HardConcrete, L2Term]], list[Tensor]]:
    """The terms of the L2 norm, and what they miss, as if the gates of `detached` needed no gradient."""
    if not weight_decay:
        return [], []
    trained = [gate.log_alpha for gate in detached if gate.log_alpha.requires_grad]
    for log_alpha in trained:
        log_alpha.requires_grad_(False)
    try:
        units = [L2Terms(host) for host in hosts]
        terms = [term for layer in layers for term in layer.l2_terms()]
        terms += [term for of_units in units for term in of_units.terms]
        if detached:
            terms = [(dist, _without_gates(term)) for dist, term in terms]
        rests = [layer.l2_rest(weight_decay) for layer in layers] + [u.rest(weight_decay) for u in units]
    finally:
        for log_alpha in trained:
            log_alpha.requires_grad_(True)
    return terms, [rest for rest in rests if rest is not None]


def _without_gates(term: L2Term) -> L2Term:
    out, in_ = (None if side is None else side.detach() for side in term[1:3])
    return term._replace(out_log_alpha=out, in_log_alpha=in_)


def _by_dist(
    groups: list[tuple[HardConcreteGate, Tensor, int]],
    terms: list[tuple[HardConcrete, L2Term]],
    weight_decay: float,
    dist: HardConcrete,
) -> Tensor:
    """One call for the gates and terms of `dist`, and one more for each further distribution."""
    own = [group for group in groups if group[0].dist is dist or group[0].dist == dist]
    log_alphas = [log_alpha for _, log_alpha, _ in own]
    sizes = [size for _, _, size in own]
    compiled = torch.compiler.is_compiling()
    lams = [gate.lam_tensor if compiled else gate.lam for gate, _, _ in own]
    own_terms = [term for of, term in terms if of is dist or of == dist]
    if own_terms:
        total = coupled_penalty(log_alphas, sizes, lams, own_terms, weight_decay, dist)
    else:
        total = l0_penalty(log_alphas, sizes, lam=lams, dist=dist)
    if len(own) == len(groups):
        return total
    others = [group for group in groups if group[0].dist != dist]
    return total + _by_dist(others, terms, weight_decay, others[0][0].dist)


def clamp_gates_(model: nn.Module, limit: float = LIMIT) -> None:
    """Clamps every log_alpha of the model to [-limit, limit], in place.

    Beyond +-log(100) a gate hardly changes, but takes long to come back: P(z > 0) is .047 at the lower end.

    Args:
        model: any module.
        limit: > 0.

    Raises:
        ValueError: limit is not positive.
    """
    _check_limit(limit)
    clamp(gate_modules(model), limit)


def clamp_after_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, limit: float = LIMIT
) -> RemovableHandle:
    """Has `optimizer` clamp the gates that the model has now, as :func:`clamp_gates_`, after each step.

    Every 64 steps it looks for layers whose evaluation gates are all closed, and warns, once, of each that
    stays so; a GPU is not waited for. Optimisers neither copy nor save hooks: after ``deepcopy`` or
    unpickling, register again.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        model: the model whose gates it trains.
        limit: see :func:`clamp_gates_`.

    Returns:
        The handle; its ``remove()`` ends the clamping.

    Raises:
        ValueError: no gate in the model, or limit is not positive.
    """
    gates = gate_modules(model)
    if not gates:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    _check_limit(limit)

    closing = Closing({gate: name for gate, (name, _) in named_gates(model).items()})

    def after_step(*_: Any) -> None:
        clamp(gates, limit)
        if not torch.compiler.is_compiling():
            closing.step()

    return optimizer.register_step_post_hook(after_step)


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The log_alpha of every gate, once each; :func:`parameter_groups` makes an optimiser group of them."""
    return [gate.log_alpha for gate in gate_modules(model)]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of the model that is no log_alpha, once each."""
    gates = {id(log_alpha) for log_alpha in gate_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in gates]


def parameter_groups(
    model: nn.Module,
    *,
    gate_lr: float | None = 0.02,
    weight_decay: float | None = None,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups of a model: its weights, and its gates without weight decay and with their own rate.

    ::

        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)

    Adam moves a log_alpha that only the penalty pulls by its rate in each step, whatever lam is. From where
    droprate_init = .5 starts it an evaluation gate closes after 2.4: 120 steps at a rate of .02, 2,400 at the
    1e-3 that suits weights. Decay of log_alpha pulls every gate towards P(z > 0) = .83, against the penalty.
    An optimiser over ``model.parameters()`` does that, and so does the Trainer of transformers, which spares
    biases and norms only. Give it an optimiser, ``Trainer(..., optimizers=(optimizer, None))``, or override
    its ``create_optimizer``.

    Args:
        model: any module.
        gate_lr: the learning rate of the gates, made for Adam and its kin; None: the optimiser's.
        weight_decay: of the weights; None: the optimiser's. That of the gates is 0.
        no_decay: (name, parameter) -> whether a weight is not to decay either, ``lambda name, p: p.ndim < 2``
            for biases and norms.

    Returns:
        Up to three groups, in this order, each only if it has parameters: weights, weights without decay,
        gates. Every parameter of the model is in one of them, once, in the order of ``model.parameters()``,
        frozen ones included. "name" of each group says which it is: "weights", "no_decay", "gates".

    Raises:
        ValueError: gate_lr or weight_decay is negative or not finite.
    """
    for name, value in (("gate_lr", gate_lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    gates = {id(log_alpha) for log_alpha in gate_parameters(model)}
    groups: dict[str, dict[str, Any]] = {
        "weights": {} if weight_decay is None else {"weight_decay": weight_decay},
        "no_decay": {"weight_decay": 0.0},
        "gates": {"weight_decay": 0.0} if gate_lr is None else {"weight_decay": 0.0, "lr": gate_lr},
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in gates:
            kind = "gates"
        else:
            kind = "no_decay" if no_decay is not None and no_decay(name, parameter) else "weights"
        groups[kind].setdefault("params", []).append(parameter)
    return [group | {"name": kind} for kind, group in groups.items() if "params" in group]


def _check_limit(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"limit must be > 0, got {limit!r}")


def clamp(gates: list[HardConcreteGate], limit: float) -> None:
    """Clamps the log_alpha of each gate to [-limit, limit], in place."""
    for sharded in (False, True):  # torch takes no lists with both
        log_alphas: list[Tensor] = [gate.log_alpha for gate in gates if is_sharded(gate.log_alpha) == sharded]
        if log_alphas:
            with torch.no_grad():
                foreach_clamp_min_(log_alphas, -limit)  # two calls for the whole model, not one a gate
                foreach_clamp_max_(log_alphas, limit)
