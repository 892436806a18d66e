"""Layer, RMS and group norm of open units: torch's of the gathered ones, exactly zero elsewhere."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import Gates, reference

SIZES = [1, 7, 131]
OPEN = ["all", "none", "half", "one"]


@pytest.fixture(autouse=True)
def one_thread(seeded):
    """Small products wait for each other's threads."""


def make_gates(n, kind, dtype=torch.float64):
    z = torch.rand(n, dtype=dtype) * 0.9 + 0.05
    if kind == "none":
        z.zero_()
    elif kind == "half":
        z[torch.randperm(n)[: n // 2]] = 0
    elif kind == "one":
        z[torch.arange(n) != n // 2] = 0
    return Gates.from_z(z.requires_grad_())


def layer(ns, x, w, b, gates, eps=1e-5):
    return ns.gated_layer_norm(x, (x.shape[-1],), w, b, eps, gates=gates)


def rms(ns, x, w, b, gates, eps=1e-5):
    y = ns.gated_rms_norm(x, [x.shape[-1]], w, eps, gates=gates)
    return y if b is None else y + b * (gates.z.detach() != 0)


def group(ns, x, w, b, gates, eps=1e-5):
    return ns.gated_group_norm(x, 1, w, b, eps, gates=gates)


def by_hand(kind, x, w, b, z, groups=1, eps=1e-5):
    """The formula, unit by unit, in loops over rows and groups."""
    rows = x.flatten(0, -2)[:, None, :, None]
    if kind == "group":
        rows = x.reshape(len(x), groups, x.shape[1] // groups, -1)
    opened = (z != 0).view(groups, -1)
    y = rows * 0
    for g in range(groups):
        some = rows[:, g, opened[g]]
        if some.numel():
            mean = 0 if kind == "rms" else some.mean((1, 2), keepdim=True)
            y[:, g, opened[g]] = (some - mean) / (
                (some - mean).square().mean((1, 2), keepdim=True) + eps
            ).sqrt()
    y = y.reshape(x.shape)
    vector = (-1, *[1] * (x.ndim - 2)) if kind == "group" else (-1,)
    is_open = (z != 0).view(vector)
    y = y if w is None else y * w.view(vector)
    return torch.where(is_open, y if b is None else y + b.view(vector), 0)


KINDS = {"layer": layer, "rms": rms, "group": group}


def run(kind, x, w, b, gates, how="eager", groups=1):
    def call(x, w, b, z):
        g = gates.of(z)
        if kind == "group":
            return l0.gated_group_norm(x, groups, w, b, gates=g)
        return KINDS[kind](l0, x, w, b, g)

    if how == "masked":  # what a compiler, a meta tensor or a GPU gets
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("l0kernels.norm._readable", lambda x: False)
            return call(x, w, b, gates.z)
    if how == "reference":
        with l0.use_backend("reference"):
            return call(x, w, b, gates.z)
    return call(x, w, b, gates.z)


def leaves(kind, n, affine, shape=()):
    x = torch.randn(*(shape or ((3, n, 4) if kind == "group" else (2, 5, n))), dtype=torch.float64) * 3 + 2
    w = torch.randn(n, dtype=torch.float64).requires_grad_() if affine else None
    b = torch.randn(n, dtype=torch.float64).requires_grad_() if affine and kind != "rms" else None
    return x.requires_grad_(), w, b


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("opened", OPEN)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("how", ["eager", "masked", "reference"])
def test_is_the_formula(kind, n, opened, affine, how):
    x, w, b = leaves(kind, n, affine)
    gates = make_gates(n, opened)
    y, expected = run(kind, x, w, b, gates, how), by_hand(kind, x, w, b, gates.z.detach())
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, expected)
    assert not y.movedim(1 if kind == "group" else -1, 0)[gates.z == 0].any()
    dy = torch.randn_like(y)
    inputs = [t for t in (x, w, b) if t is not None]
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.covering(2)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("z", ["110000", "100110", "111111", "000000", "011011"])
@pytest.mark.parametrize("how", ["eager", "masked", "reference"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 3, 4), (0, 6, 2)])
def test_groups(groups, z, how, shape):
    x, w, b = leaves("group", 6, True, shape)
    gates = Gates.from_z(torch.tensor([float(c) for c in z], dtype=torch.float64))
    y = run("group", x, w, b, gates, how, groups)
    assert y.isfinite().all()
    if not x.numel():
        assert y.shape == x.shape
        return
    expected = by_hand("group", x, w, b, gates.z, groups)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, w, b], dy)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, [x, w, b], dy), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eager", "masked", "reference"])
def test_z_only_selects(kind, how):
    x, w, b = leaves(kind, 6, True)
    gates = make_gates(6, "half")
    y = run(kind, x, w, b, gates, how)
    assert torch.autograd.grad(y.sum(), gates.z, allow_unused=True) == (None,)
    ones = Gates.from_z((gates.z != 0).double())
    assert torch.equal(y, run(kind, x, w, b, ones, how))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eager", "masked"])
