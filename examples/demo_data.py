"""The demo's data: scikit-learn's 8x8 digits, or Fashion-MNIST from the files of a Debian package."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
FASHION_HELP = f"""Fashion-MNIST comes with the Debian package dataset-fashion-mnist:
    sudo apt-get install dataset-fashion-mnist
or, without root, in a directory of your own:
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .
    and then --data-dir .{FASHION_DIR}"""

Array = npt.NDArray[Any]


class DataError(Exception):
    """The data cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Data:
    """Images (n, 1, height, width), standardized by the training set's mean and deviation; their classes."""

    name: str
    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def digits() -> Data:
    """Load 1437 images to train on and 360 to test on, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    parts = train_test_split(bunch.images, bunch.target, test_size=360, random_state=0, stratify=bunch.target)
    train_images, test_images, train_classes, test_classes = parts
    return _standardized("digits", train_images, train_classes, test_images, test_classes)


def fashion_mnist(directory: Path) -> Data:
    """Load 60,000 images to train on and 10,000 to test on."""
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(directory / f"{part}-images-idx3-ubyte.gz")
        classes = _read_idx(directory / f"{part}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or classes.ndim != 1 or len(images) != len(classes):
            raise DataError(f"{directory}: the images and the labels of {part!r} do not belong together.")
        arrays += [images, classes]
    return _standardized("Fashion-MNIST", *arrays)


def _standardized(
    name: str, train_images: Array, train_classes: Array, test_images: Array, test_classes: Array
) -> Data:
    train = torch.tensor(train_images, dtype=torch.float32)[:, None]
    test = torch.tensor(test_images, dtype=torch.float32)[:, None]
    mean, deviation = train.mean(), train.std()
    return Data(
        name,
        train_images=(train - mean) / deviation,
        train_classes=torch.tensor(train_classes, dtype=torch.int64),
        test_images=(test - mean) / deviation,
        test_classes=torch.tensor(test_classes, dtype=torch.int64),
    )


def _read_idx(path: Path) -> Array:
    """Read a gzipped IDX file of bytes: 0, 0, 8, number of dimensions, each as big-endian int32, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is not there.\n{FASHION_HELP}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = np.frombuffer(raw[4:start], dtype=">i4").tolist() if 0 < start <= len(raw) else []
    if not shape or start + math.prod(shape) != len(raw):
        raise DataError(f"{path} is not a complete IDX file of bytes.")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
