"""One draw of all gates of a model, and what of each dimension it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks
from ..._compat import foreach_add_, foreach_copy_
from ..._gates import Gates, round_up
from ...impl import module

if TYPE_CHECKING:
    from ...impl.cpp import Places
    from .narrow_layout import Twin


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
        first = int(labels[0]) if len(labels) else 0
        # Where its gates follow each other, z is a slice of all.
        self.start = (
            first if torch.equal(labels, torch.arange(first, first + self.size, device="cpu")) else None
        )
        self.tiles: dict[int, Space] = {}  # apart from _made, whose keys dynamo does not know
        self._made: dict[object, Any] = {}
        self._labels: dict[torch.device, Tensor] = {}

    def labels_on(self, device: torch.device) -> Tensor:
        """The labels on a device: brought there once, for that waits."""
        found = self.labels if device.type == "cpu" else self._labels.get(device)
        if found is None:
            found = self.labels.to(device)
            if _checks.readable():
                self._labels[device] = found
        return found

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """index and count, as of Gates, where every entry exists."""
        index = torch.zeros(round_up(self.size), dtype=torch.int32, device="cpu")
        index[: self.size] = torch.arange(self.size, device="cpu")
        return index, torch.full((2,), self.size, dtype=torch.int32, device="cpu")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_made": {}, "_labels": {}}  # the keys of _made are addresses


class Spaces:
    """The spaces of a model."""

    def __init__(self) -> None:
        self._known: dict[bytes, Space] = {}
        self._ungated: dict[int, Space] = {}

    def of(self, labels: Tensor) -> Space:
        """The space of these labels."""
        key = labels.numpy().tobytes()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Space(labels)
        return found

    def ungated(self, size: int, none: int) -> Space:
        """Entries of no gate, which is the number `none`."""
        found = self._ungated.get(size)
        if found is None:
            found = self._ungated[size] = self.of(torch.full((size,), none, device="cpu"))
        return found

    def repeated(self, space: Space, times: int) -> Space:
        """Each entry `times` times in a row, as nn.Flatten makes of channels."""
        if times == 1:
            return space
        found = space._made.get(times)
        if found is None:
            found = space._made[times] = self.of(space.labels.repeat_interleave(times))
        return found

    def runs(self, space: Space, times: int) -> Space | None:
        """One entry for each `times` in a row, as a view by heads has of features; None: they differ."""
        if times == 1:
            return space
        key = "runs", times
        if key not in space._made:
            cells = space.labels.view(-1, times)
            is_run = bool((cells == cells[:, :1]).all())
            space._made[key] = self.of(cells[:, 0].clone()) if is_run else None
        return space._made[key]

    def tile(self, space: Space, times: int) -> Space | None:
        """What `space` holds `times` times; None: it does not."""
        key = "tile", times
        if key not in space._made:
            cells = space.labels.view(times, -1)
            is_tile = bool((cells == cells[:1]).all())
            space._made[key] = self.of(cells[0].clone()) if is_tile else None
        return space._made[key]

    def tiled(self, space: Space, times: int) -> Space:
        """All of them `times` times, as the gates of a recurrent layer have its units."""
        if times == 1:
            return space
        found = space.tiles.get(times)
        if found is None:
            found = space.tiles[times] = self.of(space.labels.repeat(times))
        return found

    def joined(self, spaces: Sequence[Space]) -> Space:
        """One behind the other."""
        key = ("joined", *map(id, spaces))
        found = spaces[0]._made.get(key)
        if found is None:
            found = spaces[0]._made[key] = self.of(torch.cat([space.labels for space in spaces]))
        return found

    def shuffled(
        self, space: Space, sizes: tuple[int, ...], order: tuple[int, ...]
    ) -> tuple[Space, Tensor, Tensor]:
        """Its entries, seen in `sizes`, with these dimensions in another order; the place of each in `space`,
        and the other way round."""
        key = "shuffled", sizes, order
        found = space._made.get(key)
        if found is None:
            places = torch.arange(space.size, device="cpu").view(sizes).permute(order).flatten()
            found = space._made[key] = self.of(space.labels[places]), places, places.argsort()
        return found


class Present:
    """The entries of a space that exist in packed data: the open ones, and closed ones that round up.

    Attributes:
        index: (n,) int64, which exist, ascending; None: all.
        n: how many.
        within: where the open ones lie in packed data, None: they are all that exists.
        places: where they lie in the whole dimension, None: everywhere.
        order: index of Gates, with those that exist in front; None where index is.
    """

    __slots__ = ("index", "n", "order", "places", "within")

    def __init__(
        self,
        index: Tensor | None,
        n: int,
        within: Tensor | None,
        places: Tensor | None,
        order: Tensor | None = None,
    ) -> None:
        self.index, self.n, self.within, self.places, self.order = index, n, within, places, order


class Draw:
    """The gates of one forward.

    Attributes:
        z: (gates + 1,) of all gates, with their gradient; the last is 1.
        is_open: (gates + 1,) bool.
        exact: whether packed data hold the present units alone; otherwise all, the closed ones zero.
        backend: that packs weights, where exact.
        recurrent: recurrent layers of this draw, while the forward that it is of runs; else None.
        averages: running statistics that the forward moves when it ends; None: each layer moves its own.
        twins: memory that must hold the same, see narrow_layout.
        open_all, one_all: whether, where exact, no gate is closed, and whether all are 1.
    """

    def __init__(
        self,
        gates: Sequence[Gates],
        multiples: Sequence[int],
        exact: bool,
        backend: str,
        joined: Tensor | None = None,
    ) -> None:
        self.exact, self.backend = exact, backend
        self.recurrent: dict[Any, Any] | None = None
        self.averages: Averages | None = None
        self.twins: list[Twin] = []
        z = [gate.z for gate in gates]
        self.z = torch.cat([*z, z[0].new_ones(1)]) if joined is None else joined
        self.is_open = self.z.detach() != 0
        self._gates = gates
        self._present: dict[Space, Present] = {}
        self._scales: dict[tuple[Space, torch.dtype], Tensor] = {}
        self._sides: dict[tuple[Space, torch.dtype], list[Tensor]] = {}
        self._parts: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._static: dict[Space, Gates] = {}
        self._masks: dict[tuple[Space, torch.dtype], Tensor] = {}
        self._opens: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self._factors: dict[tuple[Space, Space, int, torch.dtype], Tensor] = {}
        self._exists: Tensor | None = None
        self._places: dict[int, Places] = {}
        self._lengths = [len(one) for one in z]
        self._begins = {start: at for at, start in enumerate(accumulate(self._lengths, initial=0))}
        if exact:
            counts = torch.stack([gate.count for gate in gates])[:, 0].tolist()
            self._counts = [
                (n, _rounded(n, size, m)) for n, size, m in zip(counts, self._lengths, multiples, strict=True)
            ]
            self.open_all = counts == self._lengths
            # z = 1 has no gradient: what reads such units may as well not know of gates.
            self.one_all = self.open_all and bool((self.z.detach() == 1).all())
            self._extents = torch.tensor([(n, n) for _, n in self._counts], dtype=torch.int32, device="cpu")

    def present(self, space: Space) -> Present:
        """What of a space exists in packed data."""
        found = self._present.get(space)
        if found is None:
            found = self._present[space] = self._find(space)
        return found

    def _group(self, space: Space) -> int | None:
        """Which gates these are, if they are all of one vector in their order."""
        at = None if space.start is None else self._begins.get(space.start)
        return at if at is not None and at < len(self._gates) and self._lengths[at] == space.size else None

    def _find(self, space: Space) -> Present:
        if self.open_all:
            return Present(None, space.size, None, None)
        at = self._group(space)
        if at is not None and self._counts[at] == (space.size, space.size):
            return Present(None, space.size, None, None)
        if self.backend == "cpp":
            found = self._places_of(at) if at is not None else self._places_among(space)
            is_open, n = len(found.opened), len(found.exist)
            if is_open == space.size:
                return Present(None, n, None, None)
            within = None if n == is_open else found.within
            if n == space.size:
                return Present(None, n, within, found.opened)
            return Present(found.exist, n, within, found.opened, found.order)
        return self._find_among_all(space) if at is None else self._find_in(at)

    def _find_in(self, at: int) -> Present:
        """Of a vector of gates, by torch's operations."""
        (is_open, n), order = self._counts[at], self._gates[at].index
        places = order[:is_open].long()
        if is_open == n:
            return Present(places, n, None, places, order)
        if n == self._lengths[at]:
            return Present(None, n, places, places)
        index = order[:n].sort().values
        within = (self._gates[at].z != 0)[index.long()].nonzero()[:, 0]
        return Present(index.long(), n, within, places, torch.cat([index, order[n:]]))

    def _places_of(self, at: int) -> Places:
        """Of a vector; those of all that have closed gates are found at once."""
        if not self._places:
            some = [i for i, (n, _) in enumerate(self._counts) if n < self._lengths[i]]
            found = module("cpp").present(
                [self._gates[i].index for i in some],
                [self._lengths[i] for i in some],
                [self._counts[i] for i in some],
            )
            self._places = dict(zip(some, found, strict=True))
        return self._places[at]

    def _places_among(self, space: Space) -> Places:
        return module("cpp").present_among(self.is_open, self.exists, space.labels)

    def _find_among_all(self, space: Space) -> Present:
        """Of entries that are no vector of gates, by torch's operations."""
        exists, is_open = self.exists[space.labels], self.is_open[space.labels]
        index, places = exists.nonzero()[:, 0], is_open.nonzero()[:, 0]
        if len(places) == space.size:
            return Present(None, space.size, None, None)
        if len(index) == space.size:
            return Present(None, space.size, places, places)
        within = None if len(places) == len(index) else is_open[index].nonzero()[:, 0]
        order = torch.zeros_like(space.whole[0])
        order[: space.size] = torch.cat((index, (~exists).nonzero()[:, 0]))
        return Present(index, len(index), within, places, order)

    @property
    def exists(self) -> Tensor:
        """(gates + 1,) bool, which units exist in packed data."""
        if self._exists is None:
            self._exists = self.is_open.clone()
            gates = zip(self._begins, self._gates, self._counts, strict=False)
            closed = [(start, gate.index[is_open:n]) for start, gate, (is_open, n) in gates if n > is_open]
            if closed:
                starts, index = zip(*closed, strict=True)
                times = torch.tensor([len(one) for one in index], device="cpu")
                begins = torch.tensor(starts, device="cpu").repeat_interleave(times)
                self._exists.index_fill_(0, begins + torch.cat(index), True)
        return self._exists

    def scales(self, space: Space, dtype: torch.dtype) -> Tensor:
        """z of a space, (size,), with its gradient: float64 for weights of that, else float32."""
        key = space, torch.float64 if dtype == torch.float64 else torch.float32
        found = self._scales.get(key)
        if found is None:
            start, at = space.start, self._group(space)
            if at is not None:
                return self._scales.setdefault(key, self._by_group(key[1])[at])
            with _unwatched():
                z = self.z.to(key[1])
                if start is None:
                    found = z.index_select(0, space.labels_on(z.device))
                else:
                    found = z[start : start + space.size]
            self._scales[key] = found
        return found

    def _by_group(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """z of each vector: one node of autograd for all."""
        found = self._parts.get(dtype)
        if found is None:
            with _unwatched():
                found = self.z.to(dtype).split_with_sizes(self._sizes())
            self._parts[dtype] = found
        return found

    def _sizes(self) -> list[int]:
        """Of the vectors in z, and of the 1 behind them."""
        return [*self._lengths, 1]

    def side(self, space: Space, dtype: torch.dtype, selects: bool) -> list[Tensor] | None:
        """The gates of one side of a matrix, as pack takes them.

        None: all exist, and where `selects`, which multiplies nothing, that is all there is to say.
        """
        present = self.present(space)
        if self.one_all or (selects and present.index is None):
            return None
        key = space, torch.float64 if dtype == torch.float64 else torch.float32
        found = self._sides.get(key)
        if found is None:
            found = self._sides[key] = self._side(space, present, dtype)
        return found

    def _side(self, space: Space, present: Present, dtype: torch.dtype) -> list[Tensor]:
        z, at = self.scales(space, dtype).detach(), self._group(space)
        if present.order is None:
            return [z, *space.whole]
        if at is not None:
            return [z, present.order, self._extents[at]]
        return [z, present.order, torch.full((2,), present.n, dtype=torch.int32, device="cpu")]

    def mask(self, space: Space, dtype: torch.dtype) -> Tensor:
        """1 where an entry of a space is open, 0 elsewhere, (size,)."""
        key = space, dtype
        found = self._masks.get(key)
        if found is None:
            at, (whole, *parts) = self._group(space), self._open_by_group(dtype)
            found = whole.index_select(0, space.labels_on(whole.device)) if at is None else parts[at]
            self._masks[key] = found
        return found

    def _open_by_group(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """is_open in a dtype, then its part of each vector."""
        found = self._opens.get(dtype)
        if found is None:
            whole = self.is_open.to(dtype)
            found = self._opens[dtype] = whole, *whole.split_with_sizes(self._sizes())
        return found

    def factor(self, rows: Space, cols: Space, rows_dim: int, dtype: torch.dtype) -> Tensor:
        """What a weight of two gated sides is multiplied by: z of what it reads, 0 where a row is closed.

        Args:
            rows, cols: what it makes, and what it reads.
            rows_dim: the dimension of the rows; the result is (rows, cols), or where it is 1 (cols, rows).
        """
        key = rows, cols, rows_dim, dtype
        found = self._factors.get(key)
        if found is None:
            mask, z = self.mask(rows, dtype), self.scales(cols, dtype).to(dtype)
            with _unwatched():
                found = mask * z[:, None] if rows_dim else mask[:, None] * z
            self._factors[key] = found
        return found

    def gates(self, space: Space) -> Gates:
        """The gates of a space's entries, as the gated operations take them."""
        found = self._static.get(space)
        if found is None:
            at = self._group(space)
            if at is not None:
                found = Gates(self._by_group(self.z.dtype)[at], *self._gates[at][1:3])
            else:
                with _unwatched():
                    z = self.z.index_select(0, space.labels_on(self.z.device))
                found = Gates.from_z(z, full_grad=False)
            self._static[space] = found
        return found


class Averages:
    """The running statistics of the batch norms of a forward, which moves them at its end, all in a few
    operations: those of closed channels stay."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[Tensor, Tensor, Tensor, Space]] = {}
        self._counted: dict[int, tuple[Tensor, int]] = {}

    def copies(self, mean: Tensor, var: Tensor, space: Space) -> tuple[Tensor, ...]:
        """Of both, for a norm to write the next ones into; the same ones where it runs twice."""
        if id(mean) not in self._moved:
            self._moved[id(mean)] = mean, var, torch.cat((mean, var)), space
        return self._moved[id(mean)][2].split(len(mean))

    def count(self, batches: Tensor) -> None:
        """Adds 1 to a norm's num_batches_tracked."""
        _, times = self._counted.get(id(batches), (batches, 0))
        self._counted[id(batches)] = batches, times + 1

    @torch.no_grad()
    def settle(self, draw: Draw) -> None:
        """Moves all of it, where channels are open."""
        if self._counted:
            batches, times = zip(*self._counted.values(), strict=True)
            foreach_add_([*batches], [*times])
        for dtype in {mean.dtype for mean, *_ in self._moved.values()}:
            parts = [part for part in self._moved.values() if part[0].dtype == dtype]
            running = [value for mean, var, *_ in parts for value in (mean, var)]
            is_open = [draw.mask(space, torch.bool) for *_, space in parts for _ in range(2)]
            moved = torch.where(
                torch.cat(is_open), torch.cat([both for _, _, both, _ in parts]), torch.cat(running)
            )
            foreach_copy_(running, moved.split_with_sizes([len(value) for value in running]))


def _unwatched() -> AbstractContextManager[Any]:
    """A checkpoint does not count what is made in it: computed again, it finds that made."""
    if torch.compiler.is_compiling() or _checks.functorch_active():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def _rounded(n: int, size: int, multiple: int) -> int:
    """How many of `size` units exist where n are open: convolutions are compiled for each number of channels,
    so that few numbers should occur, and refuse to have none."""
    return min(size, max(1, -(-n // multiple)) * multiple)
