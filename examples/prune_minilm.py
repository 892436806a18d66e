"""all-MiniLM-L6-v2, a sentence encoder, taught by itself while its gates close, until half of it is left.

    python examples/prune_minilm.py                        # 500 steps, half of the encoder's parameters
    python examples/prune_minilm.py --keep 0.3 --steps 1500

Each attention head (72) and each unit of the feed-forward blocks (9,216) gets a gate. The student begins as
its teacher and learns to give sentences the teacher's embeddings. `l0.nn.Budget` has gates close until --keep
of the encoder's parameters are left. Weights, sentences and people's ratings come in packages: see texts.py.

The folder --out gets table.csv, checkpoint.pt, and encoder.pt2: the open part as a torch.export program,
which loads without l0kernels and transformers. After Ctrl-C --resume goes on as if the run had never stopped.
"""

import argparse
import copy
import csv
import io
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import distil
import files
import sentences
import texts
import torch
import trainer
from distil import ENCODER, Feed, Row, Student, step_ms
from sentences import Batch, Corpus
from torch import Tensor, nn

import l0kernels as l0

PAIR_EVERY = 10  # so often a step is timed beside one of the same encoder without gates
SHOWN = 20  # lines of a run


@dataclass(frozen=True)
class Config:
    """What decides the numbers of a run; a checkpoint is resumed only under an equal one."""

    steps: int
    keep: float
    seed: int


