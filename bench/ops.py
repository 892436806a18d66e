"""The ops: each builds a Case, inputs and the providers of registry.PROVIDERS; gates are drawn in each call.

One case serves every density: `set_keep` writes log_alpha in place, so compiled code and CUDA graphs stay.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from registry import Keep
from torch import Tensor

import l0kernels as l0
from l0kernels import _registry

BATCHES = 3
CLAMP = math.log(100.0)
ALL_OPEN = 20.0  # at this log_alpha every draw is z = 1, at its negative z = 0
TRANSIT = 0.05  # share of the gates that training has not settled
LAM = 0.1 / 60_000
DIST = l0.HardConcrete()

Forward = Callable[[Tensor], Tensor]
Tensors = Sequence[Tensor]


def trained_log_alpha(n: int, keep: float, generator: torch.Generator) -> Tensor:
    """log_alpha (n,) fp32 whose mean P(z > 0) is `keep` to within one gate; keep 0 and 1 are exact.

    Training drives gates to the clamps: at -log(100) a gate still opens with probability .047, at +log(100)
    with .998. So a share TRANSIT lies uniformly between the clamps (less where keep leaves no room for it),
    the other gates at either of them, at the upper one as many as it takes.
    """
    if keep in (0.0, 1.0):
        return torch.full((n,), ALL_OPEN if keep else -ALL_OPEN)
    p_closed, p_open = DIST.p_open(torch.tensor([-CLAMP, CLAMP])).tolist()
    share = min(TRANSIT, max(0.0, min(keep - p_closed, p_open - keep)))
    transit = (torch.rand(round(share * n), generator=generator) * 2 - 1) * CLAMP
    settled = n - transit.numel()
    upper = (keep * n - DIST.p_open(transit).sum().item() - settled * p_closed) / (p_open - p_closed)
    upper = min(max(round(upper), 0), settled)
    log_alpha = torch.cat([transit, torch.full((upper,), CLAMP), torch.full((settled - upper,), -CLAMP)])
    return log_alpha[torch.randperm(n, generator=generator)]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case; `finish` is the rest of a training step (optimiser, clamp)."""

    forward: Forward
    leaves: Tensors
    truth: str  # the formula in fp64 that it must agree with
    finish: Callable[[], None]
    backend: str = "reference"
    syncs: bool = False  # the host waits within the step: no CUDA graph can hold it
    backward: bool = True
    own_noise: bool = False  # draws other gates than the formula does: compared where they do not matter


@dataclass
class Case:
    """An op at one shape: inputs, providers, formulas, and the gates that the densities are set on."""

    dtype: torch.dtype
    batches: Tensors  # rotated
    grad: Tensor | None  # what backward starts from; None where the output is a loss
    parameters: Tensors
    log_alphas: Sequence[Tensors]  # of each gate vector the copies that providers own
    truths: dict[str, Forward]
    providers: dict[str, Provider] = field(default_factory=dict)
    kinks: int = 0  # units of a layer whose derivative jumps: ReLU, maxima
    kinked: float = 1e-2  # relative error of gradients that many of them make

    @property
    def device(self) -> torch.device:
        return self.batches[0].device

    def leaves(self, truth: str) -> list[Tensor]:
        """What the formula `truth` has gradients of, besides x."""
        return [*self.parameters, *(() if truth == "dense" else (gates[0] for gates in self.log_alphas))]

    def set_keep(self, keep: Keep) -> None:
        generator = torch.Generator().manual_seed(1)
        keeps = keep if isinstance(keep, tuple) else [keep] * len(self.log_alphas)
        with torch.no_grad():
            for copies, share in zip(self.log_alphas, keeps, strict=True):
                n = copies[0].numel()
                value = trained_log_alpha(n, share / n if isinstance(keep, tuple) else share, generator)
                for log_alpha in copies:
                    log_alpha.copy_(value)

    def add_dense(self, name: str, forward: Forward, leaves: Tensors) -> None:
        """One more ungated provider, right after the first."""
        first, *rest = self.providers.items()
        added = replace(first[1], forward=forward, leaves=leaves, finish=adam(leaves, ()))
        self.providers = dict([first, (name, added), *rest])

    def batch(self, i: int) -> Tensor:
        return self.batches[i % len(self.batches)]

    def release(self, provider: Provider) -> None:
        for x in self.batches:
            x.grad = None
        for leaf in provider.leaves:
            leaf.grad = None

    def steps(
        self, provider: Provider, name: str
    ) -> tuple[Callable[[int], object], Callable[[int], object] | None]:
        """What is timed of pass `name` on batch i, and what comes untimed before it."""

        def forward(i: int) -> Tensor:
            return provider.forward(self.batch(i))

        def both(i: int) -> None:
            forward(i).backward(self.grad)
            self.release(provider)

        def whole(i: int) -> None:
            forward(i).backward(self.grad)
            provider.finish()
            self.release(provider)

        outputs: list[Tensor] = []

        def keep_output(i: int) -> None:
            outputs.append(forward(i))

        def backward(i: int) -> None:
            outputs.pop().backward(self.grad)
            self.release(provider)

        if name == "bwd":
            return backward, keep_output
        return {"fwd": forward, "fwd+bwd": both, "step": whole}[name], None

    def values(self, forward: Forward, leaves: Tensors, backward: bool, seed: int) -> list[Tensor]:
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

    def double_or(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if self.exact else dtype

    def layer(self, n_in: int, n_out: int) -> torch.nn.Linear:
        layer = torch.nn.Linear(n_in, n_out, device="meta")
        layer.weight = torch.nn.Parameter(self.normal(n_out, n_in, scale=n_in**-0.5))
        layer.bias = torch.nn.Parameter(self.normal(n_out))
        return layer

    def log_alpha(self, n: int) -> torch.nn.Parameter:
        dtype = torch.float64 if self.exact else torch.float32
        return torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=self.device))

    def batches(self, *shape: int, requires_grad: bool) -> list[Tensor]:
        count = 1 if self.exact else BATCHES
        return [self.normal(*shape).requires_grad_(requires_grad) for _ in range(count)]

    def labels(self, n: int, classes: int) -> Tensor:
        return torch.randint(classes, (n,), generator=self.generator, device=self.device)


