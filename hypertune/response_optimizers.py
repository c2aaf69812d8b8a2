"""Line 4 of the algorithms: how φ descends, by the optimizer of the weights.

The response is trained as the weights are, with their preconditioner, which torch's optimizers keep in their state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from hypertune.hypernetworks import Hypernetwork

_MOST = 10.0  # times a weight's step size: the most that its response moves for a feature of one


class PlainOptimizer:
    """One torch optimizer for all of φ, as in the paper.

    Parameters
    ----------
    hypernetwork : Hypernetwork
    weight_optimizer : torch.optim.Optimizer
        Holds all parameters of the hypernetwork.
    schedules : sequence of LRScheduler, optional
        Advanced with every step.
    """

    def __init__(
        self, hypernetwork: Hypernetwork, weight_optimizer: torch.optim.Optimizer, schedules: Sequence[LRScheduler] = ()
    ):
        self.hypernetwork = hypernetwork
        self.weight_optimizer = weight_optimizer
        self.schedules = schedules

    def step(self, features: Tensor, G: Tensor) -> None:
        """See :class:`ResponseOptimizer`. The loss is the mean over the m samples."""
        m = features.shape[1]
        self.hypernetwork.w0.grad = G.mean(dim=1)
        for linear in self.hypernetwork.maps:
            linear.V.grad = linear.gradient(features.detach(), G) / m
        _backward_basis(self.hypernetwork, features, G / m)
        self.weight_optimizer.step()
        _advance(self.schedules)

    def step_at_center(self, G: Tensor) -> None:
        """See :class:`ResponseOptimizer`."""
        self.hypernetwork.w0.grad = G
        for parameter in self.hypernetwork.parameters():
            if parameter is not self.hypernetwork.w0:
                parameter.grad = None
        self.weight_optimizer.step()
        _advance(self.schedules)


class TangentOptimizer:
    """w₀ by any torch optimizer, and V by the tangent of that optimizer's own dynamics. The default.

    V has w₀'s preconditioner P (Adam's √v̂, and its like of RMSprop, Adagrad, Adamax and Adadelta; the identity for SGD and any other) and step size α, in normalised form:

        V ← V − α Σ_m (f − f̄) ⊗ P⁻¹ G / (Σ_m ‖f − f̄‖² + 2 · average of Σ_m (f − f̄)²),     f̄ the mean over m samples, or 0 of one

    with the features of its own map of the hypernetwork, of which there may be several.
    For the linear hypernetwork and a pair λ̂ ± σε this is α/(|ε|² + 2) · P⁻¹ (g₊ − g₋)/2σ ⊗ ε: on average, and to first order in
    σ, a multiple of P⁻¹ (H V + ∂²L/∂w∂λ), whose root is dw*/dλ. It is stable whenever w₀'s training is and does not depend on
    the scale of f. Subtracting f̄ cancels the noise that the m samples share. P⁻¹ G is bounded as Adam's own steps are: a weight
    whose gradients at λ̂ ± σε happened to cancel would have a P next to nothing, and its response would be thrown far away.
    SGD's momentum is not V's, which lags behind w₀ for that: with it the steps along single random ε would not be stable.

    Parameters
    ----------
    hypernetwork : Hypernetwork
    weight_optimizer : torch.optim.Optimizer
        Holds ``hypernetwork.w0`` alone.
    basis_optimizer : torch.optim.Optimizer or None
        Holds the parameters of the basis, if it has any.
    schedules : sequence of LRScheduler, optional
        Advanced with every step.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        weight_optimizer: torch.optim.Optimizer,
        basis_optimizer: torch.optim.Optimizer | None = None,
        schedules: Sequence[LRScheduler] = (),
    ):
        self.hypernetwork = hypernetwork
        self.schedules = schedules
        self.weight_optimizer = weight_optimizer
        self.basis_optimizer = basis_optimizer
        self._powers: dict[int, Tensor] = {}

    def step(self, features: Tensor, G: Tensor) -> None:
        """See :class:`ResponseOptimizer`."""
        hypernetwork = self.hypernetwork
        self._move_w0(G.mean(dim=1))
        with torch.no_grad():
            centred = features - features.mean(dim=1, keepdim=True) if features.shape[1] > 1 else features
            step = G if self.basis_optimizer is None else G.clone()
            lr = self.weight_optimizer.param_groups[0]["lr"]
            if (P := preconditioner(hypernetwork.w0, self.weight_optimizer)) is None:
                step *= lr
            else:
                step /= P.div_(lr)[:, None]
                step.clamp_(-_MOST * lr, _MOST * lr)
            for number, linear in enumerate(hypernetwork.maps):
                total, each = linear.power(centred)
                average = self._powers.get(number, each)
                self._powers[number] = average + 0.01 * (each - average)
                linear.move(centred, step, total + 2 * self._powers[number] + 1e-30)
        if self.basis_optimizer is not None:
            _backward_basis(hypernetwork, features, G / features.shape[1])
            self.basis_optimizer.step()
        _advance(self.schedules)

    def step_at_center(self, G: Tensor) -> None:
        """See :class:`ResponseOptimizer`."""
        self._move_w0(G)
        _advance(self.schedules)

    def _move_w0(self, G: Tensor) -> None:
        self.hypernetwork.w0.grad = G
        self.weight_optimizer.step()
        self.hypernetwork.w0.grad = None  # lets go of a copy of the weights


def _advance(schedules: Sequence[LRScheduler]) -> None:
    for schedule in schedules:
        schedule.step()


def preconditioner(w0: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """P, what the optimizer divides w₀'s gradient by, (K, D): Adam's √v̂ + ε, and its like of its relatives; None of others (SGD), or before a step."""
    state, group = optimizer.state.get(w0, {}), optimizer.param_groups[0]
    if "exp_avg_sq" in state:  # Adam, AdamW, NAdam, RAdam
        squares = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        return (squares / bias_correction(group["betas"][1], state["step"], w0)).sqrt_().add_(group["eps"])
    if "exp_inf" in state:  # Adamax
        return state["exp_inf"].clone()
    if "acc_delta" in state:  # Adadelta
        return ((state["square_avg"] + group["eps"]) / (state["acc_delta"] + group["eps"])).sqrt_()
    if "square_avg" in state:  # RMSprop
        centre = state["grad_avg"].square() if group.get("centered") else 0.0
        return (state["square_avg"] - centre).clamp_(min=0).sqrt_().add_(group["eps"])
    if "sum" in state:  # Adagrad
        return state["sum"].sqrt().add_(group["eps"])
    return None


def bias_correction(beta: float, step: Tensor | float, like: Tensor) -> Tensor:
    """Adam's 1 − βᵗ, (), without waiting for the device that may hold t."""
    t = step.to(like.dtype) if isinstance(step, Tensor) else torch.tensor(step, dtype=like.dtype, device="cpu")
    return 1 - beta**t


def _backward_basis(hypernetwork: Hypernetwork, features: Tensor, G: Tensor) -> None:
    parameters = list(hypernetwork.basis.parameters())
    if parameters:
        gradients = torch.autograd.grad(features, parameters, hypernetwork.pull_back(features, G))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
