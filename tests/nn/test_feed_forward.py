"""L0FeedForward: gates on the hidden units of a block, equal to the dense formula for the same seed."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from l0kernels import _checks, nn, reference
from l0kernels._arguments import GLU, ROWS
from l0kernels.nn.cost import cost_of
from l0kernels.reference.budget import Terms
from op_checks import count_open

D, H = 13, 29
L = math.log(0.1 / 1.1)
PLAIN = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "identity": torch.nn.Identity,
}
ACTIVATIONS = list(ROWS)


def make(activation="swiglu", **options):
    torch.manual_seed(0)
    block = nn.L0FeedForward(D, H, activation, **options)
    with torch.no_grad():
        block.hidden_gate.log_alpha.normal_(0, 3)
    return block


def dense_formula(block, x, mode=None):
    """The same block by the reference; draws its seed from torch's generator like the module."""
    log_alpha = block.hidden_gate.log_alpha
    drawn = reference.sample_gates([log_alpha]) if mode is None else reference.eval_gates([log_alpha], mode)
    weights, biases = [block.up.weight, block.down.weight], [block.up.bias, block.down.bias]
    return reference.gated_mlp(x, weights, biases, [None, *drawn], block.activation)


def llama(bias=False, dtype=None):
    """gate_proj, up_proj, down_proj."""
    shapes = ((D, H), (D, H), (H, D))
    return [torch.nn.Linear(n_in, n_out, bias, dtype=dtype) for n_in, n_out in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)])
def test_training_is_the_reference_of_the_same_seed(activation, bias):
    block = make(activation, bias=bias)
    twin = copy.deepcopy(block)
    x = torch.randn(4, 5, D, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    dy = torch.randn(4, 5, D)
    torch.manual_seed(11)
    y = block(x)
    torch.manual_seed(11)
    y_twin = dense_formula(twin, x_twin)
    torch.testing.assert_close(y, y_twin)
    y.backward(dy)
    y_twin.backward(dy)
    torch.testing.assert_close(x.grad, x_twin.grad)
    for (name, mine), theirs in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    grad, twin_grad = block.hidden_gate.log_alpha.grad, twin.hidden_gate.log_alpha.grad
    assert torch.equal(grad != 0, twin_grad != 0)
    assert grad.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["paper", "median", "topk"])
def test_evaluation(activation, mode):
    block = make(activation, eval_mode=mode).eval()
    x = torch.randn(8, D)
    torch.testing.assert_close(block(x), dense_formula(block, x, mode))
    assert torch.equal(block(x), block(x))


def test_forward_with_known_gates():
    block = make()
    gates = block.hidden_gate()
    x = torch.randn(4, D)
    gate, up = F.linear(x, block.up.weight, block.up.bias).split(H, -1)
    expected = F.linear(F.silu(gate) * up * gates.z, block.down.weight, block.down.bias)
    torch.testing.assert_close(block(x, gates), expected)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_one_draw_and_one_product_per_forward(monkeypatch, backend, activation):
    calls = []
    for name in ("sample", "gated_mlp", "gated_mlp_backward", "l0_mlp", "l0_mlp_backward"):
        operator = getattr(nn.bank.sample_gates.__globals__["_ops"], name)

        def counted(*args, name=name, operator=operator):
            calls.append(name)
            return operator(*args)

        monkeypatch.setattr(f"l0kernels._ops.{name}", counted)
    make(activation)(torch.randn(4, D)).sum().backward()
    within = backend == "cpp" and activation == "relu"
    assert calls == (
        ["l0_mlp", "l0_mlp_backward"] if within else ["sample", "gated_mlp", "gated_mlp_backward"]
    )


def test_names_shapes_and_initialisation():
    state = make("swiglu").state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "up.weight": (2 * H, D),
        "up.bias": (2 * H,),
        "down.weight": (D, H),
        "down.bias": (D,),
        "hidden_gate.log_alpha": (H,),
    }
    assert make("gelu").up.weight.shape == (H, D)
    for layer in (make().up, make().down):
        bound = layer.in_features**-0.5
        assert bound * 0.9 < layer.weight.abs().max() <= bound
    assert repr(make("gelu")).startswith("L0FeedForward(\n  13, 29, activation='gelu'\n  (up): Linear(")


