"""M models in one pass are M models: weights, dropout, running statistics, and what can be stacked."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.testing import assert_close

from hypertune import MLP
from hypertune.batches import Batch
from hypertune.examination import examine
from hypertune.layers import differentiable_in_eval_mode
from hypertune.losses import cross_entropy, squared_error
from hypertune.memory import Attributes
from hypertune.objective import Objective
from hypertune.reach import find_reach
from hypertune.stacked import StackedModule


def _net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


class Averaging(nn.Module):
    """A buffer that is replaced in training, one that is not, and a sparse one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("scale", torch.full((4,), 2.0, dtype=torch.float64))
        self.register_buffer("links", torch.eye(4, dtype=torch.float64).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = 0.5 if self.training else 0.9  # in eval mode it is replaced, too, and that is for nobody to keep
        self.mean = kept * self.mean + 0.5 * x.mean(dim=0).detach()
        return self.linear((x - self.mean) * self.scale)


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(torch.randn(1, 6, 4, generator=g, dtype=torch.float64), torch.arange(6)[None] % 3)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout, (64, 50)), (nn.Dropout2d, (64, 50, 3, 3)), (nn.Dropout1d, (64, 50, 4))]
)
def test_our_dropout_drops_what_torchs_drops(layer: type[nn.Module], shape: tuple[int, ...]):
    """Rate, scaling and channelwise masks."""
    objective = Objective(nn.Sequential(layer(0.3), nn.Linear(shape[-1], 1)), squared_error)
    drop = objective.modules[True][0]
    out = drop(torch.ones(shape))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.05)
    if layer is not nn.Dropout:
        assert (out.flatten(2).std(dim=2) == 0).all()


def test_weights_survive_the_round_trip_and_frozen_parameters_are_left_out():
    net = _net()
    net[0].bias.requires_grad_(False)
    objective = Objective(net, cross_entropy)
    assert sum(p.numel() for p in net.parameters()) - 8 == objective.D
    w = torch.randn(objective.D, dtype=torch.float64)
    loaded = objective.load_into(_net(), w)
    assert_close(torch.cat([p.reshape(-1) for k, p in loaded.named_parameters() if k != "0.bias"]), w)
    assert_close(loaded[0].bias.detach(), net[0].bias)
    assert objective.units().tolist()[:4] == [0, 0, 0, 0]
    assert len(objective.units()) == objective.D


