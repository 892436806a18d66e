"""On a GPU the host never waits within an operation, and a CUDA graph of it draws anew at every replay."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import BACKENDS, NEEDS_GPU, capture, no_sync, or_refused, why_skip

import l0kernels as l0

pytestmark = NEEDS_GPU

DEVICE = "cuda"
M, IN, HIDDEN, OUT = 96, 200, 300, 64


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    reason = why_skip(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with l0.use_backend(request.param):
        yield request.param


def leaf(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


class Problem:
    """An operation of no arguments that returns a tensor, and its leaves."""

    def __init__(self, name, dtype):
        self.x = leaf(M, IN, dtype=dtype)
        self.w1, self.b1 = leaf(HIDDEN, IN, scale=0.1, dtype=dtype), leaf(HIDDEN, dtype=dtype)
        self.wide, self.wide_b = leaf(2 * HIDDEN, IN, scale=0.1, dtype=dtype), leaf(2 * HIDDEN, dtype=dtype)
        self.w2, self.b2 = leaf(OUT, HIDDEN, scale=0.1, dtype=dtype), leaf(OUT, dtype=dtype)
        self.a_in, self.a_hidden = leaf(IN, scale=2.0), leaf(HIDDEN, scale=2.0)
        self.image = leaf(8, IN, 6, 5, dtype=dtype)
        self.kernel1 = leaf(HIDDEN, IN, 3, 3, scale=0.03, dtype=dtype)
        self.kernel2 = leaf(OUT, HIDDEN, 3, 3, scale=0.03, dtype=dtype)
        self.depthwise = leaf(IN, 1, 3, 3, scale=0.3, dtype=dtype)
        self.norm_w, self.norm_b = leaf(HIDDEN), leaf(HIDDEN)
        self.a_weight, self.a_block = leaf(HIDDEN, IN), leaf(-(-HIDDEN // 32), -(-IN // 16))
        self.call, self.leaves = getattr(self, name)()

    def l0_linear_in(self):
        options = {"in_log_alpha": self.a_in}
        return lambda s: l0.l0_linear(self.x, self.w1, self.b1, **options, seed=s), self.linear_leaves(
            self.a_in
        )

    def l0_linear_out(self):
        options = {"out_log_alpha": self.a_hidden}
        leaves = self.linear_leaves(self.a_hidden)
        return lambda s: l0.l0_linear(self.x, self.w1, self.b1, **options, seed=s), leaves

    def l0_linear_both(self):
        options = {"in_log_alpha": self.a_in, "out_log_alpha": self.a_hidden}
        leaves = self.linear_leaves(self.a_in, self.a_hidden)
        return lambda s: l0.l0_linear(self.x, self.w1, self.b1, **options, seed=s), leaves

    def gated_linear(self):
        def call(seed):
            in_gates, out_gates = l0.sample_gates([self.a_in, self.a_hidden], seed=seed)
            return l0.gated_linear(self.x, self.w1, self.b1, in_gates=in_gates, out_gates=out_gates)

        return call, self.linear_leaves(self.a_in, self.a_hidden)

    def out_support(self):
        def call(seed):
            gates = l0.sample_gates(self.a_hidden, seed=seed)
            h = l0.gated_linear(self.x, self.w1, self.b1, out_support=gates)
            return l0.gated_linear(h, self.w2, self.b2, in_gates=gates)

        return call, [*self.linear_leaves(self.a_hidden), self.w2, self.b2]

    def gated_mlp(self):
        def call(seed):
            gates = l0.sample_gates([self.a_in, self.a_hidden], seed=seed)
            return l0.gated_mlp(self.x, [self.w1, self.w2], [self.b1, self.b2], gates, "gelu")

        return call, [*self.linear_leaves(self.a_in, self.a_hidden), self.w2, self.b2]

    def l0_mlp(self):
        gates = [self.a_in, self.a_hidden]
        weights, biases = [self.w1, self.w2], [self.b1, self.b2]
        leaves = [self.x, *weights, *biases, *gates]
        return lambda s: l0.l0_mlp(self.x, weights, biases, gates, "relu", seed=s), leaves

    def l0_mlp_swiglu(self):
        gates = [None, self.a_hidden]
        weights, biases = [self.wide, self.w2], [self.wide_b, self.b2]
        leaves = [self.x, *weights, *biases, self.a_hidden]
        return lambda s: l0.l0_mlp(self.x, weights, biases, gates, "swiglu", seed=s), leaves

    def masked_linear_weight(self):
        leaves = self.linear_leaves(self.a_weight)
        return lambda s: l0.masked_linear(self.x, self.w1, self.b1, self.a_weight, seed=s), leaves

    def masked_linear_block(self):
        leaves = self.linear_leaves(self.a_block)
        options = {"block": (32, 16)}
        return lambda s: l0.masked_linear(self.x, self.w1, self.b1, self.a_block, **options, seed=s), leaves

    def penalty(self):
        gates = [self.a_in, self.a_hidden]
        return lambda s: l0.l0_penalty(gates, [HIDDEN, OUT], lam=[0.1, 0.2]), gates

    def gated_conv2d(self):
        def call(seed):
            in_gates, out_gates = l0.sample_gates([self.a_in, self.a_hidden], seed=seed)
            options = {"stride": 2, "padding": 1, "in_gates": in_gates, "out_gates": out_gates}
            return l0.gated_conv2d(self.image, self.kernel1, self.b1, **options)

        return call, [self.image, self.kernel1, self.b1, self.a_in, self.a_hidden]

    def gated_conv2d_depthwise(self):
        def call(seed):
            gates = l0.sample_gates(self.a_in, seed=seed)
            return l0.gated_conv2d(self.image, self.depthwise, padding=1, groups=IN, in_gates=gates)

        return call, [self.image, self.depthwise, self.a_in]

    def packed_convolutions(self):
        """From a dense image to a dense one; between the convolutions only the open channels exist."""
        mean, var = torch.zeros(HIDDEN, device=DEVICE), torch.ones(HIDDEN, device=DEVICE)

        def call(seed):
            gates = l0.sample_gates(self.a_hidden, seed=seed)
            h = l0.packed_conv2d(self.image, self.kernel1, None, 1, 1, out_support=gates)
            h = l0.gated_batch_norm(h, mean, var, self.norm_w, self.norm_b, True).map(torch.relu)
            return l0.packed_conv2d(h, self.kernel2, self.b2, 1, 1, in_gates=gates)

        leaves = [self.image, self.kernel1, self.norm_w, self.norm_b, self.kernel2, self.b2, self.a_hidden]
        return call, leaves

    def linear_leaves(self, *gates):
        return [self.x, self.w1, self.b1, *gates]


OPS = (
    *(
        "l0_linear_in",
        "l0_linear_out",
        "l0_linear_both",
        "gated_linear",
        "out_support",
        "gated_mlp",
        "l0_mlp",
    ),
    *("l0_mlp_swiglu", "masked_linear_weight", "masked_linear_block", "penalty"),
    *("gated_conv2d", "gated_conv2d_depthwise", "packed_convolutions"),
)


FEATURES = {
    "l0_mlp_swiglu": "swiglu",
    "masked_linear_weight": "masked_linear",
    "masked_linear_block": "block_linear",
    "gated_conv2d": "gated_conv2d",
    "gated_conv2d_depthwise": "gated_conv2d",
    "packed_convolutions": "gated_conv2d",
    "ffn": "swiglu",
}
"""What of a case a backend may not serve."""


def test_sync_is_an_error():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        x.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
@or_refused("name", FEATURES.get)
def test_no_sync(name, dtype):
    torch.manual_seed(0)
    problem = Problem(name, dtype)
    for attempt in range(3):  # also at the first call, when tables are built and kernels loaded
        seed = torch.tensor([attempt + 1], device=DEVICE)
        y = problem.call(seed)
        dy = torch.randn_like(y)
        with no_sync():
            y = problem.call(seed)
            grads = torch.autograd.grad(y, problem.leaves, dy)
        assert all(g.isfinite().all() for g in (y, *grads))


def net(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        model = l0.nn.L0MLP([IN, HIDDEN, OUT], lam=1e-6)
    else:
        model = torch.nn.Sequential(
            l0.nn.L0FeedForward(IN, HIDDEN, "swiglu", lam=1e-6), torch.nn.Linear(IN, OUT)
        )
    return model.to(DEVICE)


class Step:
    """A whole training step on static inputs."""

    def __init__(self, kind):
        self.model = net(kind)
        self.x = torch.randn(M, IN, device=DEVICE)
        self.labels = torch.randint(OUT, (M,), device=DEVICE)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True, capturable=True)
        l0.nn.clamp_after_step(self.adam, self.model)

    def __call__(self):
        self.adam.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.labels) + l0.nn.penalty(self.model)
        loss.backward()
        self.adam.step()
        return loss.detach()


@pytest.mark.parametrize("kind", ["mlp", "ffn"])
@or_refused("kind", FEATURES.get)
def test_no_sync_in_a_training_step(kind):
    step = Step(kind)
    losses = [step() for _ in range(3)]
    with no_sync():
        losses += [step() for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)


def test_no_sync_where_closed_layers_are_looked_for(monkeypatch):
    monkeypatch.setattr(l0.nn.notices, "LOOK_EVERY", 1)
    model = net("mlp")
    optimizer = torch.optim.SGD(l0.nn.gate_parameters(model), lr=1.0)
    l0.nn.clamp_after_step(optimizer, model)
    closed, opened = (layer.in_gate.log_alpha for layer in (model.layers[1], model.layers[0]))
    for log_alpha, value in ((closed, -4.0), (opened, -2.0)):
        log_alpha.data.fill_(value)
        log_alpha.grad = torch.zeros_like(log_alpha)
    seen = []
    monkeypatch.setattr(l0.nn.notices, "_warn", seen.append)
    for _ in range(6):
        with no_sync():
            optimizer.step()
    (warning,) = seen
    assert "layers.1.in_gate" in warning
    assert "layers.0" not in warning


def test_draws_of_a_captured_step_are_not_missed():
    model = net("mlp")
    bank = l0.nn.GateBank(model)
    optimizer = torch.optim.SGD(l0.nn.parameter_groups(model), lr=0.01)
    x = torch.randn(M, IN, device=DEVICE)

    def gradients():
        bank.draw()
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            graph.replay()
            optimizer.step()


def test_no_sync_in_a_draw_with_its_expected_counts():
    model = torch.nn.Sequential(net("mlp"), l0.nn.L0Linear(OUT, OUT, gate="weight", device=DEVICE))
    bank = l0.nn.GateBank(model)
    with no_sync():
        draws = [bank.draw(expected=True) for _ in range(3)]
    assert_expected(draws[-1], l0.nn.gate_modules(model))


def assert_expected(draw, gates):
    assert set(draw.expected) == set(gates)
    for gate, value in draw.expected.items():
        exact = gate.dist.p_open(gate.log_alpha.detach().double()).sum()
        torch.testing.assert_close(value, exact.to(value.dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in OPS if name != "penalty"])
@or_refused("name", FEATURES.get)
def test_graph_draws_anew_and_equals_eager(name):
    torch.manual_seed(0)
    problem = Problem(name, torch.float32)
    dy = torch.randn_like(problem.call(torch.tensor([1], device=DEVICE)))

    def call():
        seed = torch.randint(2**62, (1,), device=DEVICE)
        y = problem.call(seed)
        return seed, [y.detach(), *torch.autograd.grad(y, problem.leaves, dy)]

    graph, (seed, values) = capture(call)
    seeds, found = [], []
    for _ in range(3):
        graph.replay()
        seeds.append(seed.clone())
        found.append([value.clone() for value in values])
    assert len({int(s) for s in seeds}) == 3
    assert not torch.equal(found[0][0], found[1][0])
    for drawn, replayed in zip(seeds, found, strict=True):
        y = problem.call(drawn)
        eager = [y.detach(), *torch.autograd.grad(y, problem.leaves, dy)]
        for e, r in zip(eager, replayed, strict=True):
            torch.testing.assert_close(r, e, rtol=1e-5, atol=1e-5)


def test_graph_of_the_default_seed():
    """Without a seed it comes from torch's generator, which a graph advances."""
    log_alpha = torch.zeros(1000, device=DEVICE)
    graph, gates = capture(lambda: l0.sample_gates(log_alpha))
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(gates.z.clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    torch.manual_seed(9)
    graph.replay()
    replayed = gates.z.clone()
    torch.manual_seed(9)
    assert torch.equal(replayed, l0.sample_gates(log_alpha).z)


@pytest.mark.parametrize("kind", ["mlp", "ffn"])
@or_refused("kind", FEATURES.get)
def test_graph_of_a_training_step_learns(kind):
    step = Step(kind)
    graph, loss = capture(step)
    losses = []
    for _ in range(200):
        graph.replay()
        losses.append(loss.clone())
    first, last = torch.stack(losses[:10]).mean(), torch.stack(losses[-10:]).mean()
    assert last < 0.7 * first, (first, last)


def test_graph_of_a_bank():
    model = net("mlp")
    bank = l0.nn.GateBank(model)
    x = torch.randn(M, IN, device=DEVICE)

    def call():
        draw = bank.draw(expected=True)
        y = model(x)
        return draw, y.detach(), torch.autograd.grad(y.square().mean(), list(model.parameters()))

    graph, (draw, y, grads) = capture(call)
    graph.replay()
    first = y.clone()
    with torch.no_grad():
        for gate in l0.nn.gate_modules(model):
            gate.log_alpha.add_(1.0)
    graph.replay()
    assert not torch.equal(first, y)
    assert all(grad.isfinite().all() for grad in grads)
    assert_expected(draw, l0.nn.gate_modules(model))
