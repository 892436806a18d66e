"""The layer of an encoder as BERT has it; `l0kernels.nn.gate_` has gated its heads and feed-forward units."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from ops import LAM, Case, Draw, Forward, Provider, adam, add_modules, torch_gate
from torch import Tensor, nn

import l0kernels as l0

HEAD = 64
"""Features of a head."""


class Encoder(nn.Module):
    """Attention and a feed-forward network, each with a residual and a norm behind it."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, units), nn.Linear(units, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = min(HEAD, width // 2)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head).transpose(1, 2)

    def forward(self, x: Tensor, z: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """z: of heads and units, to multiply by."""
        y = F.scaled_dot_product_attention(
            self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        )
        y = y if z is None else y * z[0].view(-1, 1, 1)
        x = self.norm1(x + self.o(y.transpose(1, 2).flatten(2)))
        y = F.gelu(self.up(x))
        return self.norm2(x + self.down(y if z is None else y * z[1]))


def encoder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, exact: bool = False) -> Case:
    """shape: examples, positions, width and units of the feed-forward network. x requires grad."""
    n, length, width, units = shape
    draw = Draw(dtype, device, exact)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Encoder(width, units)
    net = net.to(device, dtype).to(draw.double_or(dtype))
    log_alphas = [draw.log_alpha(width // net.head), draw.log_alpha(units)]
    grad = draw.normal(n, length, width)

    def masked(x: Tensor) -> Tensor:
        heads, hidden = (torch_gate(log_alpha).to(x.dtype) for log_alpha in log_alphas)
        return net(x, (heads, hidden))

    def gated(x: Tensor) -> Tensor:
        heads, hidden = (gates.z.to(x.dtype) for gates in l0.reference.sample_gates(log_alphas))
        return net(x, (heads, hidden))

    truths: dict[str, Forward] = {"dense": partial(net), "masked": masked, "gated": gated}
    batches = draw.batches(n, length, width, requires_grad=True)
    case = Case(dtype, batches, grad, [*net.parameters()], [[a] for a in log_alphas], truths)
    if not exact:
        dense = [*case.parameters]
        case.providers = {
            "dense": Provider(truths["dense"], dense, "dense", adam(dense, ())),
            "masked": Provider(masked, [*dense, *log_alphas], "masked", adam(dense, log_alphas)),
        }
        model = copy.deepcopy(net)
        l0.nn.gate_(model, batches[0][:1, :2].detach(), lam=LAM)
        add_modules(case, net, model, model)
    return case
