"""What a user's module can do, found out by running it on a few rows, once and before any training.

What is found is noted on the :class:`hypertune.stacked.StackedModule` itself.

>>> stacked = StackedModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
>>> examine(stacked, torch.zeros(5, 3), {})
>>> stacked.stacked, stacked.first, stacked.cost
(True, '0', 26)
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils.flop_counter import FlopCounterMode

from hypertune.calls import Step, layers_called
from hypertune.modules import OF_EVERY_MODULE
from hypertune.randomness import rng_state, set_rng_state
from hypertune.recurrent import TensorRecurrent
from hypertune.stacked import StackedModule

_CONTAINERS = (list, tuple, dict, deque)
_CONVOLVED = 1_000_000  # multiplications for a row: beyond it each fold had better be trained by itself, on a CPU
_IN_TURN = (
    50_000  # the same of a pass with convolutions of images: beyond it vmap is slower than one model after the other
)
# What is better one after the other sooner: steps through a sequence (torch's own LSTM is the fastest of them), and attention.
_RECURRENT, _LSTM, _ATTENTION = 400_000, 40_000, 250_000
_LOOKED_AT = 8  # columns
_AWAY = 0.01  # of the initial weights


def examine(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> None:
    """Find out ``first``, ``cost``, which buffers and plain attributes training writes into, and whether M models share one pass, or had better go in turn.

    Where the module does not work under vmap, models run one after the other, with a warning; where that is only faster, without one.

    Parameters
    ----------
    stacked : StackedModule
    x : Tensor of shape (B, ...)
        A few rows.
    values : mapping from str to float
        A setting of the tuned hyperparameters.
    """
    _run_as_called(stacked, x, values)
    if (layers := stacked.layers[False]) is not None:  # these are not called, but run
        stacked.first = next((name for name, layer in layers if isinstance(layer, nn.Linear)), "")
    else:
        stacked.first = _first_called(stacked, x, values)
    noise = rng_state(x.device)
    stacked.cost = max(stacked.D, _multiplications(stacked, x, values))
    set_rng_state(noise, x.device)
    run = partial(_run, stacked, x, values, noise)
    if stacked.statistics or stacked.layers[True] is None:
        trained, before = run(1, True).stacked, stacked.with_statistics_of(1, 1).statistics
        stacked.keep_statistics_of_those([k for k, b in trained.statistics.items() if not _same(before[k], b)])
        if _changes_attributes(trained):
            stacked.keep_memories()
    if stacked.layers[True] is None and stacked.cost > _most_together(stacked, x.device):
        stacked.stacked = False
        return
    try:
        for training in (True, False):
            _compare(run, training, noise, x.device)
        convolves = any(isinstance(sub, (nn.Conv2d, nn.Conv3d)) for sub in stacked.fresh.modules())
        stacked.in_turn = convolves and x.device.type == "cpu" and stacked.cost > _IN_TURN
    except Exception as error:
        stacked.stacked = False
        why = (str(error).partition(" We don't support")[0].splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"The folds are trained one after the other: {type(stacked.modules[True]).__name__} does not work under "
            f"torch.func.vmap ({why}). What does not: packed or unbatched sequences, subclasses of torch's recurrent layers, branches that depend on values, F.dropout with a tuned "
            "rate (nn.Dropout does).",
            UserWarning,
            stacklevel=2,
        )


def reads_in_eval_mode(stacked: StackedModule, x: Tensor, keyword: str, values: Sequence[float]) -> bool:
    """Whether the outputs for rows x (B, ...) in eval mode depend on a factory keyword's value."""
    w, noise = stacked.initial_weights(), rng_state(x.device)
    w, found = w + 0.1 * torch.randn_like(w), []  # a layer may begin with zeros
    for value in values:
        set_rng_state(noise, x.device)
        found.append(_outputs(stacked, x, {keyword: float(value)}, w))
    return any(not _same(found[0], other) for other in found[1:])


