"""The module that owns log_alpha: draws while training, gives the evaluation gate otherwise."""

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from .. import _checks
from .._gates import DEFAULT_DIST, EVAL_MODES, Gates, HardConcrete
from ..gates import Draw, attach, eval_gates, sample_gates
from ..penalty import L2Term
from . import ranks


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

    On the ranks of a process group a gate draws alike, from a seed that they agree on at the first draw;
    :func:`independent_gates_` asks for draws of each rank's own. :func:`agree_on_gates` says more.

    log_alpha stays fp32 under ``.half()`` and ``.to(torch.bfloat16)``, whose rounding would swallow its
    updates; ``.double()`` is obeyed.

    Args:
        n: number of gates, or a shape (weight and block gates keep log_alpha in the shape of what they gate).
        droprate_init: d in (0, 1); log_alpha ~ N(log(1 - d) - log d, 0.01). It is *not* P(z = 0), which is
            .168 at .5.
        lam: the paper's lambda, >= 0: the price of every parameter that an open gate keeps, where the
            objective is a mean loss plus ``penalty(model) / N`` over N training examples. 0.1 is the paper's
            for its fully connected net (section 4.1). An attribute that a schedule may assign, also between
            the calls of a compiled step, which takes it without compiling anew.
        eval_mode: "paper", "median" or "topk", see :func:`l0kernels.eval_gates`.
        dist: the constants of the distribution.
        device, dtype: of log_alpha; a dtype below fp32 means fp32.

    Raises:
        ValueError: an argument out of its range.
        TypeError: n is not an int or a sequence of ints.
    """

    n: int
    frozen: bool = False
    """Whether it gives the evaluation gate in train(), too, as in exported models; see :meth:`freeze_`."""
    independent: bool = False
    """Whether each rank of a process group draws for itself; a plain attribute."""
    lam_tensor: Tensor
    """lam, (), float64, on the device of log_alpha: an input of compiled graphs, a number is a constant."""
    shared: bool = False
    """Whether a layer was handed it, so that another one may have it, too."""
    kind: str | None = None
    """Of a model that gate_ has gated: what its units are, see :class:`UnitGraph`."""
    searches: int = 0
    """How often it was looked for in what led to a draw of it, see `notices`."""
    _drawn: Gates | Tensor | None = None
    """Of a GateBank: the detached gates or, where they are not kept, their seed; never copied or saved."""
    _threads: "_Threads | None" = None
    """The draws of each thread, once they differ."""
    _reducer: ranks.Reducer | None = None
    """What :func:`keep_gates_whole` has set up."""

    def __init__(
        self,
        n: int | Sequence[int],
        *,
        droprate_init: float = 0.5,
        lam: float = 0.1,
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
        self._stand_in_the_way()

    def freeze_(self) -> "HardConcreteGate":
        """Makes it its evaluation gate for good: log_alpha becomes a buffer, and train() changes nothing."""
        self.frozen = True
        log_alpha = self._parameters.pop("log_alpha", None)
        if log_alpha is not None:
            self.register_buffer("log_alpha", log_alpha.detach())
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "HardConcreteGate":
        """As of every module, but a frozen gate stays in eval()."""
        return super().train(mode and not self.frozen)

    def _stand_in_the_way(self) -> None:
        """Of modules of torch that read a layer's weight instead of calling it."""
        if leaves_no_fast_path not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(leaves_no_fast_path)
        watch_attention()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_in_the_way()

    def reset_parameters(self) -> None:
        """log_alpha ~ N(log(1 - d) - log d, 0.01)."""
        nn.init.normal_(self.log_alpha, math.log(1 - self.droprate_init) - math.log(self.droprate_init), 0.01)
        if self._reducer is not None:
            self._reducer.share_(self.log_alpha)

    def forward(self) -> Gates:
        """Gates with z of shape (n,): drawn with the gradient to log_alpha in train(), detached in eval()."""
        if not self.training:
            return self.eval_gates()
        drawn = self._held
        if drawn is not None:
            _checks.refuse_traced_draw()
        if isinstance(drawn, Gates):
            return attach(self.gathered().flatten(), drawn, self.dist)
        if self.shared and not torch.compiler.is_compiling():
            self.__dict__["_last_draw"] = (weakref.ref(self), None, 0)
        return sample_gates(self.gathered().flatten(), seed=self.fresh_seed(), dist=self.dist)

    @property
    def _held(self) -> Gates | Tensor | None:
        """What a GateBank has drawn, in this thread if it has drawn in several."""
        return self._drawn if self._threads is None else self._threads.find(self._drawn)

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
        drawn = self._held
        if not isinstance(drawn, Tensor):
            return None
        _checks.refuse_traced_draw()
        return drawn

    @property
    def drawn(self) -> Gates | None:
        """The gates that a GateBank has drawn, detached; a call of the module connects them to log_alpha."""
        drawn = self._held
        if not isinstance(drawn, Gates):
            return None
        _checks.refuse_traced_draw()
        return drawn

    @property
    def draws(self) -> bool:
        """Whether a forward draws anew: in train(), and no GateBank has drawn."""
        return self.training and self._held is None

    def fresh_seed(self) -> Tensor | None:
        """The seed of a draw: a GateBank's, else the ranks', else None for torch's default generator."""
        drawn = self.seed
        if drawn is not None:
            return drawn
        if self.independent or not ranks.are_several():
            return None
        return ranks.fresh_seed(self.log_alpha.device)

    def draws_as(self, other: "HardConcreteGate") -> bool:
        """Whether both may be drawn in one call: of one distribution and dtype, alike or not on all ranks."""
        if self is other:
            return True
        one_dist = self.dist is other.dist or self.dist == other.dist  # comparing them takes 1 us
        alike = one_dist and self.independent == other.independent
        return alike and self.log_alpha.dtype is other.log_alpha.dtype

    def eval_gates(self) -> Gates:
        """The evaluation gate, whatever the mode of the module; detached."""
        if not (self.frozen and _checks.readable()) or self.log_alpha.is_inference():
            return eval_gates(self.whole().detach().flatten(), self.eval_mode, dist=self.dist)
        # A frozen gate stays what it is until somebody writes into log_alpha.
        # Tensors made in inference mode are for that alone.
        key = self.log_alpha, self.log_alpha._version, self.eval_mode, torch.is_inference_mode_enabled()
        made, gates = self.__dict__.get("_made", (None, None))
        if gates is None or made[0] is not key[0] or made[1:] != key[1:]:
            gates = eval_gates(self.whole().detach().flatten(), self.eval_mode, dist=self.dist)
            self.__dict__["_made"] = key, gates
        return gates

    def gathered(self) -> Tensor:
        """log_alpha as a forward that trains it reads it: this rank has all of it.

        Raises:
            RuntimeError: it is sharded, and nobody has gathered it for this forward.
        """
        log_alpha: Tensor = self.log_alpha
        if ranks.is_sharded(log_alpha):
            raise RuntimeError(
                f"log_alpha of {self} must be whole where it is drawn, got a sharded DTensor: shard the "
                "container that draws it as one, or keep gates whole: "
                "fully_shard(model, ignored_params=l0kernels.nn.keep_gates_whole(model))"
            )
        return self.whole()

    def whole(self) -> Tensor:
        """log_alpha as a plain tensor of all gates, outside a forward: gathered from the ranks if sharded.

        The gradient is that of a value which all ranks compute alike.

        Raises:
            RuntimeError: it is a shard of FullyShardedDataParallel, which only a forward gathers.
        """
        log_alpha: Tensor = self.log_alpha
        if type(log_alpha) is nn.Parameter and log_alpha.numel() == self.n:
            return log_alpha
        log_alpha = ranks.whole(log_alpha)
        if log_alpha.numel() != self.n or ranks.is_released(log_alpha):
            raise RuntimeError(
                f"log_alpha must hold the n={self.n} gates of {type(self).__name__}, got "
                f"{log_alpha.numel()} elements, or none with memory. If you have resized it, set n, too. "
                "FullyShardedDataParallel flattens and shards it, and gathers it within a forward only: keep "
                "gates whole, as in "
                "FullyShardedDataParallel(model, use_orig_params=True, "
                "ignored_states=l0kernels.nn.keep_gates_whole(model))"
            )
        return log_alpha

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

        before = self.log_alpha
        super()._apply(keep_precision, recurse)
        if self._reducer is not None and self.log_alpha is not before:
            self._reducer.watch(self.log_alpha)
        for name in OF_A_DRAW:  # it may be on another device
            self.__dict__.pop(name, None)
        self.lam = self.lam
        return self

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*OF_A_DRAW, "_reducer")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}


