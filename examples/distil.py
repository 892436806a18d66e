"""A BertModel that learns from itself: gates on its heads and units, its loss, its steps."""

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import sentences
import torch
import trainer
from sentences import Batch
from torch import Tensor, nn
from torch.nn import functional as F

import l0kernels as l0

BATCH, LR, GATE_LR = 32, 2e-4, 0.05
OPEN = 0.94  # of the draws at first: the student begins near its teacher
ENCODER = ".*"  # every gate; of a pattern, `keep` is a share of what its gates close: embeddings do not count


class Row(NamedTuple):
    """An encoder's figures. Times are medians; None: not measured.

    Attributes:
        parameters: of the encoder, embeddings aside.
        heads, units: of its layers, in order.
        cosine, pairs, lee_pearson, lee_spearman, words: see :class:`sentences.Scores`.
        encode_ms: of 64 sentences.
        step_ms: of the last fifth of a training.
        saved_mb: what a step keeps for the backward pass.
    """

    name: str
    parameters: int
    heads: str
    units: str
    cosine: float
    pairs: float
    lee_pearson: float
    lee_spearman: float
    words: float
    encode_ms: float | None = None
    step_ms: float | None = None
    saved_mb: float | None = None


def teacher_of(folder: Path) -> nn.Module:
    """The encoder without its pooling layer, which its embeddings do not need, and without dropout: gates are
    noise enough, and the targets have none."""
    import transformers

    transformers.logging.set_verbosity_error()  # that there are weights of a pooling layer is known
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    return without_dropout(model).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def frozen_embeddings(model: Any) -> nn.Module:
    """The embeddings stay the teacher's, which has seen more words."""
    model.embeddings.requires_grad_(False)
    return model


def gated(teacher: nn.Module, example: Batch) -> nn.Module:
    """A copy of the teacher with a gate on each head and each hidden unit."""
    model = frozen_embeddings(copy.deepcopy(teacher))
    l0.nn.gate_(model, example.ids, example.mask, residual=False, droprate_init=1 - OPEN)
    return model


def smaller_by_norm(teacher: nn.Module, example: Batch, keep: float) -> nn.Module:
    """The teacher with the same share of each layer's heads and units: those of the largest weights."""
    model = gated(teacher, example)
    with torch.no_grad():
        for gate, norms in zip(l0.nn.gate_modules(model), _norms_of(model), strict=True):
            rank = norms.argsort().argsort()
            gate.log_alpha.copy_(10 + 10 * rank / len(rank))  # all open, in the order of the norms
    return frozen_embeddings(l0.nn.export(model.eval(), keep={ENCODER: keep}, evenly=True))


def _norms_of(model: Any) -> Iterator[Tensor]:
    """The squared norms of what each gate closes, gate vector by gate vector."""
    for layer in model.encoder.layer:
        attention, forward = layer.attention, (layer.intermediate.dense, layer.output.dense)
        rows = [part.weight for part in (attention.self.query, attention.self.key, attention.self.value)]
        norms = _rows_of([*rows, attention.output.dense.weight.T])
        yield norms.view(-1, attention.self.attention_head_size).sum(1)
        yield _rows_of([forward[0].weight, forward[1].weight.T])


def _rows_of(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.detach().square().sum(1) for weight in weights]).sum(0)


def size_of(model: Any) -> tuple[int, str, str]:
    """Parameters of the encoder that are open, and heads and units by layer."""
    layers, size = model.encoder.layer, model.config.hidden_size // model.config.num_attention_heads
    is_gated = bool(l0.nn.gate_modules(model))
    if is_gated:
        counts = [units.open for units in l0.nn.open_units(model).values()]
        heads, units = counts[::2], counts[1::2]
    else:
        heads = [layer.attention.self.query.out_features // size for layer in layers]
        units = [layer.intermediate.dense.out_features for layer in layers]
    aside = sum(p.numel() for p in model.embeddings.parameters())
    return l0.nn.eval_l0(model) - aside, "-".join(map(str, heads)), "-".join(map(str, units))


def loss_of(got: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """1 - cos of the embeddings, and half of the relative squared error of the tokens' states."""
    ours, theirs = (sentences.pooled(of_tokens, mask) for of_tokens in (got, wanted))
    weight = mask[..., None].to(got.dtype)
    error = ((got - wanted).square() * weight).sum() / (wanted.square() * weight).sum()
    return 1 - F.cosine_similarity(ours, theirs).mean() + 0.5 * error


class Feed:
    """Batches of sentences without end, and the teacher's states of their tokens."""

    def __init__(self, teacher: nn.Module, lists: Sequence[list[int]], seed: int) -> None:
        self.teacher, self.lists = teacher, lists
        self.random = torch.Generator().manual_seed(seed)
        self.order: list[list[int]] = []

    def __next__(self) -> tuple[Batch, Tensor]:
        if not self.order:
            self.order = sentences.bucketed(self.lists, BATCH, self.random)
        batch = sentences.padded([self.lists[at] for at in self.order.pop()])
        with torch.no_grad():
            return batch, sentences.states(self.teacher, batch)

    def state(self) -> dict[str, Any]:
        return {"order": self.order, "random": self.random.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.order = state["order"]
        self.random.set_state(state["random"])


class Student:
    """A model that learns from a teacher's states."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps, self.done = model.train(), steps, 0
        groups = l0.nn.parameter_groups(model, gate_lr=GATE_LR)
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def step(self, batch: Batch, wanted: Tensor) -> tuple[float, float]:
        """The loss, and the time in milliseconds."""
        rate = LR * trainer.half_then_down(self.done / self.steps)
        for group in self.optimizer.param_groups:
            if group["name"] != "gates":  # gates keep theirs: the budget moves them to the end
                group["lr"] = rate
        self.done += 1
        begin = time.perf_counter()
        loss = loss_of(sentences.states(self.model, batch), wanted, batch.mask)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), 1e3 * (time.perf_counter() - begin)

    def state(self) -> dict[str, Any]:
        of_torch = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**of_torch, "done": self.done}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def step_ms(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Median times, of steps on the same batches."""
    ours, theirs = zip(*pairs, strict=True)
    return median(ours), median(theirs)
