"""Training that ends at the size that was asked for: each step of the optimiser ends on a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import _checks, reference
from ..budget import Projection, State
from .gate import HardConcreteGate, gate_modules
from .names import named_gates
from .notices import LOOK_EVERY, Closing
from .penalty import LIMIT, clamp
from .shares import WHOLE, CostFunction, GateKind, Wish, check_reach, kinds_of
from .units.example import Inputs


class Budget:
    """Training that ends where you said: after each step the gates are moved until the model costs no more.

    ::

        optimizer = torch.optim.Adam(l0.nn.parameter_groups(model), lr=1e-3)
        budget = l0.nn.Budget(model, keep=0.5, steps=3000)
        budget.attach(optimizer)                        # nothing else: no penalty in the loss, no clamp
        ...                                             # 3,000 steps as ever
        small = l0.nn.export(model, keep=0.5)

    With all log_alpha in one vector a, c(a) the share of the cost that is expected to be left, v a running
    mean of the squared gradients of the loss (.999) and T = ``steps``, the step t of the optimiser ends with

    ::

        q   = (dc/da) / (sqrt(v^) + .01 * rms(sqrt(v^))),     v^ = v / (1 - .999**t)
        B_t = c_0 + (B - c_0) * min(1, t / (ramp * T))
        a  <- clamp(a - mu * q, -log 100, log 100)

    with the smallest mu >= 0 at which c(a) <= B_t (or the highest that changes anything). mu is the price of
    the cost: it is solved for, so there is no multiplier with a learning rate, and nothing to tune but the
    rate of the gates (.02 to .1 with Adam). Gates whose gradients are small move most, as a constraint in
    Adam's metric would have it. Where the loss alone closes more than B_t, mu is 0: the budget is an upper
    end, and opens nothing.

    c is made of how open the gates can be: ``(P(z > 0) - low) / (high - low)``, low and high the ends of what
    the clamp allows, .047 and .998. So it reaches 0, and what is left in ``eval()`` comes to the same.

    A step whose gradients (or log_alphas) are not finite is skipped: nothing moves, t stays, and
    :attr:`skipped` counts it. A gate whose log_alpha does not require a gradient stays where it is, and
    counts. Where layers or gates of the model are exchanged, the cost is read off it anew, at the next of
    every 64 steps; at once where a gate is frozen or gets another distribution.

    Everything stays on the device of the gates, and no step waits for it. A step can be captured in a CUDA
    graph. On several ranks the gates' gradients are those of all (DistributedDataParallel, or
    :func:`keep_gates_whole`), and so is what follows from them; as an insurance rank 0 sends gates and state
    to the others at every 64th step.

    Args:
        model: any module with gates.
        keep: B, the share of the whole cost that is to be left, ungated parts included. Or a mapping from
            patterns to shares, a price for each: a regular expression for the whole name of a gate (as
            :func:`open_units` has them), the end of it after a dot, or a kind of units ("heads", "units" or
            "width" of a model that :func:`gate_` has gated). A share is then of what the gates of
            the pattern can close while all others are open; gates that no pattern names are clamped only.
        cost: "params", as :func:`expected_l0` counts; "flops", as :func:`expected_flops`; or a function of a
            mapping from the names of gates to how open they are, (n,) float64 in [0, 1], that returns a
            scalar, differentiable and growing: a table of latencies, say.
        steps: T, how many steps the training takes. Behind them B stays.
        ramp: r in [0, 1], the part of the steps in which the budget falls to B.
        input_shape: for "flops", see :func:`expected_flops`.

    Raises:
        ValueError: no gate in the model, a share out of reach (the message says what is within), steps below
            1, ramp out of [0, 1], an unknown cost or one that the gates do not change, a pattern that matches
            no gate or two that match one, gates on several devices, or sharded ones.
        TypeError: an argument of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float | Mapping[str, float],
        *,
        cost: str | CostFunction = "params",
        steps: int,
        ramp: float = 0.3,
        input_shape: Inputs | None = None,
    ) -> None:
        _checks.check_count("steps", steps, 1, 2**63)
        _checks.check_number("ramp", ramp)
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must lie in [0, 1], got {ramp!r}")
        self.model = model
        self.keep = keep
        self.cost = cost
        self.steps = steps
        self.ramp = ramp
        self._input_shape = input_shape
        self._handle: RemovableHandle | None = None
        self._group: Any = None
        self._count = 0
        self._read_model()
        check_reach(self._kinds)
        device = self._gates[0].log_alpha.device
        self._state = State(
            torch.zeros(sum(gate.n for gate in self._gates), device=device, dtype=self._dtype()),
            self._shares(self._expected),
            torch.zeros(len(self._kinds), device=device, dtype=torch.float64),
            torch.zeros((), device=device, dtype=torch.int64),
            torch.zeros((), device=device, dtype=torch.int64),
        )

    # ---- the model

    def _read_model(self, strict: bool = True) -> None:
        """Gates, kinds and costs of the model as it is; strict: each pattern must name a gate."""
        self._modules = list(self.model.modules())
        gates = gate_modules(self.model)
        self._kinds = kinds_of(self.model, Wish(self.keep, self.cost, self._input_shape), strict)
        self._names = {gate: name for gate, (name, _) in named_gates(self.model).items()}
        self._gates = [gate for kind in self._kinds for gate in kind.gates]
        self._dists = [(gate, gate.dist) for gate in self._gates]
        self._others = [gate for gate in gates if gate not in set(self._gates)]
        self._projection = Projection([kind.of for kind in self._kinds], self.ramp * self.steps)
        self._closing = Closing(self._names)

    def _dtype(self) -> torch.dtype:
        doubles = [gate.log_alpha.dtype == torch.float64 for gate in self._gates]
        return torch.float64 if any(doubles) else torch.float32

    def _current(self) -> list[Tensor] | None:
        """The log_alphas; None where gates were frozen, moved, or got another dtype or distribution."""
        found: list[Tensor] = []
        for gate, known in self._dists:
            if gate.frozen or gate.dist is not known:
                return None
            # without the search of Module.__getattr__, which takes as long as all checks of a tensor
            log_alpha = gate._parameters.get("log_alpha")
            found.append(gate.log_alpha if log_alpha is None else log_alpha)
        first, moment = found[0], self._state.moment
        if first.get_device() != moment.get_device() or (
            first.dtype is not moment.dtype and self._dtype() is not moment.dtype
        ):
            return None
        return found

    def _has_other_modules(self) -> bool:
        modules = list(self.model.modules())
        return len(modules) != len(self._modules) or any(map(_are_two, modules, self._modules))

    def refresh(self) -> None:
        """Reads gates and cost off the model anew, now. What is known of gates that are still there stays.

        Raises:
            ValueError: as for a new budget, but for a share that is out of reach.
        """
        if not gate_modules(self.model):  # the last ones are frozen: all that is left is to be read
            self._gates, self._others, self._dists = [], [], []
            return
        moments = self._moments()
        self._read_model(strict=False)
        device, dtype = self._gates[0].log_alpha.device, self._dtype()
        zeros = {gate: torch.zeros(gate.n) for gate in self._gates if gate not in moments}
        moment = torch.cat([(moments | zeros)[gate].to(device, dtype) for gate in self._gates])
        self._state = State(moment, *(value.to(device) for value in self._state[1:]))

    def _moments(self) -> dict[HardConcreteGate, Tensor]:
        gates = [gate for kind in self._kinds for gate in kind.gates]
        return dict(zip(gates, self._state.moment.split([gate.n for gate in gates]), strict=True))

    # ---- the step

    def attach(
        self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
    ) -> RemovableHandle:
        """Has each step of `optimizer` end with :meth:`step`, which clamps, too.

        Every 64 steps it looks for layers whose evaluation gates are all closed, and warns as
        :func:`clamp_after_step` does. Optimisers neither copy nor save hooks: after ``deepcopy`` or
        unpickling, attach again.

        Args:
            optimizer: has the gates that train among its parameters. Of a wrapper (accelerate's, say) the
                one within.
            group: the ranks that train these gates together; None: all.

        Returns:
            The handle; its ``remove()`` ends it.

        Raises:
            TypeError: no optimizer of torch.
            ValueError: one that lacks a gate's log_alpha.
            RuntimeError: the budget is attached already.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self._handle is not None and self._handle.id in (self._handle.hooks_dict_ref() or ()):
            raise RuntimeError("budget is attached to an optimizer already: remove() that handle first")
        has = {id(parameter) for of in optimizer.param_groups for parameter in of["params"]}
        lacking = [
            gate for gate in self._gates if gate.log_alpha.requires_grad and id(gate.log_alpha) not in has
        ]
        if lacking:
            names = ", ".join(self._names[gate] for gate in lacking[:4])
            more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
            raise ValueError(
                f"optimizer must train the gates of the budget, but lacks the log_alpha of {names}{more}: "
                "make it of l0kernels.nn.parameter_groups(model)"
            )
        self._group = group
        self._handle = optimizer.register_step_post_hook(self._after_step)
        return self._handle

    def _after_step(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            from .uncompiled import uncompiled

            uncompiled(self.step)
        else:
            self.step()

    def step(self) -> None:
        """What ends a step of the optimiser, with the gates' gradients at hand: for loops without hooks."""
        self._count += 1
        log_alphas = self._current() if self._gates else []
        looks = self._count % LOOK_EVERY == 0 and not _is_capturing(self._state.moment.device)
        if log_alphas is None or (looks and self._has_other_modules()):
            self.refresh()
            log_alphas = [gate.log_alpha for gate in self._gates]
        if log_alphas:
            self._projection(log_alphas, [log_alpha.grad for log_alpha in log_alphas], self._state)
        if self._others:
            clamp(self._others, LIMIT)
        if looks:
            self._agree()
        self._closing.step()

    @torch.no_grad()
    def _agree(self) -> None:
        """All ranks take gates and state of the first one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) < 2:
            return
        gates = [gate.log_alpha for gate in [*self._gates, *self._others]]
        values = [*gates, *self._state]
        joined = torch.cat([value.detach().flatten().double() for value in values])
        first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.broadcast(joined, first, self._group)
        for value, part in zip(values, joined.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view(value.shape))

    # ---- what can be read

    def _shares(self, x: Callable[[GateKind], Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.stack([kind.of.share(x(kind)) for kind in self._kinds])

    def _expected(self, kind: GateKind) -> Tensor:
        return kind.of.kept(torch.cat([gate.log_alpha.detach().flatten() for gate in kind.gates]))

    def _evaluated(self, kind: GateKind) -> Tensor:
        return torch.cat([gate.eval_gates().z != 0 for gate in kind.gates]).double()

    def _told(self, values: Tensor) -> Any:
        """A number, or one for each pattern; on a GPU this waits for it."""
        numbers = {kind.name: number for kind, number in zip(self._kinds, values.tolist(), strict=True)}
        return numbers if isinstance(self.keep, Mapping) else numbers[WHOLE]

    @property
    def mu(self) -> float | dict[str, float]:
        """The price of the cost in the last step; 0: the budget was met."""
        return self._told(self._state.price[[kind.of.number for kind in self._kinds]])

    @property
    def target(self) -> float | dict[str, float]:
        """B_t: what was asked for in the last step."""
        first, step, ramp_steps = self._state.first, self._state.step, self.ramp * self.steps
        kinds = [kind.of for kind in self._kinds]
        target_at = reference.budget.target_at
        return self._told(torch.stack([target_at(first[k.number], k.keep, step, ramp_steps) for k in kinds]))

    @property
    def expected(self) -> float | dict[str, float]:
        """c: the share of the cost that the gates leave, by how open they can be."""
        return self._told(self._shares(self._expected))

    @property
    def deterministic(self) -> float | dict[str, float]:
        """The share of the cost that the evaluation gates leave: what `eval()` and `export` have."""
        return self._told(self._shares(self._evaluated))

    @property
    def count(self) -> int:
        """t: the steps so far, without those that were skipped."""
        return int(self._state.step)

    @property
    def skipped(self) -> int:
        """Steps that were skipped, for a gradient or a log_alpha that was not finite."""
        return int(self._state.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a training that resumes needs to go on bit for bit, beside gates and optimiser."""
        moments = {self._names[gate]: moment.clone() for gate, moment in self._moments().items()}
        others = {name: value.clone() for name, value in self._state._asdict().items() if name != "moment"}
        return {"moment": moments, **others, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, of a budget for a model with the same gates.

        Raises:
            ValueError: other gates, or another number of kinds.
        """
        sizes = {self._names[gate]: gate.n for kind in self._kinds for gate in kind.gates}
        got = {name: len(part) for name, part in state["moment"].items()}
        if got != sizes:
            raise ValueError(f"state must be of the gates {sizes}, got {got}")
        if state["price"].shape != self._state.price.shape:
            raise ValueError(f"state must hold {len(self._state.price)} prices, got {len(state['price'])}")
        moment = torch.cat([state["moment"][name] for name in sizes])
        for name, value in self._state._asdict().items():
            value.copy_(moment if name == "moment" else state[name])
        self._count = state["count"]

    def __repr__(self) -> str:
        cost = self.cost if isinstance(self.cost, str) else getattr(self.cost, "__name__", "a function")
        return f"Budget(keep={self.keep!r}, cost={cost!r}, steps={self.steps}, ramp={self.ramp})"


def _are_two(a: nn.Module, b: nn.Module) -> bool:
    return a is not b


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