OF_A_DRAW = ("_drawn", "_drawer", "_last_draw", "_threads", "_made")


class _Thread:
    """Stands for a thread, and lives as long."""


_this = threading.local()


def _thread() -> _Thread:
    try:
        return _this.thread
    except AttributeError:
        _this.thread = _Thread()
        return _this.thread


class _Threads:
    """What a gate holds in each thread: within a Draw as a context that one's, else what it drew last.

    Threads that have drawn nothing, autograd's own among them, go by the latest draw of all.
    """

    def __init__(self) -> None:
        self.within: weakref.WeakKeyDictionary[_Thread, Gates | Tensor | None] = weakref.WeakKeyDictionary()
        self.drew: weakref.WeakKeyDictionary[_Thread, Gates | Tensor | None] = weakref.WeakKeyDictionary()

    def find(self, latest: Gates | Tensor | None) -> Gates | Tensor | None:
        thread = _thread()
        return self.within.get(thread, self.drew.get(thread, latest))


def leaves_no_fast_path(gate: nn.Module, args: Any) -> None:
    """Does nothing, as a hook of each gate.

    In eval() without gradients torch.nn.TransformerEncoderLayer hands the weights of its layers to one fused
    kernel, and calls no layer, unless a module in it has hooks: with this one, the gates in it act.
    """


