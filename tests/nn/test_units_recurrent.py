"""gate_ on recurrent layers, whose hidden units are gated, against the oracle of unit_oracle."""

import copy
import pickle

import pytest
import torch
import unit_nets
import unit_oracle
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from unit_examples import rows

import l0kernels as l0
from l0kernels import _checks
from l0kernels.nn.units import narrow, recurrent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = {
    "rnn": lambda *sizes, **options: nn.RNN(*sizes, **options),
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


SEEN: list[torch.Tensor] = []
"""What recurrent layers have made in the last forward of a Stack or Cell."""


class Stack(nn.Module):
    """A layer between linear ones."""

    def __init__(self, rnn, given=False):
        super().__init__()
        self.first, self.rnn = nn.Linear(3, rnn.input_size), rnn
        self.last = nn.Linear(rnn.hidden_size * (1 + rnn.bidirectional), 2)
        shape = (rnn.num_layers * (1 + rnn.bidirectional), 2, rnn.hidden_size)
        self.states = [torch.randn(shape).double() for _ in range(1 + isinstance(rnn, nn.LSTM))] * given

    def forward(self, x):
        state = tuple(self.states) if len(self.states) > 1 else self.states[0] if self.states else None
        if state is not None and x.ndim == 2:
            state = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
        y, last = self.rnn(torch.tanh(self.first(x)), state)
        SEEN[:] = y, *(last if isinstance(last, tuple) else (last,))
        return self.last(y)


class Cell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(3, 5), cell, nn.Linear(4, 2)

    def forward(self, x):
        state, outs = None, []
        SEEN.clear()
        for step in self.first(x).unbind(0):
            state = self.cell(step, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
            SEEN.extend([*state] if isinstance(state, tuple) else [state])
        return self.last(torch.stack(outs))


def gated(model, *args, **options):
    model = model.double()
    plain = copy.deepcopy(model)
    return model, plain, l0.nn.gate_(model, *args, **options), args


def check(case, pattern, train=True):
    model, plain, graph, args = case
    unit_oracle.set_gates(graph, model, pattern)
    model.train(train)
    unit_oracle.check(plain, model, graph, args, f"{pattern}, {'train' if train else 'eval'}")


# ---- what is computed

OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 3, "batch_first": True},
    "both ways": {"bidirectional": True, "bias": False},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_stacks(kind, options, monkeypatch):
    rnn = KINDS[kind](5, 4, **OPTIONS[options])
    case = gated(Stack(rnn, given=options in ("deep", "both ways")), rows(2, 2, 3))
    assert [group.name for group in case[2].groups] == ["first", "rnn"]
    for pattern in ("open", "closed", "half", "one unit open", "fractional", "mixed"):
        check(case, pattern)
    check(case, "mixed", False)
    alone = *case[:3], (rows(3, 3),)  # a sequence without others
    check(alone, "mixed")
    monkeypatch.setattr(_checks, "readable", lambda: False)
    for other in (case, alone):
        check(other, "mixed")
    check(case, "closed")


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, monkeypatch):
    case = gated(Cell(CELLS[kind](5, 4)), rows(3, 2, 3))
    for pattern in ("open", "closed", "half", "fractional", "mixed"):
        check(case, pattern)
    alone = *case[:3], (rows(3, 3),)
    check(alone, "mixed", False)
    monkeypatch.setattr(_checks, "readable", lambda: False)
    for other in (case, alone):
        check(other, "mixed")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("net", [*KINDS, *(f"{kind} cell" for kind in CELLS)])
