"""Attention whose heads are gated."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .._gates import DEFAULT_DIST, HardConcrete
from .gate import HardConcreteGate
from .units.graph import Attention, Group, Member, UnitGraph
from .units.place import NAME, GateGroups, gated

GATES = ("groups", "slots")


class L0MultiheadAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` with a gate for each head (Louizos et al., arXiv 1712.01312)::

        y = W_o concat(z_h * softmax(q_h k_h^T / sqrt(D) + mask) v_h) + b_o,   over the heads h with z_h != 0

    Projections, products and what reads them are computed of open heads alone, forward and backward. With
    every head closed y is the bias b_o. It takes what torch's class takes, and has its parameters and their
    names, beside ``l0_units``, which holds the gates; :func:`gate_` makes the same of each
    ``torch.nn.MultiheadAttention`` in a model, with the units around it. :func:`export` makes a
    ``torch.nn.MultiheadAttention`` of it, or an :class:`OpenMultiheadAttention` where heads are gone.

    The attention weights that ``need_weights`` asks for are 0 for closed heads; their mean is over the open.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as of
            ``torch.nn.MultiheadAttention``.
        kv_heads: of keys and values; each serves ``num_heads / kv_heads`` heads of queries in a row
            (grouped-query attention, arXiv 2305.13245). The parameters are then ``q_proj_weight`` and so on.
            None: as many as num_heads.
        gates: with kv_heads: "groups", a gate for each head of keys and values, with its queries; or "slots",
            one for the i-th query head of every group, so that all groups keep as many.
        device, dtype: of the parameters.
        droprate_init, lam, eval_mode, dist: see :class:`HardConcreteGate`.

    Raises:
        ValueError: an argument out of its range, or head counts that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kv_heads: int | None = None,
        gates: str = "groups",
        droprate_init: float = 0.5,
        lam: float = 0.1,
        eval_mode: str = "paper",
        dist: HardConcrete = DEFAULT_DIST,
    ) -> None:
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} for {embed_dim}")
        if gates not in GATES:
            raise ValueError(f"gates must be one of {GATES}, got {gates!r}")
        if kv_heads is not None and (not isinstance(kv_heads, int) or kv_heads < 1 or num_heads % kv_heads):
            raise ValueError(f"kv_heads must divide num_heads, got {kv_heads!r} for {num_heads}")
        if kv_heads is not None and (add_bias_kv or add_zero_attn):
            raise ValueError("add_bias_kv and add_zero_attn must be False with kv_heads")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.kv_heads = num_heads if kv_heads is None else kv_heads
        self.gates = gates
        if self.kv_heads != num_heads:
            self._share(device, dtype)
        self._gate(droprate_init=droprate_init, lam=lam, eval_mode=eval_mode, dist=dist)

    def _share(self, device: Any, dtype: Any) -> None:
        """Keys and values of fewer heads."""
        shared = self.kv_heads * self.head_dim
        sizes = {"q": (self.embed_dim, self.embed_dim), "k": (shared, self.kdim), "v": (shared, self.vdim)}
        self._qkv_same_embed_dim = False
        self.register_parameter("in_proj_weight", None)
        for name, size in sizes.items():
            weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(f"{name}_proj_weight", weight)
        if self.in_proj_bias is not None:
            n = self.embed_dim + 2 * shared
            self.in_proj_bias = nn.Parameter(torch.empty(n, device=device, dtype=dtype))
        self._reset_parameters()

    def _gate(self, **options: Any) -> None:
        group = _group(self)
        heads = torch.arange(self.num_heads, device="cpu")
        each = self.num_heads // self.kv_heads
        of = heads % each if self.gates == "slots" else heads // each
        product = Attention("", tuple((group.name, int(at)) for at in of))
        tensors = dict(self.named_parameters())
        sizes = {(m.name, m.dim): tensors[m.name].shape[m.dim] for m in group.members}
        graph = UnitGraph((group,), (), (product, product), sizes)
        like = next(iter(self.parameters()))
        example = [
            torch.empty((2, 2, size), dtype=like.dtype, device="meta")
            for size in (self.embed_dim, self.kdim, self.vdim)
        ]
        gated(self, (group,), graph, tuple(example), {}, **options)

    @property
    def head_gate(self) -> HardConcreteGate:
        """Its gates."""
        return cast(GateGroups, self._modules[NAME]).gates[0]

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention, **options: Any) -> L0MultiheadAttention:
        """With the parameters of `attention`, shared with it; options: of the gates.

        Raises:
            TypeError: no ``torch.nn.MultiheadAttention``.
        """
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(
                f"attention must be a torch.nn.MultiheadAttention, got {type(attention).__name__}"
            )
        own: Any = attention
        made = cls(
            own.embed_dim,
            own.num_heads,
            own.dropout,
            own.in_proj_bias is not None,
            own.bias_k is not None,
            own.add_zero_attn,
            own.kdim,
            own.vdim,
            own.batch_first,
            own.out_proj.weight.device,
            own.out_proj.weight.dtype,
            **options,
        )
        for name, parameter in own._parameters.items():
            made._parameters[name] = parameter
        for name, parameter in own.out_proj._parameters.items():
            made.out_proj._parameters[name] = parameter
        return made.train(own.training)


def _group(layer: L0MultiheadAttention) -> Group:
    """The heads, and where they lie in the parameters."""
    each, size = layer.num_heads // layer.kv_heads, layer.head_dim
    features = torch.arange(layer.embed_dim, device="cpu").view(layer.kv_heads, each, size)
    if layer.gates == "slots":
        q = features.movedim(1, 0).flatten(1)
        own = [q]
    else:
        q = features.flatten(1)
        shared = torch.arange(layer.kv_heads * size, device="cpu").view(-1, size)
        own = [q, shared, shared]
    starts = [0, layer.embed_dim, layer.embed_dim + layer.kv_heads * size]
    members, parameters = [], dict(layer.named_parameters())
    if parameters.get("in_proj_weight") is not None:
        joined = torch.cat([index + start for index, start in zip(own, starts, strict=False)], 1)
        members.append(Member("in_proj_weight", 0, "out", joined))
    else:
        names = zip(("q", "k", "v"), own, strict=False)
        members += [Member(f"{name}_proj_weight", 0, "out", index) for name, index in names]
    if "in_proj_bias" in parameters:
        joined = torch.cat([index + start for index, start in zip(own, starts, strict=False)], 1)
        members.append(Member("in_proj_bias", 0, "along", joined))
    members += [Member(name, 2, "along", q) for name in ("bias_k", "bias_v") if name in parameters]
    members.append(Member("out_proj.weight", 1, "in", q))
    closed = sum(
        parameters[m.name].numel() // parameters[m.name].shape[m.dim] * m.index.shape[1] for m in members
    )
    return Group("heads", len(q), tuple(members), closed, False, "heads")
