# The same commands on a laptop and in CI.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint wheel clean

demo: .venv/.installed
	$(BIN)/tandem demo

test: lint
	$(BIN)/pytest

soak: .venv/.installed-dev
	$(BIN)/pytest -m soak -s tests/test_soak.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/.installed-dev
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
