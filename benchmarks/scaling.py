"""What a search step costs against the number n of hyperparameters and D of weights, in plain training steps and copies of the model.

The model is an MLP of two hidden layers of ReLU units, without biases; the hyperparameters are one L2 for each of n equal groups of
its weights, one group after the other; random data, minibatches of 128 rows.

- *joint, dense*: Algorithm 3, where each hyperparameter moves all weights (n copies of the model, so only up to 100);
- *joint, own weights*: Algorithm 3, where each moves the weights of its group;
- *implicit*: one H-vector product at every fourth step.

``algorithm="auto"`` takes the second up to 1,000 values of one hyperparameter, and the third above. A plain step is that of a
``torch.nn.Module`` with Adam. Memory is what a process adds to what it had before, at its peak: plain training holds the weights,
their gradient and Adam's two moments.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.cost import RETURNING, _kilobytes
from hypertune.algorithms import Problem, Step, descend_w, joint
from hypertune.hypergradients import Implicit, alternate
from hypertune.hypernetworks import Builder, Constant, Layout, Linear
from hypertune.implicit import ImplicitAdjoint
from hypertune.penalties import half_squares
from hypertune.response_optimizers import TangentOptimizer

SHAPES = {10_000: (35, 80), 100_000: (140, 250), 1_000_000: (440, 800)}  # D: inputs and units of a hidden layer
SIZES = tuple(10**power for power in range(7))
_CLASSES = 10
_BATCH = 128
_DENSE = 100  # hyperparameters
_AUTO = 1_000  # up to which "auto" takes joint
_EVERY = 2  # steps of joint per sample of λ, as in a search
_STEPS = 8  # in a row, of each kind; a multiple of all `every`


def _modules(D: int) -> nn.Sequential:
    inputs, units = SHAPES[D]
    sizes = [(inputs, units), (units, units), (units, _CLASSES)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _batches(D: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_BATCH, SHAPES[D][0], generator=generator)
    return itertools.repeat((X, torch.randint(0, _CLASSES, (_BATCH,), generator=generator)))


def plain(D: int) -> Iterator[None]:
    """Training steps of a torch module."""
    module = _modules(D)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    for x, y in _batches(D):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
        yield


def search(algorithm: str, n: int, D: int) -> Iterator[Step]:
    """Steps of "joint, dense", "joint, own weights" or "implicit"."""
    shapes = [p.shape for p in _modules(D).parameters()]

    def loss(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """w (K, m, D) → (K, m)."""
        (x, y), models = batch, w.flatten(0, 1)
        for number, (W, shape) in enumerate(zip(models.split([s.numel() for s in shapes], 1), shapes, strict=True)):
            x = (torch.relu(x) if number else x) @ W.view(-1, *shape).transpose(1, 2)
        x = x.expand(len(models), -1, -1)
        rows = cross_entropy(x.flatten(0, 1), y.repeat(len(models)), reduction="none")
        return rows.view(*w.shape[:2], -1).mean(-1)

    def train_loss(w: Tensor, lam: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        groups = w.view(-1, n, D // n)
        strengths = lam.exp().repeat(len(w), 1) if len(w) > 1 else lam.exp()
        return loss(w, batch) + half_squares(strengths[..., None], groups).view(w.shape[:2])

    lam = torch.full((n,), -9.0)
    problem = Problem(train_loss, loss, _batches(D), _batches(D), torch.full((), -14.0), torch.full((), 2.0))
    groups = torch.arange(n).repeat_interleave(D // n)
    builder: Builder = Constant() if algorithm == "implicit" else Linear(local=algorithm != "joint, dense")
    w0 = torch.cat([p.detach().flatten() for p in _modules(D).parameters()])[None]
    hypernetwork = builder.build(w0, lam, Layout(torch.zeros(1, dtype=torch.long), [groups]))
    weights = torch.optim.Adam([hypernetwork.w0], lr=1e-3, fused=True)
    phi_optimizer = TangentOptimizer(hypernetwork, weights)
    lam_optimizer = torch.optim.Adam([lam], lr=0.05, betas=(0.9, 0.99), eps=1e-2)
    if algorithm != "implicit":
        generator = torch.Generator().manual_seed(0)
        yield from joint(
            problem, hypernetwork, lam, phi_optimizer, lam_optimizer, sigma=0.5, every=_EVERY, generator=generator
        )
    del w0, groups
    description = Implicit()
    adjoint = ImplicitAdjoint(description, torch.ones(n, dtype=torch.bool), hypernetwork, weights)
    train = partial(descend_w, problem, hypernetwork, phi_optimizer, lam)
    yield from alternate(problem, hypernetwork, lam, train, lam_optimizer, adjoint=adjoint, every=description.every)


ALGORITHMS = ("joint, dense", "joint, own weights", "implicit")


# --- the tables -------------------------------------------------------------------------------------------------------------


def measure_scaling(out: Path, repeats: int = 5, D: int = max(SHAPES), memory: bool = True) -> list[dict[str, Any]]:
    """Print, write to ``out/scaling.json`` and return a row for each n at one D, and for n = D.

    Parameters
    ----------
    out : Path
        Made if it is not there.
    repeats : int, default=5
        Rounds of plain and of search steps in turns; medians are reported.
    D : int, default=1,000,000
        A key of ``SHAPES``.
    memory : bool, default=True
        Whether it is measured, in a process for each row. Linux only.
    """
    cells = [(name, n, D) for n in SIZES if n <= D for name in ALGORITHMS if name != "joint, dense" or n <= _DENSE]
    cells += [("implicit", d, d) for d in SHAPES if d < D]
    rows = []
    print(f"{'':<20}{'n':>10}{'D':>10}{'step / plain':>14}{'ms':>8}{'copies':>8}")
    if memory:
        print(f"{'plain':<20}{'':>10}{D:>10,}{1:>14.2f}{'':>8}{_copies('plain', 1, D):>8.1f}")
    for name, n, d in cells:
        ratio, seconds = _seconds(name, n, d, repeats)
        copies = _copies(name, n, d) if memory else None
        auto = name == ("joint, own weights" if n <= _AUTO else "implicit")
        shown = "" if copies is None else f"{copies:.1f}"
        print(
            f"{name:<20}{n:>10,}{d:>10,}{ratio:>14.2f}{1e3 * seconds:>8.1f}{shown:>8}{'  auto' if auto else ''}",
            flush=True,
        )
        rows.append(
            {"algorithm": name, "n": n, "D": d, "ratio": ratio, "seconds": seconds, "copies": copies, "auto": auto}
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps(rows, indent=1))
    return rows


def _seconds(algorithm: str, n: int, D: int, repeats: int) -> tuple[float, float]:
    """Of a search step: plain steps, and seconds."""
    streams = plain(D), search(algorithm, n, D)
    found = np.array([[_of_steps(stream) for stream in streams] for _ in range(repeats + 1)])[1:]  # the first warms up
    return float(np.median(found[:, 1] / found[:, 0])), float(np.median(found[:, 1]))


def _of_steps(stream: Iterator[Any]) -> float:
    start = time.perf_counter()
    for _ in itertools.islice(stream, _STEPS):
        pass
    return (time.perf_counter() - start) / _STEPS


def _copies(algorithm: str, n: int, D: int) -> float:
    command = [sys.executable, "-m", "benchmarks.scaling", algorithm, str(n), str(D)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=RETURNING).stdout)


def _copies_of_the_model(algorithm: str, n: int, D: int) -> float:
    """What steps add to this process, at its peak, in copies of the model. Linux only."""
    small = min(SHAPES)
    streams: Callable[[int], Iterator[Any]] = (
        plain if algorithm == "plain" else lambda d: search(algorithm, min(n, d), d)
    )
    _of_steps(streams(small))  # what the libraries need
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kilobytes("VmHWM")
    _of_steps(streams(D))
    return (_kilobytes("VmHWM") - before) * 1024 / (4 * D)


if __name__ == "__main__":
    print(_copies_of_the_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
