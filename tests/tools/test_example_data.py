"""The example's data: what it reads, and what it says of each kind of wrong file."""

import gzip
import struct

import data
import numpy as np
import pytest
import torch

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
COUNTS = {"train": 6, "t10k": 4}


def idx(array, magic=None):
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def images(n, side=28):
    return np.random.default_rng(n).integers(0, 256, (n, side, side))


def labels(n):
    return np.arange(n) % 10


@pytest.fixture
def folder(tmp_path):
    for prefix, n in COUNTS.items():
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images(n))))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels(n))))
    return tmp_path


def test_mnist_is_read(folder):
    got = data.mnist(folder)
    for x, y, n in ((got.train_x, got.train_y, 6), (got.test_x, got.test_y, 4)):
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert y.dtype == torch.int64
        torch.testing.assert_close(x, torch.from_numpy(images(n)).reshape(n, 784).float() / 255)
        assert y.tolist() == labels(n).tolist()


def test_digits_split_is_fixed_stratified_and_scaled():
    got = data.digits()
    assert got.train_x.shape == (1437, 64)
    assert got.test_x.shape == (360, 64)
    assert got.train_x.is_contiguous()
    assert got.train_x.dtype == torch.float32
    assert (got.train_x.min(), got.train_x.max()) == (0, 1)
    shares = got.test_y.bincount() / (got.test_y.bincount() + got.train_y.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    assert all(torch.equal(a, b) for a, b in zip(got[1:], data.digits()[1:], strict=True))


def test_fingerprint_tells_data_apart(folder):
    before = data.mnist(folder)
    assert data.mnist(folder).fingerprint == before.fingerprint
    assert data.digits().fingerprint != before.fingerprint
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
        gzip.compress(b"\0\0\x08"),
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