def test_closed_units_are_zero_at_every_step(net, static, monkeypatch):
    """Given states, which are not, included; and all steps see one draw."""
    if net in KINDS:
        model = Stack(KINDS[net](5, 16, 2, bidirectional=True), given=True)
    else:
        model = Cell(CELLS[net.split()[0]](5, 4))
    model, _, graph, args = gated(model, rows(6, 2, 3))
    unit_oracle.set_gates(graph, model, "fractional")
    if static:
        monkeypatch.setattr(_checks, "readable", lambda: False)
    sets = set()
    for _ in range(10):
        model(*args)
        drawn = model.l0_units._recent[-1].z[:-1].split([group.units for group in graph.groups])[1]
        for y in SEEN:
            y = narrow.plain(y)
            units = y.reshape(-1, len(drawn)).ne(0)
            assert not units[:, drawn == 0].any()
            if net != "rnn_relu":
                assert units[:, drawn != 0].all()
        sets.add(tuple((drawn == 0).tolist()))
    assert len(sets) > 1


def test_steps_share_the_weights_of_what_exists(monkeypatch):
    model, _, graph, args = gated(Cell(nn.GRUCell(5, 4)), rows(6, 2, 3))
    unit_oracle.set_gates(graph, model, "half")
    made, sizes, gru = [], [], torch._VF.gru_cell
    whole = recurrent.narrow_weight
    monkeypatch.setattr(recurrent, "narrow_weight", lambda w, *rest: made.append(w) or whole(w, *rest))
    monkeypatch.setattr(torch._VF, "gru_cell", lambda *a: sizes.append([t.shape for t in a]) or gru(*a))
    model(*args)
    assert [id(w) for w in made] == [id(model.cell.weight_ih), id(model.cell.weight_hh)]
    n = [int((gate.log_alpha > 0).sum()) for gate in model.l0_units.gates]
    assert sizes == [[(2, n[0]), (2, n[1]), (3 * n[1], n[0]), (3 * n[1], n[1]), (3 * n[1],), (3 * n[1],)]] * 6
    assert 0 < n[1] < 4
    assert model.l0_units._recent[-1].recurrent is None
    with torch.no_grad():  # in a forward that changes its mind
        model(*args)
    model.cell.register_forward_hook(lambda *_: None)
    made.clear()
    model.eval()
    model(*args), model(*args)
    assert len(made) == 4


def test_dropout_between_layers():
    model, plain, graph, args = gated(Stack(nn.LSTM(5, 6, 3, dropout=0.5)), rows(4, 2, 3))
    unit_oracle.set_gates(graph, model, "open")
    found = []
    for net in (model, plain):
        torch.manual_seed(1)
        found.append(net(*args))
        torch.manual_seed(1)
    model.l0_units.eval()
    torch.manual_seed(1)
    torch.testing.assert_close(model(*args), found[1])
    unit_oracle.set_gates(graph, model, "half")
    model.train()
    assert not torch.equal(model(*args), model(*args))
    check((model, plain, graph, args), "mixed", False)


@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation_modes(mode):
    model, plain, graph, args = gated(Stack(nn.GRU(5, 8)), rows(3, 2, 3), eval_mode=mode)
    for pattern in ("fractional", "mixed"):
        check((model, plain, graph, args), pattern, False)
        torch.testing.assert_close(l0.nn.export(model)(*args), model(*args))


class Sequences(nn.Module):
    """A model whose input is packed."""

    def __init__(self, returns=False):
        super().__init__()
        self.one, self.two, self.last = nn.LSTM(3, 6), nn.GRU(6, 5, bidirectional=True), nn.Linear(10, 2)
        self.returns = returns

    def forward(self, packed):
        y, _ = self.two(self.one(packed)[0])
        if self.returns:
            return y
        self.kind = type(y.data)
        return self.last(y.data)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_inputs(enforce_sorted):
    lengths = [4, 2, 1] if enforce_sorted else [1, 4, 2]
    packed = pack_padded_sequence(rows(4, 3, 3), lengths, enforce_sorted=enforce_sorted)
    case = gated(Sequences(), packed)
    for pattern in ("half", "mixed"):
        check(case, pattern)
    assert case[0].kind is narrow.Narrow
    assert [group.name for group in case[2].groups] == ["one", "two"]
    model = case[0].eval()
    torch.testing.assert_close(l0.nn.export(model)(packed), model(packed))
    graph = l0.nn.unit_graph(Sequences(returns=True).double(), packed)
    assert [group.name for group in graph.groups] == ["one"]


