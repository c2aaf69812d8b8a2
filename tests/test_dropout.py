from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import loguniform, uniform
from sklearn.model_selection import KFold
from torch import nn
from torch.testing import assert_close

from hypertune import HyperTrainingSearchCV, TorchClassifier, model_factory
from hypertune.examination import examine
from hypertune.layers import with_own_layers
from hypertune.reach import find_reach
from hypertune.stacked import StackedModule
from tests.searches import assert_scores_are_those_of_own_fits

FORMS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bias": False},
    {"kdim": 3, "vdim": 5, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def _rows(form: dict[str, Any], *, batch: int = 3, sources: int = 6) -> list[torch.Tensor]:
    sizes = [(4, 8), (sources, form.get("kdim", 8)), (sources, form.get("vdim", 8))]
    rows = [torch.randn(batch, length, size, dtype=torch.float64) for length, size in sizes]
    return rows if form.get("batch_first") else [r.transpose(0, 1) for r in rows]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_attention_without_its_dropout_is_torchs(form, masked, monkeypatch):
    torch.manual_seed(0)
    layer, rows = nn.MultiheadAttention(8, 2, dropout=0.5, **form).double(), _rows(form)
    own = with_own_layers(layer)
    monkeypatch.setattr(type(own), "_dropped", lambda self, weights, rate: weights)
    masks: dict[str, Any] = {}
    if masked:
        masks = {
            "key_padding_mask": torch.tensor([[False] * 4 + [True] * 2] * 3),
            "attn_mask": torch.ones(4, 6).triu(2) > 0,
        }
    for asked in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        layer.dropout = 0.0
        for found, expected in zip(own(*rows, **masks, **asked), layer(*rows, **masks, **asked), strict=True):
            if expected is None:
                assert found is None
            else:
                assert_close(found, expected)


def test_the_share_of_attention_that_is_dropped_is_the_rate_and_the_outputs_are_without_it():
    torch.manual_seed(0)
    layer, rows = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), torch.randn(20, 30, 8)
    own = with_own_layers(layer)
    outputs, weights = own(rows, rows, rows, average_attn_weights=False)
    _, before = layer.eval()(rows, rows, rows, average_attn_weights=False)
    kept = weights != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert_close(weights[kept], before[kept] / 0.7)
    values = nn.functional.linear(rows, layer.in_proj_weight[16:], layer.in_proj_bias[16:]).view(20, 30, 2, 4)
    joined = torch.einsum("bhts,bshe->bthe", weights, values).flatten(2)
    assert_close(outputs, layer.out_proj(joined))
    assert own.dropout == 0.3


@model_factory
class Encoder(nn.Module):
    """One rate for torch's whole encoder layer, as people have it."""

    def __init__(self, shape, m, dropout=0.1):
        super().__init__()
        self.embed, self.out = nn.Linear(shape[1], 8), nn.Linear(8, m)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.out(self.encoder(self.embed(x)).mean(dim=1))


def test_models_of_different_attention_dropout_have_the_noise_that_each_has_alone():
    torch.manual_seed(0)
    reach = find_reach(lambda rate: Encoder(dropout=rate)((5, 3), 2), 0.1, 0.5)
    stacked = StackedModule(Encoder(dropout=0.1)((5, 3), 2).double(), reach={"dropout": reach})
    x, rates = torch.randn(7, 5, 3, dtype=torch.float64), torch.tensor([0.0, 0.1, 0.6], dtype=torch.float64)
    assert any(r.path.endswith("self_attn") for r in reach)
    examine(stacked, x, {"dropout": 0.2})
    assert stacked.stacked
    stacked.draw_streams()
    w = stacked.initial_weights().repeat(3, 1)
    together = stacked.outputs(stacked.named(w), x.expand(3, -1, -1, -1), {"dropout": rates}, training=True)
    for m, rate in enumerate(rates.tolist()):
        assert_close(together[m], stacked.outputs(stacked.named(w[:1]), x[None], {"dropout": rate}, training=True)[0])


@pytest.mark.slow
def test_a_transformer_with_one_dropout_for_all_is_tuned_with_all_folds_in_one_pass(used):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4, 2))
    y = (X.sum(axis=(1, 2)) + 0.5 * rng.normal(size=60) > 0).astype(int)
    net = TorchClassifier(Encoder, dtype="float64", max_epochs=4, batch_size=16, lr=1e-2, random_state=0)
    space = {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8)}
    found = HyperTrainingSearchCV(net, space, cv=KFold(3), scoring="neg_log_loss", random_state=0).fit(X, y)
    assert found.best_response_.objective.stacked
    assert used.count(True) == 3 * len(found.cv_results_["params"])
    assert_scores_are_those_of_own_fits(found, X, y, rel=1e-6)


def test_a_rate_of_one_leaves_nothing_as_torchs_does():
    x = torch.randn(6, 3)
    for layer in (nn.Dropout(1.0), nn.Dropout1d(1.0)):
        stacked = StackedModule(nn.Sequential(nn.Linear(3, 4), layer))
        w = stacked.initial_weights()[None]
        assert stacked.outputs(stacked.named(w), x[None], {}, training=True).eq(0).all()
    fitted = TorchClassifier(module=lambda n, m: nn.Sequential(nn.Dropout(1.0), nn.Linear(n, m)), max_epochs=2)
    assert np.isfinite(fitted.fit(x, x[:, 0] > 0).loss_curve_).all()


def test_layers_that_drop_have_each_its_own_noise():
    layers = nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.5))
    stacked, x = StackedModule(nn.Sequential(*layers, nn.Linear(200, 1))), torch.ones(1, 3, 200)
    stacked.draw_streams()
    w = stacked.initial_weights()[None].requires_grad_()
    (of_w,) = torch.autograd.grad(stacked.outputs(stacked.named(w), x, {}, training=True)[0, 0].sum(), w)
    assert float((of_w[0, :200] != 0).float().mean()) == pytest.approx(0.25, abs=0.12)  # and not half of them


def test_large_attention_is_faster_one_after_the_other():
    class Attends(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0].mean(dim=1)

    for width, together in ((8, True), (128, False)):
        stacked = StackedModule(Attends(width))
        examine(stacked, torch.zeros(2, 10, width), {})
        assert stacked.stacked == together


@pytest.mark.parametrize("kind", ["padding", "attention", "float"])
def test_a_query_without_keys_attends_to_nothing_and_has_a_gradient(kind, monkeypatch):
    """As torch has it where no weights are asked for, in nn.TransformerEncoderLayer say."""
    torch.manual_seed(0)
    layer, rows = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double(), _rows({"batch_first": True})
    own = with_own_layers(layer)
    monkeypatch.setattr(type(own), "_dropped", lambda self, weights, rate: weights)
    padding, attention = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    padding[1], attention[2] = True, True
    mask: dict[str, Any] = {"key_padding_mask": padding} if kind == "padding" else {"attn_mask": attention}
    if kind == "float":
        mask = {"attn_mask": torch.zeros(4, 6, dtype=torch.float64).masked_fill(attention, -torch.inf)}
    layer.dropout = 0.0
    found, _ = own(*rows, need_weights=False, **mask)
    expected, _ = layer(*rows, need_weights=False, **mask)
    assert_close(found, expected)
    for gradient in torch.autograd.grad(found.square().sum(), list(layer.parameters())):
        assert gradient.isfinite().all()
