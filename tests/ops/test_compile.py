"""Steps under torch.compile, graphs of torch.export, make_fx and torch.jit.trace: the values of eager."""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch._inductor.config
from op_calls import CALLS, assert_all_equal, leaves, step
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import _ops, nn
from op_checks import BACKENDS, ONE_BACKEND

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chain():
    """A plain convolution first, a norm, a residual, and linear layers behind nn.Flatten."""
    g = nn.HardConcreteGate(8)
    body = nn.L0Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), nn.L0BatchNorm2d(8), torch.nn.ReLU())
    return nn.L0Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.L0BatchNorm2d(8),
        torch.nn.ReLU(),
        nn.L0Residual(body),
        nn.L0Conv2d(8, 6, 3, gate="in", in_gate=g),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        nn.L0Linear(54, 10),
    )


MODELS = {
    "in": lambda: (nn.L0Linear(20, 12), (6, 20)),
    "both": lambda: (nn.L0Linear(20, 12, gate="both"), (6, 20)),
    "weight": lambda: (nn.L0Linear(20, 12, gate="weight"), (6, 20)),
    "block": lambda: (nn.L0Linear(20, 12, gate=(5, 4)), (6, 20)),
    "mlp": lambda: (nn.L0MLP([20, 12, 5]), (6, 20)),
    "feed forward": lambda: (nn.L0FeedForward(8, 20, "swiglu"), (3, 2, 8)),
    "convolution": lambda: (nn.L0Conv2d(4, 6, 3, gate="both"), (2, 4, 6, 5)),
    "chain": lambda: (chain(), (3, 3, 8, 8)),
}


def make(name):
    """The model, its gates spread over all states, and an input of it."""
    model, shape = MODELS[name]()
    with torch.no_grad():
        for gate in nn.gate_modules(model):
            gate.log_alpha.normal_(0, 2)
    return model, torch.randn(shape)


def drawn(model, bank, x):
    bank.draw()
    return model(x)


def within(model, bank, x):
    draw = bank.draw()
    bank.clear()
    with draw:
        return model(x)


def checkpointed(model, bank, x):
    bank.draw()
    return checkpoint(model, x, use_reentrant=False)


def expected(model, bank, x):
    return model(x) + sum(bank.draw(expected=True).expected.values())


STEPS = [drawn, within, checkpointed, expected]


