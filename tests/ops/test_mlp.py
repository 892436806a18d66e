"""gated_mlp and l0_mlp on every backend against the dense formula in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import l0kernels as l0
from l0kernels import Gates, reference
from l0kernels._arguments import ROWS
from op_checks import (
    KINDS,
    LAYOUTS,
    SEED,
    check_large_activations,
    compare,
    gate_dtype,
    make_z,
    strided,
    wanted,
)

pytestmark = pytest.mark.usefixtures("poison")

ACTIVATIONS = ("relu", "gelu", "silu", "identity", "swiglu", "geglu")
GATED = list(itertools.product([True, False], repeat=3))


def chain(activation, full=False):
    """The call of gated_mlp on leaves x, w0, b0, z0, w1, ...; a missing bias or gate is None."""

    def call(namespace, x, **leaves):
        depth = len(leaves) // 3
        w, b, z = ([leaves[f"{name}{i}"] for i in range(depth)] for name in "wbz")
        gates = [None if v is None else Gates.from_z(v, full_grad=full) for v in z]
        return namespace.gated_mlp(x, w, b, gates, activation)

    return call


def case(
    batch,
    sizes,
    *,
    activation="relu",
    gated=None,
    biased=None,
    kinds=("mixed",),
    dtype=torch.float32,
    full=False,
):
    """Leaves of a chain of ``sizes`` units and the masks of their gate gradients."""
    depth = len(sizes) - 1
    gated, biased = gated or (True,) * depth, biased or (True,) * depth
    tensors, masks = {"x": torch.randn(batch, sizes[0], dtype=dtype)}, {}
    for i, (n_in, n_out), kind in zip(itertools.count(), itertools.pairwise(sizes), itertools.cycle(kinds)):
        n_rows = n_out * (ROWS[activation] if i + 1 < depth else 1)
        tensors[f"w{i}"] = torch.randn(n_rows, n_in, dtype=dtype) / n_in**0.5
        tensors[f"b{i}"] = torch.randn(n_rows, dtype=dtype) if biased[i] else None
        tensors[f"z{i}"] = make_z(kind, n_in, gate_dtype(dtype)) if gated[i] else None
        if gated[i]:
            masks[f"z{i}"] = wanted(tensors[f"z{i}"], full)
    return tensors, masks


class TestAgainstTheFormula:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize(
        ("batch", "sizes"),
        [
            (1, (1, 1)),
            (1, (1, 1, 1)),
            (3, (5, 7, 2)),
            (13, (17, 31, 29, 11)),
            (14, (32, 28, 32, 64, 16)),
            (15, (33, 65, 15)),
            (30, (385, 97, 10)),
            (131, (41, 383, 23)),
            (9, (29, 769, 3)),
            (257, (12, 67, 130, 5)),
        ],
    )
    def test_sizes_and_activations(self, backend, batch, sizes, activation, dtype):
        tensors, masks = case(batch, sizes, activation=activation, dtype=dtype)
        compare(chain(activation), tensors, dtype=dtype, masks=masks)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("gated", GATED)
    def test_with_and_without_each_gate_and_bias(self, backend, gated, activation):
        for biased in ((True, True, True), (False, False, False), (True, False, True)):
            tensors, masks = case(11, (13, 37, 17, 7), activation=activation, gated=gated, biased=biased)
            compare(chain(activation), tensors, dtype=torch.float32, what=f"{biased}", masks=masks)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=2)))
    def test_kinds_of_gates(self, backend, kinds, activation):
        tensors, masks = case(11, (23, 41, 5), activation=activation, kinds=kinds)
        _, grads = compare(chain(activation), tensors, dtype=torch.float32, masks=masks)
        open_in, open_hidden = tensors["z0"] != 0, tensors["z1"] != 0
        open_rows = open_hidden.repeat(ROWS[activation])
        assert not grads["w0"][~open_rows].any()
        assert not grads["w0"][:, ~open_in].any()
        assert not grads["b0"][~open_rows].any()
        assert not grads["w1"][:, ~open_hidden].any()
        assert not grads["x"][:, ~open_in].any()

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_own_gates_below_zero_and_above_one(self, backend, activation, full):
        for batch in (5, 60):
            tensors, masks = case(batch, (23, 41, 19), activation=activation, kinds=("wild",), full=full)
            compare(chain(activation, full), tensors, dtype=torch.float32, what=f"{batch}", masks=masks)

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("shape", [(13,), (0, 13), (2, 0, 13), (3, 2, 13), (2, 1, 3, 13)])
    def test_leading_dimensions_and_empty_batches(self, backend, shape, activation):
        tensors, masks = case(1, (13, 21, 6), activation=activation)
        tensors["x"] = torch.randn(shape)
        y, grads = compare(chain(activation), tensors, dtype=torch.float32, masks=masks)
        assert y.shape == (*shape[:-1], 6)
        assert grads["x"].shape == shape

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    @pytest.mark.parametrize("sizes", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (4, 0)])
    def test_no_units(self, backend, sizes, activation):
        tensors, masks = case(4, sizes, activation=activation)
        compare(chain(activation), tensors, dtype=torch.float32, masks=masks)

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_layouts(self, backend, activation):
        for x_layout, w_layout in itertools.product(LAYOUTS.values(), repeat=2):
            for dy_layout in (*LAYOUTS.values(), lambda dy: dy[:1, :1].expand(dy.shape)):
                tensors, masks = case(12, (35, 41, 18, 9), activation=activation)
                tensors["x"] = x_layout(tensors["x"])
                for i in range(3):
                    tensors[f"w{i}"] = w_layout(tensors[f"w{i}"])
                    tensors[f"b{i}"] = strided(tensors[f"b{i}"])
                    tensors[f"z{i}"] = strided(tensors[f"z{i}"])
                compare(chain(activation), tensors, dtype=torch.float32, masks=masks, layout=dy_layout)

    def test_default_activation_is_relu(self, backend):
        tensors, _ = case(5, (7, 9, 3))
        gates = [Gates.from_z(tensors["z0"]), None]
        args = (tensors["x"], [tensors["w0"], tensors["w1"]], [tensors["b0"], None], gates)
        assert torch.equal(l0.gated_mlp(*args), l0.gated_mlp(*args, "relu"))

    def test_equals_layers_one_by_one(self, backend):
        tensors, _ = case(9, (13, 21, 6))
        z, b = [Gates.from_z(tensors[f"z{i}"]) for i in range(2)], tensors["b0"]
        hidden = l0.gated_linear(tensors["x"], tensors["w0"], b, in_gates=z[0], out_support=z[1]).relu()
        expected = l0.gated_linear(hidden, tensors["w1"], tensors["b1"], in_gates=z[1])
        y = l0.gated_mlp(tensors["x"], [tensors["w0"], tensors["w1"]], [b, tensors["b1"]], z)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_dead_memory_is_not_read(self, backend, activation):
        results = []
        tensors, _ = case(9, (33, 41, 26, 6), activation=activation)
        for dead in (False, True):
            leaves = {name: t.clone() for name, t in tensors.items()}
            if dead:
                for i in range(3):
                    closed = leaves[f"z{i}"] == 0
                    leaves[f"w{i}"][:, closed] = float("nan")
                    if i:
                        rows = closed.repeat(ROWS[activation])
                        leaves[f"w{i - 1}"][rows] = float("inf")
                        leaves[f"b{i - 1}"][rows] = float("nan")
                leaves["x"][:, leaves["z0"] == 0] = float("nan")
            leaves = {name: t.requires_grad_() for name, t in leaves.items()}
            y = chain(activation)(l0, **leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize(("activation", "act"), [("swiglu", F.silu), ("geglu", F.gelu)])
    def test_gated_product_by_hand(self, backend, activation, act):
        """Three layers: the first half of a hidden weight's rows is the activated factor."""
        x, z1, z2 = torch.randn(7, 5), make_z("mixed", 6), make_z("mixed", 4)
        (g1, u1), (g2, u2) = torch.randn(2, 6, 5), torch.randn(2, 4, 6)
        bg, bu, last = torch.randn(6), torch.randn(6), torch.randn(3, 4)
        weights, biases = [torch.cat((g1, u1)), torch.cat((g2, u2)), last], [torch.cat((bg, bu)), None, None]
        y = l0.gated_mlp(x, weights, biases, [None, Gates.from_z(z1), Gates.from_z(z2)], activation)
        h = act(x @ g1.T + bg) * (x @ u1.T + bu) * z1
        h = act(h @ g2.T) * (h @ u2.T) * z2
        torch.testing.assert_close(y, h @ last.T, rtol=1e-5, atol=1e-5)

    def test_relu_passes_a_nan_on(self, backend):
        x = torch.tensor([[float("nan"), 1.0]])
        y = l0.gated_mlp(x, [torch.eye(2), torch.eye(2)], [None, None], [None, None])
        assert y.isnan().any()


