"""Every algorithm's hypergradient at a fixed λ, against the exact one: cosine, and ratio of lengths.

=============  ===================================================================  =========================================
problem        hyperparameters                                                      the exact hypergradient
=============  ===================================================================  =========================================
ridge          one L2 per weight of 8 weights                                       closed form
logistic       one L2 per feature of 20 features, 500 rows                          Newton until converged, and a dense solve
linear         one L2 per weight of a 64-10 (digits) or 784-10 (MNIST) linear model   closed form, ten dense solves
mlp            one L2 per layer of a tanh network on wine                           central differences of retrained networks
=============  ===================================================================  =========================================

λ is the logarithm of the L2. All is full batch and in float64. Each algorithm trains its own weights, from the same initial ones
and with the same optimizer, at a λ̂ that is held still; what it would then move λ̂ by is compared. "simplified" is not among them:
it learns from the movement of λ̂ alone.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracles import Case, linear, logistic, mlp, ridge
from hypertune.algorithms import Step, descend_w, joint
from hypertune.hypergradients import T1T2, Forward, Hybrid, Implicit, Unrolled, alternate
from hypertune.hypernetworks import Builder, Constant, Hypernetwork, Linear
from hypertune.implicit import ImplicitAdjoint, T1T2Adjoint
from hypertune.response_optimizers import TangentOptimizer
from hypertune.unrolled import Recorder, Tangent, Unroller

Row = dict[str, Any]

_SIGMA = 0.5  # of λ ~ N(λ̂, σ²), the default of a search
_NEWTON = 40  # steps, where each is one of Newton's method
_FEW = 100  # hyperparameters for which forward mode is tried


def algorithms(case: Case) -> dict[str, tuple[Any, Builder]]:
    """What is compared: "joint" or a description, and what it learns of the response."""
    n, D = len(case.lam), len(case.w0)
    dense: Builder = Linear(local=False)
    nothing: Builder = Constant()
    names: dict[str, tuple[Any, Builder]] = {
        "joint": ("joint", dense),
        "joint, each weight's own": ("joint", Linear()),
        "hybrid, 5 steps": (Hybrid(), dense),
        "implicit, as in a search": (Implicit(), nothing),
        "implicit, cg": (Implicit("cg", 200, math.inf, tolerance=1e-9), nothing),
        "implicit, neumann": (Implicit("neumann", min(2_000, case.steps), math.inf), nothing),
        "implicit, nystrom": (Implicit("nystrom", min(D, 200)), nothing),
        "implicit, newton inside": (Implicit("cg", 50, math.inf, inner="newton"), nothing),
        "t1t2": (T1T2(), nothing),
        "unrolled, 20 steps": (Unrolled(20), nothing),
        "unrolled, converged": (Unrolled(min(1_000, case.steps)), nothing),
        "forward": (Forward(), dense),
    }
    if n != D:
        del names["joint, each weight's own"]
    if not case.convex:
        del names["implicit, newton inside"]
    if n > _FEW:
        del names["forward"]
    return names


def hypergradient(case: Case, algorithm: Any, builder: Builder) -> Tensor:
    """What an algorithm would move λ̂ by (n,) after ``case.steps`` steps at a λ̂ that is held."""
    lam_hat = case.lam.clone()
    hypernetwork = builder.build(case.w0[None], lam_hat, case.layout())
    weights = case.optimizer([hypernetwork.w0])
    held = torch.optim.SGD([lam_hat], lr=0.0)
    steps = _NEWTON if getattr(algorithm, "inner", None) == "newton" else case.steps
    for _ in itertools.islice(_stream(case, algorithm, hypernetwork, weights, lam_hat, held, steps), steps):
        pass
    assert lam_hat.grad is not None
    return lam_hat.grad


def _stream(
    case: Case,
    algorithm: Any,
    hypernetwork: Hypernetwork,
    weights: torch.optim.Optimizer,
    lam_hat: Tensor,
    held: torch.optim.Optimizer,
    steps: int,
) -> Iterator[Step]:
    problem, phi_optimizer = case.problem(), TangentOptimizer(hypernetwork, weights)
    every = torch.ones(len(lam_hat), dtype=torch.bool)
    last: dict[str, Any] = {"warmup": steps - 1}  # one hypergradient, at the last step
    plain = partial(descend_w, problem, hypernetwork, phi_optimizer, lam_hat)
    match algorithm:
        case "joint" | Hybrid():
            unroll = None if algorithm == "joint" else Unroller(every, hypernetwork, weights, algorithm.steps)
            generator = torch.Generator().manual_seed(0)
            return joint(
                problem, hypernetwork, lam_hat, phi_optimizer, held, sigma=_SIGMA, generator=generator, unroll=unroll, **last
            )  # fmt: skip
        case T1T2():
            adjoint = T1T2Adjoint(every)
            return alternate(problem, hypernetwork, lam_hat, plain, held, adjoint=adjoint, **last)
        case Implicit():
            by = ImplicitAdjoint(algorithm, every, hypernetwork, weights)
            if algorithm == Implicit():  # it goes on from one move of λ̂ to the next
                last = {"warmup": steps // 3, "every": algorithm.every}
            descend = partial(by.newton, problem, lam_hat) if algorithm.inner == "newton" else plain
            return alternate(problem, hypernetwork, lam_hat, descend, held, adjoint=by, **last)
        case Unrolled(k):
            recorder = Recorder(hypernetwork, phi_optimizer, k)
            carry = partial(recorder.step, problem, lam_hat)
            return alternate(problem, hypernetwork, lam_hat, carry, held, unroll=recorder, **last)
        case Forward():
            carry = partial(Tangent(hypernetwork, phi_optimizer).step, problem, lam_hat)
            return alternate(problem, hypernetwork, lam_hat, carry, held, **last)
    raise ValueError(algorithm)


# --- the table --------------------------------------------------------------------------------------------------------------


def measure_hypergradients(out: Path, directory: str | None = None, steps: int = 3_000) -> list[Row]:
    """Print, write to ``out/hypergradients.json`` and return a row for each problem and algorithm.

    Parameters
    ----------
    out : Path
        Made if it is not there.
    directory : str, optional
        Folder of MNIST's files, for 784 inputs rather than 64.
    steps : int, default=3000
        Training steps of every algorithm.
    """
    rows: list[Row] = []
    of_digits = partial(linear, directory=directory)
    problems: dict[str, Callable[[int], Case]] = {"ridge": ridge, "logistic": logistic, "linear": of_digits, "mlp": mlp}
    for name, make in problems.items():
        case = make(steps)
        n, D = len(case.lam), len(case.w0)
        print(f"\n{name}: {n:,} hyperparameters, {D:,} weights\n{'':<28}{'cosine':>8}{'length':>8}{'seconds':>9}")
        for label, (algorithm, builder) in algorithms(case).items():
            start = time.perf_counter()
            found = hypergradient(case, algorithm, builder)
            seconds = time.perf_counter() - start
            cosine = float(torch.cosine_similarity(found, case.exact, dim=0))
            length = float(found.norm() / case.exact.norm())
            print(f"{label:<28}{cosine:>8.4f}{length:>8.3f}{seconds:>9.2f}", flush=True)
            rows.append(
                {
                    "problem": name,
                    "n": n,
                    "D": D,
                    "algorithm": label,
                    "cosine": cosine,
                    "length": length,
                    "seconds": seconds,
                }
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / "hypergradients.json").write_text(json.dumps(rows, indent=1))
    return rows
