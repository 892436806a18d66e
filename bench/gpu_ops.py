"""The ops of the GPU rows and who computes them; one case serves every density: graphs read log_alpha anew.

Providers:
    dense            torch.nn as installed, eager                        -> the stock ratio
    dense_compiled   the same under torch.compile
    dense_epilogue   forward alone, GELU in cuBLAS's epilogue (its tanh form)
    dense_own        the ungated op of l0kernels
                     the fastest of these dense providers                -> the fair ratio
    masked           weight * z, then the dense product: the original implementation's formula
    masked_compiled  the same under torch.compile
    index_select     open rows and columns selected, then their product: the host waits for the count
    grouped_mm       units sorted by open, then a grouped product of one group whose size the device knows
    ours             backend "triton"
    ours_cuda        of the small net: backend "cuda"
    ours_nn          of the small net: written with l0kernels.nn
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from ops import ALL_OPEN, DIST, index_select, masked, torch_gate, trained_log_alpha
from torch import Tensor

import l0kernels as l0

BATCHES = 3
Forward = Callable[[Tensor], Tensor]
DENSE = ("dense", "dense_compiled", "dense_epilogue", "dense_own")


@dataclass(frozen=True)
class Provider:
    """One way to compute a case; `finish` is the rest of a training step."""

    forward: Forward
    leaves: Sequence[Tensor]
    truth: str | None  # the formula in fp64 that it must agree with; None: it draws noise of its own
    backend: str = "reference"
    finish: Callable[[], None] | None = None
    syncs: bool = False  # the host waits within the step: no CUDA graph can hold it
    backward: bool = True


@dataclass
class Case:
    """An op at one shape: inputs, providers, and what the densities are set on."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batches: Sequence[Tensor]  # rotated
    grad: Tensor | None  # what backward starts from; None where the output is a loss
    forward_flops: float
    dense_flops: float  # forward and backward
    open_share: Callable[[float], float]
    log_alphas: Sequence[Sequence[Tensor]]  # of each gate vector the copies that providers own
    providers: dict[str, Provider] = field(default_factory=dict)
    truths: dict[str, Forward] = field(default_factory=dict)
    parameters: Sequence[Tensor] = ()

    def leaves(self, truth: str) -> list[Tensor]:
        """What the formula `truth` has gradients of, besides x."""
        return [*self.parameters, *(() if truth == "dense" else (gates[0] for gates in self.log_alphas))]

    @property
    def device(self) -> torch.device:
        return self.batches[0].device

    def set_keep(self, keep: float) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for copies in self.log_alphas:
                value = trained_log_alpha(copies[0].numel(), keep, generator)
                for log_alpha in copies:
                    log_alpha.copy_(value)

    def flops(self, name: str, keep: float, backward: bool) -> float:
        total = self.dense_flops if backward else self.forward_flops
        return total if name in DENSE else total * self.open_share(keep)

    def step(self, provider: Provider, backward: bool, i: int) -> None:
        """What is timed: on batch i a forward, or all of a training step and the gradients released."""
        x = self.batches[i % len(self.batches)]
        y = provider.forward(x)
        if not backward:
            return
        y.backward(self.grad)
        if provider.finish is not None:
            provider.finish()
        x.grad = None
        for leaf in provider.leaves:
            leaf.grad = None

    def values(self, forward: Forward, leaves: Sequence[Tensor], backward: bool, seed: int) -> list[Tensor]:
        """Output and every gradient of one step whose gates come from `seed`."""
        torch.manual_seed(seed)
        x = self.batches[0]
        y = forward(x)
        values = [y.detach()]
        if backward:
            y.backward(self.grad)
            for leaf in [x, *leaves] if x.requires_grad else leaves:
                values.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
                leaf.grad = None
        return values


class Draw:
    """Numbers from a fixed seed, rounded to `dtype` and held in float64 for the truth if `exact`.

    Draw the batches last: the truth has one of them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, exact: bool) -> None:
        self.dtype, self.device, self.exact = dtype, device, exact
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        numbers = numbers.to(self.dtype)
        return numbers.double() if self.exact else numbers

    def layer(self, n_in: int, n_out: int) -> torch.nn.Linear:
        layer = torch.nn.Linear(n_in, n_out, device="meta")
        layer.weight = torch.nn.Parameter(self.normal(n_out, n_in, scale=n_in**-0.5))
        layer.bias = torch.nn.Parameter(self.normal(n_out))
        return layer

    def log_alpha(self, n: int) -> torch.nn.Parameter:
        dtype = torch.float64 if self.exact else torch.float32
        return torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=self.device))


def sorted_units(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, the units with the open ones first, which places those fill, and their number for grouped_mm."""
    z = torch_gate(log_alpha)
    is_open = z.detach() != 0
    order = is_open.logical_not().to(torch.uint8).argsort(stable=True)
    count = is_open.sum(0, keepdim=True).to(torch.int32)
    return z, order, torch.arange(len(z), device=z.device) < count, count


