"""Random calls of every public operation, on whatever backend is in use, against the formula in float64.

A call is made of a number: ``check(NAME, NUMBER)`` makes the same one again. Sizes from 0 on, strides of all
kinds (views of buffers of NaN, stride 0, channels last), every dtype, gates of every kind, any subset of the
arguments frozen. What is compared: the output and every gradient, that no argument changes, and that two
calls whose backward passes come in the other order give the same bits.
"""

import itertools
import math
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.functional import silu

import l0kernels as l0
from l0kernels import reference
from l0kernels._gates import compact, round_up
from op_checks import compare, gate_dtype, make_z, wanted

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "gelu", "silu", "identity", "swiglu", "geglu")


def count(default):
    """Calls of each operation: L0KERNELS_FUZZ_OPS of them, or the tests' modest number."""
    return int(os.environ.get("L0KERNELS_FUZZ_OPS", default))


@dataclass
class Case:
    """A call: ``call(namespace, **tensors)`` for the package and for its reference."""

    call: Callable[..., torch.Tensor]
    tensors: dict[str, torch.Tensor | None]
    dtype: torch.dtype
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()  # never differentiated
    autocast: torch.dtype | None = None
    what: str = ""
    slack: int = 8  # roundings: sums are long, and what cancels comes from larger terms


class Draw:
    """The choices of one call."""

    def __init__(
        self,
        seed,
        dtypes=FLOATS,
        largest=300,
        device="cpu",
        autocasts=(torch.bfloat16,),
        doubles=True,
        activations=ACTIVATIONS,
    ):
        self.random = random.Random(seed)
        self.dtypes, self.largest, self.device, self.autocasts = dtypes, largest, device, autocasts
        self.activations = activations
        self.doubles = doubles  # whether gates of float64 are served
        self.buffers = []  # (memory of an argument, what it held)
        torch.manual_seed(seed)

    def chance(self, p):
        return self.random.random() < p

    def pick(self, *choices):
        return self.random.choice(choices)

    def size(self, largest=None):
        largest = largest or self.largest
        kind = self.random.random()
        if kind < 0.06:
            return 0
        if kind < 0.16:
            return 1
        if kind < 0.7:
            return self.random.randint(2, min(largest, 40))
        if kind < 0.85:
            return min(largest, self.pick(7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 257))
        return self.random.randint(1, largest)

    def dtype(self):
        return self.pick(*self.dtypes)

    def values(self, *shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(self.device)

    def lay(self, t, expand=True):
        """The values of t in other strides; with ``expand`` now and then the same ones along a dimension."""
        kind = self.random.random()
        if t is None or not t.ndim or kind < 0.35:
            return t
        if kind < 0.55:
            order = self.random.sample(range(t.ndim), t.ndim)
            back = [order.index(i) for i in range(t.ndim)]
            laid = t.permute(order).contiguous().permute(back)
        elif kind < 0.88 or not expand:
            steps = [self.pick(1, 1, 2, 3) for _ in range(t.ndim)]
            starts = [self.random.randint(0, 3) for _ in range(t.ndim)]
            # torch's own products read between rows of bfloat16 where the processor has AMX, and multiply
            # that by 0: what is huge shows there, too, who takes it for a value.
            beside = torch.finfo(t.dtype).max if t.dtype == torch.bfloat16 else float("nan")
            sizes = [a + n * s + 1 for a, n, s in zip(starts, t.shape, steps, strict=True)]
            whole = t.new_full(sizes, beside)
            part = whole[tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))]
            laid = part[tuple(slice(n) for n in t.shape)]
            laid.copy_(t)
            self.buffers.append((whole, whole.clone()))
        else:
            dim = self.random.randrange(t.ndim)
            laid = t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape) if t.shape[dim] else t
        return laid

    def gate_dtype(self):
        return self.pick(torch.float32, torch.float32, torch.float64) if self.doubles else torch.float32

    def operand(self, *shape, dtype):
        return self.lay(self.values(*shape, dtype=dtype))

    def bias(self, n, dtype):
        return None if self.chance(0.3) else self.operand(n, dtype=dtype)

    def z(self, n, dtype, wild=True):
        """z of the gates, or None; and whether all open ones get a gradient."""
        if self.chance(0.2):
            return None, False
        kind = self.pick("mixed", "mixed", "mixed", "open", "closed", "few", *(["wild"] if wild else []))
        z = make_z(kind, n, gate_dtype(dtype)).to(self.device)
        return self.lay(z), self.chance(0.4) or kind == "wild"

    def gates(self, full):
        """Makes Gates of z; now and then those of which a GPU takes everything as it lies."""
        plain = self.chance(0.2)

        def make(z):
            if z is None:
                return None
            gates = l0.Gates.from_z(z, full_grad=full)
            if plain:
                index, n = compact(z.detach())
                n[1] = round_up(len(z))
                return l0.Gates(gates.z, index, n, full)
            return gates

        return make

    def log_alpha(self, *shape, dtype=None):
        dtype = self.gate_dtype() if dtype is None else dtype
        kind = self.random.random()
        a = self.values(*shape, dtype=dtype, scale=3.0)
        if kind < 0.12:
            a = torch.full_like(a, self.pick(-30.0, 30.0))
        elif kind < 0.3:
            a = a + self.pick(-4.0, 4.0)
        return self.lay(a)

    def seed(self):
        return torch.tensor([self.random.randint(0, 2**63 - 1)], device=self.device)

    def dist(self):
        if self.chance(0.7):
            return l0.HardConcrete()
        return l0.HardConcrete(self.pick(0.5, 0.9), self.pick(-0.2, -0.05), self.pick(1.05, 1.3))

    def rows(self, n):
        """A shape (..., n): any number of leading dimensions."""
        leading = self.pick(0, 1, 1, 1, 2)
        return [*(self.size(4 if i else self.pick(8, 40, self.largest)) for i in range(leading)), n]

    def autocast(self, dtype):
        """float32 operands now and then under autocast."""
        if dtype == torch.float32 and self.autocasts and self.chance(0.1):
            return self.pick(*self.autocasts)
        return None