class Run:
    """The training of the gated student, and now and then a step of the same encoder without gates."""

    def __init__(self, config: Config, teacher: nn.Module, corpus: Corpus) -> None:
        self.config, self.teacher, self.corpus = config, teacher, corpus
        torch.manual_seed(config.seed)
        self.feed = Feed(teacher, corpus.train, config.seed)
        self.gated = Student(distil.gated(teacher, sentences.padded(corpus.train[:2])), config.steps)
        self.budget = l0.nn.Budget(self.gated.model, {ENCODER: config.keep}, steps=config.steps, ramp=0.5)
        self.budget.attach(self.gated.optimizer)
        self.dense = Student(distil.frozen_embeddings(copy.deepcopy(teacher)), config.steps)
        self.dense_flops = l0.nn.eval_flops(teacher)
        self.pairs: list[tuple[float, float]] = []  # ms of a gated and of a dense step on one batch
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def advance(self) -> None:
        """A step; one in PAIR_EVERY has a dense one before or behind it, in turns."""
        batch, wanted = next(self.feed)
        turn, rest = divmod(self.step, PAIR_EVERY)
        if rest:
            self.losses.append(self.gated.step(batch, wanted)[0])
            return
        students = (self.gated, self.dense) if turn % 2 else (self.dense, self.gated)
        done = {student: student.step(batch, wanted) for student in students}
        self.losses.append(done[self.gated][0])
        self.pairs.append((done[self.gated][1], done[self.dense][1]))

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "gated": self.gated.state(),
            "dense": self.dense.state(),
            "budget": self.budget.state_dict(),
            "feed": self.feed.state(),
            "pairs": self.pairs,
            "losses": self.losses,
            "rng": torch.get_rng_state(),
        }

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        torch.save(self.state(), content)
        files.write_whole(path, content.getbuffer())

    def load(self, path: Path) -> None:
        """Puts the run where the checkpoint was written.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of a run with another configuration, or no checkpoint of this example.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a checkpoint to resume from, got none")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: expected a checkpoint of this example, got: {error}") from error
        if not isinstance(state, dict) or not {"config", "gated", "feed"} <= state.keys():
            raise ValueError(f"{path}: expected a checkpoint of this example, got another file")
        for field in fields(self.config):
            ours, theirs = getattr(self.config, field.name), state["config"].get(field.name)
            if ours != theirs:
                raise ValueError(f"{path}: cannot resume: {field.name} was {theirs!r} there, got {ours!r}")
        self.gated.load(state["gated"])
        self.dense.load(state["dense"])
        self.budget.load_state_dict(state["budget"])
        self.feed.load(state["feed"])
        self.pairs, self.losses = state["pairs"], state["losses"]
        torch.set_rng_state(state["rng"])

    def line(self, count: int) -> str:
        """The last steps: mean of the losses, shares of the encoder, medians of the times."""
        loss = sum(self.losses[-count:]) / len(self.losses[-count:])
        ours, theirs = step_ms(self.pairs[-max(1, count // PAIR_EVERY) :])
        kept = self.budget.deterministic[ENCODER]  # type: ignore[index]
        with torch.no_grad():
            flops = l0.nn.expected_flops(self.gated.model).item() / self.dense_flops
        times = f"{ours:6.0f} {theirs:6.0f} {ours / theirs:6.2f}"
        return f"{self.step:5}  {loss:6.3f}  {kept:6.1%}  {flops:8.1%}  {times}"


HEAD = f"{'':24}E[FLOPs]  {'ms of a step':^20}\n step    loss    kept  of dense   gated  dense  ratio"


def train(run: Run, out: Path) -> None:
    """Trains to the end; some twenty steps get a line.

    Raises:
        trainer.Interrupted: Ctrl-C was pressed; checkpoint.pt is of this very step.
    """
    every = max(1, run.config.steps // SHOWN)
    print(HEAD)
    with trainer.denormals_flushed(), trainer.asked_to_stop() as stop:
        while run.step < run.config.steps:
            run.advance()
            if run.step % every == 0 or run.step == run.config.steps:
                print(run.line(every), flush=True)
            if stop():
                break
    run.save(out / "checkpoint.pt")
    if run.step < run.config.steps:
        raise trainer.Interrupted


def rows_of(run: Run, small: nn.Module) -> list[Row]:
    """The teacher, the gated student in eval() and its export."""
    corpus, model = run.corpus, run.gated.model.eval()
    step = step_ms(run.pairs[-max(1, len(run.pairs) // 5) :])
    batch = sentences.padded(sentences.middle(corpus.train, distil.BATCH))
    saved = [sentences.saved_mb(net, batch) for net in (model, run.dense.model)]
    encode = sentences.encode_ms(small, run.teacher, corpus.held_out)
    targets = sentences.encode(run.teacher, corpus.held_out)
    nets = (run.teacher, model.eval(), small)
    score = [sentences.scores(net, corpus, targets) for net in nets]
    size = [distil.size_of(net) for net in nets]
    return [
        Row("teacher", *size[0], *score[0], encode_ms=encode[1], step_ms=step[1], saved_mb=saved[1]),
        Row("gated, eval()", *size[1], *score[1], step_ms=step[0], saved_mb=saved[0]),
        Row("exported", *size[2], *score[2], encode_ms=encode[0]),
    ]


def baseline(run: Run) -> Row:
    """The teacher without the heads and units of the smallest weights, trained as the gated student was."""
    config, corpus = run.config, run.corpus
    feed = Feed(run.teacher, corpus.train, config.seed)
    example = sentences.padded(corpus.train[:2])
    student = Student(distil.smaller_by_norm(run.teacher, example, config.keep), config.steps)
    with trainer.denormals_flushed():
        for step in range(1, config.steps + 1):
            loss, _ = student.step(*next(feed))
            if step % max(1, config.steps // 5) == 0:
                print(f"{step:5}  {loss:6.3f}", flush=True)
    model = student.model.eval()
    encode = sentences.encode_ms(model, run.teacher, corpus.held_out)
    score = sentences.scores(model, corpus, sentences.encode(run.teacher, corpus.held_out))
    return Row("smallest weights cut", *distil.size_of(model), *score, encode_ms=encode[0])


def table(rows: Sequence[Row]) -> str:
    above = ("", "encoder", "cos to", "order of", "Lee-50, people", "WordSim-353", "ms to encode")
    below = ("", "parameters", "teacher", "pairs", "Pearson Spearman", "Spearman", "64 sentences")
    lines = [above, below]
    for row in rows:
        lee = f"{row.lee_pearson:7.3f} {row.lee_spearman:8.3f}"
        encode = "" if row.encode_ms is None else f"{row.encode_ms:.0f}"
        figures = (f"{row.cosine:.4f}", f"{row.pairs:.4f}", lee, f"{row.words:.3f}", encode)
        lines.append((row.name, f"{row.parameters:,}", *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join((cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:]))) for cells in lines
    )


def told(rows: Sequence[Row]) -> str:
    """Size, times and memory in sentences."""
    teacher, student, small = rows[:3]
    share, encode = small.parameters / teacher.parameters, small.encode_ms / teacher.encode_ms  # type: ignore[operator]
    step, saved = student.step_ms / teacher.step_ms, student.saved_mb / teacher.saved_mb  # type: ignore[operator]
    return "\n".join(
        (
            f"Left: {share:.1%} of the encoder; heads by layer {small.heads} of {teacher.heads},",
            f"units {small.units} of {teacher.units}.",
            f"Step: {student.step_ms:.0f} ms in the last fifth of the run, {teacher.step_ms:.0f} dense: "
            f"{step:.2f}. It keeps {student.saved_mb:.0f} MB for the backward pass, dense "
            f"{teacher.saved_mb:.0f}: {saved:.2f}.",
            f"Encoding: {encode:.2f} of the teacher's time.",
        )
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, Row._fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row._asdict() for row in rows)
    files.write_whole(path, text.getvalue().encode())


class Embedder(nn.Module):
    """(n, l) token numbers and a mask -> (n, width): embeddings of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return sentences.embedded(self.model, Batch(ids, mask))