def assert_same_steps(name, step, backend, n=2):
    """Two steps of a compiled and of an eager model: outputs, gradients, and the bank's step."""
    model, x = make(name)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend=backend)):
        twin = copy.deepcopy(model)
        bank = nn.GateBank(twin, seed=3)
        run = wrap(lambda x, twin=twin, bank=bank: step(twin, bank, x))
        values = []
        for i in range(n):
            torch.manual_seed(i)
            twin.zero_grad()
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.sin().sum().backward()
            values += [y.detach(), leaf.grad, *(p.grad for p in twin.parameters())]
        results.append((values, bank.step.item()))
    (left, left_step), (right, right_step) = results
    assert left_step == right_step
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestDraws:
    """The gates of a compiled backward are those of its forward."""

    @pytest.mark.parametrize("name", MODELS)
    def test_bank_draws_in_the_graph(self, name):
        assert_same_steps(name, drawn, "aot_eager")

    @pytest.mark.parametrize("step", STEPS[1:])
    def test_ways_to_draw(self, step):
        assert_same_steps("weight", step, "aot_eager")

    # Of `drawn` test_partitioner_short_of_memory shows as much.
    @pytest.mark.parametrize(
        "step", [within, expected, *(pytest.param(s, marks=pytest.mark.long) for s in (drawn, checkpointed))]
    )
    def test_partitioner_that_computes_again(self, step):
        assert_same_steps("weight", step, "aot_eager_decomp_partition")

    @pytest.mark.parametrize("name", ["weight", pytest.param("mlp", marks=pytest.mark.long)])
    def test_partitioner_short_of_memory(self, name):
        """Told to save little, it draws no seed a second time."""
        with torch._functorch.config.patch(activation_memory_budget=0.5):
            assert_same_steps(name, drawn, "aot_eager_decomp_partition")
            torch._dynamo.reset()
            assert_same_steps(name, lambda model, bank, x: model(x), "aot_eager_decomp_partition")

    def test_inductor(self):
        # Scalar code, compiled here at once: what inductor prepares for more takes longer than the test.
        quick = {"cpp.vec_isa_ok": False, "compile_threads": 1, "cpp_cache_precompile_headers": False}
        with torch._inductor.config.patch(quick):
            assert_same_steps("weight", drawn, "inductor", n=1)

    def test_a_counted_seed_of_the_caller(self):
        weight, log_alpha, x = torch.randn(7, 9), torch.randn(7, 9), torch.randn(4, 9)

        def step(w, seed):
            y = l0.masked_linear(x, w, None, log_alpha, seed=seed)
            seed.add_(1)
            return y

        w = weight.clone().requires_grad_()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(w, torch.tensor([5])).sum(), w)
        y = l0.masked_linear(x, w, None, log_alpha, seed=torch.tensor([5]))
        assert torch.equal(grad, torch.autograd.grad(y.sum(), w)[0])

    def test_a_draw_within_a_checkpoint(self):
        """The graph breaks at the region, and the values stay."""
        model, x = make("weight")
        twin = copy.deepcopy(model)
        grads = []
        for m, wrap in ((model, lambda f: f), (twin, lambda f: torch.compile(f, backend="aot_eager"))):
            bank = nn.GateBank(m, seed=3)

            def region(draw, x, m=m):
                with draw:
                    return m(x)

            def step(x, bank=bank, region=region):
                return checkpoint(region, bank.draw(), x, use_reentrant=False)

            wrap(step)(x).sin().sum().backward()
            grads.append(m.weight.grad)
        torch.testing.assert_close(*grads)

    def test_a_generator(self):
        generator, log_alpha = torch.Generator(), torch.randn(30)

        def draw():
            return l0.sample_gates(log_alpha, generator=generator).z + 0

        values = []
        for f in (draw, torch.compile(draw, backend="aot_eager")):
            generator.manual_seed(5)
            values.append(torch.cat([f(), f()]))
        assert torch.equal(*values)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="l0kernels: a compiled graph holds no generator; draw a seed"):
            torch.compile(draw, fullgraph=True, backend="aot_eager")()


