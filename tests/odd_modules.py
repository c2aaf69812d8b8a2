"""Modules, optimizers and penalties that do odd things, and rows to train them on."""

from __future__ import annotations

import functools
import types
from collections import deque
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.model_selection import KFold, ShuffleSplit
from torch import nn
from torch.utils.checkpoint import checkpoint

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, model_factory

_rng = np.random.default_rng(0)
X = np.column_stack([_rng.normal(size=(90, 3)), _rng.integers(0, 4, (90, 2))])
y = (X[:, 0] + X[:, 1] + 0.5 * _rng.normal(size=90) > 0).astype(int)
DECAY = {"weight_decay": loguniform(1e-4, 1e1)}
NET = TorchClassifier(dtype="float64", max_epochs=4, batch_size=16, random_state=7, lr=1e-2)
CODES = {"num": [0, 1, 2], "code": [3, 4]}


ONE_SPLIT = ShuffleSplit(1, test_size=0.3, random_state=0)  # one fold alone has no other that counts, too


def search(space: Any = DECAY, **params: Any) -> HyperTrainingSearchCV:
    return HyperTrainingSearchCV(
        clone(NET).set_params(**params), space, cv=KFold(3), random_state=0, scoring="neg_log_loss", hyper_lr=0.3,
        error_score="raise",
    )  # fmt: skip


class Padded(nn.Module):
    """vmap forgets the padding row."""

    def __init__(self, widths: dict[str, int], m: int):
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 3, padding_idx=0), nn.Linear(widths["num"] + 3, m)

    def forward(self, num, code):
        return self.out(torch.cat([num, self.embed(code.long()).sum(1)], 1))


class RandomFeatures(nn.Module):
    """A tensor that is no buffer."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.B, self.out = torch.randn(n, 16, dtype=torch.float64), nn.Linear(16, m)

    def forward(self, x):
        return self.out(torch.cos(x @ self.B))


class Shuffled(nn.Linear):
    def __init__(self, n: int, m: int):
        super().__init__(n, m)
        self.order = torch.randperm(n).tolist()

    def forward(self, x):
        return super().forward(x[:, self.order] * torch.arange(x.shape[1]))


class ScaledStart(nn.Sequential):
    """The tuned rate has a say in the initial weights."""

    def __init__(self, n: int, m: int, *, dropout: float = 0.1):
        super().__init__(nn.Linear(n, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, m))
        nn.init.normal_(self[0].weight, std=0.5 * (1 - dropout))


class InAList(nn.Module):
    """Layers that a list of the module's own holds, too."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, 8), nn.Linear(8, 8)])
        self.drops = nn.ModuleList([nn.Dropout(0.3), nn.Dropout(0.3)])
        self.pairs, self.out = list(zip(self.layers, self.drops, strict=True)), nn.Linear(8, m)

    def forward(self, x):
        for layer, drop in self.pairs:
            x = drop(torch.relu(layer(x)))
        return self.out(x)


class WritesIntoItsRows(nn.Linear):
    def forward(self, x):
        x -= 1.0
        return super().forward(x)


class Temperature(nn.Linear):
    """A parameter of no dimension."""

    def __init__(self, n: int, m: int):
        super().__init__(n, m)
        self.t = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.t * super().forward(x)


class Recomputed(nn.Module):
    def __init__(self, n: int, m: int):
        super().__init__()
        self.hidden, self.out = nn.Sequential(nn.Linear(n, 8), nn.Tanh()), nn.Linear(8, m)

    def forward(self, x):
        return self.out(checkpoint(self.hidden, x, use_reentrant=False))


class TwoInputs(nn.Module):
    def __init__(self, widths: dict[str, int], m: int):
        super().__init__()
        self.out = nn.Linear(sum(widths.values()), m)

    def forward(self, num, code):
        return self.out(torch.cat([num, code], 1))


class Counts(nn.Sequential):
    """A state that is a number."""

    def __init__(self, n: int, m: int):
        super().__init__(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, m))
        self.t = 0

    def forward(self, x):
        self.t += self.training
        return super().forward(x) * (1 + 1 / (1 + 0.1 * self.t))


class CountsWithNorm(nn.Module):
    """Running statistics are settled after the training, which is none."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.t, self.norm, self.out = 0, nn.BatchNorm1d(n), nn.Linear(n, m)

    def forward(self, x):
        self.t += self.training
        return self.out(self.norm(x)) * (1 + 1 / (1 + 0.1 * self.t))


class CountsAlone(Counts):
    """The same, and it does not work under vmap."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


