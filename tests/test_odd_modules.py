"""Modules, optimizers and penalties that do odd things: what a search verifies is a fit of its own, and the user's is left alone."""

from __future__ import annotations

import functools
import pickle
import types
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import loguniform, uniform
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, ShuffleSplit, cross_val_score
from torch import nn
from torch.utils.checkpoint import checkpoint

from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier, model_factory
from hypertune.stacked import StackedModule

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
    "random penalty": ({"module": MLP((8,)), "penalty": random_penalty}, {"penalty__strength": loguniform(1e-4, 1)}),
}


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize(("seed", "cv"), [(0, KFold(3)), (7, KFold(3)), (0, ONE_SPLIT)])  # 7 is the estimator's
@pytest.mark.parametrize("odd", ODD)
def test_what_is_verified_is_a_fit_of_its_own(odd: str, seed: int, cv: Any):
    params, space = ODD[odd]
    rows = X.copy()
    if odd == "codes in one fold":
        rows[5, 3] = 0.5
    before = torch.get_rng_state()
    found = search(space, **params).set_params(random_state=seed, cv=cv).fit(rows, y)
    assert torch.equal(torch.get_rng_state(), before)
    for setting, score in zip(found.cv_results_["params"], found.cv_results_["mean_test_score"], strict=True):
        alone = clone(NET).set_params(**params, **setting)
        own = cross_val_score(alone, rows, y, cv=cv, scoring="neg_log_loss").mean()
        assert_allclose(score, own, rtol=1e-7)


def test_the_padding_row_stays_and_the_others_learn():
    module = search(module=Padded, inputs=CODES).fit(X, y).best_response_.weights(fold=1)["embed.weight"]
    start = clone(NET).set_params(module=Padded, inputs=CODES).fit(X, y).module_.embed.weight
    assert not module[0].any()
    assert not start[0].any()
    assert module[1:].all()


class DrawnByNumpy(RandomFeatures):
    def __init__(self, n: int, m: int):
        super().__init__(n, m)
        self.B = torch.from_numpy(np.random.default_rng().normal(size=(n, 16)))


@pytest.mark.parametrize("module", [RandomFeatures, Shuffled, DrawnByNumpy])
def test_an_estimator_of_the_response_has_what_the_module_was_drawn_with(module):
    found = search(module=module).set_params(random_state=5).fit(X, y).best_response_
    for k, (_, valid) in enumerate(KFold(3).split(X)):
        loss = log_loss(y[valid], found.estimator_at(fold=k).predict_proba(X[valid]), labels=[0, 1])
        assert loss == pytest.approx(found.validation_curve("weight_decay", [found.params["weight_decay"]])[0, k])


TOGETHER = (
    "class weights",
    "padding",
    "scaled start",
    "in a list",
    "writes",
    "temperature",
    "counts",
    "counts late",
    "remembers",
    "cools",
)


@pytest.mark.parametrize("odd", TOGETHER)
def test_these_are_odd_and_yet_retrained_together(used, odd: str):
    params, space = ODD[odd]
    search(space, **params).fit(X, y)
    assert all(used[:-1])
    assert len(used) > 3


def test_a_module_that_draws_in_eval_mode_too_is_retrained_as_it_would_be_by_itself(used):
    class Trembles(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(len(x), 1, dtype=x.dtype)

    found = search(module=Trembles).fit(X, y)
    assert all(used[:-1])
    rows = [(np.arange(90), np.arange(90))]
    again = search(module=Trembles).set_params(cv=rows).fit(X, y).best_estimator_
    alone = clone(again).fit(X, y)
    assert_allclose(again.loss_curve_, alone.loss_curve_, rtol=1e-9)
    assert np.isfinite(found.best_score_)


def test_a_hook_on_the_weights_would_see_those_of_all_candidates(used):
    def hooked(params, lr):
        for p in params:
            p.register_hook(lambda g: g)
        return torch.optim.SGD(params, lr=lr)

    search(module=MLP((8,)), optimizer=hooked).fit(X, y)
    assert not any(used)


@pytest.mark.filterwarnings("ignore:The folds are trained one after the other")
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_backbone_that_the_factory_shares_is_left_alone(recurrent: bool):
    """Of its own net the user tunes a copy, from the weights that it has."""
    torch.manual_seed(0)
    backbone = nn.GRU(5, 8) if recurrent else nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}

    class Tuned(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.backbone, self.out = backbone, nn.Linear(8, m)

        def forward(self, x):
            hidden = self.backbone(x[None])[0][0] if recurrent else self.backbone(x)
            return self.out(torch.relu(hidden))

    net = {"module": Tuned, "dtype": "float32", "lr": 1e-6, "max_epochs": 1}
    found = search(**net).fit(X, y)
    for own in (backbone, found.best_estimator_.module_.backbone):
        for k, v in own.state_dict().items():
            if "running" not in k and "tracked" not in k:
                torch.testing.assert_close(v, before[k], rtol=0, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_rows_that_a_module_writes_into_are_the_same_in_the_next_epoch():
    class Shifts(nn.Linear):
        def forward(self, x):
            return super().forward(x - 1.0)

    own, other = (clone(NET).set_params(module=module).fit(X, y) for module in (WritesIntoItsRows, Shifts))
    assert_array_equal(own.predict_proba(X), other.predict_proba(X))


def test_a_forward_of_its_own_is_what_is_trained():
    class Tripled(nn.Sequential):
        def forward(self, x):
            return 3 * super().forward(x)

    def patched(n, m):
        module = nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, m))
        module.forward = types.MethodType(lambda self, x: 3 * nn.Sequential.forward(self, x), module)
        return module

    declared = functools.partial(lambda n, m: Tripled(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, m)))
    own, other = (clone(NET).set_params(module=module).fit(X, y) for module in (patched, declared))
    assert_allclose(own.predict_proba(X), other.predict_proba(X), rtol=1e-9)


