"""Which dimensions are the same units where heads attend: rules of trace.py.

A head h is one unit: its rows of the projections of queries, keys and values, and the columns that read it
in the projection of the output. Query heads that share keys and values (grouped-query attention) are one.
It is found by what meets: a dimension of the labels within a head becomes one where a product sums over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from . import table
from .einsum import spelled
from .labels import across, along, shortened, spread, varying

if TYPE_CHECKING:
    from .trace import Call, Trace

ATTENTION, BATCHED = "scaled_dot_product_attention", "matmul bmm __matmul__"
PLAIN = "mm spmm"
PRODUCTS = {*table.functions(f"{ATTENTION} {BATCHED}")}
"""Functions that multiply activations with each other."""


def merged(trace: Trace, labels: Tensor, dims: list[int], call: Call) -> Tensor:
    """`labels` whose units along `dims`, which is not all that they vary along, are one."""
    short = shortened([labels])[0]
    for dim in dims:
        first = short.narrow(dim, 0, 1)
        trace.sets.join(first.expand_as(short).flatten(), short.flatten(), trace.where(call))
        short = first
    return short.expand(labels.shape)


def are_alike(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether a tensor, of no parameter, says the same of each entry of these dimensions: one number alone
    may be a value that each of them has for now."""
    if not all(torch.equal(x, x.narrow(dim, 0, 1).expand_as(x)) for dim in dims):
        return False
    is_spread = all(x.stride(dim) == 0 for dim in dims)
    return is_spread or not torch.equal(x, x.flatten()[:1].expand(x.numel()).view(x.shape))