class RemembersAMean(nn.Module):
    """A tensor that is a plain attribute, and another one for every model."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.mean, self.out = torch.zeros(n, dtype=torch.float64), nn.Linear(n, m)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.out(x + 1 - self.mean)


class BeginsWithNothing(nn.Module):
    """A mean and a count that are None before the first minibatch, and another number that comes with it."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.mean, self.t, self.out = None, None, nn.Linear(n, m)

    def forward(self, x):
        if self.training:
            new = x.detach().mean(0)
            self.mean = new if self.mean is None else 0.9 * self.mean + 0.1 * new
            self.t = 1 if self.t is None else self.t + 1
            self.late = getattr(self, "late", 0) + 1
        return self.out(x if self.mean is None else x - self.mean) * (1 + 1 / (1 + getattr(self, "late", 0)))


class BecomesATensor(nn.Module):
    """A number that is one of every model's own after the first minibatch."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.scale, self.out = 1.0, nn.Linear(n, m)

    def forward(self, x):
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean()
        return self.out(x / self.scale)


class Modal(nn.Module):
    """What its own train() sets is no state of the training."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.t, self.noisy, self.out = 0, True, nn.Linear(n, m)

    def train(self, mode: bool = True):
        super().train(mode)
        self.noisy = mode
        return self

    def forward(self, x):
        self.t += self.training
        return self.out(0.5 * x if self.noisy else x) * (1 + 1 / (1 + 0.1 * self.t))


class Ticks(nn.Module):
    """A count that is written into, and that a layer has, too."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.step, self.out, self.gate = torch.zeros(()), nn.Linear(n, m), Gate()
        self.gate.step = self.step

    def forward(self, x):
        if self.training:
            self.step += 1
        return self.gate(self.out(x))


class Gate(nn.Module):
    def forward(self, x):
        return x * (1 + 1 / (1 + self.step))


class CountsEverything(Counts):
    """In eval mode, too, which is no training."""

    def forward(self, x):
        self.t += not self.training
        return super().forward(x)


class Cold(nn.Module):
    """Its temperature falls at the fifth minibatch for the first time."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.own, self.temperature, self.out = {"t": 0}, 3.0, nn.Linear(n, m)

    def forward(self, x):
        if self.training:
            self.own["t"] += 1
            self.temperature *= 0.8 if self.own["t"] % 5 == 0 else 1.0
        return self.out(x) / self.temperature


class Constants(nn.Module):
    """Plain tensors: a sparse one, and one whose dtype changes."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.sparse, self.last, self.out = torch.eye(n).to_sparse(), torch.zeros(n), nn.Linear(n, m)

    def forward(self, x):
        self.last = torch.ones(x.shape[1], dtype=x.dtype)
        return self.out(x * self.last)


class CountsLate(Counts):
    """It changes its mind long after the first step, and long before all trainings of a search are done."""

    def forward(self, x):
        self.t += self.training
        return nn.Sequential.forward(self, x) * (1 + (self.t > 10))


class CountsInADict(Counts):
    def __init__(self, n: int, m: int):
        super().__init__(n, m)
        self.state = {"step": 0}

    def forward(self, x):
        self.state["step"] += self.training
        return nn.Sequential.forward(self, x) * (1 if self.state["step"] <= 35 else 3)


class Cools(nn.Module):
    """A temperature that falls in training, and is part of the prediction."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.hidden, self.out, self.temperature = nn.Linear(n, 8), nn.Linear(8, m), 5.0
        self.p = 0  # a name that dropout has, too

    def forward(self, x):
        self.temperature *= 0.98 if self.training else 1.0
        self.p += self.training
        return self.out(torch.softmax(self.hidden(x) / self.temperature, 1))


class MovingMean(nn.Module):
    """A tensor that training replaces, and that is no buffer."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.hidden, self.out, self.mean = nn.Linear(n, 8), nn.Linear(8, m), torch.zeros(8, dtype=torch.float64)

    def forward(self, x):
        hidden = torch.relu(self.hidden(x))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.out(hidden - self.mean)


class Remembers(nn.Module):
    """What it saw last is no state of it."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(n, 8), nn.Linear(8, m)

    def forward(self, x):
        self.seen = torch.relu(self.hidden(x))
        return self.out(self.seen)


