"""Other libraries for bilevel problems, as solvers of :mod:`benchmarks.peers`. Each is imported when it is first asked for.

A solver is a function of data and setting that yields, after every step of the hyperparameters, the L2 and the weights in hand.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.peers import Data, Pair


@dataclass(frozen=True)
class Setting:
    """How a peer is run.

    Parameters
    ----------
    name : str
    inner_steps : int
        Steps of the weights for one of the hyperparameters.
    lr : float
        Of the weights' gradient descent.
    restart : bool
        Whether the weights start from 0 after every step of the hyperparameters.
    logarithm : bool
        Whether the logarithm of the L2 is tuned, or the L2.
    low, high : float
        Bounds of what is tuned.
    optimizer : callable ``parameters -> torch.optim.Optimizer``
        Of the hyperparameters.
    iterations : int
        Of conjugate gradients, or the rank.
    alpha : float
        Their step size, or the damping of a low rank, where the library has one.
    """

    name: str
    inner_steps: int
    lr: float
    restart: bool
    logarithm: bool
    low: float
    high: float
    optimizer: Callable[[Any], torch.optim.Optimizer]
    iterations: int
    alpha: float

    def hyperparameters(self, like: Tensor) -> nn.Parameter:
        """Those of an L2 of 1 for each of ``like``."""
        return nn.Parameter(torch.zeros_like(like) if self.logarithm else torch.ones_like(like))

    def l2(self, lam: Tensor) -> Tensor:
        """What the training loss has."""
        return lam.exp() if self.logarithm else lam


class _Vector(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        return self.value


def betty(data: Data, setting: Setting) -> Iterator[Pair]:
    """betty-ml: conjugate gradients, as in its ``test_install.py``."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    logging.getLogger("betty").disabled = True  # it writes to the standard output

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return data.valid_loss(self.inner())

        def param_callback(self, *_: Any) -> None:
            self.module.value.data.clamp_(setting.low, setting.high)

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return data.train_loss(self.module(), setting.l2(self.outer()))

        def on_inner_loop_start(self) -> None:
            if setting.restart:
                self.module.value.data.zero_()

    w, lam = _Vector(torch.zeros(data.X.shape[1])), _Vector(setting.hyperparameters(data.X[0]))
    outer = Outer(
        name="outer", config=Config(first_order=True, retain_graph=True), module=lam, device="cpu",
        optimizer=setting.optimizer(lam.parameters()), train_data_loader=[(data.X_valid,)],
    )  # fmt: skip
    config = Config(
        type="cg", cg_iterations=setting.iterations, cg_alpha=setting.alpha, unroll_steps=setting.inner_steps
    )
    inner = Inner(
        name="inner", config=config, module=w, device="cpu",
        optimizer=torch.optim.SGD(w.parameters(), lr=setting.lr), train_data_loader=[(data.X,)],
    )  # fmt: skip
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = Engine(config=EngineConfig(), problems=[outer, inner], dependencies=dependencies)
    engine.train()
    for engine.global_step in itertools.count(1):  # what engine.run() does
        engine.train_step()
        if engine.global_step % setting.inner_steps == 0:
            yield setting.l2(lam.value.detach()), w.value.detach()


def hypergrad(data: Data, setting: Setting, method: str = "conjugate_gradient") -> Iterator[Pair]:
    """hypergrad (Hataya): its ``examples/logistic_regression.py``."""
    from hypergrad import approx_hypergrad
    from hypergrad.optimizers import diff_sgd
    from hypergrad.solver import BaseImplicitSolver

    class Solver(BaseImplicitSolver):
        f_params: Any
        f_optim_state: Any

        def inner_objective(self, w: Any, lam: Any) -> Tensor:
            return data.train_loss(w[0], setting.l2(lam[0]))

        def inner_update(self) -> None:
            gradient = torch.func.grad(self.inner_objective)(self.f_params, tuple(self.outer.parameters()))
            self.f_params, self.f_optim_state = self.inner_optimizer(
                list(self.f_params), list(gradient), self.f_optim_state
            )

        def outer_update(self) -> None:
            lam = tuple(p.detach() for p in self.outer.parameters())
            gradients = self.approx_ihvp(
                self.inner_objective, lambda w, lam: data.valid_loss(w[0]), tuple(self.f_params), lam
            )
            self.set_out_grad(gradients)
            self.outer_optimizer.step()
            self.outer.zero_grad(set_to_none=True)

        def post_outer_update(self) -> None:
            if setting.restart:
                self.f_params[0].zero_()
            for p in self.outer.parameters():
                p.data.clamp_(setting.low, setting.high)

    w, lam = _Vector(torch.zeros(data.X.shape[1])), _Vector(setting.hyperparameters(data.X[0]))
    sizes = {"rank": setting.iterations, "rho": setting.alpha}
    if method != "nystrom":
        sizes = {"num_iters": setting.iterations, "lr": setting.alpha}
    solver = Solver(
        w, lam, [(data.X,)], [(data.X_valid,)], functools.partial(getattr(approx_hypergrad, method), **sizes),
        num_iters=1, unroll_steps=setting.inner_steps, outer_optimizer=setting.optimizer(lam.parameters()),
        inner_optimizer=functools.partial(diff_sgd, momentum=0, weight_decay=0, lr=setting.lr), device=torch.device("cpu"),
    )  # fmt: skip
    while True:  # what solver.run() does
        for _ in range(setting.inner_steps):
            solver.inner_update()
        solver.outer_update()
        in_hand = solver.f_params[0].detach().clone()
        solver.post_outer_update()
        yield setting.l2(lam.value.detach()), in_hand