@pytest.mark.parametrize(("activation", "act"), [("swiglu", F.silu), ("geglu", F.gelu)])
@pytest.mark.parametrize("bias", [True, False])
def test_from_three_layers(activation, act, bias):
    gate, up, down = (layer.eval() for layer in llama(bias, torch.float64))
    up.weight.requires_grad_(False)
    down.weight.requires_grad_(False)
    block = nn.L0FeedForward.from_dense(gate, up, down, activation=activation, lam=0.25, eval_mode="median")
    assert (block.activation, block.hidden_gate.lam, block.training) == (activation, 0.25, False)
    assert not block.down.weight.requires_grad
    with torch.no_grad():
        block.hidden_gate.log_alpha.fill_(60.0)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    torch.testing.assert_close(block(x), down(act(gate(x)) * up(x)))
    assert torch.equal(block.up.weight, torch.cat((gate.weight, up.weight)))
    assert nn.L0FeedForward.from_dense(*llama()).activation == "swiglu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_from_a_sequential(activation, bias):
    act = nn.GatedProduct(PLAIN[GLU[activation]]()) if activation in GLU else PLAIN[activation]()
    dense = torch.nn.Sequential(
        torch.nn.Linear(D, H * ROWS[activation], bias), act, torch.nn.Linear(H, D, bias)
    )
    block = nn.L0FeedForward.from_dense(dense, droprate_init=0.2)
    assert block.activation == activation
    assert block.training
    with torch.no_grad():
        block.hidden_gate.log_alpha.fill_(60.0)
    x = torch.randn(4, D)
    torch.testing.assert_close(block(x), dense(x))
    assert block.up.weight.data_ptr() != dense[0].weight.data_ptr()


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("bias", [True, False, (True, False), (False, True)])
def test_counts_and_penalty_by_hand(activation, bias):
    block = make(activation, bias=bias, lam=0.3)
    rows, (up_bias, down_bias) = ROWS[activation], (bias, bias) if isinstance(bias, bool) else bias
    p = torch.sigmoid(block.hidden_gate.log_alpha.detach().double() - 2 / 3 * L)
    group = rows * (D + up_bias) + D
    assert nn.penalty(block).item() == pytest.approx(0.3 * group * p.sum().item(), rel=1e-5)
    params = group * p.sum().item() + D * down_bias
    assert nn.expected_l0(block).item() == pytest.approx(params, rel=1e-6)
    flops = (2 * D * rows + rows * up_bias + 2 * D) * p.sum().item() + D * down_bias
    assert nn.expected_flops(block).item() == pytest.approx(flops, rel=1e-6)
    assert nn.expected_flops(block, (5, 3, D)).item() == pytest.approx(15 * flops, rel=1e-6)
    n_open = int((block.hidden_gate.eval_gates().z != 0).sum())
    assert count_open(block) == [n_open]
    assert 0 < n_open < H
    assert nn.eval_l0(block) == group * n_open + D * down_bias
    assert nn.eval_flops(block, (7, D)) == 7 * (
        (2 * D * rows + rows * up_bias + 2 * D) * n_open + D * down_bias
    )


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_l2_penalty_by_hand(activation, bias):
    block = make(activation, bias=bias)
    p = torch.sigmoid(block.hidden_gate.log_alpha.detach().double() - 2 / 3 * L)
    squares = block.down.weight.double().square().sum(0)
    for weight in block.up.weight.double().split(H):
        squares = squares + weight.square().sum(1)
    for b in block.up.bias.double().split(H) if bias else ():
        squares = squares + b.square()
    difference = nn.penalty(block, weight_decay=0.7) - nn.penalty(block)
    assert difference.item() == pytest.approx(0.35 * (p * squares).sum().item(), rel=1e-4)