def set_drawn(gate: HardConcreteGate, drawn: Gates | Tensor | None) -> None:
    """What a GateBank has drawn, or None; not through Module.__setattr__, which looks into five tables."""
    state = gate.__dict__
    if torch.compiler.is_compiling():
        state["_drawn"] = drawn
        return
    thread = _thread()
    with ranks.lock:
        threads, drawer = state.get("_threads"), state.get("_drawer", thread)
        if threads is not None or drawer is not thread:
            threads = _Threads() if threads is None else threads
            threads.drew.setdefault(drawer, state.get("_drawn"))
            threads.drew[thread] = drawn
            state["_threads"] = threads
        state["_drawer"], state["_drawn"] = thread, drawn


def enter(gate: HardConcreteGate, drawn: Gates | Tensor | None) -> list[Gates | Tensor | None]:
    """Has `gate` hold `drawn` in this thread; returns what :func:`leave` needs."""
    if torch.compiler.is_compiling():
        before = [gate._drawn]
        gate.__dict__["_drawn"] = drawn
        return before
    with ranks.lock:
        threads = gate.__dict__.setdefault("_threads", _Threads())
        before = [threads.within[_thread()]] if _thread() in threads.within else []
        threads.within[_thread()] = drawn
    return before


def leave(gate: HardConcreteGate, before: list[Gates | Tensor | None]) -> None:
    """Has `gate` hold what it held before :func:`enter`."""
    if torch.compiler.is_compiling():
        gate.__dict__["_drawn"] = before[0]
        return
    with ranks.lock:
        threads = gate._threads
        if threads is None:  # the gate has moved meanwhile
            return
        if before:
            threads.within[_thread()] = before[0]
        else:
            threads.within.pop(_thread(), None)
            if not threads.within and not threads.drew:
                del gate.__dict__["_threads"]


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


def refuse_bypassed(attention: nn.Module, args: Any = None) -> None:
    """ValueError if torch's attention has a gated out_proj, whose weight it reads without calling it."""
    layer = attention._modules.get("out_proj")
    forward = type(attention).forward
    code = None if forward is nn.MultiheadAttention.forward else getattr(forward, "__code__", None)
    names = () if code is None else code.co_names
    # What calls torch's forward has the weight read there, whatever else it does.
    calls = "out_proj" in names and not ("super" in names and "forward" in names)
    if calls or layer is None or not _gates_in_forward(layer):
        return
    raise ValueError(
        f"out_proj of {type(attention).__name__} must be a plain torch.nn.Linear, got {layer}: torch's "
        "attention reads the weight of out_proj and never calls the layer, so its gates would not act. Gate "
        "the layers behind it, or write the attention with F.scaled_dot_product_attention"
    )