class Shared(nn.Module):
    """A layer under two names, one of them inside another module."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.shared = nn.Linear(n, n)
        self.first = nn.Sequential(self.shared, nn.ReLU(), nn.Dropout(0.1))
        self.second, self.out = nn.Sequential(self.shared, nn.Tanh()), nn.Linear(n, m)

    def forward(self, x):
        return self.out(self.second(self.first(x)))


def clipped(params, lr):
    for p in params:
        p.register_hook(lambda g: g * (0.05 / g.norm()).clamp(max=1))
    return torch.optim.SGD(params, lr=lr)


def clipped_by_its_own_step(params, lr):
    optimizer = torch.optim.SGD(params, lr=lr)

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.05)
        return type(self).step(self)

    optimizer.step = types.MethodType(step, optimizer)
    return optimizer


def clipped_around_its_step(params, lr):
    optimizer = torch.optim.SGD(params, lr=lr)
    inner = optimizer.step

    @functools.wraps(type(optimizer).step)
    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.05)
        return inner()

    optimizer.step = types.MethodType(step, optimizer)
    return optimizer


class Curriculum:
    """An augmentation that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, generator, spread=0.1):
        self.calls += 1
        spread = spread if self.calls < 12 else 10 * spread
        return x * (1 + spread * torch.randn(len(x), 1, generator=generator, dtype=x.dtype))


class CountedPenalty:
    """Grows with its calls."""

    def __init__(self):
        self.calls = 0

    def growing(self, weights, strength=0.01):
        self.calls += 1
        return strength * (0.0 if self.calls < 12 else 1.0) * weights["1.weight"].square().sum()


class Queue(nn.Module):
    """Tensors in a container."""

    def __init__(self, n: int, m: int, kind: Any = list):
        super().__init__()
        self.hidden, self.out, self.queue = nn.Linear(n, 8), nn.Linear(8, m), kind()

    def forward(self, x):
        h = torch.relu(self.hidden(x))
        if self.training:
            h = h + 0.5 * torch.stack([*self.queue, torch.zeros_like(h[0])]).mean(0)
            self.queue.append(h.detach().mean(0))
            self.queue = type(self.queue)(list(self.queue)[-4:])
        return self.out(h)