def ship(small: Any, wanted: nn.Module, corpus: Corpus, path: Path) -> str:
    """Saves the exported encoder as a torch.export program.

    Raises:
        RuntimeError: what was saved gives other embeddings than the gated student; nothing is written.
    """
    batch = sentences.padded(sentences.middle(corpus.held_out, 2))
    n, length = (
        torch.export.Dim("batch"),
        torch.export.Dim("tokens", max=small.config.max_position_embeddings),
    )
    shapes = ({0: n, 1: length}, {0: n, 1: length})
    content = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(Embedder(small), tuple(batch), dynamic_shapes=shapes), content)
        content.seek(0)
        loaded = torch.export.load(content).module()
        tried = sentences.padded(corpus.held_out[: sentences.AT_ONCE])
        difference = (loaded(*tried) - sentences.embedded(wanted, tried)).abs().max().item()
    if not difference <= 1e-4:  # embeddings have length 1
        raise RuntimeError(
            f"export: expected the gated encoder's embeddings, got a difference of {difference:.1e}"
        )
    files.write_somewhere(path, content.getbuffer())
    return (
        f"torch.export.load({str(path)!r}).module()(ids, mask) gives embeddings without l0kernels and "
        f"transformers, those of the gated student within {difference:.1e}."
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description="Distil all-MiniLM-L6-v2 into its own gated self until a part of it is left.",
        epilog="example: python examples/prune_minilm.py --keep 0.35 --steps 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--steps", type=trainer.whole(1), default=500, help="of 32 sentences; default %(default)s")
    add(
        "--keep",
        type=trainer.positive,
        default=0.5,
        help="share of the encoder to be left; default %(default)s",
    )
    add("--baseline", action="store_true", help="also cut by the norms of weights, and train that as long")
    add("--seed", type=trainer.whole(0), default=0, help="default %(default)s")
    add("--threads", type=trainer.whole(1), help="of torch and the kernels; default: torch's choice")
    add("--out", type=Path, metavar="DIR", help="folder of the results; default: one in runs")
    add(
        "--data", type=Path, metavar="DIR", default=Path("runs", "downloads"), help="where downloads are kept"
    )
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Trains, measures, exports; returns the lines of the table."""
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    teacher = distil.teacher_of(texts.encoder(args.data))
    tokens = sentences.tokenizer(str(texts.encoder(args.data) / "tokenizer.json"))
    return prune(args, teacher, sentences.corpus(texts.texts(args.data), tokens))


def prune(args: argparse.Namespace, teacher: nn.Module, corpus: Corpus) -> list[Row]:
    run = Run(Config(args.steps, args.keep, args.seed), teacher, corpus)
    out = args.out or Path("runs", f"minilm-{args.keep:g}")
    files.check_folder(out, need=sum(p.nbytes for p in teacher.parameters()) * 8)
    if args.resume:
        run.load(out / "checkpoint.pt")
    print(
        f"all-MiniLM-L6-v2: {distil.size_of(teacher)[0]:,} parameters in its encoder, {args.keep:g} of them "
        f"are to be left; {len(corpus.train):,} sentences, {args.steps} steps of {distil.BATCH}; "
        f"{torch.get_num_threads()} thread(s)",
        flush=True,
    )
    train(run, out)
    print("measuring ...", flush=True)
    small = l0.nn.export(run.gated.model.eval())
    rows = rows_of(run, small)
    if args.baseline:
        print("the same training without the smallest weights:")
        rows.append(baseline(run))
    print(table(rows), told(rows), ship(small, run.gated.model, corpus, out / "encoder.pt2"), sep="\n")
    write_csv(out / "table.csv", rows)
    print(f"written to {out}: encoder.pt2, table.csv, checkpoint.pt")
    return rows


if __name__ == "__main__":
    trainer.run_script(main)
