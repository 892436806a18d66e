"""The ops: each builds a Case with the same numbers in every dtype and draws its gates anew in each step.

Providers of every op:
    dense         torch.nn as installed                      -> the stock ratio
    dense_own     the ungated op on the native engine         -> the fair ratio
    masked        weight * z, then the dense product: the original implementation's formula, torch operations
    index_select  open rows and columns selected, then their product: what torch operations and autograd give
    ours_torch    backend "torch", the portable one
    ours          backend "cpp"
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from registry import Case, Provider
from torch import Tensor

import l0kernels as l0

BATCHES = 4
CLAMP = math.log(100.0)
ALL_OPEN = 20.0  # at this log_alpha every draw is z = 1
TRANSIT = 0.05  # share of the gates that training has not settled
DIST = l0.HardConcrete()

Forward = Callable[[Tensor], Tensor]
Parameters = Sequence[Tensor]


def trained_log_alpha(n: int, keep: float, generator: torch.Generator) -> Tensor:
    """log_alpha (n,) fp32 whose mean P(z > 0) is `keep` to within one gate.

    Training drives gates to the clamps: at -log(100) a gate still opens with probability .047, at +log(100)
    with .998. So a share TRANSIT lies uniformly between the clamps, the other gates at either of them, at the
    upper one as many as it takes. keep = 1 is exact: every z is 1.
    """
    if keep == 1.0:
        return torch.full((n,), ALL_OPEN)
    transit = (torch.rand(round(TRANSIT * n), generator=generator) * 2 - 1) * CLAMP
    p_closed, p_open = DIST.p_open(torch.tensor([-CLAMP, CLAMP])).tolist()
    settled = n - transit.numel()
    upper = (keep * n - DIST.p_open(transit).sum().item() - settled * p_closed) / (p_open - p_closed)
    upper = min(max(round(upper), 0), settled)
    log_alpha = torch.cat([transit, torch.full((upper,), CLAMP), torch.full((settled - upper,), -CLAMP)])
    return log_alpha[torch.randperm(n, generator=generator)]


def torch_gate(log_alpha: Tensor) -> Tensor:
    u = torch.rand(log_alpha.shape, device=log_alpha.device).to(log_alpha.dtype).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / DIST.beta)
    return F.hardtanh(s * (DIST.zeta - DIST.gamma) + DIST.gamma, 0.0, 1.0)


Layers = Sequence[torch.nn.Linear]
OptionalGates = Sequence[Tensor | None]


def masked(layers: Layers, log_alphas: OptionalGates, act: Forward, x: Tensor) -> Tensor:
    """Layers with gates on their inputs (None: ungated), `act` between them."""
    for i, (layer, log_alpha) in enumerate(zip(layers, log_alphas, strict=True)):
        weight = layer.weight
        if log_alpha is not None:
            weight = weight * torch_gate(log_alpha).to(weight.dtype)
        x = F.linear(act(x) if i else x, weight, layer.bias)
    return x


def index_select(layers: Layers, log_alphas: OptionalGates, act: Forward, x: Tensor) -> Tensor:
    """`masked` over the open units only: each layer computes what the next one's gates leave open."""
    z = [None if log_alpha is None else torch_gate(log_alpha) for log_alpha in log_alphas]
    units = [None if gate is None else gate.detach().nonzero().squeeze(1) for gate in z]
    if units[0] is not None:
        x = x.index_select(1, units[0])
    for i, layer in enumerate(layers):
        weight: Tensor = layer.weight
        bias: Tensor = layer.bias
        gate, cols = z[i], units[i]
        rows = units[i + 1] if i + 1 < len(layers) else None
        if rows is not None:
            weight, bias = weight.index_select(0, rows), bias.index_select(0, rows)
        if gate is not None and cols is not None:
            weight, x = weight.index_select(1, cols), x * gate.index_select(0, cols).to(x.dtype)
        x = F.linear(x, weight, bias)
        x = act(x) if i + 1 < len(layers) else x
    return x