def test_activations_stay_narrow():
    """Through what people do to sequences."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.GRU(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            steps = [*x.unbind(0)]
            stacked = torch.stack([x.select(0, 0), *steps[1:]], -2).transpose(0, 1)
            y, last = self.b(pack_padded_sequence(stacked, [4, 2], enforce_sorted=False))
            y, _ = pad_packed_sequence(y)
            y = y.index_select(0, torch.arange(3)) + last
            seen.extend([x, steps[0], stacked, y])
            return self.c(y)

    model, plain, graph, args = gated(Net(), rows(4, 2, 3))
    check((model, plain, graph, args), "half")
    model(*args)
    assert all(type(x) is narrow.Narrow and x._at is not None for x in seen[-4:])
    assert [x.shape[-1] for x in seen[-4:]] == [6, 6, 6, 8]


# ---- what is exported and counted


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["gru", "cells", "translator", "packed"])
def test_export(name, seed):
    torch.manual_seed(seed)
    model, args = unit_nets.NETS[name]()
    plain = copy.deepcopy(model)
    graph = l0.nn.gate_(model, *args)
    unit_oracle.set_gates(graph, model, "mixed", seed)
    model.eval()
    small = l0.nn.export(model)
    torch.testing.assert_close(small(*args), model(*args))
    count = sum(p.numel() for p in small.parameters())
    closed = [int((gate.eval_gates().z == 0).sum()) for gate in model.l0_units.gates]
    assert count < sum(p.numel() for p in plain.parameters())
    if all(n < group.units for n, group in zip(closed, graph.groups, strict=True)):
        assert count == l0.nn.eval_l0(model)
    for layer in small.modules():
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            options = {
                key: getattr(layer, key) for key in ("num_layers", "bidirectional") if hasattr(layer, key)
            }
            new = type(layer)(layer.input_size, layer.hidden_size, bias=layer.bias, **options).double()
            new.load_state_dict(layer.state_dict())
            if isinstance(layer, nn.RNNBase):
                assert [*map(id, layer._flat_weights)] == [*map(id, layer.parameters())]
                layer.flatten_parameters()
    again = pickle.loads(pickle.dumps(small)).train()
    unit_oracle.loss_of(again(*args)).backward()
    assert all(p.grad is not None for p in again.parameters())
    for multiple in (2, 4):
        torch.testing.assert_close(l0.nn.export(model, multiple_of=multiple)(*args), model(*args))


def test_a_state_given_to_the_model_keeps_its_size():
    model, args = unit_nets.NETS["two_ways"]()
    graph = l0.nn.gate_(model, *args)
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    small = l0.nn.export(model)
    assert small.rnn.hidden_size == 4
    assert small.one.hidden_size == 5  # a number that stands in the forward does, too
    assert small.rnn.input_size < 6
    torch.testing.assert_close(small(*args), model(*args))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_a_unit_closes(kind):
    """One closed unit leaves an export that is smaller by as many."""
    rnn = KINDS[kind](5, 4, 2, bidirectional=True)
    model, plain, graph, _ = gated(Stack(rnn), rows(3, 2, 3))
    unit_oracle.set_gates(graph, model, "open")
    model.l0_units.gates[1].log_alpha.data[2] = -40
    small = l0.nn.export(model.eval())
    sizes = [sum(p.numel() for p in net.parameters()) for net in (plain, small)]
    assert sizes[0] - sizes[1] == graph["rnn"].parameters
    assert sizes[1] == l0.nn.eval_l0(model)
    gates = 4 if kind == "lstm" else 3 if kind == "gru" else 1
    of_rows = gates * (2 * (5 + 4 + 2) + 2 * (8 + 4 + 2))
    columns = (4 * gates - gates) * (4 + 2 * 2)
    assert graph["rnn"].parameters == of_rows + columns + 2 * 2


def test_state_dicts_hooks_and_copies():
    model, plain, graph, args = gated(Stack(nn.LSTM(5, 4, 2)), rows(3, 2, 3))
    unit_oracle.set_gates(graph, model, "half")
    model.eval(), plain.eval()
    y = model(*args)
    keys = [key for key in model.state_dict() if not key.startswith("l0_units")]
    assert keys == [*plain.state_dict()]
    plain.load_state_dict({key: model.state_dict()[key] for key in keys})
    assert isinstance(model.rnn, nn.LSTM)
    assert repr(model.rnn) == repr(plain.rnn)
    model.rnn.flatten_parameters()
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(model)(*args), y)
    single = copy.deepcopy(model).float()
    assert single.rnn._flat_weights[0].dtype == torch.float32
    torch.testing.assert_close(single(args[0].float()), y.float(), rtol=1e-4, atol=1e-4)
    shapes = []
    model.rnn.register_forward_hook(lambda m, a, out: shapes.extend([out[0].shape, out[1][1].shape]))
    model.rnn.register_forward_pre_hook(lambda m, a: (a[0] + 0, *a[1:]))
    torch.testing.assert_close(model(*args), y)
    assert shapes == [(3, 2, 4), (2, 2, 4)]
    model.rnn.register_full_backward_hook(lambda m, gi, go: shapes.append(go[0].shape))
    model(*args).sum().backward()
    assert shapes[-1] == (3, 2, 4)
    l0.nn.ungate_(model)
    assert type(model.rnn) is nn.LSTM


# ---- what is not gated, and what is refused


class Own(nn.GRU):
    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


class Functional(nn.Module):
    """Calls torch's function itself, with weights of its own."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 4)

    def forward(self, x):
        weights = [*self.rnn.parameters()]
        return torch.gru(x, x.new_zeros(1, 2, 4), weights, True, 1, 0.0, False, False, False)