def grouped_linear(layer: torch.nn.Linear, log_alpha: Tensor, x: Tensor) -> Tensor:
    """`masked` for one layer; where() keeps what grouped_mm leaves unwritten out of the gradients."""
    z, order, filled, count = sorted_units(log_alpha)
    zero = x.new_zeros(())
    x = torch.where(filled, (x * z.to(x.dtype)).index_select(1, order), zero)
    weight = torch.where(filled, layer.weight.index_select(1, order), zero)
    return torch._grouped_mm(x, weight.t(), offs=count)[0] + layer.bias


def grouped_ffn(up: torch.nn.Linear, down: torch.nn.Linear, log_alpha: Tensor, x: Tensor) -> Tensor:
    z, order, filled, count = sorted_units(log_alpha)
    zero = x.new_zeros(())
    w_up = torch.where(filled[:, None], up.weight.index_select(0, order), zero)
    a = torch._grouped_mm(x[None], w_up.t(), offs=count)
    h = F.gelu(torch.where(filled, a + up.bias.index_select(0, order), zero))
    h = h * z.index_select(0, order).to(h.dtype)
    w_down = torch.where(filled, down.weight.index_select(1, order), zero)
    return torch._grouped_mm(h, w_down.t(), offs=count)[0] + down.bias


def linear(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """y = (x * z) W^T + b: gates on the inputs, dense x (M, K) requires grad, W (N, K)."""
    M, K, N = shape
    draw = Draw(dtype, device, exact)
    stock, log_alpha = draw.layer(K, N), draw.log_alpha(K)
    weight, bias = stock.weight, stock.bias
    grad = draw.normal(M, N)
    batches = [draw.normal(M, K).requires_grad_() for _ in range(1 if exact else BATCHES)]
    flops = 2.0 * M * K * N
    case = Case("linear", shape, dtype, batches, grad, flops, 3 * flops, float, [[log_alpha]])

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_linear(x, weight, bias)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.l0_linear(x, weight, bias, in_log_alpha=log_alpha)

    case.truths = {
        "dense": stock,
        "masked": partial(masked, [stock], [log_alpha], F.relu),
        "gated": partial(gated, l0.reference),
    }
    case.parameters = parameters = [weight, bias]
    if exact:
        return case
    everything = [*parameters, log_alpha]
    case.providers = {
        "dense": Provider(stock, parameters, "dense"),
        "dense_own": Provider(partial(dense, l0), parameters, "dense", "triton"),
        "masked": Provider(case.truths["masked"], everything, "masked"),
        "masked_compiled": Provider(
            torch.compile(partial(masked, [stock], [log_alpha], F.relu), dynamic=False), everything, None
        ),
        "index_select": Provider(
            partial(index_select, [stock], [log_alpha], F.relu), everything, "masked", syncs=True
        ),
        "grouped_mm": Provider(partial(grouped_linear, stock, log_alpha), everything, "masked"),
        "ours": Provider(partial(gated, l0), everything, "gated", "triton"),
    }
    return case


def ffn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """y = (z * gelu(x W1^T + b1)) W2^T + b2: gates on the hidden units, x (M, D) requires grad, W1 (H, D)."""
    M, D, H = shape
    draw = Draw(dtype, device, exact)
    up, down, log_alpha = draw.layer(D, H), draw.layer(H, D), draw.log_alpha(H)
    weights, biases = [up.weight, down.weight], [up.bias, down.bias]
    grad = draw.normal(M, D)
    batches = [draw.normal(M, D).requires_grad_() for _ in range(1 if exact else BATCHES)]
    flops = 4.0 * M * D * H
    case = Case("ffn", shape, dtype, batches, grad, flops, 3 * flops, float, [[log_alpha]])
    stock = torch.nn.Sequential(up, torch.nn.GELU(), down)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_mlp(x, weights, biases, [None, None], "gelu")

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.l0_mlp(x, weights, biases, [None, log_alpha], "gelu")

    @torch.no_grad()
    def epilogue(x: Tensor) -> Tensor:
        h = torch._addmm_activation(up.bias, x, up.weight.t(), use_gelu=True)
        return F.linear(h, down.weight, down.bias)

    plain = partial(masked, [up, down], [None, log_alpha], F.gelu)
    case.truths = {"dense": stock, "masked": plain, "gated": partial(gated, l0.reference)}
    case.parameters = parameters = [*weights, *biases]
    if exact:
        return case
    everything = [*parameters, log_alpha]
    case.providers = {
        "dense": Provider(stock, parameters, "dense"),
        "dense_compiled": Provider(torch.compile(stock.forward, dynamic=False), parameters, "dense"),
        "dense_epilogue": Provider(epilogue, parameters, "dense", backward=False),
        "dense_own": Provider(partial(dense, l0), parameters, "dense", "triton"),
        "masked": Provider(plain, everything, "masked"),
        "masked_compiled": Provider(torch.compile(plain, dynamic=False), everything, None),
        "index_select": Provider(
            partial(index_select, [up, down], [None, log_alpha], F.gelu), everything, "masked", syncs=True
        ),
        "grouped_mm": Provider(partial(grouped_ffn, up, down, log_alpha), everything, "masked"),
        "ours": Provider(partial(gated, l0), everything, "gated", "triton"),
    }
    return case


def step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """A whole training step of a ReLU net with gates on the inputs of every layer.

    Gated: cross entropy + penalty, backward, fused Adam on everything, clamp. Dense: cross entropy, backward,
    fused Adam. The learning rate is 0, so that the densities hold.
    """
    M, *sizes = shape
    group_sizes, lam = sizes[1:], 0.1 / 60_000
    draw = Draw(dtype, device, exact)
    layers = [draw.layer(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    log_alphas = [draw.log_alpha(n_in) for n_in in sizes[:-1]]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    labels = torch.randint(sizes[-1], (M,), generator=draw.generator, device=device)
    batches = [draw.normal(M, sizes[0]) for _ in range(1 if exact else BATCHES)]
    net = torch.nn.Sequential(*[module for layer in layers for module in (layer, torch.nn.ReLU())][:-1])
    # The first layer needs no gradient of its input: two products there, three in the others.
    forward_flops = [2.0 * M * w.numel() for w in weights]
    products = [flops * (3 if i else 2) for i, flops in enumerate(forward_flops)]

    def open_share(keep: float) -> float:
        shares = [keep * keep] * (len(products) - 1) + [keep]
        return sum(p * share for p, share in zip(products, shares, strict=True)) / sum(products)

    gates = [[log_alpha] for log_alpha in log_alphas]
    case = Case("step", shape, dtype, batches, None, sum(forward_flops), sum(products), open_share, gates)

    def stock(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), labels)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return F.cross_entropy(api.gated_mlp(x, weights, biases, [None] * len(layers)), labels)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        logits = api.l0_mlp(x, weights, biases, log_alphas)
        return F.cross_entropy(logits, labels) + api.l0_penalty(log_alphas, group_sizes, lam=lam)

    def plain(formula: Callable[..., Tensor], x: Tensor) -> Tensor:
        penalty = sum(lam * n * DIST.p_open(a).sum() for a, n in zip(log_alphas, group_sizes, strict=True))
        return F.cross_entropy(formula(layers, log_alphas, F.relu, x), labels) + penalty

    case.truths = {"dense": stock, "masked": partial(plain, masked), "gated": partial(gated, l0.reference)}
    case.parameters = parameters = [*weights, *biases]
    if exact:
        return case

    def finish(parameters: Sequence[Tensor], gates: Sequence[Tensor]) -> Callable[[], None]:
        on_gpu, log_alphas = device.type == "cuda", list(gates)
        adam = torch.optim.Adam([*parameters, *log_alphas], lr=0.0, fused=True, capturable=on_gpu)

        @torch.no_grad()
        def optimise() -> None:
            adam.step()
            if log_alphas:
                torch._foreach_clamp_min_(log_alphas, -ALL_OPEN)
                torch._foreach_clamp_max_(log_alphas, ALL_OPEN)

        return optimise

    everything = [*parameters, *log_alphas]
    model = l0.nn.L0MLP.from_dense(net, lam=lam)
    own_log_alphas = l0.nn.gate_parameters(model)
    own = [layer.weight for layer in model.layers] + [layer.bias for layer in model.layers]

    def with_modules(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels) + l0.nn.penalty(model)

    case.log_alphas = list(zip(log_alphas, own_log_alphas, strict=True))
    case.providers = {
        "dense": Provider(stock, parameters, "dense", finish=finish(parameters, ())),
        "dense_compiled": Provider(
            torch.compile(stock, dynamic=False), parameters, "dense", finish=finish(parameters, ())
        ),
        "dense_own": Provider(
            partial(dense, l0), parameters, "dense", "triton", finish=finish(parameters, ())
        ),
        "masked": Provider(
            case.truths["masked"], everything, "masked", finish=finish(parameters, log_alphas)
        ),
        "masked_compiled": Provider(
            torch.compile(case.truths["masked"], dynamic=False),
            everything,
            None,
            finish=finish(parameters, log_alphas),
        ),
        "index_select": Provider(
            partial(plain, index_select),
            everything,
            "masked",
            finish=finish(parameters, log_alphas),
            syncs=True,
        ),
        "ours": Provider(
            partial(gated, l0), everything, "gated", "triton", finish=finish(parameters, log_alphas)
        ),
        "ours_nn": Provider(
            with_modules, [*own, *own_log_alphas], "gated", "triton", finish=finish(own, own_log_alphas)
        ),
    }
    case.providers["ours_cuda"] = replace(
        case.providers["ours"], backend="cuda", finish=finish(parameters, log_alphas)
    )
    return case


OPS: dict[str, Callable[..., Case]] = {"ffn": ffn, "linear": linear, "step": step}
