"""Every public call, training and evaluating, and what each backend answers: the reference's values, or why
it cannot be used. A table, so that no pair of the two is left to memory."""

import itertools

import torch
from torch.nn import functional as F

import l0kernels as l0
from l0kernels import nn
from l0kernels._arguments import GLU
from l0kernels._arguments import ROWS as ACTIVATIONS

SEED = torch.tensor([7])
ROWS = 6


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.get_default_dtype())


def _alpha(n):
    return _randn(n) * 2


def _layer(n_in=20, n_out=12):
    return _randn(ROWS, n_in), _randn(n_out, n_in) / 4, _randn(n_out)


def _gates(log_alpha):
    return l0.sample_gates(log_alpha, seed=SEED)


def _function(make):
    """A row of the table: ``make()`` returns the leaves and the function of them."""

    def build():
        leaves, call = make()
        leaves = [t.requires_grad_() for t in leaves]
        return leaves, lambda: call(*leaves)

    return build


def _module(make, *shape, penalty=True):
    """A row for a module: its output and its penalty, training; and its output, evaluating."""

    def build(evaluating=False):
        module = make()
        with torch.no_grad():
            for gate in module.modules():
                if isinstance(gate, nn.HardConcreteGate):
                    gate.log_alpha.copy_(torch.randn(gate.log_alpha.shape) * 2)
        x = _randn(*shape).requires_grad_()
        module.train(not evaluating)

        def call():
            y = module(x)
            return torch.cat([y.flatten(), nn.penalty(module).view(1)]) if penalty and not evaluating else y

        return [x, *module.parameters()], call

    return build


def _chain(depth, activation, drawn):
    glu = 2 if activation in GLU else 1

    def make():
        sizes = [20, 12, 5][: depth + 1]
        weights = [
            _randn(m * (glu if i + 1 < depth else 1), n) / 4
            for i, (n, m) in enumerate(itertools.pairwise(sizes))
        ]
        biases, alphas = [_randn(len(w)) for w in weights], [_alpha(n) for n in sizes[:-1]]

        def call(x, *t):
            w, b, a = t[:depth], t[depth : 2 * depth], t[2 * depth :]
            if drawn:
                return l0.l0_mlp(x, w, b, a, activation, seed=SEED)
            return l0.gated_mlp(x, w, b, [_gates(log_alpha) for log_alpha in a], activation)

        return [_randn(ROWS, sizes[0]), *weights, *biases, *alphas], call

    return _function(make)


def _linear(sides, support=False):
    def make():
        x, w, b = _layer()

        def call(x, w, b, *alphas):
            names = [f"{side}_gates" for side in sides]
            gates = dict(zip(names, map(_gates, alphas), strict=True))
            if support:
                gates["out_support"] = gates.pop("out_gates")
            return l0.gated_linear(x, w, b, **gates)

        return [x, w, b, *(_alpha({"in": 20, "out": 12}[side]) for side in sides)], call

    return _function(make)


def _drawn_linear(sides):
    def make():
        def call(x, w, b, *alphas):
            named = dict(zip([f"{side}_log_alpha" for side in sides], alphas, strict=True))
            return l0.l0_linear(x, w, b, seed=SEED, **named)

        return [*_layer(), *(_alpha({"in": 20, "out": 12}[side]) for side in sides)], call

    return _function(make)


def _full_grad():
    x, w, b = _layer()
    z = torch.rand(20, dtype=x.dtype) * (torch.rand(20) < 0.6)
    call = lambda x, w, b, z: l0.gated_linear(x, w, b, in_gates=l0.Gates.from_z(z, full_grad=True))  # noqa: E731
    # The reference differentiates where z is 0, too.
    return [x, w, b, z], lambda x, w, b, z: call(x, w, b, torch.where(z == 0, z.detach(), z))


def _masked(block, mode):
    def make():
        shape = (12, 20) if block is None else (3, 4)
        call = lambda x, w, b, a: l0.masked_linear(x, w, b, a, block=block, seed=SEED, mode=mode)  # noqa: E731
        return [*_layer(), _randn(*shape)], call

    return _function(make)


