"""Data flow one way: each room imports only from the rooms to its left. And few public names."""

import ast
import subprocess
import sys
from pathlib import Path

import hypertune

ROOMS = {  # room -> the rooms that it imports from
    "randomness": set(),
    "callbacks": set(),
    "space": set(),
    "arrays": set(),
    "dropout": set(),
    "recurrent": {"dropout"},
    "modules": set(),
    "parametrized": set(),
    "memory": {"dropout", "modules"},
    "reach": set(),
    "layers": {"dropout", "modules", "recurrent"},
    "functions": set(),
    "factory": {"functions", "modules", "parametrized"},
    "optimizers": {"functions"},
    "penalties": set(),
    "batches": set(),
    "hypernetworks": set(),
    "losses": {"dropout", "functions"},
    "descent": {"space"},
    "calls": {"functions", "layers", "memory"},
    "stacked": {"calls", "dropout", "layers", "memory", "randomness", "reach"},
    "examination": {"calls", "modules", "randomness", "recurrent", "stacked"},
    "objective": {"batches", "dropout", "functions", "losses", "memory", "penalties", "reach", "stacked"},
    "algorithms": {"hypernetworks", "randomness"},
    "response_optimizers": {"hypernetworks"},
    "hypergradients": {"algorithms", "hypernetworks"},
    "implicit": {"algorithms", "hypergradients", "hypernetworks", "response_optimizers"},
    "unrolled": {"algorithms", "hypergradients", "hypernetworks", "response_optimizers"},
    "net": {"batches", "objective", "reach"},
    "base": {
        "arrays",
        "batches",
        "callbacks",
        "factory",
        "functions",
        "losses",
        "net",
        "objective",
        "optimizers",
        "randomness",
        "reach",
        "stacked",
    },
    "estimator": {"base", "losses", "objective"},
    "skorch": {"batches", "functions", "losses", "objective", "optimizers", "randomness", "reach"},
    "folds": {"arrays", "base", "batches", "net", "skorch"},
    "response": {
        "arrays",
        "batches",
        "folds",
        "hypernetworks",
        "losses",
        "net",
        "objective",
        "randomness",
        "space",
    },
    "tunable": {"net", "objective", "randomness", "reach", "space"},
    "hyperprior": {"folds", "response"},
    "recipes": {
        "algorithms",
        "net",
        "hypergradients",
        "hypernetworks",
        "implicit",
        "response_optimizers",
        "space",
        "unrolled",
    },
    "task": {"examination", "folds", "objective", "randomness", "space", "tunable"},
    "problem": {"algorithms", "batches", "folds", "hypernetworks", "net", "objective", "space"},
    "trace": {"algorithms", "hypernetworks", "problem", "response", "task"},
    "training": {
        "algorithms",
        "batches",
        "descent",
        "hypergradients",
        "hypernetworks",
        "losses",
        "objective",
        "problem",
        "randomness",
        "recipes",
        "response",
        "stacked",
        "task",
        "trace",
    },
    "retraining": {
        "arrays",
        "base",
        "batches",
        "choices",
        "folds",
        "functions",
        "losses",
        "memory",
        "net",
        "objective",
        "problem",
        "randomness",
        "space",
        "task",
    },
    "starts": {"batches", "folds", "hyperprior", "retraining", "space", "task"},
    "candidates": {"retraining", "space", "task"},
    "choices": set(),
    "comparing": {"choices", "folds", "starts", "task"},
    "optuna": {"choices", "search", "space"},
    "plotting": {"response", "search"},
    "proposal": {"candidates", "folds", "hyperprior", "net", "response", "starts", "task"},
    "search": {
        "base",
        "callbacks",
        "choices",
        "comparing",
        "folds",
        "hypergradients",
        "hypernetworks",
        "net",
        "proposal",
        "randomness",
        "recipes",
        "response",
        "space",
        "task",
        "training",
        "tunable",
    },
    "checks": {
        "batches",
        "folds",
        "implicit",
        "base",
        "problem",
        "randomness",
        "retraining",
        "search",
        "stacked",
        "starts",
        "task",
    },
}
PACKAGE = Path(hypertune.__file__).parent


def _imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)} | {
        alias.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for alias in n.names
    }


def test_imports_go_only_leftwards():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ROOMS, "__init__"}
    for room, allowed in ROOMS.items():
        own = {
            name.removeprefix("hypertune.") for name in _imports(PACKAGE / f"{room}.py") if name.startswith("hypertune")
        }
        assert own == allowed, f"{room} imports {own - allowed}, and not {allowed - own}"


def test_every_room_is_described():
    described = (PACKAGE.parent / "docs" / "CONTRIBUTING.md").read_text()
    assert not [room for room in ROOMS if f"`{room}`" not in described]


def test_the_mathematics_knows_no_scikit_learn():
    torch_only = {
        "space",
        "dropout",
        "recurrent",
        "layers",
        "modules",
        "reach",
        "losses",
        "penalties",
        "batches",
        "hypernetworks",
        "memory",
        "stacked",
        "examination",
        "objective",
        "algorithms",
        "response_optimizers",
        "descent",
    }
    for room in torch_only | {"hypergradients", "implicit", "unrolled"}:
        assert not [name for name in _imports(PACKAGE / f"{room}.py") if name.startswith(("sklearn", "joblib"))], room


def test_only_the_search_knows_model_selection():
    for room in ROOMS.keys() - {"search"}:
        assert not [name for name in _imports(PACKAGE / f"{room}.py") if "model_selection" in name], room


def test_the_public_names_are_few_and_documented():
    assert len(hypertune.__all__) <= 15
    assert all(getattr(hypertune, name).__doc__ for name in hypertune.__all__)


def test_importing_leaves_the_global_random_state_and_threads_alone():
    code = (
        "import torch, numpy as np; t, n = torch.get_num_threads(), torch.get_rng_state(); import hypertune;"
        "assert torch.get_num_threads() == t and torch.equal(torch.get_rng_state(), n)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
