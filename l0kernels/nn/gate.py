"""The module that owns log_alpha: draws while training, gives the evaluation gate otherwise."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..gates import Gates, HardConcrete, attach, eval_gates, sample_gates
from ..penalty import L2Term
from ..reference import _checks

EVAL_MODES = ("paper", "median", "topk")
DEFAULT_DIST = HardConcrete()


class Unscriptable:
    """Mixin of the modules that torch.jit.script does not understand."""

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: its operations are no TorchScript; "
            "script what l0kernels.nn.export returns, trace the model in eval(), or use torch.export"
        )


class HardConcreteGate(Unscriptable, nn.Module):
    r"""A vector of hard-concrete gates (Louizos, Welling, Kingma, ICLR 2018, eq. 10-13).

    ``gate()`` draws in ``train()`` and returns the evaluation gate in ``eval()``. Every call in ``train()``
    draws anew, so layers that share a gate must be handed one draw::

        gates = shared()
        y = second(first(x, out_gates=gates), in_gates=gates)

    unless a :class:`GateBank` has drawn them: then every call returns its draw.

    log_alpha stays fp32 under ``.half()`` and ``.to(torch.bfloat16)``, whose rounding would swallow its
    updates; ``.double()`` is obeyed.

    Args:
        n: number of gates, or a shape (weight and block gates keep log_alpha in the shape of what they gate).
        droprate_init: d in (0, 1); log_alpha ~ N(log(1 - d) - log d, 0.01). It is *not* P(z = 0), which is
            .168 at .5.
        lam: weight of these gates in :func:`penalty`, >= 0; an attribute that a schedule may assign, also
            between the calls of a compiled step, which takes it without compiling anew.
        eval_mode: "paper", "median" or "topk", see :func:`l0kernels.eval_gates`.
        dist: the constants of the distribution.
        device, dtype: of log_alpha; a dtype below fp32 means fp32.

    Raises:
        ValueError: an argument out of its range.
        TypeError: n is not an int or a sequence of ints.
    """

    n: int
    lam_tensor: Tensor
    """lam, (), float64, on the device of log_alpha: an input of compiled graphs, a number is a constant."""

    _drawn: Gates | Tensor | None = None
    """Of a GateBank: the detached gates or, where they are not kept, their seed; never copied or saved."""

    def __init__(
        self,
        n: int | Sequence[int],
        *,
        droprate_init: float = 0.5,
        lam: float = 1.0,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = tuple(n) if isinstance(n, Sequence) else (n,)
        if not shape or not all(isinstance(size, int) for size in shape):
            raise TypeError(f"n must be an int or a sequence of ints, got {n!r}")
        if min(shape) < 1:
            raise ValueError(f"n must be positive, got {n!r}")
        if not 0 < droprate_init < 1:
            raise ValueError(f"droprate_init must lie in (0, 1), got {droprate_init!r}")
        if not 0 <= lam < math.inf:
            raise ValueError(f"lam must be finite and >= 0, got {lam!r}")
        if eval_mode not in EVAL_MODES:
            raise ValueError(f"eval_mode must be one of {EVAL_MODES}, got {eval_mode!r}")
        self.n = math.prod(shape)
        self.droprate_init = droprate_init
        self.eval_mode = eval_mode
        self.dist = dist
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.log_alpha = nn.Parameter(torch.empty(shape, device=device, dtype=_gate_dtype(dtype)))
        self.lam = lam
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """log_alpha ~ N(log(1 - d) - log d, 0.01)."""
        nn.init.normal_(self.log_alpha, math.log(1 - self.droprate_init) - math.log(self.droprate_init), 0.01)

    def forward(self) -> Gates:
        """Gates with z of shape (n,): drawn with the gradient to log_alpha in train(), detached in eval()."""
        if not self.training:
            return self.eval_gates()
        drawn = self._drawn
        if drawn is not None:
            _checks.refuse_traced_draw()
        if isinstance(drawn, Gates):
            return attach(self.log_alpha.flatten(), drawn, self.dist)
        return sample_gates(self.log_alpha.flatten(), seed=drawn, dist=self.dist)

    @property
    def lam(self) -> float:
        """The weight of these gates in :func:`penalty`."""
        return self.__dict__["lam"]

    @lam.setter
    def lam(self, value: float) -> None:
        self.__dict__["lam"] = value
        self.__dict__["lam_tensor"] = _as_tensor(value, self.log_alpha.device)

    @property
    def seed(self) -> Tensor | None:
        """(1,) int64: what a GateBank has drawn for a gate per weight, which keeps no z."""
        if not isinstance(self._drawn, Tensor):
            return None
        _checks.refuse_traced_draw()
        return self._drawn

    @property
    def drawn(self) -> Gates | None:
        """The gates that a GateBank has drawn, detached; a call of the module connects them to log_alpha."""
        if not isinstance(self._drawn, Gates):
            return None
        _checks.refuse_traced_draw()
        return self._drawn

    @property
    def draws(self) -> bool:
        """Whether a forward draws anew: in train(), and no GateBank has drawn."""
        return self.training and self._drawn is None

    def eval_gates(self) -> Gates:
        """The evaluation gate, whatever the mode of the module; detached."""
        return eval_gates(self.log_alpha.flatten(), self.eval_mode, dist=self.dist)

    def extra_repr(self) -> str:
        shape = tuple(self.log_alpha.shape)
        dist = "" if self.dist == DEFAULT_DIST else f", dist={self.dist}"
        return (
            f"{shape[0] if len(shape) == 1 else shape}, droprate_init={self.droprate_init}, lam={self.lam}, "
            f"eval_mode={self.eval_mode!r}{dist}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HardConcreteGate":
        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype == _gate_dtype(applied.dtype):
                return applied
            return tensor.to(applied.device, torch.float32)  # from the source: `applied` is rounded already

        super()._apply(keep_precision, recurse)
        set_drawn(self, None)  # it may be on another device
        self.lam = self.lam
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_drawn"}


def set_drawn(gate: HardConcreteGate, drawn: Gates | Tensor | None) -> None:
    """What a GateBank has drawn, or None; not through Module.__setattr__, which looks into five tables."""
    gate.__dict__["_drawn"] = drawn


class GatedLayer(Unscriptable):
    """Mixin of the layers that own gates: what :func:`penalty` asks of them."""

    def gate_groups(self) -> Iterator[tuple[HardConcreteGate, Tensor, int]]:
        """(gate, log_alpha or a part of it, |g|: the parameters that one gate of that part closes)."""
        raise NotImplementedError

    def l2_terms(self) -> Iterator[tuple[HardConcrete, L2Term]]:
        """The gated parameters with their gates, and the distribution of those."""
        raise NotImplementedError

    def l2_rest(self, weight_decay: float) -> Tensor | None:
        """What the terms miss of weight_decay/2 * sum over the gated parameters of P(open) * theta^2."""
        return None


def draw(gates: Sequence[HardConcreteGate | None]) -> list[Gates | None]:
    """Draws each distinct gate once, those that draw in one `sample_gates` call (one per distribution).

    Args:
        gates: None stands for "ungated" and stays None. The stream of a gate is its position among the
            gates drawn with it.

    Returns:
        The drawn gates, those that a GateBank has drawn and, of those in eval(), the evaluation gates.
    """
    pending = list(dict.fromkeys([gate for gate in gates if gate is not None]))
    drawn: dict[HardConcreteGate, Gates] = {}
    while pending:
        first = pending[0]
        if first.draws:
            group = [gate for gate in pending if gate.draws and gate.dist == first.dist]
            samples = sample_gates([gate.log_alpha for gate in group], dist=first.dist)
        else:
            group, samples = [first], [first.forward()]
        if len(group) == len(gates):
            return [*samples]
        drawn.update(zip(group, samples, strict=True))
        pending = [gate for gate in pending if gate not in drawn]
    return [None if gate is None else drawn[gate] for gate in gates]


def gate_modules(model: nn.Module) -> list[HardConcreteGate]:
    """Every gate of the model once, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, HardConcreteGate)]


def _as_tensor(value: float, device: torch.device) -> Tensor:
    _checks.check_number("lam", value)
    number = value if torch.compiler.is_compiling() else float(value)
    return torch.ones((), dtype=torch.float64, device=device).mul_(number)  # full would compile to a constant


def _gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
