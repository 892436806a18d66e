"""MNIST's four files with few images, as the examples' tests read them."""

import gzip
import struct

import numpy as np

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(array, magic=None):
    """The idx file of bytes with these values."""
    magic = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def images(n, side=28):
    """Noise whose brightest row tells the label."""
    x = np.random.default_rng(n).integers(0, 128, (n, side, side))
    x[np.arange(n), labels(n) % side] = 255
    return x


def labels(n):
    return np.arange(n) % 10


def write(folder, train=60, test=20):
    """The folder, with the files."""
    for n, image_name, label_name in ((train, TRAIN_IMAGES, TRAIN_LABELS), (test, TEST_IMAGES, TEST_LABELS)):
        (folder / image_name).write_bytes(gzip.compress(idx(images(n))))
        (folder / label_name).write_bytes(gzip.compress(idx(labels(n))))
    return folder