def test_counts_inside_a_model():
    block = make("geglu")
    model = torch.nn.Sequential(torch.nn.LayerNorm(D), block, torch.nn.ReLU(), torch.nn.Linear(D, 2))
    rest = 2 * D + 2 * D + 2
    assert nn.expected_l0(model).item() == pytest.approx(nn.expected_l0(block).item() + rest)
    own = nn.expected_flops(block, (4, D)).item()
    assert nn.expected_flops(model, (4, D)).item() == pytest.approx(own + 4 * (2 * D * 2 + 2))
    grads = torch.autograd.grad(nn.expected_l0(model), nn.gate_parameters(model))
    assert (grads[0] > 0).all()
    assert len(nn.weight_parameters(model)) == 8


class Block(torch.nn.Module):
    """Pre-norm, residual, and the L0 block used twice."""

    def __init__(self, activation):
        super().__init__()
        self.norm = torch.nn.LayerNorm(D)
        self.mlp = make(activation)

    def forward(self, x):
        x = x + self.mlp(self.norm(x))
        return x + self.mlp(x)


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("level", [None, -60.0, 60.0], ids=["mixed", "closed", "open"])
def test_export(activation, level):
    model = Block(activation)
    if level is not None:
        with torch.no_grad():
            model.mlp.hidden_gate.log_alpha.fill_(level)
    small = nn.export(model)
    x = torch.randn(6, D)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not small.training
    assert not nn.gate_modules(small)
    up, act, down = small.mlp
    (n_open,) = count_open(model)
    assert (n_open == 0, n_open == H) == (level == -60.0, level == 60.0)
    assert type(up) is type(down) is torch.nn.Linear
    assert (up.out_features, down.in_features) == (n_open * ROWS[activation], n_open)
    assert isinstance(act, nn.GatedProduct) == (activation in GLU)
    assert sum(p.numel() for p in small.mlp.parameters()) == nn.eval_l0(model.mlp)
    assert pickle.loads(pickle.dumps(small))(x).equal(small(x))
    torch.testing.assert_close(torch.jit.script(small.mlp)(x), small.mlp(x))
    program = torch.export.export(
        small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    torch.testing.assert_close(program.module()(x), small(x))


def test_export_of_frozen_and_double():
    block = make().double()
    block.up.weight.requires_grad_(False)
    small = nn.export(block)
    assert [p.requires_grad for p in small.parameters()] == [False, True, True, True]
    x = torch.randn(6, D, dtype=torch.float64)
    torch.testing.assert_close(small(x), block.eval()(x))
    again = nn.L0FeedForward.from_dense(small)
    assert again.d_hidden == count_open(block)[0]


def test_a_subclass_with_its_own_forward_is_kept_with_frozen_gates():
    class Own(nn.L0FeedForward):
        def forward(self, x):
            return 2 * super().forward(x)

    block = Own(3, 4)
    with torch.no_grad():
        block.hidden_gate.log_alpha[::2] = -6
    small, x = nn.export(block), torch.randn(5, 3)
    assert type(small) is Own
    torch.testing.assert_close(small.train()(x), block.eval()(x))


def test_copies():
    block = make("geglu")
    fresh = nn.L0FeedForward(D, H, "geglu")
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, D)
    torch.manual_seed(1)
    expected = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(activation, autocast):
    block = make(activation) if autocast else make(activation).bfloat16()
    x = torch.randn(16, D, dtype=torch.float32 if autocast else torch.bfloat16)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for layer in (block.up, block.down):
        assert layer.weight.grad.dtype == layer.weight.dtype
    assert block.hidden_gate.log_alpha.dtype == torch.float32
    assert block.hidden_gate.log_alpha.grad.any()
    torch.manual_seed(3)
    exact = dense_formula(copy.deepcopy(block).double(), x.double())
    atol = 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ["silu", "swiglu", "geglu"])
def test_gradcheck_in_double(activation):
    torch.manual_seed(0)
    block = nn.L0FeedForward(4, 5, activation).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *_):
        torch.manual_seed(1)
        return block(x)

    assert torch.autograd.gradcheck(forward, (x, *block.parameters()))