class TestNeededGradients:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
    @pytest.mark.parametrize("batch", [4, 50])
    def test_every_subset(self, backend, activation, batch):
        names = ("x", "w0", "b0", "z0", "w1", "b1", "z1")
        for n in range(len(names) + 1):
            for needs in itertools.combinations(names, n):
                tensors, masks = case(batch, (11, 19, 7), activation=activation)
                _, grads = compare(
                    chain(activation),
                    tensors,
                    dtype=torch.float32,
                    what=f"{needs}",
                    masks=masks,
                    needs=list(needs),
                )
                assert set(grads) == set(needs)

    def test_frozen_leaves_get_nothing(self, backend):
        tensors, _ = case(5, (11, 19, 7))
        tensors["z1"].requires_grad_()
        chain("silu")(l0, **tensors).sum().backward()
        assert tensors["z1"].grad is not None
        assert all(t.grad is None for name, t in tensors.items() if name != "z1")


class TestL0Mlp:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("gated", GATED)
    def test_is_sample_then_chain(self, backend, gated, activation, dtype):
        tensors, _ = case(
            9,
            (31, 43, 21, 5),
            activation=activation,
            gated=(False,) * 3,
            biased=(True, False, True),
            dtype=dtype,
        )
        for i, n in enumerate((31, 43, 21)):
            tensors[f"z{i}"] = torch.randn(n, dtype=dtype) if gated[i] else None

        def call(namespace, x, **leaves):
            w, b, a = ([leaves[f"{name}{i}"] for i in range(3)] for name in "wbz")
            if namespace is l0:
                return l0.l0_mlp(x, w, b, a, activation, seed=SEED)
            drawn = iter(reference.sample_gates([v for v in a if v is not None], seed=SEED))
            gates = [None if v is None else next(drawn) for v in a]
            return reference.gated_mlp(x, w, b, gates, activation)

        given = [name for name in ("z0", "z1", "z2") if tensors[name] is not None]
        drawn = reference.sample_gates([tensors[name] for name in given], seed=SEED)
        masks = {name: wanted(g.z, False) for name, g in zip(given, drawn, strict=True)}
        compare(call, tensors, dtype=dtype, masks=masks)

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    def test_equals_gated_mlp_bit_for_bit(self, backend, activation):
        tensors, _ = case(9, (31, 43, 5), activation=activation, gated=(False,) * 2)
        w, b = [tensors["w0"], tensors["w1"]], [tensors["b0"], tensors["b1"]]
        a = [torch.randn(31), torch.randn(43)]
        fused = l0.l0_mlp(tensors["x"], w, b, a, activation, seed=SEED)
        assert torch.equal(fused, l0.gated_mlp(tensors["x"], w, b, l0.sample_gates(a, seed=SEED), activation))

    def test_a_missing_seed_comes_from_torch(self, backend):
        tensors, _ = case(9, (31, 43, 5), gated=(False,) * 2)
        args = (
            tensors["x"],
            [tensors["w0"], tensors["w1"]],
            [None, None],
            [torch.zeros(31), torch.zeros(43)],
        )
        torch.manual_seed(7)
        first, second = l0.l0_mlp(*args), l0.l0_mlp(*args)
        torch.manual_seed(7)
        assert torch.equal(l0.l0_mlp(*args), first)
        assert not torch.equal(first, second)

    def test_errors(self, backend):
        x, w = torch.zeros(2, 3), [torch.zeros(4, 3), torch.zeros(2, 4)]
        with pytest.raises(ValueError, match="log_alphas must hold one entry per weight, 2, got 1"):
            l0.l0_mlp(x, w, [None, None], [torch.zeros(3)])
        with pytest.raises(ValueError, match=r"log_alphas\[1\] must have shape \(4,\) .* got \(5,\)"):
            l0.l0_mlp(x, w, [None, None], [None, torch.zeros(5)])
        with pytest.raises(ValueError, match="must not hold NaN"):
            l0.l0_mlp(x, w, [None, None], [None, torch.full((4,), float("nan"))])
        with pytest.raises(TypeError, match=r"must be float32 or float64, got torch.bfloat16"):
            l0.l0_mlp(x, w, [None, None], [None, torch.zeros(4).bfloat16()])
        with pytest.raises(TypeError, match="seed must be an int64 tensor"):
            l0.l0_mlp(x, w, [None, None], [None, torch.zeros(4)], seed=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_arguments(activation, backend):
    check_large_activations(activation)


class TestGradcheck:
    @pytest.mark.covering(1)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("gated", [(True, True, True), (False, True, False), (True, False, True)])
    def test_sampled_gates(self, backend, activation, gated):
        tensors, _ = case(
            3,
            (5, 6, 4, 3),
            activation=activation,
            gated=(False,) * 3,
            biased=(True, False, True),
            dtype=torch.float64,
        )
        log_alphas = [torch.randn(n, dtype=torch.float64) for n in (5, 6, 4)]
        names = [name for name, t in tensors.items() if t is not None]

        def call(*values):
            leaves = {**tensors, **dict(zip(names, values, strict=False))}
            gates = l0.sample_gates(list(values[-3:]), seed=SEED)
            w, b = [leaves[f"w{i}"] for i in range(3)], [leaves[f"b{i}"] for i in range(3)]
            used = [g if use else None for g, use in zip(gates, gated, strict=True)]
            return l0.gated_mlp(leaves["x"], w, b, used, activation)

        inputs = [t.requires_grad_() for t in (*(tensors[n] for n in names), *log_alphas)]
        assert gradcheck(call, inputs)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_own_gates(self, backend, activation):
        tensors, _ = case(
            3, (5, 6, 3), activation=activation, kinds=("wild",), dtype=torch.float64, full=True
        )
        closed = {name: t == 0 for name, t in tensors.items() if name.startswith("z")}

        def call(*values):
            leaves = dict(zip(tensors, values, strict=True))
            for name, mask in closed.items():
                leaves[name] = leaves[name].masked_fill(mask, 0)
            return chain(activation, full=True)(l0, **leaves)

        assert gradcheck(call, [t.requires_grad_() for t in tensors.values()])


class TestErrors:
    def call(self, **changes):
        kwargs = {
            "x": torch.zeros(2, 3),
            "weights": [torch.zeros(4, 3), torch.zeros(2, 4)],
            "biases": [torch.zeros(4), None],
            "gates": [Gates.from_z(torch.ones(3)), None],
            "activation": "relu",
        }
        return l0.gated_mlp(**{**kwargs, **changes})

    def test_lengths(self, backend):
        with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
            self.call(weights=[], biases=[], gates=[])
        for name in ("biases", "gates"):
            with pytest.raises(ValueError, match=f"{name} must hold one entry per weight, 2, got 1"):
                self.call(**{name: [None]})

    @pytest.mark.parametrize("activation", ["tanh", "ReLU", None, 3])
    def test_activation(self, backend, activation):
        with pytest.raises(ValueError, match=r"activation must be one of 'relu', .*, got "):
            self.call(activation=activation)

    def test_shapes(self, backend):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 3\), .* got \(2, 5\)"):
            self.call(x=torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"weights\[1\] must have 4 columns, .* got shape \(2, 5\)"):
            self.call(weights=[torch.zeros(4, 3), torch.zeros(2, 5)])
        with pytest.raises(ValueError, match=r"weights\[1\] must have shape \(out, in\), got \(2,\)"):
            self.call(weights=[torch.zeros(4, 3), torch.zeros(2)])
        with pytest.raises(ValueError, match=r"biases\[0\] must have shape \(4,\) .* got \(3,\)"):
            self.call(biases=[torch.zeros(3), None])
        with pytest.raises(ValueError, match=r"gates\[1\] must hold 4 gates, .* got z of shape \(5,\)"):
            self.call(gates=[None, Gates.from_z(torch.ones(5))])

    @pytest.mark.parametrize("call", ["gated_mlp", "l0_mlp"])
    def test_rows_of_a_gated_product(self, backend, call):
        def shapes(*rows):
            weights = [torch.zeros(n, k) for n, k in rows]
            getattr(l0, call)(torch.zeros(2, 3), weights, [None, None], [None, None], "swiglu")

        shapes((8, 3), (2, 4))
        with pytest.raises(
            ValueError, match=r"weights\[0\] must have an even number of rows, .* got .*\(9, 3"
        ):
            shapes((9, 3), (2, 4))
        with pytest.raises(
            ValueError, match=r"weights\[1\] must have 4 columns, half the rows of .*\(2, 8\)"
        ):
            shapes((8, 3), (2, 8))
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 6\), .* got \(2, 3\)"):
            shapes((8, 6), (2, 4))

    def test_kinds_and_dtypes(self, backend):
        with pytest.raises(TypeError, match=r"weights\[1\] must have the dtype of x, .* got torch.float64"):
            self.call(weights=[torch.zeros(4, 3), torch.zeros(2, 4).double()])
        with pytest.raises(TypeError, match=r"biases\[0\] must have the dtype of weights\[0\]"):
            self.call(biases=[torch.zeros(4).half(), None])
        with pytest.raises(TypeError, match=r"gates\[0\] must be Gates .* got Tensor"):
            self.call(gates=[torch.ones(3), None])
        with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
            self.call(x=torch.zeros(2, 3).long())

    def test_devices(self, backend):
        with pytest.raises(ValueError, match=r"weights\[1\] must be on cpu, .* got meta"):
            self.call(weights=[torch.zeros(4, 3), torch.zeros(2, 4, device="meta")])
        with pytest.raises(ValueError, match=r"gates\[0\]\.z must be on cpu, .* got meta"):
            self.call(gates=[Gates(*(t.to("meta") for t in Gates.from_z(torch.ones(3))[:3])), None])

    @pytest.mark.parametrize("activation", ["relu", "swiglu"])
    def test_counts_that_are_none(self, backend, activation):
        z, index, _, _ = Gates.from_z(make_z("mixed", 4))
        for value in (-1, 5, 2**31 - 1):
            bad = Gates(z, index, torch.tensor([value, 128], dtype=torch.int32))
            with pytest.raises(ValueError, match=rf"count\[0\] must be in \[0, 4\], got {value}"):
                self.call(
                    weights=[torch.zeros(4 * ROWS[activation], 3), torch.zeros(2, 4)],
                    biases=[None, None],
                    gates=[None, bad],
                    activation=activation,
                )
