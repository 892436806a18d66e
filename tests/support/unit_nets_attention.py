"""Small nets with attention, as torch and as other libraries have it, for tests of gated units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unit_examples import Example, Nets, image, into, rows
from unit_nets_rows import SwiGLU

NETS: Nets = {}
net = into(NETS)


class Attention(nn.Module):
    """A block in front of the head, its stream an embedding with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(7, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.positions[:, : words.shape[1]]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


@net
def attention() -> Example:
    return Attention(), (torch.randint(7, (3, 4)),)


@net
def encoder_layer() -> Example:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)), (rows(2, 4, 3),)


@net
def encoder() -> Example:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), (
        rows(2, 4, 3),
    )


class SeveralAttentions(nn.Module):
    """Keys and values of other widths, masks, keys that are learned, time in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(2, 4)
        self.cross = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, add_bias_kv=True, add_zero_attn=True)
        self.alone = nn.MultiheadAttention(6, 3, bias=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, y = self.first(x), torch.relu(self.second(other))  # (time, examples, features)
        padding = torch.arange(len(y)) >= torch.tensor([[len(y)], [len(y) - 1]])
        x = x + self.cross(x, y, y, key_padding_mask=padding, need_weights=False)[0]
        later = torch.arange(len(x))[:, None] < torch.arange(len(x))
        z = self.alone(x, x, x, attn_mask=later, need_weights=False, is_causal=True)[0]
        each = torch.linspace(-1, 1, 6 * len(x) ** 2, dtype=x.dtype).view(6, len(x), len(x))
        return self.last(z + self.alone(x[:, :], z, z, attn_mask=each, need_weights=False)[0])


@net
def several_attentions() -> Example:
    return SeveralAttentions(), (rows(5, 2, 3), rows(4, 2, 2))


class HandAttention(nn.Module):
    """Heads by views, as in most transformers; the stream has RMSNorm, the values gates of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(n, length, width))


@net
def hand_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), HandAttention(8, 2), SwiGLU(8, 6), nn.Linear(8, 2)), (
        rows(2, 4, 3),
    )


class OwnRMSNorm(nn.Module):
    """As LLaMA has it: a forward of its own."""

    offset = 0.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * x.to(kind)


class OffsetRMSNorm(OwnRMSNorm):
    """As Gemma has it."""

    offset = 1.0


