"""Modules that call plain layers one after the other, and those that do anything else."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from torch import nn

from hypertune import HyperTrainingSearchCV, TorchClassifier
from hypertune.calls import layers_called
from hypertune.examination import examine
from hypertune.layers import with_own_layers
from hypertune.reach import Reach
from hypertune.stacked import StackedModule


class Net(nn.Module):
    """What people write."""

    def __init__(self, n: int = 6, m: int = 3, dropout: float = 0.2):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(n, n), nn.Linear(n, n)])
        self.drop, self.out = nn.Dropout(dropout), nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, m))

    def forward(self, x):
        for layer in self.hidden:
            x = self.drop(F.leaky_relu(layer(x), 0.2))
        return self.out(x)


class Functions(Net):
    def forward(self, x):
        x = torch.flatten(x.view(-1, 6), start_dim=1).relu()
        return self.out(F.gelu(self.hidden[0](x), approximate="tanh"))


class Residual(Net):
    def forward(self, x):
        return self.out(x + self.hidden[0](x))


class Branching(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x) if x.mean() > -100 else x)


class Frozen(Net):
    def forward(self, x):
        with torch.no_grad():
            x = self.hidden[0](x)
        return self.out(x)


class Detached(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x).detach())


class Shaped(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x) if len(x) > 2 else x)


class Drawing(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x) if torch.rand(()) < 0.5 else x)


class DrawingByPython(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x) if random.random() < 2 else x)


class DrawingByNumPy(Net):
    def forward(self, x):
        return self.out(self.hidden[0](x) if np.random.random() < 2 else x)  # noqa: NPY002


class Counting(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return self.out(x)


class Twice(Net):
    def forward(self, x):
        self.hidden[1](x)
        return self.out(self.hidden[0](x))


class Scaled(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.out(self.hidden[0](x) * self.scale)


class Inplace(Net):
    def forward(self, x):
        return self.out(F.relu(self.hidden[0](x), inplace=True))


class Rated(Net):
    def forward(self, x):
        return self.out(F.dropout(x, 0.0, self.training))


class Tied(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.hidden[1].weight = self.hidden[0].weight


class Inner(Net):
    """The second call is not of what the first gave."""

    def forward(self, x):
        self.hidden[0](x)
        return self.out(x)


class Generated(Net):
    """Layers that are left out by a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        if self.training and next(self) > 2:
            return self.out(x)
        return self.out(self.hidden[0](x))

    def __next__(self):
        return next(self.generator) if hasattr(self.generator, "__next__") else self.generator.random()


class Called(Net):
    def __call__(self, x):
        return super().__call__(x).clamp(-1, 1)


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-100, 100) * (ctx.saved_tensors[0] > 0)  # ReLU's, as long as it is small


class OwnGradient(Net):
    def forward(self, x):
        return self.out(Clamped.apply(self.hidden[0](x)))


class Tempered(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.t = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.out(x) * self.t.view(1, 1)


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.out(x)


class Keywords(Net):
    def forward(self, x):
        return self.out(torch.flatten(input=x, start_dim=1))


OTHERS = [
    Called, OwnGradient, Tempered, Autocast, Keywords,
    Residual, Branching, Frozen, Detached, Shaped, Drawing, DrawingByPython, DrawingByNumPy, Counting, Twice, Scaled, Inplace, Rated, Tied, Inner,
]  # fmt: skip


def test_layers_and_functions_are_followed():
    net = with_own_layers(Net())
    steps = layers_called(net, lambda: net(torch.randn(5, 6)))
    assert [step if isinstance(step, str) else type(step) for step in steps] == [
        "hidden.0", nn.LeakyReLU, "drop", "hidden.1", nn.LeakyReLU, "drop", "out.0", "out.1", "out.2"
    ]  # fmt: skip
    assert steps[1].negative_slope == 0.2
    assert not any(sub._forward_hooks or sub._forward_pre_hooks for sub in net.modules())


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_does_anything_else_runs_as_it_is(kind):
    torch.manual_seed(0)
    stacked = StackedModule(kind())
    examine(stacked, torch.randn(5, 6), {})
    assert stacked.calls is None


@pytest.mark.parametrize("kind", [Net, Functions])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_the_modules_own(kind, training):
    torch.manual_seed(0)
    net = kind()
    reach = {"rate": [Reach("drop", "p", 0.0, 1.0)]} if kind is Net else {}
    plain, watched = StackedModule(net, reach=reach), StackedModule(net, reach=reach)
    examine(watched, torch.randn(5, 6), {"rate": 0.2} if reach else {})
    assert watched.calls is not None
    assert plain.calls is None
    w = (plain.initial_weights() + 0.1 * torch.randn(4, plain.D)).requires_grad_()
    x, rates = torch.randn(4, 7, 6), {"rate": torch.tensor([0.0, 0.1, 0.5, 0.9])} if reach else {}
    found = []
    for module in (
        plain,
        watched,
        pickle.loads(pickle.dumps(watched)),
        copy.deepcopy(watched).with_statistics_of(2, 2),
    ):
        torch.manual_seed(1)
        module.draw_streams()
        outputs = module.outputs(module.named(w), x, rates, training=training)
        found.append((outputs.detach(), *torch.autograd.grad(outputs.square().sum(), w)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "generator",
    [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), itertools.cycle([1.0, 1.0, 1.0])],
)
def test_a_module_that_draws_by_a_generator_of_its_own_runs_as_it_is(generator):
    stacked = StackedModule(Generated(generator))
    examine(stacked, torch.randn(5, 6), {})
    assert stacked.calls is None


def test_sizes_may_be_any_integers_and_hooks_of_all_modules_are_heeded():
    class Sized(Net):
        def forward(self, x):
            return self.out(x.view(-1, np.prod((2, 3))))

    def follows():
        stacked = StackedModule(Sized())
        examine(stacked, torch.randn(5, 2, 3), {})
        return stacked.calls is not None

    assert follows()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not follows()
    finally:
        hook.remove()


def test_a_number_that_no_layer_has_keeps_the_module_as_it_is():
    net = Net()
    net.rate = 0.1
    stacked = StackedModule(net, reach={"rate": [Reach("", "rate", 0.0, 1.0)]})
    examine(stacked, torch.randn(5, 6), {"rate": 0.1})
    assert stacked.calls is None


def test_what_gives_something_else_keeps_the_module_as_it_is(monkeypatch):
    monkeypatch.setattr(
        "hypertune.examination.layers_called", lambda module, run: run() is not None and ["out.0", "out.2"]
    )
    stacked = StackedModule(Net())
    examine(stacked, torch.randn(5, 6), {})
    assert stacked.calls is None


def test_a_search_of_such_a_module_finds_what_it_finds_under_vmap(iris, monkeypatch):
    net = TorchClassifier(Net, dtype="float64", lr=0.01, max_epochs=5, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.6)}

    def found():
        return HyperTrainingSearchCV(clone(net), space, cv=3, random_state=0, scoring="neg_log_loss").fit(*iris)

    fast = found()
    monkeypatch.setattr("hypertune.examination.layers_called", lambda module, run: None)
    slow = found()
    assert fast.best_response_.objective.calls is not None
    assert slow.best_response_.objective.calls is None
    assert_allclose(fast.cv_results_["mean_test_score"], slow.cv_results_["mean_test_score"], rtol=1e-6)
    assert fast.best_params_ == pytest.approx(slow.best_params_, rel=1e-6)
