"""gated_conv2d and the packed convolutions on every backend against the dense formula in float64."""

import itertools
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels import Gates, Packed, reference
from l0kernels.impl import conv2d as impl
from op_checks import KINDS, SEED, assert_near, compare, gate_dtype, make_z, wanted

pytestmark = pytest.mark.usefixtures("poison")

CL = torch.channels_last
# in, out, kernel, H, W, options: one channel, primes, more and fewer channels than the vectors of oneDNN
GEOMETRIES = {
    "plain": (7, 5, (3, 3), 9, 8, {}),
    "one": (1, 1, (1, 1), 1, 1, {}),
    "one channel": (1, 6, (5, 5), 12, 12, {}),
    "pointwise": (13, 11, (1, 1), 5, 7, {"stride": 2}),
    "strides": (5, 8, (3, 2), 9, 10, {"stride": (2, 3), "padding": (1, 0)}),
    "dilation": (4, 6, (3, 3), 11, 9, {"dilation": (2, 1), "padding": 2}),
    "same": (6, 4, (3, 5), 6, 5, {"padding": "same"}),
    "same, even": (6, 4, (4, 2), 6, 5, {"padding": "same", "dilation": (1, 3)}),
    "valid": (3, 4, (2, 2), 5, 5, {"padding": "valid"}),
    "groups": (12, 8, (3, 3), 6, 7, {"groups": 4, "padding": 1}),
    "two groups": (10, 6, (2, 2), 6, 7, {"groups": 2, "stride": 2}),
    "depthwise": (9, 9, (3, 3), 7, 7, {"groups": 9, "padding": 1}),
    "depthwise, same": (9, 9, (2, 4), 7, 7, {"groups": 9, "padding": "same"}),
    "multiplier": (6, 18, (3, 3), 7, 7, {"groups": 6, "stride": 2}),
    "wide": (33, 70, (3, 3), 8, 8, {"padding": 1}),
}
SIDES = list(itertools.product((False, True), (None, "out_gates", "out_support")))
WAYS = ("dense", "packed out", "packed in")


def contiguous(t):
    return t.contiguous()


def channels_last(t):
    return t.contiguous(memory_format=CL)


