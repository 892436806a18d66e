"""Gates on several ranks: drawn alike or each for itself, and whole where parameters are sharded."""

import torch
import torch.distributed as dist
from torch import nn

from .. import _checks
from . import ranks
from .gate import gate_modules


def agree_on_gates(seed: int | None = None) -> None:
    """Has all ranks of the default process group draw the same gates from here on; each rank calls it.

    The ranks agree by themselves at their first draw: the seed is rank 0's, and the k-th draw of a rank has
    the key ``seed + KEY_STEP * k``, counted on the rank, so that no draw communicates. (A captured CUDA graph
    counts on the device, and draws anew at each replay; a checkpoint's recomputation finds its draw again.)
    Ranks that have drawn unequally often, since one saw fewer batches or went through other layers, differ
    from then on: call this again, at each epoch say, or draw with a :class:`GateBank`, which has a count of
    its own. Some steps of the optimisers compare the counts, and a UserWarning says if they differ. The
    operations (:func:`l0kernels.sample_gates`, ``l0_linear``, ...) know nothing of this: without a seed they
    draw one from the rank's own generator.

    Args:
        seed: in [0, 2**63), the same on all ranks; None: one from rank 0's default generator.

    Raises:
        RuntimeError: there is no process group, or rank 0 does not call it.
        ValueError, TypeError: a seed out of range, or no int.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "agree_on_gates needs a process group: call torch.distributed.init_process_group first"
        )
    if seed is not None:
        _checks.check_count("seed", seed, 0, 2**63)
    drawn = int(torch.randint(2**63 - 1, (1,), device="cpu"))
    ranks.agree(drawn if seed is None else seed, given=seed is not None)


def independent_gates_(model: nn.Module, independent: bool = True) -> None:
    """Has each rank draw the gates of `model` from its own default generator, or (False) all alike again.

    It sets ``gate.independent`` of each gate. Give the ranks different generators (``torch.manual_seed(seed +
    rank)``): equal ones draw equal gates. Averaged over the ranks, gradients then see as many draws as there
    are ranks; each rank skips what is closed on it.

    Args:
        model: any module with gates.
        independent: whether they differ from rank to rank.

    Raises:
        ValueError: no gate in the model.
    """
    gates = gate_modules(model)
    if not gates:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    for gate in gates:
        gate.independent = independent


def keep_gates_whole(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> set[nn.Parameter]:
    """The log_alpha of every gate, for FSDP to leave alone: whole, in fp32, and reduced, on every rank.

    ::

        whole = keep_gates_whole(model)
        fully_shard(model, mesh=mesh, ignored_params=whole)
        # or FullyShardedDataParallel(model, use_orig_params=True, ignored_states=whole)

    FSDP does not reduce the gradients of what it ignores. From here on each backward ends with one all-reduce
    of all gates' gradients, to their mean, as FSDP's own; a gate without one gets zeros, since another rank
    may have one. The gates of the group's first rank are copied to all, also where ``reset_parameters`` fills
    gates of the meta device later. Sharded gates lose fp32 under FSDP's mixed precision, which is refused.

    torch takes no lists of sharded and whole tensors: clip the gradients of :func:`weight_parameters` and of
    :func:`gate_parameters` apart, and give the optimiser the groups of :func:`parameter_groups`.

    Under DistributedDataParallel, gates are parameters like others: leave this out.

    Args:
        model: any module with gates, on its device (FSDP does not move what it ignores) and not yet sharded.
        group: the ranks that share the gates; None: all.

    Returns:
        What :func:`gate_parameters` lists, as a set.

    Raises:
        ValueError: no gate in the model, or gates that are sharded already or kept whole in another group.
        RuntimeError: there is no process group.
    """
    gates = gate_modules(model)
    if not gates:
        raise ValueError(f"model must contain gates, got a {type(model).__name__} without any")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "keep_gates_whole needs a process group: call torch.distributed.init_process_group first"
        )
    for gate in gates:
        if ranks.is_sharded(gate.log_alpha) or gate.log_alpha.numel() != gate.n:
            raise ValueError(f"model must not be sharded yet, got a shard of the log_alpha of {gate}")
        if gate._reducer is not None and gate._reducer.group is not group:
            raise ValueError(
                f"group must be that in which gates are kept whole already, got another for {gate}"
            )
    reducer = ranks.Reducer(lambda: [gate.log_alpha for gate in gates], group)
    for gate in gates:
        if gate._reducer is None:
            reducer.watch(gate.log_alpha)
        gate.__dict__["_reducer"] = reducer
        reducer.share_(gate.log_alpha)
    return {gate.log_alpha for gate in gates}
