"""Warnings of what goes wrong in silence, and the silence where nothing does."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import nn
from l0kernels.nn.notices import LOOK_EVERY, Closing

TWICE = "a gate that layers share was drawn twice in one forward"
NO_DRAW = "a GateBank did not draw before the last two steps"
CLOSED = "every evaluation gate is closed, and stays so"
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def two_layers(kind="linear"):
    """Two layers that share a gate: the outputs of the first are the inputs of the second."""
    gate = nn.HardConcreteGate(8)
    if kind == "conv":
        first = nn.L0Conv2d(3, 8, 3, gate="out", out_gate=gate)
        return first, nn.L0Conv2d(8, 4, 3, gate="in", in_gate=gate), torch.randn(2, 3, 9, 9)
    first = nn.L0Linear(8, 8, gate="out", out_gate=gate)
    if kind == "owned":  # by the first layer
        first = nn.L0Linear(8, 8, gate="out")
        gate = first.out_gate
    second = nn.L0MLP([8, 5, 2]) if kind == "mlp" else nn.L0Linear(8, 8, in_gate=gate)
    if kind == "mlp":
        second.layers[0] = nn.L0Linear(8, 5, in_gate=gate)
    if kind == "container":
        second = nn.L0Sequential(torch.nn.ReLU(), second)
    return first, second, X


class Own(torch.nn.Module):
    """A forward of one's own around two layers."""

    def __init__(self, kind="linear"):
        super().__init__()
        self.first, self.second, self.x = two_layers(kind)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


# ---- a shared gate


@pytest.mark.parametrize("kind", ["linear", "owned", "conv", "mlp", "container"])
def test_a_shared_gate_drawn_by_two_layers(kind):
    model = Own(kind)
    with pytest.warns(UserWarning, match=f"{TWICE}, by L0.*L0.*GateBank") as seen:
        model(model.x)
    assert len(seen) == 1
    model(model.x).sum().backward()  # once


def test_two_layers_that_read_the_same_x_through_one_gate():
    gate = nn.HardConcreteGate(8)
    query, key = nn.L0Linear(8, 4, in_gate=gate), nn.L0Linear(8, 4, in_gate=gate)
    with pytest.warns(UserWarning, match=TWICE):
        query(X) * key(X)


def test_a_draw_of_ones_own_that_is_handed_to_one_layer_only():
    first, second, x = two_layers()
    hidden = first(x, out_gates=first.out_gate())
    with pytest.warns(UserWarning, match=f"{TWICE}, by a call of its own and by L0Linear"):
        second(hidden)


def test_a_plain_container_of_torch():
    first, second, x = two_layers()
    with pytest.warns(UserWarning, match=TWICE):
        torch.nn.Sequential(first, torch.nn.ReLU(), second)(x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_draw_is_silent(kind):
    first, second, x = two_layers(kind)
    nn.L0Sequential(first, torch.nn.ReLU(), second)(x).sum().backward()
    gates = first.out_gate()
    second(first(x, out_gates=gates), in_gates=gates).sum().backward()
    model = Own(kind)
    bank = nn.GateBank(model)
    for _ in range(2):
        bank.draw()
        model(x).sum().backward()
        checkpoint(model, x, use_reentrant=False).sum().backward()
    model.eval()
    model(x)


def test_what_is_not_trained_is_silent():
    model = Own()
    with torch.no_grad():
        model(X)


def test_layers_called_in_a_loop_draw_anew():
    cell = nn.L0Linear(8, 8, in_gate=nn.HardConcreteGate(8))
    first, second, _ = two_layers()
    block = nn.L0Sequential(first, torch.nn.Tanh(), second)
    h, g = X, X
    for _ in range(3):
        h, g = torch.tanh(cell(h)), block(g)
    (h + g).sum().backward()


def test_two_models_with_one_gate_are_silent():
    """Each reads data of its own, forward by forward, and the same data after a step."""
    gate = nn.HardConcreteGate(8)
    models = [nn.L0Linear(8, 4, in_gate=gate) for _ in range(2)]
    optimizer = torch.optim.SGD(torch.nn.ModuleList(models).parameters(), 0.1)
    for model in models:
        model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    for model in models:
        (model(X).sum() + nn.penalty(model)).backward()
        optimizer.step()


def test_shared_gates_in_transforms_and_compiled_are_silent():
    model = Own()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    torch.func.grad(loss)(parameters, X)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(X).sum().backward()


def test_what_is_noted_of_draws_is_not_copied():
    first, _, x = two_layers()
    first(x)
    assert "_last_draw" in first.out_gate.__dict__
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert "_last_draw" not in twin.out_gate.__dict__
        assert twin.out_gate.shared


def test_a_long_graph_is_searched_so_far_only():
    first, second, x = two_layers()
    hidden = first(x)
    for _ in range(3000):
        hidden = hidden + 1
    second(hidden)


# ---- a GateBank


def trained(model, **options):
    optimizer = torch.optim.SGD(nn.parameter_groups(model, gate_lr=0.1), lr=0.01, **options)
    nn.clamp_after_step(optimizer, model)
    return optimizer


def step(model, optimizer, x=X):
    optimizer.zero_grad()
    (model(x).square().mean() + nn.penalty(model) / 100).backward()
    optimizer.step()


def test_a_bank_that_never_draws():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = trained(model)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=f"{NO_DRAW} .*each layer draws for itself") as seen:
        step(model, optimizer)
    assert len(seen) == 1
    step(model, optimizer)  # once
    assert bank.step.item() == 0


