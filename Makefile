# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first, if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
WORKERS ?= 2

.PHONY: demo test test-fast test-oldest lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.installed  ## Tune an MLP on digits, next to TPE and random search (a minute)
	$(BIN)/python -m benchmarks digits

test: $(VENV)/.installed lint  ## Everything
	$(BIN)/python -m pytest -n $(WORKERS)

test-fast: $(VENV)/.installed  ## Under 90 seconds
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-oldest:  ## Everything, on the oldest supported versions (tests/oldest.txt), in a .venv of its own
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet "$(TORCH)"
	$(VENV)-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable ".[test]"
	$(VENV)-oldest/bin/python -m pytest -n $(WORKERS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
