import pytest
import torch
from torch.testing import assert_close

from hypertune.hypernetworks import HYPERNETWORKS, Gated, Layout, Linear, LowRank, ReluMLP


@pytest.mark.parametrize(
    ("description", "n", "parameters"),
    [(Linear(), 1, 15_700), (ReluMLP(hidden=50), 1, 400_450), (LowRank(rank=10), 7_850, 164_860)],
)
def test_sizes_are_the_papers(description, n: int, parameters: int):
    """A linear model 784-10 with a bias has D = 7,850 weights."""
    hypernetwork = description.build(torch.zeros(1, 7_850), torch.zeros(n), Layout(torch.arange(7_850)))
    assert sum(p.numel() for p in hypernetwork.parameters()) == parameters


def test_gated_needs_about_two_copies_of_the_weights():
    units = torch.arange(100).repeat_interleave(1000)
    hypernetwork = Gated(hidden=16).build(torch.zeros(1, 100_000), torch.zeros(6), Layout(units))
    assert sum(p.numel() for p in hypernetwork.parameters()) < 2.1 * 100_000


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_it_starts_at_the_initial_weights_for_every_lam_and_fold(name: str):
    w0 = torch.randn(3, 12)
    hypernetwork = HYPERNETWORKS[name].build(w0, torch.zeros(2), Layout(torch.arange(12) // 4))
    assert_close(hypernetwork(torch.randn(5, 2)).detach(), w0[:, None].expand(3, 5, 12))


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_folds_do_not_mix(name: str):
    """The weights of fold 0 depend on fold 0's parameters alone."""
    hypernetwork = HYPERNETWORKS[name].build(torch.randn(2, 6), torch.zeros(2), Layout(torch.arange(6) // 3))
    torch.nn.init.normal_(hypernetwork.maps[0].V)
    gradients = torch.autograd.grad(hypernetwork(torch.randn(4, 2))[0].sum(), list(hypernetwork.parameters()))
    for gradient in gradients:
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_pull_back_and_V_gradient_are_autograds(name: str):
    hypernetwork = HYPERNETWORKS[name].build(torch.randn(2, 6), torch.zeros(2), Layout(torch.arange(6) // 3))
    torch.nn.init.normal_(hypernetwork.maps[0].V)
    _check_gradients(hypernetwork, 2)


def _check_gradients(hypernetwork, n: int) -> None:
    features = hypernetwork.features(torch.randn(4, n)).detach().requires_grad_()
    G = torch.randn(2, 4, 6)
    Vs = [linear.V for linear in hypernetwork.maps]
    by_features, *by_V = torch.autograd.grad((hypernetwork.weights(features) * G).sum(), [features, *Vs])
    assert_close(hypernetwork.pull_back(features, G), by_features)
    power = torch.tensor([2.0, 4.0]).view(2, 1, 1)
    for linear, gradient in zip(hypernetwork.maps, by_V, strict=True):
        gradient = gradient * getattr(linear, "present", 1.0)  # a weight without a feature is left alone
        assert_close(linear.gradient(features, G).detach(), gradient)
        before = linear.V.detach().clone()
        linear.move(features.detach(), G, power)
        assert_close(linear.V.detach(), before - gradient / power)


def test_a_fine_grain_moves_its_own_weights_alone_at_one_copy_of_them():
    """Three coordinates: 0 moves everything, 1 and 2 each their own weights, weight 5 follows 0 only."""
    w0, own = torch.randn(2, 6), torch.tensor([1, 1, 1, 2, 2, -1])
    hypernetwork = Linear().build(w0, torch.zeros(3), Layout(torch.zeros(6, dtype=torch.long), [own]))
    assert [linear.V.shape for linear in hypernetwork.maps] == [(2, 1, 6), (2, 1, 6)]
    for linear in hypernetwork.maps:
        torch.nn.init.normal_(linear.V)
    hypernetwork.maps[1].V.data[..., 5] = 0  # where it starts and stays
    moved = [(hypernetwork(row[None])[:, 0] - w0).abs().sum(dim=0) > 0 for row in torch.eye(3)]
    assert [m.nonzero().flatten().tolist() for m in moved] == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4]]
    _check_gradients(hypernetwork, 3)
    assert (hypernetwork.maps[1].V[..., 5] == 0).all()


def test_the_centre_moves_with_lam_hat():
    lam_hat = torch.zeros(2)
    hypernetwork = Linear().build(torch.randn(1, 4), lam_hat, Layout(torch.arange(4)))
    torch.nn.init.normal_(hypernetwork.maps[0].V)
    lam_hat += 3.0
    assert_close(hypernetwork(lam_hat[None])[0].detach(), hypernetwork.w0.detach())


def test_the_variance_is_that_of_drawn_hypernetworks():
    """w₀ and V / 2σ are drawn; the weights at λ have the root of the stated variance, which has a second-order term more."""
    torch.manual_seed(0)
    own, sigma = torch.tensor([1, 1, 1, 2, 2, -1]), torch.tensor([0.25, 0.15, 0.35])
    lam, center = torch.tensor([[0.4, -0.6, 0.9], [0.0, 0.0, 0.0]]), torch.zeros(3)
    hypernetwork = Linear().build(
        torch.randn(20_000, 6), center, Layout(torch.zeros(6, dtype=torch.long), [own])
    )  # one for each draw
    dense, local = hypernetwork.maps
    dense.V.data.normal_().div_(2 * sigma[0])
    local.V.data.normal_().div_(2 * sigma[own.clamp(min=0)]).mul_(local.present)
    drawn = hypernetwork(lam).detach().var(dim=0)
    stated = hypernetwork.variance(lam, sigma)[0].sqrt().expand(2, 6)
    assert_close(drawn, stated, rtol=0.05, atol=0)
    assert_close(stated[1], torch.ones(6))


def test_where_no_lam_was_sampled_the_variance_is_infinite():
    hypernetwork = Linear().build(torch.zeros(1, 4), torch.zeros(2), Layout(torch.arange(4)))
    lam = torch.tensor([[1.0, 0.0], [0.0, 0.5], [4.1, 0.0]])  # the last is further than anybody measured
    assert hypernetwork.variance(lam, torch.tensor([0.5, 0.0])).flatten().tolist() == [4.0, torch.inf, torch.inf]


def test_at_its_centre_a_linear_hypernetwork_is_w0_and_no_other_is():
    center, units = torch.zeros(2), Layout(torch.arange(6) // 3)
    for name, description in HYPERNETWORKS.items():
        hypernetwork = description.build(torch.randn(1, 6), center, units)
        assert hypernetwork.is_w0_at(center) == (name == "linear")
        assert not hypernetwork.is_w0_at(center.clone())
