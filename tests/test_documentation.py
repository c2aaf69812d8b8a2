"""Every code block of README and docs runs, and so does every doctest."""

import doctest
import importlib
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpydoc.validate import validate

import hypertune

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, monkeypatch):
    """A page's Python blocks, one after the other, in one namespace."""
    matplotlib.use("Agg")
    namespace: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("room", [p.stem for p in Path(hypertune.__file__).parent.glob("*.py")])
def test_doctests(room: str):
    module = hypertune if room == "__init__" else importlib.import_module(f"hypertune.{room}")
    with np.printoptions(legacy=False):
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_name_has_a_valid_numpydoc_docstring():
    """What GridSearchCV's docstring is held to: sections, parameters in order, no unknown ones."""
    for name in (
        "HyperTrainingSearchCV",
        "TorchClassifier",
        "TorchRegressor",
        "MLP",
        "BestResponse",
        "check_hypergradient",
        "optuna.to_study",
        "plotting.PathDisplay",
        "plotting.PathDisplay.from_search",
        "plotting.ResponseDisplay",
        "plotting.ResponseDisplay.from_search",
    ):
        errors = {code for code, _ in validate(f"hypertune.{name}")["errors"]}
        assert not errors & {"GL08", "SS01", "PR01", "PR02", "PR03", "PR04"}, (name, errors)


def _anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if target.startswith("http"):
                continue
            there = page.parent / path if path else page
            assert there.exists(), (page.name, target)
            assert not anchor or anchor in _anchors(there), (page.name, target)