def sliced(t):
    """The same values within a tensor of NaN."""
    whole = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
    part = whole[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return part.copy_(t)


LAYOUTS = {"contiguous": contiguous, "channels_last": channels_last, "sliced": sliced}


def layer(options, sides, way="dense", full=False):
    """The call of a layer whose gates, on the sides given, come from the leaves z_in and z_out."""

    def call(namespace, x, weight, bias, z_in=None, z_out=None):
        kwargs = dict(options)
        if sides[0]:
            kwargs["in_gates"] = Gates.from_z(z_in, full_grad=full)
        if sides[1]:
            kwargs[sides[1]] = Gates.from_z(z_out, full_grad=full)
        if way == "dense" or namespace is reference:
            return namespace.gated_conv2d(x, weight, bias, **kwargs)
        if way == "packed in" and sides[0]:
            x = l0.pack_channels(x, kwargs["in_gates"])
        y = l0.packed_conv2d(x, weight, bias, **kwargs)
        assert isinstance(y, Packed) == bool(sides[1])
        return l0.unpack_channels(y) if isinstance(y, Packed) else y

    return call


def case(name, sides=(True, "out_gates"), kinds=("mixed", "mixed"), dtype=torch.float32, full=False, n=3):
    """Leaves, the options, and the masks of the gates' gradients."""
    n_in, n_out, kernel, height, width, options = GEOMETRIES[name]
    groups = options.get("groups", 1)
    tensors = {
        "x": torch.randn(n, n_in, height, width, dtype=dtype),
        "weight": torch.randn(n_out, n_in // groups, *kernel, dtype=dtype),
        "bias": torch.randn(n_out, dtype=dtype),
    }
    masks = {}
    for used, leaf, size, kind in ((sides[0], "z_in", n_in, kinds[0]), (sides[1], "z_out", n_out, kinds[1])):
        if used:
            tensors[leaf] = make_z(kind, size, gate_dtype(dtype))
            masks[leaf] = wanted(tensors[leaf], full) & (used != "out_support")
    return tensors, options, masks


def needs_of(tensors, sides):
    return [
        n for n, t in tensors.items() if t is not None and not (n == "z_out" and sides[1] == "out_support")
    ]


def check(
    name, sides, *, way="dense", dtype=torch.float32, full=False, layout="contiguous", slack=1, **settings
):
    tensors, options, masks = case(name, sides, dtype=dtype, full=full, **settings)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    return compare(
        layer(options, sides, way, full),
        tensors,
        dtype=dtype,
        what=f"{name} {sides} {way} {layout} {settings}",
        masks=masks,
        needs=needs_of(tensors, sides),
        layout=LAYOUTS[layout],
        slack=slack,
    )


class TestAgainstTheFormula:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_geometries_sides_and_layouts(self, backend, name, way):
        for sides, layout in itertools.product(SIDES, ("contiguous", "channels_last")):
            # csrc sums up the positions in another order than torch; the rest is held to the bound.
            check(
                name, sides, way=way, layout=layout, slack=2 if (backend, name) == ("cpp", "dilation") else 1
            )

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["plain", "one", "groups", "depthwise", "multiplier"])
    def test_open_and_closed(self, backend, name, way):
        for kinds in itertools.product(KINDS, KINDS):
            check(name, (True, "out_gates"), way=way, kinds=kinds)
            check(name, (True, "out_support"), way=way, kinds=kinds)
        for kind, sides in itertools.product(KINDS, SIDES[1:4]):
            check(name, sides, way=way, kinds=(kind, kind), layout="channels_last")

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["plain", "same, even", "two groups", "multiplier"])
    def test_float64_and_memory_between_nans(self, backend, name, way):
        for sides in SIDES:
            check(name, sides, way=way, dtype=torch.float64, layout="sliced")

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("name", ["plain", "groups", "depthwise"])
    def test_own_gates(self, backend, name, full, way):
        """They need not lie in [0, 1], and may ask for the gradient of every open one."""
        for sides in SIDES[1:]:
            check(name, sides, way=way, full=full, kinds=("wild", "wild"))

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["plain", "same, even", "groups", "depthwise"])
    def test_empty_batch(self, backend, name, way):
        for sides, layout in itertools.product(SIDES, ("contiguous", "channels_last")):
            _, grads = check(name, sides, way=way, layout=layout, n=0)
            assert not any(g.any() for g in grads.values())

    @pytest.mark.parametrize("name", ["plain", "same, even", "groups", "one channel"])
    def test_without_a_batch(self, backend, name):
        for sides in SIDES:
            tensors, options, masks = case(name, sides, n=1)
            tensors["x"] = tensors["x"][0]
            needs = needs_of(tensors, sides)
            call = layer(options, sides)
            y, grads = compare(call, tensors, dtype=torch.float32, masks=masks, needs=needs)
            assert (y.ndim, grads["x"].ndim) == (3, 3)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["wide", "groups", "depthwise"])
    def test_sixteen_bits_and_autocast(self, backend, name, dtype, way):
        sides = (True, "out_gates")
        for autocast in (None, dtype):
            tensors, options, masks = case(name, sides)
            tensors["weight"] /= tensors["weight"][0].numel() ** 0.5
            if autocast is None:
                tensors |= {n: tensors[n].to(dtype) for n in ("x", "weight", "bias")}
            y, grads = compare(
                layer(options, sides, way), tensors, dtype=dtype, masks=masks, autocast=autocast
            )
            assert y.dtype == dtype
            assert grads["weight"].dtype == tensors["weight"].dtype
            assert grads["z_in"].dtype == torch.float32

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["plain", "groups"])
    def test_gradients_that_are_wanted(self, backend, name, way):
        """Each one alone, and all but one."""
        sides = (True, "out_gates")
        names = ["x", "weight", "bias", "z_in", "z_out"]
        for needs in [[n] for n in names] + [[n for n in names if n != m] for m in names]:
            tensors, options, masks = case(name, sides)
            call = layer(options, sides, way)
            compare(call, tensors, dtype=torch.float32, what=f"{needs}", masks=masks, needs=needs)

    def test_no_bias(self, backend):
        for name, sides, way in itertools.product(("plain", "groups", "depthwise"), SIDES, WAYS):
            tensors, options, masks = case(name, sides, kinds=("few", "mixed"))
            tensors["bias"] = None
            needs = needs_of(tensors, sides)
            compare(layer(options, sides, way), tensors, dtype=torch.float32, masks=masks, needs=needs)