def test_a_function_that_holds_on_to_the_module_is_refused():
    class Held(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.hidden, self.out = nn.Linear(n, 8), nn.Linear(8, m)
            self.block = lambda x: torch.relu(self.hidden(x))

        def forward(self, x):
            return self.out(self.block(x))

    with pytest.raises(ValueError, match=r"keeps a function, 'block', .*Make it a method"):
        clone(NET).set_params(module=Held).fit(X, y)

    def patched(n, m):
        module = Remembers(n, m)
        module.forward = lambda x, own=module.forward: 3 * own(x)
        return module

    with pytest.raises(ValueError, match=r"keeps a function, 'forward'"):
        clone(NET).set_params(module=patched).fit(X, y)

    teacher, seen = nn.Linear(5, 5).double(), []

    class Harmless(nn.Linear):
        max_norm = 1.0

        def __init__(self, n, m):
            super().__init__(n, m)
            self.seen, self.teach = seen, lambda x: teacher(x).detach()
            self.register_forward_hook(lambda module, args, outputs: seen.append(len(outputs)))

        def forward(self, x):
            return super().forward(self.teach(x))

    clone(NET).set_params(module=Harmless).fit(X, y)


def test_what_training_made_of_the_modules_own_numbers_is_part_of_the_prediction():
    cooled = clone(NET).set_params(module=Cools).fit(X, y).module_
    assert cooled.temperature == pytest.approx(5.0 * 0.98 ** (4 * 6))
    assert cooled.p == 4 * 6
    assert clone(NET).set_params(module=MovingMean).fit(X, y).module_.mean.abs().sum() > 0


@pytest.mark.parametrize("module", [Remembers, Cools, Shared, MLP((8,))])
def test_a_search_can_be_pickled_and_its_response_predicts_as_before(module):
    found = search(module=module, max_epochs=2).fit(X, y)
    again = pickle.loads(pickle.dumps(found))
    for one, other in (
        (found, again),
        (found.best_response_.estimator_at(fold=1), again.best_response_.estimator_at(fold=1)),
    ):
        assert_array_equal(one.predict_proba(X), other.predict_proba(X))


def test_a_function_inside_a_function_holds_on_to_the_module_too():
    class Held(nn.Linear):
        def __init__(self, n, m):
            super().__init__(n, m)
            inner = lambda x: self.bias + x  # noqa: E731
            self.outer = lambda x: inner(x)

    with pytest.raises(ValueError, match=r"keeps a function, 'outer'"):
        clone(NET).set_params(module=Held).fit(X, y)


def test_a_hook_that_holds_on_to_the_module_is_refused_and_a_method_is_not():
    class Gated(nn.Module):
        def __init__(self, n, m, method):
            super().__init__()
            self.hidden, self.gate, self.out = nn.Linear(n, 8), nn.Linear(n, 8), nn.Linear(8, m)
            self.hidden.register_forward_hook(self.opened if method else lambda _, x, h: h * self.gate(x[0]).sigmoid())

        def opened(self, _, x, h):
            return h * self.gate(x[0]).sigmoid()

        def forward(self, x):
            return self.out(torch.relu(self.hidden(x)))

    with pytest.raises(
        ValueError, match=r"hidden \(Linear\) keeps a hook \(in _forward_hooks\) that .*Make it a method"
    ):
        clone(NET).set_params(module=functools.partial(Gated, method=False)).fit(X, y)
    trained = clone(NET).set_params(module=functools.partial(Gated, method=True)).fit(X, y)
    with torch.no_grad():
        before = trained.predict_proba(X)
        trained.module_.gate.weight.fill_(100.0)
    assert np.abs(trained.predict_proba(X) - before).max() > 0.01


def test_a_module_wrapped_by_torch_compile_is_refused():
    with pytest.raises(ValueError, match=r"OptimizedModule\) comes from torch\.compile\(module\)"):
        clone(NET).set_params(module=lambda n, m: torch.compile(nn.Linear(n, m), backend="eager")).fit(X, y)


@pytest.mark.parametrize("route", ["dict", "buffer", "private", "closure"])
def test_a_keyword_that_reaches_the_module_by_another_way_too_is_refused(route):
    class Net(nn.Module):
        def __init__(self, n, m, dropout=0.1):
            super().__init__()
            self.first, self.hidden, self.out = nn.Dropout(dropout / 10), nn.Linear(n, 16), nn.Linear(16, m)
            self.config, self._rate = {"rate": dropout if route == "dict" else 0.0}, dropout
            self.register_buffer("rate", torch.tensor(dropout))
            self.drop = lambda h: torch.dropout(h, dropout, True)

        def forward(self, x):
            h = torch.relu(self.hidden(self.first(x)))
            if route == "closure":
                return self.out(self.drop(h) if self.training else h)
            rate = {"dict": self.config["rate"], "buffer": float(self.rate), "private": self._rate}[route]
            return self.out(torch.dropout(h, rate, self.training))

    with pytest.raises(
        ValueError, match=r"module__dropout.*sets first\.p in the module, and something else .* trains otherwise"
    ):
        search({"module__dropout": uniform(0, 0.8)}, module=model_factory(Net)).fit(X, y)


def test_noise_of_numpys_is_no_reason_to_refuse_a_keyword():
    class Net(nn.Linear):
        def __init__(self, n, m, dropout=0.0):
            super().__init__(n, m)
            self.rate = dropout

        def forward(self, x):
            kept = np.random.default_rng().random(x.shape[-1]) >= float(self.rate) if self.training else np.ones(5)
            return super().forward(x * torch.as_tensor(kept).to(x))

    with pytest.warns(UserWarning, match="one after the other"):
        search({"module__dropout": uniform(0, 0.8)}, module=model_factory(Net), max_epochs=2).fit(X, y)


def test_weights_that_make_no_number_are_no_reason_to_refuse_a_keyword():
    class Net(nn.Sequential):
        def __init__(self, n, m, dropout=0.1):
            super().__init__(nn.Dropout(dropout), nn.Linear(n, m))
            self.scale = nn.Parameter(torch.full((50,), 0.05))  # some of it is negative after any change to all weights

        def forward(self, x):
            return super().forward(x) * self.scale.sqrt().mean()

    search({"module__dropout": uniform(0, 0.8)}, module=model_factory(Net), max_epochs=2, lr=1e-4).fit(X, y)


def test_no_two_modules_alike_are_no_reason_to_refuse_a_keyword():
    class Net(DrawnByNumpy):
        def __init__(self, n, m, dropout=0.1):
            super().__init__(n, m)
            self.drop = nn.Dropout(dropout)

        def forward(self, x):
            return super().forward(self.drop(x))

    search({"module__dropout": uniform(0, 0.8)}, module=model_factory(Net)).fit(X, y)


def test_a_keyword_that_is_kept_under_a_private_name_alone_is_refused_with_what_to_do():
    class Net(nn.Linear):
        def __init__(self, n, m, dropout=0.1):
            super().__init__(n, m)
            self._rate = dropout

        def forward(self, x):
            return super().forward(torch.dropout(x, self._rate, self.training))

    with pytest.raises(ValueError, match=r"attribute with a public name \(self\.rate = rate"):
        search({"module__dropout": uniform(0, 0.8)}, module=model_factory(Net)).fit(X, y)


def test_a_compiled_module_is_no_such_function():
    def compiled(n, m):
        module = nn.Linear(n, m)
        module.compile(backend="eager")
        return module

    clone(NET).set_params(module=compiled, max_epochs=1).fit(X, y)


def test_a_pass_leaves_the_weights_of_a_layer_under_two_names_where_they_are():
    stacked = StackedModule(Shared(5, 2))
    w = stacked.initial_weights()
    stacked.outputs(stacked.named(w.repeat(3, 1)), torch.zeros(3, 4, 5), {}, training=True)
    assert torch.equal(stacked.initial_weights(), w)