def _conv(sides, groups=1, **options):
    def make():
        def call(x, w, b, *alphas):
            gates = dict(zip([f"{side}_gates" for side in sides], map(_gates, alphas), strict=True))
            return l0.gated_conv2d(x, w, b, groups=groups, **options, **gates)

        sizes = {"in": 8, "out": 12}
        leaves = [_randn(2, 8, 6, 5), _randn(12, 8 // groups, 3, 3) / 5, _randn(12)]
        return [*leaves, *(_alpha(sizes[side]) for side in sides)], call

    return _function(make)


def _packed():
    def call(x, w0, b0, w1, a, gain):
        gates = _gates(a)
        h = l0.packed_conv2d(x, w0, b0, padding=1, out_support=gates).map(F.relu)
        h = l0.gated_batch_norm(h, None, None, gain, None, True)
        y = l0.packed_conv2d(h, w1, in_gates=gates)
        back = l0.unpack_channels(l0.pack_channels(x, _gates(a.detach()[:8])))
        return torch.cat([y.flatten(), back.flatten()])

    shapes = (2, 8, 6, 5), (12, 8, 3, 3), (12,), (4, 12, 1, 1), (12,), (12,)
    return [_randn(*shape) for shape in shapes], call


def _norm(training):
    def make():
        mean, var = _randn(8), torch.rand(8, dtype=torch.get_default_dtype()) + 0.5
        gates = l0.Gates.from_z((torch.arange(8) % 3 > 0).to(mean.dtype))

        def call(x, gain, shift):
            kept = mean.clone(), var.clone()
            y = l0.gated_batch_norm(x, *kept, gain, shift, training, gates=gates)
            return torch.cat([y.flatten(), *kept])

        return [_randn(3, 8, 4), _randn(8), _randn(8)], call

    return _function(make)


def _units_norm(name, *options, bias=True):
    def make():
        gates = l0.Gates.from_z((torch.arange(8) % 3 > 0).to(torch.get_default_dtype()))

        def call(x, *vectors):
            y = getattr(l0, name)(x.mT if name == "gated_group_norm" else x, *options, *vectors, gates=gates)
            return y.flatten()

        return [_randn(3, 4, 8), *(_randn(8) for _ in range(1 + bias))], call

    return _function(make)


def _attention(gates_of="q", **options):
    def make():
        def call(q, k, v, a):
            return l0.gated_attention(q, k, v, gates=_gates(a), **options)

        shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
        return [*(_randn(*shape) for shape in shapes), _alpha(4 if gates_of == "q" else 2)], call

    return _function(make)


def _bank():
    chain = nn.L0MLP([20, 12, 5])
    bank, x = nn.GateBank(chain), _randn(ROWS, 20).requires_grad_()

    def call():
        drawn = bank.draw(expected=True)
        return torch.cat([chain(x).flatten(), *(e.detach().view(1) for e in drawn.expected.values())])

    return [x, *chain.parameters()], call


FUNCTIONS = {
    "sample_gates": {
        "one": _function(lambda: ([_alpha(300)], lambda a: _gates(a).z)),
        "several": _function(
            lambda: ([_alpha(30), _alpha(0), _alpha(7)], lambda *a: torch.cat([g.z for g in _gates([*a])]))
        ),
    },
    "eval_gates": {
        mode: _function(lambda mode=mode: ([_alpha(40)], lambda a: l0.eval_gates(a, mode).z + 0 * a))
        for mode in ("paper", "median", "topk")
    },
    "l0_penalty": {
        "": _function(lambda: ([_alpha(30), _alpha(4)], lambda *a: l0.l0_penalty(a, [3, 4], lam=0.1)))
    },
    "l2_penalty": {
        "": _function(
            lambda: (
                [_randn(12, 20), _alpha(20), _alpha(12)],
                lambda w, i, o: l0.l2_penalty(w, 0.1, in_log_alpha=i, out_log_alpha=o),
            )
        )
    },
    "gated_linear": {
        "none": _linear([]),
        "in": _linear(["in"]),
        "out": _linear(["out"]),
        "both": _linear(["in", "out"]),
        "support": _linear(["in", "out"], support=True),
        "full_grad": _function(_full_grad),
    },
    "l0_linear": {"+".join(s): _drawn_linear(s) for s in ([], ["in"], ["out"], ["in", "out"])},
    "gated_mlp": {f"{a} {n}": _chain(n, a, False) for a in ACTIVATIONS for n in (1, 2)},
    "l0_mlp": {f"{a} {n}": _chain(n, a, True) for a in ACTIVATIONS for n in (1, 2)},
    "masked_linear": {
        f"{'blocks' if block else 'weights'} {mode}": _masked(block, mode)
        for block in (None, (5, 5))
        for mode in (None, "paper")
    },
    "gated_conv2d": {
        "none": _conv([]),
        "in": _conv(["in"], padding=1),
        "out": _conv(["out"], stride=2),
        "both": _conv(["in", "out"], padding="same"),
        "groups": _conv(["in", "out"], groups=4, dilation=2),
    },
    "packed_conv2d": {"": _function(_packed)},
    "gated_attention": {
        "of q": _attention(is_causal=True),
        "of k": _attention("k", attn_mask=torch.arange(7) < 5, scale=0.3),
    },
    "gated_batch_norm": {"training": _norm(True), "evaluating": _norm(False)},
    "gated_layer_norm": {"": _units_norm("gated_layer_norm", 8)},
    "gated_rms_norm": {"": _units_norm("gated_rms_norm", 8, bias=False)},
    "gated_group_norm": {"": _units_norm("gated_group_norm", 4)},
}
"""By public function; packed_conv2d brings pack_channels and unpack_channels along."""


def _sequential():
    return nn.L0Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1),
        nn.L0BatchNorm2d(8),
        torch.nn.ReLU(),
        nn.L0Conv2d(8, 6, 3, gate="in"),
    )