class TestPenalty:
    @pytest.fixture
    def graphs(self):
        torch._dynamo.utils.counters.clear()
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()

    def model(self):
        g = nn.HardConcreteGate(20)
        own = nn.HardConcreteGate(5, dist=l0.HardConcrete(beta=0.5))
        return torch.nn.ModuleList(
            [
                nn.L0MLP([20, 12, 5]),
                nn.L0Linear(7, 5, gate=(2, 3)),
                nn.L0Conv2d(4, 6, 3, gate="both"),
                nn.L0Linear(20, 3, in_gate=g),
                nn.L0Linear(20, 4, in_gate=g),
                own,
            ]
        )

    def assert_equal(self, compiled, call, model, *args):
        results = []
        for f in (compiled, call):
            model.zero_grad()
            value = f(*args)
            value.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            results.append([value.detach(), *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_a_schedule_of_lam_compiles_once(self, graphs, weight_decay):
        model = self.model()

        def call():
            return nn.penalty(model, weight_decay=weight_decay)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for i in range(12):
            for k, gate in enumerate(nn.gate_modules(model)):
                gate.lam = i if i % 3 == 2 else 0.01 * (i + 1) * (k + 1)
            self.assert_equal(compiled, call, model)
        assert graphs() == 1

    @pytest.mark.parametrize("first", [2, pytest.param(1, marks=pytest.mark.long)])
    def test_a_schedule_of_weight_decay(self, graphs, first):
        model = self.model()[first:3]

        def call(weight_decay):
            return nn.penalty(model, weight_decay=weight_decay)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for i in range(12):
            self.assert_equal(compiled, call, model, 0.1 * (i + 1))
        assert graphs() <= 3

    @pytest.mark.parametrize("kind", [float, int, torch.tensor])
    def test_lam_as_an_argument(self, graphs, kind):
        log_alphas = [torch.randn(9, requires_grad=True), torch.randn(4, requires_grad=True)]

        def call(lam):
            return l0.l0_penalty(log_alphas, [3, 2.5], lam=lam)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for i in range(12):
            lam = kind(i / 4)
            torch.testing.assert_close(compiled(lam), call(lam))
            grads = [torch.autograd.grad(f(lam), log_alphas) for f in (compiled, call)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)
        assert graphs() <= 2

    def test_one_log_alpha_twice(self):
        log_alpha = torch.randn(9, requires_grad=True)

        def call():
            return l0.l0_penalty([log_alpha, log_alpha], [3, 2])

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call())
        left, right = (torch.autograd.grad(f(), log_alpha)[0] for f in (compiled, call))
        torch.testing.assert_close(left, right)

    def test_lam_as_a_tensor(self, backend):
        log_alphas = [torch.randn(9, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
        values = [
            l0.l0_penalty(log_alphas, [3, 2], lam=lam) for lam in ([0.5, 0.25], [torch.tensor(0.5), 0.25])
        ]
        assert torch.equal(*values)
        for a, b in zip(*(torch.autograd.grad(v, log_alphas) for v in values), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="lam must be a number or a 0-d tensor without a gradient"):
            l0.l0_penalty(log_alphas, lam=torch.tensor(0.5, requires_grad=True))
        with pytest.raises(ValueError, match=r"a 0-d tensor without a gradient, got shape \(2,\)"):
            l0.l0_penalty(log_alphas, lam=torch.ones(2))

    def test_lam_of_a_gate(self):
        gate = nn.HardConcreteGate(3, lam=0.5)
        assert (gate.lam, gate.lam_tensor.item()) == (0.5, 0.5)
        gate.lam = 2
        twin = copy.deepcopy(gate)
        gate.lam = 3
        assert (twin.lam, twin.lam_tensor.item(), gate.lam_tensor.item()) == (2, 2.0, 3.0)
        assert "lam" not in "".join(gate.state_dict())
        assert gate.to("meta").lam_tensor.device.type == "meta"
        assert torch.load(self.saved(twin), weights_only=False).lam_tensor.item() == 2.0
        with pytest.raises(TypeError, match="lam must be a number, got str"):
            gate.lam = "1"

    def saved(self, module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return file


class TestStaticShapes:
    def test_packed_channels(self):
        """packed_conv2d, its norm and its Packed, in a graph of whole shapes."""
        x, w, v, b = torch.randn(2, 5, 8, 7), torch.randn(6, 5, 3, 3), torch.randn(4, 6, 3, 3), torch.randn(6)
        log_alphas = torch.randn(5), torch.randn(6)
        seed = torch.tensor([4])

        def call(x, w, v, b, a_in, a_mid):
            first, mid = l0.sample_gates([a_in, a_mid], seed=seed)
            packed = l0.packed_conv2d(l0.pack_channels(x, first), w, b, padding=1, out_support=mid)
            packed = packed.map(torch.relu)
            packed = l0.gated_batch_norm(packed, None, None, training=True)
            return l0.packed_conv2d(packed, v, in_gates=mid), l0.unpack_channels(packed)

        results = []
        for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            tensors = [t.clone().requires_grad_() for t in (x, w, v, b, *log_alphas)]
            y, middle = f(*tensors)
            (y.sin().sum() + middle.square().sum()).backward()
            results.append([y.detach(), middle.detach(), *(t.grad for t in tensors)])
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)

    def test_packed_from_outside(self):
        gates = l0.Gates.from_z(torch.tensor([0.5, 0.0, 1.0]))
        packed = l0.pack_channels(torch.randn(2, 3, 4, 4), gates)
        compiled = torch.compile(l0.unpack_channels, backend="aot_eager")
        assert torch.equal(compiled(packed), l0.unpack_channels(packed))
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="l0kernels: Packed channels from outside"):
            torch.compile(l0.unpack_channels, fullgraph=True, backend="aot_eager")(packed)

    def test_packed_from_a_graph(self):
        gates = l0.Gates.from_z(torch.tensor([0.5, 0.0, 1.0]))
        x, w = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)
        packed = torch.compile(l0.pack_channels, fullgraph=True, backend="aot_eager")(x, gates)
        torch.testing.assert_close(l0.packed_conv2d(packed, w), l0.gated_conv2d(x[:, [0, 2]], w[:, [0, 2]]))

    def test_a_plain_convolution_computes_what_is_read(self, monkeypatch):
        """In front of a gated one, compiled as eager."""
        g = nn.HardConcreteGate(4)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), nn.L0Conv2d(4, 2, 3, gate="in", in_gate=g)
        model, seen = nn.L0Sequential(*layers), []
        module = _ops.module("cpp" if l0.backends()["gated_conv2d"]["cpp"] == "yes" else "torch")
        forward = module.conv2d_forward

        def spy(call):
            seen.append((call.in_gate is not None, call.out_gate is not None))
            return forward(call)

        monkeypatch.setattr(module, "conv2d_forward", spy)
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, 8, 8))
        assert seen == [(False, True), (True, False)]

    def test_sizes_become_symbols(self):
        model, _ = make("chain")
        model.eval()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for batch in (2, 3, 5, 9):
            x = torch.randn(batch, 3, 8, 8)
            torch._dynamo.mark_dynamic(x, 0)  # TestCompile counts what compiles without being told
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1

    def test_parametrized_layers(self):
        model, x = make("chain")
        for i in (0, 4, 7):
            torch.nn.utils.parametrizations.weight_norm(model[i])
        model.eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