def _drawn(dtype, log_alpha_dtype):
    """How exact a layer of ``dtype`` is whose gates are drawn in another."""
    return torch.float32 if dtype == torch.float64 and log_alpha_dtype == torch.float32 else dtype


def _masks(**gates):
    return {name: wanted(z, full) for name, (z, full) in gates.items() if z is not None}


def sample_gates(d):
    dtype = d.gate_dtype()
    sizes = [d.size(d.pick(5, 200, 5000)) for _ in range(d.pick(1, 1, 2, 3, 6))]
    vectors = {f"a{i}": d.log_alpha(n, dtype=dtype) for i, n in enumerate(sizes)}
    seed, rank, dist, alone = d.seed(), d.pick(0, 0, 1, 2**32 - 1), d.dist(), d.chance(0.5)

    def call(ns, **a):
        given = [*a.values()]
        given = given[0] if alone and len(given) == 1 else given
        gates = ns.sample_gates(given, seed=seed, rank=rank, dist=dist)
        gates = [gates] if isinstance(gates, l0.Gates) else gates
        for gate in gates:
            index, n = compact(gate.z.detach())
            assert gate.count[0] == n[0], "count"
            assert gate.count[1] in (n[1], round_up(len(gate.z))), "extent"
            assert torch.equal(gate.index[: n[0]], index[: n[0]]), "index"
        return torch.cat([gate.z for gate in gates])

    return Case(call, vectors, dtype)


def eval_gates(d):
    dtype, mode, dist = d.pick(torch.float32, torch.float64), d.pick(*l0.gates.EVAL_MODES), d.dist()
    a = d.log_alpha(d.size(), dtype=dtype)
    return Case(lambda ns, a: ns.eval_gates(a, mode, dist=dist).z, {"a": a}, dtype)