class TestMeaning:
    @pytest.mark.parametrize("name", ["plain", "depthwise"])
    def test_closed_is_exactly_zero_and_never_read(self, backend, name):
        tensors, options, _ = case(name)
        x, weight, bias, z_in, z_out = tensors.values()
        clean = layer(options, (True, "out_gates"))(l0, x, weight, bias, z_in, z_out)
        assert torch.equal(clean.detach() != 0, (z_out != 0)[:, None, None].expand_as(clean))
        x = x.masked_fill((z_in == 0)[:, None, None], float("nan")).requires_grad_()
        weight = weight.clone()
        weight[z_out == 0] = float("nan")
        bias[z_out == 0] = float("nan")
        if name == "plain":
            weight[:, z_in == 0] = float("nan")
        leaves = (x, weight.requires_grad_(), z_in.requires_grad_(), z_out.requires_grad_())
        for way in WAYS:
            y = layer(options, (True, "out_gates"), way)(l0, x, weight, bias, z_in, z_out)
            torch.testing.assert_close(y, clean)
            dy = torch.randn_like(y).masked_fill((z_out == 0)[:, None, None], float("nan"))
            if way != "dense":
                dy = dy.nan_to_num()
            for leaf in torch.autograd.grad(y, leaves, dy):
                assert leaf.isfinite().all()

    @pytest.mark.parametrize("way", WAYS)
    def test_one_gate_on_both_sides_of_a_depthwise_convolution(self, backend, way):
        tensors, options, masks = case("depthwise", (True, None))

        def call(namespace, x, weight, bias, z_in):
            gates = Gates.from_z(z_in, full_grad=False)
            kwargs = {"in_gates": gates, "out_gates": gates, **options}
            if namespace is reference or way == "dense":
                return namespace.gated_conv2d(x, weight, bias, **kwargs)
            x = l0.pack_channels(x, gates) if way == "packed in" else x
            return l0.unpack_channels(l0.packed_conv2d(x, weight, bias, **kwargs))

        compare(call, tensors, dtype=torch.float32, masks=masks)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_memory_format_is_that_of_torch(self, backend, layout):
        for name in ("plain", "groups", "depthwise", "pointwise"):
            tensors, options, _ = case(name)
            x = LAYOUTS[layout](tensors["x"]).requires_grad_()
            expected = F.conv2d(x, tensors["weight"], **options)
            for sides in SIDES:
                args = {n: tensors.get(n) for n in ("weight", "bias")}
                y = layer(options, sides)(
                    l0, x, **args, z_in=make_z("mixed", x.shape[1]), z_out=make_z("mixed", expected.shape[1])
                )
                assert y.stride() == expected.stride()
                (dx,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
                assert dx.stride() == x.stride()

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("channels", [1, 6])
    def test_packed_channels_lie_as_x_does(self, backend, layout, channels):
        """No turn of a large x or of its gradient; a single channel, which lies both ways, starts last."""
        x = LAYOUTS[layout](torch.randn(2, channels, 9, 8))
        gates = Gates.from_z(torch.tensor([0.5, 0, 1, 1, 0]))
        h = l0.packed_conv2d(x, torch.randn(5, channels, 3, 3), out_gates=gates)
        y = l0.packed_conv2d(h, torch.randn(4, 5, 3, 3), in_gates=gates)
        last = layout == "channels_last" or channels == 1
        for t in (h.data, y):
            assert t.is_contiguous(memory_format=CL if last else torch.contiguous_format)

    def test_all_open_is_torch(self, backend):
        for name in GEOMETRIES:
            tensors, options, _ = case(name, kinds=("open", "open"))
            y = layer(options, (True, "out_gates"))(l0, **tensors)
            if name not in ("same, even", "depthwise, same"):  # of an even kernel torch warns
                operands = [tensors[n] for n in ("x", "weight", "bias")]
                exact = F.conv2d(*(t.double() for t in operands), **options)
                assert_near(y, F.conv2d(*operands, **options), exact, torch.float32, name)

    def test_gradcheck(self, backend):
        for name in ("plain", "groups", "multiplier"):
            tensors, options, _ = case(name, dtype=torch.float64, n=1)
            tensors |= {
                n: torch.rand(tensors[n].shape, dtype=torch.float64) * 0.8 + 0.1 for n in ("z_in", "z_out")
            }
            tensors["z_in"][1] = tensors["z_out"][2] = 0
            leaves = [t.requires_grad_() for t in tensors.values()]
            for way in WAYS:
                call = partial(layer(options, (True, "out_gates"), way), l0)
                z_in, z_out = (t.detach() != 0 for t in leaves[3:])

                def masked(x, w, b, i, o, call=call, z_in=z_in, z_out=z_out):  # a closed gate stays closed
                    return call(x, w, b, torch.where(z_in, i, 0.0), torch.where(z_out, o, 0.0))

                assert gradcheck(masked, leaves, fast_mode=True)

    def test_drawn_gates(self, backend):
        tensors, options, _ = case("strides", (None, None))
        tensors |= {"a_in": torch.randn(5), "a_out": torch.randn(8)}

        def call(namespace, x, weight, bias, a_in, a_out):
            g_in, g_out = namespace.sample_gates([a_in, a_out], seed=SEED)
            return namespace.gated_conv2d(x, weight, bias, in_gates=g_in, out_gates=g_out, **options)

        compare(call, tensors, dtype=torch.float32)

    def test_closed_groups_are_left_out(self, backend):
        """The plan computes no more channels than the fullest group holds open."""
        weight = torch.randn(12, 2, 3, 3)
        z_in = torch.tensor([0, 0, 0.5, 0, 1, 0, 0.3, 1])
        z_out = torch.tensor([1, 1, 1, 0, 0, 0, 0.5, 0, 0, 1, 1, 0])
        gates = [[g.z, g.index, g.count] for g in map(Gates.from_z, (z_in, z_out))]
        p = impl.plan(weight, 4, *gates)
        assert (p.groups, tuple(p.cell.shape)) == (2, (4, 2))
        assert p.in_index.tolist() == [4, 4, 6, 7]
        assert p.out_index.tolist() == [6, 6, 9, 10]
        assert p.opened.tolist() == [0, 1, 2, 6, 9, 10]
        depthwise = impl.plan(torch.randn(8, 1, 3, 3), 8, gates[0], None)
        assert (depthwise.groups, depthwise.in_index.tolist()) == (4, [2, 4, 6, 7])


class TestChains:
    def chain(self, namespace, support, x, w1, b1, w2, b2, w3, z1, z2):
        """Two convolutions, pooling and a third: packed, or dense in the reference."""
        g1, g2 = Gates.from_z(z1, full_grad=False), Gates.from_z(z2, full_grad=False)
        first = {"out_support": g1} if support else {"out_gates": g1}
        inner = g1 if support else None

        def act(t):
            return F.max_pool2d(torch.relu(t), 2)

        if namespace is reference:
            h = act(reference.gated_conv2d(x, w1, b1, padding=1, **first))
            h = act(reference.gated_conv2d(h, w2, b2, padding="same", in_gates=inner, out_gates=g2))
            return reference.gated_conv2d(h, w3)
        h = l0.packed_conv2d(x, w1, b1, padding=1, **first).map(act)
        h = l0.packed_conv2d(h, w2, b2, padding="same", in_gates=inner, out_gates=g2).map(act)
        assert h.data.shape[1] == (z2 != 0).sum()
        return l0.packed_conv2d(h, w3)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("support", [False, True])
    def test_packed_channels_from_layer_to_layer(self, backend, support, layout):
        for kinds in itertools.product(KINDS, KINDS):
            tensors = {
                "x": LAYOUTS[layout](torch.randn(3, 2, 9, 9)),
                "w1": torch.randn(7, 2, 3, 3),
                "b1": torch.randn(7),
                "w2": torch.randn(5, 7, 2, 2),
                "b2": torch.randn(5),
                "w3": torch.randn(4, 5, 1, 1),
                "z1": make_z(kinds[0], 7),
                "z2": make_z(kinds[1], 5),
            }
            masks = {n: wanted(tensors[n], False) for n in ("z1", "z2")}
            call = partial(self.chain)
            compare(
                lambda ns, **t: call(ns, support, **t),  # noqa: B023
                tensors,
                dtype=torch.float32,
                what=f"{kinds}",
                masks=masks,
            )

    @pytest.mark.parametrize("groups", [1, 2, 6])
    def test_other_gates_than_those_it_was_packed_with(self, backend, groups):
        """What exists and what the product's own gates leave open; without gates, all that exists."""
        for given in (True, False):
            tensors = {
                "x": torch.randn(2, 6, 5, 5),
                "weight": torch.randn(6, 6 // groups, 3, 3),
                "bias": torch.randn(6),
                "z_in": make_z("mixed", 6),
            }
            held = torch.tensor([1, 0, 0.5, 1, 0, 1.0])

            def call(namespace, x, weight, bias, z_in, given=given, held=held):
                gates = Gates.from_z(z_in, full_grad=False) if given else None
                if namespace is reference:
                    x = x * (held != 0)[:, None, None]
                    return reference.gated_conv2d(x, weight, bias, groups=groups, in_gates=gates)
                x = l0.pack_channels(x, Gates.from_z(held))
                return l0.packed_conv2d(x, weight, bias, groups=groups, in_gates=gates)

            needs = ["x", "weight", "bias"] + (["z_in"] if given else [])
            masks = {"z_in": wanted(tensors["z_in"], False) & (held != 0)} if given else {}
            compare(call, tensors, dtype=torch.float32, masks=masks, needs=needs)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    def test_pack_and_unpack(self, backend, layout):
        x = LAYOUTS[layout](torch.randn(3, 9, 4, 5)).requires_grad_()
        for kind in KINDS:
            gates = Gates.from_z(make_z(kind, 9).requires_grad_())
            is_open = (gates.z != 0)[:, None, None]
            packed = l0.pack_channels(x, gates)
            assert not packed.gates.z.requires_grad
            assert torch.equal(packed.data, x[:, (gates.z != 0)])
            y = l0.unpack_channels(packed)
            assert torch.equal(y, x * is_open)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
            assert torch.equal(dx, dy * is_open)

    def test_reference_of_a_packed_input(self):
        tensors, options, _ = case("plain")
        x, weight, bias, z_in, z_out = tensors.values()
        g_in, g_out = Gates.from_z(z_in), Gates.from_z(z_out)
        with l0.use_backend("reference"):
            packed = l0.packed_conv2d(l0.pack_channels(x, g_in), weight, bias, in_gates=g_in, out_gates=g_out)
        expected = reference.gated_conv2d(x, weight, bias, in_gates=g_in, out_gates=g_out, **options)
        torch.testing.assert_close(l0.unpack_channels(packed), expected)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_recomputed_chains(self, backend, use_reentrant):
        """Activation checkpointing draws the same gates again and so packs the same channels."""

        def run(wrap):
            torch.manual_seed(5)
            leaves = [
                torch.randn(s).requires_grad_() for s in ((2, 3, 6, 6), (7, 3, 3, 3), (4, 7, 3, 3), (7,))
            ]

            def region(x, w1, w2, log_alpha):
                gates = l0.sample_gates(log_alpha)
                h = l0.packed_conv2d(x, w1, padding=1, out_gates=gates).map(torch.relu)
                return l0.packed_conv2d(h, w2)

            y = wrap(region, *leaves)
            y.square().sum().backward()
            return [y.detach(), *(t.grad for t in leaves)]

        plain = run(lambda region, *args: region(*args))
        for a, b in zip(run(partial(checkpoint, use_reentrant=use_reentrant)), plain, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("fmt", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_outputs_may_be_changed_in_place(self, backend, kind, n, fmt):
        """As those of torch's convolution: what a Function returns must be no view."""
        gates = Gates.from_z(make_z(kind, 6), full_grad=False)
        w = torch.randn(6, 6, 2, 2, requires_grad=True)
        values = torch.randn(n, 6, 4, 4).contiguous(memory_format=fmt)
        calls = {
            "dense": lambda x: l0.gated_conv2d(x, w, out_gates=gates),
            "grouped": lambda x: l0.gated_conv2d(x, w[:, :2], groups=3, in_gates=gates, out_gates=gates),
            "pack": lambda x: l0.pack_channels(x * 1, gates).data,
            "unpack": lambda x: l0.unpack_channels(l0.pack_channels(x * 1, gates)),
            "packed": lambda x: l0.packed_conv2d(x, w, out_support=gates).data,
            "between": lambda x: l0.packed_conv2d(l0.pack_channels(x * 1, gates), w, in_gates=gates),
        }
        for name, call in calls.items():
            x = values.detach().requires_grad_()
            expected = torch.autograd.grad(call(x).relu().sum(), x)[0]
            got = torch.autograd.grad(call(x).relu_().sum(), x)[0]
            assert torch.equal(got, expected), name

    def test_packing_has_second_derivatives(self, backend):
        gates = Gates.from_z(torch.tensor([0.0, 1.0, 0.4, 0.0, 1.0], dtype=torch.float64))
        x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)

        def call(x):
            return l0.unpack_channels(l0.pack_channels(x, gates).map(torch.tanh))

        assert gradcheck(call, x)
        assert gradgradcheck(call, x)

    def test_a_chain_of_the_reference_has_second_derivatives(self):
        first = Gates.from_z(torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64))
        hidden = Gates.from_z(torch.tensor([0.7, 0.0, 1.0, 0.0], dtype=torch.float64))
        leaves = [
            torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 3, 3), (4, 3, 2, 2), (2, 4, 1, 1))
        ]

        def call(x, w, w2):
            h = l0.packed_conv2d(x, w, in_gates=first, out_support=hidden).map(torch.tanh)
            return l0.packed_conv2d(h, w2, in_gates=hidden)

        with l0.use_backend("reference"):
            assert gradgradcheck(call, [leaf.requires_grad_() for leaf in leaves])

    def test_second_derivatives_are_refused(self, backend):
        tensors, options, _ = case("plain")
        leaves = [t.requires_grad_() for t in tensors.values()]
        for way in WAYS:
            y = layer(options, (True, "out_gates"), way)(l0, *leaves)
            with pytest.raises(RuntimeError, match="has no second derivative, got create_graph=True"):
                torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


