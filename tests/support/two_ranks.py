"""Two processes that run checks of gates on several ranks, and what the checks share."""

import datetime
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import torch
import torch.distributed as dist
from torch import Tensor, nn

import l0kernels as l0

WORLD = 2


def others(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank."""
    tensor = tensor.detach().contiguous()
    found = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(found, tensor)
    return found


def are_equal(tensor: Tensor) -> bool:
    return all(torch.equal(tensor, other) for other in others(tensor))


def of_seed(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` returns with torch's default generator at `seed`, which is then each rank's own again."""
    torch.manual_seed(seed)
    made = make()
    torch.manual_seed(100 + dist.get_rank())
    return made


def mlp(**options: Any) -> nn.Module:
    return l0.nn.L0MLP([6, 9, 4], "relu", **options)


def images() -> nn.Module:
    return l0.nn.L0Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        l0.nn.L0BatchNorm2d(8),
        nn.ReLU(),
        l0.nn.L0Conv2d(8, 5, 3, gate="both"),
        nn.Flatten(),
        l0.nn.L0Linear(5 * 2 * 2, 3),
    )


def units() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.GELU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 9)]
    model = nn.Sequential(*layers, nn.LayerNorm(9), nn.Linear(9, 3))
    l0.nn.gate_(model, torch.randn(1, 3, 6, 6))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "in": (lambda: l0.nn.L0Linear(12, 9), (5, 12)),
    "both": (lambda: l0.nn.L0Linear(12, 9, gate="both"), (5, 12)),
    "weight": (lambda: l0.nn.L0Linear(12, 9, gate="weight"), (5, 12)),
    "block": (lambda: l0.nn.L0Linear(12, 9, gate=(2, 5)), (5, 12)),
    "conv": (lambda: l0.nn.L0Conv2d(3, 7, 3, gate="both"), (2, 3, 5, 5)),
    "mlp": (mlp, (5, 6)),
    "units": (units, (2, 3, 6, 6)),
    "feed_forward": (lambda: l0.nn.L0FeedForward(6, 15, "gelu"), (5, 6)),
    "swiglu": (lambda: l0.nn.L0FeedForward(6, 15, "swiglu"), (5, 6)),
    "sequential": (images, (2, 3, 6, 6)),
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


OLD: list[Any] = []
"""A bank of gates that each rank has from before there was a group."""
MESH: list[Any] = []


def _work(rank: int, directory: str, checks: dict[str, Callable[[int], None]]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(rank)
    OLD.append(l0.nn.GateBank(l0.nn.L0Linear(30, 4)))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=20),
    )
    from torch.distributed.device_mesh import init_device_mesh

    MESH.append(init_device_mesh("cpu", (WORLD,)))
    for name, fn in checks.items():
        torch.manual_seed(100 + rank)
        try:
            fn(rank)
            text = ""
        except BaseException:
            text = traceback.format_exc()
        with open(f"{directory}/{name}.{rank}", "w") as file:
            file.write(text)
    dist.destroy_process_group()


# The ranks fork once there is what each would import alone, half of its time: dynamo, FSDP and the like.
# Checks of draws come first and may leave ranks apart; those of sharded models begin with an agreement.
RANKS = """
import torch.distributed.fsdp, torch.distributed.tensor.parallel
import test_distributed, test_sharded, two_ranks

torch.set_num_threads(1)  # others would not be there after the fork
two_ranks.units()
torch.compile(two_ranks.mlp(), backend="aot_eager")(torch.ones(5, 6)).sum().backward()
torch._dynamo.reset()
checks = test_distributed.CHECKS | test_sharded.CHECKS
arguments = {directory!r}, checks
torch.multiprocessing.start_processes(two_ranks._work, arguments, two_ranks.WORLD, start_method="fork")
"""


def run(directory: Path, tests: Path) -> dict[str, list[str]]:
    """By the name of a check: what became of it on each rank, "" if it passed; `tests` holds their files."""
    folders = [Path(l0.__file__).parents[1], tests, Path(fresh.__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = fresh.run(RANKS.format(directory=str(directory)), directory, environment)
    assert done.returncode == 0, done.stderr
    names = [file.stem for file in directory.glob("*.0")]
    return {name: [(directory / f"{name}.{rank}").read_text() for rank in range(WORLD)] for name in names}