def l0_penalty(d):
    dtype = d.gate_dtype()
    shapes = [[d.size(d.pick(5, 300)) for _ in range(d.pick(1, 1, 1, 2, 0))] for _ in range(d.pick(1, 2, 5))]
    vectors = {f"a{i}": d.log_alpha(*shape, dtype=dtype) for i, shape in enumerate(shapes)}
    sizes, lam, dist = [d.pick(1, 3.5, 300) for _ in shapes], d.pick(1.0, 1e-3), d.dist()
    total = sum(s * math.prod(shape) for s, shape in zip(sizes, shapes, strict=True)) * lam

    def call(ns, **a):
        return ns.l0_penalty([*a.values()], sizes, lam=lam, dist=dist) / max(total, 1.0)

    return Case(call, vectors, dtype)


def l2_penalty(d):
    dtype = d.dtype()
    groups = d.pick(1, 1, 1, 2, 3)
    n_in, n_out = d.size(), groups * d.size(d.pick(4, 60))
    kernel = [d.size(4) for _ in range(d.pick(0, 0, 1, 2, 3))]
    weight = d.operand(n_out, n_in, *kernel, dtype=dtype)
    a_dtype = d.pick(torch.float32, gate_dtype(dtype))
    a_in = d.log_alpha(n_in * groups, dtype=a_dtype) if d.chance(0.7) else None
    a_out = d.log_alpha(n_out, dtype=d.pick(torch.float32, a_dtype)) if d.chance(0.7) else None
    decay, dist, numel = d.pick(1.0, 5e-4), d.dist(), max(weight.numel(), 1)

    def call(ns, weight, a_in, a_out):
        sides = {"in_log_alpha": a_in, "out_log_alpha": a_out}
        return ns.l2_penalty(weight, decay, **sides, groups=groups, dist=dist) * (20 / (numel * decay))

    return Case(call, {"weight": weight, "a_in": a_in, "a_out": a_out}, dtype)


def gated_linear(d):
    dtype, n_in, n_out = d.dtype(), d.size(), d.size()
    (z_in, full_in), (z_out, full_out) = d.z(n_in, dtype), d.z(n_out, dtype)
    make_in, make_out, support = d.gates(full_in), d.gates(full_out), d.chance(0.25)
    tensors = {
        "x": d.operand(*d.rows(n_in), dtype=dtype),
        "weight": d.operand(n_out, n_in, dtype=dtype),
        "bias": d.bias(n_out, dtype),
        "z_in": z_in,
        "z_out": z_out,
    }

    def call(ns, x, weight, bias, z_in, z_out):
        out = {"out_support" if support else "out_gates": make_out(z_out)}
        return ns.gated_linear(x, weight, bias, in_gates=make_in(z_in), **out)

    masks = _masks(z_in=(z_in, full_in), z_out=(z_out, full_out))
    return Case(call, tensors, dtype, masks, ("z_out",) if support else (), d.autocast(dtype))


def l0_linear(d):
    dtype, n_in, n_out, seed, dist = d.dtype(), d.size(), d.size(), d.seed(), d.dist()
    a_dtype = d.gate_dtype()
    tensors = {
        "x": d.operand(*d.rows(n_in), dtype=dtype),
        "weight": d.operand(n_out, n_in, dtype=dtype),
        "bias": d.bias(n_out, dtype),
        "a_in": d.log_alpha(n_in, dtype=a_dtype) if d.chance(0.8) else None,
        "a_out": d.log_alpha(n_out, dtype=a_dtype) if d.chance(0.6) else None,
    }

    def call(ns, x, weight, bias, a_in, a_out):
        return ns.l0_linear(x, weight, bias, in_log_alpha=a_in, out_log_alpha=a_out, seed=seed, dist=dist)

    return Case(call, tensors, _drawn(dtype, a_dtype), autocast=d.autocast(dtype))


