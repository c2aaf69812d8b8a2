"""What a module keeps that is trained otherwise than it seems is refused, and what only looks so is not."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.stats import uniform
from sklearn.base import clone
from torch import nn

from hypertune import model_factory
from tests.odd_modules import NET, DrawnByNumpy, Remembers, X, search, y


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


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_gradient_is_refused_since_it_would_never_be_called(register: str):
    class Masked(nn.Sequential):
        def __init__(self, n, m):
            super().__init__(nn.Linear(n, 8), nn.Linear(8, m))
            getattr(self[0].weight, register)(lambda gradient: None)

    with pytest.raises(
        ValueError, match=r"0 \(Linear\) has a hook on the gradient of 'weight', which would never be called"
    ):
        clone(NET).set_params(module=Masked).fit(X, y)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_is_refused():
    with pytest.raises(ValueError, match=r"is scripted, and runs with the weights that it has"):
        clone(NET).set_params(module=lambda n, m: torch.jit.trace(nn.Linear(n, m), torch.zeros(1, n))).fit(X, y)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_hooks_of_frozen_parameters_and_scripted_activations_are_harmless():
    def module(n, m):
        frozen = nn.Linear(n, n)
        frozen.weight.register_hook(lambda gradient: None)
        return nn.Sequential(frozen.requires_grad_(False), torch.jit.trace(nn.ReLU(), torch.zeros(2)), nn.Linear(n, m))

    search(module=module).fit(X, y)


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


def test_a_compiled_module_is_no_such_function():
    def compiled(n, m):
        module = nn.Linear(n, m)
        module.compile(backend="eager")
        return module

    clone(NET).set_params(module=compiled, max_epochs=1).fit(X, y)


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