def test_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = torch.stack([x[:, 0] * x[:, 1]] * 8, 1)
    block = nn.L0FeedForward(8, 32, "swiglu", droprate_init=0.2, lam=1.0)
    optimizer = torch.optim.Adam(block.parameters(), 3e-2)
    size = nn.expected_l0(block).item()
    nn.clamp_after_step(optimizer, block)

    def loss():
        return F.mse_loss(block(x), target)

    with torch.no_grad():
        before = block.eval() and loss().item()
    block.train()
    for _ in range(200):
        optimizer.zero_grad()
        (loss() + 1e-3 * nn.penalty(block)).backward()
        optimizer.step()
    with torch.no_grad():
        after = block.eval() and loss().item()
    assert after < before / 2
    assert nn.expected_l0(block).item() < 0.8 * size


@pytest.mark.parametrize(
    ("activation", "training"),
    [
        ("gelu", True),
        pytest.param("gelu", False, marks=pytest.mark.long),
        pytest.param("swiglu", False, marks=pytest.mark.long),
        pytest.param("swiglu", True, marks=pytest.mark.long),
    ],
)
def test_compiles_without_a_graph_break(activation, training):
    block = make(activation).train(training)
    x = torch.randn(4, D)

    def loss(x):
        return block(x).square().sum() + nn.penalty(block, weight_decay=0.1)

    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(value, block.parameters()) for value in (compiled, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_gates(use_reentrant):
    results = []
    for recompute in (False, True):
        block = make()
        torch.manual_seed(5)
        x = torch.randn(4, D, requires_grad=True)
        if recompute:
            y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
        else:
            y = block(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in block.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_meta_device():
    block = nn.L0FeedForward(D, H, "swiglu", device="meta")
    assert all(p.is_meta for p in block.parameters())
    assert block(torch.zeros(2, D, device="meta")).shape == (2, D)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((3, 4, "tanh"), {}, "activation must be one of .* got 'tanh'"),
        ((3, 4), {"bias": [True]}, "bias must be one value or 2 of them, got 1"),
        ((3, 4), {"droprate_init": 0.0}, "droprate_init must lie in"),
        ((3, 4), {"lam": -1.0}, "lam must be finite"),
    ],
)
def test_bad_arguments(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        nn.L0FeedForward(*arguments, **options)


@pytest.mark.parametrize(
    ("dense", "options", "error", "words"),
    [
        ([], {}, TypeError, r"dense must be an nn.Sequential or three nn.Linear, got \(\)"),
        (["in", "out"], {}, TypeError, r"got \(Linear, Linear\)"),
        ([["in", "relu"]], {}, ValueError, r"nn.Linear, activation, nn.Linear, got \(Linear, ReLU\)"),
        ([["in", "relu", "out", "relu"]], {}, ValueError, "dense must be nn.Linear, activation, nn.Linear"),
        ([["in", "tanh", "out"]], {}, ValueError, "dense must have an activation among ReLU"),
        ([["in", "relu", "out"]], {"activation": "relu"}, ValueError, "activation must be None"),
        ([["in", "product", "out"]], {}, ValueError, "dense must have a GatedProduct of nn.SiLU, nn"),
        ([["in", "relu", "in"]], {}, ValueError, r"weights of shapes \(3, 5\) and then \(5, 3\)"),
        ([["in", "swiglu", "out"]], {}, ValueError, r"weights of shapes \(10, 3\) and .* got \(5, 3\)"),
        (["in", "in", "out"], {"activation": "gelu"}, ValueError, "activation must be one of .*got 'gelu'"),
        (["in", "out", "out"], {}, ValueError, r"weights of shapes \(5, 3\) and .* got \(3, 5\)"),
        (["in", "bare", "out"], {}, ValueError, "gate_proj and up_proj must both have a bias or none"),
        (["in", "in", "double"], {}, ValueError, "dense must be on one device and in one dtype"),
    ],
)
def test_from_dense_of_something_else(dense, options, error, words):
    modules = {
        "in": lambda: torch.nn.Linear(3, 5),
        "bare": lambda: torch.nn.Linear(3, 5, bias=False),
        "out": lambda: torch.nn.Linear(5, 3),
        "double": lambda: torch.nn.Linear(5, 3, dtype=torch.float64),
        "relu": torch.nn.ReLU,
        "tanh": torch.nn.Tanh,
        "swiglu": lambda: nn.GatedProduct(torch.nn.SiLU()),
        "product": lambda: nn.GatedProduct(torch.nn.Identity()),
    }

    def build(item):
        return torch.nn.Sequential(*map(build, item)) if isinstance(item, list) else modules[item]()

    with pytest.raises(error, match=words):
        nn.L0FeedForward.from_dense(*map(build, dense), **options)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("gate", ["in", "both", "out", "weight", (2, 2)])
@pytest.mark.parametrize("name", ["up", "down"])
def test_a_replaced_layer_keeps_its_gates(name, gate, activation):
    torch.manual_seed(0)
    block = nn.L0FeedForward(6, 8, activation)
    old = getattr(block, name)
    setattr(block, name, nn.L0Linear(old.in_features, old.out_features, gate=gate))
    with torch.no_grad():
        for source in nn.gate_modules(block):
            source.log_alpha.normal_(0, 2)
    x, bank = torch.randn(4, 6), nn.GateBank(block, seed=1)
    for training in (True, False):
        block.train(training)
        bank.draw()
        expected = block.down(block.activation_module()(block.up(x)) * block.hidden_gate().z)
        torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(nn.export(block)(x), block(x))


def test_a_layer_without_weight():
    """Replaced by a container, it is called; a weight decay, which would miss its weights, is refused."""
    torch.manual_seed(0)
    block = nn.L0FeedForward(6, 8, "relu").eval()
    block.down = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh())
    x = torch.randn(4, 6)
    torch.testing.assert_close(block(x), block.down(block.up(x).relu() * block.hidden_gate().z))
    assert nn.penalty(block).item() > 0
    with pytest.raises(ValueError, match="down of an L0FeedForward must have a weight where weight_decay"):
        nn.penalty(block, weight_decay=0.1)


