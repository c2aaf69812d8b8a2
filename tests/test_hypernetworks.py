import pytest
import torch
from torch.testing import assert_close

from hypertune.hypernetworks import HYPERNETWORKS, Gated, Linear, LowRank, ReluMLP


@pytest.mark.parametrize(
    ("description", "n", "parameters"),
    [(Linear(), 1, 15_700), (ReluMLP(hidden=50), 1, 400_450), (LowRank(rank=10), 7_850, 164_860)],
)
def test_sizes_are_the_papers(description, n: int, parameters: int):
    """A linear model 784-10 with a bias has D = 7,850 weights."""
    hypernetwork = description.build(torch.zeros(1, 7_850), torch.zeros(n), torch.arange(7_850))
    assert sum(p.numel() for p in hypernetwork.parameters()) == parameters


def test_gated_needs_about_two_copies_of_the_weights():
    units = torch.arange(100).repeat_interleave(1000)
    hypernetwork = Gated(hidden=16).build(torch.zeros(1, 100_000), torch.zeros(6), units)
    assert sum(p.numel() for p in hypernetwork.parameters()) < 2.1 * 100_000


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_it_starts_at_the_initial_weights_for_every_lam_and_fold(name: str):
    w0 = torch.randn(3, 12)
    hypernetwork = HYPERNETWORKS[name].build(w0, torch.zeros(2), torch.arange(12) // 4)
    assert_close(hypernetwork(torch.randn(5, 2)).detach(), w0[:, None].expand(3, 5, 12))


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_folds_do_not_mix(name: str):
    """The weights of fold 0 depend on fold 0's parameters alone."""
    hypernetwork = HYPERNETWORKS[name].build(torch.randn(2, 6), torch.zeros(2), torch.arange(6) // 3)
    torch.nn.init.normal_(hypernetwork.V)
    gradients = torch.autograd.grad(hypernetwork(torch.randn(4, 2))[0].sum(), list(hypernetwork.parameters()))
    for gradient in gradients:
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0


@pytest.mark.parametrize("name", HYPERNETWORKS)
def test_pull_back_and_V_gradient_are_autograds(name: str):
    hypernetwork = HYPERNETWORKS[name].build(torch.randn(2, 6), torch.zeros(2), torch.arange(6) // 3)
    torch.nn.init.normal_(hypernetwork.V)
    features = hypernetwork.features(torch.randn(4, 2)).detach().requires_grad_()
    G = torch.randn(2, 4, 6)
    by_features, by_V = torch.autograd.grad((hypernetwork.weights(features) * G).sum(), [features, hypernetwork.V])
    assert_close(hypernetwork.pull_back(features, G), by_features)
    assert_close(hypernetwork.V_gradient(features, G).detach(), by_V)
    before, power = hypernetwork.V.detach().clone(), torch.tensor([2.0, 4.0]).view(2, 1, 1)
    hypernetwork.move_V(features.detach(), G, power)
    assert_close(hypernetwork.V.detach(), before - by_V / power)


def test_the_centre_moves_with_lam_hat():
    lam_hat = torch.zeros(2)
    hypernetwork = Linear().build(torch.randn(1, 4), lam_hat, torch.arange(4))
    torch.nn.init.normal_(hypernetwork.V)
    lam_hat += 3.0
    assert_close(hypernetwork(lam_hat[None])[0].detach(), hypernetwork.w0.detach())
