"""Blocks of attention of every shape that people write, at random: parts of the nets of fuzz_units."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unit_nets_attention import Conv1D, OffsetRMSNorm, OwnRMSNorm, turned

CHOICES: dict[str, list[Any]] = {
    "joined": ["three", "three", "split", "chunk", "slices", "timm", "Conv1D", "cross", "cross joined"],
    "product": ["sdpa", "sdpa causal", "sdpa mask", "hand", "hand causal", "hand mask", "baddbmm", "einsum"],
    "norms": [None, None, "own", "offset", "RMSNorm", "LayerNorm", "normalize", "all heads"],
    "shared": ["no", "no", "expand", "enable_gqa", "repeat_interleave"],
    "extra": [None, None, None, "bias by head", "scale by head", "gated", "gate by head", "norm behind"],
    "rotary": [False, False, True],
    "prenorm": [None, "LayerNorm", "RMSNorm", "own", "offset"],
    "residual": [True, True, True, False],
}


def norm_of(kind: str, n: int) -> nn.Module:
    """A norm over n features."""
    kinds: dict[str, Any] = {
        "own": OwnRMSNorm,
        "offset": OffsetRMSNorm,
        "RMSNorm": nn.RMSNorm,
        "LayerNorm": nn.LayerNorm,
    }
    return kinds[kind](n)


class Heads(nn.Module):
    """Attention by views, of x (N, L, width) to itself, or to `other` (N, S, other_width)."""

    def __init__(self, rng: random.Random, width: int, other_width: int | None) -> None:
        super().__init__()
        self.what = {name: rng.choice(choices) for name, choices in CHOICES.items()}
        what = self.what
        if other_width is None and what["joined"].startswith("cross"):
            what["joined"] = "three"
        apart = what["joined"] in ("three", "cross", "cross joined")
        shared = rng.choice([1, 2, 2]) if apart and what["shared"] != "no" else None
        self.num_heads = rng.choice([2, 3, 4]) if shared is None else shared * rng.choice([2, 3])
        self.kv_heads, self.each = shared or self.num_heads, rng.choice([2, 4])
        own, other = self.num_heads * self.each, self.kv_heads * self.each
        self.inner_dim, self.lends = own, own % 3 != 0
        self.prenorm = norm_of(what["prenorm"], width) if what["prenorm"] else nn.Identity()
        bias = rng.random() < 0.6
        source = width if what["joined"] == "three" else other_width
        if apart:
            self.q = nn.Linear(width, own, bias)
            if what["joined"] == "cross joined":
                self.kv = nn.Linear(source, 2 * other, bias)
            else:
                self.k, self.v = (nn.Linear(source, other, bias) for _ in range(2))
        else:
            joined = what["joined"] == "Conv1D"
            self.qkv = Conv1D(3 * own, width) if joined else nn.Linear(width, 3 * own, bias)
        out = width if what["residual"] else rng.choice([4, 6])
        self.o = Conv1D(out, own) if what["joined"] == "Conv1D" else nn.Linear(own, out, rng.random() < 0.6)
        norms = what["norms"]
        if norms in ("own", "offset", "RMSNorm", "LayerNorm"):
            self.of_q, self.of_k = norm_of(norms, self.each), norm_of(norms, self.each)
        elif norms == "all heads":
            self.of_q, self.of_k = nn.RMSNorm(own), nn.RMSNorm(other)
        extra = what["extra"]
        if extra == "bias by head":
            self.places = nn.Embedding(9, self.num_heads)
        elif extra == "scale by head":
            self.scale = nn.Parameter(torch.rand(self.num_heads, 1, 1) + 0.5)
        elif extra == "gated":
            self.gate = nn.Linear(width, own)
        elif extra == "gate by head":
            self.gate = nn.Linear(width, self.num_heads)
        elif extra == "norm behind":
            self.behind = nn.LayerNorm(own)

    def heads(self, x: Tensor) -> Tensor:
        """(N, L, heads * each) -> (N, heads, L, each)."""
        return x.view(*x.shape[:2], -1, self.each).transpose(1, 2)

    def call(self, layer: Any, x: Tensor) -> Tensor:
        """A layer, or a function of its weight."""
        return F.linear(x, layer.weight, layer.bias) if self.lends and type(layer) is nn.Linear else layer(x)

    def project(self, x: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
        """q, k, v, each (N, heads, L, each)."""
        joined, n = self.what["joined"], self.inner_dim
        if joined in ("three", "cross", "cross joined"):
            source = x if joined == "three" or other is None else other
            k, v = (
                self.call(self.kv, source).chunk(2, -1)
                if joined == "cross joined"
                else (self.call(self.k, source), self.v(source))
            )
            q = self.call(self.q, x)
        elif joined == "timm":
            qkv = (
                self.call(self.qkv, x)
                .reshape(*x.shape[:2], 3, self.num_heads, self.each)
                .permute(2, 0, 3, 1, 4)
            )
            return qkv.unbind(0)
        else:
            qkv = self.call(self.qkv, x)
            if joined == "chunk":
                q, k, v = qkv.chunk(3, dim=-1)
            elif joined == "slices":
                q, k, v = qkv[..., :n], qkv[..., n : 2 * n], qkv[..., 2 * n :]
            else:
                q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
        if self.what["norms"] == "all heads":
            q, k = self.of_q(q), self.of_k(k)
        return self.heads(q), self.heads(k), self.heads(v)

    def product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, heads, L, each)."""
        kind, (length, size) = self.what["product"], (q.shape[-2], k.shape[-2])
        mask = torch.arange(length)[:, None] >= torch.arange(size)
        if kind.endswith("mask"):
            mask = (torch.arange(length)[:, None] + 2 * torch.arange(size)) % 3 < 2
        bias = None
        if self.what["extra"] == "bias by head":
            apart = (torch.arange(length)[:, None] - torch.arange(size)).clamp(-4, 4) + 4
            bias = self.places(apart).permute(2, 0, 1)
        plain = kind in ("sdpa", "hand", "baddbmm", "einsum")
        if self.what["extra"] == "scale by head":
            q = q * self.scale
        if kind.startswith("sdpa"):
            gqa = k.shape[1] != q.shape[1]
            if bias is not None:
                bias = bias.expand(len(q), -1, -1, -1)
                bias = bias if plain else bias.masked_fill(~mask, -torch.inf)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
            if kind == "sdpa causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            return F.scaled_dot_product_attention(q, k, v, None if plain else mask, enable_gqa=gqa)
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        if kind == "baddbmm":
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)) * self.each**-0.5
            scores = scores if bias is None else scores + bias.repeat(len(scores) // len(bias), 1, 1)
            return torch.bmm(scores.softmax(-1), v).view(-1, self.num_heads, length, self.each)
        if kind == "einsum":
            scores = torch.einsum("nlhd, nshd -> nhls", q.transpose(1, 2), k.transpose(1, 2))
            scores = scores if bias is None else scores + bias
            return torch.einsum("...ls,...sd->...ld", scores.softmax(-1), v)
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.each**0.5
        scores = scores if bias is None else scores + bias
        scores = scores if plain else scores.masked_fill(~mask, torch.finfo(q.dtype).min)
        return F.dropout(scores.softmax(-1), 0.0) @ v

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        what, x = self.what, x.contiguous()  # Conv1D's view asks for that
        y = self.prenorm(x)
        q, k, v = self.project(y, other)
        if what["norms"] in ("own", "offset", "RMSNorm", "LayerNorm"):
            q, k = self.of_q(q), self.of_k(k)
        elif what["norms"] == "normalize":
            q, k = F.normalize(q + 0.1, dim=-1), F.normalize(k + 0.1, dim=-1)
        if what["rotary"]:
            q, k = map(rotated, (q, k))
        if k.shape[1] != q.shape[1] and what["shared"] == "expand":
            times = q.shape[1] // k.shape[1]
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
        elif k.shape[1] != q.shape[1] and what["shared"] == "repeat_interleave":
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        z = self.product(q, k, v).transpose(1, 2)
        if what["extra"] == "gate by head":
            z = z * torch.sigmoid(self.gate(y))[..., None]
        z = z.reshape(*x.shape[:2], -1)
        if what["extra"] == "gated":
            z = z * torch.sigmoid(self.gate(y))
        elif what["extra"] == "norm behind":
            z = self.behind(z)
        z = self.call(self.o, z)
        return x + z if what["residual"] else z


def rotated(x: Tensor) -> Tensor:
    """Rotary positions; x (N, heads, L, each)."""
    length, each = x.shape[-2:]
    angles = torch.arange(length, dtype=x.dtype)[:, None] * 0.3 ** torch.arange(each // 2, dtype=x.dtype)
    angles = torch.cat((angles, angles), -1)
    return x * angles.cos() + turned(x) * angles.sin()


class Attends(nn.Module):
    """nn.MultiheadAttention: masks, keys and values of other widths, time in front or examples."""

    def __init__(self, rng: random.Random, width: int, other_width: int | None) -> None:
        super().__init__()
        heads = rng.choice([n for n in (1, 2, 3, 4) if width % n == 0])
        self.is_cross = other_width is not None
        self.batch_first, self.residual = rng.random() < 0.5, rng.random() < 0.7
        self.mask = rng.choice([None, None, "causal", "padding", "by head"])
        self.need_weights = rng.random() < 0.3
        options: dict[str, Any] = {"add_bias_kv": rng.random() < 0.2, "add_zero_attn": rng.random() < 0.2}
        if other_width is not None:
            options.update(kdim=other_width, vdim=other_width)
        self.heads = heads
        self.attention = nn.MultiheadAttention(
            width, heads, bias=rng.random() < 0.7, batch_first=self.batch_first, **options
        )
        self.norm = nn.LayerNorm(width) if rng.random() < 0.5 else nn.Identity()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        source = y if other is None or not self.is_cross else other
        (n, length), size = x.shape[:2], source.shape[1]
        options: dict[str, Any] = {}
        if self.mask == "causal":
            options["attn_mask"] = torch.arange(length)[:, None] < torch.arange(size)
            options["is_causal"] = length == size
        elif self.mask == "padding":
            options["key_padding_mask"] = torch.arange(size) > torch.arange(n)[:, None]
        elif self.mask == "by head":
            total = n * self.heads * length * size
            options["attn_mask"] = torch.linspace(-1, 1, total, dtype=x.dtype).view(-1, length, size)
        given = [y, source, source] if self.batch_first else [t.transpose(0, 1) for t in (y, source, source)]
        if source is y:
            given = [given[0]] * 3
        z, weights = self.attention(*given, need_weights=self.need_weights, **options)
        z = z if self.batch_first else z.transpose(0, 1)
        z = z if weights is None else z + weights.mean()
        return x + z if self.residual else z


class Layers(nn.Module):
    """nn.TransformerEncoderLayer, or nn.TransformerDecoderLayer where there is what it attends to."""

    def __init__(self, rng: random.Random, width: int, is_decoder: bool) -> None:
        super().__init__()
        cls: Any = nn.TransformerDecoderLayer if is_decoder else nn.TransformerEncoderLayer
        options: dict[str, Any] = {
            "activation": rng.choice(["relu", "gelu", F.silu]),
            "norm_first": rng.random() < 0.5,
            "bias": rng.random() < 0.7,
        }
        heads = rng.choice([n for n in (1, 2, 3, 4) if width % n == 0])
        self.layer = cls(width, heads, rng.choice([4, 6, 9]), dropout=0.0, batch_first=True, **options)
        self.is_causal = rng.random() < 0.4

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        mask = None
        if self.is_causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if isinstance(self.layer, nn.TransformerDecoderLayer):
            return self.layer(x, other, tgt_mask=mask, tgt_is_causal=self.is_causal)
        return self.layer(x, src_mask=mask, is_causal=self.is_causal)


class Product(nn.Module):
    """A gated product of a transformer, with its norm."""

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        hidden, self.is_joined = rng.choice([4, 6]), rng.random() < 0.4
        self.norm = norm_of(rng.choice(["own", "RMSNorm", "LayerNorm"]), width)
        self.up = nn.Linear(width, 2 * hidden if self.is_joined else hidden, bias=False)
        if not self.is_joined:
            self.gate = nn.Linear(width, hidden, bias=rng.random() < 0.5)
        self.down = nn.Linear(hidden, width, bias=rng.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate, up = self.up(y).chunk(2, -1) if self.is_joined else (self.gate(y), self.up(y))
        return x + self.down(F.silu(gate) * up)


def random_block(rng: random.Random, width: int, other_width: int | None) -> tuple[nn.Module, bool]:
    """A block for x (N, L, width), and whether it is to be given what is of `other_width`, too."""
    other = other_width if rng.random() < 0.6 else None
    kind = rng.choice(["heads", "heads", "heads", "attends", "layers", "product"])
    if kind == "heads":
        heads = Heads(rng, width, other)
        return heads, heads.what["joined"].startswith("cross")
    if kind == "attends":
        return Attends(rng, width, other), other is not None
    if kind == "layers":
        is_decoder = other == width
        return Layers(rng, width, is_decoder), is_decoder
    return Product(rng, width), False
