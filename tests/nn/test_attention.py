"""L0MultiheadAttention against torch.nn.MultiheadAttention and formulas in fp64."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import _checks

D = torch.float64
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other widths": {"kdim": 5, "vdim": 7},
    "without bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}
OPEN = {
    "all": [1, 1, 1, 1],
    "half": [0, 1, 0, 1],
    "one": [0, 0, 1, 0],
    "none": [0, 0, 0, 0],
    "between": [0, 0.3, 1, 0.6],
}


@pytest.fixture(params=["exact", "static"])
def form(request, monkeypatch):
    if request.param == "static":
        monkeypatch.setattr(_checks, "readable", lambda: False)
    return request.param


def set_z(layer, z):
    """Gates in eval() that are `z`."""
    dist = layer.head_gate.dist
    z = torch.as_tensor(z, dtype=D)
    inner = torch.logit((z - dist.gamma) / (dist.zeta - dist.gamma))
    layer.head_gate.log_alpha.data.copy_(torch.where(z == 0, -40.0, torch.where(z == 1, 40.0, inner)))
    layer.head_gate.eval()


def inputs(options, same=False):
    torch.manual_seed(1)
    shape = (3, 5) if options.get("batch_first") else (5, 3)
    q = torch.randn(*shape, 8, dtype=D, requires_grad=True)
    if same:
        return q, q, q
    keys = (3, 6) if options.get("batch_first") else (6, 3)
    k, v = (
        torch.randn(*keys, options.get(name, 8), dtype=D, requires_grad=True) for name in ("kdim", "vdim")
    )
    return q, k, v


def dense(layer, z, given, **options):
    """By torch's class, z in the columns of the output's projection."""
    plain = nn.MultiheadAttention(8, 4, kdim=layer.kdim, vdim=layer.vdim, bias=layer.in_proj_bias is not None,
                                  add_bias_kv=layer.bias_k is not None, add_zero_attn=layer.add_zero_attn,
                                  batch_first=layer.batch_first, dtype=D)  # fmt: skip
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("l0_units")})
    columns = torch.as_tensor(z, dtype=D).repeat_interleave(2)
    weight = plain.out_proj.weight
    del plain.out_proj._parameters["weight"]
    plain.out_proj.weight = weight * columns
    y, weights = plain(*given, average_attn_weights=False, **options)
    return plain, weight, y, weights


@pytest.mark.covering(2)
@pytest.mark.parametrize("pattern", OPEN)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_torchs_with_gates(name, pattern, form):
    layer = l0.nn.L0MultiheadAttention(8, 4, **OPTIONS[name], dtype=D)
    assert isinstance(layer, nn.MultiheadAttention)
    z = OPEN[pattern]
    set_z(layer, z)
    later = torch.triu(torch.ones(5, 6, dtype=torch.bool), 3)
    padding = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    both = {"attn_mask": later, "key_padding_mask": padding}
    for masks in ({}, {"attn_mask": later.double()}, {"key_padding_mask": padding}, both):
        for needs in (True, False):
            given = inputs(OPTIONS[name])
            y, weights = layer(*given, need_weights=needs, average_attn_weights=False, **masks)
            others = [x.detach().clone().requires_grad_() for x in given]
            plain, weight, expected, attended = dense(layer, z, others, **masks)
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
            if needs:
                is_open = torch.as_tensor(z, dtype=D).ne(0).double()[:, None, None]
                torch.testing.assert_close(weights, attended * is_open)
            dy = torch.randn_like(y)
            layer.zero_grad()
            y.backward(dy)
            expected.backward(dy)
            for x, other in zip(given, others, strict=True):
                torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-9)
            for own, parameter in plain.named_parameters():
                wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                mine = dict(layer.named_parameters())[own].grad
                mine = torch.zeros_like(wanted) if mine is None else mine
                torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer.out_proj.weight.grad, weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gates", ["groups", "slots"])
@pytest.mark.parametrize("closed", [[], [0], [1], [0, 1]])
def test_shared_keys(gates, closed, form):
    torch.manual_seed(0)
    shared = 2 if gates == "groups" else 3
    layer = l0.nn.L0MultiheadAttention(12, 6, batch_first=True, kv_heads=shared, gates=gates, dtype=D)
    n = layer.head_gate.n
    assert n == 2
    z = torch.tensor([0.4, 0.9], dtype=D)
    z[closed] = 0
    set_z(layer, z)
    x, other = torch.randn(2, 5, 12, dtype=D), torch.randn(2, 4, 12, dtype=D)
    for given in ((x, x, x), (x, other, other)):
        y, weights = layer(*given)
        each = 6 // layer.kv_heads
        of_head = z.repeat_interleave(each) if gates == "groups" else z.repeat(layer.kv_heads)
        bq, bk, bv = layer.in_proj_bias.split([12, 2 * layer.kv_heads, 2 * layer.kv_heads])
        q = F.linear(given[0], layer.q_proj_weight, bq).view(2, -1, 6, 2).transpose(1, 2)
        k, v = (
            F.linear(t, w, b).view(2, -1, layer.kv_heads, 2).transpose(1, 2).repeat_interleave(each, 1)
            for t, w, b in ((given[1], layer.k_proj_weight, bk), (given[2], layer.v_proj_weight, bv))
        )
        found = F.scaled_dot_product_attention(q, k, v) * of_head[:, None, None]
        expected = F.linear(found.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        assert weights.shape == (2, 5, given[1].shape[1])
    small = l0.nn.export(layer)
    torch.testing.assert_close(small(x, other, other), layer(x, other, other))
    assert small.q_proj_weight.shape[0] == 12 // n * (n - len(closed))
    shared = small.k_proj_weight.shape[0]
    assert shared == (2 * (2 - len(closed)) if gates == "groups" else 6)
    assert l0.nn.eval_l0(layer) == sum(p.numel() for p in small.parameters())


def test_as_torch_takes_it():
    layer = l0.nn.L0MultiheadAttention(8, 4, dtype=D).eval()
    set_z(layer, [1, 0, 1, 1])
    x = torch.randn(5, 8, dtype=D)
    y, weights = layer(x, x, x)  # no batch
    assert y.shape == (5, 8)
    assert weights.shape == (5, 5)
    torch.testing.assert_close(layer(x[:, None], x[:, None], x[:, None])[0][:, 0], y)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=D))
    later = torch.triu(torch.full((5, 5), -torch.inf, dtype=D), 1)
    first = layer(x, x, x, attn_mask=later, is_causal=True)[0]
    torch.testing.assert_close(first, layer(x, x, x, attn_mask=later, need_weights=False)[0])
    with pytest.raises(RuntimeError, match="attn_mask must be given"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask must have shape"):
        layer(x, x, x, attn_mask=later[:3])
    with pytest.raises(RuntimeError, match="key_padding_mask must have shape"):
        layer(x, x, x, key_padding_mask=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="key must have 2 or 3 dimensions, the last one of 8"):
        layer(x, x[:, :4], x)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("needs", [False, True])
def test_a_causal_mask_is_used_as_torch_does(options, needs, form):
    """By the hint alone, unless something else asks for the mask; learned keys then count as first ones."""
    layer = l0.nn.L0MultiheadAttention(8, 4, **options, dtype=D)
    later = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, -1] = True
    for z in ([1, 1, 1, 1], [1, 0, 0.4, 1]):
        set_z(layer, z)
        for more in ({}, {"key_padding_mask": padding}):
            masks = {"attn_mask": later, "is_causal": True, "need_weights": needs, **more}
            x = inputs({}, same=True)
            y = layer(*x, **masks)[0]
            torch.testing.assert_close(y, dense(layer, z, x, **masks)[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(l0.nn.export(layer)(*x, **masks)[0], y, rtol=1e-10, atol=1e-10)


def test_training():
    torch.manual_seed(0)
    layer = l0.nn.L0MultiheadAttention(8, 4, batch_first=True, lam=1.0)
    optimizer = torch.optim.Adam(l0.nn.parameter_groups(layer, gate_lr=0.1), lr=1e-2)
    budget = l0.nn.Budget(layer, keep={"heads": 0.5}, steps=60)
    budget.attach(optimizer)
    x, target = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    losses = []
    for _ in range(80):
        loss = F.mse_loss(layer(x, x, x, need_weights=False)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert budget.expected["heads"] <= 0.5 + 1e-3
    assert float(l0.nn.penalty(layer).detach()) > 0
    assert l0.nn.gate_modules(layer) == [layer.head_gate]
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x, x, x), layer(x, x, x))
    fresh = l0.nn.L0MultiheadAttention(8, 4, batch_first=True)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.eval()(x, x, x), layer(x, x, x))


def test_from_dense():
    plain = nn.MultiheadAttention(8, 4, kdim=5, batch_first=True, dtype=D).eval()
    layer = l0.nn.L0MultiheadAttention.from_dense(plain, droprate_init=0.1)
    set_z(layer, [1, 1, 1, 1])
    q, k, v = torch.randn(2, 3, 8, dtype=D), torch.randn(2, 4, 5, dtype=D), torch.randn(2, 4, 8, dtype=D)
    for mine, other in zip(layer(q, k, v), plain(q, k, v), strict=True):
        torch.testing.assert_close(mine, other)
    assert layer.out_proj.weight is plain.out_proj.weight
    assert type(l0.nn.export(layer)) is nn.MultiheadAttention
    with pytest.raises(TypeError, match=r"attention must be a torch.nn.MultiheadAttention, got Linear"):
        l0.nn.L0MultiheadAttention.from_dense(nn.Linear(2, 2))


def test_within_other_layers():
    """An encoder layer of torch calls it, by its fast path or not."""
    encoder = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True, dtype=D)
    encoder.self_attn = l0.nn.L0MultiheadAttention.from_dense(encoder.self_attn)
    set_z(encoder.self_attn, [0, 0, 0, 0])
    x = torch.randn(2, 3, 8, dtype=D)
    encoder.eval()
    y = encoder.norm1(x + encoder.self_attn.out_proj.bias)
    y = encoder.norm2(y + encoder.linear2(F.relu(encoder.linear1(y))))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), y)
        torch.testing.assert_close(l0.nn.export(encoder)(x), y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads must divide embed_dim, got 3 for 8"),
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"kv_heads": 3}, "kv_heads must divide num_heads, got 3 for 4"),
        ({"gates": "each"}, "gates must be one of"),
        ({"kv_heads": 2, "add_zero_attn": True}, "must be False with kv_heads"),
        ({"droprate_init": 2.0}, "droprate_init must lie in"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        l0.nn.L0MultiheadAttention(8, **{"num_heads": 4, **options})


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=["no examples", "no positions"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty(shape, need_weights, form):
    layer = l0.nn.L0MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y, weights = layer(x, x, x, need_weights=need_weights)
    y.sum().backward()
    assert y.shape == shape
    assert (weights is not None) == need_weights


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding():
    """In eval() without gradients torch makes a nested tensor of one."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    layer.self_attn = l0.nn.L0MultiheadAttention.from_dense(layer.self_attn)
    encoder, x = nn.TransformerEncoder(layer, 2).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    for part in encoder.layers:
        set_z(part.self_attn, torch.tensor([1.0, 0.0]))
    exported = l0.nn.export(encoder)
    expected = encoder(x, src_key_padding_mask=padding)[~padding]
    for model in (encoder, exported):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                got = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(got[~padding], expected)


def test_rows_and_masks_that_torch_refuses():
    layer = l0.nn.L0MultiheadAttention(8, 2, batch_first=True)
    one, two = torch.randn(1, 4, 8), torch.randn(2, 4, 8)
    for q, k, v in ((one, two, two), (two, one, one), (two, two, one), (two, two, two[:, :3])):
        with pytest.raises(RuntimeError, match="query, key and value must be of"):
            layer(q, k, v)
    for name, shape in (("attn_mask", (4, 4)), ("key_padding_mask", (2, 4))):
        with pytest.raises(TypeError, match=f"{name} must be bool or floating, got torch.int64"):
            layer(two, two, two, **{name: torch.ones(shape, dtype=torch.int64)})