# ---- the formulas of others


def torch_gate(log_alpha: Tensor) -> Tensor:
    u = torch.rand(log_alpha.shape, device=log_alpha.device).to(log_alpha.dtype).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / DIST.beta)
    return F.hardtanh(s * (DIST.zeta - DIST.gamma) + DIST.gamma, 0.0, 1.0)


Layers = Sequence[torch.nn.Linear]
OptionalGates = Sequence[Tensor | None]


def swiglu(a: Tensor) -> Tensor:
    gate, up = a.tensor_split(2, -1)
    return F.silu(gate) * up


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
            if act is swiglu:
                rows = torch.cat([rows, rows + len(weight) // 2])
            weight, bias = weight.index_select(0, rows), bias.index_select(0, rows)
        if gate is not None and cols is not None:
            weight, x = weight.index_select(1, cols), x * gate.index_select(0, cols).to(x.dtype)
        x = F.linear(x, weight, bias)
        x = act(x) if i + 1 < len(layers) else x
    return x


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


def grouped_ffn(layers: Layers, log_alphas: OptionalGates, act: Forward, x: Tensor) -> Tensor:
    up, down = layers
    log_alpha = log_alphas[1]
    assert log_alpha is not None
    z, order, filled, count = sorted_units(log_alpha)
    zero = x.new_zeros(())
    halves = 2 if act is swiglu else 1
    products = []
    for weight, bias in zip(up.weight.tensor_split(halves), up.bias.tensor_split(halves), strict=True):
        packed = torch.where(filled[:, None], weight.index_select(0, order), zero)
        product = torch._grouped_mm(x[None], packed.t(), offs=count)
        products.append(torch.where(filled, product + bias.index_select(0, order), zero))
    h = act(torch.cat(products, -1)) * z.index_select(0, order).to(x.dtype)
    w_down = torch.where(filled, down.weight.index_select(1, order), zero)
    return torch._grouped_mm(h, w_down.t(), offs=count)[0] + down.bias


# ---- providers

LARGEST_OF_CUDA = 4096
"""Units of a layer, above which the CUDA kernels refuse a product: such are Triton's."""


def engines(device: torch.device, primitive: str) -> list[str]:
    """Our backends for tensors on a device; the first one that is there computes `dense_own`."""
    names = ("triton", "cuda", "torch") if device.type == "cuda" else ("cpp", "torch")
    return [name for name in names if not usable_backend(name) or primitive in _registry.implements(name)]


def adam(parameters: Tensors, log_alphas: Tensors) -> Callable[[], None]:
    """Fused Adam over everything and the clamp of the gates. The learning rate is 0: the densities hold."""
    made: list[torch.optim.Adam] = []
    gates = list(log_alphas)

    @torch.no_grad()
    def finish() -> None:
        if not made:
            leaves = [*parameters, *gates]
            made.append(torch.optim.Adam(leaves, lr=0.0, fused=True, capturable=leaves[0].is_cuda))
        made[0].step()
        if gates:
            torch._foreach_clamp_min_(gates, -ALL_OPEN)
            torch._foreach_clamp_max_(gates, ALL_OPEN)

    return finish


def add_providers(
    case: Case,
    dense: Callable[[ModuleType, Tensor], Tensor],
    gated: Callable[[ModuleType, Tensor], Tensor] | None,
    others: dict[str, Forward],
    primitive: str = "gated_mlp",
) -> None:
    """registry.PROVIDERS; `dense` and `gated` take a namespace, l0kernels or its reference.

    Our backends compute `gated`; without it add_modules has them run a net.
    """
    parameters, log_alphas = case.parameters, [copies[0] for copies in case.log_alphas]
    stock, plain = case.truths["dense"], case.truths["masked"]
    on_gpu = case.device.type == "cuda"
    ungated = Provider(stock, parameters, "dense", adam(parameters, ()))
    with_gates = Provider(plain, [*parameters, *log_alphas], "masked", adam(parameters, log_alphas))
    backends = engines(case.device, primitive)
    if max(p.shape[0] for p in parameters) > LARGEST_OF_CUDA:
        backends = [name for name in backends if name != "cuda"]
    own = next((name for name in backends if usable_backend(name)), "torch")
    providers = {"dense": ungated}
    if on_gpu:
        compiled = torch.compile(stock, dynamic=False)
        providers["dense_compiled"] = replace(ungated, forward=compiled)
    if "dense_epilogue" in others:
        providers["dense_epilogue"] = replace(ungated, forward=others.pop("dense_epilogue"), backward=False)
    providers["dense_own"] = replace(ungated, forward=partial(dense, l0), backend=own)
    providers["masked"] = with_gates
    compiled = torch.compile(plain, dynamic=False)
    providers["masked_compiled"] = replace(with_gates, forward=compiled, own_noise=True)
    for name, forward in others.items():
        providers[name] = replace(with_gates, forward=forward, syncs=name == "index_select")
    if gated is not None:
        ours = replace(with_gates, forward=partial(gated, l0), truth="gated")
        for name in backends:
            providers[name] = replace(ours, backend=name, syncs=name == "torch")
    case.providers = providers


def usable_backend(name: str) -> bool:
    return _registry.why_not(name) is None


# ---- the ops


def linear(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """y = (x * z) W^T + b: gates on the inputs, dense x (M, K) requires grad, W (N, K)."""
    M, K, N = shape
    draw = Draw(dtype, device, exact)
    stock, log_alpha = draw.layer(K, N), draw.log_alpha(K)
    weight, bias = stock.weight, stock.bias
    grad = draw.normal(M, N)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_linear(x, weight, bias)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.l0_linear(x, weight, bias, in_log_alpha=log_alpha)

    formula = [stock], [log_alpha], F.relu
    truths: dict[str, Forward] = {
        "dense": stock,
        "masked": partial(masked, *formula),
        "gated": partial(gated, l0.reference),
    }
    case = Case(dtype, draw.batches(M, K, requires_grad=True), grad, [weight, bias], [[log_alpha]], truths)
    if not exact:
        others: dict[str, Forward] = {"index_select": partial(index_select, *formula)}
        if device.type == "cuda":
            others["grouped_mm"] = partial(grouped_linear, stock, log_alpha)
        add_providers(case, dense, gated, others)
    return case


def feed_forward(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False
) -> Case:
    """y = (z * act(x W1^T + b1)) W2^T + b2: gates on the hidden units, x (M, D) requires grad, W1 (H, D).

    With "swiglu" W1 is (2 H, D) and the hidden units are silu of the first half times the second.
    """
    M, D, H = shape
    draw = Draw(dtype, device, exact)
    act = swiglu if activation == "swiglu" else F.gelu
    up, down = draw.layer(D, 2 * H if act is swiglu else H), draw.layer(H, D)
    log_alpha = draw.log_alpha(H)
    weights, biases = [up.weight, down.weight], [up.bias, down.bias]
    grad = draw.normal(M, D)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return api.gated_mlp(x, weights, biases, [None, None], activation)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        return api.l0_mlp(x, weights, biases, [None, log_alpha], activation)

    def stock(x: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, *first)), *second)

    first, second = (up.weight, up.bias), (down.weight, down.bias)

    @torch.no_grad()
    def epilogue(x: Tensor) -> Tensor:
        h = torch._addmm_activation(up.bias, x, up.weight.t(), use_gelu=True)
        return F.linear(h, down.weight, down.bias)

    formula = [up, down], [None, log_alpha], act
    truths: dict[str, Forward] = {
        "dense": stock,
        "masked": partial(masked, *formula),
        "gated": partial(gated, l0.reference),
    }
    parameters = [*weights, *biases]
    case = Case(dtype, draw.batches(M, D, requires_grad=True), grad, parameters, [[log_alpha]], truths)
    if not exact:
        others: dict[str, Forward] = {"index_select": partial(index_select, *formula)}
        if device.type == "cuda":
            others["grouped_mm"] = partial(grouped_ffn, *formula)
            if act is F.gelu:
                others["dense_epilogue"] = epilogue
        add_providers(case, dense, gated, others)
    return case


def chain(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """A ReLU net with gates on the inputs of every layer, cross entropy and, gated, the penalty."""
    M, *sizes = shape
    group_sizes = sizes[1:]
    draw = Draw(dtype, device, exact)
    layers = [draw.layer(n_in, n_out) for n_in, n_out in pairwise(sizes)]
    log_alphas = [draw.log_alpha(n_in) for n_in in sizes[:-1]]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    labels = draw.labels(M, sizes[-1])
    net = torch.nn.Sequential(*[module for layer in layers for module in (layer, torch.nn.ReLU())][:-1])

    def stock(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), labels)

    def dense(api: ModuleType, x: Tensor) -> Tensor:
        return F.cross_entropy(api.gated_mlp(x, weights, biases, [None] * len(layers)), labels)

    def gated(api: ModuleType, x: Tensor) -> Tensor:
        logits = api.l0_mlp(x, weights, biases, log_alphas)
        return F.cross_entropy(logits, labels) + api.l0_penalty(log_alphas, group_sizes, lam=LAM)

    def plain(formula: Callable[..., Tensor], x: Tensor) -> Tensor:
        loss = F.cross_entropy(formula(layers, log_alphas, F.relu, x), labels)
        return loss + open_parameters(log_alphas, group_sizes)

    truths: dict[str, Forward] = {
        "dense": stock,
        "masked": partial(plain, masked),
        "gated": partial(gated, l0.reference),
    }
    batches = draw.batches(M, sizes[0], requires_grad=False)
    case = Case(dtype, batches, None, [*weights, *biases], [[a] for a in log_alphas], truths)
    if not exact:
        add_providers(case, dense, gated, {"index_select": partial(plain, index_select)})
        model = l0.nn.L0MLP.from_dense(net, lam=LAM)

        def with_modules(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), labels) + l0.nn.penalty(model)

        add_modules(case, net, model, with_modules)
    return case


