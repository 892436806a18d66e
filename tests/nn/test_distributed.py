"""Gates on several ranks. Two processes run all checks; each test reads what became of one."""

import copy
import datetime
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.nn import ranks

WORLD = 2
CHECKS: dict[str, Callable[[int], None]] = {}


def check(fn: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[fn.__name__] = fn
    return fn


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


@check
def ranks_draw_the_same_gates(rank: int) -> None:
    for name, (make, shape) in MODELS.items():
        model, x = of_seed(0, make), of_seed(1, lambda shape=shape: torch.randn(shape))
        first, second = model(x), model(x)
        assert not torch.equal(first, second), name
        assert are_equal(first), name
        assert are_equal(second), name
    gate = of_seed(0, lambda: l0.nn.HardConcreteGate(50))
    assert are_equal(gate().z)


@check
def independent_gates_differ_from_rank_to_rank(rank: int) -> None:
    for name, (make, shape) in MODELS.items():
        model, x = of_seed(0, make), of_seed(1, lambda shape=shape: torch.randn(shape))
        l0.nn.independent_gates_(model)
        assert not are_equal(model(x)), name
        assert not are_equal(copy.deepcopy(model)(x)), name
        l0.nn.independent_gates_(model, False)
        assert are_equal(model(x)), name


@check
def gates_of_one_layer_may_be_alike_and_independent(rank: int) -> None:
    layer = of_seed(0, lambda: l0.nn.L0Linear(40, 40, gate="both"))
    layer.out_gate.independent = True
    y = layer(torch.ones(1, 40))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(40))
        layer.bias.zero_()
    y = layer(torch.ones(1, 40))
    assert not are_equal(y)
    layer.out_gate.eval()
    assert are_equal(layer(torch.ones(1, 40)))
    chain = of_seed(0, mlp)
    chain.layers[1].in_gate.independent = True
    assert not are_equal(chain(of_seed(1, lambda: torch.randn(5, 6))))


@check
def distributed_data_parallel(rank: int) -> None:
    model = of_seed(rank, mlp)
    wrapped = nn.parallel.DistributedDataParallel(model)  # copies rank 0's parameters
    x = of_seed(1, lambda: torch.randn(5, 6))
    assert are_equal(wrapped(x))
    # One process with both halves of a batch and the same gates has the same gradients.
    halves = of_seed(2, lambda: torch.randn(WORLD, 5, 6))
    alone = copy.deepcopy(model)
    l0.nn.agree_on_gates(7)
    (wrapped(halves[rank]).square().mean() + l0.nn.penalty(wrapped) / 50).backward()
    l0.nn.agree_on_gates(7)
    (alone(halves.flatten(0, 1)).square().mean() + l0.nn.penalty(alone) / 50).backward()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@check
def recomputation_draws_the_gates_of_its_forward(rank: int) -> None:
    for reentrant in (False, True):
        for name, (make, shape) in MODELS.items():
            if name == "sequential":  # a checkpointed norm updates its statistics twice
                continue
            model, x = of_seed(0, make), of_seed(1, lambda shape=shape: torch.randn(shape))
            x.requires_grad_()
            wanted: list[Tensor | None] = []
            for checkpointed in (False, True):
                l0.nn.agree_on_gates(3)
                model.zero_grad()
                x.grad = None
                losses = []
                for power in (1, 2, 3):  # three forwards in flight
                    y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                    losses.append((y**power).sum())
                losses[0].backward()
                losses[2].backward()
                model(x)
                losses[1].backward()
                grads = [x.grad, *(p.grad for p in model.parameters())]
                if checkpointed:
                    for got, want in zip(grads, wanted, strict=True):
                        torch.testing.assert_close(got, want, msg=f"{name}, {reentrant}")
                    assert are_equal(x.grad)
                wanted = [None if g is None else g.clone() for g in grads]


