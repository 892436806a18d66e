"""Gates that ranks draw alike, or each its own, and how they agree. Two processes run all checks."""

import copy
import datetime
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_ranks import MODELS, OLD, WORLD, are_equal, mlp, of_seed

import l0kernels as l0
from l0kernels.nn import ranks

CHECKS: dict[str, Callable[[int], None]] = {}


def check(fn: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[fn.__name__] = fn
    return fn


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
    assert not are_equal(OLD[0].seed)
    OLD[0].draw()
    assert are_equal(OLD[0].seed)
    seed = OLD[0].seed.clone()
    OLD[0].draw()
    assert torch.equal(seed, OLD[0].seed)
    assert OLD[0].step == 2


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
