"""What several processes agree on: the seeds of their draws, and which part of a parameter each one holds."""

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

KEY_STEP = 0x9E3779B97F4A7C15 - 2**64
"""Odd, so that 2**64 consecutive draws have 2**64 different keys; the golden ratio spreads them."""

REMEMBERED = 2**16
"""Draws whose recomputation is known again; 100 bytes each."""

_CAPTURED = 2**62
"""Where the draws of captured graphs begin, far from those that are counted on the host."""

_LIBRARY = torch.library.Library("l0kernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
lock = threading.RLock()
"""Held while draws are counted and handed to gates."""


def _after_fork() -> None:
    global lock
    lock = threading.RLock()  # a thread that the child does not have may hold the parent's


os.register_at_fork(after_in_child=_after_fork)


class _Agreement:
    """The seed that the ranks of a group have in common, and how many draws of it this one has made.

    A draw has a tag, from torch's default generator, which differs from rank to rank. A checkpoint puts the
    generator back before it recomputes, so that a draw within a backward shows the tag of the draw that it
    repeats, and gets the same key.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draws = 0
        self.recent: dict[int, int | Tensor] = {}
        self.captured: dict[torch.device, Tensor] = {}

    def key(self, tag: int, device: torch.device) -> Tensor:
        with lock:
            capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if torch._C._current_graph_task_id() != -1:
                found = self.recent.get(tag)
                if found is None:
                    raise RuntimeError(
                        "gates are drawn within a backward that no forward has drawn: a checkpoint must put "
                        "torch's generator back (preserve_rng_state=True, the default) to draw the same "
                        "gates again; or draw them before the forward, with l0kernels.nn.GateBank"
                    )
            elif capturing:
                found = self._captured(device)
            else:
                found = self.draws
                self.draws += 1
                if device.type == "cuda" and device not in self.captured:
                    self.captured[device] = self._at(_CAPTURED, device)
            self.recent[tag] = found
            if len(self.recent) > REMEMBERED:
                del self.recent[next(iter(self.recent))]
            return found if isinstance(found, Tensor) else self._at(found, device)

    def _captured(self, device: torch.device) -> Tensor:
        """A key that each replay of the graph finds advanced: there the device counts."""
        if device not in self.captured:
            raise RuntimeError(
                "gates are drawn on several ranks for the first time while a CUDA graph is captured: "
                "run the forward once before the capture"
            )
        key = self.captured[device].clone()
        self.captured[device].add_(KEY_STEP)
        return key

    def _at(self, position: int, device: torch.device) -> Tensor:
        value = signed(self.seed + KEY_STEP * position)
        with torch.inference_mode(False):
            return torch.full((1,), value, dtype=torch.int64, device=device)


def signed(value: int) -> int:
    """`value` modulo 2**64 as an int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


_agreements: Any = WeakIdKeyDictionary()
"""Process group -> _Agreement, or None where there can be none."""


def fresh_seed(device: torch.device, independent: bool = False) -> Tensor | None:
    """A seed for one draw, (1,) int64 on `device`, the same on all ranks of the default process group.

    None where torch's default generator shall draw the seed: without a process group, in a group of one
    process, and for `independent` gates.
    """
    if independent or not are_several():
        return None
    tag = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    return torch.ops.l0kernels.agreed_seed.default(tag, device)


def _agreed_seed(tag: Tensor, device: torch.device) -> Tensor:
    agreement = _agreement(int(tag))
    return tag.to(device) if agreement is None else agreement.key(int(tag), device)


# The tag is drawn in the graph and the key looked up by it: a compiled recomputation has the same tag again.
_LIBRARY.define("agreed_seed(Tensor tag, Device device) -> Tensor")
_LIBRARY.impl("agreed_seed", _agreed_seed, "CPU")
torch.library.register_fake(
    "l0kernels::agreed_seed", lambda tag, device: tag.new_empty(1, device=device), lib=_LIBRARY
)


def _agreement(proposal: int) -> _Agreement | None:
    group = dist.group.WORLD
    with lock:
        if group not in _agreements:
            agree(proposal)
        return _agreements[group]


def agree(proposal: int) -> None:
    """Starts an _Agreement on rank 0's proposal, by the group's store: no collective that could cross another."""
    store = None if dist.get_backend() == "fake" else dist.distributed_c10d._get_default_store()
    if store is None:
        warnings.warn(
            f"each rank draws gates of its own: the process group ({dist.get_backend()}) has no store on "
            "which to agree on a seed. Give the gates one with l0kernels.nn.GateBank(model, seed=...)",
            UserWarning,
            stacklevel=2,
        )
        _agreements[dist.group.WORLD] = None
        return
    rank = dist.get_rank()
    # The n-th agreement of each rank is the n-th of the others, also where a store outlives its group.
    n = store.add(f"l0kernels/agreements/{rank}", 1)
    key = f"l0kernels/seed/{n}"
    if rank == 0:
        store.set(key, str(proposal))
    else:
        try:
            proposal = int(store.get(key))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} draws gates and has waited {store.timeout} for rank 0, which has drawn none "
                "and so given no seed: call l0kernels.nn.agree_on_gates() on all ranks after "
                "init_process_group, or l0kernels.nn.independent_gates_(model) on this one"
            ) from error
    _agreements[dist.group.WORLD] = _Agreement(proposal)


