"""Copies, state, dtypes, hooks, shards of a model that gate_ has gated, and what optimisers get of it."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import unit_nets
from export_nets import NETS, BasicBlock, InvertedResidual, assert_same, example, gated, is_plain, liven
from torch import nn

import l0kernels as l0
from l0kernels.nn.units.place import GatedUnits, groups_of

pytestmark = pytest.mark.filterwarnings("ignore:export has left the closed units:UserWarning")


@pytest.mark.covering(1)
@pytest.mark.parametrize("mode", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("name", NETS)
def test_copies(name, mode):
    model, x = gated(name)
    y = model(x)
    if mode == "deepcopy":
        again = copy.deepcopy(model)
    elif mode == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), y)
    for module in again.modules():
        if isinstance(module, GatedUnits):
            assert module._l0_units.groups is groups_of(again)
    # What it learns is its own.
    for gate in groups_of(again).gates:
        gate.log_alpha.data.fill_(10)
    assert torch.equal(model(x), y)
    assert not torch.equal(again(x), y)
    assert_same(l0.nn.export(again)(x), again(x))
    torch.manual_seed(5)
    again.train()(x).square().sum().backward()
    (l0.nn.penalty(again, weight_decay=0.1) / 10).backward()
    assert all(p.grad is not None for p in again.parameters())
    assert all(p.grad is None for p in model.parameters())
    l0.nn.ungate_(again)
    assert is_plain(again)


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_copies_of_what_lends_weights(name):
    model, args = unit_nets.NETS[name]()
    keys = [*model.state_dict()]
    l0.nn.gate_(model, *args)
    for gate in groups_of(model).gates:
        gate.log_alpha.data[::2] = -9.0
    y = model.eval()(*args)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(*args), y)
        assert isinstance(again[1].qkv.weight, nn.Parameter)
        again.train()(*args).sum().backward()
        assert again[1].qkv.weight.grad is again[1].qkv._parameters["weight"].grad is not None
        assert [*l0.nn.ungate_(again).state_dict()] == keys
        assert is_plain(again)


def test_a_copy_of_an_inner_layer():
    model, x = gated("resnet")
    block = copy.deepcopy(model.blocks[0])
    x = model.stem(x)
    assert torch.equal(block(x), model.blocks[0](x))
    model.blocks[0] = block  # its gates are those of the time of the copy
    assert model(example("resnet")).isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_state_dicts(name):
    model, x = gated(name)
    torch.manual_seed(9)
    dense = NETS[name][0]().eval()
    liven(dense)
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("l0_units.") for key in keys.missing_keys)
    other = NETS[name][0]()
    l0.nn.gate_(other, x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))
    keys = dense.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    before = dense(x)
    l0.nn.ungate_(other)
    assert torch.equal(other(x), before)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_dtypes(name, dtype):
    model, x = gated(name)
    y = model(x)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(p.dtype == wide for p in l0.nn.gate_parameters(model))
    small = l0.nn.export(model)
    assert all(p.dtype == dtype for p in small.parameters())
    assert_same(small(x).double(), model(x).double(), 1e-5 if dtype == torch.float64 else 0.1)
    assert_same(model(x).double(), y.double(), 1e-4 if dtype == torch.float64 else 0.2)


def test_meta_models_are_refused():
    model, _ = gated("mlp")
    with pytest.raises(ValueError, match="got gates on the meta device"):
        l0.nn.export(model.to("meta"))


@pytest.mark.parametrize("name", NETS)
def test_a_bank_draws_for_all_layers(name):
    model, x = gated(name, closed=0.2)
    model.train()
    bank = l0.nn.GateBank(model, seed=3)
    for module in model.modules():  # whose statistics would move
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    draw = bank.draw(expected=True)
    y = model(x)
    assert torch.equal(model(x), y)
    (y.square().sum()).backward()
    assert any(p.grad.any() for p in l0.nn.gate_parameters(model))
    assert set(draw.expected) == set(groups_of(model).gates)
    bank.draw()
    assert not torch.equal(model(x), y)
    with draw:
        assert torch.equal(model(x), y)
    again = l0.nn.GateBank(model, seed=3)
    again.draw()
    assert torch.equal(model(x), y)


def test_optimiser_helpers():
    model, x = gated("resnet")
    model.train()
    groups = l0.nn.parameter_groups(model, gate_lr=5.0, weight_decay=0.1, no_decay=lambda n, p: p.ndim < 2)
    assert [group["name"] for group in groups] == ["weights", "no_decay", "gates"]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[-1]["params"] == l0.nn.gate_parameters(model)
    optimizer = torch.optim.SGD(groups, 0.1)
    l0.nn.clamp_after_step(optimizer, model, limit=2.0)
    (model(x).square().mean() + l0.nn.penalty(model, weight_decay=0.1)).backward()
    optimizer.step()
    assert all(p.abs().max() <= 2 for p in l0.nn.gate_parameters(model))
    assert groups_of(l0.nn.ungate_(model)) is None


def test_hooks_see_the_gradients_of_all_units():
    model, x = gated("mixer", closed=0.5)
    model.double().train()
    l0.nn.GateBank(model, seed=3).draw()

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    before, seen = gradients(), []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    handles = [
        m.register_full_backward_hook(lambda m, gi, go: seen.append((m, go[0].shape[-1]))) for m in layers
    ]
    for a, b in zip(gradients(), before, strict=True):
        torch.testing.assert_close(a, b)
    assert set(seen) == {(m, m.out_features if isinstance(m, nn.Linear) else 8) for m in layers}
    for handle in handles:
        handle.remove()
    for a, b in zip(gradients(), before, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", [name for name in NETS if name != "mixer"])
def test_sharded(name, kept):
    """All blocks and layers with norms of their own sharded apart; the gates whole or sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, x = gated(name)
    wanted = l0.nn.penalty(alone, weight_decay=0.1)
    model = copy.deepcopy(alone)
    options = {"mesh": init_device_mesh("cpu", (1,))}
    if kept:
        options["ignored_params"] = l0.nn.keep_gates_whole(model)
    l0.nn.agree_on_gates(3)
    for module in model.modules():
        if isinstance(module, BasicBlock | InvertedResidual | nn.GroupNorm | nn.PReLU):
            fully_shard(module, **options)
    fully_shard(model, **options)
    assert_same(model(x), alone(x))
    torch.testing.assert_close(l0.nn.penalty(model, weight_decay=0.1), wanted)
    assert l0.nn.eval_l0(model) == l0.nn.eval_l0(alone)
    assert l0.nn.eval_flops(model, x.shape) == l0.nn.eval_flops(alone, x.shape)
    small = l0.nn.export(model)
    assert_same(small(x), alone(x))
    assert [p.shape for p in small.parameters()] == [p.shape for p in l0.nn.export(alone).parameters()]
    assert_same(model(x), alone(x))  # it is as it was
    model.train()
    (model(x).square().sum() + l0.nn.penalty(model, weight_decay=0.1)).backward()
    assert all(p.grad is not None for p in model.parameters())