def open_parameters(log_alphas: Tensors, group_sizes: Iterable[int]) -> Tensor:
    """LAM times the expected number of open parameters, in torch operations."""
    terms = [n * DIST.p_open(a).sum() for a, n in zip(log_alphas, group_sizes, strict=True)]
    return LAM * torch.stack(terms).sum()


def add_modules(
    case: Case, net: torch.nn.Module, model: torch.nn.Module, forward: Forward, primitive: str = ""
) -> None:
    """Provider "nn": the gated `model` made from `net`, with parameters of its own in the same order.

    With a primitive, and on a GPU beside it, every backend that has it runs the model.
    """
    own_log_alphas = list(l0.nn.gate_parameters(model))
    own = list(l0.nn.weight_parameters(model))
    where = {id(p): i for i, p in enumerate(net.parameters())}
    own = [own[where[id(p)]] for p in case.parameters]
    case.log_alphas = [[*copies, mine] for copies, mine in zip(case.log_alphas, own_log_alphas, strict=True)]
    finish = adam(own, own_log_alphas)
    ours = Provider(forward, [*own, *own_log_alphas], "gated", finish, backend="default")
    for name in engines(case.device, primitive) if primitive else ():
        case.providers[name] = replace(ours, backend=name, syncs=name == "torch")
    if not primitive or case.device.type == "cuda":
        case.providers["nn"] = ours


OPS: dict[str, Callable[..., Case]] = {
    "linear": linear,
    "ffn": partial(feed_forward, "gelu"),
    "swiglu": partial(feed_forward, "swiglu"),
    "chain": chain,
}
"""Those of convolutions stand in conv_ops.py, of whole nets in net_ops.py."""