def are_several() -> bool:
    """Whether this is one of several processes that may agree on a seed."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    if dist.get_world_size() > 1:
        return True
    return not torch.compiler.is_compiling() and dist.group.WORLD in _agreements


def rank() -> int:
    """This process's rank in the default process group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, of which each rank holds a part or a replica."""
    # Without the import, which costs more than the rest of the package; a DTensor has made it.
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor")


def whole(parameter: Tensor) -> Tensor:
    """A parameter outside a forward as a plain tensor: all ranks gather it if it is a DTensor.

    Its gradient is that of a loss which every rank computes alike, as penalties are.
    """
    return parameter.full_tensor() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]


def local(parameter: Any) -> Any:
    """What this rank holds of a parameter, with a gradient of the same kind; a plain tensor as it is."""
    return parameter.to_local() if is_sharded(parameter) else parameter


class Shards(NamedTuple):
    """The mesh over which the hidden units of a block are spread, and how values come on and off it."""

    mesh: Any

    @classmethod
    def of(cls, x: Tensor, parameters: dict[str, tuple[Any, int | None]]) -> "Shards":
        """name -> (parameter, the dimension that holds the units; None: whole on each rank, plain or not)."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = next(p.device_mesh for p, _ in parameters.values() if is_sharded(p))
        for name, (parameter, dim) in parameters.items():
            if parameter is None or (dim is None and not is_sharded(parameter)):
                continue
            expected = Replicate() if dim is None else Shard(dim)
            got: Any = f"a {type(parameter).__name__}"
            if isinstance(parameter, DTensor):
                if parameter.device_mesh == mesh and parameter.placements == (expected,):
                    continue
                got = f"a DTensor with placements {parameter.placements} on {parameter.device_mesh}"
            raise ValueError(
                f"{name} must be a DTensor with placements {(expected,)} on the mesh of the others, {mesh}, "
                f"as of ColwiseParallel for up and RowwiseParallel for down, got {got}"
            )
        if is_sharded(x):
            raise TypeError("x must be a plain tensor, whole on each rank of the mesh, got a DTensor: x.full_tensor()")
        return cls(mesh)

    def slice(self, values: Tensor) -> Tensor:
        """What this rank computes with, of values of all units; the gradients of all ranks come back."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = DTensor.from_local(values, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def enter(self, x: Tensor) -> Tensor:
        """x as each rank reads it: its gradient is the sum over the ranks."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def leave(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The sum of y over the ranks, plus what is added once."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        summed = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        total = summed.redistribute(placements=[Replicate()]).to_local()
        return total if bias is None else total + bias


def is_called_alone(layer: Any) -> bool:
    """Whether FSDP gathers the parameters of this very layer when it is called."""
    kind = type(layer)
    return hasattr(kind, "unshard") or hasattr(kind, "summon_full_params")


class Held:
    """Gates on their way through the hooks of FSDP, whose mixed precision would round every tensor it sees."""

    def __init__(self, gates: Any) -> None:
        self.gates = gates


def held(layer: Any, gates: Any) -> Any:
    """`gates` as `layer` shall be handed them."""
    return Held(gates) if gates is not None and is_called_alone(layer) else gates


def released(gates: Any) -> Any:
    """The gates that a layer was handed."""
    return gates.gates if isinstance(gates, Held) else gates


class Reducer:
    """Has the gradients of some parameters averaged over the ranks of a group at the end of each backward.

    Once for all of them: hooks that reduce one by one would cross each other where ranks differ in the order
    of their backward.
    """

    def __init__(self, parameters: Callable[[], list[Tensor]], group: Any) -> None:
        self.parameters = parameters
        self.group = group
        self.queued = -1

    def watch(self, parameter: Tensor) -> None:
        parameter.register_post_accumulate_grad_hook(self._queue)

    def share_(self, parameter: Tensor) -> None:
        """The value of the group's first rank on all."""
        if parameter.device.type != "meta":
            with torch.no_grad():
                dist.broadcast(parameter, group=self.group, group_src=0)

    def _queue(self, _: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if self.queued != task:
            self.queued = task
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)  # type: ignore[attr-defined]

    def _reduce(self) -> None:
        wanted = [parameter for parameter in self.parameters() if parameter.requires_grad]
        alike: dict[object, list[Tensor]] = {}
        for parameter in wanted:
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            alike.setdefault((parameter.device, parameter.dtype), []).append(parameter.grad)
        ranks = dist.get_world_size(self.group)
        with torch.no_grad():
            for grads in alike.values():
                flat = torch.cat([grad.flatten() for grad in grads])
                dist.all_reduce(flat, group=self.group)
                parts = (flat / ranks).split([grad.numel() for grad in grads])
                torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