# ---- dropout, runs of units, hooks: against the formula with masks, in fp64

PRODUCTS = {**GLU, "reglu": "relu"}
EVERY = [*ACTIVATIONS, "reglu"]
PATTERNS = {
    "open": lambda n: torch.full((n,), 40.0),
    "closed": lambda n: torch.full((n,), -40.0),
    "one": lambda n: torch.where(torch.arange(n) == n // 2, 0.4, -40.0),
    "half": lambda n: torch.where(torch.arange(n) % 2 == 0, -40.0, 0.3),
    "mixed": lambda n: torch.linspace(-4, 4, n),
}


@pytest.fixture(params=["eager", "static"])
def form(request, monkeypatch):
    if request.param == "static":
        monkeypatch.setattr(_checks, "readable", lambda: False)
    return request.param


def double(activation, pattern="mixed", **options):
    torch.manual_seed(0)
    block = nn.L0FeedForward(5, 12, activation, dtype=torch.float64, **options)
    block.hidden_gate.log_alpha.data.copy_(PATTERNS[pattern](block.hidden_gate.n))
    return block


def by_masks(block, x, z, mask=None):
    """The block's formula over all units, z by unit."""
    hidden = F.linear(x, block.up.weight, block.up.bias)
    if block.activation in PRODUCTS:
        a, b = hidden.chunk(2, -1)
        hidden = PLAIN[PRODUCTS[block.activation]]()(a) * b
    else:
        hidden = PLAIN[block.activation]()(hidden)
    hidden = hidden if mask is None else hidden * mask
    return F.linear(hidden * z, block.down.weight, block.down.bias)


def grads_of(block, y, x):
    torch.manual_seed(9)
    block.zero_grad()
    x.grad = None
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    return [x.grad, *(None if p.grad is None else p.grad.clone() for p in block.parameters())]


def assert_as_by_masks(block, y, expected, x):
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for mine, other in zip(grads_of(block, y, x), grads_of(block, expected, x), strict=True):
        mine, other = (torch.zeros(()) if g is None else g for g in (mine, other))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, other.to(mine)), rtol=1e-8, atol=1e-9)


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bias", [True, False, (False, True)])
@pytest.mark.parametrize("block", [1, 3, 12])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_and_runs(activation, pattern, bias, block, dropout, form, backend):
    layer = double(activation, pattern, bias=bias, block=block, dropout=dropout)
    layer.hidden_gate.eval()
    assert layer.hidden_gate.log_alpha.shape == (12 // block,)
    z = layer.hidden_gate.eval_gates().z.repeat_interleave(block)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    n, mask = int((z != 0).sum()), None
    alone = form == "eager" and backend != "reference"  # open units exist alone; one at least
    kept = z.nonzero()[:, 0] if n else torch.tensor([0])
    torch.manual_seed(3)
    y = layer(x)
    if dropout:
        torch.manual_seed(3)
        drawn = F.dropout(torch.ones(2, 3, max(n, 1) if alone else 12, dtype=torch.float64), dropout)
        mask = torch.zeros(2, 3, 12, dtype=torch.float64).index_copy(-1, kept, drawn) if alone else drawn
    layer.hidden_gate.train()  # with the way back to log_alpha
    z = layer.hidden_gate.eval_gates().z.repeat_interleave(block)
    assert_as_by_masks(layer, y, by_masks(layer, x, z, mask), x)
    layer.eval()
    torch.testing.assert_close(layer(x), by_masks(layer, x, z))


@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gates_of_runs_and_with_dropout_learn(activation, block, dropout, form, monkeypatch):
    """Drawn in training: the gradient of log_alpha is that of the formula with the gates that were drawn."""
    layer = double(activation, block=block, dropout=dropout)
    monkeypatch.setattr(F, "dropout", lambda h, p, training: h * (1 + p))  # the same for all
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    z = layer.hidden_gate().z
    assert z.eq(0).any() or len(z) < 4
    assert_as_by_masks(layer, y, by_masks(layer, x, z.repeat_interleave(block), 1 + dropout), x)
    given = layer.hidden_gate.eval_gates()
    torch.testing.assert_close(
        layer(x, given), by_masks(layer, x, given.z.repeat_interleave(block), 1 + dropout)
    )


def test_dropout_is_drawn_for_open_units_alone(monkeypatch):
    seen, dropout = [], F.dropout

    def counted(h, p, training):
        seen.append(tuple(h.shape))
        return dropout(h, p, training)

    monkeypatch.setattr(F, "dropout", counted)
    block = nn.L0FeedForward(5, 12, "gelu", dropout=0.5)
    block.hidden_gate.log_alpha.data[:] = torch.tensor([-40.0, 40.0]).repeat(6)
    block(torch.randn(3, 7, 5))
    assert seen == [(3, 7, 6)]


@pytest.mark.parametrize("activation", EVERY)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("block", [1, 3])
def test_counts_penalty_and_export_of_runs(activation, dropout, block):
    layer = double(activation, block=block, dropout=dropout, lam=0.3)
    rows, p = 1 + (activation in PRODUCTS), layer.hidden_gate.dist.p_open(layer.hidden_gate.log_alpha)
    group = block * (rows * 6 + 5)
    assert nn.penalty(layer).item() == pytest.approx(0.3 * group * p.sum().item())
    assert nn.expected_l0(layer).item() == pytest.approx(group * p.sum().item() + 5)
    squares = layer.down.weight.square().sum(0) + sum(w.square().sum(1) for w in layer.up.weight.chunk(rows))
    squares = squares + sum(b.square() for b in layer.up.bias.chunk(rows))
    weighed = 0.35 * (p.repeat_interleave(block) * squares).sum()
    assert (nn.penalty(layer, weight_decay=0.7) - nn.penalty(layer)).item() == pytest.approx(weighed.item())
    small, x = nn.export(layer), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(small(x), layer.eval()(x))
    assert nn.eval_l0(layer) == sum(parameter.numel() for parameter in small.parameters())
    assert nn.eval_flops(layer, x) == nn.eval_flops(small, x)
    assert [type(part).__name__ for part in small][2:-1] == (["Dropout"] if dropout else [])
    alphas = layer.hidden_gate.log_alpha
    for cost, expected in (("params", nn.expected_l0(layer)), ("flops", nn.expected_flops(layer, x))):
        found = Terms(cost_of(layer, [layer.hidden_gate], cost, x).terms)(p.double())
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(value, alphas, retain_graph=True)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes)
    again = nn.L0FeedForward.from_dense(small)
    assert (again.dropout, again.activation) == (dropout, activation)
    again.hidden_gate.log_alpha.data.fill_(60.0)
    torch.testing.assert_close(again.eval()(x), small(x))