def _chain(d):
    """Sizes, activation, x, weights and biases of a chain."""
    dtype, activation = d.dtype(), d.pick(*d.activations)
    sizes = [d.size(d.pick(20, d.largest)) for _ in range(d.pick(2, 3, 3, 4))]
    rows = 2 if activation in ("swiglu", "geglu") else 1
    tensors = {"x": d.operand(*d.rows(sizes[0]), dtype=dtype)}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        m *= rows if i + 2 < len(sizes) else 1
        weight = d.values(m, n, dtype=dtype, scale=1 / math.sqrt(max(n, 1)))
        tensors[f"w{i}"], tensors[f"b{i}"] = d.lay(weight), d.bias(m, dtype)
    return dtype, activation, sizes, tensors


def gated_mlp(d):
    dtype, activation, sizes, tensors = _chain(d)
    depth, repack, masks, makes = len(sizes) - 1, d.chance(0.3), {}, []
    for i in range(depth):
        z, full = d.z(sizes[i], dtype)
        tensors[f"z{i}"] = z
        makes.append(d.gates(full))
        masks |= _masks(**{f"z{i}": (z, full)})

    def call(ns, x, **t):
        gates = [make(t[f"z{i}"]) for i, make in enumerate(makes)]
        layers = [[t[f"{kind}{i}"] for i in range(depth)] for kind in "wb"]
        return ns.gated_mlp(x, *layers, gates, activation, repack_in_backward=repack)

    return Case(call, tensors, dtype, masks, autocast=d.autocast(dtype), what=activation)


def l0_mlp(d):
    dtype, activation, sizes, tensors = _chain(d)
    depth, repack, seed, dist = len(sizes) - 1, d.chance(0.3), d.seed(), d.dist()
    a_dtype = d.gate_dtype()
    for i in range(depth):
        tensors[f"a{i}"] = d.log_alpha(sizes[i], dtype=a_dtype) if d.chance(0.85) else None

    def call(ns, x, **t):
        lists = [[t[f"{kind}{i}"] for i in range(depth)] for kind in "wba"]
        return ns.l0_mlp(x, *lists, activation, seed=seed, dist=dist, repack_in_backward=repack)

    return Case(call, tensors, _drawn(dtype, a_dtype), autocast=d.autocast(dtype), what=activation)