def torchopt_implicit(data: Data, setting: Setting) -> Iterator[Pair]:
    """torchopt: ``implicit_diff.custom_root`` with conjugate gradients, as in its tutorial on implicit differentiation."""
    import torchopt

    def objective(w: Tensor, lam: Tensor) -> Tensor:
        return data.train_loss(w, setting.l2(lam))

    solve = torchopt.linear_solve.solve_cg(maxiter=setting.iterations)

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective, argnums=0), argnums=1, solve=solve)
    def train(w: Tensor, lam: Tensor) -> Tensor:
        optimizer = torchopt.sgd(lr=setting.lr)
        params, state = (w,), optimizer.init((w,))
        with torch.enable_grad():
            for _ in range(setting.inner_steps):
                gradients = torch.autograd.grad(objective(*params, lam), params)
                updates, state = optimizer.update(gradients, state)
                params = torchopt.apply_updates(params, updates)
        return params[0]

    w, lam = torch.zeros_like(data.X[0]), setting.hyperparameters(data.X[0])
    optimizer = setting.optimizer([lam])
    while True:
        trained = train(w.clone().requires_grad_(), lam)
        (lam.grad,) = torch.autograd.grad(data.valid_loss(trained), lam)
        optimizer.step()
        lam.data.clamp_(setting.low, setting.high)
        w = torch.zeros_like(w) if setting.restart else trained.detach()
        yield setting.l2(lam.detach()), trained.detach()


def torchopt_unrolled(data: Data, setting: Setting) -> Iterator[Pair]:
    """torchopt: ``MetaSGD``, differentiated through, as in its tutorial on the meta-optimizer."""
    import torchopt

    module, lam = _Vector(torch.zeros(data.X.shape[1])), setting.hyperparameters(data.X[0])
    optimizer, inner = setting.optimizer([lam]), torchopt.MetaSGD(module, lr=setting.lr)
    start = torchopt.extract_state_dict(module, by="copy")
    while True:
        for _ in range(setting.inner_steps):
            inner.step(data.train_loss(module(), setting.l2(lam)))
        trained = module()
        (lam.grad,) = torch.autograd.grad(data.valid_loss(trained), lam)
        optimizer.step()
        lam.data.clamp_(setting.low, setting.high)
        if setting.restart:
            torchopt.recover_state_dict(module, start)
        else:
            torchopt.stop_gradient(module)
        torchopt.stop_gradient(inner)
        yield setting.l2(lam.detach()), trained.detach()


def higher(data: Data, setting: Setting) -> Iterator[Pair]:
    """higher: an inner loop context, differentiated through."""
    from higher import innerloop_ctx

    module, lam = _Vector(torch.zeros(data.X.shape[1])), setting.hyperparameters(data.X[0])
    optimizer, sgd = setting.optimizer([lam]), torch.optim.SGD(module.parameters(), lr=setting.lr)
    while True:
        with innerloop_ctx(module, sgd) as (functional, inner):
            for _ in range(setting.inner_steps):
                inner.step(data.train_loss(functional(), setting.l2(lam)))
            trained = functional()
            (lam.grad,) = torch.autograd.grad(data.valid_loss(trained), lam)
        optimizer.step()
        lam.data.clamp_(setting.low, setting.high)
        if not setting.restart:
            module.value.data.copy_(trained.detach())
        yield setting.l2(lam.detach()), trained.detach()


PEERS: dict[str, Callable[..., Iterator[Pair]]] = {
    "betty-ml, cg": betty,
    "hypergrad, cg": hypergrad,
    "hypergrad, nystrom": functools.partial(hypergrad, method="nystrom"),
    "torchopt, implicit": torchopt_implicit,
    "torchopt, unrolled": torchopt_unrolled,
    "higher, unrolled": higher,
}
