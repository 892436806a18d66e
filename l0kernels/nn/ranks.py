"""What several processes agree on: the seeds of their draws, and which part of a parameter each one holds."""

import datetime
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import reference
from .._checks import PLAIN
from .._compat import after_backward, foreach_copy_, graph_task, register_fake, unsafe_view

KEY_STEP = 0x9E3779B97F4A7C15 - 2**64
"""Odd, so that 2**64 consecutive draws have 2**64 different keys; the golden ratio spreads them."""

REMEMBERED = 2**16
"""Draws whose recomputation is known again; 100 bytes each."""

_CAPTURED, _BANKS = 2**62, 2**61
"""Where the draws of captured graphs and the seeds of banks begin, far from the draws counted on the host."""

PATIENCE = datetime.timedelta(minutes=1)
"""How long a rank waits for rank 0 before it says so."""

_LIBRARY = torch.library.Library("l0kernels", "FRAGMENT")
lock = threading.RLock()
"""Held while draws are counted and handed to gates."""


def _after_fork() -> None:
    global lock
    lock = threading.RLock()  # a thread that the child does not have may hold the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_captured_keys: dict[torch.device, Tensor] = {}
"""The next key of captured draws on each device; graphs hold its address, so it stays."""


class _Agreement:
    """The seed that the ranks of a group have in common, and how many draws of it this one has made.

    A draw has a tag, from torch's default generator, which differs from rank to rank. A checkpoint puts the
    generator back before it recomputes, so that a draw within a backward shows the tag of the draw that it
    repeats, and gets the same key.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed = seed
        self.number = number
        self.draws = 0
        self.banks = 0
        self.steps = 0
        self.compared: dict[int, int] = {}
        self.warned = False
        self.recent: dict[int, int | Tensor] = {}
        for device, key in _captured_keys.items():
            key.copy_(_seed_tensor(self.at(_CAPTURED), device))

    def key(self, tag: int, device: torch.device) -> Tensor:
        with lock:
            capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if graph_task() != -1:
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
                found = self.at(self.draws)
                self.draws += 1
                if device.type == "cuda" and device not in _captured_keys:
                    _captured_keys[device] = _seed_tensor(self.at(_CAPTURED), device)
            self.recent[tag] = found
            if len(self.recent) > REMEMBERED:
                del self.recent[next(iter(self.recent))]
            return found if isinstance(found, Tensor) else _seed_tensor(found, device)

    def step(self) -> None:
        """Counts a step of an optimiser; at some of them, compares the draws so far with those of rank 0.

        Rank 0 leaves its count in the group's store, and the others look whether it has: nobody waits.
        """
        self.steps += 1
        if self.steps & (self.steps - 1) and self.steps % 1024:
            return
        rank, store = dist.get_rank(), _store()
        if store is None:
            return
        key = f"l0kernels/draws/{self.number}/"
        if rank == 0:
            store.set(f"{key}{self.steps}", str(self.draws))
            return
        self.compared[self.steps] = self.draws
        for step, draws in list(self.compared.items()):
            if store.check([f"{key}{step}"]):
                first = int(store.get(f"{key}{step}"))
                del self.compared[step]
                if first != draws and not self.warned:
                    self.warned = True
                    warnings.warn(
                        f"rank {rank} has drawn gates {draws} times in {step} optimiser steps, rank 0 "
                        f"{first} times: if both train one model, their gates differ. Draw with "
                        "l0kernels.nn.GateBank, or call l0kernels.nn.agree_on_gates() on all ranks at one "
                        "point of the training",
                        UserWarning,
                        stacklevel=4,
                    )

    def _captured(self, device: torch.device) -> Tensor:
        """A key that each replay of the graph finds advanced: there the device counts."""
        if device not in _captured_keys:
            raise RuntimeError(
                "gates are drawn on several ranks for the first time while a CUDA graph is captured: "
                "run the forward once before the capture"
            )
        key = _captured_keys[device].clone()
        _captured_keys[device].add_(KEY_STEP)
        return key

    def at(self, position: int) -> int:
        return signed(self.seed + KEY_STEP * position)


def signed(value: int) -> int:
    """`value` modulo 2**64 as an int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


def _seed_tensor(value: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=torch.int64, device=device)


_agreements: Any = WeakIdKeyDictionary()
"""Process group -> _Agreement, or None where there can be none."""


def fresh_seed(device: torch.device) -> Tensor:
    """A seed for one draw where are_several, (1,) int64 on `device`: the same on all ranks."""
    tag = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    return torch.ops.l0kernels.agreed_seed.default(tag, device)


def bank_seed() -> int | None:
    """The seed of a new GateBank, in [0, 2**63), the n-th on each rank the same; None without a group."""
    if not are_several():
        return None
    agreement = _agreement(int(torch.randint(2**63 - 1, (1,), device="cpu")))
    if agreement is None:
        return None
    with lock:
        agreement.banks += 1
        return agreement.at(_BANKS + agreement.banks) % 2**63