def of_shape(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels for a tensor of `shape` that is broadcast to what has `labels`."""
    while labels.ndim > len(shape):
        labels = labels.select(0, 0)
    for dim, size in enumerate(shape):
        labels = labels.narrow(dim, 0, min(size, labels.shape[dim]))
    return labels


def attention(trace: Trace, call: Call) -> None:
    """torch.nn.functional.scaled_dot_product_attention: (..., H, L, D), (..., H, S, D), (..., H, S, D')."""
    q, k, v = (call.get(at, name) for at, name in enumerate(("query", "key", "value")))
    mask, out = call.get(3, "attn_mask"), call.results()[0]
    heads = q.ndim - 3
    if heads < 0 or any(trace.labels(x) is None or trace.is_owned(x) for x in (q, k, v)):
        trace.unknown(call)
        return
    if k.ndim != q.ndim or v.ndim != q.ndim or out.shape[heads] != q.shape[heads]:  # keys share a query
        trace.unknown(call)
        return
    found = []
    for x in (q, k, v):
        labels = trace.labels(x)
        assert labels is not None
        if not {*varying(labels)} <= {heads, heads + 2}:  # a unit would be a position
            trace.unknown(call)
            return
        labels = spread(merged(trace, labels, [heads + 2], call)).select(-1, 0).select(-1, 0)
        found.append(labels.repeat_interleave(q.shape[heads] // x.shape[heads], heads))
    of_mask = None if mask is None else trace.labels(mask)
    if of_mask is not None:
        if not {*varying(of_mask)} <= {mask.ndim - 3}:
            trace.unknown(call)
            return
        found.append(of_mask.select(-1, 0).select(-1, 0).expand_as(found[0]))
    elif mask is not None and not _is_for_all(trace, mask):
        trace.unknown(call)
        return
    for labels in found[1:]:
        first, second = shortened([found[0], labels])
        trace.sets.join(first.flatten(), second.flatten(), trace.where(call))
    _of_heads(trace, found[0])
    trace.set(out, found[0][..., None, None].expand(out.shape))


def _is_for_all(trace: Trace, mask: Tensor) -> bool:
    """Whether a mask without units is the same for every head, which one of one position does not show."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return True
    if trace.is_owned(mask) or not torch.equal(mask, mask.narrow(-3, 0, 1).expand_as(mask)):
        return False
    return mask.stride(-3) == 0 or mask.shape[-1] > 1


def batched_product(trace: Trace, call: Call) -> None:
    """torch.matmul and torch.bmm of activations, where what they sum over lies within a unit: a head."""
    a, b = call.get(0, "input"), call.get(1, "other", call.kwargs.get("mat2"))
    out = call.results()[0]
    labels = [trace.units(x) for x in (a, b)]
    if any(of is None or not varying(of) for of in labels):
        plain_product(trace, call)
        return
    if any(of is None for of in labels) or a.ndim != b.ndim or a.ndim < 3 or a.shape[:-2] != b.shape[:-2]:
        trace.unknown(call)
        return
    found = []
    for of, summed in zip(labels, (a.ndim - 1, a.ndim - 2), strict=True):
        assert of is not None
        if summed in varying(of) and len(varying(of)) > 1:
            of = spread(merged(trace, of, [summed], call))
        if summed in varying(of) or not varying(of):
            trace.unknown(call)
            return
        found.append(of)
    rows, cols = (of.expand(x.shape) for of, x in zip(found, (a, b), strict=True))
    rows, cols = rows.narrow(-1, 0, 1).expand(out.shape), cols.narrow(-2, 0, 1).expand(out.shape)
    rows, cols = spread(rows), spread(cols)
    free = {out.ndim - 2, out.ndim - 1}
    if {*varying(rows)} - free != {*varying(cols)} - free or not {*varying(rows)} - free:
        trace.unknown(call)
        return
    first, second = shortened([rows, cols])
    trace.sets.join(first.flatten(), second.flatten(), trace.where(call))
    if {*varying(rows)} - free == {out.ndim - 3}:
        heads = rows.select(-1, 0).select(-1, 0)
        _of_heads(trace, _of_one_example(trace, heads) if out.ndim == 3 else heads)
    trace.set(out, rows if len(varying(rows)) >= len(varying(cols)) else cols)


def plain_product(trace: Trace, call: Call) -> None:
    """A product of matrices of which one alone has units, which it does not sum over: each unit by itself. An
    adjacency and what nodes have, weights and what they weigh."""
    a, b = call.get(0, "input"), call.get(1, "other", call.kwargs.get("mat2"))
    out, pair = call.results()[0], (a, b)
    labels = [trace.units(x) for x in pair]
    with_units = [at for at, of in enumerate(labels) if of is not None and varying(of)]
    if len(with_units) != 1 or any(not isinstance(x, Tensor) or x.ndim < 2 for x in pair):
        trace.unknown(call)
        return
    at = with_units[0]
    found, summed = labels[at], pair[at].ndim - 1 - at
    assert found is not None
    if summed in varying(found) and len(varying(found)) > 1:
        found = spread(merged(trace, found, [summed], call))
    if summed in varying(found) or not varying(found):
        trace.unknown(call)
        return
    trace.pin(pair[1 - at], trace.where(call))
    trace.set(out, found.narrow(summed, 0, 1).expand(out.shape))


def plain_einsum(trace: Trace, call: Call) -> None:
    """An einsum of which one operand alone has units, which are not what it sums over."""
    terms, operands = spelled(call.args)
    found = [trace.units(x) for x in operands]
    with_units = [at for at, of in enumerate(found) if of is not None and varying(of)]
    if len(with_units) != 1:
        trace.unknown(call)
        return
    at, out = with_units[0], call.results()[0]
    labels, term, made = found[at], terms[at], terms[-1]
    assert labels is not None
    if not {term[dim] for dim in varying(labels)} <= {*made}:
        trace.unknown(call)
        return
    for i, x in enumerate(operands):
        if i != at:
            trace.pin(x, trace.where(call))
    for dim in reversed(range(labels.ndim)):
        labels = labels if term[dim] in made else labels.select(dim, 0)
    kept = [index for index in term if index in made]
    labels = labels.permute([kept.index(index) for index in made if index in kept])
    for dim, index in enumerate(made):
        labels = labels if index in kept else labels.unsqueeze(dim)
    trace.set(out, spread(labels.expand(out.shape)))


def module(trace: Trace, layer: nn.MultiheadAttention, call: Call) -> None:
    """A torch.nn.MultiheadAttention that has run."""
    given = [call.get(at, name) for at, name in enumerate(("query", "key", "value"))]
    shape, own = (layer.num_heads, layer.head_dim), layer._parameters
    masks = [x for x in call.tensors() if all(x is not other for other in given)]
    if any(trace.labels(x) is not None for x in masks) or not isinstance(call.out, tuple):
        trace.unknown_module(layer, call)
        return
    weights: list[Any] = [own.get(f"{of}_proj_weight") for of in ("q", "k", "v")]
    if own.get("in_proj_weight") is not None:
        weights = [own["in_proj_weight"]] * 3
    features = [trace.dim(weight, 0, "out").view(-1, *shape) for weight in dict.fromkeys(weights)]
    for name, dim in (("in_proj_bias", 0), ("bias_k", 2), ("bias_v", 2)):
        if own.get(name) is not None:
            features.append(trace.dim(cast(Tensor, own[name]), dim, "along").view(-1, *shape))
    read = layer.out_proj.weight
    features.append(trace.dim(read, 1, "in").view(-1, *shape))
    heads = features[0][0, :, 0]
    for labels in features:
        trace.sets.join(
            heads.expand(labels.movedim(1, 2).shape).flatten(),
            labels.movedim(1, 2).flatten(),
            trace.where(call),
        )
    for x, weight in zip(given, weights, strict=True):
        cols = trace.dim(weight, 1, "in")
        of = trace.labels(x)
        units = None if of is None else along(of, -1)
        if units is None:
            trace.pin(x, trace.where(call))
            trace.sets.pin(cols, f"{trace.where(call)}, of what has no units")
        else:
            trace.sets.join(units, cols, trace.where(call))
    rows = trace.dim(read, 0, "out")
    if layer.out_proj.bias is not None:
        trace.sets.join(rows, trace.dim(layer.out_proj.bias, 0, "along"), trace.where(call))
    name = trace.stack[-1][0]
    trace.attentions += [(name, heads)] * 2  # scores, and what they weigh, where one product is not both
    y, attended = call.out
    trace.set(y, across(rows, -1, y.shape))
    if attended is not None:
        by_head = attended.ndim > y.ndim
        trace.set(attended, across(heads, -3, attended.shape) if by_head else None)


def _of_one_example(trace: Trace, heads: Tensor) -> Tensor:
    """Those that come again and again, once: torch.bmm has examples and heads in one dimension."""
    named = trace.sets.named(heads)
    n = next(
        n for n in range(1, len(named) + 1) if len(named) % n == 0 and named.view(-1, n).eq(named[:n]).all()
    )
    return heads[:n]


def _of_heads(trace: Trace, labels: Tensor) -> None:
    """Has the product that is seen be one of these heads, (..., H)."""
    trace.attentions[-1] = trace.attentions[-1][0], labels.reshape(-1, labels.shape[-1])[0]