def sees_features(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> bool:
    """Whether column (or channel) j of what enters the layer ``first`` is feature (or channel) j of the rows x (B, ...), maybe normalised.

    Some columns are shuffled, one after the other: their own must change most. What cannot be told so is taken for the features.
    """
    if stacked.layers[False] is not None:
        return True
    layer, columns = stacked.modules[False].get_submodule(stacked.first), x.shape[1]
    noise = rng_state(x.device)

    def entering(rows: Tensor) -> Any:
        """What the layer is called with; None where it is not called for these rows."""
        seen: list[Any] = []
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.extend([*args, *kwargs.values()][:1]), with_kwargs=True
        )
        try:
            set_rng_state(noise, x.device)
            _outputs(stacked, rows, values)
        finally:
            hook.remove()
        return seen[0] if seen else None

    before = entering(x)
    if before is None:
        return True
    if isinstance(layer, nn.Embedding) or before.numel() != x.numel():
        return False
    for j in np.unique(np.linspace(0, columns - 1, _LOOKED_AT).astype(int)):
        rows = x.clone()
        rows[:, j] = rows[:, j].roll(1, dims=0)
        if (after := entering(rows)) is None:
            continue
        moved = (after - before).abs().reshape(x.shape).transpose(0, 1).flatten(1).sum(1)
        if moved[j] < moved.max():
            return False
    return True


@torch.no_grad()
def _outputs(stacked: StackedModule, x: Tensor, values: Mapping[str, float], w: Tensor | None = None) -> Tensor:
    """Of one model in eval mode, for rows x (B, ...), with weights w (D,) or its own: (1, B, ...)."""
    named = stacked.named((stacked.initial_weights() if w is None else w)[None])
    return stacked.outputs(named, x[None], values, training=False, fold=0)