def test_from_dense_with_dropout_and_runs():
    parts = torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Dropout(0.3), torch.nn.Linear(6, 4)
    block = nn.L0FeedForward.from_dense(torch.nn.Sequential(*parts), block=2)
    assert (block.dropout, block.block, block.hidden_gate.n) == (0.3, 2, 3)
    assert nn.L0FeedForward.from_dense(torch.nn.Sequential(*parts), dropout=0.0).dropout == 0.0
    assert nn.L0FeedForward.from_dense(*llama(), activation="reglu", dropout=0.1).dropout == 0.1
    assert repr(block).startswith("L0FeedForward(\n  4, 6, activation='gelu', dropout=0.3, block=2\n")


def hooked(layer):
    layer.register_forward_hook(lambda _, __, y: y * 1.5)


def with_a_backward_hook(layer):
    layer.register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads))


CHANGES = {
    "hook": hooked,
    "backward hook": with_a_backward_hook,
    "forward of its own": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight).sin()),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "old weight_norm": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", torch.nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "block": 3}], ids=["plain", "dropout"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_is_changed_in_a_layer_counts(name, change, options, activation, monkeypatch):
    """As the modules themselves compute, one after the other, with their state after it."""
    monkeypatch.setattr(F, "dropout", lambda h, p, training: h * (1 + p * training))
    blocks = [double(activation, "half", **options) for _ in range(2)]
    for block in blocks:
        block.hidden_gate.eval()
        torch.manual_seed(1)
        CHANGES[change](getattr(block, name))
    block, twin = blocks
    z = block.hidden_gate.eval_gates().z.repeat_interleave(block.block)
    xs = [torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).requires_grad_() for _ in range(2)]
    y = block(xs[0])
    found = [*grads_of(block, y, xs[0]), *(b.clone() for b in block.buffers())]
    hidden = twin.activation_module()(twin.up(xs[1])) * (1 + block.dropout)
    expected = twin.down(hidden * z)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    others = [*grads_of(twin, expected, xs[1]), *(b.clone() for b in twin.buffers())]
    for mine, other in zip(found, others, strict=True):
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"dropout": "no"}, r"dropout must lie in \[0, 1\), got 'no'"),
        ({"block": 3}, "block must be a positive int that divides d_hidden 4, got 3"),
        ({"block": 0}, "block must be a positive int that divides d_hidden 4, got 0"),
        ({"block": True}, "block must be a positive int that divides d_hidden 4, got True"),
    ],
)
def test_bad_dropout_and_block(options, words):
    with pytest.raises(ValueError, match=words):
        nn.L0FeedForward(3, 4, **options)


def test_runs_and_dropout_compile(monkeypatch):
    block, x = nn.L0FeedForward(5, 12, "swiglu", block=3, dropout=0.25), torch.randn(4, 5)
    found = {}
    for name, run in (
        ("eager", block),
        ("compiled", torch.compile(block, fullgraph=True, backend="aot_eager")),
    ):
        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(_checks, "readable", lambda: False)  # masks of all units
            found[name] = run(x)
    torch.testing.assert_close(found["compiled"], found["eager"])


def test_tensor_parallel_runs_and_dropout_are_refused():
    for options, words in (({"block": 2}, "block=2"), ({"dropout": 0.5}, "dropout=0.5")):
        with pytest.raises(ValueError, match=f"up.weight must be whole with {words}, got a DTensor"):
            nn.L0FeedForward(3, 4, **options)._tensor_parallel(torch.randn(2, 3), None)
