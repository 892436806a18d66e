"""Whatever memory a tensor has or has not: right values, or an error that says what is wrong."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import l0kernels as l0
from l0kernels import Gates
from l0kernels._native import native
from l0kernels.impl import memory
from op_checks import SEED, make_z, to_list

pytestmark = pytest.mark.usefixtures("seeded")

OPS = torch.ops.l0kernels
DIST = [2 / 3, -0.1, 1.1]


class NoMemory(Tensor):
    """A subclass that is a description alone, as fake, sharded and quantised tensors are."""

    @staticmethod
    def __new__(cls, like):
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"NoMemory has no {func}")


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shortened(t):
    return t[..., :-1].clone()


def cut(t):
    """As long as it says, in a storage that ends before."""
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


def other_dtype(t):
    return t.double() if t.dtype == torch.float32 else t.float()


SAME_VALUES = {
    "negated": lambda t: torch._neg_view(-t),
}
WRONG = {
    "freed": freed,
    "cut": cut,
    "shortened": shortened,
    "other dtype": other_dtype,
    "no memory": NoMemory,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


def gate(n):
    return to_list(Gates.from_z(make_z("mixed", n)))


def operators(backend):
    """Every operator with arguments of its own: name, arguments, what torch's own operations read of them."""
    torch.manual_seed(0)
    x, w, b, dy = torch.randn(6, 13), torch.randn(9, 13), torch.randn(9), torch.randn(6, 9)
    w2, dy2, a, a2 = torch.randn(5, 9), torch.randn(6, 5), torch.randn(13), torch.randn(9)
    f32, f = torch.float32, "relu"
    yield "sample", ([a, a2], SEED, 0, DIST, backend)
    yield "sample_expected", ([a, a2], SEED, 0, DIST, backend)
    yield "gate_grad", (torch.randn(13), make_z("mixed", 13), DIST, backend)
    yield "l0_penalty", ([a, a2], [1.0, 2.0], DIST, backend)
    yield "weighted_penalty", ([a, a2], torch.tensor([1.0, 2.0]), DIST, backend)
    layout = [1, 0, 1, 1, -1, 1]
    yield "coupled_penalty", ([w, b], [a, a2], [1.0, 2.0], layout, 0.1, DIST, backend)
    yield "coupled_penalty_grad", ([w, b], [a, a2], layout, torch.ones(()), 0.1, DIST, backend)
    yield "gated_linear", (x, w, b, gate(13), gate(9), True, f32, backend)
    needs = [True] * 5
    rest = (True, f32, [], [False, True], needs, DIST, backend)
    yield "gated_linear_backward", (dy, x, w, b, gate(13), gate(9), *rest)
    gates = [*gate(13), *gate(9)]
    yield "gated_mlp", (x, [w, w2], [b, None], gates, f, f32, False, backend)
    _, *saved = OPS.gated_mlp(x, [w, w2], [b, None], gates, f, f32, False, backend)
    needs = [True, True, True, True, False, True, True]
    rest = (f, f32, False, saved, [False, True], needs, DIST, backend)
    yield "gated_mlp_backward", (dy2, x, [w, w2], [b, None], gates, *rest)
    if backend == "cpp":
        yield "l0_linear", (x, w, b, a, a2, SEED, DIST, f32, backend)
        args = (x, [w, w2], [b, None], [a, a2], f, SEED, DIST, f32, backend)
        yield "l0_mlp", args
        z, index, count, _, *saved = OPS.l0_mlp(*args)
        rest = (z, index, count, f, f32, saved, [False, False], needs, DIST, backend)
        yield "l0_mlp_backward", (dy2, x, [w, w2], [b, None], [True, True], *rest)
        stages = ([1.0, 0.1, 0.2], [1.0, 0.3], [3.0, 0.1, 1.0])
        by_group = torch.rand(13, dtype=torch.float64)
        yield "prox", (torch.randn(6, 13), torch.rand(6, 13), by_group, *stages, [6, 13, 1], backend)
    yield "masked_weight", (w, torch.randn(9, 13), SEED, DIST, backend)
    yield "masked_weight_grad", (torch.randn(9, 13), w, torch.randn(9, 13), SEED, DIST, True, True, backend)
    z = make_z("mixed", 12).view(3, 4)
    yield "block_linear", (x, w, b, z, 3, 4, f32, backend)
    yield "block_linear_backward", (dy, x, w, b, z, 3, 4, f32, [True], [True] * 4, [], backend)
    image, kernel, dy = torch.randn(2, 6, 5, 4), torch.randn(8, 6, 3, 3), torch.randn(2, 8, 5, 4)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    shared = (gate(6), gate(8))
    yield "gated_conv2d", (image, kernel, b[:8], *shared, True, True, False, False, *conv, f32, backend)
    flags = (True, True, False, False)
    rest = (*shared, *flags, *conv, f32, [], [True, False], [True] * 5, DIST, backend)
    yield "gated_conv2d_backward", (dy, image, kernel, b[:8], *rest)