class Around(nn.Module):
    def __init__(self, rnn, returns=False):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(3, 5), rnn, nn.Linear(4, 2)
        self.returns = returns

    def forward(self, x):
        y, state = self.rnn(self.first(x))
        return (self.last(y), state) if self.returns else self.last(y)


def normed():
    rnn = nn.GRU(5, 4)
    return nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Around(nn.LSTM(5, 6, proj_size=4)), "lstm in rnn"),
        (lambda: Around(Own(5, 4)), "gru in rnn"),
        (lambda: Around(Functional()), "gru in rnn"),
        (lambda: Around(normed()), "gru in rnn"),
    ],
)
def test_what_is_no_layer_of_torch_is_pinned(model, why):
    model, args = model().double(), (rows(3, 2, 3),)
    graph = l0.nn.unit_graph(model, *args)
    assert graph.groups == ()
    assert why in next(pin.why for pin in graph.pinned if (pin.name, pin.dim) == ("first.weight", 0))


def test_a_state_that_the_model_returns_is_pinned():
    args = (rows(3, 2, 3),)
    graph = l0.nn.unit_graph(Around(nn.GRU(5, 4), returns=True).double(), *args)
    assert [group.name for group in graph.groups] == ["first"]
    why = {pin.name: pin.why for pin in graph.pinned}
    assert why["rnn.weight_hh_l0"] == "output of the model"


@pytest.mark.parametrize("pattern", ["open", "half"])
def test_wrong_sizes_are_refused(pattern):
    model, _, graph, _ = gated(Around(nn.GRU(5, 4)), rows(3, 2, 3))
    unit_oracle.set_gates(graph, model, pattern)
    model.eval()
    with pytest.raises(RuntimeError, match=r"input must have 5 as its last size, got shape \(3, 2, 6\)"):
        model.rnn(rows(3, 2, 6))
    with pytest.raises(RuntimeError, match=r"hx must have 4 as its last size, got shape \(1, 2, 5\)"):
        model.rnn(rows(3, 2, 5), rows(1, 2, 5))
    with pytest.raises(RuntimeError, match="hx should also be 3-D"):
        model.rnn(rows(3, 2, 5), rows(2, 4))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        model.rnn(rows(3, 2, 5), rows(1, 3, 4))
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
        model.rnn(rows(3, 2, 1, 5))
    with pytest.raises(TypeError, match="input must be a"):
        model.rnn([1.0])


