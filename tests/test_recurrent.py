from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import loguniform, uniform
from sklearn.model_selection import KFold
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from hypertune import HyperTrainingSearchCV, TorchClassifier, model_factory
from hypertune.examination import examine
from hypertune.layers import differentiable_in_eval_mode, with_own_layers
from hypertune.reach import find_reach
from hypertune.stacked import StackedModule
from tests.searches import assert_scores_are_those_of_own_fits

KINDS = [nn.RNN, nn.LSTM, nn.GRU]
FORMS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
]


def _forms() -> list[tuple[type[nn.RNNBase], dict[str, Any]]]:
    more = [(nn.RNN, {"nonlinearity": "relu", "num_layers": 2})]
    more += [
        (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True, **bias}) for bias in ({}, {"bias": False})
    ]
    return [*[(kind, form) for kind in KINDS for form in FORMS], *more]  # type: ignore[list-item]


class Whole(nn.Module):
    """All that a recurrent layer returns, in one row of numbers for each row."""

    def __init__(self, layer: nn.RNNBase, starts: bool):
        super().__init__()
        self.layer, self.starts = layer, starts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, batch = self.layer, len(x)
        count = own.num_layers * (1 + own.bidirectional)
        start = x.mean() + torch.linspace(-1, 1, count)[:, None, None].to(x)
        hidden = start.expand(count, batch, own.proj_size or own.hidden_size)
        hx: Any = (hidden, -start.expand(count, batch, own.hidden_size)) if own.mode == "LSTM" else hidden
        rows = x if own.batch_first else x.transpose(0, 1)
        outputs, end = own(rows, hx) if self.starts else own(rows)
        outputs = outputs if own.batch_first else outputs.transpose(0, 1)
        ends = torch.cat([e.transpose(0, 1).flatten(1) for e in (end if own.mode == "LSTM" else (end,))], dim=1)
        return torch.cat([outputs.flatten(1), ends], dim=1)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize(("kind", "form"), _forms())
