"""Which dimensions are the same units where rows are gathered, scattered and sorted: rules of trace.py.

Each unit by itself, as long as the dimension that an index is of is not that of the units: messages between
the nodes of a graph, tokens on their way to experts and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .labels import shortened, varying

if TYPE_CHECKING:
    from .trace import Call, Trace

BY_ROW = "index_add index_copy"
"""(x, dim, index, source): the index is a vector of places of that dimension."""
SCATTERS = f"{BY_ROW} scatter scatter_add scatter_reduce"
"""The others have an index for each element of the source."""
GATHERS = "gather take_along_dim"
SORTS = "sort topk argsort msort cummax cummin"


def scattered(trace: Trace, call: Call) -> None:
    """x with what a source has, where an index says."""
    x, dim, index = call.args[0], call.get(1, "dim"), call.get(2, "index")
    source = call.get(3, "source", call.get(3, "src"))
    if not isinstance(x, Tensor) or not isinstance(dim, int) or not isinstance(source, Tensor) or not x.ndim:
        trace.unknown(call)
        return
    found = [trace.units(t) for t in (x, source)]
    given = next((of for of in found if of is not None), None)
    units = [] if given is None else varying(given)
    others = [t for t in call.tensors() if t is not x and t is not source]
    is_known = units and dim % x.ndim not in units and all(of is None or varying(of) == units for of in found)
    if not is_known or any(trace.is_owned(t) for t in (x, source)) or not _are_plain(trace, others):
        trace.unknown(call)
        return
    sizes = [t.shape for t in (x, source, index) if t.ndim == x.ndim]
    is_new = found[0] is None and not trace.is_constant(x, changed=call.out is x)
    if is_new or (found[1] is None and not trace.is_constant(source)) or not _are_one(sizes, units):
        trace.unknown(call)
        return
    short = [_of_units(of, units) for of in found if of is not None]
    if len(short) == 2:
        first, second = shortened(short)
        trace.sets.join(first.flatten(), second.flatten(), trace.where(call))
    trace.set(call.results()[0], short[0].expand(call.results()[0].shape))


def gathered(trace: Trace, call: Call) -> None:
    """Rows of x, for each unit those that an index, perhaps of the same units, says."""
    x, index = call.args[0], call.get(2, "index")
    at = 1
    if call.name == "take_along_dim":
        index, at = call.get(1, "indices"), 2
    dim, out = call.get(at, "dim"), call.results()[0]
    labels = trace.units(x)
    units = [] if labels is None else varying(labels)
    is_known = isinstance(dim, int) and isinstance(index, Tensor) and out.ndim == x.ndim
    if labels is None or not is_known or not units or dim % x.ndim in units:
        trace.unknown(call)
        return
    of_index = trace.units(index)
    if (of_index is not None and varying(of_index) != units) or not _are_one([x.shape, out.shape], units):
        trace.unknown(call)
        return
    short = _of_units(labels, units)
    if of_index is not None:
        first, second = shortened([short, _of_units(of_index, units)])
        trace.sets.join(first.flatten(), second.flatten(), trace.where(call))
    trace.set(out, short.expand(out.shape))


def sorted_rows(trace: Trace, call: Call) -> None:
    """Along another dimension than that of the units: values and their places are of the same units."""
    x = call.args[0]
    dim = call.get(2 if call.name == "topk" else 1, "dim", 0 if call.name == "msort" else -1)
    labels = trace.units(x)
    units = [] if labels is None else varying(labels)
    is_known = isinstance(dim, int) and not isinstance(dim, bool) and len(call.tensors()) == 1
    if labels is None or not is_known or not units or dim % x.ndim in units:
        trace.unknown(call)
        return
    for out in call.results():  # values, and their places
        trace.set(out, _of_units(labels, units).expand(out.shape))


def _of_units(labels: Tensor, units: Sequence[int]) -> Tensor:
    """Labels with one entry of each dimension that is none of the units'."""
    for dim in range(labels.ndim):
        labels = labels if dim in units else labels.narrow(dim, 0, 1)
    return labels


def _are_one(sizes: Sequence[Sequence[int]], dims: Sequence[int]) -> bool:
    """Whether tensors of these sizes have the units one for one."""
    return all(size[dim] == sizes[0][dim] for size in sizes for dim in dims)


def _are_plain(trace: Trace, tensors: Sequence[Tensor]) -> bool:
    return all(trace.units(t) is None for t in tensors)
