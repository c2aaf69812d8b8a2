from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from hypertune.batches import Batch, Minibatches, Rows
from hypertune.losses import CustomLoss, as_loss, cross_entropy, one_hot_squared_error
from hypertune.objective import Objective
from hypertune.penalties import half_squares, half_squares_of
from hypertune.reach import find_reach


def _net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(torch.randn(1, 6, 4, generator=g, dtype=torch.float64), torch.arange(6)[None] % 3)


def test_it_is_what_torch_trains(batch: Batch):
    """Gradient of L_Train = gradient of F.cross_entropy(label_smoothing=) plus SGD(weight_decay=)'s term and l1's."""
    net = _net()
    objective = Objective(net, cross_entropy)
    w = objective.initial_weights()[None].requires_grad_()
    values = {
        "weight_decay": torch.tensor([0.3]),
        "l1": torch.tensor([0.2]),
        "label_smoothing": torch.tensor([0.1]),
    }
    (gradient,) = torch.autograd.grad(objective.train_loss(w, values, batch).sum(), w)
    F.cross_entropy(net(batch.x[0]), batch.y[0], label_smoothing=0.1).backward()
    for p in net.parameters():
        if p.dim() > 1:
            p.grad += 0.3 * p.detach() + 0.2 * p.detach().sign()
    assert_close(gradient[0], torch.cat([p.grad.reshape(-1) for p in net.parameters()]), rtol=1e-6, atol=1e-8)


def test_squared_error_on_one_hot_targets_is_the_mean_over_all_entries():
    outputs, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert_close(one_hot_squared_error(outputs, y).mean(), F.mse_loss(outputs, F.one_hot(y).float()))
    smoothed = F.one_hot(y).float() * 0.7 + 0.1
    assert_close(one_hot_squared_error(outputs, y, torch.tensor([0.3])).mean(), F.mse_loss(outputs, smoothed))


def test_stacked_models_equal_single_ones(batch: Batch):
    """Each of M models in one pass has its own weights, penalties, dropout rate and noise level, and the same noise."""
    objective = Objective(
        _net(),
        cross_entropy,
        reach={"module__dropout": find_reach(_net, 0.0, 0.8)},
        fixed={"weight_decay": 0.1},
    )
    g = torch.Generator().manual_seed(2)
    w = torch.randn(3, objective.D, generator=g, dtype=torch.float64)
    values = {
        name: torch.rand(3, generator=g, dtype=torch.float64) / 2
        for name in ("module__dropout", "input_noise", "label_smoothing", "l1")
    }

    def losses(stacked: bool) -> torch.Tensor:
        objective.stacked = stacked
        torch.manual_seed(3)
        return objective.train_loss(w, values, batch.repeat(3))

    def alone(i: int) -> torch.Tensor:
        torch.manual_seed(3)
        return objective.train_loss(w[i : i + 1], {k: v[i : i + 1] for k, v in values.items()}, batch)[0]

    together = losses(stacked=True)
    assert_close(together, losses(stacked=False))
    assert_close(together, torch.stack([alone(i) for i in range(3)]))


def test_antithetic_signs_see_the_same_dropout_mask(batch: Batch):
    """Equal weights and equal rates under common noise give equal losses; validation has no noise at all."""
    objective = Objective(_net(0.5), cross_entropy)
    w = objective.initial_weights().expand(2, -1)
    torch.manual_seed(0)
    first, second = objective.train_loss(w, {"input_noise": torch.tensor([0.5, 0.5])}, batch.repeat(2))
    assert first == second
    assert objective.valid_loss(w[:1], batch) == objective.valid_loss(w[:1], batch)
    assert objective.valid_loss(w[:1], batch) != first


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: nn.Linear(2, 2), "reaches nothing"),
        (lambda p: nn.Linear(2, 2 + int(p > 0.5)), "architecture"),
        (lambda p: nn.Sequential(nn.Linear(2, 2), nn.Dropout(p * p)), "not affine"),
    ],
)
def test_a_keyword_that_cannot_be_followed_is_refused(build, message: str):
    with pytest.raises(ValueError, match=message):
        find_reach(build, 0.0, 0.8)


