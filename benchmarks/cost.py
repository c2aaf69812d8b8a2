"""What a search costs, in plain training runs of the same network for the same epochs: time, folds and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.mnist import three_dropouts
from benchmarks.problems import MNIST_SPACE
from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier

_EPOCHS = 15
RETURNING = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the allocator keeps nothing for later
_WIDTH = 2048  # hidden units of the memory's model, which is large beside its activations


def measure_cost(repeats: int = 5, device: str = "cpu") -> dict[str, float]:
    """Print and return ratios, medians over alternating repeats, on random data of MNIST's and of digits' shape.

    ``search``: a search over one split with the defaults, before verification, over one plain training. ``folds …``: five shared
    folds over one split. ``memory …``: what a search, or plain training, adds to the process at its peak, in copies of the model.
    """
    rng = np.random.default_rng(0)
    X, y = rng.random((5_500, 784), dtype=np.float32), rng.integers(0, 10, 5_500)
    mnist = TorchClassifier(
        three_dropouts, lr=1e-3, batch_size=250, max_epochs=_EPOCHS, weight_decay=1e-4, random_state=0, device=device
    ).set_params(
        module__dropout_0=0.1,
        module__dropout_1=0.2,
        module__dropout_2=0.2,
        label_smoothing=0.1,
        input_noise=0.1,
    )
    digits = TorchClassifier(MLP(hidden=(64, 64)), max_epochs=2 * _EPOCHS, random_state=0, device=device)
    space = {k: v for k, v in MNIST_SPACE.items() if not k.startswith("module__")}
    ratios = {
        "search": _ratio(_searches(mnist, MNIST_SPACE, X, y, 1), lambda: mnist.fit(X[:5_000], y[:5_000]), repeats),
        "folds, 784-256-256-10": _ratio(
            _searches(mnist, MNIST_SPACE, X, y, 5), _searches(mnist, MNIST_SPACE, X, y, 1), repeats
        ),
        "folds, 64-64-64-10": _ratio(
            _searches(digits, space, X[:1500, :64], y[:1500], 5),
            _searches(digits, space, X[:1500, :64], y[:1500], 1),
            repeats,
        ),
    }
    for name, values in ratios.items():
        print(f"{name:<24}{np.median(values):.2f} (median of {repeats}, from {values.min():.2f} to {values.max():.2f})")
    for name in ("search", "plain"):
        command = [sys.executable, "-m", "benchmarks.cost", name, device]
        copies = float(subprocess.run(command, capture_output=True, text=True, check=True, env=RETURNING).stdout)
        print(f"{'memory, ' + name:<24}{copies:.1f} copies of the model (6 hyperparameters, 784-2048-2048-10)")
        ratios[f"memory, {name}"] = np.array([copies])
    return {name: float(np.median(values)) for name, values in ratios.items()}


def _searches(net: Any, space: dict[str, Any], X: np.ndarray, y: np.ndarray, folds: int) -> Callable[[], object]:
    """A hyper-training over the first of so many folds, or over all of them."""
    parts = np.array_split(np.arange(len(X)), 11)  # validation rows at the end: every split trains on ten elevenths
    splits = [(np.setdiff1d(np.arange(len(X)), part), part) for part in parts[:folds]]
    search = HyperTrainingSearchCV(
        net, space, cv=splits, evaluate="hypernetwork", refit=False, random_state=0, n_inits=1, start="estimator"
    )
    return lambda: search.fit(X, y)


def _ratio(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> np.ndarray:
    seconds = np.array([[_seconds(plain), _seconds(ours)] for _ in range(repeats + 1)])[1:]  # the first round warms up
    return seconds[:, 1] / seconds[:, 0]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _copies_of_the_model(what: str, device: str) -> float:
    """What a search (or plain training) adds to the process or the GPU, at its peak, in copies of a model of 5.8 million weights."""
    rng = np.random.default_rng(0)
    X, y = rng.random((300, 784), dtype=np.float32), rng.integers(0, 10, 300)
    net = TorchClassifier(three_dropouts, lr=1e-3, batch_size=20, max_epochs=2, random_state=0, device=device)
    _searches(net, MNIST_SPACE, X[:99], y[:99], 1)()  # what the libraries need
    net.set_params(module__width=_WIDTH)
    size = 4 * (784 * _WIDTH + _WIDTH * _WIDTH + 12 * _WIDTH + 10)
    before = _peak_anew(device)
    if what == "search":
        _searches(net, MNIST_SPACE, X, y, 1)()
    else:
        net.set_params(weight_decay=1e-4, module__dropout_1=0.2).fit(X, y)
    return (_peak(device) - before) / size


def _peak_anew(device: str) -> int:
    """The peak begins anew; bytes held now."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)
    return _peak(device)


def _peak(device: str) -> int:
    """Bytes of this process at its peak, or of torch's tensors on a GPU."""
    return 1024 * _kilobytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _kilobytes(name: str) -> int:
    """Of this process's status: ``VmHWM`` is the peak of what it holds in memory."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)


if __name__ == "__main__":
    print(_copies_of_the_model(*sys.argv[1:]))
