"""gated_linear and l0_linear on every backend against the dense formula in float64."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import l0kernels as l0
from l0kernels import Gates, reference
from op_checks import (
    BACKENDS,
    KINDS,
    LAYOUTS,
    SEED,
    compare,
    gate_dtype,
    make_z,
    sliced,
    strided,
    transposed,
    wanted,
)

pytestmark = pytest.mark.usefixtures("poison")

# batch, in, out: 1, primes, one below, at and above the tiles of the native product (6 or 14 rows, 16 or 32
# columns, 384 of the summed dimension), products of more than one task
SIZES = [
    (1, 1, 1),
    (2, 3, 5),
    (7, 13, 11),
    (13, 14, 15),
    (14, 32, 28),
    (15, 33, 31),
    (29, 383, 97),
    (30, 384, 65),
    (5, 385, 33),
    (3, 769, 17),
    (385, 31, 43),
    (113, 64, 300),
]
SIDES = [
    (False, None),
    (True, None),
    (False, "out_gates"),
    (True, "out_gates"),
    (False, "out_support"),
    (True, "out_support"),
]


def layer(sides, full=False):
    """The call of a layer whose gates, on the sides given, come from the leaves z_in and z_out."""

    def call(namespace, x, weight, bias, z_in=None, z_out=None):
        kwargs = {}
        if sides[0]:
            kwargs["in_gates"] = Gates.from_z(z_in, full_grad=full)
        if sides[1]:
            kwargs[sides[1]] = Gates.from_z(z_out, full_grad=full)
        return namespace.gated_linear(x, weight, bias, **kwargs)

    return call


def case(size, sides=(True, "out_gates"), kind="mixed", dtype=torch.float32, full=False, bias=True):
    """Leaves and the masks of their gate gradients."""
    m, n_in, n_out = size
    tensors = {
        "x": torch.randn(m, n_in, dtype=dtype),
        "weight": torch.randn(n_out, n_in, dtype=dtype),
        "bias": torch.randn(n_out, dtype=dtype) if bias else None,
    }
    masks = {}
    for used, name, n in ((sides[0], "z_in", n_in), (sides[1], "z_out", n_out)):
        if used:
            tensors[name] = make_z(kind, n, gate_dtype(dtype))
            masks[name] = wanted(tensors[name], full) & (used != "out_support")
    return tensors, masks


def needs_of(tensors, sides):
    """Every leaf that the formula gives a gradient: a support gives none."""
    return [
        n for n, t in tensors.items() if t is not None and not (n == "z_out" and sides[1] == "out_support")
    ]


class TestAgainstTheFormula:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes_sides_and_kinds_of_gates(self, backend, size, dtype):
        for sides, kind in itertools.product(SIDES, KINDS):
            if kind != "mixed" and not any(sides):
                continue
            tensors, masks = case(size, sides, kind, dtype, bias=size[0] % 2 == 1)
            what = f"{sides} {kind}"
            needs = needs_of(tensors, sides)
            compare(layer(sides), tensors, dtype=dtype, what=what, masks=masks, needs=needs)

    @pytest.mark.parametrize("in_kind", KINDS)
    @pytest.mark.parametrize("out_kind", KINDS)
    def test_open_counts_of_both_sides(self, backend, in_kind, out_kind):
        tensors, masks = case((9, 41, 37))
        tensors["z_in"], tensors["z_out"] = make_z(in_kind, 41), make_z(out_kind, 37)
        masks = {name: wanted(tensors[name], False) for name in masks}
        y, grads = compare(layer((True, "out_gates")), tensors, dtype=torch.float32, masks=masks)
        open_in, open_out = tensors["z_in"] != 0, tensors["z_out"] != 0
        assert torch.equal(y != 0, open_out.expand(9, 37))
        assert torch.equal(grads["weight"] != 0, open_out[:, None] & open_in)
        assert torch.equal(grads["x"] != 0, (open_in & open_out.any()).expand(9, 41))
        assert torch.equal(grads["bias"] != 0, open_out)

    @pytest.mark.parametrize("full", [False, True])
    def test_own_gates_below_zero_and_above_one(self, backend, full):
        for sides in SIDES[1:]:
            tensors, masks = case((11, 43, 29), sides, "wild", full=full)
            assert all((tensors[z] < 0).any() and (tensors[z] > 1).any() for z in masks)
            needs = needs_of(tensors, sides)
            compare(
                layer(sides, full), tensors, dtype=torch.float32, what=f"{sides}", masks=masks, needs=needs
            )

    @pytest.mark.parametrize("full", [False, True])
    def test_sizes_read_dz_off_either_gradient(self, backend, full):
        for size in [(50, 19, 8), (8, 19, 50), (200, 130, 70), (70, 130, 200)]:
            tensors, masks = case(size, full=full)
            compare(
                layer((True, "out_gates"), full), tensors, dtype=torch.float32, what=f"{size}", masks=masks
            )

    @pytest.mark.parametrize("shape", [(31,), (0, 31), (2, 0, 31), (4, 31), (2, 3, 31), (2, 1, 3, 2, 31)])
    def test_leading_dimensions_and_empty_batches(self, backend, shape):
        for sides in SIDES:
            tensors, masks = case((1, 31, 17), sides)
            tensors["x"] = torch.randn(shape)
            needs = needs_of(tensors, sides)
            y, grads = compare(
                layer(sides), tensors, dtype=torch.float32, what=f"{sides}", masks=masks, needs=needs
            )
            assert y.shape == (*shape[:-1], 17)
            assert grads["x"].shape == shape
            if 0 in shape:
                assert not any(g.any() for g in grads.values())

    @pytest.mark.parametrize("size", [(0, 5, 3), (3, 0, 5), (3, 5, 0), (0, 0, 5), (3, 0, 0)])
    def test_no_rows_no_inputs_no_outputs(self, backend, size):
        for sides in SIDES:
            tensors, masks = case(size, sides)
            compare(
                layer(sides),
                tensors,
                dtype=torch.float32,
                what=f"{sides}",
                masks=masks,
                needs=needs_of(tensors, sides),
            )

    def test_dead_memory_is_not_read(self, backend):
        """A closed input may hold anything: it is skipped, where 0 * NaN would be NaN."""
        tensors, _ = case((6, 40, 24))
        closed_in, closed_out = tensors["z_in"] == 0, tensors["z_out"] == 0
        clean = {name: t.clone() for name, t in tensors.items()}
        tensors["x"][:, closed_in] = float("nan")
        tensors["weight"][:, closed_in] = float("nan")
        tensors["weight"][closed_out] = float("inf")
        tensors["bias"][closed_out] = float("nan")
        call = layer((True, "out_gates"))
        results = []
        for leaves in (clean, tensors):
            leaves = {name: t.requires_grad_() for name, t in leaves.items()}
            y = call(l0, **leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)


class TestLayouts:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("size", [(29, 37, 41), (15, 385, 33), (33, 70, 14)])
    @pytest.mark.parametrize("w_layout", LAYOUTS)
    @pytest.mark.parametrize("x_layout", LAYOUTS)
    def test_operands(self, backend, size, x_layout, w_layout):
        dys = [*LAYOUTS.values(), lambda dy: dy[:1, :1].expand(dy.shape), lambda dy: dy[:1].expand(dy.shape)]
        for sides, dy_layout in zip(itertools.cycle(SIDES), dys, strict=False):
            tensors, masks = case(size, sides)
            tensors["x"] = LAYOUTS[x_layout](tensors["x"])
            tensors["weight"] = LAYOUTS[w_layout](tensors["weight"])
            tensors["bias"] = strided(tensors["bias"])
            for name in masks:
                tensors[name] = strided(tensors[name])
            what = f"{sides} {dy_layout}"
            needs = needs_of(tensors, sides)
            compare(
                layer(sides),
                tensors,
                dtype=torch.float32,
                what=what,
                masks=masks,
                needs=needs,
                layout=dy_layout,
            )

    def test_expanded_operands(self, backend):
        tensors, masks = case((12, 30, 20))
        tensors["x"] = torch.randn(1, 30).expand(12, 30)
        tensors["weight"] = torch.randn(20, 1).expand(20, 30)
        tensors["bias"] = torch.randn(1).expand(20)
        compare(layer((True, "out_gates")), tensors, dtype=torch.float32, masks=masks)

    def test_gradient_of_sum_and_of_cat(self, backend):
        tensors, _ = case((6, 30, 20))
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        call = layer((True, "out_gates"))

        def loss(y):
            return y.sum() + (torch.cat([y, y[:, :7]], 1) * torch.arange(27)).sum()

        results = []
        for namespace in (l0, reference):
            grads = torch.autograd.grad(loss(call(namespace, **leaves)), [leaves["x"], leaves["weight"]])
            results.append(grads)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)

    def test_leading_dimensions_that_no_view_joins(self, backend):
        tensors, masks = case((1, 30, 20))
        tensors["x"] = torch.randn(5, 4, 30).transpose(0, 1)
        compare(
            layer((True, "out_gates")),
            tensors,
            dtype=torch.float32,
            masks=masks,
            layout=lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
        )

    def test_offset_into_a_larger_tensor(self, backend):
        tensors, masks = case((6, 30, 20))
        tensors["x"] = torch.randn(10, 64)[3:9, 17:47]
        tensors["weight"] = sliced(transposed(tensors["weight"]))
        compare(layer((True, "out_gates")), tensors, dtype=torch.float32, masks=masks)


class TestNeededGradients:
    @pytest.mark.parametrize("size", [(5, 23, 19), (40, 23, 19)])
    def test_every_subset(self, backend, size):
        names = ("x", "weight", "bias", "z_in", "z_out")
        for n in range(len(names) + 1):
            for needs in itertools.combinations(names, n):
                tensors, masks = case(size)
                _, grads = compare(
                    layer((True, "out_gates")),
                    tensors,
                    dtype=torch.float32,
                    what=f"{needs}",
                    masks=masks,
                    needs=list(needs),
                )
                assert set(grads) == set(needs)

    def test_a_subset_is_bit_equal_to_the_whole(self, backend):
        tensors, _ = case((5, 23, 19))
        call = layer((True, "out_gates"))
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        whole = dict(
            zip(leaves, torch.autograd.grad(call(l0, **leaves).sum(), list(leaves.values())), strict=True)
        )
        for name in ("x", "weight", "bias"):
            alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
            (grad,) = torch.autograd.grad(call(l0, **alone).sum(), alone[name])
            assert torch.equal(grad, whole[name])

    def test_frozen_leaves_get_nothing(self, backend):
        tensors, _ = case((5, 23, 19))
        tensors["weight"].requires_grad_()
        layer((True, "out_gates"))(l0, **tensors).sum().backward()
        assert tensors["weight"].grad is not None
        assert all(t.grad is None for name, t in tensors.items() if name != "weight")

    def test_no_graph_without_need(self, backend):
        tensors, _ = case((5, 23, 19))
        assert layer((True, "out_gates"))(l0, **tensors).grad_fn is None
        tensors["x"].requires_grad_()
        with torch.no_grad():
            assert layer((True, "out_gates"))(l0, **tensors).grad_fn is None
        with torch.inference_mode():
            y = layer((True, "out_gates"))(l0, **tensors)
        torch.testing.assert_close(y, layer((True, "out_gates"))(reference, **tensors), rtol=1e-5, atol=1e-4)


class TestSupport:
    def test_support_then_input_gates_equal_output_gates(self, backend):
        z = make_z("mixed", 33).requires_grad_()
        x, first, bias, second = torch.randn(9, 21), torch.randn(33, 21), torch.randn(33), torch.randn(5, 33)
        leaves = [t.requires_grad_() for t in (x, first, bias, second)] + [z]
        gates = Gates.from_z(z, full_grad=False)
        by_support = l0.gated_linear(
            l0.gated_linear(x, first, bias, out_support=gates), second, in_gates=gates
        )
        by_output = l0.gated_linear(l0.gated_linear(x, first, bias, out_gates=gates), second)
        torch.testing.assert_close(by_support, by_output, rtol=1e-5, atol=1e-4)
        left, right = (torch.autograd.grad(y.square().sum(), leaves) for y in (by_support, by_output))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-2)
        assert torch.equal(left[-1] != 0, wanted(z, False))
        assert torch.equal(right[-1] != 0, wanted(z, False))

    def test_closed_outputs_are_exactly_zero_and_open_ones_unscaled(self, backend):
        z = make_z("mixed", 33)
        x, weight, bias = torch.randn(9, 21), torch.randn(33, 21), torch.randn(33)
        y = l0.gated_linear(x, weight, bias, out_support=Gates.from_z(z))
        assert torch.equal(y == 0, (z == 0).expand(9, 33))
        torch.testing.assert_close(y[:, z != 0], (x @ weight.T + bias)[:, z != 0], rtol=1e-5, atol=1e-5)

    def test_support_gives_its_gates_no_gradient(self, backend):
        z = make_z("mixed", 33).requires_grad_()
        weight = torch.randn(33, 21, requires_grad=True)
        l0.gated_linear(torch.randn(9, 21), weight, out_support=Gates.from_z(z)).sum().backward()
        assert z.grad is None
        assert torch.equal(weight.grad.any(1), z != 0)


class TestL0Linear:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("has_bias", [True, False])
    @pytest.mark.parametrize("has", [(True, True), (True, False), (False, True), (False, False)])
    def test_against_the_formula(self, backend, has, has_bias, dtype):
        tensors, _ = case((17, 101, 53), (False, None), dtype=dtype, bias=has_bias)
        tensors["in_log_alpha"] = torch.randn(101, dtype=dtype) if has[0] else None
        tensors["out_log_alpha"] = torch.randn(53, dtype=dtype) if has[1] else None

        def call(namespace, **kwargs):
            return namespace.l0_linear(**kwargs, seed=SEED)

        given = [n for n in ("in_log_alpha", "out_log_alpha") if tensors[n] is not None]
        drawn = reference.sample_gates([tensors[n] for n in given], seed=SEED)
        masks = {n: wanted(g.z, False) for n, g in zip(given, drawn, strict=True)}
        compare(call, tensors, dtype=dtype, masks=masks)
        # no mask: the dense formula has the same zero set by itself
        _, grads = compare(call, tensors, dtype=dtype)
        for name, mask in masks.items():
            assert torch.equal(grads[name] != 0, mask)

    def test_is_sample_then_gate(self, backend):
        x, weight, a, b = torch.randn(5, 30), torch.randn(20, 30), torch.randn(30), torch.randn(20)
        y = l0.l0_linear(x, weight, in_log_alpha=a, out_log_alpha=b, seed=SEED)
        g_in, g_out = l0.sample_gates([a, b], seed=SEED)
        assert torch.equal(y, l0.gated_linear(x, weight, in_gates=g_in, out_gates=g_out))
        alone = l0.l0_linear(x, weight, out_log_alpha=b, seed=SEED)
        assert torch.equal(alone, l0.gated_linear(x, weight, out_gates=l0.sample_gates(b, seed=SEED)))

    def test_a_missing_seed_comes_from_torch(self, backend):
        x, weight, a = torch.randn(5, 30), torch.randn(20, 30), torch.randn(30)
        torch.manual_seed(5)
        first = l0.l0_linear(x, weight, in_log_alpha=a)
        second = l0.l0_linear(x, weight, in_log_alpha=a)
        torch.manual_seed(5)
        assert torch.equal(l0.l0_linear(x, weight, in_log_alpha=a), first)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        expected = reference.l0_linear(x, weight, in_log_alpha=a)
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)

    def test_constants(self, backend):
        dist = l0.HardConcrete(0.5, -0.3, 1.2)
        tensors = {"x": torch.randn(5, 60), "weight": torch.randn(7, 60), "in_log_alpha": torch.randn(60)}

        def call(namespace, **kwargs):
            return namespace.l0_linear(**kwargs, seed=SEED, dist=dist)

        compare(call, tensors, dtype=torch.float32)


class TestGradcheck:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_gated_linear(self, backend, sides, has_bias):
        tensors, _ = case((3, 7, 5), sides, "wild", torch.float64, full=True, bias=has_bias)
        leaves = [t for t in tensors.values() if t is not None]
        names = [n for n, t in tensors.items() if t is not None]
        for name, leaf in zip(names, leaves, strict=True):
            leaf.requires_grad_(not (name == "z_out" and sides[1] == "out_support"))
            if name.startswith("z"):
                leaf.data[0] = 0.0  # a closed gate has no gradient in either direction: it is not perturbed
        closed = {n: tensors[n] == 0 for n in names if n.startswith("z")}

        def call(*values):
            kwargs = dict(zip(names, values, strict=True))
            kwargs.setdefault("bias", None)
            for name, mask in closed.items():
                kwargs[name] = kwargs[name].masked_fill(mask, 0)
            return layer(sides, full=True)(l0, **kwargs)

        assert gradcheck(call, leaves)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("has", [(True, True), (True, False), (False, True)])
    def test_l0_linear(self, backend, has):
        x, weight, bias = (
            torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 9), (8, 9), (8,))
        )
        a, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (9, 8))

        def call(x, weight, bias, a, b):
            in_a, out_a = (a if has[0] else None), (b if has[1] else None)
            return l0.l0_linear(x, weight, bias, in_log_alpha=in_a, out_log_alpha=out_a, seed=SEED)

        assert gradcheck(call, (x, weight, bias, a, b))


class TestErrors:
    """Arguments of the layers that no other file covers: gates that do not belong."""

    def gates(self, n=6):
        return Gates.from_z(make_z("mixed", n))

    def call(self, **kwargs):
        return l0.gated_linear(torch.randn(2, 6), torch.randn(4, 6), **kwargs)

    @pytest.mark.parametrize("name", ["in_gates", "out_gates", "out_support"])
    def test_gates_of_another_size_kind_or_device(self, backend, name):
        size = 6 if name == "in_gates" else 4
        with pytest.raises(ValueError, match=rf"{name} must hold {size} gates, .* got z of shape \(5,\)"):
            self.call(**{name: self.gates(5)})
        with pytest.raises(TypeError, match=rf"{name} must be Gates .*, got Tensor"):
            self.call(**{name: torch.ones(size)})
        z, index, count, _ = self.gates(size)
        with pytest.raises(ValueError, match=rf"{name}.z must be on cpu, .* got meta"):
            self.call(**{name: Gates(z.to("meta"), index, count)})
        with pytest.raises(TypeError, match=rf"{name}.z must be float32 or float64, got torch.bfloat16"):
            self.call(**{name: Gates(z.bfloat16(), index, count)})
        with pytest.raises(TypeError, match=rf"{name}.index and .count must be int32, got torch.int64"):
            self.call(**{name: Gates(z, index.long(), count)})
        with pytest.raises(ValueError, match=rf"{name}.index must have shape \(128,\) .* got \(6,\)"):
            self.call(**{name: Gates(z, index[:6], count)})
        with pytest.raises(ValueError, match=rf"{name}.count must have shape \(2,\) .* got \(1,\)"):
            self.call(**{name: Gates(z, index, count[:1])})

    def test_both_sides_of_the_output(self, backend):
        with pytest.raises(ValueError, match="give either out_gates or out_support, got both"):
            self.call(out_gates=self.gates(4), out_support=self.gates(4))

    @pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, -(2**31)])
    def test_counts_that_are_none(self, backend, value):
        z, index, _, _ = self.gates()
        bad = Gates(z, index, torch.tensor([value, 128], dtype=torch.int32))
        with pytest.raises(ValueError, match=rf"count\[0\] must be in \[0, 6\], got {value}"):
            self.call(in_gates=bad)

    @pytest.mark.skipif("cpp" not in BACKENDS, reason="l0kernels._C was not built")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("side", ["in_gates", "out_gates", "out_support"])
    def test_counts_and_orders_of_other_gates(self, side, dtype):
        """Native kernels look; torch's own operations read what index and count say, and stay inside."""
        z, index, count, _ = Gates.from_z(torch.tensor([0.5, 0.0, 0.3, 1.0, 0.0, 0.2]))
        x, w = torch.randn(2, 6).to(dtype), torch.randn(6, 6).to(dtype)
        for order, number, match in (
            (index, count - 1, r"count\[0\] must count the gates that are not 0, 4, got 3"),
            (index[[2, 1, 0, *range(3, 128)]], count, "index must list the open gates in ascending order"),
            (index[[0, 0, *range(2, 128)]], count, "index must list the open gates in ascending order"),
        ):
            bad = {side: Gates(z, order, number)}
            with l0.use_backend("cpp"), pytest.raises(ValueError, match=match):
                l0.gated_linear(x, w, **bad)

    @pytest.mark.parametrize("value", [-1, 6, 2**31 - 1])
    def test_indices_out_of_range(self, backend, value):
        if backend != "cpp":
            return  # torch's index_select checks, with its own error
        z, index, count, _ = self.gates()
        for position in (0, 5):
            bad = index.clone()
            bad[position] = value
            with pytest.raises(ValueError, match=r"gates.index must hold numbers in \[0, 6\)"):
                self.call(in_gates=Gates(z, bad, count))

    def test_operands(self, backend):
        x, w, b = torch.randn(2, 6), torch.randn(4, 6), torch.randn(4)
        cases = [
            (
                (x[:, :5], w, b),
                ValueError,
                r"x must have shape \(\.\.\., 6\), the columns of weight, got \(2, 5\)",
            ),
            ((torch.tensor(1.0), w, b), ValueError, r"x must have shape \(\.\.\., 6\), .* got \(\)"),
            ((x, w[0], b), ValueError, r"weight must have shape \(out, in\), got \(6,\)"),
            ((x, w, b[:3]), ValueError, r"bias must have shape \(4,\) \(one per row of weight\), got \(3,\)"),
            (
                (x.double(), w, b),
                TypeError,
                "x must have the dtype of weight, torch.float32, got torch.float64",
            ),
            (
                (x, w, b.half()),
                TypeError,
                "bias must have the dtype of weight, torch.float32, got torch.float16",
            ),
            ((x.long(), w, b), TypeError, "x must have a floating-point dtype, got torch.int64"),
            ((x, w.to(torch.complex64), b), TypeError, "weight must have a floating-point dtype"),
            (([[1.0]], w, b), TypeError, "x must be a torch.Tensor, got list"),
            ((x.to("meta"), w, b), ValueError, "x must be on cpu, the device of weight, got meta"),
            ((x, w, b.to("meta")), ValueError, "bias must be on cpu, the device of weight, got meta"),
        ]
        for args, error, match in cases:
            for call in (l0.gated_linear, l0.l0_linear):
                with pytest.raises(error, match=match):
                    call(*args)

    def test_l0_linear_names_its_gates(self, backend):
        x, w = torch.randn(2, 6), torch.randn(4, 6)
        for name, size in (("in_log_alpha", 6), ("out_log_alpha", 4)):
            with pytest.raises(ValueError, match=rf"{name} must have shape \({size},\) .* got \(5,\)"):
                l0.l0_linear(x, w, **{name: torch.zeros(5)})
            with pytest.raises(TypeError, match=f"{name} must be float32 or float64, got torch.float16"):
                l0.l0_linear(x, w, **{name: torch.zeros(size).half()})
            with pytest.raises(ValueError, match=f"{name} must be on cpu, the device of x, got meta"):
                l0.l0_linear(x, w, **{name: torch.zeros(size, device="meta")})
            with pytest.raises(ValueError, match=r"log_alpha must not hold NaN"):
                l0.l0_linear(x, w, **{name: torch.full((size,), float("nan"))})
        with pytest.raises(ValueError, match=r"log_alpha\[1\] must not hold NaN"):
            l0.l0_linear(x, w, in_log_alpha=torch.zeros(6), out_log_alpha=torch.full((4,), float("nan")))
        with pytest.raises(TypeError, match="seed must be an int64 tensor of shape"):
            l0.l0_linear(x, w, in_log_alpha=torch.zeros(6), seed=1)

    def test_nothing_half_written(self, backend):
        """An error in the forward leaves torch's generator and the leaves as they were."""
        leaf = torch.randn(2, 6, requires_grad=True)
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="out_log_alpha"):
            l0.l0_linear(leaf, torch.randn(4, 6), in_log_alpha=torch.zeros(6), out_log_alpha=torch.zeros(3))
        assert leaf.grad is None
        assert not torch.equal(torch.get_rng_state(), state)  # randn of the weight
        state = torch.get_rng_state()
        with pytest.raises(TypeError, match="dist must be"):
            l0.sample_gates(torch.zeros(3), dist=3)
        assert torch.equal(torch.get_rng_state(), state)
