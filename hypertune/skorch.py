"""skorch nets in the search: a ``NeuralNetClassifier`` or ``NeuralNetRegressor`` as what hyper-training trains.

    HyperTrainingSearchCV(NeuralNetClassifier(Net, criterion=nn.CrossEntropyLoss, train_split=None),
                          {"optimizer__weight_decay": loguniform(1e-6, 1e-1), "module__dropout": uniform(0, 0.8)})

The net itself is cloned, retrained and refitted by scikit-learn; here is only what hyper-training asks of it. skorch leaves
the penalty to the optimizer, which applies it to biases too: here it is the same ½ · weight_decay · ‖w‖² of the training
loss, over all trained weights. Of the net's callbacks the hyper-training heeds ``LRScheduler`` alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import clone
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import EarlyStopping, LRScheduler
from torch import Tensor, nn

from hypertune.batches import Rows
from hypertune.functions import keywords_of
from hypertune.losses import CustomLoss, cross_entropy
from hypertune.objective import Objective
from hypertune.optimizers import refuse_optimizer, scheduled
from hypertune.randomness import isolated
from hypertune.reach import Reach

_NETS = (NeuralNet, NeuralNetClassifier, NeuralNetBinaryClassifier, NeuralNetRegressor)
_OWN_LOSSES = {cls.get_loss for cls in _NETS}
_STEPS = ("train_step", "train_step_single", "get_iterator", "get_dataset")  # methods that make a fit another training


@dataclass
class SkorchNet:
    """A skorch net, seen as :class:`hypertune.net.Net`."""

    net: NeuralNet
    loss_names: ClassVar[Mapping[str, str]] = {
        "optimizer__weight_decay": "weight_decay",
        "criterion__label_smoothing": "label_smoothing",
    }
    rate_name: ClassVar[str] = "lr"

    def __sklearn_clone__(self) -> SkorchNet:
        return SkorchNet(clone(self.net))

    def __copy__(self) -> SkorchNet:
        copied = clone(self.net)  # a shallow copy would share what skorch notes of the parameters that were set
        if hasattr(self.net, "classes_inferred_"):
            copied.classes_inferred_ = self.net.classes_inferred_
        return SkorchNet(copied)

    # --- its parameters ----------------------------------------------------------------------------------------------

    @property
    def max_epochs(self) -> int:
        return self.net.max_epochs

    @property
    def batch_size(self) -> int:
        size = self.net.get_params().get("iterator_train__batch_size", self.net.batch_size)
        return 2**31 if size == -1 else size  # -1 is skorch's "all rows"

    @property
    def device(self) -> str:
        return str(self.net.device or "cpu")

    def get_params(self) -> dict[str, Any]:
        """The net's parameters, and those that have not been set on it at the defaults of their owners."""
        defaults = {
            f"{owner}__{name}": default
            for owner in ("module", "optimizer", "criterion")
            for name, default in keywords_of(getattr(self.net, owner)).items()
        }
        return defaults | self.net.get_params()

    def set_params(self, **params: Any) -> SkorchNet:
        self.net.set_params(**params)
        return self

    def _why_not(self, name: str) -> str | None:
        params = self.get_params()
        if name == "lr" and "lr" in (set_on_it := self.net.get_params_for("optimizer")):
            return f"the net has optimizer__lr={set_on_it['lr']:g}, which is used in its place: leave that out"
        if name == "optimizer__weight_decay" and _decouples(self.net.optimizer, params):
            return (
                f"{self.net.optimizer.__name__} shrinks the weights beside the loss, so no loss belongs to it. Use "
                "torch.optim.Adam or torch.optim.SGD, whose weight_decay is a penalty"
            )
        if name == "criterion__label_smoothing" and not self._smooths:
            return f"needs criterion=torch.nn.CrossEntropyLoss without class weights, got {self.net.criterion!r}"
        return None

    def _sees(self, name: str) -> bool:
        owner, *_ = name.partition("__")
        return (
            owner in ("module", "optimizer", "lr", "batch_size", "max_epochs") or name == "iterator_train__batch_size"
        )

    # --- data ------------------------------------------------------------------------------------------------------------

    def _encode(self, X: Any, y: Any, sample_weight: Any = None, *, all_y: Any = None) -> Rows:
        if len(schedulers := self._schedulers()) > 1:
            raise ValueError(f"The hyper-training follows one LRScheduler; the net has {len(schedulers)}.")
        if "param_groups" in self.net.get_params_for("optimizer"):
            raise ValueError("optimizer__param_groups: the hyper-training trains all weights alike; leave it out.")
        if ignored := self._ignored():
            warnings.warn(
                f"The hyper-training trains on all rows of a fold and for max_epochs: of the net's it ignores {' and '.join(ignored)}, which the fits of "
                "candidates do not.",
                UserWarning,
                stacklevel=2,
            )
        self.net.check_data(X, y)
        return self._encode_more(X, y, sample_weight)

    def _encode_more(self, X: Any, y: Any, sample_weight: Any = None) -> Rows:
        if sample_weight is not None:
            raise ValueError("sample_weight: skorch nets do not weight rows. Use TorchClassifier or TorchRegressor.")
        x, target = self._tensor(X, "X"), self._tensor(y, "y")
        if not target.is_floating_point():
            target = target.long()
        return Rows(x, target)

    def _tensor(self, values: Any, name: str) -> Tensor:
        if not isinstance(values, Tensor):
            if hasattr(values, "columns"):
                raise ValueError(
                    f"{name} is a {type(values).__name__}, whose columns skorch passes as keywords; pass {name}.to_numpy()."
                )
            array = np.array(values)
            if array.dtype.kind not in "fiub":
                raise ValueError(
                    f"{name} of dtype {array.dtype}: skorch does not encode; pass numbers, as one array or tensor."
                )
            values = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        return values.detach().clone().to(self.device)

    # --- parts, shared with hyper-training ------------------------------------------------------------------------------

    def _build_module(self) -> nn.Module:
        net = clone(self.net)
        with net._current_init_context("module"):  # in which skorch notes the names of what is set
            net.initialize_module()
        if net._modules != ["module"]:
            raise TypeError(
                f"The skorch net trains the modules {net._modules}; hyper-training takes nets of one module."
            )
        return copy.deepcopy(net.module_).to(self.device)

    def _make_objective(
        self, module: nn.Module, *, reach: Mapping[str, list[Reach]] | None = None, folds: int = 1
    ) -> Objective:
        params = self.get_params()
        penalty = 0.0 if _decouples(self.net.optimizer, params) else params.get("optimizer__weight_decay", 0.0)
        smoothing = params["criterion__label_smoothing"] if self._smooths else 0.0
        fixed = {"weight_decay": float(penalty), "label_smoothing": float(smoothing)}
        loss = cross_entropy if self._smooths else _criterion_of(self.net)
        return Objective(module, loss, fixed=fixed, reach=reach, folds=folds, penalise_biases=True)

    def _make_optimizer(
        self, params: list[nn.Parameter], steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        keywords = self.net.get_params_for("optimizer")
        if not _decouples(self.net.optimizer, self.get_params()):
            keywords.pop("weight_decay", None)  # it is in the loss
        optimizer = self.net.optimizer(params, **{"lr": self.net.lr, **keywords})
        refuse_optimizer(optimizer)
        schedulers, lr = self._schedulers(), optimizer.param_groups[0]["lr"]
        if not schedulers:
            return optimizer, scheduled(optimizer, lambda progress: 1.0, steps)
        updates = steps if schedulers[0].step_every == "batch" else self.max_epochs
        policy = schedulers[0].policy
        if "ReduceLROnPlateau" in (policy, getattr(policy, "__name__", "")):
            raise ValueError(
                f"The hyper-training follows a scheduler whose learning rates are known before the fit, and those of LRScheduler({policy!r}) depend "
                "on a loss: use another policy, such as 'CosineAnnealingLR'."
            )
        rates = schedulers[0].simulate(updates, lr)
        return optimizer, scheduled(
            optimizer, lambda progress: float(rates[min(int(progress * updates), updates - 1)]) / lr, steps
        )

    def _callbacks(self) -> list[Any]:
        net = clone(self.net)
        if net.callbacks == "disable":
            return []
        net.initialize_callbacks()  # which sets what callbacks__… says, and leaves out what that switches off
        return [callback for _, callback in net.callbacks_]

    def _schedulers(self) -> list[LRScheduler]:
        return [c for c in self._callbacks() if isinstance(c, LRScheduler)]

    def _ignored(self) -> list[str]:
        """What makes a fit of the net's another training than the hyper-training's."""
        split = ["train_split (set it to None)"] if self.net.train_split else []
        own = [name for name in _STEPS if getattr(type(self.net), name) not in (getattr(cls, name) for cls in _NETS)]
        sampled = ["iterator_train__sampler"] if self.net.get_params().get("iterator_train__sampler") else []
        return split + ["EarlyStopping"] * any(isinstance(c, EarlyStopping) for c in self._callbacks()) + sampled + own

    def _check_outputs(self, objective: Objective, x: Tensor) -> None:
        w = objective.initial_weights()[None]
        if x.is_floating_point() and x.dtype != w.dtype:
            raise ValueError(f"X is {x.dtype} and the module's weights are {w.dtype}; skorch does not cast: convert X.")
        objective.predict(w, x[None])

    def _adopt(self, module: nn.Module) -> NeuralNet:
        with isolated(0, self.device):
            net = copy.copy(self).net.set_params(verbose=0).initialize().set_params(verbose=self.net.verbose)
        net.module_.load_state_dict(module.state_dict())
        return net

    # --- the loss -------------------------------------------------------------------------------------------------------

    @property
    def _smooths(self) -> bool:
        """Whether the loss is plain cross-entropy, whose smoothing may be a tensor."""
        plain = self.net.criterion is nn.CrossEntropyLoss and type(self.net).get_loss in _OWN_LOSSES
        return plain and self.net.get_params_for("criterion").keys() <= {"label_smoothing"}


def _criterion_of(net: NeuralNet) -> CustomLoss:
    """The net's own ``get_loss``, with a criterion of its own."""
    net = clone(net)
    with net._current_init_context("criterion"):
        net.initialize_criterion()
    net.criterion_.to(net.device)
    return CustomLoss(partial(_skorch_loss, net))


def _skorch_loss(net: NeuralNet, outputs: Tensor, y: Tensor) -> Tensor:
    if isinstance(net, NeuralNetBinaryClassifier) and outputs.dim() > 1:
        outputs = outputs.squeeze(-1)
    return net.get_loss(outputs, y, training=True)


def _decouples(optimizer: Any, params: Mapping[str, Any]) -> bool:
    """Whether the optimizer's weight decay is beside the loss (AdamW) and not a penalty in it (Adam, SGD)."""
    return "AdamW" in getattr(optimizer, "__name__", "") or bool(params.get("optimizer__decoupled_weight_decay", False))
