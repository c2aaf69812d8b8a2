"""What a gradient can tune: hyperparameters that shape the training loss, and where each arrives.

Everything else is refused here, by name, before anything is trained.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hypertune.net import Net
from hypertune.objective import LOSS_HYPERPARAMETERS, Objective
from hypertune.randomness import isolated
from hypertune.reach import Reach, find_reach
from hypertune.space import ELSEWHERE, OUTER, Grain, Hyperparameter, Shape, Space

_ALIKE = 5  # modules that are built at one value
_GRAINS: dict[str, tuple[Grain | None, ...]] = {
    "weight_decay": (None, "layer", "unit", "weight", "feature"),
    "l1": (None, "layer", "unit", "weight", "feature"),
    "input_noise": (None, "feature"),
    "sample_weight": ("row",),
}


def of_net(net: Net, space: Space) -> Space:
    """The same space as the net has it: with one value for each training row where a hyperparameter means that, and with its learning rate."""

    def as_it_is(h: Hyperparameter) -> Hyperparameter:
        of_rows = h.grain is None and net.loss_names.get(h.own) == "sample_weight"
        return replace(h, grain="row" if of_rows else h.grain, is_rate=h.own == net.rate_name)

    return Space(tuple(map(as_it_is, space.hyperparameters)))


def check_choices(
    owner: str,
    settings: Mapping[str, Any],
    choices: Mapping[str, Any],
    ranges: Mapping[str, Any],
    net: Net,
    prefix: str,
) -> None:
    """Refuse lists of values where they cannot be compared, by name, before anything is computed.

    Parameters
    ----------
    owner, settings, prefix
        As for :func:`check_settings`.
    choices : mapping from str to list
    ranges : mapping from str to object
        The rest of the space.
    net : Net

    Raises
    ------
    ValueError
        For what the estimator has no parameter for, a whole net, a criterion and its parameters, what the hyper-training does not follow, beside a weight for each row, and where there is
        nothing else to tune.
    """
    for name in choices:
        where = f"param_distributions[{name!r}]"
        if name not in settings:
            raise ValueError(f"{where}: {owner} has no such parameter; {_hint(name, settings)}")
        why = None
        if f"{prefix}sample_weight" in ranges:
            why = "none is compared beside a weight for each row"
        elif f"{name}__" == prefix:
            why = "values are compared for the parameters of a net, and not whole nets"
        elif name.removeprefix(prefix).partition("__")[0] == "criterion" and name.startswith(prefix):
            why = "its validation losses may be of different units"
        elif name.startswith(prefix) and not net._sees(name.removeprefix(prefix)):
            why = "of such a net values are compared for the module, the optimizer, their parameters, batch_size and max_epochs alone"
        if why is not None:
            raise ValueError(
                f"{where}: it has a list of values, but {why}. Set it on the estimator, or give it to {OUTER}."
            )
    if choices and not ranges:
        raise ValueError(
            f"param_distributions has nothing but lists, for {sorted(choices)}: GridSearchCV tries them all. Here they are compared beside what gradients "
            f"tune: give that, too, such as {prefix + next(iter(net.loss_names))!r}: loguniform(1e-6, 1e1)."
        )


def _hint(name: str, settings: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, settings, n=3, cutoff=0.5)
    near += [known for known in settings if known.endswith(f"__{name}") and known not in near]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose one of {sorted(settings)}."


def check_settings(owner: str, settings: Mapping[str, Any], space: Space, prefix: str) -> None:
    """Refuse hyperparameters that are no numbers of the torch estimator itself, by name, before anything is computed.

    Parameters
    ----------
    owner : str
        The type of the whole estimator, for messages.
    settings : mapping from str to object
        All its parameters with their current values.
    space : Space
    prefix : str
        What precedes those of the torch estimator.

    Raises
    ------
    ValueError
        Naming the hyperparameter, what is possible and what to do instead.
    """
    module = settings.get(f"{prefix}module")
    for h in space.hyperparameters:
        name, where = h.name, f"param_distributions[{h.name!r}]"
        if name not in settings:
            if name.startswith(f"{prefix}module__"):
                _check_factory(name, module)
            near = difflib.get_close_matches(name, settings, n=3, cutoff=0.5)
            part, _, keyword = name.removeprefix(prefix).partition("__")
            function = settings.get(f"{prefix}{part}") if part in ("penalty", "augment") and keyword else None
            if function is not None and not any(known.startswith(f"{prefix}{part}__") for known in near):
                raise ValueError(
                    f"{where}: {part}={function!r} has no such keyword with a default; what can be tuned are keywords of a plain function "
                    f"that have one, as {keyword!r} in `def {part}(..., {keyword}=1.0)`."
                )
            raise ValueError(f"{where}: {owner} has no such parameter; {_hint(name, settings)}")
        if not name.startswith(prefix):
            raise ValueError(
                f"{where}: it belongs to a preprocessing step, which is fitted and not trained, so that no gradient reaches it: {ELSEWHERE}"
            )
        if h.grain is not None and isinstance(settings[name], (Mapping, Sequence, np.ndarray)):
            continue
        part, _, keyword = name.removeprefix(prefix).partition("__")
        if part in ("penalty", "augment") and keyword and hasattr(settings.get(f"{prefix}{part}"), "get_params"):
            raise ValueError(
                f"{where}: {keyword!r} is a parameter of the object {part}={settings[f'{prefix}{part}']!r}; what can be tuned are keywords of "
                f"a plain function, as {keyword!r} in `def {part}(..., {keyword}=1.0)`."
            )
        if not isinstance(settings[name], Real) or isinstance(settings[name], bool):
            raise ValueError(
                f"{where}: its current value {settings[name]!r} is not a number, so there is no gradient to follow: {ELSEWHERE}"
            )


def _check_factory(name: str, module: Any) -> None:
    """Refuse a keyword ``…module__…`` of what is no factory with keywords."""
    where = f"param_distributions[{name!r}]"
    if isinstance(module, nn.Module):
        raise ValueError(
            f"{where}: module is a {type(module).__name__} that is built already, so no keyword of it can be set. Give its class "
            "or another factory (n_features_in, n_outputs) -> nn.Module with that keyword."
        )
    if inspect.isclass(module) and hasattr(module, "get_params"):
        raise ValueError(f"{where}: module is the class {module.__name__}; give it a factory, {module.__name__}().")
    keyword = name.rpartition("module__")[2]
    parameters = _parameters(module) if callable(module) else []
    misspelt = difflib.get_close_matches(keyword, [p.name for p in parameters], cutoff=0.5)
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not misspelt:
        raise ValueError(
            f"{where}: the factory {module!r} takes any keyword (**), and names none: give it that keyword by name, with a default."
        )
    if module is None:
        raise ValueError(
            f"{where}: module is None, which stands for MLP() and has no keywords to set. Give it: module=MLP()."
        )


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # it has no signature to look at
        return []


def check_names(net: Net, space: Space) -> None:
    """Refuse hyperparameters that do not shape the training loss, by name, before anything is computed.

    Raises
    ------
    ValueError
        Naming the hyperparameter, what is possible and what to do instead.
    """
    for h in space.hyperparameters:
        where, own = f"param_distributions[{h.name!r}]", h.own
        if h.grain not in _GRAINS.get(own, (None,)):  # under skorch's names none has a finer one
            raise ValueError(
                f"{where}: per_{h.grain}(...) needs something that has such a shape: weight_decay or l1 of a TorchClassifier or "
                "TorchRegressor (per_feature also input_noise). This one is a single number."
            )
        if own.startswith(("module__", "penalty__", "augment__")):
            continue
        if not h.is_rate and own not in net.loss_names:
            raise ValueError(
                f"{where}: {own!r} does not change the loss that training minimises, so there is no gradient to follow "
                f"(Lorraine & Duvenaud 2018, section 2.2): {ELSEWHERE} By gradient: {sorted(net.loss_names)}, {'the keywords of penalty and augment, ' * ('augment' in net.get_params())}"
                f"and the dropout rates among module__…; and by trying some values: {net.rate_name}."
            )
        if reason := net._why_not(own):
            raise ValueError(f"{where}: {reason}.")
        if h.is_rate:
            _check_rate(h, space.without_rate, such_as=h.prefix + next(iter(net.loss_names)))
            continue
        low, high = LOSS_HYPERPARAMETERS[net.loss_names[own]]
        if not (low <= h.support[0] and h.support[1] <= high):
            raise ValueError(
                f"{where}: the range [{h.support[0]:g}, {h.support[1]:g}]{_ends(h)} must lie in [{low:g}, {high:g}]."
            )


def _check_rate(h: Hyperparameter, others: Space, such_as: str) -> None:
    """Refuse a learning rate that cannot be tried."""
    where, (low, high) = f"param_distributions[{h.name!r}]", h.support
    if not others.hyperparameters:
        raise ValueError(
            f"{where}: the search is for hyperparameters of the loss, with the learning rate beside them. Put one there, such as "
            f"{such_as}, or give the learning rate alone to {OUTER}."
        )
    if any(other.grain == "row" for other in others.hyperparameters):
        raise ValueError(
            f"{where}: learning rates are not tried beside a weight for each row. Set it on the estimator, or give it to {OUTER}."
        )
    if low < 0 or not math.isfinite(high):
        raise ValueError(
            f"{where}: the range [{low:g}, {high:g}] has learning rates that are negative or infinite; write loguniform(low, high)."
        )


def find_reaches(net: Net, space: Space) -> dict[str, list[Reach]]:
    """For every tuned factory keyword, the numbers in the module that it sets.

    Raises
    ------
    ValueError
        If a keyword reaches nothing, changes the architecture, or takes a dropout rate out of [0, 1).
    """
    reaches: dict[str, list[Reach]] = {}
    for h in space.hyperparameters:
        own = h.own
        if not own.startswith("module__"):
            continue
        where = f"param_distributions[{h.name!r}]"

        def build(value: float, own: str = own) -> nn.Module:
            with isolated(0, net.device):
                return copy.deepcopy(net).set_params(**{own: value})._build_module()

        low, high = (float(q) for q in h.prior.ppf([0.01, 0.99]))
        try:
            reaches[own] = find_reach(build, low, high)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error}{_ends(h)}. Give it a range that suits it, set it on the estimator, or give it to {OUTER}."
            ) from error
        module = build(low)
        for path, _, a, b in reaches[own]:
            rates = sorted(a + b * bound for bound in h.support)
            if isinstance(module.get_submodule(path), nn.modules.dropout._DropoutNd) and not (
                rates[0] >= 0 and rates[1] < 1
            ):
                raise ValueError(
                    f"{where}: the range takes the rate of the {type(module.get_submodule(path)).__name__} {path!r} from {rates[0]:g} to "
                    f"{rates[1]:g}{_ends(h)}; a dropout rate must lie in [0, 1): end the range before 1."
                )
        taken = {(r.path, r.name) for key, found in reaches.items() if key != own for r in found}
        if both := [f"{r.path}.{r.name}" for r in reaches[own] if (r.path, r.name) in taken]:
            raise ValueError(f"{where}: {both[0]} is set by another tuned keyword too; tune one of them.")
        for value in (*h.support, float(net.get_params()[own])):  # where λ̂ may get, and where it may start
            if not math.isfinite(value):
                continue
            there = build(value)
            parameters = [[(k, p.shape) for k, p in m.named_parameters()] for m in (module, there)]
            paths = {path for path, _ in there.named_modules()}
            if parameters[0] != parameters[1] or any(r.path not in paths for r in reaches[own]):
                raise ValueError(
                    f"{where}: at {value:g} the factory builds other layers. Build the same ones at every value "
                    "(nn.Dropout(0.0) does nothing)."
                )
    return reaches


def check_reach(net: Net, objective: Objective, x: Tensor, h: Hyperparameter, seed: int) -> None:
    """Refuse a keyword that reaches the module by another way, too, than by the numbers that are set in our copy of it.

    Parameters
    ----------
    net : Net
    objective : Objective
        Of the net's module, built under ``seed``.
    x : Tensor of shape (B, ...)
        Some rows.
    h : Hyperparameter
        With the lower and the upper quartile of its distribution a module is built, which must give what our copy gives in training.

    Raises
    ------
    ValueError
        Naming the hyperparameter, what it reaches, and what to do instead.
    """
    w, own = objective.initial_weights(), h.own
    w = w + 0.1 * torch.randn_like(w)  # a layer may begin with zeros

    def outputs(one: Objective, value: float) -> Tensor:
        with torch.no_grad(), isolated(seed, net.device):
            one.draw_streams()
            return one.outputs(one.named(w[None]), x[None], {own: value}, training=True, keep=False)

    def of_built(value: float) -> Tensor:
        with isolated(seed, net.device):
            built = copy.deepcopy(net).set_params(**{own: value})
            other = built._make_objective(built._build_module())
        return outputs(other, value)

    def same(one: Tensor, other: Tensor) -> bool:
        size = float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
        return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size + 1e-6, equal_nan=True)

    for value in map(float, h.prior.ppf([0.25, 0.75])):
        theirs = of_built(value)
        if same(outputs(objective.with_statistics_of(1, 1), value), theirs):
            continue
        if all(same(theirs, of_built(value)) for _ in range(_ALIKE)):  # else no two of these modules are
            found = ", ".join(f"{path}.{attribute}" for path, attribute, _, _ in objective.reach[own])
            raise ValueError(
                f"param_distributions[{h.name!r}]: it sets {found} in the module, and something else that is not found: a module that is built "
                f"at {value:g} trains otherwise. Keep it everywhere as an attribute with a public name (self.rate = rate; not in a list, a "
                "dict, a buffer or a closure)."
            )


def _ends(h: Hyperparameter) -> str:
    """A hint for those who took scipy's second argument for the upper end."""
    dist = getattr(h.prior, "dist", None)
    shifted = getattr(dist, "name", "") == "uniform" and h.support[0] > 0 and h.support[1] > 1
    return f" (its range ends at {h.support[1]:g}: uniform(a, b) goes from a to a + b)" if shifted else ""


def arrangements(net: Net, objective: Objective, space: Space, x: Tensor, n_rows: int) -> dict[str, Shape]:
    """How the values of every hyperparameter that has a grain are arranged in this model, by name.

    Parameters
    ----------
    net, objective, space
    x : Tensor of shape (N, ...)
        Some rows.
    n_rows : int
        How many there are in all.

    Raises
    ------
    ValueError
        If the model has nothing of that grain.
    """
    shapes: dict[str, Shape] = {}
    for h in space.hyperparameters:
        if h.grain is None:
            continue
        if h.grain == "row":
            shapes[h.name] = (n_rows,)
            continue
        if net.loss_names[h.own] == "input_noise":
            if x.dim() != 2:
                raise ValueError(
                    f"param_distributions[{h.name!r}]: per_feature noise needs rows of features, got rows of shape "
                    f"{tuple(x.shape[1:])}."
                )
            shapes[h.name] = (x.shape[1],)
            continue
        try:
            shapes[h.name] = objective.arrangement(h.grain, x.shape[1])
        except ValueError as error:
            raise ValueError(f"param_distributions[{h.name!r}]: per_{h.grain}(...): {error}.") from error
    return shapes
