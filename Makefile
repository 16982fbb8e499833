# make demo | test | test-slow | check | style | bench: each makes the virtual environment first if there is none.
# VENV chooses the environment, PYTHON the interpreter that makes it, WORKERS how many processes test, PYTEST_ARGS what
# else pytest is given.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= auto
PYTEST_ARGS ?=
BENCH_MODEL ?= ../shared/data/deit-tiny-imagenet

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check style bench clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt plugins/optimum-fliqs/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing into $(VENV): about two minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ./plugins/optimum-fliqs
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/vit.py recipes/configs/digits.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python recipes/bench/step.py $(BENCH_MODEL) --output recipes/bench/results/step-deit-tiny.json

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