def test_a_draw_that_is_forgotten():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = trained(model)
    bank.draw()
    for _ in range(2):
        step(model, optimizer)
    with pytest.warns(UserWarning, match=f"{NO_DRAW} .*gates of an old draw"):
        step(model, optimizer)


def test_each_draw_starts_anew():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = trained(model)
    for _ in range(6):
        bank.draw()
        for _ in range(3):  # gradients of several forwards, or of two branches with the same gates
            (model(X).sum() + model(X + 1).sum()).backward()
        checkpoint(model, X, use_reentrant=False).sum().backward()
        optimizer.step()


def test_several_optimisers_step_for_one_draw():
    model, other = nn.L0MLP([8, 6, 2]), torch.nn.Linear(8, 2)
    bank = nn.GateBank(model)
    weights = torch.optim.Adam(nn.weight_parameters(model))
    gates = torch.optim.Adam(nn.gate_parameters(model), 0.02)
    nn.clamp_after_step(gates, model)
    strange = torch.optim.SGD(other.parameters(), 0.1)
    for _ in range(4):
        bank.draw()
        (model(X).square().mean() + other(X).mean()).backward()
        for optimizer in (gates, weights, strange, strange, strange):
            optimizer.step()


def test_a_draw_for_several_evaluations_of_one_step():
    torch.manual_seed(0)  # steps of this optimiser on random draws may diverge
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        bank.draw()
        optimizer.step(closure)


def test_draws_kept_on_purpose():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = trained(model)
    kept = bank.draw()
    for _ in range(5):
        with kept:
            step(model, optimizer)
    bank.clear()
    for _ in range(5):
        step(model, optimizer)


def test_models_in_eval_and_frozen_gates_need_no_draw():
    model = nn.L0MLP([8, 6, 2]).eval()
    bank = nn.GateBank(model)
    optimizer = trained(model)
    for _ in range(4):
        step(model, optimizer)
    model.train()
    for log_alpha in nn.gate_parameters(model):
        log_alpha.requires_grad_(False)
    optimizer = torch.optim.SGD(nn.weight_parameters(model), 0.01)
    bank.draw()
    for _ in range(4):
        model(X).sum().backward()
        optimizer.step()


def test_draws_in_a_compiled_step_are_seen():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model, seed=1)
    optimizer = trained(model)

    def loss(x):
        bank.draw()
        return model(x).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        compiled(X).backward()
        optimizer.step()
    assert bank.step.item() == 5


def test_a_bank_that_is_gone_is_not_looked_at():
    model = nn.L0MLP([8, 6, 2])
    nn.GateBank(model)
    optimizer = trained(model)
    for _ in range(4):
        step(model, optimizer)


def test_a_bank_drawn_in_another_thread():
    model = nn.L0MLP([8, 6, 2])
    bank = nn.GateBank(model)
    optimizer = trained(model)
    for _ in range(4):
        thread = threading.Thread(target=bank.draw)
        thread.start()
        thread.join()
        step(model, optimizer)


# ---- closed layers


def close(gate, value=-4.0):
    with torch.no_grad():
        gate.log_alpha.fill_(value)