@check
def recomputation_without_the_generator_is_refused(rank: int) -> None:
    model, x = of_seed(0, mlp), torch.ones(5, 6, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=r"preserve_rng_state=True.*GateBank"):
        y.sum().backward()


@check
def agree_on_gates_brings_ranks_together_again(rank: int) -> None:
    gate = of_seed(0, lambda: l0.nn.HardConcreteGate(60))
    for _ in range(rank):
        gate()
    assert not are_equal(gate().z)
    l0.nn.agree_on_gates()
    assert are_equal(gate().z)
    l0.nn.agree_on_gates(5)
    first = gate().z
    l0.nn.agree_on_gates(5)
    assert torch.equal(first, gate().z)
    l0.nn.agree_on_gates(6)
    assert not torch.equal(first, gate().z)


@check
def ranks_that_draw_unequally_often_are_told(rank: int) -> None:
    gate = of_seed(0, lambda: l0.nn.HardConcreteGate(60))
    optimizer = torch.optim.SGD(gate.parameters(), 0.0)
    for extra in (0, 1):
        l0.nn.agree_on_gates(5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(5):
                for _ in range(1 + extra * rank * (step == 1)):
                    gate()
                if rank:
                    dist.barrier()
                optimizer.step()
                if not rank:
                    dist.barrier()
        told = [str(w.message) for w in caught if "has drawn gates" in str(w.message)]
        assert len(told) == extra * rank, told
        assert not told or "rank 1 has drawn gates 3 times in 2 optimiser steps, rank 0 2 times" in told[0]


@check
def compiled_forwards_draw_the_same_gates(rank: int) -> None:
    model, x = of_seed(0, mlp), of_seed(1, lambda: torch.randn(5, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = []
    for forward in (model, compiled):
        l0.nn.agree_on_gates(8)
        model.zero_grad()
        outputs.append([forward(x), forward(x)])
        sum(y.square().sum() for y in outputs[-1]).backward()
        outputs[-1] += [p.grad for p in model.parameters()]
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want)
    assert are_equal(compiled(x))

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    grads = []
    for forward in (recomputed, torch.compile(recomputed, backend="aot_eager", fullgraph=True)):
        l0.nn.agree_on_gates(8)
        model.zero_grad()
        forward(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@check
def banks_agree(rank: int) -> None:
    model = of_seed(0, lambda: nn.Sequential(l0.nn.L0Linear(40, 30), l0.nn.L0Linear(30, 20, gate="weight")))
    x = of_seed(1, lambda: torch.randn(5, 40))
    bank = l0.nn.GateBank(model)
    assert are_equal(bank.seed)
    assert int(bank.seed) >= 0
    for _ in range(rank + 1):
        l0.nn.HardConcreteGate(3)()  # draws elsewhere leave a bank alone
    for _ in range(2):
        bank.draw()
        assert are_equal(model(x))
    bank = l0.nn.GateBank(model, rank=rank)
    bank.draw()
    assert not are_equal(model(x))
    bank = l0.nn.GateBank(model)
    model[1].weight_gate.independent = True
    bank.draw()
    assert are_equal(model[0].in_gate().z)
    assert not are_equal(model[1].weight_gate.seed)
    model[1].weight_gate.independent, model[0].in_gate.independent = False, True
    bank.draw()
    assert not are_equal(model[0].in_gate().z)
    assert are_equal(model[1].weight_gate.seed)


@check
def a_bank_older_than_the_group_agrees_at_its_next_draw(rank: int) -> None:
    assert not are_equal(OLD.seed)
    OLD.draw()
    assert are_equal(OLD.seed)
    seed = OLD.seed.clone()
    OLD.draw()
    assert torch.equal(seed, OLD.seed)
    assert OLD.step == 2


def trained(
    model: nn.Module, forward: nn.Module, x: Tensor, bank: Any = None, **options: Any
) -> list[Tensor]:
    """Two steps of training with the gates of seed 4; the parameters afterwards, whole."""
    optimizer = torch.optim.SGD(l0.nn.parameter_groups(model, gate_lr=0.5), lr=0.1, momentum=0.5)
    l0.nn.clamp_after_step(optimizer, model)
    l0.nn.agree_on_gates(4)
    for _ in range(2):
        optimizer.zero_grad()
        if bank is not None:
            bank.draw()
        (forward(x).float().square().mean() + l0.nn.penalty(model, **options) / 30).backward()
        optimizer.step()
    return [whole(p.detach()) for p in model.parameters()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@check
def fully_shard_with_whole_gates_trains_as_one_process(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for name, (make, shape) in MODELS.items():
        if name == "sequential":  # statistics of half the batch
            continue
        halves = of_seed(1, lambda shape=shape: torch.randn(WORLD, *shape))
        alone = of_seed(0, make)
        sharded = copy.deepcopy(alone)
        if rank:
            with torch.no_grad():
                for gate in l0.nn.gate_modules(sharded):
                    gate.log_alpha.add_(1)  # rank 0's count
        gates = l0.nn.keep_gates_whole(sharded)
        assert gates == set(l0.nn.gate_parameters(sharded))
        fully_shard(sharded, mesh=MESH[0], ignored_params=gates)
        want = trained(alone, alone, halves.flatten(0, 1), weight_decay=0.3)
        got = trained(sharded, sharded, halves[rank], weight_decay=0.3)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        assert all(are_equal(gate) for gate in l0.nn.gate_parameters(sharded))


@check
def mixed_precision_leaves_whole_gates_alone(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for per_layer in (False, True):
        model = of_seed(0, mlp)
        alone = copy.deepcopy(model)
        gates = l0.nn.keep_gates_whole(model)
        for layer in model.layers if per_layer else ():
            fully_shard(layer, mesh=MESH[0], mp_policy=policy, ignored_params=gates)
        fully_shard(model, mesh=MESH[0], mp_policy=policy, ignored_params=gates)
        x = of_seed(1, lambda: torch.randn(5, 6))
        for draws in (False, True):
            before = copy.deepcopy(alone)
            trained(model, model, x, l0.nn.GateBank(model) if draws else None)
            l0.nn.GateBank(model).clear()
            assert all(gate.dtype == torch.float32 and are_equal(gate) for gate in gates)
            assert all(p.dtype == torch.float32 for p in model.parameters())
            assert any(
                not torch.equal(a, b.log_alpha)
                for a, b in zip(l0.nn.gate_parameters(model), l0.nn.gate_modules(before), strict=True)
            )
        # FSDP rounds what it is called with. Between the layers of a model the gates pass it by.
        with pytest.raises(TypeError, match="z must be float32"):
            model(x, model.draw())
        l0.nn.agree_on_gates(2)
        y = model(x)
        alone.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
        l0.nn.agree_on_gates(2)
        torch.testing.assert_close(y, alone.bfloat16()(x.bfloat16()))


@check
def sharded_gates_lower_than_fp32_are_refused(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = of_seed(0, mlp)
    fully_shard(model, mesh=MESH[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must not be sharded yet"):
        l0.nn.keep_gates_whole(model)
    with pytest.raises(TypeError, match="float32"):
        model(torch.ones(5, 6))


@check
def budgets_agree(rank: int) -> None:
    model = of_seed(0, lambda: l0.nn.L0MLP([6, 30, 4], droprate_init=0.1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(model, gate_lr=0.05))
    budget = l0.nn.Budget(model, 0.4, steps=40)
    budget.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        wrapped(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert budget.expected <= 0.4 + 1e-6
    for gate in l0.nn.gate_parameters(model):
        assert are_equal(gate)
    assert are_equal(torch.tensor([budget.mu], dtype=torch.float64))


@check
def budgets_come_together_again(rank: int) -> None:
    """Ranks whose gradients differ, as nobody reduces them, have rank 0's state at the 64th step."""
    model = of_seed(0, mlp)
    budget = l0.nn.Budget(model, 0.5, steps=100)
    gates = l0.nn.gate_parameters(model)
    for count in range(1, 65):
        for gate in gates:
            gate.grad = torch.randn_like(gate)
            with torch.no_grad():
                gate.add_(0.1 * torch.rand_like(gate))
        budget.step()
        if count == 63:
            assert not are_equal(torch.cat(gates))
    assert are_equal(torch.cat(gates))
    for value in budget._state:
        assert are_equal(value)


@check
def budgets_of_sharded_gates(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = of_seed(0, lambda: l0.nn.L0MLP([6, 10, 4]))
    fully_shard(model, mesh=MESH[0])
    with pytest.raises(ValueError, match=r"gates whole, got a shard of layers.0.in_gate: fully_shard\("):
        l0.nn.Budget(model, 0.5, steps=5)
    whole = of_seed(0, lambda: l0.nn.L0MLP([6, 10, 4], droprate_init=0.1))
    fully_shard(whole, mesh=MESH[0], ignored_params=l0.nn.keep_gates_whole(whole))
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(whole, gate_lr=0.05), foreach=False)
    budget = l0.nn.Budget(whole, 0.4, steps=20)
    budget.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        whole(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert budget.expected <= 0.4 + 1e-6
    for gate in l0.nn.gate_parameters(whole):
        assert are_equal(gate)


@check
def penalty_counts_and_export_of_sharded_models(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for name, (make, shape) in MODELS.items():
        for kept in (False, True):
            alone, x = of_seed(0, make), of_seed(1, lambda shape=shape: torch.randn(shape))
            with torch.no_grad():
                for gate in l0.nn.gate_modules(alone):
                    gate.log_alpha.normal_(0, 3)
                    dist.broadcast(gate.log_alpha, 0)
            sharded = copy.deepcopy(alone)
            gates = l0.nn.keep_gates_whole(sharded) if kept else set()
            sharded = fully_shard(sharded, mesh=MESH[0], ignored_params=gates)
            for decay in (0.0, 0.7):
                results = []
                for model in (alone, sharded):
                    model.zero_grad()
                    total = l0.nn.penalty(model, weight_decay=decay)
                    total.backward()
                    results.append([total, *(p.grad for p in model.parameters())])
                for got, want in zip(results[1], results[0], strict=True):
                    got = None if got is None else whole(got)
                    torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")
            shape_of = None if len(shape) == 2 else shape
            for count in (l0.nn.expected_l0, l0.nn.eval_l0, l0.nn.open_units):
                assert count(sharded) == count(alone), name
            assert l0.nn.expected_flops(sharded, shape_of) == l0.nn.expected_flops(alone, shape_of)
            exported = l0.nn.export(sharded)
            alone.eval()
            torch.testing.assert_close(exported(x), alone(x))
            assert all(type(p) is nn.Parameter for p in exported.parameters())
            assert not any(type(m).__name__.startswith("FSDP") for m in exported.modules())
            torch.testing.assert_close(sharded.eval()(x), alone(x))
            l0.nn.clamp_gates_(sharded, 1.0)
            l0.nn.clamp_gates_(alone, 1.0)
            for got, want in zip(sharded.parameters(), alone.parameters(), strict=True):
                assert torch.equal(whole(got), want)


@check
def a_bank_draws_sharded_gates(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for name, (make, shape) in MODELS.items():
        alone, x = of_seed(0, make), of_seed(1, lambda shape=shape: torch.randn(shape))
        sharded = fully_shard(copy.deepcopy(alone), mesh=MESH[0])
        draws = [l0.nn.GateBank(model, seed=6).draw(expected=True) for model in (alone, sharded)]
        torch.testing.assert_close(*(list(draw.expected.values()) for draw in draws))
        outputs = [model(x) for model in (alone, sharded)]
        torch.testing.assert_close(*outputs, msg=lambda m, name=name: f"{name}: {m}")
        for y in outputs:
            y.square().mean().backward()
        for a, b in zip(sharded.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(a.grad), b.grad)


@check
def layers_sharded_one_by_one_are_called_one_by_one(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def layers_of(model: nn.Module) -> list[nn.Module]:
        return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d)]

    in_container = {"mlp in a container": (lambda: l0.nn.L0Sequential(mlp(), nn.ReLU()), (5, 6))}
    for name, (make, shape) in (MODELS | in_container).items():
        alone = of_seed(0, make)
        halves = of_seed(1, lambda shape=shape: torch.randn(WORLD, *shape))
        if name == "sequential":
            halves[1] = halves[0]  # norms
        sharded = copy.deepcopy(alone)
        gates = l0.nn.keep_gates_whole(sharded)
        for layer in layers_of(sharded):
            if layer is not sharded:
                fully_shard(layer, mesh=MESH[0], ignored_params=gates)
        fully_shard(sharded, mesh=MESH[0], ignored_params=gates)
        whole_batch = halves[0] if name == "sequential" else halves.flatten(0, 1)
        want = trained(alone, alone, whole_batch, weight_decay=0.3)
        got = trained(sharded, sharded, halves[rank], weight_decay=0.3)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        x = halves[0]
        torch.testing.assert_close(sharded.eval()(x), alone.eval()(x))
        torch.testing.assert_close(l0.nn.export(sharded)(x), alone(x))
        shape_of = None if len(shape) == 2 else shape
        assert l0.nn.eval_flops(sharded, shape_of or shape) == l0.nn.eval_flops(alone, shape_of or shape)


@check
def hidden_units_over_the_ranks(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for hidden, activation, bias in ((16, "relu", True), (7, "gelu", False), (1, "silu", True)):
        alone = of_seed(
            0, lambda h=hidden, a=activation, b=bias: l0.nn.L0FeedForward(6, h, a, bias=b)
        ).double()
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        spread = parallelize_module(copy.deepcopy(alone), MESH[0], plan)
        xs = [of_seed(1, lambda: torch.randn(5, 6).double()).requires_grad_() for _ in range(2)]
        banks = [l0.nn.GateBank(model, seed=3) for model in (alone, spread)]
        for mode in ("bank", "fresh", "given", "eval"):
            for bank in banks:
                _ = bank.draw() if mode == "bank" else bank.clear()
            given = (
                of_seed(2, lambda h=hidden: l0.Gates.from_z(torch.rand(h).double()))
                if mode == "given"
                else None
            )
            results = []
            for model, x in zip((alone, spread), xs, strict=True):
                l0.nn.agree_on_gates(9)
                model.train(mode != "eval").zero_grad()
                x.grad = None
                y = model(x, given)
                (y.sin().sum() + l0.nn.penalty(model, weight_decay=0.3)).backward()
                results.append([y, x.grad, *(p.grad for p in model.parameters())])
            for got, want in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(whole(got), want, msg=lambda m, mode=mode: f"{mode}: {m}")
        torch.testing.assert_close(l0.nn.export(spread)(xs[0]), alone(xs[0]))
        assert l0.nn.expected_l0(spread) == l0.nn.expected_l0(alone)


@check
def sharded_gates_are_drawn_where_they_are_gathered(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def sharded_layers(model: nn.Module) -> nn.Module:
        for layer in list(model.modules()):
            if isinstance(layer, l0.nn.L0Linear | nn.Conv2d):
                fully_shard(layer, mesh=MESH[0])
        return fully_shard(model, mesh=MESH[0])

    x = of_seed(1, lambda: torch.randn(5, 6))
    model = sharded_layers(of_seed(0, mlp))
    first = model(x)
    assert are_equal(first)
    assert not torch.equal(first, model(x))
    first.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model.eval()(x), of_seed(0, mlp).eval()(x))
    model = sharded_layers(of_seed(0, images))
    with pytest.raises(RuntimeError, match=r"log_alpha of .* must be whole.*keep_gates_whole"):
        model(of_seed(1, lambda: torch.randn(2, 3, 6, 6)))


@check
def meshes_of_two_dimensions(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
        for spread in (False, True):
            alone, x = of_seed(0, MODELS["feed_forward"][0]), of_seed(1, lambda: torch.randn(5, 6))
            sharded = copy.deepcopy(alone)
            gates = l0.nn.keep_gates_whole(sharded)
            if spread:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(sharded, mesh["inner"], plan)
            fully_shard(sharded, mesh=mesh["outer"] if spread else mesh, ignored_params=gates)
            grads = []
            for model in (alone, sharded):
                l0.nn.agree_on_gates(3)
                (model(x).square().mean() + l0.nn.penalty(model, weight_decay=0.3)).backward()
                grads.append([p.grad for p in model.parameters()])
            for want, got in zip(*grads, strict=True):
                torch.testing.assert_close(whole(got), want)
            torch.testing.assert_close(l0.nn.export(sharded)(x), alone.eval()(x))


@check
def hidden_units_over_the_ranks_between_parts_of_the_rows(rank: int) -> None:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    alone = of_seed(0, MODELS["feed_forward"][0])
    halves = of_seed(1, lambda: torch.randn(WORLD, 5, 6))
    for local in (True, False):
        plan = {
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=local),
        }
        spread = parallelize_module(copy.deepcopy(alone), MESH[0], plan)
        results = []
        for model, x in ((alone, halves.flatten(0, 1)), (spread, halves[rank])):
            x = x.clone().requires_grad_()
            model.zero_grad()
            l0.nn.agree_on_gates(9)
            y = model(x)
            assert isinstance(y, DTensor) == (model is spread and not local)
            whole(y.square()).sum().backward()
            y = whole(y.detach())
            if model is spread:
                y = torch.cat(others(y)) if local else y
            dx = torch.cat(others(x.grad)) if model is spread else x.grad
            results.append([y, dx, *(whole(p.grad) for p in model.parameters())])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@check
def what_tensor_parallelism_is_refused(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    x = torch.ones(5, 6)
    block = parallelize_module(l0.nn.L0FeedForward(6, 8, "swiglu"), MESH[0], plan)
    with pytest.raises(ValueError, match=r"up.weight must be whole with activation='swiglu'"):
        block(x)
    block = parallelize_module(l0.nn.L0FeedForward(6, 8), MESH[0], {"up": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"down.weight must be a DTensor with placements"):
        block(x)
    block = parallelize_module(
        l0.nn.L0FeedForward(6, 8), MESH[0], {"up": RowwiseParallel(), "down": RowwiseParallel()}
    )
    with pytest.raises(ValueError, match=r"up.weight must be a DTensor with placements"):
        block(x)


@check
def fsdp1(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # Of 49 parameters each rank has 25, with a part of the gates.
    alone = of_seed(0, lambda: nn.Sequential(l0.nn.L0Linear(20, 1), nn.Linear(1, 4)))
    halves = of_seed(1, lambda: torch.randn(WORLD, 5, 20))
    for orig in (True, False):
        sharded = FullyShardedDataParallel(copy.deepcopy(alone), use_orig_params=orig, device_id=CPU)
        for broken in (l0.nn.penalty, l0.nn.expected_l0, l0.nn.export, lambda m: l0.nn.GateBank(m).draw()):
            with pytest.raises(RuntimeError, match="FullyShardedDataParallel"):
                broken(sharded)
    model = copy.deepcopy(alone)
    gates = l0.nn.keep_gates_whole(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, ignored_states=gates, device_id=CPU)
    with pytest.raises(RuntimeError, match="flattened and sharded"):
        l0.nn.penalty(sharded, weight_decay=0.1)
    l0.nn.agree_on_gates(4)
    (sharded(halves[rank]).square().mean() + l0.nn.penalty(sharded) / 30).backward()
    l0.nn.agree_on_gates(4)
    (alone(halves.flatten(0, 1)).square().mean() + l0.nn.penalty(alone) / 30).backward()
    for a, b in zip(l0.nn.gate_parameters(model), l0.nn.gate_parameters(alone), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@check
def whole_gates_of_the_meta_device(rank: int) -> None:
    with torch.device("meta"):
        model = mlp()
    gates = l0.nn.keep_gates_whole(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert len(gates) == 2
    assert all(are_equal(gate) for gate in l0.nn.gate_parameters(model))
    x = torch.ones(5, 6) * (rank + 1)
    model(x).square().sum().backward()
    assert all(are_equal(gate.grad) for gate in l0.nn.gate_parameters(model))


@check
def gradients_of_whole_gates_that_only_one_rank_uses(rank: int) -> None:
    first, second = of_seed(0, lambda: l0.nn.L0Linear(9, 4)), of_seed(1, lambda: l0.nn.L0Linear(9, 4))
    model = nn.ModuleList([first, second])
    l0.nn.keep_gates_whole(model)
    l0.nn.agree_on_gates(1)
    layer = model[rank]
    for _ in range(2):  # gradients accumulate
        layer(torch.ones(2, 9)).square().sum().backward()
    for gate in l0.nn.gate_parameters(model):
        assert are_equal(gate.grad)
        assert gate.grad.abs().sum() > 0


OLD: Any = None
CPU = torch.device("cpu")
MESH: list[Any] = []


def _work(rank: int, directory: str) -> None:
    global OLD
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(rank)
    OLD = l0.nn.GateBank(l0.nn.L0Linear(30, 4))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=20),
    )
    from torch.distributed.device_mesh import init_device_mesh

    MESH.append(init_device_mesh("cpu", (WORLD,)))
    for name, fn in CHECKS.items():
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
RANKS = """
import torch.distributed.fsdp, torch.distributed.tensor.parallel
import test_distributed as ranks

torch.set_num_threads(1)  # others would not be there after the fork
ranks.units()
torch.compile(ranks.mlp(), backend="aot_eager")(torch.ones(5, 6)).sum().backward()
torch._dynamo.reset()
torch.multiprocessing.start_processes(ranks._work, ({directory!r},), ranks.WORLD, start_method="fork")
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("ranks")
    folders = [Path(l0.__file__).parents[1], Path(__file__).parent, Path(fresh.__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = fresh.run(RANKS.format(directory=str(directory)), directory, environment)
    assert done.returncode == 0, done.stderr
    return {name: [(directory / f"{name}.{rank}").read_text() for rank in range(WORLD)] for name in CHECKS}


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")  # one worker, one pair of processes
@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, reports: dict[str, list[str]]) -> None:
    assert reports[name] == ["", ""], "\n".join(reports[name])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_process_alone_draws_from_its_generator_unless_asked_to_agree():
    gate = l0.nn.HardConcreteGate(30)
    torch.manual_seed(0)
    first = gate().z
    torch.manual_seed(0)
    assert torch.equal(gate().z, first)
    l0.nn.agree_on_gates(3)
    first = gate().z
    torch.manual_seed(0)
    assert not torch.equal(gate().z, first)
    l0.nn.agree_on_gates(3)
    assert torch.equal(gate().z, first)
    l0.nn.independent_gates_(gate)
    torch.manual_seed(0)
    first = gate().z
    torch.manual_seed(0)
    assert torch.equal(gate().z, first)


def test_an_agreement_ends_with_its_group(tmp_path: Path):
    gate = l0.nn.HardConcreteGate(30)
    for i in range(2):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{i}", rank=0, world_size=1)
        if not i:
            l0.nn.agree_on_gates(3)
            first = gate().z
        dist.destroy_process_group()
    torch.manual_seed(0)
    drawn = gate().z
    torch.manual_seed(0)
    assert torch.equal(gate().z, drawn)
    assert not torch.equal(first, drawn)


@pytest.mark.usefixtures("group")
def test_the_kth_draw_has_the_key_of_its_number():
    gate = l0.nn.HardConcreteGate(30)
    l0.nn.agree_on_gates(3)
    for k in range(3):
        seed = torch.tensor([ranks.signed(3 + ranks.KEY_STEP * k)])
        assert torch.equal(gate().z, l0.sample_gates(gate.log_alpha, seed=seed).z)


@pytest.mark.usefixtures("group")
def test_a_captured_draw_finds_its_key_advanced_at_each_replay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "_captured_keys", {})
    cpu = torch.device("cpu")
    l0.nn.agree_on_gates(3)
    agreement = ranks._agreements[dist.group.WORLD]
    with pytest.raises(RuntimeError, match="once before the capture"):
        agreement._captured(cpu)
    counter = ranks._captured_keys[cpu] = torch.zeros(1, dtype=torch.int64)
    for round in range(2):  # the second in the same memory, which a graph would read
        l0.nn.agree_on_gates(3 + round)
        agreement = ranks._agreements[dist.group.WORLD]
        keys = [agreement._captured(cpu).item() for _ in range(2)]
        start = 3 + round + ranks.KEY_STEP * ranks._CAPTURED
        assert keys == [ranks.signed(start), ranks.signed(start + ranks.KEY_STEP)]
        assert ranks._captured_keys[cpu] is counter


@pytest.mark.usefixtures("group")
def test_recomputation_is_known_again_among_a_bounded_number_of_draws(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "REMEMBERED", 4)
    layer, x = l0.nn.L0Linear(8, 4), torch.ones(2, 8, requires_grad=True)
    l0.nn.agree_on_gates(3)
    outputs = [checkpoint(layer, x, use_reentrant=False) for _ in range(5)]
    outputs[1].sum().backward()
    with pytest.raises(RuntimeError, match="within a backward that no forward has drawn"):
        outputs[0].sum().backward()


def test_a_rank_says_that_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "PATIENCE", datetime.timedelta(milliseconds=10))
    store = dist.FileStore(f"{tmp_path}/store", 2)
    store.set_timeout(datetime.timedelta(milliseconds=100))
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "get_backend", lambda *_: "gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    with (
        pytest.warns(UserWarning, match="rank 1 waits for rank 0"),
        pytest.raises(RuntimeError, match=r"has waited in vain for rank 0.*agree_on_gates"),
    ):
        ranks.agree(5)


def test_ranks_without_a_store_say_that_their_gates_differ():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    gate = l0.nn.HardConcreteGate(30)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        with pytest.warns(UserWarning, match=r"each rank draws gates of its own.*agree_on_gates"):
            first = gate().z
        assert not torch.equal(gate().z, first)
    finally:
        dist.destroy_process_group()


def test_what_needs_a_process_group_says_so():
    with pytest.raises(RuntimeError, match="init_process_group"):
        l0.nn.agree_on_gates()
    with pytest.raises(RuntimeError, match="init_process_group"):
        l0.nn.keep_gates_whole(l0.nn.HardConcreteGate(3))
    for function in (l0.nn.keep_gates_whole, l0.nn.independent_gates_):
        with pytest.raises(ValueError, match="must contain gates"):
            function(nn.Linear(2, 2))


@pytest.mark.usefixtures("group")
def test_arguments_of_the_helpers():
    with pytest.raises(ValueError, match="seed"):
        l0.nn.agree_on_gates(-1)
    with pytest.raises(TypeError, match="seed"):
        l0.nn.agree_on_gates(0.5)
    gate = l0.nn.HardConcreteGate(3)
    assert l0.nn.keep_gates_whole(gate) == {gate.log_alpha}
    assert l0.nn.keep_gates_whole(gate) == {gate.log_alpha}
    with pytest.raises(ValueError, match="group must be that"):
        l0.nn.keep_gates_whole(gate, dist.new_group([0]))
    assert copy.deepcopy(gate)._reducer is None