def places(args):
    """Where tensors are: the number of the argument, and in a list of them that of the tensor."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            yield i, None
        elif isinstance(value, list):
            yield from ((i, j) for j, t in enumerate(value) if isinstance(t, Tensor))


def put(args, place, change):
    i, j = place
    args = [list(a) if isinstance(a, list) else a for a in args]
    if j is None:
        args[i] = change(args[i])
    else:
        args[i][j] = change(args[i][j])
    return args


def at(args, place):
    return args[place[0]] if place[1] is None else args[place[0]][place[1]]


def flat(result):
    return [result] if isinstance(result, Tensor) else list(result)


def call(name, args):
    """As the functions call it, past the dispatcher where that is allowed."""
    operator = getattr(l0._ops, name)
    return flat(operator(*operator.layout.gather(args)))


class TestEveryOperatorEveryArgument:
    def test_the_table_is_whole(self):
        names = {
            n.split("::")[1].split(".")[0]
            for n in torch._C._dispatch_get_all_op_names()
            if "l0kernels::" in n
        }
        of_a_seed = {"agreed_seed", "copied_seed", "kept_seed"}
        of_triton = {"gated_attention", "gated_attention_backward"}  # alone: triton/test_attention.py
        assert {name for name, _ in operators("cpp")} == names - of_a_seed - of_triton

    @pytest.mark.parametrize("kind", SAME_VALUES)
    def test_values_count_not_memory(self, backend, kind):
        change = SAME_VALUES[kind]
        for name, args in operators(backend):
            for place in places(args):
                if at(args, place).dtype != torch.float32:
                    continue
                changed = call(name, put(args, place, change))
                for a, b in zip(changed, call(name, args), strict=True):
                    if "mlp" in name and "backward" not in name and a.shape == (6, 9):
                        continue  # packed activations hold anything beyond the open units
                    torch.testing.assert_close(a, b, msg=str((name, place)))

    def test_zeros_without_memory(self, backend):
        for name, args in operators(backend):
            for place in places(args):
                t = at(args, place)
                if t.dtype != torch.float32 or t.ndim == 0:
                    continue
                without = call(name, put(args, place, lambda t: torch._efficientzerotensor(t.shape)))
                with_memory = call(name, put(args, place, torch.zeros_like))
                assert torch.equal(without[0], with_memory[0]), (name, place)

    @pytest.mark.parametrize("kind", WRONG)
    def test_wrong_memory_is_refused_or_not_read(self, kind):
        """Where a wrong size or dtype has a meaning (other gates, a composition), only memory must be right:
        that is for the sanitizers, under which this file runs, too."""
        change, refused = WRONG[kind], 0
        for name, args in operators("cpp"):
            for place in places(args):
                t = at(args, place)
                if kind in ("shortened", "sparse") and t.ndim == 0:
                    continue
                if name.startswith("gated_conv2d") and kind in ("freed", "cut") and t.ndim == 4:
                    continue  # torch's own convolution reads it
                torch.manual_seed(1)
                try:
                    result = call(name, put(args, place, change))
                except (TypeError, ValueError, RuntimeError):
                    refused += 1
                    continue
                if kind in ("freed", "cut", "no memory"):  # then nobody reads it
                    assert all(map(torch.equal, result, call(name, args))), (name, place)
        assert refused >= {"other dtype": 60, "shortened": 60, "sparse": 60, "meta": 70}.get(kind, 100)


LAZY = {  # a tensor, and what it means, in memory of its own
    "negated": (lambda t: torch._neg_view(-t), lambda t: t),
    "imaginary part": (lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag, lambda t: t),
    "zeros": (lambda t: torch._efficientzerotensor(t.shape), torch.zeros_like),
    "expanded": (
        lambda t: t.flatten()[:1].reshape([1] * t.ndim).expand(t.shape),
        lambda t: torch.full_like(t, t.flatten()[0].item()),
    ),
}
MODULES = {
    "input gates": (lambda: l0.nn.L0Linear(8, 5), (4, 8)),
    "output gates": (lambda: l0.nn.L0Linear(8, 5, gate="out"), (2, 3, 8)),
    "both": (lambda: l0.nn.L0Linear(8, 5, gate="both"), (4, 8)),
    "a gate per weight": (lambda: l0.nn.L0Linear(8, 5, gate="weight"), (4, 8)),
    "a gate per block": (lambda: l0.nn.L0Linear(8, 5, gate=(2, 3)), (4, 8)),
    "chain": (lambda: l0.nn.L0MLP([8, 7, 5], "gelu"), (4, 8)),
    "gated product": (lambda: l0.nn.L0FeedForward(8, 6, "swiglu"), (4, 8)),
    "convolution": (lambda: l0.nn.L0Conv2d(4, 6, 3, gate="both"), (2, 4, 6, 6)),
    "grouped convolution": (lambda: l0.nn.L0Conv2d(4, 6, 3, gate="both", groups=2), (2, 4, 6, 6)),
    "packed channels": (
        lambda: l0.nn.L0Sequential(
            torch.nn.Conv2d(4, 8, 3, padding=1),
            l0.nn.L0BatchNorm2d(8),
            torch.nn.ReLU(),
            l0.nn.L0Conv2d(8, 6, 3, gate="in"),
            torch.nn.Flatten(),
            l0.nn.L0Linear(6 * 16, 5),
        ),
        (2, 4, 6, 6),
    ),
}


class TestModules:
    """The same seen from a layer: what users do to parameters between two steps."""

    def layer(self, n_in=4096, n_out=2100):
        return l0.nn.L0Linear(n_in, n_out, gate=None)  # a gradient beyond memory.HUGE

    @pytest.mark.parametrize(
        ("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
    )
    def test_another_dtype_after_a_step(self, first, then):
        layer, x = self.layer().to(first), torch.randn(4, 4096)
        layer(x.to(first)).sum().backward()
        layer.zero_grad()
        layer.to(then)
        layer(x.to(then)).sum().backward()
        assert layer.weight.grad.dtype == then
        assert torch.allclose(layer.weight.grad.double(), x.double().sum(0).expand(2100, -1), atol=1e-5)

    def test_a_gradient_given_back_and_one_held(self):
        layer, x = self.layer(), torch.ones(1, 4096)
        layer(x).sum().backward()
        layer.weight.grad.untyped_storage().resize_(0)
        layer.weight.grad = None
        layer(x).sum().backward()
        held, shared = layer.weight.grad.untyped_storage(), layer.weight.grad.numpy()
        layer.weight.grad = None
        layer(3 * x).sum().backward()
        assert torch.tensor(held[:4], dtype=torch.uint8).view(torch.float32).item() == 1
        assert (shared == 1).all()
        assert (layer.weight.grad == 3).all()

    def test_a_weight_given_back_before_backward(self):
        layer = l0.nn.L0Linear(20, 5, gate=None)
        y = layer(torch.randn(3, 20, requires_grad=True)).sum()
        layer.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"weight must have memory for its \(5, 20\) elements"):
            y.backward()

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("training", [True, False])
    def test_parameters_given_back(self, backend, name, training):
        make, shape = MODULES[name]
        names = [n for n, _ in make().named_parameters()]
        for parameter in names:
            module = make().train(training)
            module.get_parameter(parameter).untyped_storage().resize_(0)
            ours_or_torchs = "must have memory for its|out of bounds for storage of size 0"
            with pytest.raises(RuntimeError, match=ours_or_torchs):
                module(torch.randn(shape))

    def test_rows_and_frozen_weights_that_are_not_there(self, backend):
        """No rows: every gradient is zero, whoever is frozen."""
        for frozen in (True, False):
            layer, chain = l0.nn.L0Linear(7, 10, gate="both"), l0.nn.L0MLP([7, 10, 3], "gelu")
            modules = [layer, chain, l0.nn.L0FeedForward(7, 5), l0.nn.L0Linear(7, 10, gate=(2, 3))]
            modules += [l0.nn.L0Linear(7, 10, gate="weight"), l0.nn.L0MLP([7, 10])]
            for module in modules:
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_("log_alpha" in name or not frozen)
                x = torch.randn(0, 7, requires_grad=True)
                module(x).sum().backward()
                assert x.grad.shape == (0, 7)
                for parameter in module.parameters():
                    assert parameter.grad is None or (parameter.grad == 0).all()
                assert all(g.log_alpha.grad is not None for g in l0.nn.gate_modules(module))

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("kind", LAZY)
    def test_values_count_not_memory(self, backend, name, kind):
        """Inputs, incoming gradients and parameters whose memory is not their values, or not all of them."""
        make, shape = MODULES[name]
        module, (lazy, plain) = make(), LAZY[kind]

        def step(x, dy):
            torch.manual_seed(1)
            module.zero_grad()
            x = x if kind == "zeros" else x.detach().requires_grad_()
            y = module(x)
            y.backward(dy)
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            return [y.detach(), *([] if kind == "zeros" else [x.grad]), *grads]

        x = torch.randn(shape)
        dy = torch.randn(module(x).shape)
        expected = step(plain(x), plain(dy))
        for a, b in zip(step(lazy(x), lazy(dy)), expected, strict=True):
            torch.testing.assert_close(a, b)
        if kind == "negated":
            for owner in list(module.modules()):
                for leaf, parameter in list(owner.named_parameters(recurse=False)):
                    setattr(owner, leaf, torch.nn.Parameter(lazy(parameter.detach())))
            for a, b in zip(step(x, dy), expected, strict=True):
                torch.testing.assert_close(a, b)

    def test_gates_of_another_size(self, backend):
        """A bank's draw, and the caller's gates."""
        layer = l0.nn.L0Linear(40, 6)
        bank = l0.nn.GateBank(layer, seed=1)
        bank.draw()
        keep = torch.arange(16)
        layer.weight = torch.nn.Parameter(layer.weight[:, keep].clone())
        layer.in_gate.log_alpha = torch.nn.Parameter(layer.in_gate.log_alpha[keep].clone())
        with pytest.raises(ValueError, match=r"16 gates.*got 40"):
            layer(torch.randn(4, 16))
        with pytest.raises(ValueError, match="must hold 16 gates"):
            l0.gated_linear(torch.randn(4, 16), layer.weight, in_gates=Gates.from_z(torch.ones(40)))


@pytest.mark.skipif(native is None, reason="only native code is told addresses")
class TestGateway:
    def test_says_what_is_wrong(self):
        t = torch.zeros(3, 4)
        for change, error, message in (
            (t.double(), TypeError, "x must have dtype torch.float32, got torch.float64"),
            (t[:2], ValueError, r"x must have shape \(3, 4\), got \(2, 4\)"),
            (torch._neg_view(t), memory.NotPlain, "x must be a plain tensor, got a lazily negated view"),
            (NoMemory(t), memory.NotPlain, "x must be a plain tensor, got a NoMemory"),
            (
                torch._efficientzerotensor((3, 4)),
                memory.NotPlain,
                "x must be a plain tensor with memory of its own",
            ),
            (t.to("meta"), ValueError, "x must be on the CPU, got meta"),
            (freed(t), RuntimeError, "x must have memory for its"),
            (cut(t), RuntimeError, "storage was resized to 47 bytes"),
        ):
            with pytest.raises(error, match=message):
                memory.matrix(change, "x", torch.float32, 3, 4)
        with pytest.raises(ValueError, match="b must be 3 contiguous elements"):
            memory.vector(torch.zeros(6)[::2], "b", torch.float32, 3)

    def test_strides_and_offsets(self):
        base = torch.arange(60.0)
        for t in (base.view(6, 10)[1:4, 2:9:3], base.view(6, 10).t()[3:], base[7:8].expand(5, 2)):
            address, *strides = memory.matrix(t, "x", torch.float32, *t.shape)
            assert (address, *strides) == (t.data_ptr(), *t.stride())
        assert memory.vector(base[5:9], "b", torch.float32, 4) == base.data_ptr() + 20
        assert memory.matrix(torch.zeros(0, 4), "x", torch.float32, 0, 4)[0] == 0

    def test_native_and_python_look_alike(self):
        """Each tensor, asked for in each way: csrc/tensor.cpp and looked_at give one answer."""
        base, device = torch.arange(120.0), torch.device("cpu")
        image = torch.randn(2, 3, 4, 5)
        tensors = {
            "vector": base,
            "parameter": torch.nn.Parameter(torch.randn(120)),
            "offset": base[7:],
            "strided": base.view(10, 12)[1:9:2, 3:],
            "expanded": base[3:4].expand(5, 4),
            "one of each": torch.zeros(1, 1, 1, 1),
            "scalar": torch.tensor(2.0),
            "none": torch.zeros(0, 3),
            "image": image,
            "channels last": image.contiguous(memory_format=torch.channels_last),
            "one channel": torch.randn(2, 1, 4, 5).transpose(2, 3),
            **{
                str(dtype): torch.ones(120).to(dtype)
                for dtype in (*l0._checks.DTYPES, torch.int32, torch.bool)
            },
            "complex": torch.ones(120, dtype=torch.complex64),
            "quarter": torch.ones(120).to(torch.float8_e4m3fn),
            **{f"{name} wrong": change(image) for name, change in WRONG.items()},
            "negated": torch._neg_view(base),
            "zeros without memory": torch._efficientzerotensor(120),
            "buffer": torch.nn.Buffer(torch.ones(120)),
            "an int": 3,
        }
        found = 0
        for name, t in tensors.items():
            for dtype in (None, torch.float32, torch.float64, torch.bool, torch.int32):
                for n in (-1, 120, 20, 1, 0):
                    for layout in (memory.ANY, memory.CONTIGUOUS, memory.CHANNELS_LAST):
                        for on in ((), (None,), (device,), (torch.device("meta"),)):
                            asked = dtype, n, layout, *on
                            got = native.address(t, *asked)
                            assert got == memory.looked_at(t, *asked), (name, asked)
                            found += bool(got)
        assert found > 200

    def test_shared_copies_are_parted_before_a_write(self):
        """A lazy copy has memory of its own once its address is known."""
        t = torch.ones(4)
        copy = torch._lazy_clone(t)
        assert memory.vector(copy, "x", torch.float32, 4) != memory.vector(t, "x", torch.float32, 4)

    def test_without_an_exchange_api(self):
        """An old torch: native code asks looked_at."""
        script = (
            "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
            "import l0kernels as l0; from l0kernels.impl import memory\n"
            "from l0kernels._native import native\n"
            "t = torch.randn(5)\n"
            "assert native.address(t, t.dtype, 5, 1, None) == t.data_ptr()\n"
            "assert native.address(t[::2], t.dtype, 3, 1) == 0 != native.address(t[::2], t.dtype, 3, 0)\n"
            "mlp = l0.nn.L0MLP((6, 4, 2)); optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)\n"
            "l0.nn.Budget(mlp, keep=0.5, steps=9).attach(optimizer)\n"
            "mlp(torch.randn(3, 6)).sum().backward(); optimizer.step()\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

    def test_no_address_is_taken_elsewhere(self):
        """data_ptr stands in memory.py alone."""
        from pathlib import Path

        package = Path(l0.__file__).parent
        found = {str(p.relative_to(package)) for p in package.rglob("*.py") if ".data_ptr(" in p.read_text()}
        assert found == {"impl/memory.py"}

    def test_large_gradients_lie_on_huge_pages(self):
        grad = memory.empty_grad(torch.zeros(4096, 2100))
        assert grad.untyped_storage().resizable()
        grad.fill_(1)
        assert (grad == 1).all()


class TestAroundTheKernels:
    """What torch's operations and the kernels would read beside the tensors that they are given."""

    @pytest.mark.parametrize("backend", ["cpp", "torch"])
    @pytest.mark.parametrize("n", [0, 1, 3])
    def test_one_weight_per_vector(self, backend, n):
        vectors = [torch.zeros(4), torch.zeros(5)]
        with pytest.raises(ValueError, match=f"weights must be one per gate vector, 2 .*got {n}"):
            OPS.l0_penalty(vectors, [1.0] * n, DIST, backend)
        with pytest.raises(ValueError, match="weights must be one per gate vector"):
            OPS.l0_penalty([], [], DIST, backend)

    @pytest.mark.parametrize("place", ["x", "weight", "bias"])
    @pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
    def test_a_storage_that_ends_early(self, backend, place):
        """A convolution and a norm are torch's, which looks at no storage."""
        given = {"x": torch.randn(2, 6, 5, 4), "weight": torch.randn(8, 6, 3, 3), "bias": torch.randn(8)}
        given[place] = cut(given[place])
        with l0.use_backend(backend), pytest.raises(RuntimeError, match=rf"{place} must have memory for its"):
            l0.gated_conv2d(**given, in_gates=Gates.from_z(torch.ones(6)))
        norm = {"x": torch.randn(2, 6, 5, 4), "weight": torch.randn(6), "bias": torch.randn(6)}
        norm[place] = cut(norm[place])
        args = (norm["x"], None, None, norm["weight"], norm["bias"], True)
        with l0.use_backend(backend), pytest.raises(RuntimeError, match=rf"{place} must have memory for its"):
            l0.gated_batch_norm(*args, gates=Gates.from_z(torch.ones(6)))

    def test_a_view_that_reaches_further_than_its_elements(self):
        base = torch.randint(-8, 9, (4, 13)).float()  # exact sums, whatever their order
        view = base[:, ::4]  # 16 elements, the last of them the 52nd
        want = torch.nn.functional.linear(view, torch.ones(3, 4))
        assert torch.equal(l0.gated_linear(view, torch.ones(3, 4)), want)
        base.untyped_storage().resize_(30 * 4)
        with pytest.raises(RuntimeError, match="x must have memory for its"):
            l0.gated_linear(view, torch.ones(3, 4), in_gates=Gates.from_z(torch.ones(4)))

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    @pytest.mark.parametrize("kind", ["coo", "csr", "mkldnn", "nested", "jagged", "lazy"])
    def test_layouts_are_refused_by_name(self, kind):
        def make(n):
            t = torch.randn(n, n)
            return {
                "coo": t.to_sparse,
                "csr": t.to_sparse_csr,
                "mkldnn": t.to_mkldnn,
                "nested": lambda: torch.nested.nested_tensor([t, t]),
                "jagged": lambda: torch.nested.nested_tensor([t, t], layout=torch.jagged),
                "lazy": torch.nn.UninitializedParameter,
            }[kind]()

        dense, a, match = torch.randn(4, 4), torch.zeros(4), r"must be a dense tensor|must have values"
        for args in ((make(4), dense), (dense, make(4))):
            with pytest.raises(TypeError, match=match):
                l0.gated_linear(*args)
            with pytest.raises(TypeError, match=match):
                l0.l0_linear(*args, in_log_alpha=a)
            with pytest.raises(TypeError, match=match):
                l0.l0_mlp(args[0], [args[1]], [None], [a])
            with pytest.raises(TypeError, match=match):
                l0.masked_linear(*args, None, torch.zeros(4, 4))
        for call in (l0.sample_gates, l0.eval_gates, l0.l0_penalty, Gates.from_z):
            with pytest.raises(TypeError, match=match):
                call(make(4))
        with pytest.raises(TypeError, match=match):
            l0.l0_penalty([a, make(4)])

    @pytest.mark.parametrize("bias", ["coo", "mkldnn"])
    def test_a_chain_with_a_sparse_bias(self, bias):
        b = torch.randn(4).to_sparse() if bias == "coo" else torch.randn(4).to_mkldnn()
        with pytest.raises(TypeError, match=r"bias.* must be a (dense|plain) tensor"):
            l0.l0_mlp(torch.randn(2, 4), [torch.randn(4, 4)], [b], [torch.zeros(4)])