def test_the_users_module_is_never_changed(batch: Batch):
    net = _net(0.5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    objective = Objective(net, cross_entropy, reach={"p": find_reach(_net, 0.0, 0.8)})
    objective.train_loss(
        torch.randn(2, objective.D, dtype=torch.float64), {"p": torch.tensor([0.1, 0.2])}, batch.repeat(2)
    )
    assert type(net[2]) is nn.Dropout
    assert net[2].p == 0.5
    assert_close(dict(net.state_dict()), before)


def test_running_statistics_are_kept_per_fold(batch: Batch):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    objective = Objective(net, cross_entropy, folds=2)
    before = {k: b.clone() for k, b in objective.statistics.items()}
    examine(objective, batch.x[0], {})
    assert objective.stacked
    assert all(torch.equal(objective.statistics[k], b) for k, b in before.items())
    w = objective.initial_weights().expand(2, -1)
    rows = Batch(torch.cat([batch.x, batch.x + 5]), torch.cat([batch.y, batch.y]))
    objective.train_loss(w, {}, rows)
    means = [objective.load_into(net, w[0], fold)[1].running_mean.clone() for fold in (0, 1)]
    assert not torch.allclose(*means)


def test_in_the_gradient_of_the_validation_loss_running_statistics_respond_to_the_weights(batch: Batch):
    """Against finite differences of a loss whose statistics are counted anew at the weights, on the rows that it is taken of."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=1.0), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(net, cross_entropy)
    rows = Batch(torch.cat([batch.x, batch.x.flip(2)], 1), batch.y.repeat(1, 2))
    examine(objective, batch.x[0], {})
    g = torch.Generator().manual_seed(0)
    w, direction = (torch.randn(2, objective.D, generator=g, dtype=torch.float64) for _ in range(2))

    def losses(w: torch.Tensor) -> torch.Tensor:
        own = objective.with_statistics_of(1, 2)
        own.train_loss(w, {}, rows.repeat(2))
        own.statistics["1.running_var"] *= 11 / 12  # torch keeps the unbiased one
        return own.valid_loss(w, rows.repeat(2))

    (gradient,) = torch.autograd.grad(losses(w.requires_grad_()).sum(), w)
    with torch.no_grad():
        expected = (losses(w + 1e-6 * direction) - losses(w - 1e-6 * direction)) / 2e-6
    assert_close((gradient * direction).sum(dim=1), expected, rtol=1e-5, atol=1e-7)
    scaled = objective.named(gradient)["0.weight"] * objective.named(w)["0.weight"]
    assert abs(scaled.sum()) < 1e-4  # weights in front of a normalisation have no scale, but for its eps


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (9, 3)),
        (nn.BatchNorm1d, (9, 3, 4)),
        (nn.BatchNorm2d, (9, 3, 4, 4)),
        (nn.BatchNorm3d, (9, 3, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("params", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_the_outputs_of_batchnorm_in_eval_mode_are_torchs(norm, shape, params):
    torch.manual_seed(0)
    net = norm(3, **params).double()
    for _ in range(3):
        net(3 * torch.randn(shape, dtype=torch.float64) + 1)
    own = differentiable_in_eval_mode(copy.deepcopy(net))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_close(own(x), net.eval()(x))
    with torch.no_grad():
        assert torch.equal(own(x), net(x))
    slope, torchs = (torch.autograd.grad(module(x)[:, 0].sum(), x)[0].abs().max() for module in (own, net))
    assert slope < 1e-12  # all rows one up change nothing
    assert torchs > 0.1 or params == {"track_running_stats": False}
    if params != {"track_running_stats": False}:
        one = torch.randn(1, 3, *(1,) * (len(shape) - 2), dtype=torch.float64)  # has no statistics of its own
        assert_close(own(one), net(one))
    with pytest.raises(ValueError, match="expected"):
        own(x[..., None, None, None, None])


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (True, True)])
def test_batchnorm_s_own_weights_have_their_gradient_whatever_the_statistics(weight, bias):
    torch.manual_seed(0)
    net = nn.BatchNorm1d(3).double()
    for name, own in (("weight", weight), ("bias", bias)):
        setattr(net, name, nn.Parameter(torch.randn(3, dtype=torch.float64)) if own else None)
    net(5 * torch.randn(20, 3, dtype=torch.float64) + 2)
    own, x = differentiable_in_eval_mode(copy.deepcopy(net)), torch.randn(9, 3, dtype=torch.float64)
    assert_close(own(x), net.eval()(x))
    found, expected = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (own, net))
    assert_close(found, expected)


class Holding(nn.Sequential):
    """Keeps its BatchNorm frozen."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self[0].eval()
        return self


class Own(nn.BatchNorm1d):
    """May do anything."""


@pytest.mark.parametrize(
    ("net", "rows"),
    [
        (Holding(nn.BatchNorm1d(3)), 20),
        (nn.Sequential(nn.BatchNorm1d(3, momentum=0.0)), 20),
        (nn.Sequential(Own(3)), 20),
        (nn.Sequential(nn.BatchNorm1d(3)), 7),
    ],
    ids=["frozen", "no momentum", "a subclass", "few rows"],
)
def test_statistics_that_do_not_respond(net, rows):
    x = torch.randn(rows, 3, requires_grad=True)
    own = differentiable_in_eval_mode(copy.deepcopy(net))
    assert_close(torch.autograd.grad(own(x).sum(), x), torch.autograd.grad(net.eval()(x).sum(), x))


def test_statistics_of_half_precision_do_not_overflow():
    x = 400 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    net = nn.BatchNorm1d(3, momentum=1.0)
    net(x)
    own = differentiable_in_eval_mode(copy.deepcopy(net))
    assert_close(own(x.half()).float(), net.eval()(x), atol=2e-2, rtol=1e-2)


def test_running_statistics_of_a_stacked_pass_are_those_of_one_model_after_the_other(batch: Batch):
    """In training, kept or not; and two models of one fold share what the fold has, or have their own."""
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.BatchNorm1d(8, momentum=0.3),
        nn.Linear(8, 3),
    )
    stacked, looped = Objective(net.double(), cross_entropy, folds=2), Objective(net, cross_entropy, folds=2)
    looped.stacked = False
    rows = Batch(torch.cat([batch.x, batch.x + 5]), torch.cat([batch.y, batch.y]))
    w = torch.randn(4, stacked.D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for objective in (stacked, looped):
        examine(objective, batch.x[0], {}) if objective.stacked else None
        torch.manual_seed(0)
        losses = [objective.train_loss(w[:2], {}, rows), objective.train_loss(w[2:], {}, rows)]
        kept = {k: b.clone() for k, b in objective.statistics.items()}
        losses.append(objective.train_loss(w[:2], {}, rows, keep_statistics=False))
        losses.append(objective.train_loss(w, {}, rows.repeat(2), keep_statistics=False))
        assert all(torch.equal(objective.statistics[k], b) for k, b in kept.items())
        losses.append(objective.valid_loss(w, batch.repeat(4), fold=1))
        each = objective.with_statistics_of(2, 2)
        losses.append(each.train_loss(w, {}, rows.repeat(2)))
        losses.append(each.valid_loss(w[2:], batch.repeat(2), fold=1))
        assert_close(losses[-1], each.valid_loss(w, batch.repeat(4))[2:])
        found.append((losses, {**objective.statistics, **{f"each {k}": b for k, b in each.statistics.items()}}))
    assert_close(*found)
    assert found[0][1]["1.num_batches_tracked"].tolist() == [2, 2]
    assert len(found[0][1]["each 1.running_mean"].unique(dim=0)) == 4


def test_of_buffers_those_that_training_writes_are_kept_per_model(batch: Batch):
    objective = Objective(Averaging(), cross_entropy, folds=2)
    examine(objective, batch.x[0], {})
    assert objective.stacked
    assert {k: b.shape for k, b in objective.statistics.items()} == {"mean": (2, 4)}
    rows = Batch(torch.cat([batch.x, batch.x + 5]), torch.cat([batch.y, batch.y]))
    w = objective.initial_weights().expand(2, -1)
    objective.train_loss(w, {}, rows)
    assert_close(objective.statistics["mean"], 0.5 * rows.x.mean(dim=1))
    objective.valid_loss(w, rows)
    trained = objective.load_into(Averaging(), w[0], 1)
    assert_close(trained.mean, 0.5 * rows.x[1].mean(dim=0))
    assert_close(trained.links.to_dense(), torch.eye(4, dtype=torch.float64))


def test_attention_in_threads_leaves_the_choices_of_the_process(batch: Batch):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.layer(x[:, None])[:, 0])

    objective = Objective(Attending().double(), cross_entropy)
    examine(objective, batch.x[0], {})
    assert objective.stacked
    w = objective.initial_weights().repeat(3, 1)
    choices = torch.backends.mha.get_fastpath_enabled, torch.backends.cuda.flash_sdp_enabled
    before = [choice() for choice in choices]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [objective.predict(w, batch.x.repeat(3, 1, 1)) for _ in range(20)], range(8)))
    assert [choice() for choice in choices] == before