def masked_linear(d):
    dtype, n_in, n_out, seed, dist = d.dtype(), d.size(), d.size(), d.seed(), d.dist()
    odd = (d.size(40) + 1, d.size(40) + 1)
    block = d.pick(None, None, (1, 1), (16, 16), (32, 8), (7, 5), (100, 300), odd)
    mode = d.pick(None, None, None, *l0.gates.EVAL_MODES)
    shape = (n_out, n_in) if block is None else (-(-n_out // block[0]), -(-n_in // block[1]))
    tensors = {
        "x": d.operand(*d.rows(n_in), dtype=dtype),
        "weight": d.operand(n_out, n_in, dtype=dtype),
        "bias": d.bias(n_out, dtype),
        "a": d.log_alpha(*shape),
    }

    def call(ns, x, weight, bias, a):
        return ns.masked_linear(x, weight, bias, a, block=block, seed=seed, mode=mode, dist=dist)

    frozen = () if mode is None else ("a",)
    exact = _drawn(dtype, tensors["a"].dtype)
    return Case(call, tensors, exact, frozen=frozen, autocast=d.autocast(dtype), what=f"{block} {mode}")


def _convolution(d):
    """Options of a convolution, the channels it has and an image that covers its kernel."""
    groups = d.pick(1, 1, 1, 2, 3, 8)
    n_in, n_out = groups * d.pick(1, 2, 5, 8, 0, 17), groups * d.pick(1, 1, 3, 8, 13, 0)
    if groups == 1 and d.chance(0.3):
        n_in, n_out = d.size(150), d.size(150)
    kernel = d.pick((1, 1), (1, 1), (3, 3), (2, 3), (5, 1))
    options = {
        "stride": d.pick(1, 1, 2, (1, 3)),
        "padding": d.pick(0, 1, (2, 0), "valid", "same"),
        "dilation": d.pick(1, 1, 1, 2, (1, 2)),
        "groups": groups,
    }
    if options["padding"] == "same":
        options["stride"] = 1
    dilation = options["dilation"] if isinstance(options["dilation"], tuple) else (options["dilation"],) * 2
    image = [g * (k - 1) + 1 + d.pick(0, 1, 2, 4) for g, k in zip(dilation, kernel, strict=True)]
    return n_in, n_out, kernel, options, image


def gated_conv2d(d):
    dtype = d.dtype()
    n_in, n_out, kernel, options, image = _convolution(d)
    (z_in, full_in), (z_out, full_out) = d.z(n_in, dtype), d.z(n_out, dtype)
    make_in, make_out, support = d.gates(full_in), d.gates(full_out), d.chance(0.25)
    batch = [] if d.chance(0.15) else [d.pick(1, 2, 3, 0)]
    tensors = {
        "x": d.operand(*batch, n_in, *image, dtype=dtype),
        "weight": d.operand(n_out, n_in // options["groups"], *kernel, dtype=dtype),
        "bias": d.bias(n_out, dtype),
        "z_in": z_in,
        "z_out": z_out,
    }

    def call(ns, x, weight, bias, z_in, z_out):
        out = {"out_support" if support else "out_gates": make_out(z_out)}
        return ns.gated_conv2d(x, weight, bias, **options, in_gates=make_in(z_in), **out)

    masks = _masks(z_in=(z_in, full_in), z_out=(z_out, full_out))
    frozen = ("z_out",) if support else ()
    return Case(call, tensors, dtype, masks, frozen, d.autocast(dtype), str(options))


def gated_batch_norm(d):
    """Of a dense or a packed x, in training or not; y and the statistics afterwards."""
    dtype, channels, training, packed = d.dtype(), d.size(150), d.chance(0.6), d.chance(0.5)
    shape = [d.pick(2, 3, 5), channels, d.pick(1, 2, 5), d.pick(1, 3, 4)]
    if not packed:
        shape = shape[: d.pick(2, 3, 4)]
    z, _ = d.z(channels, dtype)
    z = torch.ones(channels, device=d.device) if z is None else z
    make = d.gates(False)
    p_dtype = d.pick(dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else dtype
    statistics = None
    if not training or d.chance(0.8):
        statistics = [d.lay(d.values(channels, dtype=p_dtype), expand=False)]
        statistics.append(d.lay(d.values(channels, dtype=p_dtype).abs() + 0.5, expand=False))
    momentum, eps = d.pick(0.1, 0.5), d.pick(1e-5, 1e-2)
    affine = "both" if p_dtype != dtype else d.pick("both", "both", "none", "weight", "bias")
    tensors = {
        "x": d.operand(*shape, dtype=dtype),
        "weight": d.operand(channels, dtype=p_dtype) if affine in ("both", "weight") else None,
        "bias": d.operand(channels, dtype=p_dtype) if affine in ("both", "bias") else None,
    }

    def call(ns, x, weight, bias):
        double = x.dtype == torch.float64
        kept = (None, None)
        if statistics is not None:
            kept = [_again(t, torch.float64 if double else t.dtype) for t in statistics]
        weight, bias = (t if t is None or not double else t.double() for t in (weight, bias))
        args = (*kept, weight, bias, training, momentum, eps)
        gates = make(z)
        if packed and ns is l0:
            data = l0.gated_batch_norm(l0.pack_channels(x, gates), *args)
            y = l0.unpack_channels(data)
        else:
            y = ns.gated_batch_norm(x, *args, gates=gates)
        wide = y.double() if double else y.float()
        return torch.cat([wide.flatten(), *(t.to(wide.dtype) for t in kept if t is not None)])

    return Case(call, tensors, dtype, what=f"{'packed' if packed else 'dense'} {training} {affine}")


def _again(t, dtype):
    """A copy of the vector t with its stride."""
    whole = torch.full((max(len(t) * t.stride(0), 1),), float("nan"), dtype=dtype, device=t.device)
    return whole[:: t.stride(0)][: len(t)].copy_(t)


def packed_channels(d):
    """pack, a convolution that keeps them packed, an activation, a norm, one that unpacks, or unpack."""
    dtype = d.dtype()
    n_in, n_mid, kernel, options, image = _convolution(d)
    n_out = d.size(20)
    image = [n + 2 for n in image]
    make = [d.gates(False) for _ in range(2)]
    (z_in, _), (z_mid, _) = d.z(n_in, dtype, wild=False), d.z(n_mid, dtype, wild=False)
    z_mid = make_z("mixed", n_mid, gate_dtype(dtype)).to(d.device) if z_mid is None else z_mid
    pack_first, last = d.chance(0.5) and z_in is not None, d.chance(0.6)
    norm = dtype.itemsize > 2 and d.chance(0.5)  # it makes the roundings of 16 bits large
    support = d.chance(0.5)
    tensors = {
        "x": d.operand(d.pick(1, 2, 3), n_in, *image, dtype=dtype),
        "w0": d.operand(n_mid, n_in // options["groups"], *kernel, dtype=dtype),
        "b0": d.bias(n_mid, dtype),
        "w1": d.operand(n_out, n_mid, 1, 1, dtype=dtype) if last else None,
        "b1": d.bias(n_out, dtype) if last else None,
        "gain": d.operand(n_mid, dtype=dtype) if norm else None,
        "z_in": z_in,
        "z_mid": z_mid,
    }

    def call(ns, x, w0, b0, w1, b1, gain, z_in, z_mid):
        first, mid = make[0](z_in), make[1](z_mid)
        through = {"out_support" if support else "out_gates": mid}
        stats = (None, None, gain, None, True, 0.1, 0.5)
        if ns is reference:
            h = ns.gated_conv2d(x, w0, b0, **options, in_gates=first, **through)
            h = silu(h)
            h = ns.gated_batch_norm(h, *stats, gates=mid) if norm else h
            return h if w1 is None else ns.gated_conv2d(h, w1, b1, in_gates=mid)
        h = ns.pack_channels(x, first) if pack_first else x
        h = ns.packed_conv2d(h, w0, b0, **options, in_gates=first, **through).map(silu)
        h = ns.gated_batch_norm(h, *stats) if norm else h
        return ns.unpack_channels(h) if w1 is None else ns.packed_conv2d(h, w1, b1, in_gates=mid)

    frozen = ("z_mid",) if support and not last else ()
    masks = _masks(z_in=(z_in, False), z_mid=(z_mid, False))
    what = f"{options} {pack_first} {norm} {last} {support}"
    return Case(call, tensors, dtype, masks, frozen, what=what, slack=64 if norm else 8)


def gated_attention(d):
    """Of heads that share keys or do not, with every kind of mask."""
    dtype, shared, heads_k, B = d.dtype(), d.pick(1, 1, 2, 3), d.pick(1, 2, 3, 5), d.pick(0, 1, 1, 2)
    heads, L, S, D = shared * heads_k, d.size(70), d.size(70), d.pick(1, 3, 8, 16, 20, 32, 64)
    z, full = d.z(heads if d.chance(0.5) else heads_k, dtype)
    make, options = d.gates(full), {"scale": d.pick(None, 0.3)}
    kind = d.pick("none", "causal", "taken", "added")
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        shape = [size if d.chance(0.5) else 1 for size in (B, heads, L, S)][d.pick(0, 0, 2) :]
        mask = d.values(*shape, dtype=torch.float32)
        options["attn_mask"] = d.lay(mask > -0.5 if kind == "taken" else mask)

    def call(ns, q, k, v, z):
        given = dict(options)
        if kind == "added":
            given["attn_mask"] = options["attn_mask"].to(q.dtype)
        return ns.gated_attention(q, k, v, gates=make(z), **given)

    shapes = (B, heads, L, D), (B, heads_k, S, D), (B, heads_k, S, D)
    tensors = {name: d.operand(*shape, dtype=dtype) for name, shape in zip("qkv", shapes, strict=True)}
    what = f"{kind} {shared}"
    return Case(call, {**tensors, "z": z}, dtype, _masks(z=(z, full)), what=what)


OPS = {
    op.__name__: op
    for op in (
        sample_gates,
        eval_gates,
        l0_penalty,
        l2_penalty,
        gated_linear,
        l0_linear,
        gated_mlp,
        l0_mlp,
        masked_linear,
        gated_conv2d,
        gated_batch_norm,
        packed_channels,
        gated_attention,
    )
}


def _two(case, needs, layout, what):
    """Two forwards and then their backwards, the first one's last: the same bits."""
    leaves = [
        {n: None if t is None else t.detach().requires_grad_(n in needs) for n, t in case.tensors.items()}
        for _ in range(2)
    ]
    device = next(t for t in case.tensors.values() if t is not None).device
    with nullcontext() if case.autocast is None else torch.autocast(device.type, case.autocast):
        y = [case.call(l0, **leaf) for leaf in leaves]
    dy = layout(torch.randn(y[0].shape, device=device)).to(y[0].dtype)
    second, first = (
        torch.autograd.grad(y[i], [leaves[i][n] for n in needs], dy, allow_unused=True) for i in (1, 0)
    )
    assert torch.equal(y[0], y[1]), f"{what}: another y the second time"
    for n, a, b in zip(needs, first, second, strict=True):
        assert (a is None) == (b is None), f"{what}: d{n} the second time"
        assert a is None or torch.equal(a, b), f"{what}: another d{n} the second time"


PRIMITIVES = {
    "sample_gates": {"sample", "gate_grad"},
    "eval_gates": set(),
    "l0_penalty": {"l0_penalty"},
    "l2_penalty": {"l2_penalty"},
    "gated_linear": {"gated_linear"},
    "l0_linear": {"gated_linear"},
    "gated_mlp": {"gated_mlp"},
    "l0_mlp": {"gated_mlp"},
    "masked_linear": {"masked_linear", "block_linear"},
    "gated_conv2d": {"gated_conv2d"},
    "gated_batch_norm": {"gated_batch_norm", "gated_conv2d"},
    "packed_channels": {"gated_batch_norm", "gated_conv2d"},
    "gated_attention": {"gated_attention"},
}
"""What a backend must implement to serve the calls."""


def check(name, seed, **options):
    """The call of this number on the backend in use, against float64; options as of Draw."""
    d = Draw(seed * 1009 + sum(map(ord, name)), **options)
    case = OPS[name](d)
    given = {n: t for n, t in case.tensors.items() if t is not None}
    before = {n: t.detach().clone() for n, t in given.items()}
    needs = [n for n in given if n not in case.frozen and d.chance(0.8)]
    if d.chance(0.25):
        needs = [n for n in given if n not in case.frozen]
    kind, again = d.random.getrandbits(32), d.chance(0.3)

    def layout(values):
        mine = Draw(kind, device=d.device)
        return mine.lay(values)

    shapes = {n: (tuple(t.shape), t.stride(), str(t.dtype)[6:]) for n, t in given.items()}
    what = f"{name}({seed}) {case.what} {case.autocast or ''} {shapes}"
    masks = {n: mask for n, mask in case.masks.items() if n in needs}
    _, grads = compare(
        case.call,
        case.tensors,
        dtype=case.autocast or case.dtype,
        what=what,
        masks=masks,
        needs=needs,
        layout=layout,
        autocast=case.autocast,
        slack=case.slack,
        underflow=True,
    )
    if again and grads:
        _two(case, needs, layout, what)
    for n, t in given.items():
        assert torch.equal(t, before[n]), f"{what}: {n} has changed"
    for whole, held in d.buffers:
        same = torch.allclose(whole, held, rtol=0, atol=0, equal_nan=True)
        assert same, f"{what}: memory beside an argument has changed"
