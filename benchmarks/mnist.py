"""MNIST from a directory of IDX files, or from OpenML; and the network that is tuned on it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import fetch_openml
from torch import nn

from hypertune import model_factory

VARIABLE = "HYPERTUNE_MNIST_DIR"
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(directory: str | Path | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read MNIST.

    Parameters
    ----------
    directory : path, optional
        Folder of the four IDX files, plain or gzipped (torchvision's ``MNIST/raw`` is one). Without it the environment
        variable ``HYPERTUNE_MNIST_DIR`` is asked, and then scikit-learn's ``fetch_openml``, which caches.

    Returns
    -------
    X, y, X_test, y_test : ndarray
        (60000, 784) float32 in [0, 1], (60000,) int64, (10000, 784), (10000,), in the original order.

    Raises
    ------
    FileNotFoundError
        If the directory lacks a file, or there is no directory and OpenML cannot be reached.
    """
    directory = directory or os.environ.get(VARIABLE)
    if directory is None:
        try:
            X, y = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
        except OSError as error:
            raise FileNotFoundError(
                f"MNIST: no directory was given and OpenML cannot be reached ({error}). Give --mnist DIR or set {VARIABLE} "
                f"to a folder that holds {', '.join(_FILES)} (plain or .gz)."
            ) from error
        X, y = (X / 255).astype(np.float32), y.astype(np.int64)
        return X[:60_000], y[:60_000], X[60_000:], y[60_000:]
    train_x, train_y, test_x, test_y = (_read_idx(Path(directory), name) for name in _FILES)
    return _images(train_x), train_y.astype(np.int64), _images(test_x), test_y.astype(np.int64)


def _images(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


def _read_idx(directory: Path, name: str) -> np.ndarray:
    """An IDX file: two zero bytes, type 8 (uint8), the number of dimensions, each dimension as big-endian uint32, data."""
    plain, zipped = directory / name, directory / f"{name}.gz"
    if plain.exists():
        raw = plain.read_bytes()
    elif zipped.exists():
        raw = gzip.decompress(zipped.read_bytes())
    else:
        raise FileNotFoundError(f"MNIST: neither {name} nor {name}.gz is in {directory}; it needs {', '.join(_FILES)}.")
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"MNIST: {name} in {directory} is not an IDX file of bytes.")
    dimensions = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions)


@model_factory
def three_dropouts(
    n_features_in: int,
    n_outputs: int,
    *,
    width: int = 256,
    dropout_0: float = 0.0,
    dropout_1: float = 0.0,
    dropout_2: float = 0.0,
) -> nn.Module:
    """784-256-256-10 with a dropout rate of its own before every linear layer."""
    return nn.Sequential(
        nn.Dropout(dropout_0), nn.Linear(n_features_in, width), nn.ReLU(),
        nn.Dropout(dropout_1), nn.Linear(width, width), nn.ReLU(),
        nn.Dropout(dropout_2), nn.Linear(width, n_outputs),
    )  # fmt: skip


@model_factory
def convnet(
    n_features_in: tuple[int, int, int],
    n_outputs: int,
    *,
    dropout_0: float = 0.0,
    dropout_1: float = 0.0,
    dropout_2: float = 0.0,
) -> nn.Module:
    """Two strided convolutions with BatchNorm and two linear layers, each but the first with a dropout rate before it."""
    return nn.Sequential(
        nn.Conv2d(n_features_in[0], 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Dropout2d(dropout_0), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Dropout(dropout_1), nn.Linear(32 * 25, 64), nn.ReLU(),
        nn.Dropout(dropout_2), nn.Linear(64, n_outputs),
    )  # fmt: skip
