"""Sentences through an encoder: tokens, batches of like lengths, embeddings, scores and times."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from texts import Rated, Texts, pearson, spearman
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

MOST = 256  # tokens of a text, as the encoder was trained
HELD_OUT, PAIRS, AT_ONCE = 1000, 5000, 64


class Batch(NamedTuple):
    ids: Tensor  # (n, l) int64
    mask: Tensor  # (n, l) int64, 0 where there is no token


class Corpus(NamedTuple):
    """Texts as lists of token numbers."""

    train: list[list[int]]
    held_out: list[list[int]]
    pairs: list[tuple[int, int]]  # of held-out sentences
    lee: Rated
    lee_tokens: list[list[int]]
    words: Rated
    word_tokens: list[list[int]]


def corpus(
    found: Texts, tokens: Callable[[Sequence[str]], list[list[int]]], held_out: int = HELD_OUT
) -> Corpus:
    """Always the same split, whatever the seed of a run."""
    random = torch.Generator().manual_seed(0)
    lists = tokens(found.sentences)
    order = torch.randperm(len(lists), generator=random).tolist()
    first = torch.randint(held_out, (PAIRS,), generator=random)
    second = (first + torch.randint(1, held_out, (PAIRS,), generator=random)) % held_out
    return Corpus(
        [lists[i] for i in order[held_out:]],
        [lists[i] for i in order[:held_out]],
        [*zip(first.tolist(), second.tolist(), strict=True)],
        found.lee,
        tokens(found.lee.texts),
        found.words,
        tokens(found.words.texts),
    )


def tokenizer(path: str) -> Callable[[Sequence[str]], list[list[int]]]:
    """What makes token numbers of texts, from a tokenizer.json."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(path)
    made.no_padding()
    made.enable_truncation(MOST)
    return lambda lines: [found.ids for found in made.encode_batch([*lines])]


def padded(lists: Sequence[Sequence[int]]) -> Batch:
    length = max(map(len, lists))
    ids = torch.tensor([[*one, *[0] * (length - len(one))] for one in lists])
    return Batch(ids, (torch.arange(length) < torch.tensor([*map(len, lists)])[:, None]).long())


def bucketed(lists: Sequence[Sequence[int]], size: int, random: torch.Generator) -> list[list[int]]:
    """An epoch of batches of like lengths, as positions, in random order; what fills none is left out."""
    order = torch.randperm(len(lists), generator=random).tolist()
    order.sort(key=lambda at: len(lists[at]))
    skip = int(torch.randint(len(lists) % size + 1, (), generator=random))
    parts = [order[at : at + size] for at in range(skip, len(order) - size + 1, size)]
    return [parts[at] for at in torch.randperm(len(parts), generator=random).tolist()]


def middle(lists: Sequence[list[int]], n: int) -> list[list[int]]:
    """n of the lists, of about the middle length."""
    at = max(0, (len(lists) - n) // 2)
    return sorted(lists, key=len)[at : at + n]


def states(model: nn.Module, batch: Batch) -> Tensor:
    """(n, l, width): what the encoder makes of each token."""
    return model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state


def pooled(of_tokens: Tensor, mask: Tensor) -> Tensor:
    """(n, width): the mean over the tokens."""
    weight = mask[..., None].to(of_tokens.dtype)
    return (of_tokens * weight).sum(1) / weight.sum(1)


def embedded(model: nn.Module, batch: Batch) -> Tensor:
    """(n, width): embeddings of length 1."""
    return F.normalize(pooled(states(model, batch), batch.mask), dim=1)


@torch.inference_mode()
def encode(model: nn.Module, lists: Sequence[Sequence[int]]) -> Tensor:
    """(n, width): embeddings of length 1."""
    order = sorted(range(len(lists)), key=lambda at: len(lists[at]))
    parts = []
    for start in range(0, len(order), AT_ONCE):
        parts.append(embedded(model, padded([lists[at] for at in order[start : start + AT_ONCE]])))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy(0, torch.tensor(order), found)


class Scores(NamedTuple):
    """Of an encoder beside its teacher and beside people.

    Attributes:
        cosine: mean over the held-out sentences, of the embedding with the teacher's.
        pairs: Spearman's coefficient of the similarities of pairs of them with the teacher's.
        lee_pearson, lee_spearman: with people's, of all pairs of 50 news texts.
        words: Spearman's with people's, of WordSim-353.
    """

    cosine: float
    pairs: float
    lee_pearson: float
    lee_spearman: float
    words: float


def scores(model: nn.Module, of: Corpus, teacher: Tensor) -> Scores:
    """teacher: its embeddings of the held-out sentences."""
    model.eval()
    ours = encode(model, of.held_out)
    lee = similarities(encode(model, of.lee_tokens), of.lee.pairs)
    words = similarities(encode(model, of.word_tokens), of.words.pairs)
    return Scores(
        (ours * teacher).sum(1).mean().item(),
        spearman(similarities(ours, of.pairs), similarities(teacher, of.pairs)),
        pearson(lee, of.lee.ratings),
        spearman(lee, of.lee.ratings),
        spearman(words, of.words.ratings),
    )


def similarities(embeddings: Tensor, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Cosines of pairs of embeddings of length 1."""
    first, second = torch.tensor(pairs).T
    found: list[float] = (embeddings[first] * embeddings[second]).sum(1).tolist()
    return found


@torch.inference_mode()
def encode_ms(ours: nn.Module, theirs: nn.Module, lists: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Median times of two encoders for 64 sentences, in turns over all of them."""
    ordered, size = sorted(lists, key=len), min(AT_ONCE, len(lists))
    batches = [padded(ordered[start : start + size]) for start in range(0, len(lists) - size + 1, size)]
    times: tuple[list[float], list[float]] = ([], [])
    for batch in batches * 2:
        for model, found in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            states(model, batch)
            found.append(1e3 * (time.perf_counter() - begin))
    return median(times[0]), median(times[1])


def saved_mb(model: nn.Module, batch: Batch) -> float:
    """What a forward in training keeps for the backward pass, parameters aside, in megabytes."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        found = states(model, batch)
    assert found.requires_grad
    return sum(kept.values()) / 1e6