class Energy(nn.Module):
    """A gradient inside the forward pass."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(n, 8), nn.Linear(n, m)

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(self.hidden(z)).sum(), z, create_graph=True)
        return self.out(force)


def random_penalty(weights, strength=0.01):
    matrix = weights["1.weight"]
    return strength * (matrix @ torch.randn(matrix.shape[1], dtype=matrix.dtype)).square().sum()


class DrawnByNumpy(RandomFeatures):
    def __init__(self, n: int, m: int):
        super().__init__(n, m)
        self.B = torch.from_numpy(np.random.default_rng().normal(size=(n, 16)))


class Reweighted(nn.Module):
    """A criterion with weights of classes from some call on (Cao et al. 2019, deferred re-weighting)."""

    def __init__(self, after: int, *, in_a_buffer: bool):
        super().__init__()
        self.after, self.in_a_buffer, self.calls = after, in_a_buffer, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, outputs, targets):
        self.seen += self.in_a_buffer
        self.calls += not self.in_a_buffer
        late = float(self.seen) + self.calls > self.after
        return nn.functional.cross_entropy(outputs, targets, torch.tensor([1.0, 9.0]).to(outputs) if late else None)


class Ramp:
    """A penalty that grows with the number of its calls, which it keeps where it is told."""

    def __init__(self, calls: Any):
        self.state = calls

    def __call__(self, weights, strength=0.1):
        self.state[0] += 1
        return strength * min(1.0, float(self.state[0]) / 20) * weights["1.weight"].square().sum()


class Smoothed:
    """A criterion with a moving mean that it writes into a tensor's data, or puts in its place."""

    __slots__ = ("data", "mean")

    def __init__(self, data: bool):
        self.data, self.mean = data, torch.zeros(())

    def __call__(self, outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        if self.data:
            self.mean.data.add_(0.1)
        else:
            self.mean = self.mean + 0.1
        return loss * (1 + float(self.mean > 1.5))


class Anchored:
    """A penalty on the distance from a moving mean of the weights, which begins at the first ones."""

    def __init__(self):
        self.mean = None

    def __call__(self, weights, strength=0.1):
        w = weights["1.weight"]
        self.mean = w.detach().clone() if self.mean is None else self.mean
        self.mean.data.mul_(0.9).add_(w.detach(), alpha=0.1)
        return strength * (w - self.mean).square().sum() + 0.1 * (w * self.mean).sum()


class Caches:
    """A criterion that puts something by in its first call, and is the same in each."""

    def __init__(self):
        self.weight = {}

    def __call__(self, outputs, targets):
        self.weight.setdefault(outputs.device, torch.tensor([1.0, 3.0]).to(outputs))
        return nn.functional.cross_entropy(outputs, targets, self.weight[outputs.device])


def ramp_in_a_closure() -> Any:
    calls = [0]

    def ramp(x, generator, spread=0.1):
        calls[0] += 1
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return torch.cat([x[:, :3] + min(1.0, calls[0] / 20) * spread * noise[:, :3], x[:, 3:]], dim=1)

    return ramp


ODD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padding": ({"module": Padded, "inputs": CODES}, DECAY),
    "random features": ({"module": RandomFeatures}, DECAY),
    "random order": ({"module": Shuffled}, DECAY),
    "scaled start": ({"module": model_factory(ScaledStart)}, {"module__dropout": uniform(0, 0.8)}),
    "in a list": ({"module": InAList}, DECAY),
    "writes": ({"module": WritesIntoItsRows}, DECAY),
    "temperature": ({"module": Temperature}, DECAY),
    "checkpoint": ({"module": Recomputed}, DECAY),
    "codes in one fold": ({"module": TwoInputs, "inputs": CODES, "input_noise": 0.5, "mixup": 0.5}, DECAY),
    "counts": ({"module": Counts}, DECAY),
    "counts late": ({"module": CountsLate}, DECAY),
    "counts alone": ({"module": CountsAlone}, DECAY),
    "counts with a norm": ({"module": CountsWithNorm}, DECAY),
    "remembers a mean": ({"module": RemembersAMean}, DECAY),
    "begins with nothing": ({"module": BeginsWithNothing}, DECAY),
    "becomes a tensor": ({"module": BecomesATensor}, DECAY),
    "modal": ({"module": Modal}, DECAY),
    "ticks": ({"module": Ticks}, DECAY),
    "counts everything": ({"module": CountsEverything}, DECAY),
    "constants": ({"module": Constants}, DECAY),
    "remembers": ({"module": Remembers}, DECAY),
    "shared": ({"module": Shared}, DECAY),
    "counts in a dict": ({"module": CountsInADict}, DECAY),
    "cools": ({"module": Cools}, DECAY),
    "moving mean": ({"module": MovingMean}, DECAY),
    "clipped": ({"module": MLP((8,)), "optimizer": clipped, "lr": 0.5}, DECAY),
    "clipped by its own step": ({"module": MLP((8,)), "optimizer": clipped_by_its_own_step, "lr": 0.5}, DECAY),
    "clipped around its step": ({"module": MLP((8,)), "optimizer": clipped_around_its_step, "lr": 0.5}, DECAY),
    "growing penalty": (
        {"module": MLP((8,)), "penalty": CountedPenalty().growing},
        {"penalty__strength": loguniform(1e-2, 1e2)},
    ),
    "queue, deque": ({"module": functools.partial(Queue, kind=deque)}, DECAY),
    "curriculum": ({"module": MLP((8,)), "augment": Curriculum()}, {"augment__spread": uniform(0, 0.5)}),
    "queue": ({"module": Queue}, DECAY),
    "energy": ({"module": Energy}, DECAY),
    "class weights": (
        {"module": MLP((8,)), "criterion": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))},
        DECAY,
    ),
    "deferred weights": ({"module": MLP((8,)), "criterion": Reweighted(12, in_a_buffer=False)}, DECAY),
    "deferred weights, a buffer": ({"module": MLP((8,)), "criterion": Reweighted(12, in_a_buffer=True)}, DECAY),
    "ramp in a list": ({"module": MLP((8,)), "penalty": Ramp([0])}, DECAY),
    "ramp in an array": ({"module": MLP((8,)), "penalty": Ramp(np.zeros(1))}, DECAY),
    "ramp in a tensor": ({"module": MLP((8,)), "penalty": Ramp(torch.zeros(1))}, DECAY),
    "ramp in a closure": ({"module": MLP((8,)), "augment": ramp_in_a_closure()}, {"augment__spread": uniform(0, 3)}),
    "moving mean, by its data": ({"module": MLP((8,)), "criterion": Smoothed(True)}, DECAY),
    "moving mean, another": ({"module": MLP((8,)), "criterion": Smoothed(False), "mixup": 0.3}, DECAY),
    "anchored": ({"module": MLP((8,)), "penalty": Anchored()}, DECAY),
    "caches": ({"module": MLP((8,)), "criterion": Caches()}, DECAY),
    "random penalty": ({"module": MLP((8,)), "penalty": random_penalty}, {"penalty__strength": loguniform(1e-4, 1)}),
}
