"""Models sharded over ranks, and budgets that ranks keep to together. Two processes run all checks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_ranks import MESH, MODELS, WORLD, are_equal, images, mlp, of_seed, others, whole

import l0kernels as l0

CHECKS: dict[str, Callable[[int], None]] = {}


def check(fn: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[fn.__name__] = fn
    return fn


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


CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")  # one worker, one pair of processes
@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, reports: dict[str, list[str]]) -> None:
    assert reports[name] == ["", ""], "\n".join(reports[name])
