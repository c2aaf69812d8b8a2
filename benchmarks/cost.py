"""What one joint step costs, in plain training steps of the same network on the same minibatch size."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.mnist import three_dropouts
from benchmarks.problems import MNIST_SPACE
from hypertune import HyperTrainingSearchCV, TorchClassifier

_EPOCHS = 4


def measure_step_cost(repeats: int = 5) -> float:
    """Print and return the ratio, median over alternating repeats, on random data of MNIST's shape.

    A run is 80 steps of batch 250 over one split, λ̂ moving from the first step; data set-up is in both sides.
    """
    rng = np.random.default_rng(0)
    X, y = rng.random((5_500, 784), dtype=np.float32), rng.integers(0, 10, 5_500)
    split = [(np.arange(5_000), np.arange(5_000, 5_500))]
    net = TorchClassifier(
        three_dropouts, lr=1e-3, batch_size=250, max_epochs=_EPOCHS, weight_decay=1e-4, random_state=0
    )
    net.set_params(
        module__dropout_0=0.1,
        module__dropout_1=0.2,
        module__dropout_2=0.2,
        label_smoothing=0.1,
        input_noise=0.1,
    )
    search = HyperTrainingSearchCV(
        net, MNIST_SPACE, cv=split, evaluate="hypernetwork", refit=False, warmup=0.0, random_state=0
    )
    plain, ours = [], []
    for _ in range(repeats + 1):
        plain.append(_seconds(lambda: net.fit(X[:5_000], y[:5_000])))
        ours.append(_seconds(lambda: search.fit(X, y)))
    ratios = np.array(ours[1:]) / np.array(plain[1:])  # the first round warms up
    steps = _EPOCHS * 20
    print(
        f"one plain step {np.median(plain[1:]) / steps * 1e3:.2f} ms, one joint step {np.median(ours[1:]) / steps * 1e3:.2f} ms; "
        f"ratio {np.median(ratios):.2f} (median of {repeats}, from {ratios.min():.2f} to {ratios.max():.2f}); n = 6, 784-256-256-10, batch 250"
    )
    return float(np.median(ratios))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