class Draw:
    """Inputs of one case: fp32 numbers from a fixed seed, held in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def layer(self, n_in: int, n_out: int) -> torch.nn.Linear:
        layer = torch.nn.Linear(n_in, n_out, device="meta")
        layer.weight = torch.nn.Parameter(self.normal(n_out, n_in) * n_in**-0.5)
        layer.bias = torch.nn.Parameter(self.normal(n_out))
        return layer

    def log_alpha(self, n: int, keep: float) -> torch.nn.Parameter:
        return torch.nn.Parameter(trained_log_alpha(n, keep, self.generator).to(self.dtype))


def make_providers(
    stock: Forward,
    dense: Callable[[ModuleType, Tensor], Tensor],
    gated: Callable[[ModuleType, Tensor], Tensor],
    plain: Callable[[Callable[..., Tensor], Tensor], Tensor],
    parameters: Parameters,
    log_alphas: Parameters,
    finish: Callable[[Parameters, Parameters], Callable[[], None]] | None = None,
) -> dict[str, Provider]:
    """The table at the top of this file.

    `dense` and `gated` take a namespace, l0kernels or its reference; `plain` takes masked or index_select.
    """
    everything = [*parameters, *log_alphas]

    def ungated(forward: Forward, backend: str | None = None) -> Provider:
        rest = finish(parameters, ()) if finish else None
        return Provider(forward, parameters, "reference_dense", backend, rest)

    def with_gates(forward: Forward, truth: str, backend: str | None = None) -> Provider:
        rest = finish(parameters, log_alphas) if finish else None
        return Provider(forward, everything, truth, backend, rest)

    return {
        "dense": ungated(stock),
        "dense_own": ungated(partial(dense, l0), "cpp"),
        "masked": with_gates(partial(plain, masked), "masked"),
        "index_select": with_gates(partial(plain, index_select), "masked"),
        "ours_torch": with_gates(partial(gated, l0), "reference", "torch"),
        "ours": with_gates(partial(gated, l0), "reference", "cpp"),
        "reference": Provider(partial(gated, l0.reference), everything, "reference", timed=False),
        "reference_dense": Provider(partial(dense, l0.reference), parameters, "reference_dense", timed=False),
    }


def linear(shape: tuple[int, ...], keep: float, dtype: torch.dtype = torch.float32) -> Case:
    """y = (x * z) W^T + b: gates on the inputs, x (M, K) requires grad, W (N, K)."""
    M, K, N = shape
    draw = Draw(dtype)
    stock, log_alpha = draw.layer(K, N), draw.log_alpha(K, keep)
    weight, bias = stock.weight, stock.bias

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_linear(x, weight, bias)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.l0_linear(x, weight, bias, in_log_alpha=log_alpha)

    def plain(formula: Callable[..., Tensor], x: Tensor) -> Tensor:
        return formula([stock], [log_alpha], F.relu, x)

    batches = [draw.normal(M, K).requires_grad_() for _ in range(BATCHES)]
    providers = make_providers(stock, dense, gated, plain, [weight, bias], [log_alpha])
    flops = 6.0 * M * K * N
    return Case(batches, draw.normal(M, N), keep * flops, flops, providers)


def ffn(shape: tuple[int, ...], keep: float, dtype: torch.dtype = torch.float32) -> Case:
    """y = (z * gelu(x W1^T + b1)) W2^T + b2: gates on the hidden units, x (M, D) requires grad, W1 (H, D)."""
    M, D, H = shape
    draw = Draw(dtype)
    up, down, log_alpha = draw.layer(D, H), draw.layer(H, D), draw.log_alpha(H, keep)
    weights, biases = [up.weight, down.weight], [up.bias, down.bias]

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_mlp(x, weights, biases, [None, None], "gelu")

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_mlp(x, weights, biases, [None, api.sample_gates(log_alpha)], "gelu")

    def plain(formula: Callable[..., Tensor], x: Tensor) -> Tensor:
        return formula([up, down], [None, log_alpha], F.gelu, x)

    stock = torch.nn.Sequential(up, torch.nn.GELU(), down)
    batches = [draw.normal(M, D).requires_grad_() for _ in range(BATCHES)]
    providers = make_providers(stock, dense, gated, plain, [*weights, *biases], [log_alpha])
    flops = 12.0 * M * D * H
    return Case(batches, draw.normal(M, D), keep * flops, flops, providers)


def chain(shape: tuple[int, ...], keep: float, dtype: torch.dtype = torch.float32) -> Case:
    """A whole training step of a ReLU net with gates on the inputs of every layer.

    Gated: cross entropy + penalty, backward, fused Adam on everything, clamp. Dense: cross entropy, backward,
    fused Adam. The learning rate is 0, so that the densities hold. `ours_nn` is written with l0kernels.nn.
    """
    M, *sizes = shape
    group_sizes, lam = sizes[1:], 0.1 / 60_000
    draw = Draw(dtype)
    layers = [draw.layer(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    log_alphas = [draw.log_alpha(n_in, keep) for n_in in sizes[:-1]]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    labels = torch.randint(sizes[-1], (M,), generator=draw.generator)

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

    def finish(parameters: Parameters, log_alphas: Parameters) -> Callable[[], None]:
        adam = torch.optim.Adam([*parameters, *log_alphas], lr=0.0, fused=True)

        def optimise() -> None:
            adam.step()
            with torch.no_grad():
                for log_alpha in log_alphas:
                    log_alpha.clamp_(-ALL_OPEN, ALL_OPEN)

        return optimise

    net = torch.nn.Sequential(*[module for layer in layers for module in (layer, torch.nn.ReLU())][:-1])
    batches = [draw.normal(M, sizes[0]) for _ in range(BATCHES)]
    providers = make_providers(stock, dense, gated, plain, [*weights, *biases], log_alphas, finish)

    model = l0.nn.L0MLP.from_dense(net, lam=lam)
    own_log_alphas = l0.nn.gate_parameters(model)
    own_parameters = [layer.weight for layer in model.layers] + [layer.bias for layer in model.layers]
    with torch.no_grad():
        for own, log_alpha in zip(own_log_alphas, log_alphas, strict=True):
            own.copy_(log_alpha)

    def with_modules(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels) + l0.nn.penalty(model)

    providers["ours_nn"] = Provider(
        with_modules,
        [*own_parameters, *own_log_alphas],
        "reference",
        "cpp",
        finish(own_parameters, own_log_alphas),
    )

    # The first layer needs no gradient of its input: two products there, three in the others.
    products = [2.0 * M * w.numel() * (3 if i else 2) for i, w in enumerate(weights)]
    open_flops = sum(p * (keep * keep if i + 1 < len(layers) else keep) for i, p in enumerate(products))
    return Case(batches, None, open_flops, sum(products), providers)


OPS: dict[str, Callable[..., Case]] = {"linear": linear, "chain": chain, "ffn": ffn}
