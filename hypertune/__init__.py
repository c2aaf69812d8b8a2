"""hypertune: hyperparameter search for PyTorch models by gradients, as a scikit-learn search.

Grid, random and Bayesian search pay one training run for every setting they try. Hyper-training (Lorraine & Duvenaud
2018) trains once: a *hypernetwork* learns the weights as a function of the hyperparameters while they
train, and the hyperparameters descend the validation loss through it.

>>> from scipy.stats import loguniform, uniform
>>> from sklearn.datasets import load_iris
>>> from hypertune import MLP, HyperTrainingSearchCV, TorchClassifier
>>> X, y = load_iris(return_X_y=True)
>>> search = HyperTrainingSearchCV(
...     TorchClassifier(MLP(hidden=(16,)), max_epochs=20, random_state=0),
...     {"weight_decay": loguniform(1e-6, 1e1), "module__dropout": uniform(0, 0.8), "label_smoothing": uniform(0, 0.3)},
...     cv=3, random_state=0).fit(X, y)
>>> sorted(search.best_params_)
['label_smoothing', 'module__dropout', 'weight_decay']
"""

from hypertune.checks import check_hypergradient
from hypertune.estimator import TorchClassifier, TorchRegressor
from hypertune.factory import MLP, model_factory
from hypertune.response import BestResponse
from hypertune.search import HyperTrainingSearchCV
from hypertune.space import per_feature, per_layer, per_unit, per_weight

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "BestResponse",
    "HyperTrainingSearchCV",
    "TorchClassifier",
    "TorchRegressor",
    "check_hypergradient",
    "model_factory",
    "per_feature",
    "per_layer",
    "per_unit",
    "per_weight",
]
