"""The native kernels: every instruction set, every thread count, their maths, their casts, their memory."""

import ctypes
import gc
import itertools
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import fresh
import pytest
import torch

import l0kernels as l0
from l0kernels import Gates, reference
from l0kernels._calls import GateGrads
from l0kernels._native import native
from op_checks import LAYOUTS, SEED, compare, make_z, sliced, to_list, transposed, wanted

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native is None, reason="l0kernels._C was not built"),
]

if native is not None:
    from l0kernels.impl import cpp, memory
    from l0kernels.impl import torch as portable

TESTS = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture
def on_cpp():
    with l0.use_backend("cpp"):
        yield


class TestInstructionSets:
    def test_names(self, isa):
        assert native.isa() == isa

    def test_unknown_and_automatic(self):
        widest = native.isa()
        assert not native.set_isa("sse9")
        assert native.isa() == widest
        assert native.set_isa("base")
        assert native.set_isa("auto")
        assert native.isa() == widest

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_small_product(self, isa, dtype):
        """Against the bound of a sum of K rounded products; the sizes pass every edge of the tiles."""
        depths = itertools.cycle([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100])
        layouts = itertools.cycle(itertools.product(LAYOUTS.values(), LAYOUTS.values()))
        kinds = itertools.cycle(itertools.product(("mixed", "open", None), ("mixed", None, "closed", "few")))
        for m, n in itertools.product(range(1, 31), [*range(1, 20), 31, 32, 33, 47, 48, 63, 64, 65, 97]):
            k, (x_layout, w_layout), (kind_in, kind_out) = next(depths), next(layouts), next(kinds)
            x, w, b = (torch.randn(s, dtype=dtype) for s in ((m, k), (n, k), (n,)))
            z_in = torch.ones(k, dtype=dtype) if kind_in is None else make_z(kind_in, k, dtype)
            z_out = torch.ones(n, dtype=dtype) if kind_out is None else make_z(kind_out, n, dtype)
            y = l0.gated_linear(
                x_layout(x),
                w_layout(w),
                b,
                in_gates=None if kind_in is None else Gates.from_z(z_in),
                out_gates=None if kind_out is None else Gates.from_z(z_out),
            )
            exact = ((x.double() * z_in) @ w.double().T + b.double()) * z_out.double()
            size = ((x.abs().double() * z_in) @ w.abs().double().T + b.abs().double()) * z_out.double()
            assert ((y - exact).abs() <= (k + 4) * EPS[dtype] * size).all(), (m, n, k)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "size", [(29, 383, 97), (30, 384, 65), (5, 385, 33), (3, 769, 17), (400, 45, 20)]
    )
    def test_layer_and_gradients(self, isa, size, dtype):
        m, n_in, n_out = size
        tensors = {
            "x": torch.randn(m, n_in, dtype=dtype),
            "w": torch.randn(n_out, n_in, dtype=dtype),
            "b": torch.randn(n_out, dtype=dtype),
            "z_in": make_z("mixed", n_in, dtype),
            "z_out": make_z("mixed", n_out, dtype),
        }

        def call(namespace, x, w, b, z_in, z_out):
            gates = {"in_gates": Gates.from_z(z_in), "out_gates": Gates.from_z(z_out)}
            return namespace.gated_linear(x, w, b, **gates)

        masks = {name: wanted(tensors[name], True) for name in ("z_in", "z_out")}
        compare(call, tensors, dtype=dtype, masks=masks)
        tensors["x"], tensors["w"] = transposed(tensors["x"]), sliced(tensors["w"])
        compare(call, tensors, dtype=dtype, masks=masks, layout=transposed)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
    def test_chain(self, isa, activation, dtype):
        shapes = {"x": (37, 61), "w": (83, 61), "b": (83,), "w2": (45, 83), "b2": (45,)}
        tensors = {name: torch.randn(s, dtype=dtype) for name, s in shapes.items()}
        tensors |= {"a": torch.randn(61, dtype=dtype), "a2": torch.randn(83, dtype=dtype)}

        def call(namespace, x, w, b, w2, b2, a, a2):
            gates = namespace.sample_gates([a, a2], seed=SEED)
            return namespace.gated_mlp(x, [w / 8, w2 / 8], [b, b2], gates, activation)

        compare(call, tensors, dtype=dtype)

    @pytest.mark.parametrize("block", [None, (16, 16), (5, 40)])
    def test_masked_linear(self, isa, block):
        grid = (45, 61) if block is None else (math.ceil(45 / block[0]), math.ceil(61 / block[1]))
        tensors = {"x": torch.randn(37, 61), "w": torch.randn(45, 61), "a": torch.randn(grid)}

        def call(namespace, x, w, a):
            return namespace.masked_linear(x, w, None, a, block=block, seed=SEED)

        compare(call, tensors, dtype=torch.float32)

    def test_gates_and_penalty(self, isa):
        log_alphas = [torch.randn(n) * 3 for n in (1, 15, 16, 17, 1023, 1025, 5000)]
        drawn = l0.sample_gates(log_alphas, seed=SEED)
        expected = reference.sample_gates(log_alphas, seed=SEED)
        for got, want in zip(drawn, expected, strict=True):
            assert (got.z - want.z).abs().max() < 1e-6
            assert torch.equal(got.index, want.index)
            assert torch.equal(got.count, want.count)
            assert torch.equal(got.z == 1, want.z == 1)
        torch.testing.assert_close(l0.l0_penalty(log_alphas), reference.l0_penalty(log_alphas))


