"""Small int64 tables on the device that tell one launch about many tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_LIMIT = 256


class _Table:
    """The rows on the device, the page-locked source of the copy, and the stream that copied."""

    __slots__ = ("captured", "rows", "source", "stream")

    def __init__(self, values: list[int], device: torch.device, stream: int) -> None:
        self.source = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.rows = self.source.to(device, non_blocking=True)
        self.stream = stream
        self.captured = False


_tables: dict[Hashable, _Table] = {}
_captured: list[_Table] = []  # a captured graph reads its tables as long as the process lives


def device_table(key: Hashable, device: torch.device, build: Callable[[], list[int]]) -> Tensor:
    """The rows that ``build`` makes, on ``device``; copied there without a sync, once per key and stream.

    Args:
        key: everything the rows depend on, addresses included.
        device: where the table is read.
        build: the values of the rows, one after the other.
    """
    key = (device, key)
    table = _tables.get(key)
    if device.type != "cuda":
        stream, capturing = 0, False
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    # A capture starts after a sync, so that every table made before it is there. Otherwise another stream
    # might read before the copy has ended.
    if table is None or (table.stream != stream and not capturing):
        table = _Table(build(), device, stream)
        if not capturing:  # this copy would run at the graph's replay, too late for eager calls
            if len(_tables) >= _LIMIT:
                _tables.clear()
            _tables[key] = table
    if capturing and not table.captured:
        table.captured = True
        _captured.append(table)
    return table.rows