# ---- elsewhere


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["gru", "cells", "translator"])
def test_functional_call_meta_and_export(name):
    torch.manual_seed(0)
    model, args = unit_nets.NETS[name]()
    graph = l0.nn.gate_(model, *args)
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    y = model(*args)
    unit_oracle.loss_of(y).backward()
    values = {k: v.detach() for k, v in model.named_parameters()}
    grads = torch.func.grad(lambda p: unit_oracle.loss_of(torch.func.functional_call(model, p, args)))(values)
    for key, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grads[key], grad)
    torch.testing.assert_close(torch.export.export(model, args).module()(*args), y)
    torch.testing.assert_close(torch.jit.trace(model, args)(*args), y)
    assert copy.deepcopy(model).to("meta")(*(arg.to("meta") for arg in args)).shape == y.shape
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(*args), y)


def test_autocast():
    model, _, graph, args = gated(Stack(nn.GRU(5, 4)), rows(3, 2, 3))
    unit_oracle.set_gates(graph, model, "half")
    model.eval()
    expected = model(*args)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(args[0].float())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.long), True])
def test_compile(train):
    model, _, graph, args = gated(Cell(nn.LSTMCell(5, 4)), rows(2, 2, 3))
    unit_oracle.set_gates(graph, model, "half")
    model.train(train)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=not train)
    unit_oracle.loss_of(model(*args)).backward()
    out = compiled(*args)
    unit_oracle.loss_of(out).backward()
    torch.testing.assert_close(out, model(*args))
    for mine, other in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class Remembers(nn.Module):
    """A checkpoint around some steps."""

    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(3, 5), nn.GRUCell(5, 4), nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def read(self, x, h):
        for step in x.unbind(0):
            h = self.cell(step, h)
        return h

    def forward(self, x):
        x, h = self.first(x), None
        for part in x.split(2):
            h = (
                checkpoint(self.read, part, h, use_reentrant=False)
                if self.checkpointed
                else self.read(part, h)
            )
        return self.last(h)


@pytest.mark.parametrize("pattern", ["half", "mixed"])
def test_checkpoints(pattern):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, _, graph, args = gated(Remembers(checkpointed), rows(6, 2, 3))
        unit_oracle.set_gates(graph, model, pattern)
        torch.manual_seed(1)
        for _ in range(2):
            unit_oracle.loss_of(model(*args)).backward()
        found.append([p.grad for p in model.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_inputs_and_blocks():
    for options in ({"inputs": True}, {"block": 3}, {"inputs": True, "block": 2}):
        model, plain, graph, args = gated(Around(nn.GRU(5, 4)), rows(3, 2, 3), **options)
        check((model, plain, graph, args), "mixed")
        torch.testing.assert_close(l0.nn.export(model.eval())(*args), model(*args))


def test_weights_of_two_cells_may_be_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.a, self.b = nn.GRUCell(4, 4), nn.GRUCell(4, 4)
            self.b.weight_hh = self.a.weight_hh

        def forward(self, x):
            x = self.first(x)
            return self.last(F.relu(self.b(x, self.a(x))))

    case = gated(Tied(), rows(3, 3))
    assert [group.name for group in case[2].groups] == ["first", "a"]
    for pattern in ("half", "mixed"):
        check(case, pattern)
    model = case[0].eval()
    torch.testing.assert_close(l0.nn.export(model)(*case[3]), model(*case[3]))


def test_results_of_packed_kind_are_dense_outside():
    packed = pack_padded_sequence(rows(4, 2, 3), [4, 2])
    model, _, graph, _ = gated(Sequences(returns=True), packed)
    unit_oracle.set_gates(graph, model, "half")
    out = model(packed)
    assert type(out) is PackedSequence
    assert type(out.data) is torch.Tensor