def steps(model, optimizer, n):
    """Steps that are the penalty's alone."""
    for _ in range(n):
        optimizer.zero_grad()
        nn.penalty(model).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_a_layer_that_closes_is_named(mode):
    model = torch.nn.ModuleDict({"block": nn.L0MLP([8, 6, 2], eval_mode=mode)})
    optimizer = trained(model)
    model["block"].layers[0].in_gate.lam = 0.0
    close(model["block"].layers[1].in_gate)
    steps(model, optimizer, 2 * LOOK_EVERY - 1)
    with pytest.warns(UserWarning, match=rf"{CLOSED}, of block\.layers\.1\.in_gate \(lam=0\.1\)") as seen:
        steps(model, optimizer, 1)
    assert len(seen) == 1
    assert "layers.0" not in str(seen[0].message)
    steps(model, optimizer, 3 * LOOK_EVERY)  # once


def test_a_group_of_units_that_closes_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    nn.gate_(model, X)
    optimizer = trained(model)
    close(model.l0_units.gates[0])
    with pytest.warns(UserWarning, match=rf"{CLOSED}, of 0 \(lam"):
        steps(model, optimizer, 2 * LOOK_EVERY)


def test_closed_too_soon_in_training():
    """A penalty that is not divided by the number of examples."""
    torch.manual_seed(0)
    model = nn.L0MLP([8, 6, 2])
    optimizer = torch.optim.Adam(nn.parameter_groups(model), 1e-3)
    nn.clamp_after_step(optimizer, model)

    def train():
        for _ in range(5 * LOOK_EVERY):
            optimizer.zero_grad()
            (model(X).square().mean() + nn.penalty(model)).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=CLOSED) as seen:
        train()
    assert 1 <= len(seen) <= 2
    text = " ".join(str(one.message) for one in seen)
    assert "layers.0.in_gate" in text
    assert "layers.1.in_gate" in text


def test_open_layers_and_those_that_open_are_silent():
    model = nn.L0MLP([8, 6, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    nn.clamp_after_step(optimizer, model)
    gate = model.layers[0].in_gate
    close(model.layers[1].in_gate)
    with torch.no_grad():
        model.layers[1].in_gate.log_alpha[3] = -2.3  # one is open
    close(gate, -4.0)
    for _ in range(4 * LOOK_EVERY):  # it starts closed, as with a droprate_init of .98, and rises
        optimizer.zero_grad()
        (-gate.log_alpha.sum()).backward()
        optimizer.step()
    assert int(gate.eval_gates().count[0]) == 0


def test_gates_that_are_not_trained_and_single_ones_are_silent():
    model = torch.nn.ModuleList([nn.L0Linear(8, 4), nn.L0Linear(8, 4, in_gate=nn.HardConcreteGate(1))])
    optimizer = trained(model)
    for gate in nn.gate_modules(model):
        close(gate)
    model[0].in_gate.log_alpha.requires_grad_(False)
    steps(model, optimizer, 3 * LOOK_EVERY)


def test_gates_with_evaluation_gates_of_their_own_are_not_judged():
    class Always(nn.HardConcreteGate):
        def eval_gates(self):
            return l0.Gates.from_z(torch.ones(self.n), full_grad=False)

    model = nn.L0Linear(8, 4, in_gate=Always(8))
    optimizer = trained(model)
    close(model.in_gate)
    steps(model, optimizer, 3 * LOOK_EVERY)


def test_what_a_device_has_not_found_yet_is_read_later():
    class Event:
        done = False

        def query(self):
            return self.done

    gate, event = nn.HardConcreteGate(3), Event()
    closing = Closing({gate: "gate"})
    closing._asked += [([gate], torch.tensor([-1.0]), event), ([gate], torch.tensor([-1.0]), event)]
    closing._read()
    event.done = True
    with pytest.warns(UserWarning, match=f"{CLOSED}, of gate"):
        closing._read()
    assert not closing._asked


def test_after_the_handle_is_removed_nothing_looks():
    model = nn.L0MLP([8, 6, 2])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = nn.clamp_after_step(optimizer, model)
    close(model.layers[0].in_gate)
    handle.remove()
    steps(model, optimizer, 3 * LOOK_EVERY)


def test_a_compiled_step_clamps_and_does_not_look():
    model = nn.L0MLP([8, 6, 2])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    nn.clamp_after_step(optimizer, model)
    close(model.layers[0].in_gate, -9.0)
    nn.penalty(model).backward()
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="aot_eager")()
    assert model.layers[0].in_gate.log_alpha.min().item() == pytest.approx(-4.6052, abs=1e-4)


def test_a_trained_model_is_saved_as_before():
    model = Own()
    bank = nn.GateBank(model)
    bank.draw()
    file = io.BytesIO()
    torch.save([model, bank], file)
    assert file.tell()
