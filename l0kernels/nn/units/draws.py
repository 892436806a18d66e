"""One draw of all gates of a model, and what of each dimension it leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._gates import Gates


class Space:
    """The units of a dimension, in order: what it takes to know which of its entries are open.

    Spaces of one content are one object, so that two tensors lie alike if their spaces are the same.

    Attributes:
        labels: (size,) int64: the number of each entry's gate among all gates of the model; the number behind
            the last one stands for an entry that is always open.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.size = len(labels)
        self._made: dict[object, Space] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": {}}  # its keys are addresses


class Spaces:
    """The spaces of a model."""

    def __init__(self) -> None:
        self._known: dict[bytes, Space] = {}

    def of(self, labels: Tensor) -> Space:
        """The space of these labels."""
        key = labels.numpy().tobytes()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Space(labels)
        return found

    def repeated(self, space: Space, times: int) -> Space:
        """Each entry `times` times in a row, as nn.Flatten makes of channels."""
        if times == 1:
            return space
        found = space._made.get(times)
        if found is None:
            found = space._made[times] = self.of(space.labels.repeat_interleave(times))
        return found

    def joined(self, spaces: Sequence[Space]) -> Space:
        """One behind the other."""
        key = ("joined", *map(id, spaces))
        found = spaces[0]._made.get(key)
        if found is None:
            found = spaces[0]._made[key] = self.of(torch.cat([space.labels for space in spaces]))
        return found

    def part(self, space: Space, start: int, stop: int) -> Space:
        """The entries from `start` to before `stop`."""
        key = ("part", start, stop)
        found = space._made.get(key)
        if found is None:
            found = space._made[key] = self.of(space.labels[start:stop].clone())
        return found


class Present:
    """The entries of a space that exist in packed data: the open ones, and closed ones that round up.

    Attributes:
        index: (n,) int64 ascending; None: all of them.
        n: how many.
        open: (n,) bool, which of those are open; None: all.
    """

    __slots__ = ("_places", "index", "n", "open")

    def __init__(self, index: Tensor | None, n: int, is_open: Tensor | None) -> None:
        self.index, self.n, self.open = index, n, is_open
        self._places: tuple[Tensor | None, Tensor | None] | None = None

    def places(self) -> tuple[Tensor | None, Tensor | None]:
        """Where the open ones lie in packed data, and in the whole dimension; None: everywhere."""
        if self._places is None:
            if self.open is None:
                self._places = None, self.index
            else:
                within = self.open.nonzero()[:, 0]
                self._places = within, within if self.index is None else self.index.index_select(0, within)
        return self._places


class Draw:
    """The gates of one forward.

    Attributes:
        z: (gates + 1,) of all gates, with their gradient; the last is 1.
        exact: whether packed data hold the present units alone; otherwise all, the closed ones zero.
    """

    def __init__(self, gates: Sequence[Gates], multiples: Sequence[int], exact: bool) -> None:
        self.exact = exact
        z = [gate.z for gate in gates]
        self.z = torch.cat([*z, z[0].new_ones(1)])
        self._present: dict[Space, Present] = {}
        self._scales: dict[tuple[Space, torch.dtype], Tensor] = {}
        self._gates: dict[Space, Gates] = {}
        self._ones: dict[tuple[Space, torch.dtype], Tensor] = {}
        self.is_open = self.z.detach() != 0
        if exact:
            self._exists = _rounded(self.is_open, [gate.z.shape[0] for gate in gates], multiples)
            self.whole = bool(self._exists.all())
            self.open_all = bool(self.is_open.all())

    def present(self, space: Space) -> Present:
        """What of a space exists in packed data."""
        found = self._present.get(space)
        if found is None:
            found = self._present[space] = self._find(space)
        return found

    def _find(self, space: Space) -> Present:
        if self.open_all:
            return Present(None, space.size, None)
        exists, is_open = self._exists[space.labels], self.is_open[space.labels]
        index = exists.nonzero()[:, 0]
        if len(index) == space.size:
            return Present(None, space.size, None if bool(is_open.all()) else is_open)
        is_open = is_open.index_select(0, index)
        return Present(index, len(index), None if bool(is_open.all()) else is_open)

    def scales(self, space: Space, dtype: torch.dtype) -> Tensor:
        """z of what exists of a space, (n,), with its gradient."""
        key = space, dtype
        found = self._scales.get(key)
        if found is None:
            labels = space.labels.to(self.z.device)
            index = self.present(space).index if self.exact else None
            labels = labels if index is None else labels.index_select(0, index)
            found = self._scales[key] = self.z.index_select(0, labels).to(dtype)
        return found

    def mask(self, space: Space, dtype: torch.dtype) -> Tensor:
        """1 where an entry of a space is open, 0 elsewhere, (size,)."""
        key = space, dtype
        found = self._ones.get(key)
        if found is None:
            labels = space.labels.to(self.z.device)
            found = self._ones[key] = self.is_open.index_select(0, labels).to(dtype)
        return found

    def gates(self, space: Space) -> Gates:
        """The gates of a space's entries, as the gated operations take them."""
        found = self._gates.get(space)
        if found is None:
            z = self.z.index_select(0, space.labels.to(self.z.device))
            found = self._gates[space] = Gates.from_z(z, full_grad=False)
        return found


def _rounded(is_open: Tensor, sizes: Sequence[int], multiples: Sequence[int]) -> Tensor:
    """Which units exist: those that are open, and of each gate so many closed ones that a multiple exists.

    Convolutions are compiled for each number of channels, so that few numbers should occur.
    """
    exists, start = is_open.clone(), 0
    counts = torch.stack([part.sum() for part in is_open[:-1].split([*sizes])]).tolist()
    for size, count, multiple in zip(sizes, counts, multiples, strict=True):
        wanted = min(size, max(1, -(-count // multiple)) * multiple)
        if wanted == size:
            exists[start : start + size] = True
        elif wanted > count:
            closed = (~is_open[start : start + size]).nonzero()[: wanted - count, 0]
            exists[start + closed] = True
        start += size
    return exists
