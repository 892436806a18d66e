"""Small nets of rows and of sequences of them, recurrent ones most, for tests of gated units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from unit_examples import Example, Nets, image, into, rows

NETS: Nets = {}
net = into(NETS)


class Towers(nn.Module):
    """Two inputs, a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Linear(5, 6), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.project, self.joint, self.value = nn.Linear(4, 6), nn.Linear(12, 5), nn.Linear(5, 1)

    def forward(self, image: Tensor, *, words: Tensor) -> dict[str, Any]:
        a = torch.tanh(self.words(words))
        b = self.project(self.image(image).amax((-2, -1)))
        y = torch.relu(self.joint(torch.cat([a, b], -1)))
        return {"value": self.value(y).squeeze(-1), "pair": (a, [y.sum(-1)])}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()

    def forward(self, image: Tensor, words: Tensor) -> Any:
        return self.towers(image, words=words)


@net
def towers() -> Example:
    return TwoInputs(), (image(1), rows(2, 5))


class GLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down, self.norm = nn.Linear(hidden, width, bias=False), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@net
def glu() -> Example:
    return nn.Sequential(nn.Linear(4, 5), GLU(5, 6), SwiGLU(5, 4), nn.Linear(5, 2)), (rows(3, 2, 4),)


class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(7, 5), nn.GRU(5, 6, batch_first=True)
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        out, state = self.gru(self.embed(words))
        return self.out(F.relu(self.hidden(out[:, -1] + state[-1])))


@net
def gru() -> Example:
    return GRU(), (torch.randint(7, (3, 4)),)


class Cells(nn.Module):
    """Loops over time of cells, whose first state is learned, zeros, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(7, 5), nn.GRUCell(5, 4)
        self.lstm, self.rnn = nn.LSTMCell(4, 6), nn.RNNCell(6, 3, bias=False, nonlinearity="relu")
        self.start, self.out = nn.Parameter(torch.randn(1, 4)), nn.Linear(9, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        h, pair = self.start.expand(len(x), -1), None
        last, found = x.new_zeros(len(x), 3), []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            pair = self.lstm(torch.tanh(h), pair)
            last = self.rnn(pair[0], last)
            found.append(torch.cat([last, pair[1]], 1))
        return self.out(torch.stack(found, 1).mean(1))


@net
def cells() -> Example:
    return Cells(), (torch.randint(7, (3, 4)),)


class Translator(nn.Module):
    """The states of an encoder, and a projection of them, begin a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(7, 4), nn.LSTM(4, 5, 2)
        self.decoder, self.cell = nn.LSTM(3, 5, 2, batch_first=True), nn.GRUCell(5, 6)
        self.bridge, self.out = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, words: Tensor, given: Tensor) -> Tensor:
        _, (h, c) = self.encoder(self.embed(words).transpose(0, 1))
        y, _ = self.decoder(given, (h, c))
        h = self.bridge(h[-1])
        for step in y.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


@net
def translator() -> Example:
    return Translator(), (torch.randint(7, (3, 4)), rows(3, 3, 3))


class TwoWays(nn.Module):
    """Both directions of a stack; states given by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.rnn = nn.GRU(6, 4, 2, bias=False, bidirectional=True)
        self.one, self.out = nn.RNN(8, 5, nonlinearity="relu"), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y, last = self.rnn(self.norm(self.down(x)), state)
        y, last = self.one(torch.tanh(y[:, 0]), None if last is None else last.new_zeros(1, 5))
        return self.out(y + last)


@net
def two_ways() -> Example:
    return TwoWays(), (rows(4, 2, 4), rows(4, 2, 4))


class Packed(nn.Module):
    """Sequences of several lengths, packed without padding."""

    def __init__(self, enforce_sorted: bool) -> None:
        super().__init__()
        self.embed, self.enforce_sorted = nn.Embedding(7, 5), enforce_sorted
        self.lstm = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
        self.rnn, self.out = nn.RNN(8, 4), nn.Linear(8, 2)

    def forward(self, words: Tensor) -> Tensor:
        lengths = torch.tensor([4, 3, 1] if self.enforce_sorted else [3, 1, 4])
        options = {"batch_first": True, "enforce_sorted": self.enforce_sorted}
        packed = pack_padded_sequence(self.embed(words), lengths, **options)
        packed, (h, _) = self.lstm(packed)
        packed, last = self.rnn(packed, h[-1:].tanh())
        y, lengths = pad_packed_sequence(packed, batch_first=True)
        return self.out(torch.cat([y.sum(1) / lengths[:, None], last[0]], -1))


@net
def packed() -> Example:
    return Packed(False), (torch.randint(7, (3, 4)),)


@net
def packed_sorted() -> Example:
    return Packed(True), (torch.randint(7, (3, 4)),)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(7, 5), nn.LSTM(5, 6, proj_size=4, batch_first=True)
        self.up, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(self.lstm(self.embed(words))[0])))


@net
def projected() -> Example:
    return Projected(), (torch.randint(7, (3, 4)),)
