"""gated_attention on every backend against the dense formula in float64."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

import l0kernels as l0
from l0kernels import Gates, reference
from op_checks import KINDS, compare, gate_dtype, make_z, wanted

pytestmark = pytest.mark.usefixtures("poison")

# batch, heads of q, heads of k, rows, keys, head size
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 16),
    (1, 5, 5, 33, 17, 40),
    (3, 4, 4, 1, 29, 32),
    (2, 6, 2, 9, 13, 24),
    (2, 4, 1, 11, 3, 8),
]
MASKS = ["none", "causal", "padding", "rows", "heads", "bias", "blind"]


def spread(B, n, heads, D, dtype):
    """(B, heads, n, D) as a projection leaves it."""
    return torch.randn(B, n, heads * D, dtype=dtype).view(B, n, heads, D).transpose(1, 2)


def options_of(mask, size, dtype):
    """Options of the call."""
    B, heads, _, L, S, _ = size
    if mask == "causal":
        return {"is_causal": True, "scale": 0.3}
    if mask == "bias":
        return {"attn_mask": torch.randn(heads, L, S, dtype=dtype)}
    shape = {"padding": (B, 1, 1, S), "rows": (L, S), "heads": (1, heads, 1, S), "blind": (B, 1, L, S)}
    if mask not in shape:
        return {}
    taken = torch.rand(shape[mask]) < 0.6
    if mask == "blind":  # rows that see no key
        taken[:, :, ::2] = False
    return {"attn_mask": taken}


def attend(size, full, options):
    """The call, of the leaves q, k, v and z."""

    def call(namespace, q, k, v, z=None):
        mask = options.get("attn_mask")
        of_dtype = {} if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.to(q.dtype)}
        gates = None if z is None else Gates.from_z(z, full_grad=full)
        return namespace.gated_attention(q, k, v, gates=gates, **{**options, **of_dtype})

    return call


def check(size, kind, dtype=torch.float32, mask="none", full=False, per_key=False, lay=None):
    B, heads, heads_k, L, S, D = size
    lay = lay or (lambda t: t)
    tensors = {
        "q": lay(spread(B, L, heads, D, dtype)),
        "k": lay(spread(B, S, heads_k, D, dtype)),
        "v": lay(spread(B, S, heads_k, D, dtype)),
    }
    masks = {}
    if kind is not None:
        tensors["z"] = make_z(kind, heads_k if per_key else heads, gate_dtype(dtype))
        masks = {"z": wanted(tensors["z"], full)}
    call = attend(size, full, options_of(mask, size, dtype))
    y, grads = compare(call, tensors, dtype=dtype, masks=masks, what=f"{size} {kind} {mask}", slack=4)
    if kind is not None:
        of_q = (tensors["z"] == 0).repeat_interleave(heads // len(tensors["z"]))
        assert not y[:, of_q].any()
        assert not grads["q"][:, of_q].any()
        of_k = of_q.view(heads_k, -1).all(1)
        assert not grads["k"][:, of_k].any()
        assert not grads["v"][:, of_k].any()


class TestAgainstTheFormula:
    @pytest.mark.covering(2)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("kind", [*KINDS, "wild", None])
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("how", ["", "full", "per key", "full per key"])
    def test_all(self, size, kind, mask, how, backend):
        check(size, kind, torch.float32, mask, "full" in how, "per key" in how)

    @pytest.mark.parametrize("mask", MASKS)
    def test_double(self, mask, backend):
        check(SIZES[4], "mixed", torch.float64, mask, full=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("mask", MASKS)
    def test_sixteen_bits(self, mask, dtype, backend):
        check(SIZES[4], "mixed", dtype, mask)

    @pytest.mark.parametrize("n_open", range(5))
    def test_every_number_of_open_heads(self, n_open, backend):
        z = torch.zeros(4)
        z[torch.randperm(4)[:n_open]] = 0.5
        call = attend((1, 4, 4, 3, 5, 8), True, {})
        tensors = {name: torch.randn(1, 4, n, 8) for name, n in (("q", 3), ("k", 5), ("v", 5))}
        compare(call, {**tensors, "z": z}, dtype=torch.float32, masks={"z": z != 0})

    @pytest.mark.parametrize("layout", ["contiguous", "last", "sliced"])
    def test_memory(self, layout, backend):
        def lay(t):
            if layout == "last":  # the last dimension in pieces
                return t.mT.contiguous().mT
            return (
                t.new_full((*t.shape[:3], 3 * t.shape[3]), float("nan"))[..., 1::3].copy_(t)
                if layout == "sliced"
                else t.contiguous()
            )

        check((2, 4, 2, 5, 7, 8), "mixed", lay=lay)

    def test_gradients(self, backend):
        q, k, v = (torch.randn(1, 4, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
        z = torch.tensor([0.5, 0.0, 1.0, 0.2], dtype=torch.float64)
        assert gradcheck(lambda q, k, v: l0.gated_attention(q, k, v, gates=Gates.from_z(z)), (q, k, v))


@pytest.mark.parametrize(
    "size", [(0, 2, 2, 3, 4, 8), (2, 2, 2, 0, 4, 8), (2, 2, 2, 3, 0, 8), (2, 0, 0, 3, 4, 8)]
)
def test_empty(size, backend):
    B, heads, heads_k, L, S, D = size
    q, k, v = (
        torch.randn(B, h, n, D, requires_grad=True) for h, n in ((heads, L), (heads_k, S), (heads_k, S))
    )
    z = torch.tensor([0.5, 0.0][:heads], requires_grad=True)
    y = l0.gated_attention(q, k, v, gates=Gates.from_z(z))
    assert y.shape == q.shape
    assert not y.any()
    y.sum().backward()
    for t in (q, k, v, z):
        assert t.grad is not None
        assert not t.grad.any()


def test_equals_torch_without_gates(backend):
    q, k, v = (spread(2, n, 4, 16, torch.float32) for n in (5, 7, 7))
    expected = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(l0.gated_attention(q, k, v), expected)
    ones = Gates.from_z(torch.ones(4))
    torch.testing.assert_close(l0.gated_attention(q, k, v, gates=ones), expected)
    torch.testing.assert_close(reference.gated_attention(q, k, v), expected)


def test_rows_that_see_no_key_are_zero(backend):
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    for mask in (torch.zeros(3, 3, dtype=torch.bool), torch.full((3, 3), -torch.inf)):
        for namespace in (l0, reference):
            y = namespace.gated_attention(q, k, v, attn_mask=mask)
            assert not y.any()
            assert not torch.autograd.grad(y.sum(), q)[0].any()


def test_closed_heads_may_hold_anything(backend):
    q, k, v = (torch.randn(1, 3, 4, 8) for _ in range(3))
    gates = Gates.from_z(torch.tensor([0.5, 0.0, 1.0]))
    expected = l0.gated_attention(q, k, v, gates=gates)
    for t in (q, k, v):
        t[:, 1] = float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for namespace in (l0, reference):
        y = namespace.gated_attention(*leaves, gates=gates)
        torch.testing.assert_close(y, expected)
        for grad in torch.autograd.grad(y.sum(), leaves):
            assert not grad[:, 1].any()
            assert grad.isfinite().all()


def test_costs_what_is_open(backend, monkeypatch):
    seen = []

    def record(q, k, v, **options):
        seen.append((q.shape, k.shape, v.shape))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr("l0kernels.attention.scaled_dot_product_attention", record)
    q, k, v = (torch.randn(2, h, 5, 8) for h in (6, 3, 3))
    l0.gated_attention(q, k, v, gates=Gates.from_z(torch.tensor([0.5, 0.0, 1.0])))
    l0.gated_attention(q, k, v, gates=Gates.from_z(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])))
    assert seen == [((2, 4, 5, 8),) + ((2, 2, 5, 8),) * 2, ((2, 1, 5, 8),) * 3]


def test_all_open_copies_nothing(backend, monkeypatch):
    def same(q, k, v, **options):
        assert [t.data_ptr() for t in (q, k, v)] == addresses
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr("l0kernels.attention.scaled_dot_product_attention", same)
    tensors = [spread(2, 5, 4, 8, torch.float32) for _ in range(3)]
    addresses = [t.data_ptr() for t in tensors]
    l0.gated_attention(*tensors, gates=Gates.from_z(torch.ones(4)))


def test_gradient_of_a_mask(backend):
    q, k, v = (torch.randn(1, 4, 3, 8, dtype=torch.float64) for _ in range(3))
    gates = Gates.from_z(torch.tensor([0.5, 0.0, 1.0, 0.0], dtype=torch.float64))
    grads = []
    for namespace in (l0, reference):
        mask = torch.zeros(1, 4, 3, 3, dtype=torch.float64).requires_grad_()
        namespace.gated_attention(q, k, v, gates=gates, attn_mask=mask).square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads)
    assert not grads[0][:, 1].any()


def test_dropout(backend):
    q, k, v = torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 400, 8), torch.ones(1, 2, 400, 8)
    gates = Gates.from_z(torch.tensor([1.0, 0.0]))
    for namespace in (l0, reference):
        y = namespace.gated_attention(q, k, v, gates=gates, dropout_p=0.25)
        assert y[:, 0].mean().item() == pytest.approx(1, abs=0.02)
        assert y[:, 0].std() > 0.01
        assert not y[:, 1].any()


def test_autocast(backend):
    q, k, v = (torch.randn(1, 3, 5, 8) for _ in range(3))
    gates = Gates.from_z(torch.tensor([0.5, 0.0, 1.0]))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (ns.gated_attention(q, k, v, gates=gates) for ns in (l0, reference))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_compiled(seeded):
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, z, index, count):
        return l0.gated_attention(q, k, v, gates=Gates(z, index, count, True), is_causal=True)

    for values in ([0.5, 0.0, 1.0, 0.0], [0.0, 0.3, 0.0, 0.0]):
        gates = Gates.from_z(torch.tensor(values).requires_grad_())
        y = call(q, k, v, *gates[:3])
        expected = l0.gated_attention(q, k, v, gates=gates, is_causal=True)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), gates.z), torch.autograd.grad(expected.sum(), gates.z)
        )


class TestRefuses:
    Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
            (
                {"k": torch.zeros(2, 2, 5, 8, dtype=torch.int64)},
                TypeError,
                "k must have a floating-point dtype",
            ),
            ({"v": torch.zeros(2, 2, 5, 8).double()}, TypeError, "v must have the dtype of q, torch.float32"),
            (
                {"q": torch.zeros(2, 4, 8)},
                ValueError,
                r"q must have shape \(B, Hq, L, D\), D > 0, got \(2, 4, 8\)",
            ),
            ({"k": torch.zeros(2, 2, 5, 7)}, ValueError, r"k must have shape \(2, Hkv, S, 8\)"),
            (
                {"k": torch.zeros(2, 3, 5, 8)},
                ValueError,
                "k must have a number of heads that divides the 4 of q",
            ),
            ({"v": torch.zeros(2, 2, 4, 8)}, ValueError, r"v must have shape \(2, 2, 5, 8\) \(that of k\)"),
            ({"gates": torch.ones(4)}, TypeError, "gates must be Gates"),
            (
                {"gates": Gates.from_z(torch.ones(3))},
                ValueError,
                "gates must hold 2 gates, one per head of k, or 4",
            ),
            (
                {"attn_mask": torch.zeros(3, 5, dtype=torch.int32)},
                TypeError,
                "attn_mask must be bool, float32",
            ),
            (
                {"attn_mask": torch.zeros(3, 4)},
                ValueError,
                r"attn_mask must be broadcastable to \(2, 4, 3, 5\)",
            ),
            (
                {"attn_mask": torch.zeros(3, 5), "is_causal": True},
                ValueError,
                "is_causal must be False where",
            ),
            ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
            ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
            ({"dropout_p": "no"}, TypeError, "dropout_p must be a number"),
            ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ],
    )
    def test_arguments(self, change, error, message):
        arguments = {"q": self.Q, "k": self.K, "v": self.K} | change
        for namespace in (l0, reference):
            with pytest.raises(error, match=f"^{message}"):
                namespace.gated_attention(**arguments)

    def test_other_gates_of_one_number_of_heads(self):
        with pytest.raises(
            ValueError, match=r"^gates must hold 2 gates, one per head of q, got z of shape \(3,\)"
        ):
            l0.gated_attention(self.K, self.K, self.K, gates=Gates.from_z(torch.ones(3)))