def test_step_by_step_is_what_torch_computes(kind, form, starts):
    torch.manual_seed(0)
    module = Whole(kind(3, 4, **form), starts).double()
    stacked, x = StackedModule(module), torch.randn(5, 2, 6, 3, dtype=torch.float64)
    w = (stacked.initial_weights() + 0.3 * torch.randn(5, stacked.D, dtype=torch.float64)).requires_grad_()
    for training in (True, False):
        together = stacked.outputs(stacked.named(w), x, {}, training=training)
        for m in range(5):
            own = copy.deepcopy(module)
            torch.nn.utils.vector_to_parameters(w[m], own.parameters())
            alone = own(x[m])
            assert_close(together[m], alone)
            gradients = torch.autograd.grad(alone.square().sum(), list(own.parameters()))
            (found,) = torch.autograd.grad(together[m].square().sum(), w, retain_graph=True)
            assert_close(found[m], torch.cat([g.flatten() for g in gradients]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "more"), [
    (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"}), (nn.LSTMCell, {}), (nn.GRUCell, {}),
])  # fmt: skip
def test_cells_are_what_torch_computes(kind, more, bias):
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(3, 4, bias=bias, **more)

        def forward(self, x):
            state = self.cell(x[:, 0])
            end = self.cell(x[:, 1], state)
            return torch.cat(end, dim=1) if isinstance(end, tuple) else end

    torch.manual_seed(0)
    module, x = Cells().double(), torch.randn(3, 5, 2, 3, dtype=torch.float64)
    stacked = StackedModule(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's that it falls back to a loop
        examine(stacked, x[0], {})
    w = stacked.initial_weights() + 0.3 * torch.randn(3, stacked.D, dtype=torch.float64)
    together = stacked.outputs(stacked.named(w), x, {}, training=True)
    for m in range(3):
        torch.nn.utils.vector_to_parameters(w[m], module.parameters())
        assert_close(together[m], module(x[m]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_dropout_between_layers_may_be_different_for_each_model(kind):
    """With the same noise as by itself, and at the right rate."""
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self, dropout):
            super().__init__()
            self.rnn = kind(3, 16, num_layers=2, dropout=dropout, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0].flatten(1)

    factory = lambda n, m, dropout=0.2: Deep(dropout)  # noqa: E731
    reach = find_reach(lambda rate: factory(0, 0, rate), 0.1, 0.5)
    stacked, x = StackedModule(Deep(0.2).double(), reach={"dropout": reach}), torch.randn(7, 6, 3, dtype=torch.float64)
    examine(stacked, x, {"dropout": 0.2})
    assert stacked.stacked
    stacked.draw_streams()
    w, rates = stacked.initial_weights().repeat(3, 1), torch.tensor([0.0, 0.2, 0.7], dtype=torch.float64)
    together = stacked.outputs(stacked.named(w), x.expand(3, -1, -1, -1), {"dropout": rates}, training=True)
    for m, rate in enumerate(rates.tolist()):
        alone = stacked.outputs(stacked.named(w[:1]), x[None], {"dropout": rate}, training=True)[0]
        assert_close(together[m], alone)
    assert_close(together[0], stacked.outputs(stacked.named(w), x.expand(3, -1, -1, -1), {}, training=False)[0])
    assert (together[1] - together[0]).abs().max() > 0.01


def test_the_share_that_is_dropped_between_layers_is_the_rate():
    torch.manual_seed(0)
    layer = with_own_layers(nn.GRU(2, 50, num_layers=2, dropout=0.3, batch_first=True))
    seen = []
    layer._as_torch, own = (lambda x, *more: seen.append(x) or own(x, *more)), layer._as_torch
    layer(x := torch.randn(20, 30, 2))
    first = nn.GRU(2, 50, batch_first=True)
    first.load_state_dict({k: v for k, v in layer.state_dict().items() if k.endswith("l0")})
    kept = seen[1] != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert_close(seen[1][kept], first(x)[0].transpose(0, 1)[kept] / 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_gradient_in_eval_mode_that_cudnn_gives_in_training_mode_only(kind: type[nn.RNNBase]):
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, dropout=0.9, batch_first=True)
    own, x = differentiable_in_eval_mode(with_own_layers(layer)), torch.randn(2, 5, 3)
    layer.eval()
    assert own.training
    own.dropout = 0.5  # what a tuned keyword would set
    assert_close(own(x)[0], layer(x)[0])
    assert own.dropout == 0.5
    assert_close(pickle.loads(pickle.dumps(own))(x)[0], layer(x)[0])


def test_packed_sequences_and_single_ones_are_torchs():
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    own, packed = with_own_layers(layer), pack_padded_sequence(x, [5, 3], batch_first=True)
    assert_close(own(packed)[1], layer(packed)[1])
    assert_close(own(x[0])[0], layer(x[0])[0])


@model_factory
class Recurrent(nn.Module):
    def __init__(self, n, m, dropout=0.1):
        super().__init__()
        self.rnn = nn.GRU(1, 5, num_layers=2, dropout=dropout, batch_first=True)
        self.out = nn.Linear(5, m)

    def forward(self, x):
        return self.out(self.rnn(x[..., None])[0][:, -1])


def test_a_recurrent_module_is_tuned_with_all_folds_in_one_pass(used):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4))
    y = (X.sum(axis=1) + 0.5 * rng.normal(size=60) > 0).astype(int)
    net = TorchClassifier(Recurrent, dtype="float64", max_epochs=4, batch_size=16, lr=1e-2, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)}
    found = HyperTrainingSearchCV(net, space, cv=KFold(3), scoring="neg_log_loss", random_state=0).fit(X, y)
    assert found.best_response_.objective.stacked
    assert used.count(True) == 3 * len(found.cv_results_["params"])
    assert_scores_are_those_of_own_fits(found, X, y, rel=1e-6)


@pytest.mark.parametrize(("kind", "steps", "together"), [
    (nn.GRU, 20, True), (nn.RNN, 20, True), (nn.LSTM, 5, True), (nn.LSTM, 30, False), (nn.GRU, 400, False),
])  # fmt: skip
def test_what_is_faster_one_after_the_other_is_so_without_a_word(kind, steps, together):
    """Each weight counts as often as it is used: at every step."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(2, 20, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    stacked = StackedModule(Last())
    examine(stacked, torch.zeros(2, steps, 2), {})
    assert stacked.stacked == together
    assert stacked.cost == pytest.approx(steps * sum(p.numel() for p in Last().parameters() if p.dim() > 1))


@pytest.mark.parametrize("cell", [False, True])
def test_the_state_of_an_lstm_may_be_a_list(cell):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTMCell(3, 4) if cell else nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            if cell:
                return self.rnn(x[:, 0], [x.new_ones(len(x), 4)] * 2)[0]
            return self.rnn(x, [x.new_ones(1, len(x), 4)] * 2)[0][:, -1]

    stacked = StackedModule(Given())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examine(stacked, torch.randn(2, 5, 3), {})
    assert stacked.stacked


def test_a_frozen_layer_that_begins_where_a_trained_one_ended():
    class Decoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained, self.frozen = nn.Linear(3, 4), nn.GRU(3, 4, batch_first=True).requires_grad_(False)

        def forward(self, x):
            return self.frozen(torch.ones(len(x), 2, 3), self.trained(x)[None])[0][:, -1]

    stacked = StackedModule(Decoding())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examine(stacked, torch.randn(2, 3), {})
    assert stacked.stacked