def _agreed_seed(tag: Tensor, device: torch.device) -> Tensor:
    agreement = _agreement(int(tag))
    return tag.to(device) if agreement is None else agreement.key(int(tag), device)


# The tag is drawn in the graph and the key looked up by it: a compiled recomputation has the same tag again.
_LIBRARY.define("agreed_seed(Tensor tag, Device device) -> Tensor")
_LIBRARY.impl("agreed_seed", _agreed_seed, "CPU")
register_fake(_LIBRARY, "agreed_seed", lambda tag, device: tag.new_empty(1, device=device))


def _agreement(proposal: int) -> _Agreement | None:
    group = dist.group.WORLD
    with lock:
        if group not in _agreements:
            agree(proposal)
        return _agreements[group]


def agree(proposal: int, given: bool = False) -> None:
    """Starts an _Agreement on rank 0's proposal, by the group's store: a collective might cross another one.

    given: whether all ranks propose the same.
    """
    rank, store = dist.get_rank(), _store()
    if store is None and not given:
        warnings.warn(
            f"each rank draws gates of its own: the process group ({dist.get_backend()}) has no store on "
            "which to agree on a seed. Give it one: l0kernels.nn.agree_on_gates(seed) on all ranks",
            UserWarning,
            stacklevel=2,
        )
        _agreements[dist.group.WORLD] = None
        return
    # The n-th agreement of each rank is the n-th of the others, also where a store outlives its group.
    n = 0 if store is None else store.add(f"l0kernels/agreements/{rank}", 1)
    if not given:
        proposal = _exchanged(store, f"l0kernels/seed/{n}", proposal, rank)
    _agreements[dist.group.WORLD] = _Agreement(proposal, n)
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_count_step))


def _store() -> Any:
    return None if dist.get_backend() == "fake" else dist.distributed_c10d._get_default_store()


def _exchanged(store: Any, key: str, proposal: int, rank: int) -> int:
    """Rank 0's proposal."""
    if rank == 0:
        store.set(key, str(proposal))
        return proposal
    try:
        try:
            store.wait([key], PATIENCE)
        except RuntimeError:
            warnings.warn(
                f"rank {rank} waits for rank 0 to draw gates, and draws the same. If rank 0 has no gates, "
                "call l0kernels.nn.agree_on_gates() on all ranks, or independent_gates_(model) on this one",
                UserWarning,
                stacklevel=2,
            )
        return int(store.get(key))
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank} draws gates and has waited in vain for rank 0, which has drawn none "
            "and given no seed: call l0kernels.nn.agree_on_gates() on all ranks after "
            "init_process_group, or l0kernels.nn.independent_gates_(model) on this one"
        ) from error


_watching: list[Any] = []


def _count_step(*_: Any) -> None:
    """After each step of any optimiser."""
    if torch.compiler.is_compiling() or not dist.is_initialized():
        return
    agreement = _agreements.get(dist.group.WORLD)
    if agreement is not None:
        agreement.step()


def are_several() -> bool:
    """Whether this is one of several processes that shall agree on a seed.

    Otherwise torch's default generator draws: without a process group, and for a single process that nobody
    has asked to agree.
    """
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
    return type(tensor) not in PLAIN and hasattr(tensor, "_local_tensor")


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
    def of(cls, parameters: dict[str, tuple[Any, int | None]]) -> "Shards":
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
        return cls(mesh)

    def slice(self, values: Tensor) -> Tensor:
        """What this rank computes with, of values of all units; the gradients of all ranks come back."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = DTensor.from_local(values, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def enter(self, x: Any, layer: nn.Module) -> Tensor:
        """x as each rank reads it, whole: its gradient is the sum over the ranks.

        The hooks of `layer` bring it there from the layout that its parallel style was given.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        for hook in layer._forward_pre_hooks.values():
            entered = cast(Any, hook)(layer, (x,))
            x = x if entered is None else entered[0] if isinstance(entered, tuple) else entered
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        if x.device_mesh != self.mesh or x.placements != (Replicate(),):
            raise ValueError(
                f"x must be whole on each rank of {self.mesh}, got a DTensor with placements {x.placements} "
                f"on {x.device_mesh}: say what it is with ColwiseParallel(input_layouts=...)"
            )
        x = x.to_local(grad_placements=[Partial()])
        return x if type(x) in PLAIN else x.clone()  # what a collective is still filling has no memory

    def leave(self, y: Tensor, bias: Any, layer: nn.Module) -> Any:
        """The sum of y over the ranks, and the bias once, laid out as the hooks of `layer` ask for."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        total: Any = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        total = total.redistribute(placements=[Replicate()])
        if bias is not None:
            whole = [Replicate()]
            total = total + (
                bias if is_sharded(bias) else DTensor.from_local(bias, self.mesh, whole, run_check=False)
            )
        for hook in layer._forward_hooks.values():
            left = cast(Any, hook)(layer, (), total)
            total = total if left is None else left
        total = total if layer._forward_hooks else total.to_local()
        # To autograd no view, so that it may be changed in place, which FSDP would warn of.
        return total if is_sharded(total) else unsafe_view(total, total.shape)


def is_called_alone(layer: Any) -> bool:
    """Whether FSDP gathers the parameters of this very layer when it is called."""
    kind = type(layer)
    return hasattr(kind, "unshard") or hasattr(kind, "summon_full_params")


def l2_of_shards(
    weight: Any,
    weight_decay: float,
    out_log_alpha: Tensor | None,
    in_log_alpha: Tensor | None,
    groups: int,
    dist: Any,
) -> Tensor:
    """reference.l2_penalty of a DTensor: each rank sums over what it holds, and one scalar is reduced."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh

    def everywhere(log_alpha: Tensor | None) -> Any:
        if log_alpha is None:
            return None
        return DTensor.from_local(log_alpha, mesh, [Replicate()] * mesh.ndim, run_check=False)

    weight = weight[:, None] if weight.ndim == 1 else weight
    total = reference.l2_penalty(
        weight,
        weight_decay,
        in_log_alpha=everywhere(in_log_alpha),
        out_log_alpha=everywhere(out_log_alpha),
        groups=groups,
        dist=dist,
    )
    return whole(total)