def test_all_open_is_torchs(kind, how):
    x, w, b = leaves(kind, 12, True)
    y = run(kind, x, w, b, make_gates(12, "all"), how, 3)
    theirs = {
        "layer": lambda: F.layer_norm(x, (12,), w, b),
        "rms": lambda: F.rms_norm(x, (12,), w, 1e-5),
        "group": lambda: F.group_norm(x, 3, w, b),
    }[kind]()
    torch.testing.assert_close(y, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eager", "masked", "reference"])
def test_what_a_closed_unit_holds_stays_out(kind, how):
    x, w, b = leaves(kind, 6, True)
    gates = make_gates(6, "half")
    closed = gates.z == 0
    with torch.no_grad():
        x.movedim(1 if kind == "group" else -1, 0)[closed] = torch.nan
        for vector in (w, b):
            if vector is not None:
                vector[closed] = torch.nan
    y = run(kind, x, w, b, gates, how)
    assert y.isfinite().all()
    for grad in torch.autograd.grad(y.square().sum(), [t for t in (x, w, b) if t is not None]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", ["layer", "group"])
@pytest.mark.parametrize("how", ["eager", "masked"])
def test_a_mean_far_from_zero_costs_no_digits(kind, how):
    x, w, b = leaves(kind, 64, False)
    x = (x.detach() + 1e4).float()
    gates = make_gates(64, "half", torch.float32)
    expected = by_hand(kind, x.double(), w, b, gates.z.detach())
    y = run(kind, x, w, b, gates, how).double()
    # x itself has 1e4 * 2 ** -24 of rounding around values of 3, the rest is a few units in the last place
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eager", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(kind, how, dtype):
    x, w, b = (None if t is None else t.detach().to(dtype) for t in leaves(kind, 64, True))
    gates = make_gates(64, "half", torch.float32)
    y = run(kind, x, w, None, gates, how)
    assert y.dtype == dtype
    expected = by_hand(kind, x.double(), w.double(), None, gates.z.detach())
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    mixed = run(kind, x, w.float(), None if b is None else b.float(), gates, how)
    assert mixed.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["eager", "masked", "reference"])
def test_the_eps_of_an_rms_norm_without_one_is_torchs(dtype, how):
    x = torch.full((2, 6), 1e-4, dtype=dtype)
    gates = Gates.from_z(torch.tensor([1.0, 0, 1, 1, 0, 1]))
    with (
        pytest.MonkeyPatch.context() as patch,
        l0.use_backend("reference" if how == "reference" else "torch"),
    ):
        if how == "masked":
            patch.setattr("l0kernels.norm._readable", lambda x: False)
        y = l0.gated_rms_norm(x, 6, gates=gates)
    expected = F.rms_norm(x, (6,)) * (gates.z != 0)
    torch.testing.assert_close(y, expected.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eager", "masked"])
def test_gradcheck(kind, how):
    gates = make_gates(6, "half")
    x, w, b = leaves(kind, 6, True)
    inputs = [t for t in (x, w, b) if t is not None]

    def call(x, w, b=None):
        return run(kind, x, w, b, gates, how, 2)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_once_for_any_number_of_open_gates(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda x, w, b, z: run(kind, x, w, b, Gates.from_z(z)), backend=counter, fullgraph=True
    )
    x, w, b = leaves(kind, 12, True)
    for opened in OPEN:
        gates = make_gates(12, opened)
        y = call(x, w, b, gates.z.detach())
        expected = run(kind, x, w, b, gates)
        torch.testing.assert_close(y, expected)
        for mine, theirs in zip(
            *(torch.autograd.grad(t.square().sum(), [x, w]) for t in (y, expected)), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_meta_and_func(kind):
    x, w, b = (None if t is None else t.detach() for t in leaves(kind, 6, True))
    gates = make_gates(6, "half")
    meta = Gates(*(t.detach().to("meta") for t in gates[:3]), True)
    y = run(kind, *(None if t is None else t.to("meta") for t in (x, w, b)), meta)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    grad = torch.func.grad(lambda x: run(kind, x, w, b, gates).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, *torch.autograd.grad(run(kind, x, w, b, gates).square().sum(), x))


def test_without_gates_normalized_shape_is_any():
    x, w = torch.randn(2, 3, 4), torch.randn(3, 4)
    torch.testing.assert_close(l0.gated_layer_norm(x, (3, 4), w), F.layer_norm(x, (3, 4), w))
    torch.testing.assert_close(l0.gated_rms_norm(x, (3, 4), w), F.rms_norm(x, (3, 4), w))


def test_bad_arguments():
    gates, x = Gates.from_z(torch.ones(4)), torch.randn(2, 3, 4)
    for norm, reference_norm in itertools.product((l0, reference), ("gated_layer_norm", "gated_rms_norm")):
        call = getattr(norm, reference_norm)
        with pytest.raises(
            ValueError, match=r"normalized_shape must be of the last dimension alone .* got \(3, 4\)"
        ):
            call(x, (3, 4), gates=gates)
        with pytest.raises(ValueError, match="gates must hold 4 gates, one per feature of x"):
            call(x, 4, gates=Gates.from_z(torch.ones(3)))
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 5\), got \(2, 3, 4\)"):
            call(x, 5, gates=gates)
        with pytest.raises(TypeError, match="normalized_shape must be an int, got float"):
            call(x, 4.0)
        with pytest.raises(
            ValueError, match=r"weight must have shape \(4,\) \(normalized_shape\), got \(3,\)"
        ):
            call(x, 4, torch.ones(3), gates=gates)
        with pytest.raises(TypeError, match="x must have a floating-point dtype"):
            call(x.long(), 4)
        with pytest.raises(TypeError, match="gates must be Gates"):
            call(x, 4, gates=torch.ones(4))
    for norm in (l0, reference):
        with pytest.raises(ValueError, match="num_groups must divide the 4 channels of x, got 3"):
            norm.gated_group_norm(x[0].T[None], 3)
        with pytest.raises(ValueError, match=r"x must have shape \(N, channels, \.\.\.\), got \(4,\)"):
            norm.gated_group_norm(x[0, 0], 1)
        with pytest.raises(ValueError, match="gates must hold 3 gates, one per channel of x"):
            norm.gated_group_norm(x, 1, gates=gates)
        with pytest.raises(ValueError, match="bias must have shape"):
            norm.gated_group_norm(x, 1, None, torch.ones(4))