def turned(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


class GroupedQueries(nn.Module):
    """Rotary positions, normalised heads, keys and values that several queries share; pre-norm."""

    def __init__(self, width: int, heads: int, shared: int, each: int, enable_gqa: bool = False) -> None:
        super().__init__()
        self.sizes, self.enable_gqa = (heads, shared, each), enable_gqa
        self.norm, self.of_q, self.of_k = OwnRMSNorm(width), OwnRMSNorm(each), OwnRMSNorm(each)
        self.q, self.k, self.v = (nn.Linear(width, n * each) for n in (heads, shared, shared))
        self.o = nn.Linear(heads * each, width, bias=False)
        self.register_buffer("speeds", 0.3 ** torch.arange(each // 2))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        (heads, shared, each), y = self.sizes, self.norm(x)
        q, k, v = (f(y).view(n, length, -1, each) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.of_q(q), self.of_k(k), v))
        times = torch.arange(length, dtype=x.dtype)[None, :, None]
        angles = (self.speeds[None, :, None] @ times.transpose(1, 2)).transpose(1, 2)
        angles = torch.cat((angles, angles), -1)[:, None]
        q, k = (t * angles.cos() + turned(t) * angles.sin() for t in (q, k))
        if not self.enable_gqa:
            k, v = (
                t[:, :, None].expand(n, t.shape[1], heads // shared, length, each).flatten(1, 2)
                for t in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.enable_gqa)
        return x + self.o(y.transpose(1, 2).contiguous().view(n, length, -1))


@net
def grouped_queries() -> Example:
    return nn.Sequential(nn.Linear(3, 8), GroupedQueries(8, 4, 2, 6), SwiGLU(8, 6), nn.Linear(8, 2)), (
        rows(2, 5, 3),
    )


@net
def enabled_gqa() -> Example:
    return nn.Sequential(nn.Linear(3, 8), GroupedQueries(8, 6, 2, 4, True), nn.Linear(8, 2)), (rows(2, 5, 3),)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it, its weight (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.nf, self.nx = n_out, n_in
        self.weight, self.bias = (
            nn.Parameter(torch.randn(n_in, n_out) / n_in),
            nn.Parameter(torch.randn(n_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        sizes = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(sizes)


class Fused(nn.Module):
    """Queries, keys and values from one layer, the product of attention by hand, a bias by head that is
    learned, and a layer that attends to what it is given beside x."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.heads, self.each = heads, each
        self.qkv, self.o = Conv1D(3 * heads * each, width), Conv1D(width, heads * each)
        self.places = nn.Embedding(9, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, heads * each), nn.Linear(width, 2 * heads * each)
        self.back = nn.Linear(heads * each, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.each).permute(0, 2, 1, 3)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.each**0.5
        scores = scores if bias is None else scores + bias
        y = torch.matmul(F.dropout(scores.softmax(-1), 0.0), v)
        return y.permute(0, 2, 1, 3).flatten(2)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.qkv(self.norm1(x))
        q, k, v = map(self.split, y.split(y.shape[-1] // 3, -1))
        length = x.shape[1]
        apart = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-4, 4) + 4
        x = x + self.o(self.attended(q, k, v, self.places(apart).permute(2, 0, 1)[None]))
        k, v = map(self.split, self.kv(other).chunk(2, -1))
        return x + self.back(self.attended(self.split(self.q(self.norm2(x))), k, v))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fused, self.last = (
            nn.Linear(3, 8),
            nn.Linear(2, 8),
            Fused(8, 3, 4),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last(self.fused(self.first(x), torch.relu(self.second(other))))


@net
def fused_attention() -> Example:
    return TwoStreams(), (rows(2, 5, 3), rows(2, 4, 2))


class TimmAttention(nn.Module):
    """Queries, keys and values side by side in one layer's outputs, as timm has them."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.num_heads, self.each, self.attn_dim = heads, each, heads * each
        self.qkv, self.proj = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.each).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q * 0.7, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, length, self.attn_dim))


@net
def timm_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), TimmAttention(8, 3, 4), nn.GELU(), nn.Linear(8, 2)), (
        rows(2, 5, 3),
    )


class AddedProducts(nn.Module):
    """Scores by torch.baddbmm, examples and heads in one dimension, as diffusers and Bloom have them."""

    def __init__(self, width: int, heads: int, of_nothing: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.of_nothing = heads, width // heads, of_nothing
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, self.num_heads, 3, self.head_dim)
        q, k, v = (qkv[..., i, :].transpose(1, 2).reshape(-1, length, self.head_dim) for i in range(3))
        if self.of_nothing:
            scores = torch.baddbmm(x.new_empty(1, length, length), q, k.transpose(1, 2), beta=0, alpha=0.5)
        else:
            mask = torch.linspace(-1, 1, length, dtype=x.dtype).expand(1, length, length)
            scores = mask.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=2.0, alpha=0.5)
        y = torch.bmm(scores.softmax(-1), v).view(n, self.num_heads, length, self.head_dim)
        return x + self.o(y.transpose(1, 2).flatten(2))


@net
def added_products() -> Example:
    body = [nn.Linear(3, 8), AddedProducts(8, 2, True), AddedProducts(8, 4, False), nn.Linear(8, 2)]
    return nn.Sequential(*body), (rows(2, 5, 3),)


class CosineAttention(nn.Module):
    """Queries and keys of length 1, as in Swin V2, a factor for each head that is learned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.scale = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)
        return x + self.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


@net
def cosine_attention() -> Example:
    return nn.Sequential(nn.Linear(3, 8), CosineAttention(8, 2), nn.Linear(8, 2)), (rows(2, 5, 3),)


def windowed(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], bias: Tensor, heads: int, scale: Tensor | None
) -> Tensor:
    """The attention of Swin, in shifted windows of two by two: a function that is given weights of layers."""
    n, height, width, c = x.shape
    x = torch.roll(F.pad(x, (0, 0, 0, width % 2, 0, height % 2)), shifts=(-1, -1), dims=(1, 2))
    high, wide = x.shape[1] // 2, x.shape[2] // 2
    x = x.view(n, high, 2, wide, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n * high * wide, 4, c)
    of_qkv, of_proj = biases
    if scale is not None:
        of_qkv = of_qkv.clone()
        of_qkv[len(of_qkv) // 3 : 2 * len(of_qkv) // 3].zero_()
    qkv = F.linear(x, weights[0], of_qkv)
    qkv = qkv.reshape(len(x), 4, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    if scale is None:
        scores = (q * (c // heads) ** -0.5).matmul(k.transpose(-2, -1))
    else:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(scale, max=1.5).exp()
    mask = x.new_zeros((high * wide, 1, 4, 4))
    mask[-1, 0, :2, 2:] = -2.0
    scores = (scores + bias).view(n, high * wide, heads, 4, 4) + mask
    attended = F.dropout(F.softmax(scores.view(-1, heads, 4, 4), dim=-1), 0.0, True)
    y = F.linear(attended.matmul(v).transpose(1, 2).reshape(len(x), 4, c), weights[1], of_proj)
    y = y.view(n, high, wide, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * high, 2 * wide, c)
    return torch.roll(y, shifts=(1, 1), dims=(1, 2))[:, :height, :width, :].contiguous()


class Windows(nn.Module):
    """Hands its layers' weights over; `cosine`: as in Swin V2, else V1."""

    def __init__(self, width: int, heads: int, cosine: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.scale = nn.Parameter(torch.rand(heads, 1, 1)) if cosine else None
        self.table = None if cosine else nn.Parameter(torch.randn(9, heads))
        places = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, heads, bias=False))
        self.places = places if cosine else None
        self.register_buffer("coordinates", torch.randn(1, 3, 3, 2))
        self.register_buffer("index", torch.randint(9, (16,)))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table if self.places is None else self.places(self.coordinates).view(-1, self.num_heads)
        bias = table[self.index].view(4, 4, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        bias = bias if self.places is None else 16 * torch.sigmoid(bias)
        weights, biases = [self.qkv.weight, self.proj.weight], [self.qkv.bias, self.proj.bias]
        return x + windowed(self.norm(x), weights, biases, bias, self.num_heads, self.scale)


class Merges(nn.Module):
    """Patches of two by two, side by side, as between the stages of Swin."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2, :] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


def swin_of(cosine: bool) -> Example:
    body = [nn.Linear(3, 8), Windows(8, 2, cosine), Merges(8, 12), Windows(12, 3, cosine), nn.Linear(12, 2)]
    return nn.Sequential(*body), (rows(2, 4, 6, 3),)


@net
def swin() -> Example:
    return swin_of(False)


@net
def swin_v2() -> Example:
    return swin_of(True)


class Patches(nn.Module):
    """As a vision transformer: patches behind a token that is learned, with places; its own head last."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block, self.norm, self.head = HandAttention(8, 2), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.places
        return self.head(self.norm(self.block(x))[:, 0])


@net
def patches() -> Example:
    return Patches(), (image(),)


class RotatedPairs(nn.Module):
    """Pairs of features are turned by parts of buffers; keys and values of before come from a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.o = nn.Linear(3, 8), nn.Linear(8, 24, bias=False), nn.Linear(8, 2)
        angles = torch.outer(torch.arange(9.0), 0.5 ** torch.arange(2.0))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        cache, start, outs = [], 0, []
        for part in self.embed(x).split(3, 1):
            n, length, _ = part.shape
            q, k, v = self.qkv(part).view(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            cos, sin = (t[start : start + length] for t in (self.cos, self.sin))
            q, k = (self.turn(t, cos, sin) for t in (q, k))
            if cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
            cache, start = [k, v], start + length
            y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
            outs.append(self.o(y.transpose(1, 2).flatten(2)))
        return torch.cat(outs, 1)

    def turn(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = t[..., ::2], t[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@net
def rotated_pairs() -> Example:
    return RotatedPairs(), (rows(2, 6, 3),)


class Distances(nn.Module):
    """As LeViT: a table of biases by head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.o = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 2)
        self.table = nn.Parameter(torch.randn(2, 5))
        self.register_buffer("index", (torch.arange(5)[:, None] - torch.arange(5)).abs(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x)).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 2 + self.table[:, self.index]).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@net
def distances() -> Example:
    return Distances(), (rows(2, 5, 3),)