def _run_as_called(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> None:
    """Have the module run as plain layers, if it calls nothing else, and these give the same outputs and gradients."""
    if stacked.layers[True] is not None or stacked.inputs is not None or stacked.statistics:
        return
    noise = rng_state(x.device)
    with suppress(Exception):  # whatever a module does not bear to be watched at
        stacked.run_as(_calls(stacked, x, values))
    set_rng_state(noise, x.device)


def _calls(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> dict[bool, list[Step]] | None:
    """The plain layers that the module calls in training and in eval mode; None if it does anything else."""
    calls, alone, probe = {}, {}, stacked.with_statistics_of(1, 1)
    w = _away_from(stacked.initial_weights())[None].requires_grad_()
    rates = {k: w.new_tensor(v) for k, v in values.items()}  # as tensors, so that what depends on them is seen

    def run(training: bool) -> Tensor:
        named = {k: p[0] for k, p in probe.named(w).items()}
        alone[training] = probe.forward(named, rates, x.clone(), {}, training=training)
        return alone[training]

    for training, module in probe.modules.items():
        if (steps := layers_called(module, partial(run, training))) is None:
            return None
        calls[training] = steps
    if not {r.path for found in stacked.reach.values() for r in found} <= {*calls[True]}:
        return None
    probe.run_as(calls)
    for training, outputs in alone.items():
        other = probe.outputs(probe.named(w), x[None], {k: v[None] for k, v in rates.items()}, training=training)[0]
        pairs = [(out, *torch.autograd.grad(out.square().sum(), w)) for out in (outputs, other)]
        if not all(_close(one.detach(), other.detach()) for one, other in zip(*pairs, strict=True)):
            return None
    return calls


# --- what is called, and what it costs --------------------------------------------------------------------------------------


def _first_called(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> str:
    """The name of the layer with weights that is called first; empty if that is the module itself, or none is."""
    called: list[str] = []
    layers = [
        (path, sub)
        for path, sub in stacked.modules[False].named_modules()
        if {name for name, _ in sub.named_children()} <= {"parametrizations"}
        and any(p.dim() > 1 for p in sub.parameters())
    ]
    hooks = [layer.register_forward_pre_hook(lambda *_, path=path: called.append(path)) for path, layer in layers]
    try:
        _outputs(stacked, x, values)
    finally:
        for hook in hooks:
            hook.remove()
    return next(filter(None, called), "")


def _multiplications(stacked: StackedModule, x: Tensor, values: Mapping[str, float]) -> int:
    """By weights, for one row, as far as they can be counted: not where a forward differentiates."""
    counter = FlopCounterMode(display=False)
    with suppress(Exception), _step_by_step(stacked), counter:
        _outputs(stacked, x, values)
    return int(counter.get_total_flops() // (2 * len(x)))


@contextmanager
def _step_by_step(stacked: StackedModule) -> Iterator[None]:
    """In eval mode without the fused kernels of recurrent layers, in which nothing can be counted."""
    for layer in _recurrent(stacked):
        layer.fused = False
    try:
        yield
    finally:
        for layer in _recurrent(stacked):
            layer.fused = True


def _recurrent(stacked: StackedModule) -> list[TensorRecurrent]:
    return [sub for sub in stacked.modules[False].modules() if isinstance(sub, TensorRecurrent)]


def _most_together(stacked: StackedModule, device: torch.device) -> float:
    """Multiplications for a row beyond which models are faster one after the other."""
    if recurrent := _recurrent(stacked):
        return _LSTM if any(isinstance(sub, nn.LSTM) for sub in recurrent) else _RECURRENT
    if device.type != "cpu":
        return math.inf
    attends = any(isinstance(sub, nn.MultiheadAttention) for sub in stacked.fresh.modules())
    return _ATTENTION if attends else max(_CONVOLVED, 4 * stacked.D)


# --- two models in one pass are what each is alone --------------------------------------------------------------------------


class _Run(NamedTuple):
    """M copies of a module after a pass, their outputs (M, B, ...), and the gradient (M, D) of the outputs' squares."""

    stacked: StackedModule
    outputs: Tensor
    gradient: Tensor


def _run(
    stacked: StackedModule, x: Tensor, values: Mapping[str, float], noise: Any, models: int, training: bool
) -> _Run:
    """So many of the same, under the same random numbers."""
    module = stacked.with_statistics_of(1, models)
    w = _away_from(stacked.initial_weights()).expand(models, -1).clone().requires_grad_()
    set_rng_state(noise, x.device)
    rates = {k: w.new_tensor([v] * models) for k, v in values.items()} if models > 1 else values
    outputs = module.outputs(module.named(w), x.expand(models, *x.shape), rates, training=training)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), w)
    return _Run(module, outputs.detach(), gradient)


def _away_from(w: Tensor) -> Tensor:
    """Near where layers begin: zeros of a bias under zeros of an image are on the kink of a ReLU, and either slope is right there."""
    return w + _AWAY * torch.randn(w.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(w)


def _compare(run: Callable[[int, bool], _Run], training: bool, noise: Any, device: torch.device) -> None:
    """Raise if two models in one pass are not what each is alone."""
    one = run(1, training)
    drew = device.type != "cpu" and not _same_state(noise, rng_state(device))
    two = run(2, training)
    if name := _replaced(two.stacked):
        raise RuntimeError(f"it replaces a tensor of its own, {name!r}: make that a buffer")
    if drew:  # vmap draws by other kernels there
        return
    buffers = [(one.stacked.statistics[k], b) for k, b in two.stacked.statistics.items()]
    for alone, both in [*buffers, (one.outputs, two.outputs), (one.gradient, two.gradient)]:
        torch.testing.assert_close(both, alone.expand_as(both), **_near(alone), equal_nan=True)  # type: ignore[arg-type]


def _replaced(stacked: StackedModule) -> str:
    """The name of a plain attribute, if there is one, that a stacked pass put a tensor for all models in."""
    for path, sub in stacked.fresh.named_modules():
        now = vars(stacked.modules[True].get_submodule(path))
        for name, before in vars(sub).items():
            may_hold = before is None or isinstance(before, (int, float, Tensor, *_CONTAINERS))
            if name in OF_EVERY_MODULE or not may_hold:
                continue
            if any(is_batchedtensor(t) for t in _tensors(now.get(name))):
                return name
    return ""


def _changes_attributes(stacked: StackedModule) -> bool:
    """Whether a pass has changed plain attributes: to another number, or to a tensor of other values."""
    for (path, name), now in stacked.changes().items():
        before = vars(stacked.fresh.get_submodule(path)).get(name)
        if not (isinstance(now, Tensor) and isinstance(before, Tensor)):
            return True
        alike = now.shape == before.shape and now.dtype == before.dtype and now.device == before.device
        if not alike or now.layout != torch.strided or not _same(now, before):
            return True
    return False


def _tensors(value: Any, depth: int = 2) -> list[Tensor]:
    """A tensor, or those in a container, or in one inside it."""
    if not isinstance(value, _CONTAINERS):
        return [value] if isinstance(value, Tensor) else []
    inside = value.values() if isinstance(value, dict) else value
    return [t for one in inside for t in _tensors(one, depth - 1)] if depth else []


def _same_state(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    return all(a is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, **_near(one), equal_nan=True)


def _near(one: Tensor) -> dict[str, float]:
    return {"rtol": 1e-3, "atol": 1e-3 * float(one.abs().max()) + 1e-6}


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