_MODULES = {
    **{
        f"L0Linear {gate}": _module(lambda gate=gate: nn.L0Linear(20, 12, gate=gate), ROWS, 20)
        for gate in ("in", "out", "both", "weight", (5, 5))
    },
    **{
        f"L0Conv2d {gate} {groups}": _module(
            lambda gate=gate, groups=groups: nn.L0Conv2d(8, 12, 3, gate=gate, groups=groups), 2, 8, 6, 5
        )
        for gate, groups in (("in", 1), ("both", 1), ("out", 4))
    },
    **{
        f"L0MLP {a} {n}": _module(lambda a=a, n=n: nn.L0MLP([20, 12, 5][: n + 1], a), ROWS, 20)
        for a, n in (("relu", 1), ("relu", 2), ("gelu", 2))
    },
    **{
        f"L0FeedForward {a}": _module(lambda a=a: nn.L0FeedForward(20, 12, a), ROWS, 20)
        for a in ("relu", "swiglu")
    },
    "L0Sequential": _module(_sequential, 2, 4, 6, 5),
}

CALLS = {
    **{f"{f} {row}".strip(): build for f, rows in FUNCTIONS.items() for row, build in rows.items()},
    **{f"nn.{name}, training": build for name, build in _MODULES.items()},
    **{
        f"nn.{name}, evaluating": lambda build=build: build(evaluating=True)
        for name, build in _MODULES.items()
    },
    "nn.GateBank": _bank,
}


def results(name):
    """The output and the gradients of a call; the same numbers in each."""
    torch.manual_seed(11)
    leaves, call = CALLS[name]()
    torch.manual_seed(12)  # the gates of modules
    y = call()
    torch.manual_seed(13)
    grads = torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype), allow_unused=True)
    return [y.detach(), *grads]


def check(name, backend):
    """Why the backend cannot be used for the call; None where it computed what the reference does."""
    try:
        with l0.use_backend(backend):
            got = results(name)
    except RuntimeError as error:
        prefix = f"backend {backend!r} cannot be used: "
        if not str(error).startswith(prefix):
            raise
        return str(error)[len(prefix) :]
    with l0.use_backend("reference"):
        expected = results(name)
    for a, b in zip(got, expected, strict=True):
        assert (a is None or not a.any()) if b is None else (a is not None or not b.any()), "another gradient"
        if a is not None and b is not None:
            scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale)
    return None