def test_a_convolution_costs_its_multiplications_and_a_layer_its_weights():
    x = torch.zeros(2, 1, 8, 8)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2))
    objective = Objective(convolution, cross_entropy)
    examine(objective, x, {})
    assert objective.cost == 64 * 9 * 4 + 512
    assert objective.stacked
    large = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 64 * 64, 2))
    objective = Objective(large, cross_entropy)
    examine(objective, torch.zeros(2, 1, 64, 64), {})
    assert not objective.stacked  # on a CPU one after the other is faster
    objective = Objective(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), cross_entropy)
    examine(objective, torch.zeros(2, 4), {})
    assert objective.cost == objective.D


def test_images_with_blank_places_are_stacked():
    """Where layers begin these are on the kink of a ReLU, and rounding decides about the slope."""
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, 3:5, 3:5] = torch.rand(2, 1, 2, 2)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 2),
    )  # fmt: skip
    objective = Objective(net, cross_entropy)
    examine(objective, x, {})
    assert objective.stacked


def test_convolutions_of_a_size_are_computed_in_turn_and_are_the_same(monkeypatch):
    """Faster on a CPU; and they stay stacked, with all that comes with it."""

    def net(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(channels * 256, 2),
        )  # fmt: skip

    x, y = torch.randn(3, 6, 1, 16, 16), torch.randint(2, (3, 6))
    found = []
    for channels, in_turn in ((4, False), (32, True)):
        objective = Objective(net(channels), cross_entropy, folds=3)
        examine(objective, x[0, :2], {})
        assert objective.stacked
        assert objective.in_turn == in_turn
    wide = Objective(MLP((300, 300))(4, 2), cross_entropy)
    examine(wide, torch.randn(2, 4), {})
    assert not wide.in_turn
    together = []
    monkeypatch.setattr("hypertune.stacked.vmap", lambda *args, **kwargs: together.append(1) or vmap(*args, **kwargs))
    w = objective.initial_weights().repeat(3, 1)
    for in_turn in (True, False):
        objective = objective.with_statistics_of(3, 1)
        objective.in_turn = in_turn
        torch.manual_seed(0)
        loss = objective.train_loss(w, {}, Batch(x, y))
        assert bool(together) is not in_turn
        together.clear()
        found.append([loss, objective.valid_loss(w, Batch(x, y)), *objective.statistics.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_module_that_cannot_be_stacked_falls_back_with_one_warning(batch: Batch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else -self.linear(x)

    objective = Objective(Branching(), cross_entropy)
    with pytest.warns(UserWarning, match=r"one after the other: Branching does not work under torch.func.vmap"):
        examine(objective, batch.x[0], {})
    assert objective.valid_loss(torch.randn(2, objective.D, dtype=torch.float64), batch.repeat(2)).shape == (2,)


def test_every_model_may_keep_running_statistics_of_its_own(batch: Batch):
    objective = Objective(_normed(), cross_entropy)
    examine(objective, batch.x[0], {})
    objective.keep_statistics_of(3)
    w = torch.randn(3, objective.D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective.train_loss(w, {}, Batch(batch.x[:1].repeat(3, 1, 1), batch.y[:1].repeat(3, 1)))
    kept = objective.statistics["1.running_mean"]
    for i in range(3):
        alone = Objective(_normed(), cross_entropy)
        examine(alone, batch.x[0], {})
        alone.train_loss(w[i : i + 1], {}, Batch(batch.x[:1], batch.y[:1]))
        assert_close(kept[i], alone.statistics["1.running_mean"][0])
    objective.forget_statistics_but_of(1)
    assert len(objective.statistics["1.running_mean"]) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda act, drop: nn.Sequential(nn.Linear(4, 8), act, drop, nn.Linear(8, 8), act, drop, nn.Linear(8, 3)),
        lambda act, drop: nn.Sequential(nn.Sequential(nn.Linear(4, 8), act, drop), drop, act, nn.Linear(8, 3)),
    ],
)
def test_a_layer_that_recurs_runs_wherever_it_stands(batch: Batch, build):
    torch.manual_seed(0)
    module = build(nn.Tanh(), nn.Dropout(0.5)).double()
    objective = Objective(module, cross_entropy)
    w, x = objective.initial_weights()[None], batch.x
    assert_close(objective.predict(w, x)[0], module.eval()(x[0]))
    assert sum(isinstance(m, nn.Dropout) for m in objective.modules[True].modules()) == 0
    torch.manual_seed(1)  # the rates of both places are one number
    for sub in objective.modules[True].modules():
        if hasattr(sub, "channelwise"):
            sub.p = 0.0
    trained = objective.outputs(objective.named(w), x, {}, training=True)
    assert_close(trained[0], module.eval()(x[0]))


def test_layers_that_share_a_weight_keep_it(batch: Batch):
    """Two layers, one parameter: it has the first one's name only."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    module[2].weight = module[0].weight
    objective = Objective(module, cross_entropy)
    assert objective.D == 4 * 4 + 4 + 4 + 4 * 3 + 3
    w = torch.stack([objective.initial_weights(), objective.initial_weights() + 0.1])
    outputs = objective.predict(w, batch.x[:1].double().repeat(2, 1, 1))
    assert_close(outputs[0], module(batch.x[0].double()))
    assert not torch.equal(outputs[0], outputs[1])


def test_a_linear_layer_that_recurs_keeps_its_one_weight(batch: Batch):
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 3)).double()
    objective = Objective(module, cross_entropy)
    assert_close(objective.predict(objective.initial_weights()[None], batch.x)[0], module(batch.x[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_run_on_rows_of_more_dimensions(bias: bool):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(10, 2))
    objective, x = Objective(module, cross_entropy), torch.randn(2, 2, 2, 3)  # M == B == T
    w = objective.initial_weights().repeat(2, 1)
    assert_close(objective.predict(w, x), torch.stack([module(rows) for rows in x]))


def test_weights_go_into_no_other_architecture():
    objective = Objective(_net(), cross_entropy)
    with pytest.raises(ValueError, match="other parameters than before"):
        objective.load_into(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), objective.initial_weights())


def test_containers_that_hold_themselves_are_looked_into_no_further():
    class Cyclic(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.tree = {}
            self.tree["root"] = self.tree

    stacked = StackedModule(Cyclic())
    examine(stacked, torch.zeros(2, 3), {})
    assert stacked.stacked


def test_a_tensor_that_becomes_a_number_has_changed():
    module = nn.Linear(2, 2)
    module.seen = torch.zeros(3)
    built = Attributes(module)
    assert built.changes() == {}
    module.seen = 0
    assert built.changes() == {("", "seen"): 0}