def _gates_in_forward(layer: nn.Module) -> bool:
    """Whether gates in `layer` act where it is called; those of a parametrization act where it is read."""
    return isinstance(layer, HardConcreteGate) or any(
        _gates_in_forward(child) for name, child in layer.named_children() if name != "parametrizations"
    )


def _watch_attention(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Has an attention that is given a gated out_proj refuse it at the first forward."""
    # Dynamo assigns modules while it traces, of which it cannot trace the kind.
    if torch.compiler.is_compiling() or not isinstance(module, nn.MultiheadAttention):
        return
    gated = child is not None and _gates_in_forward(child)
    if gated and refuse_bypassed not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(refuse_bypassed)


_watching: list[RemovableHandle] = []


def watch_attention() -> None:
    """From the first gate on, looks at each assignment of a module: nothing else sees where a layer goes."""
    if not _watching:
        _watching.append(register_module_module_registration_hook(_watch_attention))


def draw(gates: Sequence[HardConcreteGate | None]) -> list[Gates | None]:
    """Draws each distinct gate once, those that draw in one `sample_gates` call (one per kind of draw).

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
            group = [gate for gate in pending if gate.draws and gate.draws_as(first)]
            samples = sample_gates(
                [gate.gathered() for gate in group], seed=first.fresh_seed(), dist=first.dist
            )
        else:
            group, samples = [first], [first.forward()]
        if len(group) == len(gates):
            return [*samples]
        drawn.update(zip(group, samples, strict=True))
        pending = [gate for gate in pending if gate not in drawn]
    return [None if gate is None else drawn[gate] for gate in gates]


Sources = list[Gates | Draw | None]


def sources_of(
    gates: Sequence[HardConcreteGate | None],
) -> tuple[Sources, Tensor | None, HardConcrete]:
    """Where the gates of one layer or chain come from: its sources, the seed of a draw, the distribution.

    Gates that train are Draws, so that one autograd node has gates and product, where one call draws them
    all, or a GateBank has drawn them all. The others are those of :func:`draw`.
    """
    held = [gate.drawn if gate is not None and gate.training else None for gate in gates]
    sources = draws_of(gates, held)
    if sources is None:
        return [*draw(gates)], None, DEFAULT_DIST
    first = next(gate for gate in gates if gate is not None)
    return [*sources], None if any(held) else first.fresh_seed(), first.dist


def draws_of(
    gates: Sequence[HardConcreteGate | None], held: Sequence[Gates | None]
) -> list[Draw | None] | None:
    """Gates that train as sources of one call, with what has been drawn for all of them or for none; None
    where they are of several kinds of draw, some are drawn, or one that is not comes twice."""
    present = [gate for gate in gates if gate is not None]
    n = len(held) - held.count(None)
    if n != len(present) and (n or len(set(present)) != len(present)):
        return None
    if not present or not all(gate.training and gate.draws_as(present[0]) for gate in present):
        return None
    pairs = zip(gates, held, strict=True)
    return [None if gate is None else Draw(gate.log_alpha, drawn) for gate, drawn in pairs]


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer has gates of its own, all of them frozen."""
    gates = [part for part in layer._modules.values() if isinstance(part, HardConcreteGate)]
    return bool(gates) and all(gate.frozen for gate in gates)


def gate_modules(model: nn.Module) -> list[HardConcreteGate]:
    """Every gate of the model once, in the order of ``model.modules()``; frozen ones are left out.

    Raises:
        ValueError: a gated layer is where torch reads its weight instead of calling it.
    """
    gates = []
    for module in model.modules():
        if isinstance(module, HardConcreteGate):
            if not module.frozen:
                gates.append(module)
        elif isinstance(module, nn.MultiheadAttention):
            refuse_bypassed(module)
    return gates


def _as_tensor(value: float, device: torch.device) -> Tensor:
    _checks.check_number("lam", value)
    number = value if torch.compiler.is_compiling() else float(value)
    return torch.ones((), dtype=torch.float64, device=device).mul_(number)  # full would compile to a constant


def _gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
