"""Every gate of a model drawn in one call, before the forward."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, _ops
from .._compat import functorch_active
from ..gates import Gates, sample_gates, sample_with_expected
from . import ranks
from .gate import HardConcreteGate, enter, gate_modules, leave, set_drawn
from .linear import L0Linear
from .notices import forget_bank, note_entered, watch_bank
from .ranks import KEY_STEP


class Draw:
    """One draw of a :class:`GateBank`; as a context, the gates of its model are those of this draw again, for
    the thread that enters it.

    A checkpointed forward needs it if the next draw comes before its backward: recomputation asks the gates
    anew, and would get those of the later draw::

        def run(draw, x):
            with draw:
                return layers(x)

        y = checkpoint(run, bank.draw(), x, use_reentrant=False)

    In a compiled graph the gates of a region are those of its forward in any case, and with fullgraph=True
    Dynamo takes no ``with draw:`` inside of a checkpointed region: call the layers without it there.

    Attributes:
        expected: gate -> sum_g P(z_g > 0), a 0-d tensor, of a draw with ``expected=True``; else None.
    """

    def __init__(
        self,
        drawn: Mapping[HardConcreteGate, Gates | Tensor | None],
        expected: dict[HardConcreteGate, Tensor] | None = None,
    ) -> None:
        self.expected = expected
        self._drawn = drawn
        self._before: dict[int, list[list[list[Gates | Tensor | None]]]] = {}

    def __enter__(self) -> "Draw":
        if not torch.compiler.is_compiling():
            note_entered()
        held = [enter(gate, drawn) for gate, drawn in self._drawn.items()]
        self._before.setdefault(_thread_number(), []).append(held)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gate, held in zip(self._drawn, self._before[_thread_number()].pop(), strict=True):
            leave(gate, held)

    def _set(self) -> None:
        for gate, value in self._drawn.items():
            set_drawn(gate, value)


def _thread_number() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class GateBank(nn.Module):
    r"""Draws every gate of a model in one launch.

    ::

        bank = GateBank(model)
        for x, target in batches:
            bank.draw()
            loss = criterion(model(x), target) + penalty(model) / N  # N training examples

    A draw holds until the next one, until :meth:`clear`, or until the model moves to another device or dtype.
    Every forward in between has its gates, recomputation under ``torch.utils.checkpoint`` included (a
    recomputation after the next draw needs :class:`Draw`), and layers that share a gate agree on it. The z,
    index and count that were drawn stay detached on the gates; each call of a gate connects them to log_alpha
    by a node of its own, so several forwards may be in flight. A gate per weight keeps no z but the seed from
    which its layer draws. Gates in ``eval()`` are neither drawn nor affected. Copies and state_dicts of a
    model carry nothing of a draw. Nothing syncs with the host, and the step is counted on the device: a
    captured graph draws anew at each replay.

    The seed of draw t is ``seed + KEY_STEP * t`` modulo 2**64 with t = step + rank * 2**40; each call of
    sample_gates and each layer with gates per weight is one draw. The state_dict holds seed and step; with
    them the draws continue where they were. Processes with the same seed, step and rank draw the same gates,
    however often each of them has drawn elsewhere: without a seed of their own the ranks of a process group
    agree on one. Give ``rank=torch.distributed.get_rank()`` if all gates shall differ from rank to rank;
    those of :func:`independent_gates_` do anyway.

    Several threads may draw from one bank: each goes by its own last draw, and a thread that has drawn
    nothing, as those of autograd, by the latest of all.

    Args:
        model: any module; the bank serves the gates that it has now.
        seed: in [0, 2**63), or None for one from torch's default generator; on the ranks of a process group
            the n-th bank without a seed has the same on each.
        rank: in [0, 2**23).

    Raises:
        ValueError: no gate in the model, seed or rank out of range.
        TypeError: seed or rank is not an int.
    """

    seed: Tensor
    step: Tensor
    _alone: bool = False
    """Whether the seed was drawn before there was a process group to agree on it."""
    _cleared: bool = False
    """Whether clear() was called."""

    def __init__(self, model: nn.Module, *, seed: int | None = None, rank: int = 0) -> None:
        super().__init__()
        gates = gate_modules(model)
        layers = [module for module in model.modules() if isinstance(module, L0Linear)]
        per_weight = {layer.weight_gate for layer in layers if layer.gate == "weight"}
        if not gates:
            raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
        if seed is not None:
            _checks.check_count("seed", seed, 0, 2**63)
        _checks.check_count("rank", rank, 0, 2**23)
        device = gates[0].log_alpha.device
        if device.type == "meta":  # which would forget them; a draw brings them to where the gates are then
            device = torch.device("cpu")
        if seed is None:
            seed = ranks.bank_seed()
        self._alone = seed is None
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (1,), device="cpu"))
        self.register_buffer("seed", torch.tensor([seed], device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))
        self.rank = rank
        # In tuples they stay the model's modules.
        self._vectors = tuple(gate for gate in gates if gate not in per_weight)
        self._weights = tuple(gate for gate in gates if gate in per_weight)
        watch_bank(self)

    def draw(self, *, expected: bool = False) -> Draw:
        """Draws every gate in train(), in one call of sample_gates (one per device, dtype and distribution).

        Args:
            expected: whether the draw shall hold, for monitoring and schedules, the expected number of open
                gates, ``sum_g sigmoid(log_alpha_g - beta * log(-gamma / zeta))`` (arXiv 1712.01312, eq. 12),
                of each gate in train(), from the same pass. On its device, in the dtype of log_alpha, and of
                the log_alpha of the draw; it carries no gradient: that is :func:`penalty`'s.

        Returns:
            The draw, which is in force already; :class:`Draw` says what else it is good for.

        Raises:
            ValueError: a NaN in a log_alpha, on the CPU.
            RuntimeError: the gates are on the meta device, or sharded by FullyShardedDataParallel.
        """
        alike: dict[object, dict[HardConcreteGate, Tensor]] = {}
        for gate in self._vectors:
            if gate.training:
                log_alpha = gate.whole()
                kind = (log_alpha.device, log_alpha.dtype, gate.dist, gate.independent)
                alike.setdefault(kind, {})[gate] = log_alpha
        seeded = [gate for gate in self._weights if gate.training]
        drawn: dict[HardConcreteGate, Gates | Tensor | None] = dict.fromkeys(self._gates)
        sums: dict[HardConcreteGate, Tensor] = {}
        with torch.no_grad():
            keys = iter(self._keys(len(alike) + len(seeded)))
            for group in alike.values():
                log_alphas = [a if a.ndim == 1 else a.flatten() for a in group.values()]
                first = next(iter(group))
                key, dist = self._key_of(first, next(keys)), first.dist
                if expected:
                    gates, of_group = sample_with_expected(log_alphas, key, dist)
                    sums.update(zip(group, of_group, strict=True))
                else:
                    gates = sample_gates(log_alphas, seed=key, dist=dist)
                drawn.update(zip(group, gates, strict=True))
            for gate in seeded:
                drawn[gate] = self._key_of(gate, next(keys))
                if expected:
                    sums[gate] = gate.dist.p_open(gate.whole()).sum()
        result = Draw(drawn, sums if expected else None)
        result._set()
        return result

    @property
    def _gates(self) -> tuple[HardConcreteGate, ...]:
        return self._vectors + self._weights

    def clear(self) -> None:
        """Ends the draw: every gate draws for itself again."""
        for gate in self._gates:
            set_drawn(gate, None)
        if not torch.compiler.is_compiling():
            self._cleared = True

    def _keys(self, n: int) -> Sequence[Tensor]:
        """n fresh seeds, each (1,) int64 on the device."""
        if not n:
            return ()
        if functorch_active():
            raise RuntimeError(
                "a GateBank counts its draws, which no transform of torch.func may; draw outside"
            )
        device = self._gates[0].log_alpha.device
        if device.type == "meta":
            raise RuntimeError(
                "the gates are on the meta device and hold no values: model.to_empty(device=...), then "
                "load_state_dict or reset_parameters()"
            )
        if torch.compiler.is_compiling():
            if self._alone and ranks.are_several():
                raise RuntimeError(
                    "a GateBank made before the process group has a seed of this rank alone: make it after "
                    "init_process_group, give it a seed, or draw once before compiling"
                )
            return self._next_keys(n, device)
        with ranks.lock:
            if self._alone:
                seed = ranks.bank_seed()
                if seed is not None:
                    self.seed.fill_(seed)
                    self._alone = False
            return self._next_keys(n, device)

    def _key_of(self, gate: HardConcreteGate, key: Tensor) -> Tensor:
        """`key` for the draw of `gate`, on its device."""
        key = key.to(gate.log_alpha.device)
        if not gate.independent or self.rank:
            return key
        return key + ranks.signed(KEY_STEP * (ranks.rank() << 40))

    def _next_keys(self, n: int, device: torch.device) -> Sequence[Tensor]:
        if self.step.device != device:  # once: the model has moved since
            self.to(device)
        eager_cuda = device.type == "cuda" and not torch.compiler.is_compiling()
        if eager_cuda and torch.cuda.is_current_stream_capturing():
            forget_bank(self)  # replays draw, and nobody here sees them
        step, first = self.step, self.rank << 40
        if n > 1:
            step = step + torch.arange(first, first + n, device=device)
        elif first:
            step = step + first
        keys = _ops.kept_seed(torch.add(self.seed, step, alpha=KEY_STEP))
        self.step.add_(n)
        return keys.split(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GateBank":
        before = {"seed": self.seed, "step": self.step}
        super()._apply(fn, recurse)
        for name, value in before.items():  # to_empty and the meta device would lose them
            now = getattr(self, name)
            setattr(self, name, value if now.device.type == "meta" else value.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}seed" in state_dict:
            self._alone = False  # the ranks have loaded one

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.rank else ""
        return f"{len(self._gates)} gate(s), {sum(gate.n for gate in self._gates)} in all{rank}"
