"""The step of λ̂: from a hypergradient to a move, on scales that mean the same for every loss, model and number of values.

descent = Descent(lam_hat, space, lr=0.05, eps=1e-2, grain_scale=1.0, n_valid=500)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hypertune.space import Space


class Descent(torch.optim.Adam):
    """Adam of λ̂, in which a hyperparameter of many values moves as one number, and its values around that.

    A slope is in nats for each unit of λ, so that ``eps`` can say from where on it matters. Each of many values has a small slope
    of its own; what matters is that of moving all of them together. So the values of a hyperparameter with a grain are moved
    by the sum of their slopes, all alike, with an Adam state of its own: as its single value would be, if it had one. And
    they are moved around their mean by their own slopes, times their number. (Where Adam had only the latter, the
    mean wandered: it divides each slope by the size of that slope's own noise.)

    Parameters
    ----------
    lam_hat : Tensor of shape (n,)
        Moved in place.
    space : Space
    lr, eps : float
        Adam's.
    grain_scale : float or None
        Standard deviation of a Gaussian prior on the values of a grain around their mean; None for no prior.
    n_valid : int
        Validation rows of all folds together: the prior is weighed against one loss for each.
    decay : float, default=0
        By which share of ``lr`` it falls with every step; it stays at zero.

    Attributes
    ----------
    nats_per_unit : Tensor of shape ()
        Nats in a unit of the validation loss: set by the caller.
    """

    def __init__(
        self,
        lam_hat: Tensor,
        space: Space,
        *,
        lr: float,
        eps: float,
        grain_scale: float | None,
        n_valid: int,
        decay: float = 0.0,
    ):
        self.lam_hat = lam_hat
        self.nats_per_unit = torch.ones_like(lam_hat[0])
        blocks = zip(space.hyperparameters, space.blocks.values(), strict=True)
        self._grains = [(h, block) for h, block in blocks if h.size > 1]
        self._shifts = lam_hat.new_zeros(len(self._grains))
        self._strength = 0.0 if grain_scale is None else 1 / (grain_scale**2 * n_valid)
        super().__init__([lam_hat, *([self._shifts] if self._grains else [])], lr=lr, betas=(0.9, 0.99), eps=eps)
        self._schedule = LambdaLR(self, lambda t: max(0.0, 1 - decay * t))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move λ̂ by ``lam_hat.grad``, the hypergradient, which stays as it is."""
        hypergradient = self.lam_hat.grad
        assert hypergradient is not None
        self.lam_hat.grad = slope = hypergradient * self.nats_per_unit
        self._shifts.grad = torch.zeros_like(self._shifts)
        for number, (h, block) in enumerate(self._grains):
            if h.grain != "row":  # the weights of rows are relative to their mean, and have no prior
                own = self.lam_hat[block]
                slope[block] += self._strength * (own - own.mean())
                self._shifts.grad[number] = slope[block].sum()
                slope[block] -= slope[block].mean()
            slope[block] *= h.size
        means = [self.lam_hat[block].mean() for _, block in self._grains]
        super().step()
        for mean, shift, (h, block) in zip(means, self._shifts, self._grains, strict=True):
            if h.grain != "row":
                self.lam_hat[block] += mean + shift - self.lam_hat[block].mean()
        self._shifts.zero_()
        self.lam_hat.grad = hypergradient
        self._schedule.step()