class TestErrors:
    def call(self, function=l0.gated_conv2d, **change):
        args = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3)} | change
        return function(**args)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"x": torch.zeros(1, 3, 8, 8)},
                ValueError,
                r"x must have shape \(N, 4, H, W\).*got \(1, 3, 8, 8\)",
            ),
            ({"x": torch.zeros(1, 4, 8, 8).long()}, TypeError, "x must have a floating-point dtype"),
            ({"x": torch.zeros(1, 4, 8, 8).double()}, TypeError, "x must have the dtype of weight"),
            ({"weight": torch.zeros(6, 4, 3)}, ValueError, "weight must have shape"),
            ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(6,\)"),
            ({"groups": 4}, ValueError, "groups must divide the 6 rows of weight, got 4"),
            ({"groups": 1.0}, TypeError, "groups must be an int, got float"),
            ({"stride": 0}, ValueError, r"stride must be in \[1, .*, got 0"),
            ({"stride": (1, 2, 3)}, ValueError, r"stride must be an int or two ints, got \(1, 2, 3\)"),
            ({"stride": "same"}, TypeError, "stride must be an int, got str"),
            ({"dilation": (1, 1.5)}, TypeError, "dilation must be an int, got float"),
            ({"padding": -1}, ValueError, r"padding must be in \[0, .*, got -1"),
            ({"padding": "full"}, ValueError, "padding must be one of 'same', 'valid', got 'full'"),
            (
                {"padding": "same", "stride": 2},
                ValueError,
                "padding must be numbers where stride is not 1, got 'same' and stride 2",
            ),
            ({"dilation": 4}, ValueError, "x must cover the kernel, 9 x 9 with its dilation, got 8 x 8"),
            ({"in_gates": Gates.from_z(torch.ones(6))}, ValueError, "in_gates must hold 4 gates"),
            ({"out_gates": Gates.from_z(torch.ones(4))}, ValueError, "out_gates must hold 6 gates"),
            ({"out_support": torch.ones(6)}, TypeError, "out_support must be Gates"),
        ],
    )
    def test_arguments(self, backend, change, error, message):
        for function in (l0.gated_conv2d, l0.packed_conv2d, reference.gated_conv2d):
            with pytest.raises(error, match=message):
                self.call(function, **change)

    def test_both_sides_of_the_output_and_counts(self, backend):
        g = Gates.from_z(make_z("mixed", 6))
        for function in (l0.gated_conv2d, l0.packed_conv2d):
            with pytest.raises(ValueError, match="give either out_gates or out_support, got both"):
                self.call(function, out_gates=g, out_support=g)
            for value in (-1, 7):
                bad = g._replace(count=torch.tensor([value, 128], dtype=torch.int32))
                with pytest.raises(ValueError, match=rf"count\[0\] must be in \[0, 6\], got {value}"):
                    self.call(function, out_gates=bad)

    def test_packed(self, backend):
        g = Gates.from_z(torch.ones(4))
        with pytest.raises(ValueError, match=r"x must have shape \(N, channels, H, W\), got \(4, 8, 8\)"):
            l0.pack_channels(torch.zeros(4, 8, 8), g)
        with pytest.raises(ValueError, match="gates must hold 4 gates, one per channel of x"):
            l0.pack_channels(torch.zeros(1, 4, 8, 8), Gates.from_z(torch.ones(5)))
        packed = l0.pack_channels(torch.zeros(1, 4, 8, 8), Gates.from_z(torch.tensor([1.0, 0, 0, 1])))
        with pytest.raises(ValueError, match=r"got \(1, 2, 8, 8\) packed from 4 channels"):
            l0.packed_conv2d(packed, torch.zeros(2, 2, 3, 3))
        with pytest.raises(ValueError, match=r"x must have shape \(N, channels, H, W\), got \(4, 8, 8\)"):
            l0.packed_conv2d(
                torch.zeros(4, 8, 8), torch.zeros(6, 4, 3, 3), out_gates=Gates.from_z(torch.ones(6))
            )


@pytest.mark.parametrize("kind", ["expanded", "every other entry"])
@pytest.mark.parametrize("side", ["in_gates", "out_gates"])
def test_kernels_whose_entries_do_not_follow_one_another(backend, kind, side):
    whole = torch.randn(3, 2, 5 if kind == "expanded" else 10, 1)
    weight = whole[:, :, :1].expand(3, 2, 5, 1) if kind == "expanded" else whole[:, :, ::2]
    n = 2 if side == "in_gates" else 3
    z = torch.tensor([0.4, 0.0, 1.0])[:n]
    compare(
        lambda of, x, weight, z: of.gated_conv2d(x, weight, **{side: Gates.from_z(z, full_grad=False)}),
        {"x": torch.randn(2, 2, 9, 4), "weight": weight, "z": z},
        dtype=torch.float32,
        what=kind,
        masks={"z": wanted(z, False)},
    )