def is_released(parameter: Tensor) -> bool:
    """Whether it is a view that FullyShardedDataParallel has left without memory until the next forward."""
    if type(parameter) is not Tensor or torch.compiler.is_compiling():
        return False
    try:
        return parameter.numel() > 0 and parameter.untyped_storage().size() == 0
    except NotImplementedError:  # torch.func's tensors have none
        return False


def check_none_flat(model: nn.Module) -> None:
    """RuntimeError if FullyShardedDataParallel shards the model: its parameters have a shard's sizes."""
    if any(hasattr(type(module), "summon_full_params") for module in model.modules()):
        raise RuntimeError(
            "the model is sharded by FullyShardedDataParallel, which keeps the parameters of several layers "
            "in one: load a full state_dict of it into a model of one process, or shard with fully_shard"
        )


def check_not_flat(weight: Tensor) -> None:
    """RuntimeError if FullyShardedDataParallel has made a flat shard of a weight, TypeError if it is none."""
    if not isinstance(weight, Tensor):  # of a quantised layer it is a method
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.ndim < 2 or is_released(weight):
        raise RuntimeError(
            f"weight must be whole, got {tuple(weight.shape)}: FullyShardedDataParallel has flattened and "
            "sharded it, and gathers it within a forward only. Leave weight_decay to the optimiser, or shard "
            "with fully_shard"
        )


def gathered(model: nn.Module) -> nn.Module:
    """The model with whole parameters and without the hooks that gather them; itself if none is sharded.

    All ranks call it alike. Buffers and what is not sharded are shared with the model.
    """
    check_none_flat(model)
    alone = any(map(is_called_alone, model.modules()))
    return _gathered(model, {}, {}) if alone or any(map(is_sharded, model.parameters())) else model


def _gathered(
    module: nn.Module, modules: dict[nn.Module, nn.Module], parameters: dict[Any, Any]
) -> nn.Module:
    if module in modules:
        return modules[module]
    kind: Any = type(module)
    own = [parameter for parameter in module._parameters.values() if is_sharded(parameter)]
    for parameter in own:
        if parameter not in parameters:
            full = whole(cast(Tensor, parameter).detach())
            parameters[parameter] = nn.Parameter(full, cast(Tensor, parameter).requires_grad)
    derived = hasattr(kind, "unshard")  # by fully_shard, from a class of its own and the module's
    kind = kind.__mro__[2] if derived else kind
    copied: Any = kind.__new__(kind)
    modules[module] = copied
    left_out = ("__composable_api", "_is_fsdp", "_fsdp", "_distribute_module")  # the state of the sharding
    copied.__dict__.update((n, value) for n, value in module.__dict__.items() if not n.startswith(left_out))
    copied._parameters = {name: parameters.get(p, p) for name, p in module._parameters.items()}
    copied._modules = {
        name: None if child is None else _gathered(child, modules, parameters)
        for name, child in module._modules.items()
    }
    if own or derived:
        copied.__dict__.update((n, value) for n, value in nn.Module().__dict__.items() if "_hooks" in n)
    return copied


class Held:
    """Gates on their way through the hooks of FSDP, whose mixed precision rounds every tensor it sees."""

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
        task = graph_task()
        if self.queued != task:
            self.queued = task
            after_backward(self._reduce)

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
                foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
