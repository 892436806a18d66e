"""The public operations and modules on a GPU, every backend, against the dense formula in float64.

Sizes are chosen by path: launch-bound ones, one above the tiles, aligned ones for the bulk copies, and large.
"""

import itertools

import pytest
import test_linear
import test_mlp
import torch
from gpu_cases import BACKENDS, DEVICE, DTYPES, NEEDS_GPU, ON_GPU, gates_from, on_device, or_refused, why_skip
from test_linear import SIDES, needs_of
from test_masked_linear import case as masked_case

import l0kernels as l0
from l0kernels import reference
from op_checks import KINDS, LAYOUTS, compare, strided, transposed, wanted

pytestmark = NEEDS_GPU

SIZES = [(1, 1, 1), (7, 13, 11), (100, 784, 300), (257, 515, 131), (512, 384, 640)]
LARGE = (1024, 1280, 2048)
CHAINS = [(1, (1, 1, 1)), (13, (17, 31, 29, 11)), (100, (784, 300, 100, 10)), (384, (256, 640, 128))]
WIDE = (1024, (512, 2048, 512))
SEEDS = (1, 2**40 + 17)


def ids(dtype):
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    reason = why_skip(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with l0.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison():
    """Fresh numbers in every test; unwritten memory reads as NaN or as the largest integer; no tf32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def seed_tensor(value):
    return torch.tensor([value], device=DEVICE)


# ---- linear


def linear(sides, *, plain=False, full=False):
    def call(namespace, x, weight, bias, z_in=None, z_out=None):
        options = {}
        if sides[0]:
            options["in_gates"] = gates_from(z_in, plain=plain, full=full)
        if sides[1]:
            options[sides[1]] = gates_from(z_out, plain=plain, full=full)
        return namespace.gated_linear(x, weight, bias, **options)

    return call


def check_linear(size, sides, dtype, *, kind="mixed", plain=False, full=False, bias=True):
    tensors, masks = on_device(test_linear.case(size, sides, kind, dtype, full, bias))
    what = f"{size} {sides} {kind}{' plain' if plain else ''}"
    needs = needs_of(tensors, sides)
    call = linear(sides, plain=plain, full=full)
    return compare(call, tensors, dtype=dtype, what=what, masks=masks, needs=needs), tensors


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_linear_sizes(size, sides, dtype):
    for plain in (False, True):
        check_linear(size, sides, dtype, plain=plain)


@each_dtype
@pytest.mark.parametrize("size", [(13, 37, 29), (300, 320, 288)], ids=str)
def test_linear_kinds_of_gates(size, dtype):
    for sides, kind, plain in itertools.product(SIDES, KINDS, (False, True)):
        (_, grads), tensors = check_linear(size, sides, dtype, kind=kind, plain=plain, bias=kind != "few")
        for name, dim in (("z_in", 1), ("z_out", 0)):
            if name in tensors:
                assert not grads["weight"].index_select(dim, (tensors[name] == 0).nonzero()[:, 0]).any()


@each_dtype
def test_linear_full_grad_and_wild_gates(dtype):
    for size, sides in itertools.product([(13, 37, 29), (300, 320, 288)], SIDES[1:4]):
        check_linear(size, sides, dtype, kind="wild", full=True)


@each_dtype
@pytest.mark.parametrize("size", [(12, 35, 18), (130, 272, 136)], ids=str)
def test_linear_layouts(size, dtype):
    layouts = itertools.product(LAYOUTS.values(), LAYOUTS.values(), (torch.clone, transposed))
    for x_layout, w_layout, dy_layout in layouts:
        tensors, masks = test_linear.case(size, dtype=dtype)
        tensors["x"], tensors["weight"] = x_layout(tensors["x"]), w_layout(tensors["weight"])
        tensors["bias"], tensors["z_in"] = strided(tensors["bias"]), strided(tensors["z_in"])
        tensors, masks = on_device([tensors, masks])
        compare(linear((True, "out_gates")), tensors, dtype=dtype, masks=masks, layout=dy_layout)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 13), (2, 0, 13), (3, 2, 13)], ids=str)
def test_linear_leading_dimensions_and_empty_batches(shape, dtype):
    tensors, masks = on_device(test_linear.case((1, 13, 11), dtype=dtype))
    tensors["x"] = torch.randn(shape, device=DEVICE, dtype=dtype)
    y, grads = compare(linear((True, "out_gates")), tensors, dtype=dtype, masks=masks)
    assert y.shape == (*shape[:-1], 11)
    assert grads["x"].shape == shape


@each_dtype
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_linear_large(sides, dtype):
    for plain in (False, True):
        check_linear(LARGE, sides, dtype, plain=plain)


@each_dtype
def test_linear_draws_as_the_reference(dtype):
    for size, seed in itertools.product([(100, 784, 300), (257, 515, 131)], SEEDS):
        tensors, _ = on_device(test_linear.case(size, (False, None), dtype=dtype))
        for name, n, shift in (("in_log_alpha", size[1], -1.0), ("out_log_alpha", size[2], 2.0)):
            tensors[name] = torch.randn(n, device=DEVICE) * 3 + shift

        def call(namespace, x, weight, bias, seed=seed, **log_alphas):
            return namespace.l0_linear(x, weight, bias, **log_alphas, seed=seed_tensor(seed))

        given = [tensors["in_log_alpha"], tensors["out_log_alpha"]]
        drawn = reference.sample_gates(given, seed=seed_tensor(seed))
        names = ("in_log_alpha", "out_log_alpha")
        masks = {name: wanted(gates.z, False) for name, gates in zip(names, drawn, strict=True)}
        compare(call, tensors, dtype=dtype, what=f"{size}", masks=masks)


# ---- mlp


def chain(activation, *, plain=False, full=False):
    def call(namespace, x, **leaves):
        depth = len(leaves) // 3
        w, b, z = ([leaves[f"{name}{i}"] for i in range(depth)] for name in "wbz")
        gates = [None if v is None else gates_from(v, plain=plain, full=full) for v in z]
        return namespace.gated_mlp(x, w, b, gates, activation)

    return call


def check_mlp(batch, sizes, activation, dtype, *, plain=False, **options):
    tensors, masks = on_device(test_mlp.case(batch, sizes, activation=activation, dtype=dtype, **options))
    what = f"{batch} {sizes} {options}{' plain' if plain else ''}"
    call = chain(activation, plain=plain, full=options.get("full", False))
    # Roundings add up from layer to layer. At relu's corner they also open or close a unit for a row: one
    # term more or less in its weights' gradient, and at times none left in its gate's.
    half = dtype in (torch.float16, torch.bfloat16)
    corner = half and activation == "relu"
    slack, underflow = (len(sizes) - 1) * (8 if corner else 1), corner
    return compare(call, tensors, dtype=dtype, what=what, masks=masks, slack=slack, underflow=underflow)


@each_dtype
@pytest.mark.parametrize("activation", test_mlp.ACTIVATIONS)
@pytest.mark.parametrize(("batch", "sizes"), CHAINS, ids=str)
@or_refused("activation")
def test_mlp_sizes(batch, sizes, activation, dtype):
    for plain in (False, True):
        check_mlp(batch, sizes, activation, dtype, plain=plain)


@each_dtype
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("gated", test_mlp.GATED, ids=str)
@or_refused("activation")
def test_mlp_with_and_without_each_gate_and_bias(gated, activation, dtype):
    for biased in ((True, True, True), (False, False, False), (True, False, True)):
        check_mlp(11, (13, 37, 17, 7), activation, dtype, gated=gated, biased=biased)


@each_dtype
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("sizes", [(23, 41, 5), (272, 384, 136)], ids=str)
@or_refused("activation")
def test_mlp_kinds_of_gates(sizes, activation, dtype):
    for kinds, plain in itertools.product(itertools.product(KINDS, repeat=2), (False, True)):
        _, grads = check_mlp(140, sizes, activation, dtype, kinds=kinds, plain=plain)
        if kinds == ("closed", "closed"):
            assert not any(grads[name].any() for name in ("x", "w0", "w1", "b0"))


@each_dtype
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@or_refused("activation")
def test_mlp_full_grad_and_wild_gates(activation, dtype):
    check_mlp(60, (23, 41, 19), activation, dtype, kinds=("wild",), full=True)
    check_mlp(256, (128, 384, 256), activation, dtype, kinds=("wild",), full=True)


@each_dtype
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@or_refused("activation")
def test_mlp_large(activation, dtype):
    for gated, plain in itertools.product(((False, True), (True, True)), (False, True)):
        check_mlp(*WIDE, activation, dtype, gated=gated, plain=plain)


@each_dtype
def test_mlp_draws_as_the_reference(dtype):
    for (batch, sizes), seed in itertools.product([CHAINS[2], (300, (512, 1024, 256))], SEEDS):
        tensors, _ = on_device(test_mlp.case(batch, sizes, dtype=dtype, gated=(False,) * (len(sizes) - 1)))
        depth = len(sizes) - 1
        leaves = {name: t for name, t in tensors.items() if not name.startswith("z")}
        leaves |= {f"a{i}": torch.randn(n, device=DEVICE) * 3 for i, n in enumerate(sizes[:-1])}

        def call(namespace, x, depth=depth, seed=seed, **leaves):
            w, b, a = ([leaves[f"{name}{i}"] for i in range(depth)] for name in "wba")
            return namespace.l0_mlp(x, w, b, a, "gelu", seed=seed_tensor(seed))

        drawn = reference.sample_gates([leaves[f"a{i}"] for i in range(depth)], seed=seed_tensor(seed))
        masks = {f"a{i}": wanted(gates.z, False) for i, gates in enumerate(drawn)}
        compare(call, leaves, dtype=dtype, what=f"{sizes}", masks=masks)


# ---- weight and block gates


@each_dtype
@pytest.mark.parametrize("block", [None, (1, 1), (16, 16), (5, 64), (32, 64), (128, 128)], ids=str)
@or_refused("block", lambda block: "masked_linear" if block is None else "block_linear")
def test_masked_linear(block, dtype):
    for size in [(1, 1, 1), (13, 37, 29), (70, 61, 130), (256, 384, 512)]:
        tensors = masked_case(size, block)
        tensors = {n: t if n == "log_alpha" else t.to(dtype) for n, t in tensors.items()}
        tensors = on_device(tensors)

        def call(namespace, x, weight, bias, log_alpha):
            return namespace.masked_linear(x, weight, bias, log_alpha, block=block, seed=seed_tensor(3))

        flat = tensors["log_alpha"].flatten()
        z = reference.sample_gates(flat, seed=seed_tensor(3)).z.view(tensors["log_alpha"].shape)
        compare(call, tensors, dtype=dtype, what=f"{size}", masks={"log_alpha": wanted(z, False)})


# ---- gates and penalty


@pytest.mark.parametrize("sizes", [(1,), (784,), (127, 128, 129), (14336, 300, 5), (100_003,)], ids=str)
def test_sample_gates(sizes):
    log_alphas = [torch.randn(n, device=DEVICE).mul_(3).requires_grad_() for n in sizes]
    for seed in SEEDS:
        found = l0.sample_gates(log_alphas, seed=seed_tensor(seed))
        right = reference.sample_gates(log_alphas, seed=seed_tensor(seed))
        for a, b in zip(found, right, strict=True):
            # A few ulp: the logarithm and the exponential of another library.
            torch.testing.assert_close(a.z, b.z, atol=2e-6, rtol=2e-5)
            n_open = int((a.z != 0).sum())
            order = torch.cat([(a.z != 0).nonzero()[:, 0], (a.z == 0).nonzero()[:, 0]])
            assert torch.equal(a.index[: len(order)].long(), order)
            assert not a.index[len(order) :].any()
            assert int(a.count[0]) == n_open
            n = a.z.shape[0]
            extents = {-(-n_open // 128) * 128, -(-n // 128) * 128}
            assert int(a.count[1]) in extents
        dz = [torch.randn_like(gates.z) for gates in found]
        mine = torch.autograd.grad([gates.z for gates in found], log_alphas, dz)
        theirs = torch.autograd.grad([gates.z for gates in right], log_alphas, dz)
        for m, t, gates in zip(mine, theirs, found, strict=True):
            torch.testing.assert_close(m, t, atol=1e-4, rtol=1e-3)
            assert torch.equal(m != 0, (gates.z > 0) & (gates.z < 1))


@pytest.mark.skipif(not ON_GPU, reason="on a CPU a NaN is an error")
def test_sample_gates_keeps_nan_and_infinity_apart():
    log_alpha = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=DEVICE)
    gates = l0.sample_gates(log_alpha, seed=seed_tensor(1))
    assert gates.z.isnan().tolist() == [True, False, False, False]
    assert gates.z[1:3].tolist() == [1.0, 0.0]
    assert gates.index[0].item() == 0  # a NaN is open: it shows


@pytest.mark.parametrize("sizes", [(1,), (784, 300, 100), (14336,) * 32], ids=lambda s: f"{len(s)}x{s[0]}")
def test_penalty(sizes):
    log_alphas = [torch.randn(n, device=DEVICE).mul_(3).requires_grad_() for n in sizes]
    weights = [float(i + 1) for i in range(len(sizes))]
    value = l0.l0_penalty(log_alphas, weights, lam=1e-3)
    doubles = [a.detach().double().requires_grad_() for a in log_alphas]
    right = reference.l0_penalty(doubles, weights, lam=1e-3)
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=0)
    mine, theirs = torch.autograd.grad(value, log_alphas), torch.autograd.grad(right, doubles)
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m.double(), t, rtol=1e-4, atol=1e-8)  # p (1 - p) of a p near 1


# ---- modules


def steps(model, x, target):
    torch.manual_seed(5)
    loss = (model(x).float() - target).square().mean() + l0.nn.penalty(model) * 1e-6
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("kind", ["mlp", "in", "out", "both", "weight", "block", "ffn", "glu"])
@or_refused("kind", {"weight": "masked_linear", "block": "block_linear", "glu": "swiglu"}.get)
def test_modules_agree_with_the_reference(kind):
    torch.manual_seed(0)
    model = {
        "mlp": lambda: l0.nn.L0MLP([96, 130, 64, 10], "gelu"),
        "in": lambda: l0.nn.L0Linear(96, 10, gate="in"),
        "out": lambda: l0.nn.L0Linear(96, 10, gate="out"),
        "both": lambda: l0.nn.L0Linear(96, 10, gate="both"),
        "weight": lambda: l0.nn.L0Linear(96, 10, gate="weight"),
        "block": lambda: l0.nn.L0Linear(96, 10, gate=(8, 32)),
        "ffn": lambda: l0.nn.L0FeedForward(96, 320, "relu"),
        "glu": lambda: l0.nn.L0FeedForward(96, 320, "swiglu"),
    }[kind]().to(DEVICE)
    x = torch.randn(70, 96, device=DEVICE)
    target = torch.randn_like(model(x))
    mine = steps(model, x, target)
    with l0.use_backend("reference"):
        theirs = steps(model, x, target)
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, rtol=1e-3, atol=1e-5)
    model.eval()
    y = model(x)
    with l0.use_backend("reference"):
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ids)
def test_modules_under_autocast(dtype):
    torch.manual_seed(0)
    model = l0.nn.L0FeedForward(96, 320, "gelu").to(DEVICE)
    x = torch.randn(70, 96, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        mine = steps(model, x, torch.zeros(70, 96, device=DEVICE))
    with l0.use_backend("reference"):
        exact = steps(model.double(), x.double(), torch.zeros(70, 96, device=DEVICE))
    for m, t in zip(mine, exact, strict=True):
        error = (m.double() - t).norm() / t.norm().clamp_min(1e-30)
        assert error < 20 * torch.finfo(dtype).eps, error