def test_a_callable_criterion_may_return_rows_or_their_mean(batch: Batch):
    rows = Objective(_net(), CustomLoss(nn.CrossEntropyLoss(reduction="none")))
    mean = Objective(_net(), CustomLoss(nn.CrossEntropyLoss()))
    named = Objective(_net(), cross_entropy)
    w = named.initial_weights()[None]
    assert_close(rows.valid_loss(w, batch), named.valid_loss(w, batch))
    assert_close(mean.valid_loss(w, batch), named.valid_loss(w, batch))
    with pytest.raises(ValueError, match="one number per row"):
        Objective(_net(), CustomLoss(lambda out, y: out)).valid_loss(w, batch)


def test_every_row_is_seen_once_in_a_pass():
    stream = Minibatches([Rows(torch.arange(5.0)[:, None], torch.zeros(5))], 2, seed=0)
    seen = torch.cat([next(stream).x[0, :, 0] for _ in range(10)])  # 20 rows: four passes
    assert all(sorted(one.tolist()) == [0, 1, 2, 3, 4] for one in seen.view(4, 5))


def test_minibatches_show_every_row_equally_often_and_are_reproducible():
    folds = [Rows(torch.arange(5.0), torch.arange(5)), Rows(torch.arange(10.0, 17.0), torch.arange(7))]
    stream, again = (Minibatches(folds, 3, seed=0) for _ in range(2))
    assert stream.steps_per_epoch == 3
    batches = [next(stream) for _ in range(35)]
    assert all(b.x.shape == (2, 3) for b in batches)
    first, second = (torch.cat([b.y[k] for b in batches]).bincount() for k in (0, 1))
    assert first.tolist() == [21] * 5
    assert second.tolist() == [15] * 7
    assert all(torch.equal(a.x, next(again).x) for a in batches)


def test_row_weights_have_mean_one_in_every_fold():
    fold = Rows(torch.arange(4.0), torch.arange(4), torch.tensor([1.0, 1.0, 2.0, 4.0]))
    assert_close(next(Minibatches([fold], 4, seed=0)).weight.mean(), torch.tensor(1.0))


def test_penalties_have_the_derivatives_of_what_they_compute():
    """First and second, in the weights and in strengths that broadcast to them."""
    generator = torch.Generator().manual_seed(0)
    w, v = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,)))
    w.requires_grad_()
    v.requires_grad_()
    assert torch.autograd.gradcheck(half_squares_of, (w, v))
    assert torch.autograd.gradgradcheck(half_squares_of, (w, v))
    torch.testing.assert_close(half_squares_of(w, v), 0.5 * (w.square().sum((1, 2)) + v.square().sum(1)))
    for shape in ((3, 4), (3, 1), (1, 4), (1, 1)):
        s = torch.rand(2, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(half_squares, (s, w))
        assert torch.autograd.gradgradcheck(half_squares, (s, w))
        torch.testing.assert_close(half_squares(s, w), 0.5 * (s * w.square()).sum((1, 2)))


def test_a_criterion_of_torchs_given_as_a_class_weighs_rows(batch: Batch):
    outputs, y = torch.randn(5, 2), torch.randn(5, 2)
    assert torch.allclose(
        as_loss(nn.MSELoss, {}, outputs)(outputs, y, weighted=True), (outputs - y).square().mean(dim=1)
    )
    assert as_loss(nn.CrossEntropyLoss, {}, outputs)(outputs, torch.zeros(5, dtype=torch.long)).shape == (5,)
    with pytest.raises(ValueError, match="sample_weight has no part"):
        as_loss(nn.MSELoss(), {}, outputs)(outputs, y, weighted=True)


def test_folds_may_have_seeds_of_their_own():
    rows = Rows(torch.arange(20.0)[:, None], torch.zeros(20))
    one, two, both = (Minibatches([rows] * k, 4, seed=seed) for k, seed in ((1, 0), (1, 7), (2, [0, 7])))
    for _ in range(12):
        assert torch.equal(next(both).x, torch.cat([next(one).x, next(two).x]))
