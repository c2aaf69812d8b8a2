import math

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats
from scipy.stats import beta, expon, halfnorm, lognorm, loguniform, norm, randint, truncnorm, uniform
from torch.testing import assert_close

from hypertune.space import Space

DISTRIBUTIONS = {
    "loguniform": loguniform(1e-6, 1e1),
    "uniform": uniform(-0.5, 2.0),
    "norm": norm(3.0, 2.0),
    "lognorm": lognorm(1.0),
    "expon": expon(scale=0.1),
    "halfnorm": halfnorm(),
    "beta": beta(2, 5),
    "truncnorm": truncnorm(-1, 2),
    "optuna log": FloatDistribution(1e-5, 1e-1, log=True),
    "optuna linear": FloatDistribution(0.0, 0.8),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_values_survive_the_round_trip_and_stay_in_bounds(name: str):
    space = Space.from_distributions({"a": DISTRIBUTIONS[name]})
    h = space.hyperparameters[0]
    low, high = h.support
    for value in h.prior.ppf([0.01, 0.3, 0.5, 0.99]):
        (back,) = space.decode(space.encode({"a": value})).values()
        assert type(back) is float
        assert back == pytest.approx(value, rel=1e-9)
    extreme = space.values(torch.tensor([[-1e3], [1e3]], dtype=torch.float64))["a"]
    assert (extreme >= low).all()
    assert (extreme <= high).all()


def test_bounds_themselves_can_be_reached():
    space = Space.from_distributions({"p": uniform(0, 0.8), "wd": loguniform(1e-6, 1e1)})
    assert space.decode(space.low) == {"p": 0.0, "wd": pytest.approx(1e-6, rel=1e-12)}
    assert space.decode(space.encode({"p": 0.0, "wd": 0.0})) == space.decode(space.low)
    assert all(1e-6 <= v <= 10 for v in (space.decode(space.low)["wd"], space.decode(space.high)["wd"]))


def test_units_are_comparable():
    """A unit of λ is a factor of e, a quarter of the range, or a standard deviation."""
    space = Space.from_distributions({"log": loguniform(1e-3, 1), "range": uniform(1, 2), "free": norm(0, 3)})
    lam = space.encode({"log": 0.1, "range": 2.0, "free": 0.0})
    before, after = space.decode(lam), space.decode(lam + 0.5)
    assert after["log"] / before["log"] == pytest.approx(math.exp(0.5))
    assert after["range"] - before["range"] == pytest.approx(0.5 * 2 / 4)
    assert after["free"] - before["free"] == pytest.approx(0.5 * 3, rel=0.01)


def test_sampling_follows_the_priors():
    space = Space.from_distributions({"wd": loguniform(1e-4, 1e0), "p": beta(2, 5)})
    drawn = space.values(space.sample(4000, np.random.default_rng(0)))
    assert float(drawn["wd"].log10().mean()) == pytest.approx(-2, abs=0.1)
    assert float(drawn["p"].mean()) == pytest.approx(2 / 7, abs=0.02)


def test_values_of_a_batch_keep_its_shape():
    space = Space.from_distributions({"wd": loguniform(1e-4, 1e0), "p": uniform(0, 1)})
    assert {k: v.shape for k, v in space.values(torch.zeros(3, 2)).items()} == {"wd": (3,), "p": (3,)}
    assert_close(space.values(torch.zeros(3, 2))["p"], torch.zeros(3))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([0.1, 0.2], r"param_distributions\['x'\]: it has a gradient, and no need of a list: give its range"),
        (randint(1, 5), r"\['x'\].*not a continuous distribution.*outer search"),
        (IntDistribution(1, 5), r"\['x'\].*discrete.*outer search"),
        (CategoricalDistribution(["a", "b"]), r"\['x'\].*discrete.*outer search"),
        (FloatDistribution(0.0, 1.0, step=0.1), r"\['x'\].*moves in steps"),
        (loguniform(-1.0, 1.0), r"\['x'\].*log distribution needs 0 < low < high"),
        (loguniform(0.0, 1.0), r"\['x'\].*log distribution needs 0 < low < high"),
        (uniform(1.0, 0.0), r"\['x'\].*(empty|no support)"),
        (FloatDistribution(1.0, 1.0), r"\['x'\].*empty"),
        (loguniform(1.0, 1e39), r"\['x'\]: the range \[1, 1e\+39\] is beyond what float32"),
        (uniform, r"\['x'\].*is not frozen; call it"),
        *(
            [(stats.Uniform(a=0, b=1), r"with rvs and ppf are taken, such as uniform")]
            if hasattr(stats, "Uniform")
            else []
        ),
    ],
)
def test_what_a_gradient_cannot_tune_is_refused_by_name(entry, message: str):
    with pytest.raises(ValueError, match=message):
        Space.from_distributions({"x": entry})


def test_what_is_no_space_is_refused():
    with pytest.raises(TypeError, match=r"\['x'\]: got 3; expected a frozen continuous scipy.stats distribution"):
        Space.from_distributions({"x": 3})
    with pytest.raises(ValueError, match="nothing to tune"):
        Space.from_distributions({})
    with pytest.raises(TypeError, match="one dict"):
        Space.from_distributions([{"x": uniform(0, 1)}])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [(1e-8, 1e2), (1e-6, 1e1), (1e-5, 1e3), (1e-4, 1e-2)])
def test_a_value_at_its_bound_has_the_derivative_of_its_coordinate(bounds: tuple[float, float], dtype: torch.dtype):
    """log(bound) rounds to either side of it; on the wrong one clamp would have none, and λ̂ would never leave."""
    space = Space.from_distributions({"weight_decay": loguniform(*bounds)})
    lam = torch.stack([space.low, space.high]).to(dtype).requires_grad_()
    values = space.values(lam)["weight_decay"]
    assert ((values >= min(bounds)) & (values <= max(bounds))).all()
    (slope,) = torch.autograd.grad(values.sum(), lam)
    assert torch.allclose(slope[:, 0], values.detach(), rtol=1e-5)