class TestTraces:
    @pytest.mark.parametrize("name", MODELS)
    def test_jit_trace_in_evaluation(self, name):
        """Of torch's own operations alone: other values, other batches, saved and loaded."""
        model, x = make(name)
        model.eval()
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), file)
        file.seek(0)
        again = torch.jit.load(file)
        for y in (x, torch.randn_like(x), torch.randn(5, *x.shape[1:])):
            torch.testing.assert_close(again(y), model(y), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", MODELS)
    def test_jit_trace_of_a_draw(self, name):
        model, x = make(name)
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would freeze gates drawn in train\(\)"):
            torch.jit.trace(model, x)
        nn.GateBank(model).draw()
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would freeze gates drawn in train\(\)"):
            torch.jit.trace(model, x)

    def test_jit_trace_with_a_seed(self):
        log_alpha, x, w = torch.randn(9), torch.randn(3, 9), torch.randn(4, 9)

        def call(x, seed):
            return l0.gated_linear(x, w, in_gates=l0.sample_gates(log_alpha, seed=seed))

        traced = torch.jit.trace(call, (x, torch.tensor([1])))
        for value in (1, 7):
            seed = torch.tensor([value])
            torch.testing.assert_close(traced(x, seed), call(x, seed))

    @pytest.mark.parametrize("name", MODELS)
    def test_make_fx_and_export(self, name):
        model, x = make(name)
        model.eval()
        other = torch.randn_like(x)
        graph = make_fx(lambda x: model(x))(x)
        torch.testing.assert_close(graph(other), model(other), rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-5)
        model.train()
        program = torch.export.export(model, (x,)).module()
        assert not torch.equal(program(x), program(x))

    @pytest.mark.parametrize("name", MODELS)
    def test_script_and_symbolic_trace(self, name):
        model, _ = make(name)
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile L0"):
            torch.jit.script(torch.nn.Sequential(model))
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got (a )?Proxy"):
            torch.fx.symbolic_trace(model)


class TestConversions:
    def test_sync_batch_norm(self):
        convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
        model, x = make("chain")
        late = nn.L0Sequential().append(nn.L0BatchNorm2d(3))
        for net, name in ((model, "1"), (torch.nn.Sequential(copy.deepcopy(model)), "1"), (late, "0")):
            with pytest.raises(RuntimeError, match=f"'{name}' must be the L0BatchNorm2d that it was"):
                convert(net)
        inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), nn.L0BatchNorm2d(4))
        nested = convert(nn.L0Sequential(inner, nn.L0Conv2d(4, 2, 3, gate="in"))).eval()
        with pytest.raises(RuntimeError, match=r"'0\.1' must be the L0BatchNorm2d that it was"):
            nested(x)
        plain = nn.L0Sequential(torch.nn.BatchNorm2d(3), nn.L0Conv2d(3, 4, 3, gate="in")).eval()
        expected = plain(x)
        torch.testing.assert_close(convert(plain)(x), expected)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_quantize_dynamic(self):
        quantize = torch.ao.quantization.quantize_dynamic
        for name in ("in", "mlp"):
            model, x = make(name)
            assert torch.equal(quantize(model.eval(), {torch.nn.Linear})(x), model(x))
        model, x = make("feed forward")  # whose layers are replaced: they are called, with all hidden units
        small, y = quantize(model.eval(), {torch.nn.Linear}), model(x)
        assert (small(x) - y).abs().max() < 0.05 * y.abs().max()
        with pytest.raises(ValueError, match=r"up of an L0FeedForward must have a weight where weight_decay"):
            nn.penalty(small, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_whole_training_step():
    """Draw, penalty with a schedule, backward, Adam and clamp in one compiled function, as eager."""
    model, x = make("both")
    target, nets = torch.randint(0, 5, (len(x),)), []
    for _ in range(2):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
        nn.clamp_after_step(optimizer, twin)
        nets.append((twin, optimizer, nn.GateBank(twin, seed=1)))

    def step(net, optimizer, bank):
        optimizer.zero_grad()
        bank.draw()
        loss = torch.nn.functional.cross_entropy(net(x), target) + nn.penalty(net, weight_decay=0.01) / 100
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(step, backend="aot_eager")
    for i in range(4):
        for net, _, _ in nets:
            for gate in nn.gate_modules(net):
                gate.lam = 0.1 * i
        torch.testing.assert_close(compiled(*nets[0]), step(*nets[1]), rtol=1e-4, atol=1e-5)
    for a, b in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiled_autograd():
    """Dynamo makes modules of its own while it traces a backward: the gates' watch lets them pass."""
    model, x = make("both")
    twin = copy.deepcopy(model)

    def step(net):
        (net(x).sin().sum() + nn.penalty(net, weight_decay=0.1)).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.manual_seed(1)
        torch.compile(step, backend="aot_eager")(model)
    torch.manual_seed(1)
    step(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("backend", "name"),
        [(BACKENDS[i % len(BACKENDS)], name) for i, name in enumerate(CALLS)],
        indirect=["backend"],
    )
    def test_whole_graph_two_sizes(self, backend, name):
        """One graph, the batch a symbol; it has the backend by name alone: each call is on one of them."""
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter)
        for batch in (6, 11):
            tensors = leaves(batch)
            torch._dynamo.mark_dynamic(tensors["x"], 0)
            results = step(compiled, tensors), step(CALLS[name], leaves(batch))
            if name == "l2_penalty":  # compiled, weight_decay multiplies the sum and not its terms
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)
            else:
                assert_all_equal(*results)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
    def test_many_sizes_compile_twice(self, backend):
        """The batch becomes a symbol: the shapes of the operators' results follow from their inputs."""
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(CALLS["gated_mlp"], fullgraph=True, backend=counter)
        for batch in (6, 11, 17, 30):
            assert_all_equal(step(compiled, leaves(batch)), step(CALLS["gated_mlp"], leaves(batch)))
        assert counter.frame_count == 2

    @pytest.mark.parametrize("backend", ONE_BACKEND, indirect=True)
    def test_seed_is_an_input(self, backend):
        tensors = leaves(6)

        def call(seed):
            return l0.l0_linear(tensors["x"], tensors["w"], in_log_alpha=tensors["a_in"], seed=seed)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for value in (1, 2, 2**62):
            seed = torch.tensor([value])
            assert torch.equal(compiled(seed), call(seed))
        assert not torch.equal(compiled(torch.tensor([1])), compiled(torch.tensor([2])))

    def test_backend_is_a_guard(self):
        call = CALLS["own gates"]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for name in ("torch", "reference", "torch"):
            with l0.use_backend(name):
                results.append(step(compiled, leaves(6)))
        assert_all_equal(results[0], results[2])
        torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-4, atol=1e-4)