class TestThreads:
    """Bitwise the same on one thread, two and three."""

    def results(self, call, tensors, threads, n):
        threads(n)
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    def check(self, call, tensors, threads):
        one = self.results(call, tensors, threads, 1)
        for n in (2, 3):
            for a, b in zip(one, self.results(call, tensors, threads, n), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", [(100, 784, 300), (37, 1000, 401), (600, 70, 130)])
    def test_gated_linear(self, on_cpp, threads, size, dtype):
        m, n_in, n_out = size
        shapes = ((m, n_in), (n_out, n_in), (n_out,), (n_in,), (n_out,))

        def call(x, w, b, a_in, a_out):
            return l0.l0_linear(x, w, b, in_log_alpha=a_in, out_log_alpha=a_out, seed=SEED)

        self.check(call, [torch.randn(s, dtype=dtype) for s in shapes], threads)

    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
    def test_gated_mlp(self, on_cpp, threads, activation):
        shapes = ((200, 301), (307, 301), (307,), (53, 307), (53,), (301,), (307,))

        def call(x, w, b, w2, b2, a, a2):
            return l0.gated_mlp(x, [w, w2], [b, b2], l0.sample_gates([a, a2], seed=SEED), activation)

        self.check(call, [torch.randn(s) / s[-1] ** 0.5 for s in shapes], threads)

    @pytest.mark.parametrize("block", [None, (32, 48)])
    def test_masked_linear(self, on_cpp, threads, block):
        grid = (307, 301) if block is None else (10, 7)

        def call(x, w, b, a):
            return l0.masked_linear(x, w, b, a, block=block, seed=SEED)

        self.check(call, [torch.randn(s) for s in ((90, 301), (307, 301), (307,), grid)], threads)

    @pytest.mark.parametrize("groups", [1, 24])
    def test_gated_conv2d(self, on_cpp, threads, groups):
        def call(x, w, b, a, a2):
            first, last = l0.sample_gates([a, a2], seed=SEED)
            return l0.gated_conv2d(x, w, b, 1, 1, 1, groups, in_gates=first, out_gates=last)

        shapes = ((5, 24, 17, 19), (48, 24 // groups, 3, 3), (48,), (24,), (48,))
        self.check(call, [torch.randn(s) for s in shapes], threads)

    def test_packed_channels_and_their_norm(self, on_cpp, threads):
        gates = l0.sample_gates(torch.zeros(24), seed=SEED)

        def call(x, scale, shift):
            packed = l0.pack_channels(x, gates)
            return l0.unpack_channels(l0.gated_batch_norm(packed, None, None, scale, shift, training=True))

        self.check(call, [torch.randn(s) for s in ((5, 24, 33, 35), (24,), (24,))], threads)

    def test_gated_attention(self, on_cpp, threads):
        def call(q, k, v, a):
            return l0.gated_attention(q, k, v, gates=l0.sample_gates(a, seed=SEED))

        self.check(call, [torch.randn(s) for s in (*[(2, 8, 70, 32)] * 3, (8,))], threads)

    def test_pack_and_unpack(self, threads):
        rows, cols = (to_list(Gates.from_z(make_z("mixed", n), full_grad=True)) for n in (301, 207))
        full, theta = torch.randn(301, 207), torch.randn(301, 207)
        results = []
        for n in (1, 2, 3):
            threads(n)
            packed = cpp.pack(full, rows, cols, torch.bfloat16, scale_rows=True, scale_cols=True)
            options = {"scale_rows": True, "scale_cols": True, "grads": GateGrads(theta, *[True] * 4)}
            results.append([packed, *cpp.unpack(packed, (301, 207), rows, cols, torch.float32, **options)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_calls_from_several_python_threads(self, on_cpp):
        """Scratch memory belongs to the calling thread."""
        from concurrent.futures import ThreadPoolExecutor

        x, w, a = torch.randn(40, 200), torch.randn(150, 200), torch.randn(200)

        def call(value):
            return l0.l0_linear(x, w, in_log_alpha=a, seed=torch.tensor([value]))

        expected = [call(value) for value in range(40)]
        with ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, pool.map(call, range(40)), expected))


def compiler():
    named = os.environ.get("CXX")
    return next((shutil.which(c) for c in (named, "c++", "g++", "clang++") if c and shutil.which(c)), None)


@pytest.fixture(scope="module", params=["", "-mavx2 -mfma"])
def maths(request, tmp_path_factory):
    """vector_math.h alone, compiled as the package is, with and without fused multiply-add."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    if request.param and native.isa() == "base":
        pytest.skip("this processor has no AVX2")
    folder = tmp_path_factory.mktemp("maths")
    functions = "".join(
        f"void v_{f}(const float* x, float* y, long n) "
        f"{{ for (long i = 0; i < n; ++i) y[i] = l0::math::{f}(x[i]); }}\n"
        for f in ("exp", "log", "erf")
    )
    source = folder / "maths.cpp"
    source.write_text(f'#include "vector_math.h"\nextern "C" {{\n{functions}}}\n')
    flags = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -shared"
    command = [compiler(), *flags.split(), *request.param.split(), f"-I{TESTS.parent / 'csrc'}", str(source)]
    subprocess.run([*command, "-o", str(folder / "maths.so")], check=True)
    library = ctypes.CDLL(str(folder / "maths.so"))

    def call(name, x):
        y = torch.empty_like(x)
        getattr(library, f"v_{name}")(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(x.numel())
        )
        return y

    return call


def ulps(got, exact):
    """Largest distance in units of the last place of the exact value."""
    exponent = torch.floor(torch.log2(exact.abs())).clamp(min=-126)
    return ((got.double() - exact).abs() / torch.exp2(exponent - 23)).max().item()


class TestMaths:
    """The errors that csrc/vector_math.h claims."""

    def test_exp(self, maths):
        x = torch.cat([torch.linspace(-87, 88, 2_000_000), torch.randn(1_000_000)])
        assert ulps(maths("exp", x), x.double().exp()) <= 2
        ends = torch.tensor([-float("inf"), -1e30, -88.0, 0.0, 89.0, 1e30, float("inf")])
        y = maths("exp", ends)
        assert y[3] == 1
        assert (y[:3] > 0).all()
        assert y.isfinite().all()
        assert (y[:3] < 1e-37).all()
        assert (y[4:] > 1e38).all()
        assert maths("exp", torch.tensor([float("nan")])).isnan().all()

    def test_log_of_every_noise(self, maths):
        u = (torch.arange(2**23, dtype=torch.float32) + 0.5) * 2.0**-23
        assert ulps(maths("log", u), u.double().log()) <= 2
        assert torch.equal(maths("log", torch.ones(1)), torch.zeros(1))

    def test_erf(self, maths):
        x = torch.cat(
            [torch.linspace(-6, 6, 2_000_000), torch.logspace(-30, 0, 100_000), torch.randn(1_000_000)]
        )
        assert ulps(maths("erf", x), torch.special.erf(x.double())) <= 8
        assert torch.equal(maths("erf", torch.tensor([0.0, -0.0])), torch.zeros(2))
        assert maths("erf", torch.tensor([float("nan")])).isnan().all()
        assert maths("erf", torch.tensor([-1e30, 1e30])).abs().sub(1).abs().max() < 1e-6

    @pytest.mark.parametrize("activation", ["gelu", "silu"])
    def test_activations_through_the_chain(self, isa, activation):
        """One unit with weight 1: the activation itself, and its derivative, within some roundings."""
        x = torch.cat([torch.linspace(-30, 30, 100_001), torch.randn(50_000)])[:, None].requires_grad_()
        one = torch.ones(1, 1)
        y = l0.gated_mlp(x, [one, one], [None, None], [None, None], activation)
        (grad,) = torch.autograd.grad(y.sum(), x)
        exact_x = x.detach().double().requires_grad_()
        exact = getattr(torch.nn.functional, activation)(exact_x)
        (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
        size = 1 + x.detach().double().abs()
        assert ((y.detach() - exact.detach()).abs() <= 4 * EPS[torch.float32] * size).all()
        assert ((grad - exact_grad).abs() <= 8 * EPS[torch.float32] * size).all()

    @pytest.mark.parametrize("activation", ["gelu", "silu"])
    def test_activations_of_any_size(self, isa, activation):
        """Far out they are 0 or x, their derivatives 0 or 1: what exp leaves at its end must not be seen."""
        x = torch.logspace(0, 38.5, 2000)
        x = torch.cat([x, -x])[:, None].requires_grad_()
        one = torch.ones(1, 1)
        y = l0.gated_mlp(x, [one, one], [None, None], [None, None], activation)
        (grad,) = torch.autograd.grad(y.sum(), x)
        exact_x = x.detach().double().requires_grad_()
        exact = getattr(torch.nn.functional, activation)(exact_x)
        (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
        size = 1 + exact.detach().abs()
        assert ((y.detach() - exact.detach()).abs() <= 8 * EPS[torch.float32] * size).all()
        assert ((grad - exact_grad).abs() <= 64 * EPS[torch.float32]).all()

    def test_gates_at_the_ends_of_the_noise(self, isa):
        log_alpha = torch.linspace(-12, 12, 200_001)
        z = l0.sample_gates(log_alpha, seed=SEED).z
        exact = reference.sample_gates(log_alpha.double(), seed=SEED).z
        assert (z - exact).abs().max() <= 10 * EPS[torch.float32]


def specials(dtype):
    """Values whose casts round, overflow, vanish or are no numbers."""
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = [half.view(torch.float16).double(), half.view(torch.bfloat16).double()]
    finite = values[0][values[0].isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2  # ties between neighbours of float16
    steps = torch.finfo(torch.float32).eps * middle.abs()
    values += [middle, middle + steps, middle - steps]
    coarse = values[1][values[1].isfinite()].sort().values
    values += [(coarse[1:] + coarse[:-1]) / 2]
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    values += [bits.view(torch.float32).double()]
    values += [torch.tensor([65504.0, 65519.9, 65520.0, 1e30, -1e30, 6e-8, 2.9e-8, 1e-40, 3.4e38, 1e300])]
    return torch.cat([v.flatten() for v in values]).to(dtype)


def assert_same_values(got, expected):
    """Equal to the bit but for the payload of a NaN."""
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    mask = ~expected.isnan()
    assert torch.equal(got[mask], expected[mask])
    assert torch.equal(got[mask].signbit(), expected[mask].signbit())


class TestCasts:
    @pytest.mark.parametrize("source", DTYPES)
    @pytest.mark.parametrize("target", DTYPES)
    def test_pack_and_unpack_round_as_torch_does(self, source, target):
        values = specials(source)[None]
        expected = values.to(target)
        n = values.shape[1]
        # a float64 gate makes the arithmetic float64
        gate_dtype = torch.float64 if torch.float64 in (source, target) else torch.float32
        for gate in (None, to_list(Gates.from_z(torch.ones(n, dtype=gate_dtype)))):
            assert_same_values(cpp.pack(values, None, gate, target), expected)
            unpacked, _, _ = cpp.unpack(values, (1, n), None, gate, target)
            assert_same_values(unpacked, expected)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("source", DTYPES)
    @pytest.mark.parametrize("target", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_pack_equals_the_portable_one(self, source, target, layout):
        full = LAYOUTS[layout](torch.randn(37, 53).to(source))
        z_dtype = torch.float64 if torch.float64 in (source, target) else torch.float32
        for row_kind, col_kind in itertools.product(("mixed", "open", "closed", "few", None), repeat=2):
            rows, cols = (
                None if kind is None else to_list(Gates.from_z(make_z(kind, n, z_dtype)))
                for kind, n in ((row_kind, 37), (col_kind, 53))
            )
            for flags in itertools.product([False, True], repeat=2):
                scales = dict(zip(("scale_rows", "scale_cols"), flags, strict=True))
                got = cpp.pack(full, rows, cols, target, **scales)
                expected = portable.pack(full, rows, cols, target, **scales)
                assert got.dtype == target
                assert got.shape == expected.shape
                # the two multiply in another order, and the portable one rounds on the way
                error = 2 * EPS[source] + EPS[target] if any(flags) else 0
                assert ((got.double() - expected.double()).abs() <= error * expected.double().abs()).all()

    @pytest.mark.parametrize("source", DTYPES)
    @pytest.mark.parametrize("target", DTYPES)
    def test_unpack_equals_the_portable_one(self, source, target):
        z_dtype = torch.float64 if torch.float64 in (source, target) else torch.float32
        for row_kind, col_kind in itertools.product(("mixed", "open", "closed", None), repeat=2):
            rows, cols = (
                None if kind is None else to_list(Gates.from_z(make_z(kind, n, z_dtype)))
                for kind, n in ((row_kind, 37), (col_kind, 53))
            )
            shape = [portable.extent(gate, n, source) for gate, n in ((rows, 37), (cols, 53))]
            packed, theta = torch.randn(shape).to(source), sliced(torch.randn(37, 53).to(target))
            for scale_rows, scale_cols, full in itertools.product([False, True], repeat=3):
                scales = {"scale_rows": scale_rows, "scale_cols": scale_cols}
                # only gates that multiply have a gradient
                options = scales | {"grads": GateGrads(theta, scale_rows, scale_cols, full, not full)}
                got = cpp.unpack(packed, (37, 53), rows, cols, target, **options)
                expected = portable.unpack(packed, (37, 53), rows, cols, target, **options)
                error = 2 * EPS[source] + 2 * EPS[target]
                for a, b in zip(got, expected, strict=True):
                    assert (a is None) == (b is None)
                    if a is None:
                        continue
                    assert (a.dtype, a.shape) == (b.dtype, b.shape)
                    assert torch.equal(a == 0, b == 0)
                    scale = b.double().abs().max() if a.ndim == 1 else b.double().abs()
                    assert ((a.double() - b.double()).abs() <= 8 * error * scale).all()


class TestMemory:
    @pytest.mark.parametrize("options", [[], pytest.param(["--whole"], marks=pytest.mark.long)])
    def test_guard_pages(self, options):
        """No kernel reads or writes outside its operands, and every result is written whole."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("L0KERNELS_")}
        environment["PYTHONPATH"] = str(Path(l0.__file__).parents[1])
        script = str(TESTS / "support/guard_pages.py")
        program = (
            f"import runpy, sys; sys.argv[1:] = {options}; runpy.run_path({script!r}, run_name='__main__')"
        )
        done = fresh.run(program, TESTS, environment)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "base ok" in done.stdout

    @pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="of glibc's allocator"
    )
    def test_gradients_of_some_megabytes_need_no_new_pages(self):
        """They are freed in every step: 36 MB of them are 9,200 pages."""
        program = """if True:
            import resource, torch
            from l0kernels.impl.memory import empty_grad

            weights = [torch.zeros(512, 512, 3, 3) for _ in range(4)]

            def step():
                for grad in [empty_grad(weight) for weight in weights]:
                    grad.fill_(0)

            for _ in range(3):
                step()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        environment["PYTHONPATH"] = str(Path(l0.__file__).parents[1])
        done = fresh.run(program, TESTS, environment)
        assert int(done.stdout) < 1000, done.stderr

    @pytest.mark.parametrize("what", ["gated_linear", "gated_mlp", "masked_linear"])
    def test_large_gradients_are_never_shared(self, on_cpp, monkeypatch, what):
        """Gradients on huge pages: what anybody still holds stays as it was."""
        monkeypatch.setattr(memory, "HUGE", 0)
        weight = torch.randn(19, 23, requires_grad=True)
        other = torch.randn(5, 19, requires_grad=True)
        x, log_alpha = torch.randn(7, 23), torch.randn(19, 23)
        calls = {
            "gated_linear": lambda k: l0.l0_linear(x * k, weight, in_log_alpha=log_alpha[0], seed=SEED + k),
            "gated_mlp": lambda k: l0.l0_mlp(
                x * k, [weight, other], [None] * 2, [log_alpha[0], None], seed=SEED + k
            ),
            "masked_linear": lambda k: l0.masked_linear(x * k, weight, None, log_alpha, seed=SEED + k),
        }

        def grad(k):
            return torch.autograd.grad(calls[what](k).square().sum(), weight)[0]

        with l0.use_backend("torch"):
            expected = [grad(k) for k in range(6)]
        held = [grad(k) for k in range(6)]
        views = [g[3:5] for g in held]
        for g, want, view in zip(held, expected, views, strict=True):
            torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(view, want[3:5], rtol=1e-4, atol=1e-4)
        assert len({g.data_ptr() for g in held}) == 6
        numpy = held.pop(0).numpy()  # memory may be held by others than tensors
        del held, views, g, want, view
        gc.collect()
        again = [grad(k) for k in range(1, 6)]
        torch.testing.assert_close(torch.from_numpy(numpy), expected[0], rtol=1e-4, atol=1e-4)
        for g, want in zip(again, expected[1:], strict=True):
            torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)

    def test_large_gradients_accumulate_and_train(self, on_cpp, monkeypatch):
        monkeypatch.setattr(memory, "HUGE", 0)
        x, log_alpha = torch.randn(7, 23), torch.randn(23)
        results = []
        for name in ("cpp", "torch"):
            with l0.use_backend(name):
                torch.manual_seed(4)
                weight = torch.randn(19, 23, requires_grad=True)
                optimiser = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
                for step in range(5):
                    optimiser.zero_grad(set_to_none=step % 2 == 0)
                    for part in range(3):
                        seed = torch.tensor([3 * step + part])
                        l0.l0_linear(x, weight, in_log_alpha=log_alpha, seed=seed).square().mean().backward()
                    optimiser.step()
                results.append(weight.detach())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["few", "mixed", "closed", "open"])
    @pytest.mark.parametrize("shape", [(1031, 1019), (129, 911, 3, 3)])
    def test_zeros_that_go_past_the_caches(self, on_cpp, shape, kind):
        """Rows of more than 2 MB in all, which begin and end anywhere in a line of the cache."""
        z, x = make_z(kind, shape[0]), torch.randn(3, shape[1], *shape[2:])
        gates = Gates.from_z(z)
        weight = torch.randn(shape, requires_grad=True)
        assert weight.nbytes > 2 << 20
        gated = l0.gated_conv2d if weight.ndim == 4 else l0.gated_linear
        y = gated(x, weight, out_gates=gates).flatten(1)
        dy = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, weight, dy)
        expected = ((dy * z).T @ x.flatten(1)).view(shape)
        assert torch.equal(grad[z == 0], torch.zeros_like(grad[z == 0]))
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("run", [1, 9, 8200])
    def test_matrices_that_go_past_the_caches(self, threads, run, dtype, n):
        """Rows made a piece at a time, and, of columns as wide as a piece, whole."""
        rows, columns = (67, 61) if run > 9 else (1021, 1213 // run)
        full = torch.randn(rows, columns * run).to(dtype)
        assert full.nbytes > 2 << 20
        threads(n)
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for kind in ("few", "mixed", "closed"):
            z = make_z("mixed", rows, gate_dtype), make_z(kind, columns, gate_dtype)
            sides = [to_list(Gates.from_z(side, full_grad=True)) for side in z]
            packed = cpp.pack(full, *sides, dtype, run=run)
            got, *_ = cpp.unpack(packed, full.shape, *sides, dtype, run=run)
            is_open = (z[0] != 0)[:, None] & (z[1] != 0).repeat_interleave(run)
            assert torch.equal(got, full.masked_fill(~is_open, 0))

    def test_inputs_are_left_alone(self, on_cpp):
        x, w, b = torch.randn(9, 23), torch.randn(19, 23), torch.randn(19)
        z = make_z("mixed", 23)
        tensors = [t.requires_grad_() for t in (x, w, b, z)]
        before = [t.detach().clone() for t in tensors]
        l0.gated_linear(x, w, b, in_gates=Gates.from_z(z)).square().sum().backward()
        assert all(torch.equal(t.detach(), old) for t, old in zip(tensors, before, strict=True))


class TestCompact:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 5000])
    def test_equals_from_z(self, n, dtype):
        for kind in ("mixed", "open", "closed", "wild"):
            z = make_z(kind, n, dtype)
            if n > 3:
                z[1], z[2] = float("nan"), -0.0
            gates = Gates.from_z(z)
            index, count = torch.empty_like(gates.index), torch.empty_like(gates.count)
            addresses = (index.data_ptr(), count.data_ptr())
            native.compact(z.data_ptr(), n, dtype == torch.float64, *addresses)
            assert torch.equal(index, gates.index)
            assert torch.equal(count, gates.count)
